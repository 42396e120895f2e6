//! Some rows of a microbatch's gradients, and what every replay of them shares: computed once, used by each hypothesis.
//!
//! A row of dQ needs the token's logits, all V; a row of dK needs that vocab id's logits, all N, and each token's lse. The
//! logits are held. Which lse a hypothesis makes is a matter of a few log-sum-exps per token ([`Reading`]): the reference's is
//! known from the start, any other is learnt on demand, in one pass over all logits for as many as are asked for.

use super::approximate::{Approximation, Exp, SIGNIFICAND_TERMS, split};
use super::filter::{Skipped, by_token_tile};
use super::sums::UnembeddingSum;
use super::ties::{self, NearTies, Ties, TokenErrors};
use super::token::{Known, Of, Reading, Replay, Token, TokenForward, TokenLogits};
use super::{Counterfactual, Filter, Outcome, Wanted};
use crate::diff::step::Step;
use fused_xent_kernels::contract::Precision;
use fused_xent_kernels::problem::{Label, Problem, Sample, Shape};
use fused_xent_kernels::reference::{self, Gradients};
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis, s};
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Tokens, and vocab ids, of the smallest tiles that are learnt if these divide those that are asked for.
const SMALL_TILE: usize = 16;
/// Vocab ids, and tokens, of one piece of work.
const PIECE: usize = 1024;

/// Some rows of microbatch `m` of a step, ready to be replayed.
pub struct Excerpt<'a> {
    step: &'a Step<'a>,
    m: usize,
    sample: Sample,
    /// z of the sampled tokens, [tokens, V], and of the sampled ids, [ids, N]; padding columns are there too.
    of_tokens: Array2<f64>,
    of_ids: Array2<f64>,
    /// lse of the sampled tokens, and Σ_v P·slope·K, [tokens, D]: the lse part of dQ for a cotangent of 1.
    lse: Vec<f64>,
    unit: Array2<f64>,
    known: Known,
    /// The largest |dlogits/g| of each tile, for filters of tiles under a computation.
    largest: Vec<(Counterfactual, Array2<f64>)>,
}

/// Which of an excerpt's rows are meant, by their places in its sample.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rows {
    /// Rows of dQ.
    pub tokens: Vec<usize>,
    /// Rows of dK.
    pub ids: Vec<usize>,
}

impl<'a> Excerpt<'a> {
    /// Of the rows that `sample` names. `lse` is the reference's, of all tokens.
    pub fn new(step: &'a Step<'a>, m: usize, sample: Sample, lse: &[f64]) -> Self {
        let problem = &step.microbatches[m].problem;
        let Shape { tokens, vocab, .. } = problem.shape();
        let q = hidden_rows(problem, sample.tokens());
        let mut of_tokens = Array2::zeros((sample.tokens().len(), vocab));
        of_tokens.axis_chunks_iter_mut(Axis(1), PIECE).into_par_iter().enumerate().for_each(|(i, mut z)| {
            let ids = i * PIECE..i * PIECE + z.ncols();
            z.assign(&reference::logit_tile(problem, &q, ids));
        });
        let mut of_ids = Array2::zeros((sample.ids().len(), tokens));
        for (i, mut z) in of_ids.axis_chunks_iter_mut(Axis(1), PIECE).enumerate() {
            let q = reference::hidden_rows(problem, i * PIECE..i * PIECE + z.ncols());
            let columns = sample.ids().par_iter().map(|&v| reference::logit_tile(problem, &q, v..v + 1)).collect::<Vec<_>>();
            z.outer_iter_mut().zip(columns).for_each(|(mut z, column)| z.assign(&column.column(0)));
        }
        let masked = problem.labels().iter().map(|label| *label == Label::Masked);
        let lse = lse.iter().zip(masked).map(|(&lse, masked)| if masked { f64::NAN } else { lse }).collect();
        let of = Of::LogSumExp(Exp::Exact);
        let reading = Reading { ids: (0, problem.valid_columns()), logits: Precision::F64, of };
        let right = Counterfactual::default();
        let replay = Replay::new(&right, step, m);
        let mut known = replay.recorded();
        known.push((reading, lse));
        let of_row = |z: ArrayView1<f64>| reading.of_logits(z.slice(s![..problem.valid_columns()]), || 0.0);
        let lse: Vec<f64> = of_tokens.axis_iter(Axis(0)).into_par_iter().map(of_row).collect();
        let unit = replay.lse_part_for_one(&of_tokens, &lse);
        Self { step, m, sample, of_tokens, of_ids, lse, unit, known, largest: vec![] }
    }

