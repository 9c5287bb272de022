//! The product with other indicators, for their ablation: what each part of `(Q + u) * (b + 1)` is for.

use super::forecast::Forecast;
use super::{Rival, Sight, rank, then};
use crate::device::Device;

/// Which product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Indicator {
    /// `u * (b + 1)`: without Q. As the prompt's length cancels, it is `(1 - hit share) * (b + 1)` too.
    HitRatio,
    /// `(Q + u) * tokens`: all rows' tokens, this prompt's too, in the place of b.
    Tokens,
    /// `(Q + u) * b`: without the row itself.
    PlainBatch,
    /// `Q + u * (b + 1)`: without what the rows there wait for the queue.
    Sum,
    /// The product; of equals the first worker.
    FirstTie,
}

impl Indicator {
    pub(super) const ALL: [(&'static str, Self); 5] = [
        ("product_hit_ratio", Self::HitRatio),
        ("product_tokens", Self::Tokens),
        ("product_plain_batch", Self::PlainBatch),
        ("product_sum", Self::Sum),
        ("product_first_tie", Self::FirstTie),
    ];
}

/// A product of other indicators.
pub struct Variant(pub(super) Indicator);

impl Rival for Variant {
    fn name(&self) -> String {
        let (name, _) = Indicator::ALL[self.0 as usize];
        name.to_owned()
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        sight.each(scores, |at| {
            let (queued, new) = (u128::from(sight.queued(at)), u128::from(sight.fresh(at)));
            let (rows, tokens) = (u128::from(sight.batch(at)), u128::from(sight.engine(at).tokens.0));
            match self.0 {
                Indicator::HitRatio => new * (rows + 1),
                Indicator::Tokens => (queued + new) * (tokens + u128::from(sight.seen.tokens.0)),
                Indicator::PlainBatch => (queued + new) * rows,
                Indicator::Sum => queued + new * (rows + 1),
                Indicator::FirstTie => then((queued + new) * (rows + 1), at as u64),
            }
        });
    }
}

/// `seconds of Q + u * (b + 1)`: the product with prefill in seconds, attention counted.
pub struct ProductSeconds(Forecast);

impl ProductSeconds {
    pub(super) fn new(device: &Device) -> Self {
        Self(Forecast::new(device))
    }
}

impl Rival for ProductSeconds {
    fn name(&self) -> String {
        "product_seconds".to_owned()
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        sight.each(scores, |at| rank(self.0.prefill_ttft(sight, at) * (sight.batch(at) + 1) as f64));
    }
}
