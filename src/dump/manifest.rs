//! `manifest.json`: what one process says of one folder. Read totally, checked for sense, written back the same.

use super::error::{DumpError, DumpErrorKind};
use super::json::{self, LABEL, Members, is_label};
use super::names::{self, ElementType, MANIFEST, ShapeRule, TENSORS, TensorSpec, did_you_mean, tensor_spec};
use super::settings::LossSettings;
use super::shards::{Region, elements};
use fused_xent_kernels::contract::Precision;
use fused_xent_kernels::problem::Layout;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// A manifest larger than this is refused.
const MAX_BYTES: u64 = 64 << 20;
/// A tensor has at most this many dimensions.
const MAX_DIMENSIONS: usize = 8;
/// A run has at most this many processes, a step this many microbatches.
const MAX_COUNT: usize = 1 << 16;
/// A tensor has at most this many shards, over all processes.
const MAX_SHARDS: usize = 1 << 14;

const FORMAT: &str = "xent-dump";
const VERSION: u64 = 1;

/// Which folder of which run: what a manifest says before it lists tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct FolderId {
    /// Names the run; the same on every process, another one in another run.
    pub run_id: String,
    /// What wrote the dump, with its version.
    pub producer: String,
    /// The training step.
    pub step: u64,
    /// The microbatch; `None` for `shared`.
    pub microbatch: Option<usize>,
    /// Microbatches of the step.
    pub num_microbatches: usize,
    /// This process.
    pub process_index: usize,
    /// Processes of the run.
    pub process_count: usize,
    /// The loss.
    pub loss: LossSettings,
}

impl FolderId {
    /// Its place in a dump, `/`-separated.
    pub(crate) fn relative(&self) -> String {
        let process = names::process_folder(self.process_index);
        format!("{process}/{}/{}", names::step_folder(self.step), names::part_folder(self.microbatch))
    }

    /// Whether that folder of the dump at `root` has its manifest.
    pub(crate) fn is_committed(&self, root: &Path) -> bool {
        root.join(self.relative()).join(MANIFEST).exists()
    }

    pub(crate) fn validate(&self, place: &str, kind: DumpErrorKind) -> Result<(), DumpError> {
        let wrong = |member: &str, found: String, expected: String| {
            Err(DumpError::new(kind, format_args!("{place}: {member}"), found, expected, "correct it"))
        };
        for (member, text) in [("run_id", &self.run_id), ("producer", &self.producer)] {
            if !is_label(text) {
                return wrong(member, format!("it is {text:?}"), LABEL.to_owned());
            }
        }
        for (member, count) in [("process_count", self.process_count), ("num_microbatches", self.num_microbatches)] {
            if !(1..=MAX_COUNT).contains(&count) {
                return wrong(member, format!("it is {count}"), format!("1 to {MAX_COUNT}"));
            }
        }
        if self.process_index >= self.process_count {
            let expected = format!("less than process_count = {}", self.process_count);
            return wrong("process_index", format!("it is {}", self.process_index), expected);
        }
        if let Some(m) = self.microbatch.filter(|&m| m >= self.num_microbatches) {
            let expected = format!("less than num_microbatches = {}", self.num_microbatches);
            return wrong("microbatch", format!("it is {m}"), expected);
        }
        self.loss.validate(&format!("{place}: loss"), kind)
    }
}

/// One file of a tensor.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ShardEntry {
    pub file: String,
    pub region: Region,
    pub replica: usize,
    pub bytes: Option<u64>,
    pub blake3: Option<blake3::Hash>,
}

/// A tensor whose elements lie in this folder.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TensorEntry {
    pub spec: &'static TensorSpec,
    pub dtype: ElementType,
    pub global_shape: Vec<usize>,
    pub layout: Layout,
    pub shards: Vec<ShardEntry>,
}

impl PartialEq for TensorSpec {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

/// A whole manifest.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Manifest {
    pub id: FolderId,
    pub tensors: Vec<TensorEntry>,
    /// `unembedding` is listed as the shared one.
    pub unembedding_from_shared: bool,
    pub contract: Option<Value>,
    pub extra: Option<Value>,
}

impl Manifest {
    /// Reads and checks the manifest of `folder`.
    pub fn read(folder: &Path) -> Result<Self, DumpError> {
        let path = folder.join(MANIFEST);
        let place = path.display().to_string();
        let file = File::open(&path).map_err(|e| DumpError::read(&path, e))?;
        let mut text = Vec::new();
        file.take(MAX_BYTES + 1).read_to_end(&mut text).map_err(|e| DumpError::read(&path, e))?;
        Self::parse(&text, &place)
    }

