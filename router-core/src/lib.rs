//! The pure core of `scls_router`: which worker a request goes to, and what runs together and when.
//!
//! No I/O, no clock, no threads, no unseeded randomness: times and seeds are arguments, so the server, the Python
//! module and the simulator run the very same objects. Start reading at [`Scheduler::handle`].

mod anticipation;
mod batch;
mod block;
mod constants;
mod cost;
mod cut;
mod decision;
mod event;
mod guard;
mod ids;
mod index;
mod memory;
mod mode;
mod name;
mod offload;
mod output;
mod plan;
mod policy;
mod pool;
mod record;
mod rectangle;
mod router;
mod row;
mod scheduler;
mod units;
mod worker;

pub use batch::{Batcher, RowGroup, Split};
pub use block::{BlockHash, hash_blocks, hash_root, new_tokens};
pub use cost::{
    Band, BatchLoad, Calibrated, Calibration, CostError, CostModel, Coverage, Estimator, Fit, FitError, Forecast,
    Iteration, JsonError, Layout, PaddedCost, PagedPrefill, PagedStep, RowLoad, Sample, micros,
};
pub use decision::Decision;
pub use event::{
    Action, BatchEnd, Event, FinishReason, Keep, NewRequest, Plan, Refusal, Rejection, RowEnd, RowReport, RowStart,
    RowTokens, SliceReport, TokenLogprobs, WorkerMessage,
};
pub use guard::{Guarding, Hotspots, Sighting};
pub use ids::{DecisionId, Epoch, PlanNo, RequestId, RowId, RowKey, WorkerId};
pub use index::{BlockTrie, NaiveIndex, PrefixIndex};
pub use memory::{Ceiling, Extent, batch_ceiling, ceiling};
pub use mode::{Batching, Interval, Mode, Offload, Pooled, UnknownMode};
pub use name::nearest;
pub use offload::Offloader;
pub use policy::{
    Anticipation, Candidate, LeastRequests, Policy, PolicyName, Product, ProductAnticipating, ProductTime, Random,
    RoundRobin, UnknownPolicy, View, choose, least,
};
pub use pool::{Mismatch, ModelSpec, WorkerSpec};
pub use record::{BatchOutcome, BatchRecord, Work};
pub use router::{Choice, Commit, Prompt, Router, RouterError, Seen, WorkerState};
pub use scheduler::{Config, Moves, Scheduler};
pub use units::{BlockSize, Blocks, Bytes, Micros, Tokens};
pub use worker::WorkerLoad;
