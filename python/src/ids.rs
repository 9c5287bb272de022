//! Token ids as Python has them.
//!
//! The stable ABI of Python 3.10 has no buffer protocol, and the pointers that `DLPack` and `__array_interface__` give
//! can only be read with `unsafe`. So a buffer is copied once, as a whole, through `memoryview.tobytes`: 8 KiB for
//! 2,048 ids. No id becomes a Python object on the way.

use pyo3::exceptions::{PyOverflowError, PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyMemoryView, PyString, PyTuple};

/// Ids from little-endian u32 bytes, a buffer of 4- or 8-byte integers (numpy, `array`), anything with `__array__`
/// (a torch tensor on the CPU), or any iterable of ints.
pub(crate) fn ids(object: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    if let Ok(bytes) = object.cast::<PyBytes>() {
        return little_endian(bytes.as_bytes());
    }
    if object.is_instance_of::<PyList>() || object.is_instance_of::<PyTuple>() {
        return each(object);
    }
    if object.is_instance_of::<PyString>() {
        return Err(PyTypeError::new_err("token ids are wanted here: got a str"));
    }
    if let Ok(view) = PyMemoryView::from(object) {
        return buffer(&view);
    }
    match object.getattr_opt(intern!(object.py(), "__array__"))? {
        Some(array) => buffer(&PyMemoryView::from(&array.call0()?)?),
        None => each(object),
    }
}

fn little_endian(bytes: &[u8]) -> PyResult<Vec<u32>> {
    let (ids, rest) = bytes.as_chunks::<4>();
    if rest.is_empty() {
        Ok(ids.iter().map(|id| u32::from_le_bytes(*id)).collect())
    } else {
        let got = bytes.len();
        Err(PyValueError::new_err(format!("ids as bytes are four bytes each: got {got} bytes, which is no multiple")))
    }
}

fn each(ids: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    let py = ids.py();
    let all = ids.try_iter().map_err(|_| {
        let kind = ids.get_type();
        PyTypeError::new_err(format!("ids are ints in a sequence, a buffer of integers, or bytes: got {kind}"))
    })?;
    all.enumerate()
        .map(|(at, id)| {
            let id = id?;
            id.extract::<u32>().map_err(|error| {
                if error.is_instance_of::<PyOverflowError>(py) {
                    out_of_range(at, &id)
                } else if error.is_instance_of::<PyTypeError>(py) {
                    PyTypeError::new_err(format!("a token id is an int: got {id} at index {at}"))
                } else {
                    error
                }
            })
        })
        .collect()
}

fn buffer(view: &Bound<'_, PyMemoryView>) -> PyResult<Vec<u32>> {
    let py = view.py();
    let dimensions: usize = view.getattr(intern!(py, "ndim"))?.extract()?;
    if dimensions != 1 {
        let shape = view.getattr(intern!(py, "shape"))?;
        return Err(PyValueError::new_err(format!(
            "ids have one dimension: got shape {shape}\ngive one row, as ids[0], or several to route_many"
        )));
    }
    let format = view.getattr(intern!(py, "format"))?;
    let format: &str = format.cast::<PyString>()?.to_str()?;
    let width: usize = view.getattr(intern!(py, "itemsize"))?.extract()?;
    // `@` and `=` are native; the one other native order is told by its sign.
    let native = if cfg!(target_endian = "little") { '<' } else { '>' };
    let signed = match format.trim_start_matches(['@', '=', native]) {
        "i" | "l" | "q" => true,
        "I" | "L" | "Q" => false,
        _ => return Err(PyTypeError::new_err(format!("ids are integers of 4 or 8 bytes: got format {format:?}"))),
    };
    // The copy: contiguous whatever the strides are.
    let bytes = view.call_method0(intern!(py, "tobytes"))?;
    let bytes = bytes.cast::<PyBytes>()?.as_bytes();
    // An id that is out of range has a bit set that no id has, as a sign or above: one pass without branches finds out.
    if width == 4 {
        let ids: Vec<u32> = bytes.as_chunks::<4>().0.iter().map(|id| u32::from_ne_bytes(*id)).collect();
        let all = ids.iter().fold(0, |all, id| all | id);
        if signed && i32::MAX.cast_unsigned() < all {
            let at = ids.iter().position(|id| i32::MAX.cast_unsigned() < *id).unwrap_or_default();
            return Err(out_of_range(at, &ids[at].cast_signed()));
        }
        return Ok(ids);
    }
    let wide = || bytes.as_chunks::<8>().0.iter().map(|id| u64::from_ne_bytes(*id));
    let all = wide().fold(0, |all, id| all | id);
    if u32::try_from(all).is_ok() {
        return Ok(wide().map(|id| id as u32).collect());
    }
    let (at, id) = wide().enumerate().find(|(_, id)| u32::try_from(*id).is_err()).unwrap_or_default();
    Err(if signed { out_of_range(at, &id.cast_signed()) } else { out_of_range(at, &id) })
}

fn out_of_range(at: usize, id: &dyn std::fmt::Display) -> PyErr {
    PyValueError::new_err(format!("token ids are 0 to 4294967295: got {id} at index {at}"))
}
