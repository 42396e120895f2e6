//! Shapes, inputs and options of one fused cross-entropy. Everything is validated here, once; behind this door the code assumes.
//!
//! A [`Problem`] is one microbatch of logits `z = scale · Q·Kᵀ` with what turns them into per-token losses: the targets,
//! the mask, and the options that change a logit or a per-token loss ([`LossOptions`]). How the per-token losses add up
//! to the number that training minimises is the business of [`crate::reduction`].

mod sample;

pub use sample::Sample;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::ops::Range;

/// The float types in which inputs come and gradients leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// bfloat16: 8 bits of significand.
    Bf16,
    /// IEEE half precision: 11 bits of significand.
    F16,
    /// IEEE single precision: 24 bits of significand.
    F32,
}

impl DType {
    /// The name used in dumps and reports: `bfloat16`, `float16`, `float32`.
    pub fn name(self) -> &'static str {
        match self {
            DType::Bf16 => "bfloat16",
            DType::F16 => "float16",
            DType::F32 => "float32",
        }
    }

    /// Unit roundoff u = 2⁻ᵖ (p bits of significand): no rounding of a normal number is off by more than u, relatively.
    pub fn unit_roundoff(self) -> f64 {
        match self {
            DType::Bf16 => 2f64.powi(-8),
            DType::F16 => 2f64.powi(-11),
            DType::F32 => 2f64.powi(-24),
        }
    }

    /// `x` rounded once to this type (nearest, ties to even), as f64.
    pub fn round(self, x: f64) -> f64 {
        match self {
            DType::Bf16 => round_to_bf16(x),
            DType::F16 => f16::from_f32(round_to_odd(x)).to_f64(),
            DType::F32 => f64::from(x as f32),
        }
    }
}

/// By the bits of the double where the result is a normal number.
fn round_to_bf16(x: f64) -> f64 {
    const LOST: u64 = (1 << (52 - 7)) - 1;
    let magnitude = x.abs();
    if magnitude >= f64::from(f32::MIN_POSITIVE) && magnitude < LEAST_BF16_INFINITY {
        let bits = x.to_bits();
        let to_even = bits >> (52 - 7) & 1;
        return f64::from_bits((bits + (LOST >> 1) + to_even) & !LOST);
    }
    bf16::from_f32(round_to_odd(x)).to_f64()
}

/// Half a step above the largest bfloat16: from here on, numbers are rounded to infinity.
const LEAST_BF16_INFINITY: f64 = (2.0 - 1.0 / 256.0) * (1u128 << 127) as f64;

/// `x` in float32, its last bit set if anything was lost: rounding the result to 16 bits is then rounding `x` once.
///
/// (`from_f64` of the half crate looks at the upper 32 bits of `x` alone, and takes a number just above a tie for the tie.)
fn round_to_odd(x: f64) -> f32 {
    let nearest = x as f32;
    if f64::from(nearest) == x || !nearest.is_finite() {
        return nearest;
    }
    let away_from_zero = f64::from(nearest).abs() > x.abs();
    f32::from_bits((nearest.to_bits() - u32::from(away_from_zero)) | 1)
}

