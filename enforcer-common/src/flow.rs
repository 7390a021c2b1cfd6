//! Flow state: keys, what an entry means, when it counts as absent.
//!
//! The table itself is behind [`FlowTable`]; what an entry means is decided here and in
//! [`crate::judge`] only, for every table, in the kernel and on the host. Time is an argument, in
//! jiffies.

use crate::{
    packet::{Fragment, Kind, Packet, Tuple, tcp},
    wire::{FlowEntry, FlowKey, FragmentEntry, FragmentKey},
};

/// A table of flows, and of the fragmented packets of them that are on their way.
pub trait FlowTable {
    /// An entry found, which stays readable and writable while the packet is judged.
    type Slot: FlowSlot;
    /// The entry of a key, whatever its age.
    fn find(&self, key: &FlowKey) -> Option<Self::Slot>;
    /// Writes an entry, new or over the old one. `false`: the table took it not.
    fn insert(&self, key: &FlowKey, entry: &FlowEntry) -> bool;
    /// The first fragment of a packet, if it passed.
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentEntry>;
    /// Notes that a first fragment passed. `false`: not noted, those that follow are denied.
    fn insert_fragment(&self, key: &FragmentKey, entry: &FragmentEntry) -> bool;
}

/// What a look without waiting finds.
#[derive(Clone, Copy, Debug)]
pub enum Glance<S> {
    /// The entry.
    Entry(S),
    /// A writer is where it may be.
    Busy,
    /// It is not there.
    Nothing,
}

/// A table that can be looked into without waiting for its writers.
pub trait Glances {
    /// An entry found.
    type Slot: FlowSlot;
    /// The entry of a key, whatever its age.
    fn glance(&self, key: &FlowKey) -> Glance<Self::Slot>;
}

/// One entry of a table, in place.
pub trait FlowSlot {
    /// The entry's fields.
    fn load(&self) -> FlowEntry;
    /// Renews the entry's age, and counts a packet of so many bytes.
    fn touch(&self, now: u64, bytes: u32);
    /// Changes the entry, unless it has become another flow's meanwhile.
    fn change(&self, change: &Change);
}

/// What a packet of a flow that goes on changes in its entry.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Change {
    /// State flags to add.
    pub flags: u32,
    /// Whether the flow was judged again: only then the next five count.
    pub admits: u32,
    /// Generation of the policy.
    pub generation: u32,
    /// The rule, or `u32::MAX`.
    pub rule: u32,
    /// [`TIMED`] and [`SESSION`], as the rule has it.
    pub timing: u32,
    /// Boot second of the judgement; meaningful if timed.
    pub boot: u32,
    /// Whether a session begins.
    pub begins: u32,
    /// Whose interface is noted, as in [`FlowEntry::arrived`]; above 1: nobody's.
    pub side: u32,
    /// The interface.
    pub ifindex: u32,
}

impl Change {
    /// Adds state flags and nothing else.
    #[inline(always)]
    pub const fn flags(flags: u32) -> Self {
        Self {
            flags,
            admits: 0,
            generation: 0,
            rule: 0,
            timing: 0,
            boot: 0,
            begins: 0,
            side: u32::MAX,
            ifindex: 0,
        }
    }

    /// The entry as it is afterwards: for tables that hold whole entries.
    pub const fn apply(&self, entry: &mut FlowEntry) {
        entry.flags |= self.flags;
        if self.admits != 0 {
            entry.flags = entry.flags & !(TIMED | SESSION) | self.timing;
            if self.begins != 0 {
                entry.opened = self.boot;
            }
            entry.checked = self.boot;
            entry.rule = self.rule;
            entry.generation = self.generation;
        }
        if self.side <= 1 {
            entry.arrived[self.side as usize & 1] = self.ifindex;
        }
    }
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

/// The rule's verdict depends on time: the flow is judged again once a second.
pub const TIMED: u32 = 1 << 3;
/// The rule bounds how long the flow lasts.
pub const SESSION: u32 = 1 << 4;

/// A table's own: the entry is not evicted while it is live.
pub const PROTECTED: u32 = 1 << 8;

/// Seconds that the later fragments of a packet may follow the first: receivers wait 30 (IPv4) or
/// 60 (IPv6) for them.
const FRAGMENT_SECONDS: u64 = 60;

/// Idle seconds after which an entry counts as absent.
pub mod idle {
    /// None of the others is shorter.
    pub const SHORTEST: u32 = 60;
    /// TCP, nothing came back yet.
    pub const TCP_HALF_OPEN: u64 = 60;
    /// TCP, both directions seen. Mid-stream packets re-create an entry, so this bounds memory,
    /// not sessions.
    pub const TCP_ESTABLISHED: u64 = 8 * 3600;
    /// TCP after FIN or RST.
    pub const TCP_CLOSING: u64 = 120;
    /// UDP, UDP-Lite and SCTP, nothing came back yet.
    pub const PORTS_ONE_WAY: u64 = 60;
    /// UDP, UDP-Lite and SCTP, both directions seen.
    pub const PORTS: u64 = 180;
    /// ICMP requests.
    pub const ICMP: u64 = 60;
    /// Protocols without ports.
    pub const OTHER: u64 = 600;

