//! The short way through the judgement: a packet of an established flow whose headers hold nothing
//! odd passes after one look into the flow table.
//!
//! It decides nothing anew: whatever it lets pass, [`crate::judge`] would let pass with reason
//! `established`, and it leaves the same entry behind. Everything else goes the long way. That
//! both agree is tested with every packet that a test judges on the host.

use crate::{
    flow::{
        CLOSING, Clock, FlowSlot as _, FlowTable, OPENER_IS_LOW, REPLIED, SESSION, TIMED, fresh,
    },
    packet::{Link, tcp},
    wire::FlowKey,
};

/// The first bytes of a frame, as far as they can be read at once.
pub trait Window {
    /// Whether so many bytes can be read. Offsets past them read as nothing in particular.
    fn holds(&self, bytes: u32) -> bool;
    /// A byte.
    fn byte(&self, at: u32) -> u8;
    /// Two bytes, big-endian.
    fn half(&self, at: u32) -> u16;
    /// Four bytes, big-endian.
    fn word(&self, at: u32) -> u32;
    /// Length of the whole frame in bytes.
    fn length(&self) -> u32;
}

impl Window for [u8] {
    fn holds(&self, bytes: u32) -> bool {
        self.len() >= bytes as usize
    }

    fn byte(&self, at: u32) -> u8 {
        self.get(at as usize).copied().unwrap_or_default()
    }

    fn half(&self, at: u32) -> u16 {
        u16::from_be_bytes([self.byte(at), self.byte(at + 1)])
    }

    fn word(&self, at: u32) -> u32 {
        u32::from(self.half(at)) << 16 | u32::from(self.half(at + 2))
    }

    fn length(&self) -> u32 {
        self.len() as u32
    }
}

const ETHERNET: u32 = 14;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// Whether frames of a link can go the short way: they begin with an Ethernet header and have no
/// tag in their metadata.
#[inline(always)]
pub const fn may(link: &Link) -> bool {
    link.ethernet && link.vlan.is_none()
}

/// Whether the packet is of an established flow; if so, its entry is brought up to date. `false`
/// says nothing. `generation` is the live image's.
#[inline(always)]
pub fn established<W: Window + ?Sized, F: FlowTable>(
    window: &W,
    table: &F,
    ingress: bool,
    ifindex: u32,
    generation: u32,
    clock: &Clock,
) -> bool {
    // The shortest: IPv4 and UDP.
    if generation == 0 || !window.holds(ETHERNET + 28) {
        return false;
    }
    match window.half(12) {
        0x0800 => match ipv4(window) {
            Some(packet) => passes(window, table, ingress, ifindex, generation, clock, &packet),
            None => false,
        },
        0x86dd => match ipv6(window) {
            Some(packet) => passes(window, table, ingress, ifindex, generation, clock, &packet),
            None => false,
        },
        _ => false,
    }
}

struct Plain {
    key: FlowKey,
    from_low: bool,
    protocol: u8,
}

#[inline(always)]
fn passes<W: Window + ?Sized, F: FlowTable>(
    window: &W,
    table: &F,
    ingress: bool,
    ifindex: u32,
    generation: u32,
    clock: &Clock,
    packet: &Plain,
) -> bool {
    let Some(slot) = table.find(&packet.key) else {
        return false;
    };
    let entry = slot.load();
    let from_opener = (entry.flags & OPENER_IS_LOW != 0) == packet.from_low;
    let arrived = entry.arrived[usize::from(packet.from_low)];
    // The opener's packets need no answer; an answer has been noted before.
    let settled = from_opener || entry.flags & REPLIED != 0;
    if entry.generation != generation
        || entry.flags & (TIMED | SESSION | CLOSING) != 0
        || (ingress && arrived != ifindex)
        || !settled
        || !fresh(&entry, packet.protocol, clock)
    {
        return false;
    }
    slot.touch(clock.now, window.length());
    true
}

