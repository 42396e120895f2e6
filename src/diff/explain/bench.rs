//! The rows that hypotheses are tried on, and how well each fits there.

use super::Case;
use super::hypotheses::Factors;
use crate::diff::candidate::Values;
use crate::diff::compare::{RATIO_LIMIT, norm};
use crate::diff::fault::Touches;
use crate::diff::replay::{Counterfactual, Excerpt, Outcome, Rows, Wanted, of_running_sums};
use crate::diff::truth::{RowsAre, Stage};
use crate::report::model::{TensorReport, Verdict};
use fused_xent_kernels::floor::Tolerance;
use ndarray::{Array2, ArrayView1, ArrayView2, Axis, CowArray, Ix2};

/// How well a computation fits one tensor of the candidate.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct TensorFit {
    /// ‖candidate − computed‖² / ‖reference‖²; of a tensor that agrees, only what exceeds its limit.
    left: f64,
    /// What of that a floor would leave.
    floor: f64,
    /// ‖candidate − computed‖ over the floor.
    ratio: f64,
    /// The same over what the tensor's verdict allows.
    of_limit: f64,
}

/// How well a computation fits the candidate, tensor by tensor.
#[derive(Clone, Debug, Default)]
pub(super) struct Fit {
    tensors: Vec<TensorFit>,
}

impl Fit {
    pub fn left(&self) -> f64 {
        self.tensors.iter().map(|t| t.left).sum()
    }

    /// What is left beyond the floor.
    pub fn beyond_floor(&self) -> f64 {
        self.tensors.iter().map(|t| (t.left - t.floor).max(0.0)).sum()
    }

    pub fn ratio(&self) -> f64 {
        self.tensors.iter().map(|t| t.ratio).fold(0.0, f64::max)
    }

    pub fn at_floor(&self) -> bool {
        self.tensors.iter().all(|t| t.of_limit <= 1.0)
    }

    /// Whether what is left may be the fault itself in another order of summation.
    pub fn near_floor(&self) -> bool {
        self.tensors.iter().all(|t| t.of_limit <= 2.0)
    }
}

/// One tensor of the candidate, in all of its rows or in some.
struct Target<'a> {
    stage: Stage,
    /// Which of the bench's rows; `None` is all.
    rows: Option<Vec<usize>>,
    candidate: CowArray<'a, f64, Ix2>,
    /// Whether the whole tensor diverges.
    diverges: bool,
    /// ‖reference‖₂; the candidate's where that is 0.
    size: f64,
    floor: f64,
    /// The share of float32 arithmetic in it.
    arithmetic: f64,
    ratio_limit: f64,
    /// How the reference fits.
    base: TensorFit,
}

impl<'a> Target<'a> {
    /// Of these rows (`None`: all) of a tensor: one target, or two of a tensor that diverges in rows too few to move its norm.
    /// Only these rows are then to be explained, and the others to be left alone.
    fn of_tensor(
        values: &'a Values,
        tolerance: &Tolerance,
        reference: ArrayView2<f64>,
        rows: Option<&[usize]>,
        (stage, report): (Stage, &TensorReport),
    ) -> Vec<Self> {
        let diverges = report.verdict == Verdict::Diverge;
        let row = |place: usize| rows.map_or(place, |rows| rows[place]);
        let off = |&place: &usize| {
            let row = row(place);
            let deviation = &values.values.row(row) - &reference.row(row);
            deviation.dot(&deviation).sqrt() > tolerance.limit(row..row + 1)
        };
        let places = 0..rows.map_or(reference.nrows(), <[usize]>::len);
        let few = diverges && report.ratio <= report.ratio_limit;
        let (bad, good): (Vec<usize>, Vec<usize>) = if few { places.partition(off) } else { (vec![], vec![]) };
        if bad.is_empty() || good.is_empty() {
            return vec![Self::new(values, tolerance, reference, rows, (stage, diverges))];
        }
        let part = |(places, diverges): (Vec<usize>, bool)| {
            let rows: Vec<usize> = places.iter().map(|&place| row(place)).collect();
            Self { rows: Some(places), ..Self::new(values, tolerance, reference, Some(&rows), (stage, diverges)) }
        };
        [(bad, true), (good, false)].map(part).into()
    }

