//! The oracle against independent truth: the definition of the loss, written plainly in float64, and its finite differences.

mod suite;

use fused_xent_kernels::problem::{Layout, LossOptions, ProblemError, Sample, Shape, VocabShard};
use fused_xent_kernels::reference::{self, Cotangents, Gradients, Parts};
use ndarray::{Array2, Axis};
use proptest::prelude::*;
use suite::*;

/// What is defined of one token that takes part.
#[derive(Clone, Copy, Debug)]
struct Token {
    loss: f64,
    lse: f64,
    label_logit: f64,
    /// Of the valid logits.
    mean: f64,
}

/// The definition, token by token, for any Q [N, D] and K [V, D]; `None` where masked.
fn define(case: &Case, q: &Array2<f64>, k: &Array2<f64>) -> Vec<Option<Token>> {
    let LossOptions { logit_scale, logit_softcap, z_loss, label_smoothing, ignore_index, .. } = case.options;
    let valid = case.options.valid_vocab.unwrap_or(case.shape.vocab);
    let token = |n: usize| {
        if case.targets[n] == ignore_index || case.weights.as_ref().is_some_and(|w| w[n] == 0.0) {
            return None;
        }
        let z: Vec<f64> = (0..valid)
            .map(|v| {
                let x = logit_scale * (0..case.shape.hidden).map(|d| q[[n, d]] * k[[v, d]]).sum::<f64>();
                logit_softcap.map_or(x, |cap| cap * (x / cap).tanh())
            })
            .collect();
        let max = z.iter().copied().fold(f64::MIN, f64::max);
        let lse = max + z.iter().map(|z| (z - max).exp()).sum::<f64>().ln();
        let (label_logit, mean) = (z[case.targets[n] as usize], z.iter().sum::<f64>() / valid as f64);
        // Cross-entropy with the smoothed target distribution: every valid column gets ε/V, the label 1 − ε on top.
        let cross_entropy: f64 = (0..valid)
            .map(|v| {
                let share =
                    label_smoothing / valid as f64 + if v as i64 == case.targets[n] { 1.0 - label_smoothing } else { 0.0 };
                share * (lse - z[v])
            })
            .sum();
        Some(Token { loss: cross_entropy + z_loss * lse.powi(2), lse, label_logit, mean })
    };
    (0..case.shape.tokens).map(token).collect()
}

/// Q [N, D] and K [V, D] in float64, whatever dtype and layout hold them.
fn widened(case: &Case) -> (Array2<f64>, Array2<f64>) {
    let Shape { tokens, hidden, vocab } = case.shape;
    (case.hidden.matrix(tokens, hidden, Layout::Vd), case.unembedding.matrix(vocab, hidden, case.layout))
}

fn largest(values: &Array2<f64>) -> f64 {
    values.iter().fold(0.0, |m, x| f64::max(m, x.abs()))
}

/// The cotangents of token `n`: of ℓ, lse and z_t.
fn at(case: &Case, n: usize) -> [f64; 3] {
    std::array::from_fn(|k| case.cotangents[k].as_ref().map_or(0.0, |c| c[n].into()))
}

/// dQ [N, D] and dK [V, D].
type Pair = (Array2<f64>, Array2<f64>);

/// dQ and dK of Σ_n objective(n, token n), by the five-point central difference.
///
/// The step moves no logit by more than 2⁻¹⁰ per point, so that the stencil's own error, step⁴/30 of a fifth derivative, is
/// near 10⁻¹³ of the gradient's size, and the cancellation in it some hundred times 2⁻⁵³ of the objective over 2⁻¹⁰.
fn differentiate(case: &Case, objective: impl Fn(usize, &Token) -> f64) -> Pair {
    let (q, k) = widened(case);
    let total = |q: &Array2<f64>, k: &Array2<f64>| -> f64 {
        define(case, q, k).iter().enumerate().filter_map(|(n, t)| Some(objective(n, t.as_ref()?))).sum()
    };
    let step = |partner: &Array2<f64>| 2f64.powi(-10) / f64::max(case.options.logit_scale.abs() * largest(partner), 1e-3);
    let differences = |of: &Array2<f64>, step: f64, total: &dyn Fn(&Array2<f64>) -> f64| {
        Array2::from_shape_fn(of.dim(), |place| {
            let moved = |steps: f64| {
                let mut moved = of.clone();
                moved[place] += steps * step;
                total(&moved)
            };
            (8.0 * (moved(1.0) - moved(-1.0)) - (moved(2.0) - moved(-2.0))) / (12.0 * step)
        })
    };
    (differences(&q, step(&k), &|q| total(q, &k)), differences(&k, step(&q), &|k| total(&q, k)))
}

