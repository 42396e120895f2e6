//! Files that numpy wrote: the fixtures in the repository, and fresh ones where a Python with numpy is at hand.

use crate::support::{file, fresh, ramp};
use fused_xent::dump::{Dump, Tensor};
use fused_xent::kernels::reduction::Microbatches;
use std::path::Path;
use std::process::Command;

/// The script's `ramp`.
fn numpy_ramp(n: usize, seed: usize) -> Vec<f64> {
    (0..n).map(|i| (((i * 7 + seed * 3) % 23) as f64 - 11.0) / 8.0).collect()
}

fn check(root: &Path) {
    let dump = Dump::open(root).unwrap();
    assert_eq!(dump.warnings().len(), 1, "missing checksums are said once: {:?}", dump.warnings());
    assert!(dump.warnings()[0].starts_with("20 payload files"), "{:?}", dump.warnings());
    let step = &dump.runs()[0].steps[&0];
    assert_eq!(step.loss.reduction.microbatches, Microbatches::Global);
    assert_eq!(step.loss.options.logit_softcap, Some(30.0));
    assert_eq!(step.num_microbatches, 2);
    for m in 0..2 {
        let folder = &step.microbatches[&m];
        let load = |name| folder.load(name).unwrap().unwrap().tensor;
        let values = |tensor: Tensor| (tensor.dtype().name(), tensor.shape().to_vec(), tensor.to_f64());
        assert_eq!(values(load("hidden")), ("bfloat16", vec![4, 3, 4], numpy_ramp(48, m)));
        let mut ids: Vec<f64> = (0..12).map(|i| (i % 5) as f64).collect();
        ids[m] = -100.0;
        assert_eq!(values(load("targets")), (["int32", "int64"][m], vec![4, 3], ids));
        assert_eq!(values(load("token_weights")), ("float32", vec![4, 3], numpy_ramp(12, 5).iter().map(|x| x.abs()).collect()));
        assert_eq!(values(load("d_hidden")), ("float32", vec![4, 3, 4], numpy_ramp(48, 6 + m)));
        let loaded = step.problem(m).unwrap();
        assert_eq!(loaded.problem().unwrap().shape().tokens, 12);
        assert_eq!(loaded.unembedding.to_f64(), numpy_ramp(20, 8));
    }
    let accumulated = step.shared.load("d_unembedding").unwrap().unwrap().tensor;
    assert_eq!((accumulated.dtype().name(), accumulated.to_f64()), ("float64", numpy_ramp(20, 9)));
}

fn fixtures() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/numpy")
}

#[test]
fn checked_in_files_of_numpy_are_read() {
    check(&fixtures().join("dump"));
}

#[test]
#[ignore = "needs numpy and ml_dtypes: run through make test"]
fn fresh_files_of_numpy_are_read() {
    let python = std::env::var("FUSED_XENT_PYTHON").expect("FUSED_XENT_PYTHON names a python with numpy and ml_dtypes");
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("dump");
    let status = Command::new(python).arg(fixtures().join("make_fixtures.py")).arg(&root).status().unwrap();
    assert!(status.success());
    check(&root);
}

#[test]
#[ignore = "needs numpy and ml_dtypes: run through make test"]
fn numpy_reads_our_files() {
    let python = std::env::var("FUSED_XENT_PYTHON").expect("FUSED_XENT_PYTHON names a python with numpy and ml_dtypes");
    let folder = fresh();
    let script = "import sys, numpy, ml_dtypes
for path in sys.argv[1:]:
    a = numpy.load(path)
    print(a.dtype.str, a.shape, (a.view(ml_dtypes.bfloat16) if a.dtype.str[1] == 'V' else a).astype('f8').tolist())";
    let payload = |part, name| file(folder.path(), 1, part, name);
    let paths =
        [payload("mb_0001", "hidden.0.npy"), payload("mb_0001", "targets.0.npy"), payload("shared", "d_unembedding.0.npy")];
    let output = Command::new(python).args(["-c", script]).args(paths).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let hidden: Vec<String> = ramp(12, 3).iter().map(|x| format!("{:?}", x.to_f64())).collect();
    let rows: Vec<String> = hidden.chunks(4).map(|row| format!("[{}]", row.join(", "))).collect();
    let expected = format!(
        "|V2 (1, 3, 4) [[{}]]\n<i4 (1, 3) [[4.0, -100.0, 1.0]]\n<f4 (5, 4) [{}]\n",
        rows.join(", "),
        ["[0.125, 0.125, 0.125, 0.125]"; 5].join(", ")
    );
    assert_eq!(text, expected, "{}", String::from_utf8_lossy(&output.stderr));
}
