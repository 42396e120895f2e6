//! The engine on whole dumps: no false alarm on honest gradients, no false pass on wrong ones, and the right cause.

use fused_xent::diff::fault::{CATALOGUE, Fault};
use fused_xent::diff::sampling::Sampling;
use fused_xent::diff::synth::{Regime, SynthOptions, synth};
use fused_xent::diff::{Candidate, DiffError, Settings, judge};
use fused_xent::dump::{Dump, Elements, Folder, FolderId, FolderWriter, LossSettings, Placement, Run};
use fused_xent::kernels::contract::Precision;
use fused_xent::kernels::problem::{Floats, LossOptions};
use fused_xent::kernels::reduction::{Denominator, Microbatches, Reduction, StepReduction};
use fused_xent::report::model::{CandidateReport, Confidence, Report, SampleReport, TensorReport, Verdict};
use proptest::prelude::*;
use serde_json::Value;
use std::num::NonZeroUsize;
use std::path::Path;
use tempfile::TempDir;

#[path = "diff/substitution.rs"]
mod substitution;

fn small() -> SynthOptions {
    SynthOptions { tokens: 120, hidden: 32, vocab: 400, ..SynthOptions::default() }
}

fn make(options: &SynthOptions) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    synth(folder.path(), options, &()).unwrap();
    folder
}

fn judge_recorded(path: &Path) -> Report {
    judge_rows(path, Sampling::BySize)
}

fn judge_rows(path: &Path, sampling: Sampling) -> Report {
    let settings = Settings { candidates: vec![Candidate::Recorded], sampling, ..Settings::default() };
    judge(path, &settings, &()).unwrap()
}

fn rows(rows: usize) -> Sampling {
    Sampling::Rows(NonZeroUsize::new(rows).unwrap())
}

fn only(report: &Report) -> &CandidateReport {
    assert_eq!(report.candidates.len(), 1);
    &report.candidates[0]
}

fn causes(report: &Report) -> Vec<&str> {
    report.candidates.iter().flat_map(|c| &c.findings).map(|f| f.cause.as_str()).collect()
}

fn any_loss(vocab: usize) -> impl Strategy<Value = LossSettings> {
    let options = (
        prop::option::of(1..=vocab),
        prop::sample::select(vec![1.0, 0.3]),
        prop::option::of(Just(10.0)),
        prop::sample::select(vec![0.0, 1e-3]),
        prop::sample::select(vec![0.0, 0.1]),
    );
    let reduction = (
        prop::sample::select(vec![Reduction::Mean, Reduction::Sum]),
        prop::sample::select(vec![Denominator::Valid, Denominator::Tokens, Denominator::Given(77.0)]),
        prop::sample::select(vec![Microbatches::Mean, Microbatches::Sum, Microbatches::Global]),
        prop::sample::select(vec![1.0, 1e-6, 8.0]),
    );
    (options, reduction).prop_map(|((valid_vocab, logit_scale, logit_softcap, z_loss, label_smoothing), r)| LossSettings {
        options: LossOptions { valid_vocab, logit_scale, logit_softcap, z_loss, label_smoothing, ..LossOptions::default() },
        reduction: StepReduction { reduction: r.0, denominator: r.1, microbatches: r.2, cotangent: r.3 },
        ..LossSettings::default()
    })
}

