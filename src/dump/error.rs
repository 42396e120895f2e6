//! What can be wrong with a dump, with a call, or with the disk, each told the same way: where, found, expected, remedy.

use std::error::Error;
use std::fmt::{self, Display};
use std::io;
use std::path::Path;

/// Who has to act on an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Culprit {
    /// The call: a path, an option, an array handed in.
    Caller,
    /// The dump: a folder, a manifest, a payload file.
    Dump,
    /// The machine: a file that cannot be read or written.
    Io,
}

/// What is wrong. The kinds are sorted by culprit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DumpErrorKind {
    /// The path holds no dump.
    NotADump,
    /// An option, an id or a loss setting given to a writer or a capture makes no sense.
    Settings,
    /// An array handed to a writer does not fit what is said of it.
    Data,
    /// The folder to be written is committed already.
    Committed,
    /// A tensor, a microbatch or a step that is needed was not recorded.
    Missing,

    /// No folder of the dump is committed.
    Empty,
    /// A folder looks like one of the dump's, but is named wrongly.
    FolderName,
    /// A size or a count is beyond what the format allows or a machine can hold.
    TooLarge,
    /// A manifest is not JSON.
    Json,
    /// A manifest has a member that nobody knows.
    UnknownMember,
    /// A member is missing or has a value that makes no sense.
    Value,
    /// `format` or `version` is not this format's.
    Version,
    /// A manifest describes another folder than the one it lies in.
    Identity,
    /// A tensor name is unknown, or does not belong in this folder.
    TensorName,
    /// A tensor is listed twice.
    Duplicate,
    /// A shard's file is not a plain file of the manifest's own folder.
    FileName,
    /// A dtype that its tensor cannot have.
    Dtype,
    /// A payload's descr is no way to write the manifest's dtype.
    Encoding,
    /// A float32 payload of a bfloat16 tensor holds a value that is no bfloat16.
    Inexact,
    /// Shapes that do not fit each other.
    Shape,
    /// A payload file that the manifest lists is not there.
    MissingFile,
    /// A payload file does not begin as a `.npy` file does.
    Header,
    /// A payload file is shorter or longer than it must be.
    Length,
    /// A payload file's BLAKE3 is not the manifest's.
    Checksum,
    /// No shard covers a region of a tensor, though every process committed the folder.
    Hole,
    /// Two shards cover the same region.
    Overlap,
    /// Copies of an input differ.
    Replica,
    /// Processes contradict each other.
    Disagreement,
    /// A tensor lacks the shards of a process that has not committed the folder.
    Incomplete,
    /// The tensors make no problem: a target out of range, a weight that is not finite.
    Problem,
    /// What was read back is not what was written.
    RoundTrip,

    /// A file or folder cannot be read.
    Read,
    /// A file or folder cannot be written.
    Write,
}

impl DumpErrorKind {
    /// Who has to act.
    pub fn culprit(self) -> Culprit {
        use DumpErrorKind::*;
        match self {
            NotADump | Settings | Data | Committed | Missing => Culprit::Caller,
            RoundTrip | Read | Write => Culprit::Io,
            _ => Culprit::Dump,
        }
    }
}

/// One error: its kind, where it is, what was found and expected, and what to do. [`Error::source`] is what lies beneath it.
#[derive(Debug)]
pub struct DumpError(Box<Details>);

#[derive(Debug)]
struct Details {
    kind: DumpErrorKind,
    place: String,
    found: String,
    expected: String,
    remedy: String,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl DumpError {
    pub(crate) fn new(
        kind: DumpErrorKind,
        place: impl Display,
        found: impl Into<String>,
        expected: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self(Box::new(Details {
            kind,
            place: place.to_string(),
            found: found.into(),
            expected: expected.into(),
            remedy: remedy.into(),
            source: None,
        }))
    }

    pub(crate) fn caused_by(mut self, source: impl Error + Send + Sync + 'static) -> Self {
        self.0.source = Some(Box::new(source));
        self
    }

    pub(crate) fn read(path: &Path, source: io::Error) -> Self {
        Self::new(DumpErrorKind::Read, path.display(), "it cannot be read", "a readable file or folder", "see the cause")
            .caused_by(source)
    }

    pub(crate) fn write(path: &Path, source: io::Error) -> Self {
        Self::new(
            DumpErrorKind::Write,
            path.display(),
            "it cannot be written",
            "a writable folder with room",
            "see the cause; the folder stays uncommitted",
        )
        .caused_by(source)
    }

    /// What is wrong.
    pub fn kind(&self) -> DumpErrorKind {
        self.0.kind
    }

    /// Where: a path, and the member, tensor or index within it.
    pub fn place(&self) -> &str {
        &self.0.place
    }

    /// What was found there.
    pub fn found(&self) -> &str {
        &self.0.found
    }

    /// What should be there.
    pub fn expected(&self) -> &str {
        &self.0.expected
    }

    /// What to do about it.
    pub fn remedy(&self) -> &str {
        &self.0.remedy
    }
}

impl Display for DumpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Details { place, found, expected, remedy, .. } = &*self.0;
        write!(f, "{place}: {found}; expected {expected}; {remedy}")
    }
}

impl Error for DumpError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.0.source.as_deref().map(|e| e as _)
    }
}
