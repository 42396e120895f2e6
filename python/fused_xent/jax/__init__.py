"""The fused cross-entropy in JAX: the Rust kernel on CPUs, through XLA's foreign function interface, kernels that Rust writes on
TPUs, and JAX elsewhere.

Glossary: N tokens in any shape [..]; D hidden size; V vocabulary; Q = hidden [.., D]; K = unembedding [V, D]; logits z = Q·Kᵀ.
"""

from .choice import FallbackWarning, Implementation, contract, implementation, set_threads
from .loss import CrossEntropy, fused_cross_entropy
from .options import Tpu

__all__ = [
    "CrossEntropy",
    "FallbackWarning",
    "Implementation",
    "Tpu",
    "contract",
    "fused_cross_entropy",
    "implementation",
    "set_threads",
]
