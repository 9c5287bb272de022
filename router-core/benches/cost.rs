//! What foresight costs: the walk of a batch, its closed form, its band, and what is learned from its report.

use divan::{Bencher, black_box};
use router_core::{BatchLoad, CostModel, Estimator, Fit, Iteration, Layout, Micros, RowLoad, Sample, Tokens};

fn main() {
    divan::main();
}

/// Rows of which each eighth wants prefill, and steps.
const BATCHES: [(u64, u32); 2] = [(64, 32), (256, 128)];

fn rows(count: u64) -> Vec<RowLoad> {
    let row = |i: u64| {
        let tokens = Tokens(200 + i * 37 % 900);
        let uncomputed = if i.is_multiple_of(8) { tokens } else { Tokens(1) };
        RowLoad { tokens, uncomputed, left: Tokens(10 + i * 53 % 500), budget: Tokens(0) }
    };
    (0..count).map(row).collect()
}

fn estimator() -> Estimator {
    Estimator::new(Some(CostModel::unknown(Layout::Paged)), Layout::Paged)
}

/// One that has seen enough for all its windows to be full.
fn settled() -> Estimator {
    let mut estimator = estimator();
    let forecast = estimator.forecast(&rows(64), Tokens(2048), 32);
    for at in 0..8000u64 {
        let k = [1, 3, 10, 32][(at % 4) as usize];
        let noise = 900 + at.wrapping_mul(2_654_435_761) % 200;
        let time = estimator.expected(&forecast, k).0 * noise / 1000;
        estimator.observe(&forecast, k, Micros(time));
    }
    estimator
}

#[divan::bench(args = BATCHES)]
fn forecast(bencher: Bencher, (count, steps): (u64, u32)) {
    let (estimator, rows) = (estimator(), rows(count));
    bencher.bench(|| estimator.forecast(black_box(&rows), Tokens(2048), steps));
}

#[divan::bench]
fn slice(bencher: Bencher) {
    let model = CostModel::unknown(Layout::Paged);
    let load = BatchLoad { rows: 64, longest: Tokens(1000), context: Tokens(30_000), uncached: Tokens(4000) };
    bencher.bench(|| black_box(&model).slice(black_box(&load), 32));
}

#[divan::bench]
fn band(bencher: Bencher) {
    let estimator = settled();
    let forecast = estimator.forecast(&rows(64), Tokens(2048), 32);
    bencher.bench(|| estimator.band(black_box(&forecast), 32));
}

#[divan::bench]
fn observe(bencher: Bencher) {
    let mut estimator = settled();
    let forecast = estimator.forecast(&rows(64), Tokens(2048), 32);
    let expected = estimator.expected(&forecast, 32).0;
    let mut at = 0u64;
    bencher.bench_local(|| {
        at = at.wrapping_add(2_654_435_761);
        estimator.observe(&forecast, 32, Micros(expected * (900 + at % 200) / 1000));
    });
}

#[divan::bench]
fn fit(bencher: Bencher) {
    let model = CostModel::unknown(Layout::Paged);
    let sample = |i: u64| {
        let rows = 1 + i % 32;
        let mut iteration = Iteration { rows, context: rows * (50 + i * 91 % 900), ..Iteration::default() };
        if i.is_multiple_of(3) {
            iteration.chunk(Tokens(16 + i * 13 % 500), Tokens(i * 7 % 300));
        }
        Sample { iteration, seconds: model.iteration(&iteration) * (0.95 + 0.1 * ((i * 37 % 100) as f64 / 100.0)) }
    };
    let samples: Vec<Sample> = (0..300).map(sample).collect();
    bencher.bench(|| Fit::new(Layout::Paged, black_box(&samples)));
}
