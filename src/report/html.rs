//! The report as one self-contained HTML file: no script, nothing fetched, light and dark by the reader's preference.

use super::baseline::{self, Change, Comparison};
use super::entry;
use super::figures::{self, Tile};
use super::model::{CandidateReport, Finding, Report, TensorReport, Verdict, Worst};
use super::summary::{self, Cell, Rung};
use super::text::{list, percent, scientific, times, value};
use std::fmt::Write;

const HEAD: &str = concat!(
    "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n",
    "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>xent-diff report</title>\n<style>\n",
    include_str!("page.css"),
    "</style>\n</head>\n<body>\n"
);

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

/// The page that shows `reports`, one after the other; `not_judged` are the dumps that only a baseline has.
pub fn render(reports: &[Report], not_judged: &[&str]) -> String {
    let mut out = HEAD.to_owned();
    if reports.len() > 1 || !not_judged.is_empty() {
        overview(&mut out, reports, not_judged).expect("writing to a string does not fail");
    }
    for (place, report) in reports.iter().enumerate() {
        page(&mut out, report, place).expect("writing to a string does not fail");
    }
    out + "</body>\n</html>\n"
}

/// Which of several dumps diverge, with links to each.
fn overview(out: &mut String, reports: &[Report], not_judged: &[&str]) -> std::fmt::Result {
    let worst = reports.iter().map(|report| report.verdict).max().unwrap_or(Verdict::Agree);
    writeln!(out, "<h1 class=\"{}\">{}</h1>\n<ul>", class(worst), summary::how_many(reports))?;
    for (place, report) in reports.iter().enumerate() {
        let (mark, path, causes) = (mark(report.verdict), escape(&report.dump.path), escape(&summary::causes(report)));
        writeln!(out, "<li>{mark} <a href=\"#dump-{place}\"><code>{path}</code></a> <span class=\"soft\">{causes}</span></li>")?;
    }
    for path in not_judged {
        writeln!(out, "<li class=\"soft\"><code>{}</code> not judged any more</li>", escape(path))?;
    }
    writeln!(out, "</ul>")
}

fn page(out: &mut String, report: &Report, place: usize) -> std::fmt::Result {
    let dump = &report.dump;
    let unbroken = summary::headline(report).replace("e-", "e-\u{2060}");
    let word = match report.verdict {
        Verdict::Agree => "✓ agrees",
        Verdict::Diverge => "✗ diverges",
    };
    let (class, headline) = (class(report.verdict), escape(&unbroken));
    writeln!(out, "<h1 id=\"dump-{place}\" class=\"{class}\"><small>{word}</small> <span>{headline}</span></h1>")?;
    writeln!(out, "<p class=\"soft\"><code>{}</code> · {}</p>", escape(&dump.path), escape(&summary::contents(report)))?;
    for folder in &dump.interrupted {
        writeln!(out, "<p class=\"soft\">Interrupted capture, skipped: <code>{}</code></p>", escape(folder))?;
    }
    for warning in &report.warnings {
        writeln!(out, "<p class=\"soft\">Warning: {}</p>", escape(warning))?;
    }
    if let Some(comparison) = &report.baseline {
        baseline(out, comparison)?;
    }
    for candidate in &report.candidates {
        section(out, report, candidate)?;
    }
    Ok(())
}

fn baseline(out: &mut String, comparison: &Comparison) -> std::fmt::Result {
    writeln!(out, "<section>\n<h2>Baseline</h2>\n<p>{}</p>\n<ul>", escape(&baseline::sentence(comparison)))?;
    let (lines, more) = baseline::lines(comparison);
    for (change, line) in lines {
        let class = if change == Change::Worse { "diverge" } else { "agree" };
        writeln!(out, "<li><span class=\"{class}\">{}</span> {}</li>", baseline::word(change), escape(&line))?;
    }
    if more > 0 {
        writeln!(out, "<li class=\"soft\">and {more} more</li>")?;
    }
    writeln!(out, "</ul>\n</section>")
}

