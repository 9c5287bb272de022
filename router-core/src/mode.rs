//! Ways to schedule: ours, iteration level, and the pooled family of the SCLS paper (arXiv 2406.13511) from sequence
//! level, step by step, to its slice-level scheduling.

use std::fmt;
use std::str::FromStr;

use crate::units::Micros;

/// How rows become batches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mode {
    /// Ours: rows are placed as they come and stay, KV is kept, a slice is cut when joining is worth it.
    Slice,
    /// A plan for every iteration.
    Ils,
    /// Rows wait in a pool, batches are formed of it and run to their end; KV is dropped between slices.
    Pooled(Pooled),
}

/// A step of the paper's ablation: what its pooled scheduling does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pooled {
    /// Its name.
    pub name: &'static str,
    /// Iterations of a batch; `None`: until the last row ends.
    pub slice_len: Option<u32>,
    /// How batches are formed.
    pub batching: Batching,
    /// Where they go.
    pub offload: Offload,
    /// When they are formed.
    pub interval: Interval,
}

/// How the pool is cut into batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Batching {
    /// In order of arrival, so many rows each.
    Fcfs(u32),
    /// Sorted by length, so many rows each.
    Sorted(u32),
    /// By the dynamic programme over lengths.
    Dp,
}

/// Which worker a batch of a round goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offload {
    /// In turn.
    RoundRobin,
    /// Longest first, to the least loaded.
    MaxMin,
}

/// When the pool is cut into batches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Interval {
    /// There are no rounds: a row is a worker's in turn as it comes, and a worker that has nothing to run gets a batch of those
    /// that are its.
    AtOnce,
    /// So often.
    Fixed(Micros),
    /// When half of the least loaded worker's work is done, but no sooner than this.
    Adaptive {
        /// Share of the least load.
        share: f64,
        /// No sooner.
        least: Micros,
    },
}

/// The paper's figures: rows of a batch without its batching, iterations of a slice, seconds between two rounds.
const FIXED_ROWS: u32 = 16;
const SLICE: u32 = 128;
const TICK: Micros = Micros(3_000_000);
const LEAST: Micros = Micros(1_000_000);

impl Pooled {
    /// Sequence level: arrivals are dealt to the workers in turn, whose batches run until their last row ends.
    pub const fn sls() -> Self {
        Self {
            name: "sls",
            slice_len: None,
            batching: Batching::Fcfs(FIXED_ROWS),
            offload: Offload::RoundRobin,
            interval: Interval::AtOnce,
        }
    }

    /// Slices only.
    pub const fn so() -> Self {
        Self { name: "so", slice_len: Some(SLICE), interval: Interval::Fixed(TICK), ..Self::sls() }
    }

    /// Slices of rows of like length.
    pub const fn pm() -> Self {
        Self { name: "pm", batching: Batching::Sorted(FIXED_ROWS), ..Self::so() }
    }

    /// Batches by the dynamic programme.
    pub const fn ab() -> Self {
        Self { name: "ab", batching: Batching::Dp, ..Self::so() }
    }

    /// And the least loaded worker first.
    pub const fn lb() -> Self {
        Self { name: "lb", offload: Offload::MaxMin, ..Self::ab() }
    }

    /// All of the paper.
    pub const fn scls() -> Self {
        Self { name: "scls", interval: Interval::Adaptive { share: 0.5, least: LEAST }, ..Self::lb() }
    }
}

impl Mode {
    /// Those of the command line, then the steps of the ablation.
    pub const ALL: [Self; 8] = [
        Self::Slice,
        Self::Pooled(Pooled::scls()),
        Self::Pooled(Pooled::sls()),
        Self::Ils,
        Self::Pooled(Pooled::so()),
        Self::Pooled(Pooled::pm()),
        Self::Pooled(Pooled::ab()),
        Self::Pooled(Pooled::lb()),
    ];

    /// The name as written.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Slice => "slice",
            Self::Ils => "ils",
            Self::Pooled(pooled) => pooled.name,
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// There is no scheduler of this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no such scheduler: {0}\nschedulers: slice, scls, sls, ils")]
pub struct UnknownMode(String);

impl FromStr for Mode {
    type Err = UnknownMode;

    fn from_str(name: &str) -> Result<Self, UnknownMode> {
        Self::ALL.into_iter().find(|mode| mode.as_str() == name).ok_or_else(|| UnknownMode(name.to_owned()))
    }
}
