//! Virtual time for `scls_router`: modelled workers and a driver that runs the real scheduler against them.
//!
//! All of it is sans-IO. The driver is the core's test harness; the workers are also the engine of `scls-router mock-worker`.

pub mod ablation;
mod calendar;
mod driver;
mod kv;
mod lengths;
mod modelled;
mod outcome;
mod plans;
mod random;
mod sequence;
mod static_worker;
mod timing;
mod worker;

pub use driver::{Chaos, Simulation};
pub use lengths::{Lengths, Sample, synthetic};
pub use modelled::Modelled;
pub use outcome::{Outcome, RowOutcome, WorkerOutcome};
pub use random::Random;
pub use sequence::{Terms, next_token};
pub use static_worker::StaticWorker;
pub use timing::{Law, Noise, Norm, Pace, Timing};
pub use worker::{Command, SliceWorker};
