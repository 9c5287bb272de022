//! The core's policies, through the same door.

use router_core::Policy;

use super::{Rival, Sight};

/// A policy of the core.
pub struct Core(pub Box<dyn Policy>);

impl Rival for Core {
    fn name(&self) -> String {
        self.0.name().to_string()
    }

    fn asks_engines(&self) -> bool {
        false
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        sight.each(scores, |at| self.0.score(sight.seen.view(), at));
    }
}
