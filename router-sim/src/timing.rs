//! How long a modelled iteration takes: a law, what a slice start costs, and noise.

use router_core::{CostModel, Iteration, Layout, Micros, PaddedCost, PagedPrefill, PagedStep, micros};

use crate::random::Random;

/// Linear in what an iteration does.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Each iteration.
    pub step: Micros,
    /// More for each row that decodes in it.
    pub per_row: Micros,
    /// More for each prefill token, in nanoseconds.
    pub prefill_token_nanos: u64,
    /// Most prefill tokens of one iteration.
    pub chunk_tokens: u32,
}

impl Default for Timing {
    /// A small model on a CPU.
    fn default() -> Self {
        Self { step: Micros(4_000), per_row: Micros(50), prefill_token_nanos: 50_000, chunk_tokens: 512 }
    }
}

impl Timing {
    /// The same as a cost model, exactly; `None` where an iteration takes no time.
    pub fn cost_model(&self) -> Option<CostModel> {
        self.cost_model_of(Layout::Paged)
    }

    /// The same for a worker that pads: its prompts are one pass of as many tokens as the rectangle has cells.
    pub fn cost_model_of(&self, layout: Layout) -> Option<CostModel> {
        let any = self.step.0 + self.per_row.0 + self.prefill_token_nanos > 0;
        any.then(|| self.model(layout))
    }

    fn model(&self, layout: Layout) -> CostModel {
        let [constant, per_row] = [self.step, self.per_row].map(|time| time.0 as f64 * 1e-6);
        let per_token = self.prefill_token_nanos as f64 * 1e-9;
        match layout {
            Layout::Paged => CostModel::Paged {
                prefill: PagedPrefill { constant: 0.0, per_token, per_pair: 0.0 },
                step: PagedStep { constant, per_row, per_context: 0.0 },
            },
            Layout::Padded => {
                let step = PaddedCost { constant, per_row, ..PaddedCost::default() };
                CostModel::Padded { prefill: PaddedCost { per_cell: per_token, ..step }, step }
            }
        }
    }
}

/// What an iteration takes, and how surely.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// The iteration itself.
    pub law: Law,
    /// Most prefill tokens of one iteration. A rectangle's prompts are one pass, however many they are.
    pub chunk: u32,
    /// Exposed at every start of a slice: the device waits for it.
    pub start: Micros,
    /// What the host exposes in every iteration, beyond the law.
    pub host: Host,
    /// Factors on every iteration's law.
    pub noise: Noise,
}

/// Host time of an iteration that the device waits for, by what is in it. A worker measured as a whole has it in its law.
///
/// How kinds of workers pay the `h` of a device: an iteration-level engine plans every iteration ([`Host::every`]); a slice
/// worker only those that a prefill chunk rides in ([`Host::slices`]), and its start once a slice ([`Pace::start`]); the paper's
/// padded modes every iteration, and the start too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// With nothing but decoding rows.
    pub quiet: Micros,
    /// With prefill.
    pub chunk: Micros,
}

impl Host {
    /// What replaying a planned decode step costs whoever planned it: the simulation study's 0.1 ms.
    pub const REPLAY: Micros = Micros(100);

    /// `h` in every iteration.
    pub const fn every(h: Micros) -> Self {
        Self { quiet: h, chunk: h }
    }

    /// `h` in iterations with prefill, [`Host::REPLAY`] in others (never more than `h`).
    pub const fn slices(h: Micros) -> Self {
        let quiet = if h.0 < Self::REPLAY.0 { h } else { Self::REPLAY };
        Self { quiet, chunk: h }
    }

    /// In an iteration of so many prefill tokens.
    const fn of(self, prefill: u64) -> Micros {
        if prefill > 0 { self.chunk } else { self.quiet }
    }

    /// The same in seconds.
    fn seconds(self, prefill: u64) -> f64 {
        self.of(prefill).0 as f64 * 1e-6
    }
}

