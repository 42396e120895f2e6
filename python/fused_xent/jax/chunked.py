"""The loss in JAX alone, for platforms without the Rust kernel: a scan over tiles of the vocabulary, sums in float32.

Numeric contract, that of the Rust kernel: products of two bfloat16 inputs are exact, all others are float32, sums are float32;
dlogits are rounded as the options say; dQ and dK are rounded once.

    per tile of columns   m' = max(m, max_v z_v),   s ← s·exp(m − m') + Σ_v exp(z_v − m')
    lse = m + ln s        loss = (m − z_t) + ln s + ε·(z_t − mean_v z_v) + z_loss·lse²
    ∂/∂z_v = P_v·(g·(1 + 2·z_loss·lse) + h) + [v = t]·(u − g·(1−ε)) − g·ε/V
    dlogits = ∂/∂z · scale·(1 − (z/cap)²),   dQ = dlogits·K,   dK = dlogitsᵀ·Q
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .options import Options
from .versions import as_varying, varying_axes

TILE = 4096
"""Columns whose logits exist at a time."""


def masked_tokens(options: Options, targets: jax.Array, token_weights: jax.Array) -> jax.Array:
    """[..] bool: the tokens that take no part."""
    limits = np.iinfo(targets.dtype)
    masked = token_weights == 0
    return masked | (targets == options.ignore_index) if limits.min <= options.ignore_index <= limits.max else masked


def labels_of(options: Options, targets: jax.Array, token_weights: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The masked tokens and the bad ones, [..] bool each, and vocab ids, [..] int32, which are 0 there."""
    masked = masked_tokens(options, targets, token_weights)
    outside = (targets < 0) | (targets >= options.valid_vocab)
    bad = ~masked & (outside | ~jnp.isfinite(token_weights))
    return masked, bad, jnp.where(masked | bad, 0, targets).astype(jnp.int32)


def rounded(x: jax.Array, dtype: str | None) -> jax.Array:
    """`x` in `dtype`. (XLA may leave out a mere conversion to bfloat16 and back.)"""
    if dtype == "bfloat16" and x.dtype == jnp.float32:
        x = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return x if dtype is None else x.astype(dtype)


def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum with float32 sums, and products as exact as the operands ask for."""
    # The CPU backend of older versions has products of bfloat16 with float32 sums for some shapes only.
    if a.dtype == b.dtype == jnp.bfloat16 and jax.__version_info__ >= (0, 8):
        return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
    return jnp.einsum(spec, a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")


class _Problem:
    """A whole unembedding or a vocab shard, cut into tiles. The last one may overlap the one before, and leaves that part out."""

    def __init__(self, options, hidden, targets, unembedding, token_weights, start):
        self.options, self.start, self.unembedding = options, start, unembedding
        self.masked, self.bad, labels = labels_of(options, targets, token_weights)
        # What a masked token's row holds, be it NaN, is of no account.
        self.hidden = jnp.where(self.masked[..., None], 0, hidden)
        self.labels = labels - start
        self.axis = 0 if options.layout == "vd" else 1
        self.letters = "vd" if options.layout == "vd" else "dv"
        self.vocab = unembedding.shape[self.axis]
        self.tile = min(TILE, self.vocab)
        self.tiles = jnp.arange(-(-self.vocab // self.tile))

    def first_of(self, i):
        return jnp.minimum(i * self.tile, self.vocab - self.tile)

    def columns(self, i):
        """The tile's columns of K, and which of its logits count: [T] bool, the labels' place among them [.., T] bool."""
        first = self.first_of(i)
        ids = first + jnp.arange(self.tile)
        real = (ids >= i * self.tile) & (ids + self.start < self.options.valid_vocab)
        columns = lax.dynamic_slice_in_dim(self.unembedding, first, self.tile, self.axis)
        columns = jnp.where(real[:, None] if self.axis == 0 else real, columns, 0)
        return columns, real, real & (self.labels[..., None] == ids)

    def logits(self, columns):
        """[.., T] float32."""
        z = self.options.logit_scale * product(f"...d,{self.letters}->...v", self.hidden, columns)
        cap = self.options.logit_softcap
        return cap * jnp.tanh(z / cap) if cap else z

    def scan(self, body, *carried):
        """`body` over the tiles. What is carried varies over the devices as the operands do."""
        axes = varying_axes(self.hidden)
        carried = tuple(as_varying(x, axes) for x in carried)
        return lax.scan(lambda carried, i: (body(i, *carried), None), carried, self.tiles)[0]


def partial(options: Options, *operands: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """max z, Σ exp(z − max), Σ z (0 without label smoothing) and z_t (0 if it lies elsewhere) of these columns, [..] float32."""
    problem = _Problem(options, *operands)

    def body(i, most, total, logit_sum, label):
        columns, real, is_label = problem.columns(i)
        z = problem.logits(columns)
        new = jnp.maximum(most, jnp.max(jnp.where(real, z, -jnp.inf), axis=-1))
        at = jnp.where(new == -jnp.inf, 0, new)
        total = total * jnp.exp(most - at) + jnp.sum(jnp.where(real, jnp.exp(z - at[..., None]), 0), axis=-1)
        if options.label_smoothing:
            logit_sum = logit_sum + jnp.sum(jnp.where(real, z, 0), axis=-1)
        return new, total, logit_sum, label + jnp.sum(jnp.where(is_label, z, 0), axis=-1)

    zero = jnp.zeros(problem.labels.shape, jnp.float32)
    most, total, logit_sum, label = problem.scan(body, jnp.full_like(zero, -jnp.inf), zero, zero, zero)
    most = jnp.where(problem.masked, -jnp.inf, most)
    total, label = (jnp.where(problem.masked, 0, jnp.where(problem.bad, jnp.nan, x)) for x in (total, label))
    return most, total, jnp.where(problem.masked, 0, logit_sum), label


def merged(axes: tuple[str, ...], part: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """That of all shards' columns, from each device's own."""
    own, total, logit_sum, label = part
    most = lax.pmax(own, axes)
    total = total * jnp.where(own == most, 1, jnp.exp(own - most))
    return most, lax.psum(total, axes), lax.psum(logit_sum, axes), lax.psum(label, axes)


def finished(options: Options, masked: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Loss, lse and label logits, once all columns are in."""
    most, total, logit_sum, label = part
    lse = most + jnp.log(total)
    loss = (most - label) + jnp.log(total)
    if options.label_smoothing:
        loss += options.label_smoothing * (label - logit_sum / options.valid_vocab)
    if options.z_loss:
        loss += options.z_loss * lse**2
    return tuple(jnp.where(masked, 0, x) for x in (loss, lse, label))


