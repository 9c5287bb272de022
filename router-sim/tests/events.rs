//! Exactness under anything: whatever arrives, goes away, is cut, late or lost, each row has the tokens it would have alone,
//! ends once, and leaves nothing behind.
//!
//! A sequence of events is a function of its seed. A failure prints it; `SCLS_SEED=... cargo test -p router-sim --test events`
//! runs that one alone. `SCLS_SOAK=1` runs many more.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use common::{FOREVER, check_drained, model, spec};
use router_core::{
    Config, Epoch, FinishReason, Layout, Micros, Mode, NewRequest, PolicyName, RequestId, RowId, Tokens, WorkerId,
    WorkerSpec,
};
use router_sim::{Chaos, Noise, Outcome, Pace, Random, Simulation, Timing};

const SEQUENCES: u64 = 1_500;
const SOAK: u64 = 100_000;
/// Things that happen in one sequence: some thousand; more than this is a loop.
const MOST: u64 = 300_000;
/// By now the first workers are ready, however late their messages.
const EARLIEST: Micros = Micros(100_000);

struct Arrival {
    at: Micros,
    /// Prompts of the same name have the same beginning.
    name: u32,
    len: usize,
    max: u64,
    /// Ends by itself here, which the scheduler does not know.
    eos: Option<u32>,
    choices: u32,
    urgent: bool,
    cancel: Option<Micros>,
}

struct Case {
    config: Config,
    delay: Micros,
    chaos: Chaos,
    joins: Vec<(Micros, WorkerSpec, Pace)>,
    kills: Vec<(Micros, WorkerId)>,
    drain: Option<(Micros, WorkerId)>,
    arrivals: Vec<Arrival>,
}

fn pick<T: Copy>(random: &mut Random, of: &[T]) -> T {
    of[random.below(of.len() as u64) as usize]
}

fn sometimes<T>(random: &mut Random, probability: f64, what: impl FnOnce(&mut Random) -> T) -> Option<T> {
    random.chance(probability).then(|| what(random))
}

fn below_mostly(random: &mut Random, often: u64, seldom: u64) -> u64 {
    let most = if random.chance(0.8) { often } else { seldom };
    random.below(most)
}

fn arrival(random: &mut Random, at: Micros) -> Arrival {
    let max = 1 + below_mostly(random, 40, 120);
    Arrival {
        at,
        name: random.below(5) as u32,
        len: 1 + below_mostly(random, 60, 300) as usize,
        max,
        eos: sometimes(random, 0.5, |random| 1 + random.below(max) as u32),
        choices: 1 + below_mostly(random, 1, 3) as u32,
        urgent: random.chance(0.1),
        cancel: sometimes(random, 0.2, |random| at + Micros(random.below(400_000))),
    }
}

impl Case {
    fn new(random: &mut Random) -> Self {
        let (mode, layout) = (pick(random, &Mode::ALL), pick(random, &[Layout::Paged, Layout::Padded]));
        // where KV is dropped with every batch, rows whose prompts are never done would be cut for ever
        let keeps = layout == Layout::Paged && !matches!(mode, Mode::Pooled(_));
        let slice_len = match random.below(4) {
            0 => Some(1),
            1 => None,
            2 => Some(500),
            _ => Some(2 + random.below(38) as u32),
        };
        let seed = random.next();
        let config = Config { policy: pick(random, &PolicyName::ALL), mode, slice_len, seed, max_rows: 10_000 };
        // the largest row needs 419 positions: 27 blocks
        let (blocks, max_rows) = (27 + random.below(150), 1 + random.below(20) as u32);
        let timing =
            Timing { chunk_tokens: pick(random, if keeps { &[16, 64, 512] } else { &[512] }), ..Timing::default() };
        let sigma = pick(random, &[0.0, 0.06]);
        let announces = random.chance(0.5);
        let worker = |random: &mut Random, at: Micros| {
            let noise = Noise { sigma, bias: sigma * random.normal(), seed: random.next() };
            let cost = timing.cost_model_of(layout).filter(|_| announces);
            let chunk = Tokens(timing.chunk_tokens.into());
            let spec = WorkerSpec { epoch: Epoch(1), chunk, layout, cost, ..spec(blocks, max_rows) };
            (at, spec, Pace::from(timing).with_noise(noise))
        };
        let count = 1 + random.below(4);
        let mut joins: Vec<_> = (0..count).map(|_| worker(random, Micros::ZERO)).collect();
        if random.chance(0.3) {
            let at = Micros(random.below(500_000));
            joins.push(worker(random, at));
        }
        // worker 0 always stays
        let kills = (1..count as u32).filter(|_| random.chance(0.15)).map(WorkerId).collect::<Vec<_>>();
        let kills = kills.into_iter().map(|id| (Micros(random.below(500_000)), id)).collect();
        let drain = sometimes(random, if count > 1 { 0.2 } else { 0.0 }, |random| {
            (Micros(random.below(500_000)), WorkerId(count as u32 - 1))
        });
        let span = pick(random, &[1, 50_000, 400_000]);
        let arrivals = (0..=random.below(30))
            .map(|_| {
                let at = EARLIEST + Micros(random.below(span));
                arrival(random, at)
            })
            .collect();
        Self {
            config,
            delay: Micros(pick(random, &[0, 100, 3_000, random.clone().below(30_000)])),
            chaos: Chaos {
                seed: random.next(),
                cut: pick(random, if keeps { &[0.0, 0.02, 0.3] } else { &[0.0, 0.02, 0.05] }),
                late: Micros(pick(random, &[0, 0, 500, 12_000])),
            },
            joins,
            kills,
            drain,
            arrivals,
        }
    }

