//! The public kernel: forward → residuals → backward, or both in one go.
//!
//! ```text
//! forward:       loss, lse, label logits, [N] each, in 2·N·D·V operations
//! backward:      dQ and dK for cotangents of all three, from the lse alone, in 6·N·D·V
//! loss_and_grad: both, in 6·N·D·V where the workspace holds whole rows of logits, else in 8·N·D·V
//! ```
//! (N counts the tokens that take part, V the valid columns.)

use crate::contract::{Contract, LabelTerm, Precision};
use crate::cpu::{self, Backend};
use crate::problem::{DType, Label, Layout, Problem, ProblemError};
use crate::shard::{Partial, TokenPartial};
use crate::tiled::{Plan, Reuse, Sinks};
use half::{bf16, f16};

/// The default bound on the logits workspace, in bytes.
const WORKSPACE: usize = 128 << 20;

/// A fused cross-entropy kernel. A value is the proof that this machine can run it.
///
/// All work runs on the current rayon thread pool, and the results are the same bits for any number of threads.
#[derive(Clone, Debug)]
pub struct Kernel {
    backend: &'static dyn Backend,
    workspace: usize,
}

impl Kernel {
    /// Plain Rust, compiled for the baseline of the target: runs everywhere.
    pub fn portable() -> Self {
        Self { backend: &cpu::portable::Portable, workspace: WORKSPACE }
    }

    /// The fastest kernel of this machine.
    pub fn best() -> Self {
        Self::available().swap_remove(0)
    }

    /// Every kernel that this machine can run, the fastest first.
    pub fn available() -> Vec<Self> {
        vec![Self::portable()]
    }

    /// The kernel of this name, if this machine can run it.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::available().into_iter().find(|kernel| kernel.name() == name)
    }

    /// `portable`, …
    pub fn name(&self) -> &'static str {
        self.backend.name()
    }

    /// Bounds the workspace for logits; a bound below one tile (64 KiB) means one tile.
    ///
    /// Beyond it a call holds D floats per token of a block (at most 1024 tokens), up to 1.3 MB per thread, and V·D floats
    /// where dK is wanted in bfloat16 or float16, since it is summed in float32 and rounded once.
    pub fn with_workspace(self, bytes: usize) -> Self {
        Self { workspace: bytes, ..self }
    }

    /// The bytes of logits that [`Kernel::loss_and_grad`] will hold for `problem`.
    pub fn workspace_bytes(&self, problem: &Problem) -> usize {
        Plan::new(problem, self.workspace, Reuse::WholeRows).elements() * size_of::<f32>()
    }

    /// What this kernel promises where gradients are asked for in these dtypes.
    pub fn contract(&self, d_hidden: DType, d_unembedding: DType) -> Contract {
        Contract {
            logits: Precision::F32,
            dlogits: self.backend.dlogits(),
            label: LabelTerm::Joint,
            accumulate: Precision::F32,
            d_hidden: d_hidden.into(),
            d_unembedding: d_unembedding.into(),
        }
    }

    /// Per-token loss, lse and label logits.
    ///
    /// # Errors
    /// If the unembedding is a shard.
    pub fn forward(&self, problem: &Problem) -> Result<Forward, ProblemError> {
        problem.require_whole("the forward")?;
        let plan = Plan::new(problem, self.workspace, Reuse::Once);
        Ok(Forward::new(problem, self.backend.partials(problem, plan)))
    }

    /// What this unembedding, a vocab shard or the whole, contributes to the forward: 2·N·D·V operations.
    pub fn partial(&self, problem: &Problem) -> Partial {
        let mut tokens = vec![TokenPartial::default(); problem.shape().tokens];
        let partials = self.backend.partials(problem, Plan::new(problem, self.workspace, Reuse::Once));
        partials.into_iter().for_each(|(n, partial)| tokens[n] = partial);
        Partial { tokens, columns: problem.valid_columns() }
    }

    /// The most likely id and the entropy of each token's distribution, and how often that id is the label.
    ///
    /// # Errors
    /// If the unembedding is a shard.
    pub fn predictions(&self, problem: &Problem) -> Result<Predictions, ProblemError> {
        problem.require_whole("prediction")?;
        let n = problem.shape().tokens;
        let mut out = Predictions { argmax: vec![0; n], entropy: vec![0.0; n], accuracy: None };
        let rows = self.backend.predictions(problem, Plan::new(problem, self.workspace, Reuse::Once));
        let mut hits = 0;
        for (n, row) in &rows {
            (out.argmax[*n], out.entropy[*n]) = row.finish();
            hits += usize::from(problem.labels()[*n] == Label::Column(out.argmax[*n]));
        }
        out.accuracy = (!rows.is_empty()).then(|| hits as f64 / rows.len() as f64);
        Ok(out)
    }

    /// dQ and dK for `cotangents` of the results of [`Kernel::forward`], whose `lse` [N] it needs (the rest it recomputes).
    ///
    /// On a vocab shard `lse` is that of the whole vocabulary: dK is then the shard's rows of the whole's, and dQ is its
    /// share, to be summed over the shards.
    ///
    /// # Errors
    /// If a buffer's length does not fit, or a gradient is asked for in a dtype that is neither float32 nor its input's.
    pub fn backward(
        &self,
        problem: &Problem,
        lse: &[f32],
        cotangents: Cotangents<'_>,
        gradients: Gradients<'_>,
    ) -> Result<(), ProblemError> {
        per_token("lse", lse, problem)?;
        cotangents.validate(problem)?;
        let plan = Plan::new(problem, self.workspace, Reuse::Once);
        gradients.fill(problem, |sinks| self.backend.backward(problem, plan, lse, cotangents, sinks))
    }

    /// [`Kernel::forward`] and [`Kernel::backward`] in one go, for `loss_cotangent` = g [N], the cotangent of the loss.
    ///
    /// # Errors
    /// As those two.
    pub fn loss_and_grad(
        &self,
        problem: &Problem,
        loss_cotangent: &[f32],
        gradients: Gradients<'_>,
    ) -> Result<Forward, ProblemError> {
        problem.require_whole("loss_and_grad")?;
        let cotangents = Cotangents { loss: Some(loss_cotangent), ..Cotangents::default() };
        cotangents.validate(problem)?;
        let plan = Plan::new(problem, self.workspace, Reuse::WholeRows);
        let partials = gradients.fill(problem, |sinks| self.backend.partials_and_backward(problem, plan, cotangents, sinks))?;
        Ok(Forward::new(problem, partials))
    }
}

