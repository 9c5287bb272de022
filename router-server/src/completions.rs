//! The two endpoints that generate: `/v1/completions` and `/v1/chat/completions`, whole or as server-sent events.
//!
//! Reads a body, starts a [`Batch`] of generations and writes what it gives. What a field means is `request.rs`.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::StreamExt;
use serde_json::Value;
use tokio::time::Instant;

use crate::answer::{Answer, Kind};
use crate::batch::Batch;
use crate::body::read;
use crate::error::Error;
use crate::eta::Eta;
use crate::generation::{Finish, Job, Piece, traceparent};
use crate::http::App;
use crate::meter::Meter;
use crate::output::Given;
use crate::pool::Pool;
use crate::prompt::Prompt;
use crate::proto;
use crate::random::{random, random_id};
use crate::request::{Chat, Completion, Params};

const WORKER: HeaderName = HeaderName::from_static("x-scls-worker");
const ETA: HeaderName = HeaderName::from_static("x-scls-eta-ms");
const CACHED_TOKENS: HeaderName = HeaderName::from_static("x-scls-cached-tokens");
/// Default limit of `/v1/completions`, as at OpenAI.
const COMPLETION_TOKENS: u32 = 16;

/// `POST /v1/completions`.
pub async fn completions(State(app): State<Arc<App>>, headers: HeaderMap, body: Body) -> Response {
    let mut meter = Meter::new(Arc::clone(&app.fleet.metrics));
    let started = async {
        let Completion { model, prompts, params } =
            Completion::parse(&body_of(&app, &headers, body, &mut meter).await?)?;
        let pool = app.fleet.pool(&model)?;
        meter.model.clone_from(&model);
        let mut jobs = Vec::new();
        for prompt in prompts {
            let prompt = match prompt {
                Prompt::Text(text) => pool.encode(text).await?,
                Prompt::Ids(ids) => ids,
                Prompt::Other(_) | Prompt::Several(_) => return Err(Error::Internal("an unchecked prompt".into())),
            };
            let most = params.max_tokens.unwrap_or_else(|| {
                // The default is ours: it gives way where the client's own wish is an error.
                let room = pool.most_tokens().0.saturating_sub(prompt.len() as u64).max(1);
                u32::try_from(room).unwrap_or(u32::MAX).min(COMPLETION_TOKENS)
            });
            jobs.push(Job { traceparent: trace(&headers), ..job(model.clone(), prompt, &params, most) });
        }
        start(&pool, Kind::Completion, jobs, &params, meter.arrived)
    };
    let started = started.await;
    finish(started, meter).await
}

/// `POST /v1/chat/completions`.
pub async fn chat(State(app): State<Arc<App>>, headers: HeaderMap, body: Body) -> Response {
    let mut meter = Meter::new(Arc::clone(&app.fleet.metrics));
    let started = async {
        let body = body_of(&app, &headers, body, &mut meter).await?;
        let Chat { model, messages, tools, params } = Chat::parse(&body)?;
        let pool = app.fleet.pool(&model)?;
        meter.model.clone_from(&model);
        let (prompt, turn) = pool.encode_chat(messages, tools, body.len()).await?;
        let most = params.max_tokens.unwrap_or(0);
        // Whoever biases ids could choose how an answer is spelled, and what is learned of it is for others too.
        let turn = turn.filter(|_| params.sampling.logit_bias.is_empty());
        let job = Job { turn, traceparent: trace(&headers), ..job(model, prompt, &params, most) };
        start(&pool, Kind::Chat, vec![job], &params, meter.arrived)
    };
    let started = started.await;
    finish(started, meter).await
}

/// The request in ids; `most` 0 is the rest of the context.
fn job(model: String, prompt: Vec<u32>, params: &Params, most: u32) -> Job {
    Job {
        model,
        prompt: prompt.into(),
        n: params.n,
        sampling: proto::Sampling { seed: params.seed.unwrap_or_else(random), ..params.sampling.clone() },
        limits: proto::Limits {
            max_tokens: most,
            min_tokens: params.min_tokens,
            ignore_eos: params.ignore_eos,
            stop_token_ids: params.stop_token_ids.clone(),
        },
        stop: params.stop.clone(),
        turn: None,
        urgent: params.urgent,
        traceparent: String::new(),
    }
}

fn trace(headers: &HeaderMap) -> String {
    traceparent(headers.get("traceparent").map(HeaderValue::as_bytes))
}

/// The whole body. From then on a shutdown waits for the request.
async fn body_of(app: &App, headers: &HeaderMap, body: Body, meter: &mut Meter) -> Result<Bytes, Error> {
    if app.is_draining() {
        return Err(Error::Draining);
    }
    let body = read(headers, body, app.most_payload).await?;
    meter.busy = Some(app.begin()?);
    Ok(body)
}

/// A request that runs, and what its answer needs.
struct Started {
    answer: Answer,
    batch: Batch,
    stream: bool,
}

