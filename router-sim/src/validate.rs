//! Holds the simulator to a recorded run: the same requests, workers that take what their cost models say, the real
//! scheduler; then what the simulator says beside what happened.
//!
//! Of the recording's own measurements three go in, and nothing is fitted to what is compared:
//!
//! - where the recording has a calibration run, *what iterations cost*: fitted to its batches. Workers that share cores with
//!   one another, the router and the clients are slower than one that measured itself alone; the other runs are held to it.
//! - *around*: what a request of one token takes on an idle fleet beyond its iteration (client, HTTP, tokenising, both
//!   links), the median of the probes; it is added once to each request.
//! - *between*: what passes from iteration to iteration beyond the time that the worker reports (its messages, its thread),
//!   the median over batches that another followed at once; it is added to each iteration.
//!
//! A turn comes as long after the end of the turn before it as it did in the recording, so that a model that is too fast is
//! shown by the throughput too.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use router_core::{
    BlockHash, BlockSize, Blocks, Config, CostModel, Epoch, Fit, Layout, Micros, Mode, ModelSpec, NewRequest,
    PagedStep, RequestId, RowId, Tokens, Work, WorkerSpec,
};

use serde::Serialize;

use crate::driver::Simulation;
use crate::outcome::RowOutcome;
use crate::random::mix;
use crate::recording::{
    OneRun, RecordedBatch, RecordedEnd, RecordedRequest, RecordedRun, RecordedWorker, RecordingError,
};
use crate::sequence::next_token;
use crate::timing::Pace;

/// How far a mean may be off before the runs' own spread excuses it.
const WITHIN: f64 = 0.10;
/// How far the times of batches may be off in the median before the runs' own spread excuses it.
const SLICE_WITHIN: f64 = 0.05;
const FOREVER: Micros = Micros(u64::MAX / 4);
/// Things that may happen in a replay for each of its tokens: what never ends is found.
const MOST_HAPPENING: u64 = 100;

/// A figure of the recorded runs beside the simulator's.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Metric {
    /// What.
    pub name: &'static str,
    /// Of the values.
    pub unit: &'static str,
    /// Mean over the runs.
    pub recorded: f64,
    /// Mean over their replays.
    pub simulated: f64,
    /// The simulated over the recorded, less one; of slice times the median over the batches.
    pub error: f64,
    /// How far the run that is farthest from the runs' mean is from it; of slice times how far a run's median error is from
    /// that of all.
    pub spread: f64,
    /// What the error may be, either way.
    pub bound: f64,
}

/// How near the simulator comes to a recording.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Fidelity {
    /// The workload.
    pub name: String,
    /// Runs of it.
    pub runs: usize,
    /// The largest share of the machine's cores that something else was using before any of them.
    pub busy_before: f64,
    /// Seconds around a request, mean over the runs.
    pub around: f64,
    /// Seconds between iterations, mean over the runs.
    pub between: f64,
    /// How far the model's time of a single batch is off, in the median, whatever the sign.
    pub slice_off: f64,
    /// How far batches that computed the same are from one another: see `slice_spread`.
    pub slice_spread: f64,
    /// What is compared.
    pub metrics: Vec<Metric>,
}

impl Metric {
    /// The error is within its bound.
    pub fn holds(&self) -> bool {
        self.error.abs() <= self.bound
    }
}

impl Fidelity {
    /// All errors are within their bounds.
    pub fn holds(&self) -> bool {
        self.metrics.iter().all(Metric::holds)
    }
}

