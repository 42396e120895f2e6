//! A command in a process group of its own, which ends whole.
//!
//! Output goes into the log itself and not through a pipe, so that a child that outlives the command cannot keep a reader
//! waiting. The log is locked, and whoever inherits it as its standard output keeps the lock: that tells whether anything of the
//! run is still there, even to an `isolate` that did not start it.

use super::Call;
use super::outcome::{End, Ended};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, kill_process_group, test_kill_process_group, waitpgid};
use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

pub(super) const SHELL: &str = "/bin/sh";
/// What a group has, once asked to end, before it is killed.
const GRACE: Duration = Duration::from_secs(2);
/// How long those that were killed may take to go.
const LAST: Duration = Duration::from_secs(2);
/// How often a run is looked at; at first more often, for the sake of short ones.
const PAUSE: Duration = Duration::from_millis(25);

/// Makes this process the parent of orphans of its children, so that their end is seen.
pub(super) fn adopt_orphans() {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    {
        // Without it zombies are waited for in vain where no init collects them; nothing worse.
        _ = rustix::process::set_child_subreaper(Some(rustix::process::getpid()));
    }
}

/// Locks the log of a run that is about to begin.
pub(super) fn lock(log: &File) -> bool {
    // Where files cannot be locked, there is no telling.
    !matches!(log.try_lock(), Err(TryLockError::WouldBlock))
}

/// Runs `call` with its output in `log`, at most until its time is up or `interrupt` is a signal's number. None of the process
/// group is left when this returns. `started` is told the group's number.
pub(super) fn run(
    call: &Call,
    log: &File,
    interrupt: &AtomicUsize,
    started: impl FnOnce(u32) -> io::Result<()>,
) -> io::Result<Ended> {
    let mut command = Command::new(SHELL);
    command.arg("-c").arg(&call.line).arg(SHELL).args(&call.arguments).envs(call.environment.iter().cloned());
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log.try_clone()?).process_group(0);
    let begun = Instant::now();
    let mut group = Group::of(command.spawn()?.id());
    started(group.id.as_raw_nonzero().get().unsigned_abs())?;
    let (mut size, mut last_output, mut pause) = (0, None, Duration::from_millis(1));
    loop {
        group.reap();
        let now = begun.elapsed();
        let written = log.metadata()?.len();
        if written != size {
            (size, last_output) = (written, Some(now));
        }
        let silent = now - last_output.unwrap_or_default();
        let end = match (group.leader, interrupt.load(Ordering::Relaxed)) {
            (Some(status), _) => Some(match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => End::Exit(code),
                (None, signal) => End::Signal(signal.unwrap_or(0)),
            }),
            (None, signal @ 1..) => Some(End::Interrupted(signal as i32)),
            _ if now >= call.timeout => Some(End::TimeUp),
            _ if call.silence.is_some_and(|limit| silent >= limit) => Some(End::Silent),
            _ => None,
        };
        if let Some(end) = end {
            group.end();
            return Ok(Ended { end, seconds: now.as_secs_f64(), last_output: last_output.map(|at| at.as_secs_f64()) });
        }
        sleep(pause);
        pause = (2 * pause).min(PAUSE);
    }
}

/// Whether something still has `log` as its output.
pub(super) fn is_held(log: &Path) -> bool {
    File::open(log).is_ok_and(|log| !lock(&log))
}

/// Ends what is left of a run whose `isolate` was killed: the group `id`, whose output is `log`. Whether nothing is left.
pub(super) fn end_orphans(id: u32, log: &Path) -> bool {
    // As long as one of them holds the log, the number of their group is given to no other. A group 1 would mean every process.
    let Some(id) = i32::try_from(id).ok().filter(|&id| id > 1).and_then(Pid::from_raw) else { return !is_held(log) };
    for (signal, time) in [(Signal::TERM, GRACE), (Signal::KILL, LAST)] {
        let begun = Instant::now();
        if is_held(log) {
            _ = kill_process_group(id, signal);
        }
        while is_held(log) && begun.elapsed() < time {
            sleep(PAUSE);
        }
    }
    !is_held(log)
}

/// A process group; it ends when this is dropped.
struct Group {
    id: Pid,
    /// How the process that leads it ended, if it has.
    leader: Option<WaitStatus>,
}

impl Group {
    fn of(leader: u32) -> Self {
        let id = i32::try_from(leader).ok().and_then(Pid::from_raw).expect("a process number is positive");
        Self { id, leader: None }
    }

    fn reap(&mut self) {
        while let Ok(Some((process, status))) = waitpgid(self.id, WaitOptions::NOHANG) {
            if process == self.id {
                self.leader = Some(status);
            }
        }
    }

    /// Whether any process is in it. Until its leader is reaped and all others are gone, no other group can get its number.
    fn is_there(&mut self) -> bool {
        self.reap();
        self.leader.is_none() || test_kill_process_group(self.id).is_ok()
    }

    /// Asks all to end, then kills them.
    fn end(&mut self) {
        let until = Instant::now() + GRACE;
        if self.is_there() {
            _ = kill_process_group(self.id, Signal::TERM);
        }
        while self.is_there() && Instant::now() < until {
            sleep(Duration::from_millis(2));
        }
        let until = Instant::now() + LAST;
        while self.is_there() && Instant::now() < until {
            // Again and again: one may be starting another.
            _ = kill_process_group(self.id, Signal::KILL);
            sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.end();
    }
}
