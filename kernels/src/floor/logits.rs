//! The errors of the logits, and of what one token's logits come to.

use super::{CERTAIN, Error, ROUNDING};
use crate::contract::{Contract, Precision};
use crate::problem::{Label, LossOptions, Problem, ProblemError};
use crate::reference::{self, Forward};
use ndarray::{Array2, ArrayView1, ArrayView2, Zip};
use std::ops::Range;

/// Relative error of an exp, in u: what careful float32 implementations keep to.
pub(super) const EXP_ULPS: f64 = 4.0;
/// Bias of an exp over values like these, in u.
pub(super) const EXP_BIAS: f64 = 2.0;
/// |z/cap| from which a capped logit is flat for every purpose here.
const SATURATED: f64 = 1.0 - 1e-12;

/// Arithmetic: the unit roundoff of all sums, and that of the logits' own rounding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Arithmetic {
    pub u: f64,
    pub logits: Precision,
}

impl Arithmetic {
    pub fn of(contract: &Contract) -> Self {
        Self { u: contract.accumulate.unit_roundoff(), logits: contract.logits }
    }

    /// Variance of one rounding of 1.
    pub fn unit(&self) -> f64 {
        ROUNDING * self.u * self.u
    }

    /// Turns Σ_d (scale·q·k)² into the variance of z.
    pub fn logit_variance(&self, problem: &Problem, z: ArrayView2<f64>, squares: &mut Array2<f64>) {
        Zip::from(squares).and(z).par_for_each(|t, &z| *t = self.variance(problem, z, *t));
    }

    /// The variance of a logit z whose Σ_d (scale·q·k)² is `squares`: the sum over D, the roundings of scale, cap and z − max,
    /// and the contract's own.
    pub fn variance(&self, problem: &Problem, z: f64, squares: f64) -> f64 {
        let d = problem.shape().hidden as f64;
        let (x, slope) = match problem.options().logit_softcap {
            Some(cap) => (cap * (z / cap).clamp(-SATURATED, SATURATED).atanh(), 1.0 - (z / cap).powi(2)),
            None => (z, 1.0),
        };
        let declared = ROUNDING * self.logits.unit_roundoff().powi(2);
        self.unit() * (slope * slope * (d * (x * x / 3.0 + squares / 6.0) + squares + 2.0 * x * x) + 4.0 * z * z)
            + declared * z * z
    }

    /// What summing V exponentials adds to the variance of lse, in units of [`Self::unit`].
    pub fn sum_of_exp(problem: &Problem) -> f64 {
        problem.valid_total() as f64 / 3.0 + EXP_ULPS * EXP_ULPS
    }

    /// Variance of z_v − lse, the relative error of P_v in the backward.
    pub fn p_variance(&self, problem: &Problem, spread: &Spread, lse: f64, variance: f64, p: f64) -> f64 {
        let others = (spread.total - p * p * variance).max(0.0);
        (1.0 - p).powi(2) * variance + others + self.unit() * (lse * lse + Self::sum_of_exp(problem) + EXP_ULPS * EXP_ULPS)
    }
}

/// What the errors of one token's valid logits add up to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Spread {
    /// Σ P²·Var(z) and the largest term of that sum.
    pub total: f64,
    pub largest: f64,
    /// Largest |z|.
    pub max: f64,
    /// Σ z, Σ z², Σ Var(z).
    pub sum: f64,
    pub squares: f64,
    pub variance: f64,
    /// Var(z_t).
    pub label: f64,
}

impl Spread {
    /// Of the logits `z` of `ids`.
    fn new(label: Label, ids: Range<usize>, lse: f64, z: ArrayView1<f64>, variance: ArrayView1<f64>) -> Self {
        let mut out = Self { sum: z.sum(), squares: z.dot(&z), variance: variance.sum(), ..Self::default() };
        for (z, variance) in z.iter().zip(variance) {
            let term = (2.0 * (z - lse)).exp() * variance;
            out.total += term;
            out.largest = out.largest.max(term);
            out.max = out.max.max(z.abs());
        }
        if let Some(label) = label.column().filter(|label| ids.contains(label)) {
            out.label = variance[label - ids.start];
        }
        out
    }

    /// Takes in that of other columns.
    fn add(&mut self, other: &Self) {
        self.total += other.total;
        self.largest = self.largest.max(other.largest);
        self.max = self.max.max(other.max);
        self.sum += other.sum;
        self.squares += other.squares;
        self.variance += other.variance;
        self.label += other.label;
    }
}

/// The errors of the logits and of all that one token's logits come to, under contracts that share their arithmetic.
#[derive(Clone, Debug, PartialEq)]
pub struct LogitFloor {
    pub(super) arithmetic: Arithmetic,
    pub(super) loss: Error,
    pub(super) lse: Error,
    pub(super) label_logits: Error,
    pub(super) spreads: Vec<Spread>,
}

