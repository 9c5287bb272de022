//! A slice worker as a state machine: the Session contract of `ARCHITECTURE.md` without sockets, model or clock.

use hashbrown::HashMap;
use router_core::{
    BatchEnd, BlockHash, BlockSize, Blocks, FinishReason, Iteration, Micros, Plan, PlanNo, Refusal, RowKey, RowReport,
    SliceReport, Tokens, WorkerMessage, WorkerSpec, hash_blocks,
};

use crate::kv::{KvPool, RowBlocks};
use crate::plans::{Plans, Told, refuse};
use crate::sequence::{Sequence, Terms, unreported};
use crate::timing::{Clock, Pace};

/// A message of the router.
#[derive(Clone, Debug)]
pub enum Command {
    /// A session begins: rows of the one before are gone.
    Hello,
    /// The next batch; terms of its new rows, where they have any.
    Plan(Plan, Vec<(RowKey, Terms)>),
    /// End this batch at the next step boundary, or after this step if that is later.
    Cut(PlanNo, Option<u32>),
    /// End these rows.
    Drop(Vec<RowKey>),
    /// Free the KV of these rows that do not run.
    ReleaseKv(Vec<RowKey>),
    /// Send the snapshot again.
    Resync,
}

struct Row {
    sequence: Sequence,
    root: BlockHash,
    rank: u64,
    /// Most prefill tokens in an iteration in which another row decodes; zero: the chunk.
    budget: u64,
    blocks: RowBlocks,
    /// Names of its whole blocks as far as they were needed.
    chain: Vec<BlockHash>,
    /// Tokens whose KV is there.
    computed: usize,
    /// Tokens found cached since it last had none computed.
    hit: usize,
    drew: bool,
    /// In the running batch: its line of the batch's reports.
    line: Option<u32>,
}

/// A row's place among the worker's rows: what the hot path names it by.
type Slot = u32;

impl Row {
    /// Sees to it that the whole blocks of its first `tokens` tokens have names.
    fn chain(&mut self, tokens: usize, size: BlockSize) {
        let step = size.get() as usize;
        let done = self.chain.len();
        if tokens / step > done {
            let parent = self.chain.last().copied().unwrap_or(self.root);
            self.chain.extend(hash_blocks(parent, &self.sequence.tokens[done * step..tokens], size));
        }
    }

    /// Tokens that it knows and has not computed.
    fn wants(&self) -> usize {
        self.sequence.len() - self.computed
    }

    fn decodes(&self) -> bool {
        self.drew && self.wants() == 1
    }

    /// Its KV is gone; it is prefilled again when it runs.
    fn forget(&mut self) {
        self.computed = 0;
        self.hit = 0;
        self.drew = false;
    }
}

struct Batch {
    no: PlanNo,
    steps: u32,
    /// Those that have not ended, in order.
    rows: Vec<Slot>,
    /// All it began with, in the same order.
    reports: Vec<RowReport>,
    done: u32,
    cut: Option<u32>,
    prefill: Micros,
    decode: Micros,
    peak: u64,
    idle: Micros,
    /// What its start costs, until its first iteration has begun.
    lead: Micros,
    /// The iteration under way: tokens of each row, and when it ends.
    iteration: Vec<(Slot, u32)>,
    ends: Micros,
    /// Blocks of its rows.
    used: u64,
}

/// A modelled worker. Feed it commands, wake it when it asks to be woken, send on what it puts out.
pub struct SliceWorker {
    spec: WorkerSpec,
    clock: Clock,
    kv: KvPool,
    /// Tokens are counted, and neither drawn nor named.
    counts: bool,
    slots: HashMap<RowKey, Slot>,
    rows: Vec<Row>,
    free: Vec<Slot>,
    running: Option<Batch>,
    plans: Plans,
    ended_at: Option<Micros>,
    iterations: u64,
    evicted: Tokens,
}