fn section(out: &mut String, report: &Report, candidate: &CandidateReport) -> std::fmt::Result {
    let rungs = summary::ladder(candidate);
    writeln!(out, "<section>\n<h2>{} {}</h2>", mark(candidate.verdict), escape(&summary::title(report, candidate)))?;
    writeln!(out, "<p class=\"soft\">{}<br>{}</p>", escape(&summary::computed(candidate)), escape(&summary::tokens(candidate)))?;
    ladder(out, candidate, &rungs)?;
    let figures = figures(candidate, &rungs);
    if candidate.verdict == Verdict::Agree {
        if !figures.is_empty() {
            writeln!(out, "<details><summary>How close: figures</summary><div class=\"figures\">\n{figures}</div></details>")?;
        }
        return writeln!(out, "</section>");
    }
    if let Some(observation) = summary::observation(candidate, &rungs) {
        writeln!(out, "<p>{}</p>", escape(&observation))?;
    }
    entry(out, candidate)?;
    for finding in &candidate.findings {
        article(out, finding)?;
    }
    if !figures.is_empty() {
        writeln!(out, "<article><h3>Where it lies</h3><div class=\"figures\">\n{figures}</div></article>")?;
    }
    worst_elements(out, candidate, &rungs)?;
    let command = escape(&summary::command(report, candidate));
    writeln!(out, "<article><h3>To reproduce</h3><pre><code>{command}</code></pre></article>\n</section>")
}

/// What is drawn of a candidate: the stages that tell most, where in the logits it comes from, processes and microbatches.
fn figures(candidate: &CandidateReport, rungs: &[Rung]) -> String {
    let mut out = String::new();
    let first = candidate.first_divergence.as_ref().map(|first| first.stage.as_str());
    let dk = ["d_unembedding", "accumulated_d_unembedding"].into_iter().find(|dk| rungs.iter().any(|rung| rung.stage == *dk));
    let mut stages: Vec<&str> = Vec::new();
    for stage in [first, Some("d_hidden"), dk].into_iter().flatten() {
        if !stages.contains(&stage) {
            stages.push(stage);
        }
    }
    let drawn: Vec<(String, Cell)> = stages
        .iter()
        .filter_map(|stage| rungs.iter().find(|rung| rung.stage == *stage))
        .map(|rung| (rung, rung.worst()))
        .map(|(rung, cell)| (escape(&format!("{}{}.", rung.stage, at(&cell, " of microbatch "))), cell))
        .collect();
    for (what, Cell { tensor, .. }) in &drawn {
        let Some(plots) = &tensor.plots else { continue };
        let rows = if plots.hits.is_empty() { "token" } else { "vocab id" };
        out += &figures::profile(&plots.profile, tensor.ratio_limit, tensor.verdict == Verdict::Diverge, what, rows);
    }
    if let Some(crossing) = &candidate.crossing {
        for map in &crossing.maps {
            out += &figures::crossing(crossing, map, &format!("{} by tiles of the logits.", map.stage));
        }
        if !crossing.maps.is_empty() {
            out += &figures::legend();
        }
    }
    for (what, Cell { tensor, .. }) in &drawn {
        let Some(plots) = &tensor.plots else { continue };
        if tensor.shape[1] > 1 {
            out += &figures::magnitude(&plots.magnitude, what);
        }
        if !plots.hits.is_empty() {
            out += &figures::hits(&plots.hits, tensor.verdict == Verdict::Diverge, what);
        }
    }
    out + &grids(candidate, rungs)
}

