//! The report as GitHub-flavoured Markdown, short enough for a pull request: the verdict, the ladder, the findings; the rest
//! folded.

use super::baseline::{self, Comparison};
use super::entry;
use super::model::{CandidateReport, Finding, Report, TensorReport, Verdict};
use super::summary::{self, Rung};
use super::text::{clean, percent, scientific, value};

/// The Markdown that shows `reports`, one after the other; `not_judged` are the dumps that only a baseline has.
pub fn render(reports: &[Report], not_judged: &[&str]) -> String {
    let mut out = String::new();
    let several = reports.len() > 1 || !not_judged.is_empty();
    if several {
        overview(&mut out, reports, not_judged);
    }
    for report in reports {
        if several {
            let summary = format!("{} <code>{}</code>", mark(report.verdict), html(&report.dump.path));
            out += &format!("\n<details><summary>{summary}</summary>\n\n");
        }
        page(&mut out, report);
        if several {
            out += "\n</details>\n";
        }
    }
    out
}

fn overview(out: &mut String, reports: &[Report], not_judged: &[&str]) {
    *out += &format!("### {}\n\n| | dump | causes |\n|---|---|---|\n", summary::how_many(reports));
    for report in reports {
        let causes = text(&summary::causes(report));
        *out += &format!("| {} | {} | {causes} |\n", mark(report.verdict), code(&report.dump.path));
    }
    for path in not_judged {
        *out += &format!("| | {} | not judged any more |\n", code(path));
    }
}

fn page(out: &mut String, report: &Report) {
    *out += &format!("### {} {}\n\n", mark(report.verdict), text(&summary::headline(report)));
    *out += &format!("{} · {}\n", code(&report.dump.path), text(&summary::contents(report)));
    for folder in &report.dump.interrupted {
        *out += &format!("\nInterrupted capture, skipped: {}\n", code(folder));
    }
    for warning in &report.warnings {
        *out += &format!("\n> Warning: {}\n", text(warning));
    }
    if let Some(comparison) = &report.baseline {
        self::comparison(out, comparison);
    }
    for candidate in &report.candidates {
        section(out, report, candidate);
    }
}

fn comparison(out: &mut String, comparison: &Comparison) {
    *out += &format!("\n**Baseline** {}\n", text(&baseline::sentence(comparison)));
    let (lines, more) = baseline::lines(comparison);
    if !lines.is_empty() {
        out.push('\n');
    }
    for (change, line) in lines {
        *out += &format!("- {}: {}\n", baseline::word(change), text(&line));
    }
    if more > 0 {
        *out += &format!("- and {more} more\n");
    }
}

fn section(out: &mut String, report: &Report, candidate: &CandidateReport) {
    let rungs = summary::ladder(candidate);
    let title = text(&summary::title(report, candidate));
    if candidate.verdict == Verdict::Agree {
        *out += &format!(
            "\n<details><summary>{} {}</summary>\n\n",
            mark(candidate.verdict),
            html(&summary::title(report, candidate))
        );
        ladder(out, candidate, &rungs);
        *out += &format!("\n{}\n\n{}\n\n</details>\n", text(&summary::computed(candidate)), text(&summary::tokens(candidate)));
        return;
    }
    *out += &format!("\n#### {} {title}\n\n", mark(candidate.verdict));
    ladder(out, candidate, &rungs);
    let entry = entry::lines(candidate);
    if !entry.is_empty() {
        out.push('\n');
    }
    for (label, words) in &entry {
        *out += &format!("- {label}: {}\n", text(words));
    }
    for finding in &candidate.findings {
        self::finding(out, finding);
    }
    *out += "\n<details><summary>Where it lies, and how to reproduce it</summary>\n";
    if let Some(observation) = summary::observation(candidate, &rungs) {
        *out += &format!("\n{}\n", text(&observation));
    }
    worst_elements(out, &rungs);
    *out += &format!("\n{}\n\n{}\n", text(&summary::computed(candidate)), text(&summary::tokens(candidate)));
    *out += &format!("\n{}\n\n</details>\n", block(&summary::command(report, candidate)));
}

