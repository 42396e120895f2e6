//! Checks of the whole trainer: the backward against finite differences, training itself, capture.

use crate::model::Weights;
use crate::random::Random;
use ndarray::Array2;

const VOCAB: usize = 11;
const SEQUENCE: usize = 5;
const IDS: [u32; 10] = [3, 1, 4, 1, 5, 9, 2, 6, 5, 0];

/// A scalar of the hidden states whose gradient with respect to them is `c`: Σ c·hidden.
fn functional(weights: &Weights<f64>, c: &Array2<f64>) -> f64 {
    (weights.forward(&IDS).0 * c).sum()
}

/// Per tensor but K: how far ⟨gradient, direction⟩ is from the central difference along a random direction, relatively.
fn finite_difference_errors(gradient: &Weights<f64>, weights: &Weights<f64>, c: &Array2<f64>) -> Vec<f64> {
    let mut random = Random::new(7);
    (0..weights.tensors().len())
        .filter(|&i| !std::ptr::eq(weights.tensors()[i], &weights.unembedding))
        .map(|i| {
            let direction = weights.tensors()[i].mapv(|_| random.normal());
            let at = |h: f64| {
                let mut moved = weights.clone();
                moved.tensors_mut()[i].scaled_add(h, &direction);
                functional(&moved, c)
            };
            let h = 1e-5;
            let numeric = (at(h) - at(-h)) / (2.0 * h);
            let analytic = (gradient.tensors()[i] * &direction).sum();
            (analytic - numeric).abs() / numeric.abs()
        })
        .collect()
}

#[test]
fn the_backward_is_the_derivative_of_the_forward() {
    let mut random = Random::new(3);
    let weights = Weights::<f64>::random(VOCAB, SEQUENCE, 32, &mut random);
    let c = Array2::from_shape_simple_fn((IDS.len(), 32), || random.normal());
    let mut gradient = weights.zeros_like();
    weights.backward(&weights.forward(&IDS).1, c.view(), &mut gradient);

    // A central difference with h = 1e-5 is off by about h² from truncation and 1e-16/h from rounding: 1e-10, and 1e-6 leaves
    // room for a direction along which the derivative happens to be small.
    let errors = finite_difference_errors(&gradient, &weights, &c);
    assert!(errors.iter().all(|&e| e < 1e-6), "{errors:?}");

    let zeros = finite_difference_errors(&weights.zeros_like(), &weights, &c);
    assert!(zeros.iter().all(|&e| e > 0.9), "zeros pass as a gradient: {zeros:?}");
    let mut wrong = gradient.clone();
    wrong.tensors_mut().into_iter().for_each(|t| {
        let shifted = Array2::from_shape_fn(t.dim(), |(r, c)| t[[r, (c + 1) % t.ncols()]]);
        t.assign(&shifted);
    });
    let shifted = finite_difference_errors(&wrong, &weights, &c);
    assert!(shifted.iter().all(|&e| e > 1e-2), "a shift passes as a gradient: {shifted:?}");
}

#[test]
fn attention_sees_no_future_and_no_other_sequence() {
    let weights = Weights::<f64>::random(VOCAB, SEQUENCE, 32, &mut Random::new(3));
    let hidden = weights.forward(&IDS).0;
    let mut changed_ids = IDS;
    changed_ids[3] = 8;
    let changed = weights.forward(&changed_ids).0;
    for n in 0..IDS.len() {
        let same = hidden.row(n) == changed.row(n);
        assert_eq!(same, !(3..SEQUENCE).contains(&n), "token {n}");
    }
}
