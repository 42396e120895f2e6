//! From the folders of a step to a [`Problem`]: the inputs of one microbatch, loaded, flattened and checked.

use super::error::{DumpError, DumpErrorKind};
use super::folder::Folder;
use super::read::Step;
use super::shards::multi_index;
use super::tensor::Tensor;
use fused_xent_kernels::problem::{Inputs, Layout, LossOptions, Problem, ProblemError, Shape};
use std::sync::Arc;

/// The inputs of one microbatch, in memory or mapped.
#[derive(Clone, Debug)]
pub struct LoadedMicrobatch {
    /// Q: [tokens, D] or [batch, sequence, D].
    pub hidden: Tensor,
    /// K in its layout; microbatches of a step can share it.
    pub unembedding: Arc<Tensor>,
    /// Label ids, one per token.
    pub targets: Tensor,
    /// Per-token weights, where the run has them.
    pub token_weights: Option<Tensor>,
    options: LossOptions,
    shape: Shape,
    place: String,
}

impl Step {
    /// The microbatch `m`, which must be whole.
    ///
    /// # Errors
    /// It is not one of the step's, or not whole: says what is missing.
    pub fn folder(&self, m: usize) -> Result<&Folder, DumpError> {
        self.microbatches.get(&m).ok_or_else(|| {
            let reason = self.incomplete.iter().find(|i| i.microbatch == Some(m)).map(|i| i.reason.clone());
            DumpError::new(
                DumpErrorKind::Missing,
                format_args!("step {}, microbatch {m}", self.step),
                reason.unwrap_or_else(|| format!("the step has {} microbatches", self.num_microbatches)),
                "a microbatch that every process committed",
                "copy the folders of those processes, or choose another microbatch",
            )
        })
    }

    /// The unembedding that the step's microbatches share.
    ///
    /// # Errors
    /// It was not recorded, or as [`Folder::load`].
    pub fn unembedding(&self) -> Result<Arc<Tensor>, DumpError> {
        self.shared.require("unembedding").map(|recorded| Arc::new(recorded.tensor))
    }

    /// Loads the inputs of microbatch `m`, the unembedding too. To walk many microbatches, load it once with
    /// [`Step::unembedding`] and use [`Step::problem_with`].
    ///
    /// # Errors
    /// As [`Step::problem_with`] and [`Step::unembedding`].
    pub fn problem(&self, m: usize) -> Result<LoadedMicrobatch, DumpError> {
        let own = self.folder(m)?.info("unembedding").is_some();
        let unembedding = if own { Arc::new(self.folder(m)?.require("unembedding")?.tensor) } else { self.unembedding()? };
        self.with(m, unembedding)
    }

    /// Loads the inputs of microbatch `m`, with this unembedding unless its folder holds one of its own.
    ///
    /// # Errors
    /// A microbatch that is not whole, an input that was not recorded or cannot be loaded, or an unembedding of another D.
    pub fn problem_with(&self, m: usize, unembedding: &Arc<Tensor>) -> Result<LoadedMicrobatch, DumpError> {
        if self.folder(m)?.info("unembedding").is_some() {
            return self.problem(m);
        }
        self.with(m, unembedding.clone())
    }

    fn with(&self, m: usize, unembedding: Arc<Tensor>) -> Result<LoadedMicrobatch, DumpError> {
        let folder = self.folder(m)?;
        let hidden = folder.require("hidden")?.tensor;
        let targets = folder.require("targets")?.tensor;
        let token_weights = folder.load("token_weights")?.map(|r| r.tensor);
        LoadedMicrobatch::new(folder.place(), self.loss.options, hidden, unembedding, targets, token_weights)
    }
}

impl LoadedMicrobatch {
    pub(crate) fn new(
        place: &str,
        options: LossOptions,
        hidden: Tensor,
        unembedding: Arc<Tensor>,
        targets: Tensor,
        token_weights: Option<Tensor>,
    ) -> Result<Self, DumpError> {
        // Shapes within one folder were checked when the dump was opened; D also has to be that of another folder.
        let d = hidden.shape().last().copied().unwrap_or(0);
        let (vocab, own_d) = match (unembedding.shape(), unembedding.layout()) {
            (&[v, d], Layout::Vd) | (&[d, v], Layout::Dv) => (v, d),
            _ => (0, 0),
        };
        if own_d != d {
            return Err(DumpError::new(
                DumpErrorKind::Shape,
                format_args!("{place}: unembedding"),
                format!("hidden size D {own_d}"),
                format!("hidden size D {d}, as hidden has"),
                "correct global_shape (or \"layout\") of the one that is wrong",
            ));
        }
        let shape = Shape { tokens: targets.len(), hidden: d, vocab };
        Ok(Self { hidden, unembedding, targets, token_weights, options, shape, place: place.to_owned() })
    }

    /// N, D, V.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The problem: [batch, sequence, D] flattened to [N, D].
    ///
    /// # Errors
    /// A target that is no vocab id, a weight that is not finite: located by its index in the tensor as recorded.
    pub fn problem(&self) -> Result<Problem<'_>, DumpError> {
        let unfit = |name: &str, tensor: &Tensor| {
            let found = tensor.dtype().name();
            let place = format_args!("{}: {name}", self.place);
            DumpError::new(DumpErrorKind::Dtype, place, found, "a dtype of the format's for it", "correct the manifest")
        };
        let inputs = Inputs {
            hidden: self.hidden.floats().ok_or_else(|| unfit("hidden", &self.hidden))?,
            unembedding: self.unembedding.floats().ok_or_else(|| unfit("unembedding", &self.unembedding))?,
            layout: self.unembedding.layout(),
            targets: self.targets.targets().ok_or_else(|| unfit("targets", &self.targets))?,
            token_weights: self.token_weights.as_ref().and_then(Tensor::f32_slice),
            shape: self.shape,
            shard: None,
        };
        Problem::new(inputs, self.options).map_err(|e| self.located(e))
    }

    fn located(&self, error: ProblemError) -> DumpError {
        let at = |token| multi_index(self.targets.shape(), token);
        let (place, found, expected, remedy) = match &error {
            ProblemError::Target { token, found, valid_vocab, ignore_index } => (
                format!("{}: targets{:?}", self.place, at(*token)),
                format!("it is {found}"),
                format!("an id in [0, {valid_vocab}), or ignore_index = {ignore_index}"),
                "mask the token, correct the id, or correct valid_vocab or ignore_index",
            ),
            ProblemError::Weight { token, found } => (
                format!("{}: token_weights{:?}", self.place, at(*token)),
                format!("it is {found}"),
                "a finite weight".to_owned(),
                "use 0 to mask a token",
            ),
            other => (self.place.clone(), other.to_string(), "inputs that make a problem".to_owned(), "capture the step again"),
        };
        DumpError::new(DumpErrorKind::Problem, place, found, expected, remedy).caused_by(error)
    }
}
