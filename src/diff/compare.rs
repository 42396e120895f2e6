//! One tensor against its reference: figures, verdict and the pattern of the error.

use super::pattern::{self, pattern};
use super::plots::plots;
use super::truth::{RowsAre, Stage};
use crate::report::model::{TensorReport, Verdict, Worst};
use crate::report::text::times;
use fused_xent_kernels::contract::Precision;
use fused_xent_kernels::floor::Tolerance;
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis};
use std::collections::BTreeMap;
use std::ops::Range;

/// The ratio to the floor up to which a tensor agrees.
pub const RATIO_LIMIT: f64 = 1.5;

/// How sure a fitted factor must be to differ from 1, in standard deviations of honest noise.
const SCALE_SIGMAS: f64 = 8.0;

/// What the comparison needs to know of a tensor beyond its values.
pub struct Context<'a> {
    /// Which stage it is.
    pub stage: Stage,
    /// The candidate's precision.
    pub precision: Precision,
    /// What is tolerated.
    pub tolerance: &'a Tolerance,
    /// Label of every token, `None` where masked, [N]; of all microbatches one after the other for what accumulates.
    pub labels: &'a [Option<usize>],
    /// Which rows of the whole tensor are compared; `None` if all.
    pub rows: Option<&'a [usize]>,
    /// How many rows the whole tensor has.
    pub of: usize,
    /// Which process holds which rows of the whole tensor, in order; empty if that is not known.
    pub owners: &'a [(Range<usize>, usize)],
}

impl Context<'_> {
    /// Where row `place` of those compared is in the whole tensor.
    pub(super) fn row(&self, place: usize) -> usize {
        self.rows.map_or(place, |rows| rows[place])
    }

    /// The process that holds row `place` of those compared.
    pub(super) fn owner(&self, place: usize) -> Option<usize> {
        let row = self.row(place);
        let (range, process) = self.owners.get(self.owners.partition_point(|(range, _)| range.end <= row))?;
        range.contains(&row).then_some(*process)
    }

    /// How often each vocab id is a label.
    pub(super) fn hits(&self) -> BTreeMap<usize, usize> {
        let mut hits = BTreeMap::new();
        self.labels.iter().flatten().for_each(|&label| *hits.entry(label).or_insert(0) += 1);
        hits
    }
}

/// Judges `candidate` by `reference`, both [rows, columns]: the rows of `context`.
///
/// # Panics
/// If the shapes differ.
pub fn compare(context: &Context, candidate: ArrayView2<f64>, reference: ArrayView2<f64>) -> TensorReport {
    assert_eq!(candidate.dim(), reference.dim(), "one shape");
    let rows = Rows::new(candidate, reference);
    let Context { stage, tolerance, .. } = *context;
    let all = 0..reference.nrows();
    let (deviation, floor) = (rows.deviation.sum().sqrt(), tolerance.l2(all.clone()));
    let (norm, candidate_norm) = (rows.reference.sum().sqrt(), rows.candidate.sum().sqrt());
    let relative = |x: f64| (norm > 0.0).then(|| x / norm);
    let alpha = (norm > 0.0).then(|| rows.product.sum() / rows.reference.sum());
    let residual = alpha.map(|alpha| rows.residual(alpha).sum().sqrt() / norm);
    let ratio = if deviation == 0.0 { 0.0 } else { deviation / floor };
    let ratio_limit = ratio_limit(tolerance, all);
    let (worst, out_of_bound, nonfinite) = elements(context, candidate, reference);
    let scale_limit = scale_limit(tolerance, &rows, ratio_limit);
    let scaled = alpha.filter(|alpha| (alpha - 1.0).abs() > scale_limit);
    let reason = if nonfinite > 0 {
        Some(format!("{nonfinite} elements are not finite"))
    } else if ratio > ratio_limit {
        Some(format!("{} the floor, where honest rounding stays below {}", times(ratio), times(ratio_limit)))
    } else if out_of_bound > 0 {
        Some(format!("{out_of_bound} elements are off by more than any honest rounding can make"))
    } else {
        scaled.map(|alpha| format!("a constant factor of {alpha:.6}, where honest rounding keeps to 1 ± {scale_limit:.1e}"))
    };
    let pattern = reason.as_ref().map(|_| match nonfinite {
        0 => pattern(context, &rows, candidate, reference),
        _ => pattern::nonfinite(context, candidate, reference),
    });
    TensorReport {
        name: stage.name().into(),
        shape: [reference.nrows(), reference.ncols()],
        verdict: if reason.is_some() { Verdict::Diverge } else { Verdict::Agree },
        reason,
        reference_norm: norm,
        rel_l2: relative(deviation),
        max_abs: worst.as_ref().map_or(0.0, |w| (w.candidate - w.reference).abs()),
        cosine: (norm * candidate_norm > 0.0).then(|| rows.product.sum() / (norm * candidate_norm)),
        scale: alpha,
        residual,
        noise_floor: relative(floor),
        ratio,
        ratio_limit,
        ulp_p99: ulp_p99(context.precision, candidate, reference),
        nonfinite,
        out_of_bound,
        worst,
        zero_tail: rows.zero_tail(context),
        sampled_from: context.rows.map(|_| context.of),
        pattern,
        plots: Some(Box::new(plots(context, &rows, candidate, reference))),
    }
}

