//! The plugin under test, and one client of it for all tests: a second would fight over a GPU's memory.

use fused_xent::pjrt::{Client, Device, Plugin};
use std::sync::OnceLock;

pub const VARIABLE: &str = "FUSED_XENT_TEST_PLUGIN";

pub fn plugin_name() -> String {
    std::env::var(VARIABLE).expect("FUSED_XENT_TEST_PLUGIN is a plugin's name or path")
}

pub fn plugin() -> Plugin {
    Plugin::load(&plugin_name()).unwrap()
}

pub fn client() -> &'static Client {
    static CLIENT: OnceLock<Client> = OnceLock::new();
    CLIENT.get_or_init(|| {
        let plugin = plugin();
        plugin.client(&plugin.sharing_options()).unwrap()
    })
}

pub fn device() -> Device {
    client().device(0).unwrap()
}
