//! Dumps made to order: chosen shape, logit regime and loss, with recorded gradients that carry a named fault, or none.

use super::fault::Fault;
use super::replay::{Counterfactual, Outcome, Wanted};
use super::step::{Microbatch, Step};
use super::truth::{RowsAre, Stage};
use super::{DiffError, Progress};
use crate::dump::{Elements, FolderId, FolderWriter, LossSettings, MicrobatchGradients, Placement};
use fused_xent_kernels::contract::{LabelTerm, Precision};
use fused_xent_kernels::problem::{Inputs, Layout, Problem, Shape};
use fused_xent_kernels::reduction::Microbatches;
use half::bf16;
use ndarray::{Array2, s};
use rand::distr::Distribution;
use rand::{RngExt, SeedableRng};
use rand_distr::{StandardNormal, Zipf};
use rand_pcg::Pcg64;
use serde_json::Value;
use std::ops::Range;
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
    /// The contract that the dump declares, as a manifest's `contract`, and that its gradients keep but for the faults; what it
    /// does not say is float32, and `gradients` of the outputs.
    pub contract: Option<Value>,
    /// Whether the inner stages are recorded too, in float32: the cotangents of lse and of the label logits, as if the loss
    /// were made of these outside of the kernel, and, without label smoothing, the parts of both gradients.
    pub inner: bool,
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
            contract: None,
            inner: false,
            faults: vec![],
            seed: 0,
            step: 0,
        }
    }
}

impl SynthOptions {
    /// The same with `fault` planted, and with the loss and the shape that it needs to change anything.
    pub fn planting(mut self, fault: Fault) -> Self {
        let options = &mut self.loss.options;
        match fault {
            Fault::ValidVocabIgnored(_) => options.valid_vocab = Some(self.vocab - self.vocab / 25),
            Fault::SoftcapDerivativeMissing | Fault::SoftcapDerivativeMissingLabel => options.logit_softcap = Some(8.0),
            Fault::ZlossGradientMissing => options.z_loss = 1e-3,
            Fault::LabelSmoothingIgnored => options.label_smoothing = 0.1,
            Fault::LogitScaleIgnored(_) => options.logit_scale = 0.5,
            Fault::MeanOfMeans => self.loss.reduction.microbatches = Microbatches::Global,
            Fault::DqCotangentMissing { .. }
            | Fault::DkCotangentMissing { .. }
            | Fault::DqCotangentMissingAll
            | Fault::DkCotangentMissingAll => self.loss.reduction.cotangent = 0.125,
            Fault::TokenWeightsIgnored | Fault::FirstCotangentForAll => self.weights = true,
            Fault::TokenTailDropped { tile } => self.tokens = with_tail(self.tokens, tile),
            Fault::VocabTailDropped { tile } => self.vocab = with_tail(self.vocab, tile),
            _ => {}
        }
        self.faults.push(fault);
        self
    }

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
        for (member, expected) in [
            ("logits", "logits=f32 or logits=bf16"),
            ("dlogits", "dlogits=f32 or dlogits=bf16"),
            ("d_hidden", "d_hidden=f32 or d_hidden=bf16"),
            ("d_unembedding", "d_unembedding=f32 or d_unembedding=bf16"),
        ] {
            if let Some(found) = self.promised(member).filter(|p| !["f32", "bf16"].contains(p)) {
                return Err(DiffError::Option { option: "--contract", found: format!("{member}={found}"), expected });
            }
        }
        match self.promised("accumulate") {
            None | Some("f32") => Ok(()),
            Some(found) => {
                let expected = "accumulate=f32; plant dk-accumulate-bf16 or dq-accumulate-bf16 for other sums";
                Err(DiffError::Option { option: "--contract", found: format!("accumulate={found}"), expected })
            }
        }
    }

    /// What the contract says of a member.
    fn promised(&self, member: &str) -> Option<&str> {
        self.contract.as_ref()?.get(member)?.as_str()
    }

    /// Precision of `d_hidden` or `d_unembedding`.
    fn output(&self, gradient: &str) -> Precision {
        match self.promised(gradient) {
            Some("bf16") => Precision::Bf16,
            Some(_) => Precision::F32,
            None => self.gradients,
        }
    }

    /// The roundings that the contract declares.
    fn declared(&self) -> Vec<Fault> {
        let rounded = |member| self.promised(member) == Some("bf16");
        let logits = rounded("logits").then_some(Fault::LogitsBf16Both);
        let dlogits = rounded("dlogits").then_some(Fault::DlogitsBf16 { label: LabelTerm::Joint });
        logits.into_iter().chain(dlogits).collect()
    }
}

