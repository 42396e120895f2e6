//! Portable: plain Rust that vectorises for the baseline of whatever the compiler targets.
//!
//! Contract: inputs exact; products and sums in float32, each sum in a fixed order; dlogits stay float32; one rounding per output.
//!
//! A micro-tile of 2 × 16: of the 16 registers of 4 floats that x86-64 starts with, 8 hold the sums and 2 a spread-out left
//! element each; a wider left side would spend its time on spreading (4 × 8: 38.9 GFLOP/s, 3 × 12: 41.8, 2 × 16: 46.0).

use super::Isa;
use crate::contract::Precision;

const MR: usize = 2;
const NR: usize = 16;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

impl Isa for Portable {
    const NAME: &'static str = "portable";
    const DLOGITS: Precision = Precision::F32;
    const MR: usize = MR;
    const NR: usize = NR;
    const KU: usize = 1;
    type Packed = f32;

    #[inline(always)]
    fn pack(x: f32) -> f32 {
        x
    }

    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }

    #[inline(never)]
    fn product(self, left: &[f32], right: &[f32], acc: &mut [f32]) {
        let mut sums = [[0.0f32; NR]; MR];
        for (l, r) in left.as_chunks::<MR>().0.iter().zip(right.as_chunks::<NR>().0) {
            for i in 0..MR {
                for j in 0..NR {
                    sums[i][j] += l[i] * r[j];
                }
            }
        }
        acc.copy_from_slice(sums.as_flattened());
    }

    #[inline(always)]
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
        f()
    }
}
