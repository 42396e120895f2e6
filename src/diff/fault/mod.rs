//! The fault catalogue: every fault that can be planted by `synth` and named by the diff, with its parameters.

mod catalogue;
mod parameters;

pub use catalogue::{CATALOGUE, Entry, told_apart_by};

use super::replay::{
    Approximation, Bf16Sum, Chunks, Counterfactual, Filter, LabelLogit, LabelPlace, LabelSum, LseRounded, MaskedTokens, Padding,
    ProcessSum, ScaleInBackward, ScatterOnto, Split, TokenFactor,
};
use super::step::Step;
use super::truth::Stage;
use fused_xent_kernels::contract::{LabelTerm, Precision};

/// A fault of the catalogue, with its parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs, reason = "each is described in CATALOGUE, under its slug")]
pub enum Fault {
    LabelLogitBf16(LabelLogit),
    LossSubtractBf16,
    LseBf16(LseRounded),
    LabelScatterBf16 { hits_rounded: bool, onto: ScatterOnto },
    LabelScatterBf16OverProcesses { hits_rounded: bool, onto: ScatterOnto, over: ProcessSum },
    LabelGradRounded,
    DkPartsRounded,
    GqBf16,
    DlogitsBf16 { label: LabelTerm },
    LogitsBf16Forward,
    LogitsBf16Backward,
    LogitsBf16Both,
    DkAccumulateBf16(Bf16Sum),
    DkAccumulateBf16OverProcesses { sum: Bf16Sum, over: ProcessSum },
    DkAccumulateBf16OverMicrobatches { parts_rounded: bool },
    DqAccumulateBf16(Bf16Sum),
    ProbMinusOneBf16,
    GradientFilter(Filter),
    ApproximateExpLog(Approximation),
    VocabPadUnmasked { pad: usize },
    VocabTailDropped { tile: usize },
    TokenTailDropped { tile: usize },
    LseTileMissing { tile: usize, index: usize },
    LabelTileEdge { tile: usize },
    LabelTileEdgeLast { tile: usize },
    LabelOffByOne { left: bool, wraps: bool },
    LabelMissing,
    IgnoredLeak { label_zero: bool },
    IgnoredLeakUnlabelled,
    ValidVocabIgnored(Padding),
    DqCotangentMissing { factor: f64 },
    DkCotangentMissing { factor: f64 },
    DqCotangentMissingAll,
    DkCotangentMissingAll,
    MeanOverAllTokens,
    MeanOfMeans,
    NotAveraged { factor: f64 },
    NotAveragedOverMicrobatches { factor: f64 },
    LastMicrobatchOnly,
    LastMicrobatchOnlyUndivided,
    FirstCotangentForAll,
    TokenWeightsIgnored,
    SoftcapDerivativeMissing,
    SoftcapDerivativeMissingLabel,
    ZlossGradientMissing,
    LabelSmoothingIgnored,
    LogitScaleIgnored(ScaleInBackward),
    DqNotReduced { split: Split, shard: usize },
    DkNotReduced { split: Split, shard: usize },
    LocalLse(Split),
    LabelPerShard { shards: usize, of: Gradients },
}

/// Which of the gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gradients {
    /// dQ alone.
    Dq,
    /// dK alone.
    Dk,
    /// Both.
    Both,
}

/// The parts of a step that a fault can change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touches {
    /// Loss, lse or label logits.
    pub forward: bool,
    /// dQ.
    pub d_hidden: bool,
    /// dK of a microbatch.
    pub d_unembedding: bool,
    /// The accumulated dK.
    pub accumulated: bool,
}

impl Touches {
    /// Everything.
    pub const ALL: Self = Self { forward: true, d_hidden: true, d_unembedding: true, accumulated: true };

    /// Whether it can change that stage.
    pub fn stage(self, stage: Stage) -> bool {
        match stage {
            Stage::Loss | Stage::Lse | Stage::LabelLogits => self.forward,
            Stage::DHidden | Stage::DHiddenLse | Stage::DHiddenLabel => self.d_hidden,
            Stage::DUnembedding | Stage::DUnembeddingLse | Stage::DUnembeddingLabel => self.d_unembedding,
            Stage::AccumulatedDUnembedding => self.accumulated,
        }
    }
}

