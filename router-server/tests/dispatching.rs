//! The dispatcher alone: commands in, messages and updates out. The test is the worker.

#![allow(missing_docs, clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use router_core::{
    BatchEnd, BlockHash, BlockSize, Blocks, Config, Epoch, Layout, Micros, Mode, ModelSpec, NewRequest, PlanNo,
    PolicyName, RequestId, RowKey, RowReport, RowTokens, Scheduler, SliceReport, Tokens, WorkerMessage, WorkerSpec,
};
use router_server::convert::RowExtras;
use router_server::dispatch::{self, Arrival, Command, PoolState, Seat, Update};
use router_server::error::Error;
use router_server::metrics::Metrics;
use router_server::proto;
use router_server::proto::router_message::Body;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(5);

struct Pool {
    commands: mpsc::Sender<Command>,
    state: Arc<PoolState>,
}

struct Worker {
    seat: Seat,
    seq: u64,
    commands: mpsc::Sender<Command>,
    messages: mpsc::Receiver<Body>,
    fate: oneshot::Receiver<String>,
}

fn model() -> ModelSpec {
    ModelSpec { digest: "m".into(), tokenizer: "t".into(), block_size: BlockSize::new(16).unwrap(), vocab: 100 }
}

impl Pool {
    fn start() -> Self {
        Self::with_queue_timeout(None)
    }

    fn with_queue_timeout(most: Option<Duration>) -> Self {
        let config =
            Config { policy: PolicyName::Product, mode: Mode::Slice, slice_len: Some(1000), seed: 0, max_rows: 100 };
        let (commands, receiver) = mpsc::channel(100);
        let state = Arc::new(PoolState::default());
        let scheduler = Scheduler::new(model(), config);
        let metrics = Arc::new(Metrics::default());
        tokio::spawn(dispatch::run(scheduler, "product", most, receiver, Arc::clone(&state), metrics));
        Self { commands, state }
    }

    /// A worker whose link holds so many messages.
    async fn join(&self, room: usize) -> Worker {
        self.join_as("w", room).await
    }

    async fn join_as(&self, name: &str, room: usize) -> Worker {
        let spec = WorkerSpec {
            name: name.into(),
            epoch: Epoch(1),
            model: model(),
            blocks: Blocks(1000),
            max_rows: 8,
            max_context: Tokens(10_000),
            chunk: Tokens(512),
            layout: Layout::Paged,
            cost: None,
        };
        let (link, messages) = mpsc::channel(room);
        let (fate_sender, fate) = oneshot::channel();
        let (seat_sender, seat) = oneshot::channel();
        let join = Command::Join { spec, link, fate: fate_sender, seat: seat_sender };
        self.commands.send(join).await.unwrap();
        let seat = seat.await.unwrap();
        let mut worker = Worker { seat, seq: 0, commands: self.commands.clone(), messages, fate };
        worker.say(WorkerMessage::Snapshot { chunk: 0, last: true, hashes: Vec::new() }).await;
        worker
    }

    async fn arrive(&self, request: u64, room: usize) -> mpsc::Receiver<Update> {
        self.arrive_with(request, room, 1).await
    }

    async fn arrive_with(&self, request: u64, room: usize, choices: u32) -> mpsc::Receiver<Update> {
        let (updates, receiver) = mpsc::channel(room);
        let request = NewRequest {
            id: RequestId(request),
            prompt: Arc::from([5, 6]),
            root: BlockHash(0),
            choices,
            max_tokens: Tokens(1000),
            urgent: false,
        };
        let extras = RowExtras {
            sampling: proto::Sampling::default(),
            limits: proto::Limits::default(),
            model: "tiny".into(),
            traceparent: String::new(),
        };
        self.commands.send(Command::Arrive(Arrival { request, extras, updates })).await.unwrap();
        receiver
    }
}

impl Worker {
    async fn say(&mut self, message: WorkerMessage) {
        self.seq += 1;
        self.commands.send(Command::Message { seat: self.seat, seq: self.seq, message }).await.unwrap();
    }

    async fn hear(&mut self) -> Option<Body> {
        timeout(SOON, self.messages.recv()).await.expect("a message")
    }

    /// The row of the next plan that adds one.
    async fn row(&mut self) -> RowKey {
        loop {
            if let Some(Body::Plan(plan)) = self.hear().await
                && let Some(row) = plan.add.first().and_then(|start| start.row)
            {
                let id = router_core::RowId { request: RequestId(row.request), choice: row.choice };
                return RowKey { row: id, attempt: row.attempt };
            }
        }
    }

