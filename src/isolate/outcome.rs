//! The rule by which success, failure, crash and hang are told apart.

use super::Experiment;
use super::log::Seen;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// What brought a run to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Exit(i32),
    Signal(i32),
    TimeUp,
    Silent,
    Interrupted(i32),
}

/// How a run came to its end.
pub(super) struct Ended {
    pub(super) end: End,
    pub(super) seconds: f64,
    /// When output was last seen, in seconds from the start.
    pub(super) last_output: Option<f64>,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It ended by itself, with exit code 0, and the patterns do not say otherwise.
    Success,
    /// It ended with another exit code, or a pattern says that it failed.
    Failure,
    /// A signal ended it.
    Crash,
    /// It did not end.
    Hang,
}

impl Outcome {
    /// In one word.
    pub fn word(self) -> &'static str {
        match self {
            Outcome::Success => "success",
            Outcome::Failure => "failure",
            Outcome::Crash => "crash",
            Outcome::Hang => "hang",
        }
    }
}

/// A run that put out something in the last tenth of its time is perhaps only slow.
const STILL: f64 = 0.9;
pub(super) const UNTIL_THE_END: &str = "output until the end";

impl Experiment {
    /// The first of these that applies: it did not end, a signal ended it, the failure pattern was seen, its exit code is not 0,
    /// the success pattern was not seen; else it succeeded. With what tells so.
    pub(super) fn outcome(&self, ended: &Ended, seen: &Seen) -> (Outcome, String) {
        let silent_from = match ended.last_output {
            None => "no output at all".to_owned(),
            Some(at) => format!("silent from {at:.1} s on"),
        };
        match ended.end {
            End::Silent => (Outcome::Hang, format!("{} of silence, {silent_from}", seconds(self.silence.unwrap_or_default()))),
            End::TimeUp => {
                let still = ended.last_output.is_some_and(|at| at > STILL * self.timeout.as_secs_f64());
                let output = if still { UNTIL_THE_END } else { &silent_from };
                (Outcome::Hang, format!("no end in {}, {output}", seconds(self.timeout)))
            }
            End::Signal(signal) | End::Interrupted(signal) => (Outcome::Crash, signal_words(signal)),
            // So a shell says how a command of its own ended.
            End::Exit(code @ 129..160) => (Outcome::Crash, format!("exit code {code}: {}", signal_words(code - 128))),
            End::Exit(code) => match &seen.failure {
                Some(line) => (Outcome::Failure, format!("failure pattern: {line}")),
                None if code != 0 => (Outcome::Failure, format!("exit code {code}")),
                None if self.success.is_some() && !seen.success => {
                    (Outcome::Failure, "exit code 0, without the success pattern".to_owned())
                }
                None => (Outcome::Success, "exit code 0".to_owned()),
            },
        }
    }
}

/// `10 s`, `0.5 s`.
pub(super) fn seconds(time: Duration) -> String {
    format!("{} s", time.as_secs_f64())
}

fn signal_words(signal: i32) -> String {
    #[cfg(unix)]
    if let Some(name) = signal_hook::low_level::signal_name(signal) {
        return format!("signal {signal} ({name})");
    }
    format!("signal {signal}")
}
