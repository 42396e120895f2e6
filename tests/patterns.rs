//! How an error lies: planted errors are found with their numbers, and honest noise is none.

use fused_xent::diff::compare::{Context, compare};
use fused_xent::diff::fault::Fault;
use fused_xent::diff::step::{Microbatch, Step};
use fused_xent::diff::synth::{SynthOptions, synth};
use fused_xent::diff::truth::{Stage, Truth, stage_error};
use fused_xent::diff::{Candidate, Settings, judge};
use fused_xent::dump::LossSettings;
use fused_xent::kernels::contract::{Contract, Precision};
use fused_xent::kernels::floor::Tolerance;
use fused_xent::kernels::problem::{Floats, Inputs, Layout, LossOptions, Problem, Shape, Targets};
use fused_xent::kernels::reduction::{Microbatches, StepReduction};
use fused_xent::report::model::{CandidateReport, Pattern, TensorReport, Verdict};
use ndarray::{Array2, s};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;
use std::fs;
use std::ops::Range;
use std::path::Path;

const N: usize = 1024;
const D: usize = 32;
const V: usize = 1000;

/// dQ and dK of a step, honestly rounded to bfloat16, and what is tolerated of them.
struct Case {
    labels: Vec<Option<usize>>,
    gradients: [Gradient; 2],
}

struct Gradient {
    stage: Stage,
    exact: Array2<f64>,
    honest: Array2<f64>,
    tolerance: Tolerance,
}

impl Case {
    /// A tenth of the tokens masked; labels fall on low ids far more often than on high ones.
    fn new(seed: u64) -> Self {
        let mut random = Pcg64Mcg::seed_from_u64(seed);
        let mut values = |count: usize, size: f32| -> Vec<f32> {
            (0..count).map(|_| size * (random.random::<f32>() + random.random::<f32>() - 1.0)).collect()
        };
        let (hidden, unembedding) = (values(N * D, 2.0), values(V * D, 1.0));
        let targets: Vec<i32> = (0..N)
            .map(|_| if random.random_bool(0.1) { -100 } else { (V as f64 * random.random::<f64>().powi(4)) as i32 })
            .collect();
        let inputs = Inputs {
            hidden: Floats::F32(&hidden),
            unembedding: Floats::F32(&unembedding),
            layout: Layout::Vd,
            targets: Targets::I32(&targets),
            token_weights: None,
            shape: Shape { tokens: N, hidden: D, vocab: V },
            shard: None,
        };
        let problem = Problem::new(inputs, LossOptions::default()).unwrap();
        let targets = targets.iter().map(|&t| i64::from(t)).collect::<Vec<_>>();
        let labels = targets.iter().map(|&t| usize::try_from(t).ok()).collect();
        let step = Step {
            microbatches: vec![Microbatch { problem, targets, recorded_lse: None, index: 0 }],
            num_microbatches: 1,
            processes: 1,
            reduction: StepReduction::default(),
            own_carries_step_factor: false,
        };
        let truth = Truth::new(&step, 0, None).unwrap();
        let floor = truth.floor(&step, 0, &Contract::F32).unwrap();
        let gradients = [Stage::DHidden, Stage::DUnembedding].map(|stage| {
            let exact = truth.outcome.stage(stage).into_owned();
            let honest = exact.mapv(|x| Precision::Bf16.round(x));
            let tolerance = stage_error(&floor, stage).tolerance(exact.view(), Precision::Bf16);
            Gradient { stage, exact, honest, tolerance }
        });
        Self { labels, gradients }
    }

    fn dq(&self, plant: impl Fn(&mut Array2<f64>)) -> Pattern {
        self.pattern(0, &[], plant)
    }

    fn dk(&self, plant: impl Fn(&mut Array2<f64>)) -> Pattern {
        self.pattern(1, &[], plant)
    }

    #[track_caller]
    fn pattern(&self, which: usize, owners: &[(Range<usize>, usize)], plant: impl Fn(&mut Array2<f64>)) -> Pattern {
        let tensor = self.compare(which, owners, plant);
        assert_eq!(tensor.verdict, Verdict::Diverge);
        tensor.pattern.unwrap()
    }

