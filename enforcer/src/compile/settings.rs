//! What an image says besides the policy: what passes before any rule.

use std::net::IpAddr;

use enforcer_common::image::{INTERFACE_SLOTS, MAX_ETHERTYPES, MAX_FAILSAFES, essential, header};
use ipnet::IpNet;

use crate::policy::{
    model::{Environment, Transport},
    pattern::Pattern,
};

use super::{
    CompileError, marks,
    services::Services,
    word,
    writer::{Full, Writer},
};

/// What an image says besides the policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Never 0, never used twice ([`super::Image::with_generation`] gives an image its own later).
    pub generation: u32,
    /// Bits of [`essential`]: what passes before any rule.
    pub essentials: u32,
    /// What nothing in the policy cuts; at most 16.
    pub failsafes: Vec<Failsafe>,
    /// Ethertypes that pass although they are not IP, at most 16; 1 stands for all of LLC.
    pub ethertypes: Vec<u16>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            generation: 1,
            essentials: essential::ALL,
            failsafes: Vec::new(),
            ethertypes: Vec::new(),
        }
    }
}

/// Flows to this host that nothing in the policy cuts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failsafe {
    /// Prefixes that they come from.
    pub sources: Vec<IpNet>,
    /// Ports of this host, TCP or UDP: transport, first, last.
    pub ports: Vec<(Transport, u16, u16)>,
    /// Interfaces that they come in at; empty: any.
    pub interfaces: Vec<Pattern>,
}

impl Failsafe {
    /// Whether it speaks of packets from `source` to a port of this host, coming in at `interface`:
    /// slow and obvious, what the image is compared with. One that names interfaces names only
    /// those that the enforcer is at.
    pub fn covers(
        &self,
        env: &Environment,
        source: IpAddr,
        (protocol, port): (u8, u16),
        interface: &str,
    ) -> bool {
        let known = env.interfaces.values().any(|name| name == interface);
        self.sources.iter().any(|net| net.contains(&source))
            && self.ports.iter().any(|(transport, first, last)| {
                transport.number() == protocol && (first..=last).contains(&&port)
            })
            && (self.interfaces.is_empty()
                || known && self.interfaces.iter().any(|p| p.matches(interface)))
    }
}

/// Refuses what has no room in the layout.
pub(super) fn check(env: &Environment, options: &Options) -> Result<(), CompileError> {
    if options.failsafes.len() > MAX_FAILSAFES as usize {
        return Err(CompileError::Failsafes {
            count: options.failsafes.len(),
        });
    }
    let count = ethertypes(options).len();
    if count > MAX_ETHERTYPES as usize {
        return Err(CompileError::Ethertypes { count });
    }
    let slot = env.interfaces.keys().copied();
    if let Some(slot) = slot.into_iter().find(|s| *s == 0 || *s >= INTERFACE_SLOTS) {
        return Err(CompileError::InterfaceSlot { slot });
    }
    Ok(())
}

/// Sorted, each once.
fn ethertypes(options: &Options) -> Vec<u32> {
    let mut list: Vec<u32> = options.ethertypes.iter().map(|t| u32::from(*t)).collect();
    list.sort_unstable();
    list.dedup();
    list
}

/// Writes essentials, ethertypes, and which failsafes name which services and interfaces.
pub(super) fn write(
    env: &Environment,
    options: &Options,
    services: &Services,
    writer: &mut Writer,
) -> Result<(), Full> {
    writer.set(header::ESSENTIALS, options.essentials);
    let list = ethertypes(options);
    if !list.is_empty() {
        let at = writer.append(&list)?;
        writer.set(header::ETHERTYPES, at);
        writer.set(header::ETHERTYPES_COUNT, word(list.len()));
    }
    if options.failsafes.is_empty() {
        return Ok(());
    }
    let words = (0..services.count).map(|class| services.failsafes_of(class));
    let at = writer.append_each(services.count, words)?;
    writer.set(header::SERVICE_FAILSAFES, at);
    if options.failsafes.iter().all(|f| f.interfaces.is_empty()) {
        return Ok(());
    }
    let mut slots = vec![0; INTERFACE_SLOTS as usize];
    for (number, failsafe) in options.failsafes.iter().enumerate() {
        let named = marks::naming(env, &failsafe.interfaces);
        for (slot, word) in slots.iter_mut().enumerate() {
            if failsafe.interfaces.is_empty() || named.contains(slot) {
                *word |= 1 << number;
            }
        }
    }
    let at = writer.append(&slots)?;
    writer.set(header::SLOT_FAILSAFES, at);
    Ok(())
}
