//! One contender of `benches/peers`: the fused kernel behind a pipe.
//!
//! `peer FOLDER N D V [KERNEL[:DLOGITS]]`, `best:bf16` by default, reads `hidden.bf16` [N, D], `unembedding.bf16` [V, D] and `targets.i32` [N] of FOLDER, raw
//! and little-endian, and then answers each line of its input with one line of JSON:
//!
//! ```text
//! forward | loss_and_grad | recompute [PREFIX]   the pass, timed; recompute is forward, then backward from the lse.
//!                                                With PREFIX the gradients go to PREFIX.dq (bfloat16) and .dk (float32).
//! peak                                           what the machine multiplies and adds at most, on every thread
//! ```
//!
//! The loss is the mean over the tokens. The first line out says which kernel it is, or what is wrong.

use fused_xent_kernels::problem::{self, DType, Inputs, LossOptions, Problem, Shape};
use fused_xent_kernels::{Cotangents, Dlogits, GradientMut, Gradients, Kernel};
use half::bf16;
use std::alloc::{GlobalAlloc, Layout, System};
use std::error::Error;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;
use std::{env, fs, io};

#[path = "support/peak.rs"]
mod peak;

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    if let Err(error) = run(&arguments) {
        println!("{{\"error\": {:?}}}", error.to_string());
        std::process::exit(1);
    }
}

fn run(arguments: &[String]) -> Result<(), Box<dyn Error>> {
    let [folder, tokens, hidden, vocab, kernel @ ..] = arguments else {
        return Err("expected FOLDER N D V [KERNEL]".into());
    };
    let shape = Shape { tokens: tokens.parse()?, hidden: hidden.parse()?, vocab: vocab.parse()? };
    let (name, dlogits) = kernel.first().map_or(("best", "bf16"), |k| k.split_once(':').unwrap_or((k, "bf16")));
    let kernel = match name {
        "best" => Kernel::best(),
        name => Kernel::by_name(name).ok_or_else(|| {
            let available: Vec<_> = Kernel::available().iter().map(Kernel::name).collect();
            format!("this machine has no kernel {name}; it has {}", available.join(", "))
        })?,
    };
    let dlogits = Dlogits::by_name(dlogits).ok_or_else(|| format!("dlogits are bf16, bf16x2 or f32, not {dlogits}"))?;
    let kernel = kernel.with_dlogits(dlogits);
    let precision = kernel.contract([DType::Bf16; 2], [DType::Bf16, DType::F32]).dlogits.name();
    let folder = Path::new(folder);
    let q = read(&folder.join("hidden.bf16"), bf16::from_le_bytes)?;
    let k = read(&folder.join("unembedding.bf16"), bf16::from_le_bytes)?;
    let targets = read(&folder.join("targets.i32"), i32::from_le_bytes)?;
    let inputs = Inputs {
        hidden: q[..].into(),
        unembedding: k[..].into(),
        layout: problem::Layout::Vd,
        targets: targets[..].into(),
        token_weights: None,
        shape,
        shard: None,
    };
    let problem = Problem::new(inputs, LossOptions::default())?;
    let g = vec![1.0 / shape.tokens as f32; shape.tokens];
    let mut dq = vec![bf16::ZERO; q.len()];
    let mut dk = vec![0.0f32; k.len()];

    println!("{{\"version\": {:?}}}", format!("kernel {}, dlogits {precision}", kernel.name()));
    let held = LIVE.load(Relaxed);
    for line in io::stdin().lines() {
        let line = line?;
        let (command, prefix) = line.split_once(' ').map_or((&line[..], None), |(command, prefix)| (command, Some(prefix)));
        let gradients = Gradients {
            d_hidden: Some(GradientMut::Bf16(&mut dq)),
            d_unembedding: Some(GradientMut::F32(&mut dk)),
            ..Gradients::default()
        };
        MOST.store(held, Relaxed);
        let start = Instant::now();
        let forward = match command {
            "forward" => kernel.forward(&problem)?,
            "loss_and_grad" => kernel.loss_and_grad(&problem, &g, gradients)?,
            "recompute" => {
                let forward = kernel.forward(&problem)?;
                let cotangents = Cotangents { loss: Some(&g), ..Cotangents::default() };
                kernel.backward(&problem, &forward.lse, cotangents, gradients)?;
                forward
            }
            "peak" => {
                let (instructions, gflops) = peak::widest().map_or(("none", 0.0), |widest| (widest.name, widest.gflops()));
                println!("{{\"instructions\": {instructions:?}, \"gflops\": {gflops}}}");
                continue;
            }
            _ => return Err(format!("unknown command {line:?}").into()),
        };
        let seconds = start.elapsed().as_secs_f64();
        let extra = MOST.load(Relaxed) - held;
        let loss = forward.loss.iter().map(|&loss| f64::from(loss)).sum::<f64>() / shape.tokens as f64;
        let mut dtypes = "";
        if command != "forward" {
            dtypes = ", \"dq\": \"bfloat16\", \"dk\": \"float32\"";
            if let Some(prefix) = prefix {
                write(&format!("{prefix}.dq"), &dq, bf16::to_le_bytes)?;
                write(&format!("{prefix}.dk"), &dk, f32::to_le_bytes)?;
            }
        }
        println!("{{\"seconds\": {seconds}, \"loss\": {loss}, \"extra_bytes\": {extra}{dtypes}}}");
    }
    Ok(())
}

fn read<T, const BYTES: usize>(path: &Path, element: impl Fn([u8; BYTES]) -> T) -> Result<Vec<T>, Box<dyn Error>> {
    let bytes = fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(bytes.as_chunks().0.iter().map(|&chunk| element(chunk)).collect())
}

fn write<T: Copy, const BYTES: usize>(path: &str, values: &[T], bytes: impl Fn(T) -> [u8; BYTES]) -> Result<(), Box<dyn Error>> {
    let bytes: Vec<u8> = values.iter().flat_map(|&x| bytes(x)).collect();
    fs::write(path, bytes).map_err(|error| format!("{path}: {error}").into())
}

/// The system's allocator, which counts.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;
static LIVE: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

impl Counting {
    fn add(bytes: usize) {
        MOST.fetch_max(LIVE.fetch_add(bytes, Relaxed) + bytes, Relaxed);
    }
}

// SAFETY: every call goes on to the system's allocator as it came; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::add(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::add(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}
