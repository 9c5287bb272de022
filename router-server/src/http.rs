//! The HTTP side: routes, and all that is not a generation.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use axum::{Json, Router};
use futures::FutureExt;
use router_core::{Anticipation, BatchEnd};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::auth::{Keys, check_local};
use crate::completions::{chat, completions};
use crate::dispatch::{Batch, Decided};
use crate::error::Error;
use crate::fleet::Fleet;
use crate::openapi::openapi;
use crate::pool::Pool;
use crate::proto;
use crate::random::random_id;
use crate::tokenize::{detokenize, tokenize};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const CORRELATION_ID: HeaderName = HeaderName::from_static("x-correlation-id");

/// What the handlers share.
pub struct App {
    /// Who serves what.
    pub fleet: Arc<Fleet>,
    /// Largest body.
    pub most_payload: usize,
    /// Who may ask.
    pub keys: Keys,
    draining: AtomicBool,
    /// Requests that generate.
    busy: watch::Sender<usize>,
}

/// A request that a shutdown waits for, until this is dropped.
pub struct Busy(watch::Sender<usize>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.send_modify(|busy| *busy -= 1);
    }
}

impl App {
    /// Over a fleet, taking requests of those who have one of the keys.
    pub fn new(fleet: Arc<Fleet>, most_payload: usize, keys: Keys) -> Self {
        Self { fleet, most_payload, keys, draining: AtomicBool::new(false), busy: watch::Sender::new(0) }
    }

    /// From now on new requests are refused.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Whether the router is about to end.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Begins a request that has arrived whole; refused if the router is about to end.
    pub fn begin(&self) -> Result<Busy, Error> {
        // Counted before it is asked, so that the end does not come between.
        self.busy.send_modify(|busy| *busy += 1);
        let busy = Busy(self.busy.clone());
        if self.is_draining() { Err(Error::Draining) } else { Ok(busy) }
    }

    /// Ends when no request generates.
    pub async fn idle(&self) {
        let mut busy = self.busy.subscribe();
        // Fails only without a sender, and we have one.
        let _ = busy.wait_for(|busy| *busy == 0).await;
    }

    /// Whether new requests are taken.
    pub fn is_ready(&self) -> bool {
        !self.is_draining() && self.fleet.is_ready()
    }
}

/// Endpoints that other servers have, each with all below it: who asks for one of these has no typing error.
const NOT_OFFERED: [&str; 24] = [
    "/classify",
    "/generate",
    "/invocations",
    "/pooling",
    "/rerank",
    "/score",
    "/v1/assistants",
    "/v1/audio",
    "/v1/batches",
    "/v1/classify",
    "/v1/embeddings",
    "/v1/files",
    "/v1/fine_tuning",
    "/v1/images",
    "/v1/messages",
    "/v1/moderations",
    "/v1/realtime",
    "/v1/rerank",
    "/v1/responses",
    "/v1/score",
    "/v1/threads",
    "/v1/uploads",
    "/v1/vector_stores",
    "/v2/rerank",
];

/// The public routes.
pub fn public(app: Arc<App>) -> Router {
    let guarded = routed(guarded()).layer(middleware::from_fn_with_state(Arc::clone(&app), require_key));
    answering(guarded.merge(routed(open())), app)
}

/// The routes of the admin listener, which is on loopback.
pub fn admin(app: Arc<App>) -> Router {
    let routes = routed(local()).merge(routed(open()));
    answering(routes.layer(middleware::from_fn(require_local)), app)
}

