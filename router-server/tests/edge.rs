//! What is around generation: keys, hosts, ids, `/tokenize`, and requests that are not begun in time.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::net::SocketAddr;
use std::time::Duration;

use common::{Answer, Router, Worker, answered, config};
use router_server::auth::Keys;
use router_server::pool::PoolConfig;
use router_server::proto::ListWorkersRequest;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

/// A request with these headers and no others.
async fn raw(to: SocketAddr, head: &str, body: &str) -> Answer {
    let mut stream = TcpStream::connect(to).await.unwrap();
    let text = format!("{head}connection: close\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    stream.write_all(text.as_bytes()).await.unwrap();
    answered(stream).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_opens_http_and_grpc_and_what_tells_of_health_needs_none() {
    let worker = Worker::start("").await;
    let router = Router::with_keys(&[&worker.url], config(), Keys::parse("first,second").unwrap()).await;
    let get =
        async |path: &str, more: &str| raw(router.http, &format!("GET {path} HTTP/1.1\r\nhost: x\r\n{more}"), "").await;
    for path in ["/health", "/healthz", "/live", "/liveness", "/metrics", "/version"] {
        assert_eq!(get(path, "").await.status, 200, "{path}");
    }
    for path in ["/ready", "/readyz", "/readiness"] {
        while get(path, "").await.status == 503 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(get(path, "").await.status, 200, "{path}");
    }
    for given in ["", "authorization: Bearer third\r\n", "authorization: first\r\n", "authorization: Basic first\r\n"] {
        let answer = get("/v1/models", given).await;
        assert_eq!((answer.status, answer.code()), (401, json!("invalid_api_key")), "{given}");
        assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
    }
    for given in ["authorization: Bearer first\r\n", "Authorization: bearer second\r\n"] {
        assert_eq!(get("/v1/models", given).await.status, 200, "{given}");
    }
    for path in ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"] {
        assert_eq!(router.post(path, &json!({})).await.status, 401, "{path}");
    }

    let mut client = router.client().await;
    let list = |authorization: Option<&str>| {
        let mut request = tonic::Request::new(ListWorkersRequest {});
        authorization.map(|value| request.metadata_mut().insert("authorization", value.parse().unwrap()));
        request
    };
    for given in [None, Some("Bearer third")] {
        assert_eq!(client.list_workers(list(given)).await.unwrap_err().code(), tonic::Code::Unauthenticated);
    }
    assert_eq!(client.list_workers(list(Some("Bearer second"))).await.unwrap().into_inner().workers.len(), 1);
    let channel = tonic::transport::Channel::from_shared(format!("http://{}", router.grpc)).unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel.connect().await.unwrap());
    let ask = tonic_health::pb::HealthCheckRequest { service: String::new() };
    health.check(ask).await.expect("health is told to whoever asks");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_admin_listener_answers_nobody_elses_page() {
    let router = Router::start(&[], config()).await;
    let get = async |host: &str, more: &str| {
        raw(router.admin, &format!("GET /workers HTTP/1.1\r\nhost: {host}\r\n{more}"), "").await
    };
    for host in ["localhost", "127.0.0.1:29000", "[::1]:29000"] {
        assert_eq!(get(host, "").await.status, 200, "{host}");
        assert_eq!(get(host, "origin: http://localhost:3000\r\n").await.status, 200, "{host}");
        assert_eq!(get(host, "origin: https://evil.example\r\n").await.status, 403, "{host}");
    }
    let answer = get("rebound.evil.example:29000", "x-request-id: mine\r\n").await;
    assert_eq!((answer.status, answer.code(), answer.header("x-request-id")), (403, json!("forbidden"), Some("mine")));
    assert_eq!(answer.header("access-control-allow-origin"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_are_echoed_where_they_are_ids() {
    let router = Router::start(&[], config()).await;
    let get = async |more: &str| raw(router.http, &format!("GET /nothing HTTP/1.1\r\nhost: x\r\n{more}"), "").await;
    let answer = get("x-request-id: mine-1\r\nx-correlation-id: all/of-them\r\n").await;
    assert_eq!(
        (answer.header("x-request-id"), answer.header("x-correlation-id")),
        (Some("mine-1"), Some("all/of-them"))
    );
    let long = "a".repeat(129);
    for wrong in ["", "two words", long.as_str()] {
        let answer = get(&format!("x-request-id: {wrong}\r\nx-correlation-id: {wrong}\r\n")).await;
        let fresh = answer.header("x-request-id").unwrap();
        assert!(!fresh.is_empty() && fresh != wrong, "{fresh}");
        assert_eq!(answer.header("x-correlation-id"), None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_is_told_its_ids_and_ids_their_text() {
    let worker = Worker::start("--max-context 200 --blocks 64").await;
    let router = Router::over(&[&worker], config()).await;
    let prompt = "Where is my flight? <|im_start|> \u{1f6eb} \u{e4}";
    let answer = router.post("/tokenize", &json!({"model": "tiny", "prompt": prompt, "return_token_strs": true})).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let told = answer.json();
    let ids = told["tokens"].as_array().unwrap().clone();
    assert_eq!((told["count"].as_u64(), told["max_model_len"].as_u64()), (Some(ids.len() as u64), Some(200)));
    assert_eq!(told["token_strs"].as_array().unwrap().len(), ids.len());
    let served = json!({"model": "tiny", "prompt": prompt, "max_tokens": 1});
    assert_eq!(router.post("/v1/completions", &served).await.json()["usage"]["prompt_tokens"], told["count"]);
    let back = router.post("/detokenize", &json!({"model": "tiny", "tokens": ids})).await;
    assert_eq!(back.json(), json!({"prompt": prompt}));

    let chat = json!({"model": "tiny", "messages": [{"role": "user", "content": "hello"}]});
    let told = router.post("/tokenize", &chat).await.json();
    assert_eq!(told["token_strs"], json!(null));
    let mut served = chat.clone();
    served["max_tokens"] = json!(1);
    assert_eq!(router.post("/v1/chat/completions", &served).await.json()["usage"]["prompt_tokens"], told["count"]);
    let read = router.post("/detokenize", &json!({"model": "tiny", "tokens": told["tokens"]})).await.json();
    assert!(read["prompt"].as_str().unwrap().contains("hello"), "{read}");

    for (path, body, status, param) in [
        ("/tokenize", json!({"model": "big", "prompt": "a"}), 404, json!("model")),
        ("/tokenize", json!({"model": "tiny"}), 400, json!("prompt")),
        ("/detokenize", json!({"model": "tiny", "tokens": [2560]}), 400, json!("tokens")),
        ("/detokenize", json!({"model": "tiny", "tokens": vec![5; 201]}), 400, json!("tokens")),
        ("/detokenize", json!({"model": "tiny", "tokens": ["a"]}), 400, json!("tokens")),
    ] {
        let answer = router.post(path, &body).await;
        assert_eq!((answer.status, answer.param()), (status, param), "{}", answer.body);
    }
    assert_eq!(router.post("/detokenize", &json!({"model": "tiny", "tokens": []})).await.json(), json!({"prompt": ""}));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_not_begun_in_time_is_told_so_and_who_is_runs_on() {
    let worker = Worker::start("--step-us 2000 --max-rows 1").await;
    let queue_timeout = Some(Duration::from_millis(400));
    let router = Router::over(&[&worker], PoolConfig { queue_timeout, ..config() }).await;
    let first = router.complete(&[5], 600);
    let second = async {
        router.until(|all| all[0].batch_size == 1).await;
        let body = json!({"model": "tiny", "prompt": [6], "max_tokens": 600});
        router.post("/v1/completions", &body).await
    };
    let (first, second) = tokio::join!(first, second);
    assert_eq!(first.len(), 600, "it took longer than that and was begun");
    assert_eq!((second.status, second.code()), (408, json!("queue_timeout")), "{}", second.body);
    router.until_drained().await;
}
