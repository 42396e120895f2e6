//! Counterfactual replay: the reference in float64 with chosen faults built in.
//!
//! A [`Counterfactual`] describes how a fused cross-entropy computes, step by step; its default is right, and
//! `diff::fault` turns a named fault into a change of it. Faults compose, since each changes its own fields.
//! `synth` writes dumps with it, on all rows ([`Counterfactual::replay`]), and `explain` tests hypotheses with it, on some
//! ([`Excerpt`]). Both are one implementation: of a token ([`token`]), of a sum ([`sums`]).

mod approximate;
mod counterfactual;
mod excerpt;
mod filter;
mod sums;
mod ties;
mod token;

pub use approximate::{Approximation, SIGNIFICAND_TERMS, Significand};
pub use counterfactual::{
    Bf16Sum, Chunks, Counterfactual, Filter, LabelLogit, LabelPlace, LabelSum, LseRounded, MaskedTokens, Padding, ProcessSum,
    ProcessesAdded, ScaleInBackward, ScatterOnto, Split, TokenFactor,
};
pub use excerpt::{CumulatedRow, Excerpt, Rows};

pub use ties::{Ties, of_running_sums};

use super::step::Step;
use filter::{Skipped, by_token_tile};
use fused_xent_kernels::problem::Problem;
use fused_xent_kernels::reference::{self, Forward, Gradients};
use ndarray::{Array2, ArrayView1, ArrayViewMut1, Axis, s};
use rayon::prelude::*;
use std::ops::Range;
use sums::UnembeddingSum;
use ties::NearTies;
use token::{Replay, Token, TokenForward, TokenLogits};

/// What one microbatch comes to, in all rows or in some.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Per-token loss, lse and label logits.
    pub forward: Forward,
    /// dQ and dK, in parts.
    pub gradients: Gradients,
}

impl Outcome {
    fn new(tokens: &[TokenForward], gradients: Gradients) -> Self {
        let column = |of: fn(&TokenForward) -> f64| tokens.iter().map(of).collect();
        let forward = Forward { loss: column(|t| t.loss), lse: column(|t| t.lse), label_logits: column(|t| t.label_logit) };
        Self { forward, gradients }
    }
}

/// Which gradients a replay computes; the others stay 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// dQ.
    pub d_hidden: bool,
    /// dK.
    pub d_unembedding: bool,
}

impl Wanted {
    /// Both.
    pub const ALL: Self = Self { d_hidden: true, d_unembedding: true };
}

impl Counterfactual {
    /// Replays microbatch `m` of `step`: all rows of its own gradients, as a dump records them.
    pub fn replay(&self, step: &Step, m: usize, wanted: Wanted) -> Outcome {
        let replay = Replay::new(self, step, m);
        let problem = replay.problem;
        let mut gradients = Gradients::zeros(problem.shape());
        let mut forward = Vec::with_capacity(problem.shape().tokens);
        let mut d_unembedding = wanted.d_unembedding.then(|| UnembeddingSum::new(&replay, None));
        let known = replay.recorded();
        for rows in self.token_blocks(problem) {
            let mut z = reference::logits(problem, rows.clone());
            if self.padding != Padding::TakesNoPart {
                fill_padding(problem, rows.clone(), &mut z);
            }
            let of_token = |(z, n): (ArrayView1<f64>, usize)| {
                let logits = TokenLogits { n, row: Some(z), known: &known };
                (replay.forward(logits), replay.token(logits))
            };
            let block = z.axis_iter(Axis(0)).into_par_iter().zip(rows.clone()).map(of_token);
            let (block_forward, mut tokens): (Vec<TokenForward>, Vec<Token>) = block.unzip();
            forward.extend(block_forward);
            let skipped = self.filter.map(|filter| {
                let of_token = |(token, z)| replay.largest_of_tiles(filter, token, 0, z);
                let largest = tokens.par_iter().zip(z.axis_iter(Axis(0)).into_par_iter()).map(of_token).collect();
                Skipped::new(filter, &by_token_tile(filter, largest), (0..rows.len()).map(|i| i / filter.tokens))
            });
            skipped.iter().for_each(|skipped| skipped.drop_labels(&mut tokens));
            z.axis_iter_mut(Axis(0)).into_par_iter().enumerate().for_each(|(i, mut z)| {
                let kept = |v: usize| skipped.as_ref().is_none_or(|skipped| !skipped.at(i, v));
                let dlogits = |v: usize, z: f64| if kept(v) { replay.dlogits(&tokens[i], v, z) } else { 0.0 };
                z.iter_mut().enumerate().for_each(|(v, z)| *z = dlogits(v, *z));
            });
            if wanted.d_hidden {
                let parts = replay.d_hidden(&tokens, |ids| z.slice(s![.., ids]).into());
                gradients.hidden.lse.slice_mut(s![rows.clone(), ..]).assign(&parts.lse);
                gradients.hidden.label.slice_mut(s![rows.clone(), ..]).assign(&parts.label);
            }
            if let Some(sum) = &mut d_unembedding {
                sum.add(rows, &tokens, z.t());
            }
        }
        if let Some(sum) = d_unembedding {
            gradients.unembedding = sum.finish();
        }
        Outcome::new(&forward, gradients)
    }

