//! The scheduler of one model pool: a state machine that is told what happened and when, and says what to do.
//!
//! Events change rows, workers and the index; then rows without a home are placed (longest work first, each choice
//! committed at once); then every worker whose next batch changed gets a plan. It knows no clock, socket or text.

use hashbrown::HashMap;

use crate::block::{BlockHash, hash_blocks, new_tokens};
use crate::decision::{Decision, Decisions};
use crate::event::{
    Action, Event, FinishReason, NewRequest, Refusal, Rejection, RowEnd, RowReport, RowTokens, SliceReport,
    WorkerMessage,
};
use crate::ids::{DecisionId, Epoch, PlanNo, RequestId, RowId, RowKey, WorkerId};
use crate::index::{BlockTrie, PrefixIndex};
use crate::plan;
use crate::policy::{Candidate, Policy, PolicyName, View, choose};
use crate::pool::{ModelSpec, WorkerSpec};
use crate::row::{Home, Place, Row};
use crate::units::{Blocks, Bytes, Micros, Tokens};
use crate::worker::{Worker, WorkerLoad};

/// How long a row that lost its worker waits for another before it ends with an error.
const MOVE_WAIT: Micros = Micros(1_000_000);
/// A row that fails this often while it runs is taken for the cause.
const MAX_LOSSES: u32 = 2;
/// A worker that is given work this often and does none of it, or refuses it, is not asked again.
const MOST_FRUITLESS: u32 = 64;
/// Decisions kept for listings.
const DECISIONS: usize = 1024;

/// Fixed for the life of a scheduler.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where arrivals go.
    pub policy: PolicyName,
    /// S: most iterations of a slice, at least 1.
    pub slice_len: u32,
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
    workers: std::collections::BTreeMap<WorkerId, Worker>,
    rows: HashMap<RowId, Row>,
    requests: HashMap<RequestId, Choices>,
    /// Rows without a home.
    pool: Vec<RowId>,
    /// A worker came or went, or a row came back: it is worth trying to place the pool.
    place_pool: bool,
    arrivals: u64,
    turn: u64,
    decisions: Decisions,
    depths: Vec<usize>,
    scores: Vec<u128>,
}

