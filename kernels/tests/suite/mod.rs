//! Problems from every corner, and the one comparison that all kernel tests judge by.

#![allow(dead_code, reason = "each test program uses its own part")]

use fused_xent_kernels::contract::{Contract, Precision};
use fused_xent_kernels::floor::{Error, Floor};
use fused_xent_kernels::problem::{DType, Floats, Inputs, Layout, LossOptions, Problem, Shape, VocabShard};
use fused_xent_kernels::{Cotangents, Dlogits, Forward, GradientMut, Gradients, Kernel, reference};
use half::{bf16, f16};
use ndarray::{Array2, ArrayView2};
use proptest::prelude::*;

/// A tensor of any dtype that owns its elements.
#[derive(Clone, Debug, PartialEq)]
pub enum Tensor {
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
    F32(Vec<f32>),
}

impl Tensor {
    pub fn new(dtype: DType, values: impl Iterator<Item = f64>) -> Self {
        match dtype {
            DType::Bf16 => Tensor::Bf16(values.map(bf16::from_f64).collect()),
            DType::F16 => Tensor::F16(values.map(f16::from_f64).collect()),
            DType::F32 => Tensor::F32(values.map(|x| x as f32).collect()),
        }
    }

    /// Filled with what no test expects.
    pub fn garbage(dtype: DType, len: usize) -> Self {
        Self::new(dtype, std::iter::repeat_n(777.0, len))
    }

    pub fn floats(&self) -> Floats<'_> {
        match self {
            Tensor::Bf16(v) => v[..].into(),
            Tensor::F16(v) => v[..].into(),
            Tensor::F32(v) => v[..].into(),
        }
    }

    pub fn gradient(&mut self) -> GradientMut<'_> {
        match self {
            Tensor::Bf16(v) => GradientMut::Bf16(v),
            Tensor::F16(v) => GradientMut::F16(v),
            Tensor::F32(v) => GradientMut::F32(v),
        }
    }

    pub fn set(&mut self, i: usize, x: f32) {
        match self {
            Tensor::Bf16(v) => v[i] = bf16::from_f32(x),
            Tensor::F16(v) => v[i] = f16::from_f32(x),
            Tensor::F32(v) => v[i] = x,
        }
    }

    /// As [rows, columns], given that it lies as `layout` says.
    pub fn matrix(&self, rows: usize, columns: usize, layout: Layout) -> Array2<f64> {
        let floats = self.floats();
        Array2::from_shape_fn((rows, columns), |(r, c)| {
            f64::from(floats.get(if layout == Layout::Vd { r * columns + c } else { c * rows + r }))
        })
    }
}

/// Bell-shaped noise from a counter.
pub fn noise(seed: u64, i: usize) -> f64 {
    let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add((i as u64) << 8);
    (0..12).fold(-6.0, |sum, _| {
        x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = x;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        sum + ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    })
}

/// Everything that a problem and its backward are made of.
#[derive(Clone, Debug)]
pub struct Case {
    pub shape: Shape,
    pub layout: Layout,
    pub hidden: Tensor,
    pub unembedding: Tensor,
    pub targets: Vec<i64>,
    pub weights: Option<Vec<f32>>,
    pub options: LossOptions,
    /// Of loss, lse, label logits.
    pub cotangents: [Option<Vec<f32>>; 3],
}

/// What to draw a case from.
#[derive(Clone, Copy, Debug)]
pub struct Recipe {
    pub shape: Shape,
    pub layout: Layout,
    pub dtypes: [DType; 2],
    /// Standard deviation of the logits, before scale and cap.
    pub spread: f64,
    pub options: LossOptions,
    pub weighted: bool,
    /// Size of the cotangents of loss, lse and label logits; 0: none.
    pub cotangents: [f64; 3],
    pub seed: u64,
}

impl Recipe {
    /// float32, logits of size 1, no options, g around 1.
    pub fn plain(tokens: usize, hidden: usize, vocab: usize) -> Self {
        Self {
            shape: Shape { tokens, hidden, vocab },
            layout: Layout::Vd,
            dtypes: [DType::F32; 2],
            spread: 1.0,
            options: LossOptions::default(),
            weighted: false,
            cotangents: [1.0, 0.0, 0.0],
            seed: 1,
        }
    }

