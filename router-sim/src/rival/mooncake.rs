//! Mooncake's Conductor (kvcache-ai/Mooncake, arXiv 2407.00079), without transfers.

use super::forecast::Forecast;
use super::{Rival, Sight, rank};
use crate::device::Device;

/// Least time in the queue and in the prefill, both of prefill work alone: its prefill workers do not decode.
///
/// Left out: copying KV from the worker that holds most of the prompt (no transfers are modelled, so each prefills from what it
/// holds), refusing requests above the objective, and decode workers of their own.
pub struct Mooncake(Forecast);

impl Mooncake {
    pub(super) fn new(device: &Device) -> Self {
        Self(Forecast::new(device))
    }
}

impl Rival for Mooncake {
    fn name(&self) -> String {
        "mooncake".to_owned()
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        sight.each(scores, |at| rank(self.0.prefill_ttft(sight, at)));
    }
}
