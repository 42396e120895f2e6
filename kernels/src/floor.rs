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

use crate::contract::{Contract, LabelTerm, Precision};
use crate::problem::{Label, Problem, ProblemError};
use crate::reference::{self, Cotangents, Forward, Gradients, RowCotangent, chain};
use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut1, Zip, s};
use std::ops::Range;

/// Variance of rounding x to nearest, over u²x², for a significand with Benford's distribution: (1/3)·E[2^(2e)/x²].
const ROUNDING: f64 = 0.18;
/// Standard deviations after which an error is no accident.
const CERTAIN: f64 = 12.0;
/// Relative error of an exp, in u: what careful float32 implementations keep to.
const EXP_ULPS: f64 = 4.0;
/// Bias of an exp over values like these, in u.
const EXP_BIAS: f64 = 2.0;
/// |z/cap| from which a capped logit is flat for every purpose here.
const SATURATED: f64 = 1.0 - 1e-12;
/// Below this, float32 hardware may flush to 0.
const SMALLEST_NORMAL: f64 = f32::MIN_POSITIVE as f64;

/// The error of one tensor, [rows, columns], before its final rounding.
#[derive(Clone, Debug, PartialEq)]
pub struct Error {
    /// Expected ‖error‖² of each row: all of it, and the share that a declared rounding to 16 bits has in it.
    squared: Vec<f64>,
    declared: Vec<f64>,
    /// |error| at [row, column] surely stays below bound_rows[row] · bound_columns[column].
    bound_rows: Vec<f64>,
    bound_columns: Vec<f64>,
}

impl Error {
    fn new(rows: usize, bound_columns: Vec<f64>) -> Self {
        Self { squared: vec![0.0; rows], declared: vec![0.0; rows], bound_rows: vec![0.0; rows], bound_columns }
    }

    /// Adds the error of another term of the same sum, such as another microbatch's.
    ///
    /// # Panics
    /// If the shapes differ.
    pub fn add(&mut self, other: &Error) {
        let shape = |e: &Error| (e.bound_rows.len(), e.bound_columns.len());
        assert_eq!(shape(self), shape(other), "errors of one shape");
        self.squared.iter_mut().zip(&other.squared).for_each(|(a, b)| *a += b);
        self.declared.iter_mut().zip(&other.declared).for_each(|(a, b)| *a += b);
        self.bound_rows.iter_mut().zip(&other.bound_rows).for_each(|(a, b)| *a += b);
        self.bound_columns.iter_mut().zip(&other.bound_columns).for_each(|(a, b)| *a = a.max(*b));
    }

    /// The error of `factor` times the tensor.
    pub fn scale(&mut self, factor: f64) {
        self.squared.iter_mut().chain(&mut self.declared).for_each(|s| *s *= factor * factor);
        self.bound_rows.iter_mut().for_each(|r| *r *= factor.abs());
    }

    /// What is tolerated after one final rounding of `reference` to `output`.
    ///
    /// # Panics
    /// If the reference has another shape.
    pub fn tolerance(&self, reference: ArrayView2<f64>, output: Precision) -> Tolerance {
        assert_eq!(reference.dim(), (self.squared.len(), self.bound_columns.len()), "a reference of the error's shape");
        let (before, declared) = (self.squared.clone(), self.declared.clone());
        let rounding = reference
            .outer_iter()
            .map(|row| row.iter().map(|&x| (output.round(x) - x).powi(2) + SMALLEST_NORMAL.powi(2)).sum())
            .collect();
        // Half a step between subnormals: 2⁻²⁵ in float16, far below the smallest normal number elsewhere.
        let absolute = if output == Precision::F16 { 2f64.powi(-25) } else { SMALLEST_NORMAL };
        let (bound_rows, bound_columns) = (self.bound_rows.clone(), self.bound_columns.clone());
        Tolerance { before, declared, rounding, u: output.unit_roundoff(), absolute, bound_rows, bound_columns }
    }
}

