//! MLIR to a shared object, by Debian's tools and the system's linker.

use libloading::{Library, Symbol};
use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock};

/// Tensors to loops, loops to LLVM. bfloat16 is widened and rounded in integer arithmetic; exp, log and tanh are the system's.
/// Nothing is fused, contracted or reassociated.
const PASSES: &str = "builtin.module(\
    func.func(convert-elementwise-to-linalg),one-shot-bufferize,buffer-deallocation-pipeline,func.func(convert-linalg-to-loops),convert-scf-to-cf,\
    arith-expand{include-bf16=true},expand-strided-metadata,lower-affine,convert-math-to-libm,finalize-memref-to-llvm,\
    convert-arith-to-llvm,convert-func-to-llvm{use-bare-ptr-memref-call-conv=true},convert-cf-to-llvm,reconcile-unrealized-casts)";

/// Compiled functions of two pointers.
pub struct Compiled {
    library: Library,
    _folder: tempfile::TempDir,
}

/// What the texts of this test became, so that each is compiled once.
pub fn compile(mlir: &str) -> Arc<Compiled> {
    static DONE: OnceLock<Mutex<HashMap<String, Arc<Compiled>>>> = OnceLock::new();
    let done = DONE.get_or_init(Mutex::default);
    if let Some(compiled) = done.lock().unwrap().get(mlir) {
        return compiled.clone();
    }
    let compiled = Arc::new(Compiled::new(mlir));
    done.lock().unwrap().insert(mlir.to_owned(), compiled.clone());
    compiled
}

impl Compiled {
    fn new(mlir: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let [object, library] = ["kernel.o", "kernel.so"].map(|name| folder.path().join(name));
        let lowered = run(&tool("mlir-opt"), &[&format!("--pass-pipeline={PASSES}")], mlir.as_bytes());
        let llvm = run(&tool("mlir-translate"), &["--mlir-to-llvmir"], &lowered);
        run(&tool("llc"), &["-O1", "-filetype=obj", "-relocation-model=pic", "-o", path(&object)], &llvm);
        run(Path::new("cc"), &["-shared", "-o", path(&library), path(&object), "-lm"], &[]);
        // SAFETY: it was made above, and has no initialisers.
        let library = unsafe { Library::new(&library) }.unwrap();
        Self { library, _folder: folder }
    }

    /// Calls a function with a step's numbers and its memory.
    pub fn call<T>(&self, name: &str, steps: &[i32], memory: &mut [T]) {
        // SAFETY: the translation gives every function these arguments.
        let function: Symbol<unsafe extern "C" fn(*const i32, *mut T)> = unsafe { self.library.get(name) }.unwrap();
        // SAFETY: it reads as many numbers as the kernel's grid has dimensions, and works on as much memory as its pieces take; both
        // are what the caller passes.
        unsafe { function(steps.as_ptr(), memory.as_mut_ptr()) }
    }
}

fn path(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

fn tool(name: &str) -> PathBuf {
    let tools = std::env::var_os("FUSED_XENT_MLIR").expect("FUSED_XENT_MLIR, what tests/scripts/mlir-tools prints");
    Path::new(&tools).join(name)
}

/// What a program makes of its input.
fn run(program: &Path, arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}", program.display()));
    let mut stdin = child.stdin.take().unwrap();
    std::thread::scope(|scope| {
        // A program that fails says why; that it did not read all of its input says nothing.
        scope.spawn(move || stdin.write_all(input).ok());
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}: {}", program.display(), String::from_utf8_lossy(&output.stderr));
        output.stdout
    })
}
