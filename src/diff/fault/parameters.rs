//! A fault's parameters: how they are written, read and reported.

use super::{CATALOGUE, Fault, Gradients};
use crate::diff::error::DiffError;
use crate::diff::replay::{
    Approximation, Bf16Sum, Chunks, Filter, LabelLogit, LseRounded, Padding, ProcessSum, ProcessesAdded, SIGNIFICAND_TERMS,
    ScaleInBackward, ScatterOnto, Significand, Split,
};
use fused_xent_kernels::contract::LabelTerm;
use serde_json::{Map, Value};

type Variant = (&'static str, &'static str, &'static str, fn(Fault) -> Fault);

/// Variants of a fault that are chosen by a word: slug, parameter, word, and the fault with it.
const VARIANTS: &[Variant] = &[
    ("label-logit-bf16", "rounded", "sum", |_| Fault::LabelLogitBf16(LabelLogit::Rounded)),
    ("label-logit-bf16", "rounded", "products", |_| Fault::LabelLogitBf16(LabelLogit::OfRoundedProducts)),
    ("label-logit-bf16", "rounded", "running-sum", |_| Fault::LabelLogitBf16(LabelLogit::RunningSum { products_rounded: false })),
    ("label-logit-bf16", "rounded", "running-sum-and-products", |_| {
        Fault::LabelLogitBf16(LabelLogit::RunningSum { products_rounded: true })
    }),
    ("lse-bf16", "seen_by", "backward", |_| Fault::LseBf16(LseRounded::Backward)),
    ("lse-bf16", "seen_by", "output", |_| Fault::LseBf16(LseRounded::Output)),
    ("lse-bf16", "seen_by", "loss", |_| Fault::LseBf16(LseRounded::Loss)),
    ("dlogits-bf16", "label", "apart", |_| Fault::DlogitsBf16 { label: LabelTerm::Apart }),
    ("dlogits-bf16", "label", "joint", |_| Fault::DlogitsBf16 { label: LabelTerm::Joint }),
    ("label-scatter-bf16", "onto", "zeros", |fault| onto(fault, ScatterOnto::Zeros)),
    ("label-scatter-bf16", "onto", "zeros-then-bf16", |fault| onto(fault, ScatterOnto::ZerosThenBf16)),
    ("label-scatter-bf16", "onto", "lse-part", |fault| onto(fault, ScatterOnto::LsePart)),
    ("label-scatter-bf16", "processes_added_in", "bf16", |fault| processes_added(fault, ProcessesAdded::Bf16)),
    ("label-scatter-bf16", "processes_added_in", "f32-then-bf16", |fault| processes_added(fault, ProcessesAdded::F32ThenBf16)),
    ("dk-accumulate-bf16", "processes_added_in", "bf16", |fault| processes_added(fault, ProcessesAdded::Bf16)),
    ("dk-accumulate-bf16", "processes_added_in", "f32-then-bf16", |fault| processes_added(fault, ProcessesAdded::F32ThenBf16)),
    ("dk-accumulate-bf16", "over", "microbatches", |fault| match fault {
        Fault::DkAccumulateBf16(Bf16Sum { parts_rounded, .. }) => Fault::DkAccumulateBf16OverMicrobatches { parts_rounded },
        other => other,
    }),
    ("label-tile-edge", "edge", "last", |fault| match fault {
        Fault::LabelTileEdge { tile } => Fault::LabelTileEdgeLast { tile },
        other => other,
    }),
    ("ignored-leak", "label", "stored", |_| Fault::IgnoredLeak { label_zero: false }),
    ("ignored-leak", "label", "zero", |_| Fault::IgnoredLeak { label_zero: true }),
    ("ignored-leak", "label", "none", |_| Fault::IgnoredLeakUnlabelled),
    ("dq-cotangent-missing", "missing", "g", |_| Fault::DqCotangentMissingAll),
    ("dk-cotangent-missing", "missing", "g", |_| Fault::DkCotangentMissingAll),
    ("not-averaged", "over", "microbatches", |fault| match fault {
        Fault::NotAveraged { factor } => Fault::NotAveragedOverMicrobatches { factor },
        other => other,
    }),
    ("last-microbatch-only", "divided", "no", |_| Fault::LastMicrobatchOnlyUndivided),
    ("label-off-by-one", "to", "right", |fault| to_the_left(fault, false)),
    ("label-off-by-one", "to", "left", |fault| to_the_left(fault, true)),
    ("label-off-by-one", "beyond", "wraps", |fault| wrapping(fault, true)),
    ("label-off-by-one", "beyond", "lost", |fault| wrapping(fault, false)),
    ("valid-vocab-ignored", "in", "both", |_| Fault::ValidVocabIgnored(Padding::InBoth)),
    ("valid-vocab-ignored", "in", "backward", |_| Fault::ValidVocabIgnored(Padding::InBackward)),
    ("logit-scale-ignored", "missing", "factor", |_| Fault::LogitScaleIgnored(ScaleInBackward::NoFactor)),
    ("logit-scale-ignored", "missing", "all", |_| Fault::LogitScaleIgnored(ScaleInBackward::One)),
    ("logit-scale-ignored", "missing", "all-in-lse-too", |_| Fault::LogitScaleIgnored(ScaleInBackward::OneInLseToo)),
    ("dq-not-reduced", "split", "even", evenly),
    ("dk-not-reduced", "split", "even", evenly),
    ("local-lse", "split", "even", evenly),
    ("label-per-shard", "of", "dq", |fault| per_shard_of(fault, Gradients::Dq)),
    ("label-per-shard", "of", "dk", |fault| per_shard_of(fault, Gradients::Dk)),
    ("label-per-shard", "of", "both", |fault| per_shard_of(fault, Gradients::Both)),
    ("gradient-filter", "masked", "count", |fault| counting_masked(fault, true)),
    ("gradient-filter", "masked", "left-out", |fault| counting_masked(fault, false)),
    ("approximate-exp-log", "of", "log", |_| Fault::ApproximateExpLog(Approximation::Log { degree: 4 })),
    ("approximate-exp-log", "of", "exp", |_| Fault::ApproximateExpLog(Approximation::Exp { degree: 3, in_backward: true })),
    ("approximate-exp-log", "of", "exp-in-lse", |_| {
        Fault::ApproximateExpLog(Approximation::Exp { degree: 3, in_backward: false })
    }),
    ("approximate-exp-log", "of", "exp2-polynomial", |_| Fault::ApproximateExpLog(Approximation::Significand(CUBIC))),
    ("approximate-exp-log", "of", "exp-bf16", |_| Fault::ApproximateExpLog(Approximation::ExpBf16 { in_backward: true })),
    ("approximate-exp-log", "of", "exp-bf16-in-lse", |_| Fault::ApproximateExpLog(Approximation::ExpBf16 { in_backward: false })),
];

/// Of exp: a cubic polynomial for 2^f that is right to 10⁻⁴.
const CUBIC: Significand = Significand { coefficients: [1.0, 0.6951, 0.2276, 0.0771, 0.0, 0.0], lse_as_recorded: false };
/// The parameters of a polynomial's coefficients.
const COEFFICIENTS: [&str; SIGNIFICAND_TERMS] = ["c0", "c1", "c2", "c3", "c4", "c5"];

fn onto(mut fault: Fault, to: ScatterOnto) -> Fault {
    if let Fault::LabelScatterBf16 { onto, .. } | Fault::LabelScatterBf16OverProcesses { onto, .. } = &mut fault {
        *onto = to;
    }
    fault
}

fn to_the_left(mut fault: Fault, to: bool) -> Fault {
    if let Fault::LabelOffByOne { left, .. } = &mut fault {
        *left = to;
    }
    fault
}

fn wrapping(mut fault: Fault, to: bool) -> Fault {
    if let Fault::LabelOffByOne { wraps, .. } = &mut fault {
        *wraps = to;
    }
    fault
}

fn evenly(mut fault: Fault) -> Fault {
    if let Fault::DqNotReduced { split, .. } | Fault::DkNotReduced { split, .. } | Fault::LocalLse(split) = &mut fault {
        split.even = true;
    }
    fault
}

fn counting_masked(mut fault: Fault, to: bool) -> Fault {
    if let Fault::GradientFilter(filter) = &mut fault {
        filter.masked_count = to;
    }
    fault
}

fn per_shard_of(mut fault: Fault, gradients: Gradients) -> Fault {
    if let Fault::LabelPerShard { of, .. } = &mut fault {
        *of = gradients;
    }
    fault
}

fn processes_added(mut fault: Fault, added: ProcessesAdded) -> Fault {
    if let Fault::LabelScatterBf16OverProcesses { over, .. } | Fault::DkAccumulateBf16OverProcesses { over, .. } = &mut fault {
        over.added = added;
    }
    fault
}

fn added_in(over: ProcessSum) -> Value {
    match over.added {
        ProcessesAdded::F32 => "f32",
        ProcessesAdded::F32ThenBf16 => "f32-then-bf16",
        ProcessesAdded::Bf16 => "bf16",
    }
    .into()
}

fn scattered_onto(onto: ScatterOnto) -> &'static str {
    match onto {
        ScatterOnto::Zeros => "zeros, then the lse part in f32",
        ScatterOnto::ZerosThenBf16 => "zeros, then the lse part in bf16",
        ScatterOnto::LsePart => "the lse part",
    }
}

