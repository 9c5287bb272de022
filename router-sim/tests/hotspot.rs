//! A hotspot burst in front of modelled engines: the guard trips, the class spreads, the alarm clears.

use router_core::{Choice, Commit, Guarding, Micros, Tokens};
use router_sim::{
    Burst, Device, Fleet, GuardCounts, Noise, Random, Record, Run, Sessions, System, Trace, TraceRequest, follow,
};

/// Requests that share nothing, at 60 a second for 40 s.
fn background(seed: u64) -> Trace {
    let mut random = Random::new(seed);
    let mut at = 0.0;
    let mut trace = Trace { classes: vec!["other".into()], ..Trace::default() };
    while at < 40.0 {
        at += random.exponential(1.0 / 60.0);
        let (input, output) = (200 + random.below(1_000) as u32, 20 + random.below(100) as u32);
        let at = Micros((at * 1e6) as u64);
        trace.requests.push(TraceRequest { at, input, output, chain: (0, 0), session: None, turn: 0, class: 0 });
    }
    trace
}

/// The run, and what the guard saw of the burst: holders, alarm, filtered, in order.
fn run(trace: &Trace, guard: Guarding) -> (Record, Vec<(u32, bool, bool)>) {
    let fleet = Fleet {
        workers: 16,
        device: Device::named("7b-h20").expect("it comes with the simulator"),
        slow: Vec::new(),
        noise: Noise::default(),
        delay: Micros::ZERO,
        lost: Vec::new(),
        joined: Vec::new(),
    };
    let run = Run {
        trace,
        fleet,
        system: System::Continuous { policy: "product_anticipating".into(), commit: Commit::Prefixes, guard },
        sessions: Sessions::Closed,
        limit: 1_000,
        seed: 1,
        until: Micros(300_000_000),
        sample_every: Micros::ZERO,
    };
    let mut seen = Vec::new();
    let mut decided = |_: Micros, request: u32, choice: &Choice| {
        if trace.requests[request as usize].class > 0 {
            seen.extend(choice.guard.map(|sighting| (sighting.holders, sighting.alarm, sighting.filtered)));
        }
    };
    (follow(&run, &mut |_| true, &mut decided).expect("it runs"), seen)
}

fn p99(record: &Record, trace: &Trace, class: u16) -> f64 {
    let rows = record.served.iter().filter(|row| trace.requests[row.request as usize].class >= class);
    let mut times: Vec<u64> = rows.map(|row| row.first.0 - row.arrived.0).collect();
    times.sort_unstable();
    times[times.len() * 99 / 100] as f64
}

#[test]
fn property_5_a_burst_trips_the_guard_and_the_alarm_clears() {
    let quiet = background(1);
    assert_eq!(run(&quiet, Guarding::Filter).0.guard, GuardCounts::default(), "who shares nothing is no class");
    let (shared, own, output) = (Tokens(8192), Tokens(32), Tokens(100));
    // as many again, and one prefix: half of all
    let burst = Burst { from: 10.0, seconds: 25.0, rate: 60.0, shared, own, output };
    let trace = quiet.with_burst(&burst, 2).expect("a burst");
    let (bare, _) = run(&trace, Guarding::Off);
    let (guarded, seen) = run(&trace, Guarding::Filter);
    assert!(guarded.served.iter().all(|row| row.ended > Micros::ZERO));
    let alarm = seen.iter().position(|(_, alarm, _)| *alarm).expect("an alarm");
    let filtered = seen.iter().position(|(_, _, filtered)| *filtered).expect("it trips");
    let holders = seen[filtered].0 as usize;
    assert!(filtered - alarm <= 2 * holders + 10, "{alarm} to {filtered}, {holders} holders");
    let last = seen.iter().rposition(|(_, alarm, _)| *alarm).expect("an alarm");
    assert!(last < seen.len() / 2, "the alarm clears: {last} of {}", seen.len());
    assert!(seen[last].0 < seen[seen.len() - 1].0 || holders < seen[last].0 as usize, "holders are made");
    // nobody pays for it
    assert!(p99(&guarded, &trace, 0) <= 1.05 * p99(&bare, &trace, 0));
    assert!(p99(&guarded, &trace, 1) <= 1.5 * p99(&bare, &trace, 1));
}
