//! The cache-aware policy of `SGLang`'s router (sgl-project/sglang, `sgl-router`).

use super::{Rival, Sight, rank, slot, then};

/// If loads are far apart (`max - min > abs` and `max > rel * min`), the least b; else, if some worker holds more than `threshold` of
/// the prompt, the longest match; else the worker with the smallest tree.
///
/// Simplified: the match is asked of the router's index (`SGLang` keeps trees of the text it sent where; with prefixes committed at the
/// decision that is nearly the same), and a tree's size is the new tokens sent there so far: it is never trimmed.
pub struct Sglang {
    name: &'static str,
    threshold: f64,
    abs: u64,
    rel: f64,
    trees: Vec<u64>,
}

impl Sglang {
    /// As the router's struct has it: .5, 32, 1.1.
    pub(super) fn standard() -> Self {
        Self { name: "sglang", threshold: 0.5, abs: 32, rel: 1.1, trees: Vec::new() }
    }

    /// As its command line has it: .3, 64, 1.5.
    pub(super) fn cli() -> Self {
        Self { name: "sglang_cli", threshold: 0.3, abs: 64, rel: 1.5, trees: Vec::new() }
    }
}

impl Rival for Sglang {
    fn name(&self) -> String {
        self.name.to_owned()
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        let (most, least) = (sight.most(|at| sight.batch(at)), sight.least(|at| sight.batch(at)));
        if most - least > self.abs && most as f64 > self.rel * least as f64 {
            return sight.each(scores, |at| sight.batch(at).into());
        }
        if (0..sight.count()).any(|at| sight.share(at) > self.threshold) {
            return sight.each(scores, |at| sight.fresh(at).into());
        }
        // of trees of a size the fewest rows
        sight.each(scores, |at| then(rank(*slot(&mut self.trees, sight.worker(at)) as f64), sight.batch(at)));
    }

    fn chosen(&mut self, sight: &Sight<'_>, at: usize) {
        *slot(&mut self.trees, sight.worker(at)) += sight.fresh(at);
    }
}
