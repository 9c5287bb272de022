//! The scheduler against a worker played by hand: what the modelled worker never does.

mod common;

use std::sync::Arc;

use common::{Pool, W, errors, has, key, model, plans, pool};
use router_core::{
    Action, BatchEnd, BlockHash, Blocks, Config, Epoch, Event, FinishReason, Keep, Layout, Micros, Mode, NewRequest,
    PlanNo, PolicyName, Refusal, RequestId, RowReport, Scheduler, SliceReport, Tokens, WorkerId, WorkerMessage,
    WorkerSpec,
};

#[test]
fn an_idle_worker_gets_its_batch_and_the_plan_after_it_at_once() {
    let mut pool = pool();
    let actions = pool.arrive(1);
    let sent = plans(&actions);
    assert_eq!(
        sent.iter().map(|plan| (plan.no, plan.base)).collect::<Vec<_>>(),
        [(PlanNo(1), PlanNo(0)), (PlanNo(2), PlanNo(1))]
    );
    assert_eq!((sent[0].add.len(), &sent[0].keep), (1, &Keep::List(vec![])));
    assert_eq!((sent[1].add.len(), &sent[1].keep), (0, &Keep::Survivors));
    // 20 + 4 - 1 positions, then 20 + 8 - 1
    assert_eq!((sent[0].ceiling, sent[1].ceiling), (Blocks(2), Blocks(2)));
}

#[test]
fn a_newcomer_replaces_the_standing_plan() {
    let mut pool = pool();
    pool.arrive(1);
    let actions = pool.arrive(2);
    let sent = plans(&actions);
    assert_eq!(sent.len(), 1);
    assert_eq!((sent[0].no, sent[0].base, &sent[0].keep), (PlanNo(3), PlanNo(1), &Keep::Survivors));
    assert_eq!(sent[0].add[0].key, key(2, 0));
    // the older plan started before the newer one came: the newcomer is planned again
    let actions = pool.reports(PlanNo(1), Some(PlanNo(2)), &[key(1, 0)]);
    assert_eq!(plans(&actions)[0].base, PlanNo(2));
    assert_eq!(plans(&actions)[0].add[0].key, key(2, 0));
    assert!(plans(&pool.refuses(PlanNo(3), Refusal::Stale, vec![])).is_empty(), "a stale plan changes nothing");
}

#[test]
fn a_cancelled_row_is_dropped_where_it_is_planned() {
    let mut pool = pool();
    pool.arrive(1);
    pool.arrive(2);
    let actions = pool.event(Event::Cancelled { request: RequestId(2), choice: None });
    assert!(has(&actions, |a| matches!(a, Action::Drop(W, rows) if rows == &[key(2, 0)])));
    assert!(has(
        &actions,
        |a| matches!(a, Action::Finish(row, end) if row.request.0 == 2 && end.reason == FinishReason::Cancelled)
    ));
    let actions = pool.event(Event::Cancelled { request: RequestId(2), choice: None });
    assert!(actions.is_empty(), "it ends once");
}

#[test]
fn what_arrives_twice_or_late_changes_nothing() {
    let mut pool = pool();
    pool.arrive(1);
    assert!(has(
        &pool.draws(key(1, 0), 0, &[5, 6]),
        |a| matches!(a, Action::Tokens { first_index: 0, ids, .. } if ids == &[5, 6])
    ));
    let again = pool.draws(key(1, 0), 0, &[5, 6, 7]);
    assert!(has(&again, |a| matches!(a, Action::Tokens { first_index: 2, ids, logprobs, .. }
        if ids == &[7] && logprobs.len() == 1 && logprobs[0].top[0].0 == 7)));
    assert!(pool.draws(key(1, 7), 3, &[8]).is_empty(), "of another attempt");
    assert!(pool.draws(key(9, 0), 0, &[8]).is_empty(), "of nobody");
    let old = WorkerMessage::KvDelta { removed: vec![], stored: vec![BlockHash(1)] };
    let late = Event::Worker { worker: W, epoch: Epoch(1), seq: 1, message: old.clone() };
    assert!(pool.event(late).is_empty(), "a sequence number seen before");
    assert!(pool.event(Event::Worker { worker: W, epoch: Epoch(0), seq: 99, message: old }).is_empty(), "an old epoch");
    assert_eq!(pool.scheduler.loads()[0].indexed, Blocks(1), "the prompt's own block alone");
}

