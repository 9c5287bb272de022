//! One task per pool that owns its [`Scheduler`]: commands go in, actions are carried out in order.
//!
//! It knows which request waits on which channel and which worker hangs on which link; what runs where and when is the
//! core's. It never waits for a client or a worker: a full channel costs the one at its other end.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use router_core::{
    Action, BatchRecord, BlockHash, Decision, DecisionId, Epoch, Event, Hotspots, Micros, Moves, NewRequest, PlanNo,
    RequestId, RowEnd, RowId, RowKey, Scheduler, TokenLogprobs, Tokens, WorkerId, WorkerLoad, WorkerMessage,
    WorkerSpec,
};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tracing::{debug, error, warn};

use crate::convert::{self, RowExtras};
use crate::error::Error;
use crate::eta::Eta;
use crate::metrics::{Calibration, Metrics};
use crate::proto::router_message::Body as ToWorker;
use crate::proto::{self, Resync};

/// Commands that may wait. Past that, arrivals are answered 429 and links wait.
pub const COMMANDS: usize = 8192;
/// Messages to one worker that may wait: far more than a worker that reads leaves.
pub const LINK_MESSAGES: usize = 1024;
/// Updates of one row that may wait for its client: some 256 KiB at a token each. The rows of a request share so many,
/// but each has room for [`ROW_UPDATES`].
pub const UPDATES: usize = 4096;
/// See [`UPDATES`].
pub const ROW_UPDATES: usize = 64;
/// Commands taken at once; a burst is planned once.
const BURST: usize = 4096;

/// What the dispatcher is told.
#[derive(Debug)]
pub enum Command {
    /// A request.
    Arrive(Arrival),
    /// The client of this request went away, or a stop string of this choice matched.
    Cancel(RequestId, Option<u32>),
    /// A worker's session is open.
    Join {
        /// What it announced.
        spec: WorkerSpec,
        /// Where messages for it go.
        link: mpsc::Sender<ToWorker>,
        /// Gets the reason if the worker is thrown out; dropped if it is given up.
        fate: oneshot::Sender<String>,
        /// Gets its place.
        seat: oneshot::Sender<Seat>,
    },
    /// A message of a worker.
    Message {
        /// Whose.
        seat: Seat,
        /// Its place in the session.
        seq: u64,
        /// What.
        message: WorkerMessage,
    },
    /// The session of this seat ended.
    Lost(Seat),
    /// What is believed of all workers.
    Loads(oneshot::Sender<Vec<WorkerLoad>>),
    /// Where a prompt would go now; nothing comes of it. `None` if no worker can take it.
    Route {
        /// Its ids.
        prompt: Vec<u32>,
        /// Root of its block-hash chain.
        root: BlockHash,
        /// Gets the decision.
        answer: oneshot::Sender<Option<proto::Decision>>,
    },
    /// The latest decisions, oldest first: all of them, or the one of this number.
    Decisions(Option<DecisionId>, oneshot::Sender<Vec<Decided>>),
    /// The latest batches, oldest first.
    Batches(oneshot::Sender<Vec<Batch>>),
    /// The pool is replaced: all ends.
    Close,
}

/// A request with its shell part.
#[derive(Debug)]
pub struct Arrival {
    /// For the core.
    pub request: NewRequest,
    /// For the workers.
    pub extras: RowExtras,
    /// For the client.
    pub updates: mpsc::Sender<Update>,
}

/// What a client's task is told of its request.
#[derive(Clone, Debug)]
pub enum Update {
    /// A row was given to a worker.
    Placed {
        /// The row.
        row: RowId,
        /// The worker's name.
        worker: Arc<str>,
        /// When the row will have ended, where that is foreseen.
        eta: Option<Eta>,
    },
    /// Tokens of a row.
    Tokens {
        /// The row.
        row: RowId,
        /// Absolute index of the first id.
        first_index: u32,
        /// Ids.
        ids: Vec<u32>,
        /// One for each id, or none.
        logprobs: Vec<TokenLogprobs>,
    },
    /// A row ended.
    Finished {
        /// The row.
        row: RowId,
        /// How.
        end: RowEnd,
        /// The worker that had it last.
        worker: Option<Arc<str>>,
    },
    /// Nothing of the request runs.
    Rejected(Error),
    /// The client did not keep up; nothing more comes.
    Overflow,
}

