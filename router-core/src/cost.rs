//! What work costs on a worker, as far as first slices need it: two measured rates. They order placements (longest
//! first) and break ties; the fitted cost model with its bands takes their place.

use crate::event::SliceReport;
use crate::units::{Micros, Tokens};

/// Nanoseconds a token, smoothed over the worker's reports.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rates {
    prefill: u64,
    decode: u64,
}

impl Default for Rates {
    /// Before the first report: the order of a small model on a CPU. Only ratios between workers matter.
    fn default() -> Self {
        Self { prefill: 100_000, decode: 1_000_000 }
    }
}

impl Rates {
    /// Time of one row's slice: its prefill and its share of the steps.
    pub(crate) fn work(self, new: Tokens, steps: Tokens) -> Micros {
        let nanos = self.prefill.saturating_mul(new.0).saturating_add(self.decode.saturating_mul(steps.0));
        Micros(nanos / 1000)
    }

    pub(crate) fn observe(&mut self, report: &SliceReport) {
        let computed: Tokens = report.rows.iter().map(|row| row.computed).sum();
        let emitted: Tokens = report.rows.iter().map(|row| row.emitted).sum();
        let smooth = |old: u64, time: Micros, tokens: u64| match tokens {
            0 => old,
            _ => (old.saturating_mul(7).saturating_add(time.0.saturating_mul(1000) / tokens)) / 8,
        };
        if report.decode > Micros::ZERO {
            self.decode = smooth(self.decode, report.decode, emitted.0);
        }
        if report.prefill > Micros::ZERO {
            self.prefill = smooth(self.prefill, report.prefill, computed.saturating_sub(emitted).0);
        }
    }
}
