//! What the writer writes, the reader reads: one process and several, every dtype, runs kept apart.

use fused_xent::dump::*;
use fused_xent::kernels::problem::{Layout, Targets};
use fused_xent::kernels::reduction::{Denominator, Microbatches, Reduction};
use half::{bf16, f16};
use std::path::Path;

fn id(process_index: usize, process_count: usize, microbatch: Option<usize>) -> FolderId {
    FolderId {
        run_id: "run".into(),
        producer: "test 1".into(),
        step: 7,
        microbatch,
        num_microbatches: 2,
        process_index,
        process_count,
        loss: LossSettings::default(),
    }
}

fn bf16s(n: usize, seed: u32) -> Vec<bf16> {
    (0..n as u32).map(|i| bf16::from_f32(((i * 37 + seed * 101) % 97) as f32 / 16.0 - 3.0)).collect()
}

/// Two processes, two microbatches of [4, 3, 8] tokens × D, each process with half of the batch; V = 5.
fn write_dump(root: &Path) -> (Vec<Vec<bf16>>, Vec<bf16>) {
    let hidden: Vec<Vec<bf16>> = (0..2).map(|m| bf16s(4 * 3 * 8, m)).collect();
    let unembedding = bf16s(5 * 8, 9);
    for process in 0..2 {
        for (m, hidden) in hidden.iter().enumerate() {
            let mut folder = FolderWriter::create(root, id(process, 2, Some(m))).unwrap();
            let shard = &hidden[process * 48..][..48];
            let place = Placement::shard(&[4, 3, 8], &[2 * process, 0, 0], &[2, 3, 8]);
            folder.tensor("hidden", Elements::Bf16(shard), &place).unwrap();
            let targets: Vec<i32> = (0..6).map(|i| (i + 6 * process as i32) % 5).collect();
            let place = Placement::shard(&[4, 3], &[2 * process, 0], &[2, 3]);
            folder.tensor("targets", Elements::I32(&targets), &place).unwrap();
            folder.unembedding_from_shared().unwrap();
            folder.commit().unwrap();
        }
        let mut shared = FolderWriter::create(root, id(process, 2, None)).unwrap();
        let place = Placement::whole(&[5, 8]).replica(process);
        shared.tensor("unembedding", Elements::Bf16(&unembedding), &place).unwrap();
        shared.commit().unwrap();
    }
    (hidden, unembedding)
}

#[test]
fn two_processes_are_merged_to_one_problem() {
    let root = tempfile::tempdir().unwrap();
    let (hidden, unembedding) = write_dump(root.path());
    assert_eq!(find_dumps(root.path()).unwrap(), [root.path()]);
    let dump = Dump::open(root.path()).unwrap();
    let [run] = dump.runs() else { panic!("one run") };
    assert_eq!((run.run_id.as_str(), run.producer.as_str(), run.process_count), ("run", "test 1", 2));
    assert!(run.interrupted.is_empty() && dump.warnings().is_empty());
    let step = &run.steps[&7];
    assert!(step.incomplete.is_empty());
    let k = step.unembedding().unwrap();
    assert!(k.is_mapped());
    for (m, hidden) in hidden.iter().enumerate() {
        let loaded = step.problem_with(m, &k).unwrap();
        let problem = loaded.problem().unwrap();
        let shape = problem.shape();
        assert_eq!((shape.tokens, shape.hidden, shape.vocab), (12, 8, 5));
        assert!((0..96).all(|i| problem.hidden().get(i).to_bits() == hidden[i].to_f32().to_bits()));
        assert!((0..40).all(|i| problem.unembedding().get(i).to_bits() == unembedding[i].to_f32().to_bits()));
        let Some(Targets::I32(targets)) = loaded.targets.targets() else { panic!("int32") };
        assert_eq!(targets, (0..12).map(|i| i % 5).collect::<Vec<i32>>());
        assert_eq!(loaded.hidden.shape(), [4, 3, 8]);
    }
    let report = verify(root.path(), &mut |_, _| {}).unwrap();
    assert!(report.problems.is_empty() && report.differing_copies.is_empty());
    assert_eq!((report.folders, report.files), (6, 10));
}

