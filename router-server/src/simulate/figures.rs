//! Which pictures a grid has.

use serde_json::{Map, Value};

use super::curves::Curves;
use super::figure::{Axis, Content, Figure, Line, Span};
use super::report::{Group, groups, varying};

/// More lines than this tell nothing apart.
const LINES: usize = 12;
/// Groups with a picture over time of their own.
const TIMED: usize = 6;
/// Workers with a line of their own; of more the fullest, the mean and the emptiest.
const WORKERS: usize = 16;

/// All of them, without those that would be empty. `curves` are those of `rows`, in the same order.
pub fn figures(rows: &[Map<String, Value>], curves: &[Curves]) -> Vec<Figure> {
    let all = groups(rows, &[]);
    // a group's picture is that of its first run
    let first =
        |group: &Group<'_>| rows.iter().position(|row| group.runs.first().is_some_and(|run| std::ptr::eq(*run, row)));
    let shown: Vec<(&Group<'_>, &Curves)> =
        all.iter().filter_map(|group| Some((group, curves.get(first(group)?)?))).collect();
    let mut figures = distributions(&shown);
    figures.extend(against_rate(rows));
    figures.extend(bars(&all));
    let imbalance = shown.iter().take(LINES).map(|(group, curves)| Line::new(&group.label, curves.imbalance()));
    figures.push(Figure {
        name: "imbalance".into(),
        title: titled("Fullest worker over the mean, in rows", shown.len()),
        x: Axis::new("seconds"),
        y: Axis::new("max / mean of b"),
        content: Content::Lines(imbalance.collect()),
    });
    for (at, (group, curves)) in shown.iter().take(TIMED).enumerate() {
        figures.push(batches(at, &group.label, curves));
        figures.push(lanes(at, &group.label, curves));
    }
    figures.retain(|figure| !figure.content.is_empty());
    figures
}

fn titled(title: &str, groups: usize) -> String {
    if groups > LINES { format!("{title} (the first {LINES} of {groups})") } else { title.to_owned() }
}

fn with_label(title: &str, label: &str) -> String {
    if label.is_empty() { title.to_owned() } else { format!("{title}: {label}") }
}

fn distributions(shown: &[(&Group<'_>, &Curves)]) -> Vec<Figure> {
    let names = [("ttft", "Time to first token"), ("tpot", "Time per output token"), ("latency", "Latency")];
    let one = |(at, (name, title)): (usize, (&str, &str))| {
        let line = |(group, curves): &(&Group<'_>, &Curves)| {
            let values = &curves.distributions[at];
            let share = |point: usize| 100.0 * point as f64 / (values.len() - 1).max(1) as f64;
            Line::new(&group.label, values.iter().enumerate().map(|(point, value)| (*value, share(point))).collect())
        };
        Figure {
            name: format!("{name}-cdf"),
            title: titled(title, shown.len()),
            x: Axis::log("seconds"),
            y: Axis::new("% of requests"),
            content: Content::Lines(shown.iter().take(LINES).map(line).collect()),
        }
    };
    names.into_iter().enumerate().map(one).collect()
}

/// Figures over the offered rate, where a grid has several.
fn against_rate(rows: &[Map<String, Value>]) -> Vec<Figure> {
    if !varying(rows).contains(&"rate_scale") {
        return Vec::new();
    }
    let all = groups(rows, &["rate_scale"]);
    let wanted = [
        ("throughput", "Throughput", "requests / s", false),
        ("ttft_mean", "Mean time to first token", "seconds", true),
        ("tpot_mean", "Mean time per output token", "seconds", true),
        ("latency_mean", "Mean latency", "seconds", true),
        ("hit_ratio", "Prompt tokens found cached", "share", false),
        ("imbalance_b", "Fullest worker over the mean, in rows", "max / mean of b", false),
    ];
    let one = |(name, title, label, log): (&str, &str, &str, bool)| {
        let line = |group: &Group<'_>| {
            // one point for each rate: the mean over seeds, and over what else a group has
            let owned: Vec<Map<String, Value>> = group.runs.iter().map(|run| (*run).clone()).collect();
            let point = |at: &Group<'_>| Some((at.mean("rate")?.0, at.mean(name)?.0));
            let mut points: Vec<(f64, f64)> = groups(&owned, &[]).iter().filter_map(point).collect();
            points.sort_by(|one, other| one.0.total_cmp(&other.0));
            Line::new(&group.label, points)
        };
        Figure {
            name: format!("{}-rate", name.trim_end_matches("_mean")),
            title: titled(&format!("{title} against the offered rate"), all.len()),
            x: Axis::new("offered requests / s"),
            y: if log { Axis::log(label) } else { Axis::new(label) },
            content: Content::Lines(all.iter().take(LINES).map(line).collect()),
        }
    };
    wanted.into_iter().map(one).collect()
}

fn bars(all: &[Group<'_>]) -> Vec<Figure> {
    let wanted = [
        ("throughput", "Throughput", "requests / s", 1.0),
        ("ttft_mean", "Mean time to first token", "seconds", 1.0),
        ("latency_mean", "Mean latency", "seconds", 1.0),
        ("hit_ratio", "Prompt tokens found cached", "%", 100.0),
    ];
    let one = |(name, title, label, factor): (&str, &str, &str, f64)| {
        let bar = |group: &Group<'_>| Some((group.label.clone(), group.mean(name)?.0 * factor));
        Figure {
            name: name.trim_end_matches("_mean").replace('_', "-"),
            title: title.into(),
            x: Axis::new(label),
            y: Axis::new(""),
            content: Content::Bars(all.iter().take(4 * LINES).filter_map(bar).collect()),
        }
    };
    wanted.into_iter().map(one).collect()
}

fn batches(at: usize, label: &str, curves: &Curves) -> Figure {
    let workers = curves.batches.iter().map(|(_, rows)| rows.len()).max().unwrap_or(0);
    let over_time = |of: &dyn Fn(&[u32]) -> Option<f64>| -> Vec<(f64, f64)> {
        curves.batches.iter().filter_map(|(at, rows)| Some((*at, of(rows)?))).collect()
    };
    let lines = if workers <= WORKERS {
        let one = |worker: usize| {
            let points = over_time(&|rows| rows.get(worker).map(|rows| f64::from(*rows)));
            Line::new(&format!("worker {worker}"), points)
        };
        (0..workers).map(one).collect()
    } else {
        let most = over_time(&|rows| rows.iter().max().map(|rows| f64::from(*rows)));
        let mean =
            over_time(&|rows| Some(rows.iter().map(|rows| f64::from(*rows)).sum::<f64>() / rows.len().max(1) as f64));
        let least = over_time(&|rows| rows.iter().min().map(|rows| f64::from(*rows)));
        vec![Line::new("fullest", most), Line::new("mean", mean), Line::new("emptiest", least)]
    };
    Figure {
        name: format!("batches-{}", at + 1),
        title: with_label("Batch size of each worker", label),
        x: Axis::new("seconds"),
        y: Axis::new("rows, running and waiting"),
        content: Content::Lines(lines),
    }
}

fn lanes(at: usize, label: &str, curves: &Curves) -> Figure {
    let shown = told_apart(&curves.lanes);
    let most = shown.iter().map(|lane| lane.rows).max().unwrap_or(1).max(1);
    let span = |lane: &router_sim::Lane| Span {
        lane: lane.worker,
        over: (lane.span.0.0 as f64 * 1e-6, lane.span.1.0 as f64 * 1e-6),
        weight: f64::from(lane.rows) / f64::from(most),
        marked: lane.cut,
    };
    Figure {
        name: format!("lanes-{}", at + 1),
        title: with_label("Slices as they ran; darker: more rows; dark edge: cut", label),
        x: Axis::new("seconds"),
        y: Axis::new("worker"),
        content: Content::Lanes(shown.iter().map(span).collect()),
    }
}

/// As long a part of the run's middle as has about so many spans in its busiest lane.
fn told_apart(lanes: &[router_sim::Lane]) -> Vec<router_sim::Lane> {
    const SPANS: usize = 60;
    let workers = lanes.iter().map(|lane| lane.worker + 1).max().unwrap_or(0);
    let of = |worker: u32| lanes.iter().filter(move |lane| lane.worker == worker);
    let busiest = (0..workers).max_by_key(|worker| of(*worker).count()).unwrap_or(0);
    let number = of(busiest).count();
    let mut middle = of(busiest).skip(number.saturating_sub(SPANS) / 2).take(SPANS);
    let Some(from) = middle.next().map(|lane| lane.span.0) else { return Vec::new() };
    let to = middle.last().map_or(from, |lane| lane.span.1);
    let within = |lane: &&router_sim::Lane| number <= SPANS || (lane.span.1 >= from && lane.span.0 <= to);
    lanes.iter().filter(within).copied().collect()
}
