//! Virtual time: a heap of (time, sequence, event) and a loop. The real scheduler on one side, modelled workers on the
//! other, a link with a delay between them. The same inputs give the same run, to the microsecond.

use std::collections::BTreeMap;

use hashbrown::HashMap;
use router_core::{
    Action, BatchRecord, Config, Decision, Event, Micros, ModelSpec, Moves, NewRequest, PlanNo, RequestId, RowId,
    Scheduler, Tokens, WorkerId, WorkerLoad, WorkerMessage, WorkerSpec,
};

use crate::calendar::Calendar;
use crate::ledger::Ledger;
use crate::modelled::Modelled;
use crate::outcome::{Outcome, RowOutcome, WorkerOutcome};
use crate::random::Random;
use crate::sequence::Terms;
use crate::timing::Pace;
use crate::worker::Command;

enum Happening {
    Router(Event),
    Tick,
    ToWorker(WorkerId, u64, Command),
    FromWorker(WorkerId, u64, u64, WorkerMessage),
    Wake(WorkerId, u64),
    Kill(WorkerId),
    Join(Box<(WorkerSpec, WorkerSpec, Pace)>),
}

struct Connected {
    worker: Modelled,
    /// This connection; what belongs to an earlier one is void.
    session: u64,
    seq: u64,
    totals: WorkerOutcome,
    /// When the last message of each direction arrives: to the worker, from it.
    arrivals: [Micros; 2],
    /// A cut on its way: of this batch, since then.
    cut: Option<(PlanNo, Micros)>,
}

/// Trouble for tests: what a link and a worker may do at any time without breaking the contract.
#[derive(Clone, Copy, Debug, Default)]
pub struct Chaos {
    /// Of its numbers.
    pub seed: u64,
    /// How likely a batch is cut at a step boundary although nobody asked for it.
    pub cut: f64,
    /// A message is late by up to this; messages of one direction stay in order.
    pub late: Micros,
}

/// A pool of modelled workers behind the real scheduler.
pub struct Simulation {
    scheduler: Scheduler,
    vocab: u32,
    /// Of a message: to the worker, from it.
    delays: [Micros; 2],
    workers: BTreeMap<WorkerId, Connected>,
    calendar: Calendar<Happening>,
    terms: HashMap<RequestId, Terms>,
    arrived: HashMap<RequestId, Micros>,
    chaos: Chaos,
    random: Random,
    logprobs: bool,
    keep_batches: bool,
    told_every: u32,
    counts: bool,
    sessions: u64,
    slots: u32,
    happened: u64,
    most: u64,
    now: Micros,
    /// When the scheduler wants to be asked again.
    wake: Option<Micros>,
    actions: Vec<Action>,
    said: Vec<WorkerMessage>,
    outcome: Outcome,
    /// Instead of the rows of `outcome`, where these would be too many.
    ledger: Option<Ledger>,
}

impl Simulation {
    /// An empty pool; `delay` is the link's, each way.
    pub fn new(model: ModelSpec, config: Config, delay: Micros) -> Self {
        Self {
            vocab: model.vocab,
            scheduler: Scheduler::new(model, config),
            delays: [delay; 2],
            workers: BTreeMap::new(),
            calendar: Calendar::new(),
            terms: HashMap::new(),
            arrived: HashMap::new(),
            chaos: Chaos::default(),
            random: Random::new(0),
            logprobs: true,
            keep_batches: false,
            told_every: 1,
            counts: false,
            sessions: 0,
            slots: 0,
            happened: 0,
            most: u64::MAX,
            now: Micros::ZERO,
            wake: None,
            actions: Vec::new(),
            said: Vec::new(),
            outcome: Outcome::default(),
            ledger: None,
        }
    }

    /// What workers say is later by this.
    #[must_use]
    pub(crate) fn with_lag(mut self, lag: Micros) -> Self {
        self.delays[1] += lag;
        self
    }

    /// Workers count tokens: see [`crate::SliceWorker::counting`].
    #[must_use]
    pub(crate) fn counting(self) -> Self {
        Self { counts: true, ..self }
    }

    /// A line a request is kept of rows, and nothing of their tokens.
    #[must_use]
    pub(crate) fn with_ledger(self) -> Self {
        Self { logprobs: false, ledger: Some(Ledger::default()), ..self }
    }

