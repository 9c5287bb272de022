//! What a simulated run came to: one small record a request, one a worker.

use router_core::Micros;

use crate::outcome::WorkerOutcome;

/// What became of a request. 56 bytes, so that a million of them are nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// Its place in the trace.
    pub request: u32,
    /// The worker that ended it.
    pub worker: u32,
    /// When it arrived; in a closed session not before its predecessor's end.
    pub arrived: Micros,
    /// When its first token came; zero: never.
    pub first: Micros,
    /// When it ended; zero: it had not, when the run was over.
    pub ended: Micros,
    /// Prompt tokens found cached when its prefill began.
    pub hit: u32,
    /// Tokens of its answer so far.
    pub output: u32,
    /// The longest time between two of its tokens, as it was seen by a client, in microseconds.
    pub gap: u32,
    /// Slices it took, or times it was preempted in an iteration-level engine.
    pub slices: u32,
}

/// A run.
#[derive(Clone, Debug, Default)]
pub struct Record {
    /// Requests in order of arrival, unfinished ones included.
    pub served: Vec<Served>,
    /// Requests no worker could take.
    pub rejected: u64,
    /// Rows that began anew because their worker vanished.
    pub resent: u64,
    /// Rows that moved although their worker was there: lost KV, or work weighed between workers.
    pub moves: u64,
    /// Workers by slot.
    pub workers: Vec<WorkerOutcome>,
    /// Rows of each worker's batch (b, waiting ones included) and its queued prefill tokens, sampled at equal times.
    pub samples: Vec<Sample>,
    /// Slices as they ran, the first so many of each of the first workers: for the plot of lanes.
    pub lanes: Vec<Lane>,
    /// What the guard saw and did.
    pub guard: GuardCounts,
    /// The virtual time at which the run was over.
    pub end: Micros,
}

/// All workers at one time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// When.
    pub at: Micros,
    /// b of each worker.
    pub batch_size: Vec<u32>,
    /// Q of each worker.
    pub queued: Vec<u32>,
}

/// A slice, or an iteration-level engine's spell between two joins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lane {
    /// The worker.
    pub worker: u32,
    /// From when to when.
    pub span: (Micros, Micros),
    /// Rows.
    pub rows: u32,
    /// Iterations that ran.
    pub steps: u32,
    /// It ended by a cut.
    pub cut: bool,
}

/// What the hotspot guard counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuardCounts {
    /// Times a class began to break the safe condition.
    pub alarms: u64,
    /// Decisions from which holders were filtered.
    pub filtered: u64,
}
