//! The floor: the error that an honest computation under a [`Contract`] makes on this very data.
//!
//! A rounding of dlogits to 16 bits is *emulated*: it is applied to the exact dlogits, and its effect goes through the same
//! two products. Float32 arithmetic is *modelled*, since its roundings depend on an
//! order of summation that a contract does not fix. With u = 2⁻²⁴, one rounding of x has variance `ROUNDING·u²·x²`, and a
//! running sum of n terms t with total S, taken as a random walk pinned at both ends, adds up to
//!
//! ```text
//! Var(sum) = ROUNDING·u²·( n·(S²/3 + Σt²/6) + Σt² )      partial sums, and the rounding of each product
//! Var(z_v − lse) = (1−P_v)²·Var(z_v) + Σ_{w≠v} P_w²·Var(z_w) + ROUNDING·u²·lse²·(1 + …)
//! ```
//!
//! which is the longest order, one accumulator per sum: kernels that sum in tiles lie below it. Squared errors of
//! independent sources add up: per row of the tensor, over the tensor, and over microbatches.
//!
//! The elementwise [`Tolerance::bound`] is there for what a norm cannot see: one wrong row among a hundred thousand. It
//! takes every rounding at `CERTAIN` standard deviations or at its largest, and Σ_v |s_v|·|K_vd| ≤ ‖s‖₁·max_v |K_vd|.
//! (Probabilistic rounding error bounds: Higham and Mary, SIAM J. Sci. Comput. 41, 2019; validated by 20 000 random cases of honest kernels.)

mod logits;
mod model;
mod refined;

pub use logits::LogitFloor;

use crate::contract::Precision;
use ndarray::{Array2, ArrayView1, ArrayView2};
use std::ops::Range;

/// Variance of rounding x to nearest, over u²x², for a significand with Benford's distribution: (1/3)·E[2^(2e)/x²].
const ROUNDING: f64 = 0.18;
/// Standard deviations after which an error is no accident.
const CERTAIN: f64 = 12.0;
/// Below this, float32 hardware may flush to 0.
const SMALLEST_NORMAL: f64 = f32::MIN_POSITIVE as f64;

/// The error of one tensor, [rows, columns], before its final rounding.
#[derive(Clone, Debug, PartialEq)]
pub struct Error {
    /// Expected ‖error‖² of each row by modelled arithmetic, …
    modelled: Vec<f64>,
    /// … by the declared roundings to 16 bits, for values like these, and what these do on this very data.
    typical: Vec<f64>,
    emulated: Vec<f64>,
    /// The error that they make on this very data, where it is kept: of several terms of a sum, those may have one direction.
    effect: Option<Array2<f64>>,
    /// |error| at [row, column] surely stays below bound_rows[row] · bound_columns[column].
    bound_rows: Vec<f64>,
    bound_columns: Vec<f64>,
}

impl Error {
    fn new(rows: usize, bound_columns: Vec<f64>) -> Self {
        let zeros = || vec![0.0; rows];
        Self { modelled: zeros(), typical: zeros(), emulated: zeros(), effect: None, bound_rows: zeros(), bound_columns }
    }

    /// Adds the error of another term of the same sum, such as another microbatch's.
    ///
    /// # Panics
    /// If the shapes differ.
    pub fn add(&mut self, other: &Error) {
        let shape = |e: &Error| (e.bound_rows.len(), e.bound_columns.len());
        assert_eq!(shape(self), shape(other), "errors of one shape");
        let pairs = [
            (&mut self.modelled, &other.modelled),
            (&mut self.typical, &other.typical),
            (&mut self.emulated, &other.emulated),
            (&mut self.bound_rows, &other.bound_rows),
        ];
        pairs.into_iter().for_each(|(a, b)| a.iter_mut().zip(b).for_each(|(a, b)| *a += b));
        self.bound_columns.iter_mut().zip(&other.bound_columns).for_each(|(a, b)| *a = a.max(*b));
        self.effect = self.effect.take().zip(other.effect.as_ref()).map(|(sum, other)| sum + other);
        if let Some(effect) = &self.effect {
            self.emulated = effect.outer_iter().map(|row| row.dot(&row)).collect();
        }
    }

