//! Slice workers behind the core's `Scheduler`, in virtual time, lean enough for a million requests: a prompt is made when
//! its request arrives and gone when it ends, and of tokens only times are kept.

use std::sync::Arc;

use router_core::{
    BlockHash, BlockSize, Blocks, Config, Epoch, Layout, Micros, Mode, ModelSpec, Moves, NewRequest, RequestId, Tokens,
    WorkerId, WorkerSpec,
};

use crate::driver::Simulation;
use crate::random::{Random, mix};
use crate::run::{Fleet, Run, RunError, Sessions, System};
use crate::served::{Record, Sample};
use crate::timing::{Host, Pace};
use crate::trace::{Trace, TraceRequest};

const VOCAB: u32 = 1 << 16;
/// Tokens of a block where the trace has none.
const BLOCK: u32 = 16;
/// A padded worker's memory is used up to this part: it has no blocks to fill the gaps with. [arXiv 2406.13511: a margin for
/// fragmentation]
const ZETA: f64 = 0.9;
/// A message's way, besides the fleet's delay.
const LINK: Micros = Micros(200);
/// Samples after which the time between them doubles.
const MANY_SAMPLES: usize = 1 << 13;
/// Things that happen between two looks at the progress.
const LOOK: u32 = 1 << 14;

pub(crate) fn run(run: &Run<'_>, progress: &mut dyn FnMut(f64) -> bool) -> Result<Record, RunError> {
    let System::Scheduled { mode, policy, slice_len } = run.system else { return Err(RunError::NoWorkers) };
    let fleet = &run.fleet;
    if fleet.workers == 0 {
        return Err(RunError::NoWorkers);
    }
    let size = run.trace.block_size.or(BlockSize::new(BLOCK)).ok_or(RunError::NoWorkers)?;
    let model =
        ModelSpec { digest: fleet.device.name.clone(), tokenizer: "none".into(), block_size: size, vocab: VOCAB };
    let config = Config { policy, mode, slice_len, seed: run.seed, max_rows: usize::MAX >> 1 };
    let mut sim = Simulation::new(model.clone(), config, LINK).with_ledger().with_lag(fleet.delay);
    if run.trace.block_size.is_none() {
        sim = sim.counting();
    }
    // workers answer hello before the first request comes
    let ahead = LINK + LINK + fleet.delay + Micros(1);
    let joins = (0..fleet.workers).map(|_| Micros::ZERO).chain(fleet.joined.iter().map(|at| *at + ahead));
    for (slot, at) in (0..).zip(joins) {
        let (spec, pace) = worker(fleet, mode, &model, slot, run.seed);
        sim.join(at, spec, pace);
    }
    for (at, worker) in &fleet.lost {
        sim.kill(*at + ahead, WorkerId(*worker));
    }
    let record = Arrivals::new(run, size, ahead).serve(sim, run, progress);
    Ok(record)
}

/// A worker of the mode's kind, and its pace.
fn worker(fleet: &Fleet, mode: Mode, model: &ModelSpec, slot: u32, seed: u64) -> (WorkerSpec, Pace) {
    let device = &fleet.device;
    let h = device.host;
    let (layout, part, start, host) = match mode {
        Mode::Pooled(_) => (Layout::Padded, ZETA, device.start, Host::every(h)),
        Mode::Slice => (Layout::Paged, 1.0, device.start, Host::slices(h)),
        // an iteration's host time is all that a plan an iteration costs
        Mode::Ils => (Layout::Paged, 1.0, Micros::ZERO, Host::every(h)),
    };
    let pace = Pace { start, ..device.pace(host) }.with_noise(fleet.noise_of(slot, seed));
    let spec = WorkerSpec {
        name: device.name.clone(),
        epoch: Epoch(1),
        model: model.clone(),
        blocks: Blocks((device.kv.0 as f64 * part) as u64 / model.block_size.get()),
        max_rows: device.max_rows,
        // memory is what bounds a row
        max_context: Tokens(u64::from(u32::MAX)),
        chunk: Tokens(device.chunk.into()),
        layout,
        cost: Some(device.cost_model(layout, host)).filter(|model| model.layout() == layout),
    };
    (spec, pace)
}

/// Requests still to come.
struct Arrivals<'a> {
    trace: &'a Trace,
    /// Later than in the trace by this.
    ahead: Micros,
    size: BlockSize,
    limit: u32,
    seed: u64,
    /// The next by time.
    cursor: usize,
    /// The next turn of each request's conversation.
    next: Vec<Option<u32>>,
    /// Its turn before is not over.
    waits: Vec<bool>,
    made: u64,
}

impl<'a> Arrivals<'a> {
    fn new(run: &Run<'a>, size: BlockSize, ahead: Micros) -> Self {
        let requests = &run.trace.requests;
        let (mut next, mut waits) = (Vec::new(), Vec::new());
        if run.sessions == Sessions::Closed && requests.iter().any(|request| request.session.is_some()) {
            next = vec![None; requests.len()];
            waits = vec![false; requests.len()];
            let sessions =
                requests.iter().filter_map(|request| request.session).max().map_or(0, |most| most as usize + 1);
            let mut last: Vec<Option<u32>> = vec![None; sessions];
            for (place, request) in requests.iter().enumerate() {
                let Some(session) = request.session else { continue };
                if let Some(before) = last[session as usize].replace(place as u32) {
                    next[before as usize] = Some(place as u32);
                    waits[place] = true;
                }
            }
        }
        let (limit, seed) = (run.limit.max(1), run.seed);
        Self { trace: run.trace, ahead, size, limit, seed, cursor: 0, next, waits, made: 0 }
    }