/// `cases` cases, or as many as the environment's PROPTEST_CASES says.
fn config(cases: u32) -> ProptestConfig {
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { ProptestConfig::default().cases } else { cases };
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

fn settings(options: LossOptions) -> LossSettings {
    LossSettings { options, ..LossSettings::default() }
}

proptest! {
    #![proptest_config(config(48))]

    /// Honest gradients of any shape, regime, loss, precision and number of processes agree: recorded ones and the kernel's.
    #[test]
    fn honest_gradients_raise_no_alarm(
        tokens in prop::sample::select(vec![1usize, 2, 7, 64, 100]),
        hidden in prop::sample::select(vec![1usize, 5, 32]),
        (vocab, loss) in prop::sample::select(vec![1usize, 3, 100, 300]).prop_flat_map(|v| (Just(v), any_loss(v))),
        regime in prop::sample::select(vec![Regime::Initial, Regime::Unit, Regime::Trained, Regime::Large, Regime::Huge]),
        microbatches in 1..4usize,
        masked in prop::sample::select(vec![0.0, 0.2, 0.9]),
        (weights, narrow, spread) in any::<(bool, bool, bool)>(),
        sampling in prop_oneof![Just(Sampling::BySize), (1..400usize).prop_map(rows)],
        seed in any::<u64>(),
    ) {
        let processes = if spread { tokens.min(vocab).min(3) } else { 1 };
        let gradients = if narrow { Precision::Bf16 } else { Precision::F32 };
        let options = SynthOptions { tokens, hidden, vocab, microbatches, processes, regime, masked, weights, loss, gradients, seed, ..SynthOptions::default() };
        let folder = make(&options);
        let report = judge(folder.path(), &Settings { sampling, ..Settings::default() }, &()).unwrap();
        prop_assert_eq!(report.candidates.len(), 2);
        for candidate in &report.candidates {
            let reasons: Vec<_> = candidate.microbatches.iter().flat_map(|m| &m.tensors).chain(candidate.accumulated.iter().flat_map(|a| &a.tensors))
                .filter_map(|t| t.reason.as_ref().map(|r| format!("{}: {r}", t.name))).collect();
            prop_assert_eq!(candidate.verdict, Verdict::Agree, "{}: {:?}", candidate.candidate, reasons);
        }
    }
}

/// The regime in which a fault of rounding rises above the floor.
fn telling_regime(fault: Fault) -> Regime {
    match fault {
        Fault::VocabPadUnmasked { .. } => Regime::Initial,
        Fault::LogitsBf16Forward | Fault::LogitsBf16Backward | Fault::LogitsBf16Both => Regime::Large,
        _ => Regime::Trained,
    }
}

#[test]
fn every_fault_of_the_catalogue_is_named() {
    let mut missed = Vec::new();
    for entry in CATALOGUE {
        let options = SynthOptions { regime: telling_regime(entry.example), gradients: Precision::F32, ..small() };
        let report = judge_recorded(make(&options.planting(entry.example)).path());
        let candidate = only(&report);
        let named = candidate
            .findings
            .first()
            .is_some_and(|f| f.cause == entry.slug || f.indistinguishable_from.contains(&entry.slug.to_owned()));
        if report.verdict != Verdict::Diverge || !named || candidate.findings.len() != 1 {
            missed.push(format!("{}: {:?} {:?}", entry.slug, report.verdict, causes(&report)));
        }
    }
    // These two are what honest bf16 kernels do, or cannot be told from it without a declared contract.
    missed.retain(|m| !["dlogits-bf16: Agree []", "prob-minus-one-bf16: Agree []"].contains(&m.as_str()));
    assert!(missed.is_empty(), "{missed:#?}");
}

/// A copy of the dump `from` whose gradients `change` has gone through: it gets the name, the values row-major, and the row length.
fn rewritten(from: &Path, change: impl Fn(&str, &mut [f64], usize)) -> TempDir {
    rewritten_outputs(from, |name, x, row| {
        if name.starts_with("d_") {
            change(name, x, row);
        }
    })
}

/// The same with everything that was recorded.
fn rewritten_outputs(from: &Path, change: impl Fn(&str, &mut [f64], usize)) -> TempDir {
    let to = tempfile::tempdir().unwrap();
    let dump = Dump::open(from).unwrap();
    let run = &dump.runs()[0];
    let step = &run.steps[&0];
    for (microbatch, folder) in step.microbatches.iter().map(|(&m, folder)| (Some(m), folder)).chain([(None, &step.shared)]) {
        copy_folder(to.path(), run, microbatch, folder, &change);
    }
    to
}

fn copy_folder(to: &Path, run: &Run, microbatch: Option<usize>, folder: &Folder, change: &impl Fn(&str, &mut [f64], usize)) {
    let step = &run.steps[&0];
    let id = FolderId {
        run_id: run.run_id.clone(),
        producer: run.producer.clone(),
        step: 0,
        microbatch,
        num_microbatches: step.num_microbatches,
        process_index: 0,
        process_count: 1,
        loss: step.loss,
    };
    let mut writer = FolderWriter::create(to, id).unwrap();
    for info in folder.tensors() {
        let tensor = folder.load(&info.name).unwrap().unwrap().tensor;
        let placement = Placement::whole(tensor.shape());
        if info.name.starts_with("d_") || ["loss", "lse", "label_logits"].contains(&info.name.as_str()) {
            let mut values = tensor.to_f64();
            change(&info.name, &mut values, tensor.shape().get(1).copied().unwrap_or(1));
            let narrow: Vec<f32> = values.iter().map(|&x| x as f32).collect();
            writer.tensor(&info.name, Elements::F32(&narrow), &placement).unwrap();
            continue;
        }
        match (tensor.floats(), tensor.targets()) {
            (Some(Floats::Bf16(values)), _) => writer.tensor(&info.name, Elements::Bf16(values), &placement).unwrap(),
            (Some(Floats::F32(values)), _) => writer.tensor(&info.name, Elements::F32(values), &placement).unwrap(),
            (_, Some(fused_xent::kernels::problem::Targets::I32(ids))) => {
                writer.tensor(&info.name, Elements::I32(ids), &placement).unwrap();
            }
            other => panic!("{}: {other:?}", info.name),
        }
    }
    if microbatch.is_some() {
        writer.unembedding_from_shared().unwrap();
    }
    writer.commit().unwrap();
}

/// g rounded to bfloat16 once is one factor in both gradients; as large a factor in one of them is a fault, and so is another.
#[test]
fn a_rounded_cotangent_is_honest() {
    let reduction = StepReduction { denominator: Denominator::Given(77.0), ..StepReduction::default() };
    let loss = LossSettings { reduction, ..LossSettings::default() };
    let healthy = make(&SynthOptions { regime: Regime::Unit, gradients: Precision::F32, loss, ..small() });
    let factor = Precision::Bf16.round(1.0 / 77.0) * 77.0;
    assert!((factor - 1.0).abs() > 5e-4, "{factor}");
    let scaled = |in_dq: f64, in_dk: f64| {
        let dump = rewritten(healthy.path(), |name, x, _| {
            let factor = if name.starts_with("d_hidden") { in_dq } else { in_dk };
            x.iter_mut().for_each(|x| *x *= factor);
        });
        judge_recorded(dump.path())
    };
    let honest = scaled(factor, factor);
    assert_eq!((honest.verdict, only(&honest).contract.cotangent), (Verdict::Agree, Some("bf16")));
    let plain = scaled(1.0, 1.0);
    assert_eq!((plain.verdict, only(&plain).contract.cotangent), (Verdict::Agree, None));
    for (in_dq, in_dk) in [(factor, 1.0), (1.0, factor), (factor.powi(-8), factor.powi(-8)), (factor.powi(8), factor.powi(8))] {
        assert_eq!(scaled(in_dq, in_dk).verdict, Verdict::Diverge, "{in_dq}, {in_dk}");
    }
}

#[test]
fn wrong_gradients_never_pass() {
    let healthy = make(&SynthOptions { regime: Regime::Unit, gradients: Precision::F32, ..small() });
    assert_eq!(
        judge_recorded(rewritten(healthy.path(), |_, _, _| {}).path()).verdict,
        Verdict::Agree,
        "the copy itself is healthy"
    );
    type Change = fn(&str, &mut [f64], usize);
    let wrong: [(&str, &[&str], Change); 6] = [
        ("zeros", &["unknown", "not-averaged"], |_, x, _| x.fill(0.0)),
        ("a row shift", &["unknown"], |_, x, row| x.rotate_right(row)),
        ("another sign", &["not-averaged"], |_, x, _| x.iter_mut().for_each(|x| *x = -*x)),
        ("1 % too large", &["not-averaged"], |_, x, _| x.iter_mut().for_each(|x| *x *= 1.01)),
        ("one row of dQ twice as large", &["unknown"], |name, x, row| {
            if name == "d_hidden" {
                x[40 * row..41 * row].iter_mut().for_each(|x| *x *= 2.0);
            }
        }),
        ("one element of dK off by a tenth of its row", &["unknown"], |name, x, row| {
            if name == "d_unembedding" {
                x[0] += 0.1 * x[..row].iter().map(|x| x.abs()).sum::<f64>() / row as f64;
            }
        }),
    ];
    for (what, expected, change) in wrong {
        let report = judge_recorded(rewritten(healthy.path(), change).path());
        assert_eq!(report.verdict, Verdict::Diverge, "{what}");
        let causes = causes(&report);
        assert!(!causes.is_empty() && causes.iter().all(|c| expected.contains(c)), "{what}: {causes:?}");
    }
}

#[test]
fn a_nan_is_located_and_left_out_of_the_other_figures() {
    let healthy = make(&small());
    let report = judge_recorded(
        rewritten(healthy.path(), |name, x, row| {
            if name == "d_hidden" {
                x[7 * row + 3] = f64::NAN;
            }
        })
        .path(),
    );
    let candidate = only(&report);
    assert_eq!(causes(&report), ["nonfinite"]);
    let tensor = candidate.microbatches[0].tensors.iter().find(|t| t.name == "d_hidden").unwrap();
    assert_eq!((tensor.verdict, tensor.nonfinite, tensor.shape), (Verdict::Diverge, 1, [120, 32]));
    assert!(tensor.ratio < 1.5, "the rest is healthy: {}", tensor.ratio);
}

/// Every figure of a candidate but the causes, and that it was a sample: of what agrees, its verdict, ratio and floor.
fn figures(candidate: &CandidateReport) -> Value {
    let strip = |value: &mut Value, names: &[&str]| {
        names.iter().for_each(|name| drop(value.as_object_mut().unwrap().remove(*name)));
    };
    let mut value = serde_json::to_value(candidate).unwrap();
    strip(&mut value, &["sample", "findings"]);
    strip(&mut value["accumulated"], &["grad_norm"]);
    let of_tensor = |tensor: &mut Value| {
        strip(tensor, &["sampled_from", "reason"]);
        if tensor["verdict"] == "agree" {
            *tensor = ["name", "verdict", "shape", "ratio", "noise_floor"].map(|name| tensor[name].clone()).to_vec().into();
        }
    };
    for microbatch in value["microbatches"].as_array_mut().unwrap() {
        microbatch["tensors"].as_array_mut().unwrap().iter_mut().for_each(of_tensor);
    }
    value["accumulated"]["tensors"].as_array_mut().unwrap().iter_mut().for_each(of_tensor);
    value
}

/// Where two values differ: numbers by more than a twentieth, and than the tenth of a floor by which a sample's lse may be off.
fn difference(a: &Value, b: &Value, place: &str) -> Option<String> {
    let inner = |a: &Value, b: &Value, name: &str| difference(a, b, &format!("{place}.{name}"));
    let differ = match (a, b) {
        (Value::Object(a), Value::Object(b)) if a.len() == b.len() => {
            return a.iter().find_map(|(name, a)| inner(a, b.get(name).unwrap_or(&Value::Null), name));
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            return a.iter().zip(b).enumerate().find_map(|(i, (a, b))| inner(a, b, &i.to_string()));
        }
        (Value::Number(a), Value::Number(b)) => {
            let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
            (a - b).abs() > 0.05 * a.abs() && !(place.contains("tensors") && a.max(b) < 1.5 && (a - b).abs() <= 0.1)
        }
        _ => a != b,
    };
    differ.then(|| format!("{place}: {a} and {b}"))
}

fn tensor<'a>(candidate: &'a CandidateReport, microbatch: usize, name: &str) -> &'a TensorReport {
    candidate.microbatches[microbatch].tensors.iter().find(|t| t.name == name).unwrap()
}

