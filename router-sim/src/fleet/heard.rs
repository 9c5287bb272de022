//! What the router was told of an engine, and what it sent it since.

use std::collections::VecDeque;

use router_core::{Blocks, Micros, Tokens};

use crate::continuous::Standing;
use crate::rival;

/// One engine as it is known from outside.
#[derive(Debug, Default)]
pub(super) struct Heard {
    pub(super) standing: Standing,
    /// Prompts sent that are not in `standing`, their tokens, and how many were sent over all time.
    since: VecDeque<u32>,
    tokens: u64,
    sent: u64,
}

impl Heard {
    pub(super) fn sent(&mut self, prompt: u32) {
        self.sent += 1;
        self.tokens += u64::from(prompt);
        self.since.push_back(prompt);
    }

    pub(super) fn hear(&mut self, standing: Standing) {
        self.standing = standing;
        let unknown = self.sent.saturating_sub(standing.taken) as usize;
        for prompt in self.since.drain(..self.since.len().saturating_sub(unknown)) {
            self.tokens -= u64::from(prompt);
        }
    }

    /// As rivals see it; `at` is the time that feedback of now is from. If `blind`, without what was sent since.
    pub(super) fn engine(&self, at: Micros, blocks: Blocks, blind: bool) -> rival::Engine {
        let (rows, tokens) = if blind { (0, 0) } else { (self.since.len() as u64, self.tokens) };
        rival::Engine {
            running: self.standing.running,
            waiting: self.standing.waiting + rows,
            tokens: Tokens(self.standing.tokens_at(at) + tokens),
            used: Blocks(self.standing.used),
            cached: Blocks(self.standing.cached),
            blocks,
        }
    }
}
