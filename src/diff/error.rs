//! What can be wrong with the input or the call.

use crate::dump::DumpError;
use fused_xent_kernels::UnknownKernel;
use fused_xent_kernels::problem::ProblemError;

/// Why a dump cannot be judged. Each displays as the one message that the user gets.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiffError {
    /// The dump is at fault.
    #[error(transparent)]
    Dump(#[from] DumpError),
    /// The numbers in it make no problem.
    #[error("{place}: {source}")]
    Problem {
        /// Step and microbatch.
        place: String,
        /// What is wrong.
        source: ProblemError,
    },
    /// Nothing matches what was asked for.
    #[error("{what}: the dump at {path} has {available}")]
    NothingToJudge {
        /// What was asked for.
        what: String,
        /// The dump.
        path: String,
        /// What there is.
        available: String,
    },
    /// The environment asks for a kernel that does not exist here.
    #[error(transparent)]
    Kernel(#[from] UnknownKernel),
    /// A candidate that does not exist here.
    #[error("unknown candidate \"{found}\": expected {expected}")]
    UnknownCandidate {
        /// As given.
        found: String,
        /// What there is.
        expected: String,
    },
    /// A candidate that this build leaves out.
    #[error("candidate {candidate}: this xent-diff was built without PJRT; build it with `--features pjrt`")]
    NotBuiltIn {
        /// As given.
        candidate: String,
    },
    /// A candidate that cannot be run, or that failed.
    #[error("candidate {candidate}: {source}")]
    Candidate {
        /// As given, and where it failed.
        candidate: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A slug that is not in the catalogue.
    #[error("unknown fault \"{found}\"; the nearest known one is \"{nearest}\" (xent-diff faults lists them)")]
    UnknownFault {
        /// As given.
        found: String,
        /// The nearest slug.
        nearest: &'static str,
    },
    /// A parameter that the fault does not have, or a value that it cannot take.
    #[error("fault {fault}: cannot take \"{found}\"; its parameters, as name=number: {expected}", expected = if .expected.is_empty() { "none" } else { .expected })]
    FaultParameter {
        /// The slug.
        fault: String,
        /// As given.
        found: String,
        /// Its parameters.
        expected: String,
    },
    /// A fault that the shape or the options leave without effect.
    #[error("fault {fault} changes nothing here: {reason}")]
    FaultWithoutEffect {
        /// The slug.
        fault: String,
        /// Why.
        reason: String,
    },
    /// An option of `synth` that makes no sense.
    #[error("{option} = {found}: expected {expected}")]
    Option {
        /// The option.
        option: &'static str,
        /// As given.
        found: String,
        /// What is accepted.
        expected: &'static str,
    },
}
