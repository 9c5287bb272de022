//! What an event of a row costs the scheduler: tokens of one iteration, a slice's end with its plan, an arrival with its
//! decision; 10,000 rows in flight on 64 and on 1,000 workers. Beside it, in the same run, what no scheduler can do
//! without: one look-up of the row in a hash map, and the copy of its token.

use std::hint::black_box;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hashbrown::HashMap;
use router_core::{
    Action, BatchEnd, BlockHash, BlockSize, Blocks, Config, Epoch, Event, Layout, Micros, Mode, ModelSpec, NewRequest,
    PlanNo, PolicyName, RequestId, RowId, RowKey, RowReport, RowTokens, Scheduler, SliceReport, Tokens, WorkerId,
    WorkerMessage, WorkerSpec,
};
use serde_json::json;

const ROWS: u64 = 10_000;
const ROUNDS: usize = 4000;
/// Workers, and the most microseconds that an event of a row may take.
const WORKERS: [(u32, f64); 2] = [(64, 2.0), (1000, 10.0)];

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
            match action {
                Action::Plan(worker, plan) => {
                    if let Some(work) = self.workers.get_mut(worker.0 as usize) {
                        work.standing = plan.no;
                    }
                }
                Action::Quarantine(_, why) => panic!("{why}"),
                _ => {}
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

/// Median time of an event, divided by the rows in it. Building the event is not counted.
fn each(fleet: &mut Fleet, rows: u64, mut event: impl FnMut(&mut Fleet) -> Duration) -> f64 {
    for _ in 0..ROUNDS / 10 {
        event(fleet);
    }
    let mut times: Vec<Duration> = (0..ROUNDS).map(|_| event(fleet)).collect();
    times.sort_unstable();
    times[ROUNDS / 2].as_secs_f64() * 1e6 / rows as f64
}

fn timed(fleet: &mut Fleet, worker: u32, message: WorkerMessage) -> Duration {
    let began = Instant::now();
    fleet.says(worker, message);
    began.elapsed()
}

/// What no scheduler can do without: the row's look-up and its token's copy.
fn limit() -> f64 {
    let row = |id| RowId { request: RequestId(id % ROWS), choice: 0 };
    let mut rows: HashMap<RowId, Vec<u32>> = (0..ROWS).map(|id| (row(id), Vec::with_capacity(1024))).collect();
    let began = Instant::now();
    let all = ROWS * 500;
    for id in 0..all {
        if let Some(output) = rows.get_mut(black_box(&row(id))) {
            output.push(5);
        }
    }
    began.elapsed().as_secs_f64() * 1e6 / all as f64
}

fn main() -> ExitCode {
    let mut table = Vec::new();
    for (workers, most) in WORKERS {
        let mut fleet = Fleet::new(workers);
        let rows = ROWS / u64::from(workers);
        let tokens = each(&mut fleet, rows, |fleet| {
            let worker = fleet.turn();
            let message = fleet.iteration(worker);
            timed(fleet, worker, message)
        });
        let slice_end = each(&mut fleet, rows, |fleet| {
            let worker = fleet.turn();
            let message = fleet.report(worker);
            timed(fleet, worker, message)
        });
        let arrival = each(&mut fleet, 1, |fleet| {
            fleet.arrivals += 1;
            let request = request(fleet.arrivals);
            let id = request.id;
            let began = Instant::now();
            fleet.event(Event::RequestArrived(request));
            fleet.event(Event::Cancelled { request: id, choice: None });
            began.elapsed()
        });
        for (event, us, bounded) in
            [("a token", tokens, true), ("a slice's end", slice_end, true), ("arrival and end", arrival, false)]
        {
            table.push((workers, event, us, bounded.then_some(most)));
        }
    }
    let limit = limit();
    println!("microseconds a row, {ROWS} rows in flight, medians of {ROUNDS} events");
    for (workers, event, us, _) in &table {
        println!("{us:9.3}  {event}, {workers} workers");
    }
    println!("{limit:9.3}  the limit: a look-up of the row and a copy of its token");
    let holds = table.iter().all(|(.., us, most)| most.is_none_or(|most| *us < most));
    if let Some(file) = std::env::var_os("SCLS_BENCH_JSON") {
        std::fs::write(file, report(&table, limit)).expect("the report is written");
    }
    println!("{}", if holds { "pass: a row event under 2 us at 64 workers, under 10 us at 1,000" } else { "FAIL" });
    ExitCode::from(u8::from(!holds))
}

type Row = (u32, &'static str, f64, Option<f64>);

fn report(table: &[Row], limit: f64) -> String {
    let said = |program: &str, args: &[&str]| {
        let done = Command::new(program).args(args).output().ok().filter(|done| done.status.success());
        done.map_or_else(|| "unknown".to_owned(), |done| String::from_utf8_lossy(&done.stdout).trim().to_owned())
    };
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = info.lines().find_map(|line| Some(line.strip_prefix("model name")?.split_once(':')?.1.trim()));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let rows: Vec<_> =
        table.iter().map(|(workers, event, us, _)| json!({"workers": workers, "event": event, "us": us})).collect();
    let goals = table.iter().filter_map(|(workers, event, us, most)| {
        let most = (*most)?;
        Some(json!({"goal": format!("{event}, {workers} workers, us a row"), "value": us, "op": "<", "bound": most, "holds": *us < most}))
    });
    let report = json!({
        "name": "handle", "command": "make bench-core", "commit": said("git", &["rev-parse", "--short", "HEAD"]),
        "when": said("date", &["-u", "+%Y-%m-%d"]),
        "machine": {"cpu": cpu.unwrap_or(std::env::consts::ARCH), "cores": cores, "gpu": null}, "seed": null,
        "rows_in_flight": ROWS, "limit_us": limit, "rows": rows, "goals": goals.collect::<Vec<_>>(),
    });
    format!("{report:#}\n")
}
