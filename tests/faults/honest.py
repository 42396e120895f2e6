"""Honest kernels in more styles, and steps of every kind by chance."""

import numpy as np

import inputs
import parallel
from kernel import BF16, F32, Kernel, Trainer, bf16


class Apart(Kernel):
    label_apart = True


class Joint16(Kernel):
    narrow = staticmethod(bf16)


class Apart16(Apart):
    narrow = staticmethod(bf16)


class Probabilities16(Apart):
    """P in bfloat16 against K and g·Q in float32, the label apart: rounds what bf16 dlogits round, without g."""

    def backward(self, q, targets, g, lse):
        dq, dk = np.zeros_like(q), np.zeros_like(self.k)
        for ids in self.backward_vocab_tiles():
            p = bf16(self.dlogits(q, targets, np.ones_like(g), lse, ids))
            dq += g[:, None] * (p @ self.k[ids])
            dk[ids] += p.T @ (g[:, None] * q)
        here, rows, factor = self.label_factor(q, targets, g)
        dq[here] += factor[:, None] * self.k[rows]
        return dq, self.scatter(dk, rows, factor[:, None] * q[here])


class RoundedCotangent(Trainer):
    def cotangents(self, m):
        return bf16(super().cotangents(m))


def options(rng):
    """A kernel with float32 dlogits, and a step: as the keywords of `cases.Case`."""
    pick = lambda *choices: choices[rng.integers(len(choices))]
    vocab = pick(1, 3, 17, 100, 300)
    loss = {
        "reduction": pick("mean", "sum"), "denominator": pick("valid", "tokens", 77.0),
        "microbatches": pick("mean", "sum", "global"), "cotangent": pick(1.0, 1e-6, 8.0, 0.3),
        "microbatch_gradients": pick("own", "step"), "valid_vocab": pick(None, int(rng.integers(1, vocab + 1))),
        "logit_scale": pick(1.0, 0.3), "logit_softcap": pick(None, 10.0), "z_loss": pick(0.0, 1e-3),
        "label_smoothing": pick(0.0, 0.1),
    }
    style = pick(Kernel, Apart)
    tiling = {"token_tile": pick(3, 16, 48), "vocab_tile": pick(5, 64, 128), "token_major": pick(True, False)}
    trainer = pick(Trainer, parallel.VocabParallel, parallel.DataParallel)
    tokens = tuple(pick(1, 2, 7, 33, 100) for _ in range(rng.integers(1, 4)))
    # Every process of a parallel run has something to do.
    if trainer is parallel.VocabParallel and vocab == 1 or trainer is parallel.DataParallel and min(tokens) == 1:
        trainer = Trainer
    regime = pick(*inputs.REGIMES)
    # The common offset takes the first feature: with no other, all tokens were alike.
    hidden = pick(5, 32, 64) if regime == "offset" else pick(1, 5, 32, 64)
    return dict(
        kernel=type("", (style,), tiling), trainers=(trainer,), regime=regime, tokens=tokens, hidden=hidden,
        vocab=vocab, masked=pick(0, 0.1, 0.9), weights=pick(True, False), loss=loss,
        record=pick(("d_hidden", "d_unembedding"), ("loss", "lse", "label_logits", "d_hidden", "d_unembedding")),
        accumulated=pick(True, False), output=pick(F32, BF16), layout=pick("vd", "dv"),
    )
