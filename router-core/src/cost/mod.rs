//! Time known before it passes: the cost model, its fit, and the band of a batch.

mod estimator;
mod model;

pub use estimator::{Band, Estimator, Forecast, RowLoad};
pub use model::{BatchLoad, CostError, CostModel, Iteration, Layout, PaddedCost, PagedPrefill, PagedStep, micros};
