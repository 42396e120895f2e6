//! The lse that a candidate's rows show, and what alone could have made it so.

use super::{Case, hypotheses::TILES};
use crate::diff::replay::Excerpt;
use crate::diff::truth::Stage;
use crate::report::model::Verdict;
use fused_xent_kernels::problem::Label;
use ndarray::ArrayView1;
use rayon::prelude::*;

/// The lse that the sampled tokens of a step show, where it is not the reference's.
#[derive(Debug, Default)]
pub(super) struct SeenLse {
    tokens: Vec<SeenToken>,
    /// Vocab ids that take part.
    valid: usize,
}

#[derive(Debug)]
struct SeenToken {
    /// The candidate's lse less the reference's.
    off: f64,
    /// exp lse, by the reference.
    sum: f64,
    /// Σ P over the vocab ids up to each, [V + 1].
    up_to: Vec<f64>,
}

/// Tokens that are looked at.
const MOST_TOKENS: usize = 96;
/// An approximate exp or log is off by no more than this.
const LITTLE: f64 = 0.02;
/// How many missing tiles are tried.
const MOST_TILES: usize = 8;

impl SeenLse {
    /// From lse itself, else from the loss, else from the scale of the rows of dQ; nothing where none of these diverges.
    pub fn new(case: &Case, excerpts: &[Excerpt]) -> Self {
        let mut tokens = Vec::new();
        let valid = case.judged.iter().map(|&m| case.step.microbatches[m].problem.valid_columns()).min().unwrap_or(0);
        for (place, excerpt) in excerpts.iter().enumerate() {
            let problem = &case.step.microbatches[case.judged[place]].problem;
            let numbers = excerpt.sample().tokens();
            let some = (numbers.len() * excerpts.len()).div_ceil(MOST_TOKENS).max(1);
            let places = (0..numbers.len()).step_by(some).filter(|&i| problem.labels()[numbers[i]] != Label::Masked);
            let seen = |i: usize| {
                let off = off(case, place, numbers[i]).filter(|off| off.is_finite())?;
                let lse = case.truth(place).outcome.forward.lse[numbers[i]];
                Some(SeenToken { off, sum: lse.exp(), up_to: cumulated(excerpt.logits().row(i), valid, lse) })
            };
            tokens.par_extend(places.collect::<Vec<_>>().into_par_iter().filter_map(seen));
        }
        Self { tokens, valid }
    }

    /// Whether it is off by so little that low accuracy may be why.
    pub fn is_off_by_little(&self) -> bool {
        !self.tokens.is_empty() && self.tokens.iter().all(|token| token.off.abs() < LITTLE)
    }

    /// The number of zero columns in the sum of exponentials that explains it: exp lse' = exp lse + pad.
    pub fn padding(&self) -> Option<usize> {
        let mut pads: Vec<f64> = self.tokens.iter().map(|token| token.off.exp_m1() * token.sum).collect();
        pads.sort_by(f64::total_cmp);
        let median = *pads.get(pads.len() / 2)?;
        (0.5..1e6).contains(&median).then(|| median.round() as usize)
    }

    /// Tiles (size and index) whose absence from the sum of exponentials explains it best; if nothing shows it, the first and last.
    pub fn missing_tiles(&self) -> Vec<(usize, usize)> {
        if self.tokens.is_empty() {
            let ends = |tile: usize| [(tile, 0), (tile, self.valid.div_ceil(tile) - 1)];
            return TILES.into_iter().filter(|&tile| tile < self.valid).flat_map(ends).collect();
        }
        let by_shares = (2..=64).map(|shares| self.valid.div_ceil(shares));
        let mut sizes: Vec<usize> = TILES.into_iter().chain(by_shares).filter(|&tile| tile > 0 && tile < self.valid).collect();
        sizes.sort_unstable();
        sizes.dedup();
        let tiles: Vec<(usize, usize)> =
            sizes.iter().flat_map(|&tile| (0..self.valid.div_ceil(tile)).map(move |index| (tile, index))).collect();
        let misfit = |&(tile, index): &(usize, usize)| -> f64 {
            let (start, end) = (index * tile, ((index + 1) * tile).min(self.valid));
            let of_token = |token: &SeenToken| {
                // Σ P over the tile, as the candidate's lse has it, and as it is.
                (-token.off.exp_m1() - (token.up_to[end] - token.up_to[start])).powi(2)
            };
            self.tokens.iter().map(of_token).sum()
        };
        let mut rated: Vec<(f64, (usize, usize))> = tiles.par_iter().map(|tile| (misfit(tile), *tile)).collect();
        rated.sort_by(|a, b| a.0.total_cmp(&b.0));
        let none: f64 = self.tokens.iter().map(|token| token.off.exp_m1().powi(2)).sum();
        rated.into_iter().take(MOST_TILES).filter(|(misfit, _)| *misfit < 0.5 * none).map(|(_, tile)| tile).collect()
    }
}

/// What the candidate's lse is less the reference's, at token `n`, as far as the candidate shows it.
fn off(case: &Case, place: usize, n: usize) -> Option<f64> {
    let (stages, truth) = (&case.produced.microbatches[place], case.truth(place));
    let diverges =
        |stage: Stage| case.microbatches[place].tensors.iter().any(|t| t.name == stage.name() && t.verdict == Verdict::Diverge);
    for (stage, reference) in [(Stage::Lse, &truth.outcome.forward.lse), (Stage::Loss, &truth.outcome.forward.loss)] {
        if let Some(values) = stages.get(&stage) {
            let off = values.values[[n, 0]] - reference[n];
            if diverges(stage) {
                return Some(off);
            }
        }
    }
    let row = case.rows(place, Stage::DHidden).map_or(Some(n), |rows| rows.binary_search(&n).ok())?;
    let (candidate, hidden) = (stages.get(&Stage::DHidden)?.values.row(row), &truth.outcome.gradients.hidden);
    if !diverges(Stage::DHidden) {
        return None;
    }
    let of_p = hidden.lse.row(row);
    let scale = (&candidate - &hidden.label.row(row)).dot(&of_p) / of_p.dot(&of_p);
    (scale > 0.0).then(|| -scale.ln())
}

fn cumulated(z: ArrayView1<f64>, valid: usize, lse: f64) -> Vec<f64> {
    let mut sum = 0.0;
    let next = z.iter().take(valid).map(|z| {
        sum += (z - lse).exp();
        sum
    });
    std::iter::once(0.0).chain(next).collect()
}
