"""The kernel in JAX: its values and gradients, its options, its errors; both implementations."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain import BF16, PLAIN, Truth, float64, per_token

from fused_xent.jax import CrossEntropy, FallbackWarning, chunked, choice, contract, fused_cross_entropy, implementation, set_threads

each_jaxlib = pytest.mark.each_jaxlib
IMPLEMENTATIONS = ("rust", "jax")
F32, F16 = np.dtype(np.float32), np.dtype(np.float16)
EVERY_OPTION = {"logit_scale": 0.7, "logit_softcap": 20.0, "z_loss": 1e-2, "label_smoothing": 0.1}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles of the vocabulary, the last one overlapping."""
    monkeypatch.setattr(chunked, "TILE", 128)


def problem(shape, dtypes, deviation, layout="vd", seed=1):
    """Inputs whose logits deviate by so much: labels first, last and on tile borders, some tokens masked, no g a power of two."""
    n, d, v = shape
    random = np.random.default_rng(seed)
    side = np.sqrt(deviation) / d**0.25
    hidden = (random.standard_normal((n, d)) * side).astype(dtypes[0])
    unembedding = (random.standard_normal((v, d)) * side).astype(dtypes[1])
    targets = random.integers(0, v, n).astype(np.int32)
    for token, label in enumerate([0, v - 1, 127, 128, 16]):
        if token < n:
            targets[token] = min(label, v - 1)
    targets[5::7] = -100
    weights = random.uniform(0.3, 1.7, n).astype(np.float32)
    weights[6::11] = 0
    cotangents = [(random.standard_normal(n) * x).astype(np.float32) for x in (0.37, 0.05, 0.11)]
    if layout == "dv":
        unembedding = np.ascontiguousarray(unembedding.T)
    return hidden, targets, unembedding, weights, cotangents


def masked_of(targets, weights):
    return (targets == -100) | (weights == 0)


def run(hidden, targets, unembedding, weights, cotangents, **options):
    """Values and gradients, in one jitted program."""

    @jax.jit
    def program(hidden, targets, unembedding, weights, cotangents):
        call = lambda q, k: tuple(fused_cross_entropy(q, targets, k, weights, reduction="none", **options)[:3])
        values, pullback = jax.vjp(call, hidden, unembedding)
        return values, pullback(tuple(cotangents))

    return program(hidden, targets, unembedding, weights, cotangents)


CASES = [
    # N, D, V; dtypes; deviation of the logits; layout; what else
    ((13, 24, 301), (BF16, BF16), 1e-3, "vd", {}),
    ((37, 40, 700), (BF16, BF16), 1.0, "vd", {}),
    ((37, 40, 700), (BF16, BF16), 30.0, "dv", {}),
    ((13, 24, 301), (BF16, BF16), 1000.0, "vd", {}),
    ((37, 40, 700), (BF16, BF16), 3.0, "vd", {**EVERY_OPTION, "valid_vocab": 641}),
    ((13, 24, 301), (BF16, BF16), 3.0, "dv", {**EVERY_OPTION, "dlogits": "f32"}),
    ((13, 24, 301), (BF16, BF16), 1.0, "vd", {"dlogits": "bf16x2"}),
    ((13, 24, 301), (BF16, F32), 1.0, "dv", {}),
    ((37, 40, 700), (F32, F32), 30.0, "vd", {"operands": "bfloat16"}),
    ((37, 40, 700), (F32, F32), 1.0, "vd", {"operands": "bfloat16", "dlogits": "bf16"}),
    ((37, 40, 700), (F32, F32), 3.0, "dv", {**EVERY_OPTION, "valid_vocab": 130}),
    ((13, 24, 301), (F32, F32), 1000.0, "vd", {"z_loss": 1e-4}),
    ((13, 24, 301), (F16, BF16), 3.0, "vd", {"label_smoothing": 0.2}),
    ((1, 1, 1), (F32, F32), 1.0, "vd", {}),
    ((0, 8, 5), (BF16, F32), 1.0, "vd", {}),
    ((129, 3, 128), (BF16, BF16), 1.0, "dv", {"logit_scale": -2.0}),
]


def truth_of(inputs, implementation, options):
    hidden, targets, unembedding, weights, cotangents = inputs
    promised = contract(
        hidden, unembedding, operands=options.get("operands"), dlogits=options.get("dlogits"), implementation=implementation
    )
    if options.get("operands"):
        hidden, unembedding = hidden.astype(BF16), unembedding.astype(BF16)
    kept = {name: value for name, value in options.items() if name not in ("operands", "dlogits")}
    outputs = (inputs[0].dtype.name, inputs[2].dtype.name)
    return Truth(
        hidden, targets, unembedding, masked_of(targets, weights), cotangents, dlogits=promised["dlogits"], outputs=outputs, **kept
    )


