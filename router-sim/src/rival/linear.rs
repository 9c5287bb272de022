//! The linear rule of arXiv 2603.15202, section 4: the weight between two indicators that the product does without.

use super::{Rival, Sight, rank};

/// Least `lam * (1 - hit share) + (1 - lam) * b / bmax`. The paper finds 0.7 best for chat and 0.55 for API calls.
pub struct Linear {
    pub(super) lam: f64,
}

impl Rival for Linear {
    fn name(&self) -> String {
        format!("linear@{}", self.lam)
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        let most = sight.most(|at| sight.batch(at)).max(1) as f64;
        sight.each(scores, |at| {
            rank(self.lam * (1.0 - sight.share(at)) + (1.0 - self.lam) * sight.batch(at) as f64 / most)
        });
    }
}
