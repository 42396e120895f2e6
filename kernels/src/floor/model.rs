//! From a contract and the exact values to the errors of the gradients: emulated roundings, modelled arithmetic.

use super::logits::{Arithmetic, EXP_BIAS, LogitFloor, Spread};
use super::{CERTAIN, Error, Floor, GradientError, ROUNDING, SMALLEST_NORMAL};
use crate::contract::{Contract, LabelTerm, Precision};
use crate::problem::{Label, Problem, ProblemError, Sample, Shape};
use crate::reference::{self, Cotangents, Forward, Gradients, Parts, RowCotangent, chain};
use ndarray::{Array2, ArrayView1, ArrayViewMut1, Axis};
use rayon::prelude::*;
use std::ops::Range;

impl Contract {
    /// The error that an honest computation under this contract makes on `problem`, before the final roundings.
    ///
    /// `forward` and `gradients` are the oracle's, for the same `cotangents`.
    ///
    /// # Errors
    /// If the unembedding is a shard.
    pub fn floor(
        &self,
        problem: &Problem,
        forward: &Forward,
        cotangents: &Cotangents,
        gradients: &Gradients,
    ) -> Result<Floor, ProblemError> {
        self.floor_of(&LogitFloor::new(self, problem, forward)?, problem, forward, cotangents, gradients, None)
    }

    /// The same where the errors of the logits are at hand, for all rows of the gradients or those of a sample: `gradients`
    /// are then those of [`reference::backward_rows`] for it. The per-token results have their errors for all tokens.
    ///
    /// # Errors
    /// If the unembedding is a shard, or a row does not exist.
    ///
    /// # Panics
    /// If `logits` are those of another problem, or [of another contract](LogitFloor::is_of).
    pub fn floor_of(
        &self,
        logits: &LogitFloor,
        problem: &Problem,
        forward: &Forward,
        cotangents: &Cotangents,
        gradients: &Gradients,
        sample: Option<&Sample>,
    ) -> Result<Floor, ProblemError> {
        problem.require_whole("the floor")?;
        assert!(logits.is_of(self), "the errors of logits under this contract");
        let [hidden, unembedding] = match sample {
            None => self.all_rows(logits, problem, forward, cotangents, gradients),
            Some(sample) => {
                sample.require_within(problem.shape())?;
                self.some_rows(logits, problem, forward, cotangents, gradients, sample)
            }
        };
        let LogitFloor { loss, lse, label_logits, .. } = logits.clone();
        Ok(Floor { loss, lse, label_logits, hidden, unembedding })
    }

    fn all_rows(
        &self,
        logits: &LogitFloor,
        problem: &Problem,
        forward: &Forward,
        cotangents: &Cotangents,
        gradients: &Gradients,
    ) -> [GradientError; 2] {
        let pass = Pass::new(*self, problem, &forward.lse, &logits.spreads, cotangents);
        let [mut hidden, mut unembedding] = [problem.shape().tokens, problem.shape().vocab].map(|rows| pass.side(rows));
        pass.run(&mut hidden, &mut unembedding);
        [pass.hidden(hidden, &gradients.hidden), pass.unembedding(unembedding, &gradients.unembedding)]
    }

    fn some_rows(
        &self,
        logits: &LogitFloor,
        problem: &Problem,
        forward: &Forward,
        cotangents: &Cotangents,
        gradients: &Gradients,
        sample: &Sample,
    ) -> [GradientError; 2] {
        let (tokens, ids) = (sample.tokens(), sample.ids());
        let hidden = problem.with_tokens(tokens, |problem| {
            let lse: Vec<f64> = tokens.iter().map(|&n| forward.lse[n]).collect();
            let spreads: Vec<Spread> = tokens.iter().map(|&n| logits.spreads[n]).collect();
            let cotangents = cotangents.select(tokens);
            let pass = Pass::new(*self, problem, &lse, &spreads, &cotangents);
            let mut hidden = pass.side(tokens.len());
            pass.run(&mut hidden, &mut Side::unwanted(problem.shape().vocab));
            pass.hidden(hidden, &gradients.hidden)
        });
        let unembedding = problem.with_ids(ids, |problem| {
            let pass = Pass::new(*self, problem, &forward.lse, &logits.spreads, cotangents);
            let mut unembedding = pass.side(ids.len());
            pass.run(&mut Side::unwanted(problem.shape().tokens), &mut unembedding);
            pass.unembedding(unembedding, &gradients.unembedding)
        });
        [hidden, unembedding]
    }
}

/// Sums over the errors of dlogits, for one row of a gradient: of its lse part, of its label part and of both together.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    /// Σ Var(s)·‖x‖²: errors of dlogits, independent of each other.
    independent: [f64; 3],
    /// Σ s²·‖x‖²: what a rounding of s, and a running sum of s·x, are in proportion to.
    terms: [f64; 3],
    /// Σ of what |error of s| surely stays below, with the sum's own error.
    bound: [f64; 3],
}

