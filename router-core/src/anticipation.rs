//! What a policy needs to know of the requests that are yet to come: how often they arrive at a worker, and how long a
//! token of a prefill keeps them waiting there.
//!
//! Both are measured and kept in fixed point, so that a decision made from them is made again exactly from its record.

use std::collections::VecDeque;

use crate::units::{Micros, Tokens};

/// Arrivals whose rate is measured: steady to some 5 %, and a burst shows within seconds.
const ARRIVALS: usize = 500;
/// Arrivals older than this say nothing of the rate. [simulation study]
const PERIOD: Micros = Micros(60_000_000);
/// Before so much time has passed nobody knows a rate a second.
const SECOND: Micros = Micros(1_000_000);
/// Seconds a token before any prefill was seen, and the tokens that they weigh as.
const FIRST_PREFILL: (f64, f64) = (1e-4, 4096.0);
/// Prefills that the mean remembers, as answers are remembered for the mean output.
const PREFILLS: f64 = crate::constants::MEMORY;

/// Fraction bits of [`Anticipation::arrivals`].
const ARRIVAL_BITS: u32 = 20;
/// Fraction bits of [`Anticipation::prefill`].
const PREFILL_BITS: u32 = 40;
/// Fraction bits of [`Anticipation::factor`].
const FACTOR_BITS: u32 = 32;

/// What is expected of the near future, as it was at a decision.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Anticipation {
    /// lambda: arrivals a second at each worker, in units of 2^-20.
    pub arrivals: u64,
    /// `c_p`: seconds of prefill a token, in units of 2^-40.
    pub prefill: u64,
}

impl Anticipation {
    /// Of so many arrivals a second at each worker, and so many seconds a token. What is no number, or less than zero, is
    /// zero.
    pub fn new(arrivals: f64, prefill: f64) -> Self {
        // casts saturate
        let fixed = |value: f64, bits: u32| (value * (1u64 << bits) as f64).round() as u64;
        Self { arrivals: fixed(arrivals, ARRIVAL_BITS), prefill: fixed(prefill, PREFILL_BITS) }
    }

    /// Arrivals a second at each worker.
    pub fn arrivals_a_second(self) -> f64 {
        self.arrivals as f64 / (1u64 << ARRIVAL_BITS) as f64
    }

    /// Seconds of prefill a token.
    pub fn seconds_a_token(self) -> f64 {
        self.prefill as f64 / (1u64 << PREFILL_BITS) as f64
    }

    /// `1 + lambda * c_p * u` in units of 2^-32: of each request that arrives meanwhile, and of the row itself.
    pub fn factor(self, new_tokens: Tokens) -> u128 {
        let a_token = u128::from(self.arrivals) * u128::from(self.prefill);
        let meanwhile = a_token.saturating_mul(u128::from(new_tokens.0)) >> (ARRIVAL_BITS + PREFILL_BITS - FACTOR_BITS);
        meanwhile + (1 << FACTOR_BITS)
    }
}

/// The latest arrivals, and so their rate.
#[derive(Clone, Debug, Default)]
pub(crate) struct Arrivals {
    latest: VecDeque<Micros>,
}

impl Arrivals {
    /// One more. Times never run backwards.
    pub(crate) fn observe(&mut self, now: Micros) {
        if self.latest.len() == ARRIVALS {
            self.latest.pop_front();
        }
        self.latest.push_back(now);
    }

    /// Arrivals a second since the oldest that counts, which only begins the time.
    pub(crate) fn rate(&self, now: Micros) -> f64 {
        let outdated = self.latest.partition_point(|at| now.saturating_sub(*at) > PERIOD);
        let Some(&oldest) = self.latest.get(outdated) else { return 0.0 };
        let passed = now.saturating_sub(oldest);
        let count = self.latest.len() - outdated;
        // many within less are a rate; few are not yet, and none are where nobody tells the time
        let passed = if count < ARRIVALS { passed.max(SECOND) } else { passed };
        if passed == Micros::ZERO { 0.0 } else { (count - 1) as f64 * 1e6 / passed.0 as f64 }
    }
}

