//! The linear rule of a production scheduler, as arXiv 2603.15202's repository re-implements it.

use super::{Rival, Sight, rank};

/// Most `0.7 * hit share + 0.15 * (1 - b / bmax) + 0.15 * (1 - tokens / tokensmax)`.
///
/// The repository draws a worker with these as probabilities; here the largest wins, which the simulation study found better.
pub struct Bailian;

impl Rival for Bailian {
    fn name(&self) -> String {
        "bailian".to_owned()
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        let rows = sight.most(|at| sight.batch(at)).max(1) as f64;
        let tokens = sight.most(|at| sight.engine(at).tokens.0).max(1) as f64;
        sight.each(scores, |at| {
            let idle = 0.15 * (1.0 - sight.batch(at) as f64 / rows);
            let empty = 0.15 * (1.0 - sight.engine(at).tokens.0 as f64 / tokens);
            rank(-(0.7 * sight.share(at) + idle + empty))
        });
    }
}
