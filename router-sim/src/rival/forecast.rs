//! What an engine would take, from the law of its device: the simulator that some policies carry with them.
//!
//! It is told the law exactly, which is kind to them: real ones are off by 20 % for one request in ten (arXiv 2603.15202).
//! It does not know the queue row by row: queued tokens are taken to attend as many tokens as the mean row has.

use router_core::Iteration;

use super::{Engine, Sight};
use crate::device::Device;
use crate::timing::Law;

/// Knows a device's law.
#[derive(Clone, Debug)]
pub(super) struct Forecast {
    law: Law,
    host: f64,
    chunk: u64,
}

impl Forecast {
    pub(super) fn new(device: &Device) -> Self {
        Self { law: device.law, host: device.host.0 as f64 * 1e-6, chunk: u64::from(device.chunk.max(1)) }
    }

    /// Seconds from the decision to the first token there: the queue and the prompt, in chunks, beside the rows that decode.
    pub(super) fn ttft(&self, sight: &Sight<'_>, at: usize) -> f64 {
        let engine = sight.engine(at);
        self.work(
            sight.queued(at),
            &engine,
            pairs(sight.fresh(at), sight.hit(at)),
            sight.fresh(at),
            Decoding::of(&engine),
        )
    }

    /// The same on a worker that only prefills.
    pub(super) fn prefill_ttft(&self, sight: &Sight<'_>, at: usize) -> f64 {
        let engine = sight.engine(at);
        self.work(
            sight.queued(at),
            &engine,
            pairs(sight.fresh(at), sight.hit(at)),
            sight.fresh(at),
            Decoding::default(),
        )
    }

    /// Seconds to prefill so many tokens after so many cached ones on an idle worker.
    pub(super) fn prefill(&self, new: u64, before: u64) -> f64 {
        self.work(0, &Engine::default(), pairs(new, before), new, Decoding::default())
    }

    /// Seconds of what it has queued.
    pub(super) fn queue(&self, sight: &Sight<'_>, at: usize) -> f64 {
        self.work(sight.queued(at), &sight.engine(at), 0.0, 0, Decoding::default())
    }

    /// Seconds of an iteration in which all its rows and one more of so many tokens decode.
    pub(super) fn tpot(&self, engine: &Engine, more: u64) -> f64 {
        let rows = engine.running + engine.waiting + 1;
        self.iteration(&Iteration { rows, context: engine.tokens.0 + more, ..Iteration::default() })
    }

    fn work(&self, queued: u64, engine: &Engine, own: f64, new: u64, beside: Decoding) -> f64 {
        let total = queued + new;
        if total == 0 {
            return 0.0;
        }
        let mean = engine.tokens.0 as f64 / (engine.running + engine.waiting).max(1) as f64;
        let pairs = queued as f64 * mean + own;
        let budget = self.chunk.saturating_sub(beside.rows).max(1);
        let part = |tokens: u64| {
            let pairs = (pairs * tokens as f64 / total as f64) as u64;
            let it = Iteration {
                rows: beside.rows,
                context: beside.context,
                prefill: tokens,
                pairs,
                ..Iteration::default()
            };
            if tokens > 0 { self.iteration(&it) } else { 0.0 }
        };
        (total / budget) as f64 * part(budget.min(total)) + part(total % budget)
    }

    fn iteration(&self, it: &Iteration) -> f64 {
        self.host
            + match &self.law {
                Law::Linear(model) => model.iteration(it),
                Law::Norm(norm) => norm.seconds(it),
            }
    }
}

/// Rows that decode beside a prefill.
#[derive(Clone, Copy, Default)]
struct Decoding {
    rows: u64,
    context: u64,
}

impl Decoding {
    fn of(engine: &Engine) -> Self {
        let all = (engine.running + engine.waiting).max(1);
        let context = engine.tokens.0 as f64 * engine.running as f64 / all as f64;
        Self { rows: engine.running, context: context as u64 }
    }
}

/// Pairs of a prompt's new tokens and those they attend.
fn pairs(new: u64, before: u64) -> f64 {
    new as f64 * (before as f64 + f64::midpoint(new as f64, 1.0))
}