impl Scheduler {
    /// An empty pool for workers of this model.
    pub fn new(model: ModelSpec, config: Config) -> Self {
        Self {
            policy: config.policy.policy(config.seed),
            model,
            config: Config { slice_len: config.slice_len.max(1), ..config },
            index: BlockTrie::default(),
            workers: std::collections::BTreeMap::new(),
            rows: HashMap::new(),
            requests: HashMap::new(),
            pool: Vec::new(),
            place_pool: false,
            arrivals: 0,
            turn: 0,
            decisions: Decisions::new(DECISIONS),
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

    // ---------------------------------------------------------------- requests

    fn arrived(&mut self, request: &NewRequest, actions: &mut Vec<Action>) {
        if let Err(rejection) = self.admit(request) {
            actions.push(Action::Reject(request.id, rejection));
            return;
        }
        let chain: std::sync::Arc<[BlockHash]> =
            hash_blocks(request.root, &request.prompt, self.model.block_size).into();
        self.requests.insert(request.id, Choices { made: request.choices, live: request.choices });
        for choice in 0..request.choices {
            let id = RowId { request: request.id, choice };
            self.arrivals += 1;
            let row = Row {
                id,
                attempt: 0,
                order: self.arrivals,
                root: request.root,
                prompt: request.prompt.clone(),
                chain: chain.clone(),
                output: Vec::new(),
                max_tokens: request.max_tokens,
                place: Place::Pool { until: None },
                cached: None,
                slices: 0,
                losses: 0,
                last_worker: None,
            };
            self.rows.insert(id, row);
            self.pool.push(id);
        }
        self.place_pool = true;
    }

    fn admit(&self, request: &NewRequest) -> Result<(), Rejection> {
        if request.prompt.is_empty() || request.choices == 0 || request.max_tokens == Tokens::ZERO {
            return Err(Rejection::Empty);
        }
        let ready = || self.workers.values().filter(|w| w.ready());
        let most = ready().map(|w| w.spec.most_tokens()).max().ok_or(Rejection::NoWorker)?;
        let needed = Tokens(request.prompt.len() as u64) + request.max_tokens;
        if needed > most {
            return Err(Rejection::NeverFits { needed, most });
        }
        if self.rows.len() + request.choices as usize > self.config.max_rows {
            let retry_after = ready().map(|w| w.work).min().unwrap_or(Micros::ZERO);
            return Err(Rejection::Overloaded { retry_after });
        }
        Ok(())
    }

    fn cancelled(&mut self, request: RequestId, choice: Option<u32>, actions: &mut Vec<Action>) {
        let mut rows: Vec<RowId> = match choice {
            Some(choice) => vec![RowId { request, choice }],
            // a request's rows are few and named by number, so none needs to be searched for
            None => {
                let made = self.requests.get(&request).map_or(0, |choices| choices.made);
                (0..made).map(|choice| RowId { request, choice }).collect()
            }
        };
        rows.retain(|id| self.rows.contains_key(id));
        for id in rows {
            self.drop_at_worker(id, actions);
            self.finish(id, FinishReason::Cancelled, None, actions);
        }
    }

    /// Tells the row's worker to end it, where a plan has told the worker of it.
    fn drop_at_worker(&self, id: RowId, actions: &mut Vec<Action>) {
        let Some(row) = self.rows.get(&id) else { return };
        let Some(home) = row.home() else { return };
        let Some(worker) = self.workers.get(&home.worker) else { return };
        let key = row.key();
        if home.known || worker.sent.iter().any(|batch| batch.added.contains(&key)) {
            actions.push(Action::Drop(home.worker, vec![key]));
        }
    }

    fn finish(&mut self, id: RowId, reason: FinishReason, error: Option<String>, actions: &mut Vec<Action>) {
        self.leave_home(id);
        let Some(row) = self.rows.remove(&id) else { return };
        if let Some(choices) = self.requests.get_mut(&id.request) {
            choices.live -= 1;
            if choices.live == 0 {
                self.requests.remove(&id.request);
            }
        }
        let end = RowEnd {
            reason,
            error,
            prompt: Tokens(row.prompt.len() as u64),
            cached: row.cached.unwrap_or(Tokens::ZERO),
            emitted: Tokens(row.output.len() as u64),
            slices: row.slices,
            worker: row.last_worker,
        };
        actions.push(Action::Finish(id, end));
    }

    // ---------------------------------------------------------------- placement and ledger

    /// Gives every row of the pool a worker: most work first, each choice committed before the next is made.
    fn place(&mut self, now: Micros, actions: &mut Vec<Action>) {
        if !std::mem::take(&mut self.place_pool) || self.pool.is_empty() {
            return;
        }
        let mut waiting = std::mem::take(&mut self.pool);
        waiting.retain(|id| self.rows.contains_key(id));
        waiting.sort_by_key(|id| {
            let row = &self.rows[id];
            (std::cmp::Reverse(row.tokens()), row.order)
        });
        for id in waiting {
            if !self.place_row(now, id, actions) {
                self.keep_in_pool(now, id, actions);
            }
        }
    }

    fn place_row(&mut self, now: Micros, id: RowId, actions: &mut Vec<Action>) -> bool {
        let row = &self.rows[&id];
        let (tokens, total, chain) = (row.tokens(), row.total(), row.chain.clone());
        let Some(decision) = self.decide(now, Some(id), tokens, total, &chain) else { return false };
        let Some(chosen) = decision.chosen().copied() else { return false };
        self.turn += 1;
        self.decisions.push(decision);
        self.settle(id, chosen.worker, chosen.new_tokens);
        actions.push(Action::Placed(id, chosen.worker));
        true
    }

    /// No worker takes the row now: admitted, but its worker was lost since. It waits a little for another.
    fn keep_in_pool(&mut self, now: Micros, id: RowId, actions: &mut Vec<Action>) {
        let Some(Row { place: Place::Pool { until }, .. }) = self.rows.get_mut(&id) else { return };
        let deadline = *until.get_or_insert(now + MOVE_WAIT);
        if deadline <= now {
            self.finish(id, FinishReason::Error, Some("its worker was lost and no other is ready".into()), actions);
        } else {
            self.pool.push(id);
            actions.push(Action::WakeAt(deadline));
        }
    }

    fn decide(
        &mut self,
        now: Micros,
        row: Option<RowId>,
        tokens: Tokens,
        total: Tokens,
        chain: &[BlockHash],
    ) -> Option<Decision> {
        self.index.matched(chain, &mut self.depths);
        let size = self.model.block_size;
        let candidates: Vec<Candidate> = self
            .workers
            .iter()
            .filter(|(_, w)| w.ready() && total <= w.spec.most_tokens())
            .map(|(&worker, w)| Candidate {
                worker,
                new_tokens: new_tokens(tokens, self.depths.get(worker.0 as usize).copied().unwrap_or(0), size),
                queued: w.queued,
                batch_size: w.rows.len() as u64,
                work: w.work,
                free: w.spec.blocks.saturating_sub(w.running.as_ref().map_or(Blocks::ZERO, |b| b.ceiling)),
            })
            .collect();
        let view = View { candidates: &candidates, turn: self.turn };
        let at = choose(&*self.policy, view, &mut self.scores)?;
        Some(Decision {
            id: DecisionId(self.turn),
            at: now,
            row,
            tokens,
            policy: self.policy.name(),
            seed: self.config.seed,
            turn: self.turn,
            worker: candidates[at].worker,
            scores: self.scores.clone(),
            candidates,
        })
    }

    /// Commits a choice: Q, b, W and the prompt's blocks move now, not when the worker says so.
    fn settle(&mut self, id: RowId, at: WorkerId, prefill: Tokens) {
        let (Some(row), Some(worker)) = (self.rows.get_mut(&id), self.workers.get_mut(&at)) else { return };
        let work = worker.rates.work(prefill, row.slice(self.config.slice_len));
        row.place = Place::At(Home { worker: at, known: false, prefill, work, committed: true });
        row.last_worker = Some(at);
        worker.queued += prefill;
        worker.work += work;
        worker.rows.insert(row.order, id);
        worker.dirty = true;
        self.index.commit(at, &row.chain);
    }

    /// Takes back exactly what was committed for the row, and the row from its worker.
    fn leave_home(&mut self, id: RowId) {
        let Some(row) = self.rows.get_mut(&id) else { return };
        let Place::At(home) = std::mem::replace(&mut row.place, Place::Pool { until: None }) else { return };
        let Some(worker) = self.workers.get_mut(&home.worker) else { return };
        worker.rows.remove(&row.order);
        worker.queued = worker.queued.saturating_sub(home.prefill);
        worker.work = worker.work.saturating_sub(home.work);
        worker.dirty = true;
        if home.committed {
            if worker.runs(row.key()).is_some() {
                // the worker has computed these blocks, or is about to: its deltas come before its report
                worker.unconfirmed.push(row.chain.clone());
            } else {
                self.index.take_back(home.worker, &row.chain);
            }
        }
    }

    /// The row leaves a worker that failed it. One that ran and failed too often is taken for the cause.
    fn lose(&mut self, id: RowId, ran: bool, why: &str, actions: &mut Vec<Action>) {
        self.send_back(id);
        let Some(row) = self.rows.get_mut(&id) else { return };
        row.losses += u32::from(ran);
        if row.losses >= MAX_LOSSES {
            let why = format!("{why}, for the {MAX_LOSSES}nd time");
            self.finish(id, FinishReason::Error, Some(why), actions);
        }
    }

    /// The row leaves its worker and wants another.
    fn send_back(&mut self, id: RowId) {
        self.leave_home(id);
        if let Some(row) = self.rows.get_mut(&id) {
            row.attempt += 1;
            self.pool.push(id);
            self.place_pool = true;
        }
    }

    // ---------------------------------------------------------------- workers

    fn joined(&mut self, id: WorkerId, spec: WorkerSpec, actions: &mut Vec<Action>) {
        if self.workers.contains_key(&id) {
            self.lost(id, actions);
        }
        self.workers.insert(id, Worker::new(spec));
    }

    fn lost(&mut self, id: WorkerId, actions: &mut Vec<Action>) {
        let Some(worker) = self.workers.get(&id) else { return };
        let rows: Vec<(RowId, bool)> = worker
            .rows
            .values()
            .map(|row| (*row, self.rows.get(row).is_some_and(|r| worker.runs(r.key()).is_some())))
            .collect();
        for (row_id, ran) in rows {
            self.lose(row_id, ran, "its worker was lost", actions);
        }
        self.workers.remove(&id);
        self.index.remove_worker(id);
    }

    /// Rows the worker does not know go elsewhere, where there is an elsewhere; the others finish here.
    fn drain(&mut self, id: WorkerId, actions: &mut Vec<Action>) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        worker.draining = true;
        let most = self.workers.values().filter(|w| w.ready()).map(|w| w.spec.most_tokens()).max();
        let rows: Vec<RowId> = self.workers[&id].rows.values().copied().collect();
        for row_id in rows {
            let Some(row) = self.rows.get(&row_id) else { continue };
            if row.home().is_some_and(|home| !home.known) && most.is_some_and(|most| row.total() <= most) {
                // a plan in flight may name it: were it not dropped, it would run there too
                self.drop_at_worker(row_id, actions);
                self.send_back(row_id);
            }
        }
    }

    fn message(&mut self, id: WorkerId, epoch: Epoch, seq: u64, message: WorkerMessage, actions: &mut Vec<Action>) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        if worker.spec.epoch != epoch || seq < worker.next_seq {
            return;
        }
        if seq > worker.next_seq {
            // something was lost: what blocks it has is unknown, what tokens it drew shows in the next index
            actions.push(Action::Resync(id));
        }
        worker.next_seq = seq.saturating_add(1);
        match message {
            WorkerMessage::Snapshot { chunk, last, hashes } => {
                if chunk == 0 {
                    self.index.clear_stored(id);
                }
                for hash in hashes {
                    self.index.store(id, hash);
                }
                if last && !std::mem::replace(&mut worker.synced, true) {
                    self.place_pool = true;
                }
                self.check_stored(id, actions);
            }
            WorkerMessage::KvDelta { removed, stored } => {
                for hash in removed {
                    self.index.evict(id, hash);
                }
                for hash in stored {
                    self.index.store(id, hash);
                }
                self.check_stored(id, actions);
            }
            WorkerMessage::Steps { batch: _, rows } => {
                for row in rows {
                    self.drew(id, &row, actions);
                }
            }
            WorkerMessage::SliceReported(report) => self.reported(id, &report, actions),
            WorkerMessage::Refused { plan, reason, rows, detail } => {
                self.refused(id, plan, reason, &rows, &detail, actions);
            }
            WorkerMessage::Heartbeat => {}
        }
    }

