//! The gRPC server as a protocol: deadlines kept on our side, pings of clients.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::time::{Duration, Instant};

use common::{Router, Worker, config};
use router_server::convert::packed;
use router_server::proto::router_client::RouterClient;
use router_server::proto::{GenerateRequest, Limits, ListWorkersRequest, Prompt, prompt};
use tonic::transport::Channel;
use tonic::{Code, Request};

fn ask(prompt: &[u32], max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        model: "tiny".into(),
        prompt: Some(Prompt { kind: Some(prompt::Kind::Ids(packed(prompt))) }),
        limits: Some(Limits { max_tokens, ignore_eos: true, ..Limits::default() }),
        ..GenerateRequest::default()
    }
}

/// tonic's client watches a deadline until the answer begins, and no longer: what ends the stream is the server.
#[tokio::test(flavor = "multi_thread")]
async fn the_server_ends_a_stream_at_its_deadline_and_frees_the_rows() {
    let worker = Worker::start("--step-us 20000").await;
    let router = Router::over(&[&worker], config()).await;
    let mut request = Request::new(ask(&[5, 6], 5000));
    request.set_timeout(Duration::from_millis(400));
    let began = Instant::now();
    let mut stream = router.client().await.generate(request).await.unwrap().into_inner();
    let mut pieces = 0;
    let status = loop {
        match stream.message().await {
            Ok(Some(_)) => pieces += 1,
            Ok(None) => panic!("it ended well after {pieces} pieces"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    assert!(status.message().contains("400 ms"), "{status:?}");
    assert!(pieces > 0 && began.elapsed() < Duration::from_secs(3), "{pieces} pieces in {:?}", began.elapsed());
    router.until_drained().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_that_is_far_away_changes_nothing() {
    let worker = Worker::start("").await;
    let router = Router::over(&[&worker], config()).await;
    for timeout in ["99999999H", "60S", "not a time"] {
        let mut request = Request::new(ask(&[5, 6], 5));
        request.metadata_mut().insert("grpc-timeout", timeout.parse().unwrap());
        let mut stream = router.client().await.generate(request).await.unwrap().into_inner();
        let mut last = None;
        while let Some(piece) = stream.message().await.unwrap() {
            last = Some(piece);
        }
        assert_eq!(last.unwrap().usage.unwrap().completion_tokens, 5, "{timeout}");
    }
    // An error that is a head alone stays one.
    let mut request = Request::new(GenerateRequest::default());
    request.set_timeout(Duration::from_secs(60));
    assert_eq!(router.client().await.generate(request).await.unwrap_err().code(), Code::InvalidArgument);
}

/// Other servers close a connection that pings more than every five minutes ("too many pings").
#[tokio::test(flavor = "multi_thread")]
async fn clients_may_ping_as_they_like() {
    let worker = Worker::start("--step-us 20000").await;
    let router = Router::over(&[&worker], config()).await;
    let endpoint = Channel::from_shared(format!("http://{}", router.grpc)).unwrap();
    let often = Duration::from_millis(10);
    let channel = endpoint.http2_keep_alive_interval(often).keep_alive_while_idle(true).connect().await.unwrap();
    let mut client = RouterClient::new(channel);
    let mut stream = client.generate(ask(&[5, 6], 30)).await.unwrap().into_inner();
    while stream.message().await.unwrap().is_some() {}
    tokio::time::sleep(Duration::from_millis(500)).await;
    client.list_workers(ListWorkersRequest {}).await.unwrap();
}
