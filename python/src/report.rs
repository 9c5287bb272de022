//! What a worker's driver says in Python, on its way to the core: anything with the attributes of the classes in
//! `scls_router.scheduling`.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use router_core::{BatchEnd, Blocks, FinishReason, Micros, PlanNo, Refusal, RequestId, Tokens};

use crate::action::{ENDS, FINISHES, Words};
use crate::ids::ids;

const REFUSALS: &Words<Refusal> = &[
    ("stale", Refusal::Stale),
    ("no_memory", Refusal::NoMemory),
    ("too_many_rows", Refusal::TooManyRows),
    ("unknown_row", Refusal::UnknownRow),
    ("unsupported", Refusal::Unsupported),
];

fn named<T: Copy>(what: &str, words: &'static Words<T>, given: &str) -> PyResult<T> {
    words.iter().find(|(word, _)| *word == given).map(|(_, thing)| *thing).ok_or_else(|| {
        let all: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        PyValueError::new_err(format!("no such {what}: {given}\nthere are {}", all.join(", ")))
    })
}

/// Seconds of a clock or a duration: finite and not negative.
pub(crate) fn micros(what: &str, seconds: f64) -> PyResult<Micros> {
    if seconds.is_finite() && seconds >= 0.0 {
        return Ok(router_core::micros(seconds));
    }
    Err(PyValueError::new_err(format!("{what} is in seconds, finite and not negative: got {seconds}")))
}

pub(crate) fn refusal(reason: &str) -> PyResult<Refusal> {
    named("reason of a refusal", REFUSALS, reason)
}

fn finish(given: Option<&str>) -> PyResult<Option<FinishReason>> {
    given.map(|reason| named("finish reason", FINISHES, reason)).transpose()
}

fn end(given: &str) -> PyResult<BatchEnd> {
    named("end of a batch", ENDS, given)
}

#[derive(Clone, Copy, FromPyObject)]
pub(crate) struct RowKey {
    request: u64,
    choice: u32,
    attempt: u32,
}

impl From<RowKey> for router_core::RowKey {
    fn from(key: RowKey) -> Self {
        let row = router_core::RowId { request: RequestId(key.request), choice: key.choice };
        Self { row, attempt: key.attempt }
    }
}

#[derive(FromPyObject)]
pub(crate) struct RowTokens<'py> {
    key: RowKey,
    first_index: u32,
    /// Read later: what is wrong with them is not to be hidden behind the name of this field.
    ids: Bound<'py, PyAny>,
    finish: Option<String>,
    cached: Option<u64>,
}

impl RowTokens<'_> {
    pub(crate) fn into_core(self) -> PyResult<router_core::RowTokens> {
        Ok(router_core::RowTokens {
            key: self.key.into(),
            first_index: self.first_index,
            ids: ids(&self.ids)?,
            logprobs: Vec::new(),
            finish: finish(self.finish.as_deref())?,
            cached: self.cached.map(Tokens),
        })
    }
}

#[derive(FromPyObject)]
struct RowReport {
    key: RowKey,
    computed: u64,
    emitted: u64,
    cached: u64,
    finish: Option<String>,
    held: bool,
    prefill_left: u64,
}

impl RowReport {
    fn into_core(self) -> PyResult<router_core::RowReport> {
        Ok(router_core::RowReport {
            key: self.key.into(),
            computed: Tokens(self.computed),
            cached: Tokens(self.cached),
            emitted: Tokens(self.emitted),
            finish: finish(self.finish.as_deref())?,
            held: self.held,
            prefill_left: Tokens(self.prefill_left),
        })
    }
}

#[derive(FromPyObject)]
pub(crate) struct SliceReport {
    batch: u64,
    end: String,
    steps: u32,
    rows: Vec<RowReport>,
    next: Option<u64>,
    prefill: f64,
    decode: f64,
    peak: u64,
    idle: f64,
    pad: u64,
    invalid: u64,
}

impl SliceReport {
    pub(crate) fn into_core(self) -> PyResult<router_core::SliceReport> {
        Ok(router_core::SliceReport {
            batch: PlanNo(self.batch),
            end: end(&self.end)?,
            next: self.next.map(PlanNo),
            steps: self.steps,
            prefill: micros("prefill", self.prefill)?,
            decode: micros("decode", self.decode)?,
            peak: Blocks(self.peak),
            idle: micros("idle", self.idle)?,
            pad: Tokens(self.pad),
            invalid: Tokens(self.invalid),
            rows: self.rows.into_iter().map(RowReport::into_core).collect::<PyResult<_>>()?,
        })
    }
}
