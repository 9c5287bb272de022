//! The pooled family of the SCLS paper (arXiv 2406.13511): rows wait in the pool until a round, which cuts them into
//! batches and gives each batch to a worker, where it waits its turn. At a batch's end its unfinished rows come back to
//! the pool and are prefilled again wherever the next round takes them. At sequence level there are no rounds: rows are
//! dealt to the workers as they come.

use std::cmp::Reverse;
use std::collections::VecDeque;

use super::{Scheduler, here};
use crate::batch::Batcher;
use crate::cost::{BatchLoad, Layout};
use crate::event::{Action, Keep, Plan, RowStart};
use crate::ids::{PlanNo, RowId, RowKey, WorkerId};
use crate::memory::{Extent, batch_ceiling};
use crate::mode::{Batching, Interval, Mode, Offload, Pooled};
use crate::offload::Offloader;
use crate::plan::{MOST_TOLD, start};
use crate::pool::WorkerSpec;
use crate::row::{Place, Row};
use crate::units::{Micros, Tokens};
use crate::worker::{Batch, Worker};

/// Batches of a worker that wait or run, and their time.
#[derive(Default)]
pub(crate) struct Queue {
    /// Rows that are its in turn and in no batch yet, oldest first; their place is the pool.
    pub(super) dealt: VecDeque<RowId>,
    /// Not sent yet, first to run first.
    formed: VecDeque<Formed>,
    /// The running batch and the one that stands.
    sent: Vec<(PlanNo, Formed)>,
    /// Time of all of them, as it was added.
    load: Micros,
}

/// A batch that was given to a worker.
struct Formed {
    rows: Vec<RowKey>,
    /// Its part of the load.
    time: Micros,
}

/// When the pool is cut into batches, and whose turn it is.
#[derive(Default)]
pub(super) struct Rounds {
    last: Option<Micros>,
    turn: usize,
}

/// A batch that has no worker yet.
#[derive(Default)]
struct Cut {
    rows: Vec<RowId>,
    /// Workers that take fewer tokens of a row do not take it.
    least: Tokens,
    time: Micros,
}

/// Iterations of a batch on a worker: until all rows are at their limits, and no more than S.
fn steps<'a>(spec: &WorkerSpec, rows: impl Iterator<Item = &'a Row>, slice_len: u32) -> u32 {
    let both = |(left, known): (Tokens, Tokens), row: &Row| (left.max(row.slice(slice_len)), known + row.tokens());
    let (left, known) = rows.fold((Tokens::ZERO, Tokens::ZERO), both);
    let prefill = match spec.layout {
        // the pass over the prompts draws the first tokens
        Layout::Padded => 0,
        Layout::Paged => known.0.div_ceil(spec.chunk.0.max(1)),
    };
    (left + Tokens(prefill)).0.clamp(1, slice_len.into()) as u32
}

impl Queue {
    /// Neither a batch to run nor one that runs.
    fn is_empty(&self) -> bool {
        self.formed.is_empty() && self.sent.is_empty()
    }

    /// Time of the batches that wait to be sent, where any do.
    pub(crate) fn waiting(&self) -> Option<Micros> {
        (!self.formed.is_empty()).then(|| self.formed.iter().map(|formed| formed.time).sum())
    }
}

impl Scheduler {
    pub(super) fn pooled(&self) -> Option<Pooled> {
        match self.config.mode {
            Mode::Pooled(pooled) => Some(pooled),
            Mode::Slice | Mode::Ils => None,
        }
    }

    /// If it is time: all rows of the pool become batches, and each batch gets a worker.
    pub(super) fn round(&mut self, now: Micros, pooled: Pooled, actions: &mut Vec<Action>) {
        if !std::mem::take(&mut self.place_pool) {
            return;
        }
        if pooled.interval == Interval::AtOnce {
            self.deal(now, actions);
            return self.form_dealt(now, pooled, actions);
        }
        // without a worker there is nothing to wait for
        let workers = self.workers.values().any(|worker| worker.synced);
        if self.pool.is_empty() || (workers && !self.is_due(now, pooled.interval, actions)) {
            return;
        }
        let mut waiting = self.take_pool();
        if workers && !waiting.is_empty() {
            self.rounds.last = Some(now);
        }
        waiting = self.offload(now, pooled, waiting, Worker::ready, actions);
        // what fits on no worker that takes new rows goes on where it is allowed to finish
        waiting = self.offload(now, pooled, waiting, |worker| worker.synced && worker.draining, actions);
        for id in waiting {
            self.keep_in_pool(now, id, actions);
        }
    }

