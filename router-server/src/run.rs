//! Runs a command: sockets, signals, exit codes. All that is a process and not a request.

use std::future::Future;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tracing_subscriber::EnvFilter;

use crate::cli::{Command, ServeArgs, UpArgs};
use crate::fleet::Fleet;
use crate::metrics::Metrics;
use crate::mock::{self, MockArgs};
use crate::serve::{Listeners, serve};
use crate::up::Up;

/// Runs a command to its end; an error is for people.
pub fn run(command: Command) -> Result<(), String> {
    match command {
        Command::Version => {
            println!("scls-router {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        Command::Serve { worker_urls, serve } => {
            on_runtime(&serve.log_level, serve.log_json, serve_urls(&serve, worker_urls))
        }
        Command::Up { up, serve } => {
            check_model(&up.model)?;
            on_runtime(&serve.log_level, serve.log_json, serve_up(&serve, &up))
        }
        Command::MockWorker { mock, log_level } => on_runtime(&log_level, false, mock_worker(&mock)),
    }
}

fn on_runtime(level: &str, json: bool, work: impl Future<Output = Result<(), String>>) -> Result<(), String> {
    start_log(level, json)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("no runtime: {error}"))?;
    let result = runtime.block_on(work);
    // Texts of clients that are gone must not hold the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

fn start_log(level: &str, json: bool) -> Result<(), String> {
    let filter = EnvFilter::try_new(level).map_err(|error| format!("--log-level: {error}"))?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // Fails where the embedding process has a log already: then that one is used.
    let _ = if json { log.json().try_init() } else { log.with_ansi(false).try_init() };
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

async fn serve_urls(args: &ServeArgs, urls: Vec<String>) -> Result<(), String> {
    let (fleet, listeners, signal) = prepare(args).await?;
    for url in urls {
        fleet.add(url);
    }
    serve(fleet, args.max_payload_size, listeners, signal).await.map_err(|error| error.to_string())
}

async fn serve_up(args: &ServeArgs, workers: &UpArgs) -> Result<(), String> {
    let (fleet, listeners, signal) = prepare(args).await?;
    let (up, mut failures) = Up::start(workers, &fleet);
    let mut failure = None;
    let stop = async {
        tokio::select! {
            () = signal => {}
            why = failures.recv() => failure = why,
        }
    };
    let served = serve(fleet, args.max_payload_size, listeners, stop).await;
    // Workers live until the requests that need them are done.
    up.end().await;
    match failure {
        Some(why) => Err(why),
        None => served.map_err(|error| error.to_string()),
    }
}

async fn mock_worker(args: &MockArgs) -> Result<(), String> {
    let listener = bind("--port", &args.host, args.port).await?;
    let signal = shutdown_signal()?;
    mock::announce(&listener).map_err(|error| format!("cannot write to stdout: {error}"))?;
    let stop = async {
        tokio::select! {
            () = signal => {}
            () = parent_gone(), if args.exit_with_parent => {}
        }
    };
    mock::serve(args, listener, stop).await
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

async fn prepare(args: &ServeArgs) -> Result<(Arc<Fleet>, Listeners, impl Future<Output = ()>), String> {
    let fleet = Fleet::new(args.pool_config(), Arc::new(Metrics::default()));
    let listeners = Listeners {
        http: bind("--port", &args.host, args.port).await?,
        grpc: bind("--grpc-port", &args.host, args.grpc_port).await?,
        admin: bind("--admin-port", "127.0.0.1", args.admin_port).await?,
    };
    // Before anything is announced, so that no signal is missed after that.
    let signal = shutdown_signal()?;
    announce(&listeners).map_err(|error| format!("cannot write to stdout: {error}"))?;
    Ok((fleet, listeners, signal))
}

async fn bind(flag: &str, host: &str, port: u16) -> Result<TcpListener, String> {
    let hint = format!("choose another with {flag}; 0 picks a free one");
    TcpListener::bind((host, port)).await.map_err(|error| format!("cannot listen on {host}:{port}: {error}\n{hint}"))
}

/// One line a listener, for scripts that wait for them.
fn announce(listeners: &Listeners) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    for (what, listener) in [("http", &listeners.http), ("grpc", &listeners.grpc), ("admin", &listeners.admin)] {
        writeln!(out, "scls-router {what} listening on {}", listener.local_addr()?)?;
    }
    out.flush()
}

/// Ends with SIGTERM or SIGINT.
fn shutdown_signal() -> Result<impl Future<Output = ()>, String> {
    use tokio::signal::unix::{SignalKind, signal};
    let handler = |kind| signal(kind).map_err(|error| format!("no signal handler: {error}"));
    let (mut terminate, mut interrupt) = (handler(SignalKind::terminate())?, handler(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
