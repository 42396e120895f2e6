//! `xent-diff`'s engine: replay a dump's microbatches in float64, compare candidates with the result stage by stage, and
//! say where they part and why.
//!
//! A step goes through [`judge`] microbatch by microbatch: the oracle gives every stage's exact value ([`truth`]), each
//! candidate its own ([`candidate`]), and [`compare`] judges one by the other against the floor of the contract that the
//! candidate keeps. What diverges is explained by counterfactual replay ([`explain`]).

pub mod candidate;
mod command;
pub mod compare;
mod cpu;
mod crossing;
#[cfg(feature = "pjrt")]
mod device;
mod error;
pub mod explain;
pub mod fault;
#[cfg(feature = "pjrt")]
mod module;
mod owners;
mod pattern;
mod plots;
mod recorded;
pub mod replay;
pub mod sampling;
pub mod step;
mod substitute;
pub mod synth;
mod tiling;
pub mod truth;

pub use candidate::Candidate;
#[cfg(feature = "pjrt")]
pub use device::OnDevice;
pub use error::DiffError;

use crate::dump::{self, Dump, LoadedMicrobatch, MicrobatchGradients, Run};
use crate::report::model::{
    AccumulatedReport, CandidateReport, ContractReport, Divergence, DumpSummary, Finding, GradNorm, MicrobatchReport, Report,
    SampleReport, TensorReport, Verdict,
};
use crate::report::plots::{Crossing, Presence};
use candidate::Produced;
use compare::{Context, compare};
use explain::Tolerances;
use fused_xent_kernels::Kernel;
use fused_xent_kernels::contract::{Contract, Precision};
use fused_xent_kernels::floor::Tolerance;
use fused_xent_kernels::problem::Sample;
use ndarray::{Array2, Axis};
use sampling::Sampling;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use step::{Microbatch, Step};
use truth::{Accumulated, RowsAre, Stage, Truth, stage_error};

/// What to judge.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Candidates; none means `recorded` where the dump has any, and always `cpu`.
    pub candidates: Vec<Candidate>,
    /// Only this step.
    pub step: Option<u64>,
    /// Only this microbatch; what accumulates over the step is then left out.
    pub microbatch: Option<usize>,
    /// How many rows of dQ and dK.
    pub sampling: Sampling,
    /// What recorded gradients are held to, in place of what the dump declares or what fits them: a manifest's `contract`.
    pub contract: Option<serde_json::Value>,
}

/// Is told how far the work has come.
pub trait Progress: Sync {
    /// A piece of work of `steps` steps begins.
    fn begin(&self, what: &str, steps: u64);
    /// `n` more steps are done.
    fn advance(&self, n: u64);
}

