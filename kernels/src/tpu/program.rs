//! The programs: what XLA does around the kernels, and the kernels.

use super::backward::{Gives, Kernel, Unembedding};
use super::plan::{BackwardPlan, Form};
use super::{Backward, Generation, Spec, Tile, TpuError, forward};
use crate::problem::{DType, Shape};
use crate::stablehlo::{Body, Type, Value, element};

/// A StableHLO program, and what its kernels were made for.
#[derive(Clone, Debug, PartialEq)]
pub struct Program {
    /// The module: one public function, `@main`.
    pub text: String,
    /// Its arguments: name and type.
    pub inputs: Vec<(&'static str, Type)>,
    /// Its results: name and type.
    pub outputs: Vec<(&'static str, Type)>,
    /// The Mosaic bodies of its kernels, in the order in which they run: name and text.
    pub kernels: Vec<(&'static str, String)>,
    /// The chip that the tiles were chosen for.
    pub generation: Generation,
    /// Bytes of VMEM that the model expects the largest of them to take.
    pub vmem_bytes: usize,
}

impl Spec {
    fn arguments(&self) -> Vec<(&'static str, Type)> {
        let Shape { tokens, hidden, vocab } = self.shape;
        vec![
            ("hidden", Type::new(&[tokens, hidden], element(self.inputs[0]))),
            ("unembedding", Type::new(&self.unembedding_block(vocab), element(self.inputs[1]))),
            ("labels", Type::new(&[tokens], "i32")),
        ]
    }

    /// The forward for this chip, with the tile of [`Spec::plan`] or the one given.
    ///
    /// # Errors
    /// Sizes, types or options that no kernel is made for; a tile that does not fit the chip.
    pub fn forward(&self, generation: Generation, tile: Option<Tile>) -> Result<Program, TpuError> {
        self.validate()?;
        let tile = tile.map_or_else(|| self.plan(generation), Ok)?;
        let vmem_bytes = self.fits(generation, tile)?;
        let n = self.shape.tokens;
        let call = forward::call(self, tile);
        let inputs = self.arguments();
        let (text, outputs) = Body::function(&inputs, |program, arguments| {
            let [q, k, labels] = arguments else { unreachable!("three of them") };
            let labels = program.reshape(labels, &[1, n]);
            let results = call.emit(program, &[q.clone(), k.clone(), labels], generation.available());
            let names = ["loss", "lse", "label_logits"].into_iter();
            names.zip(results).map(|(name, result)| (name, program.reshape(&result, &[n]))).collect()
        });
        Ok(Program { text, inputs, outputs, kernels: vec![(call.name, call.body)], generation, vmem_bytes })
    }
}

impl Backward {
    fn arguments(&self) -> Vec<(&'static str, Type)> {
        let Shape { tokens, vocab, .. } = self.spec.shape;
        let per_token = Type::new(&[tokens], "f32");
        let mut arguments = self.spec.arguments();
        arguments.push(("lse", per_token.clone()));
        arguments.extend(self.cotangents.names().map(|name| (name, per_token.clone())));
        if self.accumulate {
            arguments.push(("d_unembedding", Type::new(&self.spec.unembedding_block(vocab), "f32")));
        }
        arguments
    }

    /// The backward for this chip, as [`Backward::plan`] says or as given.
    ///
    /// # Errors
    /// Sizes, types or options that no kernel is made for; a plan that does not fit the chip.
    pub fn program(&self, generation: Generation, plan: Option<BackwardPlan>) -> Result<Program, TpuError> {
        self.validate()?;
        let plan = plan.map_or_else(|| self.plan(generation), Ok)?;
        let vmem_bytes = self.fits(generation, plan)?;
        let inputs = self.arguments();
        let mut kernels = Vec::new();
        let donated = self.accumulate.then(|| (inputs.len() - 1, 1));
        let (text, outputs) = Body::function_taking_over(&inputs, donated, |program, arguments| {
            let mut emitter = Emitter { of: self, program, arguments, kernels: &mut kernels, generation };
            let [dq, dk] = match plan.form {
                Form::OnePass { at_once, cores } => emitter.one_pass(plan.tile, at_once, cores),
                Form::TwoKernels { cores } => emitter.two_kernels(plan.tile, cores),
            };
            vec![("d_hidden", dq), ("d_unembedding", dk)]
        });
        Ok(Program { text, inputs, outputs, kernels, generation, vmem_bytes })
    }

    /// The kernels of one pass over so many tokens at a time: of all chunks, in order.
    pub(super) fn chunks(&self, tile: Tile, at_once: usize, cores: usize) -> Vec<Kernel<'_>> {
        let n = self.spec.shape.tokens;
        let chunk = |start: usize| {
            let [first, last] = [start == 0, start + at_once >= n];
            let dtype = if last { self.gradients[1] } else { DType::F32 };
            let gives = Gives::Both(Unembedding { cores, adds: !first || self.accumulate, dtype });
            Kernel { of: self, tile, tokens: at_once.min(n - start), gives }
        };
        (0..n).step_by(at_once).map(chunk).collect()
    }

    /// The two kernels, of dQ and of dK.
    pub(super) fn apart(&self, tile: Tile, cores: usize) -> [Kernel<'_>; 2] {
        let tokens = self.spec.shape.tokens;
        let unembedding = Unembedding { cores, adds: self.accumulate, dtype: self.gradients[1] };
        [Gives::Hidden, Gives::Unembedding(unembedding)].map(|gives| Kernel { of: self, tile, tokens, gives })
    }
}

struct Emitter<'a> {
    of: &'a Backward,
    program: &'a mut Body,
    arguments: &'a [Value],
    kernels: &'a mut Vec<(&'static str, String)>,
    generation: Generation,
}

