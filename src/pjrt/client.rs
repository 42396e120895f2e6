//! Devices, and tensors on them.

use super::error::PjrtError;
use super::executable::{Executable, LoadedExecutable, with_program};
use super::options::{CompileOptions, Options, named_values};
use super::plugin::Plugin;
use super::sys::{self, Api};
use half::{bf16, f16};
use std::ffi::c_int;
use std::fmt;
use std::ptr;
use std::sync::Arc;

macro_rules! elements {
    ($($code:literal $name:ident $mlir:literal $size:literal)*) => {
        /// The type of a tensor's elements.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[allow(missing_docs, reason = "named as in StableHLO")]
        pub enum Element { $($name),* }

        impl Element {
            /// As StableHLO writes it.
            pub fn name(self) -> &'static str {
                match self { $(Element::$name => $mlir),* }
            }

            /// The type that StableHLO writes so.
            pub fn by_name(name: &str) -> Option<Self> {
                match name { $($mlir => Some(Element::$name),)* _ => None }
            }

            /// Bytes of one element.
            pub fn size(self) -> usize {
                match self { $(Element::$name => $size),* }
            }

            pub(super) fn code(self) -> c_int {
                match self { $(Element::$name => $code),* }
            }

            pub(super) fn by_code(code: c_int) -> Option<Self> {
                match code { $($code => Some(Element::$name),)* _ => None }
            }
        }
    };
}

elements! {
    1 I1 "i1" 1
    2 I8 "i8" 1
    3 I16 "i16" 2
    4 I32 "i32" 4
    5 I64 "i64" 8
    6 Ui8 "ui8" 1
    7 Ui16 "ui16" 2
    8 Ui32 "ui32" 4
    9 Ui64 "ui64" 8
    10 F16 "f16" 2
    11 F32 "f32" 4
    12 F64 "f64" 8
    13 Bf16 "bf16" 2
}

/// A tensor on the host: its elements, little-endian, in row-major order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostTensor {
    /// Of its elements.
    pub element: Element,
    /// Its dimensions; none for a scalar.
    pub dims: Vec<usize>,
    /// As many as the dimensions and the element make.
    pub bytes: Vec<u8>,
}

impl HostTensor {
    /// Its element `i`, of floats.
    ///
    /// # Panics
    /// If there is no such element.
    pub fn get(&self, i: usize) -> f64 {
        match self.element {
            Element::Bf16 => bf16::from_le_bytes(self.bytes.as_chunks().0[i]).to_f64(),
            Element::F16 => f16::from_le_bytes(self.bytes.as_chunks().0[i]).to_f64(),
            Element::F64 => f64::from_le_bytes(self.bytes.as_chunks().0[i]),
            _ => f32::from_le_bytes(self.bytes.as_chunks().0[i]).into(),
        }
    }
}

/// A hold on a plugin's devices.
#[derive(Clone)]
pub struct Client(pub(super) Arc<ClientHandle>);

pub(super) struct ClientHandle {
    pub api: Arc<Api>,
    pub raw: *mut sys::Client,
}

// SAFETY: the functions of the API may be called from any thread.
unsafe impl Send for ClientHandle {}
// SAFETY: as above.
unsafe impl Sync for ClientHandle {}

impl Drop for ClientHandle {
    fn drop(&mut self) {
        self.api.free::<sys::Client_Destroy>(|a| a.client = self.raw);
    }
}

impl Client {
    pub(super) fn new(plugin: &Plugin, options: &Options) -> Result<Self, PjrtError> {
        let api = plugin.api.clone();
        let values = named_values(options);
        let created = api.call::<sys::Client_Create>(|a| {
            (a.create_options, a.num_options) = (values.as_ptr(), values.len());
        })?;
        Ok(Self(Arc::new(ClientHandle { api, raw: created.client })))
    }

    /// `cpu`, `cuda`, `tpu`, …
    ///
    /// # Errors
    /// If the plugin does not say.
    pub fn platform(&self) -> Result<String, PjrtError> {
        let named = self.0.api.call::<sys::Client_PlatformName>(|a| a.client = self.0.raw)?;
        // SAFETY: the client owns it.
        Ok(unsafe { sys::text(named.name, named.name_size) })
    }

    /// What the plugin says of its own version.
    ///
    /// # Errors
    /// If the plugin does not say.
    pub fn platform_version(&self) -> Result<String, PjrtError> {
        let named = self.0.api.call::<sys::Client_PlatformVersion>(|a| a.client = self.0.raw)?;
        // SAFETY: the client owns it.
        Ok(unsafe { sys::text(named.version, named.version_size) })
    }

