//! The block trie. A chained hash names the whole path to its node, so the trie's edges need no storage: one map from
//! hash to the set of workers that hold the block. A look-up walks the prompt's chain once for all workers and narrows
//! a set of workers, which only shrinks with depth.

use hashbrown::{HashMap, HashSet};
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

    fn contains(&self, worker: WorkerId) -> bool {
        self.0.get(worker.0 as usize / 64).is_some_and(|word| word & (1 << (worker.0 % 64)) != 0)
    }

    fn is_empty(&self) -> bool {
        self.0.iter().all(|&word| word == 0)
    }

    fn word(&self, at: usize) -> u64 {
        self.0.get(at).copied().unwrap_or(0)
    }
}

#[derive(Default)]
struct Node {
    /// Stored or committed: what a look-up asks.
    held: WorkerSet,
    stored: WorkerSet,
    /// Commits by worker; almost always empty or one.
    commits: SmallVec<[(WorkerId, u32); 1]>,
}

impl Node {
    fn refresh(&mut self, worker: WorkerId) {
        if self.stored.contains(worker) || self.commits.iter().any(|(w, _)| *w == worker) {
            self.held.insert(worker);
        } else {
            self.held.remove(worker);
        }
    }
}

/// The index that serves.
#[derive(Default)]
pub struct BlockTrie {
    nodes: HashMap<BlockHash, Node>,
    /// Blocks by worker, so that removing one costs what it holds.
    by_worker: Vec<Holding>,
}

#[derive(Default)]
struct Holding {
    blocks: HashSet<BlockHash>,
    stored: u64,
}

impl BlockTrie {
    /// Distinct blocks held anywhere.
    pub fn nodes(&self) -> usize {
        self.nodes.len()
    }

    fn change(&mut self, worker: WorkerId, block: BlockHash, change: impl FnOnce(&mut Node)) {
        let node = self.nodes.entry(block).or_default();
        let before = node.stored.contains(worker);
        change(node);
        node.refresh(worker);
        let after = node.stored.contains(worker);
        let (held, gone) = (node.held.contains(worker), node.held.is_empty());
        let slot = worker.0 as usize;
        if self.by_worker.len() <= slot {
            self.by_worker.resize_with(slot + 1, Holding::default);
        }
        let holding = &mut self.by_worker[slot];
        holding.stored = holding.stored + u64::from(after) - u64::from(before);
        if held {
            holding.blocks.insert(block);
        } else {
            holding.blocks.remove(&block);
        }
        if gone {
            self.nodes.remove(&block);
        }
    }

    fn blocks_of(&self, worker: WorkerId) -> Vec<BlockHash> {
        self.by_worker.get(worker.0 as usize).map_or_else(Vec::new, |holding| holding.blocks.iter().copied().collect())
    }
}

impl PrefixIndex for BlockTrie {
    fn store(&mut self, worker: WorkerId, block: BlockHash) {
        self.change(worker, block, |node| node.stored.insert(worker));
    }

    fn evict(&mut self, worker: WorkerId, block: BlockHash) {
        self.change(worker, block, |node| node.stored.remove(worker));
    }

    fn clear_stored(&mut self, worker: WorkerId) {
        for block in self.blocks_of(worker) {
            self.evict(worker, block);
        }
    }

    fn commit(&mut self, worker: WorkerId, blocks: &[BlockHash]) {
        for &block in blocks {
            self.change(worker, block, |node| match node.commits.iter_mut().find(|(w, _)| *w == worker) {
                Some((_, count)) => *count += 1,
                None => node.commits.push((worker, 1)),
            });
        }
    }

    fn take_back(&mut self, worker: WorkerId, blocks: &[BlockHash]) {
        for &block in blocks {
            self.change(worker, block, |node| {
                if let Some(at) = node.commits.iter().position(|(w, _)| *w == worker) {
                    node.commits[at].1 -= 1;
                    if node.commits[at].1 == 0 {
                        node.commits.swap_remove(at);
                    }
                }
            });
        }
    }

    fn remove_worker(&mut self, worker: WorkerId) {
        for block in self.blocks_of(worker) {
            self.change(worker, block, |node| {
                node.stored.remove(worker);
                node.commits.retain(|(w, _)| *w != worker);
            });
        }
    }

    fn matched(&self, chain: &[BlockHash], depths: &mut Vec<usize>) {
        depths.clear();
        depths.resize(self.by_worker.len(), 0);
        let Some(first) = chain.first().and_then(|block| self.nodes.get(block)) else { return };
        let mut alive = first.held.clone();
        for (depth, block) in chain.iter().enumerate() {
            let node = self.nodes.get(block);
            let mut any = false;
            for (at, word) in alive.0.iter_mut().enumerate() {
                let now = *word & node.map_or(0, |node| node.held.word(at));
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
        let nodes = self.nodes.capacity() * (size_of::<(BlockHash, Node)>() + 1);
        let sets: usize =
            self.by_worker.iter().map(|holding| holding.blocks.capacity() * (size_of::<BlockHash>() + 1)).sum();
        Bytes((nodes + sets) as u64)
    }
}
