//! The candidates `pjrt:…` and `stablehlo:…`: a program run on a device, on the captured inputs.

use super::candidate::{Produced, Values};
use super::module::{Argument, Module, Outcome, Parameter};
use super::truth::{Stage, Truth};
use super::{DiffError, View, recorded};
use crate::dump::Elements;
use crate::pjrt::{CompileOptions, Device, Element, HostTensor, LoadedExecutable, PjrtError, Plugin};
use fused_xent_kernels::contract::{Contract, Precision};
use fused_xent_kernels::problem::{DType, Floats, Layout, Problem};
use fused_xent_kernels::stablehlo::{Spec, chunked, naive};
use ndarray::Array2;
use serde_json::Value;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// Vocab ids of which the chunked program holds the logits at a time.
const TILE: usize = 2048;

/// A program and the device that it runs on, which is taken hold of already.
#[derive(Clone, Debug)]
pub struct OnDevice {
    /// As given.
    name: String,
    device: Device,
    program: Program,
    /// What was compiled last.
    compiled: Arc<Mutex<Option<Compiled>>>,
}

#[derive(Clone, Debug)]
enum Program {
    /// Of this project; all logits at once.
    Naive,
    /// Of this project; those of a tile at a time.
    Chunked,
    /// The user's.
    Module(Arc<Module>),
}

#[derive(Clone, Debug)]
struct Compiled {
    text: String,
    executable: Arc<LoadedExecutable>,
}

/// A device error, or a module that does not fit the microbatch.
type Failure = Box<dyn Error + Send + Sync>;

impl OnDevice {
    /// `pjrt:PLUGIN[:naive|:chunked]` or `stablehlo:FILE[@PLUGIN]`; `None` if it is neither.
    pub(super) fn parse(text: &str) -> Option<Result<Self, DiffError>> {
        let parsed = if let Some(plugin) = text.strip_prefix("pjrt:") {
            match plugin.strip_suffix(":naive") {
                Some(plugin) => Ok((plugin, Program::Naive)),
                None => Ok((plugin.strip_suffix(":chunked").unwrap_or(plugin), Program::Chunked)),
            }
        } else {
            let file = text.strip_prefix("stablehlo:")?;
            let (file, plugin) = file.rsplit_once('@').filter(|_| !Path::new(file).exists()).unwrap_or((file, "cpu"));
            Module::read(Path::new(file)).map(|module| (plugin, Program::Module(Arc::new(module)))).map_err(Failure::from)
        };
        let on_device = parsed.and_then(|(plugin, program)| {
            Ok(Self { name: text.into(), device: device(plugin)?, program, compiled: Arc::default() })
        });
        Some(on_device.map_err(|source| DiffError::Candidate { candidate: text.into(), source }))
    }

    /// A contract that is `given` stands in place of the one that a module is assumed to keep.
    pub(super) fn produce(&self, view: &View, given: Option<&Value>) -> Result<Produced, DiffError> {
        view.progress.begin(&format!("step {}: running {}", view.number, self.name), view.judged.len() as u64);
        let mut microbatches = Vec::new();
        let mut total: Option<(Vec<f32>, bool)> = None;
        for &m in view.judged {
            let microbatch = &view.step.microbatches[m];
            let results = self.run(view, m).map_err(|source| DiffError::Candidate {
                candidate: format!("{}, step {}, microbatch {}", self.name, view.number, microbatch.index),
                source,
            })?;
            // A sum of what was rounded to 16 bits is none that the candidate made.
            let dk = results.get(&Stage::DUnembedding).filter(|dk| view.over_step && !dk.precision().is_16_bit());
            if let Some(dk) = dk {
                let (total, _) = total.get_or_insert_with(|| (vec![0.0; dk.len()], dk.transposed));
                let factor = view.step.accumulation_factor();
                total.iter_mut().enumerate().for_each(|(i, sum)| *sum += (factor * dk.host.get(i)) as f32);
            }
            let values = |(stage, result): (Stage, Output)| (stage, result.values(stage, &microbatch.problem, view.truth(m)));
            microbatches.push(results.into_iter().map(values).collect());
            view.progress.advance(1);
        }
        let first = view.judged[0];
        let problem = &view.step.microbatches[first].problem;
        let accumulated = total.map(|(total, transposed)| Values {
            values: Stage::AccumulatedDUnembedding.rows(|i| f64::from(total[i]), problem, transposed, view.truth(first)),
            precision: Precision::F32,
        });
        let kind = self.device.kind().unwrap_or_default();
        let (what, declared) = match &self.program {
            Program::Naive => ("the program with all logits at once, in float32", Some(spec(problem).contract())),
            Program::Chunked => ("the chunked program, in float32", Some(spec(problem).contract())),
            Program::Module(_) => ("the module", None),
        };
        let mut produced = Produced {
            name: self.name.clone(),
            description: format!("{what}, on {kind}"),
            cotangents: vec![[None, None]; microbatches.len()],
            microbatches,
            accumulated,
            contracts: vec![],
            contract_source: if declared.is_some() { "declared" } else { recorded::source(given, None) },
        };
        let assumed = |produced: &Produced| recorded::contracts(produced, given, problem.hidden().dtype().into());
        produced.contracts = declared.map_or_else(|| assumed(&produced), |contract: Contract| vec![contract]);
        Ok(produced)
    }

