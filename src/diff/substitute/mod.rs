//! Where an error enters: every stage that diverges, computed again from what the candidate itself has of the stages before it.
//!
//! ```text
//! own        C − R     the candidate's value less the reference's
//! inherited  X − R     X: the reference's computation of this stage, fed with the candidate's own inputs of it that diverge
//! entering   C − X     what is not inherited
//! ```
//! What of `entering` is above the floor came in between the recorded inputs and this stage. The inputs of a stage are those
//! recorded stages that it is computed from directly: lse, the label logits and their cotangents, the parts of a gradient, the
//! microbatches' dK of the accumulated one. The other way round, a stage is repaired: the reference's value is put in its place,
//! and what it did to the stages after it is taken off them.
//!
//! The backward is computed again for some rows alone, at most [`MOST_ROWS`] of each gradient, half of them those furthest off.
//! What no recorded stage tells apart, the direction of a row's error may ([`along`]).

mod along;
mod cotangent;
mod distance;

use super::explain::Case;
use super::truth::{RowsAre, Stage, Truth};
use crate::report::model::{Divergence, TensorReport, Verdict};
use crate::report::substitution::{Repair, StageInput, Substituted, Substitution};
use cotangent::Cotangent;
use distance::{Compared, Distance, grown, squared_error};
use fused_xent_kernels::contract::Precision;
use fused_xent_kernels::floor::Tolerance;
use fused_xent_kernels::problem::{Label, Problem, Sample};
use fused_xent_kernels::reference::{self, Cotangents, Gradients};
use ndarray::{Array2, ArrayView2, Axis};
use std::collections::BTreeMap;

pub(super) use cotangent::NAMES as COTANGENTS;

/// Rows of a gradient that are computed again.
const MOST_ROWS: usize = 256;
/// Microbatches that are looked at: the first that diverges, and those furthest off.
const MOST_MICROBATCHES: usize = 4;

/// The lse part, the label part and the sum of dQ and of dK.
const GRADIENTS: [[Stage; 3]; 2] = [
    [Stage::DHiddenLse, Stage::DHiddenLabel, Stage::DHidden],
    [Stage::DUnembeddingLse, Stage::DUnembeddingLabel, Stage::DUnembedding],
];

/// What substitution says of a candidate that diverges; `None` if no stage of it can be looked at.
pub(super) fn substitute(case: &Case) -> Option<Substitution> {
    let ids = id_places(case);
    let looked_at = looked_at(case);
    let microbatches: Vec<Microbatch> = looked_at.iter().filter_map(|&place| Microbatch::new(case, place, &ids)).collect();
    let mut out = Substitution::default();
    // What the candidate's own value of a stage changes in the accumulated dK, over all microbatches.
    let mut changes: BTreeMap<&'static str, Array2<f64>> = BTreeMap::new();
    for microbatch in &microbatches {
        microbatch.rungs(&mut out.rungs);
        microbatch.repairs(&mut out.repairs, &mut changes);
    }
    if let Some(over_step) = OverStep::new(case, &ids) {
        out.rungs.push(over_step.rung(&mut changes));
        // Those in microbatches that are not looked at are not known.
        changes.retain(|&stage, _| stage == Stage::DUnembedding.name() || microbatches.len() < MOST_MICROBATCHES);
        out.repairs.extend(changes.into_iter().map(|(stage, change)| over_step.repair(stage, change)));
    }
    out.rungs.sort_by_key(|rung| order(&rung.stage));
    (!out.rungs.is_empty()).then_some(out)
}

/// The first divergence, where it enters.
///
/// Of the stages that diverge it is the first that does not have it all from its inputs; the first of all if each has.
pub(super) fn first_divergence(substitution: &Substitution, first: Option<Divergence>) -> Option<Divergence> {
    let enters = || substitution.rungs.iter().filter(|rung| rung.enters);
    let compared = |rung: &&Substituted| !COTANGENTS.contains(&rung.stage.as_str());
    let Some(rung) = enters().find(compared) else {
        return first.map(|first| Divergence { enters: enters().next().map(|rung| rung.stage.clone()), ..first });
    };
    Some(Divergence { microbatch: rung.microbatch, stage: rung.stage.clone(), enters: None })
}

/// The place of a stage in the order of the computation.
fn order(stage: &str) -> usize {
    const ORDER: [&str; 12] = [
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
        "accumulated_d_unembedding",
    ];
    ORDER.iter().position(|name| *name == stage).unwrap_or(ORDER.len())
}

