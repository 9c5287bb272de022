//! Names of blocks: ids folded into chains, chains stored once where one continues another, private ones renamed for a copy.

use std::cmp::Reverse;

use hashbrown::HashMap;
use router_core::BlockHash;

use super::{Trace, TraceRequest};
use crate::random::mix;

/// The name of a prefix that goes on with `id`.
pub(super) const fn link(prefix: BlockHash, id: u64) -> BlockHash {
    BlockHash(mix(prefix.0.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ mix(id.wrapping_add(0xD1B5_4A32_D192_ED03))))
}

/// The name of the empty prefix.
pub(super) const ROOT: BlockHash = BlockHash(0x5C15);

/// Another name for a private block, by the copy it is in.
pub(super) const fn renamed(name: BlockHash, copy: u64) -> BlockHash {
    if copy == 0 { name } else { BlockHash(mix(name.0 ^ mix(copy))) }
}

/// Chains as they are read, with those that others continue stored once.
#[derive(Debug, Default)]
pub(super) struct Chains {
    blocks: Vec<BlockHash>,
    /// Where a name stands in `blocks`, with its whole prefix before it.
    places: HashMap<BlockHash, u32>,
}

impl Chains {
    /// Takes a chain in; `None` where there is no place for it. Nothing is stored twice if the longest come first.
    ///
    /// A name stands for its prefix. So a chain that is known to its end has a place already; any other is written out.
    pub(super) fn put(&mut self, chain: &[BlockHash]) -> Option<(u32, u32)> {
        let len = u32::try_from(chain.len()).ok()?;
        let Some(last) = chain.last() else { return Some((0, 0)) };
        if let Some(at) = self.places.get(last) {
            return Some((at + 1 - len, len));
        }
        let known = chain.partition_point(|name| self.places.contains_key(name));
        let start = self.blocks.len();
        if start + chain.len() > MOST_BLOCKS {
            return None;
        }
        self.blocks.extend_from_slice(chain);
        for (place, name) in (start..).zip(chain).skip(known) {
            self.places.insert(*name, place as u32);
        }
        Some((start as u32, len))
    }
}

/// Names of all chains together: 4 GiB.
pub(super) const MOST_BLOCKS: usize = 1 << 29;

/// Which names are everybody's.
#[derive(Debug)]
pub(super) struct Public(HashMap<BlockHash, Uses>);

#[derive(Clone, Copy, Debug)]
enum Uses {
    /// Of one conversation.
    Session(u32),
    /// Of requests without one.
    Requests(u32),
    Public,
}

impl Public {
    /// Blocks that more than one conversation uses; without conversations, those in at least 1 % of requests and at least 32.
    /// The prefix of a public block is public.
    pub(super) fn of(trace: &Trace) -> Self {
        let least = u32::try_from(trace.requests.len().div_ceil(100)).unwrap_or(u32::MAX).max(32);
        let mut uses: HashMap<BlockHash, Uses> = HashMap::new();
        for request in &trace.requests {
            // from the end: what a conversation has marked, it has marked with its prefix
            for name in trace.chain(request).iter().rev() {
                let by = uses.entry(*name).or_insert(Uses::Requests(0));
                *by = match (*by, request.session) {
                    (Uses::Public, _) => break,
                    (Uses::Session(one), Some(this)) if one == this => break,
                    (Uses::Requests(0), Some(this)) => Uses::Session(this),
                    (Uses::Requests(n), None) if n + 1 < least => Uses::Requests(n + 1),
                    _ => Uses::Public,
                };
            }
        }
        Self(uses)
    }

    /// Where no copy needs to know.
    pub(super) fn none() -> Self {
        Self(HashMap::new())
    }

    /// How many leading blocks of a chain are public.
    pub(super) fn leading(&self, chain: &[BlockHash]) -> usize {
        chain.partition_point(|name| matches!(self.0.get(name), Some(Uses::Public)))
    }
}

impl Trace {
    /// Takes its requests' chains from `chains`, those that others continue only once. `None` where there is no place for them.
    pub(super) fn store(&mut self, chains: &[BlockHash]) -> Option<()> {
        let mut order: Vec<usize> = (0..self.requests.len()).collect();
        order.sort_by_key(|at| Reverse(self.requests[*at].chain.1));
        let mut stored = Chains::default();
        for at in order {
            let (start, len) = self.requests[at].chain;
            self.requests[at].chain = stored.put(&chains[start as usize..start as usize + len as usize])?;
        }
        self.blocks = stored.blocks;
        self.block_size = self.block_size.filter(|_| !self.blocks.is_empty());
        Some(())
    }

    /// Adds these requests of another trace of the same blocks and classes, with conversations and private names of their own
    /// for every copy but 0. `None` where there is no place for them.
    pub(super) fn put_copy(
        &mut self,
        of: &Self,
        requests: impl Iterator<Item = TraceRequest>,
        public: &Public,
        copy: u64,
    ) -> Option<()> {
        let requests: Vec<TraceRequest> = requests.collect();
        // stored spans that these requests use: the longest from each start
        let mut spans: HashMap<u32, (u32, u32)> = HashMap::new();
        for request in requests.iter().filter(|request| request.chain.1 > 0) {
            let (start, len) = request.chain;
            let span = spans.entry(start).or_default();
            span.1 = span.1.max(len);
        }
        let mut starts: Vec<u32> = spans.keys().copied().collect();
        starts.sort_unstable();
        for start in starts {
            let Some(span) = spans.get_mut(&start) else { continue };
            span.0 = u32::try_from(self.blocks.len()).ok()?;
            let names = &of.blocks[start as usize..(start + span.1) as usize];
            let shared = public.leading(names);
            self.blocks.extend_from_slice(&names[..shared]);
            self.blocks.extend(names[shared..].iter().map(|name| renamed(*name, copy)));
        }
        if self.blocks.len() > MOST_BLOCKS {
            return None;
        }
        let first = self.sessions();
        let mut sessions: HashMap<u32, u32> = HashMap::new();
        for request in requests {
            let start = spans.get(&request.chain.0).map_or(0, |span| span.0);
            let next = first + u32::try_from(sessions.len()).ok()?;
            let session = request.session.map(|session| *sessions.entry(session).or_insert(next));
            let chain = if request.chain.1 > 0 { (start, request.chain.1) } else { (0, 0) };
            self.requests.push(TraceRequest { chain, session, ..request });
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use hashbrown::HashSet;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_name_is_its_whole_prefix() {
        let chain = |ids: &[u64]| ids.iter().fold(ROOT, |name, id| link(name, *id));
        let all =
            [chain(&[]), chain(&[0]), chain(&[1]), chain(&[0, 0]), chain(&[0, 1]), chain(&[1, 0]), chain(&[1, 1])];
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
        assert_eq!(renamed(all[3], 0), all[3]);
        assert_ne!(renamed(all[3], 1), renamed(all[3], 2));
    }

    proptest! {
        #[test]
        fn chains_come_back_as_they_were_put(all in prop::collection::vec(prop::collection::vec(0u64..3, 0..8), 1..30)) {
            let mut chains = Chains::default();
            let mut wanted = Vec::new();
            for ids in &all {
                let mut name = ROOT;
                let chain: Vec<BlockHash> = ids.iter().map(|id| { name = link(name, *id); name }).collect();
                wanted.push((chains.put(&chain).expect("there is place"), chain));
            }
            let blocks = chains.blocks;
            for ((start, len), chain) in wanted {
                prop_assert_eq!(&blocks[start as usize..(start + len) as usize], &chain[..]);
            }
        }
    }
}
