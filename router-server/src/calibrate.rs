//! `scls-router calibrate`: a worker process that measures what iterations cost on this machine, and what came of it.
//!
//! The measuring is the worker's, and so is the file: `up --cost-model` gives it back to workers. This module starts the
//! process, lets its progress through, and reads the few figures that people want to see.

use std::fmt::Write;
use std::path::Path;
use std::process::{ExitStatus, Stdio};

use serde_json::{Map, Value};
use tokio::process::{Child, Command};

use crate::cli::CalibrateArgs;
use crate::run::Failure;

/// A worker's exit code where what it was asked for cannot be done.
const WRONG: i32 = 2;

/// Runs the worker to its end and tells what it measured.
pub async fn run(args: &CalibrateArgs, python: &Path) -> Result<String, Failure> {
    let mut child = spawn(args, python).map_err(|error| format!("cannot run {}: {error}", python.display()))?;
    let status = child.wait().await.map_err(|error| error.to_string())?;
    outcome(status)?;
    let written = std::fs::read_to_string(&args.out).map_err(|error| error.to_string());
    let written = written.and_then(|text| serde_json::from_str(&text).map_err(|error| error.to_string()));
    let told = written.and_then(|written: Value| summary(&written).ok_or_else(|| "it holds no fit".to_owned()));
    let told = told.map_err(|why| format!("cannot read what the worker wrote to {}: {why}", args.out.display()))?;
    let (model, out) = (args.model.display(), args.out.display());
    Ok(format!("{told}written to {out}\nscls-router up --model {model} --cost-model {out}\n"))
}

fn spawn(args: &CalibrateArgs, python: &Path) -> std::io::Result<Child> {
    let mut command = Command::new(python);
    command.args(["-m", "scls_worker", "--model"]).arg(&args.model).arg("--calibrate").arg(&args.out);
    if let Some(device) = &args.device {
        command.args(["--device", device]);
    }
    command
        .args(args.worker_args.split_whitespace())
        .env_remove("SCLS_ROUTER_API_KEY")
        .env_remove("SCLS_ROUTER_FLEET_KEY")
        .stdin(Stdio::null())
        // Its progress stands on stderr; stdout is for what comes of it.
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
}

fn outcome(status: ExitStatus) -> Result<(), Failure> {
    const HINT: &str = "why may stand above; --python names the Python that has scls_worker";
    match status.code() {
        Some(0) => Ok(()),
        Some(WRONG) => Err(Failure::Usage(format!("the worker cannot be calibrated\n{HINT}"))),
        _ => Err(Failure::Run(format!("the worker ended before it was calibrated: {status}\n{HINT}"))),
    }
}

/// A fit off by more than this at its worst is no good: a router corrects a model by a factor of two at most.
const DOUBTFUL: f64 = 0.5;

/// What a calibration says, for people: `None` where it is none.
fn summary(written: &Value) -> Option<String> {
    let fit = &written["fit"];
    let text = |name: &str| written[name].as_str().unwrap_or("unknown");
    let points = written["grid"].as_array().map_or(0, Vec::len);
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ =
        writeln!(out, "{}, {}, {}, {}: {points} points", text("model"), text("layout"), text("device"), text("dtype"));
    for part in ["prefill", "step"] {
        let _ = writeln!(out, "  {part:<8} {}", coefficients(fit["model"][part].as_object()?)?);
    }
    let quality = |name: &str| fit[name].as_f64();
    let _ = writeln!(
        out,
        "  R2 {:.4}, mean error {:.1} %, p99 {:.1} %",
        quality("r2")?,
        100.0 * quality("mean_error")?,
        100.0 * quality("p99_error")?
    );
    if quality("p99_error")? > DOUBTFUL {
        let _ = writeln!(
            out,
            "  it misses its own samples: measure again while nothing else runs, with the threads of `up`"
        );
    }
    Some(out)
}

/// Each with its name, in microseconds.
fn coefficients(all: &Map<String, Value>) -> Option<String> {
    let one = |(name, value): (&String, &Value)| Some(format!("{name} {} us", significant(value.as_f64()? * 1e6)));
    Some(all.iter().map(one).collect::<Option<Vec<_>>>()?.join(", "))
}

/// Four digits that matter.
fn significant(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return value.to_string();
    }
    let places = (3.0 - value.abs().log10().floor()).clamp(0.0, 12.0);
    format!("{value:.*}", places as usize)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_calibration_is_told_in_four_lines_and_a_fifth_if_it_is_poor() {
        let written = json!({
            "model": "airline-tiny", "model_digest": "m", "device": "cpu", "dtype": "float32", "layout": "paged",
            "fit": {
                "model": {
                    "layout": "paged",
                    "prefill": {"constant": 0.0, "per_token": 3.512_34e-5, "per_pair": 1.236e-11},
                    "step": {"constant": 0.003_214_6, "per_row": 5.0e-5, "per_context": 1.25e-6},
                },
                "r2": 0.99871, "mean_error": 0.0214, "p99_error": 0.098,
            },
            "grid": [{}, {}, {}],
        });
        let expected = "airline-tiny, paged, cpu, float32: 3 points\n  \
            prefill  constant 0 us, per_token 35.12 us, per_pair 0.00001236 us\n  \
            step     constant 3215 us, per_row 50.00 us, per_context 1.250 us\n  \
            R2 0.9987, mean error 2.1 %, p99 9.8 %\n";
        assert_eq!(summary(&written).as_deref(), Some(expected));
        let mut poor = written;
        poor["fit"]["p99_error"] = json!(0.94);
        assert!(summary(&poor).is_some_and(|said| said.contains("measure again")));
    }

    #[test]
    fn what_is_no_calibration_is_none() {
        for wrong in
            [json!(null), json!({}), json!({"fit": 5}), json!({"fit": {"model": {"prefill": {}, "step": {"a": "b"}}}})]
        {
            assert_eq!(summary(&wrong), None, "{wrong}");
        }
    }
}
