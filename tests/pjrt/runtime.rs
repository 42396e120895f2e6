//! Devices, tensors, programs: what goes in comes out, and everything is freed.

use super::support::{client, device, plugin, plugin_name};
use fused_xent::kernels::problem::{DType, Layout, LossOptions, Shape};
use fused_xent::kernels::stablehlo::{Spec, chunked, naive};
use fused_xent::pjrt::{Code, CompileOptions, Element, Options, PjrtError, Value};

const ALL: [Element; 13] = [
    Element::I1,
    Element::I8,
    Element::I16,
    Element::I32,
    Element::I64,
    Element::Ui8,
    Element::Ui16,
    Element::Ui32,
    Element::Ui64,
    Element::F16,
    Element::F32,
    Element::F64,
    Element::Bf16,
];

/// x·2 of two floats.
const TWICE: &str = "module {
  func.func public @main(%x: tensor<2xf32>) -> (tensor<2xf32>, tensor<1x2xbf16>) {
    %0 = stablehlo.add %x, %x : tensor<2xf32>
    %1 = stablehlo.convert %0 : (tensor<2xf32>) -> tensor<2xbf16>
    %2 = stablehlo.reshape %1 : (tensor<2xbf16>) -> tensor<1x2xbf16>
    return %0, %2 : tensor<2xf32>, tensor<1x2xbf16>
  }
}";

