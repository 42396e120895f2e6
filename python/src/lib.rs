//! The native half of the Python module `fused_xent`: `fused_xent._native`.

mod capture;
mod ffi;
mod tpu;

use pyo3::prelude::*;

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    capture::register(module)?;
    ffi::register(module)?;
    tpu::register(module)
}
