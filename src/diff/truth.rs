//! The reference of a microbatch and of a step: exact values, stage by stage, and the floors they are judged by.

use super::compare::gathered;
use super::replay::{Counterfactual, Outcome};
use super::step::Step;
use fused_xent_kernels::contract::{Contract, Precision};
use fused_xent_kernels::floor::{Error, Floor, LogitFloor, Tolerance};
use fused_xent_kernels::problem::{Problem, ProblemError, Sample};
use fused_xent_kernels::reference::{self, Cotangents};
use ndarray::{Array2, ArrayView2};
use std::borrow::Cow;

/// A rung of the ladder, in the order of the computation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "each is the tensor of its name in the dump format")]
pub enum Stage {
    Loss,
    Lse,
    LabelLogits,
    DHiddenLse,
    DHiddenLabel,
    DUnembeddingLse,
    DUnembeddingLabel,
    DHidden,
    DUnembedding,
    AccumulatedDUnembedding,
}

/// What the rows of a stage's tensor are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowsAre {
    /// Tokens.
    Tokens,
    /// Vocab ids.
    VocabIds,
}

impl Stage {
    /// Every stage that a microbatch has, in order.
    pub const OF_A_MICROBATCH: [Stage; 9] = [
        Stage::Loss,
        Stage::Lse,
        Stage::LabelLogits,
        Stage::DHiddenLse,
        Stage::DHiddenLabel,
        Stage::DUnembeddingLse,
        Stage::DUnembeddingLabel,
        Stage::DHidden,
        Stage::DUnembedding,
    ];

    /// Its name in reports; for a stage of a microbatch also the tensor's in a dump.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Loss => "loss",
            Stage::Lse => "lse",
            Stage::LabelLogits => "label_logits",
            Stage::DHiddenLse => "d_hidden_lse",
            Stage::DHiddenLabel => "d_hidden_label",
            Stage::DUnembeddingLse => "d_unembedding_lse",
            Stage::DUnembeddingLabel => "d_unembedding_label",
            Stage::DHidden => "d_hidden",
            Stage::DUnembedding => "d_unembedding",
            Stage::AccumulatedDUnembedding => "accumulated_d_unembedding",
        }
    }

    /// What its rows are.
    pub fn rows_are(self) -> RowsAre {
        match self {
            Stage::DUnembeddingLse | Stage::DUnembeddingLabel | Stage::DUnembedding | Stage::AccumulatedDUnembedding => {
                RowsAre::VocabIds
            }
            _ => RowsAre::Tokens,
        }
    }
}

impl Stage {
    /// The rows of a stage's tensor that are judged, [N, 1], [N, D] or [V, D]; `transposed` if the elements lie as [D, V].
    pub fn rows(self, element: impl Fn(usize) -> f64, problem: &Problem, transposed: bool, truth: &Truth) -> Array2<f64> {
        let shape = problem.shape();
        let rows = if self.rows_are() == RowsAre::VocabIds { shape.vocab } else { shape.tokens };
        let columns = if matches!(self, Stage::Loss | Stage::Lse | Stage::LabelLogits) { 1 } else { shape.hidden };
        gathered(element, [rows, columns], transposed, truth.rows(self))
    }
}

/// The exact values of one microbatch's stages, the gradients' in all rows or in those of a sample.
pub struct Truth {
    /// From the oracle.
    pub outcome: Outcome,
    /// The rows of the gradients; `None` if all.
    pub sample: Option<Sample>,
    cotangents: Cotangents,
    logits: LogitFloor,
}

impl Truth {
    /// The oracle on microbatch `m`, with the cotangents that its recorded gradients carry.
    ///
    /// # Errors
    /// If the unembedding is a shard, or a row of the sample does not exist.
    pub fn new(step: &Step, m: usize, sample: Option<Sample>) -> Result<Self, ProblemError> {
        let problem = &step.microbatches[m].problem;
        let cotangents = Cotangents::weighted(problem, step.own_factor(m));
        // A sample is taken where passes over all logits are dear: there, one in float32 gives both.
        let (forward, logits) = match &sample {
            None => {
                let forward = reference::forward(problem)?;
                let logits = LogitFloor::new(&Contract::F32, problem, &forward)?;
                (forward, logits)
            }
            Some(_) => LogitFloor::with_forward(&Contract::F32, problem)?,
        };
        let gradients = match &sample {
            None => reference::backward(problem, &forward.lse, &cotangents)?,
            Some(sample) => reference::backward_rows(problem, &forward.lse, &cotangents, sample)?,
        };
        Ok(Self { outcome: Outcome { forward, gradients }, sample, cotangents, logits })
    }

