//! Plugins: where they are, and how they are loaded.

use super::error::PjrtError;
use super::options::{Options, Value};
use super::sys::{self, Api};
use super::{Client, Topology};
use fused_xent_kernels::tpu::Generation;
use libloading::Library;
use std::env;
use std::ffi::{OsStr, c_void};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The names that are known without further ado.
pub(super) const NAMES: [&str; 4] = ["cpu", "cuda", "rocm", "tpu"];

/// Says where plugins of other names are, or other plugins of these names: `name:path,name:path`.
pub const PLUGINS_VARIABLE: &str = "FUSED_XENT_PJRT_PLUGINS";

/// JAX's variable of the same form; ours comes first.
const JAX_PLUGINS_VARIABLE: &str = "PJRT_NAMES_AND_LIBRARY_PATHS";

/// A loaded plugin. Its library stays loaded until the process ends: XLA's libraries do not survive being unloaded.
#[derive(Clone)]
pub struct Plugin {
    pub(super) api: Arc<Api>,
}

impl Plugin {
    /// Loads the plugin of a name or at a path.
    ///
    /// A name is looked for in `FUSED_XENT_PJRT_PLUGINS`, in `PJRT_NAMES_AND_LIBRARY_PATHS`, and then where it is usually
    /// installed: `cpu` where `make pjrt-cpu` puts it; `tpu` at `TPU_LIBRARY_PATH` and in the wheel libtpu; `cuda` and `rocm` in
    /// the wheels jax-cuda*-pjrt and jax-rocm*-pjrt. Wheels are looked for in the active virtual environment, in `.venv`, and
    /// where pip installs for the user and for all.
    ///
    /// Plugins are told by variables of their own, unless these are set, to log warnings only (`TF_CPP_MIN_LOG_LEVEL`), and
    /// libtpu, where no TPU is attached, not to wait for one (`TPU_SKIP_MDS_QUERY` and others). They are set for this process: load
    /// plugins before other threads read the environment.
    ///
    /// # Errors
    /// If there is none, it cannot be loaded, is no plugin, speaks an older version of the API, or fails to start.
    pub fn load(name_or_path: &str) -> Result<Self, PjrtError> {
        let path = find(name_or_path)?;
        settle_environment(&path);
        // SAFETY: the initialisers of a plugin are trusted to the user who names it.
        let library = unsafe { Library::new(&path) };
        let library = library.map_err(|source| PjrtError::NotLoadable { path: path.clone(), source })?;
        // SAFETY: every plugin exports it with this type.
        let table = unsafe {
            let get = library.get::<unsafe extern "C" fn() -> *const c_void>(b"GetPjrtApi");
            get.map(|get| get()).map_err(|e| PjrtError::NotAPlugin { path: path.clone(), why: e.to_string() })?
        };
        std::mem::forget(library);
        // SAFETY: the library has just been made to stay.
        let api = unsafe { Api::new(table, &path) }?;
        api.call::<sys::Plugin_Initialize>(|_| ())?;
        Ok(Self { api: Arc::new(api) })
    }

    /// Major and minor version of the API that it speaks.
    pub fn api_version(&self) -> (i32, i32) {
        self.api.version
    }

    /// The library.
    pub fn path(&self) -> &Path {
        &self.api.path
    }

    /// Takes hold of its devices.
    ///
    /// # Errors
    /// If there are none, or an option is unknown to it.
    pub fn client(&self, options: &Options) -> Result<Client, PjrtError> {
        Client::new(self, options)
    }

    /// Options under which its client leaves memory of a device to others, where it would take most of it by default.
    pub fn sharing_options(&self) -> Options {
        let takes_all = |name: &str| name.contains("cuda") || name.contains("rocm");
        let takes_all = self.path().file_name().and_then(OsStr::to_str).is_some_and(takes_all);
        takes_all.then(|| ("preallocate".to_owned(), Value::Bool(false))).into_iter().collect()
    }

    /// Devices that need not be at hand, to compile for: `v5e:2x2`.
    ///
    /// # Errors
    /// If the plugin has no topologies, or none of that name.
    pub fn topology(&self, name: &str, options: &Options) -> Result<Topology, PjrtError> {
        Topology::new(self, name, options)
    }

    /// One chip of a generation of TPUs as one device, with all of its cores where kernels can be split over them.
    ///
    /// # Errors
    /// If the plugin is not libtpu, or one that does not know the generation.
    pub fn tpu(&self, generation: Generation) -> Result<Topology, PjrtError> {
        let mut options = Options::from([("chips_per_host_bounds".to_owned(), Value::Ints(vec![1; 3]))]);
        if generation == Generation::V4 {
            options.insert("chip_config_name".to_owned(), Value::Text("megacore".to_owned()));
        }
        self.topology(generation.topology(), &options)
    }
}

impl fmt::Debug for Plugin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Plugin").field("path", &self.api.path).field("api_version", &self.api.version).finish()
    }
}

