//! What is known of time: bands of batches and of answers against what happened on a mock, and the metrics of it.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::time::{Duration, Instant};

use common::{Router, Worker, config, drawn, request};
use router_core::{Config, Mode, Pooled};
use router_server::convert::packed;
use router_server::pool::PoolConfig;
use router_server::proto::{GenerateRequest, Limits, Prompt, prompt};
use serde_json::{Value, json};

async fn batches(router: &Router) -> Vec<Value> {
    let answer = request(router.admin, "GET", "/batches", b"").await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json()["batches"].as_array().unwrap().clone()
}

/// The sum over all labels of a metric that counts.
async fn metric(router: &Router, name: &str) -> u64 {
    let body = router.get("/metrics").await.body;
    let of_it = body.lines().filter_map(|line| line.strip_prefix(name)).filter(|rest| rest.starts_with(['{', ' ']));
    of_it.map(|rest| rest.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
}

fn measured() -> PoolConfig {
    PoolConfig { scheduler: Config { slice_len: None, ..config().scheduler }, ..config() }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_batch_is_known_before_it_runs() {
    let worker = Worker::start("--worker-id w0 --step-us 2000 --row-us 100 --prefill-us-per-token 20").await;
    let router = Router::over(&[&worker], measured()).await;
    let asked = (0..24u32).map(|i| {
        let router = &router;
        async move {
            tokio::time::sleep(Duration::from_millis(u64::from(i) * 7)).await;
            router.complete(&vec![5 + i; 1 + 17 * i as usize], 5 + 9 * i).await
        }
    });
    futures::future::join_all(asked).await;
    router.until_drained().await;
    let all = batches(&router).await;
    let ended: Vec<&Value> = all.iter().filter(|batch| !batch["outcome"].is_null()).collect();
    assert!(ended.len() > 5, "{all:?}");
    let number = |of: &Value, name: &str| of[name].as_u64().unwrap_or_else(|| panic!("{name}: {of}"));
    for batch in &ended {
        let outcome = &batch["outcome"];
        assert_eq!(batch["worker"], "w0");
        assert!(number(batch, "rows") > 0 && number(outcome, "steps") <= number(batch, "steps"), "{batch}");
        assert!(number(outcome, "peak_blocks") <= number(batch, "ceiling_blocks"), "{batch}");
        assert!(number(batch, "lo_us") <= number(batch, "bound_us"), "{batch}");
        let time = number(outcome, "time_us");
        assert_eq!(outcome["covered"], number(outcome, "lo_us") <= time && time <= number(outcome, "hi_us"), "{batch}");
        assert!(["steps", "all_done", "cut", "backpressure"].contains(&outcome["end"].as_str().unwrap()), "{batch}");
    }
    let covered = ended.iter().filter(|batch| batch["outcome"]["covered"] == true).count();
    assert_eq!(metric(&router, "scls_router_slices_scored_total").await, ended.len() as u64);
    assert_eq!(metric(&router, "scls_router_slices_covered_total").await, covered as u64);
    assert_eq!(metric(&router, "scls_router_ceilings_passed_total").await, 0);
    let s = metric(&router, "scls_router_slice_length_iterations").await;
    assert!((16..=128).contains(&s), "{s}");
    // Each cut is reported, unless its batch ended by itself.
    let cuts = metric(&router, "scls_router_cuts_total").await;
    assert_eq!(metric(&router, "scls_router_cut_latency_seconds_count").await, cuts);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_foreseen() {
    let worker = Worker::start("--step-us 5000").await;
    let router = Router::over(&[&worker], measured()).await;
    let range = |text: &str| {
        let (lo, hi) = text.split_once('-').unwrap();
        [lo.parse::<u64>().unwrap(), hi.parse::<u64>().unwrap()]
    };
    let check = |[lo, hi]: [u64; 2], took: Duration| {
        let took = u64::try_from(took.as_millis()).unwrap();
        // 60 iterations of 5 ms; it begins a little after it is asked for, and ends on a busy machine.
        assert!(lo <= 300 && (300..1000).contains(&hi), "{lo}-{hi}");
        assert!(lo <= took && took < hi + 2000, "{lo}-{hi}: {took} ms");
    };
    for (stream, n, prompt) in [
        (false, 1, json!([5, 6])),
        (true, 1, json!([5, 6])),
        (false, 3, json!([7])),
        (true, 3, json!([7])),
        (false, 1, json!([[8], [9]])),
    ] {
        let body = json!({"model": "tiny", "prompt": prompt, "max_tokens": 60, "stream": stream, "n": n});
        let began = Instant::now();
        let answer = router.post("/v1/completions", &body).await;
        let eta = answer.header("x-scls-eta-ms").unwrap_or_else(|| panic!("{}", answer.head));
        check(range(eta), began.elapsed());
    }
    let ask = GenerateRequest {
        model: "tiny".into(),
        prompt: Some(Prompt { kind: Some(prompt::Kind::Ids(packed(&[5]))) }),
        limits: Some(Limits { max_tokens: 60, ..Limits::default() }),
        n: 2,
        urgent: true,
        ..GenerateRequest::default()
    };
    let began = Instant::now();
    let mut pieces = router.client().await.generate(ask).await.unwrap().into_inner();
    let mut etas = Vec::new();
    while let Some(piece) = pieces.message().await.unwrap() {
        etas.push(piece.eta);
    }
    let first = etas.remove(0).expect("it comes with the first");
    check([first.lo_ms, first.hi_ms], began.elapsed());
    assert!(etas.iter().all(Option::is_none));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_urgent_request_cuts_the_running_slice() {
    let worker = Worker::start("--step-us 10000").await;
    let scheduler = Config { slice_len: Some(1000), ..config().scheduler };
    let router = Router::over(&[&worker], PoolConfig { scheduler, ..config() }).await;
    let long = router.complete(&[5], 300);
    let urgent = async {
        router.until(|all| all[0].running_rows == 1).await;
        let began = Instant::now();
        let body = json!({"model": "tiny", "prompt": [6], "max_tokens": 2, "service_tier": "priority"});
        assert_eq!(router.post("/v1/completions", &body).await.status, 200);
        began.elapsed()
    };
    let (_, took) = tokio::join!(long, urgent);
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert!(metric(&router, "scls_router_cuts_total").await >= 1);
    assert!(metric(&router, "scls_router_cut_latency_seconds_count").await >= 1);
    assert!(batches(&router).await.iter().any(|batch| batch["outcome"]["end"] == "cut"));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_scheduler_draws_the_same_on_either_layout() {
    let scls = (Mode::Pooled(Pooled::scls()), Some(8));
    for (mode, slice_len) in [(Mode::Slice, None), (Mode::Ils, None), scls, (Mode::Pooled(Pooled::sls()), None)] {
        for layout in ["paged", "padded"] {
            let flags = format!("--layout {layout} --step-us 500 --row-us 10 --prefill-us-per-token 5 --noise 0.1");
            let workers = [Worker::start(&flags).await, Worker::start(&flags).await];
            let scheduler = Config { mode, slice_len, ..config().scheduler };
            let router = Router::over(&[&workers[0], &workers[1]], PoolConfig { scheduler, ..config() }).await;
            let asked = (0..12u32).map(|i| {
                let router = &router;
                async move { (i, router.complete(&vec![5 + i; 1 + 9 * i as usize], 3 + 2 * i).await) }
            });
            for (i, answer) in futures::future::join_all(asked).await {
                let expected = drawn(&vec![5 + i; 1 + 9 * i as usize], 3 + 2 * i as usize);
                assert_eq!(answer, expected, "{mode} {layout} {i}");
            }
            router.until_drained().await;
            // Only a rectangle has room for what is no token.
            let (pad, invalid) = (
                metric(&router, "scls_router_pad_tokens_total").await,
                metric(&router, "scls_router_invalid_tokens_total").await,
            );
            assert_eq!((pad > 0, invalid > 0), (layout == "padded", layout == "padded" && mode != Mode::Ils), "{mode}");
            assert_eq!(metric(&router, "scls_router_quarantines_total").await, 0, "{mode} {layout}");
            assert_eq!(metric(&router, "scls_router_ceilings_passed_total").await, 0, "{mode} {layout}");
        }
    }
}
