//! Which faults are worth testing on a step, and with which parameters: cheap looks at the data before expensive replays.

use super::lse::SeenLse;
use super::shards::SeenShards;
use crate::diff::fault::{CATALOGUE, Fault, Touches};
use crate::diff::replay::{
    Approximation, Bf16Sum, Chunks, Filter, LabelLogit, LseRounded, Padding, ProcessSum, ProcessesAdded, ScaleInBackward,
    ScatterOnto, Significand,
};
use crate::diff::step::Step;
use crate::diff::truth::Stage;
use crate::report::model::{MicrobatchReport, TensorReport, Verdict};
use fused_xent_kernels::contract::LabelTerm;
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
    /// The shards that its rows speak for.
    pub shards: &'a SeenShards,
    /// The exponential that its rows speak for.
    pub significand: Option<Significand>,
    /// Factors of its gradients, as they are beside the faults that were found.
    pub factors: &'a Factors,
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
/// Tiles that leave a tail: how many sizes are tried.
const MOST_TAILS: usize = 6;

/// Constant factors that the gradients may carry, fitted over all rows and as the median of the rows'.
#[derive(Debug, Default)]
pub struct Factors {
    /// dQ.
    pub d_hidden: Vec<f64>,
    /// dK of a microbatch; of the step where no microbatch has its own.
    pub d_unembedding: Vec<f64>,
    /// The accumulated dK.
    pub accumulated: Vec<f64>,
}

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
            Fault::LabelLogitBf16(_) => [
                LabelLogit::Rounded,
                LabelLogit::OfRoundedProducts,
                LabelLogit::RunningSum { products_rounded: false },
                LabelLogit::RunningSum { products_rounded: true },
            ]
            .map(Fault::LabelLogitBf16)
            .to_vec(),
            Fault::LseBf16(_) => [LseRounded::Backward, LseRounded::Output, LseRounded::Loss].map(Fault::LseBf16).to_vec(),
            Fault::DlogitsBf16 { .. } => [LabelTerm::Apart, LabelTerm::Joint].map(|label| Fault::DlogitsBf16 { label }).to_vec(),
            Fault::DkAccumulateBf16(_) => {
                let mut out = in_bf16(self.token_chunks(1), Fault::DkAccumulateBf16);
                for over in self.process_sums() {
                    let variant = |sum| Fault::DkAccumulateBf16OverProcesses { sum, over };
                    out.extend(in_bf16(self.token_chunks(over.processes), variant));
                }
                let over_step = |parts_rounded| Fault::DkAccumulateBf16OverMicrobatches { parts_rounded };
                out.extend([true, false].map(over_step).into_iter().filter(|_| several));
                out
            }
            Fault::DqAccumulateBf16(_) => in_bf16(chunks_of(&[shape.vocab], shape.vocab / 8), Fault::DqAccumulateBf16),
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
                tiles_that_end_in(ends, shape.vocab).take(MOST_TAILS).map(|tile| Fault::VocabTailDropped { tile }).collect()
            }
            Fault::TokenTailDropped { .. } => {
                let tails: Vec<(RangeInclusive<usize>, usize)> = self.token_tails().collect();
                let first = tails.first().cloned();
                let fits = |tile: &usize| tails.iter().all(|(ends, of)| ends.contains(&(of / tile * tile)));
                let tiles = first.into_iter().flat_map(|(ends, of)| tiles_that_end_in(Some(ends), of));
                tiles.filter(fits).take(MOST_TAILS).map(|tile| Fault::TokenTailDropped { tile }).collect()
            }
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
                let scout = |eps| Fault::GradientFilter(Filter { eps, tokens: 1, ids: FILTER_TILES[2], masked_count: false });
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
                let by_factor = factors_of(&self.factors.d_hidden).into_iter().map(|factor| Fault::DqCotangentMissing { factor });
                by_factor.chain([Fault::DqCotangentMissingAll]).collect()
            }
            Fault::DkCotangentMissing { .. } => {
                let by_factor =
                    factors_of(&self.factors.d_unembedding).into_iter().map(|factor| Fault::DkCotangentMissing { factor });
                by_factor.chain([Fault::DkCotangentMissingAll]).collect()
            }
            Fault::NotAveraged { .. } => {
                let Factors { d_hidden, d_unembedding, accumulated } = self.factors;
                let everywhere = factors_of(d_hidden).into_iter().chain(factors_of(d_unembedding));
                let mut out: Vec<Fault> = everywhere.map(|factor| Fault::NotAveraged { factor }).collect();
                let over_step = if several { factors_of(accumulated) } else { vec![] };
                out.extend(over_step.into_iter().map(|factor| Fault::NotAveragedOverMicrobatches { factor }));
                out
            }
            Fault::FirstCotangentForAll => when(weighted || masked),
            Fault::TokenWeightsIgnored => when(weighted),
            Fault::LabelOffByOne { .. } => {
                // A label at the end may come out at the other, or be lost.
                let last = problem.valid_columns().saturating_sub(1);
                let is = |label: &Label, column: usize| *label == Label::Column(column as u32);
                let at = |column: usize| step.microbatches.iter().any(|m| m.problem.labels().iter().any(|l| is(l, column)));
                let variants = [(false, last), (true, 0)].map(|(left, end)| {
                    let wraps = if at(end) { &[true, false][..] } else { &[true] };
                    wraps.iter().map(move |&wraps| Fault::LabelOffByOne { left, wraps })
                });
                variants.into_iter().flatten().collect()
            }
            Fault::ValidVocabIgnored(_) if problem.valid_columns() < shape.vocab => {
                [Padding::InBoth, Padding::InBackward].map(Fault::ValidVocabIgnored).to_vec()
            }
            Fault::ValidVocabIgnored(_) => vec![],
            Fault::SoftcapDerivativeMissing | Fault::SoftcapDerivativeMissingLabel => when(options.logit_softcap.is_some()),
            Fault::ZlossGradientMissing => when(options.z_loss > 0.0),
            Fault::LabelSmoothingIgnored => when(options.label_smoothing > 0.0),
            Fault::LogitScaleIgnored(_) if options.logit_scale != LossOptions::default().logit_scale => {
                let scales = [ScaleInBackward::NoFactor, ScaleInBackward::One, ScaleInBackward::OneInLseToo];
                scales.map(Fault::LogitScaleIgnored).to_vec()
            }
            Fault::LogitScaleIgnored(_) => vec![],
            Fault::DqNotReduced { .. } => self.shards.of_dq(shape.vocab),
            Fault::DkNotReduced { .. } => self.shards.of_dk(shape.tokens),
            Fault::LocalLse(_) => self.shards.of_lse(shape.vocab),
            Fault::LabelPerShard { .. } => self.shards.of_labels(shape.vocab),
            other => vec![other],
        }
    }

    /// Chunks that each process may cut its tokens into.
    fn token_chunks(&self, processes: usize) -> Vec<Chunks> {
        let own = |tokens: usize| tokens.div_ceil(processes);
        let lengths: Vec<usize> = self.step.microbatches.iter().map(|m| own(m.problem.shape().tokens)).collect();
        let longest = lengths.iter().copied().max().unwrap_or(1);
        let processes = Some(self.step.processes).filter(|&p| processes == 1 && p > 1 && !p.is_power_of_two());
        let unusual = processes.map(Chunks::Number).into_iter().chain([Chunks::Width(1)]);
        chunks_of(&lengths, longest.saturating_sub(1)).into_iter().chain(unusual).collect()
    }

    /// Where the rows of dQ end in zeros that should not be there, and of how many rows, in every microbatch with such a tail.
    fn token_tails(&self) -> impl Iterator<Item = (RangeInclusive<usize>, usize)> {
        let tail_of = |m: &MicrobatchReport| {
            let tensor = m.tensors.iter().find(|t| t.name == Stage::DHidden.name())?;
            let of = self.step.microbatches.iter().find(|microbatch| microbatch.index == m.microbatch)?.problem.shape().tokens;
            tensor.zero_tail.map(|[first, last]| (first..=last, of))
        };
        self.microbatches.iter().filter_map(tail_of)
    }

    /// Over the processes of the run: each sums its own tokens.
    fn process_sums(&self) -> Vec<ProcessSum> {
        let processes = self.step.processes;
        let added = [ProcessesAdded::F32, ProcessesAdded::F32ThenBf16, ProcessesAdded::Bf16];
        if processes < 2 { vec![] } else { added.map(|added| ProcessSum { processes, added }).to_vec() }
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
        let seen = self.significand.map(Approximation::Significand);
        logs.chain(exps).chain(recorded).chain(seen).map(Fault::ApproximateExpLog).collect()
    }

    fn reports(&self, stage: Stage) -> impl Iterator<Item = &TensorReport> {
        self.microbatches.iter().flat_map(|m| &m.tensors).filter(move |t| t.name == stage.name())
    }
}

