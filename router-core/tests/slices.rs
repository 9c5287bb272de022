//! From slice to slice, by hand: cuts, S, long prompts, moves, what was foreseen.

mod common;

use std::sync::Arc;

use common::{Pool, W, has, key, plans, pool, pool_of, spec};
use router_core::{
    Action, BatchEnd, BlockHash, Blocks, CostModel, Event, FinishReason, Micros, NewRequest, PagedPrefill, PagedStep,
    Plan, PlanNo, Refusal, RequestId, RowReport, RowTokens, SliceReport, Tokens, WorkerId, WorkerMessage, WorkerSpec,
};

fn cost() -> CostModel {
    let prefill = PagedPrefill { constant: 0.0, per_token: 1e-4, per_pair: 0.0 };
    CostModel::Paged { prefill, step: PagedStep { constant: 4e-3, per_row: 1e-3, per_context: 0.0 } }
}

fn arrival(id: u64, prompt: usize, max_tokens: u64) -> NewRequest {
    let prompt: Arc<[u32]> = vec![1; prompt].into();
    let (id, root) = (RequestId(id), BlockHash(id));
    NewRequest { id, prompt, root, choices: 1, max_tokens: Tokens(max_tokens), urgent: false }
}

fn asks(pool: &mut Pool, request: NewRequest) -> Vec<Action> {
    pool.event(Event::RequestArrived(request))
}

fn cut(actions: &[Action]) -> bool {
    has(actions, |a| matches!(a, Action::Cut(..)))
}

/// A batch ended: `exposed` is what the start of the next one cost.
fn ends(pool: &mut Pool, batch: u64, next: Option<u64>, steps: u32, exposed: u64, rows: &[u64]) -> Vec<Action> {
    let row = |id: &u64| RowReport {
        key: key(*id, 0),
        computed: Tokens(1),
        cached: Tokens(0),
        emitted: Tokens(u64::from(steps)),
        finish: None,
        held: true,
        prefill_left: Tokens(0),
    };
    pool.says(WorkerMessage::SliceReported(SliceReport {
        batch: PlanNo(batch),
        end: BatchEnd::Steps,
        next: next.map(PlanNo),
        steps,
        prefill: Micros(0),
        decode: Micros(u64::from(steps) * 5_000),
        peak: Blocks(2),
        idle: Micros(exposed),
        pad: Tokens(0),
        invalid: Tokens(0),
        rows: rows.iter().map(row).collect(),
    }))
}

/// W of the first worker.
fn work(pool: &Pool) -> Micros {
    pool.scheduler.loads()[0].work
}

fn newest(actions: &[Action]) -> &Plan {
    plans(actions).pop().expect("a plan")
}

#[test]
fn a_start_that_costs_nothing_is_taken_at_once() {
    let mut pool = pool();
    assert!(!cut(&pool.arrive(1)), "nothing runs that could be cut");
    let actions = pool.arrive(2);
    assert!(has(&actions, |a| matches!(a, Action::Cut(W, PlanNo(1)))));
    let plan = actions.iter().position(|a| matches!(a, Action::Plan(..)));
    let cut_at = actions.iter().position(|a| matches!(a, Action::Cut(..)));
    assert!(plan < cut_at, "the plan that starts then is there before");
    assert!(!cut(&pool.arrive(3)), "it ends once");
}

/// One row runs, slice starts cost 20 ms, and a row comes and goes every 10 ms.
fn slow_starts() -> Pool {
    let mut pool = pool_of(Some(1000), WorkerSpec { cost: Some(cost()), blocks: Blocks(1000), ..spec() });
    asks(&mut pool, arrival(1, 20, 900));
    for batch in 1..60 {
        pool.now.0 += 10_000;
        let id = 100 + batch;
        asks(&mut pool, arrival(id, 20, 900));
        pool.event(Event::Cancelled { request: RequestId(id), choice: None });
        let next = pool.scheduler.loads()[0].running_rows;
        assert_eq!(next, 1);
        // a plan was sent for each that came: the worker starts the last one
        let last = 2 * batch + 1;
        ends(&mut pool, 2 * batch - 1, Some(last), 8, 20_000, &[1]);
    }
    pool
}

