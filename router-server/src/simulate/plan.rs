//! From flags to runs: every value is checked here, before anything runs, and a wrong one is one line.

use std::collections::BTreeSet;
use std::num::NonZero;

use router_core::{Commit, Micros};
use router_sim::{Device, Noise, Sessions, Slo, System};
use serde_json::{Map, Value, json};

use super::args::Asked;
use super::inputs::{self, Source};
use super::names::{self, Scheduler};

/// Sixteen times the largest fleet that is measured: memory grows with it, whatever the trace.
const MOST_WORKERS: u32 = 1 << 16;

/// Most runs of a grid: more is a slip of the keys.
const MOST: usize = 100_000;

/// Requests of a run: some 200 bytes each.
const MOST_REQUESTS: f64 = 1e7;

/// Threads.
const MOST_JOBS: u32 = 256;

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
        let workers = each("workers", &asked.workers, |text| at_most("workers", text, MOST_WORKERS))?;
        let scales = each("rate-scale", &asked.rate_scale, |text| above_zero("rate-scale", text, 1e6))?;
        let delays = each("delay-ms", &asked.delay_ms, |text| millis("delay-ms", text))?;
        let [hosts, starts] = [("host-ms", &asked.host_ms), ("start-ms", &asked.start_ms)].map(|(name, texts)| {
            if texts.is_empty() { Ok(vec![None]) } else { each(name, texts, |text| millis(name, text).map(Some)) }
        });
        let times = product(&delays, &product(&hosts?, &starts?));
        let commits = each("commit", &asked.commit, |text| Ok((text.to_owned(), names::commit(text)?)))?;
        let guards = each("guard", &asked.guard, names::guard)?;
        let policies = each("policy", &asked.policy, |text| Ok(text.to_owned()))?;
        let seeds = whole("seeds", &asked.seeds)?;
        let sizes = [schedulers.len(), policies.len(), commits.len(), guards.len(), workers.len(), times.len()];
        let sizes = sizes.into_iter().chain([asked.cost_model.len(), asked.trace.len().max(1), scales.len()]);
        let all = sizes.fold(seeds as usize, usize::saturating_mul);
        if all > MOST {
            return Err(format!("a grid of {all} runs is more than {MOST}: ask for less at once"));
        }
        policies.iter().try_for_each(|policy| inputs::check_policy(policy, &schedulers))?;
        let ways = ways(&schedulers, &policies, &commits, &guards)?;
        let devices = each("cost-model", &asked.cost_model, inputs::device)?;
        let sources = inputs::sources(asked)?;
        for source in &sources {
            scales.iter().try_for_each(|scale| bounded(source, *scale))?;
        }
        let traces: Vec<(usize, &str)> = sources.iter().map(|source| source.name.as_str()).enumerate().collect();
        let seeds: Vec<u64> = (1..=u64::from(seeds)).collect();
        let fleets = product(&traces, &product(&workers, &devices));
        let loads = product(&times, &product(&scales, &seeds));
        let cases = product(&fleets, &product(&ways, &loads));
        let case = |((trace, fleet), (way, (times, draw)))| case(trace, fleet, way, times, draw);
        Ok(Self {
            cases: cases.into_iter().map(case).collect(),
            sessions: names::sessions(&asked.sessions)?,
            noise: Noise { sigma: sigma("noise", &asked.noise)?, bias: sigma("bias", &asked.bias)?, seed: 0 },
            limit: asked.limit.as_deref().map(|text| whole("limit", text)).transpose()?,
            until: match &asked.until {
                Some(text) => Micros((above_zero("until", text, 1e12)? * 1e6) as u64),
                None => Micros(u64::MAX),
            },
            slo: asked.slo.as_deref().map(slo).transpose()?,
            jobs: match &asked.jobs {
                Some(text) => at_most("jobs", text, MOST_JOBS)? as usize,
                None => std::thread::available_parallelism().map_or(1, NonZero::get),
            },
            sources,
        })
    }
}