    /// Parses and checks the text of a manifest.
    pub fn parse(text: &[u8], place: &str) -> Result<Self, DumpError> {
        if text.len() as u64 > MAX_BYTES {
            let found = format!("the manifest is larger than {MAX_BYTES} bytes");
            let remedy = "no honest manifest is that large; write the folder again";
            return Err(DumpError::new(DumpErrorKind::TooLarge, place, found, format!("at most {MAX_BYTES} bytes"), remedy));
        }
        let manifest = Self::from_json(&json::parse(text, place)?, place)?;
        manifest.validate(place)?;
        Ok(manifest)
    }

    fn from_json(value: &Value, place: &str) -> Result<Self, DumpError> {
        // The version comes first: another version may have other members.
        let version = (value.get("format").and_then(Value::as_str), value.get("version").and_then(Value::as_u64));
        if value.is_object() && version != (Some(FORMAT), Some(VERSION)) {
            let shown = |name| value.get(name).map_or_else(|| "missing".to_owned(), Value::to_string);
            return Err(DumpError::new(
                DumpErrorKind::Version,
                place,
                format!("format is {}, version is {}", shown("format"), shown("version")),
                format!("format \"{FORMAT}\", version {VERSION}"),
                "read it with the program that wrote it, or convert it",
            ));
        }
        const KNOWN: [&str; 13] = [
            "format",
            "version",
            "run_id",
            "producer",
            "step",
            "microbatch",
            "num_microbatches",
            "process_index",
            "process_count",
            "loss",
            "tensors",
            "contract",
            "extra",
        ];
        let members = Members::new(value, place, &KNOWN)?;
        let step = members.required("step", "a whole number")?;
        let id = FolderId {
            run_id: members.label("run_id")?,
            producer: members.label("producer")?,
            step: step.as_u64().ok_or_else(|| members.wrong("step", "a whole number, 0 or above"))?,
            microbatch: members.nullable("microbatch").map(|v| members.count("microbatch", v)).transpose()?,
            num_microbatches: members.required_count("num_microbatches")?,
            process_index: members.required_count("process_index")?,
            process_count: members.required_count("process_count")?,
            loss: LossSettings::from_json(members.required("loss", "an object")?, &format!("{place}: loss"))?,
        };
        let mut manifest = Self {
            id,
            tensors: Vec::new(),
            unembedding_from_shared: false,
            contract: members.nullable("contract").cloned(),
            extra: members.nullable("extra").cloned(),
        };
        for (i, entry) in members.array("tensors")?.iter().enumerate() {
            manifest.add_entry(entry, &format!("{place}: tensors[{i}]"))?;
        }
        Ok(manifest)
    }

    fn add_entry(&mut self, entry: &Value, place: &str) -> Result<(), DumpError> {
        let members = Members::new(entry, place, &["name", "dtype", "global_shape", "layout", "shards", "from"])?;
        let name = members.text("name")?;
        let Some(spec) = tensor_spec(name) else {
            return Err(DumpError::new(
                DumpErrorKind::TensorName,
                place,
                format!("unknown tensor {name:?}"),
                format!("one of {}", TENSORS.each_ref().map(|t| t.name).join(", ")),
                did_you_mean(name, TENSORS.iter().map(|t| t.name), "leave it out"),
            ));
        };
        let listed = self.tensors.iter().any(|t| t.spec == spec) || (self.unembedding_from_shared && name == "unembedding");
        if listed {
            let remedy = "list it once, with all its shards";
            return Err(DumpError::new(DumpErrorKind::Duplicate, place, format!("{name} is listed twice"), "one entry", remedy));
        }
        if members.get("from").is_some() {
            if name != "unembedding" || self.id.microbatch.is_none() || members.text("from")? != "shared" {
                return Err(members.wrong("from", "\"shared\", in an entry of unembedding in a microbatch's folder"));
            }
            Members::new(entry, place, &["name", "from"])?;
            self.unembedding_from_shared = true;
            return Ok(());
        }
        let dtype_name = members.text("dtype")?;
        let Some(dtype) = ElementType::from_name(dtype_name) else {
            let known = ElementType::ALL.map(ElementType::name);
            return Err(DumpError::new(
                DumpErrorKind::Dtype,
                place,
                format!("unknown dtype {dtype_name:?}"),
                format!("one of {}", known.join(", ")),
                did_you_mean(dtype_name, known, "store the tensor as one of these"),
            ));
        };
        if members.get("layout").is_some() && spec.shape != ShapeRule::Unembedding {
            return Err(members.wrong("layout", "no layout: only unembedding and its gradients have one"));
        }
        let layout = members.word("layout", &[("vd", Layout::Vd), ("dv", Layout::Dv)])?.unwrap_or_default();
        let shards = members.array("shards")?.iter().enumerate();
        let shards = shards.map(|(i, s)| shard_entry(s, &format!("{place}.shards[{i}]"))).collect::<Result<_, _>>()?;
        self.tensors.push(TensorEntry { spec, dtype, global_shape: members.counts("global_shape")?, layout, shards });
        Ok(())
    }

