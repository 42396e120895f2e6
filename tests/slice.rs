//! Slices: valid dumps, in which what is kept is judged as before, and which are as small as the divergence allows.

use assert_cmd::Command;
use fused_xent::diff::fault::Fault;
use fused_xent::diff::synth::{SynthOptions, synth};
use fused_xent::diff::{Candidate, Settings, judge};
use fused_xent::dump::{Dump, Elements, FolderId, FolderWriter, LossSettings, MicrobatchGradients, Placement, verify};
use fused_xent::kernels::contract::Precision;
use fused_xent::kernels::problem::Layout;
use fused_xent::kernels::reduction::{Denominator, Microbatches, Reduction, StepReduction};
use fused_xent::report::model::{CandidateReport, Report, Verdict};
use fused_xent::slice::{Request, Sliced, cut, smallest};
use half::bf16;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

fn small() -> SynthOptions {
    SynthOptions { tokens: 48, hidden: 16, vocab: 100, gradients: Precision::F32, ..SynthOptions::default() }
}

/// A folder with the dump that `options` describe, and the place for a slice of it.
fn make(options: &SynthOptions) -> (TempDir, PathBuf, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let (dump, out) = (folder.path().join("dump"), folder.path().join("slice"));
    synth(&dump, options, &()).unwrap();
    (folder, dump, out)
}

/// The verdict on what a sound dump recorded.
fn recorded(path: &Path) -> Report {
    let report = verify(path, &mut |_, _| {}).unwrap();
    assert!(report.problems.is_empty() && report.incomplete.is_empty() && report.warnings.is_empty(), "{report:?}");
    judge(path, &Settings { candidates: vec![Candidate::Recorded], ..Settings::default() }, &()).unwrap()
}

fn causes(candidate: &CandidateReport) -> Vec<&str> {
    candidate.findings.iter().map(|f| f.cause.as_str()).collect()
}

fn search(options: SynthOptions) -> (TempDir, Sliced, Report) {
    let (folder, dump, out) = make(&options);
    let sliced = smallest(&dump, &out, &()).unwrap();
    let report = recorded(&out);
    let (whole, slice) = (&recorded(&dump).candidates[0], &report.candidates[0]);
    assert_eq!((slice.verdict, causes(slice)), (Verdict::Diverge, causes(whole)));
    assert_eq!(sliced.shown.as_ref().unwrap().causes, causes(slice));
    let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "nothing else is left there: {left:?}");
    (folder, sliced, report)
}

#[test]
fn a_fault_that_one_token_shows_is_cut_down_to_few() {
    let (folder, sliced, report) = search(SynthOptions { processes: 3, ..small() }.planting(Fault::LabelMissing));
    assert!(sliced.tokens <= 2 && sliced.of_tokens == 48, "{sliced:?}");
    assert_eq!(sliced.cut.microbatch, Some(0));
    let dropped: Vec<&str> = sliced.dropped.iter().map(|d| d.tensor.as_str()).collect();
    assert_eq!(dropped, ["shared/d_unembedding", "d_unembedding"]);
    assert_eq!((report.dump.processes, report.candidates[0].microbatches[0].tokens), (1, sliced.tokens));
    assert!(report.candidates[0].accumulated.is_none());
    let opened = Dump::open(&folder.path().join("slice")).unwrap();
    let step = &opened.runs()[0].steps[&0];
    let (_, note) = step.microbatches[&0].extra().next().unwrap();
    let range = &sliced.cut.tokens.as_ref().unwrap()[0];
    assert_eq!(note["slice_of"]["tokens"], json!([[range.start, range.end]]));
    assert_eq!(note["slice_of"]["microbatch"], 0);
    assert_eq!(note["slice_of"]["num_microbatches"], 2);
    assert_eq!(note["slice_of"]["dropped"], json!(["d_unembedding"]));
}

