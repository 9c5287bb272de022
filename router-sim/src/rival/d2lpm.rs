//! Double deficit longest prefix match (arXiv 2501.14312): locality, bounded by fairness.

use hashbrown::HashMap;

use super::{Rival, Sight, slot};

/// The longest match among workers where this client's deficit is above zero; when it is at none, each gets a quantum of tokens. What is
/// chosen is charged its new tokens.
///
/// Simplified: a client is a workload class, as traces know no tenants. It is none of its conversations: a deficit bounds what a client
/// may put on one worker, and one conversation never reaches the bound. Outputs are not charged (nobody knows them at the decision). The other deficit, by which an engine orders its queue, is not modelled: engines are first come, first served; so DLPM, which
/// is that half alone, has nothing to route.
pub struct D2lpm {
    /// Tokens.
    quantum: f64,
    deficits: HashMap<u16, Vec<f64>>,
}

impl D2lpm {
    pub(super) fn new(quantum: f64) -> Self {
        Self { quantum, deficits: HashMap::new() }
    }
}

impl Rival for D2lpm {
    fn name(&self) -> String {
        format!("d2lpm@{}", self.quantum)
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        let deficits = self.deficits.entry(sight.class).or_default();
        let most = (0..sight.count()).map(|at| *slot(deficits, sight.worker(at))).fold(f64::NEG_INFINITY, f64::max);
        if most <= 0.0 {
            // as many quanta as bring the first of them above zero
            let quanta = (-most / self.quantum).floor() + 1.0;
            (0..sight.count()).for_each(|at| *slot(deficits, sight.worker(at)) += quanta * self.quantum);
        }
        sight.each(scores, |at| {
            let may = *slot(deficits, sight.worker(at)) > 0.0;
            if may { u128::from(sight.fresh(at)) << 64 | u128::from(sight.batch(at)) } else { u128::MAX }
        });
    }

    fn chosen(&mut self, sight: &Sight<'_>, at: usize) {
        let deficits = self.deficits.entry(sight.class).or_default();
        *slot(deficits, sight.worker(at)) -= sight.fresh(at) as f64;
    }
}