impl SliceWorker {
    /// An idle worker with an empty cache.
    pub fn new(spec: WorkerSpec, pace: impl Into<Pace>) -> Self {
        Self {
            kv: KvPool::new(spec.blocks.0),
            spec,
            clock: Clock::new(pace.into()),
            counts: false,
            slots: HashMap::new(),
            rows: Vec::new(),
            free: Vec::new(),
            running: None,
            plans: Plans::default(),
            ended_at: None,
            iterations: 0,
            evicted: Tokens::ZERO,
        }
    }

    /// Tokens are only counted, for long simulations of prompts that share nothing: there is no prefix cache, and all
    /// drawn ids are alike.
    #[must_use]
    pub fn counting(self) -> Self {
        Self { counts: true, ..self }
    }

    /// The batch that runs.
    pub fn running(&self) -> Option<PlanNo> {
        self.running.as_ref().map(|batch| batch.no)
    }

    /// Computed tokens whose KV was taken from rows that had not ended.
    pub fn evicted(&self) -> Tokens {
        self.evicted
    }

    /// Host time that the device has waited for.
    pub fn host(&self) -> Micros {
        self.clock.host()
    }

    /// When the iteration under way ends.
    pub fn next_wake(&self) -> Option<Micros> {
        self.running.as_ref().map(|batch| batch.ends)
    }

    /// What it announces.
    pub fn spec(&self) -> &WorkerSpec {
        &self.spec
    }

    /// (running rows, held rows, free blocks, blocks of running rows, blocks of held rows, cached blocks), each block
    /// once for every row that has it.
    pub fn load(&self) -> [u64; 6] {
        let sum = |running: bool| -> (u64, u64) {
            let rows =
                self.slots.values().map(|at| &self.rows[*at as usize]).filter(|row| row.line.is_some() == running);
            rows.fold((0, 0), |(n, blocks), row| (n + 1, blocks + row.blocks.0.len() as u64))
        };
        let ((running, running_blocks), (held, held_blocks)) = (sum(true), sum(false));
        [running, held, self.kv.free(), running_blocks, held_blocks, self.kv.cached()]
    }

    /// Iterations so far.
    pub fn iterations(&self) -> u64 {
        self.iterations
    }

    /// Takes a command and appends the answers.
    pub fn command(&mut self, now: Micros, command: Command, out: &mut Vec<WorkerMessage>) {
        match command {
            Command::Hello => {
                self.running = None;
                self.plans = Plans::default();
                self.slots.clear();
                self.free.clear();
                for mut row in std::mem::take(&mut self.rows) {
                    self.kv.release(&mut row.blocks);
                }
                self.ended_at = None;
                self.kv.stored.clear();
                self.kv.removed.clear();
                self.snapshot(out);
            }
            Command::Resync => {
                self.deltas(out);
                self.snapshot(out);
            }
            Command::Plan(plan, terms) => self.planned(now, (plan, terms), out),
            Command::Cut(batch, after) => {
                if let Some(running) = self.running.as_mut().filter(|running| running.no == batch) {
                    running.cut = Some(after.unwrap_or(0));
                }
            }
            Command::Drop(keys) => {
                for key in keys {
                    self.plans.strike(key);
                    let Some(at) = self.slots.get(&key).copied() else { continue };
                    let row = &self.rows[at as usize];
                    if let Some(batch) = &mut self.running
                        && let Some(report) = row.line.and_then(|line| batch.reports.get_mut(line as usize))
                    {
                        report.finish = Some(FinishReason::Cancelled);
                        report.held = false;
                        batch.rows.retain(|other| *other != at);
                        batch.used -= row.blocks.0.len() as u64;
                    }
                    self.end(at);
                }
            }
            Command::ReleaseKv(keys) => {
                for key in keys {
                    let Some(at) = self.slots.get(&key) else { continue };
                    let row = &mut self.rows[*at as usize];
                    if row.line.is_none() {
                        self.kv.release(&mut row.blocks);
                        row.forget();
                    }
                }
            }
        }
    }

    /// The iteration under way has ended; call at `next_wake`.
    pub fn wake(&mut self, now: Micros, out: &mut Vec<WorkerMessage>) {
        if self.running.as_ref().is_none_or(|batch| batch.ends > now) {
            return;
        }
        self.finish_iteration(out);
        self.advance(now, out);
    }

