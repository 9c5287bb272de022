//! A prompt as the router needs it: how long it is and what its blocks are called.

use std::sync::Arc;

use crate::block::{BlockHash, hash_blocks};
use crate::units::{BlockSize, Tokens};

/// A hashed prompt. Making one is most of the work of a decision and needs no router.
#[derive(Clone, Debug)]
pub struct Prompt {
    pub(super) tokens: Tokens,
    /// The root, then one hash for each whole block.
    names: Arc<[BlockHash]>,
    /// Ids after the last whole block.
    tail: Box<[u32]>,
    size: BlockSize,
}

impl Prompt {
    /// Hashes the whole blocks of `ids`.
    pub fn new(root: BlockHash, ids: &[u32], size: BlockSize) -> Self {
        let names: Arc<[BlockHash]> = std::iter::once(root).chain(hash_blocks(root, ids, size)).collect();
        let tail = ids.chunks_exact(size.get() as usize).remainder().into();
        Self { tokens: Tokens(ids.len() as u64), names, tail, size }
    }

    /// A prompt whose blocks have names already. What its output completes is not known then.
    pub fn named(root: BlockHash, chain: &[BlockHash], tokens: Tokens, size: BlockSize) -> Self {
        let names = std::iter::once(root).chain(chain.iter().copied()).collect();
        Self { tokens, names, tail: Box::new([]), size }
    }

    /// Hashes of its whole blocks.
    pub fn chain(&self) -> &[BlockHash] {
        &self.names[1..]
    }

    /// Hashes of the blocks that `output` completes. The KV of the last token drawn is never computed.
    pub(super) fn continued(&self, output: &[u32]) -> Vec<BlockHash> {
        let computed = &output[..output.len().saturating_sub(1)];
        let ids: Vec<u32> = self.tail.iter().chain(computed).copied().collect();
        hash_blocks(self.names[self.names.len() - 1], &ids, self.size)
    }
}
