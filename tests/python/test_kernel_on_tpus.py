"""The kernels for TPUs in JAX: compiled for TPUs that are not here, what is around them computed, and what they do not take.

The kernels' own arithmetic is proven where they are written, in Rust.
"""

import functools
import hashlib
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from jax import export, lax
from jax.sharding import Mesh, PartitionSpec as P
from plain import BF16, Truth
from test_kernel_abi import options as options_of
from tpu_programs import D, EVERY_OPTION, N, TILES, V

from fused_xent._native import TpuSpec
from fused_xent.jax import FallbackWarning, Tpu, choice, chunked, contract, fused_cross_entropy, implementation, rules, tpu

each_jaxlib = pytest.mark.each_jaxlib
OLDER = jax.__version_info__ < (0, 10)
TOPOLOGIES = {"v6e": "v6e:2x2"} if OLDER else {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
NO_OPTION = {"logit_scale": 1.0, "logit_softcap": None, "z_loss": 0.0, "label_smoothing": 0.0}
ARRAYS = (np.ones((48, 24), BF16), np.arange(48, dtype=np.int32), np.ones((320, 24), BF16))


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(choice, "_warned", set())


@pytest.fixture(scope="module")
def compiled():
    """What is in the programs of `tpu_programs.py`, by generation."""
    library = subprocess.run([ROOT / "tests/scripts/libtpu"], capture_output=True, text=True, timeout=600)
    if library.returncode != 0:
        pytest.skip(f"nothing is compiled for TPUs: {library.stderr.strip()}")
    path = os.pathsep.join([str(ROOT / "python"), str(ROOT / "tests/python")])
    # Without these libtpu asks a server for what kind of machine this is, and no two processes may load it.
    alone = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    environment = {**os.environ, **alone, "TPU_LIBRARY_PATH": library.stdout.strip(), "PYTHONPATH": path}
    program = [sys.executable, str(ROOT / "tests/python/tpu_programs.py"), *TOPOLOGIES.values()]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(TOPOLOGIES, json.loads(done.stdout).values()))


def digests(program):
    return [hashlib.sha256(body.encode()).hexdigest() for _, body in program.kernels]


def spec(generation, inputs, *, shape=(N, D, V), layout="vd", valid_vocab=None, **options):
    options = {**NO_OPTION, **options}
    return TpuSpec(generation, shape, inputs, layout=layout, valid_vocab=valid_vocab or shape[2], **options)


def check(facts, forward, backward):
    assert facts["kernels"] == {"fused_xent_forward": digests(forward), "fused_xent_backward": digests(backward)}
    # Logits would take at least two bytes each.
    assert facts["workspace"] < 2 * N * V


@each_jaxlib
@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_the_kernels_that_rust_writes_are_in_the_compiled_program(compiled, generation):
    ours = spec(generation, ("bfloat16", "bfloat16"))
    facts = compiled[generation]["on_one"]
    check(facts, ours.forward(), ours.backward(("bfloat16", "bfloat16"), "bf16"))
    assert not facts["collectives"]


@each_jaxlib
@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_each_device_of_a_shard_map_runs_them_on_its_own_tokens(compiled, generation):
    ours = spec(generation, ("bfloat16", "bfloat16"))
    facts = compiled[generation]["gathered"]
    check(facts, ours.forward(), ours.backward(("bfloat16", "float32"), "bf16x2"))
    assert "all-gather" in facts["collectives"]


@each_jaxlib
def test_in_a_scan_that_makes_each_microbatch_again(compiled):
    ours = spec("v6e", ("bfloat16", "bfloat16"))
    facts = compiled["v6e"]["microbatches"]
    backward = ours.backward(("bfloat16", "float32"), "bf16x2")
    assert facts["kernels"] == {"fused_xent_forward": 2 * digests(ours.forward()), "fused_xent_backward": digests(backward)}
    assert facts["workspace"] < 2 * N * V


@each_jaxlib
def test_float32_every_option_and_tiles_of_ones_own(compiled):
    ours = spec("v6e", ("float32", "float32"), layout="dv", **EVERY_OPTION)
    backward = ours.backward(("float32", "float32"), "f32", TILES.backward)
    check(compiled["v6e"]["in_float32"], ours.forward(TILES.forward), backward)


