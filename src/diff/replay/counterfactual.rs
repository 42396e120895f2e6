//! How a fused cross-entropy computes, right or wrong, step by step.

use super::approximate::Approximation;
use crate::diff::step::Step;
use fused_xent_kernels::contract::Precision;
use fused_xent_kernels::problem::{Label, Problem};
use fused_xent_kernels::reduction::{Denominator, Microbatches, Reduction, StepReduction};
use ndarray::Array2;
use std::ops::Range;

/// Where the label's term goes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LabelPlace {
    /// To the label's column.
    Right,
    /// Nowhere.
    Missing,
    /// To the column beside it.
    Beside {
        /// The one before it, and not the one after.
        left: bool,
        /// Whether what lies beyond the first or last column comes out at the other end, or is lost.
        wraps: bool,
    },
    /// Nowhere if the id is at an edge of a tile.
    MissingOnTileEdge {
        /// Vocab ids of a tile.
        tile: usize,
        /// Whether it is the tile's last id that loses its label, and not the first.
        last: bool,
    },
}

/// How the label logit of the loss is summed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LabelLogit {
    /// In high precision.
    Exact,
    /// In high precision, then rounded to bf16.
    Rounded,
    /// From products rounded to bf16, in high precision, then rounded.
    OfRoundedProducts,
    /// In bf16: the running sum is rounded after each product.
    RunningSum {
        /// Whether a product is rounded before it is added.
        products_rounded: bool,
    },
}

/// Who sees lse rounded to bf16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LseRounded {
    /// Nobody.
    Nowhere,
    /// The backward.
    Backward,
    /// Whoever reads lse after the forward, the backward too; the loss is formed from the exact one.
    Output,
    /// The loss, too.
    Loss,
}

/// In which passes columns beyond `valid_vocab` take part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Padding {
    /// In none.
    TakesNoPart,
    /// In the backward, with the lse of the valid ones.
    InBackward,
    /// In both.
    InBoth,
}

/// How rows are split over shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Split {
    /// How many shards there are.
    pub shards: usize,
    /// As evenly as whole rows allow; else every shard has as many rows as the first, and the last what is left.
    pub even: bool,
}

impl Split {
    /// The rows of a shard, of so many.
    pub fn range(self, shard: usize, of: usize) -> Range<usize> {
        let at = |shard: usize| if self.even { of * shard / self.shards } else { shard * of.div_ceil(self.shards) };
        at(shard).min(of)..at(shard + 1).min(of)
    }

    /// The shard that has a row, of so many.
    pub(super) fn shard_of(self, row: usize, of: usize) -> usize {
        if self.even { ((row + 1) * self.shards).div_ceil(of) - 1 } else { row / of.div_ceil(self.shards).max(1) }
    }
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
    /// They count with weight 1, without a label's term.
    WithoutLabel,
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

/// What the backward knows of the logit scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ScaleInBackward {
    /// All.
    Right,
    /// The chain factor is left out.
    NoFactor,
    /// Nothing: logits, too, are computed as if it were 1, and meet the lse of the forward.
    One,
    /// Nothing, and lse is that of such logits.
    OneInLseToo,
}

/// Tiles of dlogits that the backward skips.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Filter {
    /// A tile is skipped if all its |dlogits/g| are below this.
    pub eps: f64,
    /// Tokens of a tile.
    pub tokens: usize,
    /// Vocab ids of a tile.
    pub ids: usize,
    /// Whether masked tokens count as if they took part, without a label.
    pub masked_count: bool,
}

/// How dK is summed over processes: each sums its own tokens, an equal share of them, and then the processes are added.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ProcessSum {
    /// How many.
    pub processes: usize,
    /// How they are added.
    pub added: ProcessesAdded,
}

/// How the sums of the processes are added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcessesAdded {
    /// In float32.
    F32,
    /// In float32, as XLA adds bf16 over CPUs, and then rounded to bf16: label gradients that were scatter-added to zeros by
    /// themselves, all of dK otherwise.
    F32ThenBf16,
    /// In bf16.
    Bf16,
}

