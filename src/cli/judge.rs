//! `xent-diff <dumps>`: verify, replay, compare, explain.

use super::args::{Cli, Judge};
use super::exit::Exit;
use super::output::{Out, Target, complain};
use super::progress::Bar;
use crate::diff::sampling::Sampling;
use crate::diff::{self, Settings};
use crate::dump::find_dumps;
use crate::report::baseline::Baseline;
use crate::report::model::{Report, Verdict};
use crate::report::text::list;
use crate::report::{html, json, markdown, terminal};
use clap::CommandFactory;
use std::error::Error;
use std::path::Path;

pub fn run(args: &Judge, out: &mut Out) -> Result<Exit, Box<dyn Error>> {
    let asked = [("--json -", &args.json), ("--html -", &args.html), ("--md -", &args.md)];
    let targets: Vec<&Target> = asked.iter().filter_map(|(_, target)| target.as_ref()).collect();
    let to_stdout: Vec<&str> =
        asked.iter().filter(|(_, target)| **target == Some(Target::Stdout)).map(|(option, _)| *option).collect();
    if to_stdout.len() > 1 {
        return Err(format!("{} all ask for standard output; give all but one a file", list(&to_stdout)).into());
    }
    targets.iter().try_for_each(|target| target.check())?;
    if let Some(threads) = args.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads.get()).build_global()?;
    }
    if !args.dumps.exists() {
        return Err(missing(&args.dumps).into());
    }
    let baseline = args.baseline.as_deref().map(baseline).transpose()?;
    let dumps = find_dumps(&args.dumps)?;
    let alone = dumps.len() == 1 && dumps[0] == args.dumps;
    let sampling = match (args.full, args.sample) {
        (true, _) => Sampling::Full,
        (_, Some(rows)) => Sampling::Rows(rows),
        _ => Sampling::BySize,
    };
    let settings = Settings {
        candidates: args.candidates.clone(),
        step: args.step,
        microbatch: args.microbatch,
        sampling,
        contract: args.contract.clone(),
    };
    let shown = !targets.contains(&&Target::Stdout);
    let mut reports = Vec::new();
    let mut at_fault = 0;
    for dump in &dumps {
        let judged = diff::judge(dump, &settings, &Bar::steps(args.quiet));
        match judged {
            Ok(mut report) => {
                report.baseline = baseline.as_ref().map(|baseline| baseline.compare(&report, alone));
                if shown {
                    out.print(&text(&report, reports.is_empty(), args.quiet, out))?;
                }
                reports.push(report);
            }
            Err(e) if alone => return Err(e.into()),
            Err(e) => {
                complain(&e.to_string());
                at_fault += 1;
            }
        }
        if out.is_closed() && targets.is_empty() && dump != &dumps[dumps.len() - 1] {
            return Ok(Exit::ClosedPipe);
        }
    }
    if at_fault > 0 {
        return Err(format!("{at_fault} of {} dumps cannot be judged; no report file is written", dumps.len()).into());
    }
    let not_judged = baseline.as_ref().filter(|_| !alone).map_or(vec![], |baseline| baseline.not_judged(&reports));
    if shown && !alone && !args.quiet {
        out.print(&format!("\n{}", terminal::overview(&reports, &not_judged, out.style())))?;
    }
    if let Some(target) = &args.json {
        target.write(&if alone { json::one(&reports[0]) } else { json::many(&reports, &not_judged) }, out)?;
    }
    if let Some(target) = &args.md {
        target.write(&markdown::render(&reports, &not_judged), out)?;
    }
    if let Some(target) = &args.html {
        target.write(&html::render(&reports, &not_judged), out)?;
    }
    let diverges = reports.iter().any(|report| report.verdict == Verdict::Diverge);
    Ok(if diverges { Exit::Diverge } else { Exit::Agree })
}

fn baseline(path: &Path) -> Result<Baseline, String> {
    let file = path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|e| format!("--baseline {file}: cannot be read: {e}"))?;
    Baseline::parse(&file, &text)
}

fn text(report: &Report, first: bool, quiet: bool, out: &Out) -> String {
    if quiet {
        return terminal::verdict(report, out.style());
    }
    let gap = if first { "" } else { "\n\n" };
    format!("{gap}{}", terminal::render(report, out.style()))
}

/// A path that does not exist may be a command that was spelled wrongly.
fn missing(path: &Path) -> String {
    let message = format!("{}: there is no such folder; expected a dump or a folder of dumps", path.display());
    let name = path.to_string_lossy();
    let commands = Cli::command();
    let near = commands.get_subcommands().map(|c| c.get_name()).find(|command| strsim::osa_distance(command, &name) <= 2);
    match near {
        Some(command) => format!("{message} (or did you mean the command '{command}'?)"),
        None => message,
    }
}
