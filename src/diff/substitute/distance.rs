//! How far a stage is from the reference, and from what its own inputs give, against what honest rounding makes.

use crate::diff::compare::RATIO_LIMIT;
use fused_xent_kernels::contract::Precision;
use fused_xent_kernels::floor::Tolerance;
use ndarray::{Array2, ArrayView1, ArrayView2};
use std::ops::Range;

/// A stage of the candidate, the reference's, and what the candidate's own inputs of it give.
pub(super) struct Compared {
    pub candidate: Array2<f64>,
    pub reference: Array2<f64>,
    pub expected: Array2<f64>,
    pub precision: Precision,
    pub tolerance: Tolerance,
    /// What is tolerated of the inputs that were taken from the candidate, and what each is multiplied with.
    pub inputs: Vec<(Tolerance, f64)>,
    /// How much larger than the reference's the terms of a row's sum are, squared; empty if not at all.
    pub grown: Vec<f64>,
}

impl Compared {
    /// The expected squared error of each row where `expected` is what it should be: as the terms of its sum grow, so does
    /// what rounding them leaves, and with the row what its final rounding does.
    pub fn row_floors(&self) -> Vec<f64> {
        let rounding = |x: ArrayView1<f64>| x.iter().map(|&x| (self.precision.round(x) - x).powi(2)).sum::<f64>();
        let row = |(row, (x, r)): (usize, (ArrayView1<f64>, ArrayView1<f64>))| {
            let grown = self.grown.get(row).copied().unwrap_or(1.0);
            let rounded = (rounding(x) - rounding(r)).max(0.0);
            self.tolerance.l2(row..row + 1).powi(2) * grown + if rounded.is_finite() { rounded } else { 0.0 }
        };
        self.expected.outer_iter().zip(self.reference.outer_iter()).enumerate().map(row).collect()
    }

    pub fn distance(&self) -> Distance {
        let all = 0..self.candidate.nrows();
        let from = |other: &Array2<f64>| squared_error(self.candidate.view(), other.view()).iter().sum::<f64>().sqrt();
        let of_inputs = |of: fn(&Tolerance, Range<usize>) -> f64| -> f64 {
            self.inputs.iter().map(|(tolerance, factor)| (factor * of(tolerance, all.clone())).powi(2)).sum()
        };
        let own_floor = self.tolerance.l2(all.clone());
        let grown: f64 = self.row_floors().iter().sum();
        let squared = grown + of_inputs(Tolerance::l2);
        let limit = self.tolerance.limit(all.clone()).powi(2) * grown / own_floor.powi(2) + of_inputs(Tolerance::limit);
        Distance {
            own: from(&self.reference),
            own_floor,
            left: from(&self.expected),
            floor: squared.sqrt(),
            limit: (limit / squared).sqrt().max(RATIO_LIMIT),
        }
    }
}

/// How far a candidate is from the reference, and from what its own inputs give, each with its floor.
pub(super) struct Distance {
    pub own: f64,
    pub own_floor: f64,
    pub left: f64,
    pub floor: f64,
    pub limit: f64,
}

impl Distance {
    /// The share of the squared error above the floor that the inputs carry.
    pub fn inherited(&self) -> f64 {
        let above = |x: f64, floor: f64| (x * x - floor * floor).max(0.0);
        let own = above(self.own, self.own_floor);
        if own > 0.0 { 1.0 - (above(self.left, self.floor) / own).min(1.0) } else { 0.0 }
    }

    /// Whether what is left is more than the floor.
    pub fn enters(&self) -> bool {
        self.left > self.limit * self.floor
    }
}

/// How much larger than the reference's the terms of each row are, squared, at least 1.
pub(super) fn grown<const N: usize>(terms: [&Array2<f64>; N], reference: [&Array2<f64>; N]) -> Vec<f64> {
    let size = |terms: [&Array2<f64>; N], row: usize| terms.iter().map(|x| x.row(row).dot(&x.row(row)).sqrt()).sum::<f64>();
    let row = |row: usize| {
        let (size, exact) = (size(terms, row), size(reference, row));
        if exact > 0.0 && size.is_finite() { (size / exact).powi(2).max(1.0) } else { 1.0 }
    };
    (0..terms[0].nrows()).map(row).collect()
}

/// ‖candidate − reference‖² of each row, 0 where it is not finite.
pub(super) fn squared_error(candidate: ArrayView2<f64>, reference: ArrayView2<f64>) -> Vec<f64> {
    let row = |(c, r): (ArrayView1<f64>, ArrayView1<f64>)| {
        let sum: f64 = c.iter().zip(r).map(|(c, r)| (c - r).powi(2)).sum();
        if sum.is_finite() { sum } else { 0.0 }
    };
    candidate.outer_iter().zip(reference.outer_iter()).map(row).collect()
}
