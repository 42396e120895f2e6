//! What is judged: gradients recorded in a dump, or computed from its inputs by a kernel.

use super::DiffError;
#[cfg(feature = "pjrt")]
use super::device::OnDevice;
use super::truth::Stage;
use fused_xent_kernels::Kernel;
use fused_xent_kernels::contract::{Contract, Precision};
use ndarray::Array2;
use std::collections::BTreeMap;
use std::str::FromStr;

/// Who computed the gradients that are judged.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Candidate {
    /// The training run that wrote the dump.
    Recorded,
    /// A kernel of this machine.
    Cpu(Kernel),
    /// A program that reads a dump and writes another with the gradients, as a shell's command line.
    Command(String),
    /// A program that XLA runs.
    #[cfg(feature = "pjrt")]
    OnDevice(OnDevice),
}

impl FromStr for Candidate {
    type Err = DiffError;

    /// `recorded`, `cpu` (the kernel that `FUSED_XENT_KERNEL` names, or else the fastest of this machine), `cpu:NAME`,
    /// `cmd:COMMAND`, `pjrt:PLUGIN`, `pjrt:PLUGIN:naive` or `stablehlo:FILE@PLUGIN`. The latter two take hold of the device, and so
    /// fail here if there is none.
    fn from_str(text: &str) -> Result<Self, DiffError> {
        let kernel = match text.split_once(':') {
            None if text == "recorded" => return Ok(Candidate::Recorded),
            None if text == "cpu" => Some(Kernel::from_environment()?),
            Some(("cpu", name)) => Kernel::by_name(name),
            Some(("cmd", command)) if !command.trim().is_empty() => return Ok(Candidate::Command(command.into())),
            #[cfg(not(feature = "pjrt"))]
            Some(("pjrt" | "stablehlo", _)) => return Err(DiffError::NotBuiltIn { candidate: text.into() }),
            _ => None,
        };
        #[cfg(feature = "pjrt")]
        if let Some(on_device) = OnDevice::parse(text) {
            return on_device.map(Candidate::OnDevice);
        }
        kernel.map(Candidate::Cpu).ok_or_else(|| {
            let kernels = Kernel::available().iter().fold("recorded, cpu".into(), |list, k| format!("{list}, cpu:{}", k.name()));
            let expected = format!("{kernels}, cmd:COMMAND, pjrt:PLUGIN[:naive|:chunked], stablehlo:FILE[@PLUGIN]");
            DiffError::UnknownCandidate { found: text.into(), expected }
        })
    }
}

/// The values of one stage.
#[derive(Clone, Debug)]
pub struct Values {
    /// [N, 1], [N, D] or [V, D]; of the latter two, the rows that are judged.
    pub values: Array2<f64>,
    /// The precision that they were stored in.
    pub precision: Precision,
}

/// Everything that a candidate has for one step.
#[derive(Clone, Debug)]
pub struct Produced {
    /// `recorded`, `cpu`, …
    pub name: String,
    /// For people.
    pub description: String,
    /// Per microbatch.
    pub microbatches: Vec<BTreeMap<Stage, Values>>,
    /// dK accumulated over the step.
    pub accumulated: Option<Values>,
    /// The contracts that it may have kept, strictest first, and how they are known.
    pub contracts: Vec<Contract>,
    /// `declared`, `given` or `assumed`.
    pub contract_source: &'static str,
}
