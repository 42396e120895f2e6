//! A report beside an earlier one: what became better, what worse, which causes are new or gone.

use super::json::SCHEMA;
use super::model::{CandidateReport, Report, TensorReport, Verdict};
use super::summary::GRAD_NORM;
use super::text::{count, list, times};
use serde::Serialize;
use serde_json::Value;

/// The factor by which a ratio to the floor must differ to be better or worse. Ratios below 1 count as 1.
pub const MARGIN: f64 = 1.1;

/// How something compares with what it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Change {
    /// Further from the floor, or it diverges and did not.
    Worse,
    /// Nearer to the floor, or it agrees and did not.
    Better,
    /// Not there before.
    New,
    /// No longer there.
    Gone,
    /// Neither.
    Same,
}

/// A report beside the baseline's on the same dump.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// The baseline's file.
    pub file: String,
    /// Whether it has a report on this dump; if not, everything is new.
    pub found: bool,
    /// See [`MARGIN`].
    pub margin: f64,
    /// The worst of all changes: `worse` before `better` before `same`.
    pub change: Change,
    /// How many tensors are the same.
    pub same: usize,
    /// The tensors that are not, the worst first.
    pub tensors: Vec<TensorChange>,
    /// Every cause found, then or now.
    pub causes: Vec<CauseChange>,
}

/// One tensor, then and now.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TensorChange {
    /// The candidate.
    pub candidate: String,
    /// Its run, as it is named now; that of the baseline if it is gone.
    pub run_id: String,
    /// The step.
    pub step: u64,
    /// `None` for what accumulates over the step.
    pub microbatch: Option<usize>,
    /// The stage.
    pub tensor: String,
    /// How it compares.
    pub change: Change,
    /// Ratio to the floor before; `None` if it was not there, or not finite.
    pub before: Option<f64>,
    /// Ratio to the floor now; `None` if it is not there, or not finite.
    pub now: Option<f64>,
}

/// One cause, then and now: new, gone, or the same.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CauseChange {
    /// The candidate.
    pub candidate: String,
    /// The step.
    pub step: u64,
    /// Its slug.
    pub cause: String,
    /// How it compares.
    pub change: Change,
}

/// An earlier report, as read from its JSON.
#[derive(Clone, Debug)]
pub struct Baseline {
    file: String,
    /// By the path that each was judged at.
    reports: Vec<(String, Vec<Old>)>,
}

/// A candidate of the baseline.
#[derive(Clone, Debug)]
struct Old {
    candidate: String,
    run_id: String,
    step: u64,
    tensors: Vec<OldTensor>,
    causes: Vec<String>,
}

#[derive(Clone, Debug)]
struct OldTensor {
    microbatch: Option<usize>,
    name: String,
    judged: Judged,
}

/// What is compared of a tensor. The ratio is infinite where the JSON has none.
#[derive(Clone, Copy, Debug)]
struct Judged {
    diverges: bool,
    ratio: f64,
}

impl Baseline {
    /// Reads the JSON report `text` of `file`.
    ///
    /// # Errors
    /// It is no JSON, or no report of this schema: says where, what was found, and what was expected.
    pub fn parse(file: &str, text: &str) -> Result<Self, String> {
        let wrong = |what: String| format!("--baseline {file}: {what}; give a file that --json wrote");
        let json: Value = serde_json::from_str(text).map_err(|e| wrong(format!("not JSON: {e}")))?;
        let schema = json.get("schema").and_then(Value::as_str);
        if schema != Some(SCHEMA) {
            let found = schema.map_or("no schema".to_owned(), |schema| format!("schema \"{schema}\""));
            return Err(wrong(format!("found {found}, expected \"{SCHEMA}\"")));
        }
        let reports = match json.get("reports") {
            Some(reports) => array(reports, "reports").and_then(|reports| reports.iter().map(report).collect()),
            None => report(&json).map(|report| vec![report]),
        };
        Ok(Self { file: file.to_owned(), reports: reports.map_err(wrong)? })
    }

