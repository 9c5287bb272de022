//! One simulated run: a trace, a fleet, a way to schedule. All that `scls-router simulate`, the Python module and the figures
//! do is made of these.

use router_core::{BlockSize, Commit, Guarding, Micros, Mode, PolicyName};

use crate::device::Device;
use crate::random::{Random, mix};
use crate::served::Record;
use crate::timing::Noise;
use crate::trace::Trace;

/// Whether a conversation's turns wait for one another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sessions {
    /// A turn starts no earlier than the previous one's end.
    #[default]
    Closed,
    /// Every turn at its time: a stress test.
    Open,
}

/// How requests are served.
#[derive(Clone, Debug)]
pub enum System {
    /// Iteration-level engines (as vLLM v1) behind the core's `Router`.
    Continuous {
        /// A name of the core or of [`crate::rival`], with `@` and its weight where it has one.
        policy: String,
        /// What a decision moves.
        commit: Commit,
        /// The core's hotspot guard.
        guard: Guarding,
    },
    /// The same engines and router, but decisions move nothing: Q and b are what engines said last. It shows what committing
    /// them is for.
    Uncommitted {
        /// As above.
        policy: String,
    },
    /// Slice workers behind the core's `Scheduler`.
    Scheduled {
        /// Ours, iteration level, or a step of the paper's ladder.
        mode: Mode,
        /// For modes that place.
        policy: PolicyName,
        /// A fixed S; `None`: measured.
        slice_len: Option<u32>,
    },
}

/// The workers.
#[derive(Clone, Debug)]
pub struct Fleet {
    /// How many, at least one.
    pub workers: u32,
    /// Of which kind.
    pub device: Device,
    /// How much slower than the device each is, by slot, repeated; empty: none.
    pub slow: Vec<f64>,
    /// Of their iterations; each worker has a stream of its own. Its bias is the sigma of what each worker draws for its
    /// own: see [`Fleet::noise_of`].
    pub noise: Noise,
    /// How late what a worker says reaches the router.
    pub delay: Micros,
    /// Workers that vanish, and when; their rows go elsewhere.
    pub lost: Vec<(Micros, u32)>,
    /// Workers that join, and when.
    pub joined: Vec<Micros>,
}

impl Fleet {
    /// Of the worker in this slot, by the run's seed: its bias is drawn once, and how slow it is added.
    pub fn noise_of(&self, slot: u32, seed: u64) -> Noise {
        let Noise { sigma, bias, seed: own } = self.noise;
        let seed = mix(seed ^ mix(own ^ mix(u64::from(slot) + 1)));
        // drawn of another stream, so that iterations are as they would be without it
        let drawn = if bias > 0.0 { bias * Random::new(!seed).normal() } else { 0.0 };
        let factor = self.slow.get(slot as usize % self.slow.len().max(1)).copied().filter(|factor| *factor > 0.0);
        Noise { sigma, bias: drawn + factor.map_or(0.0, f64::ln), seed }
    }
}

/// What is run.
#[derive(Clone, Debug)]
pub struct Run<'a> {
    /// The requests, scaled as wanted.
    pub trace: &'a Trace,
    /// The workers.
    pub fleet: Fleet,
    /// How they serve.
    pub system: System,
    /// Whether turns wait.
    pub sessions: Sessions,
    /// Most output tokens, which every request announces.
    pub limit: u32,
    /// Of all that is drawn.
    pub seed: u64,
    /// It is over at this time, whatever is left.
    pub until: Micros,
    /// Between two samples of all workers.
    pub sample_every: Micros,
}

impl Run<'_> {
    /// Tokens of a KV block: the trace's, else 16 as engines have it.
    pub fn block_size(&self) -> BlockSize {
        const USUAL: BlockSize = BlockSize::new(16).expect("not zero");
        self.trace.block_size.unwrap_or(USUAL)
    }
}

/// Why a run cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RunError {
    /// There is nobody to serve.
    #[error("a fleet needs at least one worker")]
    NoWorkers,
    /// A policy that nobody has.
    #[error("no such policy: {name}\n{nearest}")]
    UnknownPolicy {
        /// What was asked for.
        name: String,
        /// The nearest, or all.
        nearest: String,
    },
    /// A weight that a policy does not take.
    #[error("{0}")]
    Weight(String),
    /// Only a system with a router makes decisions that can be followed.
    #[error("slice workers are not routed to\nfollow a run of iteration-level engines")]
    NotRouted,
    /// A request that no worker of the fleet can hold.
    #[error("{0}")]
    Unservable(String),
}

