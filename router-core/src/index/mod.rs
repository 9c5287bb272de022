//! Which worker holds which blocks.
//!
//! A block is *stored* on a worker because the worker said so, and *committed* because a request that will compute it
//! was sent there. Either makes a hit: a follow-up may come before the first prefill ends. Commits are counted, so
//! taking one back never takes away what another placed or what the worker really has.

mod naive;
mod trie;

pub use naive::NaiveIndex;
pub use trie::BlockTrie;

use crate::block::BlockHash;
use crate::ids::WorkerId;
use crate::units::{Blocks, Bytes};

/// The one interface of both indexes; [`NaiveIndex`] is the oracle of [`BlockTrie`].
pub trait PrefixIndex {
    /// The worker has this block.
    fn store(&mut self, worker: WorkerId, block: BlockHash);
    /// The worker has it no more.
    fn evict(&mut self, worker: WorkerId, block: BlockHash);
    /// The worker has no stored blocks (a snapshot follows); commits stay.
    fn clear_stored(&mut self, worker: WorkerId);
    /// A request that computes these blocks is on its way to the worker.
    fn commit(&mut self, worker: WorkerId, blocks: &[BlockHash]);
    /// Undoes one `commit` of the same blocks.
    fn take_back(&mut self, worker: WorkerId, blocks: &[BlockHash]);
    /// Forgets the worker. Costs what it holds.
    fn remove_worker(&mut self, worker: WorkerId);
    /// For every worker at once the number of leading blocks of `chain` it holds, at `depths[worker]`.
    /// `depths` is resized to one past the largest worker that holds any block.
    fn matched(&self, chain: &[BlockHash], depths: &mut Vec<usize>);
    /// Blocks stored or committed on the worker.
    fn blocks(&self, worker: WorkerId) -> Blocks;
    /// Blocks stored on the worker.
    fn stored(&self, worker: WorkerId) -> Blocks;
    /// An estimate of the index's own memory.
    fn bytes(&self) -> Bytes;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What a test does to an index. Chains are prefixes of one of four sequences, so that they share blocks.
    #[derive(Clone, Debug)]
    enum Op {
        Store(u32, u64, usize),
        Evict(u32, u64, usize),
        Clear(u32),
        Commit(u32, u64, usize),
        TakeBack(usize),
        Remove(u32),
    }

    /// Two sequences share their first three blocks, as prompts under one system prompt do.
    fn chain(sequence: u64, len: usize) -> Vec<BlockHash> {
        (0..len as u64).map(|i| BlockHash(if i < 3 { sequence / 2 * 1000 + i } else { sequence * 1000 + i })).collect()
    }

    fn op() -> impl Strategy<Value = Op> {
        // workers on both sides of a bit set's word
        let worker = prop_oneof![0u32..4, 62u32..67, Just(200u32)];
        let block = (worker.clone(), 0u64..4, 0usize..9);
        prop_oneof![
            6 => block.clone().prop_map(|(w, s, i)| Op::Store(w, s, i)),
            3 => block.clone().prop_map(|(w, s, i)| Op::Evict(w, s, i)),
            1 => worker.clone().prop_map(Op::Clear),
            4 => block.prop_map(|(w, s, n)| Op::Commit(w, s, n)),
            3 => (0usize..8).prop_map(Op::TakeBack),
            1 => worker.prop_map(Op::Remove),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]
        #[test]
        fn the_trie_answers_as_the_naive_index_does(ops in proptest::collection::vec(op(), 1..120)) {
            let (mut naive, mut trie) = (NaiveIndex::default(), BlockTrie::default());
            let mut commits: Vec<(WorkerId, Vec<BlockHash>)> = Vec::new();
            let mut both = |f: &mut dyn FnMut(&mut dyn PrefixIndex)| { f(&mut naive); f(&mut trie); };
            for op in ops {
                match op {
                    Op::Store(w, s, i) => both(&mut |index| index.store(WorkerId(w), chain(s, i + 1)[i])),
                    Op::Evict(w, s, i) => both(&mut |index| index.evict(WorkerId(w), chain(s, i + 1)[i])),
                    Op::Clear(w) => both(&mut |index| index.clear_stored(WorkerId(w))),
                    Op::Commit(w, s, n) => {
                        both(&mut |index| index.commit(WorkerId(w), &chain(s, n)));
                        commits.push((WorkerId(w), chain(s, n)));
                    }
                    Op::TakeBack(i) => {
                        if i < commits.len() {
                            let (worker, blocks) = commits.swap_remove(i);
                            both(&mut |index| index.take_back(worker, &blocks));
                        }
                    }
                    Op::Remove(w) => {
                        both(&mut |index| index.remove_worker(WorkerId(w)));
                        commits.retain(|(worker, _)| worker.0 != w);
                    }
                }
            }
            let at = |depths: &[usize], w: u32| depths.get(w as usize).copied().unwrap_or(0);
            let (mut left, mut right) = (Vec::new(), Vec::new());
            for sequence in 0..4 {
                naive.matched(&chain(sequence, 9), &mut left);
                trie.matched(&chain(sequence, 9), &mut right);
                for w in (0..70).chain([200]) {
                    prop_assert_eq!(at(&left, w), at(&right, w), "sequence {} worker {}", sequence, w);
                }
            }
            for w in (0..70).chain([200]) {
                prop_assert_eq!(naive.blocks(WorkerId(w)), trie.blocks(WorkerId(w)));
                prop_assert_eq!(naive.stored(WorkerId(w)), trie.stored(WorkerId(w)));
            }
            for (worker, blocks) in commits { trie.take_back(worker, &blocks); }
            for w in (0..70).chain([200]) { trie.clear_stored(WorkerId(w)); }
            prop_assert_eq!(trie.nodes(), 0, "an empty trie keeps no nodes");
        }
    }
}
