//! The oracle's forward and the errors of the logits in one pass, for steps whose logits are too many for several in float64.
//!
//! All logits are computed in float32, and those that decide log-sum-exp again in float64. Which these are follows from what
//! is to be judged: with P of the float32 logits, all with P_v ≥ τ,
//!
//! ```text
//! τ = SHARE · Var(lse) / Σ_v P_v·Var(z_v)      so that      Σ_{P_v < τ} P_v²·Var(z_v) ≤ SHARE · Var(lse)
//! ```
//!
//! where Var is the model's, of the longest order of sums, and Var(lse) what an honest float32 computation makes of lse at the
//! least. So log-sum-exp is right to a tenth of the error that it judges. Exponentials and all sums over V are in float64.

use super::CERTAIN;
use super::logits::{Arithmetic, LogitFloor, Spread};
use crate::contract::Contract;
use crate::problem::{Label, Layout, Problem, ProblemError, Shape};
use crate::product::general_mat_mul;
use crate::reference::{self, Forward};
use ndarray::{Array2, ArrayView1, Axis};
use rayon::prelude::*;
use std::ops::Range;

/// What the logits that stay in float32 may add to the variance of lse.
const SHARE: f64 = 0.01;

impl LogitFloor {
    /// What [`reference::forward`] and [`LogitFloor::new`] give, in the time of one float32 product: lse to a tenth of the
    /// error that `contract` allows it, the errors to some percent.
    ///
    /// # Errors
    /// If the unembedding is a shard.
    pub fn with_forward(contract: &Contract, problem: &Problem) -> Result<(Forward, Self), ProblemError> {
        Self::refined(contract, problem, SHARE)
    }

    fn refined(contract: &Contract, problem: &Problem, share: f64) -> Result<(Forward, Self), ProblemError> {
        problem.require_whole("the floor")?;
        let n = problem.shape().tokens;
        let mut floor = Self::zeros(contract, problem);
        let mut forward = Forward { loss: vec![0.0; n], lse: vec![0.0; n], label_logits: vec![0.0; n] };
        let taking_part: Vec<usize> = (0..n).filter(|&n| problem.labels()[n] != Label::Masked).collect();
        let mean_square_of_k = mean_square_of_k(problem);
        for tokens in taking_part.chunks(tokens_at_a_time(problem.shape())) {
            let products = float32_products(problem, tokens);
            let of_token = |(&n, products): (&usize, ArrayView1<f32>)| {
                Row::new(&floor, problem, n, &mean_square_of_k, products).refined(share)
            };
            let rows: Vec<(Spread, f64)> =
                tokens.par_iter().zip(products.axis_iter(Axis(0)).into_par_iter()).map(of_token).collect();
            for (&n, (spread, lse)) in tokens.iter().zip(rows) {
                let label = problem.labels()[n].column().map_or(0.0, |label| exact(problem, &q(problem, n), label).0);
                (forward.lse[n], forward.label_logits[n]) = (lse, label);
                forward.loss[n] = reference::loss(problem, lse, label, spread.sum);
                floor.token(problem, &forward, n, spread);
            }
        }
        Ok((forward, floor))
    }
}

/// The valid logits of one token.
struct Row<'a> {
    floor: &'a LogitFloor,
    problem: &'a Problem<'a>,
    label: Option<usize>,
    q: Vec<f64>,
    /// From float32 products.
    z: Vec<f64>,
    /// Σ_d (scale·q·k)² in the mean over the vocabulary.
    squares: f64,
}

impl<'a> Row<'a> {
    fn new(
        floor: &'a LogitFloor,
        problem: &'a Problem<'a>,
        n: usize,
        mean_square_of_k: &[f64],
        products: ArrayView1<f32>,
    ) -> Self {
        let options = problem.options();
        let q = q(problem, n);
        let squares: f64 = q.iter().zip(mean_square_of_k).map(|(q, k)| q * q * k).sum();
        let z = products.iter().map(|&x| capped(problem, options.logit_scale * f64::from(x))).collect();
        let label = problem.labels()[n].column();
        Self { floor, problem, label, q, z, squares: squares * options.logit_scale.powi(2) }
    }

