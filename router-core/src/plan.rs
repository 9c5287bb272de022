//! The batch a worker runs next: oldest rows first, packed to the exact ceiling of memory.
//!
//! A plan is made while its base still runs, so a row of the base counts with the most tokens it can have at the
//! base's end. Whatever then happens (eos, cut, backpressure) the batch needs no more than its ceiling.

use hashbrown::HashMap;

use crate::cost::{BatchLoad, Layout};
use crate::event::{Keep, Plan, RowStart};
use crate::ids::{RowId, RowKey};
use crate::memory::ceiling;
use crate::rectangle;
use crate::row::{Row, Stage};
use crate::units::{Blocks, Tokens};
use crate::worker::{Batch, Worker};

/// Most tokens told to a worker in one plan, four bytes each: half of what a message may hold. One row always goes.
pub(crate) const MOST_TOLD: Tokens = Tokens(2 << 20);

/// Who runs next, before it is a plan.
#[derive(Default)]
pub(crate) struct Packed {
    /// With the most tokens each can have at the start.
    pub(crate) members: Vec<(RowKey, Tokens)>,
    pub(crate) leave: Vec<RowKey>,
    pub(crate) ceiling: Blocks,
    /// A row that has its KV here found no place for it.
    pub(crate) evicts: bool,
}

/// Plans the batch after the running one, or the first if none runs. `None` where the worker needs no (new) plan. `cuts`:
/// the running one may end before its last step.
pub(crate) fn next(
    worker: &mut Worker,
    rows: &HashMap<RowId, Row>,
    slice_len: u32,
    cuts: bool,
) -> Option<(Batch, Plan)> {
    let mut steps = slice_len;
    let mut packed = pack(worker, rows, steps, cuts);
    // S is the memory horizon: it is shortened before anybody loses KV
    while packed.evicts && steps > 1 {
        steps /= 2;
        packed = pack(worker, rows, steps, cuts);
    }
    if packed.evicts {
        // somebody does, whatever S is
        steps = slice_len;
        packed = pack(worker, rows, steps, cuts);
    }
    let Packed { members, leave, ceiling, .. } = packed;
    let base = worker.base();
    if members.is_empty() {
        // Nothing to run next. A plan that stands would run rows that are gone or moved: their Drop emptied it.
        return None;
    }
    if let Some(standing) = worker.sent.last() {
        // rows that ended since need no new plan: they are no survivors
        let alive = |key: &&RowKey| rows.get(&key.row).is_some_and(|row| row.attempt == key.attempt);
        let same = standing.members.iter().filter(alive).eq(members.iter().map(|(key, _)| key));
        if same && standing.base == base && standing.steps == steps {
            return None;
        }
    }

    let row = |key: &RowKey| &rows[&key.row];
    let known = |key: &RowKey| row(key).home().is_some_and(|home| home.known);
    let keys: Vec<RowKey> = members.iter().map(|(key, _)| *key).collect();
    let base_steps = worker.running.as_ref().map_or(0, |running| u64::from(running.batch.steps));
    let mut load = BatchLoad { rows: members.len() as u64, ..BatchLoad::default() };
    let mut left = Tokens::ZERO;
    for (key, tokens) in &members {
        load.context += *tokens;
        load.longest = load.longest.max(*tokens);
        left = left.max(row(key).total().saturating_sub(*tokens));
        let Some(home) = row(key).home() else { continue };
        // what the base will have prefilled is not prefilled again
        let each = if home.budget > Tokens::ZERO { home.budget } else { worker.spec.chunk };
        let done = if row(key).runs() { each.0.saturating_mul(base_steps) } else { 0 };
        load.uncached += home.prefill.saturating_sub(Tokens(done));
    }
    // it ends when all its rows are at their limits, whatever S is
    let chunks = Tokens(load.uncached.0.div_ceil(worker.spec.chunk.0.max(1)));
    let iterations = u64::from(steps).min((left + chunks).0.max(1));
    let expected = worker.estimator.time(worker.estimator.model().slice(&load, iterations));
    let add: Vec<RowStart> = keys.iter().filter(|key| !known(key)).map(|key| start(row(key), worker)).collect();
    let kept: Vec<RowKey> = keys.iter().filter(|key| known(key)).copied().collect();
    let survivors = worker.running.is_some() && kept.iter().all(|key| row(key).runs());
    let keep = if survivors { Keep::Survivors } else { Keep::List(kept) };
    let ranks = leave.iter().map(|key| (*key, row(key).hold_rank())).collect();
    let added = add.iter().map(|start| start.key).collect();
    let joining = keys.iter().filter(|key| !row(key).runs()).copied().collect();
    let no = worker.next_plan();
    let plan = Plan { no, base, keep, leave, add, steps, ceiling, ranks };
    Some((Batch { no, base, steps, members: keys, joining, added, ceiling, expected }, plan))
}

