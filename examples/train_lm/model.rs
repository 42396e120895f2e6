//! A small causal decoder with its backward written by hand, generic over the float so that tests can check it in f64.
//!
//! ```text
//! x = E[token] + S[position]                      E [V, D], S [T, D], T the sequence length
//! per block: x ← x + attention(norm(x))·W_out     x ← x + silu(norm(x)·W_up)·W_down
//! hidden = norm(x)                                norm(x) = gain · x / √(mean x² + ε)
//! ```
//!
//! The logits hidden·Kᵀ and everything after them belong to the fused loss: the model ends at its hidden states.

use crate::attention::Attention;
use crate::random::Random;
use ndarray::{Array2, ArrayView2, Axis, NdFloat};

/// Features of one attention head.
pub const HEAD: usize = 16;
const BLOCKS: usize = 2;

/// All trained tensors. Gradients and Adam's moments have the same form.
#[derive(Clone, Debug, PartialEq)]
pub struct Weights<F> {
    /// E, [V, D].
    pub tokens: Array2<F>,
    /// S, [T, D].
    pub positions: Array2<F>,
    pub blocks: Vec<Block<F>>,
    /// Gain of the last norm, [1, D].
    pub norm: Array2<F>,
    /// K, [V, D].
    pub unembedding: Array2<F>,
}

/// The weights of one transformer block.
#[derive(Clone, Debug, PartialEq)]
pub struct Block<F> {
    /// [1, D].
    pub attention_norm: Array2<F>,
    /// Queries, keys and values side by side, [D, 3D].
    pub qkv: Array2<F>,
    /// W_out, [D, D].
    pub out: Array2<F>,
    /// [1, D].
    pub mlp_norm: Array2<F>,
    /// W_up, [D, 4D].
    pub up: Array2<F>,
    /// W_down, [4D, D].
    pub down: Array2<F>,
}

impl<F: NdFloat> Weights<F> {
    /// Random weights: matrices keep the size of what they multiply; K is small, so that training starts at lse ≈ ln V.
    pub fn random(vocab: usize, sequence: usize, d: usize, random: &mut Random) -> Self {
        let mut normal = |rows: usize, columns: usize, deviation: f64| {
            Array2::from_shape_simple_fn((rows, columns), || real::<F>(random.normal() * deviation))
        };
        let fan_in = |rows: usize| 1.0 / (rows as f64).sqrt();
        let gain = || Array2::ones((1, d));
        let blocks = (0..BLOCKS)
            .map(|_| Block {
                attention_norm: gain(),
                qkv: normal(d, 3 * d, fan_in(d)),
                out: normal(d, d, fan_in(d)),
                mlp_norm: gain(),
                up: normal(d, 4 * d, fan_in(d)),
                down: normal(4 * d, d, fan_in(4 * d)),
            })
            .collect();
        Self {
            tokens: normal(vocab, d, 1.0),
            positions: normal(sequence, d, 0.1),
            blocks,
            norm: gain(),
            unembedding: normal(vocab, d, 0.02),
        }
    }

    /// Zeros of the same shapes.
    pub fn zeros_like(&self) -> Self {
        let mut zeros = self.clone();
        zeros.tensors_mut().into_iter().for_each(|t| t.fill(F::zero()));
        zeros
    }

    /// Every tensor, always in the same order.
    pub fn tensors(&self) -> Vec<&Array2<F>> {
        let blocks = self.blocks.iter().flat_map(|b| [&b.attention_norm, &b.qkv, &b.out, &b.mlp_norm, &b.up, &b.down]);
        [&self.tokens, &self.positions, &self.norm, &self.unembedding].into_iter().chain(blocks).collect()
    }

    /// Every tensor, in the order of [`Weights::tensors`].
    pub fn tensors_mut(&mut self) -> Vec<&mut Array2<F>> {
        let blocks = self
            .blocks
            .iter_mut()
            .flat_map(|b| [&mut b.attention_norm, &mut b.qkv, &mut b.out, &mut b.mlp_norm, &mut b.up, &mut b.down]);
        [&mut self.tokens, &mut self.positions, &mut self.norm, &mut self.unembedding].into_iter().chain(blocks).collect()
    }

