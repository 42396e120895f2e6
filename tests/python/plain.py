"""The plain loss, in float64, and how far from it an honest float32 computation may be."""

import jax
import jax.experimental
import jax.numpy as jnp
import ml_dtypes
import numpy as np

U = 2.0**-24
BF16 = np.dtype(ml_dtypes.bfloat16)
ROUNDOFF = {"float32": U, "float16": 2.0**-11, "bfloat16": 2.0**-8, "f32": 0.0, "bf16x2": 2.0**-16, "bf16": 2.0**-8}
"""Of a gradient's own rounding, by dtype, and of that of dlogits, by precision."""
FLUSHED = 2.0**-120
"""What flushing to zero may lose, of sums of some thousand terms."""
PLAIN = {
    "layout": "vd",
    "ignore_index": -100,
    "valid_vocab": None,
    "logit_scale": 1.0,
    "logit_softcap": None,
    "z_loss": 0.0,
    "label_smoothing": 0.0,
}

# It moved.
float64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64


def logits_of(hidden, unembedding, o):
    """[.., V], −∞ where padding."""
    z = o["logit_scale"] * jnp.einsum("...d,vd->...v" if o["layout"] == "vd" else "...d,dv->...v", hidden, unembedding)
    if o["logit_softcap"]:
        z = o["logit_softcap"] * jnp.tanh(z / o["logit_softcap"])
    valid = z.shape[-1] if o["valid_vocab"] is None else o["valid_vocab"]
    return jnp.where(jnp.arange(z.shape[-1]) < valid, z, -jnp.inf)


def per_token(hidden, targets, unembedding, masked, o):
    """Loss, lse and label logits, of whatever precision the inputs are."""
    z = logits_of(hidden, unembedding, o)
    lse = jax.nn.logsumexp(z, axis=-1)
    label = jnp.take_along_axis(z, jnp.where(masked, 0, targets)[..., None], axis=-1)[..., 0]
    mean = jnp.mean(z[..., : o["valid_vocab"]], axis=-1)
    eps = o["label_smoothing"]
    loss = lse - (1 - eps) * label - eps * mean + o["z_loss"] * lse**2
    return tuple(jnp.where(masked, 0, x) for x in (loss, lse, label))


class Truth:
    """Values and gradients in float64, for cotangents of the three values, and bounds on the error of each element.

    u is 2⁻²⁴, γ_n = n·u bounds n roundings in a row; A = scale·Σ_d |q·k| and e_z = γ_(D+4)·A + 8u·|z| the error of a logit, whatever
    the order of its sum. From it follow, first order in everything but exp:

        e_lse  = max_v e_z + γ_(V+16) + 4u·|lse|              the sum of the exponentials in any order, an exp of a few ulps
        e_P    = P·(exp(e_z + e_lse + 16u) − 1)               P = exp(z − lse)
        e_dz   = e_P·|p| + 2·z_loss·e_lse·P·|g| + 8u·(P·|p| + …)   with p, the factor of P in dz
        e_dQ   = Σ_v (e_dz + (δ + γ_V)·|dz|)·|K| + u_out·|dQ|  δ the rounding of dlogits, u_out that of the result
    """

    def __init__(self, hidden, targets, unembedding, masked, cotangents, *, dlogits="f32", outputs=("float32", "float32"), **options):
        o = {**PLAIN, **options}
        targets, masked = np.asarray(targets, np.int64), np.asarray(masked)
        q, k = np.asarray(hidden, np.float64), np.asarray(unembedding, np.float64)
        q = np.where(masked[..., None], 0, q)
        g, h, u = (np.where(masked, 0, np.asarray(c, np.float64)) for c in cotangents)
        with float64(True):
            values, pullback = jax.vjp(lambda q, k: per_token(q, targets, k, masked, o), jnp.asarray(q), jnp.asarray(k))
            gradients = pullback(tuple(jnp.asarray(c) for c in (g, h, u)))
            z = np.asarray(logits_of(jnp.asarray(q), jnp.asarray(k), o))
            self.values, self.gradients = [[np.asarray(x) for x in xs] for xs in (values, gradients)]
        loss, lse, label = self.values
        k = k if o["layout"] == "vd" else k.T
        (vocab, d), valid = k.shape, o["valid_vocab"] or k.shape[0]
        real = np.arange(vocab) < valid
        z = np.where(real, z, 0)
        scale, cap, eps = abs(o["logit_scale"]), o["logit_softcap"], o["label_smoothing"]
        e_z = np.where(real, (d + 4) * U * scale * (np.abs(q) @ np.abs(k).T) + 8 * U * np.abs(z), 0)
        most_z, most = np.max(np.abs(z), axis=-1), np.max(e_z, axis=-1)
        summed = (vocab + 16) * U
        e_lse = most + summed + 4 * U * np.abs(lse)
        e_loss = 2 * most + (summed * (1 + eps * most_z)) + 8 * U * (most_z + np.abs(label) + np.abs(loss))
        e_loss += 2 * o["z_loss"] * (np.abs(lse) * e_lse + 4 * U * lse**2)
        self.of_values = [np.where(masked, 0, e) for e in (e_loss, e_lse, most + 8 * U * np.abs(label))]

        p = np.where(real, np.exp(z - lse[..., None]), 0)
        factor = (g * (1 + 2 * o["z_loss"] * lse) + h)[..., None]
        onehot = (np.arange(vocab) == targets[..., None]) & ~masked[..., None]
        terms = [p * np.abs(factor), onehot * np.abs(u - g * (1 - eps))[..., None], real * (np.abs(g) * eps / valid)[..., None]]
        e_dz = terms[0] * np.expm1(e_z + e_lse[..., None] + 16 * U) + 8 * U * sum(terms)
        e_dz += p * (2 * o["z_loss"] * np.abs(g) * e_lse)[..., None]
        chain = scale * (1 - (z / cap) ** 2) if cap else scale
        e_chain = scale * (2 * np.abs(z) / cap**2 * e_z + 16 * U) if cap else 4 * U * scale
        dz = np.abs((p * factor + onehot * (u - g * (1 - eps))[..., None] - real * (g * eps / valid)[..., None]) * chain)
        e_dz = e_dz * chain + (sum(terms) + e_dz) * e_chain
        flat = lambda x: x.reshape(-1, x.shape[-1])
        n = flat(dz).shape[0]
        rounded = ROUNDOFF[dlogits]
        e_q = (e_dz + (rounded + vocab * U) * (dz + e_dz)) @ np.abs(k)
        e_k = flat(e_dz + (rounded + (n + 16) * U) * (dz + e_dz)).T @ np.abs(flat(q))
        e_k = e_k if o["layout"] == "vd" else e_k.T
        self.of_gradients = [
            e + ROUNDOFF[out] * (np.abs(x) + e) + FLUSHED for e, x, out in zip((e_q, e_k), self.gradients, outputs)
        ]

    def excess(self, values, gradients):
        """By how much the worst element is beyond its bound: 1 is the limit."""
        pairs = zip([*values, *gradients], [*self.values, *self.gradients], [*self.of_values, *self.of_gradients])
        worst = [0.0]
        for found, expected, bound in pairs:
            found = np.asarray(found).astype(np.float64)
            assert found.shape == expected.shape
            off = np.abs(found - expected)
            assert np.all(off[bound == 0] == 0)
            worst.append(float(np.max(off[bound > 0] / bound[bound > 0], initial=0.0)))
        # max() would pass over a NaN.
        return float(np.max(worst))
