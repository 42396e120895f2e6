//! Where an error enters, in words.

use super::model::{CandidateReport, Confidence};
use super::substitution::{Along, AlongPart, Repair, Substituted, Substitution};
use super::text::{list, percent, scientific, times};

/// Everything that can be recorded, in the order of the computation.
const STAGES: [&str; 11] = [
    "lse",
    "label_logits",
    "loss",
    "d_lse",
    "d_label_logits",
    "d_hidden_lse",
    "d_hidden_label",
    "d_unembedding_lse",
    "d_unembedding_label",
    "d_hidden",
    "d_unembedding",
];

/// The share from which something accounts for an error.
const NEARLY_ALL: f64 = 0.9;
/// Shares this close are one.
const EQUAL: f64 = 0.02;
/// A share that is all but for the rounding of sums.
const ALL: f64 = 0.9999;
/// What a loss function gives.
const ENDS: [&str; 4] = ["loss", "d_hidden", "d_unembedding", "accumulated_d_unembedding"];
/// A repair worth telling leaves at most this part.
const HELPS: f64 = 0.5;

/// What is said of where the error of a candidate enters: a label and a text each.
pub(super) fn lines(candidate: &CandidateReport) -> Vec<(&'static str, String)> {
    let Some(substitution) = &candidate.substitution else { return vec![] };
    let stages = by_stage(substitution);
    let mut out = Vec::new();
    let entering: Vec<&Stage> = stages.iter().filter(|stage| stage.worst().enters).collect();
    for stage in &entering {
        out.push(("enters", enters(stage, candidate)));
    }
    let inherited = inherited(&stages);
    if !inherited.is_empty() {
        out.push(("inherited", inherited.join("; ")));
    }
    let repaired = repairs(substitution, &entering);
    if !repaired.is_empty() {
        out.push(("repaired", repaired.join("; ")));
    }
    let mut record: Vec<&str> = entering.iter().flat_map(|stage| &stage.worst().record).map(String::as_str).collect();
    record.sort_by_key(|name| STAGES.iter().position(|stage| stage == name));
    record.dedup();
    // Where the cause is certain there is nothing to be split.
    let certain = candidate.findings.first().is_some_and(|finding| finding.confidence == Confidence::Certain);
    if !record.is_empty() && !certain {
        out.push(("to split", format!("record {}", list(&record))));
    }
    out
}

/// One stage in the microbatches that were looked at, the worst first.
pub(super) struct Stage<'a> {
    rungs: Vec<&'a Substituted>,
}

impl<'a> Stage<'a> {
    /// Where most enters, or if none does, where the error is largest.
    pub fn worst(&self) -> &'a Substituted {
        self.rungs[0]
    }

    /// How many of those microbatches it enters in.
    fn entering(&self) -> usize {
        self.rungs.iter().filter(|rung| rung.enters).count()
    }
}

/// The stages in the order of the computation.
pub(super) fn by_stage(substitution: &Substitution) -> Vec<Stage<'_>> {
    let mut out: Vec<Stage> = Vec::new();
    for rung in &substitution.rungs {
        match out.iter_mut().find(|stage| stage.rungs[0].stage == rung.stage) {
            Some(stage) => stage.rungs.push(rung),
            None => out.push(Stage { rungs: vec![rung] }),
        }
    }
    let order = |rung: &&Substituted| (!rung.enters, if rung.enters { -rung.entering_ratio } else { -rung.ratio });
    let by_order = |a: &&Substituted, b: &&Substituted| {
        let (a, b) = (order(a), order(b));
        a.0.cmp(&b.0).then(a.1.total_cmp(&b.1))
    };
    out.iter_mut().for_each(|stage| stage.rungs.sort_by(by_order));
    out
}