impl fmt::Display for Fidelity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, runs, busy_before, around, between, slice_off, slice_spread, .. } = self;
        writeln!(f, "{name}: {runs} runs on a machine that others used to {:.0} % at most", busy_before * 100.0)?;
        writeln!(
            f,
            "{:<12} {:>10} {:>10}  {:<9} {:>7} {:>7} {:>7}",
            "", "recorded", "simulated", "", "error", "spread", "bound"
        )?;
        for m in &self.metrics {
            let digits = if m.recorded >= 100.0 { 0 } else { 2 };
            let [error, spread, bound] = [m.error, m.spread, m.bound].map(|part| part * 100.0);
            let holds = if m.holds() { "" } else { "  does not hold" };
            writeln!(
                f,
                "{:<12} {:>10.digits$} {:>10.digits$}  {:<9} {error:>+6.1}% {spread:>6.1}% {bound:>6.1}%{holds}",
                m.name, m.recorded, m.simulated, m.unit
            )?;
        }
        write!(
            f,
            "around a request {:.2} ms, between iterations {:.2} ms; a slice is off by {:.1} % either way in the median, \
             where slices that computed the same differ by {:.1} %",
            around * 1e3,
            between * 1e3,
            slice_off * 100.0,
            slice_spread * 100.0
        )
    }
}

/// Replays each run and compares.
pub fn validate(recorded: &RecordedRun) -> Result<Fidelity, RecordingError> {
    let (mut real, mut model, mut errors) = (Vec::new(), Vec::new(), Vec::new());
    let mut biases = Vec::new();
    let (mut around, mut between) = (0.0, 0.0);
    let fitted = recorded.calibration.as_ref().map(fit).transpose()?;
    for run in &recorded.runs {
        let setting = Setting::of(run, recorded.mode()?, fitted);
        around += setting.around.0 as f64 * 1e-6;
        between += setting.between * 1e-6;
        real.push(Figures::recorded(run));
        model.push(replay(recorded, run, &setting)?);
        let of_run: Vec<_> = slice_errors(run, &setting).collect();
        biases.push(median(of_run.iter().map(|error| error.1).collect()));
        errors.extend(of_run);
    }
    let count = recorded.runs.len() as f64;
    let mut metrics: Vec<Metric> = Figures::NAMES
        .iter()
        .enumerate()
        .map(|(at, (name, unit))| {
            let mean = |all: &[Figures]| all.iter().map(|figures| figures.0[at]).sum::<f64>() / count;
            let (recorded, simulated) = (mean(&real), mean(&model));
            let off = |value: f64| (value / recorded.max(f64::MIN_POSITIVE) - 1.0).abs();
            let spread = real.iter().map(|figures| off(figures.0[at])).fold(0.0, f64::max);
            let error = simulated / recorded.max(f64::MIN_POSITIVE) - 1.0;
            Metric { name, unit, recorded, simulated, error, spread, bound: WITHIN.max(spread) }
        })
        .collect();
    let batches = recorded.runs.iter().flat_map(|run| &run.batches).filter(|batch| batch.steps > 0);
    let times: Vec<f64> = batches.map(|batch| batch.time_us as f64 * 1e-3).collect();
    let slice_bias = median(errors.iter().map(|error| error.1).collect());
    if !errors.is_empty() {
        let spread = biases.iter().map(|bias| (bias - slice_bias).abs()).fold(0.0, f64::max);
        metrics.push(Metric {
            name: "slice time",
            unit: "ms",
            recorded: median(times),
            simulated: median(errors.iter().map(|error| error.0 * 1e3).collect()),
            error: slice_bias,
            spread,
            bound: SLICE_WITHIN.max(spread),
        });
    }
    Ok(Fidelity {
        name: recorded.name.clone(),
        runs: recorded.runs.len(),
        busy_before: recorded.runs.iter().map(|run| run.busy_before).fold(0.0, f64::max),
        around: around / count,
        between: between / count,
        slice_off: median(errors.iter().map(|error| error.1.abs()).collect()),
        slice_spread: slice_spread(&recorded.runs),
        metrics,
    })
}

/// What is compared, of one run.
struct Figures([f64; 3]);

impl Figures {
    const NAMES: [(&str, &str); 3] = [("mean TTFT", "ms"), ("mean TPOT", "ms"), ("throughput", "tokens/s")];

