//! Replaying some rows of a step's gradients gives the rows that a replay of all gives.

use fused_xent::diff::DiffError;
use fused_xent::diff::fault::{CATALOGUE, Fault};
use fused_xent::diff::replay::{Counterfactual, Excerpt, Wanted};
use fused_xent::diff::step::Step;
use fused_xent::diff::synth::{Made, Regime, SynthOptions};
use fused_xent::diff::truth::Stage;
use fused_xent::dump::LossSettings;
use fused_xent::kernels::problem::{LossOptions, Sample};
use fused_xent::kernels::reference;
use ndarray::{Array2, Axis};

/// Larger than one piece of work in each direction that is cut.
fn options(faults: &[Fault]) -> SynthOptions {
    let options = SynthOptions { tokens: 140, hidden: 24, vocab: 2300, regime: Regime::Unit, ..SynthOptions::default() };
    let mut options = faults.iter().fold(options, |options, fault| options.planting(*fault));
    options.weights = true;
    options
}

fn computation(step: &Step, faults: &[Fault]) -> Counterfactual {
    let mut computation = Counterfactual::default();
    faults.iter().for_each(|fault| fault.apply(&mut computation, step));
    computation
}

/// The largest difference between rows of the whole and those of an excerpt, relative to the largest element.
fn difference(whole: &Array2<f64>, rows: &[usize], some: &Array2<f64>) -> f64 {
    let whole_rows = whole.select(Axis(0), rows);
    let largest = whole.iter().fold(f64::MIN_POSITIVE, |largest, x| largest.max(x.abs()));
    (&whole_rows - some).iter().fold(0.0f64, |most, x| most.max(x.abs())) / largest
}

/// Of every stage of both microbatches.
fn largest_difference(options: &SynthOptions, whole: &Counterfactual, some: &Counterfactual) -> Result<f64, DiffError> {
    let made = Made::new(options);
    let step = made.step(options)?;
    let mut most: f64 = 0.0;
    for m in 0..2 {
        let problem = &step.microbatches[m].problem;
        let shape = problem.shape();
        let tokens = vec![0, 1, 17, 63, 64, 100, shape.tokens - 1];
        let ids = vec![0, 1, 2, 5, 63, 64, 127, 1023, 1024, 2047, 2048, shape.vocab - 1];
        let sample = Sample::new(shape, tokens, ids).unwrap();
        let lse = reference::forward(problem).unwrap().lse;
        let mut excerpt = Excerpt::new(&step, m, sample.clone(), &lse);
        excerpt.learn([some].into_iter());
        let (outcome, all) = (excerpt.replay(some, &excerpt.rows(), Wanted::ALL), whole.replay(&step, m, Wanted::ALL));
        let of_tokens = |x: &[f64]| Array2::from_shape_vec((x.len(), 1), x.to_vec()).unwrap();
        for (whole, some) in [
            (&all.forward.loss, &outcome.forward.loss),
            (&all.forward.lse, &outcome.forward.lse),
            (&all.forward.label_logits, &outcome.forward.label_logits),
        ] {
            most = most.max(difference(&of_tokens(whole), sample.tokens(), &of_tokens(some)));
        }
        let (whole, some) = (&all.gradients, &outcome.gradients);
        for (whole, some, rows) in [
            (&whole.hidden.lse, &some.hidden.lse, sample.tokens()),
            (&whole.hidden.label, &some.hidden.label, sample.tokens()),
            (&whole.unembedding.lse, &some.unembedding.lse, sample.ids()),
            (&whole.unembedding.label, &some.unembedding.label, sample.ids()),
        ] {
            most = most.max(difference(whole, rows, some));
        }
    }
    Ok(most)
}

fn as_the_whole(faults: &[Fault]) {
    let options = options(faults);
    let made = Made::new(&options);
    let computation = computation(&made.step(&options).unwrap(), faults);
    let off = largest_difference(&options, &computation, &computation).unwrap();
    assert!(off < 1e-12, "{faults:?}: {off:e}");
}

#[test]
fn some_rows_of_every_fault_are_those_of_the_whole() {
    CATALOGUE.iter().for_each(|entry| as_the_whole(&[entry.example]));
}

#[test]
fn some_rows_of_every_variant_are_those_of_the_whole() {
    for text in [
        "label-logit-bf16:rounded=sum",
        "label-logit-bf16:rounded=running-sum",
        "label-logit-bf16:rounded=running-sum-and-products",
        "lse-bf16:seen_by=output",
        "lse-bf16:seen_by=loss",
        "dlogits-bf16:label=joint",
        "label-scatter-bf16:onto=lse-part",
        "label-scatter-bf16:processes=3,processes_added_in=bf16",
        "label-scatter-bf16:processes=3,processes_added_in=f32-then-bf16",
        "label-scatter-bf16:onto=lse-part,processes=2",
        "dk-accumulate-bf16:width=32",
        "dk-accumulate-bf16:over=microbatches,parts_rounded=false",
        "dk-accumulate-bf16:chunks=4,processes=3",
        "dk-accumulate-bf16:chunks=4,processes=2,processes_added_in=f32-then-bf16",
        "dq-accumulate-bf16:width=512,parts_rounded=false",
        "gradient-filter:eps=0.002,token_tile=48,vocab_tile=100",
        "gradient-filter:eps=0.004,token_tile=1,vocab_tile=16",
        "gradient-filter:eps=0.004,masked=count",
        "approximate-exp-log:of=exp,degree=2",
        "approximate-exp-log:of=exp-in-lse",
        "approximate-exp-log:of=exp-bf16",
        "approximate-exp-log:of=exp2-polynomial,c3=0.08",
        "label-tile-edge:tile=4,edge=last",
        "ignored-leak:label=zero",
        "ignored-leak:label=none",
        "label-off-by-one:to=left",
        "label-off-by-one:beyond=lost",
        "valid-vocab-ignored:in=backward",
        "logit-scale-ignored:missing=all",
        "logit-scale-ignored:missing=all-in-lse-too",
        "dq-not-reduced:shards=7,shard=2,split=even",
        "dk-not-reduced:shards=3,shard=1",
        "local-lse:shards=12,split=even",
        "label-per-shard:shards=3,of=dq",
        "label-per-shard:shards=5,of=dk",
        "dq-cotangent-missing:missing=g",
        "dk-cotangent-missing:missing=g",
    ] {
        as_the_whole(&[Fault::parse(text).unwrap_or_else(|e| panic!("{text}: {e}"))]);
    }
}

