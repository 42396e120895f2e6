//! Every kernel of this machine against the oracle, by the floor of its own contract.

mod support;

use fused_xent_kernels::contract::Precision;
use fused_xent_kernels::problem::{DType, Layout, LossOptions, ProblemError, Shape};
use fused_xent_kernels::{Cotangents, GradientMut, Gradients, Kernel};
use half::{bf16, f16};
use ndarray::{Array2, ArrayView2};
use proptest::prelude::*;
use support::{Case, Data, assert_honest, column, judge, truth};

/// Vocab sizes around the tile of 256, and others.
const VOCABS: [usize; 9] = [1, 2, 31, 255, 256, 257, 300, 513, 777];
const TOKENS: [usize; 8] = [0, 1, 2, 5, 63, 64, 65, 140];
const HIDDENS: [usize; 6] = [1, 3, 8, 33, 64, 130];
/// Standard deviation of the logits.
const SPREADS: [f64; 4] = [0.01, 1.0, 30.0, 1000.0];

fn options(vocab: usize) -> impl Strategy<Value = LossOptions> {
    let valid = prop_oneof![2 => Just(None), 1 => (1..=vocab).prop_map(Some)];
    let scale = prop_oneof![2 => Just(1.0), 1 => Just(0.37)];
    let cap = prop_oneof![2 => Just(None), 1 => Just(Some(15.0))];
    let z_loss = prop_oneof![2 => Just(0.0), 1 => Just(1e-3)];
    let smoothing = prop_oneof![2 => Just(0.0), 1 => Just(0.1)];
    (valid, scale, cap, z_loss, smoothing).prop_map(|(valid_vocab, logit_scale, logit_softcap, z_loss, label_smoothing)| {
        LossOptions { valid_vocab, logit_scale, logit_softcap, z_loss, label_smoothing, ..LossOptions::default() }
    })
}

/// What the labels and masks look like.
#[derive(Clone, Copy, Debug)]
enum Labels {
    Spread,
    First,
    Last,
    /// On the borders of the vocab tiles.
    Borders,
    AllMasked,
}

fn cases() -> impl Strategy<Value = Case> {
    let shape = (prop::sample::select(&TOKENS[..]), prop::sample::select(&HIDDENS[..]), prop::sample::select(&VOCABS[..]))
        .prop_map(|(tokens, hidden, vocab)| Shape { tokens, hidden, vocab });
    let labels = prop::sample::select(vec![
        Labels::Spread,
        Labels::Spread,
        Labels::First,
        Labels::Last,
        Labels::Borders,
        Labels::AllMasked,
    ]);
    let kinds = (
        prop::sample::select(vec![DType::Bf16, DType::F16, DType::F32]),
        prop::sample::select(vec![Layout::Vd, Layout::Dv]),
        labels,
        prop::sample::select(&SPREADS[..]),
        prop::sample::select(vec![1e-6, 0.013, 1.0, -0.7]),
    );
    (shape, kinds, any::<(bool, bool, bool)>(), any::<u64>()).prop_flat_map(|(shape, kinds, extra, seed)| {
        options(shape.vocab).prop_map(move |options| case(shape, kinds, extra, options, seed))
    })
}

fn case(
    shape: Shape,
    (dtype, layout, labels, spread, size): (DType, Layout, Labels, f64, f64),
    (weighted, of_lse, of_label): (bool, bool, bool),
    options: LossOptions,
    seed: u64,
) -> Case {
    // float16 cannot hold logits' worth of 1000 in K.
    let spread = if dtype == DType::F16 { f64::min(spread, 30.0) } else { spread };
    let mut case = Case::of(dtype, layout, shape, spread, options, seed);
    let last = options.valid_vocab.unwrap_or(shape.vocab) - 1;
    for (n, t) in case.targets.iter_mut().enumerate().filter(|(_, t)| **t >= 0) {
        *t = match labels {
            Labels::Spread => *t,
            Labels::First => 0,
            Labels::Last => last as i32,
            Labels::Borders => [255, 256, 511, 512, 0][n % 5].min(last as i32),
            Labels::AllMasked => -100,
        };
    }
    case.weights = weighted.then(|| (0..shape.tokens).map(|n| [1.0, 0.0, 0.3, 2.5][n % 4]).collect());
    let cotangent = |salt: u64| -> Vec<f64> {
        (0..shape.tokens).map(|n| f64::from((size * (1.0 + 0.2 * support::noise(seed ^ salt, n))) as f32)).collect()
    };
    case.cotangents.loss = Some(cotangent(7));
    case.cotangents.lse = of_lse.then(|| cotangent(8));
    case.cotangents.label_logits = of_label.then(|| cotangent(9));
    case
}

