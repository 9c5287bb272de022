//! Virtual time for `scls_router`: a modelled slice worker and a driver that runs the real scheduler against it.
//!
//! Both are sans-IO. The driver is the core's test harness; the worker is also the engine of `scls-router mock-worker`.

mod driver;
mod kv;
mod timing;
mod worker;

pub use driver::{Outcome, RowOutcome, Simulation, WorkerOutcome};
pub use timing::Timing;
pub use worker::{Command, SliceWorker, Terms, next_token};
