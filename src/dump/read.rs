//! Opening a dump: which runs, steps and microbatches it holds, merged over processes. Only manifests are read here.

use super::error::{DumpError, DumpErrorKind};
use super::folder::{Committed, Folder};
use super::manifest::Manifest;
use super::names::{MANIFEST, part_folder, process_folder, step_folder};
use super::payload::require_plain_file;
use super::settings::LossSettings;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// A dump on disk. Opening it reads its manifests; tensors are mapped when they are loaded.
#[derive(Clone, Debug)]
pub struct Dump {
    path: PathBuf,
    runs: Vec<Run>,
    warnings: Vec<String>,
}

/// What the processes of one run captured.
#[derive(Clone, Debug)]
pub struct Run {
    /// Names the run.
    pub run_id: String,
    /// What wrote the dump (its first process).
    pub producer: String,
    /// Processes of the run, whether or not their folders are here.
    pub process_count: usize,
    /// The captured steps.
    pub steps: BTreeMap<u64, Step>,
    /// Folders without a manifest, relative to the dump, `/`-separated. In a dump of several runs such a folder counts to the
    /// run that committed other folders of its step on its process, else to every run.
    pub interrupted: Vec<PathBuf>,
}

/// One captured step.
#[derive(Clone, Debug)]
pub struct Step {
    /// Its number.
    pub step: u64,
    /// Its microbatches, captured or not.
    pub num_microbatches: usize,
    /// The loss.
    pub loss: LossSettings,
    /// What all microbatches share. Without tensors if no process committed it.
    pub shared: Folder,
    /// The microbatches that are whole.
    pub microbatches: BTreeMap<usize, Folder>,
    /// The folders that are not whole, `shared` and microbatches, in order.
    pub incomplete: Vec<Incomplete>,
    /// The microbatches that are not whole.
    pub(crate) torn: Vec<Folder>,
}

/// A folder of a step that lacks something, since processes have not committed it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incomplete {
    /// The microbatch; `None` for `shared`.
    pub microbatch: Option<usize>,
    /// The folder within each process's, such as `step_00000000/mb_0001`.
    pub folder: PathBuf,
    /// What is missing, and whose it is.
    pub reason: String,
}

