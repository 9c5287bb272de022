//! Runs the ablation and prints its table; `SCLS_BENCH_JSON` names a file for the report.
//!
//! Arguments: seconds of virtual time (default 600), seeds (default 3).

use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use router_core::{Mode, Pooled};
use router_sim::Lengths;
use router_sim::ablation::{Figures, Setup, at_saturation, spread};
use serde_json::{Value, json};

const WORKERS: u32 = 8;
/// Requests a second of the run that drains: above what the pooled modes serve, below what slices do.
const DRAINED: f64 = 31.0;
/// Within this a step counts as no loss.
const TIE: f64 = 0.98;

/// One mode on one distribution: figures and spread, means over the seeds.
struct Line {
    lengths: Lengths,
    mode: Mode,
    figures: Figures,
    spread: Option<f64>,
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let seconds: f64 = arguments.next().and_then(|text| text.parse().ok()).unwrap_or(600.0);
    let seeds: u64 = arguments.next().and_then(|text| text.parse().ok()).unwrap_or(3).max(1);
    let modes = [Pooled::sls(), Pooled::so(), Pooled::pm(), Pooled::ab(), Pooled::lb(), Pooled::scls()];
    let modes: Vec<Mode> = modes.map(Mode::Pooled).into_iter().chain([Mode::Ils, Mode::Slice]).collect();
    let mut jobs = Vec::new();
    for lengths in [Lengths::sharegpt_like(), Lengths::long_prompts()] {
        for seed in 1..=seeds {
            jobs.extend(modes.iter().map(|mode| (*mode, Setup { workers: WORKERS, seconds, seed, lengths })));
        }
    }
    let done = in_parallel(&jobs, |(mode, setup)| {
        let began = Instant::now();
        let drains = setup.lengths == Lengths::sharegpt_like();
        let half = Setup { seconds: setup.seconds / 2.0, ..*setup };
        let figures = at_saturation(*mode, setup);
        let spread = drains.then(|| spread(*mode, &half, DRAINED));
        let (name, seed, rate, took) = (setup.lengths.name, setup.seed, figures.throughput, began.elapsed());
        eprintln!("{name} {mode} seed {seed}: {rate:.2} req/s, {:.1} s", took.as_secs_f64());
        (figures, spread)
    });
    let mut lines = Vec::new();
    for lengths in [Lengths::sharegpt_like(), Lengths::long_prompts()] {
        for mode in &modes {
            let of = jobs.iter().zip(&done).filter(|((m, s), _)| m == mode && s.lengths == lengths);
            let of: Vec<&(Figures, Option<f64>)> = of.map(|(_, done)| done).collect();
            let mean = |get: fn(&Figures) -> f64| of.iter().map(|(f, _)| get(f)).sum::<f64>() / of.len() as f64;
            let figures = Figures {
                offered: mean(|f| f.offered),
                throughput: mean(|f| f.throughput),
                tokens: mean(|f| f.tokens),
                rows: mean(|f| f.rows),
                slices: mean(|f| f.slices),
                pad: mean(|f| f.pad),
                invalid: mean(|f| f.invalid),
                again: mean(|f| f.again),
                idle: mean(|f| f.idle),
                ttft: [mean(|f| f.ttft[0]), mean(|f| f.ttft[1])],
                latency: [mean(|f| f.latency[0]), mean(|f| f.latency[1])],
            };
            let spread = of.iter().map(|(_, spread)| *spread).sum::<Option<f64>>().map(|sum| sum / of.len() as f64);
            lines.push(Line { lengths, mode: *mode, figures, spread });
        }
    }
    print(&lines);
    let goals = goals(&lines);
    for goal in &goals {
        println!("{} {}: {}", if goal["holds"] == true { "pass" } else { "MISS" }, goal["goal"], goal["value"]);
    }
    if let Some(file) = std::env::var_os("SCLS_BENCH_JSON") {
        let report = report(&lines, &goals, seconds, seeds);
        std::fs::write(file, format!("{report:#}\n")).expect("the report is written");
    }
    ExitCode::from(u8::from(goals.iter().any(|goal| goal["holds"] != true)))
}

fn in_parallel<J: Sync, D: Send>(jobs: &[J], does: impl Fn(&J) -> D + Sync) -> Vec<D> {
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<(usize, D)>> = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, std::num::NonZero::get) {
            scope.spawn(|| {
                while let Some((at, job)) =
                    Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|at| Some((at, jobs.get(at)?)))
                {
                    let result = does(job);
                    done.lock().expect("no job panicked").push((at, result));
                }
            });
        }
    });
    let mut done = done.into_inner().expect("no job panicked");
    done.sort_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, result)| result).collect()
}

