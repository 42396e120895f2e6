//! The custom VJP: forward → residuals → backward, and both in one go.
//!
//! ```text
//! forward    ℓ = lse − (1−ε)·z_t − ε·mean_v z_v + z_loss·lse²                residual: lse, [N] float32
//! backward   p = g·(1 + 2·z_loss·lse) + h      onehot = u − g·(1−ε)      constant = −g·ε/V_valid
//!            dlogits_v = (p·exp(z_v − lse) + onehot·[v = t] + constant)·∂z/∂(Q·Kᵀ)
//!            dQ = dlogits·K      dK = dlogitsᵀ·Q
//! ```
//! for cotangents g of ℓ, h of lse and u of z_t: all three outputs are differentiable.

use crate::contract::Contract;
use crate::cpu::portable::Portable;
use crate::gemm::Isa;
use crate::problem::{DType, Label, LossOptions, Problem, ProblemError};
use crate::tiled::{Plan, Row, RowStats, Sums, Walk};
use half::{bf16, f16};

/// Per-token results, [N] each, float32; 0 at masked tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Forward {
    /// ℓ, unweighted.
    pub loss: Vec<f32>,
    /// log Σ_v exp z_v: the residual that [`Kernel::backward`] needs.
    pub lse: Vec<f32>,
    /// z_t, after scale and cap.
    pub label_logits: Vec<f32>,
}

/// What the model predicts, without its logits.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Predictions {
    /// The vocab id with the largest logit, the lowest of equals, [N]; 0 at masked tokens.
    pub argmax: Vec<u32>,
    /// −Σ_v P_v·ln P_v in nats, [N]; 0 at masked tokens.
    pub entropy: Vec<f32>,
    /// The share of unmasked tokens whose label is the argmax; `None` if there is none.
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

/// Where the gradients are written; `None` is not computed.
#[derive(Debug, Default)]
pub struct Gradients<'a> {
    /// dQ, [N, D].
    pub d_hidden: Option<GradientMut<'a>>,
    /// dK, in K's layout.
    pub d_unembedding: Option<GradientMut<'a>>,
}

