//! What the NEON kernels' products are compared with: models of their arithmetic, bit by bit, and float64.

use super::Isa;
use crate::gemm::{Output, Sweep, Write, product};
use crate::panels::{Pack, Strides};

/// Adds one word's terms to a sum, given the left and the right word.
pub(crate) type Model = fn(f32, &[f32], &[f32]) -> f32;

/// Each product added with one rounding to nearest.
pub(crate) fn fused(sum: f32, a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).fold(sum, |sum, (a, b)| a.mul_add(*b, sum))
}

/// What Arm's manual says of BFMMLA.
pub(crate) fn pairs_to_odd(sum: f32, a: &[f32], b: &[f32]) -> f32 {
    let product = |i: usize| flush(flush(a[i]) * flush(b[i]));
    (0..a.len()).step_by(2).fold(sum, |sum, i| add_to_odd(sum, add_to_odd(product(i), product(i + 1))))
}

/// The same with all four products added up first.
pub(crate) fn words_to_odd(sum: f32, a: &[f32], b: &[f32]) -> f32 {
    add_to_odd(sum, pairs_to_odd(0.0, a, b))
}

/// The same with products that keep their subnormals.
pub(crate) fn pairs_unflushed(sum: f32, a: &[f32], b: &[f32]) -> f32 {
    (0..a.len()).step_by(2).fold(sum, |sum, i| add_to_odd(sum, add_to_odd(a[i] * b[i], a[i + 1] * b[i + 1])))
}

fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0.0f32.copysign(x) } else { x }
}

/// a + b rounded to odd; subnormals are 0, in and out.
fn add_to_odd(a: f32, b: f32) -> f32 {
    let (a, b) = (f64::from(flush(a)), f64::from(flush(b)));
    let sum = a + b;
    if !sum.is_finite() || sum == 0.0 {
        return sum as f32;
    }
    // What the float64 sum is off by, exactly. To odd in float64 first, which does not change what is odd in float32.
    let shared = sum - a;
    let error = (a - (sum - shared)) + (b - shared);
    let away = (error > 0.0) == (sum > 0.0);
    let odd = match (error == 0.0, sum.to_bits().is_multiple_of(2), away) {
        (false, true, true) => f64::from_bits(sum.to_bits() + 1),
        (false, true, false) => f64::from_bits(sum.to_bits() - 1),
        _ => sum,
    };
    if odd.abs() < f32::MIN_POSITIVE.into() {
        return 0.0f32.copysign(odd as f32);
    }
    let nearest = odd as f32;
    let cut = if f64::from(nearest).abs() > odd.abs() { f32::from_bits(nearest.to_bits() - 1) } else { nearest };
    match f64::from(cut) == odd {
        true => cut,
        false if cut.abs() == f32::MAX => f32::INFINITY.copysign(cut),
        false => f32::from_bits(cut.to_bits() | 1),
    }
}

/// Which numbers a case is made of.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Numbers {
    /// Of size 1, both signs.
    Ordinary,
    /// Of all sizes, with zeros, subnormals, infinities and NaN among them.
    Every,
}

/// Pseudorandom numbers.
struct Source(u64);

impl Source {
    fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    fn next(&mut self, numbers: Numbers) -> f32 {
        let (sign, fraction, exponent) = (self.bits() << 31, self.bits() & 0x7f_ffff, self.bits());
        let exponent = match (numbers, self.bits() % 32) {
            (Numbers::Every, 0) if self.bits().is_multiple_of(16) => 255,
            (Numbers::Every, 0) => return f32::from_bits(sign),
            (Numbers::Every, 1 | 2) => 0,
            (Numbers::Every, 3..8) => exponent % 4 + 62,
            (Numbers::Every, 8..10) => exponent % 255,
            (Numbers::Every, 10..12) => exponent % 4 + 188,
            _ => exponent % 16 + 116,
        };
        f32::from_bits(sign | exponent << 23 | fraction)
    }
}

