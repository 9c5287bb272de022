//! The paper's modes behind the real scheduler: every row ends once with its tokens, whatever happens, and nothing is left.

mod common;

use common::{FOREVER, answer, check_drained, model, prompt, request, spec};
use proptest::prelude::*;
use router_core::{
    Config, FinishReason, Layout, Micros, Mode, PolicyName, Pooled, RequestId, RowId, WorkerId, WorkerSpec,
};
use router_sim::{Simulation, Timing};

const MODES: [Pooled; 6] = [Pooled::sls(), Pooled::so(), Pooled::pm(), Pooled::ab(), Pooled::lb(), Pooled::scls()];

fn padded(blocks: u64, max_rows: u32) -> WorkerSpec {
    WorkerSpec { layout: Layout::Padded, ..spec(blocks, max_rows) }
}

fn config(mode: Mode, slice_len: Option<u32>) -> Config {
    Config { policy: PolicyName::Product, mode, slice_len, seed: 7, max_rows: 10_000 }
}

fn row(request: u64) -> RowId {
    RowId { request: RequestId(request), choice: 0 }
}

#[test]
fn two_hundred_rows_end_once_with_their_tokens_in_every_mode() {
    for mode in MODES {
        for (slice_len, spec) in [(None, spec(4096, 64)), (Some(1), spec(600, 64)), (Some(7), padded(600, 20))] {
            let mut sim = Simulation::new(model(), config(Mode::Pooled(mode), slice_len), Micros(500));
            (0..3).for_each(|_| sim.join(Micros(0), spec.clone(), Timing::default()));
            let requests: Vec<_> =
                (0..200).map(|i| (prompt(i, 1 + (i as usize * 37) % 400), 1 + u64::from(i * 13) % 60)).collect();
            for (i, (prompt, max)) in requests.iter().enumerate() {
                sim.arrive(Micros(10_000 + i as u64 * 20_000), request(i as u64, prompt.clone(), *max));
            }
            let out = sim.run(FOREVER).clone();
            assert_eq!(out.ended(FinishReason::Length), 200, "{}", mode.name);
            for (i, (prompt, max)) in requests.iter().enumerate() {
                assert_eq!(out.rows[&row(i as u64)].tokens, answer(prompt, *max), "{} request {i}", mode.name);
            }
            let slices: Vec<u64> = out.workers.values().map(|w| w.slices).collect();
            assert!(slices.iter().all(|n| *n > 0), "{} {slice_len:?}: {slices:?}", mode.name);
            check_drained(&sim, &out);
        }
    }
}

/// The last worker of a pool drains while rows wait for a round: they end there, and none is given up.
#[test]
fn draining_the_only_worker_lets_its_rows_finish() {
    for mode in MODES {
        let mut sim = Simulation::new(model(), config(Mode::Pooled(mode), Some(8)), Micros(500));
        sim.join(Micros(0), spec(400, 8), Timing::default());
        (0..30).for_each(|i| sim.arrive(Micros(10_000 + i * 1_000), request(i, prompt(i as u32, 50), 40)));
        sim.drain(Micros(50_000), WorkerId(0));
        let out = sim.run(FOREVER).clone();
        assert_eq!(out.ended(FinishReason::Length), 30, "{}", mode.name);
        check_drained(&sim, &out);
    }
}

#[test]
fn with_the_last_worker_lost_every_row_ends_within_a_second() {
    for mode in MODES {
        let mut sim = Simulation::new(model(), config(Mode::Pooled(mode), None), Micros(300));
        sim.join(Micros(0), spec(4096, 64), Timing::default());
        (0..40).for_each(|i| sim.arrive(Micros(10_000), request(i, prompt(i as u32, 80), 100)));
        sim.kill(Micros(100_000), WorkerId(0));
        let out = sim.run(FOREVER).clone();
        assert_eq!(out.ended(FinishReason::Error), 40, "{}", mode.name);
        assert!(out.rows.values().all(|row| row.ends[0].0 <= Micros(1_200_000)), "{}", mode.name);
        check_drained(&sim, &out);
    }
}

