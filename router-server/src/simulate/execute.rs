//! Runs of a plan over threads. A trace as one rate and seed need it is made once and given up after its last run.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use router_core::Micros;
use router_sim::{Fleet, Noise, Record, Run, Summary, Trace, run};
use serde_json::{Map, Value, json};

use super::inputs::line;
use super::plan::{Case, Plan};

/// First part of a run that is not measured.
pub const WARM: f64 = 0.2;

/// Samples of all workers in a run, about.
const SAMPLES: u64 = 2_000;

/// A run that is over.
pub struct Done<'a> {
    /// Its place in the plan.
    pub at: usize,
    /// What it was.
    pub run: &'a Run<'a>,
    /// What became of each request.
    pub record: Record,
    /// Labels and figures, as a line of the report.
    pub row: Map<String, Value>,
}

/// Who wants to know how far it is.
pub trait Watch: Sync {
    /// The run at this place of the plan is done to this share. `false` ends all runs.
    fn share(&self, at: usize, share: f64) -> bool;
    /// It is over.
    fn over(&self, _at: usize) {}
}

/// Runs all of a plan, `plan.jobs` at once, and keeps of each what `keep` does; in the order of the plan. Without those that
/// were under way when the watch said to stop. An error ends all.
pub fn execute<T: Send>(
    plan: &Plan,
    watch: &dyn Watch,
    keep: &(dyn Fn(Done<'_>) -> T + Sync),
) -> Result<Vec<(usize, T)>, String> {
    // runs of one trace one after another, so that few traces are held
    let mut order: Vec<usize> = (0..plan.cases.len()).collect();
    order.sort_by_key(|&at| key(&plan.cases[at]));
    let shared = Shared::new(plan);
    let (next, stopped) = (AtomicUsize::new(0), AtomicBool::new(false));
    let (kept, wrong) = (Mutex::new(Vec::new()), Mutex::new(None));
    std::thread::scope(|scope| {
        for _ in 0..plan.jobs.min(order.len()) {
            scope.spawn(|| {
                while let Some(&at) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if stopped.load(Ordering::Relaxed) {
                        return;
                    }
                    match one(plan, at, &shared, watch, &stopped, keep) {
                        Ok(Some(done)) => {
                            held(&kept).push((at, done));
                            watch.over(at);
                        }
                        Ok(None) => return,
                        Err(error) => {
                            stopped.store(true, Ordering::Relaxed);
                            held(&wrong).get_or_insert(error);
                            return;
                        }
                    }
                }
            });
        }
    });
    if let Some(error) = wrong.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    let mut kept = kept.into_inner().unwrap_or_else(PoisonError::into_inner);
    kept.sort_by_key(|(at, _)| *at);
    Ok(kept)
}

/// What is run, with the trace that [`Source::scaled`](super::inputs::Source::scaled) makes for it.
pub fn run_of<'a>(plan: &Plan, case: &Case, trace: &'a Trace) -> Run<'a> {
    let last = trace.requests.last().map_or(0, |request| request.at.0);
    let longest = trace.requests.iter().map(|request| request.output).max().unwrap_or(1);
    Run {
        trace,
        fleet: Fleet {
            workers: case.workers,
            device: case.device.clone(),
            slow: Vec::new(),
            noise: Noise { seed: case.seed, ..plan.noise },
            delay: case.delay,
            lost: Vec::new(),
            joined: Vec::new(),
        },
        system: case.system.clone(),
        sessions: plan.sessions,
        limit: plan.limit.unwrap_or(longest),
        seed: case.seed,
        until: plan.until,
        sample_every: Micros((last.min(plan.until.0) / SAMPLES).max(10_000)),
    }
}

fn one<T>(
    plan: &Plan,
    at: usize,
    shared: &Shared,
    watch: &dyn Watch,
    stopped: &AtomicBool,
    keep: &dyn Fn(Done<'_>) -> T,
) -> Result<Option<T>, String> {
    let case = &plan.cases[at];
    let trace = shared.trace(plan, case)?;
    let began = Instant::now();
    let whole = run_of(plan, case, &trace);
    let mut go_on = |share: f64| {
        let go_on = !stopped.load(Ordering::Relaxed) && watch.share(at, share);
        if !go_on {
            stopped.store(true, Ordering::Relaxed);
        }
        go_on
    };
    let record = run(&whole, &mut go_on).map_err(line)?;
    shared.done(case);
    if !go_on(1.0) {
        return Ok(None);
    }
    let mut row = case.labels.clone();
    row.extend(Summary::of(&whole, &record, WARM, plan.slo).figures());
    row.insert("wall_s".into(), json!(began.elapsed().as_secs_f64()));
    Ok(Some(keep(Done { at, run: &whole, record, row })))
}

/// What two runs must have in common to share a trace.
type Key = (usize, u64, u64);

fn key(case: &Case) -> Key {
    (case.source, case.rate_scale.to_bits(), case.seed)
}

/// Traces as runs need them, each with the number of runs that still do.
struct Shared(Mutex<BTreeMap<Key, (usize, Slot)>>);

/// Made by the first run that needs it, while the others wait for it.
type Slot = Arc<Mutex<Option<Arc<Trace>>>>;

impl Shared {
    fn new(plan: &Plan) -> Self {
        let mut all = BTreeMap::new();
        for case in &plan.cases {
            all.entry(key(case)).or_insert_with(|| (0, Slot::default())).0 += 1;
        }
        Self(Mutex::new(all))
    }

    fn trace(&self, plan: &Plan, case: &Case) -> Result<Arc<Trace>, String> {
        let slot = held(&self.0).get(&key(case)).map(|(_, slot)| Arc::clone(slot)).unwrap_or_default();
        let mut slot = held(&slot);
        if let Some(trace) = &*slot {
            return Ok(Arc::clone(trace));
        }
        let made = Arc::new(plan.sources[case.source].scaled(case.rate_scale, case.seed)?);
        *slot = Some(Arc::clone(&made));
        Ok(made)
    }

    fn done(&self, case: &Case) {
        let mut all = held(&self.0);
        if let Some((left, _)) = all.get_mut(&key(case)) {
            *left -= 1;
            if *left == 0 {
                all.remove(&key(case));
            }
        }
    }
}

/// A lock whose holder cannot have left anything half done.
fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
