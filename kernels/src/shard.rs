//! Building blocks of a vocab-parallel loss: each shard reduces its own logits, the parts merge, and the merged lse goes
//! back to the shards' backward.
//!
//! ```text
//! of columns A:     m_A = max_v z_v,   s_A = Σ_v exp(z_v − m_A)
//! of A and B:       m = max(m_A, m_B), s = s_A·exp(m_A − m) + s_B·exp(m_B − m)
//! of all of V:      lse = m + ln s
//! ```
//! A merge computes in float64 and rounds s once, so it adds at most u = 2⁻²⁴ to s relatively, and to lse absolutely:
//! merging M parts, in whatever order, moves lse by at most (M − 1)·u, beyond its own rounding. A part without a valid
//! column has m = −∞ and s = 0, and changes nothing.
//!
//! Tokens need no merge: the results of slices of tokens lie side by side, and dK adds up
//! (see [`crate::GradientMut::Accumulate`]).

use crate::problem::{Label, LossOptions, Problem, ProblemError};
use crate::vjp::Forward;

/// What the loss needs to know of one token's logits over some of the columns. The default is that of no column.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenPartial {
    /// The largest z; −∞ if there is none.
    pub max: f32,
    /// Σ exp(z − max).
    pub sum: f32,
    /// Σ z; 0 where there is no label smoothing.
    pub logit_sum: f32,
    /// z_t if the label is among the columns, else 0.
    pub label_logit: f32,
}

impl Default for TokenPartial {
    fn default() -> Self {
        Self { max: f32::NEG_INFINITY, sum: 0.0, logit_sum: 0.0, label_logit: 0.0 }
    }
}

impl TokenPartial {
    /// Of the columns of both, which are disjoint.
    pub fn merge(self, other: Self) -> Self {
        Self::merged([self, other].into_iter())
    }

    /// ℓ and lse, once all columns are in. In float64 inside: one rounding each.
    pub(crate) fn loss_and_lse(&self, problem: &Problem) -> (f32, f32) {
        let LossOptions { z_loss, label_smoothing, .. } = *problem.options();
        let [max, sum, logit_sum, label] = [self.max, self.sum, self.logit_sum, self.label_logit].map(f64::from);
        let lse = max + sum.ln();
        let smoothing =
            if label_smoothing > 0.0 { label_smoothing * (label - logit_sum / problem.valid_total() as f64) } else { 0.0 };
        (((max - label) + sum.ln() + smoothing + z_loss * lse * lse) as f32, lse as f32)
    }
}

/// What some columns contribute to a result per token, and how contributions become one.
pub(crate) trait Share: Copy + Default + Send + Sync {
    /// That of all the shares' columns, which are disjoint.
    fn merged(shares: impl Iterator<Item = Self> + Clone) -> Self;
}

impl Share for TokenPartial {
    fn merged(shares: impl Iterator<Item = Self> + Clone) -> Self {
        let max = shares.clone().fold(f32::NEG_INFINITY, |max, share| if share.max > max { share.max } else { max });
        let (mut sum, mut logit_sum, mut label_logit) = (0.0, 0.0, 0.0);
        for share in shares {
            // Spares an exponential, and −∞ − −∞.
            let factor = if share.max == max { 1.0 } else { (f64::from(share.max) - f64::from(max)).exp() };
            sum += f64::from(share.sum) * factor;
            logit_sum += f64::from(share.logit_sum);
            label_logit += share.label_logit;
        }
        Self { max, sum: sum as f32, logit_sum: logit_sum as f32, label_logit }
    }
}

/// What a vocab shard knows of every token's loss; see [`crate::Kernel::partial`].
#[derive(Clone, Debug, PartialEq)]
pub struct Partial {
    /// Per token, [N]; that of no column at masked tokens.
    pub tokens: Vec<TokenPartial>,
    /// How many valid columns are in.
    pub columns: usize,
}

impl Partial {
    /// That of both shards' columns.
    ///
    /// # Errors
    /// If they are of different numbers of tokens.
    pub fn merge(&self, other: &Self) -> Result<Self, ProblemError> {
        if self.tokens.len() != other.tokens.len() {
            let (found, expected) = (other.tokens.len(), self.tokens.len());
            return Err(ProblemError::Buffer { name: "partial", found, expected, what: "N of the partial to merge with" });
        }
        let tokens = self.tokens.iter().zip(&other.tokens).map(|(a, b)| a.merge(*b)).collect();
        Ok(Self { tokens, columns: self.columns + other.columns })
    }

    /// The per-token results. `problem` is any of the shards', or the whole.
    ///
    /// # Errors
    /// If the partial is of another number of tokens, or not of as many columns as the whole vocabulary has valid ones.
    pub fn finish(&self, problem: &Problem) -> Result<Forward, ProblemError> {
        let expected = problem.shape().tokens;
        if self.tokens.len() != expected {
            return Err(ProblemError::Buffer { name: "partial", found: self.tokens.len(), expected, what: "N" });
        }
        if self.columns != problem.valid_total() {
            return Err(ProblemError::PartialColumns { found: self.columns, expected: problem.valid_total() });
        }
        let unmasked = problem.labels().iter().zip(&self.tokens).enumerate();
        let unmasked = unmasked.filter(|(_, (label, _))| **label != Label::Masked);
        Ok(Forward::new(problem, unmasked.map(|(n, (_, token))| (n, *token))))
    }
}
