//! What every renderer says alike: the verdict in a sentence, the ladder of stages, the words for a pattern.

use super::model::{CandidateReport, Confidence, Finding, GradNorm, Report, TensorReport, Verdict};
use super::pattern;
use super::text::{count, list, percent, scientific, times, value};

/// The stages within a microbatch, in the order in which an error runs through them.
const STAGES: [&str; 9] = [
    "loss",
    "lse",
    "label_logits",
    "d_hidden_lse",
    "d_hidden_label",
    "d_unembedding_lse",
    "d_unembedding_label",
    "d_hidden",
    "d_unembedding",
];

/// The last stage, which is a number and no tensor.
pub(super) const GRAD_NORM: &str = "grad_norm";

/// Labels of the bars' decades above the floor.
pub(super) const AXIS: [&str; 8] = ["1×", "10×", "100×", "10³", "10⁴", "10⁵", "10⁶", "10⁷"];

/// One tensor of one microbatch, or of the step.
#[derive(Clone, Copy)]
pub(super) struct Cell<'a> {
    /// `None` for what accumulates over the step.
    pub microbatch: Option<usize>,
    pub tensor: &'a TensorReport,
}

/// One stage over all microbatches.
pub(super) struct Rung<'a> {
    pub stage: String,
    /// At least one, in the order of the report.
    pub cells: Vec<Cell<'a>>,
    /// Diverges after the first stage that does: most likely a consequence of it.
    pub consequence: bool,
}

impl<'a> Rung<'a> {
    /// The cell that is furthest from agreement.
    pub fn worst(&self) -> Cell<'a> {
        let severity = |cell: &Cell| (cell.tensor.verdict, cell.tensor.nonfinite, ratio(cell.tensor));
        let mut worst = self.cells[0];
        for cell in &self.cells[1..] {
            if severity(cell) > severity(&worst) {
                worst = *cell;
            }
        }
        worst
    }

    pub fn verdict(&self) -> Verdict {
        self.worst().tensor.verdict
    }

    pub fn diverging(&self) -> usize {
        self.cells.iter().filter(|cell| cell.tensor.verdict == Verdict::Diverge).count()
    }
}

/// The ratio to the floor, infinite where it is not a number.
fn ratio(tensor: &TensorReport) -> f64 {
    if tensor.ratio.is_nan() { f64::INFINITY } else { tensor.ratio }
}

/// The stages that `candidate` has, in order; names that are no stage come after those of the microbatch.
pub(super) fn ladder<'a>(candidate: &'a CandidateReport) -> Vec<Rung<'a>> {
    let mut rungs: Vec<Rung> = Vec::new();
    let mut add = |stage: &str, cell: Cell<'a>| match rungs.iter_mut().find(|rung| rung.stage == stage) {
        Some(rung) => rung.cells.push(cell),
        None => rungs.push(Rung { stage: stage.to_owned(), cells: vec![cell], consequence: false }),
    };
    for microbatch in &candidate.microbatches {
        for tensor in &microbatch.tensors {
            add(&tensor.name, Cell { microbatch: Some(microbatch.microbatch), tensor });
        }
    }
    rungs.sort_by_key(|rung| STAGES.iter().position(|&stage| stage == rung.stage).unwrap_or(STAGES.len()));
    for tensor in candidate.accumulated.iter().flat_map(|accumulated| &accumulated.tensors) {
        let name = tensor.name.trim_start_matches("accumulated_");
        let cells = vec![Cell { microbatch: None, tensor }];
        rungs.push(Rung { stage: format!("accumulated_{name}"), cells, consequence: false });
    }
    let first = candidate.first_divergence.as_ref().and_then(|first| rungs.iter().position(|rung| rung.stage == first.stage));
    if let Some(first) = first {
        for rung in &mut rungs[first + 1..] {
            rung.consequence = rung.verdict() == Verdict::Diverge;
        }
    }
    rungs
}

pub(super) fn grad_norm(candidate: &CandidateReport) -> Option<GradNorm> {
    candidate.accumulated.as_ref()?.grad_norm
}

