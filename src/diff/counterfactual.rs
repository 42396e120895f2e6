//! Counterfactual replay: the reference in float64 with chosen faults built in.
//!
//! A [`Counterfactual`] describes how a fused cross-entropy computes, step by step; its default is right, and
//! `diff::fault` turns a named fault into a change of it. Faults compose, since each changes its own fields.
//! `synth` writes dumps with it and `explain` tests hypotheses with it: one implementation for both.

use fused_xent_kernels::contract::Precision;
use fused_xent_kernels::problem::{Label, LossOptions, Problem};
use fused_xent_kernels::reduction::{Denominator, MicrobatchCounts, Microbatches, Reduction, StepReduction};
use fused_xent_kernels::reference::{self, Forward, Gradients, Parts};
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, ArrayViewMut1, Axis, s};
use rayon::prelude::*;
use std::ops::Range;

/// One step as a replay sees it.
pub struct Step<'a> {
    /// Its microbatches.
    pub microbatches: Vec<Microbatch<'a>>,
    /// How many microbatches the step has; not all may be at hand.
    pub num_microbatches: usize,
    /// How their losses add up.
    pub reduction: StepReduction,
    /// Whether a microbatch's own gradient already carries the step's factor.
    pub own_carries_step_factor: bool,
}

/// One microbatch: the checked problem, and the targets as stored, masked ones too.
pub struct Microbatch<'a> {
    /// The problem.
    pub problem: Problem<'a>,
    /// Label ids as captured, [N].
    pub targets: Vec<i64>,
    /// Index in the step.
    pub index: usize,
}

impl Step<'_> {
    /// What the reduction needs to know of every microbatch.
    pub fn counts(&self) -> Vec<MicrobatchCounts> {
        self.microbatches.iter().map(|m| MicrobatchCounts::of(&m.problem)).collect()
    }

    /// ∂(microbatch m's recorded loss)/∂ℓ[n] = factor · w[n].
    pub fn own_factor(&self, m: usize) -> f64 {
        let own = self.reduction.own_factor(&self.counts(), m);
        if self.own_carries_step_factor { own * self.step_factor() } else { own }
    }

    /// From a microbatch's own gradient to its share of the accumulated one.
    pub fn accumulation_factor(&self) -> f64 {
        if self.own_carries_step_factor { 1.0 } else { self.step_factor() }
    }

    fn step_factor(&self) -> f64 {
        self.reduction.step_factor(self.num_microbatches)
    }
}

/// Where the label's term goes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LabelPlace {
    /// To the label's column.
    Right,
    /// Nowhere.
    Missing,
    /// To the column after it (the last wraps to the first).
    OffByOne,
    /// Nowhere if the id is the first of a tile of this many.
    MissingOnTileEdge(usize),
    /// To the label's column, once for each of so many shards.
    Repeated(usize),
}

/// What masked tokens do in the backward.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MaskedTokens {
    /// Nothing.
    TakeNoPart,
    /// They count with weight 1 and the label they are stored with (none if that is no vocab id).
    WithStoredLabel,
    /// They count with weight 1 and label 0.
    WithLabelZero,
}

/// What per-token factor enters the backward.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TokenFactor {
    /// g.
    Right,
    /// The first token's g for all.
    First,
    /// The weights left out, the denominator not.
    Unweighted,
}

/// How the label part of dK is summed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LabelSum {
    /// In high precision.
    Exact,
    /// Each contribution rounded to bf16 once, then summed in high precision.
    EachRounded,
    /// Scatter-added in bf16: the running sum is rounded at every hit.
    Bf16 {
        /// Whether a contribution is rounded before it is added.
        hits_rounded: bool,
        /// What the hits are added to.
        onto: ScatterOnto,
    },
}

/// What label gradients are scatter-added to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ScatterOnto {
    /// Zeros; the lse part, in high precision, is added afterwards.
    Zeros,
    /// Zeros; the lse part, rounded to bf16, is added afterwards.
    ZerosThenBf16,
    /// The lse part, rounded to bf16.
    LsePart,
}

/// How a sum over chunks is kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bf16Sum {
    /// Terms per chunk; the last may be shorter.
    pub width: usize,
    /// Whether a chunk's own sum is rounded before it is added.
    pub parts_rounded: bool,
}

