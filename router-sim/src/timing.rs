//! How long a modelled iteration takes.

use router_core::Micros;

/// Linear in what an iteration does.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Each iteration.
    pub step: Micros,
    /// More for each row in it.
    pub per_row: Micros,
    /// More for each prefill token, in nanoseconds.
    pub prefill_token_nanos: u64,
    /// Most prefill tokens of one iteration.
    pub chunk_tokens: u32,
}

impl Default for Timing {
    /// A small model on a CPU.
    fn default() -> Self {
        Self { step: Micros(4_000), per_row: Micros(50), prefill_token_nanos: 50_000, chunk_tokens: 512 }
    }
}

impl Timing {
    pub(crate) fn iteration(&self, rows: u64, prefill_tokens: u64) -> Micros {
        Micros(self.step.0 + self.per_row.0 * rows + self.prefill_token_nanos * prefill_tokens / 1000)
    }
}
