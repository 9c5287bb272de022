//! Chained block hashes: the hash of a block names the whole prefix that ends with it.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::units::{BlockSize, Tokens};

/// The name of a prefix of whole blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockHash(pub u64);

/// Hashes of the whole blocks of `ids`: `h[i] = xxh3_64(block i as little-endian u32, seed = h[i-1])`, `h[-1] = root`.
///
/// A prefix of the input has a prefix of the hashes; a partial last block has none.
///
/// ```
/// use router_core::{BlockHash, BlockSize, hash_blocks};
/// let size = BlockSize::new(2).expect("not zero");
/// let all = hash_blocks(BlockHash(7), &[1, 2, 3, 4, 5], size);
/// assert_eq!(all.len(), 2);
/// assert_eq!(all[..1], hash_blocks(BlockHash(7), &[1, 2, 9], size)[..]);
/// ```
pub fn hash_blocks(root: BlockHash, ids: &[u32], size: BlockSize) -> Vec<BlockHash> {
    let size = size.get() as usize;
    let mut hashes = Vec::with_capacity(ids.len() / size);
    // A block size may be a stranger's, and of any size.
    if ids.len() < size {
        return Vec::new();
    }
    let mut bytes = vec![0; size * 4];
    let mut parent = root;
    for block in ids.chunks_exact(size) {
        // Into place, id by id: this becomes a copy, where extending by the bytes of each id does not.
        for (bytes, id) in bytes.as_chunks_mut().0.iter_mut().zip(block) {
            *bytes = id.to_le_bytes();
        }
        parent = BlockHash(xxh3_64_with_seed(&bytes, parent.0));
        hashes.push(parent);
    }
    hashes
}

/// The root of a chain, folded from what must never share KV: fleet key, model digest, adapter, tenant.
pub fn hash_root(parts: &[&str]) -> BlockHash {
    // Each part is hashed by itself before it is chained, so ("ab", "c") and ("a", "bc") differ.
    BlockHash(parts.iter().fold(0, |seed, part| xxh3_64_with_seed(part.as_bytes(), seed)))
}

/// Tokens a worker must compute for `len` known tokens of which `hit` leading blocks are cached.
///
/// An engine computes at least the last token, so of the cached blocks at most `(len - 1) / size` count and the
/// result is at least 1: a product of it can never be an absorbing zero.
pub fn new_tokens(len: Tokens, hit: usize, size: BlockSize) -> Tokens {
    let most = len.0.saturating_sub(1) / size.get();
    Tokens((len.0 - (hit as u64).min(most) * size.get()).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(n: u32) -> BlockSize {
        BlockSize::new(n).expect("not zero")
    }

    #[test]
    fn vectors_shared_with_python() {
        // from the reference implementation, as in python/tests/test_hash_blocks.py
        assert_eq!(hash_blocks(BlockHash(0), &[0; 16], size(16)), [BlockHash(3_457_472_693_978_015_086)]);
        let hashes = hash_blocks(BlockHash(0), &(0..32).collect::<Vec<u32>>(), size(16));
        let again = hash_blocks(hashes[0], &(16..32).collect::<Vec<u32>>(), size(16));
        assert_eq!(hashes[1], again[0]);
        assert_ne!(hash_blocks(BlockHash(1), &[0; 16], size(16)), hash_blocks(BlockHash(0), &[0; 16], size(16)));
    }

    #[test]
    fn a_block_larger_than_all_memory_is_never_whole() {
        assert!(hash_blocks(BlockHash(0), &[0; 16], size(u32::MAX)).is_empty());
    }

    #[test]
    fn new_tokens_counts_whole_blocks_and_never_zero() {
        let cases = [(33, 0, 33), (33, 1, 17), (33, 2, 1), (32, 2, 16), (32, 1, 16), (1, 0, 1), (16, 1, 16), (0, 0, 1)];
        for (len, hit, want) in cases {
            assert_eq!(new_tokens(Tokens(len), hit, size(16)), Tokens(want), "len {len} hit {hit}");
        }
    }

    #[test]
    fn roots_differ_by_part() {
        assert_ne!(hash_root(&["ab", "c"]), hash_root(&["a", "bc"]));
        assert_ne!(hash_root(&["a", ""]), hash_root(&["a"]));
    }
}
