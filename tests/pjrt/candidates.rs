//! `--candidate pjrt:…` and `stablehlo:…`, as a user calls them.

use super::load::stub;
use super::support::plugin_name;
use fused_xent::kernels::problem::{DType, Layout, LossOptions, Shape};
use fused_xent::kernels::stablehlo::{Spec, naive};
use std::fs;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

/// [N, D] and [V, D] of the dump, which `sharded.mlir` is for too: `jax.jit(jax.value_and_grad(loss, argnums=(0, 1)),
/// in_shardings=…).lower(…).as_text()` of a mean loss with a sharding constraint inside, over a mesh of two devices.
const SHAPE: Shape = Shape { tokens: 8, hidden: 16, vocab: 40 };

fn xent_diff(at: &Path, arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_xent-diff")).current_dir(at).args(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

/// A dump of two microbatches with bfloat16 inputs, whose own gradients lack the label term.
fn dump(more: &[&str]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let synth = ["synth", "dump", "--tokens", "8", "--hidden", "16", "--vocab", "40", "--fault", "label-missing", "--quiet"];
    let (code, _, err) = xent_diff(folder.path(), &[&synth, more].concat());
    assert_eq!((code, err.as_str()), (Some(0), ""));
    folder
}

fn module(folder: &Path, name: &str, text: &str) -> String {
    fs::write(folder.join(name), text).unwrap();
    format!("stablehlo:{name}@{}", plugin_name())
}

fn ours(options: LossOptions) -> String {
    let (inputs, gradients) = ([DType::Bf16; 2], [DType::F32; 2]);
    let spec = Spec { shape: SHAPE, layout: Layout::Vd, inputs, gradients, options, bf16_logits: false, bf16_dlogits: false };
    naive(&spec).text
}

#[test]
#[ignore = "needs a PJRT plugin: `make test` runs it with FUSED_XENT_TEST_PLUGIN"]
fn one_dump_goes_through_six_candidates_in_one_call() {
    let folder = dump(&[]);
    let plugin = plugin_name();
    let exported = module(folder.path(), "exported.mlir", include_str!("sharded.mlir"));
    let candidates = [
        "recorded",
        "cpu",
        &format!("pjrt:{plugin}"),
        &format!("pjrt:{plugin}:naive"),
        &exported,
        &module(folder.path(), "ours.mlir", &ours(LossOptions::default())),
    ];
    let arguments: Vec<&str> =
        ["dump", "--json", "-"].into_iter().chain(candidates.iter().flat_map(|c| ["--candidate", *c])).collect();
    let (code, out, err) = xent_diff(folder.path(), &arguments);
    assert_eq!((code, err.as_str()), (Some(1), ""), "{out}");
    let report: serde_json::Value = serde_json::from_str(&out).unwrap();
    let judged: Vec<(&str, &str)> = report["candidates"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| (c["candidate"].as_str().unwrap(), c["verdict"].as_str().unwrap()))
        .collect();
    let expected: Vec<(&str, &str)> =
        candidates.iter().map(|c| (*c, if *c == "recorded" { "diverge" } else { "agree" })).collect();
    assert_eq!(judged, expected);
    // Programs of ours are held to what they declare, and the sum over the step is judged; a module's 16-bit gradients have none.
    assert_eq!(report["candidates"][2]["contract"]["source"], "declared");
    assert!(report["candidates"][2]["accumulated"].is_object() && report["candidates"][4]["accumulated"].is_null());
    assert_eq!(report["candidates"][4]["contract"]["source"], "assumed");
}

/// All options at once, [D, V], weights and float32: what our programs serve.
#[test]
#[ignore = "needs a PJRT plugin: `make test` runs it with FUSED_XENT_TEST_PLUGIN"]
fn programs_serve_every_option() {
    let loss = r#"{"z_loss": 1e-3, "label_smoothing": 0.1, "logit_softcap": 20, "logit_scale": 0.7, "valid_vocab": 33,
        "reduction": "mean", "microbatches": "global", "cotangent": 3}"#;
    let folder = dump(&["--weights", "--masked", "0.3", "--loss", loss]);
    let plugin = format!("pjrt:{}", plugin_name());
    let (code, out, err) = xent_diff(folder.path(), &["dump", "--candidate", &plugin, "--candidate", &format!("{plugin}:naive")]);
    assert_eq!((code, err.as_str()), (Some(0), ""), "{out}");
}

#[test]
#[ignore = "needs a PJRT plugin: `make test` runs it with FUSED_XENT_TEST_PLUGIN"]
fn a_module_that_is_wrong_diverges() {
    let folder = dump(&[]);
    let z_loss = module(folder.path(), "z_loss.mlir", &ours(LossOptions { z_loss: 1e-2, ..LossOptions::default() }));
    let (code, out, err) = xent_diff(folder.path(), &["dump", "--quiet", "--candidate", &z_loss]);
    assert_eq!((code, err.as_str()), (Some(1), ""));
    // Lines are broken where they are full, which depends on where the plugin lies.
    let diverges_at = |out: &str, stage: &str| {
        let words: Vec<&str> = out.split_whitespace().collect();
        words.windows(3).any(|three| three[..2] == ["diverges", "at"] && three[2] == stage)
    };
    assert!(diverges_at(&out, "loss"), "{out}");
    // [D, V] in and out, of a dump that has [V, D].
    let turned = "module @m { func.func public @main(%hidden: tensor<8x16xf32>, %unembedding: tensor<16x40xf32>, \
        %labels: tensor<8xi32>) -> tensor<16x40xf32> { return %unembedding : tensor<16x40xf32> } }";
    let turned = module(folder.path(), "turned.mlir", turned);
    let (code, out, _) = xent_diff(folder.path(), &["dump", "--quiet", "--candidate", &turned]);
    assert!(code == Some(1) && diverges_at(&out, "d_unembedding"), "{out}");
}

