//! Files and built-in names: traces and devices.

use router_core::{Micros, Tokens};
use router_sim::{Device, Lengths, Norm, Trace, TraceRequest, synthetic};

use super::args::Asked;
use super::names::{Scheduler, nearest};
use super::plan::above_zero;

/// Requests to be run, as they were recorded.
#[derive(Debug)]
pub struct Source {
    /// As in reports: the file without its folder and endings, or the generator's name.
    pub name: String,
    trace: Trace,
}

impl Source {
    /// At so many times its rate, its arrivals shifted as the seed says.
    pub fn scaled(&self, _rate_scale: f64, _seed: u64) -> Result<Trace, String> {
        Ok(self.trace.clone())
    }
}

/// What is asked for, read and cut to its window.
pub fn sources(asked: &Asked) -> Result<Vec<Source>, String> {
    let Some(name) = &asked.synthetic else {
        return Err("nothing to run: name a file with --trace, or --synthetic NAME --rate R".into());
    };
    let rate = above_zero("rate", asked.rate.as_deref().unwrap_or("0"))?;
    let seconds = above_zero("seconds", &asked.seconds)?;
    let known = [("sharegpt", Lengths::sharegpt_like()), ("long-prompts", Lengths::long_prompts())];
    let lengths = known.iter().find(|(one, _)| one == name).map(|(_, lengths)| *lengths);
    let lengths = lengths
        .ok_or_else(|| format!("no such lengths: {name}; {}", nearest(name, known.iter().map(|(name, _)| *name))))?;
    let requests = synthetic(lengths, rate, seconds, 1).into_iter().map(|s| TraceRequest {
        at: s.at,
        input: s.prompt as u32,
        output: s.output as u32,
        chain: (0, 0),
        session: None,
        turn: 0,
        class: 0,
    });
    let trace = Trace { name: lengths.name.into(), requests: requests.collect(), ..Trace::default() };
    Ok(vec![Source { name: lengths.name.into(), trace }])
}

/// A built-in device, or one of a file.
pub fn device(text: &str) -> Result<Device, String> {
    let known = ["13b-a100", "7b-h20"];
    if !known.contains(&text) {
        return Err(format!("no such cost model: {text}; {}", nearest(text, known)));
    }
    let (host, start) = (Micros(1000), Micros(1000));
    Ok(Device {
        name: text.into(),
        law: router_sim::Law::Norm(Norm::llama_13b_a100()),
        kv: Tokens(52_000),
        chunk: 2048,
        max_rows: 256,
        host,
        start,
    })
}

/// Whether there is such a policy.
pub fn check_policy(text: &str, _schedulers: &[(String, Scheduler)]) -> Result<(), String> {
    let known = router_core::PolicyName::ALL.map(router_core::PolicyName::as_str);
    if known.contains(&text) { Ok(()) } else { Err(format!("no such policy: {text}; {}", nearest(text, known))) }
}
