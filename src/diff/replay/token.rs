//! One token of a replay: what its logits come to, and its row of dlogits.

use super::approximate::{Approximation, Exp};
use super::counterfactual::{
    Counterfactual, Filter, LabelLogit, LabelPlace, LseRounded, MaskedTokens, Padding, ScaleInBackward, bf16,
};
use crate::diff::step::{Microbatch, Step};
use fused_xent_kernels::contract::Precision;
use fused_xent_kernels::problem::{Label, LossOptions, Problem};
use fused_xent_kernels::reference;
use ndarray::{Array2, ArrayView1, s};
use std::borrow::Cow;
use std::ops::Range;

/// A number that a token's results are made of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Reading {
    /// Vocab ids [start, end).
    pub ids: (usize, usize),
    /// What the logits are rounded to.
    pub logits: Precision,
    pub of: Of,
}

/// What is read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Of {
    /// The largest logit.
    Max,
    /// log Σ exp z; exponentials that are not exact are taken of z less the largest logit.
    LogSumExp(Exp),
    /// log Σ exp of the logits as they were without a scale.
    Unscaled(Unscaled),
    /// The lse that was recorded.
    Recorded,
}

/// From a logit to the one without its scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Unscaled {
    scale: f64,
    cap: Option<f64>,
}

impl Unscaled {
    fn of(self, z: f64) -> f64 {
        match self.cap {
            None => z / self.scale,
            Some(cap) => cap * ((z / cap).atanh() / self.scale).tanh(),
        }
    }
}

/// Log-sum-exps of every token, [N] each; NaN where one is not known.
pub(super) type Known = Vec<(Reading, Vec<f64>)>;

impl Reading {
    /// It, of these logits; `max` is the largest of the whole.
    pub fn of_logits(self, z: ArrayView1<f64>, max: impl Fn() -> f64) -> f64 {
        let z = z.iter().map(|&z| self.logits.round(z));
        match self.of {
            Of::Max => z.fold(f64::NEG_INFINITY, f64::max),
            Of::LogSumExp(Exp::Exact) => reference::log_sum_exp(z),
            Of::Unscaled(unscaled) => reference::log_sum_exp(z.map(|z| unscaled.of(z))),
            Of::LogSumExp(exp) => {
                let max = max();
                max + z.map(|z| exp.of(z - max)).sum::<f64>().ln()
            }
            Of::Recorded => f64::NAN,
        }
    }
}

/// The logits of one token, as far as they are at hand.
#[derive(Clone, Copy)]
pub(super) struct TokenLogits<'a> {
    pub n: usize,
    /// All V; without them, only what is known and what is asked for one by one.
    pub row: Option<ArrayView1<'a, f64>>,
    /// What is known of every token.
    pub known: &'a [(Reading, Vec<f64>)],
}

impl TokenLogits<'_> {
    fn logit(&self, problem: &Problem, id: usize) -> f64 {
        self.row.map_or_else(|| logits(problem, self.n..self.n + 1, id..id + 1)[[0, 0]], |row| row[id])
    }
}

/// z of some tokens and vocab ids, padding ones too.
pub(super) fn logits(problem: &Problem, tokens: Range<usize>, ids: Range<usize>) -> Array2<f64> {
    reference::logit_tile(problem, &reference::hidden_rows(problem, tokens), ids)
}

/// The label's share of a token's dlogits.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct TokenLabel {
    pub column: Option<usize>,
    pub value: f64,
}

/// One token as the backward sees it.
#[derive(Clone, Debug)]
pub(super) struct Token {
    pub g: f64,
    takes_part: bool,
    /// What multiplies P, and what is added in every column.
    p_factor: f64,
    constant: f64,
    /// lse of each vocab shard, one unless they differ.
    lses: Vec<f64>,
    pub label: TokenLabel,
    /// The label's term where dlogits have it in.
    joint: f64,
}

impl Token {
    /// Its lse in the backward.
    pub fn lse(&self) -> f64 {
        self.lses.first().copied().unwrap_or(0.0)
    }
}

