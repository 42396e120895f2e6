//! The command as a user meets it: arguments, exit codes, where output goes.

use assert_cmd::Command;
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Command as Process, Stdio};
use tempfile::TempDir;

const BINARY: &str = env!("CARGO_BIN_EXE_xent-diff");

/// What came of a call, in the folder `at`.
struct Ended {
    code: Option<i32>,
    out: String,
    err: String,
}

fn xent_diff(at: &Path, arguments: &[&str]) -> Ended {
    let output = Command::new(BINARY).current_dir(at).args(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ended { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
}

/// A call that is refused: nothing on standard output, one message that says `what`.
#[track_caller]
fn refused(at: &Path, arguments: &[&str], what: &str) {
    let Ended { code, out, err } = xent_diff(at, arguments);
    assert_eq!((code, out.as_str()), (Some(2), ""), "{arguments:?}: {err}");
    assert!(err.contains(what), "{arguments:?}: {err}");
    assert!(!err.contains("panicked") && !err.contains("RUST_BACKTRACE"), "{err}");
}

/// A folder of a healthy dump and one whose gradients lack the label term.
fn dumps() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for arguments in [
        &["synth", "dumps/healthy", "--tokens", "64", "--hidden", "16", "--vocab", "50"][..],
        &["synth", "dumps/faulty", "--tokens", "64", "--hidden", "16", "--vocab", "50", "--fault", "label-missing"],
    ] {
        let Ended { code, err, .. } = xent_diff(folder.path(), arguments);
        assert_eq!((code, err.as_str()), (Some(0), ""));
    }
    folder
}

#[test]
fn a_contract_can_be_given() {
    let folder = dumps();
    let synth = [
        "synth",
        "rounded",
        "--tokens",
        "64",
        "--hidden",
        "16",
        "--vocab",
        "50",
        "--gradients",
        "f32",
        "--fault",
        "dlogits-bf16",
    ];
    assert_eq!(xent_diff(folder.path(), &synth).code, Some(0));
    let judged = |contract: &[&str]| {
        let arguments = [&["rounded", "--candidate", "recorded", "--json", "-"], contract].concat();
        let Ended { code, out, err } = xent_diff(folder.path(), &arguments);
        let report: Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {err}"));
        let candidate = &report["candidates"][0];
        (code, candidate["contract"]["source"].clone(), candidate["findings"][0]["cause"].clone())
    };
    assert_eq!(judged(&[]), (Some(0), "assumed".into(), Value::Null));
    assert_eq!(judged(&["--contract", "dlogits=bf16, d_unembedding=f32"]), (Some(0), "given".into(), Value::Null));
    assert_eq!(judged(&["--contract", "dlogits=f32"]), (Some(1), "given".into(), "dlogits-bf16".into()));
    refused(folder.path(), &["dumps/healthy", "--contract", "dlogit=f32"], "dlogits");
    refused(folder.path(), &["dumps/healthy", "--contract", "dlogits=f31"], "bf16x2");
    refused(folder.path(), &["dumps/healthy", "--contract", "dlogits"], "dlogits=bf16");
}

#[test]
fn help_and_version_go_to_standard_output() {
    let here = Path::new(".");
    let help = xent_diff(here, &["--help"]);
    assert_eq!((help.code, help.err.as_str()), (Some(0), ""));
    for word in [
        "verify",
        "info",
        "synth",
        "faults",
        "--json",
        "--html",
        "--md",
        "--baseline",
        "--candidate",
        "--contract",
        "--quiet",
        "Exit codes",
    ] {
        assert!(help.out.contains(word), "{word}");
    }
    let version = xent_diff(here, &["--version"]);
    assert_eq!((version.code, version.out), (Some(0), format!("xent-diff {}\n", env!("CARGO_PKG_VERSION"))));
}

#[test]
fn a_wrong_call_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    fs::create_dir(at.join("empty")).unwrap();
    fs::write(at.join("file"), "").unwrap();
    refused(at, &[], "Usage");
    refused(at, &["--bogus"], "--bogus");
    refused(at, &["empty", "--threads", "0"], "--threads");
    refused(at, &["empty", "--step", "x"], "--step");
    refused(at, &["empty", "--candidate", "gpu"], "unknown candidate");
    refused(at, &["empty", "--json", "-", "--html", "-"], "--json - and --html - all ask for standard output");
    refused(at, &["empty", "--md", "-", "--html", "-"], "--html - and --md -");
    refused(at, &["empty", "--json", "no/report.json"], "does not exist");
    refused(at, &["empty", "--md", "no/report.md"], "does not exist");
    refused(at, &["empty", "--baseline", "no.json"], "no.json: cannot be read");
    refused(at, &["empty", "--baseline", "file"], "file: not JSON");
    refused(at, &["empty", "--html", "empty"], "it is a folder");
    refused(at, &["empty"], "proc_");
    refused(at, &["verify", "empty"], "proc_");
    refused(at, &["info", "empty"], "proc_");
    refused(at, &["missing"], "no such folder");
    refused(at, &["verfy"], "did you mean the command 'verify'");
    refused(at, &["file"], "file");
    refused(at, &["synth", "new", "--fault", "label-scater-bf16"], "label-scatter-bf16");
    refused(at, &["synth", "new", "--loss", r#"{"zloss": 1}"#], "z_loss");
    refused(at, &["synth", "new", "--tokens", "0"], "--tokens");
    assert!(!at.join("new").exists());
}

#[test]
fn the_catalogue_is_listed() {
    let faults = xent_diff(Path::new("."), &["faults"]);
    assert_eq!(faults.code, Some(0));
    for slug in ["label-scatter-bf16", "mean-of-means", "dq-not-reduced", "vocab-pad-unmasked"] {
        assert!(faults.out.lines().any(|line| line.trim() == slug), "{slug}");
    }
}

#[test]
fn a_healthy_dump_agrees_and_a_faulty_one_diverges() {
    let folder = dumps();
    let at = folder.path();
    let healthy = xent_diff(at, &["dumps/healthy"]);
    assert_eq!((healthy.code, healthy.err.as_str()), (Some(0), ""), "{}", healthy.out);
    assert!(healthy.out.starts_with("✓ "), "{}", healthy.out);
    assert!(!healthy.out.contains('\x1b'), "colour without a terminal");
    let faulty = xent_diff(at, &["dumps/faulty"]);
    assert_eq!((faulty.code, faulty.err.as_str()), (Some(1), ""), "{}", faulty.out);
    assert!(faulty.out.starts_with("✗ recorded diverges"), "{}", faulty.out);
    assert!(faulty.out.contains("label-missing"), "{}", faulty.out);
    let both = xent_diff(at, &["dumps"]);
    assert_eq!(both.code, Some(1));
    assert!(both.out.contains("1 of 2 dumps diverges"), "{}", both.out);
}

#[test]
fn a_dump_may_have_the_name_of_a_command() {
    let folder = dumps();
    fs::rename(folder.path().join("dumps/faulty"), folder.path().join("verify")).unwrap();
    assert_eq!(xent_diff(folder.path(), &["./verify", "--quiet"]).code, Some(1));
    assert_eq!(xent_diff(folder.path(), &["verify", "./verify"]).code, Some(0));
}

#[test]
fn quiet_prints_the_verdict_alone() {
    let folder = dumps();
    let full = xent_diff(folder.path(), &["dumps/faulty"]);
    let quiet = xent_diff(folder.path(), &["--quiet", "dumps/faulty"]);
    assert_eq!((quiet.code, quiet.err.as_str()), (Some(1), ""));
    assert!(full.out.starts_with(&quiet.out) && quiet.out.len() < full.out.len() / 2, "{}", quiet.out);
    assert!(!quiet.out.contains("noise") && !quiet.out.contains("\n\n"), "{}", quiet.out);
}

#[test]
fn json_goes_where_it_is_asked_to() {
    let folder = dumps();
    let at = folder.path();
    let parse = |text: &str| serde_json::from_str::<Value>(text).unwrap();
    let printed = xent_diff(at, &["dumps/faulty", "--json", "-", "--candidate", "recorded"]);
    assert_eq!((printed.code, printed.err.as_str()), (Some(1), ""));
    let report = parse(&printed.out);
    assert_eq!(report["schema"], "xent-diff/1");
    assert_eq!(report["verdict"], "diverge");
    assert_eq!(report["candidates"].as_array().unwrap().len(), 1);
    assert_eq!(report["candidates"][0]["candidate"], "recorded");
    assert_eq!(report["candidates"][0]["findings"][0]["cause"], "label-missing");
    let file = xent_diff(at, &["dumps/faulty", "--json", "r.json", "--html", "r.html", "--candidate", "recorded"]);
    assert!(file.out.starts_with('✗'));
    assert_eq!(parse(&fs::read_to_string(at.join("r.json")).unwrap()), report);
    assert!(fs::read_to_string(at.join("r.html")).unwrap().contains("label-missing"));
    let many = parse(&xent_diff(at, &["dumps", "--json", "-"]).out);
    let paths: Vec<&str> = many["reports"].as_array().unwrap().iter().map(|r| r["path"].as_str().unwrap()).collect();
    assert_eq!((many["verdict"].as_str(), paths), (Some("diverge"), vec!["dumps/faulty", "dumps/healthy"]));
    let mut left: Vec<_> = fs::read_dir(at).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["dumps", "r.html", "r.json"]);
}

#[test]
fn markdown_goes_where_it_is_asked_to() {
    let folder = dumps();
    let at = folder.path();
    let printed = xent_diff(at, &["dumps/faulty", "--md", "-", "--candidate", "recorded"]);
    assert_eq!((printed.code, printed.err.as_str()), (Some(1), ""));
    assert!(printed.out.starts_with("### ❌ recorded diverges at "), "{}", printed.out);
    assert!(printed.out.contains("`label-missing`") && printed.out.contains("| ❌ | `d_hidden` |"), "{}", printed.out);
    let file = xent_diff(at, &["dumps", "--md", "r.md", "--quiet"]);
    assert_eq!(file.code, Some(1));
    let text = fs::read_to_string(at.join("r.md")).unwrap();
    assert!(text.starts_with("### 1 of 2 dumps diverges\n") && text.contains("| ✅ | `dumps/healthy` |"), "{text}");
}

#[test]
fn a_baseline_tells_better_from_worse() {
    let folder = dumps();
    let at = folder.path();
    assert_eq!(xent_diff(at, &["dumps", "--json", "old.json", "--quiet"]).code, Some(1));
    let on_one_line = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let same = xent_diff(at, &["dumps", "--baseline", "old.json", "--json", "new.json", "--html", "new.html", "--md", "new.md"]);
    assert_eq!((same.code, same.err.as_str()), (Some(1), ""), "the exit code is the verdict's");
    assert!(on_one_line(&same.out).contains("the same. Still there: label-missing."), "{}", same.out);
    let json: Value = serde_json::from_str(&fs::read_to_string(at.join("new.json")).unwrap()).unwrap();
    for report in json["reports"].as_array().unwrap() {
        assert_eq!((&report["baseline"]["change"], &report["baseline"]["found"]), (&"same".into(), &true.into()));
    }
    for file in ["new.html", "new.md"] {
        assert!(fs::read_to_string(at.join(file)).unwrap().contains("beside old.json"), "{file}");
    }
    // The two change places.
    fs::rename(at.join("dumps/healthy"), at.join("dumps/x")).unwrap();
    fs::rename(at.join("dumps/faulty"), at.join("dumps/healthy")).unwrap();
    let mended = xent_diff(at, &["dumps", "--baseline", "old.json", "--json", "-", "--candidate", "recorded"]);
    let json: Value = serde_json::from_str(&mended.out).unwrap();
    let worse = &json["reports"][0]["baseline"];
    assert_eq!((&json["reports"][0]["path"], &worse["change"]), (&"dumps/healthy".into(), &"worse".into()));
    assert_eq!(worse["tensors"][0]["change"], "worse");
    assert_eq!((&worse["causes"][0]["cause"], &worse["causes"][0]["change"]), (&"label-missing".into(), &"new".into()));
    assert_eq!(json["reports"][1]["baseline"]["found"], false);
    assert_eq!(json["not_judged"], serde_json::json!(["dumps/faulty"]));
    fs::rename(at.join("dumps/x"), at.join("dumps/faulty")).unwrap();
    let better = xent_diff(at, &["dumps/faulty", "--baseline", "old.json", "--candidate", "recorded"]);
    assert_eq!(better.code, Some(0), "the exit code is the verdict's");
    assert!(on_one_line(&better.out).contains("Gone: label-missing."), "{}", better.out);
    refused(at, &["dumps/faulty", "--baseline", "new.html"], "new.html: not JSON");
    refused(at, &["dumps/faulty", "--baseline", "dumps"], "dumps: cannot be read");
}

#[test]
fn one_step_and_one_microbatch() {
    let folder = dumps();
    let at = folder.path();
    let report = xent_diff(at, &["dumps/healthy", "--step", "0", "--microbatch", "1", "--json", "-"]);
    let report: Value = serde_json::from_str(&report.out).unwrap();
    for candidate in report["candidates"].as_array().unwrap() {
        assert_eq!(candidate["microbatches"].as_array().unwrap().len(), 1);
        assert_eq!(candidate["microbatches"][0]["microbatch"], 1);
        assert_eq!(candidate["accumulated"], Value::Null);
    }
    refused(at, &["dumps/healthy", "--step", "7"], "step 7");
    refused(at, &["dumps/healthy", "--microbatch", "7"], "microbatch");
}

#[test]
fn a_sample_is_judged_and_said() {
    let folder = dumps();
    let at = folder.path();
    let sampled = xent_diff(at, &["dumps/healthy", "--sample", "7"]);
    assert_eq!((sampled.code, sampled.err.as_str()), (Some(0), ""));
    assert!(sampled.out.lines().next().unwrap().contains("gradients sampled"), "{}", sampled.out);
    let on_one_line = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let said = "of the gradients, a sample was judged: 7 rows of each in dQ, 7 rows in dK";
    assert!(on_one_line(&sampled.out).contains(said), "{}", sampled.out);
    let faulty = xent_diff(at, &["dumps/faulty", "--sample=9", "--candidate", "recorded"]);
    assert_eq!(faulty.code, Some(1), "{}", faulty.err);
    for words in ["in 9 of", "label-missing", "xent-diff dumps/faulty --step 0 --candidate recorded --sample 9"] {
        assert!(on_one_line(&faulty.out).contains(words), "{words}:\n{}", faulty.out);
    }
    let json = |options: &[&str]| -> Value {
        serde_json::from_str(&xent_diff(at, &[&["dumps/healthy", "--json", "-"], options].concat()).out).unwrap()
    };
    let report = json(&["--sample", "7"]);
    assert_eq!(report["candidates"][0]["sample"], serde_json::json!({ "token_rows": 7, "vocab_rows": 7 }));
    let tensors = report["candidates"][0]["microbatches"][0]["tensors"].as_array().unwrap();
    let dk = tensors.iter().find(|t| t["name"] == "d_unembedding").unwrap();
    assert_eq!((dk["shape"][0].as_u64(), dk["sampled_from"].as_u64()), (Some(7), Some(50)));
    assert!(tensors.iter().find(|t| t["name"] == "loss").unwrap().get("sampled_from").is_none());
    assert_eq!(report["candidates"][0]["accumulated"]["grad_norm"], Value::Null);
    for all in [&["--full"][..], &[]] {
        assert!(json(all)["candidates"][0].get("sample").is_none());
    }
    assert_eq!(json(&["--sample"])["candidates"][0]["sample"]["vocab_rows"], 50, "no more than there are");
    refused(at, &["dumps/healthy", "--sample", "0"], "expected a number of rows, 1 or more");
    refused(at, &["--sample", "dumps/healthy"], "a path stands before --sample");
    refused(at, &["dumps/healthy", "--sample", "--full"], "cannot be used with");
}

#[test]
fn a_damaged_dump_is_refused_and_the_others_are_judged() {
    let folder = dumps();
    let at = folder.path();
    let payload = at.join("dumps/faulty/proc_00000/step_00000000/mb_0000/hidden.0.npy");
    let mut bytes = fs::read(&payload).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&payload, bytes).unwrap();
    refused(at, &["dumps/faulty"], "hidden.0.npy");
    let verified = xent_diff(at, &["verify", "dumps"]);
    assert_eq!(verified.code, Some(2));
    assert!(
        verified.out.contains("✗ dumps/faulty: 1 problem") && verified.out.contains("✓ dumps/healthy: sound"),
        "{}",
        verified.out
    );
    let both = xent_diff(at, &["dumps", "--json", "r.json"]);
    assert_eq!(both.code, Some(2));
    assert!(both.out.starts_with("✓ "), "{}", both.out);
    assert!(both.err.contains("hidden.0.npy") && both.err.contains("1 of 2 dumps"), "{}", both.err);
    assert!(!at.join("r.json").exists());
}