/// Per-token results, [N] each; 0 at masked tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Forward {
    /// ℓ, unweighted, in nats.
    pub loss: Vec<f32>,
    /// log Σ_v exp z_v: what the backward needs.
    pub lse: Vec<f32>,
    /// z_t, after scale and cap.
    pub label_logits: Vec<f32>,
}

impl Forward {
    pub(crate) fn new(problem: &Problem, unmasked: impl IntoIterator<Item = (usize, TokenPartial)>) -> Self {
        let zeros = vec![0.0; problem.shape().tokens];
        let mut out = Self { loss: zeros.clone(), lse: zeros.clone(), label_logits: zeros };
        for (n, partial) in unmasked {
            (out.loss[n], out.lse[n]) = partial.loss_and_lse(problem);
            out.label_logits[n] = partial.label_logit;
        }
        out
    }
}

/// What the distribution P of each token predicts.
#[derive(Clone, Debug, PartialEq)]
pub struct Predictions {
    /// The id of the largest logit, the lowest of equals, [N]; 0 at masked tokens.
    pub argmax: Vec<u32>,
    /// −Σ_v P ln P in nats, [N]; 0 at masked tokens.
    pub entropy: Vec<f32>,
    /// The share of unmasked tokens whose label is the argmax; `None` if all are masked.
    pub accuracy: Option<f64>,
}

/// Cotangents of the per-token results, [N] each; `None` is all 0. Those of masked tokens are taken as 0.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cotangents<'a> {
    /// g, of ℓ.
    pub loss: Option<&'a [f32]>,
    /// h, of lse.
    pub lse: Option<&'a [f32]>,
    /// u, of z_t.
    pub label_logits: Option<&'a [f32]>,
}

impl Cotangents<'_> {
    fn validate(&self, problem: &Problem) -> Result<(), ProblemError> {
        let named = [("loss cotangent", self.loss), ("lse cotangent", self.lse), ("label_logits cotangent", self.label_logits)];
        named.into_iter().try_for_each(|(name, values)| values.map_or(Ok(()), |v| per_token(name, v, problem)))
    }
}

fn per_token(name: &'static str, values: &[f32], problem: &Problem) -> Result<(), ProblemError> {
    let expected = problem.shape().tokens;
    if values.len() == expected {
        return Ok(());
    }
    Err(ProblemError::Buffer { name, found: values.len(), expected, what: "N" })
}

