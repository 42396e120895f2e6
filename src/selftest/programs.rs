//! From a case to programs, and what they give.

use super::cases::{Case, Data, Form, per_token};
use super::machine::{Failure, Machine};
use crate::pjrt::{Element, HostTensor};
use fused_xent_kernels::Dlogits;
use fused_xent_kernels::contract::Contract;
use fused_xent_kernels::problem::Shape;
use fused_xent_kernels::stablehlo::{self, Type};
use fused_xent_kernels::tpu::{self, Backward, BackwardPlan, Generation, Given, Tile};

/// Vocab ids of which the StableHLO program holds the logits at a time: of small vocabularies, so that there are several tiles,
/// and of large ones.
const STABLEHLO_TILES: [usize; 2] = [384, 2048];

/// A module and what it takes and gives.
#[derive(Clone, Debug)]
pub struct Piece {
    /// `forward`, `backward`, or both in one.
    pub pass: &'static str,
    /// StableHLO.
    pub text: String,
    /// Its arguments.
    pub inputs: Vec<(&'static str, Type)>,
    /// Its results.
    pub outputs: Vec<(&'static str, Type)>,
    /// Name and text of the Mosaic kernels in it.
    pub kernels: Vec<(&'static str, String)>,
}

/// What computes a case, and what it promises.
#[derive(Clone, Debug)]
pub struct Programs {
    /// One, or forward and backward.
    pub pieces: Vec<Piece>,
    /// What they round.
    pub contract: Contract,
    /// How many calls the tokens are split over.
    parts: usize,
}

/// What a case gave: loss, lse, label logits, dQ, dK, by their names.
pub type Results = Vec<(&'static str, HostTensor)>;

impl Programs {
    /// The Mosaic kernels for a chip.
    ///
    /// # Errors
    /// If there are none for this case on this chip.
    pub fn mosaic(case: &Case, generation: Generation) -> Result<Self, tpu::TpuError> {
        let parts = if case.accumulate { 2 } else { 1 };
        let shape = Shape { tokens: case.shape.tokens / parts, ..case.shape };
        let spec = tpu::Spec { shape, layout: case.layout, inputs: case.inputs, options: case.options };
        let [loss, lse, label_logits] = case.cotangents.map(|size| size != 0.0);
        let backward = Backward {
            spec,
            gradients: case.gradients,
            dlogits: case.dlogits,
            cotangents: Given { loss, lse, label_logits },
            accumulate: case.accumulate,
        };
        let (tile, plan) = case.form.map(|form| cut(form, case.shape.tokens, generation)).unzip();
        let piece = |pass, program: tpu::Program| Piece {
            pass,
            text: program.text,
            inputs: program.inputs,
            outputs: program.outputs,
            kernels: program.kernels,
        };
        let pieces =
            vec![piece("forward", spec.forward(generation, tile)?), piece("backward", backward.program(generation, plan)?)];
        Ok(Self { pieces, contract: backward.contract(), parts })
    }

    /// The program that any device runs, as near to the case as it goes.
    ///
    /// # Errors
    /// What it has no words for.
    pub fn stablehlo(case: &Case) -> Result<Self, &'static str> {
        if case.cotangents[1..] != [0.0; 2] {
            return Err("the StableHLO program takes no cotangents but the loss's");
        }
        if case.accumulate {
            return Err("the StableHLO program adds to no dK that it is given");
        }
        let spec = stablehlo::Spec {
            shape: case.shape,
            layout: case.layout,
            inputs: case.inputs,
            gradients: case.gradients,
            options: case.options,
            bf16_logits: false,
            bf16_dlogits: case.dlogits == Dlogits::Bf16,
        };
        let [small, large] = STABLEHLO_TILES;
        let stablehlo::Program { text, inputs, outputs } =
            stablehlo::chunked(&spec, if case.shape.vocab < 8 * large { small } else { large });
        let pieces = vec![Piece { pass: "both", text, inputs, outputs, kernels: vec![] }];
        Ok(Self { pieces, contract: spec.contract(), parts: 1 })
    }

    /// Runs the case twice on a machine, which is disturbed in between: what it gave, and whether that was the same, bit for bit.
    ///
    /// # Errors
    /// What the machine says; results of other shapes than the program has.
    pub fn run_twice(&self, case: &Case, data: &Data, machine: &dyn Machine) -> Result<(Results, bool), Failure> {
        let loaded = self.pieces.iter().map(|piece| machine.load(&piece.text)).collect::<Result<Vec<_>, _>>()?;
        let run = || -> Result<Results, Failure> {
            let mut results: Results = vec![];
            for part in 0..self.parts {
                let mut known = self.arguments(case, data, part, &results);
                for (piece, loaded) in self.pieces.iter().zip(&loaded) {
                    let arguments =
                        piece.inputs.iter().map(|(name, ty)| find(&known, name, ty)).collect::<Result<Vec<_>, _>>()?;
                    let given = loaded.run(&arguments)?;
                    let named = piece.outputs.iter().zip(given);
                    let named = named.map(|((name, ty), tensor)| fits(&tensor, name, ty).map(|()| (*name, tensor)));
                    // Of the last dK, which what comes out takes the place of.
                    known.retain(|(name, _)| !piece.outputs.iter().any(|(output, _)| output == name));
                    known.extend(named.collect::<Result<Vec<_>, _>>()?);
                }
                known.retain(|(name, _)| self.pieces.iter().any(|piece| piece.outputs.iter().any(|(output, _)| output == name)));
                results = joined(results, known);
            }
            Ok(results)
        };
        let first = run()?;
        machine.disturb()?;
        let same = run()? == first;
        Ok((first, same))
    }

    /// What a part of the case has for any program's arguments; `before` is what the parts before it gave.
    fn arguments(&self, case: &Case, data: &Data, part: usize, before: &Results) -> Results {
        let names = ["loss_cotangent", "lse_cotangent", "label_logits_cotangent"];
        let cotangents =
            names.into_iter().zip(&data.cotangents).filter_map(|(name, values)| Some((name, per_token(values.as_ref()?))));
        let of_tokens = [("hidden", data.hidden(case)), ("labels", data.labels(case))].into_iter().chain(cotangents);
        let mut arguments: Results = of_tokens.map(|(name, tensor)| (name, rows(&tensor, part, self.parts))).collect();
        // What the StableHLO program calls the cotangent of the loss.
        arguments.extend(data.cotangents[0].as_ref().map(|g| ("cotangent", per_token(g))));
        let unembedding = data.unembedding(case);
        if case.accumulate {
            let zeros = || {
                let len = case.shape.vocab * case.shape.hidden;
                HostTensor { element: Element::F32, dims: unembedding.dims.clone(), bytes: vec![0; len * size_of::<f32>()] }
            };
            let sum = before.iter().find(|(name, _)| *name == "d_unembedding").map_or_else(zeros, |(_, tensor)| tensor.clone());
            arguments.push(("d_unembedding", sum));
        }
        arguments.push(("unembedding", unembedding));
        arguments
    }
}

/// Several tiles of tokens and of vocab ids, on all cores that a device has.
fn cut(form: Form, tokens: usize, generation: Generation) -> (Tile, BackwardPlan) {
    let (tile, cores) = (Tile { tokens: 128, vocab: 256 }, generation.cores());
    let form = match form {
        Form::OnePass => tpu::Form::OnePass { at_once: tokens.next_multiple_of(tile.tokens), cores },
        Form::Chunks => tpu::Form::OnePass { at_once: tile.tokens, cores },
        Form::TwoKernels => tpu::Form::TwoKernels { cores },
    };
    (tile, BackwardPlan { tile, form })
}

fn find<'a>(known: &'a Results, name: &str, ty: &Type) -> Result<&'a HostTensor, Failure> {
    let (_, tensor) =
        known.iter().find(|(known, _)| *known == name).ok_or_else(|| format!("argument {name}: nothing has that name"))?;
    fits(tensor, name, ty)?;
    Ok(tensor)
}

fn fits(tensor: &HostTensor, name: &str, ty: &Type) -> Result<(), Failure> {
    if (tensor.element.name(), &tensor.dims) == (ty.element, &ty.dims) {
        return Ok(());
    }
    Err(format!("{name}: found {} {:?}, the program says {} {:?}", tensor.element.name(), tensor.dims, ty.element, ty.dims)
        .into())
}

/// Part number `part` of so many equal parts of a tensor's rows.
fn rows(tensor: &HostTensor, part: usize, parts: usize) -> HostTensor {
    let mut dims = tensor.dims.clone();
    dims[0] /= parts;
    let len = tensor.bytes.len() / parts;
    HostTensor { element: tensor.element, dims, bytes: tensor.bytes[part * len..(part + 1) * len].to_vec() }
}

/// What per token came from the parts so far, with a later part's; dK is the later one's, which has the others in it.
fn joined(before: Results, mut part: Results) -> Results {
    for (name, tensor) in &mut part {
        let earlier = before.iter().find(|(earlier, _)| earlier == name).filter(|_| *name != "d_unembedding");
        if let Some((_, earlier)) = earlier {
            tensor.dims[0] += earlier.dims[0];
            tensor.bytes.splice(0..0, earlier.bytes.iter().copied());
        }
    }
    part
}