/// What the forward gives for one token.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct TokenForward {
    pub loss: f64,
    pub lse: f64,
    pub label_logit: f64,
}

/// One microbatch as a counterfactual computes it.
pub(super) struct Replay<'a> {
    pub how: &'a Counterfactual,
    pub problem: &'a Problem<'a>,
    targets: &'a [i64],
    recorded_lse: Option<&'a Vec<f64>>,
    /// g of every token.
    g: Vec<f64>,
    /// Columns that take part in the forward, and in the backward.
    forward_valid: usize,
    valid: usize,
    /// Tokens that take part in the backward come before it.
    token_end: usize,
    options: LossOptions,
}

impl<'a> Replay<'a> {
    pub fn new(how: &'a Counterfactual, step: &'a Step, m: usize) -> Self {
        let Microbatch { problem, targets, recorded_lse, .. } = &step.microbatches[m];
        let g = how.cotangents(problem, how.own_factor(step, m));
        let (shape, columns) = (problem.shape(), problem.valid_columns());
        let valid = if how.padding == Padding::TakesNoPart { columns } else { shape.vocab };
        let forward_valid = if how.padding == Padding::InBoth { shape.vocab } else { columns };
        let token_end = how.token_tile.map_or(shape.tokens, |tile| shape.tokens / tile * tile);
        let (recorded_lse, options) = (recorded_lse.as_ref(), *problem.options());
        Self { how, problem, targets, recorded_lse, g, forward_valid, valid, token_end, options }
    }

    fn read(&self, logits: TokenLogits, reading: Reading) -> f64 {
        let known = logits.known.iter().find(|(known, _)| *known == reading).map(|(_, lse)| lse[logits.n]);
        match (known, logits.row) {
            (Some(known), _) if !known.is_nan() => known,
            (_, Some(row)) => {
                let max = || self.read(logits, Reading { of: Of::Max, ids: (0, self.valid), ..reading });
                reading.of_logits(row.slice(s![reading.ids.0..reading.ids.1]), max)
            }
            _ => f64::NAN,
        }
    }

    /// What is known of every token without a look at its logits.
    pub fn recorded(&self) -> Known {
        let reading = Reading { ids: (0, self.forward_valid), logits: Precision::F64, of: Of::Recorded };
        self.recorded_lse.map(|lse| (reading, lse.clone())).into_iter().collect()
    }

    /// What multiplies a token's Σ_v exp(z_v − lse)·slope·K_v, where the lse part of its dQ is no more than that.
    pub fn scale_of_p(&self, token: &Token, lse: f64) -> Option<f64> {
        let how = self.how;
        let plain = Counterfactual {
            dlogits: how.dlogits,
            p_minus_one_bf16: how.p_minus_one_bf16,
            backward_logits: how.backward_logits,
            scale: how.scale,
            no_softcap_derivative: (how.no_softcap_derivative.0, false),
            local_lse: how.local_lse,
            padding: how.padding,
            vocab_end: how.vocab_end,
            dq_shard: how.dq_shard,
            dq_sum: how.dq_sum,
            filter: how.filter,
            ..Counterfactual::default()
        } == Counterfactual::default();
        let exact = how.approximation.backward() == Exp::Exact && self.options.label_smoothing == 0.0;
        let factor = || if token.takes_part { token.p_factor * (lse - token.lses[0]).exp() } else { 0.0 };
        (plain && exact).then(factor)
    }

    /// Whether masked tokens get a gradient, or say who does.
    pub fn masked_take_part(&self) -> bool {
        self.how.masked != MaskedTokens::TakeNoPart || self.how.filter.is_some_and(|filter| filter.masked_count)
    }

    /// The log-sum-exps that a token's results are made of.
    pub fn readings(&self) -> Vec<Reading> {
        let mut readings = self.forward_readings();
        readings.extend(self.backward_readings());
        readings
    }

