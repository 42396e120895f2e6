//! Writing a dump's folders, each committed at once: payload files first, `manifest.json` last.

use super::error::{DumpError, DumpErrorKind};
use super::manifest::{FolderId, Manifest, ShardEntry, TensorEntry, check_contract};
use super::names::{ElementType, MANIFEST, ShapeRule, TENSORS, did_you_mean, payload_file, tensor_spec};
use super::npy;
use super::payload::ShardInfo;
use super::shards::{Region, elements};
use crate::files;
use fused_xent_kernels::problem::{Floats, Layout, Targets};
use half::{bf16, f16};
use serde_json::Value;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use zerocopy::IntoBytes;

/// Elements to be written, row-major.
#[derive(Clone, Copy, Debug)]
pub enum Elements<'a> {
    /// bfloat16.
    Bf16(&'a [bf16]),
    /// float16.
    F16(&'a [f16]),
    /// float32.
    F32(&'a [f32]),
    /// float64.
    F64(&'a [f64]),
    /// int32.
    I32(&'a [i32]),
    /// int64.
    I64(&'a [i64]),
    /// uint32.
    U32(&'a [u32]),
}

impl<'a> Elements<'a> {
    /// The element type.
    pub fn dtype(&self) -> ElementType {
        match self {
            Elements::Bf16(_) => ElementType::Bf16,
            Elements::F16(_) => ElementType::F16,
            Elements::F32(_) => ElementType::F32,
            Elements::F64(_) => ElementType::F64,
            Elements::I32(_) => ElementType::I32,
            Elements::I64(_) => ElementType::I64,
            Elements::U32(_) => ElementType::U32,
        }
    }

    /// The bytes in the machine's order.
    pub(crate) fn bytes(&self) -> &'a [u8] {
        match *self {
            Elements::Bf16(s) => s.as_bytes(),
            Elements::F16(s) => s.as_bytes(),
            Elements::F32(s) => s.as_bytes(),
            Elements::F64(s) => s.as_bytes(),
            Elements::I32(s) => s.as_bytes(),
            Elements::I64(s) => s.as_bytes(),
            Elements::U32(s) => s.as_bytes(),
        }
    }

    fn little_endian(&self) -> Cow<'a, [u8]> {
        if cfg!(target_endian = "little") {
            return Cow::Borrowed(self.bytes());
        }
        let mut swapped = self.bytes().to_vec();
        swapped.chunks_exact_mut(self.dtype().bytes()).for_each(<[u8]>::reverse);
        Cow::Owned(swapped)
    }
}

impl<'a> From<Floats<'a>> for Elements<'a> {
    fn from(floats: Floats<'a>) -> Self {
        match floats {
            Floats::Bf16(s) => Elements::Bf16(s),
            Floats::F16(s) => Elements::F16(s),
            Floats::F32(s) => Elements::F32(s),
        }
    }
}

impl<'a> From<Targets<'a>> for Elements<'a> {
    fn from(targets: Targets<'a>) -> Self {
        match targets {
            Targets::I32(s) => Elements::I32(s),
            Targets::I64(s) => Elements::I64(s),
            Targets::U32(s) => Elements::U32(s),
        }
    }
}

impl<'a> From<&'a [f32]> for Elements<'a> {
    fn from(s: &'a [f32]) -> Self {
        Elements::F32(s)
    }
}

/// Where the elements handed in lie in their tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Shape of the tensor over all processes.
    pub global_shape: Vec<usize>,
    /// The region that is handed in.
    pub region: Region,
    /// 0 for the tensor itself; above 0 for a copy of a region that is recorded elsewhere too.
    pub replica: usize,
    /// How an unembedding or its gradient lies in memory; [`Layout::Vd`] for all else.
    pub layout: Layout,
}

impl Placement {
    /// The whole tensor.
    pub fn whole(shape: &[usize]) -> Self {
        Self { global_shape: shape.to_vec(), region: Region::whole(shape), replica: 0, layout: Layout::Vd }
    }

    /// The region that begins at `start`, of a tensor of shape `global_shape`.
    pub fn shard(global_shape: &[usize], start: &[usize], shape: &[usize]) -> Self {
        let region = Region { start: start.to_vec(), shape: shape.to_vec() };
        Self { global_shape: global_shape.to_vec(), region, replica: 0, layout: Layout::Vd }
    }