/// A decision as it was made, and as it is made again from its record.
#[derive(Clone, Debug)]
pub struct Decided {
    /// The record.
    pub decision: proto::Decision,
    /// When, on the pool's clock.
    pub at: Micros,
    /// The worker that the record alone leads to.
    pub recomputed: Option<String>,
}

/// A batch, and what was known of it before it ran.
#[derive(Clone, Debug)]
pub struct Batch {
    /// The worker's name.
    pub worker: String,
    /// The record.
    pub record: BatchRecord,
}

/// A worker's place in the pool for one session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seat {
    /// Its slot in the core.
    pub worker: WorkerId,
    session: u64,
}

/// What others may read of the pool without asking its task.
#[derive(Debug, Default)]
pub struct PoolState {
    ready: AtomicUsize,
    members: AtomicUsize,
    most_tokens: AtomicU64,
    figures: Mutex<Figures>,
}

/// What the core counts of a pool as a whole.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    /// S: most iterations of the next slice.
    pub slice_len: u32,
    /// Rows that moved for another reason than a lost worker.
    pub moves: Moves,
    /// Events that came with a time before that of the one before them.
    pub clock_jumps: u64,
    /// Reports of more iterations or time than there can have been.
    pub doubtful_reports: u64,
    /// What the hotspot guard has seen and done.
    pub hotspots: Hotspots,
}

impl PoolState {
    /// Workers that take rows.
    pub fn ready(&self) -> usize {
        self.ready.load(Ordering::Relaxed)
    }

    /// Workers with an open session.
    pub fn members(&self) -> usize {
        self.members.load(Ordering::Relaxed)
    }

    /// As they were when the loads were asked for last.
    pub fn figures(&self) -> Figures {
        *self.figures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Most tokens of prompt and output that some worker takes.
    pub fn most_tokens(&self) -> Tokens {
        Tokens(self.most_tokens.load(Ordering::Relaxed))
    }
}

struct Session {
    number: u64,
    epoch: Epoch,
    name: Arc<str>,
    link: mpsc::Sender<ToWorker>,
    fate: oneshot::Sender<String>,
    /// The batch that it was told to end, and when.
    cut: Option<(PlanNo, Instant)>,
    calibration: Calibration,
}

/// Kept until its last row ended, client or not: a plan may still name it.
struct Client {
    extras: RowExtras,
    /// `None` once nobody listens.
    updates: Option<mpsc::Sender<Update>>,
    rows_left: u32,
}

/// The task's state; see [`run`].
struct Dispatcher {
    scheduler: Scheduler,
    policy: &'static str,
    start: Instant,
    seats: Vec<Option<Session>>,
    /// Who had each slot from when on: decisions and batches of the past are named by who had it then.
    names: Vec<Vec<(Micros, Arc<str>)>>,
    sessions: u64,
    clients: HashMap<RequestId, Client>,
    wake: Option<Micros>,
    /// Longest a request may wait for its first plan to start, and by when those that came last must have begun.
    queue_timeout: Option<Duration>,
    begin_by: VecDeque<(Instant, RequestId)>,
    events: Vec<Event>,
    /// Batches whose report is among the events.
    ended: Vec<(WorkerId, PlanNo)>,
    /// Rows to drop, by worker: of one flush they go in one message, so that many clients that leave at once do not fill
    /// a link.
    drops: Vec<(WorkerId, Vec<RowKey>)>,
    /// Ready workers may have changed since `state` was written.
    stale: bool,
    state: Arc<PoolState>,
    metrics: Arc<Metrics>,
}

/// Runs until all senders of commands are gone or the pool is closed.
pub async fn run(
    scheduler: Scheduler,
    policy: &'static str,
    queue_timeout: Option<Duration>,
    mut commands: mpsc::Receiver<Command>,
    state: Arc<PoolState>,
    metrics: Arc<Metrics>,
) {
    let mut dispatcher = Dispatcher {
        scheduler,
        policy,
        start: Instant::now(),
        seats: Vec::new(),
        names: Vec::new(),
        sessions: 0,
        clients: HashMap::new(),
        wake: None,
        queue_timeout,
        begin_by: VecDeque::new(),
        events: Vec::new(),
        ended: Vec::new(),
        drops: Vec::new(),
        stale: false,
        state,
        metrics,
    };
    let mut burst = Vec::new();
    loop {
        tokio::select! {
            taken = commands.recv_many(&mut burst, BURST) => if taken == 0 { break },
            () = sleep_until(dispatcher.deadline()) => {}
        }
        for command in burst.drain(..) {
            if matches!(command, Command::Close) {
                return;
            }
            dispatcher.take(command);
        }
        dispatcher.flush();
        dispatcher.expire();
    }
}

impl Dispatcher {
    fn now(&self) -> Micros {
        Micros(u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX))
    }

