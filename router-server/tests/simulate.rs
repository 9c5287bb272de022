//! `scls-router simulate` and `doctor` as processes: what they write, and what they say of bad input.

#![allow(missing_docs, clippy::unwrap_used)]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

fn binary(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_scls-router"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(args: &[&str]) -> Output {
    binary(args).output().unwrap()
}

/// A folder of its own, gone at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("scls-simulate-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.0.join(name);
        fs::write(&path, bytes).unwrap();
        path.display().to_string()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A request each 100 ms of 20 blocks, the first of which all share.
fn shared(requests: u64) -> String {
    let line = |at: u64| {
        let blocks: Vec<u64> = (0..20).map(|depth| if depth < 16 { depth } else { 100 + at * 20 + depth }).collect();
        let (seconds, blocks) = (at as f64 / 10.0, serde_json::to_string(&blocks).unwrap());
        format!(r#"{{"arrival_s": {seconds}, "input_tokens": 320, "output_tokens": 20, "block_hashes": {blocks}}}"#)
    };
    let lines: Vec<String> = (0..requests).map(line).collect();
    format!("{{\"trace\": \"shared\", \"block_size\": 16}}\n{}\n", lines.join("\n"))
}

fn gzipped(bytes: &[u8]) -> Vec<u8> {
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(bytes).unwrap();
    packed.finish().unwrap()
}

fn smoke() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../bench/traces/mooncake_conversation_smoke.jsonl.gz")
}

