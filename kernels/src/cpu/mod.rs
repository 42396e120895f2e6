//! The instruction sets that the kernel is compiled for, and what it asks of one.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512_bf16;
#[cfg(target_arch = "x86_64")]
mod fma;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon_bf16;
#[cfg(all(test, target_arch = "aarch64"))]
mod neon_tests;
pub(crate) mod portable;

use crate::gemm::{Left, Write};
use crate::lanes::Prediction;
use crate::panels::{self, Pack, Packed};
use crate::problem::Problem;
use crate::shard::TokenPartial;
use crate::tiled::{Pass, Settings, Sinks};
use crate::vjp::Cotangents;
use std::fmt::Debug;

/// One instruction set: what [`crate::tiled`] and [`crate::gemm`] are generic over. A value is the proof that this machine has it.
///
/// The product of a left and a right panel is all that an instruction set has to write by hand; everything else is plain code
/// over slices that the compiler vectorises: [`Vectorized`].
///
/// Operands lie in *words*: [`Isa::KU`] consecutive terms of the sum, side by side.
pub(crate) trait Isa: Copy + Debug + Send + Sync + 'static {
    /// Rows of a micro-tile. It divides NR.
    const MR: usize;
    /// Columns of a micro-tile: the width of a right panel.
    const NR: usize;
    /// Columns of which a micro-tile may have fewer than NR: a vector's. It divides NR.
    const LANES: usize;
    /// Terms in a word, for instructions that add so many at once.
    const KU: usize;
    /// Element of a packed operand.
    type Packed: Packed;

    /// a·b + c, in one rounding where that is fast and in two where it is not.
    fn mul_add(a: f32, b: f32, c: f32) -> f32;

    /// c[i·stride + j] = or += Σ_p left(i, p)·right[p, j] for i < MR, j < vectors·LANES, p < steps words.
    ///
    /// Word p of the right panel's column j lies at word p·NR + j. The micro-tile at `next`, which
    /// may be anywhere, is brought nearer meanwhile.
    ///
    /// # Safety
    /// The left operand has MR rows and `steps` words in each, the right panel `steps`·NR words; `c` may be read and written
    /// wherever the formula says; `vectors`·LANES is not above NR.
    #[allow(clippy::too_many_arguments)]
    unsafe fn product(
        self,
        steps: usize,
        left: Left<Self::Packed>,
        right: *const Self::Packed,
        c: *mut f32,
        stride: usize,
        vectors: usize,
        write: Write,
        next: *const f32,
    );

    /// Does the work, compiled for this instruction set.
    fn vectorize<R>(self, work: impl Vectorized<Self, R>) -> R;

    /// out[i] = x[i], each rounded once to nearest even.
    #[inline(always)]
    fn pack_row(x: &[f32], out: &mut [Self::Packed]) {
        let out = &mut out[..x.len()];
        for i in 0..x.len() {
            out[i] = Pack::pack(x[i]);
        }
    }

    /// out[2i] = even[i] and out[2i + 1] = odd[i], likewise.
    #[inline(always)]
    fn pack_pairs(even: &[f32], odd: &[f32], out: &mut [Self::Packed]) {
        panels::pack_pairs(even, odd, out);
    }
}

/// Plain loops over slices, to be compiled for an instruction set: a function with its arguments.
///
/// A closure would do, but for one thing: nothing makes sure that it is inlined into [`Isa::vectorize`].
pub(crate) trait Vectorized<I: Isa, R> {
    /// Must be `#[inline(always)]`, as must be all that it calls.
    fn run(self) -> R;
}

/// What the public kernel asks of an instruction set, whichever it is.
pub(crate) trait Backend: Debug + Sync {
    /// Every active token with what the loss needs to know of its logits.
    fn partials(&self, problem: &Problem, settings: Settings) -> Vec<(usize, TokenPartial)>;
    /// Every active token with its prediction.
    fn predictions(&self, problem: &Problem, settings: Settings) -> Vec<(usize, Prediction)>;
    /// Fills the sinks, given every token's lse.
    fn backward(&self, problem: &Problem, settings: Settings, lse: &[f32], cotangents: Cotangents, sinks: Sinks);
    /// Both passes at once.
    fn partials_and_backward(
        &self,
        problem: &Problem,
        settings: Settings,
        cotangents: Cotangents,
        sinks: Sinks,
    ) -> Vec<(usize, TokenPartial)>;
    /// Bytes that [`Backend::partials_and_backward`] will hold beside its inputs and results.
    fn workspace_bytes(&self, problem: &Problem, settings: Settings) -> usize;
}

impl<I: Isa> Backend for I {
    fn partials(&self, problem: &Problem, settings: Settings) -> Vec<(usize, TokenPartial)> {
        Pass::new(*self, problem, settings).partials()
    }

    fn predictions(&self, problem: &Problem, settings: Settings) -> Vec<(usize, Prediction)> {
        Pass::new(*self, problem, settings).predictions()
    }

    fn backward(&self, problem: &Problem, settings: Settings, lse: &[f32], cotangents: Cotangents, sinks: Sinks) {
        Pass::new(*self, problem, settings).backward(lse, cotangents, sinks);
    }

    fn partials_and_backward(
        &self,
        problem: &Problem,
        settings: Settings,
        cotangents: Cotangents,
        sinks: Sinks,
    ) -> Vec<(usize, TokenPartial)> {
        Pass::new(*self, problem, settings).partials_and_backward(cotangents, sinks)
    }

    fn workspace_bytes(&self, problem: &Problem, settings: Settings) -> usize {
        Pass::new(*self, problem, settings).workspace_bytes()
    }
}
