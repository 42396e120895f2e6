//! The rule by which success, failure, crash and hang are told apart.

use super::log::Seen;
use super::{Experiment, Run};
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

impl Experiment {
    fn talks_until_the_end(&self, last_output: f64) -> bool {
        last_output > STILL * self.timeout.as_secs_f64()
    }

    /// Whether the run hangs, but was at work until its time was up.
    pub(super) fn is_perhaps_slow(&self, run: &Run) -> bool {
        let time_up = run.outcome == Outcome::Hang && run.seconds >= self.timeout.as_secs_f64();
        time_up && run.last_output.is_some_and(|at| self.talks_until_the_end(at))
    }

    /// The first of these that applies: it did not end, a signal ended it, the failure pattern was seen, its exit code is not 0,
    /// the success pattern was not seen; else it succeeded. With what tells so.
    pub(super) fn outcome(&self, ended: &Ended, seen: &Seen) -> (Outcome, String) {
        let limit = seconds(self.timeout);
        match ended.end {
            End::Silent => {
                let limit = seconds(self.silence.unwrap_or_default());
                (Outcome::Hang, format!("silent for {limit} from {:.1} s on", ended.last_output.unwrap_or_default()))
            }
            End::TimeUp => match ended.last_output {
                None => (Outcome::Hang, format!("no output in {limit}")),
                Some(at) if self.talks_until_the_end(at) => (Outcome::Hang, format!("output until {limit}")),
                Some(at) => (Outcome::Hang, format!("silent from {at:.1} s to {limit}")),
            },
            End::Signal(signal) | End::Interrupted(signal) => (Outcome::Crash, signal_words(signal)),
            // So a shell says how a command of its own ended.
            End::Exit(code @ 129..160) => (Outcome::Crash, format!("exit code {code}: {}", signal_words(code - 128))),
            End::Exit(code) => match &seen.failure {
                Some(line) => (Outcome::Failure, format!("pattern: {line}")),
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
fn seconds(time: Duration) -> String {
    format!("{} s", time.as_secs_f64())
}

fn signal_words(signal: i32) -> String {
    #[cfg(unix)]
    if let Some(name) = signal_hook::low_level::signal_name(signal) {
        return format!("signal {signal} ({name})");
    }
    format!("signal {signal}")
}
