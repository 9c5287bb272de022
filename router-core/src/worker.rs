//! A worker as the router sees it: its batches in flight and its ledger (Q, b, W).

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::block::BlockHash;
use crate::cost::Estimator;
use crate::event::Refusal;
use crate::ids::{PlanNo, RowId, RowKey, WorkerId};
use crate::pool::WorkerSpec;
use crate::scheduler::pooled::Queue;
use crate::units::{Blocks, Micros, Tokens};

pub(crate) struct Worker {
    pub(crate) spec: WorkerSpec,
    /// `state_seq` of the next message.
    pub(crate) next_seq: u64,
    /// Its snapshot is complete.
    pub(crate) synced: bool,
    pub(crate) draining: bool,
    pub(crate) last_plan: PlanNo,
    pub(crate) last_ended: PlanNo,
    pub(crate) running: Option<Batch>,
    /// Plans sent on the running batch, oldest first; the worker has, or will have, the newest.
    pub(crate) sent: Vec<Batch>,
    /// Rows assigned and not finished, oldest first: `b` is their number.
    pub(crate) rows: BTreeMap<u64, RowId>,
    /// Formed batches, in pooled modes.
    pub(crate) queue: Queue,
    /// Q.
    pub(crate) queued: Tokens,
    /// W.
    pub(crate) work: Micros,
    pub(crate) estimator: Estimator,
    /// Set after a refusal for memory or rows: the next batches take at most this many, until one runs.
    pub(crate) cap: Option<usize>,
    /// Commits of rows that ended inside the running batch; its report has the deltas that replace them.
    pub(crate) unconfirmed: Vec<Arc<[BlockHash]>>,
    /// Rounds in a row (refusals, reports) in which no row got on.
    pub(crate) fruitless: u32,
    /// Something changed that may change the next plan.
    pub(crate) dirty: bool,
}

/// A batch that runs, or that a sent plan forms.
pub(crate) struct Batch {
    pub(crate) no: PlanNo,
    pub(crate) base: PlanNo,
    pub(crate) members: Vec<Member>,
    /// Members the plan told the worker of.
    pub(crate) added: Vec<RowKey>,
    pub(crate) ceiling: Blocks,
}

#[derive(Clone, Copy)]
pub(crate) struct Member {
    pub(crate) key: RowKey,
    /// Most tokens (prompt and output) it can have when the batch starts; exact once it runs.
    pub(crate) tokens: Tokens,
}

impl Worker {
    pub(crate) fn new(spec: WorkerSpec) -> Self {
        Self {
            estimator: Estimator::new(spec.cost, spec.layout),
            spec,
            next_seq: 1,
            synced: false,
            draining: false,
            last_plan: PlanNo(0),
            last_ended: PlanNo(0),
            running: None,
            sent: Vec::new(),
            rows: BTreeMap::new(),
            queue: Queue::default(),
            queued: Tokens::ZERO,
            work: Micros::ZERO,
            cap: None,
            unconfirmed: Vec::new(),
            fruitless: 0,
            dirty: false,
        }
    }

    /// Time of one row's next slice: its prefill and what it adds to the steps.
    pub(crate) fn work_of(&self, tokens: Tokens, prefill: Tokens, steps: Tokens) -> Micros {
        let model = self.estimator.model();
        let before = tokens.saturating_sub(prefill);
        self.estimator.time(model.prefill(prefill, before) + model.marginal(tokens, steps.0))
    }

    pub(crate) fn ready(&self) -> bool {
        self.synced && !self.draining
    }

    pub(crate) fn next_plan(&mut self) -> PlanNo {
        self.last_plan = PlanNo(self.last_plan.0 + 1);
        self.last_plan
    }

    /// The batch that a refused plan would have formed, and with it the plans that can start no more.
    pub(crate) fn take_refused(&mut self, plan: PlanNo, reason: Refusal) -> Option<Batch> {
        if self.running.as_ref().is_some_and(|batch| batch.no == plan) {
            self.sent.retain(|batch| batch.base != plan);
            return self.running.take();
        }
        let at = self.sent.iter().position(|batch| batch.no == plan)?;
        match reason {
            // refused as it came: what stood before still stands
            Refusal::Stale | Refusal::Unsupported => Some(self.sent.remove(at)),
            // refused at its start: it had replaced all before it
            Refusal::NoMemory | Refusal::TooManyRows | Refusal::UnknownRow => self.sent.drain(..=at).next_back(),
        }
    }

    pub(crate) fn runs(&self, key: RowKey) -> Option<&Member> {
        self.running.as_ref()?.members.iter().find(|member| member.key == key)
    }
}

/// What the scheduler believes of a worker, for listings and metrics.
#[derive(Clone, Debug)]
pub struct WorkerLoad {
    /// Its slot.
    pub worker: WorkerId,
    /// What it announced.
    pub spec: WorkerSpec,
    /// It takes new rows: its snapshot is complete and it does not drain.
    pub ready: bool,
    /// Q: prefill tokens assigned and not computed.
    pub queued: Tokens,
    /// b: rows assigned and not finished.
    pub batch_size: u64,
    /// W: committed work.
    pub work: Micros,
    /// Rows of the running batch.
    pub running_rows: u64,
    /// Rows known to the worker and not in its running batch.
    pub held_rows: u64,
    /// Ceiling of the running batch.
    pub running_blocks: Blocks,
    /// Blocks of held rows, at most.
    pub held_blocks: Blocks,
    /// Blocks of this worker in the prefix index.
    pub indexed: Blocks,
}
