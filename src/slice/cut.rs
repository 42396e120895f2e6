//! The cut itself: reads what is kept, settles the loss so that what was recorded still belongs to it, and writes the dump.

use super::{Cut, Dropped, Sliced};
use crate::dump::{
    Dump, DumpError, DumpErrorKind, Folder, FolderId, FolderWriter, LossSettings, MicrobatchGradients, Placement, Run, ShapeRule,
    Step, Tensor, TensorInfo, tensor_spec,
};
use fused_xent_kernels::reduction::{Denominator, MicrobatchCounts, Microbatches, Reduction};
use serde_json::{Map, Value, json};
use std::ops::Range;
use std::path::Path;

/// What of a step is written, and how.
struct Plan<'a> {
    run: &'a Run,
    step: &'a Step,
    cut: &'a Cut,
    /// The rows of tokens that are kept, if not all.
    rows: Option<Vec<usize>>,
    loss: LossSettings,
    num_microbatches: usize,
    process_count: usize,
    dropped: Vec<Dropped>,
    bytes: u64,
}

/// Writes what `cut` keeps of `dump` to `to`, which does not exist.
pub(super) fn write(dump: &Dump, cut: &Cut, to: &Path) -> Result<Sliced, DumpError> {
    let run = dump.runs().iter().find(|run| run.run_id == cut.run_id);
    let step = run.and_then(|run| Some((run, run.steps.get(&cut.step)?)));
    let (run, step) = step.ok_or_else(|| {
        let found = format!("no step {} of a run {:?}", cut.step, cut.run_id);
        DumpError::new(DumpErrorKind::Missing, dump.path().display(), found, "a step of the dump", "see xent-diff info")
    })?;
    let folders: Vec<(Option<usize>, &Folder)> = match cut.microbatch {
        Some(m) => vec![(Some(m), step.folder(m)?)],
        None => step.microbatches.iter().map(|(&m, folder)| (Some(m), folder)).collect(),
    };
    let alone = cut.microbatch.is_some() && step.num_microbatches > 1;
    let most = folders.iter().map(|(_, folder)| tokens_of(folder)).try_fold(0, |most, n| Ok(most.max(n?)))?;
    let rows = cut.tokens.as_ref().map(|ranges| chosen(ranges, folders[0].1)).transpose()?;
    let loss = match cut.microbatch {
        Some(m) if alone || rows.is_some() => settled(step, m, rows.is_some())?,
        _ => step.loss,
    };
    let recorded = |folder: &Folder| folder.tensors().any(|t| !t.input && t.shards.iter().any(|s| s.replica > 0));
    let copies = folders.iter().any(|(_, folder)| recorded(folder)) || (!alone && recorded(&step.shared));
    let mut plan = Plan {
        run,
        step,
        cut,
        rows,
        loss,
        num_microbatches: if alone { 1 } else { step.num_microbatches },
        process_count: if copies { run.process_count } else { 1 },
        dropped: vec![],
        bytes: 0,
    };
    if step.shared.tensors().next().is_some() {
        plan.folder(to, None, &step.shared)?;
    }
    for (m, folder) in folders {
        plan.folder(to, m, folder)?;
    }
    let tokens = plan.rows.as_ref().map_or(most, Vec::len);
    Ok(Sliced { cut: cut.clone(), tokens, of_tokens: most, dropped: plan.dropped, bytes: plan.bytes, shown: None })
}

/// The rows in `ranges`, each once and in order.
fn chosen(ranges: &[Range<usize>], folder: &Folder) -> Result<Vec<usize>, DumpError> {
    let tokens = tokens_of(folder)?;
    let unfit = |found: String| {
        let expected = format!("rows in [0, {tokens}), at least one");
        DumpError::new(DumpErrorKind::Settings, format_args!("{}: tokens", folder.place()), found, expected, "name other rows")
    };
    if let Some(range) = ranges.iter().find(|range| range.end > tokens) {
        return Err(unfit(format!("rows {}..{}", range.start, range.end)));
    }
    let mut kept = vec![false; tokens];
    ranges.iter().for_each(|range| kept[range.clone()].fill(true));
    let rows: Vec<usize> = (0..tokens).filter(|&n| kept[n]).collect();
    if rows.is_empty() { Err(unfit("no row".into())) } else { Ok(rows) }
}

