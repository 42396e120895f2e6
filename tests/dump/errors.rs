//! One damaged dump per way of damaging it: which error, where, and what it tells.

use crate::support::{file, fresh, id, ramp, write};
use fused_xent::dump::*;
use fused_xent::kernels::problem::Layout;
use serde_json::{Value, json};
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

/// Reads everything, as far as it goes.
fn read_all(root: &Path) -> Result<(), DumpError> {
    let dump = Dump::open(root)?;
    for step in dump.runs().iter().flat_map(|run| run.steps.values()) {
        for folder in step.microbatches.values().chain([&step.shared]) {
            for tensor in folder.tensors() {
                folder.load(&tensor.name)?;
            }
        }
        for m in step.microbatches.keys() {
            step.problem(*m)?.problem()?;
        }
    }
    Ok(())
}

/// Damages the small dump and checks what reading it says; `verify` must find the same.
fn expect(damage: impl FnOnce(&Path), kind: DumpErrorKind, tells: &[&str]) -> DumpError {
    let folder = fresh();
    read_all(folder.path()).expect("the dump is sound before it is damaged");
    damage(folder.path());
    let error = read_all(folder.path()).expect_err("damage must be found");
    let text = error.to_string();
    assert_eq!(error.kind(), kind, "{text}");
    for part in tells {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
    let report = verify(folder.path(), &mut |_, _| {}).unwrap();
    assert!(report.problems.iter().any(|p| p.kind() == kind), "{:?}", report.problems);
    error
}

fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

fn manifest(root: &Path) -> PathBuf {
    file(root, 1, "mb_0000", "manifest.json")
}

/// Changes the manifest of process 1's first microbatch.
fn in_manifest(change: impl FnOnce(&mut Value)) -> impl FnOnce(&Path) {
    move |root: &Path| edit(&manifest(root), change)
}

/// Changes the entry of tensor `name` there. Sizes and checksums are dropped, so that what lies behind them is reached.
fn in_tensor(name: &'static str, change: impl FnOnce(&mut Value)) -> impl FnOnce(&Path) {
    in_manifest(move |m| {
        let entries = m["tensors"].as_array_mut().unwrap();
        let entry = entries.iter_mut().find(|t| t["name"] == name).unwrap();
        let shard = entry["shards"][0].as_object_mut().unwrap();
        shard.remove("bytes");
        shard.remove("blake3");
        change(entry);
    })
}

/// Replaces the payload of process 1's first `name` by other bytes, which the manifest does not check.
fn in_payload(name: &'static str, change: impl FnOnce(&mut Vec<u8>)) -> impl FnOnce(&Path) {
    move |root: &Path| {
        in_tensor(name, |_| ())(root);
        let path = file(root, 1, "mb_0000", &format!("{name}.0.npy"));
        let mut bytes = fs::read(&path).unwrap();
        change(&mut bytes);
        fs::write(path, bytes).unwrap();
    }
}

/// Replaces `from` by `to`, of the same length, in a payload's header.
fn replace(bytes: &mut [u8], from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
}

const MB: &str = "proc_00001/step_00000000/mb_0000";

#[test]
fn members() {
    use DumpErrorKind::*;
    expect(in_manifest(|m| m["num_microbatch"] = json!(2)), UnknownMember, &[MB, "\"num_microbatch\"", "\"num_microbatches\"?"]);
    expect(in_manifest(|m| m["loss"]["logit_sofcap"] = json!(2)), UnknownMember, &["loss", "\"logit_softcap\"?"]);
    expect(
        in_tensor("hidden", |t| t["shards"][0]["replika"] = json!(2)),
        UnknownMember,
        &["tensors[0].shards[0]", "\"replica\"?"],
    );
    expect(in_tensor("hidden", |t| t["from"] = json!("shared")), Value, &["tensors[0]", "from"]);
    expect(in_manifest(|m| m["contract"] = json!({ "dlogit": "bf16" })), UnknownMember, &["contract", "\"dlogits\"?"]);
    expect(in_manifest(|m| m["contract"] = json!({ "dlogits": "bf15" })), Value, &["contract: dlogits", "bf15", "bf16x2"]);
    expect(in_manifest(|m| _ = m.as_object_mut().unwrap().remove("step")), Value, &["step", "missing"]);
    expect(in_manifest(|m| m["loss"]["reduction"] = json!("avg")), Value, &["loss: reduction", "avg", "\"mean\", \"sum\""]);
    expect(in_manifest(|m| m["loss"]["denominator"] = json!(0)), Value, &["denominator", "above 0"]);
    expect(in_manifest(|m| m["loss"]["logit_scale"] = json!(null)), Value, &["logit_scale", "null", "a number"]);
    expect(in_manifest(|m| m["loss"]["label_smoothing"] = json!(1.5)), Value, &["label_smoothing", "1.5", "[0, 1)"]);
    expect(in_manifest(|m| m["run_id"] = json!("a\u{1b}[2J")), Value, &["run_id", "control"]);
    expect(in_tensor("hidden", |t| t["layout"] = json!("dv")), Value, &["layout", "only unembedding"]);
    expect(in_tensor("hidden", |t| t["shards"][0]["blake3"] = json!("12")), Value, &["blake3", "64 hexadecimal"]);
    expect(in_tensor("hidden", |t| t["global_shape"] = json!([2, -3, 4])), Value, &["global_shape", "whole number"]);
}

#[test]
fn manifests() {
    use DumpErrorKind::*;
    let json = |text: &'static str| move |root: &Path| fs::write(manifest(root), text).unwrap();
    let error = expect(json("{\"format\": "), Json, &[MB, "line 1"]);
    assert!(error.source().unwrap().is::<serde_json::Error>());
    expect(json("{\"format\": \"xent-dump\", \"format\": \"xent-dump\"}"), Json, &["\"format\" stands twice"]);
    expect(json("\u{feff}{}"), Json, &[]);
    expect(|root| fs::write(manifest(root), "[".repeat(100_000)).unwrap(), Json, &["recursion"]);
    expect(json("[]"), Value, &["an object"]);
    expect(in_manifest(|m| m["version"] = json!(2)), Version, &["version is 2", "version 1"]);
    expect(in_manifest(|m| m["format"] = json!("safetensors")), Version, &["safetensors", "xent-dump"]);
    expect(in_manifest(|m| m["microbatch"] = json!(1)), Identity, &["mb_0001", "mb_0000"]);
    expect(in_manifest(|m| m["microbatch"] = json!(2)), Value, &["microbatch", "less than num_microbatches = 2"]);
    expect(in_manifest(|m| m["process_index"] = json!(2)), Value, &["process_index", "less than process_count = 2"]);
    expect(in_manifest(|m| m["num_microbatches"] = json!(u64::MAX)), Value, &["num_microbatches", "1 to 65536"]);
    expect(in_manifest(|m| m["num_microbatches"] = json!(3)), Disagreement, &["num_microbatches", "3", "2, as"]);
    expect(in_manifest(|m| m["process_count"] = json!(3)), Disagreement, &["process_count"]);
    expect(in_manifest(|m| m["loss"]["z_loss"] = json!(1e-4)), Disagreement, &["loss", "0.0001"]);
    expect(
        |root| {
            edit(&manifest(root), |m| m["contract"] = json!({ "logits": "f32" }));
            edit(&file(root, 0, "mb_0000", "manifest.json"), |m| m["contract"] = json!({ "logits": "bf16" }));
        },
        Disagreement,
        &["contract", "f32", "bf16"],
    );
    let wide = " ".repeat((64 << 20) + 1);
    expect(move |root| fs::write(manifest(root), wide).unwrap(), TooLarge, &["67108864"]);
}

#[test]
fn tensors() {
    use DumpErrorKind::*;
    expect(in_tensor("hidden", |t| t["name"] = json!("hiden")), TensorName, &["\"hiden\"", "\"hidden\"?"]);
    expect(in_manifest(|m| m["tensors"][1] = m["tensors"][0].clone()), Duplicate, &["hidden is listed twice"]);
    expect(in_tensor("d_hidden", |t| t["shards"][0]["file"] = json!("hidden.0.npy")), Duplicate, &["\"hidden.0.npy\""]);
    expect(in_tensor("targets", |t| t["dtype"] = json!("float32")), Dtype, &["targets", "float32", "int32 or int64 or uint32"]);
    expect(in_tensor("hidden", |t| t["dtype"] = json!("bfloat")), Dtype, &["\"bfloat\"", "\"bfloat16\"?"]);
    expect(in_tensor("hidden", |t| t["dtype"] = json!("float32")), Disagreement, &["hidden", "float32", "bfloat16"]);
    expect(in_tensor("hidden", |t| t["global_shape"] = json!([24])), Shape, &["hidden", "1 dimensions", "[tokens, D]"]);
    expect(in_tensor("hidden", |t| t["shards"][0]["start"] = json!([2, 0, 0])), Shape, &["start [2, 0, 0]", "[2, 3, 4]"]);
    expect(in_tensor("hidden", |t| t["shards"][0]["start"] = json!([u64::MAX, 0, 0])), Shape, &["start"]);
    expect(in_tensor("hidden", |t| t["global_shape"] = json!([1u64 << 40, 1u64 << 40, 4])), TooLarge, &["1099511627776"]);
    expect(
        |root| {
            let path = file(root, 1, "shared", "manifest.json");
            edit(&path, |m| {
                let entry = m["tensors"][0].as_object_mut().unwrap();
                entry.remove("layout");
                entry.insert("name".into(), json!("hidden"));
            });
        },
        TensorName,
        &["hidden", "shared"],
    );
    // Two processes that agree on a shape which does not fit the other tensors.
    expect(
        |root| {
            for process in 0..2 {
                let path = file(root, process, "mb_0000", "manifest.json");
                edit(&path, |m| m["tensors"][2]["global_shape"] = json!([2, 4]));
            }
        },
        Shape,
        &["targets", "tokens [2, 4]", "tokens [2, 3], as hidden"],
    );
    // [V, D] said to be [D, V]: only the other folder shows it.
    expect(
        |root| {
            for process in 0..2 {
                let path = file(root, process, "shared", "manifest.json");
                edit(&path, |m| (0..2).for_each(|t| m["tensors"][t]["layout"] = json!("dv")));
            }
        },
        Shape,
        &["unembedding", "D 5", "D 4"],
    );
    expect(in_tensor("hidden", |t| t["shards"] = vec![t["shards"][0].clone(); 20_000].into()), TooLarge, &["20000 shards"]);
}

#[test]
fn file_names_stay_in_their_folder() {
    use DumpErrorKind::*;
    for name in
        ["../mb_0001/hidden.0.npy", "/etc/passwd", "a/b.npy", "..", "a\\b.npy", ".hidden.npy", "hidden.0.npz", "C:x.npy", ""]
    {
        expect(in_tensor("hidden", move |t| t["shards"][0]["file"] = json!(name)), FileName, &["hidden", "own folder"]);
    }
    let link = |name: &'static str| {
        move |root: &Path| {
            let path = file(root, 1, "mb_0000", name);
            let elsewhere = root.join("elsewhere");
            fs::rename(&path, &elsewhere).unwrap();
            std::os::unix::fs::symlink(elsewhere, path).unwrap();
        }
    };
    expect(link("hidden.0.npy"), FileName, &["hidden", "symbolic link"]);
    expect(link("manifest.json"), FileName, &["manifest", "symbolic link"]);
    expect(|root| fs::rename(root.join("proc_00001"), root.join("proc_1")).unwrap(), FolderName, &["proc_1", "proc_00001"]);
    let misnamed = |root: &Path| fs::create_dir(file(root, 1, "mb_x", "")).unwrap();
    expect(misnamed, FolderName, &["mb_x", "mb_0000"]);
}

