//! Which tile sizes fit rows in error: one tile, or the same place in every so many rows.

use std::ops::{Range, RangeInclusive};

/// The smallest size of a tile worth the name.
pub(super) const SMALLEST: usize = 8;
/// Sizes that fit are listed up to this many.
const MOST: usize = 6;

/// Sizes that kernels tile by: powers of two, then three times such, below `of`; then other multiples of 16 below `unusual`.
fn sizes(of: usize, unusual: usize) -> impl Iterator<Item = usize> {
    let powers = |of: usize| (3..usize::BITS).map(|i| 1usize << i).take_while(move |&size| size < of);
    let usual = powers(of).chain(powers(of).map(|size| 3 * size).filter(move |&size| size < of));
    let other = |size: &usize| !(size.is_power_of_two() || size.is_multiple_of(3) && (size / 3).is_power_of_two());
    usual.chain((1..).map(|i| 16 * i).take_while(move |&size| size < unusual).filter(other))
}

/// Sizes of which one tile starts in `starts` and ends in `ends`, the usual ones first; the last one may be cut short
/// (`to_end`) by the number of rows, `of`. There must be another tile beside it.
pub(super) fn one_tile(starts: RangeInclusive<usize>, ends: RangeInclusive<usize>, to_end: bool, of: usize) -> Vec<usize> {
    let fits = |size: &usize| {
        let start = starts.end() / size * size;
        starts.contains(&start) && (ends.contains(&(start + size)) || to_end && start + size >= of)
    };
    sizes(of, of).filter(fits).take(MOST).collect()
}

/// Rows that lie in the same place of every period.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fold {
    /// Rows from one such place to the next.
    pub period: usize,
    /// The place within the period.
    pub window: Range<usize>,
}

impl Fold {
    pub fn contains(&self, row: usize) -> bool {
        self.window.contains(&(row % self.period))
    }
}

/// The period under which the weighed rows of a tensor of `of` rows fall together best, if that is no accident.
pub(super) fn periodic(weighed: &[(usize, f64)], of: usize) -> Option<Fold> {
    /// e⁻¹⁴: how probable an accident may be, for each place and period.
    const SURE: f64 = 14.0;
    const UNUSUAL: usize = 1024;
    let total: f64 = weighed.iter().map(|(_, w)| w).sum();
    let squared: f64 = weighed.iter().map(|(_, w)| w * w).sum();
    let effective = total * total / squared;
    let mut best: Option<(f64, Fold)> = None;
    for period in sizes(of / 2 + 1, UNUSUAL.min(of / 2 + 1)).filter(|&period| period >= 2 * SMALLEST) {
        let mut folded = vec![0.0; period];
        weighed.iter().for_each(|(row, w)| folded[row % period] += w);
        let window = densest(&folded, 0.98 * total);
        let gain = (period as f64 / window.len() as f64).ln() * effective - (period as f64).ln() - SURE;
        let mut periods: Vec<usize> =
            weighed.iter().filter(|(row, _)| window.contains(&(row % period))).map(|(row, _)| row / period).collect();
        periods.dedup();
        let spread = periods.len() > 2;
        if window.len() * 2 <= period && spread && gain > 0.0 && best.as_ref().is_none_or(|(most, _)| gain > *most) {
            best = Some((gain, Fold { period, window }));
        }
    }
    best.map(|(_, fold)| fold)
}

/// The shortest window that holds `wanted` of the sum, and what adjoins it with as much weight.
fn densest(folded: &[f64], wanted: f64) -> Range<usize> {
    let mut best = 0..folded.len();
    let (mut start, mut held) = (0, 0.0);
    for end in 0..folded.len() {
        held += folded[end];
        while held - folded[start] >= wanted && start < end {
            held -= folded[start];
            start += 1;
        }
        if held >= wanted && end + 1 - start < best.len() {
            best = start..end + 1;
        }
    }
    let enough = 0.2 * wanted / best.len() as f64;
    while best.start > 0 && folded[best.start - 1] > enough {
        best.start -= 1;
    }
    while best.end < folded.len() && folded[best.end] > enough {
        best.end += 1;
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_tile_is_found_by_where_it_starts_and_ends() {
        assert_eq!(one_tile(384..=384, 512..=512, false, 1024), [128]);
        assert_eq!(one_tile(380..=384, 512..=512, false, 1024), [128]);
        assert_eq!(one_tile(768..=768, 1000..=1000, true, 1000), [256, 384, 768]);
        assert_eq!(one_tile(100..=100, 200..=200, false, 1024), [0usize; 0]);
        assert_eq!(one_tile(960..=960, 1920..=1920, false, 4096), [960]);
    }

    #[test]
    fn a_period_is_found_and_noise_has_none() {
        let all = |keep: fn(&usize) -> bool| (0..1000).filter(keep).map(|row| (row, 1.0)).collect::<Vec<_>>();
        assert_eq!(periodic(&all(|r| r % 64 == 63), 1000), Some(Fold { period: 64, window: 63..64 }));
        assert_eq!(periodic(&all(|r| r % 256 >= 128), 1000), Some(Fold { period: 256, window: 128..256 }));
        assert_eq!(periodic(&all(|r| r * r % 7919 % 5 == 0), 1000), None);
        assert_eq!(periodic(&all(|_| true), 1000), None);
        assert_eq!(periodic(&[(64, 1.0), (128, 1.0)], 1000), None, "two rows are no pattern");
    }
}