/// What is tolerated of one tensor, [rows, columns].
#[derive(Clone, Debug, PartialEq)]
pub struct Tolerance {
    /// Expected ‖error‖² of each row before the final rounding, and by it.
    before: Vec<f64>,
    rounding: Vec<f64>,
    /// The share of `before` that a declared rounding to 16 bits has.
    declared: Vec<f64>,
    u: f64,
    absolute: f64,
    bound_rows: Vec<f64>,
    bound_columns: Vec<f64>,
}

impl Tolerance {
    /// The floor: ‖error‖₂ that an honest computation is expected to make over the given rows.
    pub fn l2(&self, rows: Range<usize>) -> f64 {
        (self.before[rows.clone()].iter().sum::<f64>() + self.rounding[rows].iter().sum::<f64>()).sqrt()
    }

    /// What ‖error‖₂ of an honest computation does not exceed over the given rows, by accident either.
    ///
    /// A row's float32 error may hang on a single rounding, so its square is taken as a χ² variable of one degree of freedom.
    /// A declared rounding to 16 bits is known better: its effect was emulated, no single one exceeds 2.4 times its standard
    /// deviation, and 16 degrees of freedom leave room for 2.7. The sum is bounded by Laurent and Massart (Ann. Statist. 28,
    /// 2000, lemma 1): P(X ≥ ΣE + 2√(x·ΣE²/dof) + 2x·max E/dof) ≤ e⁻ˣ.
    pub fn limit(&self, rows: Range<usize>) -> f64 {
        const X: f64 = 28.0;
        const DECLARED_FREEDOM: f64 = 16.0;
        let (mut spread, mut largest) = (0.0, 0.0f64);
        for (all, declared) in self.before[rows.clone()].iter().zip(&self.declared[rows.clone()]) {
            let modelled = all - declared;
            spread += modelled * modelled + declared * declared / DECLARED_FREEDOM;
            largest = largest.max(modelled).max(declared / DECLARED_FREEDOM);
        }
        (self.l2(rows).powi(2) + 2.0 * (X * spread).sqrt() + 2.0 * X * largest).sqrt()
    }

