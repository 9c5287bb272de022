//! What a run comes to in one flat line of figures: times in seconds, lengths in tokens, ratios as they are.
//!
//! A run begins with empty workers, so its first part is not measured: a request counts if its trace says that it comes
//! after that. Rates are over the time from there to the last arrival, or to the end of the run if that is sooner: what
//! comes after the last arrival says how a fleet drains, not what it serves.

use router_core::Micros;
use serde_json::{Map, Value, json};

use crate::run::{Run, System};
use crate::served::{Record, Sample, Served};

/// Mean and quantiles, linear between neighbours, of a figure that some requests have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dist {
    /// Their mean.
    pub mean: f64,
    /// Half of them are below it.
    pub p50: f64,
    /// 95 % are.
    pub p95: f64,
    /// 99 % are.
    pub p99: f64,
}

impl Dist {
    /// Of these; `None` of nothing.
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        if values.is_empty() {
            return None;
        }
        values.sort_by(f64::total_cmp);
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let [p50, p95, p99] = [0.5, 0.95, 0.99].map(|share| quantile(&values, share));
        Some(Self { mean, p50, p95, p99 })
    }
}

/// Of sorted values, at least one.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = share * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    low + (high - low) * at.fract()
}

/// What a request may take, where goodput is asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slo {
    /// Most seconds to the first token.
    pub ttft: f64,
    /// Most seconds a token after it.
    pub tpot: f64,
}

/// A run.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Measured requests, those still running at the end included.
    pub requests: u64,
    /// Of these, ended.
    pub finished: u64,
    /// Of these, not.
    pub unfinished: u64,
    /// Of the whole run: nobody could take them.
    pub rejected: u64,
    /// Arrivals a second.
    pub rate: f64,
    /// Ends a second.
    pub throughput: f64,
    /// Output tokens a second, of requests that ended.
    pub output_tokens_per_s: f64,
    /// Ends a second of requests within the objective.
    pub goodput: Option<f64>,
    /// Arrival to first token; of requests that have none, the time for which they had waited when the run was over, which it is no
    /// shorter than: a run that serves only the quick ones is not good.
    pub ttft: Option<Dist>,
    /// A token after the first, averaged over its request.
    pub tpot: Option<Dist>,
    /// The longest time between two tokens of a request.
    pub gap: Option<Dist>,
    /// Arrival to last token, or to the end of the run.
    pub latency: Option<Dist>,
    /// Prompt tokens found cached, of all.
    pub hit_ratio: f64,
    /// Rows of the fullest worker over the mean, averaged over time; and the same of queued prefill tokens.
    pub imbalance: [Option<f64>; 2],
    /// Standard deviation of the times at which workers were done.
    pub spread: f64,
    /// Tokens, slices and rows that [`Record::workers`] counts, as they are written in reports.
    pub counts: Vec<(&'static str, Option<f64>)>,
    /// Seconds of host time that devices waited for, a token; `None` where there is none.
    pub host_per_token: Option<f64>,
    /// When the run was over.
    pub end: f64,
}

/// The part of a run that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// A request counts if it comes no sooner.
    pub from: Micros,
    /// The last arrival, or the end if that is sooner.
    pub to: Micros,
}

impl Window {
    /// All but the first `warm_share` of a run.
    pub fn of(run: &Run<'_>, record: &Record, warm_share: f64) -> Self {
        let last = run.trace.requests.last().map_or(Micros::ZERO, |request| request.at);
        // all at once: there is no time before the last arrival, only what follows
        let to = if last == Micros::ZERO { record.end } else { last.min(record.end) };
        let from = if last == Micros::ZERO { 0.0 } else { to.0 as f64 * warm_share.clamp(0.0, 1.0) };
        Self { from: Micros(from as u64), to }
    }

    fn holds(&self, at: Micros) -> bool {
        self.from <= at && at <= self.to
    }

    fn seconds(&self) -> f64 {
        seconds(self.to.saturating_sub(self.from))
    }
}