    /// The rows that are there.
    pub fn sample(&self) -> &Sample {
        &self.sample
    }

    /// All of them.
    pub fn rows(&self) -> Rows {
        Rows { tokens: (0..self.sample.tokens().len()).collect(), ids: (0..self.sample.ids().len()).collect() }
    }

    /// z of the sampled tokens, [tokens, V].
    pub fn logits(&self) -> &Array2<f64> {
        &self.of_tokens
    }

    /// What rows of dK need to know under `how` and do not: log-sum-exps, and of which tokens.
    fn missing(&self, how: &Counterfactual) -> Vec<(Vec<usize>, Reading)> {
        let labels = self.step.microbatches[self.m].problem.labels();
        let replay = Replay::new(how, self.step, self.m);
        let missing = |reading: Reading| {
            let known = self.known.iter().find(|(known, _)| *known == reading).map(|(_, lse)| lse);
            let taking_part = (0..labels.len()).filter(|&n| labels[n] != Label::Masked || replay.masked_take_part());
            (taking_part.filter(|&n| known.is_none_or(|lse| lse[n].is_nan())).collect::<Vec<usize>>(), reading)
        };
        replay.readings().into_iter().map(missing).filter(|(tokens, _)| !tokens.is_empty()).collect()
    }

    /// Whether rows of dK can be replayed under `how` with what is known.
    pub fn knows(&self, how: &Counterfactual) -> bool {
        self.missing(how).is_empty() && (how.filter.is_none() || self.tile_sizes(how).is_some())
    }

    /// The largest |dlogits/g| of each tile of a filter, [token tiles, vocab tiles], where they were learnt.
    pub fn tile_sizes(&self, how: &Counterfactual) -> Option<&Array2<f64>> {
        let key = of_any_eps(how);
        self.largest.iter().find(|(how, _)| *how == key).map(|(_, largest)| largest)
    }