fn enters(stage: &Stage, candidate: &CandidateReport) -> String {
    let rung = stage.worst();
    let name = &rung.stage;
    let at = match (rung.microbatch, stage.entering()) {
        (None, _) => String::new(),
        (Some(_), 1) if candidate.microbatches.len() == 1 => String::new(),
        (Some(m), 1) => format!(" of microbatch {m}"),
        (Some(m), n) => format!(" in {n} of {} microbatches looked at, most in {m}", stage.rungs.len()),
    };
    let names = |diverges: bool| -> Vec<&str> {
        rung.inputs.iter().filter(|input| input.diverges == diverges).map(|input| input.stage.as_str()).collect()
    };
    let (bad, good) = (names(true), names(false));
    let verb = |names: &[&str]| if names.len() == 1 { "agrees" } else { "agree" };
    let mut text = format!("at {name}{at}, {} the floor", times(rung.entering_ratio));
    if !bad.is_empty() {
        text +=
            &format!(", beyond what {} {} with {}", list(&bad), if bad.len() == 1 { "brings" } else { "bring" }, pronoun(&bad));
    } else if !good.is_empty() {
        text += &format!(", after {}, which {}", list(&good), verb(&good));
    }
    text += &format!(": {}", made_by(rung));
    if let Some(along) = &rung.along {
        text += &format!(". {}", direction(along, name));
    }
    text
}

fn pronoun(names: &[&str]) -> &'static str {
    if names.len() == 1 { "it" } else { "them" }
}

/// What a stage is made by.
fn made_by(rung: &Substituted) -> &'static str {
    let has = |part: &str| rung.inputs.iter().any(|input| input.stage.ends_with(part));
    match rung.stage.as_str() {
        "lse" => "the logits, or the sum of their exponentials",
        "label_logits" => "the label's logit",
        "loss" if rung.inputs.len() == 2 => "how lse and the label's logit are put together",
        "loss" => "the forward",
        "d_lse" | "d_label_logits" => "what hands it to the kernel: reduction, weights, mask, options of the loss",
        "d_hidden_lse" => "P, or its product with K",
        "d_hidden_label" => "the label's term, or its row of K",
        "d_unembedding_lse" => "P, or its product with Q",
        "d_unembedding_label" => "the label's term, or how it is added to the rows of labels",
        "accumulated_d_unembedding" if !rung.inputs.is_empty() => "adding up the microbatches",
        "accumulated_d_unembedding" => "the backward, or adding up the microbatches",
        stage if has(&format!("{stage}_lse")) && has(&format!("{stage}_label")) => "adding its parts, or its last rounding",
        _ => "the backward",
    }
}

/// What the direction of the first error says of it, if that is the factors of rows.
pub(super) fn seen(candidate: &CandidateReport) -> Option<String> {
    let first = candidate.first_divergence.as_ref()?;
    let rungs = &candidate.substitution.as_ref()?.rungs;
    let rung = rungs.iter().find(|rung| rung.stage == first.stage && rung.microbatch == first.microbatch)?;
    let along = rung.along.as_ref()?;
    let most = along.lse.share.max(along.label.share).max(along.gradient.share);
    (most >= NEARLY_ALL).then(|| direction(along, &rung.stage))
}

/// Along which part of a gradient the error lies.
fn direction(along: &Along, stage: &str) -> String {
    let of_tokens = stage == "d_hidden";
    let row = if of_tokens { "token" } else { "vocab id" };
    let shared = along.as_in_d_hidden.filter(|share| *share >= NEARLY_ALL);
    if let Some(share) = shared {
        return format!(
            "{} of it follows from the factors per token that d_hidden shows: one error, made before either product",
            percent(share)
        );
    }
    let parts = [("lse part", &along.lse), ("label part", &along.label), ("whole", &along.gradient)];
    let best = parts.iter().map(|(_, part)| part.share).fold(0.0, f64::max);
    let fitting: Vec<&(&str, &AlongPart)> =
        parts.iter().filter(|(_, part)| part.share >= NEARLY_ALL && part.share >= best - EQUAL).collect();
    match fitting[..] {
        [] if along.both >= NEARLY_ALL => {
            format!("A factor of each {row} on each of the two parts accounts for {} of it", percent(along.both))
        }
        [] => format!(
            "No factor of a {row} on the lse part ({}) or on the label part ({}) accounts for it: it is made within a row, in P, in a sum or by a rounding",
            percent(along.lse.share),
            percent(along.label.share)
        ),
        [(name, part)] => {
            let [low, high] = part.factors;
            let alike = high - low <= EQUAL * high.abs().max(1.0);
            let factor = match alike {
                true => format!("One factor, {},", scientific((low + high) / 2.0)),
                false => format!("A factor per {row}, {} to {},", scientific(low), scientific(high)),
            };
            let some = if alike && part.share_of_one < part.share - EQUAL { " of the rows that are off" } else { "" };
            let meaning = match (*name, of_tokens) {
                ("lse part", true) => ": lse, or its cotangent, as the backward takes them",
                ("label part", true) => ": the label's term",
                ("whole", _) if alike && low.abs() < EQUAL => ": they are left out",
                ("whole", true) => ": g, as the backward takes it",
                _ => "",
            };
            format!("{factor} on the {name}{some} accounts for {} of it{meaning}", percent(part.share))
        }
        _ => {
            let names: Vec<&str> = fitting.iter().map(|(name, _)| *name).collect();
            format!(
                "A factor per {row} on the {} accounts for {} of it: they lie alike here",
                list(&names).replace(" and ", " or on the "),
                percent(best)
            )
        }
    }
}

