//! The PJRT C API as far as we call it, laid out as its header lays it out.
//!
//! A plugin hands out a table of functions. Each takes one struct, which begins with its own size. Structs and table grow only at
//! their ends (since version 0.54, the oldest that is served): a plugin refuses a struct smaller than its own and takes a larger
//! one, so each is given room to spare, zeroed.

#![allow(non_camel_case_types, reason = "named as in the C header")]

use super::error::{Code, PjrtError};
use std::ffi::{c_char, c_int, c_void};
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::ptr;

/// What the plugin owns and we only point to.
macro_rules! opaque {
    ($($name:ident)*) => { $(pub(super) enum $name {})* };
}

opaque!(Error Event Client Device Memory DeviceDescription TopologyDescription Executable LoadedExecutable Buffer
    SerializedExecutable);

/// A function of the table, as the struct that it takes.
///
/// # Safety
/// The type is what the C header declares after `struct_size` and `extension_start`, all-zero bytes are a value of it, and INDEX is
/// its function's place in the table.
pub(super) unsafe trait Call {
    const INDEX: usize;
    const NAME: &'static str;
}

macro_rules! calls {
    ($($index:literal $name:ident { $($field:ident: $ty:ty),* })*) => { $(
        #[repr(C)]
        pub(super) struct $name { $(pub $field: $ty),* }

        // SAFETY: as in pjrt_c_api.h; pointers, integers, booleans and optional functions may all be zero.
        unsafe impl Call for $name {
            const INDEX: usize = $index;
            const NAME: &'static str = concat!("PJRT_", stringify!($name));
        }
    )* };
}

calls! {
    0 Error_Destroy { error: *mut Error }
    1 Error_Message { error: *const Error, message: *const c_char, message_size: usize }
    2 Error_GetCode { error: *const Error, code: c_int }
    3 Plugin_Initialize {}
    5 Event_Destroy { event: *mut Event }
    8 Event_Await { event: *mut Event }
    10 Client_Create {
        create_options: *const NamedValue, num_options: usize,
        // The store that several processes of one client share: not offered.
        kv_callbacks: [*const c_void; 4],
        client: *mut Client
    }
    11 Client_Destroy { client: *mut Client }
    12 Client_PlatformName { client: *mut Client, name: *const c_char, name_size: usize }
    14 Client_PlatformVersion { client: *mut Client, version: *const c_char, version_size: usize }
    16 Client_AddressableDevices { client: *mut Client, devices: *const *mut Device, num_devices: usize }
    20 Client_Compile {
        client: *mut Client, program: *const Program, options: *const u8, options_size: usize,
        executable: *mut LoadedExecutable
    }
    22 Client_BufferFromHostBuffer {
        client: *mut Client, data: *const c_void, element: c_int, dims: *const i64, num_dims: usize,
        byte_strides: *const i64, num_byte_strides: usize, semantics: c_int,
        device: *mut Device, memory: *mut Memory, layout: *const c_void,
        done_with_host_buffer: *mut Event, buffer: *mut Buffer
    }
    23 DeviceDescription_Id { description: *mut DeviceDescription, id: c_int }
    26 DeviceDescription_Kind { description: *mut DeviceDescription, kind: *const c_char, kind_size: usize }
    29 Device_GetDescription { device: *mut Device, description: *mut DeviceDescription }
    34 Device_MemoryStats {
        device: *mut Device, bytes_in_use: i64, peak_bytes_in_use: i64, peak_bytes_in_use_is_set: bool,
        num_allocs: i64, num_allocs_is_set: bool, largest_alloc_size: i64, largest_alloc_size_is_set: bool,
        bytes_limit: i64, bytes_limit_is_set: bool
    }
    40 Executable_Destroy { executable: *mut Executable }
    41 Executable_Name { executable: *mut Executable, name: *const c_char, name_size: usize }
    46 Executable_GetCostAnalysis { executable: *mut Executable, num_properties: usize, properties: *const NamedValue }
    49 Executable_Serialize {
        executable: *const Executable, bytes: *const u8, bytes_size: usize, serialized: *mut SerializedExecutable,
        deleter: Option<unsafe extern "C" fn(*mut SerializedExecutable)>
    }
    50 LoadedExecutable_Destroy { executable: *mut LoadedExecutable }
    51 LoadedExecutable_GetExecutable { loaded: *mut LoadedExecutable, executable: *mut Executable }
    55 LoadedExecutable_Execute {
        executable: *mut LoadedExecutable, options: *const Args<ExecuteOptions>,
        arguments: *const *const *mut Buffer, num_devices: usize, num_args: usize,
        outputs: *const *mut *mut Buffer, complete_events: *mut *mut Event, device: *mut Device
    }
    58 Buffer_Destroy { buffer: *mut Buffer }
    59 Buffer_ElementType { buffer: *mut Buffer, element: c_int }
    60 Buffer_Dimensions { buffer: *mut Buffer, dims: *const i64, num_dims: usize }
    70 Buffer_ToHostBuffer {
        buffer: *mut Buffer, layout: *const MemoryLayout, data: *mut c_void, size: usize, event: *mut Event
    }
    82 TopologyDescription_Create {
        name: *const c_char, name_size: usize, create_options: *const NamedValue, num_options: usize,
        topology: *mut TopologyDescription
    }
    83 TopologyDescription_Destroy { topology: *mut TopologyDescription }
    84 TopologyDescription_PlatformName { topology: *const TopologyDescription, name: *const c_char, name_size: usize }
    85 TopologyDescription_PlatformVersion { topology: *mut TopologyDescription, version: *const c_char, version_size: usize }
    86 TopologyDescription_GetDeviceDescriptions {
        topology: *const TopologyDescription, descriptions: *const *mut DeviceDescription, num_descriptions: usize
    }
    89 Compile {
        topology: *const TopologyDescription, program: *const Program, options: *const u8, options_size: usize,
        client: *mut Client, executable: *mut Executable
    }
    90 Executable_OutputElementTypes { executable: *mut Executable, elements: *const c_int, num_outputs: usize }
    91 Executable_OutputDimensions {
        executable: *mut Executable, num_outputs: usize, dims: *const i64, dim_sizes: *const usize
    }
    96 Executable_GetCompiledMemoryStats {
        executable: *mut Executable,
        generated_code: i64, argument: i64, output: i64, alias: i64, temp: i64,
        host_generated_code: i64, host_argument: i64, host_output: i64, host_alias: i64, host_temp: i64,
        peak: i64, total: i64
    }
}

