//! The steps from sequence level to slices (arXiv 2406.13511, ablation), at saturation: what each brings, in virtual time.
//!
//! The pooled modes run on workers that pad, ours and iteration level on workers that pack; the device is the same.

use router_core::{
    BlockHash, BlockSize, Blocks, Config, Epoch, Layout, Micros, Mode, ModelSpec, NewRequest, PolicyName, RequestId,
    Tokens, WorkerSpec,
};

use crate::driver::Simulation;
use crate::lengths::{Lengths, synthetic};
use crate::outcome::{Outcome, RowOutcome};
use crate::random::Random;
use crate::timing::{Host, Norm, Pace};

const VOCAB: u32 = 32_000;
/// The limit that every request announces.
const LIMIT: u64 = 1024;
const BLOCK: u64 = 16;
/// A padded worker's memory is used up to this part: it has no blocks to fill the gaps with.
const ZETA: f64 = 0.9;
/// Host time of an iteration, and of a slice start: published figures of engines lie between 0.3 and 3 ms.
const HOST: Micros = Micros(1_000);
const START: Micros = Micros(2_000);
const LINK: Micros = Micros(200);
/// Offered beyond what a mode can serve, so that it is saturated but its queue does not decide for it.
const OVERLOAD: f64 = 1.15;
/// It keeps up where it serves this part of what is offered; then so much more is offered. Two offers this near are one.
const KEEPS_UP: f64 = 0.96;
const MORE: f64 = 1.3;
const NEAR: f64 = 0.05;
const TRIALS: u32 = 6;
/// First guess of what a mode can serve, requests a second and worker.
const GUESS: f64 = 7.0;

/// What is run.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Workers.
    pub workers: u32,
    /// Of arrivals, in virtual time.
    pub seconds: f64,
    /// Of lengths, arrivals and prompts.
    pub seed: u64,
    /// Distribution of lengths.
    pub lengths: Lengths,
}

/// A mode's figures.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    /// Requests offered a second.
    pub offered: f64,
    /// Requests finished a second, in the last three quarters of the run.
    pub throughput: f64,
    /// Tokens drawn a second, in the same time.
    pub tokens: f64,
    /// Rows of a slice, mean.
    pub rows: f64,
    /// Slices of a finished request, mean.
    pub slices: f64,
    /// Padding, of all that was computed.
    pub pad: f64,
    /// Tokens computed after the end of their row, of all that was computed.
    pub invalid: f64,
    /// Tokens computed again, of all that was computed.
    pub again: f64,
    /// Time with nothing to run and of slice starts, of all time.
    pub idle: f64,
    /// Mean and 95th percentile of the time to the first token, seconds.
    pub ttft: [f64; 2],
    /// Mean and 95th percentile from arrival to end, seconds.
    pub latency: [f64; 2],
}

/// The mode at saturation: offered a little more than it serves, which is found by trying.
pub fn at_saturation(mode: Mode, setup: &Setup) -> Figures {
    let mut offered = GUESS * f64::from(setup.workers);
    let trial = Setup { seconds: setup.seconds * 0.4, ..*setup };
    for _ in 0..TRIALS {
        let served = figures(&run(mode, &trial, offered, false), offered, trial.seconds).throughput;
        let next = if served > KEEPS_UP * offered { MORE * offered } else { OVERLOAD * served.max(0.1) };
        if (next / offered - 1.0).abs() < NEAR {
            break;
        }
        offered = next;
    }
    figures(&run(mode, setup, offered, false), offered, setup.seconds)
}

/// Standard deviation of the times at which the workers run dry, seconds, after `offered` requests a second have ended to come.
pub fn spread(mode: Mode, setup: &Setup, offered: f64) -> f64 {
    let out = run(mode, setup, offered, true);
    let times: Vec<f64> = out.workers.values().map(|worker| seconds(worker.completed)).collect();
    let mean = times.iter().sum::<f64>() / times.len().max(1) as f64;
    (times.iter().map(|time| (time - mean).powi(2)).sum::<f64>() / times.len().max(1) as f64).sqrt()
}

fn seconds(time: Micros) -> f64 {
    time.0 as f64 * 1e-6
}

