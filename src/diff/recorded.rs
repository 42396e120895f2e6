//! The candidate `recorded`: what the training run itself computed.

use super::candidate::{Produced, Values};
use super::compare::as_vocab_rows;
use super::truth::{RowsAre, Stage};
use super::{DiffError, View};
use crate::dump::{ElementType, Folder, Step, Tensor};
use fused_xent_kernels::contract::{Contract, LabelTerm, Precision};
use fused_xent_kernels::problem::{Layout, Shape};
use std::collections::BTreeMap;

pub(super) fn produce(dumped: &Step, view: &View) -> Result<Produced, DiffError> {
    let mut microbatches = Vec::new();
    for &m in view.judged {
        let microbatch = &view.step.microbatches[m];
        let folder = &dumped.microbatches[&microbatch.index];
        let mut stages = BTreeMap::new();
        for stage in Stage::OF_A_MICROBATCH {
            if let Some(values) = load(folder, stage.name(), stage, microbatch.problem.shape())? {
                stages.insert(stage, values);
            }
        }
        microbatches.push(stages);
    }
    let shape = view.step.microbatches[view.judged[0]].problem.shape();
    let accumulated =
        if view.over_step { load(&dumped.shared, "d_unembedding", Stage::AccumulatedDUnembedding, shape)? } else { None };
    let precision = |stage: Stage| {
        let of = |stages: &BTreeMap<Stage, Values>| stages.get(&stage).map(|v: &Values| v.precision);
        microbatches.iter().find_map(of)
    };
    let d_unembedding = precision(Stage::DUnembedding).or(accumulated.as_ref().map(|v| v.precision));
    let outputs = Contract {
        d_hidden: precision(Stage::DHidden).unwrap_or(Precision::F32),
        d_unembedding: d_unembedding.unwrap_or(Precision::F32),
        ..Contract::F32
    };
    let input = Precision::from(view.step.microbatches[view.judged[0]].problem.hidden().dtype());
    let declared = dumped.contract()?.map(|declared| declared.on(outputs));
    let (contracts, contract_source) = match declared {
        Some(contract) => (vec![contract], "declared"),
        None => (honest(outputs, input), "assumed"),
    };
    Ok(Produced {
        name: "recorded".into(),
        description: "the gradients that the training run recorded".into(),
        microbatches,
        accumulated,
        contracts,
        contract_source,
    })
}

/// The contracts that honest kernels keep on inputs of this precision, strictest first.
fn honest(outputs: Contract, input: Precision) -> Vec<Contract> {
    let mut out = vec![outputs];
    if input.is_16_bit() {
        out.extend([LabelTerm::Joint, LabelTerm::Apart].map(|label| Contract { dlogits: input, label, ..outputs }));
    }
    out
}

fn load(folder: &Folder, name: &str, stage: Stage, shape: Shape) -> Result<Option<Values>, DiffError> {
    let Some(recorded) = folder.load(name)? else { return Ok(None) };
    Ok(Some(values(&recorded.tensor, stage, shape)))
}

fn values(tensor: &Tensor, stage: Stage, shape: Shape) -> Values {
    let columns = if matches!(stage, Stage::Loss | Stage::Lse | Stage::LabelLogits) { 1 } else { shape.hidden };
    let rows = if stage.rows_are() == RowsAre::VocabIds { shape.vocab } else { shape.tokens };
    let precision = match tensor.dtype() {
        ElementType::Bf16 => Precision::Bf16,
        ElementType::F16 => Precision::F16,
        ElementType::F64 => Precision::F64,
        _ => Precision::F32,
    };
    let transposed = stage.rows_are() == RowsAre::VocabIds && tensor.layout() == Layout::Dv;
    Values { values: as_vocab_rows(tensor.to_f64(), [rows, columns], transposed), precision }
}
