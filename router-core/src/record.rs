//! What was known of a batch before it ran, beside what happened.

use crate::cost::{Band, BatchLoad, CostModel};
use crate::event::{BatchEnd, SliceReport};
use crate::ids::{PlanNo, RowKey, WorkerId};
use crate::units::{Blocks, Micros, Tokens};

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
    /// The time they were expected to take before they ran; zero where nothing was known.
    pub expected: Micros,
    /// The band of k iterations, fixed before they ran.
    pub band: Band,
    /// Most blocks in use at once.
    pub peak: Blocks,
    /// What it computed.
    pub work: Work,
}

/// What a batch computed, summed over its iterations: enough to say what a cost model makes of it, and to fit one again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Iterations with prefill in them. Of rows that ended in the batch nobody says when they began to decode: where no
    /// other row was prefilled, it is one.
    pub fills: u32,
    /// Tokens prefilled.
    pub prefill: Tokens,
    /// Pairs of a prefilled token and one it attends.
    pub pairs: u64,
    /// Decode steps of all rows.
    pub decoded: u64,
    /// Tokens that these saw.
    pub context: Tokens,
    /// Tokens of the longest row at the start.
    pub longest: Tokens,
}

impl Work {
    /// Of rows that `entered` with so many tokens, by the worker's report.
    pub(crate) fn of(mut entered: Vec<(RowKey, Tokens)>, report: &SliceReport) -> Self {
        entered.sort_unstable_by_key(|(key, _)| *key);
        let mut work = Self::default();
        for row in &report.rows {
            let Ok(at) = entered.binary_search_by_key(&row.key, |(key, _)| *key) else { continue };
            let (from, computed, emitted) = (entered[at].1, row.computed.0, row.emitted.0);
            work.longest = work.longest.max(from);
            // a row that only decodes computes a token for each it draws; the last chunk of a prefill draws one too
            let fills = computed != emitted;
            let prefill = if fills { computed.saturating_add(1).saturating_sub(emitted.max(1)) } else { 0 };
            let steps = emitted.saturating_sub(u64::from(fills));
            let first = from.0.saturating_add(u64::from(fills));
            work.decoded = work.decoded.saturating_add(steps);
            let seen = steps.saturating_mul(first).saturating_add(triangle(steps.saturating_sub(1)));
            work.context += Tokens(seen);
            if fills {
                let before = from.0.saturating_sub(prefill.saturating_add(row.prefill_left.0));
                let pairs = prefill.saturating_mul(before).saturating_add(triangle(prefill));
                work.prefill += Tokens(prefill);
                work.pairs = work.pairs.saturating_add(pairs);
                let steps = u64::from(report.steps);
                let until = if row.finish.is_some() { 1 } else { steps.saturating_sub(emitted) + 1 };
                work.fills = work.fills.max(until.min(steps) as u32);
            }
        }
        work
    }

    /// Seconds of a batch of `rows` rows and `steps` iterations with this work in them.
    pub fn seconds(&self, model: &CostModel, rows: u64, steps: u32) -> f64 {
        match model {
            CostModel::Padded { .. } => {
                model.slice(&BatchLoad { rows, longest: self.longest, ..BatchLoad::default() }, steps.into())
            }
            CostModel::Paged { prefill, step } => {
                step.constant * f64::from(steps)
                    + step.per_row * self.decoded as f64
                    + step.per_context * self.context.0 as f64
                    + prefill.constant * f64::from(self.fills)
                    + prefill.per_token * self.prefill.0 as f64
                    + prefill.per_pair * self.pairs as f64
            }
        }
    }
}

impl BatchOutcome {
    /// The time fell into the band.
    pub fn covered(&self) -> bool {
        self.band.contains(self.time)
    }
}

/// The sum of 1 to `n`.
fn triangle(n: u64) -> u64 {
    n.saturating_mul(n.saturating_add(1)) / 2
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::RowReport;
    use crate::ids::{RequestId, RowId};

    fn key(request: u64) -> RowKey {
        RowKey { row: RowId { request: RequestId(request), choice: 0 }, attempt: 0 }
    }

    /// Tokens at the start; computed, drawn and still uncomputed at the end of a batch of 4 iterations.
    fn work(rows: &[(u64, u64, u64, u64)]) -> Work {
        // in another order than they are reported
        let entered: Vec<_> = (0..).zip(rows).map(|(at, row)| (key(at), Tokens(row.0))).collect();
        let reported = |(at, &(_, computed, emitted, left))| RowReport {
            key: key(at),
            computed: Tokens(computed),
            cached: Tokens::ZERO,
            emitted: Tokens(emitted),
            finish: None,
            held: true,
            prefill_left: Tokens(left),
        };
        let report = SliceReport {
            batch: PlanNo(1),
            end: BatchEnd::Steps,
            steps: 4,
            prefill: Micros::ZERO,
            decode: Micros::ZERO,
            idle: Micros::ZERO,
            peak: Blocks(1),
            pad: Tokens::ZERO,
            invalid: Tokens::ZERO,
            rows: (0..).zip(rows).map(reported).collect(),
            next: None,
        };
        Work::of(entered, &report)
    }

    #[test]
    fn what_a_batch_computed_is_counted_token_by_token() {
        // decodes four: sees 10, 11, 12, 13
        let decodes = work(&[(10, 4, 4, 0)]);
        let expected = Work { decoded: 4, context: Tokens(46), longest: Tokens(10), ..Work::default() };
        assert_eq!(decodes, expected);
        // 20 of 30 tokens uncached, computed in two iterations, the last of which draws; then sees 31, 32
        let fills = work(&[(30, 22, 3, 0)]);
        let pairs = (11..=30).sum();
        let expected =
            Work { fills: 2, prefill: Tokens(20), pairs, decoded: 2, context: Tokens(63), longest: Tokens(30) };
        assert_eq!(fills, expected);
        // the first 40 of 100, of which 10 were cached: they see 11 to 50
        let begins = work(&[(100, 40, 0, 50)]);
        let expected =
            Work { fills: 4, prefill: Tokens(40), pairs: (11..=50).sum(), longest: Tokens(100), ..Work::default() };
        assert_eq!(begins, expected);
        let all = work(&[(10, 4, 4, 0), (30, 22, 3, 0), (100, 40, 0, 50)]);
        assert_eq!((all.fills, all.prefill, all.decoded, all.context), (4, Tokens(60), 6, Tokens(109)));
        assert_eq!(all.pairs, pairs + begins.pairs);
        // what makes no sense is no panic
        work(&[(u64::MAX, u64::MAX, u64::MAX - 1, u64::MAX), (1, u64::MAX, 0, u64::MAX), (0, 0, u64::MAX, 0)]);
    }
}
