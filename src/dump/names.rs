//! The vocabulary of the format: which tensors there are, in which dtypes, where; and how folders are named.

use fused_xent_kernels::problem::DType;

/// Element types of a dump's tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ElementType {
    /// bfloat16.
    Bf16,
    /// float16.
    F16,
    /// float32.
    F32,
    /// float64.
    F64,
    /// int32.
    I32,
    /// int64.
    I64,
    /// uint32.
    U32,
}

impl ElementType {
    /// Every element type.
    pub const ALL: [ElementType; 7] = {
        use ElementType::*;
        [Bf16, F16, F32, F64, I32, I64, U32]
    };

    /// The name in manifests and reports: `bfloat16`, `float32`, `int64`, …
    pub fn name(self) -> &'static str {
        match self {
            ElementType::Bf16 => "bfloat16",
            ElementType::F16 => "float16",
            ElementType::F32 => "float32",
            ElementType::F64 => "float64",
            ElementType::I32 => "int32",
            ElementType::I64 => "int64",
            ElementType::U32 => "uint32",
        }
    }

    /// The type of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.name() == name)
    }

    /// Bytes per element.
    pub fn bytes(self) -> usize {
        match self {
            ElementType::Bf16 | ElementType::F16 => 2,
            ElementType::F32 | ElementType::I32 | ElementType::U32 => 4,
            ElementType::F64 | ElementType::I64 => 8,
        }
    }

    /// The descr under which it is written to a `.npy` file.
    pub(crate) fn descr(self) -> &'static str {
        match self {
            ElementType::Bf16 => "<V2",
            ElementType::F16 => "<f2",
            ElementType::F32 => "<f4",
            ElementType::F64 => "<f8",
            ElementType::I32 => "<i4",
            ElementType::I64 => "<i8",
            ElementType::U32 => "<u4",
        }
    }
}

impl From<DType> for ElementType {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::Bf16 => ElementType::Bf16,
            DType::F16 => ElementType::F16,
            DType::F32 => ElementType::F32,
        }
    }
}

/// What a tensor's shape goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShapeRule {
    /// [tokens, D] or [batch, sequence, D], as `hidden`.
    Hidden,
    /// [V, D] or [D, V], as `unembedding`.
    Unembedding,
    /// One value per token: `hidden` without D.
    Tokens,
}

/// One of the tensors that a dump can hold.
#[derive(Debug)]
pub struct TensorSpec {
    /// Its name.
    pub name: &'static str,
    /// What its shape goes by.
    pub shape: ShapeRule,
    /// The dtypes it can have.
    pub dtypes: &'static [ElementType],
    /// Whether it is an input of the computation; else the training run recorded it as an output.
    pub input: bool,
    /// Whether it may lie in `shared`.
    pub in_shared: bool,
}

const NARROW: &[ElementType] = &[ElementType::Bf16, ElementType::F16, ElementType::F32];
const ANY_FLOAT: &[ElementType] = &[ElementType::Bf16, ElementType::F16, ElementType::F32, ElementType::F64];
const IDS: &[ElementType] = &[ElementType::I32, ElementType::I64, ElementType::U32];
const F32: &[ElementType] = &[ElementType::F32];

const fn input(name: &'static str, shape: ShapeRule, dtypes: &'static [ElementType], in_shared: bool) -> TensorSpec {
    TensorSpec { name, shape, dtypes, input: true, in_shared }
}

const fn output(name: &'static str, shape: ShapeRule, dtypes: &'static [ElementType], in_shared: bool) -> TensorSpec {
    TensorSpec { name, shape, dtypes, input: false, in_shared }
}

/// Every tensor of the format, inputs first.
pub static TENSORS: [TensorSpec; 15] = {
    use ShapeRule::*;
    [
        input("hidden", Hidden, NARROW, false),
        input("unembedding", Unembedding, NARROW, true),
        input("targets", Tokens, IDS, false),
        input("token_weights", Tokens, F32, false),
        output("loss", Tokens, F32, false),
        output("lse", Tokens, F32, false),
        output("label_logits", Tokens, F32, false),
        output("d_lse", Tokens, F32, false),
        output("d_label_logits", Tokens, F32, false),
        output("d_hidden", Hidden, ANY_FLOAT, false),
        output("d_hidden_lse", Hidden, ANY_FLOAT, false),
        output("d_hidden_label", Hidden, ANY_FLOAT, false),
        output("d_unembedding", Unembedding, ANY_FLOAT, true),
        output("d_unembedding_lse", Unembedding, ANY_FLOAT, true),
        output("d_unembedding_label", Unembedding, ANY_FLOAT, true),
    ]
};

/// The tensor of that name.
pub fn tensor_spec(name: &str) -> Option<&'static TensorSpec> {
    TENSORS.iter().find(|t| t.name == name)
}

/// The known name nearest to `name`, if any is near.
pub(crate) fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|k| (strsim::jaro_winkler(name, k), k))
        .filter(|(score, _)| *score > 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, k)| k)
}

/// `did you mean "…"?`, or `otherwise` where nothing is near.
pub(crate) fn did_you_mean<'a>(name: &str, known: impl IntoIterator<Item = &'a str>, otherwise: &str) -> String {
    nearest(name, known).map_or_else(|| otherwise.to_owned(), |k| format!("did you mean \"{k}\"?"))
}

/// The folder of process `index`.
pub(crate) fn process_folder(index: usize) -> String {
    format!("proc_{index:05}")
}

/// The folder of step `step`.
pub(crate) fn step_folder(step: u64) -> String {
    format!("step_{step:08}")
}

/// The folder of a microbatch, or the shared one.
pub(crate) fn part_folder(microbatch: Option<usize>) -> String {
    microbatch.map_or_else(|| "shared".to_owned(), |m| format!("mb_{m:04}"))
}

/// The payload file of shard `k` of tensor `name`.
pub(crate) fn payload_file(name: &str, k: usize) -> String {
    format!("{name}.{k}.npy")
}

/// The file whose presence commits a folder.
pub(crate) const MANIFEST: &str = "manifest.json";
