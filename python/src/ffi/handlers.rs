//! The handlers: the kernel's forward, a vocab shard's part of it, and the backward.
//!
//! Operands of all three, N tokens of D features, V columns (of the shard, if it is one):
//! ```text
//! hidden [.., D]   targets [..]   unembedding [V, D] or [D, V]   token_weights [..] f32   start [] s32, the shard's first id
//! ```
//! and of the backward also lse and the cotangents of loss, lse and label logits, [..] f32 each. Attributes: `LossOptions`,
//! layout, dlogits, `total` (V of all shards) and `poison`.

use super::call::{Call, Refusal, Tensor, answer};
use super::{abi::CallFrame, abi::ErrorCode, engine};
use fused_xent::kernels::problem::{Inputs, Layout, LossOptions, Problem, ProblemError, Shape, Targets, VocabShard};
use fused_xent::kernels::shard::TokenPartial;
use fused_xent::kernels::{Cotangents, Dlogits, Gradients, Kernel};
use std::ffi::c_void;
use std::sync::Once;

/// Results loss, lse, label logits, [..] f32 each.
///
/// # Safety
/// For XLA to call.
pub(super) unsafe extern "C" fn forward(frame: *mut CallFrame) -> *mut c_void {
    // SAFETY: the caller's promise.
    unsafe { answer(frame, run_forward) }
}

/// Results max, Σ exp(z − max), Σ z and label logit of the shard's columns, [..] f32 each.
///
/// # Safety
/// For XLA to call.
pub(super) unsafe extern "C" fn partial(frame: *mut CallFrame) -> *mut c_void {
    // SAFETY: the caller's promise.
    unsafe { answer(frame, run_partial) }
}

/// Results dQ like hidden and dK like the unembedding, each in float32 or its input's dtype.
///
/// # Safety
/// For XLA to call.
pub(super) unsafe extern "C" fn backward(frame: *mut CallFrame) -> *mut c_void {
    // SAFETY: the caller's promise.
    unsafe { answer(frame, run_backward) }
}

fn run_forward(call: &Call) -> Result<(), Refusal> {
    let out = solve(call, |kernel, problem, bad| {
        let mut out = kernel.forward(problem)?;
        for values in [&mut out.loss, &mut out.lse, &mut out.label_logits] {
            bad.iter().for_each(|&token| values[token] = f32::NAN);
        }
        Ok(out)
    })?;
    call.result(0, "loss")?.write(&out.loss)?;
    call.result(1, "lse")?.write(&out.lse)?;
    call.result(2, "label_logits")?.write(&out.label_logits)
}

fn run_partial(call: &Call) -> Result<(), Refusal> {
    let tokens = solve(call, |kernel, problem, bad| {
        let mut tokens = kernel.partial(problem).tokens;
        bad.iter().for_each(|&token| tokens[token] = TokenPartial { sum: f32::NAN, label_logit: f32::NAN, ..tokens[token] });
        Ok(tokens)
    })?;
    let write = |i, name, of: fn(&TokenPartial) -> f32| call.result(i, name)?.write(&tokens.iter().map(of).collect::<Vec<_>>());
    write(0, "max", |token| token.max)?;
    write(1, "sum", |token| token.sum)?;
    write(2, "logit_sum", |token| token.logit_sum)?;
    write(3, "label_logits", |token| token.label_logit)
}

fn run_backward(call: &Call) -> Result<(), Refusal> {
    let per_token = |i, name| call.operand(i, name)?.f32s();
    let lse = per_token(5, "lse")?;
    let cotangents = Cotangents {
        loss: Some(per_token(6, "cotangent of loss")?),
        lse: Some(per_token(7, "cotangent of lse")?),
        label_logits: Some(per_token(8, "cotangent of label_logits")?),
    };
    let gradients = Gradients {
        d_hidden: Some(call.result(0, "d_hidden")?.gradient()?),
        d_unembedding: Some(call.result(1, "d_unembedding")?.gradient()?),
        ..Gradients::default()
    };
    // The lse of bad tokens is NaN, and so is what their gradients enter.
    solve(call, |kernel, problem, _| Ok(kernel.backward(problem, lse, cotangents, gradients)?))
}

