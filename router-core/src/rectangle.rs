//! The next batch of a padded worker whose rows stay: a rectangle that has the oldest row in it.
//!
//! Its KV is dropped at its end, so every batch is prefilled anew and any rows may form it. Those that belong with the
//! oldest are found by the dynamic programme over the oldest rows that wait here.

use hashbrown::HashMap;

use crate::batch::Batcher;
use crate::constants::WINDOW;
use crate::ids::RowId;
use crate::memory::{Ceiling, Extent};
use crate::plan::{MOST_TOLD, Packed};
use crate::row::{Row, Stage};
use crate::units::Tokens;
use crate::worker::Worker;

/// Who runs next. `cuts`: the running batch may end before its last step.
pub(crate) fn pack(worker: &Worker, rows: &HashMap<RowId, Row>, steps: u32, cuts: bool) -> Packed {
    let base_steps = Tokens(worker.running.as_ref().map_or(0, |running| u64::from(running.batch.steps)));
    let most = worker.cap.unwrap_or(usize::MAX).clamp(1, (worker.spec.max_rows as usize).max(1));
    let mut unseen = worker.running.as_ref().map_or(0, |running| running.live);
    let (mut window, mut ending, mut base) = (Vec::new(), Vec::new(), Vec::new());
    let mut told = Tokens::ZERO;
    for row in worker.rows.values().filter_map(|id| rows.get(id)) {
        if unseen == 0 && window.len() >= most.saturating_mul(WINDOW) {
            break;
        }
        let Some(home) = row.home() else { continue };
        let extent = match home.stage {
            Stage::Running { from } => {
                unseen = unseen.saturating_sub(1);
                base.push(row.key());
                Extent { tokens: (from + base_steps).min(row.total()), total: row.total() }
            }
            Stage::Waiting | Stage::Planned => row.extent(),
        };
        if extent.tokens == extent.total {
            ending.push((row, extent));
            continue;
        }
        let tell = if home.known { Tokens::ZERO } else { row.tokens() };
        if told == Tokens::ZERO || told + tell <= MOST_TOLD {
            told += tell;
            window.push((row, extent));
        }
    }
    let batcher = Batcher {
        model: *worker.estimator.model(),
        layout: worker.spec.layout,
        capacity: worker.spec.blocks,
        block_size: worker.spec.model.block_size,
        max_rows: most as u32,
        steps,
    };
    let extents: Vec<Extent> = window.iter().map(|(_, extent)| *extent).collect();
    // the oldest is the first of the window, and admission has seen to it that it fits alone
    let oldest = batcher.split_rows(&extents).batches.into_iter().find(|batch| batch.rows.contains(&0));
    let mut chosen: Vec<(&Row, Extent)> = oldest.iter().flat_map(|batch| &batch.rows).map(|at| window[*at]).collect();
    let memory = Ceiling::new(worker.spec.layout, worker.spec.model.block_size, steps);
    let mut memory = chosen.iter().fold(memory, |all, (_, extent)| all.with(all.one(*extent)));
    // At their limits by the end of the base: should it be cut, they go on where there is a place. No newcomer is left
    // out for them.
    for (row, extent) in ending.into_iter().filter(|_| cuts) {
        let larger = memory.with(memory.one(extent));
        if chosen.len() < most && larger.blocks() <= worker.spec.blocks {
            memory = larger;
            chosen.push((row, extent));
        }
    }
    chosen.sort_unstable_by_key(|(row, _)| row.order);
    let members: Vec<_> = chosen.iter().map(|(row, extent)| (row.key(), extent.tokens)).collect();
    base.retain(|key| !members.iter().any(|(member, _)| member == key));
    // what runs has its KV dropped at the end in any case: a shorter S would save none
    Packed { members, leave: base, ceiling: memory.blocks(), evicts: false }
}
