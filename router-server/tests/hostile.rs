//! Workers that lie, stall or vanish: the link ends, nothing panics, and the others go on.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::pin::Pin;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Router, Worker, answered, config, drawn, request};
use futures::{Stream, StreamExt};
use router_server::proto::router_message::Body as Heard;
use router_server::proto::worker_message::Body;
use router_server::proto::worker_server::{self, WorkerServer};
use router_server::proto::worker_status::State;
use router_server::proto::{self, FileChunk, RouterMessage, WorkerInfo, WorkerMessage};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

/// Answers to what the router says.
type Script = fn(&Heard) -> Vec<Body>;
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[derive(Clone)]
struct Scripted {
    info: WorkerInfo,
    /// Epoch of its messages.
    epoch: u64,
    script: Script,
}

#[tonic::async_trait]
impl worker_server::Worker for Scripted {
    async fn get_info(&self, _: Request<proto::GetInfoRequest>) -> Result<Response<WorkerInfo>, Status> {
        Ok(Response::new(self.info.clone()))
    }

    type GetTokenizerStream = Answers<FileChunk>;

    async fn get_tokenizer(
        &self,
        _: Request<proto::GetTokenizerRequest>,
    ) -> Result<Response<Self::GetTokenizerStream>, Status> {
        Ok(Response::new(Box::pin(futures::stream::empty())))
    }

    type SessionStream = Answers<WorkerMessage>;

    async fn session(
        &self,
        request: Request<Streaming<RouterMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (own, mut messages) = (self.clone(), request.into_inner());
        let answers = async_stream::stream! {
            let mut state_seq = 0;
            while let Some(Ok(message)) = messages.next().await {
                for body in message.body.iter().flat_map(own.script) {
                    state_seq += 1;
                    yield Ok(WorkerMessage { worker_epoch: own.epoch, state_seq, body: Some(body) });
                }
            }
        };
        Ok(Response::new(Box::pin(answers)))
    }
}

fn info() -> WorkerInfo {
    WorkerInfo {
        worker_id: "liar".into(),
        worker_epoch: 7,
        model_digest: "m".into(),
        served_names: vec!["tiny".into()],
        vocab_size: 100,
        max_context: 1000,
        block_size: 16,
        blocks: 100,
        max_rows: 8,
        ..WorkerInfo::default()
    }
}

async fn scripted(info: WorkerInfo, epoch: u64, script: Script) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("grpc://{}", listener.local_addr().unwrap());
    let service = WorkerServer::new(Scripted { info, epoch, script });
    let server = tonic::transport::Server::builder().add_service(service);
    tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
    url
}

/// Behaves until a plan comes.
fn civil(heard: &Heard) -> Vec<Body> {
    match heard {
        Heard::Hello(_) => vec![Body::Snapshot(proto::Snapshot { last: true, ..Default::default() })],
        Heard::Ping(ping) => vec![Body::Pong(proto::Pong { nonce: ping.nonce })],
        _ => Vec::new(),
    }
}

fn a_token_that_does_not_exist(heard: &Heard) -> Vec<Body> {
    let Heard::Plan(plan) = heard else { return civil(heard) };
    let rows = plan.add.iter().map(|start| proto::RowTokens { row: start.row, ids: vec![100], ..Default::default() });
    vec![Body::Step(proto::Step { batch: plan.plan_no, step: 1, rows: rows.collect() })]
}

fn more_tokens_than_asked(heard: &Heard) -> Vec<Body> {
    let Heard::Plan(plan) = heard else { return civil(heard) };
    let rows = plan.add.iter().map(|start| proto::RowTokens { row: start.row, ids: vec![5; 50], ..Default::default() });
    vec![Body::Step(proto::Step { batch: plan.plan_no, step: 1, rows: rows.collect() })]
}

fn a_batch_that_does_not_run(heard: &Heard) -> Vec<Body> {
    let Heard::Plan(_) = heard else { return civil(heard) };
    vec![Body::SliceReport(proto::SliceReport { batch: 99, end: 1, ..Default::default() })]
}

