//! The whole router over sockets, in one process with mock workers.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::time::{Duration, Instant};

use common::{Router, Worker, config, drawn, request, send};
use futures::StreamExt;
use router_core::{Config, Mode, PolicyName};
use router_server::pool::PoolConfig;
use router_server::proto::{self, prompt::Kind, worker_status::State};
use serde_json::json;
use tokio::io::AsyncReadExt;

#[tokio::test(flavor = "multi_thread")]
async fn tokens_come_once_each_in_order_over_two_workers() {
    let workers = [Worker::start("--step-us 200").await, Worker::start("--step-us 200").await];
    let router = Router::over(&[&workers[0], &workers[1]], config()).await;
    let asked: Vec<(Vec<u32>, u32)> =
        (0..40u32).map(|i| ((0..=i * 7 % 90).map(|k| 3 + (i * 31 + k * 7) % 2500).collect(), 1 + i * 5 % 70)).collect();
    let answers = asked.iter().map(|(prompt, n)| router.complete(prompt, *n));
    let answers = futures::future::join_all(answers).await;
    for ((prompt, n), answer) in asked.iter().zip(answers) {
        assert_eq!(answer, drawn(prompt, *n as usize), "prompt of {}", prompt.len());
    }
    router.until_drained().await;
    let names: Vec<_> = router.workers().await.into_iter().map(|worker| worker.indexed_blocks).collect();
    assert!(names.iter().all(|blocks| *blocks > 0), "both were used: {names:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_streams_as_openai_does() {
    let worker = Worker::start("").await;
    let router = Router::over(&[&worker], config()).await;
    let body = json!({"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 30});
    let whole = router.post("/v1/chat/completions", &body).await;
    assert_eq!(whole.status, 200, "{}", whole.body);
    assert!(whole.header("x-scls-worker").is_some_and(|name| name.starts_with("mock-")), "{}", whole.head);
    assert_eq!(whole.header("x-request-id").map(str::len), Some(32));
    let text = whole.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    let mut body = body;
    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    body["return_token_ids"] = true.into();
    let stream = router.post("/v1/chat/completions", &body).await;
    assert!(stream.head.contains("content-type: text/event-stream"), "{}", stream.head);
    assert!(stream.body.ends_with("data: [DONE]\n\n"), "{}", stream.body);
    let events = stream.events();
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    let prompt: Vec<u32> = serde_json::from_value(events[0]["prompt_token_ids"].clone()).unwrap();
    let deltas = events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str());
    assert_eq!(deltas.collect::<String>(), text);
    let ids = events.iter().filter_map(|event| event["choices"][0]["token_ids"].as_array());
    let ids: Vec<u64> = ids.flatten().filter_map(serde_json::Value::as_u64).collect();
    assert_eq!(ids, drawn(&prompt, 30).into_iter().map(u64::from).collect::<Vec<_>>());
    let last = events.last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], 30);
    assert_eq!(last["scls"]["slices"], 2);
    let ends = events.iter().filter(|event| event["choices"][0]["finish_reason"].is_string()).count();
    assert_eq!(ends, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_strings_end_the_row_at_the_worker_too() {
    let worker = Worker::start("--step-us 1000").await;
    let router = Router::over(&[&worker], config()).await;
    let ask = |stop: serde_json::Value, n: u32| {
        let body = json!({"model": "tiny", "prompt": "once upon", "max_tokens": n, "stop": stop});
        let router = &router;
        async move { router.post("/v1/completions", &body).await.json() }
    };
    let free = ask(json!(null), 40).await;
    let text = free["choices"][0]["text"].as_str().unwrap().to_owned();
    // over token borders, in the middle of the text
    let middle = text.char_indices().nth(text.chars().count() / 2).unwrap().0;
    let stop: String = text[middle..].chars().take(7).collect();
    let began = Instant::now();
    let stopped = ask(json!([stop, "never there"]), 5000).await;
    assert!(began.elapsed() < Duration::from_secs(3), "5000 tokens would take 5 s");
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    assert_eq!(stopped["choices"][0]["text"].as_str(), Some(&text[..text.find(&stop).unwrap()]));
    assert!(stopped["usage"]["completion_tokens"].as_u64().unwrap() < 40);
    router.until_drained().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn choices_come_interleaved_and_end_one_by_one() {
    let worker = Worker::start("--step-us 500 --max-rows 8").await;
    let router = Router::over(&[&worker], config()).await;
    let body = json!({"model": "tiny", "prompt": [5, 6], "max_tokens": 40, "n": 3, "return_token_ids": true,
                      "stream": true, "stream_options": {"include_usage": true}});
    let stream = router.post("/v1/completions", &body).await;
    let events = stream.events();
    let (mut ids, mut order, mut ends) = (vec![Vec::new(); 3], Vec::new(), Vec::new());
    for choice in events.iter().filter_map(|event| event["choices"].get(0)) {
        let index = usize::try_from(choice["index"].as_u64().unwrap()).unwrap();
        order.push(index);
        ids[index].extend(serde_json::from_value::<Vec<u32>>(choice["token_ids"].clone()).unwrap());
        if choice["finish_reason"].is_string() {
            ends.push(index);
        }
    }
    assert_eq!(ids, vec![drawn(&[5, 6], 40); 3]);
    ends.sort_unstable();
    assert_eq!(ends, [0, 1, 2]);
    let first_of_last = order.iter().position(|index| *index == 2).unwrap();
    assert!(first_of_last < 10, "not one after the other: {order:?}");
    let usages = events.iter().filter(|event| event["usage"].is_object()).count();
    let usage = &events.last().unwrap()["usage"];
    assert_eq!((usages, &usage["prompt_tokens"], &usage["completion_tokens"]), (1, &json!(2), &json!(120)));
    router.until_drained().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn choices_and_their_logprobs_survive_a_worker() {
    let mut first = Worker::start("--step-us 1000").await;
    let second = Worker::start("--step-us 1000").await;
    let router = Router::over(&[&first, &second], config()).await;
    let body = json!({"model": "tiny", "prompt": [5, 6], "max_tokens": 400, "n": 6, "logprobs": 0,
                      "return_token_ids": true, "stream": true});
    let asked = router.post("/v1/completions", &body);
    let leaving = async {
        router.until(|all| all.iter().all(|worker| worker.running_rows > 0)).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        first.stop.take().unwrap().send(()).unwrap();
    };
    let (stream, ()) = tokio::join!(asked, leaving);
    let (mut ids, mut logprobs, mut offsets) = (vec![Vec::<u32>::new(); 6], [0; 6], vec![Vec::<u64>::new(); 6]);
    for choice in stream.events().iter().filter_map(|event| event["choices"].get(0)) {
        let index = usize::try_from(choice["index"].as_u64().unwrap()).unwrap();
        ids[index].extend(serde_json::from_value::<Vec<u32>>(choice["token_ids"].clone()).unwrap());
        if choice["logprobs"].is_object() {
            logprobs[index] += choice["logprobs"]["token_logprobs"].as_array().unwrap().len();
            offsets[index]
                .extend(serde_json::from_value::<Vec<u64>>(choice["logprobs"]["text_offset"].clone()).unwrap());
        }
    }
    assert_eq!(ids, vec![drawn(&[5, 6], 400); 6], "{}", stream.body.len());
    assert_eq!(logprobs, [400; 6]);
    assert!(offsets.iter().all(|offsets| offsets.is_sorted()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_of_prompts_is_answered_prompt_by_prompt_or_not_at_all() {
    let worker = Worker::start("").await;
    let router = Router::over(&[&worker], config()).await;
    let mut body = json!({"model": "tiny", "prompt": [[5, 6], [7]], "max_tokens": 9, "n": 2, "return_token_ids": true});
    let answer = router.post("/v1/completions", &body).await.json();
    let ids: Vec<Vec<u32>> =
        (0..4).map(|at| serde_json::from_value(answer["choices"][at]["token_ids"].clone()).unwrap()).collect();
    let (first, second) = (drawn(&[5, 6], 9), drawn(&[7], 9));
    assert_eq!(ids, [first.clone(), first, second.clone(), second]);
    assert_eq!((&answer["usage"]["prompt_tokens"], &answer["usage"]["completion_tokens"]), (&json!(3), &json!(36)));
    body["prompt"] = json!([[5, 6], [common::VOCAB]]);
    let refused = router.post("/v1/completions", &body).await;
    assert_eq!((refused.status, refused.param()), (400, json!("prompt")));
    router.until_drained().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_many_choices_frees_all_its_rows() {
    let worker = Worker::start("--step-us 1000").await;
    let router = Router::over(&[&worker], config()).await;
    let body = json!({"model": "tiny", "prompt": [5], "max_tokens": 8000, "n": 8, "stream": true}).to_string();
    let mut client = send(router.http, "POST", "/v1/completions", body.as_bytes()).await;
    client.read_exact(&mut [0; 500]).await.unwrap();
    router.until(|all| all[0].batch_size == 8).await;
    drop(client);
    let gone = Instant::now();
    router.until_drained().await;
    assert!(gone.elapsed() < Duration::from_secs(2), "8000 tokens would take 8 s");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_frees_its_row() {
    let worker = Worker::start("--step-us 1000").await;
    let router = Router::over(&[&worker], config()).await;
    for stream in [true, false] {
        let body = json!({"model": "tiny", "prompt": [5], "max_tokens": 8000, "stream": stream}).to_string();
        let mut client = send(router.http, "POST", "/v1/completions", body.as_bytes()).await;
        if stream {
            client.read_exact(&mut [0; 100]).await.unwrap();
        }
        router.until(|all| all[0].batch_size == 1).await;
        drop(client);
        let gone = Instant::now();
        router.until_drained().await;
        assert!(gone.elapsed() < Duration::from_secs(2), "8000 tokens would take 8 s");
    }
    let metrics = router.get("/metrics").await.body;
    assert!(metrics.contains("scls_router_requests_total{model=\"tiny\",code=\"499\"} 2"), "{metrics}");
    assert!(metrics.contains("scls_router_inflight_requests 0"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn grpc_serves_the_contract() {
    let worker = Worker::start("--worker-id only").await;
    let router = Router::over(&[&worker], config()).await;
    let mut client = router.client().await;
    let ids = |ids: &[u32]| Some(proto::Prompt { kind: Some(Kind::Ids(router_server::convert::packed(ids))) });
    let request = proto::GenerateRequest {
        model: "tiny".into(),
        prompt: ids(&[5, 6, 7]),
        limits: Some(proto::Limits { max_tokens: 20, ..Default::default() }),
        request_id: "mine".into(),
        ..Default::default()
    };
    let mut stream = client.generate(request.clone()).await.unwrap().into_inner();
    let (mut got, mut usage) = (Vec::new(), None);
    while let Some(part) = stream.next().await {
        let part = part.unwrap();
        assert_eq!((part.request_id.as_str(), part.first_index as usize), ("mine", got.len()));
        got.extend(part.ids);
        usage = part.usage.or(usage);
    }
    assert_eq!(got, drawn(&[5, 6, 7], 20));
    let usage = usage.unwrap();
    assert_eq!((usage.prompt_tokens, usage.completion_tokens, usage.worker_id.as_str()), (3, 20, "only"));

    let long = proto::GenerateRequest { request_id: "x".repeat(129), ..request.clone() };
    let refused = client.generate(long).await.unwrap_err();
    assert_eq!(refused.metadata().get("scls-field").unwrap(), "request_id", "it would come back with every piece");

    let sampling = proto::Sampling { logprobs: Some(2), ..Default::default() };
    let two = proto::GenerateRequest { n: 2, sampling: Some(sampling), ..request.clone() };
    let parts: Vec<_> = client.generate(two).await.unwrap().into_inner().map(Result::unwrap).collect().await;
    for choice in 0..2 {
        let own: Vec<_> = parts.iter().filter(|part| part.choice == choice).collect();
        let mut ids: Vec<u32> = Vec::new();
        for part in &own {
            assert_eq!((part.first_index as usize, part.logprobs.len()), (ids.len(), part.ids.len()));
            for (id, logprobs) in part.ids.iter().zip(&part.logprobs) {
                assert_eq!(logprobs.top_ids, [*id, (id + 1) % common::VOCAB]);
                assert!((logprobs.chosen + std::f32::consts::LN_2).abs() < 1e-6);
            }
            ids.extend(&part.ids);
        }
        assert_eq!(ids, drawn(&[5, 6, 7], 20));
        let finishes: Vec<bool> = own.iter().map(|part| part.finish == 2).collect();
        assert!(finishes.iter().rev().skip(1).all(|finish| !finish) && finishes.last() == Some(&true));
    }
    let usages: Vec<_> = parts.iter().filter_map(|part| part.usage.as_ref()).collect();
    assert_eq!(usages.len(), 1);
    assert_eq!((usages[0].prompt_tokens, usages[0].completion_tokens), (3, 40));
    assert!(parts.last().unwrap().usage.is_some());

    let decision = client.route(proto::RouteRequest { model: "tiny".into(), prompt: ids(&[5; 40]) }).await.unwrap();
    let decision = decision.into_inner();
    assert_eq!(
        (decision.worker_id.as_str(), decision.policy.as_str(), decision.prompt_tokens),
        ("only", "product", 40)
    );
    assert_eq!(decision.candidates.len(), 1);
    router.until_drained().await;

    let fails = |change: fn(&mut proto::GenerateRequest)| {
        let (mut client, mut request) = (client.clone(), request.clone());
        change(&mut request);
        async move { client.generate(request).await.err().map(|status| status.code()) }
    };
    assert_eq!(fails(|request| request.model = "gpt".into()).await, Some(tonic::Code::NotFound));
    assert_eq!(fails(|request| request.prompt = None).await, Some(tonic::Code::InvalidArgument));
    assert_eq!(fails(|request| request.n = 129).await, Some(tonic::Code::InvalidArgument));
    let explained = client.explain(proto::ExplainRequest { decision_id: 0 }).await.unwrap().into_inner();
    assert_eq!((explained.worker_id.as_str(), explained.prompt_tokens), ("only", 3));
    let closed = client.register(proto::RegisterRequest::default()).await.unwrap_err();
    assert_eq!(closed.code(), tonic::Code::Unimplemented);
    assert!(closed.message().contains("Register"));
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_have_their_status_and_the_next_request_works() {
    let worker = Worker::start("--max-context 100 --blocks 64").await;
    let router = Router::over(&[&worker], config()).await;
    let table = [
        (
            json!({"model": "tiny", "prompt": [5], "max_tokens": 200}),
            400,
            json!("max_tokens"),
            json!("context_length_exceeded"),
        ),
        (
            json!({"model": "tiny", "prompt": vec![5; 100], "max_tokens": 1}),
            400,
            json!("prompt"),
            json!("context_length_exceeded"),
        ),
        (json!({"model": "tiny", "prompt": [2560]}), 400, json!("prompt"), json!(null)),
        (json!({"model": "tiny", "prompt": [5], "stop_token_ids": [2560]}), 400, json!("stop_token_ids"), json!(null)),
        (
            json!({"model": "tiny", "prompt": [5], "max_tokens": 3, "min_tokens": 4}),
            400,
            json!("min_tokens"),
            json!(null),
        ),
        (json!({"model": "big", "prompt": [5]}), 404, json!("model"), json!("model_not_found")),
        (json!({"model": "tiny", "prompt": "x".repeat(2 << 20)}), 413, json!(null), json!("body_too_large")),
    ];
    for (body, status, param, code) in table {
        let answer = router.post("/v1/completions", &body).await;
        assert_eq!((answer.status, answer.param(), answer.code()), (status, param, code), "{}", answer.body);
        assert_eq!(router.complete(&[5], 2).await, drawn(&[5], 2));
    }
    for (method, path, status) in
        [("GET", "/v1/completions", 405), ("GET", "/nothing", 404), ("GET", "/decisions", 404)]
    {
        let answer = request(router.http, method, path, b"").await;
        assert_eq!(answer.status, status, "{path}");
        assert!(answer.json()["error"]["message"].is_string());
    }
    assert_eq!(request(router.admin, "GET", "/decisions", b"").await.status, 200);
    assert_eq!(router.get("/v1/models/tiny").await.json()["max_model_len"], 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn overload_is_answered_at_once() {
    let worker = Worker::start("--step-us 1000").await;
    let scheduler =
        Config { policy: PolicyName::Product, mode: Mode::Slice, slice_len: Some(16), seed: 0, max_rows: 1 };
    let router = Router::over(&[&worker], PoolConfig { scheduler, ..config() }).await;
    let first = router.complete(&[5], 300);
    let second = async {
        router.until(|all| all[0].batch_size == 1).await;
        router.post("/v1/completions", &json!({"model": "tiny", "prompt": [6]})).await
    };
    let (first, second) = tokio::join!(first, second);
    assert_eq!(first.len(), 300);
    assert_eq!((second.status, second.code()), (429, json!("overloaded")));
    assert!(second.header("retry-after").unwrap().parse::<u64>().unwrap() >= 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_takes_too_long_ends() {
    let worker = Worker::start("--step-us 5000").await;
    let router = Router::over(&[&worker], PoolConfig { timeout: Duration::from_millis(500), ..config() }).await;
    let body = |stream: bool| json!({"model": "tiny", "prompt": [5], "max_tokens": 8000, "stream": stream});
    let whole = router.post("/v1/completions", &body(false)).await;
    assert_eq!((whole.status, whole.code()), (504, json!("timeout")));
    let stream = router.post("/v1/completions", &body(true)).await;
    assert_eq!(stream.status, 200);
    assert_eq!(stream.events().last().unwrap()["error"]["code"], "timeout");
    assert!(!stream.body.contains("[DONE]"));
    router.until_drained().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_lets_requests_finish() {
    let worker = Worker::start("--step-us 1000").await;
    let mut router = Router::over(&[&worker], config()).await;
    let stop = router.stop.take().unwrap();
    let running = router.complete(&[5], 1000);
    let ending = async {
        router.until(|all| all[0].batch_size == 1).await;
        stop.send(()).unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(request(router.admin, "GET", "/ready", b"").await.status, 503);
        assert!(tokio::net::TcpStream::connect(router.http).await.is_err(), "no new connections");
    };
    let (ids, ()) = tokio::join!(running, ending);
    assert_eq!(ids, drawn(&[5], 1000));
    tokio::time::timeout(Duration::from_secs(5), router.task).await.expect("it ends").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_differs_is_refused_with_the_difference() {
    let good = Worker::start("--worker-id good").await;
    let other = Worker::start("--worker-id other --block-size 32").await;
    let router = Router::start(&[&good.url, &other.url], config()).await;
    router.until(|all| all[0].state() == State::Ready && all[1].state() == State::Refused).await;
    let workers = router.workers().await;
    assert!(workers[1].detail.contains("block size"), "{}", workers[1].detail);
    assert_eq!(router.complete(&[5], 2).await, drawn(&[5], 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_worker_twice_is_one_worker() {
    let worker = Worker::start("").await;
    let router = Router::start(&[&worker.url, &worker.url], config()).await;
    router
        .until(|all| {
            all.iter().filter(|w| w.state() == State::Ready).count() == 1
                && all.iter().any(|w| w.state() == State::Refused && w.detail.contains("already"))
        })
        .await;
    assert_eq!(router.complete(&[5], 5).await, drawn(&[5], 5));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_workers_it_says_so() {
    let router = Router::start(&["grpc://127.0.0.1:9"], config()).await;
    let answer = router.post("/v1/completions", &json!({"model": "tiny", "prompt": [5]})).await;
    assert_eq!(answer.status, 503);
    assert_eq!(answer.header("retry-after"), Some("1"));
    assert_eq!((router.get("/ready").await.status, router.get("/health").await.status), (503, 200));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_stops_says_goodbye_and_another_takes_its_place() {
    let mut first = Worker::start("--worker-id first").await;
    let second = Worker::start("--worker-id second --step-us 500").await;
    let router = Router::over(&[&first, &second], config()).await;
    let running = futures::future::join_all((0..8u32).map(|i| {
        let router = &router;
        async move { (i, router.complete(&[5 + i], 200).await) }
    }));
    let stopping = async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        first.stop.take().unwrap().send(()).unwrap();
    };
    let (answers, ()) = tokio::join!(running, stopping);
    for (i, answer) in answers {
        assert_eq!(answer, drawn(&[5 + i], 200));
    }
    router.until(|all| all[0].state() == State::Connecting && all[1].state() == State::Ready).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_routers_do_not_fight_over_a_worker() {
    let worker = Worker::start("").await;
    let first = Router::over(&[&worker], config()).await;
    let second = Router::over(&[&worker], config()).await;
    first.until(|all| all[0].state() == State::Refused && all[0].detail.contains("another router")).await;
    assert!(first.workers().await[0].detail.contains("every 30 s"));
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(second.complete(&[5], 3).await, drawn(&[5], 3));
    assert_eq!(first.workers().await[0].state(), State::Refused);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_waits_for_nobody_who_does_not_generate() {
    use tokio::io::AsyncWriteExt;
    let worker = Worker::start("").await;
    let mut router = Router::over(&[&worker], config()).await;
    let mut held = Vec::new();
    for (to, said) in [
        (router.grpc, ""),
        (router.http, ""),
        (router.http, "GET /hea"),
        (router.http, "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{"),
    ] {
        let mut stream = tokio::net::TcpStream::connect(to).await.unwrap();
        stream.write_all(said.as_bytes()).await.unwrap();
        held.push(stream);
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    router.stop.take().unwrap().send(()).unwrap();
    tokio::time::timeout(Duration::from_secs(3), router.task).await.expect("it ends").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_pipelined_and_left_frees_its_row() {
    use tokio::io::AsyncWriteExt;
    let worker = Worker::start("--step-us 5000").await;
    let router = Router::over(&[&worker], config()).await;
    let body = json!({"model": "tiny", "prompt": [5], "max_tokens": 8000}).to_string();
    let head = format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let mut stream = tokio::net::TcpStream::connect(router.http).await.unwrap();
    stream.write_all(format!("{head}GET /health HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await.unwrap();
    router.until(|all| all[0].batch_size == 1).await;
    drop(stream);
    tokio::time::timeout(Duration::from_secs(5), router.until_drained()).await.expect("the row is freed");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_never_fit_is_refused_unread_and_defaults_give_way() {
    let worker = Worker::start("--max-context 100 --blocks 64").await;
    let router = Router::over(&[&worker], config()).await;
    let text = "a ".repeat(500_000);
    let began = std::time::Instant::now();
    for (path, body) in [
        ("/v1/completions", json!({"model": "tiny", "prompt": text})),
        ("/v1/chat/completions", json!({"model": "tiny", "messages": [{"role": "user", "content": text}]})),
    ] {
        let answer = router.post(path, &body).await;
        assert_eq!((answer.status, answer.code()), (400, json!("context_length_exceeded")), "{}", answer.body);
        assert!(answer.body.contains("bytes"), "{}", answer.body);
    }
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    // The default of 16 tokens is ours.
    let answer = router.post("/v1/completions", &json!({"model": "tiny", "prompt": vec![5; 99]})).await;
    assert_eq!(answer.json()["usage"]["completion_tokens"], 1, "{}", answer.body);
    let asked = json!({"model": "tiny", "prompt": [5], "max_completion_tokens": 200});
    assert_eq!(router.post("/v1/completions", &asked).await.param(), json!("max_completion_tokens"));
    let answer = router.get("/v1/models/%ff").await;
    assert_eq!((answer.status, answer.param()), (400, json!("model")));
}

#[tokio::test(flavor = "multi_thread")]
async fn packed_bodies_are_refused_by_name() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let router = Router::start(&["grpc://127.0.0.1:9"], config()).await;
    let mut stream = tokio::net::TcpStream::connect(router.http).await.unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-encoding: gzip\r\n";
    stream.write_all(format!("{head}content-length: 2\r\n\r\n{{}}").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 415") && answer.contains("gzip"), "{answer}");
}
