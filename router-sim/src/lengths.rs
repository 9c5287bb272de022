//! Synthetic arrivals: Poisson in time, log-normal in lengths, by a seed. Nothing of a real trace is in them.

use router_core::Micros;

use crate::random::Random;

/// A distribution of prompt and output lengths: log-normal, cut off at both ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lengths {
    /// Its name.
    pub name: &'static str,
    /// Mean and sigma of the prompt's logarithm, and its bounds in tokens.
    pub prompt: (f64, f64, [u64; 2]),
    /// The same of the output.
    pub output: (f64, f64, [u64; 2]),
}

/// A request to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// When.
    pub at: Micros,
    /// Tokens of its prompt.
    pub prompt: u64,
    /// Tokens after which it ends.
    pub output: u64,
}

impl Lengths {
    /// Like published statistics of shared chats (ShareGPT): short prompts, answers of some hundred tokens.
    /// Means 194 and 273.
    pub const fn sharegpt_like() -> Self {
        Self { name: "synthetic-sharegpt-like", prompt: (4.6, 1.3, [4, 1024]), output: (5.2, 1.0, [2, 1024]) }
    }

    /// For contrast: prompts of some thousand tokens, short answers, as of code or documents.
    pub const fn long_prompts() -> Self {
        Self { name: "synthetic-long-prompts", prompt: (7.4, 0.8, [64, 6144]), output: (4.2, 1.0, [2, 1024]) }
    }

    /// Prompt and output of one request.
    pub fn draw(&self, random: &mut Random) -> (u64, u64) {
        let mut one = |(mean, sigma, [least, most]): (f64, f64, [u64; 2])| {
            ((mean + sigma * random.normal()).exp().round() as u64).clamp(least, most)
        };
        (one(self.prompt), one(self.output))
    }
}

/// Requests that come at `rate` a second for `seconds`.
pub fn synthetic(lengths: Lengths, rate: f64, seconds: f64, seed: u64) -> Vec<Sample> {
    let mut random = Random::new(seed);
    let mut at = 0.0;
    let mut samples = Vec::new();
    if !(rate > 0.0 && seconds.is_finite()) {
        return samples;
    }
    loop {
        at += random.exponential(1.0 / rate);
        if at >= seconds {
            return samples;
        }
        let (prompt, output) = lengths.draw(&mut random);
        samples.push(Sample { at: Micros((at * 1e6) as u64), prompt, output });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_rate_and_bounds_are_as_stated() {
        let all = synthetic(Lengths::sharegpt_like(), 50.0, 1000.0, 3);
        let n = all.len() as f64;
        assert!((n / 50_000.0 - 1.0).abs() < 0.02, "{n} arrivals");
        let mean = |of: fn(&Sample) -> u64| all.iter().map(of).sum::<u64>() as f64 / n;
        let (prompt, output) = (mean(|s| s.prompt), mean(|s| s.output));
        assert!((prompt / 194.0 - 1.0).abs() < 0.03 && (output / 273.0 - 1.0).abs() < 0.03, "{prompt} {output}");
        assert!(all.iter().all(|s| (4..=1024).contains(&s.prompt) && (2..=1024).contains(&s.output)));
        assert_eq!(all, synthetic(Lengths::sharegpt_like(), 50.0, 1000.0, 3));
        assert_ne!(all, synthetic(Lengths::sharegpt_like(), 50.0, 1000.0, 4));
        assert!(synthetic(Lengths::long_prompts(), 0.0, 10.0, 1).is_empty());
    }
}
