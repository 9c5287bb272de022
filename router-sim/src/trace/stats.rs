//! What a trace is like, in a few numbers.

use hashbrown::{HashMap, HashSet};
use router_core::BlockHash;

use super::{Trace, TraceRequest};

/// A trace in numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct Stats {
    /// Requests.
    pub requests: u64,
    /// Seconds from the first arrival to the last.
    pub duration: f64,
    /// Arrivals a second between these; 0 where there are fewer than two.
    pub rate: f64,
    /// Tokens of prompts.
    pub input: LengthStats,
    /// Tokens of answers.
    pub output: LengthStats,
    /// Conversations, where known.
    pub sessions: u64,
    /// Where it has blocks.
    pub reuse: Option<Reuse>,
}

/// Lengths in tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LengthStats {
    /// Their mean.
    pub mean: f64,
    /// Half are no longer.
    pub p50: u32,
    /// 99 % are no longer.
    pub p99: u32,
    /// The longest.
    pub most: u32,
}

/// What prompts share. Whole blocks only.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reuse {
    /// Whole blocks of all prompts.
    pub blocks: u64,
    /// Different ones.
    pub unique: u64,
    /// The share of blocks that came before: 1 - unique / blocks.
    pub ratio: f64,
    /// The share of prompt tokens that one cache without end, empty at the start, finds; the last token is always computed.
    pub ideal_hit: f64,
    /// The share of requests that have the most used block.
    pub top: f64,
}

impl Trace {
    /// Its numbers.
    pub fn stats(&self) -> Stats {
        let (first, last) = (self.requests.first(), self.requests.last());
        let duration = first.zip(last).map_or(0.0, |(first, last)| last.at.saturating_sub(first.at).0 as f64 * 1e-6);
        let gaps = self.requests.len().saturating_sub(1);
        let sessions: HashSet<u32> = self.requests.iter().filter_map(|request| request.session).collect();
        Stats {
            requests: self.requests.len() as u64,
            duration,
            rate: if duration > 0.0 { gaps as f64 / duration } else { 0.0 },
            input: self.lengths(|request| request.input),
            output: self.lengths(|request| request.output),
            sessions: sessions.len() as u64,
            reuse: self.reuse(),
        }
    }

    fn lengths(&self, of: impl Fn(&TraceRequest) -> u32) -> LengthStats {
        let mut all: Vec<u32> = self.requests.iter().map(of).collect();
        all.sort_unstable();
        let sum: u64 = all.iter().map(|length| u64::from(*length)).sum();
        let rank = |percent: usize| all.get(all.len() * percent / 100).copied().unwrap_or_default();
        let most = all.last().copied().unwrap_or_default();
        LengthStats { mean: sum as f64 / all.len().max(1) as f64, p50: rank(50), p99: rank(99), most }
    }

    fn reuse(&self) -> Option<Reuse> {
        let size = self.block_size?.get();
        let mut seen: HashSet<BlockHash> = HashSet::new();
        let mut firsts: HashMap<BlockHash, u64> = HashMap::new();
        let (mut blocks, mut hits, mut tokens) = (0, 0, 0);
        for request in &self.requests {
            let chain = self.chain(request);
            // what was seen was seen with its prefix
            let known = chain.partition_point(|name| seen.contains(name));
            seen.extend(&chain[known..]);
            let input = u64::from(request.input);
            blocks += chain.len() as u64;
            tokens += input;
            hits += (known as u64).min((input - 1) / size) * size;
            if let Some(first) = chain.first() {
                *firsts.entry(*first).or_default() += 1;
            }
        }
        let unique = seen.len() as u64;
        let share = |part: u64, of: u64| if of > 0 { part as f64 / of as f64 } else { 0.0 };
        // no block is used more than the first of its chain
        let top = firsts.into_values().max().unwrap_or(0);
        Some(Reuse {
            blocks,
            unique,
            ratio: share(blocks - unique, blocks),
            ideal_hit: share(hits, tokens),
            top: share(top, self.requests.len() as u64),
        })
    }
}