/// One message each, on standard error, and exit code 2.
#[track_caller]
fn refused(at: &Path, candidate: &str, what: &[&str]) {
    let (code, out, err) = xent_diff(at, &["dump", "--candidate", candidate]);
    assert_eq!((code, out.as_str()), (Some(2), ""), "{err}");
    for what in what {
        assert!(err.contains(what), "{candidate}: no {what:?} in {err}");
    }
    assert!(!err.contains("panicked"), "{err}");
}

#[test]
fn plugins_that_cannot_be_used_are_refused() {
    let folder = dump(&[]);
    let at = folder.path();
    refused(at, "pjrt:./missing.so", &["candidate pjrt:./missing.so: PJRT plugin \"./missing.so\": not found"]);
    refused(
        at,
        "pjrt:abacus:naive",
        &["PJRT plugin \"abacus\": not found", "expected a name (cpu, cuda, rocm, tpu) or the path"],
    );
    refused(at, "pjrt:", &["PJRT plugin \"\": not found"]);
    fs::write(at.join("text.so"), "no library").unwrap();
    refused(at, "pjrt:./text.so", &["PJRT plugin ./text.so: cannot be loaded: "]);
    let old = stub(at, 40, 100, 0);
    refused(at, &format!("pjrt:{}", old.display()), &["has version 0.40 of the PJRT API; expected 0.54 or a later 0.x"]);
    let busy = stub(at, 90, 100, 10);
    refused(at, &format!("pjrt:{}", busy.display()), &["aborted: another process holds the stub"]);
}

#[test]
fn files_that_are_no_module_are_refused() {
    let folder = dump(&[]);
    let at = folder.path();
    refused(at, "stablehlo:missing.mlir", &["missing.mlir: cannot be read: ", "expected a module of StableHLO text"]);
    fs::write(at.join("bytes.mlir"), [0xff, 0xfe]).unwrap();
    refused(at, "stablehlo:bytes.mlir", &["bytes.mlir: is no text"]);
    fs::write(at.join("other.mlir"), "func.func public @main(%arg0: tensor<4xf32>) -> tensor<4xf32> {").unwrap();
    refused(at, "stablehlo:other.mlir", &["@main takes tensor<4xf32>; expected a module", "@main(hidden, unembedding, targets"]);
}

#[test]
#[ignore = "needs a PJRT plugin: `make test` runs it with FUSED_XENT_TEST_PLUGIN"]
fn modules_that_do_not_run_are_refused() {
    let folder = dump(&[]);
    let at = folder.path();
    let exported = include_str!("sharded.mlir");
    let broken = module(at, "broken.mlir", &exported.replace("stablehlo.dot_general", "stablehlo.dot_specific"));
    refused(at, &broken, &["step 0, microbatch 0: PJRT plugin ", "PJRT_Client_Compile: "]);
    let longer = module(at, "longer.mlir", &exported.replace("tensor<8x", "tensor<9x").replace("tensor<8xi32>", "tensor<9xi32>"));
    refused(at, &longer, &["@main takes tensor<9x16xbf16> as hidden; the dump has [8, 16] of bfloat16"]);
    let narrow = module(at, "narrow.mlir", &exported.replace("bf16", "f16"));
    refused(at, &narrow, &["@main takes tensor<8x16xf16> as hidden; the dump has [8, 16] of bfloat16"]);
    let collective = module(at, "collective.mlir", &exported.replace("sdy.sharding_constraint", "sdy.all_gather"));
    refused(at, &collective, &["it is for several devices: ", "sdy."]);
    // Fifty terabytes, which no machine that runs this has.
    let huge = "module @m {
  func.func public @main(%arg0: tensor<8x16xbf16>, %arg1: tensor<40x16xbf16>, %arg2: tensor<8xi32>) -> tensor<8x16xbf16> {
    %0 = stablehlo.broadcast_in_dim %arg0, dims = [0, 1] : (tensor<8x16xbf16>) -> tensor<8x16x1000000x200000xbf16>
    %1 = \"stablehlo.sort\"(%0) <{dimension = 2 : i64}> ({
    ^bb0(%a: tensor<bf16>, %b: tensor<bf16>):
      %4 = stablehlo.compare LT, %a, %b : (tensor<bf16>, tensor<bf16>) -> tensor<i1>
      stablehlo.return %4 : tensor<i1>
    }) : (tensor<8x16x1000000x200000xbf16>) -> tensor<8x16x1000000x200000xbf16>
    %2 = stablehlo.slice %1 [0:8, 0:16, 0:1, 0:1] : (tensor<8x16x1000000x200000xbf16>) -> tensor<8x16x1x1xbf16>
    %3 = stablehlo.reshape %2 : (tensor<8x16x1x1xbf16>) -> tensor<8x16xbf16>
    return %3 : tensor<8x16xbf16>
  }
}";
    refused(at, &module(at, "huge.mlir", huge), &["step 0, microbatch 0: PJRT plugin ", "out of resources: "]);
}
