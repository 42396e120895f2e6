//! The streaming algorithm, once for every instruction set.
//!
//! The tokens that take part are gathered into blocks of T, the valid vocab columns into chunks of [`CHUNK`]; a stripe of chunks
//! has its logits in the workspace at one time. Per block, with Q its gathered rows:
//!
//! ```text
//! for each chunk:   z = scale·K_chunk·Qᵀ,  z ← cap·tanh(z / cap)                            [chunk, T], in the workspace
//!                   m = max_v z, s = Σ_v exp(z − m);  z_t where the chunk holds the label
//! over the chunks:  lse = m + ln s,  ℓ = lse − (1−ε)·z_t − ε·mean_v z_v + z_loss·lse²
//! for each chunk:   z again, unless all of V is in the workspace
//!                   S = (p·exp(z − lse) + constant + onehot·[v = t]) · scale·(1 − (z/cap)²)   in place of z
//!                   dK_chunk += S·Q
//! for each stripe:  dQ += Sᵀ·K_stripe
//! with p = g·(1 + 2·z_loss·lse) + h,  onehot = u − g·(1−ε),  constant = −g·ε/V_valid.
//! ```
//!
//! Logits lie with a token in each lane, in panels of NR tokens: [chunk, panel, column, NR]. So maxima and sums over the
//! vocabulary run down the lanes, and what is wanted of S lies side by side: for dK the tokens of a column, for dQ the
//! columns of a token, two by two where the instruction set multiplies pairs.
//!
//! Masked tokens and padding columns are never read: they are in no block and no chunk.
//!
//! Every sum runs in an order fixed by the problem and T: z over D in pieces, lse over chunks, dQ over chunks, dK over blocks.
//! So neither the number of threads nor the stripe changes a bit, and the forward and dQ depend on the problem alone.

use crate::cpu::Isa;
use crate::filter::{ChunkSieve, Filter, Sieve};
use crate::gemm::{self, Gathered, Output, Sweep, Write};
use crate::lanes::{self, PanelCotangent, Prediction};
use crate::memory;
use crate::panels::{self, Axis, Operand, PackLeft, PackRight, Packed, Strides};
use crate::problem::{Label, Layout, Problem};
use crate::shard::{Share, TokenPartial};
use crate::vjp::{Cotangents, GradientMut};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Mutex;

/// Columns of a chunk. A chunk of K in panels, and the chunk's S for a block, stay in the second-level cache.
const CHUNK: usize = 256;
/// Terms of a logit that are packed at a time, in bytes.
const DEPTH_BYTES: usize = 2048;
/// Bytes of K that are packed for dQ at a time: they stay in the second-level cache.
const RIGHT_BYTES: usize = 540 << 10;
/// Columns of a panel whose dlogits are made at a time: they stay in the first-level cache until they are packed.
const ROWS: usize = 64;
/// A block has no more tokens: K is packed seldom enough.
const MOST_TOKENS: usize = 1024;
/// With fewer tokens in the workspace, reading dK and adding to it costs more than computing logits twice.
const LEAST_TOKENS: usize = 48;

/// How the kernel was asked to compute.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    /// Bytes for everything that grows with the tokens of a block.
    pub workspace: usize,
    /// How many packed values make up one of dlogits: 1, or 2 for a high and a low part.
    pub parts: usize,
}

/// How the logits of a problem are cut up to fit the workspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    /// T.
    tokens: usize,
    /// Columns in the workspace: a multiple of [`CHUNK`].
    stripe: usize,
}

/// Where the gradients go.
#[derive(Debug)]
pub(crate) struct Sinks<'a, 'g> {
    /// dQ, written (or added to) once per token.
    pub d_hidden: Option<&'a mut GradientMut<'g>>,
    /// dK in K's layout, and whether its first value is to be written or added to what is there.
    pub d_unembedding: Option<(&'a mut [f32], Write)>,
    /// What to leave out.
    pub filter: Option<&'a mut Filter>,
    /// For logits; it grows to what is needed.
    pub workspace: &'a mut Vec<f32>,
}

/// One problem on one instruction set.
pub(crate) struct Pass<'a, 'p, I: Isa> {
    isa: I,
    problem: &'a Problem<'p>,
    settings: Settings,
    /// The tokens that take part.
    active: Vec<usize>,
}

/// The tokens of a block, and their rows of Q as right panels.
struct Block<'a, I: Isa> {
    tokens: &'a [usize],
    /// By tokens, summed over D; one for each of [`Pass::depths`].
    by_token: Vec<Vec<I::Packed>>,
}

