//! What ends an isolation before its conclusion.

use std::io;
use std::path::{Path, PathBuf};

/// Why there is no conclusion. Each displays as the one message that the user gets.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IsolateError {
    /// What is asked for makes no sense.
    #[error("{0}")]
    Call(String),
    /// The log folder is not one to go on in.
    #[error("{}: {found}; expected {expected}; {remedy}", path.display())]
    Logs {
        /// The folder, or a file in it.
        path: PathBuf,
        /// What is the matter.
        found: String,
        /// What would do.
        expected: &'static str,
        /// What to do.
        remedy: String,
    },
    /// The disk, or the system that should start the command, refuses.
    #[error("{}: {what}: {source}", path.display())]
    Io {
        /// The file or program.
        path: PathBuf,
        /// What could not be done.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A signal asked for the end. Everything that ended before is in the journal.
    #[error("ended by signal {0}")]
    Interrupted(i32),
}

impl IsolateError {
    pub(super) fn io(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, what, source }
    }
}
