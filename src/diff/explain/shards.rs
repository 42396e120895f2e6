//! The shards of a parallel run that a candidate's rows speak for: few rows, few features, and sums up to every border that
//! a shard may have.

use super::Case;
use crate::diff::candidate::Values;
use crate::diff::fault::{Fault, Gradients};
use crate::diff::replay::{CumulatedRow, Excerpt, Split};
use crate::diff::truth::Stage;
use ndarray::{Array1, ArrayView1};
use std::collections::BTreeSet;

/// Rows of each kind that are looked at, and features of each.
const ROWS: usize = 8;
const FEATURES: usize = 64;
/// Numbers of shards.
const NUMBERS: std::ops::RangeInclusive<usize> = 2..=32;
/// How many sets of parameters are tried at most, and what part of the rows they may leave.
const MOST: usize = 8;
const GOOD: f64 = 0.5;

/// Rows of a candidate, beside what each piece of the sum adds to them.
#[derive(Default)]
pub(super) struct SeenShards {
    /// Of dQ: sums over vocab ids.
    tokens: Vec<SeenRow>,
    /// Of dK: sums over tokens, of one microbatch or of several that were added.
    ids: Vec<SeenRow>,
    /// How often the label counts in dQ, and in dK.
    labels: [Option<usize>; 2],
}

struct SeenRow {
    candidate: Array1<f64>,
    terms: Vec<CumulatedRow>,
}

impl SeenShards {
    pub fn new(case: &Case, excerpts: &[Excerpt]) -> Self {
        let labels = [Stage::DHidden, Stage::DUnembedding].map(|stage| label_counts(case, stage));
        Self { tokens: tokens(case, excerpts), ids: ids(case, excerpts), labels }
    }

    /// `dq-not-reduced` over so many vocab ids.
    pub fn of_dq(&self, vocab: usize) -> Vec<Fault> {
        let shards = splits(vocab).flat_map(|split| (0..split.shards).map(move |shard| (split, shard)));
        let misfit = |&(split, shard): &(Split, usize)| misfit(&self.tokens, |row| row.within(split.range(shard, row.len())));
        best(shards, misfit, &self.tokens).into_iter().map(|(split, shard)| Fault::DqNotReduced { split, shard }).collect()
    }

    /// `dk-not-reduced` over so many tokens.
    pub fn of_dk(&self, tokens: usize) -> Vec<Fault> {
        let shards = splits(tokens).flat_map(|split| (0..split.shards).map(move |shard| (split, shard)));
        let misfit = |&(split, shard): &(Split, usize)| misfit(&self.ids, |row| row.within(split.range(shard, row.len())));
        best(shards, misfit, &self.ids).into_iter().map(|(split, shard)| Fault::DkNotReduced { split, shard }).collect()
    }

    /// `local-lse` over so many vocab ids.
    pub fn of_lse(&self, vocab: usize) -> Vec<Fault> {
        let local = |split: Split, row: &CumulatedRow| {
            let shards = (0..split.shards).map(|shard| row.normalised(split.range(shard, row.len())));
            shards.fold(row.label(), |sum, shard| sum + shard)
        };
        let misfit = |&split: &Split| misfit(&self.tokens, |row| local(split, row));
        best(splits(vocab), misfit, &self.tokens).into_iter().map(Fault::LocalLse).collect()
    }

    /// `label-per-shard`: the numbers that the label's share of the rows shows, and usual ones.
    pub fn of_labels(&self, vocab: usize) -> Vec<Fault> {
        const USUAL: [usize; 5] = [2, 4, 8, 16, 32];
        let [dq, dk] = self.labels;
        let numbers: BTreeSet<usize> = USUAL.into_iter().chain(dq).chain(dk).filter(|&shards| shards <= vocab).collect();
        let both = numbers.into_iter().map(|shards| Fault::LabelPerShard { shards, of: Gradients::Both });
        let alone = [(dq, Gradients::Dq), (dk, Gradients::Dk)].into_iter().filter_map(|(shards, of)| Some((shards?, of)));
        both.chain(alone.map(|(shards, of)| Fault::LabelPerShard { shards, of })).collect()
    }
}

/// Every way to split so many rows, those first that leave no shard shorter.
fn splits(of: usize) -> impl Iterator<Item = Split> {
    let numbers = move |equal: bool| NUMBERS.take_while(move |&s| s <= of).filter(move |&s| of.is_multiple_of(s) == equal);
    let equal = numbers(true).map(|shards| Split { shards, even: false });
    equal.chain(numbers(false).flat_map(|shards| [false, true].map(|even| Split { shards, even })))
}

/// Every border between two shards.
fn borders(of: usize) -> Vec<usize> {
    let ranges = splits(of).flat_map(|split| (0..split.shards).map(move |shard| split.range(shard, of)));
    let all: BTreeSet<usize> = ranges.flat_map(|range| [range.start, range.end]).chain([0, of]).collect();
    all.into_iter().collect()
}