#[test]
fn bad_input_is_one_line_and_exit_code_2() {
    let folder = Folder::new("bad");
    let gzip = fs::read(smoke()).unwrap();
    let truncated = folder.file("truncated.jsonl.gz", &gzip[..gzip.len() / 2]);
    let columns = folder.file("columns.csv", b"TIMESTAMP,ContextTokens\n2023-11-16 18:15:46.6805900,374\n");
    let request = r#""input_tokens": 5, "output_tokens": 2"#;
    let negative = folder.file("negative.jsonl", format!(r#"{{"arrival_s": -1, {request}}}"#).as_bytes());
    let unsorted = format!("{{\"arrival_s\": 2, {request}}}\n{{\"arrival_s\": 1, {request}}}\n");
    let unsorted = folder.file("unsorted.jsonl", unsorted.as_bytes());
    let empty = folder.file("empty.jsonl", b"");
    let good = folder.file("good.jsonl", shared(5).as_bytes());
    let lengths = folder.file("lengths.jsonl", format!("{{\"arrival_s\": 0, {request}}}\n").as_bytes());
    let device = folder.file("device.toml", b"kv = 0\n");
    let plain = folder.file("plain", b"");
    let out = format!("{plain}/out");
    // a hundred million empty lines, in as many bytes as a page
    let bomb = folder.file("bomb.jsonl.gz", &gzipped(&vec![b'\n'; 100 << 20]));
    let nul = folder.file("nul.jsonl", &[0; 4096]);
    let deep = folder.file("deep.jsonl", "{\"arrival_s\":".repeat(100_000).as_bytes());
    let long = folder.file("long.jsonl", &vec![b'x'; 10_000_000]);
    let cases: &[(&[&str], &str)] = &[
        (&["--trace", &truncated], "gzip"),
        (&["--trace", &columns], "GeneratedTokens"),
        (&["--trace", &negative], "-1"),
        (&["--trace", &unsorted], "line 2"),
        (&["--trace", &empty], "empty.jsonl"),
        (&["--trace", "no-such-file.jsonl"], "cannot read no-such-file.jsonl"),
        (&["--trace", &good, "--policy", "produkt"], "did you mean product?"),
        (&["--trace", &good, "--policy", "linear@7"], "linear"),
        (&["--trace", &good, "--scheduler", "slise"], "did you mean slice?"),
        (&["--trace", &good, "--workers", "0"], "workers must be a whole number of at least 1: 0"),
        (&["--trace", &good, "--workers", "4,x"], "workers"),
        (&["--trace", &good, "--rate-scale", "0"], "rate-scale must be a number above 0: 0"),
        (&["--trace", &good, "--cost-model", "7b-h2O"], "did you mean 7b-h20?"),
        (&["--trace", &good, "--cost-model", &device], "device"),
        (&["--trace", &good, "--window", "5"], "window"),
        (&["--trace", &good, "--window", "500:600"], "no requests"),
        (&["--trace", &good, "--out", &out], "cannot write"),
        (&["--trace", &good, "--commit", "none", "--guard", "on"], "guard"),
        (&["--trace", &good, "--synthetic", "sharegpt-like", "--rate", "1"], "do not go together"),
        (&["--synthetic", "sharegpt-like", "--rate", "0"], "rate must be a number above 0: 0"),
        (&["--synthetic", "sharegpt-like"], "--rate"),
        (&[], "--trace"),
        (&["--validate", &good], "good.jsonl"),
        (&["--validate", &good, "--out", &plain], "--validate writes no files"),
        (&["--validate", "/dev/zero"], "bytes"),
        (&["--trace", &good, "--cost-model", "/dev/zero"], "bytes"),
        (&["--trace", &good, "--workers", "-1"], "workers must be a whole number of at least 1: -1"),
        (&["--trace", &good, "--delay-ms", "-1,2"], "delay-ms must be a number, 0 or more: -1"),
        (&["--trace", &good, "--window", "-5:9"], "window"),
        (&["--trace", &good, "--noise", "1e300"], "noise must be at most 2"),
        (&["--trace", &good, "--out", &plain], "cannot write to"),
        (&["--trace", &good, "--out", "/proc/none"], "cannot write to /proc/none"),
        (&["--trace", &good, "--rate-scale", "1e300"], "rate-scale must be at most"),
        (&["--trace", &good, "--seeds", "1000000"], "a grid of 1000000 runs"),
        (&["--synthetic", "agents", "--rate", "1e6", "--seconds", "1e6"], "more than 10 million requests"),
        (&["--synthetic", "agents", "--rate", "1e12", "--seconds", "1e12"], "at most"),
        (&["--trace", &bomb], "no requests"),
        (&["--trace", &nul], "nul.jsonl"),
        (&["--trace", &deep], "deep.jsonl"),
        (&["--trace", &long], "long.jsonl"),
    ];
    for (args, part) in cases {
        let done = run(&[&["simulate"], *args].concat());
        let said = String::from_utf8(done.stderr).unwrap();
        assert_eq!(done.status.code(), Some(2), "{args:?}: {said}");
        assert!(said.starts_with("error: ") && said.contains(part), "{args:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{args:?}: {said}");
        assert!(done.stdout.is_empty(), "{args:?}");
    }
    for (args, part) in [(&lengths, "no block hashes"), (&truncated, "gzip")] {
        let done = run(&["doctor", "--trace", args]);
        let said = String::from_utf8(done.stderr).unwrap();
        assert_eq!((done.status.code(), said.lines().count()), (Some(2), 1), "{said}");
        assert!(said.contains(part), "{said}");
    }
}

fn report(args: &[&str]) -> Value {
    let done = run(args);
    assert_eq!(done.status.code(), Some(0), "{}", String::from_utf8_lossy(&done.stderr));
    assert!(done.stderr.is_empty(), "no bar where nobody sees it: {}", String::from_utf8_lossy(&done.stderr));
    serde_json::from_slice(&done.stdout).unwrap()
}

/// Without the wall-clock time, the one figure that two runs need not share.
fn figures(report: &Value) -> Vec<Value> {
    let mut runs = report["runs"].as_array().unwrap().clone();
    for run in &mut runs {
        run["wall_s"] = Value::Null;
    }
    runs
}

#[test]
fn a_grid_is_the_same_whatever_runs_beside_what() {
    let folder = Folder::new("grid");
    let trace = folder.file("shared.jsonl", shared(200).as_bytes());
    let grid = ["simulate", "--trace", &trace, "--workers", "2,3", "--scheduler", "continuous,slice,scls"];
    let grid = [&grid[..], &["--policy", "product,random", "--seeds", "2", "--json", "--jobs"]].concat();
    let (one, four) = (report(&[&grid[..], &["1"]].concat()), report(&[&grid[..], &["4"]].concat()));
    assert_eq!(figures(&one), figures(&four));
    // 2 fleets of continuous and slice with 2 policies each and scls with none, 2 seeds
    assert_eq!(figures(&one).len(), 2 * 5 * 2);
    for run in figures(&one) {
        assert_eq!(run["trace"], "shared");
        assert_eq!(run["unfinished"], 0, "{run}");
        assert!(run["ttft_mean"].as_f64().unwrap() > 0.0 && run["throughput"].as_f64().unwrap() > 0.0, "{run}");
        assert_eq!(run["policy"].is_null(), run["scheduler"] == "scls", "{run}");
    }
    let hits = |run: &Value| run["hit_ratio"].as_f64().unwrap();
    assert!(figures(&one).iter().filter(|run| run["scheduler"] == "continuous").all(|run| hits(run) > 0.5));
}

#[test]
fn a_folder_gets_report_page_and_pictures() {
    let folder = Folder::new("out");
    let trace = folder.file("shared.jsonl", shared(100).as_bytes());
    let out = folder.0.join("deep/out");
    let args =
        ["simulate", "--trace", &trace, "--workers", "2", "--scheduler", "continuous,slice", "--rate-scale", "1,2"];
    let done = run(&[&args[..], &["--out", out.to_str().unwrap()]].concat());
    let said = String::from_utf8(done.stdout).unwrap();
    assert_eq!(done.status.code(), Some(0), "{}", String::from_utf8_lossy(&done.stderr));
    assert_eq!(said.lines().count(), 5, "{said}");
    let written: Value = serde_json::from_slice(&fs::read(out.join("report.json")).unwrap()).unwrap();
    assert_eq!(written["runs"].as_array().unwrap().len(), 4);
    assert!(written["command"].as_str().unwrap().starts_with("scls-router simulate --trace"));
    let page = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(!page.contains("<script") && !page.contains("src=") && !page.contains("href="), "it opens by itself");
    for name in
        ["ttft-cdf", "tpot-cdf", "latency-cdf", "imbalance", "hit-ratio", "throughput-rate", "batches-1", "lanes-3"]
    {
        let bytes = fs::read(out.join(format!("{name}.png"))).unwrap();
        assert!(bytes.starts_with(b"\x89PNG"), "{name}");
        assert!(page.contains(&format!("<figure id=\"{name}\"><svg")), "{name}");
    }
}

#[test]
fn ctrl_c_ends_it_quickly_with_what_has_run() {
    let grid = ["simulate", "--synthetic", "sharegpt-like", "--rate", "40", "--seconds", "2000", "--workers", "8"];
    let mut child =
        binary(&[&grid[..], &["--scheduler", "slice", "--seeds", "50", "--jobs", "2"]].concat()).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(2));
    let began = Instant::now();
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(1));
    assert!(began.elapsed() < Duration::from_secs(20), "it went on for {:?}", began.elapsed());
    let said = std::io::read_to_string(child.stderr.take().unwrap()).unwrap();
    assert!(said.contains("ended by a signal: ") && said.contains("of 50 runs are done"), "{said}");
}

