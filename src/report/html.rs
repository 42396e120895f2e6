//! The report as one self-contained HTML file: no script, nothing fetched, light and dark by the reader's preference.

use super::model::{CandidateReport, Finding, Report, TensorReport, Verdict};
use super::summary::{self, Rung};
use super::text::{scientific, value};
use std::fmt::Write;

const HEAD: &str = r#"<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>xent-diff report</title>
<style>
:root { color-scheme: light dark; --paper: #fbfaf8; --card: #fff; --ink: #1d2129; --soft: #69707d; --line: #e4e2dd; --bad: #c2331f; --good: #2c7a4b; --wash: #fbeeeb; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15171b; --card: #1d2026; --ink: #e6e7ea; --soft: #979ca8; --line: #2f333b; --bad: #ff7b66; --good: #6cc793; --wash: #33211f; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; line-height: 1.4; font-weight: 600; margin: 0 0 .75rem; border-left: .3rem solid; padding-left: .9rem; }
section + h1, ul + h1 { margin-top: 3rem; } ul { list-style: none; padding: 0; } a { color: inherit; }
h2 { font-size: 1.1rem; margin: 0; } h3 { font-size: 1rem; margin: 0 0 .4rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: 1.1rem 1.3rem; margin: 1.2rem 0; }
article { border-top: 1px solid var(--line); margin-top: 1.1rem; padding-top: 1rem; }
.agree { color: var(--good); } .diverge { color: var(--bad); } .soft { color: var(--soft); }
.scroll { overflow-x: auto; } p { margin: .3rem 0; }
table { border-collapse: collapse; width: 100%; margin: .9rem 0 .3rem; font-variant-numeric: tabular-nums; }
th { font-weight: 500; color: var(--soft); font-size: .85rem; } th, td { text-align: left; padding: .22rem .7rem .22rem 0; white-space: nowrap; }
tbody tr { border-top: 1px solid var(--line); } .number { text-align: right; } tr.first { background: var(--wash); } tr.after { opacity: .55; }
code, .stage { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .9em; }
pre { background: var(--paper); border: 1px solid var(--line); border-radius: .35rem; padding: .6rem .8rem; overflow-x: auto; margin: .4rem 0 0; }
dl { display: grid; grid-template-columns: 7rem 1fr; gap: .2rem .8rem; margin: 0; } dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.tag { display: inline-block; border: 1px solid; border-radius: 1rem; padding: 0 .6rem; font-size: .82rem; font-weight: 500; }
svg { display: block; } svg .bar { fill: var(--bad); } svg .floor { fill: var(--good); } svg line { stroke: var(--line); } svg text { fill: var(--soft); font-size: 10px; }
</style>
</head>
<body>
"#;

/// Width of the bars, and of a factor of ten in them, in px.
const WIDTH: f64 = 320.0;
const DECADE: f64 = 40.0;

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            c if c.is_control() && c != '\n' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

fn class(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Agree => "agree",
        Verdict::Diverge => "diverge",
    }
}

fn mark(verdict: Verdict) -> String {
    let sign = if verdict == Verdict::Agree { "✓" } else { "✗" };
    format!("<span class=\"{}\">{sign}</span>", class(verdict))
}

/// The page that shows `reports`, one after the other.
pub fn render(reports: &[Report]) -> String {
    let mut out = HEAD.to_owned();
    if reports.len() > 1 {
        overview(&mut out, reports).expect("writing to a string does not fail");
    }
    for (place, report) in reports.iter().enumerate() {
        page(&mut out, report, place).expect("writing to a string does not fail");
    }
    out + "</body>\n</html>\n"
}

/// Which of several dumps diverge, with links to each.
fn overview(out: &mut String, reports: &[Report]) -> std::fmt::Result {
    let worst = reports.iter().map(|report| report.verdict).max().unwrap_or(Verdict::Agree);
    writeln!(out, "<h1 class=\"{}\">{}</h1>\n<ul>", class(worst), summary::how_many(reports))?;
    for (place, report) in reports.iter().enumerate() {
        let (mark, path, causes) = (mark(report.verdict), escape(&report.dump.path), escape(&summary::causes(report)));
        writeln!(out, "<li>{mark} <a href=\"#dump-{place}\"><code>{path}</code></a> <span class=\"soft\">{causes}</span></li>")?;
    }
    writeln!(out, "</ul>")
}

fn page(out: &mut String, report: &Report, place: usize) -> std::fmt::Result {
    let dump = &report.dump;
    let unbroken = summary::headline(report).replace("e-", "e-\u{2060}");
    writeln!(out, "<h1 id=\"dump-{place}\" class=\"{}\">{}</h1>", class(report.verdict), escape(&unbroken))?;
    writeln!(out, "<p class=\"soft\"><code>{}</code> · {}</p>", escape(&dump.path), escape(&summary::contents(report)))?;
    for folder in &dump.interrupted {
        writeln!(out, "<p class=\"soft\">Interrupted capture, skipped: <code>{}</code></p>", escape(folder))?;
    }
    for warning in &report.warnings {
        writeln!(out, "<p class=\"soft\">Warning: {}</p>", escape(warning))?;
    }
    for candidate in &report.candidates {
        section(out, report, candidate)?;
    }
    Ok(())
}

