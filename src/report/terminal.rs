//! The report for people, on a terminal.

use super::baseline::{self, Comparison};
use super::entry;
use super::model::{CandidateReport, Finding, Report, TensorReport, Verdict};
use super::summary::{self, Rung};
use super::text::{Paint, clean, columns, pad, scientific, value, wrap};

/// How a report is set.
#[derive(Clone, Copy, Debug)]
pub struct Style {
    /// With ANSI attributes.
    pub colour: bool,
    /// Columns of a line.
    pub width: usize,
}

impl Style {
    pub(crate) fn mark(self, verdict: Verdict) -> String {
        match verdict {
            Verdict::Agree => Paint::Green.on("✓", self.colour),
            Verdict::Diverge => Paint::Red.on("✗", self.colour),
        }
    }

    /// `label` in a column of its own, `text` wrapped beside it.
    pub(crate) fn entry(self, out: &mut String, label: &str, text: &str) {
        const LABEL: usize = 14;
        for (i, line) in wrap(text, self.width.saturating_sub(LABEL).max(20)).iter().enumerate() {
            let label = pad(if i == 0 { label } else { "" }, LABEL, false);
            *out += &format!("{}{line}\n", Paint::Dim.on(&label, self.colour));
        }
    }
}

/// The verdict in one sentence, marked and coloured; it runs on over indented lines where it is longer than the width.
pub fn verdict(report: &Report, style: Style) -> String {
    let (mark, paint) = match report.verdict {
        Verdict::Agree => ("✓", Paint::Green),
        Verdict::Diverge => ("✗", Paint::Red),
    };
    let mut out = String::new();
    for (i, line) in wrap(&summary::headline(report), style.width.saturating_sub(2).max(20)).iter().enumerate() {
        let line = format!("{} {line}", if i == 0 { mark } else { " " });
        out += &paint.on(&line, style.colour);
        out.push('\n');
    }
    out
}

/// The whole report. The first line is the verdict.
pub fn render(report: &Report, style: Style) -> String {
    let mut out = verdict(report, style);
    out.push('\n');
    let dump = &report.dump;
    style.entry(&mut out, "dump", &format!("{}: {}", dump.path, summary::contents(report)));
    for folder in &dump.interrupted {
        style.entry(&mut out, "interrupted", &format!("{folder}: no manifest, a capture that was cut off; skipped"));
    }
    for warning in &report.warnings {
        style.entry(&mut out, "warning", warning);
    }
    if let Some(comparison) = &report.baseline {
        baseline(&mut out, comparison, style);
    }
    for candidate in &report.candidates {
        out.push('\n');
        section(&mut out, report, candidate, style);
    }
    out
}

fn baseline(out: &mut String, comparison: &Comparison, style: Style) {
    style.entry(out, "baseline", &baseline::sentence(comparison));
    let (lines, more) = baseline::lines(comparison);
    for (change, line) in lines {
        style.entry(out, &format!("  {}", baseline::word(change)), &line);
    }
    if more > 0 {
        style.entry(out, "", &format!("and {more} more"));
    }
}

fn section(out: &mut String, report: &Report, candidate: &CandidateReport, style: Style) {
    let title = clean(&summary::title(report, candidate)).into_owned();
    let rule = "─".repeat(style.width.saturating_sub(columns(&title) + 4));
    *out += &format!(
        "{} {} {}\n",
        style.mark(candidate.verdict),
        Paint::Bold.on(&title, style.colour),
        Paint::Dim.on(&rule, style.colour)
    );
    style.entry(out, "computed", &summary::computed(candidate));
    style.entry(out, "tokens", &summary::tokens(candidate));
    out.push('\n');
    let rungs = summary::ladder(candidate);
    ladder(out, candidate, &rungs, style);
    if let Some(observation) = summary::observation(candidate, &rungs) {
        out.push('\n');
        style.entry(out, "observed", &observation);
    }
    let mut last = "";
    for (label, text) in entry::lines(candidate) {
        style.entry(out, if label == last { "" } else { label }, &text);
        last = label;
    }
    worst_elements(out, &rungs, style);
    for finding in &candidate.findings {
        out.push('\n');
        self::finding(out, finding, style);
    }
    if candidate.verdict == Verdict::Diverge {
        out.push('\n');
        style.entry(out, "again", &summary::command(report, candidate));
    }
}

/// Microbatches up to which each has a column of its own.
const OWN_COLUMN: usize = 4;
/// Columns of the bar that stand for a factor of ten.
const DECADE: usize = 5;

