//! The StableHLO programs, run on the device, against the oracle at the floor of their contracts.

use super::suite::*;
use super::support::device;
use fused_xent::kernels::Forward;
use fused_xent::kernels::problem::{DType, Label, LossOptions};
use fused_xent::kernels::stablehlo::{Program, Spec, chunked, naive};
use fused_xent::pjrt::{CompileOptions, Element, HostTensor};
use half::{bf16, f16};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, TestRng, TestRunner};

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

    fn run(&self) -> Results {
        let problem = self.case.problem();
        let label = |label: &Label| label.column().map_or(-1, |id| id as i32);
        let labels: Vec<u8> = problem.labels().iter().flat_map(|l| label(l).to_le_bytes()).collect();
        let g = self.case.cotangents[0].as_ref().expect("each case has it");
        let g = g.iter().flat_map(|g| g.to_le_bytes()).collect();
        let arguments = [bytes(&self.case.hidden), bytes(&self.case.unembedding), labels, g];
        let device = device();
        let uploaded = arguments
            .iter()
            .zip(&self.program.inputs)
            .map(|(bytes, (_, ty))| device.upload(Element::by_name(ty.element).unwrap(), &ty.dims, bytes).unwrap());
        let uploaded: Vec<_> = uploaded.collect();
        let compiled = device.compile(&self.program.text, &CompileOptions::default()).unwrap();
        let results = compiled.execute(&uploaded.iter().collect::<Vec<_>>()).unwrap();
        let results: Vec<HostTensor> = results.iter().map(|result| result.to_host().unwrap()).collect();
        for (result, (name, ty)) in results.iter().zip(&self.program.outputs) {
            assert_eq!((result.element.name(), &result.dims), (ty.element, &ty.dims), "{name}");
        }
        let floats = |i: usize| results[i].bytes.as_chunks().0.iter().map(|&x| f32::from_le_bytes(x)).collect();
        let tensor = |i: usize| match self.spec.gradients[i - 3] {
            DType::Bf16 => Tensor::Bf16(results[i].bytes.as_chunks().0.iter().map(|&x| bf16::from_le_bytes(x)).collect()),
            DType::F16 => Tensor::F16(results[i].bytes.as_chunks().0.iter().map(|&x| f16::from_le_bytes(x)).collect()),
            DType::F32 => Tensor::F32(floats(i)),
        };
        let forward = Forward { loss: floats(0), lse: floats(1), label_logits: floats(2) };
        Results { forward, d_hidden: tensor(3), d_unembedding: tensor(4) }
    }

    fn verdicts(&self) -> Vec<(&'static str, Verdict)> {
        Truth::new(&self.case, self.spec.contract()).judge(&self.case, &self.run())
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
#[ignore = "needs a PJRT plugin: `make test` runs it with FUSED_XENT_TEST_PLUGIN"]
fn programs_are_at_the_floor() {
    let mut wrong = Vec::new();
    for (i, planned) in plan().iter().enumerate() {
        let dishonest = planned.verdicts().into_iter().filter(|(_, verdict)| !verdict.honest());
        wrong.extend(dishonest.map(|(tensor, verdict)| format!("{i}: {tensor}: {verdict:?}, {:?}", planned.spec)));
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

/// A larger shape, several tiles and a ragged last one.
#[test]
#[ignore = "needs a PJRT plugin: `make test` runs it with FUSED_XENT_TEST_PLUGIN"]
fn a_larger_program_is_at_the_floor() {
    for (spread, tile) in [(1.0, None), (1.0, Some(512)), (30.0, Some(300))] {
        let recipe = Recipe { spread, dtypes: [DType::Bf16; 2], weighted: true, ..Recipe::plain(200, 130, 2001) };
        for dlogits in [false, true] {
            let verdicts = Planned::new(recipe, false, false, dlogits, tile).verdicts();
            assert!(verdicts.iter().all(|(_, verdict)| verdict.honest()), "{spread}, {tile:?}: {verdicts:?}");
        }
    }
}

/// The comparison refuses a program that forgets an option.
#[test]
#[ignore = "needs a PJRT plugin: `make test` runs it with FUSED_XENT_TEST_PLUGIN"]
fn a_forgetful_program_is_not() {
    let options = LossOptions { z_loss: 1e-2, label_smoothing: 0.1, ..LossOptions::default() };
    for forgotten in [LossOptions { z_loss: 0.0, ..options }, LossOptions { label_smoothing: 0.0, ..options }] {
        let right = Planned::new(Recipe { options, ..Recipe::plain(20, 16, 100) }, false, false, false, Some(64));
        assert!(right.verdicts().iter().all(|(_, verdict)| verdict.honest()));
        let forgetful = Planned { program: chunked(&Spec { options: forgotten, ..right.spec }, 64), ..right };
        let verdicts = forgetful.verdicts();
        assert!(verdicts.iter().any(|(_, verdict)| !verdict.honest()), "{verdicts:?}");
    }
}
