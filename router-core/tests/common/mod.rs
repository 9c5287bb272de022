//! A scheduler with one worker played by hand.
#![allow(dead_code, clippy::unwrap_used)]

use std::sync::Arc;

use router_core::{
    Action, BatchEnd, BlockHash, BlockSize, Blocks, Config, Epoch, Event, FinishReason, Layout, Micros, Mode,
    ModelSpec, NewRequest, Plan, PlanNo, PolicyName, Refusal, RequestId, RowId, RowKey, RowReport, RowTokens,
    Scheduler, SliceReport, TokenLogprobs, Tokens, WorkerId, WorkerMessage, WorkerSpec,
};

pub const W: WorkerId = WorkerId(0);

pub struct Pool {
    pub scheduler: Scheduler,
    pub seq: u64,
    pub actions: Vec<Action>,
    pub now: Micros,
}

pub fn model() -> ModelSpec {
    let block_size = BlockSize::new(16).expect("not zero");
    ModelSpec { digest: "m".into(), tokenizer: "t".into(), block_size, vocab: 100 }
}

/// What the worker is: 64 blocks, 8 rows.
pub fn spec() -> WorkerSpec {
    WorkerSpec {
        name: "w".into(),
        epoch: Epoch(1),
        model: model(),
        blocks: Blocks(64),
        max_rows: 8,
        max_context: Tokens(1000),
        chunk: Tokens(512),
        layout: Layout::Paged,
        cost: None,
    }
}

/// A pool with one ready worker, S = 4.
pub fn pool() -> Pool {
    pool_of(Some(4), spec())
}

/// A pool with this worker, ready.
pub fn pool_of(slice_len: Option<u32>, spec: WorkerSpec) -> Pool {
    let config = Config { policy: PolicyName::Product, mode: Mode::Slice, slice_len, seed: 0, max_rows: 100 };
    let scheduler = Scheduler::new(model(), config);
    let mut pool = Pool { scheduler, seq: 0, actions: Vec::new(), now: Micros(1) };
    pool.event(Event::WorkerJoined { worker: W, spec });
    pool.says(WorkerMessage::Snapshot { chunk: 0, last: true, hashes: vec![] });
    pool
}

impl Pool {
    pub fn event(&mut self, event: Event) -> Vec<Action> {
        self.scheduler.handle(self.now, event, &mut self.actions);
        std::mem::take(&mut self.actions)
    }

    pub fn says(&mut self, message: WorkerMessage) -> Vec<Action> {
        self.seq += 1;
        self.event(Event::Worker { worker: W, epoch: Epoch(1), seq: self.seq, message })
    }

    pub fn arrive(&mut self, id: u64) -> Vec<Action> {
        let prompt: Arc<[u32]> = Arc::from([1; 20]);
        let (id, root) = (RequestId(id), BlockHash(id));
        self.event(Event::RequestArrived(NewRequest {
            id,
            prompt,
            root,
            choices: 1,
            max_tokens: Tokens(10),
            urgent: false,
        }))
    }

    /// Each with a logprob that tells its id.
    pub fn draws(&mut self, key: RowKey, first_index: u32, ids: &[u32]) -> Vec<Action> {
        let logprobs = ids.iter().map(|id| TokenLogprobs { chosen: -1.0, top: vec![(*id, -1.0)] }).collect();
        let rows = vec![RowTokens { key, first_index, ids: ids.to_vec(), logprobs, finish: None, cached: None }];
        self.says(WorkerMessage::Steps { batch: PlanNo(1), rows })
    }

    pub fn reports(&mut self, batch: PlanNo, next: Option<PlanNo>, rows: &[RowKey]) -> Vec<Action> {
        let row = |key: &RowKey| RowReport {
            key: *key,
            computed: Tokens(1),
            cached: Tokens(0),
            emitted: Tokens(1),
            finish: None,
            held: true,
            prefill_left: Tokens(0),
        };
        self.says(WorkerMessage::SliceReported(SliceReport {
            batch,
            end: BatchEnd::Steps,
            next,
            steps: 4,
            prefill: Micros(0),
            decode: Micros(9),
            peak: Blocks(2),
            idle: Micros(0),
            pad: Tokens(0),
            invalid: Tokens(0),
            rows: rows.iter().map(row).collect(),
        }))
    }

    pub fn refuses(&mut self, plan: PlanNo, reason: Refusal, rows: Vec<RowKey>) -> Vec<Action> {
        self.says(WorkerMessage::Refused { plan, reason, rows, detail: "why".into() })
    }
}

pub fn plans(actions: &[Action]) -> Vec<&Plan> {
    actions.iter().filter_map(|a| if let Action::Plan(_, plan) = a { Some(plan) } else { None }).collect()
}

pub fn key(request: u64, attempt: u32) -> RowKey {
    RowKey { row: RowId { request: RequestId(request), choice: 0 }, attempt }
}

pub fn has(actions: &[Action], wanted: impl Fn(&Action) -> bool) -> bool {
    actions.iter().any(wanted)
}

pub fn errors(actions: &[Action]) -> usize {
    actions.iter().filter(|a| matches!(a, Action::Finish(_, end) if end.reason == FinishReason::Error)).count()
}
