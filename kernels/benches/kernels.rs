//! Throughput of every kernel of this machine: `<kernel>/<pass>/<N> x <D> x <V>`, in floating-point operations (elements).
//!
//! 2·N·D·V are counted for the forward, 6·N·D·V for the backward from the lse (recomputing included: 6 are useful) and for
//! both at once. `RAYON_NUM_THREADS=1` measures one core.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use fused_xent_kernels::problem::{Inputs, Layout, LossOptions, Problem, Shape};
use fused_xent_kernels::{Cotangents, GradientMut, Gradients, Kernel};
use half::bf16;

const SHAPES: [Shape; 2] = [Shape { tokens: 512, hidden: 512, vocab: 8192 }, Shape { tokens: 1024, hidden: 512, vocab: 16384 }];

/// Evenly spread numbers in [−size, size], in no evident order.
fn numbers(count: usize, size: f64) -> Vec<bf16> {
    (0..count).map(|i| bf16::from_f64(size * (2.0 * (i as f64 * 0.618_033_988_75).fract() - 1.0))).collect()
}

fn kernels(c: &mut Criterion) {
    for shape @ Shape { tokens, hidden, vocab } in SHAPES {
        let (q, k) = (numbers(tokens * hidden, 1.0), numbers(vocab * hidden, 0.05));
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
            let backward = |dq: &mut [f32], dk: &mut [f32]| {
                let cotangents = Cotangents { loss: Some(&g), ..Cotangents::default() };
                let gradients = Gradients { d_hidden: Some(GradientMut::F32(dq)), d_unembedding: Some(GradientMut::F32(dk)) };
                kernel.backward(&problem, &forward.lse, cotangents, gradients).expect("the buffers fit");
            };
            let both = |dq: &mut [f32], dk: &mut [f32]| {
                let gradients = Gradients { d_hidden: Some(GradientMut::F32(dq)), d_unembedding: Some(GradientMut::F32(dk)) };
                assert_eq!(kernel.loss_and_grad(&problem, &g, gradients).as_ref(), Ok(&forward));
            };
            backward(&mut dq, &mut dk);
            let expected = dq.clone();
            both(&mut dq, &mut dk);
            assert_eq!(dq, expected, "both ways to dQ agree");
            // Σ_v dlogits = 0, so dK sums to 0 over the vocabulary, up to rounding.
            let sum: f32 = dk.iter().step_by(hidden).sum();
            let size: f32 = dk.iter().step_by(hidden).map(|x| x.abs()).sum();
            assert!(sum.abs() < 1e-3 * size, "Σ_v dK = {sum} of {size}");

            let work = (tokens * hidden * vocab) as u64;
            let size = format!("{tokens} x {hidden} x {vocab}");
            let mut group = c.benchmark_group(kernel.name());
            group.sample_size(10);
            group.throughput(Throughput::Elements(2 * work));
            group.bench_function(format!("forward/{size}"), |b| {
                b.iter(|| assert_eq!(kernel.forward(&problem).as_ref(), Ok(&forward)));
            });
            group.throughput(Throughput::Elements(6 * work));
            group.bench_function(format!("backward/{size}"), |b| b.iter(|| backward(&mut dq, &mut dk)));
            group.bench_function(format!("loss_and_grad/{size}"), |b| b.iter(|| both(&mut dq, &mut dk)));
            group.finish();
        }
    }
}

criterion_group!(benches, kernels);
criterion_main!(benches);
