//! Every kernel against the oracle, judged by the floor of the contract that it declares.

mod suite;

use fused_xent_kernels::contract::Precision;
use fused_xent_kernels::floor::Error;
use fused_xent_kernels::problem::{DType, LossOptions, Shape};
use fused_xent_kernels::{GradientMut, Gradients};
use half::bf16;
use ndarray::Array2;
use proptest::prelude::*;
use suite::*;

proptest! {
    #![proptest_config(config(400))]

    #[test]
    fn results_are_at_the_floor(recipe in recipes(100, 70, 700), narrow: bool) {
        let case = recipe.case();
        let dtypes = if narrow { case.dtypes() } else { [DType::F32; 2] };
        // The largest logits here have gradients beyond what float16 holds.
        let overflows = |dtype| dtype == DType::F16 && recipe.spread > 100.0;
        let dtypes = dtypes.map(|dtype| if overflows(dtype) { DType::F32 } else { dtype });
        for kernel in kernels() {
            let truth = Truth::of(&case, &kernel, dtypes);
            assert_honest(&truth.judge(&case, &case.run(&kernel, dtypes)))?;
            if let [Some(_), None, None] = case.cotangents {
                assert_honest(&truth.judge(&case, &case.run_at_once(&kernel, dtypes)))?;
            }
        }
    }
}

fn equal_cotangents(recipe: Recipe, g: f32) -> Result<(), TestCaseError> {
    let mut case = Recipe { dtypes: [DType::Bf16; 2], spread: 1e-3, cotangents: [1.0, 0.0, 0.0], ..recipe }.case();
    case.cotangents[0] = Some(vec![g; recipe.shape.tokens]);
    for kernel in kernels() {
        for dtype in [DType::Bf16, DType::F32] {
            let truth = Truth::of(&case, &kernel, [dtype; 2]);
            assert_honest(&truth.judge(&case, &case.run_at_once(&kernel, [dtype; 2])))?;
        }
    }
    Ok(())
}

/// A dK of two numbers that lie next to a bfloat16: the rounding of dlogits before turns one half a step away from it.
#[test]
fn a_number_that_is_nearly_bfloat16_is_at_the_floor() {
    equal_cotangents(Recipe { seed: 6439627113234607884, ..Recipe::plain(1, 1, 2) }, 1.0 / 3.0).unwrap();
}

proptest! {
    #![proptest_config(config(12))]

    /// Shapes beyond one tile of the products and one block of their sums.
    #[test]
    fn large_results_are_at_the_floor(recipe in recipes(500, 400, 3000)) {
        let case = recipe.case();
        for kernel in kernels() {
            let truth = Truth::of(&case, &kernel, [DType::F32; 2]);
            assert_honest(&truth.judge(&case, &case.run(&kernel, [DType::F32; 2])))?;
        }
    }

    /// dK summed over microbatches in one accumulator, each of its own number of tokens.
    #[test]
    fn microbatches_add_up(recipe in recipes(90, 40, 400)) {
        let vocab = recipe.shape.vocab * recipe.shape.hidden;
        for kernel in kernels() {
            let mut sum = vec![0.0; vocab];
            let (mut total, mut error): (Option<Array2<f64>>, Option<Error>) = (None, None);
            for m in 0..3 {
                // Another seed would be another K: only the tokens differ.
                let tokens = (recipe.shape.tokens + 31 * m) % 100;
                let other = Recipe { shape: Shape { tokens, ..recipe.shape }, seed: recipe.seed ^ m as u64, ..recipe }.case();
                let case = Case { unembedding: recipe.case().unembedding, ..other };
                let truth = Truth::of(&case, &kernel, [DType::F32; 2]);
                let problem = case.problem();
                let forward = kernel.forward(&problem).unwrap();
                let gradients = Gradients { d_unembedding: Some(GradientMut::Accumulate(&mut sum)), ..Gradients::default() };
                kernel.backward(&problem, &forward.lse, case.cotangents(), gradients).unwrap();
                let (dk, floor) = (truth.gradients.unembedding.sum(), truth.floor.unembedding.sum);
                total = Some(total.map_or(dk.clone(), |t| t + &dk));
                match &mut error {
                    None => error = Some(floor),
                    Some(error) => error.add(&floor),
                }
            }
            let (total, error) = (total.unwrap(), error.unwrap());
            let candidate = Tensor::F32(sum).matrix(recipe.shape.vocab, recipe.shape.hidden, recipe.layout);
            let verdict = Verdict::new(&error, Precision::F32, candidate.view(), total.view());
            assert_honest(&[("d_unembedding", verdict)])?;
        }
    }

    /// Where all tokens have the same cotangent and P is next to nothing, all dlogits at labels have the same rounding.
    #[test]
    fn equal_cotangents_are_at_the_floor(recipe in recipes(100, 70, 700), g in prop::sample::select(vec![1.0 / 3.0, 1e-3, 0.7])) {
        equal_cotangents(recipe, g)?;
    }

    /// The comparison that all of this rests on refuses what is wrong.
    #[test]
    fn wrong_gradients_are_refused(seed: u64, narrow: bool, smoothing: bool) {
        let dtype = if narrow { DType::Bf16 } else { DType::F32 };
        let options = LossOptions { label_smoothing: if smoothing { 0.1 } else { 0.0 }, ..LossOptions::default() };
        let case = Recipe { dtypes: [dtype; 2], seed, options, ..Recipe::plain(60, 48, 300) }.case();
        for kernel in kernels() {
            let truth = Truth::of(&case, &kernel, [dtype; 2]);
            let results = case.run(&kernel, [dtype; 2]);
            assert_honest(&truth.judge(&case, &results))?;

            let refused = |mutate: &dyn Fn(Array2<f64>) -> Array2<f64>| {
                let d_hidden = mutate(results.d_hidden.matrix(60, 48, case.layout));
                let d_unembedding = mutate(results.d_unembedding.matrix(300, 48, case.layout));
                !truth.judge_d_hidden(d_hidden.view()).honest() && !truth.judge_d_unembedding(d_unembedding.view()).honest()
            };
            prop_assert!(refused(&|gradient| gradient * 0.0), "zeros");
            prop_assert!(refused(&|g| Array2::from_shape_fn(g.dim(), |(r, c)| g[[(r + 1) % g.nrows(), c]])), "a row off");
            prop_assert!(refused(&|gradient| gradient * 1.01), "a factor");

            // Without the label's term.
            let only_lse = (&truth.gradients.hidden.lse, &truth.gradients.unembedding.lse);
            prop_assert!(!truth.judge_d_hidden(only_lse.0.view()).honest());
            prop_assert!(!truth.judge_d_unembedding(only_lse.1.view()).honest());

            // With the lse rounded to bfloat16 between forward and backward. In bfloat16 dlogits, where the label's term is
            // rounded along with P, as large an error is honest.
            if truth.contract.dlogits != Precision::Bf16 {
                let lse: Vec<f32> = results.forward.lse.iter().map(|&x| bf16::from_f32(x).to_f32()).collect();
                let [mut d_hidden, mut d_unembedding] = case.buffers([dtype; 2]);
                let gradients =
                    Gradients { d_hidden: Some(d_hidden.gradient()), d_unembedding: Some(d_unembedding.gradient()), ..Gradients::default() };
                kernel.backward(&case.problem(), &lse, case.cotangents(), gradients).unwrap();
                prop_assert!(!truth.judge_d_hidden(d_hidden.matrix(60, 48, case.layout).view()).honest());
            }
        }
    }
}
