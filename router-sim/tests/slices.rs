//! What slices are there for, in virtual time: the times foreseen hold, moves pay, and KV that is kept makes slices short.

mod common;

use common::{FOREVER, check_drained, config, model, prompt, request, spec};
use router_core::{
    BatchEnd, Config, CostModel, Layout, Micros, Mode, PaddedCost, PagedPrefill, PagedStep, PolicyName, Pooled, Tokens,
    WorkerSpec,
};
use router_sim::{
    Device, Fleet, Lengths, Noise, Pace, Random, Record, Run, Sessions, Simulation, System, Trace, TraceRequest, run,
    synthetic,
};

const LINK: Micros = Micros(300);

/// The paper's slices on workers that are exactly what they announce: nobody runs longer than was foreseen, and a batch
/// whose rows all end before S returns sooner.
#[test]
fn property_9_full_slices_take_no_longer_than_foreseen_and_early_returns_less() {
    let cost = CostModel::Padded {
        prefill: PaddedCost { constant: 2e-3, per_row: 1e-4, per_position: 1e-5, per_cell: 4e-5 },
        step: PaddedCost { constant: 5e-3, per_row: 5e-5, per_position: 1e-6, per_cell: 2e-7 },
    };
    let config = Config { mode: Mode::Pooled(Pooled::scls()), ..config(PolicyName::Product, 400) };
    let mut sim = Simulation::new(model(), config, LINK).cheap(64).with_batches();
    let spec = WorkerSpec { layout: Layout::Padded, cost: Some(cost), ..spec(4096, 64) };
    for _ in 0..2 {
        sim.join(Micros::ZERO, spec.clone(), Pace::linear(cost, 512));
    }
    for (id, sample) in synthetic(Lengths::sharegpt_like(), 4.0, 240.0, 5).into_iter().enumerate() {
        let prompt = prompt(id as u32, sample.prompt as usize);
        sim.arrive_ending(Micros(10_000) + sample.at, request(id as u64, prompt, 1024), sample.output as u32);
    }
    let out = sim.run(FOREVER).clone();
    check_drained(&sim, &out);
    let (mut full, mut early) = (0, 0);
    for batch in &out.batches {
        let Some(outcome) = batch.outcome else { continue };
        assert!(outcome.time <= batch.band.hi, "{batch:?}");
        match outcome.end {
            BatchEnd::AllDone if outcome.steps < batch.steps => {
                early += 1;
                let middle = Micros(batch.band.lo.0.midpoint(batch.band.hi.0));
                assert!(outcome.time < middle, "{batch:?}");
            }
            _ => full += 1,
        }
    }
    assert!(full > 10 && early > 10, "{full} full, {early} early");
}

/// Rows of a worker when an empty one comes: a row moves if and only if the request-seconds that all rows save, over what it
/// is expected to draw still, are more than its prefill costs. With `n` rows, steps of `constant + r * n` and `m` tokens
/// expected these are `2 * r * (n - 1) * m`.
fn moves_at(rows: u64, tokens: usize, over: f64) -> u64 {
    const MEAN: u64 = 200;
    let per_row = 1e-3;
    let saved = 2.0 * per_row * (rows - 1) as f64 * MEAN as f64;
    let cost = CostModel::Paged {
        prefill: PagedPrefill { constant: 0.0, per_token: over * saved / tokens as f64, per_pair: 0.0 },
        step: PagedStep { constant: 5e-3, per_row, per_context: 0.0 },
    };
    let spec = WorkerSpec { cost: Some(cost), chunk: Tokens(8192), ..spec(4096, 64) };
    let mut sim = Simulation::new(model(), config(PolicyName::Product, 16), LINK).cheap(1);
    sim.join(Micros::ZERO, spec.clone(), Pace::linear(cost, 8192));
    // it tells how long answers are
    sim.arrive_ending(Micros(10_000), request(999, prompt(999, 20), 1024), MEAN as u32);
    sim.run(FOREVER);
    let begin = Micros(60_000_000);
    for id in 0..rows {
        sim.arrive(begin, request(id, prompt(id as u32, tokens), 4000));
    }
    // all have drawn something, and none is near its end
    let prefilled = begin + Micros((over * saved * 1e6) as u64 * rows + 400_000);
    sim.run(prefilled);
    assert_eq!(sim.moves().weighed, 0);
    sim.join(prefilled, spec, Pace::linear(cost, 8192));
    sim.run(prefilled + Micros(500_000));
    sim.moves().weighed
}

