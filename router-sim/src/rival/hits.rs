//! Prefixes above all (baselines of arXiv 2603.15202's repository).

use super::{Rival, Sight};

/// The longest hit.
pub struct MostHit;

impl Rival for MostHit {
    fn name(&self) -> String {
        "most_hit".to_owned()
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        // the longest hit is the fewest new tokens
        sight.each(scores, |at| sight.fresh(at).into());
    }
}

/// Queued tokens from which a worker is out of bounds.
const BOUND: u64 = 2048;

/// The longest hit of those whose Q is below 2,048 tokens; if there are none, the least `Q + u`.
pub struct BoundedMostHit;

impl Rival for BoundedMostHit {
    fn name(&self) -> String {
        "bounded_most_hit".to_owned()
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        let bounded = sight.least(|at| sight.queued(at)) < BOUND;
        sight.each(scores, |at| match sight.queued(at) {
            queued if !bounded => u128::from(queued) + u128::from(sight.fresh(at)),
            queued if queued < BOUND => sight.fresh(at).into(),
            _ => u128::MAX,
        });
    }
}
