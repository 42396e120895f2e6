//! What multiply-adds give from registers alone: the most that a product can.

#![allow(dead_code, reason = "each program that includes this uses its own part")]

use std::time::Instant;

/// A multiply-add instruction, to be run many times over on every thread.
#[derive(Clone, Copy, Debug)]
pub struct MultiplyAdd {
    /// `AVX-512 bfloat16 dot products`, …
    pub name: &'static str,
    /// Floating-point operations of one of them.
    operations: usize,
    run: fn() -> f32,
}

const STEPS: usize = 1 << 21;
const TRIES: usize = 12;
/// Two a cycle, six cycles long, leave none waiting for its own last step; with both factors they fit 16 registers.
const CHAINS: usize = 12;

impl MultiplyAdd {
    /// Floating-point operations of one [`MultiplyAdd::run`].
    pub fn operations(&self) -> usize {
        self.operations * CHAINS * STEPS * rayon::current_num_threads()
    }

    /// [`STEPS`] steps of [`CHAINS`] of them on every thread of the pool.
    pub fn run(&self) {
        let sums = rayon::broadcast(|_| (self.run)());
        assert!(sums.iter().all(|&sum| sum > 0.0), "{}: {sums:?}", self.name);
    }

    /// GFLOP/s on all threads at once: the best of a few tries.
    pub fn gflops(&self) -> f64 {
        let seconds = || {
            let start = Instant::now();
            self.run();
            start.elapsed().as_secs_f64()
        };
        let best = (0..TRIES).map(|_| seconds()).fold(f64::INFINITY, f64::min);
        self.operations() as f64 / best / 1e9
    }
}

/// The one that does most at once.
pub fn widest() -> Option<MultiplyAdd> {
    available().first().copied()
}

/// Those of this machine that are known here, the widest first.
#[cfg(target_arch = "x86_64")]
pub fn available() -> Vec<MultiplyAdd> {
    let dot_products = MultiplyAdd {
        name: "AVX-512 bfloat16 dot products",
        operations: 64,
        // SAFETY: it is run only where it is found.
        run: || unsafe { x86::dot_products() },
    };
    let wide = MultiplyAdd {
        name: "AVX-512 float32 multiply-adds",
        operations: 32,
        // SAFETY: as above.
        run: || unsafe { x86::wide_multiply_adds() },
    };
    let narrow = MultiplyAdd {
        name: "AVX float32 multiply-adds",
        operations: 16,
        // SAFETY: as above.
        run: || unsafe { x86::multiply_adds() },
    };
    let has_wide = is_x86_feature_detected!("avx512f");
    let mut all = Vec::new();
    all.extend((has_wide && is_x86_feature_detected!("avx512bf16")).then_some(dot_products));
    all.extend(has_wide.then_some(wide));
    all.extend((is_x86_feature_detected!("avx") && is_x86_feature_detected!("fma")).then_some(narrow));
    all
}

/// None is known for this processor.
#[cfg(not(target_arch = "x86_64"))]
pub fn available() -> Vec<MultiplyAdd> {
    Vec::new()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{CHAINS, STEPS};
    use std::arch::x86_64::*;
    use std::hint::black_box;

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn dot_products() -> f32 {
        let [a, b] = [0.5, 0.25].map(|x| _mm512_set1_ps(black_box(x)));
        let [a, b] = [_mm512_cvtne2ps_pbh(a, a), _mm512_cvtne2ps_pbh(b, b)];
        let mut sums = [_mm512_setzero_ps(); CHAINS];
        for _ in 0..STEPS {
            sums.iter_mut().for_each(|sum| *sum = _mm512_dpbf16_ps(*sum, a, b));
        }
        sums.iter().map(|&sum| _mm512_cvtss_f32(sum)).sum()
    }

    #[target_feature(enable = "avx512f")]
    pub fn wide_multiply_adds() -> f32 {
        let [a, b] = [0.5, 0.25].map(|x| _mm512_set1_ps(black_box(x)));
        let mut sums = [_mm512_setzero_ps(); CHAINS];
        for _ in 0..STEPS {
            sums.iter_mut().for_each(|sum| *sum = _mm512_fmadd_ps(a, b, *sum));
        }
        sums.iter().map(|&sum| _mm512_cvtss_f32(sum)).sum()
    }

    #[target_feature(enable = "avx,fma")]
    pub fn multiply_adds() -> f32 {
        let [a, b] = [0.5, 0.25].map(|x| _mm256_set1_ps(black_box(x)));
        let mut sums = [_mm256_setzero_ps(); CHAINS];
        for _ in 0..STEPS {
            sums.iter_mut().for_each(|sum| *sum = _mm256_fmadd_ps(a, b, *sum));
        }
        sums.iter().map(|&sum| _mm256_cvtss_f32(sum)).sum()
    }
}
