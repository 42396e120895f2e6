"""Runs a JAX program in several processes of this machine, each with several CPU devices, and never for longer than it may.

    python launch.py --processes 2 --devices 2 --timeout 120 train_lm.py --steps 20

Each process is given XLA_FLAGS, JAX_PLATFORMS and, if there are several, LAUNCH_COORDINATOR, LAUNCH_PROCESSES and
LAUNCH_PROCESS; `join()` makes them a JAX cluster, `leave()` ends them together. When one fails, the others have
ten seconds to come to the same end, or `--grace`.
"""

import argparse
import os
import socket
import subprocess
import sys
import time
from typing import NoReturn

GRACE = 10.0
"""Seconds that the others have once a process has failed."""

LEAVE = 10.0
"""Seconds that a process which leaves for an error waits for the others."""


def launched() -> bool:
    """Whether this process is one of several that this launcher started."""
    return "LAUNCH_COORDINATOR" in os.environ


def join() -> None:
    """Joins the processes that this launcher started; to be called before anything else asks JAX for a device."""
    import jax

    if launched():
        jax.distributed.initialize(
            os.environ["LAUNCH_COORDINATOR"], int(os.environ["LAUNCH_PROCESSES"]), int(os.environ["LAUNCH_PROCESS"])
        )


def leave(error: Exception) -> NoReturn:
    """Ends this process with exit code 1 for an error that every process has come to, in step with the others.

    Process 0 keeps what the processes meet through, and JAX aborts (SIGABRT) whoever still listens when it is gone. So they meet
    once more, and then leave by `jax.distributed.shutdown`, which has them meet too, but for minutes: where a process does not
    come within `LEAVE` seconds the others go without it, process 0 last.
    """
    import jax
    from fused_xent.agreement import processes, silent

    print(f"process {jax.process_index()}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    if jax.process_count() == 1:
        sys.exit(1)
    met = processes().agree("leave", {}, lambda heard: {"errors": silent(heard)}, LEAVE)
    if not met["errors"]:
        jax.distributed.shutdown()
        sys.exit(1)
    if jax.process_index() == 0:
        time.sleep(1.0)
    sys.stdout.flush()
    os._exit(1)


def launch(program: list[str], processes: int, devices: int, timeout: float, out=None, grace: float = GRACE) -> list[int | None]:
    """The exit codes; `None` for a process that was killed because time was up.

    Args:
        program: a Python program and its arguments.
        processes, devices: how many processes, and CPU devices of each.
        timeout: seconds that all of it may take.
        out: where output and errors of all of them go.
        grace: seconds that the others still have once a process has failed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    base = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    running = []
    for index in range(processes):
        own = {"LAUNCH_COORDINATOR": coordinator, "LAUNCH_PROCESSES": str(processes), "LAUNCH_PROCESS": str(index)}
        env = {**base, **own} if processes > 1 else base
        running.append(subprocess.Popen([sys.executable, *program], env=env, stdout=out, stderr=out))
    deadline = time.monotonic() + timeout
    try:
        while any(p.poll() is None for p in running) and time.monotonic() < deadline:
            if any(p.poll() for p in running):
                deadline = min(deadline, time.monotonic() + grace)
            time.sleep(0.05)
        return [p.poll() for p in running]
    finally:
        for p in running:
            p.kill()
            p.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--devices", type=int, default=4, help="CPU devices of each process")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds")
    parser.add_argument("--grace", type=float, default=GRACE, help="seconds that the others have once a process has failed")
    parser.add_argument("program", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    codes = launch(options.program, options.processes, options.devices, options.timeout, grace=options.grace)
    for index, code in enumerate(codes):
        if code != 0:
            print(f"process {index}: {'killed, time was up' if code is None else f'exit code {code}'}", file=sys.stderr)
    # What they all end with; 1 if they do not end alike.
    return codes[0] if len(set(codes)) == 1 and codes[0] in (0, 2) else 1


if __name__ == "__main__":
    sys.exit(main())