    /// The same, as copy number `replica`.
    pub fn replica(self, replica: usize) -> Self {
        Self { replica, ..self }
    }

    /// The same, in that layout.
    pub fn layout(self, layout: Layout) -> Self {
        Self { layout, ..self }
    }
}

/// Writes one folder of a dump. What is not committed when it is dropped is an interrupted capture to every reader.
#[derive(Debug)]
pub struct FolderWriter {
    root: PathBuf,
    folder: PathBuf,
    manifest: Manifest,
    /// With verification: the BLAKE3 of the elements handed in, by file.
    digests: Option<BTreeMap<String, blake3::Hash>>,
}

impl FolderWriter {
    /// Begins the folder `id` of the dump at `root`; both are created where they do not exist. What an interrupted capture left
    /// in the folder is replaced or ignored.
    ///
    /// # Errors
    /// An `id` that makes no sense, a folder that is committed already, or a folder that cannot be created.
    pub fn create(root: &Path, id: FolderId) -> Result<Self, DumpError> {
        let root = if root == Path::new("") { Path::new(".") } else { root };
        let folder = root.join(id.relative());
        id.validate(&folder.display().to_string(), DumpErrorKind::Settings)?;
        let writer = Self {
            root: root.to_owned(),
            manifest: Manifest { id, tensors: Vec::new(), unembedding_from_shared: false, contract: None, extra: None },
            folder,
            digests: None,
        };
        writer.require_uncommitted()?;
        fs::create_dir_all(&writer.folder).map_err(|e| DumpError::write(&writer.folder, e))?;
        Ok(writer)
    }

