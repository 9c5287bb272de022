//! Iteration-level engines behind the core's `Router`, in virtual time.
//!
//! Three things happen: a request comes and the router decides, an engine ends an iteration, and what it said of it reaches the
//! router. Clients hear of tokens at once; only the router hears late.

mod heard;
#[cfg(test)]
mod tests;
mod turns;

use std::collections::VecDeque;

use router_core::{
    BlockHash, BlockSize, Blocks, Choice, Commit, DecisionId, Guarding, Micros, Prompt, Router, RouterError, Seen,
};
use router_core::{Tokens, WorkerId};

use self::heard::Heard;
use self::turns::Turns;
use crate::calendar::Calendar;
use crate::continuous::{Arrival, Chains, Ended, Engine, Report, Said};
use crate::rival::{self, Rival, RivalError, Sight};
use crate::run::{Run, RunError, System};
use crate::served::{GuardCounts, Lane, Record, Sample, Served};
use crate::trace::TraceRequest;

/// Samples after which the time between them doubles.
const MANY_SAMPLES: usize = 1 << 13;

/// Workers whose lanes are kept.
const LANES: u32 = 16;

/// Events between two words about progress.
const STRIDE: u64 = 1024;

pub(crate) fn run(run: &Run<'_>, progress: &mut dyn FnMut(f64) -> bool) -> Result<Record, RunError> {
    follow(run, progress, &mut |_, _, _| {})
}

/// Like [`crate::run`] for engines behind the router, and tells each decision as it is made: when, for which request of the
/// trace, and all it was made from.
pub fn follow(
    run: &Run<'_>,
    progress: &mut dyn FnMut(f64) -> bool,
    decided: &mut dyn FnMut(Micros, u32, &Choice),
) -> Result<Record, RunError> {
    Drive::new(run, decided)?.run(progress)
}

/// What is to happen.
enum Due {
    /// An engine says something, unless what it does has changed since.
    Wake(u32, u32),
    /// What it said reaches the router.
    Hear(u32, Box<Report>),
    Sample,
    Lost(u32),
    Join,
}

struct Worker {
    name: String,
    engine: Engine,
    heard: Heard,
    /// It has vanished.
    lost: bool,
    /// Grows whenever another time is right for it to wake.
    wakes: u32,
    due: Option<Micros>,
}

/// Whether a request has come.
#[derive(Clone, Copy)]
enum Fate {
    Absent,
    Here,
    Rejected,
}

struct Drive<'a, 'b> {
    run: &'a Run<'a>,
    size: BlockSize,
    chains: Chains,
    turns: Turns<'a>,
    router: Router,
    policy: Box<dyn Rival>,
    /// The router's own decisions move nothing that it sees.
    blind: bool,
    workers: Vec<Worker>,
    /// The router's slots in order, and whose they are: candidates come in this order.
    slots: Vec<(u32, u32)>,
    calendar: Calendar<Due>,
    flights: Vec<Option<DecisionId>>,
    served: Vec<Served>,
    fate: Vec<Fate>,
    homeless: VecDeque<u32>,
    record: Record,
    done: u64,
    now: Micros,
    /// Used again and again.
    report: Report,
    views: Vec<rival::Engine>,
    names: (Vec<BlockHash>, Vec<BlockHash>),
    decided: &'b mut dyn FnMut(Micros, u32, &Choice),
}

impl<'a, 'b> Drive<'a, 'b> {
    fn new(run: &'a Run<'a>, decided: &'b mut dyn FnMut(Micros, u32, &Choice)) -> Result<Self, RunError> {
        if run.fleet.workers == 0 {
            return Err(RunError::NoWorkers);
        }
        let size = run.block_size();
        let (policy, commit, guard, blind) = match &run.system {
            System::Continuous { policy, commit, guard } => (policy, *commit, *guard, false),
            System::Uncommitted { policy } => (policy, Commit::Load, Guarding::Off, true),
            System::Scheduled { .. } => return Err(RunError::NotRouted),
        };
        let policy = rival::make(policy, &run.fleet.device, run.fleet.workers, run.seed)?;
        let count = run.trace.requests.len();
        let mut drive = Self {
            run,
            size,
            chains: Chains::new(run.trace),
            turns: Turns::new(run.trace, run.sessions),
            router: Router::new(size).with_commit(commit).with_guard(guard),
            policy,
            blind,
            workers: Vec::new(),
            slots: Vec::new(),
            calendar: Calendar::new(),
            flights: vec![None; count],
            served: vec![Served::default(); count],
            fate: vec![Fate::Absent; count],
            homeless: VecDeque::new(),
            record: Record::default(),
            done: 0,
            now: Micros::ZERO,
            report: Report::default(),
            views: Vec::new(),
            names: (Vec::new(), Vec::new()),
            decided,
        };
        for _ in 0..run.fleet.workers {
            drive.join()?;
        }
        if run.sample_every > Micros::ZERO {
            drive.calendar.push(Micros::ZERO, Due::Sample);
        }
        run.fleet.lost.iter().for_each(|(at, worker)| drive.calendar.push(*at, Due::Lost(*worker)));
        run.fleet.joined.iter().for_each(|at| drive.calendar.push(*at, Due::Join));
        Ok(drive)
    }