#[test]
fn what_a_divergence_needs_is_kept() {
    // dK alone is wrong: every token is needed, but not the other microbatch.
    let (_folder, sliced, _) = search(small().planting(Fault::DkCotangentMissing { factor: 8.0 }));
    assert_eq!((sliced.cut.microbatch, sliced.cut.tokens), (Some(0), None));
    // The scales of the microbatches differ: one of them looks like another fault.
    let (_folder, sliced, _) = search(SynthOptions { masked: 0.4, microbatches: 3, ..small() }.planting(Fault::MeanOfMeans));
    assert_eq!((sliced.cut.microbatch, sliced.dropped.len()), (None, 0));
    // It is in what accumulates alone.
    let (_folder, sliced, _) = search(small().planting(Fault::LastMicrobatchOnly));
    assert_eq!((sliced.cut.microbatch, sliced.shown.unwrap().stage.as_str()), (None, "accumulated_d_unembedding"));
}

/// In any loss, a token's gradient is what it was: healthy ones stay so, and another factor would be seen.
#[test]
fn cotangents_are_kept() {
    let denominators = [Denominator::Valid, Denominator::Tokens, Denominator::Given(77.0)];
    for microbatches in [Microbatches::Mean, Microbatches::Sum, Microbatches::Global] {
        for (i, denominator) in denominators.into_iter().enumerate() {
            for microbatch_gradients in [MicrobatchGradients::Own, MicrobatchGradients::Step] {
                let reduction = if i == 2 && microbatches == Microbatches::Sum { Reduction::Sum } else { Reduction::Mean };
                let nothing = (i, microbatches, microbatch_gradients) == (1, Microbatches::Global, MicrobatchGradients::Own);
                let cotangent = if nothing { 0.0 } else { 0.3 };
                let reduction = StepReduction { reduction, denominator, microbatches, cotangent };
                let loss = LossSettings { reduction, microbatch_gradients, ..LossSettings::default() };
                let options = SynthOptions { weights: true, masked: 0.3, microbatches: 3, loss, tokens: 30, ..small() };
                let (_folder, dump, out) = make(&options);
                for tokens in [None, Some(vec![3..11, 20..21, 5..7])] {
                    let request = Request { microbatch: Some(1), tokens: tokens.clone(), ..Request::default() };
                    let sliced = cut(&dump, &out, &request).unwrap();
                    let report = recorded(&out);
                    assert_eq!(report.verdict, Verdict::Agree, "{loss:?} {tokens:?}");
                    assert_eq!(report.candidates[0].microbatches[0].tokens, if tokens.is_some() { 9 } else { 30 });
                    assert_eq!(sliced.tokens, report.candidates[0].microbatches[0].tokens);
                    let stages = report.candidates[0].microbatches[0].tensors.iter().map(|t| t.name.as_str());
                    assert_eq!(stages.filter(|name| name.starts_with("d_unembedding")).count(), usize::from(tokens.is_none()));
                    same_rows(&dump, &out, tokens.map(|_| vec![3, 4, 5, 6, 7, 8, 9, 10, 20]));
                    if !nothing {
                        in_manifests(&out, |loss| loss["cotangent"] = (loss["cotangent"].as_f64().unwrap() * 1.01).into());
                        assert_eq!(recorded(&out).verdict, Verdict::Diverge, "{loss:?}");
                    }
                    fs::remove_dir_all(&out).unwrap();
                }
            }
        }
    }
}

/// Changes the loss in every manifest of step 0 of process 0.
fn in_manifests(root: &Path, change: impl Fn(&mut Value)) {
    for part in fs::read_dir(root.join("proc_00000/step_00000000")).unwrap() {
        let path = part.unwrap().path().join("manifest.json");
        let mut manifest: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        change(&mut manifest["loss"]);
        fs::write(&path, manifest.to_string()).unwrap();
    }
}

#[test]
fn tokens_of_a_denominator_of_nothing_are_cut_too() {
    let (_folder, dump, out) = make(&SynthOptions { tokens: 5, masked: 0.99, microbatches: 2, ..small() });
    cut(&dump, &out, &Request { microbatch: Some(1), tokens: Some(vec![1..2, 2..3]), ..Request::default() }).unwrap();
    let report = recorded(&out);
    let microbatch = &report.candidates[0].microbatches[0];
    assert_eq!((report.verdict, microbatch.tokens, microbatch.valid_tokens), (Verdict::Agree, 2, 0));
}

