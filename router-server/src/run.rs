//! Runs a command: sockets, signals, exit codes. All that is a process and not a request.

use std::future::Future;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::net::TcpListener;
use tracing::warn;
use tracing_subscriber::EnvFilter;

use crate::auth::Keys;
use crate::calibrate;
use crate::cli::{CalibrateArgs, Command, ConfigCommand, ServeArgs, UpArgs};
use crate::config::{self, Parsed, Setting};
use crate::fleet::Fleet;
use crate::health;
use crate::metrics::Metrics;
use crate::mock::{self, MockArgs};
use crate::serve::{Listeners, serve};
use crate::simulate;
use crate::up::Up;

/// Why a command failed; the text is for people.
pub enum Failure {
    /// What was asked for cannot be done, and never could.
    Usage(String),
    /// It went wrong at some time.
    Run(String),
    /// It was ended before it was done, or is not as it should be: what is to be printed of it, and why.
    Early(String, String),
}

impl From<String> for Failure {
    fn from(text: String) -> Self {
        Self::Run(text)
    }
}

/// Runs a command to its end. `python` is the interpreter we run in, if we do.
pub fn run(parsed: Parsed, python: Option<PathBuf>) -> Result<(), Failure> {
    let Parsed { cli, settings, typed, warnings } = parsed;
    match cli.command {
        Command::Version => print(&format!("scls-router {}\n", env!("CARGO_PKG_VERSION"))),
        Command::Config(command) => {
            warn_people(&warnings);
            configure(&command, &settings)
        }
        Command::Health(args) => on_runtime(async {
            let said = health::ask(&args).await?;
            print(&format!("{said}\n"))
        }),
        Command::Serve { workers, serve } => {
            serve.check(&settings).map_err(Failure::Usage)?;
            start_log(&serve.log_level, serve.log_json, &warnings)?;
            let urls = workers.worker_urls.into_iter().flat_map(|urls| urls.0).collect();
            on_runtime(async { Ok(serve_urls(&serve, urls).await?) })
        }
        Command::Up { up, serve } => {
            let checked = serve.check(&settings).and_then(|()| check_model(&up.model));
            checked.and_then(|()| check_cost_model(up.cost_model.as_deref())).map_err(Failure::Usage)?;
            start_log(&serve.log_level, serve.log_json, &warnings)?;
            let python = up.python.clone().or(python).unwrap_or_else(|| "python3".into());
            on_runtime(async { Ok(serve_up(&serve, &up, &python).await?) })
        }
        Command::Calibrate(args) => {
            check_model(&args.model).map_err(Failure::Usage)?;
            let python = args.python.clone().or(python).unwrap_or_else(|| "python3".into());
            on_runtime(async { print(&calibrated(&args, &python).await?) })
        }
        Command::Simulate(args) => {
            on_runtime(async { print(&until_signal(|stop| simulate::run(&args, &typed, stop))?) })
        }
        Command::Doctor(args) => {
            on_runtime(async { print(&until_signal(|stop| simulate::doctor(&args, &typed, stop))?) })
        }
        Command::MockWorker { mock, log_level } => {
            mock::check(&mock).map_err(Failure::Usage)?;
            start_log(&log_level, false, &warnings)?;
            on_runtime(async { Ok(mock_worker(&mock).await?) })
        }
    }
}

fn configure(command: &ConfigCommand, settings: &[Setting]) -> Result<(), Failure> {
    match command {
        ConfigCommand::Show { origin, .. } => print(&config::show(settings, *origin)),
        ConfigCommand::Check { all } => {
            all.serve.check(settings).map_err(Failure::Usage)?;
            api_keys(&all.serve).map_err(Failure::Usage)?;
            let state = |command: &str| match config::missing(command, settings) {
                missing if missing.is_empty() => format!("{command}: complete\n"),
                missing => format!("{command}: needs {}\n", missing.join(", ")),
            };
            print(&format!("the settings are valid\n{}{}", state("serve"), state("up")))
        }
    }
}

fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    let printed = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    printed.map_err(|error| Failure::Run(format!("cannot write to stdout: {error}")))
}

/// Where there is no log.
fn warn_people(warnings: &[String]) {
    for warning in warnings {
        let _ = writeln!(std::io::stderr(), "warning: {warning}");
    }
}

fn on_runtime(work: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("no runtime: {error}"))?;
    let result = runtime.block_on(work);
    // Texts of clients that are gone must not hold the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

fn start_log(level: &str, json: bool, warnings: &[String]) -> Result<(), String> {
    let filter = EnvFilter::try_new(level).map_err(|error| format!("--log-level: {error}"))?;
    // Who reads stderr may go away; that is no reason to stop.
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).log_internal_errors(false);
    // Fails where the embedding process has a log already: then that one is used.
    let _ = if json { log.json().try_init() } else { log.with_ansi(false).try_init() };
    for warning in warnings {
        warn!("{warning}");
    }
    Ok(())
}

fn check_model(directory: &Path) -> Result<(), String> {
    let shown = directory.display();
    if !directory.is_dir() {
        return Err(format!("no such model directory: {shown}"));
    }
    if !directory.join("config.json").is_file() {
        return Err(format!("not a model directory, config.json is missing: {shown}"));
    }
    let weights = |entry: std::fs::DirEntry| entry.path().extension().is_some_and(|end| end == "safetensors");
    let mut entries = std::fs::read_dir(directory).map_err(|error| format!("cannot read {shown}: {error}"))?.flatten();
    if entries.any(weights) {
        Ok(())
    } else {
        Err(format!("no weights (*.safetensors) in the model directory: {shown}"))
    }
}

fn check_cost_model(file: Option<&Path>) -> Result<(), String> {
    match file {
        // What is in it is the worker's to judge, which knows its model.
        Some(file) if !file.is_file() => {
            Err(format!("no such cost model: {}\n`scls-router calibrate` makes one", file.display()))
        }
        _ => Ok(()),
    }
}

/// A signal ends the worker too.
async fn calibrated(args: &CalibrateArgs, python: &Path) -> Result<String, Failure> {
    let signals = Signals::listen()?;
    tokio::select! {
        told = calibrate::run(args, python) => told,
        () = signals.first => Err(Failure::Run("ended by a signal, nothing is written".into())),
    }
}

/// Work that fills this thread and looks at a flag, which the first signal sets; the second ends the process.
fn until_signal<T>(work: impl FnOnce(&AtomicBool) -> Result<T, Failure>) -> Result<T, Failure> {
    let signals = Signals::listen()?;
    let stop = Arc::new(AtomicBool::new(false));
    let set = Arc::clone(&stop);
    tokio::spawn(async move {
        signals.first.await;
        set.store(true, Ordering::Relaxed);
        signals.second.await;
        std::process::exit(1);
    });
    tokio::task::block_in_place(|| work(&stop))
}

async fn serve_urls(args: &ServeArgs, urls: Vec<String>) -> Result<(), String> {
    let keys = api_keys(args)?;
    let (fleet, listeners, signals) = prepare(args).await?;
    for url in urls {
        fleet.add(url);
    }
    let served = serve(fleet, args.max_payload_size, keys, listeners, signals.first);
    tokio::select! {
        served = served => served.map_err(|error| error.to_string()),
        () = signals.second => Err(AT_ONCE.into()),
    }
}

async fn serve_up(args: &ServeArgs, workers: &UpArgs, python: &Path) -> Result<(), String> {
    let keys = api_keys(args)?;
    let (fleet, listeners, signals) = prepare(args).await?;
    let (up, mut failures) = Up::start(workers, python, &fleet);
    let mut failure = None;
    let stop = async {
        tokio::select! {
            () = signals.first => {}
            why = failures.recv() => failure = why,
        }
    };
    let all = async {
        let served = serve(fleet, args.max_payload_size, keys, listeners, stop).await;
        // Workers live until the requests that need them are done.
        up.end().await;
        served
    };
    let served = tokio::select! {
        served = all => served,
        // The workers end by themselves: we close what holds them.
        () = signals.second => return Err(AT_ONCE.into()),
    };
    match failure {
        Some(why) => Err(why),
        None => served.map_err(|error| error.to_string()),
    }
}

