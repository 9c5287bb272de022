//! A cost model from measured iterations: least squares of relative errors over coefficients that are not negative.
//!
//! Each sample is divided by its time, so a step of 3 ms counts as much as a prefill of 3 s. There are at most six
//! unknowns, so the active set (the coefficients that are zero) is found by trying all: exact, and the same everywhere.

use serde::{Deserialize, Serialize};

use super::json::RawSample;
use super::model::{CostModel, Iteration, Layout, PaddedCost, PagedPrefill, PagedStep};
use crate::record::Work;

/// One measured iteration.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "RawSample", into = "RawSample")]
pub struct Sample {
    /// What was computed.
    pub iteration: Iteration,
    /// How long it took.
    pub seconds: f64,
}

/// A fitted model and how well it does on what it was fitted to.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fit {
    /// The model.
    pub model: CostModel,
    /// Part of the variance of seconds that it explains.
    pub r2: f64,
    /// Mean of `|model / measured - 1|`.
    pub mean_error: f64,
    /// 99 of 100 samples have at most this error.
    pub p99_error: f64,
}

/// Samples that nothing can be fitted to.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum FitError {
    /// Fewer than coefficients.
    #[error("{have} samples of {part}, and a fit takes {need} or more")]
    TooFew {
        /// Iterations with prefill, or without.
        part: &'static str,
        /// Samples there are.
        have: usize,
        /// Samples it takes.
        need: usize,
    },
    /// A time that is none.
    #[error("sample {at} took {seconds} s\nmeasured times are finite and more than zero")]
    NoTime {
        /// Its place, from 0.
        at: usize,
        /// Its time.
        seconds: f64,
    },
    /// The samples say that a coefficient is a day or more.
    #[error(transparent)]
    Impossible(#[from] super::CostError),
}

impl Sample {
    /// Its time is one.
    pub(super) fn is_time(&self) -> bool {
        self.seconds.is_finite() && self.seconds > 0.0
    }
}

impl Fit {
    /// Fits a model of this layout. Padded: passes over prompts and steps each for themselves; paged: all together.
    /// What the samples cannot tell apart (all had as many rows, say) is shared between its coefficients.
    pub fn new(layout: Layout, samples: &[Sample]) -> Result<Self, FitError> {
        if let Some(at) = samples.iter().position(|sample| !sample.is_time()) {
            return Err(FitError::NoTime { at, seconds: samples[at].seconds });
        }
        let (fills, steps): (Vec<Sample>, Vec<Sample>) = samples.iter().partition(|s| s.iteration.prefill > 0);
        let need = if layout == Layout::Padded { 4 } else { 3 };
        for (part, have) in [("prefill", fills.len()), ("steps without prefill", steps.len())] {
            if have < need {
                return Err(FitError::TooFew { part, have, need });
            }
        }
        let model = match layout {
            Layout::Padded => {
                let pass = |samples: &[Sample]| {
                    let columns = samples.iter().map(|sample| {
                        let (rows, length) = (sample.iteration.rows as f64, sample.iteration.longest as f64);
                        ([1.0, rows, length, rows * length], sample.seconds)
                    });
                    let [constant, per_row, per_position, per_cell] = solve(&columns.collect::<Vec<_>>());
                    PaddedCost { constant, per_row, per_position, per_cell }
                };
                CostModel::Padded { prefill: pass(&fills), step: pass(&steps) }
            }
            Layout::Paged => {
                let columns = samples.iter().map(|sample| {
                    let it = &sample.iteration;
                    let fill = if it.prefill > 0 { [1.0, it.prefill as f64, it.pairs as f64] } else { [0.0; 3] };
                    ([1.0, it.rows as f64, it.context as f64, fill[0], fill[1], fill[2]], sample.seconds)
                });
                paged(solve(&columns.collect::<Vec<_>>()))
            }
        };
        model.check()?;
        Ok(Self::judge(model, samples))
    }

