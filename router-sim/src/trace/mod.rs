//! Request traces: who came when, with how long a prompt, sharing which blocks, and how long the answer was.

use router_core::{BlockHash, BlockSize, Micros};

/// A request of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceRequest {
    /// When it came, from the trace's start.
    pub at: Micros,
    /// Tokens of its prompt, at least one.
    pub input: u32,
    /// Tokens of its answer, at least one. No scheduler may read it.
    pub output: u32,
    /// Where its chain begins in the trace's blocks, and how many whole blocks it has.
    pub chain: (u32, u32),
    /// Its conversation, where known: dense, from 0.
    pub session: Option<u32>,
    /// Its place in the conversation.
    pub turn: u32,
    /// Its workload class: a place in [`Trace::classes`].
    pub class: u16,
}

/// Requests in order of arrival.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// For tables and files.
    pub name: String,
    /// Tokens of a block; `None` where prompts share nothing that is known.
    pub block_size: Option<BlockSize>,
    /// Sorted by `at`.
    pub requests: Vec<TraceRequest>,
    /// All chains, one after another. Names are chained: one name stands for the whole prefix that ends with it.
    pub blocks: Vec<BlockHash>,
    /// Names of workload classes.
    pub classes: Vec<String>,
}

impl Trace {
    /// Names of the request's whole blocks.
    pub fn chain(&self, request: &TraceRequest) -> &[BlockHash] {
        let (start, len) = (request.chain.0 as usize, request.chain.1 as usize);
        &self.blocks[start..start + len]
    }
}
