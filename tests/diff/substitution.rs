//! Where an error enters: planted at every stage it must be found there, and what follows from it must be said to.

use super::*;
use fused_xent::report::substitution::{Along, Substituted, Substitution};

/// All stages recorded, in float32.
fn inner() -> SynthOptions {
    SynthOptions { gradients: Precision::F32, inner: true, regime: Regime::Unit, ..small() }
}

/// Held to float32 throughout, whatever else would fit.
fn judge_strictly(path: &Path, sampling: Sampling) -> Report {
    let contract = Some(serde_json::json!({ "dlogits": "f32" }));
    let settings = Settings { candidates: vec![Candidate::Recorded], sampling, contract, ..Settings::default() };
    judge(path, &settings, &()).unwrap()
}

fn judge_all(path: &Path) -> Report {
    judge_strictly(path, Sampling::Full)
}

fn substitution(report: &Report) -> &Substitution {
    only(report).substitution.as_ref().expect("something diverges")
}

/// The stages in which an error enters, and those that have theirs from others, each once.
fn stages(report: &Report) -> [Vec<&str>; 2] {
    [true, false].map(|enters| {
        let mut stages: Vec<&str> = Vec::new();
        for rung in substitution(report).rungs.iter().filter(|rung| rung.enters == enters) {
            if !stages.contains(&rung.stage.as_str()) {
                stages.push(&rung.stage);
            }
        }
        stages
    })
}

fn rung<'a>(report: &'a Report, stage: &str) -> &'a Substituted {
    substitution(report).rungs.iter().find(|rung| rung.stage == stage).unwrap()
}

fn first(report: &Report) -> (&str, Option<&str>) {
    let first = only(report).first_divergence.as_ref().unwrap();
    (&first.stage, first.enters.as_deref())
}

/// Adds to every row a part of it, another part for each.
fn disturb(x: &mut [f64], row: usize) {
    for (n, x) in x.chunks_mut(row).enumerate() {
        x.iter_mut().for_each(|x| *x *= 1.0 + 1e-3 * (1 + n % 7) as f64);
    }
}

#[test]
fn a_disturbed_recording_is_wrong_in_itself() {
    let healthy = make(&inner());
    assert!(judge_all(healthy.path()).candidates[0].substitution.is_none());
    let stages_alone =
        ["loss", "lse", "label_logits", "d_hidden_lse", "d_hidden_label", "d_unembedding_lse", "d_unembedding_label", "d_hidden"];
    for stage in stages_alone {
        let dump = rewritten_outputs(healthy.path(), |name, x, row| {
            if name == stage {
                disturb(x, row)
            }
        });
        let report = judge_all(dump.path());
        let [enters, inherits] = stages(&report);
        assert_eq!((enters, first(&report)), (vec![stage], (stage, None)), "{stage}");
        assert!(inherits.is_empty(), "{stage}: {inherits:?}");
        let inputs = &rung(&report, stage).inputs;
        assert!(inputs.iter().all(|input| !input.diverges), "{stage}: {inputs:?}");
    }
}

/// A part and the sum that it is in are disturbed alike: the sum has it from the part.
#[test]
fn a_sum_has_the_error_of_its_part() {
    let healthy = make(&inner());
    for (part, sum) in [("d_hidden_label", "d_hidden"), ("d_hidden_lse", "d_hidden")] {
        let dump = rewritten(healthy.path(), |name, x, _| {
            if name == part || name == sum {
                x.iter_mut().enumerate().for_each(|(i, x)| *x += 1e-4 * (i as f64).sin());
            }
        });
        let report = judge_all(dump.path());
        assert_eq!(stages(&report), [vec![part], vec![sum]], "{part}");
        assert_eq!(first(&report), (part, None));
        assert!(rung(&report, sum).inherited > 0.999);
        let repairs = &substitution(&report).repairs;
        assert!(repairs.iter().all(|r| r.repaired == part && r.stage == sum && r.before > 10.0 && r.after < 1.5), "{repairs:?}");
        assert_eq!(repairs.len(), 2, "one in each microbatch");
    }
}

