//! Which worker a row goes to. A policy sees an immutable view of the candidates and gives each a score; the smallest
//! wins. It holds no index and no network, and the same view gives the same answer everywhere.

mod baseline;
mod product;

use std::cmp::Reverse;
use std::fmt;
use std::str::FromStr;

pub use baseline::{LeastRequests, Random, RoundRobin};
pub use product::{Product, ProductAnticipating, ProductTime};

pub use crate::anticipation::Anticipation;
use crate::ids::WorkerId;
use crate::name::nearest;
use crate::units::{Blocks, Micros, Tokens};

/// A worker that could take the row, as the router sees it at the decision.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Candidate {
    /// The worker.
    pub worker: WorkerId,
    /// `u`: tokens it would have to prefill for this row, at least 1.
    pub new_tokens: Tokens,
    /// `Q`: prefill tokens assigned to it and not computed yet.
    pub queued: Tokens,
    /// `b`: rows assigned to it and not finished.
    pub batch_size: u64,
    /// `W`: committed work.
    pub work: Micros,
    /// Time of one slice there with this row in it, queued prefill and its own included; zero where the policy does not
    /// ask for it.
    pub joined: Micros,
    /// Blocks that the running batch cannot need.
    pub free: Blocks,
    /// The hotspot guard keeps the row from it, whatever its score.
    pub filtered: bool,
}

/// What a policy sees.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// At least one candidate, in order of worker.
    pub candidates: &'a [Candidate],
    /// Decisions made before this one: rotates ties and turns.
    pub turn: u64,
    /// What is expected of the requests to come.
    pub anticipation: Anticipation,
}

/// Gives each candidate a score; the smallest wins.
pub trait Policy: Send {
    /// Its name on the command line and in records.
    fn name(&self) -> PolicyName;
    /// The score of `view.candidates[at]`.
    fn score(&self, view: View<'_>, at: usize) -> u128;
}

/// The index of the winner by this policy; `scores` are those of all candidates afterwards. `None` without candidates.
pub fn choose(policy: &dyn Policy, view: View<'_>, scores: &mut Vec<u128>) -> Option<usize> {
    scores.clear();
    scores.extend((0..view.candidates.len()).map(|at| policy.score(view, at)));
    least(view, scores)
}

/// The index of the winner by these scores, of those that are not filtered: least score, then least work, then most free
/// blocks, then the first from a start that rotates with the turn (a fixed start would pile ties up on the first worker).
pub fn least(view: View<'_>, scores: &[u128]) -> Option<usize> {
    let n = view.candidates.len().min(scores.len());
    let start = view.turn.checked_rem(n as u64)? as usize;
    // of equals the first is kept
    (start..n).chain(0..start).filter(|&at| !view.candidates[at].filtered).min_by_key(|&at| {
        let c = &view.candidates[at];
        (scores[at], c.work, Reverse(c.free))
    })
}

/// Place of `at` when counting starts at `turn`.
fn from_turn(view: View<'_>, turn: u64, at: usize) -> u64 {
    let n = view.candidates.len() as u64;
    (at as u64 + n - turn % n) % n
}

/// The policies of the core by name.
///
/// The default is the best of those without knobs over all traces and loads of `bench/figures/e2_routing.py` (TTFT, TPOT and
/// latency), and on slice workers as well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PolicyName {
    /// `(Q + u) * (b + 1)`.
    Product,
    /// `(Q + u) * (b + 1) * (1 + lambda * c_p * u)`.
    #[default]
    ProductAnticipating,
    /// The product in seconds.
    ProductTime,
    /// In turn.
    RoundRobin,
    /// Uniform.
    Random,
    /// Least `b`.
    LeastRequests,
}

impl PolicyName {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Product,
        Self::ProductAnticipating,
        Self::ProductTime,
        Self::RoundRobin,
        Self::Random,
        Self::LeastRequests,
    ];

    /// The policy; `seed` is used by `random` alone.
    pub fn policy(self, seed: u64) -> Box<dyn Policy> {
        match self {
            Self::Product => Box::new(Product),
            Self::ProductAnticipating => Box::new(ProductAnticipating),
            Self::ProductTime => Box::new(ProductTime),
            Self::RoundRobin => Box::new(RoundRobin),
            Self::Random => Box::new(Random { seed }),
            Self::LeastRequests => Box::new(LeastRequests),
        }
    }

    /// The name as written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Product => "product",
            Self::ProductAnticipating => "product_anticipating",
            Self::ProductTime => "product_time",
            Self::RoundRobin => "round_robin",
            Self::Random => "random",
            Self::LeastRequests => "least_requests",
        }
    }
}

impl fmt::Display for PolicyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// There is no policy of this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no such policy: {0}\n{hint}", hint = self.hint())]
pub struct UnknownPolicy(String);

impl UnknownPolicy {
    /// The policy it may have been meant to be, and all there are.
    fn hint(&self) -> String {
        let names = PolicyName::ALL.map(PolicyName::as_str);
        let meant = nearest(&self.0, names).map_or_else(String::new, |name| format!("did you mean {name}? "));
        format!("{meant}policies: {}", names.join(", "))
    }
}