    // ---------------------------------------------------------------- plans

    fn planned(&mut self, now: Micros, told: Told, out: &mut Vec<WorkerMessage>) {
        if let Some((plan, terms)) = self.plans.arrive(told, self.running(), &self.spec, out) {
            self.start(now, plan, terms, out);
            self.advance(now, out);
        }
    }

    /// Starts a plan, or refuses it. `true` where a batch runs now.
    fn start(&mut self, now: Micros, plan: Plan, terms: Vec<(RowKey, Terms)>, out: &mut Vec<WorkerMessage>) -> bool {
        let Some(members) = self.plans.members(&plan, |key| self.slots.contains_key(key), out) else { return false };
        let size = self.spec.model.block_size;
        let kept = members.iter().map(|key| {
            let sequence = &self.rows[self.slots[key] as usize].sequence;
            (sequence.len(), sequence.total())
        });
        let added = plan.add.iter().map(|s| {
            let known = s.prompt.len() + s.output.len();
            (known, s.prompt.len() + s.max_tokens.0 as usize)
        });
        let need: u64 = kept.chain(added).map(|(tokens, total)| ceiling(tokens, plan.steps, total, size)).sum();
        if need > self.spec.blocks.0 || need > plan.ceiling.0 {
            let detail = format!("{need} blocks of {} with a ceiling of {}", self.spec.blocks.0, plan.ceiling.0);
            refuse(plan.no, Refusal::NoMemory, Vec::new(), detail, out);
            return false;
        }
        if members.len() + plan.add.len() > self.spec.max_rows as usize {
            refuse(plan.no, Refusal::TooManyRows, Vec::new(), "rows".into(), out);
            return false;
        }
        for (key, rank) in &plan.ranks {
            if let Some(at) = self.slots.get(key) {
                self.rows[*at as usize].rank = *rank;
            }
        }
        let mut rows: Vec<Slot> = members.iter().map(|key| self.slots[key]).collect();
        let mut terms: HashMap<RowKey, Terms> = terms.into_iter().collect();
        for start in plan.add {
            if let Some(before) = self.slots.get(&start.key).copied() {
                self.end(before);
            }
            let terms = terms.remove(&start.key).unwrap_or_default();
            let row = Row {
                sequence: if self.counts { Sequence::counted(&start, terms) } else { Sequence::new(&start, terms) },
                root: start.root,
                rank: start.hold_rank,
                budget: start.prefill_budget.0,
                blocks: RowBlocks::default(),
                chain: Vec::new(),
                computed: 0,
                hit: 0,
                drew: false,
                line: None,
            };
            let at = if let Some(at) = self.free.pop() {
                self.rows[at as usize] = row;
                at
            } else {
                self.rows.push(row);
                self.rows.len() as Slot - 1
            };
            self.slots.insert(start.key, at);
            rows.push(at);
        }
        self.plans.started();
        let mut reports = Vec::with_capacity(rows.len());
        let mut used = 0;
        for at in &rows {
            let row = &mut self.rows[*at as usize];
            row.line = Some(reports.len() as u32);
            used += row.blocks.0.len() as u64;
            reports.push(unreported(row.sequence.key));
        }
        let lead = self.clock.start();
        self.running = Some(Batch {
            no: plan.no,
            steps: plan.steps,
            reports,
            rows,
            done: 0,
            cut: None,
            prefill: Micros::ZERO,
            decode: Micros::ZERO,
            peak: 0,
            idle: self.ended_at.map_or(Micros::ZERO, |at| now.saturating_sub(at)),
            lead,
            iteration: Vec::new(),
            ends: now,
            used,
        });
        true
    }

    // ---------------------------------------------------------------- iterations

    /// Begins the next iteration, or ends the batch and begins the plan that stands.
    fn advance(&mut self, now: Micros, out: &mut Vec<WorkerMessage>) {
        loop {
            let Some(batch) = &self.running else { return };
            let end = if batch.rows.is_empty() {
                BatchEnd::AllDone
            } else if batch.done >= batch.steps {
                BatchEnd::Steps
            } else if batch.cut.is_some_and(|after| batch.done >= after) {
                BatchEnd::Cut
            } else {
                return self.begin_iteration(now);
            };
            self.end_batch(now, end, out);
        }
    }