/// Which gradients to compute, and where to put them; one that is `None` costs nothing.
#[derive(Debug, Default)]
pub struct Gradients<'a> {
    /// dQ, [N, D] row-major; 0 (or untouched, if added to) at masked tokens.
    pub d_hidden: Option<GradientMut<'a>>,
    /// dK, in K's own layout.
    pub d_unembedding: Option<GradientMut<'a>>,
}

/// A gradient's buffer. bfloat16 and float16 are for inputs of that type: one rounding of the float32 sum.
#[derive(Debug)]
pub enum GradientMut<'a> {
    /// Overwritten, in bfloat16.
    Bf16(&'a mut [bf16]),
    /// Overwritten, in float16.
    F16(&'a mut [f16]),
    /// Overwritten, in float32.
    F32(&'a mut [f32]),
    /// Added to, in float32: for sums over microbatches.
    Accumulate(&'a mut [f32]),
}

impl GradientMut<'_> {
    fn len(&self) -> usize {
        match self {
            GradientMut::Bf16(s) => s.len(),
            GradientMut::F16(s) => s.len(),
            GradientMut::F32(s) | GradientMut::Accumulate(s) => s.len(),
        }
    }

    fn dtype(&self) -> DType {
        match self {
            GradientMut::Bf16(_) => DType::Bf16,
            GradientMut::F16(_) => DType::F16,
            GradientMut::F32(_) | GradientMut::Accumulate(_) => DType::F32,
        }
    }

    fn validate(&self, name: &'static str, input: DType, expected: usize, what: &'static str) -> Result<(), ProblemError> {
        if self.len() != expected {
            return Err(ProblemError::Buffer { name, found: self.len(), expected, what });
        }
        if ![input, DType::F32].contains(&self.dtype()) {
            return Err(ProblemError::GradientDType { name, found: self.dtype().name(), input: input.name() });
        }
        Ok(())
    }

    /// 0, where the buffer is overwritten.
    fn clear(&mut self) {
        match self {
            GradientMut::Bf16(s) => s.fill(bf16::ZERO),
            GradientMut::F16(s) => s.fill(f16::ZERO),
            GradientMut::F32(s) => s.fill(0.0),
            GradientMut::Accumulate(_) => {}
        }
    }

    /// Puts `values`, rounded once, at `start` and after.
    pub(crate) fn put(&mut self, start: usize, values: &[f32]) {
        let range = start..start + values.len();
        match self {
            GradientMut::Bf16(s) => s[range].iter_mut().zip(values).for_each(|(s, &x)| *s = bf16::from_f32(x)),
            GradientMut::F16(s) => s[range].iter_mut().zip(values).for_each(|(s, &x)| *s = f16::from_f32(x)),
            GradientMut::F32(s) => s[range].copy_from_slice(values),
            GradientMut::Accumulate(s) => s[range].iter_mut().zip(values).for_each(|(s, &x)| *s += x),
        }
    }
}

impl Gradients<'_> {
    /// Checks the buffers, runs `backward` on what it may add to, and rounds.
    fn fill<R>(mut self, problem: &Problem, backward: impl FnOnce(Sinks) -> R) -> Result<R, ProblemError> {
        let shape = problem.shape();
        let (n_d, v_d) = (shape.tokens * shape.hidden, shape.vocab * shape.hidden);
        let dk_shape = if problem.layout() == Layout::Vd { "V × D" } else { "D × V" };
        if let Some(d_hidden) = &self.d_hidden {
            d_hidden.validate("d_hidden", problem.hidden().dtype(), n_d, "N × D")?;
        }
        if let Some(d_unembedding) = &self.d_unembedding {
            d_unembedding.validate("d_unembedding", problem.unembedding().dtype(), v_d, dk_shape)?;
        }
        [&mut self.d_hidden, &mut self.d_unembedding].into_iter().flatten().for_each(GradientMut::clear);
        let d_hidden = self.d_hidden.as_mut();
        Ok(match &mut self.d_unembedding {
            None => backward(Sinks { d_hidden, d_unembedding: None }),
            Some(GradientMut::F32(sum) | GradientMut::Accumulate(sum)) => backward(Sinks { d_hidden, d_unembedding: Some(sum) }),
            Some(narrow) => {
                let mut sum = vec![0.0; v_d];
                let result = backward(Sinks { d_hidden, d_unembedding: Some(&mut sum) });
                narrow.put(0, &sum);
                result
            }
        })
    }
}
