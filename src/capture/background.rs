//! Writing in the background: arrays are handed over, and a thread of its own puts them into their folders.

use super::Capture;
use crate::dump::{DumpError, DumpErrorKind, ElementType, Elements, FolderWriter, Placement};
use half::{bf16, f16};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Elements of a dtype known at run time, aligned, in the machine's byte order.
#[derive(Debug)]
pub struct OwnedElements {
    dtype: ElementType,
    words: Vec<u64>,
    length: usize,
}

impl OwnedElements {
    /// `length` zero bytes of elements; `None` if that is no whole number of them.
    pub fn zeroed(dtype: ElementType, length: usize) -> Option<Self> {
        length.is_multiple_of(dtype.bytes()).then(|| Self { dtype, words: vec![0; length.div_ceil(8)], length })
    }

    /// The elements' bytes, in the machine's order.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.words.as_mut_bytes()[..self.length]
    }

    fn slice<T: FromBytes + Immutable>(&self) -> &[T] {
        <[T]>::ref_from_bytes(&self.words.as_bytes()[..self.length]).unwrap_or_default()
    }

    /// The elements.
    pub fn elements(&self) -> Elements<'_> {
        match self.dtype {
            ElementType::Bf16 => Elements::Bf16(self.slice::<bf16>()),
            ElementType::F16 => Elements::F16(self.slice::<f16>()),
            ElementType::F32 => Elements::F32(self.slice()),
            ElementType::F64 => Elements::F64(self.slice()),
            ElementType::I32 => Elements::I32(self.slice()),
            ElementType::I64 => Elements::I64(self.slice()),
            ElementType::U32 => Elements::U32(self.slice()),
        }
    }
}

/// A folder of the process: a step, and a microbatch or `None` for `shared`.
pub type Part = (u64, Option<usize>);

/// An array of a folder that could not be written; the folder stays uncommitted.
#[derive(Debug)]
pub struct Failure {
    /// The folder.
    pub part: Part,
    /// Why.
    pub error: DumpError,
}

enum Job {
    Tensor { part: Part, name: String, data: OwnedElements, placement: Placement },
    Commit(Part),
    Forget(u64),
}

#[derive(Default)]
struct Status {
    /// Jobs handed over and not yet done.
    jobs: usize,
    /// Bytes of their arrays.
    bytes: usize,
    failures: Vec<Failure>,
    written: u64,
}

#[derive(Default)]
struct Shared {
    status: Mutex<Status>,
    progress: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes the folders of a [`Capture`] from a thread of its own, each committed as soon as it is said to be whole.
///
/// An array may be handed over twice, as a rematerialised computation does: if it is the same bit for bit the second is
/// ignored, else it is a failure. Failures are kept until they are asked for; they never reach who hands over an array.
#[derive(Debug)]
pub struct BackgroundWriter {
    jobs: Option<Sender<Job>>,
    shared: Arc<Shared>,
    max_bytes: usize,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Status { jobs, bytes, .. } = *self.lock();
        f.debug_struct("Shared").field("jobs", &jobs).field("bytes", &bytes).finish_non_exhaustive()
    }
}

impl BackgroundWriter {
    /// Starts the thread. At most `max_bytes` of arrays wait for it, or one array if that is larger.
    ///
    /// # Errors
    /// The machine cannot start a thread.
    pub fn new(capture: Capture, max_bytes: usize) -> Result<Self, DumpError> {
        let (sender, receiver) = mpsc::channel();
        let shared = Arc::new(Shared::default());
        let worker = Worker { folders: HashMap::new(), shared: Arc::clone(&shared), capture };
        let place = worker.capture.root.clone();
        let spawned = thread::Builder::new().name("xent-capture".into()).spawn(move || worker.run(receiver));
        let thread = spawned.map_err(|e| DumpError::write(&place, e))?;
        Ok(Self { jobs: Some(sender), shared, max_bytes, thread: Some(thread) })
    }

    /// Hands over `data` as (a shard of) tensor `name` of a folder. Waits while too many bytes are under way.
    pub fn tensor(&self, part: Part, name: &str, data: OwnedElements, placement: Placement) {
        let bytes = data.length;
        let mut status = self.shared.lock();
        while status.bytes > 0 && status.bytes.saturating_add(bytes) > self.max_bytes {
            status = self.shared.progress.wait(status).unwrap_or_else(PoisonError::into_inner);
        }
        status.bytes += bytes;
        self.send(status, Job::Tensor { part, name: name.to_owned(), data, placement });
    }

