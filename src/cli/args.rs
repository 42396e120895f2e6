//! The command line.

use super::output::Target;
use crate::diff::Candidate;
use crate::diff::fault::Fault;
use crate::diff::synth::Regime;
use crate::dump::{LossSettings, check_contract};
use crate::isolate::{Setting, switch};
use crate::kernels::contract::Precision;
use crate::kernels::tpu::Generation;
use clap::{Args, Parser, Subcommand};
use regex::bytes::Regex;
use serde_json::Value;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

/// Replays captured training steps of a fused linear cross-entropy in float64 and says whether the gradients are right,
/// where they first go wrong, and why.
#[derive(Debug, Parser)]
#[command(name = "xent-diff", version, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(arg_required_else_help = true, after_help = EXIT_CODES)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub judge: Option<Judge>,
}

const EXIT_CODES: &str = "\
Exit codes: 0 everything agrees, 1 something diverges, 2 the input or the call is at fault, 3 internal error.
A dump that has the name of a command is given as ./verify. Set NO_COLOR for a report without colour.";

#[derive(Debug, Args)]
pub struct Judge {
    /// A dump (it holds proc_* folders) or a folder of dumps
    pub dumps: PathBuf,
    /// Write the report as JSON ('-' for standard output, in place of the table)
    #[arg(long, value_name = "FILE")]
    pub json: Option<Target>,
    /// Write the report as one self-contained HTML file ('-' for standard output, in place of the table)
    #[arg(long, value_name = "FILE")]
    pub html: Option<Target>,
    /// Write the report as Markdown for a pull request ('-' for standard output, in place of the table)
    #[arg(long, value_name = "FILE")]
    pub md: Option<Target>,
    /// Compare with an earlier report that --json wrote: what is better, worse, the same; which causes are new or gone
    #[arg(long, value_name = "FILE")]
    pub baseline: Option<PathBuf>,
    /// Judge this step only
    #[arg(long, value_name = "N")]
    pub step: Option<u64>,
    /// Judge this microbatch only, and nothing that accumulates over the step
    #[arg(long, value_name = "N")]
    pub microbatch: Option<usize>,
    /// Judge this candidate: recorded, cpu, cpu:KERNEL, cmd:COMMAND, pjrt:PLUGIN[:naive|:chunked] or stablehlo:FILE[@PLUGIN]; may be
    /// repeated [default: recorded where there is any, and cpu]
    #[arg(long = "candidate", value_name = "C")]
    pub candidates: Vec<Candidate>,
    /// Hold recorded gradients to this contract, such as dlogits=f32,d_hidden=bf16,d_unembedding=f32: logits, dlogits, accumulate,
    /// d_hidden, d_unembedding, each f64, f32, bf16x2, f16 or bf16 [default: what the dump declares, else the strictest that fits]
    #[arg(long, value_name = "MEMBER=PRECISION,...", value_parser = contract)]
    pub contract: Option<Value>,
    /// Judge only so many rows of dQ in each microbatch and of dK [default: all; 256 of a step that is too large for it]
    #[arg(long, value_name = "ROWS", num_args = 0..=1, default_missing_value = "256", value_parser = rows)]
    pub sample: Option<NonZeroUsize>,
    /// Judge every row of dQ and dK, however large the step is
    #[arg(long, conflicts_with = "sample")]
    pub full: bool,
    /// Work on N threads [default: one per core]
    #[arg(long, value_name = "N")]
    pub threads: Option<NonZeroUsize>,
    /// Print the verdict alone, without table and progress
    #[arg(long, short)]
    pub quiet: bool,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Check integrity and completeness: manifests, checksums, tiling, dtypes, copies
    Verify(Verify),
    /// Show what is there: runs, processes, steps, microbatches, tensors, loss settings
    Info(Info),
    /// Write a dump of chosen shape, whose recorded gradients carry chosen faults, or none
    Synth(Box<Synth>),
    /// Cut a small dump out of a large one that still shows what is wrong with it
    Slice(Slice),
    /// Find which of several switches makes a command fail, hang or crash
    Isolate(Isolate),
    /// Check on the TPU at hand that the TPU kernels are right and fast; without one, what can be checked
    TpuSelftest(TpuSelftest),
    /// List the fault catalogue
    Faults,
}