    fn variance(&self, z: f64) -> f64 {
        self.floor.arithmetic.variance(self.problem, z, self.squares)
    }

    /// The logit from which on all are computed again, and the largest.
    fn cut(&self, share: f64) -> (f64, f64) {
        let arithmetic = &self.floor.arithmetic;
        let (max, min) = self.z.iter().fold((f64::NEG_INFINITY, f64::INFINITY), |(max, min), &z| (z.max(max), z.min(min)));
        let (mut sum, mut weighted) = (0.0, 0.0);
        for &z in &self.z {
            let e = (z - max).exp();
            sum += e;
            weighted += e * self.variance(z);
        }
        if !sum.is_finite() {
            return (f64::NEG_INFINITY, max);
        }
        let lse = max + sum.ln();
        let largest = max.abs().max(min.abs());
        let least = arithmetic.unit() * (lse * lse + largest * largest + Arithmetic::sum_of_exp(self.problem));
        let threshold = share * least * sum / weighted;
        (lse + threshold.ln() - CERTAIN * self.variance(largest).sqrt(), max)
    }

    /// What its errors add up to, and its log-sum-exp.
    fn refined(mut self, share: f64) -> (Spread, f64) {
        let (cut, max) = self.cut(share);
        let mut variances: Vec<(usize, f64)> = vec![];
        for v in 0..self.z.len() {
            if self.z[v] >= cut || self.z[v].is_nan() || self.label == Some(v) {
                let (z, squares) = exact(self.problem, &self.q, v);
                self.z[v] = z;
                variances.push((v, self.floor.arithmetic.variance(self.problem, z, squares)));
            }
        }
        let max = if max.is_finite() { max } else { self.z.iter().copied().fold(f64::NEG_INFINITY, f64::max) };
        let mut spread = Spread::default();
        let mut sum = 0.0;
        let mut exact = variances.into_iter().peekable();
        for (v, &z) in self.z.iter().enumerate() {
            let variance = exact.next_if(|(place, _)| *place == v).map_or_else(|| self.variance(z), |(_, variance)| variance);
            let e = (z - max).exp();
            let term = e * e * variance;
            sum += e;
            spread.total += term;
            spread.largest = spread.largest.max(term);
            spread.max = spread.max.max(z.abs());
            spread.sum += z;
            spread.squares += z * z;
            spread.variance += variance;
            if self.label == Some(v) {
                spread.label = variance;
            }
        }
        spread.total /= sum * sum;
        spread.largest /= sum * sum;
        (spread, max + sum.ln())
    }
}

fn capped(problem: &Problem, x: f64) -> f64 {
    problem.options().logit_softcap.map_or(x, |cap| cap * (x / cap).tanh())
}

/// A token's row of Q.
fn q(problem: &Problem, n: usize) -> Vec<f64> {
    reference::hidden_rows(problem, n..n + 1).into_raw_vec_and_offset().0
}

/// z of vocab id `v` and Σ_d (scale·q·k)².
fn exact(problem: &Problem, q: &[f64], v: usize) -> (f64, f64) {
    let k = reference::unembedding_rows(problem, v..v + 1);
    let (mut product, mut squares) = (0.0, 0.0);
    for (q, k) in q.iter().zip(&k) {
        let term = q * k;
        product += term;
        squares += term * term;
    }
    let scale = problem.options().logit_scale;
    (capped(problem, scale * product), scale * scale * squares)
}