/// Squared norms and inner products by row, non-finite elements left out.
pub(super) struct Rows {
    pub deviation: Array1<f64>,
    pub reference: Array1<f64>,
    pub candidate: Array1<f64>,
    pub product: Array1<f64>,
}

impl Rows {
    fn new(candidate: ArrayView2<f64>, reference: ArrayView2<f64>) -> Self {
        let sum = |term: fn(f64, f64) -> f64| -> Array1<f64> {
            let row = |(c, r): (ArrayView1<f64>, ArrayView1<f64>)| {
                c.iter().zip(r).filter(|(c, r)| c.is_finite() && r.is_finite()).map(|(&c, &r)| term(c, r)).sum()
            };
            candidate.outer_iter().zip(reference.outer_iter()).map(row).collect()
        };
        Self {
            deviation: sum(|c, r| (c - r).powi(2)),
            reference: sum(|_, r| r * r),
            candidate: sum(|c, _| c * c),
            product: sum(|c, r| c * r),
        }
    }

    /// Whether the candidate has nothing in a row where the reference has something.
    pub fn silent(&self, row: usize) -> bool {
        self.candidate[row] == 0.0 && self.reference[row] > 0.0
    }

    /// See [`TensorReport::zero_tail`]. Rows that are 0 by right (masked tokens) may stand before the first that is not.
    pub fn zero_tail(&self, context: &Context) -> Option<[usize; 2]> {
        let zero_from = (0..self.candidate.len()).rev().take_while(|&row| self.candidate[row] == 0.0).last()?;
        let silent_from = (0..self.candidate.len()).find(|&row| self.silent(row))?;
        // Rows between two that are compared may be either.
        let after = zero_from.checked_sub(1).map_or(0, |last| context.row(last) + 1);
        (zero_from <= silent_from).then(|| [after, context.row(silent_from)])
    }

    /// ‖candidate − α·reference‖² by row.
    pub fn residual(&self, alpha: f64) -> Array1<f64> {
        (&self.candidate - 2.0 * alpha * &self.product + alpha * alpha * &self.reference).mapv_into(|x| x.max(0.0))
    }
}

/// The ratio to the floor that no honest computation exceeds over these rows.
fn ratio_limit(tolerance: &Tolerance, rows: Range<usize>) -> f64 {
    (tolerance.limit(rows.clone()) / tolerance.l2(rows)).max(RATIO_LIMIT)
}

/// How far honest noise moves the fitted factor from 1.
///
/// What a row's error before the final rounding adds to ⟨candidate, reference⟩ may have one sign in all rows (a rounding of
/// equal values is no noise); final roundings are independent.
fn scale_limit(tolerance: &Tolerance, rows: &Rows, ratio_limit: f64) -> f64 {
    let norm = rows.reference.sum();
    // What float32 flushes to 0 says nothing of a factor.
    if norm < f64::from(f32::MIN_POSITIVE).powi(2) {
        return f64::INFINITY;
    }
    let (before, rounding) = tolerance.projected(rows.reference.iter().copied());
    (ratio_limit * before + SCALE_SIGMAS * rounding) / norm
}

