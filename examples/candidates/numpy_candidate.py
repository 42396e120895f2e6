"""Gradients by numpy, for xent-diff to judge: `xent-diff DUMPS --candidate 'cmd:python3 examples/candidates/numpy_candidate.py'`.

xent-diff adds two arguments: a dump of one process, each tensor in one file, with the inputs alone; and where to write another
with the gradients. This one serves the plain mean loss of a [V, D] unembedding: put a kernel of your own where it says so.
"""

import json
import sys
from pathlib import Path

import numpy as np


def load(path):
    array = np.load(path)
    bits = array.view(np.uint16) if array.dtype.kind == "V" else None  # bfloat16
    return array if bits is None else (bits.astype(np.uint32) << 16).view(np.float32)


def kernel(q, k, targets):
    """dQ and dK of the mean over the targets that are not negative."""
    z = q @ k.T
    valid = targets >= 0
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    p[np.arange(len(p)), np.where(valid, targets, 0)] -= 1
    p *= valid[:, None] / np.float32(max(valid.sum(), 1))
    return p @ k, p.T @ q


source, out = map(Path, sys.argv[1:])
for manifest in sorted(source.glob("proc_*/step_*/mb_*/manifest.json")):
    folder, to = manifest.parent, out / manifest.parent.relative_to(source)
    gradients = kernel(
        load(folder / "hidden.0.npy"),
        load(folder.parent / "shared" / "unembedding.0.npy"),
        np.load(folder / "targets.0.npy"),
    )
    to.mkdir(parents=True)
    tensors = []
    for name, array in zip(("d_hidden", "d_unembedding"), gradients):
        np.save(to / f"{name}.0.npy", array)
        shard = {"file": f"{name}.0.npy", "start": [0, 0], "shape": array.shape, "replica": 0}
        tensors.append({"name": name, "dtype": array.dtype.name, "global_shape": array.shape, "shards": [shard]})
    (to / "manifest.json").write_text(json.dumps(json.loads(manifest.read_text()) | {"tensors": tensors}))