#[test]
fn rows_in_sight_are_waited_for_and_no_longer_than_a_start_costs() {
    let mut pool = slow_starts();
    pool.now.0 += 10_000;
    // 2 * lambda * F * N = 2 * 20 ms / 10 ms = 4: one row is not enough, two are
    let actions = asks(&mut pool, arrival(2, 20, 900));
    let at = actions.iter().find_map(|a| if let Action::WakeAt(at) = a { Some(*at) } else { None });
    assert!(!cut(&actions), "{actions:?}");
    let waits = at.expect("asked again").saturating_sub(pool.now);
    assert!((19_000..=20_001).contains(&waits.0), "{waits}");
    pool.now.0 += 10_000;
    assert!(cut(&asks(&mut pool, arrival(3, 20, 900))), "two rows");
    let mut pool = slow_starts();
    asks(&mut pool, arrival(2, 20, 900));
    pool.now.0 += 20_001;
    assert!(cut(&pool.event(Event::Tick)), "what it lost is what a start costs");
}

#[test]
fn a_lull_is_no_price_of_a_slice_start() {
    let mut pool = pool_of(Some(1000), WorkerSpec { cost: Some(cost()), blocks: Blocks(1000), ..spec() });
    // rows come every millisecond, and then for ten seconds none
    for id in 1..=100 {
        pool.now.0 += 1_000;
        asks(&mut pool, arrival(id, 20, 900));
        if id > 1 {
            pool.event(Event::Cancelled { request: RequestId(id), choice: None });
        }
    }
    draws(&mut pool, 1, 1, 0, 1, Some(FinishReason::Stop));
    ends(&mut pool, 1, None, 1, 0, &[]);
    // of the plans that were on their way the first began, for nobody
    let running = pool.scheduler.batches().last().expect("it runs").batch.0;
    ends(&mut pool, running, None, 0, 0, &[]);
    pool.now.0 += 10_000_000;
    let arrivals = (201..=203).map(|id| Event::RequestArrived(arrival(id, 20, 900)));
    pool.scheduler.handle_many(pool.now, arrivals, &mut pool.actions);
    let actions = std::mem::take(&mut pool.actions);
    let sent: Vec<u64> = plans(&actions).iter().map(|plan| plan.no.0).collect();
    ends(&mut pool, sent[0], Some(sent[1]), 8, 10_000_000, &[201, 202, 203]);
    assert!(cut(&asks(&mut pool, arrival(204, 20, 900))), "a start has cost nothing yet");
}

#[test]
fn where_a_first_token_is_promised_the_slice_is_cut_whatever_it_costs() {
    let mut pool = slow_starts();
    let actions = asks(&mut pool, NewRequest { urgent: true, ..arrival(3, 20, 10) });
    assert!(cut(&actions));
}

#[test]
fn the_last_step_is_not_cut() {
    let mut pool = pool_of(Some(1), spec());
    pool.arrive(1);
    assert!(!cut(&pool.arrive(2)), "a slice of one iteration ends by itself");
    for (told, cuts) in [(6, true), (7, false)] {
        let mut pool = pool_of(Some(8), spec());
        asks(&mut pool, arrival(1, 20, 400));
        draws(&mut pool, 1, 1, 0, told, None);
        assert_eq!(cut(&asks(&mut pool, arrival(2, 20, 400))), cuts, "a burst of {told} leaves {}", 8 - told);
    }
}

#[test]
fn s_follows_the_mean_output() {
    let mut pool = pool_of(None, spec());
    assert_eq!(pool.scheduler.slice_len(), 32);
    for id in 0..40 {
        asks(&mut pool, arrival(id, 20, 400));
        let rows = vec![RowTokens {
            key: key(id, 0),
            first_index: 0,
            ids: vec![5; 320],
            logprobs: vec![],
            finish: Some(FinishReason::Stop),
            cached: None,
        }];
        pool.says(WorkerMessage::Steps { batch: PlanNo(id + 1), rows });
    }
    assert_eq!(pool.scheduler.slice_len(), 40, "an eighth of 320");
}

