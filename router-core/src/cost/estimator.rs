//! What a worker's batches take: its model, corrected by its reports, and the band that a batch's time falls into.
//!
//! A batch is walked through its iterations twice over ([`super::walk`]): no row leaves before its limit, and many do.
//! Both are multiplied by the worker's correction, and then each by the quantile of its own residuals that leaves out
//! what the band may miss. So a model that is off, noise, and rows that leave seldomer than foreseen all end up in the
//! residuals, and nothing of them has to be known.

use super::model::{CostModel, Layout, micros};
use super::walk::walk;
use super::window::Window;
use crate::constants::{
    BUCKETS, CORRECTION_GAIN, FIRST_OUTPUT, MEMORY, SETTLE, START_UNKNOWN, TRUST_MEASURED, TRUST_UNKNOWN,
};
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

/// How well a worker's bands have done.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Calibrated {
    /// Slices of 1, of 2 to 4, of 5 to 16, and of more iterations.
    pub buckets: [Coverage; BUCKETS.len()],
    /// Mean of `|time / expected - 1|` over all of them.
    pub error: f64,
    /// Measured time over the model's, as of now.
    pub correction: f64,
    /// Part of drawn tokens that end their row, as of now.
    pub hazard: f64,
}

/// Slices, and those whose time fell into the band that was foreseen for their number of iterations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    /// All.
    pub scored: u64,
    /// In their band.
    pub covered: u64,
}

/// A worker's cost model and what its reports have taught.
#[derive(Clone, Debug)]
pub struct Estimator {
    model: CostModel,
    announced: bool,
    correction: f64,
    /// Batches that the correction has seen, until there are enough.
    seen: u32,
    residuals: [Residuals; BUCKETS.len()],
    ends: Ends,
    coverage: [Coverage; BUCKETS.len()],
    /// Sum of `|time / expected - 1|`, and of how many.
    errors: (f64, u64),
}

/// Residuals of one bucket: measured over corrected seconds, of the lower and of the upper forecast.
///
/// They are taken against the forecast as corrected *then*. So they are errors of one step's foresight, like the one they
/// are used for next, and are of a piece however the correction moves: a worker that slows down for an hour moves its
/// correction, and leaves a few wide residuals behind, not an hour of them. Taken against the bare model they would have
/// to cover all speeds of the last thousand slices at once. The price is that the correction's own noise is in them.
#[derive(Clone, Debug, Default)]
struct Residuals {
    lo: Window,
    hi: Window,
}

/// How seldom a token is the last: an exponentially forgetting ratio.
#[derive(Clone, Copy, Debug)]
struct Ends {
    steps: f64,
    ended: f64,
}

impl Forecast {
    /// Iterations foreseen; fewer than asked for where all rows are at their limit before.
    pub fn steps(&self) -> u32 {
        self.spans.len() as u32
    }

    /// Model seconds of `k` iterations; beyond those foreseen, of all. `None` for no iterations.
    fn at(&self, k: u32) -> Option<[f64; 2]> {
        self.spans.get((k as usize).min(self.spans.len()).checked_sub(1)?).copied()
    }
}

impl Band {
    /// The time is in it.
    pub fn contains(&self, time: Micros) -> bool {
        self.lo <= time && time <= self.hi
    }
}

impl Coverage {
    fn score(&mut self, covered: bool) {
        self.scored += 1;
        self.covered += u64::from(covered);
    }
}

impl Calibrated {
    /// All buckets together.
    pub fn all(&self) -> Coverage {
        let sum = |part: fn(&Coverage) -> u64| self.buckets.iter().map(part).sum();
        Coverage { scored: sum(|c| c.scored), covered: sum(|c| c.covered) }
    }
}

impl Ends {
    const START: Self = Self { steps: FIRST_OUTPUT, ended: 1.0 };

    fn observe(&mut self, steps: u64, ended: u64) {
        self.steps += steps as f64;
        self.ended += ended.min(steps) as f64;
        // as many rows as are remembered, or the tokens that as many long outputs have
        let most = [self.ended / MEMORY, self.steps / (MEMORY * 16.0 * FIRST_OUTPUT), 1.0];
        let over = most.into_iter().fold(1.0, f64::max);
        self.steps /= over;
        self.ended /= over;
    }

    fn hazard(&self) -> f64 {
        self.ended / self.steps
    }
}

impl Estimator {
    /// With the model a worker announced, if it did, and if it is one.
    pub fn new(model: Option<CostModel>, layout: Layout) -> Self {
        let model = model.filter(|model| model.check().is_ok());
        Self {
            announced: model.is_some(),
            model: model.unwrap_or(CostModel::unknown(layout)),
            correction: 1.0,
            seen: 0,
            residuals: Default::default(),
            ends: Ends::START,
            coverage: Default::default(),
            errors: (0.0, 0),
        }
    }

    /// The model as it was announced.
    pub fn model(&self) -> &CostModel {
        &self.model
    }

    /// Measured time over the model's.
    pub fn correction(&self) -> f64 {
        self.correction
    }

    /// Part of drawn tokens that end their row before its limit.
    pub fn hazard(&self) -> f64 {
        self.ends.hazard()
    }

    /// Model seconds as this worker's time.
    pub fn time(&self, seconds: f64) -> Micros {
        micros(seconds * self.correction)
    }

