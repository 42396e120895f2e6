"""A fused loss with a backward of its own, healthy or with a real bug put into it."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P

from fused_xent.jax import fused_cross_entropy

FAULTS = ("label-scatter-bf16", "dk-accumulate-bf16", "prob-minus-one-bf16", "lse-bf16", "gq-bf16", "mean-of-means")
"""By their names in the fault catalogue. mean-of-means is the trainer's doing, not the loss's."""

CONTRACT = {"dlogits": "f32", "accumulate": "f32", "d_hidden": "bf16", "d_unembedding": "f32"}
"""What `fused_loss` promises."""


def stored_in_bf16(x):
    """`x` as a bfloat16 buffer gives it back. Of a cast there and back XLA may keep neither (`xla_allow_excess_precision`)."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def logits_of(hidden, unembedding):
    """[B, S, V] float32."""
    return jnp.einsum("bsd,vd->bsv", hidden.astype(jnp.float32), unembedding, precision="highest")


def unfused_loss(hidden, targets, unembedding):
    """As `fused_loss(None)`, without a backward of its own: all logits are there at once, and JAX differentiates."""
    logits = logits_of(hidden, unembedding)
    valid = targets >= 0
    lse = jnp.where(valid, jax.nn.logsumexp(logits, axis=-1), 0.0)
    label = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    label = jnp.where(valid, label, 0.0)
    return {"loss": lse - label, "lse": lse, "label_logits": label}


def fused_loss(fault: str | None):
    """`loss(hidden, targets, unembedding)`: {"loss", "lse", "label_logits"} per token, each [B, S] float32, 0 where masked.

    hidden [B, S, D] bfloat16; targets [B, S] int32, below 0: masked; unembedding [V, D] float32 whose values are bfloat16's.
    Sums are float32; dQ is bfloat16, dK float32.
    """

    def forward(hidden, targets, unembedding):
        out = unfused_loss(hidden, targets, unembedding)
        lse = stored_in_bf16(out["lse"]) if fault == "lse-bf16" else out["lse"]
        return out, (hidden, targets, unembedding, lse)

    def backward(saved, cotangents):
        hidden, targets, unembedding, lse = saved
        vocab = unembedding.shape[0]
        g = jnp.where(targets >= 0, cotangents["loss"], 0.0)
        p = jnp.exp(logits_of(hidden, unembedding) - lse[..., None])
        onehot = jax.nn.one_hot(targets, vocab, dtype=jnp.float32)
        wide, wide_k = hidden.astype(jnp.float32), unembedding
        product = functools.partial(jnp.einsum, precision="highest")
        difference = p - onehot
        if fault == "prob-minus-one-bf16":
            difference = stored_in_bf16(stored_in_bf16(p) - onehot)
        d_hidden = product("bsv,vd->bsd", g[..., None] * difference, wide_k).astype(jnp.bfloat16)
        gq = g[..., None] * wide
        if fault == "label-scatter-bf16":
            label = jnp.zeros(unembedding.shape, jnp.bfloat16)
            label = label.at[targets.reshape(-1)].add(-gq.reshape(-1, gq.shape[-1]).astype(jnp.bfloat16), mode="drop")
            d_unembedding = product("bsv,bsd->vd", p, gq) + label.astype(jnp.float32)
        elif fault == "gq-bf16":
            d_unembedding = product("bsv,bsd->vd", p, stored_in_bf16(gq)) - product("bsv,bsd->vd", onehot, gq)
        elif fault == "dk-accumulate-bf16":
            # A sequence at a time. Each is a chunk of tokens.
            def add(total, sequence):
                return (total + product("sv,sd->vd", *sequence)).astype(jnp.bfloat16), None

            zero = jnp.zeros(unembedding.shape, jnp.bfloat16)
            d_unembedding = jax.lax.scan(add, zero, (g[..., None] * difference, wide))[0].astype(jnp.float32)
        else:
            d_unembedding = product("bsv,bsd->vd", g[..., None] * difference, wide)
        return d_hidden, None, d_unembedding

    @jax.custom_vjp
    def loss(hidden, targets, unembedding):
        return forward(hidden, targets, unembedding)[0]

    loss.defvjp(forward, backward)
    return loss


def kernel_loss(mesh: Mesh):
    """As `fused_loss(None)`, by the kernel: each device has its tokens and a part of the unembedding's rows."""

    def local(hidden, targets, shard):
        unembedding = jax.lax.all_gather(shard, "fsdp", tiled=True)
        out = fused_cross_entropy(hidden, targets, unembedding, reduction="none", operands="bfloat16")
        return {"loss": out.loss, "lse": out.lse, "label_logits": out.label_logits}

    return jax.shard_map(local, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"))
