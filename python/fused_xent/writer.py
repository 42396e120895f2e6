"""Writing dumps from arrays: numpy, PyTorch, or anything with DLPack or the buffer protocol."""

import json
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np

from ._native import BackgroundFolders
from .errors import CaptureError

GRADIENTS_OF_UNEMBEDDING = ("d_unembedding", "d_unembedding_lse", "d_unembedding_label")
"""The tensors that lie as the unembedding does."""

QUEUE_BYTES = 256 << 20
"""At most so many bytes of arrays wait for the background writer."""


def as_numpy(array: Any) -> np.ndarray:
    """The elements of `array` in this machine's memory, bit for bit, bfloat16 as `ml_dtypes.bfloat16`.

    PyTorch hands bfloat16 to nobody: its bits are taken as int16.
    """
    if isinstance(array, np.ndarray):
        return array
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        if str(array.dtype) == "torch.bfloat16":
            import torch

            return array.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return array.numpy()
    if hasattr(array, "__array__"):
        return np.asarray(array)
    if hasattr(array, "__dlpack__"):
        return np.from_dlpack(array)
    return np.asarray(memoryview(array))


def hand_over(
    folders: BackgroundFolders,
    step: int,
    microbatch: int | None,
    name: str,
    array: np.ndarray,
    start: Sequence[int],
    global_shape: Sequence[int],
    replica: int = 0,
    layout: str = "vd",
) -> None:
    """Hands an array to the background writer; its elements are copied."""
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    folders.tensor(
        step,
        microbatch,
        name,
        array.dtype.name,
        np.ascontiguousarray(array).reshape(-1).view(np.uint8),
        start=[int(i) for i in start],
        shape=array.shape,
        global_shape=[int(i) for i in global_shape],
        replica=replica,
        layout=layout if name == "unembedding" or name in GRADIENTS_OF_UNEMBEDDING else "vd",
    )


class Writer:
    """Writes a dump from arrays of this process.

    `tensor` copies and returns; a thread writes. `commit` says that a folder is whole: only then do readers see it, and a crash
    at any moment leaves every committed folder readable. `flush`, `close` and the end of a `with` block wait for the disk and
    raise what went wrong; a folder with an error stays uncommitted.

    Glossary: N tokens, B × S of them as [batch, sequence]; D hidden size; V vocabulary.

    Args:
        dir: the dump. Each process writes a folder `proc_<index>` of its own into it.
        loss: the loss that the run computes, as the `loss` member of a manifest: `{"reduction": "mean", …}`. Members left out
            are the defaults.
        num_microbatches: microbatches of a step.
        process_index, process_count: this process, and how many there are.
        run_id: names the run; several processes must be given the same one.
        contract: how the gradients are computed, as the `contract` member of a manifest.
        verify: read every folder back once it is committed, and compare.
    """

    def __init__(
        self,
        dir: str | PathLike[str],
        *,
        loss: Mapping[str, Any] | None = None,
        num_microbatches: int = 1,
        process_index: int = 0,
        process_count: int = 1,
        run_id: str | None = None,
        contract: Mapping[str, str] | None = None,
        verify: bool = False,
    ) -> None:
        self._folders = BackgroundFolders(
            fspath(dir),
            loss=json.dumps(dict(loss or {})),
            num_microbatches=num_microbatches,
            process_index=process_index,
            process_count=process_count,
            run_id=run_id,
            contract=None if contract is None else json.dumps(dict(contract)),
            verify=verify,
            max_bytes=QUEUE_BYTES,
        )

    @property
    def run_id(self) -> str:
        """The name of the run."""
        return self._folders.run_id

    def tensor(
        self,
        step: int,
        microbatch: int | None,
        name: str,
        array: Any,
        *,
        start: Sequence[int] | None = None,
        global_shape: Sequence[int] | None = None,
        replica: int = 0,
        layout: str = "vd",
    ) -> None:
        """Hands over an array, or this process's shard of it.

        Args:
            step, microbatch: the folder; microbatch `None` is `shared`, where `unembedding` and the accumulated `d_unembedding`
                belong.
            name: `hidden` [N, D] or [B, S, D], bfloat16, float16 or float32; `targets` [N] or [B, S], int32, int64 or uint32;
                `token_weights`, `loss`, `lse`, `label_logits`, `d_lse`, `d_label_logits` like targets, float32; `d_hidden` like
                hidden, any float; `unembedding` [V, D] like hidden's dtypes; `d_unembedding` like it, any float.
            array: numpy, PyTorch, or anything with DLPack or the buffer protocol. It may be overwritten afterwards.
            start, global_shape: where a shard begins in the tensor of all processes, and that tensor's shape.
            replica: above 0 for a copy of what is recorded elsewhere too.
            layout: `"dv"` if an unembedding or its gradient is [D, V].
        """
        array = as_numpy(array)
        if (start is None) != (global_shape is None):
            raise ValueError(f"{name}: start and global_shape go together; a whole array has neither")
        start, global_shape = (0,) * array.ndim if start is None else start, global_shape or array.shape
        hand_over(self._folders, step, microbatch, name, array, start, global_shape, replica, layout)

    def commit(self, step: int, microbatch: int | None) -> None:
        """Says that all of a folder was handed over; microbatch `None` is `shared`."""
        self._folders.commit(step, microbatch)

    def flush(self, timeout: float = 600.0) -> None:
        """Waits until all is on disk, `timeout` seconds at most.

        Raises:
            CaptureError: what could not be written, or that the disk took longer.
        """
        done = self._folders.flush(timeout)
        errors = [why for _, _, why in self._folders.take_failures()]
        if not done:
            errors.append(f"the disk did not take everything in {timeout:g} s")
        if errors:
            raise CaptureError("\n".join(errors))

    def close(self) -> None:
        """As `flush`."""
        self.flush()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._folders.flush(60.0)
