//! How long an iteration takes on a worker, as a function of what is in it: linear, with coefficients that are never
//! negative, so that more work never takes less time.
//!
//! Two forms. A *padded* worker computes a rectangle: `N` rows of the longest row's length `L` (arXiv 2406.13511, section
//! on the serving-time estimator: prefill and decode step are both `a*N*L + b*N + c*L + d`). A *paged* worker computes
//! what is there: decode rows, the tokens they see, prefill tokens, and the pairs these attend (derived: replace `N*L` by
//! the sums).

use crate::units::{Micros, Tokens};

/// How a worker lays a batch out, and so what its time and memory depend on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layout {
    /// One rectangle: every row as long as the longest, none leaves before the batch ends, no KV outlives it.
    Padded,
    /// Rows in blocks: each costs what it has, rows leave, KV stays.
    #[default]
    Paged,
}

/// Seconds of a pass over `N` rows padded to length `L`: `constant + per_row*N + per_position*L + per_cell*N*L`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
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
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PagedPrefill {
    /// Any prefill at all.
    pub constant: f64,
    /// Each prefilled token.
    pub per_token: f64,
    /// Each pair of a prefilled token and one it attends.
    pub per_pair: f64,
}

/// Seconds of an iteration of a paged worker without its prefill.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PagedStep {
    /// An iteration.
    pub constant: f64,
    /// Each row that decodes.
    pub per_row: f64,
    /// Each token that a decoding row sees.
    pub per_context: f64,
}

/// What work costs on a worker. Every coefficient is finite and not negative: see [`CostModel::check`].
#[derive(Clone, Copy, Debug, PartialEq)]
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
    /// Pairs of a prefilled token and one it attends.
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
#[error("{name} is {value}\ncoefficients of a cost model are seconds, finite and not negative")]
pub struct CostError {
    name: &'static str,
    value: f64,
}

impl PaddedCost {
    fn at(&self, rows: f64, length: f64) -> f64 {
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
        match pairs.into_iter().find(|(_, value)| !value.is_finite() || *value < 0.0) {
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
    pub fn slice(&self, load: &BatchLoad, steps: u64) -> f64 {
        if load.rows == 0 || steps == 0 {
            return 0.0;
        }
        let (n, s) = (load.rows as f64, steps as f64);
        // sum over k of 0..s and of 1..s-1
        let ramp = s * (s - 1.0) / 2.0;
        match self {
            Self::Padded { prefill, step } => {
                let l = load.longest.0 as f64;
                prefill.at(n, l)
                    + (s - 1.0) * (step.constant + step.per_row * n)
                    + (step.per_position + step.per_cell * n) * ((s - 1.0) * l + ramp)
            }
            Self::Paged { prefill, step } => {
                let (u, context) = (load.uncached.0 as f64, load.context.0 as f64);
                let fill = if load.uncached == Tokens::ZERO {
                    0.0
                } else {
                    // each uncached token attends about its row's tokens before it
                    prefill.constant + prefill.per_token * u + prefill.per_pair * u * (context / n - u / n / 2.0)
                };
                fill + s * (step.constant + step.per_row * n) + step.per_context * (s * context + n * ramp)
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
                prefill.constant + prefill.per_token * u + prefill.per_pair * u * (had + u / 2.0)
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
