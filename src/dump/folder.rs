//! One logical folder, `shared` or `mb_*`, merged over all processes: which tensors it holds, and their elements.

use super::error::{DumpError, DumpErrorKind};
use super::manifest::{Manifest, TensorEntry, check_shapes, check_shard_count, layout_name};
use super::names::{ElementType, TENSORS, TensorSpec};
use super::payload::ShardInfo;
use super::shards::{Region, elements, find_hole, find_overlap, for_each_run, multi_index};
use super::tensor::{Buffer, Data, Recorded, ReplicaCopy, Tensor};
use fused_xent_kernels::problem::Layout;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// What the manifests say of one tensor, over all processes.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: ElementType,
    /// Its shape, over all processes.
    pub global_shape: Vec<usize>,
    /// How an unembedding or its gradient lies in memory.
    pub layout: Layout,
    /// Size of its elements in bytes, copies not counted.
    pub bytes: u64,
    /// Its shards and copies, by process.
    pub shards: Vec<ShardInfo>,
    /// A region that no shard covers, since a process has not committed its folder.
    pub hole: Option<Region>,
    /// Whether it is an input of the computation; else the training run recorded it.
    pub input: bool,
}

/// A manifest and where it lies.
pub(crate) struct Committed {
    pub manifest: Manifest,
    pub folder: PathBuf,
}

/// One logical folder, merged over all processes.
#[derive(Clone, Debug)]
pub struct Folder {
    place: String,
    tensors: Vec<TensorInfo>,
    process_count: usize,
    present: Vec<usize>,
    contract: Option<Value>,
    extra: Vec<(usize, Value)>,
}

impl Folder {
    /// Merges what the processes committed of folder `part` (`step_00000000/mb_0000`) of the dump at `root`.
    pub(crate) fn merge(
        root: &Path,
        part: &str,
        process_count: usize,
        committed: &[Committed],
        problems: &mut Vec<DumpError>,
    ) -> Self {
        let place = root.join("proc_*").join(part).display().to_string();
        let present: Vec<usize> = committed.iter().map(|c| c.manifest.id.process_index).collect();
        let mut folder = Self { place, tensors: Vec::new(), process_count, present, contract: None, extra: Vec::new() };
        for spec in &TENSORS {
            match folder.merge_tensor(spec, committed) {
                Ok(info) => folder.tensors.extend(info),
                Err(e) => problems.push(e),
            }
        }
        let shapes = folder.tensors.iter().filter_map(|t| Some((super::names::tensor_spec(&t.name)?, t)));
        let shapes = shapes.map(|(spec, t)| (spec, t.global_shape.as_slice(), t.layout));
        problems.extend(check_shapes(shapes, &folder.place).err());
        for c in committed {
            let id = &c.manifest.id;
            folder.extra.extend(c.manifest.extra.clone().map(|extra| (id.process_index, extra)));
            match (&folder.contract, &c.manifest.contract) {
                (Some(first), Some(own)) if first != own => problems.push(DumpError::new(
                    DumpErrorKind::Disagreement,
                    format_args!("{}: contract", c.folder.display()),
                    own.to_string(),
                    format!("{first}, as another process says"),
                    "every process must declare the same contract",
                )),
                (None, Some(own)) => folder.contract = Some(own.clone()),
                _ => {}
            }
        }
        folder
    }