fn section(out: &mut String, report: &Report, candidate: &CandidateReport) -> std::fmt::Result {
    let rungs = summary::ladder(candidate);
    writeln!(out, "<section>\n<h2>{} {}</h2>", mark(candidate.verdict), escape(&summary::title(report, candidate)))?;
    writeln!(out, "<p class=\"soft\">{}<br>{}</p>", escape(&summary::computed(candidate)), escape(&summary::tokens(candidate)))?;
    ladder(out, candidate, &rungs)?;
    if candidate.verdict == Verdict::Diverge {
        if let Some(observation) = summary::observation(candidate, &rungs) {
            writeln!(out, "<p>{}</p>", escape(&observation))?;
        }
        for finding in &candidate.findings {
            article(out, finding)?;
        }
        worst_elements(out, &rungs)?;
        let command = escape(&summary::command(report, candidate));
        writeln!(out, "<article><h3>To reproduce</h3><pre><code>{command}</code></pre></article>")?;
    }
    writeln!(out, "</section>")
}

fn ladder(out: &mut String, candidate: &CandidateReport, rungs: &[Rung]) -> std::fmt::Result {
    let several = candidate.microbatches.len() > 1;
    let microbatch = if several { "<th class=\"number\">worst (✗ of)</th>" } else { "" };
    let axis: String = summary::AXIS
        .iter()
        .enumerate()
        .map(|(d, label)| format!("<text x=\"{}\" y=\"11\">{label}</text>", d as f64 * DECADE + 1.0))
        .collect();
    writeln!(
        out,
        "<div class=\"scroll\"><table><thead><tr><th></th><th>stage</th><th class=\"number\">rel. L2</th><th class=\"number\">floor</th>\
         <th class=\"number\">ratio</th>{microbatch}<th><svg width=\"{WIDTH}\" height=\"14\">{axis}</svg></th></tr></thead><tbody>"
    )?;
    for rung in rungs {
        let cell = rung.worst();
        let t = cell.tensor;
        let optional = |x: Option<f64>| x.map_or("–".to_owned(), scientific);
        let row = match (rung.verdict(), rung.consequence) {
            (Verdict::Agree, _) => "",
            (Verdict::Diverge, false) => " class=\"first\"",
            (Verdict::Diverge, true) => " class=\"after\"",
        };
        let at = cell.microbatch.map_or("step".to_owned(), |m| format!("mb {m} ({} of {})", rung.diverging(), rung.cells.len()));
        let at = if several { format!("<td class=\"number\">{at}</td>") } else { String::new() };
        writeln!(
            out,
            "<tr{row}><td>{}</td><td class=\"stage\">{}</td><td class=\"number\">{}</td><td class=\"number\">{}</td><td class=\"number\">{}</td>{at}<td>{}</td></tr>",
            mark(rung.verdict()),
            escape(&rung.stage),
            optional(t.rel_l2),
            optional(t.noise_floor),
            summary::ratio_cell(t),
            bar(t)
        )?;
    }
    if let Some(norm) = summary::grad_norm(candidate) {
        let (mark, words) = (mark(norm.verdict), summary::norm_distance(&norm));
        let span = if several { 5 } else { 4 };
        writeln!(
            out,
            "<tr><td>{mark}</td><td class=\"stage\">{}</td><td colspan=\"{span}\">{words}</td></tr>",
            summary::GRAD_NORM
        )?;
    }
    writeln!(out, "</tbody></table></div>")
}

/// Decades above the floor.
fn bar(tensor: &TensorReport) -> String {
    if tensor.nonfinite > 0 {
        return format!(
            "<svg width=\"{WIDTH}\" height=\"14\"><text x=\"1\" y=\"11\">{} not finite</text></svg>",
            tensor.nonfinite
        );
    }
    let mut grid = String::new();
    for decade in 0..8 {
        let x = f64::from(decade) * DECADE + 0.5;
        grid += &format!("<line x1=\"{x}\" x2=\"{x}\" y1=\"0\" y2=\"14\"/>");
    }
    let length = (tensor.ratio.log10() * DECADE).clamp(2.0, WIDTH);
    let length = if length.is_nan() { WIDTH } else { length };
    let kind = if tensor.verdict == Verdict::Agree { "floor" } else { "bar" };
    format!(
        "<svg width=\"{WIDTH}\" height=\"14\">{grid}<rect class=\"{kind}\" x=\"0\" y=\"3\" width=\"{length:.1}\" height=\"8\" rx=\"1.5\"/></svg>"
    )
}

fn article(out: &mut String, finding: &Finding) -> std::fmt::Result {
    let tag = summary::confidence(finding.confidence);
    let title = escape(&finding.title);
    writeln!(out, "<article><h3>{}. {title} <span class=\"tag\">{tag}</span></h3><dl>", finding.rank)?;
    writeln!(out, "<dt>cause</dt><dd><code>{}</code></dd>", escape(&finding.cause))?;
    for (label, text) in summary::details(finding) {
        writeln!(out, "<dt>{label}</dt><dd>{}</dd>", escape(&text))?;
    }
    writeln!(out, "</dl></article>")
}

fn worst_elements(out: &mut String, rungs: &[Rung]) -> std::fmt::Result {
    writeln!(
        out,
        "<article><h3>Worst elements</h3><div class=\"scroll\"><table><thead><tr><th>stage</th><th>microbatch</th><th>place</th>\
         <th class=\"number\">candidate</th><th class=\"number\">reference</th></tr></thead><tbody>"
    )?;
    for rung in rungs.iter().filter(|rung| rung.verdict() == Verdict::Diverge) {
        let cell = rung.worst();
        let Some(worst) = &cell.tensor.worst else { continue };
        let at = cell.microbatch.map_or("step".to_owned(), |m| m.to_string());
        writeln!(
            out,
            "<tr><td class=\"stage\">{}</td><td>{at}</td><td>{}</td><td class=\"number\">{}</td><td class=\"number\">{}</td></tr>",
            escape(&rung.stage),
            escape(&worst.place),
            value(worst.candidate),
            value(worst.reference)
        )?;
    }
    writeln!(out, "</tbody></table></div></article>")
}