    fn run(&self, view: &View, m: usize) -> Result<BTreeMap<Stage, Output>, Failure> {
        let problem = &view.step.microbatches[m].problem;
        let emitted = |program: fused_xent_kernels::stablehlo::Program| Module::parse(&program.text).map(Arc::new);
        let module = match &self.program {
            Program::Naive => emitted(naive(&spec(problem)))?,
            Program::Chunked => emitted(chunked(&spec(problem), TILE))?,
            Program::Module(module) => module.clone(),
        };
        let inputs = Inputs::new(view, m)?;
        let arguments: Vec<_> = module.arguments.iter().map(|(p, argument)| inputs.of(*argument, p)).collect::<Result<_, _>>()?;
        let executable = self.compiled(&module.text)?;
        let upload = |((p, _), bytes): (&(Parameter, _), &Cow<[u8]>)| self.device.upload(p.element, &p.dims, bytes);
        let uploaded = module.arguments.iter().zip(&arguments).map(upload).collect::<Result<Vec<_>, _>>()?;
        let results = executable.execute(&uploaded.iter().collect::<Vec<_>>())?;
        let mut outputs = BTreeMap::new();
        for ((parameter, outcome), result) in module.results.iter().zip(&results) {
            let Some(outcome) = outcome else { continue };
            let host = result.to_host()?;
            let stage = match outcome {
                Outcome::Loss => Stage::Loss,
                Outcome::Lse => Stage::Lse,
                Outcome::LabelLogits => Stage::LabelLogits,
                Outcome::DHidden => Stage::DHidden,
                Outcome::DUnembedding => Stage::DUnembedding,
            };
            if (host.element, &host.dims) != (parameter.element, &parameter.dims) {
                return Err(format!("result {parameter}: found {} {:?} on the device", host.element.name(), host.dims).into());
            }
            let rows = problem.shape().tokens;
            if matches!(stage, Stage::Loss | Stage::Lse | Stage::LabelLogits) && host.dims.iter().product::<usize>() != rows {
                return Err(
                    format!("result {parameter}: found other dimensions, expected one number for each of {rows} tokens").into()
                );
            }
            let transposed = stage == Stage::DUnembedding && inputs.unembedding_is_dv(&host.dims);
            outputs.insert(stage, Output { host, transposed });
        }
        Ok(outputs)
    }

    fn compiled(&self, text: &str) -> Result<Arc<LoadedExecutable>, PjrtError> {
        let mut last = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = last.as_ref().filter(|last| last.text == text) {
            return Ok(last.executable.clone());
        }
        // The old one makes room first.
        *last = None;
        let executable = Arc::new(self.device.compile(text, &CompileOptions::default())?);
        *last = Some(Compiled { text: text.into(), executable: executable.clone() });
        Ok(executable)
    }
}

/// The first device of a plugin; taken hold of once in a process, since a second client would compete for its memory.
fn device(plugin: &str) -> Result<Device, PjrtError> {
    static DEVICES: Mutex<BTreeMap<String, Device>> = Mutex::new(BTreeMap::new());
    let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(device) = devices.get(plugin) {
        return Ok(device.clone());
    }
    let loaded = Plugin::load(plugin)?;
    let device = loaded.client(&loaded.sharing_options())?.device(0)?;
    devices.insert(plugin.into(), device.clone());
    Ok(device)
}

/// What is judged is the algorithm: nothing is rounded on the way.
fn spec(problem: &Problem) -> Spec {
    Spec {
        shape: problem.shape(),
        layout: problem.layout(),
        inputs: [problem.hidden().dtype(), problem.unembedding().dtype()],
        gradients: [DType::F32; 2],
        options: *problem.options(),
        bf16_logits: false,
        bf16_dlogits: false,
    }
}

/// What a microbatch has for the arguments of a program.
struct Inputs<'a> {
    problem: &'a Problem<'a>,
    /// As captured, masked ones too.
    targets: &'a [i64],
    /// [tokens] or [batch, sequence], as captured.
    token_dims: Vec<usize>,
    /// ∂L/∂ℓ[n] = factor · w[n].
    factor: f64,
}

impl<'a> Inputs<'a> {
    fn new(view: &'a View, m: usize) -> Result<Self, Failure> {
        let microbatch = &view.step.microbatches[m];
        let folder = view.dumped.folder(microbatch.index)?;
        let token_dims = folder.info("targets").map_or(vec![], |info| info.global_shape.clone());
        let factor = view.step.own_factor(m);
        Ok(Self { problem: &microbatch.problem, targets: &microbatch.targets, token_dims, factor })
    }

