//! llm-d's weighted scorers (llm-d/llm-d-inference-scheduler, kubernetes-sigs/gateway-api-inference-extension).

use super::{Rival, Sight, rank};

/// Most `3 * prefix + 2 * queue`: the share of the prompt that it holds, and how short its queue is between the shortest (1) and the
/// longest (0). The weights are the scheduler's defaults.
pub struct LlmD;

impl Rival for LlmD {
    fn name(&self) -> String {
        "llm_d".to_owned()
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        let waiting = |at: usize| sight.engine(at).waiting;
        let (most, least) = (sight.most(waiting), sight.least(waiting));
        sight.each(scores, |at| {
            let queue = if most > least { (most - waiting(at)) as f64 / (most - least) as f64 } else { 1.0 };
            rank(-(3.0 * sight.share(at) + 2.0 * queue))
        });
    }
}

/// The variant that arXiv 2603.15202's repository compares with: most `10 * hit + load`, the hit between the shortest (0) and the
/// longest (1), and the load `0.5` where nothing waits, else `0.5 * (1 - min(waiting, 128) / 128)`.
pub struct LlmD10;

impl Rival for LlmD10 {
    fn name(&self) -> String {
        "llm_d_10_1".to_owned()
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        let (most, least) = (sight.most(|at| sight.hit(at)), sight.least(|at| sight.hit(at)));
        sight.each(scores, |at| {
            let hit = if most > least { (sight.hit(at) - least) as f64 / (most - least) as f64 } else { 0.0 };
            let load = 0.5 * (1.0 - sight.engine(at).waiting.min(128) as f64 / 128.0);
            rank(-(10.0 * hit + load))
        });
    }
}
