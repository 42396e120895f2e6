//! The door: one refusal per [`ProblemError`], to the word.

use fused_xent_kernels::problem::{DType, Inputs, Label, Layout, LossOptions, Problem, ProblemError, Shape, VocabShard};
use fused_xent_kernels::reduction::{Denominator, StepReduction};
use fused_xent_kernels::{Cotangents, GradientMut, Gradients, Kernel, reference};
use half::bf16;

const SHAPE: Shape = Shape { tokens: 3, hidden: 2, vocab: 4 };
const ZEROS: [f32; 8] = [0.0; 8];
const TARGETS: [i32; 3] = [0, -100, 3];

/// Three tokens, two features, four vocab ids.
fn inputs() -> Inputs<'static> {
    Inputs {
        hidden: ZEROS[..6].into(),
        unembedding: ZEROS[..].into(),
        layout: Layout::Vd,
        targets: TARGETS[..].into(),
        token_weights: None,
        shape: SHAPE,
        shard: None,
    }
}

fn problem(inputs: Inputs) -> Result<Problem, ProblemError> {
    Problem::new(inputs, LossOptions::default())
}

/// What `inputs` are refused with.
fn refusal(inputs: Inputs) -> String {
    problem(inputs).unwrap_err().to_string()
}

#[test]
fn good_inputs_are_taken_as_they_are() {
    let problem = problem(Inputs { token_weights: Some(&[0.5, 1.0, 2.0]), ..inputs() }).unwrap();
    assert_eq!(problem.labels(), [Label::Column(0), Label::Masked, Label::Column(3)]);
    assert_eq!(problem.weights(), [0.5, 0.0, 2.0]);
    assert_eq!((problem.vocab_ids(), problem.valid_columns(), problem.valid_total()), (0..4, 4, 4));
    assert!(problem.is_whole());
}

#[test]
fn a_masked_token_may_have_any_target() {
    for (target, weight) in [(77, 0.0), (-5, -0.0), (-100, 1.0)] {
        let (targets, weights) = ([target, 1, 2], [weight, 1.0, 1.0]);
        let inputs = Inputs { targets: targets[..].into(), token_weights: Some(&weights), ..inputs() };
        assert_eq!(problem(inputs).unwrap().labels()[0], Label::Masked);
    }
    let of_id = LossOptions { ignore_index: 3, ..LossOptions::default() };
    let targets = [0u32, 1, 3];
    let problem = Problem::new(Inputs { targets: targets[..].into(), ..inputs() }, of_id).unwrap();
    assert_eq!(problem.labels()[2], Label::Masked, "an id can be the masking one");
}

#[test]
fn labels_of_a_shard_are_its_own_columns_or_elsewhere() {
    let targets = [1i64, 6, 9];
    let shard = Some(VocabShard { start: 4, total: 10 });
    let problem = problem(Inputs { targets: targets[..].into(), shard, ..inputs() }).unwrap();
    assert_eq!(problem.labels(), [Label::Elsewhere, Label::Column(2), Label::Elsewhere]);
    assert_eq!((problem.vocab_ids(), problem.valid_columns(), problem.valid_total()), (4..8, 4, 10));
    assert!(!problem.is_whole());
}

#[test]
fn empty() {
    let shape = Shape { hidden: 0, ..SHAPE };
    let none = || ZEROS[..0].into();
    assert_eq!(
        refusal(Inputs { shape, hidden: none(), unembedding: none(), ..inputs() }),
        "hidden size D = 0 and vocab size V = 4: both must be at least 1"
    );
    let shape = Shape { vocab: 0, ..SHAPE };
    assert_eq!(
        refusal(Inputs { shape, unembedding: none(), ..inputs() }),
        "hidden size D = 2 and vocab size V = 0: both must be at least 1"
    );
}

