//! Batches of waiting rows and workers for them, by cost.

use std::sync::Mutex;

use pyo3::exceptions::{PyIndexError, PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyString, PyTuple};
use router_core::{BlockSize, Blocks, Extent, Micros, RowGroup, Split, Tokens};

use crate::action::seconds;
use crate::class::Class;
use crate::cost::CostModel;
use crate::error::row_too_long;
use crate::report::micros;
use crate::router::held;

/// Cuts waiting rows into batches, so that all of them together take the least time.
///
/// A padded batch costs as if all its rows were as long as its longest, so rows of like length belong together; but a
/// pass has a price of its own, so they should not be too few. Over rows sorted by length the best cut is found exactly, in
/// O(n * max_rows) (arXiv 2406.13511). For a paged worker it packs.
///
/// >>> model = CostModel.padded(prefill=(3e-3, 0.0, 0.0, 1e-4), step=(3e-3, 5e-5, 0.0, 1e-6))
/// >>> batcher = Batcher(model, capacity_tokens=16_000, max_rows=8, slice_len=32)
/// >>> for batch in batcher.split([900, 20, 1000, 30]):
/// ...     print(batch.rows, batch.longest, round(batch.seconds, 2))
/// (1, 3) 30 0.11
/// (0, 2) 1000 0.36
///
/// Args:
///     cost_model: times of batches; its layout says how memory is counted.
///     capacity_tokens: tokens whose KV a worker can hold.
///     max_rows: most rows of a batch.
///     slice_len: S, the most iterations of a batch.
///     block_size: tokens a KV block: memory is counted in whole blocks.
///
/// Raises:
///     ValueError: a size is 0.
#[pyclass(frozen, module = "scls_router")]
pub(crate) struct Batcher {
    core: router_core::Batcher,
}

#[pymethods]
impl Batcher {
    #[new]
    #[pyo3(signature = (cost_model, capacity_tokens, max_rows, slice_len, *, block_size = 1))]
    fn new(
        cost_model: &CostModel,
        capacity_tokens: u64,
        max_rows: u32,
        slice_len: u32,
        block_size: u32,
    ) -> PyResult<Self> {
        let sizes = [("capacity_tokens", capacity_tokens)];
        let sizes = sizes.into_iter().chain([("max_rows", max_rows.into()), ("slice_len", slice_len.into())]);
        if let Some((what, _)) = sizes.into_iter().find(|(_, size)| *size == 0) {
            return Err(PyValueError::new_err(format!("{what} must be at least 1")));
        }
        let (model, size) = (*cost_model.core(), crate::block_size(block_size)?);
        let capacity = Blocks(capacity_tokens / size.get());
        let layout = model.layout();
        let core = router_core::Batcher { model, layout, capacity, block_size: size, max_rows, steps: slice_len };
        Ok(Self { core })
    }

    /// The cheapest batches, shortest rows first; of equally cheap ones the fewest.
    ///
    /// Args:
    ///     lengths: tokens of each row: ints, or an array of integers, shape ``[rows]``.
    ///
    /// Returns:
    ///     `scheduling.Batch`es: each row is in one of them.
    ///
    /// Raises:
    ///     RowTooLong: a row fits no batch, not even alone; the message names it.
    ///     OverflowError: a length is negative.
    fn split<'py>(&self, py: Python<'py>, lengths: &Bound<'py, PyAny>) -> PyResult<Vec<Bound<'py, PyAny>>> {
        self.cut(py, lengths, router_core::Batcher::split_rows)
    }

    /// Rows as they come, at most ``most`` to a batch and never more than fit: what ``split`` is compared with.
    ///
    /// Raises:
    ///     RowTooLong: a row fits no batch, not even alone; the message names it.
    ///     OverflowError: a length is negative.
    fn in_order<'py>(
        &self,
        py: Python<'py>,
        lengths: &Bound<'py, PyAny>,
        most: u32,
    ) -> PyResult<Vec<Bound<'py, PyAny>>> {
        self.cut(py, lengths, |core, rows| core.in_order(rows, most))
    }

    /// Rows by length, at most ``most`` to a batch and never more than fit.
    ///
    /// Raises:
    ///     RowTooLong: a row fits no batch, not even alone; the message names it.
    ///     OverflowError: a length is negative.
    fn by_length<'py>(
        &self,
        py: Python<'py>,
        lengths: &Bound<'py, PyAny>,
        most: u32,
    ) -> PyResult<Vec<Bound<'py, PyAny>>> {
        self.cut(py, lengths, |core, rows| core.by_length(rows, most))
    }
}

