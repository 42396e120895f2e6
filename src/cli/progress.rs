//! Bars on standard error: only on a terminal, and not with `--quiet`.

use crate::diff::Progress;
use crate::isolate::search::Step;
use crate::isolate::{Run, Watch};
use crate::report::text::clean;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::time::Duration;

/// One line that shows the piece of work in hand. Cleared when it is dropped.
#[derive(Debug)]
pub struct Bar(ProgressBar);

impl Bar {
    /// Counts steps.
    pub fn steps(quiet: bool) -> Self {
        Self::new(quiet, "{msg} {bar:24} {pos}/{len}")
    }

    /// Counts bytes.
    pub fn bytes(quiet: bool) -> Self {
        Self::new(quiet, "{msg} {bar:24} {bytes}/{total_bytes}, {eta} left")
    }

    /// Shows for how long the piece of work in hand has been going on.
    pub fn clock(quiet: bool) -> Self {
        Self::new(quiet, "{spinner} {msg} {elapsed}")
    }

    fn new(quiet: bool, template: &str) -> Self {
        let target = if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let style = ProgressStyle::with_template(template).expect("the template is well-formed");
        let bar = ProgressBar::with_draw_target(Some(1), target).with_style(style);
        if !bar.is_hidden() {
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        Self(bar)
    }

    /// Sets how much of `total` is done.
    pub fn set(&self, done: u64, total: u64) {
        self.0.set_length(total);
        self.0.set_position(done);
    }

    /// Says what is being worked on.
    pub fn say(&self, what: &str) {
        self.0.set_message(what.to_owned());
    }
}

impl Watch for Bar {
    fn begins(&self, number: usize, step: Step, on: &str) {
        self.0.reset_elapsed();
        self.say(&format!("run {number}, {}, on: {on}", step.words()));
    }

    fn ended(&self, run: &Run, on: &str) {
        let Run { number, step, outcome, reason, .. } = run;
        self.0.println(clean(&format!("run {number}, {}, on: {on}: {} ({reason})", step.words(), outcome.word())));
    }
}

#[cfg(feature = "pjrt")]
impl crate::selftest::Watch for Bar {
    fn begins(&self, done: usize, total: usize, what: &str) {
        self.say(what);
        self.set(done as u64, total as u64);
    }

    fn ended(&self, case: &crate::selftest::report::CaseReport) {
        self.0.println(clean(&format!("{}: {}, {:.1} s", case.name, case.outcome.word(), case.seconds)));
    }
}

impl Progress for Bar {
    fn begin(&self, what: &str, steps: u64) {
        self.say(what);
        self.set(0, steps);
    }

    fn advance(&self, n: u64) {
        self.0.inc(n);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
