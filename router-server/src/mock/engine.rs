//! The mock's one task: whose session it is, and the modelled worker on the real clock.

use std::collections::HashMap;
use std::time::Duration;

use router_core::{Micros, WorkerMessage as Said};
use router_sim::{Command, Modelled};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::{info, warn};

use super::convert::{self, Refused};
use crate::proto::refused::Reason;
use crate::proto::router_message::Body as Heard;
use crate::proto::worker_message::Body;
use crate::proto::{Goodbye, Pong, RouterMessage, WorkerInfo, WorkerMessage};

/// Iterations made up for at once when the clock ran ahead, before messages are looked at again.
const CATCH_UP: usize = 64;

/// What happens to the task.
pub enum Input {
    /// A stream was opened.
    Opened { session: u64, sender: mpsc::Sender<WorkerMessage> },
    /// It said something.
    Said { session: u64, message: RouterMessage },
    /// Its other half is closed.
    Closed { session: u64 },
    /// The process ends.
    Stop,
}

struct Engine {
    worker: Modelled,
    info: WorkerInfo,
    start: Instant,
    streams: HashMap<u64, mpsc::Sender<WorkerMessage>>,
    owner: Option<u64>,
    owner_epoch: Option<u64>,
    state_seq: u64,
    /// The worker's iterations when the running batch began.
    before: u64,
    out: Vec<Said>,
}

/// Runs until stopped.
pub async fn run(worker: Modelled, info: WorkerInfo, mut inputs: mpsc::Receiver<Input>) {
    let mut engine = Engine {
        worker,
        info,
        start: Instant::now(),
        streams: HashMap::new(),
        owner: None,
        owner_epoch: None,
        state_seq: 0,
        before: 0,
        out: Vec::new(),
    };
    loop {
        let wake = engine.worker.next_wake().map(|at| engine.start + Duration::from_micros(at.0));
        tokio::select! {
            biased;
            input = inputs.recv() => match input {
                None | Some(Input::Stop) => break,
                Some(input) => engine.take(input),
            },
            () = sleep_until(wake) => engine.catch_up(),
        }
    }
    engine.say_goodbye("the worker stops");
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

impl Engine {
    fn now(&self) -> Micros {
        Micros(u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX))
    }

    /// Iterations end when they were to end, not when a timer of milliseconds notices: short ones keep their pace.
    fn catch_up(&mut self) {
        let now = self.now();
        for _ in 0..CATCH_UP {
            match self.worker.next_wake().filter(|at| *at <= now) {
                None => break,
                Some(at) => self.worker.wake(at, &mut self.out),
            }
            self.say_all();
        }
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Opened { session, sender } => {
                self.streams.insert(session, sender);
            }
            Input::Closed { session } => {
                self.streams.remove(&session);
                if self.owner == Some(session) {
                    self.owner = None;
                    // Nothing brings the rows back: the next session drops them anyway.
                    self.drop_all();
                }
            }
            Input::Said { session, message } => self.heard(session, message.body),
            Input::Stop => {}
        }
    }

    fn drop_all(&mut self) {
        let now = self.now();
        self.worker.command(now, Command::Hello, &mut self.out);
        self.before = self.worker.iterations();
        if self.owner.is_none() {
            self.out.clear();
        }
    }

    fn heard(&mut self, session: u64, body: Option<Heard>) {
        // A body from a later minor version is none of ours.
        let Some(body) = body else { return };
        if self.owner == Some(session) {
            self.command(body);
            return;
        }
        let Heard::Hello(hello) = body else {
            self.turn_away(session, Reason::Invalid, "the first message is no hello".into());
            return;
        };
        if let Some(epoch) = self.owner_epoch.filter(|epoch| hello.owner_epoch <= *epoch) {
            self.turn_away(session, Reason::NotOwner, format!("owner_epoch: {epoch} owns this worker"));
            return;
        }
        self.say_goodbye("another owner took the worker");
        info!(router = hello.router_id, epoch = hello.owner_epoch, "session");
        self.owner = Some(session);
        self.owner_epoch = Some(hello.owner_epoch);
        self.state_seq = 0;
        self.drop_all();
        self.say_all();
    }

    fn command(&mut self, body: Heard) {
        let command = match body {
            Heard::Hello(_) => {
                let twice = Refused { reason: Reason::Invalid, detail: "a second hello".into(), rows: Vec::new() };
                return self.say(convert::refused(0, twice, self.worker.load()));
            }
            Heard::Ping(ping) => return self.say(Body::Pong(Pong { nonce: ping.nonce })),
            Heard::Plan(plan) => match convert::plan(&plan, &self.info) {
                Ok((plan, terms)) => Command::Plan(plan, terms),
                Err(refused) => return self.say(convert::refused(plan.plan_no, refused, self.worker.load())),
            },
            Heard::Cut(cut) => Command::Cut(router_core::PlanNo(cut.batch), cut.after_step),
            Heard::Drop(drop) => Command::Drop(convert::keys(&drop.rows)),
            Heard::ReleaseKv(release) => Command::ReleaseKv(convert::keys(&release.rows)),
            Heard::Resync(_) => Command::Resync,
        };
        let now = self.now();
        self.worker.command(now, command, &mut self.out);
        self.say_all();
    }

    /// Sends what the worker put out, with the load after every report.
    fn say_all(&mut self) {
        for said in std::mem::take(&mut self.out) {
            let reported = matches!(said, Said::SliceReported(_));
            let step = u32::try_from(self.worker.iterations() - self.before).unwrap_or(u32::MAX);
            self.say(convert::body(said, step, self.worker.load()));
            if reported {
                self.before = self.worker.iterations();
                self.say(convert::load(self.worker.load(), self.worker.iterations()));
            }
        }
    }

    fn say(&mut self, body: Body) {
        let Some(session) = self.owner else { return };
        let Some(stream) = self.streams.get(&session) else { return };
        self.state_seq += 1;
        let (worker_epoch, state_seq) = (self.info.worker_epoch, self.state_seq);
        if stream.try_send(WorkerMessage { worker_epoch, state_seq, body: Some(body) }).is_err() {
            warn!("the router does not read: session closed");
            self.streams.remove(&session);
            self.owner = None;
            self.drop_all();
        }
    }

    fn say_goodbye(&mut self, reason: &str) {
        self.say(Body::Goodbye(Goodbye { reason: reason.into() }));
        if let Some(session) = self.owner.take() {
            self.streams.remove(&session);
        }
    }

    fn turn_away(&mut self, session: u64, reason: Reason, detail: String) {
        let Some(stream) = self.streams.remove(&session) else { return };
        let refused = Refused { reason, detail, rows: Vec::new() };
        let body = Some(convert::refused(0, refused, self.worker.load()));
        let _ = stream.try_send(WorkerMessage { worker_epoch: self.info.worker_epoch, state_seq: 1, body });
    }
}
