//! `--candidate cmd:…`: anyone's program, judged like any other.

use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

fn xent_diff(at: &Path, arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_xent-diff")).current_dir(at).args(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

/// A dump whose gradients have a fault, spread over processes.
fn dump() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let synth = "synth dump --tokens 64 --hidden 16 --vocab 200 --processes 2 --fault label-missing --quiet";
    let (code, _, err) = xent_diff(folder.path(), &synth.split(' ').collect::<Vec<_>>());
    assert_eq!((code, err.as_str()), (Some(0), ""));
    folder
}

fn report(at: &Path, candidate: &str) -> Value {
    let (code, out, err) = xent_diff(at, &["dump", "--json", "-", "--candidate", candidate]);
    assert!(matches!(code, Some(0 | 1)) && err.is_empty(), "{err}");
    let report: Value = serde_json::from_str(&out).unwrap();
    report["candidates"][0].clone()
}

/// A command that hands back what was recorded gets the same verdict and the same cause.
#[test]
fn a_command_is_judged_as_what_was_recorded_is() {
    let folder = dump();
    let copy = "cmd:copy() { cp -r dump \"$2\"; }; copy";
    let (recorded, command) = (report(folder.path(), "recorded"), report(folder.path(), copy));
    assert_eq!(command["candidate"], copy);
    assert_eq!(command["verdict"], "diverge");
    for member in ["findings", "microbatches", "accumulated", "contract"] {
        assert!(recorded[member] == command[member] && !command[member].is_null(), "{member}");
    }
    assert_eq!(command["findings"][0]["cause"], "label-missing");
}

/// It sees the inputs alone, as one process would have written them.
#[test]
fn a_command_is_given_the_inputs_in_one_piece() {
    let folder = dump();
    let seen = folder.path().join("seen");
    let look = format!("cmd:look() {{ cp -r \"$1\" '{0}'; test ! -e \"$2\" && cp -r dump \"$2\"; }}; look", seen.display());
    report(folder.path(), &look);
    let mut files: Vec<String> = Vec::new();
    let mut folders = vec![seen.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            match entry.is_dir() {
                true => folders.push(entry),
                false => files.push(entry.strip_prefix(&seen).unwrap().display().to_string()),
            }
        }
    }
    files.sort_unstable();
    let step = "proc_00000/step_00000000";
    let mut expected: Vec<String> =
        ["shared/manifest.json", "shared/unembedding.0.npy"].map(|file| format!("{step}/{file}")).into();
    for m in ["mb_0000", "mb_0001"] {
        expected.extend(["hidden.0.npy", "manifest.json", "targets.0.npy"].map(|file| format!("{step}/{m}/{file}")));
    }
    expected.sort_unstable();
    assert_eq!(files, expected);
    let (code, out, _) = xent_diff(folder.path(), &["verify", "seen"]);
    assert_eq!(code, Some(0), "{out}");
}

#[test]
fn commands_that_fail_are_quoted() {
    let folder = dump();
    #[track_caller]
    fn refused(at: &Path, command: &str, what: &str) {
        let (code, out, err) = xent_diff(at, &["dump", "--candidate", &format!("cmd:{command}")]);
        assert_eq!((code, out.as_str()), (Some(2), ""), "{err}");
        assert!(err.starts_with(&format!("xent-diff: candidate cmd:{command}, step 0: ")) && err.contains(what), "{err}");
    }
    let at = folder.path();
    refused(at, "fail() { echo no kernel >&2; exit 7; }; fail", "exit status: 7; it ended with\n  no kernel");
    refused(at, "exit 5;", "exit status: 5; it said nothing on standard error");
    refused(at, "./no-such-program", "exit status: 127");
    refused(at, "true", "/out");
    refused(at, "copy() { cp -r \"$1\" \"$2\"; }; copy", "wrote a dump without d_hidden and d_unembedding");
    let other = "synth other --tokens 64 --hidden 16 --vocab 201 --quiet";
    xent_diff(at, &other.split(' ').collect::<Vec<_>>());
    refused(at, "copy() { cp -r other \"$2\"; }; copy", "d_unembedding: found [201, 16], expected [200, 16]");
    let later = "synth later --tokens 64 --hidden 16 --vocab 200 --step 3 --quiet";
    xent_diff(at, &later.split(' ').collect::<Vec<_>>());
    refused(at, "copy() { cp -r later \"$2\"; }; copy", "wrote no step 0");
    let (code, _, err) = xent_diff(at, &["dump", "--candidate", "cmd: "]);
    assert!(code == Some(2) && err.contains("unknown candidate"), "{err}");
}

/// The example that users begin with.
#[test]
#[ignore = "needs numpy: `make test` runs it with FUSED_XENT_PYTHON"]
fn the_numpy_example_agrees() {
    let python = std::env::var("FUSED_XENT_PYTHON").expect("FUSED_XENT_PYTHON is a Python with numpy");
    let folder = dump();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/candidates/numpy_candidate.py");
    let report = report(folder.path(), &format!("cmd:'{python}' '{script}'"));
    assert_eq!(report["verdict"], "agree", "{report:#}");
    let tensors: Vec<&str> =
        report["microbatches"][1]["tensors"].as_array().unwrap().iter().map(|t| t["name"].as_str().unwrap()).collect();
    assert_eq!(tensors, ["d_hidden", "d_unembedding"]);
}
