//! The gRPC side: the `Router` service of the contract. What is not served yet says so.

use std::pin::Pin;
use std::sync::Arc;

use axum::http::StatusCode;
use futures::Stream;
use router_core::DecisionId;
use tonic::metadata::MetadataValue;
use tonic::{Request, Response, Status};

use crate::convert;
use crate::error::Error;
use crate::eta::Eta;
use crate::fields::MOST_CHOICES;
use crate::generation::{End, Finish, Generation, Job, Piece, traceparent};
use crate::http::App;
use crate::meter::Meter;
use crate::pool::Pool;
use crate::proto::{self, FinishReason, GenerateRequest, GenerateResponse, Sampling, Usage, prompt, router_server};
use crate::random::{random, random_id};
use crate::sampling::check_stops;

/// Longest id of a client: it comes back with every piece.
const MOST_ID: usize = 128;

/// Serves the contract for one router.
pub struct Service {
    app: Arc<App>,
}

impl Service {
    /// Over the same state as HTTP.
    pub fn new(app: Arc<App>) -> Self {
        Self { app }
    }

    fn pool(&self, model: &str) -> Result<Arc<Pool>, Error> {
        if model.is_empty() { Err(Error::invalid("model", "the model is missing")) } else { self.app.fleet.pool(model) }
    }

    async fn start(
        &self,
        mut request: GenerateRequest,
        traceparent: String,
        meter: &mut Meter,
    ) -> Result<Generation, Error> {
        if request.request_id.len() > MOST_ID {
            let message = format!("request_id has at most {MOST_ID} bytes: {}", request.request_id.len());
            return Err(Error::invalid("request_id", message));
        }
        meter.busy = Some(self.app.begin()?);
        let pool = self.pool(&request.model)?;
        meter.model.clone_from(&request.model);
        if request.n > MOST_CHOICES {
            return Err(Error::invalid("n", format!("n must be from 1 to {MOST_CHOICES}: {}", request.n)));
        }
        check_stops(&request.stop)?;
        let prompt = ids_of(&pool, request.prompt.take()).await?;
        pool.submit(job(request, prompt, traceparent), meter.arrived)
    }
}

fn job(request: GenerateRequest, prompt: Vec<u32>, traceparent: String) -> Job {
    Job {
        model: request.model,
        prompt: prompt.into(),
        n: request.n.max(1),
        // Absent is greedy; what is there is checked with the rest of the job.
        sampling: request.sampling.unwrap_or_else(|| Sampling { seed: random(), ..Sampling::default() }),
        // Absent is the rest of the context.
        limits: request.limits.unwrap_or_default(),
        stop: request.stop,
        turn: None,
        urgent: request.urgent,
        traceparent,
    }
}

async fn ids_of(pool: &Pool, prompt: Option<proto::Prompt>) -> Result<Vec<u32>, Error> {
    match prompt.and_then(|prompt| prompt.kind) {
        None => Err(Error::invalid("prompt", "the prompt is missing")),
        Some(prompt::Kind::Text(text)) => pool.encode(text).await,
        Some(prompt::Kind::Ids(ids)) => {
            convert::token_ids(&ids).map_err(|error| Error::invalid("prompt.ids", error.to_string()))
        }
    }
}

fn response(request_id: &str, piece: Piece, eta: Option<Eta>) -> GenerateResponse {
    let finish = match piece.finish {
        None => FinishReason::Unspecified,
        Some(Finish::Stop) => FinishReason::Stop,
        Some(Finish::Length) => FinishReason::Length,
    };
    GenerateResponse {
        request_id: request_id.to_owned(),
        choice: piece.choice,
        first_index: piece.first_index,
        ids: piece.tokens.iter().map(|token| token.id).collect(),
        text: piece.text,
        finish: finish.into(),
        usage: piece.end.map(|end| usage(&end)),
        logprobs: piece.tokens.iter().filter_map(|token| token.logprobs.as_ref()).map(convert::logprobs).collect(),
        eta: eta.map(Into::into),
    }
}

fn usage(end: &End) -> Usage {
    let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    Usage {
        prompt_tokens: narrow(end.prompt_tokens),
        completion_tokens: narrow(end.completion_tokens),
        cached_tokens: narrow(end.cached_tokens),
        slices: end.slices,
        worker_id: end.worker.as_deref().unwrap_or_default().to_owned(),
    }
}

