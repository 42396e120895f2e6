//! Dumps that are sound, but not whole or not alone: interrupted captures, absent processes, several runs.

use crate::support::{file, fresh, id, ramp};
use fused_xent::dump::*;
use std::fs;
use std::path::{Path, PathBuf};

fn interrupt(root: &Path, process: usize, part: &str) {
    fs::remove_file(file(root, process, part, "manifest.json")).unwrap();
}

#[test]
fn an_interrupted_folder_spoils_its_microbatch_only() {
    let folder = fresh();
    let root = folder.path();
    interrupt(root, 1, "mb_0001");
    let dump = Dump::open(root).unwrap();
    let run = &dump.runs()[0];
    assert_eq!(run.interrupted, [PathBuf::from("proc_00001/step_00000000/mb_0001")]);
    let step = &run.steps[&0];
    assert_eq!(step.microbatches.keys().collect::<Vec<_>>(), [&0]);
    let [incomplete] = step.incomplete.as_slice() else { panic!("one folder is not whole") };
    assert_eq!((incomplete.microbatch, incomplete.folder.to_str()), (Some(1), Some("step_00000000/mb_0001")));
    assert!(incomplete.reason.contains("hidden lacks [1..2, 0..3, 0..4]"), "{}", incomplete.reason);
    assert!(incomplete.reason.ends_with("not committed on process 1"), "{}", incomplete.reason);
    step.problem(0).unwrap().problem().unwrap();
    let error = step.problem(1).unwrap_err();
    assert!(error.to_string().contains("not committed on process 1"), "{error}");
    let report = verify(root, &mut |_, _| {}).unwrap();
    assert!(report.problems.is_empty(), "{:?}", report.problems);
    assert_eq!((report.folders, report.interrupted.len(), report.incomplete.len()), (5, 1, 1));
}

#[test]
fn a_microbatch_that_nobody_committed_is_incomplete() {
    let folder = fresh();
    for process in 0..2 {
        fs::remove_dir_all(file(folder.path(), process, "mb_0000", "")).unwrap();
    }
    let dump = Dump::open(folder.path()).unwrap();
    let step = &dump.runs()[0].steps[&0];
    assert!(dump.runs()[0].interrupted.is_empty());
    assert_eq!(step.incomplete[0].reason, "not committed on any process");
    assert!(step.microbatches.contains_key(&1));
}

#[test]
fn a_shared_folder_lacking_shards_fails_by_name_when_they_are_needed() {
    let folder = fresh();
    let root = folder.path();
    // The copies of process 1 go, and nothing is lost; the originals of process 0 go, and the tensor is.
    interrupt(root, 1, "shared");
    let dump = Dump::open(root).unwrap();
    assert!(dump.runs()[0].steps[&0].incomplete.is_empty());
    dump.runs()[0].steps[&0].problem(0).unwrap();
    let folder = fresh();
    interrupt(folder.path(), 0, "shared");
    let dump = Dump::open(folder.path()).unwrap();
    let step = &dump.runs()[0].steps[&0];
    assert_eq!(step.incomplete[0].microbatch, None);
    let error = step.unembedding().unwrap_err();
    assert_eq!(error.kind(), DumpErrorKind::Incomplete);
    assert!(error.to_string().contains("not committed on process 0"), "{error}");
}

#[test]
fn a_recorded_output_may_be_left_out_where_others_tile_it() {
    let folder = tempfile::tempdir().unwrap();
    for process in 0..2 {
        let mut writer = FolderWriter::create(folder.path(), id(process, Some(0))).unwrap();
        let place = Placement::shard(&[2, 4], &[process, 0], &[1, 4]);
        writer.tensor("hidden", Elements::Bf16(&ramp(4, process)), &place).unwrap();
        if process == 1 {
            writer.tensor("d_hidden", Elements::F64(&[1.0; 8]), &Placement::whole(&[2, 4])).unwrap();
        }
        writer.commit().unwrap();
    }
    let dump = Dump::open(folder.path()).unwrap();
    let mb = &dump.runs()[0].steps[&0].microbatches[&0];
    assert_eq!(mb.load("d_hidden").unwrap().unwrap().tensor.to_f64(), [1.0; 8]);
}

