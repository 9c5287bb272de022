//! `PolyServe` (arXiv 2507.17769): load in a gradient, so that a fleet can shrink.

use super::forecast::Forecast;
use super::{Rival, Sight, rank};
use crate::device::Device;
use crate::random::Random;

/// Objectives: seconds to the first token and between tokens. `PolyServe` reads them from each request; a trace has none.
const TTFT: f64 = 5.0;
const TPOT: f64 = 0.05;

/// Of the workers where the request would meet both objectives, the one with the largest time per token: the fullest that still can.
/// If there is none, any.
///
/// Left out: its tiers of objectives, and the scaling that the gradient is for.
pub struct Polyserve {
    forecast: Forecast,
    random: Random,
}

impl Polyserve {
    pub(super) fn new(device: &Device, seed: u64) -> Self {
        Self { forecast: Forecast::new(device), random: Random::new(seed) }
    }
}

impl Rival for Polyserve {
    fn name(&self) -> String {
        "polyserve".to_owned()
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        let drawn = self.random.below(sight.count() as u64) as usize;
        let tpot = |at: usize| self.forecast.tpot(&sight.engine(at), sight.seen.tokens.0);
        sight.each(scores, |at| match tpot(at) {
            tpot if tpot <= TPOT && self.forecast.ttft(sight, at) <= TTFT => rank(-tpot),
            // after all that can
            _ => rank(if at == drawn { 1.0 } else { 2.0 }),
        });
    }
}