def loss_and_gradients(*arrays, **options):
    call = lambda q, k: fused_cross_entropy(q, arrays[1], k, *arrays[3:], **options).reduced
    return jax.value_and_grad(call, (0, 1))(arrays[0], arrays[2])


def lowered(*arrays, platforms=("tpu",), transform=lambda f: f, **options):
    program = transform(lambda *arrays: loss_and_gradients(*arrays, **options))
    return jax.jit(program).trace(*arrays).lower(lowering_platforms=platforms).as_text()


@each_jaxlib
def test_one_traced_program_serves_cpus_and_tpus():
    traced = jax.jit(lambda *arrays: loss_and_gradients(*arrays, tpu="v6e")).trace(*ARRAYS)
    on_tpu = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert on_tpu.count("@tpu_custom_call") == 2 and "@fused_xent_forward" not in on_tpu and "while" not in on_tpu
    on_cpu = traced.lower(lowering_platforms=("cpu",))
    assert on_cpu.as_text().count("@fused_xent_") == 2 and "tpu_custom_call" not in on_cpu.as_text()
    found = on_cpu.compile()(*ARRAYS)
    expected = loss_and_gradients(*ARRAYS, implementation="rust")
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_array_equal(x, y)


@each_jaxlib
def test_an_exported_program_of_both_runs_here():
    program = jax.jit(lambda *arrays: loss_and_gradients(*arrays, tpu="v5p"))
    exported = export.export(program, platforms=("cpu", "tpu"), disabled_checks=[
        export.DisabledSafetyCheck.custom_call(name)
        for name in ("tpu_custom_call", "fused_xent_forward", "fused_xent_backward")
    ])(*ARRAYS)  # fmt: skip
    assert "tpu_custom_call" in exported.mlir_module() and "fused_xent_backward" in exported.mlir_module()
    for x, y in zip(jax.tree.leaves(exported.call(*ARRAYS)), jax.tree.leaves(program(*ARRAYS))):
        np.testing.assert_array_equal(x, y)


@each_jaxlib
def test_under_transformations():
    hidden, targets, unembedding = ARRAYS
    cut = lambda x: x.reshape(4, 12, *x.shape[1:])
    arrays = (cut(hidden), cut(targets), unembedding)
    for transform, of in [
        (lambda f: jax.vmap(f, (0, 0, None)), arrays),
        (lambda f: lambda q, t, k: lax.map(lambda qt: f(*qt, k), (q, t)), arrays),
        (lambda f: jax.checkpoint(f), ARRAYS),
        (lambda f: lambda q, t, k: (f(q, t, k), f(q, t, 2 * k)), arrays),
    ]:
        text = lowered(*of, transform=transform, tpu="v6e", implementation="rust")
        assert text.count("@tpu_custom_call") >= 2


def test_outside_of_any_jit():
    operands = [jnp.asarray(x) for x in (*ARRAYS, np.ones(48, np.float32), np.int32(0))]
    of = options_of(valid_vocab=320, vocab=320)
    with jax.disable_jit():
        found = tpu.forward(of, *operands)
    for x, y in zip(found, jax.jit(functools.partial(chunked.forward, of))(*operands)):
        np.testing.assert_array_equal(x, y)


@each_jaxlib
def test_what_rust_puts_around_the_kernels_is_there_to_the_word():
    """Two cores whose shares of dQ are added, and three chunks of tokens, the last one not whole."""
    arrays = (np.ones((350, 24), BF16), np.arange(350, dtype=np.int32), np.ones((400, 24), BF16))
    program = lambda *arrays: loss_and_gradients(*arrays, tpu=Tpu("v5p", (128, 128), (128, 128, 128)))
    module = jax.jit(program).trace(*arrays).lower(lowering_platforms=("tpu",)).compiler_ir()
    functions = [f for f in module.body.operations if "fused_xent_kernels" in str(f.attributes["sym_name"])]
    ours = spec("v5p", ("bfloat16", "bfloat16"), shape=(350, 24, 400))
    ours = [ours.forward((128, 128)), ours.backward(("bfloat16", "bfloat16"), "bf16", (128, 128, 128))]
    assert [len(program.kernels) for program in ours] == [1, 3] and len(functions) == 2
    for function, program in zip(functions, ours):
        alone = type(module).parse(program.text, module.context)
        (main,) = alone.body.operations
        assert operations(function) == operations(main) and len(operations(main)) > 3


