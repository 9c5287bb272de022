//! From flags to runs: every value is checked here, before anything runs, and a wrong one is one line.

use std::num::NonZero;

use router_core::Micros;
use router_sim::{Device, Noise, Sessions, Slo, System};
use serde_json::{Map, Value, json};

use super::args::Asked;
use super::inputs::{self, Source};
use super::names::{self, Scheduler};

/// Sixteen times the largest fleet that is measured: memory grows with it, whatever the trace.
const MOST_WORKERS: u32 = 1 << 16;

/// Most runs of a grid: more is a slip of the keys.
const MOST: usize = 100_000;

/// All that is run.
#[derive(Debug)]
pub struct Plan {
    /// Requests.
    pub sources: Vec<Source>,
    /// One for each run, in the order of reports.
    pub cases: Vec<Case>,
    /// Whether turns wait.
    pub sessions: Sessions,
    /// Of iterations.
    pub noise: Noise,
    /// Most output tokens of a request; without it the trace's longest.
    pub limit: Option<u32>,
    /// A run is over then.
    pub until: Micros,
    /// Where goodput is counted.
    pub slo: Option<Slo>,
    /// Runs at once.
    pub jobs: usize,
}

/// A run.
#[derive(Clone, Debug)]
pub struct Case {
    /// A place in [`Plan::sources`].
    pub source: usize,
    /// Times its rate.
    pub rate_scale: f64,
    /// Of all that is drawn.
    pub seed: u64,
    /// How many.
    pub workers: u32,
    /// Of which kind, with the host times and rows of this run.
    pub device: Device,
    /// How they serve.
    pub system: System,
    /// How late what they say is.
    pub delay: Micros,
    /// What tells it from the others, as in reports.
    pub labels: Map<String, Value>,
}

