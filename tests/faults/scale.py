"""Faults of scale and reduction."""

import numpy as np

from kernel import F32, Kernel, Trainer


def cotangent_missing(of_dq, part):
    """dQ (or dK) lacks the upstream `cotangent`, the `denominator`, or `all` of g (but for the mask)."""

    class Missing(Trainer):
        def gradients(self, m, g, lse):
            right = super().gradients(m, g, lse)
            cotangent, denominator = F32(self.loss.get("cotangent", 1.0)), F32(self.denominator(m))
            g = {"cotangent": g / cotangent, "denominator": g * denominator, "all": (g != 0).astype(F32)}[part]
            wrong = super().gradients(m, g, lse)
            return (wrong[0], right[1]) if of_dq else (right[0], wrong[1])

    return Missing


class MeanOverAllTokens(Trainer):
    def denominator(self, m):
        over = self.microbatches if self.loss.get("microbatches") == "global" else [m]
        return float(sum(len(x["targets"]) for x in over))


class MeanOfMeans(Trainer):
    """Each microbatch divides by its own count, and the step by the number of microbatches."""

    def denominator(self, m):
        return self.counted([m])

    def factor(self, m):
        return super().factor(m) / len(self.microbatches)


def not_averaged(factor):
    class Factor(Trainer):
        def factor(self, m):
            return super().factor(m) * factor

    return Factor


class NotDividedByMicrobatches(Trainer):
    """The step's gradient is the sum over microbatches in place of the mean."""

    def share(self):
        return F32(1)


class LastMicrobatchOnly(Trainer):
    def accumulated(self, total, dk):
        return dk


class FirstCotangentForAll(Trainer):
    """Every token takes the first one's cotangent; masked tokens stay masked."""

    def cotangents(self, m):
        g = super().cotangents(m)
        return np.where(g != 0, g[0], 0).astype(F32)


class TokenWeightsIgnored(Trainer):
    def backward_weights(self, m):
        return self.mask(m).astype(F32)


class SoftcapDerivativeMissing(Kernel):
    def slope(self, z):
        return F32(1)


class SoftcapDerivativeMissingLabel(Kernel):
    """The label's gradient is added apart, without the softcap's derivative."""

    label_apart = True

    def label_factor(self, q, targets, g):
        here, rows, _ = super().label_factor(q, targets, g)
        return here, rows, -(1 - self.smoothing) * g[here] * self.scale


class ZlossGradientMissing(Kernel):
    def lse_term(self, p, lse):
        return p


class LabelSmoothingIgnored(Trainer):
    backward_options = {"label_smoothing": 0.0}


class LogitScaleFactorMissing(Kernel):
    """The backward has the logits right, but not the scale's own factor."""

    def dlogits(self, *arguments):
        return super().dlogits(*arguments) / self.scale


class LogitScaleIgnored(Trainer):
    """The backward recomputes unscaled logits and, from these, its own lse."""

    backward_options = {"logit_scale": 1.0}

    def gradients(self, m, g, lse):
        return super().gradients(m, g, self.backward_kernel.forward(m["hidden"], m["targets"])[0])


class LogitScaleIgnoredStaleLse(Trainer):
    """The backward recomputes unscaled logits, but takes the lse that the forward kept."""

    backward_options = {"logit_scale": 1.0}
