//! What a grid came to: one object for files, one table for people.

use std::collections::BTreeSet;
use std::fmt::Write;

use router_sim::Dist;
use serde_json::{Map, Value, json};

/// Labels of a run, in the order of tables.
const LABELS: [&str; 11] = [
    "trace",
    "workers",
    "cost_model",
    "scheduler",
    "policy",
    "commit",
    "guard",
    "delay_ms",
    "host_ms",
    "start_ms",
    "rate_scale",
];

/// Columns of the table: head, figure, factor, digits.
const COLUMNS: [(&str, &str, f64, usize); 11] = [
    ("req/s", "throughput", 1.0, 2),
    ("tokens/s", "output_tokens_per_s", 1.0, 0),
    ("TTFT s", "ttft_mean", 1.0, 3),
    ("p99", "ttft_p99", 1.0, 2),
    ("TPOT ms", "tpot_mean", 1e3, 1),
    ("latency s", "latency_mean", 1.0, 2),
    ("p95", "latency_p95", 1.0, 2),
    ("hit %", "hit_ratio", 1e2, 1),
    ("max/mean b", "imbalance_b", 1.0, 2),
    ("spread s", "spread", 1.0, 1),
    ("unfinished", "unfinished", 1.0, 0),
];

/// Runs that differ in nothing but their seed.
pub struct Group<'a> {
    /// Those of its labels in which groups of this report differ, as text.
    pub label: String,
    /// Lines of the report.
    pub runs: Vec<&'a Map<String, Value>>,
}

impl Group<'_> {
    /// Mean of a figure over its seeds, and its standard error where there are several.
    pub fn mean(&self, figure: &str) -> Option<(f64, Option<f64>)> {
        let values: Vec<f64> = self.runs.iter().filter_map(|run| run.get(figure)?.as_f64()).collect();
        let number = values.len() as f64;
        let mean = Dist::of(values.clone())?.mean;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        Some((mean, (number > 1.0).then(|| (squares / (number * (number - 1.0))).sqrt())))
    }
}

/// Labels in which these runs differ.
pub fn varying(rows: &[Map<String, Value>]) -> Vec<&'static str> {
    // one that some runs do not have says nothing: their scheduler does
    let distinct = |label: &str| {
        let values = rows.iter().filter_map(|row| row.get(label).filter(|value| !value.is_null()));
        values.map(told).collect::<BTreeSet<_>>().len()
    };
    LABELS.into_iter().filter(|label| distinct(label) > 1).collect()
}

/// Groups in order of their first run, without the labels in `but`.
pub fn groups<'a>(rows: &'a [Map<String, Value>], but: &[&str]) -> Vec<Group<'a>> {
    let labels: Vec<&str> = varying(rows).into_iter().filter(|label| !but.contains(label)).collect();
    let mut groups: Vec<Group<'a>> = Vec::new();
    for row in rows {
        let label = labels.iter().filter_map(|label| labelled(label, row)).collect::<Vec<_>>().join(", ");
        match groups.iter_mut().find(|group| group.label == label) {
            Some(group) => group.runs.push(row),
            None => groups.push(Group { label, runs: vec![row] }),
        }
    }
    groups
}

/// A label that says what it is of, where its value does not.
fn labelled(label: &str, row: &Map<String, Value>) -> Option<String> {
    let value = row.get(label)?;
    match label {
        _ if value.is_null() => None,
        "workers" => Some(format!("{} workers", told(value))),
        "rate_scale" => Some(format!("{}x", told(value))),
        "guard" => Some(if value == &Value::Bool(true) { "guard".into() } else { "no guard".into() }),
        "commit" => Some(format!("commits {}", told(value))),
        "delay_ms" | "host_ms" | "start_ms" => Some(format!("{} {} ms", label.trim_end_matches("_ms"), told(value))),
        _ => Some(told(value)),
    }
}

fn told(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        // whole numbers without a point
        value => value.as_f64().map_or_else(|| value.to_string(), |number| number.to_string()),
    }
}

