//! Policies of others, each with the weights of its source, behind one trait; what is compared with the product.

use router_core::{BlockHash, BlockSize, Blocks, Micros, Seen, Tokens};

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

/// A policy with a memory of its own. The smallest score wins; ties as in the core.
pub trait Rival: Send {
    /// Its name with its weights, as on the command line.
    fn name(&self) -> String;
    /// One score for each candidate, appended to the empty `scores`.
    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>);
    /// Its choice was made: the candidate `at`.
    fn chosen(&mut self, _sight: &Sight<'_>, _at: usize) {}
}

/// A score of a number: as numbers order, so do their scores. What is no number is the worst.
pub fn rank(score: f64) -> u128 {
    if score.is_nan() {
        return u128::MAX;
    }
    let bits = score.to_bits();
    u128::from(if bits >> 63 == 1 { !bits } else { bits | 1 << 63 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_order_as_numbers_do() {
        let numbers = [f64::NEG_INFINITY, -2.0, -1e-300, 0.0, 1e-300, 0.5, 3.0, f64::INFINITY];
        assert!(numbers.windows(2).all(|pair| rank(pair[0]) < rank(pair[1])));
        assert!(rank(f64::NAN) > rank(f64::INFINITY));
    }
}