#[test]
fn the_doctor_finds_a_burst_and_nothing_in_a_quiet_trace() {
    let folder = Folder::new("doctor");
    // all share 16 blocks from the first on: a few workers hold them, until the product has spread them
    let crowded = folder.file("crowded.jsonl", shared(400).as_bytes());
    let done = run(&["doctor", "--trace", &crowded, "--workers", "8"]);
    let said = String::from_utf8(done.stdout).unwrap();
    assert_eq!(done.status.code(), Some(0));
    assert!(said.contains("minutes break the safe condition") && said.contains("|M|"), "{said}");
    let out = folder.0.join("out");
    let quiet = smoke().display().to_string();
    let report = report(&["doctor", "--trace", &quiet, "--workers", "4", "--json", "--out", out.to_str().unwrap()]);
    assert!(report["verdict"].as_str().unwrap().starts_with("safe"), "{report}");
    assert!(report["minutes"].as_array().unwrap().iter().all(|minute| minute["safe"] == true), "{report}");
    assert!(fs::read(out.join("doctor.png")).unwrap().starts_with(b"\x89PNG"));
}

#[test]
fn the_doctor_takes_hours_without_requests_for_nothing() {
    let folder = Folder::new("hours");
    let line = |at: f64| {
        format!(r#"{{"arrival_s": {at}, "input_tokens": 64, "output_tokens": 2, "block_hashes": [1, 2, 3, 4]}}"#)
    };
    let text = format!("{{\"block_size\": 16}}\n{}\n{}\n", line(0.0), line(1e12));
    let trace = folder.file("hours.jsonl", text.as_bytes());
    let report = report(&["doctor", "--trace", &trace, "--json"]);
    assert_eq!(report["minutes"].as_array().unwrap().len(), 2, "{report}");
}

#[test]
fn two_runs_into_a_folder_leave_whole_files() {
    let folder = Folder::new("both");
    let trace = folder.file("shared.jsonl", shared(60).as_bytes());
    let out = folder.0.join("out");
    let args = ["simulate", "--trace", &trace, "--workers", "2", "--out", out.to_str().unwrap()];
    let runs: Vec<_> = (0..4).map(|_| binary(&args).spawn().unwrap()).collect();
    for run in runs {
        let done = run.wait_with_output().unwrap();
        assert_eq!(done.status.code(), Some(0), "{}", String::from_utf8_lossy(&done.stderr));
    }
    let written: Value = serde_json::from_slice(&fs::read(out.join("report.json")).unwrap()).unwrap();
    assert_eq!(written["runs"].as_array().unwrap().len(), 1);
    let page = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.starts_with("<!doctype html>") && page.trim_end().ends_with("</html>"));
    let left = fs::read_dir(&out).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
    let left: Vec<String> = left.filter(|name| name.starts_with('.')).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn what_has_run_is_told_where_its_folder_goes_away() {
    let folder = Folder::new("gone");
    let out = folder.0.join("out");
    // a folder in the place of a file
    fs::create_dir_all(out.join("report.html")).unwrap();
    let trace = folder.file("shared.jsonl", shared(20).as_bytes());
    let done = run(&["simulate", "--trace", &trace, "--out", out.to_str().unwrap()]);
    let said = String::from_utf8(done.stderr).unwrap();
    assert_eq!((done.status.code(), said.lines().count()), (Some(1), 1), "{said}");
    assert!(said.contains("report.html"), "{said}");
    assert!(String::from_utf8(done.stdout).unwrap().starts_with("shared"));
}

#[test]
fn every_scheduler_has_its_host_time_and_moves() {
    let folder = Folder::new("host");
    let trace = folder.file("shared.jsonl", shared(60).as_bytes());
    let args = ["simulate", "--trace", &trace, "--workers", "2", "--scheduler", "continuous,ils,slice,scls,sls@8"];
    let report = report(&[&args[..], &["--json", "--host-ms", "3", "--start-ms", "1"]].concat());
    for run in figures(&report) {
        assert!(run["host_us_per_token"].as_f64().unwrap() > 0.0, "{run}");
        assert_eq!(run["moves"].is_null(), run["scheduler"] == "continuous", "{run}");
    }
}
