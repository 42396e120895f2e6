//! The instruction sets that the kernel is compiled for, and what it asks of one.

pub(crate) mod portable;

use crate::contract::Precision;
use crate::problem::Problem;
use crate::shard::TokenPartial;
use crate::tiled::{Pass, Plan, RowPrediction, Sinks};
use crate::vjp::Cotangents;
use std::fmt::Debug;

/// One instruction set: what [`crate::tiled`] and [`crate::gemm`] are generic over. A value is the proof that this machine has it.
///
/// The product of two panels is all that an instruction set has to write by hand; everything else is plain code over
/// arrays that the compiler vectorises inside [`Isa::vectorize`].
pub(crate) trait Isa: Copy + Debug + Send + Sync + 'static {
    /// The kernel's name.
    const NAME: &'static str;
    /// What dlogits are rounded to before the gradient products.
    const DLOGITS: Precision;
    /// Rows of a micro-tile: the height of a left panel.
    const MR: usize;
    /// Columns of a micro-tile: the width of a right panel.
    const NR: usize;
    /// How many consecutive terms of the sum lie side by side in a panel, for instructions that add so many at once.
    const KU: usize;
    /// Element of a packed panel; its default is 0.
    type Packed: Copy + Default + Send + Sync;

    /// An element, as packed.
    fn pack(x: f32) -> Self::Packed;

    /// a·b + c, in one rounding where that is fast and in two where it is not.
    fn mul_add(a: f32, b: f32, c: f32) -> f32;

    /// acc[i·NR + j] = Σ_p left[p·MR + i] · right[p·NR + j] (with KU = 1; else p runs in groups of KU).
    ///
    /// Both panels hold the same number of terms, a multiple of KU; `acc` has MR·NR elements.
    fn product(self, left: &[Self::Packed], right: &[Self::Packed], acc: &mut [f32]);

    /// Runs `f`, which must be inlined all the way down, compiled for this instruction set.
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R;
}

/// What the public kernel asks of an instruction set, whichever it is.
pub(crate) trait Backend: Debug + Sync {
    /// The kernel's name.
    fn name(&self) -> &'static str;
    /// What dlogits are rounded to before the gradient products.
    fn dlogits(&self) -> Precision;
    /// Every active token with what the loss needs to know of its logits.
    fn partials(&self, problem: &Problem, plan: Plan) -> Vec<(usize, TokenPartial)>;
    /// Every active token with its prediction.
    fn predictions(&self, problem: &Problem, plan: Plan) -> Vec<(usize, RowPrediction)>;
    /// Fills the sinks, given every token's lse.
    fn backward(&self, problem: &Problem, plan: Plan, lse: &[f32], cotangents: Cotangents, sinks: Sinks);
    /// Both passes at once.
    fn partials_and_backward(
        &self,
        problem: &Problem,
        plan: Plan,
        cotangents: Cotangents,
        sinks: Sinks,
    ) -> Vec<(usize, TokenPartial)>;
}

impl<I: Isa> Backend for I {
    fn name(&self) -> &'static str {
        I::NAME
    }

    fn dlogits(&self) -> Precision {
        I::DLOGITS
    }

    fn partials(&self, problem: &Problem, plan: Plan) -> Vec<(usize, TokenPartial)> {
        Pass::new(*self, problem, plan).partials()
    }

    fn predictions(&self, problem: &Problem, plan: Plan) -> Vec<(usize, RowPrediction)> {
        Pass::new(*self, problem, plan).predictions()
    }

    fn backward(&self, problem: &Problem, plan: Plan, lse: &[f32], cotangents: Cotangents, sinks: Sinks) {
        Pass::new(*self, problem, plan).backward(lse, cotangents, sinks);
    }

    fn partials_and_backward(
        &self,
        problem: &Problem,
        plan: Plan,
        cotangents: Cotangents,
        sinks: Sinks,
    ) -> Vec<(usize, TokenPartial)> {
        Pass::new(*self, problem, plan).partials_and_backward(cotangents, sinks)
    }
}