    fn require_uncommitted(&self) -> Result<(), DumpError> {
        let manifest = self.folder.join(MANIFEST);
        match fs::symlink_metadata(&manifest) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(DumpError::read(&manifest, e)),
            Ok(_) => Err(DumpError::new(
                DumpErrorKind::Committed,
                self.folder.display(),
                "the folder is committed already",
                "a folder without a manifest.json",
                "capture to a new folder, or remove the old dump",
            )),
        }
    }

    /// From here on, keeps a digest of every array handed in; commit then reads the folder back and compares.
    pub fn verified(mut self) -> Self {
        self.digests = Some(BTreeMap::new());
        self
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.folder
    }

    /// Writes `data` as (a shard of) tensor `name`. Shards of one tensor are numbered in the order of the calls.
    ///
    /// # Errors
    /// A name, dtype, shape or length that does not fit, or a file that cannot be written.
    pub fn tensor(&mut self, name: &str, data: Elements<'_>, placement: &Placement) -> Result<(), DumpError> {
        let place = format!("{}: {name}", self.folder.display());
        let unfit = |found: String, expected: String, remedy: String| {
            Err(DumpError::new(DumpErrorKind::Data, &place, found, expected, remedy))
        };
        let Some(spec) = tensor_spec(name) else {
            let known = TENSORS.each_ref().map(|t| t.name);
            let remedy = did_you_mean(name, known, "leave it out");
            return unfit(format!("unknown tensor {name:?}"), format!("one of {}", known.join(", ")), remedy);
        };
        let Placement { global_shape, region, replica, layout } = placement;
        let (dtype, bytes) = (data.dtype(), data.little_endian());
        if elements(&region.shape).and_then(|n| n.checked_mul(dtype.bytes())) != Some(bytes.len()) {
            let found = format!("{} elements", bytes.len() / dtype.bytes());
            return unfit(found, format!("as many as shape {:?} has", region.shape), "hand in the elements of the region".into());
        }
        if *layout != Layout::Vd && spec.shape != ShapeRule::Unembedding {
            return unfit("a layout".into(), "no layout: only unembedding and its gradients have one".into(), "drop it".into());
        }
        if self.manifest.unembedding_from_shared && name == "unembedding" {
            return unfit("it is the shared one already".into(), "one unembedding".into(), "drop one of the two".into());
        }
        // A copy is extended, checked and kept only when the file is in place: a refused call leaves nothing behind.
        let mut manifest = self.manifest.clone();
        let index = manifest.tensors.iter().position(|t| t.spec == spec).unwrap_or(manifest.tensors.len());
        if index == manifest.tensors.len() {
            let global_shape = global_shape.clone();
            manifest.tensors.push(TensorEntry { spec, dtype, global_shape, layout: *layout, shards: Vec::new() });
        }
        let entry = &mut manifest.tensors[index];
        if (entry.dtype, &entry.global_shape, entry.layout) != (dtype, global_shape, *layout) {
            let found = format!("{} {global_shape:?}", dtype.name());
            let expected = format!("{} {:?}, as its first shard", entry.dtype.name(), entry.global_shape);
            return unfit(found, expected, "give every shard the same dtype, global_shape and layout".into());
        }
        let header = npy::header(dtype.descr(), &region.shape);
        let file = payload_file(name, entry.shards.len());
        let path = self.folder.join(&file);
        entry.shards.push(ShardEntry {
            file: file.clone(),
            region: region.clone(),
            replica: *replica,
            bytes: Some((header.len() + bytes.len()) as u64),
            blake3: Some(blake3::Hasher::new().update(&header).update(&bytes).finalize()),
        });
        if let Err(e) = manifest.validate(&self.folder.display().to_string()) {
            return Err(DumpError::new(DumpErrorKind::Data, e.place(), e.found(), e.expected(), e.remedy()));
        }
        write_file(&path, &[&header, &bytes])?;
        self.manifest = manifest;
        if let Some(digests) = &mut self.digests {
            digests.insert(file, blake3::hash(data.bytes()));
        }
        Ok(())
    }

    /// Lists the unembedding as the one in `shared`.
    ///
    /// # Errors
    /// This is `shared`, or the folder has an unembedding of its own.
    pub fn unembedding_from_shared(&mut self) -> Result<(), DumpError> {
        if self.manifest.id.microbatch.is_none() || self.manifest.tensors.iter().any(|t| t.spec.name == "unembedding") {
            let place = format_args!("{}: unembedding", self.folder.display());
            let found = "it cannot be taken from shared";
            let expected = "a microbatch's folder without an unembedding of its own";
            return Err(DumpError::new(DumpErrorKind::Data, place, found, expected, "drop one of the two"));
        }
        self.manifest.unembedding_from_shared = true;
        Ok(())
    }

    /// Declares how the recorded gradients were computed: an object with members `logits`, `dlogits`, `accumulate`, `d_hidden`,
    /// `d_unembedding`, each a [`Precision`](fused_xent_kernels::contract::Precision) by name.
    ///
    /// # Errors
    /// A member or a precision that nobody knows.
    pub fn contract(&mut self, contract: Value) -> Result<(), DumpError> {
        check_contract(Some(&contract), &self.folder.display().to_string())?;
        self.manifest.contract = Some(contract);
        Ok(())
    }

    /// Keeps anything under `extra`; null is nothing.
    pub fn extra(&mut self, extra: Value) {
        self.manifest.extra = Some(extra).filter(|e| !e.is_null());
    }

    /// Commits the folder: the manifest goes to its place, last. Returns the folder.
    ///
    /// # Errors
    /// An `extra` that makes the manifest too large or nests too deep, a folder that somebody else committed meanwhile, or a file that cannot be written. With
    /// [`FolderWriter::verified`], also a folder that does not read back as it was handed in; it is uncommitted again.
    pub fn commit(self) -> Result<PathBuf, DumpError> {
        self.require_uncommitted()?;
        let mut text = format!("{:#}", self.manifest.to_json());
        text.push('\n');
        let path = self.folder.join(MANIFEST);
        // What no reader would accept, such as an `extra` that nests too deep, is not committed.
        Manifest::parse(text.as_bytes(), &path.display().to_string())?;
        write_file(&path, &[text.as_bytes()])?;
        // The folders that lead to this one may be new too.
        let new = self.folder.ancestors().take_while(|path| path.starts_with(&self.root));
        new.skip(1).try_for_each(sync_folder)?;
        if let Some(digests) = &self.digests {
            self.compare(digests).map_err(|error| self.uncommit(error))?;
        }
        Ok(self.folder)
    }

    /// Reads the folder back and compares it with what was handed in.
    fn compare(&self, digests: &BTreeMap<String, blake3::Hash>) -> Result<(), DumpError> {
        let read = Manifest::read(&self.folder)?;
        let altered = |place: &Path| {
            let found = "it reads back as something else than was written";
            DumpError::new(DumpErrorKind::RoundTrip, place.display(), found, "what was handed in", "check the disk")
        };
        if read != self.manifest {
            return Err(altered(&self.folder.join(MANIFEST)));
        }
        for tensor in &read.tensors {
            for shard in &tensor.shards {
                let info = ShardInfo::new(&self.folder, read.id.process_index, shard);
                let data = info.load(tensor.spec.name, tensor.dtype)?;
                if digests.get(&shard.file) != Some(&blake3::hash(data.bytes())) {
                    return Err(altered(&info.path));
                }
            }
        }
        Ok(())
    }

    fn uncommit(&self, error: DumpError) -> DumpError {
        let state = match fs::remove_file(self.folder.join(MANIFEST)) {
            Ok(()) => "the folder is uncommitted again",
            Err(_) => "the folder stays committed: remove its manifest.json",
        };
        let (found, expected) = (error.found().to_owned(), error.expected().to_owned());
        let remedy = format!("check the disk and the memory of this machine; {state}");
        DumpError::new(DumpErrorKind::RoundTrip, error.place(), found, expected, remedy).caused_by(error)
    }
}

