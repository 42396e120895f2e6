//! Portable: plain Rust that vectorises for the baseline of whatever the compiler targets.
//!
//! Contract: inputs exact; products and sums in float32, each sum in a fixed order; dlogits stay float32; one rounding per output.
//!
//! A micro-tile of 2 × 16: of the 16 registers of 4 floats that x86-64 starts with, 8 hold the sums and 2 a spread-out left
//! element each; a wider left side would spend its time on spreading (4 × 8: 38.9 GFLOP/s, 3 × 12: 41.8, 2 × 16: 46.0).

use super::{Isa, Vectorized};
use crate::gemm::{Left, Write};

const MR: usize = 2;
const NR: usize = 16;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

impl Isa for Portable {
    const MR: usize = MR;
    const NR: usize = NR;
    const LANES: usize = NR;
    const KU: usize = 1;
    type Packed = f32;

    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }

    #[inline(never)]
    unsafe fn product(
        self,
        steps: usize,
        left: Left<f32>,
        right: *const f32,
        c: *mut f32,
        stride: usize,
        _vectors: usize,
        write: Write,
        _next: *const f32,
    ) {
        let mut sums = [[0.0f32; NR]; MR];
        for p in 0..steps {
            // SAFETY: the caller promises `steps` words of NR columns each, and MR rows of `steps` words.
            let (l, r) = unsafe { (left.word::<MR>(p), *right.add(p * NR).cast::<[f32; NR]>()) };
            for i in 0..MR {
                for j in 0..NR {
                    sums[i][j] += l[i] * r[j];
                }
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            // SAFETY: the caller promises MR rows of NR floats, `stride` apart.
            let c = unsafe { &mut *c.add(i * stride).cast::<[f32; NR]>() };
            c.iter_mut().zip(sums).for_each(|(c, sum)| *c = if write == Write::Set { *sum } else { *c + sum });
        }
    }

    #[inline(always)]
    fn vectorize<R>(self, work: impl Vectorized<Self, R>) -> R {
        work.run()
    }
}