    /// No worker has more blocks than it announced: that bounds the index.
    fn check_stored(&self, id: WorkerId, actions: &mut Vec<Action>) {
        let Some(worker) = self.workers.get(&id) else { return };
        let stored = self.index.stored(id);
        if stored > worker.spec.blocks {
            let why = format!("it says it has {stored} and announced {}", worker.spec.blocks);
            actions.push(Action::Quarantine(id, why));
        }
    }

    /// Tokens of a row: each index goes to the client once, in order, whatever arrives.
    fn drew(&mut self, at: WorkerId, drawn: &RowTokens, actions: &mut Vec<Action>) {
        let id = drawn.key.row;
        let Some(row) = self.rows.get_mut(&id) else { return };
        if row.attempt != drawn.key.attempt || !row.is_at(at) {
            return;
        }
        let have = row.output.len();
        let Some(skip) = have.checked_sub(drawn.first_index as usize) else {
            // tokens were lost on the way: nothing follows them, so the row is run again from what the client has
            actions.push(Action::Drop(at, vec![drawn.key]));
            return self.lose(id, true, "its tokens were lost", actions);
        };
        let ids: Vec<u32> = drawn.ids.iter().skip(skip).copied().collect();
        let (ids_len, row_limit) = (ids.len(), row.max_tokens.0 as usize);
        if have + ids_len > row_limit || ids.iter().any(|id| *id >= self.model.vocab) {
            let why = format!("it sent a token past the limit or outside the vocabulary for {}", drawn.key);
            actions.push(Action::Quarantine(at, why));
            return;
        }
        let prompt = Tokens(row.prompt.len() as u64);
        row.cached = row.cached.or(drawn.cached.map(|cached| cached.min(prompt)));
        if !ids.is_empty() {
            row.output.extend_from_slice(&ids);
            if let Some(home) = row.home_mut() {
                let prefill = std::mem::replace(&mut home.prefill, Tokens::ZERO);
                if let Some(worker) = self.workers.get_mut(&at) {
                    worker.fruitless = 0;
                    worker.queued = worker.queued.saturating_sub(prefill);
                }
            }
            actions.push(Action::Tokens { row: id, first_index: have as u32, ids });
        }
        // at its limit it has ended, whether the worker says so or not
        let at_limit = have + ids_len == row_limit;
        if let Some(reason) = drawn.finish.or(at_limit.then_some(FinishReason::Length)) {
            let error = (reason == FinishReason::Error).then(|| "the worker failed to run it".to_owned());
            self.finish(id, reason, error, actions);
        }
    }

