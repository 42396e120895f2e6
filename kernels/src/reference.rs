//! The oracle: float64 from the captured bits; short, obvious, and more precise than anything it judges.
//!
//! ```text
//! x = scale · Q·Kᵀ                z = cap · tanh(x / cap)        (z = x without a cap; −∞ from valid_vocab on)
//! lse = log Σ_v exp z_v           ℓ = lse − (1−ε)·z_t − ε·mean_v z_v + z_loss·lse²
//! with cotangents g of ℓ, h of lse, u of z_t:
//! ∂/∂z_v = P_v·(g·(1 + 2·z_loss·lse) + h)                        the lse part
//!        + onehot_v·(u − g·(1−ε)) − g·ε/V_valid                  the label part
//! dlogits = ∂/∂z · scale·(1 − (z/cap)²)                          dQ = dlogits·K,  dK = dlogitsᵀ·Q
//! ```
//! It holds the logits of a block of tokens at a time, all V of them, and takes its products from a library's f64 GEMM.

use crate::problem::{Floats, Label, Layout, LossOptions, Problem, ProblemError, Shape};
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis, s};
use rayon::prelude::*;
use std::ops::Range;

/// Per-token results, [N] each; 0 at masked tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Forward {
    /// ℓ, unweighted.
    pub loss: Vec<f64>,
    /// log Σ_v exp z_v.
    pub lse: Vec<f64>,
    /// z_t, after scale and cap.
    pub label_logits: Vec<f64>,
}

/// Cotangents of the per-token results, [N] each; `None` is all 0. Those of masked tokens are taken as 0.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cotangents {
    /// g, of ℓ.
    pub loss: Option<Vec<f64>>,
    /// h, of lse.
    pub lse: Option<Vec<f64>>,
    /// u, of z_t.
    pub label_logits: Option<Vec<f64>>,
}

impl Cotangents {
    /// g[n] = factor · w[n]: the cotangents of a weighted sum of per-token losses.
    pub fn weighted(problem: &Problem, factor: f64) -> Self {
        Self { loss: Some(problem.weights().iter().map(|&w| factor * f64::from(w)).collect()), lse: None, label_logits: None }
    }

    /// What multiplies P, the onehot and the constant 1 in ∂/∂z of token `n`; all 0 if it is masked.
    pub fn row(&self, problem: &Problem, n: usize, lse: f64) -> RowCotangent {
        if problem.labels()[n] == Label::Masked {
            return RowCotangent::default();
        }
        let at = |c: &Option<Vec<f64>>| c.as_ref().map_or(0.0, |c| c[n]);
        let (g, h, u) = (at(&self.loss), at(&self.lse), at(&self.label_logits));
        let LossOptions { z_loss, label_smoothing, .. } = *problem.options();
        RowCotangent {
            p: g * (1.0 + 2.0 * z_loss * lse) + h,
            onehot: u - g * (1.0 - label_smoothing),
            constant: -g * label_smoothing / problem.valid_total() as f64,
        }
    }
}

/// ∂/∂z_v = p·P_v + onehot·[v = t] + constant, of one token.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RowCotangent {
    /// Factor of P.
    pub p: f64,
    /// At the label.
    pub onehot: f64,
    /// In every valid column.
    pub constant: f64,
}

/// A gradient in its two parts.
#[derive(Clone, Debug, PartialEq)]
pub struct Parts {
    /// From P.
    pub lse: Array2<f64>,
    /// From the onehot (and label smoothing's constant).
    pub label: Array2<f64>,
}

impl Parts {
    /// The gradient.
    pub fn sum(&self) -> Array2<f64> {
        &self.lse + &self.label
    }
}

/// dQ [N, D] and dK [V, D] (whatever K's layout), in parts.
#[derive(Clone, Debug, PartialEq)]
pub struct Gradients {
    /// dQ.
    pub hidden: Parts,
    /// dK.
    pub unembedding: Parts,
}

impl Gradients {
    /// All 0, in the shapes of a problem's gradients.
    pub fn zeros(shape: Shape) -> Self {
        let zeros = |rows| Parts { lse: Array2::zeros((rows, shape.hidden)), label: Array2::zeros((rows, shape.hidden)) };
        Self { hidden: zeros(shape.tokens), unembedding: zeros(shape.vocab) }
    }
}

/// Per-token loss, lse and label logits.
///
/// # Errors
/// If the unembedding is a shard.
pub fn forward(problem: &Problem) -> Result<Forward, ProblemError> {
    problem.require_whole("the oracle")?;
    let n = problem.shape().tokens;
    let mut out = Forward { loss: vec![0.0; n], lse: vec![0.0; n], label_logits: vec![0.0; n] };
    for rows in token_blocks(problem) {
        let z = logits(problem, rows.clone());
        for (n, z) in rows.zip(z.outer_iter()) {
            let Label::Column(label) = problem.labels()[n] else { continue };
            (out.loss[n], out.lse[n]) = loss_and_lse(problem, label as usize, z.slice(s![..problem.valid_columns()]));
            out.label_logits[n] = z[label as usize];
        }
    }
    Ok(out)
}

