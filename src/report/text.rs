//! Numbers and words as people read them, and columns that line up.

use std::borrow::Cow;

/// Three significant digits, `4.41e-3`; `0`, `NaN` and `inf` as they are.
pub fn scientific(x: f64) -> String {
    digits(x, 2)
}

/// Five significant digits: enough to see two values differ in the third.
pub fn value(x: f64) -> String {
    digits(x, 4)
}

fn digits(x: f64, decimals: usize) -> String {
    if x == 0.0 {
        return "0".to_owned();
    }
    if (0.01..1000.0).contains(&x.abs()) {
        let before = x.abs().log10().floor() as i32;
        return format!("{x:.*}", (decimals as i32 - before).max(0) as usize);
    }
    format!("{x:.decimals$e}")
}

/// A ratio to the floor: `1.02×`, `340×`, `1.2e5×`, `∞`.
pub fn times(ratio: f64) -> String {
    match ratio {
        r if r.is_nan() => "NaN".to_owned(),
        r if r.is_infinite() => "∞".to_owned(),
        r if r < 9.995 => format!("{r:.2}×"),
        r if r < 99.95 => format!("{r:.1}×"),
        r if r < 9999.5 => format!("{r:.0}×"),
        r => format!("{r:.1e}×"),
    }
}

/// A share as per cent, never rounded up to a whole that it is not.
pub fn percent(share: f64) -> String {
    if !share.is_finite() {
        return "NaN %".to_owned();
    }
    if share < 1.0 && share > 0.9995 {
        return ">99.9 %".to_owned();
    }
    format!("{:.1} %", share * 100.0)
}

/// `1 file`, `2 files`.
pub fn count(n: usize, noun: &str) -> String {
    let plural = if n == 1 { "" } else { "s" };
    format!("{n} {noun}{plural}")
}

/// Bytes in binary units, `12.3 MiB`.
pub fn bytes(n: u64) -> String {
    let mut unit = "B";
    let mut scaled = n as f64;
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if scaled < 1024.0 {
            break;
        }
        (scaled, unit) = (scaled / 1024.0, next);
    }
    if unit == "B" { format!("{n} B") } else { format!("{scaled:.1} {unit}") }
}

/// `a, b and c`.
pub fn list<S: AsRef<str>>(items: &[S]) -> String {
    let mut out = String::new();
    for (i, item) in items.iter().enumerate() {
        out.push_str(match i {
            0 => "",
            i if i + 1 == items.len() => " and ",
            _ => ", ",
        });
        out.push_str(item.as_ref());
    }
    out
}

/// The text without control characters: what comes from a dump must not steer a terminal.
pub fn clean(text: &str) -> Cow<'_, str> {
    if text.contains(char::is_control) {
        text.replace(|c: char| c.is_control() && c != '\n', "\u{fffd}").replace('\n', " ").into()
    } else {
        text.into()
    }
}

