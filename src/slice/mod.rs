//! Cuts a small dump out of a large one that still shows what is wrong with it.
//!
//! Steps, microbatches and tokens can be cut: a row of dQ depends on its own token, on K, and on its cotangent, which the
//! slice's loss settles to be what it was. dK is a sum over all tokens, and the accumulated dK one over all microbatches: where
//! some are cut, it is dropped. The vocabulary is never cut: every token's lse runs over all of it.

mod cut;

use crate::diff::{self, Candidate, DiffError, Progress, Settings};
use crate::dump::{Dump, DumpError, DumpErrorKind, Run, Step};
use crate::files::folder_of;
use crate::report::model::{CandidateReport, Confidence, Verdict};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// What to keep, as far as it is said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// The run; needed if several have the step.
    pub run: Option<String>,
    /// The step; needed if there are several.
    pub step: Option<u64>,
    /// The microbatch; all of them without it.
    pub microbatch: Option<usize>,
    /// Rows of tokens, [start, end) ranges of the flattened microbatch; all of them without it.
    pub tokens: Option<Vec<Range<usize>>>,
}

/// What is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The run.
    pub run_id: String,
    /// The step.
    pub step: u64,
    /// The one microbatch; `None`: all of them.
    pub microbatch: Option<usize>,
    /// The rows of tokens, [start, end) ranges of the flattened microbatch; `None`: all of them, and what is summed over them.
    pub tokens: Option<Vec<Range<usize>>>,
}

/// A recorded tensor that the slice lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// Its name, after `shared/` if it accumulates over the step.
    pub tensor: String,
    /// Why it would not belong to the slice.
    pub reason: &'static str,
}

/// What the slice still shows.
#[derive(Clone, Debug, PartialEq)]
pub struct Shown {
    /// Where the ladder of stages first breaks.
    pub stage: String,
    /// The causes found, best first.
    pub causes: Vec<String>,
}

/// What was cut, and what is left of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Sliced {
    /// What is kept.
    pub cut: Cut,
    /// Tokens that are kept, of the microbatch that has most of them.
    pub tokens: usize,
    /// Its tokens in the dump.
    pub of_tokens: usize,
    /// What could not be kept.
    pub dropped: Vec<Dropped>,
    /// Size of the tensors that are kept, in bytes.
    pub bytes: u64,
    /// What it shows, where that was looked for.
    pub shown: Option<Shown>,
}

fn refused(path: &Path, found: impl Into<String>, expected: &str, remedy: impl Into<String>) -> DiffError {
    DumpError::new(DumpErrorKind::Settings, path.display(), found, expected, remedy).into()
}

/// Cuts what `request` asks for out of the dump at `from`, and writes it to `to`, which must not exist. Nothing is judged.
///
/// # Errors
/// A dump that cannot be read, a request that it does not meet or that leaves open what is meant, or a folder that cannot be
/// written.
pub fn cut(from: &Path, to: &Path, request: &Request) -> Result<Sliced, DiffError> {
    let dump = Dump::open(from)?;
    let (run, step) = choose(&dump, request)?;
    if let (None, Some(_), 2..) = (request.microbatch, &request.tokens, step.num_microbatches) {
        let found = format!("tokens, but no microbatch: step {} has {}", step.step, step.num_microbatches);
        return Err(refused(from, found, "the microbatch whose tokens are meant", "give --microbatch"));
    }
    let microbatch = request.microbatch.or(request.tokens.as_ref().map(|_| 0));
    let cut = Cut { run_id: run.run_id.clone(), step: step.step, microbatch, tokens: request.tokens.clone() };
    let mut bench = Bench::new(&dump, to)?;
    let sliced = bench.write(&cut)?;
    bench.keep(sliced)
}

/// The run and the step that are meant.
fn choose<'a>(dump: &'a Dump, request: &Request) -> Result<(&'a Run, &'a Step), DiffError> {
    let has = |run: &&Run| request.run.as_ref().is_none_or(|id| *id == run.run_id);
    let steps = dump.runs().iter().filter(has).flat_map(|run| run.steps.values().map(move |step| (run, step)));
    let steps: Vec<(&Run, &Step)> = steps.filter(|(_, s)| request.step.is_none_or(|number| number == s.step)).collect();
    let all = || dump.runs().iter().flat_map(|run| run.steps.keys().map(move |s| format!("step {s} of run {}", run.run_id)));
    let list = || all().collect::<Vec<_>>().join(", ");
    match steps[..] {
        [one] => Ok(one),
        [] => Err(refused(dump.path(), "no such step", "a step that the dump has", format!("it has {}", list()))),
        _ => Err(refused(dump.path(), format!("several steps: {}", list()), "one step", "give --step, and --run if need be")),
    }
}