    /// The pool's rows, oldest first; those that ended are gone.
    fn take_pool(&mut self) -> Vec<RowId> {
        let here = self.pool.drain(..).filter_map(|id| Some((self.rows.get(&id)?.order, id)));
        let mut ordered: Vec<(u64, RowId)> = here.collect();
        ordered.sort_unstable();
        ordered.into_iter().map(|(_, id)| id).collect()
    }

    /// Sequence level: each row is a worker's in turn as it comes, whatever the workers have to do.
    fn deal(&mut self, now: Micros, actions: &mut Vec<Action>) {
        let waiting = self.take_pool();
        if waiting.is_empty() {
            return;
        }
        let synced = self.workers.iter().filter(|(_, worker)| worker.synced);
        let able: Vec<(WorkerId, Tokens, bool)> =
            synced.map(|(id, worker)| (*id, worker.spec.most_tokens(), worker.draining)).collect();
        let mut offloader = Offloader::new(vec![Micros::ZERO; able.len()]).at_turn(self.rounds.turn);
        for id in waiting {
            let Some(row) = self.rows.get_mut(&id) else { continue };
            let total = row.total();
            let mut next = |draining| offloader.next(|at| total <= able[at].1 && able[at].2 == draining);
            // what fits on no worker that takes new rows goes on where it is allowed to finish
            let at = next(false).or_else(|| next(true)).map(|at| able[at].0);
            match at.and_then(|at| self.workers.get_mut(&at)) {
                Some(worker) => {
                    row.place = Place::Pool { until: None };
                    worker.queue.dealt.push_back(id);
                }
                None => self.keep_in_pool(now, id, actions),
            }
        }
        self.rounds.turn = offloader.turn();
    }

    /// A batch of the oldest of its rows for each worker that has nothing to run.
    fn form_dealt(&mut self, now: Micros, pooled: Pooled, actions: &mut Vec<Action>) {
        let idle = self.workers.iter().filter(|(_, worker)| worker.synced && worker.queue.is_empty());
        let idle: Vec<WorkerId> =
            idle.filter(|(_, worker)| !worker.queue.dealt.is_empty()).map(|(id, _)| *id).collect();
        for id in idle {
            let Some(worker) = self.workers.get_mut(&id) else { continue };
            let mut dealt = std::mem::take(&mut worker.queue.dealt);
            dealt.retain(|row| self.rows.contains_key(row));
            // batches in order need no more, and a long queue is not cut anew for each
            let first: Vec<RowId> = match pooled.batching {
                Batching::Fcfs(rows) => dealt.iter().take(rows as usize).copied().collect(),
                Batching::Sorted(_) | Batching::Dp => dealt.iter().copied().collect(),
            };
            let Some(worker) = self.workers.get(&id) else { continue };
            let cuts = self.cut(pooled, first, worker.spec.most_tokens(), &[worker]);
            let batch = cuts.into_iter().find(|cut| dealt.front().is_some_and(|oldest| cut.rows.contains(oldest)));
            let Cut { rows, time, .. } = batch.unwrap_or_default();
            dealt.retain(|row| !rows.contains(row));
            if let Some(worker) = self.workers.get_mut(&id) {
                worker.queue.dealt = dealt;
            }
            if !rows.is_empty() {
                self.queue_at(now, id, rows, time, actions);
            }
        }
    }