/// What a worker packs into.
struct Scratch<I: Isa> {
    left: Vec<I::Packed>,
    right: Vec<I::Packed>,
    z: Vec<f32>,
    dlogits: Vec<f32>,
    gathered: Gathered<I::Packed>,
}

impl<I: Isa> Default for Scratch<I> {
    fn default() -> Self {
        Self { left: Vec::new(), right: Vec::new(), z: Vec::new(), dlogits: Vec::new(), gathered: Gathered::default() }
    }
}

impl<'a, 'p, I: Isa> Pass<'a, 'p, I> {
    pub fn new(isa: I, problem: &'a Problem<'p>, settings: Settings) -> Self {
        let active = (0..problem.shape().tokens).filter(|&n| problem.labels()[n] != Label::Masked).collect();
        Self { isa, problem, settings, active }
    }

    /// Bytes of the workspace for each token of a block, beside its logits: Q in panels, once for each product, and dQ.
    fn bytes_per_token(&self) -> usize {
        self.problem.shape().hidden * (2 * size_of::<I::Packed>() + size_of::<f32>())
            + self.problem.valid_columns().div_ceil(CHUNK) * size_of::<TokenPartial>()
    }

    /// All columns at once, for as many tokens as there is room for; `None` if those are too few.
    fn whole_rows(&self) -> Option<Plan> {
        let stripe = self.problem.valid_columns().next_multiple_of(CHUNK);
        let most = self.settings.workspace / (stripe * size_of::<f32>() + self.bytes_per_token());
        (most >= LEAST_TOKENS.min(self.active.len())).then(|| Plan { tokens: self.even(most), stripe })
    }

    /// As many columns at once as there is room for, for many tokens.
    fn striped(&self) -> Plan {
        let tokens = self.even((self.settings.workspace / (CHUNK * size_of::<f32>() + self.bytes_per_token())).max(I::NR));
        let columns = self.settings.workspace.saturating_sub(tokens * self.bytes_per_token()) / size_of::<f32>() / tokens.max(1);
        let stripe = (columns / CHUNK * CHUNK).clamp(CHUNK, self.problem.valid_columns().next_multiple_of(CHUNK).max(CHUNK));
        Plan { tokens, stripe }
    }

    /// The length of blocks of at most `most` tokens that cut all tokens evenly, in whole panels where there are several.
    fn even(&self, most: usize) -> usize {
        let (total, most) = (self.active.len(), most.min(MOST_TOKENS));
        if total <= most {
            return total;
        }
        let panels = (most / I::NR).max(1);
        total.div_ceil(I::NR).div_ceil(total.div_ceil(I::NR).div_ceil(panels)) * I::NR
    }

    /// Bytes held at most, beside what each thread packs into.
    pub fn workspace_bytes(&self) -> usize {
        let Plan { tokens, stripe } = self.whole_rows().unwrap_or_else(|| self.striped());
        tokens.next_multiple_of(I::NR) * (stripe * size_of::<f32>() + self.bytes_per_token())
    }

    /// Every active token with what the loss needs to know of its logits.
    pub fn partials(self) -> Vec<(usize, TokenPartial)> {
        let blocks = self.active.chunks(self.striped().tokens.max(1));
        let rows = blocks.flat_map(|tokens| self.block_partials(&self.block(tokens), &mut [])).collect();
        self.by_token(rows)
    }

    /// Every active token with its prediction.
    pub fn predictions(self) -> Vec<(usize, Prediction)> {
        let visit = |z: &[f32], first: usize, _: &[usize], out: &mut [Prediction]| {
            self.isa.vectorize(lanes::Predictions { z, first, out });
        };
        let blocks = self.active.chunks(self.striped().tokens.max(1));
        let rows = blocks.flat_map(|tokens| self.sweep(&self.block(tokens), &mut [], visit)).collect();
        self.by_token(rows)
    }