    /// Says that all of a folder's arrays were handed over. It is committed, unless one of them failed.
    pub fn commit(&self, part: Part) {
        self.send(self.shared.lock(), Job::Commit(part));
    }

    /// Says that nothing more comes for a step. Folders of it that were not committed stay interrupted captures.
    pub fn forget(&self, step: u64) {
        self.send(self.shared.lock(), Job::Forget(step));
    }

    fn send(&self, mut status: MutexGuard<'_, Status>, job: Job) {
        // The thread lives until `jobs` is dropped.
        if self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok()) {
            status.jobs += 1;
        }
    }

    /// Waits until everything handed over so far is on disk or has failed; false if that takes longer than `timeout`.
    pub fn flush(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut status = self.shared.lock();
        while status.jobs > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            status = self.shared.progress.wait_timeout(status, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// The failures since the last call.
    pub fn take_failures(&self) -> Vec<Failure> {
        std::mem::take(&mut self.shared.lock().failures)
    }

    /// Bytes of arrays written so far.
    pub fn written(&self) -> u64 {
        self.shared.lock().written
    }
}

impl Drop for BackgroundWriter {
    /// Waits for what was handed over.
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // It catches every failure itself; there is nobody to tell of a panic.
            let _ = thread.join();
        }
    }
}

/// How a folder stands.
enum State {
    Open(Box<FolderWriter>),
    Committed,
    /// Why has been said.
    Failed,
}

/// A folder that arrays arrived for.
struct Folder {
    state: State,
    /// What arrived: by tensor, first index and copy.
    seen: HashMap<(String, Vec<usize>, usize), blake3::Hash>,
}

struct Worker {
    capture: Capture,
    folders: HashMap<Part, Folder>,
    shared: Arc<Shared>,
}

impl Worker {
    fn run(mut self, jobs: mpsc::Receiver<Job>) {
        for job in jobs {
            let (part, bytes, done) = match job {
                Job::Tensor { part, name, data, placement } => (part, data.length, self.tensor(part, name, &data, &placement)),
                Job::Commit(part) => (part, 0, self.commit(part)),
                Job::Forget(step) => {
                    self.folders.retain(|part, _| part.0 != step);
                    ((step, None), 0, Ok(0))
                }
            };
            let mut status = self.shared.lock();
            status.jobs -= 1;
            status.bytes -= bytes;
            match done {
                Ok(written) => status.written += written,
                Err(error) => status.failures.push(Failure { part, error }),
            }
            self.shared.progress.notify_all();
        }
    }

    fn folder(&mut self, part: Part) -> Result<&mut Folder, DumpError> {
        match self.folders.entry(part) {
            Entry::Occupied(entry) => Ok(entry.into_mut()),
            Entry::Vacant(entry) => {
                let folder = entry.insert(Folder { state: State::Failed, seen: HashMap::new() });
                folder.state = State::Open(Box::new(self.capture.at(part.0).folder(part.1)?));
                Ok(folder)
            }
        }
    }

    /// Returns the bytes written.
    fn tensor(&mut self, part: Part, name: String, data: &OwnedElements, placement: &Placement) -> Result<u64, DumpError> {
        let folder = self.folder(part)?;
        let digest = blake3::hash(data.elements().bytes());
        let key = (name, placement.region.start.clone(), placement.replica);
        let first = folder.seen.get(&key);
        if first == Some(&digest) {
            return Ok(0);
        }
        let unfit = |found: &str, expected: &str, remedy: &str| {
            let place = part.1.map_or_else(|| "shared".to_owned(), |m| format!("microbatch {m}"));
            let place = format_args!("step {}, {place}: {} at {:?}", part.0, key.0, key.1);
            Err(DumpError::new(DumpErrorKind::Data, place, found, expected, remedy))
        };
        if first.is_some() {
            folder.state = match std::mem::replace(&mut folder.state, State::Failed) {
                State::Committed => State::Committed,
                State::Open(_) | State::Failed => State::Failed,
            };
            return unfit(
                "it arrived twice, with different contents",
                "each array once, or a recomputation that gives the same bits",
                "give every microbatch its own number, as data, and every capture its own step; capture outside of jax.checkpoint",
            );
        }
        let done = match &mut folder.state {
            State::Open(writer) => writer.tensor(&key.0, data.elements(), placement),
            State::Committed => {
                return unfit("the folder is committed", "every array before the folder is committed", "commit it later");
            }
            State::Failed => return Ok(0),
        };
        match done {
            Ok(()) => {
                folder.seen.insert(key, digest);
                Ok(data.length as u64)
            }
            Err(error) => {
                folder.state = State::Failed;
                Err(error)
            }
        }
    }