    /// How much ⟨error, reference⟩ an honest computation may add, before the final rounding and by it, for a reference whose
    /// rows have the squared norms `rows`: the first may have one sign in all rows, the second is a random sum.
    pub fn projected(&self, rows: impl Iterator<Item = f64>) -> (f64, f64) {
        let (mut before, mut rounding) = (0.0, 0.0);
        for ((squared, e), r) in rows.zip(&self.before).zip(&self.rounding) {
            before += (e * squared).sqrt();
            rounding += r * squared;
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

impl Contract {
    /// The error that an honest computation under this contract makes on `problem`, before the final roundings.
    ///
    /// `forward` and `gradients` are the oracle's, for the same `cotangents`.
    ///
    /// # Errors
    /// If the unembedding is a shard.
    pub fn floor(
        &self,
        problem: &Problem,
        forward: &Forward,
        cotangents: &Cotangents,
        gradients: &Gradients,
    ) -> Result<Floor, ProblemError> {
        problem.require_whole("the floor")?;
        Ok(Builder::new(*self, problem, forward, cotangents).build(gradients))
    }
}

/// Sums over the errors of dlogits, per row of a gradient.
#[derive(Clone)]
struct Energy {
    /// Σ Var(s)·‖x‖²: errors of dlogits, independent of each other.
    independent: Vec<f64>,
    /// Σ s²·‖x‖²: what a rounding of s, and a running sum of s·x, are in proportion to.
    terms: Vec<f64>,
}

impl Energy {
    fn new(rows: usize) -> Self {
        Self { independent: vec![0.0; rows], terms: vec![0.0; rows] }
    }

    fn add(&mut self, row: usize, variance: f64, s: f64, x_squared: f64) {
        self.independent[row] += variance * x_squared;
        self.terms[row] += s * s * x_squared;
    }

    /// Squared error of a row whose sums have `n` terms and the squared norm `total`, by arithmetic of unit roundoff `u`.
    fn squared(&self, row: usize, u: f64, n: usize, total: f64) -> f64 {
        let (n, terms) = (n as f64, self.terms[row]);
        self.independent[row] + ROUNDING * u * u * (n * (total / 3.0 + terms / 6.0) + terms) + u * u * total
    }
}

/// One token's valid logits and what their errors are.
struct Row<'a> {
    n: usize,
    label: usize,
    cotangent: RowCotangent,
    z: ArrayView1<'a, f64>,
    /// Variance of each computed logit.
    variance: ArrayView1<'a, f64>,
    /// Σ P²·Var(z) and the largest term of that sum.
    spread: f64,
    largest: f64,
    /// Largest |z|.
    max: f64,
}

struct Builder<'a> {
    contract: Contract,
    /// Unit roundoff of the arithmetic.
    u: f64,
    problem: &'a Problem<'a>,
    forward: &'a Forward,
    /// ‖K_v‖² and ‖q_n‖².
    k_squared: Vec<f64>,
    q_squared: Vec<f64>,
    /// Variance of the relative error that all of a row's P share, [N].
    common: Vec<f64>,
    /// Of the lse part, of the label part and of the sum.
    hidden: [Energy; 3],
    unembedding: [Energy; 3],
    cotangents: &'a Cotangents,
    /// Effect of the emulated roundings: on the lse part, and what the sum has beyond that.
    emulated: Option<Gradients>,
    out: Floor,
}

impl<'a> Builder<'a> {
    fn new(contract: Contract, problem: &'a Problem<'a>, forward: &'a Forward, cotangents: &'a Cotangents) -> Self {
        let shape = problem.shape();
        let (mut k_squared, mut k_max) = (Vec::with_capacity(shape.vocab), vec![0.0; shape.hidden]);
        for start in (0..shape.vocab).step_by(1024) {
            norms(&reference::unembedding_rows(problem, start..(start + 1024).min(shape.vocab)), &mut k_squared, &mut k_max);
        }
        let (mut q_squared, mut q_max) = (Vec::with_capacity(shape.tokens), vec![0.0; shape.hidden]);
        norms(&reference::hidden_rows(problem, 0..shape.tokens), &mut q_squared, &mut q_max);
        let per_token = Error::new(shape.tokens, vec![1.0]);
        let gradient = |rows, columns| {
            let error = Error::new(rows, columns);
            GradientError { lse: error.clone(), label: error.clone(), sum: error }
        };
        let out = Floor {
            loss: per_token.clone(),
            lse: per_token.clone(),
            label_logits: per_token,
            hidden: gradient(shape.tokens, k_max),
            unembedding: gradient(shape.vocab, q_max),
        };
        Self {
            contract,
            u: contract.accumulate.unit_roundoff(),
            problem,
            forward,
            k_squared,
            q_squared,
            common: vec![0.0; shape.tokens],
            hidden: [(); 3].map(|()| Energy::new(shape.tokens)),
            unembedding: [(); 3].map(|()| Energy::new(shape.vocab)),
            cotangents,
            emulated: contract.dlogits.is_16_bit().then(|| Gradients::zeros(shape)),
            out,
        }
    }

