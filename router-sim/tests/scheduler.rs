//! The real scheduler against modelled workers: what must hold for every request, whatever happens.

mod common;

use common::{FOREVER, answer, check_drained, config, model, prompt, request, spec};
use proptest::prelude::*;
use router_core::{Config, FinishReason, Micros, PolicyName, Rejection, RequestId, Tokens, WorkerId};
use router_sim::{Simulation, Timing};

#[test]
fn two_hundred_streams_end_once_with_their_tokens() {
    for (slice, policy) in
        [(1, PolicyName::Product), (7, PolicyName::Product), (64, PolicyName::Random), (4096, PolicyName::RoundRobin)]
    {
        let mut sim = Simulation::new(model(), config(policy, slice), Micros(500));
        for _ in 0..2 {
            sim.join(Micros(0), spec(4096, 64), Timing::default());
        }
        let requests: Vec<_> =
            (0..200).map(|i| (prompt(i, 1 + (i as usize * 37) % 400), 1 + u64::from(i * 13) % 90)).collect();
        for (i, (prompt, max)) in requests.iter().enumerate() {
            sim.arrive(Micros(10_000 + i as u64 * 700), request(i as u64, prompt.clone(), *max));
        }
        let out = sim.run(FOREVER).clone();
        assert_eq!(out.ended(FinishReason::Length), 200);
        for (i, (prompt, max)) in requests.iter().enumerate() {
            let row = router_core::RowId { request: RequestId(i as u64), choice: 0 };
            assert_eq!(out.rows[&row].tokens, answer(prompt, *max), "S {slice} request {i}");
        }
        check_drained(&sim, &out);
        for decision in sim.decisions() {
            assert_eq!(decision.recompute(), Some(decision.worker), "{:?}", decision.id);
        }
    }
}

#[test]
fn with_memory_full_everything_still_finishes_and_no_batch_passes_its_blocks() {
    let mut sim = Simulation::new(model(), config(PolicyName::Product, 32), Micros(500));
    sim.join(Micros(0), spec(40, 8), Timing::default());
    for i in 0..60 {
        // the largest needs 599 positions: 38 of 40 blocks
        sim.arrive(Micros(10_000), request(i, prompt(i as u32, 100 + (i as usize * 53) % 400), 20 + i % 80));
    }
    let out = sim.run(FOREVER).clone();
    assert_eq!(out.ended(FinishReason::Length), 60);
    assert!(out.workers[&WorkerId(0)].peak <= 40);
    check_drained(&sim, &out);
}

#[test]
fn what_never_fits_is_refused_before_it_runs() {
    let mut sim = Simulation::new(model(), config(PolicyName::Product, 32), Micros(500));
    sim.join(Micros(0), spec(10, 8), Timing::default());
    sim.arrive(Micros(5_000), request(1, prompt(1, 100), 61));
    sim.arrive(Micros(5_000), request(2, prompt(1, 100), 62));
    let out = sim.run(FOREVER).clone();
    assert_eq!(out.ended(FinishReason::Length), 1);
    assert_eq!(out.rejected[&RequestId(2)], Rejection::NeverFits { needed: Tokens(162), most: Tokens(161) });
    check_drained(&sim, &out);
}

#[test]
fn without_workers_requests_are_rejected_and_too_many_are_told_when_to_come_back() {
    let mut sim = Simulation::new(model(), Config { max_rows: 3, ..config(PolicyName::Product, 8) }, Micros(500));
    sim.arrive(Micros(0), request(1, prompt(1, 10), 5));
    sim.join(Micros(10), spec(100, 8), Timing::default());
    (2..7).for_each(|i| sim.arrive(Micros(20_000), request(i, prompt(1, 10), 5)));
    let out = sim.run(FOREVER).clone();
    assert_eq!(out.rejected[&RequestId(1)], Rejection::NoWorker);
    assert!(matches!(out.rejected[&RequestId(6)], Rejection::Overloaded { .. }));
    assert_eq!(out.ended(FinishReason::Length), 3);
}