impl Emitter<'_> {
    /// Of the tokens from `start` on what a kernel takes: Q in whole tiles with 0 in rows that take no part, K, and rows per token.
    fn operands(&mut self, start: usize, kernel: &Kernel) -> Vec<Value> {
        let d = self.of.spec.shape.hidden;
        let [q, k, labels, per_token @ ..] = self.arguments else { unreachable!("at least four") };
        let per_token = &per_token[..1 + self.of.cotangents.names().count()];
        let program = &mut *self.program;
        let q = program.slice_rows(q, start, kernel.tokens);
        let own_labels = program.slice_rows(labels, start, kernel.tokens);
        let zero = program.integer(0, &[kernel.tokens]);
        let takes_part = program.compare("GE", &own_labels, &zero);
        let of_row = program.broadcast(&takes_part, &[0], &[kernel.tokens, d]);
        let q = program.keep(&of_row, &q);
        let q = program.pad(&q, &[kernel.padded_tokens(), d]);
        let mut operands = vec![q, k.clone()];
        for values in std::iter::once(labels).chain(per_token) {
            let own = program.slice_rows(values, start, kernel.tokens);
            operands.push(program.reshape(&own, &[1, kernel.tokens]));
        }
        operands
    }

    fn run(&mut self, kernel: &Kernel, operands: &[Value]) -> Vec<Value> {
        let call = kernel.call();
        let results = call.emit(self.program, operands, self.generation.available());
        self.kernels.push((call.name, call.body));
        results
    }

    /// The caller's dK.
    fn before(&self) -> Option<Value> {
        self.of.accumulate.then(|| self.arguments.last().expect("it is the last").clone())
    }

    fn one_pass(&mut self, tile: Tile, at_once: usize, cores: usize) -> [Value; 2] {
        let mut dk = self.before();
        let mut dq = Vec::new();
        for (i, kernel) in self.of.chunks(tile, at_once, cores).iter().enumerate() {
            let mut operands = self.operands(i * at_once, kernel);
            operands.extend(dk.take());
            let [of_chunk, sum] = <[Value; 2]>::try_from(self.run(kernel, &operands)).expect("dQ and dK");
            dq.push(self.whole(kernel, &of_chunk));
            dk = Some(sum);
        }
        [self.program.concatenate_rows(&dq), dk.expect("at least one chunk")]
    }

    /// dQ from the cores' shares, rounded once.
    fn whole(&mut self, kernel: &Kernel, d_hidden: &Value) -> Value {
        if !kernel.shares() {
            return d_hidden.clone();
        }
        let rows = kernel.padded_tokens();
        let shares = d_hidden.ty.dims[0] / rows;
        let mut sum = self.program.slice_rows(d_hidden, 0, kernel.tokens);
        for share in 1..shares {
            let share = self.program.slice_rows(d_hidden, share * rows, kernel.tokens);
            sum = self.program.binary("add", &sum, &share);
        }
        self.program.convert(&sum, element(self.of.gradients[0]))
    }

    fn two_kernels(&mut self, tile: Tile, cores: usize) -> [Value; 2] {
        let [hidden, unembedding] = self.of.apart(tile, cores);
        let mut operands = self.operands(0, &hidden);
        let dq = self.run(&hidden, &operands).remove(0);
        operands.extend(self.before());
        [dq, self.run(&unembedding, &operands).remove(0)]
    }
}