    fn compare(&self, which: usize, owners: &[(Range<usize>, usize)], plant: impl Fn(&mut Array2<f64>)) -> TensorReport {
        let Gradient { stage, exact, honest, tolerance } = &self.gradients[which];
        let mut candidate = honest.clone();
        plant(&mut candidate);
        let (precision, of) = (Precision::Bf16, exact.nrows());
        let context = Context { stage: *stage, precision, tolerance, labels: &self.labels, rows: None, of, owners };
        compare(&context, candidate.view(), exact.view())
    }
}

/// Noise of `size` times the bfloat16 step in these rows.
fn noise(rows: impl Fn(usize) -> bool, size: f64) -> impl Fn(&mut Array2<f64>) {
    move |x| {
        let mut random = Pcg64Mcg::seed_from_u64(7);
        for (row, mut values) in x.outer_iter_mut().enumerate() {
            values.iter_mut().for_each(|x| {
                let error = size / 128.0 * (random.random::<f64>() - 0.5);
                *x *= if rows(row) { 1.0 + error } else { 1.0 };
            });
        }
    }
}

#[test]
fn honest_gradients_have_no_pattern_and_noise_is_uniform() {
    for seed in 0..3 {
        let case = Case::new(seed);
        for which in [0, 1] {
            assert!(case.compare(which, &[], |_| {}).pattern.is_none());
            for size in [1.5, 4.0, 64.0] {
                let found = case.pattern(which, &[(0..500, 0), (500..N.max(V), 1)], noise(|_| true, size));
                assert_eq!(found.kind, "uniform", "{which} {size} {found:?}");
            }
        }
    }
}

#[test]
fn a_run_of_rows_is_a_tile_where_it_is_aligned() {
    let case = Case::new(0);
    for size in [3.0, 100.0] {
        let found = case.dk(noise(|row| (384..512).contains(&row), size));
        assert_eq!((found.kind.as_str(), found.tile, &found.rows[..]), ("vocab_tile", Some(128), &[[384, 512]][..]), "{found:?}");
        assert!(found.tile_candidates.is_empty() && found.share > 0.95);
        let found = case.dq(noise(|row| (256..512).contains(&row), size));
        assert_eq!((found.kind.as_str(), found.tile), ("token_tile", Some(256)), "{found:?}");
        let found = case.dk(noise(|row| (100..231).contains(&row), size));
        assert_eq!((found.kind.as_str(), found.tile, &found.rows[..]), ("rows", None, &[[100, 231]][..]), "{found:?}");
    }
}

#[test]
fn a_factor_on_a_tile_is_told() {
    let found = Case::new(1).dk(|x| x.slice_mut(s![384..512, ..]).mapv_inplace(|x| 0.86 * x));
    assert_eq!((found.kind.as_str(), found.tile), ("vocab_tile", Some(128)));
    assert!((found.alpha.unwrap() - 0.86).abs() < 1e-3, "{found:?}");
}

#[test]
fn every_so_many_tiles() {
    let case = Case::new(2);
    let found = case.dk(noise(|row| row / 64 % 4 == 1, 20.0));
    assert_eq!((found.kind.as_str(), found.tile, found.every), ("vocab_tile", Some(64), Some([4, 1])), "{found:?}");
    let found = case.dq(noise(|row| row % 128 == 127, 20.0));
    assert_eq!((found.kind.as_str(), found.tile, found.offset), ("token_tile", Some(128), Some([127, 128])), "{found:?}");
    let found = case.dk(noise(|row| row % 32 < 2, 20.0));
    assert_eq!((found.kind.as_str(), found.tile, found.offset), ("vocab_tile", Some(32), Some([0, 2])), "{found:?}");
}

#[test]
fn tokens_whose_label_is_at_the_edge_of_a_tile() {
    let case = Case::new(2);
    let at_edge = |row: usize| case.labels[row].is_some_and(|label| label % 32 == 0);
    let found = case.dq(noise(at_edge, 100.0));
    assert_eq!((found.kind.as_str(), found.tile, found.offset), ("label_tile", Some(32), Some([0, 1])), "{found:?}");
}

#[test]
fn a_tail_and_the_tiles_that_end_there() {
    let case = Case::new(3);
    let found = case.dk(noise(|row| row >= 768, 20.0));
    assert_eq!((found.kind.as_str(), found.first_bad, found.tile), ("tail", Some(768), Some(256)), "{found:?}");
    assert!(found.tile_candidates.starts_with(&[256]) && found.tile_candidates.contains(&768), "{found:?}");
    let found = case.dk(noise(|row| row >= 901, 20.0));
    assert_eq!((found.kind.as_str(), found.first_bad, found.tile), ("tail", Some(901), None), "{found:?}");
    let found = case.dk(|x| x.slice_mut(s![896.., ..]).fill(0.0));
    assert_eq!((found.kind.as_str(), found.first_bad, found.tile), ("zero_rows", Some(896), Some(128)), "{found:?}");
    assert_eq!(found.alpha, Some(0.0));
}