/// Every tensor over tokens of the slice is that of microbatch 1, or these rows of it.
fn same_rows(dump: &Path, out: &Path, rows: Option<Vec<usize>>) {
    let (from, to) = (Dump::open(dump).unwrap(), Dump::open(out).unwrap());
    let (from, to) = (&from.runs()[0].steps[&0], &to.runs()[0].steps[&0]);
    assert_eq!(to.num_microbatches, 1);
    for info in to.microbatches[&0].tensors() {
        let load = |folder: &fused_xent::dump::Folder| folder.load(&info.name).unwrap().unwrap().tensor;
        let (whole, slice) = (load(&from.microbatches[&1]), load(&to.microbatches[&0]));
        assert_eq!(whole.dtype(), slice.dtype());
        let width = whole.len() / whole.shape()[0];
        let values = whole.to_f64();
        let expected = match &rows {
            Some(rows) => rows.iter().flat_map(|&n| values[n * width..(n + 1) * width].to_vec()).collect(),
            None => values,
        };
        assert_eq!(slice.to_f64(), expected, "{}", info.name);
    }
    assert_eq!(from.unembedding().unwrap().to_f64(), to.unembedding().unwrap().to_f64());
}

/// Two processes with a batch each, K stored [D, V], and copies of dK that differ.
fn copies(root: &Path) {
    let numbers = |n: usize| -> Vec<bf16> { (0..n).map(|i| bf16::from_f64(((i * 7) % 23) as f64 / 16.0 - 0.7)).collect() };
    for process_index in 0..2 {
        for microbatch in [None, Some(0)] {
            let id = FolderId {
                run_id: "r".into(),
                producer: "test".into(),
                step: 5,
                microbatch,
                num_microbatches: 1,
                process_index,
                process_count: 2,
                loss: LossSettings::default(),
            };
            let mut writer = FolderWriter::create(root, id).unwrap();
            writer.extra(json!({ "host": process_index }));
            writer.contract(json!({ "dlogits": "f32" })).unwrap();
            let of_k = Placement::whole(&[4, 6]).layout(Layout::Dv);
            if microbatch.is_none() {
                writer.tensor("unembedding", Elements::Bf16(&numbers(24)), &of_k.replica(process_index)).unwrap();
            } else {
                let part = |row: &[usize]| {
                    let shape = |batch: usize| [&[batch, 3][..], row].concat();
                    let start: Vec<usize> = std::iter::once(process_index).chain([0; 2]).take(2 + row.len()).collect();
                    Placement::shard(&shape(2), &start, &shape(1))
                };
                writer.tensor("hidden", Elements::Bf16(&numbers(12)), &part(&[4])).unwrap();
                writer.tensor("targets", Elements::I64(&[0, 5, -100]), &part(&[])).unwrap();
                writer.tensor("d_hidden", Elements::F64(&[process_index as f64; 12]), &part(&[4])).unwrap();
                let dk = [1.0 + process_index as f32; 24];
                writer.tensor("d_unembedding", Elements::F32(&dk), &of_k.replica(process_index)).unwrap();
                writer.unembedding_from_shared().unwrap();
            }
            writer.commit().unwrap();
        }
    }
}

#[test]
fn copies_that_differ_batches_and_layouts_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let (dump, out) = (folder.path().join("dump"), folder.path().join("slice"));
    copies(&dump);
    cut(&dump, &out, &Request { step: Some(5), run: Some("r".into()), ..Request::default() }).unwrap();
    let names = |report: &Report| report.candidates.iter().map(|c| c.candidate.clone()).collect::<Vec<_>>();
    let (before, after) = (recorded(&dump), recorded(&out));
    assert_eq!(names(&before), ["recorded", "recorded:process-1"]);
    let figures = |report: &Report| serde_json::to_value(&report.candidates).unwrap();
    assert_eq!(figures(&before), figures(&after));
    let opened = Dump::open(&out).unwrap();
    let step = &opened.runs()[0].steps[&5];
    assert_eq!(step.microbatches[&0].info("hidden").unwrap().global_shape, [2, 3, 4]);
    assert_eq!(step.microbatches[&0].contract(), Some(&json!({ "dlogits": "f32" })));
    assert_eq!(step.shared.extra().next().unwrap().1["slice_of"]["extra"], json!({ "host": 0 }));
    assert_eq!(step.unembedding().unwrap().layout(), Layout::Dv);

    let tokens = folder.path().join("tokens");
    cut(&dump, &tokens, &Request { tokens: Some(vec![4..5, 2..4]), ..Request::default() }).unwrap();
    let opened = Dump::open(&tokens).unwrap();
    let mb = &opened.runs()[0].steps[&5].microbatches[&0];
    assert_eq!(mb.info("hidden").unwrap().global_shape, [3, 4]);
    assert_eq!(mb.load("targets").unwrap().unwrap().tensor.to_f64(), [-100.0, 0.0, 5.0]);
    let d_hidden = mb.load("d_hidden").unwrap().unwrap().tensor;
    assert_eq!((d_hidden.dtype().name(), d_hidden.to_f64()), ("float64", [[0.0; 4], [1.0; 4], [1.0; 4]].concat()));
    assert!(mb.info("d_unembedding").is_none());
}

