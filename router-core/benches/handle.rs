//! What an event of a row costs the scheduler: tokens of one iteration, a slice's end with its plan, an arrival with its
//! decision; 10,000 rows in flight on 64 and on 1,000 workers. Beside it, in the same run, what no scheduler can do
//! without: one look-up of the row in a hash map, and the copy of its token.

use std::sync::Arc;

use divan::counter::ItemsCount;
use divan::{Bencher, black_box};
use hashbrown::HashMap;
use router_core::{
    Action, BatchEnd, BlockHash, BlockSize, Blocks, Config, Epoch, Event, Layout, Micros, Mode, ModelSpec, NewRequest,
    PlanNo, PolicyName, RequestId, RowId, RowKey, RowReport, RowTokens, Scheduler, SliceReport, Tokens, WorkerId,
    WorkerMessage, WorkerSpec,
};

const ROWS: u64 = 10_000;
const WORKERS: [u32; 2] = [64, 1000];

fn main() {
    divan::main();
}

/// What is known of a worker's side.
#[derive(Default)]
struct Work {
    rows: Vec<RowKey>,
    running: PlanNo,
    standing: PlanNo,
    seq: u64,
}

/// A scheduler with all rows running.
struct Fleet {
    scheduler: Scheduler,
    actions: Vec<Action>,
    now: Micros,
    workers: Vec<Work>,
    drawn: HashMap<RowKey, u32>,
    next: usize,
    arrivals: u64,
}

fn request(id: u64) -> NewRequest {
    let prompt: Arc<[u32]> = (0..64).map(|at| (at + id as u32) % 1000).collect();
    NewRequest {
        id: RequestId(id),
        prompt,
        root: BlockHash(id),
        choices: 1,
        max_tokens: Tokens(1 << 30),
        urgent: false,
    }
}

impl Fleet {
    fn new(workers: u32) -> Self {
        let block_size = BlockSize::new(16).expect("not zero");
        let model = ModelSpec { digest: "m".into(), tokenizer: "t".into(), block_size, vocab: 1000 };
        let config =
            Config { policy: PolicyName::Product, mode: Mode::Slice, slice_len: None, seed: 0, max_rows: 1 << 20 };
        let mut fleet = Self {
            scheduler: Scheduler::new(model.clone(), config),
            actions: Vec::new(),
            now: Micros(0),
            workers: Vec::new(),
            drawn: HashMap::new(),
            next: 0,
            arrivals: 0,
        };
        for w in 0..workers {
            let spec = WorkerSpec {
                name: format!("w{w}"),
                epoch: Epoch(1),
                model: model.clone(),
                blocks: Blocks(1 << 40),
                max_rows: 1 << 20,
                max_context: Tokens(1 << 40),
                chunk: Tokens(512),
                layout: Layout::Paged,
                cost: None,
            };
            fleet.event(Event::WorkerJoined { worker: WorkerId(w), spec });
            fleet.workers.push(Work::default());
            fleet.says(w, WorkerMessage::Snapshot { chunk: 0, last: true, hashes: vec![] });
        }
        let arrivals: Vec<_> = (0..ROWS).map(|id| Event::RequestArrived(request(id))).collect();
        fleet.arrivals = ROWS;
        fleet.scheduler.handle_many(fleet.now, arrivals, &mut fleet.actions);
        for action in std::mem::take(&mut fleet.actions) {
            match action {
                Action::Placed(row, worker, _) => {
                    let key = RowKey { row, attempt: 0 };
                    fleet.workers[worker.0 as usize].rows.push(key);
                    fleet.drawn.insert(key, 0);
                }
                Action::Plan(worker, plan) => {
                    let work = &mut fleet.workers[worker.0 as usize];
                    work.standing = plan.no;
                    work.running = if work.running.0 == 0 { plan.no } else { work.running };
                }
                _ => {}
            }
        }
        fleet
    }

    fn event(&mut self, event: Event) {
        self.now.0 += 100;
        self.actions.clear();
        self.scheduler.handle(self.now, event, &mut self.actions);
        for action in &self.actions {
            if let Action::Plan(worker, plan) = action
                && let Some(work) = self.workers.get_mut(worker.0 as usize)
            {
                work.standing = plan.no;
            }
        }
    }

    fn says(&mut self, worker: u32, message: WorkerMessage) {
        let work = &mut self.workers[worker as usize];
        work.seq += 1;
        let seq = work.seq;
        self.event(Event::Worker { worker: WorkerId(worker), epoch: Epoch(1), seq, message });
    }

