//! AVX-512: float32 multiply and add, in one rounding.
//!
//! Contract: inputs exact; products and sums in float32, each sum in a fixed order; dlogits stay float32; one rounding per output.
//!
//! A micro-tile of 8 × 48: 24 of the 32 registers of 16 floats hold the sums, 3 the right panel's, 1 a spread-out left element.

super::fma::fma_instance!(
    /// AVX-512 F, BW, VL and DQ.
    Avx512,
    detect: ["avx512f", "avx512bw", "avx512vl", "avx512dq", "fma"],
    enable: "avx512f,avx512bw,avx512vl,avx512dq,fma",
    rows: 8,
    vectors: 3,
    lanes: 16,
    multiply: multiply,
    __m512,
    _mm512_setzero_ps,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_set1_ps,
    _mm512_add_ps,
    _mm512_fmadd_ps
);
