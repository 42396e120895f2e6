//! Which rows a hypothesis is tried on: those that are worst, and some spread over the tensor.

use super::Case;
use crate::diff::replay::{Excerpt, Rows};
use crate::diff::sampling;
use crate::diff::truth::{RowsAre, Stage};
use crate::report::model::Verdict;
use fused_xent_kernels::floor::Tolerance;
use fused_xent_kernels::problem::Sample;
use ndarray::ArrayView2;
use std::collections::BTreeSet;
use std::num::NonZeroUsize;

/// Rows of each kind that are tried at most, in a microbatch.
const MOST_ROWS: usize = 256;
/// Logits that are held at most.
const MOST_LOGITS: usize = 1 << 26;
/// Rows of each kind that every hypothesis is tried on, in all microbatches together.
const FIRST_ROWS: usize = 24;

/// An excerpt of each judged microbatch, with the same vocab ids in all.
pub(super) fn excerpts<'a>(case: &Case<'a>) -> Vec<Excerpt<'a>> {
    let shapes = case.judged.iter().map(|&m| case.step.microbatches[m].problem.shape());
    let (vocab, tokens) = shapes.fold((1, 1), |(vocab, tokens), s| (vocab.max(s.vocab), tokens + s.tokens));
    let most = |width: usize| NonZeroUsize::new((MOST_LOGITS / width).clamp(16, MOST_ROWS)).expect("16 at least");
    let (most_tokens, most_ids) = (most(vocab * case.judged.len()), most(tokens));
    let rule = sampling::choose(most_tokens.max(most_ids), case.step, case.judged, 0);
    let ids = {
        let worst = (0..case.judged.len()).map(|place| worst_rows(case, place, RowsAre::VocabIds)).collect();
        chosen(case.rows(0, Stage::DUnembedding), vocab, &interleaved(worst), rule.first().map_or(&[], Sample::ids), most_ids)
    };
    let excerpt = |(place, rule): (usize, &Sample)| {
        let (m, truth) = (case.judged[place], case.truth(place));
        let shape = case.step.microbatches[m].problem.shape();
        let worst = worst_rows(case, place, RowsAre::Tokens);
        let tokens = chosen(case.rows(place, Stage::DHidden), shape.tokens, &worst, rule.tokens(), most_tokens);
        let sample = Sample::new(shape, tokens, ids.clone()).expect("rows within the shape");
        Excerpt::new(case.step, m, sample, &truth.outcome.forward.lse)
    };
    rule.iter().enumerate().map(excerpt).collect()
}

/// The few rows of the excerpts that every hypothesis is tried on.
pub(super) fn first_rows(case: &Case, excerpts: &[Excerpt]) -> Vec<Rows> {
    let of_tokens = (FIRST_ROWS / excerpts.len().max(1)).max(4);
    let worst_ids = interleaved((0..excerpts.len()).map(|place| worst_rows(case, place, RowsAre::VocabIds)).collect());
    let rows = |(place, excerpt): (usize, &Excerpt)| Rows {
        tokens: first(excerpt.sample().tokens(), &worst_rows(case, place, RowsAre::Tokens), of_tokens),
        ids: first(excerpt.sample().ids(), &worst_ids, FIRST_ROWS),
    };
    excerpts.iter().enumerate().map(rows).collect()
}

/// Up to `most` of the judged rows (`None`: all of so many): half of them the worst, the others by the rule where they are judged.
fn chosen(judged: Option<&[usize]>, of: usize, worst: &[usize], rule: &[usize], most: NonZeroUsize) -> Vec<usize> {
    let all: Vec<usize> = judged.map_or_else(|| (0..of).collect(), <[usize]>::to_vec);
    if all.len() <= most.get() {
        return all;
    }
    let mut out: BTreeSet<usize> = worst.iter().copied().take(most.get() / 2).collect();
    let by_rule: Vec<usize> =
        rule.iter().copied().filter(|row| judged.is_none_or(|rows| rows.binary_search(row).is_ok())).collect();
    fill(&mut out, &by_rule, most.get());
    fill(&mut out, &all, most.get());
    out.into_iter().collect()
}

/// Places among `rows` of up to `most`: half of them the worst.
fn first(rows: &[usize], worst: &[usize], most: usize) -> Vec<usize> {
    let places = worst.iter().filter_map(|row| rows.binary_search(row).ok());
    let mut out: BTreeSet<usize> = places.take(most / 2).collect();
    fill(&mut out, &(0..rows.len()).collect::<Vec<_>>(), most);
    out.into_iter().collect()
}

/// Adds rows of `from`, evenly spread, until there are `most`.
fn fill(out: &mut BTreeSet<usize>, from: &[usize], most: usize) {
    let left: Vec<usize> = from.iter().copied().filter(|row| !out.contains(row)).collect();
    let missing = most.saturating_sub(out.len()).min(left.len());
    out.extend((0..missing).map(|i| left[i * left.len() / missing]));
}

/// Rows of a microbatch that are off, the worst first: by what they add to the deviation, and by how far they are above their floor.
fn worst_rows(case: &Case, place: usize, kind: RowsAre) -> Vec<usize> {
    let truth = case.truth(place);
    let mut orders = Vec::new();
    for ((&stage, values), report) in case.produced.microbatches[place].iter().zip(&case.microbatches[place].tensors) {
        if stage.rows_are() == kind && report.verdict == Verdict::Diverge {
            let tolerance = &case.tolerances.microbatches[place][&stage];
            orders.extend(orders_of(values.values.view(), truth.outcome.stage(stage).view(), tolerance, case.rows(place, stage)));
        }
    }
    let accumulated = case.produced.accumulated.as_ref().zip(case.tolerances.accumulated.as_ref());
    if let (RowsAre::VocabIds, Some((values, (tolerance, reference)))) = (kind, accumulated) {
        let rows = case.rows(place, Stage::DUnembedding);
        orders.extend(orders_of(values.values.view(), reference.view(), tolerance, rows));
    }
    interleaved(orders)
}

fn orders_of(
    candidate: ArrayView2<f64>,
    reference: ArrayView2<f64>,
    tolerance: &Tolerance,
    rows: Option<&[usize]>,
) -> [Vec<usize>; 2] {
    let deviation: Vec<f64> = candidate
        .outer_iter()
        .zip(reference.outer_iter())
        .map(|(c, r)| c.iter().zip(r).map(|(c, r)| (c - r).powi(2)).sum())
        .collect();
    let of_floor: Vec<f64> =
        deviation.iter().enumerate().map(|(row, d)| d / (tolerance.l2(row..row + 1).powi(2) + f64::MIN_POSITIVE)).collect();
    [deviation, of_floor].map(|score| {
        let mut order: Vec<usize> = (0..score.len()).filter(|&row| score[row] > 0.0).collect();
        order.sort_by(|&a, &b| score[b].total_cmp(&score[a]));
        order.truncate(MOST_ROWS);
        order.into_iter().map(|row| rows.map_or(row, |rows| rows[row])).collect()
    })
}

/// The first of each, then the second of each, …
fn interleaved(lists: Vec<Vec<usize>>) -> Vec<usize> {
    let longest = lists.iter().map(Vec::len).max().unwrap_or(0);
    let mut seen = BTreeSet::new();
    let all = (0..longest).flat_map(|i| lists.iter().filter_map(move |list| list.get(i).copied()));
    all.filter(|row| seen.insert(*row)).collect()
}
