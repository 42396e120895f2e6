//! What a filter leaves out is within the bound that it tells, and nothing else changes.

mod suite;

use fused_xent_kernels::problem::{DType, Layout, Shape};
use fused_xent_kernels::reference::{self, RowCotangent};
use fused_xent_kernels::{Filter, Gradients, Kernel};
use ndarray::{Array2, ArrayView2, Axis, s};
use proptest::prelude::*;
use suite::*;

/// As [`Case::run`], with a filter.
fn run(case: &Case, kernel: &Kernel, filter: &mut Filter) -> Results {
    let problem = case.problem();
    let forward = kernel.forward(&problem).unwrap();
    let [mut d_hidden, mut d_unembedding] = case.buffers([DType::F32; 2]);
    let gradients =
        Gradients { d_hidden: Some(d_hidden.gradient()), d_unembedding: Some(d_unembedding.gradient()), filter: Some(filter) };
    kernel.backward(&problem, &forward.lse, case.cotangents(), gradients).unwrap();
    Results { forward, d_hidden, d_unembedding }
}

/// dlogits from the definition.
struct Exact {
    /// [N, V].
    dlogits: Array2<f64>,
    /// How far float32 may be from them: some roundings of the largest logit, which exp makes an error of P, in what each of
    /// them is the difference of.
    rounding: Array2<f64>,
    /// By token what a threshold is a share of.
    largest: Vec<f64>,
}

impl Exact {
    fn new(case: &Case) -> Self {
        let problem = case.problem();
        let (rows, lse) = (0..case.shape.tokens, reference::forward(&problem).unwrap().lse);
        let cotangents = case.reference_cotangents();
        let z = reference::logits(&problem, rows.clone());
        let parts = reference::dlogits(&problem, rows.clone(), &lse, &cotangents);
        let mut dlogits = parts.lse;
        if let Some(constant) = &parts.constant {
            dlogits += constant;
        }
        let (mut rounding, mut largest) = (Array2::zeros(z.dim()), vec![0.0; rows.len()]);
        let valid = z.slice(s![.., ..problem.valid_columns()]);
        let relative = 8.0 * f64::from(f32::EPSILON) * (1.0 + valid.iter().fold(0.0, |m: f64, z| m.max(z.abs())));
        let scale = case.options.logit_scale.abs();
        for n in rows {
            let Some(label) = problem.labels()[n].column() else { continue };
            dlogits[[n, label]] += parts.onehot[n];
            let RowCotangent { p, onehot, constant } = cotangents.row(&problem, n, lse[n]);
            largest[n] = scale * p.abs().max(onehot.abs());
            let mut row = rounding.row_mut(n);
            row.assign(&z.row(n).mapv(|z| p.abs() * (z - lse[n]).exp() + constant.abs()));
            row[label] += onehot.abs();
            // Beside what float32 cannot hold.
            row.mapv_inplace(|parts| relative * scale * parts + 1e-36);
        }
        Self { dlogits, rounding, largest }
    }

    /// What is left out for sure (`sign` −1), or may be (1), where rounding decides of what is close to the limit.
    fn small(&self, threshold: f32, sign: f64) -> Array2<f64> {
        Array2::from_shape_fn(self.dlogits.dim(), |at| {
            let (x, rounding) = (self.dlogits[at].abs(), sign * self.rounding[at]);
            let limit = f64::from(threshold) * (1.0 + sign * 0.01) * self.largest[at.0];
            if x <= limit + rounding { (x + rounding).max(0.0) } else { 0.0 }
        })
    }
}

/// Every element as far from the truth as its tolerance and `lost`, by row, allow.
fn within(
    verdict: impl Fn(usize, usize) -> f64,
    candidate: ArrayView2<f64>,
    truth: ArrayView2<f64>,
    lost: impl Fn(usize) -> f64,
) -> bool {
    candidate.indexed_iter().all(|((r, c), x)| (x - truth[[r, c]]).abs() <= verdict(r, c) + lost(r))
}