    fn run(&self) -> (Simulation, Outcome) {
        let (setting, kills, drain) = ((self.config.mode, self.joins[0].1.layout), &self.kills, &self.drain);
        // seen only where the test fails
        println!("{setting:?}, {:?}, kills {kills:?}, drain {drain:?}, delay {}", self.chaos, self.delay);
        let mut sim = Simulation::new(model(), self.config.clone(), self.delay).with_chaos(self.chaos).with_most(MOST);
        for (at, spec, pace) in &self.joins {
            sim.join(*at, spec.clone(), *pace);
        }
        for (id, arrival) in self.arrivals.iter().enumerate() {
            let prompt = common::prompt(arrival.name, arrival.len).into();
            let id = RequestId(id as u64);
            let request = NewRequest {
                id,
                prompt,
                choices: arrival.choices,
                urgent: arrival.urgent,
                ..common::request(0, Vec::new(), arrival.max)
            };
            match arrival.eos {
                Some(length) => sim.arrive_ending(arrival.at, request, length),
                None => sim.arrive(arrival.at, request),
            }
            if let Some(at) = arrival.cancel {
                sim.cancel(at, id);
            }
        }
        for (at, worker) in &self.kills {
            sim.kill(*at, *worker);
        }
        if let Some((at, worker)) = self.drain {
            sim.drain(at, worker);
        }
        let out = sim.run(FOREVER).clone();
        (sim, out)
    }

    /// More arrivals, each so that the plan it makes reaches its worker about when an iteration ends there.
    fn at_the_last_moment(&mut self, random: &mut Random) {
        let (_, out) = self.run();
        let times: Vec<Micros> = out.rows.values().flat_map(|row| &row.times).copied().collect();
        for _ in 0..random.below(8).min(times.len() as u64) {
            // a token that is here now was drawn a delay ago, and a plan takes as long
            let there = pick(random, &times).saturating_sub(self.delay + self.delay);
            let at = Micros((there.0 + random.below(5)).saturating_sub(2)).max(EARLIEST);
            for _ in 0..=random.below(2) {
                self.arrivals.push(arrival(random, at));
            }
        }
    }

    fn check(&self) {
        let (sim, out) = self.run();
        assert!(out.refused.is_empty(), "{:?}", &out.refused[..out.refused.len().min(3)]);
        assert!(out.rejected.is_empty(), "{:?}", out.rejected);
        for (id, arrival) in self.arrivals.iter().enumerate() {
            let most = arrival.max.min(arrival.eos.map_or(u64::MAX, u64::from));
            let want = common::answer(&common::prompt(arrival.name, arrival.len), most);
            for choice in 0..arrival.choices {
                let row = RowId { request: RequestId(id as u64), choice };
                let Some(outcome) = out.rows.get(&row) else { panic!("{row} vanished") };
                assert!(want.starts_with(&outcome.tokens), "{row} has other tokens");
                let (_, end) = outcome.ends.first().expect("it ended");
                match end.reason {
                    FinishReason::Cancelled => assert!(arrival.cancel.is_some(), "{row} was cancelled"),
                    // a row that two lost workers had is taken for the cause
                    FinishReason::Error => assert!(self.kills.len() > 1, "{row}: {end:?}"),
                    FinishReason::Stop | FinishReason::Length => assert_eq!(outcome.tokens.len(), want.len(), "{row}"),
                }
            }
        }
        for (worker, outcome) in &out.workers {
            let (_, spec, _) = &self.joins[worker.0 as usize];
            assert!(outcome.peak <= spec.blocks.0, "{worker} used {} of {}", outcome.peak, spec.blocks);
        }
        check_drained(&sim, &out);
        assert_eq!(sim.unfinished(), 0, "rows in the scheduler");
        for decision in sim.decisions() {
            assert_eq!(decision.recompute(), Some(decision.worker), "{:?}", decision.id);
        }
    }
}

fn sequence(seed: u64) {
    let mut random = Random::new(seed);
    let mut case = Case::new(&mut random);
    if random.chance(0.4) {
        case.at_the_last_moment(&mut random);
    }
    case.check();
}

#[test]
fn property_10_and_11_whatever_happens_every_row_is_exact_ends_once_and_nothing_is_left() {
    if let Some(seed) = std::env::var("SCLS_SEED").ok().and_then(|seed| seed.parse().ok()) {
        return sequence(seed);
    }
    let count = if std::env::var_os("SCLS_SOAK").is_some() { SOAK } else { SEQUENCES };
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            scope.spawn(move || {
                for seed in (thread..count).step_by(threads as usize) {
                    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| sequence(seed))) {
                        eprintln!("rerun with SCLS_SEED={seed} cargo test -p router-sim --test events");
                        resume_unwind(panic);
                    }
                }
            });
        }
    });
}
