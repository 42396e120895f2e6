//! The kernels for TPUs as programs that `fused_xent.jax` puts into what it lowers.

use crate::ffi::{dtypes, precision};
use fused_xent::kernels::problem::{Layout, LossOptions, Shape};
use fused_xent::kernels::tpu::{Backward, BackwardPlan, Form, Generation, Given, Program, Spec, Tile, TpuError};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<TpuSpec>()?;
    module.add_class::<TpuProgram>()?;
    module.add_function(wrap_pyfunction!(tpu_generations, module)?)?;
    module.add_function(wrap_pyfunction!(tpu_generation, module)?)
}

/// The names of the generations that there are kernels for.
#[pyfunction]
fn tpu_generations() -> Vec<&'static str> {
    Generation::ALL.map(Generation::name).to_vec()
}

/// The generation of devices of that kind, if there are kernels for it.
#[pyfunction]
fn tpu_generation(device_kind: &str) -> Option<&'static str> {
    Generation::by_kind(device_kind).map(Generation::name)
}

/// A loss, and the chip that it is for.
#[pyclass(module = "fused_xent._native", frozen)]
struct TpuSpec {
    spec: Spec,
    generation: Generation,
}

/// A StableHLO program with its kernels.
#[pyclass(module = "fused_xent._native", frozen, get_all)]
struct TpuProgram {
    /// The module, whose only function is `@main`.
    text: String,
    /// Name and Mosaic body of each kernel, in the order in which they run.
    kernels: Vec<(&'static str, String)>,
}

impl From<Program> for TpuProgram {
    fn from(Program { text, kernels, .. }: Program) -> Self {
        Self { text, kernels }
    }
}

fn refused(error: TpuError) -> PyErr {
    PyValueError::new_err(error.to_string())
}

#[pymethods]
impl TpuSpec {
    /// `shape` is N, D and V; `inputs` the dtypes of Q and K.
    #[new]
    #[pyo3(signature = (generation, shape, inputs, *, layout, valid_vocab, logit_scale, logit_softcap, z_loss, label_smoothing))]
    #[expect(clippy::too_many_arguments, reason = "named by their callers")]
    fn new(
        generation: &str,
        shape: [usize; 3],
        inputs: [String; 2],
        layout: &str,
        valid_vocab: usize,
        logit_scale: f64,
        logit_softcap: Option<f64>,
        z_loss: f64,
        label_smoothing: f64,
    ) -> PyResult<Self> {
        let unknown = || format!("TPU generation {generation:?}: expected one of {}", tpu_generations().join(", "));
        let generation = Generation::by_name(generation).ok_or_else(|| PyValueError::new_err(unknown()))?;
        let layout = match layout {
            "vd" => Layout::Vd,
            "dv" => Layout::Dv,
            _ => return Err(PyValueError::new_err(format!("layout is {layout:?}, expected \"vd\" or \"dv\""))),
        };
        let [tokens, hidden, vocab] = shape;
        let valid_vocab = Some(valid_vocab);
        let options = LossOptions { valid_vocab, logit_scale, logit_softcap, z_loss, label_smoothing, ..LossOptions::default() };
        let spec = Spec { shape: Shape { tokens, hidden, vocab }, layout, inputs: dtypes(&inputs)?, options };
        Ok(Self { spec, generation })
    }

    /// `tile`: so many tokens by so many vocab ids, if not the one chosen for the chip.
    #[pyo3(signature = (tile=None))]
    fn forward(&self, tile: Option<[usize; 2]>) -> PyResult<TpuProgram> {
        let tile = tile.map(|[tokens, vocab]| Tile { tokens, vocab });
        self.spec.forward(self.generation, tile).map(TpuProgram::from).map_err(refused)
    }

    /// For the cotangents of loss, lse and label logits. `plan`: tokens and vocab ids of a tile, and the tokens of one pass, or 0
    /// for two kernels; if not the one chosen for the chip.
    #[pyo3(signature = (gradients, dlogits, plan=None))]
    fn backward(&self, gradients: [String; 2], dlogits: &str, plan: Option<[usize; 3]>) -> PyResult<TpuProgram> {
        let backward = Backward {
            spec: self.spec,
            gradients: dtypes(&gradients)?,
            dlogits: precision(dlogits)?,
            cotangents: Given { loss: true, lse: true, label_logits: true },
            accumulate: false,
        };
        let cores = self.generation.cores();
        let plan = plan.map(|[tokens, vocab, at_once]| BackwardPlan {
            tile: Tile { tokens, vocab },
            form: if at_once == 0 { Form::TwoKernels { cores } } else { Form::OnePass { at_once, cores } },
        });
        backward.program(self.generation, plan).map(TpuProgram::from).map_err(refused)
    }
}
