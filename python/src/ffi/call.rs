//! A call from XLA, seen safely: its operands and results as slices, its attributes by name, errors as results.

use super::abi::{
    API_MINOR, ATTRIBUTE_SCALAR, ATTRIBUTE_STRING, ApiVersion, BUFFER, Buffer, Buffers, ByteSpan, CallFrame, EXTENSION_METADATA,
    ErrorCode, ErrorCreateArgs, MetadataExtension, OLDEST_API_MINOR, STAGE_EXECUTE, Scalar, dtype,
};
use fused_xent::kernels::GradientMut;
use fused_xent::kernels::problem::{Floats, ProblemError, Targets};
use std::any::Any;
use std::ffi::{CString, c_int, c_void};
use std::mem::size_of;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::{null_mut, slice_from_raw_parts};

/// Why a call is refused; JAX raises it as `JaxRuntimeError`.
#[derive(Debug)]
pub(super) struct Refusal {
    pub code: ErrorCode,
    pub message: String,
}

impl Refusal {
    pub(super) fn of_arguments(message: String) -> Self {
        Self { code: ErrorCode::InvalidArgument, message }
    }
}

impl From<ProblemError> for Refusal {
    fn from(error: ProblemError) -> Self {
        Self::of_arguments(error.to_string())
    }
}

/// Answers XLA: introduces the handler if asked to, else runs `work`. Neither an error nor a panic of it goes further than this.
///
/// # Safety
/// `frame` must be what XLA calls a handler with.
pub(super) unsafe fn answer(frame: *mut CallFrame, work: fn(&Call) -> Result<(), Refusal>) -> *mut c_void {
    // SAFETY: XLA hands over a frame that lives and does not change until the handler returns.
    let frame = unsafe { &*frame };
    let mut extension = frame.extension_start;
    while !extension.is_null() {
        // SAFETY: XLA's list of extensions, each valid until the handler returns.
        if unsafe { (*extension).kind } == EXTENSION_METADATA {
            // SAFETY: an extension of this kind is the beginning of a MetadataExtension.
            unsafe { introduce(frame, extension.cast()) };
            return null_mut();
        }
        // SAFETY: as above.
        extension = unsafe { (*extension).next };
    }
    let refusal = if frame.stage != STAGE_EXECUTE {
        Refusal { code: ErrorCode::Internal, message: format!("stage {}, expected {STAGE_EXECUTE}", frame.stage) }
    } else {
        match catch_unwind(AssertUnwindSafe(|| work(&Call { frame }))) {
            Ok(Ok(())) => return null_mut(),
            Ok(Err(refusal)) => refusal,
            Err(panic) => Refusal { code: ErrorCode::Internal, message: format!("a bug in fused-xent: {}", text_of(&*panic)) },
        }
    };
    // SAFETY: the frame's api is XLA's own, which outlives the process's last call.
    unsafe { error(frame, &refusal) }
}

/// Fills in what XLA asks when a handler is registered.
///
/// # Safety
/// Both must come from XLA.
unsafe fn introduce(frame: &CallFrame, extension: *mut MetadataExtension) {
    // A framework of API 0.1 does not say who it is; a newer one refuses handlers that are newer than itself.
    let minor = if frame.api.is_null() {
        OLDEST_API_MINOR
    } else {
        // SAFETY: not null, and XLA's.
        unsafe { (*frame.api).api_version.minor }.min(API_MINOR)
    };
    let version = ApiVersion { struct_size: size_of::<ApiVersion>(), extension_start: null_mut(), major: 0, minor };
    // SAFETY: the extension points at metadata to be filled in; every version has these two fields, and no more is written.
    unsafe {
        let metadata = (*extension).metadata;
        (&raw mut (*metadata).api_version).write(version);
        (&raw mut (*metadata).traits).write(0);
    }
}

/// An error that XLA takes over, the message copied.
///
/// # Safety
/// The frame's `api` must be XLA's.
unsafe fn error(frame: &CallFrame, refusal: &Refusal) -> *mut c_void {
    let message = format!("fused_cross_entropy: {}", refusal.message).replace('\0', "\u{FFFD}");
    let message = CString::new(message).unwrap_or_default();
    let mut arguments = ErrorCreateArgs {
        struct_size: ErrorCreateArgs::STRUCT_SIZE,
        extension_start: null_mut(),
        message: message.as_ptr(),
        code: refusal.code as c_int,
    };
    // SAFETY: the caller's promise; the arguments outlive the call.
    unsafe { ((*frame.api).error_create)(&raw mut arguments) }
}