fn diverges(report: &TensorReport) -> bool {
    report.verdict == Verdict::Diverge
}

/// Places among the judged microbatches: the first that diverges, and those furthest off.
fn looked_at(case: &Case) -> Vec<usize> {
    let off = |place: usize| {
        let bad = case.microbatches[place].tensors.iter().filter(|t| diverges(t));
        bad.map(|t| if t.ratio.is_nan() { f64::INFINITY } else { t.ratio / t.ratio_limit }).reduce(f64::max)
    };
    let mut bad: Vec<(usize, f64)> = (0..case.microbatches.len()).filter_map(|place| Some((place, off(place)?))).collect();
    if let Some((_, others)) = bad.split_first_mut() {
        others.sort_by(|a, b| b.1.total_cmp(&a.1));
    }
    let mut places: Vec<usize> = bad.into_iter().map(|(place, _)| place).take(MOST_MICROBATCHES).collect();
    places.sort_unstable();
    places
}

/// The places of the rows that are looked at, of those judged: half of them the furthest off.
fn some_places(squared: &[f64]) -> Vec<usize> {
    if squared.len() <= MOST_ROWS {
        return (0..squared.len()).collect();
    }
    let mut worst: Vec<usize> = (0..squared.len()).collect();
    worst.sort_by(|&a, &b| squared[b].total_cmp(&squared[a]));
    let even = (0..MOST_ROWS / 2).map(|i| i * squared.len() / (MOST_ROWS / 2));
    let mut places: Vec<usize> = worst[..MOST_ROWS / 2].iter().copied().chain(even).collect();
    places.sort_unstable();
    places.dedup();
    places
}

/// The rows of dK, the same in all microbatches.
fn id_places(case: &Case) -> Vec<usize> {
    let mut sum: Vec<f64> = Vec::new();
    let mut add = |squared: Vec<f64>| {
        sum.resize(squared.len(), 0.0);
        sum.iter_mut().zip(squared).for_each(|(sum, squared)| *sum += squared);
    };
    if let (Some(values), Some((_, reference))) = (&case.produced.accumulated, &case.tolerances.accumulated) {
        add(squared_error(values.values.view(), reference.view()));
    }
    for (place, stages) in case.produced.microbatches.iter().enumerate() {
        for stage in GRADIENTS[1] {
            if let Some(values) = stages.get(&stage) {
                add(squared_error(values.values.view(), truth(case, place).outcome.stage(stage).view()));
            }
        }
    }
    some_places(&sum)
}

fn truth<'a>(case: &Case<'a>, place: usize) -> &'a Truth {
    case.truths[case.judged[place]].as_ref().expect("every judged microbatch has its truth")
}

fn report<'a>(case: &Case<'a>, place: usize, stage: Stage) -> Option<&'a TensorReport> {
    case.microbatches[place].tensors.iter().find(|t| t.name == stage.name())
}

/// What the backward is fed with, where it is not what the reference has: [N] each.
#[derive(Clone, Copy, Default)]
struct Fed<'a> {
    lse: Option<&'a [f64]>,
    of_lse: Option<&'a [f64]>,
    of_label: Option<&'a [f64]>,
}

impl Fed<'_> {
    fn anything(&self) -> bool {
        self.lse.is_some() || self.of_lse.is_some() || self.of_label.is_some()
    }
}

/// A microbatch in which something diverges.
struct Microbatch<'a> {
    case: &'a Case<'a>,
    place: usize,
    problem: &'a Problem<'a>,
    truth: &'a Truth,
    /// Places among the judged rows of dQ, and of dK, and their numbers in the whole.
    places: [Vec<usize>; 2],
    sample: Sample,
    /// The lse that was recorded, if it diverges.
    lse: Option<Vec<f64>>,
    /// The cotangents that were recorded, of lse and of the label logits.
    cotangents: [Option<Cotangent>; 2],
}