#[derive(Debug, Args)]
pub struct Verify {
    /// A dump or a folder of dumps
    pub dumps: PathBuf,
    /// Without progress
    #[arg(long, short)]
    pub quiet: bool,
}

/// Cut a small dump out of a large one that still shows what is wrong with it
///
/// Without --step, --microbatch and --tokens the smallest slice is searched for: the first step that diverges, its first
/// microbatch that does, and ever fewer of its tokens, as long as the same cause is found. With any of them, that is kept and
/// nothing is judged.
#[derive(Debug, Args)]
#[command(after_help = CUTS)]
pub struct Slice {
    /// The dump
    pub dump: PathBuf,
    /// The folder to write; it must not exist
    pub out: PathBuf,
    /// Keep this run, of a dump that holds several with the same step
    #[arg(long, value_name = "ID")]
    pub run: Option<String>,
    /// Keep this step
    #[arg(long, value_name = "N")]
    pub step: Option<u64>,
    /// Keep this microbatch alone
    #[arg(long, value_name = "N")]
    pub microbatch: Option<usize>,
    /// Keep these tokens of the microbatch alone, such as 64..96 (without the last) or 3,17,40..44
    #[arg(long, value_name = "ROWS", value_parser = ranges)]
    pub tokens: Option<Ranges>,
    /// Without progress and without a word on what was cut
    #[arg(long, short)]
    pub quiet: bool,
}

const CUTS: &str = "\
What was recorded and no longer belongs to the slice is dropped: dK where tokens are cut, the accumulated dK where microbatches
are. The loss is settled so that every token's cotangent stays what it was. The vocabulary is never cut, since every token's lse
runs over all of it. Under \"extra\" the manifests say what they are a slice of.";

/// Find which of several switches makes a command fail, hang or crash
///
/// The command is run with none of the switches on and must succeed, with all of them and must fail, then with each alone and, if
/// need be, with ever fewer together, until the smallest set that fails is known and the smallest whose removal cures.
#[derive(Debug, Args)]
#[command(after_help = OUTCOMES)]
pub struct Isolate {
    /// The command line, run by /bin/sh; arguments of switches stand where it says "$@", or else at its end
    #[arg(long = "cmd", value_name = "COMMAND")]
    pub command: String,
    /// A switch: NAME=KEY=VALUE sets a variable of the environment, NAME=ARGUMENT adds an argument; repeated, with the same NAME
    /// for what belongs together
    #[arg(long = "switch", value_name = "NAME=SETTING", required = true, value_parser = switch::parse)]
    pub switches: Vec<(String, Setting)>,
    /// A run that has not ended after S seconds hangs; all that it started is killed
    #[arg(long, value_name = "S", default_value = "600", value_parser = seconds)]
    pub timeout: Duration,
    /// A run that puts out nothing for S seconds hangs, too
    #[arg(long, value_name = "S", value_parser = seconds)]
    pub silence: Option<Duration>,
    /// A run succeeds only if a line of its output matches
    #[arg(long, value_name = "RE", value_parser = Regex::new)]
    pub success_pattern: Option<Regex>,
    /// A run fails if a line of its output matches
    #[arg(long, value_name = "RE", value_parser = Regex::new)]
    pub failure_pattern: Option<Regex>,
    /// Successes before a set is believed to succeed that the conclusion rests on
    #[arg(long, value_name = "N", default_value = "2")]
    pub min_pass: NonZeroUsize,
    /// Failures before such a set is believed to fail
    #[arg(long, value_name = "N", default_value = "2")]
    pub min_fail: NonZeroUsize,
    /// The folder for one log a run and the journal, from which an interrupted search goes on
    #[arg(long, value_name = "DIR", default_value = "isolate-logs")]
    pub logs: PathBuf,
    /// Write the result as JSON ('-' for standard output, in place of the table)
    #[arg(long, value_name = "FILE")]
    pub json: Option<Target>,
    /// Print the conclusion alone, without table and progress
    #[arg(long, short)]
    pub quiet: bool,
}

