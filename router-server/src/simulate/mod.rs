//! `scls-router simulate` and `doctor`: the grid of a command line over threads, and what comes of it. Time in a run is
//! virtual; files, threads, progress and pictures are here, all else is `router-sim`.

mod args;
mod columns;
mod curves;
mod doctor;
mod execute;
mod figure;
mod figures;
mod html;
mod inputs;
mod names;
mod plan;
mod plot;
mod progress;
mod report;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use router_sim::{RecordedRun, validate};
use serde_json::{Map, Value};

pub use args::{Asked, DoctorArgs, SimulateArgs};
pub use columns::{Column, columns};
pub use curves::Curves;
pub use doctor::run as doctor;
pub use execute::{Done, Watch, execute};
pub use plan::{Case, Plan};

use crate::run::Failure;
use figure::Figure;
use progress::Progress;

/// Runs what is asked for and returns what is to be printed. `stop` ends it early, with what has run; `command` is told in
/// the report.
pub fn run(args: &SimulateArgs, command: &str, stop: &AtomicBool) -> Result<String, Failure> {
    if let Some(file) = &args.validate {
        if args.out.is_some() {
            return Err(Failure::Usage("--validate writes no files: leave --out out".into()));
        }
        return replay(file, args.json);
    }
    let plan = Plan::new(&args.asked).map_err(Failure::Usage)?;
    if let Some(out) = &args.out {
        writable(out).map_err(Failure::Usage)?;
    }
    let progress = Progress::new(&plan, stop);
    let keep = |done: Done<'_>| (Curves::of(done.run, &done.record), done.row);
    let done = execute(&plan, &progress, &keep);
    progress.finish();
    let done = done.map_err(Failure::Usage)?;
    let (curves, rows): (Vec<Curves>, Vec<Map<String, Value>>) = done.into_iter().map(|(_, kept)| kept).unzip();
    let report = report::report(command, &rows);
    let table = report::table(&rows);
    let said = if args.json { format!("{report:#}\n") } else { table.clone() };
    if let Some(out) = &args.out {
        // what has run is told, whatever becomes of the folder
        let written = put(out, command, &report, &table, &figures::figures(&rows, &curves));
        written.map_err(|error| Failure::Early(said.clone(), error))?;
    }
    if rows.len() < plan.cases.len() {
        let (done, all) = (rows.len(), plan.cases.len());
        return Err(Failure::Early(said, format!("ended by a signal: {done} of {all} runs are done")));
    }
    Ok(said)
}

/// Bytes of a recorded run.
const MOST_RECORDED: u64 = 1 << 28;

const TITLE: &str = "scls-router simulate";

/// The table and the page of these runs, and the lines of their report as JSON: for those who run a plan themselves.
pub struct Told {
    /// For people.
    pub table: String,
    /// With all pictures.
    pub page: String,
    /// An array of objects.
    pub json: String,
}

impl Told {
    /// Of runs in the order of their plan.
    pub fn of(command: &str, rows: &[Map<String, Value>], curves: &[Curves]) -> Result<Self, String> {
        let table = report::table(rows);
        let page = html::page(TITLE, command, &table, &figures::figures(rows, curves))?;
        let json = Value::Array(rows.iter().cloned().map(Value::Object).collect()).to_string();
        Ok(Self { table, page, json })
    }
}

/// How far the model is off a recorded run.
fn replay(file: &Path, json: bool) -> Result<String, Failure> {
    let usage = |why: String| Failure::Usage(format!("{}: {why}", file.display()));
    let bytes = inputs::bytes(file, MOST_RECORDED).map_err(Failure::Usage)?;
    let recorded = RecordedRun::parse(&bytes).map_err(|error| usage(inputs::line(error)))?;
    let fidelity = validate(&recorded).map_err(|error| usage(inputs::line(error)))?;
    let said = if json {
        serde_json::to_string_pretty(&fidelity).map_err(|error| Failure::Run(error.to_string()))?
    } else {
        fidelity.to_string()
    };
    let said = format!("{said}\n");
    if fidelity.holds() {
        return Ok(said);
    }
    Err(Failure::Early(said, "the model is further off than its bounds".into()))
}

/// The report, one page, and a file for each picture.
fn put(out: &Path, command: &str, report: &Value, table: &str, figures: &[Figure]) -> Result<(), String> {
    write(&out.join("report.json"), format!("{report:#}\n").as_bytes())?;
    let title = command.split(" --").next().unwrap_or_default();
    let page = html::page(title, command, table, figures)?;
    write(&out.join("report.html"), page.as_bytes())?;
    for figure in figures {
        let bytes = plot::png(figure)?;
        write(&out.join(format!("{}.png", figure.name)), &bytes)?;
    }
    Ok(())
}

/// Makes the folder, if it is not there, and sees whether a file can be in it.
fn writable(out: &Path) -> Result<(), String> {
    let wrong = |error: std::io::Error| format!("cannot write to {}: {error}", out.display());
    std::fs::create_dir_all(out).map_err(wrong)?;
    let probe = beside(&out.join("report.json"));
    std::fs::write(&probe, b"").and_then(|()| std::fs::remove_file(&probe)).map_err(wrong)
}

/// Whole or not at all, so that two runs into a folder leave the files of one of them.
fn write(file: &Path, bytes: &[u8]) -> Result<(), String> {
    let part = beside(file);
    let written = std::fs::write(&part, bytes).and_then(|()| std::fs::rename(&part, file));
    written.map_err(|error| {
        let _ = std::fs::remove_file(&part);
        format!("cannot write {}: {error}", file.display())
    })
}

/// A name that no other process writes to.
fn beside(file: &Path) -> PathBuf {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    file.with_file_name(format!(".{name}.{}", std::process::id()))
}