    const _: () = {
        let all = [
            TCP_HALF_OPEN,
            TCP_ESTABLISHED,
            TCP_CLOSING,
            PORTS_ONE_WAY,
            PORTS,
            ICMP,
            OTHER,
        ];
        let mut i = 0;
        while i < all.len() {
            assert!(all[i] >= SHORTEST as u64);
            i += 1;
        }
    };
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
        Kind::Other | Kind::Tcp | Kind::Ports | Kind::IcmpError | Kind::IcmpOther => {
            let ports = (tuple.source_port, tuple.destination_port);
            ordered(&tuple.source, &tuple.destination, ports)
        }
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

/// Whether the source is the low end of its flow, unless that is an ICMP request's.
#[inline(always)]
pub(crate) fn ordered(s: &[u32; 4], d: &[u32; 4], ports: (u16, u16)) -> bool {
    let half = |a: &[u32; 4], at: usize| (u64::from(a[at]) << 32) | u64::from(a[at + 1]);
    // Halves, not words: each comparison is a fork for the verifier.
    if half(s, 0) != half(d, 0) {
        return half(s, 0) < half(d, 0);
    }
    if half(s, 2) != half(d, 2) {
        return half(s, 2) < half(d, 2);
    }
    ports.0 <= ports.1
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
pub fn fresh(entry: &FlowEntry, protocol: u8, clock: &Clock) -> bool {
    if entry.flags & SESSION != 0 {
        // Its rule says how long.
        return true;
    }
    // Tables keep the low half.
    u64::from(age(clock.now, entry.last_seen as u32))
        <= bound(protocol, entry.flags) * u64::from(clock.hz)
}

/// Jiffies since `seen`, low halves: 0 if another CPU saw a packet after `now` was read.
#[inline(always)]
pub const fn age(now: u64, seen: u32) -> u32 {
    let age = (now as u32).wrapping_sub(seen);
    if age >> 31 != 0 { 0 } else { age }
}

/// Idle seconds after which an entry with these flags counts as absent, if no rule bounds it.
#[inline(always)]
pub const fn bound(protocol: u8, flags: u32) -> u64 {
    match protocol {
        6 if flags & CLOSING != 0 => idle::TCP_CLOSING,
        6 if flags & REPLIED != 0 => idle::TCP_ESTABLISHED,
        6 => idle::TCP_HALF_OPEN,
        17 | 132 | 136 if flags & REPLIED != 0 => idle::PORTS,
        17 | 132 | 136 => idle::PORTS_ONE_WAY,
        1 | 58 => idle::ICMP,
        _ => idle::OTHER,
    }
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

/// The key under which the fragments of a packet meet.
#[inline(always)]
pub(crate) fn fragment_key(packet: &Packet, ingress: bool) -> FragmentKey {
    let t = &packet.tuple;
    let protocol = if t.v6 { 0 } else { t.protocol };
    FragmentKey::new(
        t.source,
        t.destination,
        packet.fragment_id,
        protocol,
        t.v6,
        !ingress,
    )
}

/// What the fragments that follow this first one are judged by.
#[inline(always)]
pub(crate) fn fragment_entry(packet: &Packet, now: u64) -> FragmentEntry {
    let t = &packet.tuple;
    FragmentEntry {
        seen: now,
        ports: u32::from(t.source_port) << 16 | u32::from(t.destination_port),
        service: u32::from(t.selector) << 16 | u32::from(t.protocol) << 8 | u32::from(t.tcp_flags),
        kind: t.kind as u32,
        covered: packet.fragment_at,
    }
}

/// Gives a later fragment the transport of its first one. `false`: it follows none that passed, or
/// overlaps it, and might rewrite what was judged (RFC 3128, RFC 5722).
#[inline(always)]
pub(crate) fn follow(packet: &mut Packet, entry: &FragmentEntry, clock: &Clock) -> bool {
    let late = clock.now.saturating_sub(entry.seen) > FRAGMENT_SECONDS * u64::from(clock.hz);
    if late || packet.fragment_at < entry.covered {
        return false;
    }
    let t = &mut packet.tuple;
    t.source_port = (entry.ports >> 16) as u16;
    t.destination_port = entry.ports as u16;
    t.selector = (entry.service >> 16) as u16;
    t.protocol = (entry.service >> 8) as u8;
    t.tcp_flags = entry.service as u8;
    t.kind = Kind::from_bits(entry.kind);
    packet.fragment = Fragment::Later;
    true
}