    fn commit(&mut self, part: Part) -> Result<u64, DumpError> {
        let folder = self.folder(part)?;
        match std::mem::replace(&mut folder.state, State::Failed) {
            State::Open(writer) => writer.commit().map(|_| folder.state = State::Committed)?,
            other => folder.state = other,
        }
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::{CaptureOptions, CaptureSteps};
    use crate::dump::Dump;
    use std::path::Path;

    const SECOND: Duration = Duration::from_secs(60);

    fn writer(root: &Path, max_bytes: usize) -> BackgroundWriter {
        let options = CaptureOptions { steps: CaptureSteps::Every(1), num_microbatches: 2, ..Default::default() };
        BackgroundWriter::new(Capture::new(root, options).unwrap(), max_bytes).unwrap()
    }

    fn copied(dtype: ElementType, bytes: &[u8]) -> Option<OwnedElements> {
        let mut elements = OwnedElements::zeroed(dtype, bytes.len())?;
        elements.bytes_mut().copy_from_slice(bytes);
        Some(elements)
    }

    fn hand_over(writer: &BackgroundWriter, m: usize, hidden: f32) {
        let floats = |values: &[f32]| copied(ElementType::F32, values.as_bytes()).unwrap();
        writer.tensor((0, Some(m)), "hidden", floats(&[hidden; 6]), Placement::whole(&[3, 2]));
        let targets = copied(ElementType::I32, [0i32; 3].as_bytes()).unwrap();
        writer.tensor((0, Some(m)), "targets", targets, Placement::whole(&[3]));
    }

    #[test]
    fn folders_are_committed_as_they_are_whole() {
        let root = tempfile::tempdir().unwrap();
        let writer = writer(root.path(), 1);
        hand_over(&writer, 1, 2.0);
        hand_over(&writer, 0, 1.0);
        hand_over(&writer, 1, 2.0);
        writer.commit((0, Some(1)));
        hand_over(&writer, 1, 2.0);
        assert!(writer.flush(SECOND));
        assert!(writer.take_failures().is_empty());
        assert_eq!(writer.written(), 72);
        let dump = Dump::open(root.path()).unwrap();
        let step = &dump.runs()[0].steps[&0];
        let tensor = step.microbatches[&1].load("hidden").unwrap().unwrap().tensor;
        assert_eq!(tensor.f32_slice().unwrap(), [2.0; 6]);
        assert!(!step.microbatches.contains_key(&0), "it was not committed");
    }

    #[test]
    fn an_array_that_arrives_twice_and_differs_is_not_committed() {
        let root = tempfile::tempdir().unwrap();
        let writer = writer(root.path(), 1 << 20);
        hand_over(&writer, 0, 1.0);
        hand_over(&writer, 0, -1.0);
        writer.commit((0, Some(0)));
        assert!(writer.flush(SECOND));
        let failures = writer.take_failures();
        assert_eq!(failures.len(), 1);
        assert!(failures[0].error.to_string().starts_with("step 0, microbatch 0: hidden at [0, 0]: it arrived twice"));
        assert!(!root.path().join("proc_00000/step_00000000/mb_0000/manifest.json").exists());
    }

    #[test]
    fn what_cannot_be_written_is_said_once_and_the_rest_is_written() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("proc_00000/step_00000000")).unwrap();
        std::fs::write(root.path().join("proc_00000/step_00000000/mb_0000"), "in the way").unwrap();
        let writer = writer(root.path(), 1 << 20);
        for m in 0..2 {
            hand_over(&writer, m, 1.0);
            writer.commit((0, Some(m)));
        }
        assert!(writer.flush(SECOND));
        let failures = writer.take_failures();
        assert_eq!(failures.iter().map(|f| f.part).collect::<Vec<_>>(), [(0, Some(0))]);
        assert!(root.path().join("proc_00000/step_00000000/mb_0001/manifest.json").exists());
    }

    #[test]
    fn bytes_must_be_whole_elements() {
        assert!(copied(ElementType::F32, &[0; 6]).is_none());
        let odd = copied(ElementType::Bf16, &[0x80, 0x3F, 0, 0x40, 0x80, 0x40]).unwrap();
        let Elements::Bf16(values) = odd.elements() else { panic!("{:?}", odd.elements()) };
        assert_eq!(values.iter().map(|v| v.to_f32()).collect::<Vec<_>>(), [1.0, 2.0, 4.0]);
    }
}
