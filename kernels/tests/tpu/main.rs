//! The TPU kernels: their emitted text, executed step by step, against the oracle at the floor of their contracts.

#[path = "../suite/mod.rs"]
mod suite;

mod array;
mod hlo;
mod machine;
mod parse;
mod plans;
mod planted;
mod run;

use fused_xent_kernels::Dlogits;
use fused_xent_kernels::problem::{DType, Label, Layout, Shape};
use fused_xent_kernels::tpu::{Backward, BackwardPlan, Form, Tile};
use half::bf16;
use proptest::prelude::*;
use run::Run;
use suite::*;

/// TPUs multiply no float16.
fn no_f16(dtype: DType) -> DType {
    if dtype == DType::F16 { DType::Bf16 } else { dtype }
}

fn tiles() -> impl Strategy<Value = Tile> {
    let size = || prop::sample::select(vec![128, 256, 384]);
    (size(), size()).prop_map(|(tokens, vocab)| Tile { tokens, vocab })
}

fn forms(tile: Tile) -> impl Strategy<Value = Form> {
    let cores = prop::sample::select(vec![1, 2]);
    (0usize..=2, cores).prop_map(move |(chunk, cores)| match chunk {
        0 => Form::TwoKernels { cores },
        tiles => Form::OnePass { at_once: tiles * tile.tokens, cores },
    })
}

fn plans() -> impl Strategy<Value = BackwardPlan> {
    tiles().prop_flat_map(|tile| forms(tile).prop_map(move |form| BackwardPlan { tile, form }))
}

/// Any shape, layout, type, option, size of logits, cotangents, and any way to cut it.
fn runs() -> impl Strategy<Value = (Run, Tile, BackwardPlan)> {
    let dlogits = prop::sample::select(Dlogits::ALL.to_vec());
    (recipes(500, 140, 800), any::<bool>(), dlogits, tiles(), plans()).prop_filter_map(
        "a kernel has tokens",
        |(recipe, narrow, dlogits, tile, plan)| {
            if recipe.shape.tokens == 0 {
                return None;
            }
            let case = Recipe { dtypes: recipe.dtypes.map(no_f16), ..recipe }.case();
            let gradients = if narrow { case.dtypes() } else { [DType::F32; 2] };
            Some((Run::new(case, gradients, dlogits), tile, plan))
        },
    )
}

impl std::fmt::Debug for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.backward)
    }
}

proptest! {
    #![proptest_config(config(60))]

    #[test]
    fn kernels_are_at_the_floor((run, tile, plan) in runs()) {
        let results = run.both(&run.forward_program(tile).text, &run.backward_program(plan).text);
        assert_honest(&run.truth().judge(&run.case, &results))?;
    }
}

proptest! {
    #![proptest_config(config(12))]

    /// What masked tokens and padding columns hold is never looked at.
    #[test]
    fn masked_rows_and_padding_columns_do_not_exist((run, tile, plan) in runs(), poison in prop::sample::select(vec![f32::NAN, f32::INFINITY])) {
        let (forward, backward) = (run.forward_program(tile).text, run.backward_program(plan).text);
        let clean = run.both(&forward, &backward);
        let mut case = run.case.clone();
        let Shape { tokens, hidden, vocab } = case.shape;
        let masked: Vec<usize> = (0..tokens).filter(|&n| run.case.problem().labels()[n] == Label::Masked).collect();
        for (n, d) in masked.iter().flat_map(|n| (0..hidden).map(move |d| (n, d))) {
            case.hidden.set(n * hidden + d, poison);
        }
        for cotangents in case.cotangents.iter_mut().flatten() {
            masked.iter().for_each(|&n| cotangents[n] = poison);
        }
        for (v, d) in (run.case.options.valid_vocab.unwrap_or(vocab)..vocab).flat_map(|v| (0..hidden).map(move |d| (v, d))) {
            case.unembedding.set(if case.layout == Layout::Vd { v * hidden + d } else { d * vocab + v }, poison);
        }
        prop_assert_eq!(Run { case, ..run }.both(&forward, &backward), clean);
    }

    /// Adding into the caller's dK is adding the dK that would have been written; bfloat16 is that, rounded once.
    #[test]
    fn one_rounding((run, tile, plan) in runs(), start in -3.0f64..3.0) {
        let lse = run.forward(&run.forward_program(tile).text).lse;
        let with = |gradients, accumulate| Backward { gradients, accumulate, ..run.backward };
        let gradients = |backward: Backward, before: Option<&Tensor>| {
            let run = Run { case: run.case.clone(), spec: run.spec, backward };
            run.backward(&run.backward_program(plan).text, &lse, before)
        };
        let [d_hidden, d_unembedding] = gradients(with([DType::F32; 2], false), None);
        let narrow = gradients(with([DType::Bf16; 2], false), None);
        prop_assert_eq!(narrow, [&d_hidden, &d_unembedding].map(rounded));
        let dims = run.case.shape.vocab * run.case.shape.hidden;
        let before = Tensor::new(DType::F32, (0..dims).map(|i| start * noise(7, i)));
        let [again, sum] = gradients(with([DType::F32; 2], true), Some(&before));
        prop_assert_eq!(again, d_hidden);
        let calls = run.backward_program(plan).kernels.iter().filter(|(name, _)| *name == "fused_xent_backward").count();
        if calls <= 1 {
            prop_assert_eq!(sum, added(&before, &d_unembedding));
        }
    }
}

fn rounded(x: &Tensor) -> Tensor {
    let Tensor::F32(x) = x else { panic!("float32") };
    Tensor::Bf16(x.iter().map(|&x| bf16::from_f32(x)).collect())
}

fn added(x: &Tensor, y: &Tensor) -> Tensor {
    let (Tensor::F32(x), Tensor::F32(y)) = (x, y) else { panic!("float32") };
    Tensor::F32(x.iter().zip(y).map(|(x, y)| x + y).collect())
}

/// The planted errors, as tests.
macro_rules! finds {
    ($($error:ident),+) => { $(#[test] fn $error() { planted::$error() })+ };
}

finds!(
    nothing_planted_nothing_refused,
    an_unmasked_tail,
    logits_from_before_the_first_tile,
    a_tail_of_k_that_is_not_zeroed,
    a_missing_reset,
    a_wrong_transform,
    a_transposed_product,
    a_bfloat16_accumulator,
    products_of_float32_in_bfloat16
);

#[test]
fn what_lies_outside() {
    planted::what_lies_outside("lies outside of", "[8, 128] from [124, 0] on of [128, 128]");
}