    fn new(
        values: &'a Values,
        tolerance: &Tolerance,
        reference: ArrayView2<f64>,
        rows: Option<&[usize]>,
        (stage, diverges): (Stage, bool),
    ) -> Self {
        let (candidate, reference) = (some(values.values.view(), rows), some(reference, rows));
        let tolerance = rows.map_or_else(|| tolerance.clone(), |rows| tolerance.of_rows(rows));
        let all = 0..candidate.nrows();
        // A reference of 0 has no floor but a final rounding's; the candidate gives the size.
        let (size, floor) = match norm(reference.view()) {
            0.0 => (norm(candidate.view()), values.precision.unit_roundoff() * norm(candidate.view())),
            size => (size, tolerance.l2(all.clone())),
        };
        let arithmetic = tolerance.arithmetic_l2(all.clone());
        let ratio_limit = (tolerance.limit(all.clone()) / tolerance.l2(all)).max(RATIO_LIMIT);
        let base = TensorFit::default();
        let mut target = Self { stage, rows: None, candidate, diverges, size, floor, arithmetic, ratio_limit, base };
        target.base = target.fit(reference.view(), None);
        if diverges {
            // It may do so with its norm at the floor: by a factor, or in few elements.
            target.base.of_limit = f64::INFINITY;
        }
        target
    }

    /// ⟨candidate, computed⟩ and ⟨computed, computed⟩ of each row in which something is computed.
    fn products(&self, computed: ArrayView2<f64>) -> Vec<[f64; 2]> {
        let computed = some(computed, self.rows.as_deref());
        let of_row = |(c, x): (ArrayView1<f64>, ArrayView1<f64>)| [c.dot(&x), x.dot(&x)];
        let rows = self.candidate.outer_iter().zip(computed.outer_iter()).map(of_row);
        rows.filter(|[_, square]| *square > 0.0).collect()
    }

    /// How the bench's rows fit that are `computed`, of which near ties may change some.
    fn fit(&self, computed: ArrayView2<f64>, ties: Option<RowTies>) -> TensorFit {
        let computed = some(computed, self.rows.as_deref());
        let deviation = self.candidate.iter().zip(&computed).map(|(c, f)| (c - f).powi(2)).sum::<f64>().sqrt();
        if deviation == 0.0 || self.size == 0.0 {
            return TensorFit::default();
        }
        if !deviation.is_finite() {
            return TensorFit { left: f64::INFINITY, floor: 0.0, ratio: f64::INFINITY, of_limit: f64::INFINITY };
        }
        let excess = if self.diverges { deviation } else { (deviation - self.ratio_limit * self.floor).max(0.0) };
        // A gradient that a fault scales carries a floor scaled alike.
        let ties = ties.map_or(0.0, |ties| ties.squares(self.rows.as_deref(), computed.view(), self.arithmetic));
        let rounding = self.floor * (norm(computed.view()) / self.size).max(SMALLEST_SCALE);
        let floor = if self.diverges { (self.floor.powi(2) + ties) / self.size.powi(2) } else { 0.0 };
        let over = |times: f64| deviation / ((times * rounding).powi(2) + ties).sqrt();
        TensorFit { left: (excess / self.size).powi(2), floor, ratio: over(1.0), of_limit: over(self.ratio_limit) }
    }
}

/// Some rows, or all.
fn some<'x>(x: ArrayView2<'x, f64>, rows: Option<&[usize]>) -> CowArray<'x, f64, Ix2> {
    rows.map_or_else(|| x.into(), |rows| x.select(Axis(0), rows).into())
}

/// The factor over all rows, and the rows' median, of ⟨candidate, computed⟩ and ⟨computed, computed⟩ by row.
fn fitted(rows: &[[f64; 2]]) -> Vec<f64> {
    let mut of_rows: Vec<f64> = rows.iter().map(|[product, square]| product / square).collect();
    of_rows.sort_by(f64::total_cmp);
    let sum = |which: usize| rows.iter().map(|row| row[which]).sum::<f64>();
    of_rows.get(of_rows.len() / 2).map_or(vec![], |&median| vec![sum(0) / sum(1), median])
}

/// What near ties may change of a tensor.
#[derive(Clone, Copy)]
struct RowTies<'t> {
    /// The squares per row of the bench, where dlogits or the forward are rounded.
    rows: Option<&'t [f64]>,
    /// How often running sums in bf16 are.
    roundings: usize,
}

