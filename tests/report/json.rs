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
    let rungs = &candidate["substitution"]["rungs"];
    assert_eq!(rungs[0]["stage"], "d_unembedding_label");
    assert_eq!((&rungs[0]["enters"], &rungs[0]["record"]), (&json!(true), &json!(["d_label_logits"])));
    let inputs = json!([{ "stage": "lse", "diverges": false }, { "stage": "d_unembedding_label", "diverges": true }]);
    assert_eq!((&rungs[1]["enters"], &rungs[1]["inputs"]), (&json!(false), &inputs));
    assert!(["record", "along", "rows", "rounded_inputs"].iter().all(|absent| rungs[1].get(absent).is_none()));
    let repair =
        json!({ "repaired": "d_unembedding_label", "microbatch": 0, "stage": "d_unembedding", "before": 2.65, "after": 1.01 });
    assert_eq!(candidate["substitution"]["repairs"][0], repair);
    assert!(serde_json::to_value(samples::agreeing()).unwrap()["candidates"][0].get("substitution").is_none());
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
    assert_eq!(report["candidates"][0]["findings"][0]["tell_apart"], json!(["the parts of dK, in float32"]));
}
