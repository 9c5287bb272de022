//! One door for errors: what the core refuses becomes an exception of `scls_router._router`.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use router_core::{FitError, RouterError, UnknownMode, UnknownPolicy};

/// An error of the core on its way to Python; a policy written in Python brings its own.
pub(crate) enum Error {
    Core(RouterError),
    Python(PyErr),
}

impl From<RouterError> for Error {
    fn from(error: RouterError) -> Self {
        Self::Core(error)
    }
}

impl From<PyErr> for Error {
    fn from(error: PyErr) -> Self {
        Self::Python(error)
    }
}

impl Error {
    pub(crate) fn into_py(self, py: Python<'_>) -> PyErr {
        let error = match self {
            Self::Python(error) => return error,
            Self::Core(error) => error,
        };
        let name = match error {
            RouterError::NoWorker => "NoWorker",
            RouterError::UnknownWorker(_) => "UnknownWorker",
            RouterError::WorkerExists(_) => "WorkerExists",
            RouterError::Predicted(_) | RouterError::EmptyPrompt | RouterError::Scores { .. } => {
                return PyValueError::new_err(error.to_string());
            }
        };
        raised(py, name, &error.to_string())
    }
}

pub(crate) fn unknown_policy(py: Python<'_>, error: &UnknownPolicy) -> PyErr {
    raised(py, "UnknownPolicy", &error.to_string())
}

pub(crate) fn no_times(py: Python<'_>) -> PyErr {
    raised(py, "UnknownPolicy", "product_time needs the times of slices, which a Scheduler knows and a Router does not")
}

pub(crate) fn unknown_scheduler(py: Python<'_>, error: &UnknownMode) -> PyErr {
    raised(py, "UnknownScheduler", &error.to_string())
}

pub(crate) fn unknown_worker(py: Python<'_>, name: &str) -> PyErr {
    Error::Core(RouterError::UnknownWorker(name.to_owned())).into_py(py)
}

pub(crate) fn worker_exists(py: Python<'_>, name: &str) -> PyErr {
    Error::Core(RouterError::WorkerExists(name.to_owned())).into_py(py)
}

pub(crate) fn no_worker(py: Python<'_>) -> PyErr {
    raised(py, "NoWorker", "no worker is ready that could hold the prompt")
}

pub(crate) fn request_exists(py: Python<'_>, id: u64) -> PyErr {
    raised(py, "RequestExists", &format!("a request of this id has not ended: {id}"))
}

pub(crate) fn cost_error(py: Python<'_>, message: &str) -> PyErr {
    raised(py, "CostError", message)
}

pub(crate) fn fit_error(py: Python<'_>, error: &FitError) -> PyErr {
    raised(py, "FitError", &error.to_string())
}

pub(crate) fn row_too_long(py: Python<'_>, message: &str) -> PyErr {
    raised(py, "RowTooLong", message)
}

fn raised(py: Python<'_>, name: &str, message: &str) -> PyErr {
    class(py, name).and_then(|class| class.call1((message,))).map_or_else(|error| error, PyErr::from_value)
}

fn class<'py>(py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
    py.import("scls_router._router")?.getattr(name)
}
