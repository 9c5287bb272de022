//! How long an iteration takes on a worker, as a function of what is in it: linear, with coefficients that are never
//! negative, so that more work never takes less time.
//!
//! Two forms. A *padded* worker computes a rectangle: `N` rows of the longest row's length `L` (arXiv 2406.13511, section
//! on the serving-time estimator: prefill and decode step are both `a*N*L + b*N + c*L + d`). A *paged* worker computes
//! what is there: decode rows, the tokens they see, prefill tokens, and the pairs these attend (derived: replace `N*L` by
//! the sums).

use serde::{Deserialize, Serialize};

use super::json::RawModel;
use crate::units::{Micros, Tokens};

/// How a worker lays a batch out, and so what its time and memory depend on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// One rectangle: every row as long as the longest, none leaves before the batch ends, no KV outlives it.
    Padded,
    /// Rows in blocks: each costs what it has, rows leave, KV stays.
    #[default]
    Paged,
}

/// Seconds of a pass over `N` rows padded to length `L`: `constant + per_row*N + per_position*L + per_cell*N*L`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct PaddedCost {
    /// A pass.
    pub constant: f64,
    /// Each row.
    pub per_row: f64,
    /// Each position of the longest row.
    pub per_position: f64,
    /// Each cell of the rectangle.
    pub per_cell: f64,
}

/// Seconds that prefill adds to an iteration of a paged worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct PagedPrefill {
    /// Any prefill at all.
    pub constant: f64,
    /// Each prefilled token.
    pub per_token: f64,
    /// Each pair of a prefilled token and one it attends.
    pub per_pair: f64,
}

/// Seconds of an iteration of a paged worker without its prefill.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct PagedStep {
    /// An iteration.
    pub constant: f64,
    /// Each row that decodes.
    pub per_row: f64,
    /// Each token that a decoding row sees.
    pub per_context: f64,
}

/// What work costs on a worker. Every coefficient is finite and not negative: see [`CostModel::check`]; one that was read
/// as JSON has been checked.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "layout", rename_all = "lowercase", try_from = "RawModel")]
pub enum CostModel {
    /// A worker that pads.
    Padded {
        /// The pass over the prompts; it draws each row's first token.
        prefill: PaddedCost,
        /// A decode step at length `L`.
        step: PaddedCost,
    },
    /// A worker that packs.
    Paged {
        /// Prefill chunks that ride in an iteration.
        prefill: PagedPrefill,
        /// The iteration itself.
        step: PagedStep,
    },
}

/// What one iteration computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Iteration {
    /// Rows that decode; padded: all rows, in prefill too.
    pub rows: u64,
    /// Tokens that the decoding rows see, summed.
    pub context: u64,
    /// Length of the longest row. Only padded workers pay for it.
    pub longest: u64,
    /// Prefill tokens; padded: anything but 0 makes this the prefill pass.
    pub prefill: u64,
    /// Pairs of a prefilled token and one it attends, itself among these: [`Iteration::chunk`] counts them.
    pub pairs: u64,
}

/// A batch as the closed form sees it, at its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchLoad {
    /// Rows.
    pub rows: u64,
    /// Tokens of the longest row.
    pub longest: Tokens,
    /// Tokens of all rows.
    pub context: Tokens,
    /// Of these, tokens that want prefill (of a row that only decodes: none).
    pub uncached: Tokens,
}

/// A model that no worker can have.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{name} is {value}\ncoefficients of a cost model are seconds, finite and not negative, each less than a day")]
pub struct CostError {
    /// The coefficient, as `step.per_row`.
    pub name: &'static str,
    /// What it is.
    pub value: f64,
}

/// A day, in seconds. No coefficient is as long, so that no sum of theirs overflows, whatever it is taken of.
const DAY: f64 = 86_400.0;

impl Iteration {
    /// Adds the prefill of the next `tokens` tokens of a row of which `before` are computed.
    pub fn chunk(&mut self, tokens: Tokens, before: Tokens) {
        let (new, had) = (u128::from(tokens.0), u128::from(before.0));
        // the i-th new token attends those before it and itself
        let pairs = (new * had).saturating_add(new * (new + 1) / 2);
        self.prefill = self.prefill.saturating_add(tokens.0);
        self.pairs = self.pairs.saturating_add(u64::try_from(pairs).unwrap_or(u64::MAX));
    }
}

impl PaddedCost {
    pub(super) fn at(&self, rows: f64, length: f64) -> f64 {
        self.constant + self.per_row * rows + self.per_position * length + self.per_cell * rows * length
    }
}