    /// The model of a paged worker from whole batches that it served: what each computed, in how many iterations, and their
    /// seconds. What a worker takes among others on its machine shows only there. A tenth of the batches, those that the
    /// first fit misses most, are left out of the second: a machine stalls now and then.
    pub fn of_batches(batches: &[(Work, u32, f64)]) -> Result<CostModel, FitError> {
        if let Some(at) = batches.iter().position(|(.., seconds)| !(seconds.is_finite() && *seconds > 0.0)) {
            return Err(FitError::NoTime { at, seconds: batches[at].2 });
        }
        if batches.len() < 12 {
            return Err(FitError::TooFew { part: "batches", have: batches.len(), need: 12 });
        }
        let mut columns: Vec<_> = batches
            .iter()
            .map(|(work, steps, seconds)| {
                let step = [f64::from(*steps), work.decoded as f64, work.context.0 as f64];
                let fill = [f64::from(work.fills), work.prefill.0 as f64, work.pairs as f64];
                ([step[0], step[1], step[2], fill[0], fill[1], fill[2]], *seconds)
            })
            .collect();
        let first = solve(&columns);
        let miss = |(columns, seconds): &([f64; 6], f64)| {
            (columns.iter().zip(first).map(|(value, x)| value * x).sum::<f64>() / seconds - 1.0).abs()
        };
        columns.sort_by(|a, b| miss(a).total_cmp(&miss(b)));
        columns.truncate(columns.len() - columns.len() / 10);
        let model = paged(solve(&columns));
        model.check()?;
        Ok(model)
    }

    /// How well a model does on samples, whose times are times.
    fn judge(model: CostModel, samples: &[Sample]) -> Self {
        let count = samples.len() as f64;
        let mean = samples.iter().map(|s| s.seconds).sum::<f64>() / count;
        let [mut rest, mut variance] = [0.0; 2];
        let mut errors: Vec<f64> = Vec::with_capacity(samples.len());
        for sample in samples {
            let foreseen = model.iteration(&sample.iteration);
            rest += (foreseen - sample.seconds).powi(2);
            variance += (sample.seconds - mean).powi(2);
            errors.push((foreseen / sample.seconds - 1.0).abs());
        }
        errors.sort_by(f64::total_cmp);
        let p99 = (errors.len() * 99).div_ceil(100).saturating_sub(1);
        // equal times have no variance to explain: all of it or nothing
        let rounding = count * (mean * 1e-9).powi(2);
        let r2 = if variance > rounding { 1.0 - rest / variance } else { f64::from(u8::from(rest <= rounding)) };
        let bounded = |x: f64| if x.is_finite() { x } else { f64::MAX.copysign(x) };
        Self {
            model,
            r2: bounded(r2),
            mean_error: bounded(errors.iter().sum::<f64>() / count),
            p99_error: errors.get(p99).copied().map_or(0.0, bounded),
        }
    }
}

/// Part of a column's square that is added to the diagonal. It makes the answer unique where columns depend on one
/// another (then it is the shortest), and moves one that is determined by a part in a billion.
const RIDGE: f64 = 1e-13;

fn paged([constant, per_row, per_context, any, per_token, per_pair]: [f64; 6]) -> CostModel {
    CostModel::Paged {
        prefill: PagedPrefill { constant: any, per_token, per_pair },
        step: PagedStep { constant, per_row, per_context },
    }
}

/// The `x >= 0` that makes the sum over samples of `(columns * x / seconds - 1)^2` least.
fn solve<const N: usize>(samples: &[([f64; N], f64)]) -> [f64; N] {
    let weighed = || samples.iter().map(|(columns, seconds)| columns.map(|value| value / seconds));
    // columns differ by many orders (a row, its context, its pairs): each is scaled to length 1
    let mut scale = [0.0; N];
    for row in weighed() {
        scale.iter_mut().zip(row).for_each(|(scale, value): (&mut f64, f64)| *scale = scale.hypot(value));
    }
    let mut gram = [[0.0; N]; N];
    let mut right = [0.0; N];
    for mut row in weighed() {
        row.iter_mut().zip(scale).for_each(|(value, scale)| *value = if scale > 0.0 { *value / scale } else { 0.0 });
        for i in 0..N {
            right[i] += row[i];
            (0..=i).for_each(|j| gram[i][j] += row[i] * row[j]);
        }
    }
    (0..N).for_each(|i| gram[i][i] += RIDGE);

    let mut best = [0.0; N];
    let mut gain = 0.0;
    for set in 1u32..1 << N {
        // a column of zeros tells nothing of its coefficient
        let active = std::array::from_fn(|i| set >> i & 1 == 1 && scale[i] > 0.0);
        let Some(x) = cholesky(&gram, &right, active) else { continue };
        // at a set's optimum the squares have shrunk by right * x
        let shrunk: f64 = x.iter().zip(right).map(|(x, right)| x * right).sum();
        if x.iter().all(|x| *x >= 0.0) && shrunk > gain {
            (best, gain) = (x, shrunk);
        }
    }
    std::array::from_fn(|i| if scale[i] > 0.0 { best[i] / scale[i] } else { 0.0 })
}