/// Where a tail of zero rows that should not be 0 can begin, in all of `tensors` that have one.
fn tail<'a>(tensors: impl Iterator<Item = &'a TensorReport>) -> Option<RangeInclusive<usize>> {
    let [first, last] = tensors.filter_map(|t| t.zero_tail).reduce(|a, b| [a[0].max(b[0]), a[1].min(b[1])])?;
    Some(first..=last)
}

/// Factors near the fitted ones: whole numbers and their reciprocals, which need no other fault beside them, before the fits
/// themselves.
fn factors_of(fitted: &[f64]) -> Vec<f64> {
    let mut out: Vec<f64> = Vec::new();
    for &alpha in fitted.iter().filter(|alpha| **alpha != 0.0 && alpha.is_finite()) {
        let whole = if alpha.abs() >= 1.0 { alpha.round() } else { 1.0 / (1.0 / alpha).round() };
        let off = (whole / alpha - 1.0).abs();
        match whole {
            1.0 => out.push(alpha),
            whole if off < EQUAL => out.push(whole),
            whole if off < NEAR => out.extend([whole, alpha]),
            _ => out.push(alpha),
        }
    }
    let mut seen: Vec<f64> = Vec::new();
    out.retain(|&factor| {
        let new = seen.iter().all(|other| *other != factor);
        seen.push(factor);
        new
    });
    out
}

