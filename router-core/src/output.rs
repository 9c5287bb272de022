//! How long answers are, measured: what S, the memory horizon, and the worth of a move are made from.

use crate::constants::{FIRST_SLICE, LEAST_SLICE, MEMORY, MOST_SLICE, SLICES_AN_OUTPUT};

/// The mean output of finished rows; recent ones count more.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct MeanOutput {
    mean: f64,
    rows: u64,
}

impl MeanOutput {
    /// A row ended by itself with so many tokens.
    pub(crate) fn observe(&mut self, tokens: usize) {
        self.rows += 1;
        let weight = (self.rows as f64).min(MEMORY).recip();
        self.mean += (tokens as f64 - self.mean) * weight;
    }

    /// Tokens; `None` before any row has ended.
    pub(crate) fn tokens(&self) -> Option<f64> {
        (self.rows > 0).then_some(self.mean)
    }

    /// S: iterations for which a batch's memory is promised.
    pub(crate) fn slice_len(&self) -> u32 {
        match self.tokens() {
            None => FIRST_SLICE,
            Some(mean) => ((mean / SLICES_AN_OUTPUT).round() as u32).clamp(LEAST_SLICE, MOST_SLICE),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn different_outputs_give_different_slices() {
        let after = |tokens: usize| {
            let mut mean = MeanOutput::default();
            (0..500).for_each(|_| mean.observe(tokens));
            mean.slice_len()
        };
        assert_eq!((after(3), after(273), after(600), after(100_000)), (16, 34, 75, 128));
        assert_eq!(MeanOutput::default().slice_len(), 32);
    }

    #[test]
    fn it_follows_a_change_of_load() {
        let mut mean = MeanOutput::default();
        (0..1000).for_each(|_| mean.observe(160));
        (0..1000).for_each(|_| mean.observe(800));
        assert!((90..=100).contains(&mean.slice_len()), "{}", mean.slice_len());
    }
}
