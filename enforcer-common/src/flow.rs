//! Flow state and the judgement of a packet: image × flow table × packet → verdict.
//!
//! The table itself is behind [`FlowTable`]; what an entry means is decided here only, for every
//! table, in the kernel and on the host. Time is an argument, in jiffies.

use crate::{
    decide::{Decision, Query, decide, decide_form, generation},
    image::{Words, header},
    packet::{Kind, Packet, Tuple, tcp},
    verdict::{Outcome, Reason},
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

/// The judgement of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Judgement {
    /// The verdict.
    pub decision: Decision,
    /// Whether the table refused the flow's entry.
    pub insert_failed: bool,
}

impl Judgement {
    #[inline(always)]
    const fn of(decision: Decision) -> Self {
        Self {
            decision,
            insert_failed: false,
        }
    }
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
    let mut word = 0;
    while word < 4 {
        if tuple.source[word] != tuple.destination[word] {
            return tuple.source[word] < tuple.destination[word];
        }
        word += 1;
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

#[inline(always)]
fn is_multicast(tuple: &Tuple) -> bool {
    if tuple.v6 {
        tuple.destination[0] >> 24 == 0xff
    } else {
        tuple.destination[3] >> 28 == 0xe || tuple.destination[3] == u32::MAX
    }
}

#[inline(always)]
fn fresh(entry: &FlowEntry, protocol: u8, clock: &Clock) -> bool {
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

#[inline(always)]
fn query(tuple: &Tuple) -> Query {
    Query {
        source: tuple.source_address(),
        destination: tuple.destination_address(),
        protocol: tuple.protocol,
        selector: tuple.selector,
    }
}

/// The question whether the flow may be opened from the packet's far end.
#[inline(always)]
fn reverse_query(tuple: &Tuple, selector: u16) -> Query {
    Query {
        source: tuple.destination_address(),
        destination: tuple.source_address(),
        protocol: tuple.protocol,
        selector,
    }
}

/// Judges a packet whose form is sound.
// A subprogram in the kernel, with a stack frame of its own.
#[inline(never)]
pub fn judge<W: Words + ?Sized, T: FlowTable>(
    image: &W,
    table: &T,
    packet: &Packet,
    clock: &Clock,
) -> Judgement {
    if packet.essential & image.word(header::ESSENTIALS) != 0 {
        return Judgement::of(Decision::pass(Reason::Essential));
    }
    let tuple = &packet.tuple;
    if tuple.kind == Kind::IcmpError {
        return Judgement::of(judge_icmp_error(image, table, packet, clock));
    }
    if is_multicast(tuple) || tuple.kind == Kind::IcmpOther {
        return Judgement::of(decide(image, &query(tuple)));
    }
    let (key, from_low) = key_of(tuple, packet.ifindex);
    let opens = tuple.kind == Kind::Tcp
        && tuple.tcp_flags & (tcp::SYN | tcp::ACK | tcp::RST | tcp::FIN) == tcp::SYN;
    let mut known = None;
    if let Some(slot) = table.find(&key) {
        let entry = slot.load();
        if fresh(&entry, tuple.protocol, clock) {
            let from_opener = (entry.flags & OPENER_IS_LOW != 0) == from_low;
            // A SYN asks for a new flow: it is judged as one, even over a live entry.
            if !opens {
                let flags = state_flags(tuple, from_opener);
                let decision = current(image, tuple, &entry, &slot, from_opener);
                if decision.outcome.passes() {
                    slot.touch(clock.now, flags);
                }
                return Judgement::of(decision);
            }
            known = Some((entry, from_opener));
        }
    }
    judge_new(image, table, tuple, &key, from_low, opens, known, clock)
}

/// The verdict on a packet of a tracked flow: one comparison while the policy is the one that
/// admitted it, else the opener's flow is judged again.
#[inline(always)]
fn current<W: Words + ?Sized, S: FlowSlot>(
    image: &W,
    tuple: &Tuple,
    entry: &FlowEntry,
    slot: &S,
    from_opener: bool,
) -> Decision {
    let generation = generation(image);
    if entry.generation == generation {
        return Decision {
            rule: entry.rule,
            ..Decision::pass(Reason::Established)
        };
    }
    let again = if from_opener {
        let mut q = query(tuple);
        q.selector = entry.selector as u16;
        decide(image, &q)
    } else {
        decide(image, &reverse_query(tuple, entry.selector as u16))
    };
    if !again.outcome.passes() {
        return Decision {
            reason: Reason::Revoked,
            ..again
        };
    }
    slot.admit(generation, again.rule);
    again
}

#[inline(always)]
fn state_flags(tuple: &Tuple, from_opener: bool) -> u32 {
    let mut flags = 0;
    if !from_opener {
        flags |= REPLIED;
    }
    if tuple.kind == Kind::Tcp && tuple.tcp_flags & (tcp::FIN | tcp::RST) != 0 {
        flags |= CLOSING;
    }
    flags
}

/// The verdict on a packet that no current entry speaks for.
#[inline(always)]
#[expect(
    clippy::too_many_arguments,
    reason = "inlined into judge(); a struct would be spilled"
)]
fn judge_new<W: Words + ?Sized, T: FlowTable>(
    image: &W,
    table: &T,
    tuple: &Tuple,
    key: &FlowKey,
    from_low: bool,
    opens: bool,
    known: Option<(FlowEntry, bool)>,
    clock: &Clock,
) -> Judgement {
    let mut decision;
    let mut opener_is_source = true;
    if tuple.kind == Kind::Tcp && !opens {
        if tuple.tcp_flags & (tcp::ACK | tcp::SYN | tcp::RST) != tcp::ACK {
            let addresses = Some((tuple.source_address(), tuple.destination_address()));
            return Judgement::of(decide_form(image, addresses, Reason::NoFlow));
        }
        // Mid-stream: whichever end may have opened the flow. A clear "allowed" in either
        // direction goes before a pass that would be recorded.
        decision = decide(image, &query(tuple));
        if decision.outcome != Outcome::Allowed {
            let reverse = decide(image, &reverse_query(tuple, tuple.source_port));
            if reverse.outcome == Outcome::Allowed
                || (!decision.outcome.passes() && reverse.outcome.passes())
            {
                decision = reverse;
                opener_is_source = false;
            }
        }
    } else {
        decision = decide(image, &query(tuple));
    }
    if !decision.outcome.passes() || tuple.kind == Kind::IcmpReply {
        return Judgement::of(decision);
    }
    if let Some((entry, from_opener)) = known {
        // Simultaneous open, or a spoofed SYN against a live flow: it may pass, but it takes
        // nothing from the flow that is there.
        if !from_opener && entry.flags & (REPLIED | CLOSING) == REPLIED {
            return Judgement::of(decision);
        }
    }
    let mut flags = state_flags(tuple, opener_is_source);
    if opener_is_source == from_low {
        flags |= OPENER_IS_LOW;
    }
    let selector = if opener_is_source {
        tuple.selector
    } else {
        tuple.source_port
    };
    let entry = FlowEntry {
        last_seen: clock.now,
        generation: generation(image),
        rule: decision.rule,
        flags,
        selector: u32::from(selector),
    };
    let insert_failed = !table.insert(key, &entry);
    Judgement {
        decision,
        insert_failed,
    }
}

/// ICMP errors pass when they speak of a current flow, to the end whose packet they quote.
#[inline(always)]
fn judge_icmp_error<W: Words + ?Sized, T: FlowTable>(
    image: &W,
    table: &T,
    packet: &Packet,
    clock: &Clock,
) -> Decision {
    let tuple = &packet.tuple;
    let inner = &packet.inner;
    if packet.has_inner && inner.source == tuple.destination {
        let (key, from_low) = key_of(inner, packet.ifindex);
        if let Some(slot) = table.find(&key) {
            let entry = slot.load();
            if fresh(&entry, inner.protocol, clock) {
                let from_opener = (entry.flags & OPENER_IS_LOW != 0) == from_low;
                let verdict = current(image, inner, &entry, &slot, from_opener);
                if !verdict.outcome.passes() {
                    return verdict;
                }
                return Decision {
                    rule: verdict.rule,
                    ..Decision::pass(Reason::Related)
                };
            }
        }
    }
    let addresses = Some((tuple.source_address(), tuple.destination_address()));
    decide_form(image, addresses, Reason::IcmpUnrelated)
}

/// The verdict on a packet whose form is not sound.
#[inline(always)]
pub fn judge_form<W: Words + ?Sized>(image: &W, packet: &Packet, reason: Reason) -> Decision {
    if reason as u8 == Reason::Ethertype as u8
        && packet.essential & image.word(header::ESSENTIALS) != 0
    {
        return Decision::pass(Reason::Essential);
    }
    let addresses = if packet.addresses {
        Some((
            packet.tuple.source_address(),
            packet.tuple.destination_address(),
        ))
    } else {
        None
    };
    decide_form(image, addresses, reason)
}