fn a_time_that_no_clock_says(heard: &Heard) -> Vec<Body> {
    let Heard::Plan(plan) = heard else { return civil(heard) };
    let decode_us = u64::MAX;
    vec![Body::SliceReport(proto::SliceReport {
        batch: plan.plan_no,
        end: 1,
        steps: 1,
        decode_us,
        ..Default::default()
    })]
}

fn half_a_hash(heard: &Heard) -> Vec<Body> {
    let Heard::Plan(_) = heard else { return civil(heard) };
    vec![Body::KvDelta(proto::KvDelta { stored_le_u64: vec![0; 9].into(), ..Default::default() })]
}

/// Ends every row with its first token, for this reason.
fn ends(heard: &Heard, reason: proto::FinishReason) -> Vec<Body> {
    let Heard::Plan(plan) = heard else { return civil(heard) };
    let rows = plan.add.iter().map(|start| proto::RowTokens {
        row: start.row,
        ids: vec![5],
        finish: reason.into(),
        ..Default::default()
    });
    vec![Body::Step(proto::Step { batch: plan.plan_no, step: 1, rows: rows.collect() })]
}

fn logprobs_of_no_token(heard: &Heard) -> Vec<Body> {
    let Heard::Plan(plan) = heard else { return civil(heard) };
    let logprobs = vec![proto::TokenLogprobs::default(); 2];
    let rows = plan.add.iter().map(|start| {
        let logprobs = logprobs.clone();
        proto::RowTokens { row: start.row, ids: vec![5], logprobs, ..Default::default() }
    });
    vec![Body::Step(proto::Step { batch: plan.plan_no, step: 1, rows: rows.collect() })]
}

fn stops(heard: &Heard) -> Vec<Body> {
    ends(heard, proto::FinishReason::Stop)
}

fn cancels_by_itself(heard: &Heard) -> Vec<Body> {
    ends(heard, proto::FinishReason::Cancelled)
}