    fn begin_iteration(&mut self, now: Micros) {
        let Some(mut batch) = self.running.take() else { return };
        let mut iteration = std::mem::take(&mut batch.iteration);
        let mut left = self.clock.chunk();
        let mut work = Iteration::default();
        let streams = batch.rows.iter().any(|at| self.rows[*at as usize].decodes());
        let size = self.spec.model.block_size.get();
        for at in &batch.rows {
            let mut row = &mut self.rows[*at as usize];
            let tokens = if row.decodes() {
                work.rows += 1;
                work.context += row.sequence.len() as u64;
                1
            } else {
                batch.used += self.extend_hit(*at, &mut batch.reports);
                row = &mut self.rows[*at as usize];
                let most = if streams && row.budget > 0 { row.budget.min(left) } else { left };
                let tokens = (row.wants() as u64).min(most);
                left -= tokens;
                work.prefill += tokens;
                // each attends all before it and itself
                work.pairs += tokens * row.computed as u64 + tokens * (tokens + 1) / 2;
                tokens
            };
            if tokens > 0 {
                iteration.push((*at, tokens as u32));
            }
        }
        // Blocks are taken when they are needed, not when the batch starts: what is cached stays as long as it can.
        for (at, tokens) in &iteration {
            let row = &mut self.rows[*at as usize];
            let (have, computed) = (row.blocks.0.len() as u64, row.computed as u64 + u64::from(*tokens));
            if have * size >= computed {
                continue;
            }
            for _ in have..computed.div_ceil(size) {
                while !self.kv.take(&mut self.rows[*at as usize].blocks) {
                    self.evict_held();
                }
                batch.used += 1;
            }
        }
        batch.peak = batch.peak.max(batch.used);
        let took = self.clock.iteration(&work);
        if work.prefill > 0 {
            batch.prefill += took;
        } else {
            batch.decode += took;
        }
        let lead = self.clock.waits(std::mem::take(&mut batch.lead));
        batch.idle += lead;
        batch.iteration = iteration;
        batch.ends = now + lead + took;
        self.running = Some(batch);
    }

    /// Takes from the cache what is there of the row's next whole blocks, and says how many. Asked before every chunk, so
    /// that a row finds what an earlier row of the same batch has just computed.
    fn extend_hit(&mut self, at: Slot, reports: &mut [RowReport]) -> u64 {
        let size = self.spec.model.block_size;
        let step = size.get() as usize;
        let row = &mut self.rows[at as usize];
        let most = (row.sequence.len() - 1) / step * step;
        let whole = row.computed.is_multiple_of(step) && row.blocks.0.len() * step == row.computed;
        if self.counts || row.drew || row.computed >= most || !whole {
            return 0;
        }
        let from = row.computed / step;
        row.chain(most, size);
        let found =
            row.chain[from..most / step].iter().take_while(|hash| self.kv.share(&mut row.blocks, **hash)).count();
        row.computed += found * step;
        row.hit += found * step;
        if let Some(report) = row.line.and_then(|line| reports.get_mut(line as usize)) {
            report.cached += Tokens((found * step) as u64);
        }
        found as u64
    }

    /// Under pressure the held row of the lowest rank loses its KV. One exists: the batch fits its ceiling alone.
    fn evict_held(&mut self) {
        let held = self.rows.iter_mut().filter(|row| row.line.is_none() && !row.blocks.0.is_empty());
        let row = held
            .min_by_key(|row| (row.rank, row.sequence.key))
            .expect("a batch within its ceiling always finds its blocks");
        self.evicted += Tokens(row.computed as u64);
        self.kv.release(&mut row.blocks);
        row.forget();
    }

