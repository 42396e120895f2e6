//! The `.npy` header, versions 1.0 to 3.0: a magic, a length, and a Python dictionary of three entries.
//!
//! Only what such a header can hold is parsed: a descr string, a flag, a tuple of extents. Nothing is allocated before its
//! length is known to lie in the file.

/// Bytes before the dictionary's length: magic and version.
const PREFIX: usize = 8;
const MAGIC: &[u8] = b"\x93NUMPY";
/// A dictionary longer than this is refused.
const MAX_LENGTH: usize = 1 << 16;

/// What a `.npy` file says of its data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub descr: String,
    pub fortran_order: bool,
    pub shape: Vec<usize>,
    /// Where the data begin.
    pub data: usize,
}

/// Parses the header that `file` begins with.
///
/// # Errors
/// What was found in place of a header.
pub(crate) fn parse(file: &[u8]) -> Result<Header, String> {
    let Some(rest) = file.strip_prefix(MAGIC) else { return Err("it does not begin with the magic \\x93NUMPY".into()) };
    let (text_start, length) = match *rest {
        [1, 0, a, b, ..] => (PREFIX + 2, u16::from_le_bytes([a, b]) as usize),
        [2 | 3, 0, a, b, c, d, ..] => (PREFIX + 4, u32::from_le_bytes([a, b, c, d]) as usize),
        [major, minor, ..] if !(1..=3).contains(&major) || minor != 0 => return Err(format!("its version is {major}.{minor}")),
        _ => return Err("it ends within the header".into()),
    };
    if length > MAX_LENGTH {
        return Err(format!("its header is {length} bytes long"));
    }
    let data = text_start + length;
    let text = file.get(text_start..data).ok_or("it ends within the header")?;
    let text = std::str::from_utf8(text).map_err(|_| "its header is no text")?;
    let (descr, fortran_order, shape) = Parser { rest: text }.dictionary()?;
    Ok(Header { descr, fortran_order, shape, data })
}

/// The header of a C-order array, padded so that the data begin at a multiple of 64.
pub(crate) fn header(descr: &str, shape: &[usize]) -> Vec<u8> {
    let extents: String = match shape {
        [one] => format!("{one},"),
        _ => shape.iter().map(usize::to_string).collect::<Vec<_>>().join(", "),
    };
    let mut text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({extents}), }}");
    let length = (PREFIX + 2 + text.len() + 1).next_multiple_of(64) - PREFIX - 2;
    text.extend(std::iter::repeat_n(' ', length - 1 - text.len()));
    text.push('\n');
    // At most three extents of 20 digits: the text is far below 2¹⁶ bytes.
    [MAGIC, &[1, 0], &(text.len() as u16).to_le_bytes(), text.as_bytes()].concat()
}

struct Parser<'a> {
    rest: &'a str,
}

impl<'a> Parser<'a> {
    fn dictionary(mut self) -> Result<(String, bool, Vec<usize>), String> {
        let (mut descr, mut fortran_order, mut shape) = (None, None, None);
        self.expect('{')?;
        while !self.eat('}') {
            let key = self.string()?;
            self.expect(':')?;
            let twice = match key {
                "descr" => descr.replace(self.string()?.to_owned()).is_some(),
                "fortran_order" => fortran_order.replace(self.flag()?).is_some(),
                "shape" => shape.replace(self.extents()?).is_some(),
                _ => return Err(format!("its header has the entry {key:?}")),
            };
            if twice {
                return Err(format!("its header has the entry {key:?} twice"));
            }
            if !self.eat(',') {
                self.expect('}')?;
                break;
            }
        }
        if !self.rest.trim_matches([' ', '\n', '\0']).is_empty() {
            return Err(format!("its header goes on with {:?}", self.shown()));
        }
        match (descr, fortran_order, shape) {
            (Some(descr), Some(fortran_order), Some(shape)) => Ok((descr, fortran_order, shape)),
            _ => Err("its header lacks one of descr, fortran_order, shape".into()),
        }
    }

    fn shown(&self) -> String {
        self.rest.chars().take(20).collect()
    }

