//! Reading JSON strictly: no member twice, no unknown member, every error with its place.

use super::error::{DumpError, DumpErrorKind};
use super::names::did_you_mean;
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use std::fmt;

/// Parses `text`, in which no object may have a member twice.
pub(crate) fn parse(text: &[u8], place: &str) -> Result<Value, DumpError> {
    serde_json::from_slice::<Strict>(text).map(|strict| strict.0).map_err(|e| {
        let found = format!("it is not valid JSON: {e}");
        let remedy = "write the folder again, or remove the manifest to give the folder up";
        DumpError::new(DumpErrorKind::Json, place, found, "one JSON object in UTF-8, no member twice", remedy).caused_by(e)
    })
}

struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor).map(Strict)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_f64<E>(self, v: f64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(Strict(item)) = seq.next_element()? {
            items.push(item);
        }
        Ok(items.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut members = Map::new();
        while let Some((name, Strict(value))) = map.next_entry::<String, Strict>()? {
            if members.contains_key(&name) {
                return Err(A::Error::custom(format_args!("member {name:?} stands twice")));
            }
            members.insert(name, value);
        }
        Ok(members.into())
    }
}

/// The members of one JSON object, all of them known.
pub(crate) struct Members<'a> {
    place: &'a str,
    map: &'a Map<String, Value>,
}

impl<'a> Members<'a> {
    pub fn new(value: &'a Value, place: &'a str, known: &[&str]) -> Result<Self, DumpError> {
        let Value::Object(map) = value else {
            let found = format!("it is {}", shown(value));
            return Err(DumpError::new(DumpErrorKind::Value, place, found, "an object", "correct the manifest"));
        };
        if let Some(unknown) = map.keys().find(|name| !known.contains(&name.as_str())) {
            let remedy = did_you_mean(
                unknown,
                known.iter().copied(),
                "remove it, or put what is your own under \"extra\" of the manifest",
            );
            let expected = format!("only the members {}", known.join(", "));
            return Err(DumpError::new(
                DumpErrorKind::UnknownMember,
                place,
                format!("unknown member {unknown:?}"),
                expected,
                remedy,
            ));
        }
        Ok(Self { place, map })
    }

    /// The member, if it is there; `null` is there.
    pub fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name)
    }

    /// The member, if it is there and not `null`.
    pub fn nullable(&self, name: &str) -> Option<&'a Value> {
        self.get(name).filter(|v| !v.is_null())
    }

    /// The error that member `name` is not what is `expected`.
    pub fn wrong(&self, name: &str, expected: &str) -> DumpError {
        let found = self.get(name).map_or_else(|| "it is missing".to_owned(), |v| format!("it is {}", shown(v)));
        DumpError::new(
            DumpErrorKind::Value,
            format_args!("{}: {name}", self.place),
            found,
            expected,
            "correct the manifest, or what writes it",
        )
    }

    pub fn required(&self, name: &str, expected: &str) -> Result<&'a Value, DumpError> {
        self.get(name).ok_or_else(|| self.wrong(name, expected))
    }

    pub fn text(&self, name: &str) -> Result<&'a str, DumpError> {
        const EXPECTED: &str = "a string";
        self.required(name, EXPECTED)?.as_str().ok_or_else(|| self.wrong(name, EXPECTED))
    }

    /// A string of 1 to 200 characters, none a control character.
    pub fn label(&self, name: &str) -> Result<String, DumpError> {
        let text = self.text(name)?;
        if is_label(text) { Ok(text.to_owned()) } else { Err(self.wrong(name, LABEL)) }
    }

    pub fn array(&self, name: &str) -> Result<&'a [Value], DumpError> {
        const EXPECTED: &str = "an array";
        self.required(name, EXPECTED)?.as_array().map(Vec::as_slice).ok_or_else(|| self.wrong(name, EXPECTED))
    }

    /// Member `name`, whose value is `value`, as a count.
    pub fn count(&self, name: &str, value: &Value) -> Result<usize, DumpError> {
        value.as_u64().and_then(|n| n.try_into().ok()).ok_or_else(|| self.wrong(name, "a whole number, 0 or above"))
    }

    /// Member `name`, whose value is `value`, as a finite number.
    pub fn number(&self, name: &str, value: &Value) -> Result<f64, DumpError> {
        value.as_f64().filter(|x| x.is_finite()).ok_or_else(|| self.wrong(name, "a number"))
    }

    pub fn required_count(&self, name: &str) -> Result<usize, DumpError> {
        self.count(name, self.required(name, "a whole number")?)
    }

    /// An array of counts.
    pub fn counts(&self, name: &str) -> Result<Vec<usize>, DumpError> {
        self.array(name)?.iter().map(|v| self.count(name, v)).collect()
    }

    /// What the word of member `name` means, if it is there.
    pub fn word<T: Copy>(&self, name: &str, words: &[(&'static str, T)]) -> Result<Option<T>, DumpError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let meaning = words.iter().find(|(word, _)| value.as_str() == Some(word)).map(|(_, meaning)| *meaning);
        let known = || words.iter().map(|(word, _)| format!("\"{word}\"")).collect::<Vec<_>>().join(", ");
        meaning.map(Some).ok_or_else(|| self.wrong(name, &format!("one of {}", known())))
    }
}

pub(crate) const LABEL: &str = "a string of 1 to 200 characters, none a control character";

/// Whether `text` is what [`LABEL`] says.
pub(crate) fn is_label(text: &str) -> bool {
    (1..=200).contains(&text.chars().count()) && !text.chars().any(char::is_control)
}

/// A value for a message: short, whatever it is.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