fn elements(context: &Context, candidate: ArrayView2<f64>, reference: ArrayView2<f64>) -> (Option<Worst>, usize, usize) {
    let (mut out_of_bound, mut nonfinite) = (0, 0);
    let mut worst: Option<(f64, [usize; 2])> = None;
    for ((row, column), &c) in candidate.indexed_iter() {
        let r = reference[[row, column]];
        if !(c.is_finite() && r.is_finite()) {
            nonfinite += 1;
            continue;
        }
        let deviation = (c - r).abs();
        if deviation > context.tolerance.bound(row, column, r) {
            out_of_bound += 1;
        }
        if worst.is_none_or(|(largest, _)| deviation > largest) {
            worst = Some((deviation, [row, column]));
        }
    }
    let worst = worst.map(|(_, index)| Worst {
        index: [context.row(index[0]), index[1]],
        place: place(context, [context.row(index[0]), index[1]]),
        candidate: candidate[index],
        reference: reference[index],
    });
    (worst, out_of_bound, nonfinite)
}

/// An element in words.
pub(super) fn place(context: &Context, [row, column]: [usize; 2]) -> String {
    let row = match context.stage.rows_are() {
        RowsAre::VocabIds => format!("vocab id {row}"),
        RowsAre::Tokens => match context.labels.get(row).copied().flatten() {
            Some(label) => format!("token {row} (label {label})"),
            None => format!("token {row} (masked)"),
        },
    };
    match context.stage {
        Stage::Loss | Stage::Lse | Stage::LabelLogits => row,
        _ => format!("{row}, feature {column}"),
    }
}

/// 99th percentile of the deviation in units in the last place of the reference.
fn ulp_p99(precision: Precision, candidate: ArrayView2<f64>, reference: ArrayView2<f64>) -> f64 {
    let mut ulps: Vec<f64> = candidate
        .iter()
        .zip(reference)
        .filter(|(c, r)| c.is_finite() && r.is_finite())
        .map(|(&c, &r)| (c - r).abs() / ulp(precision, r))
        .collect();
    if ulps.is_empty() {
        return 0.0;
    }
    let rank = (ulps.len() - 1) * 99 / 100;
    *ulps.select_nth_unstable_by(rank, f64::total_cmp).1
}

/// The spacing of `precision`'s numbers around `x`.
fn ulp(precision: Precision, x: f64) -> f64 {
    let smallest_exponent = if precision == Precision::F16 { -14.0 } else { -126.0 };
    let exponent = if x == 0.0 { smallest_exponent } else { x.abs().log2().floor().max(smallest_exponent) };
    2.0 * precision.unit_roundoff() * exponent.exp2()
}

/// The wanted rows (`None`: all) of a tensor of this shape, whose element `i` in memory is `element(i)`; `transposed` if it lies
/// [columns, rows] there, as dK may.
pub fn gathered(
    element: impl Fn(usize) -> f64,
    [rows, columns]: [usize; 2],
    transposed: bool,
    wanted: Option<&[usize]>,
) -> Array2<f64> {
    let row = |place: usize| wanted.map_or(place, |wanted| wanted[place]);
    let at = |(place, column)| element(if transposed { column * rows + row(place) } else { row(place) * columns + column });
    Array2::from_shape_fn((wanted.map_or(rows, <[usize]>::len), columns), at)
}

/// How far ‖candidate‖₂ of an honest computation may lie from ‖reference‖₂: what its error adds along the reference, and across.
pub fn norm_tolerance(tolerance: &Tolerance, reference: ArrayView2<f64>) -> f64 {
    let squared = reference.map_axis(Axis(1), |row| row.dot(&row));
    let norm = squared.sum().sqrt();
    let all = 0..reference.nrows();
    let ratio_limit = ratio_limit(tolerance, all.clone());
    let across = ratio_limit * tolerance.l2(all);
    if norm == 0.0 {
        return across;
    }
    let (before, rounding) = tolerance.projected(squared.iter().copied());
    ((ratio_limit * before + SCALE_SIGMAS * rounding) / norm + across * across / (2.0 * norm)).min(across)
}

/// ‖x‖₂.
pub fn norm(x: ArrayView2<f64>) -> f64 {
    x.map_axis(Axis(1), |row| row.dot(&row)).sum().sqrt()
}