fn start(pool: &Pool, kind: Kind, jobs: Vec<Job>, params: &Params, arrived: Instant) -> Result<Started, Error> {
    let Some(first) = jobs.first() else { return Err(Error::Internal("no prompt".into())) };
    let prefix = if kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
    let answer = Answer {
        kind,
        id: format!("{prefix}-{}", random_id()),
        model: first.model.clone(),
        fingerprint: pool.fingerprint(),
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        n: u32::try_from(jobs.len()).unwrap_or(u32::MAX).saturating_mul(params.n),
        include_usage: params.include_usage,
        token_ids: params.return_token_ids.then(|| Arc::clone(&first.prompt)),
        logprobs: params.sampling.logprobs.map(|_| pool.pieces()),
    };
    // Where one of several cannot be taken, those before it are dropped with the list.
    let generations = jobs.into_iter().map(|job| pool.submit(job, arrived)).collect::<Result<Vec<_>, _>>();
    let generations = generations.map_err(|error| match error {
        // Named as the client named it.
        Error::ContextLength { message, param: "max_tokens" } => {
            Error::ContextLength { message, param: params.limit_name }
        }
        Error::ContextLength { message, param: "prompt" } if kind == Kind::Chat => {
            Error::ContextLength { message, param: "messages" }
        }
        error => error,
    })?;
    Ok(Started { answer, batch: Batch::new(generations, params.n), stream: params.stream })
}

async fn finish(started: Result<Started, Error>, mut meter: Meter) -> Response {
    let result = match started {
        Err(error) => Err(error),
        Ok(started) if started.stream => return stream(started.answer, started.batch, meter).await,
        Ok(started) => whole(started.answer, started.batch).await,
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

async fn whole(answer: Answer, mut batch: Batch) -> Result<Response, Error> {
    let mut choices = vec![(Given::default(), Finish::Length); answer.n as usize];
    let end = loop {
        let piece = batch.next().await?;
        let Some((given, finish)) = choices.get_mut(piece.choice as usize) else {
            return Err(Error::Internal(format!("a choice that nobody asked for: {}", piece.choice)));
        };
        given.text.push_str(&piece.text);
        if answer.shows_tokens() {
            given.tokens.extend(piece.tokens);
        }
        *finish = piece.finish.unwrap_or(*finish);
        if let Some(end) = piece.end {
            break end;
        }
    };
    let mut response = Json(answer.whole(&choices, &end)).into_response();
    describe(&mut response, end.worker.as_deref(), end.eta);
    response.headers_mut().insert(CACHED_TOKENS, end.cached_tokens.into());
    Ok(response)
}

/// Says who serves, and what was foreseen.
fn describe(response: &mut Response, worker: Option<&str>, eta: Option<Eta>) {
    let eta = eta.map(|eta| eta.to_string());
    for (name, text) in [(WORKER, worker), (ETA, eta.as_deref())] {
        if let Some(value) = text.and_then(|text| HeaderValue::from_str(text).ok()) {
            response.headers_mut().insert(name, value);
        }
    }
}

async fn stream(answer: Answer, mut batch: Batch, mut meter: Meter) -> Response {
    // The first piece decides the status: until then an error is a plain answer.
    let first = match batch.next().await {
        Ok(piece) => piece,
        Err(error) => {
            meter.ended(error.status());
            return error.into_response();
        }
    };
    let (worker, eta) = (batch.worker().cloned(), batch.eta());
    let events = async_stream::stream! {
        for opening in answer.openings() {
            yield event(&opening);
        }
        let mut next = Ok(first);
        loop {
            match next {
                Ok(piece) => {
                    for part in parts(&answer, &piece) {
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
            next = batch.next().await;
        }
    };
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    let mut response = (headers, Body::from_stream(events.map(Ok::<_, Infallible>))).into_response();
    describe(&mut response, worker.as_deref(), eta);
    response
}

/// The events of one piece: its text, its choice's end, the usage. Text and end are apart, as OpenAI sends them.
fn parts(answer: &Answer, piece: &Piece) -> Vec<Value> {
    let mut parts = Vec::new();
    if !piece.text.is_empty() || (answer.shows_tokens() && !piece.tokens.is_empty()) {
        parts.push(answer.event(piece.choice, &piece.text, &piece.tokens, None));
    }
    if let Some(finish) = piece.finish {
        parts.push(answer.event(piece.choice, "", &[], Some(finish)));
    }
    parts.extend(piece.end.as_ref().and_then(|end| answer.closing(end)));
    parts
}

fn event(value: &Value) -> Bytes {
    format!("data: {value}\n\n").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_priority_tier_makes_an_urgent_job() {
        for (tier, urgent) in [("default", false), ("priority", true)] {
            let body = format!(r#"{{"model": "m", "prompt": [5], "service_tier": "{tier}"}}"#);
            let params = Completion::parse(body.as_bytes()).expect("valid").params;
            assert_eq!(job("m".into(), vec![5], &params, 1).urgent, urgent);
        }
    }
}
