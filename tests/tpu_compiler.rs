//! The TPU kernels, compiled ahead for every generation by the TPU compiler.
//!
//! They are ignored unless FUSED_XENT_TEST_LIBTPU names libtpu.so: `make test` fetches two, of which the oldest knows no v7x. Each
//! program is compiled with just as much VMEM as the model says that its kernels take, so that what compiles here proves the model.
//! With less, the compiler gives windows one buffer and says nothing: so what it gave them is read as well.

use fused_xent::kernels::Dlogits;
use fused_xent::kernels::problem::{DType, Layout, LossOptions, Shape};
use fused_xent::kernels::tpu::{Backward, BackwardPlan, Form, Generation, Given, Program, Spec, Tile};
use fused_xent::pjrt::{CompileOptions, Executable, PjrtError, Plugin, Topology};
use std::sync::OnceLock;

fn plugin() -> &'static Plugin {
    static PLUGIN: OnceLock<Plugin> = OnceLock::new();
    PLUGIN.get_or_init(|| {
        let path = std::env::var("FUSED_XENT_TEST_LIBTPU").expect("FUSED_XENT_TEST_LIBTPU is the path of libtpu.so");
        Plugin::load(&path).unwrap()
    })
}

/// Whether it is the one that the model of VMEM is made for.
fn is_newest() -> bool {
    plugin().api_version() >= (0, 100)
}

fn topology(generation: Generation) -> Topology {
    plugin().tpu(generation).unwrap()
}

fn plain(tokens: usize, hidden: usize, vocab: usize) -> Spec {
    let shape = Shape { tokens, hidden, vocab };
    Spec { shape, layout: Layout::Vd, inputs: [DType::Bf16; 2], options: LossOptions::default() }
}

/// What is compiled for every generation: real shapes and the largest, then small ones with every option and type.
fn backwards() -> Vec<Backward> {
    let options = LossOptions {
        valid_vocab: Some(1500),
        logit_scale: 0.5,
        logit_softcap: Some(30.0),
        z_loss: 1e-4,
        label_smoothing: 0.1,
        ..LossOptions::default()
    };
    let odd = plain(600, 200, 1503);
    let everything = Spec { layout: Layout::Dv, options, ..odd };
    let float32 = Spec { inputs: [DType::F32; 2], ..odd };
    let mixed = Spec { inputs: [DType::Bf16, DType::F32], layout: Layout::Dv, ..odd };
    let all = Given { loss: true, lse: true, label_logits: true };
    let sums = Backward { gradients: [DType::Bf16, DType::F32], accumulate: true, ..Backward::plain(plain(2500, 4096, 128_256)) };
    vec![
        Backward::plain(plain(4096, 1024, 50304)),
        sums,
        Backward::plain(plain(1024, 8192, (1 << 18) - 1)),
        Backward::plain(plain(1, 1, 1)),
        Backward { dlogits: Dlogits::F32, ..Backward::plain(odd) },
        Backward {
            gradients: [DType::F32; 2],
            dlogits: Dlogits::Bf16x2,
            cotangents: all,
            accumulate: true,
            ..Backward::plain(everything)
        },
        Backward::plain(float32),
        Backward { gradients: [DType::F32; 2], ..Backward::plain(mixed) },
    ]
}

/// With the VMEM that the model allows its kernels, in place of all; the oldest compiler spills a little more.
fn compiled(program: &Program, devices: &Topology) -> Result<Executable, PjrtError> {
    if !is_newest() {
        return devices.compile_ahead(&program.text, &CompileOptions::default());
    }
    let marker = "size\\22: ";
    let given = program.text.split(marker).nth(1).expect("each kernel has a limit").split('}').next().unwrap();
    let [given, modelled] = [given, &program.vmem_bytes.to_string()].map(|bytes| format!("{marker}{bytes}}}"));
    let text = program.text.replace(&given, &modelled);
    assert_ne!(text, program.text);
    devices.compile_ahead(&text, &CompileOptions::default())
}

/// Kernels for which the compiler reports in its executable that they do not fetch tiles of K ahead, and those told not to; equal
/// kernels are compiled once. `None` where it reports nothing, as of large executables.
fn not_ahead(program: &Program, executable: &Executable) -> Option<[usize; 2]> {
    let report = executable.serialize().unwrap();
    let report = String::from_utf8_lossy(&report);
    let of_k: Vec<&str> = report.split("window allocation for operator input 1.").skip(1).collect();
    if of_k.is_empty() {
        return None;
    }
    let single = of_k.iter().filter(|rest| rest.split("This allocation ").nth(1).unwrap().starts_with("is single buffered"));
    let told = program.kernels.iter().filter(|(_, text)| {
        let windows = text.split("window_params = [").nth(1).unwrap();
        windows.split("window_bounds").nth(1).unwrap().contains("synchronous")
    });
    Some([single.count(), told.count()])
}

