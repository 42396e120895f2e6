//! Where runs are made, recorded and judged.

use super::journal::{Journal, Past, Started};
use super::outcome::{End, Ended};
use super::search::{Bench, Step, Tallies, search};
use super::switch::names;
use super::{Conclusion, Experiment, IsolateError, Isolation, Outcome, Run, Set, Watch, log, process};
use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

pub(super) fn isolate(
    experiment: &Experiment,
    logs: &Path,
    watch: &dyn Watch,
    interrupt: &AtomicUsize,
) -> Result<Isolation, IsolateError> {
    let (journal, Past { runs, unfinished, next }) = Journal::open(logs, experiment)?;
    process::adopt_orphans();
    if let Some(Started { number, group, log }) = unfinished {
        let log = logs.join(log);
        if !process::end_orphans(group, &log) {
            return Err(held(
                log,
                format!("a process of run {number}, which was interrupted, still runs and holds its log open"),
            ));
        }
    }
    let mut tallies = Tallies::new();
    for run in &runs {
        tallies.entry(experiment.set(&run.on).unwrap_or_default()).or_default().add(run.outcome != Outcome::Success);
    }
    let earlier = runs.len();
    let mut lab = Lab { experiment, logs, watch, interrupt, journal, runs, next };
    let found = search(&mut lab, experiment.switches.len(), experiment.minimum, &mut tallies)?;
    let conclusion = Conclusion::of(&found, experiment, &tallies, &lab.runs);
    Ok(Isolation { runs: lab.runs, earlier, conclusion })
}

fn held(path: PathBuf, found: String) -> IsolateError {
    IsolateError::Logs {
        path,
        found,
        expected: "that nothing of an earlier run disturbs the next",
        remedy: "find the process with fuser or lsof and end it".to_owned(),
    }
}

struct Lab<'a> {
    experiment: &'a Experiment,
    logs: &'a Path,
    watch: &'a dyn Watch,
    interrupt: &'a AtomicUsize,
    journal: Journal,
    runs: Vec<Run>,
    next: usize,
}

impl Bench for Lab<'_> {
    type Stop = IsolateError;

    fn fails(&mut self, on: &Set, step: Step) -> Result<bool, IsolateError> {
        if let signal @ 1.. = self.interrupt.load(Ordering::Relaxed) {
            return Err(IsolateError::Interrupted(signal as i32));
        }
        let number = self.next;
        self.next += 1;
        let label = names(on, &self.experiment.switches);
        self.watch.begins(number, step, &label);
        let name = format!("run-{number:04}.log");
        let path = self.logs.join(&name);
        let ended = self.run(on, number, &name, &path)?;
        if let End::Interrupted(signal) = ended.end {
            return Err(IsolateError::Interrupted(signal));
        }
        let (success, failure) = (self.experiment.success.as_ref(), self.experiment.failure.as_ref());
        let seen = log::read(&path, success, failure).map_err(IsolateError::io(&path, "the log cannot be read"))?;
        let (outcome, reason) = self.experiment.outcome(&ended, &seen);
        let run = Run {
            number,
            step,
            on: on.iter().map(|&i| self.experiment.switches[i].name.clone()).collect(),
            outcome,
            reason,
            seconds: rounded(ended.seconds),
            last_output: ended.last_output.map(rounded),
            last_line: seen.last_line,
            left_behind: process::is_held(&path),
            log: name,
        };
        self.journal.ended(&run)?;
        self.watch.ended(&run, &label);
        self.runs.push(run);
        Ok(outcome != Outcome::Success)
    }
}

impl Lab<'_> {
    fn run(&mut self, on: &Set, number: usize, name: &str, path: &Path) -> Result<Ended, IsolateError> {
        let log = OpenOptions::new().append(true).create(true).open(path);
        let log = log.map_err(IsolateError::io(path, "the log cannot be written"))?;
        if !process::lock(&log) {
            return Err(held(path.to_owned(), "a process still writes to it".to_owned()));
        }
        log.set_len(0).map_err(IsolateError::io(path, "the log cannot be emptied"))?;
        let mut journaled = Ok(());
        let ended = process::run(&self.experiment.call(on), &log, self.interrupt, |group| {
            journaled = self.journal.started(Started { number, group, log: name.to_owned() });
            // The error itself follows below.
            if journaled.is_ok() { Ok(()) } else { Err(ErrorKind::Other.into()) }
        });
        journaled?;
        ended.map_err(IsolateError::io(Path::new(process::SHELL), "the command cannot be run"))
    }
}

/// Milliseconds are as fine as it is looked.
fn rounded(seconds: f64) -> f64 {
    (seconds * 1000.0).round() / 1000.0
}
