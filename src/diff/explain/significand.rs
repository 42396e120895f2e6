//! An exponential of low accuracy, by its effect: 2^⌊y⌋ times a polynomial of y − ⌊y⌋ is linear in the polynomial's
//! coefficients, and so is the lse part of dQ, which a few rows of the candidate then show.

use super::Case;
use super::lse::SeenLse;
use crate::diff::replay::{Excerpt, SIGNIFICAND_TERMS, Significand};
use crate::diff::truth::Stage;
use ndarray::Array1;

/// Tokens that are looked at, and features of each.
const TOKENS: usize = 24;
const FEATURES: usize = 64;
/// The lowest degree that makes an exponential, and how little more a lower one than the highest may leave to be it.
const LOWEST: usize = 1;
const AS_GOOD: f64 = 1.5;

/// The polynomial that the rows of dQ show, of the lowest degree that does; none where lse is off by more than low accuracy.
pub(super) fn seen(case: &Case, excerpts: &[Excerpt], lse: &SeenLse) -> Option<Significand> {
    if !lse.is_off_by_little() {
        return None;
    }
    let lse_as_recorded = case.judged.iter().all(|&m| case.step.microbatches[m].recorded_lse.is_some());
    let mut columns: Vec<Vec<f64>> = vec![vec![]; SIGNIFICAND_TERMS];
    let mut rest: Vec<f64> = vec![];
    for (place, excerpt) in excerpts.iter().enumerate().filter(|(place, _)| case.diverges(*place, Stage::DHidden)) {
        let values = case.produced.microbatches[place].get(&Stage::DHidden)?;
        let numbers = excerpt.sample().tokens();
        let taking_part = (0..numbers.len()).filter(|&i| case.takes_part(place, numbers[i]));
        let every = numbers.len().div_ceil(TOKENS.div_ceil(excerpts.len())).max(1);
        for i in taking_part.step_by(every) {
            let row = case.value_rows_of(place, Stage::DHidden, std::iter::once(numbers[i])).next()?;
            let (terms, others) = excerpt.significand_terms(i, lse_as_recorded, FEATURES);
            columns.iter_mut().zip(&terms).for_each(|(column, term)| column.extend(term));
            rest.extend(values.values.row(row).iter().zip(&others).map(|(candidate, others)| candidate - others));
        }
    }
    let columns: Vec<Array1<f64>> = columns.into_iter().map(Array1::from).collect();
    let rest = Array1::from(rest);
    let fits: Vec<(f64, Vec<f64>)> =
        (LOWEST..SIGNIFICAND_TERMS).map(|degree| least_squares(&columns[..=degree], &rest)).collect();
    let least = fits.iter().map(|(left, _)| *left).fold(f64::INFINITY, f64::min);
    let (_, found) = fits.into_iter().find(|(left, _)| *left <= AS_GOOD * AS_GOOD * least)?;
    let mut coefficients = [0.0; SIGNIFICAND_TERMS];
    coefficients.iter_mut().zip(found).for_each(|(to, from)| *to = from);
    coefficients.iter().all(|c| c.is_finite()).then_some(Significand { coefficients, lse_as_recorded })
}

/// Σ c·column nearest to `to`: what is left, squared, and the coefficients, by Gram and Schmidt's method.
fn least_squares(columns: &[Array1<f64>], to: &Array1<f64>) -> (f64, Vec<f64>) {
    let mut orthogonal: Vec<Array1<f64>> = vec![];
    // Row i: how column i is made of the orthogonal ones.
    let mut made_of: Vec<Vec<f64>> = vec![];
    for column in columns {
        let (mut left, mut parts) = (column.clone(), vec![]);
        for other in &orthogonal {
            // Twice is enough.
            let mut part = 0.0;
            for _ in 0..2 {
                let more = other.dot(&left) / other.dot(other);
                left.scaled_add(-more, other);
                part += more;
            }
            parts.push(part);
        }
        orthogonal.push(left);
        made_of.push(parts);
    }
    let (mut left, mut out) = (to.clone(), vec![]);
    for other in &orthogonal {
        let part = other.dot(&left) / other.dot(other);
        left.scaled_add(-part, other);
        out.push(part);
    }
    for i in (0..out.len()).rev() {
        for (j, part) in made_of[i].iter().enumerate() {
            out[j] -= out[i] * part;
        }
    }
    (left.dot(&left), out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn least_squares_finds_the_coefficients_of_a_sum() {
        let f: Vec<f64> = (0..200).map(|i| f64::from(i) / 200.0).collect();
        let column = |k: i32| f.iter().map(|f| f.powi(k)).collect::<Array1<f64>>();
        let columns: Vec<Array1<f64>> = (0..5).map(column).collect();
        let right = [1.0, 0.695, 0.2276, 0.0771, -1e-5];
        let sum = columns.iter().zip(right).fold(Array1::zeros(200), |sum, (column, c)| sum + c * column);
        let (left, found) = least_squares(&columns, &sum);
        assert!(left < 1e-25, "{left}");
        found.iter().zip(right).for_each(|(found, right)| assert!((found - right).abs() < 1e-9, "{found} {right}"));
    }
}
