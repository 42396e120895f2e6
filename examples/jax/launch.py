"""Runs a JAX program in several processes of this machine, each with several CPU devices, and never for longer than it may.

    python launch.py --processes 2 --devices 2 --timeout 120 train_lm.py --steps 20

Each process is given XLA_FLAGS, JAX_PLATFORMS and, if there are several, LAUNCH_COORDINATOR, LAUNCH_PROCESSES and
LAUNCH_PROCESS; `join()` makes them a JAX cluster. When one fails, the others have ten seconds to come to the same end.
"""

import argparse
import os
import socket
import subprocess
import sys
import time

GRACE = 10.0
"""Seconds that the others have once a process has failed."""


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


def launch(program: list[str], processes: int, devices: int, timeout: float, out=None) -> list[int | None]:
    """The exit codes; `None` for a process that was killed because time was up."""
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
                deadline = min(deadline, time.monotonic() + GRACE)
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
    parser.add_argument("program", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    codes = launch(options.program, options.processes, options.devices, options.timeout)
    for index, code in enumerate(codes):
        if code != 0:
            print(f"process {index}: {'killed, time was up' if code is None else f'exit code {code}'}", file=sys.stderr)
    return 0 if not any(code != 0 for code in codes) else 1


if __name__ == "__main__":
    sys.exit(main())
