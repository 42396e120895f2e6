//! What the HTML page draws: figures of bounded size, whatever the tensor's. Not part of the JSON report.

use super::model::Worst;

/// What is drawn of one tensor.
#[derive(Clone, Debug, Default)]
pub struct Plots {
    /// The error along the rows, in order.
    pub profile: Vec<Span>,
    /// The error of rows of vocab ids by how often they are labels, rows that are none first.
    pub hits: Vec<HitsPoint>,
    /// The error by the size of the gradient, in ascending powers of two.
    pub magnitude: Vec<MagnitudeBin>,
    /// The ratio to the floor of what each process holds, by process; empty if only one holds any.
    pub processes: Vec<ProcessCell>,
    /// The elements furthest from the reference, one of a row, the worst first.
    pub worst: Vec<Worst>,
}

/// Some consecutive rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Span {
    /// First row, and the row after the last, in the whole tensor.
    pub rows: [usize; 2],
    /// ‖error‖ over the floor of these rows; 0 where nothing is to be seen.
    pub ratio: f32,
    /// The same of the row with the largest.
    pub worst: f32,
}

/// One row of a vocab id.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HitsPoint {
    /// How many tokens have it as their label.
    pub hits: usize,
    /// Its relative error.
    pub error: f32,
    /// Its floor, relative.
    pub floor: f32,
}

/// Elements whose reference has a magnitude from `from` to twice that.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MagnitudeBin {
    /// A power of two.
    pub from: f64,
    /// How many elements.
    pub count: usize,
    /// Root of their mean squared error.
    pub rms: f64,
    /// Their largest error.
    pub largest: f64,
    /// What the error of no honest computation exceeds, on average over them.
    pub bound: f64,
}

/// What one process holds of a tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ProcessCell {
    /// The process.
    pub process: usize,
    /// ‖error‖ over the floor of its rows.
    pub ratio: f64,
}

/// Where in the logits the error of the gradients comes from: how much of each tile's honest contribution to a gradient is
/// missing or too much, fitted to the gradient's deviation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Crossing {
    /// The microbatch.
    pub microbatch: usize,
    /// Tokens in a tile, and vocab ids.
    pub tile: [usize; 2],
    /// N and V.
    pub of: [usize; 2],
    /// As dQ shows it, and as dK does.
    pub maps: Vec<CrossingMap>,
}

/// One gradient's map.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CrossingMap {
    /// The stage.
    pub stage: &'static str,
    /// By token tile, then vocab tile: the norm of the fitted error over the floor of the gradient.
    pub ratio: Vec<f32>,
    /// The share of the squared deviation, in the rows looked at, that the map accounts for.
    pub explained: f64,
}

/// Which processes committed which microbatches of a step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Presence {
    /// Processes of the run.
    pub processes: usize,
    /// Microbatches of the step.
    pub microbatches: usize,
    /// Process and microbatch of the folders that are not there.
    pub absent: Vec<[usize; 2]>,
}
