//! The fault catalogue: every fault that can be planted by `synth` and named by the diff, with its parameters.

use super::error::DiffError;
use super::replay::{Bf16Sum, Counterfactual, LabelPlace, LabelSum, MaskedTokens, ScaleInBackward, ScatterOnto, TokenFactor};
use super::step::Step;
use super::truth::Stage;
use fused_xent_kernels::contract::Precision;
use serde_json::{Map, Value};

/// A fault of the catalogue, with its parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs, reason = "each is described in CATALOGUE, under its slug")]
pub enum Fault {
    LabelLogitBf16,
    LossSubtractBf16,
    LseBf16,
    LabelScatterBf16 { hits_rounded: bool, onto: ScatterOnto },
    LabelGradRounded,
    DkPartsRounded,
    GqBf16,
    DlogitsBf16,
    LogitsBf16Forward,
    LogitsBf16Backward,
    LogitsBf16Both,
    DkAccumulateBf16 { chunks: usize, parts_rounded: bool },
    DkAccumulateBf16OverMicrobatches,
    DqAccumulateBf16 { tiles: usize, parts_rounded: bool },
    ProbMinusOneBf16,
    VocabPadUnmasked { pad: usize },
    VocabTailDropped { tile: usize },
    TokenTailDropped { tile: usize },
    LseTileMissing { tile: usize, index: usize },
    LabelTileEdge { tile: usize },
    LabelOffByOne,
    LabelMissing,
    IgnoredLeak { label_zero: bool },
    ValidVocabIgnored,
    DqCotangentMissing { factor: f64 },
    DkCotangentMissing { factor: f64 },
    MeanOverAllTokens,
    MeanOfMeans,
    NotAveraged { factor: f64 },
    NotAveragedOverMicrobatches { factor: f64 },
    LastMicrobatchOnly,
    FirstCotangentForAll,
    TokenWeightsIgnored,
    SoftcapDerivativeMissing,
    SoftcapDerivativeMissingLabel,
    ZlossGradientMissing,
    LabelSmoothingIgnored,
    LogitScaleIgnored,
    DqNotReduced { shards: usize, shard: usize },
    DkNotReduced { shards: usize, shard: usize },
    LocalLse { shards: usize },
    LabelPerShard { shards: usize },
}

/// What the catalogue says of a slug.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The name used in code, reports and docs.
    pub slug: &'static str,
    /// Where it stands in the catalogue.
    pub section: &'static str,
    /// What happens.
    pub title: &'static str,
    /// What it leaves behind.
    pub leaves_behind: &'static str,
    /// What to do about it.
    pub remedy: &'static str,
    /// The fault with the parameters that `synth` plants when none are given.
    pub example: Fault,
}

const PRECISION: &str = "Precision";
const INDICES: &str = "Masks, tiles, indices";
const SCALE: &str = "Scale and reduction";
const PARALLEL: &str = "Parallel";

macro_rules! catalogue {
    ($($slug:literal $section:ident $example:expr, $title:literal, $leaves:literal, $remedy:literal;)*) => {
        /// The catalogue, in its order.
        pub const CATALOGUE: &[Entry] = &[$(Entry {
            slug: $slug, section: $section, title: $title, leaves_behind: $leaves, remedy: $remedy, example: $example,
        }),*];
    };
}