/// N of a microbatch.
fn tokens_of(folder: &Folder) -> Result<usize, DumpError> {
    match folder.info("targets") {
        Some(targets) => Ok(targets.global_shape.iter().product()),
        // Says what is missing.
        None => folder.require("targets").map(|targets| targets.tensor.len()),
    }
}

/// The loss of microbatch `m` alone, or of some of its tokens, in which every token's cotangent is what it was in the step.
fn settled(step: &Step, m: usize, tokens_cut: bool) -> Result<LossSettings, DumpError> {
    let mut loss = step.loss;
    let reduction = &mut loss.reduction;
    let global = reduction.microbatches == Microbatches::Global && reduction.reduction == Reduction::Mean;
    let given = matches!(reduction.denominator, Denominator::Given(_));
    if global && !given && step.microbatches.len() < step.num_microbatches {
        let found = format!("{} of {} microbatches", step.microbatches.len(), step.num_microbatches);
        return Err(DumpError::new(
            DumpErrorKind::Missing,
            step.folder(m)?.place(),
            found,
            "all of them: their tokens make the one denominator that the loss has over the step",
            "copy the folders of the missing ones",
        ));
    }
    let mut counts = Vec::new();
    for &index in step.microbatches.keys() {
        let needed = index == m || (global && !given);
        let count = |index| Ok(MicrobatchCounts::of(&step.problem(index)?.problem()?));
        counts.push(if needed { count(index)? } else { MicrobatchCounts::default() });
    }
    let place = step.microbatches.keys().position(|&index| index == m).unwrap_or(0);
    let carried = match loss.microbatch_gradients {
        MicrobatchGradients::Own => 1.0,
        MicrobatchGradients::Step => reduction.step_factor(step.num_microbatches),
    };
    let own = reduction.own_factor(&counts, place);
    let denominator = reduction.cotangent / own;
    if reduction.reduction == Reduction::Mean && !given && (tokens_cut || global) {
        if denominator.is_finite() && denominator > 0.0 {
            // The quotient of a quotient may be off in the last place; counts are whole numbers more often than not.
            let whole = denominator.round();
            let near = (denominator / whole - 1.0).abs() < 4.0 * f64::EPSILON;
            reduction.denominator = Denominator::Given(if near { whole } else { denominator });
        } else {
            (reduction.reduction, reduction.cotangent) = (Reduction::Sum, own);
        }
    }
    reduction.cotangent *= carried;
    Ok(loss)
}

fn too_large(info: &TensorInfo) -> DumpError {
    let remedy = "use a machine with more memory";
    DumpError::new(DumpErrorKind::TooLarge, &info.name, "it does not fit in memory", "a tensor that fits", remedy)
}

