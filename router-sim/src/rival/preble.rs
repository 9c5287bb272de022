//! Preble's E2 (arXiv 2407.00023).

use std::collections::VecDeque;

use router_core::Micros;

use super::forecast::Forecast;
use super::{Rival, Sight, rank, slot, then};
use crate::device::Device;

/// How far back a worker's load is counted.
const WINDOW: Micros = Micros(180_000_000);

/// If a worker holds more of the prompt than is left, the longest match, of equals the least load ("exploit"). Else the least
/// `L + M + P` ("explore"): the prefill seconds sent there in the last 3 minutes, the seconds to recompute what would be
/// evicted (weighted with how often what it holds is hit), and the seconds of the prompt's new tokens.
///
/// Simplified: L has no decode time (Preble profiles output lengths, which nobody knows here), the hit rate is the worker's and not
/// the evicted node's, and neither rebalancing nor hot prefixes copied by prediction are done.
pub struct Preble {
    forecast: Forecast,
    workers: Vec<Recent>,
}

#[derive(Default)]
struct Recent {
    sent: VecDeque<(Micros, Sent)>,
    sum: Sent,
}

#[derive(Clone, Copy, Default)]
struct Sent {
    micros: u64,
    hit: u64,
    new: u64,
}

impl Recent {
    fn trim(&mut self, now: Micros) {
        while let Some(&(_, old)) = self.sent.front().filter(|(at, _)| *at + WINDOW < now) {
            self.sent.pop_front();
            self.sum.micros -= old.micros;
            self.sum.hit -= old.hit;
            self.sum.new -= old.new;
        }
    }

    fn push(&mut self, now: Micros, sent: Sent) {
        self.sent.push_back((now, sent));
        self.sum.micros += sent.micros;
        self.sum.hit += sent.hit;
        self.sum.new += sent.new;
    }

    fn load(&self) -> f64 {
        self.sum.micros as f64 * 1e-6
    }

    fn hit_share(&self) -> f64 {
        self.sum.hit as f64 / (self.sum.hit + self.sum.new).max(1) as f64
    }
}

impl Preble {
    pub(super) fn new(device: &Device) -> Self {
        Self { forecast: Forecast::new(device), workers: Vec::new() }
    }
}

impl Rival for Preble {
    fn name(&self) -> String {
        "preble".to_owned()
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        let exploit = (0..sight.count()).any(|at| sight.hit(at) > sight.fresh(at));
        sight.each(scores, |at| {
            let recent = slot(&mut self.workers, sight.worker(at));
            recent.trim(sight.now);
            if exploit {
                return then(u128::from(sight.fresh(at)), recent.sum.micros);
            }
            let engine = sight.engine(at);
            let free = engine.blocks.saturating_sub(engine.used + engine.cached);
            let need = sight.at(at).new_tokens.blocks(sight.size);
            let evicted = need.saturating_sub(free).0 * sight.size.get();
            let again = self.forecast.prefill(evicted, 0) * recent.hit_share();
            rank(recent.load() + again + self.forecast.prefill(sight.fresh(at), sight.hit(at)))
        });
    }

    fn chosen(&mut self, sight: &Sight<'_>, at: usize) {
        let (hit, new) = (sight.hit(at), sight.fresh(at));
        let micros = router_core::micros(self.forecast.prefill(new, hit)).0;
        slot(&mut self.workers, sight.worker(at)).push(sight.now, Sent { micros, hit, new });
    }
}