#[test]
fn an_interrupted_capture_is_told() {
    let folder = dumps();
    let at = folder.path();
    fs::remove_file(at.join("dumps/healthy/proc_00000/step_00000000/mb_0001/manifest.json")).unwrap();
    let judged = xent_diff(at, &["dumps/healthy"]);
    assert_eq!(judged.code, Some(0), "{}", judged.err);
    assert!(judged.out.contains("proc_00000/step_00000000/mb_0001"), "{}", judged.out);
    let verified = xent_diff(at, &["verify", "dumps/healthy"]);
    assert_eq!(verified.code, Some(0));
    assert!(verified.out.contains("interrupted"), "{}", verified.out);
}

#[test]
fn info_lists_what_is_there() {
    let folder = dumps();
    let at = folder.path();
    let info = xent_diff(at, &["info", "dumps"]);
    assert_eq!((info.code, info.err.as_str()), (Some(0), ""));
    for words in
        ["dumps/healthy", "dumps/faulty", "2 of 2 microbatches", "unembedding", "[50, 16] vd", "bfloat16", "reduction mean"]
    {
        assert!(info.out.contains(words), "{words}:\n{}", info.out);
    }
    let json: Value = serde_json::from_str(&xent_diff(at, &["info", "dumps/healthy", "--json", "-"]).out).unwrap();
    assert_eq!(json["schema"], "xent-info/1");
    assert_eq!(json["dumps"][0]["runs"][0]["steps"][0]["num_microbatches"], 2);
}

