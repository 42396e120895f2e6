//! `xent-diff info <dumps>`: what is there. Only manifests are read. `--machine`: what there is to compute with.

use super::args::Info;
use super::exit::Exit;
use super::output::{Out, Target};
use crate::dump::{Dump, Folder, Step, TensorInfo, find_dumps};
use crate::report::json::to_string;
use crate::report::terminal::Style;
use crate::report::text::{Paint, Table, bytes, clean, count};
use fused_xent_kernels::problem::DType;
use fused_xent_kernels::{Kernel, UnknownKernel};
use serde_json::{Value, json};
use std::error::Error;

pub fn run(args: &Info, out: &mut Out) -> Result<Exit, Box<dyn Error>> {
    if let Some(target) = &args.json {
        target.check()?;
    }
    let dumps = match &args.dumps {
        Some(path) => find_dumps(path)?.iter().map(|path| Dump::open(path)).collect::<Result<Vec<_>, _>>()?,
        None => vec![],
    };
    let machine = args.machine.then(Machine::new).transpose()?;
    if args.json != Some(Target::Stdout) {
        let machine = machine.as_ref().map(|machine| machine.text(out.style()));
        let texts: Vec<String> = machine.into_iter().chain(dumps.iter().map(|dump| text(dump, out.style()))).collect();
        out.print(&texts.join("\n"))?;
    }
    if let Some(target) = &args.json {
        let mut report = json!({ "schema": "xent-info/1", "dumps": dumps.iter().map(value).collect::<Vec<_>>() });
        if let Some(machine) = machine {
            report["machine"] = machine.value();
        }
        target.write(&to_string(&report), out)?;
    }
    Ok(Exit::Agree)
}

/// What this machine computes with.
struct Machine {
    /// The one in use, and all there are, the fastest first.
    chosen: Kernel,
    kernels: Vec<Kernel>,
}

impl Machine {
    fn new() -> Result<Self, UnknownKernel> {
        Ok(Self { chosen: Kernel::from_environment()?, kernels: Kernel::available() })
    }

    /// The precision of dlogits for bfloat16 inputs, where gradients are wanted in bfloat16 and where in float32.
    fn dlogits(kernel: &Kernel) -> [&'static str; 2] {
        [DType::Bf16, DType::F32].map(|output| kernel.contract([DType::Bf16; 2], [output; 2]).dlogits.name())
    }

    fn text(&self, style: Style) -> String {
        let mut out = String::new();
        style.entry(&mut out, "kernel", &format!("{} (FUSED_XENT_KERNEL chooses another)", self.chosen.name()));
        style.entry(&mut out, "threads", &rayon::current_num_threads().to_string());
        let mut table = Table::new(&["kernel", "dlogits for bf16 gradients", "for f32 gradients"]);
        for kernel in &self.kernels {
            let [narrow, wide] = Self::dlogits(kernel);
            table.row(vec![kernel.name().to_owned(), narrow.to_owned(), wide.to_owned()]);
        }
        out + "\n" + &table.render(2, style.colour)
    }

    fn value(&self) -> Value {
        let kernel = |kernel: &Kernel| {
            let [narrow, wide] = Self::dlogits(kernel);
            json!({ "name": kernel.name(), "dlogits": { "bf16": narrow, "f32": wide } })
        };
        let kernels: Vec<Value> = self.kernels.iter().map(kernel).collect();
        json!({ "kernel": self.chosen.name(), "threads": rayon::current_num_threads(), "kernels": kernels })
    }
}

fn text(dump: &Dump, style: Style) -> String {
    let path = dump.path().display().to_string();
    let mut out = format!("{}: {}\n", Paint::Bold.on(&clean(&path), style.colour), count(dump.runs().len(), "run"));
    for warning in dump.warnings() {
        style.entry(&mut out, "warning", warning);
    }
    for run in dump.runs() {
        let processes = if run.process_count == 1 { "process" } else { "processes" };
        let what = format!("{}, written by {}, {} {processes}", run.run_id, run.producer, run.process_count);
        out.push('\n');
        style.entry(&mut out, "run", &what);
        for folder in &run.interrupted {
            style.entry(&mut out, "interrupted", &folder.display().to_string());
        }
        for step in run.steps.values() {
            self::step(&mut out, step, style);
        }
    }
    out
}

