//! Counts one request from its arrival to its end.

use std::sync::Arc;

use axum::http::StatusCode;
use tokio::time::Instant;
use tracing::info;

use crate::http::Busy;
use crate::metrics::Metrics;

/// A client that went away: it is counted and logged, and never sent.
const GONE: u16 = 499;

/// Counts a request when it ends; one that is dropped before that was left by its client.
pub struct Meter {
    /// Known names only: it becomes a label.
    pub model: String,
    /// When it came.
    pub arrived: Instant,
    /// Set once it is a request that a shutdown waits for.
    pub busy: Option<Busy>,
    metrics: Arc<Metrics>,
    code: u16,
}

impl Meter {
    /// Begins to count.
    pub fn new(metrics: Arc<Metrics>) -> Self {
        metrics.began();
        Self { model: "unknown".into(), arrived: Instant::now(), busy: None, metrics, code: GONE }
    }

    /// Sets how it ended.
    pub fn ended(&mut self, status: StatusCode) {
        self.code = status.as_u16();
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if self.code == GONE {
            info!(model = self.model, after_ms = self.arrived.elapsed().as_millis(), "the client went away");
        }
        self.metrics.ended(&self.model, self.code, self.arrived.elapsed());
    }
}
