//! The exit codes, all of them, and what ends with which.

use std::any::Any;
use std::panic::{self, PanicHookInfo};
use std::process::ExitCode;

/// How a run of `xent-diff` ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Exit {
    /// 0: everything compared agrees within its tolerance; or there was nothing to judge, and no problem; or nothing fails that
    /// was to be isolated; or every case of a self-test that was run is right.
    Agree,
    /// 1: something diverges; or a culprit was isolated; or a case of a self-test is wrong.
    Diverge,
    /// 2: the input or the call is at fault; one message on standard error says how.
    Input,
    /// 3: an internal error.
    Internal,
    /// 141, as a shell shows a process that SIGPIPE ended: the reader of standard output went away before the last dump.
    ClosedPipe,
    /// 128 and the number of a signal, as a shell shows a process that it ended: `isolate` first ends what it started.
    Signal(u8),
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(match exit {
            Exit::Agree => 0,
            Exit::Diverge => 1,
            Exit::Input => 2,
            Exit::Internal => 3,
            Exit::ClosedPipe => 141,
            Exit::Signal(number) => 128 + number,
        })
    }
}

/// Runs `work`; a panic in it ends as [`Exit::Internal`] with a short message.
pub fn guard(work: impl FnOnce() -> Exit + panic::UnwindSafe) -> Exit {
    let default = panic::take_hook();
    panic::set_hook(Box::new(report_panic));
    let exit = panic::catch_unwind(work).unwrap_or(Exit::Internal);
    panic::set_hook(default);
    exit
}

fn report_panic(info: &PanicHookInfo) {
    let place = info.location().map_or(String::new(), |place| format!(" ({}:{})", place.file(), place.line()));
    super::output::complain(&format!("internal error{place}: {}", words(info.payload())));
    super::output::complain("this is a defect of xent-diff, not of the dump; no report was written");
}

fn words(payload: &(dyn Any + Send)) -> &str {
    let owned = payload.downcast_ref::<String>().map(String::as_str);
    owned.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_internal_error() {
        assert_eq!(guard(|| panic!("on purpose")), Exit::Internal);
        assert_eq!(guard(|| Exit::Diverge), Exit::Diverge);
    }

    #[test]
    fn the_worst_is_the_greatest() {
        assert!(Exit::Agree < Exit::Diverge && Exit::Diverge < Exit::Input && Exit::Input < Exit::Internal);
    }
}