/// A dense float tensor in row-major order, in the dtype it was given in.
#[derive(Clone, Copy, Debug)]
pub enum Floats<'a> {
    /// bfloat16 elements.
    Bf16(&'a [bf16]),
    /// float16 elements.
    F16(&'a [f16]),
    /// float32 elements.
    F32(&'a [f32]),
}

impl Floats<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Floats::Bf16(s) => s.len(),
            Floats::F16(s) => s.len(),
            Floats::F32(s) => s.len(),
        }
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        match self {
            Floats::Bf16(_) => DType::Bf16,
            Floats::F16(_) => DType::F16,
            Floats::F32(_) => DType::F32,
        }
    }

    /// Element `i`; exact, since every supported dtype is a subset of f32.
    ///
    /// # Panics
    /// If `i` is out of bounds.
    #[inline]
    pub fn get(&self, i: usize) -> f32 {
        match self {
            Floats::Bf16(s) => s[i].to_f32(),
            Floats::F16(s) => s[i].to_f32(),
            Floats::F32(s) => s[i],
        }
    }

    /// Writes the elements from `start` on to `out`, as many as it holds.
    ///
    /// # Panics
    /// If there are not as many.
    pub fn widen(&self, start: usize, out: &mut [f64]) {
        let range = start..start + out.len();
        match self {
            // The upper half of a float32: unlike the half crate's conversion, a loop that the compiler makes vectors of.
            Floats::Bf16(s) => {
                let wide = |x: &bf16| f64::from(f32::from_bits(u32::from(x.to_bits()) << 16));
                out.iter_mut().zip(&s[range]).for_each(|(out, x)| *out = wide(x));
            }
            Floats::F16(s) => s[range].convert_to_f64_slice(out),
            Floats::F32(s) => out.iter_mut().zip(&s[range]).for_each(|(out, &x)| *out = f64::from(x)),
        }
    }

    /// [`get`](Self::get) of the elements from `start` on, as many as `out` holds.
    ///
    /// # Panics
    /// If there are not as many.
    pub fn copy_to_f32(&self, start: usize, out: &mut [f32]) {
        let range = start..start + out.len();
        match self {
            Floats::Bf16(s) => s[range].convert_to_f32_slice(out),
            Floats::F16(s) => s[range].convert_to_f32_slice(out),
            Floats::F32(s) => out.copy_from_slice(&s[range]),
        }
    }
}

impl<'a> From<&'a [bf16]> for Floats<'a> {
    fn from(s: &'a [bf16]) -> Self {
        Floats::Bf16(s)
    }
}
impl<'a> From<&'a [f16]> for Floats<'a> {
    fn from(s: &'a [f16]) -> Self {
        Floats::F16(s)
    }
}
impl<'a> From<&'a [f32]> for Floats<'a> {
    fn from(s: &'a [f32]) -> Self {
        Floats::F32(s)
    }
}

/// Label ids, one per token, in the integer type they were given in.
#[derive(Clone, Copy, Debug)]
pub enum Targets<'a> {
    /// int32 ids.
    I32(&'a [i32]),
    /// int64 ids.
    I64(&'a [i64]),
    /// uint32 ids.
    U32(&'a [u32]),
}

impl Targets<'_> {
    /// Number of tokens.
    pub fn len(&self) -> usize {
        match self {
            Targets::I32(s) => s.len(),
            Targets::I64(s) => s.len(),
            Targets::U32(s) => s.len(),
        }
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The id of token `n`.
    ///
    /// # Panics
    /// If `n` is out of bounds.
    #[inline]
    pub fn get(&self, n: usize) -> i64 {
        match self {
            Targets::I32(s) => s[n].into(),
            Targets::I64(s) => s[n],
            Targets::U32(s) => s[n].into(),
        }
    }
}

impl<'a> From<&'a [i32]> for Targets<'a> {
    fn from(s: &'a [i32]) -> Self {
        Targets::I32(s)
    }
}
impl<'a> From<&'a [i64]> for Targets<'a> {
    fn from(s: &'a [i64]) -> Self {
        Targets::I64(s)
    }
}
impl<'a> From<&'a [u32]> for Targets<'a> {
    fn from(s: &'a [u32]) -> Self {
        Targets::U32(s)
    }
}

/// How the unembedding lies in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Layout {
    /// [V, D]: a row per vocab id.
    #[default]
    Vd,
    /// [D, V]: a column per vocab id.
    Dv,
}

/// N tokens, D hidden features, V vocab columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// N.
    pub tokens: usize,
    /// D.
    pub hidden: usize,
    /// V: the columns of this unembedding (of this shard, if it is one).
    pub vocab: usize,
}

/// Where a shard of a vocab-parallel unembedding lies in the whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VocabShard {
    /// Vocab id of the shard's first column.
    pub start: usize,
    /// V of the whole unembedding.
    pub total: usize,
}

/// The options that change a logit or a per-token loss.
///
/// z = cap · tanh(scale·(Q·Kᵀ) / cap), or scale·Q·Kᵀ without a cap; columns from `valid_vocab` on are −∞;
/// lse = log Σ_v exp z_v; ℓ = lse − (1−ε)·z_t − ε·mean_v z_v + z_loss·lse², the mean over the valid columns.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossOptions {
    /// A token with this target is masked: no loss, no gradient.
    pub ignore_index: i64,
    /// Vocab ids from here on are padding; `None`: there is none. An id of the whole vocabulary, also for a shard.
    pub valid_vocab: Option<usize>,
    /// Factor on Q·Kᵀ (an inverse temperature).
    pub logit_scale: f64,
    /// cap of z ← cap·tanh(z/cap).
    pub logit_softcap: Option<f64>,
    /// Coefficient of lse² in the per-token loss.
    pub z_loss: f64,
    /// ε: share of the target distribution spread evenly over the valid columns.
    pub label_smoothing: f64,
}

