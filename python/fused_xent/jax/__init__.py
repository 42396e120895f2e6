"""The fused cross-entropy in JAX: the Rust kernel on CPUs, through XLA's foreign function interface, and JAX elsewhere.

Glossary: N tokens in any shape [..]; D hidden size; V vocabulary; Q = hidden [.., D]; K = unembedding [V, D]; logits z = Q·Kᵀ.
"""

from .choice import FallbackWarning, Implementation, contract, implementation, set_threads
from .loss import CrossEntropy, fused_cross_entropy

__all__ = [
    "CrossEntropy",
    "FallbackWarning",
    "Implementation",
    "contract",
    "fused_cross_entropy",
    "implementation",
    "set_threads",
]