impl LogitFloor {
    /// For `contract` on `problem`; `forward` is the oracle's.
    ///
    /// # Errors
    /// If the unembedding is a shard.
    pub fn new(contract: &Contract, problem: &Problem, forward: &Forward) -> Result<Self, ProblemError> {
        problem.require_whole("the floor")?;
        let mut out = Self::zeros(contract, problem);
        for rows in reference::token_spans(problem) {
            let q = reference::hidden_rows(problem, rows.clone());
            let q_squared = q.mapv(|q| q * q);
            let of_tile = |ids: Range<usize>| -> Vec<Spread> {
                let z = reference::logit_tile(problem, &q, ids.clone());
                let mut variance = reference::squared_product_tile(problem, &q_squared, ids.clone());
                out.arithmetic.logit_variance(problem, z.view(), &mut variance);
                let spread = |(n, (z, variance)): (usize, (ArrayView1<f64>, ArrayView1<f64>))| {
                    Spread::new(problem.labels()[n], ids.clone(), forward.lse[n], z, variance)
                };
                rows.clone().zip(z.outer_iter().zip(variance.outer_iter())).map(spread).collect()
            };
            let mut spreads = vec![Spread::default(); rows.len()];
            reference::fold_tiles(problem, of_tile, |tile| spreads.iter_mut().zip(tile).for_each(|(sum, tile)| sum.add(&tile)));
            for (n, spread) in rows.zip(spreads).filter(|(n, _)| problem.labels()[*n] != Label::Masked) {
                out.token(problem, forward, n, spread);
            }
        }
        Ok(out)
    }

    pub(super) fn zeros(contract: &Contract, problem: &Problem) -> Self {
        let per_token = Error::new(problem.shape().tokens, vec![1.0]);
        Self {
            arithmetic: Arithmetic::of(contract),
            loss: per_token.clone(),
            lse: per_token.clone(),
            label_logits: per_token,
            spreads: vec![Spread::default(); problem.shape().tokens],
        }
    }

    /// Whether the logits of `contract` have these errors.
    pub fn is_of(&self, contract: &Contract) -> bool {
        self.arithmetic == Arithmetic::of(contract)
    }

    /// Takes in what the logits of token `n` come to.
    pub(super) fn token(&mut self, problem: &Problem, forward: &Forward, n: usize, mut spread: Spread) {
        let LossOptions { z_loss, label_smoothing, .. } = *problem.options();
        let (lse, z_t, loss) = (forward.lse[n], forward.label_logits[n], forward.loss[n]);
        if self.arithmetic.logits.is_16_bit() {
            // The largest of many rounded logits is biased upwards, by up to one rounding.
            spread.total += ROUNDING * (self.arithmetic.logits.unit_roundoff() * spread.max).powi(2);
        }
        let unit = self.arithmetic.unit();
        let v = problem.valid_columns() as f64;
        let sum_of_exp = Arithmetic::sum_of_exp(problem);
        let lse_variance = spread.total + unit * (lse * lse + spread.max * spread.max + sum_of_exp);
        let mut variance = self.arithmetic.p_variance(problem, &spread, lse, spread.label, (z_t - lse).exp());
        variance += unit * (z_t * z_t + spread.max * spread.max + loss * loss);
        variance += (2.0 * z_loss * lse).powi(2) * lse_variance + unit * (z_loss * lse * lse).powi(2);
        if label_smoothing > 0.0 {
            let mean = spread.sum / v;
            let sums = v * mean * mean / 3.0 + spread.squares / (6.0 * v) + mean * mean;
            variance += label_smoothing.powi(2) * (spread.variance / (v * v) + unit * sums + spread.label);
        }
        let errors = [(&mut self.loss, variance), (&mut self.lse, lse_variance), (&mut self.label_logits, spread.label)];
        for (error, variance) in errors {
            error.modelled[n] = variance;
            error.bound_rows[n] = CERTAIN * variance.sqrt();
        }
        self.spreads[n] = spread;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_spread_of_two_parts_is_that_of_the_whole() {
        let z = ndarray::array![0.5, -7.0, 3.0, 2.5, 1.0];
        let variance = ndarray::array![1.0, 2.0, 4.0, 8.0, 16.0];
        let (label, lse) = (Label::Column(3), 4.0);
        let of = |ids: Range<usize>| {
            let part = ndarray::s![ids.clone()];
            Spread::new(label, ids, lse, z.slice(part), variance.slice(part))
        };
        for cut in 1..5 {
            let mut sum = Spread::default();
            sum.add(&of(0..cut));
            sum.add(&of(cut..5));
            let figures = |s: Spread| [s.total, s.largest, s.max, s.sum, s.squares, s.variance, s.label];
            for (sum, whole) in figures(sum).into_iter().zip(figures(of(0..5))) {
                assert!((sum - whole).abs() <= 1e-15 * whole.abs(), "cut at {cut}: {sum} {whole}");
            }
        }
        let terms =
            [(-7.0f64).exp() * 1.0, (-22.0f64).exp() * 2.0, (-2.0f64).exp() * 4.0, (-3.0f64).exp() * 8.0, (-6.0f64).exp() * 16.0];
        let whole = of(0..5);
        assert!((whole.total - terms.iter().sum::<f64>()).abs() < 1e-15 && (whole.largest - terms[2]).abs() < 1e-15);
        assert_eq!((whole.max, whole.sum, whole.squares, whole.variance, whole.label), (7.0, 0.0, 65.5, 31.0, 8.0));
    }
}