type Routes = Vec<(&'static str, MethodRouter<Arc<App>>)>;

/// What asks for a key, where there are keys.
fn guarded() -> Routes {
    vec![
        ("/v1/completions", post(completions)),
        ("/v1/chat/completions", post(chat)),
        ("/v1/models", get(models)),
        ("/v1/models/{*name}", get(model)),
        ("/tokenize", post(tokenize)),
        ("/detokenize", post(detokenize)),
    ]
}

/// What every listener tells everybody.
fn open() -> Routes {
    vec![
        ("/health", get(health)),
        ("/healthz", get(health)),
        ("/live", get(health)),
        ("/liveness", get(health)),
        ("/ready", get(ready)),
        ("/readyz", get(ready)),
        ("/readiness", get(ready)),
        ("/version", get(version)),
        ("/metrics", get(metrics)),
        ("/openapi.json", get(openapi)),
    ]
}

/// What the admin listener alone tells.
fn local() -> Routes {
    vec![("/workers", get(workers)), ("/decisions", get(decisions)), ("/batches", get(batches))]
}

fn routed(routes: Routes) -> Router<Arc<App>> {
    routes.into_iter().fold(Router::new(), |router, (path, methods)| router.route(path, methods))
}

/// Whatever happens there is an answer, and it has the ids of its request.
fn answering(routes: Router<Arc<App>>, app: Arc<App>) -> Router {
    routes
        .fallback(not_found)
        .method_not_allowed_fallback(|method: Method| async move { Error::MethodNotAllowed(method.to_string()) })
        .layer(middleware::from_fn(catch_panic))
        .layer(middleware::from_fn(echo_ids))
        .with_state(app)
}

async fn not_found(uri: Uri) -> Error {
    let path = uri.path();
    let below = |known: &&str| path.strip_prefix(*known).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    match NOT_OFFERED.into_iter().find(below) {
        Some(known) => Error::NotOffered(known.to_owned()),
        None => Error::NotFound(path.chars().take(256).collect()),
    }
}

/// Every answer names its request: as the client did, or anew.
async fn echo_ids(request: Request, next: Next) -> Response {
    let id = id_in(&request, &REQUEST_ID).or_else(|| HeaderValue::from_str(&random_id()).ok());
    let correlation = id_in(&request, &CORRELATION_ID);
    let mut response = next.run(request).await;
    for (name, id) in [(REQUEST_ID, id), (CORRELATION_ID, correlation)] {
        if let Some(id) = id {
            response.headers_mut().insert(name, id);
        }
    }
    response
}

/// An id that a client gave, if it is one.
fn id_in(request: &Request, name: &HeaderName) -> Option<HeaderValue> {
    let id = request.headers().get(name)?;
    let good = (1..=128).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic);
    good.then(|| id.clone())
}

async fn require_key(State(app): State<Arc<App>>, request: Request, next: Next) -> Result<Response, Error> {
    app.keys.check(request.headers().get(header::AUTHORIZATION).map(HeaderValue::as_bytes))?;
    Ok(next.run(request).await)
}

async fn require_local(request: Request, next: Next) -> Result<Response, Error> {
    check_local(request.uri(), request.version(), request.headers())?;
    Ok(next.run(request).await)
}

/// A bug in a handler costs its request, and is answered like any other error.
async fn catch_panic(request: Request, next: Next) -> Response {
    let answer = AssertUnwindSafe(next.run(request)).catch_unwind().await;
    // What it said is in the log already, and is nobody else's.
    answer.unwrap_or_else(|_| Error::Internal("a bug in the router, see its log".into()).into_response())
}

async fn health() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

/// Whether requests are taken. Addresses and loads of workers are for the admin listener.
async fn ready(State(app): State<Arc<App>>) -> Response {
    if app.is_ready() {
        Json(json!({"ready": true})).into_response()
    } else if app.is_draining() {
        Error::Draining.into_response()
    } else {
        Error::NoWorker.into_response()
    }
}

async fn workers(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({"workers": list_workers(&app).await}))
}

async fn list_workers(app: &App) -> Value {
    let worker = |status: proto::WorkerStatus| {
        let state = status.state().as_str_name().trim_start_matches("STATE_").to_lowercase();
        let info = status.info.unwrap_or_default();
        json!({"id": info.worker_id, "url": status.url, "state": state, "detail": status.detail,
               "models": info.served_names, "queued_tokens": status.queued_tokens, "batch_size": status.batch_size,
               "running_rows": status.running_rows, "held_rows": status.held_rows,
               "running_blocks": status.running_blocks, "held_blocks": status.held_blocks,
               "indexed_blocks": status.indexed_blocks, "work_us": status.work_us})
    };
    app.fleet.statuses().await.into_iter().map(worker).collect()
}