impl Fault {
    /// What the catalogue says of it.
    pub fn entry(&self) -> &'static Entry {
        let kind = match *self {
            Fault::LabelScatterBf16OverProcesses { hits_rounded, onto, .. } => Fault::LabelScatterBf16 { hits_rounded, onto },
            Fault::DkAccumulateBf16OverMicrobatches { parts_rounded } => {
                Fault::DkAccumulateBf16(Bf16Sum { chunks: Chunks::Number(1), parts_rounded })
            }
            Fault::DkAccumulateBf16OverProcesses { sum, .. } => Fault::DkAccumulateBf16(sum),
            Fault::LabelTileEdgeLast { tile } => Fault::LabelTileEdge { tile },
            Fault::IgnoredLeakUnlabelled => Fault::IgnoredLeak { label_zero: false },
            Fault::DqCotangentMissingAll => Fault::DqCotangentMissing { factor: 1.0 },
            Fault::DkCotangentMissingAll => Fault::DkCotangentMissing { factor: 1.0 },
            Fault::NotAveragedOverMicrobatches { factor } => Fault::NotAveraged { factor },
            Fault::LastMicrobatchOnlyUndivided => Fault::LastMicrobatchOnly,
            other => other,
        };
        CATALOGUE
            .iter()
            .find(|e| std::mem::discriminant(&e.example) == std::mem::discriminant(&kind))
            .expect("every fault is in the catalogue")
    }

    /// Its name.
    pub fn slug(&self) -> &'static str {
        self.entry().slug
    }

    /// Whether a more specific fault may make the same: it is no more than a factor, or follows what was recorded.
    pub fn is_generic(&self) -> bool {
        matches!(
            self,
            Fault::NotAveraged { .. }
                | Fault::NotAveragedOverMicrobatches { .. }
                | Fault::DqCotangentMissing { .. }
                | Fault::DkCotangentMissing { .. }
                | Fault::ApproximateExpLog(Approximation::AsRecorded | Approximation::Significand(_))
        )
    }

    /// What it can change. A part that is not named stays exact.
    pub fn touches(&self) -> Touches {
        let [forward, d_hidden, d_unembedding] = match self {
            Fault::LabelLogitBf16(_) | Fault::LossSubtractBf16 => [true, false, false],
            Fault::LseBf16(rounded) => [*rounded >= LseRounded::Output, true, true],
            Fault::ValidVocabIgnored(padding) => [*padding == Padding::InBoth, true, true],
            Fault::LogitsBf16Forward
            | Fault::LogitsBf16Both
            | Fault::VocabPadUnmasked { .. }
            | Fault::LseTileMissing { .. }
            | Fault::ApproximateExpLog(_) => [true, true, true],
            Fault::LabelScatterBf16 { .. }
            | Fault::LabelScatterBf16OverProcesses { .. }
            | Fault::DkAccumulateBf16OverProcesses { .. }
            | Fault::DkCotangentMissingAll
            | Fault::LabelGradRounded
            | Fault::DkPartsRounded
            | Fault::GqBf16
            | Fault::DkAccumulateBf16(_)
            | Fault::LabelPerShard { of: Gradients::Dk, .. }
            | Fault::DkCotangentMissing { .. }
            | Fault::DkNotReduced { .. } => [false, false, true],
            Fault::DqAccumulateBf16(_)
            | Fault::LabelPerShard { of: Gradients::Dq, .. }
            | Fault::DqCotangentMissing { .. }
            | Fault::DqCotangentMissingAll
            | Fault::DqNotReduced { .. } => [false, true, false],
            Fault::DkAccumulateBf16OverMicrobatches { .. }
            | Fault::NotAveragedOverMicrobatches { .. }
            | Fault::LastMicrobatchOnly
            | Fault::LastMicrobatchOnlyUndivided => [false, false, false],
            _ => [false, true, true],
        };
        let over_step = !(forward || d_hidden || d_unembedding);
        Touches { forward, d_hidden, d_unembedding, accumulated: d_unembedding || over_step }
    }

    /// Builds the fault into a computation on `step`.
    pub fn apply(&self, to: &mut Counterfactual, step: &Step) {
        let first = step.microbatches.first();
        let (vocab, valid) = first.map_or((1, 1), |m| (m.problem.shape().vocab, m.problem.valid_columns()));
        match *self {
            Fault::LabelLogitBf16(label_logit) => to.label_logit = label_logit,
            Fault::LossSubtractBf16 => to.loss_subtract_bf16 = true,
            Fault::LseBf16(rounded) => to.lse_rounded = rounded,
            Fault::LabelScatterBf16 { hits_rounded, onto } => to.label_sum = LabelSum::Bf16 { hits_rounded, onto },
            Fault::LabelScatterBf16OverProcesses { hits_rounded, onto, over } => {
                (to.label_sum, to.dk_processes) = (LabelSum::Bf16 { hits_rounded, onto }, Some(over));
            }
            Fault::LabelGradRounded => to.label_sum = LabelSum::EachRounded,
            Fault::DkPartsRounded => to.dk_parts_bf16 = true,
            Fault::GqBf16 => to.gq_bf16 = true,
            Fault::DlogitsBf16 { label } => {
                (to.dlogits, to.label_in_dlogits) = (Precision::Bf16, label == LabelTerm::Joint);
            }
            Fault::LogitsBf16Forward => to.forward_logits = Precision::Bf16,
            Fault::LogitsBf16Backward => to.backward_logits = Precision::Bf16,
            Fault::LogitsBf16Both => (to.forward_logits, to.backward_logits) = (Precision::Bf16, Precision::Bf16),
            Fault::DkAccumulateBf16(sum) => to.dk_sum = Some(sum),
            Fault::DkAccumulateBf16OverProcesses { sum, over } => (to.dk_sum, to.dk_processes) = (Some(sum), Some(over)),
            Fault::DqAccumulateBf16(sum) => to.dq_sum = Some(sum),
            Fault::GradientFilter(filter) => to.filter = Some(filter),
            Fault::ApproximateExpLog(approximation) => to.approximation = approximation,
            Fault::DkAccumulateBf16OverMicrobatches { parts_rounded } => {
                (to.microbatches_bf16, to.microbatches_rounded) = (true, parts_rounded);
            }
            Fault::ProbMinusOneBf16 => to.p_minus_one_bf16 = true,
            Fault::VocabPadUnmasked { pad } => to.padding_in_lse = pad,
            Fault::VocabTailDropped { tile } => to.vocab_end = Some(vocab / tile * tile),
            Fault::TokenTailDropped { tile } => to.token_tile = Some(tile),
            Fault::LseTileMissing { tile, index } => to.lse_misses = Some((index * tile, ((index + 1) * tile).min(valid))),
            Fault::LabelTileEdge { tile } => to.label = LabelPlace::MissingOnTileEdge { tile, last: false },
            Fault::LabelTileEdgeLast { tile } => to.label = LabelPlace::MissingOnTileEdge { tile, last: true },
            Fault::LabelOffByOne { left, wraps } => to.label = LabelPlace::Beside { left, wraps },
            Fault::LabelMissing => to.label = LabelPlace::Missing,
            Fault::IgnoredLeak { label_zero } => {
                to.masked = if label_zero { MaskedTokens::WithLabelZero } else { MaskedTokens::WithStoredLabel };
            }
            Fault::IgnoredLeakUnlabelled => to.masked = MaskedTokens::WithoutLabel,
            Fault::ValidVocabIgnored(padding) => to.padding = padding,
            Fault::DqCotangentMissing { factor } => to.dq_factor *= factor,
            Fault::DkCotangentMissing { factor } => to.dk_factor *= factor,
            Fault::DqCotangentMissingAll => to.dq_without_g = true,
            Fault::DkCotangentMissingAll => to.dk_without_g = true,
            Fault::MeanOverAllTokens => to.mean_over_all_tokens = true,
            Fault::MeanOfMeans => to.mean_of_means = true,
            Fault::NotAveraged { factor } => {
                to.dq_factor *= factor;
                to.dk_factor *= factor;
            }
            Fault::NotAveragedOverMicrobatches { factor } => to.accumulated_factor *= factor,
            Fault::LastMicrobatchOnly => to.last_microbatch_only = true,
            Fault::LastMicrobatchOnlyUndivided => {
                to.last_microbatch_only = true;
                to.accumulated_factor /= step.accumulation_factor();
            }
            Fault::FirstCotangentForAll => to.token_factor = TokenFactor::First,
            Fault::TokenWeightsIgnored => to.token_factor = TokenFactor::Unweighted,
            Fault::SoftcapDerivativeMissing => to.no_softcap_derivative = (true, true),
            Fault::SoftcapDerivativeMissingLabel => to.no_softcap_derivative.1 = true,
            Fault::ZlossGradientMissing => to.no_z_loss_gradient = true,
            Fault::LabelSmoothingIgnored => to.no_label_smoothing = true,
            Fault::LogitScaleIgnored(scale) => to.scale = scale,
            Fault::DqNotReduced { split, shard } => to.dq_shard = Some((split, shard)),
            Fault::DkNotReduced { split, shard } => to.dk_shard = Some((split, shard)),
            Fault::LocalLse(split) => to.local_lse = Some(split),
            Fault::LabelPerShard { shards, of } => {
                let counts = |here: bool| if here { shards as f64 } else { 1.0 };
                to.label_counts = [counts(of != Gradients::Dk), counts(of != Gradients::Dq)];
            }
        }
    }
}
