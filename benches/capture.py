"""What capture costs a training step: time, bytes per second beside plain writes of the same files, memory.

    .venv/bin/python benches/capture.py [--rounds 3] [--steps 8] [--processes 1 --devices 4]

It trains the model of examples/jax, larger than there, with capture off, on without a step to capture, and on at every step, on each
path; each in processes of its own, one after the other, round after round. Medians over the steps, then the least over the rounds.
"""

import argparse
import json
import os
import pathlib
import resource
import shutil
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples/jax"))

from launch import join, launch  # noqa: E402

PATHS = ("record", "callback", "outputs")
RUNS = ["off", *(f"{path}, no step" for path in PATHS), *PATHS]
WARM = 2


def measure(run: str, folder: pathlib.Path, steps: int) -> dict:
    """Of this process: seconds of the step, and of what comes after it; bytes captured by a step; the most memory held."""
    import jax
    import train_lm
    from jax.sharding import AxisType

    train_lm.V, train_lm.D, train_lm.S, train_lm.B, train_lm.LAYERS = 8192, 256, 64, 8, 1
    path, _, when = run.partition(", ")
    arguments = [] if path == "off" else ["--dumps", str(folder / "dump"), "--path", path]
    captured = [10**6] if when else range(WARM, WARM + steps)
    options = train_lm.arguments([*arguments, "--capture-at", *map(str, captured)])
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Auto,))
    trainer = train_lm.Trainer(options, mesh, train_lm.new_capture(options, mesh))
    compiled = trainer.step.lower(trainer.state, trainer.batch(0), 0).compile()
    stepped, finished, written = [], [], 0

    def timed_step(*inputs):
        start = time.perf_counter()
        out = jax.block_until_ready(compiled(*inputs))
        stepped.append(time.perf_counter() - start)
        return out

    trainer.step = timed_step
    for k in range(WARM + steps):
        start = time.perf_counter()
        _, report = trainer.train(k)
        finished.append(time.perf_counter() - start - stepped[-1])
        written = report.bytes if report else 0
    return {
        "step": statistics.median(stepped[WARM:]),
        "after": statistics.median(finished[WARM:]),
        "bytes": written / steps,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def plain_writes(dump: pathlib.Path, steps: int) -> float:
    """Seconds to write the arrays of a step again, synced to the disk file by file, and nothing else."""
    seconds = []
    for k in range(WARM, WARM + steps):
        arrays = [path.read_bytes() for path in dump.glob(f"proc_*/step_{k:08}/*/*.npy")]
        folder = dump / f"plain-{k}"
        folder.mkdir()
        start = time.perf_counter()
        for i, array in enumerate(arrays):
            with (folder / str(i)).open("wb") as file:
                file.write(array)
                os.fsync(file.fileno())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="of each run, after the warm-up")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        join()
        run, folder = options.measure[0], pathlib.Path(options.measure[1])
        said = folder / f"said-{os.environ.get('LAUNCH_PROCESS', 0)}.json"
        said.write_text(json.dumps(measure(run, folder, options.steps)))
        return 0

    found = {run: [] for run in RUNS}
    for _ in range(options.rounds):
        for run in RUNS:
            folder = pathlib.Path(tempfile.mkdtemp(prefix="capture-bench-"))
            try:
                program = [__file__, "--steps", str(options.steps), "--measure", run, str(folder)]
                codes = launch(program, options.processes, options.devices, timeout=300)
                if any(codes):
                    print(f"{run}: exit codes {codes}", file=sys.stderr)
                    return 1
                said = [json.loads(path.read_text()) for path in sorted(folder.glob("said-*.json"))]
                plain = plain_writes(folder / "dump", options.steps) if run in PATHS else None
                found[run].append({
                    "step": max(x["step"] for x in said),
                    "after": max(x["after"] for x in said),
                    "bytes": sum(x["bytes"] for x in said),
                    "memory": sum(x["memory"] for x in said),
                    "plain": plain,
                })  # fmt: skip
            finally:
                shutil.rmtree(folder)

    off = min(x["step"] for x in found["off"])
    memory_off = min(x["memory"] for x in found["off"])
    print(f"{'capture':20} {'step':>8} {'to off':>7} {'after':>8} {'MB':>6} {'MB/s':>6} {'plain':>6} {'memory':>8}")
    for run, rounds in found.items():
        step, after, memory = (min(x[name] for x in rounds) for name in ("step", "after", "memory"))
        line = f"{run:20} {step * 1e3:6.0f}ms {step / off:6.2f}x {after * 1e3:6.0f}ms"
        if run in PATHS:
            # From the dispatch of the step, in which the writing begins, beyond what the step takes without capture.
            rate = max(x["bytes"] / (x["step"] + x["after"] - off) for x in rounds) / 1e6
            plain = max(x["bytes"] / x["plain"] for x in rounds) / 1e6
            line += f" {rounds[0]['bytes'] / 1e6:6.1f} {rate:6.0f} {plain:6.0f}"
        else:
            line += " " * 21
        print(f"{line} {(memory - memory_off) / 1e6:+6.0f}MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
