//! Policies of others, each with the weights of its source, behind one trait; what is compared with the product.
//!
//! One file a source. Each says the rule, where it is from, and what of it is simplified. They see what the core's policies
//! see ([`Seen`]) and what engines say of themselves ([`Engine`]), and may remember. Who is asked for by name is made by
//! [`make`].

mod aibrix;
mod bailian;
mod core;
mod d2lpm;
mod dual_map;
mod dynamo;
mod forecast;
mod hits;
mod indicators;
mod linear;
mod llm_d;
mod llumnix;
mod load;
mod lpt;
mod min_ttft;
mod mooncake;
mod names;
mod polyserve;
mod preble;
mod product_time;
mod production_stack;
mod sglang;
mod smetric;
mod sticky;
#[cfg(test)]
mod tests;

use router_core::{BlockHash, BlockSize, Blocks, Candidate, Micros, Seen, Tokens};

pub use self::core::Core;
pub use self::names::{RivalError, make, names};

/// What an engine said of itself last, with the decisions since.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Engine {
    /// Rows of its batch.
    pub running: u64,
    /// Rows that wait for a place in it, those on their way included.
    pub waiting: u64,
    /// Tokens, prompt and output so far, of all of these.
    pub tokens: Tokens,
    /// Blocks in use by rows.
    pub used: Blocks,
    /// Blocks cached and unused.
    pub cached: Blocks,
    /// All its blocks.
    pub blocks: Blocks,
}

/// What a rival sees: all that the core's policies see, and what they do not need.
#[derive(Clone, Copy, Debug)]
pub struct Sight<'a> {
    /// Time.
    pub now: Micros,
    /// Prompt length, u, Q and b of each candidate.
    pub seen: &'a Seen,
    /// One for each candidate, in the same order.
    pub engines: &'a [Engine],
    /// The conversation, where known.
    pub session: Option<u32>,
    /// Its place in the conversation: 0 begins one.
    pub turn: u32,
    /// Its workload class, as the trace numbers them.
    pub class: u16,
    /// Names of the prompt's whole blocks, each that of the whole prefix.
    pub chain: &'a [BlockHash],
    /// Tokens of a block.
    pub size: BlockSize,
}

impl Sight<'_> {
    /// Candidates.
    fn count(&self) -> usize {
        self.seen.candidates.len()
    }

    fn at(&self, at: usize) -> &Candidate {
        &self.seen.candidates[at]
    }

    fn engine(&self, at: usize) -> Engine {
        self.engines.get(at).copied().unwrap_or_default()
    }

    /// The candidate's number among all workers, for those who remember workers.
    fn worker(&self, at: usize) -> usize {
        self.at(at).worker.0 as usize
    }

    /// b.
    fn batch(&self, at: usize) -> u64 {
        self.at(at).batch_size
    }

    /// u: at least 1.
    fn fresh(&self, at: usize) -> u64 {
        self.at(at).new_tokens.0.max(1)
    }

    /// Q.
    fn queued(&self, at: usize) -> u64 {
        self.at(at).queued.0
    }

    /// Prompt tokens that it holds.
    fn hit(&self, at: usize) -> u64 {
        self.seen.tokens.0.saturating_sub(self.fresh(at))
    }

    /// The part of the prompt that it holds.
    fn share(&self, at: usize) -> f64 {
        self.hit(at) as f64 / self.seen.tokens.0.max(1) as f64
    }

    /// One score for each candidate.
    fn each(&self, scores: &mut Vec<u128>, score: impl FnMut(usize) -> u128) {
        scores.extend((0..self.count()).map(score));
    }

    /// The largest of all candidates; 0 of none.
    fn most(&self, value: impl Fn(usize) -> u64) -> u64 {
        (0..self.count()).map(value).max().unwrap_or(0)
    }

    /// The smallest of all candidates; 0 of none.
    fn least(&self, value: impl Fn(usize) -> u64) -> u64 {
        (0..self.count()).map(value).min().unwrap_or(0)
    }
}

/// A policy with a memory of its own. The smallest score wins; ties as in the core.
pub trait Rival: Send {
    /// Its name with its weights, as on the command line.
    fn name(&self) -> String;
    /// One score for each candidate, appended to the empty `scores`.
    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>);
    /// Whether it asks what engines say of themselves: who does not is asked sooner in a large fleet.
    fn asks_engines(&self) -> bool {
        true
    }
    /// Its choice was made: the candidate `at`.
    fn chosen(&mut self, _sight: &Sight<'_>, _at: usize) {}
    /// An engine said that a request has ended, after so many tokens.
    fn ended(&mut self, _output: u32) {}
}

/// A score of a number: as numbers order, so do their scores. What is no number is the worst.
pub fn rank(score: f64) -> u128 {
    if score.is_nan() {
        return u128::MAX;
    }
    // both zeros are one
    let bits = (score + 0.0).to_bits();
    u128::from(if bits >> 63 == 1 { !bits } else { bits | 1 << 63 })
}

/// A score of two: the second decides where the first is equal.
fn then(first: u128, second: u64) -> u128 {
    (first << 64) | u128::from(second)
}

/// A value remembered for each worker, by its number.
fn slot<T: Default>(all: &mut Vec<T>, worker: usize) -> &mut T {
    if all.len() <= worker {
        all.resize_with(worker + 1, T::default);
    }
    &mut all[worker]
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn ranks_order_as_numbers_do() {
        let numbers = [f64::NEG_INFINITY, -2.0, -1e-300, 0.0, 1e-300, 0.5, 3.0, f64::INFINITY];
        assert!(numbers.windows(2).all(|pair| rank(pair[0]) < rank(pair[1])));
        assert!(rank(f64::NAN) > rank(f64::INFINITY));
        assert_eq!(rank(-0.0), rank(0.0));
        assert!(then(rank(1.0), u64::MAX) < then(rank(1.0 + f64::EPSILON), 0));
    }
}
