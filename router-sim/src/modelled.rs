//! A modelled worker of either layout.

use router_core::{Layout, Micros, PlanNo, Tokens, WorkerMessage, WorkerSpec};

use crate::static_worker::StaticWorker;
use crate::timing::Pace;
use crate::worker::{Command, SliceWorker};

/// A worker as its layout makes it.
pub enum Modelled {
    /// Rows in blocks.
    Slice(Box<SliceWorker>),
    /// One rectangle.
    Static(Box<StaticWorker>),
}

macro_rules! both {
    ($worker:expr, $inner:ident => $does:expr) => {
        match $worker {
            Self::Slice($inner) => $does,
            Self::Static($inner) => $does,
        }
    };
}

impl Modelled {
    /// An idle worker of the layout that `spec` names.
    pub fn new(spec: WorkerSpec, pace: impl Into<Pace>) -> Self {
        match spec.layout {
            Layout::Paged => Self::Slice(Box::new(SliceWorker::new(spec, pace))),
            Layout::Padded => Self::Static(Box::new(StaticWorker::new(spec, pace))),
        }
    }

    /// See [`StaticWorker::telling_every`]; of blocks, every iteration is told.
    #[must_use]
    pub fn telling_every(self, iterations: u32) -> Self {
        match self {
            Self::Slice(_) => self,
            Self::Static(worker) => Self::Static(Box::new(worker.telling_every(iterations))),
        }
    }

    /// See [`SliceWorker::counting`].
    #[must_use]
    pub fn counting(self) -> Self {
        match self {
            Self::Slice(worker) => Self::Slice(Box::new(worker.counting())),
            Self::Static(worker) => Self::Static(Box::new(worker.counting())),
        }
    }

    /// Takes a command and appends the answers.
    pub fn command(&mut self, now: Micros, command: Command, out: &mut Vec<WorkerMessage>) {
        both!(self, worker => worker.command(now, command, out));
    }

    /// The iteration under way has ended; call at `next_wake`.
    pub fn wake(&mut self, now: Micros, out: &mut Vec<WorkerMessage>) {
        both!(self, worker => worker.wake(now, out));
    }

    /// When the iteration under way ends.
    pub fn next_wake(&self) -> Option<Micros> {
        both!(self, worker => worker.next_wake())
    }

    /// The batch that runs.
    pub fn running(&self) -> Option<PlanNo> {
        both!(self, worker => worker.running())
    }

    /// What it announces.
    pub fn spec(&self) -> &WorkerSpec {
        both!(self, worker => worker.spec())
    }

    /// See [`SliceWorker::load`].
    pub fn load(&self) -> [u64; 6] {
        both!(self, worker => worker.load())
    }

    /// Iterations so far.
    pub fn iterations(&self) -> u64 {
        both!(self, worker => worker.iterations())
    }

    /// Host time that the device has waited for.
    pub fn host(&self) -> Micros {
        both!(self, worker => worker.host())
    }

    /// Computed tokens whose KV was given up with their rows unfinished: they are computed again.
    pub fn evicted(&self) -> Tokens {
        both!(self, worker => worker.evicted())
    }
}
