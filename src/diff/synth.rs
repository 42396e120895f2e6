//! Dumps made to order: chosen shape, logit regime and loss, with recorded gradients that carry a named fault, or none.

use super::counterfactual::{Counterfactual, Microbatch, Step};
use super::fault::Fault;
use super::truth::Stage;
use super::{DiffError, Progress};
use crate::dump::{FolderWriter, LossSettings, MicrobatchGradients, Part, RunInfo, Shard};
use fused_xent_kernels::contract::Precision;
use fused_xent_kernels::problem::{Inputs, Layout, Problem, Shape};
use half::bf16;
use ndarray::Array2;
use rand::distr::Distribution;
use rand::{RngExt, SeedableRng};
use rand_distr::{StandardNormal, Zipf};
use rand_pcg::Pcg64;
use std::path::Path;

/// How large the logits are, and how sure the model is of its labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Regime {
    /// Logits near 0, lse ≈ ln V: a model at initialisation.
    Initial,
    /// Logits of standard deviation 1.
    Unit,
    /// Most labels predicted with probability near 1: a trained model.
    Trained,
    /// Logits of standard deviation 30.
    Large,
    /// Logits of standard deviation 1000.
    Huge,
}

impl Regime {
    /// Standard deviation of the logits, and the margin of the label's.
    fn spread_and_margin(self) -> (f64, f64) {
        match self {
            Regime::Initial => (0.02, 0.0),
            Regime::Unit => (1.0, 0.0),
            Regime::Trained => (2.0, 14.0),
            Regime::Large => (30.0, 0.0),
            Regime::Huge => (1000.0, 0.0),
        }
    }
}

/// What to make.
#[derive(Clone, Debug)]
pub struct SynthOptions {
    /// N: tokens of each microbatch.
    pub tokens: usize,
    /// D.
    pub hidden: usize,
    /// V.
    pub vocab: usize,
    /// Microbatches of the step.
    pub microbatches: usize,
    /// Processes: each holds a share of the tokens, and of the unembedding's rows.
    pub processes: usize,
    /// Size of the logits.
    pub regime: Regime,
    /// Share of the tokens that are masked; it grows over the microbatches, so that their counts differ.
    pub masked: f64,
    /// Whether tokens carry weights other than 0 and 1.
    pub weights: bool,
    /// The loss.
    pub loss: LossSettings,
    /// Precision of the recorded gradients.
    pub gradients: Precision,
    /// Faults that they carry.
    pub faults: Vec<Fault>,
    /// Everything random comes from it.
    pub seed: u64,
    /// The training step that the dump claims to be of.
    pub step: u64,
}

impl Default for SynthOptions {
    fn default() -> Self {
        Self {
            tokens: 256,
            hidden: 64,
            vocab: 1000,
            microbatches: 2,
            processes: 1,
            regime: Regime::Trained,
            masked: 0.1,
            weights: false,
            loss: LossSettings::default(),
            gradients: Precision::Bf16,
            faults: vec![],
            seed: 0,
            step: 0,
        }
    }
}

impl SynthOptions {
    fn validate(&self) -> Result<(), DiffError> {
        let positive = [
            ("--tokens", self.tokens),
            ("--hidden", self.hidden),
            ("--vocab", self.vocab),
            ("--microbatches", self.microbatches),
            ("--processes", self.processes),
        ];
        for (option, found) in positive {
            if found == 0 {
                return Err(DiffError::Option { option, found: "0".into(), expected: "at least 1" });
            }
        }
        if !(0.0..1.0).contains(&self.masked) {
            return Err(DiffError::Option { option: "--masked", found: self.masked.to_string(), expected: "a share in [0, 1)" });
        }
        if self.processes > self.tokens.min(self.vocab) {
            let found = self.processes.to_string();
            return Err(DiffError::Option { option: "--processes", found, expected: "no more than tokens and vocab ids" });
        }
        Ok(())
    }
}

