"""One model after the other in training, alike but for the backward of its loss, in four processes: the runs of docs/walkthrough.md.

    python walkthrough.py --dumps /tmp/walk
    xent-diff /tmp/walk/label-scatter-bf16 --candidate recorded

A row of what it prints is a run: what a training log would show of it, the loss and the norm of the unembedding's gradient. The
steps shown are captured, each run's in a folder of its own.
"""

import argparse
import pathlib
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

import train_lm
from fused_loss import FAULTS
from launch import join, launch, launched

RUNS = ("unfused", "label-scatter-bf16", "fixed", "dk-accumulate-bf16", "lse-bf16", "prob-minus-one-bf16")


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dumps", type=pathlib.Path, required=True, help="where the dumps go, each in the folder of its run's name")
    parser.add_argument("--runs", nargs="+", choices=("unfused", "fixed", *FAULTS), default=RUNS)
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 200], help="those that are captured; the last is the last")
    options = parser.parse_args(argv)
    if min(options.steps) < 0:
        parser.error(f"--steps: {min(options.steps)}; expected 0 or more")
    return options


def run(name: str, steps: list[int], dumps: pathlib.Path, mesh) -> list[tuple[float, float]]:
    """Trains until the last of `steps`, which ascend. Returns the loss and the norm of dK at each of them."""
    loss = {"unfused": ["--unfused"], "fixed": []}.get(name, ["--fault", name])
    options = train_lm.arguments(["--dumps", str(dumps / name), "--capture-at", *map(str, steps), *loss])
    seen = []
    with train_lm.new_capture(options, mesh) as capture:
        trainer = train_lm.Trainer(options, mesh, capture)
        for k in range(steps[-1] + 1):
            trainer.state, loss, d_unembedding, _ = trainer.step(trainer.state, trainer.batch(k), k)
            capture.finish_step(k, d_unembedding=d_unembedding)
            if k in steps:
                # Every process computes it: it is a sum over all of them.
                seen.append((float(loss), float(jax.jit(jnp.linalg.norm)(d_unembedding))))
    return seen


def main() -> int:
    options = arguments()
    if not launched():
        return int(any(launch(sys.argv, processes=4, devices=1, timeout=1800)))
    join()
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Auto,))

    def tell(name, cells):
        if jax.process_index() == 0:
            print(f"{name:20}" + "".join(f"{cell:>15}{other:>12}" for cell, other in cells), flush=True)

    steps = sorted(set(options.steps))
    tell("", [(f"step {k}: loss", "norm of dK") for k in steps])
    for name in options.runs:
        tell(name, [(f"{loss:.6f}", f"{norm:.6f}") for loss, norm in run(name, steps, options.dumps, mesh)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