#[test]
fn a_gap_in_the_messages_asks_for_a_snapshot_and_lost_tokens_are_drawn_again() {
    let mut pool = pool();
    pool.arrive(1);
    pool.draws(key(1, 0), 0, &[5]);
    pool.seq += 3;
    assert!(has(&pool.says(WorkerMessage::Heartbeat), |a| matches!(a, Action::Resync(W))));
    let actions = pool.draws(key(1, 0), 4, &[9]);
    assert!(has(&actions, |a| matches!(a, Action::Drop(W, rows) if rows == &[key(1, 0)])));
    let again = plans(&actions);
    assert_eq!((again[0].add[0].key, &again[0].add[0].output[..]), (key(1, 1), &[5][..]), "from what the client has");
}

#[test]
fn a_lying_worker_is_quarantined() {
    let quarantined = |actions: Vec<Action>| has(&actions, |a| matches!(a, Action::Quarantine(..)));
    let started = || {
        let mut pool = pool();
        pool.arrive(1);
        pool
    };
    assert!(quarantined(started().draws(key(1, 0), 0, &[100])), "no such token");
    assert!(quarantined(started().draws(key(1, 0), 0, &[5; 11])), "past the limit");
    assert!(quarantined(started().reports(PlanNo(7), None, &[])), "a batch that does not run");
    assert!(quarantined(started().reports(PlanNo(1), Some(PlanNo(9)), &[])), "a plan that was not sent");
}

#[test]
fn a_refusal_for_memory_halves_the_batch_and_a_row_refused_alone_ends() {
    let mut pool = pool();
    pool.arrive(1);
    for id in 2..=4 {
        pool.arrive(id);
    }
    // 4 rows stand on batch 1
    let actions = pool.refuses(PlanNo(5), Refusal::NoMemory, vec![]);
    let retry = plans(&actions);
    assert_eq!((retry[0].base, retry[0].add.len()), (PlanNo(1), 1), "two of four: one survivor and one newcomer");
    let mut pool = self::pool();
    pool.arrive(1);
    let actions = pool.refuses(PlanNo(1), Refusal::NoMemory, vec![]);
    assert_eq!(errors(&actions), 1);
    assert_eq!(pool.scheduler.loads()[0].batch_size, 0);
}

#[test]
fn an_unsupported_row_ends_and_the_others_run() {
    let mut pool = pool();
    pool.arrive(1);
    pool.arrive(2);
    pool.arrive(3);
    let actions = pool.refuses(PlanNo(4), Refusal::Unsupported, vec![key(2, 0)]);
    assert_eq!(errors(&actions), 1);
    assert_eq!(plans(&actions)[0].add.iter().map(|start| start.key).collect::<Vec<_>>(), [key(3, 0)]);
    // a refusal that names nobody and nothing new: the worker is at fault
    let mut pool = self::pool();
    pool.arrive(1);
    assert!(has(&pool.refuses(PlanNo(2), Refusal::Unsupported, vec![]), |a| matches!(a, Action::Quarantine(..))));
}

#[test]
fn a_row_the_worker_forgot_is_told_again() {
    let mut pool = pool();
    pool.arrive(1);
    pool.draws(key(1, 0), 0, &[5]);
    let actions = pool.refuses(PlanNo(2), Refusal::UnknownRow, vec![key(1, 0)]);
    let again = plans(&actions);
    assert_eq!((again[0].add[0].key, &again[0].add[0].output[..]), (key(1, 0), &[5][..]));
}

#[test]
fn rows_move_when_a_worker_drains_and_only_those_it_does_not_know() {
    let mut pool = pool();
    pool.arrive(1);
    pool.arrive(2);
    let spec = WorkerSpec { name: "v".into(), ..pool.scheduler.loads()[0].spec.clone() };
    pool.event(Event::WorkerJoined { worker: WorkerId(1), spec });
    let message = WorkerMessage::Snapshot { chunk: 0, last: true, hashes: vec![] };
    pool.event(Event::Worker { worker: WorkerId(1), epoch: Epoch(1), seq: 1, message });
    let actions = pool.event(Event::WorkerDraining { worker: W });
    assert!(has(&actions, |a| matches!(a, Action::Placed(row, WorkerId(1), _) if row.request.0 == 2)));
    let loads = pool.scheduler.loads();
    assert_eq!((loads[0].batch_size, loads[1].batch_size), (1, 1));
}

#[test]
fn what_was_committed_is_taken_back_to_the_last_token() {
    let mut pool = pool();
    pool.arrive(1);
    pool.arrive(2);
    let load = &pool.scheduler.loads()[0];
    assert_eq!((load.queued, load.batch_size, load.indexed), (Tokens(40), 2, Blocks(2)));
    for id in [1, 2] {
        pool.event(Event::Cancelled { request: RequestId(id), choice: None });
    }
    pool.reports(PlanNo(1), None, &[]);
    let load = &pool.scheduler.loads()[0];
    assert_eq!((load.queued, load.batch_size, load.work, load.indexed), (Tokens(0), 0, Micros(0), Blocks(0)));
}

