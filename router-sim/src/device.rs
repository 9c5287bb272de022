//! A kind of worker: how long its iterations take, and what fits into it. Written in a file of `models/`, each coefficient
//! with where it comes from.

use router_core::{Micros, Tokens};

use crate::timing::Law;

/// A model on a device.
#[derive(Clone, Debug)]
pub struct Device {
    /// Such as `7b-h20`.
    pub name: String,
    /// Seconds of an iteration, without host time.
    pub law: Law,
    /// Tokens of KV that fit.
    pub kv: Tokens,
    /// Most tokens of an iteration, prefill chunks and decoding rows together.
    pub chunk: u32,
    /// Most rows of a batch.
    pub max_rows: u32,
    /// Host time of an iteration of an iteration-level engine that the device waits for. `h` of the study.
    pub host: Micros,
    /// What a slice start exposes. `o` of the study.
    pub start: Micros,
}
