"""What a fused cross-entropy computes, known when it is traced."""

from dataclasses import dataclass
from typing import NamedTuple


class Tpu(NamedTuple):
    """How the kernels for TPUs are made, where the choice is not left to the model of the chip."""

    generation: str | None = None
    """`"v4"`, `"v5e"`, `"v5p"`, `"v6e"` or `"v7x"`; `None`: that of the devices for which the program is lowered."""
    forward: tuple[int, int] | None = None
    """Tokens and vocab ids of the forward's tile, multiples of 128."""
    backward: tuple[int, int, int] | None = None
    """Tokens and vocab ids of the backward's tile, and for how many tokens at a time dQ stays in VMEM; 0: dQ and dK are made by a
    kernel each."""


@dataclass(frozen=True)
class Options:
    """Checked: what follows from the shapes and dtypes is filled in."""

    layout: str
    ignore_index: int
    valid_vocab: int
    """Ids from here on are padding, of all shards together."""
    logit_scale: float
    logit_softcap: float
    """0: none."""
    z_loss: float
    label_smoothing: float
    vocab: int
    """V of all shards together."""
    vocab_axes: tuple[str, ...]
    """The mesh axes over which V is split; none: the unembedding is whole."""
    operands: str | None
    """The dtype to which Q and K are rounded before they are multiplied; `None`: their own."""
    gradients: tuple[str, str]
    """The dtypes of dQ and dK: those of Q and K as they were given."""
    dlogits: str
    """Their precision where Q and K are multiplied in bfloat16: `bf16`, `bf16x2` or `f32`. Elsewhere it is `f32`."""
    poison: bool
    """Whether bad tokens make NaN rather than an error."""
    implementation: str | None
    tpu: Tpu


def default_dlogits(gradients: tuple[str, str]) -> str:
    """The precision of dlogits for gradients of these dtypes, where Q and K are multiplied in bfloat16."""
    return "bf16x2" if "float32" in gradients else "bf16"
