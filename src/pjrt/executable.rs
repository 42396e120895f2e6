//! Compiled programs: what they are, what they need, and running them.

use super::client::{Buffer, ClientHandle, Element, known_element};
use super::error::PjrtError;
use super::options::{Options, Value, from_named_values};
use super::sys::{self, Api};
use std::collections::BTreeMap;
use std::fmt;
use std::ptr;
use std::sync::Arc;

/// A compiled program, which need not be loaded on a device.
pub struct Executable {
    api: Arc<Api>,
    raw: *mut sys::Executable,
    outputs: Vec<(Element, Vec<usize>)>,
}

// SAFETY: the functions of the API may be called from any thread.
unsafe impl Send for Executable {}
// SAFETY: as above.
unsafe impl Sync for Executable {}

/// What a compiled program needs, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryFigures {
    /// Of machine code.
    pub code: u64,
    /// Of arguments.
    pub arguments: u64,
    /// Of results.
    pub outputs: u64,
    /// Of results that lie where arguments were.
    pub aliased: u64,
    /// Of what lives only while it runs.
    pub workspace: u64,
    /// The most that is in use at once, where the plugin says.
    pub peak: Option<u64>,
}

impl Executable {
    pub(super) fn new(api: Arc<Api>, raw: *mut sys::Executable) -> Result<Self, PjrtError> {
        // Dropped, and so freed, if what follows fails.
        let mut executable = Self { api, raw, outputs: vec![] };
        executable.outputs = executable.read_outputs()?;
        Ok(executable)
    }

    fn read_outputs(&self) -> Result<Vec<(Element, Vec<usize>)>, PjrtError> {
        let elements = self.api.call::<sys::Executable_OutputElementTypes>(|a| a.executable = self.raw)?;
        let dims = self.api.call::<sys::Executable_OutputDimensions>(|a| a.executable = self.raw)?;
        // SAFETY: the executable owns them; the dimensions of all outputs lie one after the other.
        let (elements, ranks) =
            unsafe { (sys::slice(elements.elements, elements.num_outputs), sys::slice(dims.dim_sizes, dims.num_outputs)) };
        // SAFETY: as above.
        let mut all = unsafe { sys::slice(dims.dims, ranks.iter().sum()) };
        let output = |(&element, &rank): (&_, &usize)| {
            let dims;
            (dims, all) = all.split_at(rank);
            Ok((known_element(element)?, dims.iter().map(|&dim| usize::try_from(dim).unwrap_or(0)).collect()))
        };
        elements.iter().zip(ranks).map(output).collect()
    }

    /// Its name.
    ///
    /// # Errors
    /// If the plugin does not say.
    pub fn name(&self) -> Result<String, PjrtError> {
        let named = self.api.call::<sys::Executable_Name>(|a| a.executable = self.raw)?;
        // SAFETY: the executable owns it.
        Ok(unsafe { sys::text(named.name, named.name_size) })
    }

    /// Element type and dimensions of each of its results.
    pub fn outputs(&self) -> &[(Element, Vec<usize>)] {
        &self.outputs
    }

    /// The memory that it needs.
    ///
    /// # Errors
    /// If the plugin does not say.
    pub fn memory(&self) -> Result<MemoryFigures, PjrtError> {
        let stats = self.api.call::<sys::Executable_GetCompiledMemoryStats>(|a| a.executable = self.raw)?;
        let bytes = |bytes: i64| u64::try_from(bytes).unwrap_or(0);
        Ok(MemoryFigures {
            code: bytes(stats.generated_code),
            arguments: bytes(stats.argument),
            outputs: bytes(stats.output),
            aliased: bytes(stats.alias),
            workspace: bytes(stats.temp),
            // Plugins older than this figure leave it as it was.
            peak: Some(bytes(stats.peak)).filter(|&peak| peak > 0),
        })
    }

    /// What the compiler expects of it: `flops`, `bytes accessed`, … as far as the plugin says.
    ///
    /// # Errors
    /// If the plugin does not say.
    pub fn cost(&self) -> Result<BTreeMap<String, f64>, PjrtError> {
        let listed = self.api.call::<sys::Executable_GetCostAnalysis>(|a| a.executable = self.raw)?;
        // SAFETY: the executable owns them.
        let properties: Options = unsafe { from_named_values(listed.properties, listed.num_properties) };
        let number = |value| match value {
            Value::Float(x) => Some(f64::from(x)),
            Value::Int(x) => Some(x as f64),
            _ => None,
        };
        Ok(properties.into_iter().filter_map(|(name, value)| Some((name, number(value)?))).collect())
    }