/// The time of an iteration without noise.
#[derive(Clone, Copy, Debug)]
pub enum Law {
    /// What the router believes in.
    Linear(CostModel),
    /// What devices do: reading weights and computing overlap.
    Norm(Norm),
}

impl Law {
    /// The model that a worker of this law announces to the router. A measured one has its own layout, whatever is asked.
    pub fn linear(&self, layout: Layout, host: Host) -> CostModel {
        let [quiet, chunk] = [host.seconds(0), host.seconds(1)];
        match self {
            Self::Linear(CostModel::Paged { prefill, step }) => CostModel::Paged {
                prefill: PagedPrefill { constant: prefill.constant + chunk - quiet, ..*prefill },
                step: PagedStep { constant: step.constant + quiet, ..*step },
            },
            Self::Linear(CostModel::Padded { prefill, step }) => CostModel::Padded {
                prefill: PaddedCost { constant: prefill.constant + chunk, ..*prefill },
                step: PaddedCost { constant: step.constant + quiet, ..*step },
            },
            Self::Norm(norm) => norm.linear(layout, host),
        }
    }
}

/// Seconds of an iteration: `(w^4 + (c_p*T)^4)^(1/4) + kv*context + attn*pairs + row*N` for `T` tokens computed
/// in `N` rows. The norm is the step model of the simulation study: the weights are read once whatever `T` is, and reading
/// hides computing until that takes longer. All coefficients are derived, none was measured. What the host adds is [`Host`].
#[derive(Clone, Copy, Debug, PartialEq, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Norm {
    /// Reading the weights.
    pub weights: f64,
    /// Computing a token.
    pub token: f64,
    /// Reading the KV of a token that a decoding row sees.
    pub kv: f64,
    /// A pair of a prefilled token and one it attends.
    pub pair: f64,
    /// Host time of a row.
    pub row: f64,
}

/// Log-normal factors: one a slice, one a step.
#[derive(Clone, Copy, Debug, Default)]
pub struct Noise {
    /// Sigma of a slice's factor; a step's is twice as wide.
    pub sigma: f64,
    /// This worker is always so much slower (above 0) or faster: the factor's logarithm.
    pub bias: f64,
    /// Of its numbers.
    pub seed: u64,
}

impl Norm {
    /// Llama-2 13B (no grouped heads) in 16 bits on one A100 of 80 GB; derived in `models/13b-a100.toml`.
    pub const fn llama_13b_a100() -> Self {
        Self { weights: 17.0e-3, token: 0.152e-3, kv: 0.54e-6, pair: 4.8e-9, row: 5e-6 }
    }

    /// Tokens of KV that fit beside the weights of it.
    pub const LLAMA_13B_A100_KV: u64 = 52_000;

    /// Its coefficients with their names.
    pub(crate) fn coefficients(&self) -> [(&'static str, f64); 5] {
        let Self { weights, token, kv, pair, row } = *self;
        [("weights", weights), ("token", token), ("kv", kv), ("pair", pair), ("row", row)]
    }

    pub(crate) fn seconds(&self, it: &Iteration) -> f64 {
        // only a worker that pads has a longest row; its prefill pass is all prefill
        let decoding = if it.prefill > 0 && it.longest > 0 { 0 } else { it.rows };
        let computed = (decoding + it.prefill) as f64;
        (self.weights.powi(4) + (self.token * computed).powi(4)).sqrt().sqrt()
            + self.kv * it.context as f64
            + self.pair * it.pairs as f64
            + self.row * it.rows as f64
    }

    /// The linear model nearest by eye, as a worker of this law would announce it, with what the host adds to every iteration:
    /// exact for few tokens and for many, and up to a fifth off where reading and computing take equally long.
    pub fn linear(&self, layout: Layout, host: Host) -> CostModel {
        let [quiet, chunk] = [host.seconds(0), host.seconds(1)];
        // the slope of the norm over the first rows up to where computing takes as long as reading
        let ridge = self.weights / self.token;
        let per_row = self.row + (2f64.powf(0.25) - 1.0) * self.weights / ridge;
        let constant = self.weights + quiet;
        match layout {
            Layout::Padded => CostModel::Padded {
                prefill: PaddedCost { constant: chunk, per_row: self.row, per_position: 0.0, per_cell: self.token },
                step: PaddedCost { constant, per_row, per_position: 0.0, per_cell: self.kv },
            },
            Layout::Paged => CostModel::Paged {
                prefill: PagedPrefill { constant: chunk - quiet, per_token: self.token, per_pair: self.pair },
                step: PagedStep { constant, per_row, per_context: self.kv },
            },
        }
    }
}

impl Pace {
    /// Exactly what a model says.
    pub fn linear(model: CostModel, chunk: u32) -> Self {
        Self { law: Law::Linear(model), chunk, start: Micros::ZERO, host: Host::default(), noise: Noise::default() }
    }

