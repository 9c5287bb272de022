//! The in-process scheduler: one lock around the core's state machine. Names for slots, epochs and sequence numbers,
//! which a session over a network needs and a caller in the same process does not, are kept here.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use router_core::{
    Action, BlockHash, Blocks, Config, Epoch, Event, Layout, Micros, Mode, ModelSpec, NewRequest, PlanNo, RequestId,
    RowStart, Tokens, WorkerId, WorkerMessage, WorkerSpec,
};

use crate::action::{self, Prompt};
use crate::cost::{CostModel, read_layout};
use crate::error::{no_worker, request_exists, unknown_policy, unknown_scheduler, unknown_worker, worker_exists};
use crate::ids::ids;
use crate::report::{RowKey, RowTokens, SliceReport, micros, refusal};
use crate::router::held;

/// The scheduler in your own process, in front of workers of your own: what runs together, where, and for how long.
///
/// A state machine without threads, sockets or a clock. You tell it what happened and when, and carry out the actions
/// it returns, in order: plans go to workers, tokens to clients. ``docs/scheduler.md`` has a worker in forty lines.
///
/// >>> from scls_router import scheduling
/// >>> scheduler = Scheduler(slice_len=32)
/// >>> scheduler.join("a", blocks=100, max_rows=8, max_context=1000, now=0.0)
/// []
/// >>> scheduler.snapshot("a", [], now=0.0)  # nothing is cached there
/// []
/// >>> for action in scheduler.arrive(1, [5, 6, 7], max_tokens=2, now=0.0):
/// ...     match action:
/// ...         case scheduling.Placed(row, worker):
/// ...             print(row, worker)
/// ...         case scheduling.Plan(worker, no, base) if base == 0:
/// ...             batch, key = no, action.add[0].key
/// ...             print(worker, batch, action.add[0].prompt, action.steps)
/// RowId(request=1, choice=0) a
/// a 1 (5, 6, 7) 32
///
/// The worker starts it, computes the prompt and draws a token, then another, which is the row's last:
///
/// >>> scheduler.steps("a", batch, [scheduling.RowTokens(key, 0, (8,))], now=0.1)
/// [Tokens(row=RowId(request=1, choice=0), first_index=0, ids=(8,))]
/// >>> *_, end = scheduler.steps("a", batch, [scheduling.RowTokens(key, 1, (9,), finish="length")], now=0.2)
/// >>> end.reason, end.prompt, end.emitted, end.slices, end.worker
/// ('length', 3, 2, 1, 'a')
/// >>> report = scheduling.RowReport(key, computed=4, emitted=2, finish="length", held=False)
/// >>> done = scheduling.SliceReport(batch, "all_done", steps=2, rows=(report,), prefill=0.1, decode=0.1, peak=1)
/// >>> scheduler.slice_reported("a", done, now=0.2)
/// []
/// >>> scheduler.workers()[0].batch_size, scheduler.rows
/// (0, 0)
///
/// Every call takes ``now``: seconds on a clock of yours that does not go back, such as ``time.monotonic()``. Methods may
/// be called from any thread; what a caller should see in order it calls in order.
///
/// Args:
///     policy: where arrivals go: ``product``, ``product_anticipating``, ``product_time`` (the product in seconds),
///         ``round_robin``, ``random`` or ``least_requests``.
///     scheduler: how rows become batches: ``slice``, or ``scls``, ``sls``, ``ils`` to compare with.
///     block_size: tokens a KV block, as in the workers.
///     hash_root: u64 at the start of every chain of block hashes.
///     vocab: ids below this one exist; a worker that draws another is quarantined.
///     slice_len: S, the most iterations of a slice, where it is to be fixed; None: measured.
///     seed: for the policy ``random``.
///     max_rows: most rows unfinished at once; more are rejected.
///
/// Raises:
///     UnknownPolicy: no policy of this name.
///     UnknownScheduler: no scheduler of this name.
///     ValueError: ``block_size`` or ``slice_len`` is 0.
#[pyclass(frozen, module = "scls_router")]
pub(crate) struct Scheduler {
    state: Mutex<State>,
    policy: &'static str,
    mode: &'static str,
}