impl CostModel {
    /// Before anything is known: the order of a small model on a CPU. Only ratios matter until reports come.
    pub const fn unknown(layout: Layout) -> Self {
        match layout {
            Layout::Padded => {
                let step = PaddedCost { constant: 3e-3, per_row: 5e-5, per_position: 0.0, per_cell: 1e-6 };
                let prefill = PaddedCost { constant: 3e-3, per_row: 0.0, per_position: 0.0, per_cell: 1e-4 };
                Self::Padded { prefill, step }
            }
            Layout::Paged => {
                let prefill = PagedPrefill { constant: 0.0, per_token: 1e-4, per_pair: 0.0 };
                let step = PagedStep { constant: 3e-3, per_row: 5e-5, per_context: 1e-6 };
                Self::Paged { prefill, step }
            }
        }
    }

    /// Its form.
    pub const fn layout(&self) -> Layout {
        match self {
            Self::Padded { .. } => Layout::Padded,
            Self::Paged { .. } => Layout::Paged,
        }
    }

    /// The first coefficient that cannot be.
    pub fn check(&self) -> Result<(), CostError> {
        let pairs = match self {
            Self::Padded { prefill: p, step: s } => vec![
                ("prefill.constant", p.constant),
                ("prefill.per_row", p.per_row),
                ("prefill.per_position", p.per_position),
                ("prefill.per_cell", p.per_cell),
                ("step.constant", s.constant),
                ("step.per_row", s.per_row),
                ("step.per_position", s.per_position),
                ("step.per_cell", s.per_cell),
            ],
            Self::Paged { prefill: p, step: s } => vec![
                ("prefill.constant", p.constant),
                ("prefill.per_token", p.per_token),
                ("prefill.per_pair", p.per_pair),
                ("step.constant", s.constant),
                ("step.per_row", s.per_row),
                ("step.per_context", s.per_context),
            ],
        };
        match pairs.into_iter().find(|(_, value)| !(0.0..DAY).contains(value)) {
            None => Ok(()),
            Some((name, value)) => Err(CostError { name, value }),
        }
    }

    /// Seconds of one iteration.
    pub fn iteration(&self, it: &Iteration) -> f64 {
        match self {
            Self::Padded { prefill, step } => {
                let pass = if it.prefill > 0 { prefill } else { step };
                pass.at(it.rows as f64, it.longest as f64)
            }
            Self::Paged { prefill, step } => {
                let base = step.constant + step.per_row * it.rows as f64 + step.per_context * it.context as f64;
                if it.prefill == 0 {
                    return base;
                }
                base + prefill.constant + prefill.per_token * it.prefill as f64 + prefill.per_pair * it.pairs as f64
            }
        }
    }

    /// Seconds of a batch over `steps` iterations if no row ends, the first of which draws each row's first token. O(1):
    /// sums over the iterations in closed form (derived from arXiv 2406.13511's estimator).
    ///
    /// Exact for a padded worker, and for a paged one whose rows all decode, or are all prefilled whole and of one length.
    /// Else, paged:
    /// - Rows that differ: `pairs` are those of the mean row, too few by `n * var(length) / 2`.
    /// - Rows that decode beside rows that prefill: how many are which is taken from their tokens, so up to one step's
    ///   `per_row` a row is off, and that row's cached part is counted in `per_context` once.
    /// - A prefill that takes `c` iterations for its chunks: `c - 1` times `prefill.constant` is missing, and up to `c - 1`
    ///   steps of the rows that prefill are too many. [`Estimator::forecast`](super::Estimator::forecast) walks the chunks.
    pub fn slice(&self, load: &BatchLoad, steps: u64) -> f64 {
        if load.rows == 0 || steps == 0 {
            return 0.0;
        }
        let (n, s) = (load.rows as f64, steps as f64);
        // sum of 1..s: what a row has grown by in all steps after the first iteration
        let ramp = s * (s - 1.0) / 2.0;
        match self {
            Self::Padded { prefill, step } => {
                let l = load.longest.0 as f64;
                prefill.at(n, l)
                    + (s - 1.0) * (step.constant + step.per_row * n)
                    + (step.per_position + step.per_cell * n) * ((s - 1.0) * l + ramp)
            }
            Self::Paged { prefill, step } => {
                let context = load.context.0 as f64;
                let u = load.uncached.min(load.context).0 as f64;
                // a row that prefills in the first iteration decodes in none but the others
                let (fill, part) = if u > 0.0 {
                    // each uncached token attends itself and about its row's tokens before it
                    let seen = context / n - u / n / 2.0 + 0.5;
                    (prefill.constant + prefill.per_token * u + prefill.per_pair * u * seen, u / context)
                } else {
                    (0.0, 0.0)
                };
                fill + s * step.constant
                    + step.per_row * n * (s - part)
                    + step.per_context * (s * context - u + n * ramp)
            }
        }
    }

