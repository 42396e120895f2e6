"""A fused linear + softmax cross-entropy in numpy as training code has it: bfloat16 inputs, float32 products over tiles.

`Kernel` and `Trainer` are honest. Each fault overrides the line that a real kernel or training loop got wrong.
"""

import ml_dtypes
import numpy as np

F32 = np.float32
BF16 = ml_dtypes.bfloat16


def exact(x):
    return x


def bf16(x):
    """Rounded to bfloat16, as float32."""
    return np.asarray(x, F32).astype(BF16).astype(F32)


def tiles(length, width):
    """Tiles of `width`, the last one ragged."""
    return [slice(a, min(a + width, length)) for a in range(0, length, width)]


class Kernel:
    """One device's kernel on the rows of K from vocab id `offset` on."""

    token_tile = 48
    vocab_tile = 64
    token_major = False  # which of the two loops of the backward is the outer one
    label_apart = False  # the label's gradient by a gather and a scatter-add in place of in the tile
    narrow = staticmethod(exact)  # dlogits as the gradient products take them
    exp = staticmethod(np.exp)
    log = staticmethod(np.log)

    def __init__(self, k, loss, offset=0, vocab=None):
        self.k = k
        self.offset = offset
        self.vocab = vocab or len(k)
        self.valid = loss.get("valid_vocab") or self.vocab
        self.scale = F32(loss.get("logit_scale", 1.0))
        self.cap = loss.get("logit_softcap") and F32(loss["logit_softcap"])
        self.z_loss = F32(loss.get("z_loss", 0.0))
        self.smoothing = F32(loss.get("label_smoothing", 0.0))

    def columns(self, ids):
        return np.arange(ids.start, ids.stop) + self.offset

    def logits(self, q, ids):
        z = (q @ self.k[ids].T) * self.scale
        return self.cap * np.tanh(z / self.cap) if self.cap else z

    def forward_logits(self, q, ids):
        return self.logits(q, ids)

    def backward_logits(self, q, ids):
        return self.logits(q, ids)

    def takes_part(self, ids):
        return self.columns(ids) < self.valid

    def hits(self, targets, ids):
        return targets[:, None] == self.columns(ids)

    # Forward

    def forward_tiles(self):
        return tiles(len(self.k), self.vocab_tile)

    def partial(self, q, targets):
        """Running maximum, sum of exponentials, label logit and sum of logits over this device's vocab ids."""
        n = len(q)
        top, total, label, plain = np.full(n, -np.inf, F32), np.zeros(n, F32), np.zeros(n, F32), np.zeros(n, F32)
        for ids in self.forward_tiles():
            part = self.takes_part(ids)
            if not part.any():
                continue
            z = self.forward_logits(q, ids)
            label += np.where(self.hits(targets, ids), z, 0).sum(1)
            z = z[:, part]
            plain += z.sum(1)
            new = np.maximum(top, z.max(1))
            total = total * self.exp(top - new) + self.exp(z - new[:, None]).sum(1)
            top = new
        return top, total, label, plain

    def merged(self, partials):
        """lse, label logit and mean logit from the partial results of all devices."""
        tops, totals, labels, plains = (np.stack(x) for x in zip(*partials))
        top = tops.max(0)
        lse = top + self.log((totals * np.exp(tops - top)).sum(0))
        return lse, labels.sum(0), plains.sum(0) / F32(self.valid)

    def forward(self, q, targets):
        return self.merged([self.partial(q, targets)])

    def losses(self, lse, label, mean):
        return lse - (1 - self.smoothing) * label - self.smoothing * mean + self.z_loss * lse * lse

    # Backward

    def backward_vocab_tiles(self):
        return tiles(len(self.k), self.vocab_tile)

    def backward_token_tiles(self, n):
        return tiles(n, self.token_tile)

    def kept(self, lse):
        """lse as the backward finds it."""
        return lse

    def slope(self, z):
        """d(softcap) / d(its argument), from the capped logits."""
        return 1 - (z / self.cap) ** 2 if self.cap else F32(1)

    def lse_term(self, p, lse):
        return p * (1 + 2 * self.z_loss * lse[:, None])

    def dlogits(self, q, targets, g, lse, ids):
        z = self.backward_logits(q, ids)
        part = self.takes_part(ids)
        p = np.where(part, self.exp(np.where(part, z - lse[:, None], 0)), 0)
        d = self.lse_term(p, lse) - np.where(part, self.smoothing / F32(self.valid), 0)
        if not self.label_apart:
            d = d - (1 - self.smoothing) * self.hits(targets, ids)
        return d * self.slope(z) * g[:, None] * self.scale

    def label_factor(self, q, targets, g):
        """Of each token whose label lies on this device: the token, the row of K, and its dlogit's label term."""
        row = targets - self.offset
        here = np.flatnonzero((row >= 0) & (row < len(self.k)) & (g != 0))
        z = (q[here] * self.k[row[here]]).sum(1) * self.scale
        z = self.cap * np.tanh(z / self.cap) if self.cap else z
        return here, row[here], -(1 - self.smoothing) * self.slope(z) * g[here] * self.scale

    def dq_product(self, d, ids):
        return d @ self.k[ids]

    def dk_product(self, d, q):
        return d.T @ q

    def add_dq(self, dq, part):
        return dq + part

    def add_dk(self, dk, part):
        return dk + part

    def scatter(self, dk, rows, values):
        np.add.at(dk, rows, values)
        return dk

    def backward(self, q, targets, g, lse):
        dq, dk = np.zeros_like(q), np.zeros_like(self.k)
        lse = self.kept(lse)
        order = [(rows, ids) for ids in self.backward_vocab_tiles() for rows in self.backward_token_tiles(len(q))]
        for rows, ids in sorted(order, key=lambda x: x[0].start) if self.token_major else order:
            d = self.narrow(self.dlogits(q[rows], targets[rows], g[rows], lse[rows], ids))
            dq[rows] = self.add_dq(dq[rows], self.dq_product(d, ids))
            dk[ids] = self.add_dk(dk[ids], self.dk_product(d, q[rows]))
        if self.label_apart:
            here, rows, factor = self.label_factor(q, targets, g)
            dq[here] += factor[:, None] * self.k[rows]
            dk = self.scatter(dk, rows, factor[:, None] * q[here])
        return dq, dk