/// `of`, or a number near it that is a whole number of tiles and a ragged one.
fn with_tail(of: usize, tile: usize) -> usize {
    if of > tile && !of.is_multiple_of(tile) { of } else { (of / tile).max(1) * tile + tile.div_ceil(3) }
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
                let weights =
                    options.weights.then(|| (0..tokens).map(|_| [0.25f32, 0.7, 1.0, 1.6][rng.random_range(0..4)]).collect());
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
                Ok(Microbatch { problem, targets: made.targets.iter().map(|&t| t.into()).collect(), recorded_lse: None, index })
            })
            .collect::<Result<_, DiffError>>()?;
        Ok(Step {
            microbatches,
            num_microbatches: options.microbatches,
            processes: options.processes,
            reduction: options.loss.reduction,
            own_carries_step_factor: options.loss.microbatch_gradients == MicrobatchGradients::Step,
        })
    }
}

/// Writes a dump made to order to `dir`.
///
/// # Errors
/// Options that make no sense, a fault that changes nothing here, or a folder that cannot be written.
pub fn synth(dir: &Path, options: &SynthOptions, progress: &dyn Progress) -> Result<(), DiffError> {
    options.validate()?;
    let made = Made::new(options);
    let step = made.step(options)?;
    progress.begin("making the dump", options.microbatches as u64);
    let computation = built(&step, &options.declared(), &options.faults)?;
    let writer = Writer { dir, options, made: &made };
    let mut total: Option<Array2<f64>> = None;
    for m in 0..options.microbatches {
        let outcome = computation.replay(&step, m, Wanted::ALL);
        let own = outcome.stage(Stage::DUnembedding);
        computation.accumulate(&step, m, &own, total.get_or_insert_with(|| Array2::zeros(own.dim())));
        let cotangents = options.inner.then(|| computation.recorded_cotangents(&step, m, &outcome.forward.lse));
        writer.microbatch(m, &outcome, cotangents)?;
        progress.advance(1);
    }
    writer.shared(&total.unwrap_or_default())
}

/// The computation with the declared roundings and every fault built in.
fn built(step: &Step, declared: &[Fault], faults: &[Fault]) -> Result<Counterfactual, DiffError> {
    let mut computation = Counterfactual::default();
    declared.iter().for_each(|rounding| rounding.apply(&mut computation, step));
    for fault in faults {
        let before = computation;
        fault.apply(&mut computation, step);
        let fault_alone = faults.len() == 1;
        if computation == before || (fault_alone && !changes_something(&computation, step)) {
            return Err(DiffError::FaultWithoutEffect {
                fault: fault.slug().into(),
                reason: "the loss, the shape or the number of microbatches leaves it nothing to change".into(),
            });
        }
    }
    Ok(computation)
}

fn changes_something(computation: &Counterfactual, step: &Step) -> bool {
    let right = Counterfactual::default();
    let mut totals: [Option<Array2<f64>>; 2] = [None, None];
    (0..step.microbatches.len()).any(|m| {
        let outcomes = [right.replay(step, m, Wanted::ALL), computation.replay(step, m, Wanted::ALL)];
        for ((computation, outcome), total) in [&right, computation].into_iter().zip(&outcomes).zip(&mut totals) {
            let own = outcome.stage(Stage::DUnembedding);
            computation.accumulate(step, m, &own, total.get_or_insert_with(|| Array2::zeros(own.dim())));
        }
        totals[0] != totals[1] || Stage::OF_A_MICROBATCH.into_iter().any(|s| outcomes[0].stage(s) != outcomes[1].stage(s))
    })
}

/// The parts of both gradients.
const PARTS: [Stage; 4] = [Stage::DHiddenLse, Stage::DHiddenLabel, Stage::DUnembeddingLse, Stage::DUnembeddingLabel];

struct Writer<'a> {
    dir: &'a Path,
    options: &'a SynthOptions,
    made: &'a Made,
}

