//! The journal: one JSON object a line, each written at once and synced, in the order in which things happened.
//!
//! The first line says what is being isolated. Then each run has a line when it starts and one when it has ended; a run without
//! the second was interrupted and counts for nothing.

use super::{Experiment, IsolateError, Run, Switch};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

/// Its name in the log folder.
pub(super) const FILE: &str = "journal.jsonl";
const SCHEMA: &str = "xent-isolate-journal/1";

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Record {
    Begin(Header),
    Start(Started),
    End(Run),
}

/// What an outcome depends on. Two experiments that differ in any of it share no runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Header {
    schema: String,
    command: String,
    folder: PathBuf,
    switches: Vec<Switch>,
    timeout: f64,
    silence: Option<f64>,
    success_pattern: Option<String>,
    failure_pattern: Option<String>,
}

impl Header {
    fn of(experiment: &Experiment, folder: PathBuf) -> Self {
        Self {
            schema: SCHEMA.to_owned(),
            command: experiment.command.clone(),
            folder,
            switches: experiment.switches.clone(),
            timeout: experiment.timeout.as_secs_f64(),
            silence: experiment.silence.map(|limit| limit.as_secs_f64()),
            success_pattern: experiment.success.as_ref().map(|pattern| pattern.to_string()),
            failure_pattern: experiment.failure.as_ref().map(|pattern| pattern.to_string()),
        }
    }

    /// What differs first, as it was and as it is asked for.
    fn difference(&self, now: &Self) -> Option<String> {
        let [then, now] = [self, now].map(|header| serde_json::to_value(header).unwrap_or_default());
        let (then, now) = (then.as_object()?, now.as_object()?);
        let (name, was) = then.iter().find(|(name, was)| now.get(*name) != Some(was))?;
        Some(format!("it is of another call: {name} was {was}, now {}", now.get(name).unwrap_or(&serde_json::Value::Null)))
    }
}

/// A run that has started.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Started {
    pub(super) number: usize,
    /// The number of its process group.
    pub(super) group: u32,
    pub(super) log: String,
}

/// The journal of a log folder, open to be continued; nobody else can.
pub(super) struct Journal {
    file: File,
    path: PathBuf,
}

/// What a journal held when it was opened.
pub(super) struct Past {
    pub(super) runs: Vec<Run>,
    /// The run that started last, if it has not ended.
    pub(super) unfinished: Option<Started>,
    /// The number of the next run.
    pub(super) next: usize,
}

impl Journal {
    /// Opens the journal of `logs`, or begins it.
    pub(super) fn open(logs: &Path, experiment: &Experiment) -> Result<(Self, Past), IsolateError> {
        fs::create_dir_all(logs).map_err(IsolateError::io(logs, "the log folder cannot be made"))?;
        let path = logs.join(FILE);
        let strangers = || fs::read_dir(logs).is_ok_and(|mut entries| entries.next().is_some());
        if !path.exists() && strangers() {
            return Err(IsolateError::Logs {
                path: logs.to_owned(),
                found: format!("it holds files but no {FILE}"),
                expected: "a folder that does not exist, is empty, or is of an earlier call",
                remedy: "give another folder with --logs".to_owned(),
            });
        }
        let file = OpenOptions::new().read(true).append(true).create(true).open(&path);
        let file = file.map_err(IsolateError::io(&path, "the journal cannot be opened"))?;
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            return Err(IsolateError::Logs {
                path,
                found: "another isolate is at work here".to_owned(),
                expected: "one at a time",
                remedy: "wait for it, or give another folder with --logs".to_owned(),
            });
        }
        let mut journal = Self { file, path };
        let records = journal.records()?;
        let folder = std::env::current_dir().map_err(IsolateError::io(Path::new("."), "the current folder is gone"))?;
        let header = Header::of(experiment, folder);
        let past = journal.past(&records, &header, experiment)?;
        if records.is_empty() {
            journal.write(&Record::Begin(header))?;
            // The folder's entry for it must last as well; where a folder cannot be synced, the system sees to it.
            _ = File::open(logs).and_then(|folder| folder.sync_all());
        }
        Ok((journal, past))
    }

    /// The records that were written whole. The rest of one that was cut off is taken out.
    fn records(&mut self) -> Result<Vec<Record>, IsolateError> {
        let mut text = Vec::new();
        let read = self.file.rewind().and_then(|()| self.file.read_to_end(&mut text));
        read.map_err(IsolateError::io(&self.path, "the journal cannot be read"))?;
        let whole = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |last| last + 1);
        if whole < text.len() {
            let cut = self.file.set_len(whole as u64);
            cut.map_err(IsolateError::io(&self.path, "the last line, which was cut off, cannot be taken out"))?;
        }
        let lines = text[..whole].split_inclusive(|&byte| byte == b'\n');
        let parsed = lines.enumerate().map(|(i, line)| serde_json::from_slice(line).map_err(|e| self.bad(i, e.to_string())));
        parsed.collect()
    }

    fn bad(&self, line: usize, found: String) -> IsolateError {
        IsolateError::Logs {
            path: self.path.clone(),
            found: format!("line {}: {found}", line + 1),
            expected: "lines as xent-diff wrote them",
            remedy: "restore it, or give another folder with --logs".to_owned(),
        }
    }

    fn past(&self, records: &[Record], header: &Header, experiment: &Experiment) -> Result<Past, IsolateError> {
        let mut past = Past { runs: vec![], unfinished: None, next: 1 };
        for (i, record) in records.iter().enumerate() {
            match record {
                Record::Begin(then) if i == 0 => {
                    if let Some(found) = then.difference(header) {
                        return Err(IsolateError::Logs {
                            path: self.path.clone(),
                            found,
                            expected: "the same command, switches, limits and patterns, in the same folder",
                            remedy: "give another folder with --logs, or remove this one".to_owned(),
                        });
                    }
                }
                Record::Start(started) if i > 0 => {
                    past.next = past.next.max(started.number.saturating_add(1));
                    past.unfinished = Some(started.clone());
                }
                Record::End(run) if i > 0 && past.unfinished.as_ref().is_some_and(|started| started.number == run.number) => {
                    if experiment.set(&run.on).is_none() {
                        return Err(self.bad(i, format!("a run with switches on that do not exist: {:?}", run.on)));
                    }
                    past.runs.push(run.clone());
                    past.unfinished = None;
                }
                _ => return Err(self.bad(i, "a record that cannot stand here".to_owned())),
            }
        }
        Ok(past)
    }

    pub(super) fn started(&mut self, started: Started) -> Result<(), IsolateError> {
        self.write(&Record::Start(started))
    }

    pub(super) fn ended(&mut self, run: &Run) -> Result<(), IsolateError> {
        self.write(&Record::End(run.clone()))
    }

    fn write(&mut self, record: &Record) -> Result<(), IsolateError> {
        let write = || {
            let mut line = serde_json::to_vec(record)?;
            line.push(b'\n');
            (&self.file).write_all(&line)?;
            self.file.sync_data()
        };
        write().map_err(IsolateError::io(&self.path, "the journal cannot be written"))
    }
}
