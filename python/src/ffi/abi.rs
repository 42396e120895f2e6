//! The part of XLA's foreign function interface that the handlers use, as `xla/ffi/api/c_api.h` lays it out (API 0.1 to 0.3).
//!
//! XLA writes `struct_size` as the end of the last field that its version declares, which is neither `size_of` nor the same in
//! every version; what follows the fields declared here is never touched.

use std::ffi::{c_char, c_int, c_void};
use std::mem::{offset_of, size_of};

/// The newest minor version of the API that these structs are true to; the major one is 0.
pub(super) const API_MINOR: c_int = 3;
/// The oldest one, whose framework does not introduce itself.
pub(super) const OLDEST_API_MINOR: c_int = 1;

/// `XLA_FFI_Extension_Metadata`: the handler is asked who it is, not to compute.
pub(super) const EXTENSION_METADATA: c_int = 1;
/// `XLA_FFI_ExecutionStage_EXECUTE`.
pub(super) const STAGE_EXECUTE: c_int = 3;
/// `XLA_FFI_ArgType_BUFFER` and `XLA_FFI_RetType_BUFFER`.
pub(super) const BUFFER: c_int = 1;
/// `XLA_FFI_AttrType_SCALAR`.
pub(super) const ATTRIBUTE_SCALAR: c_int = 3;
/// `XLA_FFI_AttrType_STRING`.
pub(super) const ATTRIBUTE_STRING: c_int = 4;

/// `XLA_FFI_DataType`, those that may arrive.
pub(super) mod dtype {
    use std::ffi::c_int;

    pub(crate) const PRED: c_int = 1;
    pub(crate) const S32: c_int = 4;
    pub(crate) const S64: c_int = 5;
    pub(crate) const U32: c_int = 8;
    pub(crate) const F16: c_int = 10;
    pub(crate) const F32: c_int = 11;
    pub(crate) const F64: c_int = 12;
    pub(crate) const BF16: c_int = 16;
}

/// `XLA_FFI_Error_Code`.
#[derive(Clone, Copy, Debug)]
#[repr(i32)]
pub(super) enum ErrorCode {
    InvalidArgument = 3,
    FailedPrecondition = 9,
    Internal = 13,
}

#[repr(C)]
pub(super) struct ExtensionBase {
    pub struct_size: usize,
    pub kind: c_int,
    pub next: *mut ExtensionBase,
}

#[repr(C)]
pub(super) struct ApiVersion {
    pub struct_size: usize,
    pub extension_start: *mut ExtensionBase,
    pub major: c_int,
    pub minor: c_int,
}

#[repr(C)]
pub(super) struct ErrorCreateArgs {
    pub struct_size: usize,
    pub extension_start: *mut ExtensionBase,
    pub message: *const c_char,
    pub code: c_int,
}

impl ErrorCreateArgs {
    /// `XLA_FFI_Error_Create_Args_STRUCT_SIZE`: without the padding at the end.
    pub(super) const STRUCT_SIZE: usize = offset_of!(ErrorCreateArgs, code) + size_of::<c_int>();
}

#[repr(C)]
pub(super) struct Buffer {
    pub struct_size: usize,
    pub extension_start: *mut ExtensionBase,
    pub dtype: c_int,
    pub data: *mut c_void,
    pub rank: i64,
    pub dims: *mut i64,
}

/// Not terminated by a 0.
#[repr(C)]
pub(super) struct ByteSpan {
    pub start: *const u8,
    pub length: usize,
}

#[repr(C)]
pub(super) struct Scalar {
    pub dtype: c_int,
    pub value: *mut c_void,
}

/// `XLA_FFI_Args`, and `XLA_FFI_Rets`, which is the same.
#[repr(C)]
pub(super) struct Buffers {
    pub struct_size: usize,
    pub extension_start: *mut ExtensionBase,
    pub size: i64,
    pub types: *mut c_int,
    pub buffers: *mut *mut c_void,
}

#[repr(C)]
pub(super) struct Attributes {
    pub struct_size: usize,
    pub extension_start: *mut ExtensionBase,
    pub size: i64,
    pub types: *mut c_int,
    pub names: *mut *mut ByteSpan,
    pub values: *mut *mut c_void,
}

#[repr(C)]
pub(super) struct CallFrame {
    pub struct_size: usize,
    pub extension_start: *mut ExtensionBase,
    pub api: *const Api,
    pub context: *mut c_void,
    pub stage: c_int,
    pub arguments: Buffers,
    pub results: Buffers,
    pub attributes: Attributes,
}

