"""The loss per token and its derivative."""

import functools
from dataclasses import replace

import jax
from jax import lax

from . import chunked, rust, tpu
from .options import Options
from .versions import HAS_TPU_KERNELS, as_varying, types_vary, varying_axes


def _run(name: str, options: Options, *operands: jax.Array):
    """What the namesakes in `rust`, `tpu` and `chunked` compute; which of them does is settled when the program is lowered."""
    in_rust, on_tpu, in_jax = (functools.partial(getattr(module, name), options) for module in (rust, tpu, chunked))
    if options.implementation == "jax":
        return in_jax(*operands)
    kernels = {"tpu": on_tpu} if HAS_TPU_KERNELS else {}
    if options.implementation == "rust":
        return lax.platform_dependent(*operands, default=in_rust, **kernels)
    return lax.platform_dependent(*operands, default=in_jax, cpu=in_rust, **kernels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def per_token(
    options: Options,
    hidden: jax.Array,
    targets: jax.Array,
    unembedding: jax.Array,
    token_weights: jax.Array,
    start: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Loss, lse and label logits, [..] float32 each.

    `start` [] int32 is the first id of this device's shard. Differentiable in hidden and unembedding.
    """
    return _forward(options, hidden, targets, unembedding, token_weights, start)[0]


def _forward(options, hidden, targets, unembedding, token_weights, start):
    hidden, unembedding = (chunked.rounded(x, options.operands) for x in (hidden, unembedding))
    saved = (hidden, targets, unembedding, token_weights, start)
    operands, _ = _varying(saved)
    if options.vocab_axes:
        part = chunked.merged(options.vocab_axes, _run("partial", options, *operands))
        out = chunked.finished(options, chunked.masked_tokens(options, targets, token_weights), part)
    else:
        out = _run("forward", options, *operands)
    return out, (*saved, out[1])


def _varying(arrays: tuple[jax.Array, ...]) -> tuple[list[jax.Array], frozenset[str]]:
    """The arrays typed as varying over the axes over which any of them does, and those axes."""
    axes = frozenset().union(*map(varying_axes, arrays))
    return [as_varying(x, axes) for x in arrays], axes


def _backward(options, saved, cotangents):
    # Without `check_vma` types do not say what is the same on several devices; each of them then has a share of its cotangent.
    shared_out = options.vocab_axes if options.vocab_axes and not types_vary(options.vocab_axes) else ()
    if shared_out:
        cotangents = [lax.psum(x, shared_out) for x in cotangents]
    operands, axes = _varying((*saved, *cotangents))
    # Elsewhere its gradient is the sum of theirs: in float32, and rounded after it.
    summed_over = [shared_out or tuple(sorted(axes - varying_axes(saved[0]))), tuple(sorted(axes - varying_axes(saved[2])))]
    computed = tuple("float32" if over else dtype for over, dtype in zip(summed_over, options.gradients))
    gradients = _run("backward", replace(options, gradients=computed), *operands)
    d_hidden, d_unembedding = (lax.psum(x, over) if over else x for x, over in zip(gradients, summed_over))
    if shared_out:
        d_hidden /= lax.psum(1, shared_out)
    return d_hidden.astype(options.gradients[0]), None, d_unembedding.astype(options.gradients[1]), None, None


per_token.defvjp(_forward, _backward)