#[test]
fn s_is_halved_before_a_row_loses_its_kv() {
    let mut pool = pool_of(Some(64), WorkerSpec { max_context: Tokens(2000), ..spec() });
    asks(&mut pool, arrival(1, 400, 600));
    asks(&mut pool, arrival(2, 400, 600));
    let actions = ends(&mut pool, 1, Some(2), 1, 0, &[1]);
    let steps: Vec<_> = plans(&actions).iter().map(|plan| (plan.add.len(), plan.steps)).collect();
    assert_eq!(steps, [(1, 64)], "{actions:?}");
    let actions = ends(&mut pool, 2, Some(4), 64, 0, &[1]);
    let plan = newest(&actions);
    // rows 1 and 2 run with up to 508 and 444 tokens at the end of batch 4: 16 more each is all there is place for
    assert!(plan.leave.is_empty() && plan.steps < 64, "{plan:?}");
    assert!(plan.ceiling <= Blocks(64));
}

#[test]
fn a_prompt_longer_than_a_chunk_goes_at_the_pace_of_the_streams_beside_it() {
    // A step of five rows takes 9 ms, a token 0.1 ms. Many chunks: 90 tokens, in whole blocks. Some: the root of 9 and 200 ms, or
    // of 9 and 819, which is more than a chunk. What a chunk costs whatever is in it changes nothing.
    for (prompt, budget) in [(32_000, 80), (17 * 512, 80), (16 * 512, 512), (2_000, 416)] {
        for constant in [0.0, 3e-3] {
            let CostModel::Paged { prefill, step } = cost() else { panic!("it is paged") };
            let cost = Some(CostModel::Paged { prefill: PagedPrefill { constant, ..prefill }, step });
            let spec = WorkerSpec { blocks: Blocks(4096), max_context: Tokens(40_000), cost, ..spec() };
            let mut pool = pool_of(Some(32), spec);
            for id in 1..=4 {
                asks(&mut pool, arrival(id, 20, 900));
            }
            let actions = asks(&mut pool, arrival(5, 500, 10));
            assert_eq!(
                newest(&actions).add.last().expect("row 5").prefill_budget,
                Tokens(0),
                "one chunk takes it whole"
            );
            let actions = asks(&mut pool, arrival(6, prompt, 10));
            let start = newest(&actions).add.last().expect("row 6");
            assert_eq!((start.key, start.prefill_budget), (key(6, 0), Tokens(budget)), "{prompt}");
        }
    }
}

#[test]
fn what_was_foreseen_is_recorded_beside_what_happened() {
    let mut pool = pool_of(Some(8), WorkerSpec { cost: Some(cost()), ..spec() });
    pool.arrive(1);
    let running = *pool.scheduler.batches().last().expect("it runs");
    assert_eq!((running.batch, running.rows, running.steps, running.outcome), (PlanNo(1), 1, 8, None));
    assert!(running.band.lo > Micros(0) && running.band.lo <= running.band.hi);
    ends(&mut pool, 1, Some(2), 8, 0, &[1]);
    let record = *pool.scheduler.batches().find(|record| record.batch == PlanNo(1)).expect("kept");
    let outcome = record.outcome.expect("it ended");
    assert_eq!((outcome.steps, outcome.time, outcome.end), (8, Micros(40_000), BatchEnd::Steps));
    assert!(outcome.covered(), "{outcome:?} of 2 ms and 8 steps of 5 ms");
}

#[test]
fn w_is_what_is_planned_and_shrinks_with_time() {
    let mut pool = pool_of(Some(8), WorkerSpec { cost: Some(cost()), ..spec() });
    pool.arrive(1);
    // a slice of 8 steps of 5 ms, the 2 that are left for the next one, and 20 tokens of prefill
    let w = work(&pool).0;
    assert!((45_000..60_000).contains(&w), "{w}");
    pool.now.0 += 30_000;
    pool.says(WorkerMessage::Heartbeat);
    let later = work(&pool).0;
    assert!((29_000..31_000).contains(&(w - later)), "{w} {later}");
}

/// A second worker, ready.
fn second(pool: &mut Pool, spec: WorkerSpec) {
    let worker = WorkerId(1);
    let epoch = spec.epoch;
    pool.event(Event::WorkerJoined { worker, spec: WorkerSpec { name: "v".into(), ..spec } });
    let message = WorkerMessage::Snapshot { chunk: 0, last: true, hashes: vec![] };
    pool.event(Event::Worker { worker, epoch, seq: 1, message });
}

