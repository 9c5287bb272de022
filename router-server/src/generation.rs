//! One request from its ids to its text: submits it, gives out what its choices draw, ends it.
//!
//! HTTP and gRPC both read a [`Generation`]; it knows neither. What of a choice is given out when is `output.rs`. Dropping
//! it before its end cancels the request.

use std::sync::Arc;
use std::time::Duration;

use router_core::{FinishReason, RequestId, RowEnd, TokenLogprobs};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::conversation::Turn;
use crate::convert::clipped;
use crate::dispatch::{Command, Update};
use crate::error::Error;
use crate::eta::Eta;
use crate::metrics::Metrics;
use crate::output::{Given, Output, Token};
use crate::proto;
use crate::stop::StopMatcher;
use crate::tokenizer::{Detokenizer, Tokenizer};

/// A validated request in ids.
#[derive(Clone)]
pub struct Job {
    /// The name it was asked for by.
    pub model: String,
    /// Prompt ids.
    pub prompt: Arc<[u32]>,
    /// Answers wanted, at least one.
    pub n: u32,
    /// How tokens are drawn; the seed is the first choice's, the others count on from it.
    pub sampling: proto::Sampling,
    /// When it ends.
    pub limits: proto::Limits,
    /// Stop strings.
    pub stop: Vec<String>,
    /// The conversation that is to know the ids of the answers.
    pub turn: Option<Turn>,
    /// A short time to the first token is promised, at the price of a slice start of those that run.
    pub urgent: bool,
    /// The client's trace, see [`traceparent`]; empty without one.
    pub traceparent: String,
}

/// The trace that a client says its request is a part of, as W3C's Trace Context writes it: version, trace, parent and
/// flags in lower-case hex. Empty where it says none, or what is none.
pub fn traceparent(given: Option<&[u8]>) -> String {
    let text = given.and_then(|given| std::str::from_utf8(given).ok()).unwrap_or_default();
    let parts: Vec<&str> = text.split('-').collect();
    let hex = |part: &&str| part.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
    let named = |part: &str| part.bytes().any(|digit| digit != b'0');
    let is_one = match parts[..] {
        // Version ff is none, and ids of zeros name nothing.
        [version, trace, parent, flags] => {
            (version.len(), trace.len(), parent.len(), flags.len()) == (2, 32, 16, 2)
                && parts.iter().all(hex)
                && version != "ff"
                && named(trace)
                && named(parent)
        }
        _ => false,
    };
    if is_one { text.to_owned() } else { String::new() }
}

/// What came next.
#[derive(Clone, Debug, Default)]
pub struct Piece {
    /// Whose.
    pub choice: u32,
    /// Index in its output of the first token.
    pub first_index: u32,
    /// Tokens that are decided now; often none.
    pub tokens: Vec<Token>,
    /// Text that is decided now; often none.
    pub text: String,
    /// Set on the last piece of the choice.
    pub finish: Option<Finish>,
    /// Set on the last piece of the request.
    pub end: Option<End>,
}

/// Why a choice ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// A stop token or string.
    Stop,
    /// A limit.
    Length,
}

/// What a request took.
#[derive(Clone, Debug, Default)]
pub struct End {
    /// Prompt tokens, once.
    pub prompt_tokens: u64,
    /// Output tokens of all choices.
    pub completion_tokens: u64,
    /// Prompt tokens found in the cache by the choice that found least: the others find what that one computed.
    pub cached_tokens: u64,
    /// Slices of the choice that ran in most.
    pub slices: u32,
    /// The worker that had it last.
    pub worker: Option<Arc<str>>,
    /// Arrival to first token.
    pub ttft: Option<Duration>,
    /// What was foreseen of the whole request before its first token.
    pub eta: Option<Eta>,
}

/// Cancels a request when dropped, unless it ended.
struct CancelGuard {
    request: RequestId,
    commands: mpsc::Sender<Command>,
    armed: bool,
}

impl CancelGuard {
    /// Ends one choice, or all. Where it does not fit it is tried again at the choice's next token, and of a request that
    /// is gone the dispatcher finds the closed channel.
    fn cancel(&self, choice: Option<u32>) {
        if self.armed {
            let _ = self.commands.try_send(Command::Cancel(self.request, choice));
        }
    }
}