def operations(function):
    return [str(operation) for operation in function.regions[0].blocks[0].operations]


def refused(name, *arrays, inside=lambda f: f, **options):
    """Runs in JAX and says why once, and is an error where the kernel is asked for."""
    with pytest.warns(FallbackWarning, match=name) as said:
        text = lowered(*arrays, transform=inside, **options)
    assert len(said) == 1 and "tpu_custom_call" not in text and "while" in text
    with pytest.raises(ValueError, match=name):
        lowered(*arrays, transform=inside, implementation="rust", **options)


@each_jaxlib
def test_what_they_do_not_take_runs_in_jax_and_says_so_once():
    hidden, targets, unembedding = ARRAYS
    refused("hidden is float16; a TPU kernel takes bfloat16 or float32", hidden.astype(np.float16), *ARRAYS[1:], tpu="v6e")
    refused("the generation of the TPU is not known here; say tpu=, one of v4, v5e", *ARRAYS)
    refused(r"D = 9000, .* go up to .* D = 8192", np.ones((48, 9000), BF16), targets, np.ones((320, 9000), BF16), tpu="v4")
    mesh = Mesh(np.array(jax.devices()), "model")
    split = lambda f: jax.shard_map(
        f, mesh=mesh, in_specs=(P(), P(), P("model")), out_specs=(P(), (P(), P("model"))), check_vma=False
    )
    refused("take a whole vocabulary, not a shard of it", *ARRAYS, inside=split, vocab_axis="model", tpu="v6e")
    nothing = lowered(np.ones((0, 24), BF16), np.ones(0, np.int32), unembedding, tpu="v6e", implementation="rust")
    assert "tpu_custom_call" not in nothing


