//! `AIBrix`' prefix-cache routing (vllm-project/aibrix, `pkg/plugins/gateway/algorithms`).

use super::{Rival, Sight};

/// Requests between the most and the least loaded from which they may be out of balance.
const GAP: u64 = 8;

/// Among workers that hold some of the prompt: the highest match, of equals the lower b, whose b is at most the mean and one standard
/// deviation. If there is none, the least b. Where loads are out of balance (`max > 2 * (mean + 1)` and 8 apart), only the workers with
/// the least b are asked.
///
/// Simplified: b is the router's count of running requests; `AIBrix` also reads engines' metrics.
pub struct Aibrix;

impl Rival for Aibrix {
    fn name(&self) -> String {
        "aibrix".to_owned()
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        let n = sight.count().max(1) as f64;
        let (most, least) = (sight.most(|at| sight.batch(at)), sight.least(|at| sight.batch(at)));
        let mean = (0..sight.count()).map(|at| sight.batch(at) as f64).sum::<f64>() / n;
        let variance = (0..sight.count()).map(|at| (sight.batch(at) as f64 - mean).powi(2)).sum::<f64>() / n;
        let uneven = most as f64 > 2.0 * (mean + 1.0) && most - least >= GAP;
        let fits = |at: usize| {
            let asked = !uneven || sight.batch(at) == least;
            asked && sight.hit(at) > 0 && sight.batch(at) as f64 <= mean + variance.sqrt()
        };
        let matched = (0..sight.count()).any(fits);
        sight.each(scores, |at| match matched {
            true if fits(at) => u128::from(sight.fresh(at)) << 64 | u128::from(sight.batch(at)),
            true => u128::MAX,
            false => sight.batch(at).into(),
        });
    }
}
