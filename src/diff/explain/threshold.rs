//! The threshold of a gradient filter. All that matters of it is which tiles lie below, so that it is sought among the sizes of
//! the tiles at hand.

use super::bench::{Bench, Fit};
use super::hypotheses::THRESHOLDS;
use super::search::Search;
use crate::diff::fault::Fault;
use crate::diff::replay::{Counterfactual, Filter};
use fused_xent_kernels::problem::Label;

/// How far from the nearest threshold tried, as a factor.
const RANGE: f64 = 8.0;
/// How many are tried in a round, and in how many rounds at most.
const IN_A_ROUND: usize = 8;
const ROUNDS: usize = 6;

impl<'a> Search<'a> {
    /// The filter with thresholds around the best, best first; masked tokens may count or not.
    pub(super) fn thresholds(&mut self, filter: Filter, applied: &Counterfactual, current: &Fit) -> Vec<(Fault, Fit)> {
        let labels = |m: &usize| self.case.step.microbatches[*m].problem.labels();
        let masked = self.case.judged.iter().flat_map(labels).any(|label| *label == Label::Masked);
        let mut out = Vec::new();
        for masked_count in if masked { &[false, true][..] } else { &[false] } {
            let filter = Filter { masked_count: *masked_count, ..filter };
            let thresholds = self.between_tiles(filter, applied);
            let near = self.narrowed(filter, &thresholds, applied, current, |s| &s.few);
            let fits = self.narrowed(filter, &near, applied, current, |s| &s.more);
            out.extend(
                self.fits(fits.into_iter().map(|eps| with_threshold(filter, eps)).collect(), applied, current, |s| &s.more),
            );
        }
        out.sort_by(|a: &(Fault, Fit), b| a.1.left().total_cmp(&b.1.left()));
        out
    }

    /// One threshold between each two sizes of tiles, sorted.
    fn between_tiles(&mut self, filter: Filter, applied: &Counterfactual) -> Vec<f64> {
        let how = Counterfactual { filter: Some(filter), ..*applied };
        self.learn([&how].into_iter());
        let sizes = self.excerpts.iter().filter_map(|excerpt| excerpt.tile_sizes(&how)).flatten().copied();
        let mut sizes: Vec<f64> = sizes.filter(|size| (filter.eps / RANGE..filter.eps * RANGE).contains(size)).collect();
        sizes.sort_by(f64::total_cmp);
        sizes.dedup();
        sizes.windows(2).map(|pair| roundest(pair[0], pair[1])).collect()
    }

    /// Those thresholds next to the best: what is left falls up to it, and rises from it on.
    fn narrowed(
        &mut self,
        filter: Filter,
        thresholds: &[f64],
        applied: &Counterfactual,
        current: &Fit,
        bench: fn(&Self) -> &Bench<'a>,
    ) -> Vec<f64> {
        let mut range = thresholds;
        for _ in 0..ROUNDS {
            if range.len() <= IN_A_ROUND {
                break;
            }
            let places: Vec<usize> = (0..IN_A_ROUND).map(|i| i * (range.len() - 1) / (IN_A_ROUND - 1)).collect();
            let faults = places.iter().map(|&place| with_threshold(filter, range[place])).collect();
            let fits = self.fits(faults, applied, current, bench);
            let left = |place: usize| {
                let fault = with_threshold(filter, range[place]);
                fits.iter().find(|(other, _)| *other == fault).map_or(f64::INFINITY, |(_, fit)| fit.left())
            };
            let best = fits.first().map_or(0.0, |(_, fit)| fit.left());
            let is_best = |place: &usize| left(*place) <= best * (1.0 + 1e-9);
            let (first, last) = (places.iter().position(is_best), places.iter().rposition(is_best));
            let (Some(first), Some(last)) = (first, last) else { break };
            let narrower = &range[places[first.saturating_sub(1)]..=places[(last + 1).min(IN_A_ROUND - 1)]];
            if narrower.len() == range.len() {
                break;
            }
            range = narrower;
        }
        range.iter().copied().step_by(range.len().div_ceil(2 * IN_A_ROUND).max(1)).collect()
    }
}

fn with_threshold(filter: Filter, eps: f64) -> Fault {
    Fault::GradientFilter(Filter { eps, ..filter })
}

/// The roundest number above `low` and at most `high`: a usual threshold, or one of few digits.
fn roundest(low: f64, high: f64) -> f64 {
    let within = |x: &f64| low < *x && *x <= high;
    let of_digits = (0..6).map(|digits| {
        // A quotient of whole numbers is the number that is written so.
        let exponent = digits - high.log10().floor() as i32;
        let (times, over) = (10f64.powi(exponent.max(0)), 10f64.powi((-exponent).max(0)));
        (high * times / over).floor() * over / times
    });
    THRESHOLDS.into_iter().chain(of_digits).find(within).unwrap_or(high)
}

#[cfg(test)]
mod tests {
    use super::roundest;

    #[test]
    fn a_threshold_is_as_round_as_its_neighbours_leave_room_for() {
        assert_eq!(roundest(0.003, 0.004), 1.0 / 256.0);
        assert_eq!(roundest(0.000_29, 0.000_34), 0.000_3);
        assert_eq!(roundest(0.012_31, 0.012_378), 0.012_37);
        assert_eq!(roundest(0.3, f64::from_bits(0.3f64.to_bits() + 1)), f64::from_bits(0.3f64.to_bits() + 1));
    }
}
