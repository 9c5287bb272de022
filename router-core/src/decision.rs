//! One routing decision with all it was made from, so that anybody can make it again.

use std::collections::VecDeque;

use crate::guard::Sighting;
use crate::ids::{DecisionId, RowId, WorkerId};
use crate::policy::{Anticipation, Candidate, PolicyName, View, choose};
use crate::units::{Micros, Tokens};

/// Why a row went where it went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Its name. A dry run has the name that the next decision will get.
    pub id: DecisionId,
    /// When.
    pub at: Micros,
    /// For which row; `None` for a dry run.
    pub row: Option<RowId>,
    /// Known tokens of the row.
    pub tokens: Tokens,
    /// By which policy.
    pub policy: PolicyName,
    /// The policy's seed.
    pub seed: u64,
    /// Decisions before this one.
    pub turn: u64,
    /// What was expected of the requests to come.
    pub anticipation: Anticipation,
    /// What the hotspot guard made of the prompt, if it is one of a class.
    pub guard: Option<Sighting>,
    /// Who could have it, and who could but for the guard.
    pub candidates: Vec<Candidate>,
    /// Their scores.
    pub scores: Vec<u128>,
    /// Who got it.
    pub worker: WorkerId,
}

impl Decision {
    /// The choice made again from the record alone.
    pub fn recompute(&self) -> Option<WorkerId> {
        let view = View { candidates: &self.candidates, turn: self.turn, anticipation: self.anticipation };
        let at = choose(&*self.policy.policy(self.seed), view, &mut Vec::new())?;
        Some(self.candidates[at].worker)
    }

    /// What was known of the winner.
    pub fn chosen(&self) -> Option<&Candidate> {
        self.candidates.iter().find(|c| c.worker == self.worker)
    }
}

/// The latest decisions, at most `capacity` of them.
pub(crate) struct Decisions {
    capacity: usize,
    latest: VecDeque<Decision>,
}

impl Decisions {
    pub(crate) fn new(capacity: usize) -> Self {
        Self { capacity, latest: VecDeque::new() }
    }

    pub(crate) fn push(&mut self, decision: Decision) {
        if self.latest.len() == self.capacity {
            self.latest.pop_front();
        }
        self.latest.push_back(decision);
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Decision> {
        self.latest.iter()
    }
}