fn pack(worker: &Worker, rows: &HashMap<RowId, Row>, steps: u32, cuts: bool) -> Packed {
    if worker.spec.layout == Layout::Padded {
        return rectangle::pack(worker, rows, steps, cuts);
    }
    let steps = Tokens(u64::from(steps));
    let base_steps = Tokens(worker.running.as_ref().map_or(0, |running| u64::from(running.batch.steps)));
    let size = worker.spec.model.block_size;
    let most = worker.cap.unwrap_or(usize::MAX).min(worker.spec.max_rows as usize);
    // Rows of the running batch that are still here: once they are seen and the batch is full, the rest only waits.
    let mut unseen = worker.running.as_ref().map_or(0, |running| running.live);
    let mut packed = Packed::default();
    let mut told = Tokens::ZERO;
    let (mut full, mut message_full) = (false, false);
    for row in worker.rows.values().filter_map(|id| rows.get(id)) {
        if full && unseen == 0 {
            break;
        }
        let Some(home) = row.home() else { continue };
        let from = match home.stage {
            Stage::Running { from } => Some(from),
            Stage::Waiting | Stage::Planned => None,
        };
        unseen = unseen.saturating_sub(usize::from(from.is_some()));
        let tokens = from.map_or_else(|| row.tokens(), |from| (from + base_steps).min(row.total()));
        // Past its prefill and at its limit by the end of a base that is not cut: no place is kept for it. Should the
        // base end early after all, it is held and planned again.
        let ends = !cuts && from.is_some() && home.prefill == Tokens::ZERO && tokens == row.total();
        let need = packed.ceiling + ceiling(tokens, steps, row.total(), size);
        let tell = if home.known { Tokens::ZERO } else { row.tokens() };
        // Rows the worker knows cost a message nothing, so only further newcomers wait for the next plan.
        message_full |= told > Tokens::ZERO && told + tell > MOST_TOLD;
        if message_full && !home.known {
            continue;
        }
        // Strictly in order of age: a row that does not fit is not passed by younger, smaller ones.
        full |= !ends && (packed.members.len() == most || need > worker.spec.blocks);
        if ends || full {
            let has_kv = from.is_some() || home.prefill < row.tokens();
            packed.evicts |= full && home.known && has_kv && packed.members.len() < most;
            packed.leave.extend(from.map(|_| row.key()));
            continue;
        }
        packed.ceiling = need;
        told += tell;
        packed.members.push((row.key(), tokens));
    }
    packed
}

pub(crate) fn start(row: &Row, worker: &Worker) -> RowStart {
    RowStart {
        key: row.key(),
        slice_no: row.slices,
        root: row.root,
        prompt: row.prompt.clone(),
        output: row.output.clone(),
        max_tokens: row.max_tokens,
        hold_rank: row.hold_rank(),
        prefill_budget: row.home().map_or(Tokens::ZERO, |home| {
            let (rows, context) = (worker.batch_size().saturating_sub(1), worker.context.saturating_sub(row.tokens()));
            worker.pace(rows, context, row.tokens(), home.prefill)
        }),
    }
}
