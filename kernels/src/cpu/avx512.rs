//! AVX-512: float32 multiply and add, in one rounding.
//!
//! Contract: inputs exact; products and sums in float32, each sum in a fixed order; dlogits stay float32; one rounding per output.
//!
//! A micro-tile of 8 × 48: 24 of the 32 registers of 16 floats hold the sums, 3 the right panel's, 1 a spread-out left element.

use super::{Isa, Vectorized};
use crate::gemm::{Left, Write};
use std::arch::x86_64::*;

const MR: usize = 8;
const LANES: usize = 16;
const VECTORS: usize = 3;
const NR: usize = VECTORS * LANES;

/// Proof that the machine has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// If the machine has AVX-512 F, BW, VL, DQ and FMA.
    pub fn get() -> Option<&'static Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("fma");
        has.then_some(&Self(()))
    }
}

impl Isa for Avx512 {
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
        next: *const f32,
    ) {
        // SAFETY: `self` proves the features; the rest is the caller's promise.
        unsafe {
            match vectors {
                1 => product::<1>(steps, left, right, c, stride, write, next),
                2 => product::<2>(steps, left, right, c, stride, write, next),
                _ => product::<3>(steps, left, right, c, stride, write, next),
            }
        }
    }

    #[inline(always)]
    fn vectorize<R>(self, work: impl Vectorized<Self, R>) -> R {
        // SAFETY: `self` proves the features.
        unsafe { vectorize(work) }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
fn vectorize<R>(work: impl Vectorized<Avx512, R>) -> R {
    work.run()
}

/// # Safety
/// As [`Isa::product`].
#[allow(clippy::needless_range_loop, reason = "the loops run over registers")]
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
unsafe fn product<const V: usize>(
    steps: usize,
    left: Left<f32>,
    right: *const f32,
    c: *mut f32,
    stride: usize,
    write: Write,
    next: *const f32,
) {
    let mut sums = [[_mm512_setzero_ps(); V]; MR];
    // SAFETY: every address below is one of those that the caller vouches for; a prefetch may be of any.
    unsafe {
        let (mut l, mut r) = (left.data, right);
        // One cache line of the next micro-tile every few steps: all at once, they would hold up the loads of this one.
        let pace = (steps / (MR * V)).max(1);
        let (mut done, mut fetched) = (0, 0);
        while done < steps {
            let (i, j) = (fetched / V, fetched % V);
            if i < MR {
                _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(i * stride + j * LANES).cast());
                fetched += 1;
            }
            let until = steps.min(done + pace);
            while done < until {
                done += 1;
                let mut words = [_mm512_setzero_ps(); V];
                for j in 0..V {
                    words[j] = _mm512_loadu_ps(r.add(j * LANES));
                }
                for i in 0..MR {
                    let word = _mm512_set1_ps(*l.add(i * left.row));
                    for j in 0..V {
                        sums[i][j] = _mm512_fmadd_ps(word, words[j], sums[i][j]);
                    }
                }
                (l, r) = (l.add(left.step), r.add(NR));
            }
        }
        for i in 0..MR {
            for j in 0..V {
                let c = c.add(i * stride + j * LANES);
                let before = if write == Write::Set { _mm512_setzero_ps() } else { _mm512_loadu_ps(c) };
                _mm512_storeu_ps(c, _mm512_add_ps(before, sums[i][j]));
            }
        }
    }
}