    /// `report` beside the baseline's on the dump of the same path, or, if both are of one dump alone, beside that.
    pub fn compare(&self, report: &Report, alone: bool) -> Comparison {
        let same_path = self.reports.iter().find(|(path, _)| *path == report.dump.path);
        let old = same_path.or_else(|| self.reports.first().filter(|_| alone && self.reports.len() == 1));
        let old_candidates = old.map_or(&[][..], |(_, candidates)| candidates);
        let mut tensors = Vec::new();
        let mut causes = Vec::new();
        let mut met = vec![false; old_candidates.len()];
        for candidate in &report.candidates {
            let place = counterpart(old_candidates, &report.candidates, candidate);
            place.into_iter().for_each(|place| met[place] = true);
            compare_candidate(candidate, place.map(|place| &old_candidates[place]), &mut tensors, &mut causes);
        }
        for (old, _) in old_candidates.iter().zip(met).filter(|(_, met)| !met) {
            tensors.extend(old.tensors.iter().map(|tensor| gone(old, tensor)));
            causes.extend(old.causes.iter().map(|cause| old.cause(cause, Change::Gone)));
        }
        let all = tensors.len();
        tensors.retain(|t| t.change != Change::Same);
        let grown = |t: &TensorChange| t.now.unwrap_or(f64::INFINITY) / t.before.unwrap_or(f64::INFINITY).max(1.0);
        tensors.sort_by(|a, b| a.change.cmp(&b.change).then(grown(b).total_cmp(&grown(a))));
        let change = [Change::Worse, Change::Better].into_iter().find(|change| tensors.iter().any(|t| t.change == *change));
        Comparison {
            file: self.file.clone(),
            found: old.is_some(),
            margin: MARGIN,
            change: change.unwrap_or(if old.is_some() { Change::Same } else { Change::New }),
            same: all - tensors.len(),
            tensors,
            causes,
        }
    }

    /// The paths that the baseline has reports on and `reports` have not.
    pub fn not_judged(&self, reports: &[Report]) -> Vec<&str> {
        let judged = |path: &str| reports.iter().any(|report| report.dump.path == path);
        self.reports.iter().map(|(path, _)| path.as_str()).filter(|path| !judged(path)).collect()
    }
}

/// Which of the old candidates `candidate` is compared with: of the same name and step, and of the same run, or of the run in
/// the same place if the runs have other names now.
fn counterpart(old: &[Old], new: &[CandidateReport], candidate: &CandidateReport) -> Option<usize> {
    let alike = |o: &&(usize, &Old)| o.1.candidate == candidate.candidate && o.1.step == candidate.step;
    let numbered: Vec<(usize, &Old)> = old.iter().enumerate().collect();
    let alike: Vec<&(usize, &Old)> = numbered.iter().filter(alike).collect();
    if let Some((place, _)) = alike.iter().find(|(_, o)| o.run_id == candidate.run_id) {
        return Some(*place);
    }
    let others = new.iter().filter(|c| c.candidate == candidate.candidate && c.step == candidate.step);
    let unnamed: Vec<&str> =
        others.map(|c| c.run_id.as_str()).filter(|run| !alike.iter().any(|(_, o)| o.run_id == *run)).collect();
    let free = alike.iter().filter(|(_, o)| !new.iter().any(|c| c.run_id == o.run_id));
    let at = unnamed.iter().position(|run| *run == candidate.run_id)?;
    free.map(|(place, _)| *place).nth(at)
}

fn compare_candidate(
    candidate: &CandidateReport,
    old: Option<&Old>,
    tensors: &mut Vec<TensorChange>,
    causes: &mut Vec<CauseChange>,
) {
    let known = old.map_or(&[][..], |old| &old.tensors);
    let mut met = vec![false; known.len()];
    for (microbatch, name, now) in judged(candidate) {
        let place = known.iter().position(|t| t.microbatch == microbatch && t.name == name);
        place.into_iter().for_each(|place| met[place] = true);
        let before = place.map(|place| known[place].judged);
        tensors.push(TensorChange {
            candidate: candidate.candidate.clone(),
            run_id: candidate.run_id.clone(),
            step: candidate.step,
            microbatch,
            tensor: name.to_owned(),
            change: before.map_or(Change::New, |before| change(before, now)),
            before: before.map(|before| before.ratio),
            now: Some(now.ratio),
        });
    }
    tensors.extend(old.iter().flat_map(|old| old.tensors.iter().zip(&met).filter(|(_, met)| !**met).map(|(t, _)| gone(old, t))));
    let before = old.map_or(&[][..], |old| &old.causes);
    for finding in &candidate.findings {
        let change = if before.contains(&finding.cause) { Change::Same } else { Change::New };
        let (name, cause) = (candidate.candidate.clone(), finding.cause.clone());
        causes.push(CauseChange { candidate: name, step: candidate.step, cause, change });
    }
    let here = |cause: &&String| candidate.findings.iter().any(|finding| finding.cause == **cause);
    causes.extend(old.iter().flat_map(|old| before.iter().filter(|cause| !here(cause)).map(|c| old.cause(c, Change::Gone))));
}

