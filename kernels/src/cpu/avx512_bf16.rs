//! AVX-512 with BF16: `vdpbf16ps`, which multiplies pairs of bfloat16 and adds them to float32.
//!
//! Contract: inputs, which are bfloat16, exact; dlogits in bfloat16, or in a pair of them (high + low); sums in float32, each in
//! a fixed order. `vdpbf16ps` reads subnormals as 0 and flushes results below 2⁻¹²⁶ to 0 whatever the thread's mode, and
//! adds the two products of a pair one after the other, each with one rounding to nearest even at most: an error of
//! u·(|sum| + |product|) a term, u = 2⁻²⁴, like any float32 arithmetic, and of 2⁻¹²⁶ beside.
//!
//! A micro-tile of 8 × 48: 24 of the 32 registers of 16 floats hold the sums, 3 the right panel's words, 1 a spread-out left word;
//! 11 loads for 24 products.

use super::{Isa, Vectorized};
use crate::gemm::{Left, Write};
use crate::panels::Pack;
use half::bf16;
use std::arch::x86_64::*;

const MR: usize = 8;
const LANES: usize = 16;
const VECTORS: usize = 3;
const NR: usize = VECTORS * LANES;

/// Proof that the machine has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512Bf16(());

impl Avx512Bf16 {
    /// If the machine has AVX-512 F, BW, VL and BF16.
    pub fn get() -> Option<&'static Self> {
        let has = super::avx512::Avx512::get().is_some() && is_x86_feature_detected!("avx512bf16");
        has.then_some(&Self(()))
    }
}