impl Progress for () {
    fn begin(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
}

/// Judges the dump at `path`.
///
/// # Errors
/// If the dump cannot be read or holds nothing of what `settings` ask for.
pub fn judge(path: &Path, settings: &Settings, progress: &dyn Progress) -> Result<Report, DiffError> {
    let dump = Dump::open(path)?;
    let mut candidates = Vec::new();
    let mut steps = Vec::new();
    let mut warnings = dump.warnings().to_vec();
    for run in dump.runs() {
        for (&index, step) in &run.steps {
            if settings.step.is_some_and(|only| only != index) {
                continue;
            }
            candidates.extend(judge_step(run, step, settings, progress, &mut warnings)?);
            steps.push(index);
        }
    }
    if candidates.is_empty() {
        let available: Vec<String> = dump.runs().iter().flat_map(|r| r.steps.keys()).map(u64::to_string).collect();
        return Err(DiffError::NothingToJudge {
            what: settings.step.map_or("no whole microbatch to judge".into(), |s| format!("no step {s} to judge")),
            path: path.display().to_string(),
            available: if available.is_empty() { "no steps".into() } else { format!("steps {}", available.join(", ")) },
        });
    }
    steps.sort_unstable();
    steps.dedup();
    Ok(Report {
        verdict: candidates.iter().map(|c| c.verdict).max().unwrap_or(Verdict::Agree),
        dump: DumpSummary {
            path: path.display().to_string(),
            run_ids: dump.runs().iter().map(|r| r.run_id.clone()).collect(),
            processes: dump.runs().iter().map(|r| r.process_count).max().unwrap_or(0),
            steps,
            interrupted: dump.runs().iter().flat_map(|r| r.interrupted.iter().map(|p| p.display().to_string())).collect(),
        },
        candidates,
        warnings,
        baseline: None,
    })
}

fn judge_step(
    run: &Run,
    dumped: &dump::Step,
    settings: &Settings,
    progress: &dyn Progress,
    warnings: &mut Vec<String>,
) -> Result<Vec<CandidateReport>, DiffError> {
    // `global` needs every microbatch's counts, so all are loaded (mapped, not read) even if one is judged.
    let shared = dumped.shared.info("unembedding").map(|_| dumped.unembedding()).transpose()?;
    let loaded = dumped
        .microbatches
        .keys()
        .map(|&m| Ok((m, shared.as_ref().map_or_else(|| dumped.problem(m), |k| dumped.problem_with(m, k))?)))
        .collect::<Result<Vec<(usize, LoadedMicrobatch)>, DiffError>>()?;
    let whole = loaded.len() == dumped.num_microbatches;
    let judged: Vec<usize> = (0..loaded.len()).filter(|&i| settings.microbatch.is_none_or(|only| only == loaded[i].0)).collect();
    let microbatches = loaded
        .iter()
        .map(|(index, l)| {
            let targets = l.targets.targets().map_or(vec![], |t| (0..t.len()).map(|n| t.get(n)).collect());
            // Where it cannot be read, judging what was recorded says so.
            let recorded_lse = dumped.folder(*index)?.load("lse").ok().flatten().map(|lse| lse.tensor.to_f64());
            Ok(Microbatch { problem: l.problem()?, targets, recorded_lse, index: *index })
        })
        .collect::<Result<Vec<_>, DiffError>>()?;
    let step = Step {
        microbatches,
        num_microbatches: dumped.num_microbatches,
        processes: run.process_count,
        reduction: dumped.loss.reduction,
        own_carries_step_factor: dumped.loss.microbatch_gradients == MicrobatchGradients::Step,
    };
    if !whole {
        warnings.push(format!(
            "run {}, step {}: {} of {} microbatches are there; what accumulates over the step is not judged",
            run.run_id,
            dumped.step,
            loaded.len(),
            dumped.num_microbatches
        ));
    }
    if judged.is_empty() {
        return Ok(vec![]);
    }
    let mut samples: Vec<Option<Sample>> = vec![None; judged.len()];
    if let Some((rows, why)) = settings.sampling.rows(&step, &judged) {
        let why = why.map(|why| {
            format!("run {}, step {}: {why}; {rows} rows of dQ and dK are judged (--full: all)", run.run_id, dumped.step)
        });
        warnings.extend(why);
        samples = sampling::choose(rows, &step, &judged, dumped.step).into_iter().map(Some).collect();
    }
    progress.begin(&format!("step {}: replaying the reference", dumped.step), judged.len() as u64);
    let mut truths: Vec<Option<Truth>> = (0..loaded.len()).map(|_| None).collect();
    for (&m, sample) in judged.iter().zip(samples) {
        truths[m] = Some(Truth::new(&step, m, sample).map_err(|source| problem_error(dumped.step, m, source))?);
        progress.advance(1);
    }
    let over_step = whole && judged.len() == loaded.len();
    let presence = presence(run, dumped);
    let view = View { dumped, presence, step: &step, truths: &truths, judged: &judged, over_step, number: dumped.step, progress };
    let mut produced = Vec::new();
    let candidates = match &settings.candidates[..] {
        [] => &[Candidate::Recorded, Candidate::Cpu(Kernel::from_environment()?)],
        chosen => chosen,
    };
    for candidate in candidates {
        let made = match candidate {
            Candidate::Recorded => recorded::produce(dumped, &view, settings.contract.as_ref())?,
            Candidate::Cpu(kernel) => vec![cpu::produce(kernel, &view)?],
            Candidate::Command(line) => command::produce(line, &view, settings.contract.as_ref())?,
            #[cfg(feature = "pjrt")]
            Candidate::OnDevice(program) => vec![program.produce(&view, settings.contract.as_ref())?],
        };
        if made.is_empty() && !settings.candidates.is_empty() {
            warnings.push(format!("run {}, step {}: nothing is recorded to judge", run.run_id, dumped.step));
        }
        produced.extend(made);
    }
    produced.iter().map(|p| view.judge(&run.run_id, p)).collect()
}

fn problem_error(step: u64, microbatch: usize, source: fused_xent_kernels::problem::ProblemError) -> DiffError {
    DiffError::Problem { place: format!("step {step}, microbatch {microbatch}"), source }
}

/// One step with its truth.
struct View<'a> {
    /// Which process wrote what.
    dumped: &'a dump::Step,
    /// Which processes committed which microbatches.
    presence: Presence,
    step: &'a Step<'a>,
    truths: &'a [Option<Truth>],
    /// Places in `step.microbatches` that are judged.
    judged: &'a [usize],
    /// Whether all of the step's microbatches are judged, so that what accumulates can be.
    over_step: bool,
    number: u64,
    progress: &'a dyn Progress,
}

