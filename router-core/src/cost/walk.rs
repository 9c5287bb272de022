//! A batch walked through its iterations before it runs: what each takes as rows are prefilled, decode and leave at their
//! limits, and how much less since some end before.

use super::estimator::RowLoad;
use super::model::{CostModel, PaddedCost, PagedPrefill, PagedStep};
use crate::constants::{DEVIATIONS, MOST_FORESEEN, MOST_LOST};
use crate::units::Tokens;

/// Cumulative seconds after each of at most `steps` iterations if many rows end before their limit, if they end at their
/// mean rate, and if few do. Shorter if all rows are at their limit before. `hazard` is the part of drawn tokens that end
/// their row.
pub(super) fn walk(model: &CostModel, rows: &[RowLoad], chunk: Tokens, steps: u32, hazard: f64) -> Vec<[f64; 3]> {
    let steps = steps.min(MOST_FORESEEN) as usize;
    match model {
        CostModel::Padded { prefill, step } => rectangle(prefill, step, rows, steps),
        CostModel::Paged { prefill, step } => packed(prefill, step, rows, chunk, steps, hazard),
    }
}

/// One pass over the prompts, then steps of the same rows, each a position longer. Nobody leaves, so there is nothing
/// that could make it shorter but an end of all.
fn rectangle(prefill: &PaddedCost, step: &PaddedCost, rows: &[RowLoad], steps: usize) -> Vec<[f64; 3]> {
    let rows = || rows.iter().filter(|row| row.left > Tokens::ZERO);
    let n = rows().count() as f64;
    let longest = rows().map(|row| row.tokens.0.max(1)).max().unwrap_or(0) as f64;
    let most = rows().map(|row| row.left.0).max().unwrap_or(0);
    let mut sum = 0.0;
    (0..steps.min(usize::try_from(most).unwrap_or(usize::MAX)))
        .map(|k| {
            let pass = if k == 0 { prefill } else { step };
            sum += pass.at(n, longest + k as f64);
            [sum; 3]
        })
        .collect()
}

/// A row that wants prefill.
#[derive(Clone, Copy)]
struct Filling {
    want: u64,
    before: u64,
    left: u64,
    budget: u64,
}

/// What the rows that decode cost: seconds of each one's first step, summed, and their squares.
#[derive(Default)]
struct Parts {
    sum: f64,
    squares: f64,
}

impl Parts {
    fn add(&mut self, step: &PagedStep, tokens: u64) {
        let one = step.per_row + step.per_context * tokens as f64;
        self.sum += one;
        self.squares += one * one;
    }

    /// How far the part of their time that is lost by ends may be from its mean. A row that ends loses, at any time of the
    /// batch alike, a part of mean 1/2 and mean square 1/3: where `lost` of all is lost, the variance of a row's part is
    /// about 2/3 `lost` (1 - `lost`).
    fn reach(&self, lost: f64) -> f64 {
        DEVIATIONS * (2.0 / 3.0 * lost * (1.0 - lost) * self.squares).sqrt() / self.sum
    }
}

