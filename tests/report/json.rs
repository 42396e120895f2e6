use crate::samples;
use fused_xent::report::json::{many, one};
use serde_json::{Value, json};

#[test]
fn one_dump() {
    let report: Value = serde_json::from_str(&one(&samples::certain())).unwrap();
    assert_eq!(report["schema"], "xent-diff/1");
    assert_eq!(report["verdict"], "diverge");
    assert_eq!(report["dump"]["run_ids"], json!(["run-a"]));
    assert_eq!(report["dump"]["processes"], 2);
    assert_eq!(report["dump"]["steps"], json!([0]));
    assert_eq!(report["dump"]["interrupted"], json!([]));
    let candidate = &report["candidates"][0];
    assert_eq!(candidate["first_divergence"], json!({ "microbatch": 0, "stage": "d_unembedding_label" }));
    let tensor = &candidate["microbatches"][0]["tensors"][3];
    for field in ["rel_l2", "max_abs", "cosine", "scale", "residual", "noise_floor", "ratio", "ulp_p99", "nonfinite"] {
        assert!(tensor[field].is_number(), "{field}: {tensor}");
    }
    assert_eq!(tensor["worst"]["index"], json!([42, 3]));
    assert_eq!(tensor["pattern"]["kind"], "label_rows");
    let finding = &candidate["findings"][0];
    assert_eq!((&finding["cause"], &finding["confidence"]), (&json!("label-scatter-bf16"), &json!("certain")));
    assert_eq!(finding["parameters"], json!({ "chunks": 16, "order": "token" }));
    assert_eq!(candidate["accumulated"]["grad_norm"]["candidate"], 1.203);
    let first: Vec<&String> = report.as_object().unwrap().keys().take(4).collect();
    assert_eq!(first, ["schema", "verdict", "dump", "candidates"]);
}

#[test]
fn a_folder_of_dumps_carries_the_worst_verdict() {
    let text = many(&[samples::agreeing(), samples::certain()], &[]);
    let report: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(report["schema"], "xent-diff/1");
    assert_eq!(report["verdict"], "diverge");
    assert_eq!(report["reports"][0]["path"], "dumps/tiny");
    assert_eq!(report["reports"][0]["verdict"], "agree");
    assert!(report["reports"][0].get("schema").is_none());
    let report: Value = serde_json::from_str(&many(&[samples::agreeing()], &[])).unwrap();
    assert_eq!(report["verdict"], "agree");
}

#[test]
fn what_is_not_finite_is_null() {
    let report: Value = serde_json::from_str(&one(&samples::nonfinite())).unwrap();
    let tensors = &report["candidates"][0]["microbatches"][0]["tensors"];
    assert_eq!(tensors[3]["ratio"], Value::Null);
    assert_eq!(tensors[4]["worst"]["candidate"], Value::Null);
    assert_eq!(report["candidates"][0]["findings"][0]["explained"], Value::Null);
}
