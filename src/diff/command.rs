//! The candidate `cmd:…`: any program that reads a dump and writes another with the gradients.

use super::candidate::Produced;
use super::{DiffError, View, recorded};
use crate::dump::{Dump, DumpError, Folder, FolderId, FolderWriter, Placement, Run, ShapeRule, Step, tensor_spec};
use serde_json::Value;
use std::error::Error;
use std::path::Path;
use std::process::{Command, Stdio};

/// Lines of what a failed command said that are quoted.
const QUOTED: usize = 12;

type Failure = Box<dyn Error + Send + Sync>;

/// Runs `line` with two more arguments: a dump of the step that is judged, inputs alone, of one process and without shards; and a
/// folder that does not exist, for the dump that it writes.
pub(super) fn produce(line: &str, view: &View, given: Option<&Value>) -> Result<Vec<Produced>, DiffError> {
    let name = format!("cmd:{line}");
    view.progress.begin(&format!("step {}: running {name}", view.number), 1);
    let made = (|| -> Result<Vec<Produced>, Failure> {
        let folder = tempfile::tempdir()?;
        let (from, to) = (folder.path().join("in"), folder.path().join("out"));
        write_inputs(view, &from)?;
        run(line, &from, &to)?;
        let dump = Dump::open(&to)?;
        let step = only_step(&dump, view)?;
        let produced = recorded::produce(step, view, given)?;
        if produced.is_empty() {
            return Err("wrote a dump without d_hidden and d_unembedding".into());
        }
        Ok(produced)
    })();
    let mut produced =
        made.map_err(|source| DiffError::Candidate { candidate: format!("{name}, step {}", view.number), source })?;
    for produced in &mut produced {
        produced.name = produced.name.replacen("recorded", &name, 1);
        produced.description = "what the command wrote".into();
    }
    view.progress.advance(1);
    Ok(produced)
}

fn write_inputs(view: &View, to: &Path) -> Result<(), DumpError> {
    let of = |m: Option<usize>, folder: &Folder| -> Result<(), DumpError> {
        let mut inputs = folder.tensors().filter(|info| info.input).peekable();
        if inputs.peek().is_none() {
            return Ok(());
        }
        let id = FolderId {
            run_id: "command".into(),
            producer: concat!("fused-xent ", env!("CARGO_PKG_VERSION")).into(),
            step: view.number,
            microbatch: m,
            num_microbatches: view.step.num_microbatches,
            process_index: 0,
            process_count: 1,
            loss: view.dumped.loss,
        };
        let mut writer = FolderWriter::create(to, id)?;
        for info in inputs {
            let tensor = folder.require(&info.name)?.tensor;
            writer.tensor(&info.name, tensor.elements(), &Placement::whole(tensor.shape()).layout(info.layout))?;
        }
        if m.is_some() && folder.info("unembedding").is_none() {
            writer.unembedding_from_shared()?;
        }
        writer.commit().map(drop)
    };
    of(None, &view.dumped.shared)?;
    view.judged.iter().try_for_each(|&m| {
        let index = view.step.microbatches[m].index;
        of(Some(index), view.dumped.folder(index)?)
    })
}

fn run(line: &str, from: &Path, to: &Path) -> Result<(), Failure> {
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(format!("{line} \"$@\"")).arg("sh").args([from, to]).stdin(Stdio::null());
    let output = shell.output().map_err(|e| format!("sh cannot be run: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = said.trim_end().lines().collect();
    let last = lines[lines.len().saturating_sub(QUOTED)..].join("\n  ");
    let said = if last.is_empty() { "; it said nothing on standard error".into() } else { format!("; it ended with\n  {last}") };
    Err(format!("{}{said}", output.status).into())
}

/// The step of that number in what the command wrote, if its tensors have the shapes of the gradients.
fn only_step<'a>(dump: &'a Dump, view: &View) -> Result<&'a Step, Failure> {
    let steps = |run: &'a Run| run.steps.get(&view.number);
    let mut found = dump.runs().iter().filter_map(steps);
    let (step, more) = (found.next(), found.next());
    let step = step
        .filter(|_| more.is_none())
        .ok_or_else(|| format!("wrote {} steps {}; expected one", if more.is_some() { "several" } else { "no" }, view.number))?;
    for &m in view.judged {
        let microbatch = &view.step.microbatches[m];
        fits(step.folder(microbatch.index)?, view, m)?;
    }
    fits(&step.shared, view, view.judged[0])?;
    Ok(step)
}

fn fits(folder: &Folder, view: &View, m: usize) -> Result<(), Failure> {
    let shape = view.step.microbatches[m].problem.shape();
    for info in folder.tensors().filter(|info| !info.input) {
        let dims = &info.global_shape;
        let tokens = |dims: &[usize]| dims.iter().product::<usize>() == shape.tokens;
        let (fits, expected) = match tensor_spec(&info.name).map(|spec| spec.shape) {
            Some(ShapeRule::Unembedding) => {
                let kernels = fused_xent_kernels::problem::Layout::Vd;
                let expected = if info.layout == kernels { [shape.vocab, shape.hidden] } else { [shape.hidden, shape.vocab] };
                (dims[..] == expected, format!("{expected:?}"))
            }
            Some(ShapeRule::Hidden) => {
                let fits = dims.split_last().is_some_and(|(d, rest)| *d == shape.hidden && tokens(rest));
                (fits, format!("{} tokens of {} features", shape.tokens, shape.hidden))
            }
            _ => (tokens(dims), format!("{} tokens", shape.tokens)),
        };
        if !fits {
            return Err(format!("{}: {}: found {dims:?}, expected {expected}", folder.place(), info.name).into());
        }
    }
    Ok(())
}
