//! The floor against honest computations written plainly, and against dishonest ones.

mod suite;

use fused_xent_kernels::Forward;
use fused_xent_kernels::contract::{Contract, LabelTerm, Precision};
use fused_xent_kernels::floor::{Error, GradientError, LogitFloor};
use fused_xent_kernels::problem::{DType, Layout, LossOptions, ProblemError, Sample, Shape, VocabShard};
use fused_xent_kernels::reference::{self, Parts};
use ndarray::{Array2, Axis};
use proptest::prelude::*;
use suite::{Case, Recipe, Truth, Verdict, assert_honest, noise, recipes};

/// How a plain float32 computation rounds beyond float32.
#[derive(Clone, Copy, Debug)]
struct Plain {
    contract: Contract,
    /// Sums run in tiles of this many terms, each tile's sum added to the total.
    tile: usize,
}

impl Plain {
    fn sum(&self, terms: impl Iterator<Item = f32>) -> f32 {
        let (mut total, mut part) = (0.0f32, 0.0f32);
        for (i, t) in terms.enumerate() {
            part += t;
            if (i + 1) % self.tile == 0 {
                total += part;
                part = 0.0;
            }
        }
        total + part
    }

    fn round(precision: Precision, x: f32) -> f32 {
        precision.round(f64::from(x)) as f32
    }

    /// Per-token results; dQ [N, D] and dK [V, D].
    fn run(&self, case: &Case) -> (Forward, Array2<f64>, Array2<f64>) {
        let Shape { tokens, hidden: d, vocab } = case.shape;
        let options = &case.options;
        let valid = options.valid_vocab.unwrap_or(vocab);
        let (hidden, unembedding) = (case.hidden.floats(), case.unembedding.floats());
        let (q, k) = (|n: usize, i: usize| hidden.get(n * d + i), |v: usize, i: usize| unembedding.get(v * d + i));
        let mut dlogits = vec![0.0f32; tokens * vocab];
        let mut onehots = vec![0.0f32; tokens];
        let zeros = || vec![0.0f32; tokens];
        let mut forward = Forward { loss: zeros(), lse: zeros(), label_logits: zeros() };
        for n in 0..tokens {
            if case.targets[n] < 0 {
                continue;
            }
            let z: Vec<f32> = (0..valid)
                .map(|v| {
                    let x = self.sum((0..d).map(|i| q(n, i) * k(v, i))) * options.logit_scale as f32;
                    let z = options.logit_softcap.map_or(x, |cap| cap as f32 * (x / cap as f32).tanh());
                    Self::round(self.contract.logits, z)
                })
                .collect();
            let max = z.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let lse = max + self.sum(z.iter().map(|z| (z - max).exp())).ln();
            let (label, smoothing, z_loss) = (case.targets[n] as usize, options.label_smoothing as f32, options.z_loss as f32);
            let mean = self.sum(z.iter().copied()) / valid as f32;
            forward.loss[n] = lse - (1.0 - smoothing) * z[label] - smoothing * mean + z_loss * lse * lse;
            (forward.lse[n], forward.label_logits[n]) = (lse, z[label]);
            let g = case.cotangents[0].as_ref().unwrap()[n];
            for v in 0..valid {
                let slope =
                    options.logit_scale as f32 * options.logit_softcap.map_or(1.0, |cap| 1.0 - (z[v] / cap as f32).powi(2));
                let constant = -g * smoothing / valid as f32;
                let onehot = if v == label { -g * (1.0 - smoothing) } else { 0.0 };
                let p = g * (1.0 + 2.0 * z_loss * lse) * (z[v] - lse).exp();
                dlogits[n * vocab + v] = match self.contract.label {
                    LabelTerm::Joint => Self::round(self.contract.dlogits, (p + onehot + constant) * slope),
                    LabelTerm::Apart => Self::round(self.contract.dlogits, (p + constant) * slope),
                };
                if v == label && self.contract.label == LabelTerm::Apart {
                    onehots[n] = onehot * slope;
                }
            }
        }
        let label = |n: usize| case.targets[n].max(0) as usize;
        let d_hidden = Array2::from_shape_fn((tokens, d), |(n, i)| {
            let sum = self.sum((0..vocab).map(|v| dlogits[n * vocab + v] * k(v, i))) + onehots[n] * k(label(n), i);
            self.contract.d_hidden.round(sum.into())
        });
        let d_unembedding = Array2::from_shape_fn((vocab, d), |(v, i)| {
            let apart = self.sum((0..tokens).filter(|&n| label(n) == v).map(|n| onehots[n] * q(n, i)));
            self.contract.d_unembedding.round((self.sum((0..tokens).map(|n| dlogits[n * vocab + v] * q(n, i))) + apart).into())
        });
        (forward, d_hidden, d_unembedding)
    }
}

