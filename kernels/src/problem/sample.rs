//! Some rows of the gradients of a large problem, and the smaller problems that those rows are the gradients of.

use super::{Floats, Label, Layout, Problem, ProblemError, Shape};
use half::{bf16, f16};

/// The tokens whose rows of dQ, and the vocab ids whose rows of dK, are wanted: in order, each once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    tokens: Vec<usize>,
    ids: Vec<usize>,
}

impl Sample {
    /// Of the gradients of a problem of this shape; `tokens` and `ids` come in any order, repeated or not.
    ///
    /// # Errors
    /// A token from N on, or a vocab id from V on.
    pub fn new(shape: Shape, tokens: Vec<usize>, ids: Vec<usize>) -> Result<Self, ProblemError> {
        let sorted = |mut rows: Vec<usize>| {
            rows.sort_unstable();
            rows.dedup();
            rows
        };
        let sample = Self { tokens: sorted(tokens), ids: sorted(ids) };
        sample.require_within(shape)?;
        Ok(sample)
    }

    /// Every row.
    pub fn all(shape: Shape) -> Self {
        Self { tokens: (0..shape.tokens).collect(), ids: (0..shape.vocab).collect() }
    }

    /// The rows of dQ.
    pub fn tokens(&self) -> &[usize] {
        &self.tokens
    }

    /// The rows of dK.
    pub fn ids(&self) -> &[usize] {
        &self.ids
    }

    /// # Errors
    /// If a row is none of the gradients of a problem of this shape.
    pub(crate) fn require_within(&self, shape: Shape) -> Result<(), ProblemError> {
        let within = |what, rows: &[usize], count| match rows.last() {
            Some(&found) if found >= count => Err(ProblemError::SampleRow { what, found, count }),
            _ => Ok(()),
        };
        within("token", &self.tokens, shape.tokens)?;
        within("vocab id", &self.ids, shape.vocab)
    }
}

/// Elements copied from a tensor, in its dtype.
enum Copied {
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
    F32(Vec<f32>),
}

impl Copied {
    fn new(from: Floats, places: impl Iterator<Item = usize>) -> Self {
        match from {
            Floats::Bf16(s) => Self::Bf16(places.map(|i| s[i]).collect()),
            Floats::F16(s) => Self::F16(places.map(|i| s[i]).collect()),
            Floats::F32(s) => Self::F32(places.map(|i| s[i]).collect()),
        }
    }

    fn floats(&self) -> Floats<'_> {
        match self {
            Self::Bf16(v) => Floats::Bf16(v),
            Self::F16(v) => Floats::F16(v),
            Self::F32(v) => Floats::F32(v),
        }
    }
}

impl Problem<'_> {
    /// Gives `f` the problem of these tokens alone: its dQ is their rows of this one's.
    pub(crate) fn with_tokens<R>(&self, tokens: &[usize], f: impl FnOnce(&Problem) -> R) -> R {
        let d = self.shape.hidden;
        let hidden = Copied::new(self.hidden, tokens.iter().flat_map(|n| n * d..(n + 1) * d));
        f(&Problem {
            hidden: hidden.floats(),
            shape: Shape { tokens: tokens.len(), ..self.shape },
            labels: tokens.iter().map(|&n| self.labels[n]).collect(),
            weights: tokens.iter().map(|&n| self.weights[n]).collect(),
            ..self.clone()
        })
    }

    /// Gives `f` the vocab shard that holds these ids, sorted, alone: its dK is their rows of this one's.
    ///
    /// Neither the loss nor a gradient depends on how the valid ids are numbered among themselves, nor the padding ones. So
    /// `ids` may be called those around the border between both, of which any number on either side makes a shard.
    pub(crate) fn with_ids<R>(&self, ids: &[usize], f: impl FnOnce(&Problem) -> R) -> R {
        let Shape { hidden: d, vocab, .. } = self.shape;
        let place = |v: usize, i: usize| if self.layout == Layout::Vd { v * d + i } else { i * vocab + v };
        let unembedding = Copied::new(self.unembedding, ids.iter().flat_map(|&v| (0..d).map(move |i| place(v, i))));
        let column = |label: &Label| match *label {
            Label::Column(id) => ids.binary_search(&(id as usize)).map_or(Label::Elsewhere, |c| Label::Column(c as u32)),
            other => other,
        };
        let valid = ids.partition_point(|&v| v < self.valid_columns());
        let start = self.valid_total - valid;
        f(&Problem {
            unembedding: unembedding.floats(),
            layout: Layout::Vd,
            shape: Shape { vocab: ids.len(), ..self.shape },
            labels: self.labels.iter().map(column).collect(),
            columns: start..start + ids.len(),
            ..self.clone()
        })
    }
}
