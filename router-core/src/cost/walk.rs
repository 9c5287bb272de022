//! A batch walked through its iterations before it runs: what each takes if no row leaves before its limit, and how
//! much less if many do.

use super::estimator::RowLoad;
use super::model::{CostModel, PaddedCost, PagedPrefill, PagedStep};
use crate::constants::MOST_FORESEEN;
use crate::units::Tokens;

/// Cumulative seconds after each of at most `steps` iterations: at least, at most. Shorter if all rows are at their limit
/// before. `hazard` is the part of drawn tokens that end their row.
pub(super) fn walk(model: &CostModel, rows: &[RowLoad], chunk: Tokens, steps: u32, hazard: f64) -> Vec<[f64; 2]> {
    let steps = steps.min(MOST_FORESEEN) as usize;
    match model {
        CostModel::Padded { prefill, step } => rectangle(prefill, step, rows, steps),
        CostModel::Paged { prefill, step } => packed(prefill, step, rows, chunk, steps, hazard),
    }
}

/// One pass over the prompts, then steps of the same rows, each a position longer. Nobody leaves, so there is nothing
/// that could make it shorter but an end of all.
fn rectangle(prefill: &PaddedCost, step: &PaddedCost, rows: &[RowLoad], steps: usize) -> Vec<[f64; 2]> {
    let rows = || rows.iter().filter(|row| row.left > Tokens::ZERO);
    let n = rows().count() as f64;
    let longest = rows().map(|row| row.tokens.0.max(1)).max().unwrap_or(0) as f64;
    let most = rows().map(|row| row.left.0).max().unwrap_or(0);
    let mut sum = 0.0;
    (0..steps.min(usize::try_from(most).unwrap_or(usize::MAX)))
        .map(|k| {
            let pass = if k == 0 { prefill } else { step };
            sum += pass.at(n, longest + k as f64);
            [sum; 2]
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

/// Rows share the chunk in order; one decodes in the iterations after the one that drew its first token.
///
/// What a row may prefill beside decoding rows is walked as if none of these left early: should the last one do so, its
/// chunks grow, and the batch takes longer than foreseen. The residuals know how often that happens.
fn packed(
    prefill: &PagedPrefill,
    step: &PagedStep,
    rows: &[RowLoad],
    chunk: Tokens,
    steps: usize,
    hazard: f64,
) -> Vec<[f64; 2]> {
    // Before an iteration is walked, its place says how many rows have left by then and what they would have seen.
    let mut spans = vec![[0.0; 2]; steps];
    let leaves = |spans: &mut [[f64; 2]], at: u64, tokens: u64| {
        if let Some([gone, seen]) = usize::try_from(at).ok().and_then(|at| spans.get_mut(at)) {
            *gone += 1.0;
            *seen += tokens as f64;
        }
    };
    let (mut decoding, mut context) = (0.0, 0.0);
    // The first in order is the last here: those that are done are cut off without a move of the others.
    let mut filling: Vec<Filling> = Vec::new();
    for row in rows.iter().rev().filter(|row| row.left > Tokens::ZERO) {
        let tokens = row.tokens.0.max(1);
        let want = row.uncomputed.0.clamp(1, tokens);
        if want == 1 {
            decoding += 1.0;
            context += tokens as f64;
            leaves(&mut spans, row.left.0, tokens.saturating_add(row.left.0));
        } else {
            filling.push(Filling { want, before: tokens - want, left: row.left.0, budget: row.budget.0 });
        }
    }

    let [mut least, mut most] = [0.0_f64; 2];
    // of `most`, what depends on the rows that decode; the most of these; and tokens drawn before this iteration
    let [mut theirs, mut widest, mut drawn] = [0.0_f64; 3];
    for k in 0..steps {
        let [gone, seen] = spans[k];
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
                brought += row.before.saturating_add(1) as f64;
                // with one token left it leaves before the next iteration
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

        let rows_part = step.per_row * decoding + step.per_context * context;
        most += step.constant + rows_part;
        if filled > 0.0 {
            most += prefill.constant + prefill.per_token * filled + prefill.per_pair * pairs;
        }
        theirs += rows_part;
        widest = decoding.max(widest);
        // Those that end early do so in the first half, evenly: each then spares three quarters of its part.
        let early = if widest > 0.0 { (quantile(drawn * hazard) / widest).min(1.0) } else { 0.0 };
        least = least.max(most - 0.75 * early * theirs);
        spans[k] = [least, most];

        drawn += decoding + joined;
        context += decoding + brought;
        decoding += joined;
    }
    spans
}

/// A Poisson number of this mean is at most this with a chance of 99.5 % (Cornish and Fisher's expansion, right within
/// one): the quantile of the simulation study.
fn quantile(mean: f64) -> f64 {
    // more than 99.5 % of the time nothing happens
    if mean < 0.005 { 0.0 } else { (mean + 2.576 * mean.sqrt() + 0.94).floor() }
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
            let spans = walk(&model, &rows, Tokens(chunk), steps, hazard);
            let naive = naive(&model, &rows, chunk, steps);
            prop_assert_eq!(spans.len(), naive.len());
            let mut before = [0.0; 2];
            for ([least, most], truth) in spans.into_iter().zip(naive) {
                prop_assert!((most - truth).abs() <= 1e-9 * truth, "{most} {truth}");
                prop_assert!(least <= most && least >= before[0] && most >= before[1]);
                prop_assert!(least >= most * 0.25 - 1e-12);
                before = [least, most];
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
            let walked = walk(&model, &rows, Tokens(chunk), steps as u32, 0.0)[steps as usize - 1][1];
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

    #[test]
    fn quantiles_are_those_of_the_distribution() {
        for mean in [0.001, 0.004, 0.02, 0.1, 0.5, 1.0, 3.0, 7.5, 20.0, 100.0] {
            let (mut at, mut term) = (0.0, f64::exp(-mean));
            let mut sum = term;
            while sum < 0.995 {
                at += 1.0;
                term *= mean / at;
                sum += term;
            }
            assert!((quantile(mean) - at).abs() <= 1.0, "{mean}: {} {at}", quantile(mean));
        }
    }
}
