//! `xent-diff isolate`: the search on made-up benches, the command on small programs, and a real case in JAX.

#[cfg(unix)]
mod command;
#[cfg(unix)]
mod jax;
mod search;
#[cfg(unix)]
mod support;