/// Where synth plants an error, where it is said to enter, and what is said to follow from it.
#[test]
fn a_planted_fault_enters_where_it_was_planted() {
    let dk_after = ["d_unembedding", "accumulated_d_unembedding"];
    let all_after = ["d_hidden_lse", "d_unembedding_lse", "d_hidden", "d_unembedding", "accumulated_d_unembedding"];
    let forward = [&["loss"][..], &all_after].concat();
    let both_parts = [
        "d_hidden_lse",
        "d_hidden_label",
        "d_unembedding_lse",
        "d_unembedding_label",
        "d_hidden",
        "d_unembedding",
        "accumulated_d_unembedding",
    ];
    let sums = ["d_hidden", "d_unembedding", "accumulated_d_unembedding"];
    let cases: [(&str, &str, &[&str], &[&str]); 12] = [
        ("lse-tile-missing", "lse", &["lse"], &forward),
        ("vocab-pad-unmasked", "lse", &["lse"], &forward),
        ("approximate-exp-log", "lse", &["lse"], &forward),
        ("loss-subtract-bf16", "loss", &["loss"], &[]),
        ("label-logit-bf16", "label_logits", &["label_logits"], &["loss"]),
        ("lse-bf16", "d_hidden_lse", &["d_hidden_lse", "d_unembedding_lse"], &sums),
        ("label-missing", "d_hidden_label", &["d_hidden_label", "d_unembedding_label"], &sums),
        ("gq-bf16", "d_unembedding_lse", &["d_unembedding_lse"], &dk_after),
        ("label-grad-rounded", "d_unembedding_label", &["d_unembedding_label"], &dk_after),
        ("token-weights-ignored", "d_hidden_lse", &["d_lse", "d_label_logits"], &both_parts),
        ("zloss-gradient-missing", "d_hidden_lse", &["d_lse"], &all_after),
        ("last-microbatch-only", "accumulated_d_unembedding", &["accumulated_d_unembedding"], &[]),
    ];
    for (slug, expected, enters, inherits) in cases {
        let fault = Fault::parse(slug).unwrap();
        let options = SynthOptions { regime: if slug.contains("pad") { Regime::Initial } else { Regime::Unit }, ..inner() };
        let folder = make(&options.planting(fault));
        for sampling in [Sampling::Full, rows(60)] {
            let report = judge_strictly(folder.path(), sampling);
            assert_eq!(stages(&report), [enters.to_vec(), inherits.to_vec()], "{slug}");
            let by = enters[0].starts_with("d_l").then_some(enters[0]);
            assert_eq!(first(&report), (expected, by), "{slug}");
            let worst = substitution(&report).rungs.iter().filter(|r| !r.enters).map(|r| r.inherited).fold(1.0, f64::min);
            assert!(worst > 0.99, "{slug}: {worst}");
            assert!(substitution(&report).rungs.iter().all(|rung| rung.record.is_empty()), "{slug}: all is recorded");
        }
    }
}

/// Whatever the loss and the logits, what follows from a wrong lse or from wrong cotangents is not taken for an error of its own.
#[test]
fn what_follows_is_no_error_of_its_own() {
    let options = LossOptions { z_loss: 1e-3, logit_softcap: Some(10.0), ..LossOptions::default() };
    let smoothed = LossOptions { label_smoothing: 0.1, ..options };
    for loss in [LossSettings::default(), settings(options), settings(smoothed)] {
        for regime in [Regime::Initial, Regime::Unit, Regime::Trained, Regime::Large] {
            for gradients in [Precision::F32, Precision::Bf16] {
                for (slug, enters) in
                    [("lse-tile-missing:tile=64", &["lse"][..]), ("token-weights-ignored", &["d_lse", "d_label_logits"])]
                {
                    // The smoothing's own cotangent cannot be recorded.
                    if loss.options.label_smoothing > 0.0 && slug == "token-weights-ignored" {
                        continue;
                    }
                    let options = SynthOptions { tokens: 60, hidden: 16, vocab: 200, regime, gradients, loss, ..inner() };
                    let report = judge_all(make(&options.planting(Fault::parse(slug).unwrap())).path());
                    if report.verdict == Verdict::Agree {
                        continue;
                    }
                    let found = &stages(&report)[0];
                    assert!(found.iter().all(|stage| enters.contains(stage)), "{slug} {regime:?} {gradients:?}: {found:?}");
                }
            }
        }
    }
}

