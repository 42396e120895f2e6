//! A fault's parameters: how they are written, read and reported.

use super::{CATALOGUE, Fault};
use crate::diff::error::DiffError;
use crate::diff::replay::{Approximation, Filter, ProcessSum, ScatterOnto};
use serde_json::{Map, Value};

type Variant = (&'static str, &'static str, &'static str, fn(Fault) -> Fault);

/// Variants of a fault that are chosen by a word: slug, parameter, word, and the fault with it.
const VARIANTS: &[Variant] = &[
    ("label-scatter-bf16", "onto", "zeros", |fault| onto(fault, ScatterOnto::Zeros)),
    ("label-scatter-bf16", "onto", "zeros-then-bf16", |fault| onto(fault, ScatterOnto::ZerosThenBf16)),
    ("label-scatter-bf16", "onto", "lse-part", |fault| onto(fault, ScatterOnto::LsePart)),
    ("label-scatter-bf16", "processes_added_in", "bf16", processes_in_bf16),
    ("dk-accumulate-bf16", "processes_added_in", "bf16", processes_in_bf16),
    ("dk-accumulate-bf16", "over", "microbatches", |_| Fault::DkAccumulateBf16OverMicrobatches),
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
    ("logit-scale-ignored", "missing", "all", |_| Fault::LogitScaleIgnoredInLogits),
    ("approximate-exp-log", "of", "log", |_| Fault::ApproximateExpLog(Approximation::Log { degree: 4 })),
    ("approximate-exp-log", "of", "exp", |_| Fault::ApproximateExpLog(Approximation::Exp { degree: 3, in_backward: true })),
    ("approximate-exp-log", "of", "exp-in-lse", |_| {
        Fault::ApproximateExpLog(Approximation::Exp { degree: 3, in_backward: false })
    }),
    ("approximate-exp-log", "of", "exp-bf16", |_| Fault::ApproximateExpLog(Approximation::ExpBf16 { in_backward: true })),
    ("approximate-exp-log", "of", "exp-bf16-in-lse", |_| Fault::ApproximateExpLog(Approximation::ExpBf16 { in_backward: false })),
];

fn onto(mut fault: Fault, to: ScatterOnto) -> Fault {
    if let Fault::LabelScatterBf16 { onto, .. } | Fault::LabelScatterBf16OverProcesses { onto, .. } = &mut fault {
        *onto = to;
    }
    fault
}

fn processes_in_bf16(mut fault: Fault) -> Fault {
    if let Fault::LabelScatterBf16OverProcesses { over, .. } | Fault::DkAccumulateBf16OverProcesses { over, .. } = &mut fault {
        over.bf16 = true;
    }
    fault
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
        let widths = matches!(self, Fault::DkAccumulateBf16 { .. } | Fault::DqAccumulateBf16 { .. }).then(|| "width".to_owned());
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
                    Fault::DkAccumulateBf16 { parts_rounded: field, .. }
                    | Fault::DkAccumulateBf16ByWidth { parts_rounded: field, .. }
                    | Fault::DkAccumulateBf16OverProcesses { parts_rounded: field, .. }
                    | Fault::DqAccumulateBf16 { parts_rounded: field, .. }
                    | Fault::DqAccumulateBf16ByWidth { parts_rounded: field, .. },
                    "parts_rounded",
                ) => *field = flag,
                _ => return None,
            }
            return Some(changed);
        }
        let value: f64 = value.parse().ok().filter(|v: &f64| v.is_finite())?;
        match (&mut changed, name) {
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
            (Fault::DkAccumulateBf16 { parts_rounded, .. }, "width") => {
                changed = Fault::DkAccumulateBf16ByWidth { width: whole, parts_rounded: *parts_rounded };
            }
            (Fault::DqAccumulateBf16 { parts_rounded, .. }, "width") => {
                changed = Fault::DqAccumulateBf16ByWidth { width: whole, parts_rounded: *parts_rounded };
            }
            (Fault::LabelScatterBf16 { hits_rounded, onto }, "processes") => {
                let over = ProcessSum { processes: whole, bf16: false };
                changed = Fault::LabelScatterBf16OverProcesses { hits_rounded: *hits_rounded, onto: *onto, over };
            }
            (Fault::DkAccumulateBf16 { chunks, parts_rounded }, "processes") => {
                let over = ProcessSum { processes: whole, bf16: false };
                changed = Fault::DkAccumulateBf16OverProcesses { chunks: *chunks, parts_rounded: *parts_rounded, over };
            }
            (
                Fault::DkAccumulateBf16 { chunks: field, .. } | Fault::DkAccumulateBf16OverProcesses { chunks: field, .. },
                "chunks",
            )
            | (Fault::DqAccumulateBf16 { tiles: field, .. }, "tiles")
            | (Fault::VocabPadUnmasked { pad: field }, "pad")
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
                Fault::DqNotReduced { shards: field, .. }
                | Fault::DkNotReduced { shards: field, .. }
                | Fault::LocalLse { shards: field }
                | Fault::LabelPerShard { shards: field },
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
            Fault::DkAccumulateBf16 { chunks, parts_rounded } => {
                vec![("chunks", chunks.into()), ("parts_rounded", parts_rounded.into())]
            }
            Fault::LabelScatterBf16OverProcesses { hits_rounded, onto, over } => vec![
                ("hits_rounded", hits_rounded.into()),
                ("onto", scattered_onto(onto).into()),
                ("processes", over.processes.into()),
                ("processes_added_in", if over.bf16 { "bf16" } else { "f32" }.into()),
            ],
            Fault::DkAccumulateBf16ByWidth { width, parts_rounded } => {
                vec![("width", width.into()), ("parts_rounded", parts_rounded.into())]
            }
            Fault::DkAccumulateBf16OverProcesses { chunks, parts_rounded, over } => vec![
                ("chunks", chunks.into()),
                ("parts_rounded", parts_rounded.into()),
                ("processes", over.processes.into()),
                ("processes_added_in", if over.bf16 { "bf16" } else { "f32" }.into()),
            ],
            Fault::DqAccumulateBf16ByWidth { width, parts_rounded } => {
                vec![("width", width.into()), ("parts_rounded", parts_rounded.into())]
            }
            Fault::GradientFilter(Filter { eps, tokens, ids }) => {
                vec![("eps", eps.into()), ("token_tile", tokens.into()), ("vocab_tile", ids.into())]
            }
            Fault::ApproximateExpLog(approximation) => match approximation {
                Approximation::None => vec![],
                Approximation::Log { degree } => vec![("of", "log".into()), ("degree", degree.into())],
                Approximation::Exp { degree, in_backward } => {
                    vec![("of", if in_backward { "exp" } else { "exp in lse" }.into()), ("degree", degree.into())]
                }
                Approximation::ExpBf16 { in_backward } => {
                    vec![("of", if in_backward { "exp in bf16" } else { "exp in bf16 in lse" }.into())]
                }
                Approximation::AsRecorded => vec![("of", "lse, by an unknown formula".into())],
            },
            Fault::DkAccumulateBf16OverMicrobatches => vec![("over", "microbatches".into())],
            Fault::DqAccumulateBf16 { tiles, parts_rounded } => {
                vec![("tiles", tiles.into()), ("parts_rounded", parts_rounded.into())]
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
            Fault::LogitScaleIgnored => vec![("missing", "factor".into())],
            Fault::LogitScaleIgnoredInLogits => vec![("missing", "all".into())],
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
}
