"""What the processes of test_generation.py do: `pauses.py SCENARIO FOLDER`. Each leaves FOLDER/said-<process>.json."""

import json
import os
import pathlib
import signal
import sys
import time

import jax
import launch
import numpy as np
import train_lm
from fused_xent.capture import collectives
from jax.sharding import AxisType

# As small as training still is.
train_lm.V, train_lm.D, train_lm.S, train_lm.B, train_lm.LAYERS = 64, 16, 8, 4, 1


def bits(folder):
    """Seven steps without a pause, with one after two, and with both a pause and capture on either side of it."""
    launch.join()
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Auto,))

    def trainer(*arguments):
        options = train_lm.arguments(["--steps", "7", "--new-tokens", "3", *arguments])
        return train_lm.Trainer(options, mesh, train_lm.new_capture(options, mesh))

    def pause(name):
        return "--generate-dir", str(folder / name), "--generate-at-steps", "2"

    # The weights that all begin with are the same on any number of processes.
    untrained = trainer(*pause("untrained"))
    totals = untrained.generate(0)
    said = {
        "totals": [totals.prompts, totals.tokens],
        "gather": collectives(untrained.whole.lower(untrained.state["w"]).compile()),
        "generate": collectives(untrained.continuation.lower(untrained.gather(), np.zeros(train_lm.S // 2, np.int32)).compile()),
    }

    # Several processes compile as many times as much.
    train_lm.LAYERS = 1 if jax.process_count() == 1 else 0
    plain, paused = trainer(), trainer(*pause("paused"))
    captured = trainer(*pause("captured"), "--dumps", str(folder / "dump"), "--capture-at", "1", "2")
    paused.step, captured.continuation = plain.step, paused.continuation
    for name, at in {"plain": plain, "paused": paused, "captured": captured}.items():
        at.run()
        said[name] = at.checksum()
    (folder / f"said-{jax.process_index()}.json").write_text(json.dumps(said))


def ends(folder, spoil, *arguments, culprit=None):
    """Runs the trainer's `main`, of which `spoil` replaces a part on one process, the last; says with which error it ends."""
    index, last = int(os.environ["LAUNCH_PROCESS"]), int(os.environ["LAUNCH_PROCESSES"]) - 1
    train_lm.Trainer.train = lambda self, k: (0.0, None)
    if index == (last if culprit is None else culprit):
        spoil()

    def leave(error):
        (folder / f"said-{index}.json").write_text(json.dumps([type(error).__name__, str(error)]))
        launch.leave(error)

    train_lm.leave = leave
    train_lm.main(
        ["--steps", "1", "--generate-at-steps", "1", "--new-tokens", "3", "--generate-dir", str(folder / "text"), *arguments]
    )


def failing(folder):
    """The last process can generate for its first prompt, and not for its second."""
    complete = train_lm.Trainer.complete

    def spoil():
        def complete_few(self, w, prompt):
            if prompt >= int(os.environ["LAUNCH_PROCESSES"]):
                raise FloatingPointError(f"no text for prompt {prompt}")
            return complete(self, w, prompt)

        train_lm.Trainer.complete = complete_few

    ends(folder, spoil)


def late(folder, culprit=None):
    """The last process comes with its share when the first has given up on it."""
    complete = train_lm.Trainer.complete

    def spoil():
        def complete_late(self, w, prompt):
            time.sleep(4)
            return complete(self, w, prompt)

        train_lm.Trainer.complete = complete_late

    # The late one sleeps once.
    ends(folder, spoil, "--prompts", os.environ["LAUNCH_PROCESSES"], "--generate-timeout", "2", culprit=culprit)


def first_late(folder):
    """The first process comes when the others have given up on it, and finds all shares there."""
    late(folder, culprit=0)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def killed(folder, culprit=None):
    """The last process is killed while it generates."""
    launch.LEAVE = 2.0

    def spoil():
        train_lm.Trainer.complete = die

    ends(folder, spoil, "--generate-timeout", "4", culprit=culprit)


def first_killed(folder):
    """The first process is killed while it generates."""
    killed(folder, culprit=0)


def killed_before(folder):
    """The last process is killed before it reaches the pause."""
    launch.LEAVE = 2.0

    def spoil():
        train_lm.Trainer.generate = die

    ends(folder, spoil, "--generate-timeout", "4")


def blocked(folder):
    """The last process cannot make its folder of the dump."""
    last = int(os.environ["LAUNCH_PROCESSES"]) - 1

    def spoil():
        (folder / "dump").mkdir(exist_ok=True)
        (folder / f"dump/proc_{last:05}").write_text("in the way")

    ends(folder, spoil, "--dumps", str(folder / "dump"), "--capture-at", "0")


if __name__ == "__main__":
    globals()[sys.argv[1]](pathlib.Path(sys.argv[2]))