    /// Seconds to prefill `tokens` alone in a row that has `before` tokens computed.
    pub fn prefill(&self, tokens: Tokens, before: Tokens) -> f64 {
        let (u, had) = (tokens.0 as f64, before.0 as f64);
        match self {
            _ if tokens == Tokens::ZERO => 0.0,
            Self::Padded { prefill, .. } => prefill.at(1.0, u + had),
            Self::Paged { prefill, .. } => {
                prefill.constant + prefill.per_token * u + prefill.per_pair * u * (had + f64::midpoint(u, 1.0))
            }
        }
    }

    /// Seconds that one row more, of `tokens` tokens, adds to `steps` decode iterations.
    pub fn marginal(&self, tokens: Tokens, steps: u64) -> f64 {
        let (l, s) = (tokens.0 as f64, steps as f64);
        let seen = s * l + s * (s - 1.0) / 2.0;
        match self {
            Self::Padded { step, .. } => step.per_row * s + step.per_cell * seen,
            Self::Paged { step, .. } => step.per_row * s + step.per_context * seen,
        }
    }
}

/// Seconds as whole microseconds; what is no time is none.
pub fn micros(seconds: f64) -> Micros {
    // a cast saturates: no NaN, no overflow
    Micros((seconds * 1e6).round() as u64)
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn padded() -> impl Strategy<Value = CostModel> {
        let pass = || {
            prop::array::uniform4(prop_oneof![Just(0.0), 1e-7..1e-2]).prop_map(
                |[constant, per_row, per_position, per_cell]| PaddedCost { constant, per_row, per_position, per_cell },
            )
        };
        (pass(), pass()).prop_map(|(prefill, step)| CostModel::Padded { prefill, step })
    }

    pub(crate) fn paged() -> impl Strategy<Value = CostModel> {
        prop::array::uniform6(prop_oneof![Just(0.0), 1e-7..1e-2]).prop_map(|[a, b, c, d, e, f]| CostModel::Paged {
            prefill: PagedPrefill { constant: a, per_token: b, per_pair: c },
            step: PagedStep { constant: d, per_row: e, per_context: f },
        })
    }

    pub(crate) fn coefficients(model: &CostModel) -> Vec<f64> {
        match model {
            CostModel::Padded { prefill: p, step: s } => {
                [p, s].iter().flat_map(|c| [c.constant, c.per_row, c.per_position, c.per_cell]).collect()
            }
            CostModel::Paged { prefill: p, step: s } => {
                vec![p.constant, p.per_token, p.per_pair, s.constant, s.per_row, s.per_context]
            }
        }
    }

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-9 * (a.abs() + b.abs()) + 1e-12
    }

    /// Step by step, each row by itself: all prefilled whole in the first iteration, or all decoding.
    fn summed(model: &CostModel, lengths: &[u64], fresh: bool, steps: u64) -> f64 {
        let n = lengths.len() as u64;
        (0..steps)
            .map(|k| {
                let longest = lengths.iter().max().copied().unwrap_or(0) + k;
                let mut it = Iteration { longest, ..Iteration::default() };
                if fresh && k == 0 {
                    for l in lengths {
                        it.chunk(Tokens(*l), Tokens(0));
                    }
                    it.rows = if model.layout() == Layout::Padded { n } else { 0 };
                } else {
                    it.rows = n;
                    it.context = lengths.iter().map(|l| l + k).sum();
                }
                model.iteration(&it)
            })
            .sum()
    }

    fn load(lengths: &[u64], fresh: bool) -> BatchLoad {
        let context = Tokens(lengths.iter().sum());
        BatchLoad {
            rows: lengths.len() as u64,
            longest: Tokens(lengths.iter().max().copied().unwrap_or(0)),
            context,
            uncached: if fresh { context } else { Tokens::ZERO },
        }
    }

    fn lengths() -> impl Strategy<Value = Vec<u64>> {
        prop::collection::vec(1u64..3000, 1..20)
    }

    proptest! {
        #[test]
        fn slice_of_a_rectangle_is_the_sum_of_its_iterations(m in padded(), rows in lengths(), steps in 1u64..200) {
            let (sum, closed) = (summed(&m, &rows, true, steps), m.slice(&load(&rows, true), steps));
            prop_assert!(close(sum, closed), "{sum} {closed}");
        }

        #[test]
        fn slice_of_decoding_rows_is_the_sum_of_its_iterations(m in paged(), rows in lengths(), steps in 1u64..200) {
            let (sum, closed) = (summed(&m, &rows, false, steps), m.slice(&load(&rows, false), steps));
            prop_assert!(close(sum, closed), "{sum} {closed}");
        }

        #[test]
        fn slice_of_equal_prompts_is_the_sum_of_its_iterations(
            m in paged(), n in 1usize..20, l in 1u64..3000, steps in 1u64..200,
        ) {
            let rows = vec![l; n];
            let (sum, closed) = (summed(&m, &rows, true, steps), m.slice(&load(&rows, true), steps));
            prop_assert!(close(sum, closed), "{sum} {closed}");
        }

        #[test]
        fn slice_of_unequal_prompts_lacks_the_pairs_of_their_variance(m in paged(), rows in lengths(), steps in 1u64..200) {
            let (n, mean) = (rows.len() as f64, rows.iter().sum::<u64>() as f64 / rows.len() as f64);
            let spread: f64 = rows.iter().map(|l| (*l as f64 - mean).powi(2)).sum::<f64>() / n;
            let CostModel::Paged { prefill, .. } = m else { unreachable!("paged") };
            let sum = summed(&m, &rows, true, steps);
            let closed = m.slice(&load(&rows, true), steps) + prefill.per_pair * n * spread / 2.0;
            prop_assert!(close(sum, closed), "{sum} {closed}");
        }

        #[test]
        fn more_work_takes_no_less(
            m in prop_oneof![padded(), paged()],
            it in prop::array::uniform5(0u64..5000),
            more in prop::array::uniform5(0u64..5000),
        ) {
            let make = |[rows, context, longest, prefill, pairs]: [u64; 5]| Iteration { rows, context, longest, prefill, pairs };
            let mut larger = it;
            larger.iter_mut().zip(more).for_each(|(a, b)| *a += b);
            // whether a padded pass is over prompts is no amount
            larger[3] = if m.layout() == Layout::Padded { it[3] } else { larger[3] };
            prop_assert!(m.iteration(&make(larger)) >= m.iteration(&make(it)));
        }

        #[test]
        fn a_slice_of_more_rows_tokens_or_steps_takes_no_less(
            m in prop_oneof![padded(), paged()], rows in lengths(), more in 0u64..500, steps in 1u64..100, fresh: bool,
        ) {
            let base = m.slice(&load(&rows, fresh), steps);
            prop_assert!(m.slice(&load(&rows, fresh), steps + 1) >= base);
            let longer: Vec<u64> = rows.iter().map(|l| l + more).collect();
            prop_assert!(m.slice(&load(&longer, fresh), steps) >= base * (1.0 - 1e-12));
        }

        #[test]
        fn no_size_gives_anything_but_a_time(
            c in prop::array::uniform4(prop_oneof![Just(0.0), Just(1e-300), Just(86_399.0), 0.0..1.0]),
            sizes in prop::array::uniform4(prop_oneof![Just(0), Just(1), Just(u64::MAX), any::<u64>()]),
            steps in prop_oneof![Just(0), Just(1), Just(u64::MAX), any::<u64>()],
        ) {
            let [constant, per_row, per_position, per_cell] = c;
            let pass = PaddedCost { constant, per_row, per_position, per_cell };
            let [constant, per_token, per_pair, per_context] = c;
            let models = [
                CostModel::Padded { prefill: pass, step: pass },
                CostModel::Paged {
                    prefill: PagedPrefill { constant, per_token, per_pair },
                    step: PagedStep { constant, per_row, per_context },
                },
            ];
            let [rows, longest, context, uncached] = sizes;
            let batch = BatchLoad { rows, longest: Tokens(longest), context: Tokens(context), uncached: Tokens(uncached) };
            let mut it = Iteration { rows, context, longest, ..Iteration::default() };
            it.chunk(Tokens(uncached), Tokens(context));
            for m in models {
                prop_assert_eq!(m.check(), Ok(()));
                let times = [
                    m.slice(&batch, steps), m.iteration(&it), m.prefill(Tokens(uncached), Tokens(context)), m.marginal(Tokens(context), steps),
                ];
                prop_assert!(times.iter().all(|t| t.is_finite() && *t >= 0.0), "{:?}", times);
            }
        }
    }

    #[test]
    fn a_model_that_cannot_be_names_its_coefficient() {
        for bad in [-1e-9, f64::NAN, f64::INFINITY, 86_400.0, 1e300] {
            let mut model = CostModel::unknown(Layout::Paged);
            if let CostModel::Paged { step, .. } = &mut model {
                step.per_context = bad;
            }
            assert_eq!(model.check().map_err(|e| e.name), Err("step.per_context"), "{bad}");
        }
        assert_eq!(CostModel::unknown(Layout::Padded).check(), Ok(()));
    }

    #[test]
    fn no_time_is_none() {
        assert_eq!(micros(f64::NAN), Micros::ZERO);
        assert_eq!(micros(-1.0), Micros::ZERO);
        assert_eq!(micros(f64::INFINITY), Micros(u64::MAX));
        assert_eq!(micros(1.5e-6), Micros(2));
    }
}
