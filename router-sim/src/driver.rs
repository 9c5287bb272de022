//! Virtual time: a heap of (time, sequence, event) and a loop. The real scheduler on one side, modelled workers on the
//! other, a link with a delay between them. The same inputs give the same run, to the microsecond.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use router_core::{
    Action, Config, Decision, Event, FinishReason, Micros, ModelSpec, NewRequest, Rejection, RequestId, RowEnd, RowId,
    Scheduler, Tokens, WorkerId, WorkerLoad, WorkerMessage, WorkerSpec,
};

use crate::timing::Timing;
use crate::worker::{Command, SliceWorker, Terms};

enum Happening {
    Router(Event),
    ToWorker(WorkerId, u64, Command),
    FromWorker(WorkerId, u64, WorkerMessage),
    Wake(WorkerId, u64),
    Kill(WorkerId),
    Join(WorkerSpec, WorkerSpec, Timing),
}

struct Connected {
    worker: SliceWorker,
    /// This connection; what belongs to an earlier one is void.
    session: u64,
    seq: u64,
    totals: WorkerOutcome,
}

/// What a worker did.
#[derive(Clone, Copy, Debug, Default)]
pub struct WorkerOutcome {
    /// Iterations with rows.
    pub busy: Micros,
    /// Between slices, while rows were assigned to it.
    pub idle: Micros,
    /// Slices that ran.
    pub slices: u64,
    /// Tokens computed and tokens found cached, over all rows.
    pub computed: Tokens,
    /// Tokens found cached.
    pub cached: Tokens,
    /// Most blocks a batch used at once.
    pub peak: u64,
}

/// What became of a row.
#[derive(Clone, Debug)]
pub struct RowOutcome {
    /// Its tokens, in order.
    pub tokens: Vec<u32>,
    /// When the first came.
    pub first: Option<Micros>,
    /// When it ended, and how. Counted, so that a second end shows.
    pub ends: Vec<(Micros, RowEnd)>,
}

/// The whole run.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Rows by name.
    pub rows: BTreeMap<RowId, RowOutcome>,
    /// Requests not accepted.
    pub rejected: BTreeMap<RequestId, Rejection>,
    /// Workers by slot.
    pub workers: BTreeMap<WorkerId, WorkerOutcome>,
    /// What the scheduler could not believe.
    pub quarantined: Vec<String>,
    /// Refusals that were not STALE.
    pub refused: Vec<String>,
    /// When the last thing happened.
    pub end: Micros,
}

/// A pool of modelled workers behind the real scheduler.
pub struct Simulation {
    scheduler: Scheduler,
    delay: Micros,
    workers: BTreeMap<WorkerId, Connected>,
    heap: BinaryHeap<Reverse<(Micros, u64)>>,
    happenings: BTreeMap<u64, Happening>,
    sequence: u64,
    sessions: u64,
    slots: u32,
    now: Micros,
    actions: Vec<Action>,
    outcome: Outcome,
}

impl Simulation {
    /// An empty pool; `delay` is the link's, each way.
    pub fn new(model: ModelSpec, config: Config, delay: Micros) -> Self {
        Self {
            scheduler: Scheduler::new(model, config),
            delay,
            workers: BTreeMap::new(),
            heap: BinaryHeap::new(),
            happenings: BTreeMap::new(),
            sequence: 0,
            sessions: 0,
            slots: 0,
            now: Micros::ZERO,
            actions: Vec::new(),
            outcome: Outcome::default(),
        }
    }

    /// A worker joins at a time.
    pub fn join(&mut self, at: Micros, spec: WorkerSpec, timing: Timing) {
        self.join_as(at, spec.clone(), spec, timing);
    }

    /// A worker that announces one thing and is another.
    pub fn join_as(&mut self, at: Micros, announced: WorkerSpec, actual: WorkerSpec, timing: Timing) {
        self.push(at, Happening::Join(announced, actual, timing));
    }

    /// A worker vanishes at a time.
    pub fn kill(&mut self, at: Micros, worker: WorkerId) {
        self.push(at, Happening::Kill(worker));
    }

    /// A worker starts to drain.
    pub fn drain(&mut self, at: Micros, worker: WorkerId) {
        self.push(at, Happening::Router(Event::WorkerDraining { worker }));
    }

    /// A request arrives.
    pub fn arrive(&mut self, at: Micros, request: NewRequest) {
        self.push(at, Happening::Router(Event::RequestArrived(request)));
    }

    /// A client goes away.
    pub fn cancel(&mut self, at: Micros, request: RequestId) {
        self.push(at, Happening::Router(Event::Cancelled { request, choice: None }));
    }

    /// Runs until nothing is left to happen, or until `limit`.
    pub fn run(&mut self, limit: Micros) -> &Outcome {
        while let Some(&Reverse((at, sequence))) = self.heap.peek() {
            if at > limit {
                break;
            }
            self.heap.pop();
            let Some(happening) = self.happenings.remove(&sequence) else { continue };
            self.now = at;
            self.outcome.end = at;
            self.happen(happening);
        }
        for (id, connected) in &self.workers {
            self.outcome.workers.insert(*id, connected.totals);
        }
        &self.outcome
    }

    /// The scheduler's view of its workers.
    pub fn loads(&self) -> Vec<WorkerLoad> {
        self.scheduler.loads()
    }

    /// What a worker itself says: see [`SliceWorker::load`].
    pub fn worker_load(&self, worker: WorkerId) -> Option<[u64; 6]> {
        self.workers.get(&worker).map(|connected| connected.worker.load())
    }

    /// The decisions made.
    pub fn decisions(&self) -> impl Iterator<Item = &Decision> {
        self.scheduler.decisions()
    }