    /// Walks the batch through its iterations: rows in order share the chunk, one decodes once its prefill is done.
    /// O(rows + steps), and rows with a budget once an iteration in which they prefill.
    pub fn forecast(&self, rows: &[RowLoad], chunk: Tokens, steps: u32) -> Forecast {
        Forecast { spans: walk(&self.model, rows, chunk, steps, self.hazard()) }
    }

    /// The band for `k` iterations; beyond those foreseen, that of the last. It is as the estimator is now: what is said
    /// of a batch at its start and at its end agrees if no other was observed between.
    pub fn band(&self, forecast: &Forecast, k: u32) -> Band {
        let Some([lo, hi]) = forecast.at(k) else { return Band::default() };
        let [low, high] = self.edges(bucket(k));
        // rounded away from the band's middle, so that its edges are in it
        let lo = (lo * self.correction * low * 1e6).floor() as u64;
        let hi = (hi * self.correction * high * 1e6).ceil() as u64;
        Band { lo: Micros(lo.min(hi)), hi: Micros(hi) }
    }

    /// The time `k` iterations are expected to take: in the middle of what both forecasts say by their median residual.
    pub fn expected(&self, forecast: &Forecast, k: u32) -> Micros {
        let Some([lo, hi]) = forecast.at(k) else { return Micros::ZERO };
        let residuals = &self.residuals[bucket(k)];
        let seconds = match (residuals.lo.median(), residuals.hi.median()) {
            (Some(low), Some(high)) => f64::midpoint(lo * low, hi * high),
            _ => f64::midpoint(lo, hi),
        };
        self.time(seconds)
    }

    /// A batch took `time` for its `k` iterations. Scores the band it had, then learns.
    pub fn observe(&mut self, forecast: &Forecast, k: u32, time: Micros) {
        let Some([lo, hi]) = forecast.at(k) else { return };
        let at = bucket(k);
        self.coverage[at].score(self.band(forecast, k).contains(time));
        let expected = self.expected(forecast, k);
        if expected > Micros::ZERO {
            self.errors.0 += (time.0 as f64 / expected.0 as f64 - 1.0).abs();
            self.errors.1 += 1;
        }
        // of iterations that were not foreseen, or take no time by the model, nothing is learned
        if k > forecast.steps() || lo <= 0.0 {
            return;
        }
        // a batch ran for some time, even if the clock says it did not
        let seconds = time.0.max(1) as f64 / 1e6;
        if self.seen >= SETTLE {
            self.residuals[at].lo.push(seconds / (lo * self.correction));
            self.residuals[at].hi.push(seconds / (hi * self.correction));
        }
        self.correct((seconds / f64::midpoint(lo, hi) / self.correction).ln());
    }

    /// So many rows ran so many decode steps, and so many of them ended before their limit.
    pub fn observe_ends(&mut self, row_steps: u64, ended: u64) {
        self.ends.observe(row_steps, ended);
    }

    /// How well the bands have done since the worker came.
    pub fn calibrated(&self) -> Calibrated {
        Calibrated {
            buckets: self.coverage,
            error: if self.errors.1 > 0 { self.errors.0 / self.errors.1 as f64 } else { 0.0 },
            correction: self.correction,
            hazard: self.hazard(),
        }
    }

    /// Moves the correction towards a batch that was off by a factor of `exp(off)`: at first to the mean of what was seen
    /// (a measured model counts as one batch that was right), then by a fixed part, so that it forgets.
    fn correct(&mut self, off: f64) {
        self.seen = self.seen.saturating_add(1);
        let gain = (1.0 / f64::from(self.seen.saturating_add(u32::from(self.announced)))).max(CORRECTION_GAIN);
        // a single batch that hung is an outlier, no new speed
        let most = std::f64::consts::LN_2;
        let off = if self.seen > SETTLE { off.clamp(-most, most) } else { off };
        let trust = if self.announced { TRUST_MEASURED } else { TRUST_UNKNOWN };
        self.correction = (self.correction * (gain * off).exp()).clamp(1.0 / trust, trust);
    }

    /// What the lower and upper forecast of a bucket are multiplied by. While it has few residuals: the widest of what
    /// it has seen and of what the other buckets say; before these do, a margin.
    fn edges(&self, at: usize) -> [f64; 2] {
        let margin = if self.announced { TRUST_MEASURED } else { START_UNKNOWN };
        let edges = |of: fn(&Window) -> Option<[f64; 2]>, residuals: &Residuals| {
            Some([of(&residuals.lo)?[0], of(&residuals.hi)?[1]])
        };
        if let Some(own) = edges(Window::edges, &self.residuals[at]) {
            return own;
        }
        let wider = |a: [f64; 2], b: [f64; 2]| [a[0].min(b[0]), a[1].max(b[1])];
        let others = self.residuals.iter().filter_map(|residuals| edges(Window::edges, residuals)).reduce(wider);
        let seen = edges(Window::extremes, &self.residuals[at]).unwrap_or([1.0; 2]);
        wider(seen, others.unwrap_or([1.0 / margin, margin]))
    }
}

/// The bucket of `k` iterations.
fn bucket(k: u32) -> usize {
    BUCKETS.iter().position(|most| k <= *most).unwrap_or(BUCKETS.len() - 1)
}
