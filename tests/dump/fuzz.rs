//! Whatever happens to the bytes of a dump, reading it ends in a value or an error; with checksums, never in another value.

use crate::support::{files, fresh};
use fused_xent::dump::*;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::LazyLock;

type Tensors = BTreeMap<(u64, Option<usize>, String), (ElementType, Vec<usize>, Vec<u64>)>;

/// Every tensor that can be loaded, by step, microbatch and name: dtype, shape and values as bits.
fn tensors(root: &Path) -> Tensors {
    let mut found = BTreeMap::new();
    let Ok(dump) = Dump::open(root) else { return found };
    for (number, step) in dump.runs().iter().flat_map(|run| &run.steps) {
        let folders = step.microbatches.iter().map(|(m, folder)| (Some(*m), folder));
        for (m, folder) in folders.chain([(None, &step.shared)]) {
            for info in folder.tensors() {
                if let Ok(Some(Recorded { tensor, .. })) = folder.load(&info.name) {
                    let bits = tensor.to_f64().iter().map(|x| x.to_bits()).collect();
                    found.insert((*number, m, info.name.clone()), (tensor.dtype(), tensor.shape().to_vec(), bits));
                }
            }
            if let Some(Ok(loaded)) = m.map(|m| step.problem(m)) {
                _ = loaded.problem();
            }
        }
    }
    found
}

static SOUND: LazyLock<Tensors> = LazyLock::new(|| tensors(fresh().path()));

#[derive(Clone, Debug)]
enum Damage {
    Set(usize, u8),
    Flip(usize, u8),
    Cut(usize),
    Insert(usize, Vec<u8>),
    Remove(usize, usize),
}

impl Damage {
    fn to(&self, bytes: &mut Vec<u8>) {
        let n = bytes.len();
        match self {
            Damage::Set(at, byte) => bytes[at % n] = *byte,
            Damage::Flip(at, bit) => bytes[at % n] ^= 1 << (bit % 8),
            Damage::Cut(at) => bytes.truncate(at % n),
            Damage::Insert(at, more) => _ = bytes.splice(at % n..at % n, more.iter().copied()),
            Damage::Remove(at, count) => _ = bytes.drain(at % n..(at % n + count % 9).min(n)),
        }
    }
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = any::<usize>;
    // Bytes that mean something to JSON, and any.
    let byte = || prop_oneof![proptest::sample::select(b"0123456789\"{}[]:,.-e\\tfn/ ".to_vec()), any::<u8>()];
    prop_oneof![
        (at(), byte()).prop_map(|(at, b)| Damage::Set(at, b)),
        (at(), any::<u8>()).prop_map(|(at, b)| Damage::Flip(at, b)),
        at().prop_map(Damage::Cut),
        (at(), proptest::collection::vec(byte(), 1..5)).prop_map(|(at, b)| Damage::Insert(at, b)),
        (at(), at()).prop_map(|(at, n)| Damage::Remove(at, n)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_payloads_are_errors(which in any::<usize>(), damage in damage()) {
        let folder = fresh();
        let payloads: Vec<_> = files(folder.path()).into_iter().filter(|f| f.extension().is_some_and(|e| e == "npy")).collect();
        let path = &payloads[which % payloads.len()];
        let mut bytes = fs::read(path).unwrap();
        let before = bytes.clone();
        damage.to(&mut bytes);
        fs::write(path, &bytes).unwrap();
        let read = tensors(folder.path());
        prop_assert!(read.iter().all(|(key, value)| SOUND.get(key) == Some(value)));
        prop_assert_eq!(read.len() < SOUND.len(), bytes != before);
        let report = verify(folder.path(), &mut |_, _| {}).unwrap();
        prop_assert_eq!(report.problems.is_empty(), bytes == before);
    }

    /// A manifest is not covered by a checksum: the loss that it describes may change, but no tensor does.
    #[test]
    fn damaged_manifests_change_no_values(which in any::<usize>(), damages in proptest::collection::vec(damage(), 1..3)) {
        let folder = fresh();
        let manifests: Vec<_> = files(folder.path()).into_iter().filter(|f| f.ends_with("manifest.json")).collect();
        let path = &manifests[which % manifests.len()];
        let mut bytes = fs::read(path).unwrap();
        for damage in damages {
            if !bytes.is_empty() {
                damage.to(&mut bytes);
            }
        }
        fs::write(path, &bytes).unwrap();
        _ = verify(folder.path(), &mut |_, _| {});
        let read = tensors(folder.path());
        prop_assert!(read.iter().all(|(key, value)| SOUND.get(key) == Some(value)));
    }
}