/// A gradient's buffer in the precision asked for.
enum Buffer {
    Narrow(Data),
    Wide(Vec<f32>),
}

impl Buffer {
    fn new(narrow: bool, like: &Data, len: usize) -> Self {
        match like {
            Data::Bf16(_) if narrow => Buffer::Narrow(Data::Bf16(vec![bf16::NAN; len])),
            Data::F16(_) if narrow => Buffer::Narrow(Data::F16(vec![f16::NAN; len])),
            _ => Buffer::Wide(vec![f32::NAN; len]),
        }
    }

    fn gradient(&mut self) -> GradientMut<'_> {
        match self {
            Buffer::Narrow(Data::Bf16(v)) => GradientMut::Bf16(v),
            Buffer::Narrow(Data::F16(v)) => GradientMut::F16(v),
            Buffer::Narrow(Data::F32(v)) | Buffer::Wide(v) => GradientMut::F32(v),
        }
    }

    fn values(&self) -> Vec<f64> {
        match self {
            Buffer::Narrow(data) => {
                let len = match data {
                    Data::Bf16(v) => v.len(),
                    Data::F16(v) => v.len(),
                    Data::F32(v) => v.len(),
                };
                (0..len).map(|i| data.get(i).into()).collect()
            }
            Buffer::Wide(v) => v.iter().map(|&x| x.into()).collect(),
        }
    }
}

struct Computed {
    forward: fused_xent_kernels::Forward,
    d_hidden: Array2<f64>,
    d_unembedding: Array2<f64>,
}

/// [V, D] from K's layout.
fn vocab_rows(case: &Case, values: Vec<f64>) -> Array2<f64> {
    let Shape { hidden, vocab, .. } = case.shape;
    match case.layout {
        Layout::Vd => Array2::from_shape_vec((vocab, hidden), values).unwrap(),
        Layout::Dv => Array2::from_shape_vec((hidden, vocab), values).unwrap().reversed_axes(),
    }
}

/// Forward and backward apart, or in one go where the cotangents allow it.
fn compute(kernel: &Kernel, case: &Case, narrow: bool, in_one_go: bool) -> Computed {
    let problem = case.problem();
    let Shape { tokens, hidden, .. } = case.shape;
    let [g, h, u] = case.cotangents_f32();
    let mut dq = Buffer::new(narrow, &case.hidden, problem.hidden().len());
    let mut dk = Buffer::new(narrow, &case.unembedding, problem.unembedding().len());
    let gradients = Gradients { d_hidden: Some(dq.gradient()), d_unembedding: Some(dk.gradient()) };
    let forward = if in_one_go && h.is_none() && u.is_none() {
        kernel.loss_and_grad(&problem, g.as_ref().unwrap(), gradients).unwrap()
    } else {
        let forward = kernel.forward(&problem).unwrap();
        let cotangents = Cotangents { loss: g.as_deref(), lse: h.as_deref(), label_logits: u.as_deref() };
        kernel.backward(&problem, &forward.lse, cotangents, gradients).unwrap();
        forward
    };
    Computed {
        forward,
        d_hidden: Array2::from_shape_vec((tokens, hidden), dq.values()).unwrap(),
        d_unembedding: vocab_rows(case, dk.values()),
    }
}

fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| x.into()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn kernels_stay_at_the_floor_of_their_contract(
        case in cases(),
        narrow: bool,
        in_one_go: bool,
        workspace in prop::sample::select(vec![1usize, 40_000, 200_000, 128 << 20]),
    ) {
        for kernel in Kernel::available() {
            let kernel = kernel.with_workspace(workspace);
            let computed = compute(&kernel, &case, narrow, in_one_go);
            let dtype = if narrow { case.problem().hidden().dtype() } else { DType::F32 };
            let contract = kernel.contract(dtype, dtype);
            let truth = truth(&case, contract);
            let (exact, floor) = (&truth.forward, &truth.floor);
            let pairs = [
                (&computed.forward.loss, &exact.loss, &floor.loss),
                (&computed.forward.lse, &exact.lse, &floor.lse),
                (&computed.forward.label_logits, &exact.label_logits, &floor.label_logits),
            ];
            for (values, exact, error) in pairs {
                assert_honest(judge(error, Precision::F32, column(&widen(values)), column(exact)))?;
            }
            let (hidden, unembedding) = (truth.gradients.hidden.sum(), truth.gradients.unembedding.sum());
            assert_honest(judge(&floor.hidden.sum, contract.d_hidden, computed.d_hidden.view(), hidden.view()))?;
            assert_honest(judge(&floor.unembedding.sum, contract.d_unembedding, computed.d_unembedding.view(), unembedding.view()))?;
        }
    }
}

