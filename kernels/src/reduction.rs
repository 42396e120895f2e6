//! From per-token losses to the step's loss: weights, denominators, microbatches, cotangent.
//!
//! Per microbatch, L = Σ w·ℓ (`sum`) or Σ w·ℓ / d (`mean`), where d is Σ w, the number of tokens, or a given number.
//! Over the step's M microbatches: `mean` divides the sum of the L by M, `sum` does not, `global` uses one d for all of
//! them. `cotangent` scales it all. A microbatch whose d is 0 contributes nothing.
//! All of it is linear in ℓ, so a step is described by one factor per microbatch: g[n] = factor · w[n].

use crate::problem::{Problem, ProblemError};

/// How the per-token losses of a microbatch become one number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reduction {
    /// Σ w·ℓ.
    Sum,
    /// Σ w·ℓ / denominator.
    #[default]
    Mean,
}

/// What `Reduction::Mean` divides by.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Denominator {
    /// Σ w: the valid tokens, by weight.
    #[default]
    Valid,
    /// The number of tokens, masked ones included.
    Tokens,
    /// This number, as it is.
    Given(f64),
}

/// How the losses of a step's microbatches become the step's loss.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Microbatches {
    /// Their mean: the sum divided by the number of microbatches.
    #[default]
    Mean,
    /// Their sum.
    Sum,
    /// Their sum, each divided by one denominator over the whole step.
    Global,
}

/// Everything between per-token losses and the step's loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReduction {
    /// Within a microbatch.
    pub reduction: Reduction,
    /// What `mean` divides by.
    pub denominator: Denominator,
    /// Over the step's microbatches.
    pub microbatches: Microbatches,
    /// Upstream factor on everything: loss scaling, gradient accumulation.
    pub cotangent: f64,
}

impl Default for StepReduction {
    fn default() -> Self {
        Self {
            reduction: Reduction::default(),
            denominator: Denominator::default(),
            microbatches: Microbatches::default(),
            cotangent: 1.0,
        }
    }
}

/// What the reduction needs to know of a microbatch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MicrobatchCounts {
    /// Number of tokens, masked ones included.
    pub tokens: usize,
    /// Σ w over the tokens that take part.
    pub weight: f64,
}

impl MicrobatchCounts {
    /// The counts of `problem`.
    pub fn of(problem: &Problem) -> Self {
        Self { tokens: problem.shape().tokens, weight: problem.weights().iter().map(|&w| f64::from(w)).sum() }
    }
}

impl StepReduction {
    /// Checks the numbers.
    ///
    /// # Errors
    /// Names the option that is not finite or not positive.
    pub fn validate(&self) -> Result<(), ProblemError> {
        if !self.cotangent.is_finite() {
            return Err(ProblemError::Option { name: "cotangent", found: self.cotangent, expected: "a finite number" });
        }
        if let Denominator::Given(d) = self.denominator
            && !(d.is_finite() && d > 0.0)
        {
            return Err(ProblemError::Option {
                name: "denominator",
                found: d,
                expected: "\"valid\", \"tokens\" or a number above 0",
            });
        }
        Ok(())
    }

    /// The factor of microbatch `m`'s own loss: ∂L_m/∂ℓ[n] = factor · w[n], without the step's 1/M.
    ///
    /// `counts` holds all microbatches of the step; only `global` looks beyond `counts[m]`.
    ///
    /// # Panics
    /// If `m` is not in `counts`.
    pub fn own_factor(&self, counts: &[MicrobatchCounts], m: usize) -> f64 {
        let over = if self.microbatches == Microbatches::Global { counts } else { &counts[m..=m] };
        let denominator = match (self.reduction, self.denominator) {
            (Reduction::Sum, _) => 1.0,
            (Reduction::Mean, Denominator::Valid) => over.iter().map(|c| c.weight).sum(),
            (Reduction::Mean, Denominator::Tokens) => over.iter().map(|c| c.tokens as f64).sum(),
            (Reduction::Mean, Denominator::Given(d)) => d,
        };
        if denominator == 0.0 { 0.0 } else { self.cotangent / denominator }
    }

    /// The factor between a microbatch's own loss and its share of the step's loss, of `microbatches` microbatches.
    pub fn step_factor(&self, microbatches: usize) -> f64 {
        match self.microbatches {
            Microbatches::Mean => 1.0 / microbatches as f64,
            Microbatches::Sum | Microbatches::Global => 1.0,
        }
    }
}