impl RowTies<'_> {
    /// Of these rows (`None`: all), in which float32 arithmetic is off by `arithmetic`.
    fn squares(&self, rows: Option<&[usize]>, computed: ArrayView2<f64>, arithmetic: f64) -> f64 {
        let of_rows = self.rows.map_or(0.0, |squares| match rows {
            None => squares.iter().sum(),
            Some(rows) => rows.iter().map(|&row| squares[row]).sum(),
        });
        let of_sums = match self.roundings {
            0 => 0.0,
            n => n as f64 * of_running_sums(computed, arithmetic / (computed.len() as f64).sqrt()),
        };
        of_rows + of_sums
    }
}

/// How far a floor shrinks with the gradient.
const SMALLEST_SCALE: f64 = 1e-3;

/// A hypothesis: how the candidate may compute, and in which parts that differs from what it is compared with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Trial {
    pub how: Counterfactual,
    pub touches: Touches,
}

/// Which rows a fit is measured in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// Those of tokens alone: what vocab ids have is taken as explained wherever the hypothesis touches it.
    Tokens,
    /// All.
    Both,
}

/// Rows of the candidate in every judged microbatch.
pub(super) struct Bench<'a> {
    case: &'a Case<'a>,
    rows: Vec<Rows>,
    microbatches: Vec<Vec<Target<'a>>>,
    accumulated: Vec<Target<'a>>,
    /// Whether what near ties may change counts.
    with_ties: bool,
}

