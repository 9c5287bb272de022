//! Workers come, drain and go, and what they say: blocks, tokens, reports, refusals. None of it is believed unchecked.

use super::{Scheduler, here};
use crate::cost::Layout;
use crate::event::{Action, FinishReason, Refusal, RowReport, RowTokens, SliceReport, WorkerMessage};
use crate::ids::{Epoch, PlanNo, RowId, RowKey, WorkerId};
use crate::index::PrefixIndex;
use crate::mode::Mode;
use crate::pool::WorkerSpec;
use crate::row::{Row, Stage};
use crate::units::{Micros, Tokens};
use crate::worker::{Batch, Worker};

/// A worker that is given work this often and does none of it, or refuses it, is not asked again.
const MOST_FRUITLESS: u32 = 64;

impl Scheduler {
    pub(super) fn joined(&mut self, id: WorkerId, spec: WorkerSpec, actions: &mut Vec<Action>) {
        if self.workers.contains_key(&id) {
            self.lost(id, actions);
        }
        self.workers.insert(id, Worker::new(spec));
    }

    pub(super) fn lost(&mut self, id: WorkerId, actions: &mut Vec<Action>) {
        self.take_dealt(id);
        let Some(worker) = self.workers.get(&id) else { return };
        let rows: Vec<(RowId, bool)> =
            worker.rows.values().map(|row| (*row, self.rows.get(row).is_some_and(Row::runs))).collect();
        for (row_id, ran) in rows {
            self.lose(row_id, ran, "its worker was lost", actions);
        }
        self.workers.remove(&id);
        self.index.remove_worker(id);
    }

    /// Rows that do not run go elsewhere, where there is an elsewhere; the others follow at the end of their slice.
    pub(super) fn drain(&mut self, id: WorkerId, actions: &mut Vec<Action>) {
        self.take_dealt(id);
        let Some(worker) = self.workers.get_mut(&id) else { return };
        worker.draining = true;
        let most = self.workers.values().filter(|w| w.ready()).map(|w| w.spec.most_tokens()).max();
        let rows: Vec<RowId> = self.workers[&id].rows.values().copied().collect();
        for row_id in rows {
            let Some(row) = self.rows.get(&row_id) else { continue };
            if !row.runs() && most.is_some_and(|most| row.total() <= most) {
                // a plan in flight may name it: were it not dropped, it would run there too
                self.drop_at_worker(row_id, actions);
                self.send_back(row_id);
            }
        }
    }

