//! NVIDIA Dynamo's KV router (ai-dynamo/dynamo, `lib/kv-router`), in three of its forms.
//!
//! Simplified: blocks that rows share are counted for each of them, and there are no host or disk tiers.

use super::{Rival, Sight, rank, then};
use crate::random::Random;

/// Blocks of all its rows with this one.
fn decode_blocks(sight: &Sight<'_>, at: usize) -> f64 {
    (sight.engine(at).tokens.0 + sight.seen.tokens.0) as f64 / sight.size.get() as f64
}

/// Least `w * (Q + u) / B + decode blocks`. The default weight is 1 (`--kv-overlap-score-weight`).
pub struct Dynamo {
    pub(super) weight: f64,
}

fn cost(sight: &Sight<'_>, at: usize, weight: f64) -> f64 {
    weight * (sight.queued(at) + sight.fresh(at)) as f64 / sight.size.get() as f64 + decode_blocks(sight, at)
}

impl Rival for Dynamo {
    fn name(&self) -> String {
        format!("dynamo@{}", self.weight)
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        sight.each(scores, |at| rank(cost(sight, at, self.weight)));
    }
}

/// The same cost with `--router-temperature` T above 0: drawn with weights `exp(-cost / ((max - min) * T))`.
pub struct DynamoSoftmax {
    temperature: f64,
    random: Random,
}

impl DynamoSoftmax {
    pub(super) fn new(temperature: f64, seed: u64) -> Self {
        Self { temperature, random: Random::new(seed) }
    }
}

impl Rival for DynamoSoftmax {
    fn name(&self) -> String {
        format!("dynamo_softmax@{}", self.temperature)
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        let costs: Vec<f64> = (0..sight.count()).map(|at| cost(sight, at, 1.0)).collect();
        let least = costs.iter().copied().fold(f64::INFINITY, f64::min);
        let spread = costs.iter().copied().fold(least, f64::max) - least;
        let weight = |cost: f64| if spread > 0.0 { (-(cost - least) / (spread * self.temperature)).exp() } else { 1.0 };
        let total: f64 = costs.iter().map(|&cost| weight(cost)).sum();
        let mut left = self.random.unit() * total;
        // rounding may leave a little over: then the last
        let drawn = costs.iter().position(|&cost| {
            left -= weight(cost);
            left < 0.0
        });
        let drawn = drawn.unwrap_or(sight.count().saturating_sub(1));
        sight.each(scores, |at| u128::from(at != drawn));
    }
}

/// The form of 2026: least `max(raw - overlap / (1 + decay * backlog), 0) + decode blocks`, where raw is `(Q + len) / B`,
/// and the backlog is the Q above the least one over the prompt's length. With the default decay of 0 it orders as [`Dynamo`]
/// with weight 1. Its other weights are at their defaults: scale 1, credit 1, nothing for active requests.
pub struct Dynamo2026 {
    pub(super) decay: f64,
}

impl Rival for Dynamo2026 {
    fn name(&self) -> String {
        format!("dynamo_2026@{}", self.decay)
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        let (size, length) = (sight.size.get() as f64, sight.seen.tokens.0.max(1) as f64);
        let floor = sight.least(|at| sight.queued(at));
        sight.each(scores, |at| {
            let raw = (sight.queued(at) as f64 + length) / size;
            let backlog = (sight.queued(at) - floor) as f64 / length;
            let credit = sight.hit(at) as f64 / size / (1.0 + self.decay * backlog);
            rank((raw - credit).max(0.0) + decode_blocks(sight, at))
        });
    }
}

/// The first form, of its documentation in 2025: most `2 * overlap share - KV usage - waiting / most waiting`.
pub struct DynamoFirst;

impl Rival for DynamoFirst {
    fn name(&self) -> String {
        "dynamo_first".to_owned()
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        let most = sight.most(|at| sight.engine(at).waiting).max(1) as f64;
        sight.each(scores, |at| {
            let engine = sight.engine(at);
            let usage = engine.used.0 as f64 / engine.blocks.0.max(1) as f64;
            // of equals the fewest rows
            then(rank(usage + engine.waiting as f64 / most - 2.0 * sight.share(at)), sight.batch(at))
        });
    }
}
