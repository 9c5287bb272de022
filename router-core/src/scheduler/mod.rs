//! The scheduler of one model pool: a state machine that is told what happened and when, and says what to do.
//!
//! Events change rows, workers and the index; then rows without a home are placed (longest work first, each choice
//! committed at once); then every worker whose next batch changed gets a plan, and where joining is worth a slice start the
//! running slice is cut. It knows no clock, socket or text.

mod moves;
mod placement;
pub(crate) mod pooled;
mod requests;
mod slices;
mod workers;

use std::collections::{BTreeMap, VecDeque};

use hashbrown::HashMap;
use smallvec::SmallVec;

use crate::anticipation::Arrivals;
use crate::block::{BlockHash, hash_blocks};
use crate::constants::BALANCED_WORKERS;
use crate::cost::Estimator;
use crate::decision::{Decision, Decisions};
use crate::event::{Action, Event};
use crate::guard::{Guard, Guarding, Hotspots};
use crate::ids::{RequestId, RowId, RowKey, WorkerId};
use crate::index::{BlockTrie, PrefixIndex};
use crate::mode::Mode;
use crate::output::MeanOutput;
use crate::plan;
use crate::policy::{Policy, PolicyName};
use crate::pool::ModelSpec;
use crate::record::BatchRecord;
use crate::row::{Home, Row, Stage};
use crate::units::{Blocks, Bytes, Micros, Tokens};
use crate::worker::{Batch, Worker, WorkerLoad};

/// Decisions and batches kept for listings.
const LATEST: usize = 1024;

/// Fixed for the life of a scheduler.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where arrivals go.
    pub policy: PolicyName,
    /// How rows become batches.
    pub mode: Mode,
    /// S, the most iterations of a slice: `None` is what the mode says (measured, or the paper's).
    pub slice_len: Option<u32>,
    /// Seed of the `random` policy.
    pub seed: u64,
    /// Most rows unfinished at once; more are rejected.
    pub max_rows: usize,
}

/// Rows that moved to another worker although theirs was there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moves {
    /// Their worker drains.
    pub drained: u64,
    /// They had lost their KV for want of memory.
    pub evicted: u64,
    /// The request-seconds of both ends said so.
    pub weighed: u64,
    /// They had not started, and another worker had less to do.
    pub balanced: u64,
}

/// The home of this dispatch of a row, if it is this worker.
fn here(rows: &mut HashMap<RowId, Row>, key: RowKey, at: WorkerId) -> Option<&mut Home> {
    let row = rows.get_mut(&key.row).filter(|row| row.attempt == key.attempt)?;
    row.home_mut().filter(|home| home.worker == at)
}

/// Rows of a request: as it came, and not ended.
struct Choices {
    made: u32,
    live: u32,
}

/// The state machine of one model pool. One thread owns it; [`Scheduler::handle`] is all there is.
pub struct Scheduler {
    model: ModelSpec,
    config: Config,
    policy: Box<dyn Policy>,
    index: BlockTrie,
    workers: BTreeMap<WorkerId, Worker>,
    rows: HashMap<RowId, Row>,
    requests: HashMap<RequestId, Choices>,
    /// Rows without a home.
    pool: Vec<RowId>,
    /// A worker came or went, or a row came back: it is worth trying to place the pool.
    place_pool: bool,
    arrivals: u64,
    turn: u64,
    /// Of the last event: time never runs backwards in here.
    now: Micros,
    jumps: u64,
    doubtful: u64,
    decisions: Decisions,
    guard: Option<Guard>,
    latest: Arrivals,
    /// Workers that took rows at the last decision.
    ready: usize,
    /// Those that ended.
    batches: VecDeque<BatchRecord>,
    mean_output: MeanOutput,
    moves: Moves,
    /// Workers of which something changed: their plans and cuts are looked at.
    touched: Vec<WorkerId>,
    /// Slices that ended since it was last asked whether a worker may take what waits elsewhere.
    slices_ended: usize,
    rounds: pooled::Rounds,
    depths: Vec<usize>,
    scores: Vec<u128>,
}

impl Scheduler {
    /// An empty pool for workers of this model.
    pub fn new(model: ModelSpec, config: Config) -> Self {
        Self {
            policy: config.policy.policy(config.seed),
            model,
            config: Config { slice_len: config.slice_len.map(|slice_len| slice_len.max(1)), ..config },
            index: BlockTrie::default(),
            workers: BTreeMap::new(),
            rows: HashMap::new(),
            requests: HashMap::new(),
            pool: Vec::new(),
            place_pool: false,
            arrivals: 0,
            turn: 0,
            now: Micros::ZERO,
            jumps: 0,
            doubtful: 0,
            decisions: Decisions::new(LATEST),
            guard: Guard::new(Guarding::Filter),
            latest: Arrivals::default(),
            ready: 0,
            batches: VecDeque::new(),
            mean_output: MeanOutput::default(),
            moves: Moves::default(),
            touched: Vec::new(),
            slices_ended: 0,
            rounds: pooled::Rounds::default(),
            depths: Vec::new(),
            scores: Vec::new(),
        }
    }