/// What a handler says of itself. Newer versions have a field more, which older ones do not allocate, and both give the same
/// `struct_size`: it must not be written.
#[repr(C)]
pub(super) struct Metadata {
    pub struct_size: usize,
    pub api_version: ApiVersion,
    pub traits: u32,
}

#[repr(C)]
pub(super) struct MetadataExtension {
    pub base: ExtensionBase,
    pub metadata: *mut Metadata,
}

/// Its beginning.
#[repr(C)]
pub(super) struct Api {
    pub struct_size: usize,
    pub extension_start: *mut ExtensionBase,
    pub api_version: ApiVersion,
    pub internal: *const c_void,
    pub error_create: unsafe extern "C" fn(*mut ErrorCreateArgs) -> *mut c_void,
}

/// Where each field lies, by its name in the header: for the test that asks a C compiler.
pub(super) const LAYOUT: [(&str, usize); 36] = [
    ("XLA_FFI_Extension_Base.type", offset_of!(ExtensionBase, kind)),
    ("XLA_FFI_Extension_Base.next", offset_of!(ExtensionBase, next)),
    ("XLA_FFI_Api_Version", size_of::<ApiVersion>()),
    ("XLA_FFI_Api_Version.major_version", offset_of!(ApiVersion, major)),
    ("XLA_FFI_Api_Version.minor_version", offset_of!(ApiVersion, minor)),
    ("XLA_FFI_Error_Create_Args_STRUCT_SIZE", ErrorCreateArgs::STRUCT_SIZE),
    ("XLA_FFI_Error_Create_Args.extension_start", offset_of!(ErrorCreateArgs, extension_start)),
    ("XLA_FFI_Error_Create_Args.message", offset_of!(ErrorCreateArgs, message)),
    ("XLA_FFI_Error_Create_Args.errc", offset_of!(ErrorCreateArgs, code)),
    ("XLA_FFI_Buffer.dtype", offset_of!(Buffer, dtype)),
    ("XLA_FFI_Buffer.data", offset_of!(Buffer, data)),
    ("XLA_FFI_Buffer.rank", offset_of!(Buffer, rank)),
    ("XLA_FFI_Buffer.dims", offset_of!(Buffer, dims)),
    ("XLA_FFI_ByteSpan.ptr", offset_of!(ByteSpan, start)),
    ("XLA_FFI_ByteSpan.len", offset_of!(ByteSpan, length)),
    ("XLA_FFI_Scalar.dtype", offset_of!(Scalar, dtype)),
    ("XLA_FFI_Scalar.value", offset_of!(Scalar, value)),
    ("XLA_FFI_Args", size_of::<Buffers>()),
    ("XLA_FFI_Args.size", offset_of!(Buffers, size)),
    ("XLA_FFI_Args.types", offset_of!(Buffers, types)),
    ("XLA_FFI_Args.args", offset_of!(Buffers, buffers)),
    ("XLA_FFI_Rets", size_of::<Buffers>()),
    ("XLA_FFI_Rets.rets", offset_of!(Buffers, buffers)),
    ("XLA_FFI_Attrs", size_of::<Attributes>()),
    ("XLA_FFI_Attrs.types", offset_of!(Attributes, types)),
    ("XLA_FFI_Attrs.names", offset_of!(Attributes, names)),
    ("XLA_FFI_Attrs.attrs", offset_of!(Attributes, values)),
    ("XLA_FFI_CallFrame.api", offset_of!(CallFrame, api)),
    ("XLA_FFI_CallFrame.stage", offset_of!(CallFrame, stage)),
    ("XLA_FFI_CallFrame.args", offset_of!(CallFrame, arguments)),
    ("XLA_FFI_CallFrame.rets", offset_of!(CallFrame, results)),
    ("XLA_FFI_CallFrame.attrs", offset_of!(CallFrame, attributes)),
    ("XLA_FFI_Metadata.api_version", offset_of!(Metadata, api_version)),
    ("XLA_FFI_Metadata.traits", offset_of!(Metadata, traits)),
    ("XLA_FFI_Metadata_Extension.metadata", offset_of!(MetadataExtension, metadata)),
    ("XLA_FFI_Api.XLA_FFI_Error_Create", offset_of!(Api, error_create)),
];
