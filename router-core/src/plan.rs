//! The batch a worker runs next: oldest rows first, packed to the exact ceiling of memory.
//!
//! A plan is made while its base still runs, so a row of the base counts with the most tokens it can have at the
//! base's end. Whatever then happens (eos, cut, backpressure) the batch needs no more than its ceiling.

use hashbrown::HashMap;

use crate::cost::Layout;
use crate::event::{Keep, Plan, RowStart};
use crate::ids::{RowId, RowKey};
use crate::memory::ceiling;
use crate::rectangle;
use crate::row::Row;
use crate::units::{Blocks, Tokens};
use crate::worker::{Batch, Member, Worker};

/// Most tokens told to a worker in one plan, four bytes each: half of what a message may hold. One row always goes.
pub(crate) const MOST_TOLD: Tokens = Tokens(2 << 20);

/// Plans the batch after the running one, or the first if none runs. `None` where the worker needs no (new) plan.
pub(crate) fn next(worker: &mut Worker, rows: &HashMap<RowId, Row>, slice_len: u32) -> Option<(Batch, Plan)> {
    if worker.spec.layout == Layout::Padded {
        return rectangle::next(worker, rows, slice_len);
    }
    let steps = Tokens(u64::from(slice_len));
    let size = worker.spec.model.block_size;
    let most = worker.cap.unwrap_or(usize::MAX).min(worker.spec.max_rows as usize);

    // Rows of the running batch that are still here: once they are seen and the batch is full, the rest only waits.
    let mut unseen = worker.running.as_ref().map_or(0, |batch| {
        let here = |m: &&Member| rows.get(&m.key.row).is_some_and(|row| row.attempt == m.key.attempt);
        batch.members.iter().filter(here).count()
    });
    let running: HashMap<RowKey, Tokens> =
        worker.running.iter().flat_map(|batch| &batch.members).map(|member| (member.key, member.tokens)).collect();
    let mut members = Vec::new();
    let mut message_full = false;
    let mut used = Blocks::ZERO;
    let mut told = Tokens::ZERO;
    let mut full = false;
    let mut leave = Vec::new();
    for row in worker.rows.values().filter_map(|id| rows.get(id)) {
        if full && unseen == 0 {
            break;
        }
        let base_tokens = running.get(&row.key()).copied();
        unseen -= usize::from(base_tokens.is_some());
        let tokens = base_tokens.map_or_else(|| row.tokens(), |tokens| (tokens + steps).min(row.total()));
        // Past its prefill and at its limit by the end of this slice: no place is kept for it. Should the slice end
        // early after all, it is held and planned again.
        let prefilled = row.home().is_some_and(|home| home.prefill == Tokens::ZERO);
        let ends = base_tokens.is_some() && prefilled && tokens == row.total();
        let need = used + ceiling(tokens, steps, row.total(), size);
        let known = row.home().is_some_and(|home| home.known);
        let tell = if known { Tokens::ZERO } else { row.tokens() };
        // Rows the worker knows cost a message nothing, so only further newcomers wait for the next plan.
        message_full |= told > Tokens::ZERO && told + tell > MOST_TOLD;
        if message_full && !known {
            continue;
        }
        // Strictly in order of age: a row that does not fit is not passed by younger, smaller ones.
        full |= !ends && (members.len() == most || need > worker.spec.blocks);
        if ends || full {
            leave.extend(base_tokens.map(|_| row.key()));
            continue;
        }
        used = need;
        told += tell;
        members.push(Member { key: row.key(), tokens });
    }

    let base = worker.running.as_ref().map_or(worker.last_ended, |batch| batch.no);
    if members.is_empty() {
        // Nothing to run next. A plan that stands would run rows that are gone or moved: their Drop emptied it.
        return None;
    }
    if let Some(standing) = worker.sent.last() {
        // rows that ended since need no new plan: they are no survivors
        let alive = |m: &&Member| rows.get(&m.key.row).is_some_and(|row| row.attempt == m.key.attempt);
        let same = standing.members.iter().filter(alive).map(|m| m.key).eq(members.iter().map(|m| m.key));
        if same && standing.base == base {
            return None;
        }
    }

    let row = |member: &Member| &rows[&member.key.row];
    let known = |member: &&Member| row(member).home().is_some_and(|home| home.known);
    let add: Vec<RowStart> = members.iter().filter(|m| !known(m)).map(|m| start(row(m))).collect();
    let kept: Vec<_> = members.iter().filter(known).map(|m| m.key).collect();
    let survivors = worker.running.is_some() && kept.iter().all(|key| running.contains_key(key));
    let keep = if survivors { Keep::Survivors } else { Keep::List(kept) };
    let ranks = leave.iter().map(|key| (*key, rows[&key.row].hold_rank())).collect();
    let no = worker.next_plan();
    let added = add.iter().map(|start| start.key).collect();
    let plan = Plan { no, base, keep, leave, add, steps: slice_len, ceiling: used, ranks };
    Some((Batch { no, base, members, added, ceiling: used }, plan))
}

pub(crate) fn start(row: &Row) -> RowStart {
    RowStart {
        key: row.key(),
        slice_no: row.slices,
        root: row.root,
        prompt: row.prompt.clone(),
        output: row.output.clone(),
        max_tokens: row.max_tokens,
        hold_rank: row.hold_rank(),
        prefill_budget: Tokens::ZERO,
    }
}
