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
use crate::filter::Filter;
use crate::gemm::Write;
use crate::memory;
use crate::panels::Pack;
use crate::problem::{DType, Label, Layout, Problem, ProblemError};
use crate::shard::{Partial, TokenPartial};
use crate::tiled::{Settings, Sinks};
use half::{bf16, f16};
use rayon::prelude::*;
use std::fmt;
use std::sync::{Arc, Mutex, TryLockError};

/// The default bound on the workspace, in bytes; with what two threads pack into it makes 128 MiB at most.
const WORKSPACE: usize = 120 << 20;

/// The environment variable that names the kernel to use.
const CHOICE: &str = "FUSED_XENT_KERNEL";

/// A fused cross-entropy kernel. A value is the proof that this machine can run it.
///
/// All work runs on the current rayon thread pool, and the results are the same bits for any number of threads.
#[derive(Clone)]
pub struct Kernel {
    name: &'static str,
    /// Float32 arithmetic.
    wide: &'static dyn Backend,
    /// Products of bfloat16 with sums in float32, for inputs that are bfloat16.
    narrow: Option<&'static dyn Backend>,
    workspace: usize,
    dlogits: Option<Dlogits>,
    /// The last call's workspace.
    held: Arc<Mutex<Vec<f32>>>,
}

/// What it computes and with how much workspace; not what the workspace holds.
impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { name, workspace, dlogits, .. } = self;
        f.debug_struct("Kernel")
            .field("name", name)
            .field("workspace", workspace)
            .field("dlogits", dlogits)
            .finish_non_exhaustive()
    }
}

/// The precision of dlogits in the products that make dQ and dK of them; see the table in docs/performance.md.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dlogits {
    /// One bfloat16: the fastest, and below what rounding a gradient to bfloat16 costs.
    Bf16,
    /// A high and a low bfloat16: gradients at the level of float32, in 10·N·D·V operations instead of 6·N·D·V.
    Bf16x2,
    /// Float32, and float32 arithmetic throughout.
    F32,
}

impl Dlogits {
    /// All, the least precise first.
    pub const ALL: [Dlogits; 3] = [Dlogits::Bf16, Dlogits::Bf16x2, Dlogits::F32];

    /// `bf16`, `bf16x2` or `f32`, as its [`Precision`] is called.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|&dlogits| Precision::from(dlogits).name() == name)
    }
}

impl From<Dlogits> for Precision {
    fn from(dlogits: Dlogits) -> Self {
        match dlogits {
            Dlogits::Bf16 => Precision::Bf16,
            Dlogits::Bf16x2 => Precision::Bf16x2,
            Dlogits::F32 => Precision::F32,
        }
    }
}

/// The environment names a kernel that this machine cannot run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{CHOICE} is `{found}`, expected one of the kernels of this machine: {}", available.join(", "))]
pub struct UnknownKernel {
    /// What it names.
    pub found: String,
    /// What there is.
    pub available: Vec<&'static str>,
}

impl Kernel {
    fn new(name: &'static str, wide: &'static dyn Backend, narrow: Option<&'static dyn Backend>) -> Self {
        Self { name, wide, narrow, workspace: WORKSPACE, dlogits: None, held: Arc::default() }
    }

    /// Plain Rust, compiled for the baseline of the target: runs everywhere.
    pub fn portable() -> Self {
        Self::new("portable", &cpu::portable::Portable, None)
    }

    /// The kernel that the environment variable `FUSED_XENT_KERNEL` names, or else the fastest of this machine.
    ///
    /// # Errors
    /// If it names none that this machine can run.
    pub fn from_environment() -> Result<Self, UnknownKernel> {
        let Some(found) = std::env::var_os(CHOICE) else { return Ok(Self::available().swap_remove(0)) };
        let found = found.to_string_lossy().into_owned();
        let available = || Self::available().iter().map(Self::name).collect();
        Self::by_name(&found).ok_or_else(|| UnknownKernel { available: available(), found })
    }

    /// As [`Kernel::from_environment`]; where that fails, it says so on standard error and is the fastest kernel.
    pub fn best() -> Self {
        Self::from_environment().unwrap_or_else(|error| {
            static ONCE: std::sync::Once = std::sync::Once::new();
            ONCE.call_once(|| eprintln!("fused-xent: {error}; going on with the fastest"));
            Self::available().swap_remove(0)
        })
    }