    /// Those of this process.
    ///
    /// # Errors
    /// If the plugin does not say.
    pub fn devices(&self) -> Result<Vec<Device>, PjrtError> {
        let listed = self.0.api.call::<sys::Client_AddressableDevices>(|a| a.client = self.0.raw)?;
        // SAFETY: the client owns the list and what it points to.
        let devices = unsafe { sys::slice(listed.devices, listed.num_devices) };
        Ok(devices.iter().map(|&raw| Device { client: self.0.clone(), raw }).collect())
    }

    /// Number `index` of its devices.
    ///
    /// # Errors
    /// If there are fewer.
    pub fn device(&self, index: usize) -> Result<Device, PjrtError> {
        let mut devices = self.devices()?;
        let available = devices.len();
        let none = PjrtError::NoDevice { path: self.0.api.path.clone(), asked: index, available };
        if index < available { Ok(devices.swap_remove(index)) } else { Err(none) }
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("plugin", &self.0.api.path).finish_non_exhaustive()
    }
}

/// One device of a client.
#[derive(Clone)]
pub struct Device {
    client: Arc<ClientHandle>,
    raw: *mut sys::Device,
}

// SAFETY: the functions of the API may be called from any thread.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// What a device says of its memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    /// In use now.
    pub in_use: u64,
    /// The most that was in use since the client was made, where the plugin says.
    pub peak: Option<u64>,
    /// What may be used, where the plugin says.
    pub limit: Option<u64>,
}

impl Device {
    /// The device's own number, unique over all processes.
    ///
    /// # Errors
    /// If the plugin does not say.
    pub fn id(&self) -> Result<i64, PjrtError> {
        id_of(&self.client.api, self.description()?)
    }

    /// Its vendor's name for it: `NVIDIA H100 80GB HBM3`.
    ///
    /// # Errors
    /// If the plugin does not say.
    pub fn kind(&self) -> Result<String, PjrtError> {
        kind_of(&self.client.api, self.description()?)
    }

    /// Of its memory.
    ///
    /// # Errors
    /// If the plugin does not say.
    pub fn memory(&self) -> Result<DeviceMemory, PjrtError> {
        let stats = self.client.api.call::<sys::Device_MemoryStats>(|a| a.device = self.raw)?;
        let bytes = |bytes: i64| u64::try_from(bytes).unwrap_or(0);
        Ok(DeviceMemory {
            in_use: bytes(stats.bytes_in_use),
            peak: stats.peak_bytes_in_use_is_set.then(|| bytes(stats.peak_bytes_in_use)),
            limit: stats.bytes_limit_is_set.then(|| bytes(stats.bytes_limit)),
        })
    }

    /// Copies a tensor to the device, bit for bit. Returns once `bytes` are no longer needed.
    ///
    /// # Errors
    /// If `bytes` are not as many as the dimensions make, or the device has no room.
    pub fn upload(&self, element: Element, dims: &[usize], bytes: &[u8]) -> Result<Buffer, PjrtError> {
        let size = size_of_tensor(element, dims);
        if size != Some(bytes.len()) {
            return Err(PjrtError::Mismatch {
                what: format!("a tensor {dims:?} of {}", element.name()),
                found: format!("{} bytes", bytes.len()),
                expected: size.map_or("dimensions that an address can count".into(), |size| size.to_string()),
            });
        }
        let dims: Vec<i64> = dims.iter().map(|&dim| dim as i64).collect();
        let api = &self.client.api;
        let made = api.call::<sys::Client_BufferFromHostBuffer>(|a| {
            (a.client, a.device) = (self.client.raw, self.raw);
            (a.data, a.element) = (bytes.as_ptr().cast(), element.code());
            (a.dims, a.num_dims) = (dims.as_ptr(), dims.len());
            a.semantics = IMMUTABLE_UNTIL_TRANSFER_COMPLETES;
        })?;
        let buffer = Buffer { client: self.client.clone(), raw: made.buffer };
        api.wait(made.done_with_host_buffer)?;
        Ok(buffer)
    }

    /// Compiles a module of StableHLO for this device.
    ///
    /// # Errors
    /// If it does not parse, or the device cannot run it.
    pub fn compile(&self, stablehlo: &str, options: &CompileOptions) -> Result<LoadedExecutable, PjrtError> {
        let options = options.encoded(self.id()?);
        let api = &self.client.api;
        let compiled = with_program(stablehlo, |program| {
            api.call::<sys::Client_Compile>(|a| {
                (a.client, a.program) = (self.client.raw, program);
                (a.options, a.options_size) = (options.as_ptr(), options.len());
            })
        })?;
        LoadedExecutable::new(self.client.clone(), compiled.executable)
    }

    fn description(&self) -> Result<*mut sys::DeviceDescription, PjrtError> {
        Ok(self.client.api.call::<sys::Device_GetDescription>(|a| a.device = self.raw)?.description)
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("id", &self.id().ok()).field("kind", &self.kind().ok()).finish_non_exhaustive()
    }
}