fn find(asked: &str) -> Result<PathBuf, PjrtError> {
    let not_found = |looked, remedy| PjrtError::NotFound { asked: asked.into(), looked, remedy };
    if asked.contains(std::path::MAIN_SEPARATOR) || asked.contains('.') {
        let path = Path::new(asked);
        // Without a separator the loader would look elsewhere than here.
        let path = if path.components().count() == 1 { Path::new(".").join(path) } else { path.to_owned() };
        return if path.is_file() { Ok(path) } else { Err(not_found(vec![], "name a file that exists")) };
    }
    let named = [PLUGINS_VARIABLE, JAX_PLUGINS_VARIABLE].into_iter().find_map(|variable| {
        let list = env::var(variable).ok()?;
        let of_name = |entry: &str| entry.trim().split_once(':').filter(|(name, _)| *name == asked).map(|(_, path)| path.into());
        list.split(',').find_map(of_name).map(|path: PathBuf| (variable, path))
    });
    if let Some((variable, path)) = named {
        let looked = vec![format!("{} (by {variable})", path.display())];
        return if path.is_file() { Ok(path) } else { Err(not_found(looked, "correct the variable")) };
    }
    let places = usual_places(asked);
    let remedy = match asked {
        "cpu" => "`make pjrt-cpu` builds it",
        "cuda" | "rocm" | "tpu" => "install its wheel (jax[cuda13], jax[rocm], libtpu) into the active virtual environment",
        _ => "set FUSED_XENT_PJRT_PLUGINS=name:path",
    };
    let looked = places.iter().map(|place| place.display().to_string()).collect();
    places.into_iter().find(|path| path.is_file()).ok_or_else(|| not_found(looked, remedy))
}

/// Files that may be the plugin, the likeliest first.
fn usual_places(name: &str) -> Vec<PathBuf> {
    let variable = |name| env::var_os(name).map(PathBuf::from);
    match name {
        "cpu" => {
            let cache = variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")));
            cache.map(|cache| cache.join("fused-xent/xla-cpu/pjrt_plugin_xla_cpu.so")).into_iter().collect()
        }
        "tpu" => variable("TPU_LIBRARY_PATH").into_iter().chain(in_wheels("", "libtpu", "libtpu.so")).collect(),
        "cuda" => in_wheels("jax_plugins", "xla_cuda", "xla_cuda_plugin.so"),
        "rocm" => in_wheels("jax_plugins", "xla_rocm", "xla_rocm_plugin.so"),
        _ => vec![],
    }
}

/// `file` in folders whose name begins with `package`, in `folder` of each folder of wheels.
fn in_wheels(folder: &str, package: &str, file: &str) -> Vec<PathBuf> {
    let roots = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(env::var_os).map(PathBuf::from);
    let fixed = [PathBuf::from(".venv"), "/usr/local".into(), "/usr".into()];
    let user = env::var_os("HOME").map(|home| Path::new(&home).join(".local"));
    let wheels = roots.chain(fixed).chain(user).flat_map(|root| {
        let pythons = named(&root.join("lib"), "python3");
        pythons.into_iter().flat_map(|python| ["site-packages", "dist-packages"].map(|wheels| python.join(wheels)))
    });
    wheels.flat_map(|wheels| named(&wheels.join(folder), package)).map(|package| package.join(file)).collect()
}

/// What in `folder` has a name that begins so, the last by name first.
fn named(folder: &Path, beginning: &str) -> Vec<PathBuf> {
    let entries = folder.read_dir().into_iter().flatten().flatten().map(|entry| entry.path());
    let begins = |path: &PathBuf| path.file_name().and_then(OsStr::to_str).is_some_and(|name| name.starts_with(beginning));
    let mut found: Vec<PathBuf> = entries.filter(begins).collect();
    found.sort_unstable_by(|a, b| b.cmp(a));
    found
}

/// Plugins log to standard error, unless told otherwise. Without a TPU, libtpu asks the cloud's metadata server for one for minutes,
/// and refuses to be loaded twice on a machine.
fn settle_environment(path: &Path) {
    let is = |what: &str| path.file_name().and_then(OsStr::to_str).is_some_and(|name| name.contains(what));
    let attached = || !named(Path::new("/dev"), "accel").is_empty() || Path::new("/dev/vfio/0").exists();
    let quiet = ("TF_CPP_MIN_LOG_LEVEL", "1");
    // TensorFlow's library would announce operations of its own.
    let of_cpu = ("TF_ENABLE_ONEDNN_OPTS", "0");
    let without_tpu = [
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5p-8"),
    ];
    let without_tpu = without_tpu.into_iter().filter(|_| is("libtpu") && !attached());
    let settings = std::iter::once(quiet).chain(Some(of_cpu).filter(|_| is("xla_cpu"))).chain(without_tpu);
    for (name, value) in settings.filter(|(name, _)| env::var_os(name).is_none()) {
        // SAFETY: Rust code that reads the environment meanwhile is kept apart by the standard library; that no C code does is for
        // the caller of `Plugin::load` to see to, as its documentation says.
        unsafe { env::set_var(name, value) };
    }
}