    /// Every kernel that this machine can run, the fastest first.
    pub fn available() -> Vec<Self> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if let Some(wide) = cpu::avx512::Avx512::get() {
                all.extend(cpu::avx512_bf16::Avx512Bf16::get().map(|narrow| Self::new("avx512-bf16", wide, Some(narrow))));
                all.push(Self::new("avx512", wide, None));
            }
            all.extend(cpu::avx2::Avx2::get().map(|wide| Self::new("avx2", wide, None)));
        }
        #[cfg(target_arch = "aarch64")]
        if let Some(wide) = cpu::neon::Neon::get() {
            all.extend(cpu::neon_bf16::NeonBf16::get().map(|narrow| Self::new("neon-bf16", wide, Some(narrow))));
            all.push(Self::new("neon", wide, None));
        }
        all.push(Self::portable());
        all
    }

    /// The kernel of this name, if this machine can run it.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::available().into_iter().find(|kernel| kernel.name() == name)
    }

    /// `avx512-bf16`, `avx512`, `avx2`, `portable`, …
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Bounds the workspace; a bound too small for one panel of tokens and one chunk of logits means those.
    ///
    /// It holds logits, Q twice in panels, and dQ, for a block of tokens. Beyond it a call packs into up to 2 MiB per thread, and
    /// holds V·D floats where dK is wanted in bfloat16 or float16, since it is summed in float32 and rounded once.
    ///
    /// A kernel keeps its workspace for the next call; it is freed with the kernel and its clones, which share it.
    pub fn with_workspace(self, bytes: usize) -> Self {
        Self { workspace: bytes, held: Arc::default(), ..self }
    }

    /// Chooses the precision of dlogits in the gradient products.
    ///
    /// Without a choice it is bfloat16 where all gradients asked for are, else a pair of them. A kernel that has no bfloat16
    /// arithmetic, and any kernel where an input is not bfloat16, keeps float32 whatever was chosen.
    pub fn with_dlogits(self, dlogits: Dlogits) -> Self {
        Self { dlogits: Some(dlogits), ..self }
    }

    /// The bytes of workspace that [`Kernel::loss_and_grad`] will hold for `problem`.
    pub fn workspace_bytes(&self, problem: &Problem) -> usize {
        let (backend, settings, _) = self.select(dtypes(problem), &[]);
        backend.workspace_bytes(problem, settings)
    }

    /// What this kernel promises for inputs Q and K of these dtypes, where dQ and dK are asked for in those.
    pub fn contract(&self, inputs: [DType; 2], gradients: [DType; 2]) -> Contract {
        Contract {
            logits: Precision::F32,
            dlogits: self.select(inputs, &gradients).2.into(),
            label: LabelTerm::Joint,
            accumulate: Precision::F32,
            d_hidden: gradients[0].into(),
            d_unembedding: gradients[1].into(),
        }
    }

    /// The arithmetic for inputs of these dtypes, and the precision of dlogits for gradients of those.
    fn select(&self, inputs: [DType; 2], gradients: &[DType]) -> (&'static dyn Backend, Settings, Dlogits) {
        let default = if gradients.contains(&DType::F32) { Dlogits::Bf16x2 } else { Dlogits::Bf16 };
        let dlogits = self.dlogits.unwrap_or(default);
        let (backend, dlogits) = match self.narrow {
            Some(narrow) if inputs == [DType::Bf16; 2] && dlogits != Dlogits::F32 => (narrow, dlogits),
            _ => (self.wide, Dlogits::F32),
        };
        let parts = if dlogits == Dlogits::Bf16x2 { 2 } else { 1 };
        (backend, Settings { workspace: self.workspace, parts }, dlogits)
    }

    /// Does the work in the workspace of the last call, or in a new one while another call is using that.
    fn with_workspace_held<R>(&self, work: impl FnOnce(&mut Vec<f32>) -> R) -> R {
        match self.held.try_lock() {
            Ok(mut held) => work(&mut held),
            Err(TryLockError::Poisoned(held)) => work(&mut held.into_inner()),
            Err(TryLockError::WouldBlock) => work(&mut Vec::new()),
        }
    }

    /// Per-token loss, lse and label logits.
    ///
    /// # Errors
    /// If the unembedding is a shard.
    pub fn forward(&self, problem: &Problem) -> Result<Forward, ProblemError> {
        problem.require_whole("the forward")?;
        let (backend, settings, _) = self.select(dtypes(problem), &[]);
        Ok(Forward::new(problem, backend.partials(problem, settings)))
    }

    /// What this unembedding, a vocab shard or the whole, contributes to the forward: 2·N·D·V operations.
    pub fn partial(&self, problem: &Problem) -> Partial {
        let mut tokens = vec![TokenPartial::default(); problem.shape().tokens];
        let (backend, settings, _) = self.select(dtypes(problem), &[]);
        let partials = backend.partials(problem, settings);
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
        let (backend, settings, _) = self.select(dtypes(problem), &[]);
        let rows = backend.predictions(problem, settings);
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
        let (backend, settings, _) = self.select(dtypes(problem), &gradients.dtypes());
        self.with_workspace_held(|workspace| {
            gradients.fill(problem, workspace, |sinks| backend.backward(problem, settings, lse, cotangents, sinks))
        })
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
        let (backend, settings, _) = self.select(dtypes(problem), &gradients.dtypes());
        let partials = self.with_workspace_held(|workspace| {
            gradients.fill(problem, workspace, |sinks| backend.partials_and_backward(problem, settings, cotangents, sinks))
        })?;
        Ok(Forward::new(problem, partials))
    }
}

