//! More, less, longer, or another draw of the same traffic.
//!
//! What is scaled keeps what makes prompts shared: in every copy private blocks have names of their own, and public blocks (of
//! more than one conversation; without conversations, of at least 1 % of requests and at least 32) keep theirs.

use router_core::Micros;

use super::error::{Problem, TraceError};
use super::names::Public;
use super::read::{MOST_REQUESTS, MOST_TOKENS};
use super::{Trace, TraceRequest};
use crate::random::Random;

/// How far arrivals are shifted to either side, in mean times between two of them.
const JITTER_GAPS: f64 = 3.0;

/// The part of a trace within which all its copies begin, where conversations are under way at its start. What these had is cached
/// nowhere, so they come at the price of many new ones: a copy that began later would bring this into what is measured.
const EARLY: f64 = 0.1;

impl Trace {
    /// How often it can begin again: the time to the last arrival, and one mean gap.
    pub fn period(&self) -> f64 {
        let last = self.requests.last().map_or(0.0, |last| last.at.0 as f64 * 1e-6);
        let gaps = self.requests.len().saturating_sub(1).max(1) as f64;
        (last + last / gaps).max(1e-6)
    }

    /// At `scale` times its rate: arrivals come faster, up to 4 times (2 times where there are conversations: their turns come
    /// faster too), and beyond that several copies run beside each other. A copy begins at a place of its own in the trace, by the seed, and
    /// goes round: what was before that place follows the end as another conversation. If conversations are under way at the trace's start,
    /// all copies begin within its first tenth. Jitter it before, not after.
    pub fn at_rate(&self, scale: f64, seed: u64) -> Result<Self, TraceError> {
        let most = if self.sessions() > 0 { 2.0 } else { 4.0 };
        // what is no number is refused below
        self.in_copies(scale, (scale / most).ceil().clamp(1.0, u32::MAX.into()) as u32, seed)
    }

    /// The same in so many copies, whatever the rate. As many conversations are under way at once as there are copies of them, and what
    /// these have cached is to fit into workers: rates are compared at one number of copies, which is that of the highest.
    pub fn in_copies(&self, scale: f64, copies: u32, seed: u64) -> Result<Self, TraceError> {
        if !(scale.is_finite() && scale > 0.0) {
            return Err(self.number("rate scale", scale, "a rate scale is more than 0"));
        }
        if copies == 0 {
            return Err(self.number("copies", 0.0, "at least one"));
        }
        if f64::from(copies) * self.requests.len() as f64 > MOST_REQUESTS as f64 {
            return Err(self.whole(Problem::Most("134 million requests")));
        }
        let faster = scale / f64::from(copies);
        let period = self.period() / faster;
        let copies = u64::from(copies);
        let mut random = Random::new(seed);
        let public = Public::of(self);
        let within = if self.begins_late() { EARLY } else { 1.0 };
        let mut all = self.emptied();
        for copy in 0..copies {
            // spread over the period, so that no two begin together
            let spread = (copy as f64 + random.unit()) / copies as f64;
            let shift = if copy == 0 { 0.0 } else { spread * within * period };
            let at = |request: &TraceRequest| request.at.0 as f64 * 1e-6 / faster + shift;
            for (around, number) in [(false, 2 * copy), (true, 2 * copy + 1)] {
                let part = self.requests.iter().filter(|request| (at(request) >= period) == around);
                let moved = part.map(|request| {
                    let at = at(request) - if around { period } else { 0.0 };
                    TraceRequest { at: micros(at), ..*request }
                });
                all.put_copy(self, moved, &public, number).ok_or_else(|| self.too_many_blocks())?;
            }
        }
        all.requests.sort_by_key(|request| request.at);
        Ok(all)
    }

    /// Whether conversations were under way when it began: a tenth of them or more, so that a slip of a file decides nothing.
    fn begins_late(&self) -> bool {
        let mut begun = vec![false; self.sessions() as usize];
        let (mut all, mut late) = (0u64, 0u64);
        for request in &self.requests {
            let Some(session) = request.session else { continue };
            if !std::mem::replace(&mut begun[session as usize], true) {
                all += 1;
                late += u64::from(request.turn > 0);
            }
        }
        10 * late > all
    }

    /// Requests that came from `from` to before `to`, in seconds; `from` becomes zero. Conversations may begin late.
    pub fn window(&self, from: f64, to: f64) -> Result<Self, TraceError> {
        if !(from >= 0.0 && to > from) {
            return Err(self.number("window", from, "a window is FROM:TO in seconds, with 0 <= FROM < TO"));
        }
        let span = micros(from)..micros(to);
        let part = self.requests.iter().filter(|request| span.contains(&request.at));
        let moved = part.map(|request| TraceRequest { at: request.at.saturating_sub(span.start), ..*request });
        let mut all = self.emptied();
        all.put_copy(self, moved, &Public::none(), 0).ok_or_else(|| self.too_many_blocks())?;
        if all.requests.is_empty() { Err(self.whole(Problem::Empty)) } else { Ok(all) }
    }

    /// The trace, and again after its end, so many times.
    pub fn repeated(&self, times: u32) -> Result<Self, TraceError> {
        if times == 0 {
            return Err(self.number("repetitions", 0.0, "at least one"));
        }
        if u64::from(times) * self.requests.len() as u64 > MOST_REQUESTS as u64 {
            return Err(self.whole(Problem::Most("134 million requests")));
        }
        let period = micros(self.period());
        let public = Public::of(self);
        let mut all = self.emptied();
        for copy in 0..u64::from(times) {
            let later = Micros(copy.saturating_mul(period.0));
            let moved = self.requests.iter().map(|request| TraceRequest { at: request.at + later, ..*request });
            all.put_copy(self, moved, &public, copy).ok_or_else(|| self.too_many_blocks())?;
        }
        Ok(all)
    }

