//! Writing and reading 16 MiB of hidden states (bfloat16 [4096, 2048]), checksum included: bytes per second.
//!
//! What is read was just written, so it comes from the page cache; what is written is synced to disk.

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use fused_xent::dump::{Dump, Elements, FolderId, FolderWriter, LossSettings, Placement};
use half::bf16;
use std::path::Path;

const SHAPE: [usize; 2] = [4096, 2048];

fn write(root: &Path, data: &[bf16], shards: usize) {
    let id = FolderId {
        run_id: "bench".into(),
        producer: "bench".into(),
        step: 0,
        microbatch: Some(0),
        num_microbatches: 1,
        process_index: 0,
        process_count: 1,
        loss: LossSettings::default(),
    };
    let mut folder = FolderWriter::create(root, id).unwrap();
    let rows = SHAPE[0] / shards;
    for (k, part) in data.chunks(rows * SHAPE[1]).enumerate() {
        let place = Placement::shard(&SHAPE, &[k * rows, 0], &[rows, SHAPE[1]]);
        folder.tensor("hidden", Elements::Bf16(part), &place).unwrap();
    }
    folder.commit().unwrap();
}

fn dump(c: &mut Criterion) {
    let data: Vec<bf16> = (0..SHAPE[0] * SHAPE[1]).map(|i| bf16::from_bits((i * 7919) as u16)).collect();
    let mut group = c.benchmark_group("dump");
    group.throughput(Throughput::Bytes(2 * data.len() as u64)).sample_size(10);
    group.bench_function("write/1_shard", |b| {
        b.iter_batched_ref(|| tempfile::tempdir().unwrap(), |root| write(root.path(), &data, 1), BatchSize::PerIteration)
    });
    for shards in [1, 8] {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), &data, shards);
        let dump = Dump::open(root.path()).unwrap();
        let folder = &dump.runs()[0].steps[&0].microbatches[&0];
        let recorded = folder.load("hidden").unwrap().unwrap();
        let expected: Vec<f64> = data.iter().map(|x| x.to_f64()).collect();
        let same = recorded.tensor.to_f64().iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same && recorded.tensor.is_mapped() == (shards == 1));
        group.bench_function(format!("read/{shards}_shard{}", if shards == 1 { "" } else { "s" }), |b| {
            b.iter(|| folder.load("hidden").unwrap())
        });
    }
    group.finish();
}

criterion_group!(benches, dump);
criterion_main!(benches);