/// The latest decisions, each with the worker that its record leads to when it is made again.
async fn decisions(State(app): State<Arc<App>>) -> Json<Value> {
    let decided = |decided: Decided| {
        let decision = decided.decision;
        let candidate = |candidate: &proto::CandidateScore| {
            // A u128: as a number it would not survive most JSON readers.
            let score = (u128::from(candidate.score_high) << 64) | u128::from(candidate.score_low);
            json!({"worker": candidate.worker_id, "new_tokens": candidate.new_tokens,
                   "queued_tokens": candidate.queued_tokens, "batch_size": candidate.batch_size,
                   "work_us": candidate.work_us, "joined_us": candidate.joined_us,
                   "free_blocks": candidate.free_blocks, "filtered": candidate.filtered,
                   "score": score.to_string()})
        };
        let candidates: Vec<Value> = decision.candidates.iter().map(candidate).collect();
        let hotspot = decision.hotspot.map(|hotspot| {
            json!({"blocks": hotspot.blocks, "requests": hotspot.requests, "window": hotspot.window,
                   "workers": hotspot.workers, "holders": hotspot.holders, "alarm": hotspot.alarm,
                   "preferred": hotspot.preferred, "filtered": hotspot.filtered})
        });
        let expected = Anticipation { arrivals: decision.arrivals, prefill: decision.prefill_time };
        json!({"decision": decision.decision_id, "at_us": decided.at.0, "request": decision.request,
               "choice": decision.choice, "worker": decision.worker_id, "recomputed": decided.recomputed,
               "policy": decision.policy, "turn": decision.turn, "seed": decision.seed,
               "tokens": decision.prompt_tokens, "arrivals_per_s": expected.arrivals_a_second(),
               "prefill_s_per_token": expected.seconds_a_token(), "hotspot": hotspot,
               "candidates": candidates})
    };
    let all: Vec<Value> = app.fleet.decisions(None).await.into_iter().map(decided).collect();
    Json(json!({"decisions": all}))
}

/// The latest batches of each pool: what was known before they ran, and what happened.
async fn batches(State(app): State<Arc<App>>) -> Json<Value> {
    let batch = |Batch { worker, record }: Batch| {
        let outcome = record.outcome.map(|outcome| {
            let end = match outcome.end {
                BatchEnd::Steps => "steps",
                BatchEnd::AllDone => "all_done",
                BatchEnd::Cut => "cut",
                BatchEnd::Backpressure => "backpressure",
                BatchEnd::Error => "error",
            };
            json!({"end": end, "steps": outcome.steps, "time_us": outcome.time.0,
                   "expected_us": outcome.expected.0, "lo_us": outcome.band.lo.0, "hi_us": outcome.band.hi.0, "covered": outcome.covered(), "peak_blocks": outcome.peak.0,
                   "fills": outcome.work.fills, "prefill_tokens": outcome.work.prefill.0, "pairs": outcome.work.pairs,
                   "decoded_tokens": outcome.work.decoded, "context_tokens": outcome.work.context.0,
                   "longest_tokens": outcome.work.longest.0})
        });
        json!({"worker": worker, "batch": record.batch.0, "at_us": record.at.0, "rows": record.rows,
               "steps": record.steps, "lo_us": record.band.lo.0, "bound_us": record.band.hi.0,
               "ceiling_blocks": record.ceiling.0, "outcome": outcome})
    };
    let all: Vec<Value> = app.fleet.batches().await.into_iter().map(batch).collect();
    Json(json!({"batches": all}))
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    let loads = app.fleet.loads().await;
    let content = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, content)], app.fleet.metrics.scrape(&loads, &app.fleet.figures())).into_response()
}

async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    let data: Vec<Value> = app.fleet.pools().iter().map(|(name, pool)| describe(name, pool)).collect();
    Json(json!({"object": "list", "data": data}))
}

type Name = Result<Path<String>, PathRejection>;

async fn model(State(app): State<Arc<App>>, name: Name) -> Result<Json<Value>, Error> {
    let Path(name) = name.map_err(|_| Error::invalid("model", "the model's name is not UTF-8"))?;
    let pool = app.fleet.pool(&name)?;
    Ok(Json(describe(&name, &pool)))
}