impl<'a> Microbatch<'a> {
    fn new(case: &'a Case<'a>, place: usize, ids: &[usize]) -> Option<Self> {
        let m = case.judged[place];
        let (problem, truth) = (&case.step.microbatches[m].problem, truth(case, place));
        let stages = &case.produced.microbatches[place];
        let of_tokens = GRADIENTS[0].iter().rev().find_map(|stage| Some((*stage, stages.get(stage)?)));
        let tokens = of_tokens.map_or(vec![], |(stage, values)| {
            some_places(&squared_error(values.values.view(), truth.outcome.stage(stage).view()))
        });
        let has_dk = GRADIENTS[1].iter().any(|stage| stages.contains_key(stage));
        let ids = if has_dk { ids.to_vec() } else { vec![] };
        let numbers = |places: &[usize], stage| -> Vec<usize> {
            let rows = truth.rows(stage);
            places.iter().map(|&place| rows.map_or(place, |rows| rows[place])).collect()
        };
        let sample = Sample::new(problem.shape(), numbers(&tokens, Stage::DHidden), numbers(&ids, Stage::DUnembedding)).ok()?;
        let mut out = Self { case, place, problem, truth, places: [tokens, ids], sample, lse: None, cotangents: [None, None] };
        out.lse = out.off(Stage::Lse).then(|| stages[&Stage::Lse].values.column(0).to_vec());
        let recorded = &case.produced.cotangents[place];
        out.cotangents = [
            recorded[0].as_deref().and_then(|values| Cotangent::of_lse(&out, values)),
            recorded[1].as_deref().and_then(|values| Cotangent::of_label(&out, values)),
        ];
        Some(out)
    }

    fn index(&self) -> usize {
        self.case.microbatches[self.place].microbatch
    }

