//! A real case: two JAX processes, of which one alone reads a figure of an array that is spread over both.

use super::support::Bench;
use serde_json::json;

#[test]
#[ignore = "needs jax; tests/scripts/python-venv makes .venv, FUSED_XENT_PYTHON names its python"]
fn a_read_by_the_leader_alone_is_singled_out_among_harmless_switches() {
    let python = std::env::var("FUSED_XENT_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let program = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/jax/leader_read.py");
    let bench = Bench::new(&format!("exec '{python}' '{program}' \"$@\""));
    let switches = [
        "--switch",
        "logging=--verbose",
        "--switch",
        "leader-norm=--leader-norm",
        "--switch",
        "barriers=--barrier",
        "--timeout",
        "40",
    ];
    let (code, report) = bench.report(&switches);
    assert_eq!(
        (code, &report["culprit"], &report["cures"]),
        (Some(1), &json!(["leader-norm"]), &json!([["leader-norm"]])),
        "{report}"
    );
    assert_eq!(report["confidence"], "certain", "{report}");
}
