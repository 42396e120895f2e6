//! Which faults are worth testing on a step, and with which parameters: cheap looks at the data before expensive replays.

use crate::diff::fault::{CATALOGUE, Fault, Touches};
use crate::diff::replay::ScatterOnto;
use crate::diff::step::Step;
use crate::diff::truth::Stage;
use crate::report::model::{MicrobatchReport, TensorReport, Verdict};
use fused_xent_kernels::problem::{Label, LossOptions};
use fused_xent_kernels::reduction::{Microbatches, Reduction};
use std::ops::RangeInclusive;

/// What was seen of a candidate.
pub struct Observed<'a> {
    /// The step.
    pub step: &'a Step<'a>,
    /// The comparison with the reference, per microbatch.
    pub microbatches: &'a [MicrobatchReport],
    /// The comparison of the accumulated dK.
    pub accumulated: Option<&'a TensorReport>,
}

/// Sizes that kernels tile by.
pub(in crate::diff) const TILES: [usize; 9] = [16, 32, 64, 128, 256, 512, 1024, 2048, 4096];
/// Numbers of shards of a mesh axis.
const SHARDS: [usize; 5] = [2, 4, 8, 16, 32];
/// Vocab tiles of which each is tested for being absent from lse.
const MOST_TILES: usize = 64;

/// Every fault that could change what diverges, with every parameter that the data leave possible.
pub fn hypotheses(observed: &Observed) -> Vec<Fault> {
    let mut out: Vec<Fault> = CATALOGUE.iter().flat_map(|entry| observed.instances(entry.example)).collect();
    out.retain(|fault| observed.could_explain(fault.touches()));
    out
}

impl Observed<'_> {
    fn could_explain(&self, touches: Touches) -> bool {
        let diverges = |stage: Stage| self.reports(stage).any(|t| t.verdict == Verdict::Diverge);
        Stage::OF_A_MICROBATCH.into_iter().any(|stage| touches.stage(stage) && diverges(stage))
            || (touches.accumulated && self.accumulated.is_some_and(|t| t.verdict == Verdict::Diverge))
    }

    /// `example` with every set of parameters worth testing; none if it changes nothing here.
    fn instances(&self, example: Fault) -> Vec<Fault> {
        let step = self.step;
        let Some(first) = step.microbatches.first() else { return vec![] };
        let problem = &first.problem;
        let (shape, options) = (problem.shape(), *problem.options());
        let several = step.microbatches.len() > 1;
        let any = |test: fn(&Label, f32) -> bool| {
            step.microbatches.iter().any(|m| m.problem.labels().iter().zip(m.problem.weights()).any(|(l, w)| test(l, *w)))
        };
        let masked = any(|label, _| *label == Label::Masked);
        let weighted = any(|_, weight| weight != 0.0 && weight != 1.0);
        let when = |condition: bool| if condition { vec![example] } else { vec![] };
        let mean = step.reduction.reduction == Reduction::Mean;
        match example {
            Fault::LabelScatterBf16 { .. } => [true, false]
                .into_iter()
                .flat_map(|hits_rounded| {
                    [ScatterOnto::Zeros, ScatterOnto::ZerosThenBf16, ScatterOnto::LsePart]
                        .map(|onto| Fault::LabelScatterBf16 { hits_rounded, onto })
                })
                .collect(),
            Fault::DkAccumulateBf16 { .. } => {
                let counts = (1..).map(|i| 1usize << i).take_while(|&c| c < shape.tokens).chain([shape.tokens]);
                let mut out: Vec<Fault> = counts
                    .flat_map(|chunks| [true, false].map(|parts_rounded| Fault::DkAccumulateBf16 { chunks, parts_rounded }))
                    .collect();
                out.extend(several.then_some(Fault::DkAccumulateBf16OverMicrobatches));
                out
            }
            Fault::DqAccumulateBf16 { .. } => {
                let counts = (1..).map(|i| 1usize << i).take_while(|&c| c * 8 <= shape.vocab);
                let by_width = TILES.iter().filter(|&&t| t < shape.vocab).map(|t| shape.vocab.div_ceil(*t));
                let mut counts: Vec<usize> = counts.chain(by_width).collect();
                counts.sort_unstable();
                counts.dedup_by_key(|tiles| shape.vocab.div_ceil(*tiles));
                counts
                    .into_iter()
                    .flat_map(|tiles| [true, false].map(|parts_rounded| Fault::DqAccumulateBf16 { tiles, parts_rounded }))
                    .collect()
            }
            Fault::VocabPadUnmasked { .. } => {
                let mut pads: Vec<usize> = TILES
                    .iter()
                    .map(|t| shape.vocab.div_ceil(*t) * t - shape.vocab)
                    .chain([8, 16, 32, 64, 128, 256])
                    .filter(|&p| p > 0)
                    .collect();
                pads.sort_unstable();
                pads.dedup();
                pads.into_iter().map(|pad| Fault::VocabPadUnmasked { pad }).collect()
            }
            Fault::VocabTailDropped { .. } => {
                let of_step = self.accumulated.into_iter().filter(|_| self.reports(Stage::DUnembedding).next().is_none());
                let ends = tail(self.reports(Stage::DUnembedding).chain(of_step));
                tiles_that_end_in(ends, shape.vocab).map(|tile| Fault::VocabTailDropped { tile }).collect()
            }
            Fault::TokenTailDropped { .. } => tiles_that_end_in(tail(self.reports(Stage::DHidden)), shape.tokens)
                .map(|tile| Fault::TokenTailDropped { tile })
                .collect(),
            Fault::LseTileMissing { .. } => TILES
                .iter()
                .filter(|&&tile| tile < problem.valid_columns())
                .flat_map(|&tile| {
                    let tiles = problem.valid_columns().div_ceil(tile);
                    let indices = if tiles <= MOST_TILES { (0..tiles).collect() } else { vec![0, tiles - 1] };
                    indices.into_iter().map(move |index| Fault::LseTileMissing { tile, index })
                })
                .collect(),
            Fault::LabelTileEdge { .. } => {
                TILES.iter().filter(|&&tile| tile < shape.vocab).map(|&tile| Fault::LabelTileEdge { tile }).collect()
            }
            Fault::IgnoredLeak { .. } if masked => {
                vec![Fault::IgnoredLeak { label_zero: false }, Fault::IgnoredLeak { label_zero: true }]
            }
            Fault::IgnoredLeak { .. } => vec![],
            Fault::MeanOverAllTokens => when(masked && mean),
            Fault::MeanOfMeans => when(several && mean && step.reduction.microbatches == Microbatches::Global),
            Fault::LastMicrobatchOnly => when(several),
            Fault::DqCotangentMissing { .. } => {
                self.factors(Stage::DHidden).into_iter().map(|factor| Fault::DqCotangentMissing { factor }).collect()
            }
            Fault::DkCotangentMissing { .. } => {
                self.factors(Stage::DUnembedding).into_iter().map(|factor| Fault::DkCotangentMissing { factor }).collect()
            }
            Fault::NotAveraged { .. } => {
                let everywhere = self.factors(Stage::DHidden).into_iter().chain(self.factors(Stage::DUnembedding));
                let mut out: Vec<Fault> = everywhere.map(|factor| Fault::NotAveraged { factor }).collect();
                let over_step = self.accumulated.filter(|_| several).map(factors_of).unwrap_or_default();
                out.extend(over_step.into_iter().map(|factor| Fault::NotAveragedOverMicrobatches { factor }));
                out
            }
            Fault::FirstCotangentForAll => when(weighted || masked),
            Fault::TokenWeightsIgnored => when(weighted),
            Fault::ValidVocabIgnored => when(problem.valid_columns() < shape.vocab),
            Fault::SoftcapDerivativeMissing | Fault::SoftcapDerivativeMissingLabel => when(options.logit_softcap.is_some()),
            Fault::ZlossGradientMissing => when(options.z_loss > 0.0),
            Fault::LabelSmoothingIgnored => when(options.label_smoothing > 0.0),
            Fault::LogitScaleIgnored => when(options.logit_scale != LossOptions::default().logit_scale),
            Fault::DqNotReduced { .. } => shards(shape.vocab)
                .flat_map(|shards| (0..shards).map(move |shard| Fault::DqNotReduced { shards, shard }))
                .collect(),
            Fault::DkNotReduced { .. } => shards(shape.tokens)
                .flat_map(|shards| (0..shards).map(move |shard| Fault::DkNotReduced { shards, shard }))
                .collect(),
            Fault::LocalLse { .. } => shards(shape.vocab).map(|shards| Fault::LocalLse { shards }).collect(),
            Fault::LabelPerShard { .. } => shards(shape.vocab).map(|shards| Fault::LabelPerShard { shards }).collect(),
            other => vec![other],
        }
    }

    fn reports(&self, stage: Stage) -> impl Iterator<Item = &TensorReport> {
        self.microbatches.iter().flat_map(|m| &m.tensors).filter(move |t| t.name == stage.name())
    }

    /// Constant factors that a gradient may carry: the fitted one, and the whole number or its reciprocal next to it.
    fn factors(&self, stage: Stage) -> Vec<f64> {
        self.reports(stage).find(|t| t.verdict == Verdict::Diverge).or(self.accumulated).map(factors_of).unwrap_or_default()
    }
}

