//! A slice worker as a state machine: the Session contract of `ARCHITECTURE.md` without sockets, model or clock.
//!
//! Its tokens are a function of the token before and its place, so every run of a row can be checked against any other.

use std::collections::BTreeMap;

use hashbrown::{HashMap, HashSet};
use router_core::{
    BatchEnd, BlockHash, BlockSize, Blocks, FinishReason, Keep, Micros, Plan, PlanNo, Refusal, RowKey, RowReport,
    RowStart, RowTokens, SliceReport, TokenLogprobs, Tokens, WorkerMessage, WorkerSpec, hash_blocks,
};

use crate::kv::{KvPool, RowBlocks};
use crate::timing::Timing;

/// The token after `previous`, which stands at `position` of prompt and output. Never below 3, so never an eos.
pub fn next_token(previous: u32, position: usize, vocab: u32) -> u32 {
    let mut x = ((u64::from(previous) << 32) | position as u64).wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    3 + ((x ^ (x >> 31)) % u64::from(vocab.max(4) - 3)) as u32
}

/// What a row asks for beyond what the core knows of it.
#[derive(Clone, Debug, Default)]
pub struct Terms {
    /// Ids that end it, from index `min_tokens` on.
    pub stop_ids: Vec<u32>,
    /// Tokens it draws at least.
    pub min_tokens: u32,
    /// Logprobs of its tokens, with so many of the most likely ids.
    pub logprobs: Option<u32>,
}

/// There is no model, so likelihoods are made up: of rank r, from 0, is the id r above the drawn one, half as likely as
/// the one before it.
fn made_up_logprobs(id: u32, top: u32, vocab: u32) -> TokenLogprobs {
    let of_rank = |rank: u32| -(rank as f32 + 1.0) * std::f32::consts::LN_2;
    let id_of_rank = |rank: u32| (u64::from(id) + u64::from(rank)) % u64::from(vocab);
    let top = (0..top.min(vocab)).map(|rank| (id_of_rank(rank) as u32, of_rank(rank))).collect();
    TokenLogprobs { chosen: of_rank(0), top }
}

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
    key: RowKey,
    root: BlockHash,
    tokens: Vec<u32>,
    prompt: usize,
    max_tokens: usize,
    terms: Terms,
    rank: u64,
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
    fn output(&self) -> usize {
        self.tokens.len() - self.prompt
    }

    /// Names of the whole blocks of its first `tokens` tokens.
    fn chain(&mut self, tokens: usize, size: BlockSize) -> &[BlockHash] {
        let step = size.get() as usize;
        let done = self.chain.len();
        if tokens / step > done {
            let parent = self.chain.last().copied().unwrap_or(self.root);
            self.chain.extend(hash_blocks(parent, &self.tokens[done * step..tokens], size));
        }
        &self.chain[..tokens / step]
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
    /// The iteration under way: tokens of each row, when it began and when it ends.
    iteration: Vec<(RowKey, usize)>,
    began: Micros,
    ends: Micros,
}

/// A modelled worker. Feed it commands, wake it when it asks to be woken, send on what it puts out.
pub struct SliceWorker {
    spec: WorkerSpec,
    timing: Timing,
    kv: KvPool,
    rows: HashMap<RowKey, Row>,
    running: Option<Batch>,
    standing: Option<(Plan, Vec<(RowKey, Terms)>)>,
    last_ended: PlanNo,
    ended_at: Option<Micros>,
    /// Rows of the last batch that did not finish, in its order.
    survivors: Vec<RowKey>,
    /// Rows that ended since the last batch started: a plan may still list them.
    ended: HashSet<RowKey>,
    iterations: u64,
}