#[test]
fn few_rows_and_columns() {
    let case = Case::new(4);
    let rows = [3, 77, 500, 901];
    let found = case.dk(noise(|row| rows.contains(&row), 1000.0));
    assert_eq!((found.kind.as_str(), found.rows), ("rows", rows.map(|row| [row, row + 1]).to_vec()));
    let found = case.dq(|x| x.slice_mut(s![.., 8..12]).mapv_inplace(|x| 1.3 * x));
    assert_eq!((found.kind.as_str(), &found.columns[..]), ("columns", &[[8, 12]][..]), "{found:?}");
}

#[test]
fn label_rows_and_growth_with_their_hits() {
    let case = Case::new(5);
    let mut hits = vec![0usize; V];
    case.labels.iter().flatten().for_each(|&label| hits[label] += 1);
    for (power, expected) in [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)] {
        let found = case.dk(|x| {
            let mut random = Pcg64Mcg::seed_from_u64(7);
            for (row, mut values) in x.outer_iter_mut().enumerate().filter(|(row, _)| hits[*row] > 0) {
                let size = 0.02 * (hits[row] as f64).powf(power);
                values.iter_mut().for_each(|x| *x *= 1.0 + size * (random.random::<f64>() - 0.5));
            }
        });
        assert_eq!(found.kind, "label_rows", "{found:?}");
        assert!((found.slope.unwrap() - expected).abs() < 0.1, "{power}: {found:?}");
        assert!(found.rows.iter().all(|[from, to]| (*from..*to).all(|row| hits[row] > 0)));
    }
}

#[test]
fn factors_of_all_and_of_each_row() {
    let case = Case::new(6);
    let found = case.dq(|x| x.mapv_inplace(|x| 1.05 * x));
    assert_eq!(found.kind, "scale");
    assert!((found.alpha.unwrap() - 1.05).abs() < 1e-4);
    let factor = |row: usize| 0.5 + (row * 7919 % 1000) as f64 / 1000.0;
    let found = case.dq(|x| x.outer_iter_mut().enumerate().for_each(|(row, mut values)| values *= factor(row)));
    assert_eq!(found.kind, "row_scale", "{found:?}");
    let [low, high] = found.alpha_range.unwrap();
    assert!((low - 0.5).abs() < 0.02 && (high - 1.5).abs() < 0.02, "{low} {high}");
}

#[test]
fn masked_rows() {
    let case = Case::new(7);
    let found = case.dq(|x| {
        for row in (0..N).filter(|&row| case.labels[row].is_none()) {
            x.row_mut(row).fill(1e-3);
        }
    });
    assert_eq!(found.kind, "masked_rows");
    assert!(found.share > 0.999);
}

#[test]
fn the_share_of_one_process() {
    let case = Case::new(8);
    let owners = [(0..300, 0), (300..620, 1), (620..800, 2), (800..N, 1)];
    let of = |row: usize| owners.iter().find(|(range, _)| range.contains(&row)).unwrap().1;
    let found = case.pattern(0, &owners, noise(|row| of(row) == 1, 20.0));
    assert_eq!((found.kind.as_str(), found.process), ("process", Some(1)), "{found:?}");
    let found = case.pattern(0, &owners, noise(|row| (128..256).contains(&row), 20.0));
    assert_eq!((found.kind.as_str(), found.process, found.tile), ("token_tile", None, Some(128)), "{found:?}");
}

#[test]
fn what_is_not_finite_is_located() {
    let case = Case::new(9);
    let found = case.compare(1, &[], |x| {
        x[[17, 3]] = f64::NAN;
        x[[18, 0]] = f64::INFINITY;
    });
    assert_eq!(found.nonfinite, 2);
    let found = found.pattern.unwrap();
    assert_eq!((found.kind.as_str(), found.first, &found.rows[..]), ("nonfinite", Some([17, 3]), &[[17, 19]][..]));
    assert_eq!(found.origin, Some("good_in_bad_out"));
}

