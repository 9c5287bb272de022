//! The paper's modes and rectangles, by hand.

mod common;

use std::sync::Arc;

use common::{Pool, W, errors, has, key, model, plans, pool_of, spec};
use router_core::{
    Action, BlockHash, Blocks, Config, Event, Keep, Layout, Micros, Mode, NewRequest, Plan, PlanNo, PolicyName, Pooled,
    Refusal, RequestId, Scheduler, Tokens, WorkerId, WorkerMessage, WorkerSpec,
};

/// A pool with one ready worker of 64 blocks and 8 rows.
fn pooled(mode: Pooled, slice_len: Option<u32>) -> Pool {
    let mode = Mode::Pooled(mode);
    let config = Config { policy: PolicyName::Product, mode, slice_len, seed: 0, max_rows: 100 };
    let mut pool = Pool { scheduler: Scheduler::new(model(), config), seq: 0, actions: Vec::new(), now: Micros(1) };
    pool.event(Event::WorkerJoined { worker: W, spec: spec() });
    pool.says(WorkerMessage::Snapshot { chunk: 0, last: true, hashes: vec![] });
    pool
}

fn arrival(id: u64, len: usize) -> Event {
    let prompt: Arc<[u32]> = vec![1; len].into();
    let (id, root) = (RequestId(id), BlockHash(id));
    Event::RequestArrived(NewRequest { id, prompt, root, choices: 1, max_tokens: Tokens(10), urgent: false })
}

fn added(plan: &Plan) -> Vec<u64> {
    plan.add.iter().map(|start| start.key.row.request.0).collect()
}

#[test]
fn what_a_slice_leaves_comes_back_and_waits_for_the_tick() {
    let mut pool = pooled(Pooled::so(), Some(4));
    let actions = pool.arrive(1);
    let first = plans(&actions)[0];
    assert_eq!((added(first), &first.keep, first.steps), (vec![1], &Keep::List(vec![]), 4));
    // three seconds later
    let tick = |a: &Action| matches!(a, Action::WakeAt(Micros(3_000_001)));
    assert!(has(&pool.arrive(2), tick));
    // a tick that comes sooner was asked for something else: it is asked for again
    assert!(has(&pool.event(Event::Tick), tick));
    assert!(plans(&pool.arrive(3)).is_empty());
    pool.draws(key(1, 0), 0, &[5, 6, 7, 8]);
    let actions = pool.reports(PlanNo(1), None, &[key(1, 0)]);
    assert!(has(&actions, |a| matches!(a, Action::Drop(W, rows) if rows == &[key(1, 0)])));
    assert!(plans(&actions).is_empty());
    let load = &pool.scheduler.loads()[0];
    assert_eq!((load.queued, load.batch_size, load.work, load.indexed), (Tokens(0), 0, Micros(0), Blocks(0)));
    pool.now = Micros(3_000_001);
    let actions = pool.event(Event::Tick);
    let next = plans(&actions)[0];
    assert_eq!((added(next), next.base), (vec![1, 2, 3], PlanNo(1)), "the oldest first");
    assert_eq!((next.add[0].key, &next.add[0].output[..]), (key(1, 1), &[5, 6, 7, 8][..]));
    // 24 + 4 - 1 positions, and twice 20 + 4 - 1
    assert_eq!(next.ceiling, Blocks(6));
}

#[test]
fn at_sequence_level_a_batch_runs_to_its_last_row_and_the_next_is_all_that_came() {
    let mut pool = pooled(Pooled::sls(), None);
    // an iteration of prefill, which draws no token where prompts are chunked, and ten tokens
    assert_eq!(plans(&pool.arrive(1))[0].steps, 11);
    assert!(plans(&pool.arrive(2)).is_empty());
    assert!(plans(&pool.arrive(3)).is_empty());
    pool.draws(key(1, 0), 0, &[5; 10]);
    let actions = pool.reports(PlanNo(1), None, &[]);
    assert_eq!(plans(&actions).iter().map(|plan| added(plan)).collect::<Vec<_>>(), [[2, 3]]);
}