impl SliceWorker {
    /// An idle worker with an empty cache.
    pub fn new(spec: WorkerSpec, timing: Timing) -> Self {
        Self {
            kv: KvPool::new(spec.blocks.0),
            spec,
            timing,
            rows: HashMap::new(),
            running: None,
            standing: None,
            last_ended: PlanNo(0),
            ended_at: None,
            survivors: Vec::new(),
            ended: HashSet::new(),
            iterations: 0,
        }
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
            let rows = self.rows.values().filter(|row| runs(&row.key) == running);
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
                self.standing = None;
                for (_, mut row) in std::mem::take(&mut self.rows) {
                    self.kv.release(&mut row.blocks);
                }
                self.ended.clear();
                self.survivors.clear();
                self.last_ended = PlanNo(0);
                self.ended_at = None;
                self.kv.stored.clear();
                self.kv.removed.clear();
                self.snapshot(out);
            }
            Command::Resync => {
                self.deltas(out);
                self.snapshot(out);
            }
            Command::Plan(plan, terms) => self.planned(now, plan, terms, out),
            Command::Cut(batch, after) => {
                if let Some(running) = self.running.as_mut().filter(|running| running.no == batch) {
                    running.cut = Some(after.unwrap_or(0));
                }
            }
            Command::Drop(keys) => {
                for key in keys {
                    if let Some((plan, _)) = &mut self.standing {
                        plan.add.retain(|start| start.key != key);
                        if let Keep::List(list) = &mut plan.keep {
                            list.retain(|k| *k != key);
                        }
                    }
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

    fn planned(&mut self, now: Micros, plan: Plan, terms: Vec<(RowKey, Terms)>, out: &mut Vec<WorkerMessage>) {
        if plan.steps == 0 {
            return refuse(plan.no, Refusal::Unsupported, Vec::new(), "steps".into(), out);
        }
        if let Some(bad) = plan.add.iter().find(|start| self.invalid(start)) {
            return refuse(plan.no, Refusal::Unsupported, vec![bad.key], "prompt_ids or max_tokens".into(), out);
        }
        let base_runs = self.running.as_ref().is_some_and(|batch| batch.no == plan.base);
        let newer = self.standing.as_ref().is_none_or(|(standing, _)| standing.no < plan.no);
        if base_runs && newer {
            self.standing = Some((plan, terms));
        } else if self.running.is_none() && plan.base == self.last_ended {
            self.start(now, plan, terms, out);
            self.advance(now, out);
        } else {
            refuse(plan.no, Refusal::Stale, Vec::new(), format!("base {} does not run", plan.base), out);
        }
    }

    fn invalid(&self, start: &RowStart) -> bool {
        let total = start.prompt.len() as u64 + start.max_tokens.0;
        start.prompt.is_empty()
            || start.max_tokens.0 <= start.output.len() as u64
            || total > self.spec.max_context.0
            || start.prompt.iter().chain(&start.output).any(|id| *id >= self.spec.model.vocab)
    }

    /// Starts a plan, or refuses it. `true` where a batch runs now.
    fn start(&mut self, now: Micros, plan: Plan, terms: Vec<(RowKey, Terms)>, out: &mut Vec<WorkerMessage>) -> bool {
        let mut members = match &plan.keep {
            Keep::List(list) => {
                let unknown: Vec<RowKey> =
                    list.iter().filter(|k| !self.rows.contains_key(*k) && !self.ended.contains(*k)).copied().collect();
                if !unknown.is_empty() {
                    refuse(plan.no, Refusal::UnknownRow, unknown, "keep_rows".into(), out);
                    return false;
                }
                list.clone()
            }
            Keep::Survivors => self.survivors.clone(),
        };
        members.retain(|key| self.rows.contains_key(key) && !plan.leave.contains(key));
        let size = self.spec.model.block_size;
        let kept = members.iter().map(|key| {
            let row = &self.rows[key];
            (row.tokens.len(), row.prompt + row.max_tokens)
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
            let prompt = start.prompt.len();
            let tokens: Vec<u32> = start.prompt.iter().chain(&start.output).copied().collect();
            let row = Row {
                key: start.key,
                root: start.root,
                tokens,
                prompt,
                max_tokens: start.max_tokens.0 as usize,
                terms: terms.remove(&start.key).unwrap_or_default(),
                rank: start.hold_rank,
                blocks: RowBlocks::default(),
                chain: Vec::new(),
                computed: 0,
                hit: 0,
                drew: false,
            };
            self.rows.insert(start.key, row);
        }
        self.ended.clear();
        let report = |key: &RowKey| {
            let report = RowReport {
                key: *key,
                computed: Tokens::ZERO,
                cached: Tokens::ZERO,
                emitted: Tokens::ZERO,
                finish: None,
                held: true,
                prefill_left: Tokens::ZERO,
            };
            (*key, report)
        };
        self.running = Some(Batch {
            no: plan.no,
            steps: plan.steps,
            reports: members.iter().map(report).collect(),
            rows: members,
            done: 0,
            cut: None,
            prefill: Micros::ZERO,
            decode: Micros::ZERO,
            peak: 0,
            idle: self.ended_at.map_or(Micros::ZERO, |at| now.saturating_sub(at)),
            iteration: Vec::new(),
            began: now,
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
        let mut budget = self.timing.chunk_tokens as usize;
        let mut prefill = 0;
        batch.iteration.clear();
        for key in &batch.rows {
            self.extend_hit(*key, &mut batch.reports);
            let row = &self.rows[key];
            let want = row.tokens.len() - row.computed;
            let tokens = if want == 1 && row.drew { 1 } else { want.min(budget) };
            if want > 1 || !row.drew {
                budget -= tokens;
                prefill += tokens;
            }
            if tokens > 0 {
                batch.iteration.push((*key, tokens));
            }
        }
        // Blocks are taken when they are needed, not when the batch starts: what is cached stays as long as it can.
        for (key, tokens) in batch.iteration.clone() {
            let need = (self.rows[&key].computed + tokens).div_ceil(self.spec.model.block_size.get() as usize);
            while self.rows[&key].blocks.0.len() < need {
                let row = self.rows.get_mut(&key).expect("a row of the batch");
                if !self.kv.take(&mut row.blocks) {
                    self.evict_held(&batch.rows);
                }
            }
        }
        let used: u64 = batch.rows.iter().map(|key| self.rows[key].blocks.0.len() as u64).sum();
        batch.peak = batch.peak.max(used);
        let took = self.timing.iteration(batch.iteration.len() as u64, prefill as u64);
        if prefill > 0 {
            batch.prefill += took;
        } else {
            batch.decode += took;
        }
        batch.began = now;
        batch.ends = now + took;
        self.running = Some(batch);
    }

    /// Takes from the cache what is there of the row's next whole blocks. Asked before every chunk, so that a row
    /// finds what an earlier row of the same batch has just computed.
    fn extend_hit(&mut self, key: RowKey, reports: &mut BTreeMap<RowKey, RowReport>) {
        let size = self.spec.model.block_size;
        let step = size.get() as usize;
        let Some(row) = self.rows.get_mut(&key) else { return };
        let most = (row.tokens.len() - 1) / step * step;
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
            .filter(|row| !running.contains(&row.key) && !row.blocks.0.is_empty())
            .min_by_key(|row| (row.rank, row.key))
            .map(|row| row.key)
            .expect("a batch within its ceiling always finds its blocks");
        let row = self.rows.get_mut(&victim).expect("just found");
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
        for (key, tokens) in std::mem::take(&mut batch.iteration) {
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
            if row.computed < row.tokens.len() {
                continue;
            }
            let position = row.tokens.len() - 1;
            let id = next_token(row.tokens[position], position, self.spec.model.vocab);
            let first_index = row.output() as u32;
            row.tokens.push(id);
            report.emitted += Tokens(1);
            let cached = (!row.drew).then_some(Tokens(row.hit.min(row.prompt) as u64));
            row.drew = true;
            let stops = row.terms.stop_ids.contains(&id) && first_index >= row.terms.min_tokens;
            let finish = if stops {
                Some(FinishReason::Stop)
            } else {
                (row.output() >= row.max_tokens).then_some(FinishReason::Length)
            };
            report.finish = finish;
            let asked = row.terms.logprobs.iter();
            let logprobs = asked.map(|top| made_up_logprobs(id, *top, self.spec.model.vocab)).collect();
            drawn.push(RowTokens { key, first_index, ids: vec![id], logprobs, finish, cached });
            if finish.is_some() {
                report.held = false;
                batch.rows.retain(|k| *k != key);
                self.end(key);
            }
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
        self.last_ended = batch.no;
        self.ended_at = Some(now);
        let mut rows: Vec<RowReport> = batch.reports.into_values().collect();
        for report in &mut rows {
            if let Some(row) = self.rows.get(&report.key) {
                let left = row.tokens.len() - row.computed;
                report.prefill_left = Tokens(if row.drew { 0 } else { left as u64 });
            }
        }
        self.survivors = batch.rows;
        let started = match self.standing.take() {
            Some((plan, terms)) if plan.base == batch.no => {
                let no = plan.no;
                self.start(now, plan, terms, out).then_some(no)
            }
            _ => None,
        };
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
            self.ended.insert(key);
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

fn refuse(plan: PlanNo, reason: Refusal, rows: Vec<RowKey>, detail: String, out: &mut Vec<WorkerMessage>) {
    out.push(WorkerMessage::Refused { plan, reason, rows, detail });
}
