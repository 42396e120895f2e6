//! The streaming algorithm, once, generic over the instruction set.
//!
//! Tokens that take part are gathered in blocks, vocab columns in tiles, and tiles in chunks whose logits fit the workspace:
//!
//! ```text
//! for each block of tokens:
//!   for each chunk, for each tile of it, in parallel:     z = scale · Q_block · K_tileᵀ, capped; −∞ beyond the valid columns
//!                                                         max and Σ exp(z − max) of each row of the tile
//!   rows' statistics merged over tiles, in order          lse, label logit, loss
//!   for each chunk (z recomputed unless still there):
//!     for each tile, in parallel:                         z → dlogits = (p·exp(z − lse) + onehot + constant) · slope, in place
//!                                                         dK_tile += dlogitsᵀ · Q_block
//!     for each slice of the block, in parallel:           dQ_slice += dlogits · K, tile after tile
//! ```
//!
//! Every output element is summed by one task in a fixed order, whatever the number of threads. A masked token is never
//! gathered: whatever its row of Q holds reaches nothing.

use crate::cpu::exp::exp;
use crate::gemm::{Isa, Matrix, Packed, Store, multiply, widen_into};
use crate::problem::{Label, Layout, LossOptions, Problem};
use rayon::prelude::*;
use std::ops::Range;

/// Vocab columns of a tile.
pub(crate) const TILE: usize = 256;
/// Most tokens of a block.
const MOST_TOKENS: usize = 512;
/// Fewest tokens of a block for which a whole row of logits is kept, rather than recomputed.
const FEWEST_TOKENS: usize = 128;
/// Tokens of a block that one task accumulates dQ for.
const SLICE: usize = 64;
/// Rows of a [D, V] gradient that one task accumulates.
const FEATURES: usize = 64;

/// How a problem is cut up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Tokens of a block.
    pub tokens: usize,
    /// Tiles of a chunk.
    pub tiles: usize,
    /// Tiles in all.
    pub all_tiles: usize,
}

impl Plan {
    /// The cut whose logits take at most `workspace` bytes, or the smallest there is.
    pub fn new(vocab: usize, valid_tokens: usize, workspace: usize) -> Self {
        let all_tiles = vocab.div_ceil(TILE);
        let row = all_tiles * TILE * size_of::<f32>();
        let most = valid_tokens.clamp(1, MOST_TOKENS);
        let tokens = (workspace / row).min(most);
        if tokens >= FEWEST_TOKENS.min(most) {
            return Self { tokens, tiles: all_tiles, all_tiles };
        }
        let tokens = FEWEST_TOKENS.min(most).min((workspace / (TILE * size_of::<f32>())).max(1));
        let tiles = (workspace / (tokens * TILE * size_of::<f32>())).clamp(1, all_tiles);
        Self { tokens, tiles, all_tiles }
    }

    /// Elements of the logits workspace.
    pub fn elements(&self) -> usize {
        self.tokens * self.tiles * TILE
    }

    fn chunks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let Self { tiles, all_tiles, .. } = *self;
        (0..all_tiles).step_by(tiles).map(move |start| start..(start + tiles).min(all_tiles))
    }

    fn keeps_rows(&self) -> bool {
        self.tiles == self.all_tiles
    }
}

/// What a token's logits come to, over the columns seen so far. `merge` puts column ranges together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct RowStats {
    /// Largest logit.
    pub max: f32,
    /// Σ exp(z − max).
    pub sum: f64,
    /// Σ exp(z − max)·(z − max).
    pub weighted: f64,
    /// Σ z, for label smoothing.
    pub total: f64,
    /// The first column with the largest logit.
    pub argmax: u32,
    /// The label's logit, if its column was seen.
    pub label: Option<f32>,
}

impl RowStats {
    /// Of no column.
    pub const EMPTY: Self = Self { max: f32::NEG_INFINITY, sum: 0.0, weighted: 0.0, total: 0.0, argmax: 0, label: None };