/// Reads the problem that `call` poses and hands it to `work` on the pool's threads, with the tokens whose results are to be NaN.
fn solve<R: Send>(
    call: &Call,
    work: impl FnOnce(&Kernel, &Problem, &[usize]) -> Result<R, Refusal> + Send,
) -> Result<R, Refusal> {
    let hidden = call.operand(0, "hidden")?;
    let targets = call.operand(1, "targets")?.targets()?;
    let unembedding = call.operand(2, "unembedding")?;
    let token_weights = call.operand(3, "token_weights")?.f32s()?;
    let layout = layout_of(call.text("layout")?)?;
    let (start, total) = (first_id(&call.operand(4, "start")?)?, size("total", call.integer("total")?)?);
    let shape = shape_of(&hidden, targets.len(), &unembedding, layout)?;
    let cap = call.float("logit_softcap")?;
    let options = LossOptions {
        ignore_index: call.integer("ignore_index")?,
        valid_vocab: Some(size("valid_vocab", call.integer("valid_vocab")?)?),
        logit_scale: call.float("logit_scale")?,
        logit_softcap: (cap != 0.0).then_some(cap),
        z_loss: call.float("z_loss")?,
        label_smoothing: call.float("label_smoothing")?,
    };
    let inputs = Inputs {
        hidden: hidden.floats()?,
        unembedding: unembedding.floats()?,
        layout,
        targets,
        token_weights: Some(token_weights),
        shape,
        shard: Some(VocabShard { start, total }),
    };
    let engine = engine().map_err(|message| Refusal { code: ErrorCode::FailedPrecondition, message })?;
    let dlogits = call.text("dlogits")?;
    let dlogits = Dlogits::by_name(dlogits).ok_or_else(|| Refusal::of_arguments(format!("dlogits is {dlogits:?}")))?;
    let kernel = engine.kernel.clone().with_dlogits(dlogits);
    let poison = call.flag("poison")?;
    engine.pool.install(|| match Problem::new(inputs, options) {
        Err(error @ (ProblemError::Target { .. } | ProblemError::Weight { .. })) if poison => {
            static ONCE: Once = Once::new();
            ONCE.call_once(|| eprintln!("fused_cross_entropy: {error}; the results of such tokens are NaN"));
            let mended = Mended::new(&inputs, &options);
            let inputs = Inputs { targets: Targets::I64(&mended.targets), token_weights: Some(&mended.weights), ..inputs };
            work(&kernel, &Problem::new(inputs, options)?, &mended.bad)
        }
        problem => work(&kernel, &problem?, &[]),
    })
}

fn layout_of(name: &str) -> Result<Layout, Refusal> {
    match name {
        "vd" => Ok(Layout::Vd),
        "dv" => Ok(Layout::Dv),
        _ => Err(Refusal::of_arguments(format!("layout is {name:?}, expected \"vd\" or \"dv\""))),
    }
}

fn size(name: &str, found: i64) -> Result<usize, Refusal> {
    usize::try_from(found).map_err(|_| Refusal::of_arguments(format!("{name} is {found}, expected 0 or more")))
}

/// Of the shard; an operand, since each device has its own.
fn first_id(start: &Tensor) -> Result<usize, Refusal> {
    let values = start.targets()?;
    match values.len() {
        1 => size("start", values.get(0)),
        found => Err(Refusal::of_arguments(format!("start has {found} elements, expected 1"))),
    }
}

fn shape_of(hidden: &Tensor, tokens: usize, unembedding: &Tensor, layout: Layout) -> Result<Shape, Refusal> {
    let (Some(&d), &[rows, columns]) = (hidden.dims.last(), unembedding.dims) else {
        let found = format!("hidden {:?}, unembedding {:?}", hidden.dims, unembedding.dims);
        return Err(Refusal::of_arguments(format!("{found}: expected [.., D] and two dimensions, V and D")));
    };
    let (vocab, of_unembedding) = if layout == Layout::Vd { (rows, columns) } else { (columns, rows) };
    if of_unembedding != d {
        let found = format!("hidden has D = {d}, the unembedding {of_unembedding}");
        return Err(Refusal::of_arguments(format!("{found}; expected the same (layout is {layout:?})")));
    }
    Ok(Shape { tokens, hidden: d, vocab })
}

/// Targets and weights with which every token can be computed, and the tokens for which that took a change.
struct Mended {
    targets: Vec<i64>,
    weights: Vec<f32>,
    bad: Vec<usize>,
}

impl Mended {
    fn new(inputs: &Inputs, options: &LossOptions) -> Self {
        let tokens = inputs.targets.len();
        let mut mended = Self {
            targets: (0..tokens).map(|token| inputs.targets.get(token)).collect(),
            weights: inputs.token_weights.map_or_else(|| vec![1.0; tokens], <[f32]>::to_vec),
            bad: Vec::new(),
        };
        let ids = 0..options.valid_vocab.map_or(i64::MAX, |ids| ids as i64);
        for (token, (target, weight)) in mended.targets.iter_mut().zip(&mut mended.weights).enumerate() {
            if *target == options.ignore_index || *weight == 0.0 {
                *weight = 0.0;
            } else if !(weight.is_finite() && ids.contains(target)) {
                (*target, *weight) = (0, 1.0);
                mended.bad.push(token);
            }
        }
        mended
    }
}