    /// With trouble.
    #[must_use]
    pub fn with_chaos(self, chaos: Chaos) -> Self {
        Self { random: Random::new(chaos.seed), chaos, ..self }
    }

    /// For long runs: no logprobs are asked for and checked, and workers that pad tell of every so many iterations at once.
    #[must_use]
    pub fn cheap(self, told_every: u32) -> Self {
        Self { logprobs: false, told_every, ..self }
    }

    /// It panics when more than this has happened: what never ends is found.
    #[must_use]
    pub fn with_most(self, most: u64) -> Self {
        Self { most, ..self }
    }

    /// With [`Outcome::batches`].
    #[must_use]
    pub fn with_batches(self) -> Self {
        Self { keep_batches: true, ..self }
    }

    /// A worker joins at a time.
    pub fn join(&mut self, at: Micros, spec: WorkerSpec, pace: impl Into<Pace>) {
        self.join_as(at, spec.clone(), spec, pace);
    }

    /// A worker that announces one thing and is another.
    pub fn join_as(&mut self, at: Micros, announced: WorkerSpec, actual: WorkerSpec, pace: impl Into<Pace>) {
        self.calendar.push(at, Happening::Join(Box::new((announced, actual, pace.into()))));
    }

    /// A worker vanishes at a time.
    pub fn kill(&mut self, at: Micros, worker: WorkerId) {
        self.calendar.push(at, Happening::Kill(worker));
    }

    /// A worker starts to drain.
    pub fn drain(&mut self, at: Micros, worker: WorkerId) {
        self.calendar.push(at, Happening::Router(Event::WorkerDraining { worker }));
    }

    /// A request arrives.
    pub fn arrive(&mut self, at: Micros, request: NewRequest) {
        self.arrived.insert(request.id, at);
        self.calendar.push(at, Happening::Router(Event::RequestArrived(request)));
    }

    /// A request arrives that ends by itself after `output` tokens, which the scheduler does not know.
    pub fn arrive_ending(&mut self, at: Micros, request: NewRequest, output: u32) {
        self.terms.insert(request.id, Terms::ending_at(&request.prompt, output, self.vocab));
        self.arrive(at, request);
    }

    /// A client goes away.
    pub fn cancel(&mut self, at: Micros, request: RequestId) {
        self.calendar.push(at, Happening::Router(Event::Cancelled { request, choice: None }));
    }

    /// Runs until nothing is left to happen, or until `limit`.
    pub fn run(&mut self, limit: Micros) -> &Outcome {
        while self.step(limit) {}
        for (id, connected) in &self.workers {
            self.outcome.workers.insert(*id, connected.totals());
        }
        &self.outcome
    }

    /// Lets the next thing happen, if one is due by `limit`.
    pub(crate) fn step(&mut self, limit: Micros) -> bool {
        let Some((at, happening)) = self.calendar.pop(limit) else { return false };
        self.now = at;
        self.outcome.end = at;
        self.happened += 1;
        assert!(self.happened <= self.most, "it does not end: {} rows are left at {at}", self.scheduler.rows());
        self.happen(happening);
        true
    }

    /// A request arrives now, and ends by itself after `output` tokens. It is the ledger's next line.
    pub(crate) fn arrive_lean(&mut self, now: Micros, place: u32, request: NewRequest, output: u32) {
        let Some(ledger) = &mut self.ledger else { return };
        ledger.arrived(now, place);
        self.now = now;
        self.terms.insert(request.id, Terms { length: Some(output), ..Terms::default() });
        self.router(Event::RequestArrived(request));
    }

    pub(crate) fn ledger_mut(&mut self) -> Option<&mut Ledger> {
        self.ledger.as_mut()
    }

    pub(crate) fn into_parts(self) -> (Outcome, Option<Ledger>) {
        (self.outcome, self.ledger)
    }

    /// The time.
    pub(crate) fn now(&self) -> Micros {
        self.now
    }

    /// b and Q of each worker, in order of slot.
    pub(crate) fn sizes(&self) -> impl Iterator<Item = (u64, Tokens)> {
        self.scheduler.sizes()
    }

    /// What it has come to so far.
    pub(crate) fn outcome(&self) -> &Outcome {
        &self.outcome
    }

    /// What the run came to, without a copy.
    pub fn into_outcome(self) -> Outcome {
        self.outcome
    }

    /// The scheduler's view of its workers.
    pub fn loads(&self) -> Vec<WorkerLoad> {
        self.scheduler.loads()
    }