/// The cell in which the ladder first breaks.
fn first_cell<'a>(candidate: &'a CandidateReport, rungs: &[Rung<'a>]) -> Option<(String, Cell<'a>)> {
    let first = candidate.first_divergence.as_ref()?;
    let rung = rungs.iter().find(|rung| rung.stage == first.stage)?;
    let cell = rung.cells.iter().find(|cell| cell.microbatch == first.microbatch).copied().unwrap_or_else(|| rung.worst());
    Some((rung.stage.clone(), cell))
}

/// How far a tensor is off: "relative error 4.41e-3, 2.59× its floor of 1.70e-3 (limit 1.50×)".
pub(super) fn distance(tensor: &TensorReport) -> String {
    if tensor.nonfinite > 0 {
        let elements = tensor.shape[0].saturating_mul(tensor.shape[1]);
        return format!("{} of {elements} elements not finite", tensor.nonfinite);
    }
    match (tensor.rel_l2, tensor.noise_floor) {
        (Some(error), Some(floor)) => format!(
            "relative error {}, {} its floor of {} (limit {})",
            scientific(error),
            times(tensor.ratio),
            scientific(floor),
            times(tensor.ratio_limit)
        ),
        (Some(error), None) => format!("relative error {} where no floor is known", scientific(error)),
        (None, _) => format!("max. error {} where the reference is 0", scientific(tensor.max_abs)),
    }
}

pub(super) fn confidence(confidence: Confidence) -> &'static str {
    match confidence {
        Confidence::Certain => "certain",
        Confidence::Likely => "likely",
        Confidence::Possible => "possible",
    }
}

/// The verdict of a report in one sentence: what diverges, where, how much, why and how sure; or that everything agrees,
/// and against what floor.
pub fn headline(report: &Report) -> String {
    let names = |verdict, but: &[&str]| {
        let mut names: Vec<&str> = Vec::new();
        for candidate in report.candidates.iter().filter(|candidate| candidate.verdict == verdict) {
            let name = candidate.candidate.as_str();
            if !names.contains(&name) && !but.contains(&name) {
                names.push(name);
            }
        }
        names
    };
    let agree = |names: &[&str]| format!("{} agree{}", list(names), if names.len() == 1 { "s" } else { "" });
    let Some(first) = report.candidates.iter().find(|candidate| candidate.verdict == Verdict::Diverge) else {
        return match closest(report) {
            Some((tensors, closest)) => {
                let names = agree(&names(Verdict::Agree, &[]));
                let sampled = if report.candidates.iter().any(|c| c.sample.is_some()) { ", gradients sampled" } else { "" };
                format!("{names} over {}{sampled}; closest to its limit is {closest}.", count(tensors, "tensor"))
            }
            None => "nothing was compared: there is no microbatch that is whole.".to_owned(),
        };
    };
    let diverging = names(Verdict::Diverge, &[]);
    let others: Vec<&str> = diverging.iter().copied().filter(|name| *name != first.candidate).collect();
    let agreeing = names(Verdict::Agree, &diverging);
    let mut sentence = divergence(first, report);
    if !others.is_empty() {
        sentence += &format!(" {} diverge{} too.", list(&others), if others.len() == 1 { "s" } else { "" });
    }
    if !agreeing.is_empty() {
        sentence += &format!(" {}.", agree(&agreeing));
    }
    sentence
}

/// Of how many tensors compared which one is closest to its limit, in words.
fn closest(report: &Report) -> Option<(usize, String)> {
    let mut tensors = 0;
    let mut closest: Option<(f64, String)> = None;
    for candidate in &report.candidates {
        for rung in ladder(candidate) {
            tensors += rung.cells.len();
            let tensor = rung.worst().tensor;
            let used = ratio(tensor) / tensor.ratio_limit;
            if closest.as_ref().is_none_or(|(most, _)| used > *most) {
                closest = Some((used, format!("{} of {}: {}", rung.stage, candidate.candidate, distance(tensor))));
            }
        }
    }
    closest.map(|(_, text)| (tensors, text))
}

