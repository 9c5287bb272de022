//! Preble's E2 (arXiv 2407.00023).

use std::collections::VecDeque;

use router_core::{Micros, micros};

use super::forecast::Forecast;
use super::{Rival, Sight, rank, slot, then};
use crate::device::Device;

/// How far back a worker's load is counted.
const WINDOW: Micros = Micros(180_000_000);

/// If a worker holds more of the prompt than is left, the longest match, of equals the least load ("exploit"). Else the least
/// `L + M + P` ("explore"): the load, the seconds to recompute what would be evicted (weighted with how often what it holds is hit),
/// and the seconds of the prompt's new tokens. The load is, as in WukLab/preble, the prefill seconds sent there in the last 3
/// minutes, and for each row that is there the mean output, so far, times the time of a token.
///
/// Simplified: the mean output is that of all requests and not of a node's, the hit rate is the worker's and not the evicted
/// node's, and neither rebalancing nor hot prefixes copied by prediction are done.
pub struct Preble {
    forecast: Forecast,
    workers: Vec<Recent>,
    /// Requests that ended, and the tokens of their answers.
    ended: (u64, u64),
}

/// Tokens of an answer before any has ended, as WukLab/preble has it.
const OUTPUT: f64 = 45.0;

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
        Self { forecast: Forecast::new(device), workers: Vec::new(), ended: (0, 0) }
    }

    /// Seconds that the rows of a worker will decode, one after another.
    fn decode(&self, sight: &Sight<'_>, at: usize) -> f64 {
        let (requests, tokens) = self.ended;
        let output = if requests > 0 { tokens as f64 / requests as f64 } else { OUTPUT };
        sight.batch(at) as f64 * output * self.forecast.tpot(&sight.engine(at), 0)
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
            let (sent, hits) = (recent.load(), recent.hit_share());
            let load = sent + self.decode(sight, at);
            if exploit {
                return then(u128::from(sight.fresh(at)), micros(load).0);
            }
            let engine = sight.engine(at);
            let free = engine.blocks.saturating_sub(engine.used + engine.cached);
            let need = sight.at(at).new_tokens.blocks(sight.size);
            let evicted = need.saturating_sub(free).0 * sight.size.get();
            let again = self.forecast.prefill(evicted, 0) * hits;
            rank(load + again + self.forecast.prefill(sight.fresh(at), sight.hit(at)))
        });
    }

    fn chosen(&mut self, sight: &Sight<'_>, at: usize) {
        let (hit, new) = (sight.hit(at), sight.fresh(at));
        let micros = micros(self.forecast.prefill(new, hit)).0;
        slot(&mut self.workers, sight.worker(at)).push(sight.now, Sent { micros, hit, new });
    }

    fn ended(&mut self, output: u32) {
        self.ended = (self.ended.0 + 1, self.ended.1 + u64::from(output));
    }
}