/// The standing plan: with a link of 10 ms a loaded worker is never without work.
#[test]
fn a_slow_link_costs_no_idle_time() {
    let mut sim = Simulation::new(model(), config(PolicyName::Product, 16), Micros(10_000));
    sim.join(Micros(0), spec(8192, 16), Timing::default());
    for i in 0..200u64 {
        sim.arrive(Micros(50_000), request(i, prompt(i as u32, 30 + (i as usize * 7) % 200), 10 + (i * 29) % 120));
    }
    let out = sim.run(FOREVER).clone();
    assert_eq!(out.ended(FinishReason::Length), 200);
    let worker = out.workers[&WorkerId(0)];
    assert!(worker.idle.0 * 100 < worker.busy.0, "idle {} of busy {}", worker.idle, worker.busy);
    check_drained(&sim, &out);
}

/// 16 conversations of 8 turns under one system prompt, two workers: at least 0.9 of what one infinite cache would hit.
#[test]
fn conversations_stay_where_their_blocks_are() {
    let mut sim = Simulation::new(model(), config(PolicyName::Product, 16), Micros(200));
    (0..2).for_each(|_| sim.join(Micros(0), spec(8192, 32), Timing::default()));
    let system = prompt(1, 1500);
    let (mut ideal, mut total, mut id) = (0u64, 0u64, 0);
    let mut seen_system = false;
    for turn in 0..8u64 {
        for conversation in 0..16u32 {
            let mut history = system.clone();
            for t in 0..=turn {
                history.extend(prompt(1000 * (conversation + 1) + t as u32, 60));
                if t < turn {
                    let reply = answer(&history, 40);
                    history.extend(reply);
                }
            }
            let before = if turn == 0 { if seen_system { 1500 } else { 0 } } else { history.len() as u64 - 60 };
            seen_system = true;
            ideal += before;
            total += history.len() as u64;
            id += 1;
            sim.arrive(Micros(10_000 + turn * 3_000_000 + u64::from(conversation) * 20_000), request(id, history, 40));
        }
    }
    let out = sim.run(FOREVER).clone();
    assert_eq!(out.ended(FinishReason::Length), 128);
    let ideal = ideal as f64 / total as f64;
    assert!(out.hit_ratio() >= 0.9 * ideal, "hit {} of ideal {ideal}", out.hit_ratio());
    assert!(out.workers.values().all(|w| w.slices > 0), "both workers served");
    check_drained(&sim, &out);
}

#[test]
fn rows_of_a_lost_worker_go_on_elsewhere_token_for_token() {
    let mut sim = Simulation::new(model(), config(PolicyName::Product, 16), Micros(300));
    (0..2).for_each(|_| sim.join(Micros(0), spec(4096, 64), Timing::default()));
    (0..40).for_each(|i| sim.arrive(Micros(10_000), request(i, prompt(i as u32, 80), 100)));
    sim.kill(Micros(300_000), WorkerId(1));
    let out = sim.run(FOREVER).clone();
    assert_eq!(out.ended(FinishReason::Length), 40);
    for i in 0..40 {
        let row = router_core::RowId { request: RequestId(i), choice: 0 };
        assert_eq!(out.rows[&row].tokens, answer(&prompt(i as u32, 80), 100));
    }
    check_drained(&sim, &out);
}