    /// Hidden states [N, D] of `ids` [N], whole sequences one after the other, and what the backward needs of them.
    pub fn forward(&self, ids: &[u32]) -> (Array2<F>, Trace<F>) {
        let sequence = self.positions.nrows();
        let mut x = Array2::zeros((ids.len(), self.norm.ncols()));
        for (n, (mut x, &id)) in x.outer_iter_mut().zip(ids).enumerate() {
            x += &self.tokens.row(id as usize);
            x += &self.positions.row(n % sequence);
        }
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for block in &self.blocks {
            let attention_norm = Norm::forward(&x, &block.attention_norm);
            let attention = Attention::forward(attention_norm.output.dot(&block.qkv), sequence);
            x += &attention.output.dot(&block.out);
            let mlp_norm = Norm::forward(&x, &block.mlp_norm);
            let up = mlp_norm.output.dot(&block.up);
            let activation = up.mapv(|u| u * sigmoid(u));
            x += &activation.dot(&block.down);
            blocks.push(BlockTrace { attention_norm, attention, mlp_norm, up, activation });
        }
        let norm = Norm::forward(&x, &self.norm);
        (norm.output.clone(), Trace { ids: ids.to_vec(), blocks, norm })
    }

    /// Adds to `gradient` what `d_hidden` [N, D], the gradient of the hidden states, makes of every tensor but K.
    pub fn backward(&self, trace: &Trace<F>, d_hidden: ArrayView2<F>, gradient: &mut Weights<F>) {
        let mut dx = trace.norm.backward(d_hidden, &self.norm, &mut gradient.norm);
        for ((block, trace), gradient) in self.blocks.iter().zip(&trace.blocks).zip(&mut gradient.blocks).rev() {
            gradient.down += &trace.activation.t().dot(&dx);
            let mut d_up = dx.dot(&block.down.t());
            d_up.zip_mut_with(&trace.up, |d, &u| {
                let s = sigmoid(u);
                *d *= s * (F::one() + u * (F::one() - s));
            });
            gradient.up += &trace.mlp_norm.output.t().dot(&d_up);
            dx += &trace.mlp_norm.backward(d_up.dot(&block.up.t()).view(), &block.mlp_norm, &mut gradient.mlp_norm);

            gradient.out += &trace.attention.output.t().dot(&dx);
            let d_qkv = trace.attention.backward(&dx.dot(&block.out.t()));
            gradient.qkv += &trace.attention_norm.output.t().dot(&d_qkv);
            let d_normed = d_qkv.dot(&block.qkv.t());
            dx += &trace.attention_norm.backward(d_normed.view(), &block.attention_norm, &mut gradient.attention_norm);
        }
        let sequence = self.positions.nrows();
        for (n, (dx, &id)) in dx.outer_iter().zip(&trace.ids).enumerate() {
            gradient.tokens.row_mut(id as usize).scaled_add(F::one(), &dx);
            gradient.positions.row_mut(n % sequence).scaled_add(F::one(), &dx);
        }
    }
}

/// What [`Weights::forward`] leaves for [`Weights::backward`].
pub struct Trace<F> {
    ids: Vec<u32>,
    blocks: Vec<BlockTrace<F>>,
    norm: Norm<F>,
}

struct BlockTrace<F> {
    attention_norm: Norm<F>,
    attention: Attention<F>,
    mlp_norm: Norm<F>,
    /// norm(x)·W_up, [N, 4D].
    up: Array2<F>,
    /// silu(up), [N, 4D].
    activation: Array2<F>,
}

/// One application of norm(x) = gain · x / √(mean x² + ε).
struct Norm<F> {
    /// x / √(mean x² + ε), [N, D].
    scaled: Array2<F>,
    /// 1 / √(mean x² + ε), [N, 1].
    factor: Array2<F>,
    /// gain · scaled, [N, D].
    output: Array2<F>,
}

impl<F: NdFloat> Norm<F> {
    fn forward(x: &Array2<F>, gain: &Array2<F>) -> Self {
        let mean_square = row_means(x * x);
        let factor = mean_square.mapv(|m| (m + real(1e-5)).sqrt().recip());
        let scaled = x * &factor;
        let output = &scaled * gain;
        Self { scaled, factor, output }
    }

    /// dx, with ŷ = scaled and dŷ = gain · dy: dx = factor · (dŷ − ŷ · mean(dŷ · ŷ)), and gain's own += Σ_n dy · ŷ.
    fn backward(&self, dy: ArrayView2<F>, gain: &Array2<F>, d_gain: &mut Array2<F>) -> Array2<F> {
        *d_gain += &(&dy * &self.scaled).sum_axis(Axis(0));
        let d_scaled = &dy * gain;
        let mean = row_means(&d_scaled * &self.scaled);
        (d_scaled - &self.scaled * &mean) * &self.factor
    }
}

/// [N, 1] from [N, D].
fn row_means<F: NdFloat>(x: Array2<F>) -> Array2<F> {
    x.sum_axis(Axis(1)).insert_axis(Axis(1)) / real::<F>(x.ncols() as f64)
}

fn sigmoid<F: NdFloat>(x: F) -> F {
    (F::one() + (-x).exp()).recip()
}

/// `x` in the model's float type.
pub fn real<F: NdFloat>(x: f64) -> F {
    F::from(x).expect("f32 and f64 are made from any f64")
}