fn describe(name: &str, pool: &Pool) -> Value {
    let most = pool.most_tokens().0;
    json!({"id": name, "object": "model", "created": pool.created, "owned_by": "scls", "max_model_len": most})
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use axum::body::Body;
    use axum::http::StatusCode;
    use router_core::{Config, Mode, PolicyName};
    use tower::ServiceExt;

    use super::*;
    use crate::metrics::Metrics;
    use crate::pool::PoolConfig;

    fn app() -> Arc<App> {
        let config = PoolConfig {
            scheduler: Config {
                policy: PolicyName::Product,
                mode: Mode::Slice,
                slice_len: Some(16),
                seed: 0,
                max_rows: 1,
            },
            policy: "product",
            timeout: std::time::Duration::from_secs(1),
            queue_timeout: None,
            fleet_key: String::new(),
        };
        Arc::new(App::new(Fleet::new(config, Arc::new(Metrics::default())), 1 << 20, Keys::default()))
    }

    async fn ask(routes: &Router, path: &str) -> (StatusCode, Value, Response<()>) {
        let request = Request::builder().uri(path).body(Body::empty()).expect("a request");
        let (head, body) = routes.clone().oneshot(request).await.expect("an answer").into_parts();
        let body = axum::body::to_bytes(body, 1 << 20).await.expect("a body");
        (head.status, serde_json::from_slice(&body).unwrap_or_default(), Response::from_parts(head, ()))
    }

    #[tokio::test]
    async fn a_bug_is_an_answer_and_the_next_request_works() {
        let bug = || async { Json(json!(Vec::<u32>::new().iter().max().expect("the secret of the prompt"))) };
        let routes = answering(routed(vec![("/bug", get(bug)), ("/health", get(health))]), app());
        let (status, body, head) = ask(&routes, "/bug").await;
        assert_eq!((status.as_u16(), &body["error"]["type"]), (500, &json!("server_error")));
        assert!(!body.to_string().contains("secret"), "{body}");
        assert!(head.headers().contains_key(REQUEST_ID));
        assert_eq!(ask(&routes, "/health").await.0, StatusCode::OK);
    }

    #[tokio::test]
    async fn openapi_has_every_route_with_its_methods() {
        let document = crate::openapi::document();
        let paths = document["paths"].as_object().expect("paths");
        let (public, admin) = (public(app()), admin(app()));
        let served = guarded().into_iter().chain(open()).chain(local());
        let served: BTreeSet<String> = served.map(|(path, _)| path.replace("{*", "{")).collect();
        assert_eq!(served, paths.keys().cloned().collect());
        for (path, item) in paths {
            let reference = item["$ref"].as_str().map(|to| to.trim_start_matches('#'));
            let item = reference.map_or(item, |to| document.pointer(to).expect("it leads somewhere"));
            let methods = ["get", "post", "put", "patch", "delete"].iter().filter(|method| !item[**method].is_null());
            let allowed: Vec<_> = methods.map(|method| method.to_uppercase().replace("GET", "GET,HEAD")).collect();
            let routes = if item["servers"].is_null() { &public } else { &admin };
            let path = path.replace(['{', '}'], "");
            let request = Request::builder().method("OPTIONS").uri(&path).body(Body::empty()).expect("a request");
            let answer = routes.clone().oneshot(request).await.expect("an answer");
            assert_eq!(answer.status(), StatusCode::METHOD_NOT_ALLOWED, "{path}");
            assert_eq!(answer.headers()[header::ALLOW], allowed.join(","), "{path}");
        }
    }

    #[tokio::test]
    async fn what_others_offer_is_told_from_what_nobody_does() {
        let routes = public(app());
        for path in
            ["/v1/embeddings", "/v1/responses/5/cancel", "/v1/audio/speech", "/v1/images/generations", "/rerank"]
        {
            let (status, body, _) = ask(&routes, path).await;
            assert_eq!((status.as_u16(), &body["error"]["code"]), (501, &json!("not_offered")), "{path}");
        }
        for path in ["/v1/embedding", "/v1/responses5", "/v1", "/"] {
            assert_eq!(ask(&routes, path).await.0, StatusCode::NOT_FOUND, "{path}");
        }
    }
}
