//! `xent-diff <dumps>`: verify, replay, compare, explain.

use super::args::{Cli, Judge};
use super::exit::Exit;
use super::output::{Out, Target, complain};
use super::progress::Bar;
use crate::diff::sampling::Sampling;
use crate::diff::{self, Settings};
use crate::dump::find_dumps;
use crate::report::model::{Report, Verdict};
use crate::report::{html, json, terminal};
use clap::CommandFactory;
use std::error::Error;
use std::path::Path;

pub fn run(args: &Judge, out: &mut Out) -> Result<Exit, Box<dyn Error>> {
    let targets: Vec<&Target> = args.json.iter().chain(&args.html).collect();
    if targets.iter().filter(|target| ***target == Target::Stdout).count() > 1 {
        return Err("--json - and --html - both ask for standard output; give one of them a file".into());
    }
    targets.iter().try_for_each(|target| target.check())?;
    if let Some(threads) = args.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads.get()).build_global()?;
    }
    if !args.dumps.exists() {
        return Err(missing(&args.dumps).into());
    }
    let dumps = find_dumps(&args.dumps)?;
    let alone = dumps.len() == 1 && dumps[0] == args.dumps;
    let sampling = match (args.full, args.sample) {
        (true, _) => Sampling::Full,
        (_, Some(rows)) => Sampling::Rows(rows),
        _ => Sampling::BySize,
    };
    let settings = Settings { candidates: args.candidates.clone(), step: args.step, microbatch: args.microbatch, sampling };
    let shown = !targets.contains(&&Target::Stdout);
    let mut reports = Vec::new();
    let mut at_fault = 0;
    for dump in &dumps {
        let judged = diff::judge(dump, &settings, &Bar::steps(args.quiet));
        match judged {
            Ok(report) => {
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
    if shown && !alone && !args.quiet {
        out.print(&format!("\n{}", terminal::overview(&reports, out.style())))?;
    }
    if let Some(target) = &args.json {
        target.write(&if alone { json::one(&reports[0]) } else { json::many(&reports) }, out)?;
    }
    if let Some(target) = &args.html {
        target.write(&html::render(&reports), out)?;
    }
    let diverges = reports.iter().any(|report| report.verdict == Verdict::Diverge);
    Ok(if diverges { Exit::Diverge } else { Exit::Agree })
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