#[test]
fn a_sample_of_everything_has_the_figures_of_everything() {
    for fault in [None, Some(Fault::VocabTailDropped { tile: 96 }), Some(Fault::LabelTileEdge { tile: 32 })] {
        let options = SynthOptions { faults: fault.into_iter().collect(), processes: 2, ..small() };
        let folder = make(&options);
        let judge = |sampling| judge(folder.path(), &Settings { sampling, ..Settings::default() }, &()).unwrap();
        let (all, sampled) = (judge(Sampling::Full), judge(rows(1000)));
        assert_eq!(all.candidates.len(), 2);
        for (all, sampled) in all.candidates.iter().zip(&sampled.candidates) {
            assert_eq!((all.sample, sampled.sample), (None, Some(SampleReport { token_rows: 120, vocab_rows: 400 })));
            assert_eq!(difference(&figures(sampled), &figures(all), ""), None);
        }
    }
}

#[test]
fn a_sample_finds_planted_faults() {
    for (fault, stage, gradients) in [
        (Fault::VocabTailDropped { tile: 128 }, "d_hidden", Precision::F32),
        (Fault::LabelTileEdge { tile: 32 }, "d_hidden", Precision::F32),
        (Fault::DkCotangentMissing { factor: 8.0 }, "d_unembedding", Precision::Bf16),
        (Fault::parse("label-scatter-bf16").unwrap(), "d_unembedding", Precision::F32),
        (Fault::parse("vocab-pad-unmasked").unwrap(), "lse", Precision::F32),
    ] {
        let options = SynthOptions { regime: telling_regime(fault), gradients, ..small() }.planting(fault);
        let report = judge_rows(make(&options).path(), rows(40));
        let candidate = only(&report);
        assert_eq!(candidate.sample, Some(SampleReport { token_rows: 40, vocab_rows: 40 }));
        assert_eq!(candidate.verdict, Verdict::Diverge, "{}", fault.slug());
        assert_eq!(candidate.first_divergence.as_ref().unwrap().stage, stage, "{}", fault.slug());
        let dk = tensor(candidate, 1, "d_unembedding");
        assert_eq!((dk.verdict, dk.shape, dk.sampled_from), (Verdict::Diverge, [40, 32], Some(400)), "{}", fault.slug());
        let accumulated = candidate.accumulated.as_ref().unwrap();
        assert!(accumulated.tensors[0].verdict == Verdict::Diverge && accumulated.grad_norm.is_none(), "{}", fault.slug());
        assert_eq!(causes(&report), [fault.slug()]);
        assert_eq!(candidate.findings[0].confidence, Confidence::Certain, "{}", fault.slug());
        if let Fault::VocabTailDropped { tile } = fault {
            let [first, last] = dk.zero_tail.unwrap();
            assert!(first <= 400 / tile * tile && 400 / tile * tile <= last && last < first + 20, "{first}, {last}");
        }
    }
}

