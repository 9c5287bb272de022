//! Time known before it passes: the cost model, its fit, and the band of a batch.

mod estimator;
mod fit;
mod json;
mod model;
#[cfg(test)]
mod simulated;
mod walk;
mod window;

pub use estimator::{Band, Calibrated, Coverage, Estimator, Forecast, RowLoad};
pub use fit::{Fit, FitError, Sample};
pub use json::{Calibration, JsonError};
pub use model::{BatchLoad, CostError, CostModel, Iteration, Layout, PaddedCost, PagedPrefill, PagedStep, micros};
