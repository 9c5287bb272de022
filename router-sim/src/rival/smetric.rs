//! `SMetric` (arXiv 2607.08565): balance first turns, keep later ones.

use super::forecast::Forecast;
use super::{Rival, Sight, rank};
use crate::device::Device;

/// How many times its objective a later turn may wait for its prefix.
const SLACK: f64 = 2.0;

/// A first turn goes by `(Q + u) * (b + 1)`. A later one goes to the longest hit, unless its time to first token there passes the slack
/// times the objective; then to the least loaded.
///
/// Simplified: a trace has no objectives, so a turn's is what its whole prompt takes on an idle worker. Its source says nothing of
/// requests without a session. They are first turns here, which serves it better than to guess: `smetric_held` is the guess,
/// that a request of which some worker holds more than half is a later turn.
pub struct Smetric {
    forecast: Forecast,
    guesses: bool,
}

impl Smetric {
    pub(super) fn new(device: &Device) -> Self {
        Self { forecast: Forecast::new(device), guesses: false }
    }

    /// What has no session is a later turn where more than half of it is held.
    pub(super) fn guessing(device: &Device) -> Self {
        Self { guesses: true, ..Self::new(device) }
    }
}

impl Rival for Smetric {
    fn name(&self) -> String {
        if self.guesses { "smetric_held" } else { "smetric" }.to_owned()
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        let later = match sight.session {
            Some(_) => sight.turn > 0,
            None => self.guesses && (0..sight.count()).any(|at| sight.hit(at) > sight.fresh(at)),
        };
        if !later {
            let prefill = |at: usize| u128::from(sight.queued(at)) + u128::from(sight.fresh(at));
            return sight.each(scores, |at| prefill(at) * (u128::from(sight.batch(at)) + 1));
        }
        let least = sight.least(|at| sight.fresh(at));
        let bound = SLACK * self.forecast.prefill(sight.seen.tokens.0, 0);
        let ttft: Vec<f64> = (0..sight.count()).map(|at| self.forecast.ttft(sight, at)).collect();
        let keeps = |at: usize| sight.fresh(at) == least && ttft[at] <= bound;
        let kept = (0..sight.count()).any(keeps);
        sight.each(scores, |at| match kept {
            true if keeps(at) => rank(ttft[at]),
            true => u128::MAX,
            false => sight.batch(at).into(),
        });
    }
}