fn contracts() -> Vec<Contract> {
    let bf16_out = Contract { d_hidden: Precision::Bf16, d_unembedding: Precision::Bf16, ..Contract::F32 };
    vec![
        Contract::F32,
        bf16_out,
        Contract { dlogits: Precision::Bf16, ..bf16_out },
        Contract { dlogits: Precision::Bf16, label: LabelTerm::Apart, ..bf16_out },
        Contract { dlogits: Precision::Bf16, ..Contract::F32 },
        Contract { dlogits: Precision::Bf16x2, ..Contract::F32 },
        Contract { label: LabelTerm::Apart, ..Contract::F32 },
        Contract { logits: Precision::Bf16, dlogits: Precision::Bf16, ..bf16_out },
    ]
}

fn options() -> impl Strategy<Value = LossOptions> {
    let base = LossOptions::default();
    prop_oneof![
        3 => Just(base),
        1 => Just(LossOptions { logit_softcap: Some(15.0), ..base }),
        1 => Just(LossOptions { z_loss: 1e-3, label_smoothing: 0.1, ..base }),
        1 => Just(LossOptions { logit_scale: 0.37, valid_vocab: Some(50), ..base }),
    ]
}

/// A bf16 case with cotangents that are no powers of two.
fn case(shape: Shape, spread: f64, options: LossOptions, seed: u64) -> Case {
    let (layout, dtypes, cotangents) = (Layout::Vd, [DType::Bf16; 2], [0.013, 0.0, 0.0]);
    Recipe { shape, layout, dtypes, spread, options, weighted: false, cotangents, seed }.case()
}

/// A case from every corner: shape, logit size, options, contract, order of summation.
fn cases() -> impl Strategy<Value = (Case, Contract, usize)> {
    let shape = (1..40usize, 1..80usize, 64..300usize).prop_map(|(tokens, hidden, vocab)| Shape { tokens, hidden, vocab });
    let spread = prop::sample::select(vec![0.01, 1.0, 5.0, 30.0, 1000.0]);
    let tile = prop::sample::select(vec![1, 16, 100_000]);
    (shape, spread, options(), any::<u64>(), prop::sample::select(contracts()), tile)
        .prop_map(|(shape, spread, options, seed, contract, tile)| (case(shape, spread, options, seed), contract, tile))
}

fn config() -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::default() }
}

/// For each row of `values`: the floor, its limit, and the bound of the first element.
fn by_row(error: &Error, values: &Array2<f64>) -> Vec<[f64; 3]> {
    let tolerance = error.tolerance(values.view(), Precision::Bf16);
    let row = |row: usize| [tolerance.l2(row..row + 1), tolerance.limit(row..row + 1), tolerance.bound(row, 0, values[[row, 0]])];
    (0..values.nrows()).map(row).collect()
}

/// The largest relative difference.
fn furthest(a: &[[f64; 3]], b: &[[f64; 3]]) -> f64 {
    assert_eq!(a.len(), b.len());
    let relative = |(a, b): (&f64, &f64)| if a == b { 0.0 } else { (a - b).abs() / a.abs().max(b.abs()) };
    a.iter().flatten().zip(b.iter().flatten()).map(relative).fold(0.0, f64::max)
}