/// Rows are told by their place in the whole tensor; what no sampled row shows is not seen.
#[test]
fn a_fault_in_one_row_is_located_if_the_row_is_sampled() {
    let options = SynthOptions {
        regime: Regime::Initial,
        gradients: Precision::F32,
        loss: settings(LossOptions { valid_vocab: Some(390), ..LossOptions::default() }),
        ..small()
    };
    let healthy = make(&options);
    let reversed = |tensor: &'static str, row: usize| {
        let changed = rewritten(healthy.path(), move |name, x, width| {
            if name == tensor {
                x[row * width..(row + 1) * width].reverse();
            }
        });
        judge_rows(changed.path(), rows(40))
    };
    for (name, row) in [("d_hidden", 0), ("d_hidden", 119), ("d_unembedding", 0), ("d_unembedding", 389)] {
        let report = reversed(name, row);
        let (found, other) = (tensor(only(&report), 0, name), if name == "d_hidden" { "d_unembedding" } else { "d_hidden" });
        assert_eq!(found.verdict, Verdict::Diverge, "{name} {row}");
        assert_eq!(found.worst.as_ref().unwrap().index[0], row, "{name}");
        assert!(found.pattern.as_ref().unwrap().rows.iter().any(|[from, to]| (*from..*to).contains(&row)), "{name} {row}");
        assert_eq!(tensor(only(&report), 0, other).verdict, Verdict::Agree, "{name} {row}");
    }
    let unseen = (1..9).any(|row| reversed("d_unembedding", row).verdict == Verdict::Agree);
    assert!(unseen, "a sample does not see every row");
}

