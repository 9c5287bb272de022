//! Random names and seeds.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;

/// 128 bits that nobody guesses or meets again.
pub fn random_id() -> String {
    format!("{:016x}{:016x}", random(), random())
}

/// The standard library seeds its hash maps from the system; that is all the randomness that is needed here.
pub fn random() -> u64 {
    RandomState::new().hash_one(0)
}
