//! What goes into the scheduler and what comes out of it. The shell turns messages into events and actions into messages.

use std::sync::Arc;

use crate::block::BlockHash;
use crate::cost::Band;
use crate::ids::{Epoch, PlanNo, RequestId, RowId, RowKey, WorkerId};
use crate::pool::WorkerSpec;
use crate::units::{Blocks, Micros, Tokens};

/// What happened. The scheduler is told the time with each event and knows no other.
#[derive(Clone, Debug)]
pub enum Event {
    /// A session to a worker is open; it takes rows once its snapshot is complete.
    WorkerJoined {
        /// A slot that no present worker has.
        worker: WorkerId,
        /// What the worker announced.
        spec: WorkerSpec,
    },
    /// The session ended or its lease ran out: its rows move.
    WorkerLost {
        /// The worker.
        worker: WorkerId,
        /// The epoch that is lost; an older one than the present changes nothing.
        epoch: Epoch,
    },
    /// No new rows for this worker; its rows go elsewhere, the running ones at the end of their slice.
    WorkerDraining {
        /// The worker.
        worker: WorkerId,
    },
    /// A message of a worker's session.
    Worker {
        /// Who.
        worker: WorkerId,
        /// Its epoch; another one than the present is ignored.
        epoch: Epoch,
        /// Its `state_seq`: a gap means Resync.
        seq: u64,
        /// What.
        message: WorkerMessage,
    },
    /// A new request.
    RequestArrived(NewRequest),
    /// The client went away, or its stop string matched: these rows end now.
    Cancelled {
        /// The request.
        request: RequestId,
        /// One row of it, or all.
        choice: Option<u32>,
    },
    /// Time has passed; answers a `WakeAt`.
    Tick,
}

/// A request as the core sees it: ids and limits, no text, no sampling.
#[derive(Clone, Debug)]
pub struct NewRequest {
    /// Its name, never used before in this pool.
    pub id: RequestId,
    /// Prompt ids, at least one.
    pub prompt: Arc<[u32]>,
    /// Root of its block-hash chain.
    pub root: BlockHash,
    /// Rows (`n`), at least one.
    pub choices: u32,
    /// Most output tokens of a row, at least one.
    pub max_tokens: Tokens,
    /// A short time to the first token is promised: a running slice is cut for it at once.
    pub urgent: bool,
}

/// A message of a worker, in the core's types.
#[derive(Clone, Debug)]
pub enum WorkerMessage {
    /// Part of the set of cached blocks; the first chunk clears what was believed.
    Snapshot {
        /// Place of this chunk, from 0.
        chunk: u32,
        /// The set is complete.
        last: bool,
        /// Cached blocks.
        hashes: Vec<BlockHash>,
    },
    /// Blocks gone and blocks come, in this order.
    KvDelta {
        /// No longer cached.
        removed: Vec<BlockHash>,
        /// Now cached.
        stored: Vec<BlockHash>,
    },
    /// What one iteration drew, or some that followed one another: then rows have several ids.
    Steps {
        /// The batch.
        batch: PlanNo,
        /// Rows that drew or ended.
        rows: Vec<RowTokens>,
    },
    /// A batch ended.
    SliceReported(SliceReport),
    /// A plan did not run.
    Refused {
        /// The plan.
        plan: PlanNo,
        /// Why.
        reason: Refusal,
        /// Rows at fault, if any are.
        rows: Vec<RowKey>,
        /// For people.
        detail: String,
    },
    /// Nothing but a sign of life and its sequence number.
    Heartbeat,
}

/// Tokens of one row from one iteration.
#[derive(Clone, Debug)]
pub struct RowTokens {
    /// The row.
    pub key: RowKey,
    /// Absolute index in the output of the first id.
    pub first_index: u32,
    /// Drawn ids.
    pub ids: Vec<u32>,
    /// One for each id where the row asks for them, else none.
    pub logprobs: Vec<TokenLogprobs>,
    /// Set when the row ended.
    pub finish: Option<FinishReason>,
    /// Prompt tokens found in the cache; comes with the first token.
    pub cached: Option<Tokens>,
}

/// How likely a drawn token and its rivals were to the model, in natural logarithms. The core passes it on, unread.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenLogprobs {
    /// Of the drawn token.
    pub chosen: f32,
    /// The most likely ids and theirs, best first; as many as the row asks for.
    pub top: Vec<(u32, f32)>,
}

/// The end of a batch. The core decides by `next`, the rows and the times; `end`, `steps`, `peak` and `idle` are for metrics.
#[derive(Clone, Debug)]
pub struct SliceReport {
    /// The batch.
    pub batch: PlanNo,
    /// Why.
    pub end: BatchEnd,
    /// The plan that starts now, if one does.
    pub next: Option<PlanNo>,
    /// Iterations that ran.
    pub steps: u32,
    /// Time of iterations with prefill in them.
    pub prefill: Micros,
    /// Time of the others.
    pub decode: Micros,
    /// Most blocks in use by the batch at once.
    pub peak: Blocks,
    /// The device had nothing to run before this batch although a plan could have been there.
    pub idle: Micros,
    /// Cells of a rectangle computed for no token: padding, and steps of rows that had ended. Zero where nothing is padded.
    pub pad: Tokens,
    /// Tokens computed for rows after their end, because a rectangle goes on.
    pub invalid: Tokens,
    /// Its rows.
    pub rows: Vec<RowReport>,
}