impl Plan<'_> {
    fn folder(&mut self, to: &Path, m: Option<usize>, folder: &Folder) -> Result<(), DumpError> {
        let mut writers: Vec<(usize, FolderWriter)> = Vec::new();
        let dropped_before = self.dropped.len();
        let kept: Vec<&TensorInfo> = folder.tensors().filter(|info| self.keeps(m, info)).collect();
        if kept.is_empty() {
            return Ok(());
        }
        for info in kept {
            let Some(recorded) = folder.load(&info.name)? else { continue };
            let mut processes: Vec<usize> = recorded.copies.iter().map(|copy| copy.process).collect();
            processes.sort_unstable();
            processes.dedup();
            self.tensor(to, m, &mut writers, (0, 0), info, &recorded.tensor)?;
            for process in processes {
                let own = recorded.of_process(process).ok_or_else(|| too_large(info))?;
                // Copies have numbers above 0.
                self.tensor(to, m, &mut writers, (process, process + 1), info, &own)?;
            }
        }
        for (process, mut writer) in writers {
            if m.is_some() && folder.info("unembedding").is_none() && process == 0 {
                writer.unembedding_from_shared()?;
            }
            if let Some(contract) = folder.contract() {
                writer.contract(contract.clone())?;
            }
            writer.extra(self.note(m, folder, &self.dropped[dropped_before..]));
            writer.commit()?;
        }
        Ok(())
    }

    /// Whether a tensor still holds; if not, it is listed.
    fn keeps(&mut self, m: Option<usize>, info: &TensorInfo) -> bool {
        let sum = tensor_spec(&info.name).is_some_and(|spec| spec.shape == ShapeRule::Unembedding) && !info.input;
        let reason = if info.hole.is_some() && !info.input {
            "processes that hold a part of it have not committed it"
        } else if m.is_none() && sum && self.cut.microbatch.is_some() && self.step.num_microbatches > 1 {
            "a sum over all microbatches, of which one is kept"
        } else if sum && self.cut.tokens.is_some() {
            "a sum over all tokens, of which some are kept"
        } else {
            return true;
        };
        let name = if m.is_none() { format!("shared/{}", info.name) } else { info.name.clone() };
        self.dropped.push(Dropped { tensor: name, reason });
        false
    }

    /// Hands `tensor`, or its rows that are kept, to the writer of a process.
    fn tensor(
        &mut self,
        to: &Path,
        m: Option<usize>,
        writers: &mut Vec<(usize, FolderWriter)>,
        (process, replica): (usize, usize),
        info: &TensorInfo,
        tensor: &Tensor,
    ) -> Result<(), DumpError> {
        let rule = tensor_spec(&info.name).map_or(ShapeRule::Unembedding, |spec| spec.shape);
        let cut = match &self.rows {
            Some(rows) if rule != ShapeRule::Unembedding => {
                let dimensions = tensor.shape().len() - usize::from(rule == ShapeRule::Hidden);
                let (tokens, row) = tensor.shape().split_at(dimensions);
                Some(tensor.rows(tokens.iter().product(), rows, row).ok_or_else(|| too_large(info))?)
            }
            _ => None,
        };
        let tensor = cut.as_ref().unwrap_or(tensor);
        if replica == 0 {
            self.bytes += (tensor.len() * tensor.dtype().bytes()) as u64;
        }
        if !writers.iter().any(|(p, _)| *p == process) {
            writers.push((process, FolderWriter::create(to, self.id(m, process))?));
        }
        let placement = Placement::whole(tensor.shape()).layout(info.layout).replica(replica);
        let mut of_process = writers.iter_mut().filter(|(p, _)| *p == process);
        of_process.try_for_each(|(_, writer)| writer.tensor(&info.name, tensor.elements(), &placement))
    }

    fn id(&self, m: Option<usize>, process_index: usize) -> FolderId {
        FolderId {
            run_id: self.run.run_id.clone(),
            producer: self.run.producer.clone(),
            step: self.step.step,
            microbatch: m.map(|m| if self.num_microbatches == self.step.num_microbatches { m } else { 0 }),
            num_microbatches: self.num_microbatches,
            process_index,
            process_count: self.process_count,
            loss: self.loss,
        }
    }

    /// What the manifest says of the cut, under `extra`.
    fn note(&self, m: Option<usize>, folder: &Folder, dropped: &[Dropped]) -> Value {
        let mut note = Map::new();
        let mut insert = |name: &str, value: Value| drop(note.insert(name.to_owned(), value));
        insert("num_microbatches", self.step.num_microbatches.into());
        insert("process_count", self.run.process_count.into());
        insert("loss", self.step.loss.to_json());
        if let Some(m) = m {
            insert("microbatch", m.into());
        }
        if let (Some(_), Some(ranges)) = (m, &self.cut.tokens) {
            insert("tokens", ranges.iter().map(|range| json!([range.start, range.end])).collect());
        }
        insert("dropped", dropped.iter().map(|d| d.tensor.as_str()).collect());
        if let Some((_, extra)) = folder.extra().next() {
            insert("extra", extra.clone());
        }
        json!({ "slice_of": note })
    }
}
