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
//! Beyond inputs and results it needs some 200 MiB, and 20 MiB for each thread. Where V·D numbers in float64 are too many,
//! [`backward_rows`] gives those rows of dQ and dK that a [`Sample`] names.

use crate::problem::{Label, Layout, LossOptions, Problem, ProblemError, Sample, Shape};
use crate::product::general_mat_mul;
use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut2, Axis, s};
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

    /// Those of some tokens.
    pub fn select(&self, tokens: &[usize]) -> Self {
        let of = |c: &Option<Vec<f64>>| c.as_ref().map(|c| tokens.iter().map(|&n| c[n]).collect());
        Self { loss: of(&self.loss), lse: of(&self.lse), label_logits: of(&self.label_logits) }
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
    for rows in token_spans(problem) {
        let q = hidden_rows(problem, rows.clone());
        let mut sums = vec![LogitSums::default(); rows.len()];
        let of_tile = |ids: Range<usize>| -> Vec<LogitSums> {
            let z = logit_tile(problem, &q, ids.clone());
            let sums = |(n, z): (usize, ArrayView1<f64>)| LogitSums::new(problem.labels()[n], ids.clone(), z);
            rows.clone().zip(z.outer_iter()).map(sums).collect()
        };
        fold_tiles(problem, of_tile, |tile| sums.iter_mut().zip(tile).for_each(|(sum, tile)| sum.add(&tile)));
        for (n, sums) in rows.zip(sums).filter(|(n, _)| problem.labels()[*n] != Label::Masked) {
            (out.loss[n], out.lse[n], out.label_logits[n]) = (sums.loss(problem), sums.lse(), sums.label);
        }
    }
    Ok(out)
}

/// What a token's loss needs of its valid logits.
#[derive(Clone, Copy, Debug)]
struct LogitSums {
    max: f64,
    /// Σ exp(z − max).
    exp: f64,
    /// Σ z.
    sum: f64,
    /// z_t.
    label: f64,
}

impl Default for LogitSums {
    fn default() -> Self {
        Self { max: f64::NEG_INFINITY, exp: 0.0, sum: 0.0, label: 0.0 }
    }
}

impl LogitSums {
    /// Of the logits `z` of `ids`, one at least.
    fn new(label: Label, ids: Range<usize>, z: ArrayView1<f64>) -> Self {
        let max = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let label = label.column().filter(|label| ids.contains(label)).map_or(0.0, |label| z[label - ids.start]);
        Self { max, exp: z.iter().map(|z| (z - max).exp()).sum(), sum: z.sum(), label }
    }

    /// Takes in those of other columns.
    fn add(&mut self, other: &Self) {
        let max = self.max.max(other.max);
        self.exp = self.exp * (self.max - max).exp() + other.exp * (other.max - max).exp();
        self.max = max;
        self.sum += other.sum;
        self.label += other.label;
    }

    fn lse(&self) -> f64 {
        self.max + self.exp.ln()
    }

    /// ℓ.
    fn loss(&self, problem: &Problem) -> f64 {
        loss(problem, self.lse(), self.label, self.sum)
    }
}

/// ℓ of a token whose log-sum-exp is `lse`, whose label logit is `label` and whose valid logits add up to `sum`.
pub fn loss(problem: &Problem, lse: f64, label: f64, sum: f64) -> f64 {
    let LossOptions { z_loss, label_smoothing, .. } = *problem.options();
    let mean = sum / problem.valid_columns() as f64;
    lse - (1.0 - label_smoothing) * label - label_smoothing * mean + z_loss * lse * lse
}

/// dQ and dK, in parts, for `cotangents` of the results of [`forward`].
///
/// # Errors
/// If the unembedding is a shard.
pub fn backward(problem: &Problem, lse: &[f64], cotangents: &Cotangents) -> Result<Gradients, ProblemError> {
    problem.require_whole("the oracle")?;
    let mut out = Gradients::zeros(problem.shape());
    add_gradients(problem, lse, cotangents, Some(&mut out.hidden), Some(&mut out.unembedding));
    Ok(out)
}