impl Dump {
    /// Opens the dump at `path`, the folder that holds `proc_*`.
    ///
    /// # Errors
    /// A path that holds no dump, a dump of which nothing is committed, or the first thing that is wrong with a manifest or
    /// between manifests. [`verify`](super::verify()) lists all of them.
    pub fn open(path: &Path) -> Result<Dump, DumpError> {
        let mut problems = Vec::new();
        let scan = Scan::of(path, &mut problems)?;
        match problems.into_iter().next() {
            Some(first) => Err(first),
            None => Ok(scan.dump),
        }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The runs, by `run_id`.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// What a reader should be told once, such as that checksums are missing.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

/// The dumps at `path`: itself if it holds `proc_*` folders, else its sub-folders that do, sorted.
///
/// # Errors
/// There is none, or a folder cannot be read.
pub fn find_dumps(path: &Path) -> Result<Vec<PathBuf>, DumpError> {
    if holds_processes(path)? {
        return Ok(vec![path.to_owned()]);
    }
    let mut dumps = Vec::new();
    for name in subfolders(path)? {
        let sub = path.join(name);
        if holds_processes(&sub)? {
            dumps.push(sub);
        }
    }
    if dumps.is_empty() { Err(not_a_dump(path)) } else { Ok(dumps) }
}

fn holds_processes(path: &Path) -> Result<bool, DumpError> {
    Ok(subfolders(path)?.iter().any(|name| name.starts_with("proc_")))
}

fn not_a_dump(path: &Path) -> DumpError {
    let expected = "a dump (a folder that holds proc_00000, …) or a folder of dumps";
    DumpError::new(DumpErrorKind::NotADump, path.display(), "it holds no proc_* folder", expected, "give the folder of a dump")
}

/// The names of `path`'s folders (links to folders included), sorted. Names that are not UTF-8 are none of the format's.
fn subfolders(path: &Path) -> Result<Vec<String>, DumpError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path).map_err(|e| DumpError::read(path, e))? {
        let entry = entry.map_err(|e| DumpError::read(path, e))?;
        if let Ok(name) = entry.file_name().into_string()
            && entry.path().is_dir()
        {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// The numbered folders `prefix…` of `path`, by number. One that is not named as `format` would is a problem.
fn numbered(path: &Path, prefix: &str, format: impl Fn(u64) -> String, problems: &mut Vec<DumpError>) -> Vec<u64> {
    let names = subfolders(path).unwrap_or_else(|e| {
        problems.push(e);
        Vec::new()
    });
    let mut numbers = Vec::new();
    for name in names.iter().filter(|name| name.starts_with(prefix)) {
        let number = name[prefix.len()..].parse().ok();
        match number.filter(|&n| format(n) == *name) {
            Some(n) => numbers.push(n),
            None => problems.push(DumpError::new(
                DumpErrorKind::FolderName,
                path.join(name).display(),
                "the name is not one of the format's",
                format!("a name such as {}", format(number.unwrap_or(0))),
                "rename the folder, or move it out of the dump",
            )),
        }
    }
    numbers.sort_unstable();
    numbers
}

/// A dump, and what `verify` counts on the way.
pub(crate) struct Scan {
    pub dump: Dump,
    /// Committed folders whose manifest could be read.
    pub folders: usize,
    /// Folders without a manifest, relative to the dump.
    pub interrupted: Vec<PathBuf>,
}

impl Scan {
    /// Reads every manifest of the dump at `path`, and puts what is wrong into `problems`.
    pub fn of(path: &Path, problems: &mut Vec<DumpError>) -> Result<Self, DumpError> {
        if !holds_processes(path)? {
            return Err(not_a_dump(path));
        }
        let mut runs: BTreeMap<String, Vec<Committed>> = BTreeMap::new();
        let mut interrupted = Vec::new();
        for process in numbered(path, "proc_", |n| process_folder(n as usize), problems) {
            let process_path = path.join(process_folder(process as usize));
            for step in numbered(&process_path, "step_", step_folder, problems) {
                let step_path = process_path.join(step_folder(step));
                let microbatches = numbered(&step_path, "mb_", |n| part_folder(Some(n as usize)), problems);
                let shared = step_path.join(part_folder(None)).is_dir().then_some(None);
                for part in shared.into_iter().chain(microbatches.into_iter().map(|m| Some(m as usize))) {
                    let folder = step_path.join(part_folder(part));
                    if fs::symlink_metadata(folder.join(MANIFEST)).is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound) {
                        interrupted.push((process as usize, step, relative(process as usize, step, part)));
                        continue;
                    }
                    match read_manifest(&folder, process as usize, step, part) {
                        Ok(manifest) => {
                            runs.entry(manifest.id.run_id.clone()).or_default().push(Committed { manifest, folder });
                        }
                        Err(e) => problems.push(e),
                    }
                }
            }
        }
        if runs.is_empty() && problems.is_empty() {
            let found = format!("none of its folders is committed ({} interrupted)", interrupted.len());
            let expected = "at least one folder with a manifest.json";
            let remedy = "let the capture finish, or capture again";
            return Err(DumpError::new(DumpErrorKind::Empty, path.display(), found, expected, remedy));
        }
        let folders = runs.values().map(Vec::len).sum();
        let unchecked = runs.values().flatten().flat_map(|c| &c.manifest.tensors).flat_map(|t| &t.shards);
        let unchecked = unchecked.filter(|s| s.blake3.is_none()).count();
        let claims: Vec<Vec<usize>> = interrupted.iter().map(|(process, step, _)| claimants(&runs, *process, *step)).collect();
        let runs = runs.into_iter().enumerate().map(|(i, (run_id, committed))| {
            let own = interrupted.iter().zip(&claims).filter(|(_, claim)| claim.contains(&i));
            let interrupted = own.map(|((_, _, folder), _)| folder.clone()).collect();
            Run::merge(path, run_id, committed, interrupted, problems)
        });
        let runs = runs.collect();
        let warnings = (unchecked > 0).then(|| {
            let plural = if unchecked == 1 { "" } else { "s" };
            format!("{unchecked} payload file{plural} without a BLAKE3 in the manifest: damage to them cannot be noticed")
        });
        Ok(Self {
            dump: Dump { path: path.to_owned(), runs, warnings: warnings.into_iter().collect() },
            folders,
            interrupted: interrupted.into_iter().map(|(_, _, folder)| folder).collect(),
        })
    }
}

fn relative(process: usize, step: u64, part: Option<usize>) -> PathBuf {
    format!("{}/{}/{}", process_folder(process), step_folder(step), part_folder(part)).into()
}

/// The runs, by position, to which an interrupted folder of that process and step counts.
fn claimants(runs: &BTreeMap<String, Vec<Committed>>, process: usize, step: u64) -> Vec<usize> {
    let committed_here = |c: &Committed| c.manifest.id.process_index == process && c.manifest.id.step == step;
    let here: Vec<usize> = runs.values().enumerate().filter(|(_, run)| run.iter().any(committed_here)).map(|(i, _)| i).collect();
    if here.is_empty() { (0..runs.len()).collect() } else { here }
}

fn read_manifest(folder: &Path, process: usize, step: u64, part: Option<usize>) -> Result<Manifest, DumpError> {
    require_plain_file(&folder.join(MANIFEST), "the manifest")?;
    let manifest = Manifest::read(folder)?;
    let id = &manifest.id;
    if (id.process_index, id.step, id.microbatch) != (process, step, part) {
        return Err(DumpError::new(
            DumpErrorKind::Identity,
            folder.join(MANIFEST).display(),
            format!("it describes {}", id.relative()),
            format!("{}, the folder it lies in", relative(process, step, part).display()),
            "move the folder to its place, or correct process_index, step and microbatch",
        ));
    }
    Ok(manifest)
}

impl Run {
    fn merge(
        root: &Path,
        run_id: String,
        committed: Vec<Committed>,
        interrupted: Vec<PathBuf>,
        problems: &mut Vec<DumpError>,
    ) -> Self {
        let first = &committed[0].manifest.id;
        let (producer, process_count) = (first.producer.clone(), first.process_count);
        disagreements(&committed, "process_count", |m| m.id.process_count, problems);
        let mut by_step: BTreeMap<u64, Vec<Committed>> = BTreeMap::new();
        for c in committed {
            by_step.entry(c.manifest.id.step).or_default().push(c);
        }
        let steps = by_step.into_iter().map(|(step, c)| (step, Step::merge(root, step, process_count, c, problems))).collect();
        Self { run_id, producer, process_count, steps, interrupted }
    }
}

/// Puts a problem for the first manifest that says another value than the first manifest.
fn disagreements<T: PartialEq + std::fmt::Debug>(
    committed: &[Committed],
    member: &str,
    value: impl Fn(&Manifest) -> T,
    problems: &mut Vec<DumpError>,
) {
    let Some((first, others)) = committed.split_first() else { return };
    let expected = value(&first.manifest);
    if let Some(other) = others.iter().find(|c| value(&c.manifest) != expected) {
        problems.push(DumpError::new(
            DumpErrorKind::Disagreement,
            format_args!("{}: {member}", other.folder.join(MANIFEST).display()),
            format!("{:?}", value(&other.manifest)),
            format!("{expected:?}, as {} says", first.folder.join(MANIFEST).display()),
            "all manifests of one run and step must agree; another run needs another run_id",
        ));
    }
}

impl Step {
    fn merge(root: &Path, step: u64, process_count: usize, committed: Vec<Committed>, problems: &mut Vec<DumpError>) -> Self {
        let id = &committed[0].manifest.id;
        let (num_microbatches, loss) = (id.num_microbatches, id.loss);
        disagreements(&committed, "num_microbatches", |m| m.id.num_microbatches, problems);
        disagreements(&committed, "loss", |m| m.id.loss, problems);
        let mut parts: BTreeMap<Option<usize>, Vec<Committed>> = BTreeMap::new();
        for c in committed {
            parts.entry(c.manifest.id.microbatch).or_default().push(c);
        }
        let mut merge = |part: Option<usize>| {
            let name = format!("{}/{}", step_folder(step), part_folder(part));
            let found = parts.remove(&part).unwrap_or_default();
            let folder = Folder::merge(root, &name, process_count, &found, problems);
            let reason = folder.incomplete();
            (folder, reason.map(|reason| Incomplete { microbatch: part, folder: name.into(), reason }))
        };
        let (shared, lack) = merge(None);
        let mut incomplete = Vec::from_iter(lack);
        let (mut microbatches, mut torn) = (BTreeMap::new(), Vec::new());
        for m in 0..num_microbatches {
            match merge(Some(m)) {
                (folder, None) => _ = microbatches.insert(m, folder),
                (folder, Some(lack)) => {
                    torn.push(folder);
                    incomplete.push(lack);
                }
            }
        }
        Self { step, num_microbatches, loss, shared, microbatches, incomplete, torn }
    }
}