impl View<'_> {
    fn truth(&self, m: usize) -> &Truth {
        self.truths[m].as_ref().expect("every judged microbatch has its truth")
    }

    /// Judges a candidate under the strictest of its contracts under which it agrees.
    ///
    /// Where none fits, it is judged under the strictest that its dQ fits. A kernel that rounds dlogits shows it in dQ and in
    /// dK: where one of them keeps the strictest contract, a contract whose floor one of them stays far below, in every
    /// microbatch, is not the one that the kernel keeps.
    fn judge(&self, run_id: &str, produced: &Produced) -> Result<CandidateReport, DiffError> {
        let mut chosen: Option<(CandidateReport, Tolerances)> = None;
        let mut at_the_strictest: Option<Vec<Stage>> = None;
        let mut far_above = false;
        self.progress.begin(&format!("step {}: comparing {}", self.number, produced.name), produced.contracts.len() as u64);
        for contract in &produced.contracts {
            let (mut compared, tolerances) = self.compare(run_id, produced, contract, None)?;
            if let Some(factors) = self.rounded_cotangents(&compared) {
                let rounded = self.compare(run_id, produced, contract, Some(&factors))?.0;
                if rounded.verdict == Verdict::Agree {
                    compared = rounded;
                }
            }
            self.progress.advance(1);
            let all = |report: &CandidateReport, stage, is: fn(&TensorReport) -> bool| {
                reports(report, stage).is_some_and(|mut tensors| tensors.all(is))
            };
            let agrees = |report: &CandidateReport, stage| all(report, stage, |t| t.verdict == Verdict::Agree);
            let gradients = [Stage::DHidden, Stage::DUnembedding];
            let strict =
                at_the_strictest.get_or_insert_with(|| gradients.into_iter().filter(|&stage| agrees(&compared, stage)).collect());
            let far_below = |stage: &Stage| chosen.is_some() && is_far_below(&compared, &tolerances, *stage);
            let one_is_far_below = gradients.iter().any(far_below);
            if compared.verdict == Verdict::Agree && (strict.is_empty() || !one_is_far_below) {
                return Ok(if far_above { self.precisely_at_fault(run_id, produced)?.unwrap_or(compared) } else { compared });
            }
            far_above |= chosen.is_none() && largest_ratio(&compared) > FAR_ABOVE;
            if one_is_far_below {
                continue;
            }
            if !chosen.as_ref().is_some_and(|(report, _)| agrees(report, Stage::DHidden)) {
                chosen = Some((compared, tolerances));
            }
        }
        let (report, tolerances) = chosen.expect("every candidate has a contract");
        let findings = self.case(produced, &report, &tolerances).explain(self.progress);
        Ok(self.explained(produced, report, &tolerances, findings))
    }

    /// A judgement with what is known of where its errors come from.
    fn explained(
        &self,
        produced: &Produced,
        mut report: CandidateReport,
        tolerances: &Tolerances,
        findings: Vec<Finding>,
    ) -> CandidateReport {
        let substitution = substitute::substitute(&self.case(produced, &report, tolerances));
        if let Some(substitution) = &substitution {
            report.first_divergence = substitute::first_divergence(substitution, report.first_divergence);
        }
        report.substitution = substitution;
        report.crossing = self.crossing(produced, &report);
        report.findings = findings;
        report
    }

    /// The judgement under the strictest contract, if one fault explains precisely what a more generous one would allow.
    fn precisely_at_fault(&self, run_id: &str, produced: &Produced) -> Result<Option<CandidateReport>, DiffError> {
        let (report, tolerances) = self.compare(run_id, produced, &produced.contracts[0], None)?;
        let finding = self.case(produced, &report, &tolerances).precise_fault(self.progress);
        Ok(finding.map(|finding| self.explained(produced, report, &tolerances, vec![finding])))
    }

    fn case<'a>(&'a self, produced: &'a Produced, report: &'a CandidateReport, tolerances: &'a Tolerances) -> explain::Case<'a> {
        explain::Case {
            step: self.step,
            judged: self.judged,
            truths: self.truths,
            produced,
            tolerances,
            microbatches: &report.microbatches,
            accumulated: report.accumulated.as_ref().and_then(|a| a.tensors.first()),
        }
    }

    /// The factors that g rounded to bfloat16 leaves in the gradients of each judged microbatch, if these look like that. It is
    /// honest: one rounding of a number, the same in dQ and dK.
    fn rounded_cotangents(&self, report: &CandidateReport) -> Option<Vec<f64>> {
        let gradient = |tensor: &&TensorReport| tensor.name.starts_with("d_");
        let factors: Option<Vec<f64>> = self.judged.iter().map(|&m| self.step.cotangent_rounded(m)).collect();
        let looks_like = |(factor, m): (&f64, &MicrobatchReport)| {
            let mut scales = m.tensors.iter().filter(gradient).filter_map(|tensor| tensor.scale);
            scales.all(|scale| 4.0 * (scale - factor).abs() <= (factor - 1.0).abs())
        };
        factors.filter(|factors| {
            report.verdict == Verdict::Diverge
                && factors.iter().any(|&factor| factor != 1.0)
                && factors.iter().zip(&report.microbatches).filter(|(factor, _)| **factor != 1.0).all(looks_like)
        })
    }

    /// Compares with the reference, whose gradients carry `factors`, one for each judged microbatch, where there are any.
    fn compare(
        &self,
        run_id: &str,
        produced: &Produced,
        contract: &Contract,
        factors: Option<&[f64]>,
    ) -> Result<(CandidateReport, Tolerances), DiffError> {
        let mut total: Option<Accumulated> = None;
        let mut microbatches = Vec::new();
        let mut tolerances = Tolerances::default();
        let mut all_labels = Vec::new();
        for (place, (&m, stages)) in self.judged.iter().zip(&produced.microbatches).enumerate() {
            let floor = self.truth(m).floor(self.step, m, contract).map_err(|e| problem_error(self.number, m, e))?;
            let problem = &self.step.microbatches[m].problem;
            let factor = factors.map_or(1.0, |factors| factors[place]);
            let labels: Vec<Option<usize>> = problem.labels().iter().map(|label| label.column()).collect();
            let outcome = &self.truth(m).outcome;
            let reference = |stage: Stage| match stage {
                Stage::Loss | Stage::Lse | Stage::LabelLogits => outcome.stage(stage),
                _ if factor == 1.0 => outcome.stage(stage),
                _ => Cow::Owned(&*outcome.stage(stage) * factor),
            };
            let mut tolerated = BTreeMap::new();
            let tensors = stages
                .iter()
                .map(|(&stage, values)| {
                    let reference = reference(stage);
                    let tolerance = stage_error(&floor, stage).tolerance(reference.view(), values.precision);
                    let owners = owners::owners(self.dumped, self.step.microbatches[m].index, stage);
                    let context = self.context(m, stage, values.precision, &tolerance, &labels, &owners);
                    let mut tensor = compare(&context, values.values.view(), reference.view());
                    pattern::blame_input(&mut tensor, std::iter::once(problem));
                    tolerated.insert(stage, tolerance);
                    tensor
                })
                .collect();
            tolerances.microbatches.push(tolerated);
            if produced.accumulated.is_some() {
                Accumulated::add(&mut total, self.step, m, &reference(Stage::DUnembedding), &floor.unembedding.sum);
            }
            microbatches.push(MicrobatchReport {
                microbatch: self.step.microbatches[m].index,
                tokens: labels.len(),
                valid_tokens: labels.iter().flatten().count(),
                tensors,
            });
            all_labels.extend(labels);
        }
        pattern::over_microbatches(&mut microbatches);
        let accumulated = produced.accumulated.as_ref().zip(total).map(|(values, total)| {
            let tolerance = total.tolerance(values.precision);
            let stage = Stage::AccumulatedDUnembedding;
            let owners = owners::owners(self.dumped, self.step.microbatches[self.judged[0]].index, stage);
            let context = self.context(self.judged[0], stage, values.precision, &tolerance, &all_labels, &owners);
            let mut tensor = compare(&context, values.values.view(), total.value.view());
            pattern::blame_input(&mut tensor, self.judged.iter().map(|&m| &self.step.microbatches[m].problem));
            if tensor.pattern.is_some() {
                let rows = pattern::some_rows(values.values.nrows());
                let parts: Vec<_> = self.judged.iter().map(|&m| self.share_of_step(m, &rows)).collect();
                pattern::factors_of_microbatches(&mut tensor, &tolerance, values.values.view(), &rows, &parts);
            }
            let grad_norm = context.rows.is_none().then(|| grad_norm(values, &total, &tolerance));
            tolerances.accumulated = Some((tolerance, total.value));
            AccumulatedReport { tensors: vec![tensor], grad_norm }
        });
        let first_divergence = first_divergence(&microbatches, accumulated.as_ref());
        let report = CandidateReport {
            candidate: produced.name.clone(),
            description: produced.description.clone(),
            run_id: run_id.into(),
            step: self.number,
            verdict: if first_divergence.is_some() { Verdict::Diverge } else { Verdict::Agree },
            contract: ContractReport {
                source: produced.contract_source,
                cotangent: factors.map(|_| Precision::Bf16.name()),
                logits: contract.logits.name(),
                dlogits: contract.dlogits.name(),
                accumulate: contract.accumulate.name(),
                d_hidden: contract.d_hidden.name(),
                d_unembedding: contract.d_unembedding.name(),
            },
            sample: self.sample(),
            microbatches,
            accumulated,
            first_divergence,
            substitution: None,
            findings: vec![],
            crossing: None,
            presence: self.presence.clone(),
        };
        Ok((report, tolerances))
    }

    /// Where in the logits the worst of the gradients' errors comes from.
    fn crossing(&self, produced: &Produced, report: &CandidateReport) -> Option<Crossing> {
        let gradients = [Stage::DHidden, Stage::DUnembedding];
        let tensor = |place: usize, stage: Stage| report.microbatches[place].tensors.iter().find(|t| t.name == stage.name());
        let badness = |place: usize| {
            let bad = gradients.iter().filter_map(|&stage| tensor(place, stage)).filter(|t| t.verdict == Verdict::Diverge);
            bad.map(|t| if t.nonfinite == 0 { t.ratio } else { f64::NAN }).reduce(f64::max)
        };
        let places = (0..self.judged.len()).filter_map(|place| Some((place, badness(place).filter(|bad| bad.is_finite())?)));
        let (place, _) = places.max_by(|a, b| a.1.total_cmp(&b.1))?;
        let (m, stages) = (self.judged[place], &produced.microbatches[place]);
        let floors = gradients.map(|stage| tensor(place, stage).and_then(|t| t.noise_floor));
        self.truth(m).sample.is_none().then(|| crossing::crossing(self.step, m, self.truth(m), stages, floors))
    }

    /// What microbatch `m` adds to these rows of the accumulated dK.
    fn share_of_step(&self, m: usize, rows: &[usize]) -> Array2<f64> {
        self.truth(m).outcome.stage(Stage::DUnembedding).select(Axis(0), rows) * self.step.accumulation_factor()
    }

    fn context<'a>(
        &'a self,
        m: usize,
        stage: Stage,
        precision: Precision,
        tolerance: &'a Tolerance,
        labels: &'a [Option<usize>],
        owners: &'a [(Range<usize>, usize)],
    ) -> Context<'a> {
        let shape = self.step.microbatches[m].problem.shape();
        let of = if stage.rows_are() == RowsAre::VocabIds { shape.vocab } else { shape.tokens };
        Context { stage, precision, tolerance, labels, rows: self.truth(m).rows(stage), of, owners }
    }

    fn sample(&self) -> Option<SampleReport> {
        let samples = || self.judged.iter().filter_map(|&m| self.truth(m).sample.as_ref());
        let most = |rows: fn(&Sample) -> &[usize]| samples().map(|sample| rows(sample).len()).max();
        Some(SampleReport { token_rows: most(Sample::tokens)?, vocab_rows: most(Sample::ids)? })
    }
}

