//! The result, as plain data: what the terminal and the JSON show.

use crate::pjrt::MemoryFigures;
use crate::report::model::TensorReport;
use crate::report::model::Verdict as Judgement;
use serde::Serialize;

/// Name and version of the JSON's shape.
pub const SCHEMA: &str = "fused-xent-tpu-selftest/1";

/// Everything that was found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: &'static str,
    /// Of this program.
    pub version: &'static str,
    /// What it comes to.
    pub verdict: Verdict,
    /// The same in a sentence.
    pub sentence: String,
    /// Where it was run.
    pub environment: Environment,
    /// In the order in which they were run.
    pub cases: Vec<CaseReport>,
    /// Of real shapes.
    pub timings: Vec<Timing>,
    /// All of it.
    pub seconds: f64,
}

/// What it comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// On a TPU, every case of the TPU kernels is right.
    Pass,
    /// A case is wrong, is refused by a compiler, or differs from run to run.
    Fail,
    /// There was no TPU: the TPU kernels were not executed. What could be checked without one is right.
    NotRunOnATpu,
}

/// Where it was run.
#[derive(Clone, Debug, Serialize)]
pub struct Environment {
    /// The plugin's library.
    pub plugin: String,
    /// Of the PJRT API that the plugin speaks.
    pub api_version: [i32; 2],
    /// `tpu`, `cpu`, …
    pub platform: String,
    /// What the plugin says of its version.
    pub platform_version: String,
    /// The kind of each device of this process; the first was used.
    pub devices: Vec<String>,
    /// What was executed: `mosaic` (the TPU kernels) or `stablehlo` (the programs for any device, in their place).
    pub executed: &'static str,
    /// The generation of TPUs whose kernels were made: of the device, or what they were compiled ahead for.
    pub generation: Option<&'static str>,
    /// What compiled the TPU kernels ahead, where the device is no TPU.
    pub compiler: Option<Compiler>,
    /// Why nothing was compiled ahead, where the device is no TPU.
    pub no_compiler: Option<String>,
    /// Operating system and architecture of the host.
    pub host: [&'static str; 2],
    /// Threads of the oracle.
    pub threads: usize,
}

/// A compiler for TPUs that are not there.
#[derive(Clone, Debug, Serialize)]
pub struct Compiler {
    /// libtpu.
    pub library: String,
    /// What it says of its version.
    pub version: String,
    /// The kind of device that it compiles for.
    pub kind: String,
}

/// One case.
#[derive(Clone, Debug, Serialize)]
pub struct CaseReport {
    /// Its name.
    pub name: String,
    /// What it shows.
    pub about: &'static str,
    /// N, D and V.
    pub shape: [usize; 3],
    /// How it came out.
    pub outcome: Outcome,
    /// Why it failed, or was not run.
    pub reason: Option<String>,
    /// Whether a second run gave the same bits.
    pub same_twice: Option<bool>,
    /// The deviation of the function that the case isolates.
    pub isolates: Option<Units>,
    /// Each result against the oracle, as in `xent-diff --json`.
    pub tensors: Vec<TensorReport>,
    /// What the TPU compiler made of its kernels, where it was compiled ahead.
    pub compiled_ahead: Vec<Compiled>,
    /// Compiling, running and judging.
    pub seconds: f64,
}

/// How a case came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Every result agrees.
    Pass,
    /// One does not, or there is none.
    Fail,
    /// It was not executed.
    NotRun,
}

impl Outcome {
    /// For people.
    pub fn word(self) -> &'static str {
        match self {
            Outcome::Pass => "right",
            Outcome::Fail => "WRONG",
            Outcome::NotRun => "not run",
        }
    }
}

/// A deviation in units in the last place of float32.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Units {
    /// `exp`, `log`, `tanh`, `product` or `sum`.
    pub what: &'static str,
    /// The largest.
    pub largest: f64,
    /// The exact value there.
    pub at: f64,
    /// And what was found.
    pub found: f64,
}

/// What a program needs on the chip that it was compiled ahead for.
#[derive(Clone, Debug, Serialize)]
pub struct Compiled {
    /// `forward` or `backward`.
    pub pass: &'static str,
    /// Mosaic kernels in it.
    pub kernels: usize,
    /// Compiling it.
    pub seconds: f64,
    /// Bytes of machine code.
    pub code_bytes: u64,
    /// Bytes of HBM beside arguments and results.
    pub workspace_bytes: u64,
    /// The most bytes of HBM at once, where the compiler says.
    pub peak_bytes: Option<u64>,
}

impl Compiled {
    /// From what the compiler says.
    pub fn new(pass: &'static str, kernels: usize, seconds: f64, memory: &MemoryFigures) -> Self {
        let &MemoryFigures { code, workspace, peak, .. } = memory;
        Self { pass, kernels, seconds, code_bytes: code, workspace_bytes: workspace, peak_bytes: peak }
    }
}

/// How long a program takes at one shape.
#[derive(Clone, Debug, Serialize)]
pub struct Timing {
    /// N, D and V.
    pub shape: [usize; 3],
    /// `mosaic forward`, `mosaic backward`, or `stablehlo both`, forward and backward in one.
    pub program: String,
    /// The times, or why there are none.
    #[serde(flatten)]
    pub times: Times,
}

/// Of whole executions, each awaited, with everything on the device.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum Times {
    /// As measured.
    Measured {
        /// Executions that were timed.
        runs: usize,
        /// In milliseconds.
        median_ms: f64,
        /// The shortest.
        least_ms: f64,
        /// The longest.
        most_ms: f64,
        /// 2·N·D·V for the forward and 6·N·D·V for the backward, over the median.
        tflop_per_s: f64,
        /// What the device's MXUs need at least, over the median; of bfloat16 products alone.
        share_of_mxu: Option<f64>,
        /// Compiling it.
        compile_seconds: f64,
    },
    /// There is no TPU: its kernels were compiled ahead for one.
    CompiledAhead {
        /// What they need there.
        compiled_ahead: Compiled,
    },
    /// It could not be.
    Refused {
        /// Why.
        error: String,
    },
}

impl CaseReport {
    /// The tensor that is nearest to its limit, or furthest beyond it.
    pub fn worst(&self) -> Option<&TensorReport> {
        let share = |tensor: &TensorReport| {
            if tensor.verdict == Judgement::Diverge { f64::INFINITY } else { tensor.ratio / tensor.ratio_limit }
        };
        self.tensors.iter().max_by(|x, y| share(x).total_cmp(&share(y)))
    }
}