/// Of the inputs.
fn dtypes(problem: &Problem) -> [DType; 2] {
    [problem.hidden().dtype(), problem.unembedding().dtype()]
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
    /// What to leave out of both; `None`, the default, leaves out nothing.
    pub filter: Option<&'a mut Filter>,
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
            GradientMut::Bf16(s) => s.par_chunks_mut(PIECE).for_each(|s| s.fill(bf16::ZERO)),
            GradientMut::F16(s) => s.par_chunks_mut(PIECE).for_each(|s| s.fill(f16::ZERO)),
            GradientMut::F32(s) => s.par_chunks_mut(PIECE).for_each(|s| s.fill(0.0)),
            GradientMut::Accumulate(_) => {}
        }
    }

    /// Puts `values`, rounded once, at `start` and after.
    pub(crate) fn put(&mut self, start: usize, values: &[f32]) {
        let range = start..start + values.len();
        match self {
            GradientMut::Bf16(s) => s[range].iter_mut().zip(values).for_each(|(s, &x)| *s = Pack::pack(x)),
            GradientMut::F16(s) => s[range].iter_mut().zip(values).for_each(|(s, &x)| *s = f16::from_f32(x)),
            GradientMut::F32(s) => s[range].copy_from_slice(values),
            GradientMut::Accumulate(s) => s[range].iter_mut().zip(values).for_each(|(s, &x)| *s += x),
        }
    }

    /// As [`GradientMut::put`] for all of it, on all threads.
    fn put_all(&mut self, values: &[f32]) {
        let parts = values.par_chunks(PIECE);
        match self {
            GradientMut::Bf16(s) => s.par_chunks_mut(PIECE).zip(parts).for_each(|(s, x)| GradientMut::Bf16(s).put(0, x)),
            GradientMut::F16(s) => s.par_chunks_mut(PIECE).zip(parts).for_each(|(s, x)| GradientMut::F16(s).put(0, x)),
            GradientMut::F32(s) => s.par_chunks_mut(PIECE).zip(parts).for_each(|(s, x)| GradientMut::F32(s).put(0, x)),
            GradientMut::Accumulate(s) => {
                s.par_chunks_mut(PIECE).zip(parts).for_each(|(s, x)| GradientMut::Accumulate(s).put(0, x))
            }
        }
    }
}

/// Elements that a thread writes at a time.
const PIECE: usize = 1 << 16;

impl Gradients<'_> {
    /// Of those asked for.
    fn dtypes(&self) -> Vec<DType> {
        [&self.d_hidden, &self.d_unembedding].into_iter().flatten().map(GradientMut::dtype).collect()
    }

    /// Checks the buffers, runs `backward` on what it may write, and rounds.
    fn fill<R>(
        mut self,
        problem: &Problem,
        workspace: &mut Vec<f32>,
        backward: impl FnOnce(Sinks) -> R,
    ) -> Result<R, ProblemError> {
        let shape = problem.shape();
        let (n_d, v_d) = (shape.tokens * shape.hidden, shape.vocab * shape.hidden);
        let dk_shape = if problem.layout() == Layout::Vd { "V × D" } else { "D × V" };
        if let Some(d_hidden) = &self.d_hidden {
            d_hidden.validate("d_hidden", problem.hidden().dtype(), n_d, "N × D")?;
        }
        if let Some(d_unembedding) = &self.d_unembedding {
            d_unembedding.validate("d_unembedding", problem.unembedding().dtype(), v_d, dk_shape)?;
        }
        if let Some(d_hidden) = &mut self.d_hidden {
            d_hidden.clear();
        }
        // Every valid column is written once a token takes part; what else there is, is 0.
        let all_written = problem.valid_columns() == shape.vocab && problem.labels().iter().any(|&l| l != Label::Masked);
        if let Some(d_unembedding) = self.d_unembedding.as_mut().filter(|_| !all_written) {
            d_unembedding.clear();
        }
        if let Some(filter) = &mut self.filter {
            filter.begin(problem);
        }
        let (d_hidden, filter) = (self.d_hidden.as_mut(), self.filter);
        Ok(match &mut self.d_unembedding {
            None => backward(Sinks { d_hidden, d_unembedding: None, filter, workspace }),
            Some(GradientMut::F32(sum)) => {
                backward(Sinks { d_hidden, d_unembedding: Some((sum, Write::Set)), filter, workspace })
            }
            Some(GradientMut::Accumulate(sum)) => {
                backward(Sinks { d_hidden, d_unembedding: Some((sum, Write::Add)), filter, workspace })
            }
            Some(narrow) => {
                let mut sum = memory::zeros(v_d);
                let result = backward(Sinks { d_hidden, d_unembedding: Some((&mut sum, Write::Set)), filter, workspace });
                narrow.put_all(&sum);
                result
            }
        })
    }
}
