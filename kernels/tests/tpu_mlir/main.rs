//! The TPU kernels' emitted text once more, executed by MLIR's own tools: a second opinion.
//!
//! Nothing of the interpreter of `tests/tpu` takes part: the text is read, translated, compiled, and driven through its grid by
//! other code. Shapes are small, of a few tiles of 128 × 128. The results are held to the oracle at the floor of the contract, and
//! must be those of the interpreter, bit for bit: both sum in the same order, and take exp, log and tanh from the system.

#[path = "../suite/mod.rs"]
mod suite;

#[path = "../tpu/array.rs"]
mod array;
mod compile;
mod hlo;
#[path = "../tpu/hlo.rs"]
mod interpreter;
mod kernel;
#[path = "../tpu/machine.rs"]
mod machine;
#[path = "../tpu/parse.rs"]
mod parse;
#[path = "../tpu/planted.rs"]
mod planted;
mod program;
#[path = "../tpu/run.rs"]
mod run;
mod translate;

use fused_xent_kernels::Dlogits;
use fused_xent_kernels::problem::{DType, Label, Layout, LossOptions, Shape};
use fused_xent_kernels::tpu::{Backward, BackwardPlan, Form, Tile};
use proptest::prelude::*;
use run::Run;
use suite::*;

const TILE: Tile = Tile { tokens: 128, vocab: 128 };
const ONE_PASS: Form = Form::OnePass { at_once: 512, cores: 1 };

