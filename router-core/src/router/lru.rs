//! What an engine that reports nothing probably still holds: the blocks used last, up to its capacity.

use std::collections::VecDeque;

use hashbrown::HashMap;

use crate::block::BlockHash;

/// Least recently used blocks. A use costs one push: what is stale in the queue is skipped when it comes to its front.
pub(super) struct Lru {
    capacity: u64,
    /// When each block was used last.
    used: HashMap<BlockHash, u64>,
    /// All uses, oldest first; one that is not its block's last is stale.
    uses: VecDeque<(u64, BlockHash)>,
    clock: u64,
}

impl Lru {
    pub(super) fn new(capacity: u64) -> Self {
        Self { capacity, used: HashMap::new(), uses: VecDeque::new(), clock: 0 }
    }

    pub(super) fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Whether the block was not there before.
    pub(super) fn touch(&mut self, block: BlockHash) -> bool {
        self.clock += 1;
        // A queue of mostly stale uses is cleaned as a whole, so that it stays as small as what is held.
        if self.uses.len() >= 2 * self.used.len() + 64 {
            self.uses.retain(|(at, block)| self.used.get(block) == Some(at));
        }
        self.uses.push_back((self.clock, block));
        self.used.insert(block, self.clock).is_none()
    }

    /// The block to give up next, if there are too many.
    pub(super) fn evict(&mut self) -> Option<BlockHash> {
        if self.used.len() as u64 <= self.capacity {
            return None;
        }
        loop {
            let (at, block) = self.uses.pop_front()?;
            if self.used.get(&block) == Some(&at) {
                self.used.remove(&block);
                return Some(block);
            }
        }
    }
}
