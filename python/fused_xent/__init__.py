"""Captures the exact inputs and gradients of training steps, for xent-diff to judge.

`Writer` takes arrays of numpy, PyTorch or anything with DLPack. `Capture` captures inside a jitted JAX train step; it needs
jax, which is imported when it is first used. `fused_xent.jax` has the kernel as a function of JAX.
"""

from typing import TYPE_CHECKING

from ._native import __version__
from .errors import CaptureError
from .writer import Writer

if TYPE_CHECKING:
    from .capture import Capture, StepReport

__all__ = ["Capture", "CaptureError", "StepReport", "Writer", "__version__"]


def __getattr__(name: str):
    if name in ("Capture", "StepReport"):
        from . import capture

        return getattr(capture, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
