use proptest::prelude::*;
use router_core::{CostModel, Guarding, Layout, PolicyName, least};

use super::*;
use crate::device::Device;
use crate::random::mix;
use crate::run::{Fleet, Sessions};
use crate::timing::{Law, Noise};
use crate::trace::Trace;

const SECOND: Micros = Micros(1_000_000);

fn device() -> Device {
    let law = Law::Linear(CostModel::unknown(Layout::Paged));
    let (host, start) = (Micros::ZERO, Micros::ZERO);
    Device { name: "test".into(), law, kv: Tokens(4096), chunk: 64, max_rows: 16, host, start }
}

fn fleet(workers: u32) -> Fleet {
    Fleet {
        workers,
        device: device(),
        slow: Vec::new(),
        noise: Noise::default(),
        delay: Micros::ZERO,
        lost: Vec::new(),
        joined: Vec::new(),
    }
}

fn product() -> System {
    System::Continuous { policy: "product".into(), commit: Commit::Prefixes, guard: Guarding::Filter }
}

/// A request of a made-up trace: milliseconds, session, blocks of its session's chain, tokens after these, output.
type What = (u64, Option<u32>, u32, u32, u32);

fn trace(requests: &[What]) -> Trace {
    let mut trace = Trace { block_size: BlockSize::new(16), ..Trace::default() };
    for &(at, session, depth, rest, output) in requests {
        let start = trace.blocks.len() as u32;
        let name = |i: u32| BlockHash(mix(u64::from(session.unwrap_or(1 << 20)) << 32 | u64::from(i)));
        trace.blocks.extend((0..depth).map(name));
        let (at, input) = (Micros(at * 1000), depth * 16 + rest.max(1));
        trace.requests.push(TraceRequest { at, input, output, chain: (start, depth), session, turn: 0, class: 0 });
    }
    trace
}

fn a_run(trace: &Trace, fleet: Fleet, system: System) -> Run<'_> {
    let (until, sample_every) = (Micros(3_600 * SECOND.0), SECOND);
    Run { trace, fleet, system, sessions: Sessions::Closed, limit: 50, seed: 3, until, sample_every }
}

/// The record, and every decision.
fn log(run: &Run<'_>) -> (Record, Vec<(Micros, u32, Choice)>) {
    let mut log = Vec::new();
    let record = follow(run, &mut |_| true, &mut |at, request, choice| log.push((at, request, choice.clone())));
    (record.expect("it runs"), log)
}

fn steady(count: u64) -> Trace {
    let of =
        |i: u64| (i * 40, (!i.is_multiple_of(3)).then_some((i % 7) as u32), (i % 5) as u32, 3 + (i % 90) as u32, 30);
    trace(&(0..count).map(of).collect::<Vec<_>>())
}

#[test]
fn one_log_replays_to_the_same_decisions_and_each_recomputes() {
    let trace = steady(300);
    let noise = Noise { sigma: 0.1, ..Noise::default() };
    let run = a_run(&trace, Fleet { noise, delay: Micros(70_000), ..fleet(4) }, product());
    let (first, decisions) = log(&run);
    let (again, same) = log(&run);
    assert_eq!((decisions.len(), &decisions), (300, &same));
    assert_eq!((&first.served, &first.samples), (&again.served, &again.samples));
    for (_, _, choice) in &decisions {
        let view = choice.seen.view();
        let policy = PolicyName::Product.policy(0);
        let scores: Vec<u128> = (0..view.candidates.len()).map(|at| policy.score(view, at)).collect();
        assert_eq!((&scores, least(view, &scores)), (&choice.scores, Some(choice.at)));
    }
    let other = Run { seed: 4, ..run.clone() };
    assert_ne!(log(&other).0.served, first.served, "noise is drawn from the seed");
}

