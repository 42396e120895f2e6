//! A small valid dump for tests: two processes, one step, two microbatches of [2, 3] tokens, D = 4, V = 5.

use fused_xent::dump::*;
use half::bf16;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use tempfile::TempDir;

/// The folder of process `process`, microbatch `microbatch` (`None`: shared).
pub fn id(process: usize, microbatch: Option<usize>) -> FolderId {
    FolderId {
        run_id: "run".into(),
        producer: "test 1".into(),
        step: 0,
        microbatch,
        num_microbatches: 2,
        process_index: process,
        process_count: 2,
        loss: LossSettings::default(),
    }
}

/// Numbers that bfloat16 holds exactly.
pub fn ramp(n: usize, seed: usize) -> Vec<bf16> {
    (0..n).map(|i| bf16::from_f32(((i * 7 + seed * 3) % 23) as f32 / 8.0 - 1.0)).collect()
}

/// Writes the dump to `root`. Each process holds one row of the batch; both hold the unembedding and the accumulated gradient.
pub fn write(root: &Path) {
    for process in 0..2 {
        for m in 0..2 {
            let mut folder = FolderWriter::create(root, id(process, Some(m))).unwrap();
            let place = Placement::shard(&[2, 3, 4], &[process, 0, 0], &[1, 3, 4]);
            folder.tensor("hidden", Elements::Bf16(&ramp(12, 2 * m + process)), &place).unwrap();
            folder.tensor("d_hidden", Elements::F32(&[0.25; 12]), &place).unwrap();
            let place = Placement::shard(&[2, 3], &[process, 0], &[1, 3]);
            folder.tensor("targets", Elements::I32(&[4, -100, process as i32]), &place).unwrap();
            folder.tensor("token_weights", Elements::F32(&[1.0, 1.0, 0.5]), &place).unwrap();
            folder.unembedding_from_shared().unwrap();
            folder.commit().unwrap();
        }
        let mut shared = FolderWriter::create(root, id(process, None)).unwrap();
        let place = Placement::whole(&[5, 4]).replica(process);
        shared.tensor("unembedding", Elements::Bf16(&ramp(20, 9)), &place).unwrap();
        shared.tensor("d_unembedding", Elements::F32(&[0.125; 20]), &place).unwrap();
        shared.commit().unwrap();
    }
}

/// A fresh copy of the dump, to be damaged.
pub fn fresh() -> TempDir {
    static MODEL: LazyLock<Vec<(PathBuf, Vec<u8>)>> = LazyLock::new(|| {
        let model = tempfile::tempdir().unwrap();
        write(model.path());
        let relative = |path: &PathBuf| path.strip_prefix(model.path()).unwrap().to_owned();
        files(model.path()).iter().map(|path| (relative(path), fs::read(path).unwrap())).collect()
    });
    let copy = tempfile::tempdir().unwrap();
    for (path, bytes) in MODEL.iter() {
        let path = copy.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    copy
}

/// Every file beneath `root`, sorted.
pub fn files(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found.sort();
    found
}

/// A file of the dump.
pub fn file(root: &Path, process: usize, part: &str, name: &str) -> PathBuf {
    root.join(format!("proc_{process:05}/step_00000000/{part}/{name}"))
}
