//! Checks of the whole trainer: the backward against finite differences, training itself, capture.

use crate::model::Weights;
use crate::random::Random;
use crate::{Options, Training, run, text};
use clap::Parser;
use fused_xent::dump::{Dump, Folder};
use fused_xent::kernels::reduction::MicrobatchCounts;
use fused_xent::kernels::reference::{self, Cotangents};
use half::bf16;
use ndarray::Array2;
use std::path::Path;

const VOCAB: usize = 11;
const SEQUENCE: usize = 5;
const IDS: [u32; 10] = [3, 1, 4, 1, 5, 9, 2, 6, 5, 0];

/// A scalar of the hidden states whose gradient with respect to them is `c`: Σ c·hidden.
fn functional(weights: &Weights<f64>, c: &Array2<f64>) -> f64 {
    (weights.forward(&IDS).0 * c).sum()
}

/// Per tensor but K: how far ⟨gradient, direction⟩ is from the central difference along a random direction, relatively.
fn finite_difference_errors(gradient: &Weights<f64>, weights: &Weights<f64>, c: &Array2<f64>) -> Vec<f64> {
    let mut random = Random::new(7);
    (0..weights.tensors().len())
        .filter(|&i| !std::ptr::eq(weights.tensors()[i], &weights.unembedding))
        .map(|i| {
            let direction = weights.tensors()[i].mapv(|_| random.normal());
            let at = |h: f64| {
                let mut moved = weights.clone();
                moved.tensors_mut()[i].scaled_add(h, &direction);
                functional(&moved, c)
            };
            let h = 1e-5;
            let numeric = (at(h) - at(-h)) / (2.0 * h);
            let analytic = (gradient.tensors()[i] * &direction).sum();
            (analytic - numeric).abs() / numeric.abs()
        })
        .collect()
}

#[test]
fn the_backward_is_the_derivative_of_the_forward() {
    let mut random = Random::new(3);
    let weights = Weights::<f64>::random(VOCAB, SEQUENCE, 32, &mut random);
    let c = Array2::from_shape_simple_fn((IDS.len(), 32), || random.normal());
    let mut gradient = weights.zeros_like();
    weights.backward(&weights.forward(&IDS).1, c.view(), &mut gradient);

    // A central difference with h = 1e-5 is off by about h² from truncation and 1e-16/h from rounding: 1e-10, and 1e-6 leaves
    // room for a direction along which the derivative happens to be small.
    let errors = finite_difference_errors(&gradient, &weights, &c);
    assert!(errors.iter().all(|&e| e < 1e-6), "{errors:?}");

    let zeros = finite_difference_errors(&weights.zeros_like(), &weights, &c);
    assert!(zeros.iter().all(|&e| e > 0.9), "zeros pass as a gradient: {zeros:?}");
    let mut wrong = gradient.clone();
    wrong.tensors_mut().into_iter().for_each(|t| {
        let shifted = Array2::from_shape_fn(t.dim(), |(r, c)| t[[r, (c + 1) % t.ncols()]]);
        t.assign(&shifted);
    });
    let shifted = finite_difference_errors(&wrong, &weights, &c);
    assert!(shifted.iter().all(|&e| e > 1e-2), "a shift passes as a gradient: {shifted:?}");
}

#[test]
fn attention_sees_no_future_and_no_other_sequence() {
    let weights = Weights::<f64>::random(VOCAB, SEQUENCE, 32, &mut Random::new(3));
    let hidden = weights.forward(&IDS).0;
    let mut changed_ids = IDS;
    changed_ids[3] = 8;
    let changed = weights.forward(&changed_ids).0;
    for n in 0..IDS.len() {
        let same = hidden.row(n) == changed.row(n);
        assert_eq!(same, !(3..SEQUENCE).contains(&n), "token {n}");
    }
}

/// Options of a run that takes a moment, with more on the command line.
fn options(more: &[&str]) -> Options {
    let small = "train_lm --steps 6 --hidden 32 --vocab 300 --seq 16 --batch 3".split(' ');
    Options::parse_from(small.chain(more.iter().copied()))
}

/// On a text that never changes, so that every figure here is the same each time.
fn training(options: &Options) -> Training {
    let licence = Path::new(env!("CARGO_MANIFEST_DIR")).join("LICENSE-APACHE");
    Training::new(options, &text::read(&licence, 40_000).unwrap()).unwrap()
}

/// The weights after all steps.
fn trained(options: &Options) -> Weights<f32> {
    let mut training = training(options);
    for _ in 0..options.steps {
        training.step().unwrap();
    }
    training.trainer.weights
}

#[test]
fn the_loss_falls() {
    let mut training = training(&options(&["--rate", "1e-2"]));
    let losses: Vec<f64> = (0..60).map(|_| training.step().unwrap().loss).collect();
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let (first, last) = (mean(&losses[..5]), mean(&losses[55..]));
    // K starts small, so every id is about as likely as any other: ln V. An average over one id in four would be ln V − ln 4.
    assert!((losses[0] - (300f64).ln()).abs() < 0.1, "{}", losses[0]);
    assert!(last < first - 4f64.ln(), "{first} → {last}");
}

#[test]
fn a_capture_changes_no_bit_of_training() {
    for fault in [&[][..], &["--fault", "label-scatter-bf16"], &["--fault", "dk-accumulate-bf16"]] {
        let dumps = tempfile::tempdir().unwrap();
        let captured = [fault, &["--dumps", dumps.path().to_str().unwrap(), "--capture-at", "0,3,5"]].concat();
        let bits = |w: Weights<f32>| w.tensors().into_iter().flatten().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(trained(&options(fault))), bits(trained(&options(&captured))));
        let dump = Dump::open(dumps.path()).unwrap();
        assert_eq!(dump.runs()[0].steps.keys().copied().collect::<Vec<_>>(), [0, 3, 5]);
        assert!(dump.runs()[0].steps.values().all(|s| s.incomplete.is_empty()));
    }
}