    /// What near ties may change in [`replay`](Self::replay)'s rows, before any sum is kept in bf16.
    pub fn ties(&self, step: &Step, m: usize, wanted: Wanted) -> Ties {
        let replay = Replay::new(self, step, m);
        let (problem, near, known) = (replay.problem, NearTies::new(&replay), replay.recorded());
        let mut out = Ties::none(problem.shape().tokens, problem.shape().vocab);
        for rows in self.token_blocks(problem) {
            let mut z = reference::logits(problem, rows.clone());
            if self.padding != Padding::TakesNoPart {
                fill_padding(problem, rows.clone(), &mut z);
            }
            let of_token = |(mut z, n): (ArrayViewMut1<f64>, usize)| {
                let logits = TokenLogits { n, row: Some(z.view()), known: &known };
                let forward = near.forward(logits);
                let token = replay.token(logits);
                let errors = near.token(n, token.lse());
                z.iter_mut().enumerate().for_each(|(v, z)| *z = near.dlogits(&errors, &token, v, *z));
                forward
            };
            let forward: Vec<[f64; 3]> = z.axis_iter_mut(Axis(0)).into_par_iter().zip(rows.clone()).map(of_token).collect();
            out.set_forward(rows.start, &forward);
            if self.rounds_dlogits() && wanted.d_hidden {
                let of_tokens = ties::over_vocab(&replay, rows.len(), |i, v| z[[i, v]]);
                out.hidden[rows.clone()].copy_from_slice(&of_tokens);
            }
            if self.rounds_dlogits() && wanted.d_unembedding {
                let of_ids = z.t().dot(&ties::squares(&reference::hidden_rows(problem, rows)));
                out.unembedding.iter_mut().zip(of_ids).for_each(|(sum, more)| *sum += more);
            }
        }
        out.scaled(self)
    }

    /// Blocks of tokens that hold whole tiles of them.
    fn token_blocks(&self, problem: &Problem) -> impl Iterator<Item = Range<usize>> {
        let tokens = problem.shape().tokens;
        let block = reference::token_blocks(problem).next().map_or(1, |block| block.len());
        let tile = self.filter.map_or(1, |filter| filter.tokens);
        let block = (block / tile * tile).max(tile);
        (0..tokens).step_by(block).map(move |start| start..(start + block).min(tokens))
    }
}

/// Logits of the padding columns, which the reference holds at −∞.
fn fill_padding(problem: &Problem, rows: Range<usize>, z: &mut Array2<f64>) {
    let (valid, vocab) = (problem.valid_columns(), problem.shape().vocab);
    z.slice_mut(s![.., valid..]).assign(&token::logits(problem, rows, valid..vocab));
}