    /// A worker of the norm, whose slices cost `start` to begin.
    pub fn norm(norm: Norm, chunk: u32, start: Micros) -> Self {
        Self { law: Law::Norm(norm), chunk, start, host: Host::default(), noise: Noise::default() }
    }

    /// The same with what the host exposes.
    #[must_use]
    pub const fn with_host(self, host: Host) -> Self {
        Self { host, ..self }
    }

    /// The same with noise.
    #[must_use]
    pub const fn with_noise(self, noise: Noise) -> Self {
        Self { noise, ..self }
    }
}

impl From<Timing> for Pace {
    fn from(timing: Timing) -> Self {
        Self::linear(timing.model(Layout::Paged), timing.chunk_tokens)
    }
}

/// A pace at work: it remembers the factor of the running slice.
#[derive(Clone, Debug)]
pub(crate) struct Clock {
    pace: Pace,
    random: Random,
    slice: f64,
    host: Micros,
}

impl Clock {
    pub(crate) fn new(pace: Pace) -> Self {
        Self { random: Random::new(pace.noise.seed), slice: pace.noise.bias.exp(), pace, host: Micros::ZERO }
    }

    /// Host time that the device has waited for so far: of slice starts, and beyond the law of iterations.
    pub(crate) fn host(&self) -> Micros {
        self.host
    }

    pub(crate) fn chunk(&self) -> u64 {
        self.pace.chunk.into()
    }

    /// A slice starts: what that costs.
    pub(crate) fn start(&mut self) -> Micros {
        let Noise { sigma, bias, .. } = self.pace.noise;
        if sigma > 0.0 {
            self.slice = (bias + sigma * self.random.normal()).exp();
        }
        self.pace.start
    }

    /// The first iteration of a slice begins: what its start costs is waited for now. A slice without one exposes nothing.
    pub(crate) fn waits(&mut self, start: Micros) -> Micros {
        self.host += start;
        start
    }

