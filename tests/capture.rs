//! Capturing steps as training code does, and reading them back.

use fused_xent::capture::*;
use fused_xent::dump::*;
use fused_xent::kernels::problem::{Floats, Layout, Targets};
use half::bf16;
use std::fs;
use std::path::Path;

const D: usize = 4;
const V: usize = 6;

fn bf16s(n: usize, seed: usize) -> Vec<bf16> {
    (0..n).map(|i| bf16::from_f32(((i * 13 + seed * 5) % 31) as f32 / 4.0 - 3.0)).collect()
}

fn options(steps: CaptureSteps) -> CaptureOptions {
    CaptureOptions { steps, num_microbatches: 2, verify: true, ..Default::default() }
}

/// Captures what a training loop of one process would, for `steps` steps of two microbatches of [2, 3] tokens.
fn train(capture: &Capture, steps: u64) {
    for k in 0..steps {
        let seed = 10 * k as usize;
        let unembedding = bf16s(V * D, seed);
        let accumulated = vec![k as f32; V * D];
        let Some(mut step) = capture.step(k).unwrap() else { continue };
        step.unembedding(Floats::Bf16(&unembedding), [D, V], Layout::Dv).unwrap();
        for m in 0..2 {
            let hidden = bf16s(6 * D, seed + m + 1);
            let inputs = MicrobatchInputs {
                token_weights: Some(&[1.0, 0.5, 0.0, 1.0, 1.0, 2.0]),
                ..MicrobatchInputs::new(Floats::Bf16(&hidden), &[2, 3, D], Targets::I64(&[0, 1, 2, 3, 4, -100]))
            };
            let mut microbatch = step.microbatch(m, &inputs).unwrap();
            let d_hidden = bf16s(6 * D, seed + m + 7);
            let lse = [k as f32 + 0.5; 6];
            let outputs = MicrobatchOutputs {
                lse: Some(&lse),
                d_hidden: Some(Elements::Bf16(&d_hidden)),
                d_unembedding: Some(Elements::F32(&accumulated)),
                ..Default::default()
            };
            microbatch.outputs(&outputs).unwrap();
            microbatch.commit().unwrap();
        }
        step.finish(Some(Elements::F32(&accumulated))).unwrap();
    }
}

#[test]
fn a_captured_run_reads_back_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let mut settings = options(CaptureSteps::Every(2));
    settings.loss.reduction.cotangent = 0.1;
    settings.loss.microbatch_gradients = MicrobatchGradients::Step;
    settings.contract = Some(serde_json::json!({ "dlogits": "bf16", "accumulate": "f32" }));
    let loss = settings.loss;
    let capture = Capture::new(folder.path(), settings).unwrap();
    train(&capture, 5);
    let dump = Dump::open(folder.path()).unwrap();
    let [run] = dump.runs() else { panic!("one run") };
    assert_eq!(run.run_id, capture.run_id());
    assert_eq!(run.steps.keys().copied().collect::<Vec<_>>(), [0, 2, 4]);
    assert!(run.interrupted.is_empty() && dump.warnings().is_empty());
    for (k, step) in &run.steps {
        let seed = 10 * *k as usize;
        assert_eq!(step.loss, loss);
        assert!(step.incomplete.is_empty());
        for m in 0..2 {
            let loaded = step.problem(m).unwrap();
            let problem = loaded.problem().unwrap();
            assert_eq!(problem.layout(), Layout::Dv);
            let Floats::Bf16(hidden) = problem.hidden() else { panic!("bfloat16") };
            assert_eq!(hidden, bf16s(6 * D, seed + m + 1));
            let Floats::Bf16(unembedding) = problem.unembedding() else { panic!("bfloat16") };
            assert_eq!(unembedding, bf16s(V * D, seed));
            assert_eq!(problem.weights(), [1.0, 0.5, 0.0, 1.0, 1.0, 0.0]);
            let load = |name| step.microbatches[&m].load(name).unwrap().unwrap().tensor;
            assert_eq!(load("lse").f32_slice().unwrap(), [*k as f32 + 0.5; 6]);
            assert_eq!(load("lse").shape(), [2, 3]);
            let expected: Vec<f64> = bf16s(6 * D, seed + m + 7).iter().map(|x| x.to_f64()).collect();
            assert_eq!(load("d_hidden").to_f64(), expected);
            assert_eq!(load("d_unembedding").layout(), Layout::Dv);
        }
        assert_eq!(step.shared.contract().unwrap()["dlogits"], "bf16");
        let accumulated = step.shared.load("d_unembedding").unwrap().unwrap().tensor;
        assert_eq!(accumulated.to_f64(), vec![*k as f64; V * D]);
    }
    assert!(verify(folder.path(), &mut |_, _| {}).unwrap().problems.is_empty());
}

