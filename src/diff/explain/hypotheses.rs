//! Which faults are worth testing on a step, and with which parameters: cheap looks at the data before expensive replays.

use super::lse::SeenLse;
use crate::diff::fault::{CATALOGUE, Fault, Touches};
use crate::diff::replay::{Approximation, Filter, ProcessSum, ScatterOnto};
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
    /// The lse that its rows show.
    pub lse: &'a SeenLse,
}

/// Tokens, and vocab ids, of the tiles that a gradient filter may look at, and thresholds that it may have.
pub(super) const FILTER_TILES: [usize; 5] = [16, 32, 64, 128, 256];
pub(super) const THRESHOLDS: [f64; 16] = [
    1.0 / 64.0,
    1e-2,
    1.0 / 256.0,
    1.0 / 512.0,
    1e-3,
    1.0 / 2048.0,
    1.0 / 4096.0,
    1.0 / 8192.0,
    1e-4,
    1.0 / 16384.0,
    1.0 / 32768.0,
    1.0 / 65536.0,
    1e-5,
    1.0 / 262_144.0,
    1.0 / 1_048_576.0,
    1e-6,
];

/// Sizes that kernels tile by.
pub(in crate::diff) const TILES: [usize; 9] = [16, 32, 64, 128, 256, 512, 1024, 2048, 4096];
/// Numbers of shards of a mesh axis.
const SHARDS: [usize; 5] = [2, 4, 8, 16, 32];

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
            Fault::LabelScatterBf16 { .. } => {
                let onto = [ScatterOnto::Zeros, ScatterOnto::ZerosThenBf16, ScatterOnto::LsePart];
                let variants = [true, false].into_iter().flat_map(|rounded| onto.map(|onto| (rounded, onto)));
                let mut out: Vec<Fault> =
                    variants.clone().map(|(hits_rounded, onto)| Fault::LabelScatterBf16 { hits_rounded, onto }).collect();
                for over in self.process_sums() {
                    let variants = variants.clone();
                    out.extend(variants.map(|(hits_rounded, onto)| Fault::LabelScatterBf16OverProcesses {
                        hits_rounded,
                        onto,
                        over,
                    }));
                }
                out
            }
            Fault::DkAccumulateBf16 { .. } => {
                let counts = (1..).map(|i| 1usize << i).take_while(|&c| c < shape.tokens).chain([shape.tokens]);
                let mut out = both(counts, |chunks, parts_rounded| Fault::DkAccumulateBf16 { chunks, parts_rounded });
                // A fixed width differs from equal chunks where the last is ragged.
                let widths = TILES
                    .into_iter()
                    .filter(|&width| width < shape.tokens && shape.tokens.div_ceil(shape.tokens.div_ceil(width)) != width);
                out.extend(both(widths, |width, parts_rounded| Fault::DkAccumulateBf16ByWidth { width, parts_rounded }));
                for over in self.process_sums() {
                    let share = shape.tokens.div_ceil(over.processes);
                    let counts = (1..).map(|i| 1usize << i).take_while(|&c| c < share).chain([share]);
                    let variant = |chunks, parts_rounded| Fault::DkAccumulateBf16OverProcesses { chunks, parts_rounded, over };
                    out.extend(both(counts, variant));
                }
                out.extend(several.then_some(Fault::DkAccumulateBf16OverMicrobatches));
                out
            }
            Fault::DqAccumulateBf16 { .. } => {
                let counts = (1..).map(|i| 1usize << i).take_while(|&c| c * 8 <= shape.vocab);
                let equal: Vec<usize> = counts.collect();
                let of_equal = |width: usize| equal.iter().any(|tiles| shape.vocab.div_ceil(*tiles) == width);
                let widths = TILES.into_iter().filter(|&width| width < shape.vocab && !of_equal(width));
                let mut out = both(widths, |width, parts_rounded| Fault::DqAccumulateBf16ByWidth { width, parts_rounded });
                out.extend(both(equal.iter().copied(), |tiles, parts_rounded| Fault::DqAccumulateBf16 { tiles, parts_rounded }));
                out
            }
            Fault::VocabPadUnmasked { .. } => {
                let mut pads: Vec<usize> = TILES
                    .iter()
                    .map(|t| shape.vocab.div_ceil(*t) * t - shape.vocab)
                    .chain([8, 16, 32, 64, 128, 256])
                    .chain(self.lse.padding())
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
            Fault::LseTileMissing { .. } => {
                self.lse.missing_tiles().into_iter().map(|(tile, index)| Fault::LseTileMissing { tile, index }).collect()
            }
            Fault::LabelTileEdge { .. } => {
                let tiles = TILES.into_iter().filter(|&tile| tile < shape.vocab);
                tiles.flat_map(|tile| [Fault::LabelTileEdge { tile }, Fault::LabelTileEdgeLast { tile }]).collect()
            }
            Fault::IgnoredLeak { .. } if masked => {
                let labelled = [false, true].map(|label_zero| Fault::IgnoredLeak { label_zero });
                labelled.into_iter().chain([Fault::IgnoredLeakUnlabelled]).collect()
            }
            Fault::IgnoredLeak { .. } => vec![],
            Fault::GradientFilter(_) => {
                // As if each token were a tile's only one: that needs no other token's logits. The others come where this fits.
                let scout = |eps| Fault::GradientFilter(Filter { eps, tokens: 1, ids: FILTER_TILES[2] });
                THRESHOLDS.into_iter().step_by(2).map(scout).collect()
            }
            Fault::ApproximateExpLog(_) => self.approximations(),
            Fault::MeanOverAllTokens => when(masked && mean),
            Fault::MeanOfMeans => when(several && mean && step.reduction.microbatches == Microbatches::Global),
            Fault::LastMicrobatchOnly => {
                let undivided = (step.accumulation_factor() != 1.0).then_some(Fault::LastMicrobatchOnlyUndivided);
                when(several).into_iter().chain(undivided.filter(|_| several)).collect()
            }
            Fault::DqCotangentMissing { .. } => {
                let by_factor = self.factors(Stage::DHidden).into_iter().map(|factor| Fault::DqCotangentMissing { factor });
                by_factor.chain([Fault::DqCotangentMissingAll]).collect()
            }
            Fault::DkCotangentMissing { .. } => {
                let by_factor = self.factors(Stage::DUnembedding).into_iter().map(|factor| Fault::DkCotangentMissing { factor });
                by_factor.chain([Fault::DkCotangentMissingAll]).collect()
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
            Fault::LogitScaleIgnored if options.logit_scale != LossOptions::default().logit_scale => {
                vec![Fault::LogitScaleIgnored, Fault::LogitScaleIgnoredInLogits]
            }
            Fault::LogitScaleIgnored => vec![],
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

    /// Over the processes of the run: each sums its own tokens.
    fn process_sums(&self) -> Vec<ProcessSum> {
        let processes = self.step.processes;
        if processes < 2 { vec![] } else { [false, true].map(|bf16| ProcessSum { processes, bf16 }).to_vec() }
    }

    /// Formulas for exp and log, where lse is off by little; then lse as it was recorded, whatever the formula.
    fn approximations(&self) -> Vec<Fault> {
        if !self.lse.is_off_by_little() {
            return vec![];
        }
        let logs = (3..=6).map(|degree| Approximation::Log { degree });
        let in_passes = [false, true].into_iter();
        let exps = in_passes.flat_map(|in_backward| {
            let polynomials = (2..=5).map(move |degree| Approximation::Exp { degree, in_backward });
            polynomials.chain([Approximation::ExpBf16 { in_backward }])
        });
        let recorded = self.step.microbatches.iter().all(|m| m.recorded_lse.is_some()).then_some(Approximation::AsRecorded);
        logs.chain(exps).chain(recorded).map(Fault::ApproximateExpLog).collect()
    }

    fn reports(&self, stage: Stage) -> impl Iterator<Item = &TensorReport> {
        self.microbatches.iter().flat_map(|m| &m.tensors).filter(move |t| t.name == stage.name())
    }

    /// Constant factors that a gradient may carry: the fitted one, and the whole number or its reciprocal next to it.
    fn factors(&self, stage: Stage) -> Vec<f64> {
        self.reports(stage).find(|t| t.verdict == Verdict::Diverge).or(self.accumulated).map(factors_of).unwrap_or_default()
    }
}

/// Each of some numbers, with its parts rounded and not.
fn both(numbers: impl Iterator<Item = usize>, fault: impl Fn(usize, bool) -> Fault) -> Vec<Fault> {
    numbers.flat_map(|number| [fault(number, true), fault(number, false)]).collect()
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
