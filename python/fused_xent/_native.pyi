"""The native half: the background writer, and the kernel as custom calls of XLA."""

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
