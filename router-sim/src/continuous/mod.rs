//! A modelled iteration-level engine, as vLLM v1 is one: rows join and leave at every iteration.
//!
//! An iteration runs all rows that decode, then unfinished prompts, then, first come first served, rows that wait, as far as
//! tokens (`Device::chunk`, decoding rows count), rows (`Device::max_rows`) and blocks go. A row is admitted only if its whole
//! prompt fits, and has its blocks from then on. Where a decoding row finds no block, the row that was admitted last gives all
//! of its up and is computed again later. Blocks get their names when their chunk has run; generated tokens fill blocks that
//! have none.
//!
//! It is fast because iterations in which rows only decode touch no row: sums grow by what is known, a heap knows the next row
//! to end, and a row needs a block every so many iterations, so that counts by remainder know how many do in each. Such
//! iterations are computed ahead as one *spell*, which is shortened if a row comes. `naive.rs` is the same engine, row by row.

mod chains;
#[cfg(test)]
mod naive;
mod pool;
#[cfg(test)]
pub(crate) mod tests;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use router_core::{BlockSize, Iteration, Micros, Tokens};

pub(crate) use self::chains::{Chains, Span};
use self::pool::Pool;
use crate::device::Device;
use crate::outcome::WorkerOutcome;
use crate::served::Lane;
use crate::timing::{Clock, Host, Noise, Pace};

/// Most iterations computed ahead: those past a row that comes are computed in vain.
const AHEAD: usize = 64;

/// Most lanes of one engine that are kept.
const LANES: usize = 64;

/// A request as it comes to an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Arrival {
    /// Its place in the trace.
    pub(crate) request: u32,
    pub(crate) input: u32,
    pub(crate) output: u32,
    /// What the router thinks must be computed of it.
    pub(crate) expected: u32,
}

/// What became of a row in an iteration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    /// So many tokens of its prompt are left.
    Left(u32, u32),
    /// Its first token came. Again after a preemption, where it means that the prompt is computed once more.
    Prefilled(u32),
    /// It ended.
    Ended(u32, Ended),
}

/// A row at its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) first: Micros,
    pub(crate) hit: u32,
    pub(crate) output: u32,
    pub(crate) gap: u32,
    pub(crate) preempted: u32,
}

/// An engine's sums at the end of an iteration, and how they grow until it says more.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Standing {
    /// Rows in the batch, and rows that wait.
    pub(crate) running: u64,
    pub(crate) waiting: u64,
    /// Rows that came so far, over all time: what was sent after these is not in here.
    pub(crate) taken: u64,
    /// Tokens of all rows.
    pub(crate) tokens: u64,
    /// Prompt tokens to compute, those of waiting rows as the router expects.
    pub(crate) queued: u64,
    pub(crate) used: u64,
    pub(crate) cached: u64,
    /// When this was, and what an iteration takes from then on, in which as many tokens come as rows decode.
    pub(crate) at: Micros,
    pub(crate) step: f64,
    pub(crate) steps: u32,
    pub(crate) decoding: u64,
}

impl Standing {
    /// Tokens of all rows at a later time, as of the last iteration's end.
    pub(crate) fn tokens_at(&self, at: Micros) -> u64 {
        let since = at.saturating_sub(self.at).0 as f64;
        let steps = if self.step > 0.0 { (since / self.step) as u64 } else { 0 };
        self.tokens + steps.min(self.steps.into()) * self.decoding
    }
}

/// What an engine says at the end of an iteration.
#[derive(Clone, Debug, Default)]
pub(crate) struct Report {
    pub(crate) rows: Vec<Said>,
    pub(crate) removed: Vec<Span>,
    pub(crate) stored: Vec<Span>,
    pub(crate) standing: Standing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Waiting,
    Prefill,
    Decode,
}

#[derive(Clone, Copy, Debug)]
struct Row {
    request: u32,
    stage: Stage,
    /// Which admission this is: the last is the first to be preempted.
    order: u64,
    /// Prompt and output, when it was admitted or began to decode.
    tokens: u32,
    /// Of these, computed.
    computed: u32,
    /// Output tokens drawn by then, and in the end.
    drawn: u32,
    output: u32,
    expected: u32,
    /// Blocks of its prompt that have names and are counted as such.
    shared: u32,
    /// The engine's iterations when it began to decode.
    since: u64,
    first: Micros,
    /// Its latest token before it was preempted; until then the longest time between two.
    last: Micros,
    gap: u32,
    hit: Option<u32>,
    preempted: u32,
}