    /// Fills the sinks, given every token's lse.
    pub fn backward(self, lse: &[f32], cotangents: Cotangents, mut sinks: Sinks) {
        let plan = self.striped();
        self.reserve(plan, &mut sinks);
        for tokens in self.active.chunks(plan.tokens.max(1)) {
            let lse: Vec<f32> = tokens.iter().map(|&n| lse[n]).collect();
            self.gradients(&self.block(tokens), plan, &lse, cotangents, false, &mut sinks);
        }
    }

    /// Both passes at once; returns what [`Pass::partials`] does.
    pub fn partials_and_backward(self, cotangents: Cotangents, mut sinks: Sinks) -> Vec<(usize, TokenPartial)> {
        let whole = self.whole_rows();
        let plan = whole.unwrap_or_else(|| self.striped());
        self.reserve(plan, &mut sinks);
        let mut all = Vec::with_capacity(self.active.len());
        for tokens in self.active.chunks(plan.tokens.max(1)) {
            let block = self.block(tokens);
            let partials = self.block_partials(&block, if whole.is_some() { sinks.workspace } else { &mut [] });
            let lse: Vec<f32> = partials.iter().map(|p| p.loss_and_lse(self.problem).1).collect();
            self.gradients(&block, plan, &lse, cotangents, whole.is_some(), &mut sinks);
            all.extend(partials);
        }
        self.by_token(all)
    }

    fn by_token<R>(self, rows: Vec<R>) -> Vec<(usize, R)> {
        self.active.into_iter().zip(rows).collect()
    }

    /// Makes room for the logits of a plan. What an earlier call left is used, unless with the rest it would exceed the bound.
    fn reserve(&self, plan: Plan, sinks: &mut Sinks) {
        let tokens = plan.tokens.next_multiple_of(I::NR);
        let len = tokens * plan.stripe;
        let most = (self.settings.workspace.saturating_sub(tokens * self.bytes_per_token()) / size_of::<f32>()).max(len);
        if !(len..=most).contains(&sinks.workspace.len()) {
            // What is there goes first, so that there is never more than the larger of the two.
            *sinks.workspace = Vec::new();
            *sinks.workspace = memory::zeros(len);
        }
    }