    async fn draw(&mut self, key: RowKey, first_index: u32) {
        let row = RowTokens { key, first_index, ids: vec![7], logprobs: Vec::new(), finish: None, cached: None };
        self.say(WorkerMessage::Steps { batch: PlanNo(1), rows: vec![row] }).await;
    }

    async fn is_told_to_drop(&mut self) -> bool {
        loop {
            match self.hear().await {
                Some(Body::Drop(_)) => return true,
                Some(_) => {}
                None => return false,
            }
        }
    }
}

#[tokio::test]
async fn a_client_that_does_not_read_is_cancelled_and_told() {
    let pool = Pool::start();
    let mut worker = pool.join(100).await;
    let mut updates = pool.arrive(1, 4).await;
    let key = worker.row().await;
    for index in 0..10 {
        worker.draw(key, index).await;
    }
    assert!(worker.is_told_to_drop().await);
    let mut got = Vec::new();
    while let Some(update) = timeout(SOON, updates.recv()).await.unwrap() {
        got.push(update);
    }
    assert!(matches!(got[0], Update::Placed { .. }));
    assert!(matches!(got[1], Update::Tokens { first_index: 0, .. }));
    assert!(matches!(got[2], Update::Tokens { first_index: 1, .. }));
    assert!(matches!(got[3], Update::Overflow));
    assert_eq!(got.len(), 4);
}

#[tokio::test]
async fn a_choice_ends_alone_and_every_end_has_room() {
    let pool = Pool::start();
    let mut worker = pool.join(100).await;
    // Three placements, one token, three ends.
    let mut updates = pool.arrive_with(1, 7, 3).await;
    let key = worker.row().await;
    let of = |choice| RowKey { row: router_core::RowId { choice, ..key.row }, ..key };
    worker.draw(of(1), 0).await;
    pool.commands.send(Command::Cancel(RequestId(1), Some(1))).await.unwrap();
    assert!(worker.is_told_to_drop().await);
    pool.commands.send(Command::Cancel(RequestId(1), None)).await.unwrap();
    let mut got = Vec::new();
    while let Some(update) = timeout(SOON, updates.recv()).await.unwrap() {
        got.push(match update {
            Update::Placed { .. } => "placed".to_owned(),
            Update::Tokens { row, .. } => format!("tokens {}", row.choice),
            Update::Finished { row, .. } => format!("end {}", row.choice),
            other => format!("{other:?}"),
        });
    }
    assert_eq!(got, ["placed", "placed", "placed", "tokens 1", "end 1", "end 0", "end 2"]);
}

#[tokio::test]
async fn a_client_that_is_gone_is_noticed_at_the_next_token() {
    let pool = Pool::start();
    let mut worker = pool.join(100).await;
    let updates = pool.arrive(1, 100).await;
    let key = worker.row().await;
    drop(updates);
    worker.draw(key, 0).await;
    assert!(worker.is_told_to_drop().await);
}

#[tokio::test]
async fn a_worker_that_does_not_read_is_lost() {
    let pool = Pool::start();
    let mut worker = pool.join(1).await;
    let mut updates = Vec::new();
    for request in 1..10 {
        updates.push(pool.arrive(request, 100).await);
    }
    let given_up = timeout(SOON, &mut worker.fate).await.unwrap();
    assert!(given_up.is_err(), "given up, not thrown out");
    assert_eq!(pool.state.members(), 0);
    // Its rows end, as no other worker comes.
    loop {
        match timeout(SOON, updates[0].recv()).await.unwrap().unwrap() {
            Update::Finished { end, .. } => break assert!(end.error.is_some()),
            Update::Rejected(_) => break,
            _ => {}
        }
    }
}

#[tokio::test]
async fn a_lie_is_told_to_the_link_and_old_seats_are_void() {
    let pool = Pool::start();
    let mut worker = pool.join(100).await;
    let _updates = pool.arrive(1, 100).await;
    let key = worker.row().await;
    let row = RowTokens { key, first_index: 0, ids: vec![7; 2000], logprobs: Vec::new(), finish: None, cached: None };
    worker.say(WorkerMessage::Steps { batch: PlanNo(1), rows: vec![row] }).await;
    let why = timeout(SOON, &mut worker.fate).await.unwrap().unwrap();
    assert!(!why.is_empty());
    // The slot goes to another; what the old session still says or loses is not its.
    let mut next = pool.join(100).await;
    assert_eq!(next.seat.worker, worker.seat.worker);
    worker.say(WorkerMessage::Heartbeat).await;
    pool.commands.send(Command::Lost(worker.seat)).await.unwrap();
    let key = next.row().await;
    assert_eq!((key.row.request, key.attempt), (RequestId(1), 1), "the row moved");
    assert_eq!(pool.state.members(), 1);
}