fn gone(old: &Old, tensor: &OldTensor) -> TensorChange {
    TensorChange {
        candidate: old.candidate.clone(),
        run_id: old.run_id.clone(),
        step: old.step,
        microbatch: tensor.microbatch,
        tensor: tensor.name.clone(),
        change: Change::Gone,
        before: Some(tensor.judged.ratio),
        now: None,
    }
}

fn change(before: Judged, now: Judged) -> Change {
    let grown = now.ratio.max(1.0) / before.ratio.max(1.0);
    match (before.diverges, now.diverges) {
        (false, true) => Change::Worse,
        (true, false) => Change::Better,
        _ if before.ratio == now.ratio => Change::Same,
        _ if grown > MARGIN => Change::Worse,
        _ if grown < 1.0 / MARGIN => Change::Better,
        _ => Change::Same,
    }
}

/// Every tensor of a candidate, and the gradient norm.
fn judged(candidate: &CandidateReport) -> Vec<(Option<usize>, &str, Judged)> {
    let of = |t: &TensorReport| Judged {
        diverges: t.verdict == Verdict::Diverge,
        ratio: if t.nonfinite > 0 || t.ratio.is_nan() { f64::INFINITY } else { t.ratio },
    };
    let own = candidate.microbatches.iter().flat_map(|m| m.tensors.iter().map(|t| (Some(m.microbatch), t.name.as_str(), of(t))));
    let mut out: Vec<_> = own.collect();
    if let Some(accumulated) = &candidate.accumulated {
        out.extend(accumulated.tensors.iter().map(|t| (None, t.name.as_str(), of(t))));
        out.extend(accumulated.grad_norm.map(|norm| {
            let diverges = norm.verdict == Verdict::Diverge;
            (None, GRAD_NORM, Judged { diverges, ratio: (norm.candidate - norm.reference).abs() / norm.tolerance })
        }));
    }
    out
}

impl Old {
    fn cause(&self, cause: &str, change: Change) -> CauseChange {
        CauseChange { candidate: self.candidate.clone(), step: self.step, cause: cause.to_owned(), change }
    }
}

fn report(json: &Value) -> Result<(String, Vec<Old>), String> {
    let path = member(json, "dump")?.get("path").or_else(|| json.get("path"));
    let candidates = array(member(json, "candidates")?, "candidates")?.iter().map(candidate).collect::<Result<_, _>>()?;
    Ok((path.and_then(Value::as_str).unwrap_or_default().to_owned(), candidates))
}

fn candidate(json: &Value) -> Result<Old, String> {
    let mut tensors = Vec::new();
    for own in array(member(json, "microbatches")?, "microbatches")? {
        let index = number(own, "microbatch")? as usize;
        for t in array(member(own, "tensors")?, "tensors")? {
            tensors.push(tensor(Some(index), t)?);
        }
    }
    let accumulated = json.get("accumulated").filter(|accumulated| !accumulated.is_null());
    if let Some(accumulated) = accumulated {
        for t in array(member(accumulated, "tensors")?, "tensors")? {
            tensors.push(tensor(None, t)?);
        }
        if let Some(norm) = accumulated.get("grad_norm").filter(|norm| !norm.is_null()) {
            let value = |name| norm.get(name).and_then(Value::as_f64).unwrap_or(f64::INFINITY);
            let ratio = (value("candidate") - value("reference")).abs() / value("tolerance");
            let ratio = if ratio.is_nan() { f64::INFINITY } else { ratio };
            tensors.push(OldTensor {
                microbatch: None,
                name: GRAD_NORM.to_owned(),
                judged: Judged { diverges: diverges(norm)?, ratio },
            });
        }
    }
    let finding = |finding: &Value| text(finding, "cause");
    Ok(Old {
        candidate: text(json, "candidate")?,
        run_id: text(json, "run_id")?,
        step: number(json, "step")?,
        tensors,
        causes: array(member(json, "findings")?, "findings")?.iter().map(finding).collect::<Result<_, _>>()?,
    })
}

