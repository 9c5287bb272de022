//! Prometheus metrics, all with the prefix `scls_router_`.
//!
//! Counters and histograms are fed where things happen; what is believed of workers is read from the core at a
//! scrape. No label ever holds anything a client can choose freely: unknown models count as `unknown`.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use router_core::{BatchRecord, Hotspots, Micros, Moves, Refusal, RowEnd, SliceReport, WorkerLoad};

use crate::dispatch::Figures;

type Seconds = Counter<f64, AtomicU64>;
type Ratio = Gauge<f64, AtomicU64>;

/// Batches over which a worker's calibration error is a mean: enough to be steady, few enough to show a change.
const CALIBRATED: u32 = 256;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByRequest {
    model: String,
    code: u16,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByPolicy {
    policy: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByWorker {
    worker: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByRefusal {
    worker: String,
    reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByIterations {
    worker: String,
    iterations: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByModel {
    model: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByMove {
    model: String,
    reason: &'static str,
}

/// How far off a worker's batches are from what was expected of them.
#[derive(Debug, Default)]
pub struct Calibration {
    batches: u32,
    error: f64,
}

/// All metrics of a router.
pub struct Metrics {
    registry: Registry,
    requests: Family<ByRequest, Counter>,
    request_duration: Histogram,
    ttft: Histogram,
    inter_token: Histogram,
    inflight: Gauge,
    decisions: Family<ByPolicy, Counter>,
    prompt_new: Counter,
    prompt_cached: Counter,
    slices: Family<ByWorker, Counter>,
    slice_duration: Histogram,
    idle: Family<ByWorker, Seconds>,
    busy: Family<ByWorker, Seconds>,
    refused: Family<ByRefusal, Counter>,
    quarantined: Family<ByWorker, Counter>,
    pad: Family<ByWorker, Counter>,
    invalid: Family<ByWorker, Counter>,
    scored: Family<ByIterations, Counter>,
    covered: Family<ByIterations, Counter>,
    overfull: Family<ByWorker, Counter>,
    calibration: Family<ByWorker, Ratio>,
    cuts: Family<ByWorker, Counter>,
    cut_latency: Histogram,
    slice_len: Family<ByModel, Gauge>,
    moves: Family<ByMove, Counter>,
    clock_jumps: Family<ByModel, Counter>,
    doubtful_reports: Family<ByModel, Counter>,
    hotspot_alarms: Family<ByModel, Counter>,
    hotspot_filtered: Family<ByModel, Counter>,
    hotspots: Family<ByModel, Gauge>,
    hotspots_filtering: Family<ByModel, Gauge>,
    workers: Mutex<()>,
    gauges: Vec<WorkerGauge>,
}

/// Reads one number of a worker.
type Read = fn(&WorkerLoad) -> u64;

/// One number of a [`WorkerLoad`] as a gauge.
struct WorkerGauge {
    family: Family<ByWorker, Gauge>,
    read: Read,
}

/// Name, help and source of the gauges per worker.
const GAUGES: [(&str, &str, Read); 9] = [
    ("worker_ready", "1 if the worker takes rows", |load| u64::from(load.ready)),
    ("worker_queued_tokens", "Q: prefill tokens assigned and not computed", |load| load.queued.0),
    ("worker_batch_size", "b: rows assigned and not finished", |load| load.batch_size),
    ("worker_work_microseconds", "W: committed work", |load| load.work.0),
    ("worker_running_rows", "rows of the running batch", |load| load.running_rows),
    ("worker_held_rows", "rows between slices with KV held", |load| load.held_rows),
    ("worker_running_blocks", "blocks reserved by the running batch", |load| load.running_blocks.0),
    ("worker_held_blocks", "blocks of held rows", |load| load.held_blocks.0),
    ("worker_indexed_blocks", "blocks of the worker in the prefix index", |load| load.indexed.0),
];

fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 18))
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("scls_router");
        macro_rules! register {
            ($name:literal, $help:literal, $metric:expr) => {{
                let metric = $metric;
                registry.register($name, $help, metric.clone());
                metric
            }};
        }
        let gauges = GAUGES.map(|(name, help, read)| {
            let family = Family::<ByWorker, Gauge>::default();
            registry.register(name, help, family.clone());
            WorkerGauge { family, read }
        });
        Self {
            requests: register!("requests", "requests ended, by HTTP status", Family::default()),
            request_duration: register!("request_duration_seconds", "arrival to end", seconds()),
            ttft: register!("ttft_seconds", "arrival to first token", seconds()),
            inter_token: register!("inter_token_latency_seconds", "gap between tokens of a row", seconds()),
            inflight: register!("inflight_requests", "requests not ended", Gauge::default()),
            decisions: register!("decisions", "rows given to a worker", Family::default()),
            prompt_new: register!("prefill_tokens_new", "prompt tokens computed, of ended rows", Counter::default()),
            prompt_cached: register!(
                "prefix_tokens_actual",
                "prompt tokens found cached, of ended rows",
                Counter::default()
            ),
            slices: register!("slices", "batches ended", Family::default()),
            slice_duration: register!("slice_duration_seconds", "computing time of a batch", seconds()),
            idle: register!("worker_idle_seconds", "nothing to run between batches", Family::default()),
            busy: register!("worker_busy_seconds", "computing", Family::default()),
            refused: register!("plans_refused", "plans that a worker did not run", Family::default()),
            quarantined: register!("quarantines", "links closed for what a worker said", Family::default()),
            pad: register!("pad_tokens", "cells of padded batches computed for no token", Family::default()),
            invalid: register!("invalid_tokens", "tokens computed for rows after their end", Family::default()),
            scored: register!("slices_scored", "batches whose time was compared with its band", Family::default()),
            covered: register!("slices_covered", "of these, whose time fell into its band", Family::default()),
            overfull: register!("ceilings_passed", "batches that took more blocks than foreseen", Family::default()),
            calibration: register!(
                "worker_calibration_error",
                "mean of |time of a batch / middle of its band - 1|",
                Family::default()
            ),
            cuts: register!("cuts", "running batches told to end", Family::default()),
            cut_latency: register!("cut_latency_seconds", "from a cut to the report of its batch", seconds()),
            slice_len: register!("slice_length_iterations", "S: most iterations of the next slice", Family::default()),
            moves: register!("moves", "rows that left a worker that was there", Family::default()),
            doubtful_reports: register!(
                "doubtful_reports",
                "reports of more iterations or time than there can have been",
                Family::default()
            ),
            hotspot_alarms: register!(
                "hotspot_alarms",
                "times a prefix came to be too popular for the workers that hold it",
                Family::default()
            ),
            hotspot_filtered: register!(
                "hotspot_filtered",
                "rows kept from the workers that hold such a prefix",
                Family::default()
            ),
            hotspots: register!(
                "hotspots",
                "prefixes too popular for the workers that hold them, now",
                Family::default()
            ),
            hotspots_filtering: register!(
                "hotspots_filtering",
                "those of them whose holders are kept free of further rows",
                Family::default()
            ),
            clock_jumps: register!("clock_jumps", "events with a time before that of the last", Family::default()),
            workers: Mutex::new(()),
            gauges: gauges.into(),
            registry,
        }
    }
}

fn by(worker: &str) -> ByWorker {
    ByWorker { worker: worker.to_owned() }
}

/// The core keeps its residuals apart by these iterations of a batch, and so is their coverage.
fn bucket(iterations: u32) -> &'static str {
    match iterations {
        0..=1 => "1",
        2..=4 => "2-4",
        5..=16 => "5-16",
        17.. => "more",
    }
}

impl Calibration {
    fn take(&mut self, time: Micros, expected: Micros) -> f64 {
        self.batches = (self.batches + 1).min(CALIBRATED);
        let error = (time.0 as f64 / expected.0 as f64 - 1.0).abs();
        self.error += (error - self.error) / f64::from(self.batches);
        self.error
    }
}

impl Metrics {
    /// A request begins; it counts as in flight until [`Metrics::ended`].
    pub fn began(&self) {
        self.inflight.inc();
    }

    /// A request ended.
    pub fn ended(&self, model: &str, code: u16, took: Duration) {
        self.inflight.dec();
        self.requests.get_or_create_owned(&ByRequest { model: model.to_owned(), code }).inc();
        self.request_duration.observe(took.as_secs_f64());
    }

    /// A request's first token came.
    pub fn first_token(&self, after: Duration) {
        self.ttft.observe(after.as_secs_f64());
    }

    /// Another token came.
    pub fn next_token(&self, gap: Duration) {
        self.inter_token.observe(gap.as_secs_f64());
    }

    /// A row was given to a worker.
    pub fn decision(&self, policy: &str) {
        self.decisions.get_or_create_owned(&ByPolicy { policy: policy.to_owned() }).inc();
    }

    /// A row ended.
    pub fn row_end(&self, end: &RowEnd) {
        self.prompt_new.inc_by(end.prompt.saturating_sub(end.cached).0);
        self.prompt_cached.inc_by(end.cached.0);
    }

    /// A batch ended.
    pub fn slice(&self, worker: &str, report: &SliceReport) {
        let seconds = |micros: u64| Duration::from_micros(micros).as_secs_f64();
        let busy = seconds((report.prefill + report.decode).0);
        self.slices.get_or_create_owned(&by(worker)).inc();
        self.slice_duration.observe(busy);
        self.busy.get_or_create_owned(&by(worker)).inc_by(busy);
        self.idle.get_or_create_owned(&by(worker)).inc_by(seconds(report.idle.0));
        self.pad.get_or_create_owned(&by(worker)).inc_by(report.pad.0);
        self.invalid.get_or_create_owned(&by(worker)).inc_by(report.invalid.0);
    }

    /// What was known of a batch beside what happened. A batch that ran no iteration had no time to be known.
    pub fn scored(&self, worker: &str, record: &BatchRecord, calibration: &mut Calibration) {
        let Some(outcome) = record.outcome.filter(|outcome| outcome.steps > 0) else { return };
        let labels = ByIterations { worker: worker.to_owned(), iterations: bucket(outcome.steps) };
        self.scored.get_or_create_owned(&labels).inc();
        // Both are there from the start: a ratio of nothing is no alarm.
        self.covered.get_or_create_owned(&labels).inc_by(outcome.covered().into());
        self.overfull.get_or_create_owned(&by(worker)).inc_by((outcome.peak > record.ceiling).into());
        if outcome.expected > Micros::ZERO {
            let error = calibration.take(outcome.time, outcome.expected);
            self.calibration.get_or_create_owned(&by(worker)).set(error);
        }
    }

    /// A worker's session ended: what it was like is no more.
    pub fn left(&self, worker: &str) {
        self.calibration.remove(&by(worker));
    }

    /// A worker was told to end its running batch.
    pub fn cut(&self, worker: &str) {
        self.cuts.get_or_create_owned(&by(worker)).inc();
    }

    /// A batch that was cut is reported.
    pub fn cut_done(&self, after: Duration) {
        self.cut_latency.observe(after.as_secs_f64());
    }

    /// A worker did not run a plan.
    pub fn refused(&self, worker: &str, reason: Refusal) {
        let reason = match reason {
            Refusal::Stale => "stale",
            Refusal::NoMemory => "no_memory",
            Refusal::TooManyRows => "too_many_rows",
            Refusal::UnknownRow => "unknown_row",
            Refusal::Unsupported => "unsupported",
        };
        self.refused.get_or_create_owned(&ByRefusal { worker: worker.to_owned(), reason }).inc();
    }

    /// A link was closed for what the worker said.
    pub fn quarantined(&self, worker: &str) {
        self.quarantined.get_or_create_owned(&by(worker)).inc();
    }

    /// The text of a scrape of these workers and models.
    pub fn scrape(&self, loads: &[WorkerLoad], models: &[(String, Figures)]) -> String {
        // One scrape at a time, so that none sees another's gauges half set.
        let _one = self.workers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for gauge in &self.gauges {
            gauge.family.clear();
            for load in loads {
                let value = i64::try_from((gauge.read)(load)).unwrap_or(i64::MAX);
                gauge.family.get_or_create_owned(&by(&load.spec.name)).set(value);
            }
        }
        for gauge in [&self.slice_len, &self.hotspots, &self.hotspots_filtering] {
            gauge.clear();
        }
        for (model, figures) in models {
            let labels = ByModel { model: model.clone() };
            self.slice_len.get_or_create_owned(&labels).set(figures.slice_len.into());
            // The core counts; a pool that is made anew begins at zero, as counters may.
            self.clock_jumps.get_or_create_owned(&labels).inner().store(figures.clock_jumps, Ordering::Relaxed);
            let doubtful = self.doubtful_reports.get_or_create_owned(&labels);
            doubtful.inner().store(figures.doubtful_reports, Ordering::Relaxed);
            let Hotspots { alarms, filtered, alarmed, filtering } = figures.hotspots;
            for (counter, count) in [(&self.hotspot_alarms, alarms), (&self.hotspot_filtered, filtered)] {
                counter.get_or_create_owned(&labels).inner().store(count, Ordering::Relaxed);
            }
            for (gauge, count) in [(&self.hotspots, alarmed), (&self.hotspots_filtering, filtering)] {
                gauge.get_or_create_owned(&labels).set(i64::try_from(count).unwrap_or(i64::MAX));
            }
            let Moves { drained, evicted, weighed, balanced } = figures.moves;
            for (reason, count) in
                [("drained", drained), ("evicted", evicted), ("weighed", weighed), ("balanced", balanced)]
            {
                let labels = ByMove { model: model.clone(), reason };
                self.moves.get_or_create_owned(&labels).inner().store(count, Ordering::Relaxed);
            }
        }
        let mut out = String::new();
        // Writing to a string does not fail.
        let _ = text::encode(&mut out, &self.registry);
        out
    }
}

#[cfg(test)]
mod tests {
    use router_core::{Band, BatchEnd, BatchOutcome, Blocks, PlanNo, Tokens, Work, WorkerId};

    use super::*;

    fn report() -> SliceReport {
        SliceReport {
            batch: PlanNo(1),
            end: BatchEnd::Steps,
            next: None,
            steps: 1,
            prefill: Micros(1_000),
            decode: Micros(2_000),
            peak: Blocks(1),
            idle: Micros(500_000),
            pad: Tokens(3),
            invalid: Tokens(4),
            rows: Vec::new(),
        }
    }

    #[test]
    fn names_are_the_documented_ones() {
        let metrics = Metrics::default();
        metrics.began();
        metrics.ended("tiny", 200, Duration::from_millis(5));
        metrics.decision("product");
        metrics.slice("w0", &report());
        metrics.cut("w0");
        metrics.cut_done(Duration::from_millis(3));
        let hotspots = Hotspots { alarms: 5, filtered: 4, alarmed: 3, filtering: 2 };
        let figures = Figures { slice_len: 40, hotspots, ..Figures::default() };
        let text = metrics.scrape(&[], &[("tiny".into(), figures)]);
        for line in [
            "scls_router_requests_total{model=\"tiny\",code=\"200\"} 1",
            "scls_router_inflight_requests 0",
            "scls_router_decisions_total{policy=\"product\"} 1",
            "scls_router_request_duration_seconds_count 1",
            "scls_router_slices_total{worker=\"w0\"} 1",
            "scls_router_worker_busy_seconds_total{worker=\"w0\"} 0.003",
            "scls_router_worker_idle_seconds_total{worker=\"w0\"} 0.5",
            "scls_router_pad_tokens_total{worker=\"w0\"} 3",
            "scls_router_invalid_tokens_total{worker=\"w0\"} 4",
            "scls_router_cuts_total{worker=\"w0\"} 1",
            "scls_router_cut_latency_seconds_count 1",
            "scls_router_slice_length_iterations{model=\"tiny\"} 40",
            "scls_router_hotspot_alarms_total{model=\"tiny\"} 5",
            "scls_router_hotspot_filtered_total{model=\"tiny\"} 4",
            "scls_router_hotspots{model=\"tiny\"} 3",
            "scls_router_hotspots_filtering{model=\"tiny\"} 2",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn batches_are_scored_by_the_iterations_that_ran() {
        let metrics = Metrics::default();
        let mut calibration = Calibration::default();
        let record = |outcome| BatchRecord {
            worker: WorkerId(0),
            batch: PlanNo(1),
            at: Micros(0),
            rows: 1,
            steps: 32,
            band: Band { lo: Micros(10_000), hi: Micros(40_000) },
            ceiling: Blocks(8),
            outcome,
        };
        let outcome = |steps: u32, time: u64, peak: u64| {
            let band = Band { lo: Micros(900), hi: Micros(1_100) };
            Some(BatchOutcome {
                end: BatchEnd::Cut,
                steps,
                time: Micros(time),
                expected: Micros(1_000),
                band,
                peak: Blocks(peak),
                work: Work::default(),
            })
        };
        for of in [
            None,
            outcome(0, 5_000, 0),
            outcome(1, 900, 8),
            outcome(4, 1_100, 8),
            outcome(5, 1_101, 9),
            outcome(16, 899, 8),
            outcome(17, 1_000, 8),
            // no band was known
            Some(BatchOutcome { expected: Micros::ZERO, band: Band::default(), ..outcome(32, 1_000, 8).expect("one") }),
        ] {
            metrics.scored("w0", &record(of), &mut calibration);
        }
        let text = metrics.scrape(&[], &[]);
        for line in [
            "scls_router_slices_scored_total{worker=\"w0\",iterations=\"1\"} 1",
            "scls_router_slices_covered_total{worker=\"w0\",iterations=\"1\"} 1",
            "scls_router_slices_covered_total{worker=\"w0\",iterations=\"2-4\"} 1",
            "scls_router_slices_scored_total{worker=\"w0\",iterations=\"5-16\"} 2",
            "scls_router_slices_covered_total{worker=\"w0\",iterations=\"5-16\"} 0",
            "scls_router_slices_scored_total{worker=\"w0\",iterations=\"more\"} 2",
            "scls_router_slices_covered_total{worker=\"w0\",iterations=\"more\"} 1",
            "scls_router_ceilings_passed_total{worker=\"w0\"} 1",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        let found =
            text.lines().find_map(|line| line.strip_prefix("scls_router_worker_calibration_error{worker=\"w0\"} "));
        let found: f64 = found.expect("a gauge").parse().expect("a number");
        assert!((found - (0.1 + 0.1 + 0.101 + 0.101) / 5.0).abs() < 1e-9, "{found}");
        metrics.left("w0");
        assert!(!metrics.scrape(&[], &[]).contains("calibration_error{"));
    }
}