/// Compiles all of it. Beside arguments and results nothing may take N·V of anything, nor dK twice but from chunk to chunk.
fn compiles(generation: Generation) {
    let devices = topology(generation);
    for backward in backwards() {
        let spec = backward.spec;
        if !is_newest() && spec.shape.hidden > 1024 {
            continue;
        }
        let Shape { tokens, hidden, vocab } = spec.shape;
        let programs = [("forward", spec.forward(generation, None)), ("backward", backward.program(generation, None))];
        for (pass, program) in programs {
            let [of_q, of_k] = spec.inputs.map(DType::name);
            let what =
                format!("{generation} {pass} N = {tokens}, D = {hidden}, V = {vocab}, {of_q}, {of_k} as {:?}", spec.layout);
            let program = program.unwrap_or_else(|error| panic!("{what}: {error}"));
            let executable = match compiled(&program, &devices) {
                // The oldest cannot mask rows of bfloat16 on v4.
                Err(error) if !is_newest() && generation == Generation::V4 && pass == "backward" => {
                    assert!(error.to_string().contains("Target does not support this comparison"), "{what}: {error}");
                    continue;
                }
                result => result.unwrap_or_else(|error| panic!("{what}: {error}")),
            };
            let memory = executable.memory().unwrap();
            println!(
                "{what}: {} kernels, VMEM {} KiB, HBM beside arguments and results {} KiB, code {} KiB",
                program.kernels.len(),
                program.vmem_bytes >> 10,
                memory.workspace >> 10,
                memory.code >> 10
            );
            if vocab > 10_000 && is_newest() {
                match not_ahead(&program, &executable) {
                    Some([single, told]) => assert_eq!(single, told, "{what}: kernels that do not fetch K ahead"),
                    None => println!("{what}: no report of what is fetched ahead"),
                }
            }
            // Rows in whole tiles, columns in whole registers: Q and dQ of two cores in float32; K and dK where XLA lays them out anew,
            // and dK from chunk to chunk.
            let [of_tokens, of_vocab] = [tokens + 1024, vocab + 128].map(|rows| (rows * hidden.next_multiple_of(128)) as u64);
            let anew = u64::from(!hidden.is_multiple_of(128) || program.kernels.len() > 1);
            let most = match pass {
                "forward" => 8 * anew * (of_tokens + of_vocab) + 64 * tokens as u64,
                _ => 16 * of_tokens + 8 * anew * of_vocab,
            };
            assert!(memory.workspace <= most, "{what}: {} bytes of HBM, at most {most}", memory.workspace);
        }
    }
}

macro_rules! generations {
    ($($test:ident: $generation:ident,)*) => {$(
        #[test]
        #[ignore = "needs libtpu: `make test` runs it with FUSED_XENT_TEST_LIBTPU"]
        fn $test() {
            compiles(Generation::$generation);
        }
    )*};
}

generations! {
    libtpu_v4: V4,
    libtpu_v5e: V5e,
    libtpu_v5p: V5p,
    libtpu_v6e: V6e,
    libtpu_v7x: V7x,
}

/// Every form in every precision, whatever the plan would be.
#[test]
#[ignore = "needs libtpu: `make test` runs it with FUSED_XENT_TEST_LIBTPU"]
fn libtpu_forms() {
    let tile = Tile { tokens: 256, vocab: 256 };
    let devices = topology(Generation::V5p);
    for dlogits in Dlogits::ALL {
        for form in [
            Form::OnePass { at_once: 1024, cores: 1 },
            Form::OnePass { at_once: 512, cores: 2 },
            Form::TwoKernels { cores: 1 },
            Form::TwoKernels { cores: 2 },
        ] {
            let backward = Backward { dlogits, ..Backward::plain(plain(1000, 256, 3000)) };
            let program = backward.program(Generation::V5p, Some(BackwardPlan { tile, form })).unwrap();
            compiled(&program, &devices).unwrap_or_else(|error| panic!("{form:?} {dlogits:?}: {error}"));
        }
    }
}

/// What the tests above would say of a model that is too low: tiles that are not fetched ahead, or no program.
#[test]
#[ignore = "needs libtpu: `make test` runs it with FUSED_XENT_TEST_LIBTPU"]
fn libtpu_too_little_vmem() {
    let devices = topology(Generation::V6e);
    let program = plain(4096, 2048, 20000).forward(Generation::V6e, Some(Tile { tokens: 512, vocab: 512 })).unwrap();
    let with = |sixteenths: usize| {
        let program = Program { vmem_bytes: program.vmem_bytes / 16 * sixteenths, ..program.clone() };
        compiled(&program, &devices).map(|executable| not_ahead(&program, &executable))
    };
    let error = with(2).unwrap_err().to_string();
    assert!(error.contains("vmem"), "{error}");
    let reports: Vec<_> = (3..16).filter_map(|sixteenths| with(sixteenths).ok().flatten()).collect();
    assert!(reports.contains(&[1, 0]), "{reports:?}");
}
