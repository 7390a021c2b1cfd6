//! Flow state: keys, what an entry means, when it counts as absent.
//!
//! The table itself is behind [`FlowTable`]; what an entry means is decided here and in
//! [`crate::judge`] only, for every table, in the kernel and on the host. Time is an argument, in
//! jiffies.

use crate::{
    packet::{Kind, Tuple, tcp},
    wire::{FlowEntry, FlowKey},
};

/// A table of flows.
pub trait FlowTable {
    /// An entry found, which stays readable and writable while the packet is judged.
    type Slot: FlowSlot;
    /// The entry of a key, whatever its age.
    fn find(&self, key: &FlowKey) -> Option<Self::Slot>;
    /// Writes an entry, new or over the old one. `false`: the table took it not.
    fn insert(&self, key: &FlowKey, entry: &FlowEntry) -> bool;
}

/// One entry of a table, in place.
pub trait FlowSlot {
    /// The entry's fields.
    fn load(&self) -> FlowEntry;
    /// Renews the entry's age and adds state flags.
    fn touch(&self, now: u64, flags: u32);
    /// Marks the entry as judged under `generation`, by `rule`.
    fn admit(&self, generation: u32, rule: u32);
}

/// Jiffies now and per second.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// `jiffies64`.
    pub now: u64,
    /// `CONFIG_HZ` of the running kernel.
    pub hz: u32,
}

/// The lower-ordered end of the key opened the flow.
pub const OPENER_IS_LOW: u32 = 1;
/// A packet came back.
pub const REPLIED: u32 = 1 << 1;
/// TCP: FIN or RST was seen.
pub const CLOSING: u32 = 1 << 2;

/// Idle seconds after which an entry counts as absent.
pub mod idle {
    /// TCP, nothing came back yet.
    pub const TCP_HALF_OPEN: u64 = 60;
    /// TCP, both directions seen. Mid-stream packets re-create an entry, so this bounds memory,
    /// not sessions.
    pub const TCP_ESTABLISHED: u64 = 8 * 3600;
    /// TCP after FIN or RST.
    pub const TCP_CLOSING: u64 = 120;
    /// UDP and SCTP, nothing came back yet.
    pub const PORTS_ONE_WAY: u64 = 60;
    /// UDP and SCTP, both directions seen.
    pub const PORTS: u64 = 180;
    /// ICMP requests.
    pub const ICMP: u64 = 60;
    /// Protocols without ports.
    pub const OTHER: u64 = 600;
}

/// The key of a packet's flow, the same for both directions, and whether the packet comes from
/// the key's low end.
#[inline(always)]
pub fn key_of(tuple: &Tuple, ifindex: u32) -> (FlowKey, bool) {
    // ICMP: the requester is the low end, whatever the addresses, so that a request from the
    // other side is a flow of its own (GHSA-c66w-hq56-4q97 is the bug this avoids).
    let forward = match tuple.kind {
        Kind::IcmpRequest => true,
        Kind::IcmpReply => false,
        Kind::Other | Kind::Tcp | Kind::Ports | Kind::IcmpError | Kind::IcmpOther => ordered(tuple),
    };
    let scope = if link_local(&tuple.source, tuple.v6) || link_local(&tuple.destination, tuple.v6) {
        ifindex
    } else {
        0
    };
    let (low, high) = if forward {
        (tuple.source, tuple.destination)
    } else {
        (tuple.destination, tuple.source)
    };
    let (low_port, high_port) = match (tuple.kind, forward) {
        // Both ends share the identifier. The type asked for takes the other place, or an echo
        // that is allowed would carry a timestamp request that is not.
        (Kind::IcmpRequest, _) => (tuple.source_port, tuple.selector >> 8),
        (Kind::IcmpReply, _) => (tuple.source_port, request_of(tuple.selector >> 8)),
        (_, true) => (tuple.source_port, tuple.destination_port),
        (_, false) => (tuple.destination_port, tuple.source_port),
    };
    let key = FlowKey::new(
        low,
        high,
        low_port,
        high_port,
        tuple.protocol,
        tuple.v6,
        scope,
    );
    (key, forward)
}

/// The type of the ICMP or ICMPv6 request that a reply of this type answers.
#[inline(always)]
const fn request_of(reply: u16) -> u16 {
    match reply {
        0 => 8,
        // Timestamp, and echo in ICMPv6: the number before.
        other => other.wrapping_sub(1),
    }
}

#[inline(always)]
fn ordered(tuple: &Tuple) -> bool {
    let half = |a: &[u32; 4], at: usize| (u64::from(a[at]) << 32) | u64::from(a[at + 1]);
    let (s, d) = (&tuple.source, &tuple.destination);
    // Halves, not words: each comparison is a fork for the verifier.
    if half(s, 0) != half(d, 0) {
        return half(s, 0) < half(d, 0);
    }
    if half(s, 2) != half(d, 2) {
        return half(s, 2) < half(d, 2);
    }
    tuple.source_port <= tuple.destination_port
}

#[inline(always)]
fn link_local(address: &[u32; 4], v6: bool) -> bool {
    if v6 {
        address[0] >> 22 == 0xfe80 >> 6
    } else {
        address[3] >> 16 == 0xa9fe
    }
}

/// Whether the destination is multicast or limited broadcast.
#[inline(always)]
pub(crate) fn is_multicast(tuple: &Tuple) -> bool {
    if tuple.v6 {
        tuple.destination[0] >> 24 == 0xff
    } else {
        tuple.destination[3] >> 28 == 0xe || tuple.destination[3] == u32::MAX
    }
}

/// Whether an entry is young enough to speak for its flow.
#[inline(always)]
pub(crate) fn fresh(entry: &FlowEntry, protocol: u8, clock: &Clock) -> bool {
    let seconds = match protocol {
        6 if entry.flags & CLOSING != 0 => idle::TCP_CLOSING,
        6 if entry.flags & REPLIED != 0 => idle::TCP_ESTABLISHED,
        6 => idle::TCP_HALF_OPEN,
        17 | 132 if entry.flags & REPLIED != 0 => idle::PORTS,
        17 | 132 => idle::PORTS_ONE_WAY,
        1 | 58 => idle::ICMP,
        _ => idle::OTHER,
    };
    // Another CPU may have touched the entry a tick after `now` was read.
    clock.now.saturating_sub(entry.last_seen) <= seconds * u64::from(clock.hz)
}

/// The state flags that a packet of a flow brings.
#[inline(always)]
pub(crate) fn state_flags(tuple: &Tuple, from_opener: bool) -> u32 {
    let mut flags = 0;
    if !from_opener {
        flags |= REPLIED;
    }
    if tuple.kind == Kind::Tcp && tuple.tcp_flags & (tcp::FIN | tcp::RST) != 0 {
        flags |= CLOSING;
    }
    flags
}
