//! `xent-diff tpu-selftest`: its cases by the TPU kernels, whose emitted text an interpreter executes; what it finds wrong; the
//! command on the CPU plugin.

use super::interpreter::array::{self, Array, Data};
use super::interpreter::hlo;
use super::load::stub;
use super::support::plugin_name;
use fused_xent::kernels::problem::LossOptions;
use fused_xent::kernels::tpu::Generation;
use fused_xent::pjrt::{Element, HostTensor};
use fused_xent::selftest::cases::{self, Case};
use fused_xent::selftest::machine::{Failure, Loaded, Machine};
use fused_xent::selftest::programs::Programs;
use fused_xent::selftest::report::{CaseReport, Outcome};
use fused_xent::selftest::run;
use half::bf16;
use rayon::prelude::*;
use serde_json::Value;
use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::process::Command;

/// Stands for a TPU.
struct Interpreter;

impl Machine for Interpreter {
    fn load(&self, program: &str) -> Result<Box<dyn Loaded + '_>, Failure> {
        Ok(Box::new(Interpreted { program: program.to_owned() }))
    }
}

struct Interpreted {
    program: String,
}

impl Loaded for Interpreted {
    fn run(&self, arguments: &[&HostTensor]) -> Result<Vec<HostTensor>, Failure> {
        let arguments: Vec<Array> = arguments.iter().map(|tensor| array(tensor)).collect();
        Ok(hlo::run(&self.program, &arguments).iter().map(tensor).collect())
    }
}

fn array(tensor: &HostTensor) -> Array {
    let element = match tensor.element {
        Element::Bf16 => array::Element::Bf16,
        Element::F32 => array::Element::F32,
        _ => array::Element::Integer,
    };
    let ty = array::Type { dims: tensor.dims.clone(), element };
    let len = ty.len();
    match element {
        array::Element::Integer => {
            Array::integers(ty, tensor.bytes.as_chunks().0.iter().map(|&x| i32::from_le_bytes(x)).collect())
        }
        _ => Array::floats(ty, (0..len).map(|i| tensor.get(i) as f32).collect()),
    }
}

fn tensor(array: &Array) -> HostTensor {
    let Data::Floats(values) = &array.data else { panic!("results are floats") };
    let (element, bytes) = match array.ty.element {
        array::Element::Bf16 => (Element::Bf16, values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect()),
        _ => (Element::F32, values.iter().flat_map(|x| x.to_le_bytes()).collect()),
    };
    HostTensor { element, dims: array.ty.dims.clone(), bytes }
}

fn mosaic(case: &Case, machine: &dyn Machine) -> CaseReport {
    run(case, &Programs::mosaic(case, Generation::V5p).unwrap(), machine)
}

fn case(name: &str) -> Case {
    cases::all(false).into_iter().find(|case| case.name == name).unwrap_or_else(|| panic!("no case {name}"))
}

/// As on a TPU, for all that is small: every form, option, type, set of cotangents, and what is isolated.
#[test]
fn the_kernels_are_right_in_the_interpreter() {
    let small = |case: &Case| case.sample.is_none() && case.shape.hidden < 1000;
    let small: Vec<Case> = cases::all(false).into_iter().filter(small).collect();
    assert!(small.len() > 30);
    let wrong: Vec<String> = small
        .par_iter()
        .map(|case| mosaic(case, &Interpreter))
        .filter(|report| report.outcome != Outcome::Pass || report.same_twice != Some(true) || report.tensors.is_empty())
        .map(|report| format!("{}: {:?}", report.name, report.reason))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[track_caller]
fn fails(report: &CaseReport, words: &[&str]) {
    let reason = report.reason.as_deref().unwrap_or_default();
    assert_eq!(report.outcome, Outcome::Fail, "{reason}");
    words.iter().for_each(|word| assert!(reason.contains(word), "no {word:?} in {reason}"));
}

/// Programs of another loss, or of another number of padding ids, in place of the case's own.
#[test]
fn kernels_that_forget_an_option_are_wrong() {
    let own = case("options");
    let with = |change: fn(&mut LossOptions)| {
        let mut other = own.clone();
        change(&mut other.options);
        run(&own, &Programs::mosaic(&other, Generation::V5e).unwrap(), &Interpreter)
    };
    fails(&with(|options| options.z_loss = 0.0), &["loss: "]);
    fails(&with(|options| options.logit_softcap = None), &["the floor, where honest rounding stays below"]);
    fails(&with(|options| options.valid_vocab = Some(701)), &[": "]);
}

/// Adds to one element of one result, from a certain run on.
struct Wrong {
    result: usize,
    element: usize,
    by: f32,
    from: usize,
    runs: Cell<usize>,
}

impl Machine for Wrong {
    fn load(&self, program: &str) -> Result<Box<dyn Loaded + '_>, Failure> {
        Ok(Box::new(WronglyRun { wrong: self, interpreted: Interpreted { program: program.to_owned() } }))
    }
}

