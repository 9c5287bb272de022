//! The rare moves of rows whose worker is there. A continuation stays where its KV is: moving it at every slice end never
//! paid (simulation study, every policy). What moves it is a drain, lost KV, the request-seconds of both ends, or, before it
//! has started, a worker that would be done sooner.

use super::Scheduler;
use crate::block::new_tokens;
use crate::constants::MOST_BALANCED;
use crate::event::Action;
use crate::ids::{RowId, WorkerId};
use crate::index::PrefixIndex;
use crate::mode::Mode;
use crate::row::{Place, Stage};
use crate::units::{Micros, Tokens};

impl Scheduler {
    /// Moves a row to a worker that was chosen for it.
    fn move_to(&mut self, now: Micros, id: RowId, to: WorkerId, new: Tokens, actions: &mut Vec<Action>) {
        self.drop_at_worker(id, actions);
        self.leave_home(id);
        if let Some(row) = self.rows.get_mut(&id) {
            row.attempt += 1;
        }
        self.settle(now, id, to, new, actions);
    }

    /// Whether another worker could have the row.
    pub(super) fn has_elsewhere(&self, id: RowId, at: WorkerId) -> bool {
        let Some(row) = self.rows.get(&id) else { return false };
        self.workers.iter().any(|(other, w)| *other != at && w.ready() && row.total() <= w.spec.most_tokens())
    }

    fn uncached(&mut self, id: RowId, at: WorkerId) -> Tokens {
        let Some(row) = self.rows.get(&id) else { return Tokens::ZERO };
        let tokens = row.tokens();
        self.index.matched(&row.chain, &mut self.depths);
        new_tokens(tokens, self.depths.get(at.0 as usize).copied().unwrap_or(0), self.model.block_size)
    }

    /// Rows that go on: one moves if the request-seconds of all rows at both ends, over what it is expected to draw still,
    /// fall by more than its prefill costs the rows it joins. Each is asked about once in S tokens.
    /// [simulation study: safe at any frequency, moves under 0.2 % of slices]
    pub(super) fn weigh_moves(&mut self, now: Micros, at: WorkerId, rows: &[RowId], actions: &mut Vec<Action>) {
        let Some(mean) = self.mean_output.tokens().filter(|_| self.config.mode == Mode::Slice) else { return };
        if rows.is_empty() {
            return;
        }
        let slice_len = self.slice_len();
        let least = self.workers.iter().filter(|(other, w)| **other != at && w.ready());
        let Some(to) = least.min_by_key(|(_, w)| w.batch_size()).map(|(&to, _)| to) else { return };
        for &id in rows {
            let Some(row) = self.rows.get_mut(&id) else { continue };
            row.weighed = row.output.len();
            let (tokens, total) = (row.tokens(), row.total());
            let (Some(home), Some(there)) = (self.workers.get(&at), self.workers.get(&to)) else { return };
            let (ours, theirs) = (home.batch_size(), there.batch_size());
            // where it would have to wait for a place nothing is gained
            if theirs + 1 >= ours || total > there.spec.most_tokens() || !there.has_room(tokens, slice_len) {
                continue;
            }
            // answers end at a steady rate: what is left is what a whole one has
            let ahead = mean.min(total.saturating_sub(tokens).0 as f64);
            let seconds = |rows: u64, step: Micros| rows as f64 * step.0 as f64;
            let (less, more) = (home.context.saturating_sub(tokens), there.context + tokens);
            let stay =
                seconds(ours, home.step(ours, home.context)) + seconds(theirs, there.step(theirs, there.context));
            let moved =
                seconds(ours - 1, home.step(ours - 1, less)) + seconds(theirs + 1, there.step(theirs + 1, more));
            let prefill = there.estimator.time(there.estimator.model().prefill(tokens, Tokens::ZERO));
            if ahead * moved + seconds(theirs + 1, prefill) < ahead * stay {
                let new = self.uncached(id, to);
                self.moves.weighed += 1;
                self.move_to(now, id, to, new, actions);
            }
        }
    }

    /// Rows that have not started move from the worker with the most work to the one with the least, as long as both
    /// ends are done sooner than the former would have been, lost hits included.
    pub(super) fn balance(&mut self, now: Micros, actions: &mut Vec<Action>) {
        if self.config.mode != Mode::Slice || self.workers.len() < 2 {
            return;
        }
        for _ in 0..MOST_BALANCED {
            let loaded = self.workers.iter().filter(|(_, w)| w.waiting > 0).max_by_key(|(_, w)| w.work(now));
            let Some((&from, most)) = loaded else { return };
            let free = self.workers.iter().filter(|(id, w)| **id != from && w.ready());
            let Some((&to, least)) = free.min_by_key(|(_, w)| (w.work(now), w.batch_size())) else { return };
            let (most_work, least_work) = (most.work(now), least.work(now));
            let slice = most.running.as_ref().map_or(most.bare, |running| running.record.band.hi);
            if most_work.saturating_sub(least_work) <= slice {
                return;
            }
            // the youngest would wait longest
            let waits = |id: &&RowId| {
                let home = self.rows.get(*id).and_then(|row| row.home());
                home.is_some_and(|home| !home.known && home.stage == Stage::Waiting)
            };
            let Some(id) = most.rows.values().rev().find(waits).copied() else { return };
            let Some(row) = self.rows.get(&id) else { return };
            let slice_len = self.slice_len();
            let (tokens, total, steps) = (row.tokens(), row.total(), row.slice(slice_len));
            let Place::At(home) = &row.place else { return };
            let here = home.work;
            if total > least.spec.most_tokens() {
                return;
            }
            let new = self.uncached(id, to);
            let Some(least) = self.workers.get(&to) else { return };
            let first = if least.batch_size() == 0 { least.bare_slice(slice_len) } else { Micros::ZERO };
            let there = least.work_of(tokens, new, steps) + first;
            if here == Micros::ZERO || least_work + there >= most_work {
                return;
            }
            self.moves.balanced += 1;
            self.move_to(now, id, to, new, actions);
        }
    }
}