const BINARY: &str = env!("CARGO_BIN_EXE_xent-diff");

fn xent_diff(at: &Path, arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(BINARY).current_dir(at).args(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn the_command_says_what_it_cut_and_refuses_what_it_cannot() {
    let (folder, dump, _) = make(&SynthOptions { microbatches: 3, ..small() }.planting(Fault::LabelMissing));
    let at = folder.path();
    synth(&at.join("healthy"), &small(), &()).unwrap();
    let (code, out, err) = xent_diff(at, &["slice", "dump", "small"]);
    assert_eq!((code, err.as_str()), (Some(0), ""), "{out}");
    for words in ["small: written", "microbatch 0", "of 48 tokens", "a sum over all tokens", "cause label-missing"] {
        assert!(out.contains(words), "{words}: {out}");
    }
    assert_eq!(xent_diff(at, &["small", "--candidate", "recorded", "-q"]).0, Some(1));
    let (code, out, _) = xent_diff(at, &["slice", "dump", "given", "--microbatch", "2", "--tokens", "3..5,40", "--quiet"]);
    assert_eq!((code, out.as_str()), (Some(0), ""));
    assert_eq!(
        Dump::open(&at.join("given")).unwrap().runs()[0].steps[&0].microbatches[&0].info("loss").unwrap().global_shape,
        [3]
    );

    let refused = |arguments: &[&str], what: &str| {
        let (code, out, err) = xent_diff(at, &[&["slice"], arguments].concat());
        assert_eq!((code, out.as_str()), (Some(2), ""), "{arguments:?}: {err}");
        assert!(err.contains(what), "{arguments:?}: {err}");
        assert!(!at.join("new").exists());
        let left = fs::read_dir(at).unwrap().filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().starts_with('.'));
        assert_eq!(left.count(), 0, "{arguments:?}");
    };
    refused(&["dump", "small"], "it exists already");
    refused(&["dump", "no/new"], "cannot be written");
    refused(&["healthy", "new"], "diverge nowhere");
    refused(&["missing", "new"], "missing");
    refused(&["dump", "new", "--step", "7"], "it has step 0 of run");
    refused(&["dump", "new", "--run", "x"], "it has step 0 of run");
    refused(&["dump", "new", "--microbatch", "3"], "the step has 3 microbatches");
    refused(&["dump", "new", "--tokens", "1..2"], "give --microbatch");
    refused(&["dump", "new", "--microbatch", "0", "--tokens", "40..49"], "rows in [0, 48)");
    refused(&["dump", "new", "--microbatch", "0", "--tokens", "0..18446744073709551615"], "rows in [0, 48)");
    refused(&["dump", "new", "--tokens", "5..5"], "neither a row");
    refused(&["dump", "new", "--tokens", "18446744073709551615"], "neither a row");
    refused(&["dump", "new", "--vocab", "0..5"], "--vocab");
    synth(&at.join("later"), &SynthOptions { step: 1, ..small() }, &()).unwrap();
    fs::rename(at.join("later/proc_00000/step_00000001"), dump.join("proc_00000/step_00000001")).unwrap();
    refused(&["dump", "new", "--microbatch", "0"], "give --step");
    fs::remove_dir_all(dump.join("proc_00000/step_00000001")).unwrap();
    // Under one denominator over the step, a microbatch that is not there is missed.
    in_manifests(&dump, |loss| loss["microbatches"] = "global".into());
    fs::remove_dir_all(dump.join("proc_00000/step_00000000/mb_0002")).unwrap();
    refused(&["dump", "new", "--microbatch", "0"], "2 of 3 microbatches");
}
