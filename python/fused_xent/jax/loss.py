"""The public function: checks what it is given, and reduces the per-token losses."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._native import tpu_generations
from .choice import warn_of_fallback
from .chunked import masked_tokens
from .options import Options, Tpu, default_dlogits
from .rules import per_token
from .versions import as_varying, in_shard_map, is_explicitly_sharded, type_of

FLOATS = ("bfloat16", "float16", "float32")
LARGEST_VOCAB = 2**31 - 1


class CrossEntropy(NamedTuple):
    """What `fused_cross_entropy` returns. Every part is differentiable in hidden, unembedding and token weights."""

    loss: jax.Array
    """ℓ per token, [..] float32, in nats, unweighted; 0 at masked tokens."""
    lse: jax.Array
    """log Σ_v exp z_v, [..] float32; 0 at masked tokens."""
    label_logits: jax.Array
    """z_t, [..] float32, after scale and cap; 0 at masked tokens."""
    reduced: jax.Array | None
    """Σ w·ℓ, or that by the denominator, [] float32; `None` with `reduction="none"`."""


def fused_cross_entropy(
    hidden: jax.Array,
    targets: jax.Array,
    unembedding: jax.Array,
    token_weights: jax.Array | None = None,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    denominator: Literal["valid", "tokens"] | float | jax.Array = "valid",
    token_axes: str | Sequence[str] = (),
    layout: Literal["vd", "dv"] = "vd",
    ignore_index: int = -100,
    valid_vocab: int | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    operands: Literal["bfloat16"] | None = None,
    dlogits: Literal["bf16", "bf16x2", "f32"] | None = None,
    vocab_axis: str | Sequence[str] = (),
    implementation: Literal["rust", "jax"] | None = None,
    tpu: str | Tpu | None = None,
) -> CrossEntropy:
    """The cross-entropy of `softmax(hidden · unembeddingᵀ)`, without ever holding the logits.

    ℓ = lse − (1−ε)·z_t − ε·mean_v z_v + z_loss·lse², with z = cap·tanh(scale·(Q·Kᵀ)/cap) and ε = label_smoothing. A token is masked
    where its target is `ignore_index` or its weight is 0: its results and gradients are 0, and its row of `hidden` is not read.

    A target that is no id, or a weight that is not finite, is an error of the program at run time on CPUs, where the Rust kernel
    runs; in a `shard_map`, where an error of one device would leave the others waiting, on TPUs, and where JAX runs, the results of
    that token are NaN, and so are the gradients that it enters.

    Args:
        hidden: Q, [.., D], bfloat16, float16 or float32; its gradient is of the same dtype.
        targets: [..], integers.
        unembedding: K, [V, D] or with `layout="dv"` [D, V], bfloat16, float16 or float32; its gradient is of the same dtype.
        token_weights: w, [..], float or bool. At weight 0 its gradient is 0.
        reduction: Σ w·ℓ by the denominator, Σ w·ℓ, or nothing.
        denominator: of the mean: Σ w over the tokens that take part (the mean is 0 if that is), the number of all tokens, or
            a number.
        token_axes: mesh axes over which the tokens are split: the reduction goes over all of them. Inside of a `shard_map`
            only; without it, it is over the tokens of the device.
        layout: how `unembedding` lies.
        ignore_index: the target of masked tokens.
        valid_vocab: ids from here on are padding; their logits are −∞ and their columns not read.
        logit_scale: factor on Q·Kᵀ; not 0.
        logit_softcap: cap of z; above 0.
        z_loss: coefficient of lse²; 0 or above.
        label_smoothing: ε, in [0, 1).
        operands: `"bfloat16"`: Q and K, which may be float32, are rounded to bfloat16 before they are multiplied, as
            `astype` would, but their gradients stay in their own dtype.
        dlogits: the precision of dlogits in the products that make dQ and dK, where Q and K are multiplied in bfloat16;
            `None`: `"bf16"` where both gradients are bfloat16, else `"bf16x2"`. Without bfloat16 it is always `"f32"`.
        vocab_axis: the mesh axis, or axes, over which the vocabulary is split into equal shards: `unembedding` is then that of
            this device. Inside of a `shard_map` only.
        implementation: `"rust"` (CPUs and TPUs), `"jax"` or, chosen for the platform when the program is lowered, `None`.
        tpu: the generation of TPU, where a program is lowered for devices that are not known (`"v6e"`), or how the kernels are
            cut.

    Raises:
        TypeError, ValueError: a dtype, a shape or an option that does not fit; when the call is traced. With
            `implementation="rust"` or tiles of your own, also what no kernel for TPUs is made for; when the program is lowered.
    """
    vocab_axes, token_axes = _axes("vocab_axis", vocab_axis), _axes("token_axes", token_axes)
    hidden, targets, unembedding = jnp.asarray(hidden), _targets(targets), jnp.asarray(unembedding)
    weights = jnp.ones(targets.shape, jnp.float32) if token_weights is None else _weights(token_weights)
    own_vocab = _check_shapes(hidden, targets, unembedding, weights, layout)
    whole_vocab = own_vocab * math.prod(int(lax.psum(1, axis)) for axis in vocab_axes)
    gradients = (hidden.dtype.name, unembedding.dtype.name)
    options = Options(
        layout=layout,
        ignore_index=_integer("ignore_index", ignore_index, -(2**63), 2**63 - 1),
        valid_vocab=_integer("valid_vocab", whole_vocab if valid_vocab is None else valid_vocab, 1, whole_vocab),
        logit_scale=_number("logit_scale", logit_scale, "one other than 0", lambda x: x != 0),
        logit_softcap=0.0 if logit_softcap is None else _number("logit_softcap", logit_softcap, "one above 0", lambda x: x > 0),
        z_loss=_number("z_loss", z_loss, "0 or above", lambda x: x >= 0),
        label_smoothing=_number("label_smoothing", label_smoothing, "one in [0, 1)", lambda x: 0 <= x < 1),
        vocab=_integer("the size of the vocabulary", whole_vocab, 1, LARGEST_VOCAB),
        vocab_axes=vocab_axes,
        operands=_one_of("operands", operands, (None, "bfloat16")),
        gradients=gradients,
        dlogits=_one_of("dlogits", dlogits, (None, "bf16", "bf16x2", "f32")) or default_dlogits(gradients),
        poison=in_shard_map(),
        implementation=_one_of("implementation", implementation, (None, "rust", "jax")),
        tpu=_tpu(tpu),
    )
    _one_of("reduction", reduction, ("mean", "sum", "none"))
    if options.operands and "float16" in gradients:
        raise TypeError("operands is bfloat16 and an array float16; expected bfloat16 and float32 arrays alone")
    for name, x in (("hidden", hidden), ("targets", targets), ("unembedding", unembedding), ("token_weights", weights)):
        if is_explicitly_sharded(x):
            raise ValueError(f"{name}: {type_of(x)}, sharded over explicit mesh axes; call this inside of a jax.shard_map over them")
    if implementation is None:
        warn_of_fallback()

    start = lax.axis_index(vocab_axes).astype(jnp.int32) * own_vocab if vocab_axes else jnp.zeros((), jnp.int32)
    loss, lse, label_logits = per_token(options, hidden, targets, unembedding, lax.stop_gradient(weights), start)
    reduced = None
    if reduction != "none":
        reduced = _reduced(options, reduction, denominator, token_axes, loss, targets, weights)
    return CrossEntropy(loss, lse, label_logits, reduced)


def _reduced(options, reduction, denominator, token_axes, loss, targets, weights):
    masked = masked_tokens(options, targets, weights)
    weights = jnp.where(masked, 0, weights)
    total = _sum(weights * loss, token_axes)
    if reduction == "sum":
        return total
    if isinstance(denominator, str):
        _one_of("denominator", denominator, ("valid", "tokens"))
        denominator = _sum(weights if denominator == "valid" else jnp.ones_like(weights), token_axes)
    elif jnp.shape(denominator):
        raise ValueError(f"denominator has shape {list(jnp.shape(denominator))}; expected a number")
    none = denominator == 0
    return jnp.where(none, 0, total / jnp.where(none, 1, denominator))


def _sum(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    total = jnp.sum(x)
    return lax.psum(as_varying(total, axes), axes) if axes else total


def _axes(name: str, given: Any) -> tuple[str, ...]:
    axes = (given,) if isinstance(given, str) else tuple(given or ())
    for axis in axes:
        try:
            lax.axis_index(axis)
        except NameError:
            found = f"{name} is {given!r}, and there is no axis {axis!r} here"
            raise ValueError(f"{found}: is this inside of a shard_map over it?") from None
    return axes


def _targets(given: Any) -> jax.Array:
    targets = jnp.asarray(given)
    if not jnp.issubdtype(targets.dtype, jnp.integer) or targets.dtype == jnp.uint64:
        raise TypeError(f"targets: dtype {targets.dtype.name}; expected integers, up to int64 or uint32")
    return targets if targets.dtype.itemsize >= 4 else targets.astype(jnp.int32)


def _weights(given: Any) -> jax.Array:
    weights = jnp.asarray(given)
    if not (jnp.issubdtype(weights.dtype, jnp.floating) or weights.dtype == jnp.bool_):
        raise TypeError(f"token_weights: dtype {weights.dtype.name}; expected float or bool")
    return weights.astype(jnp.float32)


def _check_shapes(hidden, targets, unembedding, weights, layout) -> int:
    """V of this unembedding."""
    for name, x in (("hidden", hidden), ("unembedding", unembedding)):
        if x.dtype.name not in FLOATS:
            raise TypeError(f"{name}: dtype {x.dtype.name}; expected {', '.join(FLOATS)}")
    _one_of("layout", layout, ("vd", "dv"))
    expected = "[V, D]" if layout == "vd" else "[D, V]"
    if hidden.ndim < 1:
        raise ValueError("hidden: a scalar; expected [.., D]")
    if unembedding.ndim != 2:
        raise ValueError(f"unembedding: shape {list(unembedding.shape)}; expected {expected}")
    vocab, d = unembedding.shape if layout == "vd" else unembedding.shape[::-1]
    if d != hidden.shape[-1]:
        raise ValueError(
            f"unembedding: shape {list(unembedding.shape)}, which is {expected}; expected D = {hidden.shape[-1]}, that of hidden"
            f" {list(hidden.shape)}"
        )
    if d == 0 or vocab == 0:
        raise ValueError(f"unembedding: shape {list(unembedding.shape)}; expected V and D of 1 or more")
    for name, x in (("targets", targets), ("token_weights", weights)):
        if x.shape != hidden.shape[:-1]:
            raise ValueError(f"{name}: shape {list(x.shape)}; expected {list(hidden.shape[:-1])}, that of hidden without D")
    return vocab


def _tpu(given: Any) -> Tpu:
    found = Tpu() if given is None else Tpu(given) if isinstance(given, str) else given
    if not isinstance(found, Tpu):
        raise TypeError(f"tpu is {given!r}; expected the name of a generation or a fused_xent.jax.Tpu")
    _one_of("the generation of tpu", found.generation, (None, *tpu_generations()))
    for name, of, length in (("forward", found.forward, 2), ("backward", found.backward, 3)):
        if of is not None and not (isinstance(of, Sequence) and len(of) == length):
            raise ValueError(f"tpu has {name}={of!r}; expected {length} numbers")
    forward, backward = (of and tuple(_integer(f"a size in {of}", x, 0, 2**31 - 1) for x in of) for of in found[1:])
    return Tpu(found.generation, forward, backward)


def _one_of(name: str, found: Any, expected: tuple[Any, ...]) -> Any:
    if found not in expected:
        raise ValueError(f"{name} is {found!r}; expected one of {', '.join(map(repr, expected))}")
    return found


def _integer(name: str, found: Any, least: int, most: int) -> int:
    if isinstance(found, bool) or not isinstance(found, (int, np.integer)):
        raise TypeError(f"{name} is {found!r}; expected an integer, known when the call is traced")
    if not least <= found <= most:
        raise ValueError(f"{name} is {found}; expected {least} to {most}")
    return int(found)


def _number(name: str, found: Any, expected: str, fits: Any) -> float:
    if isinstance(found, bool) or not isinstance(found, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} is {found!r}; expected a number, known when the call is traced")
    value = float(found)
    if not (math.isfinite(value) and fits(value)):
        raise ValueError(f"{name} is {found}; expected a finite number, {expected}")
    return value
