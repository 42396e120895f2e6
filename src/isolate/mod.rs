//! Finds which of several switches makes a command fail.
//!
//! A run is the command with some of the switches on. [`isolate`] makes runs, one after the other, until it can say which set
//! of switches fails and which, left out, cures; the order is [`search`]'s, the running `process`'s, and every run that has
//! ended stands in the `journal`, from which an interrupted search goes on.

mod conclusion;
mod error;
mod journal;
#[cfg(unix)]
mod lab;
mod log;
mod outcome;
#[cfg(unix)]
mod process;
pub mod search;
pub mod switch;

pub use conclusion::{Conclusion, Confidence, Verdict};
pub use error::IsolateError;
pub use outcome::Outcome;
pub use switch::{Set, Setting, Switch};

use regex::bytes::Regex;
use search::{Minimum, Step};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

/// What is run, and how its outcome is told.
#[derive(Clone, Debug)]
pub struct Experiment {
    /// A command line of the shell. Arguments of switches stand where it says `"$@"`, or else at its end.
    pub command: String,
    /// What can be turned on; at least one, each name once.
    pub switches: Vec<Switch>,
    /// A run that has not ended by then hangs.
    pub timeout: Duration,
    /// A run that has put out nothing for so long hangs.
    pub silence: Option<Duration>,
    /// A run succeeds only if a line of its output matches this.
    pub success: Option<Regex>,
    /// A run fails if a line of its output matches this.
    pub failure: Option<Regex>,
    /// How many runs it takes to believe.
    pub minimum: Minimum,
}

impl Experiment {
    /// The switches of these names; `None` if one does not exist.
    fn set<S: AsRef<str>>(&self, names: &[S]) -> Option<Set> {
        names.iter().map(|name| self.switches.iter().position(|switch| switch.name == name.as_ref())).collect()
    }

    fn call(&self, on: &Set) -> Call {
        let mut call = Call {
            line: self.command.clone(),
            arguments: vec![],
            environment: vec![],
            timeout: self.timeout,
            silence: self.silence,
        };
        let is_argument = |setting: &Setting| matches!(setting, Setting::Arg(_));
        if self.switches.iter().flat_map(|switch| &switch.settings).any(is_argument) && !self.command.contains("$@") {
            call.line += " \"$@\"";
        }
        for setting in on.iter().flat_map(|&i| &self.switches[i].settings) {
            match setting {
                Setting::Env(key, value) => call.environment.push((key.clone(), value.clone())),
                Setting::Arg(argument) => call.arguments.push(argument.clone()),
            }
        }
        call
    }

    fn check(&self) -> Result<(), IsolateError> {
        let wrong = |message: &str| Err(IsolateError::Call(message.to_owned()));
        match self {
            _ if self.command.trim().is_empty() => wrong("--cmd: an empty command; expected a command line, such as './run.sh'"),
            _ if self.command.contains('\0') => wrong("--cmd: a NUL character, which no command line can hold"),
            _ if self.switches.is_empty() => wrong("--switch: none; expected at least one, such as --switch log=LOG=1"),
            _ if self.silence.is_some_and(|limit| limit >= self.timeout) => {
                wrong("--silence is not below --timeout, so it would never tell; give a smaller one, or a larger --timeout")
            }
            _ => Ok(()),
        }
    }
}

/// What is started, and its limits.
struct Call {
    line: String,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    timeout: Duration,
    silence: Option<Duration>,
}

/// A run that has ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Runs are counted from 1.
    pub number: usize,
    /// What it was made for.
    pub step: Step,
    /// Names of the switches that were on.
    pub on: Vec<String>,
    /// How it ended.
    pub outcome: Outcome,
    /// What tells so: an exit code, a signal, a pattern, a limit.
    pub reason: String,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// When output was last seen, in seconds from its start; `None`: there was none.
    pub last_output: Option<f64>,
    /// The last line of its output that is not blank.
    pub last_line: String,
    /// Something that it started left its process group and still runs.
    pub left_behind: bool,
    /// The name of its log.
    pub log: String,
}

/// Is told how far the work is.
pub trait Watch {
    /// A run begins, with these switches on.
    fn begins(&self, number: usize, step: Step, on: &str);
    /// A run has ended.
    fn ended(&self, run: &Run, on: &str);
}

/// Does not watch.
impl Watch for () {
    fn begins(&self, _: usize, _: Step, _: &str) {}
    fn ended(&self, _: &Run, _: &str) {}
}

/// All that was done and what follows from it.
#[derive(Clone, Debug)]
pub struct Isolation {
    /// Every run that has ended, earlier calls' among them.
    pub runs: Vec<Run>,
    /// How many of them were made by earlier calls.
    pub earlier: usize,
    /// What follows.
    pub conclusion: Conclusion,
}

/// Finds the smallest set of switches that makes the command fail, and the smallest whose removal cures. Logs and the journal
/// lie in the folder `logs`; what stands in the journal is not run again. Stops, with everything that it started, when
/// `interrupt` becomes the number of a signal.
///
/// This process becomes the one that orphans of its children are left to (on Linux), so that none is overlooked.
///
/// # Errors
/// A call that makes no sense, a log folder of another one, a disk that is full, an interrupt; a platform without process groups.
pub fn isolate(
    experiment: &Experiment,
    logs: &Path,
    watch: &dyn Watch,
    interrupt: &AtomicUsize,
) -> Result<Isolation, IsolateError> {
    experiment.check()?;
    #[cfg(unix)]
    {
        lab::isolate(experiment, logs, watch, interrupt)
    }
    #[cfg(not(unix))]
    {
        _ = (logs, watch, interrupt);
        let message = "isolate ends runs by process groups, which only Unix has; run it on Linux or macOS";
        Err(IsolateError::Call(message.to_owned()))
    }
}
