"""The structs that the Rust handlers share with XLA, and calls that no wrapper would make."""

import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fused_xent import _native
from fused_xent.jax import Tpu, fused_cross_entropy, rust
from fused_xent.jax.options import Options

pytestmark = pytest.mark.each_jaxlib
PRINTER = """
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include "xla/ffi/api/c_api.h"
int main(void) {
%s
}
"""


def test_the_structs_lie_as_in_the_header_of_this_jaxlib(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler to ask")
    ours = dict(_native.xla_layout())
    lines = []
    for name in ours:
        struct, _, field = name.partition(".")
        value = f"offsetof({struct}, {field})" if field else name if name.endswith("_STRUCT_SIZE") else f"sizeof({struct})"
        lines.append(f'printf("{name} %zu\\n", (size_t){value});')
    source = tmp_path / "layout.c"
    source.write_text(PRINTER % "\n".join(lines))
    include = jax.ffi.include_dir()
    subprocess.run([compiler, "-I", include, "-o", tmp_path / "layout", source], check=True, timeout=120)
    printed = subprocess.run([tmp_path / "layout"], check=True, capture_output=True, text=True, timeout=60).stdout
    assert {name: int(value) for name, value in map(str.split, printed.splitlines())} == ours


def options(**changed):
    fields = dict(
        layout="vd", ignore_index=-100, valid_vocab=5, logit_scale=1.0, logit_softcap=0.0, z_loss=0.0, label_smoothing=0.0,
        vocab=5, vocab_axes=(), operands=None, gradients=("float32", "float32"), dlogits="f32", poison=False, implementation="rust", tpu=Tpu(),
    )  # fmt: skip
    return Options(**{**fields, **changed})


OPERANDS = (np.ones((3, 4), np.float32), np.zeros(3, np.int32), np.ones((5, 4), np.float32), np.ones(3, np.float32), np.int32(0))
PER_TOKEN = jax.ShapeDtypeStruct((3,), jnp.float32)


def raw(name, results, operands, attributes):
    return jax.block_until_ready(jax.ffi.ffi_call(name, results)(*operands, **attributes))


def test_the_handlers_take_nothing_on_trust():
    attributes = rust._attributes(options())
    assert len(raw("fused_xent_forward", (PER_TOKEN,) * 3, OPERANDS, attributes)) == 3

    def operand(i, x):
        return {"operands": OPERANDS[:i] + (x,) + OPERANDS[i + 1 :]}

    for changed, message in [
        ({"operands": OPERANDS[:3]}, "token_weights: no array in place 3 of 3"),
        (operand(0, np.ones((3, 4), np.int32)), "hidden: XLA's data type 4, expected bfloat16, float16 or float32"),
        (operand(0, np.float32(1)), "expected .*two dimensions"),
        (operand(0, np.ones((2, 4), np.float32)), "hidden has 8 elements, but its shape 3 × 4 needs 12"),
        (operand(0, np.ones((3, 6), np.float32)), "hidden has D = 6, the unembedding 4"),
        (operand(1, np.zeros(3, np.float32)), "targets: XLA's data type 11, expected int32, int64 or uint32"),
        (operand(2, np.ones((5, 4, 1), np.float32)), "expected .*two dimensions"),
        (operand(2, np.ones((0, 4), np.float32)), "both must be at least 1"),
        (operand(3, np.ones(3, np.float16)), "token_weights: XLA's data type 10, expected float32"),
        (operand(3, np.ones(2, np.float32)), "token_weights has 2 elements"),
        (operand(4, np.zeros(2, np.int32)), "start has 2 elements, expected 1"),
        (operand(4, np.int32(-1)), "start is -1"),
        (operand(4, np.int32(1)), "does not lie in the whole vocabulary"),
        ({"results": (PER_TOKEN,) * 2}, "label_logits: no array in place 2 of 2"),
        ({"results": (jax.ShapeDtypeStruct((4,), jnp.float32),) * 3}, "loss: not a float32 result of 3 elements"),
        ({"results": (jax.ShapeDtypeStruct((3,), jnp.float16),) * 3}, "loss: not a float32 result"),
        ({"attributes": {**attributes, "layout": "dd"}}, 'layout is "dd"'),
        ({"attributes": {**attributes, "layout": np.int64(0)}}, "attribute layout: not a text"),
        ({"attributes": {**attributes, "z_loss": "1"}}, "attribute z_loss: not a scalar"),
        ({"attributes": {**attributes, "z_loss": np.float32(1)}}, "attribute z_loss: not a scalar"),
        ({"attributes": {**attributes, "dlogits": "f8"}}, 'dlogits is "f8"'),
        ({"attributes": {n: x for n, x in attributes.items() if n != "total"}}, "attribute total is missing"),
        ({"attributes": {**attributes, "valid_vocab": np.int64(6)}}, "valid_vocab = 6 must be between 1 and the vocab size 5"),
        ({"attributes": {**attributes, "logit_softcap": np.float64(-1)}}, "logit_softcap = -1"),
        ({"attributes": {**attributes, "total": np.int64(-1)}}, "total is -1"),
        ({"attributes": {**attributes, "total": np.int64(9)}}, "the forward needs the whole vocabulary"),
    ]:
        call = {"results": (PER_TOKEN,) * 3, "operands": OPERANDS, "attributes": attributes, **changed}
        with pytest.raises(Exception, match="INVALID_ARGUMENT: fused_cross_entropy: .*" + message):
            raw("fused_xent_forward", **call)

    gradients = (jax.ShapeDtypeStruct((3, 4), jnp.float32), jax.ShapeDtypeStruct((5, 4), jnp.float32))
    whole = (*OPERANDS, *[np.ones(3, np.float32)] * 4)
    assert len(raw("fused_xent_backward", gradients, whole, attributes)) == 2
    for results, operands, message in [
        (gradients, whole[:8], "cotangent of label_logits: no array"),
        (gradients, (*whole[:7], np.ones(1, np.float32), whole[8]), "lse cotangent has 1 elements, expected 3"),
        (gradients[::-1], whole, "d_hidden has 20 elements, expected 12"),
        ((jax.ShapeDtypeStruct((3, 4), jnp.bfloat16), gradients[1]), whole, "d_hidden was asked for in bfloat16"),
        ((gradients[0], jax.ShapeDtypeStruct((5, 4), jnp.int32)), whole, "d_unembedding: XLA's data type 4"),
    ]:
        with pytest.raises(Exception, match="INVALID_ARGUMENT: fused_cross_entropy: .*" + message):
            raw("fused_xent_backward", results, operands, attributes)
    assert fused_cross_entropy(*OPERANDS[:3], implementation="rust").lse.shape == (3,), "and nothing is broken after that"


def test_a_kernel_that_this_machine_does_not_have_is_an_error():
    program = "import jax, numpy as np; from fused_xent.jax import fused_cross_entropy as f, implementation\n"
    program += "x = np.ones((3, 4), np.float32)\n"
    program += "for call in (lambda: f(x, np.zeros(3, np.int32), x), implementation):\n"
    program += "    try: jax.block_until_ready(call())\n    except Exception as error: print(error)"
    environment = {**os.environ, "FUSED_XENT_KERNEL": "abacus"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for line, start in zip(done.stdout.splitlines(), ("FAILED_PRECONDITION: fused_cross_entropy: ", "")):
        assert line.startswith(f"{start}FUSED_XENT_KERNEL is `abacus`, expected one of the kernels of this machine:")
    assert len(done.stdout.splitlines()) == 2
