//! The step's reduction against values worked out by hand, and against differences of a plainly written step loss.

use fused_xent_kernels::problem::{Inputs, Layout, LossOptions, Problem, Shape};
use fused_xent_kernels::reduction::{Denominator, MicrobatchCounts, Microbatches, Reduction, StepReduction};
use proptest::prelude::*;

const DENOMINATORS: [Denominator; 3] = [Denominator::Valid, Denominator::Tokens, Denominator::Given(10.0)];
const OVER: [Microbatches; 3] = [Microbatches::Mean, Microbatches::Sum, Microbatches::Global];

/// Every factor of a step: what the cotangents of each microbatch are multiplied with.
fn factors(reduction: StepReduction, counts: &[MicrobatchCounts]) -> Vec<f64> {
    (0..counts.len()).map(|m| reduction.own_factor(counts, m) * reduction.step_factor(counts.len())).collect()
}

/// Four tokens of weight 2 and one token of weight 0.5; a microbatch of five tokens that are all masked comes last.
fn uneven() -> [MicrobatchCounts; 3] {
    [(4, 2.0), (1, 0.5), (5, 0.0)].map(|(tokens, weight)| MicrobatchCounts { tokens, weight })
}

#[test]
fn factors_are_those_worked_out_by_hand() {
    use {Denominator as D, Microbatches as M, Reduction as R};
    let third = 1.0 / 3.0;
    for (reduction, denominator, microbatches, expected) in [
        (R::Sum, D::Valid, M::Sum, [1.0, 1.0, 1.0]),
        (R::Sum, D::Valid, M::Global, [1.0, 1.0, 1.0]),
        (R::Sum, D::Given(10.0), M::Mean, [third, third, third]),
        (R::Mean, D::Valid, M::Sum, [0.5, 2.0, 0.0]),
        (R::Mean, D::Valid, M::Mean, [0.5 / 3.0, 2.0 / 3.0, 0.0]),
        (R::Mean, D::Valid, M::Global, [0.4, 0.4, 0.4]),
        (R::Mean, D::Tokens, M::Sum, [0.25, 1.0, 0.2]),
        (R::Mean, D::Tokens, M::Mean, [0.25 / 3.0, 1.0 / 3.0, 0.2 / 3.0]),
        (R::Mean, D::Tokens, M::Global, [0.1, 0.1, 0.1]),
        (R::Mean, D::Given(10.0), M::Sum, [0.1, 0.1, 0.1]),
        (R::Mean, D::Given(10.0), M::Mean, [0.1 / 3.0, 0.1 / 3.0, 0.1 / 3.0]),
        (R::Mean, D::Given(10.0), M::Global, [0.1, 0.1, 0.1]),
    ] {
        for cotangent in [1.0, -2.5, 1024.0] {
            let step = StepReduction { reduction, denominator, microbatches, cotangent };
            for (found, expected) in factors(step, &uneven()).into_iter().zip(expected) {
                let expected: f64 = cotangent * expected;
                assert!((found - expected).abs() <= 4.0 * f64::EPSILON * expected.abs(), "{step:?}: {found}, not {expected}");
            }
        }
    }
}

#[test]
fn the_default_is_the_mean_over_valid_tokens_and_over_microbatches() {
    let counts = [4.0, 8.0].map(|weight| MicrobatchCounts { tokens: 8, weight });
    assert_eq!(factors(StepReduction::default(), &counts), [0.125, 0.0625]);
}

#[test]
fn a_denominator_of_zero_contributes_nothing() {
    let none = [MicrobatchCounts { tokens: 0, weight: 0.0 }; 2];
    for denominator in [Denominator::Valid, Denominator::Tokens] {
        for microbatches in OVER {
            assert_eq!(factors(StepReduction { denominator, microbatches, ..StepReduction::default() }, &none), [0.0, 0.0]);
        }
    }
}

#[test]
fn counts_are_those_of_the_tokens_that_take_part() {
    let (hidden, unembedding) = ([0.0f32; 5], [0.0f32; 3]);
    let inputs = Inputs {
        hidden: hidden[..].into(),
        unembedding: unembedding[..].into(),
        layout: Layout::Vd,
        targets: [0i32, -100, 2, 1, 1][..].into(),
        token_weights: Some(&[1.0, 7.0, 0.5, 0.0, 0.25]),
        shape: Shape { tokens: 5, hidden: 1, vocab: 3 },
        shard: None,
    };
    let weighted = Problem::new(inputs, LossOptions::default()).unwrap();
    assert_eq!(MicrobatchCounts::of(&weighted), MicrobatchCounts { tokens: 5, weight: 1.75 });
    let even = Problem::new(Inputs { token_weights: None, ..inputs }, LossOptions::default()).unwrap();
    assert_eq!(MicrobatchCounts::of(&even), MicrobatchCounts { tokens: 5, weight: 4.0 });
}