catalogue! {
    "label-logit-bf16" PRECISION Fault::LabelLogitBf16, "the label logit is summed in bf16 in the forward",
        "loss and label logit noisy per row; lse, dQ, dK exact",
        "sum the label logit in f32, or take it from the logits tile inside the kernel";
    "loss-subtract-bf16" PRECISION Fault::LossSubtractBf16, "lse − z_t is subtracted in bf16",
        "loss only; grows with the common offset of the logits",
        "keep lse and the label logit in f32 until after the subtraction";
    "lse-bf16" PRECISION Fault::LseBf16, "lse is kept in bf16 between forward and backward",
        "a per-row scale of P in the backward; Σ_v P ≠ 1",
        "store the lse residual in f32";
    "label-scatter-bf16" PRECISION Fault::LabelScatterBf16 { hits_rounded: true, onto: ScatterOnto::ZerosThenBf16 }, "label gradients are scatter-added into dK in bf16",
        "dK only, label rows only, grows with the hits per row",
        "gather the label's row of K in f32 so that the transposed scatter-add runs in f32, or add the label term inside the kernel";
    "label-grad-rounded" PRECISION Fault::LabelGradRounded, "each label contribution g·q is rounded to bf16 before it is added in f32",
        "dK label rows only, no growth with hits",
        "keep g·q in f32 up to the sum";
    "dk-parts-rounded" PRECISION Fault::DkPartsRounded, "the lse part and the label part of dK are rounded to bf16 apart, then added",
        "dK, mostly label rows, about two roundings instead of one",
        "add the parts in f32 and round the sum once";
    "gq-bf16" PRECISION Fault::GqBf16, "g·q is rounded to bf16 before the product for dK",
        "dK_lse off by 1e-3 in every row; exact where g is a power of two",
        "scale P by g in f32 instead of scaling q";
    "dlogits-bf16" PRECISION Fault::DlogitsBf16, "dlogits are rounded to bf16 before the gradient products",
        "about 1e-3 in dQ and dK, uniform; honest in bf16 kernels",
        "keep dlogits in f32, or split them into a high and a low bf16, if f32 gradients are meant";
    "logits-bf16-forward" PRECISION Fault::LogitsBf16Forward, "logits are narrowed to bf16 in the forward only",
        "Σ_v P ≠ 1; grows with the size of the logits",
        "ask the product for f32 logits (preferred_element_type) in both passes";
    "logits-bf16-backward" PRECISION Fault::LogitsBf16Backward, "logits are narrowed to bf16 in the backward only",
        "loss exact, Σ_v P ≠ 1; grows with the size of the logits",
        "ask the recomputed product for f32 logits";
    "logits-bf16-both" PRECISION Fault::LogitsBf16Both, "logits are narrowed to bf16 in both passes",
        "loss and gradients off together, Σ_v P = 1; grows with the size of the logits",
        "ask the product for f32 logits (preferred_element_type) in both passes";
    "dk-accumulate-bf16" PRECISION Fault::DkAccumulateBf16 { chunks: 16, parts_rounded: true }, "dK is accumulated in bf16 over token chunks or microbatches",
        "dK only, all rows, grows with the number of chunks",
        "accumulate dK in f32 and round once at the end";
    "dq-accumulate-bf16" PRECISION Fault::DqAccumulateBf16 { tiles: 16, parts_rounded: true }, "dQ is accumulated in bf16 over vocab tiles",
        "dQ only, grows with the number of tiles",
        "accumulate dQ in f32 and round once at the end";
    "prob-minus-one-bf16" PRECISION Fault::ProbMinusOneBf16, "P is stored in bf16 and 1 taken off at the label in bf16",
        "label column only; confident tokens lose their gradient",
        "form P − 1 in f32 before any rounding";
    "vocab-pad-unmasked" INDICES Fault::VocabPadUnmasked { pad: 64 }, "zero-padded vocab columns enter lse",
        "lse too high by log1p(pad·e^−lse), P of each row scaled down; gone with large logits",
        "set logits beyond V to −∞ before the sum of exponentials";
    "vocab-tail-dropped" INDICES Fault::VocabTailDropped { tile: 128 }, "the last ragged vocab tile is skipped in the backward",
        "dK 0 in the last rows; dQ lacks their part",
        "round the number of vocab tiles up, and mask the tail";
    "token-tail-dropped" INDICES Fault::TokenTailDropped { tile: 128 }, "the last ragged token tile is skipped in the backward",
        "dQ 0 in the last rows; dK lacks their part",
        "round the number of token tiles up, and mask the tail";
    "lse-tile-missing" INDICES Fault::LseTileMissing { tile: 128, index: 0 }, "a vocab tile is missing from lse",
        "Σ_v P > 1",
        "check the loop bounds of the forward over vocab tiles";
    "label-tile-edge" INDICES Fault::LabelTileEdge { tile: 16 }, "the label's term is lost where its id is the first of a tile",
        "dQ rows and dK rows of those labels only",
        "check < against ≤ where the label is matched with a tile's range";
    "label-off-by-one" INDICES Fault::LabelOffByOne, "the label's column is taken one off",
        "dQ and dK wrong by O(1), Σ_v dlogits = 0 still",
        "check the shift between inputs and targets, and the tile offset added to column indices";
    "label-missing" INDICES Fault::LabelMissing, "the gradient has no label term",
        "Σ_v dlogits = g",
        "subtract the onehot in the backward";
    "ignored-leak" INDICES Fault::IgnoredLeak { label_zero: false }, "masked tokens get a gradient",
        "dQ non-zero exactly in masked rows",
        "multiply the cotangent by the mask, not only the loss";
    "valid-vocab-ignored" INDICES Fault::ValidVocabIgnored, "padding ids beyond valid_vocab take part",
        "dK non-zero beyond valid_vocab",
        "set logits from valid_vocab on to −∞ in both passes";
    "dq-cotangent-missing" SCALE Fault::DqCotangentMissing { factor: 8.0 }, "dQ lacks the upstream cotangent, or part of it",
        "dQ = constant × truth with no residual, dK right",
        "multiply dQ by the incoming cotangent";
    "dk-cotangent-missing" SCALE Fault::DkCotangentMissing { factor: 8.0 }, "dK lacks the upstream cotangent, or part of it",
        "dK = constant × truth with no residual, dQ right",
        "multiply dK by the incoming cotangent";
    "mean-over-all-tokens" SCALE Fault::MeanOverAllTokens, "the denominator counts masked tokens",
        "both gradients × valid/total",
        "divide by the sum of the weights of unmasked tokens";
    "mean-of-means" SCALE Fault::MeanOfMeans, "mean of the microbatches' means in place of the global mean",
        "a scale constant within a microbatch, different between them",
        "divide every microbatch's sum by one denominator over the step";
    "not-averaged" SCALE Fault::NotAveraged { factor: 2.0 }, "a constant factor on both gradients: microbatches, devices, tokens",
        "both gradients × factor, no residual",
        "check which of the divisions by microbatches, devices and tokens is missing or done twice";
    "last-microbatch-only" SCALE Fault::LastMicrobatchOnly, "dK of a microbatch overwrites the accumulator in place of being added",
        "accumulated dK is that of the last microbatch",
        "add into the accumulator";
    "first-cotangent-for-all" SCALE Fault::FirstCotangentForAll, "the first token's cotangent is used for every token",
        "per-row scale g[0]/g[n]",
        "index the cotangent by token where the reduction is none";
    "token-weights-ignored" SCALE Fault::TokenWeightsIgnored, "per-token weights are dropped in the backward",
        "per-row scale 1/w",
        "multiply the cotangent by the token weight";
    "softcap-derivative-missing" SCALE Fault::SoftcapDerivativeMissing, "tanh′ of the softcap is left out",
        "dlogits too large where logits near the cap",
        "multiply dlogits by 1 − (z/cap)²";
    "softcap-derivative-missing-label" SCALE Fault::SoftcapDerivativeMissingLabel, "tanh′ of the softcap is left out of the label part",
        "label part too large; Σ_v dlogits ≠ 0",
        "apply 1 − (z/cap)² after the onehot is subtracted";
    "zloss-gradient-missing" SCALE Fault::ZlossGradientMissing, "z-loss counts in the loss but not in the gradient",
        "loss exact; smooth, grows with lse",
        "multiply P by 1 + 2·z_loss·lse in the backward";
    "label-smoothing-ignored" SCALE Fault::LabelSmoothingIgnored, "label smoothing is off in the backward",
        "equals the run with the option off",
        "pass the option to the backward";
    "logit-scale-ignored" SCALE Fault::LogitScaleIgnored, "the logit scale's factor is missing in the backward",
        "both gradients × 1/scale",
        "multiply dlogits by the scale";
    "dq-not-reduced" PARALLEL Fault::DqNotReduced { shards: 2, shard: 0 }, "vocab-parallel dQ is not summed over the shards",
        "dQ is one shard's part; dK exact",
        "all-reduce dQ over the vocab axis";
    "dk-not-reduced" PARALLEL Fault::DkNotReduced { shards: 2, shard: 0 }, "data-parallel dK is not summed over the processes",
        "dK is the part of one process's tokens; dQ exact",
        "all-reduce dK over the data axis";
    "local-lse" PARALLEL Fault::LocalLse { shards: 2 }, "each vocab shard normalises by its own lse",
        "Σ_v P is the number of shards",
        "merge the shards' (max, sum) before the backward";
    "label-per-shard" PARALLEL Fault::LabelPerShard { shards: 2 }, "the label term is counted on every vocab shard",
        "label part × shards",
        "add the label term only on the shard that owns the id";
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
        let kind = match self {
            Fault::DkAccumulateBf16OverMicrobatches => &Fault::DkAccumulateBf16 { chunks: 1, parts_rounded: true },
            Fault::NotAveragedOverMicrobatches { .. } => &Fault::NotAveraged { factor: 1.0 },
            other => other,
        };
        CATALOGUE
            .iter()
            .find(|e| std::mem::discriminant(&e.example) == std::mem::discriminant(kind))
            .expect("every fault is in the catalogue")
    }

    /// Its name.
    pub fn slug(&self) -> &'static str {
        self.entry().slug
    }

    /// `slug` or `slug:name=value,name=value`.
    ///
    /// # Errors
    /// An unknown slug (with the nearest known one), parameter or value.
    pub fn parse(text: &str) -> Result<Self, DiffError> {
        let (slug, parameters) = text.split_once(':').unwrap_or((text, ""));
        let Some(entry) = CATALOGUE.iter().find(|e| e.slug == slug) else {
            let nearest =
                CATALOGUE.iter().max_by(|a, b| strsim::jaro_winkler(a.slug, slug).total_cmp(&strsim::jaro_winkler(b.slug, slug)));
            return Err(DiffError::UnknownFault { found: slug.into(), nearest: nearest.map_or("", |e| e.slug) });
        };
        let mut fault = entry.example;
        for parameter in parameters.split(',').filter(|p| !p.is_empty()) {
            let bad = || DiffError::FaultParameter {
                fault: slug.into(),
                found: parameter.into(),
                expected: fault.numbers().join(", "),
            };
            let (name, value) = parameter.split_once('=').ok_or_else(bad)?;
            let value = value.parse().ok().filter(|v: &f64| v.is_finite()).ok_or_else(bad)?;
            let mut changed = fault;
            fault = changed.set(name, value).then_some(changed).ok_or_else(bad)?;
        }
        Ok(fault)
    }

    /// The parameters that can be set.
    fn numbers(&self) -> Vec<String> {
        self.parameters().into_iter().filter(|(_, value)| value.is_number()).map(|(name, _)| name).collect()
    }

    fn set(&mut self, name: &str, value: f64) -> bool {
        let whole = value as usize;
        let count = value.fract() == 0.0 && value >= 1.0;
        match (self, name) {
            (Fault::DkAccumulateBf16 { chunks: field, .. }, "chunks")
            | (Fault::DqAccumulateBf16 { tiles: field, .. }, "tiles")
            | (Fault::VocabPadUnmasked { pad: field }, "pad")
            | (
                Fault::VocabTailDropped { tile: field }
                | Fault::TokenTailDropped { tile: field }
                | Fault::LseTileMissing { tile: field, .. }
                | Fault::LabelTileEdge { tile: field },
                "tile",
            )
            | (
                Fault::DqNotReduced { shards: field, .. }
                | Fault::DkNotReduced { shards: field, .. }
                | Fault::LocalLse { shards: field }
                | Fault::LabelPerShard { shards: field },
                "shards",
            ) if count => *field = whole,
            (Fault::LseTileMissing { index: field, .. }, "index")
            | (Fault::DqNotReduced { shard: field, .. } | Fault::DkNotReduced { shard: field, .. }, "shard")
                if value.fract() == 0.0 && value >= 0.0 =>
            {
                *field = whole;
            }
            (
                Fault::NotAveraged { factor } | Fault::DqCotangentMissing { factor } | Fault::DkCotangentMissing { factor },
                "factor",
            ) => *factor = value,
            _ => return false,
        }
        true
    }

    /// Its parameters by the catalogue's names.
    pub fn parameters(&self) -> Map<String, Value> {
        let pairs: Vec<(&str, Value)> = match *self {
            Fault::LabelScatterBf16 { hits_rounded, onto } => {
                let onto = match onto {
                    ScatterOnto::Zeros => "zeros, then the lse part in f32",
                    ScatterOnto::ZerosThenBf16 => "zeros, then the lse part in bf16",
                    ScatterOnto::LsePart => "the lse part",
                };
                vec![("hits_rounded", hits_rounded.into()), ("onto", onto.into())]
            }
            Fault::DkAccumulateBf16 { chunks, parts_rounded } => {
                vec![("chunks", chunks.into()), ("parts_rounded", parts_rounded.into())]
            }
            Fault::DkAccumulateBf16OverMicrobatches => vec![("over", "microbatches".into())],
            Fault::DqAccumulateBf16 { tiles, parts_rounded } => {
                vec![("tiles", tiles.into()), ("parts_rounded", parts_rounded.into())]
            }
            Fault::VocabPadUnmasked { pad } => vec![("pad", pad.into())],
            Fault::VocabTailDropped { tile } | Fault::TokenTailDropped { tile } | Fault::LabelTileEdge { tile } => {
                vec![("tile", tile.into())]
            }
            Fault::LseTileMissing { tile, index } => vec![("tile", tile.into()), ("index", index.into())],
            Fault::NotAveraged { factor } | Fault::DqCotangentMissing { factor } | Fault::DkCotangentMissing { factor } => {
                vec![("factor", factor.into())]
            }
            Fault::NotAveragedOverMicrobatches { factor } => vec![("factor", factor.into()), ("over", "microbatches".into())],
            Fault::DqNotReduced { shards, shard } | Fault::DkNotReduced { shards, shard } => {
                vec![("shards", shards.into()), ("shard", shard.into())]
            }
            Fault::LocalLse { shards } | Fault::LabelPerShard { shards } => vec![("shards", shards.into())],
            _ => vec![],
        };
        pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    /// Whether it is no more than a factor, which a more specific fault may make too.
    pub fn is_generic(&self) -> bool {
        matches!(
            self,
            Fault::NotAveraged { .. }
                | Fault::NotAveragedOverMicrobatches { .. }
                | Fault::DqCotangentMissing { .. }
                | Fault::DkCotangentMissing { .. }
        )
    }

    /// What it can change. A part that is not named stays exact.
    pub fn touches(&self) -> Touches {
        let [forward, d_hidden, d_unembedding] = match self {
            Fault::LabelLogitBf16 | Fault::LossSubtractBf16 => [true, false, false],
            Fault::LogitsBf16Forward
            | Fault::LogitsBf16Both
            | Fault::VocabPadUnmasked { .. }
            | Fault::LseTileMissing { .. }
            | Fault::ValidVocabIgnored => [true, true, true],
            Fault::LabelScatterBf16 { .. }
            | Fault::LabelGradRounded
            | Fault::DkPartsRounded
            | Fault::GqBf16
            | Fault::DkAccumulateBf16 { .. }
            | Fault::DkCotangentMissing { .. }
            | Fault::DkNotReduced { .. } => [false, false, true],
            Fault::DqAccumulateBf16 { .. } | Fault::DqCotangentMissing { .. } | Fault::DqNotReduced { .. } => {
                [false, true, false]
            }
            Fault::DkAccumulateBf16OverMicrobatches | Fault::NotAveragedOverMicrobatches { .. } | Fault::LastMicrobatchOnly => {
                [false, false, false]
            }
            _ => [false, true, true],
        };
        let over_step = !(forward || d_hidden || d_unembedding);
        Touches { forward, d_hidden, d_unembedding, accumulated: d_unembedding || over_step }
    }

    /// Builds the fault into a computation on `step`.
    pub fn apply(&self, to: &mut Counterfactual, step: &Step) {
        let (vocab, valid, tokens) = step.microbatches.first().map_or((1, 1, 1), |m| {
            let shape = m.problem.shape();
            (shape.vocab, m.problem.valid_columns(), shape.tokens)
        });
        let part = |of: usize, shards: usize, shard: usize| {
            let width = of.div_ceil(shards);
            ((shard * width).min(of), ((shard + 1) * width).min(of))
        };
        match *self {
            Fault::LabelLogitBf16 => to.label_logit_bf16 = true,
            Fault::LossSubtractBf16 => to.loss_subtract_bf16 = true,
            Fault::LseBf16 => to.stored_lse = Precision::Bf16,
            Fault::LabelScatterBf16 { hits_rounded, onto } => to.label_sum = LabelSum::Bf16 { hits_rounded, onto },
            Fault::LabelGradRounded => to.label_sum = LabelSum::EachRounded,
            Fault::DkPartsRounded => to.dk_parts_bf16 = true,
            Fault::GqBf16 => to.gq_bf16 = true,
            Fault::DlogitsBf16 => to.dlogits = Precision::Bf16,
            Fault::LogitsBf16Forward => to.forward_logits = Precision::Bf16,
            Fault::LogitsBf16Backward => to.backward_logits = Precision::Bf16,
            Fault::LogitsBf16Both => (to.forward_logits, to.backward_logits) = (Precision::Bf16, Precision::Bf16),
            Fault::DkAccumulateBf16 { chunks, parts_rounded } => {
                to.dk_sum = Some(Bf16Sum { width: tokens.div_ceil(chunks).max(1), parts_rounded });
            }
            Fault::DkAccumulateBf16OverMicrobatches => to.microbatches_bf16 = true,
            Fault::DqAccumulateBf16 { tiles, parts_rounded } => {
                to.dq_sum = Some(Bf16Sum { width: vocab.div_ceil(tiles).max(1), parts_rounded });
            }
            Fault::ProbMinusOneBf16 => to.p_minus_one_bf16 = true,
            Fault::VocabPadUnmasked { pad } => to.padding_in_lse = pad,
            Fault::VocabTailDropped { tile } => to.vocab_end = Some(vocab / tile * tile),
            Fault::TokenTailDropped { tile } => to.token_end = Some(tokens / tile * tile),
            Fault::LseTileMissing { tile, index } => to.lse_misses = Some((index * tile, ((index + 1) * tile).min(valid))),
            Fault::LabelTileEdge { tile } => to.label = LabelPlace::MissingOnTileEdge { tile, last: false },
            Fault::LabelOffByOne => to.label = LabelPlace::OffByOne,
            Fault::LabelMissing => to.label = LabelPlace::Missing,
            Fault::IgnoredLeak { label_zero } => {
                to.masked = if label_zero { MaskedTokens::WithLabelZero } else { MaskedTokens::WithStoredLabel };
            }
            Fault::ValidVocabIgnored => to.padding_takes_part = true,
            Fault::DqCotangentMissing { factor } => to.dq_factor *= factor,
            Fault::DkCotangentMissing { factor } => to.dk_factor *= factor,
            Fault::MeanOverAllTokens => to.mean_over_all_tokens = true,
            Fault::MeanOfMeans => to.mean_of_means = true,
            Fault::NotAveraged { factor } => {
                to.dq_factor *= factor;
                to.dk_factor *= factor;
            }
            Fault::NotAveragedOverMicrobatches { factor } => to.accumulated_factor *= factor,
            Fault::LastMicrobatchOnly => to.last_microbatch_only = true,
            Fault::FirstCotangentForAll => to.token_factor = TokenFactor::First,
            Fault::TokenWeightsIgnored => to.token_factor = TokenFactor::Unweighted,
            Fault::SoftcapDerivativeMissing => to.no_softcap_derivative = (true, true),
            Fault::SoftcapDerivativeMissingLabel => to.no_softcap_derivative.1 = true,
            Fault::ZlossGradientMissing => to.no_z_loss_gradient = true,
            Fault::LabelSmoothingIgnored => to.no_label_smoothing = true,
            Fault::LogitScaleIgnored => to.scale = ScaleInBackward::NoFactor,
            Fault::DqNotReduced { shards, shard } => to.dq_vocab = Some(part(vocab, shards, shard)),
            Fault::DkNotReduced { shards, shard } => to.dk_tokens = Some(part(tokens, shards, shard)),
            Fault::LocalLse { shards } => to.local_lse_shards = shards,
            Fault::LabelPerShard { shards } => to.label = LabelPlace::Repeated(shards),
        }
    }
}
