"""Faults of masks, tiles and indices."""

import numpy as np

from kernel import F32, Kernel, Trainer, tiles


def pad_unmasked(width):
    """K is padded with zero rows to a multiple of `width`, and the padding's logits of 0 enter lse."""

    class Pad(Kernel):
        def partial(self, q, targets):
            top, total, label, plain = super().partial(q, targets)
            new = np.maximum(top, 0)
            pad = -len(self.k) % width
            return new, total * np.exp(top - new) + F32(pad) * np.exp(-new), label, plain

    return Pad


def vocab_tail_dropped(width):
    class Tail(Kernel):
        vocab_tile = width

        def backward_vocab_tiles(self):
            return [slice(i * width, (i + 1) * width) for i in range(len(self.k) // width)]

    return Tail


def token_tail_dropped(width):
    class Tail(Kernel):
        token_tile = width

        def backward_token_tiles(self, n):
            return [slice(i * width, (i + 1) * width) for i in range(n // width)]

    return Tail


def lse_tile_missing(width, index):
    """Tile `index` of `width` ids is not visited by the loop that sums exponentials; label logits are gathered apart."""

    class Missing(Kernel):
        vocab_tile = width

        def forward_tiles(self):
            out = tiles(len(self.k), width)
            del out[index]
            return out

        def forward(self, q, targets):
            lse, _, mean = super().forward(q, targets)
            return lse, (q * self.k[np.clip(targets, 0, None)]).sum(1), mean

    return Missing


def label_tile_edge(width, last):
    """The label is matched with `first < t < end`, or with `first <= t < end - 1`."""

    class Edge(Kernel):
        vocab_tile = width

        def dlogits(self, q, targets, g, lse, ids):
            edge = ids.stop - 1 if last else ids.start
            return super().dlogits(q, np.where(targets == edge, -1, targets), g, lse, ids)

    return Edge


def label_off_by_one(step):
    """The label's column lies one too far right (and is lost beyond the last) or left (and wraps)."""

    class OffByOne(Kernel):
        def dlogits(self, q, targets, g, lse, ids):
            wrapped = np.where(targets + step < 0, len(self.k) - 1, targets + step)
            return super().dlogits(q, wrapped, g, lse, ids)

    return OffByOne


class LabelMissing(Kernel):
    def hits(self, targets, ids):
        return np.zeros((len(targets), ids.stop - ids.start), bool)


class IgnoredLeak(Trainer):
    """The mask is applied to the loss only: masked tokens take part with the label stored."""

    def backward_weights(self, m):
        return m.get("token_weights", np.ones(len(m["targets"]), F32))


class IgnoredLeakAsZero(IgnoredLeak):
    """As above, once the ids have been clipped to the vocabulary."""

    def backward_targets(self, m):
        return np.maximum(m["targets"], 0)


class ValidVocabIgnored(Trainer):
    """Padding ids take part in both passes."""

    forward_options = {"valid_vocab": None}
    backward_options = {"valid_vocab": None}


class ValidVocabIgnoredBackward(Trainer):
    backward_options = {"valid_vocab": None}
