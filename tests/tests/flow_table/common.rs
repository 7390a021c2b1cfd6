//! Keys, entries and times that the modules share.

use enforcer_common::{
    flow::{OPENER_IS_LOW, REPLIED},
    wire::{FlowEntry, FlowKey},
};
use enforcer_tests::host::HZ;

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const TICKS: u64 = HZ as u64;
/// A moment of the host's clock.
pub const NOW: u64 = 1_000_000_000;

/// The flow of this IPv4 host and port with the server.
pub fn v4(host: u32, port: u16, protocol: u8) -> FlowKey {
    let (low, high) = ([0, 0, 0, 0x0a01_0000 | host], [0, 0, 0, 0x0a02_0002]);
    FlowKey::new(low, high, port, 8080, protocol, false, 0)
}

/// The flow of this IPv6 host in this network and port with the server.
pub fn v6(network: u32, host: u32, port: u16, protocol: u8) -> FlowKey {
    let (low, high) = ([0xfd01_0000, network, 0, host], [0xfd02_0000, 0, 0, 2]);
    FlowKey::new(low, high, port, 8080, protocol, true, 0)
}

/// The flow of this number, of either family.
pub fn key(family6: bool, port: u16) -> FlowKey {
    if family6 {
        v6(1, 2, port, TCP)
    } else {
        v4(2, port, TCP)
    }
}

/// An entry that the low end opened, of which no field is like another.
pub fn opened(now: u64) -> FlowEntry {
    FlowEntry {
        last_seen: now,
        generation: 71,
        rule: 72,
        flags: OPENER_IS_LOW,
        selector: 8080,
        opened: 73,
        checked: 74,
        arrived: [75, 76],
    }
}

/// The same, answered.
pub fn answered(now: u64) -> FlowEntry {
    FlowEntry {
        flags: OPENER_IS_LOW | REPLIED,
        ..opened(now)
    }
}

/// As a table keeps it.
pub fn kept(entry: FlowEntry) -> FlowEntry {
    FlowEntry {
        last_seen: entry.last_seen & 0xffff_ffff,
        ..entry
    }
}