/// Iterations under way: what the first computes beside decoding rows, and when each ends.
#[derive(Debug, Default)]
struct Spell {
    start: Micros,
    ends: Vec<Micros>,
    /// Rows that prefill in its first iteration, and how much.
    chunks: Vec<(u32, u32)>,
}

/// The engine.
#[derive(Debug)]
pub(crate) struct Engine {
    size: u64,
    chunk: u64,
    max_rows: usize,
    /// Of an iteration: whoever plans every one exposes it in every one.
    host: Micros,
    clock: Clock,
    /// The clock before the spell.
    before: Clock,
    pool: Pool,
    rows: Vec<Row>,
    spare: Vec<u32>,
    /// In order of admission.
    running: Vec<u32>,
    waiting: VecDeque<u32>,
    orders: u64,
    /// Iterations so far; every decoding row got on by one in each.
    steps: u64,
    /// Decoding rows, the tokens they have computed, and how many need a block in iterations of each remainder.
    decoding: u64,
    context: u64,
    need: Vec<u32>,
    /// Decoding rows by the iteration after which they end. Rows that were preempted are skipped.
    ends: BinaryHeap<Reverse<(u64, u64, u32)>>,
    /// Iterations that took longer than all after them.
    gaps: VecDeque<(u64, u32)>,
    spell: Option<Spell>,
    spare_spell: Spell,
    taken: u64,
    tokens: u64,
    queued: u64,
    removed: Vec<Span>,
    pub(crate) outcome: WorkerOutcome,
    pub(crate) lanes: Vec<Lane>,
    keep_lanes: bool,
    /// When the running lane began, and after which iteration.
    lane: (Micros, u64),
    idle_since: Micros,
}

impl Engine {
    /// With nothing. Its bias is how slow it is; lanes are kept if `keep_lanes`.
    pub(crate) fn new(device: &Device, size: BlockSize, noise: Noise, keep_lanes: bool) -> Self {
        let pace = Pace { start: Micros::ZERO, ..device.pace(Host::every(device.host)).with_noise(noise) };
        let clock = Clock::new(pace);
        Self {
            size: size.get(),
            chunk: device.chunk.max(1).into(),
            max_rows: device.max_rows.max(1) as usize,
            host: device.host,
            before: clock.clone(),
            clock,
            pool: Pool::new(device.kv.0 / size.get()),
            rows: Vec::new(),
            spare: Vec::new(),
            running: Vec::new(),
            waiting: VecDeque::new(),
            orders: 0,
            steps: 0,
            decoding: 0,
            context: 0,
            need: vec![0; size.get() as usize],
            ends: BinaryHeap::new(),
            gaps: VecDeque::new(),
            spell: None,
            spare_spell: Spell::default(),
            taken: 0,
            tokens: 0,
            queued: 0,
            removed: Vec::new(),
            outcome: WorkerOutcome::default(),
            lanes: Vec::new(),
            keep_lanes,
            lane: (Micros::ZERO, 0),
            idle_since: Micros::ZERO,
        }
    }

    /// Whether it could run alone. One block more than it fills: a prompt that is cached as a whole computes its last block again.
    pub(crate) fn holds(device: &Device, size: BlockSize, input: u32, output: u32) -> bool {
        let tokens = u64::from(input) + u64::from(output);
        tokens.div_ceil(size.get()) < device.kv.0 / size.get()
    }

    /// A row comes. It joins at the end of the running iteration, or at once.
    pub(crate) fn push(&mut self, chains: &Chains, arrival: Arrival, now: Micros) {
        let row = Row {
            request: arrival.request,
            stage: Stage::Waiting,
            order: 0,
            tokens: arrival.input.max(1),
            computed: 0,
            drawn: 0,
            output: arrival.output.max(1),
            expected: arrival.expected,
            shared: 0,
            since: 0,
            first: Micros::ZERO,
            last: Micros::ZERO,
            gap: 0,
            hit: None,
            preempted: 0,
        };
        let place = self.spare.pop().unwrap_or_else(|| {
            self.rows.push(row);
            self.rows.len() as u32 - 1
        });
        self.rows[place as usize] = row;
        self.waiting.push_back(place);
        self.taken += 1;
        self.tokens += u64::from(row.tokens);
        self.queued += u64::from(row.expected);
        match &mut self.spell {
            None => {
                self.outcome.idle += now.saturating_sub(self.idle_since);
                self.begin(chains, now);
            }
            Some(spell) => {
                let ends = spell.ends.partition_point(|end| *end < now) + 1;
                if ends < spell.ends.len() {
                    // those after it have not been, and only took blocks that were free
                    for i in ends..spell.ends.len() {
                        self.pool.give(self.need[((self.steps + i as u64) % self.size) as usize].into());
                    }
                    spell.ends.truncate(ends);
                    self.clock.clone_from(&self.before);
                    for i in 0..ends as u64 {
                        self.clock.iteration(&decode(self.decoding, self.context, i));
                    }
                }
            }
        }
    }