impl Writer<'_> {
    fn folder(&self, process: usize, microbatch: Option<usize>) -> Result<FolderWriter, DiffError> {
        let options = self.options;
        let id = FolderId {
            run_id: format!("synth-{}", options.seed),
            producer: concat!("xent-diff synth ", env!("CARGO_PKG_VERSION")).into(),
            step: options.step,
            microbatch,
            num_microbatches: options.microbatches,
            process_index: process,
            process_count: options.processes,
            loss: options.loss,
        };
        let mut folder = FolderWriter::create(self.dir, id)?;
        if let Some(contract) = &options.contract {
            folder.contract(contract.clone())?;
        }
        Ok(folder)
    }

    /// The share of `of` rows that a process holds.
    fn share(&self, process: usize, of: usize) -> Range<usize> {
        let at = |p: usize| of * p / self.options.processes;
        at(process)..at(process + 1)
    }

    fn microbatch(&self, m: usize, outcome: &Outcome, cotangents: Option<[Vec<f32>; 2]>) -> Result<(), DiffError> {
        let SynthOptions { tokens, hidden: d, processes, .. } = *self.options;
        let made = &self.made.microbatches[m];
        for process in 0..processes {
            let mut folder = self.folder(process, Some(m))?;
            let rows = self.share(process, tokens);
            let per_token = Placement::shard(&[tokens], &[rows.start], &[rows.len()]);
            let per_feature = Placement::shard(&[tokens, d], &[rows.start, 0], &[rows.len(), d]);
            folder.tensor("hidden", Elements::Bf16(&made.hidden[rows.start * d..rows.end * d]), &per_feature)?;
            folder.tensor("targets", Elements::I32(&made.targets[rows.clone()]), &per_token)?;
            if let Some(weights) = &made.weights {
                folder.tensor("token_weights", Elements::F32(&weights[rows.clone()]), &per_token)?;
            }
            folder.unembedding_from_shared()?;
            for stage in [Stage::Loss, Stage::Lse, Stage::LabelLogits] {
                let values: Vec<f32> = outcome.stage(stage).iter().map(|&x| x as f32).collect();
                folder.tensor(stage.name(), Elements::F32(&values[rows.clone()]), &per_token)?;
            }
            let ids = self.share(process, self.options.vocab);
            if let Some(cotangents) = &cotangents {
                for (name, values) in ["d_lse", "d_label_logits"].into_iter().zip(cotangents) {
                    folder.tensor(name, Elements::F32(&values[rows.clone()]), &per_token)?;
                }
                // A replay adds the smoothing's constant to P, whose part it is not.
                let parts: &[Stage] = if self.options.loss.options.label_smoothing == 0.0 { &PARTS } else { &[] };
                for &stage in parts {
                    let rows = if stage.rows_are() == RowsAre::VocabIds { &ids } else { &rows };
                    gradient(&mut folder, stage.name(), &outcome.stage(stage), rows.clone(), Precision::F32)?;
                }
            }
            gradient(&mut folder, "d_hidden", &outcome.stage(Stage::DHidden), rows, self.options.output("d_hidden"))?;
            let of_unembedding = self.options.output("d_unembedding");
            gradient(&mut folder, "d_unembedding", &outcome.stage(Stage::DUnembedding), ids, of_unembedding)?;
            folder.commit()?;
        }
        Ok(())
    }

    fn shared(&self, accumulated: &Array2<f64>) -> Result<(), DiffError> {
        let SynthOptions { hidden: d, vocab, processes, .. } = *self.options;
        for process in 0..processes {
            let mut folder = self.folder(process, None)?;
            let ids = self.share(process, vocab);
            let placement = Placement::shard(&[vocab, d], &[ids.start, 0], &[ids.len(), d]);
            folder.tensor("unembedding", Elements::Bf16(&self.made.unembedding[ids.start * d..ids.end * d]), &placement)?;
            gradient(&mut folder, "d_unembedding", accumulated, ids, self.options.output("d_unembedding"))?;
            folder.commit()?;
        }
        Ok(())
    }
}

/// Writes rows `rows` of a gradient, in bfloat16 or float32.
fn gradient(
    folder: &mut FolderWriter,
    name: &str,
    values: &Array2<f64>,
    rows: Range<usize>,
    precision: Precision,
) -> Result<(), DiffError> {
    let (all, d) = values.dim();
    let placement = Placement::shard(&[all, d], &[rows.start, 0], &[rows.len(), d]);
    let values = values.slice(s![rows, ..]);
    if precision == Precision::Bf16 {
        let narrow: Vec<bf16> = values.iter().map(|&x| bf16::from_f64(Precision::Bf16.round(x))).collect();
        folder.tensor(name, Elements::Bf16(&narrow), &placement)?;
    } else {
        let wide: Vec<f32> = values.iter().map(|&x| x as f32).collect();
        folder.tensor(name, Elements::F32(&wide), &placement)?;
    }
    Ok(())
}
