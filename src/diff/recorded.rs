//! The candidate `recorded`: what the training run itself computed.

use super::candidate::{Produced, Values};
use super::compare::gathered;
use super::truth::{RowsAre, Stage};
use super::{DiffError, View};
use crate::dump::{ElementType, Folder, Recorded, Step};
use fused_xent_kernels::contract::{Contract, LabelTerm, Precision};
use fused_xent_kernels::problem::{Layout, Shape};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// What the run recorded, and for each process whose copies of it differ, what that process has; nothing if nothing is recorded.
/// A contract that is `given` stands in place of the declared one.
pub(super) fn produce(dumped: &Step, view: &View, given: Option<&Value>) -> Result<Vec<Produced>, DiffError> {
    let mut found = Vec::new();
    for (place, &m) in view.judged.iter().enumerate() {
        let folder = dumped.folder(view.step.microbatches[m].index)?;
        for stage in Stage::OF_A_MICROBATCH {
            if let Some(recorded) = folder.load(stage.name())? {
                read(&mut found, Some(place), stage, &recorded, view);
            }
        }
    }
    if view.over_step
        && let Some(recorded) = dumped.shared.load("d_unembedding")?
    {
        read(&mut found, None, Stage::AccumulatedDUnembedding, &recorded, view);
    }
    if found.is_empty() {
        return Ok(vec![]);
    }
    let folders = view.judged.iter().filter_map(|&m| dumped.microbatches.get(&view.step.microbatches[m].index));
    let declared = folders.chain([&dumped.shared]).find_map(Folder::contract);
    let (contract, contract_source) = (given.or(declared), source(given, declared));
    let input = Precision::from(view.step.microbatches[view.judged[0]].problem.hidden().dtype());
    let mut of_processes: BTreeMap<Option<usize>, Produced> = BTreeMap::new();
    for Found { process, place, stage, values } in found {
        let produced = of_processes.entry(process).or_insert_with(|| Produced {
            name: process.map_or("recorded".into(), |p| format!("recorded:process-{p}")),
            description: process.map_or("the gradients that the training run recorded".into(), |p| {
                format!("process {p}'s copies of the recorded gradients, which differ from the first")
            }),
            microbatches: vec![BTreeMap::new(); view.judged.len()],
            accumulated: None,
            contracts: vec![],
            contract_source,
        });
        match place {
            Some(place) => drop(produced.microbatches[place].insert(stage, values)),
            None => produced.accumulated = Some(values),
        }
    }
    let with_contracts = |mut produced: Produced| {
        produced.contracts = contracts(&produced, contract, input);
        produced
    };
    Ok(of_processes.into_values().map(with_contracts).collect())
}

/// How the contract that recorded gradients are held to is known.
pub(super) fn source(given: Option<&Value>, declared: Option<&Value>) -> &'static str {
    match (given, declared) {
        (Some(_), _) => "given",
        (None, Some(_)) => "declared",
        (None, None) => "assumed",
    }
}

/// What was recorded of a stage.
struct Found {
    /// Whose copy it is, if one that differs from the first.
    process: Option<usize>,
    /// Place among the judged microbatches; `None` for the step.
    place: Option<usize>,
    stage: Stage,
    values: Values,
}

/// Reads the rows that are judged, and those of every process whose copies differ.
fn read(found: &mut Vec<Found>, place: Option<usize>, stage: Stage, recorded: &Recorded, view: &View) {
    let m = view.judged[place.unwrap_or(0)];
    let (shape, rows) = (view.step.microbatches[m].problem.shape(), view.truth(m).rows(stage));
    let processes: BTreeSet<usize> = recorded.copies.iter().map(|copy| copy.process).collect();
    for process in std::iter::once(None).chain(processes.into_iter().map(Some)) {
        found.push(Found { process, place, stage, values: values(recorded, process, stage, shape, rows) });
    }
}

/// The contracts that the run may have kept: as declared or given, else every honest one.
pub(super) fn contracts(produced: &Produced, declared: Option<&Value>, input: Precision) -> Vec<Contract> {
    let precision = |stage: Stage| produced.microbatches.iter().find_map(|stages| stages.get(&stage)).map(|v| v.precision);
    let d_unembedding = precision(Stage::DUnembedding).or(produced.accumulated.as_ref().map(|v| v.precision));
    let outputs = Contract {
        d_hidden: precision(Stage::DHidden).unwrap_or(Precision::F32),
        d_unembedding: d_unembedding.unwrap_or(Precision::F32),
        ..Contract::F32
    };
    let Some(declared) = declared else { return honest(outputs, input) };
    let member =
        |name: &str, otherwise| declared.get(name).and_then(Value::as_str).and_then(Precision::by_name).unwrap_or(otherwise);
    let contract = Contract {
        logits: member("logits", outputs.logits),
        dlogits: member("dlogits", outputs.dlogits),
        accumulate: member("accumulate", outputs.accumulate),
        d_hidden: member("d_hidden", outputs.d_hidden),
        d_unembedding: member("d_unembedding", outputs.d_unembedding),
        ..outputs
    };
    if contract.dlogits.is_16_bit() { with_either_label(contract) } else { vec![contract] }
}

fn with_either_label(contract: Contract) -> Vec<Contract> {
    [LabelTerm::Joint, LabelTerm::Apart].map(|label| Contract { label, ..contract }).to_vec()
}

/// The contracts that honest kernels keep on inputs of this precision, strictest first.
fn honest(outputs: Contract, input: Precision) -> Vec<Contract> {
    let mut out = vec![outputs];
    if input.is_16_bit() {
        out.extend(with_either_label(Contract { dlogits: input, ..outputs }));
    }
    out
}

/// The wanted rows (`None`: all) of a recorded tensor, with `process`'s copies of its regions where they differ.
fn values(recorded: &Recorded, process: Option<usize>, stage: Stage, shape: Shape, rows: Option<&[usize]>) -> Values {
    let tensor = &recorded.tensor;
    let of_vocab = stage.rows_are() == RowsAre::VocabIds;
    let columns = if matches!(stage, Stage::Loss | Stage::Lse | Stage::LabelLogits) { 1 } else { shape.hidden };
    let stored = [if of_vocab { shape.vocab } else { shape.tokens }, columns];
    let precision = match tensor.dtype() {
        ElementType::Bf16 => Precision::Bf16,
        ElementType::F16 => Precision::F16,
        ElementType::F64 => Precision::F64,
        _ => Precision::F32,
    };
    let transposed = of_vocab && tensor.layout() == Layout::Dv;
    if let (None, Some(floats)) = (process, tensor.floats()) {
        return Values { values: gathered(|i| f64::from(floats.get(i)), stored, transposed, rows), precision };
    }
    let mut elements = tensor.to_f64();
    for copy in recorded.copies.iter().filter(|c| Some(c.process) == process) {
        copy.region.scatter(tensor.shape(), &copy.data.to_f64(), &mut elements);
    }
    Values { values: gathered(|i| elements[i], stored, transposed, rows), precision }
}