/// Words of room after each struct.
const SPARE: usize = 48;

/// What a function takes: its struct, the sizes before it, and zeroed room after it for the fields of later versions.
#[repr(C)]
pub(super) struct Args<T> {
    struct_size: usize,
    extension_start: *mut c_void,
    pub call: T,
    spare: [usize; SPARE],
}

impl<T> Args<T> {
    /// All zero, padding too, before `fill`.
    ///
    /// # Safety
    /// All-zero bytes are a T.
    unsafe fn new(fill: impl FnOnce(&mut T)) -> Box<MaybeUninit<Self>> {
        let mut args = Box::<Self>::new_uninit();
        // SAFETY: the box is that large; zero is a value of every field, by what is required of T.
        unsafe {
            args.as_mut_ptr().write_bytes(0, 1);
            let args = &mut *args.as_mut_ptr();
            args.struct_size = size_of::<Self>();
            fill(&mut args.call);
        }
        args
    }
}

/// `PJRT_ExecuteOptions`, as far as it is used.
#[repr(C)]
pub(super) struct ExecuteOptions {
    callbacks: [*const c_void; 2],
    num_callbacks: [usize; 2],
    launch_id: c_int,
    pub non_donatable_inputs: *const i64,
    pub num_non_donatable_inputs: usize,
}

pub(super) fn execute_options(fill: impl FnOnce(&mut ExecuteOptions)) -> Box<MaybeUninit<Args<ExecuteOptions>>> {
    // SAFETY: pointers and integers may be zero.
    unsafe { Args::new(fill) }
}

/// `PJRT_Program`. Its size is fixed.
#[repr(C)]
pub(super) struct Program {
    pub struct_size: usize,
    pub extension_start: *mut c_void,
    pub code: *const c_char,
    pub code_size: usize,
    pub format: *const c_char,
    pub format_size: usize,
}

/// `PJRT_NamedValue`. Its size is fixed.
#[repr(C)]
pub(super) struct NamedValue {
    pub struct_size: usize,
    pub extension_start: *mut c_void,
    pub name: *const c_char,
    pub name_size: usize,
    pub kind: c_int,
    pub value: NamedValueUnion,
    pub value_size: usize,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) union NamedValueUnion {
    pub string: *const c_char,
    pub int: i64,
    pub ints: *const i64,
    pub float: f32,
    pub bool: bool,
}

/// `PJRT_Buffer_MemoryLayout`, tiled, without tiles: an order of dimensions.
#[repr(C)]
pub(super) struct MemoryLayout {
    pub struct_size: usize,
    pub extension_start: *mut c_void,
    pub tiled: TiledLayout,
    pub kind: c_int,
}

#[repr(C)]
pub(super) struct TiledLayout {
    pub struct_size: usize,
    pub extension_start: *mut c_void,
    pub minor_to_major: *const i64,
    pub minor_to_major_size: usize,
    pub tile_dims: *const i64,
    pub tile_dim_sizes: *const usize,
    pub num_tiles: usize,
}

#[repr(C)]
struct ApiHead {
    struct_size: usize,
    extension_start: *mut c_void,
    version_struct_size: usize,
    version_extension_start: *mut c_void,
    major: c_int,
    minor: c_int,
}

/// The oldest version whose table and structs are laid out as above.
const OLDEST: (c_int, c_int) = (0, 54);