    fn block<'t>(&self, tokens: &'t [usize]) -> Block<'t, I> {
        let q = self.hidden(tokens, false);
        Block { tokens, by_token: self.depths().map(|terms| self.panels(q, tokens.len(), terms)).collect() }
    }

    /// Ranges of terms of a logit.
    fn depths(&self) -> impl Iterator<Item = Range<usize>> + use<I> {
        cut(0..self.problem.shape().hidden, DEPTH_BYTES / size_of::<I::Packed>())
    }

    /// Q as right panels, summed over D or over tokens.
    fn panels(&self, x: Operand, columns: usize, terms: Range<usize>) -> Vec<I::Packed> {
        let panel = panels::right_len::<I>(terms.len());
        let mut out = vec![I::Packed::default(); columns.div_ceil(I::NR) * panel];
        out.par_chunks_mut(panel).enumerate().for_each(|(i, out)| {
            let columns = i * I::NR..((i + 1) * I::NR).min(columns);
            self.isa.vectorize(PackRight { x: &x, outer: columns, terms: terms.clone(), out });
        });
        out
    }

    fn block_partials(&self, block: &Block<I>, keep: &mut [f32]) -> Vec<TokenPartial> {
        let smoothing = self.problem.options().label_smoothing > 0.0;
        self.sweep(block, keep, |z, first, tokens, out| {
            self.isa.vectorize(lanes::Partials { z, smoothing, out });
            for (lane, column) in labels(self.problem, tokens, first, z.len() / I::NR) {
                out[lane].label_logit = z[column * I::NR + lane];
            }
        })
    }

    /// Runs `visit` over every panel of every chunk of logits: the logits [columns, NR], the first column, the tokens, and where
    /// to put what it finds about each. Returns that of all columns, by token. The logits stay in `keep`, if it is not empty.
    fn sweep<S: Share>(
        &self,
        block: &Block<I>,
        keep: &mut [f32],
        visit: impl Fn(&[f32], usize, &[usize], &mut [S]) + Sync,
    ) -> Vec<S> {
        let tokens = block.tokens.len();
        let columns = 0..self.problem.valid_columns();
        let mut shares = vec![S::default(); columns.len().div_ceil(CHUNK) * tokens];
        let mut keep = keep.chunks_mut(tokens.next_multiple_of(I::NR) * CHUNK);
        let jobs = cut(columns, CHUNK).zip(shares.chunks_mut(tokens)).map(|(chunk, shares)| (chunk, shares, keep.next()));
        work(jobs, Scratch::<I>::default, |scratch, (chunk, shares, keep)| {
            let panel = chunk.len().next_multiple_of(I::MR) * I::NR;
            // Panels that nobody will ask for again may lie in one place, if each is complete before the next begins.
            let apart = if keep.is_some() || block.by_token.len() > 1 { panel } else { 0 };
            let z = keep.unwrap_or_else(|| panels::grow(&mut scratch.z, (apart * tokens.div_ceil(I::NR)).max(panel)));
            let mut panels = block.tokens.chunks(I::NR).zip(shares.chunks_mut(I::NR));
            self.logits(&mut scratch.left, block, chunk.clone(), z, apart, |z| {
                let (tokens, shares) = panels.next().expect("as many panels of shares as of tokens");
                visit(z, chunk.start, tokens, shares);
            });
        });
        let shares = &shares;
        (0..tokens).into_par_iter().map(|n| S::merged(shares.iter().skip(n).step_by(tokens).copied())).collect()
    }

    /// Logits of a chunk and a block, panel by panel, into `z`, `apart` floats apart; each is visited once it is complete.
    fn logits(
        &self,
        left: &mut Vec<I::Packed>,
        block: &Block<I>,
        chunk: Range<usize>,
        z: &mut [f32],
        apart: usize,
        mut visit: impl FnMut(&mut [f32]),
    ) {
        let k = self.unembedding(false);
        let rows = chunk.len().next_multiple_of(I::MR);
        for (i, (terms, panels)) in self.depths().zip(&block.by_token).enumerate() {
            let strides = self.isa.vectorize(PackLeft { x: &k, outer: chunk.clone(), terms: terms.clone(), out: left });
            let write = if i == 0 { Write::Set } else { Write::Add };
            for (p, right) in panels.chunks_exact(panels::right_len::<I>(terms.len())).enumerate() {
                let z = &mut z[p * apart..][..rows * I::NR];
                let columns = (block.tokens.len() - p * I::NR).min(I::NR).next_multiple_of(I::LANES);
                let c = Output::new(z, [rows, columns], [I::NR, 1]);
                let words = terms.len().div_ceil(I::KU);
                // SAFETY: `z` is this call's own.
                unsafe { gemm::product(self.isa, Sweep::Panels, words, (left, strides), right, c, write) };
                if i + 1 == block.by_token.len() {
                    let z = &mut z[..chunk.len() * I::NR];
                    self.isa.vectorize(lanes::FinishLogits { options: self.problem.options(), z });
                    visit(z);
                }
            }
        }
    }

    /// The gradients of one block, given its tokens' lse; `resident` if its logits are in the workspace.
    fn gradients(&self, block: &Block<I>, plan: Plan, lse: &[f32], cotangents: Cotangents, resident: bool, sinks: &mut Sinks) {
        let workspace = &mut sinks.workspace[..];
        let d = self.problem.shape().hidden;
        let tokens = block.tokens;
        let panels = tokens.chunks(I::NR).zip(lse.chunks(I::NR));
        let panels: Vec<_> =
            panels.map(|(tokens, lse)| (tokens, PanelCotangent::new(self.problem, cotangents, tokens, lse))).collect();
        let by_feature =
            if sinks.d_unembedding.is_some() { self.panels(self.hidden(tokens, true), d, 0..tokens.len()) } else { Vec::new() };
        let mut dq = vec![0.0; if sinks.d_hidden.is_some() { tokens.len() * d } else { 0 }];
        let dk = sinks.d_unembedding.as_mut().map(|(dk, write)| {
            let write = std::mem::replace(write, Write::Add);
            (Output::new(dk, [self.problem.valid_columns(), d], unembedding_strides(self.problem)), write)
        });
        for stripe in cut(0..self.problem.valid_columns(), plan.stripe) {
            let mut sieve = sinks.filter.as_ref().map(|_| Sieve::new::<I>(tokens.len(), stripe.len(), CHUNK));
            let chunks = cut(stripe.clone(), CHUNK).zip(workspace.chunks_mut(tokens.len().next_multiple_of(I::NR) * CHUNK));
            let sieves = sieve.iter_mut().zip(&mut sinks.filter).flat_map(|(sieve, f)| sieve.chunks::<I>(f, stripe.clone()));
            let jobs = chunks.zip(sieves.map(Some).chain(std::iter::repeat_with(|| None)));
            let jobs = jobs.map(|((chunk, z), sieve)| (chunk, z, sieve));
            work(jobs, Scratch::<I>::default, |scratch, (chunk, z, mut sieve)| {
                if !resident {
                    let panel = chunk.len().next_multiple_of(I::MR) * I::NR;
                    self.logits(&mut scratch.left, block, chunk.clone(), z, panel, |_| {});
                }
                self.dlogits(scratch, &panels, chunk.clone(), z, dk.is_some(), sieve.as_mut());
                if let Some((dk, write)) = dk {
                    self.d_unembedding(scratch, &by_feature, tokens.len(), dk.part(chunk, 0..d), write, sieve.as_ref());
                }
            });
            if !dq.is_empty() {
                self.d_hidden(tokens.len(), stripe, workspace, sieve.as_ref(), &mut dq);
            }
            if let (Some(sieve), Some(filter)) = (sieve, &mut sinks.filter) {
                sieve.finish(filter, tokens);
            }
        }
        if let Some(d_hidden) = &mut sinks.d_hidden {
            for (row, &n) in dq.chunks_exact(d).zip(tokens) {
                d_hidden.put(n * d, row);
            }
        }
    }

    /// Turns a chunk's logits into dlogits, packed for dQ in place and, if asked for, for dK in `scratch.left`.
    fn dlogits(
        &self,
        scratch: &mut Scratch<I>,
        panels: &[(&[usize], PanelCotangent)],
        chunk: Range<usize>,
        z: &mut [f32],
        dk: bool,
        mut sieve: Option<&mut ChunkSieve>,
    ) {
        let rows = chunk.len().next_multiple_of(I::MR);
        let tokens = panels.iter().map(|(tokens, _)| tokens.len()).sum();
        let (stride, part_len) = self.by_column(tokens, rows);
        let by_column = panels::grow(&mut scratch.left, if dk { part_len * self.settings.parts } else { 0 });
        scratch.dlogits.resize(ROWS * I::NR, 0.0);
        let parts = self.settings.parts;
        for (p, ((tokens, cotangent), z)) in panels.iter().zip(z.chunks_exact_mut(rows * I::NR)).enumerate() {
            let labels: Vec<_> = labels(self.problem, tokens, chunk.start, chunk.len()).collect();
            let scale = self.problem.options().logit_scale;
            let limits = sieve.as_ref().map(|sieve| cotangent.limits(sieve.threshold(), scale));
            for piece in cut(0..rows, ROWS) {
                let out = &mut scratch.dlogits[..piece.len() * I::NR];
                let valid = piece.start..piece.end.min(chunk.len());
                let z_valid = &z[valid.start * I::NR..valid.end * I::NR];
                let (options, first) = (self.problem.options(), piece.start);
                self.isa.vectorize(lanes::Dlogits { cotangent, options, z: z_valid, labels: &labels, first, out });
                // What fills up the last rows and lanes is 0.
                out[z_valid.len()..].fill(0.0);
                if tokens.len() < I::NR {
                    out.chunks_exact_mut(I::NR).for_each(|row| row[tokens.len()..].fill(0.0));
                }
                let dlogits = out;
                if let Some((sieve, limits)) = sieve.as_mut().zip(limits.as_ref()) {
                    sieve.sift(self.isa, dlogits, limits, p, piece.start);
                }
                for part in 0..parts {
                    // In bytes no longer than the logits that it is made of: nothing is overwritten before its time.
                    let by_token = &mut as_packed::<I::Packed>(z)[piece.start * I::NR * parts..piece.end * I::NR * parts];
                    self.isa.vectorize(lanes::PackByToken { dlogits, part, parts, out: by_token });
                    if dk {
                        let tokens = tokens.len().next_multiple_of(I::KU);
                        let out = &mut by_column[part * part_len + piece.start * stride + p * I::NR..(part + 1) * part_len];
                        self.isa.vectorize(lanes::PackByColumn { dlogits, tokens, stride, out });
                    }
                    if part + 1 < parts {
                        self.isa.vectorize(lanes::Residual(dlogits));
                    }
                }
            }
        }
        if let Some(sieve) = sieve {
            sieve.count::<I>(chunk.len());
        }
    }

    /// How a chunk's dlogits lie for dK, in rows of tokens: their stride, and the elements of a part.
    fn by_column(&self, tokens: usize, rows: usize) -> (usize, usize) {
        let stride = tokens.next_multiple_of(I::KU) + panels::APART;
        (stride, rows * stride)
    }

    /// dK = or += dlogits·Q for a chunk, whose dlogits are in `scratch.left`.
    fn d_unembedding(
        &self,
        scratch: &mut Scratch<I>,
        by_feature: &[I::Packed],
        tokens: usize,
        dk: Output,
        write: Write,
        sieve: Option<&ChunkSieve>,
    ) {
        let (stride, part) = self.by_column(tokens, dk.rows().next_multiple_of(I::MR));
        let strides = Strides { row: stride, step: I::KU };
        let words = tokens.div_ceil(I::KU);
        let kept = sieve.map(ChunkSieve::by_column::<I>);
        for i in 0..self.settings.parts {
            let (left, write) = ((&scratch.left[i * part..], strides), if i == 0 { write } else { Write::Add });
            // SAFETY: each chunk's part of dK is its own.
            unsafe { gemm::product_of(kept, self.isa, Sweep::Panels, words, left, by_feature, dk, write, &mut scratch.gathered) };
        }
    }

    /// dQ += dlogitsᵀ·K over a stripe, whose dlogits are in the workspace.
    fn d_hidden(&self, tokens: usize, stripe: Range<usize>, workspace: &[f32], sieve: Option<&Sieve>, dq: &mut [f32]) {
        let (d, parts) = (self.problem.shape().hidden, self.settings.parts);
        let k = self.unembedding(true);
        let dq = Output::new(dq, [tokens, d], [d, 1]);
        // A tile packs its columns of K once a chunk: as many of them as fit the second-level cache, for as many tokens as can be.
        let across = d.div_ceil(I::NR).div_ceil((RIGHT_BYTES / (CHUNK * I::NR * size_of::<I::Packed>())).max(1));
        let threads = rayon::current_num_threads();
        let down = if across.is_multiple_of(threads) { 1 } else { threads };
        let tiles = (0..down).flat_map(|i| (0..across).map(move |j| (i, j)));
        let share = |i: usize, of: usize, total: usize, unit: usize| {
            let units = total.div_ceil(unit);
            i * units / of * unit..((i + 1) * units / of * unit).min(total)
        };
        work(tiles, Scratch::<I>::default, |scratch, (i, j)| {
            let (rows, columns) = (share(i, down, tokens, I::MR), share(j, across, d, I::NR));
            let chunks = cut(stripe.clone(), CHUNK).zip(workspace.chunks(tokens.next_multiple_of(I::NR) * CHUNK));
            for (place, (chunk, z)) in chunks.enumerate() {
                let kept = sieve.map(|sieve| sieve.by_token::<I>(place));
                if kept.is_some_and(|kept| !kept.any(rows.start / I::MR..rows.end.div_ceil(I::MR))) {
                    continue;
                }
                let right_len = columns.len().div_ceil(I::NR) * panels::right_len::<I>(chunk.len());
                let out = panels::grow(&mut scratch.right, right_len);
                self.isa.vectorize(PackRight { x: &k, outer: columns.clone(), terms: chunk.clone(), out });
                let (panel, word) = (chunk.len().next_multiple_of(I::MR) * I::NR, I::NR * I::KU);
                let strides = Strides { row: I::KU, step: word * parts };
                for (p, z) in z.chunks_exact(panel).enumerate() {
                    let rows = rows.start.max(p * I::NR)..rows.end.min((p + 1) * I::NR);
                    if rows.is_empty() {
                        continue;
                    }
                    let by_token = as_packed_ref::<I::Packed>(z);
                    let first = (rows.start - p * I::NR) * I::KU;
                    let kept = kept.map(|kept| kept.starting_at(rows.start / I::MR));
                    let c = dq.part(rows, columns.clone());
                    for part in 0..parts {
                        let (words, left) = (chunk.len().div_ceil(I::KU), (&by_token[part * word + first..], strides));
                        let (right, gathered) = (&scratch.right, &mut scratch.gathered);
                        // SAFETY: the tiles of dQ are disjoint.
                        unsafe { gemm::product_of(kept, self.isa, Sweep::Rows, words, left, right, c, Write::Add, gathered) };
                    }
                }
            }
        });
    }

    /// Q's rows of these tokens; summed over tokens if `transposed`, over D if not.
    fn hidden<'t>(&self, tokens: &'t [usize], transposed: bool) -> Operand<'t>
    where
        'p: 't,
    {
        let token = Axis { stride: self.problem.shape().hidden, gather: Some(tokens) };
        let feature = Axis { stride: 1, gather: None };
        let (outer, depth) = if transposed { (feature, token) } else { (token, feature) };
        Operand { data: self.problem.hidden(), outer, depth }
    }

    /// K; summed over V if `transposed`, over D if not.
    fn unembedding(&self, transposed: bool) -> Operand<'p> {
        let [id, feature] = unembedding_strides(self.problem).map(|stride| Axis { stride, gather: None });
        let (outer, depth) = if transposed { (feature, id) } else { (id, feature) };
        Operand { data: self.problem.unembedding(), outer, depth }
    }
}