    /// Of (arrived, first token, ended, output tokens), in microseconds.
    fn of(requests: &[[u64; 4]]) -> Self {
        let mean = |all: Vec<f64>| all.iter().sum::<f64>() / all.len().max(1) as f64;
        let ttft = requests.iter().map(|[arrived, first, ..]| first.saturating_sub(*arrived) as f64 * 1e-3).collect();
        let several = requests.iter().filter(|[.., output]| *output > 1);
        let tpot = several
            .map(|[_, first, ended, output]| ended.saturating_sub(*first) as f64 * 1e-3 / (*output - 1) as f64)
            .collect();
        let begun = requests.iter().map(|[arrived, ..]| *arrived).min().unwrap_or(0);
        let done = requests.iter().map(|[_, _, ended, _]| *ended).max().unwrap_or(0);
        let tokens: u64 = requests.iter().map(|[.., output]| *output).sum();
        Self([mean(ttft), mean(tpot), tokens as f64 / (done.saturating_sub(begun).max(1) as f64 * 1e-6)])
    }

    fn recorded(run: &OneRun) -> Self {
        let counts = run.requests.iter().filter(|request| request.counts());
        let times = |r: &RecordedRequest| [r.arrived_us, r.first_us, r.ended_us, r.output.into()];
        Self::of(&counts.map(times).collect::<Vec<_>>())
    }
}

/// What a recording says of itself beyond its cost models.
struct Setting {
    around: Micros,
    /// Microseconds.
    between: f64,
    /// What iterations cost, if not what was announced.
    fitted: Option<CostModel>,
}

impl Setting {
    fn of(run: &OneRun, mode: Mode, fitted: Option<CostModel>) -> Self {
        let around = run.probes_us.iter().map(|[ttft, iteration]| ttft.saturating_sub(*iteration) as f64).collect();
        let mut between = Vec::new();
        // a pool's rounds wait for their time: what passes between their batches is no cost
        if !matches!(mode, Mode::Pooled(_)) {
            for worker in 0..run.workers.len() {
                let of: Vec<_> = run.batches.iter().filter(|batch| batch.worker == worker).collect();
                for pair in of.windows(2) {
                    let passed = pair[1].at_us.saturating_sub(pair[0].at_us);
                    let follows = matches!(pair[0].end, RecordedEnd::Steps | RecordedEnd::Cut);
                    if follows && pair[0].steps > 0 {
                        between.push((passed as f64 - pair[0].time_us as f64) / f64::from(pair[0].steps));
                    }
                }
            }
        }
        Self { around: Micros(median(around) as u64), between: median(between).max(0.0), fitted }
    }

    fn cost(&self, worker: &RecordedWorker) -> CostModel {
        self.fitted.unwrap_or(worker.cost_model)
    }
}

fn work(batch: &RecordedBatch) -> Work {
    Work {
        fills: batch.fills,
        prefill: Tokens(batch.prefill_tokens),
        pairs: batch.pairs,
        decoded: batch.decoded_tokens,
        context: Tokens(batch.context_tokens),
        longest: Tokens(batch.longest_tokens),
    }
}

fn ran(run: &OneRun) -> impl Iterator<Item = &RecordedBatch> {
    run.batches.iter().filter(|batch| batch.steps > 0 && batch.time_us > 0)
}

/// What iterations cost, from the batches of a run.
fn fit(run: &OneRun) -> Result<CostModel, RecordingError> {
    if run.layout() == Layout::Padded {
        let why = "calibration: it is of workers that pad, and only what paged batches cost can be fitted";
        return Err(RecordingError::Impossible(why.into()));
    }
    let batches: Vec<_> = ran(run).map(|batch| (work(batch), batch.steps, batch.time_us as f64 * 1e-6)).collect();
    Fit::of_batches(&batches).map_err(|error| RecordingError::Impossible(format!("calibration: {error}")))
}

/// Of each batch: the model's seconds for what it computed, and these over the measured ones, less one.
fn slice_errors(run: &OneRun, setting: &Setting) -> impl Iterator<Item = (f64, f64)> {
    ran(run).filter_map(|batch| {
        let model = setting.cost(run.workers.get(batch.worker)?);
        let seconds = work(batch).seconds(&model, batch.rows, batch.steps);
        Some((seconds, seconds * 1e6 / batch.time_us as f64 - 1.0))
    })
}