/// All of it, for files.
pub fn report(command: &str, rows: &[Map<String, Value>]) -> Value {
    json!({ "command": command, "runs": rows })
}

/// A line for each group; a figure of several seeds with its standard error.
pub fn table(rows: &[Map<String, Value>]) -> String {
    let groups = groups(rows, &[]);
    let columns: Vec<_> = COLUMNS
        .into_iter()
        .filter(|(_, figure, ..)| {
            *figure != "unfinished" || groups.iter().any(|group| group.mean(figure).is_some_and(|(mean, _)| mean > 0.0))
        })
        .collect();
    let mut lines = vec![columns.iter().map(|(head, ..)| (*head).to_owned()).collect::<Vec<_>>()];
    lines[0].insert(0, shared(rows));
    for group in &groups {
        let mut line = vec![group.label.clone()];
        for (_, figure, factor, digits) in &columns {
            line.push(group.mean(figure).map_or_else(
                || "-".to_owned(),
                |(mean, error)| {
                    let error = error.map(|error| format!(" ±{:.*}", digits, error * factor)).unwrap_or_default();
                    format!("{:.*}{error}", digits, mean * factor)
                },
            ));
        }
        lines.push(line);
    }
    aligned(&lines)
}

/// Labels that all runs share, for the head of the table.
fn shared(rows: &[Map<String, Value>]) -> String {
    let Some(first) = rows.first() else { return String::new() };
    let varying = varying(rows);
    let labels = ["trace", "workers", "cost_model", "scheduler", "policy"];
    let labels = labels.iter().filter(|label| !varying.contains(label)).filter_map(|label| labelled(label, first));
    labels.collect::<Vec<_>>().join(", ")
}

/// The first column to the left, the others to the right.
pub fn aligned(lines: &[Vec<String>]) -> String {
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let wide =
        |at: usize| lines.iter().filter_map(|line| line.get(at)).map(|cell| cell.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(wide).collect();
    let mut out = String::new();
    for line in lines {
        for (at, cell) in line.iter().enumerate() {
            // Writing to a string cannot fail.
            let _ =
                if at == 0 { write!(out, "{cell:<0$}", widths[0]) } else { write!(out, "  {cell:>0$}", widths[at]) };
        }
        out.truncate(out.trim_end().len());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(policy: &str, seed: u64, ttft: f64) -> Map<String, Value> {
        let row = json!({
            "trace": "t", "workers": 8, "cost_model": "m", "scheduler": "continuous", "policy": policy, "seed": seed,
            "throughput": 2.0, "ttft_mean": ttft, "unfinished": 0, "hit_ratio": 0.5, "tpot_mean": null,
        });
        row.as_object().cloned().unwrap_or_default()
    }

    #[test]
    fn runs_of_a_group_differ_in_their_seed_alone() {
        let rows = [row("product", 1, 1.0), row("product", 2, 2.0), row("random", 1, 4.0)];
        assert_eq!(varying(&rows), ["policy"]);
        let groups = groups(&rows, &[]);
        assert_eq!(groups.iter().map(|g| g.label.as_str()).collect::<Vec<_>>(), ["product", "random"]);
        assert_eq!(groups[0].mean("ttft_mean"), Some((1.5, Some(0.5))));
        assert_eq!(groups[1].mean("ttft_mean"), Some((4.0, None)));
        assert_eq!(groups[1].mean("tpot_mean"), None);
    }

    #[test]
    fn the_table_has_a_line_a_group() {
        let rows = [row("product", 1, 1.0), row("product", 2, 2.0), row("random", 1, 4.0)];
        let table = table(&rows);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 3, "{table}");
        assert!(lines[0].starts_with("t, 8 workers, m, continuous") && !lines[0].contains("unfinished"), "{table}");
        assert!(lines[1].starts_with("product ") && lines[1].contains("1.500 ±0.500") && lines[2].contains("4.000"));
        assert_eq!(super::table(&[]).lines().count(), 1);
    }
}
