use crate::samples;
use fused_xent::report::baseline::{Baseline, Change, Comparison};
use fused_xent::report::json::{many, one};
use fused_xent::report::model::{Report, Verdict};
use fused_xent::report::terminal::{Style, render};
use fused_xent::report::{html, markdown};
use insta::assert_snapshot;

fn compare(before: &Report, now: &Report) -> Comparison {
    Baseline::parse("old.json", &one(before)).unwrap().compare(now, true)
}

/// The ratio of dQ, at a floor of 1.65e-3.
fn with_dq(ratio: f64) -> Report {
    let tensor = samples::tensor("d_hidden", ratio * 1.65e-3, 1.65e-3);
    samples::report(vec![samples::candidate("recorded", vec![samples::microbatch(0, vec![tensor])])])
}

#[test]
fn a_report_is_the_same_as_itself() {
    for report in [samples::agreeing(), samples::two_candidates(), samples::nonfinite(), samples::microbatches(5, &[1])] {
        let found = compare(&report, &report);
        assert!(found.found && found.tensors.is_empty() && found.same > 0, "{found:?}");
        assert_eq!(found.change, Change::Same);
        assert!(found.causes.iter().all(|cause| cause.change == Change::Same), "{found:?}");
    }
}

#[test]
fn better_and_worse_go_by_the_ratio_above_the_floor() {
    for (before, now, expected) in [
        (2.0, 2.1, Change::Same),
        (2.0, 2.3, Change::Worse),
        (2.3, 2.0, Change::Better),
        (0.2, 0.9, Change::Same),
        (0.2, 1.2, Change::Worse),
        (1.49, 1.51, Change::Worse),
        (1.51, 1.49, Change::Better),
        (1.0, f64::INFINITY, Change::Worse),
        (f64::INFINITY, 1e9, Change::Better),
        (f64::INFINITY, f64::INFINITY, Change::Same),
    ] {
        let found = compare(&with_dq(before), &with_dq(now));
        assert_eq!(found.change, expected, "{before} → {now}: {found:?}");
        assert_eq!(found.same, usize::from(expected == Change::Same));
    }
}

#[test]
fn causes_are_new_or_gone() {
    let (healthy, faulty) = (samples::agreeing(), samples::certain());
    let mut healthy = healthy;
    healthy.candidates[0].candidate = "recorded".into();
    let found = compare(&healthy, &faulty);
    assert_eq!((found.change, found.causes[0].cause.as_str()), (Change::Worse, "label-scatter-bf16"));
    assert_eq!(found.causes[0].change, Change::New);
    assert_eq!(found.tensors.iter().find(|t| t.tensor == "d_unembedding_label").unwrap().change, Change::New);
    let found = compare(&faulty, &healthy);
    assert_eq!((found.change, found.causes[0].change), (Change::Better, Change::Gone));
    assert_eq!(found.tensors.iter().find(|t| t.tensor == "d_unembedding_label").unwrap().change, Change::Gone);
    assert_eq!(found.tensors.iter().find(|t| t.tensor == "grad_norm").unwrap().change, Change::Better);
}

#[test]
fn runs_with_other_names_are_compared_in_their_order() {
    let mut now = samples::microbatches(2, &[1]);
    let mut before = now.clone();
    now.candidates[0].run_id = "today".into();
    assert_eq!(compare(&before, &now).change, Change::Same);
    before.candidates[0].step = 7;
    let found = compare(&before, &now);
    assert_eq!(found.same, 0, "another step is another thing");
    assert!(found.tensors.iter().any(|t| t.change == Change::New) && found.tensors.iter().any(|t| t.change == Change::Gone));
}

#[test]
fn dumps_of_a_folder_go_by_their_paths() {
    let mut other = samples::certain();
    other.dump.path = "dumps/other".into();
    let reports = [samples::agreeing(), other];
    let baseline = Baseline::parse("old.json", &many(&reports, &[])).unwrap();
    for report in &reports {
        assert_eq!(baseline.compare(report, false).change, Change::Same);
    }
    assert_eq!(baseline.not_judged(&reports[..1]), ["dumps/other"]);
    let mut moved = samples::agreeing();
    moved.dump.path = "elsewhere".into();
    let found = baseline.compare(&moved, false);
    assert_eq!((found.found, found.change, found.same), (false, Change::New, 0));
    let one_dump = Baseline::parse("old.json", &one(&reports[0])).unwrap();
    assert!(one_dump.compare(&moved, true).found, "one dump beside one, wherever it lies");
    assert!(!one_dump.compare(&moved, false).found);
}

#[test]
fn what_is_no_report_is_refused() {
    for (text, what) in [
        ("{", "not JSON"),
        ("[1]", "no schema"),
        (r#"{"schema": "xent-diff/9"}"#, "expected \"xent-diff/1\""),
        (r#"{"schema": "xent-diff/1"}"#, "no member \"dump\""),
        (r#"{"schema": "xent-diff/1", "reports": 3}"#, "\"reports\" that is no list"),
        (r#"{"schema": "xent-diff/1", "dump": {}, "candidates": [{}]}"#, "no member \"microbatches\""),
    ] {
        let error = Baseline::parse("old.json", text).unwrap_err();
        assert!(error.starts_with("--baseline old.json: ") && error.contains(what) && error.contains("--json"), "{error}");
    }
    let text = one(&samples::agreeing()).replace("\"agree\"", "\"fine\"");
    assert!(Baseline::parse("old.json", &text).unwrap_err().contains("verdict \"fine\""));
}

#[test]
fn it_is_shown() {
    let mut report = samples::microbatches(3, &[0, 1]);
    report.baseline = Some(compare(&samples::microbatches(3, &[1, 2]), &report));
    let text = render(&report, Style { colour: false, width: 100 });
    let section: String =
        text.lines().skip_while(|line| !line.starts_with("baseline")).take(3).fold(String::new(), |t, l| t + l + "\n");
    assert_snapshot!(section, @r#"
    baseline      beside old.json, of 16 tensors, 1 worse, 1 better and 14 the same.
      worse       recorded, step 0, microbatch 0, d_hidden: 1.01× before, 12.1× now
      better      recorded, step 0, microbatch 2, d_hidden: 36.4× before, 1.01× now
    "#);
    let page = html::render(std::slice::from_ref(&report), &["dumps/gone"]);
    assert!(page.contains("<h2>Baseline</h2>") && page.contains("dumps/gone</code> not judged any more"));
    let text = markdown::render(std::slice::from_ref(&report), &[]);
    assert!(text.contains("**Baseline** beside old.json"), "{text}");
    assert_eq!(report.verdict, Verdict::Diverge);
    let json: serde_json::Value = serde_json::from_str(&one(&report)).unwrap();
    assert_eq!(json["baseline"]["change"], "worse");
    assert_eq!(json["baseline"]["tensors"][0]["tensor"], "d_hidden");
}
