//! What a worker's batches take: its model, corrected by its reports, and the band that a batch's time falls into.
//!
//! A batch is walked through its iterations ([`super::walk`]) as if many rows ended early, and as if few did. Both times
//! are multiplied by the worker's correction, and then each by the quantile of its own residuals that leaves out what the
//! band may miss. So a model that is off, noise, and rows that end otherwise than foreseen all show in the residuals, and
//! nothing of them has to be known.

use super::model::{CostModel, Layout, micros};
use super::walk::walk;
use super::window::Window;
use crate::constants::{
    BAND_SLACK, BUCKETS, CORRECTION_GAIN, FIRST_OUTPUT, MEMORY, SETTLE, START_UNKNOWN, TRUST_MEASURED, TRUST_UNKNOWN,
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
    /// Cumulative seconds of the model after `k + 1` iterations: if many rows end early, if as many do as is usual, if few.
    spans: Vec<[f64; 3]>,
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

    /// Model seconds of `k` iterations and their bucket; beyond those foreseen, of all. `None` for no iterations.
    fn at(&self, k: u32) -> Option<([f64; 3], usize)> {
        let k = k.min(self.steps());
        let spans = self.spans.get(k.checked_sub(1)? as usize)?;
        Some((*spans, BUCKETS.iter().position(|most| k <= *most)?))
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

    /// The band for `k` iterations; beyond those foreseen, that of the last. More iterations have no earlier band. It is as
    /// the estimator is now: what is said of a batch at its start and at its end agrees if no other was observed between.
    pub fn band(&self, forecast: &Forecast, k: u32) -> Band {
        let Some(([lo, _, hi], own)) = forecast.at(k) else { return Band::default() };
        let [low, high] = self.edges(own);
        let (mut lo, mut hi) = (lo * low, hi * high);
        // The margin of few iterations is wider than that of many: where a bucket begins, a band must not end sooner than
        // before it, nor begin later than after it.
        for (at, last) in BUCKETS.iter().enumerate() {
            if at < own {
                hi = forecast.at(*last).map_or(hi, |([.., most], _)| hi.max(most * self.edges(at)[1]));
            } else if forecast.steps() > *last {
                lo = forecast.at(last + 1).map_or(lo, |([least, ..], _)| lo.min(least * self.edges(at + 1)[0]));
            }
        }
        // rounded away from the band's middle, so that its edges are in it
        let lo = (lo * self.correction * 1e6 * (1.0 - BAND_SLACK)).floor() as u64;
        let hi = (hi * self.correction * 1e6 * (1.0 + BAND_SLACK)).ceil() as u64;
        Band { lo: Micros(lo.min(hi)), hi: Micros(hi) }
    }

    /// The time `k` iterations are expected to take: between what both forecasts are by their median residual.
    pub fn expected(&self, forecast: &Forecast, k: u32) -> Micros {
        let Some(([lo, mean, hi], at)) = forecast.at(k) else { return Micros::ZERO };
        let residuals = &self.residuals[at];
        let seconds = match (residuals.lo.median(), residuals.hi.median()) {
            (Some(low), Some(high)) => f64::midpoint(lo * low, hi * high),
            _ => mean,
        };
        self.time(seconds)
    }

    /// A batch took `time` for its `k` iterations. Scores the band it had, then learns.
    pub fn observe(&mut self, forecast: &Forecast, k: u32, time: Micros) {
        let Some(([lo, mean, hi], at)) = forecast.at(k) else { return };
        self.coverage[at].score(self.band(forecast, k).contains(time));
        let expected = self.expected(forecast, k);
        if expected > Micros::ZERO {
            // a clock that jumped would be all of the mean
            self.errors.0 += (time.0 as f64 / expected.0 as f64 - 1.0).abs().min(10.0);
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
        self.correct((seconds / mean / self.correction).ln());
    }

    /// What the time of many iterations is multiplied by to be no less, and no more, than it turns out: the edges that
    /// bands of long batches have, whatever the model is off by.
    pub fn reach(&self) -> [f64; 2] {
        self.edges(BUCKETS.len() - 1)
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

    /// What the lower and upper forecast of a bucket are multiplied by. While it has too few residuals for quantiles: the
    /// widest of what it has seen, of what a normal distribution makes of it (without noise residuals are anything but
    /// normal), and of what the other buckets say; before these do, a margin.
    fn edges(&self, at: usize) -> [f64; 2] {
        let margin = if self.announced { TRUST_MEASURED } else { START_UNKNOWN };
        let edges = |of: fn(&Window) -> Option<[f64; 2]>, residuals: &Residuals| {
            Some([of(&residuals.lo)?[0], of(&residuals.hi)?[1]])
        };
        let own = &self.residuals[at];
        if own.lo.has_quantiles()
            && let Some(own) = edges(Window::edges, own)
        {
            return own;
        }
        let wider = |a: [f64; 2], b: [f64; 2]| [a[0].min(b[0]), a[1].max(b[1])];
        // its own are among them, where there are enough
        let others = self.residuals.iter().filter_map(|residuals| edges(Window::edges, residuals)).reduce(wider);
        let seen = edges(Window::extremes, &self.residuals[at]).unwrap_or([1.0; 2]);
        wider(seen, others.unwrap_or([1.0 / margin, margin]))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cost::model::tests::{padded, paged};

    fn rows(count: u64) -> Vec<RowLoad> {
        let row = |i| RowLoad { tokens: Tokens(100 + i), uncomputed: Tokens(1), left: Tokens(500), budget: Tokens(0) };
        (0..count).map(row).collect()
    }

    /// As a worker of this model that is `slow` times as slow, and exact.
    fn exact(forecast: &Forecast, k: u32, slow: f64) -> Micros {
        let ([_, mean, _], _) = forecast.at(k).expect("foreseen");
        micros(mean * slow)
    }

    #[test]
    fn a_measured_model_is_believed_within_a_factor_of_two_before_any_report() {
        let model = CostModel::unknown(Layout::Paged);
        let estimator = Estimator::new(Some(model), Layout::Paged);
        let forecast = estimator.forecast(&rows(8), Tokens(512), 32);
        let band = estimator.band(&forecast, 32);
        let expected = estimator.expected(&forecast, 32);
        assert!(band.contains(Micros(expected.0 * 19 / 10)) && band.contains(Micros(expected.0 * 6 / 10)), "{band:?}");
        assert!(!band.contains(Micros(expected.0 * 22 / 10)), "{band:?}");
        let unknown = Estimator::new(None, Layout::Paged);
        assert!(unknown.band(&forecast, 32).contains(Micros(expected.0 * 9)));
    }

    #[test]
    fn reports_correct_the_model_and_narrow_the_band() {
        for (model, slow, correction) in [
            (Some(CostModel::unknown(Layout::Paged)), 1.4, 1.4),
            (Some(CostModel::unknown(Layout::Paged)), 0.7, 0.7),
            // no further than a measured model may be off; the residuals know the rest
            (Some(CostModel::unknown(Layout::Paged)), 5.0, 2.0),
            (None, 70.0, 70.0),
            (None, 0.02, 0.02),
        ] {
            let mut estimator = Estimator::new(model, Layout::Paged);
            for at in 0..200 {
                let forecast = estimator.forecast(&rows(1 + at % 30), Tokens(512), 32);
                let time = exact(&forecast, 32, slow);
                estimator.observe(&forecast, 32, time);
            }
            assert!((estimator.correction() / correction - 1.0).abs() < 0.02, "{slow}: {}", estimator.correction());
            let forecast = estimator.forecast(&rows(20), Tokens(512), 32);
            let time = exact(&forecast, 32, slow);
            let band = estimator.band(&forecast, 32);
            assert!(band.contains(time), "{slow}: {band:?} {time}");
            assert!(((band.hi.0 - band.lo.0) as f64) < 0.2 * time.0 as f64, "{slow}: {band:?}");
            let expected = estimator.expected(&forecast, 32).0 as f64 / time.0 as f64;
            assert!((expected - 1.0).abs() < 0.05, "{slow}: {expected}");
        }
    }

    #[test]
    fn beyond_what_was_foreseen_it_is_the_last() {
        let estimator = Estimator::new(None, Layout::Paged);
        let mut short = rows(3);
        for row in &mut short {
            row.left = Tokens(2);
        }
        let forecast = estimator.forecast(&short, Tokens(512), 32);
        assert_eq!(forecast.steps(), 2);
        assert_eq!(estimator.band(&forecast, 30), estimator.band(&forecast, 2));
        assert_eq!(estimator.expected(&forecast, 30), estimator.expected(&forecast, 2));
        let mut other = estimator.clone();
        other.observe(&forecast, 30, Micros(1));
        assert!((other.correction() - 1.0).abs() < f64::EPSILON, "nothing is learned of them");
    }

    #[test]
    fn hazard_follows_what_ends() {
        let mut estimator = Estimator::new(None, Layout::Paged);
        assert!((estimator.hazard() - 1.0 / 256.0).abs() < 1e-12);
        (0..1000).for_each(|_| estimator.observe_ends(500, 10));
        assert!((estimator.hazard() / 0.02 - 1.0).abs() < 0.01, "{}", estimator.hazard());
        (0..1000).for_each(|_| estimator.observe_ends(1000, 1));
        assert!((estimator.hazard() / 0.001 - 1.0).abs() < 0.2, "{}", estimator.hazard());
        // rows that never end, and reports that cannot be
        (0..1000).for_each(|_| estimator.observe_ends(u64::MAX, 0));
        assert!(estimator.hazard() >= 0.0 && estimator.hazard() < 1e-9);
        (0..10).for_each(|_| estimator.observe_ends(0, u64::MAX));
        (0..10).for_each(|_| estimator.observe_ends(3, u64::MAX));
        assert!((0.0..=1.0).contains(&estimator.hazard()));
    }

    #[test]
    fn a_model_that_cannot_be_is_no_model() {
        let mut bad = CostModel::unknown(Layout::Paged);
        if let CostModel::Paged { step, .. } = &mut bad {
            step.constant = f64::NAN;
        }
        let estimator = Estimator::new(Some(bad), Layout::Paged);
        assert_eq!(estimator.model(), &CostModel::unknown(Layout::Paged));
    }

    #[test]
    fn every_slice_is_scored_in_its_bucket() {
        let mut estimator = Estimator::new(Some(CostModel::unknown(Layout::Paged)), Layout::Paged);
        let forecast = estimator.forecast(&rows(4), Tokens(512), 32);
        for k in 1..=32 {
            let time = estimator.expected(&forecast, k);
            estimator.observe(&forecast, k, time);
        }
        estimator.observe(&forecast, 1, Micros(u64::MAX));
        let calibrated = estimator.calibrated();
        assert_eq!(calibrated.buckets.map(|c| c.scored), [2, 3, 12, 16]);
        assert_eq!(calibrated.buckets.map(|c| c.covered), [1, 3, 12, 16]);
        assert_eq!(calibrated.all(), Coverage { scored: 33, covered: 32 });
    }

    proptest! {
        #[test]
        fn whatever_is_reported_bands_are_bands(
            model in prop_oneof![padded().prop_map(Some), paged().prop_map(Some), Just(None)],
            reports in prop::collection::vec(
                (0u64..5, prop_oneof![Just(0u32), 1u32..40, Just(u32::MAX)], prop_oneof![Just(0), Just(u64::MAX), 1u64..1_000_000]),
                0..80,
            ),
        ) {
            let layout = model.map_or(Layout::Paged, |m| m.layout());
            let mut estimator = Estimator::new(model, layout);
            let forecast = estimator.forecast(&rows(6), Tokens(64), 32);
            for (count, k, time) in reports {
                let other = estimator.forecast(&rows(count), Tokens(64), 32);
                estimator.observe(&other, k, Micros(time));
                estimator.observe_ends(time, u64::from(k));
                let mut before = Band::default();
                for k in 1..=33 {
                    let band = estimator.band(&forecast, k);
                    prop_assert!(band.lo <= band.hi);
                    prop_assert!(band.lo >= before.lo && band.hi >= before.hi, "{k} {band:?} {before:?}");
                    before = band;
                }
                prop_assert_eq!(estimator.band(&forecast, 0), Band::default());
                prop_assert_eq!(estimator.band(&forecast, u32::MAX), estimator.band(&forecast, 32));
                let most = if model.is_some() { 2.0 } else { 1e3 };
                prop_assert!((1.0 / most..=most).contains(&estimator.correction()));
                let calibrated = estimator.calibrated();
                prop_assert!(calibrated.error.is_finite() && (0.0..=1.0).contains(&calibrated.hazard));
            }
        }
    }
}