impl Default for LossOptions {
    fn default() -> Self {
        Self { ignore_index: -100, valid_vocab: None, logit_scale: 1.0, logit_softcap: None, z_loss: 0.0, label_smoothing: 0.0 }
    }
}

impl LossOptions {
    /// Checks every option, apart from the data it will meet.
    ///
    /// # Errors
    /// Names the option that makes no sense, what was found and what is expected.
    pub fn validate(&self) -> Result<(), ProblemError> {
        let option = |name, found: f64, expected| Err(ProblemError::Option { name, found, expected });
        if !(self.logit_scale.is_finite() && self.logit_scale != 0.0) {
            return option("logit_scale", self.logit_scale, "a finite number other than 0");
        }
        if let Some(cap) = self.logit_softcap
            && !(cap.is_finite() && cap > 0.0)
        {
            return option("logit_softcap", cap, "a finite number above 0, or none");
        }
        if !(self.z_loss.is_finite() && self.z_loss >= 0.0) {
            return option("z_loss", self.z_loss, "a finite number, 0 or above");
        }
        if !(0.0..1.0).contains(&self.label_smoothing) {
            return option("label_smoothing", self.label_smoothing, "a number in [0, 1)");
        }
        Ok(())
    }
}

/// What a problem is made of, before it is checked.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// Q, [N, D] row-major.
    pub hidden: Floats<'a>,
    /// K, [V, D] or [D, V] row-major, as `layout` says.
    pub unembedding: Floats<'a>,
    /// How K lies in memory.
    pub layout: Layout,
    /// Label ids, [N].
    pub targets: Targets<'a>,
    /// Per-token weights, [N]; 0 masks a token. `None`: all 1.
    pub token_weights: Option<&'a [f32]>,
    /// N, D, V.
    pub shape: Shape,
    /// Set when K is a shard of a vocab-parallel unembedding.
    pub shard: Option<VocabShard>,
}

/// What a token is to the loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Label {
    /// Takes no part: target = ignore_index, or weight 0.
    Masked,
    /// Its label is this column of K.
    Column(u32),
    /// It takes part, and its label lies in another vocab shard.
    Elsewhere,
}

impl Label {
    /// The column of K that is its label.
    pub fn column(self) -> Option<usize> {
        if let Label::Column(column) = self { Some(column as usize) } else { None }
    }
}

/// One microbatch, checked: what every kernel and the oracle work on.
#[derive(Clone, Debug)]
pub struct Problem<'a> {
    hidden: Floats<'a>,
    unembedding: Floats<'a>,
    layout: Layout,
    shape: Shape,
    labels: Vec<Label>,
    weights: Vec<f32>,
    options: LossOptions,
    columns: Range<usize>,
    total: usize,
    valid_total: usize,
}