impl Summary {
    /// Of a run whose first `warm_share` does not count; with `slo` its goodput too.
    pub fn of(run: &Run<'_>, record: &Record, warm_share: f64, slo: Option<Slo>) -> Self {
        let window = Window::of(run, record, warm_share);
        let measured: Vec<&Served> = measured(run, record, window).collect();
        let dist = |of: &dyn Fn(&Served) -> Option<f64>| Dist::of(measured.iter().filter_map(|one| of(one)).collect());
        let finished = measured.iter().filter(|one| one.ended > Micros::ZERO).count() as u64;
        let ends = || record.served.iter().filter(|one| one.ended > Micros::ZERO && window.holds(one.ended));
        // a sum of nothing is -0
        let per_second = |count: f64| if window.seconds() > 0.0 { count / window.seconds() + 0.0 } else { 0.0 };
        let begun = || measured.iter().filter(|one| one.first > Micros::ZERO);
        let prompts: u64 = begun().map(|one| u64::from(input(run, one))).sum();
        let hits: u64 = begun().map(|one| u64::from(one.hit)).sum();
        let within = |slo: Slo| {
            let fast = |one: &&Served| {
                one.ttft().is_some_and(|ttft| ttft <= slo.ttft) && one.tpot().is_none_or(|tpot| tpot <= slo.tpot)
            };
            per_second(ends().filter(fast).count() as f64)
        };
        let samples = || record.samples.iter().filter(|sample| window.holds(sample.at));
        Self {
            requests: measured.len() as u64,
            finished,
            unfinished: measured.len() as u64 - finished,
            rejected: record.rejected,
            rate: per_second(measured.len() as f64),
            throughput: per_second(ends().count() as f64),
            output_tokens_per_s: per_second(ends().map(|one| f64::from(one.output)).sum()),
            goodput: slo.map(within),
            ttft: dist(&|one| one.ttft().or_else(|| so_far(one, record, one.first))),
            tpot: dist(&Served::tpot),
            gap: dist(&|one| (one.output > 1).then_some(f64::from(one.gap) * 1e-6)),
            latency: dist(&|one| one.latency().or_else(|| so_far(one, record, one.ended))),
            hit_ratio: hits as f64 / prompts.max(1) as f64,
            imbalance: [imbalance(samples().map(|s| &s.batch_size)), imbalance(samples().map(|s| &s.queued))],
            spread: deviation(record.workers.iter().map(|worker| seconds(worker.completed))),
            counts: counts(run, record, &measured),
            host_per_token: host(record),
            end: seconds(record.end),
        }
    }

    /// The figures by name, as in reports. What a way to schedule does not have is null.
    pub fn figures(&self) -> Map<String, Value> {
        let mut all = Map::new();
        let mut put = |name: &str, value: Value| all.insert(name.to_owned(), value);
        put("requests", json!(self.requests));
        put("finished", json!(self.finished));
        put("unfinished", json!(self.unfinished));
        put("rejected", json!(self.rejected));
        put("rate", json!(self.rate));
        put("throughput", json!(self.throughput));
        put("output_tokens_per_s", json!(self.output_tokens_per_s));
        if let Some(goodput) = self.goodput {
            put("goodput", json!(goodput));
        }
        for (name, dist) in [("ttft", self.ttft), ("tpot", self.tpot), ("gap", self.gap), ("latency", self.latency)] {
            put(&format!("{name}_mean"), json!(dist.map(|d| d.mean)));
            put(&format!("{name}_p50"), json!(dist.map(|d| d.p50)));
            put(&format!("{name}_p95"), json!(dist.map(|d| d.p95)));
            put(&format!("{name}_p99"), json!(dist.map(|d| d.p99)));
        }
        put("hit_ratio", json!(self.hit_ratio));
        put("imbalance_b", json!(self.imbalance[0]));
        put("imbalance_q", json!(self.imbalance[1]));
        put("spread", json!(self.spread));
        for (name, count) in &self.counts {
            put(name, number(*count));
        }
        put("host_us_per_token", json!(self.host_per_token.map(|seconds| seconds * 1e6)));
        put("end", json!(self.end));
        all
    }
}

/// A count without a point.
fn number(value: Option<f64>) -> Value {
    match value {
        Some(value) if value.fract() == 0.0 && (0.0..9e15).contains(&value) => json!(value as u64),
        value => json!(value),
    }
}