fn floats(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// Every bit pattern of 16 bits, NaNs with their payloads among them.
#[test]
#[ignore = "needs a PJRT plugin: `make test` runs it with FUSED_XENT_TEST_PLUGIN"]
fn tensors_come_back_bit_for_bit() {
    let device = device();
    for element in ALL {
        let bytes: Vec<u8> = match element {
            Element::I1 => (0..256).map(|i| i % 3 & 1).map(|i: u16| i as u8).collect(),
            _ if element.size() == 1 => (0..=255).collect(),
            _ => (0..=u16::MAX).flat_map(|i| i.to_le_bytes()).collect(),
        };
        let count = bytes.len() / element.size();
        for dims in [vec![count], vec![2, count / 2], vec![count / 8, 2, 4]] {
            let there = device.upload(element, &dims, &bytes).unwrap();
            assert_eq!((there.element().unwrap(), there.dims().unwrap()), (element, dims.clone()));
            let back = there.to_host().unwrap();
            assert_eq!((back.element, &back.dims), (element, &dims));
            assert!(back.bytes == bytes, "{element:?} {dims:?}");
        }
        let one = device.upload(element, &[], &bytes[..element.size()]).unwrap();
        assert_eq!(one.to_host().unwrap().bytes, bytes[..element.size()]);
        let none = device.upload(element, &[3, 0], &[]).unwrap().to_host().unwrap();
        assert_eq!((none.dims, none.bytes), (vec![3, 0], vec![]));
    }
}

#[test]
#[ignore = "needs a PJRT plugin: `make test` runs it with FUSED_XENT_TEST_PLUGIN"]
fn a_program_runs_and_leaves_its_arguments() {
    let device = device();
    assert!(!device.kind().unwrap().is_empty() && !client().platform().unwrap().is_empty());
    assert!(!client().platform_version().unwrap().is_empty());
    let program = device.compile(TWICE, &CompileOptions::default()).unwrap();
    let expected = [(Element::F32, vec![2]), (Element::Bf16, vec![1, 2])];
    assert_eq!(program.executable().outputs(), expected);
    assert!(!program.executable().name().unwrap().is_empty());
    let x = device.upload(Element::F32, &[2], &floats(&[1.5, -0.25])).unwrap();
    for _ in 0..2 {
        let results = program.execute(&[&x]).unwrap();
        assert_eq!(results[0].to_host().unwrap().bytes, floats(&[3.0, -0.5]));
        assert_eq!(results[1].to_host().unwrap().bytes, [0x40, 0x40, 0x00, 0xbf]);
    }
    assert_eq!(x.to_host().unwrap().bytes, floats(&[1.5, -0.25]));
}

#[test]
#[ignore = "needs a PJRT plugin: `make test` runs it with FUSED_XENT_TEST_PLUGIN"]
fn what_is_wrong_is_said_in_the_plugins_words() {
    let device = device();
    let module = TWICE.replace("stablehlo.add", "stablehlo.addd");
    let error = device.compile(&module, &CompileOptions::default()).unwrap_err();
    assert!(error.code().is_some() && error.to_string().contains("PJRT_Client_Compile"), "{error}");

    let error = device.upload(Element::F32, &[2, 2], &[0; 15]).unwrap_err();
    assert_eq!(error.to_string(), "a tensor [2, 2] of f32: found 15 bytes, expected 16");
    let error = device.upload(Element::F64, &[1 << 40, 1 << 40], &[]).unwrap_err();
    assert!(matches!(error, PjrtError::Mismatch { .. }), "{error}");

    let available = client().devices().unwrap().len();
    let error = client().device(available).unwrap_err();
    assert!(matches!(error, PjrtError::NoDevice { asked, .. } if asked == available), "{error}");
}

/// Where V grows, the chunked program needs room for at most another dK in float32: no logits.
#[test]
#[ignore = "needs a PJRT plugin: `make test` runs it with FUSED_XENT_TEST_PLUGIN"]
fn the_chunked_workspace_does_not_grow_with_the_logits() {
    let (tokens, hidden, tile) = (256, 32, 512);
    let workspace = |vocab: usize, tile: Option<usize>| {
        let spec = Spec {
            shape: Shape { tokens, hidden, vocab },
            layout: Layout::Vd,
            inputs: [DType::Bf16; 2],
            gradients: [DType::Bf16, DType::F32],
            options: LossOptions::default(),
            bf16_logits: false,
            bf16_dlogits: true,
        };
        let program = tile.map_or_else(|| naive(&spec), |tile| chunked(&spec, tile));
        let compiled = device().compile(&program.text, &CompileOptions::default()).unwrap();
        compiled.executable().memory().unwrap().workspace
    };
    let (narrow, wide) = (4 * tile, 32 * tile);
    let more = |rows: usize| ((wide - narrow) * rows * size_of::<f32>()) as u64;
    let (of_narrow, of_wide) = (workspace(narrow, Some(tile)), workspace(wide, Some(tile)));
    assert!(of_wide <= of_narrow + more(hidden) + 4096, "{of_narrow} bytes at V = {narrow}, {of_wide} at {wide}");
    assert!(workspace(wide, None) >= of_wide + more(tokens) / 2, "the naive one holds all logits");
}

#[test]
#[ignore = "needs the CPU plugin: `make test` runs it with FUSED_XENT_TEST_PLUGIN"]
fn cpu_devices_are_apart() {
    let options: Options = [("cpu_device_count".to_owned(), Value::Int(3))].into();
    let client = plugin().client(&options).unwrap();
    let devices = client.devices().unwrap();
    assert_eq!(devices.iter().map(|device| device.id().unwrap()).collect::<Vec<_>>(), [0, 1, 2]);
    let on = |i: usize, x: f32| devices[i].upload(Element::F32, &[2], &floats(&[x, x])).unwrap();
    let programs: Vec<_> = devices.iter().map(|d| d.compile(TWICE, &CompileOptions::default()).unwrap()).collect();
    for (i, program) in programs.iter().enumerate() {
        let x = on(i, i as f32);
        assert_eq!(program.execute(&[&x]).unwrap()[0].to_host().unwrap().bytes, floats(&[2.0 * i as f32; 2]));
    }
    let error = programs[1].execute(&[&on(2, 1.0)]).unwrap_err();
    assert_eq!(error.code(), Some(Code::InvalidArgument), "{error}");
    let error = programs[0].execute(&[]).unwrap_err();
    assert!(error.to_string().contains("argument"), "{error}");
}

#[test]
#[ignore = "needs the CPU plugin: `make test` runs it with FUSED_XENT_TEST_PLUGIN"]
fn cpu_plugin_refuses_unknown_options() {
    let refused = |name: &str, value| plugin().client(&[(name.to_owned(), value)].into()).unwrap_err().to_string();
    let unknown = refused("devices", Value::Int(2));
    assert!(unknown.ends_with("option devices: unknown, or of another type; expected cpu_device_count, an int64"), "{unknown}");
    assert!(refused("cpu_device_count", Value::Bool(true)).contains("another type"));
    assert!(refused("cpu_device_count", Value::Int(0)).ends_with("expected 1 to 4096"));
    let error = plugin().topology("v5e:1x1", &Options::new()).unwrap_err();
    assert_eq!(error.code(), Some(Code::Unimplemented), "{error}");
}

#[test]
#[ignore = "needs the CPU plugin: `make test` runs it with FUSED_XENT_TEST_PLUGIN"]
fn cpu_program_takes_options_of_the_compiler() {
    let compile = |name: &str, value| {
        let overrides = [(name.to_owned(), value)].into();
        device().compile(TWICE, &CompileOptions { overrides }).map(drop)
    };
    compile("xla_cpu_enable_fast_math", Value::Bool(false)).unwrap();
    let error = compile("xla_no_such_option", Value::Int(1)).unwrap_err();
    assert!(error.to_string().contains("xla_no_such_option"), "{error}");
}

/// Runs alone in a process of its own: other tests hold objects too.
#[test]
#[ignore = "needs the CPU plugin: `make test` runs it with FUSED_XENT_TEST_PLUGIN"]
fn cpu_objects_are_all_freed() {
    const ALONE: &str = "FUSED_XENT_TEST_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let this = std::env::current_exe().unwrap();
        let mut alone = std::process::Command::new(this);
        alone.args(["--include-ignored", "--exact", "runtime::cpu_objects_are_all_freed"]).env(ALONE, "1");
        let output = alone.output().unwrap();
        assert!(
            output.status.success(),
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        return;
    }
    let path = plugin().path().to_owned();
    // SAFETY: the plugin is loaded already.
    let library = unsafe { libloading::Library::new(path).unwrap() };
    // SAFETY: it exports the function with this type.
    let live = || unsafe { library.get::<unsafe extern "C" fn() -> i64>(b"fused_xent_live_objects").unwrap()() };
    assert_eq!(live(), 0, "{}", plugin_name());
    let kept = {
        let client = plugin().client(&Options::new()).unwrap();
        let device = client.device(1).unwrap();
        let program = device.compile(TWICE, &CompileOptions::default()).unwrap();
        assert!(live() >= 3, "the count counts");
        _ = (program.executable().memory().unwrap(), program.executable().cost().unwrap());
        assert!(!program.executable().serialize().unwrap().is_empty());
        let x = device.upload(Element::F32, &[2], &floats(&[1.0, 2.0])).unwrap();
        let mut results = program.execute(&[&x]).unwrap();
        results[0].to_host().unwrap();
        // Errors on the way.
        device.compile("module {", &CompileOptions::default()).unwrap_err();
        program.execute(&[]).unwrap_err();
        client.device(7).unwrap_err();
        results.pop().unwrap()
    };
    // One buffer, and the client that it needs: everything else is gone, though they were made first.
    assert_eq!(live(), 2);
    assert_eq!(kept.to_host().unwrap().dims, [1, 2]);
    drop(kept);
    assert_eq!(live(), 0);
}
