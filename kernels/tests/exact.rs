//! What holds to the last bit, and the identities that need no reference.

mod suite;

use fused_xent_kernels::problem::{DType, Floats, Layout, LossOptions, ProblemError, Shape};
use fused_xent_kernels::{Cotangents, GradientMut, Gradients, Kernel};
use half::{bf16, f16};
use proptest::prelude::*;
use suite::*;

const F32: [DType; 2] = [DType::F32; 2];

proptest! {
    #![proptest_config(config(6))]

    #[test]
    fn any_number_of_threads_gives_the_same_bits(recipe in recipes(400, 300, 2000)) {
        let recipe = Recipe { cotangents: [1.0, 0.0, 0.0], ..recipe };
        let case = recipe.case();
        for kernel in kernels() {
            let run = || (case.run(&kernel, F32), case.run_at_once(&kernel, case.dtypes()), kernel.predictions(&case.problem()).unwrap());
            let one = on_threads(1, run);
            for threads in [2, 3, 7] {
                prop_assert_eq!(on_threads(threads, run), one.clone(), "{} threads", threads);
            }
        }
    }
}

proptest! {
    #![proptest_config(config(64))]

    /// The forward depends on no workspace; the backward's dQ neither.
    #[test]
    fn the_workspace_leaves_the_forward_alone(recipe in recipes(200, 40, 900)) {
        let case = Recipe { cotangents: [0.7, 0.0, 0.0], ..recipe }.case();
        for kernel in Kernel::available() {
            let roomy = case.run(&kernel, F32);
            for other in [case.run(&kernel.clone().with_workspace(TINY), F32), case.run_at_once(&kernel, F32)] {
                prop_assert_eq!(&roomy.forward, &other.forward);
                prop_assert_eq!(&roomy.d_hidden, &other.d_hidden);
            }
        }
    }

    /// bfloat16 and float16 outputs are the float32 ones, rounded once; adding into zeros is the same as writing.
    #[test]
    fn one_rounding(recipe in recipes(80, 40, 300)) {
        let case = recipe.case();
        for kernel in kernels() {
            let wide = case.run(&kernel, F32);
            let narrow = case.run(&kernel, case.dtypes());
            for (wide, narrow) in [(&wide.d_hidden, &narrow.d_hidden), (&wide.d_unembedding, &narrow.d_unembedding)] {
                let Tensor::F32(wide) = wide else { unreachable!() };
                let rounded = match narrow {
                    Tensor::Bf16(_) => Tensor::Bf16(wide.iter().map(|&x| bf16::from_f32(x)).collect()),
                    Tensor::F16(_) => Tensor::F16(wide.iter().map(|&x| f16::from_f32(x)).collect()),
                    Tensor::F32(_) => Tensor::F32(wide.clone()),
                };
                prop_assert_eq!(&rounded, narrow);
            }
            let [mut d_hidden, mut d_unembedding] = [wide.d_hidden.floats(), wide.d_unembedding.floats()].map(|f| vec![0.0; f.len()]);
            let gradients = Gradients {
                d_hidden: Some(GradientMut::Accumulate(&mut d_hidden)),
                d_unembedding: Some(GradientMut::Accumulate(&mut d_unembedding)),
                ..Gradients::default()
            };
            kernel.backward(&case.problem(), &wide.forward.lse, case.cotangents(), gradients).unwrap();
            prop_assert_eq!(&Tensor::F32(d_hidden.clone()), &wide.d_hidden);
            let twice: Vec<f32> = d_hidden.iter().map(|x| 2.0 * x).collect();
            let gradients = Gradients { d_hidden: Some(GradientMut::Accumulate(&mut d_hidden)), ..Gradients::default() };
            kernel.backward(&case.problem(), &wide.forward.lse, case.cotangents(), gradients).unwrap();
            prop_assert_eq!(d_hidden, twice);
            prop_assert_eq!(Tensor::F32(d_unembedding), wide.d_unembedding);
        }
    }

    /// What masked tokens and padding columns hold is never looked at.
    #[test]
    fn masked_rows_and_padding_columns_do_not_exist(recipe in recipes(80, 40, 300), poison in prop::sample::select(vec![f32::NAN, f32::INFINITY])) {
        let clean = recipe.case();
        let mut case = clean.clone();
        let problem = clean.problem();
        let Shape { hidden: d, vocab, .. } = case.shape;
        let masked: Vec<usize> = (0..case.shape.tokens).filter(|&n| problem.weights()[n] == 0.0).collect();
        for &n in &masked {
            (0..d).for_each(|i| case.hidden.set(n * d + i, poison));
            case.cotangents.iter_mut().flatten().for_each(|c| c[n] = poison);
        }
        for v in problem.valid_columns()..vocab {
            (0..d).for_each(|i| case.unembedding.set(if case.layout == Layout::Vd { v * d + i } else { i * vocab + v }, poison));
        }
        for kernel in kernels() {
            let results = case.run(&kernel, F32);
            prop_assert_eq!(&results, &clean.run(&kernel, F32));
            prop_assert_eq!(kernel.predictions(&case.problem()), kernel.predictions(&problem));
            let d_hidden = results.d_hidden.floats();
            for &n in &masked {
                let forward = &results.forward;
                prop_assert_eq!([forward.loss[n], forward.lse[n], forward.label_logits[n]], [0.0; 3]);
                prop_assert!((0..d).all(|i| d_hidden.get(n * d + i) == 0.0));
            }
            let d_unembedding = results.d_unembedding.matrix(vocab, d, case.layout);
            prop_assert!(d_unembedding.rows().into_iter().skip(problem.valid_columns()).flatten().all(|&x| x == 0.0));
        }
    }

    #[test]
    fn doubling_the_cotangent_doubles_the_gradients(recipe in recipes(80, 40, 300)) {
        let case = Recipe { spread: 1.0, cotangents: [0.7, 0.2, -0.4], ..recipe }.case();
        let mut doubled = case.clone();
        doubled.cotangents.iter_mut().flatten().flatten().for_each(|g| *g *= 2.0);
        for kernel in kernels() {
            let (once, twice) = (case.run(&kernel, F32), doubled.run(&kernel, F32));
            for (once, twice) in [(once.d_hidden, twice.d_hidden), (once.d_unembedding, twice.d_unembedding)] {
                let (Tensor::F32(once), Tensor::F32(twice)) = (once, twice) else { unreachable!() };
                prop_assert!(once.iter().zip(&twice).all(|(a, b)| 2.0 * a == *b));
            }
        }
    }

    /// Σ_v P = 1, Σ_v dlogits = 0 and ⟨dQ, Q⟩ = ⟨dK, K⟩, each within what the elementwise bounds add up to.
    #[test]
    fn identities(seed: u64, spread in spreads(), layout in prop::sample::select(vec![Layout::Vd, Layout::Dv])) {
        let (n, d, v) = (40, 24, 300);
        let mut case = Recipe { seed, spread, layout, ..Recipe::plain(n, d, v) }.case();
        // A feature that is 1 in K and 0 in Q leaves the logits alone, and makes dQ there the sum of a row of dlogits.
        (0..n).for_each(|n| case.hidden.set(n * d, 0.0));
        (0..v).for_each(|v| case.unembedding.set(if layout == Layout::Vd { v * d } else { v }, 1.0));
        let of_lse = Case { cotangents: [None, case.cotangents[0].clone(), None], ..case.clone() };
        for kernel in kernels() {
            for (case, row_sum) in [(&case, 0.0), (&of_lse, 1.0)] {
                let truth = Truth::of(case, &kernel, [DType::F32; 2]);
                let results = case.run(&kernel, F32);
                let (dq, dk) = (results.d_hidden.matrix(n, d, Layout::Vd), results.d_unembedding.matrix(v, d, layout));
                let (q, k) = (case.hidden.matrix(n, d, Layout::Vd), case.unembedding.matrix(v, d, layout));
                let (exact_dq, exact_dk) = (truth.gradients.hidden.sum(), truth.gradients.unembedding.sum());
                let dq_tolerance = truth.floor.hidden.sum.tolerance(exact_dq.view(), truth.contract.d_hidden);
                let dk_tolerance = truth.floor.unembedding.sum.tolerance(exact_dk.view(), truth.contract.d_unembedding);
                let dq_bound = |r: usize, c: usize| dq_tolerance.bound(r, c, exact_dq[[r, c]]);
                let dk_bound = |r: usize, c: usize| dk_tolerance.bound(r, c, exact_dk[[r, c]]);
                let g = |n: usize| if case.problem().weights()[n] == 0.0 { 0.0 } else { row_sum * case.cotangents.iter().flatten().map(|c| f64::from(c[n])).sum::<f64>() };
                for r in 0..n {
                    prop_assert!((dq[[r, 0]] - g(r)).abs() <= dq_bound(r, 0), "row {r}: {} for {}", dq[[r, 0]], g(r));
                }
                for c in 0..d {
                    let expected: f64 = (0..n).map(|r| g(r) * q[[r, c]]).sum();
                    let allowed: f64 = (0..v).map(|v| dk_bound(v, c)).sum();
                    prop_assert!((dk.column(c).sum() - expected).abs() <= allowed);
                }
                let allowed: f64 = dq.indexed_iter().map(|((r, c), _)| dq_bound(r, c) * q[[r, c]].abs()).sum::<f64>()
                    + dk.indexed_iter().map(|((r, c), _)| dk_bound(r, c) * k[[r, c]].abs()).sum::<f64>();
                prop_assert!(((&dq * &q).sum() - (&dk * &k).sum()).abs() <= allowed);
            }
        }
    }
}

