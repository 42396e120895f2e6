//! `xent-diff isolate`: which switch makes a command fail.

use super::args::Isolate;
use super::exit::Exit;
use super::output::{Out, Target};
use super::progress::Bar;
use crate::isolate::search::Minimum;
use crate::isolate::switch::{gather, names};
use crate::isolate::{Conclusion, Experiment, IsolateError, Isolation, Outcome, Run, Setting, Switch, Verdict, isolate};
use crate::report::json::to_string;
use crate::report::model;
use crate::report::terminal::Style;
use crate::report::text::{Paint, Table, clean, columns, wrap};
use serde_json::{Value, json};
use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

pub fn run(args: &Isolate, out: &mut Out) -> Result<Exit, Box<dyn Error>> {
    if let Some(target) = &args.json {
        target.check()?;
    }
    let experiment = Experiment {
        command: args.command.clone(),
        switches: gather(&args.switches, |key| std::env::var(key).ok())?,
        timeout: args.timeout,
        silence: args.silence,
        success: args.success_pattern.clone(),
        failure: args.failure_pattern.clone(),
        minimum: Minimum { pass: args.min_pass.get(), fail: args.min_fail.get() },
    };
    let interrupt = on_signals()?;
    let isolated = {
        let bar = Bar::clock(args.quiet);
        isolate(&experiment, &args.logs, &bar, &interrupt)
    };
    let isolation = match isolated {
        Err(IsolateError::Interrupted(signal)) => return Ok(Exit::Signal(signal.try_into()?)),
        isolated => isolated?,
    };
    if args.json != Some(Target::Stdout) {
        out.print(&if args.quiet {
            verdict(&isolation.conclusion, out.style())
        } else {
            text(&isolation, &experiment, &args.logs, out.style())
        })?;
    }
    if let Some(target) = &args.json {
        target.write(&to_string(&value(&isolation, &experiment, &args.logs)), out)?;
    }
    match isolation.conclusion.verdict {
        Verdict::NothingFails => Ok(Exit::Agree),
        Verdict::Culprit => Ok(Exit::Diverge),
        Verdict::BaselineFails | Verdict::BaselineVaries => Err(baseline(&isolation, &args.logs).into()),
    }
}

/// The number of the signal that asks for the end, once one has.
fn on_signals() -> Result<Arc<AtomicUsize>, std::io::Error> {
    let interrupt = Arc::new(AtomicUsize::new(0));
    #[cfg(unix)]
    {
        use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
        for signal in [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|&signal| !is_ignored(signal)) {
            signal_hook::flag::register_usize(signal, Arc::clone(&interrupt), signal.unsigned_abs() as usize)?;
        }
    }
    Ok(interrupt)
}

/// Whether this process was started with the signal ignored, as nohup does, where Linux tells.
#[cfg(unix)]
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

/// The command fails without any switch: what, where, found, expected, remedy.
fn baseline(isolation: &Isolation, logs: &Path) -> String {
    let failed = isolation.runs.iter().find(|run| run.on.is_empty() && run.outcome != Outcome::Success);
    let found = failed.map_or(String::new(), |run| {
        let log = logs.join(&run.log);
        format!("{}: {} ({}), last line {:?}; ", log.display(), run.outcome.word(), run.reason, run.last_line)
    });
    format!(
        "{found}expected --cmd to succeed with all switches off, always; make it do so first, give what it needs in order to \
         fail as switches, or say with --success-pattern what success is (then with another --logs)"
    )
}

/// The conclusion in one sentence, marked and coloured.
fn verdict(conclusion: &Conclusion, style: Style) -> String {
    let good = conclusion.verdict == Verdict::NothingFails;
    let mark = style.mark(if good { model::Verdict::Agree } else { model::Verdict::Diverge });
    let paint = if good { Paint::Green } else { Paint::Red };
    let lines = wrap(&conclusion.sentence, style.width.saturating_sub(2).max(20));
    let lines = lines.iter().enumerate();
    lines.map(|(i, line)| format!("{} {}\n", if i == 0 { &mark } else { " " }, paint.on(line, style.colour))).collect()
}

