//! The command on small programs.

use super::support::{BINARY, Bench, Ended, runs};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Switches `a`, `b` and `c` set `A`, `B` and `C` to 1.
const ABC: [&str; 6] = ["--switch", "a=A=1", "--switch", "b=B=1", "--switch", "c=C=1"];

fn with<'a>(arguments: &[&'a str]) -> Vec<&'a str> {
    [&ABC[..], arguments].concat()
}

/// Of each run what was on, and how it ended.
fn outcomes(report: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let on = |run: &Value| run["on"].as_array().unwrap().iter().map(text).collect::<Vec<_>>().join(",");
    report["runs"].as_array().unwrap().iter().map(|run| (on(run), text(&run["outcome"]))).collect()
}

#[track_caller]
fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(30), "{what}: not so after 30 s");
        sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_single_culprit_is_named_with_its_cure_and_how_sure_it_is() {
    let bench = Bench::new(r#"echo "on: $A$B$C"; [ "$B" != 1 ] || { echo boom >&2; exit 3; }"#);
    let Ended { code, out, err } = bench.isolate(&ABC);
    assert_eq!((code, err.as_str()), (Some(1), ""), "{out}");
    assert!(out.starts_with("✗ b makes it fail: 4 of 4 runs with it on fail, 6 of 6 runs without succeed."), "{out}");
    for words in ["all off", "one alone", "failure: exit code 3", "boom", "leave out b (then 2 of 2 runs succeed)", "certain:"] {
        assert!(out.contains(words), "{words}: {out}");
    }
    assert!(!out.contains('\x1b') && !out.contains("note"), "{out}");
    assert_eq!(bench.read("isolate-logs/run-0003.log"), "on: 111\nboom\n");
    assert_eq!(fs::read_dir(bench.path("isolate-logs")).unwrap().count(), 10 + 1);

    let quiet = bench.isolate(&with(&["--quiet"]));
    assert_eq!(quiet.code, Some(1));
    assert!(out.starts_with(&quiet.out) && !quiet.out.contains("all off"), "{}", quiet.out);

    let (code, report) = bench.report(&ABC);
    assert_eq!((code, &report["schema"], &report["verdict"]), (Some(1), &json!("xent-isolate/1"), &json!("culprit")));
    assert_eq!((&report["culprit"], &report["cures"], &report["alone"]), (&json!(["b"]), &json!([["b"]]), &json!(["b"])));
    assert_eq!((&report["confidence"], &report["notes"], &report["earlier"]), (&json!("certain"), &json!([]), &json!(10)));
    assert_eq!(report["switches"][1], json!({ "name": "b", "settings": ["B=1"] }));
    let run = &report["runs"][2];
    let told = json!({ "number": 3, "step": "all_on", "on": ["a", "b", "c"], "outcome": "failure", "reason": "exit code 3" });
    told.as_object().unwrap().iter().for_each(|(name, value)| assert_eq!(&run[name], value));
    assert_eq!((&run["last_line"], &run["log"], &run["left_behind"]), (&json!("boom"), &json!("run-0003.log"), &json!(false)));
    assert!(report["sets"].as_array().unwrap().contains(&json!({ "on": ["b"], "passes": 0, "failures": 2, "rate": 1.0 })));
}

#[test]
fn a_pair_that_fails_together_is_found_among_variables_and_arguments() {
    let bench = Bench::new(r#"case "$A:$*" in 1:*--fast*) echo clash; exit 1;; esac; echo "$*""#);
    let switches = ["--switch", "a=A=1", "--switch", "b=--slow", "--switch", "c=--fast", "--switch", "d=with space"];
    let (code, report) = bench.report(&switches);
    assert_eq!((code, &report["culprit"], &report["cures"]), (Some(1), &json!(["a", "c"]), &json!([["a"], ["c"]])));
    assert!(report["sentence"].as_str().unwrap().starts_with("a and c together make it fail"), "{report}");
    assert_eq!(bench.read("isolate-logs/run-0008.log"), "with space\n");
}

#[test]
fn arguments_stand_where_the_command_says() {
    let bench = Bench::new(r#"[ "$1" != --bad ] || exit 1"#);
    let line = r#"./run.sh "$@" 2>&1 | tee out; test -e out && ./run.sh "$@""#;
    let ended = bench.call(&["isolate", "--cmd", line, "--switch", "x=--bad", "--switch", "y=--good"]);
    assert!(ended.out.starts_with("✗ x makes it fail"), "{}{}", ended.out, ended.err);
}

#[test]
fn a_hang_is_ended_with_all_its_children_and_timed() {
    // Both the command and its child ignore SIGTERM.
    let script = r#"
        echo begun
        [ "$B" = 1 ] || exit 0
        trap '' TERM
        (trap '' TERM; while :; do sleep 0.05; done) & echo $! >> children
        echo stuck
        while :; do sleep 0.05; done"#;
    let bench = Bench::new(script);
    let (code, report) = bench.report(&["--switch", "b=B=1", "--timeout", "0.7"]);
    assert_eq!((code, &report["culprit"], &report["confidence"]), (Some(1), &json!(["b"]), &json!("possible")));
    let hang = &report["runs"][2];
    assert_eq!((&hang["outcome"], &hang["last_line"]), (&json!("hang"), &json!("stuck")));
    assert!(hang["reason"].as_str().unwrap().contains("silent from 0."), "{hang}");
    assert!((0.7..5.0).contains(&hang["seconds"].as_f64().unwrap()) && hang["last_output"].as_f64().unwrap() < 0.7, "{hang}");
    let children = bench.read("children");
    assert_eq!(children.lines().count(), 2);
    assert!(!children.lines().any(runs), "{children}");
    assert!(report["grounds"].as_str().unwrap().contains("--min-pass"), "{report}");
}

#[test]
fn silence_ends_a_run_early_and_talk_does_not() {
    let script = r#"
        echo begun; [ "$B" = 1 ] && sleep 60
        [ "$A" = 1 ] && for i in 1 2 3 4 5 6 7 8; do echo $i; sleep 0.15; done
        true"#;
    let bench = Bench::new(script);
    let begun = Instant::now();
    let (_, report) = bench.report(&["--switch", "a=A=1", "--switch", "b=B=1", "--silence", "0.8", "--timeout", "50"]);
    assert!(begun.elapsed() < Duration::from_secs(40));
    assert_eq!(report["culprit"], json!(["b"]));
    assert!(report["runs"][2]["reason"].as_str().unwrap().starts_with("silent for 0.8 s from "), "{report}");
    assert!(outcomes(&report).contains(&("a".into(), "success".into())));
}

#[test]
fn what_still_talks_when_time_is_up_is_said_to_be_slow_perhaps() {
    let bench = Bench::new(r#"[ "$A" != 1 ] || while :; do echo busy; sleep 0.02; done"#);
    let ended = bench.isolate(&["--switch", "a=A=1", "--timeout", "0.6"]);
    assert!(ended.out.contains("output until 0.6 s"), "{}", ended.out);
    assert!(ended.out.contains("runs 3 and 4 were still putting out"), "{}", ended.out);
}

#[test]
fn a_crash_is_told_by_its_signal_whoever_tells_it() {
    for (script, reason) in [
        (r#"[ "$C" != 1 ] || kill -SEGV $$"#, "signal 11 (SIGSEGV)"),
        (r#"[ "$C" != 1 ] || sh -c 'kill -ABRT $$'"#, "exit code 134: signal 6 (SIGABRT)"),
    ] {
        let (code, report) = Bench::new(script).report(&ABC);
        assert_eq!((code, &report["culprit"]), (Some(1), &json!(["c"])));
        let run = &report["runs"][2];
        assert_eq!(run["outcome"], "crash");
        assert!(run["reason"].as_str().unwrap().contains(reason), "{run}");
    }
}

#[test]
fn patterns_decide_where_exit_codes_do_not() {
    let bench = Bench::new(r#"echo "loss 1.$A"; [ "$B" = 1 ] && echo "loss NaN"; [ "$C" = 1 ] || echo finished; true"#);
    let failure = bench.report(&with(&["--failure-pattern", "(?i)\\bnan$", "--logs", "one"])).1;
    assert_eq!(failure["culprit"], json!(["b"]));
    assert_eq!(failure["runs"][2]["reason"], "pattern: loss NaN");
    let success = bench.report(&with(&["--success-pattern", "^finished$", "--logs", "two"])).1;
    assert_eq!(success["culprit"], json!(["c"]));
    assert_eq!(success["runs"][2]["reason"], "exit code 0, without the success pattern");
    let both = bench.report(&with(&["--failure-pattern", "NaN", "--success-pattern", "finished", "--logs", "three"])).1;
    assert_eq!((&both["alone"], &both["cures"]), (&json!(["b", "c"]), &json!([["b", "c"]])));
    assert!(both["notes"][0].as_str().unwrap().starts_with("failures differ"), "{both}");
}

#[test]
fn what_fails_now_and_then_is_run_more_often_and_flagged_with_its_rate() {
    // With b on, two of three runs fail: those whose number is no multiple of 3.
    let script = r#"[ "$B" = 1 ] || exit 0; n=$(($(cat n 2>/dev/null || echo 0) + 1)); echo $n > n; [ $((n % 3)) = 0 ]"#;
    let (code, report) = Bench::new(script).report(&with(&["--min-fail", "3"]));
    assert_eq!((code, &report["culprit"]), (Some(1), &json!(["b"])));
    assert_ne!(report["confidence"], "certain");
    let note = "not deterministic: with all on, 3 of 4 runs fail (75.0 %)";
    assert!(report["notes"].as_array().unwrap().contains(&json!(note)), "{report}");
    assert!(report["grounds"].as_str().unwrap().contains("results vary"), "{report}");
    let passes = outcomes(&report).iter().filter(|(on, _)| on.is_empty()).count();
    assert!(passes > 2, "all off was run {passes} times only");
}

#[test]
fn a_baseline_that_fails_is_no_case_for_switches() {
    let bench = Bench::new("echo no such table; exit 4");
    let Ended { code, out, err } = bench.isolate(&ABC);
    assert_eq!(code, Some(2));
    assert!(out.starts_with("✗ It fails with all switches off, in 2 of 2 runs."), "{out}");
    for words in
        ["run-0001.log: failure (exit code 4), last line \"no such table\"", "expected --cmd to succeed", "make it do so"]
    {
        assert!(err.contains(words), "{words}: {err}");
    }
    let varies = Bench::new("[ -e n ] && exit 1; touch n");
    let (code, report) = varies.report(&ABC);
    assert_eq!((code, &report["verdict"], &report["culprit"]), (Some(2), &json!("baseline_varies"), &json!([])));
    let missing = Bench::new("").call(&["isolate", "--cmd", "./no-such-program", "--switch", "a=A=1"]);
    assert_eq!(missing.code, Some(2));
    assert!(missing.err.contains("exit code 127") && missing.err.contains("not found"), "{}", missing.err);
}

#[test]
fn where_nothing_fails_the_exit_code_is_0() {
    let (code, report) = Bench::new("echo fine").report(&ABC);
    assert_eq!((code, &report["verdict"], &report["confidence"]), (Some(0), &json!("nothing_fails"), &Value::Null));
    let hidden = Bench::new(r#"[ "$A$B" != 1 ]"#);
    let (code, report) = hidden.report(&["--switch", "a=A=1", "--switch", "c=C=1", "--switch", "b=B=1"]);
    assert_eq!((code, &report["culprit"], &report["cures"]), (Some(1), &json!(["a"]), &json!([])));
    assert!(report["notes"].to_string().contains("not monotone"), "{report}");
}

#[test]
fn what_stands_in_the_journal_is_not_run_again() {
    let bench = Bench::new(r#"echo "$A$B$C." >> ran; [ "$B" != 1 ]"#);
    let first = bench.report(&ABC).1;
    let ran = bench.read("ran").lines().count();
    assert_eq!(bench.report(&ABC).1["runs"], first["runs"]);
    assert_eq!(bench.read("ran").lines().count(), ran);
    // As after a power cut, in the middle of the last line.
    let journal = bench.read("isolate-logs/journal.jsonl");
    bench.write("isolate-logs/journal.jsonl", &journal[..journal.len() - 20]);
    let again = bench.report(&ABC).1;
    assert_eq!((&again["culprit"], &again["earlier"]), (&json!(["b"]), &json!(ran - 1)));
    assert_eq!(bench.read("ran").lines().count(), ran + 1);
    // More is asked for than there is.
    let more = bench.report(&with(&["--min-fail", "4"])).1;
    assert_eq!(more["earlier"], json!(ran));
    assert!(more["runs"].as_array().unwrap().len() > ran);
}

/// A call in which run 5 waits for the file `go`, and the number of its process, once it does.
fn waiting(bench: &Bench) -> (std::process::Child, String) {
    let arguments = [&["isolate", "--cmd", "./run.sh"], &ABC[..]].concat();
    // Where these tests run in the background of a script, SIGINT is ignored, and what they start would ignore it too.
    let mut command = Command::new("env");
    command.args(["--default-signal=INT", BINARY]).args(arguments).current_dir(bench.folder());
    let child = command.stderr(Stdio::piped()).spawn().unwrap();
    wait_until("run 5 waits", || bench.read("waits").ends_with('\n'));
    (child, bench.read("waits").trim().to_owned())
}

const WAITS: &str = r#"
    echo x >> ran
    [ "$(wc -l < ran)" -ne 5 ] || { trap '' TERM; (trap '' TERM; echo $$ > waits; while :; do sleep 0.05; done); }
    [ "$B" != 1 ]"#;

#[test]
fn after_kill_9_the_orphan_is_ended_and_the_search_goes_on() {
    let bench = Bench::new(WAITS);
    let (mut isolate, orphan) = waiting(&bench);
    isolate.kill().unwrap();
    isolate.wait().unwrap();
    assert!(runs(&orphan), "killed by another way than meant");
    let report = bench.report(&ABC).1;
    assert!(!runs(&orphan));
    assert_eq!((&report["culprit"], &report["earlier"]), (&json!(["b"]), &json!(4)));
    let numbers: Vec<_> = report["runs"].as_array().unwrap().iter().map(|run| run["number"].as_u64().unwrap()).collect();
    assert_eq!(numbers, [1, 2, 3, 4, 6, 7, 8, 9, 10, 11], "the fifth was interrupted");
}

#[test]
fn ctrl_c_ends_it_quietly_with_everything_that_it_started() {
    let bench = Bench::new(WAITS);
    let (isolate, child) = waiting(&bench);
    let second = bench.isolate(&ABC);
    assert_eq!(second.code, Some(2));
    assert!(second.err.contains("another isolate is at work here"), "{}", second.err);
    assert!(Command::new("kill").args(["-INT", &isolate.id().to_string()]).status().unwrap().success());
    let output = isolate.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stdout, output.stderr), (Some(130), vec![], vec![]));
    assert!(!runs(&child));
    let report = bench.report(&ABC).1;
    assert_eq!((&report["culprit"], &report["earlier"]), (&json!(["b"]), &json!(4)));
}

#[test]
fn a_process_that_left_its_group_is_reported() {
    if Command::new("setsid").arg("true").status().is_err() {
        return println!("SKIPPED a_process_that_left_its_group_is_reported, for want of setsid");
    }
    let bench =
        Bench::new(r#"[ "$A" != 1 ] || { setsid sh -c 'echo $$ >> left; sleep 20' & while [ ! -e left ]; do :; done; exit 1; }"#);
    let report = bench.report(&["--switch", "a=A=1"]).1;
    for id in bench.read("left").lines() {
        _ = Command::new("kill").arg(id).status();
    }
    assert!(report["notes"].to_string().contains("left a process behind"), "{report}");
}

/// A call that is refused: nothing on standard output, one message that says `what`, and nothing was run.
#[track_caller]
fn refused(bench: &Bench, arguments: &[&str], what: &str) {
    let Ended { code, out, err } = bench.call(&[&["isolate"], arguments].concat());
    assert_eq!((code, out.as_str()), (Some(2), ""), "{arguments:?}: {err}");
    assert!(err.contains(what), "{arguments:?}: {err}");
    assert!(!err.contains("panicked") && !bench.path("ran").exists(), "{err}");
}

#[test]
fn a_wrong_call_is_refused() {
    let bench = Bench::new("touch ran");
    let base = ["--cmd", "./run.sh", "--switch", "a=A=1"];
    let refused = |more: &[&str], what: &str| refused(&bench, &[&base, more].concat(), what);
    self::refused(&bench, &["--switch", "a=A=1"], "--cmd");
    self::refused(&bench, &["--cmd", "./run.sh"], "--switch");
    self::refused(&bench, &["--cmd", " ", "--switch", "a=A=1"], "an empty command");
    refused(&["--switch", "b"], "nothing is set");
    refused(&["--switch", "b c=D=1"], "no name");
    refused(&["--switch", "none=D=1"], "another name");
    refused(&["--switch", "b="], "sets nothing");
    refused(&["--switch", "b=A=2"], "both set A");
    refused(&["--switch", "b=env:--x"], "env:KEY=VALUE");
    let path = format!("p=PATH={}", std::env::var("PATH").unwrap());
    refused(&["--switch", &path], "unset PATH first");
    for (option, bad) in
        [("--timeout", "0"), ("--timeout", "x"), ("--timeout", "1e400"), ("--silence", "inf"), ("--min-pass", "0")]
    {
        refused(&[option, bad], option);
    }
    refused(&["--timeout", "5", "--silence", "5"], "--silence is not below --timeout");
    refused(&["--failure-pattern", "("], "unclosed group");
    refused(&["--success-pattern", "a{9999999}"], "--success-pattern");
    refused(&["--json", "no/report.json"], "does not exist");
    refused(&["--logs", "."], "it holds files but no journal.jsonl");
    refused(&["--logs", "run.sh"], "run.sh: the log folder cannot be made");
}

#[test]
fn a_journal_of_another_call_is_refused_with_the_remedy() {
    let bench = Bench::new("exit 0");
    assert_eq!(bench.isolate(&["--switch", "a=A=1"]).code, Some(0));
    let base = ["--cmd", "./run.sh", "--switch", "a=A=1"];
    for (more, what) in [
        (&["--switch", "b=B=1"][..], "switches was"),
        (&["--timeout", "5"], "timeout was 600.0, now 5.0"),
        (&["--silence", "5"], "silence was null, now 5.0"),
        (&["--success-pattern", "x"], "success_pattern was null, now \"x\""),
        (&["--failure-pattern", "x"], "failure_pattern was"),
    ] {
        refused(&bench, &[&base, more].concat(), what);
    }
    refused(&bench, &["--cmd", "true", "--switch", "a=A=1"], "command was \"./run.sh\", now \"true\"");
    refused(&bench, &["--cmd", "true", "--switch", "a=A=1"], "give another folder with --logs, or remove this one");
    fs::create_dir(bench.path("below")).unwrap();
    let elsewhere = ["-c", "cd below && exec \"$0\" isolate --cmd ./run.sh --switch a=A=1 --logs ../isolate-logs", BINARY];
    let output = Command::new("sh").current_dir(bench.folder()).args(elsewhere).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("folder was"), "{output:?}");

    let journal = bench.read("isolate-logs/journal.jsonl");
    let lines: Vec<&str> = journal.lines().collect();
    let broken = |lines: &[&str], what: &str| {
        bench.write("isolate-logs/journal.jsonl", &(lines.join("\n") + "\n"));
        refused(&bench, &base, what);
    };
    broken(&[lines[0], "{\"event\":\"start\"}"], "line 2: missing field");
    broken(&[lines[0], "nonsense"], "line 2: expected");
    broken(&[lines[0], lines[0]], "line 2: a record that cannot stand here");
    broken(&[lines[0], lines[2]], "line 2: a record that cannot stand here");
    broken(&lines[1..], "line 1: a record that cannot stand here");
    broken(&[lines[0], lines[1], &lines[2].replace("\"on\":[]", "\"on\":[\"x\"]")], "switches on that do not exist");
}

#[test]
fn help_tells_the_rule_and_the_exit_codes() {
    let help = Bench::new("").call(&["isolate", "--help"]);
    assert_eq!(help.code, Some(0));
    for words in
        ["NAME=KEY=VALUE", "--min-fail", "The first of these that applies", "1 a culprit was found", "goes on from there"]
    {
        assert!(help.out.contains(words), "{words}: {}", help.out);
    }
}

#[test]
fn a_signal_that_is_ignored_from_the_start_stays_so() {
    let bench = Bench::new(WAITS);
    let line = "trap '' HUP; exec \"$0\" isolate --cmd ./run.sh --switch a=A=1 --switch b=B=1 --switch c=C=1";
    let isolate =
        Command::new("sh").current_dir(bench.folder()).args(["-c", line, BINARY]).stdout(Stdio::null()).spawn().unwrap();
    wait_until("run 5 waits", || bench.read("waits").ends_with('\n'));
    let send = |signal: &str| assert!(Command::new("kill").args([signal, &isolate.id().to_string()]).status().unwrap().success());
    send("-HUP");
    sleep(Duration::from_millis(300));
    assert!(runs(bench.read("waits").trim()));
    send("-TERM");
    assert_eq!(isolate.wait_with_output().unwrap().status.code(), Some(143));
    assert!(!runs(bench.read("waits").trim()));
}

/// Times, which differ from run to run.
fn untimed(text: &str) -> String {
    regex::Regex::new(r"\d+\.\d s").unwrap().replace_all(text, "_ s").into_owned()
}

#[test]
fn the_document_shows_what_is_printed() {
    let document = include_str!("../../docs/isolate.md");
    let block = |language: &str| document.split(&format!("```{language}\n")).nth(1).unwrap().split("```").next().unwrap();
    let bench = Bench::new("");
    let path = format!("{}:{}", Path::new(BINARY).parent().unwrap().display(), std::env::var("PATH").unwrap());
    let output = Command::new("sh").current_dir(bench.folder()).args(["-ec", block("sh")]).env("PATH", path).output().unwrap();
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
    assert_eq!(untimed(&String::from_utf8(output.stdout).unwrap()), untimed(block("text")));
}
