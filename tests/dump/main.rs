//! Reading and writing dumps.

mod errors;
mod fuzz;
mod numpy;
mod roundtrip;
mod states;
mod support;
