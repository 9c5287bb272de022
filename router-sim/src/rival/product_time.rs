//! The core's product in seconds, for engines whose times the router does not know.

use router_core::{Candidate, Micros, PolicyName, View, micros};

use super::forecast::Forecast;
use super::{Rival, Sight};
use crate::device::Device;

/// Iterations that a row is taken to decode beside the new one: a slice in the middle of those that the core measures.
const STEPS: f64 = 64.0;

/// `(seconds of Q + u and of a slice of decoding) * (b + 1)`: the core's own score, its times from the device's law.
pub struct ProductTime(Forecast);

impl ProductTime {
    pub(super) fn new(device: &Device) -> Self {
        Self(Forecast::new(device))
    }
}

impl Rival for ProductTime {
    fn name(&self) -> String {
        PolicyName::ProductTime.to_string()
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        let policy = PolicyName::ProductTime.policy(0);
        let joined = |at: usize| -> Micros {
            let decode = STEPS * self.0.tpot(&sight.engine(at), sight.seen.tokens.0);
            micros(self.0.prefill_ttft(sight, at) + decode)
        };
        let timed: Vec<Candidate> =
            (0..sight.count()).map(|at| Candidate { joined: joined(at), ..*sight.at(at) }).collect();
        let view = View { candidates: &timed, ..sight.seen.view() };
        sight.each(scores, |at| policy.score(view, at));
    }
}
