//! Virtual time for `scls_router`: modelled workers and a driver that runs the real scheduler against them.
//!
//! All of it is sans-IO. The driver is the core's test harness; the workers are also the engine of `scls-router mock-worker`.

pub mod ablation;
mod calendar;
mod continuous;
mod device;
mod driver;
mod fleet;
mod kv;
mod ledger;
mod lengths;
mod modelled;
mod named;
mod outcome;
mod plans;
mod random;
pub mod recording;
pub mod rival;
mod run;
mod scheduled;
mod sequence;
mod served;
mod static_worker;
pub mod summary;
mod timing;
pub mod trace;
mod validate;
mod worker;

pub use device::{Device, DeviceError};
pub use driver::{Chaos, Simulation};
pub use fleet::follow;
pub use lengths::{Lengths, Sample, synthetic};
pub use modelled::Modelled;
pub use outcome::{Outcome, RowOutcome, WorkerOutcome};
pub use random::Random;
pub use recording::{RecordedRun, RecordingError};
pub use run::{Fleet, Run, RunError, Sessions, System, run};
pub use sequence::{Terms, next_token};
pub use served::{GuardCounts, Lane, Record, Sample as FleetSample, Served};
pub use static_worker::StaticWorker;
pub use summary::{Dist, Slo, Summary};
pub use timing::{Host, Law, Noise, Norm, Pace, Timing};
pub use trace::{Burst, Trace, TraceError, TraceRequest};
pub use validate::{Fidelity, Metric, validate};
pub use worker::{Command, SliceWorker};
