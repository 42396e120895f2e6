//! The diff on dumps whose gradients, right and wrong, numpy computed: a second implementation of the faults, which shares no
//! code and no randomness with the one by which the diff explains. `tests/faults/cases.py` is the table of cases.

use fused_xent::diff::fault::CATALOGUE;
use fused_xent::diff::{Candidate, Settings, judge};
use fused_xent::report::model::{Finding, Report, Verdict};
use serde::Deserialize;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

/// What `tests/faults/generate.py` says of a dump.
#[derive(Deserialize)]
struct Case {
    name: String,
    /// The causes that must be found, in any order; none if the diff must agree.
    causes: Vec<String>,
    /// The parameters that the data give away: ways to give them, each of names with the values that are right. None: any.
    parameters: Vec<BTreeMap<String, Vec<Value>>>,
    /// Causes that may be named in place of the right one or beside it, with the reason.
    alike: BTreeMap<String, String>,
}

/// A factor that is no whole number is fitted to rounded values.
const SAME_NUMBER: f64 = 1e-3;

fn equal(found: &Value, right: &Value) -> bool {
    match (found.as_f64(), right.as_f64()) {
        (Some(found), Some(right)) => (found - right).abs() <= SAME_NUMBER * right.abs(),
        _ => found == right,
    }
}

/// What is wrong with the findings of one set of recorded gradients.
fn complaint(case: &Case, findings: &[Finding]) -> Option<String> {
    let found: Vec<&str> = findings.iter().map(|f| f.cause.as_str()).collect();
    let is_right = |cause: &str| case.causes.iter().any(|c| c == cause) || case.alike.contains_key(cause);
    if found.len() != case.causes.len() || !found.iter().all(|cause| is_right(cause)) {
        return Some(format!("found {found:?}"));
    }
    // Each of them is named, at least beside one that is alike.
    let listed: Vec<&str> = findings.iter().flat_map(|f| &f.indistinguishable_from).map(String::as_str).collect();
    if let Some(cause) = case.causes.iter().find(|c| !found.contains(&c.as_str()) && !listed.contains(&c.as_str())) {
        return Some(format!("found {found:?}, not {cause}"));
    }
    if let Some(other) = listed.iter().find(|cause| !is_right(cause)) {
        return Some(format!("{found:?} is said to be indistinguishable from {other}"));
    }
    let finding = findings.first().filter(|f| case.causes.contains(&f.cause) && !case.parameters.is_empty())?;
    let holds = |(name, right): (&String, &Vec<Value>)| {
        finding.parameters.get(name).is_some_and(|found| right.iter().any(|right| equal(found, right)))
    };
    let right = case.parameters.iter().any(|way| way.iter().all(holds));
    (!right).then(|| format!("parameters {:?}, not {:?}", finding.parameters, case.parameters))
}

fn check(case: &Case, report: &Report) -> Result<(), String> {
    let diverging = || report.candidates.iter().filter(|c| c.verdict == Verdict::Diverge);
    let shown = || {
        let tensors = diverging().flat_map(|c| {
            let of_step = c.accumulated.iter().flat_map(|a| &a.tensors).map(|t| (None, t));
            c.microbatches.iter().flat_map(|m| m.tensors.iter().map(|t| (Some(m.microbatch), t))).chain(of_step)
        });
        let reasons = tensors.filter_map(|(m, t)| Some(format!("  {m:?} {}: {} ({:.2})", t.name, t.reason.as_ref()?, t.ratio)));
        let findings = diverging().flat_map(|c| &c.findings);
        let findings = findings.map(|f| format!("  {} {:?}: {}", f.cause, f.confidence, f.evidence));
        reasons.chain(findings).map(|line| format!("\n{line}")).collect::<String>()
    };
    match (report.verdict, case.causes.is_empty()) {
        (Verdict::Agree, true) => Ok(()),
        (Verdict::Agree, false) => Err("agrees".into()),
        (Verdict::Diverge, true) => Err(format!("diverges{}", shown())),
        (Verdict::Diverge, false) => match diverging().find_map(|c| complaint(case, &c.findings)) {
            None => Ok(()),
            Some(complaint) => Err(format!("{complaint}{}", shown())),
        },
    }
}

fn judge_recorded(path: &Path) -> Report {
    judge(path, &Settings { candidates: vec![Candidate::Recorded], ..Settings::default() }, &()).unwrap()
}

#[test]
#[ignore = "needs numpy and ml_dtypes: run through make test"]
fn faults_that_numpy_computed_are_named() {
    let python = std::env::var("FUSED_XENT_PYTHON").expect("FUSED_XENT_PYTHON names a python with numpy and ml_dtypes");
    let folder = tempfile::tempdir().unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/faults/generate.py");
    let status = Command::new(python).arg("-B").arg(script).arg(folder.path()).status().unwrap();
    assert!(status.success());
    let table = std::fs::read_to_string(folder.path().join("cases.json")).unwrap();
    let cases: Vec<Case> = serde_json::from_str(&table).unwrap();

    let mut failures = Vec::new();
    for case in &cases {
        if let Err(found) = check(case, &judge_recorded(&folder.path().join(&case.name))) {
            failures.push(format!("{}: {found}", case.name));
        }
    }
    let named: BTreeSet<&str> = cases.iter().flat_map(|c| &c.causes).map(String::as_str).collect();
    let missing: Vec<&str> = CATALOGUE.iter().map(|entry| entry.slug).filter(|slug| !named.contains(slug)).collect();
    assert!(missing.is_empty(), "faults without a case: {missing:?}");
    assert!(failures.is_empty(), "{} of {} cases:\n{}", failures.len(), cases.len(), failures.join("\n"));
}
