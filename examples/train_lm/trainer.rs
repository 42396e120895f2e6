//! One training step: forward, fused loss, backward of every microbatch, then one update.

use crate::adam::Adam;
use crate::batches::{IGNORE, Microbatch};
use crate::loss::{self, Fault, REDUCTION};
use crate::model::Weights;
use crate::random::Random;
use fused_xent::capture::{MicrobatchInputs, MicrobatchOutputs, StepCapture};
use fused_xent::dump::Elements;
use fused_xent::kernels::Kernel;
use fused_xent::kernels::problem::{Floats, Inputs, Layout, LossOptions, Problem, Shape, Targets};
use fused_xent::kernels::reduction::{MicrobatchCounts, Microbatches, StepReduction};
use half::bf16;
use ndarray::{Array2, ArrayView2};
use std::error::Error;

/// A model in training.
pub struct Trainer {
    pub weights: Weights<f32>,
    kernel: Kernel,
    adam: Adam,
    fault: Option<Fault>,
}

/// How a step went.
pub struct Outcome {
    /// The step's loss: the mean of ℓ over the valid tokens of all its microbatches.
    pub loss: f64,
    /// Norm of the whole gradient before clipping.
    pub gradient_norm: f32,
}

impl Trainer {
    /// Random weights: V ids, sequences of T positions, D features.
    pub fn new(vocab: usize, sequence: usize, d: usize, rate: f32, fault: Option<Fault>, random: &mut Random) -> Self {
        let weights = Weights::random(vocab, sequence, d, random);
        Self { kernel: Kernel::best(), adam: Adam::new(&weights, rate), weights, fault }
    }

    /// Trains on the microbatches of one step. `capture` writes what the loss is given and returns, and changes none of it:
    /// Q, K, targets, ℓ, lse, z_t and dQ as they are, dK rounded to bf16 from the f32 that training goes on with.
    ///
    /// # Errors
    /// The first thing that cannot be captured; the step is not taken then.
    pub fn step(&mut self, microbatches: &[Microbatch], mut capture: Option<StepCapture>) -> Result<Outcome, Box<dyn Error>> {
        let (vocab, d) = self.weights.unembedding.dim();
        let sequence = self.weights.positions.nrows();
        let unembedding = to_bf16(&self.weights.unembedding);
        if let Some(capture) = &mut capture {
            capture.unembedding(Floats::Bf16(&unembedding), [vocab, d], Layout::Vd)?;
        }
        let counts: Vec<_> = microbatches.iter().map(counts).collect();
        let trained = match self.fault {
            Some(Fault::MeanOfMeans) => StepReduction { microbatches: Microbatches::Mean, ..REDUCTION },
            _ => REDUCTION,
        };
        let mut gradient = self.weights.zeros_like();
        let mut step_loss = 0.0;
        for (m, batch) in microbatches.iter().enumerate() {
            let (hidden, trace) = self.weights.forward(&batch.ids);
            let hidden = to_bf16(&hidden);
            let inputs = Inputs {
                hidden: (&hidden[..]).into(),
                unembedding: (&unembedding[..]).into(),
                layout: Layout::Vd,
                targets: (&batch.targets[..]).into(),
                token_weights: None,
                shape: Shape { tokens: batch.ids.len(), hidden: d, vocab },
                shard: None,
            };
            let problem = Problem::new(inputs, LossOptions { ignore_index: IGNORE.into(), ..LossOptions::default() })?;
            let factor = trained.own_factor(&counts, m) * trained.step_factor(microbatches.len());
            let g: Vec<f32> = problem.weights().iter().map(|&w| (factor * f64::from(w)) as f32).collect();
            let recording = match &capture {
                Some(capture) => {
                    let shape = [batch.ids.len() / sequence, sequence, d];
                    let inputs = MicrobatchInputs::new(Floats::Bf16(&hidden), &shape, Targets::I32(&batch.targets));
                    Some(capture.microbatch(m, &inputs)?)
                }
                None => None,
            };
            let result = loss::loss_and_grad(&self.kernel, &problem, &g, self.fault)?;
            step_loss += REDUCTION.own_factor(&counts, m) * result.forward.loss.iter().map(|&l| f64::from(l)).sum::<f64>();
            if let Some(mut recording) = recording {
                recording.outputs(&MicrobatchOutputs {
                    loss: Some(&result.forward.loss),
                    lse: Some(&result.forward.lse),
                    label_logits: Some(&result.forward.label_logits),
                    d_hidden: Some(Elements::Bf16(&result.d_hidden)),
                    d_unembedding: Some(Elements::Bf16(&to_bf16(&result.d_unembedding))),
                })?;
                recording.commit()?;
            }

            let d_hidden: Array2<f32> =
                ArrayView2::from_shape((batch.ids.len(), d), &result.d_hidden)?.mapv(|d: bf16| d.to_f32());
            self.weights.backward(&trace, d_hidden.view(), &mut gradient);
            let d_unembedding = ArrayView2::from_shape((vocab, d), &result.d_unembedding)?;
            match self.fault {
                Some(Fault::DkAccumulateBf16) => gradient.unembedding.zip_mut_with(&d_unembedding, |sum, &d| {
                    *sum = bf16::from_f32(*sum + bf16::from_f32(d).to_f32()).to_f32();
                }),
                _ => gradient.unembedding += &d_unembedding,
            }
        }
        if let Some(capture) = capture {
            capture.finish(Some(Elements::Bf16(&to_bf16(&gradient.unembedding))))?;
        }
        let gradient_norm = self.adam.update(&mut self.weights, &gradient);
        Ok(Outcome { loss: step_loss, gradient_norm })
    }
}

/// What the reduction needs to know of a microbatch: every valid token has weight 1.
fn counts(batch: &Microbatch) -> MicrobatchCounts {
    let valid = batch.targets.iter().filter(|&&t| t != IGNORE).count();
    MicrobatchCounts { tokens: batch.targets.len(), weight: valid as f64 }
}

fn to_bf16<'a>(values: impl IntoIterator<Item = &'a f32>) -> Vec<bf16> {
    values.into_iter().map(|&x| bf16::from_f32(x)).collect()
}
