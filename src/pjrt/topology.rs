//! Compiling for devices that are not at hand.

use super::client::{id_of, kind_of};
use super::error::PjrtError;
use super::executable::{Executable, with_program};
use super::options::{CompileOptions, Options, named_values};
use super::plugin::Plugin;
use super::sys::{self, Api};
use std::fmt;
use std::ptr;
use std::sync::Arc;

/// Devices of some kind in some arrangement, which need not be at hand.
///
/// libtpu has `v4:1x1x1`, `v5e:1x1`, `v5p:1x1x1`, `v6e:1x1`, `tpu7x:1x1x1`, and larger ones.
pub struct Topology {
    api: Arc<Api>,
    raw: *mut sys::TopologyDescription,
}

// SAFETY: the functions of the API may be called from any thread.
unsafe impl Send for Topology {}
// SAFETY: as above.
unsafe impl Sync for Topology {}

impl Topology {
    pub(super) fn new(plugin: &Plugin, name: &str, options: &Options) -> Result<Self, PjrtError> {
        let api = plugin.api.clone();
        let values = named_values(options);
        let created = api.call::<sys::TopologyDescription_Create>(|a| {
            (a.name, a.name_size) = (name.as_ptr().cast(), name.len());
            (a.create_options, a.num_options) = (values.as_ptr(), values.len());
        })?;
        Ok(Self { api, raw: created.topology })
    }

    /// `tpu`, …
    ///
    /// # Errors
    /// If the plugin does not say.
    pub fn platform(&self) -> Result<String, PjrtError> {
        let named = self.api.call::<sys::TopologyDescription_PlatformName>(|a| a.topology = self.raw)?;
        // SAFETY: the topology owns it.
        Ok(unsafe { sys::text(named.name, named.name_size) })
    }

    /// What the plugin says of its own version.
    ///
    /// # Errors
    /// If the plugin does not say.
    pub fn platform_version(&self) -> Result<String, PjrtError> {
        let named = self.api.call::<sys::TopologyDescription_PlatformVersion>(|a| a.topology = self.raw)?;
        // SAFETY: the topology owns it.
        Ok(unsafe { sys::text(named.version, named.version_size) })
    }

    /// What each of its devices is: `TPU v5 lite`.
    ///
    /// # Errors
    /// If the plugin does not say.
    pub fn kinds(&self) -> Result<Vec<String>, PjrtError> {
        self.descriptions()?.iter().map(|&description| kind_of(&self.api, description)).collect()
    }

    /// Compiles a module of StableHLO for the first of its devices.
    ///
    /// # Errors
    /// If it does not parse, or cannot run there: it may need more memory than the device has.
    pub fn compile_ahead(&self, stablehlo: &str, options: &CompileOptions) -> Result<Executable, PjrtError> {
        let first = self.descriptions()?.first().map_or(Ok(0), |&first| id_of(&self.api, first))?;
        let options = options.encoded(first);
        let compiled = with_program(stablehlo, |program| {
            self.api.call::<sys::Compile>(|a| {
                (a.topology, a.program, a.client) = (self.raw, program, ptr::null_mut());
                (a.options, a.options_size) = (options.as_ptr(), options.len());
            })
        })?;
        Executable::new(self.api.clone(), compiled.executable)
    }

    fn descriptions(&self) -> Result<&[*mut sys::DeviceDescription], PjrtError> {
        let listed = self.api.call::<sys::TopologyDescription_GetDeviceDescriptions>(|a| a.topology = self.raw)?;
        // SAFETY: the topology owns them.
        Ok(unsafe { sys::slice(listed.descriptions, listed.num_descriptions) })
    }
}

impl Drop for Topology {
    fn drop(&mut self) {
        self.api.free::<sys::TopologyDescription_Destroy>(|a| a.topology = self.raw);
    }
}

impl fmt::Debug for Topology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Topology").field("kinds", &self.kinds().ok()).finish_non_exhaustive()
    }
}
