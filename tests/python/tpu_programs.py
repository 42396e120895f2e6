"""Programs with the loss, compiled for TPUs that are not here: `tpu_programs.py TOPOLOGY…` prints what is in each, as JSON.

A process of its own, since libtpu can be loaded only once and says a good deal.
"""

import base64
import contextlib
import hashlib
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from fused_xent.jax import Tpu, fused_cross_entropy

N, D, V = 2048, 256, 16420
"""Tokens of a device; neither they nor V are a multiple of what tiles may be."""
DEVICES, MICROBATCHES = 4, 3
TILES = Tpu(forward=(256, 256), backward=(256, 256, N))
"""Smaller than they would be: the compiler takes long for products of float32."""
EVERY_OPTION = {"logit_scale": 0.7, "logit_softcap": 20.0, "z_loss": 1e-2, "label_smoothing": 0.1, "valid_vocab": V - 100}


def on_one(hidden, targets, unembedding, weights):
    return fused_cross_entropy(hidden, targets, unembedding, weights, implementation="rust").reduced


def in_float32(hidden, targets, unembedding, weights):
    out = fused_cross_entropy(hidden, targets, unembedding, weights, layout="dv", tpu=TILES, **EVERY_OPTION)
    return out.reduced + jnp.sum(out.lse) + jnp.sum(out.label_logits)


def gathered(mesh):
    """The tokens over the devices, and the rows of a float32 unembedding (FSDP)."""

    def local(hidden, targets, shard, weights):
        unembedding = lax.all_gather(shard, "data", tiled=True)
        out = fused_cross_entropy(
            hidden, targets, unembedding, weights, token_axes="data", operands="bfloat16", implementation="rust"
        )
        return out.reduced

    return jax.shard_map(local, mesh=mesh, in_specs=(P("data"),) * 4, out_specs=P())


def microbatches(mesh):
    """The same in a scan, and made again in the backward."""

    @jax.checkpoint
    def loss(hidden, targets, unembedding, weights):
        out = fused_cross_entropy(
            hidden, targets, unembedding, weights, token_axes="data", denominator=7.0, operands="bfloat16", implementation="rust"
        )
        return out.reduced

    def local(hidden, targets, shard, weights):
        unembedding = lax.all_gather(shard, "data", tiled=True)
        parts = [x.reshape(MICROBATCHES, N, *x.shape[1:]) for x in (hidden, targets, weights)]
        add = lambda total, part: (total + loss(*part[:2], unembedding, part[2]), None)
        return lax.scan(add, jnp.float32(0), parts)[0]

    return jax.shard_map(local, mesh=mesh, in_specs=(P("data"),) * 4, out_specs=P())


def bodies(hlo):
    """Digests of the kernels' bodies, by the names that XLA has for them."""
    found = {}
    for line in (line.strip() for line in hlo.splitlines() if 'custom_call_target="tpu_custom_call"' in line):
        name = re.match(r"(?:ROOT )?%?([a-z_]+)", line)[1]
        body = re.search(r'"body": ?"([^"]+)"', line)[1]
        found.setdefault(name, []).append(hashlib.sha256(base64.b64decode(body)).hexdigest())
    return found


def facts(program, mesh, n, dtypes, of_tokens, of_unembedding, layout="vd"):
    like = lambda shape, dtype, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    arrays = (
        like((n, D), dtypes[0], of_tokens),
        like((n,), jnp.int32, of_tokens),
        like((V, D) if layout == "vd" else (D, V), dtypes[1], of_unembedding),
        like((n,), jnp.float32, of_tokens),
    )
    compiled = jax.jit(jax.value_and_grad(program, (0, 2))).trace(*arrays).lower().compile()
    hlo = compiled.as_text()
    return {
        "kernels": bodies(hlo),
        "workspace": compiled.memory_analysis().temp_size_in_bytes,
        "collectives": [name for name in ("all-gather", "all-reduce", "reduce-scatter") if f" {name}" in hlo],
    }


def all_of(topology):
    devices = np.array(topologies.get_topology_desc(topology, "tpu").devices).reshape(-1)[:DEVICES]
    one, four = Mesh(devices[:1], "data"), Mesh(devices, "data")
    bf16, f32 = jnp.bfloat16, jnp.float32
    found = {"on_one": facts(on_one, one, N, (bf16, bf16), P(), P())}
    found["gathered"] = facts(gathered(four), four, DEVICES * N, (bf16, f32), P("data"), P("data"))
    if topology.startswith("v6e"):
        n = DEVICES * MICROBATCHES * N
        found["microbatches"] = facts(microbatches(four), four, n, (bf16, f32), P("data"), P("data"))
        found["in_float32"] = facts(in_float32, one, N, (f32, f32), P(), P(), "dv")
    return found


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        found = {topology: all_of(topology) for topology in sys.argv[1:]}
    json.dump(found, sys.stdout)
