//! Checking a whole dump: every manifest, every file, every copy, and all that is wrong rather than the first of it.

use super::error::DumpError;
use super::folder::{Folder, TensorInfo};
use super::microbatch::LoadedMicrobatch;
use super::read::{Incomplete, Scan, Step};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What [`verify`] found. The dump is sound if `problems` is empty.
#[derive(Debug)]
pub struct VerifyReport {
    /// Committed folders with a readable manifest.
    pub folders: usize,
    /// Payload files that they list.
    pub files: usize,
    /// Bytes of the elements in those files.
    pub bytes: u64,
    /// Folders without a manifest, relative to the dump, `/`-separated.
    pub interrupted: Vec<PathBuf>,
    /// Folders that lack the shards of some process, with the run that they belong to.
    pub incomplete: Vec<(String, Incomplete)>,
    /// Everything that is wrong.
    pub problems: Vec<DumpError>,
    /// Recorded outputs of which copies differ: worth a look, and no damage.
    pub differing_copies: Vec<String>,
    /// What should be told once.
    pub warnings: Vec<String>,
}

/// Reads and checks everything in the dump at `path`. `progress` is told the bytes done and in all, file by file.
///
/// # Errors
/// Only if there is no dump to check; what is wrong with the dump is in the report.
pub fn verify(path: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<VerifyReport, DumpError> {
    let mut problems = Vec::new();
    let Scan { dump, folders, interrupted } = Scan::of(path, &mut problems)?;
    let steps = || dump.runs().iter().flat_map(|run| run.steps.values());
    let tensors = || steps().flat_map(folders_of).flat_map(|folder| folder.tensors());
    let total = tensors().flat_map(|t| t.shards.iter().map(|s| shard_bytes(t, &s.region.shape))).fold(0, u64::saturating_add);
    let files = tensors().map(|t| t.shards.len()).sum();
    let mut differing_copies = Vec::new();
    let mut done = 0;
    progress(done, total);
    for step in steps() {
        let mut shared_unembedding = None;
        for folder in folders_of(step) {
            let mut inputs = BTreeMap::new();
            for tensor in folder.tensors() {
                let mut parts = Vec::new();
                for shard in &tensor.shards {
                    match shard.load(&tensor.name, tensor.dtype) {
                        Ok(part) => parts.push(part),
                        Err(e) => problems.push(e),
                    }
                    done = shard_bytes(tensor, &shard.region.shape).saturating_add(done);
                    progress(done, total);
                }
                if parts.len() < tensor.shards.len() || tensor.hole.is_some() {
                    continue;
                }
                match folder.assemble(tensor, parts) {
                    Ok(recorded) => {
                        differing_copies.extend(recorded.copies.iter().map(|c| {
                            let (process, replica) = (c.process, c.replica);
                            format!("{}: {}: process {process}, replica {replica}, {}", folder.place(), tensor.name, c.region)
                        }));
                        if tensor.input {
                            inputs.insert(tensor.name.as_str(), recorded.tensor);
                        }
                    }
                    Err(e) => problems.push(e),
                }
            }
            let own_unembedding = inputs.remove("unembedding").map(Arc::new);
            let (hidden, targets, weights) = (inputs.remove("hidden"), inputs.remove("targets"), inputs.remove("token_weights"));
            if let (Some(k), Some(hidden), Some(targets)) =
                (own_unembedding.as_ref().or(shared_unembedding.as_ref()), hidden, targets)
            {
                let loaded = LoadedMicrobatch::new(folder.place(), step.loss.options, hidden, k.clone(), targets, weights);
                problems.extend(loaded.and_then(|loaded| loaded.problem().map(|_| ())).err());
            }
            if std::ptr::eq(folder, &step.shared) {
                shared_unembedding = own_unembedding;
            }
        }
    }
    let incomplete = dump.runs().iter().flat_map(|run| {
        let incomplete = run.steps.values().flat_map(|step| step.incomplete.iter().cloned());
        incomplete.map(|i| (run.run_id.clone(), i))
    });
    Ok(VerifyReport {
        folders,
        files,
        bytes: total,
        interrupted,
        incomplete: incomplete.collect(),
        problems,
        differing_copies,
        warnings: dump.warnings().to_vec(),
    })
}

fn folders_of(step: &Step) -> impl Iterator<Item = &Folder> {
    std::iter::once(&step.shared).chain(step.microbatches.values()).chain(&step.torn)
}

/// Bytes of the elements of a shard of that shape; the reader checked that a tensor that holds it fits in memory's addresses.
fn shard_bytes(tensor: &TensorInfo, shape: &[usize]) -> u64 {
    shape.iter().map(|&n| n as u64).product::<u64>() * tensor.dtype.bytes() as u64
}