#[test]
fn payloads() {
    use DumpErrorKind::*;
    let path = |root: &Path| file(root, 1, "mb_0000", "hidden.0.npy");
    let error = expect(|root| fs::remove_file(path(root)).unwrap(), MissingFile, &[MB, "hidden.0.npy"]);
    assert!(error.source().unwrap().is::<std::io::Error>());
    let cut = |root: &Path| {
        let bytes = fs::read(path(root)).unwrap();
        fs::write(path(root), &bytes[..bytes.len() - 1]).unwrap();
    };
    expect(cut, Length, &["hidden", "151 bytes", "152 bytes"]);
    expect(in_payload("hidden", |b| _ = b.pop()), Length, &["151 bytes", "152 bytes", "header of 128"]);
    expect(in_payload("hidden", |b| b.push(0)), Length, &["153 bytes", "152 bytes"]);
    let flip = |root: &Path| {
        let mut bytes = fs::read(path(root)).unwrap();
        bytes[140] ^= 1;
        fs::write(path(root), bytes).unwrap();
    };
    expect(flip, Checksum, &["hidden.0.npy", "BLAKE3"]);
    expect(in_payload("hidden", |b| b[0] = 0), Header, &["magic"]);
    expect(in_payload("hidden", |b| b.clear()), Header, &["magic"]);
    expect(in_payload("hidden", |b| b[6] = 9), Header, &["9.0", "1.0 to 3.0"]);
    expect(in_payload("hidden", |b| replace(b, "(1, 3, 4)", "(1, 4, 3)")), Shape, &["[1, 4, 3]", "[1, 3, 4]"]);
    expect(in_payload("hidden", |b| replace(b, "<V2", "<f2")), Encoding, &["\"<f2\"", "another number than bfloat16"]);
    expect(in_payload("hidden", |b| replace(b, "<V2", ">u2")), Encoding, &["\">u2\"", "uint16"]);
    expect(in_payload("targets", |b| replace(b, "<i4", "<u4")), Encoding, &["\"<u4\"", "<i4", "int32"]);
    // bfloat16 widened to float32, with a value at [0, 1, 2] of the shard, [1, 1, 2] of the tensor, that is none: by the highest
    // bit that is too many, by the lowest.
    for excess in [0x8000, 1] {
        let widen = move |b: &mut Vec<u8>| {
            replace(b, "<V2", "<f4");
            b.truncate(128);
            let bits = (0..12).map(|i| 0.5f32.to_bits() + if i >= 6 { excess } else { 0 });
            b.extend(bits.flat_map(u32::to_le_bytes));
        };
        expect(in_payload("hidden", widen), Inexact, &["5.0", "[1, 1, 2]", "nearest here is 5e-1"]);
    }
}