    fn reported(&mut self, id: WorkerId, report: &SliceReport, actions: &mut Vec<Action>) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let running = worker.running.take();
        if running.as_ref().map(|batch| batch.no) != Some(report.batch) {
            let why = format!("it reported batch {}, which does not run", report.batch);
            actions.push(Action::Quarantine(id, why));
            return;
        }
        worker.rates.observe(report);
        let idled = report.rows.iter().all(|row| row.computed == Tokens::ZERO);
        let waiting = running.iter().flat_map(|batch| &batch.members).any(|member| {
            self.rows.get(&member.key.row).is_some_and(|row| row.attempt == member.key.attempt && row.is_at(id))
        });
        worker.fruitless = if idled && waiting { worker.fruitless + 1 } else { 0 };
        if worker.fruitless > MOST_FRUITLESS {
            actions.push(Action::Quarantine(id, format!("{MOST_FRUITLESS} batches ran without computing anything")));
            return;
        }
        worker.last_ended = report.batch;
        worker.cap = None;
        worker.dirty = true;
        for chain in std::mem::take(&mut worker.unconfirmed) {
            self.index.take_back(id, &chain);
        }
        for row in &report.rows {
            self.row_reported(id, row, actions);
        }
        // The plan that starts now. Where the worker had none but one is on its way, that one starts on arrival;
        // of several the first does, and the worker answers STALE to the others.
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let starts = match report.next {
            Some(no) => {
                let sent = std::mem::take(&mut worker.sent);
                sent.into_iter().find(|batch| batch.no == no)
            }
            None => {
                worker.sent.retain(|batch| batch.base == report.batch);
                (!worker.sent.is_empty()).then(|| worker.sent.remove(0))
            }
        };
        if let (None, Some(no)) = (&starts, report.next) {
            actions.push(Action::Quarantine(id, format!("it starts plan {no}, which was not sent")));
            return;
        }
        if let Some(batch) = starts {
            self.started(id, batch, actions);
        }
    }

    /// The finished slice's commit is taken back, the next one's made.
    fn row_reported(&mut self, at: WorkerId, report: &RowReport, actions: &mut Vec<Action>) {
        let Some(row) = self.rows.get_mut(&report.key.row) else { return };
        if row.attempt != report.key.attempt || !row.is_at(at) {
            return;
        }
        match report.finish {
            None => {}
            Some(FinishReason::Error) => {
                let why = "the worker failed to run it".to_owned();
                return self.finish(report.key.row, FinishReason::Error, Some(why), actions);
            }
            // the step that said so was lost, and perhaps tokens with it: they are drawn again
            Some(_) => return self.lose(report.key.row, true, "its last tokens were lost", actions),
        }
        let prefilled = report.held && report.prefill_left == Tokens::ZERO;
        let prefill = if report.held { report.prefill_left } else { row.tokens() };
        let steps = row.slice(self.config.slice_len);
        let chain = row.chain.clone();
        let (Some(home), Some(worker)) = (row.home_mut(), self.workers.get_mut(&at)) else { return };
        let work = worker.rates.work(prefill, steps);
        worker.queued = worker.queued.saturating_sub(home.prefill) + prefill;
        worker.work = worker.work.saturating_sub(home.work) + work;
        home.prefill = prefill;
        home.work = work;
        if prefilled && std::mem::replace(&mut home.committed, false) {
            self.index.take_back(at, &chain);
        }
    }

    /// A plan runs: its members' tokens are exact now, and what moved meanwhile is dropped.
    fn started(&mut self, id: WorkerId, mut batch: crate::worker::Batch, actions: &mut Vec<Action>) {
        let mut gone = Vec::new();
        batch.members.retain_mut(|member| {
            match self.rows.get_mut(&member.key.row) {
                Some(row) if row.attempt == member.key.attempt && row.is_at(id) => {
                    member.tokens = row.tokens();
                    row.slices += 1;
                    if let Some(home) = row.home_mut() {
                        home.known = true;
                    }
                    return true;
                }
                // finished rows are gone at the worker too; a row with a newer attempt lives elsewhere
                Some(_) => gone.push(member.key),
                None => {}
            }
            false
        });
        if !gone.is_empty() {
            actions.push(Action::Drop(id, gone));
        }
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.running = Some(batch);
            worker.dirty = true;
        }
    }

    fn refused(
        &mut self,
        id: WorkerId,
        plan: PlanNo,
        reason: Refusal,
        rows: &[RowKey],
        detail: &str,
        actions: &mut Vec<Action>,
    ) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let ran = worker.running.as_ref().is_some_and(|batch| batch.no == plan);
        let batch = if ran {
            for chain in std::mem::take(&mut worker.unconfirmed) {
                self.index.take_back(id, &chain);
            }
            worker.sent.retain(|batch| batch.base != plan);
            worker.running.take()
        } else {
            let at = worker.sent.iter().position(|batch| batch.no == plan);
            at.and_then(|at| match reason {
                // refused as it came: what stood before still stands
                Refusal::Stale | Refusal::Unsupported => Some(worker.sent.remove(at)),
                // refused at its start: it had replaced all before it
                _ => worker.sent.drain(..=at).next_back(),
            })
        };
        let Some(batch) = batch else { return };
        worker.dirty = true;
        worker.fruitless += 1;
        if worker.fruitless > MOST_FRUITLESS {
            let why = format!("it refused {MOST_FRUITLESS} plans in a row, the last because: {detail}");
            actions.push(Action::Quarantine(id, why));
            return;
        }
        let base = worker.running.as_ref().map_or(worker.last_ended, |running| running.no);
        if reason == Refusal::Stale && (ran || batch.base == base) {
            // its report would have come first: the two views have parted
            actions
                .push(Action::Quarantine(id, format!("plan {plan} is stale to it, though {} is its base", batch.base)));
            return;
        }
        let kept: Vec<RowKey> = batch.members.iter().map(|member| member.key).collect();
        let unknown: &[RowKey] = match (reason, rows) {
            (Refusal::UnknownRow, []) => &kept,
            (Refusal::UnknownRow, named) => named,
            _ => &[],
        };
        let untold = if ran { &batch.added[..] } else { &[] };
        for key in untold.iter().chain(unknown) {
            if let Some(row) = self.rows.get_mut(&key.row).filter(|row| row.attempt == key.attempt)
                && let Some(home) = row.home_mut().filter(|home| home.worker == id)
            {
                home.known = false;
            }
        }
        match reason {
            Refusal::Stale | Refusal::UnknownRow => {}
            Refusal::Unsupported => {
                let named = if rows.is_empty() { &batch.added } else { rows };
                if named.is_empty() {
                    // no row is at fault, so the same plan would be refused for ever
                    actions.push(Action::Quarantine(id, format!("it refused plan {plan}: {detail}")));
                }
                for key in named {
                    if self.rows.get(&key.row).is_some_and(|row| row.attempt == key.attempt && row.is_at(id)) {
                        self.drop_at_worker(key.row, actions);
                        let why = format!("the worker refused it: {detail}");
                        self.finish(key.row, FinishReason::Error, Some(why), actions);
                    }
                }
            }
            Refusal::NoMemory | Refusal::TooManyRows if batch.members.len() > 1 => {
                // its ceilings and ours disagree: half as many rows until a batch runs
                worker.cap = Some(batch.members.len() / 2);
            }
            Refusal::NoMemory | Refusal::TooManyRows => {
                for member in batch.members {
                    self.drop_at_worker(member.key.row, actions);
                    let why = format!("the worker refused it alone: {detail}");
                    self.finish(member.key.row, FinishReason::Error, Some(why), actions);
                }
            }
        }
        // of several plans on their way to an idle worker the next one starts instead
        if let Some(worker) = self.workers.get_mut(&id)
            && worker.running.is_none()
            && let Some(at) = worker.sent.iter().position(|batch| batch.base == worker.last_ended)
        {
            let next = worker.sent.remove(at);
            self.started(id, next, actions);
        }
    }

    // ---------------------------------------------------------------- plans

    fn plan(&mut self, actions: &mut Vec<Action>) {
        let dirty: Vec<WorkerId> =
            self.workers.iter_mut().filter_map(|(id, w)| std::mem::take(&mut w.dirty).then_some(*id)).collect();
        for id in dirty {
            let Some(worker) = self.workers.get_mut(&id) else { continue };
            let Some((batch, plan)) = plan::next(worker, &self.rows, self.config.slice_len) else { continue };
            actions.push(Action::Plan(id, plan));
            if worker.running.is_some() {
                worker.sent.push(batch);
            } else {
                // nothing runs: it starts on arrival
                self.started(id, batch, actions);
                // and the plan after it stands from the start, so that the worker never waits for a report
                let worker = self.workers.get_mut(&id).expect("it was there");
                worker.dirty = false;
                if let Some((batch, plan)) = plan::next(worker, &self.rows, self.config.slice_len) {
                    actions.push(Action::Plan(id, plan));
                    worker.sent.push(batch);
                }
            }
        }
    }

    // ---------------------------------------------------------------- what the shell may ask

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

    /// Memory of the prefix index, estimated.
    pub fn index_bytes(&self) -> Bytes {
        self.index.bytes()
    }

    /// What all workers of the pool have in common.
    pub fn model(&self) -> &ModelSpec {
        &self.model
    }
}
