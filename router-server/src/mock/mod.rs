//! `scls-router mock-worker`: a worker without a model, for load tests, kill tests and big fleets.
//!
//! Speaks the Session contract like every worker; its engine is the simulator's [`router_sim::Modelled`] on the real
//! clock. This file knows flags, files and sockets; sessions are `engine.rs`, messages `convert.rs`.

mod convert;
mod engine;

use std::future::Future;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use clap::{Args, ValueEnum};
use futures::{Stream, StreamExt};
use router_core::{CostModel, Micros, PaddedCost};
use router_sim::{Law, Modelled, Noise, Pace, Timing};
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

use crate::link::MOST_MESSAGE;
use crate::proto::worker_server::{Worker, WorkerServer};
use crate::proto::{
    CostShape, FileChunk, GetInfoRequest, GetTokenizerRequest, RouterMessage, WorkerInfo, WorkerMessage,
};
use crate::random::random;
use engine::Input;

/// Messages of a session that may wait to be sent. A router that lets so many lie is gone.
const RING: usize = 4096;
const SERVICE: &str = "scls.v1.Worker";
const CHUNK: usize = 1 << 20;
/// The files a router may ask for, those that exist; the digest covers the same.
const FILES: [&str; 5] = [
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// Flags of `mock-worker`.
#[derive(Clone, Debug, Args)]
pub struct MockArgs {
    /// Address to listen on.
    #[arg(long, default_value = "127.0.0.1")]
    pub host: String,
    /// Port; 0 picks a free one.
    #[arg(long, default_value_t = 0)]
    pub port: u16,
    /// Its name; a random one if none is given.
    #[arg(long, default_value = "")]
    pub worker_id: String,
    /// Names it serves; may be repeated.
    #[arg(long = "served-name", default_value = "mock")]
    pub served_names: Vec<String>,
    /// Ids are below this.
    #[arg(long, default_value_t = 32_000, value_parser = clap::value_parser!(u32).range(4..))]
    pub vocab: u32,
    /// Most tokens of prompt and output together.
    #[arg(long, default_value_t = 8192, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_context: u32,
    /// Tokens a block.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    pub block_size: u32,
    /// KV blocks; four contexts if not given.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub blocks: Option<u32>,
    /// Most rows of a batch.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_rows: u32,
    /// Most prefill tokens of an iteration.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pub chunk_tokens: u32,
    /// Duration of an iteration in microseconds.
    #[arg(long, default_value_t = 0)]
    pub step_us: u64,
    /// More for every row that decodes in it, in microseconds.
    #[arg(long, default_value_t = 0)]
    pub row_us: u64,
    /// More for every prefilled token, in microseconds.
    #[arg(long, default_value_t = 0.0)]
    pub prefill_us_per_token: f64,
    /// Sigma of the factor on the time of a slice; of a step it is twice that.
    #[arg(long, default_value_t = 0.0, value_parser = sigma)]
    pub noise: f64,
    /// How it lays batches out.
    #[arg(long, value_enum, default_value_t = Layout::Paged)]
    pub layout: Layout,
    /// Messages take this long in each direction.
    #[arg(long, default_value_t = 0)]
    pub link_delay_ms: u64,
    /// Folder with the tokenizer files to give to the router.
    #[arg(long)]
    pub tokenizer: Option<PathBuf>,
    /// End when stdin is closed.
    #[arg(long)]
    pub exit_with_parent: bool,
}

/// How batches are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Layout {
    /// In blocks: rows join and leave, KV stays.
    Paged,
    /// As rectangles: every row as long as the longest, KV goes with the batch.
    Padded,
}

fn sigma(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(sigma) if (0.0..=1.0).contains(&sigma) => Ok(sigma),
        _ => Err("it is a number from 0 to 1".into()),
    }
}

/// Whether a worker can be made of these flags, asked before anything listens.
pub fn check(args: &MockArgs) -> Result<(), String> {
    let files = read_files(args.tokenizer.as_deref())?;
    crate::convert::worker_spec(&announcement(args, &files)).map_err(|error| error.to_string())?;
    Ok(())
}