    /// The error of `factor` times the tensor.
    pub fn scale(&mut self, factor: f64) {
        let squares = self.modelled.iter_mut().chain(&mut self.typical).chain(&mut self.emulated);
        squares.for_each(|s| *s *= factor * factor);
        self.bound_rows.iter_mut().for_each(|r| *r *= factor.abs());
        self.effect.iter_mut().for_each(|effect| *effect *= factor);
    }

    /// What is tolerated after one final rounding of `reference` to `output`.
    ///
    /// # Panics
    /// If the reference has another shape.
    pub fn tolerance(&self, reference: ArrayView2<f64>, output: Precision) -> Tolerance {
        assert_eq!(reference.dim(), (self.modelled.len(), self.bound_columns.len()), "a reference of the error's shape");
        // What the declared rounding does here, and what it does to values like these: luck is no floor.
        let declared: Vec<f64> = self.typical.iter().zip(&self.emulated).map(|(typical, here)| typical.max(*here)).collect();
        let before: Vec<f64> = self.modelled.iter().zip(&declared).map(|(modelled, declared)| modelled + declared).collect();
        let emulated = self.emulated.clone();
        // Half a step between subnormals: 2⁻²⁵ in float16, far below the smallest normal number elsewhere.
        let absolute = if output == Precision::F16 { 2f64.powi(-25) } else { SMALLEST_NORMAL };
        let rounding = reference
            .outer_iter()
            .zip(&before)
            .map(|(row, before)| Rounding::new(row, (before / row.len() as f64).sqrt(), output, absolute))
            .collect();
        let (bound_rows, bound_columns) = (self.bound_rows.clone(), self.bound_columns.clone());
        Tolerance { before, declared, emulated, rounding, u: output.unit_roundoff(), absolute, bound_rows, bound_columns }
    }
}

/// The final rounding of a row, of values that are not quite the exact ones.
///
/// r(x) = |round(x) − x| is a triangle wave: r(x + e) lies within |e| of r(x). An e far below a step leaves it as it is, and one
/// of a step or more makes it what it is to values like these.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Rounding {
    /// ‖r‖² of the exact values.
    exact: f64,
    /// ‖r‖² of values beside them, if that may be more.
    beside: f64,
    /// How far each element's r² may move: the sum of the squares, and the largest.
    squares: f64,
    largest: f64,
}

impl Rounding {
    /// `e` is the standard deviation of an element before it; `absolute` is half a step between subnormals.
    fn new(row: ArrayView1<f64>, e: f64, output: Precision, absolute: f64) -> Self {
        let u = output.unit_roundoff();
        let mut of_row = Self { exact: 0.0, beside: 0.0, squares: 0.0, largest: 0.0 };
        for &x in row {
            let r = (output.round(x) - x).abs();
            let typical = (ROUNDING * (u * x).powi(2)).max(x.abs().min(absolute).powi(2) / 3.0);
            let reached = (r + e).powi(2).min(typical);
            let moved = (e * (2.0 * r + e)).min(typical);
            of_row.exact += r.powi(2) + SMALLEST_NORMAL.powi(2);
            of_row.beside += r.powi(2).max(reached) + SMALLEST_NORMAL.powi(2);
            of_row.squares += moved * moved;
            of_row.largest = of_row.largest.max(moved);
        }
        of_row
    }
}

/// What is tolerated of one tensor, [rows, columns].
#[derive(Clone, Debug, PartialEq)]
pub struct Tolerance {
    /// Expected ‖error‖² of each row before the final rounding, and by it.
    before: Vec<f64>,
    rounding: Vec<Rounding>,
    /// The share of `before` that a declared rounding to 16 bits has, and what it does on this very data.
    declared: Vec<f64>,
    emulated: Vec<f64>,
    u: f64,
    absolute: f64,
    bound_rows: Vec<f64>,
    bound_columns: Vec<f64>,
}

impl Tolerance {
    /// What is tolerated of some rows, as a tensor of their own.
    ///
    /// # Panics
    /// If a row does not exist.
    pub fn of_rows(&self, rows: &[usize]) -> Self {
        let of = |values: &[f64]| rows.iter().map(|&row| values[row]).collect();
        Self {
            before: of(&self.before),
            rounding: rows.iter().map(|&row| self.rounding[row]).collect(),
            declared: of(&self.declared),
            emulated: of(&self.emulated),
            bound_rows: of(&self.bound_rows),
            bound_columns: self.bound_columns.clone(),
            ..*self
        }
    }

