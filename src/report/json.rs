//! The JSON report: what scripts rely on (`docs/report.md`).
//!
//! A number that is not finite is written as `null`, since JSON has no other word for it.

use super::model::{Report, Verdict};
use serde::Serialize;

/// Name and version of the report's shape.
pub const SCHEMA: &str = "xent-diff/1";

#[derive(Serialize)]
struct One<'a> {
    schema: &'static str,
    #[serde(flatten)]
    report: &'a Report,
}

#[derive(Serialize)]
struct Many<'a> {
    schema: &'static str,
    verdict: Verdict,
    reports: Vec<Entry<'a>>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    not_judged: &'a [&'a str],
}

#[derive(Serialize)]
struct Entry<'a> {
    path: &'a str,
    #[serde(flatten)]
    report: &'a Report,
}

/// The report of one dump, as indented JSON with a final newline.
pub fn one(report: &Report) -> String {
    to_string(&One { schema: SCHEMA, report })
}

/// The reports of a folder of dumps, in their order; the verdict over all is the worst. `not_judged` are the dumps that a
/// baseline has and the folder has not.
pub fn many(reports: &[Report], not_judged: &[&str]) -> String {
    let verdict = reports.iter().map(|report| report.verdict).max().unwrap_or(Verdict::Agree);
    let reports = reports.iter().map(|report| Entry { path: &report.dump.path, report }).collect();
    to_string(&Many { schema: SCHEMA, verdict, reports, not_judged })
}

/// `value` as indented JSON with a final newline.
pub fn to_string(value: &impl Serialize) -> String {
    let mut text = serde_json::to_string_pretty(value).expect("plain data with string keys serialises");
    text.push('\n');
    text
}