const OUTCOMES: &str = "\
The first of these that applies is the outcome of a run: hang (it did not end), crash (a signal ended it), failure (a line matches
the failure pattern; or the exit code is not 0; or no line matches the success pattern), success.
Exit codes: 0 nothing fails, 1 a culprit was found, 2 the call is at fault or the command fails without any switch, 3 internal
error. Ctrl-C ends it with everything it started; the same call goes on from there.";

/// Check on the TPU at hand that the TPU kernels are right and fast; without one, what can be checked
///
/// Cases of every kind are computed by the kernels, twice, and held to the float64 oracle; then real shapes are timed. On a device
/// that is no TPU, StableHLO programs compute the cases, and the kernels are compiled ahead if libtpu is found. It takes minutes.
#[derive(Debug, Args)]
#[command(after_help = SELFTEST)]
pub struct TpuSelftest {
    /// The PJRT plugin, by name or path: its first device is tested [default: libtpu, at TPU_LIBRARY_PATH or in its wheel]
    #[arg(long, value_name = "PLUGIN", default_value = "tpu", hide_default_value = true)]
    pub plugin: String,
    /// The TPU's generation, v4, v5e, v5p, v6e or v7x, where the device's name does not tell; where it is no TPU, what the
    /// kernels are compiled ahead for [default there: v5e]
    #[arg(long, value_name = "GENERATION", value_parser = generation)]
    pub generation: Option<Generation>,
    /// libtpu, to compile the kernels ahead where the device is no TPU [default: as for --plugin, if it is there]
    #[arg(long, value_name = "PATH")]
    pub libtpu: Option<String>,
    /// A tenth of it: one case of each kind, of small shapes, and one shape timed
    #[arg(long)]
    pub quick: bool,
    /// Write the report as JSON ('-' for standard output, in place of the table)
    #[arg(long, value_name = "FILE")]
    pub json: Option<Target>,
    /// A folder for the text of every kernel and of the programs around them
    #[arg(long, value_name = "DIR")]
    pub dump: Option<PathBuf>,
    /// Print the verdict alone, without table and progress
    #[arg(long, short)]
    pub quiet: bool,
}

const SELFTEST: &str = "\
Exit codes: 0 every case is right (without a TPU: every one that could be run, which is no pass of the TPU kernels), 1 a case is
wrong, refused or not the same twice, 2 nothing can be run (no plugin, no device, …), 3 internal error.";

/// Rows, as [start, end) ranges.
pub type Ranges = Vec<Range<usize>>;

#[derive(Debug, Args)]
pub struct Info {
    /// A dump or a folder of dumps
    #[arg(required_unless_present = "machine")]
    pub dumps: Option<PathBuf>,
    /// Show the kernels of this machine, the one in use first, and what each rounds
    #[arg(long)]
    pub machine: bool,
    /// Write it as JSON ('-' for standard output, in place of the table)
    #[arg(long, value_name = "FILE")]
    pub json: Option<Target>,
}

#[derive(Debug, Args)]
pub struct Synth {
    /// The folder to write; it must not hold a dump yet
    pub dir: PathBuf,
    /// N: tokens of each microbatch
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub tokens: usize,
    /// D: features of a hidden state
    #[arg(long, value_name = "D", default_value_t = 64)]
    pub hidden: usize,
    /// V: size of the vocabulary
    #[arg(long, value_name = "V", default_value_t = 1000)]
    pub vocab: usize,
    /// Microbatches of the step
    #[arg(long, value_name = "M", default_value_t = 2)]
    pub microbatches: usize,
    /// Processes that the dump is spread over
    #[arg(long, value_name = "P", default_value_t = 1)]
    pub processes: usize,
    /// Size of the logits
    #[arg(long, value_enum, default_value_t = Regime::Trained)]
    pub regime: Regime,
    /// Share of the tokens that are masked, 0 to 1
    #[arg(long, value_name = "SHARE", default_value_t = 0.1)]
    pub masked: f64,
    /// Give the tokens weights other than 0 and 1
    #[arg(long)]
    pub weights: bool,
    /// The loss, as the manifest's member in JSON, such as '{"z_loss": 1e-4}'
    #[arg(long, value_name = "JSON", default_value = "{}", value_parser = loss)]
    pub loss: LossSettings,
    /// Precision of the recorded gradients: bf16 or f32
    #[arg(long, value_name = "P", default_value = "bf16", value_parser = gradients)]
    pub gradients: Precision,
    /// Declare this contract, and compute by it but for the faults, such as dlogits=bf16,d_unembedding=f32: logits, dlogits,
    /// d_hidden, d_unembedding, each f32 or bf16
    #[arg(long, value_name = "MEMBER=PRECISION,...", value_parser = contract)]
    pub contract: Option<Value>,
    /// Record the inner stages too, in float32: the cotangents of lse and of the label logits, and,
    /// without label smoothing, the parts of both gradients
    #[arg(long)]
    pub inner: bool,
    /// A fault that they carry: its slug, or slug:name=value,…; may be repeated
    #[arg(long = "fault", value_name = "SLUG", value_parser = Fault::parse)]
    pub faults: Vec<Fault>,
    /// What everything random comes from
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// The training step that the dump claims to be of
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub step: u64,
    /// Without progress
    #[arg(long, short)]
    pub quiet: bool,
}

