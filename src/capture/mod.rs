//! What training code calls to write the exact inputs and gradients of a step to a dump.
//!
//! Calls are synchronous: when one returns, its arrays are on disk and may be overwritten. A capture only reads what it is
//! given, and every error comes back from the call in which it happened. A folder appears to readers only once it is whole.
//! Where training must not wait for the disk, [`BackgroundWriter`] writes from a thread of its own.
//!
//! ```
//! use fused_xent::capture::{Capture, CaptureOptions, CaptureSteps, MicrobatchInputs, MicrobatchOutputs};
//! use fused_xent::dump::{Dump, Elements};
//! use fused_xent::kernels::problem::{Floats, Layout, Targets};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let temporary = tempfile::tempdir()?;
//! # let dir = temporary.path();
//! let options = CaptureOptions { steps: CaptureSteps::At(vec![3]), verify: true, ..Default::default() };
//! let capture = Capture::new(dir, options)?;
//! let (unembedding, hidden) = ([0.5f32; 4 * 2], [1.0f32; 3 * 2]);
//! for k in 0..5 {
//!     let captured = capture.step(k)?; // None: this step is not captured
//!     if let Some(mut step) = captured {
//!         step.unembedding(Floats::F32(&unembedding), [4, 2], Layout::Vd)?;
//!         let targets = Targets::I32(&[0, 3, -100]);
//!         let inputs = MicrobatchInputs::new(Floats::F32(&hidden), &[3, 2], targets);
//!         let mut microbatch = step.microbatch(0, &inputs)?;
//!         let d_hidden = [0.0f32; 3 * 2]; // from the backward
//!         let outputs = MicrobatchOutputs { d_hidden: Some(Elements::F32(&d_hidden)), ..Default::default() };
//!         microbatch.outputs(&outputs)?;
//!         microbatch.commit()?;
//!         step.finish(None)?;
//!     }
//! }
//! assert_eq!(Dump::open(dir)?.runs()[0].steps.keys().collect::<Vec<_>>(), [&3]);
//! # Ok(())
//! # }
//! ```

mod background;

pub use background::{BackgroundWriter, Failure, OwnedElements, Part};

use crate::dump::{DumpError, DumpErrorKind, Elements, FolderId, FolderWriter, LossSettings, Placement, Region, check_contract};
use fused_xent_kernels::problem::{Floats, Layout, Targets};
use serde_json::Value;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Which steps are captured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CaptureSteps {
    /// These.
    At(Vec<u64>),
    /// Every one that this number divides, step 0 included.
    Every(u64),
}

/// How a run is captured. The default is every step of a single process with one microbatch and the default loss.
#[derive(Clone, Debug)]
pub struct CaptureOptions {
    /// Which steps.
    pub steps: CaptureSteps,
    /// This process.
    pub process_index: usize,
    /// Processes of the run.
    pub process_count: usize,
    /// Names the run, the same on every process. `None`: the time and a random suffix, for a single process.
    pub run_id: Option<String>,
    /// The loss that the run computes.
    pub loss: LossSettings,
    /// Microbatches of a step.
    pub num_microbatches: usize,
    /// How the recorded gradients are computed, if it is to be declared: see [`FolderWriter::contract`].
    pub contract: Option<Value>,
    /// Read every folder back and compare it bit for bit with what was handed in.
    pub verify: bool,
}

impl Default for CaptureOptions {
    fn default() -> Self {
        Self {
            steps: CaptureSteps::Every(1),
            process_index: 0,
            process_count: 1,
            run_id: None,
            loss: LossSettings::default(),
            num_microbatches: 1,
            contract: None,
            verify: false,
        }
    }
}

/// The capture of a run.
#[derive(Clone, Debug)]
pub struct Capture {
    root: PathBuf,
    steps: CaptureSteps,
    verify: bool,
    contract: Option<Value>,
    /// Of the folders to come, but for step and microbatch.
    id: FolderId,
}