async fn mock_worker(args: &MockArgs) -> Result<(), String> {
    let listener = bind("--port", &args.host, args.port).await?;
    let signals = Signals::listen()?;
    mock::announce(&listener).map_err(|error| format!("cannot write to stdout: {error}"))?;
    let stop = async {
        tokio::select! {
            () = signals.first => {}
            () = parent_gone(), if args.exit_with_parent => {}
        }
    };
    tokio::select! {
        served = mock::serve(args, listener, stop) => served,
        () = signals.second => Err(AT_ONCE.into()),
    }
}

/// Ends when stdin does: when the process that holds its other end is gone, however it went.
async fn parent_gone() {
    let (held, gone) = tokio::sync::oneshot::channel::<()>();
    // A thread of its own: a read of stdin cannot be cancelled, and would keep the runtime from ending.
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        drop(held);
    });
    let _ = gone.await;
}

async fn prepare(args: &ServeArgs) -> Result<(Arc<Fleet>, Listeners, Signals), String> {
    let fleet = Fleet::new(args.pool_config(), Arc::new(Metrics::default()));
    let listeners = Listeners {
        http: bind("--port", &args.http.host, args.http.port).await?,
        grpc: bind("--grpc-port", &args.http.host, args.grpc_port).await?,
        admin: bind("--admin-port", "127.0.0.1", args.admin_port).await?,
    };
    // Before anything is announced, so that no signal is missed after that.
    let signals = Signals::listen()?;
    announce(&listeners).map_err(|error| format!("cannot write to stdout: {error}"))?;
    Ok((fleet, listeners, signals))
}

fn api_keys(args: &ServeArgs) -> Result<Keys, String> {
    let keys = args.api_key.as_deref().map(Keys::parse).transpose();
    keys.map(Option::unwrap_or_default).map_err(|error| format!("--api-key: {error}"))
}

async fn bind(flag: &str, host: &str, port: u16) -> Result<TcpListener, String> {
    TcpListener::bind((host, port)).await.map_err(|error| {
        let hint = match error.kind() {
            ErrorKind::AddrInUse | ErrorKind::PermissionDenied => {
                format!("choose another port with {flag}; 0 picks a free one")
            }
            _ => "--host must be an address or a name of this machine".to_owned(),
        };
        format!("cannot listen on {host}:{port}: {error}\n{hint}")
    })
}

/// One line a listener, for scripts that wait for them.
fn announce(listeners: &Listeners) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    for (what, listener) in [("http", &listeners.http), ("grpc", &listeners.grpc), ("admin", &listeners.admin)] {
        writeln!(out, "scls-router {what} listening on {}", listener.local_addr()?)?;
    }
    out.flush()
}

/// Why a run ended that did not wait for its requests.
const AT_ONCE: &str = "ended at once by a second signal";

/// SIGTERM and SIGINT: the first asks for the end, the second does not wait for it.
struct Signals {
    first: Pin<Box<dyn Future<Output = ()> + Send>>,
    second: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl Signals {
    fn listen() -> Result<Self, String> {
        use tokio::signal::unix::{SignalKind, signal};
        let handler = |kind| signal(kind).map_err(|error| format!("no signal handler: {error}"));
        let (mut terminate, mut interrupt) = (handler(SignalKind::terminate())?, handler(SignalKind::interrupt())?);
        let (count, counted) = tokio::sync::watch::channel(0u32);
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
                count.send_modify(|count| *count = count.saturating_add(1));
            }
        });
        let reached = |least: u32| {
            let mut counted = counted.clone();
            Box::pin(async move {
                // The sender lives as long as the runtime.
                let _ = counted.wait_for(|count| *count >= least).await;
            })
        };
        Ok(Self { first: reached(1), second: reached(2) })
    }
}
