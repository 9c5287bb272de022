//! Least simulated time to first token, as llm-d's latency scorer and others do.

use super::forecast::Forecast;
use super::{Rival, Sight, rank};
use crate::device::Device;

/// Least seconds until the first token: the queue, then the prompt's new tokens, in chunks beside the rows that decode.
///
/// llm-d predicts by a model learnt online; here it is the device's own law.
pub struct MinTtft(Forecast);

impl MinTtft {
    pub(super) fn new(device: &Device) -> Self {
        Self(Forecast::new(device))
    }
}

impl Rival for MinTtft {
    fn name(&self) -> String {
        "min_ttft".to_owned()
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        sight.each(scores, |at| rank(self.0.ttft(sight, at)));
    }
}