/// Serves until `shutdown`.
pub async fn serve(args: &MockArgs, listener: TcpListener, shutdown: impl Future<Output = ()>) -> Result<(), String> {
    let files = read_files(args.tokenizer.as_deref())?;
    let info = announcement(args, &files);
    let spec = crate::convert::worker_spec(&info).map_err(|error| error.to_string())?;
    let (engine, inputs) = mpsc::channel(1024);
    let running = tokio::spawn(engine::run(Modelled::new(spec, pace(args)), info.clone(), inputs));
    let delay = Duration::from_millis(args.link_delay_ms);
    let service =
        Service { info, files: Arc::new(files), engine: engine.clone(), delay, sessions: Arc::new(AtomicU64::new(0)) };
    let service = WorkerServer::new(service);
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<WorkerServer<Service>>().await;
    health.set_service_status("", tonic_health::ServingStatus::Serving).await;
    let served = tonic::transport::Server::builder()
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(8 << 20)
        .add_service(health_service)
        .add_service(crate::serve::reflection(SERVICE).map_err(|error| error.to_string())?)
        .add_service(crate::serve::reflection_alpha(SERVICE).map_err(|error| error.to_string())?)
        .add_service(service.max_decoding_message_size(MOST_MESSAGE).max_encoding_message_size(MOST_MESSAGE))
        .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), async move {
            shutdown.await;
            // A goodbye ends the session, and that the connection.
            let _ = engine.send(Input::Stop).await;
        });
    let result = served.await.map_err(|error| error.to_string());
    running.abort();
    result
}

/// Prints the one line that says where it listens.
pub fn announce(listener: &TcpListener) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "scls-router mock-worker listening on {}", listener.local_addr()?)?;
    out.flush()
}

type Files = Vec<(&'static str, Vec<u8>)>;

fn read_files(folder: Option<&Path>) -> Result<Files, String> {
    let Some(folder) = folder else { return Ok(Vec::new()) };
    if !folder.join("tokenizer.json").is_file() {
        return Err(format!("no tokenizer.json in {}", folder.display()));
    }
    let there = FILES.iter().filter(|name| folder.join(name).is_file());
    let read = |name: &&'static str| {
        let path = folder.join(name);
        std::fs::read(&path).map(|bytes| (*name, bytes)).map_err(|error| format!("{}: {error}", path.display()))
    };
    there.map(read).collect()
}

/// sha256 over the files by name; of each its name, NUL, its length in 8 bytes little-endian, its bytes.
fn digest(files: &Files) -> String {
    let mut sha = Sha256::new();
    for (name, bytes) in files {
        sha.update(name.as_bytes());
        sha.update([0]);
        sha.update((bytes.len() as u64).to_le_bytes());
        sha.update(bytes);
    }
    hex::encode(sha.finalize())
}

/// How long its iterations take.
fn pace(args: &MockArgs) -> Pace {
    let timing = Timing {
        step: Micros(args.step_us),
        per_row: Micros(args.row_us),
        prefill_token_nanos: (args.prefill_us_per_token.max(0.0) * 1000.0) as u64,
        chunk_tokens: args.chunk_tokens,
    };
    let pace = Pace { noise: Noise { sigma: args.noise, bias: 0.0, seed: random() }, ..Pace::from(timing) };
    match (args.layout, pace.law) {
        (Layout::Padded, Law::Linear(CostModel::Paged { prefill, step })) => {
            let constant = step.constant;
            let prefill = PaddedCost { constant, per_cell: prefill.per_token, ..PaddedCost::default() };
            let step = PaddedCost { constant, per_row: step.per_row, ..PaddedCost::default() };
            Pace { law: Law::Linear(CostModel::Padded { prefill, step }), ..pace }
        }
        _ => pace,
    }
}