/// Why a batch ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchEnd {
    /// All its steps ran.
    Steps,
    /// No row was left.
    AllDone,
    /// The router cut it.
    Cut,
    /// The outgoing ring was full.
    Backpressure,
    /// The engine failed; its rows ended with it.
    Error,
}

/// One row of a [`SliceReport`].
#[derive(Clone, Copy, Debug)]
pub struct RowReport {
    /// The row.
    pub key: RowKey,
    /// Tokens whose KV was computed.
    pub computed: Tokens,
    /// Tokens found in the cache when it was prefilled in this batch.
    pub cached: Tokens,
    /// Tokens drawn.
    pub emitted: Tokens,
    /// Set when it ended in this batch.
    pub finish: Option<FinishReason>,
    /// Whether its KV is still there.
    pub held: bool,
    /// Tokens that still want prefill.
    pub prefill_left: Tokens,
}

/// Why a worker ran nothing of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The base had ended: the router's view was behind. Harmless.
    Stale,
    /// It does not fit.
    NoMemory,
    /// More rows than the worker takes.
    TooManyRows,
    /// A kept row it does not know.
    UnknownRow,
    /// A field it does not serve, or a value out of range.
    Unsupported,
}

/// How a row ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An eos or stop token.
    Stop,
    /// Its limit of tokens.
    Length,
    /// The client went away or a stop string matched.
    Cancelled,
    /// The worker or the router gave up on it; see [`RowEnd::error`].
    Error,
}

/// What to do. The shell carries actions out in order.
#[derive(Clone, Debug)]
pub enum Action {
    /// Send a plan.
    Plan(WorkerId, Plan),
    /// End the running batch at the next step boundary; the plan sent last starts then.
    Cut(WorkerId, PlanNo),
    /// End these rows at the worker.
    Drop(WorkerId, Vec<RowKey>),
    /// Free the KV of these rows that do not run.
    ReleaseKv(WorkerId, Vec<RowKey>),
    /// Ask for a snapshot.
    Resync(WorkerId),
    /// Close the session: what the worker says cannot be true.
    Quarantine(WorkerId, String),
    /// A request was given a worker, and how long its answer will take from now: no less than the first, and no more
    /// than the second if it draws all its tokens, as loads are now; both zero where that is not known. Once a row and
    /// dispatch.
    Placed(RowId, WorkerId, Band),
    /// Tokens for the client: each index once, in order.
    Tokens {
        /// The row.
        row: RowId,
        /// Absolute index of the first id.
        first_index: u32,
        /// Ids.
        ids: Vec<u32>,
        /// One for each id, or none.
        logprobs: Vec<TokenLogprobs>,
    },
    /// The row ended; exactly once a row.
    Finish(RowId, RowEnd),
    /// The request was not accepted; nothing of it ran.
    Reject(RequestId, Rejection),
    /// Send a `Tick` at or after this time. One timer will do, set to the earliest: a tick asks for what is wanted later.
    WakeAt(Micros),
}

/// The end of a row and what it took.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowEnd {
    /// How.
    pub reason: FinishReason,
    /// Why, where `reason` is `Error`.
    pub error: Option<String>,
    /// Prompt tokens.
    pub prompt: Tokens,
    /// Prompt tokens found in the cache at its first dispatch that drew a token.
    pub cached: Tokens,
    /// Output tokens.
    pub emitted: Tokens,
    /// Slices it ran in.
    pub slices: u32,
    /// The worker that had it last.
    pub worker: Option<WorkerId>,
}

/// Why a request was not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// No worker of this pool is ready.
    #[error("no worker is ready")]
    NoWorker,
    /// It could never run, on any worker.
    #[error("the request needs {needed} and the largest worker takes {most}")]
    NeverFits {
        /// Prompt and limit together.
        needed: Tokens,
        /// The most of context and KV memory of any ready worker.
        most: Tokens,
    },
    /// Too many rows are waiting.
    #[error("too many requests are waiting")]
    Overloaded {
        /// When the first worker will have done what it has.
        retry_after: Micros,
    },
    /// The prompt is empty, there are no rows, or the limit is zero.
    #[error("the request is empty")]
    Empty,
}

/// The batch that runs after `base`; see `ARCHITECTURE.md`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Its name.
    pub no: PlanNo,
    /// The batch it follows.
    pub base: PlanNo,
    /// Rows the worker knows.
    pub keep: Keep,
    /// Survivors of the base left out; their KV stays held.
    pub leave: Vec<RowKey>,
    /// Rows new to the worker.
    pub add: Vec<RowStart>,
    /// Most iterations (S).
    pub steps: u32,
    /// Ceiling of blocks, counted without sharing.
    pub ceiling: Blocks,
    /// How well held KV is protected, for rows left out: higher is evicted later.
    pub ranks: Vec<(RowKey, u64)>,
}

/// Which known rows a plan runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Keep {
    /// All of the base that did not finish, less those left out.
    Survivors,
    /// These, less the finished.
    List(Vec<RowKey>),
}

/// A row that a worker does not know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowStart {
    /// The row.
    pub key: RowKey,
    /// Its slice, from 0 at the first dispatch.
    pub slice_no: u32,
    /// Root of its block-hash chain.
    pub root: BlockHash,
    /// Prompt ids.
    pub prompt: Arc<[u32]>,
    /// Ids drawn so far.
    pub output: Vec<u32>,
    /// Most output tokens, absolute.
    pub max_tokens: Tokens,
    /// How well its KV is protected while held.
    pub hold_rank: u64,
    /// Most of its prefill tokens in an iteration in which another row decodes; zero: the worker's chunk.
    pub prefill_budget: Tokens,
}
