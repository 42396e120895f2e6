//! The streaming algorithm, once for every instruction set.
//!
//! The tokens that take part are gathered into blocks of T, the valid vocab columns into chunks of W; only T × W logits
//! exist at a time. Per block, with Q its gathered rows:
//!
//! ```text
//! for each chunk:  z = scale·Q·K_chunkᵀ,  z ← cap·tanh(z / cap)                              [T, W], in the workspace
//!                  m, s ← running max and Σ exp(z − m);  z_t where the chunk holds the label
//! lse = m + ln s,  ℓ = lse − (1−ε)·z_t − ε·mean_v z_v + z_loss·lse²
//! for each chunk:  z again, unless the one chunk is all of V and still there
//!                  S = (p·exp(z − lse) + constant + onehot·[v = t]) · scale·(1 − (z/cap)²)   in place of z
//!                  dK_chunk += Sᵀ·Q,   dQ += S·K_chunk
//! with p = g·(1 + 2·z_loss·lse) + h,  onehot = u − g·(1−ε),  constant = −g·ε/V_valid.
//! ```
//!
//! Masked tokens and padding columns are never read: they are in no block and no chunk. What fills the last panels of a
//! product is the one padding there is; see [`crate::gemm`].
//!
//! Every sum runs in an order fixed by the problem and the workspace: per row in tiles of [`ROW_TILE`] columns, in the
//! products as [`crate::gemm`] says. A chunk is a multiple of both, so the forward depends on the problem alone.

use crate::cpu::Isa;
use crate::elementwise::{self, exp, tanh};
use crate::gemm::{self, Axis, Operand, Output, Write};
use crate::problem::{Floats, Label, Layout, LossOptions, Problem};
use crate::shard::TokenPartial;
use crate::vjp::{Cotangents, GradientMut};
use rayon::prelude::*;
use std::ops::Range;

/// Columns over which a row's max and sum are taken at a time; chunks are multiples of it.
const ROW_TILE: usize = gemm::DEPTH;
/// A block has no fewer tokens (unless there are no more): below, packing K costs more than multiplying by it.
const LEAST_TOKENS: usize = 64;
/// Nor does it gain from more than these.
const MOST_TOKENS: usize = 1024;

/// How the logits of a problem are cut up to fit the workspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    /// T.
    pub tokens: usize,
    /// W.
    pub columns: usize,
}

/// What a plan is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reuse {
    /// Each logit is needed once: large blocks, so that K is packed seldom.
    Once,
    /// Whole rows are worth keeping between the forward and the backward.
    WholeRows,
}

impl Plan {
    pub fn new(problem: &Problem, workspace: usize, reuse: Reuse) -> Self {
        let active = problem.labels().iter().filter(|&&l| l != Label::Masked).count().max(1);
        let columns = problem.valid_columns().max(1);
        let elements = (workspace / size_of::<f32>()).max(LEAST_TOKENS * ROW_TILE);
        let whole = (elements / columns).min(MOST_TOKENS);
        let wanted = match reuse {
            Reuse::WholeRows => LEAST_TOKENS,
            Reuse::Once => MOST_TOKENS,
        };
        if whole >= active.min(wanted) {
            return Self { tokens: even(active, whole), columns };
        }
        let tokens = even(active, (elements / ROW_TILE).min(MOST_TOKENS / 2));
        Self { tokens, columns: (elements / tokens / ROW_TILE * ROW_TILE).clamp(ROW_TILE, columns.max(ROW_TILE)) }
    }

    /// Floats in the workspace.
    pub fn elements(&self) -> usize {
        self.tokens * self.columns
    }
}

/// The length of blocks of at most `most` that cut `total` evenly, in multiples of [`LEAST_TOKENS`] where they are that long.
fn even(total: usize, most: usize) -> usize {
    if total <= most {
        return total;
    }
    let most = if most > LEAST_TOKENS { most / LEAST_TOKENS * LEAST_TOKENS } else { most };
    let even = total.div_ceil(total.div_ceil(most));
    if most > LEAST_TOKENS { even.next_multiple_of(LEAST_TOKENS).min(most) } else { even }
}

/// What the loss needs to know of some logits of a token.
#[inline(always)]
fn partial_of<I: Isa>(z: &[f32], smoothing: bool) -> TokenPartial {
    let max = elementwise::max(z);
    // Logits that are all −∞ have exponentials of 0, not of −∞ − −∞.
    let origin = if max == f32::NEG_INFINITY { 0.0 } else { max };
    let sum = elementwise::sum(z, |z| exp::<I>(z - origin));
    TokenPartial { max, sum, logit_sum: if smoothing { elementwise::sum(z, |z| z) } else { 0.0 }, label_logit: 0.0 }
}

