//! `simulate --validate FILE`: a recorded run of real workers beside what the simulator makes of it.

use std::path::Path;

use router_sim::{RecordedRun, validate};

use super::inputs::line;
use crate::run::Failure;

/// The table, or the same as JSON; an error with it where the model is further off than its bounds.
pub fn run(file: &Path, json: bool) -> Result<String, Failure> {
    let wrong = |why: String| Failure::Usage(format!("{}: {why}", file.display()));
    let bytes = std::fs::read(file).map_err(|error| wrong(format!("cannot be read: {error}")))?;
    let recorded = RecordedRun::parse(&bytes).map_err(|error| wrong(line(error)))?;
    let fidelity = validate(&recorded).map_err(|error| wrong(line(error)))?;
    let said = if json {
        serde_json::to_string_pretty(&fidelity).map_err(|error| Failure::Run(error.to_string()))?
    } else {
        fidelity.to_string()
    };
    if fidelity.holds() {
        return Ok(format!("{said}\n"));
    }
    Err(Failure::Early(format!("{said}\n"), "the model is further off than its bounds".into()))
}