#[test]
fn a_drained_worker_is_empty_after_its_slice() {
    let mut pool = pool();
    pool.arrive(1);
    second(&mut pool, spec());
    pool.event(Event::WorkerDraining { worker: W });
    assert_eq!(pool.scheduler.loads()[0].batch_size, 1, "its slice runs on");
    let actions = ends(&mut pool, 1, Some(2), 4, 0, &[1]);
    assert!(has(&actions, |a| matches!(a, Action::Placed(_, WorkerId(1), _))));
    assert!(has(&actions, |a| matches!(a, Action::Drop(W, rows) if rows == &[key(1, 0)])));
    assert_eq!(pool.scheduler.loads()[0].batch_size, 0);
    assert_eq!(pool.scheduler.moves().drained, 1);
}

/// One row draws all of `ids` in batch `batch`, and ends there if it says so.
fn draws(pool: &mut Pool, batch: u64, row: u64, first_index: u32, ids: usize, finish: Option<FinishReason>) {
    let row = RowTokens { key: key(row, 0), first_index, ids: vec![5; ids], logprobs: vec![], finish, cached: None };
    pool.says(WorkerMessage::Steps { batch: PlanNo(batch), rows: vec![row] });
}

#[test]
fn property_13_a_continuation_stays_unless_request_seconds_at_both_ends_say_otherwise() {
    // steps cost by the row
    let spec = WorkerSpec { cost: Some(cost()), blocks: Blocks(1000), ..spec() };
    let mut pool = pool_of(Some(8), spec.clone());
    for id in 1..=8 {
        asks(&mut pool, arrival(id, 20, 400));
    }
    // the newest plan, with all eight
    ends(&mut pool, 1, Some(9), 8, 0, &[1]);
    second(&mut pool, spec);
    (1..=8).for_each(|row| draws(&mut pool, 9, row, 0, 8, None));
    let all: Vec<u64> = (1..=8).collect();
    ends(&mut pool, 9, Some(10), 8, 0, &all);
    assert_eq!(pool.scheduler.moves().weighed, 0, "no answer has ended: nobody knows what a move is worth");
    draws(&mut pool, 10, 1, 8, 300, Some(FinishReason::Stop));
    (2..=8).for_each(|row| draws(&mut pool, 10, row, 8, 8, None));
    ends(&mut pool, 10, Some(11), 8, 0, &all[1..]);
    let moved = pool.scheduler.moves().weighed;
    let loads = pool.scheduler.loads();
    assert!((1..=4).contains(&moved), "seven rows of 1 ms each a step beside an idle worker: {moved}");
    assert_eq!((loads[0].batch_size, loads[1].batch_size), (7 - moved, moved));
    draws(&mut pool, 11, 8, 16, 4, None);
    ends(&mut pool, 11, Some(12), 4, 0, &all[1..]);
    assert_eq!(pool.scheduler.moves().weighed, moved, "asked once in S tokens");
}