struct WronglyRun<'a> {
    wrong: &'a Wrong,
    interpreted: Interpreted,
}

impl Loaded for WronglyRun<'_> {
    fn run(&self, arguments: &[&HostTensor]) -> Result<Vec<HostTensor>, Failure> {
        let Self { wrong, interpreted } = self;
        let mut results = interpreted.run(arguments)?;
        if let Some(result) = results.get_mut(wrong.result).filter(|result| result.element == Element::F32)
            && wrong.runs.replace(wrong.runs.get() + 1) >= wrong.from
        {
            let at = 4 * wrong.element;
            let value = result.get(wrong.element) as f32 + wrong.by;
            result.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        Ok(results)
    }
}

#[test]
fn one_wrong_element_is_found() {
    // dK comes second from the backward, lse second from the forward.
    let wrong = |element, by, from| Wrong { result: 1, element, by, from, runs: Cell::new(0) };
    let report = mosaic(&case("one-pass"), &wrong(17, 0.01, 0));
    fails(&report, &["lse: "]);
    assert_eq!(report.worst().unwrap().worst.as_ref().unwrap().index, [17, 0]);
    fails(&mosaic(&case("one-pass"), &wrong(17, f32::NAN, 0)), &["1 elements are not finite"]);
    // The forward and the backward are run before, once each: only the second time is wrong.
    fails(&mosaic(&case("one-pass"), &wrong(17, 0.01, 2)), &["a second run gave other bits"]);
    // A unit of a sum that must be exact: above what the floor sees.
    let one_unit = Wrong { result: 2, element: 5, by: 0.0625, from: 0, runs: Cell::new(0) };
    fails(&mosaic(&case("sum-exact"), &one_unit), &["sum: ", "which float32 holds"]);
}

struct Refuses;

impl Machine for Refuses {
    fn load(&self, _: &str) -> Result<Box<dyn Loaded + '_>, Failure> {
        Err("out of VMEM".into())
    }
}

#[test]
fn a_program_that_is_refused_is_wrong() {
    fails(&mosaic(&case("chunks"), &Refuses), &["out of VMEM"]);
}

/// No libtpu is found, wherever there may be one.
fn selftest(arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xent-diff"));
    command.args(["tpu-selftest"]).args(arguments).env("FUSED_XENT_PJRT_PLUGINS", "tpu:/no/such/libtpu.so");
    let output = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
#[ignore = "needs a PJRT plugin: `make test` runs it with FUSED_XENT_TEST_PLUGIN"]
fn without_a_tpu_other_programs_run_and_it_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let (json, texts) = (folder.path().join("report.json"), folder.path().join("texts"));
    let (code, out, err) =
        selftest(&["--plugin", &plugin_name(), "--quick", "--json", json.to_str().unwrap(), "--dump", texts.to_str().unwrap()]);
    assert_eq!((code, err.as_str()), (Some(0), ""), "{out}");
    let words = out.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(words.contains("– not run on a TPU: the Mosaic kernels were neither compiled nor executed; the StableHLO"), "{out}");
    let report: Value = serde_json::from_str(&fs::read_to_string(json).unwrap()).unwrap();
    assert_eq!(report["schema"], "fused-xent-tpu-selftest/1");
    assert_eq!((&report["verdict"], &report["environment"]["executed"]), (&"not_run_on_a_tpu".into(), &"stablehlo".into()));
    assert!(report["environment"]["no_compiler"].as_str().unwrap().contains("/no/such/libtpu.so"));
    let outcomes: Vec<(&str, &str)> = report["cases"]
        .as_array()
        .unwrap()
        .iter()
        .map(|case| (case["name"].as_str().unwrap(), case["outcome"].as_str().unwrap()))
        .collect();
    for (name, outcome) in outcomes {
        // What the StableHLO programs have no words for.
        let expected = if ["one-pass-accumulate", "cotangents"].contains(&name) { "not_run" } else { "pass" };
        assert_eq!(outcome, expected, "{name}");
    }
    let timings = report["timings"].as_array().unwrap();
    assert!(timings.len() == 1 && timings[0]["median_ms"].as_f64().unwrap() > 0.0);
    // Texts are those of TPU kernels, of which there are none here.
    assert!(!texts.exists());
}