    /// Takes in columns that come after those seen.
    pub fn merge(&mut self, later: &Self) {
        let label = self.label.or(later.label);
        let total = self.total + later.total;
        if self.sum == 0.0 {
            *self = *later;
        } else if later.sum != 0.0 {
            // NaN compares false: it stays on the side that has it, and reaches the sum through the exponentials.
            let argmax = if later.max > self.max { later.argmax } else { self.argmax };
            let max = if later.max > self.max { later.max } else { self.max };
            let (mut sum, mut weighted) = (0.0, 0.0);
            for part in [&*self, later] {
                let shift = f64::from(part.max) - f64::from(max);
                let factor = shift.exp();
                sum += factor * part.sum;
                weighted += if factor == 0.0 { 0.0 } else { factor * (part.weighted + shift * part.sum) };
            }
            *self = Self { max, sum, weighted, argmax, ..*self };
        }
        (self.label, self.total) = (label, total);
    }

    /// log Σ exp z.
    pub fn lse(&self) -> f64 {
        f64::from(self.max) + self.sum.ln()
    }
}

/// ∂/∂z_v = p·P_v + onehot·[v = t] + constant, of one token, and its lse.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Row {
    pub p: f32,
    pub onehot: f32,
    pub constant: f32,
    pub lse: f32,
}

/// Where the gradients go: float32 sums, added to.
pub(crate) struct Sums<'a> {
    /// [N, D].
    pub hidden: Option<&'a mut [f32]>,
    /// In K's layout.
    pub unembedding: Option<&'a mut [f32]>,
}

/// One walk over a problem.
pub(crate) struct Walk<'a, I: Isa> {
    pub isa: I,
    pub problem: &'a Problem<'a>,
    pub plan: Plan,
}

/// A block of tokens that take part.
struct Block<I: Isa> {
    /// Their places in the problem.
    tokens: Vec<usize>,
    /// Their rows of Q, [tokens, D].
    hidden: Vec<f32>,
    /// The same, packed as rows of A and as columns of B.
    as_a: Packed<I::Operand>,
    as_b: Packed<I::Operand>,
}

