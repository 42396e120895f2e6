//! A folder with a program in it, and the command.

use assert_cmd::Command;
use serde_json::Value;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

pub const BINARY: &str = env!("CARGO_BIN_EXE_xent-diff");

/// No call may take longer, on a machine however busy.
const LIMIT: Duration = Duration::from_secs(180);

/// What came of a call.
pub struct Ended {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

pub struct Bench(TempDir);

impl Bench {
    /// A folder with `run.sh`, which does `script`.
    pub fn new(script: &str) -> Self {
        let bench = Self(tempfile::tempdir().unwrap());
        bench.write("run.sh", &format!("#!/bin/sh\n{script}\n"));
        fs::set_permissions(bench.path("run.sh"), Permissions::from_mode(0o755)).unwrap();
        bench
    }

    pub fn folder(&self) -> &Path {
        self.0.path()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder().join(name)
    }

    pub fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    /// `isolate` on `run.sh`, with further arguments.
    pub fn isolate(&self, arguments: &[&str]) -> Ended {
        self.call(&[&["isolate", "--cmd", "./run.sh"], arguments].concat())
    }

    pub fn call(&self, arguments: &[&str]) -> Ended {
        let mut command = Command::new(BINARY);
        let output = command.current_dir(self.folder()).args(arguments).timeout(LIMIT).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Ended { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }

    /// The JSON report of such a call, and its exit code.
    #[track_caller]
    pub fn report(&self, arguments: &[&str]) -> (Option<i32>, Value) {
        let ended = self.isolate(&[arguments, &["--json", "-"]].concat());
        let report = serde_json::from_str(&ended.out);
        (ended.code, report.unwrap_or_else(|e| panic!("{e}: {}{}", ended.out, ended.err)))
    }
}

/// Whether the process `id` runs; one that has ended and that nobody has collected does not.
pub fn runs(id: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    let ended = stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z'));
    Path::new(&format!("/proc/{id}")).exists() && !ended
}