    /// Everything that one manifest alone can be checked for.
    pub fn validate(&self, place: &str) -> Result<(), DumpError> {
        self.id.validate(place, DumpErrorKind::Value)?;
        check_contract(self.contract.as_ref(), place)?;
        let mut files = BTreeMap::new();
        for tensor in &self.tensors {
            let place = format!("{place}: {}", tensor.spec.name);
            tensor.validate(self.id.microbatch.is_none(), &place)?;
            for shard in &tensor.shards {
                if files.insert(&shard.file, tensor.spec.name).is_some() {
                    let found = format!("{:?} is listed twice", shard.file);
                    return Err(DumpError::new(DumpErrorKind::Duplicate, place, found, "a file per shard", "list it once"));
                }
            }
        }
        check_shapes(self.tensors.iter().map(|t| (t.spec, t.global_shape.as_slice(), t.layout)), place)
    }

    pub fn to_json(&self) -> Value {
        let id = &self.id;
        let mut tensors: Vec<Value> = self.tensors.iter().map(TensorEntry::to_json).collect();
        if self.unembedding_from_shared {
            tensors.push(json!({ "name": "unembedding", "from": "shared" }));
        }
        let mut value = json!({
            "format": FORMAT, "version": VERSION,
            "run_id": id.run_id, "producer": id.producer,
            "step": id.step, "microbatch": id.microbatch, "num_microbatches": id.num_microbatches,
            "process_index": id.process_index, "process_count": id.process_count,
            "loss": id.loss.to_json(),
            "tensors": tensors,
        });
        for (name, optional) in [("contract", &self.contract), ("extra", &self.extra)] {
            if let Some(content) = optional {
                value[name] = content.clone();
            }
        }
        value
    }
}

impl TensorEntry {
    fn validate(&self, in_shared: bool, place: &str) -> Result<(), DumpError> {
        let Self { spec, dtype, global_shape, shards, .. } = self;
        if in_shared && !spec.in_shared {
            let found = "it lies in shared";
            let remedy = "write it to the folder of its microbatch";
            return Err(DumpError::new(DumpErrorKind::TensorName, place, found, "a microbatch's folder", remedy));
        }
        if !spec.dtypes.contains(dtype) {
            let accepted: Vec<_> = spec.dtypes.iter().map(|t| t.name()).collect();
            return Err(DumpError::new(
                DumpErrorKind::Dtype,
                place,
                format!("dtype {}", dtype.name()),
                accepted.join(" or "),
                "store it in the dtype that the computation used",
            ));
        }
        let dimensions = match spec.shape {
            ShapeRule::Hidden => 2..=3,
            ShapeRule::Unembedding => 2..=2,
            ShapeRule::Tokens => 1..=2,
        };
        if global_shape.len() > MAX_DIMENSIONS || !dimensions.contains(&global_shape.len()) {
            let found = format!("{} dimensions", global_shape.len());
            let expected = match spec.shape {
                ShapeRule::Hidden => "[tokens, D] or [batch, sequence, D]",
                ShapeRule::Unembedding => "[V, D], or [D, V] with \"layout\": \"dv\"",
                ShapeRule::Tokens => "[tokens] or [batch, sequence]",
            };
            return Err(DumpError::new(DumpErrorKind::Shape, place, found, expected, "reshape it"));
        }
        let bytes = elements(global_shape).and_then(|n| n.checked_mul(dtype.bytes())).filter(|&n| n <= isize::MAX as usize);
        if bytes.is_none() {
            let found = format!("global_shape {global_shape:?}");
            let expected = "a size that memory can address";
            return Err(DumpError::new(DumpErrorKind::TooLarge, place, found, expected, "correct the shape"));
        }
        check_shard_count(shards.len(), place)?;
        for shard in shards {
            let place = format_args!("{place}: {:?}", shard.file);
            if !is_plain_file_name(&shard.file) {
                return Err(DumpError::new(
                    DumpErrorKind::FileName,
                    place,
                    "it is no plain file name",
                    "the name of a .npy file in the manifest's own folder, of letters, digits, '.', '_' and '-'",
                    "move the file into the folder",
                ));
            }
            if !shard.region.lies_in(global_shape) {
                return Err(DumpError::new(
                    DumpErrorKind::Shape,
                    place,
                    format!("start {:?} and shape {:?}", shard.region.start, shard.region.shape),
                    format!("a region of global_shape {global_shape:?}"),
                    "correct start and shape",
                ));
            }
        }
        Ok(())
    }