impl Fault {
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
                expected: fault.accepted().join(", "),
            };
            let (name, value) = parameter.split_once('=').ok_or_else(bad)?;
            fault = fault.with(name, value).ok_or_else(bad)?;
        }
        Ok(fault)
    }

    /// The parameters that can be set: names of numbers, and variants in words.
    fn accepted(&self) -> Vec<String> {
        let variants =
            VARIANTS.iter().filter(|(slug, ..)| *slug == self.slug()).map(|(_, name, word, _)| format!("{name}={word}"));
        let numbers = self.parameters().into_iter().filter(|(_, value)| value.is_number()).map(|(name, _)| name);
        let widths = matches!(self, Fault::DkAccumulateBf16(_) | Fault::DqAccumulateBf16(_)).then(|| "width".to_owned());
        let flags = self.parameters().into_iter().filter(|(_, v)| v.is_boolean()).map(|(name, _)| format!("{name}=true|false"));
        numbers.chain(widths).chain(flags).chain(variants).collect()
    }

    /// The same fault with another value of a parameter; `None` if it cannot have it.
    fn with(self, name: &str, value: &str) -> Option<Self> {
        if let Some((.., variant)) = VARIANTS.iter().find(|(s, n, word, _)| (*s, *n, *word) == (self.slug(), name, value)) {
            return Some(variant(self));
        }
        let mut changed = self;
        if let Ok(flag) = value.parse::<bool>() {
            match (&mut changed, name) {
                (
                    Fault::LabelScatterBf16 { hits_rounded: field, .. }
                    | Fault::LabelScatterBf16OverProcesses { hits_rounded: field, .. },
                    "hits_rounded",
                )
                | (
                    Fault::DkAccumulateBf16(Bf16Sum { parts_rounded: field, .. })
                    | Fault::DkAccumulateBf16OverProcesses { sum: Bf16Sum { parts_rounded: field, .. }, .. }
                    | Fault::DkAccumulateBf16OverMicrobatches { parts_rounded: field }
                    | Fault::DqAccumulateBf16(Bf16Sum { parts_rounded: field, .. }),
                    "parts_rounded",
                ) => *field = flag,
                _ => return None,
            }
            return Some(changed);
        }
        let value: f64 = value.parse().ok().filter(|v: &f64| v.is_finite())?;
        match (&mut changed, name) {
            (Fault::ApproximateExpLog(Approximation::Significand(Significand { coefficients, .. })), name)
                if COEFFICIENTS.contains(&name) =>
            {
                let place = COEFFICIENTS.iter().position(|c| *c == name)?;
                coefficients[place] = value;
                return Some(changed);
            }
            (Fault::GradientFilter(filter), "eps") if value > 0.0 => {
                filter.eps = value;
                return Some(changed);
            }
            (
                Fault::NotAveraged { factor } | Fault::DqCotangentMissing { factor } | Fault::DkCotangentMissing { factor },
                "factor",
            ) => {
                *factor = value;
                return Some(changed);
            }
            _ => {}
        }
        let whole = (value.fract() == 0.0 && value >= 0.0).then_some(value as usize)?;
        match (&mut changed, name) {
            (Fault::LseTileMissing { index: field, .. }, "index")
            | (Fault::DqNotReduced { shard: field, .. } | Fault::DkNotReduced { shard: field, .. }, "shard") => *field = whole,
            _ if whole == 0 => return None,
            (Fault::DkAccumulateBf16(sum) | Fault::DqAccumulateBf16(sum), "width") => sum.chunks = Chunks::Width(whole),
            (Fault::LabelScatterBf16 { hits_rounded, onto }, "processes") => {
                let over = ProcessSum { processes: whole, added: ProcessesAdded::F32 };
                changed = Fault::LabelScatterBf16OverProcesses { hits_rounded: *hits_rounded, onto: *onto, over };
            }
            (Fault::DkAccumulateBf16(sum), "processes") => {
                let over = ProcessSum { processes: whole, added: ProcessesAdded::F32 };
                changed = Fault::DkAccumulateBf16OverProcesses { sum: *sum, over };
            }
            (Fault::DkAccumulateBf16(sum) | Fault::DkAccumulateBf16OverProcesses { sum, .. }, "chunks")
            | (Fault::DqAccumulateBf16(sum), "tiles") => sum.chunks = Chunks::Number(whole),
            (Fault::VocabPadUnmasked { pad: field }, "pad")
            | (Fault::GradientFilter(Filter { tokens: field, .. }), "token_tile")
            | (Fault::GradientFilter(Filter { ids: field, .. }), "vocab_tile")
            | (
                Fault::VocabTailDropped { tile: field }
                | Fault::TokenTailDropped { tile: field }
                | Fault::LseTileMissing { tile: field, .. }
                | Fault::LabelTileEdge { tile: field }
                | Fault::LabelTileEdgeLast { tile: field },
                "tile",
            )
            | (
                Fault::DqNotReduced { split: Split { shards: field, .. }, .. }
                | Fault::DkNotReduced { split: Split { shards: field, .. }, .. }
                | Fault::LocalLse(Split { shards: field, .. })
                | Fault::LabelPerShard { shards: field, .. },
                "shards",
            ) => *field = whole,
            (Fault::GradientFilter(filter), "tile") => (filter.tokens, filter.ids) = (whole, whole),
            (Fault::ApproximateExpLog(Approximation::Log { degree } | Approximation::Exp { degree, .. }), "degree")
                if (1..=12).contains(&whole) =>
            {
                *degree = whole;
            }
            _ => return None,
        }
        Some(changed)
    }

    /// Its parameters by the catalogue's names.
    pub fn parameters(&self) -> Map<String, Value> {
        let pairs: Vec<(&str, Value)> = match *self {
            Fault::LabelScatterBf16 { hits_rounded, onto } => {
                vec![("hits_rounded", hits_rounded.into()), ("onto", scattered_onto(onto).into())]
            }
            Fault::LabelLogitBf16(label_logit) => match label_logit {
                LabelLogit::Exact => vec![],
                LabelLogit::Rounded => vec![("rounded", "sum".into())],
                LabelLogit::OfRoundedProducts => vec![("rounded", "products".into())],
                LabelLogit::RunningSum { products_rounded: false } => vec![("rounded", "running-sum".into())],
                LabelLogit::RunningSum { products_rounded: true } => vec![("rounded", "running-sum-and-products".into())],
            },
            Fault::LseBf16(rounded) => match rounded {
                LseRounded::Nowhere => vec![],
                LseRounded::Backward => vec![("seen_by", "backward".into())],
                LseRounded::Output => vec![("seen_by", "output".into())],
                LseRounded::Loss => vec![("seen_by", "loss".into())],
            },
            Fault::DlogitsBf16 { label } => {
                vec![("label", if label == LabelTerm::Joint { "joint" } else { "apart" }.into())]
            }
            Fault::DkAccumulateBf16(sum) => chunks(sum, "chunks").into(),
            Fault::LabelScatterBf16OverProcesses { hits_rounded, onto, over } => vec![
                ("hits_rounded", hits_rounded.into()),
                ("onto", scattered_onto(onto).into()),
                ("processes", over.processes.into()),
                ("processes_added_in", added_in(over)),
            ],
            Fault::DkAccumulateBf16OverProcesses { sum, over } => {
                let processes = ("processes", over.processes.into());
                chunks(sum, "chunks").into_iter().chain([processes, ("processes_added_in", added_in(over))]).collect()
            }
            Fault::GradientFilter(Filter { eps, tokens, ids, masked_count }) => vec![
                ("eps", eps.into()),
                ("token_tile", tokens.into()),
                ("vocab_tile", ids.into()),
                ("masked", if masked_count { "count" } else { "left-out" }.into()),
            ],
            Fault::ApproximateExpLog(approximation) => match approximation {
                Approximation::None => vec![],
                Approximation::Log { degree } => vec![("of", "log".into()), ("degree", degree.into())],
                Approximation::Exp { degree, in_backward } => {
                    vec![("of", if in_backward { "exp" } else { "exp in lse" }.into()), ("degree", degree.into())]
                }
                Approximation::ExpBf16 { in_backward } => {
                    vec![("of", if in_backward { "exp in bf16" } else { "exp in bf16 in lse" }.into())]
                }
                Approximation::Significand(Significand { coefficients, lse_as_recorded }) => {
                    let of =
                        [("of", "exp2-polynomial".into()), ("lse", if lse_as_recorded { "as recorded" } else { "by it" }.into())];
                    let degree = coefficients.iter().rposition(|&c| c != 0.0).unwrap_or(0);
                    let coefficients = COEFFICIENTS.into_iter().zip(coefficients).take(degree + 1);
                    of.into_iter().chain(coefficients.map(|(name, c)| (name, c.into()))).collect()
                }
                Approximation::AsRecorded => vec![("of", "lse, by an unknown formula".into())],
            },
            Fault::DkAccumulateBf16OverMicrobatches { parts_rounded } => {
                vec![("over", "microbatches".into()), ("parts_rounded", parts_rounded.into())]
            }
            Fault::DqAccumulateBf16(sum) => chunks(sum, "tiles").into(),
            Fault::LabelOffByOne { left, wraps } => {
                vec![("to", if left { "left" } else { "right" }.into()), ("beyond", if wraps { "wraps" } else { "lost" }.into())]
            }
            Fault::ValidVocabIgnored(padding) => {
                vec![("in", if padding == Padding::InBackward { "backward" } else { "both" }.into())]
            }
            Fault::VocabPadUnmasked { pad } => vec![("pad", pad.into())],
            Fault::VocabTailDropped { tile } | Fault::TokenTailDropped { tile } => vec![("tile", tile.into())],
            Fault::LabelTileEdge { tile } => vec![("tile", tile.into()), ("edge", "first".into())],
            Fault::LabelTileEdgeLast { tile } => vec![("tile", tile.into()), ("edge", "last".into())],
            Fault::IgnoredLeak { label_zero } => vec![("label", if label_zero { "zero" } else { "stored" }.into())],
            Fault::IgnoredLeakUnlabelled => vec![("label", "none".into())],
            Fault::DqCotangentMissingAll | Fault::DkCotangentMissingAll => vec![("missing", "g".into())],
            Fault::LastMicrobatchOnly => vec![("divided", "by microbatches".into())],
            Fault::LastMicrobatchOnlyUndivided => vec![("divided", "no".into())],
            Fault::LogitScaleIgnored(scale) => match scale {
                ScaleInBackward::Right => vec![],
                ScaleInBackward::NoFactor => vec![("missing", "factor".into())],
                ScaleInBackward::One => vec![("missing", "all".into())],
                ScaleInBackward::OneInLseToo => vec![("missing", "all-in-lse-too".into())],
            },
            Fault::LseTileMissing { tile, index } => vec![("tile", tile.into()), ("index", index.into())],
            Fault::NotAveraged { factor } | Fault::DqCotangentMissing { factor } | Fault::DkCotangentMissing { factor } => {
                vec![("factor", factor.into())]
            }
            Fault::NotAveragedOverMicrobatches { factor } => vec![("factor", factor.into()), ("over", "microbatches".into())],
            Fault::DqNotReduced { split, shard } | Fault::DkNotReduced { split, shard } => {
                std::iter::once(("shard", shard.into())).chain(shards(split)).collect()
            }
            Fault::LocalLse(split) => shards(split).into(),
            Fault::LabelPerShard { shards, of } => {
                let of = match of {
                    Gradients::Dq => "dq",
                    Gradients::Dk => "dk",
                    Gradients::Both => "both",
                };
                vec![("shards", shards.into()), ("of", of.into())]
            }
            _ => vec![],
        };
        pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

type Parameter = (&'static str, Value);

fn chunks(sum: Bf16Sum, name: &'static str) -> [Parameter; 2] {
    let cut = match sum.chunks {
        Chunks::Number(number) => (name, number.into()),
        Chunks::Width(width) => ("width", width.into()),
    };
    [cut, ("parts_rounded", sum.parts_rounded.into())]
}

fn shards(split: Split) -> [Parameter; 2] {
    [("shards", split.shards.into()), ("split", if split.even { "even" } else { "equal" }.into())]
}
