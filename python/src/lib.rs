//! The Python binding: converts, releases the interpreter, calls, maps the error.

use std::ffi::OsString;
use std::path::PathBuf;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use router_core::{BlockHash, BlockSize};

/// Ids as Python has them: little-endian u32 bytes, or any sequence of ints.
#[derive(FromPyObject)]
enum Ids<'py> {
    Bytes(Bound<'py, PyBytes>),
    List(Vec<u32>),
}

impl Ids<'_> {
    fn into_vec(self) -> PyResult<Vec<u32>> {
        match self {
            Self::List(ids) => Ok(ids),
            Self::Bytes(bytes) => {
                let (ids, rest) = bytes.as_bytes().as_chunks::<4>();
                if rest.is_empty() {
                    Ok(ids.iter().map(|id| u32::from_le_bytes(*id)).collect())
                } else {
                    Err(PyValueError::new_err("ids as bytes are four bytes each: got a length that is not a multiple"))
                }
            }
        }
    }
}

#[pyfunction]
fn hash_blocks(py: Python<'_>, hash_root: u64, ids: Ids<'_>, block_size: u32) -> PyResult<Vec<u64>> {
    let size = BlockSize::new(block_size).ok_or_else(|| PyValueError::new_err("block_size must be at least 1"))?;
    let ids = ids.into_vec()?;
    let hashes = py.detach(|| router_core::hash_blocks(BlockHash(hash_root), &ids, size));
    Ok(hashes.into_iter().map(|hash| hash.0).collect())
}

/// Runs the command line; the same program as the cargo binary, but that workers of `up` run in this `python`.
#[pyfunction]
#[pyo3(signature = (args, python = None))]
fn main(py: Python<'_>, args: Vec<OsString>, python: Option<PathBuf>) -> u8 {
    py.detach(|| router_server::exit_code_from(args, python))
}

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_function(wrap_pyfunction!(hash_blocks, module)?)?;
    module.add_function(wrap_pyfunction!(main, module)?)
}