    /// The floor: ‖error‖₂ that an honest computation is expected to make over the given rows.
    pub fn l2(&self, rows: Range<usize>) -> f64 {
        (self.before[rows.clone()].iter().sum::<f64>() + self.rounding[rows].iter().map(|r| r.exact).sum::<f64>()).sqrt()
    }

    /// The floor with what the declared roundings do on this very data, even where luck makes that little: an honest computation
    /// that has these roundings comes near it.
    pub fn l2_with_luck(&self, rows: Range<usize>) -> f64 {
        let luck = self.declared[rows.clone()].iter().zip(&self.emulated[rows.clone()]).map(|(all, here)| all - here);
        (self.l2(rows).powi(2) - luck.sum::<f64>()).max(0.0).sqrt()
    }

    /// The floor of the arithmetic alone, before the final rounding and without a declared rounding to 16 bits.
    pub fn arithmetic_l2(&self, rows: Range<usize>) -> f64 {
        self.before[rows.clone()]
            .iter()
            .zip(&self.declared[rows])
            .map(|(all, declared)| all - declared)
            .sum::<f64>()
            .max(0.0)
            .sqrt()
    }

    /// What ‖error‖₂ of an honest computation does not exceed over the given rows, by accident either.
    ///
    /// A row's float32 error may hang on a single rounding, so its square is taken as a χ² variable of one degree of freedom.
    /// A declared rounding to 16 bits is known better: its effect was emulated, no single one exceeds 2.4 times its standard
    /// deviation, and 16 degrees of freedom leave room for 2.7. So is what the final rounding of an element may become by the
    /// error before it. The sum is bounded by Laurent and Massart (Ann. Statist. 28, 2000, lemma 1):
    /// P(X ≥ ΣE + 2√(x·ΣE²/dof) + 2x·max E/dof) ≤ e⁻ˣ.
    pub fn limit(&self, rows: Range<usize>) -> f64 {
        const X: f64 = 28.0;
        const ROUNDING_FREEDOM: f64 = 16.0;
        let (mut expected, mut spread, mut largest) = (0.0, 0.0, 0.0f64);
        for row in rows {
            let (declared, rounding) = (self.declared[row], &self.rounding[row]);
            let modelled = self.before[row] - declared;
            expected += self.before[row] + rounding.beside;
            spread += modelled * modelled + (declared * declared + rounding.squares) / ROUNDING_FREEDOM;
            largest = largest.max(modelled).max(declared.max(rounding.largest) / ROUNDING_FREEDOM);
        }
        (expected + 2.0 * (X * spread).sqrt() + 2.0 * X * largest).sqrt()
    }

    /// How much ⟨error, reference⟩ an honest computation may add, before the final rounding and by it, for a reference whose
    /// rows have the squared norms `rows`: the first may have one sign in all rows, the second is a random sum.
    pub fn projected(&self, rows: impl Iterator<Item = f64>) -> (f64, f64) {
        let (mut before, mut rounding) = (0.0, 0.0);
        for ((squared, e), r) in rows.zip(&self.before).zip(&self.rounding) {
            before += (e * squared).sqrt();
            rounding += r.exact * squared;
        }
        (before, rounding.sqrt())
    }

    /// What no honest computation exceeds at one element, whose exact value is `reference`.
    pub fn bound(&self, row: usize, column: usize, reference: f64) -> f64 {
        let before = self.bound_rows[row] * self.bound_columns[column];
        before + self.u * (reference.abs() + before) + self.absolute
    }
}

/// The errors of a gradient's two parts and of their sum.
#[derive(Clone, Debug, PartialEq)]
pub struct GradientError {
    /// Of the part from P.
    pub lse: Error,
    /// Of the part from the onehot.
    pub label: Error,
    /// Of the gradient.
    pub sum: Error,
}

impl GradientError {
    fn each_mut(&mut self) -> [&mut Error; 3] {
        [&mut self.lse, &mut self.label, &mut self.sum]
    }
}

/// The errors of everything that one microbatch computes.
#[derive(Clone, Debug, PartialEq)]
pub struct Floor {
    /// Of ℓ, [N, 1].
    pub loss: Error,
    /// Of lse, [N, 1].
    pub lse: Error,
    /// Of z_t, [N, 1].
    pub label_logits: Error,
    /// Of dQ, [N, D].
    pub hidden: GradientError,
    /// Of dK, [V, D].
    pub unembedding: GradientError,
}