/// The stages that an error comes from, through all that it passes.
fn roots<'a>(stages: &[Stage<'a>], rung: &'a Substituted, out: &mut Vec<&'a str>) {
    for input in rung.inputs.iter().filter(|input| input.diverges || rung.rounded_inputs) {
        match stages.iter().map(Stage::worst).find(|from| from.stage == input.stage && !from.enters && !rung.rounded_inputs) {
            Some(from) => roots(stages, from, out),
            None if out.contains(&input.stage.as_str()) => {}
            None => out.push(&input.stage),
        }
    }
}

/// What has its error from where, by where it is from.
fn inherited(stages: &[Stage]) -> Vec<String> {
    let mut groups: Vec<(Vec<&str>, Vec<&Substituted>)> = Vec::new();
    let mut out = Vec::new();
    for rung in stages.iter().map(Stage::worst).filter(|rung| !rung.enters) {
        let mut from = Vec::new();
        roots(stages, rung, &mut from);
        if rung.rounded_inputs {
            out.push(format!(
                "{} is made of {} as recorded: their rounding is its error ({} the floor is left)",
                rung.stage,
                list(&from),
                times(rung.entering_ratio)
            ));
            continue;
        }
        // It diverges in single elements, with no input that does and a norm within its limit.
        if from.is_empty() {
            continue;
        }
        match groups.iter_mut().find(|(known, _)| *known == from) {
            Some((_, rungs)) => rungs.push(rung),
            None => groups.push((from, vec![rung])),
        }
    }
    for (from, rungs) in groups {
        let names: Vec<&str> = rungs.iter().map(|rung| rung.stage.as_str()).collect();
        let least = rungs.iter().map(|rung| rung.inherited).fold(1.0, f64::min);
        let left = rungs.iter().map(|rung| rung.entering_ratio).fold(0.0, f64::max);
        let (have, their) = if names.len() == 1 { ("has", "its") } else { ("have", "their") };
        let share = if least > ALL { "all".to_owned() } else { percent(least) + if names.len() == 1 { "" } else { " or more" } };
        let most = if names.len() == 1 { "" } else { "at most " };
        let (names, from, left) = (list(&names), list(&from), times(left));
        out.push(format!("{names} {have} {share} of {their} error from {from} ({most}{left} the floor is left)"));
    }
    out
}

/// "with the reference's lse: d_hidden falls from 12.0× to 1.02×", for every stage in which an error enters and that helps.
fn repairs(substitution: &Substitution, entering: &[&Stage]) -> Vec<String> {
    let helps = |repair: &&Repair| repair.before > 1.0 && repair.after <= HELPS * repair.before;
    let sentence = |stage: &&Stage| {
        let name = &stage.worst().stage;
        let of_stage = substitution.repairs.iter().filter(|repair| repair.repaired == *name).filter(helps);
        let mut worst: Vec<&Repair> = Vec::new();
        for repair in of_stage.filter(|repair| ENDS.contains(&repair.stage.as_str())) {
            match worst.iter_mut().find(|known| known.stage == repair.stage) {
                Some(known) if known.before < repair.before => *known = repair,
                Some(_) => {}
                None => worst.push(repair),
            }
        }
        let change = |repair: &&Repair| format!("{} {} → {}", repair.stage, times(repair.before), times(repair.after));
        let changes: Vec<String> = worst.iter().map(change).collect();
        (!changes.is_empty()).then(|| format!("with the reference's {name}: {}", changes.join(", ")))
    };
    entering.iter().filter_map(sentence).collect()
}
