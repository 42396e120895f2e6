//! Vocab-parallel building blocks: what one shard of the vocabulary knows of each token, and how that merges.
//!
//! A shard's max is exact and its sum of exponentials carries the float32 kernel's relative error. A merge is done in
//! float64, so each adds at most a few 2⁻⁵³ to the relative error of the sum: lse of S merged shards lies within
//! S·2⁻⁵⁰ of the lse that a kernel would have got from the same tiles on one device. Merging is commutative and, up to that,
//! associative.
//!
//! ```text
//! max = max(max₁, max₂)      sum = sum₁·exp(max₁ − max) + sum₂·exp(max₂ − max)      (never log(1 + exp x): nothing overflows)
//! ```

use crate::problem::{Problem, ProblemError};
use crate::tiled::RowStats;
use crate::vjp::{Forward, Kernel, finish};

/// What a range of vocab columns knows of each token, [N].
#[derive(Clone, Debug, PartialEq)]
pub struct Partial {
    rows: Vec<RowStats>,
}

impl Partial {
    /// Takes in the columns of another shard of the same tokens.
    ///
    /// # Errors
    /// If the shards do not have the same number of tokens.
    pub fn merge(mut self, other: &Partial) -> Result<Partial, ProblemError> {
        if self.rows.len() != other.rows.len() {
            return Err(ProblemError::Buffer { name: "partial", found: other.rows.len(), expected: self.rows.len(), what: "N" });
        }
        for (row, other) in self.rows.iter_mut().zip(&other.rows) {
            let equal_max = row.max == other.max;
            row.merge(other);
            if equal_max && other.sum != 0.0 {
                row.argmax = row.argmax.min(other.argmax);
            }
        }
        Ok(self)
    }

    /// Loss, lse and label logits, once all shards are merged; `problem` is any of the shards'.
    ///
    /// # Errors
    /// If the number of tokens is not the problem's.
    pub fn finish(&self, problem: &Problem) -> Result<Forward, ProblemError> {
        let tokens = problem.shape().tokens;
        if self.rows.len() != tokens {
            return Err(ProblemError::Buffer { name: "partial", found: self.rows.len(), expected: tokens, what: "N" });
        }
        Ok(finish(problem, &self.rows))
    }

    /// The largest logit of each token, −∞ where no column was valid, [N].
    pub fn max(&self) -> impl Iterator<Item = f32> {
        self.rows.iter().map(|r| r.max)
    }

    /// Σ exp(z − max) of each token, [N].
    pub fn sum(&self) -> impl Iterator<Item = f64> {
        self.rows.iter().map(|r| r.sum)
    }
}

impl Kernel {
    /// What this problem's vocab columns, a shard or all, know of each token: 2·N·D·V operations.
    pub fn partial(&self, problem: &Problem) -> Partial {
        let mut rows = self.statistics(problem);
        let first = problem.vocab_ids().start as u32;
        rows.iter_mut().for_each(|row| row.argmax += first);
        Partial { rows }
    }
}