/// ℓ and lse of one token from its valid logits.
pub fn loss_and_lse(problem: &Problem, label: usize, z: ArrayView1<f64>) -> (f64, f64) {
    let LossOptions { z_loss, label_smoothing, .. } = *problem.options();
    let lse = log_sum_exp(z.iter().copied());
    let smoothed = if label_smoothing > 0.0 { label_smoothing * z.sum() / z.len() as f64 } else { 0.0 };
    (lse - (1.0 - label_smoothing) * z[label] - smoothed + z_loss * lse * lse, lse)
}

/// dQ and dK, in parts, for `cotangents` of the results of [`forward`].
///
/// # Errors
/// If the unembedding is a shard.
pub fn backward(problem: &Problem, lse: &[f64], cotangents: &Cotangents) -> Result<Gradients, ProblemError> {
    problem.require_whole("the oracle")?;
    let mut out = Gradients::zeros(problem.shape());
    for rows in token_blocks(problem) {
        let dlogits = dlogits(problem, rows.clone(), lse, cotangents);
        products(problem, rows.clone(), dlogits.lse.view(), &mut out.hidden.lse, &mut out.unembedding.lse);
        if let Some(constant) = &dlogits.constant {
            products(problem, rows.clone(), constant.view(), &mut out.hidden.label, &mut out.unembedding.label);
        }
        label_products(problem, rows, &dlogits.onehot, &mut out.hidden.label, &mut out.unembedding.label);
    }
    Ok(out)
}

/// dlogits of a block of tokens: the lse part, and the label part split into its value at the label and the rest.
#[derive(Clone, Debug)]
pub struct Dlogits {
    /// The lse part, [rows, V].
    pub lse: Array2<f64>,
    /// The label part's share at the label, [rows].
    pub onehot: Vec<f64>,
    /// Label smoothing's share, [rows, V], if there is any.
    pub constant: Option<Array2<f64>>,
}

/// dlogits of a block of tokens.
pub fn dlogits(problem: &Problem, rows: Range<usize>, lse: &[f64], cotangents: &Cotangents) -> Dlogits {
    let valid = problem.valid_columns();
    let options = problem.options();
    let mut z = logits(problem, rows.clone());
    let row = |n: usize| cotangents.row(problem, n, lse[n]);
    let onehot = rows
        .clone()
        .zip(z.outer_iter())
        .map(|(n, z)| match problem.labels()[n] {
            Label::Column(label) => row(n).onehot * chain(options, z[label as usize]),
            _ => 0.0,
        })
        .collect();
    let constant = (options.label_smoothing > 0.0).then(|| {
        let mut constant = z.clone();
        constant.axis_iter_mut(Axis(0)).into_par_iter().zip(rows.clone()).for_each(|(mut z, n)| {
            let c = row(n).constant;
            z.slice_mut(s![..valid]).mapv_inplace(|z| c * chain(options, z));
            z.slice_mut(s![valid..]).fill(0.0);
        });
        constant
    });
    z.axis_iter_mut(Axis(0)).into_par_iter().zip(rows.clone()).for_each(|(mut z, n)| {
        let p = row(n).p;
        z.slice_mut(s![..valid]).mapv_inplace(|z| if p == 0.0 { 0.0 } else { p * (z - lse[n]).exp() * chain(options, z) });
        z.slice_mut(s![valid..]).fill(0.0);
    });
    Dlogits { lse: z, onehot, constant }
}

/// dQ[n] += onehot[n]·K[t] and dK[t] += onehot[n]·Q[n] over a block of tokens.
pub fn label_products(
    problem: &Problem,
    rows: Range<usize>,
    onehot: &[f64],
    d_hidden: &mut Array2<f64>,
    d_unembedding: &mut Array2<f64>,
) {
    let q = hidden_rows(problem, rows.clone());
    for ((n, q), &onehot) in rows.zip(q.outer_iter()).zip(onehot) {
        let Label::Column(label) = problem.labels()[n] else { continue };
        let label = label as usize;
        d_hidden.row_mut(n).scaled_add(onehot, &unembedding_rows(problem, label..label + 1).row(0));
        d_unembedding.row_mut(label).scaled_add(onehot, &q);
    }
}

/// ∂z/∂(Q·Kᵀ) at a valid column of logit `z`.
pub fn chain(options: &LossOptions, z: f64) -> f64 {
    options.logit_scale * options.logit_softcap.map_or(1.0, |cap| 1.0 - (z / cap).powi(2))
}