impl Batcher {
    fn cut<'py>(
        &self,
        py: Python<'py>,
        lengths: &Bound<'py, PyAny>,
        cut: impl FnOnce(&router_core::Batcher, &[Extent]) -> Split + Send,
    ) -> PyResult<Vec<Bound<'py, PyAny>>> {
        static BATCH: Class = Class::new("scls_router.scheduling", "Batch");
        let rows = extents(lengths)?;
        let split = py.detach(|| cut(&self.core, &rows));
        if let Some(&at) = split.infeasible.first() {
            let (tokens, capacity) = (rows[at].tokens, self.capacity());
            let message = format!("row {at} fits no batch, not even alone: {tokens}\na worker holds {capacity}");
            return Err(row_too_long(py, &message));
        }
        let batch = |group: RowGroup| {
            let rows = PyTuple::new(py, &group.rows)?;
            let ceiling = tokens_of(group.ceiling, self.core.block_size);
            BATCH.of(py, (rows, group.longest.0, seconds(group.time), ceiling.0))
        };
        split.batches.into_iter().map(batch).collect()
    }

    fn capacity(&self) -> Tokens {
        tokens_of(self.core.capacity, self.core.block_size)
    }
}

fn tokens_of(blocks: Blocks, size: BlockSize) -> Tokens {
    Tokens(blocks.0.saturating_mul(size.get()))
}

/// Lengths of rows that may draw all their slices.
fn extents(lengths: &Bound<'_, PyAny>) -> PyResult<Vec<Extent>> {
    let py = lengths.py();
    if lengths.is_instance_of::<PyString>() {
        return Err(PyTypeError::new_err("lengths are wanted here: got a str"));
    }
    // numpy, torch and array make ints of what they have in one call
    let lengths = match lengths.getattr_opt(intern!(py, "tolist"))? {
        Some(list) => list.call0()?,
        None => lengths.clone(),
    };
    let extent =
        |tokens: PyResult<Bound<'_, PyAny>>| Ok(Extent { tokens: Tokens(tokens?.extract()?), total: Tokens(u64::MAX) });
    lengths.try_iter()?.map(extent).collect()
}

/// Gives batches to workers: the longest first, each to the worker that has least to do (arXiv 2406.13511). From equal
/// loads the last worker is done within ``4/3 - 1/(3m)`` of the best that is possible on ``m`` workers (Graham 1969).
///
/// >>> offloader = Offloader(2)
/// >>> offloader.assign([2.0, 3.0, 2.0, 3.0])
/// [0, 0, 1, 1]
/// >>> offloader.loads
/// [5.0, 5.0]
/// >>> offloader.done(0, 2.0)
/// >>> offloader.loads
/// [3.0, 5.0]
///
/// Args:
///     workers: how many there are.
///
/// Raises:
///     ValueError: there is none.
#[pyclass(frozen, module = "scls_router")]
pub(crate) struct Offloader {
    core: Mutex<router_core::Offloader>,
}

#[pymethods]
impl Offloader {
    #[new]
    fn new(workers: u16) -> PyResult<Self> {
        if workers == 0 {
            return Err(PyValueError::new_err("workers must be at least 1"));
        }
        let loads = vec![Micros::ZERO; usize::from(workers)];
        Ok(Self { core: Mutex::new(router_core::Offloader::new(loads)) })
    }

    /// A worker for each batch, whose time counts there from now on. Ties rotate.
    ///
    /// Args:
    ///     seconds: of each batch.
    ///
    /// Returns:
    ///     Indices of workers, one for each batch.
    ///
    /// Raises:
    ///     ValueError: a time is negative or not finite.
    fn assign(&self, seconds: Vec<f64>) -> PyResult<Vec<usize>> {
        let times = seconds.into_iter().map(|time| micros("a batch", time)).collect::<PyResult<Vec<_>>>()?;
        Ok(held(&self.core).assign(&times))
    }

    /// A batch is done or given up: exactly what ``assign`` counted is taken back, not what it took.
    ///
    /// Args:
    ///     worker: its index.
    ///     seconds: as they were assigned.
    ///
    /// Raises:
    ///     IndexError: there is no such worker.
    ///     ValueError: the time is negative or not finite.
    fn done(&self, worker: usize, seconds: f64) -> PyResult<()> {
        let time = micros("a batch", seconds)?;
        let mut core = held(&self.core);
        if worker >= core.loads().len() {
            return Err(PyIndexError::new_err(format!("no such worker: {worker}")));
        }
        core.done(worker, time);
        Ok(())
    }

    /// Seconds that each worker has to do.
    #[getter]
    fn loads(&self) -> Vec<f64> {
        held(&self.core).loads().iter().map(|load| seconds(*load)).collect()
    }
}
