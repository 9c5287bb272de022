//! One simulated run: a trace, a fleet, a way to schedule. All that `scls-router simulate`, the Python module and the figures
//! do is made of these.

use router_core::{BlockSize, Commit, Guarding, Micros, Mode, PolicyName};

use crate::device::Device;
use crate::served::Record;
use crate::timing::Noise;
use crate::trace::Trace;

/// Whether a conversation's turns wait for one another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sessions {
    /// A turn starts no earlier than the previous one's end.
    #[default]
    Closed,
    /// Every turn at its time: a stress test.
    Open,
}

/// How requests are served.
#[derive(Clone, Debug)]
pub enum System {
    /// Iteration-level engines (as vLLM v1) behind the core's `Router`.
    Continuous {
        /// A name of the core or of [`crate::rival`], with `@` and its weight where it has one.
        policy: String,
        /// What a decision moves.
        commit: Commit,
        /// The core's hotspot guard.
        guard: Guarding,
    },
    /// The same engines and router, but decisions move nothing: Q and b are what engines said last. It shows what committing
    /// them is for.
    Uncommitted {
        /// As above.
        policy: String,
    },
    /// Slice workers behind the core's `Scheduler`.
    Scheduled {
        /// Ours, iteration level, or a step of the paper's ladder.
        mode: Mode,
        /// For modes that place.
        policy: PolicyName,
        /// A fixed S; `None`: measured.
        slice_len: Option<u32>,
    },
}

/// The workers.
#[derive(Clone, Debug)]
pub struct Fleet {
    /// How many, at least one.
    pub workers: u32,
    /// Of which kind.
    pub device: Device,
    /// How much slower than the device each is, by slot, repeated; empty: none.
    pub slow: Vec<f64>,
    /// Of their iterations; each worker has a stream of its own.
    pub noise: Noise,
    /// How late what a worker says reaches the router.
    pub delay: Micros,
    /// Workers that vanish, and when; their rows go elsewhere.
    pub lost: Vec<(Micros, u32)>,
    /// Workers that join, and when.
    pub joined: Vec<Micros>,
}

/// What is run.
#[derive(Clone, Debug)]
pub struct Run<'a> {
    /// The requests, scaled as wanted.
    pub trace: &'a Trace,
    /// The workers.
    pub fleet: Fleet,
    /// How they serve.
    pub system: System,
    /// Whether turns wait.
    pub sessions: Sessions,
    /// Most output tokens, which every request announces.
    pub limit: u32,
    /// Of all that is drawn.
    pub seed: u64,
    /// It is over at this time, whatever is left.
    pub until: Micros,
    /// Between two samples of all workers.
    pub sample_every: Micros,
}

impl Run<'_> {
    /// Tokens of a KV block: the trace's, else 16 as engines have it.
    pub fn block_size(&self) -> BlockSize {
        const USUAL: BlockSize = BlockSize::new(16).expect("not zero");
        self.trace.block_size.unwrap_or(USUAL)
    }
}

/// Why a run cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RunError {
    /// There is nobody to serve.
    #[error("a fleet needs at least one worker")]
    NoWorkers,
    /// A policy that nobody has.
    #[error("no such policy: {name}\n{nearest}")]
    UnknownPolicy {
        /// What was asked for.
        name: String,
        /// The nearest, or all.
        nearest: String,
    },
    /// A weight that a policy does not take.
    #[error("{0}")]
    Weight(String),
    /// Only a system with a router makes decisions that can be followed.
    #[error("slice workers are not routed to\nfollow a run of iteration-level engines")]
    NotRouted,
    /// A request that no worker of the fleet can hold.
    #[error("{0}")]
    Unservable(String),
}

/// Runs it. `progress` is told the share that is done, now and then; `false` ends the run early.
pub fn run(run: &Run<'_>, progress: &mut dyn FnMut(f64) -> bool) -> Result<Record, RunError> {
    match run.system {
        System::Continuous { .. } | System::Uncommitted { .. } => crate::fleet::run(run, progress),
        System::Scheduled { .. } => crate::scheduled::run(run, progress),
    }
}