/// How a fused cross-entropy computes. The default is right.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Counterfactual {
    /// Precision of the logits that enter lse, and that enter the backward.
    pub forward_logits: Precision,
    /// See `forward_logits`.
    pub backward_logits: Precision,
    /// Label logit summed in bf16 for the loss.
    pub label_logit_bf16: bool,
    /// lse − z_t subtracted in bf16.
    pub loss_subtract_bf16: bool,
    /// Zero columns that enter lse.
    pub padding_in_lse: usize,
    /// Vocab ids that lse does not see, [start, end).
    pub lse_misses: Option<(usize, usize)>,
    /// Precision in which the backward gets lse.
    pub stored_lse: Precision,
    /// Each of so many vocab shards normalises by its own lse.
    pub local_lse_shards: usize,
    /// Whether columns beyond `valid_vocab` take part.
    pub padding_takes_part: bool,
    /// The label's term.
    pub label: LabelPlace,
    /// Masked tokens.
    pub masked: MaskedTokens,
    /// Per-token factor.
    pub token_factor: TokenFactor,
    /// tanh′ left out of the lse part, and of the label part.
    pub no_softcap_derivative: (bool, bool),
    /// z-loss in the loss only.
    pub no_z_loss_gradient: bool,
    /// Label smoothing off in the backward.
    pub no_label_smoothing: bool,
    /// The chain factor of the logit scale left out.
    pub no_scale_factor: bool,
    /// Precision of dlogits in the gradient products.
    pub dlogits: Precision,
    /// P kept in bf16, and 1 taken off at the label in bf16.
    pub p_minus_one_bf16: bool,
    /// g·q rounded to bf16 before the product for dK.
    pub gq_bf16: bool,
    /// Entries of dlogits from this vocab id on are 0 in the backward.
    pub vocab_end: Option<usize>,
    /// Entries of dlogits from this token on are 0 in the backward.
    pub token_end: Option<usize>,
    /// Only these vocab ids contribute to dQ.
    pub dq_vocab: Option<(usize, usize)>,
    /// Only these tokens contribute to dK.
    pub dk_tokens: Option<(usize, usize)>,
    /// Constant factors.
    pub dq_factor: f64,
    /// See `dq_factor`.
    pub dk_factor: f64,
    /// dQ accumulated in bf16 over vocab tiles.
    pub dq_sum: Option<Bf16Sum>,
    /// dK accumulated in bf16 over token chunks.
    pub dk_sum: Option<Bf16Sum>,
    /// The label part of dK.
    pub label_sum: LabelSum,
    /// dK's parts rounded to bf16 before they are added.
    pub dk_parts_bf16: bool,
    /// Denominator: all tokens, masked ones too.
    pub mean_over_all_tokens: bool,
    /// Each microbatch by its own denominator, then the mean, in place of one denominator.
    pub mean_of_means: bool,
    /// Constant factor on the accumulated dK alone.
    pub accumulated_factor: f64,
    /// dK of the last microbatch overwrites the others'.
    pub last_microbatch_only: bool,
    /// dK accumulated in bf16 over microbatches.
    pub microbatches_bf16: bool,
}

impl Default for Counterfactual {
    fn default() -> Self {
        Self {
            forward_logits: Precision::F64,
            backward_logits: Precision::F64,
            label_logit_bf16: false,
            loss_subtract_bf16: false,
            padding_in_lse: 0,
            lse_misses: None,
            stored_lse: Precision::F64,
            local_lse_shards: 1,
            padding_takes_part: false,
            label: LabelPlace::Right,
            masked: MaskedTokens::TakeNoPart,
            token_factor: TokenFactor::Right,
            no_softcap_derivative: (false, false),
            no_z_loss_gradient: false,
            no_label_smoothing: false,
            no_scale_factor: false,
            dlogits: Precision::F64,
            p_minus_one_bf16: false,
            gq_bf16: false,
            vocab_end: None,
            token_end: None,
            dq_vocab: None,
            dk_tokens: None,
            dq_factor: 1.0,
            dk_factor: 1.0,
            dq_sum: None,
            dk_sum: None,
            label_sum: LabelSum::Exact,
            dk_parts_bf16: false,
            mean_over_all_tokens: false,
            mean_of_means: false,
            accumulated_factor: 1.0,
            last_microbatch_only: false,
            microbatches_bf16: false,
        }
    }
}

/// What one microbatch comes to.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Per-token loss, lse and label logits.
    pub forward: Forward,
    /// dQ and dK, in parts.
    pub gradients: Gradients,
}

