//! The HTTP side: routes, bodies, headers, server-sent events.
//!
//! Parses and replies; what a field means is `request.rs`, what a request does is `generation.rs`.

use std::collections::hash_map::RandomState;
use std::convert::Infallible;
use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::answer::{Answer, Kind};
use crate::dispatch::Decided;
use crate::error::Error;
use crate::fleet::Fleet;
use crate::generation::{End, Generation, Job};
use crate::metrics::Metrics;
use crate::pool::Pool;
use crate::prompt::Prompt;
use crate::proto;
use crate::request::{Chat, Completion, Params};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const WORKER: HeaderName = HeaderName::from_static("x-scls-worker");
/// Longest a client may take to send its body.
const BODY_TIME: Duration = Duration::from_secs(60);
/// Default limit of `/v1/completions`, as at OpenAI.
const COMPLETION_TOKENS: u32 = 16;

/// What the handlers share.
pub struct App {
    /// Who serves what.
    pub fleet: Arc<Fleet>,
    /// Largest body.
    pub most_payload: usize,
    /// Set when the router is about to end.
    pub draining: AtomicBool,
}

impl App {
    /// Whether new requests are taken.
    pub fn is_ready(&self) -> bool {
        !self.draining.load(Ordering::Relaxed) && self.fleet.is_ready()
    }
}

/// The public routes.
pub fn public(app: Arc<App>) -> Router {
    let routes = Router::new()
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/models", get(models));
    common(routes, app)
}

/// The routes of the admin listener.
pub fn admin(app: Arc<App>) -> Router {
    common(Router::new().route("/workers", get(workers)).route("/decisions", get(decisions)), app)
}

fn common(routes: Router<Arc<App>>, app: Arc<App>) -> Router {
    routes
        .route("/health", get(|| async { Json(json!({"status": "ok"})) }))
        .route("/ready", get(ready))
        .route("/version", get(|| async { Json(json!({"version": env!("CARGO_PKG_VERSION")})) }))
        .route("/metrics", get(metrics))
        .fallback(|uri: Uri| async move { Error::NotFound(uri.path().to_owned()) })
        .method_not_allowed_fallback(|method: Method| async move { Error::MethodNotAllowed(method.to_string()) })
        .layer(middleware::from_fn(echo_request_id))
        .with_state(app)
}

/// Every answer names its request: as the client did, or anew.
async fn echo_request_id(request: Request, next: Next) -> Response {
    let given = request.headers().get(REQUEST_ID).filter(|id| {
        let bytes = id.as_bytes();
        (1..=128).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic)
    });
    let id = given.cloned().or_else(|| HeaderValue::from_str(&random_id()).ok());
    let mut response = next.run(request).await;
    if let Some(id) = id {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

/// 128 bits that nobody guesses or meets again.
pub fn random_id() -> String {
    format!("{:016x}{:016x}", random(), random())
}

/// The standard library seeds its hash maps from the system; that is all the randomness that is needed here.
pub fn random() -> u64 {
    RandomState::new().hash_one(0)
}

/// 200 once a worker takes requests; all workers either way, so that one sees what is missing.
async fn ready(State(app): State<Arc<App>>) -> Response {
    let workers = list_workers(&app).await;
    if app.is_ready() {
        return Json(json!({"ready": true, "workers": workers})).into_response();
    }
    let error = if app.draining.load(Ordering::Relaxed) { Error::Draining } else { Error::NoWorker };
    let mut body = error.body();
    body["ready"] = false.into();
    body["workers"] = workers;
    let retry = error.retry_after().unwrap_or(1);
    (error.status(), [(header::RETRY_AFTER, HeaderValue::from(retry))], Json(body)).into_response()
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
                   "work_us": candidate.work_us, "free_blocks": candidate.free_blocks, "score": score.to_string()})
        };
        let candidates: Vec<Value> = decision.candidates.iter().map(candidate).collect();
        json!({"decision": decision.decision_id, "at_us": decided.at.0, "request": decision.request,
               "choice": decision.choice, "worker": decision.worker_id, "recomputed": decided.recomputed,
               "policy": decision.policy, "turn": decision.turn, "tokens": decision.prompt_tokens,
               "candidates": candidates})
    };
    let all: Vec<Value> = app.fleet.decisions().await.into_iter().map(decided).collect();
    Json(json!({"decisions": all}))
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    let loads = app.fleet.loads().await;
    let content = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, content)], app.fleet.metrics.scrape(&loads)).into_response()
}