/// log Σ exp of the values; −∞ if there is none.
pub fn log_sum_exp(z: impl Iterator<Item = f64> + Clone) -> f64 {
    let max = z.clone().fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY {
        return max;
    }
    max + z.map(|z| (z - max).exp()).sum::<f64>().ln()
}

/// Blocks of tokens whose logits fit a bounded workspace.
pub fn token_blocks(problem: &Problem) -> impl Iterator<Item = Range<usize>> + use<> {
    const WORKSPACE: usize = 128 << 20;
    let n = problem.shape().tokens;
    let block = (WORKSPACE / size_of::<f64>() / problem.shape().vocab).clamp(16, 1024);
    (0..n).step_by(block).map(move |start| start..(start + block).min(n))
}

/// z, [rows, V]: scaled, capped, −∞ in padding columns.
pub fn logits(problem: &Problem, rows: Range<usize>) -> Array2<f64> {
    let q = hidden_rows(problem, rows);
    let options = problem.options();
    let valid = problem.valid_columns();
    let mut z = times_unembedding(problem, &q, options.logit_scale, |k| k);
    if let Some(cap) = options.logit_softcap {
        z.par_mapv_inplace(|x| cap * (x / cap).tanh());
    }
    z.slice_mut(s![.., valid..]).fill(f64::NEG_INFINITY);
    z
}

/// scale²·Σ_d q²·k², [rows, V]: the squared terms of each logit's sum over D.
pub fn squared_products(problem: &Problem, rows: Range<usize>) -> Array2<f64> {
    let q = hidden_rows(problem, rows).mapv(|q| q * q);
    times_unembedding(problem, &q, problem.options().logit_scale.powi(2), |k| k.mapv_into(|k| k * k))
}

fn times_unembedding(
    problem: &Problem,
    q: &Array2<f64>,
    scale: f64,
    of_k: impl Fn(Array2<f64>) -> Array2<f64> + Sync,
) -> Array2<f64> {
    let mut z = Array2::zeros((q.nrows(), problem.shape().vocab));
    z.axis_chunks_iter_mut(Axis(1), VOCAB_CHUNK).into_par_iter().zip(vocab_chunks(problem)).for_each(|(mut z, ids)| {
        ndarray::linalg::general_mat_mul(scale, q, &of_k(unembedding_rows(problem, ids)).t(), 0.0, &mut z);
    });
    z
}

/// dQ[rows] += dlogits·K and dK += dlogitsᵀ·Q[rows], for dlogits [rows, V].
pub fn products(
    problem: &Problem,
    rows: Range<usize>,
    dlogits: ArrayView2<f64>,
    d_hidden: &mut Array2<f64>,
    d_unembedding: &mut Array2<f64>,
) {
    let q = hidden_rows(problem, rows.clone());
    let partial: Vec<Array2<f64>> = d_unembedding
        .axis_chunks_iter_mut(Axis(0), VOCAB_CHUNK)
        .into_par_iter()
        .zip(vocab_chunks(problem))
        .map(|(mut dk, columns)| {
            let dlogits = dlogits.slice(s![.., columns.clone()]);
            ndarray::linalg::general_mat_mul(1.0, &dlogits.t(), &q, 1.0, &mut dk);
            dlogits.dot(&unembedding_rows(problem, columns))
        })
        .collect();
    let mut d_hidden = d_hidden.slice_mut(s![rows, ..]);
    partial.iter().for_each(|p| d_hidden += p);
}

const VOCAB_CHUNK: usize = 2048;

fn vocab_chunks(problem: &Problem) -> impl IndexedParallelIterator<Item = Range<usize>> {
    let v = problem.shape().vocab;
    (0..v.div_ceil(VOCAB_CHUNK)).into_par_iter().map(move |i| i * VOCAB_CHUNK..((i + 1) * VOCAB_CHUNK).min(v))
}

/// Rows of Q in f64.
pub fn hidden_rows(problem: &Problem, rows: Range<usize>) -> Array2<f64> {
    row_major(problem.hidden(), problem.shape().hidden, rows)
}

/// Rows of K (vocab ids) in f64, whatever its layout.
pub fn unembedding_rows(problem: &Problem, ids: Range<usize>) -> Array2<f64> {
    let shape = problem.shape();
    match problem.layout() {
        Layout::Vd => row_major(problem.unembedding(), shape.hidden, ids),
        Layout::Dv => {
            let k = problem.unembedding();
            Array2::from_shape_fn((ids.len(), shape.hidden), |(v, d)| f64::from(k.get(d * shape.vocab + ids.start + v)))
        }
    }
}

fn row_major(values: Floats, columns: usize, rows: Range<usize>) -> Array2<f64> {
    let flat: Array1<f64> = (rows.start * columns..rows.end * columns).map(|i| f64::from(values.get(i))).collect();
    flat.into_shape_with_order((rows.len(), columns)).expect("as many elements as the range holds")
}