proptest! {
    #![proptest_config(config(100))]

    #[test]
    fn what_is_left_out_is_within_the_bound(
        recipe in recipes(100, 70, 700),
        threshold in prop::sample::select(vec![0.0, 1e-5, 1.0 / 4096.0, 0.02, 0.7]),
    ) {
        let case = recipe.case();
        let Shape { tokens, hidden, vocab } = case.shape;
        let largest = |x: &Tensor, n| x.matrix(n, hidden, Layout::Vd).iter().fold(0.0, |m: f64, x| m.max(x.abs()));
        let (most_q, most_k) = (largest(&case.hidden, tokens), largest(&case.unembedding, vocab));
        let exact = Exact::new(&case);
        for kernel in kernels() {
            let truth = Truth::of(&case, &kernel, [DType::F32; 2]);
            let mut filter = Filter::new(threshold);
            let results = run(&case, &kernel, &mut filter);
            let (of_tokens, of_ids) = (filter.small_of_tokens(), filter.small_of_ids());
            let check = |name, candidate: Array2<f64>, exact: Array2<f64>, error: &fused_xent_kernels::floor::Error, lost: &[f32], most: f64| {
                let tolerance = error.tolerance(exact.view(), fused_xent_kernels::contract::Precision::F32);
                let bound = |r: usize, c: usize| tolerance.bound(r, c, exact[[r, c]]);
                prop_assert!(within(bound, candidate.view(), exact.view(), |r| f64::from(lost[r]) * most), "{name}, {kernel:?}");
                Ok(())
            };
            let (dq, dk) = (results.d_hidden.matrix(tokens, hidden, Layout::Vd), results.d_unembedding.matrix(vocab, hidden, case.layout));
            check("dQ", dq, truth.gradients.hidden.sum(), &truth.floor.hidden.sum, &of_tokens, most_k)?;
            check("dK", dk, truth.gradients.unembedding.sum(), &truth.floor.unembedding.sum, &of_ids, most_q)?;

            // The bound is the sum of what is small, give or take what is so close to the limit that rounding decides.
            for (axis, sums) in [(Axis(1), &of_tokens), (Axis(0), &of_ids)] {
                let (least, most) = (exact.small(threshold, -1.0).sum_axis(axis), exact.small(threshold, 1.0).sum_axis(axis));
                for ((&sum, least), most) in sums.iter().zip(least).zip(most) {
                    let sum = f64::from(sum);
                    prop_assert!(least * 0.999 <= sum && sum <= most * 1.001, "{sum} for {least} to {most}, {kernel:?}");
                }
            }
        }
    }

    /// A filter that leaves out nothing but zeros changes no bit, nor does the number of threads with one that does.
    #[test]
    fn the_rest_is_as_before(recipe in recipes(100, 40, 700)) {
        let case = recipe.case();
        for kernel in kernels() {
            for nothing in [0.0, -1.0, f32::NAN] {
                prop_assert_eq!(run(&case, &kernel, &mut Filter::new(nothing)), case.run(&kernel, [DType::F32; 2]));
            }
            let [mut one, mut three] = [Filter::new(1e-3), Filter::new(1e-3)];
            let of_one = on_threads(1, || run(&case, &kernel, &mut one));
            prop_assert_eq!(of_one, on_threads(3, || run(&case, &kernel, &mut three)));
            prop_assert_eq!(one.small_of_tokens(), three.small_of_tokens());
            prop_assert_eq!(one.computed(), three.computed());
        }
    }
}

#[test]
fn work_is_left_out_where_it_is_small() {
    let mut case = Recipe { spread: 1e-3, ..Recipe::plain(300, 64, 3000) }.case();
    case.cotangents[0] = Some(vec![0.3; 300]);
    case.targets.iter_mut().enumerate().for_each(|(n, target)| *target = (7 * n as i64) % 3000);
    for kernel in kernels() {
        let plain = case.run(&kernel, [DType::F32; 2]);
        let mut filter = Filter::new(1e-3);
        let results = run(&case, &kernel, &mut filter);
        // P is 1/3000 everywhere: what is left is the label's column, and what shares its words.
        let [dq, dk] = filter.computed();
        assert!(dq > 0.0 && dq < 0.2 && dk > 0.0 && dk < 0.2, "{kernel:?}: {dq}, {dk}");
        assert_ne!(results, plain);
        assert!(filter.small_of_tokens().iter().all(|small| (0.29..0.31).contains(small)), "g, all but the label's share of it");

        let mut all = Filter::new(1.0);
        let nothing = run(&case, &kernel, &mut all);
        assert_eq!(all.computed(), [0.0, 0.0]);
        for gradient in [nothing.d_hidden, nothing.d_unembedding] {
            let Tensor::F32(values) = gradient else { unreachable!() };
            assert!(values.iter().all(|&x| x == 0.0));
        }
    }
}