    pub fn case(&self) -> Case {
        let Self { shape, layout, dtypes, spread, options, weighted, cotangents, seed } = *self;
        let Shape { tokens, hidden, vocab } = shape;
        let scale = spread / (hidden as f64).sqrt();
        let draw = |salt: u64, i: usize| noise(seed ^ (salt << 32), i);
        let valid = options.valid_vocab.unwrap_or(vocab);
        // First, last, and around the borders of tiles.
        let ids = [0, valid - 1, 3, 4, 7, 8, 15, 16, 127, 128, 255, 256, 511, 512, valid / 2];
        let target = |n: usize| match n % 8 {
            5 => options.ignore_index,
            i if i % 2 == 0 => (ids[(n / 2) % ids.len()] % valid) as i64,
            _ => ((draw(3, n).abs() * 1e6) as usize % valid) as i64,
        };
        Case {
            shape,
            layout,
            hidden: Tensor::new(dtypes[0], (0..tokens * hidden).map(|i| draw(1, i))),
            unembedding: Tensor::new(dtypes[1], (0..vocab * hidden).map(|i| scale * draw(2, i))),
            targets: (0..tokens).map(target).collect(),
            weights: weighted.then(|| (0..tokens).map(|n| [1.0, 0.3, 0.0, 2.5][n % 4]).collect()),
            options,
            cotangents: std::array::from_fn(|k| {
                (cotangents[k] != 0.0)
                    .then(|| (0..tokens).map(|n| (cotangents[k] * (1.0 + 0.3 * draw(4 + k as u64, n))) as f32).collect())
            }),
        }
    }
}

impl Case {
    pub fn problem(&self) -> Problem<'_> {
        self.try_problem(None).unwrap()
    }

    pub fn try_problem(&self, shard: Option<VocabShard>) -> Result<Problem<'_>, fused_xent_kernels::problem::ProblemError> {
        let inputs = Inputs {
            hidden: self.hidden.floats(),
            unembedding: self.unembedding.floats(),
            layout: self.layout,
            targets: self.targets[..].into(),
            token_weights: self.weights.as_deref(),
            shape: self.shape,
            shard,
        };
        Problem::new(inputs, self.options)
    }

    pub fn cotangents(&self) -> Cotangents<'_> {
        let [loss, lse, label_logits] = &self.cotangents;
        Cotangents { loss: loss.as_deref(), lse: lse.as_deref(), label_logits: label_logits.as_deref() }
    }

    pub fn reference_cotangents(&self) -> reference::Cotangents {
        let widen = |c: &Option<Vec<f32>>| c.as_ref().map(|c| c.iter().map(|&x| f64::from(x)).collect());
        let [loss, lse, label_logits] = &self.cotangents;
        reference::Cotangents { loss: widen(loss), lse: widen(lse), label_logits: widen(label_logits) }
    }

    /// Buffers for dQ and dK in these dtypes.
    pub fn buffers(&self, dtypes: [DType; 2]) -> [Tensor; 2] {
        let Shape { tokens, hidden, vocab } = self.shape;
        [Tensor::garbage(dtypes[0], tokens * hidden), Tensor::garbage(dtypes[1], vocab * hidden)]
    }

    pub fn dtypes(&self) -> [DType; 2] {
        [self.hidden.floats().dtype(), self.unembedding.floats().dtype()]
    }

    /// Forward and backward, gradients in `dtypes`.
    pub fn run(&self, kernel: &Kernel, dtypes: [DType; 2]) -> Results {
        let problem = self.problem();
        let forward = kernel.forward(&problem).unwrap();
        let [mut d_hidden, mut d_unembedding] = self.buffers(dtypes);
        let gradients = Gradients {
            d_hidden: Some(d_hidden.gradient()),
            d_unembedding: Some(d_unembedding.gradient()),
            ..Gradients::default()
        };
        kernel.backward(&problem, &forward.lse, self.cotangents(), gradients).unwrap();
        Results { forward, d_hidden, d_unembedding }
    }

    /// Both at once; the case has a cotangent of the loss alone.
    pub fn run_at_once(&self, kernel: &Kernel, dtypes: [DType; 2]) -> Results {
        let problem = self.problem();
        let [loss, None, None] = &self.cotangents else { panic!("loss_and_grad takes the cotangent of the loss alone") };
        let zeros = vec![0.0; self.shape.tokens];
        let [mut d_hidden, mut d_unembedding] = self.buffers(dtypes);
        let gradients = Gradients {
            d_hidden: Some(d_hidden.gradient()),
            d_unembedding: Some(d_unembedding.gradient()),
            ..Gradients::default()
        };
        let forward = kernel.loss_and_grad(&problem, loss.as_deref().unwrap_or(&zeros), gradients).unwrap();
        Results { forward, d_hidden, d_unembedding }
    }
}