#[test]
fn property_13_a_row_moves_only_where_the_request_seconds_saved_are_more_than_its_prefill() {
    for rows in [4, 9, 20] {
        for tokens in [500, 2_000] {
            // a row has drawn some tokens more by then
            let moved = [0.5, 0.75, 1.05, 2.0].map(|over| moves_at(rows, tokens, over) > 0);
            assert_eq!(moved, [true, true, false, false], "{rows} rows of {tokens} tokens");
        }
    }
}

/// Chats on two 13B workers at a load that all of these can serve.
fn chats(mode: Mode, slice_len: u32) -> Record {
    let samples = synthetic(Lengths::sharegpt_like(), 3.5, 240.0, 3);
    let requests = samples.into_iter().map(|sample| TraceRequest {
        at: sample.at,
        input: sample.prompt as u32,
        output: sample.output as u32,
        chain: (0, 0),
        session: None,
        turn: 0,
        class: 0,
    });
    let trace = Trace { name: "chats".into(), requests: requests.collect(), ..Trace::default() };
    let fleet = Fleet {
        workers: 2,
        device: Device::named("13b-a100").expect("it is there"),
        slow: Vec::new(),
        noise: Noise::default(),
        delay: Micros::ZERO,
        lost: Vec::new(),
        joined: Vec::new(),
    };
    let system = System::Scheduled { mode, policy: PolicyName::LeastRequests, slice_len: Some(slice_len) };
    let (sessions, until, sample_every) = (Sessions::Closed, FOREVER, Micros::ZERO);
    let asked = Run { trace: &trace, fleet, system, sessions, limit: 1024, seed: 1, until, sample_every };
    run(&asked, &mut |_| true).expect("it runs")
}

/// S of the least mean latency.
fn best(mode: Mode) -> u32 {
    let latency = |slice_len| {
        let record = chats(mode, slice_len);
        assert!(record.served.iter().all(|one| one.ended > one.arrived), "{slice_len}");
        record.served.iter().map(|one| one.ended.saturating_sub(one.arrived).0).sum::<u64>()
    };
    let of = |slice_len: u32| (latency(slice_len), slice_len);
    [4, 8, 16, 32, 64, 128, 256, 512].map(of).into_iter().min().map_or(0, |(_, slice_len)| slice_len)
}

#[test]
fn property_14_the_best_slice_is_far_longer_where_kv_is_dropped() {
    // slices that nobody cuts, so that S alone decides when a row may join
    let (kept, dropped) = (best(Mode::Ils), best(Mode::Pooled(Pooled::scls())));
    println!("best S: {kept} with KV kept, {dropped} with KV dropped");
    assert!(dropped >= 4 * kept, "{kept} and {dropped}");
}