fn text_of(panic: &(dyn Any + Send)) -> &str {
    let owned = panic.downcast_ref::<String>().map(String::as_str);
    owned.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without a message")
}

/// A call that is to be executed.
pub(super) struct Call<'a> {
    frame: &'a CallFrame,
}

/// An operand or a result.
#[derive(Clone, Copy)]
pub(super) struct Tensor<'a> {
    name: &'static str,
    dtype: c_int,
    /// Its extents.
    pub dims: &'a [usize],
    count: usize,
    data: *mut c_void,
}

/// The slice of `length` elements at `data`, which may be null if there are none.
///
/// # Safety
/// XLA's arrays, valid while the call lasts.
unsafe fn listed<'a, T>(data: *const T, length: i64) -> &'a [T] {
    match usize::try_from(length) {
        // SAFETY: the caller's promise.
        Ok(length) if length > 0 => unsafe { &*slice_from_raw_parts(data, length) },
        _ => &[],
    }
}

impl<'a> Call<'a> {
    /// The operand at `index`; `name` is for messages.
    pub(super) fn operand(&self, index: usize, name: &'static str) -> Result<Tensor<'a>, Refusal> {
        Self::tensor(&self.frame.arguments, index, name)
    }

    /// The result at `index`.
    pub(super) fn result(&self, index: usize, name: &'static str) -> Result<Tensor<'a>, Refusal> {
        Self::tensor(&self.frame.results, index, name)
    }

    fn tensor(buffers: &'a Buffers, index: usize, name: &'static str) -> Result<Tensor<'a>, Refusal> {
        // SAFETY: as many types and buffers as XLA says.
        let (types, pointers) = unsafe { (listed(buffers.types, buffers.size), listed(buffers.buffers, buffers.size)) };
        if types.get(index) != Some(&BUFFER) {
            return Err(Refusal::of_arguments(format!("{name}: no array in place {index} of {}", types.len())));
        }
        // SAFETY: XLA says that it is a buffer; it lives while the call lasts.
        let buffer = unsafe { &*pointers[index].cast::<Buffer>() };
        // SAFETY: `rank` extents. They are not negative, and a usize has the bits of such an i64.
        let dims = unsafe { listed(buffer.dims.cast::<usize>(), buffer.rank) };
        Ok(Tensor { name, dtype: buffer.dtype, dims, count: dims.iter().product(), data: buffer.data })
    }

    /// The value of a scalar attribute of that dtype.
    fn scalar<T: Copy>(&self, name: &str, dtype: c_int) -> Result<T, Refusal> {
        let (kind, value) = self.attribute(name)?;
        // SAFETY: XLA says that it is a scalar, where `kind` is that.
        let scalar = (kind == ATTRIBUTE_SCALAR).then(|| unsafe { &*value.cast::<Scalar>() });
        match scalar {
            // SAFETY: a value of that dtype; T is its Rust type, as the callers below see to.
            Some(scalar) if scalar.dtype == dtype => Ok(unsafe { scalar.value.cast::<T>().read_unaligned() }),
            _ => Err(Refusal::of_arguments(format!("attribute {name}: not a scalar of XLA's data type {dtype}"))),
        }
    }

    fn attribute(&self, name: &str) -> Result<(c_int, *mut c_void), Refusal> {
        let attributes = &self.frame.attributes;
        // SAFETY: as many types, names and values as XLA says, and each name a span of bytes.
        let (types, names, values) = unsafe {
            let size = attributes.size;
            (listed(attributes.types, size), listed(attributes.names, size), listed(attributes.values, size))
        };
        // SAFETY: as above.
        let mut named = names.iter().map(|&span| unsafe { bytes_of(span) });
        let at = named.position(|found| found == name.as_bytes());
        let at = at.ok_or_else(|| Refusal::of_arguments(format!("attribute {name} is missing")))?;
        Ok((types[at], values[at]))
    }

    pub(super) fn integer(&self, name: &str) -> Result<i64, Refusal> {
        self.scalar(name, dtype::S64)
    }

    pub(super) fn float(&self, name: &str) -> Result<f64, Refusal> {
        self.scalar(name, dtype::F64)
    }

    pub(super) fn flag(&self, name: &str) -> Result<bool, Refusal> {
        Ok(self.scalar::<u8>(name, dtype::PRED)? != 0)
    }

    pub(super) fn text(&self, name: &str) -> Result<&'a str, Refusal> {
        let (kind, value) = self.attribute(name)?;
        // SAFETY: XLA says that it is a string, where `kind` is that: a span of bytes.
        let bytes = (kind == ATTRIBUTE_STRING).then(|| unsafe { bytes_of(value.cast()) });
        let text = bytes.and_then(|bytes| std::str::from_utf8(bytes).ok());
        text.ok_or_else(|| Refusal::of_arguments(format!("attribute {name}: not a text")))
    }
}