/// A gradient's buffer. It is summed in float32 whatever its type, and rounded at most once.
#[derive(Debug)]
pub enum GradientMut<'a> {
    /// Overwritten; for bfloat16 inputs.
    Bf16(&'a mut [bf16]),
    /// Overwritten; for float16 inputs.
    F16(&'a mut [f16]),
    /// Overwritten; for any input.
    F32(&'a mut [f32]),
    /// Added to, in float32: an accumulator over microbatches.
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

    fn check(&self, name: &'static str, expected: usize, what: &'static str, input: DType) -> Result<(), ProblemError> {
        if self.len() != expected {
            return Err(ProblemError::Buffer { name, found: self.len(), expected, what });
        }
        if self.dtype() != DType::F32 && self.dtype() != input {
            return Err(ProblemError::GradientDType { name, found: self.dtype().name(), input: input.name() });
        }
        Ok(())
    }
}

/// The float32 sums behind a gradient: the caller's buffer where it is float32, else one of our own that is rounded at the end.
struct Target<'a> {
    buffer: Option<GradientMut<'a>>,
    own: Vec<f32>,
}

impl<'a> Target<'a> {
    fn new(mut buffer: Option<GradientMut<'a>>) -> Self {
        let mut own = Vec::new();
        match &mut buffer {
            Some(GradientMut::F32(s)) => s.fill(0.0),
            Some(b @ (GradientMut::Bf16(_) | GradientMut::F16(_))) => own = vec![0.0; b.len()],
            _ => {}
        }
        Self { buffer, own }
    }

    fn sums(&mut self) -> Option<&mut [f32]> {
        match self.buffer.as_mut()? {
            GradientMut::F32(s) | GradientMut::Accumulate(s) => Some(s),
            _ => Some(&mut self.own),
        }
    }

    fn finish(self) {
        match self.buffer {
            Some(GradientMut::Bf16(s)) => s.iter_mut().zip(&self.own).for_each(|(s, &x)| *s = bf16::from_f32(x)),
            Some(GradientMut::F16(s)) => s.iter_mut().zip(&self.own).for_each(|(s, &x)| *s = f16::from_f32(x)),
            _ => {}
        }
    }
}

/// The workspace for logits unless another is asked for: 128 MiB.
pub const DEFAULT_WORKSPACE: usize = 128 << 20;

/// An instruction set's instance of the fused kernel. A value is the proof that this machine can run it.
///
/// Results are bit-identical for any number of threads; work runs in the current rayon pool.
#[derive(Clone, Debug)]
pub struct Kernel {
    isa: Instance,
    workspace: usize,
}

#[derive(Clone, Copy, Debug)]
enum Instance {
    Portable(Portable),
}

/// Runs `$body` with `$isa` bound to the kernel's instruction set.
macro_rules! with_isa {
    ($kernel:expr, $isa:ident => $body:expr) => {
        match $kernel.isa {
            Instance::Portable($isa) => $body,
        }
    };
}

impl Kernel {
    /// The kernel that every machine can run.
    pub fn portable() -> Self {
        Self { isa: Instance::Portable(Portable), workspace: DEFAULT_WORKSPACE }
    }

    /// The fastest kernel of this machine.
    pub fn best() -> Self {
        Self::portable()
    }

    /// Every kernel of this machine, the fastest first.
    pub fn available() -> Vec<Self> {
        vec![Self::portable()]
    }

    /// The kernel of that name, if this machine can run it.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::available().into_iter().find(|k| k.name() == name)
    }

    /// Its name, in reports, tests and benches.
    pub fn name(&self) -> &'static str {
        match self.isa {
            Instance::Portable(_) => "portable",
        }
    }

    /// Bounds the workspace for logits to `bytes`, but for one tile. Too small for a row of logits per token of a block, it
    /// makes [`Kernel::loss_and_grad`] compute logits twice.
    pub fn with_workspace(self, bytes: usize) -> Self {
        Self { workspace: bytes, ..self }
    }

    /// Bytes of logits that are held at a time: independent of N, and of V where V is large.
    ///
    /// A gradient in 16 bits takes float32 sums of its own size beyond that: 4·N·D or 4·V·D bytes.
    pub fn workspace_bytes(&self, problem: &Problem) -> usize {
        self.plan(problem).elements() * size_of::<f32>()
    }

    /// What it promises of gradients in the given precisions.
    pub fn contract(&self, d_hidden: DType, d_unembedding: DType) -> Contract {
        Contract { d_hidden: d_hidden.into(), d_unembedding: d_unembedding.into(), ..Contract::F32 }
    }

    /// Per-token loss, lse and label logits: 2·N·D·V operations.
    ///
    /// # Errors
    /// If the unembedding is a shard: see [`Kernel::partial`].
    pub fn forward(&self, problem: &Problem) -> Result<Forward, ProblemError> {
        problem.require_whole("forward")?;
        Ok(finish(problem, &self.statistics(problem)))
    }

    /// Argmax, entropy and accuracy: as costly as [`Kernel::forward`].
    ///
    /// # Errors
    /// If the unembedding is a shard.
    pub fn predictions(&self, problem: &Problem) -> Result<Predictions, ProblemError> {
        problem.require_whole("predictions")?;
        let stats = self.statistics(problem);
        let part = |n: usize| problem.labels()[n] != Label::Masked;
        let unmasked = (0..stats.len()).filter(|&n| part(n)).count();
        let hits = (0..stats.len()).filter(|&n| problem.labels()[n] == Label::Column(stats[n].argmax)).count();
        Ok(Predictions {
            argmax: stats.iter().map(|s| s.argmax).collect(),
            entropy: stats.iter().map(|s| if s.sum == 0.0 { 0.0 } else { (s.sum.ln() - s.weighted / s.sum) as f32 }).collect(),
            accuracy: (unmasked > 0).then(|| hits as f64 / unmasked as f64),
        })
    }

    /// dQ and dK for any cotangents of what [`Kernel::forward`] returned: 6·N·D·V operations.
    ///
    /// On a vocab shard `lse` is that of the whole vocabulary; dK is then the shard's, and dQ sums over the shards.
    ///
    /// # Errors
    /// If a buffer has the wrong length or type.
    pub fn backward(
        &self,
        problem: &Problem,
        lse: &[f32],
        cotangents: Cotangents,
        gradients: Gradients,
    ) -> Result<(), ProblemError> {
        let n = problem.shape().tokens;
        let arguments = [
            ("lse", Some(lse)),
            ("loss cotangents", cotangents.loss),
            ("lse cotangents", cotangents.lse),
            ("label logit cotangents", cotangents.label_logits),
        ];
        for (name, values) in arguments {
            if let Some(values) = values.filter(|v| v.len() != n) {
                return Err(ProblemError::Buffer { name, found: values.len(), expected: n, what: "N" });
            }
        }
        self.with_targets(problem, gradients, |sums| {
            let row = |n: usize| coefficients(problem, n, lse[n], cotangents);
            with_isa!(self, isa => self.walk(isa, problem).backward(row, sums));
        })
    }

    /// [`Kernel::forward`], and the gradients of Σ g·ℓ: 6·N·D·V operations where the workspace holds the logits of a block
    /// of tokens, 8·N·D·V where it does not. `loss_cotangent` is g, [N].
    ///
    /// # Errors
    /// If a buffer has the wrong length or type, or if the unembedding is a shard.
    pub fn loss_and_grad(
        &self,
        problem: &Problem,
        loss_cotangent: &[f32],
        gradients: Gradients,
    ) -> Result<Forward, ProblemError> {
        problem.require_whole("loss_and_grad")?;
        let n = problem.shape().tokens;
        if loss_cotangent.len() != n {
            return Err(ProblemError::Buffer { name: "loss cotangents", found: loss_cotangent.len(), expected: n, what: "N" });
        }
        let cotangents = Cotangents { loss: Some(loss_cotangent), ..Cotangents::default() };
        let mut stats = Vec::new();
        self.with_targets(problem, gradients, |sums| {
            let row = |n: usize, stats: &RowStats| coefficients(problem, n, stats.lse() as f32, cotangents);
            stats = with_isa!(self, isa => self.walk(isa, problem).forward_backward(row, sums));
        })?;
        Ok(finish(problem, &stats))
    }

    pub(crate) fn statistics(&self, problem: &Problem) -> Vec<RowStats> {
        with_isa!(self, isa => self.walk(isa, problem).statistics())
    }

    fn plan(&self, problem: &Problem) -> Plan {
        let valid = problem.labels().iter().filter(|l| **l != Label::Masked).count();
        Plan::new(problem.shape().vocab, valid, self.workspace)
    }

    fn walk<'a, I: Isa>(&self, isa: I, problem: &'a Problem<'a>) -> Walk<'a, I> {
        Walk { isa, problem, plan: self.plan(problem) }
    }

    fn with_targets(&self, problem: &Problem, gradients: Gradients, run: impl FnOnce(&mut Sums)) -> Result<(), ProblemError> {
        let Gradients { d_hidden, d_unembedding } = gradients;
        if let Some(b) = &d_hidden {
            b.check("d_hidden", problem.hidden().len(), "N × D", problem.hidden().dtype())?;
        }
        if let Some(b) = &d_unembedding {
            b.check("d_unembedding", problem.unembedding().len(), "V × D", problem.unembedding().dtype())?;
        }
        let (mut hidden, mut unembedding) = (Target::new(d_hidden), Target::new(d_unembedding));
        run(&mut Sums { hidden: hidden.sums(), unembedding: unembedding.sums() });
        hidden.finish();
        unembedding.finish();
        Ok(())
    }
}

