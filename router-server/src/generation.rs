//! One request from its ids to its text: submits it, turns its tokens into text, matches stop strings, ends it.
//!
//! HTTP and gRPC both read a [`Generation`]; it knows neither. Dropping it before its end cancels the request.

use std::sync::Arc;
use std::time::Duration;

use router_core::{FinishReason, RequestId, RowEnd};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::convert::clipped;
use crate::dispatch::{Command, Update};
use crate::error::Error;
use crate::metrics::Metrics;
use crate::proto;
use crate::stop::StopMatcher;
use crate::tokenizer::{Detokenizer, Tokenizer};

/// A validated request in ids.
#[derive(Clone, Debug)]
pub struct Job {
    /// The name it was asked for by.
    pub model: String,
    /// Prompt ids.
    pub prompt: Arc<[u32]>,
    /// How tokens are drawn.
    pub sampling: proto::Sampling,
    /// When it ends.
    pub limits: proto::Limits,
    /// Stop strings.
    pub stop: Vec<String>,
}

/// What came next.
#[derive(Clone, Debug, Default)]
pub struct Piece {
    /// Absolute index of the first id.
    pub first_index: u32,
    /// Ids; of an iteration, or none.
    pub ids: Vec<u32>,
    /// Text that is decided now; often none.
    pub text: String,
    /// Set on the last piece.
    pub end: Option<End>,
}

/// How a request ended, and what it took.
#[derive(Clone, Debug)]
pub struct End {
    /// `true` if a stop token or string ended it, `false` if a limit did.
    pub stopped: bool,
    /// Prompt tokens.
    pub prompt_tokens: u64,
    /// Output tokens.
    pub completion_tokens: u64,
    /// Prompt tokens found in the cache.
    pub cached_tokens: u64,
    /// Slices it ran in.
    pub slices: u32,
    /// The worker that had it last.
    pub worker: Option<Arc<str>>,
    /// Arrival to first token.
    pub ttft: Option<Duration>,
}

/// Cancels a request when dropped, unless it ended.
struct CancelGuard {
    request: RequestId,
    commands: mpsc::Sender<Command>,
    armed: bool,
}

impl CancelGuard {
    fn cancel(&mut self) {
        // Where it does not fit it stays armed: a stopped request tries again at its next token, and of one that is
        // gone the dispatcher finds the closed channel.
        if self.armed && self.commands.try_send(Command::Cancel(self.request)).is_ok() {
            self.armed = false;
        }
    }
}

impl Drop for CancelGuard {
    fn drop(&mut self) {
        self.cancel();
    }
}

/// A running request.
pub struct Generation {
    updates: mpsc::Receiver<Update>,
    guard: CancelGuard,
    detokenizer: Option<Detokenizer>,
    stops: StopMatcher,
    min_tokens: u32,
    max_tokens: u32,
    arrived: Instant,
    timeout: Duration,
    last_token: Option<Instant>,
    ttft: Option<Duration>,
    worker: Option<Arc<str>>,
    emitted: u32,
    /// A stop string matched: only the end is waited for.
    stopped: bool,
    metrics: Arc<Metrics>,
}

/// What a generation needs of its surroundings.
pub struct Start {
    /// Its name.
    pub request: RequestId,
    /// Where to cancel it.
    pub commands: mpsc::Sender<Command>,
    /// Where its updates come from.
    pub updates: mpsc::Receiver<Update>,
    /// For its text; without it there is none.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// When the client's request came.
    pub arrived: Instant,
    /// Longest it may take.
    pub timeout: Duration,
    /// Where times are counted.
    pub metrics: Arc<Metrics>,
}

impl Generation {
    /// Begins to listen.
    pub fn new(start: Start, stop: Vec<String>, limits: &proto::Limits) -> Self {
        Self {
            updates: start.updates,
            guard: CancelGuard { request: start.request, commands: start.commands, armed: true },
            detokenizer: start.tokenizer.map(Detokenizer::new),
            stops: StopMatcher::new(stop),
            min_tokens: limits.min_tokens,
            max_tokens: limits.max_tokens,
            arrived: start.arrived,
            timeout: start.timeout,
            last_token: None,
            ttft: None,
            worker: None,
            emitted: 0,
            stopped: false,
            metrics: start.metrics,
        }
    }

    /// The worker that has it, once one has.
    pub fn worker(&self) -> Option<&Arc<str>> {
        self.worker.as_ref()
    }

