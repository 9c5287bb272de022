//! Bytes that nobody meant: requests of a broken client, and a worker whose messages are spoilt on the way. Every call
//! ends, nothing panics, no worker gets what was not checked, and the next good request is served.
//!
//! A short smoke by default; `SCLS_FUZZ=100` runs it a hundred times as long, from another seed each time.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use axum::http;
use bytes::{BufMut, Bytes, BytesMut};
use common::{Router, Worker, config, drawn};
use futures::stream::BoxStream;
use futures::{Stream, StreamExt, TryStreamExt};
use http_body_util::{BodyExt, Full};
use prost::Message;
use router_server::proto::worker_client::WorkerClient;
use router_server::proto::worker_server::{self, WorkerServer};
use router_server::proto::worker_status::State;
use router_server::proto::{
    FileChunk, GenerateRequest, GetInfoRequest, GetTokenizerRequest, Limits, Prompt, RouteRequest, RouterMessage,
    Sampling, TokenIds, WorkerInfo, WorkerMessage, prompt,
};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::time::timeout;
use tonic::body::Body;
use tonic::client::GrpcService;
use tonic::transport::Channel;
use tonic::transport::server::TcpIncoming;
use tonic::{Code, Request, Response, Status, Streaming};

/// Longer than anything here may take on a busy machine.
const END: Duration = Duration::from_secs(30);

/// A splitmix64: the same seed, the same bytes.
#[derive(Clone)]
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn one_in(&mut self, of: usize) -> bool {
        self.below(of) == 0
    }

    fn of<T: Clone>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())].clone()
    }

    fn float(&mut self) -> f32 {
        let odd = [0.0, -0.0, 1.0, 2.0, -1.0, 1e-40, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX];
        if self.one_in(3) { f32::from_bits(self.next() as u32) } else { self.of(&odd) }
    }

    fn number(&mut self) -> u32 {
        let bits = self.below(33) as u32;
        (self.next() as u32).checked_shr(32 - bits).unwrap_or(0)
    }

    fn text(&mut self) -> String {
        let part = self.of(&["", "a", "é😀", "\0", "<|im_start|>", "\u{202e}", "\n", "tiny", "Hello, world "]);
        let count = if self.one_in(20) { 5000 } else { self.below(3) };
        part.repeat(count)
    }

    /// Flips, cuts, doubles or inserts.
    fn spoil(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..=self.below(3) {
            let at = self.below(bytes.len().max(1));
            match self.below(5) {
                _ if bytes.is_empty() => bytes.push(self.next() as u8),
                0 | 1 => bytes[at] ^= 1 << self.below(8),
                2 => bytes.truncate(at),
                3 => bytes.insert(at, self.next() as u8),
                _ => {
                    let again = bytes[at..].to_vec();
                    bytes.extend(again);
                }
            }
        }
    }
}

/// How often, and from where.
fn rounds() -> (usize, u64) {
    let times: usize = std::env::var("SCLS_FUZZ").ok().and_then(|times| times.parse().ok()).unwrap_or(0);
    match times {
        0 => (1, 7),
        times => (times, std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos() as u64),
    }
}

/// Panics of spawned tasks end nothing by themselves: they are counted.
fn count_panics() -> Arc<AtomicUsize> {
    let count = Arc::new(AtomicUsize::new(0));
    let (counted, before) = (Arc::clone(&count), std::panic::take_hook());
    std::panic::set_hook(Box::new(move |info| {
        let spawned = std::thread::current().name().is_some_and(|name| name.starts_with("tokio"));
        // The end of the other test's runtime, under a task that just then asks for a timer.
        let ending = info.to_string().contains("being shutdown");
        counted.fetch_add(usize::from(spawned && !ending), Ordering::Relaxed);
        before(info);
    }));
    count
}