/// How large the terms of dQ and of dK can be: Σ_n of the cotangents' sizes in z, times the other factor's largest element.
fn sizes(case: &Case) -> (f64, f64) {
    let (q, k) = widened(case);
    let of_logits: f64 = define(case, &q, &k)
        .iter()
        .enumerate()
        .filter_map(|(n, token)| {
            let [g, h, u] = at(case, n).map(f64::abs);
            Some(g * (2.0 + 2.0 * case.options.z_loss * token.as_ref()?.lse.abs()) + h + u)
        })
        .sum();
    let scale = case.options.logit_scale.abs();
    (of_logits * scale * largest(&k), of_logits * scale * largest(&q))
}

/// The largest deviation of `found` from `truth`, over the size of what either sums up.
fn deviation(case: &Case, found: &Pair, truth: &Pair) -> f64 {
    let of = |found: &Array2<f64>, truth: &Array2<f64>, size: f64| {
        let worst = largest(&(found - truth));
        if worst == 0.0 { 0.0 } else { worst / size }
    };
    let (hidden, unembedding) = sizes(case);
    f64::max(of(&found.0, &truth.0, hidden), of(&found.1, &truth.1, unembedding))
}

/// How far the differences may be off, over the size of what they sum up: 16 roundings of what a logit or lse can come to,
/// over the step of 2⁻¹⁰ that they are divided by, and the stencil's own error.
fn tolerance(case: &Case) -> f64 {
    16.0 * 2f64.powi(-53 + 10) * (10.0 + largest_product(case)) + 1e-11
}

/// What scale·Q·Kᵀ, and each partial sum in it, stays below.
fn largest_product(case: &Case) -> f64 {
    let (q, k) = widened(case);
    case.shape.hidden as f64 * case.options.logit_scale.abs() * largest(&q) * largest(&k)
}

fn oracle(case: &Case) -> Gradients {
    oracle_for(case, &case.reference_cotangents())
}

fn oracle_for(case: &Case, cotangents: &Cotangents) -> Gradients {
    let problem = case.problem();
    let forward = reference::forward(&problem).unwrap();
    reference::backward(&problem, &forward.lse, cotangents).unwrap()
}

fn pair(gradients: &Gradients, part: impl Fn(&Parts) -> Array2<f64>) -> Pair {
    (part(&gradients.hidden), part(&gradients.unembedding))
}

fn truth(case: &Case) -> Pair {
    differentiate(case, |n, token| {
        let [g, h, u] = at(case, n);
        g * token.loss + h * token.lse + u * token.label_logit
    })
}

/// A case in which every option has its say.
fn rich_case(seed: u64) -> Case {
    let options = LossOptions {
        valid_vocab: Some(9),
        logit_scale: 0.37,
        logit_softcap: Some(3.0),
        z_loss: 0.05,
        label_smoothing: 0.1,
        ..LossOptions::default()
    };
    Recipe { spread: 4.0, options, cotangents: [1.0, 0.2, -0.4], seed, ..Recipe::plain(6, 4, 11) }.case()
}

/// A few dozen roundings, relative to what is summed up.
const ROUNDING: f64 = 64.0 * f64::EPSILON;

/// The rows that a sample names.
fn sampled((d_hidden, d_unembedding): &Pair, sample: &Sample) -> Pair {
    (d_hidden.select(Axis(0), sample.tokens()), d_unembedding.select(Axis(0), sample.ids()))
}

fn oracle_rows(case: &Case, sample: &Sample) -> Gradients {
    let problem = case.problem();
    let lse = reference::forward(&problem).unwrap().lse;
    reference::backward_rows(&problem, &lse, &case.reference_cotangents(), sample).unwrap()
}

/// About one in `every` row.
fn draw(shape: Shape, seed: u64, every: usize) -> Sample {
    let some = |rows: usize, salt: usize| (0..rows).filter(|i| noise(seed, i + salt).abs() * 1e6 % every as f64 <= 1.0).collect();
    Sample::new(shape, some(shape.tokens, 0), some(shape.vocab, 1 << 20)).unwrap()
}