/// Seven rows of 36 tokens that are expected to draw 308 more run beside an idle worker: one moves if, and only if, its
/// prefill there costs less than the request-seconds that the move saves at both ends.
#[test]
fn property_13_no_row_moves_whose_prefill_costs_more_than_it_saves() {
    let mut seen = [0; 2];
    for per_token in [1e-4, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.1, 0.2, 1.0] {
        let prefill = PagedPrefill { constant: 0.0, per_token, per_pair: 0.0 };
        let step = PagedStep { constant: 4e-3, per_row: 1e-3, per_context: 0.0 };
        let cost = Some(CostModel::Paged { prefill, step });
        let spec = WorkerSpec { cost, blocks: Blocks(1000), ..spec() };
        let mut pool = pool_of(Some(8), spec.clone());
        (1..=8).for_each(|id| drop(asks(&mut pool, arrival(id, 20, 400))));
        ends(&mut pool, 1, Some(9), 8, 0, &[1]);
        second(&mut pool, spec);
        (1..=8).for_each(|row| draws(&mut pool, 9, row, 0, 8, None));
        ends(&mut pool, 9, Some(10), 8, 0, &(1..=8).collect::<Vec<_>>());
        draws(&mut pool, 10, 1, 8, 300, Some(FinishReason::Stop));
        (2..=8).for_each(|row| draws(&mut pool, 10, row, 8, 8, None));
        ends(&mut pool, 10, Some(11), 8, 0, &(2..=8).collect::<Vec<_>>());
        let correction = |worker| pool.scheduler.estimator(worker).expect("there").correction();
        let (here, there) = (correction(W), correction(WorkerId(1)));
        // rows times the seconds of a step, at both ends
        let stay = 7.0 * 11e-3 * here;
        let moved = 6.0 * 10e-3 * here + 5e-3 * there;
        let pays = 36.0 * per_token * there < 308.0 * (stay - moved);
        assert_eq!(pool.scheduler.moves().weighed > 0, pays, "{per_token} s a token");
        seen[usize::from(pays)] += 1;
    }
    assert!(seen.iter().all(|count| *count >= 2), "both sides: {seen:?}");
}

#[test]
fn rows_that_wait_go_to_a_worker_that_would_be_done_sooner() {
    let small = WorkerSpec { cost: Some(cost()), max_rows: 2, ..spec() };
    let mut pool = pool_of(Some(8), small.clone());
    for id in 1..=8 {
        pool.arrive(id);
    }
    second(&mut pool, small);
    assert_eq!(pool.scheduler.loads()[1].batch_size, 0);
    ends(&mut pool, 1, Some(2), 8, 0, &[1]);
    let loads = pool.scheduler.loads();
    assert!(pool.scheduler.moves().balanced > 0 && loads[1].batch_size > 0, "{:?}", pool.scheduler.moves());
    assert_eq!(loads[0].batch_size + loads[1].batch_size, 8);
}

#[test]
fn no_row_that_runs_moves_to_where_it_would_wait() {
    let spec = WorkerSpec { cost: Some(cost()), blocks: Blocks(1000), ..spec() };
    let mut pool = pool_of(Some(8), spec.clone());
    for id in 1..=8 {
        asks(&mut pool, arrival(id, 20, 400));
    }
    ends(&mut pool, 1, Some(9), 8, 0, &[1]);
    second(&mut pool, WorkerSpec { max_rows: 1, ..spec });
    asks(&mut pool, arrival(20, 20, 400));
    assert_eq!(pool.scheduler.loads()[1].batch_size, 1);
    draws(&mut pool, 9, 1, 0, 300, Some(FinishReason::Stop));
    (2..=8).for_each(|row| draws(&mut pool, 9, row, 0, 8, None));
    let all: Vec<u64> = (2..=8).collect();
    ends(&mut pool, 9, Some(10), 8, 0, &all);
    assert_eq!(pool.scheduler.moves().weighed, 0, "its one place is taken");
}

#[test]
fn a_row_that_moved_does_not_end_by_what_its_last_worker_refuses() {
    let mut pool = pool();
    pool.arrive(1);
    pool.event(Event::Cancelled { request: RequestId(1), choice: None });
    let alone = newest(&pool.arrive(2)).no;
    second(&mut pool, spec());
    pool.event(Event::WorkerDraining { worker: W });
    assert_eq!(pool.scheduler.loads()[1].batch_size, 1, "it has moved");
    let actions = pool.refuses(alone, Refusal::NoMemory, vec![]);
    assert!(!has(&actions, |a| matches!(a, Action::Finish(..))), "{actions:?}");
}

#[test]
fn rows_of_plans_that_fall_with_their_base_are_counted_again() {
    let mut pool = pool_of(Some(8), WorkerSpec { cost: Some(cost()), ..spec() });
    let arrivals = (1..=2).map(|id| Event::RequestArrived(arrival(id, 20, 100)));
    pool.scheduler.handle_many(pool.now, arrivals, &mut pool.actions);
    pool.actions.clear();
    asks(&mut pool, arrival(3, 20, 100));
    // batches of one row: rows 2 and 3 wait
    pool.refuses(PlanNo(1), Refusal::NoMemory, vec![]);
    let both = work(&pool);
    pool.event(Event::Cancelled { request: RequestId(3), choice: None });
    assert!(work(&pool) < both, "row 3 is a part of W");
}

