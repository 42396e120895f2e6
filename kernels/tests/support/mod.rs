//! What the kernel tests share: cases from every corner, and the judgement by the floor.

#![allow(dead_code, reason = "each test file uses its share")]

use fused_xent_kernels::contract::{Contract, Precision};
use fused_xent_kernels::floor::{Error, Floor};
use fused_xent_kernels::problem::{DType, Floats, Inputs, Layout, LossOptions, Problem, Shape, VocabShard};
use fused_xent_kernels::reference::{self, Cotangents, Gradients};
use half::{bf16, f16};
use ndarray::ArrayView2;
use proptest::prelude::*;
use std::ops::Range;

/// Bell-shaped noise from a counter: enough for test data.
pub fn noise(seed: u64, i: usize) -> f64 {
    let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(i as u64);
    (0..12).fold(-6.0, |sum, _| {
        x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = x;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        sum + ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    })
}

/// A tensor's elements in their dtype.
#[derive(Clone, Debug)]
pub enum Data {
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
    F32(Vec<f32>),
}

impl Data {
    pub fn new(dtype: DType, values: impl Iterator<Item = f64>) -> Self {
        match dtype {
            DType::Bf16 => Data::Bf16(values.map(bf16::from_f64).collect()),
            DType::F16 => Data::F16(values.map(f16::from_f64).collect()),
            DType::F32 => Data::F32(values.map(|x| x as f32).collect()),
        }
    }

    pub fn part(&self, range: Range<usize>) -> Floats<'_> {
        match self {
            Data::Bf16(v) => v[range].into(),
            Data::F16(v) => v[range].into(),
            Data::F32(v) => v[range].into(),
        }
    }

    pub fn get(&self, i: usize) -> f32 {
        self.part(i..i + 1).get(0)
    }
}

/// One microbatch with cotangents.
#[derive(Clone, Debug)]
pub struct Case {
    pub shape: Shape,
    pub hidden: Data,
    pub unembedding: Data,
    pub layout: Layout,
    pub targets: Vec<i32>,
    pub weights: Option<Vec<f32>>,
    pub options: LossOptions,
    pub cotangents: Cotangents,
}

impl Case {
    /// bf16, [V, D], every seventh token masked, cotangents that are no powers of two.
    pub fn new(shape: Shape, spread: f64, options: LossOptions, seed: u64) -> Self {
        Self::of(DType::Bf16, Layout::Vd, shape, spread, options, seed)
    }

    pub fn of(dtype: DType, layout: Layout, shape: Shape, spread: f64, options: LossOptions, seed: u64) -> Self {
        let Shape { tokens, hidden, vocab } = shape;
        let scale = spread / (hidden as f64).sqrt();
        let valid = options.valid_vocab.unwrap_or(vocab);
        let of_k = |v: usize, d: usize| scale * noise(seed ^ (2 << 32), v * hidden + d);
        let stored = |i: usize| match layout {
            Layout::Vd => of_k(i / hidden, i % hidden),
            Layout::Dv => of_k(i % vocab, i / vocab),
        };
        let g = (0..tokens).map(|n| (1.0 + 0.3 * (n % 5) as f64) / 77.0).map(|g| f64::from(g as f32)).collect();
        Self {
            shape,
            hidden: Data::new(dtype, (0..tokens * hidden).map(|i| noise(seed ^ (1 << 32), i))),
            unembedding: Data::new(dtype, (0..vocab * hidden).map(stored)),
            layout,
            targets: (0..tokens).map(|n| if n % 7 == 3 { -100 } else { ((n * n * 31 + n) % valid) as i32 }).collect(),
            weights: None,
            options,
            cotangents: Cotangents { loss: Some(g), ..Cotangents::default() },
        }
    }

    pub fn problem(&self) -> Problem<'_> {
        self.shard(0..self.shape.tokens, None)
    }

    /// Tokens `tokens` of the case, and all of its vocabulary or a shard of it (of a [V, D] layout).
    pub fn shard(&self, tokens: Range<usize>, vocab: Option<Range<usize>>) -> Problem<'_> {
        let d = self.shape.hidden;
        let ids = vocab.clone().unwrap_or(0..self.shape.vocab);
        let inputs = Inputs {
            hidden: self.hidden.part(tokens.start * d..tokens.end * d),
            unembedding: self.unembedding.part(ids.start * d..ids.end * d),
            layout: self.layout,
            targets: self.targets[tokens.clone()].into(),
            token_weights: self.weights.as_ref().map(|w| &w[tokens.clone()]),
            shape: Shape { tokens: tokens.len(), hidden: d, vocab: ids.len() },
            shard: vocab.map(|v| VocabShard { start: v.start, total: self.shape.vocab }),
        };
        Problem::new(inputs, self.options).unwrap()
    }

    /// The cotangents in float32: loss, lse, label logits.
    pub fn cotangents_f32(&self) -> [Option<Vec<f32>>; 3] {
        let narrow = |c: &Option<Vec<f64>>| c.as_ref().map(|c| c.iter().map(|&x| x as f32).collect());
        [narrow(&self.cotangents.loss), narrow(&self.cotangents.lse), narrow(&self.cotangents.label_logits)]
    }
}

#[derive(Debug)]
pub struct Verdict {
    /// ‖candidate − reference‖₂ over the floor, and over what no accident exceeds.
    pub ratio: f64,
    pub of_limit: f64,
    /// Elements beyond their bound: candidate, reference, bound.
    pub breaches: Vec<(f64, f64, f64)>,
}

impl Verdict {
    pub fn honest(&self) -> bool {
        (self.ratio <= 1.5 || self.of_limit <= 1.0) && self.breaches.is_empty()
    }
}

pub fn judge(error: &Error, output: Precision, candidate: ArrayView2<f64>, reference: ArrayView2<f64>) -> Verdict {
    let tolerance = error.tolerance(reference, output);
    let deviation = candidate.iter().zip(reference).map(|(c, r)| (c - r).powi(2)).sum::<f64>().sqrt();
    let beyond = |((row, column), &c): ((usize, usize), &f64)| {
        let truth = reference[[row, column]];
        let bound = tolerance.bound(row, column, truth);
        ((c - truth).abs() > bound).then_some((c, truth, bound))
    };
    let rows = 0..reference.nrows();
    Verdict {
        ratio: over(deviation, tolerance.l2(rows.clone())),
        of_limit: over(deviation, tolerance.limit(rows)),
        breaches: candidate.indexed_iter().filter_map(beyond).collect(),
    }
}

/// A ratio that is 0 where nothing deviates.
fn over(deviation: f64, floor: f64) -> f64 {
    if deviation == 0.0 { 0.0 } else { deviation / floor }
}

pub fn assert_honest(verdict: Verdict) -> Result<(), TestCaseError> {
    prop_assert!(verdict.honest(), "{verdict:?}");
    Ok(())
}

pub fn column(values: &[f64]) -> ArrayView2<'_, f64> {
    ArrayView2::from_shape((values.len(), 1), values).unwrap()
}

pub struct Truth {
    pub forward: reference::Forward,
    pub gradients: Gradients,
    pub floor: Floor,
}

pub fn truth(case: &Case, contract: Contract) -> Truth {
    let problem = case.problem();
    let forward = reference::forward(&problem).unwrap();
    let gradients = reference::backward(&problem, &forward.lse, &case.cotangents).unwrap();
    let floor = contract.floor(&problem, &forward, &case.cotangents, &gradients).unwrap();
    Truth { forward, gradients, floor }
}