async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    let model = |(name, pool): (String, Arc<Pool>)| {
        let most = pool.most_tokens().0;
        json!({"id": name, "object": "model", "created": pool.created, "owned_by": "scls", "max_model_len": most})
    };
    let data: Vec<Value> = app.fleet.pools().into_iter().map(model).collect();
    Json(json!({"object": "list", "data": data}))
}

async fn completions(State(app): State<Arc<App>>, headers: HeaderMap, body: Body) -> Response {
    let mut meter = Meter::new(Arc::clone(&app.fleet.metrics));
    let started = async {
        let Completion { model, prompt, params } = Completion::parse(&read(&app, &headers, body).await?)?;
        let pool = app.fleet.pool(&model)?;
        meter.model.clone_from(&model);
        let prompt = match prompt {
            Prompt::Text(text) => pool.encode(text).await?,
            Prompt::Ids(ids) => ids,
            Prompt::Other(_) | Prompt::Several => return Err(Error::Internal("an unchecked prompt".into())),
        };
        let most = params.max_tokens.unwrap_or(COMPLETION_TOKENS);
        start(&pool, Kind::Completion, job(model, prompt, &params, most), &params, meter.arrived)
    };
    let started = started.await;
    finish(started, meter).await
}

async fn chat(State(app): State<Arc<App>>, headers: HeaderMap, body: Body) -> Response {
    let mut meter = Meter::new(Arc::clone(&app.fleet.metrics));
    let started = async {
        let Chat { model, messages, tools, params } = Chat::parse(&read(&app, &headers, body).await?)?;
        let pool = app.fleet.pool(&model)?;
        meter.model.clone_from(&model);
        let prompt = pool.encode_chat(messages, tools).await?;
        let most = params.max_tokens.unwrap_or(0);
        start(&pool, Kind::Chat, job(model, prompt, &params, most), &params, meter.arrived)
    };
    let started = started.await;
    finish(started, meter).await
}

/// The request in ids; `most` 0 is the rest of the context.
fn job(model: String, prompt: Vec<u32>, params: &Params, most: u32) -> Job {
    Job {
        model,
        prompt: prompt.into(),
        sampling: proto::Sampling {
            temperature: params.temperature,
            seed: params.seed.unwrap_or_else(random),
            ..proto::Sampling::default()
        },
        limits: proto::Limits {
            max_tokens: most,
            min_tokens: params.min_tokens,
            ignore_eos: params.ignore_eos,
            stop_token_ids: params.stop_token_ids.clone(),
        },
        stop: params.stop.clone(),
    }
}

/// The whole body, or what is wrong with it.
async fn read(app: &App, headers: &HeaderMap, body: Body) -> Result<Bytes, Error> {
    if app.draining.load(Ordering::Relaxed) {
        return Err(Error::Draining);
    }
    let most = app.most_payload;
    let declared = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    let mut left: usize = most;
    let mut too_large = declared.is_some_and(|length: usize| length > most);
    // A client that still writes would not read our answer: a body that is only a little too large is read to its end.
    let mut patience = most.saturating_mul(4).max(1 << 20);
    let mut whole = BytesMut::with_capacity(declared.unwrap_or(0).min(most).min(1 << 20));
    let mut chunks = body.into_data_stream();
    let reading = async {
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(|error| Error::bad_request(format!("the body broke off: {error}")))?;
            too_large |= chunk.len() > left;
            if too_large {
                whole.clear();
                patience = patience.saturating_sub(chunk.len());
                if patience == 0 {
                    break;
                }
            } else {
                left -= chunk.len();
                whole.extend_from_slice(&chunk);
            }
        }
        Ok(())
    };
    match tokio::time::timeout(BODY_TIME, reading).await {
        Err(_) => Err(Error::SlowRequest),
        Ok(_) if too_large => Err(Error::TooLarge(most)),
        Ok(Err(error)) => Err(error),
        Ok(Ok(())) => Ok(whole.freeze()),
    }
}

/// Counts a request when it ends; one that is dropped before that was left by its client.
pub struct Meter {
    /// Known names only: it becomes a label.
    pub model: String,
    /// When it came.
    pub arrived: Instant,
    metrics: Arc<Metrics>,
    code: u16,
}

