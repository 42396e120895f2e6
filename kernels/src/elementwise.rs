//! Functions of one float and sums over a row, written so that they vectorise.
//!
//! ```text
//! exp x = 2^k · e^r,  k = round(x / ln 2),  r = x − k·ln 2 in two steps,  e^r = 1 + r + r²·p(r), p of degree 4
//! tanh y = y + y³·p(y²), p of degree 4, for |y| < 0.625;  1 − 2/(exp 2|y| + 1) with y's sign beyond
//! ```
//! The polynomials are minimax fits; their own relative errors are 0.05·u and 0.07·u, with u = 2⁻²⁴.
//!
//! exp: relative error at most 2·u over [−87.33, 88.72]; 0 below (the result would not be a normal number), +∞ above.
//! tanh: relative error at most 4·u. Both pass NaN through.

use crate::cpu::Isa;

/// The least x whose exponential is a normal number.
const LEAST: f32 = -87.33654;
/// The largest whose exponential is finite.
const GREATEST: f32 = 88.72283;

/// e^x.
#[inline(always)]
pub(crate) fn exp<I: Isa>(x: f32) -> f32 {
    /// Adding it leaves the nearest integer in the low bits of the significand; above them lie zeros enough to shift away.
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let shifted = I::mul_add(x, std::f32::consts::LOG2_E, ROUND);
    let k = shifted - ROUND;
    let r = I::mul_add(k, -LN_2_LOW, I::mul_add(k, -LN_2_HIGH, x));
    let p = I::mul_add(r, 0.001_381_454, 0.008_368_745);
    let p = I::mul_add(p, r, 0.041_668_39);
    let p = I::mul_add(p, r, 0.166_665_21);
    let p = I::mul_add(p, r, 0.499_999_94);
    let p = I::mul_add(p, r * r, r) + 1.0;
    // Times 2^k, by way of the exponent: p lies around 1, and within the bounds the result is a normal number.
    let e = f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23));
    // What was computed outside the bounds is of no use. NaN fails both comparisons and comes out of the sum.
    let e = if x >= LEAST { e } else { 0.0 };
    if x <= GREATEST { e } else { x + f32::INFINITY }
}

/// tanh y.
#[inline(always)]
pub(crate) fn tanh<I: Isa>(y: f32) -> f32 {
    let square = y * y;
    let p = I::mul_add(square, -0.005_704_227, 0.020_638_434);
    let p = I::mul_add(p, square, -0.053_739_525);
    let p = I::mul_add(p, square, 0.133_314_4);
    let p = I::mul_add(p, square, -0.333_332_8);
    let near = I::mul_add(p * square, y, y);
    let far = (1.0 - 2.0 / (exp::<I>(2.0 * y.abs()) + 1.0)).copysign(y);
    if y.abs() < 0.625 { near } else { far }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::portable::Portable;
    use crate::gemm::tests::Threes;

    const U: f64 = 1.0 / (1 << 24) as f64;

    /// Largest relative error of `f` against `truth` over `count` points from `low` to `high`, in u.
    fn worst(low: f32, high: f32, count: u32, f: impl Fn(f32) -> f32, truth: impl Fn(f64) -> f64) -> f64 {
        let error = |x: f32| {
            let truth = truth(x.into());
            (f64::from(f(x)) - truth).abs() / truth.abs() / U
        };
        (0..=count).map(|i| error(low + (high - low) * (i as f32 / count as f32))).fold(0.0, f64::max)
    }

    /// With two roundings in each multiply-add, and with one.
    fn exps() -> [fn(f32) -> f32; 2] {
        [exp::<Portable>, exp::<Threes>]
    }

    #[test]
    fn exp_is_as_accurate_as_promised() {
        for exp in exps() {
            for (low, high) in [(LEAST, 88.72), (-2.0, 2.0), (-1e-3, 1e-3), (-20.0, 0.0)] {
                let error = worst(low, high, 1_000_000, exp, f64::exp);
                assert!(error <= 2.0, "{error} u in [{low}, {high}]");
            }
        }
        assert!(worst(-2.0, 0.0, 1000, |x| 1.0 + x + x * x / 2.0, f64::exp) > 2.0, "the comparison can fail");
    }

    #[test]
    fn exp_at_the_edges() {
        for exp in exps() {
            assert_eq!(exp(0.0), 1.0);
            assert_eq!(exp(-0.0), 1.0);
            assert_eq!(exp(f32::NEG_INFINITY), 0.0);
            assert_eq!(exp(f32::MIN), 0.0);
            assert_eq!(exp(-87.34), 0.0);
            assert!(exp(LEAST) >= f32::MIN_POSITIVE);
            assert_eq!(exp(f32::INFINITY), f32::INFINITY);
            assert_eq!(exp(88.73), f32::INFINITY);
            assert!(exp(GREATEST).is_finite());
            assert!(exp(f32::NAN).is_nan() && exp(-f32::NAN).is_nan());
        }
    }

    #[test]
    fn tanh_is_as_accurate_as_promised() {
        for tanh in [tanh::<Portable>, tanh::<Threes>] {
            for (low, high) in [(1e-30, 1e-3), (1e-3, 0.7), (0.6, 0.65), (0.5, 12.0), (-12.0, -1e-3), (10.0, 1e6)] {
                let error = worst(low, high, 500_000, tanh, f64::tanh);
                assert!(error <= 4.0, "{error} u in [{low}, {high}]");
            }
            assert_eq!((tanh(0.0), tanh(f32::INFINITY), tanh(f32::NEG_INFINITY)), (0.0, 1.0, -1.0));
            assert!(tanh(f32::NAN).is_nan());
        }
    }
}
