//! What the StableHLO programs need on devices that are not at hand: `compile_ahead PLUGIN N D V TILE TOPOLOGY...`.
//!
//! ```text
//! cargo run --release --features pjrt --example compile_ahead -- tpu 4096 1024 50304 2048 v5e:1x1 v6e:1x1
//! ```

use fused_xent::kernels::problem::{DType, Layout, LossOptions, Shape};
use fused_xent::kernels::stablehlo::{Program, Spec, chunked, naive};
use fused_xent::pjrt::{CompileOptions, Options, PjrtError, Plugin};
use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [plugin, n, d, v, tile, topologies @ ..] = &arguments[..] else {
        return Err("usage: compile_ahead PLUGIN N D V TILE TOPOLOGY...".into());
    };
    let shape = Shape { tokens: n.parse()?, hidden: d.parse()?, vocab: v.parse()? };
    let spec = Spec {
        shape,
        layout: Layout::Vd,
        inputs: [DType::Bf16; 2],
        gradients: [DType::Bf16, DType::F32],
        options: LossOptions::default(),
        bf16_logits: false,
        bf16_dlogits: true,
    };
    let plugin = Plugin::load(plugin)?;
    println!("N {n}, D {d}, V {v}, tiles of {tile}; {plugin:?}");
    println!("MiB: {:>11} {:>9} {:>9} {:>9} {:>9}  compiled in", "arguments", "results", "workspace", "peak", "code");
    for topology in topologies {
        let devices = plugin.topology(topology, &Options::new())?;
        println!("{topology}: {}", devices.kinds()?.first().map_or("", String::as_str));
        for (name, program) in [("naive", naive(&spec)), ("chunked", chunked(&spec, tile.parse()?))] {
            let began = Instant::now();
            let compiled = devices.compile_ahead(&program.text, &CompileOptions::default());
            println!(
                "{name:>8} {}",
                compiled.and_then(|compiled| figures(&compiled.memory()?, began)).unwrap_or_else(first_line)
            );
            drop::<Program>(program);
        }
    }
    Ok(())
}

fn figures(memory: &fused_xent::pjrt::MemoryFigures, began: Instant) -> Result<String, PjrtError> {
    let mib = |bytes: u64| format!("{:9.1}", bytes as f64 / f64::from(1 << 20));
    let peak = memory.peak.map_or("        -".into(), mib);
    let all = [mib(memory.arguments), mib(memory.outputs), mib(memory.workspace), peak, mib(memory.code)];
    Ok(format!("{}  {:.1} s", all.join(" "), began.elapsed().as_secs_f64()))
}

fn first_line(error: PjrtError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
