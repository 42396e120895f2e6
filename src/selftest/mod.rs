//! Whether the TPU kernels are right and fast on the TPU at hand; without one, whatever of that can be checked.
//!
//! Each of the [`cases`] is computed on the device by the Mosaic kernels, twice, and held to the float64 oracle at the floor of
//! the kernels' contract, as `xent-diff` holds a stage. On a device that is no TPU the StableHLO programs are run in place of the
//! kernels, which are compiled ahead if libtpu is there.

pub mod cases;
mod judge;
pub mod machine;
pub mod programs;
pub mod report;
mod speed;

use crate::pjrt::{CompileOptions, Device, PjrtError, Plugin, Topology};
use crate::report::model::Verdict as Judgement;
use cases::Case;
use fused_xent_kernels::problem::Shape;
use fused_xent_kernels::tpu::Generation;
use machine::{Failure, Machine, OnDevice};
use programs::{Piece, Programs};
use report::{CaseReport, Compiled, Compiler, Environment, Outcome, Report, SCHEMA, Times, Timing, Verdict};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What to do.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Name or path of the plugin whose first device is tested.
    pub plugin: String,
    /// libtpu, to compile ahead where the device is no TPU; `None`: where it is usually found, if it is.
    pub libtpu: Option<String>,
    /// The TPU's generation, where its name does not tell; where the device is no TPU, what is compiled ahead for.
    pub generation: Option<Generation>,
    /// Few cases, and one shape timed.
    pub quick: bool,
    /// A folder for the text of every program.
    pub dump: Option<PathBuf>,
}

/// What is compiled ahead for, if nothing else is asked for.
const DEFAULT_GENERATION: Generation = Generation::V5e;