fn coefficients(problem: &Problem, n: usize, lse: f32, cotangents: Cotangents) -> Row {
    let at = |c: Option<&[f32]>| c.map_or(0.0, |c| f64::from(c[n]));
    let (g, h, u) = (at(cotangents.loss), at(cotangents.lse), at(cotangents.label_logits));
    let LossOptions { z_loss, label_smoothing, .. } = *problem.options();
    Row {
        p: (g * (1.0 + 2.0 * z_loss * f64::from(lse)) + h) as f32,
        onehot: (u - g * (1.0 - label_smoothing)) as f32,
        constant: (-g * label_smoothing / problem.valid_total() as f64) as f32,
        lse,
    }
}

/// Per-token results from the statistics of all columns.
pub(crate) fn finish(problem: &Problem, stats: &[RowStats]) -> Forward {
    let n = stats.len();
    let mut out = Forward { loss: vec![0.0; n], lse: vec![0.0; n], label_logits: vec![0.0; n] };
    let LossOptions { z_loss, label_smoothing, .. } = *problem.options();
    for (n, stats) in stats.iter().enumerate().filter(|(n, _)| problem.labels()[*n] != Label::Masked) {
        let lse = stats.lse();
        let label = stats.label.unwrap_or(f32::NEG_INFINITY);
        let mean = stats.total / problem.valid_total() as f64;
        let smoothed = if label_smoothing > 0.0 { label_smoothing * mean } else { 0.0 };
        out.loss[n] = (lse - (1.0 - label_smoothing) * f64::from(label) - smoothed + z_loss * lse * lse) as f32;
        out.lse[n] = lse as f32;
        out.label_logits[n] = label;
    }
    out
}
