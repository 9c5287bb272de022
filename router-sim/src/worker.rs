//! A slice worker as a state machine: the Session contract of `ARCHITECTURE.md` without sockets, model or clock.

use std::collections::BTreeMap;

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
}

impl Row {
    /// Names of the whole blocks of its first `tokens` tokens.
    fn chain(&mut self, tokens: usize, size: BlockSize) -> &[BlockHash] {
        let step = size.get() as usize;
        let done = self.chain.len();
        if tokens / step > done {
            let parent = self.chain.last().copied().unwrap_or(self.root);
            self.chain.extend(hash_blocks(parent, &self.sequence.tokens[done * step..tokens], size));
        }
        &self.chain[..tokens / step]
    }

    /// Tokens that it knows and has not computed.
    fn wants(&self) -> usize {
        self.sequence.tokens.len() - self.computed
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
    rows: Vec<RowKey>,
    reports: BTreeMap<RowKey, RowReport>,
    done: u32,
    cut: Option<u32>,
    prefill: Micros,
    decode: Micros,
    peak: u64,
    idle: Micros,
    /// What its start costs, until its first iteration has begun.
    lead: Micros,
    /// The iteration under way: tokens of each row, and when it ends.
    iteration: Vec<(RowKey, usize)>,
    ends: Micros,
}

/// A modelled worker. Feed it commands, wake it when it asks to be woken, send on what it puts out.
pub struct SliceWorker {
    spec: WorkerSpec,
    clock: Clock,
    kv: KvPool,
    rows: HashMap<RowKey, Row>,
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
            rows: HashMap::new(),
            running: None,
            plans: Plans::default(),
            ended_at: None,
            iterations: 0,
            evicted: Tokens::ZERO,
        }
    }

    /// The batch that runs.
    pub fn running(&self) -> Option<PlanNo> {
        self.running.as_ref().map(|batch| batch.no)
    }

    /// Computed tokens whose KV was taken from rows that had not ended.
    pub fn evicted(&self) -> Tokens {
        self.evicted
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
        let runs = |key: &RowKey| self.running.as_ref().is_some_and(|batch| batch.rows.contains(key));
        let sum = |running: bool| -> (u64, u64) {
            let rows = self.rows.values().filter(|row| runs(&row.sequence.key) == running);
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
                for (_, mut row) in std::mem::take(&mut self.rows) {
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
                    if let Some(batch) = &mut self.running
                        && let Some(report) = batch.reports.get_mut(&key)
                    {
                        batch.rows.retain(|k| *k != key);
                        report.finish = report.finish.or(Some(FinishReason::Cancelled));
                        report.held = false;
                    }
                    self.end(key);
                }
            }
            Command::ReleaseKv(keys) => {
                for key in keys {
                    let runs = self.running.as_ref().is_some_and(|batch| batch.rows.contains(&key));
                    if let Some(row) = self.rows.get_mut(&key).filter(|_| !runs) {
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
        let Some(mut members) = self.plans.members(&plan, |key| self.rows.contains_key(key), out) else { return false };
        let size = self.spec.model.block_size;
        let kept = members.iter().map(|key| {
            let sequence = &self.rows[key].sequence;
            (sequence.tokens.len(), sequence.total())
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
            if let Some(row) = self.rows.get_mut(key) {
                row.rank = *rank;
            }
        }
        let mut terms: HashMap<RowKey, Terms> = terms.into_iter().collect();
        for start in plan.add {
            members.push(start.key);
            let row = Row {
                sequence: Sequence::new(&start, terms.remove(&start.key).unwrap_or_default()),
                root: start.root,
                rank: start.hold_rank,
                budget: start.prefill_budget.0,
                blocks: RowBlocks::default(),
                chain: Vec::new(),
                computed: 0,
                hit: 0,
                drew: false,
            };
            self.rows.insert(start.key, row);
        }
        self.plans.started();
        let lead = self.clock.start();
        self.running = Some(Batch {
            no: plan.no,
            steps: plan.steps,
            reports: members.iter().map(|key| (*key, unreported(*key))).collect(),
            rows: members,
            done: 0,
            cut: None,
            prefill: Micros::ZERO,
            decode: Micros::ZERO,
            peak: 0,
            idle: self.ended_at.map_or(Micros::ZERO, |at| now.saturating_sub(at)),
            lead,
            iteration: Vec::new(),
            ends: now,
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
        let streams = batch.rows.iter().any(|key| self.rows[key].decodes());
        for key in &batch.rows {
            self.extend_hit(*key, &mut batch.reports);
            let row = &self.rows[key];
            let known = row.sequence.tokens.len() as u64;
            let tokens = if row.decodes() {
                work.rows += 1;
                work.context += known;
                1
            } else {
                let most = if streams && row.budget > 0 { row.budget.min(left) } else { left };
                let tokens = (row.wants() as u64).min(most);
                left -= tokens;
                work.prefill += tokens;
                // each attends all before it and itself
                work.pairs += tokens * row.computed as u64 + tokens * (tokens + 1) / 2;
                tokens as usize
            };
            if tokens > 0 {
                iteration.push((*key, tokens));
            }
        }
        // Blocks are taken when they are needed, not when the batch starts: what is cached stays as long as it can.
        for (key, tokens) in &iteration {
            let need = (self.rows[key].computed + tokens).div_ceil(self.spec.model.block_size.get() as usize);
            while self.rows[key].blocks.0.len() < need {
                let row = self.rows.get_mut(key).expect("a row of the batch");
                if !self.kv.take(&mut row.blocks) {
                    self.evict_held(&batch.rows);
                }
            }
        }
        let used: u64 = batch.rows.iter().map(|key| self.rows[key].blocks.0.len() as u64).sum();
        batch.peak = batch.peak.max(used);
        let took = self.clock.iteration(&work);
        if work.prefill > 0 {
            batch.prefill += took;
        } else {
            batch.decode += took;
        }
        let lead = std::mem::take(&mut batch.lead);
        batch.idle += lead;
        batch.iteration = iteration;
        batch.ends = now + lead + took;
        self.running = Some(batch);
    }

    /// Takes from the cache what is there of the row's next whole blocks. Asked before every chunk, so that a row
    /// finds what an earlier row of the same batch has just computed.
    fn extend_hit(&mut self, key: RowKey, reports: &mut BTreeMap<RowKey, RowReport>) {
        let size = self.spec.model.block_size;
        let step = size.get() as usize;
        let Some(row) = self.rows.get_mut(&key) else { return };
        let most = (row.sequence.tokens.len() - 1) / step * step;
        if row.drew || row.computed % step != 0 || row.computed >= most || row.blocks.0.len() * step != row.computed {
            return;
        }
        let from = row.computed / step;
        let next: Vec<BlockHash> = row.chain(most, size)[from..].to_vec();
        for hash in next {
            if !self.kv.share(&mut row.blocks, hash) {
                break;
            }
            row.computed += step;
            row.hit += step;
            if let Some(report) = reports.get_mut(&key) {
                report.cached += Tokens(step as u64);
            }
        }
    }

    /// Under pressure the held row of the lowest rank loses its KV. One exists: the batch fits its ceiling alone.
    fn evict_held(&mut self, running: &[RowKey]) {
        let victim = self
            .rows
            .values()
            .filter(|row| !running.contains(&row.sequence.key) && !row.blocks.0.is_empty())
            .min_by_key(|row| (row.rank, row.sequence.key))
            .map(|row| row.sequence.key)
            .expect("a batch within its ceiling always finds its blocks");
        let row = self.rows.get_mut(&victim).expect("just found");
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
        let mut drawn = Vec::new();
        for (key, tokens) in batch.iteration.drain(..) {
            // dropped while the iteration ran
            let (Some(row), Some(report)) = (self.rows.get_mut(&key), batch.reports.get_mut(&key)) else { continue };
            let full_before = row.computed / step;
            row.computed += tokens;
            report.computed += Tokens(tokens as u64);
            if row.computed / step > full_before {
                let named = row.chain(row.computed, size)[full_before..].to_vec();
                for (at, hash) in (full_before..).zip(named) {
                    self.kv.name(&mut row.blocks, at, hash);
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
                batch.rows.retain(|k| *k != key);
                if let Some(mut row) = self.rows.remove(&key) {
                    self.kv.release(&mut row.blocks);
                    self.plans.row_ended(key);
                }
            }
            drawn.push(token);
        }
        self.running = Some(batch);
        self.deltas(out);
        if !drawn.is_empty() {
            let batch = self.running.as_ref().map_or(PlanNo(0), |batch| batch.no);
            out.push(WorkerMessage::Steps { batch, rows: drawn });
        }
    }

    fn end_batch(&mut self, now: Micros, end: BatchEnd, out: &mut Vec<WorkerMessage>) {
        let Some(batch) = self.running.take() else { return };
        self.deltas(out);
        self.ended_at = Some(now);
        let mut rows: Vec<RowReport> = batch.reports.into_values().collect();
        for report in &mut rows {
            if let Some(row) = self.rows.get(&report.key) {
                report.prefill_left = Tokens(if row.drew { 0 } else { row.wants() as u64 });
            }
        }
        let next = self.plans.batch_ended(batch.no, batch.rows);
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

    fn end(&mut self, key: RowKey) {
        if let Some(mut row) = self.rows.remove(&key) {
            self.kv.release(&mut row.blocks);
            self.plans.row_ended(key);
        }
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