#[test]
fn what_is_not_finite_shows_where_it_is() {
    for kernel in kernels() {
        for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let (n, d) = (20, 9);
            let clean = Recipe::plain(n, d, 400).case();
            let mut case = clean.clone();
            case.hidden.set(3 * d + 2, poison);
            let (expected, results) = (clean.run(&kernel, F32), case.run(&kernel, F32));
            for r in 0..n {
                let finite = r != 3;
                assert_eq!(results.forward.lse[r].is_finite(), finite, "{poison} {r}");
                assert_eq!(results.forward.loss[r].is_finite(), finite, "{poison} {r}");
                assert!(!finite || results.forward.lse[r] == expected.forward.lse[r]);
                assert_eq!(results.d_hidden.floats().get(r * d).is_finite(), finite, "{poison} {r}");
            }
            assert!((0..400 * d).all(|i| !results.d_unembedding.floats().get(i).is_finite()));
            assert!(!kernel.predictions(&case.problem()).unwrap().entropy[3].is_finite());

            let mut case = clean.clone();
            case.unembedding.set(17 * d, poison);
            let results = case.run(&kernel, F32);
            assert!((0..n).filter(|n| n % 8 != 5).any(|n| !results.forward.lse[n].is_finite()), "{poison}");
        }
    }
}