/// Runs it. `progress` is told the share that is done, now and then; `false` ends the run early.
pub fn run(run: &Run<'_>, progress: &mut dyn FnMut(f64) -> bool) -> Result<Record, RunError> {
    match run.system {
        System::Continuous { .. } | System::Uncommitted { .. } => crate::fleet::run(run, progress),
        System::Scheduled { .. } => crate::scheduled::run(run, progress),
    }
}

#[cfg(test)]
mod tests {
    use router_core::PolicyName;

    use super::*;
    use crate::trace::TraceRequest;
    use crate::{Served, WorkerOutcome};

    fn fleet(noise: Noise, workers: u32) -> Fleet {
        let device = Device::named("13b-a100").expect("it is there");
        let (slow, lost, joined) = (Vec::new(), Vec::new(), Vec::new());
        Fleet { workers, device, slow, noise, delay: Micros::ZERO, lost, joined }
    }

    #[test]
    fn each_worker_draws_its_own_bias() {
        let noise = Noise { sigma: 0.0, bias: 0.3, seed: 1 };
        let biased = fleet(noise, 1);
        let drawn: Vec<f64> = (0..4000).map(|slot| biased.noise_of(slot, 1).bias).collect();
        let mean = drawn.iter().sum::<f64>() / 4000.0;
        let sigma = (drawn.iter().map(|bias| (bias - mean).powi(2)).sum::<f64>() / 4000.0).sqrt();
        assert!(mean.abs() < 0.02 && (sigma - 0.3).abs() < 0.02, "{mean} {sigma}");
        let again = biased.noise_of(7, 1);
        assert!(again.bias.to_bits() == drawn[7].to_bits() && again.seed == biased.noise_of(7, 1).seed);
        assert!(biased.noise_of(7, 2).bias.to_bits() != drawn[7].to_bits(), "another run has other workers");
        let slow = Fleet { slow: vec![1.0, 2.0], ..fleet(Noise::default(), 2) };
        let logs = [0, 1, 2].map(|slot| slow.noise_of(slot, 1).bias.to_bits());
        assert_eq!(logs, [0.0, 2f64.ln(), 0.0].map(f64::to_bits));
    }

    /// One request a worker, alone there, so that its time is the worker's alone; and what its devices waited for.
    fn alone(system: System, bias: f64) -> (Vec<Served>, Vec<WorkerOutcome>) {
        let one = |_| TraceRequest {
            at: Micros::ZERO,
            input: 64,
            output: 40,
            chain: (0, 0),
            session: None,
            turn: 0,
            class: 0,
        };
        let trace = Trace { requests: (0..4).map(one).collect(), ..Trace::default() };
        let fleet = fleet(Noise { bias, ..Noise::default() }, 4);
        let (until, sample_every) = (Micros(u64::MAX), Micros::ZERO);
        let asked =
            Run { trace: &trace, fleet, system, sessions: Sessions::Closed, limit: 64, seed: 3, until, sample_every };
        let record = run(&asked, &mut |_| true).expect("it runs");
        (record.served, record.workers)
    }

    #[test]
    fn both_systems_have_the_same_workers_and_count_the_host() {
        let continuous =
            || System::Continuous { policy: "least_requests".into(), commit: Commit::Prefixes, guard: Guarding::Off };
        let slice = || System::Scheduled { mode: Mode::Slice, policy: PolicyName::LeastRequests, slice_len: Some(16) };
        for system in [continuous, slice] as [fn() -> System; 2] {
            let took = |bias| {
                let (served, _) = alone(system(), bias);
                let mut took: Vec<(u32, u64)> =
                    served.iter().map(|one| (one.worker, one.ended.saturating_sub(one.arrived).0)).collect();
                took.sort_unstable();
                took
            };
            let (even, biased) = (took(0.0), took(0.5));
            assert!(even.iter().all(|one| one.1 == even[0].1), "{even:?}");
            let fleet = fleet(Noise { bias: 0.5, ..Noise::default() }, 4);
            for ((worker, plain), (_, took)) in even.iter().zip(&biased) {
                let factor = fleet.noise_of(*worker, 3).bias.exp();
                let seen = *took as f64 / *plain as f64;
                // what the host and the link take is not the device's
                assert!(
                    (seen - 1.0).signum() == (factor - 1.0).signum() && seen > factor.min(1.0) * 0.9,
                    "{seen} {factor}"
                );
            }
        }
        let device = Device::named("13b-a100").expect("it is there");
        let (_, workers) = alone(continuous(), 0.0);
        // a prefill, which draws the first token, and 39 steps
        assert!(workers.iter().all(|worker| worker.host.0 == 40 * device.host.0));
        let (_, workers) = alone(slice(), 0.0);
        let quiet = device.host.0.min(crate::Host::REPLAY.0);
        for worker in workers {
            assert_eq!(worker.host.0, device.host.0 + 39 * quiet + worker.slices * device.start.0);
        }
    }
}
