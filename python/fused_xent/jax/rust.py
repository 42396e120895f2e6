"""The Rust kernel as custom calls of XLA's CPU backend. Each function is as its namesake in `chunked`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._native import xla_handlers
from .options import Options

for _name, _handler in xla_handlers().items():
    jax.ffi.register_ffi_target(_name, _handler, platform="cpu")


def _attributes(options: Options) -> dict[str, Any]:
    return {
        "layout": options.layout,
        "ignore_index": np.int64(options.ignore_index),
        "valid_vocab": np.int64(options.valid_vocab),
        "logit_scale": np.float64(options.logit_scale),
        "logit_softcap": np.float64(options.logit_softcap),
        "z_loss": np.float64(options.z_loss),
        "label_smoothing": np.float64(options.label_smoothing),
        "total": np.int64(options.vocab),
        "dlogits": options.dlogits,
        "poison": np.bool_(options.poison),
    }


def _call(name: str, options: Options, results: tuple[jax.ShapeDtypeStruct, ...], operands: tuple[jax.Array, ...]):
    return jax.ffi.ffi_call(name, results, vmap_method="sequential")(*operands, **_attributes(options))


def _like(x: jax.Array, dtype: Any) -> jax.ShapeDtypeStruct:
    """The type of `x`, but for its dtype. A type made of the shape alone would say that the result is the same on every device of
    a `shard_map`, and gradients would then be added up over them, without a word."""
    return jax.eval_shape(lambda x: x.astype(dtype), x)


def forward(options: Options, *operands: jax.Array):
    per_token = _like(operands[1], jnp.float32)
    return _call("fused_xent_forward", options, (per_token,) * 3, operands)


def partial(options: Options, *operands: jax.Array):
    per_token = _like(operands[1], jnp.float32)
    return _call("fused_xent_partial", options, (per_token,) * 4, operands)


def backward(options: Options, *operands: jax.Array):
    hidden, _, unembedding, *_ = operands
    results = (_like(hidden, options.gradients[0]), _like(unembedding, options.gradients[1]))
    return _call("fused_xent_backward", options, results, operands)
