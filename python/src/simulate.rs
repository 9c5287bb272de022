//! Simulated runs: flags go in as they are typed, what came of each run comes out. The Python side of it is
//! `simulation.py`; all checks are those of the command line.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use pyo3::exceptions::{PyIndexError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use router_server::simulate::{Asked, Column, Curves, Done, Plan, Told, Watch, columns, execute};

/// How often a Ctrl-C is looked for.
const LOOK: Duration = Duration::from_millis(50);

type Columns = Vec<(&'static str, Column)>;

/// Runs that are over.
#[pyclass(frozen, name = "_Runs", module = "scls_router._native")]
pub(crate) struct Runs {
    told: Told,
    requests: Vec<Columns>,
}

#[pymethods]
impl Runs {
    #[getter]
    fn json(&self) -> &str {
        &self.told.json
    }

    #[getter]
    fn table(&self) -> &str {
        &self.told.table
    }

    #[getter]
    fn page(&self) -> &str {
        &self.told.page
    }

    fn columns<'py>(&self, py: Python<'py>, run: usize) -> PyResult<Bound<'py, PyDict>> {
        let columns = self.requests.get(run).ok_or_else(|| PyIndexError::new_err(format!("no such run: {run}")))?;
        let all = PyDict::new(py);
        for (name, column) in columns {
            let (kind, bytes) = column.bytes();
            all.set_item(name, (kind.to_string(), PyBytes::new(py, &bytes)))?;
        }
        Ok(all)
    }
}

/// Nobody sees how far it is, but it can be stopped.
struct Stop<'a>(&'a AtomicBool);

impl Watch for Stop<'_> {
    fn share(&self, _at: usize, _share: f64) -> bool {
        !self.0.load(Ordering::Relaxed)
    }
}

#[pyfunction]
pub(crate) fn _simulate(py: Python<'_>, flags: Vec<String>) -> PyResult<Runs> {
    let stop = AtomicBool::new(false);
    py.detach(|| {
        std::thread::scope(|scope| {
            let (send, done) = channel();
            let stop = &stop;
            scope.spawn(move || {
                // whoever waits for it is there as long as this runs
                let _ = send.send(run(&flags, &Stop(stop)));
            });
            loop {
                match done.recv_timeout(LOOK) {
                    Ok(runs) => return runs.map_err(PyValueError::new_err),
                    Err(RecvTimeoutError::Timeout) => {
                        if let Err(error) = Python::attach(signals) {
                            stop.store(true, Ordering::Relaxed);
                            return Err(error);
                        }
                    }
                    Err(RecvTimeoutError::Disconnected) => return Err(PyValueError::new_err("a run failed")),
                }
            }
        })
    })
}

/// Whether somebody pressed Ctrl-C.
fn signals(py: Python<'_>) -> PyResult<()> {
    py.check_signals()
}

fn run(flags: &[String], watch: &Stop<'_>) -> Result<Runs, String> {
    let plan = Plan::new(&Asked::of(flags)?)?;
    let keep = |done: Done<'_>| {
        let curves = Curves::of(done.run, &done.record);
        ((done.row, curves), columns(done.run, &done.record))
    };
    let done = execute(&plan, watch, &keep)?;
    let ((rows, curves), requests): ((Vec<_>, Vec<_>), Vec<Columns>) = done.into_iter().map(|(_, kept)| kept).unzip();
    let command = format!("scls_router.simulate: {}", flags.join(" "));
    Ok(Runs { told: Told::of(&command, &rows, &curves)?, requests })
}
