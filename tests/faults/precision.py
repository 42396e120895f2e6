"""Faults of precision."""

import numpy as np

from honest import Apart
from kernel import BF16, F32, Kernel, Trainer, bf16


class LabelLogitBf16(Kernel):
    """The label logit as a sum of bfloat16 products in bfloat16, beside the tiles."""

    def forward(self, q, targets):
        lse, _, mean = super().forward(q, targets)
        products = q.astype(BF16) * self.k[np.clip(targets, 0, None)].astype(BF16)
        label = np.zeros(len(q), BF16)
        for d in range(q.shape[1]):
            label = label + products[:, d]
        return lse, label.astype(F32), mean


class LabelLogitProductsBf16(Kernel):
    """The label logit as a float32 sum of bfloat16 products, rounded."""

    def forward(self, q, targets):
        lse, _, mean = super().forward(q, targets)
        return lse, bf16(bf16(q * self.k[np.clip(targets, 0, None)]).sum(1)), mean


class LabelLogitOnceBf16(Kernel):
    """The label logit from a product whose sums are float32 and whose result is bfloat16."""

    def forward(self, q, targets):
        lse, label, mean = super().forward(q, targets)
        return lse, bf16(label), mean


class LabelLogitRunningSumBf16(Kernel):
    """The label logit by fused multiply-add: exact products, a running sum in bfloat16."""

    def forward(self, q, targets):
        lse, _, mean = super().forward(q, targets)
        products = q * self.k[np.clip(targets, 0, None)]
        label = np.zeros(len(q), F32)
        for d in range(q.shape[1]):
            label = bf16(label + products[:, d])
        return lse, label, mean


class LossSubtractBf16(Kernel):
    def losses(self, lse, label, mean):
        return (lse.astype(BF16) - label.astype(BF16)).astype(F32)


class LseBf16(Kernel):
    def kept(self, lse):
        return bf16(lse)


class LseBf16Recorded(Kernel):
    """The forward hands out lse in bfloat16, after the loss was formed from the exact one."""

    def forward(self, q, targets):
        lse, label, mean = super().forward(q, targets)
        self.exact_lse = lse
        return bf16(lse), label, mean

    def losses(self, lse, label, mean):
        return super().losses(self.exact_lse, label, mean)


class LseBf16Everywhere(Kernel):
    """lse is rounded as soon as it is there: the loss is formed from it, too."""

    def forward(self, q, targets):
        lse, label, mean = super().forward(q, targets)
        return bf16(lse), label, mean


class ScatterBf16(Apart):
    """Hits rounded, summed in bfloat16 by scatter-add onto zeros; then the two parts in float32."""

    def scatter(self, dk, rows, values):
        label = np.zeros(dk.shape, BF16)
        np.add.at(label, rows, values.astype(BF16))
        return dk + label.astype(F32)


class ScatterBf16Onto(Apart):
    """Hits rounded, scatter-added in bfloat16 onto dK's lse part."""

    def scatter(self, dk, rows, values):
        dk = dk.astype(BF16)
        np.add.at(dk, rows, values.astype(BF16))
        return dk.astype(F32)


class ScatterBf16HitsExact(Apart):
    """Float32 hits added to a bfloat16 dK one by one, as an atomic read, add and write does."""

    def scatter(self, dk, rows, values):
        dk = dk.astype(BF16)
        for row, value in zip(rows, values):
            dk[row] = (dk[row].astype(F32) + value).astype(BF16)
        return dk.astype(F32)


class LabelGradRounded(Apart):
    def scatter(self, dk, rows, values):
        np.add.at(dk, rows, bf16(values))
        return dk


class DkPartsRounded(Apart):
    def scatter(self, dk, rows, values):
        label = np.zeros_like(dk)
        np.add.at(label, rows, values)
        return (dk.astype(BF16) + label.astype(BF16)).astype(F32)