    /// Learns what rows of dK need to know of every token under these computations.
    pub fn learn<'c>(&mut self, computations: impl Iterator<Item = &'c Counterfactual>) {
        let problem = &self.step.microbatches[self.m].problem;
        let computations: Vec<&Counterfactual> = computations.collect();
        // An exponential that is not exact is taken of a logit less the largest: that is learnt first.
        for maxima in [true, false] {
            // Most readings are missing of the same tokens: those are learnt in one pass.
            let mut passes: BTreeMap<Vec<usize>, Vec<Reading>> = BTreeMap::new();
            let missing = computations.iter().flat_map(|how| self.missing(how));
            for (tokens, reading) in missing.filter(|(_, reading)| (reading.of == Of::Max) == maxima) {
                let readings = passes.entry(tokens).or_default();
                if !readings.contains(&reading) {
                    readings.push(reading);
                }
            }
            for (tokens, readings) in passes {
                // The largest of the whole, whatever part of it is read.
                let max = |n: usize, reading: Reading| {
                    let maxima = self.known.iter().filter(|(known, _)| known.of == Of::Max && known.logits == reading.logits);
                    maxima.max_by_key(|(known, _)| known.ids.1).map_or(f64::NAN, |(_, max)| max[n])
                };
                for (reading, learnt) in readings.iter().zip(read(problem, &tokens, &readings, max)) {
                    let at = self.known.iter().position(|(known, _)| known == reading).unwrap_or_else(|| {
                        self.known.push((*reading, vec![f64::NAN; problem.shape().tokens]));
                        self.known.len() - 1
                    });
                    tokens.iter().zip(learnt).for_each(|(&n, learnt)| self.known[at].1[n] = learnt);
                }
            }
        }
        for how in computations {
            let Some(filter) = how.filter.filter(|_| self.tile_sizes(how).is_none()) else { continue };
            // Tiles that hold whole smaller ones are learnt from these: one pass serves many sizes.
            let whole = filter.tokens.is_multiple_of(SMALL_TILE) && filter.ids.is_multiple_of(SMALL_TILE);
            let small = Filter { tokens: SMALL_TILE, ids: SMALL_TILE, ..filter };
            if !whole {
                let largest = self.largest_of_tiles(how, filter);
                self.largest.push((of_any_eps(how), largest));
                continue;
            }
            let of_small = Counterfactual { filter: Some(small), ..*how };
            if self.tile_sizes(&of_small).is_none() {
                let largest = self.largest_of_tiles(&of_small, small);
                self.largest.push((of_any_eps(&of_small), largest));
            }
            if let Some(largest) = self.tile_sizes(&of_small).filter(|_| small != filter) {
                let larger = pooled(largest, filter.tokens / SMALL_TILE, filter.ids / SMALL_TILE);
                self.largest.push((of_any_eps(how), larger));
            }
        }
    }

    /// In one pass over all logits.
    fn largest_of_tiles(&self, how: &Counterfactual, filter: Filter) -> Array2<f64> {
        let replay = Replay::new(how, self.step, self.m);
        let problem = replay.problem;
        let Shape { tokens, vocab, .. } = problem.shape();
        let (block, piece) = (PIECE.next_multiple_of(filter.tokens), PIECE.next_multiple_of(filter.ids));
        let mut out = Array2::zeros((0, vocab.div_ceil(filter.ids)));
        for rows in (0..tokens).step_by(block).map(|start| start..(start + block).min(tokens)) {
            let q = reference::hidden_rows(problem, rows.clone());
            let block: Vec<Token> = self.tokens(&replay, rows);
            let of_piece = |start: usize| {
                let z = reference::logit_tile(problem, &q, start..(start + piece).min(vocab));
                let of_token = |(token, z)| replay.largest_of_tiles(filter, token, start, z);
                by_token_tile(filter, block.iter().zip(z.outer_iter()).map(of_token).collect())
            };
            let starts: Vec<usize> = (0..vocab).step_by(piece).collect();
            let pieces: Vec<Array2<f64>> = starts.into_par_iter().map(of_piece).collect();
            let views: Vec<ArrayView2<f64>> = pieces.iter().map(|piece| piece.view()).collect();
            let of_block = ndarray::concatenate(Axis(1), &views).expect("pieces of the same tokens");
            out.append(Axis(0), of_block.view()).expect("blocks of the same vocab ids");
        }
        out
    }

    /// Tokens, without their logits.
    fn tokens(&self, replay: &Replay, tokens: Range<usize>) -> Vec<Token> {
        tokens.into_par_iter().map(|n| replay.token(TokenLogits { n, row: None, known: &self.known })).collect()
    }

    /// What vocab ids up to each of `borders` add to rows of dQ, whose places are given, in the first `features`.
    pub fn cumulated_d_hidden(&self, places: &[usize], borders: &[usize], features: usize) -> Vec<CumulatedRow> {
        let right = Counterfactual::default();
        let replay = Replay::new(&right, self.step, self.m);
        let numbers = self.sample.tokens();
        let tokens: Vec<Token> = places.iter().flat_map(|&i| self.tokens(&replay, numbers[i]..numbers[i] + 1)).collect();
        let label = |token: &Token| {
            let column = token.label.column?;
            Some((
                column,
                token.label.value * &first_features(&reference::unembedding_rows(replay.problem, column..column + 1), features),
            ))
        };
        let mut out: Vec<CumulatedRow> =
            tokens.iter().map(|token| CumulatedRow::new(label(token).into_iter().collect())).collect();
        let pieces: Vec<Vec<(f64, Array1<f64>)>> = borders
            .par_windows(2)
            .map(|ids| {
                let k = reference::unembedding_rows(replay.problem, ids[0]..ids[1]);
                let k = k.slice(s![.., ..features.min(k.ncols())]);
                let of_token = |(token, &place): (&Token, &usize)| {
                    let z = self.of_tokens.slice(s![place, ids[0]..ids[1]]);
                    let dlogits: Array1<f64> = z.indexed_iter().map(|(i, &z)| replay.dlogits(token, ids[0] + i, z)).collect();
                    let mass = z.iter().take(replay.valid_from(ids[0])).map(|z| (z - token.lse()).exp()).sum();
                    (mass, dlogits.dot(&k))
                };
                tokens.iter().zip(places).map(of_token).collect()
            })
            .collect();
        for (piece, end) in pieces.into_iter().zip(&borders[1..]) {
            out.iter_mut().zip(piece).for_each(|(row, (mass, sum))| row.push(*end, mass, &sum));
        }
        out
    }

    /// A row of dQ, whose place is given, in the first `features`, if exp were 2^⌊y⌋ times a polynomial of y − ⌊y⌋: the terms that
    /// each of its coefficients multiplies, and all others.
    pub fn significand_terms(&self, place: usize, recorded_lse: bool, features: usize) -> (Vec<Array1<f64>>, Array1<f64>) {
        let approximation = if recorded_lse { Approximation::AsRecorded } else { Approximation::None };
        let how = Counterfactual { approximation, ..Counterfactual::default() };
        let replay = Replay::new(&how, self.step, self.m);
        let (n, row) = (self.sample.tokens()[place], self.of_tokens.row(place));
        let token = replay.token(TokenLogits { n, row: Some(row), known: &self.known });
        let valid = replay.valid_from(0);
        let features = features.min(replay.problem.shape().hidden);
        let of_piece = |start: usize| {
            let ids = start..(start + PIECE).min(valid);
            let mut weights = Array2::zeros((SIGNIFICAND_TERMS + 1, ids.len()));
            for (mut weights, &z) in weights.axis_iter_mut(Axis(1)).zip(row.slice(s![ids.clone()])) {
                let ((power, f), (factor, constant)) = (split(z - token.lse()), replay.around_p(&token, z));
                (0..SIGNIFICAND_TERMS).fold(factor * power, |term, k| {
                    weights[k] = term;
                    term * f
                });
                weights[SIGNIFICAND_TERMS] = constant;
            }
            if let Some(column) = token.label.column.filter(|column| ids.contains(column)) {
                weights[[SIGNIFICAND_TERMS, column - ids.start]] += token.label.value;
            }
            weights.dot(&reference::unembedding_rows(replay.problem, ids).slice(s![.., ..features]))
        };
        let starts: Vec<usize> = (0..valid).step_by(PIECE).collect();
        let nothing = || Array2::zeros((SIGNIFICAND_TERMS + 1, features));
        let sums = starts.into_par_iter().map(of_piece).reduce(nothing, |a, b| a + b);
        let mut rows: Vec<Array1<f64>> = sums.outer_iter().map(|row| row.to_owned()).collect();
        let others = rows.pop().expect("the last row");
        (rows, others)
    }

    /// What tokens up to each of `borders` add to rows of dK, whose places are given, in the first `features`.
    pub fn cumulated_d_unembedding(&self, places: &[usize], borders: &[usize], features: usize) -> Vec<CumulatedRow> {
        let right = Counterfactual::default();
        let replay = Replay::new(&right, self.step, self.m);
        let mut out: Vec<CumulatedRow> = places.iter().map(|_| CumulatedRow::new(vec![])).collect();
        for ends in borders.windows(2) {
            let q = reference::hidden_rows(replay.problem, ends[0]..ends[1]);
            let q = q.slice(s![.., ..features.min(q.ncols())]);
            let tokens = self.tokens(&replay, ends[0]..ends[1]);
            for (row, &place) in out.iter_mut().zip(places) {
                let id = self.sample.ids()[place];
                let dlogits = |(i, token): (usize, &Token)| {
                    let label = if token.label.column == Some(id) { token.label.value } else { 0.0 };
                    replay.dlogits(token, id, self.of_ids[[place, ends[0] + i]]) + label
                };
                let dlogits: Array1<f64> = tokens.iter().enumerate().map(dlogits).collect();
                row.push(ends[1], 0.0, &dlogits.dot(&q));
            }
        }
        out
    }

    /// What `how` makes of `rows`; they were [learnt](Self::learn) for it if dK is wanted.
    pub fn replay(&self, how: &Counterfactual, rows: &Rows, wanted: Wanted) -> Outcome {
        let replay = Replay::new(how, self.step, self.m);
        let problem = replay.problem;
        let shape = Shape { tokens: rows.tokens.len(), vocab: rows.ids.len(), ..problem.shape() };
        let mut gradients = Gradients::zeros(shape);
        let numbers = self.sample.tokens();
        let of_token = |&place: &usize| {
            let logits = TokenLogits { n: numbers[place], row: Some(self.of_tokens.row(place)), known: &self.known };
            (replay.forward(logits), wanted.d_hidden.then(|| replay.token(logits)))
        };
        let (forward, tokens): (Vec<TokenForward>, Vec<Option<Token>>) = rows.tokens.par_iter().map(of_token).unzip();
        if wanted.d_hidden {
            let mut tokens: Vec<Token> = tokens.into_iter().flatten().collect();
            let skipped = how.filter.map(|filter| self.skipped(&replay, filter, rows, &tokens));
            skipped.iter().for_each(|skipped| skipped.drop_labels(&mut tokens));
            let scale = |(token, &place): (&Token, &usize)| replay.scale_of_p(token, self.lse[place]);
            let scales: Option<Vec<f64>> = tokens.iter().zip(&rows.tokens).map(scale).collect();
            let scaled = scales.map(|scales| {
                let mut lse = self.unit.select(Axis(0), &rows.tokens);
                lse.outer_iter_mut().zip(scales).for_each(|(mut row, scale)| row *= scale);
                lse
            });
            let product = || {
                replay.d_hidden(&tokens, |ids| {
                    let dlogits = |(i, v): (usize, usize)| match &skipped {
                        Some(skipped) if skipped.at(i, ids.start + v) => 0.0,
                        _ => replay.dlogits(&tokens[i], ids.start + v, self.of_tokens[[rows.tokens[i], ids.start + v]]),
                    };
                    Array2::from_shape_fn((tokens.len(), ids.len()), dlogits).into()
                })
            };
            gradients.hidden = scaled.map_or_else(product, |lse| replay.with_labels(&tokens, lse));
        }
        if wanted.d_unembedding {
            let ids: Vec<usize> = rows.ids.iter().map(|&place| self.sample.ids()[place]).collect();
            let mut sum = UnembeddingSum::new(&replay, Some(&ids));
            let all = problem.shape().tokens;
            for start in (0..all).step_by(PIECE) {
                self.add_tokens(&replay, rows, &ids, start..(start + PIECE).min(all), &mut sum);
            }
            gradients.unembedding = sum.finish();
        }
        Outcome::new(&forward, gradients)
    }

    /// What near ties may change in what [`replay`](Self::replay) gives, before any sum is kept in bf16.
    pub fn ties(&self, how: &Counterfactual, rows: &Rows, wanted: Wanted) -> Ties {
        let replay = Replay::new(how, self.step, self.m);
        let near = NearTies::new(&replay);
        let mut out = Ties::none(rows.tokens.len(), rows.ids.len());
        let logits = |place: usize| {
            let row = Some(self.of_tokens.row(place));
            TokenLogits { n: self.sample.tokens()[place], row, known: &self.known }
        };
        let forward: Vec<[f64; 3]> = rows.tokens.par_iter().map(|&place| near.forward(logits(place))).collect();
        out.set_forward(0, &forward);
        if !how.rounds_dlogits() {
            return out;
        }
        let with_errors = |n: usize, token: Token| (near.token(n, token.lse()), token);
        if wanted.d_hidden {
            let token = |&place: &usize| with_errors(self.sample.tokens()[place], replay.token(logits(place)));
            let tokens: Vec<(TokenErrors, Token)> = rows.tokens.par_iter().map(token).collect();
            out.hidden = ties::over_vocab(&replay, tokens.len(), |i, v| {
                let (errors, token) = &tokens[i];
                near.dlogits(errors, token, v, self.of_tokens[[rows.tokens[i], v]])
            });
        }
        if wanted.d_unembedding {
            let all = replay.problem.shape().tokens;
            for some in (0..all).step_by(PIECE).map(|start| start..(start + PIECE).min(all)) {
                let tokens = self.tokens(&replay, some.clone()).into_iter().zip(some.clone());
                let tokens: Vec<(TokenErrors, Token)> = tokens.map(|(token, n)| with_errors(n, token)).collect();
                let q = ties::squares(&reference::hidden_rows(replay.problem, some.clone()));
                out.unembedding.par_iter_mut().zip(&rows.ids).for_each(|(sum, &place)| {
                    let (id, z) = (self.sample.ids()[place], self.of_ids.slice(s![place, some.clone()]));
                    let ties = |((errors, token), &z): (&(TokenErrors, Token), &f64)| near.dlogits(errors, token, id, z);
                    *sum += tokens.iter().zip(z).map(ties).zip(&q).map(|(ties, q)| ties * q).sum::<f64>();
                });
            }
        }
        out.scaled(how)
    }

    /// What is skipped of some tokens; while the tiles of all are not known, as if each token were a tile's only one.
    fn skipped(&self, replay: &Replay, filter: Filter, rows: &Rows, tokens: &[Token]) -> Skipped {
        if let Some(largest) = self.tile_sizes(replay.how) {
            let numbers = self.sample.tokens();
            return Skipped::new(filter, largest, rows.tokens.iter().map(|&place| numbers[place] / filter.tokens));
        }
        let of_token = |(token, &place)| replay.largest_of_tiles(filter, token, 0, self.of_tokens.row(place));
        let largest = tokens.par_iter().zip(&rows.tokens).map(of_token).collect();
        Skipped::new(filter, &by_token_tile(Filter { tokens: 1, ..filter }, largest), 0..tokens.len())
    }

    fn add_tokens(&self, replay: &Replay, rows: &Rows, ids: &[usize], tokens: Range<usize>, sum: &mut UnembeddingSum) {
        let mut block = self.tokens(replay, tokens.clone());
        let skipped = replay.how.filter.zip(self.tile_sizes(replay.how)).map(|(filter, largest)| {
            let skipped = Skipped::new(filter, largest, tokens.clone().map(|n| n / filter.tokens));
            skipped.drop_labels(&mut block);
            skipped
        });
        let mut dlogits = Array2::zeros((ids.len(), tokens.len()));
        dlogits.axis_iter_mut(Axis(0)).into_par_iter().zip(&rows.ids).zip(ids).for_each(|((mut row, &place), &id)| {
            let z = self.of_ids.slice(s![place, tokens.clone()]);
            for (i, ((out, &z), token)) in row.iter_mut().zip(z).zip(&block).enumerate() {
                *out = if skipped.as_ref().is_some_and(|skipped| skipped.at(i, id)) { 0.0 } else { replay.dlogits(token, id, z) };
            }
        });
        sum.add(tokens, &block, dlogits.view());
    }
}