    /// When it says something next.
    pub(crate) fn due(&self) -> Option<Micros> {
        self.spell.as_ref().and_then(|spell| spell.ends.last().copied())
    }

    /// Rows in the batch and waiting.
    pub(crate) fn batch_size(&self) -> u64 {
        (self.running.len() + self.waiting.len()) as u64
    }

    /// Prompt tokens to compute, those of rows that wait as the router expects.
    pub(crate) fn queued(&self) -> u64 {
        self.queued
    }

    /// How far the rows that are here have come, in order of admission, then of waiting.
    pub(crate) fn unfinished(&self, now: Micros) -> impl Iterator<Item = (u32, Ended)> {
        let ahead = self.spell.as_ref().map_or(0, |spell| spell.ends.partition_point(|end| *end <= now)) as u64;
        self.running.iter().chain(&self.waiting).map(move |place| {
            let row = &self.rows[*place as usize];
            let since = if row.stage == Stage::Decode { (self.steps + ahead - row.since) as u32 } else { 0 };
            (row.request, ended(row, row.drawn + since, row.gap))
        })
    }

    /// What is due has run; what follows begins.
    pub(crate) fn wake(&mut self, chains: &Chains, report: &mut Report) {
        report.rows.clear();
        report.stored.clear();
        report.removed.clear();
        let Some(spell) = self.spell.take() else { return };
        let mut start = spell.start;
        for &end in &spell.ends {
            self.step(end.saturating_sub(start));
            start = end;
        }
        let now = start;
        report.removed.append(&mut self.removed);
        for &(place, chunk) in &spell.chunks {
            self.chunk_ran(chains, place, chunk, now, report);
        }
        self.end_rows(chains, now, report);
        self.outcome.peak = self.outcome.peak.max(self.pool.used());
        report.standing = Standing {
            running: self.running.len() as u64,
            waiting: self.waiting.len() as u64,
            taken: self.taken,
            tokens: self.tokens,
            queued: self.queued,
            used: self.pool.used(),
            cached: self.pool.cached(),
            at: now,
            ..Standing::default()
        };
        self.spare_spell = spell;
        self.begin(chains, now);
        if let Some(spell) = &self.spell {
            report.standing.steps = spell.ends.len() as u32;
            report.standing.decoding = self.decoding;
            let took = spell.ends.last().map_or(Micros::ZERO, |end| end.saturating_sub(now));
            report.standing.step = took.0 as f64 / spell.ends.len() as f64;
        }
    }

    /// All rows that decode get on by one.
    fn step(&mut self, took: Micros) {
        let took = u32::try_from(took.0).unwrap_or(u32::MAX);
        self.steps += 1;
        self.context += self.decoding;
        self.tokens += self.decoding;
        while self.gaps.back().is_some_and(|(_, longest)| *longest <= took) {
            self.gaps.pop_back();
        }
        self.gaps.push_back((self.steps, took));
        self.outcome.iterations += 1;
        self.outcome.host += self.host;
        self.outcome.row_slices += self.decoding;
        self.outcome.computed += Tokens(self.decoding);
        self.outcome.busy += Micros(took.into());
        self.outcome.longest = self.outcome.longest.max(Micros(took.into()));
    }

    fn chunk_ran(&mut self, chains: &Chains, place: u32, chunk: u32, now: Micros, report: &mut Report) {
        let size = self.size as u32;
        let row = &mut self.rows[place as usize];
        let from = row.computed / size;
        row.computed += chunk;
        let chain = chains.of(row.request);
        row.shared += self.pool.name(chains, chain, from, row.computed / size, &mut report.stored);
        let left = row.tokens - row.computed;
        self.queued = self.queued.saturating_sub(chunk.into());
        self.outcome.computed += Tokens(chunk.into());
        self.outcome.row_slices += 1;
        if left > 0 {
            report.rows.push(Said::Left(row.request, left));
            return;
        }
        report.rows.push(Said::Prefilled(row.request));
        if row.drawn == 0 {
            row.first = now;
        } else {
            row.gap = row.gap.max(between(row.last, now));
        }
        row.drawn += 1;
        row.tokens += 1;
        row.stage = Stage::Decode;
        row.since = self.steps;
        self.tokens += 1;
        self.decoding += 1;
        self.context += u64::from(row.computed);
        self.need[remainder(row, self.size)] += 1;
        self.ends.push(Reverse((self.steps + u64::from(row.output - row.drawn), row.order, place)));
    }