impl<'a> Bench<'a> {
    /// Of `rows` of the excerpts; `None` for all rows that are judged, which needs no excerpts. Near ties need to be looked at
    /// only where it counts whether a fit comes down to the floor.
    pub fn new(case: &'a Case<'a>, rows: Option<(&[Excerpt], Vec<Rows>)>, with_ties: bool) -> Self {
        let places = |place: usize, stage: Stage| {
            let (excerpts, rows) = rows.as_ref()?;
            Some(case.value_rows(place, stage, &excerpts[place], &rows[place]))
        };
        let microbatches = (0..case.judged.len())
            .map(|place| {
                let truth = case.truth(place);
                let stages = case.produced.microbatches[place].iter().zip(&case.microbatches[place].tensors);
                let target = |((&stage, values), report): ((&Stage, &'a Values), &TensorReport)| {
                    let tolerance = &case.tolerances.microbatches[place][&stage];
                    Target::of_tensor(
                        values,
                        tolerance,
                        truth.outcome.stage(stage).view(),
                        places(place, stage).as_deref(),
                        (stage, report),
                    )
                };
                stages.flat_map(target).collect()
            })
            .collect();
        let accumulated = case.accumulated.and_then(|report| {
            let (values, stage) = (case.produced.accumulated.as_ref()?, Stage::AccumulatedDUnembedding);
            let (tolerance, reference) = case.tolerances.accumulated.as_ref()?;
            let rows = places(0, Stage::DUnembedding);
            Some(Target::of_tensor(values, tolerance, reference.view(), rows.as_deref(), (stage, report)))
        });
        let accumulated = accumulated.unwrap_or_default();
        Self { case, rows: rows.map_or(vec![], |(_, rows)| rows), microbatches, accumulated, with_ties }
    }

    /// How the reference fits: what is to be explained.
    pub fn base(&self) -> Fit {
        Fit { tensors: self.microbatches.iter().flatten().chain(&self.accumulated).map(|target| target.base).collect() }
    }

    /// What a fit leaves in the rows of tokens.
    pub fn left_of_tokens(&self, fit: &Fit) -> f64 {
        let targets = self.microbatches.iter().flatten().zip(&fit.tensors);
        targets.filter(|(target, _)| target.stage.rows_are() == RowsAre::Tokens).map(|(_, fit)| fit.left).sum()
    }

    /// Constant factors between what `how` makes of the gradients that diverge and the candidate: over all rows, and the rows'
    /// median, which a fault in few rows does not move.
    pub fn factors(&self, excerpts: &[Excerpt], how: &Counterfactual) -> Factors {
        let mut total: Option<Array2<f64>> = None;
        let mut rows: [Vec<[f64; 2]>; 3] = Default::default();
        for (place, targets) in self.microbatches.iter().enumerate() {
            let m = self.case.judged[place];
            let outcome = excerpts[place].replay(how, &self.rows[place], Wanted::ALL);
            for target in targets.iter().filter(|target| target.diverges) {
                let of = match target.stage {
                    Stage::DHidden => &mut rows[0],
                    Stage::DUnembedding => &mut rows[1],
                    _ => continue,
                };
                of.extend(target.products(outcome.stage(target.stage).view()));
            }
            if !self.accumulated.is_empty() {
                let own = outcome.stage(Stage::DUnembedding);
                how.accumulate(self.case.step, m, &own, total.get_or_insert_with(|| Array2::zeros(own.dim())));
            }
        }
        for target in self.accumulated.iter().filter(|target| target.diverges) {
            rows[2].extend(total.iter().flat_map(|total| target.products(total.view())));
        }
        let [d_hidden, d_unembedding, accumulated] = rows.map(|rows| fitted(&rows));
        let d_unembedding = if d_unembedding.is_empty() { accumulated.clone() } else { d_unembedding };
        Factors { d_hidden, d_unembedding, accumulated }
    }

    /// How a hypothesis fits. Where it touches nothing, the fit is that of `otherwise`.
    pub fn fit(&self, excerpts: Option<&[Excerpt]>, trial: &Trial, otherwise: Option<&Fit>, side: Side) -> Fit {
        let Trial { how, touches } = trial;
        let case = self.case;
        let of_step = !self.accumulated.is_empty() && touches.accumulated && side == Side::Both;
        let of_ids = (touches.d_unembedding && side == Side::Both) || of_step;
        let wanted = Wanted { d_hidden: touches.d_hidden, d_unembedding: of_ids };
        let (mut total, mut total_ties): (Option<Array2<f64>>, Option<Vec<f64>>) = (None, None);
        let mut tensors = Vec::new();
        let same = |i: usize| otherwise.map_or(TensorFit::default(), |fit| fit.tensors[i]);
        for (place, targets) in self.microbatches.iter().enumerate() {
            let m = case.judged[place];
            let untouched = !(touches.forward || wanted.d_hidden || wanted.d_unembedding);
            let outcome: Option<Outcome> = (!untouched).then(|| match excerpts {
                Some(excerpts) => excerpts[place].replay(how, &self.rows[place], wanted),
                None => how.replay(case.step, m, wanted),
            });
            let ties = (self.with_ties && !untouched && how.has_ties()).then(|| match excerpts {
                Some(excerpts) => excerpts[place].ties(how, &self.rows[place], wanted),
                None => how.ties(case.step, m, wanted),
            });
            if let (Some(ties), true) = (&ties, of_step) {
                let of_step = total_ties.get_or_insert_with(|| vec![0.0; ties.stage(Stage::DUnembedding).len()]);
                let factor = case.step.accumulation_factor().powi(2);
                of_step.iter_mut().zip(ties.stage(Stage::DUnembedding)).for_each(|(sum, own)| *sum += factor * own);
            }
            if let (Some(outcome), true) = (&outcome, of_step) {
                let own = outcome.stage(Stage::DUnembedding);
                how.accumulate(case.step, m, &own, total.get_or_insert_with(|| Array2::zeros(own.dim())));
            }
            for target in targets {
                let not_seen = side == Side::Tokens && target.stage.rows_are() == RowsAre::VocabIds;
                tensors.push(match &outcome {
                    Some(outcome) if touches.stage(target.stage) && !not_seen => {
                        let rows = ties.as_ref().map(|ties| ties.stage(target.stage));
                        let roundings = if self.with_ties { how.roundings(case.step, m, target.stage) } else { 0 };
                        target.fit(outcome.stage(target.stage).view(), Some(RowTies { rows, roundings }))
                    }
                    _ if touches.stage(target.stage) => TensorFit::default(),
                    _ => same(tensors.len()),
                });
            }
        }
        for target in &self.accumulated {
            tensors.push(match total.as_ref().filter(|_| of_step) {
                Some(total) => {
                    let roundings = if self.with_ties { self.roundings_of_step(how) } else { 0 };
                    target.fit(total.view(), Some(RowTies { rows: total_ties.as_deref(), roundings }))
                }
                _ if touches.accumulated => TensorFit::default(),
                _ => same(tensors.len()),
            });
        }
        Fit { tensors }
    }

    /// How many roundings to bf16 the accumulated dK goes through, in the microbatches' own sums too.
    fn roundings_of_step(&self, how: &Counterfactual) -> usize {
        let stages = [Stage::DUnembedding, Stage::AccumulatedDUnembedding];
        let of_microbatch = |&m: &usize| stages.iter().map(|&stage| how.roundings(self.case.step, m, stage)).sum::<usize>();
        self.case.judged.iter().map(of_microbatch).sum()
    }
}