fn presence(run: &Run, dumped: &dump::Step) -> Presence {
    let torn = dumped.incomplete.iter().filter_map(|lack| lack.microbatch).zip(&dumped.torn);
    let folders = dumped.microbatches.iter().map(|(&m, folder)| (m, folder)).chain(torn);
    let absent = folders.flat_map(|(m, folder)| folder.absent().map(move |process| [process, m])).collect();
    Presence { processes: run.process_count, microbatches: dumped.num_microbatches, absent }
}

/// A ratio to the strictest contract's floor from which it is worth asking whether one fault makes it.
const FAR_ABOVE: f64 = 15.0;

fn largest_ratio(report: &CandidateReport) -> f64 {
    report.microbatches.iter().flat_map(|m| &m.tensors).map(|t| t.ratio).fold(0.0, f64::max)
}

/// A ratio to the floor that no honest rounding to 16 bits comes down to.
const FAR_BELOW: f64 = 0.6;

/// Whether a stage of a candidate stays so far below the floor in every microbatch that has it that the candidate does not have
/// the roundings that were assumed; `false` if it has no such stage.
fn is_far_below(report: &CandidateReport, tolerances: &Tolerances, stage: Stage) -> bool {
    let pairs = report.microbatches.iter().zip(&tolerances.microbatches);
    let mut seen = pairs.filter_map(|(m, tolerances)| {
        let tensor = m.tensors.iter().find(|t| t.name == stage.name())?;
        let expected = tolerances.get(&stage)?.l2_with_luck(0..tensor.shape[0]);
        Some(tensor.rel_l2.is_some_and(|error| error * tensor.reference_norm < FAR_BELOW * expected))
    });
    seen.next().is_some_and(|first| first && seen.all(|below| below))
}