/// Stages by microbatches where there are several, and processes by microbatches.
fn grids(candidate: &CandidateReport, rungs: &[Rung]) -> String {
    let presence = &candidate.presence;
    let judged: Vec<usize> = candidate.microbatches.iter().map(|m| m.microbatch).collect();
    let mut microbatches: Vec<usize> = (0..presence.microbatches).chain(judged.iter().copied()).collect();
    microbatches.sort_unstable();
    microbatches.dedup();
    let mut out = String::new();
    if judged.len() > 1 {
        let line = |rung: &Rung| {
            let cell = |m: &usize| {
                rung.cells.iter().find(|cell| cell.microbatch == Some(*m)).map(|cell| Tile::Ratio(ratio(cell.tensor)))
            };
            (escape(&rung.stage), judged.iter().map(|m| cell(m).unwrap_or(Tile::Nothing)).collect())
        };
        let lines: Vec<_> =
            rungs.iter().filter(|rung| rung.cells.iter().any(|cell| cell.microbatch.is_some())).map(line).collect();
        out += &figures::grid("Stages by microbatches:", "error over the floor.", &lines, &judged);
    }
    if presence.processes > 1 {
        let held = |process: usize, m: usize| {
            let tensors = candidate.microbatches.iter().filter(|own| own.microbatch == m).flat_map(|own| &own.tensors);
            let cells = tensors.filter_map(|t| t.plots.as_ref()).flat_map(|plots| &plots.processes);
            cells.filter(|cell| cell.process == process).map(|cell| cell.ratio).reduce(f64::max)
        };
        let tile = |process: usize, m: usize| match held(process, m) {
            _ if presence.absent.contains(&[process, m]) => Tile::Absent,
            Some(ratio) => Tile::Ratio(ratio),
            None => Tile::Nothing,
        };
        let line =
            |process: usize| (format!("process {process}"), microbatches.iter().map(|&m| tile(process, m)).collect::<Vec<_>>());
        let shown = presence.processes.min(MOST_PROCESSES);
        let lines: Vec<_> = (0..shown).map(line).collect();
        let rest =
            if shown < presence.processes { format!(" The first {shown} of {}.", presence.processes) } else { String::new() };
        let caption = format!(
            "the worst stage's error over the floor, in the rows that a process holds; ✗: not committed; empty: not judged.{rest}"
        );
        out += &figures::grid("Processes by microbatches:", &caption, &lines, &microbatches);
    }
    out
}

/// Processes that a page shows.
const MOST_PROCESSES: usize = 64;

fn ratio(tensor: &TensorReport) -> f64 {
    if tensor.nonfinite > 0 { f64::INFINITY } else { tensor.ratio }
}

/// `before` and the microbatch, or nothing for what accumulates.
fn at(cell: &Cell, before: &str) -> String {
    cell.microbatch.map_or(String::new(), |m| format!("{before}{m}"))
}