#[test]
fn tilings_and_copies() {
    use DumpErrorKind::*;
    expect(in_tensor("hidden", |t| t["shards"] = json!([])), Hole, &["mb_0000: hidden", "[1..2, 0..3, 0..4]"]);
    expect(
        in_tensor("hidden", |t| t["shards"][0]["start"] = json!([0, 0, 0])),
        Overlap,
        &["hidden", "[0..1, 0..3, 0..4]", "proc_00000", "proc_00001"],
    );
    // The second process's copy of the unembedding holds another number at [2, 1].
    let other_copy = |name: &'static str, width: usize| {
        move |root: &Path| {
            let path = file(root, 1, "shared", &format!("{name}.0.npy"));
            let mut bytes = fs::read(&path).unwrap();
            bytes[128 + 9 * width] ^= 1;
            fs::write(&path, &bytes).unwrap();
            let hash = blake3::hash(&bytes).to_hex();
            edit(&file(root, 1, "shared", "manifest.json"), |m| {
                let mut entries = m["tensors"].as_array_mut().unwrap().iter_mut();
                entries.find(|t| t["name"] == name).unwrap()["shards"][0]["blake3"] = json!(hash.as_str());
            });
        }
    };
    expect(other_copy("unembedding", 2), Replica, &["proc_00001", "[2, 1]", "proc_00000"]);
    // Of a recorded output it is a finding.
    let folder = fresh();
    other_copy("d_unembedding", 4)(folder.path());
    let dump = Dump::open(folder.path()).unwrap();
    let shared = &dump.runs()[0].steps[&0].shared;
    let recorded = shared.load("d_unembedding").unwrap().unwrap();
    let [copy] = recorded.copies.as_slice() else { panic!("one copy differs") };
    assert_eq!((copy.process, copy.replica, copy.region.to_string()), (1, 1, "[0..5, 0..4]".to_owned()));
    let differing: Vec<usize> = (0..20).filter(|&i| copy.data.to_f64()[i] != recorded.tensor.to_f64()[i]).collect();
    assert_eq!(differing, [9]);
    let report = verify(folder.path(), &mut |_, _| {}).unwrap();
    assert!(report.problems.is_empty());
    assert!(matches!(report.differing_copies.as_slice(), [one] if one.contains("d_unembedding: process 1, replica 1")));
}

