//! e^x in float32, without branches, so that loops over it vectorise.
//!
//! x = n·ln 2 + r with |r| ≤ ln 2 / 2 (ln 2 in two parts, so that n·ln 2 is exact to beyond float32: Cody and Waite), and
//! e^r by its Taylor polynomial of degree 7, whose remainder is below 2⁻³¹. Relative error below 1.5·2⁻²³ (tested densely).
//! Results below the smallest normal number are 0; NaN propagates.

const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;
/// Adding it rounds to a whole number, which is then found in the low bits.
const ROUND: f32 = 12_582_912.0;
/// ln of the smallest normal float32.
const LOWEST: f32 = -87.336_54;
/// ln of the largest float32.
const HIGHEST: f32 = 88.722_83;

/// e^x for any x.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let clamped = if x < LOWEST { LOWEST } else { x };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (clamped - n * LN_2_HIGH) - n * LN_2_LOW;
    let p = 1.0 / 5040.0;
    let p = p * r + 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    // 2ⁿ in two factors, since n may be one beyond the largest exponent.
    let exponent = shifted.to_bits() as i32 - ROUND.to_bits() as i32;
    let half = exponent >> 1;
    let power = |e: i32| f32::from_bits(((e + 127) << 23) as u32);
    let value = p * power(half) * power(exponent - half);
    if x < LOWEST {
        0.0
    } else if x > HIGHEST {
        f32::INFINITY
    } else {
        value
    }
}

#[cfg(test)]
mod tests {
    use super::exp;

    #[test]
    fn relative_error_is_below_its_bound_everywhere() {
        let mut worst = (0.0f64, 0.0f32);
        // Every 97th float32 between −87.33 and 88.7, of both signs.
        for bits in (0..=88.7f32.to_bits()).step_by(97) {
            for x in [f32::from_bits(bits), -f32::from_bits(bits)] {
                if x < super::LOWEST {
                    continue;
                }
                let truth = f64::from(x).exp();
                let error = ((f64::from(exp(x)) - truth) / truth).abs() * f64::from(1u32 << 23);
                if error > worst.0 {
                    worst = (error, x);
                }
            }
        }
        assert!(worst.0 < 1.5, "{} units of 2⁻²³ at {}", worst.0, worst.1);
    }

    #[test]
    fn edges() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(-88.0), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(89.0), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }
}