    fn forward_readings(&self) -> Vec<Reading> {
        let of = |ids: (usize, usize), of: Of| Reading { ids, logits: self.how.forward_logits, of };
        if self.how.approximation.lse_as_recorded() {
            return vec![Reading { ids: (0, self.forward_valid), logits: Precision::F64, of: Of::Recorded }];
        }
        let (valid, exp) = (self.forward_valid, Of::LogSumExp(self.how.approximation.forward()));
        let mut readings = match self.how.lse_misses {
            None => vec![of((0, valid), exp)],
            Some((start, end)) => vec![of((0, start.min(valid)), exp), of((end.min(valid), valid), exp)],
        };
        readings.retain(|reading| reading.ids.0 < reading.ids.1);
        if self.how.approximation != Approximation::None {
            readings.push(of((0, valid), Of::Max));
        }
        readings
    }

    /// Those that the backward has in place of the forward's lse: its own, or that of each vocab shard.
    fn backward_readings(&self) -> Vec<Reading> {
        let reading = |(start, end): (usize, usize), of: Of| Reading { ids: (start, end), logits: Precision::F64, of };
        if self.how.scale == ScaleInBackward::OneInLseToo {
            return vec![reading((0, self.valid), Of::Unscaled(self.unscaled()))];
        }
        let ends = |range: Range<usize>| (range.start, range.end.min(self.valid));
        let shards = self.how.local_lse.into_iter().flat_map(|split| {
            let shard = move |shard| ends(split.range(shard, self.problem.shape().vocab));
            (0..split.shards).map(shard).filter(|(start, end)| start < end)
        });
        shards.map(|ids| reading(ids, Of::LogSumExp(Exp::Exact))).collect()
    }

    fn unscaled(&self) -> Unscaled {
        Unscaled { scale: self.options.logit_scale, cap: self.options.logit_softcap }
    }

    /// lse as the forward computes it.
    pub fn lse(&self, logits: TokenLogits) -> f64 {
        let readings = self.forward_readings();
        let (max, parts): (Vec<Reading>, Vec<Reading>) = readings.into_iter().partition(|reading| reading.of == Of::Max);
        let padding = (self.how.padding_in_lse > 0).then(|| (self.how.padding_in_lse as f64).ln());
        let parts: Vec<f64> = parts.into_iter().map(|reading| self.read(logits, reading)).chain(padding).collect();
        match max.first().map(|max| self.read(logits, *max)) {
            None => reference::log_sum_exp(parts.into_iter()),
            Some(max) => max + self.how.approximation.log(parts.into_iter().map(|part| (part - max).exp()).sum()),
        }
    }

    /// The label that a token counts with.
    fn label(&self, n: usize) -> Option<usize> {
        match (self.problem.labels()[n], self.how.masked) {
            (Label::Column(label), _) => Some(label as usize),
            (_, MaskedTokens::WithStoredLabel) => usize::try_from(self.targets[n]).ok().filter(|&t| t < self.valid),
            (_, MaskedTokens::WithLabelZero) => Some(0),
            _ => None,
        }
    }

    /// Needs all of the token's logits; 0 where it is masked.
    pub fn forward(&self, logits: TokenLogits) -> TokenForward {
        let n = logits.n;
        let (Some(label), Some(z)) = (self.problem.labels()[n].column(), logits.row) else { return TokenForward::default() };
        let LossOptions { z_loss, label_smoothing, .. } = self.options;
        let lse = self.lse(logits);
        let label_logit = self.label_logit(n, label, z[label]);
        let label_logit = match self.how.label_logit {
            LabelLogit::Exact => self.how.forward_logits.round(label_logit),
            _ => bf16(label_logit),
        };
        let mean = || z.iter().take(self.forward_valid).sum::<f64>() / self.forward_valid as f64;
        let smoothed = if label_smoothing > 0.0 { label_smoothing * mean() } else { 0.0 };
        let of_loss = self.lse_for(LseRounded::Loss, lse);
        let loss = if self.how.loss_subtract_bf16 {
            bf16(bf16(of_loss) - bf16(label_logit))
        } else {
            of_loss - (1.0 - label_smoothing) * label_logit - smoothed + z_loss * of_loss * of_loss
        };
        TokenForward { loss, lse: self.lse_for(LseRounded::Output, lse), label_logit }
    }