@pytest.mark.parametrize("implementation", [pytest.param("rust", marks=each_jaxlib), "jax"])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_values_and_gradients_are_those_of_the_plain_loss(case, implementation):
    shape, dtypes, deviation, layout, options = CASES[case]
    inputs = problem(shape, dtypes, deviation, layout)
    options = {"layout": layout, **options}
    targets = inputs[1]
    if "valid_vocab" in options:
        np.minimum(targets, options["valid_vocab"] - 1, out=targets)
    values, gradients = run(*inputs, implementation=implementation, **options)
    assert [x.dtype.name for x in values] == ["float32"] * 3
    assert [x.dtype for x in gradients] == [inputs[0].dtype, inputs[2].dtype]
    assert truth_of(inputs, implementation, options).excess(values, gradients) <= 1


def test_the_bound_refuses_what_is_wrong():
    for dtypes, deviation, options in [((F32, F32), 1.0, {}), ((BF16, BF16), 1.0, {}), ((F32, F32), 30.0, {"operands": "bfloat16"})]:
        inputs = problem((37, 40, 700), dtypes, deviation)
        truth = truth_of(inputs, "rust", options)
        values, (dq, dk) = ([np.asarray(x, np.float64) for x in xs] for xs in run(*inputs, implementation="rust", **options))
        loss, lse, label = values
        assert truth.excess(values, (dq, dk)) <= 1
        bf16 = lambda x: x.astype(BF16).astype(np.float64)
        for wrong, gradients in [
            (values, (0 * dq, dk)),
            (values, (dq, 0 * dk)),
            (values, (np.roll(dq, 1, axis=0), dk)),
            (values, (dq, np.roll(dk, 1, axis=0))),
            (values, (dq, np.roll(dk, 1, axis=1))),
            (values, (1.02 * dq, dk)),
            (values, (dq, 4 * dk)),
            ((bf16(loss), lse, label), (dq, dk)),
            ((loss, bf16(lse), label), (dq, dk)),
            ((loss, lse, bf16(label)), (dq, dk)),
            (values, (np.where(dq == dq.max(), np.nan, dq), dk)),
        ]:
            assert not truth.excess(wrong, gradients) <= 1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "reduction, denominator", [("sum", "valid"), ("mean", "valid"), ("mean", "tokens"), ("mean", 7.5)]
)
def test_reductions_and_the_gradient_of_weights(reduction, denominator, implementation):
    hidden, targets, unembedding, weights, _ = problem((37, 8, 30), (F32, F32), 1.0)
    masked = masked_of(targets, weights)

    def plain(q, k, w):
        w = jnp.where(masked, 0, w)
        total = jnp.sum(w * per_token(q, targets, k, masked, {**PLAIN, "z_loss": 0.1})[0])
        return total if reduction == "sum" else total / {"valid": jnp.sum(w), "tokens": w.size}.get(denominator, denominator)

    fused = lambda q, k, w: fused_cross_entropy(
        q, targets, k, w, reduction=reduction, denominator=denominator, z_loss=0.1, implementation=implementation
    ).reduced
    with float64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in (hidden, unembedding, weights)]
        expected = jax.value_and_grad(plain, (0, 1, 2))(*wide)
    found = jax.value_and_grad(fused, (0, 1, 2))(hidden, unembedding, weights)
    # Sums of 37 tokens beside those of the kernel (30 columns, 8 features), of numbers of the size of a few.
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(x, y, rtol=(37 + 30 + 8 + 32) * 2.0**-24, atol=107 * 2.0**-24 * np.max(np.abs(y)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_masked_or_padding_is_not_read(implementation):
    hidden, targets, unembedding, weights, cotangents = problem((37, 24, 300), (BF16, BF16), 1.0)
    masked = masked_of(targets, weights)
    targets = np.minimum(targets, 270)
    options = {"valid_vocab": 271, "implementation": implementation}
    clean = run(hidden, targets, unembedding, weights, cotangents, **options)
    hidden[masked], unembedding[271:] = np.nan, np.nan
    targets[weights == 0] = 99999
    found = run(hidden, targets, unembedding, weights, cotangents, **options)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(clean)):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    for x in (*found[0], found[1][0]):
        assert not np.asarray(x, np.float32)[masked].any()
    assert not np.asarray(found[1][1], np.float32)[271:].any()
    none = fused_cross_entropy(hidden, np.full_like(targets, -100), unembedding, **options)
    assert none.reduced == 0 and not none.loss.any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tokens_come_in_any_shape_and_targets_in_any_integers(implementation):
    hidden, targets, unembedding, weights, _ = problem((24, 8, 100), (BF16, BF16), 1.0)
    flat = fused_cross_entropy(hidden, targets, unembedding, weights, implementation=implementation)
    cube = fused_cross_entropy(
        hidden.reshape(2, 3, 4, 8), targets.reshape(2, 3, 4), unembedding, weights.reshape(2, 3, 4), implementation=implementation
    )
    assert cube.loss.shape == (2, 3, 4) and isinstance(cube, CrossEntropy)
    np.testing.assert_array_equal(cube.loss.reshape(-1), flat.loss)
    one = fused_cross_entropy(hidden[0], targets[0], unembedding, implementation=implementation)
    assert one.lse.shape == () and one.lse == flat.lse[0]
    for dtype in (np.int8, np.int16, np.uint8, np.uint32):
        # None of 100 ids is -100 in an unsigned type: mask by weight.
        again = np.where(targets < 0, 0, targets).astype(dtype)
        loss = fused_cross_entropy(hidden, again, unembedding, weights * (targets >= 0), implementation=implementation).loss
        np.testing.assert_array_equal(loss, flat.loss)
    with float64(True):
        wide = fused_cross_entropy(hidden, targets.astype(np.int64), unembedding, weights, implementation=implementation)
        np.testing.assert_array_equal(wide.loss, flat.loss)
        assert wide.loss.dtype == wide.reduced.dtype == jnp.float32


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_not_finite_shows_and_spreads_no_further(implementation):
    hidden, targets, unembedding, weights, cotangents = problem((13, 8, 40), (F32, F32), 1.0)
    hidden[1], hidden[2] = np.nan, np.inf
    (loss, lse, label), (dq, dk) = run(hidden, targets, unembedding, weights, cotangents, implementation=implementation)
    for x in (loss, lse, dq):
        finite = np.isfinite(x).reshape(13, -1).all(axis=1)
        np.testing.assert_array_equal(np.flatnonzero(~finite), [1, 2])
    assert np.isnan(dk).any()


def test_results_do_not_depend_on_the_number_of_threads():
    inputs = problem((200, 40, 700), (BF16, F32), 3.0)
    results = []
    try:
        for threads in (1, 2, 3):
            set_threads(threads)
            assert f"{threads} threads" in implementation("cpu").detail
            results.append([np.asarray(x).tobytes() for x in jax.tree.leaves(run(*inputs, implementation="rust"))])
    finally:
        set_threads(0)
    assert results[0] == results[1] == results[2]


REFUSED = [
    ({"hidden": np.ones((3, 4), np.int32)}, TypeError, "hidden: dtype int32; expected bfloat16, float16, float32"),
    ({"unembedding": np.ones((5, 4), np.int32)}, TypeError, "unembedding: dtype int32"),
    ({"hidden": np.float32(1)}, ValueError, "hidden: a scalar"),
    ({"hidden": np.ones((3, 6), np.float32)}, ValueError, r"unembedding: shape \[5, 4\].*expected D = 6"),
    ({"unembedding": np.ones(4, np.float32)}, ValueError, r"unembedding: shape \[4\]; expected \[V, D\]"),
    ({"unembedding": np.ones((0, 4), np.float32)}, ValueError, "V and D of 1 or more"),
    ({"hidden": np.ones((3, 0), np.float32), "unembedding": np.ones((5, 0), np.float32)}, ValueError, "V and D of 1 or more"),
    ({"targets": np.zeros(4, np.int32)}, ValueError, r"targets: shape \[4\]; expected \[3\]"),
    ({"targets": np.zeros(3, np.float32)}, TypeError, "targets: dtype float32; expected integers"),
    ({"token_weights": np.ones(2, np.float32)}, ValueError, r"token_weights: shape \[2\]; expected \[3\]"),
    ({"token_weights": np.ones(3, np.int32)}, TypeError, "token_weights: dtype int32"),
    ({"layout": "vD"}, ValueError, "layout is 'vD'; expected one of 'vd', 'dv'"),
    ({"valid_vocab": 6}, ValueError, "valid_vocab is 6; expected 1 to 5"),
    ({"valid_vocab": 2.5}, TypeError, "valid_vocab is 2.5; expected an integer"),
    ({"ignore_index": 2**70}, ValueError, "ignore_index is"),
    ({"logit_scale": 0.0}, ValueError, "logit_scale is 0.0; expected a finite number, one other than 0"),
    ({"logit_softcap": -1}, ValueError, "logit_softcap is -1"),
    ({"z_loss": float("nan")}, ValueError, "z_loss is nan"),
    ({"z_loss": jnp.ones(())}, TypeError, "z_loss is .*known when the call is traced"),
    ({"label_smoothing": 1.0}, ValueError, "label_smoothing is 1.0"),
    ({"reduction": "avg"}, ValueError, "reduction is 'avg'"),
    ({"denominator": "all"}, ValueError, "denominator is 'all'"),
    ({"denominator": np.ones(3)}, ValueError, r"denominator has shape \[3\]"),
    ({"dlogits": "fp8"}, ValueError, "dlogits is 'fp8'"),
    ({"operands": "float16"}, ValueError, "operands is 'float16'"),
    ({"operands": "bfloat16", "hidden": np.ones((3, 4), np.float16)}, TypeError, "an array float16"),
    ({"implementation": "cuda"}, ValueError, "implementation is 'cuda'"),
    ({"vocab_axis": "model"}, ValueError, "no axis 'model' here"),
    ({"token_axes": ("data",)}, ValueError, "no axis 'data' here"),
]


def test_calls_that_make_no_sense_are_refused():
    plain = {"hidden": np.ones((3, 4), np.float32), "targets": np.zeros(3, np.int32), "unembedding": np.ones((5, 4), np.float32)}
    for changed, kind, message in REFUSED:
        with pytest.raises(kind, match=message):
            fused_cross_entropy(**{**plain, **changed})
    with pytest.raises(ValueError, match="threads is -1"):
        set_threads(-1)


@each_jaxlib
def test_bad_tokens_are_errors_where_rust_runs_and_nan_where_jax_does():
    hidden, targets, unembedding, weights, cotangents = problem((13, 8, 40), (F32, F32), 1.0)
    for wrong, message in [
        ((np.where(np.arange(13) == 3, 40, targets), weights), r"targets\[3\] = 40 is not in \[0, 40\) and not ignore_index"),
        ((np.where(np.arange(13) == 3, -7, targets), weights), r"targets\[3\] = -7 is not"),
        ((targets, np.where(np.arange(13) == 3, np.inf, weights)), r"token_weights\[3\] = inf is not finite"),
    ]:
        targets_, weights_ = wrong[0].astype(np.int32), wrong[1].astype(np.float32)
        with pytest.raises(Exception, match="INVALID_ARGUMENT: fused_cross_entropy: " + message):
            jax.block_until_ready(run(hidden, targets_, unembedding, weights_, cotangents, implementation="rust"))
        (loss, _, label), (dq, dk) = run(hidden, targets_, unembedding, weights_, cotangents, implementation="jax")
        for x in (loss, label, dq):
            np.testing.assert_array_equal(np.flatnonzero(np.isnan(x).reshape(13, -1).any(axis=1)), [3])
        assert np.isnan(dk).all()


@each_jaxlib
@pytest.mark.filterwarnings("ignore::fused_xent.jax.FallbackWarning")
def test_the_implementation_is_chosen_for_the_platform_when_lowered():
    hidden, targets, unembedding, _, _ = problem((13, 8, 300), (BF16, BF16), 1.0)
    both = lambda q, k: jax.value_and_grad(lambda q, k: fused_cross_entropy(q, targets, k).reduced, (0, 1))(q, k)
    traced = jax.jit(both).trace(hidden, unembedding)
    text = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu", "cuda")}
    assert text["cpu"].count("@fused_xent_") == 2 and "while" not in text["cpu"]
    for platform in ("tpu", "cuda"):
        assert "fused_xent_" not in text[platform] and "while" in text[platform]


def test_where_jax_runs_it_says_so_once(monkeypatch):
    assert implementation() == implementation("cpu") and implementation().name == "rust"
    assert implementation("tpu").name == "rust" and "v6e" in implementation("tpu").detail
    assert implementation("cuda").name == "jax"
    call = functools.partial(fused_cross_entropy, np.ones((3, 4), np.float32), np.zeros(3, np.int32), np.ones((5, 4), np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        call()
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(choice, "_warned", set())
        with pytest.raises(FallbackWarning, match="runs on cpu and tpu, not on gpu"):
            call()
        call()
    assert contract(jnp.bfloat16, jnp.float32)["dlogits"] == "f32"


def test_contracts_are_what_the_kernels_promise():
    for of, options, expected in [
        ((jnp.bfloat16, jnp.bfloat16), {}, ("bf16", "bf16", "bf16")),
        ((jnp.bfloat16, jnp.bfloat16), {"dlogits": "bf16x2"}, ("bf16x2", "bf16", "bf16")),
        ((jnp.float32, jnp.float32), {"operands": jnp.bfloat16}, ("bf16x2", "f32", "f32")),
        ((jnp.bfloat16, jnp.float32), {"operands": "bfloat16"}, ("bf16x2", "bf16", "f32")),
        ((jnp.bfloat16, jnp.float32), {}, ("f32", "bf16", "f32")),
        ((jnp.ones(2, jnp.float16), jnp.ones(2)), {}, ("f32", "f16", "f32")),
    ]:
        for implementation in IMPLEMENTATIONS:
            found = contract(*of, implementation=implementation, **options)
            if implementation == "rust" and "bf16" not in choice.implementation("cpu").detail:
                expected = ("f32", *expected[1:])
            assert (found["dlogits"], found["d_hidden"], found["d_unembedding"]) == expected
            assert found["logits"] == found["accumulate"] == "f32"