/// A worker comes after the others are gone: what waits is not left to a tick of the time before.
#[test]
fn rows_of_lost_workers_go_on_where_one_comes_in_time() {
    for mode in MODES {
        let mut sim = Simulation::new(model(), config(Mode::Pooled(mode), Some(16)), Micros(300));
        (0..2).for_each(|_| sim.join(Micros(0), spec(4096, 64), Timing::default()));
        (0..40).for_each(|i| sim.arrive(Micros(10_000), request(i, prompt(i as u32, 80), 100)));
        sim.kill(Micros(100_000), WorkerId(0));
        sim.kill(Micros(110_000), WorkerId(1));
        sim.join(Micros(400_000), spec(4096, 64), Timing::default());
        let out = sim.run(FOREVER).clone();
        assert_eq!(out.ended(FinishReason::Length), 40, "{}", mode.name);
        for i in 0..40 {
            assert_eq!(out.rows[&row(i)].tokens, answer(&prompt(i as u32, 80), 100), "{}", mode.name);
        }
        check_drained(&sim, &out);
    }
}

/// Workers of two sizes: the rows that fit the large one alone run there, the others on both.
#[test]
fn large_rows_go_to_large_workers() {
    for mode in MODES {
        let mut sim = Simulation::new(model(), config(Mode::Pooled(mode), Some(16)), Micros(300));
        sim.join(Micros(0), spec(16, 4), Timing::default());
        sim.join(Micros(0), spec(200, 16), Timing::default());
        for i in 0..60 {
            let len = if i % 4 == 0 { 500 } else { 60 };
            sim.arrive(Micros(10_000 + i * 500), request(i, prompt(i as u32, len), 40));
        }
        let out = sim.run(FOREVER).clone();
        assert_eq!(out.ended(FinishReason::Length), 60, "{}", mode.name);
        assert!(out.workers.values().all(|w| w.slices > 0), "{}", mode.name);
        assert!(out.workers[&WorkerId(0)].peak <= 16);
        check_drained(&sim, &out);
    }
}

/// A worker with half the blocks it announces: batches are halved until they fit, and everything ends.
#[test]
fn a_worker_that_announces_too_much_still_finishes_its_rows() {
    for mode in MODES {
        let mut sim = Simulation::new(model(), config(Mode::Pooled(mode), Some(16)), Micros(2_000));
        sim.join_as(Micros(0), spec(128, 32), spec(64, 32), Timing::default());
        (0..40).for_each(|i| sim.arrive(Micros(20_000 + i * 3_000), request(i, prompt(i as u32, 100), 40)));
        let out = sim.run(FOREVER).clone();
        let ended = (out.ended(FinishReason::Length), out.quarantined.len());
        assert_eq!(ended, (40, 0), "{}: {:?}", mode.name, out.quarantined);
        assert!(!out.refused.is_empty() && out.refused.len() < 1_000, "{}: {}", mode.name, out.refused.len());
    }
}

/// Sequence level runs a batch to its last row; slices end sooner and wait for a tick. With many rows waiting, batches
/// of like length that the least loaded worker takes are done first.
#[test]
fn the_paper_s_steps_shorten_a_long_queue() {
    let mut ends = Vec::new();
    for mode in MODES {
        let mut sim = Simulation::new(model(), config(Mode::Pooled(mode), None), Micros(300));
        (0..4).for_each(|_| sim.join(Micros(0), padded(2_000, 64), Timing::default()));
        for i in 0..1_000u64 {
            let (len, max) = (5 + (i as usize * 7919) % 300, 1 + (i * 104_729) % 400);
            sim.arrive(Micros(10_000 + i * 2_000), request(i, prompt(i as u32, len), max));
        }
        let out = sim.run(FOREVER).clone();
        assert_eq!(out.ended(FinishReason::Length), 1_000, "{}", mode.name);
        check_drained(&sim, &out);
        ends.push((mode.name, out.rows.values().map(|row| row.ends[0].0.0).max().unwrap_or(0)));
    }
    let of = |name| ends.iter().find(|(mode, _)| *mode == name).map_or(0, |(_, end)| *end);
    assert!(of("scls") < of("sls") && of("ab") < of("so"), "{ends:?}");
}

