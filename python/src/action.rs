//! Actions and records of the scheduler on their way to Python: values of `scls_router.scheduling`.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyTuple;
use router_core::{
    Action, Band, BatchEnd, BatchRecord, BlockHash, Decision, FinishReason, Keep, Micros, Plan, Rejection, RowEnd,
    RowId, RowKey, RowStart, Sighting, WorkerId, WorkerLoad,
};

use crate::class::Class;

const MODULE: &str = "scls_router.scheduling";

macro_rules! classes {
    ($($class:ident = $name:literal),* $(,)?) => { $(static $class: Class = Class::new(MODULE, $name);)* };
}

classes! {
    BAND = "Band", BATCH_OUTCOME = "BatchOutcome", BATCH_RECORD = "BatchRecord", CANDIDATE = "Candidate", CUT = "Cut",
    DECISION = "Decision", DROP = "Drop", FINISH = "Finish", HOTSPOT = "Hotspot", PLACED = "Placed", PLAN = "Plan", QUARANTINE = "Quarantine",
    REJECT = "Reject", RELEASE_KV = "ReleaseKv", RESYNC = "Resync", ROW_ID = "RowId", ROW_KEY = "RowKey",
    ROW_START = "RowStart", TOKENS = "Tokens", WAKE_AT = "WakeAt", WORKER_LOAD = "WorkerLoad",
}

/// What Python calls a thing and what the core does.
pub(crate) type Words<T> = [(&'static str, T)];

pub(crate) const FINISHES: &Words<FinishReason> = &[
    ("stop", FinishReason::Stop),
    ("length", FinishReason::Length),
    ("cancelled", FinishReason::Cancelled),
    ("error", FinishReason::Error),
];

pub(crate) const ENDS: &Words<BatchEnd> = &[
    ("steps", BatchEnd::Steps),
    ("all_done", BatchEnd::AllDone),
    ("cut", BatchEnd::Cut),
    ("backpressure", BatchEnd::Backpressure),
    ("error", BatchEnd::Error),
];

fn word<T: PartialEq>(words: &'static Words<T>, thing: &T) -> &'static str {
    words.iter().find(|(_, known)| known == thing).map_or("error", |(word, _)| word)
}

pub(crate) fn seconds(time: Micros) -> f64 {
    time.0 as f64 / 1e6
}

/// The worker whose name the action needs.
pub(crate) fn worker_of(action: &Action) -> Option<WorkerId> {
    match action {
        Action::Plan(worker, _)
        | Action::Cut(worker, _)
        | Action::Drop(worker, _)
        | Action::ReleaseKv(worker, _)
        | Action::Resync(worker)
        | Action::Quarantine(worker, _)
        | Action::Placed(_, worker, _) => Some(*worker),
        Action::Finish(_, end) => end.worker,
        Action::Tokens { .. } | Action::Reject(..) | Action::WakeAt(_) => None,
    }
}

/// A prompt's ids as Python has them, shared by the plans that name it.
pub(crate) type Prompt = Arc<Py<PyTuple>>;

/// The action, with the name of its worker and the prompts of its new rows, as far as they are at hand.
pub(crate) fn action<'py>(
    py: Python<'py>,
    action: Action,
    name: Option<Arc<str>>,
    prompts: &[Option<Prompt>],
) -> PyResult<Bound<'py, PyAny>> {
    let worker = name.as_deref();
    match action {
        Action::Plan(_, plan) => self::plan(py, &plan, worker, prompts),
        Action::Cut(_, batch) => CUT.of(py, (worker, batch.0)),
        Action::Drop(_, rows) => DROP.of(py, (worker, keys(py, &rows)?)),
        Action::ReleaseKv(_, rows) => RELEASE_KV.of(py, (worker, keys(py, &rows)?)),
        Action::Resync(_) => RESYNC.of(py, (worker,)),
        Action::Quarantine(_, why) => QUARANTINE.of(py, (worker, why)),
        Action::Placed(row, _, eta) => PLACED.of(py, (row_id(py, row)?, worker, band(py, eta)?)),
        Action::Tokens { row, first_index, ids, logprobs: _ } => {
            TOKENS.of(py, (row_id(py, row)?, first_index, PyTuple::new(py, ids)?))
        }
        Action::Finish(row, end) => finish(py, row, end, worker),
        Action::Reject(request, why) => {
            let (word, retry_after) = match why {
                Rejection::NoWorker => ("no_worker", None),
                Rejection::NeverFits { .. } => ("never_fits", None),
                Rejection::Overloaded { retry_after } => ("overloaded", Some(seconds(retry_after))),
                Rejection::Empty => ("empty", None),
            };
            REJECT.of(py, (request.0, word, why.to_string(), retry_after))
        }
        Action::WakeAt(at) => WAKE_AT.of(py, (seconds(at),)),
    }
}

fn plan<'py>(
    py: Python<'py>,
    plan: &Plan,
    worker: Option<&str>,
    prompts: &[Option<Prompt>],
) -> PyResult<Bound<'py, PyAny>> {
    let keep = match &plan.keep {
        Keep::Survivors => None,
        Keep::List(rows) => Some(keys(py, rows)?),
    };
    let leave = keys(py, &plan.leave)?;
    let add = tuple(py, plan.add.iter().zip(prompts).map(|(start, prompt)| row_start(py, start, prompt.as_deref())))?;
    let rank = |(key, rank): &(RowKey, u64)| Ok((row_key(py, *key)?, *rank).into_pyobject(py)?.into_any());
    let ranks = tuple(py, plan.ranks.iter().map(rank))?;
    PLAN.of(py, (worker, plan.no.0, plan.base.0, keep, leave, add, plan.steps, plan.ceiling.0, ranks))
}