#[test]
fn what_makes_no_problem() {
    use DumpErrorKind::*;
    let id = |b: &mut Vec<u8>| b[128 + 8..].copy_from_slice(&5i32.to_le_bytes());
    let error =
        expect(in_payload("targets", id), Problem, &["mb_0000: targets[1, 2]", "it is 5", "[0, 5)", "ignore_index = -100"]);
    assert!(error.source().is_some());
    let nan = |b: &mut Vec<u8>| b[128..132].copy_from_slice(&f32::NAN.to_le_bytes());
    expect(in_payload("token_weights", nan), Problem, &["token_weights[1, 0]", "NaN", "0 to mask"]);
}

#[test]
fn what_is_not_there() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let kind = |e: DumpError| (e.kind(), e.kind().culprit());
    assert_eq!(kind(Dump::open(root).unwrap_err()), (DumpErrorKind::NotADump, Culprit::Caller));
    assert_eq!(kind(find_dumps(root).unwrap_err()), (DumpErrorKind::NotADump, Culprit::Caller));
    let gone = Dump::open(&root.join("gone")).unwrap_err();
    assert!(gone.source().unwrap().is::<std::io::Error>());
    assert_eq!(kind(gone), (DumpErrorKind::Read, Culprit::Io));
    fs::create_dir_all(root.join("proc_00000/step_00000000/mb_0000")).unwrap();
    assert_eq!(kind(Dump::open(root).unwrap_err()), (DumpErrorKind::Empty, Culprit::Dump));
    fs::remove_dir_all(root.join("proc_00000")).unwrap();

    write(root);
    for process in 0..2 {
        fs::remove_dir_all(file(root, process, "shared", "")).unwrap();
    }
    let dump = Dump::open(root).unwrap();
    let step = &dump.runs()[0].steps[&0];
    let error = step.problem(0).unwrap_err();
    assert!(error.to_string().contains("shared: unembedding: not committed on any process"), "{error}");
    assert_eq!(kind(error), (DumpErrorKind::Missing, Culprit::Caller));
    assert_eq!(kind(step.problem(7).unwrap_err()), (DumpErrorKind::Missing, Culprit::Caller));
    assert_eq!(step.incomplete.len(), 1);
    assert_eq!(step.microbatches.len(), 2);
}

