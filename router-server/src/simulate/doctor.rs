//! `scls-router doctor`: when the requests of a trace crowd on few holders of a prefix.
//!
//! The trace is routed by the product, its engines modelled, with the hotspot guard on; what the guard sees at each decision
//! is kept by minute. A minute breaks the safe condition if in it a class's share of the requests was more than the share of
//! workers that hold it (`docs/hotspot.md`).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use router_core::{Micros, Sighting};
use router_sim::{Trace, follow};
use serde_json::{Value, json};

use super::args::{Asked, DoctorArgs};
use super::execute::run_of;
use super::figure::{Axis, Content, Figure, Line};
use super::inputs::line;
use super::plan::Plan;
use super::{Failure, put, report, writable};

const MINUTE: Micros = Micros(60_000_000);
/// Minutes that are all told.
const MOST_LINES: usize = 120;

/// What the guard saw in a minute.
#[derive(Clone, Copy, Debug, Default)]
struct Minute {
    /// Decisions.
    requests: u64,
    /// Of these, of a class that was not safe.
    unsafe_requests: u64,
    /// Of these, kept from its holders.
    filtered: u64,
    /// Where the holders' part was largest, among classes that some hold and some do not.
    worst: Option<Sighting>,
}

impl Minute {
    fn saw(&mut self, sighting: Option<Sighting>) {
        self.requests += 1;
        let Some(sighting) = sighting else { return };
        self.unsafe_requests += u64::from(sighting.alarm);
        self.filtered += u64::from(sighting.filtered);
        // where all hold it, or nobody yet, there is nobody to crowd on
        if (1..sighting.workers).contains(&sighting.holders)
            && self.worst.is_none_or(|worst| sighting.pressure() > worst.pressure())
        {
            self.worst = Some(sighting);
        }
    }

    fn ratio(&self) -> f64 {
        self.worst.map_or(0.0, |worst| worst.pressure())
    }

    fn breaks(&self) -> bool {
        self.unsafe_requests > 0
    }

    fn json(&self, minute: u64) -> Value {
        json!({
            "minute": minute,
            "requests": self.requests,
            "unsafe_requests": self.unsafe_requests,
            "filtered": self.filtered,
            "share": self.worst.map(|worst| worst.share()),
            "holders": self.worst.map(|worst| worst.holders),
            "workers": self.worst.map(|worst| worst.workers),
            "depth_blocks": self.worst.map(|worst| worst.depth.0),
            "ratio": self.worst.map(|worst| worst.pressure()),
            "safe": !self.breaks(),
        })
    }
}

/// Looks a trace over and returns what is to be printed.
pub fn run(args: &DoctorArgs, command: &str, stop: &AtomicBool) -> Result<String, Failure> {
    let asked = Asked {
        trace: vec![args.trace.clone()],
        workers: vec![args.workers.clone()],
        cost_model: vec![args.cost_model.clone()],
        rate_scale: vec![args.rate_scale.clone()],
        guard: vec!["on".into()],
        ..Asked::default()
    };
    let plan = Plan::new(&asked).map_err(Failure::Usage)?;
    let (Some(case), Some(source)) = (plan.cases.first(), plan.sources.first()) else {
        return Err(Failure::Usage("nothing to look over".into()));
    };
    if let Some(out) = &args.out {
        writable(out).map_err(Failure::Usage)?;
    }
    // as it was recorded: minutes are those of the file
    let recorded = source.recorded().filter(|_| (case.rate_scale - 1.0).abs() < f64::EPSILON);
    let trace = recorded.map_or_else(|| source.scaled(case.rate_scale, case.seed), |trace| Ok(trace.clone()));
    let trace = trace.map_err(Failure::Usage)?;
    if trace.blocks.is_empty() {
        let name = &source.name;
        return Err(Failure::Usage(format!("{name} has no block hashes: it is not known what its prompts share")));
    }
    let minutes = minutes(&plan, &trace, stop)?;
    let verdict = verdict(&minutes);
    let lines: Vec<Value> = minutes.iter().map(|(at, minute)| minute.json(*at)).collect();
    let report = json!({ "command": command, "trace": source.name, "verdict": verdict, "minutes": lines });
    let table = table(&minutes);
    let told = format!("{table}{verdict}\n");
    let said = if args.json { format!("{report:#}\n") } else { told.clone() };
    if let Some(out) = &args.out {
        let written = put(out, command, &report, &told, &[figure(&source.name, &minutes)]);
        written.map_err(|error| Failure::Early(said.clone(), error))?;
    }
    if stop.load(Ordering::Relaxed) {
        return Err(Failure::Early(said, "ended by a signal: what stands above is of the part that ran".into()));
    }
    Ok(said)
}

/// Those in which somebody came.
type Minutes = BTreeMap<u64, Minute>;