impl Drop for CancelGuard {
    fn drop(&mut self) {
        self.cancel(None);
    }
}

/// One of the answers of a request.
struct Choice {
    output: Output,
    /// Tokens given out.
    given: u32,
    last_token: Option<Instant>,
    /// As it was when the request's first token came.
    eta: Option<Eta>,
    ended: bool,
    /// The conversation that is to know its ids.
    turn: Option<Turn>,
}

/// A running request.
pub struct Generation {
    updates: mpsc::Receiver<Update>,
    guard: CancelGuard,
    choices: Vec<Choice>,
    /// Choices that have not ended.
    left: usize,
    /// How many of the likeliest tokens come with each, if logprobs are wanted.
    logprobs: Option<u32>,
    max_tokens: u32,
    arrived: Instant,
    timeout: Duration,
    worker: Option<Arc<str>>,
    /// Summed up over the choices that have ended.
    end: End,
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
    pub fn new(start: Start, job: &Job) -> Self {
        let stops = StopMatcher::new(job.stop.clone());
        let detokenizer = || start.tokenizer.clone().map(Detokenizer::new);
        let choice = |_| Choice {
            output: Output::new(detokenizer(), stops.clone(), job.limits.min_tokens),
            given: 0,
            last_token: None,
            eta: None,
            ended: false,
            turn: job.turn.clone(),
        };
        let choices: Vec<Choice> = (0..job.n).map(choice).collect();
        Self {
            updates: start.updates,
            guard: CancelGuard { request: start.request, commands: start.commands, armed: true },
            left: choices.len(),
            choices,
            logprobs: job.sampling.logprobs,
            max_tokens: job.limits.max_tokens,
            arrived: start.arrived,
            timeout: start.timeout,
            worker: None,
            end: End { cached_tokens: u64::MAX, ..End::default() },
            metrics: start.metrics,
        }
    }

    /// The worker that has it, once one has.
    pub fn worker(&self) -> Option<&Arc<str>> {
        self.worker.as_ref()
    }

