//! The KV blocks of a modelled engine: how many rows have to themselves, how many are named, and which go first.
//!
//! As vLLM's pool, with two simplifications: a block is safe from eviction while any row of the batch has its name in its prompt,
//! and a row that computed a block which another row named meanwhile gives its copy up.

use std::collections::BTreeMap;

use hashbrown::HashMap;

use super::chains::{Chains, Span};

/// What is here of a stretch.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    /// Its first so many blocks.
    present: u32,
    /// Rows of the batch with it in their prompts.
    users: u32,
    /// While nobody uses it: its place in `idle`.
    since: u64,
}

/// Blocks of one engine.
#[derive(Debug)]
pub(crate) struct Pool {
    total: u64,
    /// Blocks without a name.
    private: u64,
    /// Named blocks in use.
    shared: u64,
    /// Named blocks that nobody uses.
    cached: u64,
    held: HashMap<u32, Held>,
    /// Stretches that nobody uses, least recently used first; of those given up together the deepest first.
    idle: BTreeMap<u64, u32>,
    clock: u64,
}

impl Pool {
    pub(crate) fn new(total: u64) -> Self {
        Self { total, private: 0, shared: 0, cached: 0, held: HashMap::new(), idle: BTreeMap::new(), clock: 0 }
    }

    /// Blocks that hold nothing.
    pub(crate) fn free(&self) -> u64 {
        self.total.saturating_sub(self.private + self.shared + self.cached)
    }

    /// Blocks that rows could have.
    pub(crate) fn available(&self) -> u64 {
        self.free() + self.cached
    }

    pub(crate) fn used(&self) -> u64 {
        self.private + self.shared
    }

    pub(crate) fn cached(&self) -> u64 {
        self.cached
    }

    /// Leading blocks of a chain that are here, and how many of these nobody uses.
    pub(crate) fn hit(&self, chains: &Chains, chain: &[u32]) -> (u32, u64) {
        let (mut hit, mut idle) = (0, 0);
        for &stretch in chain {
            let Some(held) = self.held.get(&stretch) else { break };
            hit += held.present;
            if held.users == 0 {
                idle += u64::from(held.present);
            }
            if held.present < chains.len(stretch) {
                break;
            }
        }
        (hit, idle)
    }

    /// A row with this chain joins the batch.
    pub(crate) fn pin(&mut self, chain: &[u32]) {
        for &stretch in chain {
            let held = self.held.entry(stretch).or_default();
            if held.users == 0 && held.present > 0 {
                self.idle.remove(&held.since);
                self.cached -= u64::from(held.present);
                self.shared += u64::from(held.present);
            }
            held.users += 1;
        }
    }

    /// A row with this chain left the batch.
    pub(crate) fn unpin(&mut self, chain: &[u32]) {
        for &stretch in chain.iter().rev() {
            let Some(held) = self.held.get_mut(&stretch) else { continue };
            held.users = held.users.saturating_sub(1);
            if held.users > 0 {
                continue;
            }
            if held.present == 0 {
                self.held.remove(&stretch);
                continue;
            }
            self.clock += 1;
            held.since = self.clock;
            self.shared -= u64::from(held.present);
            self.cached += u64::from(held.present);
            self.idle.insert(self.clock, stretch);
        }
    }

    /// Rows take so many blocks, which are available; what is evicted for them is told.
    pub(crate) fn take(&mut self, blocks: u64, removed: &mut Vec<Span>) {
        let mut short = blocks.saturating_sub(self.free());
        self.private += blocks;
        while short > 0 {
            let Some((&since, &stretch)) = self.idle.first_key_value() else { return };
            let Some(held) = self.held.get_mut(&stretch) else { return };
            let gone = short.min(held.present.into()) as u32;
            let left = held.present - gone;
            removed.push(Span { stretch, from: left, to: held.present });
            held.present = left;
            short -= u64::from(gone);
            self.cached -= u64::from(gone);
            if left == 0 {
                self.idle.remove(&since);
                self.held.remove(&stretch);
            }
        }
    }

    /// A row gives back blocks of its own.
    pub(crate) fn give(&mut self, blocks: u64) {
        self.private = self.private.saturating_sub(blocks);
    }

    /// The row of this chain computed its blocks from `from` to `to`: they have names now, and are no longer its own. How many
    /// are in the chain.
    pub(crate) fn name(&mut self, chains: &Chains, chain: &[u32], from: u32, to: u32, stored: &mut Vec<Span>) -> u32 {
        let (mut start, mut named) = (0, 0);
        for &stretch in chain {
            let end = start + chains.len(stretch);
            if end > from
                && let Some(held) = self.held.get_mut(&stretch)
            {
                named += to.min(end) - from.max(start);
                let present = to.min(end) - start;
                if present > held.present {
                    stored.push(Span { stretch, from: held.present, to: present });
                    self.shared += u64::from(present - held.present);
                    held.present = present;
                }
            }
            start = end;
            if start >= to {
                break;
            }
        }
        self.private = self.private.saturating_sub(named.into());
        named
    }
}
