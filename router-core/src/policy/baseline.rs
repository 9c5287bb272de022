//! What the product is compared with.

use super::{Policy, PolicyName, View, from_turn};

/// Each in turn, whatever it holds and does.
pub struct RoundRobin;

/// Uniform, drawn from the seed and the turn.
pub struct Random {
    /// The same seed gives the same choices.
    pub seed: u64,
}

/// Fewest rows assigned and not finished.
pub struct LeastRequests;

impl Policy for RoundRobin {
    fn name(&self) -> PolicyName {
        PolicyName::RoundRobin
    }

    fn score(&self, view: View<'_>, at: usize) -> u128 {
        u128::from(from_turn(view, view.turn, at))
    }
}

impl Policy for Random {
    fn name(&self) -> PolicyName {
        PolicyName::Random
    }

    fn score(&self, view: View<'_>, at: usize) -> u128 {
        u128::from(from_turn(view, splitmix64(self.seed ^ splitmix64(view.turn)), at))
    }
}

impl Policy for LeastRequests {
    fn name(&self) -> PolicyName {
        PolicyName::LeastRequests
    }

    fn score(&self, view: View<'_>, at: usize) -> u128 {
        u128::from(view.candidates[at].batch_size)
    }
}

/// Steele et al., "Fast splittable pseudorandom number generators" (OOPSLA 2014).
fn splitmix64(seed: u64) -> u64 {
    let mut x = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}
