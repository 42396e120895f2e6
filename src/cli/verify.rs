//! `xent-diff verify <dumps>`: integrity and completeness, and nothing else.

use super::args::Verify;
use super::exit::Exit;
use super::output::{Out, complain};
use super::progress::Bar;
use crate::dump::{self, VerifyReport, find_dumps};
use crate::report::model::Verdict;
use crate::report::terminal::Style;
use crate::report::text::{Paint, bytes, clean, count};
use std::error::Error;
use std::path::Path;

pub fn run(args: &Verify, out: &mut Out) -> Result<Exit, Box<dyn Error>> {
    let dumps = find_dumps(&args.dumps)?;
    let mut problems = 0;
    for path in &dumps {
        let report = {
            let bar = Bar::bytes(args.quiet);
            bar.say("checking");
            dump::verify(path, &mut |done, total| bar.set(done, total))
        };
        match report {
            Ok(report) => {
                problems += report.problems.len();
                out.print(&text(path, &report, out.style()))?;
            }
            Err(e) if dumps.len() == 1 => return Err(e.into()),
            Err(e) => {
                problems += 1;
                complain(&e.to_string());
            }
        }
    }
    if problems > 0 {
        return Err(format!("{} in {}, listed above", count(problems, "problem"), count(dumps.len(), "dump")).into());
    }
    Ok(Exit::Agree)
}

fn text(path: &Path, report: &VerifyReport, style: Style) -> String {
    let sound = report.problems.is_empty();
    let mark = style.mark(if sound { Verdict::Agree } else { Verdict::Diverge });
    let path = path.display().to_string();
    let state = if sound { "sound".to_owned() } else { count(report.problems.len(), "problem") };
    let mut out = format!(
        "{mark} {}: {state}; {}, {}, {}\n",
        Paint::Bold.on(&clean(&path), style.colour),
        count(report.folders, "folder"),
        count(report.files, "file"),
        bytes(report.bytes)
    );
    let mut line = |label: &str, text: &str| style.entry(&mut out, &format!("  {label}"), text);
    for problem in &report.problems {
        line("problem", &problem.to_string());
    }
    for folder in &report.interrupted {
        line("interrupted", &format!("{}: no manifest, a capture that was cut off", folder.display()));
    }
    for (run, part) in &report.incomplete {
        line("incomplete", &format!("run {run}, {}: {}", part.folder.display(), part.reason));
    }
    for copy in &report.differing_copies {
        line("copies differ", copy);
    }
    for warning in &report.warnings {
        line("warning", warning);
    }
    out
}