    fn push(&mut self, at: Micros, happening: Happening) {
        self.sequence += 1;
        self.heap.push(Reverse((at, self.sequence)));
        self.happenings.insert(self.sequence, happening);
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Router(event) => self.router(event),
            Happening::Join(spec, actual, timing) => {
                let id = WorkerId(self.slots);
                self.slots += 1;
                self.sessions += 1;
                let session = self.sessions;
                let worker = SliceWorker::new(actual, timing);
                self.workers.insert(id, Connected { worker, session, seq: 0, totals: WorkerOutcome::default() });
                self.router(Event::WorkerJoined { worker: id, spec });
                self.push(self.now + self.delay, Happening::ToWorker(id, session, Command::Hello));
            }
            Happening::Kill(id) => {
                if let Some(gone) = self.workers.remove(&id) {
                    self.outcome.workers.insert(id, gone.totals);
                    self.router(Event::WorkerLost { worker: id, epoch: gone.worker.spec().epoch });
                }
            }
            Happening::ToWorker(id, session, command) => {
                let mut out = Vec::new();
                let Some(connected) = self.workers.get_mut(&id).filter(|c| c.session == session) else { return };
                connected.worker.command(self.now, command, &mut out);
                self.says(id, out);
            }
            Happening::Wake(id, session) => {
                let mut out = Vec::new();
                let Some(connected) = self.workers.get_mut(&id).filter(|c| c.session == session) else { return };
                connected.worker.wake(self.now, &mut out);
                self.says(id, out);
            }
            Happening::FromWorker(id, seq, message) => {
                let Some(connected) = self.workers.get(&id) else { return };
                let epoch = connected.worker.spec().epoch;
                self.router(Event::Worker { worker: id, epoch, seq, message });
            }
        }
    }

    fn says(&mut self, id: WorkerId, out: Vec<WorkerMessage>) {
        let Some(connected) = self.workers.get_mut(&id) else { return };
        let session = connected.session;
        let wake = connected.worker.next_wake();
        for message in out {
            if let WorkerMessage::SliceReported(report) = &message {
                connected.totals.busy += report.prefill + report.decode;
                connected.totals.idle += report.idle;
                connected.totals.slices += u64::from(report.steps > 0);
                connected.totals.peak = connected.totals.peak.max(report.peak.0);
                for row in &report.rows {
                    connected.totals.computed += row.computed;
                    connected.totals.cached += row.cached;
                }
            }
            if let WorkerMessage::Refused { reason, detail, .. } = &message
                && *reason != router_core::Refusal::Stale
            {
                self.outcome.refused.push(format!("{id} {reason:?}: {detail}"));
            }
            connected.seq += 1;
            let seq = connected.seq;
            self.sequence += 1;
            self.heap.push(Reverse((self.now + self.delay, self.sequence)));
            self.happenings.insert(self.sequence, Happening::FromWorker(id, seq, message));
        }
        if let Some(at) = wake {
            self.push(at, Happening::Wake(id, session));
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
                let terms = plan.add.iter().map(|row| (row.key, Terms { logprobs: Some(1), ..Terms::default() }));
                let terms = terms.collect();
                self.send(id, Command::Plan(plan, terms));
            }
            Action::Drop(id, rows) => self.send(id, Command::Drop(rows)),
            Action::Cut(id, batch) => self.send(id, Command::Cut(batch, None)),
            Action::ReleaseKv(id, rows) => self.send(id, Command::ReleaseKv(rows)),
            Action::Resync(id) => self.send(id, Command::Resync),
            Action::Quarantine(id, why) => self.outcome.quarantined.push(format!("{id}: {why}")),
            Action::Placed(..) => {}
            Action::Tokens { row, first_index, ids, logprobs } => {
                let of: Vec<u32> = logprobs.iter().filter_map(|logprobs| Some(logprobs.top.first()?.0)).collect();
                assert_eq!(ids, of, "{row}: logprobs of other tokens");
                let outcome = outcome(&mut self.outcome, row);
                assert_eq!(outcome.tokens.len(), first_index as usize, "{row}: tokens out of order");
                outcome.first.get_or_insert(self.now);
                outcome.tokens.extend(ids);
            }
            Action::Finish(row, end) => {
                let at = self.now;
                outcome(&mut self.outcome, row).ends.push((at, end));
            }
            Action::Reject(request, why) => {
                self.outcome.rejected.insert(request, why);
            }
            Action::WakeAt(at) => self.push(at, Happening::Router(Event::Tick)),
        }
    }

    fn send(&mut self, id: WorkerId, command: Command) {
        if let Some(session) = self.workers.get(&id).map(|connected| connected.session) {
            self.push(self.now + self.delay, Happening::ToWorker(id, session, command));
        }
    }
}

fn outcome(all: &mut Outcome, row: RowId) -> &mut RowOutcome {
    all.rows.entry(row).or_insert_with(|| RowOutcome { tokens: Vec::new(), first: None, ends: Vec::new() })
}

impl Outcome {
    /// Rows that ended this way.
    pub fn ended(&self, reason: FinishReason) -> usize {
        self.rows.values().filter(|row| row.ends.iter().any(|(_, end)| end.reason == reason)).count()
    }

    /// Share of prefill tokens that were found cached.
    pub fn hit_ratio(&self) -> f64 {
        let cached: u64 = self.rows.values().flat_map(|row| &row.ends).map(|(_, end)| end.cached.0).sum();
        let prompt: u64 = self.rows.values().flat_map(|row| &row.ends).map(|(_, end)| end.prompt.0).sum();
        cached as f64 / prompt.max(1) as f64
    }
}
