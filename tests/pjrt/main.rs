//! The PJRT runtime, the StableHLO programs, and the candidates that run on a device.
//!
//! What needs a plugin is ignored unless FUSED_XENT_TEST_PLUGIN names one: `make test` builds a CPU plugin for it. Tests whose
//! names begin with `cpu_` are about that plugin; the others hold for any.

mod candidates;
mod interpreter;
mod load;
mod programs;
mod runtime;
mod selftest;
#[path = "../../kernels/tests/suite/mod.rs"]
mod suite;
mod support;