/// Requests that the trace has in the window.
pub fn measured<'a>(run: &'a Run<'_>, record: &'a Record, window: Window) -> impl Iterator<Item = &'a Served> {
    let at = |one: &Served| run.trace.requests.get(one.request as usize).map_or(one.arrived, |request| request.at);
    record.served.iter().filter(move |one| window.holds(at(one)))
}

/// How long a request that had come had waited at the end for what never was.
fn so_far(one: &Served, record: &Record, was: Micros) -> Option<f64> {
    let waits = was == Micros::ZERO && one.arrived < record.end;
    waits.then(|| seconds(record.end.saturating_sub(one.arrived)))
}

fn input(run: &Run<'_>, one: &Served) -> u32 {
    run.trace.requests.get(one.request as usize).map_or(0, |request| request.input)
}

fn counts(run: &Run<'_>, record: &Record, measured: &[&Served]) -> Vec<(&'static str, Option<f64>)> {
    let slices = matches!(run.system, System::Scheduled { .. });
    let workers = |of: fn(&crate::WorkerOutcome) -> u64| record.workers.iter().map(of).sum::<u64>() as f64;
    let ended = measured.iter().filter(|one| one.ended > Micros::ZERO);
    let (number, taken) = ended.fold((0, 0), |(n, sum), one| (n + 1, sum + u64::from(one.slices)));
    let preempted: u64 = record.served.iter().map(|one| u64::from(one.slices)).sum();
    vec![
        ("iterations", Some(workers(|w| w.iterations))),
        ("computed", Some(workers(|w| w.computed.0))),
        ("pad", Some(workers(|w| w.pad.0))),
        ("invalid", Some(workers(|w| w.invalid.0))),
        ("slices_mean", (slices && number > 0).then(|| taken as f64 / f64::from(number))),
        ("early_returns", slices.then(|| workers(|w| w.early))),
        ("cuts", slices.then(|| workers(|w| w.cuts))),
        ("evicted", Some(workers(|w| w.evicted.0))),
        ("preempted", (!slices).then_some(preempted as f64)),
        ("resent", Some(record.resent as f64)),
        ("moves", slices.then_some(record.moves as f64)),
        ("alarms", Some(record.guard.alarms as f64)),
        ("filtered", Some(record.guard.filtered as f64)),
    ]
}

fn host(record: &Record) -> Option<f64> {
    let tokens: u64 = record.served.iter().map(|one| u64::from(one.output)).sum();
    let host = record.workers.iter().fold(Micros::ZERO, |sum, worker| sum + worker.host);
    (tokens > 0).then(|| seconds(host) / tokens as f64)
}

fn seconds(time: Micros) -> f64 {
    time.0 as f64 * 1e-6
}

/// The largest over the mean, averaged over the samples that have any.
fn imbalance<'a>(samples: impl Iterator<Item = &'a Vec<u32>>) -> Option<f64> {
    let one = |all: &Vec<u32>| {
        let sum: u64 = all.iter().map(|one| u64::from(*one)).sum();
        let most = all.iter().copied().max().unwrap_or(0);
        (sum > 0).then(|| f64::from(most) * all.len() as f64 / sum as f64)
    };
    let (number, sum) = samples.filter_map(one).fold((0u32, 0.0), |(n, sum), ratio| (n + 1, sum + ratio));
    (number > 0).then(|| sum / f64::from(number))
}

fn deviation(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let number = values.clone().count().max(1) as f64;
    let mean = values.clone().sum::<f64>() / number;
    // the sum of nothing is -0
    (values.map(|value| (value - mean).powi(2)).fold(0.0, |sum, square| sum + square) / number).sqrt()
}

impl Served {
    /// Seconds from arrival to first token.
    pub fn ttft(&self) -> Option<f64> {
        (self.first > Micros::ZERO).then(|| seconds(self.first.saturating_sub(self.arrived)))
    }

    /// Seconds a token after the first, of an ended request that has any.
    pub fn tpot(&self) -> Option<f64> {
        let rest = f64::from(self.output.checked_sub(1).filter(|rest| *rest > 0)?);
        (self.ended > Micros::ZERO).then(|| seconds(self.ended.saturating_sub(self.first)) / rest)
    }

