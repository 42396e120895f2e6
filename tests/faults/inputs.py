"""Inputs of a step, drawn by numpy in several regimes of logits."""

import numpy as np

from kernel import F32, bf16

REGIMES = {
    # Standard deviation of the logits, pull of a token towards its label's row (a range), common offset of all logits.
    "initial": (0.1, (0, 0), 0),
    "unit": (1, (0, 0), 0),
    "trained": (1, (0, 12), 0),
    "large": (12, (0, 12), 0),
    "offset": (1, (0, 4), 40),
    "huge": (300, (0, 0), 0),
}


def draw(rng, tokens, hidden, vocab, regime, masked=0.1, weights=False, ignore_index=-100, valid_vocab=None):
    """K and the microbatches' hidden states, targets and weights: bfloat16 values in float32, one microbatch per entry of
    `tokens`. Labels follow Zipf's law, so that some rows of dK are hit often and most never."""
    spread, pull, offset = REGIMES[regime]
    k = rng.standard_normal((vocab, hidden)) / np.sqrt(hidden)
    if offset:
        k[:, 0] = 8
    k = bf16(k)
    valid = valid_vocab or vocab
    chances = 1 / np.arange(1, valid + 1)
    ids = rng.permutation(valid)
    microbatches = []
    for n in tokens:
        targets = rng.choice(ids, n, p=chances / chances.sum()).astype(np.int32)
        q = rng.standard_normal((n, hidden)) * spread
        rows = k[targets].astype(np.float64)
        q += rng.uniform(*pull, n)[:, None] * rows / (rows**2).sum(1, keepdims=True)
        if offset:
            q[:, 0] = offset / 8
        m = {"hidden": bf16(q), "targets": targets}
        if masked:
            # The middle token is always one of them.
            mask = rng.random(n) < masked
            mask[n // 2] = True
            targets[mask] = ignore_index
        if weights:
            m["token_weights"] = rng.uniform(0.3, 2, n).astype(F32)
        microbatches.append(m)
    return k, microbatches