/// The floor of some rows of a gradient, next to that of the whole gradient there.
fn compared(rows: &[usize], sampled: (&GradientError, &Parts), whole: (&GradientError, &Parts)) -> f64 {
    let part = |sampled: (&Error, &Array2<f64>), whole: (&Error, &Array2<f64>)| {
        let of_whole = by_row(whole.0, whole.1);
        let expected: Vec<_> = rows.iter().map(|&row| of_whole[row]).collect();
        // The exact values of both are the same but for the last bit, which may tip a final rounding.
        furthest(&by_row(sampled.0, &whole.1.select(Axis(0), rows)), &expected)
    };
    let (s, w) = (sampled, whole);
    part((&s.0.lse, &s.1.lse), (&w.0.lse, &w.1.lse))
        .max(part((&s.0.label, &s.1.label), (&w.0.label, &w.1.label)))
        .max(part((&s.0.sum, &s.1.sum()), (&w.0.sum, &w.1.sum())))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: config().cases / 2, ..config() })]

    #[test]
    fn a_sample_has_the_floor_of_its_rows(recipe in recipes(40, 30, 200), contract in prop::sample::select(contracts()), seed: u64) {
        let case = recipe.case();
        let (problem, truth, cotangents) = (case.problem(), Truth::new(&case, contract), case.reference_cotangents());
        let some = |rows: usize, salt| (0..rows).filter(|i| noise(seed, i + salt) > 0.7).collect();
        let sample = Sample::new(case.shape, some(case.shape.tokens, 0), some(case.shape.vocab, 999)).unwrap();
        let rows = reference::backward_rows(&problem, &truth.forward.lse, &cotangents, &sample).unwrap();
        let logits = LogitFloor::new(&contract, &problem, &truth.forward).unwrap();
        let floor = contract.floor_of(&logits, &problem, &truth.forward, &cotangents, &rows, Some(&sample)).unwrap();
        prop_assert_eq!((&floor.loss, &floor.lse, &floor.label_logits), (&truth.floor.loss, &truth.floor.lse, &truth.floor.label_logits));
        let (whole, exact) = (&truth.floor, &truth.gradients);
        prop_assert!(compared(sample.tokens(), (&floor.hidden, &rows.hidden), (&whole.hidden, &exact.hidden)) < 1e-6);
        prop_assert!(compared(sample.ids(), (&floor.unembedding, &rows.unembedding), (&whole.unembedding, &exact.unembedding)) < 1e-6);
    }
}

/// What compares the two sees the floor of other rows, of another contract, and of a problem without its other tokens.
#[test]
fn other_rows_have_another_floor() {
    let contract = Contract { dlogits: Precision::Bf16, ..Contract::F32 };
    let case = case(Shape { tokens: 20, hidden: 9, vocab: 90 }, 5.0, LossOptions::default(), 4);
    let (problem, truth, cotangents) = (case.problem(), Truth::new(&case, contract), case.reference_cotangents());
    let floor = |contract: Contract, tokens: &[usize], ids: &[usize]| {
        let sample = Sample::new(case.shape, tokens.to_vec(), ids.to_vec()).unwrap();
        let rows = reference::backward_rows(&problem, &truth.forward.lse, &cotangents, &sample).unwrap();
        let logits = LogitFloor::new(&contract, &problem, &truth.forward).unwrap();
        let floor = contract.floor_of(&logits, &problem, &truth.forward, &cotangents, &rows, Some(&sample)).unwrap();
        let (whole, exact) = (&truth.floor, &truth.gradients);
        let hidden = compared(&[1, 4, 7], (&floor.hidden, &rows.hidden), (&whole.hidden, &exact.hidden));
        let unembedding =
            compared(&[0, 4, 80], (&floor.unembedding, &rows.unembedding), (&whole.unembedding, &exact.unembedding));
        [hidden, unembedding]
    };
    assert!(floor(contract, &[1, 4, 7], &[0, 4, 80]).into_iter().all(|off| off < 1e-6));
    assert!(floor(contract, &[2, 6, 8], &[1, 3, 81]).into_iter().all(|off| off > 1e-3));
    assert!(floor(Contract::F32, &[1, 4, 7], &[0, 4, 80]).into_iter().all(|off| off > 1e-3));
}

#[test]
fn floors_of_shards_and_of_rows_that_do_not_exist_are_refused() {
    let case = Recipe::plain(3, 2, 8).case();
    let (problem, truth, cotangents) = (case.problem(), Truth::new(&case, Contract::F32), case.reference_cotangents());
    let shard = case.try_problem(Some(VocabShard { start: 2, total: 12 })).unwrap();
    let refused = ProblemError::IsShard { what: "the floor", start: 2, end: 10 };
    assert_eq!(LogitFloor::new(&Contract::F32, &shard, &truth.forward).unwrap_err(), refused);
    assert_eq!(Contract::F32.floor(&shard, &truth.forward, &cotangents, &truth.gradients).unwrap_err(), refused);
    let logits = LogitFloor::new(&Contract::F32, &problem, &truth.forward).unwrap();
    let rows = |problem, sample: &Sample| {
        Contract::F32.floor_of(&logits, problem, &truth.forward, &cotangents, &truth.gradients, Some(sample)).map(|_| ())
    };
    assert_eq!(rows(&shard, &Sample::all(case.shape)).unwrap_err(), refused);
    let larger = Sample::all(Shape { vocab: 9, ..case.shape });
    assert_eq!(rows(&problem, &larger).unwrap_err(), ProblemError::SampleRow { what: "vocab id", found: 8, count: 8 });
    assert!(logits.is_of(&Contract { dlogits: Precision::Bf16, ..Contract::F32 }), "the logits are the same");
    assert!(!logits.is_of(&Contract { logits: Precision::Bf16, ..Contract::F32 }));
}