    /// Seconds from arrival to end.
    pub fn latency(&self) -> Option<f64> {
        (self.ended > Micros::ZERO).then(|| seconds(self.ended.saturating_sub(self.arrived)))
    }
}

/// The share that is done and the one that was sampled, for plots: `points` samples at equal steps.
pub fn thinned(samples: &[Sample], points: usize) -> impl Iterator<Item = &Sample> {
    samples.iter().step_by(samples.len().div_ceil(points.max(1)).max(1))
}

#[cfg(test)]
mod tests {
    use router_core::{Commit, Guarding, Tokens};

    use super::*;
    use crate::run::{Fleet, Sessions};
    use crate::served::GuardCounts;
    use crate::timing::Law;
    use crate::{Device, Noise, Norm, Trace, TraceRequest, WorkerOutcome};

    fn device() -> Device {
        Device {
            name: "test".into(),
            law: Law::Norm(Norm::llama_13b_a100()),
            kv: Tokens(1000),
            chunk: 512,
            max_rows: 8,
            host: Micros(1000),
            start: Micros(1000),
        }
    }

    fn run(trace: &Trace) -> Run<'_> {
        let fleet = Fleet {
            workers: 2,
            device: device(),
            slow: vec![],
            noise: Noise::default(),
            delay: Micros::ZERO,
            lost: vec![],
            joined: vec![],
        };
        let system = System::Continuous { policy: "product".into(), commit: Commit::Prefixes, guard: Guarding::Off };
        let until = Micros(u64::MAX);
        let sessions = Sessions::Closed;
        Run { trace, fleet, system, sessions, limit: 10, seed: 1, until, sample_every: Micros(1_000_000) }
    }

    /// A request each second, of 100 tokens.
    fn trace(requests: u64) -> Trace {
        let one = |at: u64| TraceRequest {
            at: Micros(at * 1_000_000),
            input: 100,
            output: 5,
            chain: (0, 0),
            session: None,
            turn: 0,
            class: 0,
        };
        Trace { requests: (0..requests).map(one).collect(), ..Trace::default() }
    }

    fn served(request: u32) -> Served {
        let arrived = Micros(u64::from(request) * 1_000_000);
        Served {
            request,
            worker: 0,
            arrived,
            first: arrived + Micros(100_000 * u64::from(request + 1)),
            ended: arrived + Micros(100_000 * u64::from(request + 1) + 400_000),
            hit: 25,
            output: 5,
            gap: 200_000,
            slices: request,
        }
    }

    fn near(value: f64, expected: f64) {
        assert!((value - expected).abs() < 1e-9, "{value} and {expected}");
    }

    #[test]
    fn figures_are_those_of_the_measured_part() {
        let trace = trace(11);
        let record = Record {
            served: (0..11).map(served).collect(),
            workers: [4, 8]
                .map(|at| WorkerOutcome {
                    completed: Micros(at * 1_000_000),
                    pad: Tokens(3),
                    ..WorkerOutcome::default()
                })
                .to_vec(),
            samples: vec![
                Sample { at: Micros(0), batch_size: vec![100, 0], queued: vec![0, 0] },
                Sample { at: Micros(3_000_000), batch_size: vec![3, 1], queued: vec![0, 0] },
                Sample { at: Micros(4_000_000), batch_size: vec![0, 0], queued: vec![0, 0] },
                Sample { at: Micros(5_000_000), batch_size: vec![2, 2], queued: vec![30, 10] },
            ],
            guard: GuardCounts { alarms: 1, filtered: 7 },
            end: Micros(12_000_000),
            ..Record::default()
        };
        let summary = Summary::of(&run(&trace), &record, 0.2, Some(Slo { ttft: 0.85, tpot: 0.1 }));
        // those of seconds 2 to 10
        assert_eq!((summary.requests, summary.finished, summary.unfinished), (9, 9, 0));
        let ttft = summary.ttft.expect("all began");
        near(ttft.mean, 0.7);
        near(ttft.p50, 0.7);
        near(ttft.p95, 1.06);
        near(summary.tpot.expect("all ended").mean, 0.1);
        near(summary.gap.expect("all ended").p99, 0.2);
        near(summary.latency.expect("all ended").mean, 1.1);
        // ended in seconds 2 to 10: those of 2 (2.7) to 8 (9.3); 1 ended at 1.6
        near(summary.throughput, 7.0 / 8.0);
        near(summary.output_tokens_per_s, 35.0 / 8.0);
        near(summary.goodput.expect("asked for"), 6.0 / 8.0);
        near(summary.hit_ratio, 0.25);
        near(summary.imbalance[0].expect("sampled"), 1.25);
        near(summary.imbalance[1].expect("sampled"), 1.5);
        near(summary.spread, 2.0);
        let figures = summary.figures();
        assert_eq!((&figures["pad"], &figures["filtered"]), (&json!(6), &json!(7)));
        assert_eq!((&figures["slices_mean"], &figures["preempted"]), (&Value::Null, &json!(55)));
    }

    #[test]
    fn a_run_that_served_nobody_has_figures_too() {
        let trace = trace(3);
        let waiting = |request| Served { first: Micros::ZERO, ended: Micros::ZERO, output: 0, ..served(request) };
        let record = Record { served: (0..3).map(waiting).collect(), end: Micros(1), ..Record::default() };
        let summary = Summary::of(&run(&trace), &record, 0.2, None);
        assert_eq!((summary.finished, summary.tpot, summary.imbalance), (0, None, [None, None]));
        assert_eq!(summary.figures()["tpot_mean"], Value::Null);
        let nothing = Trace::default();
        let summary = Summary::of(&run(&nothing), &Record::default(), 0.2, None);
        near(summary.throughput, 0.0);
        near(summary.spread, 0.0);
        assert!(!format!("{:?}", summary.figures()).contains("-0"), "{:?}", summary.figures());
    }

    #[test]
    fn who_still_waits_at_the_end_makes_no_mean_better() {
        let trace = trace(11);
        let mut record = Record { served: (0..11).map(served).collect(), end: Micros(20_000_000), ..Record::default() };
        // the last has no first token, the one before it no last
        record.served[10] = Served { first: Micros::ZERO, ended: Micros::ZERO, output: 0, ..served(10) };
        record.served[9] = Served { ended: Micros::ZERO, ..served(9) };
        let summary = Summary::of(&run(&trace), &record, 0.2, None);
        let [ttft, latency] = [summary.ttft, summary.latency].map(|dist| dist.expect("some"));
        // seconds .3 to 1, then 10; .7 to 1.3, then 11 and 10
        near(ttft.mean, (5.2 + 10.0) / 9.0);
        near(latency.mean, (7.0 + 11.0 + 10.0) / 9.0);
        assert_eq!(summary.unfinished, 2);
        // a turn that would come after the end has not waited
        record.served[10].arrived = record.end;
        let summary = Summary::of(&run(&trace), &record, 0.2, None);
        near(summary.ttft.expect("some").mean, 5.2 / 8.0);
        assert_eq!(summary.unfinished, 2);
    }

    #[test]
    fn what_comes_all_at_once_is_measured_to_its_end() {
        let mut trace = trace(4);
        trace.requests.iter_mut().for_each(|request| request.at = Micros::ZERO);
        let one = |at| Served { arrived: Micros::ZERO, ..served(at) };
        let record = Record { served: (0..4).map(one).collect(), end: Micros(4_000_000), ..Record::default() };
        let summary = Summary::of(&run(&trace), &record, 0.2, None);
        assert_eq!(summary.requests, 4);
        near(summary.throughput, 1.0);
    }

    #[test]
    fn quantiles_lie_between_neighbours() {
        let dist = Dist::of((0..=100).map(f64::from).collect()).expect("some");
        near(dist.p95, 95.0);
        near(dist.mean, 50.0);
        assert_eq!(Dist::of(vec![7.0]), Some(Dist { mean: 7.0, p50: 7.0, p95: 7.0, p99: 7.0 }));
        assert_eq!(Dist::of(vec![]), None);
    }
}
