//! AVX2 with FMA: float32 multiply and add, in one rounding.
//!
//! Contract: inputs exact; products and sums in float32, each sum in a fixed order; dlogits stay float32; one rounding per output.
//!
//! A micro-tile of 4 × 16: 8 of the 16 registers of 8 floats hold the sums, as many as keep both multipliers busy, 2 the right
//! panel's, 1 a spread-out left element. With 4 × 24, which takes all 16, the compiler spills.

super::fma::fma_instance!(
    /// AVX2 and FMA.
    Avx2,
    detect: ["avx2", "fma"],
    enable: "avx2,fma",
    rows: 4,
    vectors: 2,
    lanes: 8,
    _mm256_setzero_ps,
    _mm256_loadu_ps,
    _mm256_storeu_ps,
    _mm256_set1_ps,
    _mm256_add_ps,
    _mm256_fmadd_ps
);
