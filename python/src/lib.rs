//! The Python binding: converts, releases the interpreter, calls, maps the error. Docs are their first lines;
//! all of them are in `_native.pyi`.

mod decision;
mod error;
mod ids;
mod router;

use std::ffi::OsString;
use std::path::PathBuf;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use router_core::{BlockHash, BlockSize};

/// Hashes of the whole blocks of ``ids``, each chained with the one before.
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
#[pyfunction]
#[pyo3(signature = (args, python = None))]
fn main(py: Python<'_>, args: Vec<OsString>, python: Option<PathBuf>) -> u8 {
    py.detach(|| router_server::exit_code_from(args, python))
}

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<decision::Decision>()?;
    module.add_class::<router::Router>()?;
    module.add_function(wrap_pyfunction!(hash_blocks, module)?)?;
    module.add_function(wrap_pyfunction!(main, module)?)
}
