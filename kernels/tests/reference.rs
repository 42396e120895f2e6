//! The oracle against finite differences of itself.

mod suite;

use fused_xent_kernels::problem::{DType, Layout, LossOptions};
use fused_xent_kernels::reference;
use proptest::prelude::*;
use suite::*;

/// Σ g·ℓ + h·lse + u·z_t over the tokens that take part.
fn objective(case: &Case) -> f64 {
    let forward = reference::forward(&case.problem()).unwrap();
    let reference::Cotangents { loss, lse, label_logits } = case.reference_cotangents();
    let dot = |c: &Option<Vec<f64>>, x: &[f64]| c.as_ref().map_or(0.0, |c| c.iter().zip(x).map(|(c, x)| c * x).sum());
    dot(&loss, &forward.loss) + dot(&lse, &forward.lse) + dot(&label_logits, &forward.label_logits)
}

const STEP: f32 = 1.0 / 512.0;

/// ∂objective/∂x from four values, exact up to h⁴/480 times the fifth derivative: `set` writes x into a copy of the case.
fn derivative(case: &Case, x: f32, set: impl Fn(&mut Case, f32)) -> f64 {
    let central = |h: f32| {
        let at = |x: f32| {
            let mut case = case.clone();
            set(&mut case, x);
            objective(&case)
        };
        (at(x + h) - at(x - h)) / (2.0 * f64::from(h))
    };
    (4.0 * central(STEP / 2.0) - central(STEP)) / 3.0
}

/// A case whose inputs are multiples of 2⁻¹² below 2⁴, so that a step from them is exact.
fn on_a_grid(recipe: Recipe) -> Case {
    let mut case = Recipe { dtypes: [DType::F32; 2], ..recipe }.case();
    for tensor in [&mut case.hidden, &mut case.unembedding] {
        let Tensor::F32(values) = tensor else { unreachable!() };
        values.iter_mut().for_each(|x| *x = (*x * 4096.0).round() / 4096.0);
    }
    case
}

/// The largest difference between numeric and analytic derivatives, over what the method allows.
fn disagreement(case: &Case, part: impl Fn(&reference::Parts) -> ndarray::Array2<f64>) -> f64 {
    let problem = case.problem();
    let lse = reference::forward(&problem).unwrap().lse;
    let gradients = reference::backward(&problem, &lse, &case.reference_cotangents()).unwrap();
    let (dq, dk) = (part(&gradients.hidden), part(&gradients.unembedding));
    let largest = |x: &Tensor| (0..x.floats().len()).map(|i| f64::from(x.floats().get(i)).abs()).fold(0.0, f64::max);
    let cotangents: f64 = case.cotangents.iter().flatten().flatten().map(|&c| f64::from(c).abs()).sum();
    // The fifth derivative by one factor grows with the fifth power of the other, and of the scale; 100 stands for
    // those of ln Σ exp and tanh. Cancellation leaves 2⁻⁵³·|objective| over the step.
    let slope = case.options.logit_scale.abs() * largest(&case.hidden).max(largest(&case.unembedding));
    let truncation = 100.0 / 480.0 * f64::from(STEP).powi(4) * slope.powi(5) * cotangents;
    let allowed = truncation + 1e-12 * (objective(case).abs() + cotangents);
    let (d, v) = (case.shape.hidden, case.shape.vocab);
    let of_hidden = (0..case.hidden.floats().len()).map(|i| {
        let numeric = derivative(case, case.hidden.floats().get(i), |case, x| case.hidden.set(i, x));
        numeric - dq[[i / d, i % d]]
    });
    let of_unembedding = (0..case.unembedding.floats().len()).map(|i| {
        let numeric = derivative(case, case.unembedding.floats().get(i), |case, x| case.unembedding.set(i, x));
        numeric - if case.layout == Layout::Vd { dk[[i / d, i % d]] } else { dk[[i % v, i / v]] }
    });
    of_hidden.chain(of_unembedding).fold(0.0, |worst: f64, e| worst.max(e.abs())) / (allowed + f64::MIN_POSITIVE)
}

proptest! {
    #![proptest_config(config(128))]

    #[test]
    fn gradients_are_the_derivatives(recipe in recipes(6, 5, 12), spread in prop::sample::select(vec![0.1, 1.0, 4.0])) {
        let case = on_a_grid(Recipe { spread, ..recipe });
        let disagreement = disagreement(&case, reference::Parts::sum);
        prop_assert!(disagreement <= 1.0, "{disagreement}");
    }
}

#[test]
fn wrong_derivatives_are_found() {
    let options = LossOptions { logit_softcap: Some(5.0), z_loss: 1e-3, label_smoothing: 0.1, ..LossOptions::default() };
    let case = on_a_grid(Recipe { options, cotangents: [1.0, 0.2, -0.4], ..Recipe::plain(5, 4, 9) });
    assert!(disagreement(&case, reference::Parts::sum) <= 1.0);
    assert!(disagreement(&case, |parts| parts.lse.clone()) > 1e3);
    assert!(disagreement(&case, |parts| parts.sum() * 0.999) > 1e3);
    // A cap whose derivative is left out would be off by about this much.
    assert!(disagreement(&case, |parts| parts.sum() / (1.0 - (0.5f64 / 5.0).powi(2))) > 1e3);
}
