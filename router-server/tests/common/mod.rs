//! A router and mock workers in this process, and a small HTTP client.

#![allow(dead_code, missing_docs, clippy::unwrap_used)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use router_core::{Config, Mode, PolicyName};
use router_server::auth::Keys;
use router_server::fleet::Fleet;
use router_server::metrics::Metrics;
use router_server::mock::{self, MockArgs};
use router_server::pool::PoolConfig;
use router_server::proto::router_client::RouterClient;
use router_server::proto::{ListWorkersRequest, WorkerStatus};
use router_server::serve::{Listeners, serve};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::transport::Channel;

pub const VOCAB: u32 = 2560;

#[derive(Parser)]
struct Mock {
    #[command(flatten)]
    args: MockArgs,
}

/// A mock worker's address; it ends with the sender.
pub struct Worker {
    pub url: String,
    pub stop: Option<oneshot::Sender<()>>,
    pub task: JoinHandle<()>,
}

impl Worker {
    /// With the flags of `mock-worker`.
    pub async fn start(flags: &str) -> Self {
        let tokenizer = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/airline-tiny");
        let flags = format!("mock --vocab {VOCAB} --served-name tiny --tokenizer {tokenizer} {flags}");
        let args = Mock::parse_from(flags.split_whitespace()).args;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("grpc://{}", listener.local_addr().unwrap());
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(async move {
            let stopped = async {
                let _ = stopped.await;
            };
            mock::serve(&args, listener, stopped).await.unwrap();
        });
        Self { url, stop: Some(stop), task }
    }
}

pub struct Router {
    pub http: SocketAddr,
    pub grpc: SocketAddr,
    pub admin: SocketAddr,
    pub stop: Option<oneshot::Sender<()>>,
    pub task: JoinHandle<()>,
}

pub fn config() -> PoolConfig {
    PoolConfig {
        scheduler: Config {
            policy: PolicyName::Product,
            mode: Mode::Slice,
            slice_len: Some(16),
            seed: 0,
            max_rows: 1000,
        },
        policy: "product",
        timeout: Duration::from_secs(60),
        queue_timeout: None,
        fleet_key: String::new(),
    }
}

impl Router {
    pub async fn start(urls: &[&str], config: PoolConfig) -> Self {
        Self::with_keys(urls, config, Keys::default()).await
    }

    pub async fn with_keys(urls: &[&str], config: PoolConfig, keys: Keys) -> Self {
        let fleet = Fleet::new(config, Arc::new(Metrics::default()));
        for url in urls {
            fleet.add((*url).to_owned());
        }
        let bind = || TcpListener::bind("127.0.0.1:0");
        let listeners =
            Listeners { http: bind().await.unwrap(), grpc: bind().await.unwrap(), admin: bind().await.unwrap() };
        let [http, grpc, admin] =
            [&listeners.http, &listeners.grpc, &listeners.admin].map(|listener| listener.local_addr().unwrap());
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(async move {
            let stopped = async {
                let _ = stopped.await;
            };
            serve(fleet, 1 << 20, keys, listeners, stopped).await.unwrap();
        });
        Self { http, grpc, admin, stop: Some(stop), task }
    }

    /// Over these workers, all of them ready.
    pub async fn over(workers: &[&Worker], config: PoolConfig) -> Self {
        let urls: Vec<&str> = workers.iter().map(|worker| worker.url.as_str()).collect();
        let router = Self::start(&urls, config).await;
        router.until(|all| all.iter().filter(|worker| worker.state == 2).count() == urls.len()).await;
        router
    }

    pub async fn client(&self) -> RouterClient<Channel> {
        RouterClient::connect(format!("http://{}", self.grpc)).await.unwrap()
    }

    pub async fn workers(&self) -> Vec<WorkerStatus> {
        self.client().await.list_workers(ListWorkersRequest {}).await.unwrap().into_inner().workers
    }

    /// Waits until the workers are as wanted, at most 20 s.
    pub async fn until(&self, wanted: impl Fn(&[WorkerStatus]) -> bool) {
        for _ in 0..1000 {
            if wanted(&self.workers().await) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("not as wanted: {:#?}", self.workers().await);
    }

    /// Waits until nothing is assigned anywhere.
    pub async fn until_drained(&self) {
        self.until(|all| {
            all.iter().all(|worker| {
                [worker.queued_tokens, worker.batch_size, worker.running_rows, worker.held_rows, worker.work_us]
                    == [0; 5]
            })
        })
        .await;
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        request(self.http, "POST", path, body.to_string().as_bytes()).await
    }

    pub async fn get(&self, path: &str) -> Answer {
        request(self.http, "GET", path, b"").await
    }

    /// Asks for a completion of ids and returns the ids drawn.
    pub async fn complete(&self, prompt: &[u32], max_tokens: u32) -> Vec<u32> {
        let body = json!({"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "return_token_ids": true});
        let answer = self.post("/v1/completions", &body).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        serde_json::from_value(answer.json()["choices"][0]["token_ids"].clone()).unwrap()
    }
}

/// What a mock draws after a prompt.
pub fn drawn(prompt: &[u32], count: usize) -> Vec<u32> {
    let mut ids = prompt.to_vec();
    for _ in 0..count {
        ids.push(router_sim::next_token(ids[ids.len() - 1], ids.len() - 1, VOCAB));
    }
    ids.split_off(prompt.len())
}

pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    /// The events of a stream.
    pub fn events(&self) -> Vec<Value> {
        let data = self.body.lines().filter_map(|line| line.strip_prefix("data: "));
        data.filter(|data| *data != "[DONE]").map(|data| serde_json::from_str(data).unwrap()).collect()
    }

    pub fn param(&self) -> Value {
        self.json()["error"]["param"].clone()
    }

    pub fn code(&self) -> Value {
        self.json()["error"]["code"].clone()
    }
}

pub async fn send(to: SocketAddr, method: &str, path: &str, body: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(to).await.unwrap();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(body).await.unwrap();
    stream
}

pub async fn request(to: SocketAddr, method: &str, path: &str, body: &[u8]) -> Answer {
    answered(send(to, method, path, body).await).await
}

pub async fn answered(mut stream: TcpStream) -> Answer {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.unwrap();
    let text = String::from_utf8(bytes).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let body = if head.contains("transfer-encoding: chunked") { unchunked(body) } else { body.to_owned() };
    Answer { status, head: head.to_owned(), body }
}

fn unchunked(mut rest: &str) -> String {
    let mut out = String::new();
    while let Some((size, after)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        out.push_str(&after[..size]);
        rest = &after[size + 2..];
    }
    out
}