    /// So many seconds of it: cut, or repeated and cut.
    pub fn lasting(&self, seconds: f64) -> Result<Self, TraceError> {
        if !(seconds > 0.0 && seconds.is_finite()) {
            return Err(self.number("seconds", seconds, "a length is more than 0 seconds"));
        }
        let times = (seconds / self.period()).ceil().clamp(1.0, f64::from(u32::MAX)) as u32;
        if times == 1 { self.window(0.0, seconds) } else { self.repeated(times)?.window(0.0, seconds) }
    }

    /// Another draw of the same arrivals: each conversation, or request without one, is shifted by up to 3 mean times between two of
    /// these, to either side. What that adds to the whole (1 or 2 % with few conversations) is taken back from all times, so that the rate
    /// stays.
    #[must_use]
    pub fn jittered(&self, seed: u64) -> Self {
        let sessions = self.sessions() as usize;
        let alone = self.requests.iter().filter(|request| request.session.is_none()).count();
        let gap = self.period() / (sessions + alone).max(1) as f64;
        let mut random = Random::new(seed);
        let mut draw = || micros(random.unit() * 2.0 * JITTER_GAPS * gap);
        let shifts: Vec<Micros> = (0..sessions).map(|_| draw()).collect();
        let mut all = self.clone();
        for request in &mut all.requests {
            request.at += request.session.map_or_else(&mut draw, |session| shifts[session as usize]);
        }
        all.requests.sort_by_key(|request| request.at);
        let ends = |all: &Self| all.requests.first().zip(all.requests.last()).map(|(first, last)| (first.at, last.at));
        if let Some(((first, last), (_, wanted))) = ends(&all).zip(ends(self)) {
            let factor = wanted.0 as f64 / last.saturating_sub(first).0.max(1) as f64;
            for request in &mut all.requests {
                request.at = Micros((request.at.saturating_sub(first).0 as f64 * factor).round() as u64);
            }
        }
        all
    }

    /// Lengths drawn from it with replacement, at Poisson arrivals of `rate` a second. Nothing is shared and there are no conversations.
    pub fn resampled(&self, rate: f64, seconds: f64, seed: u64) -> Result<Self, TraceError> {
        if self.requests.is_empty() {
            return Err(self.whole(Problem::Empty));
        }
        let mut random = Random::new(seed);
        let mut all = Self { block_size: None, ..self.emptied() };
        for at in poisson(&self.name, &mut random, rate, seconds)? {
            let drawn = self.requests[random.below(self.requests.len() as u64) as usize];
            all.requests.push(TraceRequest { at, chain: (0, 0), session: None, turn: 0, ..drawn });
        }
        if all.requests.is_empty() { Err(self.whole(Problem::Empty)) } else { Ok(all) }
    }

    pub(super) fn emptied(&self) -> Self {
        let Self { name, block_size, classes, .. } = self;
        Self { name: name.clone(), block_size: *block_size, classes: classes.clone(), ..Self::default() }
    }

    pub(super) fn whole(&self, problem: Problem) -> TraceError {
        TraceError::Whole { name: self.name.clone(), problem }
    }

    pub(super) fn number(&self, what: &'static str, value: f64, expected: &'static str) -> TraceError {
        self.whole(Problem::Number { what, value, expected })
    }

    pub(super) fn too_many_blocks(&self) -> TraceError {
        self.whole(Problem::Most("500 million blocks"))
    }
}

/// Whether there can be a Poisson process of that rate and length.
pub(super) fn check_poisson(name: &str, rate: f64, seconds: f64) -> Result<(), TraceError> {
    let whole = |problem| TraceError::Whole { name: name.to_owned(), problem };
    let number = |what, value, expected| whole(Problem::Number { what, value, expected });
    if !(rate > 0.0 && rate.is_finite()) {
        return Err(number("rate", rate, "a rate is more than 0 requests a second"));
    }
    if !(seconds > 0.0 && seconds.is_finite()) {
        return Err(number("seconds", seconds, "a length is more than 0 seconds"));
    }
    if rate * seconds > MOST_REQUESTS as f64 * 0.9 {
        return Err(whole(Problem::Most("134 million requests")));
    }
    Ok(())
}

/// Times of a Poisson process.
pub(super) fn poisson(name: &str, random: &mut Random, rate: f64, seconds: f64) -> Result<Vec<Micros>, TraceError> {
    check_poisson(name, rate, seconds)?;
    let mut times = Vec::new();
    let mut at = random.exponential(1.0 / rate);
    while at < seconds {
        times.push(micros(at));
        at += random.exponential(1.0 / rate);
    }
    Ok(times)
}

/// Lengths that somebody gives.
pub(super) fn tokens(of: &Trace, what: &'static str, count: u64) -> Result<u32, TraceError> {
    let fits = u32::try_from(count).ok().filter(|_| (1..=MOST_TOKENS).contains(&count));
    fits.ok_or_else(|| of.number(what, count as f64, "from 1 to 10000000 tokens"))
}

pub(super) fn micros(seconds: f64) -> Micros {
    Micros((seconds.max(0.0) * 1e6).round() as u64)
}
