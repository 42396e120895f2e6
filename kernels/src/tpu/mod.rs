//! Kernels for TPUs: Mosaic, the language of the TPU compiler, inside StableHLO programs that any XLA runtime for TPUs takes.
//!
//! ```text
//! forward:   main(hidden [N, D], unembedding [V, D] or [D, V], labels i32 [N]) → loss f32 [N], lse f32 [N], label_logits f32 [N]
//! backward:  main(hidden, unembedding, labels, lse f32 [N], each given cotangent f32 [N], d_unembedding f32 if it is added to)
//!              → d_hidden [N, D], d_unembedding as unembedding
//! ```
//! `labels` are vocab ids, and −1 for tokens that take no part: what these rows of Q hold is not looked at, and their results are 0.
//! Q and K are bfloat16 or float32. What is rounded, and where, stands at the top of `forward.rs` and `backward.rs`, and is what
//! [`Spec::contract`] and [`Backward::contract`] say. Tiles are chosen by a model of the chip's memory ([`Generation`]), or given.

mod backward;
mod call;
mod chip;
mod forward;
mod logits;
mod plan;
mod program;
mod text;

pub use chip::Generation;
pub use plan::{BackwardPlan, Form, Tile};
pub use program::Program;

use crate::contract::{Contract, LabelTerm, Precision};
use crate::problem::{DType, Layout, LossOptions, ProblemError, Shape};
use crate::vjp::Dlogits;
use text::Element;

/// The largest D and V that kernels are made for.
const LIMITS: Shape = Shape { tokens: 1 << 24, hidden: 8192, vocab: 1 << 18 };

/// What the forward computes, and the backward is the derivative of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spec {
    /// N, D and V.
    pub shape: Shape,
    /// How K lies, and dK.
    pub layout: Layout,
    /// Of Q and K: bfloat16 or float32.
    pub inputs: [DType; 2],
    /// Of the loss.
    pub options: LossOptions,
}

/// Which per-token results have a cotangent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Given {
    /// g, of ℓ.
    pub loss: bool,
    /// h, of lse.
    pub lse: bool,
    /// u, of z_t.
    pub label_logits: bool,
}

impl Given {
    /// That of the loss alone: plain training.
    pub const LOSS: Given = Given { loss: true, lse: false, label_logits: false };

    fn given(&self) -> [bool; 3] {
        [self.loss, self.lse, self.label_logits]
    }

    /// The names of those given, in the order in which they are passed.
    fn names(&self) -> impl Iterator<Item = &'static str> {
        let names = ["loss_cotangent", "lse_cotangent", "label_logits_cotangent"];
        names.into_iter().zip(self.given()).filter_map(|(name, given)| given.then_some(name))
    }
}

/// What the backward computes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Backward {
    /// Of the forward.
    pub spec: Spec,
    /// Of dQ and dK, each rounded once: float32, or bfloat16.
    pub gradients: [DType; 2],
    /// The precision of dlogits in the gradient products. Where an input is not bfloat16 it is float32 whatever is asked for.
    pub dlogits: Dlogits,
    /// The cotangents that are passed; the others are 0.
    pub cotangents: Given,
    /// dK is added to what is passed for it, float32 in the same memory: for sums over microbatches.
    pub accumulate: bool,
}

