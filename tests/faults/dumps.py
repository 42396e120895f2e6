"""Writes steps in the dump format (docs/format.md): .npy files and manifests, nothing else."""

import json

import numpy as np

TOKEN_LIKE = ("hidden", "targets", "token_weights", "loss", "lse", "label_logits", "d_label_logits", "d_lse", "d_hidden",
              "d_hidden_lse", "d_hidden_label")


def bounds(length, parts):
    """Where `parts` contiguous, nearly equal parts of `length` begin and end."""
    edges = np.linspace(0, length, parts + 1).astype(int)
    return [slice(int(a), int(b)) for a, b in zip(edges, edges[1:])]


def pieces(name, value, processes, split):
    """What each process holds of a tensor: (process, array, global shape, start, replica).

    A list is one whole copy per process, as where every process has its own. Otherwise tensors over tokens are split by
    `split` = "tokens", tensors over vocab ids by "vocab"; what is not split is held whole by every process.
    """
    if isinstance(value, list):
        return [(p, array, array.shape, [0] * array.ndim, p) for p, array in enumerate(value)]
    if (split == "tokens") == (name in TOKEN_LIKE) and processes > 1:
        return [(p, value[rows], value.shape, [rows.start] + [0] * (value.ndim - 1), 0)
                for p, rows in enumerate(bounds(len(value), processes))]
    return [(p, value, value.shape, [0] * value.ndim, p) for p in range(processes)]


def write(root, loss, microbatches, shared, processes=1, split="tokens", layout="vd", batch=None, contract=None):
    """Writes one step. `microbatches` and `shared` map names to arrays (or lists, see `pieces`); tensors over vocab ids are
    [V, D] and stored in `layout`; tensors over tokens are [N, …] and stored as [batch, N / batch, …] if `batch` is given."""
    parts = {f"mb_{m:04d}": tensors for m, tensors in enumerate(microbatches)}
    for part, tensors in {**parts, "shared": shared}.items():
        entries = [[] for _ in range(processes)]
        for name, value in tensors.items():
            token_like = name in TOKEN_LIKE
            for process, array, global_shape, start, replica in pieces(name, value, processes, split):
                if token_like and batch:
                    assert processes == 1, "a batch is written by one process"
                    array = array.reshape(batch, -1, *array.shape[1:])
                    global_shape, start = array.shape, [0] * array.ndim
                entry = {"name": name, "dtype": array.dtype.name}
                if not token_like and layout == "dv":
                    array, global_shape, start = array.T, global_shape[::-1], start[::-1]
                    entry["layout"] = "dv"
                folder = root / f"proc_{process:05d}" / "step_00000000" / part
                folder.mkdir(parents=True, exist_ok=True)
                np.save(folder / f"{name}.0.npy", np.ascontiguousarray(array))
                shard = {"file": f"{name}.0.npy", "start": list(start), "shape": list(array.shape), "replica": replica}
                entries[process].append({**entry, "global_shape": list(global_shape), "shards": [shard]})
        for process in range(processes):
            if part != "shared":
                entries[process].append({"name": "unembedding", "from": "shared"})
            manifest = {
                "format": "xent-dump", "version": 1, "run_id": "numpy", "producer": f"numpy {np.__version__}",
                "step": 0, "microbatch": None if part == "shared" else int(part[3:]), "num_microbatches": len(microbatches),
                "process_index": process, "process_count": processes, "loss": loss, "tensors": entries[process],
            }
            if contract:
                manifest["contract"] = contract
            folder = root / f"proc_{process:05d}" / "step_00000000" / part
            (folder / "manifest.json").write_text(json.dumps(manifest) + "\n")