fn minutes(plan: &Plan, trace: &Trace, stop: &AtomicBool) -> Result<Minutes, Failure> {
    let mut minutes = Minutes::new();
    if let Some(case) = plan.cases.first() {
        let mut go_on = |_| !stop.load(Ordering::Relaxed);
        let mut decided = |at: Micros, _, choice: &router_core::Choice| {
            minutes.entry(at.0 / MINUTE.0).or_default().saw(choice.guard);
        };
        follow(&run_of(plan, case, trace), &mut go_on, &mut decided).map_err(|error| Failure::Usage(line(error)))?;
    }
    Ok(minutes)
}

fn verdict(minutes: &Minutes) -> String {
    let all = minutes.len();
    let broken = minutes.values().filter(|minute| minute.breaks()).count();
    let worst = highest(minutes);
    match broken {
        0 if worst > 0.0 => {
            format!("safe: in none of {all} minutes do requests crowd on few holders (ratio at most {worst:.2})")
        }
        0 => format!("safe: in none of {all} minutes is a prefix popular that some workers hold and some do not"),
        _ => {
            let requests: u64 = minutes.values().map(|minute| minute.unsafe_requests).sum();
            format!(
                "unsafe: {broken} of {all} minutes break the safe condition (ratio up to {worst:.2}), for {requests} requests"
            )
        }
    }
}

fn highest(minutes: &Minutes) -> f64 {
    minutes.values().map(Minute::ratio).fold(0.0, f64::max)
}

/// Minutes with a class that some workers hold and some do not; of very many those that break the condition, and the one
/// that comes nearest.
fn table(minutes: &Minutes) -> String {
    let head = ["minute", "requests", "x_c", "|M|", "n", "ratio x_c*n/|M|", "unsafe", ""];
    let mut lines = vec![head.map(str::to_owned).to_vec()];
    let nearest = highest(minutes);
    let all = minutes.values().filter(|minute| minute.worst.is_some()).count() <= MOST_LINES;
    for (at, minute) in minutes {
        let Some(worst) = minute.worst.filter(|_| all || minute.breaks() || minute.ratio() >= nearest) else {
            continue;
        };
        lines.push(vec![
            at.to_string(),
            minute.requests.to_string(),
            format!("{:.3}", worst.share()),
            worst.holders.to_string(),
            worst.workers.to_string(),
            format!("{:.2}", worst.pressure()),
            minute.unsafe_requests.to_string(),
            if minute.breaks() { "breaks it".into() } else { "safe".into() },
        ]);
    }
    if lines.len() == 1 { String::new() } else { report::aligned(&lines) }
}

fn figure(name: &str, minutes: &Minutes) -> Figure {
    let points = minutes.iter().map(|(at, minute)| (*at as f64, minute.ratio())).collect();
    let end = minutes.last_key_value().map_or(1, |(at, _)| (*at).max(1)) as f64;
    let bound = Line { bound: true, ..Line::new("safe up to here", vec![(0.0, 1.0), (end, 1.0)]) };
    Figure {
        name: "doctor".into(),
        title: format!("How many times their part holders get at worst: {name}"),
        x: Axis::new("minute"),
        y: Axis::new("x_c n / |M|, the worst class"),
        content: Content::Lines(vec![Line::new("ratio", points), bound]),
    }
}

#[cfg(test)]
mod tests {
    use router_core::{BlockHash, Blocks};

    use super::*;

    fn sighting(requests: u32, holders: u32, alarm: bool) -> Sighting {
        Sighting {
            class: BlockHash(1),
            depth: Blocks(4),
            requests,
            window: 100,
            workers: 10,
            holders,
            alarm,
            preferred: true,
            filtered: alarm,
        }
    }

    #[test]
    fn a_minute_is_told_by_its_worst_class() {
        let mut minute = Minute::default();
        for seen in [None, Some(sighting(90, 10, false)), Some(sighting(20, 4, false)), Some(sighting(50, 2, true))] {
            minute.saw(seen);
        }
        assert_eq!((minute.requests, minute.unsafe_requests, minute.filtered), (4, 1, 1));
        assert!((minute.ratio() - 2.5).abs() < 1e-12, "a class that all hold crowds on nobody");
        let quiet = Minute { requests: 3, ..Minute::default() };
        // nobody came between
        let both = Minutes::from([(0, quiet), (1 << 40, minute)]);
        let said = verdict(&both);
        assert!(said.starts_with("unsafe: 1 of 2 minutes break"), "{said}");
        let table = table(&both);
        assert_eq!(table.lines().count(), 2, "{table}");
        let cells: Vec<&str> = table.lines().last().unwrap_or_default().split_whitespace().collect();
        assert_eq!(cells, ["1099511627776", "4", "0.500", "2", "10", "2.50", "1", "breaks", "it"]);
        let quiet = Minutes::from([(0, quiet)]);
        assert!(verdict(&quiet).starts_with("safe"));
        assert_eq!(super::table(&quiet), "");
    }
}
