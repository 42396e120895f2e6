//! The cotangents that entered the backward, as they were recorded.
//!
//! A loss that is made of lse and the label's logit outside of the kernel hands it ∂L/∂lse = g·(1 + 2·z_loss·lse) and
//! ∂L/∂z_t = −g·(1 − ε). If the kernel's own loss is used, g enters by that, and the recorded cotangents are 0, or z-loss's share
//! alone.

use super::{Distance, Microbatch};
use crate::diff::truth::Stage;
use crate::report::substitution::{StageInput, Substituted};
use fused_xent_kernels::contract::Precision;
use fused_xent_kernels::reference::RowCotangent;

/// Their names in the dump format: of lse, of the label logits.
pub const NAMES: [&str; 2] = ["d_lse", "d_label_logits"];

/// Some five float32 roundings of a product of as many factors, in units of the value.
const ROUNDINGS: f64 = 2.0 / (1 << 24) as f64;
/// How many times that no honest product is off.
const LIMIT: f64 = 8.0;

/// A recorded cotangent.
pub(super) struct Cotangent {
    pub name: &'static str,
    /// All that multiplies P, or the onehot, [N]; 0 where masked.
    pub values: Vec<f64>,
    /// Whether it is not the reference's.
    pub diverges: bool,
    /// ‖error‖, ‖error‖ beside what the candidate's own lse gives, and the floor.
    own: f64,
    left: f64,
    floor: f64,
}

impl Cotangent {
    /// Of lse.
    pub fn of_lse(microbatch: &Microbatch, recorded: &[f64]) -> Option<Self> {
        let z_loss = microbatch.problem.options().z_loss;
        let mut given = recorded.to_vec();
        if z_loss != 0.0 {
            let g = microbatch.weighted().loss?;
            let all = microbatch.rows(None, |row| row.p);
            let share: Vec<f64> = all.iter().zip(&g).map(|(p, g)| p - g).collect();
            let size = |x: &[f64]| microbatch.norm(x.iter().copied()).max(f64::MIN_POSITIVE).ln();
            if (size(recorded) - size(&share)).abs() < (size(recorded) - size(&all)).abs() {
                given.iter_mut().zip(&g).for_each(|(given, g)| *given += g);
            }
        }
        Self::new(microbatch, 0, recorded, given, |row| row.p)
    }

    /// Of the label logits.
    pub fn of_label(microbatch: &Microbatch, recorded: &[f64]) -> Option<Self> {
        Self::new(microbatch, 1, recorded, recorded.to_vec(), |row| row.onehot)
    }

    fn new(
        microbatch: &Microbatch,
        which: usize,
        recorded: &[f64],
        given: Vec<f64>,
        of: fn(RowCotangent) -> f64,
    ) -> Option<Self> {
        let tokens = microbatch.problem.shape().tokens;
        let part = |n: &usize| microbatch.takes_part(*n);
        let used = (0..tokens).filter(part).any(|n| recorded[n] != 0.0);
        if !used || !(0..tokens).filter(part).all(|n| recorded[n].is_finite()) {
            return None;
        }
        let values: Vec<f64> = (0..tokens).map(|n| if microbatch.takes_part(n) { given[n] } else { 0.0 }).collect();
        let (exact, by_own_lse) = (microbatch.rows(None, of), microbatch.rows(microbatch.lse.as_deref(), of));
        // g rounded to bfloat16 once is honest.
        let rounded: Vec<f64> =
            microbatch.weighted().loss?.iter().map(|&g| if g == 0.0 { 1.0 } else { Precision::Bf16.round(g) / g }).collect();
        let off = |from: &[f64], factor: &dyn Fn(usize) -> f64| {
            microbatch.norm(values.iter().zip(from).enumerate().map(|(n, (x, r))| x - r * factor(n)))
        };
        let distance = |from: &[f64]| off(from, &|_| 1.0).min(off(from, &|n| rounded[n]));
        let of_lse = if which == 0 { microbatch.error_by_lse() } else { 0.0 };
        let floor = (ROUNDINGS * microbatch.norm(exact.iter().copied())).hypot(of_lse).max(f64::MIN_POSITIVE);
        let (own, left) = (distance(&exact), distance(&by_own_lse));
        Some(Self { name: NAMES[which], values, diverges: own > LIMIT * floor, own, left, floor })
    }

    pub fn rung(&self, microbatch: &Microbatch, lse: Vec<StageInput>) -> Substituted {
        let depends = self.name == NAMES[0] && microbatch.problem.options().z_loss != 0.0;
        let distance = Distance { own: self.own, own_floor: self.floor, left: self.left, floor: self.floor, limit: LIMIT };
        let missing = depends && lse.is_empty();
        let record = if missing { vec!["lse".to_owned()] } else { vec![] };
        let inputs = if depends { lse } else { vec![] };
        Substituted::new(Some(microbatch.index()), self.name, &distance, inputs, record, None)
    }
}

impl Microbatch<'_> {
    /// A coefficient of ∂/∂z for every token, by the reference's lse or another.
    fn rows(&self, lse: Option<&[f64]>, of: fn(RowCotangent) -> f64) -> Vec<f64> {
        let (weighted, exact) = (self.weighted(), &self.truth.outcome.forward.lse);
        let lse = lse.unwrap_or(exact);
        (0..exact.len()).map(|n| of(weighted.row(self.problem, n, lse[n]))).collect()
    }

    fn norm(&self, values: impl Iterator<Item = f64>) -> f64 {
        values.enumerate().filter(|(n, _)| self.takes_part(*n)).map(|(_, x)| x * x).sum::<f64>().sqrt()
    }

    /// What an honest error of lse makes in its cotangent.
    fn error_by_lse(&self) -> f64 {
        let (z_loss, weighted) = (self.problem.options().z_loss, self.weighted());
        let tolerance = self.case.tolerances.microbatches[self.place].get(&Stage::Lse);
        let lse = &self.truth.outcome.forward.lse;
        let error = |n: usize| tolerance.map_or(ROUNDINGS * lse[n].abs(), |tolerance| tolerance.l2(n..n + 1));
        let g = weighted.loss.unwrap_or_default();
        self.norm(g.iter().enumerate().map(|(n, g)| 2.0 * z_loss * g * error(n)))
    }
}