/// A worker of the mode's kind, and its pace.
fn worker(mode: Mode) -> (WorkerSpec, Pace) {
    let (norm, host) = (Norm::llama_13b_a100(), Host::every(HOST));
    let (layout, part, start) = match mode {
        Mode::Pooled(_) => (Layout::Padded, ZETA, START),
        Mode::Slice => (Layout::Paged, 1.0, START),
        // an iteration's host time is all that a plan an iteration costs
        Mode::Ils => (Layout::Paged, 1.0, Micros::ZERO),
    };
    let chunk = 2048;
    let blocks = (Norm::LLAMA_13B_A100_KV as f64 * part / BLOCK as f64) as u64;
    let spec = WorkerSpec {
        name: "13b-a100".into(),
        epoch: Epoch(1),
        model: model(),
        blocks: Blocks(blocks),
        max_rows: 256,
        max_context: Tokens(8192),
        chunk: Tokens(chunk.into()),
        layout,
        cost: Some(norm.linear(layout, host)),
    };
    (spec, Pace::norm(norm, chunk, start).with_host(host))
}

fn model() -> ModelSpec {
    let block_size = BlockSize::new(BLOCK as u32).expect("not zero");
    ModelSpec { digest: "llama-2-13b".into(), tokenizer: "none".into(), block_size, vocab: VOCAB }
}

fn run(mode: Mode, setup: &Setup, offered: f64, drain: bool) -> Outcome {
    let config =
        Config { policy: PolicyName::Product, mode, slice_len: None, seed: setup.seed, max_rows: usize::MAX >> 1 };
    let mut sim = Simulation::new(model(), config, LINK).cheap(32);
    let (spec, pace) = worker(mode);
    for _ in 0..setup.workers {
        sim.join(Micros::ZERO, spec.clone(), pace);
    }
    let mut ids = Random::new(setup.seed ^ 0x1D5);
    for (number, sample) in synthetic(setup.lengths, offered, setup.seconds, setup.seed).into_iter().enumerate() {
        let request = NewRequest {
            id: RequestId(number as u64),
            prompt: (0..sample.prompt).map(|_| 3 + ids.below(u64::from(VOCAB) - 3) as u32).collect(),
            root: BlockHash(1),
            choices: 1,
            max_tokens: Tokens(LIMIT),
            urgent: false,
        };
        // workers answer hello first
        sim.arrive_ending(Micros(10_000) + sample.at, request, sample.output as u32);
    }
    let limit = if drain { Micros(u64::MAX >> 1) } else { Micros((setup.seconds * 1e6) as u64) };
    sim.run(limit);
    let out = sim.into_outcome();
    assert!(out.quarantined.is_empty() && out.refused.is_empty(), "{mode}: {:?} {:?}", out.quarantined, out.refused);
    out
}

fn figures(out: &Outcome, offered: f64, span: f64) -> Figures {
    let from = Micros((span * 0.25e6) as u64);
    let measured = span * 0.75;
    let ended = |row: &&RowOutcome| row.ends.first().is_some_and(|(at, _)| *at >= from);
    let finished: Vec<&RowOutcome> = out.rows.values().filter(ended).collect();
    let drawn: usize = out.rows.values().map(|row| row.times.iter().filter(|at| **at >= from).count()).sum();
    let of = |times: Vec<Micros>| -> [f64; 2] {
        let mut times: Vec<f64> = times.into_iter().map(seconds).collect();
        times.sort_by(f64::total_cmp);
        let mean = times.iter().sum::<f64>() / times.len().max(1) as f64;
        [mean, times.get(times.len() * 95 / 100).copied().unwrap_or_default()]
    };
    let all = out.total();
    let computed = (all.computed + all.pad + all.invalid).0.max(1) as f64;
    let slices: u32 = finished.iter().flat_map(|row| &row.ends).map(|(_, end)| end.slices).sum();
    Figures {
        offered,
        throughput: finished.len() as f64 / measured,
        tokens: drawn as f64 / measured,
        rows: all.row_slices as f64 / all.slices.max(1) as f64,
        slices: f64::from(slices) / finished.len().max(1) as f64,
        pad: all.pad.0 as f64 / computed,
        invalid: all.invalid.0 as f64 / computed,
        again: all.evicted.0 as f64 / computed,
        idle: seconds(all.idle) / seconds(all.idle + all.busy).max(f64::MIN_POSITIVE),
        ttft: of(finished.iter().filter_map(|row| row.ttft()).collect()),
        latency: of(finished.iter().filter_map(|row| row.latency()).collect()),
    }
}