#[test]
fn vocab() {
    let shape = Shape { vocab: u32::MAX as usize, ..SHAPE };
    assert_eq!(refusal(Inputs { shape, ..inputs() }), "vocab size V = 4294967295 is too large: at most 2³² − 2 columns");
}

#[test]
fn length() {
    for (inputs, expected) in [
        (Inputs { hidden: ZEROS[..5].into(), ..inputs() }, "hidden has 5 elements, but its shape 3 × 2 needs 6"),
        (Inputs { unembedding: ZEROS[..7].into(), ..inputs() }, "unembedding has 7 elements, but its shape 4 × 2 needs 8"),
        (Inputs { targets: TARGETS[..2].into(), ..inputs() }, "targets has 2 elements, but its shape 3 × 1 needs 3"),
        (Inputs { token_weights: Some(&ZEROS), ..inputs() }, "token_weights has 8 elements, but its shape 3 × 1 needs 3"),
        (
            Inputs { shape: Shape { tokens: usize::MAX, ..SHAPE }, ..inputs() },
            "hidden has 6 elements, but its shape 18446744073709551615 × 2 needs more than memory can hold",
        ),
    ] {
        assert_eq!(refusal(inputs), expected);
    }
}

#[test]
fn shard() {
    for (start, total, expected) in [
        (5, 8, "vocab shard [5, 5 + 4) does not lie in the whole vocabulary of 8"),
        (usize::MAX, 8, "vocab shard [18446744073709551615, 18446744073709551615 + 4) does not lie in the whole vocabulary of 8"),
    ] {
        assert_eq!(refusal(Inputs { shard: Some(VocabShard { start, total }), ..inputs() }), expected);
    }
}

#[test]
fn valid_vocab() {
    let refusal = |valid_vocab, shard| {
        let options = LossOptions { valid_vocab: Some(valid_vocab), ..LossOptions::default() };
        Problem::new(Inputs { shard, ..inputs() }, options).map(|p| p.valid_columns()).map_err(|e| e.to_string())
    };
    assert_eq!(refusal(5, None), Err("valid_vocab = 5 must be between 1 and the vocab size 4".into()));
    assert_eq!(refusal(0, None), Err("valid_vocab = 0 must be between 1 and the vocab size 4".into()));
    assert_eq!(refusal(4, None), Ok(4));
    assert_eq!(refusal(6, Some(VocabShard { start: 4, total: 8 })), Ok(2), "an id of the whole vocabulary");
    assert_eq!(refusal(4, Some(VocabShard { start: 4, total: 8 })), Ok(0), "a shard may be all padding");
}

#[test]
fn target() {
    for (target, expected) in [
        (4, "targets[1] = 4 is not in [0, 4) and not ignore_index = -100; mask the token or correct the id"),
        (-1, "targets[1] = -1 is not in [0, 4) and not ignore_index = -100; mask the token or correct the id"),
        (
            i64::MIN,
            "targets[1] = -9223372036854775808 is not in [0, 4) and not ignore_index = -100; mask the token or correct the id",
        ),
    ] {
        let targets = [0, target, 3];
        assert_eq!(refusal(Inputs { targets: targets[..].into(), ..inputs() }), expected);
    }
    let options = LossOptions { valid_vocab: Some(3), ignore_index: -1, ..LossOptions::default() };
    let targets = [0, -1, 3];
    assert_eq!(
        Problem::new(Inputs { targets: targets[..].into(), ..inputs() }, options).unwrap_err().to_string(),
        "targets[2] = 3 is not in [0, 3) and not ignore_index = -1; mask the token or correct the id",
        "padding is no label"
    );
}

#[test]
fn weight() {
    for (weight, found) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        let weights = [1.0, 1.0, weight];
        let refusal = refusal(Inputs { token_weights: Some(&weights), ..inputs() });
        assert_eq!(refusal, format!("token_weights[2] = {found} is not finite; use 0 to mask a token"));
    }
}