/// `text` broken at spaces into lines of at most `width` columns; a longer word keeps a line of its own.
pub fn wrap(text: &str, width: usize) -> Vec<String> {
    let text = clean(text);
    let mut lines = Vec::new();
    let mut line = String::new();
    for word in text.split(' ').filter(|word| !word.is_empty()) {
        if !line.is_empty() && columns(&line) + 1 + columns(word) > width {
            lines.push(std::mem::take(&mut line));
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    if !line.is_empty() || lines.is_empty() {
        lines.push(line);
    }
    lines
}

/// Columns that `text` takes on a terminal, one per character.
pub fn columns(text: &str) -> usize {
    text.chars().count()
}

/// `text` with spaces up to `width`, before it if `right`.
pub fn pad(text: &str, width: usize, right: bool) -> String {
    let gap = " ".repeat(width.saturating_sub(columns(text)));
    if right { gap + text } else { text.to_owned() + &gap }
}

/// ANSI attributes, applied only where colour is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paint {
    /// Headings.
    Bold,
    /// What matters less.
    Dim,
    /// Agreement.
    Green,
    /// Divergence.
    Red,
    /// Warnings.
    Yellow,
}

impl Paint {
    /// `text` in this attribute if `colour`, else as it is.
    pub fn on(self, text: &str, colour: bool) -> String {
        if !colour {
            return text.to_owned();
        }
        let code = match self {
            Paint::Bold => "1",
            Paint::Dim => "2",
            Paint::Green => "32",
            Paint::Red => "1;31",
            Paint::Yellow => "33",
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }
}

/// A table in aligned columns, two spaces apart; the first row is its heading.
#[derive(Debug)]
pub struct Table {
    right: Vec<bool>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table under `heading`; a column whose name starts with `>` is aligned to the right.
    pub fn new(heading: &[&str]) -> Self {
        Self {
            right: heading.iter().map(|name| name.starts_with('>')).collect(),
            rows: vec![heading.iter().map(|name| name.trim_start_matches('>').to_owned()).collect()],
        }
    }

    /// Adds a row of as many cells as the heading has.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells.iter().map(|cell| clean(cell).into_owned()).collect());
    }

    /// The lines, indented by `indent` spaces, with a dimmed heading.
    pub fn render(&self, indent: usize, colour: bool) -> String {
        let width = |column: usize| self.rows.iter().map(|row| columns(&row[column])).max().unwrap_or(0);
        let widths: Vec<usize> = (0..self.right.len()).map(width).collect();
        let mut out = String::new();
        for (i, row) in self.rows.iter().enumerate() {
            let cells: Vec<String> = row.iter().zip(&widths).zip(&self.right).map(|((cell, &w), &r)| pad(cell, w, r)).collect();
            let line = format!("{}{}", " ".repeat(indent), cells.join("  "));
            let line = line.trim_end();
            out += &if i == 0 { Paint::Dim.on(line, colour) } else { line.to_owned() };
            out.push('\n');
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_their_digits() {
        assert_eq!(
            ["0", "4.41e-3", "1.00", "12.3", "999", "1.00e3", "-2.50e-7"],
            [0.0, 4.412e-3, 1.0, 12.34, 999.0, 1000.0, -2.5e-7].map(scientific)
        );
        assert_eq!(["NaN", "inf", "-inf"], [f64::NAN, f64::INFINITY, f64::NEG_INFINITY].map(scientific));
        assert_eq!(["1.2345e-3", "0.12346", "123.46"], [1.2345e-3, 0.123456, 123.456].map(value));
        assert_eq!(
            ["1.02×", "10.0×", "340×", "1.2e5×", "∞", "NaN"],
            [1.02, 9.999, 340.4, 1.2e5, f64::INFINITY, f64::NAN].map(times)
        );
    }

    #[test]
    fn a_share_is_never_rounded_up_to_a_whole() {
        assert_eq!(["99.7 %", ">99.9 %", "100.0 %", "-12.0 %", "NaN %"], [0.997, 0.99999, 1.0, -0.12, f64::NAN].map(percent));
    }

    #[test]
    fn wrapping_keeps_the_width_and_every_word() {
        let text = "a gradient that was never reduced looks so, and each copy is compared";
        let lines = wrap(text, 20);
        assert!(lines.iter().all(|line| columns(line) <= 20), "{lines:?}");
        assert_eq!(lines.join(" "), text);
        assert_eq!(wrap("averyveryverylongword x", 5), ["averyveryverylongword", "x"]);
        assert_eq!(wrap("", 5), [""]);
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(clean("run\x1b[31m\nred"), "run\u{fffd}[31m red");
        assert_eq!(wrap("a\x07b", 10), ["a\u{fffd}b"]);
    }

    #[test]
    fn bytes_and_lists_read_well() {
        assert_eq!(["0 B", "1023 B", "1.0 KiB", "1.5 GiB"], [0, 1023, 1024, 3 << 29].map(bytes));
        assert_eq!(list(&["a", "b", "c"]), "a, b and c");
        assert_eq!(list::<&str>(&[]), "");
        assert_eq!(count(1, "file") + &count(2, "file"), "1 file2 files");
    }
}