    /// The rows that were this worker's in turn are anybody's again.
    pub(super) fn take_dealt(&mut self, id: WorkerId) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        self.place_pool |= !worker.queue.dealt.is_empty();
        self.pool.extend(worker.queue.dealt.drain(..));
    }

    /// Whether it is time for a round; if not, and it is known when, a wake-up is asked for.
    fn is_due(&mut self, now: Micros, interval: Interval, actions: &mut Vec<Action>) -> bool {
        let wait = match interval {
            // a worker that has nothing to run does not wait
            Interval::AtOnce => return true,
            Interval::Fixed(tick) => tick,
            Interval::Adaptive { share, least } => {
                let loads = self.workers.values().filter(|worker| worker.ready()).map(|worker| worker.queue.load);
                // a cast saturates
                Micros((loads.min().unwrap_or_default().0 as f64 * share) as u64).max(least)
            }
        };
        let due = self.rounds.last.map_or(now, |last| last + wait);
        if now < due {
            actions.push(Action::WakeAt(due));
        }
        due <= now
    }

    /// Cuts rows into batches for these workers and queues them there. Rows for which none of them is large enough are
    /// given back.
    fn offload(
        &mut self,
        now: Micros,
        pooled: Pooled,
        mut waiting: Vec<RowId>,
        takes: impl Fn(&Worker) -> bool,
        actions: &mut Vec<Action>,
    ) -> Vec<RowId> {
        let workers: Vec<(WorkerId, &Worker)> =
            self.workers.iter().filter(|(_, worker)| takes(worker)).map(|(id, worker)| (*id, worker)).collect();
        if workers.is_empty() || waiting.is_empty() {
            return waiting;
        }
        let most: Vec<Tokens> = workers.iter().map(|(_, worker)| worker.spec.most_tokens()).collect();
        let mut limits = most.clone();
        limits.sort_unstable();
        limits.dedup();
        // Rows that fit every worker are cut for the smallest, so that all may take their batches; then those that need
        // a larger one. Where workers are alike there is one such class.
        let mut cuts = Vec::new();
        for least in limits {
            let fits = |id: &RowId| self.rows[id].total() <= least;
            let (rows, larger) = waiting.into_iter().partition(fits);
            waiting = larger;
            let able: Vec<&Worker> =
                workers.iter().map(|(_, worker)| *worker).filter(|worker| worker.spec.most_tokens() >= least).collect();
            cuts.extend(self.cut(pooled, rows, least, &able));
        }
        if pooled.offload == Offload::MaxMin {
            cuts.sort_by_key(|cut| Reverse(cut.time));
        }
        let loads = workers.iter().map(|(_, worker)| worker.queue.load).collect();
        let ids: Vec<WorkerId> = workers.iter().map(|(id, _)| *id).collect();
        let mut offloader = Offloader::new(loads).at_turn(self.rounds.turn);
        for cut in cuts {
            let may = |at: usize| most[at] >= cut.least;
            let chosen = match pooled.offload {
                Offload::RoundRobin => offloader.next(may),
                Offload::MaxMin => offloader.least(may),
            };
            let Some(at) = chosen else {
                self.pool.extend(cut.rows);
                continue;
            };
            let time = self.workers.get(&ids[at]).map_or(Micros::ZERO, |worker| self.batch_time(worker, &cut.rows));
            offloader.add(at, time);
            self.queue_at(now, ids[at], cut.rows, time, actions);
        }
        self.rounds.turn = offloader.turn();
        waiting
    }

    /// Batches of rows that fit all of these workers alone.
    fn cut(&self, pooled: Pooled, rows: Vec<RowId>, least: Tokens, able: &[&Worker]) -> Vec<Cut> {
        let Some(first) = able.first() else { return Vec::new() };
        let rows_of = |worker: &&Worker| worker.cap.map_or(worker.spec.max_rows, |cap| cap as u32);
        let batcher = Batcher {
            model: *first.estimator.model(),
            // a rectangle needs no less than rows in blocks
            layout: if able.iter().any(|w| w.spec.layout == Layout::Padded) { Layout::Padded } else { Layout::Paged },
            capacity: able.iter().map(|worker| worker.spec.blocks).min().unwrap_or_default(),
            block_size: self.model.block_size,
            max_rows: able.iter().map(rows_of).min().unwrap_or(1).max(1),
            steps: steps(&first.spec, rows.iter().filter_map(|id| self.rows.get(id)), self.slice_len()),
        };
        let extents: Vec<Extent> = rows.iter().map(|id| self.rows[id].extent()).collect();
        let most = batcher.max_rows;
        let split = match pooled.batching {
            Batching::Fcfs(n) => batcher.in_order(&extents, n.min(most)),
            Batching::Sorted(n) => batcher.by_length(&extents, n.min(most)),
            Batching::Dp => batcher.split_rows(&extents),
        };
        let groups = split.batches.into_iter().map(|group| group.rows);
        // each fits alone; should one not after all, the worker says so
        let alone = split.infeasible.into_iter().map(|at| vec![at]);
        let cuts = groups.chain(alone).map(|group| {
            let rows: Vec<RowId> = group.into_iter().map(|at| rows[at]).collect();
            Cut { least, time: self.batch_time(first, &rows), rows }
        });
        cuts.collect()
    }

    /// Time of all iterations of a batch on a worker.
    fn batch_time(&self, worker: &Worker, rows: &[RowId]) -> Micros {
        let all = || rows.iter().filter_map(|id| self.rows.get(id));
        let context = all().map(Row::tokens).sum();
        let longest = all().map(Row::tokens).max().unwrap_or_default();
        let load = BatchLoad { rows: rows.len() as u64, longest, context, uncached: context };
        let steps = steps(&worker.spec, all(), self.slice_len());
        worker.estimator.time(worker.estimator.model().slice(&load, steps.into()))
    }

    fn queue_at(&mut self, now: Micros, at: WorkerId, ids: Vec<RowId>, time: Micros, actions: &mut Vec<Action>) {
        let mut rows = Vec::with_capacity(ids.len());
        for id in ids {
            let Some(row) = self.rows.get(&id) else { continue };
            rows.push(row.key());
            let tokens = row.tokens();
            self.settle(now, id, at, tokens, actions);
        }
        if let Some(worker) = self.workers.get_mut(&at) {
            worker.queue.formed.push_back(Formed { rows, time });
            worker.queue.load += time;
        }
    }

    /// The worker gets its first batch, and the one after it to stand.
    pub(super) fn plan_formed(&mut self, now: Micros, id: WorkerId, actions: &mut Vec<Action>) {
        while let Some((batch, plan)) = self.next_formed(id) {
            actions.push(Action::Plan(id, plan));
            if self.workers.get(&id).is_some_and(|worker| worker.running.is_some()) {
                self.sent(id, batch);
            } else {
                // nothing runs: it starts on arrival
                self.started(now, id, batch, false, actions);
            }
        }
    }

    fn next_formed(&mut self, id: WorkerId) -> Option<(Batch, Plan)> {
        let slice_len = self.slice_len();
        let worker = self.workers.get_mut(&id)?;
        if worker.running.is_some() && !worker.sent.is_empty() {
            return None;
        }
        let most = worker.cap.unwrap_or(usize::MAX).clamp(1, (worker.spec.max_rows as usize).max(1));
        while let Some(mut formed) = worker.queue.formed.pop_front() {
            let here = |row: &&Row, key: &RowKey| row.is_at(*key, id);
            let rows = formed.rows.iter().filter_map(|key| self.rows.get(&key.row).filter(|row| here(row, key)));
            let mut rows: Vec<&Row> = rows.collect();
            // what a message or a worker that refused more does not take runs next
            let mut told = Tokens::ZERO;
            let fit = rows.iter().take(most).take_while(|row| {
                let first = told == Tokens::ZERO;
                told += row.tokens();
                first || told <= MOST_TOLD
            });
            let rest: Vec<RowKey> = rows.split_off(fit.count()).into_iter().map(Row::key).collect();
            if rows.is_empty() {
                worker.queue.load = worker.queue.load.saturating_sub(formed.time);
                continue;
            }
            let added: Vec<RowKey> = rows.iter().map(|row| row.key()).collect();
            // they begin together: nobody is kept waiting by a prompt
            let whole = |row: &&Row| RowStart { prefill_budget: Tokens::ZERO, ..start(row, worker) };
            let add: Vec<RowStart> = rows.iter().map(whole).collect();
            let steps = steps(&worker.spec, rows.iter().copied(), slice_len);
            let extents: Vec<Extent> = rows.iter().map(|row| row.extent()).collect();
            let ceiling = batch_ceiling(worker.spec.layout, &extents, steps, self.model.block_size);
            if !rest.is_empty() {
                worker.queue.formed.push_front(Formed { rows: rest, time: Micros::ZERO });
            }
            let (base, no, expected) = (worker.base(), worker.next_plan(), formed.time);
            formed.rows.clone_from(&added);
            worker.queue.sent.push((no, formed));
            let keep = Keep::List(Vec::new());
            let plan = Plan { no, base, keep, leave: Vec::new(), add, steps, ceiling, ranks: Vec::new() };
            let (members, joining) = (added.clone(), added.clone());
            return Some((Batch { no, base, steps, members, joining, added, ceiling, expected }, plan));
        }
        None
    }

    /// A batch ended: its time is taken back, and its unfinished rows come back to the pool.
    pub(super) fn formed_ended(&mut self, id: WorkerId, batch: PlanNo, actions: &mut Vec<Action>) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let Some(at) = worker.queue.sent.iter().position(|(no, _)| *no == batch) else { return };
        let (_, formed) = worker.queue.sent.remove(at);
        worker.queue.load = worker.queue.load.saturating_sub(formed.time);
        for key in formed.rows {
            if self.rows.get(&key.row).is_some_and(|row| row.is_at(key, id)) {
                self.drop_at_worker(key.row, actions);
                self.send_back(key.row);
            }
        }
        // also without rows to place: the worker may have nothing to run next
        self.place_pool = true;
    }

    /// Plans were refused: what will not start any more is sent again, before what waits.
    pub(super) fn formed_refused(&mut self, id: WorkerId) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        for at in (0..worker.queue.sent.len()).rev() {
            let no = worker.queue.sent[at].0;
            if worker.runs(no) || worker.sent.iter().any(|batch| batch.no == no) {
                continue;
            }
            let (_, formed) = worker.queue.sent.remove(at);
            if formed.rows.iter().any(|key| here(&mut self.rows, *key, id).is_some()) {
                worker.queue.formed.push_front(formed);
            } else {
                worker.queue.load = worker.queue.load.saturating_sub(formed.time);
                // it may have nothing to run now
                self.place_pool = true;
            }
        }
    }
}