/// What prediction needs to know of a token's logits.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RowPrediction {
    partial: TokenPartial,
    /// Σ exp(z − max)·(z − max).
    weighted: f32,
    argmax: u32,
}

impl RowPrediction {
    /// The vocab id of the largest logit, the lowest of equals, and −Σ P ln P.
    pub fn finish(&self) -> (u32, f32) {
        let sum = f64::from(self.partial.sum);
        (self.argmax, (sum.ln() - f64::from(self.weighted) / sum) as f32)
    }

    #[inline(always)]
    fn absorb<I: Isa>(&mut self, z: &[f32], first: usize) {
        let tile = partial_of::<I>(z, false);
        let weighted = elementwise::sum(z, |z| {
            let below = z - tile.max;
            let e = exp::<I>(below);
            // 0·(−∞) is 0 here.
            if e == 0.0 { 0.0 } else { e * below }
        });
        let merged = self.partial.merge(tile);
        // With z − max = (z − part's max) + below: what a part's sum becomes when it refers to the common max.
        let share = |part: TokenPartial, weighted: f32| {
            let below = f64::from(part.max) - f64::from(merged.max);
            let factor = below.exp();
            if factor == 0.0 { 0.0 } else { factor * (f64::from(weighted) + below * f64::from(part.sum)) }
        };
        self.weighted = (share(self.partial, self.weighted) + share(tile, weighted)) as f32;
        if tile.max > self.partial.max {
            self.argmax = (first + z.iter().position(|&z| z == tile.max).unwrap_or(0)) as u32;
        }
        self.partial = merged;
    }
}

/// Where the gradients go.
#[derive(Debug)]
pub(crate) struct Sinks<'a, 'g> {
    /// dQ, written (or added to) once per token.
    pub d_hidden: Option<&'a mut GradientMut<'g>>,
    /// dK in K's layout, added to.
    pub d_unembedding: Option<&'a mut [f32]>,
}

/// One problem on one instruction set.
pub(crate) struct Pass<'a, 'p, I: Isa> {
    isa: I,
    problem: &'a Problem<'p>,
    plan: Plan,
    /// The tokens that take part.
    active: Vec<usize>,
    workspace: Vec<f32>,
}

impl<'a, 'p, I: Isa> Pass<'a, 'p, I> {
    pub fn new(isa: I, problem: &'a Problem<'p>, plan: Plan) -> Self {
        let active: Vec<usize> = (0..problem.shape().tokens).filter(|&n| problem.labels()[n] != Label::Masked).collect();
        let workspace = vec![0.0; if active.is_empty() { 0 } else { plan.elements() }];
        Self { isa, problem, plan, active, workspace }
    }

    /// Every active token with what the loss needs to know of its logits.
    pub fn partials(mut self) -> Vec<(usize, TokenPartial)> {
        let partials = self.blocks().into_iter().flat_map(|block| self.block_partials(block)).collect();
        self.by_token(partials)
    }

    /// Every active token with its prediction.
    pub fn predictions(mut self) -> Vec<(usize, RowPrediction)> {
        let visit = |row: &mut RowPrediction, _: Label, z: &[f32], first: usize| {
            z.chunks(ROW_TILE).zip((first..).step_by(ROW_TILE)).for_each(|(z, first)| row.absorb::<I>(z, first));
        };
        let rows = self.blocks().into_iter().flat_map(|block| self.sweep(block, visit)).collect();
        self.by_token(rows)
    }

    /// Fills the sinks, given every token's lse.
    pub fn backward(mut self, lse: &[f32], cotangents: Cotangents, mut sinks: Sinks) {
        for block in self.blocks() {
            let lse: Vec<f32> = self.active[block.clone()].iter().map(|&n| lse[n]).collect();
            self.block_gradients(block, &lse, cotangents, false, &mut sinks);
        }
    }

    /// Both passes at once; returns what [`Pass::partials`] does.
    pub fn partials_and_backward(mut self, cotangents: Cotangents, mut sinks: Sinks) -> Vec<(usize, TokenPartial)> {
        let mut all = Vec::with_capacity(self.active.len());
        for block in self.blocks() {
            let partials = self.block_partials(block.clone());
            let lse: Vec<f32> = partials.iter().map(|p| p.loss_and_lse(self.problem).1).collect();
            let resident = self.chunks().len() == 1;
            self.block_gradients(block, &lse, cotangents, resident, &mut sinks);
            all.extend(partials);
        }
        self.by_token(all)
    }

