"""What the tests share: four CPU devices, and a reader of dumps that is no part of what is tested."""

import json
import os
import pathlib
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"

ROOT = pathlib.Path(__file__).resolve().parents[2]
os.environ.setdefault("XENT_DIFF", str(ROOT / "target/debug/xent-diff"))
sys.path += [str(ROOT / "examples/jax"), str(ROOT / "tests/python")]

import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402


def folders(root, step):
    """The committed folders of a step, by part: {"shared": [manifest, …], "mb_0000": …}, a manifest per process."""
    found = {}
    for manifest in sorted(pathlib.Path(root).glob(f"proc_*/step_{step:08}/*/manifest.json")):
        found.setdefault(manifest.parent.name, []).append((manifest.parent, json.loads(manifest.read_text())))
    return found


def merged(root, step, part, name):
    """A tensor, put together from the shards of all processes. Each element must be there exactly once."""
    whole = covered = None
    for folder, manifest in folders(root, step)[part]:
        for tensor in manifest["tensors"]:
            if tensor["name"] != name or "from" in tensor:
                continue
            for shard in tensor["shards"]:
                data = np.load(folder / shard["file"])
                if tensor["dtype"] == "bfloat16":
                    data = data.view(ml_dtypes.bfloat16)
                assert data.dtype.name == tensor["dtype"] and list(data.shape) == shard["shape"]
                if whole is None:
                    whole = np.zeros(tensor["global_shape"], data.dtype)
                    covered = np.zeros(tensor["global_shape"], int)
                region = tuple(slice(at, at + n) for at, n in zip(shard["start"], shard["shape"]))
                whole[region] = data
                covered[region] += 1
    assert whole is not None, f"{name} is not in {part} of step {step}"
    assert (covered == 1).all(), f"{name}: lost or doubled"
    return whole


def same(found, expected):
    """Bit for bit."""
    expected = np.asarray(expected)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


def pytest_configure(config):
    config.addinivalue_line("markers", "each_jaxlib: runs with an older jaxlib too")