    fn merge_tensor(&self, spec: &TensorSpec, committed: &[Committed]) -> Result<Option<TensorInfo>, DumpError> {
        let mut first: Option<(&TensorEntry, &Committed)> = None;
        let mut shards = Vec::new();
        for c in committed {
            let Some(entry) = c.manifest.tensors.iter().find(|t| t.spec == spec) else { continue };
            let (model, from) = *first.get_or_insert((entry, c));
            let described = |t: &TensorEntry| format!("{} {:?} {}", t.dtype.name(), t.global_shape, layout_name(t.layout));
            if described(entry) != described(model) {
                return Err(DumpError::new(
                    DumpErrorKind::Disagreement,
                    format_args!("{}: {}", c.folder.display(), spec.name),
                    described(entry),
                    format!("{}, as {} says", described(model), from.folder.display()),
                    "every process must give the same dtype, global_shape and layout",
                ));
            }
            let process = c.manifest.id.process_index;
            shards.extend(entry.shards.iter().map(|s| ShardInfo::new(&c.folder, process, s)));
        }
        let Some((entry, _)) = first else { return Ok(None) };
        let place = format!("{}: {}", self.place, spec.name);
        check_shard_count(shards.len(), &place)?;
        let originals: Vec<&ShardInfo> = shards.iter().filter(|s| s.replica == 0).collect();
        let regions: Vec<Region> = originals.iter().map(|s| s.region.clone()).collect();
        if let Some((i, j, shared)) = find_overlap(&regions) {
            return Err(DumpError::new(
                DumpErrorKind::Overlap,
                place,
                format!("{} and {} both cover {shared}", originals[i].path.display(), originals[j].path.display()),
                "every element in exactly one shard of replica 0",
                "give copies a replica number above 0",
            ));
        }
        let hole = find_hole(&entry.global_shape, &regions);
        if let Some(hole) = hole.as_ref().filter(|_| self.absent().next().is_none()) {
            return Err(DumpError::new(
                DumpErrorKind::Hole,
                place,
                format!("no shard of replica 0 covers {hole}"),
                format!("shards that tile {:?}", entry.global_shape),
                "record the missing shard, or leave the tensor out on every process",
            ));
        }
        Ok(Some(TensorInfo {
            name: spec.name.to_owned(),
            dtype: entry.dtype,
            global_shape: entry.global_shape.clone(),
            layout: entry.layout,
            bytes: elements(&entry.global_shape).unwrap_or(0) as u64 * entry.dtype.bytes() as u64,
            shards,
            hole,
            input: spec.input,
        }))
    }

