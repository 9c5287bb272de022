//! What every worker does alike with plans: which one stands, when one starts, and which rows it runs.

use hashbrown::HashSet;
use router_core::{Keep, Plan, PlanNo, Refusal, RowKey, WorkerMessage, WorkerSpec};

use crate::sequence::{Terms, invalid};

/// A plan, and the terms of its new rows.
pub(crate) type Told = (Plan, Vec<(RowKey, Terms)>);

/// Plans of one session.
#[derive(Default)]
pub(crate) struct Plans {
    standing: Option<Told>,
    last_ended: PlanNo,
    /// Rows of the last batch that did not finish, in its order.
    survivors: Vec<RowKey>,
    /// Rows that ended since the last batch started: a plan may still list them.
    ended: HashSet<RowKey>,
}

impl Plans {
    /// A plan arrives while this batch runs. It comes back where it starts at once.
    pub(crate) fn arrive(
        &mut self,
        told: Told,
        running: Option<PlanNo>,
        spec: &WorkerSpec,
        out: &mut Vec<WorkerMessage>,
    ) -> Option<Told> {
        let (plan, _) = &told;
        let (no, base) = (plan.no, plan.base);
        if plan.steps == 0 {
            refuse(no, Refusal::Unsupported, Vec::new(), "steps".into(), out);
            return None;
        }
        if let Some(bad) = plan.add.iter().find(|start| invalid(start, spec)) {
            refuse(no, Refusal::Unsupported, vec![bad.key], "prompt_ids or max_tokens".into(), out);
            return None;
        }
        let newer = self.standing.as_ref().is_none_or(|(standing, _)| standing.no < no);
        if running == Some(base) && newer {
            self.standing = Some(told);
        } else if running.is_none() && base == self.last_ended {
            return Some(told);
        } else {
            refuse(no, Refusal::Stale, Vec::new(), format!("base {base} does not run"), out);
        }
        None
    }

    /// A batch has ended with these rows unfinished; the plan that starts now.
    pub(crate) fn batch_ended(&mut self, batch: PlanNo, survivors: Vec<RowKey>) -> Option<Told> {
        self.last_ended = batch;
        self.survivors = survivors;
        self.standing.take().filter(|(plan, _)| plan.base == batch)
    }

    /// The known rows that a plan runs; `None` where it is refused.
    pub(crate) fn members(
        &self,
        plan: &Plan,
        knows: impl Fn(&RowKey) -> bool,
        out: &mut Vec<WorkerMessage>,
    ) -> Option<Vec<RowKey>> {
        let mut members = match &plan.keep {
            Keep::List(list) => {
                let unknown: Vec<RowKey> =
                    list.iter().filter(|key| !knows(key) && !self.ended.contains(*key)).copied().collect();
                if !unknown.is_empty() {
                    refuse(plan.no, Refusal::UnknownRow, unknown, "keep_rows".into(), out);
                    return None;
                }
                list.clone()
            }
            Keep::Survivors => self.survivors.clone(),
        };
        members.retain(|key| knows(key) && !plan.leave.contains(key));
        Some(members)
    }

    /// A batch starts.
    pub(crate) fn started(&mut self) {
        self.ended.clear();
    }

    /// A row has ended.
    pub(crate) fn row_ended(&mut self, key: RowKey) {
        self.ended.insert(key);
    }

    /// A dropped row leaves the plan that stands.
    pub(crate) fn strike(&mut self, key: RowKey) {
        let Some((plan, _)) = &mut self.standing else { return };
        plan.add.retain(|start| start.key != key);
        if let Keep::List(list) = &mut plan.keep {
            list.retain(|listed| *listed != key);
        }
    }
}

pub(crate) fn refuse(plan: PlanNo, reason: Refusal, rows: Vec<RowKey>, detail: String, out: &mut Vec<WorkerMessage>) {
    out.push(WorkerMessage::Refused { plan, reason, rows, detail });
}