/// Whoever reaches this port may ask it: as long as it knows no keys, it changes no workers.
fn closed<T>(what: &str) -> Result<Response<T>, Status> {
    Err(Status::unimplemented(format!(
        "not served by this build: {what}\nworkers are named at the start, with --worker-urls: this port would let anyone add and remove them"
    )))
}

type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl router_server::Router for Service {
    type GenerateStream = Responses<GenerateResponse>;

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let traceparent = traceparent(request.metadata().get("traceparent").map(MetadataValue::as_bytes));
        let request = request.into_inner();
        let id = if request.request_id.is_empty() { random_id() } else { request.request_id.clone() };
        let mut meter = Meter::new(Arc::clone(&self.app.fleet.metrics));
        let mut generation = self.start(request, traceparent, &mut meter).await.map_err(|error| {
            meter.ended(error.status());
            Status::from(error)
        })?;
        let pieces = async_stream::stream! {
            let mut is_first = true;
            loop {
                match generation.next().await {
                    Ok(piece) => {
                        let ended = piece.end.is_some();
                        if ended {
                            meter.ended(StatusCode::OK);
                        }
                        let eta = if std::mem::take(&mut is_first) { generation.eta() } else { None };
                        yield Ok(response(&id, piece, eta));
                        if ended {
                            break;
                        }
                    }
                    Err(error) => {
                        meter.ended(error.status());
                        yield Err(error.into());
                        break;
                    }
                }
            }
        };
        Ok(Response::new(Box::pin(pieces)))
    }

    async fn route(&self, request: Request<proto::RouteRequest>) -> Result<Response<proto::Decision>, Status> {
        let request = request.into_inner();
        let pool = self.pool(&request.model)?;
        let prompt = ids_of(&pool, request.prompt).await?;
        Ok(Response::new(pool.route(prompt).await?))
    }

    async fn explain(&self, request: Request<proto::ExplainRequest>) -> Result<Response<proto::Decision>, Status> {
        let id = request.into_inner().decision_id;
        let mut found = self.app.fleet.decisions(Some(DecisionId(id))).await;
        match found.pop() {
            None => Err(Status::not_found(format!("no such decision: {id}\nthe latest of each model are kept"))),
            Some(_) if !found.is_empty() => {
                Err(Status::failed_precondition(format!("more than one model has a decision of this number: {id}")))
            }
            Some(decided) => Ok(Response::new(decided.decision)),
        }
    }

    async fn list_workers(
        &self,
        _: Request<proto::ListWorkersRequest>,
    ) -> Result<Response<proto::ListWorkersResponse>, Status> {
        Ok(Response::new(proto::ListWorkersResponse { workers: self.app.fleet.statuses().await }))
    }

    async fn add_worker(&self, _: Request<proto::AddWorkerRequest>) -> Result<Response<proto::WorkerStatus>, Status> {
        closed("AddWorker")
    }

    async fn drain_worker(
        &self,
        _: Request<proto::DrainWorkerRequest>,
    ) -> Result<Response<proto::WorkerStatus>, Status> {
        closed("DrainWorker")
    }

    async fn remove_worker(
        &self,
        _: Request<proto::RemoveWorkerRequest>,
    ) -> Result<Response<proto::WorkerStatus>, Status> {
        closed("RemoveWorker")
    }

    async fn register(&self, _: Request<proto::RegisterRequest>) -> Result<Response<proto::RegisterResponse>, Status> {
        closed("Register")
    }

    type WatchDecisionsStream = Responses<proto::Decision>;

    async fn watch_decisions(
        &self,
        _: Request<proto::WatchDecisionsRequest>,
    ) -> Result<Response<Self::WatchDecisionsStream>, Status> {
        Err(Status::unimplemented("not served by this build: WatchDecisions\nExplain gives the latest one by one"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absent_field_is_the_default_and_urgency_is_kept() {
        for urgent in [false, true] {
            let job = job(GenerateRequest { urgent, ..GenerateRequest::default() }, vec![5], String::new());
            assert_eq!((job.urgent, job.n, job.limits.max_tokens, job.sampling.temperature), (urgent, 1, 0, 0.0));
        }
    }
}
