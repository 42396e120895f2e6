//! The one result of a run of `xent-diff`: plain data, from which the terminal, JSON and HTML are rendered.
//!
//! Field names are those of the JSON report (`docs/report.md`).

use super::baseline::Comparison;
use super::plots::{Crossing, Plots, Presence};
use super::substitution::Substitution;
use serde::Serialize;
use serde_json::{Map, Value};

/// Whether candidate and reference agree within what honest rounding explains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// At the floor.
    Agree,
    /// Above it.
    Diverge,
}

/// The judgement of one dump.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The worst of the candidates' verdicts.
    pub verdict: Verdict,
    /// What was judged.
    pub dump: DumpSummary,
    /// One entry per run, step and candidate.
    pub candidates: Vec<CandidateReport>,
    /// What the reader should know: missing checksums, incomplete microbatches.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// The earlier report that this one is set beside, if any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub baseline: Option<Comparison>,
}

/// What a dump holds.
#[derive(Clone, Debug, Serialize)]
pub struct DumpSummary {
    /// Where it lies, as given on the command line.
    pub path: String,
    /// The runs in it.
    pub run_ids: Vec<String>,
    /// Number of processes that wrote it.
    pub processes: usize,
    /// The steps judged.
    pub steps: Vec<u64>,
    /// Folders without a manifest: captures that were cut off.
    pub interrupted: Vec<String>,
}

/// One candidate on one step.
#[derive(Clone, Debug, Serialize)]
pub struct CandidateReport {
    /// `recorded`, `cpu`, …
    pub candidate: String,
    /// The kernel or contract behind it, for people: "portable, float32 throughout".
    pub description: String,
    /// The run that this step belongs to.
    pub run_id: String,
    /// The training step.
    pub step: u64,
    /// The worst of its tensors' verdicts.
    pub verdict: Verdict,
    /// The contract against whose floor it is judged.
    pub contract: ContractReport,
    /// How many rows of the gradients were compared, if not all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sample: Option<SampleReport>,
    /// Per microbatch.
    pub microbatches: Vec<MicrobatchReport>,
    /// Over the step, where the candidate has it.
    pub accumulated: Option<AccumulatedReport>,
    /// Where the ladder of stages first breaks.
    pub first_divergence: Option<Divergence>,
    /// Where the error enters, by the substitution of stages; `None` if nothing diverges that can be looked at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub substitution: Option<Substitution>,
    /// What explains the divergence, best first.
    pub findings: Vec<Finding>,
    /// Where in the logits it comes from, drawn on the page.
    #[serde(skip)]
    pub crossing: Option<Crossing>,
    /// Which processes committed which microbatches, drawn on the page.
    #[serde(skip)]
    pub presence: Presence,
}

/// How much of the gradients a sample holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct SampleReport {
    /// Rows of dQ, in the microbatch with the most.
    pub token_rows: usize,
    /// Rows of dK.
    pub vocab_rows: usize,
}

/// A numeric contract and where it comes from.
#[derive(Clone, Debug, Serialize)]
pub struct ContractReport {
    /// `declared` by the kernel or the dump, `given` by the caller, or `assumed`.
    pub source: &'static str,
    /// Precision of g, if it was taken to be rounded to 16 bits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cotangent: Option<&'static str>,
    /// Precision of the logits.
    pub logits: &'static str,
    /// Precision of dlogits in the gradient products.
    pub dlogits: &'static str,
    /// Precision of the sums.
    pub accumulate: &'static str,
    /// Precision of dQ.
    pub d_hidden: &'static str,
    /// Precision of dK.
    pub d_unembedding: &'static str,
}

/// One microbatch of a candidate.
#[derive(Clone, Debug, Serialize)]
pub struct MicrobatchReport {
    /// Its index in the step.
    pub microbatch: usize,
    /// N, and how many of them take part.
    pub tokens: usize,
    /// Unmasked tokens.
    pub valid_tokens: usize,
    /// In the order of the stages.
    pub tensors: Vec<TensorReport>,
}

/// What accumulates over a step.
#[derive(Clone, Debug, Serialize)]
pub struct AccumulatedReport {
    /// The accumulated gradients.
    pub tensors: Vec<TensorReport>,
    /// ‖accumulated dK‖₂.
    pub grad_norm: Option<GradNorm>,
}

/// A gradient norm.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct GradNorm {
    /// The candidate's.
    pub candidate: f64,
    /// The reference's.
    pub reference: f64,
    /// How far an honest computation's may lie from the reference's.
    pub tolerance: f64,
    /// Whether it does.
    pub verdict: Verdict,
}