struct State {
    core: router_core::Scheduler,
    root: BlockHash,
    slots: Vec<Slot>,
    epochs: u64,
    /// Requests that have not ended: an id is used again only after its last row.
    live: HashMap<RequestId, Live>,
}

struct Live {
    rows: u32,
    /// For plans: made once, however often a standing plan with the row is replaced.
    prompt: Prompt,
}

/// A place for a worker. Decisions and batches of the past are named by who had it then.
struct Slot {
    names: Vec<(Micros, Arc<str>)>,
    session: Option<Session>,
}

struct Session {
    epoch: Epoch,
    seq: u64,
    /// Place of the snapshot's next chunk.
    chunk: u32,
}

/// An action with what Python has for its worker and its prompts.
type Named = (Action, Option<Arc<str>>, Vec<Option<Prompt>>);

#[pymethods]
impl Scheduler {
    #[new]
    #[pyo3(signature = (policy = "product_anticipating", scheduler = "slice", *, block_size = 16, hash_root = 0, vocab = 4_294_967_295,
        slice_len = None, seed = 0, max_rows = 4096))]
    #[allow(clippy::too_many_arguments)] // by name
    fn new(
        py: Python<'_>,
        policy: &str,
        scheduler: &str,
        block_size: u32,
        hash_root: u64,
        vocab: u32,
        slice_len: Option<u32>,
        seed: u64,
        max_rows: usize,
    ) -> PyResult<Self> {
        let policy = policy.parse().map_err(|error| unknown_policy(py, &error))?;
        let mode: Mode = scheduler.parse().map_err(|error| unknown_scheduler(py, &error))?;
        if slice_len == Some(0) {
            return Err(PyValueError::new_err("slice_len must be at least 1"));
        }
        // in one process there is one model: digests tell apart what comes over a network
        let (digest, tokenizer) = (String::new(), String::new());
        let model = ModelSpec { digest, tokenizer, block_size: crate::block_size(block_size)?, vocab };
        let core = router_core::Scheduler::new(model, Config { policy, mode, slice_len, seed, max_rows });
        let (root, slots, live) = (BlockHash(hash_root), Vec::new(), HashMap::new());
        let state = Mutex::new(State { core, root, slots, epochs: 0, live });
        Ok(Self { state, policy: policy.as_str(), mode: mode.as_str() })
    }

    /// A worker is there. It takes rows once its ``snapshot`` is complete.
    ///
    /// Args:
    ///     name: yours, as actions will have it.
    ///     blocks: its KV blocks.
    ///     max_rows: most rows of a batch.
    ///     max_context: most tokens of a row, prompt and output together.
    ///     chunk_tokens: most prefill tokens of an iteration.
    ///     layout: ``paged`` or ``padded``; by default that of the cost model, or ``paged``.
    ///     cost_model: what its iterations take, where it was measured; else it is learnt from reports.
    ///     now: seconds.
    ///
    /// Raises:
    ///     WorkerExists: there is one of this name.
    ///     ValueError: a size is 0, or layout and cost model are of two forms.
    #[pyo3(signature = (name, *, blocks, max_rows, max_context, now, chunk_tokens = 512, layout = None,
        cost_model = None))]
    #[allow(clippy::too_many_arguments)] // by name
    fn join<'py>(
        &self,
        py: Python<'py>,
        name: &str,
        blocks: u64,
        max_rows: u32,
        max_context: u64,
        now: f64,
        chunk_tokens: u64,
        layout: Option<&str>,
        cost_model: Option<&CostModel>,
    ) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let sizes = [
            ("blocks", blocks),
            ("max_rows", u64::from(max_rows)),
            ("max_context", max_context),
            ("chunk_tokens", chunk_tokens),
        ];
        if let Some((what, _)) = sizes.into_iter().find(|(_, size)| *size == 0) {
            return Err(PyValueError::new_err(format!("{what} must be at least 1")));
        }
        let cost = cost_model.map(|model| *model.core());
        let measured = cost.map(|cost| cost.layout());
        let layout = layout.map(read_layout).transpose()?.or(measured).unwrap_or(Layout::Paged);
        if measured.is_some_and(|measured| measured != layout) {
            return Err(PyValueError::new_err("the cost model is not of the worker's layout"));
        }
        let now = clock(now)?;
        let joined = self.with(py, |state| {
            if state.slot_of(name).is_some() {
                return None;
            }
            let worker = state.take_slot(now, name);
            let spec = WorkerSpec {
                name: name.to_owned(),
                epoch: Epoch(state.epochs),
                model: state.core.model().clone(),
                blocks: Blocks(blocks),
                max_rows,
                max_context: Tokens(max_context),
                chunk: Tokens(chunk_tokens),
                layout,
                cost,
            };
            Some(state.handle(now, Event::WorkerJoined { worker, spec }))
        });
        actions(py, joined.ok_or_else(|| worker_exists(py, name))?)
    }

    /// A worker is gone: its rows go on elsewhere from the tokens they have.
    ///
    /// Raises:
    ///     UnknownWorker: there is none of this name.
    #[pyo3(signature = (worker, *, now))]
    fn lost<'py>(&self, py: Python<'py>, worker: &str, now: f64) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let now = clock(now)?;
        let lost = self.with(py, |state| {
            let slot = state.slot_of(worker)?;
            let session = state.slots.get_mut(slot.0 as usize)?.session.take()?;
            Some(state.handle(now, Event::WorkerLost { worker: slot, epoch: session.epoch }))
        });
        actions(py, lost.ok_or_else(|| unknown_worker(py, worker))?)
    }

    /// No new rows for a worker: those it knows finish there, the others go elsewhere.
    ///
    /// Raises:
    ///     UnknownWorker: there is none of this name.
    #[pyo3(signature = (worker, *, now))]
    fn drain<'py>(&self, py: Python<'py>, worker: &str, now: f64) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let now = clock(now)?;
        let drained = self.with(py, |state| {
            let slot = state.slot_of(worker)?;
            Some(state.handle(now, Event::WorkerDraining { worker: slot }))
        });
        actions(py, drained.ok_or_else(|| unknown_worker(py, worker))?)
    }

    /// The blocks that a worker has cached, in one or several parts; the first forgets what was believed before.
    ///
    /// Args:
    ///     worker: whose.
    ///     hashes: of whole blocks, as ``hash_blocks`` names them.
    ///     last: False if more is to come.
    ///     now: seconds.
    ///
    /// Raises:
    ///     UnknownWorker: there is none of this name.
    ///     OverflowError: a hash is no u64.
    #[pyo3(signature = (worker, hashes, *, now, last = true))]
    fn snapshot<'py>(
        &self,
        py: Python<'py>,
        worker: &str,
        hashes: &Bound<'py, PyAny>,
        now: f64,
        last: bool,
    ) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let hashes = block_hashes(hashes)?;
        self.say(py, worker, now, |session| {
            let chunk = session.chunk;
            session.chunk = if last { 0 } else { chunk.saturating_add(1) };
            WorkerMessage::Snapshot { chunk, last, hashes }
        })
    }

    /// Blocks that a worker has cached no more, and those that came.
    ///
    /// Args:
    ///     worker: whose.
    ///     removed: hashes, applied first.
    ///     stored: hashes.
    ///     now: seconds.
    ///
    /// Raises:
    ///     UnknownWorker: there is none of this name.
    ///     OverflowError: a hash is no u64.
    #[pyo3(signature = (worker, *, now, removed = None, stored = None))]
    fn kv_delta<'py>(
        &self,
        py: Python<'py>,
        worker: &str,
        now: f64,
        removed: Option<&Bound<'py, PyAny>>,
        stored: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let removed = removed.map(block_hashes).transpose()?.unwrap_or_default();
        let stored = stored.map(block_hashes).transpose()?.unwrap_or_default();
        self.say(py, worker, now, |_| WorkerMessage::KvDelta { removed, stored })
    }

    /// A request.
    ///
    /// Args:
    ///     request_id: its id: no request that has not ended has it.
    ///     prompt: token ids, as `hash_blocks` takes them.
    ///     max_tokens: most output tokens of a row.
    ///     n: rows.
    ///     urgent: a short time to the first token is promised: a running slice is cut for it at once.
    ///     now: seconds.
    ///
    /// Raises:
    ///     RequestExists: a request of this id has not ended.
    ///     ValueError: ids are out of range.
    ///     TypeError: this is no prompt.
    #[pyo3(signature = (request_id, prompt, *, max_tokens, now, n = 1, urgent = false))]
    #[allow(clippy::too_many_arguments)] // by name
    fn arrive<'py>(
        &self,
        py: Python<'py>,
        request_id: u64,
        prompt: &Bound<'py, PyAny>,
        max_tokens: u64,
        now: f64,
        n: u32,
        urgent: bool,
    ) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let prompt = ids(prompt)?;
        let shown: Prompt = Arc::new(PyTuple::new(py, &prompt)?.unbind());
        let (now, id) = (clock(now)?, RequestId(request_id));
        let arrived = self.with(py, |state| {
            if state.live.contains_key(&id) {
                return None;
            }
            state.live.insert(id, Live { rows: n, prompt: shown });
            let (prompt, max_tokens) = (prompt.into(), Tokens(max_tokens));
            let request = NewRequest { id, prompt, root: state.root, choices: n, max_tokens, urgent };
            Some(state.handle(now, Event::RequestArrived(request)))
        });
        actions(py, arrived.ok_or_else(|| request_exists(py, request_id))?)
    }

    /// The client went away, or its text is complete: rows of the request end now. Of one that has ended nothing changes.
    ///
    /// Args:
    ///     request_id: which.
    ///     choice: one row of it; None for all.
    ///     now: seconds.
    #[pyo3(signature = (request_id, *, now, choice = None))]
    fn cancel<'py>(
        &self,
        py: Python<'py>,
        request_id: u64,
        now: f64,
        choice: Option<u32>,
    ) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let now = clock(now)?;
        let request = RequestId(request_id);
        actions(py, self.with(py, |state| state.handle(now, Event::Cancelled { request, choice })))
    }

    /// What an iteration of a worker drew, or some that followed one another: then rows have several ids.
    ///
    /// Args:
    ///     worker: who.
    ///     batch: number of the plan that formed the running batch.
    ///     rows: a `scheduling.RowTokens` for each row that drew or ended.
    ///     now: seconds.
    ///
    /// Raises:
    ///     UnknownWorker: there is none of this name.
    ///     ValueError: there is no such finish reason, or an id is out of range.
    #[pyo3(signature = (worker, batch, rows, *, now))]
    fn steps<'py>(
        &self,
        py: Python<'py>,
        worker: &str,
        batch: u64,
        rows: Vec<RowTokens<'py>>,
        now: f64,
    ) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let rows = rows.into_iter().map(RowTokens::into_core).collect::<PyResult<_>>()?;
        self.say(py, worker, now, |_| WorkerMessage::Steps { batch: PlanNo(batch), rows })
    }

    /// A batch ended.
    ///
    /// Args:
    ///     worker: whose.
    ///     report: how it went, and the plan that starts now.
    ///     now: seconds.
    ///
    /// Raises:
    ///     UnknownWorker: there is none of this name.
    ///     ValueError: there is no such end or finish reason, or a time is negative or not finite.
    #[pyo3(signature = (worker, report, *, now))]
    fn slice_reported<'py>(
        &self,
        py: Python<'py>,
        worker: &str,
        report: SliceReport,
        now: f64,
    ) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let report = report.into_core()?;
        self.say(py, worker, now, |_| WorkerMessage::SliceReported(report))
    }

    /// A worker ran nothing of a plan.
    ///
    /// Args:
    ///     worker: who.
    ///     plan: number of the plan.
    ///     reason: ``stale`` (its base had ended), ``no_memory``, ``too_many_rows``, ``unknown_row`` or ``unsupported``.
    ///     rows: keys of the rows at fault, if any are.
    ///     detail: for people.
    ///     now: seconds.
    ///
    /// Raises:
    ///     UnknownWorker: there is none of this name.
    ///     ValueError: there is no such reason.
    #[pyo3(signature = (worker, plan, reason, *, now, rows = None, detail = ""))]
    #[allow(clippy::too_many_arguments)] // by name
    fn refused<'py>(
        &self,
        py: Python<'py>,
        worker: &str,
        plan: u64,
        reason: &str,
        now: f64,
        rows: Option<Vec<RowKey>>,
        detail: &str,
    ) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let (plan, reason, detail) = (PlanNo(plan), refusal(reason)?, detail.to_owned());
        let rows = rows.unwrap_or_default().into_iter().map(Into::into).collect();
        self.say(py, worker, now, |_| WorkerMessage::Refused { plan, reason, rows, detail })
    }

    /// Time has passed; answers a `scheduling.WakeAt`.
    #[pyo3(signature = (*, now))]
    fn tick<'py>(&self, py: Python<'py>, now: f64) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let now = clock(now)?;
        actions(py, self.with(py, |state| state.handle(now, Event::Tick)))
    }

    /// Where a prompt would go now, and why. Commits nothing.
    ///
    /// Raises:
    ///     NoWorker: none is ready that could hold it.
    ///     ValueError: ids are out of range.
    #[pyo3(signature = (prompt, *, now))]
    fn route<'py>(&self, py: Python<'py>, prompt: &Bound<'py, PyAny>, now: f64) -> PyResult<Bound<'py, PyAny>> {
        let (prompt, now) = (ids(prompt)?, clock(now)?);
        let decided = self.with(py, |state| {
            let root = state.root;
            let decision = state.core.route(now, &prompt, root)?;
            let names = state.names(&decision);
            Some((decision, names))
        });
        let (decision, names) = decided.ok_or_else(|| no_worker(py))?;
        action::decision(py, &decision, &names)
    }

    /// What is believed of each worker, in order of joining (a place that became free is taken again).
    fn workers<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let loads = self.with(py, |state| state.core.loads());
        loads.iter().map(|load| action::load(py, load)).collect()
    }

    /// The latest decisions, oldest first.
    fn decisions<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let all: Vec<_> = self.with(py, |state| {
            state.core.decisions().map(|decision| (decision.clone(), state.names(decision))).collect()
        });
        all.iter().map(|(decision, names)| action::decision(py, decision, names)).collect()
    }

    /// The latest batches, oldest first: time and memory as foreseen, and what happened.
    fn batches<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let all: Vec<_> = self
            .with(py, |state| state.core.batches().map(|batch| (*batch, state.name(batch.worker, batch.at))).collect());
        all.into_iter().map(|(batch, name)| action::batch(py, &batch, name)).collect()
    }

    /// S: most iterations of the next slice.
    #[getter]
    fn slice_len(&self, py: Python<'_>) -> u32 {
        self.with(py, |state| state.core.slice_len())
    }

    /// Rows that have not ended.
    #[getter]
    fn rows(&self, py: Python<'_>) -> usize {
        self.with(py, |state| state.core.rows())
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        let (workers, rows) = self.with(py, |state| (state.core.loads().len(), state.core.rows()));
        format!("Scheduler(policy={:?}, scheduler={:?}, workers={workers}, rows={rows})", self.policy, self.mode)
    }
}