/// How near a fitted factor must be to a whole number to be it, and to be worth trying.
const EQUAL: f64 = 2e-3;
const NEAR: f64 = 0.2;

/// Tile sizes whose last whole tile of so many rows ends in `ends`, the usual ones first, then multiples of 8.
fn tiles_that_end_in(ends: Option<RangeInclusive<usize>>, of: usize) -> impl Iterator<Item = usize> {
    let unusual = (8..of).step_by(8).filter(|tile| !TILES.contains(tile));
    let others = (1..of).filter(|tile| !tile.is_multiple_of(8));
    let fits = move |tile: &usize| ends.as_ref().is_some_and(|ends| *tile < of && ends.contains(&(of / tile * tile)));
    TILES.into_iter().chain(unusual).chain(others).filter(fits)
}

/// Equal chunks of sums of these lengths, a power of two of them and at most so many; and usual widths that are none of these.
fn chunks_of(lengths: &[usize], most: usize) -> Vec<Chunks> {
    let widths = |chunks: Chunks| -> Vec<usize> { lengths.iter().map(|&of| chunks.width(of)).collect() };
    let mut out: Vec<Chunks> = (1..).map(|i| 1usize << i).take_while(|&number| number <= most).map(Chunks::Number).collect();
    let equal: Vec<Vec<usize>> = out.iter().map(|&chunks| widths(chunks)).collect();
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let usual = TILES.into_iter().filter(|&width| width < longest).map(Chunks::Width);
    out.extend(usual.filter(|&chunks| !equal.contains(&widths(chunks))));
    out
}

/// A fault of each way to cut a sum into chunks, with its parts rounded and not.
fn in_bf16(chunks: Vec<Chunks>, fault: impl Fn(Bf16Sum) -> Fault) -> Vec<Fault> {
    let sums = chunks.into_iter().flat_map(|chunks| [true, false].map(|parts_rounded| Bf16Sum { chunks, parts_rounded }));
    sums.map(fault).collect()
}