    pub(crate) fn iteration(&mut self, it: &Iteration) -> Micros {
        let seconds = match &self.pace.law {
            Law::Linear(model) => model.iteration(it),
            Law::Norm(norm) => norm.seconds(it),
        };
        let sigma = 2.0 * self.pace.noise.sigma;
        let step = if sigma > 0.0 { (sigma * self.random.normal()).exp() } else { 1.0 };
        self.host += self.pace.host.of(it.prefill);
        micros(seconds * self.slice * step + self.pace.host.seconds(it.prefill))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_norm_is_bound_by_weights_for_few_tokens_and_by_tokens_for_many() {
        let mut clock = Clock::new(Pace::norm(Norm::llama_13b_a100(), 2048, Micros::ZERO));
        let decode = Iteration { rows: 16, context: 16_000, ..Iteration::default() };
        // 17 ms of weights, 8.64 ms of KV, 80 us of rows
        assert_eq!(clock.iteration(&decode), Micros(25_722));
        let chunk = Iteration { prefill: 2048, pairs: 2048 * 1024, ..Iteration::default() };
        let took = clock.iteration(&chunk);
        assert!((took.0 as f64 - 2048.0 * 152.0 - 2048.0 * 1024.0 * 0.0048).abs() < 100.0, "{took}");
    }

    #[test]
    fn a_slice_worker_pays_the_host_only_beside_prefill() {
        let decode = Iteration { rows: 1, ..Iteration::default() };
        let chunk = Iteration { prefill: 7, ..decode };
        let timing = Timing { step: Micros(1_000), per_row: Micros(0), prefill_token_nanos: 0, chunk_tokens: 512 };
        let h = Micros(3_000);
        for (host, wanted) in [
            (Host::default(), [1_000, 1_000]),
            (Host::every(h), [4_000, 4_000]),
            (Host::slices(h), [1_100, 4_000]),
            (Host::slices(Micros(40)), [1_040, 1_040]),
        ] {
            // noise is the device's, not the host's
            let noise = Noise { bias: 2f64.ln(), ..Noise::default() };
            let mut clock = Clock::new(Pace::from(timing).with_host(host));
            let mut slow = Clock::new(Pace::from(timing).with_host(host).with_noise(noise));
            assert_eq!([decode, chunk].map(|it| clock.iteration(&it).0), wanted);
            assert_eq!([decode, chunk].map(|it| slow.iteration(&it).0), wanted.map(|time| time + 1_000));
            assert_eq!([clock.host().0, slow.host().0], [wanted[0] + wanted[1] - 2_000; 2]);
        }
    }

    #[test]
    fn the_announced_model_is_near_the_law() {
        let norm = Norm::llama_13b_a100();
        for (rows, length) in [(1, 50), (16, 200), (32, 1000), (64, 400), (100, 100)] {
            let rectangle = Iteration { rows, longest: length, context: rows * length, ..Iteration::default() };
            let pass = Iteration { prefill: rows * length, context: 0, ..rectangle };
            for it in [rectangle, pass].iter().filter(|it| it.prefill != 50) {
                let (law, model) = (norm.seconds(it), norm.linear(Layout::Padded, Host::default()).iteration(it));
                assert!((model / law - 1.0).abs() < 0.2, "{it:?}: {law} and {model}");
            }
        }
    }

    #[test]
    fn timing_is_its_cost_model_to_the_microsecond() {
        let timing = Timing::default();
        let it = Iteration { rows: 7, prefill: 300, ..Iteration::default() };
        assert_eq!(Clock::new(timing.into()).iteration(&it), Micros(4_000 + 350 + 15_000));
        let padded = timing.cost_model_of(Layout::Padded).expect("it takes time");
        let pass = Iteration { rows: 3, longest: 100, prefill: 300, ..Iteration::default() };
        assert_eq!(Clock::new(timing.into()).iteration(&pass), micros(padded.iteration(&pass)));
        let free = Timing { step: Micros(0), per_row: Micros(0), prefill_token_nanos: 0, ..timing };
        assert_eq!(free.cost_model(), None);
        assert!(timing.cost_model().is_some_and(|model| micros(model.iteration(&it)) == Micros(19_350)));
    }

    #[test]
    fn noise_is_as_wide_as_stated() {
        let noise = Noise { sigma: 0.05, bias: 0.2, seed: 9 };
        let mut clock = Clock::new(Pace::from(Timing::default()).with_noise(noise));
        let logs: Vec<f64> = (0..4000)
            .map(|_| {
                clock.start();
                (clock.iteration(&Iteration::default()).0 as f64 / 4000.0).ln()
            })
            .collect();
        let mean = logs.iter().sum::<f64>() / 4000.0;
        let sigma = (logs.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 4000.0).sqrt();
        // sqrt(1 + 4) times a slice's
        assert!((mean - 0.2).abs() < 0.01 && (sigma - 0.05 * 5f64.sqrt()).abs() < 0.005, "{mean} {sigma}");
    }
}
