//! NEON: float32 multiply and add, in one rounding.
//!
//! Contract: inputs exact; products and sums in float32, each sum in a fixed order; dlogits stay float32; one rounding per output.
//! Subnormals, infinities and NaN are those of IEEE 754: the thread's mode is the one that programs start in.
//!
//! A micro-tile of 4 × 24: 24 of the 32 registers of 4 floats hold the sums, 4 a spread-out left element each, the others the
//! right panel's; 10 loads for 24 products. Not timed: it has run in an emulator only.

use super::{Isa, Vectorized};
use crate::gemm::{Left, Write};
use std::arch::aarch64::*;
use std::arch::is_aarch64_feature_detected;

const MR: usize = 4;
const LANES: usize = 8;
const VECTORS: usize = 3;
const NR: usize = VECTORS * LANES;

/// Proof that the machine has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neon(());

impl Neon {
    /// If the machine has NEON, as those that run an operating system do.
    pub fn get() -> Option<&'static Self> {
        is_aarch64_feature_detected!("neon").then_some(&Self(()))
    }
}

impl Isa for Neon {
    const MR: usize = MR;
    const NR: usize = NR;
    const LANES: usize = LANES;
    const KU: usize = 1;
    type Packed = f32;

    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }

    unsafe fn product(
        self,
        steps: usize,
        left: Left<f32>,
        right: *const f32,
        c: *mut f32,
        stride: usize,
        vectors: usize,
        write: Write,
        _next: *const f32,
    ) {
        // SAFETY: `self` proves the feature; the rest is the caller's promise.
        unsafe {
            match vectors {
                1 => product::<2>(steps, left, right, c, stride, write),
                2 => product::<4>(steps, left, right, c, stride, write),
                _ => product::<6>(steps, left, right, c, stride, write),
            }
        }
    }

    #[inline(always)]
    fn vectorize<R>(self, work: impl Vectorized<Self, R>) -> R {
        work.run()
    }
}

/// The product of `R` registers of columns.
///
/// # Safety
/// As [`Isa::product`].
#[allow(clippy::needless_range_loop, reason = "the loops run over registers")]
#[inline(never)]
#[target_feature(enable = "neon")]
unsafe fn product<const R: usize>(steps: usize, left: Left<f32>, right: *const f32, c: *mut f32, stride: usize, write: Write) {
    let mut sums = [[vdupq_n_f32(0.0); R]; MR];
    let (mut l, mut r) = (left.data, right);
    // SAFETY: every address below is one of those that the caller vouches for, but for the ones past the end that are not read.
    unsafe {
        for _ in 0..steps {
            let mut words = [vdupq_n_f32(0.0); MR];
            for i in 0..MR {
                words[i] = vld1q_dup_f32(l.add(i * left.row));
            }
            for j in 0..R {
                let word = vld1q_f32(r.add(j * 4));
                for i in 0..MR {
                    sums[i][j] = vfmaq_f32(sums[i][j], words[i], word);
                }
            }
            (l, r) = (l.wrapping_add(left.step), r.wrapping_add(NR));
        }
        for i in 0..MR {
            for j in 0..R {
                let c = c.add(i * stride + j * 4);
                vst1q_f32(c, if write == Write::Set { sums[i][j] } else { vaddq_f32(vld1q_f32(c), sums[i][j]) });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::neon_tests::{compare, fused};

    #[test]
    fn products_are_fused_sums_in_order() {
        let neon = *Neon::get().expect("the machines that run these tests have it");
        assert_eq!(compare(neon, fused), Ok(()));
        let twice_rounded = |sum, a: &[f32], b: &[f32]| a[0] * b[0] + sum;
        assert!(compare(neon, twice_rounded).is_err());
    }
}
