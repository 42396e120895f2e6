//! What a filter of small dlogits gains and loses, on a distribution like that of a trained model.
//!
//! `cargo run --release --example filter [N D V [THRESHOLD…]]`, by default 4096 1024 50304 and a few powers of two, with
//! `RAYON_NUM_THREADS` threads.
//!
//! The model is calibrated: its labels are drawn from its own distribution, which follows Zipf's law over the vocabulary, times
//! what the context makes of it: logits −ln(rank + 10) + a normal variable of standard deviation [`CONTEXT`]. The ids are numbered
//! by rank, as those of a byte-pair encoding nearly are, and then in random order.

use fused_xent_kernels::problem::{Inputs, Layout, LossOptions, Problem, Shape};
use fused_xent_kernels::{Dlogits, Filter, GradientMut, Gradients, Kernel};
use half::bf16;
use ndarray::{Array1, Array2, Axis};
use rayon::prelude::*;
use std::error::Error;
use std::time::Instant;

#[path = "support/peak.rs"]
mod peak;

/// In nats.
const CONTEXT: f32 = 5.0;
const ROUNDS: usize = 3;

/// Bell-shaped noise from a counter, of standard deviation 1.
fn noise(seed: u64, i: usize) -> f32 {
    let mut sum = -6.0;
    let mut x = (seed << 40) ^ (i as u64 * 3);
    for _ in 0..3 {
        x = x.wrapping_add(1);
        let z = (x ^ x >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        let z = z ^ z >> 31;
        sum += (0..4).map(|k| (z >> (16 * k) & 0xffff) as f32 / 65536.0).sum::<f32>();
    }
    sum
}

fn matrix(rows: usize, columns: usize, seed: u64, scale: f32) -> Array2<f32> {
    let values = (0..rows * columns).into_par_iter().map(|i| scale * noise(seed, i)).collect();
    Array2::from_shape_vec((rows, columns), values).expect("as many as there are")
}

fn to_bf16(x: &Array2<f32>) -> Vec<bf16> {
    x.iter().map(|&x| bf16::from_f32(x)).collect()
}

fn exact(x: &Array2<f32>) -> Array2<f32> {
    x.mapv(|x| bf16::from_f32(x).to_f32())
}

/// A label for each token, from its distribution.
fn labels(q: &Array2<f32>, k: &Array2<f32>) -> Vec<i32> {
    let (q, k) = (exact(q), exact(k));
    let blocks: Vec<_> = q.axis_chunks_iter(Axis(0), 256).enumerate().collect();
    let of_block = |(block, q): (usize, ndarray::ArrayView2<f32>)| -> Vec<i32> {
        let z = q.dot(&k.t());
        let draw = |(n, z): (usize, ndarray::ArrayView1<f32>)| {
            let most = z.iter().fold(f32::NEG_INFINITY, |m, &z| m.max(z));
            let sums: Vec<f64> = z
                .iter()
                .scan(0.0, |sum, z| {
                    *sum += f64::from((z - most).exp());
                    Some(*sum)
                })
                .collect();
            let uniform = f64::from(noise(9, 256 * block + n).abs() * 977.0).fract();
            sums.partition_point(|&sum| sum < uniform * sums[sums.len() - 1]) as i32
        };
        z.outer_iter().enumerate().map(draw).collect()
    };
    blocks.into_iter().flat_map(of_block).collect()
}

/// ‖x − y‖ / ‖y‖.
fn distance(x: &[f32], y: &[f32]) -> f64 {
    let (error, norm) =
        x.iter().zip(y).fold((0.0, 0.0), |(e, s), (&x, &y)| (e + f64::from(x - y).powi(2), s + f64::from(y).powi(2)));
    (error / norm).sqrt()
}

/// ‖bound‖ / ‖y‖, where each row of y is off by at most so much times `most`.
fn bound(small: &[f32], most: f64, y: &[f32]) -> f64 {
    let norm = y.iter().map(|&y| f64::from(y).powi(2)).sum::<f64>();
    (small.iter().map(|&s| (f64::from(s) * most).powi(2)).sum::<f64>() / norm).sqrt()
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (shape, thresholds) = arguments.split_at(arguments.len().min(3));
    let [tokens, hidden, vocab] = match shape {
        [] => [4096, 1024, 50304],
        [n, d, v] => [n.parse()?, d.parse()?, v.parse()?],
        _ => return Err("expected N D V [THRESHOLD…]".into()),
    };
    let thresholds: Vec<f32> = if thresholds.is_empty() {
        [-16, -14, -12, -10].map(|k| 2f32.powi(k)).to_vec()
    } else {
        thresholds.iter().map(|t| t.parse()).collect::<Result<_, _>>()?
    };
    let kernel = Kernel::best().with_dlogits(Dlogits::Bf16);
    let work = 6.0 * (tokens * hidden * vocab) as f64 / 1e9;
    for ranked in [true, false] {
        let mut q = matrix(tokens, hidden, 1, 1.0);
        let mut k = matrix(vocab, hidden, 2, CONTEXT / (hidden as f32).sqrt());
        q.column_mut(0).fill(1.0);
        // A permutation: the multiplier is prime and no divisor of V.
        let rank = |v: usize| if ranked { v } else { v * 1_000_003 % vocab };
        k.column_mut(0).assign(&Array1::from_iter((0..vocab).map(|v| -(rank(v) as f32 + 10.0).ln())));
        let (targets, q, k) = (labels(&q, &k), to_bf16(&q), to_bf16(&k));
        let inputs = Inputs {
            hidden: q[..].into(),
            unembedding: k[..].into(),
            layout: Layout::Vd,
            targets: targets[..].into(),
            token_weights: None,
            shape: Shape { tokens, hidden, vocab },
            shard: None,
        };
        let problem = Problem::new(inputs, LossOptions::default())?;
        let g = vec![1.0 / tokens as f32; tokens];
        let run = |filter: Option<&mut Filter>, dq: &mut [f32], dk: &mut [f32]| {
            let gradients = Gradients { d_hidden: Some(GradientMut::F32(dq)), d_unembedding: Some(GradientMut::F32(dk)), filter };
            let start = Instant::now();
            kernel.loss_and_grad(&problem, &g, gradients).map(|forward| (forward, start.elapsed().as_secs_f64()))
        };
        let buffers = || (vec![0.0; tokens * hidden], vec![0.0; vocab * hidden]);
        let ((mut dq, mut dk), (mut dq_filtered, mut dk_filtered)) = (buffers(), buffers());
        let forward = run(None, &mut dq, &mut dk)?.0;
        let loss = forward.loss.iter().map(|&loss| f64::from(loss)).sum::<f64>() / tokens as f64;
        let longest = |x: &[bf16]| {
            x.chunks(hidden).map(|row| row.iter().map(|x| x.to_f64().powi(2)).sum::<f64>().sqrt()).fold(0.0, f64::max)
        };
        let (longest_q, longest_k) = (longest(&q), longest(&k));
        let peak = peak::widest().map_or(f64::NAN, |widest| widest.gflops());
        println!("ids {}: loss {loss:.2}, peak {peak:.0} GFLOP/s", if ranked { "by rank" } else { "in random order" });
        println!("threshold   seconds  of plain  GFLOP/s at 6NDV   computed of dQ, dK   loss of dQ (bound)   loss of dK (bound)");
        let mut times = vec![vec![]; thresholds.len() + 1];
        let mut lines = vec![String::new(); thresholds.len()];
        for _ in 0..ROUNDS {
            times[0].push(run(None, &mut dq, &mut dk)?.1);
            for (i, &threshold) in thresholds.iter().enumerate() {
                let mut filter = Filter::new(threshold);
                times[i + 1].push(run(Some(&mut filter), &mut dq_filtered, &mut dk_filtered)?.1);
                let [of_dq, of_dk] = filter.computed();
                lines[i] = format!(
                    "{of_dq:9.4} {of_dk:9.4}   {:9.1e} ({:7.1e})   {:9.1e} ({:7.1e})",
                    distance(&dq_filtered, &dq),
                    bound(&filter.small_of_tokens(), longest_k, &dq),
                    distance(&dk_filtered, &dk),
                    bound(&filter.small_of_ids(), longest_q, &dk)
                );
            }
        }
        times.iter_mut().for_each(|times| times.sort_by(f64::total_cmp));
        let medians: Vec<f64> = times.iter().map(|times| times[ROUNDS / 2]).collect();
        println!("{:>9} {:9.3} {:9.3} {:14.0}", "none", medians[0], 1.0, work / medians[0]);
        for ((threshold, seconds), line) in thresholds.iter().zip(&medians[1..]).zip(&lines) {
            println!("{threshold:9.1e} {seconds:9.3} {:9.3} {:14.0}      {line}", seconds / medians[0], work / seconds);
        }
    }
    Ok(())
}