/// Of `PJRT_HostBufferSemantics`.
const IMMUTABLE_UNTIL_TRANSFER_COMPLETES: c_int = 1;

/// Bytes of a tensor; `None` if there are more than an address can count.
fn size_of_tensor(element: Element, dims: &[usize]) -> Option<usize> {
    dims.iter().try_fold(element.size(), |size, &dim| size.checked_mul(dim))
}

pub(super) fn id_of(api: &Api, description: *mut sys::DeviceDescription) -> Result<i64, PjrtError> {
    Ok(i64::from(api.call::<sys::DeviceDescription_Id>(|a| a.description = description)?.id))
}

pub(super) fn kind_of(api: &Api, description: *mut sys::DeviceDescription) -> Result<String, PjrtError> {
    let named = api.call::<sys::DeviceDescription_Kind>(|a| a.description = description)?;
    // SAFETY: the description owns it.
    Ok(unsafe { sys::text(named.kind, named.kind_size) })
}

/// A tensor on a device. Freed there when dropped.
pub struct Buffer {
    pub(super) client: Arc<ClientHandle>,
    pub(super) raw: *mut sys::Buffer,
}

// SAFETY: the functions of the API may be called from any thread.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// The type of its elements.
    ///
    /// # Errors
    /// If it is none that [`Element`] has.
    pub fn element(&self) -> Result<Element, PjrtError> {
        let code = self.client.api.call::<sys::Buffer_ElementType>(|a| a.buffer = self.raw)?.element;
        known_element(code)
    }

    /// Its dimensions.
    ///
    /// # Errors
    /// If the plugin does not say.
    pub fn dims(&self) -> Result<Vec<usize>, PjrtError> {
        let listed = self.client.api.call::<sys::Buffer_Dimensions>(|a| a.buffer = self.raw)?;
        // SAFETY: the buffer owns them.
        let dims = unsafe { sys::slice(listed.dims, listed.num_dims) };
        Ok(dims.iter().map(|&dim| usize::try_from(dim).unwrap_or(0)).collect())
    }

    /// Copies it to the host, bit for bit, once it has been computed.
    ///
    /// # Errors
    /// What went wrong when it was computed, or copied.
    pub fn to_host(&self) -> Result<HostTensor, PjrtError> {
        let (element, dims) = (self.element()?, self.dims()?);
        let size = size_of_tensor(element, &dims).expect("it is on a device");
        let mut bytes = vec![0; size];
        let order: Vec<i64> = (0..dims.len() as i64).rev().collect();
        let layout = sys::MemoryLayout {
            struct_size: size_of::<sys::MemoryLayout>(),
            extension_start: ptr::null_mut(),
            tiled: sys::TiledLayout {
                struct_size: size_of::<sys::TiledLayout>(),
                extension_start: ptr::null_mut(),
                minor_to_major: order.as_ptr(),
                minor_to_major_size: order.len(),
                tile_dims: ptr::null(),
                tile_dim_sizes: ptr::null(),
                num_tiles: 0,
            },
            kind: 0,
        };
        if size > 0 {
            let api = &self.client.api;
            let copying = api.call::<sys::Buffer_ToHostBuffer>(|a| {
                (a.buffer, a.layout) = (self.raw, &raw const layout);
                (a.data, a.size) = (bytes.as_mut_ptr().cast(), size);
            })?;
            api.wait(copying.event)?;
        }
        Ok(HostTensor { element, dims, bytes })
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.client.api.free::<sys::Buffer_Destroy>(|a| a.buffer = self.raw);
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer").field("element", &self.element().ok()).field("dims", &self.dims().ok()).finish_non_exhaustive()
    }
}

pub(super) fn known_element(code: c_int) -> Result<Element, PjrtError> {
    Element::by_code(code).ok_or_else(|| PjrtError::Mismatch {
        what: "a tensor's elements".into(),
        found: format!("type {code} of the PJRT API"),
        expected: "booleans, integers of 8 to 64 bits, bf16, f16, f32 or f64".into(),
    })
}

impl LoadedExecutable {
    fn new(client: Arc<ClientHandle>, raw: *mut sys::LoadedExecutable) -> Result<Self, PjrtError> {
        let api = client.api.clone();
        let described = api.call::<sys::LoadedExecutable_GetExecutable>(|a| a.loaded = raw);
        match described.and_then(|described| Executable::new(api.clone(), described.executable)) {
            Ok(executable) => Ok(Self { client, raw, executable }),
            Err(e) => {
                api.free::<sys::LoadedExecutable_Destroy>(|a| a.executable = raw);
                Err(e)
            }
        }
    }
}
