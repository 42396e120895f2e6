//! What is chosen for each chip: right at its real size, and refused with a remedy where it cannot be.

use super::run::Run;
use super::suite::*;
use fused_xent_kernels::Dlogits;
use fused_xent_kernels::problem::{DType, Layout, LossOptions, Shape};
use fused_xent_kernels::tpu::{Backward, BackwardPlan, Form, Generation, Given, Spec, Tile, TpuError};

fn spec(tokens: usize, hidden: usize, vocab: usize, dtype: DType) -> Spec {
    let shape = Shape { tokens, hidden, vocab };
    Spec { shape, layout: Layout::Vd, inputs: [dtype; 2], options: LossOptions::default() }
}

/// The tiles that a chip would be given, on a problem with ragged tails and lse ≈ 30.
fn is_right_at_its_real_size(generation: Generation, dtype: DType) {
    let recipe = Recipe { dtypes: [dtype; 2], spread: 10.0, ..Recipe::plain(1100, 192, 2700) };
    let run = Run::new(recipe.case(), [dtype; 2], Dlogits::Bf16);
    let forward = run.spec.forward(generation, None).unwrap();
    let backward = run.backward.program(generation, None).unwrap();
    let results = run.both(&forward.text, &backward.text);
    for (name, verdict) in run.truth().judge(&run.case, &results) {
        assert!(verdict.honest(), "{generation} {dtype:?} {name}: {verdict:?}");
    }
}

#[test]
fn v4() {
    is_right_at_its_real_size(Generation::V4, DType::Bf16);
}

#[test]
fn v5p() {
    is_right_at_its_real_size(Generation::V5p, DType::Bf16);
}

#[test]
fn v6e() {
    is_right_at_its_real_size(Generation::V6e, DType::Bf16);
    is_right_at_its_real_size(Generation::V6e, DType::F32);
}

/// Any bfloat16 problem has a plan on every chip, and any of float32 but for large D on v4.
#[test]
fn every_size_has_a_plan() {
    for generation in Generation::ALL {
        for (n, d, v) in [(1, 1, 1), (4096, 1024, 50304), (8192, 4096, 128_256), (32768, 2048, 151_936), (1 << 20, 8192, 1 << 18)]
        {
            for dtype in [DType::Bf16, DType::F32] {
                let spec = spec(n, d, v, dtype);
                let forward = spec.plan(generation).map(|_| ());
                let backward = Backward::plain(spec).plan(generation).map(|_| ());
                for (plan, most) in [(forward, 2048), (backward, 4096)] {
                    if generation == Generation::V4 && dtype == DType::F32 && d > most {
                        let error = plan.unwrap_err().to_string();
                        assert!(error.contains("a core of v4 has 15 MiB; D up to "), "{error}");
                    } else {
                        plan.unwrap();
                    }
                }
            }
        }
    }
}

/// Any layout, option and precision up to the largest D, on every chip but v4, which has a quarter of the VMEM.
#[test]
fn every_option_has_a_plan() {
    let options = LossOptions { logit_softcap: Some(30.0), label_smoothing: 0.1, z_loss: 1e-4, ..LossOptions::default() };
    for generation in Generation::ALL.into_iter().filter(|&generation| generation != Generation::V4) {
        for (layout, dlogits) in [Layout::Vd, Layout::Dv].into_iter().flat_map(|layout| Dlogits::ALL.map(|d| (layout, d))) {
            for dtype in [DType::Bf16, DType::F32] {
                let spec = Spec { layout, options, ..spec(4096, 8192, 100_001, dtype) };
                spec.plan(generation).unwrap();
                let gradients = [DType::F32; 2];
                Backward { dlogits, gradients, accumulate: true, ..Backward::plain(spec) }.plan(generation).unwrap();
            }
        }
    }
}

/// dQ stays in VMEM where it fits, for fewer tokens at a time where it does not, and logits are made twice on the smallest.
#[test]
fn forms() {
    let form = |n, d, generation| Backward::plain(spec(n, d, 50304, DType::Bf16)).plan(generation).unwrap().form;
    assert_eq!(form(4096, 1024, Generation::V6e), Form::OnePass { at_once: 4096, cores: 1 });
    assert_eq!(form(4096, 1024, Generation::V5p), Form::OnePass { at_once: 4096, cores: 2 });
    assert!(matches!(form(65536, 2048, Generation::V5e), Form::OnePass { at_once: 1024..16384, .. }));
    assert_eq!(form(8192, 4096, Generation::V4), Form::TwoKernels { cores: 2 });
}

#[test]
fn errors() {
    let plain = spec(4096, 4096, 50304, DType::Bf16);
    let message = |error: TpuError| error.to_string();
    let forward = |spec: Spec, tile| message(spec.forward(Generation::V5p, tile).unwrap_err());
    let backward = |backward: Backward, plan| message(backward.program(Generation::V5p, plan).unwrap_err());
    let tile = |tokens, vocab| Some(Tile { tokens, vocab });
    assert_eq!(forward(spec(0, 8, 8, DType::Bf16), None), "N = 0, D = 8, V = 8: a TPU kernel needs at least one of each");
    assert_eq!(
        forward(spec(8, 8193, 8, DType::Bf16), None),
        "N = 8, D = 8193, V = 8: TPU kernels go up to N = 16777216, D = 8192 and V = 262144; split the vocabulary or the tokens"
    );
    assert_eq!(
        forward(spec(8, 8, 8, DType::F16), None),
        "hidden is float16; a TPU kernel takes bfloat16 or float32; convert it to one of them"
    );
    assert_eq!(forward(plain, tile(100, 128)), "a tile of 100 tokens by 128 vocab ids: both must be multiples of 128");
    let too_large = forward(plain, tile(2048, 4096));
    assert!(too_large.starts_with("the forward with a tile of 2048 tokens by 4096 vocab ids needs "), "{too_large}");
    assert!(too_large.ends_with(" vocab ids fits"), "{too_large}");
    let options = LossOptions { valid_vocab: Some(60000), ..LossOptions::default() };
    assert_eq!(forward(Spec { options, ..plain }, None), "valid_vocab = 60000 must be between 1 and the vocab size 50304");

    let both = Backward::plain(plain);
    let plan = |form| Some(BackwardPlan { tile: Tile { tokens: 256, vocab: 256 }, form });
    assert_eq!(
        backward(both, plan(Form::OnePass { at_once: 1000, cores: 1 })),
        "1000 tokens at a time: expected a multiple of the tile's 256, and no zero"
    );
    assert_eq!(
        backward(both, plan(Form::TwoKernels { cores: 3 })),
        "a vocabulary split over 3 cores: a device of v5p has 2; give that, or 1"
    );
    let resident = backward(both, plan(Form::OnePass { at_once: 4096, cores: 2 }));
    assert!(
        resident.starts_with("the backward, one pass over 4096 tokens at once with a tile of 256 tokens by 256"),
        "{resident}"
    );
    let none = Given { loss: false, lse: false, label_logits: false };
    assert_eq!(
        backward(Backward { cotangents: none, ..both }, None),
        "no cotangent is given, so both gradients are 0; say which of loss, lse and label_logits has one"
    );
    assert_eq!(
        backward(Backward { accumulate: true, ..both }, None),
        "d_unembedding is bfloat16; a TPU kernel takes float32 for what is added to"
    );
}