    fn eat(&mut self, c: char) -> bool {
        self.rest = self.rest.trim_start();
        self.rest.strip_prefix(c).inspect(|rest| self.rest = rest).is_some()
    }

    fn expect(&mut self, c: char) -> Result<(), String> {
        if self.eat(c) { Ok(()) } else { Err(format!("its header has {:?} in place of {c:?}", self.shown())) }
    }

    fn string(&mut self) -> Result<&'a str, String> {
        let quote = if self.eat('\'') {
            '\''
        } else if self.eat('"') {
            '"'
        } else {
            return Err(format!("its header has {:?} in place of a string", self.shown()));
        };
        let (string, rest) = self.rest.split_once(quote).ok_or("its header has a string without end")?;
        self.rest = rest;
        Ok(string)
    }

    fn flag(&mut self) -> Result<bool, String> {
        self.rest = self.rest.trim_start();
        for (word, value) in [("True", true), ("False", false)] {
            if let Some(rest) = self.rest.strip_prefix(word) {
                self.rest = rest;
                return Ok(value);
            }
        }
        Err(format!("its header has {:?} in place of True or False", self.shown()))
    }

    fn extents(&mut self) -> Result<Vec<usize>, String> {
        let mut extents = Vec::new();
        self.expect('(')?;
        while !self.eat(')') {
            self.rest = self.rest.trim_start();
            let digits = self.rest.len() - self.rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
            let (number, rest) = self.rest.split_at(digits);
            extents.push(number.parse().map_err(|_| format!("its header has {:?} in place of an extent", self.shown()))?);
            // Python 2 marked its long integers.
            self.rest = rest.strip_prefix('L').unwrap_or(rest);
            if !self.eat(',') {
                self.expect(')')?;
                break;
            }
        }
        Ok(extents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(version: u8, text: &str) -> Vec<u8> {
        let length = text.len() as u32;
        let length = if version == 1 { length.to_le_bytes()[..2].to_vec() } else { length.to_le_bytes().to_vec() };
        [MAGIC, &[version, 0], &length, text.as_bytes()].concat()
    }

    #[test]
    fn reads_what_it_writes_at_a_multiple_of_64() {
        for shape in [vec![], vec![7], vec![3, 0], vec![usize::MAX; 3]] {
            let bytes = header("<V2", &shape);
            assert_eq!(bytes.len() % 64, 0);
            let expected = Header { descr: "<V2".into(), fortran_order: false, shape, data: bytes.len() };
            assert_eq!(parse(&bytes), Ok(expected));
        }
    }

    #[test]
    fn versions_1_to_3_quotes_order_and_longs() {
        let text = "{\"shape\": (2L, 3L), 'fortran_order': True, 'descr': \"|V2\"}\n";
        for version in 1..=3 {
            let parsed = parse(&file(version, text)).unwrap();
            assert_eq!((parsed.descr.as_str(), parsed.fortran_order, parsed.shape), ("|V2", true, vec![2, 3]));
        }
    }

    #[test]
    fn anything_else_is_an_error() {
        let good = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }";
        assert!(parse(&file(1, good)).is_ok());
        for (from, to) in [
            ("'<f4'", "[('a', '<f4')]"),
            ("(2,)", "(-2,)"),
            ("(2,)", "(99999999999999999999,)"),
            ("(2,)", "2"),
            ("False", "Maybe"),
            (", }", ", 'more': 1}"),
            (", }", ", 'descr': '<f4'}"),
            (", }", "} and more"),
            ("'shape'", "'shope'"),
            ("{", ""),
            ("'shape': (2,), ", ""),
        ] {
            assert!(good.contains(from));
            assert!(parse(&file(1, &good.replacen(from, to, 1))).is_err(), "{from} → {to}");
        }
        let whole = file(2, good);
        assert!((0..whole.len()).all(|n| parse(&whole[..n]).is_err()));
        assert!(parse(&file(4, good)).unwrap_err().contains("4.0"));
        let mut long = file(2, good);
        long[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(parse(&long).unwrap_err().contains("4294967295"));
    }
}