fn tensor(microbatch: Option<usize>, json: &Value) -> Result<OldTensor, String> {
    let nonfinite = json.get("nonfinite").and_then(Value::as_u64).unwrap_or(0) > 0;
    let ratio = member(json, "ratio")?.as_f64().filter(|_| !nonfinite).unwrap_or(f64::INFINITY);
    Ok(OldTensor { microbatch, name: text(json, "name")?, judged: Judged { diverges: diverges(json)?, ratio } })
}

fn diverges(json: &Value) -> Result<bool, String> {
    match text(json, "verdict")?.as_str() {
        "agree" => Ok(false),
        "diverge" => Ok(true),
        other => Err(format!("found the verdict \"{other}\", expected agree or diverge")),
    }
}

fn member<'a>(json: &'a Value, name: &str) -> Result<&'a Value, String> {
    json.get(name).ok_or_else(|| format!("no report: found no member \"{name}\" where one belongs"))
}

fn array<'a>(json: &'a Value, name: &str) -> Result<&'a Vec<Value>, String> {
    json.as_array().ok_or_else(|| format!("found a \"{name}\" that is no list"))
}

fn text(json: &Value, name: &str) -> Result<String, String> {
    member(json, name)?.as_str().map(str::to_owned).ok_or_else(|| format!("found a \"{name}\" that is no text"))
}

fn number(json: &Value, name: &str) -> Result<u64, String> {
    member(json, name)?.as_u64().ok_or_else(|| format!("found a \"{name}\" that is no whole number"))
}

/// In one sentence: how many tensors are worse, better, the same, and which causes are new or gone.
pub(super) fn sentence(comparison: &Comparison) -> String {
    if !comparison.found {
        return format!("{} has no report on this dump: nothing to compare with.", comparison.file);
    }
    let of = |change: Change| comparison.tensors.iter().filter(|t| t.change == change).count();
    let words = [(Change::Worse, "worse"), (Change::Better, "better"), (Change::New, "new"), (Change::Gone, "gone")];
    let mut parts: Vec<String> =
        words.iter().filter(|(change, _)| of(*change) > 0).map(|(change, word)| format!("{} {word}", of(*change))).collect();
    parts.push(format!("{} the same", comparison.same));
    let all = comparison.same + comparison.tensors.len();
    let mut text = format!("beside {}, of {}, {}.", comparison.file, count(all, "tensor"), list(&parts));
    for (change, word) in [(Change::New, "New"), (Change::Gone, "Gone"), (Change::Same, "Still there")] {
        let mut causes: Vec<&str> = Vec::new();
        for cause in comparison.causes.iter().filter(|cause| cause.change == change) {
            if !causes.contains(&cause.cause.as_str()) {
                causes.push(&cause.cause);
            }
        }
        if !causes.is_empty() {
            text += &format!(" {word}: {}.", list(&causes));
        }
    }
    text
}

/// The tensors that became better or worse, in words, as many as a reader looks at; and how many more there are.
pub(super) fn lines(comparison: &Comparison) -> (Vec<(Change, String)>, usize) {
    const SHOWN: usize = 12;
    let told = |t: &&TensorChange| matches!(t.change, Change::Worse | Change::Better);
    let all = comparison.tensors.iter().filter(told).count();
    let ratio = |x: Option<f64>| x.map_or("not there".to_owned(), times);
    let line = |t: &TensorChange| {
        let at = t.microbatch.map_or(String::new(), |m| format!(", microbatch {m}"));
        let (before, now) = (ratio(t.before), ratio(t.now));
        (t.change, format!("{}, step {}{at}, {}: {before} before, {now} now", t.candidate, t.step, t.tensor))
    };
    let shown: Vec<_> = comparison.tensors.iter().filter(told).take(SHOWN).map(line).collect();
    let more = all - shown.len();
    (shown, more)
}

pub(super) fn word(change: Change) -> &'static str {
    match change {
        Change::Worse => "worse",
        Change::Better => "better",
        Change::New => "new",
        Change::Gone => "gone",
        Change::Same => "same",
    }
}