fn step(out: &mut String, step: &Step, style: Style) {
    let (whole, all) = (step.microbatches.len(), count(step.num_microbatches, "microbatch").replace("hs", "hes"));
    style.entry(out, "step", &format!("{}, {whole} of {all} whole", step.step));
    for part in &step.incomplete {
        style.entry(out, "incomplete", &format!("{}: {}", part.folder.display(), part.reason));
    }
    let loss = step.loss.to_json();
    let members = loss.as_object().into_iter().flatten();
    let members = members.filter(|(_, value)| !value.is_null()).map(|(name, value)| match value.as_str() {
        Some(word) => format!("{name} {word}"),
        None => format!("{name} {value}"),
    });
    style.entry(out, "loss", &members.collect::<Vec<_>>().join(", "));
    out.push('\n');
    let mut table = Table::new(&["tensor", "dtype", "shape", "in", ">files", ">size"]);
    for (tensor, folders) in grouped(step) {
        let place = match folders {
            None => "shared".to_owned(),
            Some(n) => format!("{n} × mb"),
        };
        let n = folders.unwrap_or(1);
        let shape = format!("{:?}{}", tensor.global_shape, layout(tensor).map_or(String::new(), |layout| format!(" {layout}")));
        let files = (tensor.shards.len() * n).to_string();
        table.row(vec![tensor.name.clone(), tensor.dtype.name().to_owned(), shape, place, files, bytes(tensor.bytes * n as u64)]);
    }
    *out += &table.render(2, style.colour);
}

/// The step's tensors; those that microbatches have alike once, with how many have them, and `None` for the shared folder's.
fn grouped(step: &Step) -> Vec<(&TensorInfo, Option<usize>)> {
    let mut groups: Vec<(&TensorInfo, Option<usize>)> = step.shared.tensors().map(|tensor| (tensor, None)).collect();
    let alike = |a: &TensorInfo, b: &TensorInfo| {
        (&a.name, a.dtype, &a.global_shape, a.shards.len()) == (&b.name, b.dtype, &b.global_shape, b.shards.len())
    };
    for tensor in step.microbatches.values().flat_map(Folder::tensors) {
        let group = groups.iter_mut().find_map(|(known, n)| if alike(known, tensor) { n.as_mut() } else { None });
        match group {
            Some(n) => *n += 1,
            None => groups.push((tensor, Some(1))),
        }
    }
    groups
}

fn layout(tensor: &TensorInfo) -> Option<&'static str> {
    tensor.name.contains("unembedding").then_some(match tensor.layout {
        crate::kernels::problem::Layout::Vd => "vd",
        crate::kernels::problem::Layout::Dv => "dv",
    })
}

fn value(dump: &Dump) -> Value {
    let tensor = |tensor: &TensorInfo| {
        json!({
            "name": tensor.name,
            "dtype": tensor.dtype.name(),
            "shape": tensor.global_shape,
            "layout": layout(tensor),
            "bytes": tensor.bytes,
            "files": tensor.shards.len(),
            "input": tensor.input,
        })
    };
    let tensors = |folder: &Folder| folder.tensors().map(tensor).collect::<Vec<_>>();
    let step = |step: &Step| {
        let microbatch = |(m, folder): (&usize, &Folder)| json!({ "microbatch": m, "tensors": tensors(folder) });
        let incomplete = step.incomplete.iter();
        let incomplete = incomplete.map(|part| json!({ "folder": part.folder, "reason": part.reason }));
        json!({
            "step": step.step,
            "num_microbatches": step.num_microbatches,
            "loss": step.loss.to_json(),
            "shared": { "tensors": tensors(&step.shared) },
            "microbatches": step.microbatches.iter().map(microbatch).collect::<Vec<_>>(),
            "incomplete": incomplete.collect::<Vec<_>>(),
        })
    };
    let runs = dump.runs().iter().map(|run| {
        json!({
            "run_id": run.run_id,
            "producer": run.producer,
            "processes": run.process_count,
            "interrupted": run.interrupted,
            "steps": run.steps.values().map(step).collect::<Vec<_>>(),
        })
    });
    json!({ "path": dump.path(), "warnings": dump.warnings(), "runs": runs.collect::<Vec<_>>() })
}
