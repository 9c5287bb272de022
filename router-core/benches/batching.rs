//! What batching and offloading cost, beside what they cannot be cheaper than in the same run: the rows sorted by length.

use divan::{Bencher, black_box};
use router_core::{Batcher, BlockSize, Blocks, CostModel, Extent, Layout, Micros, Offloader, PaddedCost, Tokens};

const ROWS: [usize; 3] = [100, 1_000, 10_000];

fn main() {
    divan::main();
}

fn lengths(rows: usize) -> Vec<Tokens> {
    (0..rows as u64).map(|i| Tokens(1 + i.wrapping_mul(2_654_435_761) % 2_000)).collect()
}

/// 13B on 80 GB, as the paper has it: some 3,500 blocks.
fn batcher(layout: Layout, max_rows: u32) -> Batcher {
    let step = PaddedCost { constant: 17e-3, per_row: 5e-6, per_position: 0.0, per_cell: 5.4e-7 };
    let prefill = PaddedCost { constant: 17e-3, per_row: 5e-6, per_position: 0.0, per_cell: 1.5e-4 };
    let model = match layout {
        Layout::Padded => CostModel::Padded { prefill, step },
        Layout::Paged => CostModel::unknown(layout),
    };
    let block_size = BlockSize::new(16).expect("not zero");
    Batcher { model, layout, capacity: Blocks(3_500), block_size, max_rows, steps: 128 }
}

#[divan::bench(args = ROWS)]
fn split_64_rows_a_batch(bencher: Bencher, rows: usize) {
    let (batcher, lengths) = (batcher(Layout::Padded, 64), lengths(rows));
    bencher.bench(|| batcher.split(black_box(&lengths)));
}

/// Only memory bounds a batch.
#[divan::bench(args = ROWS)]
fn split_by_memory_alone(bencher: Bencher, rows: usize) {
    let (batcher, lengths) = (batcher(Layout::Padded, u32::MAX), lengths(rows));
    bencher.bench(|| batcher.split(black_box(&lengths)));
}

#[divan::bench(args = ROWS)]
fn split_paged(bencher: Bencher, rows: usize) {
    let (batcher, lengths) = (batcher(Layout::Paged, 64), lengths(rows));
    bencher.bench(|| batcher.split(black_box(&lengths)));
}

#[divan::bench(args = ROWS)]
fn sixteen_a_batch_by_length(bencher: Bencher, rows: usize) {
    let batcher = batcher(Layout::Padded, 64);
    let rows: Vec<Extent> =
        lengths(rows).into_iter().map(|tokens| Extent { tokens, total: tokens + Tokens(128) }).collect();
    bencher.bench(|| batcher.by_length(black_box(&rows), 16));
}

#[divan::bench(args = ROWS)]
fn limit_one_sort(bencher: Bencher, rows: usize) {
    let lengths = lengths(rows);
    bencher.bench(|| {
        let mut order: Vec<usize> = (0..lengths.len()).collect();
        order.sort_unstable_by_key(|&at| (lengths[at], at));
        order
    });
}

#[divan::bench(args = ROWS)]
fn offload_to_64_workers(bencher: Bencher, batches: usize) {
    let times: Vec<Micros> = lengths(batches).iter().map(|length| Micros(length.0 * 100)).collect();
    bencher.bench(|| Offloader::new(vec![Micros::ZERO; 64]).assign(black_box(&times)));
}
