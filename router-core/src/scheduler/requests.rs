//! Requests in and rows out: admission, cancelling, the one end that each row has.

use std::sync::Arc;

use super::{Choices, Scheduler};
use crate::block::{BlockHash, hash_blocks};
use crate::event::{Action, FinishReason, NewRequest, Rejection, RowEnd};
use crate::ids::{RequestId, RowId};
use crate::row::{Place, Row};
use crate::units::{Micros, Tokens};

impl Scheduler {
    pub(super) fn arrived(&mut self, now: Micros, request: &NewRequest, actions: &mut Vec<Action>) {
        if let Err(rejection) = self.admit(now, request) {
            actions.push(Action::Reject(request.id, rejection));
            return;
        }
        let chain: Arc<[BlockHash]> = hash_blocks(request.root, &request.prompt, self.model.block_size).into();
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
                urgent: request.urgent,
                weighed: 0,
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

    pub(super) fn admit(&self, now: Micros, request: &NewRequest) -> Result<(), Rejection> {
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
            let retry_after = ready().map(|w| w.work(now)).min().unwrap_or(Micros::ZERO);
            return Err(Rejection::Overloaded { retry_after });
        }
        Ok(())
    }

    pub(super) fn cancelled(&mut self, request: RequestId, choice: Option<u32>, actions: &mut Vec<Action>) {
        // a request's rows are few and named by number, so none needs to be searched for
        let made = self.requests.get(&request).map_or(0, |choices| choices.made);
        let choices = choice.map_or(0..made, |one| one..one.saturating_add(1));
        let mut rows: Vec<RowId> = choices.map(|choice| RowId { request, choice }).collect();
        rows.retain(|id| self.rows.contains_key(id));
        for id in rows {
            self.drop_at_worker(id, actions);
            self.finish(id, FinishReason::Cancelled, None, actions);
        }
    }

    /// Tells the row's worker to end it, where a plan has told the worker of it.
    pub(super) fn drop_at_worker(&self, id: RowId, actions: &mut Vec<Action>) {
        let Some(row) = self.rows.get(&id) else { return };
        let Some(home) = row.home() else { return };
        let Some(worker) = self.workers.get(&home.worker) else { return };
        let key = row.key();
        if home.known || worker.sent.iter().any(|batch| batch.added.contains(&key)) {
            actions.push(Action::Drop(home.worker, vec![key]));
        }
    }

    pub(super) fn finish(&mut self, id: RowId, reason: FinishReason, error: Option<String>, actions: &mut Vec<Action>) {
        self.leave_home(id);
        let Some(row) = self.rows.remove(&id) else { return };
        if let Some(choices) = self.requests.get_mut(&id.request) {
            choices.live -= 1;
            if choices.live == 0 {
                self.requests.remove(&id.request);
            }
        }
        if matches!(reason, FinishReason::Stop | FinishReason::Length) {
            self.mean_output.observe(row.output.len());
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
}
