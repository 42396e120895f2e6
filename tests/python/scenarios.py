"""What the processes of test_processes.py do: `scenarios.py SCENARIO FOLDER`. Each leaves FOLDER/said-<process>.json."""

import json
import pathlib
import resource
import sys
import time

import jax
import train_lm
import walkthrough
from fused_xent import CaptureError
from fused_xent.capture import collectives
from jax.sharding import AxisType
from launch import join

# As small as training still is.
train_lm.V, train_lm.D, train_lm.S, train_lm.B, train_lm.LAYERS = 64, 16, 8, 4, 0


def trainer(mesh, dumps, *arguments):
    options = train_lm.arguments(["--dumps", str(dumps), *arguments] if dumps else list(arguments))
    return train_lm.Trainer(options, mesh, train_lm.new_capture(options, mesh))


def paths(mesh, folder):
    """Trains without capture and with each kind of it: the final parameters, the collectives of the step."""
    # Four processes compile four times as much.
    train_lm.LAYERS = 1 if jax.process_count() < 4 else 0
    runs = [("off", "record"), ("record", "record"), ("callback", "callback"), ("outputs", "outputs")]
    runs += [("fused off", "record", "--fused"), ("fused record", "record", "--fused")]
    said = {}
    for name, path, *loss in runs:
        dumps = None if name.endswith("off") else folder / name
        at = trainer(mesh, dumps, "--path", path, "--capture-at", "1", "3", *loss)
        at.step = at.step.lower(at.state, at.batch(0), 0).compile()
        held = collectives(at.step)
        losses = [float(at.train(k)[0]) for k in range(4)]
        said[name] = {"parameters": at.checksum(), "losses": losses, "collectives": held}
    return said


def capture_errors(at, steps):
    """What finish_step raised, by step."""
    raised = {}
    for k in range(steps):
        try:
            at.train(k)
        except CaptureError as error:
            raised[k] = str(error)
    return raised


def walk(mesh, folder):
    """The runs of docs/walkthrough.md: loss and norm of dK at the steps that are captured."""
    train_lm.S, train_lm.B = 32, 8
    return {name: walkthrough.run(name, [0, 10], folder, mesh) for name in walkthrough.RUNS}


def unwritable(mesh, folder):
    """The folder of step 1 cannot be made on the last process."""
    last = jax.process_count() - 1
    if jax.process_index() == last:
        blocked = folder / f"dump/proc_{last:05}/step_00000001"
        blocked.parent.mkdir(parents=True, exist_ok=True)
        blocked.write_text("in the way")
    at = trainer(mesh, folder / "dump", "--capture-at", "1", "3")
    return {"raised": capture_errors(at, 5), "parameters": at.checksum()}


def unwritable_from_the_start(mesh, folder):
    """The last process cannot make its folder."""
    last = jax.process_count() - 1
    if jax.process_index() == last:
        (folder / "dump").mkdir(exist_ok=True)
        (folder / f"dump/proc_{last:05}").write_text("in the way")
    try:
        trainer(mesh, folder / "dump", "--capture-at", "1")
    except CaptureError as error:
        return {"raised": {"begin": str(error)}}


def full_disk(mesh, folder):
    """The last process can write no file beyond some hundred bytes, from step 1 to step 2."""
    at = trainer(mesh, folder / "dump", "--capture-at", "1", "3")
    raised = {}
    for k in range(5):
        if jax.process_index() == jax.process_count() - 1:
            limit = 200 if k == 1 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            at.train(k)
        except CaptureError as error:
            raised[k] = str(error)
    return {"raised": raised, "parameters": at.checksum()}


def late(mesh, folder):
    """The last process comes to finish_step when the others have given up on it."""
    at = trainer(mesh, folder / "dump", "--capture-at", "0", "1", "--timeout", "2")
    finish = at.capture.finish_step

    def slow(k, **arguments):
        if k == 0 and jax.process_index() == jax.process_count() - 1:
            time.sleep(4)
        return finish(k, **arguments)

    at.capture.finish_step = slow
    return {"raised": capture_errors(at, 2)}


def unlike(mesh, folder):
    """Processes that want to capture different steps."""
    try:
        trainer(mesh, folder / "dump", "--capture-at", str(jax.process_index()))
    except CaptureError as error:
        return {"raised": {"begin": str(error)}}


def endless(mesh, folder):
    """Captures every step until it is killed."""
    at = trainer(mesh, folder / "dump", "--capture-at", *map(str, range(10_000)))
    for k in range(10_000):
        at.train(k)


if __name__ == "__main__":
    join()
    scenario, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Auto,))
    said = globals()[scenario](mesh, folder)
    (folder / f"said-{jax.process_index()}.json").write_text(json.dumps(said))