/// Which gradients a replay computes; the others stay 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// dQ.
    pub d_hidden: bool,
    /// dK.
    pub d_unembedding: bool,
}

impl Wanted {
    /// Both.
    pub const ALL: Self = Self { d_hidden: true, d_unembedding: true };
}

fn bf16(x: f64) -> f64 {
    Precision::Bf16.round(x)
}

/// One token's share of dlogits.
#[derive(Clone, Copy, Default)]
struct TokenLabel {
    column: Option<usize>,
    value: f64,
}

impl Counterfactual {
    /// Replays microbatch `m` of `step`: its own gradients, as a dump records them.
    pub fn replay(&self, step: &Step, m: usize, wanted: Wanted) -> Outcome {
        let Microbatch { problem, targets, .. } = &step.microbatches[m];
        let shape = problem.shape();
        let factor = self.own_factor(step, m);
        let g = self.cotangents(problem, factor);
        let mut out = Outcome {
            forward: Forward {
                loss: vec![0.0; shape.tokens],
                lse: vec![0.0; shape.tokens],
                label_logits: vec![0.0; shape.tokens],
            },
            gradients: Gradients::zeros(shape),
        };
        let mut all_labels = Vec::with_capacity(shape.tokens);
        let mut dk_chunk = self.dk_sum.map(|_| Array2::zeros((shape.vocab, shape.hidden)));
        for rows in self.token_blocks(problem) {
            let mut z = reference::logits(problem, rows.clone());
            if self.padding_takes_part {
                self.fill_padding(problem, rows.clone(), &mut z);
            }
            let tokens: Vec<TokenOutcome> = z
                .axis_iter_mut(Axis(0))
                .into_par_iter()
                .zip(rows.clone())
                .map(|(z, n)| self.token(problem, n, targets[n], g[n], z))
                .collect();
            for (n, t) in rows.clone().zip(&tokens) {
                if problem.labels()[n] != Label::Masked {
                    (out.forward.loss[n], out.forward.lse[n], out.forward.label_logits[n]) = (t.loss, t.lse, t.label_logit);
                }
            }
            let labels: Vec<TokenLabel> = tokens.iter().map(|t| t.label).collect();
            if wanted.d_hidden {
                self.d_hidden(problem, rows.clone(), &z, &labels, &mut out.gradients);
            }
            if !wanted.d_unembedding {
                continue;
            }
            match &mut dk_chunk {
                None => self.d_unembedding(problem, rows.clone(), &g, &z, &mut out.gradients.unembedding.lse),
                Some(chunk) => {
                    self.d_unembedding(problem, rows.clone(), &g, &z, chunk);
                    self.d_unembedding_label(problem, rows.clone(), &labels, chunk);
                    let width = self.dk_sum.map_or(1, |s| s.width);
                    if rows.end % width == 0 || rows.end == shape.tokens {
                        let rounded = self.dk_sum.is_some_and(|s| s.parts_rounded);
                        let total = &mut out.gradients.unembedding.lse;
                        total.zip_mut_with(chunk, |total, &part| *total = bf16(*total + if rounded { bf16(part) } else { part }));
                        chunk.fill(0.0);
                    }
                }
            }
            if dk_chunk.is_none() {
                self.d_unembedding_label(problem, rows.clone(), &labels, &mut out.gradients.unembedding.label);
            }
            all_labels.extend(labels);
        }
        self.finish_parts(problem, &all_labels, &mut out.gradients.unembedding);
        let Gradients { hidden, unembedding } = &mut out.gradients;
        for (parts, factor) in [(hidden, self.dq_factor), (unembedding, self.dk_factor)] {
            parts.lse *= factor;
            parts.label *= factor;
        }
        out
    }

    /// Adds microbatch `m`'s own dK, [V, D], to the step's accumulated one; microbatches come in order.
    pub fn accumulate(&self, step: &Step, m: usize, own: &Array2<f64>, total: &mut Array2<f64>) {
        let factor = step.accumulation_factor() * self.accumulated_factor;
        if self.last_microbatch_only {
            total.assign(&(own * factor));
        } else if self.microbatches_bf16 && m > 0 {
            total.zip_mut_with(own, |total, &own| *total = bf16(*total + bf16(own * factor)));
        } else {
            total.scaled_add(factor, own);
        }
        if self.microbatches_bf16 {
            total.mapv_inplace(bf16);
        }
    }