/// Whether products are the model's, bit for bit; if not, where they are not.
///
/// # Panics
/// If they are far from float64's.
pub(crate) fn compare<I: Isa>(isa: I, model: Model) -> Result<(), String> {
    let mut source = Source(1);
    let ordinary = [1, 67].map(|steps| (steps, Numbers::Ordinary));
    let every = [1, 2, 5].map(|steps| (steps, Numbers::Every));
    for (steps, numbers) in ordinary.into_iter().chain(every.into_iter().cycle().take(60)) {
        let terms = steps * I::KU;
        let [a, b] = [I::MR, I::NR]
            .map(|rows| -> Vec<I::Packed> { (0..rows * terms).map(|_| Pack::pack(source.next(numbers))).collect() });
        let mut right = vec![I::Packed::default(); terms * I::NR];
        for (j, p) in (0..I::NR).flat_map(|j| (0..terms).map(move |p| (j, p))) {
            right[(p / I::KU * I::NR + j) * I::KU + p % I::KU] = b[j * terms + p];
        }
        let layouts = [([I::KU, I::MR * I::KU], Write::Set), ([terms + 5, I::KU], Write::Add)];
        for (vectors, ([row, step], write)) in (1..=I::NR / I::LANES).flat_map(|v| layouts.map(|layout| (v, layout))) {
            let mut left = vec![I::Packed::default(); I::MR * (terms + 5)];
            for (i, p) in (0..I::MR).flat_map(|i| (0..terms).map(move |p| (i, p))) {
                left[i * row + p / I::KU * step + p % I::KU] = a[i * terms + p];
            }
            let (columns, stride) = (vectors * I::LANES, vectors * I::LANES + 3);
            let mut c = vec![0.75; I::MR * stride];
            let output = Output::new(&mut c, [I::MR, columns], [stride, 1]);
            // SAFETY: nobody else uses `c`.
            unsafe { product(isa, Sweep::Rows, steps, (&left, Strides { row, step }), &right, output, write) };
            for (at, &found) in c.iter().enumerate() {
                let (i, j) = (at / stride, at % stride);
                if j >= columns {
                    assert_eq!(found, 0.75, "nothing beyond the columns is written");
                    continue;
                }
                let [a, b] = [&a[i * terms..][..terms], &b[j * terms..][..terms]].map(widened);
                let sum = a.chunks_exact(I::KU).zip(b.chunks_exact(I::KU)).fold(0.0, |sum, (a, b)| model(sum, a, b));
                let expected = if write == Write::Set { sum } else { 0.75 + sum };
                if found.to_bits() != expected.to_bits() && !(found.is_nan() && expected.is_nan()) {
                    return Err(format!("{found:e} for {expected:e}: {steps} steps of {numbers:?} at {i}, {j}"));
                }
                if numbers == Numbers::Ordinary && write == Write::Set {
                    is_close(found, &a, &b);
                }
            }
        }
    }
    Ok(())
}

fn widened<P: Copy + Into<f32>>(x: &[P]) -> Vec<f32> {
    x.iter().map(|&x| x.into()).collect()
}

/// Two float32 roundings per term, each off by 2u at most, of partial sums no larger than Σ|a·b| and a little.
fn is_close(found: f32, a: &[f32], b: &[f32]) {
    let terms = || a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
    let bound = 2.0 * a.len() as f64 * 2f64.powi(-23) * terms().map(f64::abs).sum::<f64>() * 1.001;
    let error = f64::from(found) - terms().sum::<f64>();
    assert!(error.abs() <= bound, "off by {error:e}, more than {bound:e}");
    if let Some(greatest) = terms().max_by(|a, b| a.abs().total_cmp(&b.abs())) {
        assert!((error - greatest).abs() > bound, "a missing term would be seen");
    }
}

#[test]
fn sums_are_rounded_to_odd() {
    let u = f32::EPSILON / 2.0;
    assert_eq!(add_to_odd(1.0, 1.0), 2.0);
    assert_eq!(add_to_odd(1.0, u / 2.0), 1.0 + 2.0 * u);
    assert_eq!(add_to_odd(1.0, f32::MIN_POSITIVE), 1.0 + 2.0 * u);
    assert_eq!(add_to_odd(1.0 + 2.0 * u, u), 1.0 + 2.0 * u);
    assert_eq!(add_to_odd(-1.0, -1e-30), -1.0 - 2.0 * u);
    assert_eq!(add_to_odd(1.0, -1e-30), 1.0 - u);
    assert_eq!(add_to_odd(f32::MAX, 1.0), f32::INFINITY);
    assert_eq!(add_to_odd(1.5 * f32::MIN_POSITIVE, -f32::MIN_POSITIVE), 0.0);
    assert!(add_to_odd(f32::INFINITY, f32::NEG_INFINITY).is_nan());
}
