//! `portable`: any CPU that Rust compiles for.
//!
//! Contract: operands are float32, exact from bf16 and f16 inputs; dlogits stay float32; products and sums are float32, one
//! rounding each, in a fixed order; gradients are rounded once from the float32 sum.

use crate::gemm::{Isa, MAX_TILE};

/// Plain float32, left to the compiler to vectorise for the target it compiles for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

impl Isa for Portable {
    type Operand = f32;
    const MR: usize = 6;
    const NR: usize = 8;
    const K_UNIT: usize = 1;

    #[inline(always)]
    fn operand(x: f32) -> f32 {
        x
    }

    #[inline(always)]
    fn micro_tile(self, a: &[f32], b: &[f32], acc: &mut [f32; MAX_TILE]) {
        let mut sums = [[0.0f32; Self::NR]; Self::MR];
        let (a, _) = a.as_chunks::<{ Self::MR }>();
        let (b, _) = b.as_chunks::<{ Self::NR }>();
        for (a, b) in a.iter().zip(b) {
            for (sums, a) in sums.iter_mut().zip(a) {
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum += a * b;
                }
            }
        }
        acc[..Self::MR * Self::NR].copy_from_slice(sums.as_flattened());
    }

    #[inline(always)]
    fn vectorize<R>(self, work: impl FnOnce() -> R) -> R {
        work()
    }
}
