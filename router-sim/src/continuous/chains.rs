//! The chains of a trace, cut where they part.
//!
//! Names are chained, so all prompts of a trace are one trie. Blocks that no prompt tells apart are one *stretch*: a prompt of
//! a thousand blocks is some ten stretches, and what a worker holds of a stretch is one number, because blocks are cached from
//! the front and evicted from the back.

use hashbrown::HashMap;
use router_core::BlockHash;

use crate::trace::Trace;

/// Blocks that all prompts have together or not at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stretch {
    /// Where its names are in the trace's blocks.
    pub(crate) start: u32,
    /// How many.
    pub(crate) len: u32,
}

/// Part of a stretch: what was stored or removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) stretch: u32,
    pub(crate) from: u32,
    pub(crate) to: u32,
}

/// All stretches, and of which each request is made.
#[derive(Debug, Default)]
pub(crate) struct Chains {
    stretches: Vec<Stretch>,
    /// Stretches of all requests, one after another.
    parts: Vec<u32>,
    /// Where each request's begin; one more at the end.
    starts: Vec<u32>,
}

impl Chains {
    pub(crate) fn new(trace: &Trace) -> Self {
        let mut places: HashMap<BlockHash, u32> = HashMap::new();
        // how many prompts each block is in, and the stretch that it begins
        let mut blocks: Vec<(u32, Option<u32>)> = Vec::new();
        let mut ids: Vec<u32> = Vec::with_capacity(trace.blocks.len());
        for request in &trace.requests {
            for &name in trace.chain(request) {
                let id = *places.entry(name).or_insert(blocks.len() as u32);
                if id as usize == blocks.len() {
                    blocks.push((0, None));
                }
                blocks[id as usize].0 += 1;
                ids.push(id);
            }
        }
        let mut chains = Self::default();
        let mut before = 0;
        for request in &trace.requests {
            chains.starts.push(chains.parts.len() as u32);
            let ids = &ids[before..before + request.chain.1 as usize];
            before += ids.len();
            let mut at = 0;
            while at < ids.len() {
                // a block is in no more prompts than the one before it: where the count changes, prompts part
                let prompts = blocks[ids[at] as usize].0;
                let len = ids[at..].iter().take_while(|id| blocks[**id as usize].0 == prompts).count();
                let next = chains.stretches.len() as u32;
                let stretch = *blocks[ids[at] as usize].1.get_or_insert(next);
                if stretch == next {
                    chains.stretches.push(Stretch { start: request.chain.0 + at as u32, len: len as u32 });
                }
                chains.parts.push(stretch);
                at += len;
            }
        }
        chains.starts.push(chains.parts.len() as u32);
        chains
    }

    /// The stretches of a request, in order.
    pub(crate) fn of(&self, request: u32) -> &[u32] {
        let at = request as usize;
        &self.parts[self.starts[at] as usize..self.starts[at + 1] as usize]
    }

    /// Blocks of a stretch.
    pub(crate) fn len(&self, stretch: u32) -> u32 {
        self.stretches[stretch as usize].len
    }

    /// Names of part of a stretch.
    pub(crate) fn names<'a>(&self, trace: &'a Trace, span: Span) -> &'a [BlockHash] {
        let start = self.stretches[span.stretch as usize].start;
        &trace.blocks[(start + span.from) as usize..(start + span.to) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::continuous::tests::trace;

    #[test]
    fn prompts_are_made_of_what_they_share() {
        let trace = trace(&[&[1, 2, 3, 4, 5], &[1, 2, 3, 6], &[], &[1, 2, 3, 4, 5, 7], &[8]]);
        let chains = Chains::new(&trace);
        let of = |request| -> Vec<Vec<u64>> {
            let whole = |stretch| Span { stretch, from: 0, to: chains.len(stretch) };
            let names = |stretch| chains.names(&trace, whole(stretch)).iter().map(|name| name.0).collect();
            chains.of(request).iter().map(|&stretch| names(stretch)).collect()
        };
        assert_eq!(of(0), [vec![1, 2, 3], vec![4, 5]]);
        assert_eq!(of(1), [vec![1, 2, 3], vec![6]]);
        assert_eq!(of(2), Vec::<Vec<u64>>::new());
        assert_eq!(of(3), [vec![1, 2, 3], vec![4, 5], vec![7]]);
        assert_eq!(of(4), [vec![8]]);
    }
}
