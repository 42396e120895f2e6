//! Why a candidate diverges: each fault of the catalogue is applied to the reference on this very data, and the one that
//! makes the deviation disappear is named.
//!
//! A fault explains 1 − ‖candidate − faulted‖² / ‖candidate − reference‖² of the deviation, summed over the stages that
//! diverge, each relative to its reference. It is named only if that is nearly all and clearly more than any other fault
//! explains; what it leaves above the floor is explained by further faults on top of it. Otherwise the cause is `unknown`.

mod hypotheses;

pub(super) use hypotheses::TILES;

use super::Progress;
use super::candidate::{Produced, Values};
use super::fault::{Fault, Touches};
use super::replay::{Counterfactual, Outcome, Wanted};
use super::step::Step;
use super::truth::Stage;
use hypotheses::{Observed, hypotheses};
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

/// How well a computation fits one tensor of the candidate.
#[derive(Clone, Copy, Debug, Default)]
struct TensorFit {
    /// ‖candidate − computed‖² / ‖reference‖²; of a tensor that agrees, only what exceeds its limit.
    left: f64,
    /// ‖candidate − computed‖ over the floor.
    ratio: f64,
    /// The same over what the tensor's verdict allows.
    of_limit: f64,
}

/// How well a computation fits the candidate, tensor by tensor.
#[derive(Clone, Debug)]
struct Fit {
    /// Per judged microbatch, in the order of its tensors.
    microbatches: Vec<Vec<TensorFit>>,
    accumulated: Option<TensorFit>,
}

impl Fit {
    fn all(&self) -> impl Iterator<Item = &TensorFit> {
        self.microbatches.iter().flatten().chain(&self.accumulated)
    }

    fn left(&self) -> f64 {
        self.all().map(|t| t.left).sum()
    }

    fn left_in(&self, place: usize) -> f64 {
        self.microbatches[place].iter().map(|t| t.left).sum()
    }

    fn ratio(&self) -> f64 {
        self.all().map(|t| t.ratio).fold(0.0, f64::max)
    }

    fn at_floor(&self) -> bool {
        self.all().all(|t| t.of_limit <= 1.0)
    }

    /// Whether what is left may be the fault itself in another order of summation.
    fn near_floor(&self) -> bool {
        self.all().all(|t| t.of_limit <= 2.0)
    }
}