fn recorded(dump: &Path) -> CandidateReport {
    let settings = Settings { candidates: vec![Candidate::Recorded], ..Settings::default() };
    judge(dump, &settings, &()).unwrap().candidates.remove(0)
}

fn planted(fault: &str, options: SynthOptions) -> CandidateReport {
    let folder = tempfile::tempdir().unwrap();
    let faults = vec![Fault::parse(fault).unwrap()];
    synth(folder.path(), &SynthOptions { tokens: 90, hidden: 16, vocab: 200, faults, ..options }, &()).unwrap();
    recorded(folder.path())
}

#[test]
fn a_factor_per_microbatch() {
    let global = StepReduction { microbatches: Microbatches::Global, ..StepReduction::default() };
    let loss = LossSettings { reduction: global, ..LossSettings::default() };
    let found = planted("mean-of-means", SynthOptions { microbatches: 3, masked: 0.4, loss, ..SynthOptions::default() });
    let dq = |m: usize| found.microbatches[m].tensors.iter().find(|t| t.name == "d_hidden").unwrap();
    let scales: Vec<f64> = (0..3).map(|m| dq(m).scale.unwrap()).collect();
    let of_dq = (0..3).find_map(|m| dq(m).pattern.as_ref()).unwrap();
    assert_eq!((of_dq.kind.as_str(), &of_dq.per_microbatch), ("microbatch_scale", &scales));
    let accumulated = found.accumulated.unwrap().tensors.remove(0).pattern.unwrap();
    assert_eq!(accumulated.kind, "microbatch_scale");
    for (a, b) in accumulated.per_microbatch.iter().zip(&scales) {
        assert!((a - b).abs() < 1e-2, "{:?} {scales:?}", accumulated.per_microbatch);
    }
    let found = planted("last-microbatch-only", SynthOptions { microbatches: 3, ..SynthOptions::default() });
    let accumulated = found.accumulated.unwrap().tensors.remove(0).pattern.unwrap();
    let near = |(a, b): (&f64, f64)| (a - b).abs() < 1e-2;
    assert!(accumulated.per_microbatch.iter().zip([0.0, 0.0, 1.0]).all(near), "{accumulated:?}");
}

/// Changes the bfloat16 elements of a payload of a dump, and drops the checksums of its folder.
fn tampered(folder: &Path, file: &str, elements: usize, change: impl Fn(&mut [u8])) {
    let (payload, manifest) = (folder.join(file), folder.join("manifest.json"));
    let mut bytes = fs::read(&payload).unwrap();
    let start = bytes.len() - 2 * elements;
    change(&mut bytes[start..]);
    fs::write(&payload, bytes).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&fs::read_to_string(&manifest).unwrap()).unwrap();
    for tensor in json["tensors"].as_array_mut().unwrap() {
        for shard in tensor.get_mut("shards").and_then(|shards| shards.as_array_mut()).into_iter().flatten() {
            shard.as_object_mut().unwrap().remove("blake3");
        }
    }
    fs::write(&manifest, json.to_string()).unwrap();
}

#[test]
fn an_input_that_is_not_finite_is_to_blame() {
    let folder = tempfile::tempdir().unwrap();
    let options = SynthOptions { tokens: 40, hidden: 16, vocab: 50, microbatches: 1, ..SynthOptions::default() };
    synth(folder.path(), &options, &()).unwrap();
    tampered(&folder.path().join("proc_00000/step_00000000/mb_0000"), "hidden.0.npy", 40 * 16, |elements| {
        let at = 2 * (5 * 16 + 3);
        elements[at..at + 2].copy_from_slice(&half::bf16::NAN.to_le_bytes());
    });
    let found = recorded(folder.path());
    assert_eq!(found.verdict, Verdict::Diverge);
    let dk = found.microbatches[0].tensors.iter().find(|t| t.name == "d_unembedding").unwrap();
    assert_eq!(dk.nonfinite, 50 * 16);
    let pattern = dk.pattern.as_ref().unwrap();
    let input = pattern.input.as_ref().unwrap();
    assert_eq!((pattern.origin, input.tensor, input.index, input.value.as_str()), (Some("bad_in"), "hidden", [5, 3], "NaN"));
    assert_eq!((found.findings[0].cause.as_str(), found.findings[0].title.as_str()), ("nonfinite", "an input is not finite"));
}

