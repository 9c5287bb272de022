//! The block trie. A chained hash names the whole path to its node, so the trie's edges need no storage: one map from
//! hash to the set of workers that hold the block. A look-up walks the prompt's chain once for all workers and narrows
//! a set of workers, which only shrinks with depth.
//!
//! Why a worker holds a block is kept apart, by worker: what changes nothing for look-ups, as a commit of a block that
//! the worker has anyway, does not touch the nodes, which for a large fleet are far more than a cache takes.

use hashbrown::HashMap;
use hashbrown::hash_map::Entry;
use smallvec::SmallVec;

use super::PrefixIndex;
use crate::block::BlockHash;
use crate::ids::WorkerId;
use crate::units::{Blocks, Bytes};

/// A set of workers, one bit each; 64 workers need no allocation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct WorkerSet(SmallVec<[u64; 1]>);

impl WorkerSet {
    fn insert(&mut self, worker: WorkerId) {
        let word = worker.0 as usize / 64;
        if self.0.len() <= word {
            self.0.resize(word + 1, 0);
        }
        self.0[word] |= 1 << (worker.0 % 64);
    }

    fn remove(&mut self, worker: WorkerId) {
        if let Some(word) = self.0.get_mut(worker.0 as usize / 64) {
            *word &= !(1 << (worker.0 % 64));
        }
    }

    fn is_empty(&self) -> bool {
        self.0.iter().all(|&word| word == 0)
    }

    fn word(&self, at: usize) -> u64 {
        self.0.get(at).copied().unwrap_or(0)
    }
}

/// The index that serves.
#[derive(Default)]
pub struct BlockTrie {
    /// Who holds each block: what a look-up asks.
    nodes: HashMap<BlockHash, WorkerSet>,
    by_worker: Vec<Holding>,
}

/// What one worker holds; removing the worker costs that much.
#[derive(Default)]
struct Holding {
    blocks: HashMap<BlockHash, Held>,
    stored: u64,
}

/// Why a worker holds a block.
#[derive(Clone, Copy, Default)]
struct Held {
    stored: bool,
    commits: u32,
}

impl Held {
    fn is_over(self) -> bool {
        !self.stored && self.commits == 0
    }
}

impl BlockTrie {
    /// Distinct blocks held anywhere.
    pub fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// What the worker holds, for changes.
    fn holding(&mut self, worker: WorkerId) -> (&mut Holding, &mut HashMap<BlockHash, WorkerSet>) {
        let slot = worker.0 as usize;
        if self.by_worker.len() <= slot {
            self.by_worker.resize_with(slot + 1, Holding::default);
        }
        (&mut self.by_worker[slot], &mut self.nodes)
    }

    fn change(&mut self, worker: WorkerId, blocks: &[BlockHash], change: impl Fn(&mut Held)) {
        let (holding, nodes) = self.holding(worker);
        for &block in blocks {
            let mut held = match holding.blocks.entry(block) {
                Entry::Occupied(held) => held,
                Entry::Vacant(place) => {
                    let mut held = Held::default();
                    change(&mut held);
                    if !held.is_over() {
                        holding.stored += u64::from(held.stored);
                        place.insert(held);
                        nodes.entry(block).or_default().insert(worker);
                    }
                    continue;
                }
            };
            let before = held.get().stored;
            change(held.get_mut());
            holding.stored = holding.stored + u64::from(held.get().stored) - u64::from(before);
            if held.get().is_over() {
                held.remove();
                leave(nodes, worker, block);
            }
        }
    }
}

/// The worker holds the block no more.
fn leave(nodes: &mut HashMap<BlockHash, WorkerSet>, worker: WorkerId, block: BlockHash) {
    if let Entry::Occupied(mut workers) = nodes.entry(block) {
        workers.get_mut().remove(worker);
        if workers.get().is_empty() {
            workers.remove();
        }
    }
}

impl PrefixIndex for BlockTrie {
    fn store(&mut self, worker: WorkerId, block: BlockHash) {
        self.change(worker, &[block], |held| held.stored = true);
    }

    fn evict(&mut self, worker: WorkerId, block: BlockHash) {
        self.change(worker, &[block], |held| held.stored = false);
    }

    fn clear_stored(&mut self, worker: WorkerId) {
        let (holding, nodes) = self.holding(worker);
        holding.stored = 0;
        holding.blocks.retain(|block, held| {
            held.stored = false;
            if held.is_over() {
                leave(nodes, worker, *block);
            }
            !held.is_over()
        });
    }

    fn commit(&mut self, worker: WorkerId, blocks: &[BlockHash]) {
        self.change(worker, blocks, |held| held.commits += 1);
    }

    fn take_back(&mut self, worker: WorkerId, blocks: &[BlockHash]) {
        self.change(worker, blocks, |held| held.commits = held.commits.saturating_sub(1));
    }

    fn remove_worker(&mut self, worker: WorkerId) {
        let (holding, nodes) = self.holding(worker);
        for (block, _) in std::mem::take(holding).blocks {
            leave(nodes, worker, block);
        }
    }

    fn matched(&self, chain: &[BlockHash], depths: &mut Vec<usize>) {
        depths.clear();
        depths.resize(self.by_worker.len(), 0);
        let Some(first) = chain.first().and_then(|block| self.nodes.get(block)) else { return };
        let mut alive = first.clone();
        for (depth, block) in chain.iter().enumerate() {
            let node = self.nodes.get(block);
            let mut any = false;
            for (at, word) in alive.0.iter_mut().enumerate() {
                let now = *word & node.map_or(0, |workers| workers.word(at));
                let mut left = *word & !now;
                while left != 0 {
                    depths[at * 64 + left.trailing_zeros() as usize] = depth;
                    left &= left - 1;
                }
                *word = now;
                any |= now != 0;
            }
            if !any {
                return;
            }
        }
        for (at, &word) in alive.0.iter().enumerate() {
            let mut left = word;
            while left != 0 {
                depths[at * 64 + left.trailing_zeros() as usize] = chain.len();
                left &= left - 1;
            }
        }
    }

    fn blocks(&self, worker: WorkerId) -> Blocks {
        Blocks(self.by_worker.get(worker.0 as usize).map_or(0, |holding| holding.blocks.len() as u64))
    }

    fn stored(&self, worker: WorkerId) -> Blocks {
        Blocks(self.by_worker.get(worker.0 as usize).map_or(0, |holding| holding.stored))
    }

    fn bytes(&self) -> Bytes {
        let nodes = self.nodes.capacity() * (size_of::<(BlockHash, WorkerSet)>() + 1);
        let held = size_of::<(BlockHash, Held)>() + 1;
        let holdings: usize = self.by_worker.iter().map(|holding| holding.blocks.capacity() * held).sum();
        Bytes((nodes + holdings) as u64)
    }
}