#[test]
fn with_the_last_worker_lost_every_row_ends_within_a_second() {
    let mut sim = Simulation::new(model(), config(PolicyName::Product, 16), Micros(300));
    sim.join(Micros(0), spec(4096, 64), Timing::default());
    (0..10).for_each(|i| sim.arrive(Micros(10_000), request(i, prompt(i as u32, 80), 100)));
    sim.kill(Micros(100_000), WorkerId(0));
    let out = sim.run(FOREVER).clone();
    assert_eq!(out.ended(FinishReason::Error), 10);
    assert!(out.end <= Micros(1_200_000), "{}", out.end);
    check_drained(&sim, &out);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    /// Anything at any time: arrivals, cancels, a kill, a drain, a late joiner, any S, memory barely enough.
    #[test]
    fn property_11_every_row_ends_once_and_nothing_is_left(
        rows in proptest::collection::vec((0u64..400_000, 1usize..300, 1u64..120, proptest::option::of(0u64..600_000)), 1..60),
        slice in prop_oneof![Just(1u32), 2u32..40, Just(500u32)],
        blocks in 27u64..200, max_rows in 1u32..20, delay in 0u64..8_000,
        kill in proptest::option::of(0u64..500_000), drain in proptest::option::of(0u64..500_000),
        policy in 0usize..5,
    ) {
        let mut sim = Simulation::new(model(), config(PolicyName::ALL[policy], slice), Micros(delay));
        (0..3).for_each(|_| sim.join(Micros(0), spec(blocks, max_rows), Timing::default()));
        sim.join(Micros(200_000), spec(blocks, max_rows), Timing::default());
        for (i, (at, len, max, cancel)) in rows.iter().enumerate() {
            sim.arrive(Micros(20_000 + at), request(i as u64, prompt(i as u32 % 5, *len), *max));
            if let Some(cancel) = cancel { sim.cancel(Micros(20_000 + cancel), RequestId(i as u64)); }
        }
        if let Some(at) = kill { sim.kill(Micros(at), WorkerId(1)); }
        if let Some(at) = drain { sim.drain(Micros(at), WorkerId(0)); }
        let out = sim.run(FOREVER).clone();
        prop_assert_eq!(out.ended(FinishReason::Error), 0);
        for (i, (_, len, max, cancel)) in rows.iter().enumerate() {
            let row = router_core::RowId { request: RequestId(i as u64), choice: 0 };
            prop_assert!(out.rejected.is_empty(), "{:?}", out.rejected);
            let Some(outcome) = out.rows.get(&row) else { panic!("{row} vanished") };
            let want = answer(&prompt(i as u32 % 5, *len), *max);
            prop_assert!(want.starts_with(&outcome.tokens));
            prop_assert!(cancel.is_some() || outcome.tokens.len() == want.len());
        }
        for load in out.workers.values() { prop_assert!(load.peak <= blocks); }
        check_drained(&sim, &out);
        for decision in sim.decisions() { prop_assert_eq!(decision.recompute(), Some(decision.worker)); }
    }
}

/// Ten thousand waiting rows cost each slice end no more than a few do.
#[test]
fn a_long_queue_is_served_to_its_end() {
    let mut sim = Simulation::new(model(), config(PolicyName::Product, 16), Micros(500));
    (0..4).for_each(|_| sim.join(Micros(0), spec(4096, 64), Timing::default()));
    for i in 0..9_999u64 {
        sim.arrive(Micros(10_000 + i), request(i, prompt(i as u32 % 7, 30), 8 + i % 40));
    }
    let out = sim.run(FOREVER).clone();
    assert_eq!(out.ended(FinishReason::Length), 9_999);
    check_drained(&sim, &out);
}

/// A drain while plans are in flight, and cancels around it: no row runs twice, none is left on a worker.
#[test]
fn a_drain_leaves_no_ghosts() {
    for (drain, cancel) in (0..40).flat_map(|d| (0..4).map(move |c| (100_000 + d * 2_000, d * 2_000 + c * 9_000))) {
        let mut sim = Simulation::new(model(), config(PolicyName::Product, 8), Micros(5_000));
        (0..2).for_each(|_| sim.join(Micros(0), spec(64, 8), Timing::default()));
        for i in 0..12u64 {
            sim.arrive(Micros(50_000 + i * 9_000), request(i, prompt(i as u32, 40), 30));
        }
        sim.drain(Micros(drain), WorkerId(0));
        (0..12).step_by(3).for_each(|i| sim.cancel(Micros(100_000 + cancel + i * 3_000), RequestId(i)));
        let out = sim.run(FOREVER).clone();
        assert_eq!(out.ended(FinishReason::Error), 0, "drain {drain} cancel {cancel}");
        check_drained(&sim, &out);
    }
}

/// A worker with half the blocks it announces: batches are halved until they fit, and everything ends.
#[test]
fn a_worker_that_announces_too_much_still_finishes_its_rows() {
    let mut sim = Simulation::new(model(), config(PolicyName::Product, 16), Micros(2_000));
    sim.join_as(Micros(0), spec(128, 32), spec(64, 32), Timing::default());
    (0..40).for_each(|i| sim.arrive(Micros(20_000 + i * 3_000), request(i, prompt(i as u32, 100), 40)));
    let out = sim.run(FOREVER).clone();
    assert_eq!((out.ended(FinishReason::Length), out.quarantined.len()), (40, 0), "{:?}", out.quarantined);
    assert!(!out.refused.is_empty());
    assert!(out.refused.len() < 1_000, "no loop: {}", out.refused.len());
}
