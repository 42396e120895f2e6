//! Switches: what is turned on and off, as given on the command line.

use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Switches by their place in the list.
pub type Set = BTreeSet<usize>;

/// A change that can be turned on: everything that bears its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Switch {
    /// Its name.
    pub name: String,
    /// What being on means, all of it at once.
    pub settings: Vec<Setting>,
}

/// One thing that a switch does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Setting {
    /// A variable of the environment, name and value.
    Env(String, String),
    /// An argument of the command.
    Arg(String),
}

impl Setting {
    /// As the command line has it.
    pub fn text(&self) -> String {
        match self {
            Setting::Env(key, value) => format!("{key}={value}"),
            Setting::Arg(argument) => argument.clone(),
        }
    }
}

/// Reads `NAME=KEY=VALUE`, a variable of the environment, or `NAME=ARGUMENT`. What is ambiguous is said by `NAME=env:KEY=VALUE`
/// or `NAME=arg:ARGUMENT`.
///
/// # Errors
/// What is wrong with it, and what is expected.
pub fn parse(text: &str) -> Result<(String, Setting), String> {
    const FORM: &str = "expected NAME=KEY=VALUE for a variable of the environment or NAME=ARGUMENT, such as \
                        async=XLA_ASYNC=1 or bf16=--dtype=bf16";
    let (name, setting) = text.split_once('=').ok_or_else(|| format!("nothing is set; {FORM}"))?;
    let in_names = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    if name.is_empty() || name.starts_with('-') || !name.chars().all(in_names) {
        return Err(format!("{name:?} is no name of letters, digits, '_', '-' and '.'; {FORM}"));
    }
    if ["all", "none"].contains(&name) {
        return Err(format!("a switch cannot be called {name:?}, which stands for all or none of them; give it another name"));
    }
    let (kind, setting) = match setting.split_once(':') {
        Some((kind @ ("env" | "arg"), rest)) => (kind, rest),
        _ => ("", setting),
    };
    let variable = setting.split_once('=').filter(|(key, _)| is_variable(key));
    let setting = match (kind, variable) {
        ("env" | "", Some((key, value))) => Setting::Env(key.to_owned(), value.to_owned()),
        ("env", None) => return Err(format!("{setting:?} sets no variable of the environment; expected env:KEY=VALUE")),
        (_, _) if setting.is_empty() => return Err(format!("switch {name:?} sets nothing; {FORM}")),
        _ => Setting::Arg(setting.to_owned()),
    };
    if setting.text().contains('\0') {
        return Err(format!("switch {name:?} holds a NUL character, which no environment and no argument can"));
    }
    Ok((name.to_owned(), setting))
}

fn is_variable(key: &str) -> bool {
    !key.starts_with(|c: char| c.is_ascii_digit())
        && !key.is_empty()
        && key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// Puts settings of the same name into one switch.
///
/// # Errors
/// A variable that two settings want, or one that has its value already.
pub fn gather(settings: &[(String, Setting)], environment: impl Fn(&str) -> Option<String>) -> Result<Vec<Switch>, String> {
    let mut switches: Vec<Switch> = Vec::new();
    for (name, setting) in settings {
        if let Setting::Env(key, value) = setting {
            let sets = |switch: &&Switch| switch.settings.iter().any(|s| matches!(s, Setting::Env(k, _) if k == key));
            if let Some(other) = switches.iter().find(sets) {
                return Err(format!(
                    "switches {:?} and {name:?} both set {key}, which can have one value only; let one switch set it",
                    other.name
                ));
            }
            if environment(key).as_ref() == Some(value) {
                return Err(format!(
                    "switch {name:?}: {key} is {value:?} already, so that on and off are the same; unset {key} first"
                ));
            }
        }
        match switches.iter_mut().find(|switch| switch.name == *name) {
            Some(switch) => switch.settings.push(setting.clone()),
            None => switches.push(Switch { name: name.clone(), settings: vec![setting.clone()] }),
        }
    }
    Ok(switches)
}

/// The names of those that are on: `none`, `all`, `a, b` or `all but c`, whichever is shortest.
pub fn names(on: &Set, switches: &[Switch]) -> String {
    let join = |wanted: &dyn Fn(&usize) -> bool| {
        let of = (0..switches.len()).filter(wanted).map(|i| switches[i].name.as_str());
        of.collect::<Vec<_>>().join(", ")
    };
    match (on.len(), switches.len() - on.len()) {
        (0, _) => "none".to_owned(),
        (1, _) => join(&|i| on.contains(i)),
        (_, 0) => "all".to_owned(),
        (with, without) if without * 2 < with => format!("all but {}", join(&|i| !on.contains(i))),
        _ => join(&|i| on.contains(i)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variable_and_an_argument_are_told_apart() {
        let env = |key: &str, value: &str| Ok(("n".to_owned(), Setting::Env(key.into(), value.into())));
        let arg = |argument: &str| Ok(("n".to_owned(), Setting::Arg(argument.into())));
        assert_eq!(parse("n=A_1=x=y"), env("A_1", "x=y"));
        assert_eq!(parse("n=A="), env("A", ""));
        assert_eq!(parse("n=env:A=arg:b"), env("A", "arg:b"));
        assert_eq!(parse("n=--lr=3"), arg("--lr=3"));
        assert_eq!(parse("n=-v"), arg("-v"));
        assert_eq!(parse("n=1A=x"), arg("1A=x"));
        assert_eq!(parse("n=model.lr=3"), arg("model.lr=3"));
        assert_eq!(parse("n=arg:lr=3"), arg("lr=3"));
        assert_eq!(parse("n=with space"), arg("with space"));
    }

    #[test]
    fn what_is_no_switch_is_refused() {
        for (text, what) in [
            ("n", "nothing is set"),
            ("=A=1", "\"\" is no name"),
            ("a b=A=1", "\"a b\" is no name"),
            ("-n=A=1", "is no name"),
            ("all=A=1", "cannot be called \"all\""),
            ("n=", "sets nothing"),
            ("n=arg:", "sets nothing"),
            ("n=env:--x", "expected env:KEY=VALUE"),
            ("n=A=\0", "NUL"),
        ] {
            let message = parse(text).unwrap_err();
            assert!(message.contains(what), "{text:?}: {message}");
        }
    }

    #[test]
    fn a_name_given_twice_is_one_switch() {
        let given = ["a=X=1", "b=--b", "a=--also"].map(|text| parse(text).unwrap());
        let switches = gather(&given, |_| None).unwrap();
        assert_eq!(switches.iter().map(|s| (s.name.as_str(), s.settings.len())).collect::<Vec<_>>(), [("a", 2), ("b", 1)]);
        let clash = ["a=X=1", "b=X=2"].map(|text| parse(text).unwrap());
        assert!(gather(&clash, |_| None).unwrap_err().contains("\"a\" and \"b\" both set X"));
        assert!(gather(&clash[..1], |_| Some("1".into())).unwrap_err().contains("unset X"));
        assert!(gather(&clash[..1], |_| Some("0".into())).is_ok());
    }

    #[test]
    fn sets_have_short_names() {
        let switches: Vec<Switch> = ["a", "b", "c", "d"].map(|name| Switch { name: name.into(), settings: vec![] }).into();
        let names = |on: &[usize]| names(&on.iter().copied().collect(), &switches);
        assert_eq!([names(&[]), names(&[2]), names(&[0, 3])], ["none", "c", "a, d"]);
        assert_eq!([names(&[0, 1, 3]), names(&[0, 1, 2, 3])], ["all but c", "all"]);
    }
}