impl Meter {
    /// Begins to count.
    pub fn new(metrics: Arc<Metrics>) -> Self {
        metrics.began();
        Self { model: "unknown".into(), arrived: Instant::now(), metrics, code: 499 }
    }

    /// Sets how it ended.
    pub fn ended(&mut self, status: StatusCode) {
        self.code = status.as_u16();
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.metrics.ended(&self.model, self.code, self.arrived.elapsed());
    }
}

/// A request that runs, and what its answer needs.
struct Started {
    answer: Answer,
    generation: Generation,
    stream: bool,
}

fn start(pool: &Pool, kind: Kind, job: Job, params: &Params, arrived: Instant) -> Result<Started, Error> {
    let prefix = if kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
    let answer = Answer {
        kind,
        id: format!("{prefix}-{}", random_id()),
        model: job.model.clone(),
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        include_usage: params.include_usage,
        token_ids: params.return_token_ids.then(|| Arc::clone(&job.prompt)),
    };
    let generation = pool.submit(job, arrived)?;
    Ok(Started { answer, generation, stream: params.stream })
}

async fn finish(started: Result<Started, Error>, mut meter: Meter) -> Response {
    let result = match started {
        Err(error) => Err(error),
        Ok(started) if started.stream => return stream(started.answer, started.generation, meter).await,
        Ok(started) => whole(started.answer, started.generation).await,
    };
    match result {
        Ok(response) => {
            meter.ended(StatusCode::OK);
            response
        }
        Err(error) => {
            meter.ended(error.status());
            error.into_response()
        }
    }
}

async fn whole(answer: Answer, mut generation: Generation) -> Result<Response, Error> {
    let (mut text, mut ids) = (String::new(), Vec::new());
    let end = loop {
        let piece = generation.next().await?;
        text.push_str(&piece.text);
        if answer.token_ids.is_some() {
            ids.extend(piece.ids);
        }
        if let Some(end) = piece.end {
            break end;
        }
    };
    let mut response = Json(answer.whole(&text, &ids, &end)).into_response();
    name_worker(&mut response, end.worker.as_deref());
    Ok(response)
}

fn name_worker(response: &mut Response, worker: Option<&str>) {
    if let Some(worker) = worker.and_then(|worker| HeaderValue::from_str(worker).ok()) {
        response.headers_mut().insert(WORKER, worker);
    }
}

async fn stream(answer: Answer, mut generation: Generation, mut meter: Meter) -> Response {
    // The first piece decides the status: until then an error is a plain answer.
    let first = match generation.next().await {
        Ok(piece) => piece,
        Err(error) => {
            meter.ended(error.status());
            return error.into_response();
        }
    };
    let worker = generation.worker().cloned();
    let events = async_stream::stream! {
        if let Some(opening) = answer.opening() {
            yield event(&opening);
        }
        let mut next = Ok(first);
        loop {
            match next {
                Ok(piece) => {
                    for part in parts(&answer, &piece.text, &piece.ids, piece.end.as_ref()) {
                        yield event(&part);
                    }
                    if piece.end.is_some() {
                        meter.ended(StatusCode::OK);
                        yield Bytes::from_static(b"data: [DONE]\n\n");
                        break;
                    }
                }
                Err(error) => {
                    let error: Error = error;
                    meter.ended(error.status());
                    yield event(&error.body());
                    break;
                }
            }
            next = generation.next().await;
        }
    };
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    let mut response = (headers, Body::from_stream(events.map(Ok::<_, Infallible>))).into_response();
    name_worker(&mut response, worker.as_deref());
    response
}

/// The events of one piece: its text, then its end with the usage. Text and end are apart, as OpenAI sends them.
fn parts(answer: &Answer, text: &str, ids: &[u32], end: Option<&End>) -> Vec<Value> {
    let mut parts = Vec::new();
    let wanted = answer.token_ids.is_some() && !ids.is_empty();
    if !text.is_empty() || wanted {
        parts.push(answer.event(text, ids, None));
    }
    if let Some(end) = end {
        parts.push(answer.event("", &[], Some(end)));
        parts.extend(answer.closing(end));
    }
    parts
}

fn event(value: &Value) -> Bytes {
    format!("data: {value}\n\n").into()
}