#[test]
fn a_turn_waits_for_the_one_before_it() {
    // the second turn comes while the first runs, the third long after
    let trace =
        trace(&[(0, Some(0), 2, 1, 40), (10, Some(0), 3, 1, 2), (5_000, Some(0), 4, 1, 2), (20, None, 0, 9, 2)]);
    let served = |sessions| {
        let record = log(&Run { sessions, ..a_run(&trace, fleet(2), product()) }).0;
        let mut served = record.served;
        served.sort_by_key(|served| served.request);
        served
    };
    let closed = served(Sessions::Closed);
    assert_eq!(closed[1].arrived, closed[0].ended);
    assert_eq!((closed[2].arrived, closed[3].arrived), (Micros(5_000_000), Micros(20_000)));
    assert_eq!((closed[1].hit, closed[2].hit), (32, 48), "what the turn before left is there");
    assert!(closed.iter().all(|row| row.first > row.arrived && row.ended >= row.first));
    let open = served(Sessions::Open);
    assert_eq!(open[1].arrived, Micros(10_000));
}

#[test]
fn without_commits_a_burst_goes_to_one_worker() {
    // a long prompt on one worker, then eight short ones before it has said anything
    let mut requests = vec![(0, None, 0, 2000, 20)];
    requests.extend((0..8).map(|i| (100 + i, None, 0, 20, 20)));
    let trace = trace(&requests);
    let workers = |system| {
        let (_, log) = log(&a_run(&trace, Fleet { delay: Micros(10 * SECOND.0), ..fleet(3) }, system));
        let mut counts = [0; 3];
        for (_, _, choice) in &log {
            counts[choice.at] += 1;
        }
        counts
    };
    let policy = "least_requests".to_owned();
    let committed = System::Continuous { policy: policy.clone(), commit: Commit::Load, guard: Guarding::Off };
    assert_eq!(workers(committed), [3, 3, 3]);
    // nobody is known to have anything: all tie, and ties rotate
    let (_, blind) = log(&a_run(&trace, Fleet { delay: SECOND, ..fleet(3) }, System::Uncommitted { policy }));
    assert!(blind.iter().all(|(_, _, choice)| choice.scores == [0, 0, 0]));
}

#[test]
fn what_waits_for_a_lost_worker_is_sent_again() {
    let trace = steady(200);
    let kill = Micros(3_000_000);
    let run = a_run(
        &trace,
        Fleet { lost: vec![(kill, 0), (kill, 9)], joined: vec![Micros(4_000_000)], delay: Micros(5_000), ..fleet(2) },
        product(),
    );
    let (record, decisions) = log(&run);
    assert!(record.resent > 0 && decisions.len() as u64 == 200 + record.resent);
    assert!(record.served.iter().all(|row| row.ended > Micros::ZERO && row.output == 30));
    assert_eq!(record.workers.len(), 3);
    assert!(record.served.iter().all(|row| row.worker != 0 || row.ended <= kill));
    assert!(record.served.iter().any(|row| row.worker == 2), "the one that joined works");
    // with nobody left, what comes waits for whoever joins
    let run = a_run(&trace, Fleet { lost: vec![(kill, 0)], joined: vec![Micros(9_000_000)], ..fleet(1) }, product());
    assert!(log(&run).0.served.iter().all(|row| row.ended > Micros::ZERO));
}

#[test]
fn a_run_that_diverges_ends() {
    let trace = steady(400);
    let slow = || Fleet { slow: vec![20.0], ..fleet(1) };
    let run = Run { until: Micros(2_000_000), ..a_run(&trace, slow(), product()) };
    let (record, _) = log(&run);
    assert_eq!(record.end, Micros(2_000_000));
    let unfinished = record.served.iter().filter(|row| row.ended == Micros::ZERO).count();
    assert!(unfinished > 10 && record.served.len() == 51, "all that were to come by then: {unfinished}");
    let run = a_run(&trace, slow(), product());
    let mut asked = 0;
    let record = crate::run::run(&run, &mut |share| {
        asked += 1;
        share < 0.0
    });
    let record = record.expect("it runs");
    assert!(asked == 1 && record.served.iter().any(|row| row.ended == Micros::ZERO), "whoever asks may end it");
}