/// Seconds a token that prefills took: a mean that forgets, each prefill weighing as its tokens.
///
/// Times of one worker must not overlap. Then those of prefills that were computed together, of which the first has the
/// time and the others the tokens, come out right; and a wait for a place in the batch, which is no prefill, can make
/// `lambda * c_p` times the mean prefill no larger than 1, because prefills take no more time than there is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PrefillTime {
    seconds: f64,
    tokens: f64,
}

impl Default for PrefillTime {
    fn default() -> Self {
        let (a_token, tokens) = FIRST_PREFILL;
        Self { seconds: a_token * tokens, tokens }
    }
}

impl PrefillTime {
    /// So many tokens took so long.
    pub(crate) fn observe(&mut self, tokens: Tokens, time: Micros) {
        let (tokens, seconds) = (tokens.0 as f64, time.0 as f64 / 1e6);
        let forget = 1.0 - 1.0 / PREFILLS;
        self.seconds = self.seconds * forget + seconds;
        self.tokens = self.tokens * forget + tokens;
    }

    /// Seconds a token.
    pub(crate) fn mean(self) -> f64 {
        if self.tokens > 0.0 { self.seconds / self.tokens } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_of_the_last_minute_or_the_last_five_hundred() {
        let mut arrivals = Arrivals::default();
        assert!(arrivals.rate(Micros(0)) == 0.0);
        arrivals.observe(Micros(0));
        arrivals.observe(Micros(10));
        assert!(arrivals.rate(Micros(10)) <= 1.0, "two at once are no rate of a hundred thousand a second");
        // two a second: a minute of them
        (0..1000u64).for_each(|at| arrivals.observe(Micros(1_000_000 + at * 500_000)));
        let now = Micros(1_000_000 + 999 * 500_000);
        assert!((arrivals.rate(now) - 2.0).abs() < 0.02, "{}", arrivals.rate(now));
        // a burst of thousand a second fills the window within half a second
        (1..=500u64).for_each(|at| arrivals.observe(now + Micros(at * 1000)));
        let now = now + Micros(500_000);
        assert!((arrivals.rate(now) - 1000.0).abs() < 2.0, "{}", arrivals.rate(now));
        // and a minute later it is over
        assert!(arrivals.rate(now + PERIOD + Micros(1)) == 0.0);
        assert!((arrivals.rate(now) - 1000.0).abs() < 2.0, "whoever asks changes nothing");
        // without a clock there is no rate, however many come
        (0..1000).for_each(|_| arrivals.observe(now));
        assert!(arrivals.rate(now) == 0.0);
    }

    #[test]
    fn the_time_of_a_token_follows_the_engine() {
        let mut prefill = PrefillTime::default();
        assert!((prefill.mean() - 1e-4).abs() < 1e-12);
        (0..2000).for_each(|_| prefill.observe(Tokens(1000), Micros(1_000_000)));
        assert!((prefill.mean() - 1e-3).abs() < 1e-5, "{}", prefill.mean());
        // three that are computed together: the first to be reported has the time
        for _ in 0..2000 {
            prefill.observe(Tokens(50), Micros(20_000));
            prefill.observe(Tokens(150), Micros(0));
            prefill.observe(Tokens(800), Micros(0));
        }
        assert!((prefill.mean() / 2e-5 - 1.0).abs() < 0.01, "{}", prefill.mean());
        (0..3000).for_each(|_| prefill.observe(Tokens(0), Micros(0)));
        assert!(prefill.mean().is_finite());
    }

    #[test]
    fn fixed_point_is_as_exact_as_what_is_measured() {
        let expected = Anticipation::new(2.5, 1e-4);
        assert!((expected.arrivals_a_second() - 2.5).abs() < 1e-6 && (expected.seconds_a_token() - 1e-4).abs() < 1e-11);
        let factor = expected.factor(Tokens(4000)) as f64 / (1u64 << 32) as f64;
        assert!((factor - 2.0).abs() < 1e-5, "1 + 2.5 * 1e-4 * 4000: {factor}");
        assert_eq!(Anticipation::new(f64::NAN, -1.0), Anticipation::default());
        assert_eq!(Anticipation::default().factor(Tokens(u64::MAX)), 1 << 32);
        // no overflow
        assert!(Anticipation { arrivals: u64::MAX, prefill: u64::MAX }.factor(Tokens(u64::MAX)) > 1 << 32);
    }
}
