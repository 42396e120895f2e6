//! Why a candidate diverges: each fault of the catalogue is applied to the reference on this very data, and the one that
//! makes the deviation disappear is named.
//!
//! A fault explains 1 − ‖candidate − faulted‖² / ‖candidate − reference‖² of the deviation, summed over the stages that
//! diverge, each relative to its reference. It is named only if that is nearly all and clearly more than any other fault
//! explains; what it leaves above the floor is explained by further faults on top of it. Otherwise the cause is `unknown`.

use super::Progress;
use super::candidate::{Produced, Values};
use super::counterfactual::{Counterfactual, Step};
use super::fault::Fault;
use super::hypotheses::{Observed, hypotheses};
use super::truth::Stage;
use crate::report::model::{Confidence, Finding, MicrobatchReport, RunnerUp, TensorReport, Verdict};
use ndarray::Array2;
use rayon::prelude::*;
use serde_json::{Map, Value};

/// The most faults that are combined.
const MOST_FAULTS: usize = 3;
/// A named fault explains at least this share of what was left before it.
const NAMED: f64 = 0.8;
/// The next best cause leaves at least this many times as much.
const CLEARLY: f64 = 2.0;
/// Fits this close are one fit.
const EQUAL: f64 = 1.05;

/// What explain works on.
pub struct Case<'a> {
    /// The step.
    pub step: &'a Step<'a>,
    /// Places in `step.microbatches` that are judged.
    pub judged: &'a [usize],
    /// What the candidate has, for each of these.
    pub produced: &'a Produced,
    /// The comparison with the reference, per microbatch.
    pub microbatches: &'a [MicrobatchReport],
    /// The comparison of the accumulated dK.
    pub accumulated: Option<&'a TensorReport>,
}

/// How well a computation fits the candidate.
#[derive(Clone, Copy, Debug)]
struct Fit {
    /// Σ ‖candidate − computed‖² / ‖reference‖² over the diverging stages.
    left: f64,
    /// The largest ratio to the floor that is left in any stage, over what that stage allows.
    worst: f64,
    /// The largest ratio to the floor.
    ratio: f64,
}