impl Scheduler {
    /// Calls with the interpreter released: whoever waits for the lock never holds up who has it. No Python runs inside.
    fn with<T: Send>(&self, py: Python<'_>, call: impl FnOnce(&mut State) -> T + Send) -> T {
        py.detach(|| call(&mut held(&self.state)))
    }

    /// A message of a worker.
    fn say<'py>(
        &self,
        py: Python<'py>,
        worker: &str,
        now: f64,
        message: impl FnOnce(&mut Session) -> WorkerMessage + Send,
    ) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let now = clock(now)?;
        let said = self.with(py, |state| {
            let slot = state.slot_of(worker)?;
            let session = state.slots.get_mut(slot.0 as usize)?.session.as_mut()?;
            session.seq += 1;
            let (epoch, seq) = (session.epoch, session.seq);
            let message = message(session);
            Some(state.handle(now, Event::Worker { worker: slot, epoch, seq, message }))
        });
        actions(py, said.ok_or_else(|| unknown_worker(py, worker))?)
    }
}

impl State {
    fn handle(&mut self, now: Micros, event: Event) -> Vec<Named> {
        let mut actions = Vec::new();
        self.core.handle(now, event, &mut actions);
        let named: Vec<Named> = actions.into_iter().map(|action| self.named(action)).collect();
        for (action, ..) in &named {
            match action {
                Action::Finish(row, _) => {
                    let left = self.live.get_mut(&row.request).map_or(0, |live| {
                        live.rows = live.rows.saturating_sub(1);
                        live.rows
                    });
                    if left == 0 {
                        self.live.remove(&row.request);
                    }
                }
                Action::Reject(request, _) => {
                    self.live.remove(request);
                }
                _ => {}
            }
        }
        named
    }

