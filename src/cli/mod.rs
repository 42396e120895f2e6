//! The `xent-diff` command: arguments in, the engine's result out through the renderers, an exit code.

mod args;
mod exit;
mod faults;
mod info;
mod isolate;
mod judge;
mod output;
mod progress;
mod slice;
mod synth;
mod tpu_selftest;
mod verify;

pub use exit::Exit;

use args::{Cli, Command};
use clap::Parser;
use output::{Out, complain};
use std::error::Error;
use std::process::ExitCode;

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    exit::guard(|| {
        let cli = match Cli::try_parse() {
            Ok(cli) => cli,
            Err(e) => {
                // A closed standard output or error is no concern here.
                _ = e.print();
                return if e.use_stderr() { Exit::Input } else { Exit::Agree };
            }
        };
        run(&cli).unwrap_or_else(|e| {
            complain(&e.to_string());
            Exit::Input
        })
    })
    .into()
}

/// An error is at the input's or the call's door.
fn run(cli: &Cli) -> Result<Exit, Box<dyn Error>> {
    let mut out = Out::new();
    match (&cli.command, &cli.judge) {
        (Some(Command::Verify(args)), _) => verify::run(args, &mut out),
        (Some(Command::Info(args)), _) => info::run(args, &mut out),
        (Some(Command::Synth(args)), _) => synth::run(args, &mut out),
        (Some(Command::Slice(args)), _) => slice::run(args, &mut out),
        (Some(Command::Isolate(args)), _) => isolate::run(args, &mut out),
        (Some(Command::TpuSelftest(args)), _) => tpu_selftest::run(args, &mut out),
        (Some(Command::Faults), _) => faults::run(&mut out),
        (None, Some(args)) => judge::run(args, &mut out),
        (None, None) => unreachable!("clap asks for a path where there is no command"),
    }
}