    fn report(&self, stage: Stage) -> Option<&'a TensorReport> {
        report(self.case, self.place, stage)
    }

    /// Whether a stage was recorded, in finite numbers.
    fn has(&self, stage: Stage) -> bool {
        self.report(stage).is_some_and(|t| t.nonfinite == 0)
    }

    /// Whether it was, and diverges.
    fn off(&self, stage: Stage) -> bool {
        self.report(stage).is_some_and(|t| t.nonfinite == 0 && diverges(t))
    }

    fn takes_part(&self, n: usize) -> bool {
        self.problem.labels()[n] != Label::Masked
    }

    /// g, and what it makes of the reference's lse.
    fn weighted(&self) -> Cotangents {
        Cotangents::weighted(self.problem, self.case.step.own_factor(self.case.judged[self.place]))
    }

    /// The rows of a stage that are looked at; `None` if all.
    fn places(&self, stage: Stage) -> Option<&[usize]> {
        match stage {
            Stage::Loss | Stage::Lse | Stage::LabelLogits => None,
            _ => Some(&self.places[usize::from(stage.rows_are() == RowsAre::VocabIds)]),
        }
    }

    fn some(&self, stage: Stage, values: ArrayView2<f64>) -> Array2<f64> {
        self.places(stage).map_or_else(|| values.to_owned(), |places| values.select(Axis(0), places))
    }

    fn candidate(&self, stage: Stage) -> Array2<f64> {
        self.some(stage, self.case.produced.microbatches[self.place][&stage].values.view())
    }

    fn reference(&self, stage: Stage) -> Array2<f64> {
        match GRADIENTS.iter().find(|[.., sum]| *sum == stage) {
            Some([lse, label, _]) => self.reference(*lse) + self.reference(*label),
            None => self.some(stage, self.truth.outcome.stage(stage).view()),
        }
    }

    fn tolerance(&self, stage: Stage) -> Tolerance {
        let tolerance = &self.case.tolerances.microbatches[self.place][&stage];
        self.places(stage).map_or_else(|| tolerance.clone(), |places| tolerance.of_rows(places))
    }

    /// The rows looked at, by what the backward is fed with in place of the reference's.
    fn backward(&self, fed: Fed) -> Option<Gradients> {
        let weighted = self.weighted();
        let lse = fed.lse.unwrap_or(&self.truth.outcome.forward.lse);
        let beyond = |given: Option<&[f64]>, of: fn(reference::RowCotangent) -> f64| {
            let beyond = |(n, &given): (usize, &f64)| given - of(weighted.row(self.problem, n, lse[n]));
            given.map(|given| given.iter().enumerate().map(beyond).collect())
        };
        let cotangents = Cotangents {
            lse: beyond(fed.of_lse, |row| row.p),
            label_logits: beyond(fed.of_label, |row| row.onehot),
            ..weighted.clone()
        };
        reference::backward_rows(self.problem, lse, &cotangents, &self.sample).ok()
    }

    /// What of the backward's inputs the candidate has, and of that what diverges.
    fn fed(&self) -> Fed<'_> {
        let off = |which: usize| self.cotangents[which].as_ref().filter(|c| c.diverges).map(|c| c.values.as_slice());
        // One that was recorded and is right did not follow from this lse.
        let of_lse = off(0).or_else(|| self.lse.as_ref().and(self.cotangents[0].as_ref()).map(|c| c.values.as_slice()));
        Fed { lse: self.lse.as_deref(), of_lse, of_label: off(1) }
    }

    fn rungs(&self, out: &mut Vec<Substituted>) {
        for stage in [Stage::Lse, Stage::LabelLogits].into_iter().filter(|stage| self.off(*stage)) {
            let distance = self.compared(stage, self.reference(stage), vec![]).distance();
            out.push(self.rung(stage, &distance, vec![], vec![]));
        }
        if self.off(Stage::Loss) {
            let inputs = [Stage::Lse, Stage::LabelLogits];
            let expected = self.loss(inputs.map(|stage| self.off(stage)));
            let tolerances: Vec<_> =
                inputs.into_iter().filter(|stage| self.off(*stage)).map(|stage| (self.tolerance(stage), 1.0)).collect();
            let record = inputs.into_iter().filter(|stage| !self.has(*stage)).map(|s| s.name().to_owned()).collect();
            let distance = self.compared(Stage::Loss, expected, tolerances).distance();
            out.push(self.rung(Stage::Loss, &distance, self.inputs(&inputs), record));
        }
        let lse = self.inputs(&[Stage::Lse]);
        out.extend(self.cotangents.iter().flatten().filter(|c| c.diverges).map(|c| c.rung(self, lse.clone())));
        if GRADIENTS.iter().flatten().any(|stage| self.off(*stage)) {
            let fed = self.fed();
            let given = if fed.anything() { self.backward(fed) } else { None };
            GRADIENTS.iter().for_each(|stages| self.gradient(stages, given.as_ref(), out));
        }
    }

    fn inputs(&self, stages: &[Stage]) -> Vec<StageInput> {
        let input = |stage: &Stage| StageInput { stage: stage.name().into(), diverges: self.off(*stage) };
        stages.iter().filter(|stage| self.has(**stage)).map(input).collect()
    }

    /// The loss by the candidate's own lse, and by its own label logits, where that is wanted.
    fn loss(&self, [lse, label_logits]: [bool; 2]) -> Array2<f64> {
        let options = self.problem.options();
        let mut out = self.reference(Stage::Loss);
        if lse {
            let (own, exact) = (self.candidate(Stage::Lse), self.reference(Stage::Lse));
            out = out + &own - &exact + options.z_loss * (&own * &own - &exact * &exact);
        }
        if label_logits {
            out =
                out - (1.0 - options.label_smoothing) * (self.candidate(Stage::LabelLogits) - self.reference(Stage::LabelLogits));
        }
        out
    }

    /// The rungs of dQ or of dK: of its parts, and of their sum.
    fn gradient(&self, stages: &[Stage; 3], given: Option<&Gradients>, out: &mut Vec<Substituted>) {
        let sum = stages[2];
        let of_stage = |gradients: &Gradients, stage: Stage| match stage {
            Stage::DHiddenLse => gradients.hidden.lse.clone(),
            Stage::DHiddenLabel => gradients.hidden.label.clone(),
            Stage::DUnembeddingLse => gradients.unembedding.lse.clone(),
            _ => gradients.unembedding.label.clone(),
        };
        let expected = |stage| given.map_or_else(|| self.reference(stage), |given| of_stage(given, stage));
        let parts = [stages[0], stages[1]];
        let (mut inputs, mut tolerances) = (Vec::new(), Vec::new());
        let mut record: Vec<String> = Vec::new();
        let mut of_parts = [expected(parts[0]), expected(parts[1])];
        for (which, stage) in parts.into_iter().enumerate() {
            let (own_inputs, own_record) = self.inputs_of_part(which);
            if self.off(stage) {
                let distance = self.compared(stage, of_parts[which].clone(), vec![]).distance();
                out.push(self.rung(stage, &distance, own_inputs.clone(), own_record.clone()));
            }
            if self.has(stage) {
                inputs.extend(self.inputs(&[stage]));
                of_parts[which] = if self.off(stage) { self.candidate(stage) } else { self.reference(stage) };
                tolerances.extend(self.off(stage).then(|| (self.tolerance(stage), 1.0)));
            } else {
                inputs.extend(own_inputs);
                record.extend(own_record);
                record.push(stage.name().into());
            }
        }
        if !self.off(sum) {
            return;
        }
        inputs.sort_by_key(|input: &StageInput| order(&input.stage));
        inputs.dedup();
        record.sort_by_key(|name| order(name));
        record.dedup();
        let compared = self.compared_sum(stages, &of_parts, tolerances);
        let mut rung = self.rung(sum, &compared.distance(), inputs, record);
        if rung.enters && parts.iter().all(|stage| self.has(*stage)) {
            let as_recorded = parts.map(|stage| self.candidate(stage));
            rung.set_rounded(&self.compared_sum(stages, &as_recorded, vec![]).distance());
        }
        if rung.enters {
            let (error, floor) = (&compared.candidate - &compared.expected, compared.row_floors());
            let [lse, label] = parts.map(|stage| self.reference(stage));
            rung.along = along::along(&error, [&lse, &label], &floor).map(|(along, _)| along);
            if let Some(along) = rung.along.as_mut().filter(|_| sum == Stage::DUnembedding && given.is_none()) {
                along.as_in_d_hidden = self.as_in_d_hidden(&error, floor.iter().sum());
            }
        }
        out.push(rung);
    }

    /// The share of dK's error that the factors on the rows of dQ account for, where all rows of dQ are judged.
    fn as_in_d_hidden(&self, error: &Array2<f64>, floor: f64) -> Option<f64> {
        let parts = &self.truth.outcome.gradients.hidden;
        if parts.lse.nrows() < self.problem.shape().tokens || !self.off(Stage::DHidden) {
            return None;
        }
        let candidate = &self.case.produced.microbatches[self.place][&Stage::DHidden].values;
        let tolerance = &self.case.tolerances.microbatches[self.place][&Stage::DHidden];
        let floors: Vec<f64> = (0..candidate.nrows()).map(|row| tolerance.l2(row..row + 1).powi(2)).collect();
        let (_, factors) = along::along(&(candidate - &parts.sum()), [&parts.lse, &parts.label], &floors)?;
        let (weighted, lse) = (self.weighted(), &self.truth.outcome.forward.lse);
        let row = |n: usize| weighted.row(self.problem, n, lse[n]);
        let g = weighted.loss.as_ref()?;
        // The label part's factor goes with g, as does the lse part's: what that has beyond is its own.
        let cotangents = Cotangents {
            loss: Some(g.iter().zip(&factors).map(|(g, [_, label])| g * label).collect()),
            lse: Some(factors.iter().enumerate().map(|(n, [lse, label])| (lse - label) * row(n).p).collect()),
            label_logits: None,
        };
        let like = reference::backward_rows(self.problem, lse, &cotangents, &self.sample).ok()?.unembedding.sum();
        let squared = |x: &Array2<f64>| x.iter().map(|x| x * x).sum::<f64>();
        let above = squared(error) - floor;
        (above > 0.0).then(|| 1.0 - ((squared(&(error - &like)) - floor).max(0.0) / above).min(1.0))
    }

    /// What was recorded of what the lse part (0) or the label part (1) of a gradient is computed from, and what was not.
    fn inputs_of_part(&self, which: usize) -> (Vec<StageInput>, Vec<String>) {
        let mut inputs = if which == 0 { self.inputs(&[Stage::Lse]) } else { vec![] };
        let mut record = if which == 0 && inputs.is_empty() { vec!["lse".to_owned()] } else { vec![] };
        match &self.cotangents[which] {
            Some(c) => inputs.push(StageInput { stage: c.name.into(), diverges: c.diverges }),
            None => record.push(COTANGENTS[which].into()),
        }
        (inputs, record)
    }

    /// The stage beside what is expected of it.
    fn compared(&self, stage: Stage, expected: Array2<f64>, inputs: Vec<(Tolerance, f64)>) -> Compared {
        let (candidate, reference) = (self.candidate(stage), self.reference(stage));
        let precision = self.case.produced.microbatches[self.place][&stage].precision;
        let grown = if stage > Stage::LabelLogits { grown([&expected], [&reference]) } else { vec![] };
        Compared { candidate, reference, expected, precision, tolerance: self.tolerance(stage), inputs, grown }
    }

    /// A gradient beside the sum of what is expected of its parts.
    fn compared_sum(&self, stages: &[Stage; 3], parts: &[Array2<f64>; 2], inputs: Vec<(Tolerance, f64)>) -> Compared {
        let [lse, label] = [self.reference(stages[0]), self.reference(stages[1])];
        let grown = grown([&parts[0], &parts[1]], [&lse, &label]);
        Compared { grown, ..self.compared(stages[2], &parts[0] + &parts[1], inputs) }
    }

    fn rung(&self, stage: Stage, distance: &Distance, inputs: Vec<StageInput>, record: Vec<String>) -> Substituted {
        let looked_at = self.places(stage).map(<[usize]>::len);
        let all = self.case.produced.microbatches[self.place][&stage].values.nrows();
        let rows = looked_at.filter(|&rows| rows < all).map(|rows| [rows, all]);
        Substituted::new(Some(self.index()), stage.name(), distance, inputs, record, rows)
    }

    /// What repairing each stage that diverges does to those after it.
    fn repairs(&self, out: &mut Vec<Repair>, changes: &mut BTreeMap<&'static str, Array2<f64>>) {
        let factor = self.case.step.accumulation_factor();
        let mut repaired = |repaired: &'static str, stage: Stage, compared: Compared| {
            out.push(Repair::new(repaired, Some(self.index()), stage.name(), &compared.distance()));
            if stage == Stage::DUnembedding {
                let change = (compared.expected - compared.reference) * factor;
                changes.entry(repaired).and_modify(|all| *all += &change).or_insert(change);
            }
        };
        for (place, stage) in [Stage::Lse, Stage::LabelLogits].into_iter().enumerate() {
            if self.off(stage) && self.off(Stage::Loss) {
                let expected = self.loss([place == 0, place == 1]);
                repaired(stage.name(), Stage::Loss, self.compared(Stage::Loss, expected, vec![]));
            }
        }
        for (name, gradients) in self.fed_one_by_one() {
            for (stages, of) in GRADIENTS.iter().zip([&gradients.hidden, &gradients.unembedding]) {
                let parts = [of.lse.clone(), of.label.clone()];
                let which = usize::from(name == COTANGENTS[1]);
                if self.off(stages[which]) {
                    repaired(name, stages[which], self.compared(stages[which], parts[which].clone(), vec![]));
                }
                if self.off(stages[2]) {
                    repaired(name, stages[2], self.compared_sum(stages, &parts, vec![]));
                }
            }
        }
        for stages in &GRADIENTS {
            for part in stages[..2].iter().filter(|part| self.off(**part) && self.off(stages[2])) {
                let own = |stage: Stage| if stage == *part { self.candidate(stage) } else { self.reference(stage) };
                repaired(part.name(), stages[2], self.compared_sum(stages, &[own(stages[0]), own(stages[1])], vec![]));
            }
        }
    }

    /// The gradients that each of the backward's inputs that diverges gives by itself.
    fn fed_one_by_one(&self) -> Vec<(&'static str, Gradients)> {
        if !GRADIENTS.iter().flatten().any(|stage| self.off(*stage)) {
            return vec![];
        }
        let off = |which: usize| self.cotangents[which].as_ref().filter(|c| c.diverges).map(|c| c.values.as_slice());
        let fed = [
            ("lse", Fed { lse: self.lse.as_deref(), ..Fed::default() }),
            ("d_lse", Fed { of_lse: off(0), ..Fed::default() }),
            ("d_label_logits", Fed { of_label: off(1), ..Fed::default() }),
        ];
        fed.into_iter().filter(|(_, fed)| fed.anything()).filter_map(|(name, fed)| Some((name, self.backward(fed)?))).collect()
    }
}

