"""tokamax's linear softmax cross-entropy, compiled ahead for TPUs: `tpu_cycles.py N D V [--only PASS] GENERATION...`.

    python3 -m venv benches/peers/.venv-tpu
    benches/peers/.venv-tpu/bin/pip install tokamax==0.0.12 jax==0.10.2 jaxlib==0.10.2
    TPU_LIBRARY_PATH=$(tests/scripts/libtpu) benches/peers/.venv-tpu/bin/python benches/peers/tpu_cycles.py 4096 1024 6144 v5e v6e

Prints for bfloat16 and each generation what the compiler's static profile says that the forward and the backward kernel last, with
the tile that tokamax takes by default: simulated cycles of a core, beside the least that the MXUs of all cores allow.
`examples/tpu_kernels.rs --cycles` prints the same of the fused kernels. The profile takes up to minutes and several GB, so each is
made in a child process, which may die of it; no backward is tried beyond the V that has been seen to fit in 24 GB.
"""

import argparse
import multiprocessing
import os
import re
import signal
import tempfile
import time
from pathlib import Path
from typing import NamedTuple


class Generation(NamedTuple):
    chip: str  # as `ChipVersion` of JAX names it
    topology: str
    cores: int  # that one program may use
    operations: int  # of bfloat16 products in a cycle of a core


GENERATIONS = {
    "v5e": Generation("v5e", "v5e:1x1", 1, 131_072),
    "v5p": Generation("v5p", "v5p:1x1x1", 2, 131_072),
    "v6e": Generation("v6e", "v6e:1x1", 1, 524_288),
    "v7x": Generation("7x", "tpu7x:1x1x1", 1, 524_288),
}
OPERATIONS = {"forward": 2, "backward": 6}  # times N·D·V
MOST_BACKWARD_VOCAB = 8192


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("n", metavar="N", type=int)
    parser.add_argument("d", metavar="D", type=int)
    parser.add_argument("v", metavar="V", type=int)
    parser.add_argument("generations", metavar="GENERATION", nargs="+", choices=GENERATIONS, help=", ".join(GENERATIONS))
    parser.add_argument("--only", metavar="PASS", choices=OPERATIONS, help="forward or backward")
    arguments = parser.parse_args()
    if "TPU_LIBRARY_PATH" not in os.environ:
        parser.error("TPU_LIBRARY_PATH must be the path of libtpu.so; tests/scripts/libtpu prints it")
    shape = arguments.n, arguments.d, arguments.v
    for name in arguments.generations:
        for passed in [arguments.only] if arguments.only else OPERATIONS:
            if passed == "backward" and arguments.v > MOST_BACKWARD_VOCAB:
                print(f"{name} backward: not tried, V is more than {MOST_BACKWARD_VOCAB}")
            else:
                print(f"{name} {passed}: {simulate(name, passed, shape)}", flush=True)


def simulate(name, passed, shape):
    """A line about the profile that a child process makes."""
    n, d, v = shape
    generation = GENERATIONS[name]
    with tempfile.TemporaryDirectory() as folder:
        # Read once, as libtpu is loaded: before the child imports anything.
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_static_llo_profile_to={folder}"
        start = time.monotonic()
        child = multiprocessing.get_context("spawn").Process(target=compile_pass, args=(name, passed, shape, folder))
        child.start()
        child.join()
        seconds = time.monotonic() - start
        tile = Path(folder, "tile")
        tile = tile.read_text() if tile.exists() else "unknown tile"
        cycles = profile(folder)
        # On v5e and v5p libtpu may abort when the profile is written.
        if cycles is None or child.exitcode not in (0, -signal.SIGABRT):
            return f"{tile}; no static profile: {why(child.exitcode, Path(folder, 'log'))}"
    minimum = OPERATIONS[passed] * n * d * v / generation.operations / generation.cores
    of_cores = used = ""
    if generation.cores > 1:
        # tokamax's grids are sequential.
        of_cores = f" of {generation.cores} cores"
        used = f", the only one of {generation.cores} that it uses"
    return (
        f"{tile}; {cycles:.0f} cycles of a core, simulated{used}; "
        f"MXU minimum{of_cores} {minimum:.0f} ({100 * minimum / cycles:.1f} %); {seconds:.0f} s"
    )


def compile_pass(name, passed, shape, folder):
    """In the child: has libtpu write the profile of a pass to the folder."""
    Path("/proc/self/oom_score_adj").write_text("1000")
    log = os.open(f"{folder}/log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_TRACEBACK_FILTERING": "off",  # else the last line of an error says nothing
        "TPU_SKIP_MDS_QUERY": "1",  # else libtpu asks the network for minutes
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    import jax
    import jax.numpy as jnp
    from jax._src.pallas.mosaic import tpu_info
    from jax.experimental import topologies
    from tokamax._src.ops.linear_softmax_cross_entropy_loss import pallas_mosaic_tpu as tokamax
    from tokamax._src.ops.linear_softmax_cross_entropy_loss import pallas_mosaic_tpu_kernel as kernels

    generation = GENERATIONS[name]
    # While they are traced, JAX and tokamax ask for the chip of the default device, which is this CPU.
    chip = tpu_info.get_tpu_info_for_chip(tpu_info.ChipVersion(generation.chip), generation.cores)
    tpu_info.registry["cpu"] = lambda: chip
    n, d, v = shape
    config = tokamax.get_tpu_specific_default_config(n, d, v)
    blocks = {size: getattr(config, size) for size in ("b_block_size", "h_block_size", "v_block_size")}
    ragged = "" if v % config.v_block_size == 0 else ", of which V is not a multiple"
    tile = "tile of {b_block_size} tokens, {h_block_size} of D, {v_block_size} of V".format_map(blocks)
    Path(folder, "tile").write_text(tile + ragged)

    device = topologies.get_topology_desc(generation.topology, platform="tpu").devices[0]
    placed = jax.sharding.SingleDeviceSharding(device)
    array = lambda dtype, *dims: jax.ShapeDtypeStruct(dims, dtype, sharding=placed)
    x, labels, w = array(jnp.bfloat16, n, d), array(jnp.int32, n), array(jnp.bfloat16, d, v)
    if passed == "forward":
        kernel, inputs = kernels.linear_softmax_cross_entropy_loss_fwd_pallas_mosaic_tpu, (x, labels, w)
    else:
        kernel = kernels.linear_softmax_cross_entropy_loss_bwd_pallas_mosaic_tpu
        inputs = array(jnp.float32), array(jnp.float32, n), x, labels, w
    jax.jit(lambda *arrays: kernel(*arrays, **blocks, reduction="mean")).lower(*inputs).compile()


def profile(folder):
    """The cycles of all operations of the program, if tokamax's kernel is among them: a file for each, and one for equal ones."""
    files = list(Path(folder).glob("*static_llo_profile.textproto"))
    if not any("pallas_mosaic_tpu" in file.name for file in files):
        return None
    fields = [dict(re.findall(r"(\w+): *(\S+)", file.read_text())) for file in files]
    return sum(float(field["estimated_cycles"]) * int(field["num_equivalent_hlos"]) for field in fields)


def why(code, log):
    """Why a child made no profile: its signal, or the error that it ended with."""
    if code == -signal.SIGKILL:
        return "killed; out of memory?"
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return f"exit status {code}: {lines[-1] if lines else 'it said nothing'}"


if __name__ == "__main__":
    main()