impl Capture {
    /// A capture into the dump at `root`. Nothing is written yet.
    ///
    /// # Errors
    /// Options that make no sense: no step to capture, a process index beyond the processes, several processes without a
    /// `run_id` in common, a loss that cannot be computed, an unknown contract.
    pub fn new(root: &Path, options: CaptureOptions) -> Result<Self, DumpError> {
        let CaptureOptions { steps, process_index, process_count, run_id, loss, num_microbatches, contract, verify } = options;
        let unfit = |option: &str, found: &str, expected: &str, remedy: &str| {
            let place = format_args!("capture to {}: {option}", root.display());
            Err(DumpError::new(DumpErrorKind::Settings, place, found, expected, remedy))
        };
        match &steps {
            CaptureSteps::At(list) if list.is_empty() => {
                return unfit("steps", "an empty list", "at least one step", "leave the capture out to capture nothing");
            }
            CaptureSteps::Every(0) => return unfit("steps", "every 0 steps", "every 1 or more", "use 1 for every step"),
            _ => {}
        }
        if run_id.is_none() && process_count > 1 {
            let remedy = "agree on one, such as the job's name and start, and give it to every process";
            return unfit("run_id", "none", "the same run_id on all processes", remedy);
        }
        let id = FolderId {
            run_id: run_id.unwrap_or_else(new_run_id),
            producer: concat!("fused-xent ", env!("CARGO_PKG_VERSION")).to_owned(),
            step: 0,
            microbatch: None,
            num_microbatches,
            process_index,
            process_count,
            loss,
        };
        let place = format!("capture to {}", root.display());
        id.validate(&place, DumpErrorKind::Settings)?;
        check_contract(contract.as_ref(), &place)?;
        Ok(Self { root: root.to_owned(), steps, verify, contract, id })
    }

    /// The name of the run.
    pub fn run_id(&self) -> &str {
        &self.id.run_id
    }

    /// Whether step `step` is captured.
    pub fn captures(&self, step: u64) -> bool {
        match &self.steps {
            CaptureSteps::At(list) => list.contains(&step),
            CaptureSteps::Every(n) => step.is_multiple_of(*n),
        }
    }

    /// Begins to capture step `step`; `None` if it is not one to capture.
    ///
    /// # Errors
    /// The step was captured before, or its folder cannot be created.
    pub fn step(&self, step: u64) -> Result<Option<StepCapture>, DumpError> {
        if !self.captures(step) {
            return Ok(None);
        }
        let capture = self.at(step);
        let shared = capture.folder(None)?;
        Ok(Some(StepCapture { capture, shared, unembedding: None }))
    }

    fn at(&self, step: u64) -> Self {
        Self { id: FolderId { step, ..self.id.clone() }, ..self.clone() }
    }

    fn folder(&self, microbatch: Option<usize>) -> Result<FolderWriter, DumpError> {
        let mut writer = FolderWriter::create(&self.root, FolderId { microbatch, ..self.id.clone() })?;
        if self.verify {
            writer = writer.verified();
        }
        if let Some(contract) = &self.contract {
            writer.contract(contract.clone())?;
        }
        Ok(writer)
    }
}

/// The capture of one step. If it is dropped before [`StepCapture::finish`], `shared` is an interrupted capture.
#[derive(Debug)]
pub struct StepCapture {
    capture: Capture,
    shared: FolderWriter,
    unembedding: Option<Placement>,
}

impl StepCapture {
    /// Records K whole, of `shape` [V, D] or [D, V], as it is when the step's gradients are computed.
    ///
    /// # Errors
    /// Data that do not fit the shape, or a file that cannot be written.
    pub fn unembedding(&mut self, data: Floats<'_>, shape: [usize; 2], layout: Layout) -> Result<(), DumpError> {
        self.unembedding_shard(data, &Placement::whole(&shape).layout(layout))
    }

    /// Records this process's shard or copy of K. A process that holds no shard of its own need not call it.
    ///
    /// # Errors
    /// As [`StepCapture::unembedding`].
    pub fn unembedding_shard(&mut self, data: Floats<'_>, placement: &Placement) -> Result<(), DumpError> {
        self.shared.tensor("unembedding", data.into(), placement)?;
        self.unembedding.get_or_insert_with(|| placement.clone());
        Ok(())
    }

    /// Records any tensor of `shared`, or a shard of it: for what [`StepCapture::finish`] does not cover.
    ///
    /// # Errors
    /// A tensor that does not belong here or does not fit its placement, or a file that cannot be written.
    pub fn tensor(&mut self, name: &str, data: Elements<'_>, placement: &Placement) -> Result<(), DumpError> {
        self.shared.tensor(name, data, placement)
    }