proptest! {
    #![proptest_config(config(128))]

    #[test]
    fn a_sample_is_rows_of_the_whole(recipe in recipes(30, 9, 300), every in 1..12usize, seed: u64) {
        let case = recipe.case();
        let sample = draw(case.shape, seed, every);
        let (whole, rows) = (oracle(&case), oracle_rows(&case, &sample));
        // exp makes a rounding of a logit, as an error of P, as large as the logit.
        let rounding = ROUNDING * (1.0 + largest_product(&case));
        for part in [Parts::sum, |p: &Parts| p.lse.clone(), |p: &Parts| p.label.clone()] {
            let expected = sampled(&pair(&whole, part), &sample);
            prop_assert_eq!((expected.0.dim(), expected.1.dim()), (rows.hidden.lse.dim(), rows.unembedding.lse.dim()));
            let off = deviation(&case, &pair(&rows, part), &expected);
            prop_assert!(off <= rounding, "{off}");
        }
    }

    /// The same comparison sees rows of other tokens and ids, and a label or padding that the sample forgets.
    #[test]
    fn other_rows_are_no_sample_of_the_whole(seed: u64) {
        let case = rich_case(seed);
        let (n, v) = (case.shape.tokens, case.shape.vocab);
        let sample = Sample::new(case.shape, vec![1, 2, n - 1], vec![0, 3, 8, v - 1]).unwrap();
        let expected = sampled(&pair(&oracle(&case), Parts::sum), &sample);
        let off = |sample: &Sample, part: fn(&Parts) -> Array2<f64>| {
            let found = pair(&oracle_rows(&case, sample), part);
            deviation(&case, &(found.0, expected.1.clone()), &expected).min(deviation(&case, &(expected.0.clone(), found.1), &expected))
        };
        prop_assert!(off(&sample, Parts::sum) <= ROUNDING);
        let others = Sample::new(case.shape, vec![0, 3, 4], vec![1, 4, 7, v - 2]).unwrap();
        prop_assert!(off(&others, Parts::sum) > 1e-6);
        prop_assert!(off(&sample, |p| p.lse.clone()) > 1e-6);
        prop_assert!(off(&sample, |p| p.sum() * 0.0) > 1e-6);
        let padding = oracle_rows(&case, &sample).unembedding.sum();
        prop_assert!(padding.row(3).iter().all(|x| *x == 0.0) && padding.row(2).iter().any(|x| *x != 0.0));
    }
}

#[test]
fn a_sample_is_sorted_and_within_the_problem() {
    let shape = Shape { tokens: 4, hidden: 2, vocab: 9 };
    let sample = Sample::new(shape, vec![3, 0, 3], vec![8, 8, 1]).unwrap();
    assert_eq!((sample.tokens(), sample.ids()), (&[0, 3][..], &[1, 8][..]));
    let refused = |tokens, ids| Sample::new(shape, tokens, ids).unwrap_err().to_string();
    assert_eq!(refused(vec![4, 1], vec![]), "sampled token 4: there are 4, numbered from 0; leave it out");
    assert_eq!(refused(vec![], vec![9]), "sampled vocab id 9: there are 9, numbered from 0; leave it out");

    let case = Recipe::plain(3, 2, 8).case();
    let (problem, cotangents) = (case.problem(), case.reference_cotangents());
    let of_another = reference::backward_rows(&problem, &[0.0; 3], &cotangents, &sample);
    assert_eq!(of_another.unwrap_err(), ProblemError::SampleRow { what: "token", found: 3, count: 3 });
    let none = Sample::new(case.shape, vec![], vec![]).unwrap();
    assert_eq!(oracle_rows(&case, &none), Gradients::zeros(Shape { tokens: 0, vocab: 0, ..case.shape }));
    assert_eq!(oracle_rows(&case, &Sample::all(case.shape)), oracle(&case));
}

#[test]
fn the_number_of_threads_makes_no_difference() {
    let recipe = Recipe { options: rich_case(0).options, ..Recipe::plain(70, 300, 1500) };
    let case = recipe.case();
    let sample = draw(case.shape, 5, 3);
    let run = || (reference::forward(&case.problem()).unwrap(), oracle(&case), oracle_rows(&case, &sample));
    assert_eq!(on_threads(1, run), on_threads(3, run));
}