/// The prediction of integer logits, which are exact in float32: ties, a certain one, and an even one.
#[test]
fn predictions() {
    let (d, v) = (4, 700);
    for kernel in kernels() {
        let mut case = Recipe::plain(130, d, v).case();
        for i in 0..130 * d {
            case.hidden.set(i, ((i * 7) % 5) as f32 - 2.0);
        }
        for i in 0..v * d {
            case.unembedding.set(i, ((i * 13) % 7) as f32 - 3.0);
        }
        // All logits of token 0 are alike; one of token 1 stands out.
        (0..d).for_each(|i| case.hidden.set(i, 0.0));
        (0..d).for_each(|i| case.hidden.set(d + i, 100.0));
        (0..d).for_each(|i| case.unembedding.set(600 * d + i, 5.0));
        let problem = case.problem();
        let predictions = kernel.predictions(&problem).unwrap();
        let (q, k) = (case.hidden.matrix(130, d, Layout::Vd), case.unembedding.matrix(v, d, Layout::Vd));
        let (mut hits, mut unmasked) = (0, 0);
        for n in 0..130 {
            if problem.weights()[n] == 0.0 {
                assert_eq!((predictions.argmax[n], predictions.entropy[n]), (0, 0.0));
                continue;
            }
            let z: Vec<f64> = k.outer_iter().map(|k| k.dot(&q.row(n))).collect();
            let max = z.iter().copied().fold(f64::MIN, f64::max);
            let argmax = z.iter().position(|&z| z == max).unwrap();
            let sum: f64 = z.iter().map(|z| (z - max).exp()).sum();
            let spread = z.iter().map(|z| (z - max).exp() * (z - max)).sum::<f64>() / sum;
            // A term of either sum passes exp (2 u), a product, V/16 + 4 additions and one merge a tile.
            let allowed = (v as f64 / 16.0 + 10.0) * 2f64.powi(-24) * (1.0 + 2.0 * spread.abs());
            let entropy = f64::from(predictions.entropy[n]);
            assert_eq!(predictions.argmax[n] as usize, argmax, "token {n}");
            assert!((entropy - (sum.ln() - spread)).abs() <= allowed, "token {n}: {entropy} for {}", sum.ln() - spread);
            unmasked += 1;
            hits += usize::from(case.targets[n] == argmax as i64);
        }
        assert_eq!(predictions.argmax[..2], [0, 600]);
        assert_eq!(predictions.entropy[1], 0.0);
        assert_eq!(predictions.accuracy, Some(f64::from(hits as u32) / f64::from(unmasked)));
        assert_eq!(kernel.predictions(&Recipe::plain(0, 3, 5).case().problem()).unwrap().accuracy, None);
    }
}