fn ladder(out: &mut String, candidate: &CandidateReport, rungs: &[Rung]) -> std::fmt::Result {
    let several = candidate.microbatches.len() > 1;
    let microbatch = if several { "<th class=\"number roomy\">worst (✗ of)</th>" } else { "" };
    writeln!(
        out,
        "<div class=\"scroll\"><table><thead><tr><th></th><th>stage</th><th class=\"number roomy\">rel. L2</th><th class=\"number roomy\">floor</th>\
         <th class=\"number\">ratio</th>{microbatch}<th>{}</th></tr></thead><tbody>",
        figures::bar_axis(&summary::AXIS)
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
        let at = if several { format!("<td class=\"number roomy\">{at}</td>") } else { String::new() };
        writeln!(
            out,
            "<tr{row}><td>{}</td><td class=\"stage\">{}</td><td class=\"number roomy\">{}</td><td class=\"number roomy\">{}</td><td class=\"number\">{}</td>{at}<td>{}</td></tr>",
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
        return format!("{} not finite", tensor.nonfinite);
    }
    figures::bar(tensor.ratio, tensor.ratio_limit, tensor.verdict == Verdict::Agree)
}

/// Where the error enters, in words and stage by stage.
fn entry(out: &mut String, candidate: &CandidateReport) -> std::fmt::Result {
    let Some(substitution) = &candidate.substitution else { return Ok(()) };
    writeln!(out, "<article><h3>Where it enters</h3><dl>")?;
    for (label, text) in entry::lines(candidate) {
        writeln!(out, "<dt>{label}</dt><dd>{}</dd>", escape(&text))?;
    }
    writeln!(
        out,
        "</dl>\n<details><summary>Stage by stage: each computed again from the candidate’s own stages before it</summary>\
         <div class=\"scroll\"><table><thead><tr><th>stage</th><th>microbatch</th><th class=\"number\">ratio</th>\
         <th>computed from</th><th class=\"number\">inherited</th><th class=\"number\">enters</th><th></th></tr></thead><tbody>"
    )?;
    for rung in &substitution.rungs {
        let inputs: Vec<String> =
            rung.inputs.iter().map(|input| format!("{}{}", if input.diverges { "✗ " } else { "✓ " }, input.stage)).collect();
        let at = rung.microbatch.map_or("step".to_owned(), |m| m.to_string());
        let from = if inputs.is_empty() { "–".to_owned() } else { escape(&list(&inputs)) };
        let (class, stage, ratio) = (if rung.enters { " class=\"first\"" } else { "" }, escape(&rung.stage), times(rung.ratio));
        let inherited = if rung.inputs.is_empty() { "–".to_owned() } else { percent(rung.inherited) };
        let bar = figures::bar(rung.entering_ratio, rung.entering_limit, !rung.enters);
        writeln!(
            out,
            "<tr{class}><td class=\"stage\">{stage}</td><td>{at}</td><td class=\"number\">{ratio}</td><td>{from}</td>\
             <td class=\"number\">{inherited}</td><td class=\"number\">{}</td><td>{bar}</td></tr>",
            times(rung.entering_ratio)
        )?;
    }
    writeln!(out, "</tbody></table></div></details></article>")
}

fn article(out: &mut String, finding: &Finding) -> std::fmt::Result {
    let tag = match finding.cause.as_str() {
        "unknown" => String::new(),
        _ => format!(" <span class=\"tag\">{}</span>", summary::confidence(finding.confidence)),
    };
    writeln!(out, "<article><h3>{}. {}{tag}</h3><dl>", finding.rank, escape(&finding.title))?;
    writeln!(out, "<dt>cause</dt><dd><code>{}</code></dd>", escape(&finding.cause))?;
    for (label, text) in summary::details(finding) {
        writeln!(out, "<dt>{label}</dt><dd>{}</dd>", escape(&text))?;
    }
    writeln!(out, "</dl></article>")
}

fn worst_elements(out: &mut String, candidate: &CandidateReport, rungs: &[Rung]) -> std::fmt::Result {
    writeln!(
        out,
        "<article><h3>Worst elements</h3><div class=\"scroll\"><table><thead><tr><th>stage</th><th>microbatch</th><th>place</th>\
         <th class=\"number\">candidate</th><th class=\"number\">reference</th><th class=\"number\">difference</th>\
         <th class=\"number\">factor</th></tr></thead><tbody>"
    )?;
    let first = candidate.first_divergence.as_ref().map(|first| first.stage.as_str());
    for rung in rungs.iter().filter(|rung| rung.verdict() == Verdict::Diverge) {
        let cell = rung.worst();
        let most = if first == Some(rung.stage.as_str()) { OF_THE_FIRST } else { OF_OTHERS };
        let several = cell.tensor.plots.as_ref().map(|plots| plots.worst.as_slice()).filter(|_| cell.tensor.nonfinite == 0);
        let of_tensor = cell.tensor.worst.as_slice();
        for worst in several.filter(|several| !several.is_empty()).unwrap_or(of_tensor).iter().take(most) {
            writeln!(out, "{}", element(&rung.stage, &cell, worst))?;
        }
    }
    writeln!(out, "</tbody></table></div></article>")
}

/// Elements listed of the first stage that diverges, and of those after it.
const OF_THE_FIRST: usize = 6;
const OF_OTHERS: usize = 3;

fn element(stage: &str, cell: &Cell, worst: &Worst) -> String {
    let (candidate, reference) = (worst.candidate, worst.reference);
    let factor = if reference == 0.0 { "–".to_owned() } else { value(candidate / reference) };
    format!(
        "<tr><td class=\"stage\">{}</td><td>{}</td><td>{}</td><td class=\"number\">{}</td><td class=\"number\">{}</td>\
         <td class=\"number\">{}</td><td class=\"number\">{factor}</td></tr>",
        escape(stage),
        cell.microbatch.map_or("step".to_owned(), |m| m.to_string()),
        escape(&worst.place),
        value(candidate),
        value(reference),
        scientific(candidate - reference),
    )
}
