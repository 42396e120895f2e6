//! Throughput of every kernel of this machine, `<kernel>/<pass>/<N>x<D>x<V>`, and of multiply-adds from registers
//! alone, `machine/<instruction>`.
//!
//! Elements are floating-point operations. Counted are 2·N·D·V for the forward, 6·N·D·V for the backward from the lse (of
//! which 2·N·D·V recompute the logits) and for both at once where the workspace keeps the logits, and 8·N·D·V for both at once
//! in a workspace that does not. `RAYON_NUM_THREADS=1` measures one core.

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use fused_xent_kernels::problem::{Inputs, Layout, LossOptions, Problem, Shape};
use fused_xent_kernels::{Cotangents, GradientMut, Gradients, Kernel};
use half::bf16;
use std::time::Duration;

#[path = "../examples/support/peak.rs"]
mod peak;

const SHAPES: [Shape; 2] = [Shape { tokens: 512, hidden: 512, vocab: 8192 }, Shape { tokens: 1024, hidden: 512, vocab: 16384 }];

/// Evenly spread numbers in [−size, size], another sequence for every `salt`.
fn numbers(count: usize, size: f64, salt: u64) -> Vec<bf16> {
    let mixed = |i: u64| {
        let x = (i ^ salt << 32).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        (x ^ x >> 32).wrapping_mul(0xD6E8_FEB8_6659_FD93) >> 32
    };
    (0..count as u64).map(|i| bf16::from_f64(size * (mixed(i) as f64 / 2f64.powi(31) - 1.0))).collect()
}

fn kernels(c: &mut Criterion) {
    for shape @ Shape { tokens, hidden, vocab } in SHAPES {
        let (q, k) = (numbers(tokens * hidden, 1.0, 1), numbers(vocab * hidden, 0.005, 2));
        let targets: Vec<u32> = (0..tokens as u32).map(|n| n * 37 % vocab as u32).collect();
        let inputs = Inputs {
            hidden: q[..].into(),
            unembedding: k[..].into(),
            layout: Layout::Vd,
            targets: targets[..].into(),
            token_weights: None,
            shape,
            shard: None,
        };
        let problem = Problem::new(inputs, LossOptions::default()).expect("the shapes fit");
        let g = vec![1.0 / tokens as f32; tokens];
        let (mut dq, mut dk) = (vec![0.0; tokens * hidden], vec![0.0; vocab * hidden]);
        for kernel in Kernel::available() {
            let forward = kernel.forward(&problem).expect("the whole vocabulary");
            let mean = forward.loss.iter().sum::<f32>() / tokens as f32;
            let uniform = (vocab as f32).ln();
            assert!((mean - uniform).abs() < 1e-2, "{mean}: nearly uniform logits give a loss near ln V = {uniform}");
            let backward = |dq: &mut [f32], dk: &mut [f32]| {
                let cotangents = Cotangents { loss: Some(&g), ..Cotangents::default() };
                let gradients = Gradients {
                    d_hidden: Some(GradientMut::F32(dq)),
                    d_unembedding: Some(GradientMut::F32(dk)),
                    ..Gradients::default()
                };
                kernel.backward(&problem, &forward.lse, cotangents, gradients).expect("the buffers fit");
            };
            let both = |kernel: &Kernel, dq: &mut [f32], dk: &mut [f32]| {
                let gradients = Gradients {
                    d_hidden: Some(GradientMut::F32(dq)),
                    d_unembedding: Some(GradientMut::F32(dk)),
                    ..Gradients::default()
                };
                assert_eq!(kernel.loss_and_grad(&problem, &g, gradients).as_ref(), Ok(&forward));
            };
            backward(&mut dq, &mut dk);
            let expected = dq.clone();
            both(&kernel, &mut dq, &mut dk);
            assert_eq!(dq, expected, "both ways to dQ agree");
            // Σ_v dlogits = 0, so dK sums to 0 over the vocabulary, up to rounding.
            let sum: f32 = dk.iter().step_by(hidden).sum();
            let size: f32 = dk.iter().step_by(hidden).map(|x| x.abs()).sum();
            assert!(sum.abs() < 1e-3 * size, "Σ_v dK = {sum} of {size}");

            let work = (tokens * hidden * vocab) as u64;
            let size = format!("{tokens}x{hidden}x{vocab}");
            let mut group = quick(c, kernel.name());
            group.throughput(Throughput::Elements(2 * work));
            group.bench_function(format!("forward/{size}"), |b| {
                b.iter(|| assert_eq!(kernel.forward(&problem).as_ref(), Ok(&forward)));
            });
            group.throughput(Throughput::Elements(6 * work));
            group.bench_function(format!("backward/{size}"), |b| b.iter(|| backward(&mut dq, &mut dk)));
            group.bench_function(format!("loss_and_grad/{size}"), |b| b.iter(|| both(&kernel, &mut dq, &mut dk)));
            if shape == SHAPES[0] {
                let small = kernel.clone().with_workspace(1 << 20);
                assert!(small.workspace_bytes(&problem) < 64 * vocab * size_of::<f32>(), "no room for whole rows of 64 tokens");
                group.throughput(Throughput::Elements(8 * work));
                group.bench_function(format!("loss_and_grad_in_1_MiB/{size}"), |b| b.iter(|| both(&small, &mut dq, &mut dk)));
            }
            group.finish();
        }
    }
}

/// Ten samples of one run each where a run is long.
fn quick<'a>(c: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    group.warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_secs(1));
    group
}

/// What multiply-adds give from registers alone, on every thread.
fn machine(c: &mut Criterion) {
    let mut group = quick(c, "machine");
    for instruction in peak::available() {
        group.throughput(Throughput::Elements(instruction.operations() as u64));
        group.bench_function(instruction.name, |b| b.iter(|| instruction.run()));
    }
    group.finish();
}

criterion_group!(benches, machine, kernels);
criterion_main!(benches);
