//! The next batch of a padded worker whose rows stay: a rectangle that has the oldest row in it.
//!
//! Its KV is dropped at its end, so every batch is prefilled anew and any rows may form it. Those that belong with the
//! oldest are found by the dynamic programme over the oldest rows waiting here.

use hashbrown::HashMap;

use crate::batch::Batcher;
use crate::event::{Keep, Plan, RowStart};
use crate::ids::{RowId, RowKey};
use crate::memory::Extent;
use crate::plan::{MOST_TOLD, start};
use crate::row::Row;
use crate::units::Tokens;
use crate::worker::{Batch, Member, Worker};

/// Rows that are looked at, as a multiple of those a batch may have: enough to find rows of like length, and a plan's
/// price does not grow with the queue.
const WINDOW: usize = 4;

/// A row and the most tokens it can have at the base's end.
type Waiting<'a> = (&'a Row, Tokens);

/// Plans the batch after the running one, or the first if none runs. `None` where the worker needs no (new) plan.
pub(crate) fn next(worker: &mut Worker, rows: &HashMap<RowId, Row>, slice_len: u32) -> Option<(Batch, Plan)> {
    let steps = Tokens(u64::from(slice_len));
    let most = worker.cap.unwrap_or(usize::MAX).clamp(1, (worker.spec.max_rows as usize).max(1));
    let running: HashMap<RowKey, Tokens> =
        worker.running.iter().flat_map(|batch| &batch.members).map(|member| (member.key, member.tokens)).collect();
    let waiting = worker.rows.values().filter_map(|id| rows.get(id)).filter_map(|row| {
        let Some(tokens) = running.get(&row.key()) else { return Some((row, row.tokens())) };
        let tokens = (*tokens + steps).min(row.total());
        // At its limit by the end of this batch. Should that end early after all, the row is planned again.
        (tokens < row.total()).then_some((row, tokens))
    });
    let known = |row: &Row| row.home().is_some_and(|home| home.known);
    let mut told = Tokens::ZERO;
    let mut window: Vec<Waiting> = waiting.take(most.saturating_mul(WINDOW)).collect();
    window.retain(|(row, _)| {
        let tell = if known(row) { Tokens::ZERO } else { row.tokens() };
        let fits = told == Tokens::ZERO || told + tell <= MOST_TOLD;
        told += if fits { tell } else { Tokens::ZERO };
        fits
    });
    let batcher = Batcher {
        model: *worker.estimator.model(),
        layout: worker.spec.layout,
        capacity: worker.spec.blocks,
        block_size: worker.spec.model.block_size,
        max_rows: most as u32,
        steps: slice_len,
    };
    let extents: Vec<Extent> = window.iter().map(|&(row, tokens)| Extent { tokens, total: row.total() }).collect();
    // the oldest is the first of the window, and admission has seen to it that it fits alone
    let mut batch = batcher.split_rows(&extents).batches.into_iter().find(|batch| batch.rows.contains(&0))?;
    batch.rows.sort_unstable();
    let chosen: Vec<Waiting> = batch.rows.iter().map(|&at| window[at]).collect();

    let base = worker.running.as_ref().map_or(worker.last_ended, |batch| batch.no);
    if let Some(standing) = worker.sent.last() {
        // rows that ended since need no new plan: the worker skips them
        let alive = |m: &&Member| rows.get(&m.key.row).is_some_and(|row| row.attempt == m.key.attempt);
        let same = standing.members.iter().filter(alive).map(|m| m.key).eq(chosen.iter().map(|(row, _)| row.key()));
        if same && standing.base == base {
            return None;
        }
    }
    let add: Vec<RowStart> = chosen.iter().filter(|(row, _)| !known(row)).map(|(row, _)| start(row)).collect();
    let keep = Keep::List(chosen.iter().filter(|(row, _)| known(row)).map(|(row, _)| row.key()).collect());
    let members = chosen.iter().map(|&(row, tokens)| Member { key: row.key(), tokens }).collect();
    let added = add.iter().map(|start| start.key).collect();
    let no = worker.next_plan();
    let ceiling = batch.ceiling;
    let plan = Plan { no, base, keep, leave: Vec::new(), add, steps: slice_len, ceiling, ranks: Vec::new() };
    Some((Batch { no, base, members, added, ceiling }, plan))
}
