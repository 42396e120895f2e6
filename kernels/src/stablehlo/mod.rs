//! The loss and its gradients as StableHLO programs, for any device that XLA runs on.
//!
//! [`naive`] computes as an unfused training run does: all logits at once. [`chunked`] holds the logits of one tile of the
//! vocabulary at a time, twice: once for lse, and again for the gradients, in a workspace that does not grow with N·V.
//!
//! ```text
//! main(hidden [N, D], unembedding [V, D] or [D, V], labels i32 [N], cotangent f32 [N])
//!   → loss f32 [N], lse f32 [N], label_logits f32 [N], d_hidden [N, D], d_unembedding as unembedding
//! ```
//! `labels` are vocab ids, and −1 for tokens that take no part: what these rows of Q hold is not looked at, and their results are 0.
//! `cotangent` is g, of the loss. All sums are in float32, with the highest precision that the device offers
//! (`precision = [HIGHEST, HIGHEST]`); what is rounded besides is what [`Spec::contract`] says, by `reduce_precision`, which no
//! compiler may leave out.

mod loss;
mod text;

pub use text::Type;
pub(crate) use text::{Body, Value};

use crate::contract::{Contract, LabelTerm, Precision};
use crate::problem::{DType, Layout, LossOptions, Shape};
use loss::Emitter;

/// What a program computes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spec {
    /// N, D and V.
    pub shape: Shape,
    /// How K lies, and dK.
    pub layout: Layout,
    /// Of Q and K.
    pub inputs: [DType; 2],
    /// Of dQ and dK, each rounded once.
    pub gradients: [DType; 2],
    /// Of the loss.
    pub options: LossOptions,
    /// Rounds the logits to bfloat16, before the cap.
    pub bf16_logits: bool,
    /// Rounds dlogits to bfloat16, before the gradient products.
    pub bf16_dlogits: bool,
}

/// A module of StableHLO with one public function, `@main`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// The module.
    pub text: String,
    /// Its arguments: name and type.
    pub inputs: Vec<(&'static str, Type)>,
    /// Its results: name and type.
    pub outputs: Vec<(&'static str, Type)>,
}

impl Spec {
    /// What the program promises.
    pub fn contract(&self) -> Contract {
        let rounded = |to_bf16| if to_bf16 { Precision::Bf16 } else { Precision::F32 };
        Contract {
            logits: rounded(self.bf16_logits),
            dlogits: rounded(self.bf16_dlogits),
            label: LabelTerm::Joint,
            accumulate: Precision::F32,
            d_hidden: self.gradients[0].into(),
            d_unembedding: self.gradients[1].into(),
        }
    }

    fn arguments(&self) -> Vec<(&'static str, Type)> {
        let Shape { tokens, hidden, vocab } = self.shape;
        let unembedding = if self.layout == Layout::Vd { [vocab, hidden] } else { [hidden, vocab] };
        vec![
            ("hidden", Type::new(&[tokens, hidden], element(self.inputs[0]))),
            ("unembedding", Type::new(&unembedding, element(self.inputs[1]))),
            ("labels", Type::new(&[tokens], "i32")),
            ("cotangent", Type::new(&[tokens], "f32")),
        ]
    }

    fn program(&self, tile: usize) -> Program {
        let inputs = self.arguments();
        let (text, outputs) = Body::function(&inputs, |body, arguments| Emitter { spec: *self, body, arguments }.emit(tile));
        Program { text, inputs, outputs }
    }
}

/// All logits at once, [N, V] in float32.
pub fn naive(spec: &Spec) -> Program {
    spec.program(spec.valid_columns())
}

/// Logits of at most `tile` vocab ids at a time.
///
/// # Panics
/// If `tile` is 0.
pub fn chunked(spec: &Spec, tile: usize) -> Program {
    assert!(tile > 0, "a tile has columns");
    spec.program(tile.min(spec.valid_columns()))
}

impl Spec {
    fn valid_columns(&self) -> usize {
        self.options.valid_vocab.unwrap_or(self.shape.vocab)
    }
}

pub(crate) fn element(dtype: DType) -> &'static str {
    match dtype {
        DType::Bf16 => "bf16",
        DType::F16 => "f16",
        DType::F32 => "f32",
    }
}
