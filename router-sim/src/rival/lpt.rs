//! SCLS' offloader (arXiv 2406.13511) as far as it applies to single requests.

use super::forecast::Forecast;
use super::{Rival, Sight, rank};
use crate::device::Device;

/// The paper's slice length.
const SLICE: f64 = 128.0;

/// Least estimated load: seconds of the queued prefill and of one slice of decoding. It does not know prefixes.
///
/// Left out: batches, and the longest first among them; requests come one by one here.
pub struct SclsLpt(Forecast);

impl SclsLpt {
    pub(super) fn new(device: &Device) -> Self {
        Self(Forecast::new(device))
    }
}

impl Rival for SclsLpt {
    fn name(&self) -> String {
        "scls_lpt".to_owned()
    }

    fn scores(&mut self, sight: &Sight<'_>, scores: &mut Vec<u128>) {
        sight.each(scores, |at| {
            let decode = SLICE * self.0.tpot(&sight.engine(at), 0);
            rank(self.0.queue(sight, at) + decode)
        });
    }
}
