//! Some rows of a microbatch's gradients, and what every replay of them shares: computed once, used by each hypothesis.
//!
//! A row of dQ needs the token's logits, all V; a row of dK needs that vocab id's logits, all N, and each token's lse. The
//! logits are held. Which lse a hypothesis makes is a matter of a few log-sum-exps per token ([`Reading`]): the reference's is
//! known from the start, any other is learnt on demand, in one pass over all logits for as many as are asked for.

use super::sums::UnembeddingSum;
use super::token::{Known, Reading, Replay, Token, TokenForward, TokenLogits};
use super::{Counterfactual, Outcome, Wanted};
use crate::diff::step::Step;
use fused_xent_kernels::contract::Precision;
use fused_xent_kernels::problem::{Label, Problem, Sample, Shape};
use fused_xent_kernels::reference::{self, Gradients};
use ndarray::{Array2, ArrayView1, Axis, s};
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

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
    known: Known,
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
        let reading = Reading { ids: (0, problem.valid_columns()), logits: Precision::F64 };
        Self { step, m, sample, of_tokens, of_ids, known: vec![(reading, lse)] }
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
        self.missing(how).is_empty()
    }

    /// Learns what rows of dK need to know of every token under these computations.
    pub fn learn<'c>(&mut self, computations: impl Iterator<Item = &'c Counterfactual>) {
        let problem = &self.step.microbatches[self.m].problem;
        // Most readings are missing of the same tokens: those are learnt in one pass.
        let mut passes: BTreeMap<Vec<usize>, Vec<Reading>> = BTreeMap::new();
        for (tokens, reading) in computations.flat_map(|how| self.missing(how)) {
            let readings = passes.entry(tokens).or_default();
            if !readings.contains(&reading) {
                readings.push(reading);
            }
        }
        for (tokens, readings) in passes {
            for (reading, learnt) in readings.iter().zip(log_sum_exps(problem, &tokens, &readings)) {
                let at = self.known.iter().position(|(known, _)| known == reading).unwrap_or_else(|| {
                    self.known.push((*reading, vec![f64::NAN; problem.shape().tokens]));
                    self.known.len() - 1
                });
                tokens.iter().zip(learnt).for_each(|(&n, learnt)| self.known[at].1[n] = learnt);
            }
        }
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
            let tokens: Vec<Token> = tokens.into_iter().flatten().collect();
            gradients.hidden = replay.d_hidden(&tokens, |ids| {
                let z = |(i, v)| replay.dlogits(&tokens[i], ids.start + v, self.of_tokens[[rows.tokens[i], ids.start + v]]);
                Array2::from_shape_fn((tokens.len(), ids.len()), z).into()
            });
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

    fn add_tokens(&self, replay: &Replay, rows: &Rows, ids: &[usize], tokens: Range<usize>, sum: &mut UnembeddingSum) {
        let token = |n| replay.token(TokenLogits { n, row: None, known: &self.known });
        let block: Vec<Token> = tokens.clone().into_par_iter().map(token).collect();
        let mut dlogits = Array2::zeros((ids.len(), tokens.len()));
        dlogits.axis_iter_mut(Axis(0)).into_par_iter().zip(&rows.ids).zip(ids).for_each(|((mut row, &place), &id)| {
            let z = self.of_ids.slice(s![place, tokens.clone()]);
            row.iter_mut().zip(z).zip(&block).for_each(|((out, &z), token)| *out = replay.dlogits(token, id, z));
        });
        sum.add(tokens, &block, dlogits.view());
    }
}

/// Rows of Q, [tokens, D].
fn hidden_rows(problem: &Problem, tokens: &[usize]) -> Array2<f64> {
    let mut out = Array2::zeros((tokens.len(), problem.shape().hidden));
    let rows = tokens.iter().zip(out.outer_iter_mut());
    rows.for_each(|(&n, mut out)| out.assign(&reference::hidden_rows(problem, n..n + 1).row(0)));
    out
}

/// Each reading of some tokens, in one pass over their logits.
fn log_sum_exps(problem: &Problem, tokens: &[usize], readings: &[Reading]) -> Vec<Vec<f64>> {
    const AT_A_TIME: usize = 64;
    let vocab = problem.shape().vocab;
    // Between two borders, a vocab id is in a reading if the others are.
    let of_readings = readings.iter().flat_map(|reading| [reading.ids.0, reading.ids.1]);
    let borders: BTreeSet<usize> = of_readings.chain((0..vocab).step_by(PIECE)).chain([vocab]).collect();
    let borders: Vec<usize> = borders.into_iter().collect();
    let mut precisions: Vec<Precision> = readings.iter().map(|reading| reading.logits).collect();
    precisions.sort_by_key(|p| p.name());
    precisions.dedup();
    let mut out = vec![vec![f64::NEG_INFINITY; tokens.len()]; readings.len()];
    for start in (0..tokens.len()).step_by(PIECE) {
        let rows = start..(start + PIECE).min(tokens.len());
        let q = hidden_rows(problem, &tokens[rows.clone()]);
        let of_piece = |piece: &&[usize]| -> Vec<Vec<f64>> {
            let z = reference::logit_tile(problem, &q, piece[0]..piece[1]);
            let of_token = |z: ArrayView1<f64>, p: Precision| reference::log_sum_exp(z.iter().map(|&z| p.round(z)));
            precisions.iter().map(|&p| z.outer_iter().map(|z| of_token(z, p)).collect()).collect()
        };
        for pieces in borders.windows(2).collect::<Vec<_>>().chunks(AT_A_TIME) {
            let sums: Vec<Vec<Vec<f64>>> = pieces.par_iter().map(of_piece).collect();
            out.par_iter_mut().zip(readings).for_each(|(out, reading)| {
                let p = precisions.iter().position(|p| *p == reading.logits).expect("it is a reading's");
                let within = |piece: &[usize]| reading.ids.0 <= piece[0] && piece[1] <= reading.ids.1;
                for (_, sums) in pieces.iter().zip(&sums).filter(|(piece, _)| within(piece)) {
                    let so_far = out[rows.clone()].iter_mut().zip(&sums[p]);
                    so_far.for_each(|(out, &sum)| *out = reference::log_sum_exp([*out, sum].into_iter()));
                }
            });
        }
    }
    out
}
