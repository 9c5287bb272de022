//! A worker that pads, as a state machine: one rectangle a batch, its prompts computed in one pass, then a step an
//! iteration until all rows have ended or the steps are done. No row joins or leaves, no KV outlives the batch.
//!
//! Of the Session contract it keeps all that is not about KV blocks: it names none, so its snapshot is empty.

use hashbrown::HashMap;
use router_core::{
    BatchEnd, BlockSize, Blocks, FinishReason, Iteration, Micros, Plan, PlanNo, Refusal, RowKey, RowReport, RowTokens,
    SliceReport, Tokens, WorkerMessage, WorkerSpec,
};

use crate::plans::{Plans, Told, refuse};
use crate::sequence::{Sequence, Terms, unreported};
use crate::timing::{Clock, Pace};
use crate::worker::Command;

/// A row's place in the rectangle; it stays when the row has ended.
struct Lane {
    report: RowReport,
    live: bool,
    /// Tokens drawn and not told yet.
    drawn: Option<RowTokens>,
}

struct Rectangle {
    no: PlanNo,
    steps: u32,
    lanes: Vec<Lane>,
    live: usize,
    /// Tokens of the longest row; of one that has ended, those that were computed.
    longest: u64,
    done: u32,
    cut: Option<u32>,
    prefill: Micros,
    decode: Micros,
    peak: Blocks,
    idle: Micros,
    /// What its start costs, until its first iteration has begun.
    lead: Micros,
    pad: Tokens,
    invalid: Tokens,
    ends: Micros,
}

/// A modelled worker of layout `Padded`. Feed it commands, wake it when it asks to be woken, send on what it puts out.
pub struct StaticWorker {
    spec: WorkerSpec,
    clock: Clock,
    /// Tokens come out every so many iterations, and at the batch's end.
    told_every: u32,
    /// Tokens are counted and not drawn.
    counts: bool,
    rows: HashMap<RowKey, Sequence>,
    running: Option<Rectangle>,
    plans: Plans,
    ended_at: Option<Micros>,
    iterations: u64,
    dropped: Tokens,
}

impl StaticWorker {
    /// An idle worker that tells of every iteration.
    pub fn new(spec: WorkerSpec, pace: impl Into<Pace>) -> Self {
        Self {
            spec,
            clock: Clock::new(pace.into()),
            told_every: 1,
            counts: false,
            rows: HashMap::new(),
            running: None,
            plans: Plans::default(),
            ended_at: None,
            iterations: 0,
            dropped: Tokens::ZERO,
        }
    }

    /// Tells of the first iteration, of every so many, and of the last: long simulations have fewer messages.
    #[must_use]
    pub fn telling_every(self, iterations: u32) -> Self {
        Self { told_every: iterations.max(1), ..self }
    }

    /// See [`crate::SliceWorker::counting`].
    #[must_use]
    pub fn counting(self) -> Self {
        Self { counts: true, ..self }
    }

    /// The batch that runs.
    pub fn running(&self) -> Option<PlanNo> {
        self.running.as_ref().map(|batch| batch.no)
    }

