//! From batch to batch: what starts, what was foreseen of it, when it is cut, how it ended.

use super::{LATEST, Scheduler, here};
use crate::constants::LINK;
use crate::cost::RowLoad;
use crate::cut::Verdict;
use crate::event::{Action, BatchEnd, FinishReason, SliceReport};
use crate::ids::{RowKey, WorkerId};
use crate::mode::Mode;
use crate::record::{BatchOutcome, BatchRecord, Work};
use crate::row::Stage;
use crate::units::{Micros, Tokens};
use crate::worker::{Batch, Running};

impl Scheduler {
    /// A plan runs: its members' tokens are exact now, and what moved meanwhile is dropped. It `follows` if it stood when
    /// the batch before it ended.
    pub(super) fn started(
        &mut self,
        now: Micros,
        id: WorkerId,
        batch: Batch,
        follows: bool,
        actions: &mut Vec<Action>,
    ) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let (mut gone, mut loads, mut members) = (Vec::new(), Vec::new(), Vec::new());
        let mut entered = Vec::new();
        for key in &batch.members {
            match self.rows.get_mut(&key.row) {
                Some(row) if row.is_at(*key, id) => {
                    row.slices += 1;
                    let (tokens, left) = (row.tokens(), row.total().saturating_sub(row.tokens()));
                    let Some(home) = row.home_mut() else { continue };
                    home.known = true;
                    loads.push(RowLoad { tokens, uncomputed: home.prefill.max(Tokens(1)), left, budget: home.budget });
                    entered.push((*key, tokens));
                    members.push(*key);
                }
                // finished rows are gone at the worker too; a row with a newer attempt lives elsewhere
                Some(_) => gone.push(*key),
                None => {}
            }
        }
        if !gone.is_empty() {
            actions.push(Action::Drop(id, gone));
        }
        let forecast = worker.estimator.forecast(&loads, worker.spec.chunk, batch.steps);
        let record = BatchRecord {
            worker: id,
            batch: batch.no,
            at: now,
            rows: members.len() as u64,
            steps: batch.steps,
            band: worker.estimator.band(&forecast, batch.steps),
            ceiling: batch.ceiling,
            outcome: None,
        };
        worker.joins.begin(now);
        let ends_after = batch.steps;
        let batch = Batch { members, ..batch };
        let rows = entered.clone();
        let running = Running { batch, live: 0, follows, forecast, record, entered, ends_after, seen: 0, cut: false };
        worker.running = Some(running);
        worker.dirty = true;
        for (key, from) in rows {
            if let Some(home) = here(&mut self.rows, key, id) {
                worker.restage(home, Stage::Running { from });
            }
        }
        self.touched.push(id);
    }

    /// The batch is over: its rows wait, and what was foreseen is compared with what happened.
    pub(super) fn ended(&mut self, id: WorkerId, running: Running, report: &SliceReport) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        for key in &running.batch.members {
            if let Some(home) = here(&mut self.rows, *key, id)
                && matches!(home.stage, Stage::Running { .. })
            {
                worker.restage(home, Stage::Waiting);
            }
        }
        // whatever was sent on it and does not start is planned again
        for key in worker.sent.iter().flat_map(|batch| batch.joining.clone()).collect::<Vec<_>>() {
            if let Some(home) = here(&mut self.rows, key, id)
                && home.stage == Stage::Planned
            {
                worker.restage(home, Stage::Waiting);
            }
        }
        let time = report.prefill + report.decode;
        // more iterations than were asked for, or more time than has passed: nothing is learned of it, but that it was said
        let passed = self.now.saturating_sub(running.record.at);
        if report.steps > running.batch.steps || time > passed + passed + LINK {
            self.doubtful += 1;
        } else if report.steps > 0 {
            // before a batch that began on arrival there was nothing to run: that is no price of a start
            if running.follows {
                worker.joins.exposed(report.idle);
            }
            let band = worker.estimator.band(&running.forecast, report.steps);
            let expected = worker.estimator.expected(&running.forecast, report.steps);
            if report.end != BatchEnd::Error {
                worker.estimator.observe(&running.forecast, report.steps, time);
            }
            let emitted: Tokens = report.rows.iter().map(|row| row.emitted).sum();
            let stopped = report.rows.iter().filter(|row| row.finish == Some(FinishReason::Stop)).count();
            worker.estimator.observe_ends(emitted.0, stopped as u64);
            let work = Work::of(running.entered, report);
            let (end, steps, peak) = (report.end, report.steps, report.peak);
            let outcome = BatchOutcome { end, steps, time, expected, band, peak, work };
            if self.batches.len() == LATEST {
                self.batches.pop_front();
            }
            self.batches.push_back(BatchRecord { outcome: Some(outcome), ..running.record });
        }
    }

    /// Cuts the running slice where joining is worth more than one more start: see `cut.rs`.
    pub(super) fn consider_cut(&mut self, now: Micros, id: WorkerId, actions: &mut Vec<Action>) {
        if self.config.mode != Mode::Slice {
            return;
        }
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let Some(running) = worker.running.as_ref().filter(|running| !running.cut) else { return };
        let Some(standing) = worker.sent.last().filter(|standing| standing.base == running.batch.no) else { return };
        let alive = |key: &&RowKey| self.rows.get(&key.row).filter(|row| row.attempt == key.attempt);
        let joining = standing.joining.iter().filter_map(|key| alive(&key));
        let (n, urgent) = joining.fold((0, false), |(n, urgent), row| (n + 1, urgent || row.urgent));
        let (no, live, seen, steps) = (running.batch.no, running.live as u64, running.seen, running.batch.steps);
        // a worker that pads prefills the whole rectangle again
        let more = worker.restart_cost(live);
        let verdict = worker.joins.verdict(now, n, live, more);
        // its last step, or the end of its last row, ends it anyway
        if n == 0 || live == 0 || seen + 1 >= steps {
            return;
        }
        match verdict {
            Verdict::GoOn if !urgent => {}
            Verdict::AskAt(at) if !urgent => actions.push(Action::WakeAt(at)),
            _ => {
                actions.push(Action::Cut(id, no));
                if let Some(running) = &mut worker.running {
                    running.cut = true;
                    running.ends_after = (seen + 1).min(running.ends_after);
                }
            }
        }
    }
}