impl Case<'_> {
    /// How `computation` fits. Where it does not touch a tensor, the fit is that of `otherwise`.
    fn fit(&self, computation: &Counterfactual, touches: Touches, otherwise: Option<&Fit>) -> Fit {
        let mut total: Option<Array2<f64>> = None;
        let of_step = self.accumulated.filter(|_| touches.accumulated);
        let wanted = Wanted { d_hidden: touches.d_hidden, d_unembedding: touches.d_unembedding || of_step.is_some() };
        let mut microbatches = Vec::new();
        for (place, &m) in self.judged.iter().enumerate() {
            let outcome = computation.replay(self.step, m, wanted);
            if of_step.is_some() {
                let own = outcome.stage(Stage::DUnembedding);
                computation.accumulate(self.step, m, &own, total.get_or_insert_with(|| Array2::zeros(own.dim())));
            }
            microbatches.push(self.fit_microbatch(place, &outcome, touches, otherwise));
        }
        let accumulated = match (&self.produced.accumulated, of_step, &total) {
            (Some(values), Some(tensor), Some(total)) => Some(TensorFit::new(tensor, values, total)),
            _ => otherwise.and_then(|o| o.accumulated),
        };
        Fit { microbatches, accumulated }
    }

    fn fit_microbatch(&self, place: usize, outcome: &Outcome, touches: Touches, otherwise: Option<&Fit>) -> Vec<TensorFit> {
        let stages = self.produced.microbatches[place].iter().zip(&self.microbatches[place].tensors);
        stages
            .enumerate()
            .map(|(i, ((&stage, values), tensor))| match otherwise {
                Some(fit) if !touches.stage(stage) => fit.microbatches[place][i],
                _ => TensorFit::new(tensor, values, &outcome.stage(stage)),
            })
            .collect()
    }

    /// Those of `faults` that explain a good part of what is left where most is left, judged by that microbatch alone.
    fn promising(&self, faults: Vec<Fault>, applied: &Counterfactual, current: &Fit, progress: &dyn Progress) -> Vec<Fault> {
        const GOOD_PART: f64 = 0.6;
        const AT_LEAST: usize = 4;
        let place = (0..self.judged.len()).max_by(|&a, &b| current.left_in(a).total_cmp(&current.left_in(b)));
        let Some(place) = place.filter(|&place| current.left_in(place) > 0.0) else { return faults };
        let mut rated: Vec<(f64, Fault)> = faults
            .into_par_iter()
            .map(|fault| {
                let mut computation = *applied;
                fault.apply(&mut computation, self.step);
                let touches = fault.touches();
                let wanted = Wanted { d_hidden: touches.d_hidden, d_unembedding: touches.d_unembedding };
                progress.advance(1);
                if !touches.forward && !touches.d_hidden && !touches.d_unembedding {
                    return (0.0, fault);
                }
                let outcome = computation.replay(self.step, self.judged[place], wanted);
                let fits = self.fit_microbatch(place, &outcome, touches, Some(current));
                (fits.iter().map(|t| t.left).sum::<f64>() / current.left_in(place), fault)
            })
            .collect();
        rated.sort_by(|a, b| a.0.total_cmp(&b.0));
        let keep = rated.iter().take_while(|(left, _)| *left <= GOOD_PART).count().max(AT_LEAST);
        rated.into_iter().take(keep).map(|(_, fault)| fault).collect()
    }

    fn observed(&self) -> Observed<'_> {
        Observed { step: self.step, produced: self.produced, microbatches: self.microbatches, accumulated: self.accumulated }
    }

    /// What explains the divergence, best first.
    pub fn explain(&self, progress: &dyn Progress) -> Vec<Finding> {
        if self.nonfinite() {
            return vec![self.nonfinite_finding()];
        }
        let mut base = self.fit(&Counterfactual::default(), Touches::ALL, None);
        // A tensor may diverge with its norm at the floor: by a factor, or in few elements.
        let fits = base.microbatches.iter_mut().flatten().chain(&mut base.accumulated);
        for (fit, _) in fits.zip(self.tensors()).filter(|(_, (_, t))| t.verdict == Verdict::Diverge) {
            fit.of_limit = f64::INFINITY;
        }
        let mut findings: Vec<Finding> = Vec::new();
        let mut chosen: Vec<Fault> = Vec::new();
        let mut current = base.clone();
        while chosen.len() < MOST_FAULTS && !current.at_floor() {
            let mut faults = hypotheses(&self.observed());
            faults.retain(|f| chosen.iter().all(|c| c.slug() != f.slug()));
            progress.begin("testing the catalogue's faults", faults.len() as u64);
            let applied = self.composed(&chosen);
            let faults = self.promising(faults, &applied, &current, progress);
            progress.begin("comparing the best of them", faults.len() as u64);
            let mut fits: Vec<(Fault, Fit)> = faults
                .par_iter()
                .map(|fault| {
                    let mut computation = applied;
                    fault.apply(&mut computation, self.step);
                    let fit = self.fit(&computation, fault.touches(), Some(&current));
                    progress.advance(1);
                    (*fault, fit)
                })
                .collect();
            fits.sort_by(|a, b| a.1.left().total_cmp(&b.1.left()));
            let Some((finding, place)) = self.name(&fits, &base, &current, findings.len() + 1) else { break };
            let (fault, fit) = fits.swap_remove(place);
            chosen.push(fault);
            findings.push(finding);
            current = fit;
            if chosen.len() > 1 {
                current = self.refine(&mut chosen, &mut findings, &base, current);
            }
        }
        if current.at_floor() {
            return findings;
        }
        // What does not come down to the floor may be something else altogether: it is not named.
        let nearest = findings.first().map(|f| RunnerUp { cause: f.cause.clone(), explained: f.explained });
        if !current.near_floor() {
            findings.clear();
        }
        let rank = findings.len() + 1;
        findings.push(self.unknown(&base, &current, rank, nearest));
        findings
    }

    /// What can be said of a divergence that was seen in some rows of the gradients, and not replayed.
    pub fn unexplained(&self) -> Vec<Finding> {
        if self.nonfinite() {
            return vec![self.nonfinite_finding()];
        }
        vec![Finding {
            rank: 1,
            cause: "unknown".into(),
            title: "a sample was judged, and in a sample no cause is sought".into(),
            explained: 0.0,
            remaining_ratio: self.tensors().map(|(_, t)| t.ratio).fold(0.0, f64::max),
            confidence: Confidence::Possible,
            parameters: Map::new(),
            evidence: format!("the deviation lies in {}", self.diverging().join(", ")),
            remedy: "judge it with --full, or one microbatch of it with --full --microbatch N: every fault of the catalogue is then tried".into(),
            runner_up: None,
            indistinguishable_from: vec![],
        }]
    }

    fn composed(&self, faults: &[Fault]) -> Counterfactual {
        let mut computation = Counterfactual::default();
        faults.iter().for_each(|fault| fault.apply(&mut computation, self.step));
        computation
    }

    /// Fits the parameters of the faults found before again, now that another is known beside them.
    fn refine(&self, chosen: &mut [Fault], findings: &mut [Finding], base: &Fit, mut current: Fit) -> Fit {
        let all = hypotheses(&self.observed());
        for i in 0..chosen.len() - 1 {
            let slug = chosen[i].slug();
            for other in all.iter().filter(|f| f.slug() == slug) {
                let mut faults = chosen.to_vec();
                faults[i] = *other;
                let fit = self.fit(&self.composed(&faults), Touches::ALL, None);
                if fit.left() < current.left() {
                    (chosen[i], current) = (*other, fit);
                }
            }
        }
        for (i, finding) in findings.iter_mut().enumerate() {
            let alone = self.fit(&self.composed(&chosen[i..=i]), Touches::ALL, None);
            let so_far = self.fit(&self.composed(&chosen[..=i]), Touches::ALL, None);
            finding.explained = 1.0 - alone.left() / base.left();
            finding.remaining_ratio = so_far.ratio();
            finding.parameters = chosen[i].parameters();
        }
        current
    }

    /// The finding that the best fit makes, if it is good enough, and its place among `fits`, which come best first.
    fn name(&self, fits: &[(Fault, Fit)], base: &Fit, current: &Fit, rank: usize) -> Option<(Finding, usize)> {
        let best = fits.first()?.1.left();
        if 1.0 - best / current.left() < NAMED {
            return None;
        }
        // Among equal fits the most specific fault is named.
        let (place, (fault, fit)) = fits
            .iter()
            .enumerate()
            .take_while(|(_, (_, f))| f.left() <= best * EQUAL)
            .min_by_key(|(_, (f, _))| f.is_generic())?;
        let left = fit.left();
        let equal = |f: &Fit| f.left() <= left * EQUAL || (f.at_floor() && f.left() <= left * CLEARLY);
        let mut same: Vec<String> = Vec::new();
        for (other, _) in fits.iter().filter(|(o, f)| o.slug() != fault.slug() && equal(f)) {
            if !same.contains(&other.slug().to_owned()) {
                same.push(other.slug().into());
            }
        }
        let runner_up = fits.iter().find(|(other, _)| other.slug() != fault.slug() && !same.contains(&other.slug().to_owned()));
        let clear = runner_up.is_none_or(|(_, other)| other.left() >= left * CLEARLY);
        if !clear && !fit.at_floor() {
            return None;
        }
        let alone = |fit: &Fit| 1.0 - fit.left() / base.left();
        let confidence = match (fit.at_floor(), clear && same.is_empty()) {
            (true, true) => Confidence::Certain,
            (_, true) => Confidence::Likely,
            _ => Confidence::Possible,
        };
        let explained = if rank == 1 {
            alone(fit)
        } else {
            let mut only = Counterfactual::default();
            fault.apply(&mut only, self.step);
            alone(&self.fit(&only, fault.touches(), Some(base)))
        };
        let finding = Finding {
            rank,
            cause: fault.slug().into(),
            title: fault.entry().title.into(),
            explained,
            remaining_ratio: fit.ratio(),
            confidence,
            parameters: parameters(fault, left, fits),
            evidence: evidence(fault, fit, current, runner_up),
            remedy: fault.entry().remedy.into(),
            runner_up: runner_up.map(|(other, fit)| RunnerUp { cause: other.slug().into(), explained: alone(fit) }),
            indistinguishable_from: same,
        };
        Some((finding, place))
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

    /// Every tensor that diverges, in words.
    fn diverging(&self) -> Vec<String> {
        self.tensors()
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
            .collect()
    }

    fn unknown(&self, base: &Fit, current: &Fit, rank: usize, nearest: Option<RunnerUp>) -> Finding {
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
        }
    }
}