impl<'a> Problem<'a> {
    /// Checks `inputs` and `options` against each other.
    ///
    /// A masked token's target may be any number; every other target must be a valid vocab id.
    ///
    /// # Errors
    /// The first thing that does not fit, with the values and the remedy.
    pub fn new(inputs: Inputs<'a>, options: LossOptions) -> Result<Self, ProblemError> {
        options.validate()?;
        let Inputs { hidden, unembedding, layout, targets, token_weights, shape, shard } = inputs;
        let Shape { tokens, hidden: d, vocab } = shape;
        if d == 0 || vocab == 0 {
            return Err(ProblemError::Empty { hidden: d, vocab });
        }
        if vocab >= u32::MAX as usize {
            return Err(ProblemError::Vocab { vocab });
        }
        let length = |name, found: usize, rows: usize, columns: usize| match rows.checked_mul(columns) {
            Some(expected) if expected == found => Ok(()),
            expected => Err(ProblemError::Length { name, found, rows, columns, expected }),
        };
        length("hidden", hidden.len(), tokens, d)?;
        length("unembedding", unembedding.len(), vocab, d)?;
        length("targets", targets.len(), tokens, 1)?;
        if let Some(w) = token_weights {
            length("token_weights", w.len(), tokens, 1)?;
        }
        let VocabShard { start, total } = shard.unwrap_or(VocabShard { start: 0, total: vocab });
        if start.checked_add(vocab).is_none_or(|end| end > total) {
            return Err(ProblemError::Shard { start, vocab, total });
        }
        let valid_total = options.valid_vocab.unwrap_or(total);
        if valid_total == 0 || valid_total > total {
            return Err(ProblemError::ValidVocab { valid_vocab: valid_total, vocab: total });
        }
        let mut labels = Vec::with_capacity(tokens);
        let mut weights = Vec::with_capacity(tokens);
        for token in 0..tokens {
            let target = targets.get(token);
            let weight = token_weights.map_or(1.0, |w| w[token]);
            if !weight.is_finite() {
                return Err(ProblemError::Weight { token, found: weight });
            }
            if target == options.ignore_index || weight == 0.0 {
                labels.push(Label::Masked);
                weights.push(0.0);
                continue;
            }
            let id = usize::try_from(target).ok().filter(|&id| id < valid_total);
            let Some(id) = id else {
                return Err(ProblemError::Target {
                    token,
                    found: target,
                    valid_vocab: valid_total,
                    ignore_index: options.ignore_index,
                });
            };
            labels.push(match id.checked_sub(start) {
                Some(column) if column < vocab => Label::Column(column as u32),
                _ => Label::Elsewhere,
            });
            weights.push(weight);
        }
        Ok(Self {
            hidden,
            unembedding,
            layout,
            shape,
            labels,
            weights,
            options,
            columns: start..start + vocab,
            total,
            valid_total,
        })
    }

    /// Q, [N, D] row-major.
    pub fn hidden(&self) -> Floats<'a> {
        self.hidden
    }

    /// K in its layout.
    pub fn unembedding(&self) -> Floats<'a> {
        self.unembedding
    }

    /// How K lies in memory.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// N, D, V.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// What each token is to the loss, [N].
    pub fn labels(&self) -> &[Label] {
        &self.labels
    }

    /// w[n]: the token weight, 0 where masked, [N].
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// The loss options.
    pub fn options(&self) -> &LossOptions {
        &self.options
    }

    /// The vocab ids that this unembedding's columns are: 0..V unless it is a shard.
    pub fn vocab_ids(&self) -> Range<usize> {
        self.columns.clone()
    }

    /// How many of this unembedding's columns are no padding: columns from here on are −∞.
    pub fn valid_columns(&self) -> usize {
        self.valid_total.saturating_sub(self.columns.start).min(self.shape.vocab)
    }

    /// Number of valid ids of the whole vocabulary, over all shards: what label smoothing spreads over.
    pub fn valid_total(&self) -> usize {
        self.valid_total
    }

    /// Whether this unembedding is the whole vocabulary.
    pub fn is_whole(&self) -> bool {
        self.columns == (0..self.total)
    }

    /// # Errors
    /// [`ProblemError::IsShard`] if this unembedding is not the whole vocabulary; `what` is the operation that needs it.
    pub fn require_whole(&self, what: &'static str) -> Result<(), ProblemError> {
        if self.is_whole() {
            return Ok(());
        }
        Err(ProblemError::IsShard { what, start: self.columns.start, end: self.columns.end })
    }
}

