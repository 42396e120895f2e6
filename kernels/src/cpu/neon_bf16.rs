//! NEON with BF16: `bfmmla`, which multiplies 2 × 4 by 4 × 2 bfloat16 and adds the product to 2 × 2 float32.
//!
//! Contract: inputs, which are bfloat16, exact; dlogits rounded to bfloat16, to nearest even; sums in float32, each in a fixed
//! order; one rounding per output. Of the four terms of a word (Arm's reference manual, BFMMLA with FPCR.EBF = 0, which is how
//! programs start)
//!
//! ```text
//! sum ← odd(sum + odd(a₀·b₀ + a₁·b₁)),  then  sum ← odd(sum + odd(a₂·b₂ + a₃·b₃))
//! ```
//! The products are exact: 8 bits times 8. odd, rounding to odd, cuts an inexact number off and sets its last bit: an error of
//! 2u·|x| at most, u = 2⁻²⁴, with mean 0 and four times the variance of rounding to nearest, but for half as many additions
//! to a sum. Subnormals are read as 0, and results below 2⁻¹²⁶, those of the products too, become 0, whatever the thread's
//! mode; what overflows becomes infinite; NaN becomes the default NaN.
//!
//! A micro-tile of 4 × 24: 24 of the 32 registers hold 2 × 2 sums each, 2 the left words of two rows each, the others the
//! right words of two columns each; 16 loads for 24 products. Not timed: it has run in an emulator only.

use super::{Isa, Vectorized};
use crate::gemm::{Left, Write};
use half::bf16;
use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};

const MR: usize = 4;
const LANES: usize = 8;
const VECTORS: usize = 3;
const NR: usize = VECTORS * LANES;
const KU: usize = 4;

/// Proof that the machine has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NeonBf16(());

impl NeonBf16 {
    /// If the machine has FEAT_BF16.
    pub fn get() -> Option<&'static Self> {
        is_aarch64_feature_detected!("bf16").then_some(&Self(()))
    }
}

impl Isa for NeonBf16 {
    const MR: usize = MR;
    const NR: usize = NR;
    const LANES: usize = LANES;
    const KU: usize = KU;
    type Packed = bf16;

    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }

    unsafe fn product(
        self,
        steps: usize,
        left: Left<bf16>,
        right: *const bf16,
        c: *mut f32,
        stride: usize,
        vectors: usize,
        write: Write,
        _next: *const f32,
    ) {
        // SAFETY: `self` proves the feature; the rest is the caller's promise.
        unsafe {
            match vectors {
                1 => product::<4>(steps, left, right, c, stride, write),
                2 => product::<8>(steps, left, right, c, stride, write),
                _ => product::<12>(steps, left, right, c, stride, write),
            }
        }
    }

    #[inline(always)]
    fn vectorize<R>(self, work: impl Vectorized<Self, R>) -> R {
        work.run()
    }
}

/// The product of `B` blocks of 2 columns.
///
/// # Safety
/// As [`Isa::product`].
#[allow(clippy::needless_range_loop, reason = "the loops run over registers")]
#[inline(never)]
#[target_feature(enable = "neon,bf16")]
unsafe fn product<const B: usize>(steps: usize, left: Left<bf16>, right: *const bf16, c: *mut f32, stride: usize, write: Write) {
    let mut sums = [[vdupq_n_f32(0.0); B]; MR / 2];
    let (mut l, mut r) = (left.data.cast::<u16>(), right.cast::<u16>());
    // SAFETY: every address below is one of those that the caller vouches for, but for the ones past the end that are not read.
    unsafe {
        for _ in 0..steps {
            let mut words = [vdupq_n_u16(0); MR / 2];
            for i in 0..MR / 2 {
                words[i] = vcombine_u16(vld1_u16(l.add(2 * i * left.row)), vld1_u16(l.add((2 * i + 1) * left.row)));
            }
            for j in 0..B {
                let word = vld1q_u16(r.add(j * 2 * KU));
                for i in 0..MR / 2 {
                    sums[i][j] = bfmmla(sums[i][j], words[i], word);
                }
            }
            (l, r) = (l.wrapping_add(left.step), r.wrapping_add(NR * KU));
        }
        for i in 0..MR {
            for j in (0..B).step_by(2) {
                let [a, b] = [sums[i / 2][j], sums[i / 2][j + 1]];
                let halves = if i % 2 == 0 { [vget_low_f32(a), vget_low_f32(b)] } else { [vget_high_f32(a), vget_high_f32(b)] };
                let sum = vcombine_f32(halves[0], halves[1]);
                let c = c.add(i * stride + 2 * j);
                vst1q_f32(c, if write == Write::Set { sum } else { vaddq_f32(vld1q_f32(c), sum) });
            }
        }
    }
}

/// sums[i, j] + Σ_p left[i, p]·right[j, p]: 2 × 2 sums, in rows, of 2 × 4 and 2 × 4 bfloat16, in words.
#[inline]
#[target_feature(enable = "neon,bf16")]
fn bfmmla(mut sums: float32x4_t, left: uint16x8_t, right: uint16x8_t) -> float32x4_t {
    // SAFETY: the feature is enabled here; the instruction does nothing but to change the sums.
    unsafe {
        asm!(
            "bfmmla {sums:v}.4s, {left:v}.8h, {right:v}.8h",
            sums = inout(vreg) sums, left = in(vreg) left, right = in(vreg) right,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::neon_tests::{Model, compare, fused, pairs_to_odd, pairs_unflushed, words_to_odd};

    #[test]
    fn products_are_rounded_to_odd_by_pairs() {
        let Some(&neon) = NeonBf16::get() else {
            println!("SKIPPED neon-bf16: this machine has no FEAT_BF16");
            return;
        };
        assert_eq!(compare(neon, pairs_to_odd), Ok(()));
        for other in [fused as Model, words_to_odd, pairs_unflushed] {
            assert!(compare(neon, other).is_err());
        }
    }
}