fn text(isolation: &Isolation, experiment: &Experiment, logs: &Path, style: Style) -> String {
    let Isolation { runs, earlier, conclusion } = isolation;
    let mut out = verdict(conclusion, style);
    out.push('\n');
    style.entry(&mut out, "command", &experiment.command);
    for (i, switch) in experiment.switches.iter().enumerate() {
        let settings: Vec<String> = switch.settings.iter().map(Setting::text).collect();
        style.entry(&mut out, if i == 0 { "switches" } else { "" }, &format!("{}: {}", switch.name, settings.join(" ")));
    }
    out += &format!("\n{}\n", table(runs, &experiment.switches, style));
    if let Some(cure) = &conclusion.cure {
        style.entry(&mut out, "cure", cure);
    }
    if let (Some(confidence), Some(grounds)) = (conclusion.confidence, &conclusion.grounds) {
        style.entry(&mut out, "how sure", &format!("{}: {grounds}", confidence.word()));
    }
    for note in &conclusion.notes {
        style.entry(&mut out, "note", note);
    }
    let resumed = if *earlier > 0 { format!("; {earlier} of {} runs are of an earlier call", runs.len()) } else { String::new() };
    style.entry(&mut out, "logs", &format!("{}{resumed}", logs.display()));
    out
}

const HEADING: [&str; 6] = [">#", "step", "on", "result", ">time", "seen last"];
/// Columns that a cell keeps on however narrow a terminal.
const LEAST: usize = 12;

fn table(runs: &[Run], switches: &[Switch], style: Style) -> String {
    let on = |run: &Run| {
        names(&switches.iter().enumerate().filter(|(_, s)| run.on.contains(&s.name)).map(|(i, _)| i).collect(), switches)
    };
    let mut rows: Vec<Vec<String>> = Vec::new();
    for run in runs {
        let result = match run.outcome {
            Outcome::Success => run.outcome.word().to_owned(),
            _ => format!("{}: {}", run.outcome.word(), run.reason),
        };
        let seen = if run.last_line.is_empty() { "nothing" } else { &run.last_line };
        rows.push(vec![
            run.number.to_string(),
            run.step.words().to_owned(),
            on(run),
            result,
            format!("{:.1} s", run.seconds),
            seen.to_owned(),
        ]);
    }
    // What does not fit is cut off where it matters least; the logs have it all.
    let needed = |column: usize| rows.iter().map(|row| columns(&row[column])).max().unwrap_or(0).max(columns(HEADING[column]));
    let free = style.width.saturating_sub(2 + needed(0) + needed(1) + needed(4) + 2 * (HEADING.len() - 1));
    let on = needed(2).min(free / 3);
    let result = needed(3).min((free - on).saturating_sub(needed(5).min((free - on) / 2)));
    let widths = [(2, on), (3, result), (5, free - on - result)];
    let mut table = Table::new(&HEADING);
    for mut row in rows {
        widths.iter().for_each(|&(column, width)| row[column] = cut(&row[column], width.max(LEAST)));
        table.row(row);
    }
    table.render(2, style.colour)
}

fn cut(text: &str, width: usize) -> String {
    let text = clean(text);
    if columns(&text) <= width {
        return text.into_owned();
    }
    text.chars().take(width - 1).chain(['…']).collect()
}

fn value(isolation: &Isolation, experiment: &Experiment, logs: &Path) -> Value {
    let Isolation { runs, earlier, conclusion } = isolation;
    let switch = |switch: &Switch| {
        let settings: Vec<String> = switch.settings.iter().map(Setting::text).collect();
        json!({ "name": switch.name, "settings": settings })
    };
    let sets = conclusion.sets.iter().map(|set| {
        let tally = set.tally;
        json!({ "on": set.on, "passes": tally.passes, "failures": tally.failures, "rate": tally.rate() })
    });
    json!({
        "schema": "xent-isolate/1",
        "verdict": conclusion.verdict,
        "sentence": conclusion.sentence,
        "culprit": conclusion.culprit,
        "alone": conclusion.alone,
        "cures": conclusion.cures,
        "confidence": conclusion.confidence,
        "grounds": conclusion.grounds,
        "notes": conclusion.notes,
        "command": experiment.command,
        "switches": experiment.switches.iter().map(switch).collect::<Vec<_>>(),
        "sets": sets.collect::<Vec<_>>(),
        "logs": logs.display().to_string(),
        "earlier": earlier,
        "runs": runs,
    })
}