    /// What a worker itself says: see [`crate::SliceWorker::load`].
    pub fn worker_load(&self, worker: WorkerId) -> Option<[u64; 6]> {
        self.workers.get(&worker).map(|connected| connected.worker.load())
    }

    /// The decisions made.
    pub fn decisions(&self) -> impl Iterator<Item = &Decision> {
        self.scheduler.decisions()
    }

    /// The latest batches.
    pub fn batches(&self) -> impl Iterator<Item = &BatchRecord> {
        self.scheduler.batches()
    }

    /// Rows that have not ended.
    pub fn unfinished(&self) -> usize {
        self.scheduler.rows()
    }

    /// Rows that moved for another reason than a lost worker.
    pub fn moves(&self) -> Moves {
        self.scheduler.moves()
    }

    /// S as it is now.
    pub fn slice_len(&self) -> u32 {
        self.scheduler.slice_len()
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Router(event) => self.router(event),
            Happening::Tick => {
                if self.wake.take_if(|wake| *wake <= self.now).is_some() {
                    self.router(Event::Tick);
                }
            }
            Happening::Join(joins) => {
                let (spec, actual, pace) = *joins;
                let id = WorkerId(self.slots);
                self.slots += 1;
                self.sessions += 1;
                let session = self.sessions;
                let worker = Modelled::new(actual, pace).telling_every(self.told_every);
                let worker = if self.counts { worker.counting() } else { worker };
                let totals = WorkerOutcome::default();
                let arrivals = [Micros::ZERO; 2];
                self.workers.insert(id, Connected { worker, session, seq: 0, totals, arrivals, cut: None });
                self.router(Event::WorkerJoined { worker: id, spec });
                self.send(id, Command::Hello);
            }
            Happening::Kill(id) => {
                if let Some(gone) = self.workers.remove(&id) {
                    self.outcome.workers.insert(id, gone.totals());
                    self.router(Event::WorkerLost { worker: id, epoch: gone.worker.spec().epoch });
                }
            }
            Happening::ToWorker(id, session, command) => {
                let now = self.now;
                self.work(id, session, |worker, out| worker.command(now, command, out));
            }
            Happening::Wake(id, session) => {
                let (now, cut) = (self.now, self.chaos.cut > 0.0 && self.random.chance(self.chaos.cut));
                self.work(id, session, |worker, out| {
                    if let Some(batch) = worker.running().filter(|_| cut) {
                        worker.command(now, Command::Cut(batch, None), out);
                    }
                    worker.wake(now, out);
                });
            }
            Happening::FromWorker(id, session, seq, message) => {
                let Some(connected) = self.workers.get_mut(&id).filter(|c| c.session == session) else { return };
                let epoch = connected.worker.spec().epoch;
                let ended = match &message {
                    WorkerMessage::SliceReported(report) => Some(report.batch),
                    _ => None,
                };
                if let Some((_, since)) = connected.cut.take_if(|(batch, _)| ended == Some(*batch)) {
                    self.outcome.cuts.push(self.now.saturating_sub(since));
                }
                self.router(Event::Worker { worker: id, epoch, seq, message });
                if let Some(batch) = ended.filter(|_| self.keep_batches) {
                    let record = self.scheduler.batches().find(|record| record.worker == id && record.batch == batch);
                    self.outcome.batches.extend(record.copied());
                }
            }
        }
    }

    /// A worker does something, and what it says sets out.
    fn work(&mut self, id: WorkerId, session: u64, does: impl FnOnce(&mut Modelled, &mut Vec<WorkerMessage>)) {
        let Some(connected) = self.workers.get_mut(&id).filter(|c| c.session == session) else { return };
        let before = connected.worker.next_wake();
        does(&mut connected.worker, &mut self.said);
        for message in self.said.drain(..) {
            match &message {
                WorkerMessage::SliceReported(report) => {
                    connected.totals.reported(self.now, report);
                    if let Some(ledger) = &mut self.ledger {
                        ledger.sliced(self.now, id, report);
                    }
                }
                WorkerMessage::Refused { reason, detail, .. } if *reason != router_core::Refusal::Stale => {
                    self.outcome.refused.push(format!("{id} {reason:?}: {detail}"));
                }
                _ => {}
            }
            connected.seq += 1;
            let late = if self.chaos.late > Micros::ZERO { self.random.below(self.chaos.late.0 + 1) } else { 0 };
            let at = (self.now + self.delays[1] + Micros(late)).max(connected.arrivals[1]);
            connected.arrivals[1] = at;
            self.calendar.push(at, Happening::FromWorker(id, session, connected.seq, message));
        }
        // an iteration under way has its wake already
        if let Some(at) = connected.worker.next_wake().filter(|at| before != Some(*at) || *at <= self.now) {
            connected.totals.longest = connected.totals.longest.max(at.saturating_sub(self.now));
            self.calendar.push(at, Happening::Wake(id, session));
        }
    }

    fn router(&mut self, event: Event) {
        let mut actions = std::mem::take(&mut self.actions);
        self.scheduler.handle(self.now, event, &mut actions);
        for action in actions.drain(..) {
            self.act(action);
        }
        self.actions = actions;
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Plan(id, plan) => {
                let asked = self.logprobs.then_some(1);
                let terms = plan.add.iter().map(|row| {
                    let ends = self.terms.get(&row.key.row.request).cloned().unwrap_or_default();
                    (row.key, Terms { logprobs: asked, ..ends })
                });
                let terms = terms.collect();
                self.send(id, Command::Plan(plan, terms));
            }
            Action::Drop(id, rows) => self.send(id, Command::Drop(rows)),
            Action::Cut(id, batch) => {
                if let Some(connected) = self.workers.get_mut(&id)
                    && connected.cut.is_none_or(|(of, _)| of != batch)
                {
                    connected.cut = Some((batch, self.now));
                }
                self.send(id, Command::Cut(batch, None));
            }
            Action::ReleaseKv(id, rows) => self.send(id, Command::ReleaseKv(rows)),
            Action::Resync(id) => self.send(id, Command::Resync),
            Action::Quarantine(id, why) => self.outcome.quarantined.push(format!("{id}: {why}")),
            Action::Placed(..) => {}
            Action::Tokens { row, first_index, ids, logprobs } => {
                if let Some(ledger) = &mut self.ledger {
                    return ledger.drew(self.now, row.request, first_index, ids.len());
                }
                if self.logprobs {
                    let of: Vec<u32> = logprobs.iter().filter_map(|logprobs| Some(logprobs.top.first()?.0)).collect();
                    assert_eq!(ids, of, "{row}: logprobs of other tokens");
                }
                let now = self.now;
                let outcome = self.outcome_of(row);
                assert_eq!(outcome.tokens.len(), first_index as usize, "{row}: tokens out of order");
                outcome.times.extend(ids.iter().map(|_| now));
                outcome.tokens.extend(ids);
            }
            Action::Finish(row, end) => {
                let at = self.now;
                if let Some(ledger) = &mut self.ledger {
                    self.terms.remove(&row.request);
                    return ledger.ended(at, row.request, &end);
                }
                self.outcome_of(row).ends.push((at, end));
            }
            Action::Reject(request, why) => {
                if let Some(ledger) = &mut self.ledger {
                    self.terms.remove(&request);
                    return ledger.rejected(request);
                }
                self.outcome.rejected.insert(request, why);
            }
            Action::WakeAt(at) => {
                // one timer, as the server has: the earliest
                let at = at.max(self.now);
                if self.wake.is_none_or(|wake| at < wake) {
                    self.wake = Some(at);
                    self.calendar.push(at, Happening::Tick);
                }
            }
        }
    }

    fn send(&mut self, id: WorkerId, command: Command) {
        let Some(connected) = self.workers.get_mut(&id) else { return };
        let late = if self.chaos.late > Micros::ZERO { self.random.below(self.chaos.late.0 + 1) } else { 0 };
        let at = (self.now + self.delays[0] + Micros(late)).max(connected.arrivals[0]);
        connected.arrivals[0] = at;
        self.calendar.push(at, Happening::ToWorker(id, connected.session, command));
    }

    fn outcome_of(&mut self, row: RowId) -> &mut RowOutcome {
        let arrived = &self.arrived;
        self.outcome.rows.entry(row).or_insert_with(|| {
            let arrived = arrived.get(&row.request).copied().unwrap_or_default();
            RowOutcome { arrived, ..RowOutcome::default() }
        })
    }
}

impl Connected {
    fn totals(&self) -> WorkerOutcome {
        WorkerOutcome { evicted: self.worker.evicted(), host: self.worker.host(), ..self.totals }
    }
}