    fn by_token<R>(self, rows: Vec<R>) -> Vec<(usize, R)> {
        self.active.into_iter().zip(rows).collect()
    }

    /// Ranges of `active`.
    fn blocks(&self) -> Vec<Range<usize>> {
        cut(self.active.len(), self.plan.tokens)
    }

    /// Ranges of valid columns.
    fn chunks(&self) -> Vec<Range<usize>> {
        cut(self.problem.valid_columns(), self.plan.columns)
    }

    fn block_partials(&mut self, block: Range<usize>) -> Vec<TokenPartial> {
        let smoothing = self.problem.options().label_smoothing > 0.0;
        self.sweep(block, move |partial: &mut TokenPartial, label, z, first| {
            for z in z.chunks(ROW_TILE) {
                *partial = partial.merge(partial_of::<I>(z, smoothing));
            }
            if let Some(z) = at_label(label, first, z.len()).map(|at| z[at]) {
                partial.label_logit = z;
            }
        })
    }

    /// Runs `visit` over each token's logits, chunk by chunk: its state, its label, the logits, their first column.
    fn sweep<S: Default + Clone + Send>(
        &mut self,
        block: Range<usize>,
        visit: impl Fn(&mut S, Label, &[f32], usize) + Sync,
    ) -> Vec<S> {
        let mut rows = vec![S::default(); block.len()];
        let (isa, problem) = (self.isa, self.problem);
        for chunk in self.chunks() {
            let (tokens, z) = self.logits(block.clone(), chunk.clone());
            z.par_chunks_mut(chunk.len()).zip(&mut rows).zip(tokens).for_each(|((z, row), &n)| {
                isa.vectorize(|| {
                    finish_logits::<I>(problem.options(), z);
                    visit(row, problem.labels()[n], z, chunk.start);
                });
            });
        }
        rows
    }

    /// The gradients of one block, given its tokens' lse; `resident` if its logits are still in the workspace.
    fn block_gradients(&mut self, block: Range<usize>, lse: &[f32], cotangents: Cotangents, resident: bool, sinks: &mut Sinks) {
        let (isa, problem) = (self.isa, self.problem);
        let d = problem.shape().hidden;
        let mut dq = vec![0.0; if sinks.d_hidden.is_some() { block.len() * d } else { 0 }];
        for chunk in self.chunks() {
            let (tokens, z) = if resident {
                (&self.active[block.clone()], &mut self.workspace[..block.len() * chunk.len()])
            } else {
                self.logits(block.clone(), chunk.clone())
            };
            z.par_chunks_mut(chunk.len()).zip(tokens).zip(lse).for_each(|((z, &n), &lse)| {
                let row = RowCotangent::new(problem, cotangents, n, lse);
                isa.vectorize(|| {
                    if !resident {
                        finish_logits::<I>(problem.options(), z);
                    }
                    row.dlogits::<I>(problem.options(), z, at_label(problem.labels()[n], chunk.start, z.len()));
                });
            });
            let dlogits = &*z;
            let along_tokens = Axis { stride: chunk.len(), gather: None };
            let along_vocab = Axis { stride: 1, gather: None };
            let s = |outer, depth| Operand { data: Floats::F32(dlogits), base: 0, outer, depth };
            let dk = sinks.d_unembedding.as_deref_mut();
            let dk_product = || {
                let Some(dk) = dk else { return };
                let [row, column] = unembedding_strides(problem);
                let dk = Output::new(&mut dk[chunk.start * row..], [chunk.len(), d], [row, column]);
                gemm::product(isa, s(along_vocab, along_tokens), hidden(problem, tokens, true), tokens.len(), dk, Write::Add);
            };
            let dq_product = || {
                if dq.is_empty() {
                    return;
                }
                let dq = Output::new(&mut dq, [tokens.len(), d], [d, 1]);
                let k = unembedding(problem, chunk.start, true);
                gemm::product(isa, s(along_tokens, along_vocab), k, chunk.len(), dq, Write::Add);
            };
            rayon::join(dk_product, dq_product);
        }
        if let Some(d_hidden) = &mut sinks.d_hidden {
            for (row, &n) in dq.chunks_exact(d).zip(&self.active[block]) {
                d_hidden.put(n * d, row);
            }
        }
    }

    /// Q·Kᵀ of a block and a chunk into the workspace, [T, W], with the block's tokens.
    fn logits(&mut self, block: Range<usize>, chunk: Range<usize>) -> (&[usize], &mut [f32]) {
        let tokens = &self.active[block];
        let z = &mut self.workspace[..tokens.len() * chunk.len()];
        let c = Output::new(z, [tokens.len(), chunk.len()], [chunk.len(), 1]);
        let d = self.problem.shape().hidden;
        let (q, k) = (hidden(self.problem, tokens, false), unembedding(self.problem, chunk.start, false));
        gemm::product(self.isa, q, k, d, c, Write::Set);
        (tokens, z)
    }
}

