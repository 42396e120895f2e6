//! Named values, which plugins take and give, and what a program is compiled with.

use super::sys;
use std::collections::BTreeMap;
use std::ffi::c_int;
use std::ptr;

/// A value with a name: an option of a client or of a topology, an option of the compiler, a figure of its cost analysis.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Text.
    Text(String),
    /// An integer.
    Int(i64),
    /// A list of integers.
    Ints(Vec<i64>),
    /// A number.
    Float(f32),
    /// Yes or no.
    Bool(bool),
}

/// Options by name.
pub type Options = BTreeMap<String, Value>;

/// As the API takes them; they point into `options`.
pub(super) fn named_values(options: &Options) -> Vec<sys::NamedValue> {
    let one = |(name, value): (&String, &Value)| {
        use sys::NamedValueUnion as Union;
        let (kind, union, size) = match value {
            Value::Text(text) => (0, Union { string: text.as_ptr().cast() }, text.len()),
            Value::Int(int) => (1, Union { int: *int }, 1),
            Value::Ints(ints) => (2, Union { ints: ints.as_ptr() }, ints.len()),
            Value::Float(float) => (3, Union { float: *float }, 1),
            Value::Bool(bool) => (4, Union { bool: *bool }, 1),
        };
        sys::NamedValue {
            struct_size: size_of::<sys::NamedValue>(),
            extension_start: ptr::null_mut(),
            name: name.as_ptr().cast(),
            name_size: name.len(),
            kind,
            value: union,
            value_size: size,
        }
    };
    options.iter().map(one).collect()
}

/// Copies of what a plugin gives.
///
/// # Safety
/// `count` of them lie at `start`, each as large as the first says.
pub(super) unsafe fn from_named_values(start: *const sys::NamedValue, count: usize) -> Options {
    let mut options = Options::new();
    if count == 0 || start.is_null() {
        return options;
    }
    // SAFETY: as required; a plugin's later structs may be larger than ours.
    let stride = unsafe { (*start).struct_size };
    for i in 0..count {
        // SAFETY: as required.
        let (name, value) = unsafe {
            let named = &*start.byte_add(i * stride);
            (sys::text(named.name, named.name_size), value_of(named.kind, named.value, named.value_size))
        };
        options.extend(value.map(|value| (name, value)));
    }
    options
}

/// # Safety
/// `union` holds what `kind` says.
unsafe fn value_of(kind: c_int, union: sys::NamedValueUnion, size: usize) -> Option<Value> {
    // SAFETY: as required.
    unsafe {
        Some(match kind {
            0 => Value::Text(sys::text(union.string, size)),
            1 => Value::Int(union.int),
            2 => Value::Ints(sys::slice(union.ints, size).to_vec()),
            3 => Value::Float(union.float),
            4 => Value::Bool(union.bool),
            _ => return None,
        })
    }
}

/// What a program is compiled with, for one device.
#[derive(Clone, Debug, Default)]
pub struct CompileOptions {
    /// Options of the compiler, such as `xla_tpu_scoped_vmem_limit_kib`.
    pub overrides: Options,
}

impl CompileOptions {
    /// `xla.CompileOptionsProto`, for the device of that id.
    ///
    /// Fields, by xla/pjrt/proto/compile_options.proto: 3 ExecutableBuildOptions (1 device_ordinal, 4 num_replicas, 5
    /// num_partitions, 9 device_assignment); 7 env_option_overrides, a map to OptionOverride (1 text, 2 bool, 3 int, 4 double).
    pub(super) fn encoded(&self, device: i64) -> Vec<u8> {
        let of_device = Message::default().bytes(1, &Message::varints(&[device]));
        let assignment = Message::default().int(1, 1).int(2, 1).bytes(3, &of_device.0);
        let build = Message::default().int(1, -1).int(4, 1).int(5, 1).bytes(9, &assignment.0);
        let mut options = Message::default().bytes(3, &build.0);
        for (name, value) in &self.overrides {
            let value = match value {
                Value::Text(text) => Message::default().bytes(1, text.as_bytes()),
                Value::Bool(bool) => Message::default().int(2, i64::from(*bool)),
                Value::Int(int) => Message::default().int(3, *int),
                Value::Float(float) => Message::default().double(4, f64::from(*float)),
                // No option takes a list.
                Value::Ints(_) => continue,
            };
            let entry = Message::default().bytes(1, name.as_bytes()).bytes(2, &value.0);
            options = options.bytes(7, &entry.0);
        }
        options.0
    }
}

/// A protobuf message, field by field.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(out: &mut Vec<u8>, mut value: u64) {
        while value >= 0x80 {
            out.push(value as u8 | 0x80);
            value >>= 7;
        }
        out.push(value as u8);
    }

    fn varints(values: &[i64]) -> Vec<u8> {
        let mut out = Vec::new();
        values.iter().for_each(|&value| Self::varint(&mut out, value as u64));
        out
    }

    fn tag(&mut self, field: u64, wire: u64) {
        Self::varint(&mut self.0, field << 3 | wire);
    }

    fn int(mut self, field: u64, value: i64) -> Self {
        self.tag(field, 0);
        Self::varint(&mut self.0, value as u64);
        self
    }

    fn double(mut self, field: u64, value: f64) -> Self {
        self.tag(field, 1);
        self.0.extend(value.to_le_bytes());
        self
    }

    fn bytes(mut self, field: u64, bytes: &[u8]) -> Self {
        self.tag(field, 2);
        Self::varint(&mut self.0, bytes.len() as u64);
        self.0.extend(bytes);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes as protoc encodes them.
    #[test]
    fn compile_options_are_encoded_as_protobuf() {
        let bytes = |options: &CompileOptions, device| {
            options.encoded(device).iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")
        };
        let plain = "1a 1a 08 ff ff ff ff ff ff ff ff ff 01 20 01 28 01 4a 09 08 01 10 01 1a 03 0a 01 00";
        assert_eq!(bytes(&CompileOptions::default(), 0), plain);
        let overrides =
            [("a", Value::Text("b".into())), ("c", Value::Bool(true)), ("d", Value::Int(300)), ("e", Value::Float(1.0))];
        let overrides = overrides.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let with = "3a 08 0a 01 61 12 03 0a 01 62 3a 07 0a 01 63 12 02 10 01 3a 08 0a 01 64 12 03 18 ac 02 \
                    3a 0e 0a 01 65 12 09 21 00 00 00 00 00 00 f0 3f";
        assert_eq!(bytes(&CompileOptions { overrides }, 0), format!("{plain} {with}"));
        assert!(bytes(&CompileOptions::default(), 131_072).ends_with("1a 05 0a 03 80 80 08"));
    }

    #[test]
    fn named_values_survive_the_way_there_and_back() {
        let values = [Value::Text("text".into()), Value::Int(-3), Value::Ints(vec![1, 2]), Value::Float(0.5), Value::Bool(true)];
        let options: Options = values.into_iter().enumerate().map(|(i, value)| (format!("name {i}"), value)).collect();
        let raw = named_values(&options);
        // SAFETY: they are ours.
        assert_eq!(unsafe { from_named_values(raw.as_ptr(), raw.len()) }, options);
    }
}
