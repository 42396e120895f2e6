//! XLA programs on any device, through the PJRT C API of a plugin that is loaded when it is asked for.
//!
//! A thin wrapper: [`Plugin`] → [`Client`] → [`Device`], which takes tensors ([`Buffer`]) and StableHLO text
//! ([`LoadedExecutable`]). A [`Topology`] compiles for devices that are not at hand. Everything is freed on the device when it is
//! dropped, in any order.
//!
//! ```no_run
//! use fused_xent::pjrt::{CompileOptions, Element, Options, Plugin};
//!
//! # fn main() -> Result<(), fused_xent::pjrt::PjrtError> {
//! let device = Plugin::load("cuda")?.client(&Options::new())?.device(0)?;
//! let twice = "module { func.func public @main(%x: tensor<2xf32>) -> tensor<2xf32> {
//!     %0 = stablehlo.add %x, %x : tensor<2xf32>
//!     return %0 : tensor<2xf32>
//! } }";
//! let program = device.compile(twice, &CompileOptions::default())?;
//! let x = device.upload(Element::F32, &[2], &[1f32, 2.0].map(f32::to_le_bytes).concat())?;
//! println!("{:?}", program.execute(&[&x])?[0].to_host()?);
//!
//! let v5e = Plugin::load("tpu")?.topology("v5e:1x1", &Options::new())?;
//! println!("{:?}", v5e.compile_ahead(twice, &CompileOptions::default())?.memory()?);
//! # Ok(())
//! # }
//! ```

mod client;
mod error;
mod executable;
mod options;
mod plugin;
mod sys;
mod topology;

pub use client::{Buffer, Client, Device, DeviceMemory, Element, HostTensor};
pub use error::{Code, PjrtError};
pub use executable::{Executable, LoadedExecutable, MemoryFigures};
pub use options::{CompileOptions, Options, Value};
pub use plugin::{PLUGINS_VARIABLE, Plugin};
pub use topology::Topology;