impl ProcessSum {
    /// Where the share of each process of so many tokens ends.
    pub(super) fn ends(self, tokens: usize) -> impl Iterator<Item = usize> {
        (1..=self.processes).map(move |p| tokens * p / self.processes)
    }
}

/// How a sum is cut into chunks; the last may be shorter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunks {
    /// So many of one width.
    Number(usize),
    /// Of this width.
    Width(usize),
}

impl Chunks {
    /// Terms per chunk, of so many.
    pub fn width(self, of: usize) -> usize {
        match self {
            Chunks::Number(number) => of.div_ceil(number).max(1),
            Chunks::Width(width) => width,
        }
    }
}

/// How a sum over chunks is kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bf16Sum {
    /// How the terms are cut into chunks.
    pub chunks: Chunks,
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
    /// The label logit of the loss.
    pub label_logit: LabelLogit,
    /// lse − z_t subtracted in bf16.
    pub loss_subtract_bf16: bool,
    /// Zero columns that enter lse.
    pub padding_in_lse: usize,
    /// Vocab ids that lse does not see, [start, end).
    pub lse_misses: Option<(usize, usize)>,
    /// Who sees lse rounded to bf16.
    pub lse_rounded: LseRounded,
    /// Each vocab shard normalises by its own lse.
    pub local_lse: Option<Split>,
    /// Columns beyond `valid_vocab`.
    pub padding: Padding,
    /// The label's term.
    pub label: LabelPlace,
    /// How often it counts in dQ, and in dK.
    pub label_counts: [f64; 2],
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
    /// The logit scale in the backward.
    pub scale: ScaleInBackward,
    /// Precision of dlogits in the gradient products.
    pub dlogits: Precision,
    /// Whether that rounding takes the label's term in.
    pub label_in_dlogits: bool,
    /// P kept in bf16, and 1 taken off at the label in bf16.
    pub p_minus_one_bf16: bool,
    /// g·q rounded to bf16 before the product for dK.
    pub gq_bf16: bool,
    /// Entries of dlogits from this vocab id on are 0 in the backward.
    pub vocab_end: Option<usize>,
    /// Entries of dlogits of the tokens after the last whole tile of so many are 0 in the backward.
    pub token_tile: Option<usize>,
    /// Only this shard's vocab ids contribute to dQ.
    pub dq_shard: Option<(Split, usize)>,
    /// Only this shard's tokens contribute to dK.
    pub dk_shard: Option<(Split, usize)>,
    /// Constant factors.
    pub dq_factor: f64,
    /// See `dq_factor`.
    pub dk_factor: f64,
    /// dQ as if every g were 1.
    pub dq_without_g: bool,
    /// dK as if every g were 1.
    pub dk_without_g: bool,
    /// dQ accumulated in bf16 over vocab tiles.
    pub dq_sum: Option<Bf16Sum>,
    /// dK accumulated in bf16 over token chunks.
    pub dk_sum: Option<Bf16Sum>,
    /// The label part of dK.
    pub label_sum: LabelSum,
    /// Exponentials and logarithms.
    pub approximation: Approximation,
    /// Tiles that the backward skips.
    pub filter: Option<Filter>,
    /// dK summed by process.
    pub dk_processes: Option<ProcessSum>,
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
    /// Whether a microbatch's share is rounded before it is added.
    pub microbatches_rounded: bool,
}