    fn named(&self, action: Action) -> Named {
        let slot = action::worker_of(&action).and_then(|worker| self.slots.get(worker.0 as usize));
        let name = slot.and_then(|slot| slot.names.last()).map(|(_, name)| Arc::clone(name));
        let prompt = |start: &RowStart| self.live.get(&start.key.row.request).map(|live| Arc::clone(&live.prompt));
        let prompts = match &action {
            Action::Plan(_, plan) => plan.add.iter().map(prompt).collect(),
            _ => Vec::new(),
        };
        (action, name, prompts)
    }

    fn slot_of(&self, name: &str) -> Option<WorkerId> {
        let has = |slot: &Slot| slot.session.is_some() && slot.names.last().is_some_and(|(_, last)| **last == *name);
        self.slots.iter().position(has).map(|at| WorkerId(at as u32))
    }

    /// A new session in the first slot that is free.
    fn take_slot(&mut self, now: Micros, name: &str) -> WorkerId {
        let at = self.slots.iter().position(|slot| slot.session.is_none()).unwrap_or(self.slots.len());
        if at == self.slots.len() {
            self.slots.push(Slot { names: Vec::new(), session: None });
        }
        self.epochs += 1;
        if let Some(slot) = self.slots.get_mut(at) {
            if slot.names.last().is_none_or(|(_, last)| **last != *name) {
                slot.names.push((now, Arc::from(name)));
            }
            slot.session = Some(Session { epoch: Epoch(self.epochs), seq: 0, chunk: 0 });
        }
        WorkerId(at as u32)
    }

    /// Who had the slot at that time.
    fn name(&self, worker: WorkerId, at: Micros) -> Option<Arc<str>> {
        let names = &self.slots.get(worker.0 as usize)?.names;
        let then = names.iter().rev().find(|(since, _)| *since <= at).or(names.first());
        then.map(|(_, name)| Arc::clone(name))
    }

    fn names(&self, decision: &router_core::Decision) -> Vec<Option<Arc<str>>> {
        decision.candidates.iter().map(|candidate| self.name(candidate.worker, decision.at)).collect()
    }
}

fn clock(now: f64) -> PyResult<Micros> {
    micros("now", now)
}

fn actions(py: Python<'_>, named: Vec<Named>) -> PyResult<Vec<Bound<'_, PyAny>>> {
    named.into_iter().map(|(action, name, prompts)| action::action(py, action, name, &prompts)).collect()
}

fn block_hashes(given: &Bound<'_, PyAny>) -> PyResult<Vec<BlockHash>> {
    given.try_iter()?.map(|hash| Ok(BlockHash(hash?.extract()?))).collect()
}
