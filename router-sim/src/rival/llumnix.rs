//! Llumnix (arXiv 2406.03243): the half that dispatches.

use router_core::Tokens;

use super::{Rival, Sight, rank};

/// Most freeness: `(blocks - virtual usage) / batch`, where the virtual usage is what running rows have and waiting rows will need.
///
/// Left out: migration, which is its other half, and the headroom of priorities. What waiting rows need is their queued prefill.
pub struct Llumnix;

impl Rival for Llumnix {
    fn name(&self) -> String {
        "llumnix".to_owned()
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        sight.each(scores, |at| {
            let engine = sight.engine(at);
            let usage = engine.used + Tokens(sight.queued(at)).blocks(sight.size);
            let free = engine.blocks.0 as f64 - usage.0 as f64;
            rank(-free / sight.batch(at).max(1) as f64)
        });
    }
}