#[test]
fn steps_are_sampled_alike_every_time_and_small_ones_not_at_all() {
    let folder = make(&small());
    let sampled = || serde_json::to_value(judge_rows(folder.path(), rows(9))).unwrap();
    assert_eq!(sampled(), sampled());
    assert!(judge_rows(folder.path(), Sampling::BySize).candidates[0].sample.is_none());
}

#[test]
fn a_nan_in_a_sampled_row_is_told() {
    let healthy = make(&small());
    let broken = rewritten(healthy.path(), |name, x, _| {
        if name == "d_unembedding" {
            x[3] = f64::INFINITY;
        }
    });
    let report = judge_rows(broken.path(), rows(5));
    assert_eq!(causes(&report), ["nonfinite"]);
}

#[test]
fn a_large_fault_does_not_hide_a_second_one() {
    let options = SynthOptions { gradients: Precision::F32, ..small() }
        .planting(Fault::VocabTailDropped { tile: 128 })
        .planting(Fault::DkCotangentMissing { factor: 8.0 });
    let report = judge_recorded(make(&options).path());
    let mut found = causes(&report);
    found.sort_unstable();
    assert_eq!(found, ["dk-cotangent-missing", "vocab-tail-dropped"]);
    assert!(only(&report).findings[1].remaining_ratio < 1.5);
}

