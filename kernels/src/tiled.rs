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
//! Every sum runs in an order fixed by the problem and the workspace: per row in tiles of [`STATS_TILE`] columns, in the
//! products as [`crate::gemm`] says. A chunk is a multiple of both, so the forward depends on the problem alone.

use crate::cpu::Isa;
use crate::elementwise::{self, exp, tanh};
use crate::gemm::{self, Axis, Operand, Output, Write};
use crate::problem::{Floats, Label, Layout, LossOptions, Problem};
use crate::vjp::{Cotangents, GradientMut};
use rayon::prelude::*;
use std::ops::Range;

/// Columns over which a row's max and sum are taken at a time; chunks are multiples of it.
const STATS_TILE: usize = gemm::DEPTH;
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
        let elements = (workspace / size_of::<f32>()).max(LEAST_TOKENS * STATS_TILE);
        let whole = (elements / columns).min(MOST_TOKENS);
        let wanted = match reuse {
            Reuse::WholeRows => LEAST_TOKENS,
            Reuse::Once => MOST_TOKENS,
        };
        if whole >= active.min(wanted) {
            return Self { tokens: even(active, whole), columns };
        }
        let tokens = even(active, (elements / STATS_TILE).min(MOST_TOKENS / 2));
        Self { tokens, columns: (elements / tokens / STATS_TILE * STATS_TILE).clamp(STATS_TILE, columns.max(STATS_TILE)) }
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

/// What the loss needs to know of a token's logits. Starts as that of no logit at all.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct RowStats {
    /// The largest z.
    pub max: f32,
    /// Σ exp(z − max).
    pub sum: f32,
    /// Σ z, if there is label smoothing.
    pub logit_sum: f32,
    /// z_t, once the columns seen hold it.
    pub label_logit: f32,
}

impl Default for RowStats {
    fn default() -> Self {
        Self { max: f32::NEG_INFINITY, sum: 0.0, logit_sum: 0.0, label_logit: 0.0 }
    }
}

impl RowStats {
    /// Of some logits.
    #[inline(always)]
    fn of<I: Isa>(z: &[f32], smoothing: bool) -> Self {
        let max = elementwise::max(z);
        let origin = finite_origin(max);
        let sum = elementwise::sum(z, |z| exp::<I>(z - origin));
        Self { max, sum, logit_sum: if smoothing { elementwise::sum(z, |z| z) } else { 0.0 }, label_logit: 0.0 }
    }

    /// Of the logits of both. In float64 inside: one rounding of the sum.
    pub fn merge(self, other: Self) -> Self {
        let max = if other.max > self.max { other.max } else { self.max };
        let origin = f64::from(finite_origin(max));
        let scaled = |part: Self| {
            // Spares an exponential, and −∞ − −∞.
            if part.max == max { f64::from(part.sum) } else { f64::from(part.sum) * (f64::from(part.max) - origin).exp() }
        };
        Self {
            max,
            sum: (scaled(self) + scaled(other)) as f32,
            logit_sum: self.logit_sum + other.logit_sum,
            label_logit: self.label_logit + other.label_logit,
        }
    }

    /// ℓ and lse of a token all of whose logits are in.
    pub fn loss_and_lse(&self, problem: &Problem) -> (f32, f32) {
        let LossOptions { z_loss, label_smoothing, .. } = *problem.options();
        let (max, log_sum, label) = (f64::from(self.max), f64::from(self.sum).ln(), f64::from(self.label_logit));
        let lse = max + log_sum;
        let mean = f64::from(self.logit_sum) / problem.valid_total() as f64;
        let smoothing = if label_smoothing > 0.0 { label_smoothing * (label - mean) } else { 0.0 };
        (((max - label) + log_sum + smoothing + z_loss * lse * lse) as f32, lse as f32)
    }
}

/// What to subtract from logits whose largest is `max`: that, unless they are all −∞, whose exponentials are then 0.
#[inline(always)]
fn finite_origin(max: f32) -> f32 {
    if max == f32::NEG_INFINITY { 0.0 } else { max }
}

/// What prediction needs to know of a token's logits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowPrediction {
    stats: RowStats,
    /// Σ exp(z − max)·(z − max).
    weighted: f32,
    argmax: u32,
}

impl Default for RowPrediction {
    fn default() -> Self {
        Self { stats: RowStats::default(), weighted: 0.0, argmax: 0 }
    }
}

impl RowPrediction {
    /// The vocab id of the largest logit, the lowest of equals, and −Σ P ln P.
    pub fn finish(&self) -> (u32, f32) {
        let sum = f64::from(self.stats.sum);
        (self.argmax, (sum.ln() - f64::from(self.weighted) / sum) as f32)
    }