/// What a kernel made of a case.
#[derive(Clone, Debug, PartialEq)]
pub struct Results {
    pub forward: Forward,
    pub d_hidden: Tensor,
    pub d_unembedding: Tensor,
}

/// What the oracle makes of it, and the floor of a contract.
pub struct Truth {
    pub forward: reference::Forward,
    pub gradients: reference::Gradients,
    pub floor: Floor,
    pub contract: Contract,
}

impl Truth {
    /// By the contract of a kernel that gives gradients in `dtypes`.
    pub fn of(case: &Case, kernel: &Kernel, dtypes: [DType; 2]) -> Self {
        Self::new(case, kernel.contract(case.dtypes(), dtypes))
    }

    pub fn new(case: &Case, contract: Contract) -> Self {
        let problem = case.problem();
        let cotangents = case.reference_cotangents();
        let forward = reference::forward(&problem).unwrap();
        let gradients = reference::backward(&problem, &forward.lse, &cotangents).unwrap();
        let floor = contract.floor(&problem, &forward, &cotangents, &gradients).unwrap();
        Self { forward, gradients, floor, contract }
    }

    /// The verdict on each tensor, by name.
    pub fn judge(&self, case: &Case, results: &Results) -> Vec<(&'static str, Verdict)> {
        let mut verdicts = self.judge_forward(&results.forward);
        let Shape { tokens, hidden, vocab } = case.shape;
        let (d_hidden, d_unembedding) =
            (results.d_hidden.matrix(tokens, hidden, Layout::Vd), results.d_unembedding.matrix(vocab, hidden, case.layout));
        verdicts.push(("d_hidden", self.judge_d_hidden(d_hidden.view())));
        verdicts.push(("d_unembedding", self.judge_d_unembedding(d_unembedding.view())));
        verdicts
    }

    pub fn judge_forward(&self, forward: &Forward) -> Vec<(&'static str, Verdict)> {
        [
            ("loss", &self.floor.loss, &forward.loss, &self.forward.loss),
            ("lse", &self.floor.lse, &forward.lse, &self.forward.lse),
            ("label_logits", &self.floor.label_logits, &forward.label_logits, &self.forward.label_logits),
        ]
        .map(|(name, error, candidate, truth)| {
            let candidate = Array2::from_shape_fn((candidate.len(), 1), |(n, _)| f64::from(candidate[n]));
            let truth = ArrayView2::from_shape((truth.len(), 1), truth).unwrap();
            (name, Verdict::new(error, Precision::F32, candidate.view(), truth))
        })
        .into()
    }

    pub fn judge_d_hidden(&self, candidate: ArrayView2<f64>) -> Verdict {
        let truth = self.gradients.hidden.sum();
        Verdict::new(&self.floor.hidden.sum, self.contract.d_hidden, candidate, truth.view())
    }

    pub fn judge_d_unembedding(&self, candidate: ArrayView2<f64>) -> Verdict {
        let truth = self.gradients.unembedding.sum();
        Verdict::new(&self.floor.unembedding.sum, self.contract.d_unembedding, candidate, truth.view())
    }
}

/// How far a tensor is from the truth, in what its contract allows.
#[derive(Clone, Copy, Debug)]
pub struct Verdict {
    /// ‖candidate − truth‖₂ over the floor.
    pub ratio: f64,
    /// The same over what no accident exceeds.
    pub of_limit: f64,
    /// Elements beyond their bound.
    pub breaches: usize,
}

impl Verdict {
    pub fn new(error: &Error, output: Precision, candidate: ArrayView2<f64>, truth: ArrayView2<f64>) -> Self {
        assert_eq!(candidate.dim(), truth.dim());
        if truth.is_empty() {
            return Self { ratio: 0.0, of_limit: 0.0, breaches: 0 };
        }
        let tolerance = error.tolerance(truth, output);
        let deviation = candidate.iter().zip(truth).map(|(c, t)| (c - t).powi(2)).sum::<f64>().sqrt();
        let within = |((row, column), c): ((usize, usize), &f64)| {
            let truth = truth[[row, column]];
            (c - truth).abs() <= tolerance.bound(row, column, truth)
        };
        let rows = 0..truth.nrows();
        Self {
            ratio: deviation / tolerance.l2(rows.clone()),
            of_limit: deviation / tolerance.limit(rows),
            breaches: candidate.indexed_iter().filter(|&e| !within(e)).count(),
        }
    }

