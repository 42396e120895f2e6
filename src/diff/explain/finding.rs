//! What is found, in words.

use super::Case;
use super::bench::Fit;
use super::search::EQUAL;
use crate::diff::fault::{Fault, told_apart_by};
use crate::report::model::{Confidence, Finding, RunnerUp, TensorReport, Verdict};
use crate::report::text::{percent, times};
use serde_json::{Map, Value};

/// The finding that `fault` makes, whose fit is one of `fits`; its rank, its share of the whole and its confidence are yet to be set.
pub(super) fn finding(
    fault: &Fault,
    fits: &[(Fault, Fit)],
    fit: &Fit,
    before: &Fit,
    runner_up: Option<(&Fault, &Fit, f64)>,
) -> Finding {
    Finding {
        rank: 1,
        cause: fault.slug().into(),
        title: fault.entry().title.into(),
        explained: 0.0,
        remaining_ratio: fit.ratio(),
        confidence: Confidence::Possible,
        parameters: parameters(fault, fit.left(), fits),
        evidence: evidence(fault, fit, before, runner_up.map(|(other, fit, _)| (other, fit))),
        remedy: fault.entry().remedy.into(),
        runner_up: runner_up.map(|(other, _, explained)| RunnerUp { cause: other.slug().into(), explained }),
        indistinguishable_from: vec![],
        tell_apart: vec![],
    }
}

impl Case<'_> {
    pub(super) fn nonfinite(&self) -> bool {
        self.tensors().any(|(_, t)| t.nonfinite > 0)
    }

    fn tensors(&self) -> impl Iterator<Item = (Option<usize>, &TensorReport)> {
        let of_microbatches = self.microbatches.iter().flat_map(|m| m.tensors.iter().map(|t| (Some(m.microbatch), t)));
        of_microbatches.chain(self.accumulated.map(|t| (None, t)))
    }

    pub(super) fn nonfinite_finding(&self) -> Finding {
        let all: usize = self.tensors().map(|(_, t)| t.nonfinite).sum();
        let (m, first) = self.tensors().find(|(_, t)| t.nonfinite > 0).expect("asked for only if there is one");
        let place = format!("first in {} of {}", first.name, m.map_or("the step".to_owned(), |m| format!("microbatch {m}")));
        let input = self.tensors().find_map(|(_, t)| t.pattern.as_ref()?.input.as_ref());
        let (title, evidence, remedy) = match input {
            Some(input) => (
                "an input is not finite",
                format!(
                    "{all} elements are NaN or infinite, {place}; {}[{}, {}] is {}: bad in, and no kernel can mend it",
                    input.tensor, input.index[0], input.index[1], input.value
                ),
                "look upstream of this loss, for what made the input so",
            ),
            None => (
                "the candidate is not finite where the reference is",
                format!(
                    "{all} elements are NaN or infinite, {place}; the inputs are finite and so is the reference: good in, bad out"
                ),
                "look for 0/0 where all tokens are masked, −∞ − (−∞) in masked columns, and overflow of exp without its maximum",
            ),
        };
        Finding {
            rank: 1,
            cause: "nonfinite".into(),
            title: title.into(),
            explained: 0.0,
            remaining_ratio: first.ratio,
            confidence: Confidence::Certain,
            parameters: Map::new(),
            evidence,
            remedy: remedy.into(),
            runner_up: None,
            indistinguishable_from: vec![],
            tell_apart: vec![],
        }
    }

    /// Every tensor that diverges, in words.
    fn diverging(&self) -> Vec<String> {
        self.tensors()
            .filter(|(_, t)| t.verdict == Verdict::Diverge)
            .map(|(m, t)| {
                let pattern = t.pattern.as_ref().map_or("uniform", |p| &p.kind);
                format!(
                    "{}{} ({pattern}, {} its floor)",
                    t.name,
                    m.map_or(String::new(), |m| format!(" of microbatch {m}")),
                    times(t.ratio)
                )
            })
            .collect()
    }

    pub(super) fn unknown(&self, base: &Fit, current: &Fit, rank: usize, nearest: Option<RunnerUp>) -> Finding {
        Finding {
            rank,
            cause: "unknown".into(),
            title: "no fault of the catalogue explains this".into(),
            explained: 0.0,
            remaining_ratio: current.ratio(),
            confidence: Confidence::Possible,
            parameters: Map::new(),
            evidence: format!(
                "{:.1} % of the squared deviation is left by the best explanation; it lies in {}",
                100.0 * current.left() / base.left(),
                self.diverging().join(", ")
            ),
            remedy: "record the inner stages (lse, label logits, the parts of dQ and dK) to see where it enters".into(),
            runner_up: nearest,
            indistinguishable_from: vec![],
            tell_apart: vec![],
        }
    }
}

fn evidence(fault: &Fault, fit: &Fit, before: &Fit, runner_up: Option<(&Fault, &Fit)>) -> String {
    let mut text = format!(
        "applied to the reference on this very data, it removes {} of the squared deviation: from {} the floor to {}",
        percent(1.0 - fit.left() / before.left()),
        times(before.ratio()),
        times(fit.ratio()),
    );
    if let Some((other, other_fit)) = runner_up {
        text += &format!("; the next best, {}, leaves {} the floor", other.slug(), times(other_fit.ratio()));
    }
    text + &format!(". Such a fault leaves: {}", fault.entry().leaves_behind)
}

/// The fault's parameters; where other values fit as well, those too.
fn parameters(fault: &Fault, left: f64, fits: &[(Fault, Fit)]) -> Map<String, Value> {
    let mut out = fault.parameters();
    let alike: Vec<Map<String, Value>> = fits
        .iter()
        .filter(|(f, other)| f.slug() == fault.slug() && other.left() <= left * EQUAL)
        .map(|(f, _)| f.parameters())
        .collect();
    for name in out.keys().cloned().collect::<Vec<_>>() {
        let mut values: Vec<Value> = alike.iter().filter_map(|p| p.get(&name).cloned()).collect();
        values.sort_by(|a, b| a.as_f64().partial_cmp(&b.as_f64()).unwrap_or(std::cmp::Ordering::Equal));
        values.dedup();
        if values.len() > 1 {
            out.insert(format!("{name}_candidates"), Value::Array(values));
        }
    }
    out
}

/// What to capture to tell the causes of a group apart.
pub(super) fn to_tell_apart(causes: &[&str]) -> Vec<String> {
    let mut by: Vec<String> = causes.iter().map(|cause| told_apart_by(cause).to_owned()).collect();
    by.sort_unstable();
    by.dedup();
    by
}