    /// The next piece; after one with an end, or an error, there is no other.
    pub async fn next(&mut self) -> Result<Piece, Error> {
        loop {
            let update = match tokio::time::timeout_at(self.arrived + self.timeout, self.updates.recv()).await {
                Err(_) => return Err(Error::Timeout(self.timeout)),
                Ok(None) => return Err(Error::Internal("the scheduler stopped".into())),
                Ok(Some(update)) => update,
            };
            match update {
                Update::Placed(worker) => self.worker = Some(worker),
                Update::Tokens { .. } if self.stopped => {}
                Update::Tokens { first_index, ids, .. } => {
                    let piece = self.tokens(first_index, ids);
                    if !self.stopped {
                        return Ok(piece);
                    }
                    // Its end comes at once; it takes this text along.
                    let end = self.wait_for_end().await?;
                    return Ok(Piece { end: Some(end), ..piece });
                }
                Update::Finished { end, worker, .. } => {
                    let end = self.end(end, worker)?;
                    let text = self.rest();
                    return Ok(Piece { first_index: self.emitted, ids: Vec::new(), text, end: Some(end) });
                }
                Update::Rejected(error) => {
                    self.guard.armed = false;
                    return Err(error);
                }
                Update::Overflow => {
                    self.guard.armed = false;
                    return Err(Error::SlowClient);
                }
            }
        }
    }

    fn tokens(&mut self, first_index: u32, mut ids: Vec<u32>) -> Piece {
        self.clock(ids.len());
        let mut text = String::new();
        for at in 0..ids.len() {
            let new = self.detokenizer.as_mut().map_or_else(String::new, |detokenizer| detokenizer.push(ids[at]));
            self.emitted += 1;
            if self.emitted <= self.min_tokens {
                text.push_str(&self.stops.pass(&new));
                continue;
            }
            let (new, matched) = self.stops.push(&new);
            text.push_str(&new);
            if matched {
                self.stopped = true;
                self.guard.cancel();
                ids.truncate(at + 1);
                break;
            }
        }
        Piece { first_index, ids, text, end: None }
    }

    fn clock(&mut self, tokens: usize) {
        let now = Instant::now();
        if let Some(last) = self.last_token.replace(now) {
            let gap = (now - last) / u32::try_from(tokens.max(1)).unwrap_or(u32::MAX);
            self.metrics.next_token(gap);
        } else {
            let ttft = now - self.arrived;
            self.ttft = Some(ttft);
            self.metrics.first_token(ttft);
        }
    }

    async fn wait_for_end(&mut self) -> Result<End, Error> {
        loop {
            match tokio::time::timeout_at(self.arrived + self.timeout, self.updates.recv()).await {
                Err(_) => return Err(Error::Timeout(self.timeout)),
                Ok(Some(Update::Finished { end, worker, .. })) => return self.end(end, worker),
                Ok(Some(Update::Placed(_) | Update::Tokens { .. })) => self.guard.cancel(),
                Ok(Some(Update::Rejected(_) | Update::Overflow) | None) => {
                    return Err(Error::Internal("no end came for a stopped request".into()));
                }
            }
        }
    }

    fn end(&mut self, end: RowEnd, worker: Option<Arc<str>>) -> Result<End, Error> {
        self.guard.armed = false;
        let stopped = match end.reason {
            _ if self.stopped => true,
            FinishReason::Stop => true,
            FinishReason::Length if end.emitted.0 < self.max_tokens.into() => {
                let why = format!("it ended for length after {} of {} tokens", end.emitted.0, self.max_tokens);
                return Err(Error::WorkerFailed(why));
            }
            FinishReason::Length => false,
            // We listen, so it was not us.
            FinishReason::Cancelled => return Err(Error::WorkerFailed("it cancelled the request".into())),
            FinishReason::Error => {
                let why = end.error.unwrap_or_else(|| "no reason given".into());
                return Err(Error::WorkerFailed(clipped(&why)));
            }
        };
        Ok(End {
            stopped,
            prompt_tokens: end.prompt.0,
            completion_tokens: if self.stopped { self.emitted.into() } else { end.emitted.0 },
            cached_tokens: end.cached.0,
            slices: end.slices,
            worker: worker.or_else(|| self.worker.clone()),
            ttft: self.ttft,
        })
    }

    /// What was held back, now that the output ended.
    fn rest(&mut self) -> String {
        let new = self.detokenizer.as_mut().map_or_else(String::new, Detokenizer::finish);
        let (mut text, matched) = self.stops.push(&new);
        if !matched {
            text.push_str(&self.stops.finish());
        }
        text
    }
}
