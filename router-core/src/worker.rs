//! A worker as the router sees it: its batches in flight and its ledger (Q, b, W).

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::block::BlockHash;
use crate::constants::SOME_CHUNKS;
use crate::cost::{Band, BatchLoad, Estimator, Forecast, Layout};
use crate::cut::Joins;
use crate::event::Refusal;
use crate::ids::{PlanNo, RowId, RowKey, WorkerId};
use crate::pool::WorkerSpec;
use crate::record::BatchRecord;
use crate::row::{Home, Stage};
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
    pub(crate) running: Option<Running>,
    /// Plans sent on the running batch, oldest first; the worker has, or will have, the newest.
    pub(crate) sent: Vec<Batch>,
    /// Rows assigned and not finished, oldest first: `b` is their number.
    pub(crate) rows: BTreeMap<u64, RowId>,
    /// Formed batches, in pooled modes.
    pub(crate) queue: Queue,
    /// Q.
    pub(crate) queued: Tokens,
    /// Tokens of all its rows, prompt and output so far.
    pub(crate) context: Tokens,
    /// Rows that no plan has, and what they add to a slice.
    pub(crate) waiting: usize,
    pub(crate) unplanned: Micros,
    /// What a slice costs that the rows do not: it comes on top where the rows that wait would be the first.
    pub(crate) bare: Micros,
    pub(crate) estimator: Estimator,
    pub(crate) joins: Joins,
    /// Set after a refusal for memory or rows: the next batches take at most this many, until one runs.
    pub(crate) cap: Option<usize>,
    /// Commits of rows that ended inside the running batch; its report has the deltas that replace them.
    pub(crate) unconfirmed: Vec<Arc<[BlockHash]>>,
    /// Rounds in a row (refusals, reports) in which no row got on.
    pub(crate) fruitless: u32,
    /// Something changed that may change the next plan.
    pub(crate) dirty: bool,
}

/// A batch that a sent plan forms.
pub(crate) struct Batch {
    pub(crate) no: PlanNo,
    pub(crate) base: PlanNo,
    pub(crate) steps: u32,
    pub(crate) members: Vec<RowKey>,
    /// Members that do not run in the base: what a cut of it would let in.
    pub(crate) joining: Vec<RowKey>,
    /// Members the plan told the worker of.
    pub(crate) added: Vec<RowKey>,
    pub(crate) ceiling: Blocks,
    /// Its time if all steps run.
    pub(crate) expected: Micros,
}