#[tokio::test]
async fn cancels_of_one_moment_are_one_message() {
    let pool = Pool::start();
    let mut worker = pool.join(100).await;
    let mut updates = Vec::new();
    for request in 1..=8 {
        updates.push(pool.arrive(request, 100).await);
    }
    let (answer, loads) = oneshot::channel();
    pool.commands.send(Command::Loads(answer)).await.unwrap();
    let loads = loads.await.unwrap();
    assert_eq!(loads.iter().map(|load| load.batch_size).sum::<u64>(), 8);
    // Nothing is awaited here, so the dispatcher finds them together.
    for request in 1..=8 {
        pool.commands.try_send(Command::Cancel(RequestId(request), None)).unwrap();
    }
    let mut dropped = Vec::new();
    while let Ok(Some(message)) = timeout(Duration::from_millis(200), worker.messages.recv()).await {
        if let Body::Drop(drop) = message {
            dropped.push(drop.rows.len());
        }
    }
    assert_eq!(dropped, [8]);
}

#[tokio::test]
async fn a_request_that_is_not_begun_in_time_is_given_up_and_one_that_is_runs_on() {
    let most = Duration::from_millis(200);
    let pool = Pool::with_queue_timeout(Some(most));
    let mut worker = pool.join(100).await;
    // The first is in the plan that starts on arrival; the second in the plan behind it, which does not start.
    let mut first = pool.arrive(1, 100).await;
    let key = worker.row().await;
    let mut second = pool.arrive(2, 100).await;
    worker.row().await;
    let update = loop {
        match second.recv().await.unwrap() {
            Update::Placed { .. } => {}
            other => break other,
        }
    };
    assert!(matches!(update, Update::Rejected(Error::QueueTimeout(waited)) if waited == most), "{update:?}");
    assert!(worker.is_told_to_drop().await);
    tokio::time::sleep(2 * most).await;
    worker.draw(key, 0).await;
    assert!(matches!(first.recv().await.unwrap(), Update::Placed { .. }));
    assert!(matches!(first.recv().await.unwrap(), Update::Tokens { first_index: 0, .. }));
}

#[tokio::test]
async fn what_is_past_has_the_name_of_who_was_there() {
    let pool = Pool::start();
    let mut worker = pool.join_as("old", 100).await;
    let _updates = pool.arrive(1, 100).await;
    let key = worker.row().await;
    worker.draw(key, 0).await;
    let (computed, emitted, cached, prefill_left) = (Tokens(2), Tokens(1), Tokens(0), Tokens(0));
    let row = RowReport { key, computed, cached, emitted, finish: None, held: true, prefill_left };
    let (prefill, decode, idle) = (Micros(1000), Micros(0), Micros(0));
    let (peak, pad, invalid) = (Blocks(1), Tokens(0), Tokens(0));
    let (batch, end, next, steps) = (PlanNo(1), BatchEnd::Backpressure, None, 1);
    let report = SliceReport { batch, end, next, steps, prefill, decode, peak, idle, pad, invalid, rows: vec![row] };
    worker.say(WorkerMessage::SliceReported(report)).await;
    let named = async || {
        let (sender, batches) = oneshot::channel();
        pool.commands.send(Command::Batches(sender)).await.unwrap();
        let (decided, decisions) = oneshot::channel();
        pool.commands.send(Command::Decisions(None, decided)).await.unwrap();
        (batches.await.unwrap()[0].worker.clone(), decisions.await.unwrap()[0].decision.worker_id.clone())
    };
    assert_eq!(named().await, ("old".into(), "old".into()));
    pool.commands.send(Command::Lost(worker.seat)).await.unwrap();
    assert_eq!(named().await, ("old".into(), "old".into()));
    let new = pool.join_as("new", 100).await;
    assert_eq!(new.seat.worker, worker.seat.worker);
    assert_eq!(named().await, ("old".into(), "old".into()));
}