#[test]
fn a_row_is_counted_once_whatever_becomes_of_an_older_plan_with_it() {
    let mut pool = pool_of(Some(8), WorkerSpec { cost: Some(cost()), ..spec() });
    pool.arrive(1);
    draws(&mut pool, 1, 1, 0, 10, None);
    pool.reports(PlanNo(1), Some(PlanNo(2)), &[]);
    pool.arrive(2); // plan 3 on 2
    pool.arrive(3); // plan 4 on 2, with row 3
    pool.reports(PlanNo(2), None, &[]); // plan 3 starts when it comes, and row 3 is planned to follow it
    let before = work(&pool);
    pool.refuses(PlanNo(4), Refusal::Stale, vec![]);
    assert_eq!(work(&pool), before);
}

#[test]
fn w_is_no_longer_than_the_limits_of_the_rows_whatever_s_is() {
    let mut pool = pool_of(Some(u32::MAX), WorkerSpec { cost: Some(cost()), ..spec() });
    pool.arrive(1);
    // 20 tokens of prefill and 10 steps of 5 ms, in the running batch and once more in the one that stands
    assert!(work(&pool) < Micros(200_000), "{}", work(&pool));
}

#[test]
fn an_eta_knows_the_pace_of_a_long_prompt() {
    let long = WorkerSpec { blocks: Blocks(4096), max_context: Tokens(40_000), cost: Some(cost()), ..spec() };
    let mut pool = pool_of(Some(32), long);
    (1..=4).for_each(|id| drop(asks(&mut pool, arrival(id, 20, 900))));
    let actions = asks(&mut pool, arrival(5, 32_000, 10));
    let eta = actions.iter().find_map(|a| if let Action::Placed(_, _, eta) = a { Some(*eta) } else { None });
    // 400 iterations of 80 tokens, 8 ms each, beside four rows of 8 ms
    let hi = eta.expect("placed").hi;
    assert!(hi > Micros(6_400_000), "{hi}");
}

#[test]
fn an_eta_comes_with_the_placing() {
    let mut pool = pool_of(Some(8), WorkerSpec { cost: Some(cost()), ..spec() });
    let eta = |actions: &[Action]| {
        actions.iter().find_map(|a| if let Action::Placed(_, _, eta) = a { Some(*eta) } else { None }).expect("placed")
    };
    let alone = eta(&asks(&mut pool, arrival(1, 100, 50)));
    // 100 tokens of 0.1 ms, then 50 steps of 5 ms, each within the factor of two that a model is trusted at first
    assert!((4_500..=5_500).contains(&alone.lo.0), "{alone:?}");
    assert!((500_000..600_000).contains(&alone.hi.0), "{alone:?}");
    let behind = eta(&asks(&mut pool, arrival(2, 100, 50)));
    assert!(behind.hi > alone.hi);
}

#[test]
fn a_clock_that_jumps_back_stands_still() {
    let mut pool = pool();
    pool.now = Micros(1_000_000);
    pool.arrive(1);
    pool.now = Micros(5);
    pool.arrive(2);
    assert_eq!(pool.scheduler.clock_jumps(), 1);
    assert!(pool.scheduler.decisions().all(|decision| decision.at >= Micros(1_000_000)));
}

#[test]
fn more_than_there_can_have_been_is_counted_and_teaches_nothing() {
    let mut pool = pool_of(Some(8), WorkerSpec { cost: Some(cost()), ..spec() });
    pool.arrive(1);
    pool.now.0 += 40_000;
    ends(&mut pool, 1, Some(2), 9, 0, &[1]);
    assert_eq!(pool.scheduler.doubtful_reports(), 1, "nine iterations of eight");
    pool.now.0 += 40_000;
    ends(&mut pool, 2, Some(3), 8, 0, &[1]);
    assert_eq!(pool.scheduler.doubtful_reports(), 1);
    let told = pool.scheduler.batches().filter(|batch| batch.outcome.is_some()).count();
    assert_eq!(told, 1, "the other was no measure of anything");
}