/// Why inputs make no problem. Each message says what, found, expected.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ProblemError {
    /// D or V is 0.
    #[error("hidden size D = {hidden} and vocab size V = {vocab}: both must be at least 1")]
    Empty {
        /// D.
        hidden: usize,
        /// V.
        vocab: usize,
    },
    /// V does not fit the label type.
    #[error("vocab size V = {vocab} is too large: at most 2³² − 2 columns")]
    Vocab {
        /// V.
        vocab: usize,
    },
    /// A tensor's length does not fit the shape.
    #[error("{name} has {found} elements, but its shape {rows} × {columns} needs {}", .expected.map_or("more than memory can hold".to_owned(), |e| e.to_string()))]
    Length {
        /// Tensor name.
        name: &'static str,
        /// Elements given.
        found: usize,
        /// Rows expected.
        rows: usize,
        /// Columns expected.
        columns: usize,
        /// Elements expected; `None` if the product overflows.
        expected: Option<usize>,
    },
    /// A vocab shard does not lie in the whole.
    #[error("vocab shard [{start}, {start} + {vocab}) does not lie in the whole vocabulary of {total}")]
    Shard {
        /// First id.
        start: usize,
        /// Columns of the shard.
        vocab: usize,
        /// V of the whole.
        total: usize,
    },
    /// `valid_vocab` does not fit the vocabulary.
    #[error("valid_vocab = {valid_vocab} must be between 1 and the vocab size {vocab}")]
    ValidVocab {
        /// The option.
        valid_vocab: usize,
        /// V of the whole.
        vocab: usize,
    },
    /// A target is no vocab id.
    #[error(
        "targets[{token}] = {found} is not in [0, {valid_vocab}) and not ignore_index = {ignore_index}; mask the token or correct the id"
    )]
    Target {
        /// Flattened token index.
        token: usize,
        /// The id.
        found: i64,
        /// Number of valid ids.
        valid_vocab: usize,
        /// The masking id.
        ignore_index: i64,
    },
    /// A token weight is not finite.
    #[error("token_weights[{token}] = {found} is not finite; use 0 to mask a token")]
    Weight {
        /// Flattened token index.
        token: usize,
        /// The weight.
        found: f32,
    },
    /// A loss option makes no sense.
    #[error("loss option {name} = {found}: expected {expected}")]
    Option {
        /// Its name in a dump's manifest.
        name: &'static str,
        /// Value found.
        found: f64,
        /// What is accepted.
        expected: &'static str,
    },
    /// A buffer handed to a kernel has the wrong length.
    #[error("{name} has {found} elements, expected {expected} ({what})")]
    Buffer {
        /// The argument.
        name: &'static str,
        /// Its length.
        found: usize,
        /// The length it needs.
        expected: usize,
        /// Where that comes from, such as "N × D".
        what: &'static str,
    },
    /// A gradient was asked for in a dtype that is neither f32 nor its input's.
    #[error("{name} was asked for in {found}; gradients come in float32 or in the input's own {input}")]
    GradientDType {
        /// The gradient.
        name: &'static str,
        /// Asked for.
        found: &'static str,
        /// The input's dtype.
        input: &'static str,
    },
    /// An operation that needs the whole vocabulary was given a shard.
    #[error(
        "{what} needs the whole vocabulary, but the unembedding is the shard [{start}, {end}) of it; merge the shards' partials first"
    )]
    IsShard {
        /// The operation.
        what: &'static str,
        /// First id of the shard.
        start: usize,
        /// One past its last.
        end: usize,
    },
    /// A sampled row that does not exist.
    #[error("sampled {what} {found}: there are {count}, numbered from 0; leave it out")]
    SampleRow {
        /// A token or a vocab id.
        what: &'static str,
        /// As given.
        found: usize,
        /// N or V.
        count: usize,
    },
    /// Merged partials are not those of the whole vocabulary.
    #[error("the merged partials hold {found} valid columns of {expected}; merge every vocab shard's exactly once")]
    PartialColumns {
        /// Columns in.
        found: usize,
        /// Valid columns of the whole vocabulary.
        expected: usize,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ties, and numbers next to ties by less than float32 can see.
    #[test]
    fn rounding_to_16_bits_is_one_rounding() {
        for (dtype, ulp) in [(DType::Bf16, 2f64.powi(-7)), (DType::F16, 2f64.powi(-10))] {
            for (steps, down) in [(0.0, true), (1.0, false)] {
                let low = 1.0 + steps * ulp;
                let tie = low + ulp / 2.0;
                let tiny = 2f64.powi(-50);
                assert_eq!(dtype.round(tie), if down { low } else { low + ulp }, "{dtype:?}: ties go to even");
                assert_eq!(dtype.round(tie + tiny), low + ulp, "{dtype:?}: just above a tie");
                assert_eq!(dtype.round(tie - tiny), low, "{dtype:?}: just below a tie");
                assert_eq!(dtype.round(-tie - tiny), -low - ulp, "{dtype:?}: just beyond a tie, negative");
            }
            assert_eq!(dtype.round(0.0), 0.0);
            assert_eq!(dtype.round(1e300), f64::INFINITY);
            assert!(dtype.round(f64::NAN).is_nan());
        }
    }
}