/// Logits below what float32 holds are −∞: columns of probability 0, a whole tile of the row's sums among them.
#[test]
fn logits_of_minus_infinity_are_columns_of_no_probability() {
    let (d, v, dead) = (2, 700, 0..300);
    let mut case = Recipe::plain(3, d, v).case();
    (0..3 * d).for_each(|i| case.hidden.set(i, 2.0));
    (0..v * d).for_each(|i| case.unembedding.set(i, if dead.contains(&(i / d)) { -3e38 } else { 0.25 }));
    case.targets = vec![350; 3];
    let alive = (v - dead.len()) as f32;
    // What V/16 + 4 additions, exp and a few roundings add up to.
    let allowed = (v as f32 / 16.0 + 10.0) * f32::EPSILON / 2.0;
    for kernel in kernels() {
        let results = case.run(&kernel, F32);
        let lse = 1.0 + alive.ln();
        assert!(results.forward.lse.iter().all(|x| (x - lse).abs() <= allowed * lse), "{:?}", results.forward.lse);
        let d_unembedding = results.d_unembedding.matrix(v, d, Layout::Vd);
        assert!(d_unembedding.rows().into_iter().take(dead.len()).flatten().all(|&x| x == 0.0));
        assert!(d_unembedding.iter().all(|x| x.is_finite()) && d_unembedding[[350, 0]] < 0.0);
        let predictions = kernel.predictions(&case.problem()).unwrap();
        assert_eq!(predictions.argmax, [300; 3]);
        assert!(predictions.entropy.iter().all(|x| (x - alive.ln()).abs() <= allowed), "{:?}", predictions.entropy);
    }
}

#[test]
fn one_column_is_certain() {
    for kernel in kernels() {
        let results = Recipe { spread: 30.0, ..Recipe::plain(9, 5, 1) }.case().run(&kernel, F32);
        assert_eq!(results.forward.loss, [0.0; 9]);
        assert_eq!(results.d_hidden, Tensor::F32(vec![0.0; 45]));
    }
}

