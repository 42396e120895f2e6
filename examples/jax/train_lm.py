"""Trains a small causal language model on text that Python itself ships, and captures steps of it for xent-diff.

    python launch.py --processes 4 --devices 1 train_lm.py --steps 61 --capture-at 60 --dumps /tmp/lm
    xent-diff /tmp/lm

The loss is the example's own, which can be given a fault, or with --fused the kernel of `fused_xent.jax`. Weights and batch are
sharded over all devices of all processes (FSDP); a step scans over its microbatches.
"""

import argparse
import collections
import pydoc_data.topics
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from fused_loss import CONTRACT, FAULTS, fused_loss, kernel_loss, unfused_loss
from fused_xent.jax import contract
from launch import join

V, D, HEADS, LAYERS, S, B = 512, 64, 4, 2, 32, 8


def read_text() -> np.ndarray:
    """Word ids of Python's own documentation; every word that is not among the most frequent is -100, which masks it."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    words = re.findall(r"\w+|[^\w\s]", text)
    ranks = {word: i for i, (word, _) in enumerate(collections.Counter(words).most_common(V))}
    return np.array([ranks.get(word, -100) for word in words], np.int32)


def batch_of(ids: np.ndarray, step: int, microbatches: int) -> np.ndarray:
    """[M, B, S + 1] ids. There are but eight batches, so that the model soon is sure of itself: faults hide in unsure ones."""
    random = np.random.default_rng(step % 8)
    starts = random.integers(0, len(ids) - S - 1, microbatches * B)
    return np.stack([ids[at : at + S + 1] for at in starts]).reshape(microbatches, B, S + 1)


def new_parameters(seed: int) -> dict:
    random = np.random.default_rng(seed)

    def normal(*shape):
        return (random.standard_normal(shape) * 0.5 / np.sqrt(shape[-1])).astype(np.float32)

    layers = [
        {"qkv": normal(3 * D, D), "out": normal(D, D), "up": normal(4 * D, D), "down": normal(D, 4 * D)} for _ in range(LAYERS)
    ]
    return {"embedding": normal(V, D), "position": normal(S, D), "layers": layers, "unembedding": normal(V, D)}


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x.astype(jnp.float32) ** 2, axis=-1, keepdims=True) + 1e-6).astype(x.dtype)


@jax.checkpoint
def layer(x, w):
    b, s, _ = x.shape
    q, k, v = jnp.split((norm(x) @ w["qkv"].astype(x.dtype).T).reshape(b, s, 3 * HEADS, D // HEADS), 3, axis=2)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) / np.sqrt(D // HEADS)
    scores = jnp.where(jnp.tril(jnp.ones((s, s), bool)), scores, -1e30)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores).astype(x.dtype), v).reshape(b, s, D)
    x = x + mixed @ w["out"].astype(x.dtype).T
    return x + jax.nn.gelu(norm(x) @ w["up"].astype(x.dtype).T) @ w["down"].astype(x.dtype).T


def hidden_of(w, ids):
    """[B, S, D] bfloat16."""
    x = (w["embedding"][jnp.maximum(ids, 0)] + w["position"]).astype(jnp.bfloat16)
    for weights in w["layers"]:
        x = layer(x, weights)
    return norm(x)


@jax.custom_vjp
def rounded(w):
    """`w` rounded to bfloat16's values, kept float32; its gradient passes as it is."""
    return w.astype(jnp.bfloat16).astype(jnp.float32)


rounded.defvjp(lambda w: (rounded(w), None), lambda _, cotangent: (cotangent,))