/// The inputs of a step.
pub struct Made {
    unembedding: Vec<bf16>,
    microbatches: Vec<MadeMicrobatch>,
}

struct MadeMicrobatch {
    hidden: Vec<bf16>,
    targets: Vec<i32>,
    weights: Option<Vec<f32>>,
}

impl Made {
    /// Draws the inputs. Labels follow Zipf's law, as tokens of text do, so that some rows of K are hit often.
    pub fn new(options: &SynthOptions) -> Self {
        let SynthOptions { tokens, hidden: d, vocab, .. } = *options;
        let mut rng = Pcg64::seed_from_u64(options.seed);
        let (spread, margin) = options.regime.spread_and_margin();
        let scale = spread / (d as f64).sqrt();
        let mut normal = |n: usize, scale: f64| -> Vec<f64> {
            (0..n).map(|_| scale * Distribution::<f64>::sample(&StandardNormal, &mut rng)).collect()
        };
        let unembedding: Vec<bf16> = normal(vocab * d, scale).into_iter().map(bf16::from_f64).collect();
        let noise: Vec<Vec<f64>> = (0..options.microbatches).map(|_| normal(tokens * d, 1.0)).collect();
        let valid = options.loss.options.valid_vocab.unwrap_or(vocab).min(vocab);
        let zipf = Zipf::new(valid as f64, 1.1).expect("at least one valid id");
        let microbatches = noise
            .into_iter()
            .enumerate()
            .map(|(m, mut q)| {
                let masked = options.masked * 2.0 * (m + 1) as f64 / (options.microbatches + 1) as f64;
                let mut targets = Vec::with_capacity(tokens);
                for q in q.chunks_exact_mut(d) {
                    let label = (zipf.sample(&mut rng) as usize).clamp(1, valid) - 1;
                    let row = &unembedding[label * d..(label + 1) * d];
                    let squared: f64 = row.iter().map(|k| k.to_f64().powi(2)).sum();
                    // Not every token is learnt alike.
                    let pull = margin * rng.random_range(0.3..1.2) / squared.max(f64::MIN_POSITIVE);
                    q.iter_mut().zip(row).for_each(|(q, k)| *q += pull * k.to_f64());
                    let ignore = i32::try_from(options.loss.options.ignore_index).unwrap_or(-100);
                    targets.push(if rng.random_bool(masked.min(1.0)) { ignore } else { label as i32 });
                }
                let weights = options.weights.then(|| (0..tokens).map(|_| [0.25f32, 0.7, 1.0, 1.6][rng.random_range(0..4)]).collect());
                MadeMicrobatch { hidden: q.into_iter().map(bf16::from_f64).collect(), targets, weights }
            })
            .collect();
        Self { unembedding, microbatches }
    }

    /// The step that these inputs make.
    ///
    /// # Errors
    /// If the loss options make no sense for them.
    pub fn step(&self, options: &SynthOptions) -> Result<Step<'_>, DiffError> {
        let shape = Shape { tokens: options.tokens, hidden: options.hidden, vocab: options.vocab };
        let microbatches = self
            .microbatches
            .iter()
            .enumerate()
            .map(|(index, made)| {
                let inputs = Inputs {
                    hidden: made.hidden[..].into(),
                    unembedding: self.unembedding[..].into(),
                    layout: Layout::Vd,
                    targets: made.targets[..].into(),
                    token_weights: made.weights.as_deref(),
                    shape,
                    shard: None,
                };
                let problem = Problem::new(inputs, options.loss.options)
                    .map_err(|source| DiffError::Problem { place: "synth".into(), source })?;
                Ok(Microbatch { problem, targets: made.targets.iter().map(|&t| t.into()).collect(), index })
            })
            .collect::<Result<_, DiffError>>()?;
        Ok(Step {
            microbatches,
            num_microbatches: options.microbatches,
            reduction: options.loss.reduction,
            own_carries_step_factor: options.loss.microbatch_gradients == MicrobatchGradients::Step,
        })
    }
}