    /// Computed tokens whose KV was dropped at a batch's end with their rows unfinished.
    pub fn evicted(&self) -> Tokens {
        self.dropped
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

    /// Iterations so far.
    pub fn iterations(&self) -> u64 {
        self.iterations
    }

    /// As [`crate::SliceWorker::load`]; nothing is held or cached.
    pub fn load(&self) -> [u64; 6] {
        let running = self.running.as_ref().map_or(0, |batch| batch.live as u64);
        let used = self.running.as_ref().map_or(0, |batch| batch.peak.0);
        [running, self.rows.len() as u64 - running, self.spec.blocks.0.saturating_sub(used), used, 0, 0]
    }

    /// Takes a command and appends the answers.
    pub fn command(&mut self, now: Micros, command: Command, out: &mut Vec<WorkerMessage>) {
        match command {
            Command::Hello => {
                self.running = None;
                self.plans = Plans::default();
                self.rows.clear();
                self.ended_at = None;
                snapshot(out);
            }
            Command::Resync => snapshot(out),
            Command::Plan(plan, terms) => self.planned(now, (plan, terms), out),
            Command::Cut(batch, after) => {
                if let Some(running) = self.running.as_mut().filter(|running| running.no == batch) {
                    running.cut = Some(after.unwrap_or(0));
                }
            }
            Command::Drop(keys) => {
                for key in keys {
                    self.plans.strike(key);
                    let lanes = self.running.iter_mut().flat_map(|batch| &mut batch.lanes);
                    for lane in lanes.filter(|lane| lane.report.key == key) {
                        lane.report.finish = lane.report.finish.or(Some(FinishReason::Cancelled));
                        lane.report.held = false;
                        lane.drawn = None;
                    }
                    self.end(key);
                }
            }
            // what does not run has no KV
            Command::ReleaseKv(_) => {}
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

    fn planned(&mut self, now: Micros, told: Told, out: &mut Vec<WorkerMessage>) {
        if let Some((plan, terms)) = self.plans.arrive(told, self.running(), &self.spec, out) {
            self.start(now, plan, terms, out);
            self.advance(now, out);
        }
    }

    /// Starts a plan, or refuses it. `true` where a batch runs now.
    fn start(&mut self, now: Micros, plan: Plan, terms: Vec<(RowKey, Terms)>, out: &mut Vec<WorkerMessage>) -> bool {
        let Some(mut members) = self.plans.members(&plan, |key| self.rows.contains_key(key), out) else { return false };
        let kept = members.iter().map(|key| {
            let sequence = &self.rows[key];
            (sequence.len(), sequence.total())
        });
        let added = plan.add.iter().map(|start| {
            let known = start.prompt.len() + start.output.len();
            (known, start.prompt.len() + start.max_tokens.0 as usize)
        });
        let rows = members.len() + plan.add.len();
        let need = ceiling(kept.chain(added), rows, plan.steps, self.spec.model.block_size);
        if need > self.spec.blocks.0 || need > plan.ceiling.0 {
            let detail = format!("{need} blocks of {} with a ceiling of {}", self.spec.blocks.0, plan.ceiling.0);
            refuse(plan.no, Refusal::NoMemory, Vec::new(), detail, out);
            return false;
        }
        if rows > self.spec.max_rows as usize {
            refuse(plan.no, Refusal::TooManyRows, Vec::new(), "rows".into(), out);
            return false;
        }
        let mut terms: HashMap<RowKey, Terms> = terms.into_iter().collect();
        for start in plan.add {
            members.push(start.key);
            let terms = terms.remove(&start.key).unwrap_or_default();
            let sequence = if self.counts { Sequence::counted(&start, terms) } else { Sequence::new(&start, terms) };
            self.rows.insert(start.key, sequence);
        }
        self.plans.started();
        let length = |key: &RowKey| self.rows[key].len() as u64;
        let longest = members.iter().map(length).max().unwrap_or(0);
        self.running = Some(Rectangle {
            no: plan.no,
            steps: plan.steps,
            live: members.len(),
            longest,
            pad: Tokens(members.iter().map(|key| longest - length(key)).sum()),
            lanes: members.iter().map(|key| Lane { report: unreported(*key), live: true, drawn: None }).collect(),
            done: 0,
            cut: None,
            prefill: Micros::ZERO,
            decode: Micros::ZERO,
            peak: Blocks::ZERO,
            idle: self.ended_at.map_or(Micros::ZERO, |at| now.saturating_sub(at)),
            lead: self.clock.start(),
            invalid: Tokens::ZERO,
            ends: now,
        });
        true
    }

    /// Begins the next iteration, or ends the batch and begins the plan that stands.
    fn advance(&mut self, now: Micros, out: &mut Vec<WorkerMessage>) {
        loop {
            let Some(batch) = &self.running else { return };
            let end = if batch.live == 0 {
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
        let Some(batch) = &mut self.running else { return };
        let (rows, longest) = (batch.lanes.len() as u64, batch.longest);
        batch.peak = Blocks(rows * Tokens(longest).blocks(self.spec.model.block_size).0);
        let took = if batch.done == 0 {
            let (prefill, pairs) = (rows * longest, rows * longest * (longest + 1) / 2);
            let took = self.clock.iteration(&Iteration { rows, longest, prefill, pairs, context: 0 });
            batch.prefill += took;
            took
        } else {
            let work = Iteration { rows, longest, context: rows * longest, ..Iteration::default() };
            let took = self.clock.iteration(&work);
            batch.decode += took;
            took
        };
        let lead = self.clock.waits(std::mem::take(&mut batch.lead));
        batch.idle += lead;
        batch.ends = now + lead + took;
    }

    fn finish_iteration(&mut self, out: &mut Vec<WorkerMessage>) {
        let Some(batch) = &mut self.running else { return };
        batch.done += 1;
        self.iterations += 1;
        if batch.done > 1 {
            batch.invalid += Tokens((batch.lanes.len() - batch.live) as u64);
        }
        for lane in batch.lanes.iter_mut().filter(|lane| lane.live) {
            let key = lane.report.key;
            let Some(sequence) = self.rows.get_mut(&key) else { continue };
            lane.report.computed += Tokens(if batch.done == 1 { sequence.len() as u64 } else { 1 });
            let token = sequence.draw(self.spec.model.vocab, (batch.done == 1).then_some(Tokens::ZERO));
            lane.report.emitted += Tokens(1);
            lane.report.finish = token.finish;
            if token.finish.is_some() {
                lane.report.held = false;
                lane.live = false;
                batch.live -= 1;
                self.rows.remove(&key);
                self.plans.row_ended(key);
            } else {
                batch.longest = batch.longest.max(sequence.len() as u64);
            }
            match &mut lane.drawn {
                None => lane.drawn = Some(token),
                Some(drawn) => {
                    drawn.ids.extend(token.ids);
                    drawn.logprobs.extend(token.logprobs);
                    drawn.finish = token.finish;
                }
            }
        }
        if batch.done == 1 || batch.done % self.told_every == 0 {
            self.tell(out);
        }
    }

    /// Says what was drawn.
    fn tell(&mut self, out: &mut Vec<WorkerMessage>) {
        let Some(batch) = &mut self.running else { return };
        let rows: Vec<RowTokens> = batch.lanes.iter_mut().filter_map(|lane| lane.drawn.take()).collect();
        if !rows.is_empty() {
            out.push(WorkerMessage::Steps { batch: batch.no, rows });
        }
    }

    fn end_batch(&mut self, now: Micros, end: BatchEnd, out: &mut Vec<WorkerMessage>) {
        self.tell(out);
        let Some(batch) = self.running.take() else { return };
        self.ended_at = Some(now);
        let mut rows = Vec::with_capacity(batch.lanes.len());
        let mut survivors = Vec::new();
        for Lane { mut report, .. } in batch.lanes {
            if let Some(sequence) = self.rows.get(&report.key).filter(|_| report.finish.is_none()) {
                self.dropped += Tokens(sequence.len() as u64 - u64::from(batch.done > 0));
                report.held = false;
                report.prefill_left = Tokens(sequence.len() as u64);
                survivors.push(report.key);
            }
            rows.push(report);
        }
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
            peak: batch.peak,
            idle: batch.idle,
            pad: batch.pad,
            invalid: batch.invalid,
            rows,
        }));
    }

    fn end(&mut self, key: RowKey) {
        if self.rows.remove(&key).is_none() {
            return;
        }
        self.plans.row_ended(key);
        let Some(batch) = &mut self.running else { return };
        for lane in batch.lanes.iter_mut().filter(|lane| lane.report.key == key && lane.live) {
            lane.live = false;
            batch.live -= 1;
        }
    }
}

/// Blocks of a rectangle as long as its longest row can become.
fn ceiling(rows: impl Iterator<Item = (usize, usize)>, count: usize, steps: u32, size: BlockSize) -> u64 {
    let positions = rows.map(|(tokens, total)| (tokens + steps as usize).min(total) - 1).max().unwrap_or(0);
    count as u64 * Tokens(positions as u64).blocks(size).0
}

fn snapshot(out: &mut Vec<WorkerMessage>) {
    out.push(WorkerMessage::Snapshot { chunk: 0, last: true, hashes: Vec::new() });
}