/// A token's loss and weight.
type Token = (f64, f64);

/// The step's loss, as a training loop would write it.
fn step_loss(step: StepReduction, microbatches: &[Vec<Token>]) -> f64 {
    let weight = |tokens: &[Token]| tokens.iter().map(|t| t.1).sum::<f64>();
    let sum = |tokens: &[Token]| tokens.iter().map(|(loss, weight)| loss * weight).sum::<f64>();
    let over = |total: f64, tokens: &[Token]| {
        let by = match (step.reduction, step.denominator) {
            (Reduction::Sum, _) => return total,
            (_, Denominator::Valid) => weight(tokens),
            (_, Denominator::Tokens) => tokens.len() as f64,
            (_, Denominator::Given(number)) => number,
        };
        if by == 0.0 { 0.0 } else { total / by }
    };
    let own: f64 = microbatches.iter().map(|tokens| over(sum(tokens), tokens)).sum();
    step.cotangent
        * match step.microbatches {
            Microbatches::Sum => own,
            Microbatches::Mean => own / microbatches.len() as f64,
            Microbatches::Global => {
                let all = microbatches.concat();
                over(sum(&all), &all)
            }
        }
}

/// The largest difference between factor(m)·w[n] and what the step's loss changes by where ℓ[n] of microbatch m grows by 1.
///
/// The loss is linear in ℓ, so that the difference is the derivative, up to rounding of sums of at most 50.
fn disagreement(step: StepReduction, microbatches: &[Vec<Token>], factors: &[f64]) -> f64 {
    let before = step_loss(step, microbatches);
    let mut worst = 0.0f64;
    for (m, tokens) in microbatches.iter().enumerate() {
        for n in 0..tokens.len() {
            let mut moved = microbatches.to_vec();
            moved[m][n].0 += 1.0;
            worst = worst.max((step_loss(step, &moved) - before - factors[m] * tokens[n].1).abs());
        }
    }
    worst
}

fn tokens() -> impl Strategy<Value = Vec<Vec<Token>>> {
    let weight = prop::sample::select(vec![1.0, 1.0, 0.5, 2.0, 0.0]);
    prop::collection::vec(prop::collection::vec((0.0..5.0f64, weight), 0..6), 1..5)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn factors_are_the_derivatives_of_the_step_loss(microbatches in tokens(), cotangent in -2.0..2.0f64) {
        let counts: Vec<_> = microbatches
            .iter()
            .map(|tokens| MicrobatchCounts { tokens: tokens.len(), weight: tokens.iter().map(|t| t.1).sum() })
            .collect();
        for reduction in [Reduction::Sum, Reduction::Mean] {
            for (denominator, microbatch_rule) in DENOMINATORS.into_iter().flat_map(|d| OVER.map(|o| (d, o))) {
                let step = StepReduction { reduction, denominator, microbatches: microbatch_rule, cotangent };
                let off = disagreement(step, &microbatches, &factors(step, &counts));
                prop_assert!(off <= 1e-12, "{step:?}: {off}");
            }
        }
    }
}

#[test]
fn wrong_reductions_disagree() {
    let microbatches = vec![vec![(1.0, 1.0), (2.0, 0.5), (0.5, 0.0)], vec![(3.0, 2.0)]];
    let counts = [(3, 1.5), (1, 2.0)].map(|(tokens, weight)| MicrobatchCounts { tokens, weight });
    let all: Vec<_> = DENOMINATORS
        .into_iter()
        .flat_map(|d| OVER.map(|o| StepReduction { denominator: d, microbatches: o, ..StepReduction::default() }))
        .collect();
    for right in &all {
        for wrong in &all {
            let found = factors(*wrong, &counts);
            // A given number is the same for each microbatch and for all of them.
            let same = found == factors(*right, &counts);
            let off = disagreement(*right, &microbatches, &found);
            assert_eq!(off <= 1e-12, same, "{wrong:?} for {right:?}: {off}");
        }
        let twice = StepReduction { cotangent: 2.0, ..*right };
        assert!(disagreement(*right, &microbatches, &factors(twice, &counts)) > 1e-3);
    }
}
