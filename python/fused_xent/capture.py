"""Capture from inside a jitted, scanned, differentiated, sharded, multi-process JAX train step.

Glossary: B × S tokens of a microbatch as [B, S] (or N of them as [N]); D hidden size; V vocabulary; M microbatches of a step.
"""

import functools
import itertools
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import jax
import jax.custom_batching
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from . import agreement
from .agreement import Said, processes
from .errors import CaptureError
from .writer import QUEUE_BYTES, Writer, hand_over

PER_TOKEN = ("loss", "lse", "label_logits")
COTANGENTS = ("d_lse", "d_label_logits")
GRADIENTS = ("d_hidden", "d_unembedding")
RECORDABLE = PER_TOKEN + COTANGENTS + GRADIENTS

_captures = itertools.count()


@dataclass(frozen=True)
class StepReport:
    """What `finish_step` says of a step that was captured without error.

    Attributes:
        step: the step.
        dropped: the microbatches that were dropped to stay within `memory_limit`, by process.
        bytes: bytes of arrays that this process has written since the capture began.
    """

    step: int
    dropped: dict[int, list[int]]
    bytes: int


@dataclass(frozen=True)
class _Tensor:
    """A tensor as a traced step hands it over."""

    name: str
    global_shape: tuple[int, ...]
    axes: tuple[tuple[str, ...], ...]
    """The mesh axes over which each dimension is sharded."""
    pieces: dict[str, int]
    """How many pieces of each tensor make this process's part of a microbatch."""


@dataclass
class _Step:
    """What has arrived of a step."""

    pieces: dict[str, int] | None = None
    arrived: dict[tuple[int | None, str], set[tuple[int, ...]]] = field(default_factory=dict)
    whole: set[int] = field(default_factory=set)
    dropped: set[int] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)


