//! Fused linear cross-entropy: kernels, capture of real training steps, and `xent-diff`, which says why gradients are wrong.

pub use fused_xent_kernels as kernels;

pub mod capture;
pub mod diff;
pub mod dump;
pub mod report;