    fn run(mut self, progress: &mut dyn FnMut(f64) -> bool) -> Result<Record, RunError> {
        let total = self.flights.len() as f64;
        let mut events = 0u64;
        while self.step()? {
            events += 1;
            if events.is_multiple_of(STRIDE) && !progress(self.done as f64 / total) {
                break;
            }
        }
        Ok(self.finish())
    }

    /// The next thing happens. Whether there was one.
    fn step(&mut self) -> Result<bool, RunError> {
        if self.done == self.flights.len() as u64 {
            return Ok(false);
        }
        // of what is due at the same time, requests come first
        let arrival = self.turns.due().filter(|at| *at <= self.run.until);
        let due = match arrival {
            Some(Micros::ZERO) => None,
            Some(at) => self.calendar.pop(Micros(at.0 - 1)),
            None => self.calendar.pop(self.run.until),
        };
        match (due, arrival) {
            (Some((at, due)), _) => {
                self.now = at;
                self.happen(due)?;
            }
            (None, Some(at)) => {
                self.now = at;
                if let Some(request) = self.turns.take() {
                    self.arrive(request)?;
                }
            }
            (None, None) => {
                // what is left comes after the run's end, if it has one
                if self.run.until < Micros(u64::MAX) {
                    self.now = self.run.until;
                }
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn happen(&mut self, due: Due) -> Result<(), RunError> {
        match due {
            Due::Wake(at, wakes) => {
                if self.workers[at as usize].wakes == wakes {
                    self.wake(at)?;
                }
            }
            Due::Hear(at, report) => self.hear(at, &report)?,
            Due::Sample => self.sample(),
            Due::Lost(at) => self.lose(at)?,
            Due::Join => {
                self.join()?;
                while let Some(request) = self.homeless.pop_front() {
                    self.send(request)?;
                }
            }
        }
        Ok(())
    }

    // ---------------------------------------------------------------- workers

    fn join(&mut self) -> Result<(), RunError> {
        let fleet = &self.run.fleet;
        let at = self.workers.len() as u32;
        let name = format!("w{at}");
        self.router.add_worker(&name, None)?;
        // the router gives the first free slot
        let place = self.slots.iter().zip(0u32..).position(|((slot, _), rank)| *slot != rank);
        let place = place.unwrap_or(self.slots.len());
        self.slots.insert(place, (place as u32, at));
        let noise = fleet.noise_of(at, self.run.seed);
        let engine = Engine::new(&fleet.device, self.size, noise, at < LANES);
        self.workers.push(Worker { name, engine, heard: Heard::default(), lost: false, wakes: 0, due: None });
        Ok(())
    }

    /// A worker vanishes: its rows begin anew elsewhere.
    fn lose(&mut self, at: u32) -> Result<(), RunError> {
        let Some(worker) = self.workers.get_mut(at as usize).filter(|worker| !worker.lost) else { return Ok(()) };
        worker.lost = true;
        worker.wakes += 1;
        let rows: Vec<(u32, Ended)> = worker.engine.unfinished(self.now).collect();
        self.router.remove_worker(&worker.name)?;
        self.slots.retain(|(_, worker)| *worker != at);
        for (request, row) in rows {
            let served = &mut self.served[request as usize];
            if served.first == Micros::ZERO {
                served.first = row.first;
            }
            self.record.resent += 1;
            self.send(request)?;
        }
        Ok(())
    }

    fn wake(&mut self, at: u32) -> Result<(), RunError> {
        let mut report = std::mem::take(&mut self.report);
        let worker = &mut self.workers[at as usize];
        worker.engine.wake(&self.chains, &mut report);
        self.schedule(at);
        let ended = |said: &Said| if let Said::Ended(request, row) = *said { Some((request, row)) } else { None };
        let rows: Vec<(u32, Ended)> = report.rows.iter().filter_map(ended).collect();
        if self.run.fleet.delay == Micros::ZERO {
            self.hear(at, &report)?;
            self.report = report;
        } else {
            self.calendar.push(self.now + self.run.fleet.delay, Due::Hear(at, Box::new(report)));
        }
        for (request, row) in rows {
            self.ended(at, request, row)?;
        }
        Ok(())
    }

    /// The engine may wake at another time than before.
    fn schedule(&mut self, at: u32) {
        let worker = &mut self.workers[at as usize];
        let due = worker.engine.due();
        // the engine that has just woken is due later
        if due != worker.due {
            worker.due = due;
            worker.wakes += 1;
            if let Some(due) = due {
                self.calendar.push(due, Due::Wake(at, worker.wakes));
            }
        }
    }

    fn hear(&mut self, at: u32, report: &Report) -> Result<(), RunError> {
        let worker = &mut self.workers[at as usize];
        if worker.lost {
            return Ok(());
        }
        worker.heard.hear(report.standing);
        self.router.advance(self.now);
        if !report.removed.is_empty() || !report.stored.is_empty() {
            let (removed, stored) = &mut self.names;
            for (names, spans) in [(&mut *removed, &report.removed), (&mut *stored, &report.stored)] {
                names.clear();
                names.extend(spans.iter().flat_map(|span| self.chains.names(self.run.trace, *span)));
            }
            self.router.report(&worker.name, false, removed, stored)?;
        }
        for said in &report.rows {
            let (Said::Left(request, _) | Said::Prefilled(request) | Said::Ended(request, _)) = *said;
            let Some(id) = self.flights[request as usize] else { continue };
            match *said {
                Said::Left(_, tokens) => self.router.left(id, Tokens(tokens.into())),
                Said::Prefilled(_) => self.router.prefilled(id),
                Said::Ended(_, row) => {
                    self.policy.ended(row.output);
                    self.flights[request as usize] = None;
                    self.router.finished(id, &[])
                }
            };
        }
        Ok(())
    }

    // ---------------------------------------------------------------- requests

    fn arrive(&mut self, request: u32) -> Result<(), RunError> {
        let what = self.run.trace.requests[request as usize];
        self.fate[request as usize] = Fate::Here;
        self.served[request as usize] = Served { request, arrived: self.now, ..Served::default() };
        if Engine::holds(&self.run.fleet.device, self.size, what.input, self.output(request)) {
            return self.send(request);
        }
        self.fate[request as usize] = Fate::Rejected;
        self.record.rejected += 1;
        self.over(request)
    }

    fn output(&self, request: u32) -> u32 {
        self.run.trace.requests[request as usize].output.clamp(1, self.run.limit.max(1))
    }

    /// The router decides.
    fn send(&mut self, request: u32) -> Result<(), RunError> {
        if self.slots.is_empty() {
            self.homeless.push_back(request);
            return Ok(());
        }
        let (now, trace, size) = (self.now, self.run.trace, self.size);
        let what = &trace.requests[request as usize];
        let chain = trace.chain(what);
        let heard_at = now.saturating_sub(self.run.fleet.delay);
        let blocks = Blocks(self.run.fleet.device.kv.0 / size.get());
        self.views.clear();
        let workers = &self.workers;
        if self.policy.asks_engines() {
            let views =
                self.slots.iter().map(|(_, at)| workers[*at as usize].heard.engine(heard_at, blocks, self.blind));
            self.views.extend(views);
        }
        let about = About { now, what, engines: &self.views, chain, size };
        self.router.advance(now);
        let prompt = Prompt::named(BlockHash(0), chain, Tokens(what.input.max(1).into()), size);
        let (policy, slots, blind) = (&mut self.policy, &self.slots, self.blind);
        let choice = self.router.route_by(prompt, true, &mut |seen: &Seen| {
            let mut scores = Vec::with_capacity(seen.candidates.len());
            if blind {
                policy.scores(&about.sight(&told(seen, slots, workers)), &mut scores);
            } else {
                policy.scores(&about.sight(seen), &mut scores);
            }
            Ok::<_, RouterError>(scores)
        })?;
        self.policy.chosen(&about.sight(&choice.seen), choice.at);
        (self.decided)(now, request, &choice);
        self.flights[request as usize] = choice.id;
        let at = self.slots[choice.at].1;
        let (input, output) = (what.input.max(1), self.output(request));
        let expected = u32::try_from(choice.chosen().new_tokens.0).unwrap_or(input);
        let worker = &mut self.workers[at as usize];
        worker.heard.sent(input);
        worker.engine.push(&self.chains, Arrival { request, input, output, expected }, now);
        self.schedule(at);
        Ok(())
    }

    fn ended(&mut self, at: u32, request: u32, row: Ended) -> Result<(), RunError> {
        let served = &mut self.served[request as usize];
        if served.first == Micros::ZERO {
            served.first = row.first;
        }
        let (worker, ended) = (at, self.now);
        *served = Served { worker, ended, hit: row.hit, output: row.output, ..*served };
        (served.gap, served.slices) = (row.gap, row.preempted);
        self.over(request)
    }

    /// Nothing more will become of the request: the turn after it may come.
    fn over(&mut self, request: u32) -> Result<(), RunError> {
        self.done += 1;
        self.turns.ended(request).map_or(Ok(()), |after| self.arrive(after))
    }

    // ---------------------------------------------------------------- what came of it

    fn sample(&mut self) {
        let of = |value: &dyn Fn(&Engine) -> u64| {
            let worth = |worker: &Worker| if worker.lost { 0 } else { value(&worker.engine) };
            self.workers.iter().map(|worker| u32::try_from(worth(worker)).unwrap_or(u32::MAX)).collect()
        };
        let sample = Sample { at: self.now, batch_size: of(&Engine::batch_size), queued: of(&Engine::queued) };
        self.record.samples.push(sample);
        // without workers nothing happens any more, unless one joins
        if !self.slots.is_empty() || self.run.fleet.joined.iter().any(|at| *at > self.now) {
            // a run that takes far longer than its trace is looked at less and less often, and at the end of time no more
            let wait = self.run.sample_every.0.saturating_mul(1 << (self.record.samples.len() / MANY_SAMPLES).min(32));
            let next = self.now + Micros(wait);
            if next > self.now {
                self.calendar.push(next, Due::Sample);
            }
        }
    }

    fn finish(mut self) -> Record {
        for (worker, at) in self.workers.iter_mut().zip(0u32..) {
            if !worker.lost {
                for (request, row) in worker.engine.unfinished(self.now) {
                    let served = &mut self.served[request as usize];
                    let first = if served.first == Micros::ZERO { row.first } else { served.first };
                    let Ended { hit, output, gap, preempted: slices, .. } = row;
                    *served = Served { worker: at, first, hit, output, gap, slices, ..*served };
                }
            }
            self.record.workers.push(worker.engine.outcome);
            self.record.lanes.extend(worker.engine.lanes.drain(..).map(|lane| Lane { worker: at, ..lane }));
        }
        // a turn that waits for the one before it is unfinished too
        for (request, at) in self.run.trace.requests.iter().zip(0u32..) {
            match self.fate[at as usize] {
                Fate::Here => self.record.served.push(self.served[at as usize]),
                Fate::Absent if self.turns.is_past(at) => {
                    // it would have come no sooner than now
                    let arrived = request.at.max(self.now);
                    self.record.served.push(Served { request: at, arrived, ..Served::default() });
                }
                Fate::Absent | Fate::Rejected => {}
            }
        }
        self.record.served.sort_by_key(|served| (served.arrived, served.request));
        if let Some(hotspots) = self.router.hotspots() {
            self.record.guard = GuardCounts { alarms: hotspots.alarms, filtered: hotspots.filtered };
        }
        self.record.end = self.now;
        self.record
    }
}

/// A request at its decision.
struct About<'a> {
    now: Micros,
    what: &'a TraceRequest,
    engines: &'a [rival::Engine],
    chain: &'a [BlockHash],
    size: BlockSize,
}

impl About<'_> {
    fn sight<'s>(&'s self, seen: &'s Seen) -> Sight<'s> {
        let &TraceRequest { session, turn, class, .. } = self.what;
        Sight { now: self.now, seen, engines: self.engines, session, turn, class, chain: self.chain, size: self.size }
    }
}

/// What is seen if decisions count only once engines have said so.
fn told(seen: &Seen, slots: &[(u32, u32)], workers: &[Worker]) -> Seen {
    let mut told = seen.clone();
    for (candidate, (slot, at)) in told.candidates.iter_mut().zip(slots) {
        debug_assert_eq!(candidate.worker, WorkerId(*slot));
        let standing = &workers[*at as usize].heard.standing;
        candidate.batch_size = standing.running + standing.waiting;
        candidate.queued = Tokens(standing.queued);
    }
    told
}

impl From<RouterError> for RunError {
    fn from(error: RouterError) -> Self {
        Self::Unservable(error.to_string())
    }
}

impl From<RivalError> for RunError {
    fn from(error: RivalError) -> Self {
        match error {
            RivalError::Unknown { name, nearest } => Self::UnknownPolicy { name, nearest },
            weight @ RivalError::Weight { .. } => Self::Weight(weight.to_string()),
        }
    }
}