    fn own_factor(&self, step: &Step, m: usize) -> f64 {
        let mut factor = step.own_factor(m);
        let counts = step.counts();
        let valid: f64 = counts.iter().map(|c| c.weight).sum();
        if self.mean_over_all_tokens && step.reduction.reduction == Reduction::Mean {
            let over = |reduction: StepReduction| reduction.own_factor(&counts, m);
            let right = over(step.reduction);
            if right != 0.0 {
                factor *= over(StepReduction { denominator: Denominator::Tokens, ..step.reduction }) / right;
            }
        }
        if self.mean_of_means && step.reduction.microbatches == Microbatches::Global && counts[m].weight > 0.0 {
            factor *= valid / (counts[m].weight * counts.len() as f64);
        }
        factor
    }

    /// g of every token, masked ones as `masked` says.
    fn cotangents(&self, problem: &Problem, factor: f64) -> Vec<f64> {
        let weight = |n: usize| match (problem.labels()[n], self.masked) {
            (Label::Masked, MaskedTokens::TakeNoPart) => 0.0,
            (Label::Masked, _) => 1.0,
            _ if self.token_factor == TokenFactor::Unweighted => 1.0,
            _ if self.token_factor == TokenFactor::First => f64::from(problem.weights()[0]),
            _ => f64::from(problem.weights()[n]),
        };
        (0..problem.shape().tokens).map(|n| factor * weight(n)).collect()
    }

    /// Token blocks that end where a chunk of dK's sum does.
    fn token_blocks(&self, problem: &Problem) -> Vec<Range<usize>> {
        let blocks = reference::token_blocks(problem);
        match self.dk_sum {
            None => blocks.collect(),
            Some(sum) => blocks
                .flat_map(|b| {
                    let cuts = (b.start..b.end).filter(move |n| n % sum.width == 0 && *n > b.start);
                    let starts: Vec<usize> = std::iter::once(b.start).chain(cuts).chain([b.end]).collect();
                    starts.windows(2).map(|w| w[0]..w[1]).collect::<Vec<_>>()
                })
                .collect(),
        }
    }

    fn valid_columns(&self, problem: &Problem) -> usize {
        if self.padding_takes_part { problem.shape().vocab } else { problem.valid_columns() }
    }

    /// Logits of the padding columns, which the reference holds at −∞.
    fn fill_padding(&self, problem: &Problem, rows: Range<usize>, z: &mut Array2<f64>) {
        let (valid, vocab) = (problem.valid_columns(), problem.shape().vocab);
        let options = problem.options();
        let q = reference::hidden_rows(problem, rows);
        let x = q.dot(&reference::unembedding_rows(problem, valid..vocab).t()) * options.logit_scale;
        z.slice_mut(s![.., valid..]).assign(&x.mapv(|x| options.logit_softcap.map_or(x, |cap| cap * (x / cap).tanh())));
    }