impl FromStr for PolicyName {
    type Err = UnknownPolicy;

    fn from_str(name: &str) -> Result<Self, UnknownPolicy> {
        Self::ALL.into_iter().find(|p| p.as_str() == name).ok_or_else(|| UnknownPolicy(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::block::new_tokens;
    use crate::units::BlockSize;

    fn candidate(worker: u32, new: u64, queued: u64, batch: u64) -> Candidate {
        Candidate {
            worker: WorkerId(worker),
            new_tokens: Tokens(new),
            queued: Tokens(queued),
            batch_size: batch,
            ..Candidate::default()
        }
    }

    fn view(candidates: &[Candidate], turn: u64) -> View<'_> {
        View { candidates, turn, anticipation: Anticipation::default() }
    }

    fn winner(name: PolicyName, candidates: &[Candidate], turn: u64) -> usize {
        choose(&*name.policy(9), view(candidates, turn), &mut Vec::new()).expect("candidates")
    }

    /// (new, queued, batch) of each candidate, and who wins under each policy at turn 0.
    #[test]
    fn one_table_for_all() {
        type Rows = &'static [(u64, u64, u64)];
        let table: &[(Rows, usize, usize)] = &[
            // a hit wins while the batch grows by less than the hit saves: 10 * 5 < 100 * 1 ...
            (&[(10, 0, 4), (100, 0, 0)], 0, 1),
            // ... ties at 10 * 10 = 100 * 1 (first from the turn) and loses past it
            (&[(10, 0, 9), (100, 0, 0)], 0, 1),
            (&[(10, 0, 10), (100, 0, 0)], 1, 1),
            // a queue damps the hit
            (&[(10, 200, 0), (100, 0, 0)], 1, 0),
            (&[(1, 0, 0), (1, 0, 0), (1, 0, 0)], 0, 0),
        ];
        for (rows, product, least) in table {
            let candidates: Vec<_> =
                rows.iter().enumerate().map(|(w, &(n, q, b))| candidate(w as u32, n, q, b)).collect();
            assert_eq!(winner(PolicyName::Product, &candidates, 0), *product, "{rows:?}");
            assert_eq!(winner(PolicyName::LeastRequests, &candidates, 0), *least, "{rows:?}");
        }
    }

    #[test]
    fn property_2_all_equal_rotates_and_random_reaches_all() {
        let candidates: Vec<_> = (0..4).map(|w| candidate(w, 5, 0, 0)).collect();
        for name in PolicyName::ALL.into_iter().filter(|name| *name != PolicyName::Random) {
            let turns: Vec<_> = (0..8).map(|turn| winner(name, &candidates, turn)).collect();
            assert_eq!(turns, [0, 1, 2, 3, 0, 1, 2, 3], "{name}");
        }
        let mut counts = [0; 4];
        (0..4000).for_each(|turn| counts[winner(PolicyName::Random, &candidates, turn)] += 1);
        assert!(counts.iter().all(|c| (850..1150).contains(c)), "{counts:?}");
    }

    #[test]
    fn seconds_count_what_tokens_do_not() {
        // as many new tokens and rows, but one worker's rows see long contexts: its slice takes longer
        let mut slow = candidate(0, 10, 0, 4);
        slow.joined = Micros(300_000);
        let mut quick = candidate(1, 40, 0, 4);
        quick.joined = Micros(200_000);
        assert_eq!(winner(PolicyName::Product, &[slow, quick], 0), 0);
        assert_eq!(winner(PolicyName::ProductTime, &[slow, quick], 0), 1);
        // and rows that would wait for it count as in the product
        quick.batch_size = 9;
        assert_eq!(winner(PolicyName::ProductTime, &[slow, quick], 0), 0);
    }

    #[test]
    fn extremes_do_not_overflow() {
        let worst = candidate(0, u64::MAX, u64::MAX, u64::MAX);
        assert_eq!(winner(PolicyName::Product, &[worst, candidate(1, 1, 0, 0)], 0), 1);
    }

    #[test]
    fn names_parse_back() {
        for name in PolicyName::ALL {
            assert_eq!(name.as_str().parse(), Ok(name));
        }
        let refused = |name: &str| name.parse::<PolicyName>().expect_err("a typo").to_string();
        assert!(refused("prodcut").contains("did you mean product?"));
        assert!(refused("product-anticipating").contains("did you mean product_anticipating?"));
        assert!(refused("least_request").contains("did you mean least_requests?"));
        assert!(!refused("sticky").contains("did you mean"), "nothing is like it");
    }

    proptest! {
        /// Weights of the product cancel: no scale of P and no scale of (b+1) changes a choice.
        #[test]
        fn property_1_scale_invariance(
            rows in proptest::collection::vec((1u64..5000, 0u64..5000, 0u64..300), 1..20),
            tokens in 1u64..1000, turn in 0u64..50,
        ) {
            let build = |tokens: u64| -> Vec<_> {
                rows.iter().enumerate()
                    .map(|(w, &(n, q, b))| candidate(w as u32, n * tokens, q * tokens, b)).collect()
            };
            prop_assert_eq!(winner(PolicyName::Product, &build(1), turn), winner(PolicyName::Product, &build(tokens), turn));
            let scaled: Vec<_> = rows.iter().enumerate()
                .map(|(w, &(n, q, b))| candidate(w as u32, n, q, (b + 1) * tokens - 1)).collect();
            prop_assert_eq!(winner(PolicyName::Product, &build(1), turn), winner(PolicyName::Product, &scaled, turn));
        }

        /// The worker with the hit wins exactly while `(b_i + 1) / (b_j + 1) < (Q_j + L) / (Q_i + u)`; at equality it is the
        /// turn's.
        #[test]
        fn property_3_threshold_exact_both_sides(
            len in 1u64..100_000, hit in 0.0f64..1.0, queued in (0u64..50_000, 0u64..50_000), other in 0u64..500,
            at in 0u32..2,
        ) {
            let new = ((len as f64 * (1.0 - hit)) as u64).max(1);
            let cold = candidate(1 - at, len, queued.1, other);
            let chosen = |batch: u64, turn: u64| {
                let mut both = [cold; 2];
                both[at as usize] = candidate(at, new, queued.0, batch);
                winner(PolicyName::Product, &both, turn)
            };
            let (own, rival) = (queued.0 + new, (queued.1 + len) * (other + 1));
            // batch sizes, itself included, up to which the hit wins, and at which they are even
            let (most, even) = ((rival - 1) / own, rival.is_multiple_of(own));
            if most > 0 {
                prop_assert_eq!([chosen(most - 1, 0), chosen(most - 1, 1)], [at as usize; 2]);
            }
            let past = [chosen(most, 0), chosen(most, 1)];
            prop_assert_eq!(past, if even { [0, 1] } else { [1 - at as usize; 2] });
        }

        /// An engine computes at least the last token, so nothing is ever free.
        #[test]
        fn property_12_u_and_p_are_at_least_one(
            len in 0u64..5000, hit in 0usize..500, size in 1u32..64, queued in 0u64..3, batch in 0u64..3,
            expected in (0.0f64..100.0, 0.0f64..1.0),
        ) {
            let size = BlockSize::new(size).expect("not zero");
            let new = new_tokens(Tokens(len), hit, size);
            prop_assert!(new >= Tokens(1) && new <= Tokens(len.max(1)));
            // not even for one who says otherwise
            for new in [new.0, 0] {
                let candidates = [candidate(0, new, queued, batch)];
                let view = View { anticipation: Anticipation::new(expected.0, expected.1), ..view(&candidates, 0) };
                for name in [PolicyName::Product, PolicyName::ProductAnticipating, PolicyName::ProductTime] {
                    prop_assert!(name.policy(0).score(view, 0) >= 1);
                }
            }
        }

        /// With nobody to come, or prefills that take no time, it is the product; and of workers with equal `u` it never
        /// prefers another than the product does.
        #[test]
        fn anticipating_is_the_product_where_there_is_nothing_to_anticipate(
            rows in proptest::collection::vec((1u64..5000, 0u64..5000, 0u64..300), 1..20), same in 1u64..5000,
            arrivals in 0.0f64..1000.0, prefill in 0.0f64..0.1, turn in 0u64..50,
        ) {
            let build = |new: Option<u64>| -> Vec<_> {
                (0..).zip(&rows).map(|(w, &(u, q, b))| candidate(w, new.unwrap_or(u), q, b)).collect()
            };
            let both = |candidates: &[Candidate], anticipation| {
                let view = View { anticipation, ..view(candidates, turn) };
                let (mut product, mut anticipating) = (Vec::new(), Vec::new());
                let at = [choose(&Product, view, &mut product), choose(&ProductAnticipating, view, &mut anticipating)];
                (at[0] == at[1], product, anticipating)
            };
            for nothing in [Anticipation::new(0.0, prefill), Anticipation::new(arrivals, 0.0)] {
                let (agree, product, anticipating) = both(&build(None), nothing);
                prop_assert!(agree);
                prop_assert_eq!(product.iter().map(|score| score << 32).collect::<Vec<_>>(), anticipating);
            }
            let (agree, ..) = both(&build(Some(same)), Anticipation::new(arrivals, prefill));
            prop_assert!(agree, "equal u");
            // what it adds is as it says, but for what fixed point cannot hold
            let all = build(None);
            let (_, product, anticipating) = both(&all, Anticipation::new(arrivals, prefill));
            for ((product, anticipating), candidate) in product.iter().zip(anticipating).zip(&all) {
                let factor = 1.0 + arrivals * prefill * candidate.new_tokens.0 as f64;
                let found = anticipating as f64 / *product as f64 / 2f64.powi(32);
                prop_assert!((found / factor - 1.0).abs() < 1e-3 || arrivals < 1e-3, "{found} {factor}");
            }
        }
    }
}