impl Substituted {
    fn new(
        microbatch: Option<usize>,
        stage: &str,
        distance: &Distance,
        inputs: Vec<StageInput>,
        record: Vec<String>,
        rows: Option<[usize; 2]>,
    ) -> Self {
        Self {
            microbatch,
            stage: stage.into(),
            ratio: distance.own / distance.own_floor,
            inputs,
            inherited: distance.inherited(),
            entering_ratio: distance.left / distance.floor,
            entering_limit: distance.limit,
            enters: distance.enters(),
            rounded_inputs: false,
            record,
            rows,
            along: None,
        }
    }

    /// Takes the error for its inputs' rounding, if it is gone where they are taken as they were recorded.
    fn set_rounded(&mut self, as_recorded: &Distance) {
        if !as_recorded.enters() {
            (self.enters, self.rounded_inputs) = (false, true);
            (self.inherited, self.entering_ratio) = (as_recorded.inherited(), as_recorded.left / as_recorded.floor);
            self.entering_limit = as_recorded.limit;
        }
    }
}

impl Repair {
    fn new(repaired: &str, microbatch: Option<usize>, stage: &str, distance: &Distance) -> Self {
        let (before, after) = (distance.own / distance.own_floor, distance.left / distance.floor);
        Self { repaired: repaired.into(), microbatch, stage: stage.into(), before, after }
    }
}

