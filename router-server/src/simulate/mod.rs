//! `scls-router simulate`: the grid of a command line over threads, and what comes of it. Time in a run is virtual; files,
//! threads, progress and pictures are here, all else is `router-sim`.

mod args;
mod execute;
mod inputs;
mod names;
mod plan;
mod progress;
mod report;
mod validate;

use std::path::Path;
use std::sync::atomic::AtomicBool;

use serde_json::{Map, Value};

pub use args::{Asked, DoctorArgs, SimulateArgs};
pub use execute::{Done, Watch, execute};
pub use plan::Plan;

use crate::run::Failure;
use progress::Progress;

/// Runs what is asked for and returns what is to be printed. `stop` ends it early, with what has run; `command` is told in
/// the report.
pub fn run(args: &SimulateArgs, command: &str, stop: &AtomicBool) -> Result<String, Failure> {
    if let Some(file) = &args.validate {
        return validate::run(file, args.json);
    }
    let plan = Plan::new(&args.asked).map_err(Failure::Usage)?;
    if let Some(out) = &args.out {
        writable(out).map_err(Failure::Usage)?;
    }
    let progress = Progress::new(&plan, stop);
    let done = execute(&plan, &progress, &|done| done.row).map_err(Failure::Usage)?;
    progress.finish();
    let rows: Vec<Map<String, Value>> = done.into_iter().map(|(_, row)| row).collect();
    let report = report::report(command, &rows);
    if let Some(out) = &args.out {
        write(&out.join("report.json"), format!("{report:#}\n").as_bytes())?;
    }
    let said = if args.json { format!("{report:#}\n") } else { report::table(&rows) };
    if rows.len() < plan.cases.len() {
        let (done, all) = (rows.len(), plan.cases.len());
        return Err(Failure::Early(said, format!("ended by a signal: {done} of {all} runs are done")));
    }
    Ok(said)
}

/// Makes the folder, if it is not there, and sees whether a file can be in it.
fn writable(out: &Path) -> Result<(), String> {
    let wrong = |error: std::io::Error| format!("cannot write to {}: {error}", out.display());
    std::fs::create_dir_all(out).map_err(wrong)?;
    let probe = out.join(".scls-router");
    std::fs::write(&probe, b"").and_then(|()| std::fs::remove_file(&probe)).map_err(wrong)
}

fn write(file: &Path, bytes: &[u8]) -> Result<(), Failure> {
    let wrong = |error: std::io::Error| Failure::Run(format!("cannot write {}: {error}", file.display()));
    std::fs::write(file, bytes).map_err(wrong)
}
