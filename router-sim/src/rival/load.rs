//! Balancing that does not know prefixes.

use super::{Rival, Sight};
use crate::random::Random;

/// The lower b of two workers drawn at random (Mitzenmacher, "The power of two choices", 1996).
pub struct PowerOfTwo {
    random: Random,
}

impl PowerOfTwo {
    pub(super) fn new(seed: u64) -> Self {
        Self { random: Random::new(seed) }
    }
}

impl Rival for PowerOfTwo {
    fn name(&self) -> String {
        "power_of_two".to_owned()
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        let n = sight.count() as u64;
        let one = self.random.below(n);
        // another one, where there is one
        let other = if n > 1 { (one + 1 + self.random.below(n - 1)) % n } else { one };
        let drawn = [one as usize, other as usize];
        sight.each(scores, |at| if drawn.contains(&at) { sight.batch(at).into() } else { u128::MAX });
    }
}

/// Join the shortest queue as vLLM's data-parallel load balancer does: `4 * waiting + running`. The weight is vLLM's.
pub struct Jsq;

impl Rival for Jsq {
    fn name(&self) -> String {
        "jsq".to_owned()
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        sight.each(scores, |at| {
            let engine = sight.engine(at);
            4 * u128::from(engine.waiting) + u128::from(engine.running)
        });
    }
}

/// Least `Q + u`: the tokens to prefill before its first one comes (a baseline of arXiv 2603.15202's repository). Knows prefixes by u alone.
pub struct LeastWaitToken;

impl Rival for LeastWaitToken {
    fn name(&self) -> String {
        "least_wait_token".to_owned()
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        sight.each(scores, |at| u128::from(sight.queued(at)) + u128::from(sight.fresh(at)));
    }
}

/// Least `Q` and tokens of all rows (a baseline of the same repository).
pub struct LeastTokenLoad;

impl Rival for LeastTokenLoad {
    fn name(&self) -> String {
        "least_token_load".to_owned()
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        sight.each(scores, |at| u128::from(sight.queued(at)) + u128::from(sight.engine(at).tokens.0));
    }
}
