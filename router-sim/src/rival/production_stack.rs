//! The routers of vLLM's production stack (vllm-project/production-stack, `src/vllm_router/routers`).
//!
//! "Least used" is the fewest requests sent in the last minute, as its statistics count them.

use std::collections::VecDeque;

use hashbrown::{HashMap, HashSet};
use router_core::{BlockHash, Micros};

use super::{Rival, Sight, slot};
use crate::random::{Random, mix};

/// How far back requests are counted.
const WINDOW: Micros = Micros(60_000_000);

/// Requests sent to each worker of late.
#[derive(Default)]
struct Rates {
    sent: VecDeque<(Micros, usize)>,
    counts: Vec<u64>,
}

impl Rates {
    fn trim(&mut self, now: Micros) {
        while let Some(&(_, worker)) = self.sent.front().filter(|(at, _)| *at + WINDOW < now) {
            self.sent.pop_front();
            *slot(&mut self.counts, worker) -= 1;
        }
    }

    fn sent(&mut self, now: Micros, worker: usize) {
        self.sent.push_back((now, worker));
        *slot(&mut self.counts, worker) += 1;
    }

    fn count(&mut self, worker: usize) -> u64 {
        *slot(&mut self.counts, worker)
    }
}

/// Where a session's place on the ring is, as a score: the worker of the least hash (rendezvous hashing, which moves as few sessions
/// as a ring when workers come and go).
fn ring(session: u32, worker: usize) -> u128 {
    mix((u64::from(session) << 32) ^ mix(worker as u64 + 1)).into()
}

/// A session's worker by hash; without a session the least used.
#[derive(Default)]
pub struct StackSession {
    rates: Rates,
}

impl Rival for StackSession {
    fn name(&self) -> String {
        "stack_session".to_owned()
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        self.rates.trim(sight.now);
        sight.each(scores, |at| match sight.session {
            Some(session) => ring(session, sight.worker(at)),
            None => self.rates.count(sight.worker(at)).into(),
        });
    }

    fn chosen(&mut self, sight: &Sight<'_>, at: usize) {
        self.rates.sent(sight.now, sight.worker(at));
    }
}

/// Prompt tokens by which a match may fall short (`--kv-aware-threshold`).
const SHORT: u64 = 2000;

/// The longest match, unless it is shorter than the prompt by more than 2,000 tokens: then as [`StackSession`].
#[derive(Default)]
pub struct StackKvaware {
    session: StackSession,
}

impl Rival for StackKvaware {
    fn name(&self) -> String {
        "stack_kvaware".to_owned()
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        let matched = sight.most(|at| sight.hit(at));
        if matched < sight.seen.tokens.0.saturating_sub(SHORT) {
            return self.session.scores(sight, scores);
        }
        sight.each(scores, |at| sight.fresh(at).into());
    }

    fn chosen(&mut self, sight: &Sight<'_>, at: usize) {
        self.session.chosen(sight, at);
    }
}

/// The longest match in a trie of what was sent where, any of equals; it is not asked what engines still hold.
///
/// Simplified: its chunks are the trace's blocks, not 128 characters. It grows with the trace.
pub struct StackPrefixaware {
    sent: HashMap<BlockHash, HashSet<usize>>,
    random: Random,
}

impl StackPrefixaware {
    pub(super) fn new(seed: u64) -> Self {
        Self { sent: HashMap::new(), random: Random::new(seed) }
    }
}

impl Rival for StackPrefixaware {
    fn name(&self) -> String {
        "stack_prefixaware".to_owned()
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        let mut best: Vec<usize> = (0..sight.count()).collect();
        for block in sight.chain {
            let Some(workers) = self.sent.get(block) else { break };
            let goes_on = |at: &usize| workers.contains(&sight.worker(*at));
            if !best.iter().any(goes_on) {
                break;
            }
            best.retain(goes_on);
        }
        let drawn = best.get(self.random.below(best.len() as u64) as usize).copied().unwrap_or(0);
        sight.each(scores, |at| u128::from(at != drawn));
    }

    fn chosen(&mut self, sight: &Sight<'_>, at: usize) {
        for &block in sight.chain {
            self.sent.entry(block).or_default().insert(sight.worker(at));
        }
    }
}