impl Sums {
    fn add_element(&mut self, element: &Element, x_squared: f64, over_sum: f64) {
        for i in 0..3 {
            let s = element.s[i];
            self.independent[i] += element.variance[i] * x_squared;
            self.terms[i] += s * s * x_squared;
            self.bound[i] += element.bound[i] + over_sum * s.abs();
        }
    }

    fn add(&mut self, other: &Self) {
        for i in 0..3 {
            self.independent[i] += other.independent[i];
            self.terms[i] += other.terms[i];
            self.bound[i] += other.bound[i];
        }
    }
}

/// One entry s of dlogits, and its error.
struct Element {
    s: [f64; 3],
    variance: [f64; 3],
    bound: [f64; 3],
}

/// What is gathered for dQ or for dK.
struct Side {
    rows: Vec<Sums>,
    /// Effect of the emulated roundings: on the lse part, and what the sum has beyond that.
    emulated: Option<Parts>,
}

impl Side {
    /// Of a gradient that nobody asks for.
    fn unwanted(rows: usize) -> Self {
        Self { rows: vec![Sums::default(); rows], emulated: None }
    }
}

/// One token that takes part.
struct Token<'a> {
    /// Its place in the block.
    place: usize,
    /// Its label, if that is one of the problem's columns.
    label: Option<usize>,
    cotangent: RowCotangent,
    lse: f64,
    spread: &'a Spread,
    q_squared: f64,
}

/// The gradients' errors, over the tokens and vocab ids of a problem: for dQ these must be all vocab ids, for dK all tokens.
struct Pass<'a> {
    contract: Contract,
    arithmetic: Arithmetic,
    problem: &'a Problem<'a>,
    lse: &'a [f64],
    spreads: &'a [Spread],
    cotangents: &'a Cotangents,
    q: Norms,
    k: Norms,
}

impl<'a> Pass<'a> {
    fn new(
        contract: Contract,
        problem: &'a Problem<'a>,
        lse: &'a [f64],
        spreads: &'a [Spread],
        cotangents: &'a Cotangents,
    ) -> Self {
        let Shape { tokens, hidden, vocab } = problem.shape();
        let q = Norms::new(tokens, hidden, |rows| reference::hidden_rows(problem, rows));
        let k = Norms::new(vocab, hidden, |ids| reference::unembedding_rows(problem, ids));
        Self { contract, arithmetic: Arithmetic::of(&contract), problem, lse, spreads, cotangents, q, k }
    }

    fn side(&self, rows: usize) -> Side {
        let zeros = || Array2::zeros((rows, self.problem.shape().hidden));
        let emulated = (self.contract.dlogits.unit_roundoff() > Precision::F32.unit_roundoff())
            .then(|| Parts { lse: zeros(), label: zeros() });
        Side { rows: vec![Sums::default(); rows], emulated }
    }

    fn run(&self, hidden: &mut Side, unembedding: &mut Side) {
        const IDS: usize = 1024;
        let problem = self.problem;
        let valid = problem.valid_columns();
        let over = |terms: usize| self.arithmetic.u * (4.0 + CERTAIN * (ROUNDING * terms as f64).sqrt());
        let (over_vocab, over_tokens) = (over(valid), over(problem.shape().tokens));
        for rows in reference::token_blocks(problem) {
            let z = reference::logits(problem, rows.clone());
            let q_squared = reference::hidden_rows(problem, rows.clone()).mapv_into(|q| q * q);
            let mut variance = reference::squared_products(problem, &q_squared);
            self.arithmetic.logit_variance(problem, z.view(), &mut variance);
            let tokens: Vec<Option<Token>> = rows.clone().enumerate().map(|(place, n)| self.token(place, n)).collect();
            let of_tiles: Vec<Vec<Sums>> = unembedding.rows[..valid]
                .par_chunks_mut(IDS)
                .enumerate()
                .map(|(tile, of_ids)| {
                    let mut of_tokens = vec![Sums::default(); rows.len()];
                    for token in tokens.iter().flatten() {
                        let of_token = &mut of_tokens[token.place];
                        for (v, of_id) in (tile * IDS..).zip(&mut *of_ids) {
                            let element = self.element(token, v, z[[token.place, v]], variance[[token.place, v]]);
                            of_token.add_element(&element, self.k.squared[v], over_vocab);
                            of_id.add_element(&element, token.q_squared, over_tokens);
                        }
                    }
                    of_tokens
                })
                .collect();
            for of_tokens in of_tiles {
                hidden.rows[rows.clone()].iter_mut().zip(of_tokens).for_each(|(row, sums)| row.add(&sums));
            }
            drop(variance);
            if hidden.emulated.is_some() || unembedding.emulated.is_some() {
                self.emulate(rows, &tokens, &z, hidden, unembedding);
            }
        }
    }