fn rows(text: &str) -> Result<NonZeroUsize, String> {
    text.parse()
        .map_err(|_| "expected a number of rows, 1 or more; a path stands before --sample, or write --sample=256".to_owned())
}

fn seconds(text: &str) -> Result<Duration, String> {
    let time = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()).filter(|time| !time.is_zero());
    time.ok_or_else(|| "expected a number of seconds above 0, such as 90 or 0.5".to_owned())
}

fn generation(text: &str) -> Result<Generation, String> {
    Generation::by_name(text).ok_or_else(|| format!("expected one of {}", Generation::ALL.map(Generation::name).join(", ")))
}

fn ranges(text: &str) -> Result<Ranges, String> {
    let number = |text: &str| text.trim().parse::<usize>().ok();
    let range = |part: &str| match part.split_once("..") {
        Some((start, end)) => Some(number(start)?..number(end)?).filter(|range| !range.is_empty()),
        None => number(part).and_then(|row| Some(row..row.checked_add(1)?)),
    };
    let all = text.split(',').map(|part| range(part).ok_or(part));
    all.collect::<Result<_, _>>()
        .map_err(|part| format!("{part:?} is neither a row, such as 17, nor a range of them, such as 64..96"))
}

fn contract(text: &str) -> Result<Value, String> {
    let member = |part: &str| part.split_once('=').map(|(name, precision)| (name.trim().into(), precision.trim().into()));
    let members = text.split(',').map(|part| member(part).ok_or_else(|| format!("{part:?} is not of the form dlogits=bf16")));
    let contract = Value::Object(members.collect::<Result<_, _>>()?);
    check_contract(Some(&contract), "--contract").map_err(|error| error.to_string())?;
    Ok(contract)
}

fn loss(text: &str) -> Result<LossSettings, String> {
    let value = serde_json::from_str(text).map_err(|e| e.to_string())?;
    LossSettings::from_json(&value, "--loss").map_err(|e| e.to_string())
}

fn gradients(text: &str) -> Result<Precision, String> {
    [Precision::Bf16, Precision::F32].into_iter().find(|p| p.name() == text).ok_or_else(|| "expected bf16 or f32".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diff::sampling::ROWS;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_path_needs_no_command_and_a_command_no_path() {
        let judge = |line: &[&str]| Cli::try_parse_from(line).unwrap().judge.unwrap();
        assert_eq!(judge(&["xent-diff", "./verify"]).dumps, PathBuf::from("./verify"));
        assert_eq!(judge(&["xent-diff", "--step", "3", "dumps"]).step, Some(3));
        let cli = Cli::try_parse_from(["xent-diff", "verify", "dumps"]).unwrap();
        assert!(matches!(cli.command, Some(Command::Verify(_))) && cli.judge.is_none());
        assert!(Cli::try_parse_from(["xent-diff", "dumps", "verify", "x"]).is_err());
        assert!(Cli::try_parse_from(["xent-diff", "--quiet"]).is_err());
        assert_eq!(judge(&["xent-diff", "dumps", "--sample"]).sample, Some(ROWS));
        assert_eq!(judge(&["xent-diff", "--sample", "7", "dumps"]).sample.map(NonZeroUsize::get), Some(7));
        assert_eq!(judge(&["xent-diff", "dumps"]).sample, None);
    }
}