/// The part of the candidate's rows that remains beside the best multiple of what is `computed`.
fn misfit(rows: &[SeenRow], computed: impl Fn(&CumulatedRow) -> Array1<f64>) -> f64 {
    let (mut product, mut square, mut all) = (0.0, 0.0, 0.0);
    for row in rows {
        let computed = row.terms.iter().map(&computed).reduce(|a, b| a + b).unwrap_or_default();
        product += computed.dot(&row.candidate);
        square += computed.dot(&computed);
        all += row.candidate.dot(&row.candidate);
    }
    if square * all > 0.0 { 1.0 - product * product / (square * all) } else { 1.0 }
}

fn best<T>(of: impl Iterator<Item = T>, misfit: impl Fn(&T) -> f64, rows: &[SeenRow]) -> Vec<T> {
    if rows.is_empty() {
        return vec![];
    }
    let mut rated: Vec<(f64, T)> = of.map(|x| (misfit(&x), x)).filter(|(misfit, _)| *misfit < GOOD).collect();
    rated.sort_by(|a, b| a.0.total_cmp(&b.0));
    rated.into_iter().take(MOST).map(|(_, x)| x).collect()
}

fn tokens(case: &Case, excerpts: &[Excerpt]) -> Vec<SeenRow> {
    let mut out = Vec::new();
    for (place, excerpt) in excerpts.iter().enumerate().filter(|(place, _)| case.diverges(*place, Stage::DHidden)) {
        let Some(values) = case.produced.microbatches[place].get(&Stage::DHidden) else { continue };
        let numbers = excerpt.sample().tokens();
        let taking_part: Vec<usize> = (0..numbers.len()).filter(|&i| case.takes_part(place, numbers[i])).collect();
        let some = spread(&taking_part, ROWS.div_ceil(excerpts.len()));
        let borders = borders(case.step.microbatches[case.judged[place]].problem.shape().vocab);
        let rows = case.value_rows_of(place, Stage::DHidden, some.iter().map(|&i| numbers[i]));
        for (terms, row) in excerpt.cumulated_d_hidden(&some, &borders, FEATURES).into_iter().zip(rows) {
            out.push(SeenRow { candidate: features(values.values.row(row)), terms: vec![terms] });
        }
    }
    out
}

fn ids(case: &Case, excerpts: &[Excerpt]) -> Vec<SeenRow> {
    let own: Vec<usize> = (0..excerpts.len()).filter(|&place| case.diverges(place, Stage::DUnembedding)).collect();
    let Some(first) = excerpts.first() else { return vec![] };
    let numbers = first.sample().ids();
    let some = spread(&(0..numbers.len()).collect::<Vec<_>>(), ROWS);
    let rows: Vec<usize> = case.value_rows_of(0, Stage::DUnembedding, some.iter().map(|&i| numbers[i])).collect();
    let cumulated = |place: usize| {
        let tokens = case.step.microbatches[case.judged[place]].problem.shape().tokens;
        excerpts[place].cumulated_d_unembedding(&some, &borders(tokens), FEATURES)
    };
    let candidate = |values: &Values, row: usize| features(values.values.row(row));
    if !own.is_empty() {
        let rows_of = |place: usize| {
            let values = &case.produced.microbatches[place][&Stage::DUnembedding];
            let seen = |(terms, &row)| SeenRow { candidate: candidate(values, row), terms: vec![terms] };
            cumulated(place).into_iter().zip(&rows).map(seen).collect::<Vec<_>>()
        };
        return own.into_iter().flat_map(rows_of).collect();
    }
    let Some(values) = case.produced.accumulated.as_ref().filter(|_| case.accumulated_diverges()) else { return vec![] };
    let mut out: Vec<SeenRow> = rows.iter().map(|&row| SeenRow { candidate: candidate(values, row), terms: vec![] }).collect();
    for place in 0..excerpts.len() {
        out.iter_mut().zip(cumulated(place)).for_each(|(row, terms)| row.terms.push(terms));
    }
    out
}

/// How often the label counts in a gradient, if more than once: the median over its rows.
fn label_counts(case: &Case, stage: Stage) -> Option<usize> {
    let mut counts = Vec::new();
    for place in (0..case.judged.len()).filter(|&place| case.diverges(place, stage)) {
        let values = case.produced.microbatches[place].get(&stage)?;
        let gradients = &case.truth(place).outcome.gradients;
        let parts = if stage == Stage::DHidden { &gradients.hidden } else { &gradients.unembedding };
        for ((candidate, lse), label) in values.values.outer_iter().zip(parts.lse.outer_iter()).zip(parts.label.outer_iter()) {
            let square = label.dot(&label);
            if square > 0.0 {
                counts.push((&candidate - &lse).dot(&label) / square);
            }
        }
    }
    counts.sort_by(f64::total_cmp);
    let median = counts.get(counts.len() / 2)?;
    (1.5..1e4).contains(median).then(|| median.round() as usize)
}

fn features(row: ArrayView1<f64>) -> Array1<f64> {
    row.iter().take(FEATURES).copied().collect()
}

/// Up to `most` of them, evenly spread.
fn spread(of: &[usize], most: usize) -> Vec<usize> {
    let number = most.min(of.len());
    (0..number).map(|i| of[i * of.len() / number]).collect()
}