/// Why there is no kernel. Each message says what, found, expected.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum TpuError {
    /// The options or the sizes make no problem.
    #[error(transparent)]
    Problem(#[from] ProblemError),
    /// No token, no feature or no vocab id.
    #[error("N = {}, D = {}, V = {}: a TPU kernel needs at least one of each", .0.tokens, .0.hidden, .0.vocab)]
    Empty(Shape),
    /// Beyond what kernels are made for.
    #[error(
        "N = {}, D = {}, V = {}: TPU kernels go up to N = {}, D = {} and V = {}; split the vocabulary or the tokens",
        .0.tokens, .0.hidden, .0.vocab, LIMITS.tokens, LIMITS.hidden, LIMITS.vocab
    )]
    Size(Shape),
    /// An element type that TPUs do not multiply, or that a gradient does not come in.
    #[error("{name} is {found}; a TPU kernel takes {expected}")]
    DType {
        /// The tensor.
        name: &'static str,
        /// Its type.
        found: &'static str,
        /// What is accepted, and the remedy.
        expected: &'static str,
    },
    /// A backward of nothing.
    #[error("no cotangent is given, so both gradients are 0; say which of loss, lse and label_logits has one")]
    NoCotangent,
    /// A tile that the chip cannot address.
    #[error("a tile of {} tokens by {} vocab ids: both must be multiples of 128", .0.tokens, .0.vocab)]
    Tile(Tile),
    /// Token chunks that are no whole tiles.
    #[error("{found} tokens at a time: expected a multiple of the tile's {tile}, and no zero")]
    Chunk {
        /// As given.
        found: usize,
        /// Tokens of a tile.
        tile: usize,
    },
    /// Cores that a device does not have.
    #[error("a vocabulary split over {found} cores: a device of {generation} has {}; give that, or 1", generation.cores())]
    Cores {
        /// As given.
        found: usize,
        /// The chip.
        generation: Generation,
    },
    /// More memory than a core has.
    #[error(
        "{what} needs {} MiB of VMEM; a core of {generation} has {} MiB; {remedy}",
        needed.div_ceil(1 << 20), available >> 20
    )]
    Vmem {
        /// The pass and its tile.
        what: String,
        /// Bytes.
        needed: usize,
        /// Bytes.
        available: usize,
        /// The chip.
        generation: Generation,
        /// What would fit.
        remedy: String,
    },
}

impl Spec {
    /// What the forward promises.
    pub fn contract(&self) -> Contract {
        Contract::F32
    }

    fn validate(&self) -> Result<(), TpuError> {
        self.options.validate()?;
        let Shape { tokens, hidden, vocab } = self.shape;
        if tokens == 0 || hidden == 0 || vocab == 0 {
            return Err(TpuError::Empty(self.shape));
        }
        if tokens > LIMITS.tokens || hidden > LIMITS.hidden || vocab > LIMITS.vocab {
            return Err(TpuError::Size(self.shape));
        }
        let valid_vocab = self.valid_columns();
        if valid_vocab == 0 || valid_vocab > vocab {
            return Err(ProblemError::ValidVocab { valid_vocab, vocab }.into());
        }
        require(&["hidden", "unembedding"], self.inputs)
    }

    /// N, D and V.
    fn sizes(&self) -> [u64; 3] {
        [self.shape.tokens, self.shape.hidden, self.shape.vocab].map(|size| size as u64)
    }
}

fn require(names: &[&'static str; 2], dtypes: [DType; 2]) -> Result<(), TpuError> {
    match names.iter().zip(dtypes).find(|(_, dtype)| *dtype == DType::F16) {
        Some((name, dtype)) => {
            Err(TpuError::DType { name, found: dtype.name(), expected: "bfloat16 or float32; convert it to one of them" })
        }
        None => Ok(()),
    }
}

impl Backward {
    /// For the cotangent of the loss alone, with gradients in the inputs' own types.
    pub fn plain(spec: Spec) -> Self {
        Self { spec, gradients: spec.inputs, dlogits: Dlogits::Bf16, cotangents: Given::LOSS, accumulate: false }
    }

    /// What the backward promises.
    pub fn contract(&self) -> Contract {
        Contract {
            logits: Precision::F32,
            dlogits: self.dlogits().into(),
            label: LabelTerm::Joint,
            accumulate: Precision::F32,
            d_hidden: self.gradients[0].into(),
            d_unembedding: self.gradients[1].into(),
        }
    }

    fn dlogits(&self) -> Dlogits {
        if self.spec.inputs == [DType::Bf16; 2] { self.dlogits } else { Dlogits::F32 }
    }

    fn validate(&self) -> Result<(), TpuError> {
        self.spec.validate()?;
        require(&["d_hidden", "d_unembedding"], self.gradients)?;
        if self.accumulate && self.gradients[1] != DType::F32 {
            let found = self.gradients[1].name();
            return Err(TpuError::DType { name: "d_unembedding", found, expected: "float32 for what is added to" });
        }
        if self.cotangents.names().next().is_none() {
            return Err(TpuError::NoCotangent);
        }
        Ok(())
    }
}

fn element(dtype: DType) -> Element {
    if dtype == DType::Bf16 { Element::Bf16 } else { Element::F32 }
}
