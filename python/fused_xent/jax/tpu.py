"""The kernels for TPUs: programs that Rust writes, put into those that JAX lowers. Each function is as its namesake in `chunked`.

What cannot be had as a kernel (a dtype, a shard of the vocabulary, a chip) is only known for certain when a program is lowered for
its devices. There the kernels are taken, or `chunked` in their place.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from .._native import TpuProgram, TpuSpec, tpu_generation, tpu_generations
from . import chunked
from .choice import notice
from .options import Options

PER_TOKEN = (1, "float32")
"""Like targets, in float32."""


def forward(options: Options, *operands: jax.Array):
    return tuple(_pass.bind(*operands, options=options, name="forward", results=(PER_TOKEN,) * 3))


def partial(options: Options, *operands: jax.Array):
    return tuple(_pass.bind(*operands, options=options, name="partial", results=(PER_TOKEN,) * 4))


def backward(options: Options, *operands: jax.Array):
    results = ((0, options.gradients[0]), (2, options.gradients[1]))
    return tuple(_pass.bind(*operands, options=options, name="backward", results=results))


def program(options: Options, name: str, generation: str | None, hidden: Any, unembedding: Any) -> TpuProgram:
    """That of a pass, for arrays of these shapes and dtypes.

    Raises:
        ValueError: why there is none.
    """
    if options.vocab_axes:
        raise ValueError("TPU kernels take a whole vocabulary, not a shard of it; gather the unembedding")
    if generation is None:
        expected = ", ".join(tpu_generations())
        raise ValueError(f"the generation of the TPU is not known here; say tpu=, one of {expected}")
    vocab, d = unembedding.shape if options.layout == "vd" else unembedding.shape[::-1]
    spec = TpuSpec(
        generation,
        (math.prod(hidden.shape[:-1]), d, vocab),
        (hidden.dtype.name, unembedding.dtype.name),
        layout=options.layout,
        valid_vocab=options.valid_vocab,
        logit_scale=options.logit_scale,
        logit_softcap=options.logit_softcap or None,
        z_loss=options.z_loss,
        label_smoothing=options.label_smoothing,
    )
    if name == "forward":
        return spec.forward(options.tpu.forward)
    return spec.backward(options.gradients, options.dlogits, options.tpu.backward)


def _run(made: TpuProgram, options: Options, name: str, hidden, targets, unembedding, token_weights, start, *per_token):
    """The pass, by a program for whole arrays of tokens: [N, D], [N]."""
    masked, bad, labels = chunked.labels_of(options, targets, token_weights)
    flat = [hidden.reshape(-1, hidden.shape[-1]), unembedding, jnp.where(masked, -1, labels).reshape(-1)]
    flat += [x.reshape(-1) for x in per_token]
    run = functools.partial(_kernels[name].bind, *flat, text=made.text)
    if name == "backward":
        # The lse of bad tokens is NaN, and so is what their gradients enter.
        d_hidden, d_unembedding = run(results=((0, options.gradients[0]), (1, options.gradients[1])))
        return d_hidden.reshape(hidden.shape), d_unembedding
    return tuple(jnp.where(bad, jnp.nan, x.reshape(targets.shape)) for x in run(results=((2, "float32"),) * 3))


def _generation(context: mlir.LoweringRuleContext) -> str | None:
    """Of the devices for which a program is lowered, which need not be there; `None` where they are not known."""
    try:
        kind = context.module_context.get_backend().devices()[0].device_kind
    except (RuntimeError, ValueError):
        return None
    generation = tpu_generation(kind)
    if generation is None:
        expected = ", ".join(tpu_generations())
        raise ValueError(f"there are no kernels for the TPUs of kind {kind!r}, only for {expected}")
    return generation


def _lower(context: mlir.LoweringRuleContext, *operands: Any, options: Options, name: str, results: Any) -> Sequence[Any]:
    hidden, _, unembedding, *_ = context.avals_in
    body = functools.partial(getattr(chunked, name), options)
    if hidden.size:
        try:
            generation = options.tpu.generation or _generation(context)
            body = functools.partial(_run, program(options, name, generation, hidden, unembedding), options, name)
        except ValueError as refusal:
            if options.implementation == "rust" or options.tpu.forward or options.tpu.backward:
                raise
            notice(f"{refusal}; it runs in JAX instead")
    return mlir.lower_fun(body)(context, *operands)


def _lower_elsewhere(context: mlir.LoweringRuleContext, *operands: Any, options: Options, name: str, results: Any) -> Sequence[Any]:
    """For the branches that are never taken, where one program is lowered for several platforms."""
    return mlir.lower_fun(functools.partial(getattr(chunked, name), options))(context, *operands)


def _lower_kernels(context: mlir.LoweringRuleContext, *operands: Any, text: str, results: Any) -> Sequence[Any]:
    """Adds the program's function to the module, and a call of it."""
    program = mlir.ir.Module.parse(text)
    (main,) = program.body.operations
    types = main.type.results
    module = context.module_context
    name = mlir.merge_mlir_modules(module.module, "fused_xent_kernels", program, dst_symtab=module.symbol_table)
    callee = {"callee": mlir.ir.FlatSymbolRefAttr.get(name)}
    return mlir.ir.Operation.create("func.call", results=types, operands=operands, attributes=callee).results


def _types(*operands: Any, results: tuple[tuple[int, str], ...], **_: Any) -> list[Any]:
    """Each is that of an operand, but for its dtype: it says over which mesh axes the result varies too."""
    return [operands[i].update(dtype=np.dtype(dtype), weak_type=False) for i, dtype in results]


def _batched(operands: Sequence[jax.Array], dims: Sequence[Any], **parameters: Any):
    """One example after the other."""
    mapped = [dim is not None for dim in dims]
    moved = [jnp.moveaxis(x, dim, 0) for x, dim, is_mapped in zip(operands, dims, mapped) if is_mapped]

    def one(own: list[jax.Array]):
        own = iter(own)
        return _pass.bind(*(next(own) if is_mapped else x for x, is_mapped in zip(operands, mapped)), **parameters)

    results = lax.map(one, moved)
    return results, [0] * len(results)


def _compiled(*operands: jax.Array, **parameters: Any):
    """Outside of any jit."""
    with jax.disable_jit(False):
        return jax.jit(functools.partial(_pass.bind, **parameters))(*operands)


def _primitive(name: str) -> Primitive:
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(_types)
    return primitive


_pass = _primitive("fused_xent_on_tpu")
_pass.def_impl(_compiled)
batching.primitive_batchers[_pass] = _batched
mlir.register_lowering(_pass, _lower_elsewhere)
mlir.register_lowering(_pass, _lower, platform="tpu")

_kernels = {name: _primitive(f"fused_xent_{name}") for name in ("forward", "backward")}
"""XLA calls kernels by these names."""
for _of_pass in _kernels.values():
    mlir.register_lowering(_of_pass, _lower_kernels)