/// The accumulated dK, if it diverges.
struct OverStep<'a> {
    case: &'a Case<'a>,
    ids: &'a [usize],
    candidate: Array2<f64>,
    reference: Array2<f64>,
    tolerance: Tolerance,
    precision: Precision,
    of: usize,
}

impl<'a> OverStep<'a> {
    fn new(case: &'a Case<'a>, ids: &'a [usize]) -> Option<Self> {
        case.accumulated.filter(|t| t.nonfinite == 0 && diverges(t))?;
        let (recorded, (tolerance, reference)) = (case.produced.accumulated.as_ref()?, case.tolerances.accumulated.as_ref()?);
        let (candidate, reference) = (recorded.values.select(Axis(0), ids), reference.select(Axis(0), ids));
        let (tolerance, of) = (tolerance.of_rows(ids), recorded.values.nrows());
        Some(Self { case, ids, candidate, reference, tolerance, precision: recorded.precision, of })
    }

    /// What a microbatch's dK adds to the accumulated one beyond the reference's.
    fn beyond(&self, place: usize) -> Option<Array2<f64>> {
        let own = &self.case.produced.microbatches[place].get(&Stage::DUnembedding)?.values;
        report(self.case, place, Stage::DUnembedding).filter(|t| t.nonfinite == 0)?;
        let gradients = &truth(self.case, place).outcome.gradients.unembedding;
        let exact = gradients.lse.select(Axis(0), self.ids) + gradients.label.select(Axis(0), self.ids);
        Some((own.select(Axis(0), self.ids) - exact) * self.case.step.accumulation_factor())
    }