    #[inline(always)]
    fn absorb<I: Isa>(&mut self, z: &[f32], first: usize) {
        let tile = RowStats::of::<I>(z, false);
        let weighted = elementwise::sum(z, |z| {
            let below = z - tile.max;
            let e = exp::<I>(below);
            if e == 0.0 { 0.0 } else { e * below }
        });
        let merged = self.stats.merge(tile);
        let share = |stats: RowStats, weighted: f32| {
            let below = f64::from(stats.max) - f64::from(merged.max);
            let factor = below.exp();
            if factor == 0.0 { 0.0 } else { factor * (f64::from(weighted) + below * f64::from(stats.sum)) }
        };
        self.weighted = (share(self.stats, self.weighted) + share(tile, weighted)) as f32;
        if tile.max > self.stats.max {
            let at = z.iter().position(|&z| z == tile.max).unwrap_or(0);
            self.argmax = (first + at) as u32;
        }
        self.stats = merged;
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
    active: Vec<u32>,
    workspace: Vec<f32>,
}

impl<'a, 'p, I: Isa> Pass<'a, 'p, I> {
    pub fn new(isa: I, problem: &'a Problem<'p>, plan: Plan) -> Self {
        let labels = problem.labels().iter().zip(0u32..);
        let active: Vec<u32> = labels.filter(|(label, _)| **label != Label::Masked).map(|(_, n)| n).collect();
        let workspace = vec![0.0; if active.is_empty() { 0 } else { plan.elements() }];
        Self { isa, problem, plan, active, workspace }
    }

    /// Every active token with what the loss needs to know of its logits.
    pub fn stats(mut self) -> Vec<(usize, RowStats)> {
        let stats = self.blocks().into_iter().flat_map(|block| self.block_stats(block)).collect();
        self.by_token(stats)
    }

    /// Every active token with its prediction.
    pub fn predictions(mut self) -> Vec<(usize, RowPrediction)> {
        let visit = |row: &mut RowPrediction, _: Label, z: &[f32], first: usize| {
            z.chunks(STATS_TILE).zip((first..).step_by(STATS_TILE)).for_each(|(z, first)| row.absorb::<I>(z, first));
        };
        let rows = self.blocks().into_iter().flat_map(|block| self.sweep(block, visit)).collect();
        self.by_token(rows)
    }

    /// Fills the sinks, given every token's lse.
    pub fn backward(mut self, lse: &[f32], cotangents: Cotangents, mut sinks: Sinks) {
        for block in self.blocks() {
            let lse: Vec<f32> = self.active[block.clone()].iter().map(|&n| lse[n as usize]).collect();
            self.block_gradients(block, &lse, cotangents, false, &mut sinks);
        }
    }

    /// Both passes at once; returns what [`Pass::stats`] does.
    pub fn stats_and_backward(mut self, cotangents: Cotangents, mut sinks: Sinks) -> Vec<(usize, RowStats)> {
        let mut all = Vec::with_capacity(self.active.len());
        for block in self.blocks() {
            let stats = self.block_stats(block.clone());
            let lse: Vec<f32> = stats.iter().map(|s| s.loss_and_lse(self.problem).1).collect();
            let resident = self.chunks().len() == 1;
            self.block_gradients(block, &lse, cotangents, resident, &mut sinks);
            all.extend(stats);
        }
        self.by_token(all)
    }

    fn by_token<R>(self, rows: Vec<R>) -> Vec<(usize, R)> {
        self.active.into_iter().map(|n| n as usize).zip(rows).collect()
    }

    /// Ranges of `active`.
    fn blocks(&self) -> Vec<Range<usize>> {
        cut(self.active.len(), self.plan.tokens)
    }

    /// Ranges of valid columns.
    fn chunks(&self) -> Vec<Range<usize>> {
        cut(self.problem.valid_columns(), self.plan.columns)
    }

    fn block_stats(&mut self, block: Range<usize>) -> Vec<RowStats> {
        let smoothing = self.problem.options().label_smoothing > 0.0;
        self.sweep(block, move |stats: &mut RowStats, label, z, first| {
            for z in z.chunks(STATS_TILE) {
                *stats = stats.merge(RowStats::of::<I>(z, smoothing));
            }
            if let Some(z) = at_label(label, first, z.len()).map(|at| z[at]) {
                stats.label_logit = z;
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
                    visit(row, problem.labels()[n as usize], z, chunk.start);
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
                let row = RowCotangent::new(problem, cotangents, n as usize, lse);
                isa.vectorize(|| {
                    if !resident {
                        finish_logits::<I>(problem.options(), z);
                    }
                    row.dlogits::<I>(problem.options(), z, at_label(problem.labels()[n as usize], chunk.start, z.len()));
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
                d_hidden.put(n as usize * d, row);
            }
        }
    }

    /// Q·Kᵀ of a block and a chunk into the workspace, [T, W], with the block's tokens.
    fn logits(&mut self, block: Range<usize>, chunk: Range<usize>) -> (&[u32], &mut [f32]) {
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
fn hidden<'a>(problem: &Problem<'a>, tokens: &'a [u32], transposed: bool) -> Operand<'a> {
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
