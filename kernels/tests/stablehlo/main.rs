//! The StableHLO programs, run by XLA on this machine's CPU, against the oracle at the floor of their contracts.

#[path = "../suite/mod.rs"]
mod suite;

use fused_xent_kernels::Forward;
use fused_xent_kernels::problem::{DType, Label, LossOptions};
use fused_xent_kernels::stablehlo::{Program, Spec, Type, chunked, naive};
use half::{bf16, f16};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, TestRng, TestRunner};
use std::fs;
use std::path::Path;
use std::process::Command;
use suite::*;

/// Programs for so many cases are run in one process.
const CASES: usize = 24;

/// A case, with what to run on it.
struct Planned {
    case: Case,
    spec: Spec,
    program: Program,
}

impl Planned {
    fn new(recipe: Recipe, narrow: bool, bf16_logits: bool, bf16_dlogits: bool, tile: Option<usize>) -> Self {
        // g alone: programs take no other cotangent.
        let case = Recipe { cotangents: [recipe.cotangents[0].max(0.3), 0.0, 0.0], ..recipe }.case();
        let inputs = case.dtypes();
        let gradients = if narrow { inputs } else { [DType::F32; 2] };
        // The largest logits here have gradients beyond what float16 holds.
        let overflows = |dtype| dtype == DType::F16 && recipe.spread > 100.0;
        let gradients = gradients.map(|dtype| if overflows(dtype) { DType::F32 } else { dtype });
        let (shape, layout, options) = (case.shape, case.layout, case.options);
        let spec = Spec { shape, layout, inputs, gradients, options, bf16_logits, bf16_dlogits };
        let program = tile.map_or_else(|| naive(&spec), |tile| chunked(&spec, tile));
        Self { case, spec, program }
    }

    fn write(&self, folder: &Path, name: &str) {
        let problem = self.case.problem();
        let label = |label: &Label| if let Label::Column(id) = label { *id as i32 } else { -1 };
        let labels: Vec<u8> = problem.labels().iter().flat_map(|l| label(l).to_le_bytes()).collect();
        let g = self.case.cotangents[0].as_ref().expect("each case has it");
        let g = g.iter().flat_map(|g| g.to_le_bytes()).collect();
        let arguments = [bytes(&self.case.hidden), bytes(&self.case.unembedding), labels, g];
        for (i, bytes) in arguments.into_iter().enumerate() {
            fs::write(folder.join(format!("{name}.in.{i}")), bytes).unwrap();
        }
        let types = |types: &[(&str, Type)]| {
            types.iter().map(|(_, ty)| format!("[{:?}, {:?}]", ty.element, ty.dims)).collect::<Vec<_>>().join(", ")
        };
        let types = format!("[[{}], [{}]]", types(&self.program.inputs), types(&self.program.outputs));
        fs::write(folder.join(format!("{name}.json")), types).unwrap();
        fs::write(folder.join(format!("{name}.mlir")), &self.program.text).unwrap();
    }

    fn read(&self, folder: &Path, name: &str) -> Results {
        let read = |i: usize| fs::read(folder.join(format!("{name}.out.{i}"))).unwrap();
        let floats = |i: usize| read(i).as_chunks().0.iter().map(|&x| f32::from_le_bytes(x)).collect();
        let tensor = |i: usize| match self.spec.gradients[i - 3] {
            DType::Bf16 => Tensor::Bf16(read(i).as_chunks().0.iter().map(|&x| bf16::from_le_bytes(x)).collect()),
            DType::F16 => Tensor::F16(read(i).as_chunks().0.iter().map(|&x| f16::from_le_bytes(x)).collect()),
            DType::F32 => Tensor::F32(floats(i)),
        };
        let forward = Forward { loss: floats(0), lse: floats(1), label_logits: floats(2) };
        Results { forward, d_hidden: tensor(3), d_unembedding: tensor(4) }
    }
}

fn bytes(tensor: &Tensor) -> Vec<u8> {
    match tensor {
        Tensor::Bf16(x) => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Tensor::F16(x) => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Tensor::F32(x) => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

fn plan() -> Vec<Planned> {
    let mut runner = TestRunner::new_with_rng(Config::default(), TestRng::deterministic_rng(Config::default().rng_algorithm));
    let tiles = prop_oneof![1 => Just(None), 2 => prop::sample::select(vec![1, 7, 64, 128]).prop_map(Some)];
    let cases = (recipes(60, 40, 300), any::<[bool; 3]>(), tiles);
    let draw = |_| cases.new_tree(&mut runner).unwrap().current();
    let drawn: Vec<_> = (0..CASES).map(draw).collect();
    let plan = |(recipe, [narrow, logits, dlogits], tile): (Recipe, [bool; 3], Option<usize>)| {
        Planned::new(recipe, narrow, logits, dlogits, tile)
    };
    drawn.into_iter().filter(|(recipe, ..)| recipe.shape.tokens > 0).map(plan).collect()
}

#[test]
#[ignore = "needs jax: `make test` runs it with FUSED_XENT_PYTHON"]
fn programs_are_at_the_floor() {
    let python = std::env::var_os("FUSED_XENT_PYTHON").expect("FUSED_XENT_PYTHON is a Python with jax");
    let folder = tempfile::tempdir().unwrap();
    let planned = plan();
    for (i, planned) in planned.iter().enumerate() {
        planned.write(folder.path(), &format!("{i:03}"));
    }
    // The comparison refuses a program that forgets an option.
    let options = LossOptions { z_loss: 1e-2, label_smoothing: 0.1, ..LossOptions::default() };
    let forgetful = [LossOptions { z_loss: 0.0, ..options }, LossOptions { label_smoothing: 0.0, ..options }].map(|forgotten| {
        let right = Planned::new(Recipe { options, ..Recipe::plain(20, 16, 100) }, false, false, false, Some(64));
        Planned { program: chunked(&Spec { options: forgotten, ..right.spec }, 64), ..right }
    });
    for (i, planned) in forgetful.iter().enumerate() {
        planned.write(folder.path(), &format!("forgetful{i}"));
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/stablehlo/run.py");
    let status = Command::new(python).arg(script).arg(folder.path()).env("JAX_PLATFORMS", "cpu").status().unwrap();
    assert!(status.success(), "run.py");
    let mut wrong = Vec::new();
    for (i, planned) in planned.iter().enumerate() {
        let truth = Truth::new(&planned.case, planned.spec.contract());
        let results = planned.read(folder.path(), &format!("{i:03}"));
        for (tensor, verdict) in truth.judge(&planned.case, &results) {
            if !verdict.honest() {
                wrong.push(format!("{i}: {tensor}: {verdict:?}, {:?}", planned.spec));
            }
        }
    }
    for (i, planned) in forgetful.iter().enumerate() {
        let verdicts = Truth::new(&planned.case, planned.spec.contract())
            .judge(&planned.case, &planned.read(folder.path(), &format!("forgetful{i}")));
        assert!(verdicts.iter().any(|(_, verdict)| !verdict.honest()), "{verdicts:?}");
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

/// What a naive program for plain options says, word for word.
#[test]
fn the_text_is_this() {
    let recipe = Recipe { dtypes: [DType::Bf16; 2], ..Recipe::plain(2, 3, 5) };
    let text = Planned::new(recipe, true, false, true, None).program.text;
    assert_eq!(text, include_str!("naive.mlir"), "{text}");
}