#[test]
fn every_dtype_comes_back_bit_for_bit() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let bits = [0u64, 1 << 63, 0x7FF8_0000_0000_0001, u64::MAX, 0x3FF0_0000_0000_0000, 42];
    let f64s = bits.map(f64::from_bits);
    let f32s = bits.map(|b| f32::from_bits((b >> 32) as u32));
    let f16s = bits.map(|b| f16::from_bits((b >> 48) as u16));
    let bf16s = bits.map(|b| bf16::from_bits((b >> 48) as u16));
    let mut folder = FolderWriter::create(root, FolderId { num_microbatches: 1, ..id(0, 1, Some(0)) }).unwrap();
    let rows = Placement::whole(&[2, 3]);
    for (name, data) in [
        ("hidden", Elements::F16(&f16s)),
        ("d_hidden", Elements::F64(&f64s)),
        ("d_hidden_lse", Elements::F32(&f32s)),
        ("d_hidden_label", Elements::Bf16(&bf16s)),
    ] {
        folder.tensor(name, data, &rows).unwrap();
    }
    folder.tensor("d_unembedding", Elements::F32(&f32s), &Placement::whole(&[3, 2]).layout(Layout::Dv)).unwrap();
    folder.tensor("targets", Elements::I64(&[i64::MIN, -100]), &Placement::whole(&[2])).unwrap();
    folder.contract(serde_json::json!({ "dlogits": "bf16" })).unwrap();
    folder.extra(serde_json::json!({ "git": "abc" }));
    folder.commit().unwrap();
    let dump = Dump::open(root).unwrap();
    let folder = &dump.runs()[0].steps[&7].microbatches[&0];
    let load = |name| folder.load(name).unwrap().unwrap().tensor;
    let same = |a: Vec<f64>, b: Vec<f64>| a.iter().map(|x| x.to_bits()).eq(b.iter().map(|x| x.to_bits()));
    assert!(same(load("hidden").to_f64(), f16s.iter().map(|x| x.to_f64()).collect()));
    assert!(same(load("d_hidden").to_f64(), f64s.to_vec()));
    assert!(load("d_hidden").floats().is_none());
    assert!(same(load("d_hidden_lse").to_f64(), f32s.iter().map(|&x| x.into()).collect()));
    assert!(same(load("d_hidden_label").to_f64(), bf16s.iter().map(|x| x.to_f64()).collect()));
    assert_eq!(load("d_unembedding").layout(), Layout::Dv);
    assert!(load("d_unembedding").f32_slice().unwrap().iter().map(|x| x.to_bits()).eq(f32s.iter().map(|x| x.to_bits())));
    let targets = load("targets");
    assert!(matches!(targets.targets(), Some(Targets::I64(&[i64::MIN, -100]))));
    assert!(targets.floats().is_none());
    assert!(folder.load("loss").unwrap().is_none());
    assert_eq!(folder.contract().unwrap()["dlogits"], "bf16");
    assert_eq!(folder.extra().next().unwrap().1["git"], "abc");
}

#[test]
fn a_microbatch_without_tokens_is_one() {
    let root = tempfile::tempdir().unwrap();
    let mut folder = FolderWriter::create(root.path(), FolderId { num_microbatches: 1, ..id(0, 1, Some(0)) }).unwrap();
    folder.tensor("hidden", Elements::Bf16(&[]), &Placement::whole(&[2, 0, 8])).unwrap();
    folder.tensor("targets", Elements::I32(&[]), &Placement::whole(&[2, 0])).unwrap();
    folder.tensor("unembedding", Elements::Bf16(&bf16s(16, 0)), &Placement::whole(&[2, 8])).unwrap();
    folder.commit().unwrap();
    let dump = Dump::open(root.path()).unwrap();
    let loaded = dump.runs()[0].steps[&7].problem(0).unwrap();
    assert_eq!(loaded.problem().unwrap().shape().tokens, 0);
    assert_eq!(verify(root.path(), &mut |_, _| {}).unwrap().problems.len(), 0);
}

#[test]
fn loss_settings_survive_json_exactly() {
    let mut loss = LossSettings::default();
    assert_eq!(LossSettings::from_json(&serde_json::json!({}), "test").unwrap(), loss);
    loss.reduction.cotangent = 0.1 + 0.2;
    loss.reduction.denominator = Denominator::Given(1.0 / 3.0);
    loss.reduction.reduction = Reduction::Sum;
    loss.reduction.microbatches = Microbatches::Global;
    loss.options.logit_scale = f64::MIN_POSITIVE;
    loss.options.logit_softcap = Some(f64::MAX);
    loss.options.valid_vocab = Some(usize::MAX);
    loss.options.ignore_index = i64::MIN;
    loss.microbatch_gradients = MicrobatchGradients::Step;
    let text = loss.to_json().to_string();
    assert_eq!(LossSettings::from_json(&serde_json::from_str(&text).unwrap(), "test").unwrap(), loss);
    loss.reduction.denominator = Denominator::Tokens;
    assert_eq!(LossSettings::from_json(&loss.to_json(), "test").unwrap(), loss);
}