@jax.custom_batching.custom_vmap
def _unmapped(step: jax.Array, microbatch: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What it is given, which `vmap` may not map: its examples would all be the same microbatch of the same step."""
    return step, microbatch, x


@_unmapped.def_vmap
def _refuse_vmap(axis_size, in_batched, step, microbatch, x):
    raise ValueError(
        f"capture under vmap, of {axis_size}: all of them would be one microbatch of one step; make the mapped axis a dimension of"
        " hidden and targets, or scan over it with microbatches numbered by data"
    )


class Capture:
    """Captures the inputs of the loss, and what the loss made of them, at chosen steps.

    Make one on every process, with the same arguments. Call it inside the step, at the loss boundary, and `finish_step` after
    it. Nothing that goes wrong with the capture reaches the step: errors are kept, and `finish_step` raises them on every
    process alike. A microbatch is committed as soon as all of it is there; a crash leaves every committed one readable.

    Args:
        dir: the dump; each process writes a folder `proc_<index>` of its own into it. `None`: capture is off, every call does
            nothing.
        loss: the loss that the run computes, as the `loss` member of a manifest: `{"reduction": "mean", …}`.
        num_microbatches: M.
        at_steps: the steps to capture, or
        every: capture each step that this number divides.
        record: what `record` records beside the inputs, of `loss`, `lse`, `label_logits`, `d_lse`, `d_label_logits`,
            `d_hidden`, `d_unembedding` (of each microbatch; the accumulated one is handed to `finish_step`).
        mesh: the mesh of the computation; needed where JAX sees more than one device. All of its axes are covered.
        hidden_spec: how `hidden` [B, S, D] or [N, D] is sharded on the mesh; targets and weights are as it is, without D.
        unembedding_spec: how `unembedding` is sharded. Specs that are not the arrays' own make XLA move data: see
            `collectives`.
        layout: `"vd"` if the unembedding is [V, D], `"dv"` if [D, V].
        contract: how the gradients are computed, as the `contract` member of a manifest.
        run_id: names the run; process 0 makes one up where it is left out.
        verify: read every folder back once it is committed, and compare.
        memory_limit: bytes of captured arrays that may wait for the disk; a microbatch that exceeds it is dropped whole, and
            `finish_step` says so. `None`: nothing is dropped; the arrays of one step at most wait, and `finish_step` waits for
            them to be written.
        timeout: seconds that `finish_step` waits for the disk, and again for the other processes.
    """

    def __init__(
        self,
        dir: str | os.PathLike[str] | None,
        *,
        loss: Mapping[str, Any] | None = None,
        num_microbatches: int = 1,
        at_steps: Sequence[int] | None = None,
        every: int | None = None,
        record: Sequence[str] = (),
        mesh: Mesh | None = None,
        hidden_spec: PartitionSpec | None = None,
        unembedding_spec: PartitionSpec | None = None,
        layout: str = "vd",
        contract: Mapping[str, str] | None = None,
        run_id: str | None = None,
        verify: bool = False,
        memory_limit: int | None = None,
        timeout: float = 300.0,
    ) -> None:
        self.dir = None if dir is None else os.fspath(dir)
        if self.dir is None:
            return
        if (at_steps is None) == (every is None):
            raise ValueError("give at_steps or every: which steps are captured")
        if every is not None and every < 1:
            raise ValueError(f"every is {every}; expected 1 or more")
        unknown = sorted(set(record) - set(RECORDABLE))
        if unknown:
            raise ValueError(f"record: unknown {', '.join(unknown)}; expected some of {', '.join(RECORDABLE)}")
        if mesh is None and jax.device_count() > 1:
            raise ValueError(
                f"JAX sees {jax.device_count()} devices: give mesh, hidden_spec and unembedding_spec (without them XLA would gather"
                " whole arrays on one device)"
            )
        if mesh is not None and (hidden_spec is None or unembedding_spec is None):
            raise ValueError("mesh needs hidden_spec and unembedding_spec: how the arrays are sharded on it")
        self._at, self._every = at_steps and tuple(at_steps), every
        self._names, self._mesh = tuple(record), mesh
        self._hidden_spec, self._unembedding_spec = hidden_spec or PartitionSpec(), unembedding_spec or PartitionSpec()
        self._num_microbatches, self._layout = num_microbatches, layout
        self._memory_limit, self._timeout = memory_limit, timeout

        self._lock = threading.Lock()
        self._steps: dict[int, _Step] = {}
        self._finished: set[int] = set()
        self._lost: list[str] = []
        self._pieces: dict[str, int] | None = None
        self._pending = 0
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._idle = threading.Condition()
        self._unwritten = 0

        self._processes = processes()
        self._key = f"fused-xent/capture-{next(_captures)}"
        settings = [loss, num_microbatches, at_steps, every, record, hidden_spec, unembedding_spec, layout, contract, mesh and mesh.shape]
        said: Said = {"settings": repr(settings), "run_id": run_id, "error": None}
        index = self._processes.index
        try:
            os.makedirs(os.path.join(self.dir, f"proc_{index:05}"), exist_ok=True)
            # It also checks the settings and, for a run of one process, makes up a run_id.
            checked = Writer(self.dir, loss=loss, num_microbatches=num_microbatches, contract=contract, run_id=run_id)
            said["run_id"] = checked.run_id
        except (OSError, ValueError) as error:
            said["error"] = str(error)
        begun = self._processes.agree(f"{self._key}/begin", said, agreement.begin, timeout)
        if begun["errors"]:
            raise CaptureError("\n".join(begun["errors"]))
        self.run_id: str = begun["run_id"]
        self._writer = Writer(
            self.dir,
            loss=loss,
            num_microbatches=num_microbatches,
            process_index=index,
            process_count=self._processes.count,
            run_id=self.run_id,
            contract=contract,
            verify=verify,
        )
        self._folders = self._writer._folders
        threading.Thread(target=self._drain, name="xent-capture-drain", daemon=True).start()

    # Inside the step.

    def captures(self, step: int) -> bool:
        """Whether that step is captured."""
        if self.dir is None:
            return False
        return step in self._at if self._at is not None else step % self._every == 0

    def __call__(
        self,
        step: jax.Array | int,
        microbatch: jax.Array | int,
        hidden: jax.Array,
        targets: jax.Array,
        unembedding: jax.Array,
        token_weights: jax.Array | None = None,
    ) -> None:
        """Captures the inputs of a microbatch; to be called where the step is traced, under any of jit, scan, grad, shard_map.

        Args:
            step, microbatch: as data: an argument of the step, and what the scan scans over (`jnp.arange(M)`).
            hidden: [B, S, D] or [N, D], bfloat16, float16 or float32.
            targets: [B, S] or [N], int32, int64 or uint32.
            unembedding: as the loss uses it, [V, D] or with `layout="dv"` [D, V]; taken at microbatch 0.
            token_weights: like targets, float32.
        """
        if self.dir is not None:
            self._inputs(step, microbatch, hidden, targets, unembedding, token_weights, ())

    def record(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a loss so that calling it captures its inputs, per-token values and gradients.

        `fn(hidden, targets, unembedding)`, or with `token_weights` as fourth argument, returns a scalar, or the per-token loss
        like targets, or a mapping or named tuple with any of `loss`, `lse`, `label_logits` (float32, like targets, unweighted, 0
        at masked tokens) beside whatever else, as `fused_xent.jax.fused_cross_entropy` does. The wrapped one is called as the capture is:
        `recorded(step, microbatch, hidden, targets, unembedding, token_weights=None)`.

        The gradients are what arrives at `fn`'s arguments in the backward, whatever rule `fn` has.
        """

        def called(hidden, targets, unembedding, token_weights):
            return fn(hidden, targets, unembedding, *(() if token_weights is None else (token_weights,)))

        if self.dir is None:
            return functools.wraps(fn)(
                lambda step, microbatch, hidden, targets, unembedding, token_weights=None: called(
                    hidden, targets, unembedding, token_weights
                )
            )

        def recorded(step, microbatch, hidden, targets, unembedding, token_weights=None):
            pieces = self._inputs(step, microbatch, hidden, targets, unembedding, token_weights, self._names)
            step, microbatch = jnp.asarray(step, jnp.int32), jnp.asarray(microbatch, jnp.int32)
            hidden = self._tap("d_hidden", pieces, step, microbatch, hidden)
            unembedding = self._tap("d_unembedding", pieces, step, microbatch, unembedding)
            out = called(hidden, targets, unembedding, token_weights)
            named = hasattr(out, "_asdict")
            values = out._asdict() if named else out if isinstance(out, Mapping) else {"loss": out}
            for name in set(self._names) & {*PER_TOKEN, *COTANGENTS}:
                value = values.get(name.removeprefix("d_"))
                if value is None or value.shape != targets.shape:
                    found = "nothing" if value is None else f"shape {list(value.shape)}"
                    raise TypeError(
                        f"record: {name} was asked for; the loss returned {found} for {name.removeprefix('d_')}, expected"
                        f" {list(targets.shape)}, like targets"
                    )
            for name in PER_TOKEN:
                if name in self._names:
                    self._emit(name, pieces, step, microbatch, values[name])
            taps = {
                name.removeprefix("d_"): self._tap(name, pieces, step, microbatch, values[name.removeprefix("d_")])
                for name in COTANGENTS
                if name in self._names
            }
            if not taps:
                return out
            return out._replace(**taps) if named else {**out, **taps}

        return functools.wraps(fn)(recorded)

    def _spec(self, name: str) -> PartitionSpec:
        if name in ("unembedding", "d_unembedding"):
            return self._unembedding_spec
        return self._hidden_spec

    def _inputs(self, step, microbatch, hidden, targets, unembedding, token_weights, names) -> dict[str, int]:
        if self._names and not names:
            missing = ", ".join(self._names)
            raise ValueError(f"capture: {missing} cannot be captured from the inputs: wrap the loss with record and call that")
        arrays = {"hidden": hidden, "targets": targets, "unembedding": unembedding}
        if token_weights is not None:
            arrays["token_weights"] = token_weights
        shapes = {name: x.shape for name, x in arrays.items()}
        for name in names:
            like = {"d_hidden": "hidden", "d_unembedding": "unembedding"}.get(name, "targets")
            shapes[name] = shapes[like]
        pieces = {name: self._own_pieces(name, len(shape)) for name, shape in shapes.items()}
        pieces = self._pieces = {name: n for name, n in pieces.items() if n}
        step, microbatch = jnp.asarray(step, jnp.int32), jnp.asarray(microbatch, jnp.int32)
        for name, x in arrays.items():
            self._emit(name, pieces, step, microbatch, x)
        return pieces

    def _axes(self, name: str, rank: int) -> tuple[tuple[str, ...], ...]:
        """The mesh axes over which each of `rank` dimensions is sharded."""
        axes = [() if a is None else (a,) if isinstance(a, str) else tuple(a) for a in self._spec(name)]
        return tuple(axes[:rank] + [()] * (rank - len(axes)))

    def _own_pieces(self, name: str, rank: int) -> int:
        """How many devices of this process hold a shard that is no copy."""
        if self._mesh is None:
            return 1
        used = set(itertools.chain(*self._axes(name, rank)))
        first = tuple(slice(None) if a in used else slice(0, 1) for a in self._mesh.axis_names)
        devices = self._mesh.devices[first].flat
        return sum(device.process_index == jax.process_index() for device in devices)

    def _emit(self, name: str, pieces: dict[str, int], step: jax.Array, microbatch: jax.Array, x: jax.Array) -> None:
        """Hands over the local shards of a traced array."""
        step, microbatch, x = _unmapped(step, microbatch, jax.lax.stop_gradient(x))
        if name in PER_TOKEN + COTANGENTS:
            x = x.astype(jnp.float32)
        wanted = self._wanted(step)
        if name == "unembedding":
            wanted &= microbatch == 0
        axes = self._axes(name, x.ndim)
        if self._mesh is None:
            tensor = _Tensor(name, x.shape, axes, pieces)
            tags = jnp.stack([step, microbatch])
            jax.lax.cond(wanted, lambda: jax.debug.callback(functools.partial(self._arrived, tensor), tags, x), lambda: None)
            return
        mesh, used = self._mesh, set(itertools.chain(*axes))

        def local(wanted, step, microbatch, x):
            extents = [math.prod(mesh.shape[a] for a in along) for along in axes]
            tensor = _Tensor(name, tuple(n * k for n, k in zip(x.shape, extents)), axes, pieces)
            places = {a: jax.lax.axis_index(a) for a in mesh.axis_names}
            for axis in set(mesh.axis_names) - used:
                wanted = wanted & (places[axis] == 0)
            tags = jnp.stack([step, microbatch, *(jnp.asarray(i, jnp.int32) for i in places.values())])
            jax.lax.cond(wanted, lambda: jax.debug.callback(functools.partial(self._arrived, tensor), tags, x), lambda: None)

        manual = set(jax.sharding.get_abstract_mesh().manual_axes)
        if manual >= set(mesh.axis_names):
            local(wanted, step, microbatch, x)
        elif manual:
            raise ValueError(
                f"capture inside a shard_map over {sorted(manual)} only, of the mesh's {list(mesh.axis_names)}: the callback would"
                " gather the array over the other axes; make all of them manual, or capture outside"
            )
        else:
            none, spec = PartitionSpec(), PartitionSpec(*(along or None for along in axes))
            jax.shard_map(local, mesh=mesh, in_specs=(none, none, none, spec), out_specs=None, check_vma=False)(
                wanted, step, microbatch, x
            )

    def _wanted(self, step: jax.Array) -> jax.Array:
        if self._at is None:
            return step % self._every == 0
        return jnp.any(jnp.asarray(self._at, jnp.int32) == step)

    def _tap(self, name: str, pieces: dict[str, int], step: jax.Array, microbatch: jax.Array, x: jax.Array) -> jax.Array:
        """`x`; what arrives for it in the backward is handed over as `name`, if that is to be recorded."""
        if name not in self._names:
            return x

        @jax.custom_vjp
        def tap(step, microbatch, x):
            return x

        def backward(at, cotangent):
            self._emit(name, pieces, *at, cotangent)
            return None, None, cotangent

        tap.defvjp(lambda step, microbatch, x: (x, (step, microbatch)), backward)
        return tap(step, microbatch, x)

    # On the runtime's threads, which must not wait: an array may not even be looked at there.

    def _arrived(self, tensor: _Tensor, tags: jax.Array, x: jax.Array) -> None:
        try:
            with self._idle:
                self._unwritten += 1
            step, microbatch, *place = np.asarray(tags).tolist()
            part = None if tensor.name == "unembedding" else microbatch
            with self._lock:
                state = self._steps.setdefault(step, _Step())
                state.pieces = tensor.pieces
                over = self._memory_limit is not None and self._pending + x.nbytes > self._memory_limit
                if over and part is not None and part not in state.whole:
                    state.dropped.add(part)
                kept = part not in state.dropped
                self._pending += x.nbytes if kept else 0
            self._queue.put((tensor, step, part, place, x) if kept else None)
        except BaseException as error:
            self._lost.append(f"{tensor.name}: {error!r}")
            self._queue.put(None)

    # On the thread that drains the queue.

    def _drain(self) -> None:
        while True:
            piece = self._queue.get()
            if piece is not None:
                try:
                    self._take(*piece)
                except BaseException as error:
                    self._lost.append(f"step {piece[1]}: {piece[0].name}: {error!r}")
                with self._lock:
                    self._pending -= piece[4].nbytes
                del piece
            with self._idle:
                self._unwritten -= 1
                self._idle.notify_all()

    def _take(self, tensor: _Tensor, step: int, part: int | None, place: list[int], x: jax.Array) -> None:
        with self._lock:
            if part in self._steps[step].dropped:
                return
        array = np.asarray(x)
        coordinates = dict(zip(self._mesh.axis_names, place)) if self._mesh is not None else {}
        start = []
        for along, extent in zip(tensor.axes, array.shape):
            index = 0
            for axis in along:
                index = index * self._mesh.shape[axis] + coordinates[axis]
            start.append(index * extent)
        hand_over(self._folders, step, part, tensor.name, array, start, tensor.global_shape, layout=self._layout)
        with self._lock:
            state = self._steps[step]
            state.arrived.setdefault((part, tensor.name), set()).add(tuple(start))
            if part is None or part in state.whole or self._missing(state, part):
                return
            state.whole.add(part)
        self._folders.commit(step, part)

    def _missing(self, state: _Step, part: int | None) -> list[str]:
        """The tensors of a folder that are not there yet."""
        pieces = state.pieces or {}
        names = [name for name in pieces if (name == "unembedding") == (part is None)]
        return [name for name in names if len(state.arrived.get((part, name), ())) < pieces[name]]

    # After the step.

    def write_step(
        self,
        step: int,
        *,
        hidden: jax.Array,
        targets: jax.Array,
        unembedding: jax.Array,
        token_weights: jax.Array | None = None,
        **recorded: jax.Array,
    ) -> None:
        """Captures a step from arrays that it returned, without callbacks: each process writes the shards that it holds.

        Every array but `unembedding` is stacked over the microbatches, as a scan returns it. It works on any backend and adds
        nothing to the step but these outputs. To be called on every process, before `finish_step`.

        Args:
            step: the step; nothing happens if it is not one to capture.
            hidden: [M, B, S, D] or [M, N, D].
            targets: [M, B, S] or [M, N].
            unembedding: [V, D] as it was **before** the step's update; a step that donates it must return a copy.
            token_weights: like targets, float32.
            recorded: any of `loss`, `lse`, `label_logits`, `d_lse`, `d_label_logits` (like targets), `d_hidden` (like hidden),
                `d_unembedding` [M, V, D].
        """
        if not self.captures(step):
            return
        unknown = sorted(set(recorded) - set(RECORDABLE))
        if unknown:
            raise TypeError(f"write_step: unknown {', '.join(unknown)}; expected some of {', '.join(RECORDABLE)}")
        state = self._steps.setdefault(step, _Step())
        state.pieces = {}
        try:
            stacked = {"hidden": hidden, "targets": targets, "token_weights": token_weights, **recorded}
            present = set()
            for name, x in stacked.items():
                if x is not None:
                    present |= self._write_stacked(step, name, x)
            self._write_shards(step, "unembedding", unembedding)
            for m in sorted(present):
                self._folders.commit(step, m)
        except Exception as error:
            state.errors.append(str(error))

    def _shards(self, name: str, x: jax.Array | np.ndarray):
        """Index and elements of each shard that this process holds and no other one records."""
        if not isinstance(x, jax.Array):
            if self._processes.count > 1:
                raise TypeError(f"{name}: a {type(x).__name__} does not say which part of it is whose; hand over the jax.Array")
            yield (slice(None),) * x.ndim, np.asarray(x)
            return
        for shard in x.addressable_shards:
            if shard.replica_id == 0:
                yield shard.index, np.asarray(shard.data)

    def _write_stacked(self, step: int, name: str, x: jax.Array) -> set[int]:
        if x.shape[0] != self._num_microbatches:
            raise ValueError(f"{name}: shape {list(x.shape)}; expected {self._num_microbatches} microbatches first")
        written = set()
        for index, data in self._shards(name, x):
            first, *start = (i.start or 0 for i in index)
            for m, array in enumerate(data, first):
                hand_over(self._folders, step, m, name, array, start, x.shape[1:], layout=self._layout)
                written.add(m)
        return written

    def _write_shards(self, step: int, name: str, x: jax.Array) -> None:
        for index, data in self._shards(name, x):
            start = [i.start or 0 for i in index]
            hand_over(self._folders, step, None, name, data, start, x.shape, layout=self._layout)

    def finish_step(self, step: int, *, d_unembedding: jax.Array | None = None) -> StepReport | None:
        """Waits for the capture of a step and concludes it, together with the other processes.

        To be called on every process, outside of jit, after the step was dispatched. It waits for the step, then for the disk,
        checks that everything has arrived, commits `shared`, and agrees with the other processes through the key-value store
        of `jax.distributed`: no device takes part, and nobody waits longer than `timeout`. `None`: not a step to capture.

        Args:
            step: the step.
            d_unembedding: its accumulated gradient, [V, D] or as `layout` says: a global array, sharded in any way.

        Raises:
            CaptureError: what failed or is missing, on whichever processes; the same on every process.
        """
        if not self.captures(step):
            return None
        if step in self._finished:
            raise ValueError(f"step {step} is finished")
        self._finished.add(step)
        report = {"errors": [], "dropped": []}
        try:
            report = self._conclude(step, d_unembedding)
        except Exception as error:
            report["errors"].append(f"{type(error).__name__}: {error}")
        concluded = self._processes.agree(f"{self._key}/step-{step}", report, agreement.finish, self._timeout)
        if concluded["errors"]:
            raise CaptureError(f"step {step}:\n" + "\n".join(concluded["errors"]))
        dropped = {int(process): microbatches for process, microbatches in concluded["dropped"].items()}
        return StepReport(step, dropped, self._folders.written)

    def _conclude(self, step: int, d_unembedding: jax.Array | None) -> Said:
        jax.effects_barrier()
        deadline = time.monotonic() + self._timeout
        with self._idle:
            drained = self._idle.wait_for(lambda: self._unwritten == 0, self._timeout)
        with self._lock:
            state = self._steps.pop(step, None) or _Step(pieces=self._pieces)
            errors, self._lost = state.errors + self._lost, []
        if state.pieces is None:
            errors.append("nothing arrived: is the capture called in the step, with this step's number?")
        for m in range(self._num_microbatches):
            missing = self._missing(state, m)
            if missing and m not in state.dropped:
                errors.append(f"microbatch {m}: {', '.join(missing)} did not arrive, or not from every device")
        if self._missing(state, None):
            errors.append("unembedding did not arrive: is there a microbatch 0?")
        elif not errors:
            if d_unembedding is not None:
                self._write_shards(step, "d_unembedding", d_unembedding)
            self._folders.commit(step, None)
        if not (drained and self._folders.flush(max(0.0, deadline - time.monotonic()))):
            errors.append(f"the disk did not take everything in {self._timeout:g} s")
        self._folders.forget(step)
        errors += [why for _, _, why in self._folders.take_failures()]
        return {"errors": errors, "dropped": sorted(state.dropped)}

    def close(self) -> None:
        """Finishes every step that was captured and not finished, on every process alike.

        Raises:
            CaptureError: as `finish_step`.
        """
        if self.dir is None:
            return
        jax.effects_barrier()
        with self._lock:
            said = {"open": sorted(self._steps)}
        concluded = self._processes.agree(f"{self._key}/close", said, agreement.close, self._timeout)
        if concluded["errors"]:
            raise CaptureError("\n".join(concluded["errors"]))
        for step in concluded["open"]:
            self.finish_step(step)

    def __enter__(self) -> "Capture":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()


def collectives(compiled: Any) -> dict[str, int]:
    """How many collectives of each kind a compiled step holds: `collectives(step.lower(…).compile())`.

    The same with and without capture, if `hidden_spec` and `unembedding_spec` are how the arrays really are sharded.
    """
    text = compiled.as_text()
    kinds = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")
    return {kind: n for kind in kinds if (n := text.count(f" {kind}(") + text.count(f" {kind}-start("))}
