//! Where results go: standard output, which may close at any time, and files, which appear whole or not at all.

use crate::files::{folder_of, replace};
use crate::report::terminal::Style;
use std::ffi::OsStr;
use std::fs;
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Columns where standard output is no terminal.
const DEFAULT_WIDTH: usize = 100;
/// A table does not gain by more columns than this.
const MAX_WIDTH: usize = 140;

/// Writes a message of ours to standard error; that it may be closed is no concern.
pub fn complain(message: &str) {
    _ = writeln!(io::stderr(), "xent-diff: {message}");
}

/// Standard output.
#[derive(Debug)]
pub struct Out {
    style: Style,
    closed: bool,
}

impl Out {
    /// Colour only on a terminal and without `NO_COLOR`; the terminal's width, within reason.
    pub fn new() -> Self {
        let terminal = io::stdout().is_terminal();
        let colour = coloured(terminal, std::env::var_os("NO_COLOR").as_deref());
        let width = terminal_size::terminal_size().filter(|_| terminal).map_or(DEFAULT_WIDTH, |(width, _)| width.0.into());
        Self { style: Style { colour, width: width.min(MAX_WIDTH) }, closed: false }
    }

    /// How reports are set for it.
    pub fn style(&self) -> Style {
        self.style
    }

    /// Whether its reader went away.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Prints `text`; once the reader went away, nothing.
    ///
    /// # Errors
    /// What standard output refuses for another reason, such as a full disk.
    pub fn print(&mut self, text: &str) -> Result<(), String> {
        if self.closed {
            return Ok(());
        }
        let mut stdout = io::stdout().lock();
        match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
            Err(e) if e.kind() == ErrorKind::BrokenPipe => self.closed = true,
            Err(e) => return Err(format!("standard output cannot be written: {e}")),
            Ok(()) => {}
        }
        Ok(())
    }
}

/// <https://no-color.org>: any value but the empty one turns colour off.
fn coloured(terminal: bool, no_color: Option<&OsStr>) -> bool {
    terminal && no_color.is_none_or(OsStr::is_empty)
}

/// Where a report goes that is asked for by an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// `-`.
    Stdout,
    /// A file.
    File(PathBuf),
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "-" => Ok(Target::Stdout),
            "" => Err("an empty file name".to_owned()),
            path => Ok(Target::File(path.into())),
        }
    }
}

impl Target {
    /// Looks whether the file could be written, before long work begins.
    ///
    /// # Errors
    /// Its folder is not there, or it is a folder itself.
    pub fn check(&self) -> Result<(), String> {
        let Target::File(path) = self else { return Ok(()) };
        if path.is_dir() {
            return Err(format!("{}: cannot be written: it is a folder; give the name of a file", path.display()));
        }
        if !folder_of(path).is_dir() {
            return Err(format!("{}: cannot be written: its folder does not exist; create it first", path.display()));
        }
        Ok(())
    }

    /// Writes `text` there; a file is replaced at once or left as it was.
    ///
    /// # Errors
    /// The file or standard output cannot be written.
    pub fn write(&self, text: &str, out: &mut Out) -> Result<(), String> {
        match self {
            Target::Stdout => out.print(text),
            Target::File(path) => write_whole(path, text).map_err(|e| format!("{}: cannot be written: {e}", path.display())),
        }
    }
}

/// A link is followed; a device or a named pipe is written to as it is.
fn write_whole(path: &Path, text: &str) -> io::Result<()> {
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    if path.exists() && !path.is_file() {
        return fs::write(&path, text);
    }
    replace(&path, &[text.as_bytes()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colour_is_for_terminals_that_want_it() {
        assert!(coloured(true, None) && coloured(true, Some(OsStr::new(""))));
        assert!(!coloured(true, Some(OsStr::new("1"))) && !coloured(false, None));
    }

    #[cfg(unix)]
    #[test]
    fn a_link_is_followed_and_a_device_stays_one() {
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("report.json"), folder.path().join("latest"));
        fs::write(&path, "old").unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        write_whole(&link, "new").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        assert!(link.is_symlink());
        write_whole(Path::new("/dev/null"), "gone").unwrap();
        assert!(!Path::new("/dev/null").is_file());
    }

    #[test]
    fn a_place_that_cannot_be_written_is_known_before() {
        let folder = tempfile::tempdir().unwrap();
        let check = |path: &Path| Target::File(path.to_owned()).check();
        assert!(check(&folder.path().join("r.json")).is_ok());
        assert!(check(Path::new("r.json")).is_ok());
        assert!(check(folder.path()).unwrap_err().contains("is a folder"));
        assert!(check(&folder.path().join("no/r.json")).unwrap_err().contains("does not exist"));
        assert_eq!("-".parse(), Ok(Target::Stdout));
        assert!("".parse::<Target>().is_err());
    }
}
