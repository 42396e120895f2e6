"""Capture inside a step: one process, four devices."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import folders, merged, same
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from fused_xent import Capture, CaptureError
from fused_xent.capture import collectives
from fused_xent.jax import fused_cross_entropy

M, B, S, D, V = 3, 4, 6, 8, 16
EVERYTHING = ("loss", "lse", "label_logits", "d_lse", "d_label_logits", "d_hidden", "d_unembedding")


def mesh_of(*extents):
    return jax.make_mesh(extents, ("data", "fsdp")[: len(extents)], axis_types=(AxisType.Auto,) * len(extents))


def new_capture(tmp_path, mesh, **options):
    options = {"at_steps": [1], "num_microbatches": M, "hidden_spec": P("data"), "unembedding_spec": P("data"), **options}
    return Capture(tmp_path, mesh=mesh, timeout=60, **options)


def loss_of(hidden, targets, unembedding, token_weights=None):
    """{"loss", "lse", "label_logits"} and a scalar that leans on all three of them."""
    logits = jnp.einsum("bsd,vd->bsv", hidden, unembedding, preferred_element_type=jnp.float32)
    valid = targets >= 0
    lse = jnp.where(valid, jax.nn.logsumexp(logits, -1), 0)
    label = jnp.where(valid, jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], -1)[..., 0], 0)
    return {"loss": lse - label, "lse": lse, "label_logits": label}


def data(mesh, scale=1, spec=P(None, "data"), w_spec=P("data")):
    random = np.random.default_rng(3)
    x = random.standard_normal((M, B, S, D * scale)).astype(ml_dtypes.bfloat16)
    w = random.standard_normal((V * scale, D * scale)).astype(ml_dtypes.bfloat16)
    targets = random.integers(-1, V, (M, B, S)).astype(np.int32)
    targets[targets < 0] = -100
    weights = random.random((M, B, S)).astype(np.float32)
    put = lambda a, s: jax.device_put(a, NamedSharding(mesh, s))
    return put(x, spec), put(targets, spec), put(weights, spec), put(w, w_spec)


def scanned(call, remat=False):
    """step(w, x, targets, weights, k) -> dK, and (hidden, outputs, dQ of the loss at the boundary) stacked."""

    def step(w, x, targets, weights, k):
        def microbatch(total, item):
            m, x, t, g = item

            def whole(w, nudge):
                def boundary(hidden, w):
                    return call(k, m, hidden, t, w, g)

                hidden = jnp.tanh(x) + nudge
                out = (jax.checkpoint(boundary) if remat else boundary)(hidden, w)
                return jnp.sum(g * out["loss"]) + 0.1 * jnp.sum(out["lse"] ** 2) + jnp.sum(out["label_logits"]), (hidden, out)

            (_, (hidden, out)), (dk, dq) = jax.value_and_grad(whole, (0, 1), has_aux=True)(w, jnp.zeros_like(x))
            return total + dk, (hidden, out, dq, dk)

        return jax.lax.scan(microbatch, jnp.zeros_like(w), (jnp.arange(M), x, targets, weights))

    return jax.jit(step)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("extents", [(4,), (2, 2)])
def test_everything_is_recorded_exactly_and_once(tmp_path, extents, remat):
    mesh = mesh_of(*extents)
    w_spec = P("fsdp") if len(extents) == 2 else P("data")
    x, targets, weights, w = data(mesh, w_spec=w_spec)
    capture = new_capture(tmp_path, mesh, record=EVERYTHING, unembedding_spec=w_spec, verify=True)
    step = scanned(capture.record(loss_of), remat)
    plain = scanned(lambda k, m, *inputs: loss_of(*inputs), remat)
    for k in range(3):
        dk, (hidden, out, dq, dks) = step(w, x, targets, weights, k)
        report = capture.finish_step(k, d_unembedding=dk)
        assert (report is not None) == (k == 1)
        same(np.asarray(plain(w, x, targets, weights, k)[0]), dk)
    assert sorted(path.name for path in (tmp_path / "proc_00000").iterdir()) == ["step_00000001"]
    for m in range(M):
        part = functools.partial(merged, tmp_path, 1, f"mb_{m:04}")
        same(part("hidden"), hidden[m])
        same(part("targets"), targets[m])
        same(part("token_weights"), weights[m])
        for name in ("loss", "lse", "label_logits"):
            same(part(name), out[name][m])
        same(part("d_hidden"), dq[m])
        same(part("d_unembedding"), dks[m])
        lse = np.asarray(out["lse"][m])
        np.testing.assert_allclose(part("d_lse"), 0.2 * lse, rtol=1e-6)
        same(part("d_label_logits"), np.ones((B, S), np.float32))
    same(merged(tmp_path, 1, "shared", "unembedding"), w)
    same(merged(tmp_path, 1, "shared", "d_unembedding"), dk)
    arguments = (w, x, targets, weights, 1)
    assert collectives(step.lower(*arguments).compile()) == collectives(plain.lower(*arguments).compile())


def test_the_same_from_inside_a_shard_map(tmp_path):
    mesh = mesh_of(4)
    x, targets, weights, w = data(mesh)
    capture = new_capture(tmp_path, mesh, record=("loss", "d_hidden", "d_unembedding"))

    def fused(hidden, targets, shard, token_weights):
        return loss_of(hidden, targets, jax.lax.all_gather(shard, "data", tiled=True))

    def build(call):
        def local(w, x, t, g, k):
            def one(total, item):
                m, x, t, g = item
                loss = lambda w, h: jnp.sum(g * call(k, m, h, t, w, g)["loss"])
                dk, dq = jax.grad(loss, (0, 1))(w, x)
                return total + dk, dq

            return jax.lax.scan(one, jnp.zeros_like(w), (jnp.arange(M), x, t, g))

        specs = (P("data"), P(None, "data"), P(None, "data"), P(None, "data"), P())
        return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P("data"), P(None, "data"))))

    arguments = (w, x, targets, weights, 1)
    step, plain = build(capture.record(fused)), build(lambda k, m, *inputs: fused(*inputs))
    dk, dq = step(*arguments)
    capture.finish_step(1, d_unembedding=dk)
    for found, expected in zip((dk, dq), plain(*arguments)):
        same(np.asarray(found), expected)
    for m in range(M):
        same(merged(tmp_path, 1, f"mb_{m:04}", "hidden"), x[m])
        same(merged(tmp_path, 1, f"mb_{m:04}", "d_hidden"), dq[m])
        assert merged(tmp_path, 1, f"mb_{m:04}", "d_unembedding").any()
    same(merged(tmp_path, 1, "shared", "unembedding"), w)
    assert collectives(step.lower(*arguments).compile()) == collectives(plain.lower(*arguments).compile())


def test_a_shard_map_over_some_axes_only_is_refused(tmp_path):
    mesh = mesh_of(2, 2)
    x, targets, weights, w = data(mesh)
    capture = new_capture(tmp_path, mesh)
    local = lambda x, t, w: capture(1, 0, x, t, w)
    step = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P("data"), P()), out_specs=None, axis_names={"data"})
    with pytest.raises(ValueError, match="gather the array over the other axes"):
        jax.jit(step)(x[0], targets[0], w)


@pytest.mark.parametrize("order", ["vmap of jit", "grad of vmap", "vmap of grad"])
def test_vmap_is_refused(tmp_path, order):
    mesh = mesh_of(4)
    x, targets, weights, w = data(mesh)
    capture = new_capture(tmp_path, mesh, record=("d_hidden",))
    loss = lambda h, t: jnp.sum(capture.record(loss_of)(1, 0, h[:, None], t[:, None], w)["loss"])
    program = {
        "vmap of jit": jax.vmap(jax.jit(loss), 1),
        "grad of vmap": jax.grad(lambda h, t: jnp.sum(jax.vmap(loss, 1)(h, t))),
        "vmap of grad": jax.vmap(jax.grad(loss), 1),
    }[order]
    with pytest.raises(ValueError, match="capture under vmap, of 6: .*scan over it"):
        jax.jit(program)(x[0], targets[0])


def test_a_vmap_that_maps_nothing_captured_is_exact(tmp_path):
    mesh = mesh_of(4)
    x, targets, weights, w = data(mesh)
    capture = new_capture(tmp_path, mesh, num_microbatches=1)

    @jax.jit
    def step(scales):
        capture(1, 0, x[0], targets[0], w)
        return jax.vmap(lambda scale: scale * jnp.sum(loss_of(x[0], targets[0], w)["loss"]))(scales)

    step(jnp.arange(3.0))
    capture.finish_step(1)
    same(merged(tmp_path, 1, "mb_0000", "hidden"), x[0])


def test_the_kernel_is_recorded_as_it_is(tmp_path):
    """A named tuple is kept; what arrives at its parts is recorded."""
    mesh = mesh_of(4)
    x, targets, weights, w = data(mesh, spec=P(), w_spec=P())
    capture = new_capture(tmp_path, mesh, num_microbatches=1, record=EVERYTHING, hidden_spec=P(), unembedding_spec=P())
    recorded = capture.record(functools.partial(fused_cross_entropy, reduction="sum"))

    def loss(call):
        def of(h, w):
            out = call(h, w)
            return out.reduced + 0.5 * jnp.sum(out.lse**2) + jnp.sum(out.label_logits), out

        return jax.jit(jax.value_and_grad(of, (0, 1), has_aux=True))

    (_, out), (dq, dk) = loss(lambda h, w: recorded(1, 0, h, targets[0], w, weights[0]))(x[0], w)
    capture.finish_step(1, d_unembedding=dk)
    plain = loss(lambda h, w: fused_cross_entropy(h, targets[0], w, weights[0], reduction="sum"))(x[0], w)
    for found, expected in zip(jax.tree.leaves(((None, out), (dq, dk))), jax.tree.leaves(((None, plain[0][1]), plain[1]))):
        same(np.asarray(found), expected)
    part = functools.partial(merged, tmp_path, 1, "mb_0000")
    for name, expected in [("lse", out.lse), ("d_hidden", dq), ("d_unembedding", dk), ("d_lse", out.lse)]:
        same(part(name), expected)
    same(part("d_label_logits"), np.ones((B, S), np.float32))


def test_large_shards_do_not_hang(tmp_path):
    """Copying more than 100 KiB inside of a callback would, on two devices or more."""
    mesh = mesh_of(4)
    x, targets, weights, w = data(mesh, scale=256)
    assert w.nbytes / 4 > 1 << 20
    capture = new_capture(tmp_path, mesh)

    @jax.jit
    def step(w, x, t):
        def one(total, item):
            m, x, t = item
            capture(1, m, x, t, w)
            return total + jnp.sum(x.astype(jnp.float32)), None

        return jax.lax.scan(one, 0.0, (jnp.arange(M), x, t))

    step(w, x, targets)
    capture.finish_step(1)
    same(merged(tmp_path, 1, "shared", "unembedding"), w)
    same(merged(tmp_path, 1, "mb_0002", "hidden"), x[2])


def simple(capture, scan_over=None):
    """Captures M microbatches, numbered by `scan_over`."""

    @jax.jit
    def step(w, x, t, k):
        def one(total, item):
            m, x, t = item
            capture(k, m, x, t, w)
            return total + jnp.sum(x.astype(jnp.float32)), None

        return jax.lax.scan(one, 0.0, (jnp.arange(M) if scan_over is None else jnp.asarray(scan_over), x, t))

    return step


def test_what_is_missing_or_doubled_is_said(tmp_path):
    mesh = mesh_of(4)
    x, targets, _, w = data(mesh)
    capture = new_capture(tmp_path, mesh, every=1, at_steps=None)
    simple(capture, [0, 2, 2])(w, x, targets, 0)
    with pytest.raises(CaptureError) as error:
        capture.finish_step(0)
    assert "microbatch 1: hidden, targets did not arrive" in str(error.value)
    assert "microbatch 2: hidden" in str(error.value) and "arrived twice, with different contents" in str(error.value)
    simple(capture, [1, 2, 1])(w, x, targets, 1)
    with pytest.raises(CaptureError, match="unembedding did not arrive"):
        capture.finish_step(1)
    with pytest.raises(CaptureError, match="microbatch 0: hidden, targets did not arrive"):
        capture.finish_step(2)
    simple(capture)(w, x, targets, 3)
    capture.finish_step(3)
    with pytest.raises(ValueError, match="finished"):
        capture.finish_step(3)
    assert sorted(folders(tmp_path, 3)) == ["mb_0000", "mb_0001", "mb_0002", "shared"]


def test_a_memory_limit_drops_whole_microbatches_and_says_so(tmp_path):
    mesh = mesh_of(4)
    x, targets, _, w = data(mesh, scale=64)
    capture = new_capture(tmp_path, mesh, memory_limit=1)
    simple(capture)(w, x, targets, 1)
    report = capture.finish_step(1)
    assert report.dropped == {0: [0, 1, 2]}
    assert list(folders(tmp_path, 1)) == ["shared"]
    same(merged(tmp_path, 1, "shared", "unembedding"), w)


def test_a_folder_that_cannot_be_written_is_said_after_the_step(tmp_path):
    mesh = mesh_of(4)
    x, targets, _, w = data(mesh)
    capture = new_capture(tmp_path, mesh, every=1, at_steps=None)
    (tmp_path / "proc_00000/step_00000000").write_text("in the way")
    step = simple(capture)
    assert np.isfinite(step(w, x, targets, 0)[0])
    with pytest.raises(CaptureError, match="process 0: .*step_00000000.*Not a directory"):
        capture.finish_step(0)
    step(w, x, targets, 1)
    capture.finish_step(1)
    assert len(folders(tmp_path, 1)) == M + 1
    (tmp_path / "file").write_text("")
    with pytest.raises(CaptureError, match="process 0"):
        new_capture(tmp_path / "file", mesh)


def test_the_end_of_a_with_block_finishes_what_is_open(tmp_path):
    mesh = mesh_of(4)
    x, targets, _, w = data(mesh)
    with new_capture(tmp_path, mesh) as capture:
        simple(capture)(w, x, targets, 1)
    assert len(folders(tmp_path, 1)) == M + 1
    with pytest.raises(CaptureError, match="microbatch 2"), new_capture(tmp_path, mesh, at_steps=[2]) as capture:
        simple(capture, [0, 1, 1])(w, x, targets, 2)


def test_stacked_outputs_after_the_step(tmp_path):
    mesh = mesh_of(2, 2)
    x, targets, weights, w = data(mesh, w_spec=P("fsdp"))
    capture = new_capture(tmp_path, mesh)
    for k in (0, 1):
        capture.write_step(k, hidden=x, targets=targets, unembedding=w, token_weights=weights, d_hidden=x)
        capture.finish_step(k, d_unembedding=w)
    for m in range(M):
        for name, expected in [("hidden", x), ("targets", targets), ("token_weights", weights), ("d_hidden", x)]:
            same(merged(tmp_path, 1, f"mb_{m:04}", name), expected[m])
    same(merged(tmp_path, 1, "shared", "unembedding"), w)
    same(merged(tmp_path, 1, "shared", "d_unembedding"), w)


def test_off_does_nothing(tmp_path):
    capture = Capture(None)
    x, targets, weights, w = data(mesh_of(4))
    capture(0, 0, x[0], targets[0], w)
    fn = lambda *inputs: len(inputs)
    assert capture.record(fn)(0, 0, x, targets, w) == 3
    assert capture.record(fn)(0, 0, x, targets, w, token_weights=weights) == 4
    assert capture.finish_step(0) is None and not capture.captures(0)
    capture.write_step(0, hidden=x, targets=targets, unembedding=w)
    capture.close()


def test_calls_that_make_no_sense_are_refused(tmp_path):
    mesh = mesh_of(4)
    x, targets, _, w = data(mesh)
    for options, found in [
        ({"every": 1}, "at_steps or every"),
        ({"at_steps": None, "every": 0}, "every is 0"),
        ({"record": ["d_hiden"]}, "unknown d_hiden"),
        ({"hidden_spec": None}, "hidden_spec"),
    ]:
        with pytest.raises(ValueError, match=found):
            new_capture(tmp_path, mesh, **options)
    with pytest.raises(ValueError, match="4 devices"):
        new_capture(tmp_path, None)
    with pytest.raises(CaptureError, match="reduktion"):
        new_capture(tmp_path, mesh, loss={"reduktion": "sum"})
    with pytest.raises(ValueError, match="wrap the loss with record"):
        new_capture(tmp_path, mesh, record=["d_hidden"])(1, 0, x[0], targets[0], w)
    with pytest.raises(TypeError, match="lse was asked for; the loss returned nothing"):
        capture = new_capture(tmp_path, mesh, record=["lse"])
        capture.record(lambda h, t, w: jnp.zeros(t.shape))(1, 0, x[0], targets[0], w)
    with pytest.raises(TypeError, match="unknown d_hiden"):
        new_capture(tmp_path, mesh).write_step(1, hidden=x, targets=targets, unembedding=w, d_hiden=x)
