//! `DualMap` (arXiv 2602.06502): two places for a prefix.

use hashbrown::HashMap;
use router_core::BlockHash;

use super::forecast::Forecast;
use super::{Rival, Sight, rank};
use crate::device::Device;
use crate::random::mix;

/// The objective: seconds to the first token, of the size that the paper's evaluation uses.
const TTFT: f64 = 5.0;

/// A prompt's prefix is hashed to two workers. It goes to the one that holds more of it, as long as its time to first token there is
/// within the objective; else to the one where that comes sooner.
///
/// The prefix is as long as needed: one block more as long as more than one request in n has begun with it, so that a prefix that all share
/// does not decide alone. Left out: moving requests that wait, and the ring (workers are ranked by hash).
pub struct DualMap {
    forecast: Forecast,
    workers: u64,
    seen: HashMap<BlockHash, u64>,
    decisions: u64,
}

impl DualMap {
    pub(super) fn new(device: &Device, workers: u32) -> Self {
        Self { forecast: Forecast::new(device), workers: workers.into(), seen: HashMap::new(), decisions: 0 }
    }

    /// The name that is hashed.
    fn key(&self, sight: &Sight<'_>) -> u64 {
        let popular = |block: &&BlockHash| {
            let seen = self.seen.get(*block).copied().unwrap_or(0);
            seen > 1 && seen * self.workers > self.decisions
        };
        let depth = sight.chain.iter().take_while(popular).count();
        // a prompt shorter than a block has no name: its turn spreads it
        sight.chain.get(depth).or(sight.chain.last()).map_or(sight.seen.turn, |block| block.0)
    }
}

impl Rival for DualMap {
    fn name(&self) -> String {
        "dual_map".to_owned()
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        let key = self.key(sight);
        let place =
            |salt: u64| (0..sight.count()).min_by_key(|&at| mix(mix(key ^ salt) ^ (sight.worker(at) as u64 + 1)));
        let first = place(1);
        // another one, where there is one
        let second = (0..sight.count())
            .filter(|&at| Some(at) != first)
            .min_by_key(|&at| mix(mix(key ^ 2) ^ (sight.worker(at) as u64 + 1)))
            .or(first);
        let (Some(first), Some(second)) = (first, second) else { return };
        let [one, two] = [first, second].map(|at| self.forecast.ttft(sight, at));
        let near = if sight.fresh(second) < sight.fresh(first) { (second, two) } else { (first, one) };
        let quick = if two < one { second } else { first };
        let chosen = if near.1 <= TTFT { near.0 } else { quick };
        sight.each(scores, |at| rank(f64::from(u8::from(at != chosen))));
    }

    fn chosen(&mut self, sight: &Sight<'_>, _at: usize) {
        self.decisions += 1;
        for &block in sight.chain {
            let seen = self.seen.entry(block).or_default();
            *seen += 1;
            // what nobody shares yet ends the walk: its followers are counted once it is met again
            if *seen == 1 {
                break;
            }
        }
    }
}
