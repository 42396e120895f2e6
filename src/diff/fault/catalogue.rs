//! What the catalogue says of each fault.

use super::Fault;
use super::Gradients;
use crate::diff::replay::{
    Approximation, Bf16Sum, Chunks, Filter, LabelLogit, LseRounded, Padding, ScaleInBackward, ScatterOnto, Split,
};
use fused_xent_kernels::contract::LabelTerm;

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

const SIXTEEN: Bf16Sum = Bf16Sum { chunks: Chunks::Number(16), parts_rounded: true };
const TWO: Split = Split { shards: 2, even: false };

macro_rules! catalogue {
    ($($slug:literal $section:ident $example:expr, $title:literal, $leaves:literal, $remedy:literal;)*) => {
        /// The catalogue, in its order.
        pub const CATALOGUE: &[Entry] = &[$(Entry {
            slug: $slug, section: $section, title: $title, leaves_behind: $leaves, remedy: $remedy, example: $example,
        }),*];
    };
}

catalogue! {
    "label-logit-bf16" PRECISION Fault::LabelLogitBf16(LabelLogit::OfRoundedProducts), "the label logit is summed in bf16 in the forward",
        "loss and label logit noisy per row; lse, dQ, dK exact",
        "sum the label logit in f32, or take it from the logits tile inside the kernel";
    "loss-subtract-bf16" PRECISION Fault::LossSubtractBf16, "lse − z_t is subtracted in bf16",
        "loss only; grows with the common offset of the logits",
        "keep lse and the label logit in f32 until after the subtraction";
    "lse-bf16" PRECISION Fault::LseBf16(LseRounded::Backward), "lse is kept in bf16 between forward and backward",
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
    "dlogits-bf16" PRECISION Fault::DlogitsBf16 { label: LabelTerm::Apart }, "dlogits are rounded to bf16 before the gradient products",
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
    "dk-accumulate-bf16" PRECISION Fault::DkAccumulateBf16(SIXTEEN), "dK is accumulated in bf16 over token chunks or microbatches",
        "dK only, all rows, grows with the number of chunks",
        "accumulate dK in f32 and round once at the end";
    "dq-accumulate-bf16" PRECISION Fault::DqAccumulateBf16(SIXTEEN), "dQ is accumulated in bf16 over vocab tiles",
        "dQ only, grows with the number of tiles",
        "accumulate dQ in f32 and round once at the end";
    "prob-minus-one-bf16" PRECISION Fault::ProbMinusOneBf16, "P is stored in bf16 and 1 taken off at the label in bf16",
        "label column only; confident tokens lose their gradient",
        "form P − 1 in f32 before any rounding";
    "gradient-filter" PRECISION Fault::GradientFilter(Filter { eps: 1.0 / 256.0, tokens: 16, ids: 16, masked_count: false }), "tiles of dlogits that are all small are skipped in the backward",
        "a bias, not noise; Σ_v dK ≠ 0",
        "turn the filter off, or lower its threshold until gradients agree";
    "approximate-exp-log" PRECISION Fault::ApproximateExpLog(Approximation::Log { degree: 4 }), "exp or log is of low accuracy",
        "lse off by some 1e-4, by one number in a whole row",
        "use exp and log that are right to float32";
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
    "label-off-by-one" INDICES Fault::LabelOffByOne { left: false, wraps: true }, "the label's column is taken one off",
        "dQ and dK wrong by O(1), Σ_v dlogits = 0 still",
        "check the shift between inputs and targets, and the tile offset added to column indices";
    "label-missing" INDICES Fault::LabelMissing, "the gradient has no label term",
        "Σ_v dlogits = g",
        "subtract the onehot in the backward";
    "ignored-leak" INDICES Fault::IgnoredLeak { label_zero: false }, "masked tokens get a gradient",
        "dQ non-zero exactly in masked rows",
        "multiply the cotangent by the mask, not only the loss";
    "valid-vocab-ignored" INDICES Fault::ValidVocabIgnored(Padding::InBoth), "padding ids beyond valid_vocab take part",
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
    "logit-scale-ignored" SCALE Fault::LogitScaleIgnored(ScaleInBackward::NoFactor), "the logit scale's factor is missing in the backward",
        "both gradients × 1/scale",
        "multiply dlogits by the scale";
    "dq-not-reduced" PARALLEL Fault::DqNotReduced { split: TWO, shard: 0 }, "vocab-parallel dQ is not summed over the shards",
        "dQ is one shard's part; dK exact",
        "all-reduce dQ over the vocab axis";
    "dk-not-reduced" PARALLEL Fault::DkNotReduced { split: TWO, shard: 0 }, "data-parallel dK is not summed over the processes",
        "dK is the part of one process's tokens; dQ exact",
        "all-reduce dK over the data axis";
    "local-lse" PARALLEL Fault::LocalLse(TWO), "each vocab shard normalises by its own lse",
        "Σ_v P is the number of shards",
        "merge the shards' (max, sum) before the backward";
    "label-per-shard" PARALLEL Fault::LabelPerShard { shards: 2, of: Gradients::Both }, "the label term is counted on every vocab shard",
        "label part × shards",
        "add the label term only on the shard that owns the id";
}

/// What to capture to tell faults from this one that do the same in a dump.
pub fn told_apart_by(slug: &str) -> &'static str {
    match slug {
        "mean-over-all-tokens" | "mean-of-means" | "not-averaged" | "last-microbatch-only" => {
            "several microbatches with different numbers of valid tokens, and gradients of each"
        }
        "dq-cotangent-missing"
        | "dk-cotangent-missing"
        | "first-cotangent-for-all"
        | "token-weights-ignored"
        | "ignored-leak" => "tokens of different weights, some of them masked",
        "gq-bf16" | "dlogits-bf16" | "prob-minus-one-bf16" | "label-grad-rounded" => {
            "gradients in float32, with a cotangent that is no power of two"
        }
        "dq-not-reduced" | "dq-accumulate-bf16" => "the parts of dQ, in float32",
        "dk-not-reduced" | "dk-accumulate-bf16" | "dk-parts-rounded" | "label-scatter-bf16" => "the parts of dK, in float32",
        "label-logit-bf16" | "loss-subtract-bf16" => "loss and label logits, in float32",
        slug if slug.contains("lse") || slug.contains("logits") || slug.contains("exp") || slug.contains("pad") => {
            "lse, in float32"
        }
        _ => "the parts of dQ and dK, in float32, and tokens of more labels",
    }
}