#[test]
fn a_plan_never_outgrows_a_message() {
    let config = Config { policy: PolicyName::Product, mode: Mode::Slice, slice_len: Some(4), seed: 0, max_rows: 100 };
    let mut pool = Pool { scheduler: Scheduler::new(model(), config), seq: 0, actions: Vec::new(), now: Micros(1) };
    let spec = WorkerSpec {
        name: "w".into(),
        epoch: Epoch(1),
        model: model(),
        blocks: Blocks(1 << 20),
        max_rows: 64,
        max_context: Tokens(1 << 22),
        chunk: Tokens(512),
        layout: Layout::Paged,
        cost: None,
    };
    pool.event(Event::WorkerJoined { worker: W, spec });
    pool.says(WorkerMessage::Snapshot { chunk: 0, last: true, hashes: vec![] });
    pool.arrive(0);
    let prompt: Arc<[u32]> = vec![1; 900_000].into();
    let arrive = |id| NewRequest {
        id: RequestId(id),
        prompt: prompt.clone(),
        root: BlockHash(id),
        choices: 1,
        max_tokens: Tokens(10),
        urgent: false,
    };
    pool.scheduler.handle_many(Micros(2), (1..=5).map(|id| Event::RequestArrived(arrive(id))), &mut pool.actions);
    let actions = std::mem::take(&mut pool.actions);
    assert_eq!(plans(&actions)[0].add.len(), 2, "2 of 5 prompts of 900,000 tokens fit 8 MiB");
}

#[test]
fn choices_are_rows_of_their_own() {
    let mut pool = pool();
    let prompt: Arc<[u32]> = Arc::from([1; 20]);
    let request =
        NewRequest { id: RequestId(1), prompt, root: BlockHash(1), choices: 3, max_tokens: Tokens(10), urgent: false };
    let actions = pool.event(Event::RequestArrived(request));
    assert_eq!(plans(&actions)[0].add.len(), 3, "three arrive together: one batch");
    let finished = |actions: &[Action]| -> Vec<u32> {
        actions.iter().filter_map(|a| if let Action::Finish(row, _) = a { Some(row.choice) } else { None }).collect()
    };
    let actions = pool.event(Event::Cancelled { request: RequestId(1), choice: Some(1) });
    assert_eq!(finished(&actions), [1]);
    let actions = pool.event(Event::Cancelled { request: RequestId(1), choice: None });
    assert_eq!(finished(&actions), [0, 2]);
    assert_eq!(pool.scheduler.rows(), 0);
}

#[test]
fn a_row_that_ends_every_worker_it_meets_ends_itself() {
    let mut pool = pool();
    pool.arrive(1);
    let spec = pool.scheduler.loads()[0].spec.clone();
    for epoch in 1..=2 {
        let lost = pool.event(Event::WorkerLost { worker: W, epoch: Epoch(epoch) });
        assert_eq!(errors(&lost), usize::from(epoch == 2), "lost {epoch}");
        pool.event(Event::WorkerJoined { worker: W, spec: WorkerSpec { epoch: Epoch(epoch + 1), ..spec.clone() } });
        let message = WorkerMessage::Snapshot { chunk: 0, last: true, hashes: vec![] };
        pool.event(Event::Worker { worker: W, epoch: Epoch(epoch + 1), seq: 1, message });
    }
}

#[test]
fn a_plan_that_was_replaced_and_whose_successor_is_refused_does_not_stand_again() {
    let mut pool = pool();
    pool.arrive(1); // plan 1 runs, plan 2 stands
    pool.arrive(2); // plan 3 replaces it
    let actions = pool.refuses(PlanNo(3), Refusal::NoMemory, vec![]);
    // at the end of batch 1 nothing stands: what is sent now starts on arrival
    let again = plans(&actions)[0].no;
    let actions = pool.reports(PlanNo(1), None, &[key(1, 0)]);
    assert_eq!(plans(&actions).iter().map(|plan| plan.base).collect::<Vec<_>>(), [again]);
}

#[test]
fn of_two_plans_on_their_way_to_an_idle_worker_the_second_starts_where_the_first_is_refused() {
    let mut pool = pool();
    pool.arrive(1);
    pool.draws(key(1, 0), 0, &[5; 10]); // at its limit: only the plan without rows stands
    pool.reports(PlanNo(1), Some(PlanNo(2)), &[]);
    pool.arrive(2); // plan 3 on 2
    pool.arrive(3); // plan 4 on 2
    pool.reports(PlanNo(2), None, &[]); // plan 3 starts when it comes
    let actions = pool.refuses(PlanNo(3), Refusal::NoMemory, vec![]); // it did not: plan 4 does
    assert!(plans(&actions).iter().all(|plan| plan.base == PlanNo(4)), "{actions:?}");
    let actions = pool.reports(PlanNo(4), None, &[key(2, 0), key(3, 0)]);
    assert!(!has(&actions, |a| matches!(a, Action::Quarantine(..))), "{actions:?}");
}

