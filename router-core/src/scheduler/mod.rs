//! The scheduler of one model pool: a state machine that is told what happened and when, and says what to do.
//!
//! Events change rows, workers and the index; then rows without a home are placed (longest work first, each choice
//! committed at once); then every worker whose next batch changed gets a plan. It knows no clock, socket or text.

mod placement;
mod requests;
mod workers;

use std::collections::{BTreeMap, VecDeque};

use hashbrown::HashMap;

use crate::block::{BlockHash, hash_blocks};
use crate::constants::FIRST_SLICE;
use crate::decision::{Decision, Decisions};
use crate::event::{Action, Event};
use crate::ids::{RequestId, RowId, WorkerId};
use crate::index::{BlockTrie, PrefixIndex};
use crate::mode::Mode;
use crate::plan;
use crate::policy::{Policy, PolicyName};
use crate::pool::ModelSpec;
use crate::record::BatchRecord;
use crate::row::Row;
use crate::units::{Blocks, Bytes, Micros, Tokens};
use crate::worker::{Worker, WorkerLoad};

/// Decisions kept for listings.
const DECISIONS: usize = 1024;

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
    decisions: Decisions,
    batches: VecDeque<BatchRecord>,
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
            decisions: Decisions::new(DECISIONS),
            batches: VecDeque::new(),
            depths: Vec::new(),
            scores: Vec::new(),
        }
    }

    /// Takes one event and appends what is to be done.
    pub fn handle(&mut self, now: Micros, event: Event, actions: &mut Vec<Action>) {
        self.handle_many(now, [event], actions);
    }

    /// Takes events that came together: rows are placed and plans made once, after the last.
    pub fn handle_many(&mut self, now: Micros, events: impl IntoIterator<Item = Event>, actions: &mut Vec<Action>) {
        for event in events {
            self.take(event, actions);
        }
        self.place(now, actions);
        self.plan(actions);
    }

    fn take(&mut self, event: Event, actions: &mut Vec<Action>) {
        match event {
            Event::WorkerJoined { worker, spec } => self.joined(worker, spec, actions),
            Event::WorkerLost { worker, epoch } => {
                if self.workers.get(&worker).is_some_and(|w| w.spec.epoch == epoch) {
                    self.lost(worker, actions);
                }
            }
            Event::WorkerDraining { worker } => self.drain(worker, actions),
            Event::Worker { worker, epoch, seq, message } => {
                self.message(worker, epoch, seq, message, actions);
            }
            Event::RequestArrived(request) => self.arrived(&request, actions),
            Event::Cancelled { request, choice } => self.cancelled(request, choice, actions),
            Event::Tick => self.place_pool = true,
        }
    }

    fn plan(&mut self, actions: &mut Vec<Action>) {
        let dirty: Vec<WorkerId> =
            self.workers.iter_mut().filter_map(|(id, w)| std::mem::take(&mut w.dirty).then_some(*id)).collect();
        let slice_len = self.slice_len();
        for id in dirty {
            let Some(worker) = self.workers.get_mut(&id) else { continue };
            let Some((batch, plan)) = plan::next(worker, &self.rows, slice_len) else { continue };
            actions.push(Action::Plan(id, plan));
            if worker.running.is_some() {
                worker.sent.push(batch);
            } else {
                // nothing runs: it starts on arrival
                self.started(id, batch, actions);
                // and the plan after it stands from the start, so that the worker never waits for a report
                let worker = self.workers.get_mut(&id).expect("it was there");
                worker.dirty = false;
                if let Some((batch, plan)) = plan::next(worker, &self.rows, slice_len) {
                    actions.push(Action::Plan(id, plan));
                    worker.sent.push(batch);
                }
            }
        }
    }

    /// S: most iterations of the next slice.
    pub fn slice_len(&self) -> u32 {
        self.config.slice_len.unwrap_or(FIRST_SLICE)
    }

    /// The latest batches, oldest first.
    pub fn batches(&self) -> impl DoubleEndedIterator<Item = &BatchRecord> {
        self.batches.iter()
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

    /// Every worker as the scheduler sees it, in order of slot.
    pub fn loads(&self) -> Vec<WorkerLoad> {
        self.workers.iter().map(|(&id, worker)| self.load(id, worker)).collect()
    }

    fn load(&self, id: WorkerId, worker: &Worker) -> WorkerLoad {
        let size = self.model.block_size;
        let held = || {
            worker
                .rows
                .values()
                .filter_map(|row| self.rows.get(row))
                .filter(|row| row.home().is_some_and(|home| home.known) && worker.runs(row.key()).is_none())
        };
        WorkerLoad {
            worker: id,
            spec: worker.spec.clone(),
            ready: worker.ready(),
            queued: worker.queued,
            batch_size: worker.rows.len() as u64,
            work: worker.work,
            running_rows: worker.running.as_ref().map_or(0, |batch| batch.members.len() as u64),
            held_rows: held().count() as u64,
            running_blocks: worker.running.as_ref().map_or(Blocks::ZERO, |batch| batch.ceiling),
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