impl Case<'_> {
    fn fit(&self, computation: &Counterfactual) -> Fit {
        let mut fit = Fit { left: 0.0, worst: 0.0, ratio: 0.0 };
        let mut total: Option<Array2<f64>> = None;
        for ((&m, stages), report) in self.judged.iter().zip(&self.produced.microbatches).zip(self.microbatches) {
            let outcome = computation.replay(self.step, m);
            for (stage, values) in stages {
                if let Some(tensor) = report.tensors.iter().find(|t| t.name == stage.name()) {
                    fit.add(tensor, values, &outcome.stage(*stage));
                }
            }
            if self.accumulated.is_some() {
                let own = outcome.stage(Stage::DUnembedding);
                computation.accumulate(self.step, m, &own, total.get_or_insert_with(|| Array2::zeros(own.dim())));
            }
        }
        if let (Some(values), Some(tensor), Some(total)) = (&self.produced.accumulated, self.accumulated, &total) {
            fit.add(tensor, values, total);
        }
        fit
    }

    fn observed(&self) -> Observed<'_> {
        Observed { step: self.step, produced: self.produced, microbatches: self.microbatches, accumulated: self.accumulated }
    }

    /// What explains the divergence, best first.
    pub fn explain(&self, progress: &dyn Progress) -> Vec<Finding> {
        if self.nonfinite() {
            return vec![self.nonfinite_finding()];
        }
        let base = self.fit(&Counterfactual::default());
        let mut findings: Vec<Finding> = Vec::new();
        let (mut applied, mut current) = (Counterfactual::default(), base);
        let mut named: Vec<&str> = Vec::new();
        while findings.len() < MOST_FAULTS && current.worst > 1.0 {
            let candidates: Vec<Fault> =
                hypotheses(&self.observed()).into_iter().filter(|f| !named.contains(&f.slug())).collect();
            progress.begin("testing faults of the catalogue", candidates.len() as u64);
            let mut fits: Vec<(Fault, Fit)> = candidates
                .par_iter()
                .map(|fault| {
                    let mut computation = applied;
                    fault.apply(&mut computation, self.step);
                    let fit = if computation == applied { current } else { self.fit(&computation) };
                    progress.advance(1);
                    (*fault, fit)
                })
                .collect();
            fits.sort_by(|a, b| a.1.left.total_cmp(&b.1.left));
            let Some(finding) = self.name(&fits, &base, &current, findings.len() + 1) else { break };
            let (fault, fit) = fits[finding.1];
            fault.apply(&mut applied, self.step);
            named.push(fault.slug());
            current = fit;
            findings.push(finding.0);
        }
        if current.worst > 1.0 {
            findings.push(self.unknown(&base, &current, findings.len() + 1));
        }
        findings
    }

    /// The finding that the best fit makes, if it is good enough, and its place among `fits`, which come best first.
    fn name(&self, fits: &[(Fault, Fit)], base: &Fit, current: &Fit, rank: usize) -> Option<(Finding, usize)> {
        let best = fits.first()?.1;
        if 1.0 - best.left / current.left < NAMED {
            return None;
        }
        // Among equal fits the most specific fault is named.
        let (place, &(fault, fit)) = fits
            .iter()
            .enumerate()
            .take_while(|(_, (_, f))| f.left <= best.left * EQUAL)
            .min_by_key(|(_, (f, _))| f.is_generic())?;
        let equal = |f: &Fit| f.left <= fit.left * EQUAL || (f.worst <= 1.0 && f.left <= fit.left * CLEARLY);
        let mut same: Vec<String> = Vec::new();
        for (other, _) in fits.iter().filter(|(o, f)| o.slug() != fault.slug() && equal(f)) {
            if !same.contains(&other.slug().to_owned()) {
                same.push(other.slug().into());
            }
        }
        let runner_up = fits.iter().find(|(other, _)| other.slug() != fault.slug() && !same.contains(&other.slug().to_owned()));
        let clear = runner_up.is_none_or(|(_, other)| other.left >= fit.left * CLEARLY);
        let at_floor = fit.worst <= 1.0;
        if !clear && !at_floor {
            return None;
        }
        let alone = |fit: &Fit| 1.0 - fit.left / base.left;
        let confidence = match (at_floor, clear && same.is_empty()) {
            (true, true) => Confidence::Certain,
            (_, true) => Confidence::Likely,
            _ => Confidence::Possible,
        };
        let explained = if rank == 1 {
            alone(&fit)
        } else {
            let mut only = Counterfactual::default();
            fault.apply(&mut only, self.step);
            alone(&self.fit(&only))
        };
        let finding = Finding {
            rank,
            cause: fault.slug().into(),
            title: fault.entry().title.into(),
            explained,
            remaining_ratio: fit.ratio,
            confidence,
            parameters: parameters(&fault, &fit, fits),
            evidence: self.evidence(&fault, &fit, current, runner_up),
            remedy: fault.entry().remedy.into(),
            runner_up: runner_up.map(|(other, fit)| RunnerUp { cause: other.slug().into(), explained: alone(fit) }),
            indistinguishable_from: same,
        };
        Some((finding, place))
    }

    fn evidence(&self, fault: &Fault, fit: &Fit, before: &Fit, runner_up: Option<&(Fault, Fit)>) -> String {
        let mut text = format!(
            "applied to the reference on this very data, it removes {:.2} % of the squared deviation: from {:.1} times the floor to {:.2}",
            100.0 * (1.0 - fit.left / before.left),
            before.ratio,
            fit.ratio,
        );
        if let Some((other, other_fit)) = runner_up {
            text += &format!("; the next best, {}, leaves {:.1} times the floor", other.slug(), other_fit.ratio);
        }
        text + &format!(". Such a fault leaves: {}", fault.entry().leaves_behind)
    }

    fn nonfinite(&self) -> bool {
        self.tensors().any(|(_, t)| t.nonfinite > 0)
    }

    fn tensors(&self) -> impl Iterator<Item = (Option<usize>, &TensorReport)> {
        let of_microbatches = self.microbatches.iter().flat_map(|m| m.tensors.iter().map(|t| (Some(m.microbatch), t)));
        of_microbatches.chain(self.accumulated.map(|t| (None, t)))
    }

    fn nonfinite_finding(&self) -> Finding {
        let all: usize = self.tensors().map(|(_, t)| t.nonfinite).sum();
        let (m, first) = self.tensors().find(|(_, t)| t.nonfinite > 0).expect("asked for only if there is one");
        Finding {
            rank: 1,
            cause: "nonfinite".into(),
            title: "the candidate is not finite where the reference is".into(),
            explained: 0.0,
            remaining_ratio: first.ratio,
            confidence: Confidence::Certain,
            parameters: Map::new(),
            evidence: format!(
                "{all} elements are NaN or infinite, first in {} of {}; the inputs are finite and so is the reference: good in, bad out",
                first.name,
                m.map_or("the step".to_owned(), |m| format!("microbatch {m}")),
            ),
            remedy:
                "look for 0/0 where all tokens are masked, −∞ − (−∞) in masked columns, and overflow of exp without its maximum"
                    .into(),
            runner_up: None,
            indistinguishable_from: vec![],
        }
    }

    fn unknown(&self, base: &Fit, current: &Fit, rank: usize) -> Finding {
        let diverging: Vec<String> = self
            .tensors()
            .filter(|(_, t)| t.verdict == Verdict::Diverge)
            .map(|(m, t)| {
                let pattern = t.pattern.as_ref().map_or("uniform", |p| &p.kind);
                format!(
                    "{}{} ({pattern}, {:.1} × floor)",
                    t.name,
                    m.map_or(String::new(), |m| format!(" of microbatch {m}")),
                    t.ratio
                )
            })
            .collect();
        Finding {
            rank,
            cause: "unknown".into(),
            title: "no fault of the catalogue explains this".into(),
            explained: 0.0,
            remaining_ratio: current.ratio,
            confidence: Confidence::Possible,
            parameters: Map::new(),
            evidence: format!(
                "{:.1} % of the squared deviation is left by the best explanation; it lies in {}",
                100.0 * current.left / base.left,
                diverging.join(", ")
            ),
            remedy: "record the inner stages (lse, label logits, the parts of dQ and dK) to see where it enters".into(),
            runner_up: None,
            indistinguishable_from: vec![],
        }
    }
}