#[test]
fn data_parallel_processes_make_one_dump() {
    let folder = tempfile::tempdir().unwrap();
    let (hidden, unembedding) = (bf16s(4 * D, 1), bf16s(V * D, 2));
    for process in 0..2 {
        let settings = CaptureOptions {
            process_index: process,
            process_count: 2,
            run_id: Some("job 17".into()),
            num_microbatches: 1,
            ..options(CaptureSteps::At(vec![9]))
        };
        let capture = Capture::new(folder.path(), settings).unwrap();
        assert!(capture.step(8).unwrap().is_none());
        let mut step = capture.step(9).unwrap().unwrap();
        let copy = Placement::whole(&[V, D]).replica(process);
        step.unembedding_shard(Floats::Bf16(&unembedding), &copy).unwrap();
        let targets = [process as i32, 5];
        let inputs = MicrobatchInputs {
            tokens: Some(TokenShard { global_shape: &[4], start: &[2 * process], replica: 0 }),
            ..MicrobatchInputs::new(Floats::Bf16(&hidden[2 * D * process..][..2 * D]), &[2, D], Targets::I32(&targets))
        };
        let mut microbatch = step.microbatch(0, &inputs).unwrap();
        let d_lse = [process as f32; 2];
        microbatch.tensor("d_lse", Elements::F32(&d_lse), &Placement::shard(&[4], &[2 * process], &[2])).unwrap();
        microbatch.commit().unwrap();
        // Each process's own sum: a gradient that was never reduced.
        step.finish(Some(Elements::F32(&[process as f32; V * D]))).unwrap();
    }
    let dump = Dump::open(folder.path()).unwrap();
    let step = &dump.runs()[0].steps[&9];
    let loaded = step.problem(0).unwrap();
    let problem = loaded.problem().unwrap();
    let Floats::Bf16(whole) = problem.hidden() else { panic!("bfloat16") };
    assert_eq!(whole, hidden);
    let d_lse = step.microbatches[&0].load("d_lse").unwrap().unwrap().tensor;
    assert_eq!(d_lse.to_f64(), [0.0, 0.0, 1.0, 1.0]);
    let recorded = step.shared.load("d_unembedding").unwrap().unwrap();
    assert_eq!(recorded.copies.len(), 1);
    assert_eq!((recorded.copies[0].process, recorded.copies[0].data.to_f64()), (1, vec![1.0; V * D]));
}

