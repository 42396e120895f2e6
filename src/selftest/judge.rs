//! What a case gave, held to the float64 oracle at the floor of what its programs promise.

use super::cases::{Case, Measured};
use super::machine::Failure;
use super::programs::Results;
use super::report::Units;
use crate::diff::compare::{Context, compare, gathered};
use crate::diff::truth::Stage;
use crate::pjrt::HostTensor;
use crate::report::model::TensorReport;
use fused_xent_kernels::contract::{Contract, Precision};
use fused_xent_kernels::floor::LogitFloor;
use fused_xent_kernels::problem::{Layout, Problem};
use fused_xent_kernels::reference::{self, Cotangents};
use ndarray::{Array2, ArrayView2};

/// Every tensor of `results` judged as `xent-diff` judges a stage; where the case isolates a function, the tensor that shows it
/// alone, and its largest deviation. (Of such inputs the other tensors are made of equal values, whose roundings are equal too: the
/// floor takes roundings for independent.)
///
/// # Errors
/// If the problem is none that the oracle computes.
///
/// # Panics
/// If a result has another shape than the problem says.
pub fn judge(
    case: &Case,
    problem: &Problem,
    cotangents: &[Option<Vec<f32>>; 3],
    contract: &Contract,
    results: &Results,
) -> Result<(Vec<TensorReport>, Option<Units>), Failure> {
    let widened = |k: usize| cotangents[k].as_ref().map(|values| values.iter().map(|&x| f64::from(x)).collect());
    let cotangents = Cotangents { loss: widened(0), lse: widened(1), label_logits: widened(2) };
    let sample = case.rows(problem);
    let (forward, logits) = match &sample {
        None => {
            let forward = reference::forward(problem)?;
            let logits = LogitFloor::new(contract, problem, &forward)?;
            (forward, logits)
        }
        Some(_) => LogitFloor::with_forward(contract, problem)?,
    };
    let gradients = match &sample {
        None => reference::backward(problem, &forward.lse, &cotangents)?,
        Some(sample) => reference::backward_rows(problem, &forward.lse, &cotangents, sample)?,
    };
    let floor = contract.floor_of(&logits, problem, &forward, &cotangents, &gradients, sample.as_ref())?;
    let column = |values: &[f64]| Array2::from_shape_fn((values.len(), 1), |(n, _)| values[n]);
    let labels: Vec<Option<usize>> = problem.labels().iter().map(|label| label.column()).collect();
    let shape = problem.shape();
    let tokens = sample.as_ref().map(|sample| sample.tokens());
    let ids = sample.as_ref().map(|sample| sample.ids());
    let judged = [
        (Stage::Loss, column(&forward.loss), &floor.loss, Precision::F32, None),
        (Stage::Lse, column(&forward.lse), &floor.lse, Precision::F32, None),
        (Stage::LabelLogits, column(&forward.label_logits), &floor.label_logits, Precision::F32, None),
        (Stage::DHidden, gradients.hidden.sum(), &floor.hidden.sum, contract.d_hidden, tokens),
        (Stage::DUnembedding, gradients.unembedding.sum(), &floor.unembedding.sum, contract.d_unembedding, ids),
    ];
    let measured = case.values.measured();
    let (mut reports, mut units) = (vec![], None);
    for (stage, truth, error, precision, rows) in judged {
        if measured.is_some_and(|measured| measured.stage != stage.name()) {
            continue;
        }
        let found = find(results, stage.name());
        let of_ids = stage == Stage::DUnembedding;
        let of = if of_ids { shape.vocab } else { shape.tokens };
        let transposed = of_ids && case.layout == Layout::Dv;
        let candidate = gathered(|i| found.get(i), [of, truth.ncols()], transposed, rows);
        let tolerance = error.tolerance(truth.view(), precision);
        let context = Context { stage, precision, tolerance: &tolerance, labels: &labels, rows, of, owners: &[] };
        reports.push(TensorReport { plots: None, ..compare(&context, candidate.view(), truth.view()) });
        if let Some(measured) = &measured {
            units = Some(largest(measured, candidate.view(), truth.view()));
        }
    }
    Ok((reports, units))
}

fn find<'a>(results: &'a Results, name: &str) -> &'a HostTensor {
    let (_, tensor) = results.iter().find(|(result, _)| *result == name).expect("both kinds of program give all five");
    tensor
}

/// The largest deviation in units in the last place of the exact value in float32, of values that are no 0 and not subnormal.
fn largest(measured: &Measured, candidate: ArrayView2<f64>, truth: ArrayView2<f64>) -> Units {
    let mut units = Units { what: measured.what, largest: 0.0, at: 0.0, found: 0.0 };
    for ((row, column), &exact) in truth.indexed_iter() {
        if row < measured.from || exact.abs() < f64::from(f32::MIN_POSITIVE) {
            continue;
        }
        let found = candidate[[row, column]];
        let last_place = (exact.abs().log2().floor() - 23.0).exp2();
        let off = (found - exact).abs() / last_place;
        if off > units.largest || off.is_nan() {
            units = Units { largest: off, at: exact, found, ..units };
        }
    }
    units
}
