//! From a case of the shared suite to a program, and from what it gives to the suite's results.

use super::array::{Array, Element, Type};
use super::hlo;
use super::suite::*;
use fused_xent_kernels::problem::{DType, Label, Layout, Shape};
use fused_xent_kernels::tpu::{Backward, BackwardPlan, Generation, Given, Program, Spec, Tile};
use fused_xent_kernels::{Dlogits, Forward};
use half::bf16;

/// A case, and what a program for it may choose.
pub struct Run {
    pub case: Case,
    pub spec: Spec,
    pub backward: Backward,
}

impl Run {
    pub fn new(case: Case, gradients: [DType; 2], dlogits: Dlogits) -> Self {
        let spec = Spec { shape: case.shape, layout: case.layout, inputs: case.dtypes(), options: case.options };
        let [loss, lse, label_logits] = case.cotangents.each_ref().map(Option::is_some);
        let cotangents = Given { loss, lse, label_logits };
        let backward = Backward { gradients, dlogits, cotangents, ..Backward::plain(spec) };
        Self { case, spec, backward }
    }

    fn inputs(&self) -> Vec<Array> {
        let Shape { tokens, hidden, vocab } = self.case.shape;
        let unembedding = if self.case.layout == Layout::Vd { [vocab, hidden] } else { [hidden, vocab] };
        let label = |label: &Label| label.column().map_or(-1, |id| id as i32);
        let labels = self.case.problem().labels().iter().map(label).collect();
        vec![
            array(&self.case.hidden, &[tokens, hidden]),
            array(&self.case.unembedding, &unembedding),
            Array::integers(Type { dims: vec![tokens], element: Element::Integer }, labels),
        ]
    }

    pub fn forward_program(&self, tile: Tile) -> Program {
        self.spec.forward(Generation::V6e, Some(tile)).unwrap()
    }

    pub fn forward(&self, program: &str) -> Forward {
        let results = hlo::run(program, &self.inputs());
        let [loss, lse, label_logits] = <[Array; 3]>::try_from(results).unwrap().map(|x| x.as_floats().to_vec());
        Forward { loss, lse, label_logits }
    }

    pub fn backward_program(&self, plan: BackwardPlan) -> Program {
        self.backward.program(Generation::V5p, Some(plan)).unwrap()
    }

    /// dQ and dK from the lse of a forward; `before` is what dK is added to.
    pub fn backward(&self, program: &str, lse: &[f32], before: Option<&Tensor>) -> [Tensor; 2] {
        let mut inputs = self.inputs();
        let per_token = |x: &[f32]| Array::floats(Type { dims: vec![x.len()], element: Element::F32 }, x.to_vec());
        inputs.push(per_token(lse));
        inputs.extend(self.case.cotangents.iter().flatten().map(|c| per_token(c)));
        inputs.extend(before.map(|before| array(before, &inputs[1].ty.dims)));
        let results = hlo::run(program, &inputs);
        let tensor = |(x, dtype): (Array, DType)| match dtype {
            DType::Bf16 => Tensor::Bf16(x.as_floats().iter().map(|&x| bf16::from_f32(x)).collect()),
            _ => Tensor::F32(x.as_floats().to_vec()),
        };
        let results: Vec<Tensor> = results.into_iter().zip(self.backward.gradients).map(tensor).collect();
        results.try_into().unwrap()
    }

    /// Forward and backward.
    pub fn both(&self, forward: &str, backward: &str) -> Results {
        let forward = self.forward(forward);
        let [d_hidden, d_unembedding] = self.backward(backward, &forward.lse, None);
        Results { forward, d_hidden, d_unembedding }
    }

    pub fn truth(&self) -> Truth {
        Truth::new(&self.case, self.backward.contract())
    }
}

fn array(tensor: &Tensor, dims: &[usize]) -> Array {
    let floats = tensor.floats();
    let element = if floats.dtype() == DType::Bf16 { Element::Bf16 } else { Element::F32 };
    Array::floats(Type { dims: dims.to_vec(), element }, (0..floats.len()).map(|i| floats.get(i)).collect())
}