    /// Begins microbatch `m` and records its inputs. Several may be open at once.
    ///
    /// # Errors
    /// A microbatch beyond `num_microbatches` or captured before, inputs that do not fit their shape, or a file that cannot
    /// be written.
    pub fn microbatch(&self, m: usize, inputs: &MicrobatchInputs<'_>) -> Result<MicrobatchCapture, DumpError> {
        let mut folder = self.capture.folder(Some(m))?;
        let (hidden, tokens) = inputs.placements(folder.path())?;
        folder.tensor("hidden", inputs.hidden.into(), &hidden)?;
        folder.tensor("targets", inputs.targets.into(), &tokens)?;
        if let Some(weights) = inputs.token_weights {
            folder.tensor("token_weights", weights.into(), &tokens)?;
        }
        folder.unembedding_from_shared()?;
        Ok(MicrobatchCapture { folder, hidden, tokens, unembedding: self.unembedding.clone() })
    }

    /// Records the accumulated dK, placed as the unembedding was, if there is one to record, and commits `shared`.
    ///
    /// # Errors
    /// A microbatch that is not committed, a gradient without an unembedding to place it by, data that do not fit, or a file
    /// that cannot be written.
    pub fn finish(mut self, d_unembedding: Option<Elements<'_>>) -> Result<(), DumpError> {
        let open = (0..self.capture.id.num_microbatches).find(|&m| {
            let id = FolderId { microbatch: Some(m), ..self.capture.id.clone() };
            !id.is_committed(&self.capture.root)
        });
        if let Some(m) = open {
            let place = format_args!("{}: microbatch {m}", self.shared.path().display());
            let found = "it is not committed";
            let expected = "every microbatch committed before the step is finished";
            return Err(DumpError::new(DumpErrorKind::Settings, place, found, expected, "call commit on each microbatch"));
        }
        if let Some(data) = d_unembedding {
            let placement = placed(&self.unembedding, self.shared.path())?;
            self.shared.tensor("d_unembedding", data, placement)?;
        }
        self.shared.commit().map(|_| ())
    }
}

fn placed<'a>(unembedding: &'a Option<Placement>, folder: &Path) -> Result<&'a Placement, DumpError> {
    unembedding.as_ref().ok_or_else(|| {
        let place = format_args!("{}: d_unembedding", folder.display());
        let found = "no unembedding was recorded before it";
        let expected = "one whose shape and shard it shares";
        DumpError::new(DumpErrorKind::Data, place, found, expected, "record the unembedding first, or use tensor")
    })
}

/// The inputs of a microbatch, or this process's part of them.
#[derive(Clone, Copy, Debug)]
pub struct MicrobatchInputs<'a> {
    /// Q.
    pub hidden: Floats<'a>,
    /// [tokens, D] or [batch, sequence, D].
    pub hidden_shape: &'a [usize],
    /// Label ids, of `hidden_shape` without D.
    pub targets: Targets<'a>,
    /// Per-token weights, shaped as `targets`; `None`: all 1.
    pub token_weights: Option<&'a [f32]>,
    /// Where these tokens lie among those of all processes; `None`: they are all.
    pub tokens: Option<TokenShard<'a>>,
}

/// Where a process's tokens lie among those of all processes.
#[derive(Clone, Copy, Debug)]
pub struct TokenShard<'a> {
    /// `[tokens]` or `[batch, sequence]` over all processes.
    pub global_shape: &'a [usize],
    /// Index of this process's first token.
    pub start: &'a [usize],
    /// 0, or above for a copy of tokens that another process records too.
    pub replica: usize,
}

impl<'a> MicrobatchInputs<'a> {
    /// Inputs without weights, all tokens of the microbatch.
    pub fn new(hidden: Floats<'a>, hidden_shape: &'a [usize], targets: Targets<'a>) -> Self {
        Self { hidden, hidden_shape, targets, token_weights: None, tokens: None }
    }

