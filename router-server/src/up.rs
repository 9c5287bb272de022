//! Worker processes of `scls-router up`: started, watched, started again, ended.
//!
//! Knows processes and the line by which a worker says where it listens; does not know what workers do.
//!
//! A worker must never outlive its router. Its stdin is a pipe that we hold: when we die, however we die, the pipe
//! closes and `--exit-with-parent` ends it. It is in a process group of its own, so that Ctrl-C reaches us alone and
//! requests can finish.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::{error, info, warn};

use crate::cli::UpArgs;
use crate::fleet::Fleet;

/// What a worker prints when it can be dialled.
const LISTENING: &str = "scls-worker listening on ";
/// Time between SIGTERM and SIGKILL.
const PATIENCE: Duration = Duration::from_secs(5);
const BACKOFF: [Duration; 2] = [Duration::from_millis(250), Duration::from_secs(10)];
/// A worker that lived this long did not fail at its start.
const HEALTHY: Duration = Duration::from_secs(30);

/// The workers of this router.
pub struct Up {
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

/// How one life of a worker ended.
enum Life {
    /// We were told to stop.
    Stopped,
    /// The process ended, after it had listened or not.
    Died { listened: bool, why: String },
}

impl Up {
    /// Starts the workers. The receiver gets a reason if one of them cannot even start once: then it is not the
    /// worker that is broken but what we were told to start.
    pub fn start(args: &UpArgs, python: &Path, fleet: &Arc<Fleet>) -> (Self, mpsc::Receiver<String>) {
        let (stop, stopped) = watch::channel(false);
        let (failed, failures) = mpsc::channel(1);
        let mut tasks = JoinSet::new();
        for index in 0..args.workers {
            let worker = Worker {
                name: format!("w{index}"),
                python: python.into(),
                model: args.model.clone().into(),
                cost_model: args.cost_model.clone(),
                more: args.worker_args.split_whitespace().map(str::to_owned).collect(),
                fleet: Arc::clone(fleet),
            };
            tasks.spawn(worker.supervise(stopped.clone(), failed.clone()));
        }
        (Self { stop, tasks }, failures)
    }

    /// Ends all workers and waits for them.
    pub async fn end(mut self) {
        let _ = self.stop.send(true);
        while self.tasks.join_next().await.is_some() {}
    }
}

struct Worker {
    name: String,
    python: std::ffi::OsString,
    model: std::ffi::OsString,
    cost_model: Option<PathBuf>,
    more: Vec<String>,
    fleet: Arc<Fleet>,
}

impl Worker {
    async fn supervise(self, mut stopped: watch::Receiver<bool>, failed: mpsc::Sender<String>) {
        let mut backoff = BACKOFF[0];
        let mut ever_listened = false;
        loop {
            let began = Instant::now();
            let (listened, why) = match self.live(&mut stopped).await {
                Life::Stopped => return,
                Life::Died { listened, why } => (listened, why),
            };
            ever_listened |= listened;
            if !ever_listened {
                let _ = failed.try_send(format!(
                    "worker {} could not start: {why}\nwhy may stand above; --python names the Python that has scls_worker",
                    self.name
                ));
                return;
            }
            backoff = if began.elapsed() > HEALTHY { BACKOFF[0] } else { (backoff * 2).min(BACKOFF[1]) };
            error!(worker = self.name, why, again_ms = backoff.as_millis(), "worker died");
            tokio::select! {
                () = tokio::time::sleep(backoff) => {}
                () = told(&mut stopped) => return,
            }
        }
    }

    fn spawn(&self) -> std::io::Result<Child> {
        Command::new(&self.python)
            .args(["-m", "scls_worker", "--port", "0", "--exit-with-parent", "--worker-id", &self.name, "--model"])
            .arg(&self.model)
            .args(self.cost_model.iter().flat_map(|file| ["--cost-model".as_ref(), file.as_os_str()]))
            .args(&self.more)
            // What guards the router is none of a worker's business.
            .env_remove("SCLS_ROUTER_API_KEY")
            .env_remove("SCLS_ROUTER_FLEET_KEY")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
    }

    async fn live(&self, stopped: &mut watch::Receiver<bool>) -> Life {
        let died = |listened, why: String| Life::Died { listened, why };
        let mut child = match self.spawn() {
            Ok(child) => child,
            Err(error) => return died(false, format!("cannot run {}: {error}", self.python.to_string_lossy())),
        };
        info!(worker = self.name, pid = child.id(), "worker started");
        // Taken out, because waiting for a child closes its stdin, which would end it.
        let stdin = child.stdin.take();
        let Some(mut lines) = child.stdout.take().map(|out| BufReader::new(out).lines()) else {
            return died(false, "it has no stdout".into());
        };
        if let Some(stderr) = child.stderr.take() {
            tokio::spawn(pass_through(self.name.clone(), BufReader::new(stderr).lines()));
        }
        let address = tokio::select! {
            address = listening(&mut lines) => address,
            () = told(stopped) => {
                self.end(child, stdin).await;
                return Life::Stopped;
            }
        };
        let Some(address) = address else {
            return died(false, ended(child.wait().await));
        };
        tokio::spawn(pass_through(self.name.clone(), lines));
        let url = format!("grpc://{address}");
        self.fleet.add(url.clone());
        let life = tokio::select! {
            status = child.wait() => died(true, ended(status)),
            () = told(stopped) => Life::Stopped,
        };
        self.fleet.remove(&url);
        if matches!(life, Life::Stopped) {
            self.end(child, stdin).await;
        }
        life
    }

    /// Asks the worker to end, waits, and ends it.
    async fn end(&self, mut child: Child, stdin: Option<ChildStdin>) {
        drop(stdin);
        let pid = child.id().and_then(|pid| rustix::process::Pid::from_raw(pid.cast_signed()));
        if let Some(pid) = pid {
            // Fails if it is gone already, which is what we want.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        if tokio::time::timeout(PATIENCE, child.wait()).await.is_err() {
            warn!(worker = self.name, "worker does not end, killing it");
            let _ = child.kill().await;
        }
    }
}

async fn told(stopped: &mut watch::Receiver<bool>) {
    // An error means that the sender is gone, which is the end as well.
    let _ = stopped.wait_for(|stop| *stop).await;
}

/// Where the worker says it listens; `None` if its output ends before.
async fn listening(lines: &mut Lines<BufReader<ChildStdout>>) -> Option<String> {
    while let Some(line) = lines.next_line().await.ok()? {
        if let Some(address) = line.strip_prefix(LISTENING) {
            return Some(address.trim().to_owned());
        }
        let _ = writeln!(std::io::stderr(), "{line}");
    }
    None
}

async fn pass_through<R: AsyncRead + Unpin>(name: String, mut lines: Lines<BufReader<R>>) {
    while let Ok(Some(line)) = lines.next_line().await {
        // Nobody may be there to read it: the worker is to go on all the same.
        let _ = writeln!(std::io::stderr(), "[{name}] {line}");
    }
}

fn ended(status: std::io::Result<ExitStatus>) -> String {
    status.map_or_else(|error| error.to_string(), |status| status.to_string())
}
