"""The native half: the background writer, the kernel as custom calls of XLA, and those for TPUs."""

from collections.abc import Buffer, Sequence
from os import PathLike

__version__: str

class BackgroundFolders:
    """Writes the folders of one process from a thread of its own."""

    def __init__(
        self,
        root: str | PathLike[str],
        *,
        loss: str,
        num_microbatches: int,
        process_index: int,
        process_count: int,
        run_id: str | None,
        contract: str | None,
        verify: bool,
        max_bytes: int,
    ) -> None: ...
    @property
    def run_id(self) -> str: ...
    @property
    def written(self) -> int: ...
    def tensor(
        self,
        step: int,
        microbatch: int | None,
        name: str,
        dtype: str,
        data: Buffer,
        *,
        start: Sequence[int],
        shape: Sequence[int],
        global_shape: Sequence[int],
        replica: int,
        layout: str,
    ) -> None: ...
    def commit(self, step: int, microbatch: int | None) -> None: ...
    def forget(self, step: int) -> None: ...
    def flush(self, timeout: float) -> bool: ...
    def take_failures(self) -> list[tuple[int, int | None, str]]: ...

def xla_handlers() -> dict[str, object]: ...
def xla_layout() -> list[tuple[str, int]]: ...
def set_threads(threads: int) -> None: ...
def threads() -> int: ...
def kernel_name() -> str: ...
def kernel_contract(inputs: Sequence[str], gradients: Sequence[str], dlogits: str) -> str: ...
def tpu_generations() -> list[str]: ...
def tpu_generation(device_kind: str) -> str | None: ...

class TpuSpec:
    """A loss, and the chip that it is for. A `ValueError` says why there is no kernel."""

    def __init__(
        self,
        generation: str,
        shape: Sequence[int],
        inputs: Sequence[str],
        *,
        layout: str,
        valid_vocab: int,
        logit_scale: float,
        logit_softcap: float | None,
        z_loss: float,
        label_smoothing: float,
    ) -> None: ...
    def forward(self, tile: Sequence[int] | None = None) -> TpuProgram: ...
    def backward(self, gradients: Sequence[str], dlogits: str, plan: Sequence[int] | None = None) -> TpuProgram: ...

class TpuProgram:
    """A StableHLO program with its kernels: name and Mosaic body of each."""

    text: str
    kernels: list[tuple[str, str]]