    /// With a hotspot guard that does this; unless this says otherwise it filters.
    #[must_use]
    pub fn with_guard(self, guarding: Guarding) -> Self {
        Self { guard: Guard::new(guarding), ..self }
    }

    /// What the hotspot guard has seen and done; `None` without one.
    pub fn hotspots(&self) -> Option<Hotspots> {
        self.guard.as_ref().map(Guard::hotspots)
    }

    /// Takes one event and appends what is to be done.
    pub fn handle(&mut self, now: Micros, event: Event, actions: &mut Vec<Action>) {
        self.handle_many(now, [event], actions);
    }

    /// Takes events that came together: rows are placed and plans made once, after the last.
    pub fn handle_many(&mut self, now: Micros, events: impl IntoIterator<Item = Event>, actions: &mut Vec<Action>) {
        // a clock that jumps back stands still until it is where it was
        self.jumps += u64::from(now < self.now);
        self.now = self.now.max(now);
        let now = self.now;
        for event in events {
            self.take(now, event, actions);
        }
        self.place(now, actions);
        let mut changed = self.plan_touched(now, actions);
        if self.slices_ended > 0 && self.slices_ended.saturating_mul(BALANCED_WORKERS) >= self.workers.len() {
            self.slices_ended = 0;
            self.balance(now, actions);
            changed.extend(self.plan_touched(now, actions));
        }
        for worker in changed {
            self.consider_cut(now, worker, actions);
        }
    }

    /// Plans for the workers of which something changed, in order of slot; says which they were.
    fn plan_touched(&mut self, now: Micros, actions: &mut Vec<Action>) -> SmallVec<[WorkerId; 4]> {
        let mut touched = std::mem::take(&mut self.touched);
        touched.sort_unstable();
        touched.dedup();
        for &worker in &touched {
            self.plan(now, worker, actions);
        }
        let changed = touched.iter().copied().collect();
        // planning touches the same workers again: nothing is left to do for them
        touched.clear();
        self.touched = touched;
        changed
    }

    fn take(&mut self, now: Micros, event: Event, actions: &mut Vec<Action>) {
        match event {
            Event::WorkerJoined { worker, spec } => self.joined(worker, spec, actions),
            Event::WorkerLost { worker, epoch } => {
                if self.workers.get(&worker).is_some_and(|w| w.spec.epoch == epoch) {
                    self.lost(worker, actions);
                }
            }
            Event::WorkerDraining { worker } => self.drain(worker, actions),
            Event::Worker { worker, epoch, seq, message } => {
                self.touched.push(worker);
                self.message(now, worker, epoch, seq, message, actions);
            }
            Event::RequestArrived(request) => self.arrived(now, &request, actions),
            Event::Cancelled { request, choice } => self.cancelled(request, choice, actions),
            Event::Tick => {
                self.place_pool = true;
                self.touched.extend(self.workers.iter().filter(|(_, w)| !w.sent.is_empty()).map(|(id, _)| *id));
            }
        }
    }

    fn plan(&mut self, now: Micros, id: WorkerId, actions: &mut Vec<Action>) {
        if self.pooled().is_some() {
            return self.plan_formed(now, id, actions);
        }
        let (slice_len, cuts) = (self.slice_len(), self.config.mode == Mode::Slice);
        let Some(worker) = self.workers.get_mut(&id) else { return };
        if !std::mem::take(&mut worker.dirty) {
            return;
        }
        let Some((batch, plan)) = plan::next(worker, &self.rows, slice_len, cuts) else { return };
        for start in &plan.add {
            if let Some(home) = here(&mut self.rows, start.key, id) {
                home.budget = start.prefill_budget;
            }
        }
        actions.push(Action::Plan(id, plan));
        if worker.running.is_some() {
            return self.sent(id, batch);
        }
        // nothing runs: it starts on arrival
        self.started(now, id, batch, false, actions);
        // and the plan after it stands from the start, so that the worker never waits for a report
        let Some(worker) = self.workers.get_mut(&id) else { return };
        worker.dirty = false;
        if let Some((batch, plan)) = plan::next(worker, &self.rows, slice_len, cuts) {
            actions.push(Action::Plan(id, plan));
            self.sent(id, batch);
        }
    }