    pub fn honest(&self) -> bool {
        (self.ratio <= 1.5 || self.of_limit <= 1.0) && self.breaches == 0
    }
}

pub fn assert_honest(verdicts: &[(&str, Verdict)]) -> Result<(), TestCaseError> {
    for (name, verdict) in verdicts {
        prop_assert!(verdict.honest(), "{name}: {verdict:?}");
    }
    Ok(())
}

/// Sizes of logits, from lse ≈ ln V to a distribution that is one column.
pub fn spreads() -> impl Strategy<Value = f64> {
    prop::sample::select(vec![1e-3, 1.0, 30.0, 1000.0])
}

/// Every option alone, and some together.
pub fn options(vocab: usize) -> impl Strategy<Value = LossOptions> {
    let base = LossOptions::default();
    let valid_vocab = Some(vocab - vocab / 3);
    prop_oneof![
        3 => Just(base),
        1 => Just(LossOptions { logit_softcap: Some(15.0), ..base }),
        1 => Just(LossOptions { logit_scale: 0.37, ..base }),
        1 => Just(LossOptions { z_loss: 1e-3, ..base }),
        1 => Just(LossOptions { label_smoothing: 0.1, ..base }),
        1 => Just(LossOptions { valid_vocab, ..base }),
        2 => Just(LossOptions { ignore_index: 0, valid_vocab, logit_scale: -1.7, logit_softcap: Some(30.0), z_loss: 1e-4, label_smoothing: 0.05 }),
    ]
}

pub fn dtype() -> impl Strategy<Value = DType> {
    prop::sample::select(vec![DType::Bf16, DType::F16, DType::F32])
}

/// Cotangents that are no powers of two, tiny, negative, and of one or of all results.
pub fn cotangents() -> impl Strategy<Value = [f64; 3]> {
    prop::sample::select(vec![
        [1.0, 0.0, 0.0],
        [1e-6, 0.0, 0.0],
        [-0.3, 0.0, 0.0],
        [0.7, 0.2, -0.4],
        [0.0, 1.3, 0.0],
        [0.0, 0.0, 0.9],
    ])
}

/// Recipes over all of it, N, D and V up to the given ones.
pub fn recipes(tokens: usize, hidden: usize, vocab: usize) -> impl Strategy<Value = Recipe> {
    let size = |most: usize| prop_oneof![1 => Just(1usize), 6 => 1..=most];
    (prop_oneof![1 => Just(0usize), 1 => Just(1usize), 10 => 1..=tokens], size(hidden), size(vocab)).prop_flat_map(
        |(tokens, hidden, vocab)| {
            let layout = prop::sample::select(vec![Layout::Vd, Layout::Dv]);
            (layout, [dtype(), dtype()], spreads(), options(vocab), any::<bool>(), cotangents(), any::<u64>()).prop_map(
                move |(layout, dtypes, spread, options, weighted, cotangents, seed)| Recipe {
                    shape: Shape { tokens, hidden, vocab },
                    layout,
                    dtypes,
                    spread,
                    options,
                    weighted,
                    cotangents,
                    seed,
                },
            )
        },
    )
}

/// `cases` cases, or as many as the environment's PROPTEST_CASES says.
pub fn config(cases: u32) -> ProptestConfig {
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { ProptestConfig::default().cases } else { cases };
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

/// What keeps the workspace at its smallest: one panel of tokens and one chunk of columns.
pub const TINY: usize = 0;

/// Every kernel of this machine with every precision of dlogits that it has, with a roomy workspace and with one that forces
/// chunks and recomputing.
///
/// All suites run over these, so none can be registered without them.
pub fn kernels() -> impl Iterator<Item = Kernel> {
    let with_precisions = |kernel: Kernel| {
        let narrow = kernel.name().ends_with("bf16").then(|| kernel.clone().with_dlogits(Dlogits::Bf16));
        [kernel.with_dlogits(Dlogits::Bf16x2)].into_iter().chain(narrow)
    };
    Kernel::available().into_iter().flat_map(with_precisions).flat_map(|kernel| [kernel.clone(), kernel.with_workspace(TINY)])
}

/// Runs `f` on as many threads.
pub fn on_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(f)
}
