//! A row as the router keeps it: its tokens so far, where it is, and what was committed for it.

use std::sync::Arc;

use crate::block::BlockHash;
use crate::ids::{RowId, RowKey, WorkerId};
use crate::memory::Extent;
use crate::units::{Micros, Tokens};

pub(crate) struct Row {
    pub(crate) id: RowId,
    pub(crate) attempt: u32,
    /// Place in the order of arrival over the whole pool; older rows go first everywhere.
    pub(crate) order: u64,
    pub(crate) root: BlockHash,
    pub(crate) prompt: Arc<[u32]>,
    /// Whole blocks of the prompt.
    pub(crate) chain: Arc<[BlockHash]>,
    pub(crate) output: Vec<u32>,
    pub(crate) max_tokens: Tokens,
    /// A running slice is cut for it.
    pub(crate) urgent: bool,
    /// Output tokens it had when a move was last weighed.
    pub(crate) weighed: usize,
    pub(crate) place: Place,
    /// Prompt tokens the first dispatch that drew a token found cached.
    pub(crate) cached: Option<Tokens>,
    pub(crate) slices: u32,
    /// Workers lost under it. A request that ends every worker it meets must end itself.
    pub(crate) losses: u32,
    pub(crate) last_worker: Option<WorkerId>,
}

/// Where a row is.
pub(crate) enum Place {
    /// Nowhere: to be placed, by this time where a time is set.
    Pool { until: Option<Micros> },
    /// On a worker.
    At(Home),
}

/// The worker that has a row, and what the choice of it committed there.
pub(crate) struct Home {
    pub(crate) worker: WorkerId,
    /// A plan that has started named it, so the worker has its tokens.
    pub(crate) known: bool,
    /// Its part of the worker's Q: tokens not prefilled yet.
    pub(crate) prefill: Tokens,
    /// What it adds to a slice there: its part of the worker's W while it waits.
    pub(crate) work: Micros,
    pub(crate) stage: Stage,
    /// See [`crate::RowStart::prefill_budget`]; as it was told.
    pub(crate) budget: Tokens,
    /// Its prompt's blocks are committed in the index.
    pub(crate) committed: bool,
}

/// How far a row is on its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// In no plan.
    Waiting,
    /// In the plan sent last, and not running.
    Planned,
    /// In the running batch, which it entered with so many tokens.
    Running { from: Tokens },
}

impl Row {
    pub(crate) fn key(&self) -> RowKey {
        RowKey { row: self.id, attempt: self.attempt }
    }

    /// Prompt and output so far.
    pub(crate) fn tokens(&self) -> Tokens {
        Tokens((self.prompt.len() + self.output.len()) as u64)
    }

    /// Prompt and output at its limit.
    pub(crate) fn total(&self) -> Tokens {
        Tokens(self.prompt.len() as u64) + self.max_tokens
    }

    /// Most tokens it draws in its next slice.
    pub(crate) fn slice(&self, slice_len: u32) -> Tokens {
        Tokens(u64::from(slice_len)).min(self.total().saturating_sub(self.tokens()))
    }

    pub(crate) fn extent(&self) -> Extent {
        Extent { tokens: self.tokens(), total: self.total() }
    }

    pub(crate) fn home(&self) -> Option<&Home> {
        match &self.place {
            Place::At(home) => Some(home),
            Place::Pool { .. } => None,
        }
    }

    pub(crate) fn home_mut(&mut self) -> Option<&mut Home> {
        match &mut self.place {
            Place::At(home) => Some(home),
            Place::Pool { .. } => None,
        }
    }

    pub(crate) fn runs(&self) -> bool {
        self.home().is_some_and(|home| matches!(home.stage, Stage::Running { .. }))
    }

    /// This is its dispatch to that worker.
    pub(crate) fn is_at(&self, key: RowKey, worker: WorkerId) -> bool {
        self.attempt == key.attempt && self.home().is_some_and(|home| home.worker == worker)
    }

    /// Under pressure the youngest row's KV goes first.
    pub(crate) fn hold_rank(&self) -> u64 {
        u64::MAX - self.order
    }
}
