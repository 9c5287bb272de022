//! A hotspot burst over a trace, the guard off and on, decision by decision: JSON rows for `bench/figures/e5_hotspot.py`.
//!
//! `hotspot TRACE RATE_SCALE SHARE SHARED WORKERS SEEDS`: from a third of the trace on, for 60 s, so many requests come beside
//! it that they are SHARE of all, and have their first SHARED tokens in common, with 32 of their own and answers of 100.
//! A SHARE of 0 is the trace alone.

use std::process::exit;

use router_core::{Choice, Commit, Guarding, Micros, Tokens};
use router_sim::{Burst, Device, Fleet, Noise, Record, Run, Sessions, System, Trace, follow};

const SECONDS: f64 = 60.0;

/// What the guard did to the burst's requests.
#[derive(Default)]
struct Story {
    /// Requests of the burst so far, and workers that got one.
    requests: u64,
    holders: u64,
    /// At the first alarm and at the first filtered request: requests of the burst, and holders by then.
    alarm: Option<(u64, u64)>,
    filtered: Option<(u64, u64)>,
    /// The last alarm of the burst's class, and how many requests of it were filtered.
    last_alarm: Micros,
    count: u64,
}

impl Story {
    fn decided(&mut self, at: Micros, choice: &Choice) {
        self.requests += 1;
        let Some(sighting) = choice.guard else { return };
        if sighting.alarm {
            self.alarm.get_or_insert((self.requests, sighting.holders.into()));
            self.last_alarm = at;
        }
        if sighting.filtered {
            self.filtered.get_or_insert((self.requests, sighting.holders.into()));
            self.count += 1;
        }
    }
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let Err(error) = run(&args) {
        eprintln!("{error}");
        exit(2);
    }
}

fn run(args: &[String]) -> Result<(), String> {
    let [file, scale, share, shared, workers, seeds, copies @ ..] = args else {
        return Err("hotspot TRACE RATE_SCALE SHARE SHARED WORKERS SEEDS [COPIES]".to_owned());
    };
    let number = |text: &str| text.parse::<f64>().map_err(|_| format!("not a number: {text}"));
    let (scale, share, shared) = (number(scale)?, number(share)?, number(shared)?);
    let (workers, seeds) = (number(workers)? as u32, number(seeds)? as u64);
    let copies = copies.first().map(|text| number(text)).transpose()?.map(|copies| copies as u32);
    let bytes = std::fs::read(file).map_err(|error| format!("{file}: {error}"))?;
    let read = Trace::read(file, &bytes, None).map_err(|error| error.to_string())?.trace;
    let device = Device::named("7b-h20").map_err(|error| error.to_string())?;
    for seed in 1..=seeds {
        let drawn = read.jittered(seed);
        let trace = copies.map_or_else(|| drawn.at_rate(scale, seed), |copies| drawn.in_copies(scale, copies, seed));
        let trace = trace.map_err(|error| error.to_string())?;
        let from = trace.requests.last().map_or(0.0, |last| last.at.0 as f64 * 1e-6 / 3.0).floor();
        let during = |at: Micros| (from..from + SECONDS).contains(&(at.0 as f64 * 1e-6));
        let beside = trace.requests.iter().filter(|request| during(request.at)).count() as f64 / SECONDS;
        let rate = beside * share / (1.0 - share).max(1e-9);
        let [shared, own, output] = [shared as u64, 32, 100].map(Tokens);
        let burst = Burst { from, seconds: SECONDS, rate, shared, own, output };
        let trace = if share > 0.0 { trace.with_burst(&burst, seed).map_err(|e| e.to_string())? } else { trace };
        for (policy, guard) in [
            ("product", false),
            ("product", true),
            ("product_anticipating", false),
            ("product_anticipating", true),
            ("jsq", false),
        ] {
            let fleet = Fleet {
                workers,
                device: device.clone(),
                slow: Vec::new(),
                noise: Noise::default(),
                delay: Micros::ZERO,
                lost: Vec::new(),
                joined: Vec::new(),
            };
            let run = Run {
                trace: &trace,
                fleet,
                system: System::Continuous {
                    policy: policy.to_owned(),
                    commit: Commit::Prefixes,
                    guard: if guard { Guarding::Filter } else { Guarding::Off },
                },
                sessions: Sessions::Closed,
                limit: u32::MAX,
                seed,
                until: Micros(20_000_000_000),
                sample_every: Micros::ZERO,
            };
            let hot = trace.classes.iter().position(|class| class == Burst::CLASS);
            let is_hot = |request: u32| Some(usize::from(trace.requests[request as usize].class)) == hot;
            let (mut story, mut holds) = (Story::default(), vec![false; workers as usize]);
            let mut decided = |at: Micros, request: u32, choice: &Choice| {
                if is_hot(request) {
                    story.decided(at, choice);
                    if !std::mem::replace(&mut holds[choice.at], true) {
                        story.holders += 1;
                    }
                }
            };
            let record = follow(&run, &mut |_| true, &mut decided).map_err(|error| error.to_string())?;
            let within = |at: Micros| (from..from + 2.0 * SECONDS).contains(&(at.0 as f64 * 1e-6));
            let all = ttft(&record, &|_, at| share == 0.0 || within(at));
            let hot = ttft(&record, &|request, _| is_hot(request));
            let last = record.served.len() - record.served.iter().filter(|row| row.ended > Micros::ZERO).count();
            let pair = |at: Option<(u64, u64)>| at.map_or("null".to_owned(), |(n, m)| format!("[{n}, {m}]"));
            println!(
                "{{\"policy\": \"{policy}\", \"guard\": {guard}, \"seed\": {seed}, \"from\": {from}, \"hot_rate\": {rate:.2}, \
                 \"hot\": {}, \"holders\": {}, \"all_mean\": {:.4}, \"all_p99\": {:.4}, \"hot_mean\": {:.4}, \"hot_p99\": {:.4}, \
                 \"alarms\": {}, \"filtered\": {}, \"hot_filtered\": {}, \"first_alarm\": {}, \"first_filtered\": {}, \
                 \"last_alarm\": {:.2}, \"unfinished\": {last}}}",
                story.requests,
                story.holders,
                all.0,
                all.1,
                hot.0,
                hot.1,
                record.guard.alarms,
                record.guard.filtered,
                story.count,
                pair(story.alarm),
                pair(story.filtered),
                (story.last_alarm.0 as f64 * 1e-6 - from).max(0.0),
            );
        }
    }
    Ok(())
}

/// Mean and 99th percentile of the requests chosen by number and arrival, in seconds.
fn ttft(record: &Record, chosen: &dyn Fn(u32, Micros) -> bool) -> (f64, f64) {
    let rows = record.served.iter().filter(|row| row.first > Micros::ZERO && chosen(row.request, row.arrived));
    let mut times: Vec<f64> = rows.map(|row| row.first.saturating_sub(row.arrived).0 as f64 * 1e-6).collect();
    times.sort_by(f64::total_cmp);
    let at = (times.len() * 99).div_ceil(100).saturating_sub(1);
    let mean = times.iter().sum::<f64>() / times.len().max(1) as f64;
    (mean, times.get(at).copied().unwrap_or(0.0))
}
