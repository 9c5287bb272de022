//! Iteration-level engines behind the core's `Router`, in virtual time.

use crate::run::{Run, RunError};
use crate::served::Record;

pub(crate) fn run(_run: &Run<'_>, _progress: &mut dyn FnMut(f64) -> bool) -> Result<Record, RunError> {
    Err(RunError::NoWorkers)
}