fn divergence(candidate: &CandidateReport, report: &Report) -> String {
    let rungs = ladder(candidate);
    let mut place = format!("step {}", candidate.step);
    if report.dump.run_ids.len() > 1 {
        place = format!("run {}, {place}", candidate.run_id);
    }
    let mut sentence = match first_cell(candidate, &rungs) {
        Some((stage, cell)) => {
            if let Some(microbatch) = cell.microbatch {
                place += &format!(", microbatch {microbatch}");
            }
            if let Some(of) = cell.tensor.sampled_from {
                place += &format!(", in {} of {of} rows", cell.tensor.shape[0]);
            }
            format!("{} diverges at {stage} ({place}): {}", candidate.candidate, distance(cell.tensor))
        }
        None => match grad_norm(candidate).filter(|norm| norm.verdict == Verdict::Diverge) {
            Some(norm) => format!("{} diverges at {GRAD_NORM} ({place}): {}", candidate.candidate, norm_distance(&norm)),
            None => format!("{} diverges ({place})", candidate.candidate),
        },
    };
    if let Some(best) = candidate.findings.first() {
        sentence += &format!("; {}", cause(best));
        let more = candidate.findings.len() - 1;
        if more > 0 {
            sentence += &format!(", and {}", count(more, "further finding"));
        }
    }
    sentence + "."
}

pub(super) fn norm_distance(norm: &GradNorm) -> String {
    format!("{} against {} ± {}", value(norm.candidate), value(norm.reference), scientific(norm.tolerance))
}

fn cause(finding: &Finding) -> String {
    if finding.cause == "unknown" {
        return format!("cause unknown ({})", finding.title);
    }
    let mut sure = format!("{}, {}", finding.cause, confidence(finding.confidence));
    if finding.explained.is_finite() {
        sure += &format!(", explains {}", percent(finding.explained));
    }
    if !finding.indistinguishable_from.is_empty() {
        sure += &format!(", indistinguishable here from {}", list(&finding.indistinguishable_from));
    }
    format!("cause: {} ({sure})", finding.title)
}

/// What was seen at the first divergence, in a sentence or two.
pub(super) fn observation(candidate: &CandidateReport, rungs: &[Rung]) -> Option<String> {
    let (stage, cell) = first_cell(candidate, rungs)?;
    let tensor = cell.tensor;
    let at = cell.microbatch.map_or("over the step".to_owned(), |m| format!("in microbatch {m}"));
    let mut text = format!("{stage} breaks first, {at}");
    if let Some(reason) = &tensor.reason {
        text += &format!(": {reason}");
    }
    text.push('.');
    if let Some(pattern) = &tensor.pattern {
        text += &format!(" {}.", pattern::words(pattern, &stage));
    }
    if tensor.out_of_bound > 0 {
        text += &format!(" {} beyond what any honest computation gives.", count(tensor.out_of_bound, "element"));
    }
    // What follows from it may show more of a shape.
    for rung in rungs.iter().filter(|rung| rung.consequence && rung.cells[0].microbatch.is_some()) {
        let shape = rung.worst().tensor.pattern.as_ref().filter(|shape| !["uniform", "rows"].contains(&shape.kind.as_str()));
        if let Some(shape) = shape.filter(|shape| tensor.pattern.as_ref().is_none_or(|first| first.kind != shape.kind)) {
            let words = pattern::words(shape, &rung.stage).replacen("The error", "the error", 1);
            text += &format!(" In {}, {words}.", rung.stage);
        }
    }
    Some(text)
}

/// The command that repeats the judgement of `candidate`.
pub(super) fn command(report: &Report, candidate: &CandidateReport) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%".contains(c);
    let quoted = |text: &str| match text.chars().all(plain) {
        true => text.to_owned(),
        false => format!("'{}'", text.replace('\'', r"'\''")),
    };
    let sample = candidate.sample.map_or(String::new(), |s| format!(" --sample {}", s.token_rows.max(s.vocab_rows)));
    let (path, name) = (quoted(&report.dump.path), quoted(&candidate.candidate));
    format!("xent-diff {path} --step {} --candidate {name}{sample}", candidate.step)
}

/// How many of several dumps diverge.
pub(super) fn how_many(reports: &[Report]) -> String {
    let diverging = reports.iter().filter(|report| report.verdict == Verdict::Diverge).count();
    format!("{diverging} of {} diverge{}", count(reports.len(), "dump"), if diverging == 1 { "s" } else { "" })
}