/// One tensor compared. A relative figure is over ‖reference‖₂, and `null` where that is 0.
#[derive(Clone, Debug, Serialize)]
pub struct TensorReport {
    /// The tensor's name in the dump format, which is the stage's.
    pub name: String,
    /// Rows and columns as compared: [N, 1], [N, D] or [V, D] (whatever the layout), or fewer rows in a sample.
    pub shape: [usize; 2],
    /// Rows of the whole tensor, if only a sample of them was compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sampled_from: Option<usize>,
    /// Agree or diverge.
    pub verdict: Verdict,
    /// Why it diverges, in words; `None` if it agrees.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// ‖reference‖₂.
    pub reference_norm: f64,
    /// ‖candidate − reference‖₂ / ‖reference‖₂.
    pub rel_l2: Option<f64>,
    /// Largest |candidate − reference|.
    pub max_abs: f64,
    /// ⟨candidate, reference⟩ / (‖candidate‖·‖reference‖). For information: never part of the verdict.
    pub cosine: Option<f64>,
    /// α: the factor that fits candidate ≈ α · reference best.
    pub scale: Option<f64>,
    /// ‖candidate − α·reference‖₂ / ‖reference‖₂.
    pub residual: Option<f64>,
    /// The `rel_l2` that an honest computation under the contract makes on this very data.
    pub noise_floor: Option<f64>,
    /// `rel_l2` / `noise_floor`.
    pub ratio: f64,
    /// The ratio that no honest computation exceeds here: 1.5, more where few roundings decide.
    pub ratio_limit: f64,
    /// 99th percentile of |candidate − reference| in units in the last place of the reference, in the candidate's dtype.
    pub ulp_p99: f64,
    /// Elements of the candidate that are not finite.
    pub nonfinite: usize,
    /// Elements beyond what any honest computation gives there.
    pub out_of_bound: usize,
    /// The element furthest from the reference.
    pub worst: Option<Worst>,
    /// From where on all rows are 0 that should not be: after the last row that is not 0, and the first that is so wrongly.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zero_tail: Option<[usize; 2]>,
    /// How the error lies.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pattern: Option<Pattern>,
    /// What the page draws of it.
    #[serde(skip)]
    pub plots: Option<Box<Plots>>,
}

/// An element and both its values.
#[derive(Clone, Debug, Serialize)]
pub struct Worst {
    /// Row and column: token (flattened) or vocab id, and feature.
    pub index: [usize; 2],
    /// In words: "token 17 (label 42), feature 3" or "vocab id 42, feature 3".
    pub place: String,
    /// The candidate's value.
    pub candidate: f64,
    /// The reference's value.
    pub reference: f64,
}

/// How an error lies over a tensor. Rows and columns are [start, end) ranges of the whole tensor's.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Pattern {
    /// `uniform`, `scale`, `microbatch_scale`, `row_scale`, `zero_rows`, `masked_rows`, `process`, `label_rows`, `hits`, `tail`,
    /// `vocab_tile`, `token_tile`, `label_tile`, `rows`, `columns`, `nonfinite`.
    pub kind: String,
    /// The share of the squared error that the pattern holds: of that above the floor, where it is one of rows.
    pub share: f64,
    /// Rows that hold it, if it is confined to some.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rows: Vec<[usize; 2]>,
    /// Columns that hold it, if it is confined to some.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub columns: Vec<[usize; 2]>,
    /// The factor on these rows, where one and the same takes the error to the floor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// The smallest and the largest factor on these rows, where it takes one of its own for each.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha_range: Option<[f64; 2]>,
    /// The factor of each microbatch.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub per_microbatch: Vec<f64>,
    /// The first row in error, where everything from it on is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_bad: Option<usize>,
    /// The tile size that fits; the usual one of several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tile: Option<usize>,
    /// All that fit, where several do.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tile_candidates: Vec<usize>,
    /// [k, i]: of every k tiles, the one at place i.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub every: Option<[usize; 2]>,
    /// The rows within each tile.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<[usize; 2]>,
    /// The process that holds these rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process: Option<usize>,
    /// How the log of a label row's relative error grows with the log of its hits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slope: Option<f64>,
    /// Row and column of the first element that is not finite.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first: Option<[usize; 2]>,
    /// `good_in_bad_out` if every input is finite, else `bad_in`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub origin: Option<&'static str>,
    /// The first input element that is not finite.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input: Option<BadInput>,
}

/// An element of an input that is not finite.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BadInput {
    /// The input's name in the dump format.
    pub tensor: &'static str,
    /// Token or vocab id, and feature.
    pub index: [usize; 2],
    /// `NaN`, `inf` or `-inf`.
    pub value: String,
}

/// The first stage that diverges and does not have its error from a recorded stage before it.
#[derive(Clone, Debug, Serialize)]
pub struct Divergence {
    /// `None` for what is accumulated over the step.
    pub microbatch: Option<usize>,
    /// The stage.
    pub stage: String,
    /// The recorded cotangent by which the error enters, if it does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub enters: Option<String>,
}

/// How sure a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Confidence {
    /// The fault takes the deviation down to the floor, and no other does.
    Certain,
    /// It explains nearly all, and clearly more than any other.
    Likely,
    /// It fits best.
    Possible,
}

/// A cause, with its evidence.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// 1 is the best.
    pub rank: usize,
    /// A slug of the fault catalogue, `nonfinite` or `unknown`.
    pub cause: String,
    /// What it is, in words.
    pub title: String,
    /// Share of the whole squared deviation that disappears when this fault alone is applied to the reference.
    pub explained: f64,
    /// Ratio to the floor that is left with this and the findings before it applied.
    pub remaining_ratio: f64,
    /// How sure.
    pub confidence: Confidence,
    /// The fault's parameters, as found.
    pub parameters: Map<String, Value>,
    /// What was seen.
    pub evidence: String,
    /// What to do.
    pub remedy: String,
    /// The next best cause and what it explains.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub runner_up: Option<RunnerUp>,
    /// Causes that this dump cannot tell from this one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub indistinguishable_from: Vec<String>,
    /// What to capture to tell it from those.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tell_apart: Vec<String>,
}

/// The second best explanation.
#[derive(Clone, Debug, Serialize)]
pub struct RunnerUp {
    /// Its slug.
    pub cause: String,
    /// What it explains.
    pub explained: f64,
}