/// Solves the equations of the active columns; the other coefficients are zero. `None` where rounding has made the
/// matrix no square of another.
fn cholesky<const N: usize>(gram: &[[f64; N]; N], right: &[f64; N], active: [bool; N]) -> Option<[f64; N]> {
    let mut low = [[0.0; N]; N];
    let mut x = [0.0; N];
    let on = || (0..N).filter(|i| active[*i]);
    for i in on() {
        for j in on().take_while(|j| *j <= i) {
            let rest = gram[i][j] - on().take_while(|k| *k < j).map(|k| low[i][k] * low[j][k]).sum::<f64>();
            low[i][j] = match i == j {
                true if rest <= 0.0 => return None,
                true => rest.sqrt(),
                false => rest / low[j][j],
            };
        }
        x[i] = (right[i] - on().take_while(|k| *k < i).map(|k| low[i][k] * x[k]).sum::<f64>()) / low[i][i];
    }
    for i in (0..N).rev().filter(|i| active[*i]) {
        x[i] = (x[i] - on().filter(|k| *k > i).map(|k| low[k][i] * x[k]).sum::<f64>()) / low[i][i];
    }
    Some(x)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cost::model::tests::{coefficients, padded, paged};
    use crate::units::Tokens;

    /// Iterations as a worker would measure them.
    fn grid(layout: Layout) -> impl Strategy<Value = Vec<Iteration>> {
        let one =
            (1u64..64, 1u64..2048, 0u64..2, 1u64..512, 0u64..1500).prop_map(move |(rows, each, fills, new, had)| {
                let mut it = Iteration { rows, context: rows * each, longest: each, ..Iteration::default() };
                if fills == 1 && layout == Layout::Padded {
                    it.prefill = rows * each;
                } else if fills == 1 {
                    it.chunk(Tokens(new), Tokens(had));
                }
                it
            });
        prop::collection::vec(one, 60..120)
    }

    fn measured(model: &CostModel, grid: &[Iteration], noise: impl Fn(usize) -> f64) -> Vec<Sample> {
        let sample =
            |(at, it): (usize, &Iteration)| Sample { iteration: *it, seconds: model.iteration(it) * noise(at) };
        grid.iter().enumerate().map(sample).collect()
    }

    fn any_model() -> impl Strategy<Value = (CostModel, Vec<Iteration>)> {
        prop_oneof![(padded(), grid(Layout::Padded)), (paged(), grid(Layout::Paged)),]
    }

    /// Deterministic noise of about `+-width`.
    fn wobble(at: usize, width: f64) -> f64 {
        1.0 + width * ((at as f64 * 12.9898).sin() * 43_758.545_3).fract()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn without_noise_the_model_is_found((model, grid) in any_model()) {
            let samples = measured(&model, &grid, |_| 1.0);
            prop_assume!(samples.iter().all(Sample::is_time));
            let fit = Fit::new(model.layout(), &samples);
            prop_assume!(!matches!(fit, Err(FitError::TooFew { .. })));
            let fit = fit.expect("enough good samples");
            prop_assert!(fit.p99_error < 1e-4 && fit.mean_error < 1e-5, "{fit:?}");
            prop_assert!(fit.r2 > 1.0 - 1e-6, "{fit:?}");
        }

        #[test]
        fn a_plausible_model_is_found_coefficient_by_coefficient(
            c in prop::array::uniform6(0.5f64..2.0), grid in grid(Layout::Paged),
        ) {
            let model = CostModel::Paged {
                prefill: PagedPrefill { constant: 1e-3 * c[0], per_token: 1e-4 * c[1], per_pair: 1e-7 * c[2] },
                step: PagedStep { constant: 5e-3 * c[3], per_row: 1e-4 * c[4], per_context: 1e-6 * c[5] },
            };
            let fit = Fit::new(Layout::Paged, &measured(&model, &grid, |_| 1.0)).expect("enough good samples");
            for (found, truth) in coefficients(&fit.model).iter().zip(coefficients(&model)) {
                prop_assert!((found / truth - 1.0).abs() < 1e-5, "{found} {truth}");
            }
        }

        #[test]
        fn under_noise_no_coefficient_is_negative_and_the_optimum_is_one((model, grid) in any_model(), width in 0.0..0.9) {
            let samples = measured(&model, &grid, |at| wobble(at, width));
            prop_assume!(samples.iter().all(Sample::is_time));
            let fit = Fit::new(model.layout(), &samples);
            prop_assume!(!matches!(fit, Err(FitError::TooFew { .. })));
            let fit = fit.expect("enough good samples");
            prop_assert_eq!(fit.model.check(), Ok(()));
            // no better than what it was asked to find: neither the truth nor any coefficient a bit larger or smaller
            let squares = |m: &CostModel| samples.iter().map(|s| (m.iteration(&s.iteration) / s.seconds - 1.0).powi(2)).sum::<f64>();
            let least = squares(&fit.model);
            prop_assert!(least <= squares(&model) + 1e-6);
            for nudge in [0.99, 1.01] {
                for at in 0..coefficients(&fit.model).len() {
                    let mut moved = fit.model;
                    *coefficient(&mut moved, at) *= nudge;
                    prop_assert!(least <= squares(&moved) + 1e-6, "{at} {nudge}");
                    *coefficient(&mut moved, at) += 1e-9;
                    prop_assert!(least <= squares(&moved) + 1e-6, "{at} {nudge}");
                }
            }
        }
    }

    fn coefficient(model: &mut CostModel, at: usize) -> &mut f64 {
        match model {
            CostModel::Padded { prefill, step } => {
                let pass = if at < 4 { prefill } else { step };
                [&mut pass.constant, &mut pass.per_row, &mut pass.per_position, &mut pass.per_cell]
                    .into_iter()
                    .nth(at % 4)
            }
            CostModel::Paged { prefill: p, step: s } => [
                &mut p.constant,
                &mut p.per_token,
                &mut p.per_pair,
                &mut s.constant,
                &mut s.per_row,
                &mut s.per_context,
            ]
            .into_iter()
            .nth(at),
        }
        .expect("a coefficient")
    }

    fn step(rows: u64, context: u64, seconds: f64) -> Sample {
        Sample { iteration: Iteration { rows, context, ..Iteration::default() }, seconds }
    }

    fn fill(tokens: u64, seconds: f64) -> Sample {
        let mut iteration = Iteration::default();
        iteration.chunk(Tokens(tokens), Tokens(0));
        Sample { iteration, seconds }
    }

    #[test]
    fn what_cannot_be_told_apart_is_shared() {
        // always four rows of 100 tokens, always 64 tokens of prefill
        let samples = [step(4, 400, 0.01), step(4, 400, 0.01), step(4, 400, 0.01)];
        let fills = [fill(64, 0.02), fill(64, 0.02), fill(64, 0.02)];
        let fit = Fit::new(Layout::Paged, &[samples, fills].concat()).expect("enough");
        assert!(fit.p99_error < 1e-6, "{fit:?}");
        let CostModel::Paged { step, .. } = fit.model else { unreachable!("paged") };
        assert!(step.constant > 0.0 && step.per_row > 0.0 && step.per_context > 0.0, "{fit:?}");
        // twice the rows and context are then neither free nor twice the time
        let more = fit.model.iteration(&Iteration { rows: 8, context: 800, ..Iteration::default() });
        assert!(more > 0.011 && more < 0.019, "{more}");
    }

    #[test]
    fn errors_say_what_is_wrong() {
        let good = [step(1, 10, 0.01), step(2, 30, 0.02), step(3, 50, 0.03), fill(8, 0.1), fill(16, 0.2), fill(9, 0.1)];
        assert!(Fit::new(Layout::Paged, &good).is_ok());
        let need = FitError::TooFew { part: "prefill", have: 2, need: 3 };
        assert_eq!(Fit::new(Layout::Paged, &good[..5]), Err(need));
        assert!(matches!(Fit::new(Layout::Padded, &good), Err(FitError::TooFew { need: 4, .. })));
        assert!(matches!(Fit::new(Layout::Paged, &[]), Err(FitError::TooFew { have: 0, .. })));
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let mut samples = good;
            samples[4].seconds = bad;
            assert!(matches!(Fit::new(Layout::Paged, &samples), Err(FitError::NoTime { at: 4, .. })), "{bad}");
        }
        let days = good.map(|sample| Sample { seconds: sample.seconds * 1e9, ..sample });
        assert!(matches!(Fit::new(Layout::Paged, &days), Err(FitError::Impossible(_))));
    }
}
