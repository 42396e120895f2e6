//! Causal multi-head attention over whole sequences, forward and backward.
//!
//! ```text
//! per sequence and head: A = softmax(queries·keysᵀ / √HEAD) over the positions so far,  output = A·values
//! dvalues = Aᵀ·do    dA = do·valuesᵀ    dscores = A·(dA − Σ A·dA) / √HEAD    dqueries = dscores·keys    dkeys = dscoresᵀ·queries
//! ```

use crate::model::{HEAD, real};
use ndarray::{Array2, ArrayView2, NdFloat, s};
use std::ops::Range;

/// One application of attention, with what its backward needs.
pub struct Attention<F> {
    /// Queries, keys, values, [N, 3D].
    qkv: Array2<F>,
    /// A of every (sequence, head), [T, T] each.
    weights: Vec<Array2<F>>,
    sequence: usize,
    /// [N, D].
    pub output: Array2<F>,
}

impl<F: NdFloat> Attention<F> {
    /// Attention of `qkv` [N, 3D], whose rows are whole sequences of `sequence` positions.
    pub fn forward(qkv: Array2<F>, sequence: usize) -> Self {
        let d = qkv.ncols() / 3;
        let mut output = Array2::zeros((qkv.nrows(), d));
        let mut weights = Vec::new();
        for (rows, columns) in heads(qkv.nrows(), d, sequence) {
            let [queries, keys, values] = split(&qkv, rows.clone(), columns.clone());
            let mut a = queries.dot(&keys.t());
            for (position, mut row) in a.outer_iter_mut().enumerate() {
                let (mut seen, mut future) = row.multi_slice_mut((s![..=position], s![position + 1..]));
                future.fill(F::zero());
                let max = seen.fold(F::neg_infinity(), |m, &x| m.max(x));
                seen.mapv_inplace(|x| ((x - max) * scale()).exp());
                let sum = seen.sum();
                seen.mapv_inplace(|x| x / sum);
            }
            output.slice_mut(s![rows, columns]).assign(&a.dot(&values));
            weights.push(a);
        }
        Self { qkv, weights, sequence, output }
    }

    /// The gradient of qkv, [N, 3D], from that of the output, [N, D].
    pub fn backward(&self, d_output: &Array2<F>) -> Array2<F> {
        let (n, d) = d_output.dim();
        let mut d_qkv = Array2::zeros((n, 3 * d));
        for ((rows, columns), a) in heads(n, d, self.sequence).zip(&self.weights) {
            let [queries, keys, values] = split(&self.qkv, rows.clone(), columns.clone());
            let d_output = d_output.slice(s![rows.clone(), columns.clone()]);
            let mut d_scores = d_output.dot(&values.t());
            for (mut d, a) in d_scores.outer_iter_mut().zip(a.outer_iter()) {
                let mean = d.dot(&a);
                d.zip_mut_with(&a, |d, &a| *d = a * (*d - mean) * scale());
            }
            let parts = [d_scores.dot(&keys), d_scores.t().dot(&queries), a.t().dot(&d_output)];
            for (part, gradient) in parts.iter().enumerate() {
                d_qkv.slice_mut(s![rows.clone(), columns.start + part * d..columns.end + part * d]).assign(gradient);
            }
        }
        d_qkv
    }
}

/// 1 / √HEAD.
fn scale<F: NdFloat>() -> F {
    real(1.0 / (HEAD as f64).sqrt())
}

/// The rows of every sequence with the columns of every head.
fn heads(n: usize, d: usize, sequence: usize) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
    let columns = move |rows: Range<usize>| (0..d).step_by(HEAD).map(move |c| (rows.clone(), c..c + HEAD));
    (0..n).step_by(sequence).flat_map(move |r| columns(r..r + sequence))
}

/// Queries, keys and values of one sequence and head, [T, HEAD] each.
fn split<F>(qkv: &Array2<F>, rows: Range<usize>, columns: Range<usize>) -> [ArrayView2<'_, F>; 3] {
    let d = qkv.ncols() / 3;
    [0, 1, 2].map(|part| qkv.slice(s![rows.clone(), columns.start + part * d..columns.end + part * d]))
}