/// The rows of dQ and dK that `sample` names, in its order: [`backward`] at the cost of these rows.
///
/// It holds a copy of the sampled rows of Q and K besides.
///
/// # Errors
/// If the unembedding is a shard, or a row does not exist.
pub fn backward_rows(
    problem: &Problem,
    lse: &[f64],
    cotangents: &Cotangents,
    sample: &Sample,
) -> Result<Gradients, ProblemError> {
    problem.require_whole("the oracle")?;
    sample.require_within(problem.shape())?;
    let (tokens, ids) = (sample.tokens(), sample.ids());
    let mut out = Gradients::zeros(Shape { tokens: tokens.len(), vocab: ids.len(), ..problem.shape() });
    problem.with_tokens(tokens, |problem| {
        let lse: Vec<f64> = tokens.iter().map(|&n| lse[n]).collect();
        add_gradients(problem, &lse, &cotangents.select(tokens), Some(&mut out.hidden), None);
    });
    problem.with_ids(ids, |problem| add_gradients(problem, lse, cotangents, None, Some(&mut out.unembedding)));
    Ok(out)
}

/// Adds dQ and dK, those that are asked for, of a problem or a shard of one.
fn add_gradients(
    problem: &Problem,
    lse: &[f64],
    cotangents: &Cotangents,
    mut d_hidden: Option<&mut Parts>,
    mut d_unembedding: Option<&mut Parts>,
) {
    for rows in token_blocks(problem) {
        let dlogits = dlogits(problem, rows.clone(), lse, cotangents);
        if let Some(out) = &mut d_hidden {
            hidden_product(problem, rows.clone(), dlogits.lse.view(), &mut out.lse);
            if let Some(constant) = &dlogits.constant {
                hidden_product(problem, rows.clone(), constant.view(), &mut out.label);
            }
            hidden_label_product(problem, rows.clone(), &dlogits.onehot, &mut out.label);
        }
        if let Some(out) = &mut d_unembedding {
            unembedding_product(problem, rows.clone(), dlogits.lse.view(), &mut out.lse);
            if let Some(constant) = &dlogits.constant {
                unembedding_product(problem, rows.clone(), constant.view(), &mut out.label);
            }
            unembedding_label_product(problem, rows, &dlogits.onehot, &mut out.label);
        }
    }
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
        .map(|(n, z)| problem.labels()[n].column().map_or(0.0, |label| row(n).onehot * chain(options, z[label])))
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

/// dQ[n] += onehot[n]·K[t] over a block of tokens.
pub fn hidden_label_product(problem: &Problem, rows: Range<usize>, onehot: &[f64], d_hidden: &mut Array2<f64>) {
    for (n, &onehot) in rows.zip(onehot) {
        let Some(label) = problem.labels()[n].column() else { continue };
        d_hidden.row_mut(n).scaled_add(onehot, &unembedding_rows(problem, label..label + 1).row(0));
    }
}

/// dK[t] += onehot[n]·Q[n] over a block of tokens.
pub fn unembedding_label_product(problem: &Problem, rows: Range<usize>, onehot: &[f64], d_unembedding: &mut Array2<f64>) {
    let q = hidden_rows(problem, rows.clone());
    for ((n, q), &onehot) in rows.zip(q.outer_iter()).zip(onehot) {
        let Some(label) = problem.labels()[n].column() else { continue };
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

/// Blocks of tokens whose rows of Q, and of logits, fit a workspace of 64 MiB.
pub fn token_blocks(problem: &Problem) -> impl Iterator<Item = Range<usize>> + use<> {
    let Shape { tokens, hidden, vocab } = problem.shape();
    blocks(tokens, hidden.max(vocab))
}

/// Blocks of tokens whose rows of Q fit a workspace of 64 MiB: for what goes over the logits in tiles.
pub fn token_spans(problem: &Problem) -> impl Iterator<Item = Range<usize>> + use<> {
    let Shape { tokens, hidden, .. } = problem.shape();
    blocks(tokens, hidden)
}

fn blocks(tokens: usize, width: usize) -> impl Iterator<Item = Range<usize>> {
    const ELEMENTS: usize = 8 << 20;
    let block = (ELEMENTS / width).clamp(1, 1024);
    (0..tokens).step_by(block).map(move |start| start..(start + block).min(tokens))
}

/// Gives each tile of the valid vocab ids to `map`, many at a time, and its result to `fold`, in the order of the ids.
pub fn fold_tiles<T: Send>(problem: &Problem, map: impl Fn(Range<usize>) -> T + Sync, mut fold: impl FnMut(T)) {
    const AT_A_TIME: usize = 64;
    let (tile, valid) = (vocab_tile(problem.shape()), problem.valid_columns());
    let tiles = valid.div_ceil(tile);
    for first in (0..tiles).step_by(AT_A_TIME) {
        let some = (first..(first + AT_A_TIME).min(tiles)).into_par_iter();
        let done: Vec<T> = some.map(|i| map(i * tile..((i + 1) * tile).min(valid))).collect();
        done.into_iter().for_each(&mut fold);
    }
}

/// Vocab ids of one piece of work: enough pieces for many threads, 4 MiB of K in each.
fn vocab_tile(shape: Shape) -> usize {
    const ELEMENTS: usize = 1 << 19;
    const PIECES: usize = 16;
    const FEWEST: usize = 64;
    (ELEMENTS / shape.hidden).min(shape.vocab.div_ceil(PIECES)).clamp(FEWEST, MOST_IDS)
}

/// Vocab ids that a piece of work takes at most.
const MOST_IDS: usize = 1024;

/// z, [rows, V]: scaled, capped, −∞ in padding columns.
pub fn logits(problem: &Problem, rows: Range<usize>) -> Array2<f64> {
    let q = hidden_rows(problem, rows);
    let mut z = in_tiles(problem, &q, |ids, z| write_logits(problem, &q, ids, z));
    z.slice_mut(s![.., problem.valid_columns()..]).fill(f64::NEG_INFINITY);
    z
}

/// z of tokens whose rows of Q are `q` and of some valid vocab ids.
pub fn logit_tile(problem: &Problem, q: &Array2<f64>, ids: Range<usize>) -> Array2<f64> {
    let mut z = Array2::zeros((q.nrows(), ids.len()));
    write_logits(problem, q, ids, z.view_mut());
    z
}

fn write_logits(problem: &Problem, q: &Array2<f64>, ids: Range<usize>, mut z: ArrayViewMut2<f64>) {
    let options = problem.options();
    general_mat_mul(options.logit_scale, q, &unembedding_rows(problem, ids).t(), 0.0, &mut z);
    if let Some(cap) = options.logit_softcap {
        z.mapv_inplace(|x| cap * (x / cap).tanh());
    }
}

/// scale²·Σ_d q²·k², [rows, V]: the squared terms of each logit's sum over D. `q_squared` are the squares of their rows of Q.
pub fn squared_products(problem: &Problem, q_squared: &Array2<f64>) -> Array2<f64> {
    in_tiles(problem, q_squared, |ids, out| write_squared_products(problem, q_squared, ids, out))
}

/// Those of some vocab ids.
pub fn squared_product_tile(problem: &Problem, q_squared: &Array2<f64>, ids: Range<usize>) -> Array2<f64> {
    let mut out = Array2::zeros((q_squared.nrows(), ids.len()));
    write_squared_products(problem, q_squared, ids, out.view_mut());
    out
}

fn write_squared_products(problem: &Problem, q_squared: &Array2<f64>, ids: Range<usize>, mut out: ArrayViewMut2<f64>) {
    let k_squared = unembedding_rows(problem, ids).mapv_into(|k| k * k);
    general_mat_mul(problem.options().logit_scale.powi(2), q_squared, &k_squared.t(), 0.0, &mut out);
}

/// A [rows, V] matrix for rows `q`, whose tiles `write` writes.
fn in_tiles(problem: &Problem, q: &Array2<f64>, write: impl Fn(Range<usize>, ArrayViewMut2<f64>) + Sync) -> Array2<f64> {
    let tile = vocab_tile(problem.shape());
    let mut out = Array2::zeros((q.nrows(), problem.shape().vocab));
    let tiles = out.axis_chunks_iter_mut(Axis(1), tile).into_par_iter();
    tiles.enumerate().for_each(|(i, out)| write(i * tile..i * tile + out.ncols(), out));
    out
}

/// dQ[rows] += dlogits·K, for dlogits [rows, V].
pub fn hidden_product(problem: &Problem, rows: Range<usize>, dlogits: ArrayView2<f64>, d_hidden: &mut Array2<f64>) {
    const FEATURES: usize = 128;
    let Shape { vocab, .. } = problem.shape();
    let mut out = d_hidden.slice_mut(s![rows, ..]);
    out.axis_chunks_iter_mut(Axis(1), FEATURES).into_par_iter().enumerate().for_each(|(i, mut out)| {
        let features = i * FEATURES..i * FEATURES + out.ncols();
        for start in (0..vocab).step_by(MOST_IDS) {
            let ids = start..(start + MOST_IDS).min(vocab);
            let k = unembedding_block(problem, ids.clone(), features.clone());
            general_mat_mul(1.0, &dlogits.slice(s![.., ids]), &k, 1.0, &mut out);
        }
    });
}

/// dK += dlogitsᵀ·Q[rows], for dlogits [rows, V].
pub fn unembedding_product(problem: &Problem, rows: Range<usize>, dlogits: ArrayView2<f64>, d_unembedding: &mut Array2<f64>) {
    let q = hidden_rows(problem, rows);
    let tile = vocab_tile(problem.shape());
    let columns = dlogits.axis_chunks_iter(Axis(1), tile);
    d_unembedding
        .axis_chunks_iter_mut(Axis(0), tile)
        .into_par_iter()
        .zip(columns)
        .for_each(|(mut out, dlogits)| general_mat_mul(1.0, &dlogits.t(), &q, 1.0, &mut out));
}

/// Rows of Q in f64.
pub fn hidden_rows(problem: &Problem, rows: Range<usize>) -> Array2<f64> {
    let d = problem.shape().hidden;
    widened(rows, |n, row| problem.hidden().widen(n * d, row), d)
}

/// Rows of K (vocab ids) in f64, whatever its layout.
pub fn unembedding_rows(problem: &Problem, ids: Range<usize>) -> Array2<f64> {
    unembedding_block(problem, ids, 0..problem.shape().hidden)
}

/// K[ids, features] in f64, in the order in which it lies.
fn unembedding_block(problem: &Problem, ids: Range<usize>, features: Range<usize>) -> Array2<f64> {
    let Shape { hidden, vocab, .. } = problem.shape();
    let k = problem.unembedding();
    match problem.layout() {
        Layout::Vd => widened(ids, |v, row| k.widen(v * hidden + features.start, row), features.len()),
        Layout::Dv => widened(features, |d, row| k.widen(d * vocab + ids.start, row), ids.len()).reversed_axes(),
    }
}

fn widened(rows: Range<usize>, widen: impl Fn(usize, &mut [f64]), columns: usize) -> Array2<f64> {
    let mut out = vec![0.0; rows.len() * columns];
    rows.clone().zip(out.chunks_exact_mut(columns.max(1))).for_each(|(i, row)| widen(i, row));
    Array2::from_shape_vec((rows.len(), columns), out).expect("rows × columns elements")
}