fn default_case() -> Case {
    Case::new(Shape { tokens: 200, hidden: 96, vocab: 700 }, 3.0, LossOptions::default(), 11)
}

fn in_pool<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
}

#[test]
fn results_are_bit_identical_for_any_number_of_threads() {
    for kernel in Kernel::available() {
        for (layout, workspace) in [(Layout::Vd, 128 << 20), (Layout::Dv, 128 << 20), (Layout::Vd, 70_000)] {
            let case = Case::of(DType::Bf16, layout, default_case().shape, 3.0, LossOptions::default(), 5);
            let kernel = kernel.clone().with_workspace(workspace);
            let run = |threads| in_pool(threads, || compute(&kernel, &case, false, true));
            let one = run(1);
            for threads in [2, 3, 7] {
                let other = run(threads);
                assert_eq!(one.forward, other.forward);
                assert_eq!(one.d_hidden, other.d_hidden);
                assert_eq!(one.d_unembedding, other.d_unembedding);
            }
        }
    }
}

#[test]
fn a_16_bit_gradient_is_the_float32_one_rounded_once() {
    for kernel in Kernel::available() {
        let case = default_case();
        let (wide, narrow) = (compute(&kernel, &case, false, true), compute(&kernel, &case, true, true));
        assert_eq!(wide.d_hidden.mapv(|x| Precision::Bf16.round(x)), narrow.d_hidden);
        assert_eq!(wide.d_unembedding.mapv(|x| Precision::Bf16.round(x)), narrow.d_unembedding);
    }
}

/// Identities that hold for any correct kernel without softcap and padding, and that need no reference.
#[test]
fn identities() {
    for kernel in Kernel::available() {
        let case = default_case();
        let computed = compute(&kernel, &case, false, true);
        let inner = |a: ArrayView2<f64>, b: &Data| a.iter().enumerate().map(|(i, x)| x * f64::from(b.get(i))).sum::<f64>();
        let (dq_q, dk_k) =
            (inner(computed.d_hidden.view(), &case.hidden), inner(computed.d_unembedding.view(), &case.unembedding));
        assert!((dq_q / dk_k - 1.0).abs() < 1e-5, "⟨dQ, Q⟩ = {dq_q}, ⟨dK, K⟩ = {dk_k}");
        let sum = computed.d_unembedding.sum_axis(ndarray::Axis(0));
        let size = computed.d_unembedding.mapv(f64::abs).sum_axis(ndarray::Axis(0));
        let off = sum.iter().zip(&size).map(|(s, a)| (s / a).abs()).fold(0.0, f64::max);
        assert!(off < 1e-5, "Σ_v dK = 0 to {off}");
        let mut doubled = case.clone();
        doubled.cotangents.loss.iter_mut().flatten().for_each(|g| *g *= 2.0);
        let twice = compute(&kernel, &doubled, false, true);
        assert_eq!(twice.d_hidden, computed.d_hidden.mapv(|x| 2.0 * x), "a power of two passes through unrounded");
        // Σ_v P = 1: with a column of ones in Q and a cotangent of lse alone, that column of dK sums P over the tokens.
        let mut ones = case.clone();
        let d = case.shape.hidden;
        if let (Data::Bf16(q), Data::Bf16(k)) = (&mut ones.hidden, &mut ones.unembedding) {
            q.iter_mut().step_by(d).for_each(|q| *q = bf16::ONE);
            k.iter_mut().step_by(d).for_each(|k| *k = bf16::ZERO);
        }
        ones.cotangents = reference_cotangents_of_lse(case.shape.tokens);
        let p = compute(&kernel, &ones, false, false).d_unembedding.column(0).sum();
        let valid = case.targets.iter().filter(|t| **t >= 0).count() as f64;
        assert!((p / valid - 1.0).abs() < 1e-5, "Σ P = {p} over {valid} tokens");
    }
}

fn reference_cotangents_of_lse(tokens: usize) -> fused_xent_kernels::reference::Cotangents {
    fused_xent_kernels::reference::Cotangents { lse: Some(vec![1.0; tokens]), ..Default::default() }
}