    /// All requests, until nothing is left of them or the time is over.
    fn serve(mut self, mut sim: Simulation, run: &Run<'_>, progress: &mut dyn FnMut(f64) -> bool) -> Record {
        let until = run.until + self.ahead;
        let total = self.trace.requests.len() as u64;
        let every = run.sample_every;
        let mut look = self.ahead;
        let (mut samples, mut since_look, mut over) = (Vec::new(), 0, Vec::new());
        loop {
            let next = self.trace.requests.get(self.cursor).map(|request| request.at + self.ahead);
            let sampling = (every > Micros::ZERO).then_some(look);
            // what is due at the time of an arrival happens before it
            let stop = [next, sampling].into_iter().flatten().fold(until, Micros::min);
            if sim.step(stop) {
                since_look += 1;
            } else if stop == until {
                break;
            } else if sampling == Some(stop) {
                samples.push(self.sample(stop, &sim));
                // a run that takes far longer than its trace is looked at less and less often
                look += Micros(every.0.saturating_mul(1 << (samples.len() / MANY_SAMPLES).min(32)));
            } else {
                let place = self.cursor;
                self.cursor += 1;
                if !self.waits.get(place).copied().unwrap_or(false) {
                    self.arrive(&mut sim, stop, place);
                }
            }
            let Some(ledger) = sim.ledger_mut() else { break };
            if !ledger.over.is_empty() {
                over.append(&mut ledger.over);
                for place in over.drain(..) {
                    self.over(&mut sim, place as usize);
                }
            }
            let done = sim.ledger_mut().map_or(0, |ledger| ledger.served.len() as u64);
            if done == total && sim.unfinished() == 0 {
                break;
            }
            if since_look >= LOOK {
                since_look = 0;
                let finished = sim.ledger_mut().map_or(0, |ledger| ledger.finished);
                let share = (finished as f64 / total.max(1) as f64).max(stop.0 as f64 / until.0.max(1) as f64);
                if !progress(share.min(1.0)) {
                    break;
                }
            }
        }
        self.record(sim, samples)
    }

    /// A request is over: the next turn of its conversation may come, and does if its time has.
    fn over(&mut self, sim: &mut Simulation, place: usize) {
        let Some(next) = self.next.get(place).copied().flatten() else { return };
        let next = next as usize;
        self.waits[next] = false;
        if next < self.cursor {
            let now = sim.now();
            self.arrive(sim, now, next);
        }
    }

    fn arrive(&mut self, sim: &mut Simulation, now: Micros, place: usize) {
        let request = &self.trace.requests[place];
        let new = NewRequest {
            id: RequestId(self.made),
            prompt: self.prompt(place, request),
            root: BlockHash(1),
            choices: 1,
            max_tokens: Tokens(self.limit.into()),
            urgent: false,
        };
        self.made += 1;
        sim.arrive_lean(now, place as u32, new, request.output);
    }

    /// A named block's tokens are a function of its name, the others of the request.
    fn prompt(&self, place: usize, request: &TraceRequest) -> Arc<[u32]> {
        let len = request.input.max(1) as usize;
        let block = self.size.get() as usize;
        let mut prompt = Vec::with_capacity(len);
        for name in self.trace.chain(request) {
            let many = block.min(len - prompt.len());
            tokens(name.0, many, &mut prompt);
        }
        let rest = len - prompt.len();
        tokens(mix(self.seed).wrapping_add(place as u64), rest, &mut prompt);
        prompt.into()
    }

    fn sample(&self, at: Micros, sim: &Simulation) -> Sample {
        let (batch_size, queued) = sim.sizes().map(|(rows, queued)| (rows as u32, queued.0 as u32)).unzip();
        Sample { at: at.saturating_sub(self.ahead), batch_size, queued }
    }

    fn record(&self, mut sim: Simulation, samples: Vec<Sample>) -> Record {
        let end = sim.now().saturating_sub(self.ahead);
        sim.run(Micros::ZERO);
        let Moves { drained, evicted, weighed, balanced } = sim.moves();
        let (outcome, ledger) = sim.into_parts();
        let mut record = Record { samples, end, moves: drained + evicted + weighed + balanced, ..Record::default() };
        if let Some(mut ledger) = ledger {
            (record.served, record.rejected) = ledger.close();
            record.lanes = ledger.lanes;
        }
        let back = |time: &mut Micros| *time = time.saturating_sub(self.ahead);
        for line in &mut record.served {
            [&mut line.arrived, &mut line.first, &mut line.ended].into_iter().for_each(back);
        }
        for lane in &mut record.lanes {
            [&mut lane.span.0, &mut lane.span.1].into_iter().for_each(back);
        }
        record.workers = outcome.workers.into_values().collect();
        record.workers.iter_mut().for_each(|worker| back(&mut worker.completed));
        record
    }
}

/// Ids that are a function of the seed. None is an eos.
fn tokens(seed: u64, many: usize, into: &mut Vec<u32>) {
    let mut random = Random::new(seed);
    let mut left = many;
    while left > 0 {
        let mut bits = random.next();
        // four ids a number
        for _ in 0..left.min(4) {
            into.push((bits as u32 & (VOCAB - 1)).max(3));
            bits >>= 16;
        }
        left -= left.min(4);
    }
}
