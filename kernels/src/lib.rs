//! Fused linear cross-entropy: loss, log-sum-exp and gradients of `cross_entropy(Q·Kᵀ, targets)` that never materialise
//! the logits, with float32 accumulation, a custom VJP, and the float64 oracle that judges them.
//!
//! Q = hidden [N, D]; K = unembedding [V, D]; targets [N]; logits z = Q·Kᵀ; lse = log Σ_v exp z_v; label logit z_t;
//! P = exp(z − lse); g = per-token cotangent; dlogits = g·(P − onehot); dQ = dlogits·K; dK = dlogitsᵀ·Q.
//!
//! ```
//! use fused_xent_kernels::problem::{Inputs, Layout, LossOptions, Problem, Shape};
//! use fused_xent_kernels::{GradientMut, Gradients, Kernel};
//!
//! let (hidden, unembedding) = ([0.5f32, -1.0, 2.0, 0.25], [1.0f32, 0.0, 0.0, 1.0, -1.0, 1.0]);
//! let problem = Problem::new(
//!     Inputs {
//!         hidden: hidden[..].into(),
//!         unembedding: unembedding[..].into(),
//!         layout: Layout::Vd,
//!         targets: [2i32, -100][..].into(), // the second token is masked
//!         token_weights: None,
//!         shape: Shape { tokens: 2, hidden: 2, vocab: 3 },
//!         shard: None,
//!     },
//!     LossOptions::default(),
//! )?;
//! let (mut dq, mut dk) = ([0.0f32; 4], [0.0f32; 6]);
//! let gradients = Gradients {
//!     d_hidden: Some(GradientMut::F32(&mut dq)),
//!     d_unembedding: Some(GradientMut::Accumulate(&mut dk)),
//!     ..Gradients::default()
//! };
//! let forward = Kernel::best().loss_and_grad(&problem, &[1.0, 1.0], gradients)?;
//! // z = [0.5, −1, −1.5], so lse = 0.806 and the loss is lse − z₂ = 2.306.
//! assert!((forward.loss[0] - 2.306).abs() < 1e-3);
//! assert_eq!(dq[2..], [0.0, 0.0]);
//! # Ok::<(), fused_xent_kernels::problem::ProblemError>(())
//! ```

pub mod contract;
mod cpu;
mod elementwise;
mod filter;
pub mod floor;
mod gemm;
mod lanes;
mod memory;
mod panels;
pub mod problem;
pub mod product;
pub mod reduction;
pub mod reference;
pub mod shard;
pub mod stablehlo;
mod tiled;
pub mod tpu;
pub mod vjp;

pub use filter::Filter;
pub use vjp::{Cotangents, Dlogits, Forward, GradientMut, Gradients, Kernel, Predictions, UnknownKernel};

/// The examples of the kernels' guide, compiled and run as tests.
#[cfg(doctest)]
#[doc = include_str!("../../docs/kernels.md")]
struct Guide;

#[cfg(doctest)]
#[doc = include_str!("../../docs/tpu.md")]
struct TpuGuide;
