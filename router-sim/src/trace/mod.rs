//! Request traces: who came when, with how long a prompt, sharing which blocks, and how long the answer was.
//!
//! Readers take bytes (the file system is the shell's), gzipped or not, and find the format from the content: see
//! [`Format`]. What is read is checked; [`TraceError`] says which line is wrong and what to do.
//!
//! # The project's own schema
//! JSON Lines: one object a request, sorted by `arrival_s`.
//!
//! | field | type | meaning |
//! |---|---|---|
//! | `arrival_s` | number | seconds |
//! | `input_tokens` | integer | tokens of the prompt, at least 1 |
//! | `output_tokens` | integer | tokens of the answer, at least 1 |
//! | `block_hashes` | list of integers | ids of the prompt's blocks in order, `ceil(input_tokens / block_size)` of them, or none |
//! | `block_runs` | list of `[first, count]` | the same where ids follow one another, instead of `block_hashes` |
//! | `session` | string or null | the conversation, where known |
//! | `turn` | integer or null | its place in the conversation |
//! | `class` | string | workload class |
//!
//! The first line may be a header instead, `{"trace": NAME, "block_size": TOKENS}`; without one the block size is given by whoever
//! reads (`NAME.meta.json` beside the file has it: [`block_size_in_meta`]). Other fields are read over.
//!
//! Two prompts share a prefix as far as their ids are equal from the front: an id means nothing without those before it, so they
//! are folded into chained names. Only whole blocks count, as engines cache no others.

mod burst;
mod csv;
mod error;
mod jsonl;
mod names;
mod read;
mod scale;
mod stats;
mod synthetic;

use router_core::{BlockHash, BlockSize, Micros};

pub use burst::Burst;
pub use error::{Problem, TraceError};
pub use read::{Format, Reading, block_size_in_meta};
pub use stats::{LengthStats, Reuse, Stats};

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
    /// Chains, which may overlap: a prompt that another continues has no place of its own. Names are chained: one name stands for
    /// the whole prefix that ends with it.
    pub blocks: Vec<BlockHash>,
    /// Names of workload classes.
    pub classes: Vec<String>,
}

impl Trace {
    /// Tokens of a KV block where the trace says nothing of it.
    pub const BLOCK: BlockSize = match BlockSize::new(16) {
        Some(size) => size,
        None => unreachable!(),
    };

    /// Names of the request's whole blocks.
    pub fn chain(&self, request: &TraceRequest) -> &[BlockHash] {
        let (start, len) = (request.chain.0 as usize, request.chain.1 as usize);
        &self.blocks[start..start + len]
    }

    /// One more than the highest session number.
    pub(crate) fn sessions(&self) -> u32 {
        self.requests.iter().filter_map(|request| request.session).max().map_or(0, |last| last + 1)
    }

    /// The place of a class's name.
    pub(crate) fn class(&mut self, name: &str) -> Option<u16> {
        let at = self.classes.iter().position(|class| class == name).unwrap_or_else(|| {
            self.classes.push(name.to_owned());
            self.classes.len() - 1
        });
        u16::try_from(at).ok()
    }
}
