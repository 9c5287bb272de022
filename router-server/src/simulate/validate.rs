//! `simulate --validate FILE`: a recorded run of real workers beside what the simulator makes of it.

use std::path::Path;

use router_sim::{RecordedRun, validate};

use crate::run::Failure;

/// The table, or the same as JSON.
pub fn run(file: &Path, json: bool) -> Result<String, Failure> {
    let wrong = |why: String| Failure::Usage(format!("{}: {why}", file.display()));
    let bytes = std::fs::read(file).map_err(|error| wrong(error.to_string()))?;
    let recorded = RecordedRun::parse(&bytes).map_err(|error| wrong(error.to_string()))?;
    let fidelity = validate(&recorded).map_err(|error| wrong(error.to_string()))?;
    if !json {
        return Ok(format!("{fidelity}\n"));
    }
    let text = serde_json::to_string_pretty(&fidelity).map_err(|error| Failure::Run(error.to_string()))?;
    Ok(format!("{text}\n"))
}