    fn deadline(&self) -> Option<Instant> {
        let wake = self.wake.map(|at| self.start + Duration::from_micros(at.0));
        wake.into_iter().chain(self.begin_by.front().map(|(by, _)| *by)).min()
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Arrive(arrival) => {
                let client = Client {
                    extras: arrival.extras,
                    updates: Some(arrival.updates),
                    rows_left: arrival.request.choices,
                };
                self.clients.insert(arrival.request.id, client);
                if let Some(most) = self.queue_timeout {
                    self.begin_by.push_back((Instant::now() + most, arrival.request.id));
                }
                self.events.push(Event::RequestArrived(arrival.request));
            }
            Command::Cancel(request, choice) => self.cancel(request, choice),
            Command::Join { spec, link, fate, seat } => {
                let (epoch, name) = (spec.epoch, spec.name.as_str().into());
                let calibration = Calibration::default();
                let session = Session { number: 0, epoch, name, link, fate, cut: None, calibration };
                self.join(spec, session, seat);
            }
            Command::Message { seat, seq, message } => self.message(seat, seq, message),
            Command::Lost(seat) => {
                if self.session(seat).is_some() {
                    self.lose(seat.worker);
                }
            }
            Command::Loads(answer) => {
                // The answer holds what was sent before the question.
                self.flush();
                *self.state.figures.lock().unwrap_or_else(PoisonError::into_inner) = Figures {
                    slice_len: self.scheduler.slice_len(),
                    moves: self.scheduler.moves(),
                    clock_jumps: self.scheduler.clock_jumps(),
                    doubtful_reports: self.scheduler.doubtful_reports(),
                    hotspots: self.scheduler.hotspots().unwrap_or_default(),
                };
                let _ = answer.send(self.scheduler.loads());
            }
            Command::Route { prompt, root, answer } => {
                self.flush();
                let decision = self.scheduler.route(self.now(), &prompt, root);
                let named = |decision: Decision| convert::decision(&decision, |worker| self.name(worker, decision.at));
                let _ = answer.send(decision.map(named));
            }
            Command::Decisions(wanted, answer) => {
                let decided = |decision: &Decision| Decided {
                    decision: convert::decision(decision, |worker| self.name(worker, decision.at)),
                    at: decision.at,
                    recomputed: decision.recompute().map(|worker| self.name(worker, decision.at)),
                };
                let decisions = self.scheduler.decisions();
                let decisions = decisions.filter(|decision| wanted.is_none_or(|id| decision.id == id));
                let _ = answer.send(decisions.map(decided).collect());
            }
            Command::Batches(answer) => {
                let batch = |record: &BatchRecord| {
                    let worker = self.name(record.worker, record.at);
                    Batch { worker, record: *record }
                };
                let _ = answer.send(self.scheduler.batches().map(batch).collect());
            }
            Command::Close => {}
        }
    }

    fn cancel(&mut self, request: RequestId, choice: Option<u32>) {
        if self.clients.contains_key(&request) {
            self.events.push(Event::Cancelled { request, choice });
        }
    }

    /// Gives up on requests that have waited too long for a plan with them to start.
    fn expire(&mut self) {
        let Some(most) = self.queue_timeout else { return };
        let now = Instant::now();
        while let Some((_, request)) = self.begin_by.front().copied().filter(|(by, _)| *by <= now) {
            self.begin_by.pop_front();
            let Some(client) = self.clients.get_mut(&request).filter(|_| !self.scheduler.has_begun(request)) else {
                continue;
            };
            if let Some(updates) = client.updates.take() {
                let _ = updates.try_send(Update::Rejected(Error::QueueTimeout(most)));
            }
            self.cancel(request, None);
        }
        self.flush();
    }

    fn join(&mut self, spec: WorkerSpec, session: Session, seat: oneshot::Sender<Seat>) {
        // Actions for the last holder of the slot must not reach the new one.
        self.flush();
        let free = self.seats.iter().position(Option::is_none).unwrap_or_else(|| {
            self.seats.push(None);
            self.names.push(Vec::new());
            self.seats.len() - 1
        });
        let Ok(slot) = u32::try_from(free) else { return };
        self.sessions += 1;
        let worker = WorkerId(slot);
        let now = self.now();
        if self.names[free].last().is_none_or(|(_, last)| *last != session.name) {
            self.names[free].push((now, Arc::clone(&session.name)));
        }
        self.seats[free] = Some(Session { number: self.sessions, ..session });
        self.state.members.fetch_add(1, Ordering::Relaxed);
        self.stale = true;
        self.events.push(Event::WorkerJoined { worker, spec });
        if let Err(seat) = seat.send(Seat { worker, session: self.sessions }) {
            self.lose(seat.worker);
        }
    }

    fn message(&mut self, seat: Seat, seq: u64, message: WorkerMessage) {
        let Some(session) = self.session_mut(seat) else { return };
        let epoch = session.epoch;
        let last = matches!(message, WorkerMessage::Snapshot { last: true, .. });
        match &message {
            WorkerMessage::SliceReported(report) => {
                let cut = session.cut.take_if(|(batch, _)| *batch == report.batch);
                let name = Arc::clone(&session.name);
                self.metrics.slice(&name, report);
                if let Some((_, at)) = cut {
                    self.metrics.cut_done(at.elapsed());
                }
                self.ended.push((seat.worker, report.batch));
            }
            WorkerMessage::Refused { plan, reason, detail, .. } => {
                let name = Arc::clone(&session.name);
                debug!(worker = %name, %plan, ?reason, detail, "plan refused");
                self.metrics.refused(&name, *reason);
            }
            _ => {}
        }
        self.stale |= last;
        self.events.push(Event::Worker { worker: seat.worker, epoch, seq, message });
    }

    /// The session of a seat, if it is still that session.
    fn session(&self, seat: Seat) -> Option<&Session> {
        let session = self.seats.get(seat.worker.0 as usize)?.as_ref()?;
        (session.number == seat.session).then_some(session)
    }

    fn session_mut(&mut self, seat: Seat) -> Option<&mut Session> {
        let session = self.seats.get_mut(seat.worker.0 as usize)?.as_mut()?;
        (session.number == seat.session).then_some(session)
    }

    fn at(&self, worker: WorkerId) -> Option<&Session> {
        self.seats.get(worker.0 as usize)?.as_ref()
    }

    /// The name of the worker that had the slot at that time.
    fn name(&self, worker: WorkerId, at: Micros) -> String {
        let names = self.names.get(worker.0 as usize).map_or(&[][..], Vec::as_slice);
        let then = names.iter().rev().find(|(since, _)| *since <= at).or(names.first());
        then.map_or_else(|| worker.to_string(), |(_, name)| name.to_string())
    }

    /// Frees the slot and tells the core. Dropping what is given back ends the session, if it is still there.
    fn lose(&mut self, worker: WorkerId) -> Option<Session> {
        let session = self.seats.get_mut(worker.0 as usize).and_then(Option::take)?;
        self.drops.retain(|(of, _)| *of != worker);
        self.metrics.left(&session.name);
        self.state.members.fetch_sub(1, Ordering::Relaxed);
        self.stale = true;
        self.events.push(Event::WorkerLost { worker, epoch: session.epoch });
        Some(session)
    }

    /// Feeds the core with all that has happened and carries out what it wants; carrying out may itself be an event.
    fn flush(&mut self) {
        let mut actions = Vec::new();
        loop {
            let now = self.now();
            if self.wake.is_some_and(|at| at <= now) {
                self.wake = None;
                self.events.push(Event::Tick);
            }
            if self.events.is_empty() {
                // Sending may lose a worker, which is an event.
                let workers: Vec<WorkerId> = self.drops.iter().map(|(worker, _)| *worker).collect();
                for worker in workers {
                    self.send_drops(worker);
                }
                if self.events.is_empty() {
                    break;
                }
            }
            self.scheduler.handle_many(now, self.events.drain(..), &mut actions);
            self.score();
            for action in actions.drain(..) {
                self.perform(action);
            }
        }
        if std::mem::take(&mut self.stale) {
            self.publish();
        }
    }

    /// Compares the batches that ended with what was known of them.
    fn score(&mut self) {
        for (worker, batch) in self.ended.drain(..) {
            // From the newest on: those that just ran are near the end, and a slot's last holder counted its plans too.
            let mut records = self.scheduler.batches().rev();
            let record = records.find(|record| record.worker == worker && record.batch == batch);
            let session = self.seats.get_mut(worker.0 as usize).and_then(Option::as_mut);
            if let (Some(record), Some(session)) = (record, session) {
                self.metrics.scored(&session.name, record, &mut session.calibration);
            }
        }
    }

    fn publish(&self) {
        let loads = self.scheduler.loads();
        let ready = loads.iter().filter(|load| load.ready);
        self.state.ready.store(ready.clone().count(), Ordering::Relaxed);
        let most = ready.map(|load| load.spec.most_tokens()).max();
        let most = most.or_else(|| loads.iter().map(|load| load.spec.most_tokens()).max());
        if let Some(most) = most {
            self.state.most_tokens.store(most.0, Ordering::Relaxed);
        }
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Plan(worker, plan) => {
                // The worker is to hear of things in the order in which they happened.
                self.send_drops(worker);
                let clients = &self.clients;
                let message = convert::plan(plan, |request| clients.get(&request).map(|client| &client.extras));
                self.send(worker, message);
            }
            Action::Drop(worker, rows) => match self.drops.iter_mut().find(|(of, _)| *of == worker) {
                Some((_, pending)) => pending.extend(rows),
                None => self.drops.push((worker, rows)),
            },
            Action::Cut(worker, batch) => {
                if let Some(session) = self.seats.get_mut(worker.0 as usize).and_then(Option::as_mut) {
                    self.metrics.cut(&session.name);
                    session.cut = Some((batch, Instant::now()));
                }
                self.send(worker, convert::cut(batch));
            }
            Action::ReleaseKv(worker, rows) => self.send(worker, convert::release_kv(&rows)),
            Action::Resync(worker) => {
                self.send_drops(worker);
                self.send(worker, ToWorker::Resync(Resync {}));
            }
            Action::Quarantine(worker, why) => {
                if let Some(session) = self.lose(worker) {
                    error!(worker = %session.name, why, "quarantined: what the worker says cannot be true");
                    self.metrics.quarantined(&session.name);
                    let _ = session.fate.send(why);
                }
            }
            Action::Placed(row, worker, band) => {
                self.metrics.decision(self.policy);
                if let Some(worker) = self.at(worker).map(|session| Arc::clone(&session.name)) {
                    let eta = Eta::of_row(Instant::now(), band);
                    self.update(row.request, Update::Placed { row, worker, eta });
                }
            }
            Action::Tokens { row, first_index, ids, logprobs } => {
                self.update(row.request, Update::Tokens { row, first_index, ids, logprobs });
            }
            Action::Finish(row, end) => self.finish(row, end),
            Action::Reject(request, rejection) => {
                if let Some(updates) = self.clients.remove(&request).and_then(|client| client.updates) {
                    let _ = updates.try_send(Update::Rejected(rejection.into()));
                }
            }
            Action::WakeAt(at) => self.wake = Some(self.wake.map_or(at, |wake| wake.min(at))),
        }
    }

    fn send_drops(&mut self, worker: WorkerId) {
        if let Some(at) = self.drops.iter().position(|(of, _)| *of == worker) {
            let (_, rows) = self.drops.remove(at);
            self.send(worker, convert::drop_rows(&rows));
        }
    }

    fn send(&mut self, worker: WorkerId, message: ToWorker) {
        let Some(session) = self.at(worker) else { return };
        if let Err(error) = session.link.try_send(message) {
            if matches!(error, mpsc::error::TrySendError::Full(_)) {
                warn!(worker = %session.name, "lost: the worker does not read");
            }
            self.lose(worker);
        }
    }

    /// Tells a client; one that is gone or reads too slowly is cancelled. The last places of its channel are kept for
    /// the ends of its rows.
    fn update(&mut self, request: RequestId, update: Update) {
        let Some(client) = self.clients.get_mut(&request) else { return };
        let Some(updates) = &client.updates else { return };
        let full = updates.capacity() <= client.rows_left as usize;
        let sent = updates.try_send(if full { Update::Overflow } else { update });
        if full || sent.is_err() {
            client.updates = None;
            self.events.push(Event::Cancelled { request, choice: None });
        }
    }

    fn finish(&mut self, row: RowId, end: RowEnd) {
        self.metrics.row_end(&end);
        let worker = end.worker.and_then(|worker| self.at(worker)).map(|session| Arc::clone(&session.name));
        let Some(client) = self.clients.get_mut(&row.request) else { return };
        client.rows_left = client.rows_left.saturating_sub(1);
        let last = client.rows_left == 0;
        if let Some(updates) = &client.updates {
            let _ = updates.try_send(Update::Finished { row, end, worker });
        }
        if last {
            self.clients.remove(&row.request);
        }
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