#[test]
fn masked_tokens_reach_nothing_whatever_they_hold() {
    for kernel in Kernel::available() {
        let case = default_case();
        let mut poisoned = case.clone();
        if let Data::Bf16(q) = &mut poisoned.hidden {
            let d = case.shape.hidden;
            for n in (0..case.shape.tokens).filter(|&n| case.targets[n] < 0) {
                q[n * d..(n + 1) * d].fill(bf16::NAN);
            }
        }
        let (clean, other) = (compute(&kernel, &case, false, true), compute(&kernel, &poisoned, false, true));
        assert_eq!(clean.forward, other.forward);
        assert_eq!(clean.d_hidden, other.d_hidden);
        assert_eq!(clean.d_unembedding, other.d_unembedding);
        for n in (0..case.shape.tokens).filter(|&n| case.targets[n] < 0) {
            assert!(other.d_hidden.row(n).iter().all(|&x| x == 0.0));
        }
    }
}

#[test]
fn nonfinite_inputs_of_unmasked_tokens_show_in_their_results() {
    for kernel in Kernel::available() {
        for bad in [bf16::NAN, bf16::INFINITY] {
            let mut case = default_case();
            if let Data::Bf16(q) = &mut case.hidden {
                q[0] = bad;
            }
            let computed = compute(&kernel, &case, false, true);
            assert!(computed.forward.loss[0].is_nan());
            assert!(computed.d_hidden.row(0).iter().any(|x| x.is_nan()));
            assert!(computed.forward.loss[1..].iter().all(|x| x.is_finite()), "the other tokens are untouched");
        }
    }
}

#[test]
fn microbatches_accumulate_in_float32_without_losing_a_bit() {
    for kernel in Kernel::available() {
        let case = default_case();
        let g: Vec<f32> = case.cotangents_f32()[0].clone().unwrap();
        let mut accumulated = vec![0.25f32; case.shape.vocab * case.shape.hidden];
        let mut expected = Array2::from_elem((case.shape.vocab, case.shape.hidden), 0.25);
        for tokens in [0..70, 70..200] {
            let problem = case.shard(tokens.clone(), None);
            let into = Gradients { d_hidden: None, d_unembedding: Some(GradientMut::Accumulate(&mut accumulated)) };
            kernel.loss_and_grad(&problem, &g[tokens.clone()], into).unwrap();
            let forward = fused_xent_kernels::reference::forward(&problem).unwrap();
            let cotangents = fused_xent_kernels::reference::Cotangents {
                loss: Some(g[tokens].iter().map(|&g| g.into()).collect()),
                ..Default::default()
            };
            let own = fused_xent_kernels::reference::backward(&problem, &forward.lse, &cotangents).unwrap();
            expected += &own.unembedding.sum();
        }
        let off = accumulated.iter().zip(&expected).map(|(a, e)| (f64::from(*a) - e).abs()).fold(0.0, f64::max);
        assert!(off < 1e-6, "{off}: a few float32 roundings of numbers near 0.25");
    }
}

#[test]
fn vocab_shards_compose_to_the_whole() {
    for kernel in Kernel::available() {
        for smoothing in [0.0, 0.1] {
            let options =
                LossOptions { label_smoothing: smoothing, valid_vocab: Some(640), z_loss: 1e-3, ..LossOptions::default() };
            let case = Case::new(Shape { tokens: 90, hidden: 40, vocab: 700 }, 4.0, options, 3);
            let whole = compute(&kernel, &case, false, true);
            // Uneven shards, the last with no valid column at all.
            let shards: Vec<_> = [0..300, 300..301, 301..640, 640..700].map(|ids| case.shard(0..90, Some(ids))).into();
            let mut partials = shards.iter().map(|s| kernel.partial(s));
            let mut merged = partials.next_back().unwrap();
            for partial in partials.rev() {
                merged = merged.merge(&partial).unwrap();
            }
            let forward = merged.finish(&shards[0]).unwrap();
            for (name, a, b) in [
                ("loss", &forward.loss, &whole.forward.loss),
                ("lse", &forward.lse, &whole.forward.lse),
                ("label logits", &forward.label_logits, &whole.forward.label_logits),
            ] {
                let off = a.iter().zip(b).map(|(a, b)| (a - b).abs() / b.abs().max(1.0)).fold(0.0, f32::max);
                assert!(off <= 1e-6, "{name}: {off}");
            }
            let g = case.cotangents_f32()[0].clone().unwrap();
            let mut dq = vec![0.0f32; 90 * 40];
            let mut dk = Vec::new();
            for shard in &shards {
                let mut own = vec![0.0f32; shard.unembedding().len()];
                let gradients = Gradients {
                    d_hidden: Some(GradientMut::Accumulate(&mut dq)),
                    d_unembedding: Some(GradientMut::F32(&mut own)),
                };
                kernel.backward(shard, &forward.lse, Cotangents { loss: Some(&g), ..Cotangents::default() }, gradients).unwrap();
                dk.extend(own);
            }
            let contract = kernel.contract(DType::F32, DType::F32);
            let truth = truth(&case, contract);
            let composed = Array2::from_shape_vec((90, 40), widen(&dq)).unwrap();
            let verdict = judge(&truth.floor.hidden.sum, Precision::F32, composed.view(), truth.gradients.hidden.sum().view());
            assert!(verdict.honest(), "dQ: {verdict:?}");
            let composed = Array2::from_shape_vec((700, 40), widen(&dk)).unwrap();
            let verdict =
                judge(&truth.floor.unembedding.sum, Precision::F32, composed.view(), truth.gradients.unembedding.sum().view());
            assert!(verdict.honest(), "dK: {verdict:?}");
        }
    }
}

