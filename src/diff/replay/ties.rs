//! Ties: roundings to bf16 that a float32 computation and a replay in float64 may do differently.
//!
//! Where a value lies so near the middle between two numbers of bf16 that its float32 error may take it across, the candidate's
//! rounding may come out the other way than the replay's, and what that changes is no trace of another fault. It is a step of
//! bf16 at few elements: far above the floor of float32, far below what the rounding does as a whole. For every element within
//! [`REACH`] of a tie, the square of its step goes through the products, as the square of an error that nothing else shares.
//!
//! Running sums in bf16 are not looked at one by one. Each of their roundings lies within reach of a tie with probability
//! 2·REACH·σ/step, where σ is the float32 error of an element, and may change step² there: 2·REACH·σ·step per rounding.

use super::counterfactual::{Bf16Sum, Counterfactual, LabelLogit, LseRounded, ProcessesAdded, bf16};
use super::token::{Replay, Token, TokenLogits};
use crate::diff::step::Step;
use crate::diff::truth::Stage;
use fused_xent_kernels::contract::Precision;
use fused_xent_kernels::reference;
use ndarray::{Array1, Array2, ArrayView2, Axis};
use rayon::prelude::*;
use std::ops::Range;

/// Standard deviations of a float32 error that may take a value across a tie.
const REACH: f64 = 6.0;
/// Variance of one rounding to float32, relative; and what an exp is off by, in units of it: as in the floor.
const ROUNDING: f64 = 0.18 * F32 * F32;
const EXP: f64 = 16.0;
const F32: f64 = 1.0 / (1u64 << 24) as f64;
/// Rows of K that say how large one is.
const FEW_ROWS: usize = 64;
/// Vocab ids of one piece of work.
const PIECE: usize = 2048;

/// The squares of what near ties may change, per row.
#[derive(Clone, Debug, Default)]
pub struct Ties {
    loss: Vec<f64>,
    lse: Vec<f64>,
    label_logits: Vec<f64>,
    pub(super) hidden: Vec<f64>,
    pub(super) unembedding: Vec<f64>,
}

impl Ties {
    /// Of the rows of a stage.
    pub fn stage(&self, stage: Stage) -> &[f64] {
        match stage {
            Stage::Loss => &self.loss,
            Stage::Lse => &self.lse,
            Stage::LabelLogits => &self.label_logits,
            Stage::DHidden | Stage::DHiddenLse | Stage::DHiddenLabel => &self.hidden,
            _ => &self.unembedding,
        }
    }

    /// Of so many tokens and vocab ids, nothing yet.
    pub(super) fn none(tokens: usize, ids: usize) -> Self {
        let of_tokens = || vec![0.0; tokens];
        Self { loss: of_tokens(), lse: of_tokens(), label_logits: of_tokens(), hidden: of_tokens(), unembedding: vec![0.0; ids] }
    }

    /// Takes what near ties may change in the forward of the tokens from `start` on.
    pub(super) fn set_forward(&mut self, start: usize, tokens: &[[f64; 3]]) {
        for (i, &[loss, lse, label_logit]) in (start..).zip(tokens) {
            (self.loss[i], self.lse[i], self.label_logits[i]) = (loss, lse, label_logit);
        }
    }

    /// After the constant factors of the gradients.
    pub(super) fn scaled(mut self, how: &Counterfactual) -> Self {
        self.hidden.iter_mut().for_each(|square| *square *= how.dq_factor * how.dq_factor);
        self.unembedding.iter_mut().for_each(|square| *square *= how.dk_factor * how.dk_factor);
        self
    }
}

impl Counterfactual {
    /// Whether it has roundings whose near ties are known.
    pub fn has_ties(&self) -> bool {
        self.rounds_dlogits() || self.rounds_label_logit()
    }

    /// How many roundings to bf16 each running sum of a gradient of microbatch `m` goes through.
    pub fn roundings(&self, step: &Step, m: usize, stage: Stage) -> usize {
        let shape = step.microbatches[m].problem.shape();
        let of_sum = |sum: Bf16Sum, terms: usize| terms.div_ceil(sum.chunks.width(terms)) * if sum.parts_rounded { 2 } else { 1 };
        match stage {
            Stage::DHidden => self.dq_sum.map_or(0, |sum| of_sum(sum, shape.vocab)),
            Stage::DUnembedding => {
                let (processes, added) = self.dk_processes.map_or((1, ProcessesAdded::F32), |sum| (sum.processes, sum.added));
                let own = self.dk_sum.map_or(0, |sum| of_sum(sum, shape.tokens.div_ceil(processes)));
                let adding = match added {
                    ProcessesAdded::F32 => 0,
                    ProcessesAdded::F32ThenBf16 => 1,
                    ProcessesAdded::Bf16 => 2 * processes,
                };
                processes * own + adding
            }
            Stage::AccumulatedDUnembedding if self.microbatches_bf16 => {
                if self.microbatches_rounded {
                    2
                } else {
                    1
                }
            }
            _ => 0,
        }
    }

    /// Whether some of those change gradients.
    pub(super) fn rounds_dlogits(&self) -> bool {
        self.dlogits == Precision::Bf16 || self.p_minus_one_bf16 || self.lse_rounded != LseRounded::Nowhere
    }

    /// Whether the label logit is rounded after a sum in float32.
    fn rounds_label_logit(&self) -> bool {
        matches!(self.label_logit, LabelLogit::Rounded | LabelLogit::OfRoundedProducts)
    }
}

/// How far rounding may take `x`, which is off by up to `error`, from where it takes the exact one.
fn step(x: f64, error: f64) -> f64 {
    bf16(x + error) - bf16(x - error)
}

