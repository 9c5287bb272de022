//! What was known of a batch before it ran, beside what happened.

use crate::cost::Band;
use crate::event::BatchEnd;
use crate::ids::{PlanNo, WorkerId};
use crate::units::{Blocks, Micros};

/// A batch, fixed when it started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchRecord {
    /// Where it ran.
    pub worker: WorkerId,
    /// Its plan.
    pub batch: PlanNo,
    /// When the router learned that it started.
    pub at: Micros,
    /// Rows.
    pub rows: u64,
    /// S: most iterations.
    pub steps: u32,
    /// Its time if all of them run; `band.hi` is the bound.
    pub band: Band,
    /// Blocks it cannot pass.
    pub ceiling: Blocks,
    /// What happened; `None` while it runs.
    pub outcome: Option<BatchOutcome>,
}

/// How a batch went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchOutcome {
    /// Why it ended.
    pub end: BatchEnd,
    /// k: iterations that ran.
    pub steps: u32,
    /// Their time by the worker's clock.
    pub time: Micros,
    /// The band of k iterations, fixed before they ran.
    pub band: Band,
    /// Most blocks in use at once.
    pub peak: Blocks,
}

impl BatchOutcome {
    /// The time fell into the band.
    pub fn covered(&self) -> bool {
        self.band.contains(self.time)
    }
}
