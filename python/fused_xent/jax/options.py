"""What a fused cross-entropy computes, known when it is traced."""

from dataclasses import dataclass


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
    dlogits: str | None
    poison: bool
    """Whether bad tokens make NaN rather than an error."""
    implementation: str | None


def precision_of_dlogits(inputs: tuple[str, str], gradients: tuple[str, str], asked: str | None) -> str:
    """Of dlogits in the products that make dQ and dK of them, where every precision is at hand: `bf16`, `bf16x2` or `f32`.

    Args:
        inputs, gradients: the dtypes of Q and K as they are multiplied, and of dQ and dK.
        asked: what the user wants.
    """
    if inputs != ("bfloat16", "bfloat16"):
        return "f32"
    return asked or ("bf16x2" if "float32" in gradients else "bf16")
