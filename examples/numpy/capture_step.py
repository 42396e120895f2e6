"""Captures one step of a loss written in numpy: python capture_step.py /tmp/numpy-step; xent-diff /tmp/numpy-step

With PyTorch it is the same: hand over tensors in place of arrays.
"""

import sys

import ml_dtypes
import numpy as np
from fused_xent import Writer

N, D, V, M = 96, 32, 200, 2


def loss_and_grad(hidden, targets, unembedding):
    """Per-token loss and lse, dQ and dK of the mean over the tokens that are not masked, all float32."""
    q, k, valid = hidden.astype(np.float32), unembedding.astype(np.float32), targets >= 0
    logits = q @ k.T
    top = logits.max(axis=1, keepdims=True)
    p = np.exp(logits - top)
    lse = np.where(valid, top[:, 0] + np.log(p.sum(axis=1)), 0)
    label = np.where(valid, logits[np.arange(N), np.maximum(targets, 0)], 0)
    d_logits = p / p.sum(axis=1, keepdims=True)
    d_logits[np.arange(N), np.maximum(targets, 0)] -= 1
    d_logits *= (valid / valid.sum())[:, None].astype(np.float32)
    return (lse - label).astype(np.float32), lse.astype(np.float32), d_logits @ k, d_logits.T @ q


def main() -> None:
    random = np.random.default_rng(0)
    unembedding = (random.standard_normal((V, D)) / 4).astype(ml_dtypes.bfloat16)
    total = np.zeros((V, D), np.float32)
    with Writer(sys.argv[1], loss={"microbatches": "mean"}, num_microbatches=M, verify=True) as writer:
        for m in range(M):
            hidden = random.standard_normal((N, D)).astype(ml_dtypes.bfloat16)
            targets = random.integers(0, V, N).astype(np.int32)
            targets[::7] = -100
            loss, lse, d_hidden, d_unembedding = loss_and_grad(hidden, targets, unembedding)
            arrays = {"hidden": hidden, "targets": targets, "loss": loss, "lse": lse, "d_hidden": d_hidden}
            for name, array in {**arrays, "d_unembedding": d_unembedding}.items():
                writer.tensor(0, m, name, array)
            writer.commit(0, m)
            total += d_unembedding / M
        writer.tensor(0, None, "unembedding", unembedding)
        writer.tensor(0, None, "d_unembedding", total)
        writer.commit(0, None)


if __name__ == "__main__":
    main()
