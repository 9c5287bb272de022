//! Which worker a row goes to, and the ledger: what a choice commits is taken back exactly.

use super::Scheduler;
use crate::block::{BlockHash, new_tokens};
use crate::cost::{Band, Layout};
use crate::decision::Decision;
use crate::event::{Action, FinishReason};
use crate::ids::{DecisionId, RowId, WorkerId};
use crate::index::PrefixIndex;
use crate::policy::{Anticipation, Candidate, PolicyName, View, choose, least};
use crate::row::{Home, Place, Row, Stage};
use crate::units::{Blocks, Micros, Tokens};

/// How long a row that lost its worker waits for another before it ends with an error.
const MOVE_WAIT: Micros = Micros(1_000_000);
/// A row that fails this often while it runs is taken for the cause.
const MAX_LOSSES: u32 = 2;

impl Scheduler {
    /// Gives every row of the pool a worker: most work first, each choice committed before the next is made.
    pub(super) fn place(&mut self, now: Micros, actions: &mut Vec<Action>) {
        if let Some(pooled) = self.pooled() {
            return self.round(now, pooled, actions);
        }
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

    pub(super) fn place_row(&mut self, now: Micros, id: RowId, actions: &mut Vec<Action>) -> bool {
        let row = &self.rows[&id];
        let (tokens, total, chain, first) = (row.tokens(), row.total(), row.chain.clone(), row.attempt == 0);
        let Some(decision) = self.decide(now, Some(id), tokens, total, &chain) else { return false };
        let Some(chosen) = decision.chosen().copied() else { return false };
        self.turn += 1;
        if let Some(guard) = &mut self.guard {
            guard.decided(decision.guard.as_ref());
            // what comes back was counted when it came
            if first {
                guard.count(&chain, self.ready);
            }
        }
        if first {
            self.latest.observe(now);
        }
        self.decisions.push(decision);
        self.settle(now, id, chosen.worker, chosen.new_tokens, actions);
        true
    }

    /// No worker takes the row now: admitted, but its worker was lost since. It waits a little for another.
    pub(super) fn keep_in_pool(&mut self, now: Micros, id: RowId, actions: &mut Vec<Action>) {
        let Some(Row { place: Place::Pool { until }, .. }) = self.rows.get_mut(&id) else { return };
        let deadline = *until.get_or_insert(now + MOVE_WAIT);
        if deadline <= now {
            self.finish(id, FinishReason::Error, Some("its worker was lost and no other is ready".into()), actions);
        } else {
            self.pool.push(id);
            actions.push(Action::WakeAt(deadline));
        }
    }

    pub(super) fn decide(
        &mut self,
        now: Micros,
        row: Option<RowId>,
        tokens: Tokens,
        total: Tokens,
        chain: &[BlockHash],
    ) -> Option<Decision> {
        self.index.matched(chain, &mut self.depths);
        let (size, slice_len) = (self.model.block_size, self.slice_len());
        let timed = self.config.policy == PolicyName::ProductTime;
        let depth = |worker: WorkerId| self.depths.get(worker.0 as usize).copied().unwrap_or(0);
        let new_of = |worker| new_tokens(tokens, depth(worker), size);
        let mut ready = 0;
        let mut candidates: Vec<Candidate> = self
            .workers
            .iter()
            .filter(|(_, w)| w.ready())
            .inspect(|_| ready += 1)
            .filter(|(_, w)| total <= w.spec.most_tokens())
            .map(|(&worker, w)| Candidate {
                worker,
                new_tokens: new_of(worker),
                queued: w.queued,
                batch_size: w.batch_size(),
                work: w.work(now),
                joined: if timed { w.joined(tokens, new_of(worker), slice_len) } else { Micros::ZERO },
                free: w.spec.blocks.saturating_sub(w.running.as_ref().map_or(Blocks::ZERO, |r| r.batch.ceiling)),
                filtered: false,
            })
            .collect();
        self.ready = ready;
        let anticipation = self.anticipation(now);
        let view = View { candidates: &candidates, turn: self.turn, anticipation };
        let best = choose(&*self.policy, view, &mut self.scores)?;
        let guard = self.guard.as_ref();
        let guard = guard.and_then(|guard| guard.judge(chain, &self.depths, &mut candidates, best));
        let at = if guard.is_some_and(|sighting| sighting.filtered) {
            least(View { candidates: &candidates, turn: self.turn, anticipation }, &self.scores).unwrap_or(best)
        } else {
            best
        };
        Some(Decision {
            id: DecisionId(self.turn),
            at: now,
            row,
            tokens,
            policy: self.policy.name(),
            seed: self.config.seed,
            turn: self.turn,
            anticipation,
            guard,
            worker: candidates[at].worker,
            scores: self.scores.clone(),
            candidates,
        })
    }

    /// What is expected of the requests to come, where the policy asks for it: by the rows that came, and by what the models
    /// of the ready workers take for a chunk.
    fn anticipation(&mut self, now: Micros) -> Anticipation {
        if self.config.policy != PolicyName::ProductAnticipating {
            return Anticipation::default();
        }
        let ready = self.workers.values().filter(|worker| worker.ready());
        let (workers, seconds) = ready.fold((0.0, 0.0), |(n, sum), worker| (n + 1.0, sum + worker.prefill_time()));
        if workers == 0.0 {
            return Anticipation::default();
        }
        Anticipation::new(self.latest.rate(now) / workers, seconds / workers)
    }

    /// Commits a choice: Q, b, W and the prompt's blocks move now, not when the worker says so.
    pub(super) fn settle(&mut self, now: Micros, id: RowId, at: WorkerId, prefill: Tokens, actions: &mut Vec<Action>) {
        let (slice_len, pooled) = (self.slice_len(), self.pooled().is_some());
        let (Some(row), Some(worker)) = (self.rows.get_mut(&id), self.workers.get_mut(&at)) else { return };
        let left = row.total().saturating_sub(row.tokens());
        // in a pool rows wait for rounds and are prefilled again: nobody knows how often
        let eta = if pooled { Band::default() } else { worker.eta(now, row.tokens(), prefill, left, slice_len) };
        let steps = row.slice(slice_len);
        let work = worker.work_of(row.tokens(), prefill, steps);
        // a rectangle leaves nothing to find
        let committed = worker.spec.layout == Layout::Paged;
        row.place = Place::At(Home {
            worker: at,
            known: false,
            prefill,
            work,
            stage: Stage::Waiting,
            budget: Tokens::ZERO,
            committed,
        });
        row.last_worker = Some(at);
        row.weighed = row.output.len();
        worker.queued += prefill;
        worker.context += row.tokens();
        worker.bare = worker.bare_slice(steps.0 as u32);
        worker.waiting += 1;
        worker.unplanned += work;
        worker.rows.insert(row.order, id);
        worker.joins.placed(now);
        worker.dirty = true;
        self.touched.push(at);
        if committed {
            self.index.commit(at, &row.chain);
        }
        actions.push(Action::Placed(id, at, eta));
    }

    /// Takes back exactly what was committed for the row, and the row from its worker.
    pub(super) fn leave_home(&mut self, id: RowId) {
        let Some(row) = self.rows.get_mut(&id) else { return };
        let tokens = row.tokens();
        let Place::At(mut home) = std::mem::replace(&mut row.place, Place::Pool { until: None }) else { return };
        let Some(worker) = self.workers.get_mut(&home.worker) else { return };
        let ran = matches!(home.stage, Stage::Running { .. });
        worker.restage(&mut home, Stage::Planned);
        worker.rows.remove(&row.order);
        worker.queued = worker.queued.saturating_sub(home.prefill);
        worker.context = worker.context.saturating_sub(tokens);
        // a batch that only shrinks needs no new plan, unless somebody waits for the place
        worker.dirty |= worker.waiting > 0 || worker.sent.is_empty();
        self.touched.push(home.worker);
        if home.committed {
            if ran {
                // the worker has computed these blocks, or is about to: its deltas come before its report
                worker.unconfirmed.push(row.chain.clone());
            } else {
                self.index.take_back(home.worker, &row.chain);
            }
        }
    }

    /// The row leaves a worker that failed it. One that ran and failed too often is taken for the cause.
    pub(super) fn lose(&mut self, id: RowId, ran: bool, why: &str, actions: &mut Vec<Action>) {
        self.send_back(id);
        let Some(row) = self.rows.get_mut(&id) else { return };
        row.losses += u32::from(ran);
        if row.losses >= MAX_LOSSES {
            let why = format!("{why}, which makes {MAX_LOSSES} times");
            self.finish(id, FinishReason::Error, Some(why), actions);
        }
    }

    /// The row leaves its worker and wants another.
    pub(super) fn send_back(&mut self, id: RowId) {
        self.leave_home(id);
        if let Some(row) = self.rows.get_mut(&id) {
            row.attempt += 1;
            self.pool.push(id);
            self.place_pool = true;
        }
    }
}