#[test]
fn parameters_are_found_not_guessed() {
    for (fault, name, value) in [
        (Fault::VocabPadUnmasked { pad: 112 }, "pad", 112),
        (Fault::parse("dk-accumulate-bf16:chunks=8,parts_rounded=false").unwrap(), "chunks", 8),
        (Fault::LabelTileEdge { tile: 32 }, "tile", 32),
        (Fault::parse("dq-not-reduced:shards=4,shard=2").unwrap(), "shard", 2),
        (Fault::NotAveraged { factor: 3.0 }, "factor", 3),
    ] {
        let options = SynthOptions { regime: Regime::Initial, gradients: Precision::F32, ..small() }.planting(fault);
        let report = judge_recorded(make(&options).path());
        let finding = &only(&report).findings[0];
        assert_eq!(finding.cause, fault.slug());
        assert_eq!(finding.parameters[name].as_f64(), Some(f64::from(value)), "{}: {:?}", fault.slug(), finding.parameters);
        assert_eq!(finding.confidence, Confidence::Certain, "{}", fault.slug());
    }
}

#[test]
fn variants_are_found_with_their_parameters() {
    let mut missed = Vec::new();
    for (text, regime) in [
        ("label-tile-edge:tile=16,edge=last", Regime::Unit),
        ("ignored-leak:label=none", Regime::Unit),
        ("ignored-leak:label=zero", Regime::Unit),
        ("logit-scale-ignored:missing=all", Regime::Unit),
        ("dq-cotangent-missing:missing=g", Regime::Unit),
        ("dk-cotangent-missing:missing=g", Regime::Unit),
        ("last-microbatch-only:divided=no", Regime::Unit),
        ("dk-accumulate-bf16:width=32,parts_rounded=false", Regime::Initial),
        ("dk-accumulate-bf16:chunks=4,processes=3,processes_added_in=bf16", Regime::Initial),
        ("dq-accumulate-bf16:width=64", Regime::Initial),
        ("label-scatter-bf16:onto=lse-part,processes=3", Regime::Trained),
        ("label-scatter-bf16:processes=3,processes_added_in=f32-then-bf16", Regime::Trained),
        ("lse-tile-missing:tile=64,index=4", Regime::Unit),
        ("vocab-pad-unmasked:pad=37", Regime::Initial),
        ("gradient-filter:eps=0.015625,token_tile=16,vocab_tile=32", Regime::Trained),
        ("approximate-exp-log:of=log,degree=3", Regime::Unit),
        ("approximate-exp-log:of=exp,degree=3", Regime::Unit),
        ("approximate-exp-log:of=exp-in-lse,degree=2", Regime::Unit),
    ] {
        let fault = Fault::parse(text).unwrap();
        let made = SynthOptions { regime, gradients: Precision::F32, processes: 3, weights: true, ..small() };
        let report = judge_recorded(make(&made.planting(fault)).path());
        let found = only(&report).findings.first();
        let right = |(name, value): (&String, &Value)| {
            let parameters = found.map(|f| &f.parameters);
            let alike = parameters.and_then(|p| p.get(&format!("{name}_candidates"))).and_then(Value::as_array);
            parameters.and_then(|p| p.get(name)) == Some(value) || alike.is_some_and(|values| values.contains(value))
        };
        if found.is_none_or(|f| f.cause != fault.slug()) || !fault.parameters().iter().all(right) {
            missed.push(format!("{text}: {:?} {:?}", causes(&report), found.map(|f| &f.parameters)));
        }
    }
    assert!(missed.is_empty(), "{missed:#?}");
}