    /// What was foreseen before the first token; `None` where a row was not yet placed then.
    pub fn eta(&self) -> Option<Eta> {
        Eta::all(self.choices.iter().map(|choice| choice.eta))
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
                Update::Placed { row, worker, eta } => {
                    self.worker = Some(worker);
                    // Where a row goes on after that, in a later slice or elsewhere, is no news of the whole.
                    let choice = self.choices.get_mut(row.choice as usize);
                    if let Some(choice) = choice.filter(|_| self.end.ttft.is_none()) {
                        choice.eta = eta;
                    }
                }
                Update::Tokens { row, ids, logprobs, .. } => {
                    let piece = self.tokens(row.choice, &ids, logprobs)?;
                    if !(piece.text.is_empty() && piece.tokens.is_empty()) {
                        return Ok(piece);
                    }
                }
                Update::Finished { row, end, worker } => {
                    let (piece, turn) = self.finished(row.choice, end, worker)?;
                    if let Some(turn) = turn {
                        // The next turn may come as soon as this piece is out, so it waits for that. What fails costs
                        // tokenising once more.
                        let _ = tokio::task::spawn_blocking(|| turn.learn()).await;
                    }
                    return Ok(piece);
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

    fn choice(&mut self, number: u32) -> Result<&mut Choice, Error> {
        let choice = self.choices.get_mut(number as usize).filter(|choice| !choice.ended);
        choice.ok_or_else(|| Error::Internal(format!("choice {number} does not run")))
    }

    fn tokens(&mut self, number: u32, ids: &[u32], logprobs: Vec<TokenLogprobs>) -> Result<Piece, Error> {
        let wanted = self.logprobs;
        if wanted.is_some() && logprobs.len() != ids.len() {
            return Err(Error::WorkerFailed("it sent no logprobs".into()));
        }
        if self.choice(number)?.output.is_stopped() {
            // It is on its way out.
            self.guard.cancel(Some(number));
            return Ok(Piece::default());
        }
        self.clock(number, ids.len());
        let choice = self.choice(number)?;
        if let Some(turn) = &mut choice.turn {
            turn.push(ids);
        }
        let mut logprobs = logprobs.into_iter();
        let mut given = Given::default();
        for id in ids {
            let of_it = wanted.and_then(|most| {
                let mut of_it = logprobs.next()?;
                of_it.top.truncate(most as usize);
                Some(of_it)
            });
            choice.output.push(*id, of_it, &mut given);
            if choice.output.is_stopped() {
                self.guard.cancel(Some(number));
                break;
            }
        }
        self.piece(number, given)
    }

    fn piece(&mut self, number: u32, given: Given) -> Result<Piece, Error> {
        let choice = self.choice(number)?;
        let first_index = choice.given;
        choice.given += u32::try_from(given.tokens.len()).unwrap_or(u32::MAX);
        Ok(Piece { choice: number, first_index, tokens: given.tokens, text: given.text, finish: None, end: None })
    }

    fn clock(&mut self, number: u32, tokens: usize) {
        let now = Instant::now();
        let last = self.choices.get_mut(number as usize).and_then(|choice| choice.last_token.replace(now));
        if let Some(last) = last {
            // each token is one: a mean of them is one of tokens, however many come at once
            let gap = (now - last) / u32::try_from(tokens.max(1)).unwrap_or(u32::MAX);
            (0..tokens.max(1)).for_each(|_| self.metrics.next_token(gap));
        } else if self.end.ttft.is_none() {
            let ttft = now - self.arrived;
            self.end.ttft = Some(ttft);
            self.metrics.first_token(ttft);
        }
    }

    /// A choice ended: gives out what it held back, and the turn that its ids are an answer to.
    fn finished(&mut self, number: u32, end: RowEnd, worker: Option<Arc<str>>) -> Result<(Piece, Option<Turn>), Error> {
        let max_tokens = self.max_tokens;
        let choice = self.choice(number)?;
        let by_string = choice.output.is_stopped();
        let mut finish = match end.reason {
            _ if by_string => Finish::Stop,
            FinishReason::Stop => Finish::Stop,
            FinishReason::Length if end.emitted.0 < max_tokens.into() => {
                let why = format!("it ended for length after {} of {max_tokens} tokens", end.emitted.0);
                return Err(Error::WorkerFailed(why));
            }
            FinishReason::Length => Finish::Length,
            // We listen, so it was not us.
            FinishReason::Cancelled => return Err(Error::WorkerFailed("it cancelled the request".into())),
            FinishReason::Error => {
                let why = end.error.unwrap_or_else(|| "no reason given".into());
                return Err(Error::WorkerFailed(clipped(&why)));
            }
        };
        let mut given = Given::default();
        choice.output.finish(&mut given);
        let mut turn = choice.turn.take();
        if choice.output.is_stopped() {
            finish = Finish::Stop;
            // What a stop string cut off is in no later turn.
            turn = None;
        }
        let drawn = if by_string { choice.output.drawn().into() } else { end.emitted.0 };
        let mut piece = self.piece(number, given)?;
        piece.finish = Some(finish);
        self.choice(number)?.ended = true;
        self.left -= 1;
        let sum = &mut self.end;
        sum.prompt_tokens = end.prompt.0;
        sum.completion_tokens += drawn;
        sum.cached_tokens = sum.cached_tokens.min(end.cached.0);
        sum.slices = sum.slices.max(end.slices);
        sum.worker = worker.or_else(|| self.worker.clone());
        if self.left == 0 {
            self.guard.armed = false;
            piece.end = Some(End { eta: self.eta(), ..self.end.clone() });
        }
        Ok((piece, turn))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_is_as_w3c_writes_it() {
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert_eq!(traceparent(Some(good.as_bytes())), good);
        let others = [
            good.to_uppercase(),
            good.replacen("00", "ff", 1),
            good.replace("0af7651916cd43dd8448eb211c80319c", &"0".repeat(32)),
            good.replace("b7ad6b7169203331", &"0".repeat(16)),
            good.replace("-b7", "b-7"),
            good.replace('c', "g"),
            format!("{good}-more"),
            format!(" {good}"),
            String::new(),
        ];
        for other in others {
            assert_eq!(traceparent(Some(other.as_bytes())), "", "{other}");
        }
        assert_eq!(traceparent(Some(b"\xff")), "");
        assert_eq!(traceparent(None), "");
    }
}