    fn turn(&mut self) -> u32 {
        self.next = (self.next + 1) % self.workers.len();
        self.next as u32
    }

    fn iteration(&mut self, worker: u32) -> WorkerMessage {
        let work = &self.workers[worker as usize];
        let rows = work.rows.iter().map(|key| {
            let index = self.drawn.get_mut(key).expect("a row of the fleet");
            *index += 1;
            let (key, first_index) = (*key, *index - 1);
            RowTokens { key, first_index, ids: vec![5], logprobs: vec![], finish: None, cached: None }
        });
        WorkerMessage::Steps { batch: work.running, rows: rows.collect() }
    }

    /// The running batch ended and the standing plan starts.
    fn report(&mut self, worker: u32) -> WorkerMessage {
        let work = &mut self.workers[worker as usize];
        let batch = std::mem::replace(&mut work.running, work.standing);
        let row = |key: &RowKey| RowReport {
            key: *key,
            computed: Tokens(32),
            cached: Tokens(0),
            emitted: Tokens(32),
            finish: None,
            held: true,
            prefill_left: Tokens(0),
        };
        WorkerMessage::SliceReported(SliceReport {
            batch,
            end: BatchEnd::Steps,
            next: Some(work.running),
            steps: 32,
            prefill: Micros(0),
            decode: Micros(300_000),
            peak: Blocks(1),
            idle: Micros(300),
            pad: Tokens(0),
            invalid: Tokens(0),
            rows: work.rows.iter().map(row).collect(),
        })
    }
}

/// Tokens of an iteration; counted by rows.
#[divan::bench(args = WORKERS)]
fn tokens(bencher: Bencher, workers: u32) {
    let fleet = std::cell::RefCell::new(Fleet::new(workers));
    let rows = ROWS / u64::from(workers);
    bencher
        .counter(ItemsCount::new(rows))
        .with_inputs(|| {
            let mut fleet = fleet.borrow_mut();
            let worker = fleet.turn();
            let message = fleet.iteration(worker);
            (worker, message)
        })
        .bench_local_values(|(worker, message)| fleet.borrow_mut().says(worker, message));
}

/// A slice's end: what was foreseen is scored, all rows go on, the next plan is made; counted by rows.
#[divan::bench(args = WORKERS)]
fn slice_end(bencher: Bencher, workers: u32) {
    let fleet = std::cell::RefCell::new(Fleet::new(workers));
    let rows = ROWS / u64::from(workers);
    bencher
        .counter(ItemsCount::new(rows))
        .with_inputs(|| {
            let mut fleet = fleet.borrow_mut();
            let worker = fleet.turn();
            (worker, fleet.report(worker))
        })
        .bench_local_values(|(worker, message)| fleet.borrow_mut().says(worker, message));
}

/// An arrival: its blocks are hashed and looked up, every worker is scored, plans change, a slice is cut; then it is gone.
#[divan::bench(args = WORKERS)]
fn arrival(bencher: Bencher, workers: u32) {
    let fleet = std::cell::RefCell::new(Fleet::new(workers));
    bencher
        .with_inputs(|| {
            let mut fleet = fleet.borrow_mut();
            fleet.arrivals += 1;
            request(fleet.arrivals)
        })
        .bench_local_values(|request| {
            let mut fleet = fleet.borrow_mut();
            let id = request.id;
            fleet.event(Event::RequestArrived(request));
            fleet.event(Event::Cancelled { request: id, choice: None });
        });
}

/// What no scheduler can do without: the row's look-up and its token's copy.
#[divan::bench(args = WORKERS)]
fn tokens_limit(bencher: Bencher, workers: u32) {
    let mut rows: HashMap<RowId, Vec<u32>> =
        (0..ROWS).map(|id| (RowId { request: RequestId(id), choice: 0 }, Vec::with_capacity(1024))).collect();
    let each = ROWS / u64::from(workers);
    let mut from = 0;
    bencher.counter(ItemsCount::new(each)).bench_local(|| {
        for id in 0..each {
            let row = RowId { request: RequestId((from + id) % ROWS), choice: 0 };
            if let Some(output) = rows.get_mut(black_box(&row)) {
                output.push(5);
                if output.len() == 1024 {
                    output.clear();
                }
            }
        }
        from += each;
    });
}
