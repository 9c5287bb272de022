//! A conversation stays where it was.

use hashbrown::HashMap;
use router_core::BlockHash;

use super::{Rival, Sight};

/// The worker of the last turn; a new conversation goes to the least b.
///
/// Where a trace has no sessions, a request continues the last one that had more than half of its blocks.
#[derive(Default)]
pub struct Sticky {
    sessions: HashMap<u32, usize>,
    blocks: HashMap<BlockHash, usize>,
}

impl Sticky {
    fn home(&self, sight: &Sight<'_>) -> Option<usize> {
        if let Some(session) = sight.session {
            return self.sessions.get(&session).copied();
        }
        let half = sight.chain.len() / 2;
        sight.chain.iter().skip(half).rev().find_map(|block| self.blocks.get(block)).copied()
    }
}

impl Rival for Sticky {
    fn name(&self) -> String {
        "sticky".to_owned()
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        let home = self.home(sight);
        let here = (0..sight.count()).find(|&at| Some(sight.worker(at)) == home);
        sight.each(scores, |at| match here {
            Some(home) => u128::from(at != home),
            None => sight.batch(at).into(),
        });
    }

    fn chosen(&mut self, sight: &Sight<'_>, at: usize) {
        let worker = sight.worker(at);
        match sight.session {
            Some(session) => {
                self.sessions.insert(session, worker);
            }
            None => sight.chain.iter().for_each(|&block| {
                self.blocks.insert(block, worker);
            }),
        }
    }
}