impl Fit {
    fn add(&mut self, tensor: &TensorReport, Values { values: candidate, precision }: &Values, computed: &Array2<f64>) {
        let deviation = candidate.iter().zip(computed).map(|(c, f)| (c - f).powi(2)).sum::<f64>().sqrt();
        let norm = |x: &Array2<f64>| x.iter().map(|x| x * x).sum::<f64>().sqrt();
        // A reference of 0 has no floor but a final rounding's; the candidate gives the size.
        let (size, floor) = match tensor.noise_floor {
            Some(floor) => (tensor.reference_norm, floor * tensor.reference_norm),
            None => (norm(candidate), precision.unit_roundoff() * norm(candidate)),
        };
        if tensor.verdict == Verdict::Diverge {
            self.left += (deviation / size).powi(2);
        }
        // A gradient that a fault scales carries a floor scaled alike.
        let ratio = deviation / (floor * (norm(computed) / size).max(SMALLEST_SCALE));
        self.ratio = self.ratio.max(ratio);
        self.worst = self.worst.max(ratio / tensor.ratio_limit);
    }
}

/// How far a floor shrinks with the gradient.
const SMALLEST_SCALE: f64 = 1e-3;

/// The fault's parameters; where other values fit as well, those too.
fn parameters(fault: &Fault, fit: &Fit, fits: &[(Fault, Fit)]) -> Map<String, Value> {
    let mut out = fault.parameters();
    let alike: Vec<Map<String, Value>> = fits
        .iter()
        .filter(|(f, other)| f.slug() == fault.slug() && other.left <= fit.left * EQUAL)
        .map(|(f, _)| f.parameters())
        .collect();
    for name in out.keys().cloned().collect::<Vec<_>>() {
        let mut values: Vec<Value> = alike.iter().filter_map(|p| p.get(&name).cloned()).collect();
        values.dedup();
        if values.len() > 1 {
            out.insert(format!("{name}_candidates"), Value::Array(values));
        }
    }
    out
}
