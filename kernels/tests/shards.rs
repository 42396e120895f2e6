//! Vocab shards whose partials merge, and slices of tokens that lie side by side.

mod suite;

use fused_xent_kernels::problem::{DType, Label, Layout, Problem, ProblemError, Shape, VocabShard};
use fused_xent_kernels::shard::{Partial, TokenPartial};
use fused_xent_kernels::{Cotangents, GradientMut, Gradients};
use ndarray::{Array2, s};
use proptest::prelude::*;
use suite::*;

/// The case with the columns `start..end` of its unembedding, and where they lie.
fn shard(case: &Case, start: usize, end: usize) -> (Case, VocabShard) {
    let Shape { hidden: d, vocab, .. } = case.shape;
    let k = case.unembedding.floats();
    let at = |i: usize| match case.layout {
        Layout::Vd => k.get(start * d + i),
        Layout::Dv => k.get(i / (end - start) * vocab + start + i % (end - start)),
    };
    let unembedding = Tensor::new(k.dtype(), (0..(end - start) * d).map(|i| f64::from(at(i))));
    let shape = Shape { vocab: end - start, ..case.shape };
    (Case { unembedding, shape, ..case.clone() }, VocabShard { start, total: vocab })
}

/// A case in shards, ragged, one of them mostly or wholly padding if there is any.
fn shards(case: &Case, count: usize) -> Vec<(Case, VocabShard)> {
    let width = case.shape.vocab.div_ceil(count);
    (0..case.shape.vocab).step_by(width).map(|start| shard(case, start, (start + width).min(case.shape.vocab))).collect()
}

proptest! {
    #![proptest_config(config(64))]

    #[test]
    fn shards_merge_to_the_whole(recipe in recipes(60, 40, 600), count in 1..6usize, from_the_right: bool) {
        let case = recipe.case();
        let Shape { tokens, hidden: d, .. } = case.shape;
        for kernel in kernels() {
            let truth = Truth::of(&case, &kernel, [DType::F32; 2]);
            let shards = shards(&case, count);
            let problems: Vec<Problem> = shards.iter().map(|(c, at)| c.try_problem(Some(*at)).unwrap()).collect();
            let mut partials: Vec<Partial> = problems.iter().map(|p| kernel.partial(p)).collect();
            if from_the_right {
                partials.reverse();
            }
            let merged = partials.into_iter().reduce(|a, b| a.merge(&b).unwrap()).unwrap();
            let forward = merged.finish(&problems[0]).unwrap();
            assert_honest(&truth.judge_forward(&forward))?;

            let (mut d_hidden, mut d_unembedding) = (Array2::zeros((tokens, d)), Array2::zeros((0, d)));
            for ((case, _), problem) in shards.iter().zip(&problems) {
                let [mut dq, mut dk] = case.buffers([DType::F32; 2]);
                let gradients = Gradients { d_hidden: Some(dq.gradient()), d_unembedding: Some(dk.gradient()), ..Gradients::default() };
                kernel.backward(problem, &forward.lse, case.cotangents(), gradients).unwrap();
                d_hidden += &dq.matrix(tokens, d, Layout::Vd);
                d_unembedding.append(ndarray::Axis(0), dk.matrix(case.shape.vocab, d, case.layout).view()).unwrap();
            }
            let verdicts = [
                ("d_hidden", truth.judge_d_hidden(d_hidden.view())),
                ("d_unembedding", truth.judge_d_unembedding(d_unembedding.view())),
            ];
            assert_honest(&verdicts)?;
        }
    }

    /// (M − 1)·u is all that merging M sums adds, in any order, whatever their sizes.
    #[test]
    fn merging_is_as_accurate_as_promised(parts in prop::collection::vec((-100.0f32..100.0, 1.0f32..1e5), 1..20), order: u64) {
        let part = |&(max, sum): &(f32, f32)| TokenPartial { max, sum, ..TokenPartial::default() };
        let max = parts.iter().map(|p| p.0).fold(f32::MIN, f32::max);
        let exact: f64 = parts.iter().map(|&(m, s)| f64::from(s) * (f64::from(m) - f64::from(max)).exp()).sum();
        // As a chain, and as a tree of some shape.
        let chain = parts.iter().map(part).fold(TokenPartial::default(), TokenPartial::merge);
        let mut pool: Vec<_> = parts.iter().map(part).collect();
        let mut state = order;
        while pool.len() > 1 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let a = pool.swap_remove((state >> 33) as usize % pool.len());
            let b = pool.swap_remove((state >> 13) as usize % pool.len());
            pool.push(b.merge(a));
        }
        for merged in [chain, pool[0]] {
            prop_assert_eq!(merged.max, max);
            let allowed = (parts.len() - 1) as f64 * 2f64.powi(-24) * (1.0 + 1e-6);
            prop_assert!((f64::from(merged.sum) / exact - 1.0).abs() <= allowed, "{} for {exact}", merged.sum);
        }
    }

    /// Slices of tokens: their results lie side by side, to the last bit, and their dK adds up.
    #[test]
    fn slices_of_tokens_lie_side_by_side(recipe in recipes(80, 40, 300), at in 0.0..1.0) {
        let case = recipe.case();
        let Shape { tokens, hidden: d, vocab } = case.shape;
        let cut = (at * tokens as f64) as usize;
        for kernel in kernels() {
            let truth = Truth::of(&case, &kernel, [DType::F32; 2]);
            let whole = case.run(&kernel, [DType::F32; 2]);
            let mut d_unembedding = vec![0.0; vocab * d];
            for range in [0..cut, cut..tokens] {
                let hidden = case.hidden.matrix(tokens, d, Layout::Vd);
                let slice = |c: &Vec<f32>| c[range.clone()].to_vec();
                let part = Case {
                    hidden: Tensor::new(case.dtypes()[0], hidden.slice(s![range.clone(), ..]).iter().copied()),
                    targets: case.targets[range.clone()].to_vec(),
                    weights: case.weights.as_ref().map(slice),
                    cotangents: case.cotangents.clone().map(|c| c.as_ref().map(slice)),
                    shape: Shape { tokens: range.len(), ..case.shape },
                    ..case.clone()
                };
                let results = part.run(&kernel, [DType::F32; 2]);
                prop_assert_eq!(&results.forward.loss, &whole.forward.loss[range.clone()]);
                let (part_dq, whole_dq) = (results.d_hidden.floats(), whole.d_hidden.floats());
                let same = (0..part_dq.len()).all(|i| part_dq.get(i) == whole_dq.get(range.start * d + i));
                prop_assert!(same);
                let gradients = Gradients { d_unembedding: Some(GradientMut::Accumulate(&mut d_unembedding)), ..Gradients::default() };
                kernel.backward(&part.problem(), &results.forward.lse, part.cotangents(), gradients).unwrap();
            }
            let d_unembedding = Tensor::F32(d_unembedding).matrix(vocab, d, case.layout);
            assert_honest(&[("d_unembedding", truth.judge_d_unembedding(d_unembedding.view()))])?;
        }
    }
}

