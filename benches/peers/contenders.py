"""The peers' recipes, each in a process of its own: `python contenders.py NAME FOLDER N D V THREADS`.

Reads the inputs from FOLDER and answers each line of its input, `PASS [PREFIX]`, with one line of JSON; see
kernels/examples/peer.rs, which speaks the same way for the fused kernel. A recipe returns what it runs on and its passes:
`loss_and_grad` returns the mean loss, dQ and dK, `forward` the loss alone.
"""

import ctypes
import json
import math
import os
import sys
import time

import ml_dtypes
import numpy as np

CHUNK = 1024  # tokens at a time, where a recipe works in chunks


def torch_autograd(loss_of):
    """A recipe from a loss of bfloat16 Q [N, D], K [V, D] and int64 targets [N]."""

    def recipe(hidden, unembedding, targets, threads):
        import torch

        torch.set_num_threads(threads)
        q, k = (torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).requires_grad_() for x in (hidden, unembedding))
        y = torch.from_numpy(targets).long()

        def forward():
            with torch.no_grad():
                return loss_of(q, k, y)

        def loss_and_grad():
            loss = loss_of(q, k, y)
            return (loss.detach(), *torch.autograd.grad(loss, (q, k)))

        return f"torch {torch.__version__}", {"forward": forward, "loss_and_grad": loss_and_grad}

    return recipe


def torch_bf16(q, k, y):
    from torch.nn.functional import cross_entropy

    return cross_entropy(q @ k.T, y)


def torch_f32(q, k, y):
    from torch.nn.functional import cross_entropy

    return cross_entropy((q @ k.T).float(), y)


def torch_linear_ce(q, k, y):
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    return linear_cross_entropy(q, k, y, options=LinearCrossEntropyOptions(batch_chunk_size=CHUNK))


def cce_compile(q, k, y):
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(q, k, y, impl="torch_compile")


def torch_chunked(hidden, unembedding, targets, threads):
    """By hand: bfloat16 products per chunk of tokens, float32 in between and for the sum over chunks."""
    import torch

    torch.set_num_threads(threads)
    q, k = (torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) for x in (hidden, unembedding))
    y = torch.from_numpy(targets).long()

    def run(dq=None, dk=None):
        loss = torch.zeros(())
        for start in range(0, len(q), CHUNK):
            rows = slice(start, start + CHUNK)
            z = (q[rows] @ k.T).float()
            lse, label = z.logsumexp(1), y[rows, None]
            loss += (lse - z.gather(1, label)[:, 0]).sum() / len(q)
            if dk is not None:
                p = z.sub_(lse[:, None]).exp_()
                p.scatter_add_(1, label, torch.full(label.shape, -1.0))
                dlogits = p.div_(len(q)).bfloat16()
                dq[rows] = dlogits @ k
                dk += dlogits.T @ q[rows]
        return loss, dq, dk

    def loss_and_grad():
        return run(torch.empty_like(q), torch.zeros(k.shape))

    return f"torch {torch.__version__}", {"forward": lambda: run()[0], "loss_and_grad": loss_and_grad}


def jax_autograd(loss_of):
    """A recipe from a loss, as for torch; under jit."""

    def recipe(hidden, unembedding, targets, _threads):
        import jax

        arguments = [jax.device_put(x) for x in (hidden, unembedding, targets)]
        forward, gradient = jax.jit(loss_of), jax.jit(jax.value_and_grad(loss_of, (0, 1)))

        def loss_and_grad():
            loss, (dq, dk) = jax.block_until_ready(gradient(*arguments))
            return loss, dq, dk

        return f"jax {jax.__version__}", {
            "forward": lambda: jax.block_until_ready(forward(*arguments)),
            "loss_and_grad": loss_and_grad,
        }

    return recipe


def jax_sum(q, k, y):
    import jax
    import jax.numpy as jnp

    z = jnp.einsum("nd,vd->nv", q, k, preferred_element_type=jnp.float32)
    return (jax.nn.logsumexp(z, axis=1) - jnp.take_along_axis(z, y[:, None], axis=1)[:, 0]).sum()


def jax_naive(q, k, y):
    return jax_sum(q, k, y) / len(q)


def jax_chunked(q, k, y):
    import jax

    chunk = math.gcd(len(q), CHUNK)
    one = jax.checkpoint(lambda total, rows: (total + jax_sum(rows[0], k, rows[1]), None))
    total, _ = jax.lax.scan(one, 0.0, (q.reshape(-1, chunk, q.shape[1]), y.reshape(-1, chunk)))
    return total / len(q)


RECIPES = {
    "cce-compile": torch_autograd(cce_compile),
    "torch-bf16": torch_autograd(torch_bf16),
    "torch-f32": torch_autograd(torch_f32),
    "torch-linear-ce": torch_autograd(torch_linear_ce),
    "torch-chunked": torch_chunked,
    "jax-naive": jax_autograd(jax_naive),
    "jax-chunked": jax_autograd(jax_chunked),
}


def array(x):
    """A tensor of any framework, in the dtype it has."""
    if str(getattr(x, "dtype", "")) == "torch.bfloat16":
        import torch

        return x.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return np.asarray(x)


def serve(name, folder, tokens, hidden, vocab, threads, say):
    read = lambda file, dtype, *shape: np.fromfile(os.path.join(folder, file), dtype).reshape(shape)
    q = read("hidden.bf16", ml_dtypes.bfloat16, tokens, hidden)
    k = read("unembedding.bf16", ml_dtypes.bfloat16, vocab, hidden)
    version, passes = RECIPES[name](q, k, read("targets.i32", np.int32, tokens), threads)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)
    say({"version": version, "passes": list(passes)})
    for line in sys.stdin:
        command, _, prefix = line.strip().partition(" ")
        start = time.perf_counter()
        result = passes[command]()
        seconds = time.perf_counter() - start
        loss, *gradients = map(array, result if isinstance(result, tuple) else (result,))
        answer = {"seconds": seconds, "loss": float(loss), "gradient_bytes": sum(x.nbytes for x in gradients)}
        answer |= {file: x.dtype.name for file, x in zip(("dq", "dk"), gradients)}
        if prefix:
            for file, x in zip(("dq", "dk"), gradients):
                x.tofile(f"{prefix}.{file}")
        # What a pass took is given back before the next is measured; XLA does so a moment later, on threads of its own.
        result = gradients = x = None
        time.sleep(0.05)
        trim(0)
        say(answer)


def main():
    # What a library prints goes to stderr.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer):
        print(json.dumps(answer), file=out, flush=True)

    name, folder, *numbers = sys.argv[1:]
    try:
        serve(name, folder, *map(int, numbers), say)
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}".strip().splitlines()[0]})
        raise


if __name__ == "__main__":
    main()
