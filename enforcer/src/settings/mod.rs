//! The daemon's own settings, `enforcer.yaml`: what passes before any policy. As strict as policies,
//! and read by the same means. `docs/settings.md` is the language as users read it.
//!
//! Must not know: files, clocks, the kernel.

mod names;
mod parse;

use std::fmt;

use enforcer_common::image::essential;

use crate::{
    compile::{self, Options},
    policy::parse::describe,
};

pub use names::{ESSENTIALS, ETHERTYPES, essentials_off, ethertype_name};
pub use parse::parse;

/// What the daemon lets pass, whatever the policy says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Bits of [`essential`] that pass.
    pub essentials: u32,
    /// Listed ethertypes, sorted; [`enforcer_common::image::LLC`] stands for all of LLC.
    pub ethertypes: Vec<u16>,
    /// In the order written.
    pub failsafes: Vec<Failsafe>,
    /// Who may use the control sockets beside root.
    pub access: Access,
}

/// Groups by name, or by number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    /// Its members may change what is enforced, and ask.
    pub change: String,
    /// Its members may ask.
    pub view: String,
}

impl Default for Access {
    fn default() -> Self {
        Self {
            change: "enforcer".to_owned(),
            view: "enforcer-view".to_owned(),
        }
    }
}

impl Default for Settings {
    /// Of a host without the file.
    fn default() -> Self {
        Self {
            essentials: essential::ALL,
            ethertypes: Vec::new(),
            failsafes: Vec::new(),
            access: Access::default(),
        }
    }
}

/// A failsafe and its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failsafe {
    /// Unique in the file.
    pub name: String,
    /// What it lets pass.
    pub passes: compile::Failsafe,
}

impl Failsafe {
    /// Its ports as in the file: `tcp/22`.
    pub fn ports(&self) -> Vec<String> {
        let ports = self.passes.ports.iter();
        ports
            .map(|&(transport, first, last)| {
                describe(&crate::policy::model::Service::Ports {
                    transport,
                    first,
                    last,
                })
            })
            .collect()
    }
}

impl fmt::Display for Failsafe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl Settings {
    /// For the compiler.
    pub fn options(&self) -> Options {
        Options {
            essentials: self.essentials,
            ethertypes: self.ethertypes.clone(),
            failsafes: self.failsafes.iter().map(|f| f.passes.clone()).collect(),
            ..Options::default()
        }
    }

    /// Whether an image made with them depends on which interfaces there are.
    pub fn names_interfaces(&self) -> bool {
        self.failsafes
            .iter()
            .any(|f| !f.passes.interfaces.is_empty())
    }
}

#[cfg(test)]
mod tests;