fn ends_for_length_too_soon(heard: &Heard) -> Vec<Body> {
    ends(heard, proto::FinishReason::Length)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_that_nobody_asked_for_is_the_workers_failure() {
    for script in [cancels_by_itself, ends_for_length_too_soon] {
        let url = scripted(info(), 7, script).await;
        let router = Router::start(&[&url], config()).await;
        router.until(|all| all[0].state() == State::Ready).await;
        let answer = router.post("/v1/completions", &json!({"model": "tiny", "prompt": [5, 6], "max_tokens": 8})).await;
        assert_eq!((answer.status, answer.code()), (502, json!("worker_failed")), "{}", answer.body);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn logprobs_that_do_not_come_are_the_workers_failure() {
    let url = scripted(info(), 7, stops).await;
    let router = Router::start(&[&url], config()).await;
    router.until(|all| all[0].state() == State::Ready).await;
    let body = json!({"model": "tiny", "prompt": [5, 6], "max_tokens": 8, "logprobs": 1});
    let answer = router.post("/v1/completions", &body).await;
    assert_eq!((answer.status, answer.code()), (502, json!("worker_failed")), "{}", answer.body);
}

#[tokio::test(flavor = "multi_thread")]
async fn lies_cost_the_worker_its_place() {
    for script in [
        a_token_that_does_not_exist,
        more_tokens_than_asked,
        a_batch_that_does_not_run,
        a_time_that_no_clock_says,
        half_a_hash,
        logprobs_of_no_token,
    ] {
        let url = scripted(info(), 7, script).await;
        let router = Router::start(&[&url], config()).await;
        router.until(|all| all[0].state() == State::Ready).await;
        let began = Instant::now();
        let answer = router.post("/v1/completions", &json!({"model": "tiny", "prompt": [5, 6], "max_tokens": 8})).await;
        assert!([502, 503].contains(&answer.status), "{}: {}", answer.status, answer.body);
        assert!(began.elapsed() < Duration::from_secs(3));
        router.until(|all| all[0].state() == State::Refused && !all[0].detail.is_empty()).await;
        assert_eq!(router.get("/ready").await.status, 503);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_announcement_is_refused_and_another_epoch_is_no_session() {
    let no_blocks = scripted(WorkerInfo { block_size: 0, ..info() }, 7, civil).await;
    let other_epoch = scripted(info(), 8, civil).await;
    let router = Router::start(&[&no_blocks, &other_epoch], config()).await;
    router
        .until(|all| {
            all[0].state() == State::Refused
                && all[0].detail.contains("block_size")
                && all[1].state() == State::Connecting
                && all[1].detail.contains("epoch")
        })
        .await;
}

fn priced(step: f64, shape: proto::CostShape) -> WorkerInfo {
    let form = proto::PagedCostModel { step_constant_s: step, ..proto::PagedCostModel::default() };
    let form = Some(proto::cost_model::Form::Paged(form));
    let cost_model = Some(proto::CostModel { form, r2: f64::NAN, mean_error: -1.0, p99_error: f64::INFINITY });
    WorkerInfo { cost_model, cost_shape: shape.into(), ..info() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cost_model_that_cannot_be_is_refused_and_one_that_is_absurd_harms_nobody() {
    use proto::CostShape::{Padded, Paged};
    for (step, shape, field) in [
        (-1e-3, Paged, "step.constant"),
        (f64::NAN, Paged, "step.constant"),
        (f64::INFINITY, Paged, "step.constant"),
        (1e6, Paged, "step.constant"),
        (1e-3, Padded, "cost_shape"),
    ] {
        let url = scripted(priced(step, shape), 7, stops).await;
        let router = Router::start(&[&url], config()).await;
        router.until(|all| all[0].state() == State::Refused && all[0].detail.contains(field)).await;
        assert_eq!(router.get("/ready").await.status, 503);
    }
    // Up to a day any number of seconds may be announced: what is computed of it stays a number, and requests are served.
    for step in [0.0, 1e-300, 1e-3, 8e4] {
        let url = scripted(priced(step, Paged), 7, stops).await;
        let router = Router::start(&[&url], config()).await;
        router.until(|all| all[0].state() == State::Ready).await;
        let body = json!({"model": "tiny", "prompt": [5, 6], "max_tokens": 8});
        let answer = router.post("/v1/completions", &body).await;
        assert_eq!(answer.status, 200, "{step}: {}", answer.body);
        assert_eq!(router.get("/metrics").await.status, 200);
        let batches = request(router.admin, "GET", "/batches", b"").await;
        assert_eq!(batches.status, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_without_a_tokenizer_serves_ids_only() {
    let url = scripted(info(), 7, civil).await;
    let router = Router::start(&[&url], config()).await;
    router.until(|all| all[0].state() == State::Ready).await;
    let text = router.post("/v1/completions", &json!({"model": "tiny", "prompt": "hi"})).await;
    assert_eq!((text.status, text.param()), (400, json!("prompt")));
    let stop = router.post("/v1/completions", &json!({"model": "tiny", "prompt": [5], "stop": "hi"})).await;
    assert_eq!((stop.status, stop.param()), (400, json!("stop")));
    let messages = json!([{"role": "user", "content": "hi"}]);
    let chat = router.post("/v1/chat/completions", &json!({"model": "tiny", "messages": messages})).await;
    assert_eq!((chat.status, chat.param()), (400, json!("messages")));
}

const TRACE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// Draws 1 for a row of that trace, 2 for one without a trace, 3 for any other.
fn tells_the_trace(heard: &Heard) -> Vec<Body> {
    let Heard::Plan(plan) = heard else { return civil(heard) };
    let drawn = |start: &proto::RowStart| match &*start.traceparent {
        TRACE => 1,
        "" => 2,
        _ => 3,
    };
    let rows = plan.add.iter().map(|start| proto::RowTokens {
        row: start.row,
        ids: vec![drawn(start)],
        finish: proto::FinishReason::Stop.into(),
        ..Default::default()
    });
    vec![
        Body::Step(proto::Step { batch: plan.plan_no, step: 1, rows: rows.collect() }),
        Body::SliceReport(proto::SliceReport { batch: plan.plan_no, end: 2, steps: 1, ..Default::default() }),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_reaches_the_worker_through_both_doors_and_what_is_none_does_not() {
    let url = scripted(info(), 7, tells_the_trace).await;
    let router = Router::start(&[&url], config()).await;
    router.until(|all| all[0].state() == State::Ready).await;
    let body = json!({"model": "tiny", "prompt": [5], "max_tokens": 1, "return_token_ids": true}).to_string();
    for (given, drawn) in [(TRACE, 1), ("", 2), ("of mine", 2)] {
        let mut stream = TcpStream::connect(router.http).await.unwrap();
        let trace = if given.is_empty() { String::new() } else { format!("traceparent: {given}\r\n") };
        let length = body.len();
        let head = format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{trace}");
        let request = format!("{head}content-length: {length}\r\n\r\n{body}");
        stream.write_all(request.as_bytes()).await.unwrap();
        let answer = answered(stream).await;
        assert_eq!(answer.json()["choices"][0]["token_ids"], json!([drawn]), "{given}: {}", answer.body);

        let mut request = Request::new(proto::GenerateRequest {
            model: "tiny".into(),
            prompt: Some(proto::Prompt { kind: Some(proto::prompt::Kind::Ids(router_server::convert::packed(&[5]))) }),
            ..Default::default()
        });
        if !given.is_empty() {
            request.metadata_mut().insert("traceparent", given.parse().unwrap());
        }
        let mut pieces = router.client().await.generate(request).await.unwrap().into_inner();
        let mut ids = Vec::new();
        while let Some(piece) = pieces.message().await.unwrap() {
            ids.extend(piece.ids);
        }
        assert_eq!(ids, [drawn], "{given}");
    }
}

/// A mock worker in a process of its own, ended with the value.
struct Process {
    child: Child,
    url: String,
}

impl Process {
    fn start() -> Self {
        use std::io::BufRead;
        let tokenizer = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/airline-tiny");
        let vocab = common::VOCAB.to_string();
        let mut child = Command::new(env!("CARGO_BIN_EXE_scls-router"))
            .args(["mock-worker", "--served-name", "tiny", "--vocab", &vocab, "--tokenizer", tokenizer])
            .args(["--worker-id", "process", "--step-us", "1000"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        std::io::BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let url = format!("grpc://{}", line.trim().rsplit(' ').next().unwrap());
        Self { child, url }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_worker_is_lost_within_two_seconds_and_its_requests_move() {
    let stopped = Process::start();
    let other = Worker::start("--step-us 1000").await;
    let router = Router::start(&[&stopped.url, &other.url], config()).await;
    router.until(|all| all.iter().all(|worker| worker.state() == State::Ready)).await;
    let running = futures::future::join_all((0..10u32).map(|i| {
        let router = &router;
        async move { (i, router.complete(&[5 + i], 1500).await) }
    }));
    let freezing = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(router.workers().await[0].batch_size > 0);
        stopped.signal(Signal::STOP);
        let began = Instant::now();
        router.until(|all| all[0].state() == State::Connecting).await;
        let took = began.elapsed();
        assert!(took < Duration::from_millis(2500), "{took:?}");
    };
    let (answers, ()) = tokio::join!(running, freezing);
    for (i, answer) in answers {
        assert_eq!(answer, drawn(&[5 + i], 1500), "moved token for token");
    }
    stopped.signal(Signal::CONT);
    router.until(|all| all.iter().all(|worker| worker.state() == State::Ready)).await;
    router.until_drained().await;
}