fn print(lines: &[Line]) {
    println!(
        "{:26} {:6} {:>7} {:>8} {:>6} {:>7} {:>6} {:>8} {:>6} {:>6} {:>7} {:>8} {:>7}",
        "lengths",
        "mode",
        "req/s",
        "tokens/s",
        "rows",
        "slices",
        "pad",
        "invalid",
        "again",
        "idle",
        "ttft s",
        "mean s",
        "std s"
    );
    for Line { lengths, mode, figures: f, spread } in lines {
        println!(
            "{:26} {:6} {:7.2} {:8.0} {:6.1} {:7.2} {:5.1}% {:7.1}% {:5.1}% {:5.1}% {:7.2} {:8.2} {:>7}",
            lengths.name,
            mode.as_str(),
            f.throughput,
            f.tokens,
            f.rows,
            f.slices,
            f.pad * 100.0,
            f.invalid * 100.0,
            f.again * 100.0,
            f.idle * 100.0,
            f.ttft[0],
            f.latency[0],
            spread.map_or(String::new(), |spread| format!("{spread:.2}")),
        );
    }
}

/// The paper's order where it is claimed: on the chats.
fn goals(lines: &[Line]) -> Vec<Value> {
    let of = |name: &str| {
        let mut chats = lines.iter().filter(|line| line.lengths == Lengths::sharegpt_like());
        chats.find(|line| line.mode.as_str() == name).expect("every mode ran")
    };
    let rate = |name: &str| of(name).figures.throughput;
    let mut goals = Vec::new();
    let mut goal = |goal: String, value: f64, bound: f64| {
        goals.push(json!({"goal": goal, "value": rounded(value), "op": ">=", "bound": bound, "holds": value >= bound}));
    };
    for (less, more) in [("sls", "so"), ("so", "pm"), ("pm", "ab")] {
        goal(format!("throughput {more} / {less}"), rate(more) / rate(less), 1.0);
    }
    for (before, step) in [("ab", "lb"), ("ab", "scls")] {
        goal(format!("throughput {step} / {before}"), rate(step) / rate(before), TIE);
    }
    let best = ["sls", "so", "pm", "ab", "lb", "scls"].into_iter().map(rate).fold(0.0, f64::max);
    goal("throughput slice / best of the pooled".into(), rate("slice") / best, 1.0);
    let std = |name: &str| of(name).spread.expect("the chats drain");
    goal("spread of completion times ab / lb".into(), std("ab") / std("lb"), 1.0);
    goals
}

/// What is printed is read: four digits after the point.
fn rounded(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

fn report(lines: &[Line], goals: &[Value], seconds: f64, seeds: u64) -> Value {
    let rows = lines.iter().map(|Line { lengths, mode, figures: f, spread }| {
        json!({
            "lengths": lengths.name, "mode": mode.as_str(), "offered_per_s": rounded(f.offered), "requests_per_s": rounded(f.throughput),
            "tokens_per_s": rounded(f.tokens), "rows_a_slice": rounded(f.rows), "slices_a_request": rounded(f.slices), "pad": rounded(f.pad),
            "invalid": rounded(f.invalid), "computed_again": rounded(f.again), "idle": rounded(f.idle), "ttft_mean_s": rounded(f.ttft[0]),
            "ttft_p95_s": rounded(f.ttft[1]), "latency_mean_s": rounded(f.latency[0]), "latency_p95_s": rounded(f.latency[1]),
            "completion_std_s": spread.map(rounded),
        })
    });
    let says = |command: &str, arguments: &[&str]| {
        let output = Command::new(command).args(arguments).output().ok();
        output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = cpus
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": ").map(|(_, name)| name.to_owned()));
    json!({
        "name": "ablation", "command": "make ablation", "kind": "virtual time, derived costs: no GPU was run",
        "commit": says("git", &["rev-parse", "--short", "HEAD"]), "when": says("date", &["-u", "+%F"]),
        "machine": {"cpu": cpu, "cores": std::thread::available_parallelism().map_or(1, std::num::NonZero::get)},
        "workers": WORKERS, "worker": "13b-a100", "seconds": seconds, "seeds": seeds, "drained_per_s": DRAINED,
        "rows": rows.collect::<Vec<_>>(), "goals": goals,
    })
}