@each_jaxlib
def test_tiles_that_do_not_fit_are_errors():
    for tiles, message in [
        (Tpu("v6e", forward=(100, 128)), "a tile of 100 tokens by 128 vocab ids: both must be multiples of 128"),
        (Tpu("v6e", backward=(128, 128, 100)), "100 tokens at a time: expected a multiple of the tile's 128"),
        (Tpu("v4", forward=(65536, 1024)), "needs .* MiB of VMEM; a core of v4 has 15 MiB; .* fits"),
        (Tpu("v9"), "the generation of tpu is 'v9'; expected one of None, 'v4'"),
        (Tpu(forward=128), "tpu has forward=128; expected 2 numbers"),
        (Tpu(forward=(128,)), r"tpu has forward=\(128,\); expected 2 numbers"),
        (Tpu(backward=(128, 128, -1)), "a size in .* is -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            lowered(*ARRAYS, tpu=tiles)
    with pytest.raises(TypeError, match="tpu is 6; expected the name of a generation or a fused_xent.jax.Tpu"):
        lowered(*ARRAYS, tpu=6)
    two = lowered(*ARRAYS, tpu=Tpu("v6e", backward=(128, 128, 0)))
    assert re.findall(r'kernel_name = "(\w+)"', two) == ["fused_xent_forward", "fused_xent_d_hidden", "fused_xent_d_unembedding"]
    with pytest.raises(ValueError, match="TPU generation \"v9\": expected one of v4, v5e, v5p, v6e, v7x"):
        spec("v9", ("bfloat16", "bfloat16"))


def test_the_generation_is_that_of_the_devices():
    def of(kind):
        return tpu._generation(SimpleNamespace(module_context=SimpleNamespace(get_backend=lambda: client(kind))))

    client = lambda kind: SimpleNamespace(devices=lambda: [SimpleNamespace(device_kind=kind)])
    kinds = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "v7x"}
    assert {kind: of(kind) for kind in kinds} == kinds
    with pytest.raises(ValueError, match="no kernels for the TPUs of kind 'TPU v3', only for v4, v5e"):
        of("TPU v3")


def test_what_runs_and_what_it_promises(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert implementation().name == "rust" and implementation().detail == "Mosaic kernels for TPUs: v4, v5e, v5p, v6e, v7x"
    assert contract(jnp.bfloat16, jnp.bfloat16)["dlogits"] == "bf16"
    assert contract(jnp.float32, jnp.float32, operands="bfloat16")["dlogits"] == "bf16x2"
    assert contract(jnp.bfloat16, jnp.float32, implementation="rust")["dlogits"] == "f32"


class AsPromised:
    """A kernel's program by what it promises: labels are ids, and −1 where a token takes no part."""

    def __init__(self, name):
        self.compute = getattr(chunked, name)

    def bind(self, hidden, unembedding, labels, *per_token, text, results):
        changed = SimpleNamespace(**{**vars(text), "ignore_index": -1, "poison": False})
        assert hidden.ndim == 2 and labels.ndim == 1 and labels.dtype == jnp.int32 and len(results) in (2, 3)
        return self.compute(changed, hidden, labels, unembedding, jnp.ones(labels.shape), jnp.int32(0), *per_token)


@pytest.fixture
def as_promised(monkeypatch):
    """Has the CPU compute what is around the kernels, and them as they promise."""
    run = lambda name, options, *operands: tpu._run(SimpleNamespace(text=options), options, name, *operands)
    monkeypatch.setattr(tpu, "_kernels", {name: AsPromised(name) for name in ("forward", "backward")})
    monkeypatch.setattr(rules, "_run", run)
    monkeypatch.setattr(chunked, "TILE", 128)


def test_what_is_around_the_kernels(as_promised):
    random = np.random.default_rng(3)
    hidden = random.standard_normal((2, 3, 8, 24)).astype(BF16)
    unembedding = (0.5 * random.standard_normal((24, 301))).astype(BF16)
    targets = random.integers(0, 280, (2, 3, 8)).astype(np.int32)
    weights = random.uniform(0.3, 1.7, targets.shape).astype(np.float32)
    targets[:, 0, ::3], weights[:, 1, ::4] = -7, 0
    masked = (targets == -7) | (weights == 0)
    targets[weights == 0] = 99999
    hidden[masked] = np.nan
    options = {"z_loss": 1e-2, "label_smoothing": 0.1, "logit_softcap": 20.0, "valid_vocab": 290, "layout": "dv"}
    cotangents = [random.standard_normal(targets.shape).astype(np.float32) for _ in range(3)]

    @jax.jit
    def run(targets):
        call = lambda q, k: tuple(fused_cross_entropy(q, targets, k, weights, ignore_index=-7, reduction="none", **options)[:3])
        values, pullback = jax.vjp(call, hidden, unembedding)
        return values, pullback(tuple(cotangents))

    values, (dq, dk) = run(targets)
    flat = lambda x: np.asarray(x).reshape(-1)
    ids = np.where(masked, 0, targets)
    clean = np.where(masked[..., None], 0, hidden).astype(BF16)
    truth = Truth(
        clean.reshape(-1, 24), flat(ids), unembedding, flat(masked), [flat(g) for g in cotangents],
        dlogits="bf16", outputs=("bfloat16", "bfloat16"), **options,
    )  # fmt: skip
    assert dq.shape == hidden.shape and truth.excess([flat(x) for x in values], (dq.reshape(-1, 24), dk)) <= 1
    assert not truth.excess([flat(x) for x in values], (np.roll(dq.reshape(-1, 24), 1, axis=0), dk)) <= 1

    # A target that is no id: its own results, its row of dQ and all of dK.
    wrong = np.where(np.arange(48).reshape(2, 3, 8) == 20, 290, targets).astype(np.int32)
    assert not masked.reshape(-1)[20]
    values, (dq, dk) = run(wrong)
    for x in (*values, dq):
        assert np.flatnonzero(np.isnan(np.asarray(x, np.float32)).reshape(48, -1).any(axis=1)).tolist() == [20]
    assert np.isnan(np.asarray(dk, np.float32)[:, :290]).all()
