"""Runs StableHLO modules with JAX's CPU backend: `run.py FOLDER`.

Each NAME.json in FOLDER lists arguments and results, [dtype, shape] each; NAME.mlir is the module, NAME.in.I the arguments and
NAME.out.I the results, raw and little-endian.
"""

import json
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from jaxlib import xla_client

DTYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32, "i32": np.int32}


def compile_text(text):
    device = jax.devices("cpu")[0]
    devices = xla_client.DeviceList((device,))
    return device, device.client.compile_and_load(text.encode(), devices, xla_client.CompileOptions())


def main(folder):
    for spec in sorted(folder.glob("*.json")):
        name = spec.stem
        inputs, outputs = json.loads(spec.read_text())
        device, program = compile_text((folder / f"{name}.mlir").read_text())
        arguments = [
            jax.device_put(np.fromfile(folder / f"{name}.in.{i}", DTYPES[dtype]).reshape(shape), device)
            for i, (dtype, shape) in enumerate(inputs)
        ]
        results = program.execute(arguments)
        assert len(results) == len(outputs), name
        for i, (result, (dtype, shape)) in enumerate(zip(results, outputs)):
            result = np.asarray(result)
            assert result.dtype == DTYPES[dtype] and list(result.shape) == shape, (name, i, result.dtype, result.shape)
            result.tofile(folder / f"{name}.out.{i}")


main(Path(sys.argv[1]))