    fn token(&self, place: usize, n: usize) -> Option<Token<'_>> {
        let label = self.problem.labels()[n];
        if label == Label::Masked {
            return None;
        }
        let lse = self.lse[n];
        let cotangent = self.cotangents.row(self.problem, n, lse);
        Some(Token { place, label: label.column(), cotangent, lse, spread: &self.spreads[n], q_squared: self.q.squared[n] })
    }

    fn element(&self, token: &Token, v: usize, z: f64, z_variance: f64) -> Element {
        let options = self.problem.options();
        let u = self.arithmetic.u;
        let RowCotangent { p: factor, onehot, constant } = token.cotangent;
        let p = (z - token.lse).exp();
        let slope = chain(options, z);
        // The derivative of the cap loses digits where it is small: its error is absolute.
        let slope_variance = options
            .logit_softcap
            .map_or(0.0, |cap| options.logit_scale.powi(2) * (4.0 * (z / (cap * cap)).powi(2) * z_variance + (2.0 * u).powi(2)));
        let at_label = constant + if token.label == Some(v) { onehot } else { 0.0 };
        let before = factor * p;
        let (lse_part, label_part) = (before * slope, at_label * slope);
        let deviation = self.arithmetic.p_variance(self.problem, token.spread, token.lse, z_variance, p).sqrt();
        // To first order p·deviation; where a logit is off by so much that e^x bends, P may become anything up to 1.
        let of_p = (p * deviation * (3.0 * deviation).exp()).min(1.0);
        let of_p = (factor * slope * of_p).powi(2);
        let (sum, before_sum) = match self.contract.label {
            LabelTerm::Joint => (lse_part + label_part, before + at_label),
            LabelTerm::Apart => (lse_part.abs() + label_part.abs(), before.abs() + at_label.abs()),
        };
        // The coefficients of P, onehot and constant are rounded too, and may cancel in the sum.
        let of_coefficients = self.arithmetic.unit() * (before * before + at_label * at_label) * slope * slope;
        let variance = |before: f64, of_p: f64| of_p + of_coefficients + before * before * slope_variance;
        let certain = (factor * slope).abs() * (p * (CERTAIN * deviation).exp_m1()).min(1.0)
            + (before.abs() + at_label.abs()) * (CERTAIN * slope_variance.sqrt() + 2.0 * u * slope.abs());
        // An exp that is flushed to 0 is then lost to its coefficient.
        let flushed = SMALLEST_NORMAL * (1.0 + 2.0 * (factor * slope).abs());
        let rounding = self.contract.dlogits.unit_roundoff();
        let s = [lse_part, label_part, sum];
        Element {
            s,
            variance: [variance(before, of_p), variance(at_label, 0.0), variance(before_sum, of_p)],
            bound: s.map(|s| certain + 2.0 * rounding * s.abs() + flushed),
        }
    }

    /// Adds what rounding dlogits as declared changes in the gradients of a block of tokens.
    fn emulate(&self, rows: Range<usize>, tokens: &[Option<Token>], z: &Array2<f64>, hidden: &mut Side, unembedding: &mut Side) {
        let problem = self.problem;
        let mut changes = Array2::zeros(z.dim());
        let mut onehot = vec![0.0; rows.len()];
        let of_rows = changes.axis_iter_mut(Axis(0)).into_par_iter().zip(&mut onehot).zip(tokens);
        of_rows.for_each(|((changes, at_label), token)| {
            if let Some(token) = token {
                *at_label = self.changes(token, z.row(token.place), changes);
            }
        });
        if let Some(effect) = &mut hidden.emulated {
            reference::hidden_product(problem, rows.clone(), changes.view(), &mut effect.lse);
            reference::hidden_label_product(problem, rows.clone(), &onehot, &mut effect.label);
        }
        if let Some(effect) = &mut unembedding.emulated {
            reference::unembedding_product(problem, rows.clone(), changes.view(), &mut effect.lse);
            reference::unembedding_label_product(problem, rows, &onehot, &mut effect.label);
        }
    }

    /// Writes what rounding a token's dlogits as declared changes, the label apart; returns the change at the label.
    fn changes(&self, token: &Token, z: ArrayView1<f64>, mut out: ArrayViewMut1<f64>) -> f64 {
        let Contract { dlogits, label, .. } = self.contract;
        let RowCotangent { p: factor, onehot, constant } = token.cotangent;
        let mut at_label = 0.0;
        for (v, (out, &z)) in out.iter_mut().zip(z).enumerate().take(self.problem.valid_columns()) {
            let slope = chain(self.problem.options(), z);
            let exact = (factor * (z - token.lse).exp() + constant) * slope;
            *out = dlogits.round(exact) - exact;
            if token.label == Some(v) && label == LabelTerm::Joint {
                let exact = exact + onehot * slope;
                at_label = dlogits.round(exact) - exact - *out;
            }
        }
        at_label
    }

    fn hidden(&self, side: Side, parts: &Parts) -> GradientError {
        let sum_of_exp = Arithmetic::sum_of_exp(self.problem);
        let common = |row: usize| {
            let Spread { total, largest, .. } = self.spreads[row];
            total - largest + self.arithmetic.unit() * (self.lse[row].powi(2) + sum_of_exp)
        };
        self.error(side, parts, self.problem.valid_columns(), common, &self.k.largest)
    }

    fn unembedding(&self, side: Side, parts: &Parts) -> GradientError {
        let effect = side.emulated.as_ref().map(Parts::sum);
        let mut error = self.error(side, parts, self.problem.shape().tokens, |_| 0.0, &self.q.largest);
        // It is summed over microbatches, whose tokens may be rounded alike.
        error.sum.effect = effect;
        error
    }

    /// The error of a gradient whose exact value is `parts`, and whose sums have so many `terms`. `common` is the variance of
    /// the relative error that all of a row's P share.
    fn error(
        &self,
        side: Side,
        parts: &Parts,
        terms: usize,
        common: impl Fn(usize) -> f64,
        bound_columns: &[f64],
    ) -> GradientError {
        let (u, n) = (self.arithmetic.u, terms as f64);
        let rounding = ROUNDING * self.contract.dlogits.unit_roundoff().powi(2);
        let error = Error::new(side.rows.len(), bound_columns.to_vec());
        let mut out = GradientError { lse: error.clone(), label: error.clone(), sum: error };
        for (row, sums) in side.rows.iter().enumerate() {
            let [lse, label, both] = squares(parts, row);
            let total = match self.contract.label {
                LabelTerm::Joint => both,
                LabelTerm::Apart => lse + label,
            };
            let effects = side.emulated.as_ref().map(|effect| squares(effect, row)).map(|[lse, _, both]| [lse, 0.0, both]);
            // An error that all of a token's P share does not average out over the vocabulary.
            // Neither does the bias of an exp.
            let shared = (common(row) + (EXP_BIAS * u).powi(2)) * lse;
            let of_parts = [(lse, shared), (label, 0.0), (total, shared)];
            for (i, (error, (total, shared))) in out.each_mut().into_iter().zip(of_parts).enumerate() {
                let rounded = if self.contract.label == LabelTerm::Apart { 0 } else { i };
                let terms = sums.terms[i];
                let of_sum = self.arithmetic.unit() * (n * (total / 3.0 + terms / 6.0) + terms) + u * u * total;
                error.modelled[row] = sums.independent[i] + of_sum + shared;
                error.typical[row] = rounding * sums.terms[rounded];
                error.emulated[row] = effects.map_or(0.0, |effects| effects[i]);
                error.bound_rows[row] = sums.bound[i];
            }
        }
        out
    }
}