fn ladder(out: &mut String, candidate: &CandidateReport, rungs: &[Rung]) {
    *out += "| | stage | rel. L2 | floor | ratio | diverges in |\n|---|---|--:|--:|--:|---|\n";
    for rung in rungs {
        let cell = rung.worst();
        let t: &TensorReport = cell.tensor;
        let optional = |x: Option<f64>| x.map_or("–".to_owned(), scientific);
        let of = match (cell.microbatch, rung.diverging()) {
            (_, 0) => String::new(),
            (None, _) => "the step".to_owned(),
            (Some(m), _) if rung.cells.len() == 1 => format!("microbatch {m}"),
            (Some(m), n) => format!("{n} of {} microbatches, most in {m}", rung.cells.len()),
        };
        let ratio = summary::ratio_cell(t);
        let ratio = if rung.verdict() == Verdict::Diverge && !rung.consequence { format!("**{ratio}**") } else { ratio };
        let (mark, stage) = (mark(rung.verdict()), code(&rung.stage));
        *out += &format!("| {mark} | {stage} | {} | {} | {ratio} | {of} |\n", optional(t.rel_l2), optional(t.noise_floor));
    }
    if let Some(norm) = summary::grad_norm(candidate) {
        let (mark, words) = (mark(norm.verdict), summary::norm_distance(&norm));
        *out += &format!("| {mark} | {} | | | | {words} |\n", code(summary::GRAD_NORM));
    }
}

fn finding(out: &mut String, finding: &Finding) {
    let sure = match finding.cause.as_str() {
        "unknown" => String::new(),
        _ if finding.explained.is_finite() => {
            format!(" ({}, explains {})", summary::confidence(finding.confidence), percent(finding.explained))
        }
        _ => format!(" ({})", summary::confidence(finding.confidence)),
    };
    *out += &format!("\n**{}. {}**: {}{sure}\n\n", finding.rank, text(&finding.title), code(&finding.cause));
    let (open, folded): (Vec<_>, Vec<_>) = summary::details(finding)
        .into_iter()
        .partition(|(label, _)| ["parameters", "remedy", "or equally", "tell apart"].contains(label));
    for (label, words) in open {
        *out += &format!("- {label}: {}\n", text(&words));
    }
    *out += "\n<details><summary>Evidence</summary>\n\n";
    for (label, words) in folded {
        *out += &format!("- {label}: {}\n", text(&words));
    }
    *out += "\n</details>\n";
}

fn worst_elements(out: &mut String, rungs: &[Rung]) {
    let heading = "\n| stage | microbatch | worst element | candidate | reference |\n|---|---|---|--:|--:|\n";
    let mut lines = String::new();
    for rung in rungs.iter().filter(|rung| rung.verdict() == Verdict::Diverge) {
        let cell = rung.worst();
        let Some(worst) = &cell.tensor.worst else { continue };
        let at = cell.microbatch.map_or("step".to_owned(), |m| m.to_string());
        let (place, found, expected) = (text(&worst.place), value(worst.candidate), value(worst.reference));
        lines += &format!("| {} | {at} | {place} | {found} | {expected} |\n", code(&rung.stage));
    }
    if !lines.is_empty() {
        *out += &format!("{heading}{lines}");
    }
}

fn mark(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Agree => "✅",
        Verdict::Diverge => "❌",
    }
}

/// Words as they are: no mark-up, no tag, no mention, no line of their own; in a table too.
fn text(words: &str) -> String {
    let words: Vec<char> = clean(words).chars().collect();
    let within_word = |i: usize| i > 0 && words[i - 1].is_alphanumeric() && words.get(i + 1).is_some_and(|c| c.is_alphanumeric());
    let mut out = String::with_capacity(words.len());
    for (i, &c) in words.iter().enumerate() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' if i == 0 => out += "&gt;",
            '@' | '#' => out.extend([c, '\u{2060}']),
            '_' if within_word(i) => out.push(c),
            '\\' | '`' | '*' | '_' | '[' | ']' | '|' | '~' | '$' => out.extend(['\\', c]),
            c => out.push(c),
        }
    }
    out
}

/// Within a tag.
fn html(words: &str) -> String {
    let escaped = clean(words).replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    escaped.replace('@', "@\u{2060}")
}

/// Words as code, in a table too.
fn code(words: &str) -> String {
    format!("`{}`", clean(words).replace('`', "'").replace('|', "\\|"))
}

/// A line of code by itself.
fn block(line: &str) -> String {
    let longest = line.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat(longest.max(2) + 1);
    format!("{fence}sh\n{}\n{fence}", clean(line))
}