impl Plan {
    /// Checks what is asked for, reads the files it names and makes the grid.
    pub fn new(asked: &Asked) -> Result<Self, String> {
        let schedulers = each("scheduler", &asked.scheduler, |text| Ok((text.to_owned(), Scheduler::parse(text)?)))?;
        let workers = each("workers", &asked.workers, |text| match whole("workers", text) {
            Ok(many) if many > MOST_WORKERS => Err(format!("workers are at most {MOST_WORKERS}: {text}")),
            read => read,
        })?;
        let scales = each("rate-scale", &asked.rate_scale, |text| above_zero("rate-scale", text))?;
        let delays = each("delay-ms", &asked.delay_ms, |text| millis("delay-ms", text))?;
        let [hosts, starts] = [("host-ms", &asked.host_ms), ("start-ms", &asked.start_ms)].map(|(name, texts)| {
            if texts.is_empty() { Ok(vec![None]) } else { each(name, texts, |text| millis(name, text).map(Some)) }
        });
        let (hosts, starts) = (hosts?, starts?);
        let commits = each("commit", &asked.commit, |text| Ok((text.to_owned(), names::commit(text)?)))?;
        let guards = each("guard", &asked.guard, names::guard)?;
        let seeds = u64::from(whole("seeds", &asked.seeds)?);
        let sizes = [workers.len(), scales.len(), delays.len(), hosts.len(), starts.len(), schedulers.len()];
        let sizes = sizes.into_iter().chain([asked.policy.len(), asked.cost_model.len(), asked.trace.len().max(1)]);
        let all = sizes.fold(seeds as usize, usize::saturating_mul);
        if all > MOST {
            return Err(format!("a grid of {all} runs is more than {MOST}: ask for less at once"));
        }
        for policy in &asked.policy {
            inputs::check_policy(policy, &schedulers)?;
        }
        let devices = each("cost-model", &asked.cost_model, inputs::device)?;
        let sources = inputs::sources(asked)?;

        let mut cases = Vec::new();
        for (at, source) in sources.iter().enumerate() {
            for (&workers, device) in workers.iter().flat_map(|n| devices.iter().map(move |device| (n, device))) {
                for (name, scheduler) in &schedulers {
                    // where nothing is placed by a policy, policies, what they move and their guard are one run
                    let once = |number: usize| if scheduler.places() { number } else { 1 };
                    let routed = |number: usize| if matches!(scheduler, Scheduler::Continuous(_)) { number } else { 1 };
                    for policy in &asked.policy[..once(asked.policy.len())] {
                        for (commit_name, commit) in &commits[..routed(commits.len())] {
                            for &guard in &guards[..routed(guards.len())] {
                                let system = scheduler.system(policy, *commit, guard)?;
                                for (&delay, (&host, &start)) in delays.iter().flat_map(|delay| {
                                    let hosts = hosts.iter().flat_map(|h| starts.iter().map(move |s| (h, s)));
                                    hosts.map(move |pair| (delay, pair))
                                }) {
                                    let mut device = device.clone();
                                    let cost_model = device.name.clone();
                                    device.host = host.unwrap_or(device.host);
                                    device.start = start.unwrap_or(device.start);
                                    if let Scheduler::Continuous(Some(rows)) = scheduler {
                                        device.max_rows = device.max_rows.min(*rows);
                                    }
                                    let ms = |time: Micros| json!(time.0 as f64 * 1e-3);
                                    let routed = matches!(scheduler, Scheduler::Continuous(_));
                                    let pairs = [
                                        ("trace", json!(source.name)),
                                        ("workers", json!(workers)),
                                        ("cost_model", json!(cost_model)),
                                        ("scheduler", json!(name)),
                                        ("policy", json!(scheduler.places().then_some(policy))),
                                        ("commit", json!(routed.then_some(commit_name))),
                                        ("guard", json!(routed.then_some(guard))),
                                        ("delay_ms", ms(delay)),
                                        ("host_ms", ms(device.host)),
                                        ("start_ms", ms(device.start)),
                                    ];
                                    for (&rate_scale, seed) in
                                        scales.iter().flat_map(|x| (1..=seeds).map(move |k| (x, k)))
                                    {
                                        let pairs =
                                            pairs.iter().map(|(name, value)| ((*name).to_owned(), value.clone()));
                                        let mut labels: Map<String, Value> = pairs.collect();
                                        labels.insert("rate_scale".into(), json!(rate_scale));
                                        labels.insert("seed".into(), json!(seed));
                                        let (device, system) = (device.clone(), system.clone());
                                        cases.push(Case {
                                            source: at,
                                            rate_scale,
                                            seed,
                                            workers,
                                            device,
                                            system,
                                            delay,
                                            labels,
                                        });
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
        Ok(Self {
            sources,
            cases,
            sessions: names::sessions(&asked.sessions)?,
            noise: Noise {
                sigma: at_least_zero("noise", &asked.noise)?,
                bias: at_least_zero("bias", &asked.bias)?,
                seed: 0,
            },
            limit: asked.limit.as_deref().map(|text| whole("limit", text)).transpose()?,
            until: match &asked.until {
                Some(text) => Micros((above_zero("until", text)? * 1e6) as u64),
                None => Micros(u64::MAX),
            },
            slo: asked.slo.as_deref().map(slo).transpose()?,
            jobs: match &asked.jobs {
                Some(text) => whole("jobs", text)? as usize,
                None => std::thread::available_parallelism().map_or(1, NonZero::get),
            },
        })
    }
}

fn each<T>(name: &str, texts: &[String], read: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
    if texts.is_empty() {
        return Err(format!("{name} is empty"));
    }
    texts.iter().map(|text| read(text.trim())).collect()
}

/// A count of at least one.
pub fn whole(name: &str, text: &str) -> Result<u32, String> {
    let right = text.parse().ok().filter(|number| *number > 0);
    right.ok_or_else(|| format!("{name} must be a whole number of at least 1: {text}"))
}

fn at_least_zero(name: &str, text: &str) -> Result<f64, String> {
    let right = text.parse().ok().filter(|number: &f64| number.is_finite() && *number >= 0.0);
    right.ok_or_else(|| format!("{name} must be a number, 0 or more: {text}"))
}

/// A number above zero.
pub fn above_zero(name: &str, text: &str) -> Result<f64, String> {
    let right = text.parse().ok().filter(|number: &f64| number.is_finite() && *number > 0.0);
    right.ok_or_else(|| format!("{name} must be a number above 0: {text}"))
}

fn millis(name: &str, text: &str) -> Result<Micros, String> {
    Ok(Micros((at_least_zero(name, text)? * 1e3).round() as u64))
}

/// Two numbers with a colon between.
pub fn pair(name: &str, text: &str) -> Result<(f64, f64), String> {
    let wrong = || format!("{name} is two numbers with a colon between, 0 or more: {text}");
    let (first, second) = text.split_once(':').ok_or_else(wrong)?;
    let read = |text: &str| at_least_zero(name, text.trim()).map_err(|_| wrong());
    Ok((read(first)?, read(second)?))
}

fn slo(text: &str) -> Result<Slo, String> {
    let (ttft, tpot) = pair("slo", text)?;
    Ok(Slo { ttft, tpot })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked() -> Asked {
        Asked {
            synthetic: Some("sharegpt-like".into()),
            rate: Some("2".into()),
            cost_model: vec!["13b-a100".into()],
            ..Asked::default()
        }
    }

    fn list(text: &str) -> Vec<String> {
        text.split(',').map(str::to_owned).collect()
    }

    #[test]
    fn every_list_is_a_dimension() {
        let asked = Asked {
            workers: list("2,4"),
            policy: list("product,random"),
            scheduler: list("continuous,slice,scls"),
            commit: list("prefixes,load"),
            guard: list("on,off"),
            host_ms: list("0,1,3"),
            rate_scale: list("1,2"),
            seeds: "2".into(),
            ..asked()
        };
        let plan = Plan::new(&asked).expect("right");
        // continuous: 2 policies x 2 commits x 2 guards; slice: 2 policies; scls: one
        assert_eq!(plan.cases.len(), 2 * (8 + 2 + 1) * 3 * 2 * 2);
        let labels: std::collections::BTreeSet<String> =
            plan.cases.iter().map(|case| Value::Object(case.labels.clone()).to_string()).collect();
        assert_eq!(labels.len(), plan.cases.len(), "no run is told twice");
    }

    #[test]
    fn what_is_wrong_is_said_in_one_line() {
        type Change = fn(&mut Asked);
        let wrong: [(Change, &str); 16] = [
            (|a| a.workers = vec!["0".into()], "workers must be a whole number of at least 1: 0"),
            (|a| a.workers = vec!["-1".into()], "workers"),
            (|a| a.copies = Some("0".into()), "copies"),
            (|a| a.rate_scale = vec!["0".into()], "rate-scale must be a number above 0: 0"),
            (|a| a.rate_scale = vec!["inf".into()], "rate-scale"),
            (|a| a.rate = Some("0".into()), "rate must be a number above 0: 0"),
            (|a| a.seeds = "0".into(), "seeds"),
            (|a| a.delay_ms = vec!["-1".into()], "delay-ms"),
            (|a| a.scheduler = vec!["slise".into()], "did you mean slice?"),
            (|a| a.policy = vec!["produkt".into()], "did you mean product?"),
            (|a| a.cost_model = vec!["13b-a10".into()], "did you mean"),
            (|a| a.sessions = "half".into(), "sessions"),
            (|a| a.commit = vec!["all".into()], "commit"),
            (|a| a.synthetic = Some("sharegp".into()), "did you mean synthetic-sharegpt-like?"),
            (|a| a.synthetic = None, "--trace"),
            (|a| a.until = Some("0".into()), "until"),
        ];
        for (change, part) in wrong {
            let mut asked = asked();
            change(&mut asked);
            let said = Plan::new(&asked).expect_err(part);
            assert!(said.contains(part) && !said.contains('\n'), "{said}");
        }
        let many = Asked { seeds: "1000000".into(), ..asked() };
        assert!(Plan::new(&many).is_err_and(|said| said.contains("more than")));
    }
}