/// The comparisons of a stage, in every microbatch that has it; `None` if the candidate does not.
fn reports(report: &CandidateReport, stage: Stage) -> Option<impl Iterator<Item = &TensorReport>> {
    let tensors = move || report.microbatches.iter().flat_map(|m| &m.tensors).filter(move |t| t.name == stage.name());
    tensors().next().map(|_| tensors())
}

fn grad_norm(values: &candidate::Values, total: &Accumulated, tolerance: &Tolerance) -> GradNorm {
    let (candidate, reference) = (compare::norm(values.values.view()), compare::norm(total.value.view()));
    let tolerance = compare::norm_tolerance(tolerance, total.value.view());
    let agrees = (candidate - reference).abs() <= tolerance;
    GradNorm { candidate, reference, tolerance, verdict: if agrees { Verdict::Agree } else { Verdict::Diverge } }
}

/// The first rung that breaks: by stage, then by microbatch; what accumulates comes last.
fn first_divergence(microbatches: &[MicrobatchReport], accumulated: Option<&AccumulatedReport>) -> Option<Divergence> {
    let diverges = |t: &&TensorReport| t.verdict == Verdict::Diverge;
    let of_microbatches = Stage::OF_A_MICROBATCH.iter().find_map(|stage| {
        let here = |m: &&MicrobatchReport| m.tensors.iter().filter(diverges).any(|t| t.name == stage.name());
        microbatches.iter().find(here).map(|m| Divergence {
            microbatch: Some(m.microbatch),
            stage: stage.name().into(),
            enters: None,
        })
    });
    of_microbatches.or_else(|| {
        let norm =
            |a: &AccumulatedReport| a.grad_norm.filter(|norm| norm.verdict == Verdict::Diverge).map(|_| "grad_norm".into());
        let stage = accumulated?.tensors.iter().find(diverges).map(|t| t.name.clone()).or_else(|| norm(accumulated?))?;
        Some(Divergence { microbatch: None, stage, enters: None })
    })
}