    /// The label logit as it is summed, before it is rounded; `z` is the exact one.
    pub fn label_logit(&self, n: usize, label: usize, z: f64) -> f64 {
        let sum = |add: fn(f64, f64) -> f64| {
            let q = reference::hidden_rows(self.problem, n..n + 1);
            let k = reference::unembedding_rows(self.problem, label..label + 1);
            let z = self.options.logit_scale * q.iter().zip(&k).fold(0.0, |sum, (q, k)| add(sum, q * k));
            self.options.logit_softcap.map_or(z, |cap| cap * (z / cap).tanh())
        };
        match self.how.label_logit {
            LabelLogit::Exact | LabelLogit::Rounded => z,
            LabelLogit::OfRoundedProducts => sum(|sum, product| sum + bf16(product)),
            LabelLogit::RunningSum { products_rounded: true } => sum(|sum, product| bf16(sum + bf16(product))),
            LabelLogit::RunningSum { products_rounded: false } => sum(|sum, product| bf16(sum + product)),
        }
    }

    /// lse as `reader` gets it.
    fn lse_for(&self, reader: LseRounded, lse: f64) -> f64 {
        if self.how.lse_rounded >= reader { bf16(lse) } else { lse }
    }

    /// What the backward makes of a token.
    pub fn token(&self, logits: TokenLogits) -> Token {
        let (how, n) = (self.how, logits.n);
        let g = self.g[n];
        let takes_part = g != 0.0 && n < self.token_end;
        let lses = || {
            let own: Vec<f64> = self.backward_readings().into_iter().map(|reading| self.read(logits, reading)).collect();
            if own.is_empty() { vec![self.lse_for(LseRounded::Backward, self.lse(logits))] } else { own }
        };
        if !takes_part {
            // A filter may look at it all the same.
            let lses = if g == 0.0 && how.filter.is_some_and(|filter| filter.masked_count) { lses() } else { vec![] };
            return Token { g, takes_part, p_factor: 0.0, lses, ..self.token_of_one(0.0) };
        }
        let lses = lses();
        let lse = match how.local_lse {
            None => lses[0],
            Some(_) => self.lse(logits),
        };
        let smoothing = if how.no_label_smoothing { 0.0 } else { self.options.label_smoothing };
        let z_loss = if how.no_z_loss_gradient { 0.0 } else { self.options.z_loss };
        let place = self.label(n).and_then(|label| match how.label {
            LabelPlace::Missing => None,
            LabelPlace::Beside { left: false, wraps } => {
                Some(label + 1).filter(|&column| column < self.valid).or(wraps.then_some(0))
            }
            LabelPlace::Beside { left: true, wraps } => label.checked_sub(1).or(wraps.then_some(self.valid - 1)),
            LabelPlace::MissingOnTileEdge { tile, last } if (label + usize::from(last)).is_multiple_of(tile) => None,
            _ => Some(label),
        });
        let column = place.filter(|&c| how.vocab_end.is_none_or(|end| c < end));
        let value = |c: usize| {
            let z = if self.options.logit_softcap.is_some() { logits.logit(self.problem, c) } else { 0.0 };
            -g * (1.0 - smoothing) * self.slope(z, how.no_softcap_derivative.1)
        };
        // Where 1 is taken off P, or dlogits have it in, the label has no term of its own.
        let value = column.filter(|_| !how.p_minus_one_bf16).map_or(0.0, value);
        let (joint, apart) = if how.label_in_dlogits { (value, 0.0) } else { (0.0, value) };
        let label = TokenLabel { column, value: apart };
        let p_factor = g * (1.0 + 2.0 * z_loss * lse);
        let constant = -g * smoothing / self.valid as f64;
        Token { g, takes_part, p_factor, constant, lses, label, joint }
    }

