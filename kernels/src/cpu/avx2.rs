//! AVX2 with FMA: float32 multiply and add, in one rounding.
//!
//! Contract: inputs exact; products and sums in float32, each sum in a fixed order; dlogits stay float32; one rounding per output.
//!
//! A micro-tile of 4 × 24: 12 of the 16 registers of 8 floats hold the sums, 3 the right panel's, 1 a spread-out left element. The
//! compiler would spill some of them: where all are taken, the inner loop is assembly.

use std::arch::asm;

super::fma::fma_instance!(
    /// AVX2 and FMA.
    Avx2,
    detect: ["avx2", "fma"],
    enable: "avx2,fma",
    rows: 4,
    vectors: 3,
    lanes: 8,
    multiply: multiply_in_registers,
    __m256,
    _mm256_setzero_ps,
    _mm256_loadu_ps,
    _mm256_storeu_ps,
    _mm256_set1_ps,
    _mm256_add_ps,
    _mm256_fmadd_ps
);

/// # Safety
/// As [`multiply`].
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn multiply_in_registers<const V: usize>(sums: &mut [[__m256; V]; 4], left: Left<f32>, right: *const f32, count: usize) {
    let [a, b, c, d] = sums;
    let ([a0, a1, a2], [b0, b1, b2], [c0, c1, c2], [d0, d1, d2]) = (&mut a[..], &mut b[..], &mut c[..], &mut d[..]) else {
        // SAFETY: the caller's promise.
        return unsafe { multiply(sums, left, right, count) };
    };
    if count == 0 {
        return;
    }
    // SAFETY: it reads what the caller vouches for, row by row and step by step, and writes registers alone.
    unsafe {
        asm!(
            "2:",
            "vmovups {r0}, [{right}]",
            "vmovups {r1}, [{right} + 32]",
            "vmovups {r2}, [{right} + 64]",
            "vbroadcastss {l}, [{left}]",
            "vfmadd231ps {a0}, {l}, {r0}",
            "vfmadd231ps {a1}, {l}, {r1}",
            "vfmadd231ps {a2}, {l}, {r2}",
            "vbroadcastss {l}, [{left} + {row}]",
            "vfmadd231ps {b0}, {l}, {r0}",
            "vfmadd231ps {b1}, {l}, {r1}",
            "vfmadd231ps {b2}, {l}, {r2}",
            "vbroadcastss {l}, [{left} + 2*{row}]",
            "vfmadd231ps {c0}, {l}, {r0}",
            "vfmadd231ps {c1}, {l}, {r1}",
            "vfmadd231ps {c2}, {l}, {r2}",
            "vbroadcastss {l}, [{last}]",
            "vfmadd231ps {d0}, {l}, {r0}",
            "vfmadd231ps {d1}, {l}, {r1}",
            "vfmadd231ps {d2}, {l}, {r2}",
            "add {right}, 96",
            "add {left}, {step}",
            "add {last}, {step}",
            "dec {count}",
            "jnz 2b",
            right = inout(reg) right => _,
            left = inout(reg) left.data => _,
            last = inout(reg) left.data.add(3 * left.row) => _,
            count = inout(reg) count => _,
            row = in(reg) size_of::<f32>() * left.row,
            step = in(reg) size_of::<f32>() * left.step,
            a0 = inout(ymm_reg) *a0, a1 = inout(ymm_reg) *a1, a2 = inout(ymm_reg) *a2,
            b0 = inout(ymm_reg) *b0, b1 = inout(ymm_reg) *b1, b2 = inout(ymm_reg) *b2,
            c0 = inout(ymm_reg) *c0, c1 = inout(ymm_reg) *c1, c2 = inout(ymm_reg) *c2,
            d0 = inout(ymm_reg) *d0, d1 = inout(ymm_reg) *d1, d2 = inout(ymm_reg) *d2,
            r0 = out(ymm_reg) _, r1 = out(ymm_reg) _, r2 = out(ymm_reg) _, l = out(ymm_reg) _,
            options(nostack, readonly)
        );
    }
}