    /// Of `hidden`, and of what has a value per token.
    fn placements(&self, folder: &Path) -> Result<(Placement, Placement), DumpError> {
        let Some((&d, shape)) = self.hidden_shape.split_last() else {
            let place = format_args!("{}: hidden", folder.display());
            let expected = "[tokens, D] or [batch, sequence, D]";
            return Err(DumpError::new(DumpErrorKind::Data, place, "shape []", expected, "correct hidden_shape"));
        };
        let all = TokenShard { global_shape: shape, start: &vec![0; shape.len()], replica: 0 };
        let TokenShard { global_shape, start, replica } = self.tokens.unwrap_or(all);
        let tokens = Placement::shard(global_shape, start, shape).replica(replica);
        let mut hidden = tokens.clone();
        let Region { start, shape } = &mut hidden.region;
        for (extents, last) in [(&mut hidden.global_shape, d), (start, 0), (shape, d)] {
            extents.push(last);
        }
        Ok((hidden, tokens))
    }
}

/// What a run can record of a microbatch, placed as its inputs are. Everything is optional.
#[derive(Clone, Copy, Debug, Default)]
pub struct MicrobatchOutputs<'a> {
    /// ℓ per token, unweighted.
    pub loss: Option<&'a [f32]>,
    /// lse per token.
    pub lse: Option<&'a [f32]>,
    /// z_t per token.
    pub label_logits: Option<&'a [f32]>,
    /// dQ.
    pub d_hidden: Option<Elements<'a>>,
    /// dK of this microbatch alone, placed as the step's unembedding.
    pub d_unembedding: Option<Elements<'a>>,
}

/// The capture of one microbatch. If it is dropped before [`MicrobatchCapture::commit`], it is an interrupted capture.
#[derive(Debug)]
pub struct MicrobatchCapture {
    folder: FolderWriter,
    hidden: Placement,
    tokens: Placement,
    unembedding: Option<Placement>,
}

impl MicrobatchCapture {
    /// Records what the run computed. May be called more than once, each time with other outputs.
    ///
    /// # Errors
    /// Data that do not fit the inputs' shape, a dK before the step's unembedding, or a file that cannot be written.
    pub fn outputs(&mut self, outputs: &MicrobatchOutputs<'_>) -> Result<(), DumpError> {
        let MicrobatchOutputs { loss, lse, label_logits, d_hidden, d_unembedding } = *outputs;
        for (name, values) in [("loss", loss), ("lse", lse), ("label_logits", label_logits)] {
            if let Some(values) = values {
                self.folder.tensor(name, values.into(), &self.tokens)?;
            }
        }
        if let Some(data) = d_hidden {
            self.folder.tensor("d_hidden", data, &self.hidden)?;
        }
        if let Some(data) = d_unembedding {
            let placement = placed(&self.unembedding, self.folder.path())?;
            self.folder.tensor("d_unembedding", data, placement)?;
        }
        Ok(())
    }

    /// Records any other tensor of a microbatch, or a shard of it: recorded parts of gradients, cotangents.
    ///
    /// # Errors
    /// A tensor that does not belong here or does not fit its placement, or a file that cannot be written.
    pub fn tensor(&mut self, name: &str, data: Elements<'_>, placement: &Placement) -> Result<(), DumpError> {
        self.folder.tensor(name, data, placement)
    }

    /// Commits the microbatch's folder.
    ///
    /// # Errors
    /// A file that cannot be written, or, with `verify`, a folder that does not read back as it was handed in.
    pub fn commit(self) -> Result<(), DumpError> {
        self.folder.commit().map(|_| ())
    }
}

/// The time to the second and four random hexadecimal digits: `2026-02-05T10:11:12Z-7f3a`.
fn new_run_id() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs());
    let random = RandomState::new().hash_one(std::process::id()) & 0xFFFF;
    format!("{}-{random:04x}", utc(seconds))
}

/// Seconds since 1970 as a UTC date and time.
fn utc(seconds: u64) -> String {
    let (mut days, rest) = (seconds / 86_400, seconds % 86_400);
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let mut month = 0;
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{:02}-{:02}T{hour:02}:{minute:02}:{second:02}Z", month + 1, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(utc(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(utc(1_770_286_272), "2026-02-05T10:11:12Z");
        assert_eq!(utc(4_107_542_399), "2100-02-28T23:59:59Z");
        assert_eq!(utc(4_107_542_400), "2100-03-01T00:00:00Z");
    }

    #[test]
    fn run_ids_differ() {
        let ids: std::collections::BTreeSet<String> = (0..20).map(|_| new_run_id()).collect();
        assert!(ids.len() > 15, "{ids:?}");
        assert!(ids.iter().all(|id| id.len() == "2026-02-05T10:11:12Z-7f3a".len()));
    }
}