#[test]
fn no_token_leaves_zeros_and_sums_alone() {
    let case = Recipe::plain(0, 3, 5).case();
    for kernel in kernels() {
        let results = case.run(&kernel, F32);
        assert_eq!(results.forward.loss, [0.0f32; 0]);
        assert_eq!(results.d_unembedding, Tensor::F32(vec![0.0; 15]));
        let mut sum = [1.5; 15];
        let gradients = Gradients { d_unembedding: Some(GradientMut::Accumulate(&mut sum)), ..Gradients::default() };
        kernel.loss_and_grad(&case.problem(), &[], gradients).unwrap();
        assert_eq!(sum, [1.5; 15]);
    }
}

#[test]
fn a_softcap_far_above_the_logits_is_none() {
    let plain = Recipe::plain(20, 8, 50);
    let capped = Recipe { options: LossOptions { logit_softcap: Some(1e6), ..plain.options }, ..plain };
    for kernel in kernels() {
        let (a, b) = (plain.case().run(&kernel, F32).forward, capped.case().run(&kernel, F32).forward);
        assert!(a.lse.iter().zip(&b.lse).all(|(a, b)| (a - b).abs() <= 8.0 * f32::EPSILON * a.abs()));
    }
}

#[test]
fn names_and_workspaces() {
    for kernel in Kernel::available() {
        assert_eq!(Kernel::by_name(kernel.name()).unwrap().name(), kernel.name());
        let case = Recipe::plain(200, 2, 5000).case();
        let problem = case.problem();
        let bytes = |limit: usize| kernel.clone().with_workspace(limit).workspace_bytes(&problem);
        for limit in [100 << 10, 1 << 20, 3_000_001, 128 << 20] {
            assert!(bytes(limit) <= limit, "{} of {limit}", bytes(limit));
        }
        assert!((1..=100 << 10).contains(&bytes(0)));
        let unmasked = problem.weights().iter().filter(|&&w| w != 0.0).count();
        assert!(bytes(usize::MAX) >= unmasked * 5000 * 4, "there is room for all logits");
    }
    assert!(Kernel::by_name("abacus").is_none());
    assert_eq!(Kernel::best().name(), Kernel::available()[0].name());
}

#[test]
fn buffers_that_do_not_fit_are_named() {
    let case = Recipe { dtypes: [DType::Bf16, DType::F32], ..Recipe::plain(6, 3, 5) }.case();
    let problem = case.problem();
    let kernel = Kernel::portable();
    let lse = [0.0; 6];
    let backward = |lse: &[f32], cotangents: Cotangents, gradients: Gradients| {
        kernel.backward(&problem, lse, cotangents, gradients).unwrap_err()
    };
    let name = |error: &ProblemError| match error {
        ProblemError::Buffer { name, .. } | ProblemError::GradientDType { name, .. } => *name,
        other => panic!("{other}"),
    };
    assert_eq!(name(&backward(&lse[..5], Cotangents::default(), Gradients::default())), "lse");
    let short = Cotangents { label_logits: Some(&lse[..2]), ..Cotangents::default() };
    assert_eq!(name(&backward(&lse, short, Gradients::default())), "label_logits cotangent");
    let (mut wide, mut halves) = ([0.0; 18], [f16::ZERO; 18]);
    let gradients = Gradients { d_unembedding: Some(GradientMut::F32(&mut wide)), ..Gradients::default() };
    let error = backward(&lse, Cotangents::default(), gradients);
    assert_eq!(error.to_string(), "d_unembedding has 18 elements, expected 15 (V × D)");
    let gradients = Gradients { d_hidden: Some(GradientMut::F16(&mut halves)), ..Gradients::default() };
    let error = backward(&lse, Cotangents::default(), gradients);
    assert_eq!(name(&error), "d_hidden");
    assert!(error.to_string().contains("float16") && error.to_string().contains("bfloat16"), "{error}");
    assert!(matches!(case.hidden.floats(), Floats::Bf16(_)));
}
