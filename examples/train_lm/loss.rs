//! The library's fused loss as the trainer calls it, and the faults that can be put in its place.

use clap::ValueEnum;
use fused_xent::kernels::problem::{Problem, ProblemError, Shape};
use fused_xent::kernels::reduction::{Denominator, Microbatches, Reduction, StepReduction};
use fused_xent::kernels::{Cotangents, Forward, GradientMut, Gradients, Kernel};
use half::bf16;

/// A real bug, put into this trainer's backward on purpose; named on the command line as in the fault catalogue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Fault {
    /// Label gradients scatter-added into dK in bf16: the running sum is rounded at every hit
    LabelScatterBf16,
    /// Microbatches' dK added up in bf16
    DkAccumulateBf16,
    /// Every microbatch averaged over its own tokens, and then the averages averaged
    MeanOfMeans,
}

/// The step's loss: the mean over all valid tokens of all its microbatches.
pub const REDUCTION: StepReduction = StepReduction {
    reduction: Reduction::Mean,
    denominator: Denominator::Valid,
    microbatches: Microbatches::Global,
    cotangent: 1.0,
};

/// What the loss leaves of one microbatch.
pub struct LossAndGrad {
    /// ℓ, lse and z_t.
    pub forward: Forward,
    /// dQ, [N, D].
    pub d_hidden: Vec<bf16>,
    /// dK, [V, D].
    pub d_unembedding: Vec<f32>,
}

/// Loss and gradients of `problem` for the per-token cotangents `g` [N].
pub fn loss_and_grad(kernel: &Kernel, problem: &Problem, g: &[f32], fault: Option<Fault>) -> Result<LossAndGrad, ProblemError> {
    let Shape { tokens, hidden, vocab } = problem.shape();
    let mut d_hidden = vec![bf16::ZERO; tokens * hidden];
    let mut d_unembedding = vec![0.0; vocab * hidden];
    let gradients = Gradients {
        d_hidden: Some(GradientMut::Bf16(&mut d_hidden)),
        d_unembedding: Some(GradientMut::F32(&mut d_unembedding)),
        ..Gradients::default()
    };
    let forward = kernel.loss_and_grad(problem, g, gradients)?;
    if fault == Some(Fault::LabelScatterBf16) {
        let lse_part = Gradients { d_unembedding: Some(GradientMut::F32(&mut d_unembedding)), ..Gradients::default() };
        kernel.backward(problem, &forward.lse, Cotangents { lse: Some(g), ..Cotangents::default() }, lse_part)?;
        d_unembedding.iter_mut().zip(scatter_labels_bf16(problem, g)).for_each(|(d, label)| *d += label.to_f32());
    }
    Ok(LossAndGrad { forward, d_hidden, d_unembedding })
}

/// The label part of dK [V, D] as the transpose of a bf16 gather of label rows makes it: dK[t] ← bf16(dK[t] − g·Q[n]), token after token.
fn scatter_labels_bf16(problem: &Problem, g: &[f32]) -> Vec<bf16> {
    let shape = problem.shape();
    let mut label = vec![bf16::ZERO; shape.vocab * shape.hidden];
    for (n, &g) in g.iter().enumerate() {
        let Some(column) = problem.labels()[n].column() else { continue };
        let start = column * shape.hidden;
        for (d, sum) in label[start..start + shape.hidden].iter_mut().enumerate() {
            *sum = bf16::from_f32(sum.to_f32() - g * problem.hidden().get(n * shape.hidden + d));
        }
    }
    label
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;
    use fused_xent::kernels::problem::{Inputs, Layout, LossOptions};

    const N: usize = 64;
    const D: usize = 16;
    const V: usize = 40;

    /// Healthy and faulty results on random data in which token 0's label has many hits and half of the labels none.
    fn results(fault: Fault) -> [LossAndGrad; 2] {
        let mut random = Random::new(5);
        let mut bf16s = |n: usize| (0..n).map(|_| bf16::from_f64(random.normal())).collect::<Vec<_>>();
        let (hidden, unembedding) = (bf16s(N * D), bf16s(V * D));
        let targets: Vec<i32> = (0..N as i32).map(|n| if n % 2 == 0 { 7 } else { n % (V as i32 / 2) }).collect();
        let inputs = Inputs {
            hidden: (&hidden[..]).into(),
            unembedding: (&unembedding[..]).into(),
            layout: Layout::Vd,
            targets: (&targets[..]).into(),
            token_weights: None,
            shape: Shape { tokens: N, hidden: D, vocab: V },
            shard: None,
        };
        let problem = Problem::new(inputs, LossOptions::default()).unwrap();
        let g = [1.0 / 60.0; N];
        [None, Some(fault)].map(|fault| loss_and_grad(&Kernel::best(), &problem, &g, fault).unwrap())
    }

    #[test]
    fn the_bf16_scatter_harms_label_rows_only_and_busy_ones_most() {
        let [healthy, faulty] = results(Fault::LabelScatterBf16);
        assert_eq!((&healthy.forward, &healthy.d_hidden), (&faulty.forward, &faulty.d_hidden));
        let row_error = |v: usize| -> f32 {
            let row = v * D..(v + 1) * D;
            let pairs = healthy.d_unembedding[row.clone()].iter().zip(&faulty.d_unembedding[row]);
            pairs.map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt()
        };
        let busy = row_error(7);
        // Labels are odd below V / 2. Where there is none, the two may differ by the order of float32 sums, and that is no fault.
        let spared = (V / 2..V).map(row_error).fold(0.0, f32::max);
        assert!(spared < 1e-3 * busy, "rows without a label: {spared:e}, the busiest row: {busy:e}");
        for quiet in (1..V / 2).step_by(2).filter(|&v| v != 7) {
            let error = row_error(quiet);
            assert!(error > 100.0 * spared && busy > 2.0 * error, "row {quiet}: {error:e}, spared {spared:e}, busiest {busy:e}");
        }
    }

    #[test]
    fn the_other_faults_leave_the_microbatch_alone() {
        for fault in [Fault::DkAccumulateBf16, Fault::MeanOfMeans] {
            let [healthy, faulty] = results(fault);
            assert_eq!((healthy.d_unembedding, healthy.d_hidden), (faulty.d_unembedding, faulty.d_hidden), "{fault:?}");
        }
    }
}
