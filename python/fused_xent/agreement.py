"""How processes come to the same conclusion outside of a step: without a collective, and never waiting for ever.

Everything goes through the key-value store that `jax.distributed` keeps anyway. Each process puts down what it has to say and
process 0 concludes. A conclusion is put down under a key that can be written once only, so that there is one, whoever writes
it: a process that waits in vain for process 0 concludes in its place that nothing came, and process 0 then reads that.
"""

import json
import time
from collections.abc import Callable
from typing import Any

Said = dict[str, Any]


class Alone:
    """The only process of a run."""

    index, count = 0, 1

    def agree(self, key: str, said: Said, conclude: Callable[[list[Said | None]], Said], timeout: float) -> Said:
        """What `conclude` makes of what every process said."""
        return conclude([said])


class JaxProcesses:
    """The processes of `jax.distributed`."""

    def __init__(self) -> None:
        import jax
        from jax._src import distributed  # the store has no public name

        self.index, self.count = jax.process_index(), jax.process_count()
        self._store = distributed.global_state.client
        if self._store is None:
            raise RuntimeError("several processes, but no jax.distributed.initialize: capture needs its key-value store")

    def agree(self, key: str, said: Said, conclude: Callable[[list[Said | None]], Said], timeout: float) -> Said:
        """What process 0 makes of what every process said; the same on every process.

        `conclude` gets what the processes said, in order, and `None` for one that said nothing within `timeout` seconds.
        Process 0 may be the last to come, and then waits for as long. The others give it that time: it names who is missing.
        """
        deadline = time.monotonic() + timeout
        if self.index == 0:
            self._store.key_value_set(f"{key}/listens", "{}")
            heard = [said, *(self._take(f"{key}/said/{i}", deadline) for i in range(1, self.count))]
            self._conclude(key, conclude(heard))
        else:
            self._store.key_value_set(f"{key}/said/{self.index}", json.dumps(said))
            if self._read(f"{key}/listens", deadline) is None or self._read(f"{key}/concluded", deadline + timeout) is None:
                silent = {"errors": [f"process 0 did not conclude within {timeout:g} s of process {self.index}"]}
                self._conclude(key, silent)
        conclusion = self._read(f"{key}/concluded", time.monotonic() + timeout)
        return conclusion or {"errors": ["the key-value store of jax.distributed does not answer"]}

    def _read(self, key: str, deadline: float) -> Said | None:
        wait = max(1, int((deadline - time.monotonic()) * 1000))
        try:
            return json.loads(self._store.blocking_key_value_get(key, wait))
        except Exception as error:  # jaxlib's own type, which has no public name
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise

    def _take(self, key: str, deadline: float) -> Said | None:
        """Reads what nobody else reads, so that the store does not grow with it."""
        said = self._read(key, deadline)
        if said is not None:
            self._store.key_value_delete(key)
        return said

    def _conclude(self, key: str, conclusion: Said) -> None:
        try:
            self._store.key_value_set(f"{key}/concluded", json.dumps(conclusion))
        except Exception as error:
            if "ALREADY_EXISTS" not in str(error):
                raise


def processes() -> Alone | JaxProcesses:
    """Those of this run."""
    import jax

    return Alone() if jax.process_count() == 1 else JaxProcesses()


# What process 0 makes of what every process said, `None` for one that did not say anything in time.


def silent(heard: list[Said | None]) -> list[str]:
    return [f"process {i} did not answer in time" for i, said in enumerate(heard) if said is None]


def begin(heard: list[Said | None]) -> Said:
    errors = silent(heard)
    for i, said in enumerate(heard):
        if said is not None and said["error"]:
            errors.append(f"process {i}: {said['error']}")
        if said is not None and heard[0] is not None and said["settings"] != heard[0]["settings"]:
            errors.append(f"process {i}: its settings are {said['settings']}; expected those of process 0: {heard[0]['settings']}")
    return {"errors": errors, "run_id": heard[0] and heard[0]["run_id"]}


def finish(heard: list[Said | None]) -> Said:
    errors = silent(heard)
    for i, said in enumerate(heard):
        if said is not None:
            errors += [f"process {i}: {error}" for error in said["errors"][:16]]
    return {"errors": errors, "dropped": {i: said["dropped"] for i, said in enumerate(heard) if said and said["dropped"]}}


def close(heard: list[Said | None]) -> Said:
    return {"errors": silent(heard), "open": sorted({step for said in heard if said is not None for step in said["open"]})}