/// The mean of k² over the valid vocab ids, for each feature.
fn mean_square_of_k(problem: &Problem) -> Vec<f64> {
    const IDS: usize = 1024;
    let (valid, d) = (problem.valid_columns(), problem.shape().hidden);
    let of_some = |start: usize| {
        let k = reference::unembedding_rows(problem, start..(start + IDS).min(valid));
        k.mapv_into(|k| k * k).sum_axis(Axis(0)).to_vec()
    };
    let parts: Vec<Vec<f64>> = (0..valid).step_by(IDS).collect::<Vec<_>>().into_par_iter().map(of_some).collect();
    (0..d).map(|i| parts.iter().map(|part| part[i]).sum::<f64>() / valid as f64).collect()
}

/// Tokens whose float32 logits fit 64 MiB.
fn tokens_at_a_time(shape: Shape) -> usize {
    const ELEMENTS: usize = 16 << 20;
    (ELEMENTS / shape.vocab.max(shape.hidden).max(1)).clamp(1, 1024)
}

/// Q·Kᵀ of some tokens and all valid vocab ids in float32.
fn float32_products(problem: &Problem, tokens: &[usize]) -> Array2<f32> {
    const IDS: usize = 1024;
    let (valid, d) = (problem.valid_columns(), problem.shape().hidden);
    let mut q = Array2::zeros((tokens.len(), d));
    let rows = tokens.iter().zip(q.outer_iter_mut());
    rows.for_each(|(n, mut row)| problem.hidden().copy_to_f32(n * d, row.as_slice_mut().expect("rows lie whole")));
    let mut out = Array2::zeros((tokens.len(), valid));
    out.axis_chunks_iter_mut(Axis(1), IDS).into_par_iter().enumerate().for_each(|(i, mut out)| {
        let k = float32_rows_of_k(problem, i * IDS..i * IDS + out.ncols());
        general_mat_mul(1.0, &q, &k.t(), 0.0, &mut out);
    });
    out
}