    fn build(mut self, gradients: &Gradients) -> Floor {
        let valid = self.problem.valid_columns();
        for rows in reference::token_blocks(self.problem) {
            let z = reference::logits(self.problem, rows.clone());
            let variance = self.logit_variance(&z, rows.clone());
            let mut rounding = Array2::zeros(if self.emulated.is_some() { z.dim() } else { (0, 0) });
            let mut onehot = vec![0.0; rows.len()];
            for (i, n) in rows.clone().enumerate() {
                let Label::Column(label) = self.problem.labels()[n] else { continue };
                let cotangent = self.cotangents.row(self.problem, n, self.forward.lse[n]);
                let row = self.row(n, label as usize, cotangent, z.slice(s![i, ..valid]), variance.slice(s![i, ..valid]));
                self.per_token(&row);
                self.gradients(&row);
                if self.emulated.is_some() {
                    onehot[i] = self.emulate(&row, rounding.slice_mut(s![i, ..valid]));
                }
            }
            if let Some(Gradients { hidden, unembedding }) = &mut self.emulated {
                reference::hidden_product(self.problem, rows.clone(), rounding.view(), &mut hidden.lse);
                reference::hidden_label_product(self.problem, rows.clone(), &onehot, &mut hidden.label);
                reference::unembedding_product(self.problem, rows.clone(), rounding.view(), &mut unembedding.lse);
                reference::unembedding_label_product(self.problem, rows, &onehot, &mut unembedding.label);
            }
        }
        self.finish(gradients)
    }

    /// Variance of every z: the sum over D, the roundings of scale, cap and z − max, and the contract's own.
    fn logit_variance(&self, z: &Array2<f64>, rows: Range<usize>) -> Array2<f64> {
        let d = self.problem.shape().hidden as f64;
        let options = self.problem.options();
        let unit = ROUNDING * self.u * self.u;
        let declared = ROUNDING * self.contract.logits.unit_roundoff().powi(2);
        let mut squares =
            reference::squared_products(self.problem, &reference::hidden_rows(self.problem, rows).mapv_into(|q| q * q));
        Zip::from(&mut squares).and(z).par_for_each(|t, &z| {
            let (x, slope) = match options.logit_softcap {
                Some(cap) => (cap * (z / cap).clamp(-SATURATED, SATURATED).atanh(), 1.0 - (z / cap).powi(2)),
                None => (z, 1.0),
            };
            *t = unit * (slope * slope * (d * (x * x / 3.0 + *t / 6.0) + *t + 2.0 * x * x) + 4.0 * z * z) + declared * z * z;
        });
        squares
    }