/// What a row of a gradient comes to up to each of some borders of its sum, in some of its features.
#[derive(Clone, Debug)]
pub struct CumulatedRow {
    /// The terms at one place alone, which are not in `sums`.
    at: Vec<(usize, Array1<f64>)>,
    /// Border, Σ P up to it, and the sum.
    sums: Vec<(usize, f64, Array1<f64>)>,
}

impl CumulatedRow {
    fn new(at: Vec<(usize, Array1<f64>)>) -> Self {
        Self { at, sums: vec![] }
    }

    fn push(&mut self, border: usize, mass: f64, sum: &Array1<f64>) {
        if self.sums.is_empty() {
            self.sums.push((0, 0.0, Array1::zeros(sum.len())));
        }
        let (_, so_far, sums) = self.sums.last().expect("there is one now");
        let next = (border, so_far + mass, sums + sum);
        self.sums.push(next);
    }

    /// Terms that the whole sum has.
    pub fn len(&self) -> usize {
        self.sums.last().map_or(0, |(border, ..)| *border)
    }

    /// Whether the sum has no terms.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn between(&self, range: &Range<usize>) -> (f64, Array1<f64>) {
        let at = |border: usize| &self.sums[self.sums.partition_point(|(b, ..)| *b < border).min(self.sums.len() - 1)];
        let ((_, mass, sum), (_, mass_before, before)) = (at(range.end), at(range.start));
        (mass - mass_before, sum - before)
    }

    /// The terms of a range whose ends are borders.
    pub fn within(&self, range: Range<usize>) -> Array1<f64> {
        let here = self.at.iter().filter(|(place, _)| range.contains(place));
        here.fold(self.between(&range).1, |sum, (_, term)| sum + term)
    }

    /// The terms of a range but for those at one place alone, as if Σ P over it were 1.
    pub fn normalised(&self, range: Range<usize>) -> Array1<f64> {
        let (mass, sum) = self.between(&range);
        if mass > 0.0 { sum / mass } else { sum }
    }

    /// The terms at one place alone.
    pub fn label(&self) -> Array1<f64> {
        let none = Array1::zeros(self.sums.first().map_or(0, |(.., sum)| sum.len()));
        self.at.iter().fold(none, |sum, (_, term)| sum + term)
    }
}