#[test]
fn near_ties_of_some_rows_are_those_of_the_whole() {
    for text in ["dlogits-bf16", "dlogits-bf16:label=joint", "prob-minus-one-bf16", "lse-bf16:seen_by=loss", "label-logit-bf16"] {
        let options = options(&[Fault::parse(text).unwrap()]);
        let made = Made::new(&options);
        let step = made.step(&options).unwrap();
        let how = computation(&step, &options.faults);
        let problem = &step.microbatches[1].problem;
        let shape = problem.shape();
        let (tokens, ids) = (vec![0, 3, 17, 64, 139], vec![0, 1, 2, 63, 1024, 2299]);
        let sample = Sample::new(shape, tokens.clone(), ids.clone()).unwrap();
        let mut excerpt = Excerpt::new(&step, 1, sample, &reference::forward(problem).unwrap().lse);
        excerpt.learn([&how].into_iter());
        let (some, whole) = (excerpt.ties(&how, &excerpt.rows(), Wanted::ALL), how.ties(&step, 1, Wanted::ALL));
        let mut there_are = false;
        for (stage, rows) in [
            (Stage::Loss, &tokens),
            (Stage::Lse, &tokens),
            (Stage::LabelLogits, &tokens),
            (Stage::DHidden, &tokens),
            (Stage::DUnembedding, &ids),
        ] {
            there_are |= whole.stage(stage).iter().any(|square| *square > 0.0);
            let largest = whole.stage(stage).iter().fold(f64::MIN_POSITIVE, |most, x| most.max(*x));
            for (&row, some) in rows.iter().zip(some.stage(stage)) {
                assert!((whole.stage(stage)[row] - some).abs() <= 1e-9 * largest, "{text}: {stage:?} {row}");
            }
        }
        assert!(there_are || text.starts_with("l"), "{text}: no near ties among 300 000 elements");
    }
}

#[test]
fn some_rows_of_two_faults_are_those_of_the_whole() {
    let parse = |text: &str| Fault::parse(text).unwrap();
    for pair in [
        ["lse-tile-missing:tile=300,index=2", "logits-bf16-forward"],
        ["local-lse:shards=3", "lse-bf16"],
        ["vocab-pad-unmasked:pad=7", "valid-vocab-ignored"],
        ["ignored-leak", "local-lse:shards=2"],
        ["dk-accumulate-bf16:chunks=9", "label-scatter-bf16"],
        ["dk-accumulate-bf16:chunks=140", "dk-not-reduced"],
        ["dq-not-reduced:shards=3,shard=1", "dq-accumulate-bf16:tiles=50"],
        ["gq-bf16", "token-tail-dropped:tile=60"],
        ["approximate-exp-log:of=exp", "lse-tile-missing:tile=300,index=0"],
        ["gradient-filter:eps=0.002,token_tile=48,vocab_tile=100", "vocab-pad-unmasked:pad=900"],
        ["dlogits-bf16:label=joint", "label-per-shard:of=dk"],
        ["gradient-filter:masked=count", "local-lse:shards=3"],
        ["logit-scale-ignored:missing=all-in-lse-too", "ignored-leak:label=none"],
        ["gradient-filter", "dk-accumulate-bf16:chunks=4,processes=2"],
    ] {
        as_the_whole(&pair.map(parse));
    }
}

#[test]
fn rows_of_other_computations_differ() {
    let options = options(&[]);
    let made = Made::new(&options);
    let step = made.step(&options).unwrap();
    for fault in ["lse-tile-missing:tile=100,index=3", "lse-bf16", "gq-bf16", "label-scatter-bf16", "logits-bf16-both"] {
        let wrong = computation(&step, &[Fault::parse(fault).unwrap()]);
        let off = largest_difference(&options, &Counterfactual::default(), &wrong).unwrap();
        assert!(off > 1e-6, "{fault}: {off:e}");
    }
    let loss =
        LossSettings { options: LossOptions { logit_softcap: Some(8.0), ..LossOptions::default() }, ..LossSettings::default() };
    let capped = SynthOptions { loss, ..options };
    let off = largest_difference(&capped, &Counterfactual::default(), &Counterfactual::default()).unwrap();
    assert!(off < 1e-12, "{off:e}");
}
