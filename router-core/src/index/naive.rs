//! The index as one would explain it: for each worker, its blocks. Oracle of the tests, never used to serve.

use std::collections::BTreeMap;

use hashbrown::HashMap;

use super::PrefixIndex;
use crate::block::BlockHash;
use crate::ids::WorkerId;
use crate::units::{Blocks, Bytes};

#[derive(Clone, Copy, Default)]
struct Held {
    stored: bool,
    commits: u32,
}

/// A map of maps.
#[derive(Default)]
pub struct NaiveIndex {
    workers: BTreeMap<WorkerId, HashMap<BlockHash, Held>>,
}

impl NaiveIndex {
    fn change(&mut self, worker: WorkerId, block: BlockHash, change: impl FnOnce(&mut Held)) {
        let blocks = self.workers.entry(worker).or_default();
        let held = blocks.entry(block).or_default();
        change(held);
        if !held.stored && held.commits == 0 {
            blocks.remove(&block);
        }
    }
}

impl PrefixIndex for NaiveIndex {
    fn store(&mut self, worker: WorkerId, block: BlockHash) {
        self.change(worker, block, |held| held.stored = true);
    }

    fn evict(&mut self, worker: WorkerId, block: BlockHash) {
        self.change(worker, block, |held| held.stored = false);
    }

    fn clear_stored(&mut self, worker: WorkerId) {
        if let Some(blocks) = self.workers.get_mut(&worker) {
            blocks.values_mut().for_each(|held| held.stored = false);
            blocks.retain(|_, held| held.commits > 0);
        }
    }

    fn commit(&mut self, worker: WorkerId, blocks: &[BlockHash]) {
        for &block in blocks {
            self.change(worker, block, |held| held.commits += 1);
        }
    }

    fn take_back(&mut self, worker: WorkerId, blocks: &[BlockHash]) {
        for &block in blocks {
            self.change(worker, block, |held| held.commits = held.commits.saturating_sub(1));
        }
    }

    fn remove_worker(&mut self, worker: WorkerId) {
        self.workers.remove(&worker);
    }

    fn matched(&self, chain: &[BlockHash], depths: &mut Vec<usize>) {
        depths.clear();
        depths.resize(self.workers.keys().last().map_or(0, |last| last.0 as usize + 1), 0);
        for (worker, blocks) in &self.workers {
            depths[worker.0 as usize] = chain.iter().take_while(|block| blocks.contains_key(*block)).count();
        }
    }

    fn blocks(&self, worker: WorkerId) -> Blocks {
        Blocks(self.workers.get(&worker).map_or(0, |blocks| blocks.len() as u64))
    }

    fn stored(&self, worker: WorkerId) -> Blocks {
        let stored = |blocks: &HashMap<BlockHash, Held>| blocks.values().filter(|held| held.stored).count() as u64;
        Blocks(self.workers.get(&worker).map_or(0, stored))
    }

    fn bytes(&self) -> Bytes {
        let entry = size_of::<(BlockHash, Held)>() + 1;
        Bytes(self.workers.values().map(|blocks| (blocks.capacity() * entry) as u64).sum())
    }
}