    /// The compiled program as bytes, which this version of this plugin can load.
    ///
    /// # Errors
    /// If the plugin cannot.
    pub fn serialize(&self) -> Result<Vec<u8>, PjrtError> {
        let made = self.api.call::<sys::Executable_Serialize>(|a| a.executable = self.raw)?;
        // SAFETY: they live until the deleter is called, below.
        let bytes = unsafe { sys::slice(made.bytes, made.bytes_size) }.to_vec();
        if let Some(deleter) = made.deleter {
            // SAFETY: the plugin gave it for this.
            unsafe { deleter(made.serialized) };
        }
        Ok(bytes)
    }
}

impl Drop for Executable {
    fn drop(&mut self) {
        self.api.free::<sys::Executable_Destroy>(|a| a.executable = self.raw);
    }
}

impl fmt::Debug for Executable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Executable").field("name", &self.name().ok()).field("outputs", &self.outputs).finish_non_exhaustive()
    }
}

/// A compiled program on a device.
pub struct LoadedExecutable {
    pub(super) client: Arc<ClientHandle>,
    pub(super) raw: *mut sys::LoadedExecutable,
    pub(super) executable: Executable,
}

// SAFETY: the functions of the API may be called from any thread.
unsafe impl Send for LoadedExecutable {}
// SAFETY: as above.
unsafe impl Sync for LoadedExecutable {}

impl LoadedExecutable {
    /// What was compiled.
    pub fn executable(&self) -> &Executable {
        &self.executable
    }

    /// Runs it and waits until it is done. The arguments, on the device that it was compiled for, stay as they are.
    ///
    /// Their number and types are for the caller to get right: a plugin may or may not look.
    ///
    /// # Errors
    /// If the device has no room, or the plugin finds the arguments wrong.
    pub fn execute(&self, arguments: &[&Buffer]) -> Result<Vec<Buffer>, PjrtError> {
        let api = &self.client.api;
        let arguments: Vec<*mut sys::Buffer> = arguments.iter().map(|buffer| buffer.raw).collect();
        let kept: Vec<i64> = (0..arguments.len() as i64).collect();
        let options = sys::execute_options(|options| {
            (options.non_donatable_inputs, options.num_non_donatable_inputs) = (kept.as_ptr(), kept.len());
        });
        let mut outputs = vec![ptr::null_mut(); self.executable.outputs.len()];
        let (of_device, outputs_of_device) = ([arguments.as_ptr()], [outputs.as_mut_ptr()]);
        let mut complete = [ptr::null_mut()];
        api.call::<sys::LoadedExecutable_Execute>(|a| {
            (a.executable, a.options) = (self.raw, options.as_ptr());
            (a.arguments, a.num_devices, a.num_args) = (of_device.as_ptr(), 1, arguments.len());
            (a.outputs, a.complete_events) = (outputs_of_device.as_ptr(), complete.as_mut_ptr());
        })?;
        let outputs = outputs.into_iter().map(|raw| Buffer { client: self.client.clone(), raw }).collect();
        api.wait(complete[0])?;
        Ok(outputs)
    }
}

impl Drop for LoadedExecutable {
    fn drop(&mut self) {
        self.client.api.free::<sys::LoadedExecutable_Destroy>(|a| a.executable = self.raw);
    }
}

impl fmt::Debug for LoadedExecutable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LoadedExecutable").field(&self.executable).finish()
    }
}

/// Hands `stablehlo` over as the API takes it.
pub(super) fn with_program<T>(stablehlo: &str, use_it: impl FnOnce(*const sys::Program) -> T) -> T {
    // Older versions of libtpu read on until a zero.
    let code = [stablehlo.as_bytes(), &[0]].concat();
    let format = "mlir";
    let program = sys::Program {
        struct_size: size_of::<sys::Program>(),
        extension_start: ptr::null_mut(),
        code: code.as_ptr().cast(),
        code_size: stablehlo.len(),
        format: format.as_ptr().cast(),
        format_size: format.len(),
    };
    use_it(&raw const program)
}