/// Finds the smallest cut that still shows why the gradients recorded in the dump at `from` diverge, and writes it to `to`,
/// which must not exist.
///
/// The first step that diverges is kept; then its first microbatch that does, if it shows the same cause; then, without dK,
/// ever fewer of its tokens, as long as they show it.
///
/// # Errors
/// A dump that cannot be read, that diverges nowhere, or a folder that cannot be written.
pub fn smallest(from: &Path, to: &Path, progress: &dyn Progress) -> Result<Sliced, DiffError> {
    let dump = Dump::open(from)?;
    let mut bench = Bench::new(&dump, to)?;
    let report = diff::judge(from, &recorded(), progress)?;
    let Some(diverging) = report.candidates.iter().find(|c| c.verdict == Verdict::Diverge) else {
        let remedy = "give --step, --microbatch or --tokens to cut what it has";
        return Err(refused(from, "the recorded gradients diverge nowhere", "a divergence to be shown", remedy));
    };
    let mut wanted = Wanted::of(diverging);
    let whole = Cut { run_id: diverging.run_id.clone(), step: diverging.step, microbatch: None, tokens: None };
    let mut best = bench.write(&whole)?;
    best.shown = Some(shown(diverging));
    // Over the step alone, nothing smaller can show it.
    let Some(m) = diverging.first_divergence.as_ref().and_then(|d| d.microbatch) else { return bench.keep(best) };
    let alone = Cut { microbatch: Some(m), ..whole };
    if !bench.shows(&alone, &mut wanted, &mut best, progress)? {
        return bench.keep(best);
    }
    let tokens = best.of_tokens;
    let of_tokens = |range: &Range<usize>| Cut { tokens: Some(vec![range.clone()]), ..alone.clone() };
    let mut range = 0..tokens;
    if !bench.shows(&of_tokens(&range), &mut wanted, &mut best, progress)? {
        return bench.keep(best);
    }
    let mut piece = tokens / 2;
    while piece > 0 {
        let smaller = [range.start..range.end - piece, range.start + piece..range.end];
        let mut shows = |range: &Range<usize>| bench.shows(&of_tokens(range), &mut wanted, &mut best, progress);
        if shows(&smaller[0])? {
            range = smaller[0].clone();
        } else if shows(&smaller[1])? {
            range = smaller[1].clone();
        } else {
            piece /= 2;
        }
        piece = piece.min(range.len() / 2);
    }
    bench.keep(best)
}

fn recorded() -> Settings {
    Settings { candidates: vec![Candidate::Recorded], ..Settings::default() }
}

fn shown(report: &CandidateReport) -> Shown {
    Shown {
        stage: report.first_divergence.as_ref().map_or(String::new(), |d| d.stage.clone()),
        causes: report.findings.iter().map(|f| f.cause.clone()).collect(),
    }
}

/// What a slice must show.
struct Wanted {
    candidate: String,
    stage: String,
    /// The causes, sorted, and how sure the first of them is; `None` where a sample was judged, and no cause sought.
    causes: Option<(Vec<String>, Confidence)>,
}

impl Wanted {
    fn of(report: &CandidateReport) -> Self {
        let Shown { stage, mut causes } = shown(report);
        causes.sort_unstable();
        let first = report.findings.first().filter(|_| report.sample.is_none());
        Self { candidate: report.candidate.clone(), stage, causes: first.map(|f| (causes, f.confidence)) }
    }

    /// Whether `other` shows the same. A cause that is named may show in another stage; an unknown one is where it is.
    fn met_by(&self, other: &Self) -> bool {
        let Some((causes, confidence)) = &self.causes else { return other.stage == self.stage };
        let same = other.causes.as_ref().is_some_and(|(c, sure)| c == causes && *sure as u8 <= *confidence as u8);
        let named = !causes.iter().any(|cause| cause == "unknown");
        same && (named || other.stage == self.stage)
    }
}

/// Where slices are tried: a folder beside the one that the best of them will be.
struct Bench<'a> {
    dump: &'a Dump,
    to: PathBuf,
    folder: TempDir,
    tried: usize,
}

impl<'a> Bench<'a> {
    fn new(dump: &'a Dump, to: &Path) -> Result<Self, DiffError> {
        if fs::symlink_metadata(to).is_ok() {
            return Err(refused(to, "it exists already", "a folder to be made", "name another, or remove it"));
        }
        let folder = tempfile::Builder::new().prefix(".slicing-").tempdir_in(folder_of(to));
        let folder = folder.map_err(|e| DumpError::write(to, e))?;
        Ok(Self { dump, to: to.to_owned(), folder, tried: 0 })
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join(self.tried.to_string())
    }

    /// Writes `cut` in place of the one before.
    fn write(&mut self, cut: &Cut) -> Result<Sliced, DiffError> {
        self.tried += 1;
        Ok(cut::write(self.dump, cut, &self.path())?)
    }

    /// Whether `cut` shows what is wanted; it then takes the place of `best`.
    fn shows(&mut self, cut: &Cut, wanted: &mut Wanted, best: &mut Sliced, progress: &dyn Progress) -> Result<bool, DiffError> {
        let before = self.tried;
        let mut sliced = self.write(cut)?;
        let candidates = match diff::judge(&self.path(), &recorded(), progress) {
            Ok(report) => report.candidates,
            // All that was recorded is a sum over what was cut.
            Err(DiffError::NothingToJudge { .. }) => vec![],
            Err(e) => return Err(e),
        };
        let diverging = candidates.iter().filter(|c| c.verdict == Verdict::Diverge);
        let same = diverging.map(|c| (c, Wanted::of(c))).find(|(_, found)| found.candidate == wanted.candidate);
        let Some((candidate, found)) = same.filter(|(_, found)| wanted.met_by(found)) else {
            self.discard(self.tried);
            self.tried = before;
            return Ok(false);
        };
        if wanted.causes.is_none() {
            *wanted = found;
        }
        sliced.shown = Some(shown(candidate));
        *best = sliced;
        self.discard(before);
        Ok(true)
    }

    /// Room on the disk is all that is at stake: what is left goes with the folder.
    fn discard(&self, tried: usize) {
        _ = fs::remove_dir_all(self.folder.path().join(tried.to_string()));
    }

    /// Puts the last slice written to its place.
    fn keep(self, sliced: Sliced) -> Result<Sliced, DiffError> {
        fs::rename(self.path(), &self.to).map_err(|e| DumpError::write(&self.to, e))?;
        Ok(sliced)
    }
}
