//! The interpreter of the kernels' own tests, which executes the emitted text.

#[path = "../../../kernels/tests/tpu/array.rs"]
pub mod array;
#[path = "../../../kernels/tests/tpu/hlo.rs"]
pub mod hlo;
#[path = "../../../kernels/tests/tpu/machine.rs"]
mod machine;
#[path = "../../../kernels/tests/tpu/parse.rs"]
mod parse;
