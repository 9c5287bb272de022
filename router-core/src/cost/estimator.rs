//! What a worker's batches take: its model, corrected by its reports, and the band that a batch's time falls into.

use super::model::{CostModel, Iteration, Layout, micros};
use crate::units::{Micros, Tokens};

/// A row of a batch at its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowLoad {
    /// Prompt and output so far.
    pub tokens: Tokens,
    /// Of these, not computed: 1 for a row that decodes.
    pub uncomputed: Tokens,
    /// Tokens it may still draw.
    pub left: Tokens,
    /// Most of its prefill tokens in one iteration beside rows that decode; zero: the worker's chunk.
    pub budget: Tokens,
}

/// What was foreseen of a batch before it ran, for every number of iterations that it may run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Forecast {
    /// Cumulative seconds of the model after `k + 1` iterations: many rows leave early, no row leaves before its limit.
    spans: Vec<[f64; 2]>,
}

/// Between these a batch's time falls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Band {
    /// No sooner.
    pub lo: Micros,
    /// No later.
    pub hi: Micros,
}

/// A worker's cost model and what its reports have taught.
#[derive(Clone, Debug)]
pub struct Estimator {
    model: CostModel,
    announced: bool,
    correction: f64,
}

impl Estimator {
    /// With the model a worker announced, if it did.
    pub fn new(model: Option<CostModel>, layout: Layout) -> Self {
        Self { announced: model.is_some(), model: model.unwrap_or(CostModel::unknown(layout)), correction: 1.0 }
    }

    /// The model as it was announced.
    pub fn model(&self) -> &CostModel {
        &self.model
    }

    /// Measured time over the model's.
    pub fn correction(&self) -> f64 {
        self.correction
    }

    /// Model seconds as this worker's time.
    pub fn time(&self, seconds: f64) -> Micros {
        micros(seconds * self.correction)
    }

    /// Walks the batch through its iterations: rows in order share the chunk, one decodes once its prefill is done.
    /// O(rows + steps).
    pub fn forecast(&self, rows: &[RowLoad], chunk: Tokens, steps: u32) -> Forecast {
        let _ = chunk;
        let it = Iteration { rows: rows.len() as u64, ..Iteration::default() };
        let one = self.model.iteration(&it);
        Forecast { spans: (1..=steps).map(|k| [one * f64::from(k); 2]).collect() }
    }

    /// The band for `k` iterations; beyond those foreseen, that of the last.
    pub fn band(&self, forecast: &Forecast, k: u32) -> Band {
        let at = (k as usize).min(forecast.spans.len());
        let Some(&[lo, hi]) = at.checked_sub(1).and_then(|at| forecast.spans.get(at)) else { return Band::default() };
        Band { lo: self.time(lo), hi: self.time(hi) }
    }

    /// The time `k` iterations are expected to take.
    pub fn expected(&self, forecast: &Forecast, k: u32) -> Micros {
        let Band { lo, hi } = self.band(forecast, k);
        Micros(u64::midpoint(lo.0, hi.0))
    }

    /// A batch took `time` for its `k` iterations.
    pub fn observe(&mut self, forecast: &Forecast, k: u32, time: Micros) {
        let expected = self.expected(forecast, k);
        if expected > Micros::ZERO {
            let ratio = time.0 as f64 / expected.0 as f64;
            let most = if self.announced { 2.0 } else { 1e3 };
            self.correction = (self.correction * (1.0 + (ratio - 1.0) / 8.0)).clamp(1.0 / most, most);
        }
    }

    /// So many rows ran so many decode steps, and so many of them ended before their limit.
    pub fn observe_ends(&mut self, row_steps: u64, ended: u64) {
        let _ = (row_steps, ended);
    }
}