/// ‖lse part‖², ‖label part‖² and ‖gradient‖² of one row.
fn squares(parts: &Parts, row: usize) -> [f64; 3] {
    let (lse, label) = (parts.lse.row(row), parts.label.row(row));
    [lse.dot(&lse), label.dot(&label), lse.iter().zip(label).map(|(a, b)| (a + b).powi(2)).sum()]
}

/// The squared norm of each row of Q or K, and the largest |element| of each column.
struct Norms {
    squared: Vec<f64>,
    largest: Vec<f64>,
}

impl Norms {
    fn new(rows: usize, columns: usize, values: impl Fn(Range<usize>) -> Array2<f64> + Sync) -> Self {
        const ELEMENTS: usize = 1 << 19;
        let step = (ELEMENTS / columns).max(1);
        let mut squared = vec![0.0; rows];
        let of_some = |(i, squared): (usize, &mut [f64])| {
            let values = values(i * step..i * step + squared.len());
            squared.iter_mut().zip(values.outer_iter()).for_each(|(squared, row)| *squared = row.dot(&row));
            values.fold_axis(Axis(0), 0.0f64, |largest, x| largest.max(x.abs())).to_vec()
        };
        let larger = |a: Vec<f64>, b: Vec<f64>| a.into_iter().zip(b).map(|(a, b)| a.max(b)).collect();
        let largest = squared.par_chunks_mut(step).enumerate().map(of_some).reduce(|| vec![0.0; columns], larger);
        Self { squared, largest }
    }
}