#[test]
fn a_capture_that_fails_stops_the_training() {
    let dumps = tempfile::tempdir().unwrap();
    let folder = dumps.path().join("a");
    let captured = options(&["--dumps", folder.to_str().unwrap(), "--capture-at", "1"]);
    run(&captured).unwrap();
    let mut again = training(&captured);
    again.step().unwrap();
    let before = again.trainer.weights.clone();
    let error = again.step().map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("step_00000001"), "{error}");
    assert!(again.trainer.weights == before, "a step was taken that should have been captured");

    let file = dumps.path().join("b");
    std::fs::write(&file, "no folder").unwrap();
    let error = run(&options(&["--dumps", file.to_str().unwrap(), "--capture-at", "1"])).unwrap_err().to_string();
    assert!(error.contains(file.to_str().unwrap()), "{error}");
    let error = run(&options(&["--dumps", folder.to_str().unwrap(), "--capture-at", "6"])).unwrap_err().to_string();
    assert!(error.contains("the last of 6 steps is 5"), "{error}");
}

/// Per microbatch, then accumulated: recorded dK beside the oracle's; and whether the oracle's dQ is recorded everywhere.
struct Judged {
    d_unembedding: Vec<(Vec<f64>, Vec<f64>)>,
    d_hidden_right: bool,
}

fn judge(fault: Option<&str>, microbatches: &str) -> Judged {
    let dumps = tempfile::tempdir().unwrap();
    let late = ["--steps", "40", "--rate", "1e-2", "--capture-at", "39"];
    let mut more = [&["--dumps", dumps.path().to_str().unwrap(), "--microbatches", microbatches], &late[..]].concat();
    more.extend(fault.into_iter().flat_map(|fault| ["--fault", fault]));
    trained(&options(&more));
    let dump = Dump::open(dumps.path()).unwrap();
    let step = &dump.runs()[0].steps[&39];
    let loaded: Vec<_> = (0..step.num_microbatches).map(|m| step.problem(m).unwrap()).collect();
    let problems: Vec<_> = loaded.iter().map(|l| l.problem().unwrap()).collect();
    let counts: Vec<_> = problems.iter().map(MicrobatchCounts::of).collect();
    assert!(counts.iter().any(|c| c.weight != counts[0].weight), "equal counts would hide a mean of means");
    let values = |folder: &Folder, name| folder.load(name).unwrap().unwrap().tensor.to_f64();
    let mut judged = Judged { d_unembedding: Vec::new(), d_hidden_right: true };
    let mut sum = vec![0.0; problems[0].shape().vocab * problems[0].shape().hidden];
    for (m, problem) in problems.iter().enumerate() {
        let folder = step.folder(m).unwrap();
        let cotangents = Cotangents::weighted(problem, step.loss.reduction.own_factor(&counts, m));
        let lse = reference::forward(problem).unwrap().lse;
        let oracle = reference::backward(problem, &lse, &cotangents).unwrap();
        let d_unembedding: Vec<f64> = oracle.unembedding.sum().into_iter().collect();
        let d_hidden: Vec<f64> = oracle.hidden.sum().into_iter().collect();
        judged.d_hidden_right &= error(&values(folder, "d_hidden"), &d_hidden) < 2f64.powi(-8);
        sum.iter_mut().zip(&d_unembedding).for_each(|(s, d)| *s += d);
        judged.d_unembedding.push((values(folder, "d_unembedding"), d_unembedding));
    }
    judged.d_unembedding.push((values(&step.shared, "d_unembedding"), sum));
    judged
}

/// ‖a − b‖ / ‖b‖.
fn error(a: &[f64], b: &[f64]) -> f64 {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied())
}

/// How far the recorded are from the oracle, in units of what one rounding to bf16 of the oracle's makes.
fn roundings((recorded, oracle): &(Vec<f64>, Vec<f64>)) -> f64 {
    let rounded: Vec<f64> = oracle.iter().map(|&x| bf16::from_f64(x).to_f64()).collect();
    error(recorded, oracle) / error(&rounded, oracle)
}

#[test]
fn the_dumps_show_what_was_computed() {
    let healthy = judge(None, "2");
    assert!(healthy.d_hidden_right);
    let errors: Vec<f64> = healthy.d_unembedding.iter().map(roundings).collect();
    assert!(errors.iter().all(|&e| e < 1.5), "{errors:?}");

    let scatter = judge(Some("label-scatter-bf16"), "2");
    assert!(scatter.d_hidden_right, "the scatter harms dK alone");
    let errors: Vec<f64> = scatter.d_unembedding.iter().map(roundings).collect();
    assert!(errors.iter().all(|&e| e > 1.5), "{errors:?}");

    let accumulated = judge(Some("dk-accumulate-bf16"), "16");
    let errors: Vec<f64> = accumulated.d_unembedding.iter().map(roundings).collect();
    assert!(errors[..16].iter().all(|&e| e < 1.5) && errors[16] > 1.5, "{errors:?}");

    let means = judge(Some("mean-of-means"), "2");
    let scales: Vec<f64> = means.d_unembedding[..2].iter().map(|(a, b)| dot(a, b) / dot(b, b)).collect();
    assert!(!means.d_hidden_right && (scales[0] - 1.0) * (scales[1] - 1.0) < 0.0, "{scales:?}");
    assert!(
        (scales[0].recip() + scales[1].recip() - 2.0).abs() < 1e-3,
        "1/scale is a microbatch's share of the tokens: {scales:?}"
    );
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
