//! The HTTP side: routes, and all that is not a generation.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::completions::{chat, completions};
use crate::dispatch::Decided;
use crate::error::Error;
use crate::fleet::Fleet;
use crate::pool::Pool;
use crate::proto;
use crate::random::random_id;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// What the handlers share.
pub struct App {
    /// Who serves what.
    pub fleet: Arc<Fleet>,
    /// Largest body.
    pub most_payload: usize,
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
    /// Over a fleet, taking requests.
    pub fn new(fleet: Arc<Fleet>, most_payload: usize) -> Self {
        Self { fleet, most_payload, draining: AtomicBool::new(false), busy: watch::Sender::new(0) }
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

/// The public routes.
pub fn public(app: Arc<App>) -> Router {
    let routes = Router::new()
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model));
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

/// 200 once a worker takes requests; all workers either way, so that one sees what is missing.
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