#[test]
fn options_that_make_no_sense_are_refused() {
    let refused = |settings: CaptureOptions, tells: &str| {
        let error = Capture::new(Path::new("nowhere"), settings).unwrap_err();
        assert!(error.to_string().contains(tells), "{tells:?} is not in: {error}");
    };
    refused(options(CaptureSteps::At(vec![])), "empty list");
    refused(options(CaptureSteps::Every(0)), "every 0 steps");
    let sound = || options(CaptureSteps::Every(1));
    refused(CaptureOptions { process_count: 2, ..sound() }, "same run_id on all processes");
    refused(CaptureOptions { process_index: 1, ..sound() }, "less than process_count = 1");
    refused(CaptureOptions { num_microbatches: 0, ..sound() }, "num_microbatches");
    refused(CaptureOptions { run_id: Some("\n".into()), ..sound() }, "run_id");
    refused(CaptureOptions { contract: Some(serde_json::json!({ "logit": "f32" })), ..sound() }, "\"logits\"?");
    let mut loss = LossSettings::default();
    loss.reduction.cotangent = f64::INFINITY;
    refused(CaptureOptions { loss, ..sound() }, "cotangent");
    assert!(!Path::new("nowhere").exists());
}

fn one_microbatch(folder: &Path, verify: bool) -> (StepCapture, MicrobatchCapture) {
    let settings = CaptureOptions { num_microbatches: 1, verify, ..options(CaptureSteps::Every(1)) };
    let step = Capture::new(folder, settings).unwrap().step(0).unwrap().unwrap();
    let inputs = MicrobatchInputs::new(Floats::F32(&[0.5; 8]), &[2, 4], Targets::I32(&[0, 1]));
    let microbatch = step.microbatch(0, &inputs).unwrap();
    (step, microbatch)
}

#[test]
fn calls_out_of_order_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (step, mut microbatch) = one_microbatch(folder.path(), true);
    let gradient = MicrobatchOutputs { d_unembedding: Some(Elements::F32(&[0.0; 8])), ..Default::default() };
    let error = microbatch.outputs(&gradient).unwrap_err();
    assert!(error.to_string().contains("no unembedding was recorded"), "{error}");
    let error = step.finish(None).unwrap_err();
    assert!(error.to_string().contains("microbatch 0: it is not committed"), "{error}");
    microbatch.commit().unwrap();
    let again = Capture::new(folder.path(), options(CaptureSteps::Every(1))).unwrap().step(0).unwrap().unwrap();
    let inputs = MicrobatchInputs::new(Floats::F32(&[0.5; 8]), &[2, 4], Targets::I32(&[0, 1]));
    assert_eq!(again.microbatch(0, &inputs).unwrap_err().kind(), DumpErrorKind::Committed);
    assert_eq!(again.microbatch(2, &inputs).unwrap_err().kind(), DumpErrorKind::Settings);
    let flat = MicrobatchInputs::new(Floats::F32(&[0.5; 8]), &[], Targets::I32(&[0, 1]));
    assert_eq!(again.microbatch(1, &flat).unwrap_err().kind(), DumpErrorKind::Data);
}

#[test]
fn what_is_dropped_before_its_commit_is_interrupted() {
    let folder = tempfile::tempdir().unwrap();
    let (step, microbatch) = one_microbatch(folder.path(), false);
    microbatch.commit().unwrap();
    drop(step);
    let dump = Dump::open(folder.path()).unwrap();
    assert_eq!(dump.runs()[0].interrupted, [Path::new("proc_00000/step_00000000/shared")]);
}

#[test]
fn verification_catches_a_byte_that_the_disk_changed() {
    for verify in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let (step, microbatch) = one_microbatch(folder.path(), verify);
        let path = folder.path().join("proc_00000/step_00000000/mb_0000");
        let payload = path.join("hidden.0.npy");
        let mut bytes = fs::read(&payload).unwrap();
        *bytes.last_mut().unwrap() ^= 0x40;
        fs::write(&payload, bytes).unwrap();
        let result = microbatch.commit();
        assert_eq!(path.join("manifest.json").exists(), !verify);
        match result {
            Err(error) => {
                assert!(verify && error.kind() == DumpErrorKind::RoundTrip, "{error}");
                assert!(error.to_string().contains("hidden.0.npy") && error.to_string().contains("uncommitted again"), "{error}");
                assert!(step.finish(None).is_err());
            }
            Ok(()) => assert!(!verify),
        }
    }
}
