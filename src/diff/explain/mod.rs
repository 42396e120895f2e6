//! Why a candidate diverges: each fault of the catalogue is applied to the reference on this very data, and the one that
//! makes the deviation disappear is named.
//!
//! A fault explains 1 − ‖candidate − faulted‖² / ‖candidate − reference‖² of the deviation, summed over the stages that
//! diverge, each relative to its reference. It is named only if that is nearly all and clearly more than any other fault
//! explains; what it leaves above the floor is explained by further faults on top of it. Otherwise the cause is `unknown`.
//!
//! Every hypothesis is tried on few rows ([`excerpts`]), those that leave little on more; what is named is then replayed on
//! all rows that are judged.

mod bench;
mod excerpts;
mod finding;
mod hypotheses;
mod lse;
mod search;
mod shards;
mod significand;
mod threshold;

pub(super) use hypotheses::TILES;

use super::Progress;
use super::candidate::Produced;
use super::fault::Fault;
use super::replay::{Counterfactual, Excerpt, Rows};
use super::step::Step;
use super::truth::{Stage, Truth};
use crate::report::model::{Confidence, Finding, MicrobatchReport, RunnerUp, TensorReport, Verdict};
use fused_xent_kernels::floor::Tolerance;
use fused_xent_kernels::problem::Label;
use ndarray::Array2;
use search::Search;
use std::collections::BTreeMap;

/// What a fault explains that no honest rounding is taken for.
const PRECISELY: f64 = 0.99;

/// The most faults that are combined.
const MOST_FAULTS: usize = 3;

/// What explain works on.
pub struct Case<'a> {
    /// The step.
    pub step: &'a Step<'a>,
    /// Places in `step.microbatches` that are judged.
    pub judged: &'a [usize],
    /// The reference of each microbatch of the step that is judged.
    pub truths: &'a [Option<Truth>],
    /// What the candidate has, for each judged microbatch.
    pub produced: &'a Produced,
    /// What is tolerated of it.
    pub tolerances: &'a Tolerances,
    /// The comparison with the reference, per microbatch.
    pub microbatches: &'a [MicrobatchReport],
    /// The comparison of the accumulated dK.
    pub accumulated: Option<&'a TensorReport>,
}

/// What is tolerated of a candidate's tensors.
#[derive(Clone, Debug, Default)]
pub struct Tolerances {
    /// Per judged microbatch.
    pub microbatches: Vec<BTreeMap<Stage, Tolerance>>,
    /// Of the accumulated dK, with its exact value.
    pub accumulated: Option<(Tolerance, Array2<f64>)>,
}

impl<'a> Case<'a> {
    fn truth(&self, place: usize) -> &'a Truth {
        self.truths[self.judged[place]].as_ref().expect("every judged microbatch has its truth")
    }

    /// The rows of a stage that are judged; `None` if all.
    fn rows(&self, place: usize, stage: Stage) -> Option<&'a [usize]> {
        self.truth(place).rows(stage)
    }

    /// Whether a token of a judged microbatch has a gradient.
    fn takes_part(&self, place: usize, token: usize) -> bool {
        let problem = &self.step.microbatches[self.judged[place]].problem;
        problem.labels()[token] != Label::Masked && problem.weights()[token] != 0.0
    }

    /// Whether a stage of a judged microbatch diverges.
    fn diverges(&self, place: usize, stage: Stage) -> bool {
        self.microbatches[place].tensors.iter().any(|t| t.name == stage.name() && t.verdict == Verdict::Diverge)
    }

    fn accumulated_diverges(&self) -> bool {
        self.accumulated.is_some_and(|t| t.verdict == Verdict::Diverge)
    }

    /// Where rows of the whole lie among the judged rows of a stage.
    fn value_rows_of(&self, place: usize, stage: Stage, numbers: impl Iterator<Item = usize>) -> impl Iterator<Item = usize> {
        let judged = self.rows(place, stage);
        numbers.map(move |n| judged.map_or(n, |rows| rows.binary_search(&n).expect("an excerpt's rows are judged")))
    }

    /// Where `rows` of an excerpt lie among the judged rows of a stage.
    fn value_rows(&self, place: usize, stage: Stage, excerpt: &Excerpt, rows: &Rows) -> Vec<usize> {
        let (numbers, places) = match stage.rows_are() {
            super::truth::RowsAre::Tokens => (excerpt.sample().tokens(), &rows.tokens),
            super::truth::RowsAre::VocabIds => (excerpt.sample().ids(), &rows.ids),
        };
        self.value_rows_of(place, stage, places.iter().map(|&place| numbers[place])).collect()
    }

    fn composed(&self, faults: &[Fault]) -> Counterfactual {
        let mut computation = Counterfactual::default();
        faults.iter().for_each(|fault| fault.apply(&mut computation, self.step));
        computation
    }

    /// The fault that explains a divergence from this contract precisely, though a more generous one would allow it. An honest
    /// rounding is no such: its error has as many directions as there are dlogits, and the fault's, which has no parameter
    /// to fit, would have to meet it in all of them to a tenth.
    pub fn precise_fault(&self, progress: &dyn Progress) -> Option<Finding> {
        let mut search = Search::new(self, progress);
        let base = search.base();
        let mut faults = search.hypotheses(&[]);
        faults.retain(|fault| matches!(fault, Fault::LseBf16(_)) || fault.slug().starts_with("logits-bf16"));
        let fits = search.rank(faults, &[], &base);
        let (finding, _) = search.name(&fits, &base, 1)?;
        (finding.confidence == Confidence::Certain && finding.explained > PRECISELY).then_some(finding)
    }

    /// What explains the divergence, best first.
    pub fn explain(&self, progress: &dyn Progress) -> Vec<Finding> {
        if self.nonfinite() {
            return vec![self.nonfinite_finding()];
        }
        let mut search = Search::new(self, progress);
        let base = search.base();
        let mut findings: Vec<Finding> = Vec::new();
        let mut chosen: Vec<Fault> = Vec::new();
        let mut current = base.clone();
        while chosen.len() < MOST_FAULTS && !current.at_floor() {
            let faults = search.hypotheses(&chosen);
            let mut fits = search.rank(faults, &chosen, &current);
            let Some((finding, place)) = search.name(&fits, &current, findings.len() + 1) else {
                let pair = if chosen.is_empty() { search.pair(&fits, &current) } else { None };
                (chosen, findings, current) = pair.unwrap_or((chosen, findings, current));
                break;
            };
            let (fault, fit) = fits.swap_remove(place);
            chosen.push(fault);
            findings.push(finding);
            current = fit;
            if chosen.len() > 1 {
                current = search.refine(&mut chosen, &mut findings, current);
            }
        }
        let (base, current) = search.on_all_rows(&chosen, &mut findings, &current).unwrap_or((base, current));
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
}