    /// The plan stands: its rows wait no longer, those of the plan it replaces wait again.
    fn sent(&mut self, id: WorkerId, batch: Batch) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let replaced = worker.sent.last().map_or(&[][..], |standing| &standing.joining).to_vec();
        for (keys, stage) in [(&replaced, Stage::Waiting), (&batch.joining, Stage::Planned)] {
            for key in keys {
                let Some(home) = here(&mut self.rows, *key, id) else { continue };
                if !matches!(home.stage, Stage::Running { .. }) {
                    worker.restage(home, stage);
                }
            }
        }
        worker.sent.push(batch);
    }

    /// S: most iterations of the next slice.
    pub fn slice_len(&self) -> u32 {
        match (self.config.slice_len, self.config.mode) {
            (Some(fixed), _) => fixed,
            (None, Mode::Ils) => 1,
            (None, Mode::Pooled(pooled)) => pooled.slice_len.unwrap_or(u32::MAX),
            (None, Mode::Slice) => self.mean_output.slice_len(),
        }
    }

    /// The latest batches: those that ended, oldest first, then those that run.
    pub fn batches(&self) -> impl DoubleEndedIterator<Item = &BatchRecord> {
        let running = self.workers.values().filter_map(|worker| worker.running.as_ref());
        self.batches.iter().chain(running.map(|running| &running.record))
    }

    /// What a worker's reports have taught of its time.
    pub fn estimator(&self, worker: WorkerId) -> Option<&Estimator> {
        self.workers.get(&worker).map(|worker| &worker.estimator)
    }

    /// Events that came with a time before that of the one before them.
    pub fn clock_jumps(&self) -> u64 {
        self.jumps
    }

    /// Reports of more iterations or time than there can have been: they are no measure of anything.
    pub fn doubtful_reports(&self) -> u64 {
        self.doubtful
    }

    /// Rows that moved for another reason than a lost worker.
    pub fn moves(&self) -> Moves {
        self.moves
    }

    /// Where a prompt would go now, and why. Commits nothing.
    pub fn route(&mut self, now: Micros, prompt: &[u32], root: BlockHash) -> Option<Decision> {
        let chain = hash_blocks(root, prompt, self.model.block_size);
        let tokens = Tokens(prompt.len() as u64);
        self.decide(now, None, tokens, tokens + Tokens(1), &chain)
    }

    /// The latest decisions, oldest first.
    pub fn decisions(&self) -> impl Iterator<Item = &Decision> {
        self.decisions.iter()
    }

    /// Every worker as the scheduler sees it at the last event, in order of slot.
    pub fn loads(&self) -> Vec<WorkerLoad> {
        self.workers.iter().map(|(&id, worker)| self.load(id, worker)).collect()
    }

    /// b and Q of every worker, in order of slot: what can be asked often.
    pub fn sizes(&self) -> impl Iterator<Item = (u64, Tokens)> {
        self.workers.values().map(|worker| (worker.batch_size(), worker.queued))
    }

    fn load(&self, id: WorkerId, worker: &Worker) -> WorkerLoad {
        let size = self.model.block_size;
        let held = || {
            let rows = worker.rows.values().filter_map(|row| self.rows.get(row));
            rows.filter(|row| row.home().is_some_and(|home| home.known) && !row.runs())
        };
        WorkerLoad {
            worker: id,
            spec: worker.spec.clone(),
            ready: worker.ready(),
            queued: worker.queued,
            batch_size: worker.batch_size(),
            work: worker.work(self.now),
            running_rows: worker.running.as_ref().map_or(0, |running| running.live as u64),
            held_rows: held().count() as u64,
            running_blocks: worker.running.as_ref().map_or(Blocks::ZERO, |running| running.batch.ceiling),
            held_blocks: held().map(|row| row.tokens().blocks(size)).sum(),
            indexed: self.index.blocks(id),
        }
    }

    /// Rows that have not ended.
    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    /// Whether a plan with a row of this request has started, or a row of it has ended.
    pub fn has_begun(&self, request: RequestId) -> bool {
        let Some(choices) = self.requests.get(&request) else { return true };
        let mut rows = (0..choices.made).map(|choice| self.rows.get(&RowId { request, choice }));
        rows.any(|row| row.is_none_or(|row| row.slices > 0))
    }

    /// Memory of the prefix index, estimated.
    pub fn index_bytes(&self) -> Bytes {
        self.index.bytes()
    }

    /// What all workers of the pool have in common.
    pub fn model(&self) -> &ModelSpec {
        &self.model
    }
}
