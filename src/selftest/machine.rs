//! What runs programs: a device of a PJRT plugin, or what a test puts in its place.

use crate::pjrt::{Buffer, CompileOptions, Device, Element, HostTensor, LoadedExecutable};
use fused_xent_kernels::problem::{DType, Layout, LossOptions, Shape};
use fused_xent_kernels::tpu::{Generation, Spec};
use half::bf16;

/// Whatever goes wrong when a program is made, compiled or run.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Runs programs of StableHLO.
pub trait Machine {
    /// Makes a program ready.
    ///
    /// # Errors
    /// If it is refused.
    fn load(&self, program: &str) -> Result<Box<dyn Loaded + '_>, Failure>;

    /// Leaves what a program must not look at as bad as it may be.
    ///
    /// # Errors
    /// If that cannot be done.
    fn disturb(&self) -> Result<(), Failure> {
        Ok(())
    }
}

/// A program that is ready.
pub trait Loaded {
    /// Runs it.
    ///
    /// # Errors
    /// If that fails.
    fn run(&self, arguments: &[&HostTensor]) -> Result<Vec<HostTensor>, Failure>;
}

/// A device, and on a TPU a kernel that leaves NaN in its memory.
#[derive(Debug)]
pub struct OnDevice {
    /// The device.
    pub device: Device,
    leaves_nan: Option<(LoadedExecutable, Vec<Buffer>)>,
}

impl OnDevice {
    /// `generation` says what TPU it is, if it is one.
    ///
    /// # Errors
    /// If a TPU refuses the kernel that leaves NaN.
    pub fn new(device: Device, generation: Option<Generation>) -> Result<Self, Failure> {
        let leaves_nan = generation.map(|generation| leaves_nan(&device, generation)).transpose()?;
        Ok(Self { device, leaves_nan })
    }
}

impl Machine for OnDevice {
    fn load(&self, program: &str) -> Result<Box<dyn Loaded + '_>, Failure> {
        let executable = self.device.compile(program, &CompileOptions::default())?;
        Ok(Box::new(OnIt { device: &self.device, executable }))
    }

    fn disturb(&self) -> Result<(), Failure> {
        if let Some((executable, arguments)) = &self.leaves_nan {
            executable.execute(&arguments.iter().collect::<Vec<_>>())?;
        }
        Ok(())
    }
}

struct OnIt<'a> {
    device: &'a Device,
    executable: LoadedExecutable,
}

impl Loaded for OnIt<'_> {
    fn run(&self, arguments: &[&HostTensor]) -> Result<Vec<HostTensor>, Failure> {
        let upload = |x: &&HostTensor| self.device.upload(x.element, &x.dims, &x.bytes);
        let uploaded = arguments.iter().map(upload).collect::<Result<Vec<_>, _>>()?;
        let results = self.executable.execute(&uploaded.iter().collect::<Vec<_>>())?;
        Ok(results.iter().map(Buffer::to_host).collect::<Result<_, _>>()?)
    }
}

/// A forward of nothing but NaN, whose windows fill much of VMEM: a later kernel that looks at a tail that it did not fetch finds
/// them there.
fn leaves_nan(device: &Device, generation: Generation) -> Result<(LoadedExecutable, Vec<Buffer>), Failure> {
    let shape = Shape { tokens: 1024, hidden: 1024, vocab: 4096 };
    let spec = Spec { shape, layout: Layout::Vd, inputs: [DType::Bf16; 2], options: LossOptions::default() };
    let executable = device.compile(&spec.forward(generation, None)?.text, &CompileOptions::default())?;
    let nan =
        |rows: usize| device.upload(Element::Bf16, &[rows, shape.hidden], &bf16::NAN.to_le_bytes().repeat(rows * shape.hidden));
    let labels = device.upload(Element::I32, &[shape.tokens], &vec![0; shape.tokens * size_of::<i32>()])?;
    Ok((executable, vec![nan(shape.tokens)?, nan(shape.vocab)?, labels]))
}
