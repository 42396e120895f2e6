"""The kernel under the transformations of JAX and on several devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from plain import BF16, Truth

from fused_xent.jax import CrossEntropy, chunked, fused_cross_entropy, rules, rust

each_jaxlib = pytest.mark.each_jaxlib
IMPLEMENTATIONS = (pytest.param("rust", marks=each_jaxlib), "jax")
N, D, V = 48, 24, 320
OPTIONS = {"z_loss": 1e-2, "label_smoothing": 0.1, "logit_softcap": 20.0}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(chunked, "TILE", 96)


@functools.cache
def inputs():
    random = np.random.default_rng(5)
    hidden = random.standard_normal((N, D)).astype(BF16)
    unembedding = (random.standard_normal((V, D)) * 0.4).astype(np.float32)
    targets = random.integers(0, V, N).astype(np.int32)
    targets[::9] = -100
    weights = random.uniform(0.3, 1.7, N).astype(np.float32)
    return hidden, targets, unembedding, weights


@functools.cache
def truth():
    """Of the weighted mean."""
    hidden, targets, unembedding, weights = inputs()
    masked = targets == -100
    g = np.where(masked, 0, weights) / np.sum(weights[~masked], dtype=np.float64)
    zero = np.zeros(N)
    outputs = ("bfloat16", "float32")
    return Truth(hidden, targets, unembedding, masked, (g, zero, zero), outputs=outputs, **OPTIONS)


def mean(hidden, targets, unembedding, weights, **options):
    return fused_cross_entropy(hidden, targets, unembedding, weights, **OPTIONS, **options)


def holds(out, gradients):
    """Loss, lse and label logits, and the gradients of the mean."""
    excess = truth().excess([np.asarray(x).reshape(-1) for x in out[:3]], gradients)
    return excess <= 1


def differentiated(call):
    """(hidden, targets, unembedding, weights) -> outputs, gradients."""

    def program(hidden, targets, unembedding, weights):
        def loss(hidden, unembedding):
            out = call(hidden, targets, unembedding, weights)
            return out.reduced, out

        (_, out), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, unembedding)
        return out, gradients

    return program


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_jitted_and_rematerialised(implementation):
    call = functools.partial(mean, implementation=implementation)
    for program in (jax.jit(differentiated(call)), jax.jit(differentiated(jax.checkpoint(call)))):
        assert holds(*program(*inputs()))


@each_jaxlib
def test_outside_of_jit():
    assert holds(*differentiated(mean)(*inputs()))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_scan_over_microbatches_adds_up(implementation):
    hidden, targets, unembedding, weights = inputs()
    cut = lambda x: x.reshape(4, N // 4, *x.shape[1:])
    total = jnp.sum(jnp.where(targets == -100, 0, weights))

    @jax.jit
    def step(hidden, targets, unembedding, weights):
        def one(dk, item):
            q, t, w = item
            def loss(q, k):
                out = mean(q, t, k, w, denominator=total, implementation=implementation)
                return out.reduced, out

            (_, out), (dq, own) = jax.value_and_grad(jax.checkpoint(loss), (0, 1), has_aux=True)(q, unembedding)
            return dk + own, (out, dq)

        return lax.scan(one, jnp.zeros_like(unembedding), (cut(hidden), cut(targets), cut(weights)))

    dk, (out, dq) = step(hidden, targets, unembedding, weights)
    assert holds(out, (dq.reshape(N, D), dk))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_either_way(implementation):
    hidden, targets, unembedding, weights = inputs()
    cut = lambda x: x.reshape(4, N // 4, *x.shape[1:])
    total = jnp.sum(jnp.where(targets == -100, 0, weights))
    call = functools.partial(mean, denominator=total, implementation=implementation)
    batched = jax.vmap(call, (0, 0, None, 0))

    def loss(q, k):
        out = batched(q, cut(targets), k, cut(weights))
        return jnp.sum(out.reduced), out

    (_, out), (dq, dk) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(cut(hidden), unembedding)
    assert holds(out, (dq.reshape(N, D), dk))
    # Gradients of each, with an unembedding of its own.
    own = jnp.stack([unembedding] * 4)
    out, (dq, dk) = jax.jit(jax.vmap(differentiated(call)))(cut(hidden), cut(targets), own, cut(weights))
    assert dk.shape == (4, V, D)
    assert holds(out, (dq.reshape(N, D), dk.sum(axis=0)))


def mesh_of(**extents):
    return Mesh(np.array(jax.devices()[: np.prod(list(extents.values()))]).reshape(tuple(extents.values())), tuple(extents))


def replicated(call):
    """The tokens over `data`, the unembedding on all."""
    return lambda q, t, k, w: call(q, t, k, w, token_axes="data")


def gathered(call):
    """The tokens over `data`, and over it the rows of the unembedding (FSDP)."""
    return lambda q, t, k, w: call(q, t, lax.all_gather(k, "data", tiled=True), w, token_axes="data")


def vocab_parallel(call):
    return lambda q, t, k, w: call(q, t, k, w, vocab_axis="model")


def both(call):
    return lambda q, t, k, w: call(q, t, k, w, token_axes="data", vocab_axis="model")


def in_two_ways(call):
    """The vocabulary over both axes, the tokens over neither."""
    return lambda q, t, k, w: call(q, t, k, w, vocab_axis=("data", "model"))


SHARDED = {
    "replicated": (replicated, {"data": 4}, P("data"), P()),
    "gathered": (gathered, {"data": 4}, P("data"), P("data")),
    "vocab_parallel": (vocab_parallel, {"model": 4}, P(), P("model")),
    "both": (both, {"data": 2, "model": 2}, P("data"), P("model")),
    "in_two_ways": (in_two_ways, {"data": 2, "model": 2}, P(), P(("data", "model"))),
}


def sharded(way, implementation, inside, check_vma=True):
    wrap, extents, of_tokens, of_vocab = SHARDED[way]
    local = wrap(functools.partial(mean, implementation=implementation))
    mesh = mesh_of(**extents)
    specs = {"mesh": mesh, "in_specs": (of_tokens, of_tokens, of_vocab, of_tokens), "check_vma": check_vma}
    out = CrossEntropy(of_tokens, of_tokens, of_tokens, P())
    if inside:
        program = jax.shard_map(differentiated(local), out_specs=(out, (of_tokens, of_vocab)), **specs)
    else:
        program = differentiated(jax.shard_map(local, out_specs=out, **specs))
    return jax.jit(program)


RUNS = [(way, "rust", inside) for way in SHARDED for inside in (True, False)] + [("gathered", "jax", True), ("both", "jax", False)]


@pytest.mark.parametrize("way, implementation, inside", [pytest.param(*run, marks=[each_jaxlib] * run[2]) for run in RUNS])
def test_on_several_devices(way, implementation, inside):
    """With the gradient taken inside of the shard_map, and of it."""
    assert holds(*sharded(way, implementation, inside)(*inputs()))


@each_jaxlib
@pytest.mark.parametrize("way", ["gathered", "both"])
def test_on_several_devices_without_types_that_vary(way):
    assert holds(*sharded(way, "rust", inside=False, check_vma=False)(*inputs()))


@each_jaxlib
@pytest.mark.skipif(jax.__version_info__ < (0, 8), reason="this JAX does not type results of custom calls")
def test_a_result_typed_as_the_same_everywhere_would_be_noticed(monkeypatch):
    """The trap: the loss stays right to the bit, and gradients are multiplied by the number of devices, without a word."""
    hidden, targets, unembedding, _ = inputs()
    # With weights of 1 every token has the same cotangent, and the sum over the devices is 4 times that.
    arrays = (hidden, np.abs(targets), unembedding, np.ones(N, np.float32))
    out, gradients = sharded("replicated", "rust", inside=True)(*arrays)
    typed = rust._like
    untyped = lambda x, dtype: jax.ShapeDtypeStruct(x.shape, dtype) if x.ndim == 1 else typed(x, dtype)
    monkeypatch.setattr(rust, "_like", untyped)
    # Beside the kernels for TPUs, whose results have types of their own, JAX sees it.
    with pytest.raises(TypeError, match="manual axis types do not match"):
        sharded("replicated", "rust", inside=True)(*arrays)
    monkeypatch.setattr(rules, "HAS_TPU_KERNELS", False)
    trapped, wrong = sharded("replicated", "rust", inside=True)(*arrays)
    for name in ("loss", "reduced"):
        np.testing.assert_array_equal(getattr(trapped, name), getattr(out, name))
    for found, right in zip(wrong, gradients):
        np.testing.assert_array_equal(np.asarray(found, np.float32), 4 * np.asarray(right, np.float32))


@each_jaxlib
def test_a_bad_token_of_one_device_stops_no_other():
    hidden, targets, unembedding, weights = inputs()
    wrong = np.where(np.arange(N) == 20, V, targets).astype(np.int32)
    for way in ("replicated", "both"):
        out, (dq, dk) = sharded(way, "rust", inside=True)(hidden, wrong, unembedding, weights)
        assert np.flatnonzero(np.isnan(out.loss)).tolist() == [20] and np.isnan(out.reduced)
        assert np.isnan(np.asarray(dq, np.float32)).all(axis=1).any() and np.isnan(dk).all()
    # What weight a masked token has is of no account.
    out, gradients = sharded("both", "rust", inside=True)(hidden, targets, unembedding, np.where(targets == -100, np.inf, weights))
    assert holds(out, gradients)


def test_sharded_arrays_without_a_shard_map():
    """XLA gathers them on every device: slow, and right."""
    hidden, targets, unembedding, weights = inputs()
    mesh = mesh_of(data=4)
    put = lambda x: jax.device_put(x, NamedSharding(mesh, P("data")))
    assert holds(*jax.jit(differentiated(mean))(put(hidden), put(targets), put(unembedding), put(weights)))


def test_explicitly_sharded_arrays_are_refused_outside_of_a_shard_map():
    hidden, targets, unembedding, weights = inputs()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        hidden = jax.device_put(hidden, NamedSharding(mesh, P("data")))
        with pytest.raises(ValueError, match=r"hidden: bfloat16\[48@data,24\], sharded over explicit .* inside of a jax.shard_map"):
            jax.jit(mean)(hidden, targets, unembedding, weights)
    # In one, it is as on any other mesh.
    local = lambda q, t, k, w: mean(q, t, k, w, token_axes="data")
    specs = {"mesh": mesh, "in_specs": (P("data"), P("data"), P(), P("data"))}
    out = jax.jit(jax.shard_map(local, out_specs=CrossEntropy(P("data"), P("data"), P("data"), P()), **specs))
    put = lambda x: jax.device_put(x, NamedSharding(mesh, P("data")))
    found = out(hidden, put(targets), jax.device_put(unembedding, NamedSharding(mesh, P())), put(weights))
    np.testing.assert_array_equal(found.loss, mean(*inputs()).loss)


@each_jaxlib
def test_many_calls_at_once_on_several_devices():
    """Work that waits on XLA's threads for other work on them would wait for ever."""
    hidden, targets, unembedding, weights = inputs()

    def local(q, t, k, w):
        return sum(mean(q, t, k * (1 + i / 64), w, token_axes="data").reduced for i in range(16))

    specs = {"mesh": mesh_of(data=4), "in_specs": (P("data"), P("data"), P(), P("data")), "out_specs": P()}
    assert np.isfinite(jax.jit(jax.shard_map(local, **specs))(hidden, targets, unembedding, weights))