    fn to_json(&self) -> Value {
        let mut value = Map::new();
        value.insert("name".into(), json!(self.spec.name));
        value.insert("dtype".into(), json!(self.dtype.name()));
        value.insert("global_shape".into(), json!(self.global_shape));
        if self.spec.shape == ShapeRule::Unembedding {
            value.insert("layout".into(), json!(layout_name(self.layout)));
        }
        let shards = self.shards.iter().map(|s| {
            let mut shard = json!({
                "file": s.file, "start": s.region.start, "shape": s.region.shape, "replica": s.replica,
            });
            if let Some(bytes) = s.bytes {
                shard["bytes"] = json!(bytes);
            }
            if let Some(hash) = s.blake3 {
                shard["blake3"] = json!(hash.to_hex().as_str());
            }
            shard
        });
        value.insert("shards".into(), shards.collect());
        value.into()
    }
}

pub(crate) fn layout_name(layout: Layout) -> &'static str {
    match layout {
        Layout::Vd => "vd",
        Layout::Dv => "dv",
    }
}

fn shard_entry(value: &Value, place: &str) -> Result<ShardEntry, DumpError> {
    let members = Members::new(value, place, &["file", "start", "shape", "replica", "bytes", "blake3"])?;
    let blake3 = match members.nullable("blake3") {
        None => None,
        Some(value) => {
            let hash = value.as_str().and_then(|text| blake3::Hash::from_hex(text).ok());
            Some(hash.ok_or_else(|| members.wrong("blake3", "64 hexadecimal digits"))?)
        }
    };
    let bytes = members.nullable("bytes");
    Ok(ShardEntry {
        file: members.text("file")?.to_owned(),
        region: Region { start: members.counts("start")?, shape: members.counts("shape")? },
        replica: members.get("replica").map_or(Ok(0), |v| members.count("replica", v))?,
        bytes: bytes.map(|v| v.as_u64().ok_or_else(|| members.wrong("bytes", "a whole number"))).transpose()?,
        blake3,
    })
}

pub(crate) fn check_shard_count(count: usize, place: &str) -> Result<(), DumpError> {
    if count <= MAX_SHARDS {
        return Ok(());
    }
    let found = format!("{count} shards");
    let remedy = "write larger shards";
    Err(DumpError::new(DumpErrorKind::TooLarge, place, found, format!("at most {MAX_SHARDS}"), remedy))
}

fn is_plain_file_name(name: &str) -> bool {
    name.len() <= 200
        && !name.starts_with('.')
        && name.ends_with(".npy")
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

/// A contract names what is rounded to what, in the kernels' own words.
pub(crate) fn check_contract(contract: Option<&Value>, place: &str) -> Result<(), DumpError> {
    let Some(contract) = contract else { return Ok(()) };
    const KNOWN: [&str; 5] = ["logits", "dlogits", "accumulate", "d_hidden", "d_unembedding"];
    let place = format!("{place}: contract");
    let members = Members::new(contract, &place, &KNOWN)?;
    let words = Precision::ALL.map(|p| (p.name(), p));
    KNOWN.into_iter().try_for_each(|name| members.word(name, &words).map(|_| ()))
}

/// Whether the tensors of one folder fit each other: the same tokens, the same D, the same V.
pub(crate) fn check_shapes<'a>(
    tensors: impl Iterator<Item = (&'static TensorSpec, &'a [usize], Layout)>,
    place: &str,
) -> Result<(), DumpError> {
    let (mut tokens, mut hidden, mut vocab) = (None, None, None);
    for (spec, shape, layout) in tensors {
        let (own_tokens, own_hidden, own_vocab) = match (spec.shape, shape, layout) {
            (ShapeRule::Tokens, _, _) => (Some(shape), None, None),
            (ShapeRule::Hidden, [tokens @ .., d], _) => (Some(tokens), Some(*d), None),
            (ShapeRule::Unembedding, [v, d], Layout::Vd) => (None, Some(*d), Some(*v)),
            (ShapeRule::Unembedding, [d, v], Layout::Dv) => (None, Some(*d), Some(*v)),
            _ => (None, None, None),
        };
        agree(&mut tokens, spec.name, own_tokens, "tokens", place)?;
        agree(&mut hidden, spec.name, own_hidden, "hidden size D", place)?;
        agree(&mut vocab, spec.name, own_vocab, "vocab size V", place)?;
    }
    Ok(())
}

fn agree<T: Copy + PartialEq + std::fmt::Debug>(
    known: &mut Option<(&'static str, T)>,
    name: &'static str,
    own: Option<T>,
    what: &str,
    place: &str,
) -> Result<(), DumpError> {
    match (*known, own) {
        (Some((first, expected)), Some(found)) if found != expected => Err(DumpError::new(
            DumpErrorKind::Shape,
            format_args!("{place}: {name}"),
            format!("{what} {found:?}"),
            format!("{what} {expected:?}, as {first} has"),
            "correct global_shape (or \"layout\") of the one that is wrong",
        )),
        (None, Some(own)) => {
            *known = Some((name, own));
            Ok(())
        }
        _ => Ok(()),
    }
}