#[test]
fn predictions_are_those_of_the_logits() {
    for kernel in Kernel::available() {
        let case = Case::new(Shape { tokens: 40, hidden: 16, vocab: 600 }, 2.0, LossOptions::default(), 8);
        let problem = case.problem();
        let z = fused_xent_kernels::reference::logits(&problem, 0..40);
        let predicted = kernel.predictions(&problem).unwrap();
        let mut hits = 0;
        for (n, z) in z.outer_iter().enumerate() {
            if case.targets[n] < 0 {
                assert_eq!((predicted.argmax[n], predicted.entropy[n]), (0, 0.0));
                continue;
            }
            let argmax = (0..600).max_by(|&a, &b| z[a].total_cmp(&z[b]).then(b.cmp(&a))).unwrap();
            let lse = fused_xent_kernels::reference::log_sum_exp(z.iter().copied());
            let entropy: f64 = -z.iter().map(|z| (z - lse).exp() * (z - lse)).sum::<f64>();
            assert_eq!(predicted.argmax[n] as usize, argmax, "token {n}");
            assert!(
                (f64::from(predicted.entropy[n]) - entropy).abs() < 1e-5,
                "token {n}: {} for {entropy}",
                predicted.entropy[n]
            );
            hits += usize::from(argmax == case.targets[n] as usize);
        }
        let valid = case.targets.iter().filter(|t| **t >= 0).count();
        assert_eq!(predicted.accuracy, Some(hits as f64 / valid as f64));
    }
}

#[test]
fn equal_logits_predict_the_lowest_id() {
    for kernel in Kernel::available() {
        let mut case = Case::new(Shape { tokens: 3, hidden: 4, vocab: 600 }, 1.0, LossOptions::default(), 1);
        case.unembedding = Data::new(DType::Bf16, (0..2400).map(|_| 0.0));
        let predicted = kernel.predictions(&case.problem()).unwrap();
        assert_eq!(predicted.argmax, [0, 0, 0]);
        assert!((predicted.entropy[0] - 600f32.ln()).abs() < 1e-5);
    }
}

#[test]
fn wrong_buffers_are_refused() {
    let case = default_case();
    let problem = case.problem();
    let kernel = Kernel::portable();
    let g = vec![1.0; 200];
    let mut short = vec![0.0f32; 5];
    let gradients = Gradients { d_hidden: Some(GradientMut::F32(&mut short)), d_unembedding: None };
    let error = kernel.loss_and_grad(&problem, &g, gradients).unwrap_err();
    assert_eq!(error.to_string(), "d_hidden has 5 elements, expected 19200 (N × D)");
    let mut half = vec![f16::ZERO; problem.hidden().len()];
    let gradients = Gradients { d_hidden: Some(GradientMut::F16(&mut half)), d_unembedding: None };
    assert!(matches!(kernel.loss_and_grad(&problem, &g, gradients), Err(ProblemError::GradientDType { .. })));
    let error = kernel.backward(&problem, &g[1..], Cotangents::default(), Gradients::default()).unwrap_err();
    assert_eq!(error.to_string(), "lse has 199 elements, expected 200 (N)");
    let shard = case.shard(0..200, Some(0..100));
    assert!(matches!(kernel.forward(&shard), Err(ProblemError::IsShard { .. })));
}

#[test]
fn the_workspace_keeps_to_its_bound() {
    let case = Case::new(Shape { tokens: 700, hidden: 8, vocab: 5000 }, 1.0, LossOptions::default(), 1);
    let problem = case.problem();
    for bytes in [1 << 17, 1 << 20, 1 << 23, 128 << 20] {
        let used = Kernel::portable().with_workspace(bytes).workspace_bytes(&problem);
        assert!(used <= bytes, "{used} of {bytes}");
    }
    assert!(Kernel::portable().with_workspace(0).workspace_bytes(&problem) <= 256 * 4, "one row of one tile at least");
}