/// How far batches that computed the same are from one another: of such a group the one that is farthest from the mean,
/// relative to it; the median over the groups. No model of what a batch computes can be nearer to it than that.
fn slice_spread(runs: &[OneRun]) -> f64 {
    // within a twentieth is the same: answers differ by a token between runs
    let about = |count: u64| ((count as f64).max(1.0).ln() / 1.05_f64.ln()).round() as i32;
    let mut alike: HashMap<_, Vec<f64>> = HashMap::new();
    for batch in runs.iter().flat_map(ran) {
        let counts = [batch.prefill_tokens, batch.pairs, batch.decoded_tokens, batch.context_tokens];
        let key = (batch.rows, batch.steps, batch.fills, counts.map(about));
        alike.entry(key).or_default().push(batch.time_us as f64);
    }
    let farthest = alike.values().filter(|times| times.len() > 1).map(|times| {
        let mean = times.iter().sum::<f64>() / times.len() as f64;
        times.iter().map(|time| (time / mean - 1.0).abs()).fold(0.0, f64::max)
    });
    median(farthest.collect())
}

/// The same requests to modelled workers.
fn replay(recorded: &RecordedRun, run: &OneRun, setting: &Setting) -> Result<Figures, RecordingError> {
    let impossible = |why: &str| RecordingError::Impossible(why.to_owned());
    let first = run.workers.first().ok_or_else(|| impossible("workers: there is none"))?;
    let block_size = u32::try_from(first.block_size).ok().and_then(BlockSize::new);
    let block_size = block_size.ok_or_else(|| impossible("workers[0].block_size: it is none"))?;
    let model = ModelSpec { digest: "recorded".into(), tokenizer: "none".into(), block_size, vocab: first.vocab };
    let config = Config {
        policy: recorded.policy_name()?,
        mode: recorded.mode()?,
        slice_len: None,
        seed: 0,
        max_rows: run.requests.len().max(1),
    };
    let mut sim = Simulation::new(model.clone(), config, Micros::ZERO).cheap(1);
    for (slot, worker) in run.workers.iter().enumerate() {
        let spec = WorkerSpec {
            name: worker.id.clone(),
            epoch: Epoch(slot as u64 + 1),
            model: model.clone(),
            blocks: Blocks(worker.blocks),
            max_rows: worker.max_rows,
            max_context: Tokens(worker.max_context),
            chunk: Tokens(worker.chunk_tokens.into()),
            layout: worker.cost_model.layout(),
            cost: Some(worker.cost_model),
        };
        let pace = Pace::linear(slower(setting.cost(worker), setting.between * 1e-6), worker.chunk_tokens);
        sim.join(Micros::ZERO, spec, pace);
    }
    serve(sim, run, setting.around, first.vocab)
}

/// The model whose every iteration takes so much longer.
fn slower(model: CostModel, seconds: f64) -> CostModel {
    match model {
        CostModel::Paged { prefill, step } => {
            CostModel::Paged { prefill, step: PagedStep { constant: step.constant + seconds, ..step } }
        }
        CostModel::Padded { mut prefill, mut step } => {
            prefill.constant += seconds;
            step.constant += seconds;
            CostModel::Padded { prefill, step }
        }
    }
}

/// A conversation on its way: the requests that are left, and when the last one was over.
struct Talk {
    /// Places of its requests, in reverse.
    left: Vec<usize>,
    /// The one that is served.
    asked: Option<usize>,
}