    /// The errors that `contract` allows on this microbatch.
    ///
    /// # Errors
    /// If the unembedding is a shard.
    pub fn floor(&self, step: &Step, m: usize, contract: &Contract) -> Result<Floor, ProblemError> {
        let problem = &step.microbatches[m].problem;
        let Outcome { forward, gradients } = &self.outcome;
        let others = if self.logits.is_of(contract) { None } else { Some(LogitFloor::new(contract, problem, forward)?) };
        let logits = others.as_ref().unwrap_or(&self.logits);
        contract.floor_of(logits, problem, forward, &self.cotangents, gradients, self.sample.as_ref())
    }

    /// The rows of a stage that are there; `None` if all.
    pub fn rows(&self, stage: Stage) -> Option<&[usize]> {
        let sample = self.sample.as_ref()?;
        match stage {
            Stage::Loss | Stage::Lse | Stage::LabelLogits => None,
            _ if stage.rows_are() == RowsAre::VocabIds => Some(sample.ids()),
            _ => Some(sample.tokens()),
        }
    }
}

impl Outcome {
    /// The values of a stage of a microbatch, [rows, columns].
    ///
    /// # Panics
    /// If the stage is the step's.
    pub fn stage(&self, stage: Stage) -> Cow<'_, Array2<f64>> {
        let column =
            |values: &[f64]| Cow::Owned(ArrayView2::from_shape((values.len(), 1), values).expect("one column").to_owned());
        match stage {
            Stage::Loss => column(&self.forward.loss),
            Stage::Lse => column(&self.forward.lse),
            Stage::LabelLogits => column(&self.forward.label_logits),
            Stage::DHiddenLse => Cow::Borrowed(&self.gradients.hidden.lse),
            Stage::DHiddenLabel => Cow::Borrowed(&self.gradients.hidden.label),
            Stage::DUnembeddingLse => Cow::Borrowed(&self.gradients.unembedding.lse),
            Stage::DUnembeddingLabel => Cow::Borrowed(&self.gradients.unembedding.label),
            Stage::DHidden => Cow::Owned(self.gradients.hidden.sum()),
            Stage::DUnembedding => Cow::Owned(self.gradients.unembedding.sum()),
            Stage::AccumulatedDUnembedding => unreachable!("accumulated over the step, not in a microbatch"),
        }
    }
}

/// The error of a stage before its final rounding.
///
/// # Panics
/// If the stage is the step's.
pub fn stage_error(floor: &Floor, stage: Stage) -> &Error {
    match stage {
        Stage::Loss => &floor.loss,
        Stage::Lse => &floor.lse,
        Stage::LabelLogits => &floor.label_logits,
        Stage::DHiddenLse => &floor.hidden.lse,
        Stage::DHiddenLabel => &floor.hidden.label,
        Stage::DUnembeddingLse => &floor.unembedding.lse,
        Stage::DUnembeddingLabel => &floor.unembedding.label,
        Stage::DHidden => &floor.hidden.sum,
        Stage::DUnembedding => &floor.unembedding.sum,
        Stage::AccumulatedDUnembedding => unreachable!("accumulated over the step, not in a microbatch"),
    }
}

/// The accumulated dK of a step and its error.
pub struct Accumulated {
    /// Exact value, [V, D].
    pub value: Array2<f64>,
    /// Error before the final rounding.
    pub error: Error,
}

impl Accumulated {
    /// Adds microbatch `m`.
    pub fn add(total: &mut Option<Accumulated>, step: &Step, m: usize, own: &Array2<f64>, error: &Error) {
        let mut error = error.clone();
        error.scale(step.accumulation_factor());
        let total = match total {
            Some(total) => {
                total.error.add(&error);
                total
            }
            None => total.insert(Accumulated { value: Array2::zeros(own.dim()), error }),
        };
        Counterfactual::default().accumulate(step, m, own, &mut total.value);
    }

    /// What is tolerated of a candidate whose accumulated dK has precision `output`.
    pub fn tolerance(&self, output: Precision) -> Tolerance {
        self.error.tolerance(self.value.view(), output)
    }
}