/// Whether the transport header at `at` of a packet that ends at `end` is one of a flow that goes
/// on.
#[inline(always)]
fn goes_on<W: Window + ?Sized>(window: &W, protocol: u8, at: u32, end: u32) -> bool {
    if end > window.length() {
        return false;
    }
    if protocol == UDP {
        return at + 8 <= end;
    }
    if protocol != TCP || !window.holds(at + 20) || at + 20 > end {
        return false;
    }
    let header = u32::from(window.byte(at + 12) >> 4) * 4;
    let flags = window.byte(at + 13) & (tcp::SYN | tcp::ACK | tcp::RST | tcp::FIN);
    header >= 20 && at + header <= end && flags == tcp::ACK
}

#[inline(always)]
fn ipv4<W: Window + ?Sized>(window: &W) -> Option<Plain> {
    const IP: u32 = ETHERNET;
    const AT: u32 = IP + 20;
    // No options, no fragment.
    if window.byte(IP) != 0x45 || window.half(IP + 6) & 0x3fff != 0 {
        return None;
    }
    let protocol = window.byte(IP + 9);
    if !goes_on(window, protocol, AT, IP + u32::from(window.half(IP + 2))) {
        return None;
    }
    let (source, destination) = (window.word(IP + 12), window.word(IP + 16));
    // Multicast has no flows; link-local addresses have a scope.
    if destination >> 28 >= 0xe || source >> 16 == 0xa9fe || destination >> 16 == 0xa9fe {
        return None;
    }
    let ports = window.word(AT);
    let (from, to) = ((ports >> 16) as u16, ports as u16);
    let from_low = source < destination || (source == destination && from <= to);
    let key = if from_low {
        FlowKey::new(
            [0, 0, 0, source],
            [0, 0, 0, destination],
            from,
            to,
            protocol,
            false,
            0,
        )
    } else {
        FlowKey::new(
            [0, 0, 0, destination],
            [0, 0, 0, source],
            to,
            from,
            protocol,
            false,
            0,
        )
    };
    Some(Plain {
        key,
        from_low,
        protocol,
    })
}

#[inline(always)]
fn ipv6<W: Window + ?Sized>(window: &W) -> Option<Plain> {
    const IP: u32 = ETHERNET;
    const AT: u32 = IP + 40;
    if !window.holds(AT + 8) || window.byte(IP) >> 4 != 6 {
        return None;
    }
    let protocol = window.byte(IP + 6);
    if !goes_on(window, protocol, AT, AT + u32::from(window.half(IP + 4))) {
        return None;
    }
    let address = |at: u32| {
        [
            window.word(at),
            window.word(at + 4),
            window.word(at + 8),
            window.word(at + 12),
        ]
    };
    let (source, destination) = (address(IP + 8), address(IP + 24));
    let odd = |a: &[u32; 4]| {
        // Link-local; mapped.
        a[0] >> 22 == 0xfe80 >> 6 || (a[0] == 0 && a[1] == 0)
    };
    if destination[0] >> 24 == 0xff || odd(&source) || odd(&destination) {
        return None;
    }
    let ports = window.word(AT);
    let (from, to) = ((ports >> 16) as u16, ports as u16);
    let half = |a: &[u32; 4], at: usize| u64::from(a[at]) << 32 | u64::from(a[at + 1]);
    let upper = (half(&source, 0), half(&destination, 0));
    let lower = (half(&source, 2), half(&destination, 2));
    let from_low = upper.0 < upper.1
        || (upper.0 == upper.1 && (lower.0 < lower.1 || (lower.0 == lower.1 && from <= to)));
    let key = if from_low {
        FlowKey::new(source, destination, from, to, protocol, true, 0)
    } else {
        FlowKey::new(destination, source, to, from, protocol, true, 0)
    };
    Some(Plain {
        key,
        from_low,
        protocol,
    })
}
