//! What is judged: gradients recorded in a dump, or computed from its inputs by a kernel.

use super::truth::Stage;
use fused_xent_kernels::contract::{Contract, Precision};
use ndarray::Array2;
use std::collections::BTreeMap;

/// The values of one stage.
#[derive(Clone, Debug)]
pub struct Values {
    /// [N, 1], [N, D] or [V, D]; of the latter two, the rows that are judged.
    pub values: Array2<f64>,
    /// The precision that they were stored in.
    pub precision: Precision,
}

/// Everything that a candidate has for one step.
#[derive(Clone, Debug)]
pub struct Produced {
    /// `recorded`, `cpu`, …
    pub name: String,
    /// For people.
    pub description: String,
    /// Per microbatch.
    pub microbatches: Vec<BTreeMap<Stage, Values>>,
    /// The cotangents of lse and of the label logits that entered its backward, per microbatch, [N] each.
    pub cotangents: Vec<[Option<Vec<f64>>; 2]>,
    /// dK accumulated over the step.
    pub accumulated: Option<Values>,
    /// The contracts that it may have kept, strictest first, and how they are known.
    pub contracts: Vec<Contract>,
    /// `declared`, `given` or `assumed`.
    pub contract_source: &'static str,
}