/// Why nothing could be tested.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SelftestError {
    /// No plugin, or none that can be used.
    #[error("{source}; {remedy}")]
    NoDevice {
        /// What the plugin or its loader says.
        source: PjrtError,
        /// What to do.
        remedy: &'static str,
    },
    /// The plugin fails where none should.
    #[error(transparent)]
    Plugin(#[from] PjrtError),
    /// A TPU that is not known.
    #[error("device {kind:?}: no known TPU ({known}); say with --generation which of them it is like", known = names())]
    UnknownKind {
        /// As the device calls itself.
        kind: String,
    },
    /// Another TPU than was said.
    #[error("--generation {given}: the device is {kind:?}, a {found}; leave the option out")]
    OtherGeneration {
        /// As given.
        given: Generation,
        /// As the device calls itself.
        kind: String,
        /// What that is.
        found: Generation,
    },
    /// A program's text cannot be written.
    #[error("--dump {}: cannot be written: {source}; give a folder that can", path.display())]
    Dump {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn names() -> String {
    Generation::ALL.map(Generation::name).join(", ")
}

/// Hears of each piece of work.
pub trait Watch {
    /// Number `done` of `total` pieces begins.
    fn begins(&self, done: usize, total: usize, what: &str);
    /// A case has ended.
    fn ended(&self, case: &CaseReport);
}

/// Tests the first device of a plugin.
///
/// # Errors
/// If there is no device, or none that can be told; a dump that cannot be written. What is wrong with the kernels is in the report.
pub fn selftest(settings: &Settings, watch: &dyn Watch) -> Result<Report, SelftestError> {
    let began = Instant::now();
    let on = On::new(settings)?;
    let machine = OnDevice::new(on.device.clone(), on.generation);
    let cases = cases::all(settings.quick);
    let shapes = speed::shapes(settings.quick, on.generation.is_none());
    let pieces = cases.len() + shapes.len();
    let mut reports = vec![];
    for (i, case) in cases.iter().enumerate() {
        watch.begins(i, pieces, &case.name);
        let report = match &machine {
            Ok(machine) => on.case(case, machine, settings.dump.as_deref())?,
            Err(e) => failed(case, format!("the kernel that leaves NaN in the device's memory: {e}")),
        };
        watch.ended(&report);
        reports.push(report);
    }
    let mut timings = vec![];
    for (i, shape) in shapes.into_iter().enumerate() {
        let Shape { tokens, hidden, vocab } = shape;
        watch.begins(cases.len() + i, pieces, &format!("timing N = {tokens}, D = {hidden}, V = {vocab}"));
        timings.extend(speed::time(&on.device, on.generation, shape));
    }
    if let Some(ahead) = on.ahead.as_ref().filter(|_| !settings.quick) {
        for shape in speed::shapes(false, false) {
            watch.begins(pieces, pieces, "compiling what would be timed on a TPU");
            timings.extend(ahead.untimed(shape));
        }
    }
    let (verdict, sentence) = conclusion(&on.environment, &reports, &timings);
    Ok(Report {
        schema: SCHEMA,
        version: env!("CARGO_PKG_VERSION"),
        verdict,
        sentence,
        environment: on.environment,
        cases: reports,
        timings,
        seconds: began.elapsed().as_secs_f64(),
    })
}

/// The device, and what is known of it.
struct On {
    device: Device,
    /// If it is a TPU.
    generation: Option<Generation>,
    /// If it is none, what compiles for one.
    ahead: Option<Ahead>,
    environment: Environment,
}

/// A chip that is not there, and libtpu, which compiles for it.
struct Ahead {
    library: PathBuf,
    topology: Topology,
    generation: Generation,
}

impl Ahead {
    /// Compiles what would be timed.
    fn untimed(&self, shape: Shape) -> Vec<Timing> {
        let programs = Programs::mosaic(&Case::real(shape), self.generation).map_err(Failure::from);
        let Shape { tokens, hidden, vocab } = shape;
        let row = |program, times| Timing { shape: [tokens, hidden, vocab], program, times };
        match programs.and_then(|programs| compile_ahead(&self.topology, &programs)) {
            Ok(passes) => passes
                .into_iter()
                .map(|pass| row(format!("mosaic {}", pass.pass), Times::CompiledAhead { compiled_ahead: pass }))
                .collect(),
            Err(e) => vec![row("mosaic".into(), Times::Refused { error: format!("compiled ahead: {e}") })],
        }
    }
}

impl On {
    fn new(settings: &Settings) -> Result<Self, SelftestError> {
        let no_device = |remedy| move |source| SelftestError::NoDevice { source, remedy };
        let plugin = Plugin::load(&settings.plugin).map_err(no_device(
            "on a machine with a TPU, `pip install libtpu`; without one, --plugin cpu checks what a CPU can",
        ))?;
        let client = plugin.client(&plugin.sharing_options()).map_err(no_device(
            "run it where there is a TPU that no other process holds, or with --plugin cpu for what a CPU can check",
        ))?;
        let device = client.device(0)?;
        let platform = client.platform()?;
        let kind = device.kind()?;
        let generation = if platform == "tpu" { Some(of_kind(&kind, settings.generation)?) } else { None };
        let (ahead, no_compiler) = match generation {
            Some(_) => (None, None),
            None => ahead(settings)?,
        };
        let devices = client.devices()?.iter().map(Device::kind).collect::<Result<_, _>>()?;
        let compiler = ahead.as_ref().map(|Ahead { library, topology, .. }| -> Result<_, PjrtError> {
            Ok(Compiler {
                library: library.display().to_string(),
                version: first_line(&topology.platform_version()?),
                kind: topology.kinds()?.into_iter().next().unwrap_or_default(),
            })
        });
        let (major, minor) = plugin.api_version();
        let environment = Environment {
            plugin: plugin.path().display().to_string(),
            api_version: [major, minor],
            platform,
            platform_version: first_line(&client.platform_version()?),
            devices,
            executed: if generation.is_some() { "mosaic" } else { "stablehlo" },
            generation: generation.or(ahead.as_ref().map(|ahead| ahead.generation)).map(Generation::name),
            compiler: compiler.transpose()?,
            no_compiler,
            host: [std::env::consts::OS, std::env::consts::ARCH],
            threads: rayon::current_num_threads(),
        };
        Ok(Self { device, generation, ahead, environment })
    }

    fn case(&self, case: &Case, machine: &dyn Machine, dump: Option<&Path>) -> Result<CaseReport, SelftestError> {
        let began = Instant::now();
        let mosaic = self.generation.or(self.ahead.as_ref().map(|ahead| ahead.generation));
        let mosaic = mosaic.map(|generation| Programs::mosaic(case, generation));
        let written = dump.zip(mosaic.as_ref().and_then(|programs| programs.as_ref().ok()));
        written.map_or(Ok(()), |(folder, programs)| write(folder, case, programs))?;
        let mut report = match (self.generation, &mosaic) {
            (Some(_), Some(Ok(programs))) => run(case, programs, machine),
            (Some(_), Some(Err(e))) => failed(case, e.to_string()),
            _ if case.large => not_run(case, "it is too large for any device but a TPU"),
            _ => match Programs::stablehlo(case) {
                Ok(programs) => run(case, &programs, machine),
                Err(reason) => not_run(case, reason),
            },
        };
        if let (Some(ahead), Some(programs)) = (&self.ahead, mosaic) {
            let compiled = programs.map_err(Failure::from).and_then(|programs| compile_ahead(&ahead.topology, &programs));
            match compiled {
                Ok(compiled) => report.compiled_ahead = compiled,
                Err(e) => {
                    report.outcome = Outcome::Fail;
                    report.reason = Some(format!("compiled ahead: {e}"));
                }
            }
        }
        Ok(CaseReport { seconds: began.elapsed().as_secs_f64(), ..report })
    }
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

/// What a TPU is.
fn of_kind(kind: &str, given: Option<Generation>) -> Result<Generation, SelftestError> {
    match (Generation::by_kind(kind), given) {
        (Some(found), Some(given)) if found != given => Err(SelftestError::OtherGeneration { given, kind: kind.into(), found }),
        (found, given) => found.or(given).ok_or_else(|| SelftestError::UnknownKind { kind: kind.into() }),
    }
}

/// libtpu with a chip that is not there, or why there is none. One that was asked for must be there.
fn ahead(settings: &Settings) -> Result<(Option<Ahead>, Option<String>), SelftestError> {
    let generation = settings.generation.unwrap_or(DEFAULT_GENERATION);
    let loaded = Plugin::load(settings.libtpu.as_deref().unwrap_or("tpu"));
    let made =
        loaded.and_then(|libtpu| Ok(Ahead { library: libtpu.path().to_owned(), topology: libtpu.tpu(generation)?, generation }));
    match made {
        Ok(ahead) => Ok((Some(ahead), None)),
        Err(e) if settings.libtpu.is_none() => Ok((None, Some(e.to_string()))),
        Err(e) => Err(e.into()),
    }
}

fn compile_ahead(topology: &Topology, programs: &Programs) -> Result<Vec<Compiled>, Failure> {
    let one = |Piece { pass, text, kernels, .. }: &Piece| -> Result<Compiled, Failure> {
        let began = Instant::now();
        let executable = topology.compile_ahead(text, &CompileOptions::default()).map_err(|e| format!("{pass}: {e}"))?;
        Ok(Compiled::new(pass, kernels.len(), began.elapsed().as_secs_f64(), &executable.memory()?))
    };
    programs.pieces.iter().map(one).collect()
}

/// Runs a case on a machine, twice, and judges it.
pub fn run(case: &Case, programs: &Programs, machine: &dyn Machine) -> CaseReport {
    let began = Instant::now();
    let report = judged(case, programs, machine).unwrap_or_else(|e| failed(case, e.to_string()));
    CaseReport { seconds: began.elapsed().as_secs_f64(), ..report }
}

fn judged(case: &Case, programs: &Programs, machine: &dyn Machine) -> Result<CaseReport, Failure> {
    let clean = case.data();
    let (results, same) = if case.poison {
        programs.run_twice(case, &clean.clone().poisoned(case), machine)?
    } else {
        programs.run_twice(case, &clean, machine)?
    };
    let problem = case.problem(&clean)?;
    let (tensors, isolates) = judge::judge(case, &problem, &clean.cotangents, &programs.contract, &results)?;
    let diverges = tensors.iter().find(|tensor| tensor.verdict == Judgement::Diverge);
    let inexact = case.values.measured().filter(|measured| measured.exact).and(isolates).filter(|units| units.largest > 0.0);
    let reason = if let Some(tensor) = diverges {
        Some(format!("{}: {}", tensor.name, tensor.reason.as_deref().unwrap_or_default()))
    } else if let Some(units) = inexact {
        Some(format!("{}: {} in place of {}, which float32 holds", units.what, units.found, units.at))
    } else if !same {
        Some("a second run gave other bits".to_owned())
    } else {
        None
    };
    let outcome = if reason.is_some() { Outcome::Fail } else { Outcome::Pass };
    Ok(CaseReport { outcome, reason, same_twice: Some(same), isolates, tensors, ..failed(case, String::new()) })
}

fn not_run(case: &Case, reason: &str) -> CaseReport {
    CaseReport { outcome: Outcome::NotRun, ..failed(case, reason.into()) }
}

/// A case of which there is nothing but a reason.
fn failed(case: &Case, reason: String) -> CaseReport {
    let Shape { tokens, hidden, vocab } = case.shape;
    CaseReport {
        name: case.name.clone(),
        about: case.about,
        shape: [tokens, hidden, vocab],
        outcome: Outcome::Fail,
        reason: Some(reason),
        same_twice: None,
        isolates: None,
        tensors: vec![],
        compiled_ahead: vec![],
        seconds: 0.0,
    }
}

fn write(folder: &Path, case: &Case, programs: &Programs) -> Result<(), SelftestError> {
    let write = |path: &Path, text: &str| {
        std::fs::write(path, text).map_err(|source| SelftestError::Dump { path: path.to_owned(), source })
    };
    std::fs::create_dir_all(folder).map_err(|source| SelftestError::Dump { path: folder.to_owned(), source })?;
    for Piece { pass, text, kernels, .. } in &programs.pieces {
        write(&folder.join(format!("{}.{pass}.mlir", case.name)), text)?;
        for (i, (kernel, body)) in kernels.iter().enumerate() {
            write(&folder.join(format!("{}.{pass}.{i}.{kernel}.mosaic", case.name)), body)?;
        }
    }
    Ok(())
}

fn conclusion(environment: &Environment, cases: &[CaseReport], timings: &[Timing]) -> (Verdict, String) {
    let kind = environment.devices.first().map_or("", |kind| kind);
    let count = |outcome| cases.iter().filter(|case| case.outcome == outcome).count();
    let (passed, failed, total) = (count(Outcome::Pass), count(Outcome::Fail), cases.len());
    let refused: Vec<&Timing> = timings.iter().filter(|timing| matches!(timing.times, Times::Refused { .. })).collect();
    // A baseline that does not run is no fault of the kernels.
    let refused = refused.iter().filter(|timing| timing.program.starts_with("mosaic")).count();
    let on_tpu = environment.executed == "mosaic";
    if failed + refused > 0 {
        let also = if refused > 0 { format!(", and {refused} kernels of real shapes are refused") } else { String::new() };
        let what = if on_tpu { "the TPU kernels fail" } else { "not run on a TPU, and failed" };
        return (Verdict::Fail, format!("{what}: {failed} of {total} cases on {kind} are wrong{also}"));
    }
    if on_tpu {
        return (Verdict::Pass, format!("the TPU kernels pass: {passed} of {total} cases on {kind} are right"));
    }
    let compiled = cases.iter().filter(|case| !case.compiled_ahead.is_empty()).count();
    let ahead = match (&environment.compiler, environment.generation) {
        (Some(_), Some(generation)) => {
            format!("the Mosaic kernels of {compiled} cases were compiled for {generation}, and not executed")
        }
        _ => "the Mosaic kernels were neither compiled nor executed".to_owned(),
    };
    let more = match count(Outcome::NotRun) {
        0 => String::new(),
        left_out => format!("; {left_out} are beyond that"),
    };
    let instead = format!("the StableHLO programs ran in their place on {kind}, {passed} of {total} cases, all right{more}");
    (Verdict::NotRunOnATpu, format!("not run on a TPU: {ahead}; {instead}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tpu_is_told_by_its_kind_or_by_the_user() {
        let of = |kind: &str, given| of_kind(kind, given).map_err(|e| e.to_string());
        assert_eq!(of("TPU v5 lite", None), Ok(Generation::V5e));
        assert_eq!(of("TPU v5", None), Ok(Generation::V5p));
        assert_eq!(of("TPU v6 lite", Some(Generation::V6e)), Ok(Generation::V6e));
        assert_eq!(of("TPU v9", Some(Generation::V7x)), Ok(Generation::V7x));
        let unknown = of("TPU v9", None).unwrap_err();
        assert_eq!(
            unknown,
            "device \"TPU v9\": no known TPU (v4, v5e, v5p, v6e, v7x); say with --generation which of them it is like"
        );
        let other = of("TPU v4", Some(Generation::V5p)).unwrap_err();
        assert_eq!(other, "--generation v5p: the device is \"TPU v4\", a v4; leave the option out");
    }
}