proptest! {
    #![proptest_config(config(256))]

    /// Of few vocab ids, and of so many that they are taken in tiles.
    #[test]
    fn forward_is_the_definition(recipe in prop_oneof![recipes(6, 5, 12), recipes(6, 5, 700)]) {
        let case = recipe.case();
        let forward = reference::forward(&case.problem()).unwrap();
        let (q, k) = widened(&case);
        let largest_logit = largest_product(&case);
        for (n, token) in define(&case, &q, &k).iter().enumerate() {
            let Some(token) = token else {
                prop_assert_eq!((forward.loss[n], forward.lse[n], forward.label_logits[n]), (0.0, 0.0, 0.0));
                continue;
            };
            // The definition sums V terms one by one, of which the largest partial sum is about lse.
            let rounding = ROUNDING + case.shape.vocab as f64 * f64::EPSILON;
            let close = |a: f64, b: f64, size: f64| (a - b).abs() <= rounding * (1.0 + token.lse.abs() + size);
            prop_assert!(close(forward.lse[n], token.lse, largest_logit));
            prop_assert!(close(forward.label_logits[n], token.label_logit, largest_logit));
            let squared = case.options.z_loss * largest_logit * (largest_logit + 1.0);
            prop_assert!(close(forward.loss[n], token.loss, largest_logit + squared));
        }
    }

    /// The gradient, its part from P (the coefficient of lse held still) and its part from the label and the smoothing.
    #[test]
    fn gradients_are_the_finite_differences(recipe in recipes(6, 5, 12)) {
        let case = recipe.case();
        let gradients = oracle(&case);
        prop_assert!(deviation(&case, &pair(&gradients, Parts::sum), &truth(&case)) <= tolerance(&case));

        let LossOptions { z_loss, label_smoothing, .. } = case.options;
        let still = reference::forward(&case.problem()).unwrap().lse;
        let of_lse = differentiate(&case, |n, token| {
            let [g, h, _] = at(&case, n);
            (g * (1.0 + 2.0 * z_loss * still[n]) + h) * token.lse
        });
        prop_assert!(deviation(&case, &pair(&gradients, |p| p.lse.clone()), &of_lse) <= tolerance(&case));
        let of_label = differentiate(&case, |n, token| {
            let [g, _, u] = at(&case, n);
            (u - g * (1.0 - label_smoothing)) * token.label_logit - g * label_smoothing * token.mean
        });
        prop_assert!(deviation(&case, &pair(&gradients, |p| p.label.clone()), &of_label) <= tolerance(&case));
    }

    #[test]
    fn weighted_cotangents_are_those_of_the_weighted_loss(recipe in recipes(6, 5, 12), factor in -2.0..2.0f64) {
        // Cotangents of no effect but on the tolerance: no weight is above 2.5.
        let case = Case { cotangents: [Some(vec![2.5 * factor as f32; recipe.shape.tokens]), None, None], ..recipe.case() };
        let weights = case.weights.clone().unwrap_or_else(|| vec![1.0; case.shape.tokens]);
        let gradients = oracle_for(&case, &Cotangents::weighted(&case.problem(), factor));
        let truth = differentiate(&case, |n, token| factor * f64::from(weights[n]) * token.loss);
        prop_assert!(deviation(&case, &pair(&gradients, Parts::sum), &truth) <= tolerance(&case));
    }

    /// The same tolerance sees every option that is forgotten, and a gradient that is 0, a row off, or of one part alone.
    #[test]
    fn wrong_gradients_are_rejected(seed: u64) {
        let case = rich_case(seed);
        let truth = truth(&case);
        let right = oracle(&case);
        prop_assert!(deviation(&case, &pair(&right, Parts::sum), &truth) <= tolerance(&case));

        let rolled = |p: &Parts| {
            let sum = p.sum();
            Array2::from_shape_fn(sum.dim(), |(r, c)| sum[[(r + 1) % sum.nrows(), c]])
        };
        let mut wrong = vec![
            ("zeros", pair(&right, |p| p.sum() * 0.0)),
            ("a row shift", pair(&right, rolled)),
            ("no label term", pair(&right, |p| p.lse.clone())),
            ("no softmax term", pair(&right, |p| p.label.clone())),
            ("no factor of the scale", pair(&right, |p| p.sum() / case.options.logit_scale)),
            ("one part in a million too much", pair(&right, |p| p.sum() * (1.0 + 1e-6))),
        ];
        let still = reference::forward(&case.problem()).unwrap().lse;
        let options = case.options;
        for (name, options) in [
            ("no softcap", LossOptions { logit_softcap: None, ..options }),
            ("no z-loss", LossOptions { z_loss: 0.0, ..options }),
            ("no smoothing", LossOptions { label_smoothing: 0.0, ..options }),
            ("padding taken in", LossOptions { valid_vocab: None, ..options }),
        ] {
            let other = Case { options, ..case.clone() };
            let gradients = reference::backward(&other.problem(), &still, &case.reference_cotangents()).unwrap();
            wrong.push((name, pair(&gradients, Parts::sum)));
        }
        wrong.push(("no slope of the softcap", without_slope(&case, &still)));
        for (name, gradients) in &wrong {
            let off = deviation(&case, gradients, &truth);
            prop_assert!(off > tolerance(&case), "{name}: {off}");
        }
    }
}