macro_rules! tests {
    ($($(#[$doc:meta])* $name:ident $body:block)+) => {
        $($(#[$doc])*
        #[test]
        #[ignore = "needs mlir-opt 19: `make test` runs it with FUSED_XENT_MLIR"]
        fn $name() $body)+
    };
}

#[track_caller]
fn is_right(recipe: Recipe, gradients: [DType; 2], dlogits: Dlogits, form: Form) {
    let run = Run::new(recipe.case(), gradients, dlogits);
    let results = run.both(&run.forward_program(TILE).text, &run.backward_program(BackwardPlan { tile: TILE, form }).text);
    for (name, verdict) in run.truth().judge(&run.case, &results) {
        assert!(verdict.honest(), "{name}: {verdict:?}");
    }
}

/// Of bfloat16, with ragged tails both ways.
fn ragged() -> Recipe {
    Recipe { dtypes: [DType::Bf16; 2], ..Recipe::plain(300, 16, 330) }
}

const ALL_OPTIONS: LossOptions = LossOptions {
    ignore_index: 0,
    valid_vocab: Some(200),
    logit_scale: -1.7,
    logit_softcap: Some(30.0),
    z_loss: 1e-4,
    label_smoothing: 0.05,
};

fn forms() -> impl Strategy<Value = Form> {
    let one_pass = |at_once, cores| Form::OnePass { at_once, cores };
    let two_kernels = |cores| Form::TwoKernels { cores };
    prop::sample::select(vec![one_pass(128, 2), one_pass(256, 1), one_pass(512, 2), two_kernels(1), two_kernels(2)])
}

proptest! {
    #![proptest_config(config(10))]

    #[test]
    #[ignore = "needs mlir-opt 19: `make test` runs it with FUSED_XENT_MLIR"]
    fn any_problem(recipe in recipes(300, 16, 300), narrow in any::<bool>(), dlogits in prop::sample::select(Dlogits::ALL.to_vec()), form in forms()) {
        prop_assume!(recipe.shape.tokens > 0);
        let dtypes = recipe.dtypes.map(|dtype| if dtype == DType::F16 { DType::Bf16 } else { dtype });
        is_right(Recipe { dtypes, ..recipe }, if narrow { dtypes } else { [DType::F32; 2] }, dlogits, form);
    }
}

tests! {
    one_pass {
        is_right(ragged(), [DType::F32; 2], Dlogits::Bf16, ONE_PASS);
    }

    one_pass_of_float32 {
        let recipe = Recipe { dtypes: [DType::F32; 2], layout: Layout::Dv, spread: 30.0, ..ragged() };
        is_right(recipe, [DType::F32; 2], Dlogits::F32, ONE_PASS);
    }

    two_cores {
        for layout in [Layout::Vd, Layout::Dv] {
            let recipe = Recipe { layout, weighted: true, ..ragged() };
            is_right(recipe, [DType::Bf16; 2], Dlogits::Bf16x2, Form::OnePass { at_once: 512, cores: 2 });
        }
    }

    /// Each but the first adds to what the one before left.
    chunks {
        for layout in [Layout::Vd, Layout::Dv] {
            let recipe = Recipe { layout, ..ragged() };
            is_right(recipe, [DType::Bf16; 2], Dlogits::Bf16, Form::OnePass { at_once: 128, cores: 1 });
        }
    }

    two_kernels {
        for (layout, dtypes) in [(Layout::Vd, [DType::Bf16, DType::F32]), (Layout::Dv, [DType::Bf16; 2])] {
            let recipe = Recipe { layout, dtypes, ..ragged() };
            is_right(recipe, dtypes, Dlogits::Bf16x2, Form::TwoKernels { cores: 2 });
        }
    }

    each_option {
        let base = LossOptions::default();
        for options in [
            LossOptions { logit_softcap: Some(15.0), ..base },
            LossOptions { logit_scale: 0.37, ..base },
            LossOptions { z_loss: 1e-3, ..base },
            LossOptions { label_smoothing: 0.1, ..base },
            LossOptions { valid_vocab: Some(129), ..base },
        ] {
            is_right(Recipe { options, ..ragged() }, [DType::F32; 2], Dlogits::Bf16, ONE_PASS);
        }
    }

    all_options_and_cotangents {
        let recipe = Recipe { options: ALL_OPTIONS, cotangents: [0.7, 0.2, -0.4], layout: Layout::Dv, ..ragged() };
        is_right(recipe, [DType::F32; 2], Dlogits::Bf16x2, Form::TwoKernels { cores: 1 });
        is_right(recipe, [DType::F32; 2], Dlogits::F32, ONE_PASS);
    }

    /// One of everything, and whole tiles.
    no_tails {
        is_right(Recipe::plain(1, 1, 1), [DType::F32; 2], Dlogits::F32, ONE_PASS);
        is_right(Recipe { dtypes: [DType::Bf16; 2], ..Recipe::plain(256, 8, 256) }, [DType::F32; 2], Dlogits::Bf16, ONE_PASS);
    }

    /// Into the caller's float32 dK, in the same memory.
    adding {
        let run = Run::new(ragged().case(), [DType::F32; 2], Dlogits::Bf16);
        let lse = run.forward(&run.forward_program(TILE).text).lse;
        let plan = BackwardPlan { tile: TILE, form: ONE_PASS };
        let [d_hidden, d_unembedding] = run.backward(&run.backward_program(plan).text, &lse, None);
        let before = Tensor::new(DType::F32, (0..330 * 16).map(|i| noise(7, i)));
        let run = Run { backward: Backward { accumulate: true, ..run.backward }, ..run };
        let program = run.backward_program(plan).text;
        assert!(program.contains("output_operand_alias"));
        let [again, sum] = run.backward(&program, &lse, Some(&before));
        assert_eq!(again, d_hidden);
        let (Tensor::F32(sum), Tensor::F32(before), Tensor::F32(added)) = (sum, before, d_unembedding) else { unreachable!() };
        assert!(sum.iter().zip(before.iter().zip(added)).all(|(sum, (before, added))| *sum == before + added));
    }

    /// What masked tokens and padding columns hold is never looked at.
    poison {
        let options = LossOptions { valid_vocab: Some(200), ..LossOptions::default() };
        let run = Run::new(Recipe { options, ..ragged() }.case(), [DType::F32; 2], Dlogits::Bf16);
        let programs = [run.forward_program(TILE).text, run.backward_program(BackwardPlan { tile: TILE, form: ONE_PASS }).text];
        let clean = run.both(&programs[0], &programs[1]);
        let Shape { tokens, hidden, vocab } = run.case.shape;
        let mut case = run.case.clone();
        let masked = (0..tokens).filter(|&n| run.case.problem().labels()[n] == Label::Masked);
        masked.for_each(|n| (0..hidden).for_each(|d| case.hidden.set(n * hidden + d, f32::NAN)));
        (200 * hidden..vocab * hidden).for_each(|i| case.unembedding.set(i, f32::INFINITY));
        assert_eq!(Run { case, ..run }.both(&programs[0], &programs[1]), clean);
    }

    nothing_planted_nothing_refused { planted::nothing_planted_nothing_refused(); }

    an_unmasked_tail { planted::an_unmasked_tail(); }

    logits_from_before_the_first_tile { planted::logits_from_before_the_first_tile(); }

    a_tail_of_k_that_is_not_zeroed { planted::a_tail_of_k_that_is_not_zeroed(); }

    a_missing_reset { planted::a_missing_reset(); }

    a_wrong_transform { planted::a_wrong_transform(); }

    a_transposed_product { planted::a_transposed_product(); }

    a_bfloat16_accumulator { planted::a_bfloat16_accumulator(); }

    products_of_float32_in_bfloat16 { planted::products_of_float32_in_bfloat16(); }

    what_lies_outside { planted::what_lies_outside("a block at", "a slice beyond"); }
}
