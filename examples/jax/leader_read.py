"""Two processes train a vector that is spread over them; what one of them does alone can spoil it for both.

    python leader_read.py [--verbose] [--barrier] [--shards] [--leader-norm]

Every process checks each step's total against what it must be. The options are ways to look at the training while it runs.
Three are harmless. `--leader-norm` is not: `jnp.linalg.norm` of a global array is a program that all processes have to run, for
it sums over their shards; run by the leader alone, its part of the sum meets another sum of the other process, and both get
a wrong number, or wait for ever.
"""

import argparse
import os
import sys

from launch import join, launch

STEPS = 4
LENGTH = 8
TIME = 60.0
"""Seconds that all of it may take."""


def train(options: argparse.Namespace) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import multihost_utils
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    process = jax.process_index()
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    first = np.arange(LENGTH, dtype=np.float32)
    weights = jax.make_array_from_callback(first.shape, sharding, lambda index: first[index])
    step = jax.jit(lambda weights: (weights + 1, weights.sum()))
    for k in range(STEPS):
        weights, total = step(weights)
        total, right = float(total), float(first.sum()) + k * LENGTH
        if total != right:
            raise ValueError(f"step {k}: the total is {total}, not {right}")
        if options.verbose:
            print(f"process {process}: step {k}: total {total}", flush=True)
        if options.barrier:
            multihost_utils.sync_global_devices(f"step {k}")
        if options.shards:
            local = [float(np.linalg.norm(shard.data)) for shard in weights.addressable_shards]
            print(f"process {process}: step {k}: norms of its own shards {local}", flush=True)
        if options.leader_norm and process == 0:
            print(f"process 0: step {k}: norm {float(jnp.linalg.norm(weights))}", flush=True)
    print(f"process {process}: done", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--verbose", action="store_true", help="print each step's total")
    parser.add_argument("--barrier", action="store_true", help="all processes wait for each other after each step")
    parser.add_argument("--shards", action="store_true", help="each process reads the norms of its own shards")
    parser.add_argument("--leader-norm", action="store_true", help="process 0 reads the norm of all of it")
    options = parser.parse_args()
    if "LAUNCH_COORDINATOR" in os.environ:
        join()
        try:
            train(options)
        except ValueError as error:
            print(f"process {os.environ['LAUNCH_PROCESS']}: {error}", flush=True)
            # Without waiting for the other, which may not come.
            os._exit(1)
        return 0
    codes = launch([__file__, *sys.argv[1:]], processes=2, devices=1, timeout=TIME)
    return 0 if codes == [0, 0] else 1


if __name__ == "__main__":
    sys.exit(main())
