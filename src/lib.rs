//! Fused linear cross-entropy: kernels, capture of real training steps, and `xent-diff`, which says why gradients are wrong.

pub use fused_xent_kernels as kernels;

pub mod capture;
pub mod cli;
pub mod diff;
pub mod dump;
mod files;
pub mod isolate;
#[cfg(feature = "pjrt")]
pub mod pjrt;
pub mod report;
#[cfg(feature = "pjrt")]
pub mod selftest;
pub mod slice;

/// The README's examples, compiled and run as tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