fn a_prompt(dice: &mut Dice) -> Option<Prompt> {
    let kind = match dice.below(8) {
        0 => None,
        1 | 2 => Some(prompt::Kind::Text(dice.text())),
        3 => {
            let bytes: Vec<u8> = (0..dice.below(40)).map(|_| dice.next() as u8).collect();
            Some(prompt::Kind::Ids(TokenIds { le_u32: bytes.into() }))
        }
        _ => {
            let count = 1 + if dice.one_in(10) { dice.below(3000) } else { dice.below(40) };
            let ids = (0..count).flat_map(|at| (at as u32 % common::VOCAB).to_le_bytes()).collect::<Vec<u8>>();
            Some(prompt::Kind::Ids(TokenIds { le_u32: ids.into() }))
        }
    };
    (!dice.one_in(20)).then_some(Prompt { kind })
}

/// Every field has its usual value more often than not: the others are to be looked at too.
fn a_request(dice: &mut Dice) -> GenerateRequest {
    let mut sampling = Sampling { temperature: 1.0, seed: dice.next(), ..Sampling::default() };
    let mut limits = Limits { max_tokens: 1 + dice.below(20) as u32, ..Limits::default() };
    let mut request =
        GenerateRequest { model: "tiny".into(), prompt: a_prompt(dice), n: 1, ..GenerateRequest::default() };
    for _ in 0..dice.below(3) {
        match dice.below(17) {
            0 => sampling.temperature = dice.float(),
            1 => sampling.top_k = dice.number(),
            2 => sampling.top_p = Some(dice.float()),
            3 => sampling.min_p = Some(dice.float()),
            4 => sampling.repetition_penalty = Some(dice.float()),
            5 => sampling.presence_penalty = Some(dice.float()),
            6 => sampling.frequency_penalty = Some(dice.float()),
            7 => {
                let count = if dice.one_in(5) { 2000 } else { 1 + dice.below(3) };
                sampling.logit_bias = (0..count).map(|_| (dice.number(), dice.float())).collect();
            }
            8 => sampling.logprobs = Some(dice.number()),
            9 => limits.max_tokens = dice.number(),
            10 => limits.min_tokens = dice.number(),
            11 => limits.ignore_eos = true,
            12 => limits.stop_token_ids = (0..dice.below(4)).map(|_| dice.number()).collect(),
            13 => request.n = dice.number(),
            14 => request.stop = (0..dice.below(20)).map(|_| dice.text()).collect(),
            15 => request.request_id = dice.text(),
            _ => request.model = dice.text(),
        }
    }
    request.sampling = (!dice.one_in(5)).then_some(sampling);
    request.limits = (!dice.one_in(5)).then_some(limits);
    request
}

/// The message as gRPC frames it, more or less.
fn framed(dice: &mut Dice, message: &impl Message) -> Bytes {
    let mut bytes = message.encode_to_vec();
    if dice.one_in(2) {
        dice.spoil(&mut bytes);
    }
    let mut frame = BytesMut::new();
    frame.put_u8(if dice.one_in(30) { dice.next() as u8 } else { 0 });
    frame.put_u32(if dice.one_in(30) { dice.number() } else { bytes.len() as u32 });
    frame.extend_from_slice(&bytes);
    if dice.one_in(30) {
        let again = frame.clone();
        frame.extend_from_slice(&again);
    }
    frame.freeze()
}