class GqBf16(Apart):
    """dK's lse part as Pᵀ · (g·q) with g·q in bfloat16; everything else in float32."""

    def backward(self, q, targets, g, lse):
        dq, dk = np.zeros_like(q), np.zeros_like(self.k)
        gq = bf16(g[:, None] * q)
        ones = np.ones_like(g)
        for ids in self.backward_vocab_tiles():
            for rows in self.backward_token_tiles(len(q)):
                p = self.dlogits(q[rows], targets[rows], ones[rows], lse[rows], ids)
                dq[rows] += (g[rows, None] * p) @ self.k[ids]
                dk[ids] += p.T @ gq[rows]
        here, rows, factor = self.label_factor(q, targets, g)
        dq[here] += factor[:, None] * self.k[rows]
        return dq, self.scatter(dk, rows, factor[:, None] * q[here])


class LogitsBf16Forward(Kernel):
    def forward_logits(self, q, ids):
        return bf16(self.logits(q, ids))


class LogitsBf16Backward(Kernel):
    def backward_logits(self, q, ids):
        return bf16(self.logits(q, ids))


class LogitsBf16Both(LogitsBf16Forward, LogitsBf16Backward):
    pass


def dk_in_chunks(width, parts_rounded):
    """dK accumulated in bfloat16 over chunks of `width` tokens, each chunk's part rounded first or not."""

    class DkChunks(Kernel):
        token_tile = width

        def add_dk(self, dk, part):
            return bf16(dk + (bf16(part) if parts_rounded else part))

    return DkChunks


def dq_in_tiles(width, parts_rounded):
    """dQ accumulated in bfloat16 over tiles of `width` vocab ids."""

    class DqTiles(Kernel):
        vocab_tile = width

        def add_dq(self, dq, part):
            return bf16(dq + (bf16(part) if parts_rounded else part))

    return DqTiles


class DkOverMicrobatches(Trainer):
    """The accumulator of dK over microbatches is bfloat16."""

    def accumulated(self, total, dk):
        return bf16(total + dk)


class DkOverMicrobatchesParts(Trainer):
    def accumulated(self, total, dk):
        return (total.astype(BF16) + dk.astype(BF16)).astype(F32)


class ProbMinusOneBf16(Kernel):
    """P is stored in bfloat16 and the label's 1 taken off in place; g is applied after the products."""

    def backward(self, q, targets, g, lse):
        dq, dk = np.zeros_like(q), np.zeros_like(self.k)
        for ids in self.backward_vocab_tiles():
            for rows in self.backward_token_tiles(len(q)):
                p = np.exp(self.backward_logits(q[rows], ids) - lse[rows, None]).astype(BF16)
                p[self.hits(targets[rows], ids)] -= BF16(1)
                p = p.astype(F32)
                dq[rows] += g[rows, None] * (p @ self.k[ids])
                dk[ids] += (g[rows, None] * p).T @ q[rows]
        return dq, dk


def gradient_filter(eps, tokens, ids):
    """Tiles of the backward whose probabilities are all below eps are skipped (the label's own tile never is)."""

    class Filter(Kernel):
        token_tile = tokens
        vocab_tile = ids

        def dlogits(self, q, targets, g, lse, ids):
            d = super().dlogits(q, targets, g, lse, ids)
            p = np.exp(self.backward_logits(q, ids) - lse[:, None])
            return d if np.abs(p - self.hits(targets, ids)).max() >= eps else np.zeros_like(d)

    return Filter


def exp2_cubic(x):
    """exp by a cubic polynomial for 2^f on [0, 1), to about 1e-4."""
    y = np.maximum(np.asarray(x, F32) * F32(1.4426950408889634), F32(-126))
    whole = np.floor(y)
    f = y - whole
    return np.ldexp(F32(1) + f * (F32(0.695146) + f * (F32(0.227644) + f * F32(0.077119))), whole.astype(np.int32)).astype(F32)


class ApproximateExp(Kernel):
    exp = staticmethod(exp2_cubic)


class ApproximateLog(Kernel):
    """log by its exponent and a parabola of the mantissa's logarithm."""

    @staticmethod
    def log(x):
        mantissa, exponent = np.frexp(np.asarray(x, F32))
        m = mantissa * 2
        t = (m - 1) / (m + 1)
        return ((exponent - 1) * F32(np.log(2)) + 2 * t * (1 + t * t * F32(0.342))).astype(F32)
