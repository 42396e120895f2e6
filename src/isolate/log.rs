//! What the log of a run says.

use regex::bytes::Regex;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::LazyLock;

/// A line that is longer is read as several.
const LINE: u64 = 64 << 10;
/// Bytes of the last line that are kept.
const SEEN: usize = 400;

/// What was looked for in a log.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// Whether a line matches the pattern of success.
    pub(super) success: bool,
    /// The first line that matches the pattern of failure.
    pub(super) failure: Option<String>,
    /// The last line that is not blank.
    pub(super) last_line: String,
}

/// Attributes and movements of a terminal, as ECMA-48 has them.
static ESCAPES: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?)").expect("well-formed"));

/// Reads the log line by line; colours are taken out first.
pub(super) fn read(path: &Path, success: Option<&Regex>, failure: Option<&Regex>) -> io::Result<Seen> {
    let mut log = BufReader::new(File::open(path)?);
    let mut seen = Seen::default();
    let mut line = Vec::new();
    loop {
        line.clear();
        if (&mut log).take(LINE).read_until(b'\n', &mut line)? == 0 {
            return Ok(seen);
        }
        let line = if line.contains(&0x1b) { ESCAPES.replace_all(&line, &b""[..]) } else { (&line[..]).into() };
        // A progress bar writes over its own line: what stands last is what was seen.
        for shown in line.split(|&byte| byte == b'\n' || byte == b'\r').filter(|shown| !shown.trim_ascii().is_empty()) {
            let matches = |pattern: Option<&Regex>| pattern.is_some_and(|pattern| pattern.is_match(shown));
            let text = || String::from_utf8_lossy(&shown.trim_ascii()[..shown.trim_ascii().len().min(SEEN)]).into_owned();
            seen.success |= matches(success);
            if seen.failure.is_none() && matches(failure) {
                seen.failure = Some(text());
            }
            seen.last_line = text();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(log: &[u8]) -> Seen {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        std::fs::write(&path, log).unwrap();
        let pattern = |text: &str| Regex::new(text).unwrap();
        read(&path, Some(&pattern("^all done$")), Some(&pattern("(?i)nan"))).unwrap()
    }

    #[test]
    fn patterns_are_looked_for_line_by_line() {
        assert_eq!(seen(b""), Seen::default());
        let both = seen(b"step 1\nloss NaN\nall done\n\n  \n");
        assert_eq!((both.success, both.failure.as_deref(), both.last_line.as_str()), (true, Some("loss NaN"), "all done"));
        assert!(!seen(b"not all done\n").success);
    }

    #[test]
    fn colours_bars_and_bytes_do_no_harm() {
        let coloured = seen(b"\x1b[1;32mall done\x1b[0m\n\x1b]0;title\x07 10%\r 20%\r\n");
        assert_eq!((coloured.success, coloured.last_line.as_str()), (true, "20%"));
        assert_eq!(seen(b"\xff\xfe tail without end").last_line, "\u{fffd}\u{fffd} tail without end");
        let long = [b"x".repeat(3 * LINE as usize), b"nan".to_vec()].concat();
        let long = seen(&long);
        assert_eq!(long.failure.as_deref(), Some("nan"));
        assert!(long.last_line.len() <= SEEN);
    }
}