/// The roundings of two microbatches with the same tokens are the same: their effect adds up, and does not average out.
#[test]
fn roundings_of_one_direction_add_up_over_a_sum() {
    let contract = Contract { dlogits: Precision::Bf16, ..Contract::F32 };
    let shape = Shape { tokens: 40, hidden: 16, vocab: 90 };
    let case = case(shape, 5.0, LossOptions::default(), 4);
    let (truth, rows) = (Truth::new(&case, contract), 0..shape.vocab);
    let sum = truth.gradients.unembedding.sum();
    let floor = |error: &Error, reference: &Array2<f64>| error.tolerance(reference.view(), Precision::F32).l2(rows.clone());
    let (one, other) = (&truth.floor.unembedding.sum, &truth.floor.unembedding.lse);
    let twice = |error: &Error, factor: f64| {
        let (mut sum, mut second) = (error.clone(), error.clone());
        second.scale(factor);
        sum.add(&second);
        sum
    };
    let ratio = floor(&twice(one, 1.0), &(&sum * 2.0)) / floor(one, &sum);
    assert!((1.8..=2.0).contains(&ratio), "{ratio}");
    // What cancels leaves no less than roundings of values like these.
    let ratio = floor(&twice(one, -1.0), &(&sum * 0.0)) / floor(one, &sum);
    assert!((0.7..1.45).contains(&ratio), "{ratio}");
    let ratio =
        floor(&twice(other, 1.0), &(&truth.gradients.unembedding.lse * 2.0)) / floor(other, &truth.gradients.unembedding.lse);
    assert!((1.41..1.42).contains(&ratio), "a part is never summed over microbatches: {ratio}");
    let tolerance = one.tolerance(sum.view(), Precision::F32);
    assert!(tolerance.l2_with_luck(rows.clone()) <= tolerance.l2(rows.clone()));
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn honest_computations_stay_at_the_floor((case, contract, tile) in cases()) {
        let truth = Truth::new(&case, contract);
        let (forward, d_hidden, d_unembedding) = Plain { contract, tile }.run(&case);
        assert_honest(&truth.judge_forward(&forward))?;
        assert_honest(&[
            ("d_hidden", truth.judge_d_hidden(d_hidden.view())),
            ("d_unembedding", truth.judge_d_unembedding(d_unembedding.view())),
        ])?;
    }

    /// A gradient that is 0, a row off, a factor off, of the wrong sign or without its label term is not honest.
    #[test]
    fn dishonest_gradients_are_rejected(seed: u64, spread in prop::sample::select(vec![0.01, 1.0, 5.0]), contract in 0..3usize) {
        let contract = contracts()[contract];
        let case = case(Shape { tokens: 96, hidden: 48, vocab: 130 }, spread, LossOptions::default(), seed);
        let truth = Truth::new(&case, contract);
        for (error, parts, output) in [
            (&truth.floor.hidden.sum, &truth.gradients.hidden, contract.d_hidden),
            (&truth.floor.unembedding.sum, &truth.gradients.unembedding, contract.d_unembedding),
        ] {
            let sum = parts.sum();
            let rolled = Array2::from_shape_fn(sum.dim(), |(r, c)| sum[[(r + 1) % sum.nrows(), c]]);
            for wrong in [&sum * 0.0, rolled, &sum * 1.01, &sum * -1.0, parts.lse.clone()] {
                let wrong = wrong.mapv(|x| output.round(x));
                let verdict = Verdict::new(error, output, wrong.view(), sum.view());
                prop_assert!(!verdict.honest(), "{verdict:?}");
            }
        }
    }
}