/// # Safety
/// A span of XLA's, valid while the call lasts.
unsafe fn bytes_of<'a>(span: *const ByteSpan) -> &'a [u8] {
    // SAFETY: the caller's promise.
    unsafe { listed((*span).start, (*span).length as i64) }
}

impl<'a> Tensor<'a> {
    fn checked<T>(&self) -> Result<*mut T, Refusal> {
        let data = self.data.cast::<T>();
        if self.count > 0 && !data.is_aligned() {
            return Err(Refusal::of_arguments(format!("{}: its memory at {data:?} is not aligned", self.name)));
        }
        Ok(data)
    }

    /// # Safety
    /// T must be the Rust type of `dtype`, and this an operand.
    unsafe fn elements<T>(&self) -> Result<&'a [T], Refusal> {
        let data = self.checked::<T>()?;
        // SAFETY: XLA's operand of so many elements, read by all and written by nobody while the call lasts.
        Ok(unsafe { listed(data.cast_const(), self.count as i64) })
    }

    /// # Safety
    /// T must be the Rust type of `dtype`, and this a result, taken once.
    unsafe fn elements_mut<T>(self) -> Result<&'a mut [T], Refusal> {
        let data = self.checked::<T>()?;
        if self.count == 0 {
            return Ok(&mut []);
        }
        // SAFETY: XLA's result of so many elements, this call's alone.
        Ok(unsafe { std::slice::from_raw_parts_mut(data, self.count) })
    }

    fn unlike<T>(&self, expected: &str) -> Result<T, Refusal> {
        Err(Refusal::of_arguments(format!("{}: XLA's data type {}, expected {expected}", self.name, self.dtype)))
    }

    /// Of an operand.
    pub(super) fn floats(&self) -> Result<Floats<'a>, Refusal> {
        // SAFETY: the types by which Rust knows these dtypes.
        unsafe {
            match self.dtype {
                dtype::BF16 => Ok(Floats::Bf16(self.elements()?)),
                dtype::F16 => Ok(Floats::F16(self.elements()?)),
                dtype::F32 => Ok(Floats::F32(self.elements()?)),
                _ => self.unlike("bfloat16, float16 or float32"),
            }
        }
    }

    /// Of an operand.
    pub(super) fn targets(&self) -> Result<Targets<'a>, Refusal> {
        // SAFETY: as above.
        unsafe {
            match self.dtype {
                dtype::S32 => Ok(Targets::I32(self.elements()?)),
                dtype::S64 => Ok(Targets::I64(self.elements()?)),
                dtype::U32 => Ok(Targets::U32(self.elements()?)),
                _ => self.unlike("int32, int64 or uint32"),
            }
        }
    }

    /// Of an operand.
    pub(super) fn f32s(&self) -> Result<&'a [f32], Refusal> {
        match self.floats()? {
            Floats::F32(values) => Ok(values),
            _ => self.unlike("float32"),
        }
    }

    /// Of a result, to be taken once.
    pub(super) fn gradient(self) -> Result<GradientMut<'a>, Refusal> {
        // SAFETY: as above; each result is taken once.
        unsafe {
            match self.dtype {
                dtype::BF16 => Ok(GradientMut::Bf16(self.elements_mut()?)),
                dtype::F16 => Ok(GradientMut::F16(self.elements_mut()?)),
                dtype::F32 => Ok(GradientMut::F32(self.elements_mut()?)),
                _ => self.unlike("bfloat16, float16 or float32"),
            }
        }
    }

    /// Writes all of a float32 result.
    pub(super) fn write(self, values: &[f32]) -> Result<(), Refusal> {
        let (name, expected) = (self.name, values.len());
        match self.gradient()? {
            GradientMut::F32(out) if out.len() == expected => out.copy_from_slice(values),
            _ => return Err(Refusal::of_arguments(format!("{name}: not a float32 result of {expected} elements"))),
        }
        Ok(())
    }
}