impl Default for Counterfactual {
    fn default() -> Self {
        Self {
            forward_logits: Precision::F64,
            backward_logits: Precision::F64,
            label_logit: LabelLogit::Exact,
            loss_subtract_bf16: false,
            padding_in_lse: 0,
            lse_misses: None,
            lse_rounded: LseRounded::Nowhere,
            local_lse: None,
            padding: Padding::TakesNoPart,
            label: LabelPlace::Right,
            label_counts: [1.0; 2],
            masked: MaskedTokens::TakeNoPart,
            token_factor: TokenFactor::Right,
            no_softcap_derivative: (false, false),
            no_z_loss_gradient: false,
            no_label_smoothing: false,
            scale: ScaleInBackward::Right,
            dlogits: Precision::F64,
            label_in_dlogits: false,
            p_minus_one_bf16: false,
            gq_bf16: false,
            vocab_end: None,
            token_tile: None,
            dq_shard: None,
            dk_shard: None,
            dq_factor: 1.0,
            dk_factor: 1.0,
            dq_without_g: false,
            dk_without_g: false,
            dq_sum: None,
            dk_sum: None,
            label_sum: LabelSum::Exact,
            approximation: Approximation::None,
            filter: None,
            dk_processes: None,
            dk_parts_bf16: false,
            mean_over_all_tokens: false,
            mean_of_means: false,
            accumulated_factor: 1.0,
            last_microbatch_only: false,
            microbatches_bf16: false,
            microbatches_rounded: false,
        }
    }
}

pub(super) fn bf16(x: f64) -> f64 {
    Precision::Bf16.round(x)
}

impl Counterfactual {
    /// Adds microbatch `m`'s own dK, [V, D], to the step's accumulated one; microbatches come in order.
    pub fn accumulate(&self, step: &Step, m: usize, own: &Array2<f64>, total: &mut Array2<f64>) {
        let factor = step.accumulation_factor() * self.accumulated_factor;
        if self.last_microbatch_only {
            total.assign(&(own * factor));
        } else if self.microbatches_bf16 && m > 0 {
            let part = |own: f64| if self.microbatches_rounded { bf16(own * factor) } else { own * factor };
            total.zip_mut_with(own, |total, &own| *total = bf16(*total + part(own)));
        } else {
            total.scaled_add(factor, own);
        }
        if self.microbatches_bf16 {
            total.mapv_inplace(bf16);
        }
    }

    /// The cotangents of lse and of the label logits in microbatch `m`, whose lse is given, where a loss is made of these.
    pub fn recorded_cotangents(&self, step: &Step, m: usize, lse: &[f64]) -> [Vec<f32>; 2] {
        let problem = &step.microbatches[m].problem;
        let g = self.cotangents(problem, self.own_factor(step, m));
        let z_loss = if self.no_z_loss_gradient { 0.0 } else { problem.options().z_loss };
        let smoothing = if self.no_label_smoothing { 0.0 } else { problem.options().label_smoothing };
        let of_lse = g.iter().zip(lse).map(|(g, lse)| (g * (1.0 + 2.0 * z_loss * lse)) as f32).collect();
        [of_lse, g.iter().map(|g| (-g * (1.0 - smoothing)) as f32).collect()]
    }

    pub(super) fn own_factor(&self, step: &Step, m: usize) -> f64 {
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
    pub(super) fn cotangents(&self, problem: &Problem, factor: f64) -> Vec<f64> {
        let weight = |n: usize| match (problem.labels()[n], self.masked) {
            (Label::Masked, MaskedTokens::TakeNoPart) => 0.0,
            (Label::Masked, _) => 1.0,
            _ if self.token_factor == TokenFactor::Unweighted => 1.0,
            _ if self.token_factor == TokenFactor::First => f64::from(problem.weights()[0]),
            _ => f64::from(problem.weights()[n]),
        };
        (0..problem.shape().tokens).map(|n| factor * weight(n)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_in_the_range_of_its_shard() {
        for (of, shards) in (1..40).flat_map(|of| (1..=of).map(move |shards| (of, shards))) {
            for split in [false, true].map(|even| Split { shards, even }) {
                for row in 0..of {
                    assert!(split.range(split.shard_of(row, of), of).contains(&row), "row {row} of {of}, {split:?}");
                }
                let rows: usize = (0..shards).map(|shard| split.range(shard, of).len()).sum();
                assert_eq!(rows, of, "{split:?}");
                assert!(split.range(shards + 3, of).is_empty());
            }
        }
    }
}