fn cut(total: usize, length: usize) -> Vec<Range<usize>> {
    (0..total).step_by(length).map(|start| start..(start + length).min(total)).collect()
}

/// Where a token's label lies among `len` columns from `first` on, if it does.
fn at_label(label: Label, first: usize, len: usize) -> Option<usize> {
    let Label::Column(label) = label else { return None };
    (label as usize).checked_sub(first).filter(|&at| at < len)
}

/// The gathered rows of Q; summed over tokens if `transposed`, over D if not.
fn hidden<'a>(problem: &Problem<'a>, tokens: &'a [usize], transposed: bool) -> Operand<'a> {
    let token = Axis { stride: problem.shape().hidden, gather: Some(tokens) };
    let feature = Axis { stride: 1, gather: None };
    let (outer, depth) = if transposed { (feature, token) } else { (token, feature) };
    Operand { data: problem.hidden(), base: 0, outer, depth }
}

/// K from column `first` on; summed over V if `transposed`, over D if not.
fn unembedding<'a>(problem: &Problem<'a>, first: usize, transposed: bool) -> Operand<'a> {
    let strides = unembedding_strides(problem);
    let [id, feature] = strides.map(|stride| Axis { stride, gather: None });
    let (outer, depth) = if transposed { (feature, id) } else { (id, feature) };
    Operand { data: problem.unembedding(), base: first * strides[0], outer, depth }
}

/// How far apart two vocab ids and two features lie in K.
fn unembedding_strides(problem: &Problem) -> [usize; 2] {
    match problem.layout() {
        Layout::Vd => [problem.shape().hidden, 1],
        Layout::Dv => [1, problem.shape().vocab],
    }
}

/// Scale and cap.
#[inline(always)]
fn finish_logits<I: Isa>(options: &LossOptions, z: &mut [f32]) {
    let scale = options.logit_scale as f32;
    if let Some(cap) = options.logit_softcap {
        let (inner, cap) = ((options.logit_scale / cap) as f32, cap as f32);
        z.iter_mut().for_each(|z| *z = cap * tanh::<I>(*z * inner));
    } else if scale != 1.0 {
        z.iter_mut().for_each(|z| *z *= scale);
    }
}

/// What multiplies P, the constant 1 and the onehot in ∂/∂z of one token, and its lse.
#[derive(Clone, Copy, Debug)]
struct RowCotangent {
    lse: f32,
    p: f32,
    constant: f32,
    onehot: f32,
}

impl RowCotangent {
    fn new(problem: &Problem, cotangents: Cotangents, n: usize, lse: f32) -> Self {
        let at = |c: Option<&[f32]>| c.map_or(0.0, |c| f64::from(c[n]));
        let (g, h, u) = (at(cotangents.loss), at(cotangents.lse), at(cotangents.label_logits));
        let LossOptions { z_loss, label_smoothing, .. } = *problem.options();
        Self {
            lse,
            p: (g * (1.0 + 2.0 * z_loss * f64::from(lse)) + h) as f32,
            constant: (-g * label_smoothing / problem.valid_total() as f64) as f32,
            onehot: (u - g * (1.0 - label_smoothing)) as f32,
        }
    }

    /// Turns a row of logits into dlogits. The label's term is joined to its column in float32.
    #[inline(always)]
    fn dlogits<I: Isa>(self, options: &LossOptions, z: &mut [f32], label: Option<usize>) {
        let Self { lse, p, constant, onehot } = self;
        let scale = options.logit_scale as f32;
        let slope = |z: f32, cap: f32| scale * ((1.0 - z / cap) * (1.0 + z / cap));
        let label = label.map(|at| (at, z[at]));
        let at_label = |z: f32| I::mul_add(p, exp::<I>(z - lse), constant + onehot);
        match options.logit_softcap.map(|cap| cap as f32) {
            None => {
                z.iter_mut().for_each(|z| *z = scale * I::mul_add(p, exp::<I>(*z - lse), constant));
                label.inspect(|&(at, logit)| z[at] = scale * at_label(logit));
            }
            Some(cap) => {
                z.iter_mut().for_each(|z| *z = I::mul_add(p, exp::<I>(*z - lse), constant) * slope(*z, cap));
                label.inspect(|&(at, logit)| z[at] = at_label(logit) * slope(logit, cap));
            }
        }
    }
}
