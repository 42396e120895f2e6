//! One step as a replay sees it: its microbatches, and how their losses add up.

use fused_xent_kernels::problem::Problem;
use fused_xent_kernels::reduction::{MicrobatchCounts, StepReduction};

/// One step as a replay sees it.
pub struct Step<'a> {
    /// Its microbatches.
    pub microbatches: Vec<Microbatch<'a>>,
    /// How many microbatches the step has; not all may be at hand.
    pub num_microbatches: usize,
    /// How their losses add up.
    pub reduction: StepReduction,
    /// How many processes computed it.
    pub processes: usize,
    /// Whether a microbatch's own gradient already carries the step's factor.
    pub own_carries_step_factor: bool,
}

/// One microbatch: the checked problem, and the targets as stored, masked ones too.
pub struct Microbatch<'a> {
    /// The problem.
    pub problem: Problem<'a>,
    /// Label ids as captured, [N].
    pub targets: Vec<i64>,
    /// The lse that was recorded, [N].
    pub recorded_lse: Option<Vec<f64>>,
    /// Index in the step.
    pub index: usize,
}

impl Step<'_> {
    /// What the reduction needs to know of every microbatch.
    pub fn counts(&self) -> Vec<MicrobatchCounts> {
        self.microbatches.iter().map(|m| MicrobatchCounts::of(&m.problem)).collect()
    }

    /// ∂(microbatch m's recorded loss)/∂ℓ[n] = factor · w[n].
    pub fn own_factor(&self, m: usize) -> f64 {
        let own = self.reduction.own_factor(&self.counts(), m);
        if self.own_carries_step_factor { own * self.step_factor() } else { own }
    }

    /// From a microbatch's own gradient to its share of the accumulated one.
    pub fn accumulation_factor(&self) -> f64 {
        if self.own_carries_step_factor { 1.0 } else { self.step_factor() }
    }

    fn step_factor(&self) -> f64 {
        self.reduction.step_factor(self.num_microbatches)
    }
}