class Trainer:
    """One step's loop over microbatches on one device: cotangents, gradients, accumulation."""

    output = F32
    forward_options = {}  # loss members that the forward has otherwise
    backward_options = {}  # loss members that the backward has otherwise

    def __init__(self, kernel, k, loss, microbatches):
        self.k, self.loss, self.microbatches = k, loss, microbatches
        self.make = kernel
        self.kernel = kernel(k, {**loss, **self.forward_options})
        self.backward_kernel = kernel(k, {**loss, **self.backward_options})

    # Cotangents

    def mask(self, m):
        return m["targets"] != self.loss.get("ignore_index", -100)

    def weights(self, m):
        return np.where(self.mask(m), m.get("token_weights", F32(1)), 0).astype(F32)

    def counted(self, microbatches):
        """The denominator over these microbatches."""
        denominator = self.loss.get("denominator", "valid")
        if self.loss.get("reduction", "mean") == "sum":
            return 1.0
        if denominator == "valid":
            return sum(float(self.weights(m).sum()) for m in microbatches)
        return float(sum(len(m["targets"]) for m in microbatches)) if denominator == "tokens" else denominator

    def denominator(self, m):
        return self.counted(self.microbatches if self.loss.get("microbatches") == "global" else [m])

    def factor(self, m):
        denominator = self.denominator(m)
        return self.loss.get("cotangent", 1.0) / denominator if denominator else 0.0

    def share(self):
        """What a microbatch's gradient is multiplied by in the step's."""
        return F32(1 / len(self.microbatches)) if self.loss.get("microbatches", "mean") == "mean" else F32(1)

    def backward_weights(self, m):
        return self.weights(m)

    def cotangents(self, m):
        return (self.backward_weights(m) * self.factor(m)).astype(F32)

    def backward_targets(self, m):
        return m["targets"]

    # The step

    def forward(self, m):
        return self.kernel.forward(m["hidden"], m["targets"])

    def gradients(self, m, g, lse):
        return self.backward_kernel.backward(m["hidden"], self.backward_targets(m), g, lse)

    def accumulated(self, total, dk):
        return total + dk

    def run(self):
        """Per microbatch loss, lse, label_logits, d_hidden and d_unembedding; and the accumulated d_unembedding."""
        out, total = [], np.zeros_like(self.k)
        own = self.loss.get("microbatch_gradients", "own") == "own"
        for m in self.microbatches:
            lse, label, mean = self.forward(m)
            losses = self.kernel.losses(lse, label, mean)
            dq, dk = self.gradients(m, self.cotangents(m), lse)
            total = self.accumulated(total, dk * self.share())
            dq, dk = (x if own else x * self.share() for x in (dq, dk))
            here = self.weights(m) != 0
            scalars = {"loss": losses, "lse": lse, "label_logits": label}
            scalars = {name: np.where(here, x, 0).astype(F32) for name, x in scalars.items()}
            out.append({**scalars, "d_hidden": dq.astype(self.output), "d_unembedding": dk.astype(self.output)})
        return out, total.astype(self.output)