/// Does the jobs, each by whichever of the current threads is free, with scratch space of its own.
fn work<J: Send, S>(jobs: impl Iterator<Item = J> + Send, scratch: impl Fn() -> S + Sync, work: impl Fn(&mut S, J) + Sync) {
    let jobs = Mutex::new(jobs);
    let next = || jobs.lock().unwrap_or_else(std::sync::PoisonError::into_inner).next();
    (0..rayon::current_num_threads()).into_par_iter().with_max_len(1).for_each(|_| {
        let mut scratch = scratch();
        while let Some(job) = next() {
            work(&mut scratch, job);
        }
    });
}

fn cut(whole: Range<usize>, length: usize) -> impl Iterator<Item = Range<usize>> {
    whole.clone().step_by(length).map(move |start| start..(start + length).min(whole.end))
}

/// The lanes of tokens whose label is one of `len` columns from `first` on, and that column's index.
fn labels(problem: &Problem, tokens: &[usize], first: usize, len: usize) -> impl Iterator<Item = (usize, usize)> {
    tokens.iter().enumerate().filter_map(move |(lane, &n)| {
        let at = problem.labels()[n].column()?.checked_sub(first)?;
        (at < len).then_some((lane, at))
    })
}

/// The memory of some floats, to hold packed values.
fn as_packed<P: Packed>(floats: &mut [f32]) -> &mut [P] {
    let len = size_of_val(floats) / size_of::<P>();
    // SAFETY: a packed value is a float of at most 4 bytes: aligned wherever a float32 is, and valid whatever its bits.
    unsafe { std::slice::from_raw_parts_mut(floats.as_mut_ptr().cast(), len) }
}

/// What [`as_packed`] left there.
fn as_packed_ref<P: Packed>(floats: &[f32]) -> &[P] {
    let len = size_of_val(floats) / size_of::<P>();
    // SAFETY: as above.
    unsafe { std::slice::from_raw_parts(floats.as_ptr().cast(), len) }
}

/// How far apart two vocab ids and two features lie in K.
fn unembedding_strides(problem: &Problem) -> [usize; 2] {
    match problem.layout() {
        Layout::Vd => [problem.shape().hidden, 1],
        Layout::Dv => [1, problem.shape().vocab],
    }
}