#[test]
fn at_sequence_level_rows_are_dealt_in_turn_and_wait_for_their_worker() {
    let mut pool = pooled(Pooled::sls(), None);
    let other = WorkerId(1);
    pool.event(Event::WorkerJoined { worker: other, spec: spec() });
    let synced = WorkerMessage::Snapshot { chunk: 0, last: true, hashes: vec![] };
    pool.event(Event::Worker { worker: other, epoch: spec().epoch, seq: 1, message: synced });
    let to = |actions: &[Action]| -> Vec<(WorkerId, Vec<u64>)> {
        let plan = |action: &Action| match action {
            Action::Plan(id, plan) => Some((*id, added(plan))),
            _ => None,
        };
        actions.iter().filter_map(plan).collect()
    };
    assert_eq!(to(&pool.arrive(1)), [(W, vec![1])]);
    assert_eq!(to(&pool.arrive(2)), [(other, vec![2])]);
    assert!((3..=6).all(|id| to(&pool.arrive(id)).is_empty()));
    pool.event(Event::Cancelled { request: RequestId(5), choice: None });
    pool.draws(key(1, 0), 0, &[5; 10]);
    // 4 and 6 are the other's, although this one could have them
    assert_eq!(to(&pool.reports(PlanNo(1), None, &[])), [(W, vec![3])]);
    pool.draws(key(3, 0), 0, &[5; 10]);
    assert!(to(&pool.reports(PlanNo(2), None, &[])).is_empty());
    // until it is gone
    let actions = pool.event(Event::WorkerLost { worker: other, epoch: spec().epoch });
    assert_eq!(to(&actions), [(W, vec![2, 4, 6])]);
}

#[test]
fn what_a_draining_worker_had_in_turn_goes_elsewhere() {
    let mut pool = pooled(Pooled::sls(), None);
    pool.arrive(1);
    pool.arrive(2);
    // nobody else is there: it goes on where it is allowed to finish
    assert!(plans(&pool.event(Event::WorkerDraining { worker: W })).is_empty());
    let other = WorkerId(1);
    pool.event(Event::WorkerJoined { worker: other, spec: spec() });
    let synced = WorkerMessage::Snapshot { chunk: 0, last: true, hashes: vec![] };
    pool.event(Event::Worker { worker: other, epoch: spec().epoch, seq: 1, message: synced });
    pool.draws(key(1, 0), 0, &[5; 10]);
    let actions = pool.reports(PlanNo(1), None, &[]);
    assert_eq!(plans(&actions).iter().map(|plan| added(plan)).collect::<Vec<_>>(), [[2]]);
}

#[test]
fn a_row_refused_alone_ends_and_what_waits_runs() {
    let mut pool = pooled(Pooled::sls(), None);
    pool.arrive(1);
    pool.arrive(2);
    let actions = pool.refuses(PlanNo(1), Refusal::NoMemory, vec![]);
    assert_eq!(errors(&actions), 1);
    assert_eq!(added(plans(&actions)[0]), [2]);
}

#[test]
fn a_refused_batch_and_the_one_that_stood_on_it_are_sent_again_in_halves() {
    let mut pool = pooled(Pooled::so(), Some(4));
    pool.scheduler.handle_many(pool.now, (1..=16).map(|id| arrival(id, 20)), &mut pool.actions);
    let actions = std::mem::take(&mut pool.actions);
    assert_eq!(
        plans(&actions).iter().map(|plan| added(plan)).collect::<Vec<_>>(),
        [(1..=8).collect::<Vec<_>>(), (9..=16).collect()]
    );
    let actions = pool.refuses(PlanNo(1), Refusal::NoMemory, vec![]);
    let again: Vec<_> = plans(&actions).iter().map(|plan| (plan.no, plan.base, added(plan))).collect();
    assert_eq!(again, [(PlanNo(3), PlanNo(0), vec![1, 2, 3, 4]), (PlanNo(4), PlanNo(3), vec![5, 6, 7, 8])]);
    assert!(pool.refuses(PlanNo(2), Refusal::Stale, vec![]).is_empty(), "nobody waits for it any more");
    let actions = pool.reports(PlanNo(3), Some(PlanNo(4)), &[]);
    assert_eq!(added(plans(&actions)[0]), (9..=16).collect::<Vec<_>>(), "one ran, so batches are whole again");
}

#[test]
fn a_rectangle_has_the_oldest_row_and_those_of_its_length() {
    let mut pool = pool_of(Some(4), WorkerSpec { layout: Layout::Padded, ..spec() });
    let actions = pool.event(arrival(1, 20));
    assert_eq!(plans(&actions).len(), 2, "one runs, one stands");
    pool.event(arrival(2, 400));
    let actions = pool.event(arrival(3, 22));
    let plan = plans(&actions)[0];
    assert_eq!((added(plan), &plan.keep), (vec![3], &Keep::Survivors));
    // two rows of 20 + 4 + 4 - 1 positions
    assert_eq!(plan.ceiling, Blocks(4));
}