#[test]
fn what_one_process_wrote_is_told_in_a_dump_of_several() {
    let folder = tempfile::tempdir().unwrap();
    let options = SynthOptions { tokens: 60, hidden: 16, vocab: 90, microbatches: 1, processes: 3, ..SynthOptions::default() };
    synth(folder.path(), &options, &()).unwrap();
    let negated = |elements: &mut [u8]| elements.iter_mut().skip(1).step_by(2).for_each(|high| *high ^= 0x80);
    tampered(&folder.path().join("proc_00001/step_00000000/mb_0000"), "d_hidden.0.npy", 20 * 16, negated);
    tampered(&folder.path().join("proc_00002/step_00000000/mb_0000"), "d_unembedding.0.npy", 30 * 16, negated);
    let found = recorded(folder.path());
    for (stage, process, start, end) in [("d_hidden", 1, 20, 40), ("d_unembedding", 2, 60, 90)] {
        let tensor = found.microbatches[0].tensors.iter().find(|t| t.name == stage).unwrap();
        let pattern = tensor.pattern.as_ref().unwrap();
        assert_eq!((pattern.kind.as_str(), pattern.process), ("process", Some(process)), "{stage}: {pattern:?}");
        assert!((pattern.alpha.unwrap() + 1.0).abs() < 1e-2, "{stage}: {pattern:?}");
        assert!(pattern.rows.iter().all(|[from, to]| start <= *from && *to <= end), "{stage}: {pattern:?}");
        let cells = &tensor.plots.as_ref().unwrap().processes;
        assert!(cells.iter().all(|cell| (cell.ratio > 100.0) == (cell.process == process)), "{stage}: {cells:?}");
    }
    assert_eq!((found.presence.processes, found.presence.microbatches, found.presence.absent.len()), (3, 1, 0));
}

#[test]
fn the_tiles_of_the_logits_that_a_gradient_lacks_are_mapped() {
    let found = planted("vocab-tail-dropped:tile=64", SynthOptions { microbatches: 1, ..SynthOptions::default() });
    let crossing = found.crossing.unwrap();
    assert_eq!((crossing.tile, crossing.of, crossing.maps.len()), ([4, 16], [90, 200], 2));
    let across = crossing.of[1].div_ceil(crossing.tile[1]);
    for map in &crossing.maps {
        assert!(map.explained > 0.99, "{} {}", map.stage, map.explained);
        let telling: Vec<_> = map.ratio.chunks(across).filter(|ratio| ratio.iter().any(|r| *r > 3.0)).collect();
        let last = |ratio: &[f32]| ratio[12] > 3.0 && ratio[..12].iter().all(|other| *other < 1.5);
        assert!(telling.len() >= 5 && telling.iter().all(|ratio| last(ratio)), "{} {:?}", map.stage, map.ratio);
    }
    let healthy = tempfile::tempdir().unwrap();
    synth(healthy.path(), &SynthOptions { tokens: 90, hidden: 16, vocab: 200, ..SynthOptions::default() }, &()).unwrap();
    assert!(recorded(healthy.path()).crossing.is_none());
}

#[test]
fn figures_are_bounded_whatever_the_size() {
    let case = Case::new(10);
    let found = case.pattern(1, &[], noise(|row| row >= 768, 20.0));
    assert_eq!(found.kind, "tail");
    let plots = case.compare(1, &[(0..500, 0), (500..V, 1)], noise(|row| row >= 768, 20.0)).plots.unwrap();
    assert!(plots.profile.len() <= 256 && plots.hits.len() <= 600 && plots.magnitude.len() <= 64);
    for span in &plots.profile {
        assert_eq!(span.ratio > 2.0, span.rows[0] >= 768, "{span:?}");
        assert!(span.worst >= span.ratio);
    }
    assert_eq!(plots.profile.last().unwrap().rows[1], V);
    let [first, second] = [0, 1].map(|process| plots.processes[process].ratio);
    assert!((0.9..1.1).contains(&first) && second > 2.0, "{first} {second}");
    let counted: usize = plots.magnitude.iter().map(|bin| bin.count).sum();
    assert_eq!(counted, V * D);
    assert!(plots.worst.len() == 6 && plots.worst.iter().all(|worst| worst.index[0] >= 768));
    let errors: Vec<f64> = plots.worst.iter().map(|worst| (worst.candidate - worst.reference).abs()).collect();
    assert!(errors.is_sorted_by(|a, b| a >= b), "{errors:?}");
}