    /// Turns one token's logits into its dlogits (the label's term apart), and gives its forward results.
    fn token(&self, problem: &Problem, n: usize, target: i64, g: f64, mut z: ArrayViewMut1<f64>) -> TokenOutcome {
        let valid = self.valid_columns(problem);
        let options = *problem.options();
        let stored = usize::try_from(target).ok().filter(|&t| t < valid);
        let label = match (problem.labels()[n], self.masked) {
            (Label::Column(label), _) => Some(label as usize),
            (_, MaskedTokens::WithStoredLabel) => stored,
            (_, MaskedTokens::WithLabelZero) => Some(0),
            _ => None,
        };
        let forward = self.forward(problem, n, label, z.slice(s![..valid]));
        let smoothing = if self.no_label_smoothing { 0.0 } else { options.label_smoothing };
        let z_loss = if self.no_z_loss_gradient { 0.0 } else { options.z_loss };
        let p_factor = g * (1.0 + 2.0 * z_loss * forward.lse);
        let constant = -g * smoothing / valid as f64;
        let takes_part = g != 0.0 && self.token_end.is_none_or(|end| n < end);
        let scale = if self.no_scale_factor { 1.0 } else { options.logit_scale };
        let slope = |z: f64, without: bool| match options.logit_softcap {
            Some(cap) if !without => scale * (1.0 - (z / cap).powi(2)),
            _ => scale,
        };
        let place = label.and_then(|label| match self.label {
            LabelPlace::Missing => None,
            LabelPlace::OffByOne => Some((label + 1) % valid),
            LabelPlace::MissingOnTileEdge(tile) if label % tile == 0 => None,
            _ => Some(label),
        });
        let repeat = if let LabelPlace::Repeated(shards) = self.label { shards as f64 } else { 1.0 };
        let column = place.filter(|&c| takes_part && self.vocab_end.is_none_or(|end| c < end));
        let mut value = column.map_or(0.0, |c| -g * (1.0 - smoothing) * repeat * slope(z[c], self.no_softcap_derivative.1));
        let lses = self.backward_lse(forward.lse, z.slice(s![..valid]));
        let shard = valid.div_ceil(lses.len());
        for (v, z) in z.iter_mut().enumerate() {
            if !takes_part || v >= valid || self.vocab_end.is_some_and(|end| v >= end) {
                *z = 0.0;
                continue;
            }
            let logit = self.backward_logits.round(*z);
            let p = (logit - lses[v / shard]).exp();
            let (lse_slope, label_slope) =
                (slope(logit, self.no_softcap_derivative.0), slope(logit, self.no_softcap_derivative.1));
            *z = if self.p_minus_one_bf16 {
                if Some(v) == column {
                    value = 0.0;
                    (p_factor * bf16(bf16(p) - (1.0 - smoothing)) + constant) * lse_slope
                } else {
                    (p_factor * bf16(p) + constant) * lse_slope
                }
            } else {
                self.dlogits.round(p_factor * p * lse_slope + constant * label_slope)
            };
        }
        TokenOutcome { label: TokenLabel { column, value }, ..forward }
    }

    fn forward(&self, problem: &Problem, n: usize, label: Option<usize>, z: ArrayView1<f64>) -> TokenOutcome {
        let LossOptions { z_loss, label_smoothing, .. } = *problem.options();
        let logits = z.iter().enumerate().filter(|(v, _)| self.lse_misses.is_none_or(|(start, end)| *v < start || *v >= end));
        let padding = std::iter::repeat_n(0.0, self.padding_in_lse);
        let lse = reference::log_sum_exp(logits.map(|(_, &z)| self.forward_logits.round(z)).chain(padding));
        let mut label_logit = label.map_or(0.0, |label| self.forward_logits.round(z[label]));
        if let (true, Some(label)) = (self.label_logit_bf16, label) {
            let q = reference::hidden_rows(problem, n..n + 1);
            let k = reference::unembedding_rows(problem, label..label + 1);
            label_logit = bf16(problem.options().logit_scale * q.iter().zip(&k).map(|(q, k)| bf16(q * k)).sum::<f64>());
        }
        let smoothed = if label_smoothing > 0.0 { label_smoothing * z.sum() / z.len() as f64 } else { 0.0 };
        let loss = if self.loss_subtract_bf16 {
            bf16(bf16(lse) - bf16(label_logit))
        } else {
            lse - (1.0 - label_smoothing) * label_logit - smoothed + z_loss * lse * lse
        };
        TokenOutcome { loss, lse, label_logit, label: TokenLabel::default() }
    }

    /// The lse of each vocab shard, one unless they differ.
    fn backward_lse(&self, lse: f64, z: ArrayView1<f64>) -> Vec<f64> {
        if self.local_lse_shards <= 1 {
            return vec![self.stored_lse.round(lse)];
        }
        let width = z.len().div_ceil(self.local_lse_shards);
        z.axis_chunks_iter(Axis(0), width).map(|z| reference::log_sum_exp(z.iter().copied())).collect()
    }

    fn d_hidden(&self, problem: &Problem, rows: Range<usize>, dlogits: &Array2<f64>, labels: &[TokenLabel], out: &mut Gradients) {
        let (start, end) = self.dq_vocab.unwrap_or((0, problem.shape().vocab));
        let width = self.dq_sum.map_or(2048, |sum| sum.width);
        let mut total = Array2::zeros((rows.len(), problem.shape().hidden));
        let tiles: Vec<Range<usize>> = (start..end).step_by(width).map(|v| v..(v + width).min(end)).collect();
        let products: Vec<Array2<f64>> = tiles
            .par_iter()
            .map(|tile| {
                let k = reference::unembedding_rows(problem, tile.clone());
                let mut part = dlogits.slice(s![.., tile.clone()]).dot(&k);
                if self.dq_sum.is_some() {
                    for (mut row, label) in part.outer_iter_mut().zip(labels) {
                        if let Some(c) = label.column.filter(|c| tile.contains(c)) {
                            row.scaled_add(label.value, &k.row(c - tile.start));
                        }
                    }
                }
                part
            })
            .collect();
        for part in &products {
            match self.dq_sum {
                None => total += part,
                Some(sum) => total
                    .zip_mut_with(part, |total, &part| *total = bf16(*total + if sum.parts_rounded { bf16(part) } else { part })),
            }
        }
        out.hidden.lse.slice_mut(s![rows.clone(), ..]).assign(&total);
        if self.dq_sum.is_some() {
            return;
        }
        for (n, label) in rows.zip(labels) {
            if let Some(c) = label.column.filter(|c| (start..end).contains(c)) {
                out.hidden.label.row_mut(n).scaled_add(label.value, &reference::unembedding_rows(problem, c..c + 1).row(0));
            }
        }
    }

