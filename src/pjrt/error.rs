//! What can go wrong with a plugin, a program or a device.

use std::ffi::c_int;
use std::fmt;
use std::path::PathBuf;

/// Why something could not be done. Each displays as the one message that the user gets.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PjrtError {
    /// No plugin of that name or at that path.
    #[error("PJRT plugin {asked:?}: not found; looked for {looked}; expected a name ({known}) or the path of a plugin's library: {remedy}", looked = if .looked.is_empty() { "a file".to_owned() } else { .looked.join(", ") }, known = super::plugin::NAMES.join(", "))]
    NotFound {
        /// As given.
        asked: String,
        /// Where it was looked for.
        looked: Vec<String>,
        /// What to do.
        remedy: &'static str,
    },
    /// The file is no shared library that this machine can load.
    #[error("PJRT plugin {}: cannot be loaded: {source}; expected a shared library for this machine with all that it links to", path.display())]
    NotLoadable {
        /// The file.
        path: PathBuf,
        /// What the loader says.
        source: libloading::Error,
    },
    /// A library, but of another kind.
    #[error("{}: is a library but no PJRT plugin: {why}; expected one that exports GetPjrtApi, such as libtpu.so", path.display())]
    NotAPlugin {
        /// The library.
        path: PathBuf,
        /// What it lacks.
        why: String,
    },
    /// An API that is laid out otherwise.
    #[error("PJRT plugin {}: has version {}.{} of the PJRT API; expected {}.{} or a later {}.x; install a newer plugin", path.display(), found.0, found.1, oldest.0, oldest.1, oldest.0)]
    Version {
        /// The library.
        path: PathBuf,
        /// Major and minor version.
        found: (c_int, c_int),
        /// The oldest that is served.
        oldest: (c_int, c_int),
    },
    /// A function that this plugin does not have.
    #[error("PJRT plugin {}: does not have {call}; a newer one may", path.display())]
    Lacks {
        /// The library.
        path: PathBuf,
        /// The function.
        call: &'static str,
    },
    /// The plugin refused, in its own words.
    #[error("PJRT plugin {}: {call}: {code}: {message}", path.display())]
    Refused {
        /// The library.
        path: PathBuf,
        /// The function.
        call: &'static str,
        /// The kind of error.
        code: Code,
        /// What the plugin says.
        message: String,
    },
    /// The client has no such device.
    #[error("PJRT plugin {}: has no device {asked}; it has {available}, counted from 0", path.display())]
    NoDevice {
        /// The library.
        path: PathBuf,
        /// Index.
        asked: usize,
        /// How many there are.
        available: usize,
    },
    /// Numbers that do not make up the tensor, or another number of arguments than the program takes.
    #[error("{what}: found {found}, expected {expected}")]
    Mismatch {
        /// Of what.
        what: String,
        /// What there is.
        found: String,
        /// What would fit.
        expected: String,
    },
}

impl PjrtError {
    /// The kind of error, of a refusal.
    pub fn code(&self) -> Option<Code> {
        if let PjrtError::Refused { code, .. } = self { Some(*code) } else { None }
    }
}

macro_rules! codes {
    ($($value:literal $name:ident $text:literal)*) => {
        /// A plugin's kinds of errors.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[allow(missing_docs, reason = "named as in the API")]
        pub enum Code { $($name),* }

        impl From<c_int> for Code {
            fn from(value: c_int) -> Self {
                match value { $($value => Code::$name,)* _ => Code::Unknown }
            }
        }

        impl fmt::Display for Code {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Code::$name => $text),* })
            }
        }
    };
}

codes! {
    1 Cancelled "cancelled"
    2 Unknown "unknown error"
    3 InvalidArgument "invalid argument"
    4 DeadlineExceeded "deadline exceeded"
    5 NotFound "not found"
    6 AlreadyExists "already exists"
    7 PermissionDenied "permission denied"
    8 ResourceExhausted "out of resources"
    9 FailedPrecondition "failed precondition"
    10 Aborted "aborted"
    11 OutOfRange "out of range"
    12 Unimplemented "not implemented"
    13 Internal "internal error"
    14 Unavailable "unavailable"
    15 DataLoss "data loss"
    16 Unauthenticated "unauthenticated"
}