impl<I: Isa> Walk<'_, I> {
    /// Statistics of every token that takes part, [N]; `EMPTY` for the others.
    pub fn statistics(&self) -> Vec<RowStats> {
        let mut out = vec![RowStats::EMPTY; self.problem.shape().tokens];
        let mut workspace = self.workspace();
        for tokens in self.blocks() {
            let block = self.gather(tokens, false);
            for (n, stats) in block.tokens.iter().zip(self.forward(&block, &mut workspace)) {
                out[*n] = stats;
            }
        }
        out
    }

    /// Adds to `sums` the gradients for the coefficients that `row` gives each token.
    pub fn backward(&self, row: impl Fn(usize) -> Row, sums: &mut Sums) {
        let mut workspace = self.workspace();
        for tokens in self.blocks() {
            let block = self.gather(tokens, true);
            let rows: Vec<Row> = block.tokens.iter().map(|&n| row(n)).collect();
            for chunk in self.plan.chunks() {
                self.logits(&block, chunk.clone(), &mut workspace);
                self.gradients(&block, &rows, chunk, &mut workspace, sums);
            }
        }
    }

    /// Both, with the logits of a block computed once if the workspace holds them; `row` gets a token's statistics.
    pub fn forward_backward(&self, row: impl Fn(usize, &RowStats) -> Row, sums: &mut Sums) -> Vec<RowStats> {
        let mut out = vec![RowStats::EMPTY; self.problem.shape().tokens];
        let mut workspace = self.workspace();
        for tokens in self.blocks() {
            let block = self.gather(tokens, true);
            let stats = self.forward(&block, &mut workspace);
            let rows: Vec<Row> = block.tokens.iter().zip(&stats).map(|(&n, stats)| row(n, stats)).collect();
            for chunk in self.plan.chunks() {
                if !self.plan.keeps_rows() {
                    self.logits(&block, chunk.clone(), &mut workspace);
                }
                self.gradients(&block, &rows, chunk, &mut workspace, sums);
            }
            for (n, stats) in block.tokens.iter().zip(stats) {
                out[*n] = stats;
            }
        }
        out
    }

    fn workspace(&self) -> Vec<f32> {
        vec![0.0; self.plan.elements()]
    }

    fn blocks(&self) -> impl Iterator<Item = Vec<usize>> {
        let labels = self.problem.labels();
        let valid: Vec<usize> = (0..labels.len()).filter(|&n| labels[n] != Label::Masked).collect();
        let size = self.plan.tokens;
        (0..valid.len()).step_by(size).map(move |start| valid[start..valid.len().min(start + size)].to_vec())
    }

    fn gather(&self, tokens: Vec<usize>, for_gradients: bool) -> Block<I> {
        let d = self.problem.shape().hidden;
        let mut hidden = vec![0.0; tokens.len() * d];
        hidden.chunks_exact_mut(d).zip(&tokens).for_each(|(row, &n)| widen_into(self.problem.hidden(), n * d..(n + 1) * d, row));
        let (mut as_a, mut as_b) = (Packed::new(), Packed::new());
        self.isa.vectorize(|| {
            let rows = Matrix::rows(&hidden, d);
            as_a.pack::<I>(rows, tokens.len(), d, I::MR);
            if for_gradients {
                as_b.pack::<I>(rows.transposed(), d, tokens.len(), I::NR);
            }
        });
        Block { tokens, hidden, as_a, as_b }
    }

    /// Columns of tile `tile`.
    fn columns(&self, tile: usize) -> Range<usize> {
        tile * TILE..((tile + 1) * TILE).min(self.problem.shape().vocab)
    }

    /// K as rows by vocab id, from row `first` on.
    fn unembedding(&self, first: usize) -> Matrix<'_> {
        let shape = self.problem.shape();
        let (row_stride, column_stride) = match self.problem.layout() {
            Layout::Vd => (shape.hidden, 1),
            Layout::Dv => (1, shape.vocab),
        };
        Matrix { data: self.problem.unembedding(), offset: 0, row_stride, column_stride }.from(first, 0)
    }

    fn forward(&self, block: &Block<I>, workspace: &mut [f32]) -> Vec<RowStats> {
        let mut stats = vec![RowStats::EMPTY; block.tokens.len()];
        for chunk in self.plan.chunks() {
            self.logits(block, chunk.clone(), workspace);
            let per_tile: Vec<Vec<RowStats>> = workspace
                .par_chunks(block.tokens.len() * TILE)
                .zip(chunk.into_par_iter())
                .map(|(z, tile)| self.isa.vectorize(|| self.tile_statistics(block, tile, z)))
                .collect();
            for tile in &per_tile {
                stats.iter_mut().zip(tile).for_each(|(stats, tile)| stats.merge(tile));
            }
        }
        stats
    }

    /// Writes the logits of a block and a chunk of tiles: per tile [tokens, TILE].
    fn logits(&self, block: &Block<I>, chunk: Range<usize>, workspace: &mut [f32]) {
        let size = block.tokens.len() * TILE;
        workspace.par_chunks_mut(size).zip(chunk.into_par_iter()).for_each_init(Packed::new, |packed, (z, tile)| {
            self.isa.vectorize(|| {
                let columns = self.columns(tile);
                let shape = self.problem.shape();
                packed.pack::<I>(self.unembedding(columns.start), columns.len(), shape.hidden, I::NR);
                multiply(self.isa, &block.as_a, 0..block.tokens.len(), packed, z, TILE, Store::Overwrite);
                let valid = self.valid_columns(tile);
                for z in z.chunks_exact_mut(TILE) {
                    self.finish_logits(&mut z[..valid]);
                    // Padding of the vocabulary and of the tile: exp makes 0 of it, in lse and in every gradient.
                    z[valid..].fill(f32::NEG_INFINITY);
                }
            });
        });
    }

    fn valid_columns(&self, tile: usize) -> usize {
        self.problem.valid_columns().saturating_sub(tile * TILE).min(TILE)
    }

    #[inline(always)]
    fn finish_logits(&self, z: &mut [f32]) {
        let options = self.problem.options();
        let scale = options.logit_scale as f32;
        if scale != 1.0 {
            z.iter_mut().for_each(|z| *z *= scale);
        }
        if let Some(cap) = options.logit_softcap {
            let cap = cap as f32;
            z.iter_mut().for_each(|z| *z = cap * (*z / cap).tanh());
        }
    }

    #[inline(always)]
    fn tile_statistics(&self, block: &Block<I>, tile: usize, z: &[f32]) -> Vec<RowStats> {
        let (columns, valid) = (self.columns(tile), self.valid_columns(tile));
        let smooths = self.problem.options().label_smoothing > 0.0;
        let of_row = |(z, &n): (&[f32], &usize)| {
            let z = &z[..valid];
            if z.is_empty() {
                return RowStats::EMPTY;
            }
            let label = match self.problem.labels()[n] {
                Label::Column(label) if columns.contains(&(label as usize)) => Some(z[label as usize - columns.start]),
                _ => None,
            };
            let max = fold(z, f32::NEG_INFINITY, |max, z| if z > max { z } else { max }, |a, b| if b > a { b } else { a });
            let place = z.iter().position(|&x| x == max).unwrap_or(0);
            let sum = fold(z, 0.0, |sum, z| sum + exp(z - max), |a, b| a + b);
            let weighted = fold(z, 0.0, |sum, z| sum + exp(z - max) * (z - max), |a, b| a + b);
            let total = if smooths { fold(z, 0.0, |sum, z| sum + z, |a, b| a + b) } else { 0.0 };
            let argmax = (columns.start + place) as u32;
            RowStats { max, sum: sum.into(), weighted: weighted.into(), total: total.into(), argmax, label }
        };
        z.chunks_exact(TILE).zip(&block.tokens).map(of_row).collect()
    }

    fn gradients(&self, block: &Block<I>, rows: &[Row], chunk: Range<usize>, workspace: &mut [f32], sums: &mut Sums) {
        let (n, d, vocab) = (block.tokens.len(), self.problem.shape().hidden, self.problem.shape().vocab);
        let tiles = || chunk.clone().into_par_iter();
        workspace
            .par_chunks_mut(n * TILE)
            .zip(tiles())
            .for_each(|(z, tile)| self.isa.vectorize(|| self.dlogits(block, rows, tile, z)));
        let dlogits = &workspace[..n * TILE * chunk.len()];
        match (&mut sums.unembedding, self.problem.layout()) {
            (None, _) => {}
            (Some(sum), Layout::Vd) => {
                let first = chunk.start * TILE;
                sum[first * d..].par_chunks_mut(TILE * d).zip(dlogits.par_chunks_exact(n * TILE)).zip(tiles()).for_each_init(
                    Packed::new,
                    |packed, ((sum, dlogits), tile)| {
                        self.isa.vectorize(|| {
                            let columns = self.columns(tile).len();
                            packed.pack::<I>(Matrix::rows(dlogits, TILE).transposed(), columns, n, I::MR);
                            multiply(self.isa, packed, 0..columns, &block.as_b, sum, d, Store::Add);
                        });
                    },
                );
            }
            (Some(sum), Layout::Dv) => {
                sum.par_chunks_mut(FEATURES * vocab).enumerate().for_each_init(
                    || (Packed::new(), Packed::new()),
                    |(features, packed), (i, sum)| {
                        self.isa.vectorize(|| {
                            let lines = sum.len() / vocab;
                            features.pack::<I>(
                                Matrix::rows(&block.hidden, d).from(0, i * FEATURES).transposed(),
                                lines,
                                n,
                                I::MR,
                            );
                            for (tile, dlogits) in chunk.clone().zip(dlogits.chunks_exact(n * TILE)) {
                                let columns = self.columns(tile);
                                packed.pack::<I>(Matrix::rows(dlogits, TILE).transposed(), columns.len(), n, I::NR);
                                multiply(self.isa, features, 0..lines, packed, &mut sum[columns.start..], vocab, Store::Add);
                            }
                        });
                    },
                );
            }
        }
        if let Some(sum) = &mut sums.hidden {
            self.d_hidden(block, chunk, dlogits, sum);
        }
    }

    fn d_hidden(&self, block: &Block<I>, chunk: Range<usize>, dlogits: &[f32], sum: &mut [f32]) {
        let (n, d) = (block.tokens.len(), self.problem.shape().hidden);
        let mut gathered: Vec<f32> = Vec::with_capacity(n * d);
        block.tokens.iter().for_each(|&token| gathered.extend_from_slice(&sum[token * d..(token + 1) * d]));
        gathered.par_chunks_mut(SLICE * d).enumerate().for_each_init(
            || (Packed::new(), Packed::new()),
            |(rows, packed), (i, sum)| {
                self.isa.vectorize(|| {
                    let lines = sum.len() / d;
                    for (tile, dlogits) in chunk.clone().zip(dlogits.chunks_exact(n * TILE)) {
                        let columns = self.columns(tile);
                        rows.pack::<I>(Matrix::rows(dlogits, TILE).from(i * SLICE, 0), lines, columns.len(), I::MR);
                        packed.pack::<I>(self.unembedding(columns.start).transposed(), d, columns.len(), I::NR);
                        multiply(self.isa, rows, 0..lines, packed, sum, d, Store::Add);
                    }
                });
            },
        );
        for (row, &token) in gathered.chunks_exact(d).zip(&block.tokens) {
            sum[token * d..(token + 1) * d].copy_from_slice(row);
        }
    }

    /// Turns the logits of a tile into dlogits, in place.
    #[inline(always)]
    fn dlogits(&self, block: &Block<I>, rows: &[Row], tile: usize, z: &mut [f32]) {
        let (columns, valid) = (self.columns(tile), self.valid_columns(tile));
        let LossOptions { logit_scale, logit_softcap, .. } = *self.problem.options();
        let scale = logit_scale as f32;
        for ((z, row), &n) in z.chunks_exact_mut(TILE).zip(rows).zip(&block.tokens) {
            let slope = |z: f32| match logit_softcap {
                Some(cap) => scale * (1.0 - (z / cap as f32) * (z / cap as f32)),
                None => scale,
            };
            let label = match self.problem.labels()[n] {
                Label::Column(label) if columns.contains(&(label as usize)) => Some(label as usize - columns.start),
                _ => None,
            };
            let at_label = label.map(|label| (row.p * exp(z[label] - row.lse) + row.onehot + row.constant) * slope(z[label]));
            z[..valid].iter_mut().for_each(|z| *z = (row.p * exp(*z - row.lse) + row.constant) * slope(*z));
            // −∞ has done its work; in the products padding must be 0.
            z[valid..].fill(0.0);
            if let (Some(label), Some(value)) = (label, at_label) {
                z[label] = value;
            }
        }
    }
}

/// Folds in 16 lanes, in an order that does not depend on the instruction set.
#[inline(always)]
fn fold(values: &[f32], start: f32, step: impl Fn(f32, f32) -> f32, join: impl Fn(f32, f32) -> f32) -> f32 {
    const LANES: usize = 16;
    let mut lanes = [start; LANES];
    let (whole, rest) = values.as_chunks::<LANES>();
    for values in whole {
        lanes.iter_mut().zip(values).for_each(|(lane, &x)| *lane = step(*lane, x));
    }
    lanes.iter_mut().zip(rest).for_each(|(lane, &x)| *lane = step(*lane, x));
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            lanes[i] = join(lanes[i], lanes[i + width]);
        }
    }
    lanes[0]
}
