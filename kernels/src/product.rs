//! The oracle's matrix products, from a library: single-threaded, of any strides.

use gemm::{Parallelism, gemm};
use ndarray::{ArrayBase, Data, DataMut, Ix2};

/// float32 or float64.
pub trait Real: Copy + PartialEq + 'static {
    /// 0.
    const ZERO: Self;
}

impl Real for f32 {
    const ZERO: Self = 0.0;
}
impl Real for f64 {
    const ZERO: Self = 0.0;
}

/// c ← α·a·b + β·c, for a [m, k], b [k, n] and c [m, n]; with β = 0, whatever c held.
///
/// The order of its sums depends on the shapes and the machine, not on the number of threads.
///
/// # Panics
/// If the shapes do not fit.
pub fn general_mat_mul<T: Real>(
    alpha: T,
    a: &ArrayBase<impl Data<Elem = T>, Ix2>,
    b: &ArrayBase<impl Data<Elem = T>, Ix2>,
    beta: T,
    c: &mut ArrayBase<impl DataMut<Elem = T>, Ix2>,
) {
    let ((m, k), (of_b, n)) = (a.dim(), b.dim());
    assert_eq!((k, c.dim()), (of_b, (m, n)), "[{m}, {k}] times [{of_b}, {n}] into {:?}", c.dim());
    if c.is_empty() {
        return;
    }
    let strides = |strides: &[isize]| (strides[1], strides[0]);
    let (of_a, of_b, of_c) = (strides(a.strides()), strides(b.strides()), strides(c.strides()));
    // SAFETY: each pointer with its shape and strides is that of an array that is borrowed for the call, c's mutably, so that
    // no element of c is one of a or b; the shapes fit, as asserted above. Each T is one of the types that gemm takes.
    unsafe {
        let (to, left, right) = (c.as_mut_ptr(), a.as_ptr(), b.as_ptr());
        let (read, none) = (beta != T::ZERO, Parallelism::None);
        gemm(
            m, n, k, to, of_c.0, of_c.1, read, left, of_a.0, of_a.1, right, of_b.0, of_b.1, beta, alpha, false, false, false,
            none,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array2, ShapeBuilder, s};
    use proptest::prelude::*;

    fn matrix(rows: usize, columns: usize, seed: usize, transposed: bool) -> Array2<f64> {
        Array2::from_shape_fn((rows, columns).set_f(transposed), |(i, j)| (((i * 31 + j * 17 + seed) % 97) as f64 - 48.0) / 16.0)
    }

    proptest! {
        /// Exact in both types: small multiples of 1/256.
        #[test]
        fn it_is_the_definition(m in 0..40usize, k in 0..70usize, n in 0..40usize, orders in any::<[bool; 3]>(), beta in 0..3) {
            let (a, b) = (matrix(m, k, 1, orders[0]), matrix(k, n, 2, orders[1]));
            let before = matrix(m, n + 3, 3, orders[2]);
            let (alpha, beta) = (0.5, f64::from(beta));
            let mut expected = before.clone();
            for ((i, j), c) in expected.slice_mut(s![.., 1..n + 1]).indexed_iter_mut() {
                *c = alpha * (0..k).map(|l| a[[i, l]] * b[[l, j]]).sum::<f64>() + beta * *c;
            }
            let mut found = before.clone();
            if beta == 0.0 {
                found.slice_mut(s![.., 1..n + 1]).fill(f64::NAN);
            }
            general_mat_mul(alpha, &a, &b, beta, &mut found.slice_mut(s![.., 1..n + 1]));
            prop_assert_eq!(&found, &expected);
            let narrow = |x: &Array2<f64>| x.mapv(|x| x as f32);
            let mut found = narrow(&before);
            general_mat_mul(alpha as f32, &narrow(&a), &narrow(&b), beta as f32, &mut found.slice_mut(s![.., 1..n + 1]));
            prop_assert_eq!(found, narrow(&expected));
        }
    }
}
