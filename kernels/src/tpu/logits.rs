//! What the passes share: the logits of a tile, transposed, [vocab ids, tokens], and what is known of its rows.
//!
//! Transposed, because then all that belongs to a token (label, maximum, sum, cotangents) lies along the lanes, in rows of
//! [1, tokens]: it meets a tile by broadcasting down, is reduced by adding registers, and fills HBM without padding.

use super::text::{At, Body, Element, Is, Product, Value};
use super::{Spec, element};
use crate::problem::{DType, Layout};

/// Rows of a register of float32.
pub(super) const SUBLANES: usize = 8;

impl Spec {
    /// The columns that are no padding.
    pub(super) fn valid_columns(&self) -> usize {
        self.options.valid_vocab.unwrap_or(self.shape.vocab)
    }

    /// The type in which Q and K are multiplied.
    pub(super) fn operand(&self) -> Element {
        if self.inputs == [DType::Bf16; 2] { Element::Bf16 } else { Element::F32 }
    }

    /// What `unembedding` holds for a tile, as [vocab ids, D] whatever the layout.
    pub(super) fn unembedding_rows(&self, body: &mut Body, unembedding: &Value) -> Value {
        let k = body.load_all(unembedding);
        if self.layout == Layout::Vd { k } else { body.transpose(&k) }
    }

    /// z of the rows `k` of K, [vocab ids, tokens], and z/cap if there is a cap: before its rounding to z it has lost least.
    pub(super) fn logits(&self, body: &mut Body, k: &Value, q: &Value) -> (Value, Option<Value>) {
        let (k, q) = (body.convert(k, self.operand()), body.convert(q, self.operand()));
        let z = body.product(Product::Nt, &k, &q);
        match (self.options.logit_scale, self.options.logit_softcap) {
            (scale, Some(cap)) => {
                let x = body.with("arith.mulf", &z, scale / cap);
                let of_cap = body.unary("math.tanh", &x);
                (body.with("arith.mulf", &of_cap, cap), Some(of_cap))
            }
            (1.0, None) => (z, None),
            (scale, None) => (body.with("arith.mulf", &z, scale), None),
        }
    }

    /// The dimensions of a block of K of `rows` vocab ids.
    pub(super) fn unembedding_block(&self, rows: usize) -> [usize; 2] {
        let d = self.shape.hidden;
        if self.layout == Layout::Vd { [rows, d] } else { [d, rows] }
    }

    /// Where in K the block of vocab tile `v` lies.
    pub(super) fn unembedding_place(&self, v: At) -> [At; 2] {
        if self.layout == Layout::Vd { [v, At::Start] } else { [At::Start, v] }
    }

    pub(super) fn elements(&self) -> [Element; 2] {
        self.inputs.map(element)
    }
}

/// x·(1 − ε).
pub(super) fn without_smoothing(body: &mut Body, smoothing: f64, x: &Value) -> Value {
    if smoothing == 0.0 { x.clone() } else { body.with("arith.mulf", x, 1.0 - smoothing) }
}

/// Of each token, whether it takes part; `labels` is i32 [1, tokens], negative at those that do not.
pub(super) fn takes_part(body: &mut Body, labels: &Value) -> Value {
    body.compare_with(labels, Is::AtLeast, 0)
}