/// Plays the requests, each turn as long after the end of the one before as it was.
fn serve(mut sim: Simulation, run: &OneRun, around: Micros, vocab: u32) -> Result<Figures, RecordingError> {
    let prompts = prompts(run, vocab);
    let mut talks: Vec<Talk> = Vec::new();
    let mut names: Vec<i64> = Vec::new();
    for (place, request) in run.requests.iter().enumerate().rev() {
        // probes are one conversation: they came one by one
        if let Some(at) = names.iter().position(|name| *name == request.session) {
            talks[at].left.push(place);
        } else {
            names.push(request.session);
            talks.push(Talk { left: vec![place], asked: None });
        }
    }
    let mut arrived = vec![Micros::ZERO; run.requests.len()];
    // workers are there when the first request comes
    let start = Micros(1_000);
    for talk in &mut talks {
        if let Some(place) = talk.left.pop() {
            arrived[place] = start + Micros(run.requests[place].arrived_us);
            ask(&mut sim, run, place, arrived[place], &prompts[place]);
            talk.asked = Some(place);
        }
    }
    let row = |place: usize| RowId { request: RequestId(place as u64 + 1), choice: 0 };
    let tokens: u64 = run.requests.iter().map(|r| r.prompt() as u64 + u64::from(r.output)).sum();
    let mut left = tokens.saturating_add(1_000).saturating_mul(MOST_HAPPENING);
    let mut next = Vec::new();
    let mut rows = sim.unfinished();
    while talks.iter().any(|talk| talk.asked.is_some()) && left > 0 && sim.step(FOREVER) {
        left -= 1;
        // rows that ended have their place in the outcome
        if std::mem::replace(&mut rows, sim.unfinished()) <= rows {
            continue;
        }
        let now = sim.now();
        for talk in &mut talks {
            let Some(place) = talk.asked else { continue };
            let Some(ended) = sim.outcome().rows.get(&row(place)).and_then(|row| row.ends.first()) else { continue };
            talk.asked = talk.left.pop();
            if let Some(then) = talk.asked {
                let pause = run.requests[then].arrived_us.saturating_sub(run.requests[place].ended_us);
                arrived[then] = (ended.0 + around + Micros(pause)).max(now);
                next.push(then);
            }
        }
        for place in next.drain(..) {
            ask(&mut sim, run, place, arrived[place], &prompts[place]);
        }
    }
    let outcome = sim.into_outcome();
    let mut times = Vec::new();
    for (place, request) in run.requests.iter().enumerate().filter(|(_, request)| request.counts()) {
        let served = outcome.rows.get(&row(place)).and_then(RowOutcome::served);
        let Some((first, ended)) = served else {
            let why = if outcome.rejected.contains_key(&RequestId(place as u64 + 1)) {
                "no worker can hold it"
            } else {
                "the simulated fleet never ends it"
            };
            return Err(RecordingError::Impossible(format!("requests[{place}]: {why}")));
        };
        times.push([arrived[place].0, (first + around).0, (ended + around).0, request.output.into()]);
    }
    Ok(Figures::of(&times))
}

fn ask(sim: &mut Simulation, run: &OneRun, place: usize, at: Micros, prompt: &Arc<[u32]>) {
    let recorded = &run.requests[place];
    let request = NewRequest {
        id: RequestId(place as u64 + 1),
        prompt: prompt.clone(),
        root: BlockHash(1),
        choices: 1,
        max_tokens: Tokens(recorded.limit.into()),
        urgent: false,
    };
    if recorded.stopped || recorded.output < recorded.limit {
        sim.arrive_ending(at, request, recorded.output);
    } else {
        sim.arrive(at, request);
    }
}

/// Token ids that share what the recorded prompts shared. Answers in them are those that modelled workers draw, so that a
/// turn finds its predecessor's answer where the recorded one did.
fn prompts(run: &OneRun, vocab: u32) -> Vec<Arc<[u32]>> {
    let mut all: Vec<Arc<[u32]>> = Vec::with_capacity(run.requests.len());
    for (place, request) in run.requests.iter().enumerate() {
        let mut ids = Vec::with_capacity(request.prompt());
        if let Some(parent) = request.parent {
            ids.extend(all[parent].iter().take(request.keep));
            while ids.len() < request.keep {
                let last = ids.len() - 1;
                ids.push(next_token(ids[last], last, vocab));
            }
        }
        let fresh = |at: usize| 3 + (mix(((place as u64) << 32) | at as u64) % u64::from(vocab.max(4) - 3)) as u32;
        ids.extend((0..request.new).map(fresh));
        all.push(ids.into());
    }
    all
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

impl RowOutcome {
    /// When its first token came and when it ended.
    fn served(&self) -> Option<(Micros, Micros)> {
        Some((*self.times.first()?, self.ends.first()?.0))
    }
}
