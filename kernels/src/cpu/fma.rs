//! Instances in float32 that differ in little but the width of a register: AVX-512 and AVX2.

/// Defines the instance `$name` of micro-tiles of `$mr` rows × `$vectors` registers, in the module where it stands, with `$multiply`
/// for its inner loop: `multiply`, which this defines, or one of the module's own.
macro_rules! fma_instance {
    (
        $(#[$doc:meta])* $name:ident, detect: [$($feature:tt),*], enable: $enable:literal, rows: $mr:literal, vectors: $vectors:literal, lanes: $lanes:literal,
        multiply: $multiply:ident,
        $register:ident, $zero:ident, $load:ident, $store:ident, $spread:ident, $add:ident, $multiply_add:ident
    ) => {
        use super::{Isa, Vectorized};
        use crate::gemm::{Left, Write};
        use std::arch::x86_64::*;

        const VECTORS: usize = $vectors;

        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        pub(crate) struct $name(());

        impl $name {
            /// If the machine has it.
            pub fn get() -> Option<&'static Self> {
                ($(is_x86_feature_detected!($feature))&&*).then_some(&Self(()))
            }
        }

        impl Isa for $name {
            const MR: usize = $mr;
            const NR: usize = VECTORS * $lanes;
            const LANES: usize = $lanes;
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
                        2 if VECTORS > 2 => product::<2>(steps, left, right, c, stride, write, next),
                        _ => product::<VECTORS>(steps, left, right, c, stride, write, next),
                    }
                }
            }

            #[inline(always)]
            fn vectorize<R>(self, work: impl Vectorized<Self, R>) -> R {
                // SAFETY: `self` proves the features.
                unsafe { vectorize(work) }
            }
        }

        #[target_feature(enable = $enable)]
        fn vectorize<R>(work: impl Vectorized<$name, R>) -> R {
            work.run()
        }

        /// Adds the products of `count` steps to the sums.
        ///
        /// # Safety
        /// The operands have so many.
        #[allow(clippy::needless_range_loop, reason = "the loops run over registers")]
        #[inline]
        #[target_feature(enable = $enable)]
        unsafe fn multiply<const V: usize>(sums: &mut [[$register; V]; $mr], left: Left<f32>, right: *const f32, count: usize) {
            for p in 0..count {
                // SAFETY: the caller's promise.
                unsafe {
                    let (l, r) = (left.data.add(p * left.step), right.add(p * VECTORS * $lanes));
                    let mut words = [$zero(); V];
                    for j in 0..V {
                        words[j] = $load(r.add(j * $lanes));
                    }
                    for i in 0..$mr {
                        let word = $spread(*l.add(i * left.row));
                        for j in 0..V {
                            sums[i][j] = $multiply_add(word, words[j], sums[i][j]);
                        }
                    }
                }
            }
        }

        /// # Safety
        /// As [`Isa::product`].
        #[allow(clippy::needless_range_loop, reason = "the loops run over registers")]
        #[inline(never)]
        #[target_feature(enable = $enable)]
        unsafe fn product<const V: usize>(
            steps: usize,
            left: Left<f32>,
            right: *const f32,
            c: *mut f32,
            stride: usize,
            write: Write,
            next: *const f32,
        ) {
            let mut sums = [[$zero(); V]; $mr];
            // SAFETY: every address below is one of those that the caller vouches for; a prefetch may be of any.
            unsafe {
                let (mut l, mut r) = (left.data, right);
                // One cache line of the next micro-tile every few steps: all at once, they would hold up the loads of this one.
                let pace = (steps / ($mr * V)).max(1);
                let (mut done, mut fetched) = (0, 0);
                while done < steps {
                    let (i, j) = (fetched / V, fetched % V);
                    if i < $mr {
                        _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(i * stride + j * $lanes).cast());
                        fetched += 1;
                    }
                    let count = pace.min(steps - done);
                    $multiply(&mut sums, Left { data: l, ..left }, r, count);
                    (l, r) = (l.add(count * left.step), r.add(count * VECTORS * $lanes));
                    done += count;
                }
                for i in 0..$mr {
                    for j in 0..V {
                        let c = c.add(i * stride + j * $lanes);
                        let before = if write == Write::Set { $zero() } else { $load(c) };
                        $store(c, $add(before, sums[i][j]));
                    }
                }
            }
        }
    };
}

pub(super) use fma_instance;
