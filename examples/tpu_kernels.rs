//! The TPU kernels of a shape, compiled ahead: `tpu_kernels LIBTPU N D V [--cycles] GENERATION...`.
//!
//! ```text
//! cargo run --release --features pjrt --example tpu_kernels -- $(tests/scripts/libtpu) 4096 1024 50304 v5e v6e
//! ```
//! Prints for bfloat16 and each generation how the kernels are cut, what they take, and with `--cycles` what the compiler's static
//! profile says that they last: simulated, of one core, beside the least that its MXU and its HBM allow. The profile takes up to
//! minutes and several GB (20 for a backward at V = 50304), is there for v5e, v5p, v6e and v7x, and is made in a child process, which may
//! die of it.

use fused_xent::kernels::problem::{DType, Layout, LossOptions, Shape};
use fused_xent::kernels::tpu::{Backward, Generation, Program, Spec};
use fused_xent::pjrt::{CompileOptions, Plugin, Topology};
use std::error::Error;
use std::path::Path;
use std::process::{Command, Stdio};

/// Has a child process write the profile of a pass to the folder that it names.
const PROFILE: &str = "FUSED_XENT_TPU_PROFILE";

fn main() -> Result<(), Box<dyn Error>> {
    let (flags, arguments): (Vec<String>, Vec<String>) = std::env::args().skip(1).partition(|a| a.starts_with("--"));
    let [libtpu, n, d, v, generations @ ..] = &arguments[..] else {
        return Err("usage: tpu_kernels LIBTPU N D V [--cycles] GENERATION...".into());
    };
    let shape = Shape { tokens: n.parse()?, hidden: d.parse()?, vocab: v.parse()? };
    let spec = Spec { shape, layout: Layout::Vd, inputs: [DType::Bf16; 2], options: LossOptions::default() };
    let backward = Backward::plain(spec);
    let plugin = Plugin::load(libtpu)?;
    for name in generations {
        let generation = Generation::by_name(name).ok_or_else(|| format!("{name} is none of v4, v5e, v5p, v6e, v7x"))?;
        let devices = plugin.tpu(generation)?;
        let passes = [
            ("forward", spec.forward(generation, None)?, spec.plan(generation)?.to_string(), 2.0),
            ("backward", backward.program(generation, None)?, backward.plan(generation)?.to_string(), 6.0),
        ];
        for (pass, program, plan, operations) in passes {
            if std::env::var_os(PROFILE).is_some() {
                if flags.contains(&format!("--{pass}")) {
                    devices.compile_ahead(&program.text, &CompileOptions::default())?;
                }
                continue;
            }
            println!("{name} {pass}: {plan}");
            print_memory(&program, &devices)?;
            if flags.iter().any(|flag| flag == "--cycles") {
                let operations = operations * [n, d, v].iter().map(|x| x.parse::<f64>().expect("checked above")).product::<f64>();
                print_cycles(&arguments[..4], generation, pass, operations, shape)?;
            }
        }
    }
    Ok(())
}

fn print_memory(program: &Program, devices: &Topology) -> Result<(), Box<dyn Error>> {
    let memory = devices.compile_ahead(&program.text, &CompileOptions::default())?.memory()?;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    println!(
        "    {} kernels, VMEM {:.1} MiB at most; HBM {:.1} MiB beside arguments and results; code {:.2} MiB",
        program.kernels.len(),
        mib(program.vmem_bytes as u64),
        mib(memory.workspace),
        mib(memory.code)
    );
    Ok(())
}

fn print_cycles(
    arguments: &[String],
    generation: Generation,
    pass: &str,
    operations: f64,
    shape: Shape,
) -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    let flag = format!("--xla_jf_dump_static_llo_profile_to={}", folder.path().display());
    Command::new(std::env::current_exe()?)
        .args(arguments)
        .args([generation.name(), &format!("--{pass}")])
        .env("LIBTPU_INIT_ARGS", flag)
        .env(PROFILE, folder.path())
        .stderr(Stdio::null())
        .status()?;
    let Some(cycles) = profile(folder.path())? else {
        println!("    no static profile");
        return Ok(());
    };
    let cores = generation.cores() as f64;
    let mxu = generation.mxu_cycles(operations) / cores;
    let Shape { tokens, hidden, vocab } = shape;
    let once = 2.0 * hidden as f64 * (tokens + vocab) as f64 * if pass == "forward" { 1.0 } else { 2.0 };
    let hbm = generation.hbm_cycles(once / cores);
    println!(
        "    {cycles:.0} cycles of a core, simulated; MXU minimum {mxu:.0} ({:.1} %), HBM minimum {hbm:.0}",
        100.0 * mxu / cycles
    );
    Ok(())
}

/// The cycles of all operations of a program, if they were profiled; each has a file.
fn profile(folder: &Path) -> Result<Option<f64>, Box<dyn Error>> {
    let mut cycles = None;
    for file in std::fs::read_dir(folder)? {
        let path = file?.path();
        if path.to_string_lossy().ends_with("static_llo_profile.textproto") {
            let text = std::fs::read_to_string(path)?;
            let all = |field: &str| {
                let values = text.split(field).skip(1).filter_map(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
                values.collect::<Vec<_>>()
            };
            // Equal operations, as the kernels of the middle token chunks, share a file.
            let times = all("num_equivalent_hlos:").first().copied().unwrap_or(1.0);
            let of_one = times * all("estimated_cycles:").iter().sum::<f64>();
            cycles = Some(cycles.unwrap_or(0.0) + of_one);
        }
    }
    Ok(cycles)
}