/// A scheduler with all that goes with it.
#[derive(Clone)]
struct Way {
    system: System,
    /// Most rows of an engine.
    rows: Option<u32>,
    /// Labels: scheduler, policy, commit, guard.
    labels: [(&'static str, Value); 4],
}

/// Each scheduler with those policies, commits and guards that it asks: others would be the same run again.
fn ways(
    schedulers: &[(String, Scheduler)],
    policies: &[String],
    commits: &[(String, Option<Commit>)],
    guards: &[bool],
) -> Result<Vec<Way>, String> {
    let mut ways = Vec::new();
    for (name, scheduler) in schedulers {
        let (places, rows) = (scheduler.places(), scheduler.rows());
        let routed = matches!(scheduler, Scheduler::Continuous(_));
        let policies = if places { policies } else { &policies[..1] };
        let (commits, guards) = if routed { (commits, guards) } else { (&commits[..1], &guards[..1]) };
        for (policy, ((commit_name, commit), guard)) in product(policies, &product(commits, guards)) {
            let system = scheduler.system(&policy, commit, guard)?;
            let labels = [
                ("scheduler", json!(name)),
                ("policy", json!(places.then_some(policy))),
                ("commit", json!(routed.then_some(commit_name))),
                ("guard", json!(routed.then_some(guard))),
            ];
            ways.push(Way { system, rows, labels });
        }
    }
    Ok(ways)
}

type Times = (Micros, (Option<Micros>, Option<Micros>));

fn case(
    (source, trace): (usize, &str),
    (workers, device): (u32, Device),
    way: Way,
    (delay, (host, start)): Times,
    (rate_scale, seed): (f64, u64),
) -> Case {
    let (host, start) = (host.unwrap_or(device.host), start.unwrap_or(device.start));
    let max_rows = way.rows.map_or(device.max_rows, |rows| device.max_rows.min(rows));
    let ms = |time: Micros| json!(time.0 as f64 * 1e-3);
    let fleet = [("trace", json!(trace)), ("workers", json!(workers)), ("cost_model", json!(device.name))];
    let times = [("delay_ms", ms(delay)), ("host_ms", ms(host)), ("start_ms", ms(start))];
    let draw = [("rate_scale", json!(rate_scale)), ("seed", json!(seed))];
    let labels = fleet.into_iter().chain(way.labels).chain(times).chain(draw);
    let labels = labels.map(|(name, value)| (name.to_owned(), value)).collect();
    let device = Device { host, start, max_rows, ..device };
    Case { source, rate_scale, seed, workers, device, system: way.system, delay, labels }
}

/// Every one with every other, in order.
fn product<A: Clone, B: Clone>(ones: &[A], others: &[B]) -> Vec<(A, B)> {
    ones.iter().flat_map(|one| others.iter().map(move |other| (one.clone(), other.clone()))).collect()
}

/// Whether so many requests can be held.
pub fn bounded(source: &Source, scale: f64) -> Result<(), String> {
    let (requests, name) = (source.requests_at(scale), &source.name);
    if requests <= MOST_REQUESTS {
        return Ok(());
    }
    Err(format!(
        "{name} at {scale} times its rate is more than {:.0} million requests: ask for less time or a lower rate",
        MOST_REQUESTS * 1e-6
    ))
}

/// Values of a list, each once.
fn each<T>(name: &str, texts: &[String], read: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
    if texts.is_empty() {
        return Err(format!("{name} is empty"));
    }
    let mut seen = BTreeSet::new();
    texts.iter().map(|text| text.trim()).filter(|text| seen.insert(*text)).map(read).collect()
}

/// A count of at least one.
pub fn whole(name: &str, text: &str) -> Result<u32, String> {
    let right = text.parse().ok().filter(|number| *number > 0);
    right.ok_or_else(|| format!("{name} must be a whole number of at least 1: {text}"))
}

fn at_most(name: &str, text: &str, most: u32) -> Result<u32, String> {
    match whole(name, text)? {
        many if many > most => Err(format!("{name} are at most {most}: {text}")),
        many => Ok(many),
    }
}

fn at_least_zero(name: &str, text: &str, most: f64) -> Result<f64, String> {
    // no number is -0
    let right = text.parse().ok().filter(|number: &f64| number.is_finite() && *number >= 0.0).map(f64::abs);
    let number = right.ok_or_else(|| format!("{name} must be a number, 0 or more: {text}"))?;
    if number > most { Err(format!("{name} must be at most {most}: {text}")) } else { Ok(number) }
}

/// A number above zero.
pub fn above_zero(name: &str, text: &str, most: f64) -> Result<f64, String> {
    let right = text.parse().ok().filter(|number: &f64| number.is_finite() && *number > 0.0);
    let number = right.ok_or_else(|| format!("{name} must be a number above 0: {text}"))?;
    if number > most { Err(format!("{name} must be at most {most}: {text}")) } else { Ok(number) }
}

/// Of a quarter of an hour at most: nobody waits longer for a report or an iteration.
fn millis(name: &str, text: &str) -> Result<Micros, String> {
    Ok(Micros((at_least_zero(name, text, 1e6)? * 1e3).round() as u64))
}

/// Of a logarithm: at 2 one worker in six is 7 times as slow as the median.
fn sigma(name: &str, text: &str) -> Result<f64, String> {
    at_least_zero(name, text, 2.0)
}

/// Two numbers with a colon between.
pub fn pair(name: &str, text: &str) -> Result<(f64, f64), String> {
    let wrong = || format!("{name} is two numbers with a colon between, 0 or more: {text}");
    let (first, second) = text.split_once(':').ok_or_else(wrong)?;
    let read = |text: &str| at_least_zero(name, text.trim(), 1e12).map_err(|_| wrong());
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
    fn what_is_asked_for_twice_is_run_once() {
        let twice = Asked { policy: list("product,jsq,product"), workers: list("4,4"), ..asked() };
        assert_eq!(Plan::new(&twice).expect("right").cases.len(), 2);
    }

    #[test]
    fn what_is_wrong_is_said_in_one_line() {
        type Change = fn(&mut Asked);
        let wrong: [(Change, &str); 24] = [
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
            (|a| a.rate_scale = vec!["1e300".into()], "rate-scale must be at most 1000000: 1e300"),
            (|a| a.delay_ms = vec!["1e300".into()], "delay-ms must be at most 1000000: 1e300"),
            (|a| a.noise = "1e300".into(), "noise must be at most 2: 1e300"),
            (|a| a.bias = "-0.1".into(), "bias must be a number, 0 or more: -0.1"),
            (|a| a.jobs = Some("5000000".into()), "jobs are at most 256: 5000000"),
            (|a| (a.rate, a.seconds) = (Some("1e8".into()), "1e8".into()), "more than 10 million requests"),
            (|a| (a.rate, a.seconds) = (Some("1e12".into()), "1e12".into()), "must be at most"),
            (|a| (a.rate, a.rate_scale) = (Some("1000".into()), list("1,1000")), "at 1000 times its rate"),
        ];
        for (change, part) in wrong {
            let mut asked = asked();
            change(&mut asked);
            let said = Plan::new(&asked).expect_err(part);
            assert!(said.contains(part) && !said.contains('\n'), "{said}");
        }
        let minus = Asked { delay_ms: list("-0,-0.0,0"), ..asked() };
        assert!(Plan::new(&minus).is_ok_and(|plan| plan.cases.iter().all(|case| case.labels["delay_ms"] == 0.0)));
        let many = Asked { seeds: "1000000".into(), ..asked() };
        assert!(Plan::new(&many).is_err_and(|said| said.contains("more than")));
    }
}