    fn distance(&self, expected: Array2<f64>, inputs: Vec<(Tolerance, f64)>) -> Distance {
        let (candidate, reference) = (self.candidate.clone(), self.reference.clone());
        let grown = grown([&expected], [&reference]);
        let (precision, tolerance) = (self.precision, self.tolerance.clone());
        Compared { candidate, reference, expected, precision, tolerance, inputs, grown }.distance()
    }

    /// The rung, and among the changes what the diverging microbatches' dK make.
    fn rung(&self, changes: &mut BTreeMap<&'static str, Array2<f64>>) -> Substituted {
        let (stage, of_microbatch) = (Stage::AccumulatedDUnembedding, Stage::DUnembedding);
        let (mut expected, mut as_recorded) = (self.reference.clone(), self.reference.clone());
        let (mut tolerances, mut recorded, mut off) = (Vec::new(), 0, false);
        for place in 0..self.case.judged.len() {
            let Some(beyond) = self.beyond(place) else { continue };
            recorded += 1;
            as_recorded += &beyond;
            if report(self.case, place, of_microbatch).is_some_and(diverges) {
                off = true;
                expected += &beyond;
                let tolerance = self.case.tolerances.microbatches[place][&of_microbatch].of_rows(self.ids);
                tolerances.push((tolerance, self.case.step.accumulation_factor()));
            }
        }
        let input = StageInput { stage: of_microbatch.name().into(), diverges: off };
        let (inputs, record) = match recorded {
            0 => (vec![], vec![of_microbatch.name().to_owned()]),
            _ => (vec![input], vec![]),
        };
        if off {
            changes.insert(of_microbatch.name(), &expected - &self.reference);
        }
        let rows = (self.ids.len() < self.of).then_some([self.ids.len(), self.of]);
        let mut rung = Substituted::new(None, stage.name(), &self.distance(expected, tolerances), inputs, record, rows);
        if rung.enters && recorded == self.case.judged.len() {
            rung.set_rounded(&self.distance(as_recorded, vec![]));
        }
        rung
    }

    /// What is left where a stage is repaired in every microbatch.
    fn repair(&self, stage: &str, change: Array2<f64>) -> Repair {
        let distance = self.distance(&self.reference + &change, vec![]);
        Repair::new(stage, None, Stage::AccumulatedDUnembedding.name(), &distance)
    }
}
