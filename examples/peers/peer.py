"""Gradients by one peer, as a candidate of xent-diff's: `xent-diff DUMPS --candidate 'cmd:python peer.py NAME'`.

With `--export NAME DUMP FILE`, writes the peer's StableHLO instead, for `--candidate stablehlo:FILE`, where the peer is JAX's.
"""

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

CHUNK = 256  # tokens at a time, where a peer works in chunks


def torch_autograd(loss_of):
    """A peer from a mean loss of bfloat16 Q [N, D], K [V, D] and int64 targets [N], −100 where masked."""

    def gradients(q, k, targets):
        import torch

        q, k = (torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).requires_grad_() for x in (q, k))
        dq, dk = torch.autograd.grad(loss_of(q, k, torch.from_numpy(targets).long()), (q, k))
        return (x.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16) for x in (dq, dk))

    return gradients


def torch_bf16(q, k, y):
    from torch.nn.functional import cross_entropy, linear

    return cross_entropy(linear(q, k), y)


def torch_f32(q, k, y):
    from torch.nn.functional import cross_entropy, linear

    return cross_entropy(linear(q, k).float(), y)


def torch_linear_ce(q, k, y):
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    return linear_cross_entropy(q, k, y, options=LinearCrossEntropyOptions(batch_chunk_size=CHUNK))


def cce(q, k, y):
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(q, k, y, impl="torch_compile")


def liger(q, k, targets):
    """Liger's algorithm, not its Triton: gradients in the forward, a chunk of tokens at a time, dK summed in K's own dtype."""
    import torch

    q, k = (torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) for x in (q, k))
    y = torch.from_numpy(targets).long()
    valid = y != -100
    dq, dk = torch.empty_like(q), torch.zeros_like(k)
    for start in range(0, len(q), CHUNK):
        rows = slice(start, start + CHUNK)
        logits = q[rows] @ k.T
        p = logits.float().softmax(1)
        p.scatter_add_(1, y[rows, None].clamp(min=0), torch.full((len(p), 1), -1.0))
        dlogits = (p * valid[rows, None] / valid.sum()).to(logits.dtype)
        dq[rows] = dlogits @ k
        dk += dlogits.T @ q[rows]
    return (x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) for x in (dq, dk))


def jax_autograd(loss_of):
    """As for torch; under jit."""

    def gradients(q, k, targets):
        import jax

        return map(np.asarray, jax.jit(jax.grad(loss_of, (0, 1)))(q, k, targets))

    gradients.loss_of = loss_of
    return gradients


def masked_mean(losses, y):
    import jax.numpy as jnp

    valid = y != -100
    return jnp.where(valid, losses, 0).sum() / jnp.maximum(valid.sum(), 1)


def jax_plain(hidden, unembedding, targets):
    import jax
    import jax.numpy as jnp

    z = jnp.einsum("nd,vd->nv", hidden, unembedding, preferred_element_type=jnp.float32)
    label = jnp.take_along_axis(z, jnp.maximum(targets, 0)[:, None], axis=1)[:, 0]
    return masked_mean(jax.nn.logsumexp(z, axis=1) - label, targets)


def optax_bf16(hidden, unembedding, targets):
    import jax.numpy as jnp
    import optax

    z = (hidden @ unembedding.T).astype(jnp.float32)
    return masked_mean(optax.softmax_cross_entropy_with_integer_labels(z, jnp.maximum(targets, 0)), targets)


def tokamax_xla(q, k, targets):
    """It has no masks, so it is given the tokens that take part."""
    import jax
    import tokamax

    rows = np.flatnonzero(targets != -100)
    loss_of = lambda q, k: tokamax.linear_softmax_cross_entropy_loss(
        q, targets[rows], k.T, reduction="mean", implementation="xla"
    )
    dq_of_rows, dk = map(np.asarray, jax.jit(jax.grad(loss_of, (0, 1)))(q[rows], k))
    dq = np.zeros(q.shape, dq_of_rows.dtype)
    dq[rows] = dq_of_rows
    return dq, dk


PEERS = {
    "jax": jax_autograd(jax_plain),
    "optax": jax_autograd(optax_bf16),
    "tokamax-xla": tokamax_xla,
    "torch-bf16": torch_autograd(torch_bf16),
    "torch-f32": torch_autograd(torch_f32),
    "torch-linear-ce": torch_autograd(torch_linear_ce),
    "cce": torch_autograd(cce),
    "liger": liger,
}


def load(path):
    array = np.load(path)
    return array.view(ml_dtypes.bfloat16) if array.dtype.kind == "V" else array


def microbatches(dump):
    """Each microbatch's manifest, Q [N, D], K and targets [N]."""
    for manifest in sorted(dump.glob("proc_*/step_*/mb_*/manifest.json")):
        folder = manifest.parent
        hidden = load(folder / "hidden.0.npy")
        unembedding = load(folder.parent / "shared" / "unembedding.0.npy")
        targets = np.load(folder / "targets.0.npy")
        yield manifest, hidden.reshape(-1, hidden.shape[-1]), unembedding, targets.reshape(-1)


def judge(name, dump, out):
    for manifest, q, k, targets in microbatches(dump):
        to = out / manifest.parent.relative_to(dump)
        to.mkdir(parents=True)
        tensors = []
        for tensor, array in zip(("d_hidden", "d_unembedding"), PEERS[name](q, k, targets)):
            np.save(to / f"{tensor}.0.npy", array)
            shard = {"file": f"{tensor}.0.npy", "start": [0, 0], "shape": array.shape, "replica": 0}
            tensors.append({"name": tensor, "dtype": array.dtype.name, "global_shape": array.shape, "shards": [shard]})
        (to / "manifest.json").write_text(json.dumps(json.loads(manifest.read_text()) | {"tensors": tensors}))


def export(name, dump, file):
    import jax

    _, q, k, targets = next(microbatches(dump))
    lowered = jax.jit(jax.value_and_grad(PEERS[name].loss_of, (0, 1))).lower(q, k, targets)
    file.write_text(lowered.as_text(debug_info=True))


if __name__ == "__main__":
    *flags, name, first, second = sys.argv[1:]
    (export if flags == ["--export"] else judge)(name, Path(first), Path(second))
