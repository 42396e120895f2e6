"""Which implementation runs, and what it promises."""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import _native
from .options import default_dlogits
from .versions import HAS_TPU_KERNELS

_WITH_KERNELS = ("cpu", "tpu") if HAS_TPU_KERNELS else ("cpu",)
_warned: set[str] = set()


class FallbackWarning(UserWarning):
    """There is no Rust kernel for a platform, or for a loss on it: it runs in JAX."""


class Implementation(NamedTuple):
    """What runs `fused_cross_entropy`."""

    name: str
    """`"rust"` or `"jax"`."""
    detail: str
    """Which kernel, and how it runs, or why not."""


def implementation(platform: str | None = None) -> Implementation:
    """What runs `fused_cross_entropy` on a platform; `None`: JAX's default one. The choice is made when a program is lowered.

    Args:
        platform: `"cpu"`, `"gpu"`, `"tpu"`, …
    """
    platform = platform or jax.default_backend()
    if platform not in _WITH_KERNELS:
        where = " and ".join(_WITH_KERNELS)
        return Implementation("jax", f"tiles of the vocabulary in JAX; the Rust kernel runs on {where}, not on {platform}")
    if platform == "tpu":
        return Implementation("rust", f"Mosaic kernels for TPUs: {', '.join(_native.tpu_generations())}")
    return Implementation("rust", f"kernel {_native.kernel_name()}, {_native.threads()} threads")


def set_threads(threads: int) -> None:
    """Has the Rust kernel compute on so many threads from now on; results do not depend on it.

    Args:
        threads: 0 is what holds without a call: the environment variable `RAYON_NUM_THREADS`, or else one for each core.
    """
    if not 0 <= threads <= 4096:
        raise ValueError(f"threads is {threads}; expected 0 (one for each core) to 4096")
    _native.set_threads(threads)


def warn_of_fallback() -> None:
    """Says so, once, if programs for the default platform will run in JAX."""
    platform = jax.default_backend()
    if platform not in _WITH_KERNELS:
        notice(implementation(platform).detail)


def notice(message: str) -> None:
    """Says, once, what runs in JAX."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(f"fused_cross_entropy: {message}", FallbackWarning, stacklevel=4)


def contract(
    hidden: Any, unembedding: Any, *, operands: Any = None, dlogits: str | None = None, implementation: str | None = None
) -> dict[str, str]:
    """What `fused_cross_entropy` rounds, as the `contract` member of a dump's manifest: for `Capture(contract=…)`.

    Args:
        hidden, unembedding: the arrays, or their dtypes.
        operands, dlogits, implementation: as `fused_cross_entropy` is called with.
    """
    given = tuple(jnp.dtype(getattr(x, "dtype", x)).name for x in (hidden, unembedding))
    inputs = given if operands is None else (jnp.dtype(operands).name,) * 2
    dlogits = dlogits or default_dlogits(given)
    platform = jax.default_backend()
    runs = implementation or ("rust" if platform in _WITH_KERNELS else "jax")
    if runs == "rust" and platform != "tpu":
        precision = _native.kernel_contract(inputs, given, dlogits)
    else:
        precision = dlogits if inputs == ("bfloat16", "bfloat16") else "f32"
    short = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
    return {
        "logits": "f32",
        "dlogits": precision,
        "accumulate": "f32",
        "d_hidden": short[given[0]],
        "d_unembedding": short[given[1]],
    }
