//! The kernels of the CPU: one file per instruction set, each a thin instance of the one tiled algorithm.

pub(crate) mod exp;
pub(crate) mod portable;