fn first_features(row: &Array2<f64>, features: usize) -> Array1<f64> {
    row.row(0).iter().take(features).copied().collect()
}

/// The largest of each `rows` × `columns` elements.
fn pooled(largest: &Array2<f64>, rows: usize, columns: usize) -> Array2<f64> {
    let mut out = Array2::zeros((largest.nrows().div_ceil(rows), largest.ncols().div_ceil(columns)));
    for ((row, column), &x) in largest.indexed_iter() {
        let out = &mut out[[row / rows, column / columns]];
        *out = f64::max(*out, x);
    }
    out
}

/// What the sizes of dlogits depend on, of a computation that skips tiles.
fn of_any_eps(how: &Counterfactual) -> Counterfactual {
    Counterfactual { filter: how.filter.map(|filter| Filter { eps: 0.0, ..filter }), ..*how }
}

/// Rows of Q, [tokens, D].
fn hidden_rows(problem: &Problem, tokens: &[usize]) -> Array2<f64> {
    let mut out = Array2::zeros((tokens.len(), problem.shape().hidden));
    let rows = tokens.iter().zip(out.outer_iter_mut());
    rows.for_each(|(&n, mut out)| out.assign(&reference::hidden_rows(problem, n..n + 1).row(0)));
    out
}

/// Each reading of some tokens, in one pass over their logits; `max` is the largest logit of a token.
fn read(problem: &Problem, tokens: &[usize], readings: &[Reading], max: impl Fn(usize, Reading) -> f64 + Sync) -> Vec<Vec<f64>> {
    const AT_A_TIME: usize = 64;
    let vocab = problem.shape().vocab;
    // Between two borders, a vocab id is in a reading if the others are.
    let of_readings = readings.iter().flat_map(|reading| [reading.ids.0, reading.ids.1]);
    let borders: BTreeSet<usize> = of_readings.chain((0..vocab).step_by(PIECE)).chain([vocab]).collect();
    let borders: Vec<usize> = borders.into_iter().collect();
    let mut kinds: Vec<Reading> = vec![];
    for &reading in readings {
        if !kinds.iter().any(|kind| of_one_kind(kind, &reading)) {
            kinds.push(reading);
        }
    }
    let mut out = vec![vec![f64::NEG_INFINITY; tokens.len()]; readings.len()];
    for start in (0..tokens.len()).step_by(PIECE) {
        let rows = start..(start + PIECE).min(tokens.len());
        let q = hidden_rows(problem, &tokens[rows.clone()]);
        let of_piece = |piece: &&[usize]| -> Vec<Vec<f64>> {
            let z = reference::logit_tile(problem, &q, piece[0]..piece[1]);
            let of_tokens = |kind: &Reading| {
                let of_token = |(&n, z)| kind.of_logits(z, || max(n, *kind));
                tokens[rows.clone()].iter().zip(z.outer_iter()).map(of_token).collect()
            };
            kinds.iter().map(of_tokens).collect()
        };
        for pieces in borders.windows(2).collect::<Vec<_>>().chunks(AT_A_TIME) {
            let of_pieces: Vec<Vec<Vec<f64>>> = pieces.par_iter().map(of_piece).collect();
            out.par_iter_mut().zip(readings).for_each(|(out, reading)| {
                let kind = kinds.iter().position(|kind| of_one_kind(kind, reading)).expect("it is of some kind");
                let within = |piece: &[usize]| reading.ids.0 <= piece[0] && piece[1] <= reading.ids.1;
                for (_, of_piece) in pieces.iter().zip(&of_pieces).filter(|(piece, _)| within(piece)) {
                    let so_far = out[rows.clone()].iter_mut().zip(&of_piece[kind]);
                    so_far.for_each(|(out, &more)| {
                        *out = if reading.of == Of::Max { out.max(more) } else { log_add_exp(*out, more) }
                    });
                }
            });
        }
    }
    out
}

fn of_one_kind(a: &Reading, b: &Reading) -> bool {
    (a.logits, a.of) == (b.logits, b.of)
}

fn log_add_exp(a: f64, b: f64) -> f64 {
    reference::log_sum_exp([a, b].into_iter())
}