fn announcement(args: &MockArgs, files: &Files) -> WorkerInfo {
    // Names of processes, not secrets; 0 is no epoch.
    let epoch = (random() >> 1).max(1);
    let name = if args.worker_id.is_empty() { format!("mock-{epoch:016x}") } else { args.worker_id.clone() };
    let shape = match args.layout {
        Layout::Paged => CostShape::Paged,
        Layout::Padded => CostShape::Padded,
    };
    let contexts = args.max_context.saturating_mul(4).div_ceil(args.block_size);
    WorkerInfo {
        worker_id: name,
        worker_epoch: epoch,
        // Mocks of one vocabulary draw the same tokens: they are one model, and Python's mock is of it too.
        model_digest: hex::encode(Sha256::digest(format!("mock {}", args.vocab))),
        served_names: args.served_names.clone(),
        vocab_size: args.vocab,
        eos_token_ids: vec![2],
        max_context: args.max_context,
        block_size: args.block_size,
        blocks: args.blocks.unwrap_or(contexts),
        max_rows: args.max_rows,
        cost_shape: shape.into(),
        cost_model: Some(convert::cost_model(&pace(args).law)),
        tokenizer_digest: digest(files),
        chunk_tokens: args.chunk_tokens,
        device: "none".into(),
        dtype: "none".into(),
        engine: format!("scls-router {} mock", env!("CARGO_PKG_VERSION")),
        ..WorkerInfo::default()
    }
}

struct Service {
    info: WorkerInfo,
    files: Arc<Files>,
    engine: mpsc::Sender<Input>,
    delay: Duration,
    sessions: Arc<AtomicU64>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Worker for Service {
    async fn get_info(&self, _: Request<GetInfoRequest>) -> Result<Response<WorkerInfo>, Status> {
        Ok(Response::new(self.info.clone()))
    }

    type GetTokenizerStream = Answers<FileChunk>;

    async fn get_tokenizer(
        &self,
        _: Request<GetTokenizerRequest>,
    ) -> Result<Response<Self::GetTokenizerStream>, Status> {
        let chunks: Vec<_> = self.files.iter().flat_map(|(name, bytes)| chunks(name, bytes)).map(Ok).collect();
        Ok(Response::new(Box::pin(futures::stream::iter(chunks))))
    }

    type SessionStream = Answers<WorkerMessage>;

    async fn session(
        &self,
        request: Request<Streaming<RouterMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let session = self.sessions.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = mpsc::channel(RING);
        let gone = |_| Status::unavailable("the worker stops");
        self.engine.send(Input::Opened { session, sender }).await.map_err(gone)?;
        tokio::spawn(read(session, request.into_inner(), self.engine.clone(), self.delay));
        let messages = late(ReceiverStream::new(receiver), self.delay);
        Ok(Response::new(Box::pin(messages.map(Ok))))
    }
}

fn chunks(name: &str, bytes: &[u8]) -> Vec<FileChunk> {
    let pieces: Vec<&[u8]> = if bytes.is_empty() { vec![bytes] } else { bytes.chunks(CHUNK).collect() };
    let last = pieces.len() - 1;
    let chunk = |(at, piece): (usize, &[u8])| FileChunk {
        name: name.to_owned(),
        data: piece.to_vec().into(),
        last_of_file: at == last,
    };
    pieces.into_iter().enumerate().map(chunk).collect()
}

/// Brings a session's messages to the engine, and its end.
async fn read(session: u64, messages: Streaming<RouterMessage>, engine: mpsc::Sender<Input>, delay: Duration) {
    // What comes after an error is not part of the session.
    let whole = messages.take_while(|message| std::future::ready(message.is_ok())).filter_map(async |m| m.ok());
    let mut whole = std::pin::pin!(late(whole, delay));
    while let Some(message) = whole.next().await {
        if engine.send(Input::Said { session, message }).await.is_err() {
            return;
        }
    }
    let _ = engine.send(Input::Closed { session }).await;
}

/// The same messages, each `delay` after it came.
fn late<T: Send + 'static>(
    messages: impl Stream<Item = T> + Send + 'static,
    delay: Duration,
) -> Pin<Box<dyn Stream<Item = T> + Send>> {
    if delay.is_zero() {
        return Box::pin(messages);
    }
    let (sender, mut receiver) = mpsc::channel(RING);
    tokio::spawn(async move {
        let mut messages = std::pin::pin!(messages);
        while let Some(message) = messages.next().await {
            if sender.send((Instant::now() + delay, message)).await.is_err() {
                return;
            }
        }
    });
    Box::pin(async_stream::stream! {
        while let Some((at, message)) = receiver.recv().await {
            sleep_until(at).await;
            yield message;
        }
    })
}