    fn row<'r>(
        &self,
        n: usize,
        label: usize,
        cotangent: RowCotangent,
        z: ArrayView1<'r, f64>,
        variance: ArrayView1<'r, f64>,
    ) -> Row<'r> {
        let (mut spread, mut largest, mut max) = (0.0, 0.0f64, 0.0f64);
        for (z, variance) in z.iter().zip(variance) {
            let term = (2.0 * (z - self.forward.lse[n])).exp() * variance;
            spread += term;
            largest = largest.max(term);
            max = max.max(z.abs());
        }
        if self.contract.logits.is_16_bit() {
            // The largest of many rounded logits is biased upwards, by up to one rounding.
            spread += ROUNDING * (self.contract.logits.unit_roundoff() * max).powi(2);
        }
        Row { n, label, cotangent, z, variance, spread, largest, max }
    }

    /// Variance of z_v − lse, the relative error of P_v in the backward.
    fn p_variance(&self, row: &Row, v: usize, p: f64) -> f64 {
        let lse = self.forward.lse[row.n];
        let unit = ROUNDING * self.u * self.u;
        let others = (row.spread - p * p * row.variance[v]).max(0.0);
        (1.0 - p).powi(2) * row.variance[v] + others + unit * (lse * lse + self.sum_of_exp() + EXP_ULPS * EXP_ULPS)
    }

    /// What summing V exponentials adds to the variance of lse, in units of ROUNDING·u².
    fn sum_of_exp(&self) -> f64 {
        self.problem.valid_columns() as f64 / 3.0 + EXP_ULPS * EXP_ULPS
    }

    fn per_token(&mut self, row: &Row) {
        let options = self.problem.options();
        let (lse, z_t, loss) = (self.forward.lse[row.n], self.forward.label_logits[row.n], self.forward.loss[row.n]);
        let unit = ROUNDING * self.u * self.u;
        let v = row.z.len() as f64;
        let p = (z_t - lse).exp();
        let label = row.variance[row.label];
        let lse_variance = row.spread + unit * (lse * lse + row.max * row.max + self.sum_of_exp());
        let mut variance = self.p_variance(row, row.label, p) + unit * (z_t * z_t + row.max * row.max + loss * loss);
        variance += (2.0 * options.z_loss * lse).powi(2) * lse_variance + unit * (options.z_loss * lse * lse).powi(2);
        if options.label_smoothing > 0.0 {
            let (mean, squares) = (row.z.sum() / v, row.z.dot(&row.z));
            let of_mean = row.variance.sum() / (v * v) + unit * (v * mean * mean / 3.0 + squares / (6.0 * v) + mean * mean);
            variance += options.label_smoothing.powi(2) * (of_mean + label);
        }
        let out = &mut self.out;
        for (error, variance) in [(&mut out.loss, variance), (&mut out.lse, lse_variance), (&mut out.label_logits, label)] {
            error.squared[row.n] = variance;
            error.bound_rows[row.n] = CERTAIN * variance.sqrt();
        }
    }

    /// Adds one token's share to the errors of the gradients.
    fn gradients(&mut self, row: &Row) {
        let n = row.n;
        let lse = self.forward.lse[n];
        let options = *self.problem.options();
        let RowCotangent { p: factor, onehot, constant } = row.cotangent;
        let unit = ROUNDING * self.u * self.u;
        self.common[n] = row.spread - row.largest + unit * (lse * lse + self.sum_of_exp());
        let rounding = self.contract.dlogits.unit_roundoff();
        let over_vocab = self.u * (4.0 + CERTAIN * (ROUNDING * row.z.len() as f64).sqrt());
        let over_tokens = self.u * (4.0 + CERTAIN * (ROUNDING * self.problem.shape().tokens as f64).sqrt());
        let mut hidden_rows = [0.0; 3];
        for v in 0..row.z.len() {
            let p = (row.z[v] - lse).exp();
            let slope = chain(&options, row.z[v]);
            // The derivative of the cap loses digits where it is small: its error is absolute.
            let slope_variance = match options.logit_softcap {
                Some(cap) => {
                    options.logit_scale.powi(2)
                        * (4.0 * (row.z[v] / (cap * cap)).powi(2) * row.variance[v] + (2.0 * self.u).powi(2))
                }
                None => 0.0,
            };
            let at_label = if v == row.label { onehot } else { 0.0 };
            let label_part = (at_label + constant) * slope;
            let lse_part = factor * p * slope;
            let deviation = self.p_variance(row, v, p).sqrt();
            // To first order p·deviation; where a logit is off by so much that e^x bends, P may become anything up to 1.
            let of_p = (p * deviation * (3.0 * deviation).exp()).min(1.0);
            let of_p = (factor * slope * of_p).powi(2);
            let (before, at_label) = (factor * p, at_label + constant);
            let (sum, before_sum) = match self.contract.label {
                LabelTerm::Joint => (lse_part + label_part, before + at_label),
                LabelTerm::Apart => (lse_part.abs() + label_part.abs(), before.abs() + at_label.abs()),
            };
            // The coefficients of P, onehot and constant are rounded too, and may cancel in the sum.
            let of_coefficients = unit * (before * before + at_label * at_label) * slope * slope;
            let variance = |before: f64, of_p: f64| of_p + of_coefficients + before * before * slope_variance;
            let parts =
                [(lse_part, variance(before, of_p)), (label_part, variance(at_label, 0.0)), (sum, variance(before_sum, of_p))];
            for (i, (s, variance)) in parts.into_iter().enumerate() {
                self.hidden[i].add(n, variance, s, self.k_squared[v]);
                self.unembedding[i].add(v, variance, s, self.q_squared[n]);
            }
            let certain = (factor * slope).abs() * (p * (CERTAIN * deviation).exp_m1()).min(1.0)
                + (before.abs() + at_label.abs()) * (CERTAIN * slope_variance.sqrt() + 2.0 * self.u * slope.abs());
            for (i, s) in [lse_part, label_part, sum].into_iter().enumerate() {
                // An exp that is flushed to 0 is then lost to its coefficient.
                let error = certain + 2.0 * rounding * s.abs() + SMALLEST_NORMAL * (1.0 + 2.0 * (factor * slope).abs());
                self.out.unembedding.each_mut()[i].bound_rows[v] += error + over_tokens * s.abs();
                hidden_rows[i] += error + over_vocab * s.abs();
            }
        }
        for (error, bound) in self.out.hidden.each_mut().into_iter().zip(hidden_rows) {
            error.bound_rows[n] = bound;
        }
    }

    /// Writes what rounding dlogits as declared changes, the label apart; returns the change at the label.
    fn emulate(&self, row: &Row, mut out: ArrayViewMut1<f64>) -> f64 {
        let Contract { dlogits, label, .. } = self.contract;
        let RowCotangent { p: factor, onehot, constant } = row.cotangent;
        let mut at_label = 0.0;
        for (v, out) in out.iter_mut().enumerate() {
            let slope = chain(self.problem.options(), row.z[v]);
            let exact = (factor * (row.z[v] - self.forward.lse[row.n]).exp() + constant) * slope;
            *out = dlogits.round(exact) - exact;
            if v == row.label && label == LabelTerm::Joint {
                let exact = exact + onehot * slope;
                at_label = dlogits.round(exact) - exact - *out;
            }
        }
        at_label
    }

    fn finish(mut self, gradients: &Gradients) -> Floor {
        let u = self.u;
        let rounding = ROUNDING * self.contract.dlogits.unit_roundoff().powi(2);
        let squares = |a: &Array2<f64>| -> Vec<f64> { a.outer_iter().map(|row| row.dot(&row)).collect() };
        let emulated = self.emulated.take();
        let common = std::mem::take(&mut self.common);
        let (hidden_effect, unembedding_effect) = emulated.as_ref().map(|e| (&e.hidden, &e.unembedding)).unzip();
        for (error, parts, effect, energy, terms, common) in [
            (&mut self.out.hidden, &gradients.hidden, hidden_effect, &self.hidden, self.problem.valid_columns(), &common[..]),
            (&mut self.out.unembedding, &gradients.unembedding, unembedding_effect, &self.unembedding, common.len(), &[]),
        ] {
            let (lse, label, sum) = (squares(&parts.lse), squares(&parts.label), squares(&parts.sum()));
            let effects = effect.map(|effect| [squares(&effect.lse), vec![0.0; label.len()], squares(&effect.sum())]);
            for row in 0..lse.len() {
                let total = match self.contract.label {
                    LabelTerm::Joint => sum[row],
                    LabelTerm::Apart => lse[row] + label[row],
                };
                // An error that all of a token's P share does not average out over the vocabulary.
                // Neither does the bias of an exp.
                let shared = (common.get(row).copied().unwrap_or(0.0) + (EXP_BIAS * u).powi(2)) * lse[row];
                let of_parts = [(lse[row], shared), (label[row], 0.0), (total, shared)];
                for (i, (error, (total, shared))) in error.each_mut().into_iter().zip(of_parts).enumerate() {
                    // What the declared rounding does here, and what it does to values like these: luck is no floor.
                    let rounded = if self.contract.label == LabelTerm::Apart { 0 } else { i };
                    let typical = rounding * energy[rounded].terms[row];
                    let declared = effects.as_ref().map_or(typical, |effects| effects[i][row].max(typical));
                    error.squared[row] = energy[i].squared(row, u, terms, total) + shared + declared;
                    error.declared[row] = declared;
                }
            }
        }
        self.out
    }
}

/// Appends the squared norm of each row, and raises `max` to the largest |element| of each column.
fn norms(rows: &Array2<f64>, squared: &mut Vec<f64>, max: &mut [f64]) {
    for row in rows.outer_iter() {
        squared.push(row.dot(&row));
        max.iter_mut().zip(row).for_each(|(m, x)| *m = x.abs().max(*m));
    }
}