impl Isa for Avx512Bf16 {
    const MR: usize = MR;
    const NR: usize = NR;
    const LANES: usize = LANES;
    const KU: usize = 2;
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
    fn pack_row(x: &[f32], out: &mut [bf16]) {
        let out = &mut out[..x.len()];
        let (whole, rest) = x.as_chunks::<LANES>();
        let (out, out_rest) = out.as_chunks_mut::<LANES>();
        for (x, out) in whole.iter().zip(out) {
            // SAFETY: only code compiled for the features inlines this, and each side is 16 elements.
            unsafe {
                let rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(x.as_ptr()));
                out.as_mut_ptr().cast::<__m256bh>().write_unaligned(rounded);
            }
        }
        for (x, out) in rest.iter().zip(out_rest) {
            *out = Pack::pack(*x);
        }
    }

    #[inline(always)]
    fn pack_pairs(even: &[f32], odd: &[f32], out: &mut [bf16]) {
        const INTERLEAVED: [u16; 32] = {
            let mut order = [0; 32];
            let mut i = 0;
            while i < 16 {
                order[2 * i] = i as u16;
                order[2 * i + 1] = 16 + i as u16;
                i += 1;
            }
            order
        };
        let (even, odd) = (even.as_chunks::<LANES>().0, odd.as_chunks::<LANES>().0);
        for ((even, odd), out) in even.iter().zip(odd).zip(out.as_chunks_mut::<{ 2 * LANES }>().0) {
            // SAFETY: only code compiled for the features inlines this, and the sides are 16, 16 and 32 elements.
            unsafe {
                let rounded = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(odd.as_ptr()), _mm512_loadu_ps(even.as_ptr()));
                let order = _mm512_loadu_si512(INTERLEAVED.as_ptr().cast());
                let words = _mm512_permutexvar_epi16(order, std::mem::transmute::<__m512bh, __m512i>(rounded));
                _mm512_storeu_si512(out.as_mut_ptr().cast(), words);
            }
        }
    }

    #[inline(always)]
    fn vectorize<R>(self, work: impl Vectorized<Self, R>) -> R {
        // SAFETY: `self` proves the features.
        unsafe { vectorize(work) }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")]
fn vectorize<R>(work: impl Vectorized<Avx512Bf16, R>) -> R {
    work.run()
}

/// # Safety
/// As [`Isa::product`].
#[allow(clippy::needless_range_loop, reason = "the loops run over registers")]
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")]
unsafe fn product<const V: usize>(
    steps: usize,
    left: Left<bf16>,
    right: *const bf16,
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
                let mut words = [_mm512_setzero_si512(); V];
                for j in 0..V {
                    words[j] = _mm512_loadu_si512(r.add(j * 2 * LANES).cast());
                }
                for i in 0..MR {
                    let word = _mm512_set1_epi32(l.add(i * left.row).cast::<i32>().read_unaligned());
                    for j in 0..V {
                        sums[i][j] = _mm512_dpbf16_ps(sums[i][j], as_bf16(word), as_bf16(words[j]));
                    }
                }
                (l, r) = (l.add(left.step), r.add(2 * NR));
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

/// The same bits, as pairs of bfloat16.
#[inline(always)]
fn as_bf16(words: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes of which every pattern is a value.
    unsafe { std::mem::transmute(words) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::tests::products_are_right;

    fn isa() -> Option<Avx512Bf16> {
        let isa = Avx512Bf16::get().copied();
        if isa.is_none() {
            println!("SKIPPED avx512-bf16: this machine has it not");
        }
        isa
    }

    /// Σ a·b over pairs of terms, added to `c`, in one lane.
    fn sum(isa: Avx512Bf16, terms: &[[f32; 2]], c: f32) -> f32 {
        let words = terms.len().div_ceil(2);
        let (mut left, mut right) = (vec![bf16::ZERO; MR * 2 * words], vec![bf16::ZERO; NR * 2 * words]);
        for (p, [a, b]) in terms.iter().enumerate() {
            left[p] = bf16::from_f32(*a);
            right[p / 2 * 2 * NR + p % 2] = bf16::from_f32(*b);
            let kept = |packed: bf16, x: f32| packed.to_f32() == x || x.is_nan();
            assert!(kept(left[p], *a) && kept(right[p / 2 * 2 * NR + p % 2], *b), "terms are bfloat16");
        }
        let mut tile = vec![0.0; MR * NR];
        tile[0] = c;
        let operand = Left { data: left.as_ptr(), row: 2 * words, step: 2 };
        // SAFETY: the operands have MR rows and NR columns of so many words, and the tile is whole.
        unsafe { isa.product(words, operand, right.as_ptr(), tile.as_mut_ptr(), NR, VECTORS, Write::Add, tile.as_ptr()) };
        tile[0]
    }

    #[test]
    fn products_are_exact_and_sums_round_like_float32() {
        let Some(isa) = isa() else { return };
        products_are_right(isa);
        let mut state = 1u64;
        let mut draw = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let unit = (state >> 33) as f32 / (1u64 << 30) as f32 - 1.0;
            bf16::from_f32(unit * 2f32.powi((state >> 20) as i32 % 12)).to_f32()
        };
        let u = 2f64.powi(-24);
        let mut worst = 0.0f64;
        for count in (1..200).chain([1000, 4000]) {
            let terms: Vec<[f32; 2]> = (0..count).map(|_| [draw(), draw()]).collect();
            let (mut exact, mut bound) = (0.0f64, 0.0);
            for [a, b] in &terms {
                let product = f64::from(*a) * f64::from(*b);
                exact += product;
                // The product's own rounding, and that of the running sum, whose own error is of second order.
                bound += u * (product.abs() + exact.abs()) * 1.01;
            }
            let error = (f64::from(sum(isa, &terms, 0.0)) - exact).abs();
            assert!(error <= bound + 2f64.powi(-126), "{count} terms: {error:e}, at most {bound:e}");
            worst = worst.max(error / bound);
        }
        assert!(worst > 1e-3, "the bound is within reach: {worst}");
    }

    #[test]
    fn subnormals_are_zero() {
        let Some(isa) = isa() else { return };
        let (small, tiny) = (2f32.powi(-126), 2f32.powi(-130));
        assert_eq!(sum(isa, &[[tiny, 1024.0]], 0.0), 0.0, "a subnormal input");
        assert_eq!(sum(isa, &[[small, 0.25]], 0.0), 0.0, "a subnormal product");
        assert_eq!(sum(isa, &[[small, 1.0]], 0.0), small, "the least normal number stays");
        assert_eq!(sum(isa, &[[small, 1.5], [small, -1.0]], 0.0), 0.0, "a subnormal sum");
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        let Some(isa) = isa() else { return };
        let inf = f32::INFINITY;
        assert_eq!(sum(isa, &[[inf, 1.0], [1.0, 1.0]], 0.0), inf);
        assert_eq!(sum(isa, &[[1.0, 2.0], [-inf, 1.0]], 1.0), -inf);
        for terms in [[[inf, 1.0], [-inf, 1.0]], [[inf, 0.0], [1.0, 1.0]], [[f32::NAN, 1.0], [1.0, 1.0]]] {
            assert!(sum(isa, &terms, 0.0).is_nan(), "{terms:?}");
        }
        assert_eq!(sum(isa, &[[3e38f32, 2.0]].map(|t| t.map(|x| bf16::from_f32(x).to_f32())), 0.0), inf, "overflow");
    }

    #[test]
    fn packing_rounds_to_nearest_even() {
        let Some(isa) = isa() else { return };
        struct Both<'a>(&'a [f32], &'a mut [bf16], &'a mut [bf16]);
        impl Vectorized<Avx512Bf16, ()> for Both<'_> {
            #[inline(always)]
            fn run(self) {
                Avx512Bf16::pack_row(self.0, self.1);
                Avx512Bf16::pack_pairs(&self.0[..NR], &self.0[NR..2 * NR], self.2);
            }
        }
        for seed in 0..1000u32 {
            // Halfway cases, their neighbours, infinities; no NaN and no subnormal, which comes out as 0.
            let x: Vec<f32> = (0..2 * NR as u32 + 5)
                .map(|i| {
                    let upper = seed.wrapping_mul(40_503).wrapping_add(i).wrapping_mul(2_654_435_761) >> 16;
                    f32::from_bits(upper << 16 | [0, 0x7fff, 0x8000, 0x8001][i as usize % 4])
                })
                .map(|x| if x.is_nan() || x.is_subnormal() { 1.0 } else { x })
                .collect();
            let (mut row, mut pairs) = (vec![bf16::ZERO; x.len()], vec![bf16::ZERO; 2 * NR]);
            isa.vectorize(Both(&x, &mut row, &mut pairs));
            for (i, &x) in x.iter().enumerate() {
                assert_eq!(row[i], bf16::from_f32(x), "{x:?}");
                if i < 2 * NR {
                    assert_eq!(pairs[i % NR * 2 + i / NR], bf16::from_f32(x), "{x:?} in a pair");
                }
            }
        }
    }
}