#[test]
fn a_part_without_columns_changes_nothing() {
    let part = TokenPartial { max: -3.5, sum: 17.0, logit_sum: 2.0, label_logit: -4.0 };
    let none = TokenPartial::default();
    assert_eq!(part.merge(none), part);
    assert_eq!(none.merge(part), part);
    assert_eq!(none.merge(none), none);
    let nan = TokenPartial { sum: f32::NAN, ..none };
    assert!(part.merge(nan).sum.is_nan() && nan.merge(part).sum.is_nan() && nan.merge(none).sum.is_nan());
}

#[test]
fn shards_are_no_whole() {
    let mut recipe = Recipe::plain(12, 4, 40);
    recipe.options.valid_vocab = Some(20);
    let case = recipe.case();
    let shards = shards(&case, 4);
    let problems: Vec<Problem> = shards.iter().map(|(c, at)| c.try_problem(Some(*at)).unwrap()).collect();
    assert!(problems[0].labels().contains(&Label::Elsewhere));
    for kernel in kernels() {
        let is_shard = |error| matches!(error, ProblemError::IsShard { .. });
        assert!(is_shard(kernel.forward(&problems[1]).unwrap_err()));
        assert!(is_shard(kernel.predictions(&problems[1]).unwrap_err()));
        assert!(is_shard(kernel.loss_and_grad(&problems[1], &[0.0; 12], Gradients::default()).unwrap_err()));

        let partials: Vec<Partial> = problems.iter().map(|p| kernel.partial(p)).collect();
        assert!(partials[3].tokens.iter().all(|t| *t == TokenPartial::default()), "all padding");
        let incomplete = ProblemError::PartialColumns { found: 10, expected: 20 };
        assert_eq!(partials[0].finish(&problems[0]).unwrap_err(), incomplete);
        let twice = partials[0].merge(&partials[1]).unwrap().merge(&partials[1]).unwrap();
        assert_eq!(twice.finish(&problems[0]).unwrap_err(), ProblemError::PartialColumns { found: 30, expected: 20 });
        let fewer = kernel.partial(&Recipe::plain(11, 4, 40).case().problem());
        assert!(matches!(partials[0].merge(&fewer).unwrap_err(), ProblemError::Buffer { name: "partial", .. }));
        assert!(matches!(fewer.finish(&case.problem()).unwrap_err(), ProblemError::Buffer { name: "partial", .. }));

        // A shard of padding has no gradient.
        let (mut dq, mut dk) = ([1.0; 48], [1.0; 40]);
        let gradients = Gradients {
            d_hidden: Some(GradientMut::F32(&mut dq)),
            d_unembedding: Some(GradientMut::F32(&mut dk)),
            ..Gradients::default()
        };
        kernel
            .backward(&problems[3], &[1.0; 12], Cotangents { loss: Some(&[1.0; 12]), ..Cotangents::default() }, gradients)
            .unwrap();
        assert!(dq.iter().chain(&dk).all(|&x| x == 0.0));
    }
}