#[test]
fn option() {
    let base = LossOptions::default();
    for (options, expected) in [
        (LossOptions { logit_scale: 0.0, ..base }, "loss option logit_scale = 0: expected a finite number other than 0"),
        (LossOptions { logit_scale: f64::NAN, ..base }, "loss option logit_scale = NaN: expected a finite number other than 0"),
        (
            LossOptions { logit_softcap: Some(0.0), ..base },
            "loss option logit_softcap = 0: expected a finite number above 0, or none",
        ),
        (
            LossOptions { logit_softcap: Some(f64::INFINITY), ..base },
            "loss option logit_softcap = inf: expected a finite number above 0, or none",
        ),
        (LossOptions { z_loss: -1e-4, ..base }, "loss option z_loss = -0.0001: expected a finite number, 0 or above"),
        (LossOptions { label_smoothing: 1.0, ..base }, "loss option label_smoothing = 1: expected a number in [0, 1)"),
        (LossOptions { label_smoothing: f64::NAN, ..base }, "loss option label_smoothing = NaN: expected a number in [0, 1)"),
    ] {
        assert_eq!(options.validate().unwrap_err().to_string(), expected);
        assert_eq!(Problem::new(inputs(), options).unwrap_err().to_string(), expected);
    }
    assert_eq!(base.validate(), Ok(()));

    let step = StepReduction::default();
    assert_eq!(step.validate(), Ok(()));
    for (reduction, expected) in [
        (StepReduction { cotangent: f64::INFINITY, ..step }, "loss option cotangent = inf: expected a finite number"),
        (
            StepReduction { denominator: Denominator::Given(0.0), ..step },
            "loss option denominator = 0: expected \"valid\", \"tokens\" or a number above 0",
        ),
        (
            StepReduction { denominator: Denominator::Given(f64::NAN), ..step },
            "loss option denominator = NaN: expected \"valid\", \"tokens\" or a number above 0",
        ),
    ] {
        assert_eq!(reduction.validate().unwrap_err().to_string(), expected);
    }
}

#[test]
fn buffer() {
    let problem = problem(inputs()).unwrap();
    let short = Gradients { d_hidden: Some(GradientMut::F32(&mut [0.0; 5])), ..Gradients::default() };
    let error = Kernel::portable().loss_and_grad(&problem, &[1.0; 3], short).unwrap_err();
    assert_eq!(error.to_string(), "d_hidden has 5 elements, expected 6 (N × D)");
    let error = Kernel::portable().backward(&problem, &[0.0; 2], Cotangents::default(), Gradients::default()).unwrap_err();
    assert_eq!(error.to_string(), "lse has 2 elements, expected 3 (N)");
}

#[test]
fn gradient_dtype() {
    let problem = problem(inputs()).unwrap();
    let narrow = Gradients { d_unembedding: Some(GradientMut::Bf16(&mut [bf16::ZERO; 8])), ..Gradients::default() };
    let error = Kernel::portable().loss_and_grad(&problem, &[1.0; 3], narrow).unwrap_err();
    assert_eq!(
        error.to_string(),
        "d_unembedding was asked for in bfloat16; gradients come in float32 or in the input's own float32"
    );
    assert_eq!(problem.unembedding().dtype(), DType::F32);
}

#[test]
fn is_shard() {
    let shard = problem(Inputs { shard: Some(VocabShard { start: 0, total: 8 }), ..inputs() }).unwrap();
    assert_eq!(
        reference::forward(&shard).unwrap_err().to_string(),
        "the oracle needs the whole vocabulary, but the unembedding is the shard [0, 4) of it; merge the shards' partials first"
    );
}

#[test]
fn partial_columns() {
    let shard = problem(Inputs { shard: Some(VocabShard { start: 0, total: 8 }), ..inputs() }).unwrap();
    assert_eq!(
        Kernel::portable().partial(&shard).finish(&shard).unwrap_err().to_string(),
        "the merged partials hold 4 valid columns of 8; merge every vocab shard's exactly once"
    );
}