/// A run that keeps a line a request, and counts tokens instead of drawing them, is the run that keeps all, as long as no row
/// that lost its KV finds some of its own blocks again.
#[test]
fn a_lean_run_is_the_same_run() {
    for (mode, layout, rate) in [
        (Mode::Slice, Layout::Paged, 32.0),
        (Mode::Ils, Layout::Paged, 20.0),
        (Mode::Pooled(Pooled::scls()), Layout::Padded, 6.0),
    ] {
        let mut draw = Random::new(4);
        let samples = synthetic(Lengths::sharegpt_like(), rate, 20.0, draw.next());
        let requests = samples.iter().map(|sample| TraceRequest {
            at: sample.at,
            input: sample.prompt as u32,
            output: sample.output as u32,
            chain: (0, 0),
            session: None,
            turn: 0,
            class: 0,
        });
        let trace = Trace { name: "chats".into(), requests: requests.collect(), ..Trace::default() };
        let named = Trace { block_size: model().block_size.into(), ..trace.clone() };
        let device = Device::named("13b-a100").expect("it is there");
        let fleet = Fleet {
            workers: 3,
            device,
            slow: vec![1.0, 1.2, 1.0],
            noise: Noise { sigma: 0.03, ..Noise::default() },
            delay: Micros(2_000),
            lost: vec![(Micros(9_000_000), 1)],
            joined: vec![Micros(11_000_000)],
        };
        let system = System::Scheduled { mode, policy: PolicyName::Product, slice_len: None };
        let (sessions, until, sample_every) = (Sessions::Closed, FOREVER, Micros(1_000_000));
        let counted = Run { trace: &trace, fleet, system, sessions, limit: 1024, seed: 9, until, sample_every };
        let drawn = Run { trace: &named, ..counted.clone() };
        let [counted, drawn] = [counted, drawn].map(|asked| run(&asked, &mut |_| true).expect("it runs"));
        let found: u64 = drawn.workers.iter().map(|worker| worker.cached.0).sum();
        assert_eq!(found, 0, "{mode}: a row whose KV was taken found blocks of its own again, which are not counted");
        let differs = counted.served.iter().zip(&drawn.served).find(|(counted, drawn)| counted != drawn);
        assert_eq!(differs, None, "{mode} {layout:?}");
        assert_eq!(counted.served.len(), drawn.served.len(), "{mode}");
        assert_eq!(counted.samples, drawn.samples, "{mode}");
        assert_eq!(counted.lanes, drawn.lanes, "{mode}");
        assert!(counted.served.iter().all(|one| one.ended > one.arrived && one.first > one.arrived), "{mode}");
        assert!(counted.served.iter().any(|one| one.worker == 3), "the joined worker served");
        assert_eq!(counted.samples[0].batch_size.len(), 3);
    }
}

/// A turn begins when it is due and the turn before it has ended; in an open run when it is due.
#[test]
fn turns_of_closed_sessions_wait() {
    let turn = |at: u64, session: u32, turn: u32| TraceRequest {
        at: Micros(at),
        input: 200,
        output: 100,
        chain: (0, 0),
        session: Some(session),
        turn,
        class: 0,
    };
    let requests = vec![turn(0, 0, 0), turn(10, 1, 0), turn(1_000, 0, 1), turn(2_000, 0, 2), turn(90_000_000, 1, 1)];
    let trace = Trace { name: "turns".into(), requests, ..Trace::default() };
    for sessions in [Sessions::Closed, Sessions::Open] {
        let fleet = Fleet {
            workers: 1,
            device: Device::named("7b-h20").expect("it is there"),
            slow: Vec::new(),
            noise: Noise::default(),
            delay: Micros::ZERO,
            lost: Vec::new(),
            joined: Vec::new(),
        };
        let system = System::Scheduled { mode: Mode::Slice, policy: PolicyName::Product, slice_len: None };
        let (until, sample_every) = (FOREVER, Micros::ZERO);
        let asked = Run { trace: &trace, fleet, system, sessions, limit: 128, seed: 1, until, sample_every };
        let record = run(&asked, &mut |_| true).expect("it runs");
        let of = |request: u32| record.served.iter().find(|one| one.request == request).expect("served");
        assert_eq!(record.served.len(), 5);
        assert_eq!(of(4).arrived, Micros(90_000_000));
        let (one, two) = (of(2), of(3));
        if sessions == Sessions::Closed {
            assert_eq!((one.arrived, two.arrived), (of(0).ended, one.ended));
        } else {
            assert_eq!((one.arrived, two.arrived), (Micros(1_000), Micros(2_000)));
        }
    }
}
