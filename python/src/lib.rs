//! The Python binding: converts, releases the interpreter, calls, maps the error. Docs are those of `_native.pyi`, for
//! `help`; a test holds them together.
#![allow(clippy::doc_markdown, clippy::doc_link_with_quotes)] // they are Python's

mod action;
mod batch;
mod class;
mod cost;
mod decision;
mod error;
mod ids;
mod report;
mod router;
mod scheduler;
mod simulate;

use std::ffi::OsString;
use std::path::PathBuf;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use router_core::{BlockHash, BlockSize};

/// Hashes of the whole blocks of ``ids``, each chained with the one before.
///
/// ``h[i] = xxh3_64(block i as little-endian u32, seed=h[i-1])`` with ``h[-1] = hash_root``: a hash names the whole
/// prefix that ends with its block. A partial last block has none.
///
/// >>> hash_blocks(0, [0] * 20, 16)
/// [3457472693978015086]
/// >>> hash_blocks(0, [0] * 32, 16) == hash_blocks(0, [0] * 16, 16) + hash_blocks(3457472693978015086, [0] * 16, 16)
/// True
///
/// Args:
///     hash_root: u64 that keeps apart what must never share KV (fleet, model, adapter, tenant).
///     ids: token ids, shape ``[tokens]``: ints; a buffer of 4- or 8-byte integers (numpy, torch on the CPU,
///         ``array``), read as a whole without making an object of each id; or bytes, four each, little-endian.
///     block_size: tokens a block.
///
/// Returns:
///     ``len(ids) // block_size`` u64 hashes.
///
/// Raises:
///     ValueError: ``block_size`` is 0, an id is not in 0 to 2**32 - 1 (its index is named), bytes are not whole ids,
///         or there is more than one dimension.
///     TypeError: these are no ids.
///     OverflowError: ``hash_root`` or ``block_size`` is out of range.
#[pyfunction]
fn hash_blocks(py: Python<'_>, hash_root: u64, ids: &Bound<'_, PyAny>, block_size: u32) -> PyResult<Vec<u64>> {
    let size = crate::block_size(block_size)?;
    let ids = ids::ids(ids)?;
    let hashes = py.detach(|| router_core::hash_blocks(BlockHash(hash_root), &ids, size));
    Ok(hashes.into_iter().map(|hash| hash.0).collect())
}

fn block_size(tokens: u32) -> PyResult<BlockSize> {
    BlockSize::new(tokens).ok_or_else(|| PyValueError::new_err("block_size must be at least 1"))
}

/// Runs the command line, the first argument being the program's name. Returns the exit status.
///
/// The same program as the cargo binary, but that workers of ``up`` run in this ``python``.
#[pyfunction]
#[pyo3(signature = (args, python = None))]
fn main(py: Python<'_>, args: Vec<OsString>, python: Option<PathBuf>) -> u8 {
    py.detach(|| router_server::exit_code_from(args, python))
}

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<batch::Batcher>()?;
    module.add_class::<batch::Offloader>()?;
    module.add_class::<cost::CostModel>()?;
    module.add_class::<decision::Decision>()?;
    module.add_class::<router::Router>()?;
    module.add_class::<scheduler::Scheduler>()?;
    module.add_class::<simulate::Runs>()?;
    module.add_function(wrap_pyfunction!(simulate::_simulate, module)?)?;
    module.add_function(wrap_pyfunction!(hash_blocks, module)?)?;
    module.add_function(wrap_pyfunction!(main, module)?)
}
