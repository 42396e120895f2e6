"""What differs between the versions of JAX, 0.5 to 0.10: the types of arrays inside of a `shard_map`."""

from collections.abc import Iterable
from typing import Any

import jax
from jax import lax

HAS_TPU_KERNELS = jax.__version_info__ >= (0, 7)
"""Whether this JAX lowers what the kernels for TPUs are made with, inside of a `shard_map` too."""


def type_of(x: jax.Array) -> Any:
    """What is known of `x` when it is traced."""
    return jax.typeof(x) if hasattr(jax, "typeof") else jax.core.get_aval(x)


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The mesh axes over which the type of `x` says that it varies; none where types do not say."""
    manual = getattr(type_of(x), "manual_axis_type", None)
    return frozenset(getattr(type_of(x), "vma", ()) if manual is None else manual.varying)


def as_varying(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    """`x`, typed as varying over `axes` too, if types say such things here. The transpose sums over those that this adds."""
    added = tuple(sorted(set(axes) - varying_axes(x)))
    if not (added and types_vary(added)):
        return x
    return lax.pcast(x, added, to="varying") if hasattr(lax, "pcast") else lax.pvary(x, added)


def types_vary(axes: tuple[str, ...]) -> bool:
    """Whether types say over which axes an array varies: inside of a `shard_map` with `check_vma`."""
    return bool(varying_axes(lax.axis_index(axes)))


def is_explicitly_sharded(x: jax.Array) -> bool:
    """Whether the type of `x` says how it is sharded, over mesh axes of the type `Explicit`."""
    return any(getattr(getattr(type_of(x), "sharding", None), "spec", None) or ())


def in_shard_map() -> bool:
    """Whether each device runs a program of its own here, which it alone could fail."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(kind.name == "Manual" for kind in getattr(mesh, "axis_types", None) or ())