    pub(super) fn message(
        &mut self,
        now: Micros,
        id: WorkerId,
        epoch: Epoch,
        seq: u64,
        message: WorkerMessage,
        actions: &mut Vec<Action>,
    ) {
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
            WorkerMessage::Steps { batch, rows } => {
                if let Some(running) = worker.running.as_mut().filter(|running| running.batch.no == batch) {
                    // a burst tells of several at once
                    let told = rows.iter().map(|row| row.ids.len()).max().unwrap_or(0).max(1);
                    running.seen = running.seen.saturating_add(told as u32);
                }
                for row in rows {
                    self.drew(id, row, actions);
                }
            }
            WorkerMessage::SliceReported(report) => self.reported(now, id, &report, actions),
            WorkerMessage::Refused { plan, reason, rows, detail } => {
                self.refused(id, plan, reason, &rows, &detail, actions);
            }
            WorkerMessage::Heartbeat => {}
        }
    }

    /// No worker has more blocks than it announced: that bounds the index.
    pub(super) fn check_stored(&self, id: WorkerId, actions: &mut Vec<Action>) {
        let Some(worker) = self.workers.get(&id) else { return };
        let stored = self.index.stored(id);
        if stored > worker.spec.blocks {
            let why = format!("it says it has {stored} and announced {}", worker.spec.blocks);
            actions.push(Action::Quarantine(id, why));
        }
    }

    /// Tokens of a row: each index goes to the client once, in order, whatever arrives.
    pub(super) fn drew(&mut self, at: WorkerId, drawn: RowTokens, actions: &mut Vec<Action>) {
        let id = drawn.key.row;
        let Some(row) = self.rows.get_mut(&id) else { return };
        if !row.is_at(drawn.key, at) {
            return;
        }
        let have = row.output.len();
        let Some(skip) = have.checked_sub(drawn.first_index as usize) else {
            // tokens were lost on the way: nothing follows them, so the row is run again from what the client has
            actions.push(Action::Drop(at, vec![drawn.key]));
            return self.lose(id, true, "its tokens were lost", actions);
        };
        let RowTokens { mut ids, mut logprobs, finish, cached, key, .. } = drawn;
        ids.drain(..skip.min(ids.len()));
        // they are beside the ids, if they are there at all
        logprobs.drain(..skip.min(logprobs.len()));
        let (ids_len, row_limit) = (ids.len(), row.max_tokens.0 as usize);
        if have + ids_len > row_limit || ids.iter().any(|id| *id >= self.model.vocab) {
            let why = format!("it sent a token past the limit or outside the vocabulary for {key}");
            actions.push(Action::Quarantine(at, why));
            return;
        }
        let prompt = Tokens(row.prompt.len() as u64);
        row.cached = row.cached.or(cached.map(|cached| cached.min(prompt)));
        if !ids.is_empty() {
            row.output.extend_from_slice(&ids);
            if let Some(home) = row.home_mut() {
                let prefill = std::mem::replace(&mut home.prefill, Tokens::ZERO);
                if let Some(worker) = self.workers.get_mut(&at) {
                    worker.fruitless = 0;
                    worker.context += Tokens(ids.len() as u64);
                    worker.queued = worker.queued.saturating_sub(prefill);
                }
            }
            actions.push(Action::Tokens { row: id, first_index: have as u32, ids, logprobs });
        }
        // at its limit it has ended, whether the worker says so or not
        let at_limit = have + ids_len == row_limit;
        if let Some(reason) = finish.or(at_limit.then_some(FinishReason::Length)) {
            let error = (reason == FinishReason::Error).then(|| "the worker failed to run it".to_owned());
            self.finish(id, reason, error, actions);
        }
    }

    pub(super) fn reported(&mut self, now: Micros, id: WorkerId, report: &SliceReport, actions: &mut Vec<Action>) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let Some(running) = worker.running.take_if(|running| running.batch.no == report.batch) else {
            let why = format!("it reported batch {}, which does not run", report.batch);
            actions.push(Action::Quarantine(id, why));
            return;
        };
        let idled = report.rows.iter().all(|row| row.computed == Tokens::ZERO);
        let waiting =
            running.batch.members.iter().any(|key| self.rows.get(&key.row).is_some_and(|row| row.is_at(*key, id)));
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
        self.ended(id, running, report);
        self.slices_ended += 1;
        let mut goes_on = Vec::new();
        for row in &report.rows {
            goes_on.extend(self.row_reported(id, row, actions));
        }
        self.weigh_moves(now, id, &goes_on, actions);
        self.formed_ended(id, report.batch, actions);
        // The plan that starts now. Where the worker had none but one is on its way, that one starts on arrival;
        // of several the first does, and the worker answers STALE to the others.
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let starts = if let Some(no) = report.next {
            // whatever else was sent on the old base will not start
            std::mem::take(&mut worker.sent).into_iter().find(|batch| batch.no == no)
        } else {
            worker.sent.retain(|batch| batch.base == report.batch);
            (!worker.sent.is_empty()).then(|| worker.sent.remove(0))
        };
        if let (None, Some(no)) = (&starts, report.next) {
            actions.push(Action::Quarantine(id, format!("it starts plan {no}, which was not sent")));
            return;
        }
        if let Some(batch) = starts {
            self.started(now, id, batch, report.next.is_some(), actions);
        }
    }

    /// The finished slice's commit is taken back, the next one's made. Gives the row back if it goes on here and no move
    /// of it was weighed for S tokens.
    pub(super) fn row_reported(
        &mut self,
        at: WorkerId,
        report: &RowReport,
        actions: &mut Vec<Action>,
    ) -> Option<RowId> {
        let slice_len = self.slice_len();
        let row = self.rows.get_mut(&report.key.row)?;
        if !row.is_at(report.key, at) {
            return None;
        }
        match report.finish {
            None => {}
            Some(FinishReason::Error) => {
                let why = "the worker failed to run it".to_owned();
                self.finish(report.key.row, FinishReason::Error, Some(why), actions);
                return None;
            }
            // the step that said so was lost, and perhaps tokens with it: they are drawn again
            Some(_) => {
                self.lose(report.key.row, true, "its last tokens were lost", actions);
                return None;
            }
        }
        let id = report.key.row;
        let evicted = !report.held && row.cached.is_some();
        let prefilled = report.held && report.prefill_left == Tokens::ZERO;
        let prefill = if report.held { report.prefill_left.min(row.tokens()) } else { row.tokens() };
        let steps = row.slice(slice_len);
        let due = row.output.len() >= row.weighed + slice_len as usize;
        let (tokens, chain) = (row.tokens(), row.chain.clone());
        let (Some(home), Some(worker)) = (row.home_mut(), self.workers.get_mut(&at)) else { return None };
        let work = worker.work_of(tokens, prefill, steps);
        worker.queued = worker.queued.saturating_sub(home.prefill) + prefill;
        let stage = home.stage;
        worker.restage(home, Stage::Planned);
        home.prefill = prefill;
        home.work = work;
        worker.restage(home, stage);
        if prefilled && std::mem::replace(&mut home.committed, false) {
            self.index.take_back(at, &chain);
        }
        let (draining, paged) = (worker.draining, worker.spec.layout == Layout::Paged);
        // without KV here it is at home nowhere
        if draining || (evicted && paged && self.config.mode == Mode::Slice) {
            if self.has_elsewhere(id, at) {
                let count = if draining { &mut self.moves.drained } else { &mut self.moves.evicted };
                *count += 1;
                self.drop_at_worker(id, actions);
                self.send_back(id);
            }
            return None;
        }
        (prefilled && due).then_some(id)
    }

    pub(super) fn refused(
        &mut self,
        id: WorkerId,
        plan: PlanNo,
        reason: Refusal,
        rows: &[RowKey],
        detail: &str,
        actions: &mut Vec<Action>,
    ) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let ran = worker.runs(plan);
        if ran {
            for chain in std::mem::take(&mut worker.unconfirmed) {
                self.index.take_back(id, &chain);
            }
        }
        let mut refused = worker.take_refused(plan, reason);
        for key in refused.iter().flat_map(|batch| &batch.members) {
            let Some(home) = here(&mut self.rows, *key, id) else { continue };
            let waits = match home.stage {
                Stage::Waiting => false,
                // a newer plan may have it still
                Stage::Planned => !worker.sent.last().is_some_and(|standing| standing.joining.contains(key)),
                Stage::Running { .. } => ran,
            };
            if waits {
                worker.restage(home, Stage::Waiting);
            }
        }
        let Some(batch) = refused.pop() else { return };
        worker.dirty = true;
        worker.fruitless += 1;
        if worker.fruitless > MOST_FRUITLESS {
            let why = format!("it refused {MOST_FRUITLESS} plans in a row, the last because: {detail}");
            actions.push(Action::Quarantine(id, why));
            return;
        }
        let base = worker.base();
        if reason == Refusal::Stale && (ran || batch.base == base) {
            // its report would have come first: the two views have parted
            actions
                .push(Action::Quarantine(id, format!("plan {plan} is stale to it, though {} is its base", batch.base)));
            return;
        }
        let kept: Vec<RowKey> = batch.members.clone();
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
        self.blame(id, &batch, reason, rows, detail, actions);
        self.formed_refused(id);
        // of several plans on their way to an idle worker the next one starts instead
        if let Some(worker) = self.workers.get_mut(&id)
            && worker.running.is_none()
            && let Some(at) = worker.sent.iter().position(|batch| batch.base == worker.last_ended)
        {
            let next = worker.sent.remove(at);
            self.started(self.now, id, next, false, actions);
        }
    }

    /// Which rows pay for a refusal: those it names, or all of a batch that cannot be made smaller.
    fn blame(
        &mut self,
        id: WorkerId,
        batch: &Batch,
        reason: Refusal,
        rows: &[RowKey],
        detail: &str,
        actions: &mut Vec<Action>,
    ) {
        match reason {
            Refusal::Stale | Refusal::UnknownRow => {}
            Refusal::Unsupported => {
                let named = if rows.is_empty() { &batch.added } else { rows };
                if named.is_empty() {
                    // no row is at fault, so the same plan would be refused for ever
                    actions.push(Action::Quarantine(id, format!("it refused plan {}: {detail}", batch.no)));
                }
                for key in named {
                    if self.rows.get(&key.row).is_some_and(|row| row.is_at(*key, id)) {
                        self.drop_at_worker(key.row, actions);
                        let why = format!("the worker refused it: {detail}");
                        self.finish(key.row, FinishReason::Error, Some(why), actions);
                    }
                }
            }
            Refusal::NoMemory | Refusal::TooManyRows if batch.members.len() > 1 => {
                // its ceilings and ours disagree: half as many rows until a batch runs
                if let Some(worker) = self.workers.get_mut(&id) {
                    worker.cap = Some(batch.members.len() / 2);
                }
            }
            Refusal::NoMemory | Refusal::TooManyRows => {
                for key in &batch.members {
                    // it may have moved meanwhile: another worker may take it
                    if self.rows.get(&key.row).is_some_and(|row| row.is_at(*key, id)) {
                        self.drop_at_worker(key.row, actions);
                        let why = format!("the worker refused it alone: {detail}");
                        self.finish(key.row, FinishReason::Error, Some(why), actions);
                    }
                }
            }
        }
    }
}