fn ladder(out: &mut String, candidate: &CandidateReport, rungs: &[Rung], style: Style) {
    let name = rungs.iter().map(|rung| columns(&rung.stage)).max().unwrap_or(0).max(columns(summary::GRAD_NORM));
    let microbatches: Vec<usize> = candidate.microbatches.iter().map(|m| m.microbatch).collect();
    let fixed = 4 + name + 3 * 9;
    let own = (2..=OWN_COLUMN).contains(&microbatches.len()) && fixed + 8 * microbatches.len() <= style.width;
    let many = microbatches.len() > 1 && !own;
    let taken = fixed + if own { 8 * microbatches.len() } else { 14 * usize::from(many) };
    let decades = style.width.saturating_sub(taken + 3) / DECADE;
    let decades = if decades < 2 { 0 } else { decades.min(summary::AXIS.len()) };

    let mut heading = format!("    {}{:>9}{:>9}{:>9}", pad("stage", name, false), "rel. L2", "floor", "ratio");
    if own {
        microbatches.iter().for_each(|m| heading += &format!("{:>8}", format!("mb {m}")));
    } else if many {
        heading += &format!("{:>7}{:>7}", "at mb", "bad");
    }
    if decades > 0 {
        heading += "   ";
        summary::AXIS[..decades].iter().for_each(|factor| heading += &pad(&format!("│{factor}"), DECADE, false));
    }
    *out += &format!("{}\n", Paint::Dim.on(heading.trim_end(), style.colour));

    for rung in rungs {
        let worst = rung.worst();
        let t = worst.tensor;
        let optional = |x: Option<f64>| x.map_or("–".to_owned(), scientific);
        let mut line = format!(
            "{}{:>9}{:>9}{:>9}",
            pad(&clean(&rung.stage), name, false),
            optional(t.rel_l2),
            optional(t.noise_floor),
            summary::ratio_cell(t)
        );
        if own {
            for m in &microbatches {
                let cell = rung.cells.iter().find(|cell| cell.microbatch == Some(*m));
                line += &format!("{:>8}", cell.map_or(String::new(), |cell| summary::ratio_cell(cell.tensor)));
            }
        } else if many {
            let worst = worst.microbatch.map_or(String::new(), |m| m.to_string());
            line += &format!("{worst:>7}{:>7}", format!("{}/{}", rung.diverging(), rung.cells.len()));
        }
        if decades > 0 {
            line += &format!("   {}", bar(t, decades));
        }
        let line = line.trim_end();
        let painted = match (rung.verdict(), rung.consequence) {
            (Verdict::Agree, _) => line.to_owned(),
            (Verdict::Diverge, false) => Paint::Red.on(line, style.colour),
            (Verdict::Diverge, true) => Paint::Dim.on(line, style.colour),
        };
        *out += &format!("  {} {painted}\n", style.mark(rung.verdict()));
    }
    if let Some(norm) = summary::grad_norm(candidate) {
        let line = format!("{}  {}", pad(summary::GRAD_NORM, name, false), summary::norm_distance(&norm));
        *out += &format!("  {} {line}\n", style.mark(norm.verdict));
    }
}

/// Decades above the floor, in eighths of a column; `▸` where it goes on, `!` for what is not finite.
fn bar(tensor: &TensorReport, decades: usize) -> String {
    if tensor.nonfinite > 0 {
        return format!("! {} not finite", tensor.nonfinite);
    }
    if tensor.ratio.is_nan() {
        return String::new();
    }
    let room = decades * DECADE;
    let length = (tensor.ratio.log10() * DECADE as f64).max(0.0);
    if length > room as f64 {
        return "█".repeat(room - 1) + "▸";
    }
    let eighths = (length * 8.0).round() as usize;
    let part = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"][eighths % 8];
    "█".repeat(eighths / 8) + if eighths == 0 { "▏" } else { part }
}

fn worst_elements(out: &mut String, rungs: &[Rung], style: Style) {
    let mut label = "worst";
    for rung in rungs.iter().filter(|rung| rung.verdict() == Verdict::Diverge) {
        let cell = rung.worst();
        let Some(worst) = &cell.tensor.worst else { continue };
        let at = cell.microbatch.map_or(String::new(), |m| format!(", microbatch {m}"));
        let (found, expected) = (value(worst.candidate), value(worst.reference));
        style.entry(out, label, &format!("{}{at}, {}: {found}, reference {expected}", rung.stage, worst.place));
        label = "";
    }
}

fn finding(out: &mut String, finding: &Finding, style: Style) {
    let name = match finding.cause.as_str() {
        "unknown" => "cause unknown".to_owned(),
        cause => format!("{} · {}", clean(cause), summary::confidence(finding.confidence)),
    };
    *out += &format!("  {}\n", Paint::Bold.on(&format!("{}. {name}", finding.rank), style.colour));
    style.entry(out, "  what", &finding.title);
    for (label, text) in summary::details(finding) {
        style.entry(out, &format!("  {label}"), &text);
    }
}

/// One line per dump, for a folder of them: mark, path, and what was found; then those that only a baseline has.
pub fn overview(reports: &[Report], not_judged: &[&str], style: Style) -> String {
    let paths: Vec<_> = reports.iter().map(|report| clean(&report.dump.path).into_owned()).collect();
    let width = paths.iter().map(|path| columns(path)).max().unwrap_or(0);
    let mut out = format!("{}\n", summary::how_many(reports));
    for (report, path) in reports.iter().zip(&paths) {
        let line = format!("  {} {}  {}", style.mark(report.verdict), pad(path, width, false), clean(&summary::causes(report)));
        out += line.trim_end();
        out.push('\n');
    }
    for path in not_judged {
        out += &format!("    {}  not judged any more\n", clean(path));
    }
    out
}
