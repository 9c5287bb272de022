//! Traffic that nobody sent: by a name that says so, a rate, and a seed.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use router_core::{BlockHash, Micros};

use super::error::{Problem, TraceError};
use super::names::{ROOT, link};
use super::scale::{check_poisson, micros, poisson};
use super::{Trace, TraceRequest};
use crate::lengths::{Lengths, synthetic};
use crate::named::hint;
use crate::random::Random;

/// Its name.
const AGENTS: &str = "synthetic-agents";

impl Trace {
    /// Names of [`Trace::synthetic`].
    pub fn synthetic_names() -> [&'static str; 3] {
        [Lengths::sharegpt_like().name, Lengths::long_prompts().name, AGENTS]
    }

    /// Poisson arrivals of `rate` requests a second:
    ///
    /// - `synthetic-sharegpt-like`, `synthetic-long-prompts`: log-normal lengths ([`Lengths`]), nothing shared;
    /// - `synthetic-agents`: conversations of four turns on average, each on one of 20 system prompts of 512 to 4096 tokens (a few of them
    ///   popular), every turn sending all before it again and some new tokens, 15 s apart; blocks of 16.
    pub fn synthetic(name: &str, rate: f64, seconds: f64, seed: u64) -> Result<Self, TraceError> {
        let known = [Lengths::sharegpt_like(), Lengths::long_prompts()].into_iter().find(|known| known.name == name);
        let mut trace = Self { name: name.to_owned(), classes: vec![name.to_owned()], ..Self::default() };
        if let Some(lengths) = known {
            check_poisson(name, rate, seconds)?;
            trace.requests.extend(synthetic(lengths, rate, seconds, seed).into_iter().map(|sample| TraceRequest {
                at: sample.at,
                input: sample.prompt as u32,
                output: sample.output as u32,
                chain: (0, 0),
                session: None,
                turn: 0,
                class: 0,
            }));
        } else if name == AGENTS {
            trace.agents(rate, seconds, &mut Random::new(seed))?;
        } else {
            let problem = Problem::Unknown(hint(name, &Self::synthetic_names()));
            return Err(TraceError::Whole { name: name.to_owned(), problem });
        }
        if trace.requests.is_empty() { Err(trace.whole(Problem::Empty)) } else { Ok(trace) }
    }

    fn agents(&mut self, rate: f64, seconds: f64, random: &mut Random) -> Result<(), TraceError> {
        const TURNS: f64 = 4.0;
        const TEMPLATES: u64 = 20;
        const PAUSE: f64 = 15.0;
        const MOST: u64 = 32_768;
        let starts = poisson(&self.name, random, rate / TURNS, seconds)?;
        let size = Trace::BLOCK.get();
        self.block_size = Some(Trace::BLOCK);
        let end = micros(seconds);
        // ids of a conversation follow one another after those of its template
        let mut chains: Vec<BlockHash> = Vec::new();
        let mut coming: BinaryHeap<Reverse<(Micros, u32)>> = BinaryHeap::new();
        // turn, template, its tokens, tokens so far, of each conversation
        let mut sessions: Vec<(u32, u64, u64, u64)> = Vec::new();
        for (session, at) in (0..).zip(starts) {
            // the popularity of rank r falls as 1/r
            let template = (TEMPLATES as f64).powf(random.unit()) as u64;
            let system = 512 + (template * 0x9E37_79B9) % 3585;
            sessions.push((0, template, system, system));
            coming.push(Reverse((at, session)));
        }
        while let Some(Reverse((at, session))) = coming.pop() {
            let (turn, template, system, before) = sessions[session as usize];
            let (new, output) = Lengths::sharegpt_like().draw(random);
            let input = before + new;
            let start = chains.len();
            let mut name = ROOT;
            chains.extend((0..input / size).map(|at| {
                let own = if (at + 1) * size <= system { template } else { (1 << 32) + u64::from(session) };
                name = link(name, (own << 16) | at);
                name
            }));
            let chain = u32::try_from(start).ok().zip(u32::try_from(input / size).ok());
            self.requests.push(TraceRequest {
                at,
                input: input as u32,
                output: output as u32,
                chain: chain.ok_or_else(|| self.too_many_blocks())?,
                session: Some(session),
                turn,
                class: 0,
            });
            let later = at + micros(random.exponential(PAUSE));
            if random.chance(1.0 - 1.0 / TURNS) && later < end && input + output < MOST {
                sessions[session as usize] = (turn + 1, template, system, input + output);
                coming.push(Reverse((later, session)));
            }
        }
        self.store(&chains).ok_or_else(|| self.too_many_blocks())
    }
}
