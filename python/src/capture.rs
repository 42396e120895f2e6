//! The background writer, for `fused_xent.capture`.

use fused_xent::capture::{BackgroundWriter, Capture, CaptureOptions, CaptureSteps, OwnedElements};
use fused_xent::dump::{DumpError, ElementType, LossSettings, Placement, Region};
use fused_xent::kernels::problem::Layout;
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use serde_json::Value;
use std::error::Error;
use std::path::PathBuf;
use std::time::Duration;

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<BackgroundFolders>()
}

/// Writes the folders of one process from a thread of its own.
#[pyclass(frozen, module = "fused_xent._native")]
struct BackgroundFolders {
    writer: BackgroundWriter,
    run_id: String,
}

/// A message with its causes.
fn told(error: &DumpError) -> String {
    let causes = std::iter::successors(error.source(), |&cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text} ({cause})"))
}

fn parsed(what: &str, text: &str) -> PyResult<Value> {
    serde_json::from_str(text).map_err(|e| PyValueError::new_err(format!("{what}: {e}")))
}

#[pymethods]
impl BackgroundFolders {
    #[new]
    #[pyo3(signature = (root, *, loss, num_microbatches, process_index, process_count, run_id, contract, verify, max_bytes))]
    #[expect(clippy::too_many_arguments, reason = "they are the keyword arguments of one constructor")]
    fn new(
        root: PathBuf,
        loss: &str,
        num_microbatches: usize,
        process_index: usize,
        process_count: usize,
        run_id: Option<String>,
        contract: Option<&str>,
        verify: bool,
        max_bytes: usize,
    ) -> PyResult<Self> {
        let refused = |e: DumpError| PyValueError::new_err(told(&e));
        let options = CaptureOptions {
            steps: CaptureSteps::Every(1),
            process_index,
            process_count,
            run_id,
            loss: LossSettings::from_json(&parsed("loss", loss)?, "loss").map_err(refused)?,
            num_microbatches,
            contract: contract.map(|text| parsed("contract", text)).transpose()?,
            verify,
        };
        let capture = Capture::new(&root, options).map_err(refused)?;
        let run_id = capture.run_id().to_owned();
        Ok(Self { writer: BackgroundWriter::new(capture, max_bytes).map_err(refused)?, run_id })
    }

    #[getter]
    fn run_id(&self) -> &str {
        &self.run_id
    }

    /// Bytes of arrays written so far.
    #[getter]
    fn written(&self) -> u64 {
        self.writer.written()
    }

    /// Hands over contiguous bytes; they are copied. Waits, without the interpreter's lock, while too many are under way.
    #[pyo3(signature = (step, microbatch, name, dtype, data, *, start, shape, global_shape, replica, layout))]
    #[expect(clippy::too_many_arguments, reason = "they are an array and its place")]
    fn tensor(
        &self,
        py: Python<'_>,
        step: u64,
        microbatch: Option<usize>,
        name: String,
        dtype: &str,
        data: PyBuffer<u8>,
        start: Vec<usize>,
        shape: Vec<usize>,
        global_shape: Vec<usize>,
        replica: usize,
        layout: &str,
    ) -> PyResult<()> {
        let layout = match layout {
            "vd" => Layout::Vd,
            "dv" => Layout::Dv,
            _ => return Err(PyValueError::new_err(format!("layout is {layout:?}; expected \"vd\" or \"dv\""))),
        };
        let known = || ElementType::ALL.map(ElementType::name).join(", ");
        let dtype = ElementType::from_name(dtype)
            .ok_or_else(|| PyValueError::new_err(format!("{name}: dtype {dtype}; expected one of {}", known())))?;
        let mut elements = OwnedElements::zeroed(dtype, data.len_bytes())
            .ok_or_else(|| PyValueError::new_err(format!("{name}: not a whole number of {}", dtype.name())))?;
        data.copy_to_slice(py, elements.bytes_mut())?;
        let placement = Placement { global_shape, region: Region { start, shape }, replica, layout };
        py.detach(|| self.writer.tensor((step, microbatch), &name, elements, placement));
        Ok(())
    }

    /// Says that a folder is whole.
    #[pyo3(signature = (step, microbatch))]
    fn commit(&self, step: u64, microbatch: Option<usize>) {
        self.writer.commit((step, microbatch));
    }

    /// Says that nothing more comes for a step.
    fn forget(&self, step: u64) {
        self.writer.forget(step);
    }

    /// Waits until all is written or has failed; false if that takes longer than `timeout` seconds.
    fn flush(&self, py: Python<'_>, timeout: f64) -> PyResult<bool> {
        let timeout = Duration::try_from_secs_f64(timeout).map_err(|e| PyValueError::new_err(format!("timeout: {e}")))?;
        Ok(py.detach(|| self.writer.flush(timeout)))
    }

    /// What failed since the last call: step, microbatch or `None`, why.
    fn take_failures(&self) -> Vec<(u64, Option<usize>, String)> {
        self.writer.take_failures().iter().map(|f| (f.part.0, f.part.1, told(&f.error))).collect()
    }
}