    fn end_rows(&mut self, chains: &Chains, now: Micros, report: &mut Report) {
        while let Some((at, place)) = self.next_end() {
            if at > self.steps {
                break;
            }
            self.ends.pop();
            let row = self.leave_decoding(place);
            self.tokens -= u64::from(row.tokens);
            report.rows.push(Said::Ended(row.request, ended(&row, row.drawn, row.gap)));
            self.release(chains, &row, row.computed);
            if let Ok(at) = self.running.binary_search_by_key(&row.order, |place| self.rows[*place as usize].order) {
                self.running.remove(at);
            }
            self.spare.push(place);
            self.outcome.completed = now;
        }
        if self.decoding == 0 {
            self.gaps.clear();
        }
    }

    /// The next row to end, and after which iteration.
    fn next_end(&mut self) -> Option<(u64, u32)> {
        while let Some(&Reverse((at, order, place))) = self.ends.peek() {
            let row = &self.rows[place as usize];
            if row.order == order && row.stage == Stage::Decode {
                return Some((at, place));
            }
            self.ends.pop();
        }
        None
    }

    /// A row decodes no more: as it is now, its gaps counted.
    fn leave_decoding(&mut self, place: u32) -> Row {
        let longest = {
            let since = self.rows[place as usize].since;
            let at = self.gaps.partition_point(|(step, _)| *step <= since);
            self.gaps.get(at).map_or(0, |(_, longest)| *longest)
        };
        let row = &mut self.rows[place as usize];
        self.need[remainder(row, self.size)] -= 1;
        let steps = (self.steps - row.since) as u32;
        row.computed += steps;
        row.tokens += steps;
        row.drawn += steps;
        row.gap = row.gap.max(longest);
        row.stage = Stage::Waiting;
        self.decoding -= 1;
        self.context -= u64::from(row.computed);
        *row
    }

    /// A row gives back its blocks, which held so many tokens: a prompt's from its admission on, all of it.
    fn release(&mut self, chains: &Chains, row: &Row, tokens: u32) {
        self.pool.give(u64::from(tokens).div_ceil(self.size) - u64::from(row.shared));
        self.pool.unpin(chains.of(row.request));
    }

    /// The next iteration, and those after it in which rows only decode.
    fn begin(&mut self, chains: &Chains, now: Micros) {
        let mut spell = std::mem::take(&mut self.spare_spell);
        spell.start = now;
        spell.ends.clear();
        spell.chunks.clear();
        let preempted = self.find_blocks(chains, now);
        let mut budget = self.chunk.saturating_sub(self.decoding);
        for &place in &self.running {
            let row = &self.rows[place as usize];
            if row.stage == Stage::Prefill && budget > 0 {
                let chunk = u64::from(row.tokens - row.computed).min(budget);
                budget -= chunk;
                spell.chunks.push((place, chunk as u32));
            }
        }
        // if all were, those who wait are asked at once
        if !preempted || self.running.is_empty() {
            let running = self.running.len();
            self.admit(chains, &mut spell.chunks, budget);
            if self.running.len() > running {
                self.begin_lane(now);
            }
        }
        if self.running.is_empty() {
            self.begin_lane(now);
            self.idle_since = now;
            self.spare_spell = spell;
            return;
        }
        let mut work = decode(self.decoding, self.context, 0);
        for &(place, chunk) in &spell.chunks {
            let row = &self.rows[place as usize];
            work.chunk(Tokens(chunk.into()), Tokens(row.computed.into()));
        }
        self.before.clone_from(&self.clock);
        let mut end = now + self.iteration(&work);
        spell.ends.push(end);
        // after a preemption those who wait are asked again in the next one
        if spell.chunks.is_empty() && self.removed.is_empty() && !preempted {
            let last = self.next_end().map_or(0, |(at, _)| at - self.steps);
            for i in 1..last.min(AHEAD as u64) {
                // where something must be evicted, that is said
                let need = u64::from(self.need[((self.steps + i) % self.size) as usize]);
                if need > self.pool.free() {
                    break;
                }
                self.pool.take(need, &mut self.removed);
                end += self.iteration(&decode(self.decoding, self.context, i));
                spell.ends.push(end);
            }
        }
        self.spell = Some(spell);
    }

