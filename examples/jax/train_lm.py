"""Trains a small causal language model on text that Python itself ships, and captures steps of it for xent-diff.

    python launch.py --processes 4 --devices 1 train_lm.py --steps 61 --capture-at 60 --dumps /tmp/lm
    xent-diff /tmp/lm

With `--generate-at-steps 2 --generate-dir /tmp/lm-text` it pauses after exactly two steps to generate, and goes on as if it had
not. Every option can stand in a file too (`--config run.toml`).

The loss is the example's own, which can be given a fault, or with --fused the kernel of `fused_xent.jax`. Weights and batch are
sharded over all devices of all processes (FSDP); a step scans over its microbatches.
"""

import argparse
import collections
import math
import pydoc_data.topics
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from fused_loss import CONTRACT, FAULTS, fused_loss, kernel_loss, unfused_loss
from fused_xent import CaptureError
from fused_xent.jax import contract
from generation import Generation, GenerationError, Totals
from launch import join, leave
from settings import Settings

V, D, HEADS, LAYERS, S, B = 512, 64, 4, 2, 32, 8


def read_text() -> tuple[np.ndarray, list[str]]:
    """Word ids of Python's own documentation, and the words, the most frequent ones; any other is -100, which masks it."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    words = re.findall(r"\w+|[^\w\s]", text)
    vocabulary = [word for word, _ in collections.Counter(words).most_common(V)]
    ranks = {word: i for i, word in enumerate(vocabulary)}
    return np.array([ranks.get(word, -100) for word in words], np.int32), vocabulary


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


def make_continuation(new_tokens: int):
    """continuation(w, prompt [S / 2]) -> the likeliest token each time, [new_tokens]. On one device: no other one takes part."""

    def continuation(w, prompt):
        unembedding = w["unembedding"].astype(jnp.bfloat16)

        def append(ids, at):
            hidden = hidden_of(w, ids[None])[0, at - 1]
            logits = jnp.einsum("d,vd->v", hidden, unembedding, preferred_element_type=jnp.float32)
            token = jnp.argmax(logits).astype(jnp.int32)
            return ids.at[at].set(token), token

        ids = jnp.zeros(S, jnp.int32).at[: len(prompt)].set(prompt)
        return jax.lax.scan(append, ids, len(prompt) + jnp.arange(new_tokens))[1]

    return jax.jit(continuation)


def arguments(argv=None) -> argparse.Namespace:
    parser = Settings(__doc__.splitlines()[0])
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
    generate = parser.add_argument_group("pauses to generate")
    generate.add_argument("--generate-dir", default=None, help="where what is generated goes")
    generate.add_argument("--generate-at-steps", type=int, nargs="*", default=[], help="pause when so many steps are done; or")
    generate.add_argument("--generate-every", type=int, default=None, help="pause after every so many steps")
    generate.add_argument("--prompts", type=int, default=128)
    generate.add_argument("--new-tokens", type=int, default=S // 4, help=f"for each prompt of {S // 2}")
    generate.add_argument("--generate-timeout", type=float, default=60.0, help="seconds that processes wait for each other")
    options = parser.parse_args(argv)
    if wrong := senseless(options):
        parser.error(wrong)
    return options


def senseless(options) -> str | None:
    """What does not make sense about the pauses."""
    at, every = options.generate_at_steps, options.generate_every
    if beyond := [k for k in at if not 1 <= k <= options.steps]:
        return f"generate_at_steps: {beyond[0]} is not among the {options.steps} steps; expected 1 to {options.steps}"
    if sorted(set(at)) != at:
        return f"generate_at_steps: {at}; expected each step once, in order"
    if every is not None and not 1 <= every <= options.steps:
        return f"generate_every: {every}, of {options.steps} steps; expected 1 to {options.steps}"
    if (options.generate_dir is not None) != bool(at or every):
        return "generate_dir goes together with generate_at_steps or generate_every: where, and when"
    if options.prompts < 1:
        return f"prompts: {options.prompts}; expected 1 or more"
    if not 1 <= options.new_tokens <= S - S // 2:
        return f"new_tokens: {options.new_tokens}; expected 1 to {S - S // 2}: the model sees {S} tokens, and a prompt has {S // 2}"
    if not 0 < options.generate_timeout < math.inf:
        return f"generate_timeout: {options.generate_timeout:g}; expected seconds, more than 0"
    return None


def new_generation(options) -> Generation:
    return Generation(
        options.generate_dir,
        at_steps=options.generate_at_steps,
        every=options.generate_every,
        prompts=options.prompts,
        new_tokens=options.new_tokens,
        vocabulary=V,
        timeout=options.generate_timeout,
    )


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
        self.text, self.vocabulary = read_text()
        w = jax.tree.map(lambda x: self.place(x, "fsdp"), new_parameters(0))
        self.state = {"w": w, "first": jax.tree.map(jnp.zeros_like, w), "second": jax.tree.map(jnp.zeros_like, w)}
        self.step = make_step(options, capture, mesh)
        self.generation = new_generation(options)
        self.continuation = make_continuation(options.new_tokens)
        self.whole = jax.jit(lambda w: w, out_shardings=NamedSharding(mesh, P()))

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

    def gather(self):
        """The weights, whole, on the first device of this process. Every process must call it, for all send their shards."""
        whole = jax.block_until_ready(self.whole(self.state["w"]))
        return jax.tree.map(lambda x: x.addressable_data(0), whole)

    def complete(self, w, prompt) -> dict:
        """The row of a prompt: `prompt_tokens`, `tokens`, and both as `text`. The same ones on whichever process."""
        known = self.text[self.text >= 0]
        start = np.random.default_rng(prompt).integers(0, len(known) - S // 2)
        given = known[start : start + S // 2]
        tokens = np.asarray(self.continuation(w, given))
        text = " ".join(self.vocabulary[i] for i in given) + " → " + " ".join(self.vocabulary[i] for i in tokens)
        return {"prompt_tokens": given.tolist(), "tokens": tokens.tolist(), "text": text}

    def run(self) -> None:
        """All steps, and the pauses between them."""
        for k in range(self.options.steps):
            loss, report = self.train(k)
            if report:
                print(f"captured {report}", flush=True)
            if k % 20 == 0 or k == self.options.steps - 1:
                print(f"step {k} loss {float(loss):.9f}", flush=True)
            if self.generation.due(k + 1):
                self.generate(k + 1)

    def generate(self, steps) -> Totals:
        """Pauses when so many steps are done. It is told by the first process, once all is written and verified."""
        jax.block_until_ready(self.state)
        totals = self.generation.run(steps, self.gather, self.complete)
        if jax.process_index() == 0:
            print(f"generated {totals}", flush=True)
        return totals

    def checksum(self) -> str:
        """Of this process's shards of weights and moments."""
        crc = 0
        for x in jax.tree.leaves(self.state):
            for shard in x.addressable_shards:
                crc = zlib.crc32(np.asarray(shard.data).tobytes(), crc)
        return f"{crc:08x}"


def main(argv=None) -> None:
    # Before there is a cluster: what is wrong with the options is wrong on every process.
    options = arguments(argv)
    join()
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Auto,))
    try:
        with new_capture(options, mesh) as capture:
            trainer = Trainer(options, mesh, capture)
            trainer.run()
            print(f"parameters {trainer.checksum()}", flush=True)
    except (CaptureError, GenerationError) as error:
        leave(error)


if __name__ == "__main__":
    main()