/// Rows share the chunk in order; one decodes in the iterations after the one that drew its first token.
///
/// What a row may prefill beside decoding rows is walked as if one of these were left: should all end early, its chunks
/// grow, and the batch takes longer than foreseen. The residuals know how often that happens.
fn packed(
    prefill: &PagedPrefill,
    step: &PagedStep,
    rows: &[RowLoad],
    chunk: Tokens,
    steps: usize,
    hazard: f64,
) -> Vec<[f64; 3]> {
    // Before an iteration is walked, its place says how many rows are at their limit by then and what they would see.
    let mut spans = vec![[0.0; 3]; steps];
    let leaves = |spans: &mut [[f64; 3]], at: u64, tokens: u64| {
        if let Some([gone, seen, _]) = usize::try_from(at).ok().and_then(|at| spans.get_mut(at)) {
            *gone += 1.0;
            *seen += tokens as f64;
        }
    };
    let mut parts = Parts::default();
    let (mut decoding, mut context) = (0.0, 0.0);
    // The first in order is the last here: those that are done are cut off without a move of the others.
    let mut filling: Vec<Filling> = Vec::new();
    for row in rows.iter().rev().filter(|row| row.left > Tokens::ZERO) {
        let tokens = row.tokens.0.max(1);
        let want = row.uncomputed.0.clamp(1, tokens);
        if want > 1 {
            filling.push(Filling { want, before: tokens - want, left: row.left.0, budget: row.budget.0 });
            continue;
        }
        decoding += 1.0;
        context += tokens as f64;
        parts.add(step, tokens);
        leaves(&mut spans, row.left.0, tokens.saturating_add(row.left.0));
    }

    // of the `decoding` rows, those that are left if rows end at their mean rate
    let mut alive = decoding;
    // seconds if no row ends; of these, those that depend on the rows that decode; and of these, what is left
    let [mut full, mut theirs, mut lived] = [0.0; 3];
    let [mut least, mut most] = [0.0_f64; 2];
    for k in 0..steps {
        let [gone, seen, _] = spans[k];
        alive *= if decoding > gone { 1.0 - gone / decoding } else { 0.0 };
        decoding -= gone;
        // numbers too large for their last digits may not add up to nothing
        context = if decoding > 0.0 { (context - seen).max(0.0) } else { 0.0 };
        if decoding <= 0.0 && filling.is_empty() {
            spans.truncate(k);
            break;
        }

        let mut room = chunk.0.max(1);
        let (mut filled, mut pairs, mut joined, mut brought) = (0.0, 0.0, 0.0, 0.0);
        let mut at = filling.len();
        while at > 0 && room > 0 {
            at -= 1;
            let row = &mut filling[at];
            let limit = if row.budget > 0 && decoding > 0.0 { row.budget } else { u64::MAX };
            let take = row.want.min(room).min(limit);
            filled += take as f64;
            pairs += take as f64 * (row.before as f64 + f64::midpoint(take as f64, 1.0));
            row.want -= take;
            row.before += take;
            room -= take;
            if row.want == 0 {
                joined += 1.0;
                brought += row.before as f64 + 1.0;
                parts.add(step, row.before);
                // it has drawn one: with no more left it is gone before the next iteration
                leaves(&mut spans, (k as u64).saturating_add(row.left), row.before.saturating_add(row.left));
            }
        }
        let mut kept = at;
        for i in at..filling.len() {
            if filling[i].want > 0 {
                filling[kept] = filling[i];
                kept += 1;
            }
        }
        filling.truncate(kept);

        let part = step.per_row * decoding + step.per_context * context;
        full += step.constant + part;
        if filled > 0.0 {
            full += prefill.constant + prefill.per_token * filled + prefill.per_pair * pairs;
        }
        theirs += part;
        lived += if decoding > 0.0 { part * alive / decoding } else { 0.0 };
        let (mut lost, mut reach) = (0.0, 0.0);
        if hazard > 0.0 && theirs > 0.0 {
            lost = (1.0 - lived / theirs).clamp(0.0, MOST_LOST);
            reach = parts.reach(lost);
        }
        // more iterations take no less, however the ends are
        least = least.max(full - theirs * (lost + reach).min(MOST_LOST));
        most = most.max(full - theirs * (lost - reach).max(0.0));
        spans[k] = [least, full - theirs * lost, most];

        context += decoding + brought;
        decoding += joined;
        alive = (alive + joined) * (1.0 - hazard);
    }
    spans
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cost::model::tests::{padded, paged};
    use crate::cost::{BatchLoad, Iteration, Layout};

    /// Every row by itself, every iteration by the model: what the walk has to equal if no row leaves early.
    fn naive(model: &CostModel, rows: &[RowLoad], chunk: u64, steps: u32) -> Vec<f64> {
        // with each, whether it wants prefill
        let mut rows: Vec<(RowLoad, bool)> = rows.iter().map(|row| (*row, row.uncomputed.0 > 1)).collect();
        let padded = model.layout() == Layout::Padded;
        let mut spans = Vec::new();
        let mut sum = 0.0;
        for k in 0..steps {
            if rows.iter().all(|(row, _)| row.left.0 == 0) {
                break;
            }
            let mut it = Iteration::default();
            let decodes = rows.iter().any(|(row, fills)| !fills && row.left.0 > 0);
            let mut room = chunk;
            for (row, fills) in &mut rows {
                if padded {
                    it.rows += 1;
                    it.longest = it.longest.max(row.tokens.0);
                    it.prefill = u64::from(k == 0);
                    row.tokens.0 += 1;
                    row.left.0 = row.left.0.saturating_sub(1);
                    continue;
                }
                if row.left.0 == 0 {
                    continue;
                }
                if *fills {
                    let most = if decodes && row.budget.0 > 0 { row.budget.0 } else { u64::MAX };
                    let take = row.uncomputed.0.min(room).min(most);
                    it.chunk(Tokens(take), row.tokens.saturating_sub(row.uncomputed));
                    room -= take;
                    row.uncomputed.0 -= take;
                } else {
                    it.rows += 1;
                    it.context += row.tokens.0;
                    row.uncomputed.0 = 0;
                }
                if row.uncomputed.0 == 0 {
                    row.tokens.0 += 1;
                    row.uncomputed.0 = 1;
                    row.left.0 -= 1;
                    *fills = false;
                }
            }
            sum += model.iteration(&it);
            spans.push(sum);
        }
        spans
    }

    fn rows() -> impl Strategy<Value = Vec<RowLoad>> {
        let row = (1u64..600, prop_oneof![Just(1u64), 1u64..600], 1u64..60, prop_oneof![Just(0u64), 1u64..100]);
        let row = row.prop_map(|(tokens, uncomputed, left, budget)| RowLoad {
            tokens: Tokens(tokens.max(uncomputed)),
            uncomputed: Tokens(uncomputed),
            left: Tokens(left),
            budget: Tokens(budget),
        });
        prop::collection::vec(row, 1..24)
    }

    proptest! {
        #[test]
        fn the_walk_is_the_sum_of_its_iterations(
            model in prop_oneof![padded(), paged()], rows in rows(), chunk in 1u64..800, steps in 1u32..80, hazard in 0.0..0.1,
        ) {
            let naive = naive(&model, &rows, chunk, steps);
            let none_ends = walk(&model, &rows, Tokens(chunk), steps, 0.0);
            prop_assert_eq!(none_ends.len(), naive.len());
            for (spans, truth) in none_ends.iter().zip(&naive) {
                prop_assert!(spans.iter().all(|span| (span - truth).abs() <= 1e-9 * truth), "{spans:?} {truth}");
            }
            let some_end = walk(&model, &rows, Tokens(chunk), steps, hazard);
            prop_assert_eq!(some_end.len(), naive.len());
            let mut before = [0.0; 3];
            for (spans, truth) in some_end.into_iter().zip(naive) {
                let [least, mean, most] = spans;
                let slack = 1e-9 * truth;
                prop_assert!(0.0 <= least && least <= mean + slack && mean <= most + slack && most <= truth + slack, "{spans:?} {truth}");
                prop_assert!(spans.iter().zip(before).all(|(now, before)| *now >= before - slack), "{spans:?} {before:?}");
                before = spans;
            }
        }

        #[test]
        fn the_closed_form_is_the_walk_but_for_chunks(model in paged(), lengths in prop::collection::vec(2u64..600, 1..20), chunk in 64u64..2000) {
            let row = |l: &u64| RowLoad { tokens: Tokens(*l), uncomputed: Tokens(*l), left: Tokens(1000), budget: Tokens(0) };
            let rows: Vec<RowLoad> = lengths.iter().map(row).collect();
            let (n, sum) = (rows.len() as f64, lengths.iter().sum::<u64>());
            let chunks = sum.div_ceil(chunk);
            let steps = chunks + 20;
            let context = Tokens(sum);
            let load = BatchLoad { rows: rows.len() as u64, longest: Tokens(0), context, uncached: context };
            let walked = walk(&model, &rows, Tokens(chunk), steps as u32, 0.0)[steps as usize - 1][2];
            let closed = model.slice(&load, steps);
            let CostModel::Paged { prefill, step } = model else { unreachable!("paged") };
            // what the documentation of `slice` states
            let mean = sum as f64 / n;
            let spread: f64 = lengths.iter().map(|l| (*l as f64 - mean).powi(2)).sum();
            let missing = (chunks - 1) as f64 * prefill.constant + prefill.per_pair * spread / 2.0;
            let surplus = (chunks - 1) as f64 * (n * step.per_row + step.per_context * (sum as f64 + n * steps as f64));
            let slack = 1e-9 * walked;
            prop_assert!(walked - closed <= missing + slack, "{walked} {closed} {missing}");
            prop_assert!(closed - walked <= surplus + slack, "{walked} {closed} {surplus}");
        }

        #[test]
        fn no_size_gives_anything_but_times(
            sizes in prop::collection::vec(prop::array::uniform4(prop_oneof![Just(0), Just(1), Just(u64::MAX), any::<u64>()]), 0..6),
            chunk in prop_oneof![Just(0), Just(u64::MAX), any::<u64>()],
            steps in prop_oneof![Just(0u32), 1u32..50, Just(u32::MAX)],
            hazard in prop_oneof![Just(0.0), Just(1.0)],
            layout in prop_oneof![Just(Layout::Padded), Just(Layout::Paged)],
        ) {
            let row = |[tokens, uncomputed, left, budget]: [u64; 4]| RowLoad {
                tokens: Tokens(tokens), uncomputed: Tokens(uncomputed), left: Tokens(left), budget: Tokens(budget),
            };
            let rows: Vec<RowLoad> = sizes.into_iter().map(row).collect();
            let spans = walk(&CostModel::unknown(layout), &rows, Tokens(chunk), steps, hazard);
            prop_assert!(spans.len() <= MOST_FORESEEN as usize);
            prop_assert!(spans.iter().flatten().all(|t| t.is_finite() && *t > 0.0));
        }
    }

    /// Many runs of the same batch, in which rows end at random.
    #[test]
    fn spans_are_about_the_mean_of_what_happens() {
        let model = CostModel::Paged {
            prefill: PagedPrefill { constant: 1e-3, per_token: 1e-4, per_pair: 0.0 },
            step: PagedStep { constant: 1e-3, per_row: 1e-3, per_context: 1e-5 },
        };
        let row = |i: u64| RowLoad {
            tokens: Tokens(50 + i * 37 % 400),
            uncomputed: Tokens(if i.is_multiple_of(3) { 50 } else { 1 }),
            left: Tokens(5 + i * 13 % 90),
            budget: Tokens(0),
        };
        let rows: Vec<RowLoad> = (0..40).map(row).collect();
        let (hazard, steps) = (0.02, 32);
        let spans = walk(&model, &rows, Tokens(100), steps, hazard);
        let mut seed = 7u64;
        let mut chance = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 11) as f64 / (1u64 << 53) as f64
        };
        let mut times: Vec<f64> = (0..2000)
            .map(|_| {
                let early = |row: &RowLoad| {
                    let draws = (chance().max(1e-12).ln() / f64::ln(1.0 - hazard)) as u64 + 1;
                    RowLoad { left: Tokens(row.left.0.min(draws)), ..*row }
                };
                let rows: Vec<RowLoad> = rows.iter().map(early).collect();
                naive(&model, &rows, 100, steps)[steps as usize - 1]
            })
            .collect();
        times.sort_by(f64::total_cmp);
        let mean = times.iter().sum::<f64>() / times.len() as f64;
        let [least, middle, most] = spans[steps as usize - 1];
        assert!((middle / mean - 1.0).abs() < 0.01, "{middle} {mean}");
        // 1.3 deviations leave a tenth of a normal distribution at each end
        let outside = times.iter().filter(|t| !(least..=most).contains(t)).count() as f64 / times.len() as f64;
        assert!((0.1..0.3).contains(&outside), "{outside}");
    }
}