#[test]
fn what_no_worker_holds_is_counted_and_what_cannot_run_is_said() {
    let trace = trace(&[(0, Some(0), 0, 4_090, 20), (0, Some(0), 1, 1, 2)]);
    let (record, _) = log(&a_run(&trace, fleet(1), product()));
    assert_eq!((record.rejected, record.served.len(), record.served[0].request), (1, 1, 1));
    let fails = |run: Run<'_>| crate::run::run(&run, &mut |_| true).expect_err("it cannot run").to_string();
    assert_eq!(fails(a_run(&trace, fleet(0), product())), "a fleet needs at least one worker");
    let typo = System::Continuous { policy: "prodcut".into(), commit: Commit::Load, guard: Guarding::Off };
    let said = fails(a_run(&trace, fleet(1), typo));
    assert!(said.starts_with("no such policy: prodcut\n") && said.contains("product"), "{said}");
    let weight = System::Uncommitted { policy: "linear@2".into() };
    assert!(fails(a_run(&trace, fleet(1), weight)).contains("linear"));
}

#[test]
fn a_slow_worker_gets_less() {
    let trace = steady(600);
    let (record, _) = log(&a_run(&trace, Fleet { slow: vec![1.0, 3.0], ..fleet(2) }, product()));
    let of = |worker| record.served.iter().filter(|row| row.worker == worker).count();
    assert!(of(0) > of(1) && of(1) > 60, "{} and {}", of(0), of(1));
}

/// What may happen to a fleet.
#[derive(Clone, Debug)]
struct Case {
    requests: Vec<What>,
    workers: u32,
    delay: u64,
    sigma: f64,
    lost: Vec<(u64, u32)>,
    system: usize,
    open: bool,
    blocks: u64,
}

fn case() -> impl Strategy<Value = Case> {
    let what = (0u64..4_000, proptest::option::of(0u32..5), 0u32..9, 0u32..200, 1u32..70);
    let lost = proptest::collection::vec((0u64..5_000, 0u32..3), 0..3);
    let shape = (1u32..5, prop_oneof![Just(0u64), 1u64..900], prop_oneof![Just(0.0), Just(0.2)], 25u64..60);
    (proptest::collection::vec(what, 1..60), shape, lost, 0usize..5, any::<bool>()).prop_map(
        |(mut requests, (workers, delay, sigma, blocks), lost, system, open)| {
            requests.sort_by_key(|what| what.0);
            Case { requests, workers, delay, sigma, lost, system, open, blocks }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]
    #[test]
    fn every_request_ends_once_and_all_is_given_back(case in case()) {
        let trace = trace(&case.requests);
        let name = ["product", "product_anticipating", "jsq", "sticky", "product"][case.system];
        let system = match case.system {
            4 => System::Uncommitted { policy: name.into() },
            at => System::Continuous {
                policy: name.into(),
                commit: if at == 2 { Commit::Load } else { Commit::Prefixes },
                guard: if at < 2 { Guarding::Filter } else { Guarding::Off },
            },
        };
        let lost = case.lost.iter().map(|(at, worker)| (Micros(at * 1000), *worker)).collect();
        let mut fleet = Fleet {
            delay: Micros(case.delay * 1000),
            noise: Noise { sigma: case.sigma, ..Noise::default() },
            lost,
            joined: vec![Micros(6_000_000)],
            ..fleet(case.workers)
        };
        fleet.device.kv = Tokens(case.blocks * 16);
        let sessions = if case.open { Sessions::Open } else { Sessions::Closed };
        let run = Run { sessions, ..a_run(&trace, fleet, system) };
        let (mut decided, mut nothing) = (0, |_: Micros, _: u32, _: &Choice| {});
        let mut drive = Drive::new(&run, &mut nothing).expect("it can run");
        while drive.step().expect("it runs") {
            decided += 1;
        }
        prop_assert!(decided > 0);
        // what is still on its way to the router
        while let Some((at, due)) = drive.calendar.pop(Micros(u64::MAX)) {
            if let Due::Hear(worker, report) = due {
                drive.now = at;
                drive.hear(worker, &report).expect("it is heard");
            }
        }
        for state in drive.router.workers() {
            prop_assert_eq!((state.batch_size, state.queued), (0, Tokens::ZERO));
        }
        let record = drive.finish();
        prop_assert_eq!(record.served.len() + record.rejected as usize, trace.requests.len());
        for row in &record.served {
            let what = &trace.requests[row.request as usize];
            prop_assert!(row.arrived >= what.at && row.first > row.arrived && row.ended >= row.first);
            prop_assert_eq!(row.output, what.output.min(50));
        }
        let again = log(&run).0;
        prop_assert_eq!(again.served, record.served);
    }
}