    /// Where it lies, for messages: the folder of all processes.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// The tensors recorded here, inputs first.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.iter()
    }

    /// The tensor of that name, if it was recorded here.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.iter().find(|t| t.name == name)
    }

    /// Processes of the run that have not committed this folder.
    pub fn absent(&self) -> impl Iterator<Item = usize> {
        (0..self.process_count).filter(|p| self.present.binary_search(p).is_err())
    }

    /// How the recorded gradients were computed, where a manifest declares it: members `logits`, `dlogits`, `accumulate`,
    /// `d_hidden`, `d_unembedding`, each a [`Precision`](fused_xent_kernels::contract::Precision) by name.
    pub fn contract(&self) -> Option<&Value> {
        self.contract.as_ref()
    }

    /// What the processes' manifests keep under `extra`, with the process.
    pub fn extra(&self) -> impl Iterator<Item = (usize, &Value)> {
        self.extra.iter().map(|(process, value)| (*process, value))
    }

    /// Why this folder is not whole, if it is not: the tensors that lack shards, and the processes that owe them.
    pub fn incomplete(&self) -> Option<String> {
        let torn: Vec<_> = self.tensors.iter().filter_map(|t| Some(format!("{} lacks {}", t.name, t.hole.as_ref()?))).collect();
        if !torn.is_empty() {
            return Some(format!("{}; {}", torn.join(", "), self.absence()));
        }
        (self.tensors.is_empty() && self.present.len() < self.process_count).then(|| self.absence())
    }

    /// `not committed on processes 1, 3`.
    fn absence(&self) -> String {
        let count = self.process_count.saturating_sub(self.present.len());
        if count == self.process_count {
            return "not committed on any process".to_owned();
        }
        let shown: Vec<String> = self.absent().take(8).map(|p| p.to_string()).collect();
        let more = if count > 8 { format!(" and {} more", count - 8) } else { String::new() };
        let plural = if count == 1 { "" } else { "es" };
        format!("not committed on process{plural} {}{more}", shown.join(", "))
    }

    /// Reads, checks and assembles a tensor; `None` if it was not recorded here.
    ///
    /// # Errors
    /// A damaged or missing file, copies of an input that differ, or shards that a process has not committed.
    pub fn load(&self, name: &str) -> Result<Option<Recorded>, DumpError> {
        let Some(info) = self.info(name) else { return Ok(None) };
        let parts = info.shards.iter().map(|s| s.load(name, info.dtype)).collect::<Result<Vec<_>, _>>()?;
        self.assemble(info, parts).map(Some)
    }

    /// As [`Folder::load`], for a tensor that is needed.
    pub(crate) fn require(&self, name: &str) -> Result<Recorded, DumpError> {
        self.load(name)?.ok_or_else(|| {
            let found = if self.tensors.is_empty() { self.absence() } else { "it was not recorded".to_owned() };
            DumpError::new(
                DumpErrorKind::Missing,
                format_args!("{}: {name}", self.place),
                found,
                format!("{name}, which the computation needs"),
                "capture the step again with it",
            )
        })
    }

    /// The tensor from the elements of its shards, `parts`.
    pub(crate) fn assemble(&self, info: &TensorInfo, parts: Vec<Data>) -> Result<Recorded, DumpError> {
        let place = || format!("{}: {}", self.place, info.name);
        if let Some(hole) = &info.hole {
            let found = format!("no shard covers {hole}; {}", self.absence());
            let expected = format!("shards that tile {:?}", info.global_shape);
            let remedy = "copy the folders of those processes, or leave this one out";
            return Err(DumpError::new(DumpErrorKind::Incomplete, place(), found, expected, remedy));
        }
        let whole = Region::whole(&info.global_shape);
        let (mut originals, mut others) = (Vec::new(), Vec::new());
        for (shard, part) in info.shards.iter().zip(parts) {
            if shard.replica == 0 { originals.push((shard, part)) } else { others.push((shard, part)) }
        }
        let width = info.dtype.bytes();
        let single = originals.iter().position(|(shard, _)| shard.region == whole);
        let data = match single {
            Some(i) => originals.swap_remove(i).1,
            None => {
                let mut buffer = Buffer::zeroed(info.bytes as usize).ok_or_else(|| {
                    let found = format!("{} bytes do not fit in memory", info.bytes);
                    let remedy = "use a machine with more memory";
                    DumpError::new(DumpErrorKind::TooLarge, place(), found, "a tensor that fits", remedy)
                })?;
                let to = buffer.bytes_mut();
                for (shard, part) in &originals {
                    let from = part.bytes();
                    for_each_run(&info.global_shape, &shard.region, |at, first, run| {
                        to[at * width..][..run * width].copy_from_slice(&from[first * width..][..run * width]);
                        None::<()>
                    });
                }
                Data::Owned(buffer)
            }
        };
        let tensor = Tensor::new(info.dtype, info.global_shape.clone(), info.layout, data);
        let mut copies = Vec::new();
        for (shard, part) in others {
            let Some(at) = first_difference(&tensor, &shard.region, part.bytes()) else { continue };
            let data = Tensor::new(info.dtype, shard.region.shape.clone(), info.layout, part);
            if info.input {
                let index = multi_index(&info.global_shape, at);
                return Err(shard.error(
                    DumpErrorKind::Replica,
                    &info.name,
                    format!("this copy (replica {}) differs from the first at {index:?}", shard.replica),
                    format!(
                        "what {} holds, bit for bit",
                        owner(info, &index).map_or("the first".into(), |p| p.display().to_string())
                    ),
                    "copies of an input must agree: the processes did not run the same step, or one file is damaged",
                ));
            }
            copies.push(ReplicaCopy { process: shard.process, replica: shard.replica, region: shard.region.clone(), data });
        }
        Ok(Recorded { tensor, copies })
    }
}

/// The file of replica 0 that holds the element at `index`.
fn owner<'a>(info: &'a TensorInfo, index: &[usize]) -> Option<&'a Path> {
    let holds = |r: &Region| (0..index.len()).all(|d| (r.start[d]..r.start[d] + r.shape[d]).contains(&index[d]));
    info.shards.iter().find(|s| s.replica == 0 && holds(&s.region)).map(|s| s.path.as_path())
}

/// The first element of `tensor`, row-major, that is another one bitwise in `copy`, the elements of `region`.
fn first_difference(tensor: &Tensor, region: &Region, copy: &[u8]) -> Option<usize> {
    let (whole, width) = (tensor.bytes(), tensor.dtype().bytes());
    for_each_run(tensor.shape(), region, |at, first, run| {
        let (a, b) = (&whole[at * width..][..run * width], &copy[first * width..][..run * width]);
        if a == b {
            return None;
        }
        a.chunks_exact(width).zip(b.chunks_exact(width)).position(|(a, b)| a != b).map(|i| at + i)
    })
}