/// Many with `SCLS_SOAK` in the environment.
fn cases() -> u32 {
    if std::env::var_os("SCLS_SOAK").is_some() { 20_000 } else { 100 }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]
    /// Anything at any time: arrivals, cancels, a kill, a drain, a late joiner, any S, memory barely enough.
    #[test]
    fn property_11_every_row_ends_once_and_nothing_is_left(
        rows in proptest::collection::vec((0u64..900_000, 1usize..300, 1u64..120, proptest::option::of(0u64..2_000_000)), 1..60),
        slice in prop_oneof![Just(None), Just(Some(1u32)), (2u32..40).prop_map(Some), Just(Some(5_000))],
        blocks in 27u64..200, small in 27u64..200, max_rows in 1u32..20, delay in 0u64..8_000,
        kill in proptest::option::of(0u64..1_500_000), drain in proptest::option::of(0u64..1_500_000),
        mode in 0usize..7, pads in any::<bool>(),
    ) {
        // the seventh: rows stay, on workers that pad
        let mode = MODES.get(mode).map_or(Mode::Slice, |mode| Mode::Pooled(*mode));
        let pads = pads || mode == Mode::Slice;
        let spec = |blocks| if pads { padded(blocks, max_rows) } else { spec(blocks, max_rows) };
        let mut sim = Simulation::new(model(), config(mode, slice), Micros(delay));
        (0..2).for_each(|_| sim.join(Micros(0), spec(blocks), Timing::default()));
        sim.join(Micros(0), spec(small), Timing::default());
        sim.join(Micros(200_000), spec(blocks), Timing::default());
        for (i, (at, len, max, cancel)) in rows.iter().enumerate() {
            sim.arrive(Micros(20_000 + at), request(i as u64, prompt(i as u32 % 5, *len), *max));
            if let Some(cancel) = cancel { sim.cancel(Micros(20_000 + cancel), RequestId(i as u64)); }
        }
        if let Some(at) = kill { sim.kill(Micros(at), WorkerId(1)); }
        if let Some(at) = drain { sim.drain(Micros(at), WorkerId(0)); }
        let out = sim.run(FOREVER).clone();
        prop_assert_eq!(out.ended(FinishReason::Error), 0);
        prop_assert!(out.rejected.is_empty(), "{:?}", out.rejected);
        for (i, (_, len, max, cancel)) in rows.iter().enumerate() {
            let want = answer(&prompt(i as u32 % 5, *len), *max);
            let Some(outcome) = out.rows.get(&row(i as u64)) else { panic!("{i} vanished") };
            prop_assert!(want.starts_with(&outcome.tokens));
            prop_assert!(cancel.is_some() || outcome.tokens.len() == want.len());
        }
        for (id, load) in &out.workers {
            let most = if id.0 == 2 { small } else { blocks };
            prop_assert!(load.peak <= most, "{id}: {} of {most}", load.peak);
        }
        check_drained(&sim, &out);
    }
}

/// Ten thousand waiting rows cost a round what they must and a batch's end no more.
#[test]
fn a_long_queue_is_served_to_its_end() {
    for mode in [Pooled::sls(), Pooled::scls()] {
        let mut sim = Simulation::new(model(), config(Mode::Pooled(mode), None), Micros(500));
        (0..4).for_each(|_| sim.join(Micros(0), padded(4096, 64), Timing::default()));
        for i in 0..9_999u64 {
            sim.arrive(Micros(10_000 + i), request(i, prompt(i as u32 % 7, 30), 8 + i % 40));
        }
        let out = sim.run(FOREVER).clone();
        assert_eq!(out.ended(FinishReason::Length), 9_999, "{}", mode.name);
        check_drained(&sim, &out);
    }
}