    /// Adds the lse part of a block of tokens to `out`, [V, D].
    fn d_unembedding(&self, problem: &Problem, rows: Range<usize>, g: &[f64], dlogits: &Array2<f64>, out: &mut Array2<f64>) {
        let rows_used = self.used_tokens(rows.clone());
        if rows_used.is_empty() {
            return;
        }
        let mut q = reference::hidden_rows(problem, rows_used.clone());
        let mut dlogits = dlogits.slice(s![rows_used.start - rows.start..rows_used.end - rows.start, ..]).to_owned();
        if self.gq_bf16 {
            for ((mut q, mut dlogits), n) in q.outer_iter_mut().zip(dlogits.outer_iter_mut()).zip(rows_used) {
                if g[n] != 0.0 {
                    q.mapv_inplace(|q| bf16(g[n] * q));
                    dlogits /= g[n];
                }
            }
        }
        let chunk = 2048;
        out.axis_chunks_iter_mut(Axis(0), chunk).into_par_iter().zip(dlogits.axis_chunks_iter(Axis(1), chunk)).for_each(
            |(mut out, dlogits): (_, ArrayView2<f64>)| ndarray::linalg::general_mat_mul(1.0, &dlogits.t(), &q, 1.0, &mut out),
        );
    }

    /// Adds the label part of a block of tokens to `out`, [V, D].
    fn d_unembedding_label(&self, problem: &Problem, rows: Range<usize>, labels: &[TokenLabel], out: &mut Array2<f64>) {
        let used = self.used_tokens(rows.clone());
        let q = reference::hidden_rows(problem, rows.clone());
        for ((n, label), q) in rows.zip(labels).zip(q.outer_iter()) {
            let Some(column) = label.column.filter(|_| used.contains(&n)) else { continue };
            let contribution: Array1<f64> = &q * label.value;
            let mut row = out.row_mut(column);
            match self.label_sum {
                LabelSum::Exact => row += &contribution,
                LabelSum::EachRounded => row += &contribution.mapv(bf16),
                LabelSum::Bf16 { hits_rounded, .. } => {
                    row.zip_mut_with(&contribution, |sum, &x| *sum = bf16(*sum + if hits_rounded { bf16(x) } else { x }));
                }
            }
        }
    }

    /// What happens to dK's parts after the last token.
    fn finish_parts(&self, problem: &Problem, labels: &[TokenLabel], parts: &mut Parts) {
        let scatter = match self.label_sum {
            LabelSum::Bf16 { onto, .. } => Some(onto),
            _ => None,
        };
        if self.dk_parts_bf16 || matches!(scatter, Some(ScatterOnto::ZerosThenBf16 | ScatterOnto::LsePart)) {
            parts.lse.mapv_inplace(bf16);
        }
        if self.dk_parts_bf16 {
            parts.label.mapv_inplace(bf16);
        }
        if scatter == Some(ScatterOnto::LsePart) {
            let mut sum = parts.lse.clone();
            self.d_unembedding_label(problem, 0..problem.shape().tokens, labels, &mut sum);
            parts.label = sum - &parts.lse;
        }
    }

    fn used_tokens(&self, rows: Range<usize>) -> Range<usize> {
        let (start, end) = self.dk_tokens.unwrap_or((0, usize::MAX));
        rows.start.max(start).min(rows.end)..rows.end.min(end).max(rows.start.max(start).min(rows.end))
    }
}

struct TokenOutcome {
    loss: f64,
    lse: f64,
    label_logit: f64,
    label: TokenLabel,
}