impl TensorFit {
    fn new(tensor: &TensorReport, Values { values: candidate, precision }: &Values, computed: &Array2<f64>) -> Self {
        let deviation = candidate.iter().zip(computed).map(|(c, f)| (c - f).powi(2)).sum::<f64>().sqrt();
        let norm = |x: &Array2<f64>| x.iter().map(|x| x * x).sum::<f64>().sqrt();
        // A reference of 0 has no floor but a final rounding's; the candidate gives the size.
        let (size, floor) = match tensor.noise_floor {
            Some(floor) => (tensor.reference_norm, floor * tensor.reference_norm),
            None => (norm(candidate), precision.unit_roundoff() * norm(candidate)),
        };
        if deviation == 0.0 || size == 0.0 {
            return Self::default();
        }
        let excess = match tensor.verdict {
            Verdict::Diverge => deviation,
            Verdict::Agree => (deviation - tensor.ratio_limit * floor).max(0.0),
        };
        if !deviation.is_finite() {
            return Self { left: f64::INFINITY, ratio: f64::INFINITY, of_limit: f64::INFINITY };
        }
        // A gradient that a fault scales carries a floor scaled alike.
        let ratio = deviation / (floor * (norm(computed) / size).max(SMALLEST_SCALE));
        Self { left: (excess / size).powi(2), ratio, of_limit: ratio / tensor.ratio_limit }
    }
}

/// How far a floor shrinks with the gradient.
const SMALLEST_SCALE: f64 = 1e-3;

fn evidence(fault: &Fault, fit: &Fit, before: &Fit, runner_up: Option<&(Fault, Fit)>) -> String {
    let mut text = format!(
        "applied to the reference on this very data, it removes {:.2} % of the squared deviation: from {:.1} times the floor to {:.2}",
        100.0 * (1.0 - fit.left() / before.left()),
        before.ratio(),
        fit.ratio(),
    );
    if let Some((other, other_fit)) = runner_up {
        text += &format!("; the next best, {}, leaves {:.1} times the floor", other.slug(), other_fit.ratio());
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