fn row_start<'py>(py: Python<'py>, start: &RowStart, prompt: Option<&Py<PyTuple>>) -> PyResult<Bound<'py, PyAny>> {
    let prompt = match prompt {
        Some(prompt) => prompt.bind(py).clone(),
        None => PyTuple::new(py, start.prompt.iter())?,
    };
    let BlockHash(root) = start.root;
    ROW_START.of(
        py,
        (
            row_key(py, start.key)?,
            start.slice_no,
            root,
            prompt,
            PyTuple::new(py, start.output.iter())?,
            start.max_tokens.0,
            start.hold_rank,
            start.prefill_budget.0,
        ),
    )
}

fn finish<'py>(py: Python<'py>, row: RowId, end: RowEnd, worker: Option<&str>) -> PyResult<Bound<'py, PyAny>> {
    let reason = word(FINISHES, &end.reason);
    let RowEnd { error, prompt, cached, emitted, slices, .. } = end;
    FINISH.of(py, (row_id(py, row)?, reason, error, prompt.0, cached.0, emitted.0, slices, worker))
}

/// A decision; `names` are those of its candidates.
pub(crate) fn decision<'py>(
    py: Python<'py>,
    decision: &Decision,
    names: &[Option<Arc<str>>],
) -> PyResult<Bound<'py, PyAny>> {
    let candidates = decision.candidates.iter().zip(names).map(|(c, name)| {
        let (work, joined) = (seconds(c.work), seconds(c.joined));
        let name = name.as_deref();
        CANDIDATE.of(py, (name, c.new_tokens.0, c.queued.0, c.batch_size, work, joined, c.free.0, c.filtered))
    });
    let candidates = tuple(py, candidates)?;
    let at = decision.candidates.iter().position(|c| c.worker == decision.worker);
    let worker = at.and_then(|at| names.get(at)).and_then(Option::as_deref);
    let row = decision.row.map(|row| row_id(py, row)).transpose()?;
    DECISION.of(
        py,
        (
            decision.id.0,
            seconds(decision.at),
            row,
            decision.tokens.0,
            decision.policy.as_str(),
            decision.seed,
            decision.turn,
            worker,
            PyTuple::new(py, &decision.scores)?,
            candidates,
            (decision.anticipation.arrivals_a_second(), decision.anticipation.seconds_a_token()),
            decision.guard.map(|sighting| hotspot(py, &sighting)).transpose()?,
        ),
    )
}

fn hotspot<'py>(py: Python<'py>, seen: &Sighting) -> PyResult<Bound<'py, PyAny>> {
    let Sighting { depth, requests, window, workers, holders, alarm, preferred, filtered, .. } = *seen;
    HOTSPOT.of(py, (depth.0, requests, window, workers, holders, alarm, preferred, filtered))
}

/// A batch on the worker of this name.
pub(crate) fn batch<'py>(
    py: Python<'py>,
    record: &BatchRecord,
    worker: Option<Arc<str>>,
) -> PyResult<Bound<'py, PyAny>> {
    let outcome = record.outcome.map(|outcome| {
        let (end, time, expected) = (word(ENDS, &outcome.end), seconds(outcome.time), seconds(outcome.expected));
        BATCH_OUTCOME.of(py, (end, outcome.steps, time, expected, band(py, outcome.band)?, outcome.peak.0))
    });
    let outcome = outcome.transpose()?;
    BATCH_RECORD.of(
        py,
        (
            worker.as_deref(),
            record.batch.0,
            seconds(record.at),
            record.rows,
            record.steps,
            band(py, record.band)?,
            record.ceiling.0,
            outcome,
        ),
    )
}

/// What is believed of a worker.
pub(crate) fn load<'py>(py: Python<'py>, load: &WorkerLoad) -> PyResult<Bound<'py, PyAny>> {
    WORKER_LOAD.of(
        py,
        (
            &load.spec.name,
            load.ready,
            load.spec.blocks.0,
            load.queued.0,
            load.batch_size,
            seconds(load.work),
            load.running_rows,
            load.held_rows,
            load.running_blocks.0,
            load.held_blocks.0,
            load.indexed.0,
        ),
    )
}

fn row_id(py: Python<'_>, row: RowId) -> PyResult<Bound<'_, PyAny>> {
    ROW_ID.of(py, (row.request.0, row.choice))
}

fn row_key(py: Python<'_>, key: RowKey) -> PyResult<Bound<'_, PyAny>> {
    ROW_KEY.of(py, (key.row.request.0, key.row.choice, key.attempt))
}

fn band(py: Python<'_>, band: Band) -> PyResult<Bound<'_, PyAny>> {
    BAND.of(py, (seconds(band.lo), seconds(band.hi)))
}

fn keys<'py>(py: Python<'py>, rows: &[RowKey]) -> PyResult<Bound<'py, PyTuple>> {
    tuple(py, rows.iter().map(|key| row_key(py, *key)))
}

fn tuple<'py>(
    py: Python<'py>,
    all: impl Iterator<Item = PyResult<Bound<'py, PyAny>>>,
) -> PyResult<Bound<'py, PyTuple>> {
    PyTuple::new(py, all.collect::<PyResult<Vec<_>>>()?)
}
