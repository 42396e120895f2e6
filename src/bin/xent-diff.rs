//! The `xent-diff` command.

fn main() -> std::process::ExitCode {
    fused_xent::cli::main()
}