/// By a formula that the catalogue does not have: lse is off by another small number in each row, and all follows from it.
#[test]
fn an_approximation_by_another_formula_is_known_by_its_effect() {
    let options = SynthOptions { regime: Regime::Unit, gradients: Precision::F32, masked: 0.0, ..small() };
    let approximate = options.clone().planting(Fault::parse("approximate-exp-log:of=log,degree=2").unwrap());
    let report = judge_recorded(make(&approximate).path());
    let finding = &only(&report).findings[0];
    assert_eq!(
        (finding.cause.as_str(), finding.confidence),
        ("approximate-exp-log", Confidence::Certain),
        "{}",
        finding.evidence
    );
    assert_eq!(finding.parameters["of"], "lse, by an unknown formula");
}

/// Tensors that are larger than what hypotheses are tried on.
#[test]
fn what_is_named_holds_on_all_rows() {
    let options = SynthOptions { tokens: 600, hidden: 16, vocab: 700, gradients: Precision::F32, ..SynthOptions::default() };
    let dump = make(&options.planting(Fault::DkCotangentMissing { factor: 8.0 }));
    let report = judge_recorded(dump.path());
    let finding = &only(&report).findings[0];
    assert_eq!((finding.cause.as_str(), finding.confidence), ("dk-cotangent-missing", Confidence::Certain));
    assert!(finding.remaining_ratio < 1.5, "{}", finding.remaining_ratio);
    let quiet = 650;
    let broken = rewritten(dump.path(), |name, x, row| {
        if name == "d_unembedding" {
            x[quiet * row..(quiet + 1) * row].reverse();
        }
    });
    let report = judge_recorded(broken.path());
    assert!(causes(&report).contains(&"unknown"), "{:?}", causes(&report));
    assert!(only(&report).findings.iter().all(|f| f.confidence != Confidence::Certain));
}

#[test]
fn causes_that_do_the_same_are_named_together_with_what_tells_them_apart() {
    let options = SynthOptions { masked: 0.0, microbatches: 1, gradients: Precision::F32, ..small() };
    let report = judge_recorded(make(&options.planting(Fault::parse("label-per-shard").unwrap())).path());
    let finding = &only(&report).findings[0];
    assert_eq!(finding.cause, "label-per-shard");
    let options = SynthOptions { masked: 0.3, microbatches: 1, gradients: Precision::F32, ..small() };
    let report = judge_recorded(make(&options.planting(Fault::MeanOverAllTokens)).path());
    let finding = &only(&report).findings[0];
    assert_eq!(finding.cause, "mean-over-all-tokens");
    assert_eq!(finding.indistinguishable_from, ["not-averaged"]);
    assert!(finding.tell_apart.iter().any(|what| what.starts_with("several microbatches")), "{:?}", finding.tell_apart);
}

#[test]
fn the_number_of_processes_makes_no_difference() {
    let options = small().planting(Fault::LabelMissing);
    let one = judge_recorded(make(&options).path());
    let three = judge_recorded(make(&SynthOptions { processes: 3, ..options }).path());
    assert_eq!(three.dump.processes, 3);
    let candidates = |r: &Report| serde_json::to_value(&r.candidates).unwrap();
    assert_eq!(candidates(&one), candidates(&three));
}