    fn finish_iteration(&mut self, out: &mut Vec<WorkerMessage>) {
        let Some(mut batch) = self.running.take() else { return };
        batch.done += 1;
        self.iterations += 1;
        let size = self.spec.model.block_size;
        let step = size.get() as usize;
        let mut drawn = Vec::with_capacity(batch.iteration.len());
        let mut ended = false;
        for (at, tokens) in batch.iteration.drain(..) {
            let row = &mut self.rows[at as usize];
            // dropped while the iteration ran
            let Some(report) = row.line.and_then(|line| batch.reports.get_mut(line as usize)) else { continue };
            let full_before = row.computed / step;
            row.computed += tokens as usize;
            report.computed += Tokens(tokens.into());
            if !self.counts && row.computed / step > full_before {
                row.chain(row.computed, size);
                for at in full_before..row.computed / step {
                    self.kv.name(&mut row.blocks, at, row.chain[at]);
                }
            }
            if row.wants() > 0 {
                continue;
            }
            let cached = (!row.drew).then_some(Tokens(row.hit.min(row.sequence.prompt) as u64));
            row.drew = true;
            let token = row.sequence.draw(self.spec.model.vocab, cached);
            report.emitted += Tokens(1);
            report.finish = token.finish;
            if token.finish.is_some() {
                report.held = false;
                ended = true;
                batch.used -= row.blocks.0.len() as u64;
                self.end(at);
            }
            drawn.push(token);
        }
        if ended {
            batch.rows.retain(|at| self.rows[*at as usize].line.is_some());
        }
        let no = batch.no;
        self.running = Some(batch);
        self.deltas(out);
        if !drawn.is_empty() {
            out.push(WorkerMessage::Steps { batch: no, rows: drawn });
        }
    }

    fn end_batch(&mut self, now: Micros, end: BatchEnd, out: &mut Vec<WorkerMessage>) {
        let Some(batch) = self.running.take() else { return };
        self.deltas(out);
        self.ended_at = Some(now);
        let mut rows = batch.reports;
        for at in &batch.rows {
            let row = &mut self.rows[*at as usize];
            if let Some(report) = row.line.take().and_then(|line| rows.get_mut(line as usize)) {
                report.prefill_left = Tokens(if row.drew { 0 } else { row.wants() as u64 });
            }
        }
        rows.sort_unstable_by_key(|report| report.key);
        let survivors = batch.rows.iter().map(|at| self.rows[*at as usize].sequence.key).collect();
        let next = self.plans.batch_ended(batch.no, survivors);
        let started = next.and_then(|(plan, terms)| {
            let no = plan.no;
            self.start(now, plan, terms, out).then_some(no)
        });
        out.push(WorkerMessage::SliceReported(SliceReport {
            batch: batch.no,
            end,
            next: started,
            steps: batch.done,
            prefill: batch.prefill,
            decode: batch.decode,
            peak: Blocks(batch.peak),
            idle: batch.idle,
            pad: Tokens::ZERO,
            invalid: Tokens::ZERO,
            rows,
        }));
    }

    // ---------------------------------------------------------------- small things

    /// The row is gone, and its place free. A batch that runs has its report, and passes it over.
    fn end(&mut self, at: Slot) {
        let row = &mut self.rows[at as usize];
        let key = row.sequence.key;
        row.line = None;
        row.sequence.tokens = Vec::new();
        row.chain = Vec::new();
        self.kv.release(&mut row.blocks);
        self.slots.remove(&key);
        self.free.push(at);
        self.plans.row_ended(key);
    }

    fn deltas(&mut self, out: &mut Vec<WorkerMessage>) {
        let removed = std::mem::take(&mut self.kv.removed);
        let stored = std::mem::take(&mut self.kv.stored);
        if !removed.is_empty() || !stored.is_empty() {
            out.push(WorkerMessage::KvDelta { removed, stored });
        }
    }

    fn snapshot(&mut self, out: &mut Vec<WorkerMessage>) {
        out.push(WorkerMessage::Snapshot { chunk: 0, last: true, hashes: self.kv.hashes() });
    }
}

fn ceiling(tokens: usize, steps: u32, total: usize, size: BlockSize) -> u64 {
    Tokens(((tokens + steps as usize).min(total) - 1) as u64).blocks(size).0
}