/// Parts that were rounded before they were added: each is right for its precision, and their sum is not.
#[test]
fn rounded_parts_are_the_error_of_their_sum() {
    let healthy = make(&inner());
    let dump = rewritten(healthy.path(), |name, x, _| {
        if name.starts_with("d_unembedding") {
            x.iter_mut().for_each(|x| *x = Precision::Bf16.round(*x));
        }
    });
    let report = judge_all(dump.path());
    let over_step = rung(&report, "accumulated_d_unembedding");
    assert!(over_step.enters, "it is rounded again: {over_step:?}");
    let narrow = make(&SynthOptions { gradients: Precision::Bf16, inner: false, microbatches: 3, ..inner() });
    let dump = Dump::open(narrow.path()).unwrap();
    let run = &dump.runs()[0];
    let step = &run.steps[&0];
    let of = |folder: &Folder| folder.load("d_unembedding").unwrap().unwrap().tensor.to_f64();
    let parts: Vec<Vec<f64>> = step.microbatches.values().map(of).collect();
    let sum = |_: &str, x: &mut [f64], _: usize| {
        x.iter_mut().enumerate().for_each(|(i, x)| *x = parts.iter().map(|part| part[i]).sum::<f64>() / 3.0);
    };
    let (shared, other) = ("proc_00000/step_00000000/shared", tempfile::tempdir().unwrap());
    copy_folder(other.path(), run, None, &step.shared, &sum);
    std::fs::remove_dir_all(narrow.path().join(shared)).unwrap();
    std::fs::rename(other.path().join(shared), narrow.path().join(shared)).unwrap();
    let report = judge_all(narrow.path());
    let over_step = rung(&report, "accumulated_d_unembedding");
    assert!(over_step.rounded_inputs && !over_step.enters && over_step.inherited > 0.99, "{over_step:?}");
    assert_eq!(first(&report), ("accumulated_d_unembedding", None));
}

fn along(report: &Report, stage: &str) -> Along {
    rung(report, stage).along.clone().unwrap()
}

/// With nothing recorded but the gradients, the direction of the error says which part of a row is wrong.
#[test]
fn the_parts_of_a_row_show_which_is_wrong() {
    let judged = |slug: &str, regime| {
        let options = SynthOptions { inner: false, regime, ..inner() }.planting(Fault::parse(slug).unwrap());
        judge_all(make(&options).path())
    };
    let lse = judged("lse-bf16", Regime::Unit);
    let of_lse = along(&lse, "d_hidden");
    assert!(of_lse.lse.share > 0.999 && of_lse.lse.share_of_one < 0.2, "{of_lse:?}");
    assert!(of_lse.label.share < 0.5 && of_lse.gradient.share < 0.9, "{of_lse:?}");
    assert!(of_lse.lse.factors[0] < 0.995 && of_lse.lse.factors[1] > 1.005, "{of_lse:?}");
    assert!(along(&lse, "d_unembedding").as_in_d_hidden.unwrap() > 0.99);
    assert_eq!(rung(&lse, "d_hidden").record, ["d_lse", "d_label_logits", "d_hidden_lse", "d_hidden_label"]);

    let label = judged("label-per-shard", Regime::Unit);
    let of_label = along(&label, "d_hidden");
    assert!(of_label.label.share > 0.999 && of_label.label.share_of_one > 0.999, "{of_label:?}");
    assert!(of_label.label.factors.iter().all(|factor| (factor - 2.0).abs() < 1e-4), "{of_label:?}");
    assert!(along(&label, "d_unembedding").as_in_d_hidden.unwrap() > 0.99);

    let scale = along(&judged("dq-cotangent-missing", Regime::Unit), "d_hidden");
    assert!(scale.gradient.share_of_one > 0.999 && (scale.gradient.factors[0] - 8.0).abs() < 1e-4, "{scale:?}");
    assert!(scale.lse.share < 0.99 && scale.label.share < 0.99, "{scale:?}");

    let logits = along(&judged("logits-bf16-backward", Regime::Unit), "d_hidden");
    assert!(logits.both < 0.9, "an error within P is no factor of a row: {logits:?}");

    let one_sided = judged("dk-cotangent-missing", Regime::Unit);
    assert_eq!(along(&one_sided, "d_unembedding").as_in_d_hidden, None, "dQ is right");
}

/// Two errors: one of lse, and one that the backward makes of its own.
#[test]
fn an_error_beyond_what_is_inherited_enters() {
    let options = SynthOptions { inner: false, ..inner() };
    let folder = make(&options.planting(Fault::parse("lse-tile-missing:tile=128").unwrap()));
    let dump = rewritten(folder.path(), |name, x, row| {
        if name == "d_hidden" {
            disturb(x, row)
        }
    });
    let report = judge_all(dump.path());
    assert_eq!(stages(&report), [vec!["lse", "d_hidden"], vec!["loss", "d_unembedding", "accumulated_d_unembedding"]]);
    assert_eq!(first(&report), ("lse", None));
    let dq = rung(&report, "d_hidden");
    assert!(dq.inputs.iter().all(|input| input.stage == "lse" && input.diverges), "{dq:?}");
    assert!((0.5..0.99999).contains(&dq.inherited) && dq.entering_ratio < dq.ratio, "{dq:?}");
}
