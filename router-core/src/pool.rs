//! A model pool: workers that serve the same model and may stand in for one another.

use crate::cost::{CostModel, Layout};
use crate::ids::Epoch;
use crate::units::{BlockSize, Tokens};

/// What a worker announces of itself, as far as the core needs it.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkerSpec {
    /// Its name, for people and logs.
    pub name: String,
    /// This start of the process.
    pub epoch: Epoch,
    /// What it serves.
    pub model: ModelSpec,
    /// KV blocks.
    pub blocks: crate::units::Blocks,
    /// Most rows of a batch, at least one.
    pub max_rows: u32,
    /// Most tokens of prompt and output together.
    pub max_context: Tokens,
    /// Most prefill tokens of one iteration.
    pub chunk: Tokens,
    /// Whether it pads.
    pub layout: Layout,
    /// What work costs on it, where it was measured.
    pub cost: Option<CostModel>,
}

/// What all workers of a pool have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelSpec {
    /// Digest of weights and configuration.
    pub digest: String,
    /// Digest of tokenizer and chat template.
    pub tokenizer: String,
    /// Tokens a block.
    pub block_size: BlockSize,
    /// Ids below this one exist.
    pub vocab: u32,
}

/// Why a worker cannot join a pool: what differs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} differs from the pool's: {theirs}\nthe pool has {ours}")]
pub struct Mismatch {
    what: &'static str,
    theirs: String,
    ours: String,
}

impl ModelSpec {
    /// An error that names the first difference.
    pub fn check(&self, other: &Self) -> Result<(), Mismatch> {
        let pairs = [
            ("model digest", &self.digest, &other.digest),
            ("tokenizer digest", &self.tokenizer, &other.tokenizer),
            ("block size", &self.block_size.get().to_string(), &other.block_size.get().to_string()),
            ("vocabulary", &self.vocab.to_string(), &other.vocab.to_string()),
        ];
        match pairs.into_iter().find(|(_, ours, theirs)| ours != theirs) {
            None => Ok(()),
            Some((what, ours, theirs)) => Err(Mismatch { what, theirs: theirs.clone(), ours: ours.clone() }),
        }
    }
}

impl WorkerSpec {
    /// Most tokens a row may ever have here: context, and KV memory (the last token drawn is never computed).
    pub fn most_tokens(&self) -> Tokens {
        let memory = self.blocks.0.saturating_mul(self.model.block_size.get()).saturating_add(1);
        Tokens(memory.min(self.max_context.0))
    }
}
