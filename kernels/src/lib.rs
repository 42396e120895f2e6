//! Fused linear cross-entropy: loss, log-sum-exp and gradients of `cross_entropy(Q·Kᵀ, targets)` that never materialise
//! the logits, with float32 accumulation, a custom VJP, and the float64 oracle that judges them.
//!
//! Q = hidden [N, D]; K = unembedding [V, D]; targets [N]; logits z = Q·Kᵀ; lse = log Σ_v exp z_v; label logit z_t;
//! P = exp(z − lse); g = per-token cotangent; dlogits = g·(P − onehot); dQ = dlogits·K; dK = dlogitsᵀ·Q.

pub mod contract;
mod cpu;
mod elementwise;
pub mod floor;
mod gemm;
pub mod problem;
pub mod reduction;
pub mod reference;
pub mod shard;
mod tiled;
pub mod vjp;

pub use vjp::{Cotangents, Forward, GradientMut, Gradients, Kernel, Predictions};