/// A plugin's table of functions.
pub(super) struct Api {
    head: *const ApiHead,
    functions: usize,
    pub version: (c_int, c_int),
    /// Of the library, for messages.
    pub path: PathBuf,
}

// SAFETY: the table is constant and lives as long as the process, since libraries stay loaded; the API's functions may be called
// from any thread.
unsafe impl Send for Api {}
// SAFETY: as above.
unsafe impl Sync for Api {}

impl Api {
    /// # Safety
    /// `table` is what `GetPjrtApi` of the library at `path` returned, and the library stays loaded.
    pub unsafe fn new(table: *const c_void, path: &Path) -> Result<Self, PjrtError> {
        let path = path.to_owned();
        if table.is_null() {
            return Err(PjrtError::NotAPlugin { path, why: "its GetPjrtApi returns nothing".into() });
        }
        let head = table.cast::<ApiHead>();
        // SAFETY: every version of the table begins so.
        let ApiHead { struct_size, major, minor, .. } = unsafe { head.read() };
        if major != OLDEST.0 || minor < OLDEST.1 {
            return Err(PjrtError::Version { path, found: (major, minor), oldest: OLDEST });
        }
        let functions = struct_size.saturating_sub(size_of::<ApiHead>()) / size_of::<usize>();
        Ok(Self { head, functions, version: (major, minor), path })
    }

    /// Calls the function that takes a T, filled in by `fill`, and gives the T back with what the plugin wrote into it.
    pub fn call<T: Call>(&self, fill: impl FnOnce(&mut T)) -> Result<T, PjrtError> {
        let lacks = || PjrtError::Lacks { path: self.path.clone(), call: T::NAME };
        let (call, error) = self.invoke(fill).ok_or_else(lacks)?;
        if error.is_null() { Ok(call) } else { Err(self.refused(T::NAME, error)) }
    }

    /// What the function wrote, and what it returned; `None` if the plugin does not have it.
    fn invoke<T: Call>(&self, fill: impl FnOnce(&mut T)) -> Option<(T, *mut Error)> {
        // SAFETY: the table is that long.
        let read = || unsafe { self.head.add(1).cast::<*const c_void>().add(T::INDEX).read() };
        let function = (T::INDEX < self.functions).then(read).filter(|function| !function.is_null())?;
        // SAFETY: by the contract of `Call`, this is what lies there.
        let function: unsafe extern "C" fn(*mut Args<T>) -> *mut Error = unsafe { std::mem::transmute(function) };
        // SAFETY: by the contract of `Call`.
        let mut args = unsafe { Args::<T>::new(fill) };
        // SAFETY: it takes a T, and who filled it in knows what it needs.
        let error = unsafe { function(args.as_mut_ptr()) };
        // SAFETY: it was zeroed, which is a value, and then written to by the plugin as the header says.
        Some((unsafe { ptr::read(&raw const (*args.as_ptr()).call) }, error))
    }

    /// Calls a function that frees what it is given. There is nothing to do about an error then.
    pub fn free<T: Call>(&self, fill: impl FnOnce(&mut T)) {
        _ = self.call(fill);
    }

    /// Takes the error apart and frees it. The functions that do so fail in no way that is told.
    fn refused(&self, call: &'static str, error: *mut Error) -> PjrtError {
        let code = self.invoke::<Error_GetCode>(|a| a.error = error).map_or(Code::Unknown, |(a, _)| a.code.into());
        let message = self.invoke::<Error_Message>(|a| a.error = error).map_or(String::new(), |(a, _)| {
            // SAFETY: the error owns it until it is freed below.
            unsafe { text(a.message, a.message_size) }
        });
        self.invoke::<Error_Destroy>(|a| a.error = error);
        PjrtError::Refused { path: self.path.clone(), call, code, message: concise(&message) }
    }

    /// Waits for `event` and frees it; null is an event that has happened.
    pub fn wait(&self, event: *mut Event) -> Result<(), PjrtError> {
        if event.is_null() {
            return Ok(());
        }
        let awaited = self.call::<Event_Await>(|a| a.event = event);
        self.free::<Event_Destroy>(|a| a.event = event);
        awaited.map(drop)
    }
}

/// A plugin's message without the places in its own source that some append.
fn concise(message: &str) -> String {
    message.split("\n=== Source Location").next().unwrap_or_default().trim().to_owned()
}

/// A copy of a string of the plugin's.
///
/// # Safety
/// `size` bytes lie at `start`, unless `size` is 0.
pub(super) unsafe fn text(start: *const c_char, size: usize) -> String {
    // SAFETY: as required.
    String::from_utf8_lossy(unsafe { slice(start.cast(), size) }).into_owned()
}

/// A slice of the plugin's, which may be empty and null.
///
/// # Safety
/// `len` elements lie at `start`, unless `len` is 0, and stay for 'a.
pub(super) unsafe fn slice<'a, T>(start: *const T, len: usize) -> &'a [T] {
    // SAFETY: as required.
    if len == 0 || start.is_null() { &[] } else { unsafe { std::slice::from_raw_parts(start, len) } }
}