    /// dlogits at vocab id `v` of logit `z`, but for P: what multiplies it, and what is added.
    pub fn around_p(&self, token: &Token, z: f64) -> (f64, f64) {
        let slope = self.slope(z, false);
        (token.p_factor * slope, token.constant * slope)
    }

    /// How many of the vocab ids from `start` on take part.
    pub fn valid_from(&self, start: usize) -> usize {
        self.valid.saturating_sub(start)
    }

    /// A token without a label, whose P counts once.
    pub fn token_of_one(&self, lse: f64) -> Token {
        let (lses, label) = (vec![lse], TokenLabel::default());
        Token { g: 1.0, takes_part: true, p_factor: 1.0, constant: 0.0, lses, label, joint: 0.0 }
    }

    /// A token as a filter sees it, and its |g|: one that takes no part may count with its P all the same.
    pub fn seen_by<'t>(&self, filter: Filter, token: &'t Token) -> (Cow<'t, Token>, f64) {
        if token.g != 0.0 || !filter.masked_count {
            return (Cow::Borrowed(token), token.g.abs());
        }
        (Cow::Owned(Token { lses: token.lses.clone(), ..self.token_of_one(0.0) }), 1.0)
    }

    /// ∂z/∂(Q·Kᵀ) at logit `z`.
    fn slope(&self, z: f64, without_cap: bool) -> f64 {
        let scale = if self.how.scale == ScaleInBackward::Right { self.options.logit_scale } else { 1.0 };
        match self.options.logit_softcap {
            Some(cap) if !without_cap => scale * (1.0 - (z / cap).powi(2)),
            _ => scale,
        }
    }

    /// The logit that the backward takes for `z`.
    fn backward_logit(&self, z: f64) -> f64 {
        let z = match self.how.scale {
            ScaleInBackward::One | ScaleInBackward::OneInLseToo => self.unscaled().of(z),
            ScaleInBackward::Right | ScaleInBackward::NoFactor => z,
        };
        self.how.backward_logits.round(z)
    }

    /// Where dlogits end: beyond this vocab id they are 0.
    fn end(&self) -> usize {
        self.how.vocab_end.map_or(self.valid, |end| end.min(self.valid))
    }

    /// dlogits at vocab id `v` of logit `z`, the label's term apart, before any tile is skipped.
    pub fn dlogits(&self, token: &Token, v: usize, z: f64) -> f64 {
        self.p(token, v, z).map_or(0.0, |(z, p)| self.dlogits_of(token, v, z, p))
    }

    /// The logit that the backward takes for `z`, and its P; `None` where dlogits are 0.
    pub fn p(&self, token: &Token, v: usize, z: f64) -> Option<(f64, f64)> {
        if !token.takes_part || v >= self.end() {
            return None;
        }
        let z = self.backward_logit(z);
        let shard = self.how.local_lse.map_or(0, |split| split.shard_of(v, self.problem.shape().vocab));
        Some((z, self.how.approximation.backward().of(z - token.lses[shard])))
    }

    /// dlogits where P is `p`.
    pub fn dlogits_of(&self, token: &Token, v: usize, z: f64, p: f64) -> f64 {
        let how = self.how;
        let (lse_slope, label_slope) = (self.slope(z, how.no_softcap_derivative.0), self.slope(z, how.no_softcap_derivative.1));
        if !how.p_minus_one_bf16 {
            let label = if token.label.column == Some(v) { token.joint } else { 0.0 };
            return how.dlogits.round(token.p_factor * p * lse_slope + token.constant * label_slope + label);
        }
        let p = if token.label.column == Some(v) {
            let smoothing = if how.no_label_smoothing { 0.0 } else { self.options.label_smoothing };
            bf16(bf16(p) - (1.0 - smoothing))
        } else {
            bf16(p)
        };
        (token.p_factor * p + token.constant) * lse_slope
    }
}
