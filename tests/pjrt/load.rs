//! What is no plugin, or none that can be served: one error each. The plugins are stubs, compiled here.

use fused_xent::pjrt::{Code, Options, PjrtError, Plugin};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A plugin of version 0.`minor` with `functions` functions, of which starting it fails with `code`, if not 0.
pub fn stub(folder: &Path, minor: u32, functions: usize, code: u32) -> PathBuf {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/pjrt/stub.c");
    let library = folder.join(format!("stub-{minor}-{functions}-{code}.so"));
    let defines = [format!("-DMINOR={minor}"), format!("-DFUNCTIONS={functions}"), format!("-DCODE={code}")];
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let status = Command::new(compiler).args(["-shared", "-fPIC", "-o"]).arg(&library).arg(source).args(defines).status();
    assert!(status.expect("Rust needs a C compiler to link, too").success());
    library
}

fn refusal(path: &Path) -> PjrtError {
    Plugin::load(path.to_str().unwrap()).unwrap_err()
}

#[test]
fn a_missing_plugin_says_where_it_was_looked_for() {
    let error = Plugin::load("./no/such/plugin.so").unwrap_err();
    assert_eq!(
        error.to_string(),
        "PJRT plugin \"./no/such/plugin.so\": not found; looked for a file; expected a name (cpu, cuda, rocm, tpu) or the path of \
         a plugin's library: name a file that exists"
    );
    let error = Plugin::load("abacus").unwrap_err();
    assert!(error.to_string().ends_with("set FUSED_XENT_PJRT_PLUGINS=name:path"), "{error}");
}

#[test]
fn a_wrong_file_is_told_from_a_wrong_library() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("plugin.so");
    fs::write(&text, "no library").unwrap();
    let error = refusal(&text);
    assert!(matches!(error, PjrtError::NotLoadable { .. }) && error.to_string().contains("cannot be loaded"), "{error}");

    let source = folder.path().join("empty.c");
    fs::write(&source, "int nothing;\n").unwrap();
    let library = folder.path().join("libempty.so");
    assert!(Command::new("cc").args(["-shared", "-o"]).arg(&library).arg(&source).status().unwrap().success());
    let error = refusal(&library);
    assert!(matches!(error, PjrtError::NotAPlugin { .. }) && error.to_string().contains("GetPjrtApi"), "{error}");
}

#[test]
fn an_old_version_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = stub(folder.path(), 53, 138, 0);
    let expected = format!(
        "PJRT plugin {}: has version 0.53 of the PJRT API; expected 0.54 or a later 0.x; install a newer plugin",
        path.display()
    );
    assert_eq!(refusal(&path).to_string(), expected);
    assert_eq!(Plugin::load(stub(folder.path(), 54, 138, 0).to_str().unwrap()).unwrap().api_version(), (0, 54));
}

#[test]
fn a_plugin_that_does_not_start_is_quoted() {
    let folder = tempfile::tempdir().unwrap();
    let path = stub(folder.path(), 90, 138, 10);
    let error = refusal(&path);
    assert_eq!(error.code(), Some(Code::Aborted));
    let expected = format!("PJRT plugin {}: PJRT_Plugin_Initialize: aborted: another process holds the stub", path.display());
    assert_eq!(error.to_string(), expected);
}

/// The table of an older plugin ends earlier.
#[test]
fn a_function_beyond_the_table_is_not_called() {
    let folder = tempfile::tempdir().unwrap();
    let path = stub(folder.path(), 60, 10, 0);
    let plugin = Plugin::load(path.to_str().unwrap()).unwrap();
    let error = plugin.client(&Options::new()).unwrap_err();
    assert!(matches!(error, PjrtError::Lacks { call: "PJRT_Client_Create", .. }), "{error}");
    // Here the table is long enough, and the entry empty.
    let path = stub(folder.path(), 60, 138, 0);
    let plugin = Plugin::load(path.to_str().unwrap()).unwrap();
    assert!(matches!(plugin.topology("v5e:1x1", &Options::new()).unwrap_err(), PjrtError::Lacks { .. }));
}