def forward(options: Options, hidden, targets, unembedding, token_weights, start):
    """Loss, lse and label logits, [..] float32 each, of a whole unembedding."""
    part = partial(options, hidden, targets, unembedding, token_weights, start)
    return finished(options, masked_tokens(options, targets, token_weights), part)


def backward(options: Options, hidden, targets, unembedding, token_weights, start, lse, g, h, u):
    """dQ and dK, for the cotangents of loss, lse and label logits; of a shard, its share of dQ and its rows of dK."""
    problem = _Problem(options, hidden, targets, unembedding, token_weights, start)
    precision = options.dlogits if hidden.dtype == unembedding.dtype == jnp.bfloat16 else "f32"
    g, h, u = (jnp.where(problem.masked, 0, x)[..., None] for x in (g, h, u))
    lse = jnp.where(problem.masked, 0, lse)[..., None]
    of_p = g * (1 + 2 * options.z_loss * lse) + h
    of_label = u - g * (1 - options.label_smoothing)
    of_all = g * (options.label_smoothing / options.valid_vocab)
    cap, letters = options.logit_softcap, problem.letters

    def body(i, d_hidden, d_unembedding):
        columns, real, is_label = problem.columns(i)
        z = problem.logits(columns)
        dz = jnp.exp(z - lse) * of_p + jnp.where(is_label, of_label, 0) - of_all
        dz = dz * (options.logit_scale * (1 - (z / cap) ** 2) if cap else options.logit_scale)
        dz = jnp.where(real & ~problem.masked[..., None], dz, 0)
        tile = 0
        for term in terms(dz, precision):
            d_hidden = d_hidden + product(f"...v,{letters}->...d", term, columns)
            tile = tile + product(f"...v,...d->{letters}", term, problem.hidden)
        first = problem.first_of(i)
        tile = tile + lax.dynamic_slice_in_dim(d_unembedding, first, problem.tile, problem.axis)
        return d_hidden, lax.dynamic_update_slice_in_dim(d_unembedding, tile, first, problem.axis)

    zeros = (jnp.zeros(x.shape, jnp.float32) for x in (hidden, unembedding))
    d_hidden, d_unembedding = problem.scan(body, *zeros)
    return d_hidden.astype(options.gradients[0]), d_unembedding.astype(options.gradients[1])


def terms(dz: jax.Array, precision: str) -> list[jax.Array]:
    """`dz` as the sum that is multiplied term by term."""
    if precision == "f32":
        return [dz]
    high = lax.reduce_precision(dz, exponent_bits=8, mantissa_bits=7)
    return [x.astype(jnp.bfloat16) for x in ([high] if precision == "bf16" else [high, dz - high])]