/// Rows of K (vocab ids), in the order in which it lies.
fn float32_rows_of_k(problem: &Problem, ids: Range<usize>) -> Array2<f32> {
    let Shape { hidden, vocab, .. } = problem.shape();
    let k = problem.unembedding();
    match problem.layout() {
        Layout::Vd => {
            let mut out = Array2::zeros((ids.len(), hidden));
            k.copy_to_f32(ids.start * hidden, out.as_slice_mut().expect("it lies whole"));
            out
        }
        Layout::Dv => {
            let mut out = Array2::zeros((hidden, ids.len()));
            for (d, mut row) in out.outer_iter_mut().enumerate() {
                k.copy_to_f32(d * vocab + ids.start, row.as_slice_mut().expect("rows lie whole"));
            }
            out.reversed_axes()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::{Inputs, LossOptions};
    use half::bf16;

    const SHAPE: Shape = Shape { tokens: 40, hidden: 700, vocab: 2500 };

    /// Logits of standard deviation `spread`, of bfloat16 Q and K; every eighth token is masked.
    fn with_problem<R>(spread: f64, layout: Layout, options: LossOptions, f: impl FnOnce(&Problem) -> R) -> R {
        let mut state = 1u64;
        let mut noise = || {
            // Twelve uniform numbers make one that is nearly normal.
            let mut uniform = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 11) as f64 / (1u64 << 53) as f64
            };
            (0..12).map(|_| uniform()).sum::<f64>() - 6.0
        };
        let Shape { tokens, hidden, vocab } = SHAPE;
        let q: Vec<bf16> = (0..tokens * hidden).map(|_| bf16::from_f64(noise())).collect();
        let k: Vec<bf16> = (0..vocab * hidden).map(|_| bf16::from_f64(noise() * spread / (hidden as f64).sqrt())).collect();
        let targets: Vec<i32> = (0..tokens).map(|n| if n % 8 == 7 { -100 } else { (n * 61 % 2400) as i32 }).collect();
        let inputs = Inputs {
            hidden: q[..].into(),
            unembedding: k[..].into(),
            layout,
            targets: targets[..].into(),
            token_weights: None,
            shape: SHAPE,
            shard: None,
        };
        f(&Problem::new(inputs, options).unwrap())
    }

    fn cases() -> Vec<(f64, Layout, LossOptions)> {
        let plain = LossOptions::default();
        let all = LossOptions {
            logit_scale: 0.7,
            logit_softcap: Some(15.0),
            z_loss: 1e-3,
            label_smoothing: 0.1,
            valid_vocab: Some(2450),
            ..plain
        };
        let spreads = [0.02, 1.0, 3.0, 10.0, 30.0, 1000.0];
        spreads.into_iter().flat_map(|spread| [(spread, Layout::Vd, plain), (spread, Layout::Dv, all)]).collect()
    }

    /// Σ of squared errors of lse, over what `share` of the judged variance allows.
    fn off(problem: &Problem, share: f64) -> f64 {
        let exact = reference::forward(problem).unwrap();
        let (forward, floor) = LogitFloor::refined(&Contract::F32, problem, share).unwrap();
        let squared: f64 = forward.lse.iter().zip(&exact.lse).map(|(a, b)| (a - b).powi(2)).sum();
        squared / (SHARE * floor.lse.modelled.iter().sum::<f64>())
    }

    #[test]
    fn lse_is_right_to_a_share_of_the_error_that_it_judges() {
        for (spread, layout, options) in cases() {
            with_problem(spread, layout, options, |problem| {
                let off = off(problem, SHARE);
                assert!(off <= 1.0, "{spread} {options:?}: {off}");
            });
        }
    }

    /// What is not computed again is seen.
    #[test]
    fn float32_logits_alone_are_not_enough() {
        let (_, layout, options) = cases()[0];
        assert!(with_problem(30.0, layout, options, |problem| off(problem, f64::INFINITY)) > 1.0);
    }

    #[test]
    fn errors_are_those_of_float64_logits() {
        for (spread, layout, options) in cases() {
            with_problem(spread, layout, options, |problem| {
                let exact = reference::forward(problem).unwrap();
                let whole = LogitFloor::new(&Contract::F32, problem, &exact).unwrap();
                let (forward, floor) = LogitFloor::with_forward(&Contract::F32, problem).unwrap();
                for n in 0..SHAPE.tokens {
                    let close = |a: f64, b: f64, what: f64| (a - b).abs() <= what * b.abs();
                    let label = (forward.label_logits[n], exact.label_logits[n]);
                    assert!((label.0 - label.1).abs() <= 1e-12 * spread, "token {n}: {label:?}");
                    let loss = (forward.loss[n] - exact.loss[n]).powi(2);
                    assert!(loss <= 0.25 * whole.loss.modelled[n], "token {n}: loss off by {}", loss.sqrt());
                    let errors =
                        [(&floor.loss, &whole.loss), (&floor.lse, &whole.lse), (&floor.label_logits, &whole.label_logits)];
                    for (found, expected) in errors {
                        let (found, expected) = (found.modelled[n], expected.modelled[n]);
                        assert!(close(found, expected, 0.05), "{spread} {options:?}, token {n}: {found} {expected}");
                    }
                }
            });
        }
    }

    #[test]
    fn what_overflows_float32_does_not_overflow() {
        let (q, k) = ([2e19f32, 1.0], [2e19f32, 1.0, -2e19, 1.0, 2e19, 2.0]);
        let inputs = Inputs {
            hidden: q[..].into(),
            unembedding: k[..].into(),
            layout: Layout::Vd,
            targets: [2i32][..].into(),
            token_weights: None,
            shape: Shape { tokens: 1, hidden: 2, vocab: 3 },
            shard: None,
        };
        let problem = Problem::new(inputs, LossOptions::default()).unwrap();
        let (forward, _) = LogitFloor::with_forward(&Contract::F32, &problem).unwrap();
        let exact = reference::forward(&problem).unwrap();
        assert!(exact.lse[0].is_finite());
        assert_eq!(forward, exact);
    }
}