    /// The bytes of an argument, if `parameter` can take them.
    fn of(&self, argument: Argument, parameter: &Parameter) -> Result<Cow<'a, [u8]>, String> {
        let shape = self.problem.shape();
        let flat = vec![shape.tokens];
        let with_features = |dims: &[usize]| [dims, &[shape.hidden]].concat();
        let expected = match argument {
            Argument::Hidden => [with_features(&flat), with_features(&self.token_dims)],
            Argument::Unembedding => [vec![shape.vocab, shape.hidden], vec![shape.hidden, shape.vocab]],
            _ => [flat, self.token_dims.clone()],
        };
        let unfit = |found: String| {
            let [first, second] = &expected;
            let or = if first == second { String::new() } else { format!(" or {second:?}") };
            Err(format!("@main takes {parameter} as {}; the dump has {first:?}{or} of {found}", argument.name()))
        };
        let integers = |ids: &mut dyn Iterator<Item = i64>| -> Cow<'a, [u8]> {
            if parameter.element == Element::I64 {
                return ids.flat_map(i64::to_le_bytes).collect();
            }
            ids.flat_map(|id| (id as i32).to_le_bytes()).collect()
        };
        let floats = |x: &mut dyn Iterator<Item = f32>| -> Cow<'a, [u8]> { x.flat_map(f32::to_le_bytes).collect() };
        let fits = expected.contains(&parameter.dims);
        Ok(match argument {
            Argument::Hidden | Argument::Unembedding => {
                let held = if argument == Argument::Hidden { self.problem.hidden() } else { self.problem.unembedding() };
                let widened = parameter.element == Element::F32;
                if !fits || !(widened || parameter.element == element(held.dtype())) {
                    return unfit(held.dtype().name().to_owned());
                }
                let transposed = argument == Argument::Unembedding
                    && self.unembedding_is_dv(&parameter.dims) != (self.problem.layout() == Layout::Dv);
                bytes(held, widened, transposed.then_some(parameter.dims[1]))
            }
            _ if !fits => return unfit("tokens".into()),
            Argument::Targets => integers(&mut self.targets.iter().copied()),
            Argument::Labels => {
                integers(&mut self.problem.labels().iter().map(|label| label.column().map_or(-1, |id| id as i64)))
            }
            Argument::TokenWeights => floats(&mut self.problem.weights().iter().copied()),
            Argument::Cotangent => floats(&mut self.problem.weights().iter().map(|&w| (self.factor * f64::from(w)) as f32)),
        })
    }

    /// Whether a tensor of these dimensions lies as [D, V]; where D = V, it lies as the dump's.
    fn unembedding_is_dv(&self, dims: &[usize]) -> bool {
        let shape = self.problem.shape();
        if shape.vocab == shape.hidden { self.problem.layout() == Layout::Dv } else { dims == [shape.hidden, shape.vocab] }
    }
}

/// Row-major, in float32 where `widened`, turned where the number of `columns` of the result says so.
fn bytes<'a>(held: Floats<'a>, widened: bool, columns: Option<usize>) -> Cow<'a, [u8]> {
    let from = |i: usize| match columns {
        Some(columns) => i % columns * (held.len() / columns) + i / columns,
        None => i,
    };
    match held {
        _ if !widened && columns.is_none() && cfg!(target_endian = "little") => Cow::Borrowed(Elements::from(held).bytes()),
        Floats::Bf16(x) if !widened => (0..x.len()).flat_map(|i| x[from(i)].to_le_bytes()).collect(),
        Floats::F16(x) if !widened => (0..x.len()).flat_map(|i| x[from(i)].to_le_bytes()).collect(),
        held => (0..held.len()).flat_map(|i| held.get(from(i)).to_le_bytes()).collect(),
    }
}

fn element(dtype: DType) -> Element {
    match dtype {
        DType::Bf16 => Element::Bf16,
        DType::F16 => Element::F16,
        DType::F32 => Element::F32,
    }
}

/// A result of floats.
struct Output {
    host: HostTensor,
    /// It is dK, as [D, V].
    transposed: bool,
}

impl Output {
    fn len(&self) -> usize {
        self.host.bytes.len() / self.host.element.size()
    }

    fn precision(&self) -> Precision {
        match self.host.element {
            Element::Bf16 => Precision::Bf16,
            Element::F16 => Precision::F16,
            Element::F64 => Precision::F64,
            _ => Precision::F32,
        }
    }

    fn values(&self, stage: Stage, problem: &Problem, truth: &Truth) -> Values {
        let values: Array2<f64> = stage.rows(|i| self.host.get(i), problem, self.transposed, truth);
        Values { values, precision: self.precision() }
    }
}
