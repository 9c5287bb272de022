//! What a run comes to, counted as it happens.

use std::collections::BTreeMap;

use router_core::{
    BatchEnd, BatchRecord, FinishReason, Micros, Rejection, RequestId, RowEnd, RowId, SliceReport, Tokens, WorkerId,
};

/// What a worker did.
#[derive(Clone, Copy, Debug, Default)]
pub struct WorkerOutcome {
    /// Iterations with rows.
    pub busy: Micros,
    /// Between slices, and their starts.
    pub idle: Micros,
    /// Host time that the device waited for: of slice starts, and of iterations beyond their law.
    pub host: Micros,
    /// Slices that ran.
    pub slices: u64,
    /// Of these, cut.
    pub cuts: u64,
    /// Of these, ended before their last step because no row was left.
    pub early: u64,
    /// Rows of all slices, summed.
    pub row_slices: u64,
    /// Iterations that ran.
    pub iterations: u64,
    /// Tokens computed and tokens found cached, over all rows.
    pub computed: Tokens,
    /// Tokens found cached.
    pub cached: Tokens,
    /// Cells of prompts computed for no token.
    pub pad: Tokens,
    /// Tokens computed for rows that had ended.
    pub invalid: Tokens,
    /// Tokens whose KV was given up with their rows unfinished, to be computed again.
    pub evicted: Tokens,
    /// Most blocks a batch used at once.
    pub peak: u64,
    /// The longest iteration, with a slice start before it.
    pub longest: Micros,
    /// When its last slice ended.
    pub completed: Micros,
}

impl WorkerOutcome {
    pub(crate) fn reported(&mut self, at: Micros, report: &SliceReport) {
        self.busy += report.prefill + report.decode;
        self.idle += report.idle;
        self.slices += u64::from(report.steps > 0);
        self.cuts += u64::from(report.end == BatchEnd::Cut);
        self.early += u64::from(report.steps > 0 && report.end == BatchEnd::AllDone);
        self.iterations += u64::from(report.steps);
        self.pad += report.pad;
        self.invalid += report.invalid;
        self.peak = self.peak.max(report.peak.0);
        if report.steps > 0 {
            self.completed = at;
            self.row_slices += report.rows.len() as u64;
        }
        for row in &report.rows {
            self.computed += row.computed;
            self.cached += row.cached;
        }
    }
}

/// What became of a row.
#[derive(Clone, Debug, Default)]
pub struct RowOutcome {
    /// When its request arrived.
    pub arrived: Micros,
    /// Its tokens, in order.
    pub tokens: Vec<u32>,
    /// When each came.
    pub times: Vec<Micros>,
    /// When it ended, and how. Counted, so that a second end shows.
    pub ends: Vec<(Micros, RowEnd)>,
}

impl RowOutcome {
    /// Arrival to first token.
    pub fn ttft(&self) -> Option<Micros> {
        self.times.first().map(|first| first.saturating_sub(self.arrived))
    }

    /// Arrival to end.
    pub fn latency(&self) -> Option<Micros> {
        self.ends.first().map(|(at, _)| at.saturating_sub(self.arrived))
    }

    /// Time between each token and the one before it.
    pub fn gaps(&self) -> impl Iterator<Item = Micros> {
        self.times.windows(2).map(|pair| pair[1].saturating_sub(pair[0]))
    }
}

/// The whole run.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Rows by name.
    pub rows: BTreeMap<RowId, RowOutcome>,
    /// Requests not accepted.
    pub rejected: BTreeMap<RequestId, Rejection>,
    /// Workers by slot.
    pub workers: BTreeMap<WorkerId, WorkerOutcome>,
    /// What the scheduler could not believe.
    pub quarantined: Vec<String>,
    /// Refusals that were not STALE.
    pub refused: Vec<String>,
    /// From a cut of the router to the report of the batch that it ended.
    pub cuts: Vec<Micros>,
    /// Batches that ended, where they are kept.
    pub batches: Vec<BatchRecord>,
    /// When the last thing happened.
    pub end: Micros,
}

impl Outcome {
    /// Rows that ended this way.
    pub fn ended(&self, reason: FinishReason) -> usize {
        self.rows.values().filter(|row| row.ends.iter().any(|(_, end)| end.reason == reason)).count()
    }

    /// Share of prefill tokens that were found cached.
    pub fn hit_ratio(&self) -> f64 {
        let cached: u64 = self.rows.values().flat_map(|row| &row.ends).map(|(_, end)| end.cached.0).sum();
        let prompt: u64 = self.rows.values().flat_map(|row| &row.ends).map(|(_, end)| end.prompt.0).sum();
        cached as f64 / prompt.max(1) as f64
    }

    /// All workers' sums; the latest completion and the largest peak.
    pub fn total(&self) -> WorkerOutcome {
        self.workers.values().fold(WorkerOutcome::default(), |all, w| WorkerOutcome {
            busy: all.busy + w.busy,
            idle: all.idle + w.idle,
            host: all.host + w.host,
            slices: all.slices + w.slices,
            cuts: all.cuts + w.cuts,
            early: all.early + w.early,
            row_slices: all.row_slices + w.row_slices,
            iterations: all.iterations + w.iterations,
            computed: all.computed + w.computed,
            cached: all.cached + w.cached,
            pad: all.pad + w.pad,
            invalid: all.invalid + w.invalid,
            evicted: all.evicted + w.evicted,
            peak: all.peak.max(w.peak),
            longest: all.longest.max(w.longest),
            completed: all.completed.max(w.completed),
        })
    }
}
