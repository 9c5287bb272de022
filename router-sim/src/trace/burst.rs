//! A hotspot: many requests of one long prefix, laid over a trace.

use router_core::{BlockHash, Tokens};

use super::names::{ROOT, link};
use super::scale::{micros, poisson, tokens};
use super::{Trace, TraceError, TraceRequest};
use crate::random::Random;

/// Requests that share a prefix, for a while.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Burst {
    /// When it begins, in seconds.
    pub from: f64,
    /// How long it lasts, in seconds.
    pub seconds: f64,
    /// Requests a second, on average.
    pub rate: f64,
    /// What they share.
    pub shared: Tokens,
    /// Tokens of each that are its own.
    pub own: Tokens,
    /// Tokens of each answer.
    pub output: Tokens,
}

impl Burst {
    /// The workload class of its requests.
    pub const CLASS: &'static str = "hot";
}

impl Trace {
    /// The trace with a burst over it, whose requests come by the seed.
    pub fn with_burst(&self, burst: &Burst, seed: u64) -> Result<Self, TraceError> {
        if !(0.0..1e12).contains(&burst.from) {
            return Err(self.number("burst", burst.from, "it begins at a time of the trace, in seconds"));
        }
        let input = tokens(self, "prompt of the burst", burst.shared.0.saturating_add(burst.own.0))?;
        let output = tokens(self, "answer of the burst", burst.output.0)?;
        let mut all = self.clone();
        let size = *all.block_size.get_or_insert(Trace::BLOCK);
        let class = all.class(Burst::CLASS).ok_or_else(|| self.number("classes", 65536.0, "fewer classes"))?;
        let [shared, whole] = [burst.shared.0 / size.get(), u64::from(input) / size.get()];
        // ids that a burst alone has, seldom one of the trace's
        let id = |part: u64, at: u64| (0xB0_57 << 48) | (part << 24) | at;
        let mut prefix = ROOT;
        let prefix: Vec<BlockHash> = (0..shared)
            .map(|at| {
                prefix = link(prefix, id(0, at));
                prefix
            })
            .collect();
        let shared_at = all.blocks.len();
        all.blocks.extend_from_slice(&prefix);
        let times = poisson(&self.name, &mut Random::new(seed), burst.rate, burst.seconds)?;
        for (number, at) in (1..).zip(times) {
            let start = if whole > shared { all.blocks.len() } else { shared_at };
            if whole > shared {
                all.blocks.extend_from_slice(&prefix);
                let mut name = prefix.last().copied().unwrap_or(ROOT);
                all.blocks.extend((shared..whole).map(|at| {
                    name = link(name, id(number, at));
                    name
                }));
            }
            let chain =
                u32::try_from(start).ok().zip(u32::try_from(whole).ok()).ok_or_else(|| self.too_many_blocks())?;
            let at = at + micros(burst.from);
            all.requests.push(TraceRequest { at, input, output, chain, session: None, turn: 0, class });
        }
        all.requests.sort_by_key(|request| request.at);
        Ok(all)
    }
}
