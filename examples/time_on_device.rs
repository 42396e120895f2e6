//! How long the StableHLO programs take on a device, and the memory they need: `time_on_device PLUGIN N,D,V TILE...`.
//!
//! ```text
//! cargo run --release --features pjrt --example time_on_device -- cuda 4096,1024,50304 2048 8192
//! ```
//! Forward and backward in one go, from Q and K in bfloat16 to dQ in bfloat16 and dK in float32; dlogits are rounded to bfloat16
//! before the gradient products, as a training run has them. Times are of whole executions, each awaited; the median of several.

use fused_xent::kernels::problem::{DType, Layout, LossOptions, Shape};
use fused_xent::kernels::stablehlo::{Program, Spec, chunked, naive};
use fused_xent::pjrt::{Buffer, CompileOptions, Device, Element, PjrtError, Plugin};
use std::time::Instant;

/// Executions that are timed, after two that are not.
const ROUNDS: usize = 9;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [plugin, shape, tiles @ ..] = &arguments[..] else {
        return Err("usage: time_on_device PLUGIN N,D,V TILE...".into());
    };
    let sizes = shape.split(',').map(str::parse).collect::<Result<Vec<usize>, _>>()?;
    let [tokens, hidden, vocab] = sizes[..] else { return Err("a shape is N,D,V".into()) };
    let spec = Spec {
        shape: Shape { tokens, hidden, vocab },
        layout: Layout::Vd,
        inputs: [DType::Bf16; 2],
        gradients: [DType::Bf16, DType::F32],
        options: LossOptions::default(),
        bf16_logits: false,
        bf16_dlogits: true,
    };
    let plugin = Plugin::load(plugin)?;
    let client = plugin.client(&plugin.sharing_options())?;
    let device = client.device(0)?;
    println!(
        "{}, {}; N {tokens}, D {hidden}, V {vocab}",
        device.kind()?,
        client.platform_version()?.lines().next().unwrap_or("")
    );
    let inputs = inputs(&device, &spec)?;
    println!("        program    median ms  least ms  TFLOP/s  workspace MiB  device peak MiB  compiled in");
    // The device's peak only grows: what needs least comes first.
    let mut programs = tiles
        .iter()
        .map(|tile| Ok((tile.clone(), chunked(&spec, tile.parse()?))))
        .collect::<Result<Vec<_>, std::num::ParseIntError>>()?;
    programs.push(("naive".into(), naive(&spec)));
    for (name, program) in &programs {
        let time = time(&device, program, &inputs, 6.0 * (tokens * hidden) as f64 * vocab as f64);
        println!("{name:>15} {}", time.unwrap_or_else(|e| e.to_string()));
    }
    Ok(())
}

fn time(device: &Device, program: &Program, inputs: &[Buffer], flop: f64) -> Result<String, PjrtError> {
    let began = Instant::now();
    let compiled = device.compile(&program.text, &CompileOptions::default())?;
    let compile = began.elapsed().as_secs_f64();
    let arguments: Vec<&Buffer> = inputs.iter().collect();
    let mut times = Vec::new();
    for _ in 0..ROUNDS + 2 {
        let began = Instant::now();
        compiled.execute(&arguments)?;
        times.push(began.elapsed().as_secs_f64());
    }
    let mut times = times.split_off(2);
    times.sort_by(f64::total_cmp);
    let median = times[ROUNDS / 2];
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let workspace = mib(compiled.executable().memory()?.workspace);
    let peak = device.memory().ok().and_then(|memory| memory.peak).map_or("-".into(), |peak| format!("{:.0}", mib(peak)));
    let (least, rate) = (times[0] * 1e3, flop / median / 1e12);
    Ok(format!("{:12.2} {least:9.2} {rate:8.1} {workspace:14.0} {peak:>16} {compile:9.1} s", median * 1e3))
}

/// Q, K, labels and g on the device: noise of which the logits have deviation 1.
fn inputs(device: &Device, spec: &Spec) -> Result<Vec<Buffer>, PjrtError> {
    let Shape { tokens, hidden, vocab } = spec.shape;
    let mut state = 1u64;
    let mut uniform = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    let mut noise = |count: usize, deviation: f32| -> Vec<u8> {
        let scale = deviation * 12f32.sqrt();
        (0..count).flat_map(|_| half::bf16::from_f32(scale * (uniform() - 0.5)).to_le_bytes()).collect()
    };
    let (q, k) = (noise(tokens * hidden, 1.0), noise(vocab * hidden, (hidden as f32).sqrt().recip()));
    let labels: Vec<u8> = (0..tokens).flat_map(|n| ((n * 7919 % vocab) as i32).to_le_bytes()).collect();
    let g: Vec<u8> = (0..tokens).flat_map(|_| (1.0 / tokens as f32).to_le_bytes()).collect();
    Ok(vec![
        device.upload(Element::Bf16, &[tokens, hidden], &q)?,
        device.upload(Element::Bf16, &[vocab, hidden], &k)?,
        device.upload(Element::I32, &[tokens], &labels)?,
        device.upload(Element::F32, &[tokens], &g)?,
    ])
}
