//! The `xent-diff` command.

fn main() {}