def make_step(options, capture, mesh):
    """step(state, ids [M, B, S + 1], step) -> state, loss, dK, and for `--path outputs` what that hands over."""
    sharding = NamedSharding(mesh, P("fsdp"))
    microbatches = options.num_microbatches
    fused = kernel_loss(mesh) if options.fused else unfused_loss if options.unfused else fused_loss(options.fault)
    recorded = capture.record(fused) if options.path == "record" else None

    def loss_of(w, ids, m, step, denominator):
        hidden = jax.lax.with_sharding_constraint(hidden_of(w, ids[:, :-1]), sharding)
        targets = ids[:, 1:]
        unembedding = jax.lax.with_sharding_constraint(rounded(w["unembedding"]), sharding)
        if options.path == "record":
            out = recorded(step, m, hidden, targets, unembedding)
        else:
            if options.path == "callback":
                capture(step, m, hidden, targets, unembedding)
            out = fused(hidden, targets, unembedding)
        if options.fault == "mean-of-means":
            denominator = jnp.sum(targets >= 0) * microbatches
        outputs = (hidden, targets, out) if options.path == "outputs" else None
        return jnp.sum(out["loss"]) / denominator, outputs

    def step(state, ids, step):
        denominator = jnp.sum(ids[:, :, 1:] >= 0)

        def microbatch(total, item):
            (loss, outputs), gradient = jax.value_and_grad(loss_of, has_aux=True)(state["w"], *item, step, denominator)
            return jax.tree.map(jnp.add, total, gradient), (loss, outputs)

        zero = jax.tree.map(jnp.zeros_like, state["w"])
        gradient, (loss, outputs) = jax.lax.scan(microbatch, zero, (ids, jnp.arange(microbatches)))
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state["first"], gradient)
        second = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, state["second"], gradient)
        t = step + 1.0
        w = jax.tree.map(
            lambda w, m, v: w - 3e-3 * (m / (1 - 0.9**t)) / (jnp.sqrt(v / (1 - 0.99**t)) + 1e-8), state["w"], first, second
        )
        unembedding = rounded(state["w"]["unembedding"]) if options.path == "outputs" else None
        new = {"w": w, "first": first, "second": second}
        return new, jnp.sum(loss), gradient["unembedding"], (unembedding, outputs)

    # The state stays where it is; without saying so the second step might find it elsewhere, and be compiled anew.
    return jax.jit(step, out_shardings=(sharding, None, sharding, None))


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=61)
    parser.add_argument("--num-microbatches", type=int, default=2)
    parser.add_argument("--capture-at", type=int, nargs="*", default=[])
    parser.add_argument("--dumps", default=None, help="where the dump goes; capture is off without it")
    parser.add_argument("--path", choices=("record", "callback", "outputs"), default="record")
    loss = parser.add_mutually_exclusive_group()
    loss.add_argument("--fused", action="store_true", help="the kernel of fused_xent.jax in place of the example's own loss")
    loss.add_argument("--unfused", action="store_true", help="the loss as JAX differentiates it")
    loss.add_argument("--fault", choices=FAULTS, default=None)
    parser.add_argument("--memory-limit", type=int, default=None, help="bytes of captured arrays that may wait for the disk")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds that a capture may take to be concluded")
    return parser.parse_args(argv)


def new_capture(options, mesh):
    from fused_xent import Capture

    return Capture(
        options.dumps,
        loss={"reduction": "mean", "denominator": "valid", "microbatches": "global"},
        num_microbatches=options.num_microbatches,
        at_steps=options.capture_at,
        record=("loss", "lse", "label_logits", "d_hidden", "d_unembedding") if options.path == "record" else (),
        # What the loss promises. Undeclared, a kernel that rounds dlogits to bfloat16 would be honest too.
        contract=contract(jnp.bfloat16, jnp.float32, operands="bfloat16") if options.fused else CONTRACT,
        mesh=mesh,
        hidden_spec=P("fsdp"),
        unembedding_spec=P("fsdp"),
        memory_limit=options.memory_limit,
        timeout=options.timeout,
    )


class Trainer:
    """A model in training, on all devices of all processes."""

    def __init__(self, options, mesh, capture) -> None:
        self.options, self.mesh, self.capture = options, mesh, capture
        self.text = read_text()
        w = jax.tree.map(lambda x: self.place(x, "fsdp"), new_parameters(0))
        self.state = {"w": w, "first": jax.tree.map(jnp.zeros_like, w), "second": jax.tree.map(jnp.zeros_like, w)}
        self.step = make_step(options, capture, mesh)

    def place(self, x, *spec):
        return jax.make_array_from_callback(x.shape, NamedSharding(self.mesh, P(*spec)), lambda index: x[index])

    def batch(self, k):
        """[M, B, S + 1]."""
        return self.place(batch_of(self.text, k, self.options.num_microbatches), None, "fsdp")

    def train(self, k):
        """Takes step `k`. Returns its loss, and what the capture reports of it."""
        self.state, loss, d_unembedding, (unembedding, outputs) = self.step(self.state, self.batch(k), k)
        if self.options.path == "outputs":
            hidden, targets, out = outputs
            self.capture.write_step(k, hidden=hidden, targets=targets, unembedding=unembedding, **out)
        return loss, self.capture.finish_step(k, d_unembedding=d_unembedding)

    def checksum(self) -> str:
        """Of this process's shards of weights and moments."""
        crc = 0
        for x in jax.tree.leaves(self.state):
            for shard in x.addressable_shards:
                crc = zlib.crc32(np.asarray(shard.data).tobytes(), crc)
        return f"{crc:08x}"


def main() -> None:
    options = arguments()
    join()
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Auto,))
    with new_capture(options, mesh) as capture:
        trainer = Trainer(options, mesh, capture)
        for k in range(options.steps):
            loss, report = trainer.train(k)
            if report:
                print(f"captured {report}", flush=True)
            if k % 20 == 0 or k == options.steps - 1:
                print(f"step {k} loss {float(loss):.9f}", flush=True)
        print(f"parameters {trainer.checksum()}", flush=True)


if __name__ == "__main__":
    main()