#[test]
fn a_stale_answer_to_a_plan_that_cannot_be_stale_parts_with_the_worker() {
    let mut pool = pool();
    pool.arrive(1);
    assert!(has(&pool.refuses(PlanNo(2), Refusal::Stale, vec![]), |a| matches!(a, Action::Quarantine(..))));
}

#[test]
fn hostile_numbers_and_counts() {
    let mut pool = pool();
    pool.arrive(1);
    pool.says(WorkerMessage::SliceReported(SliceReport {
        batch: PlanNo(1),
        end: BatchEnd::Steps,
        next: None,
        steps: u32::MAX,
        prefill: Micros(u64::MAX),
        decode: Micros(u64::MAX),
        peak: Blocks(u64::MAX),
        idle: Micros(u64::MAX),
        pad: Tokens(0),
        invalid: Tokens(0),
        rows: vec![RowReport {
            key: key(1, 0),
            computed: Tokens(u64::MAX),
            cached: Tokens(u64::MAX),
            emitted: Tokens(1),
            finish: None,
            held: true,
            prefill_left: Tokens(u64::MAX),
        }],
    }));
    pool.arrive(2);
    pool.seq = u64::MAX - 1;
    pool.says(WorkerMessage::Heartbeat);
    let mut pool = self::pool();
    let stored = (0..65).map(BlockHash).collect();
    let actions = pool.says(WorkerMessage::KvDelta { removed: vec![], stored });
    assert!(has(&actions, |a| matches!(a, Action::Quarantine(..))), "65 blocks of 64");
}

#[test]
fn a_row_at_its_limit_has_ended_even_if_nobody_says_so() {
    let mut pool = pool();
    pool.arrive(1);
    let actions = pool.draws(key(1, 0), 0, &[5; 10]);
    assert!(has(&actions, |a| matches!(a, Action::Finish(_, end) if end.reason == FinishReason::Length)));
}

#[test]
fn a_row_reported_finished_whose_last_step_was_lost_is_drawn_again() {
    let mut pool = pool();
    pool.arrive(1);
    pool.draws(key(1, 0), 0, &[5, 6]);
    let row = RowReport {
        key: key(1, 0),
        computed: Tokens(3),
        cached: Tokens(0),
        emitted: Tokens(3),
        finish: Some(FinishReason::Stop),
        held: false,
        prefill_left: Tokens(0),
    };
    let report = SliceReport {
        batch: PlanNo(1),
        end: BatchEnd::AllDone,
        next: None,
        steps: 3,
        prefill: Micros(0),
        decode: Micros(9),
        peak: Blocks(2),
        idle: Micros(0),
        pad: Tokens(0),
        invalid: Tokens(0),
        rows: vec![row],
    };
    let actions = pool.says(WorkerMessage::SliceReported(report));
    let again = plans(&actions).into_iter().flat_map(|plan| &plan.add).next().expect("it is told again");
    assert_eq!((again.key, &again.output[..]), (key(1, 1), &[5, 6][..]));
}

#[test]
fn a_worker_that_does_nothing_of_what_it_is_given_is_not_asked_for_ever() {
    let mut pool = pool();
    let mut last = plans(&pool.arrive(1)).last().expect("a plan").no;
    let mut rounds = 0;
    loop {
        rounds += 1;
        assert!(rounds < 100, "a loop without end");
        let actions = pool.refuses(last, Refusal::UnknownRow, vec![]);
        if has(&actions, |a| matches!(a, Action::Quarantine(..))) {
            break;
        }
        last = plans(&actions).last().expect("another plan").no;
    }
    let mut pool = self::pool();
    pool.arrive(1);
    let (mut batch, mut rounds) = (PlanNo(1), 0);
    loop {
        rounds += 1;
        assert!(rounds < 100, "a loop without end");
        let actions = pool.reports(batch, Some(PlanNo(batch.0 + 1)), &[]);
        if has(&actions, |a| matches!(a, Action::Quarantine(..))) {
            break;
        }
        batch = PlanNo(batch.0 + 1);
    }
}

#[test]
fn draining_the_only_worker_lets_its_rows_finish() {
    let mut pool = pool();
    pool.arrive(1);
    pool.arrive(2);
    let actions = pool.event(Event::WorkerDraining { worker: W });
    assert_eq!(errors(&actions), 0);
    assert_eq!(pool.scheduler.loads()[0].batch_size, 2);
}