/// Sends the bytes and waits for the end; gives the gRPC status it ended with.
async fn call(mut channel: Channel, method: &str, body: Bytes) -> Status {
    let request = http::Request::post(format!("http://router/scls.v1.Router/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Body::new(Full::new(body)))
        .unwrap();
    std::future::poll_fn(|cx| GrpcService::<Body>::poll_ready(&mut channel, cx)).await.unwrap();
    let response = GrpcService::<Body>::call(&mut channel, request).await.unwrap();
    let (head, body) = response.into_parts();
    let body = body.collect().await.unwrap();
    let trailers = body.trailers().unwrap_or(&head.headers);
    Status::from_header_map(trailers).unwrap_or_else(|| panic!("no status: {:?} {trailers:?}", head.headers))
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_requests_end_and_no_worker_hears_of_them() {
    let panics = count_panics();
    let worker = Worker::start("--max-context 400 --worker-id w0").await;
    let router = Router::over(&[&worker], config()).await;
    let channel = Channel::from_shared(format!("http://{}", router.grpc)).unwrap().connect().await.unwrap();
    let (rounds, seed) = rounds();
    let (mut served, mut refused) = (0, 0);
    for round in 0..rounds {
        let mut dice = Dice(seed.wrapping_add(round as u64));
        let cases: Vec<(&str, Bytes)> = (0..400)
            .map(|_| {
                if dice.one_in(4) {
                    let request = RouteRequest { model: "tiny".into(), prompt: a_prompt(&mut dice) };
                    ("Route", framed(&mut dice, &request))
                } else {
                    let request = a_request(&mut dice);
                    ("Generate", framed(&mut dice, &request))
                }
            })
            .collect();
        let ends = futures::stream::iter(cases).map(|(method, bytes)| {
            let channel = channel.clone();
            async move {
                let status = timeout(END, call(channel, method, bytes.clone())).await;
                (method, bytes, status)
            }
        });
        let ends: Vec<_> = ends.buffer_unordered(32).collect().await;
        for (method, bytes, status) in ends {
            let shown = hex::encode(&bytes[..bytes.len().min(200)]);
            let status = status.unwrap_or_else(|_| panic!("{method} did not end, seed {seed}: {shown}"));
            // What tonic says of a frame that is none, or of bytes that are no message.
            let unread = ["failed to decode Protobuf message", "protocol error", "Unexpected EOF", "Missing request"];
            match status.code() {
                Code::Ok => served += 1,
                Code::InvalidArgument | Code::NotFound | Code::OutOfRange | Code::Unimplemented => refused += 1,
                Code::Internal if unread.iter().any(|what| status.message().starts_with(what)) => refused += 1,
                _ => panic!("{method} ended with {status:?}, seed {seed}: {shown}"),
            }
        }
    }
    assert!(served > 50 * rounds && refused > 50 * rounds, "both sides are looked at: {served} {refused}");
    router.until_drained().await;
    let metrics = common::request(router.admin, "GET", "/metrics", b"").await.body;
    let heard = metrics.lines().filter(|line| line.contains("plans_refused_total{") || line.contains("quarantines"));
    let heard: Vec<&str> = heard.filter(|line| !line.contains("stale") && !line.starts_with('#')).collect();
    assert!(heard.is_empty(), "a worker had to refuse what was not checked: {heard:?}");
    assert_eq!(router.complete(&[5, 6], 8).await, drawn(&[5, 6], 8));
    assert_eq!(panics.load(Ordering::Relaxed), 0);
}

/// Passes a session on to an honest worker and spoils some of what it answers.
#[derive(Clone)]
struct Spoiler {
    behind: WorkerClient<Channel>,
    dice: Dice,
    lying: Arc<AtomicBool>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl worker_server::Worker for Spoiler {
    async fn get_info(&self, request: Request<GetInfoRequest>) -> Result<Response<WorkerInfo>, Status> {
        self.behind.clone().get_info(request).await
    }

    type GetTokenizerStream = Streaming<FileChunk>;

    async fn get_tokenizer(
        &self,
        request: Request<GetTokenizerRequest>,
    ) -> Result<Response<Self::GetTokenizerStream>, Status> {
        self.behind.clone().get_tokenizer(request).await
    }

    type SessionStream = Answers<WorkerMessage>;

    async fn session(
        &self,
        request: Request<Streaming<RouterMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let own = self.clone();
        let heard = request.into_inner().filter_map(|message| std::future::ready(message.ok()));
        let said = self.behind.clone().session(heard).await?.into_inner();
        let (mut dice, mut held) = (own.dice, None);
        let spoilt = said.map_ok(move |message| -> BoxStream<'static, Result<WorkerMessage, Status>> {
            let answers = if own.lying.load(Ordering::Relaxed) && dice.one_in(20) {
                spoil(&mut dice, &mut held, message)
            } else {
                held.take().into_iter().chain([message]).collect()
            };
            futures::stream::iter(answers).map(Ok).boxed()
        });
        Ok(Response::new(Box::pin(spoilt.try_flatten())))
    }
}

/// Loses, doubles, holds back or rewrites it.
fn spoil(dice: &mut Dice, held: &mut Option<WorkerMessage>, message: WorkerMessage) -> Vec<WorkerMessage> {
    match dice.below(8) {
        0 => Vec::new(),
        1 => vec![message.clone(), message],
        2 => {
            *held = Some(message);
            Vec::new()
        }
        _ => {
            // Of what still reads as a message: the others never come as far as this.
            let mut spoilt = None;
            for _ in 0..20 {
                let mut bytes = message.encode_to_vec();
                dice.spoil(&mut bytes);
                spoilt = WorkerMessage::decode(&bytes[..]).ok().filter(|new| *new != message);
                if spoilt.is_some() {
                    break;
                }
            }
            let mut spoilt = spoilt.unwrap_or_else(|| message.clone());
            if !dice.one_in(4) {
                // Not thrown out for the envelope.
                (spoilt.worker_epoch, spoilt.state_seq) = (message.worker_epoch, message.state_seq);
            }
            vec![spoilt]
        }
    }
}

async fn spoiler(behind: &Worker, dice: Dice, lying: &Arc<AtomicBool>) -> String {
    let behind = WorkerClient::connect(behind.url.replace("grpc", "http")).await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("grpc://{}", listener.local_addr().unwrap());
    let service = WorkerServer::new(Spoiler { behind, dice, lying: Arc::clone(lying) });
    let server = tonic::transport::Server::builder().add_service(service);
    tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
    url
}

#[tokio::test(flavor = "multi_thread")]
async fn spoilt_messages_of_workers_end_requests_at_worst() {
    let panics = count_panics();
    let (rounds, seed) = rounds();
    for round in 0..rounds {
        let honest = Worker::start("--worker-id honest --step-us 500 --blocks 256").await;
        let lying = Arc::new(AtomicBool::new(true));
        let (mut liars, mut urls) = (Vec::new(), vec![honest.url.clone()]);
        for liar in 0..8 {
            let worker = Worker::start(&format!("--worker-id liar{liar} --step-us 500 --blocks 256")).await;
            urls.push(spoiler(&worker, Dice(seed + (round * 100 + liar) as u64), &lying).await);
            liars.push(worker);
        }
        let urls: Vec<&str> = urls.iter().map(String::as_str).collect();
        // A row whose message was lost waits for that long.
        let router =
            Router::start(&urls, router_server::pool::PoolConfig { timeout: Duration::from_secs(2), ..config() }).await;
        router.until(|all| all[0].state() == State::Ready).await;
        let asks = (0..60u32).map(|ask| {
            let router = &router;
            async move {
                let ids: Vec<u32> = (0..=ask * 3 % 70).map(|at| 5 + at + ask % 7).collect();
                let body = json!({"model": "tiny", "prompt": ids, "max_tokens": 40, "ignore_eos": true});
                let answer = timeout(END, router.post("/v1/completions", &body)).await;
                answer.unwrap_or_else(|_| panic!("no end, seed {seed} round {round}")).status
            }
        });
        let ends: Vec<u16> = futures::stream::iter(asks).buffer_unordered(20).collect().await;
        assert!(ends.iter().all(|status| [200, 502, 503, 504].contains(status)), "{ends:?}, seed {seed} round {round}");
        assert!(ends.contains(&200), "some went well: {ends:?}");
        let all = router.workers().await;
        assert!(all[1..].iter().any(|worker| worker.state() != State::Ready), "some lie was noticed");
        assert_eq!(all[0].state(), State::Ready, "the honest one stays");
        lying.store(false, Ordering::Relaxed);
        assert_eq!(router.complete(&[50, 60], 8).await, drawn(&[50, 60], 8), "seed {seed} round {round}");
    }
    assert_eq!(panics.load(Ordering::Relaxed), 0);
}
