//! Where an error enters, as the substitution of stages shows it.

use serde::Serialize;

/// The stages that diverge, each recomputed from what the candidate itself has of the stages before it, and what repairing
/// one stage does to those after it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Substitution {
    /// One for each stage of a microbatch, and of the step, that diverges, in the order of the computation.
    pub rungs: Vec<Substituted>,
    /// What is left of a stage's error if one before it is replaced by the reference's.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub repairs: Vec<Repair>,
}

/// A stage beside the same computed from the candidate's own inputs of it.
#[derive(Clone, Debug, Serialize)]
pub struct Substituted {
    /// `None` for what accumulates over the step.
    pub microbatch: Option<usize>,
    /// The stage.
    pub stage: String,
    /// ‖candidate − reference‖ over the floor, in the rows looked at.
    pub ratio: f64,
    /// What was recorded of the stages that it is computed from.
    pub inputs: Vec<StageInput>,
    /// The share of the squared error above the floor that those inputs already carry.
    pub inherited: f64,
    /// ‖candidate − the reference's computation fed with the candidate's inputs‖ over the floor of both.
    pub entering_ratio: f64,
    /// What no honest computation exceeds there.
    pub entering_limit: f64,
    /// Whether an error enters here: after these inputs, and up to this stage.
    pub enters: bool,
    /// The inputs agree, but in a precision whose rounding is the error: they were rounded before they were used.
    #[serde(skip_serializing_if = "is_false")]
    pub rounded_inputs: bool,
    /// What lies between the inputs and this stage and was not recorded: with it, the stage could be split.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub record: Vec<String>,
    /// The rows looked at, and how many there are, if not all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rows: Option<[usize; 2]>,
    /// What enters, along the two parts of a gradient.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub along: Option<Along>,
}

fn is_false(x: &bool) -> bool {
    !x
}

/// A recorded stage that another is computed from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StageInput {
    /// The stage.
    pub stage: String,
    /// Whether it diverges, so that the stage was recomputed from it.
    pub diverges: bool,
}

/// How much of what enters a gradient is a factor of each row on one of its parts: the row's error fitted by that part of the
/// reference's row.
#[derive(Clone, Debug, Serialize)]
pub struct Along {
    /// On the lse part.
    pub lse: AlongPart,
    /// On the label part.
    pub label: AlongPart,
    /// On both alike.
    pub gradient: AlongPart,
    /// The share that a factor of its own on each part accounts for.
    pub both: f64,
    /// The share of what enters dK that the factors on the rows of dQ account for: the error is one of tokens, made before
    /// either product.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub as_in_d_hidden: Option<f64>,
}

/// A fit of rows by one part.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct AlongPart {
    /// The share of the squared error above the floor that is accounted for.
    pub share: f64,
    /// The share that one factor for all rows accounts for.
    pub share_of_one: f64,
    /// The factors on the part of rows that are off: from the 5th percentile to the 95th.
    pub factors: [f64; 2],
}

/// What is left of a stage's error if one before it is replaced by the reference's.
#[derive(Clone, Debug, Serialize)]
pub struct Repair {
    /// The stage that is replaced.
    pub repaired: String,
    /// In which microbatch; `None` if in all.
    pub microbatch: Option<usize>,
    /// The stage that is looked at: of the same microbatch, or what accumulates over the step.
    pub stage: String,
    /// Its ratio to the floor as recorded, in the rows looked at.
    pub before: f64,
    /// The same with the other stage repaired.
    pub after: f64,
}