#[test]
fn several_runs_are_kept_apart() {
    let folder = fresh();
    let root = folder.path();
    interrupt(root, 0, "mb_0001");
    let id = FolderId { run_id: "later".into(), step: 3, process_count: 1, num_microbatches: 1, ..id(0, Some(0)) };
    let mut writer = FolderWriter::create(root, id).unwrap();
    writer.tensor("targets", Elements::U32(&[1, 2]), &Placement::whole(&[2])).unwrap();
    writer.commit().unwrap();
    fs::create_dir_all(root.join("proc_00000/step_00000003/shared")).unwrap();
    let dump = Dump::open(root).unwrap();
    let [later, run] = dump.runs() else { panic!("two runs") };
    assert_eq!((later.run_id.as_str(), run.run_id.as_str()), ("later", "run"));
    assert_eq!((later.process_count, run.process_count), (1, 2));
    assert_eq!(later.steps.keys().collect::<Vec<_>>(), [&3]);
    assert_eq!(later.interrupted, [PathBuf::from("proc_00000/step_00000003/shared")]);
    assert_eq!(run.interrupted, [PathBuf::from("proc_00000/step_00000000/mb_0001")]);
}

#[test]
fn dumps_are_found_at_a_path_or_beneath_it() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    for name in ["b", "a"] {
        let mut writer = FolderWriter::create(&root.join(name), id(0, None)).unwrap();
        writer.tensor("unembedding", Elements::Bf16(&ramp(4, 0)), &Placement::whole(&[2, 2])).unwrap();
        writer.commit().unwrap();
    }
    fs::create_dir(root.join("c")).unwrap();
    assert_eq!(find_dumps(root).unwrap(), [root.join("a"), root.join("b")]);
    assert_eq!(find_dumps(&root.join("a")).unwrap(), [root.join("a")]);
    assert!(find_dumps(&root.join("c")).is_err());
}

#[test]
fn verify_lists_every_problem_and_tells_its_progress() {
    let folder = fresh();
    let root = folder.path();
    fs::remove_file(file(root, 0, "mb_0000", "targets.0.npy")).unwrap();
    fs::write(file(root, 1, "mb_0001", "hidden.0.npy"), b"\x93NUMPY").unwrap();
    fs::write(file(root, 1, "shared", "manifest.json"), b"{").unwrap();
    let mut calls = Vec::new();
    let report = verify(root, &mut |done, total| calls.push((done, total))).unwrap();
    let mut kinds: Vec<_> = report.problems.iter().map(|p| p.kind()).collect();
    kinds.sort_by_key(|k| format!("{k:?}"));
    assert_eq!(kinds, [DumpErrorKind::Json, DumpErrorKind::Length, DumpErrorKind::MissingFile]);
    assert_eq!((report.folders, report.files), (5, 18));
    assert_eq!(calls.first().unwrap().0, 0);
    assert_eq!(calls.last().unwrap().0, report.bytes);
    assert!(calls.is_sorted() && calls.iter().all(|c| c.1 == report.bytes));
}

#[test]
fn a_writer_goes_over_what_an_interrupted_capture_left() {
    let folder = fresh();
    let root = folder.path();
    interrupt(root, 0, "mb_0000");
    fs::write(file(root, 0, "mb_0000", ".writing-left"), b"half a file").unwrap();
    let mut writer = FolderWriter::create(root, id(0, Some(0))).unwrap();
    let place = Placement::shard(&[2, 3, 4], &[0, 0, 0], &[1, 3, 4]);
    writer.tensor("hidden", Elements::Bf16(&ramp(12, 20)), &place).unwrap();
    let place = Placement::shard(&[2, 3], &[0, 0], &[1, 3]);
    writer.tensor("targets", Elements::I32(&[1, 1, 1]), &place).unwrap();
    writer.tensor("token_weights", Elements::F32(&[1.0; 3]), &place).unwrap();
    let error = FolderWriter::create(root, id(0, Some(0))).map(|_| "an uncommitted folder may be begun again");
    assert!(error.is_ok());
    writer.commit().unwrap();
    let dump = Dump::open(root);
    // The other process still records d_hidden, of which this one now has no part.
    let hole = dump.unwrap_err();
    assert!(hole.to_string().contains("d_hidden: no shard of replica 0 covers [0..1, 0..3, 0..4]"), "{hole}");
}