/// Puts `parts` into the file `path` at once, and syncs that.
fn write_file(path: &Path, parts: &[&[u8]]) -> Result<(), DumpError> {
    files::replace(path, parts).map_err(|e| DumpError::write(path, e))?;
    sync_folder(files::folder_of(path))
}

/// Makes renames within `folder` last. Only Unix can open a folder to sync it.
fn sync_folder(folder: &Path) -> Result<(), DumpError> {
    if cfg!(unix) {
        File::open(folder).and_then(|f| f.sync_all()).map_err(|e| DumpError::write(folder, e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dump::LossSettings;

    fn writer(root: &Path) -> FolderWriter {
        let id = FolderId {
            run_id: "run".into(),
            producer: "test".into(),
            step: 0,
            microbatch: None,
            num_microbatches: 1,
            process_index: 0,
            process_count: 1,
            loss: LossSettings::default(),
        };
        let mut writer = FolderWriter::create(root, id).unwrap().verified();
        writer.tensor("unembedding", Elements::F32(&[1.0; 6]), &Placement::whole(&[3, 2])).unwrap();
        writer
    }

    #[test]
    fn elements_that_read_back_as_others_are_uncommitted() {
        for digest in [None, Some(blake3::hash(Elements::F32(&[1.0, 1.0, 1.0, 1.0, 1.0, -1.0]).bytes()))] {
            let root = tempfile::tempdir().unwrap();
            let mut writer = writer(root.path());
            let manifest = writer.path().join(MANIFEST);
            let altered = digest.is_some();
            writer.digests.as_mut().unwrap().extend(digest.map(|d| ("unembedding.0.npy".to_owned(), d)));
            let committed = writer.commit();
            assert_eq!((committed.is_err(), manifest.exists()), (altered, !altered));
            if let Err(error) = committed {
                assert_eq!(error.kind(), DumpErrorKind::RoundTrip);
                assert!(error.place().ends_with("unembedding.0.npy"), "{error}");
            }
        }
    }

    #[test]
    fn a_manifest_that_reads_back_as_another_is_noticed() {
        let root = tempfile::tempdir().unwrap();
        let (mut one, other) = (writer(root.path()), writer(root.path()));
        one.extra("mine".into());
        one.commit().unwrap();
        let error = other.compare(other.digests.as_ref().unwrap()).unwrap_err();
        assert_eq!(error.kind(), DumpErrorKind::RoundTrip);
        assert!(error.place().ends_with(MANIFEST), "{error}");
    }

    #[test]
    fn a_manifest_that_no_reader_would_accept_is_not_committed() {
        let root = tempfile::tempdir().unwrap();
        let mut writer = writer(root.path());
        let manifest = writer.path().join(MANIFEST);
        writer.extra((0..200).fold(Value::Null, |inner, _| Value::from(vec![inner])));
        assert_eq!(writer.commit().unwrap_err().kind(), DumpErrorKind::Json);
        assert!(!manifest.exists());
    }
}