/// The causes found in a dump, each once.
pub(super) fn causes(report: &Report) -> String {
    let mut causes: Vec<&str> = Vec::new();
    for finding in report.candidates.iter().flat_map(|candidate| &candidate.findings) {
        if !causes.contains(&finding.cause.as_str()) {
            causes.push(&finding.cause);
        }
    }
    causes.join(", ")
}

/// What of the dump was judged: runs, processes, steps.
pub(super) fn contents(report: &Report) -> String {
    let dump = &report.dump;
    let steps: Vec<String> = dump.steps.iter().map(u64::to_string).collect();
    let plural = |n: usize| if n == 1 { "" } else { "s" };
    let processes = if dump.processes == 1 { "process" } else { "processes" };
    format!(
        "run{} {}, {} {processes}, step{} {}",
        plural(dump.run_ids.len()),
        list(&dump.run_ids),
        dump.processes,
        plural(steps.len()),
        list(&steps)
    )
}

/// The heading of a candidate.
pub(super) fn title(report: &Report, candidate: &CandidateReport) -> String {
    let run = if report.dump.run_ids.len() > 1 { format!(" · run {}", candidate.run_id) } else { String::new() };
    format!("{} · step {}{run}", candidate.candidate, candidate.step)
}

/// How a candidate was computed and what it is held to.
pub(super) fn computed(candidate: &CandidateReport) -> String {
    let c = &candidate.contract;
    let cotangent = c.cotangent.map_or(String::new(), |precision| format!("g {precision}, "));
    format!(
        "{}; held to the {} contract: {cotangent}dlogits {}, sums {}, dQ {}, dK {}",
        candidate.description, c.source, c.dlogits, c.accumulate, c.d_hidden, c.d_unembedding
    )
}

/// How many tokens were compared.
pub(super) fn tokens(candidate: &CandidateReport) -> String {
    let mut all = 0;
    let mut valid = 0;
    for microbatch in &candidate.microbatches {
        all += microbatch.tokens;
        valid += microbatch.valid_tokens;
    }
    let microbatches = candidate.microbatches.len();
    let over = if microbatches == 1 { String::new() } else { format!(" in {microbatches} microbatches") };
    let sample = candidate.sample.as_ref().map(|sample| {
        let each = if microbatches == 1 { "" } else { " of each" };
        format!(
            "; of the gradients, a sample was judged: {}{each} in dQ, {} in dK",
            count(sample.token_rows, "row"),
            count(sample.vocab_rows, "row")
        )
    });
    format!("{}{over}, {} masked{}", count(all, "token"), all - valid, sample.unwrap_or_default())
}

/// The label and text of each thing that is known of a finding, beside its cause and title.
pub(super) fn details(finding: &Finding) -> Vec<(&'static str, String)> {
    let left = times(finding.remaining_ratio);
    let explains = match finding.cause.as_str() {
        _ if !finding.explained.is_finite() => String::new(),
        "unknown" => format!("nothing; the deviation is {left} the floor"),
        _ => format!("{} of the squared deviation; what is left is {left} the floor", percent(finding.explained)),
    };
    let parameters: Vec<String> = finding.parameters.iter().map(|(name, value)| format!("{name} = {value}")).collect();
    let next = finding.runner_up.as_ref();
    let next = next.map_or(String::new(), |next| format!("{}, which explains {}", next.cause, percent(next.explained)));
    let mut details = vec![
        ("explains", explains),
        ("parameters", parameters.join(", ")),
        ("evidence", finding.evidence.clone()),
        ("remedy", finding.remedy.clone()),
        ("next best", next),
        ("or equally", list(&finding.indistinguishable_from)),
    ];
    details.retain(|(_, text)| !text.is_empty());
    details
}

/// The ratio of a tensor to its floor, or that it is not finite.
pub(super) fn ratio_cell(tensor: &TensorReport) -> String {
    if tensor.nonfinite > 0 { "NaN/∞".to_owned() } else { times(tensor.ratio) }
}
