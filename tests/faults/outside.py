"""Faults outside the catalogue: nothing may be named for them."""

import ml_dtypes
import numpy as np

from kernel import F32, Kernel, Trainer, bf16, tiles


class RowsPermutedInTile(Kernel):
    """Rows of dK come out of each tile of 16 in a swizzled order."""

    def backward(self, *arguments):
        dq, dk = super().backward(*arguments)
        swizzle = np.arange(16) ^ 5
        for ids in tiles(len(dk) // 16 * 16, 16):
            dk[ids] = dk[ids][swizzle]
        return dq, dk


class BlockTransposed(Kernel):
    """One square block of dK is stored with its axes exchanged."""

    def backward(self, *arguments):
        dq, dk = super().backward(*arguments)
        d = dk.shape[1]
        dk[d : 2 * d] = dk[d : 2 * d].T.copy()
        return dq, dk


class DropoutInBackward(Kernel):
    """dK is formed with hidden states that went through a dropout of 0.1."""

    def dk_product(self, d, q):
        keep = np.random.default_rng(len(q)).random(q.shape) >= 0.1
        return d.T @ (q * keep / F32(0.9))


class FeatureColumnZeroed(Kernel):
    """The last feature lies beyond what the loop over features covers."""

    def dq_product(self, d, ids):
        out = super().dq_product(d, ids)
        out[:, -1] = 0
        return out


class StaleWeights(Trainer):
    """The backward reads K as it was before the last update."""

    def __init__(self, kernel, k, loss, microbatches):
        super().__init__(kernel, k, loss, microbatches)
        update = np.random.default_rng(1).standard_normal(k.shape) * 0.05 * np.abs(k).mean()
        self.backward_kernel = kernel(bf16(k - update), loss)


class TailTileShifted(Kernel):
    """The ragged last tile of tokens is moved back to be a whole one: its first rows are written once more in dQ, and added
    once more in dK."""

    def backward(self, q, targets, g, lse):
        dq, dk = super().backward(q, targets, g, lse)
        n = len(q)
        twice = slice(n - self.token_tile, n // self.token_tile * self.token_tile)
        for ids in self.backward_vocab_tiles():
            d = self.dlogits(q[twice], targets[twice], g[twice], lse[twice], ids)
            dk[ids] += self.dk_product(d, q[twice])
        return dq, dk


class RowsShifted(Kernel):
    """dQ is written one row too far."""

    def backward(self, *arguments):
        dq, dk = super().backward(*arguments)
        return np.roll(dq, 1, axis=0), dk


class ProbabilitiesInFp8(Kernel):
    """dlogits over their largest value go through float8 (e4m3)."""

    @staticmethod
    def narrow(d):
        top = np.abs(d).max() or F32(1)
        return (d / top * F32(448)).astype(ml_dtypes.float8_e4m3fn).astype(F32) * top / F32(448)


class HiddenOfAnotherMicrobatch(Trainer):
    """dK of every microbatch is formed with the hidden states of the first, whose buffer was never swapped."""

    def gradients(self, m, g, lse):
        dq, _ = super().gradients(m, g, lse)
        d = np.concatenate([self.backward_kernel.dlogits(m["hidden"], m["targets"], g, lse, ids)
                            for ids in self.backward_kernel.backward_vocab_tiles()], axis=1)
        return dq, d.T @ self.microbatches[0]["hidden"]


class Clipped(Kernel):
    """Elements of dK are clipped to a quarter of the largest."""

    def backward(self, *arguments):
        dq, dk = super().backward(*arguments)
        limit = np.abs(dk).max() / 4
        return dq, np.clip(dk, -limit, limit)


class TileSignFlipped(Kernel):
    """The contribution of one tile of tokens and ids has the wrong sign."""

    def dk_product(self, d, q):
        part = super().dk_product(d, q)
        self.done = getattr(self, "done", 0) + 1
        return -part if self.done == 2 else part
