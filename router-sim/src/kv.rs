//! A worker's KV blocks by name: who holds which, which are cached, which goes first.
//!
//! It counts blocks and knows no memory: a named block is one that another row could share, a private block is
//! partial or a second copy.

use std::collections::BTreeMap;

use hashbrown::HashMap;
use router_core::BlockHash;

#[derive(Debug)]
struct Named {
    users: u32,
    /// When it was last used; place in `idle` while nobody uses it.
    used: u64,
}

/// The block pool of a modelled worker.
#[derive(Debug)]
pub(crate) struct KvPool {
    total: u64,
    private: u64,
    named: HashMap<BlockHash, Named>,
    /// Unused named blocks, least recently used first.
    idle: BTreeMap<u64, BlockHash>,
    clock: u64,
    pub(crate) stored: Vec<BlockHash>,
    pub(crate) removed: Vec<BlockHash>,
}

/// The blocks of one row, in order; `None` is a private one.
#[derive(Clone, Debug, Default)]
pub(crate) struct RowBlocks(pub(crate) Vec<Option<BlockHash>>);

impl KvPool {
    pub(crate) fn new(total: u64) -> Self {
        Self {
            total,
            private: 0,
            named: HashMap::new(),
            idle: BTreeMap::new(),
            clock: 0,
            stored: Vec::new(),
            removed: Vec::new(),
        }
    }

    pub(crate) fn free(&self) -> u64 {
        self.total - self.private - self.named.len() as u64
    }

    pub(crate) fn cached(&self) -> u64 {
        self.idle.len() as u64
    }

    pub(crate) fn hashes(&self) -> Vec<BlockHash> {
        let mut all: Vec<_> = self.named.keys().copied().collect();
        all.sort_unstable();
        all
    }

    /// Takes a block for a row, evicting the least recently used idle one if none is free. `false`: all are in use.
    pub(crate) fn take(&mut self, row: &mut RowBlocks) -> bool {
        if self.free() == 0 {
            let Some((_, hash)) = self.idle.pop_first() else { return false };
            self.named.remove(&hash);
            self.removed.push(hash);
        }
        self.private += 1;
        row.0.push(None);
        true
    }

    /// The row's block is full and has a name now. A second copy of a named block stays private.
    pub(crate) fn name(&mut self, row: &mut RowBlocks, at: usize, hash: BlockHash) {
        if row.0[at].is_none() && !self.named.contains_key(&hash) {
            self.clock += 1;
            self.named.insert(hash, Named { users: 1, used: self.clock });
            self.private -= 1;
            self.stored.push(hash);
            row.0[at] = Some(hash);
        }
    }

    /// Shares a named block with the row. `false`: not here.
    pub(crate) fn share(&mut self, row: &mut RowBlocks, hash: BlockHash) -> bool {
        let Some(named) = self.named.get_mut(&hash) else { return false };
        if named.users == 0 {
            self.idle.remove(&named.used);
        }
        named.users += 1;
        row.0.push(Some(hash));
        true
    }

    /// The row gives back all its blocks; named ones stay cached, the deepest to go first.
    pub(crate) fn release(&mut self, row: &mut RowBlocks) {
        for block in std::mem::take(&mut row.0).into_iter().rev() {
            let Some(hash) = block else {
                self.private -= 1;
                continue;
            };
            let Some(named) = self.named.get_mut(&hash) else { continue };
            named.users -= 1;
            if named.users == 0 {
                self.clock += 1;
                named.used = self.clock;
                self.idle.insert(self.clock, hash);
            }
        }
    }
}
