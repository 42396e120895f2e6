//! The candidate `cpu`: the fused kernel of this machine, run on the captured inputs.

use super::candidate::{Produced, Values};
use super::truth::{RowsAre, Stage, Truth};
use super::{DiffError, View, problem_error};
use fused_xent_kernels::contract::Precision;
use fused_xent_kernels::problem::{DType, Layout, Problem, ProblemError};
use fused_xent_kernels::{Cotangents, Dlogits, GradientMut, Gradients, Kernel};
use std::collections::BTreeMap;

pub(super) fn produce(kernel: &Kernel, view: &View) -> Result<Produced, DiffError> {
    // What is judged is the algorithm: nothing is rounded on the way.
    let kernel = &kernel.clone().with_dlogits(Dlogits::F32);
    view.progress.begin(&format!("step {}: running cpu:{}", view.number, kernel.name()), view.judged.len() as u64);
    let mut microbatches = Vec::new();
    let mut accumulated: Option<Vec<f32>> = None;
    for &m in view.judged {
        let problem = &view.step.microbatches[m].problem;
        let run = Run { kernel, problem, truth: view.truth(m), factor: view.step.own_factor(m) };
        let located = |e| problem_error(view.number, m, e);
        microbatches.push(run.stages().map_err(located)?);
        if view.over_step {
            let total = accumulated.get_or_insert_with(|| vec![0.0; problem.unembedding().len()]);
            run.accumulate(view.step.accumulation_factor(), total).map_err(located)?;
        }
        view.progress.advance(1);
    }
    let first = view.judged[0];
    let (problem, truth) = (&view.step.microbatches[first].problem, view.truth(first));
    Ok(Produced {
        name: "cpu".into(),
        description: format!("the fused kernel {} of this machine, in float32", kernel.name()),
        microbatches,
        accumulated: accumulated.map(|total| values(&total, Stage::AccumulatedDUnembedding, problem, truth)),
        contracts: vec![kernel.contract([problem.hidden().dtype(), problem.unembedding().dtype()], [DType::F32; 2])],
        contract_source: "declared",
    })
}

struct Run<'a> {
    kernel: &'a Kernel,
    problem: &'a Problem<'a>,
    /// It says which rows are compared.
    truth: &'a Truth,
    /// ∂L/∂ℓ[n] = factor · w[n].
    factor: f64,
}

impl Run<'_> {
    fn stages(&self) -> Result<BTreeMap<Stage, Values>, ProblemError> {
        let problem = self.problem;
        let g = self.cotangents(1.0);
        let (mut dq, mut dk) = (vec![0.0; problem.hidden().len()], vec![0.0; problem.unembedding().len()]);
        let forward = self.kernel.loss_and_grad(problem, &g, gradients(&mut dq, &mut dk))?;
        let mut stages = BTreeMap::new();
        let mut add = |stage, data: &[f32]| stages.insert(stage, values(data, stage, problem, self.truth));
        add(Stage::Loss, &forward.loss);
        add(Stage::Lse, &forward.lse);
        add(Stage::LabelLogits, &forward.label_logits);
        add(Stage::DHidden, &dq);
        add(Stage::DUnembedding, &dk);
        // The lse part is what a cotangent of lse alone gives; the label part, what is left without it.
        let (z_loss, smoothing) = (problem.options().z_loss as f32, problem.options().label_smoothing);
        let of_lse: Vec<f32> = g.iter().zip(&forward.lse).map(|(g, lse)| g * (1.0 + 2.0 * z_loss * lse)).collect();
        let negative: Vec<f32> = g.iter().map(|g| -g).collect();
        let lse_part = Cotangents { lse: Some(&of_lse), ..Cotangents::default() };
        let label_part = match (smoothing == 0.0, z_loss == 0.0) {
            (true, _) => Some(Cotangents { label_logits: Some(&negative), ..Cotangents::default() }),
            (_, true) => Some(Cotangents { loss: Some(&g), lse: Some(&negative), ..Cotangents::default() }),
            // Float32 cotangents do not single it out exactly.
            _ => None,
        };
        for (cotangents, of_hidden, of_unembedding) in [
            (Some(lse_part), Stage::DHiddenLse, Stage::DUnembeddingLse),
            (label_part, Stage::DHiddenLabel, Stage::DUnembeddingLabel),
        ] {
            let Some(cotangents) = cotangents else { continue };
            self.kernel.backward(problem, &forward.lse, cotangents, gradients(&mut dq, &mut dk))?;
            add(of_hidden, &dq);
            add(of_unembedding, &dk);
        }
        Ok(stages)
    }

    /// Adds this microbatch's share of the step's dK to `total`, as training does it.
    fn accumulate(&self, factor: f64, total: &mut [f32]) -> Result<(), ProblemError> {
        let d_unembedding = Some(GradientMut::Accumulate(total));
        self.kernel.loss_and_grad(self.problem, &self.cotangents(factor), Gradients { d_unembedding, ..Gradients::default() })?;
        Ok(())
    }

    fn cotangents(&self, factor: f64) -> Vec<f32> {
        self.problem.weights().iter().map(|&w| (factor * self.factor * f64::from(w)) as f32).collect()
    }
}

fn gradients<'a>(dq: &'a mut [f32], dk: &'a mut [f32]) -> Gradients<'a> {
    Gradients { d_hidden: Some(GradientMut::F32(dq)), d_unembedding: Some(GradientMut::F32(dk)), ..Gradients::default() }
}

fn values(data: &[f32], stage: Stage, problem: &Problem, truth: &Truth) -> Values {
    let transposed = stage.rows_are() == RowsAre::VocabIds && problem.layout() == Layout::Dv;
    Values { values: stage.rows(|i| f64::from(data[i]), problem, transposed, truth), precision: Precision::F32 }
}
