//! The kernel as custom calls of XLA's CPU backend, for `fused_xent.jax`.

mod abi;
mod call;
mod handlers;

use fused_xent::kernels::problem::DType;
use fused_xent::kernels::{Dlogits, Kernel};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict};
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::{Arc, RwLock};

/// The name that XLA gives the capsules of its own handlers.
const CAPSULE: &std::ffi::CStr = c"xla._CUSTOM_CALL_TARGET";

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(xla_handlers, module)?)?;
    module.add_function(wrap_pyfunction!(xla_layout, module)?)?;
    module.add_function(wrap_pyfunction!(set_threads, module)?)?;
    module.add_function(wrap_pyfunction!(threads, module)?)?;
    module.add_function(wrap_pyfunction!(kernel_name, module)?)?;
    module.add_function(wrap_pyfunction!(kernel_contract, module)?)
}

/// What the handlers compute with: a kernel, whose workspace is kept from call to call, and threads of its own. XLA's threads
/// will not do: work that waits on them for other work on them can wait for ever.
struct Engine {
    kernel: Kernel,
    pool: ThreadPool,
}

static ENGINE: RwLock<Option<Arc<Engine>>> = RwLock::new(None);

/// The engine in use; made when first asked for.
fn engine() -> Result<Arc<Engine>, String> {
    if let Some(engine) = ENGINE.read().unwrap_or_else(|e| e.into_inner()).as_ref() {
        return Ok(Arc::clone(engine));
    }
    let mut held = ENGINE.write().unwrap_or_else(|e| e.into_inner());
    match held.as_ref() {
        Some(engine) => Ok(Arc::clone(engine)),
        None => Ok(Arc::clone(held.insert(Arc::new(Engine::new(0)?)))),
    }
}

impl Engine {
    /// With so many threads; 0: as many as `RAYON_NUM_THREADS` says, or as there are cores.
    fn new(threads: usize) -> Result<Self, String> {
        let kernel = Kernel::from_environment().map_err(|e| e.to_string())?;
        let pool = ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("xent-kernel-{i}")).build();
        Ok(Self { kernel, pool: pool.map_err(|e| format!("{threads} threads: {e}"))? })
    }
}

fn engine_in_python() -> PyResult<Arc<Engine>> {
    engine().map_err(PyRuntimeError::new_err)
}

/// The handlers, by the names to register them under.
#[pyfunction]
fn xla_handlers(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    type Handler = unsafe extern "C" fn(*mut abi::CallFrame) -> *mut c_void;
    let handlers: [(&str, Handler); 3] = [
        ("fused_xent_forward", handlers::forward),
        ("fused_xent_partial", handlers::partial),
        ("fused_xent_backward", handlers::backward),
    ];
    let capsules = PyDict::new(py);
    for (name, handler) in handlers {
        let pointer = NonNull::new(handler as *mut c_void).expect("a function has an address");
        // SAFETY: a function of this module, which Python never unloads.
        capsules.set_item(name, unsafe { PyCapsule::new_with_pointer(py, pointer, CAPSULE)? })?;
    }
    Ok(capsules)
}

/// Offsets and sizes of the structs that the handlers share with XLA, by their names in its header.
#[pyfunction]
fn xla_layout() -> Vec<(&'static str, usize)> {
    abi::LAYOUT.to_vec()
}

/// Has the handlers compute on so many threads from now on; 0 is one for each core.
#[pyfunction]
fn set_threads(threads: usize) -> PyResult<()> {
    let engine = Engine::new(threads).map_err(PyRuntimeError::new_err)?;
    *ENGINE.write().unwrap_or_else(|e| e.into_inner()) = Some(Arc::new(engine));
    Ok(())
}

/// On how many threads the handlers compute.
#[pyfunction]
fn threads() -> PyResult<usize> {
    Ok(engine_in_python()?.pool.current_num_threads())
}

/// The kernel that the handlers run.
#[pyfunction]
fn kernel_name() -> PyResult<&'static str> {
    Ok(engine_in_python()?.kernel.name())
}

/// How dlogits are rounded for inputs hidden and unembedding and gradients of them, each a dtype's name.
#[pyfunction]
fn kernel_contract(inputs: [String; 2], gradients: [String; 2], dlogits: &str) -> PyResult<&'static str> {
    let kernel = engine_in_python()?.kernel.clone().with_dlogits(precision(dlogits)?);
    Ok(kernel.contract(dtypes(&inputs)?, dtypes(&gradients)?).dlogits.name())
}

pub(crate) fn dtypes(names: &[String; 2]) -> PyResult<[DType; 2]> {
    let dtype = |name: &String| {
        let known = [DType::Bf16, DType::F16, DType::F32].into_iter().find(|dtype| dtype.name() == name);
        known.ok_or_else(|| PyValueError::new_err(format!("dtype {name}: expected bfloat16, float16 or float32")))
    };
    Ok([dtype(&names[0])?, dtype(&names[1])?])
}

pub(crate) fn precision(of_dlogits: &str) -> PyResult<Dlogits> {
    Dlogits::by_name(of_dlogits).ok_or_else(|| PyValueError::new_err(format!("dlogits is {of_dlogits:?}")))
}