/// libtpu and XLA for the CPU in one process.
#[test]
#[ignore = "needs a PJRT plugin and libtpu: `make test` runs it with FUSED_XENT_TEST_PLUGIN and FUSED_XENT_TEST_LIBTPU"]
fn libtpu_compiles_the_kernels_ahead() {
    let libtpu = std::env::var("FUSED_XENT_TEST_LIBTPU").expect("FUSED_XENT_TEST_LIBTPU is libtpu's path");
    let texts = tempfile::tempdir().unwrap();
    let (plugin, dump) = (plugin_name(), texts.path().to_str().unwrap());
    let options = ["--quick", "--generation", "v6e", "--json", "-"];
    let arguments = [&["--plugin", &plugin, "--libtpu", &libtpu, "--dump", dump], &options[..]].concat();
    let (code, out, err) = selftest(&arguments);
    assert_eq!(code, Some(0), "{err}");
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(report["verdict"], "not_run_on_a_tpu");
    assert_eq!(
        (&report["environment"]["generation"], &report["environment"]["compiler"]["kind"]),
        (&"v6e".into(), &"TPU v6 lite".into())
    );
    for case in report["cases"].as_array().unwrap() {
        let compiled = case["compiled_ahead"].as_array().unwrap();
        let passes: Vec<&str> = compiled.iter().map(|pass| pass["pass"].as_str().unwrap()).collect();
        assert_eq!(passes, ["forward", "backward"], "{}", case["name"]);
        assert!(compiled.iter().all(|pass| pass["code_bytes"].as_u64().unwrap() > 0));
    }
    let chunks = texts.path().join("chunks.backward.2.fused_xent_backward.mosaic");
    assert!(fs::read_to_string(chunks).unwrap().contains("stable_mosaic.tpu.matmul"));
    assert!(fs::read_to_string(texts.path().join("exp.forward.mlir")).unwrap().contains("@tpu_custom_call"));
    // A folder that is a file.
    let file = texts.path().join("exp.forward.mlir");
    let arguments = [&["--plugin", &plugin, "--libtpu", &libtpu, "--dump", file.to_str().unwrap()], &options[..]].concat();
    refused(&arguments, &["exp.forward.mlir: cannot be written"]);
}

#[test]
#[ignore = "needs a PJRT plugin: `make test` runs it with FUSED_XENT_TEST_PLUGIN"]
fn a_libtpu_that_is_asked_for_must_be_there() {
    let (code, out, err) = selftest(&["--plugin", &plugin_name(), "--quick", "--libtpu", "/no/such/libtpu.so"]);
    assert_eq!((code, out.as_str()), (Some(2), ""));
    assert!(err.contains("PJRT plugin \"/no/such/libtpu.so\": not found"), "{err}");
}

#[track_caller]
fn refused(arguments: &[&str], words: &[&str]) {
    let (code, out, err) = selftest(arguments);
    assert_eq!((code, out.as_str()), (Some(2), ""), "{err}");
    words.iter().for_each(|word| assert!(err.contains(word), "no {word:?} in {err}"));
    assert!(!err.contains("panicked"), "{err}");
}

#[test]
fn what_cannot_run_says_what_would() {
    refused(
        &[],
        &["PJRT plugin \"tpu\": not found at /no/such/libtpu.so", "`pip install libtpu`", "--plugin cpu checks what a CPU can"],
    );
    refused(&["--generation", "v9"], &["'v9'", "--generation <GENERATION>", "expected one of v4, v5e, v5p, v6e, v7x"]);
    refused(&["--json", "/no/such/folder/report.json"], &["/no/such/folder/report.json: cannot be written"]);
    let folder = tempfile::tempdir().unwrap();
    let plugin = |path: &Path| path.to_str().unwrap().to_owned();
    // It can be loaded, and has no client.
    let empty = plugin(&stub(folder.path(), 60, 10, 0));
    refused(
        &["--plugin", &empty],
        &["does not have PJRT_Client_Create", "run it where there is a TPU that no other process holds"],
    );
}