#[test]
fn the_writer_refuses() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    write(root);
    let create = |id| FolderWriter::create(root, id).unwrap_err();
    let committed = create(id(0, Some(0)));
    assert_eq!(committed.kind(), DumpErrorKind::Committed, "{committed}");
    assert_eq!(create(id(2, None)).kind(), DumpErrorKind::Settings);
    assert_eq!(create(FolderId { run_id: String::new(), ..id(0, None) }).kind(), DumpErrorKind::Settings);
    let mut loss = LossSettings::default();
    loss.options.logit_softcap = Some(f64::NAN);
    assert_eq!(create(FolderId { step: 1, loss, ..id(0, None) }).kind(), DumpErrorKind::Settings);

    let mut writer = FolderWriter::create(root, FolderId { step: 1, ..id(0, Some(0)) }).unwrap();
    let hidden = ramp(12, 0);
    let mut refused = |name: &str, data, place: &Placement, tells: &str| {
        let error = writer.tensor(name, data, place).unwrap_err();
        assert_eq!(error.kind(), DumpErrorKind::Data);
        assert!(error.to_string().contains(tells), "{tells:?} is not in: {error}");
    };
    let data = Elements::Bf16(&hidden);
    refused("hiden", data, &Placement::whole(&[3, 4]), "\"hidden\"?");
    refused("hidden", data, &Placement::whole(&[3, 5]), "12 elements");
    refused("hidden", data, &Placement::whole(&[usize::MAX, 2]), "12 elements");
    refused("hidden", data, &Placement::shard(&[4, 4], &[2, 0], &[3, 4]), "start [2, 0]");
    refused("hidden", data, &Placement::whole(&[3, 4]).layout(Layout::Dv), "layout");
    refused("hidden", data, &Placement::whole(&[12]), "[tokens, D]");
    refused("targets", data, &Placement::whole(&[12]), "int32 or int64");

    let blocked = root.join("blocked");
    fs::write(&blocked, "a file where a folder should be").unwrap();
    let error = FolderWriter::create(&blocked, id(0, None)).unwrap_err();
    assert_eq!(error.kind(), DumpErrorKind::Read, "{error}");
    assert!(error.to_string().contains("blocked") && error.source().unwrap().is::<std::io::Error>());
    fs::remove_dir_all(root).unwrap();
    let error = writer.tensor("hidden", data, &Placement::whole(&[3, 4])).unwrap_err();
    assert_eq!((error.kind(), error.kind().culprit()), (DumpErrorKind::Write, Culprit::Io));
    assert!(error.to_string().contains("hidden.0.npy") && error.source().unwrap().is::<std::io::Error>());
}