/// The batch that runs.
pub(crate) struct Running {
    pub(crate) batch: Batch,
    /// Members that have not ended.
    pub(crate) live: usize,
    /// It stood when the batch before it ended: what it waited for was its own start.
    pub(crate) follows: bool,
    pub(crate) forecast: Forecast,
    pub(crate) record: BatchRecord,
    /// Its rows, and the tokens each entered it with.
    pub(crate) entered: Vec<(RowKey, Tokens)>,
    /// Iterations it will have run when it ends, as far as is known: fewer than its steps once it was cut.
    pub(crate) ends_after: u32,
    /// Iterations seen.
    pub(crate) seen: u32,
    pub(crate) cut: bool,
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
            context: Tokens::ZERO,
            waiting: 0,
            unplanned: Micros::ZERO,
            bare: Micros::ZERO,
            joins: Joins::default(),
            cap: None,
            unconfirmed: Vec::new(),
            fruitless: 0,
            dirty: false,
        }
    }

    pub(crate) fn ready(&self) -> bool {
        self.synced && !self.draining
    }

    /// b.
    pub(crate) fn batch_size(&self) -> u64 {
        self.rows.len() as u64
    }

    pub(crate) fn runs(&self, plan: PlanNo) -> bool {
        self.running.as_ref().is_some_and(|running| running.batch.no == plan)
    }

    /// The batch a new plan follows.
    pub(crate) fn base(&self) -> PlanNo {
        self.running.as_ref().map_or(self.last_ended, |running| running.batch.no)
    }

    pub(crate) fn next_plan(&mut self) -> PlanNo {
        self.last_plan = PlanNo(self.last_plan.0 + 1);
        self.last_plan
    }

    // ---------------------------------------------------------------- time

    /// W: until the last committed plan ends, and what rows add that no plan has yet.
    pub(crate) fn work(&self, now: Micros) -> Micros {
        if self.rows.is_empty() {
            // what runs has nobody left to run for
            return Micros::ZERO;
        }
        let running = self.running.as_ref().map_or(Micros::ZERO, |running| {
            let whole = self.estimator.expected(&running.forecast, running.ends_after);
            whole.saturating_sub(now.saturating_sub(running.record.at))
        });
        let next = match self.sent.last() {
            Some(batch) => batch.expected,
            None if self.waiting > 0 => self.bare,
            None => Micros::ZERO,
        };
        running + next + self.queue.waiting().unwrap_or(self.unplanned)
    }

    /// What a row adds to a slice of so many steps: its prefill and its share of each step.
    pub(crate) fn work_of(&self, tokens: Tokens, prefill: Tokens, steps: Tokens) -> Micros {
        let model = self.estimator.model();
        let before = tokens.saturating_sub(prefill);
        self.estimator.time(model.prefill(prefill, before) + model.marginal(tokens, steps.0))
    }

    /// Seconds of prefill a token, as one chunk takes them.
    pub(crate) fn prefill_time(&self) -> f64 {
        let chunk = Tokens(self.spec.chunk.0.max(1));
        self.estimator.model().prefill(chunk, Tokens::ZERO) * self.estimator.correction() / chunk.0 as f64
    }

    /// A slice of `steps` iterations less what its rows cost.
    pub(crate) fn bare_slice(&self, steps: u32) -> Micros {
        let one = BatchLoad { rows: 1, longest: Tokens(1), context: Tokens(1), uncached: Tokens::ZERO };
        let model = self.estimator.model();
        self.estimator.time(model.slice(&one, steps.into()) - model.marginal(Tokens(1), steps.into()))
    }

    /// A slice with all rows that are here and one more, queued prefill included.
    pub(crate) fn joined(&self, tokens: Tokens, new: Tokens, steps: u32) -> Micros {
        let load = BatchLoad {
            rows: self.batch_size() + 1,
            longest: tokens,
            context: self.context + tokens,
            uncached: self.queued + new,
        };
        self.estimator.time(self.estimator.model().slice(&load, steps.into()))
    }

    /// One decode step of so many rows that see so many tokens.
    pub(crate) fn step(&self, rows: u64, context: Tokens) -> Micros {
        let load = BatchLoad { rows, longest: Tokens(context.0 / rows.max(1)), context, uncached: Tokens::ZERO };
        let model = self.estimator.model();
        // a padded batch's first iteration is its prompt pass
        self.estimator.time(model.slice(&load, 2) - model.slice(&load, 1))
    }

    /// Most prefill tokens an iteration takes of a row beside so many that decode and see so many tokens. A prompt that one
    /// chunk computes goes in one piece. Computing a longer one takes as long as D steps, however it is cut: with x steps of
    /// it beside each step the others wait x steps more for a token, and it waits D / x steps more for its first. The sum is
    /// least at the root of D: a part takes the geometric mean of a step and of the whole. One of many chunks takes no more than
    /// a step beside each, so that the others' time between tokens, for as long as it then is, at most doubles. What an
    /// iteration with a chunk costs whatever is in it counts for neither. Zero stands for no limit but the chunk.
    pub(crate) fn pace(&self, rows: u64, context: Tokens, tokens: Tokens, prefill: Tokens) -> Tokens {
        let chunk = self.spec.chunk;
        if prefill <= chunk || chunk == Tokens::ZERO {
            return Tokens::ZERO;
        }
        let size = self.spec.model.block_size.get();
        let model = self.estimator.model();
        let least = model.prefill(Tokens(1), Tokens::ZERO);
        // the last part attends most
        let of = |count: Tokens, before: Tokens| self.estimator.time(model.prefill(count, before) - least);
        let step = self.step(rows.max(1), context);
        let part = if prefill.0.div_ceil(chunk.0) <= SOME_CHUNKS {
            let whole = of(prefill, tokens.saturating_sub(prefill));
            // casts saturate
            Micros((step.0 as f64 * whole.0 as f64).sqrt() as u64).max(step)
        } else {
            step
        };
        let (mut few, mut many) = (1, chunk.0.div_ceil(size).max(1));
        while few < many {
            let middle = (few + many).div_ceil(2);
            if of(Tokens(middle.saturating_mul(size)), tokens) <= part { few = middle } else { many = middle - 1 }
        }
        Tokens(few.saturating_mul(size)).min(chunk)
    }

    /// Whether it would run one row more, of so many tokens, in the next batch of so many steps; estimated, a block a row at
    /// most too strict.
    pub(crate) fn has_room(&self, tokens: Tokens, steps: u32) -> bool {
        let (size, rows) = (self.spec.model.block_size, self.batch_size() + 1);
        let grown = self.context + tokens + Tokens(rows.saturating_mul(u64::from(steps)));
        rows <= u64::from(self.spec.max_rows) && grown.blocks(size) + Blocks(rows) <= self.spec.blocks
    }

    /// How long an answer takes from now: alone and at once with one token, and behind all that is here with all of
    /// `left` in slices of `slice_len`; each as far off as bands of long batches are.
    pub(crate) fn eta(&self, now: Micros, tokens: Tokens, new: Tokens, left: Tokens, slice_len: u32) -> Band {
        let model = self.estimator.model();
        let lo = self.estimator.time(model.prefill(new, tokens.saturating_sub(new)));
        let rows = self.batch_size();
        let mean = Tokens(tokens.0 + left.0 / 2);
        let step = self.step(rows.max(1), self.context + mean);
        let prefill = self.estimator.time(model.prefill(self.queued, Tokens::ZERO));
        // those of its prompt, in which others decode
        let pace = if rows == 0 { Tokens::ZERO } else { self.pace(rows, self.context, tokens, new) };
        let each = if pace == Tokens::ZERO { self.spec.chunk } else { pace };
        let iterations = left + Tokens(new.0.div_ceil(each.0.max(1)));
        let start = self.joins.start() + self.restart_cost(rows + 1);
        let starts = left.0 / u64::from(slice_len.max(1)) + 1;
        let hi = lo
            + self.work(now)
            + prefill
            + Micros(step.0.saturating_mul(iterations.0))
            + Micros(start.0.saturating_mul(starts));
        let [least, most] = self.estimator.reach();
        // casts saturate
        let (lo, hi) = (Micros((lo.0 as f64 * least) as u64), Micros((hi.0 as f64 * most) as u64));
        Band { lo: lo.min(hi), hi }
    }

    /// What a slice start costs each running row beyond what is measured: where KV does not outlive a batch, its prompt
    /// pass.
    pub(crate) fn restart_cost(&self, rows: u64) -> Micros {
        match self.spec.layout {
            Layout::Paged => Micros::ZERO,
            Layout::Padded => {
                let longest = Tokens(self.context.0 / self.batch_size().max(1));
                let load = BatchLoad { rows, longest, context: self.context, uncached: self.context };
                self.estimator.time(self.estimator.model().slice(&load, 1))
            }
        }
    }

    // ---------------------------------------------------------------- the ledger of rows

    /// The row's stage on this worker changes: W counts what waits, a batch what still runs.
    pub(crate) fn restage(&mut self, home: &mut Home, stage: Stage) {
        match home.stage {
            Stage::Waiting => {
                self.waiting -= 1;
                self.unplanned = self.unplanned.saturating_sub(home.work);
            }
            Stage::Running { .. } => {
                if let Some(running) = &mut self.running {
                    running.live = running.live.saturating_sub(1);
                }
            }
            Stage::Planned => {}
        }
        match stage {
            Stage::Waiting => {
                self.waiting += 1;
                self.unplanned += home.work;
            }
            Stage::Running { .. } => {
                if let Some(running) = &mut self.running {
                    running.live += 1;
                }
            }
            Stage::Planned => {}
        }
        home.stage = stage;
    }

    // ---------------------------------------------------------------- plans

    /// The batch that a refused plan would have formed, last, and before it those of the plans that can start no more.
    pub(crate) fn take_refused(&mut self, plan: PlanNo, reason: Refusal) -> Vec<Batch> {
        if self.runs(plan) {
            let sent = std::mem::take(&mut self.sent).into_iter();
            let (mut gone, left): (Vec<Batch>, _) = sent.partition(|batch| batch.base == plan);
            self.sent = left;
            gone.extend(self.running.take().map(|running| running.batch));
            return gone;
        }
        let Some(at) = self.sent.iter().position(|batch| batch.no == plan) else { return Vec::new() };
        match reason {
            // refused as it came: what stood before still stands
            Refusal::Stale | Refusal::Unsupported => vec![self.sent.remove(at)],
            // refused at its start: it had replaced all before it
            Refusal::NoMemory | Refusal::TooManyRows | Refusal::UnknownRow => self.sent.drain(..=at).collect(),
        }
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
    /// W: until the last committed plan ends, and what is not planned yet.
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