/// Where a tail of zero rows that should not be 0 can begin, in all of `tensors` that have one.
fn tail<'a>(tensors: impl Iterator<Item = &'a TensorReport>) -> Option<RangeInclusive<usize>> {
    let [first, last] = tensors.filter_map(|t| t.zero_tail).reduce(|a, b| [a[0].max(b[0]), a[1].min(b[1])])?;
    Some(first..=last)
}

/// Factors near the fitted one: whole numbers and their reciprocals, which need no other fault beside them, before the fit itself.
fn factors_of(tensor: &TensorReport) -> Vec<f64> {
    let Some(alpha) = tensor.scale.filter(|a| *a != 0.0) else { return vec![] };
    let whole = if alpha.abs() >= 1.0 { alpha.round() } else { 1.0 / (1.0 / alpha).round() };
    let off = (whole / alpha - 1.0).abs();
    match whole {
        1.0 => vec![alpha],
        whole if off < EQUAL => vec![whole],
        whole if off < NEAR => vec![whole, alpha],
        _ => vec![alpha],
    }
}

/// How near a fitted factor must be to a whole number to be it, and to be worth trying.
const EQUAL: f64 = 2e-3;
const NEAR: f64 = 0.2;

/// Tile sizes whose last whole tile ends in `ends`, the usual ones first.
fn tiles_that_end_in(ends: Option<RangeInclusive<usize>>, of: usize) -> impl Iterator<Item = usize> {
    const MOST: usize = 6;
    let unusual = (8..of).step_by(8).filter(|tile| !TILES.contains(tile));
    let fits = move |tile: &usize| ends.as_ref().is_some_and(|ends| *tile < of && ends.contains(&(of / tile * tile)));
    TILES.into_iter().chain(unusual).filter(fits).take(MOST)
}

fn shards(of: usize) -> impl Iterator<Item = usize> {
    SHARDS.into_iter().filter(move |&s| s <= of)
}