#[test]
fn what_is_not_there_is_said() {
    let folder = make(&small());
    let judge = |settings| judge(folder.path(), &settings, &());
    let error = judge(Settings { step: Some(7), ..Settings::default() }).unwrap_err().to_string();
    assert!(error.starts_with("no step 7 to judge: the dump at ") && error.ends_with("has steps 0"), "{error}");
    assert!(matches!("cpu:abacus".parse::<Candidate>(), Err(DiffError::UnknownCandidate { .. })));
    let report = judge(Settings { microbatch: Some(1), ..Settings::default() }).unwrap();
    assert!(report.candidates.iter().all(|c| c.microbatches.len() == 1 && c.accumulated.is_none()));
}

#[test]
fn an_unknown_fault_is_told_the_nearest() {
    let error = Fault::parse("label-scater-bf16").unwrap_err().to_string();
    assert!(error.contains("the nearest known one is \"label-scatter-bf16\""), "{error}");
    let error = Fault::parse("vocab-tail-dropped:size=3").unwrap_err().to_string();
    assert_eq!(error, "fault vocab-tail-dropped: cannot take \"size=3\"; its parameters, as name=number: tile");
    assert_eq!(Fault::parse("vocab-tail-dropped:tile=96").unwrap(), Fault::VocabTailDropped { tile: 96 });
    let nothing = SynthOptions { faults: vec![Fault::ZlossGradientMissing], ..small() };
    let error = synth(&tempfile::tempdir().unwrap().path().join("dump"), &nothing, &()).unwrap_err();
    assert!(matches!(error, DiffError::FaultWithoutEffect { .. }), "{error}");
}

#[test]
fn the_document_lists_the_catalogue() {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/faults.md")).unwrap();
    for entry in CATALOGUE {
        assert!(
            text.contains(&format!("| `{}` | {} | {} | {} |", entry.slug, entry.title, entry.leaves_behind, entry.remedy)),
            "{}",
            entry.slug
        );
    }
}

#[test]
fn a_made_dump_keeps_the_contract_that_it_declares() {
    let bf16 = serde_json::json!({ "dlogits": "bf16", "d_hidden": "f32", "d_unembedding": "bf16" });
    let judged = |options: &SynthOptions| judge_recorded(make(options).path());
    let kept = judged(&SynthOptions { contract: Some(bf16.clone()), ..small() });
    let candidate = only(&kept);
    assert_eq!((kept.verdict, candidate.contract.source, candidate.contract.dlogits), (Verdict::Agree, "declared", "bf16"));
    assert_eq!((candidate.contract.d_hidden, candidate.contract.d_unembedding), ("f32", "bf16"));
    assert!(tensor(candidate, 0, "d_hidden").noise_floor.unwrap() > 1e-4, "the floor of rounded dlogits");

    // The same roundings are a fault where float32 is promised, and no other fault hides behind them.
    let promised = serde_json::json!({ "dlogits": "f32", "d_hidden": "f32", "d_unembedding": "f32" });
    let rounded = SynthOptions { contract: Some(promised), ..small() }.planting(Fault::parse("dlogits-bf16").unwrap());
    assert_eq!(causes(&judged(&rounded)), ["dlogits-bf16"]);
    let faulty = SynthOptions { contract: Some(bf16), ..small() }.planting(Fault::LabelMissing);
    assert_eq!(causes(&judged(&faulty)), ["label-missing"]);

    for (member, value) in [("dlogits", "f16"), ("accumulate", "bf16"), ("d_hidden", "f64")] {
        let folder = tempfile::tempdir().unwrap();
        let options = SynthOptions { contract: Some(serde_json::json!({ member: value })), ..small() };
        let error = synth(folder.path(), &options, &()).unwrap_err().to_string();
        assert!(error.contains(&format!("{member}={value}")) && error.contains("--contract"), "{error}");
    }
}