    fn iteration(&mut self, work: &Iteration) -> Micros {
        // an iteration that takes no time would never end
        self.clock.iteration(work).max(Micros(1))
    }

    /// Rows that decode get the blocks they need in this iteration. Whether one was preempted.
    fn find_blocks(&mut self, chains: &Chains, now: Micros) -> bool {
        let at = (self.steps % self.size) as usize;
        let need = u64::from(self.need[at]);
        if need <= self.pool.available() {
            self.pool.take(need, &mut self.removed);
            return false;
        }
        let mut next = 0;
        while let Some(&place) = self.running.get(next) {
            next += 1;
            let row = &self.rows[place as usize];
            if row.stage != Stage::Decode || remainder(row, self.size) != at {
                continue;
            }
            while self.pool.available() == 0 && self.running.len() >= next {
                self.preempt_last(chains, now);
            }
            if self.running.len() >= next {
                self.pool.take(1, &mut self.removed);
            }
        }
        true
    }

    fn preempt_last(&mut self, chains: &Chains, now: Micros) {
        let Some(place) = self.running.pop() else { return };
        let before = self.rows[place as usize];
        let decoded = before.stage == Stage::Decode;
        let row = if decoded { self.leave_decoding(place) } else { before };
        self.release(chains, &row, if decoded { row.computed } else { row.tokens });
        self.outcome.evicted += Tokens(row.computed.into());
        self.queued += u64::from(row.tokens);
        if !decoded {
            self.queued = self.queued.saturating_sub(u64::from(row.tokens - row.computed));
        }
        self.rows[place as usize] = Row {
            stage: Stage::Waiting,
            computed: 0,
            shared: 0,
            expected: row.tokens,
            last: if decoded { now } else { row.last },
            preempted: row.preempted + 1,
            ..row
        };
        self.waiting.push_front(place);
    }

    fn admit(&mut self, chains: &Chains, chunks: &mut Vec<(u32, u32)>, mut budget: u64) {
        while budget > 0 && self.running.len() < self.max_rows {
            let Some(&place) = self.waiting.front() else { return };
            let row = &mut self.rows[place as usize];
            let chain = chains.of(row.request);
            let (present, idle) = self.pool.hit(chains, chain);
            let hit = u64::from(present).min((u64::from(row.tokens) - 1) / self.size);
            let need = u64::from(row.tokens).div_ceil(self.size) - hit;
            if need > self.pool.available() - idle {
                return;
            }
            self.waiting.pop_front();
            self.pool.pin(chain);
            self.pool.take(need, &mut self.removed);
            self.orders += 1;
            row.order = self.orders;
            row.stage = Stage::Prefill;
            row.shared = hit as u32;
            row.computed = (hit * self.size) as u32;
            row.hit.get_or_insert(row.computed);
            self.outcome.cached += Tokens(row.computed.into());
            self.queued = (self.queued + u64::from(row.tokens - row.computed)).saturating_sub(row.expected.into());
            let chunk = u64::from(row.tokens - row.computed).min(budget);
            budget -= chunk;
            chunks.push((place, chunk as u32));
            self.running.push(place);
        }
    }

    /// Rows joined, or nobody is left: what ran since the last time is a lane.
    fn begin_lane(&mut self, now: Micros) {
        let (start, steps) = self.lane;
        self.lane = (now, self.steps);
        let ran = (self.steps - steps) as u32;
        if ran == 0 {
            return;
        }
        self.outcome.slices += 1;
        if self.keep_lanes && self.lanes.len() < LANES {
            let rows = self.running.len() as u32;
            self.lanes.push(Lane { worker: 0, span: (start, now), rows, steps: ran, cut: false });
        }
    }
}

/// An iteration in which rows decode, `later` iterations from when they had computed so many tokens.
fn decode(rows: u64, computed: u64, later: u64) -> Iteration {
    // each sees what is computed and the token it computes
    Iteration { rows, context: computed + rows * (later + 1), ..Iteration::default() }
}

/// A decoding row needs a block in iterations with this remainder.
fn remainder(row: &Row, size: u64) -> usize {
    // before iteration `since + i` it has computed `computed + i` tokens; it needs one where its blocks are full
    ((row.since + size - u64::from(row.computed) % size) % size) as usize
}

fn between(last: Micros, now: Micros) -> u32 {
    u32::try_from(now.saturating_sub(last).0).unwrap_or(u32::MAX)
}

fn ended(row: &Row, output: u32, gap: u32) -> Ended {
    Ended { first: row.first, hit: row.hit.unwrap_or(0), output, gap, preempted: row.preempted }
}
