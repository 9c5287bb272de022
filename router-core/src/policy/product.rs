//! The product: new prefill tokens if routed there, times the batch size there. No weights: as factors they would
//! cancel in the comparison, and there is no place where one could stand.
//!
//! `(Q + u) * (b + 1) = u*b + Q*(b + 1) + u`: the prefill this row brings stalls `b` rows that run beside it, and the
//! row itself waits for `Q + u`. So the score is the harm done, in row-tokens (arXiv 2603.15202, section 4; the
//! sum form is derived here).
//!
//! `u >= 1`, because an engine computes at least the last token: an empty or fully hit worker is never an absorbing
//! zero. It misleads where few workers hold a prefix that most requests share; those cases are for the hotspot guard.

use super::{Policy, PolicyName, View};
use crate::units::Tokens;

/// `(Q + u) * (b + 1)`.
pub struct Product;

impl Policy for Product {
    fn name(&self) -> PolicyName {
        PolicyName::Product
    }

    fn score(&self, view: View<'_>, at: usize) -> u128 {
        let c = &view.candidates[at];
        let prefill = u128::from(c.queued.0) + u128::from(c.new_tokens.0.max(1));
        prefill.saturating_mul(u128::from(c.batch_size) + 1)
    }
}

/// `(Q + u) * (b + 1) * (1 + lambda * c_p * u)`: the product, and what this prefill costs those who are not here yet.
///
/// A prefill of `u` new tokens takes `c_p * u` seconds, in which `lambda * c_p * u` requests more arrive at that worker
/// and wait as the row itself does. So what the row waits for counts once for itself and once for each of them, as the
/// factor `b + 1` counts those who run. Near saturation, where `Q` drowns the difference of hits, it keeps sessions where
/// their prefixes are; with nobody to come it is the product, and it never prefers one of two workers with equal `u`
/// that the product does not. [derived; the form and its figures: simulation study]
///
/// `lambda` and `c_p` are measured ([`super::Anticipation`]), not set.
pub struct ProductAnticipating;

impl Policy for ProductAnticipating {
    fn name(&self) -> PolicyName {
        PolicyName::ProductAnticipating
    }

    fn score(&self, view: View<'_>, at: usize) -> u128 {
        let factor = view.anticipation.factor(Tokens(view.candidates[at].new_tokens.0.max(1)));
        Product.score(view, at).saturating_mul(factor)
    }
}

/// The product in seconds, for slice workers: `(c_p*(Q + u) + S*tau(b + 1)) * (b + 1)`, the time of one slice there with
/// this row in it, times the rows that wait for it.
///
/// The factor `b + 1` is what keeps it robust: without it a worker whose cost model is too kind by 30 % draws everything.
/// [simulation study: mean latency 9 to 23 % below least requests on heavy-tailed lengths]
pub struct ProductTime;

impl Policy for ProductTime {
    fn name(&self) -> PolicyName {
        PolicyName::ProductTime
    }

    fn score(&self, view: View<'_>, at: usize) -> u128 {
        let c = &view.candidates[at];
        u128::from(c.joined.0.max(1)).saturating_mul(u128::from(c.batch_size) + 1)
    }
}
