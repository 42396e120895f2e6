"""The loss per token and its derivative."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from . import chunked, rust
from .options import Options
from .versions import as_varying, types_vary, varying_axes


def _run(name: str, options: Options, *operands: jax.Array):
    """What the namesakes in `rust` and `chunked` compute; which of them does is settled when the program is lowered."""
    in_rust = functools.partial(getattr(rust, name), options)
    in_jax = functools.partial(getattr(chunked, name), options)
    if options.implementation is not None:
        return (in_rust if options.implementation == "rust" else in_jax)(*operands)
    return lax.platform_dependent(*operands, cpu=in_rust, default=in_jax)


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

    The types of the operands say that all vary over the same mesh axes, `options.vocab_axes` among them; `start` [] int32 is the
    first id of this device's shard. Differentiable in hidden and unembedding.
    """
    return _forward(options, hidden, targets, unembedding, token_weights, start)[0]


def _forward(options, hidden, targets, unembedding, token_weights, start):
    hidden, unembedding = (chunked.rounded(x, options.operands) for x in (hidden, unembedding))
    operands = (hidden, targets, unembedding, token_weights, start)
    if options.vocab_axes:
        part = chunked.merged(options.vocab_axes, _run("partial", options, *operands))
        masked = chunked.masked_tokens(options, targets, token_weights)
        out = chunked.finished(options, _same_on_all(masked, options.vocab_axes), part)
    else:
        out = _run("forward", options, *operands)
    return out, (operands, out[1])


def _same_on_all(masked: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """`masked`, which is the same on all of those devices, typed as such."""
    return lax.pmax(masked.astype(jnp.int32), axes) != 0 if types_vary(axes) else masked


def _backward(options, saved, cotangents):
    operands, lse = saved
    if options.vocab_axes and not types_vary(options.vocab_axes):
        # Where types do not say that results are the same on several devices, each device has but its share of their cotangents.
        cotangents = [lax.psum(x, options.vocab_axes) for x in cotangents]
    axes = varying_axes(operands[0])
    lse, *cotangents = (as_varying(x, axes) for x in (lse, *cotangents))
    d_hidden, d_unembedding = _run("backward", options, *operands, lse, *cotangents)
    return d_hidden, None, d_unembedding, None, None


per_token.defvjp(_forward, _backward)