/// The float32 errors of a replay's tokens.
pub(super) struct NearTies<'a> {
    replay: &'a Replay<'a>,
    /// ‖K_v‖²/D, as it typically is.
    k: f64,
}

/// Those of one token.
pub(super) struct TokenErrors {
    /// Σ_d (q·k)² as it typically is.
    squares: f64,
    /// What is relative in the error of P in all columns, squared.
    common: f64,
    /// How far lse may be rounded the other way.
    lse_step: f64,
}

impl<'a> NearTies<'a> {
    pub fn new(replay: &'a Replay<'a>) -> Self {
        let shape = replay.problem.shape();
        let some = (0..shape.vocab).step_by((shape.vocab / FEW_ROWS).max(1));
        let squares: Vec<f64> = some.map(|v| squares(&reference::unembedding_rows(replay.problem, v..v + 1))[0]).collect();
        let k = squares.iter().sum::<f64>() / (squares.len().max(1) * shape.hidden) as f64;
        Self { replay, k }
    }

    /// Variance of z, as the floor has it.
    fn logit_variance(&self, squares: f64, z: f64) -> f64 {
        let d = self.replay.problem.shape().hidden as f64;
        ROUNDING * (d * (z * z / 3.0 + squares / 6.0) + squares + 6.0 * z * z)
    }

    /// Of token `n` with this lse.
    pub fn token(&self, n: usize, lse: f64) -> TokenErrors {
        let problem = self.replay.problem;
        let squares = problem.options().logit_scale.powi(2) * squares(&reference::hidden_rows(problem, n..n + 1))[0] * self.k;
        let sum = problem.valid_columns() as f64 / 3.0 + EXP;
        // No logit that weighs in lse is much above it.
        let of_lse = self.logit_variance(squares, lse) + ROUNDING * (2.0 * lse * lse + sum);
        let lse_step = if self.replay.how.lse_rounded == LseRounded::Nowhere { 0.0 } else { step(lse, REACH * of_lse.sqrt()) };
        TokenErrors { squares, common: of_lse + ROUNDING * EXP, lse_step }
    }

    /// The square of what near ties may change in dlogits of vocab id `v`, whose logit is `z`.
    pub fn dlogits(&self, errors: &TokenErrors, token: &Token, v: usize, z: f64) -> f64 {
        let (replay, how) = (self.replay, self.replay.how);
        let Some((of_backward, p)) = replay.p(token, v, z) else { return 0.0 };
        let change = |from: f64, to: f64| {
            let at = |by: f64| replay.dlogits_of(token, v, of_backward, p * by);
            (at(to) - at(from)).powi(2)
        };
        let rounded = if how.dlogits == Precision::Bf16 || how.p_minus_one_bf16 {
            let error = REACH * (errors.common + self.logit_variance(errors.squares, z)).sqrt();
            change(1.0 - error, 1.0 + error)
        } else {
            0.0
        };
        rounded + if errors.lse_step == 0.0 { 0.0 } else { change(1.0, 1.0 + errors.lse_step) }
    }

    /// The squares of what near ties may change in a token's loss, lse and label logit.
    pub fn forward(&self, logits: TokenLogits) -> [f64; 3] {
        let (replay, n) = (self.replay, logits.n);
        let (Some(label), Some(z)) = (replay.problem.labels()[n].column(), logits.row) else { return [0.0; 3] };
        let (how, errors, z) = (replay.how, self.token(n, replay.lse(logits)), z[label]);
        let of_label = if how.rounds_label_logit() {
            let error = REACH * self.logit_variance(errors.squares, z).sqrt();
            step(replay.label_logit(n, label, z), error)
        } else {
            0.0
        };
        let seen = |reader: LseRounded| if how.lse_rounded >= reader { errors.lse_step } else { 0.0 };
        [of_label.powi(2) + seen(LseRounded::Loss).powi(2), seen(LseRounded::Output).powi(2), of_label.powi(2)]
    }
}

/// Σ of the squares that near ties may change in these running sums, each of one rounding, whose float32 error is `sigma`.
pub fn of_running_sums(sums: ArrayView2<f64>, sigma: f64) -> f64 {
    let spacing = |x: f64| 2.0 * Precision::Bf16.unit_roundoff() * x.abs().log2().floor().exp2();
    2.0 * REACH * sigma * sums.iter().filter(|x| **x != 0.0).map(|&x| spacing(x)).sum::<f64>()
}

/// ‖row‖² of each row.
pub(super) fn squares(rows: &Array2<f64>) -> Array1<f64> {
    rows.map_axis(Axis(1), |row| row.dot(&row))
}

/// Σ_v ties·‖K_v‖² of so many tokens.
pub(super) fn over_vocab(replay: &Replay, tokens: usize, ties: impl Fn(usize, usize) -> f64 + Sync) -> Vec<f64> {
    let vocab = replay.problem.shape().vocab;
    let pieces: Vec<Range<usize>> = (0..vocab).step_by(PIECE).map(|v| v..(v + PIECE).min(vocab)).collect();
    let of_piece = |ids: Range<usize>| -> Vec<f64> {
        let k = squares(&reference::unembedding_rows(replay.problem, ids.clone()));
        (0..tokens).map(|i| ids.clone().zip(&k).map(|(v, k)| ties(i, v) * k).sum()).collect()
    };
    let added = |a: Vec<f64>, b: Vec<f64>| a.into_iter().zip(b).map(|(a, b)| a + b).collect();
    pieces.into_par_iter().map(of_piece).reduce(|| vec![0.0; tokens], added)
}