#[test]
fn the_kernel_is_chosen_by_the_environment() {
    let folder = dumps();
    let run = |kernel: &str, arguments: &[&str]| {
        let mut command = Command::new(BINARY);
        let output = command.current_dir(folder.path()).env("FUSED_XENT_KERNEL", kernel).args(arguments).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Ended { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    };
    let machine = |ended: Ended| serde_json::from_str::<Value>(&ended.out).unwrap()["machine"].clone();
    let info = machine(xent_diff(folder.path(), &["info", "--machine", "--json", "-"]));
    assert_eq!(info["kernel"], info["kernels"][0]["name"], "the fastest, unless told otherwise");
    for kernel in info["kernels"].as_array().unwrap() {
        let name = kernel["name"].as_str().unwrap();
        assert_eq!(machine(run(name, &["info", "--machine", "--json", "-"]))["kernel"], *name);
        assert!(run(name, &["info", "--machine"]).out.contains(&format!("{name} (FUSED_XENT_KERNEL")), "{name}");
        let judged = run(name, &["dumps/healthy", "--json", "-"]);
        assert_eq!(judged.code, Some(0), "{name}: {}", judged.err);
        assert!(judged.out.contains(&format!("the fused kernel {name} of this machine")), "{name}: {}", judged.out);
    }
    for arguments in [&["dumps/healthy"][..], &["dumps/healthy", "--candidate", "cpu"], &["info", "--machine"]] {
        let ended = run("abacus", arguments);
        assert_eq!(ended.code, Some(2), "{arguments:?}: {}", ended.err);
        assert!(ended.err.contains("FUSED_XENT_KERNEL is `abacus`") && ended.err.contains("portable"), "{}", ended.err);
    }
}

/// Runs with a standard output whose reader is gone from the start.
fn unread(at: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let mut child =
        Process::new(BINARY).current_dir(at).args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn a_closed_pipe_ends_it_quietly() {
    let folder = dumps();
    let at = folder.path();
    assert_eq!(unread(at, &["dumps/faulty"]), (Some(1), String::new()));
    assert_eq!(unread(at, &["dumps"]), (Some(141), String::new()));
    assert_eq!(unread(at, &["dumps", "--json", "r.json"]), (Some(1), String::new()));
    assert!(at.join("r.json").exists());
    for arguments in [&["faults"][..], &["--help"], &["info", "dumps"], &["verify", "dumps"]] {
        assert_eq!(unread(at, arguments), (Some(0), String::new()), "{arguments:?}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_said() {
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = Process::new(BINARY).arg("faults").stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8(output.stderr).unwrap().contains("standard output cannot be written"));
}

#[cfg(not(feature = "pjrt"))]
#[test]
fn a_build_without_devices_says_which_has_them() {
    refused(
        Path::new("."),
        &["tpu-selftest"],
        "tpu-selftest: this xent-diff was built without PJRT; build it with `--features pjrt`",
    );
    refused(Path::new("."), &["tpu-selftest", "--generation", "v9"], "expected one of v4, v5e, v5p, v6e, v7x");
}