/// dQ and dK of capped logits as if ∂z/∂(Q·Kᵀ) were the scale alone.
fn without_slope(case: &Case, lse: &[f64]) -> Pair {
    let problem = case.problem();
    let rows = 0..case.shape.tokens;
    let z = reference::logits(&problem, rows.clone());
    let parts = reference::dlogits(&problem, rows.clone(), lse, &case.reference_cotangents());
    let mut dlogits = parts.lse + parts.constant.expect("the case has label smoothing");
    for (n, &onehot) in parts.onehot.iter().enumerate().filter(|(n, _)| case.targets[*n] >= 0) {
        dlogits[[n, case.targets[n] as usize]] += onehot;
    }
    let flat = Array2::from_shape_fn(dlogits.dim(), |(n, v)| match v < problem.valid_columns() {
        true => dlogits[[n, v]] / reference::chain(problem.options(), z[[n, v]]) * problem.options().logit_scale,
        false => 0.0,
    });
    let Gradients { mut hidden, mut unembedding } = Gradients::zeros(case.shape);
    reference::hidden_product(&problem, rows.clone(), flat.view(), &mut hidden.lse);
    reference::unembedding_product(&problem, rows, flat.view(), &mut unembedding.lse);
    (hidden.lse, unembedding.lse)
}

#[test]
fn the_lse_part_is_the_gradient_for_a_cotangent_of_lse() {
    for seed in 0..20 {
        let case = rich_case(seed);
        let both = oracle(&case);
        let problem = case.problem();
        let lse = reference::forward(&problem).unwrap().lse;
        let p = (0..6).map(|n| case.reference_cotangents().row(&problem, n, lse[n]).p).collect();
        let alone = oracle_for(&case, &Cotangents { lse: Some(p), ..Cotangents::default() });
        assert_eq!(both.hidden.lse, alone.hidden.lse);
        assert_eq!(both.unembedding.lse, alone.unembedding.lse);
        assert_eq!(largest(&alone.hidden.label) + largest(&alone.unembedding.label), 0.0);
        assert!(largest(&alone.hidden.lse) > 0.0 && largest(&alone.unembedding.lse) > 0.0);
    }
}

#[test]
fn shards_are_refused() {
    let case = Recipe::plain(3, 2, 8).case();
    let shard = case.try_problem(Some(VocabShard { start: 2, total: 12 })).unwrap();
    let refused = ProblemError::IsShard { what: "the oracle", start: 2, end: 10 };
    assert_eq!(reference::forward(&shard).unwrap_err(), refused);
    assert_eq!(reference::backward(&shard, &[0.0; 3], &case.reference_cotangents()).unwrap_err(), refused);
    let sample = Sample::all(case.shape);
    assert_eq!(reference::backward_rows(&shard, &[0.0; 3], &case.reference_cotangents(), &sample).unwrap_err(), refused);
    let all = case.try_problem(Some(VocabShard { start: 0, total: 8 })).unwrap();
    assert_eq!(reference::forward(&all), reference::forward(&case.problem()), "a shard that is the whole is no shard");
}

#[test]
fn no_tokens_give_no_results_and_no_gradient() {
    let case = Recipe::plain(0, 3, 5).case();
    let forward = reference::forward(&case.problem()).unwrap();
    assert!(forward.loss.is_empty() && forward.lse.is_empty() && forward.label_logits.is_empty());
    assert_eq!(oracle(&case), Gradients::zeros(case.shape));
}

/// Even where the cotangents of masked tokens are NaN.
#[test]
fn masked_tokens_give_zeros() {
    let mut case = rich_case(3);
    case.targets.fill(-100);
    case.cotangents[0] = Some(vec![f32::NAN; 6]);
    let reference::Forward { loss, lse, label_logits } = reference::forward(&case.problem()).unwrap();
    assert_eq!([loss, lse, label_logits], [vec![0.0; 6], vec![0.0; 6], vec![0.0; 6]]);
    assert_eq!(oracle(&case), Gradients::zeros(case.shape));
}

#[test]
fn one_vocab_id_is_certain() {
    let case = Recipe { spread: 30.0, ..Recipe::plain(5, 3, 1) }.case();
    let forward = reference::forward(&case.problem()).unwrap();
    assert_eq!(forward.loss, [0.0; 5]);
    assert_eq!(forward.lse, forward.label_logits);
    assert!(forward.lse[0] != 0.0);
    let gradients = oracle(&case);
    assert_eq!(largest(&gradients.hidden.sum()) + largest(&gradients.unembedding.sum()), 0.0, "P is the onehot");
    assert!(largest(&gradients.hidden.lse) > 0.0);
}
