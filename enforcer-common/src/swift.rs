//! The short way through the judgement: a packet of an established flow whose headers hold nothing
//! odd passes after one look into the flow table.
//!
//! It decides nothing anew: whatever it lets pass, [`crate::judge`] would let pass with reason
//! `established`, and it leaves the same entry behind. Everything else goes the long way. That
//! both agree is tested with every packet that a test judges on the host.

use crate::{
    flow::{
        CLOSING, Clock, FlowSlot as _, Glance, Glances, OPENER_IS_LOW, REPLIED, SESSION, TIMED,
        age, idle,
    },
    packet::{Kind, Link, Tuple, tcp},
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
    /// Eight bytes, big-endian.
    fn long(&self, at: u32) -> u64;
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

    fn long(&self, at: u32) -> u64 {
        u64::from(self.word(at)) << 32 | u64::from(self.word(at + 4))
    }

    fn length(&self) -> u32 {
        self.len() as u32
    }
}

/// Bytes of its header.
const ETHERNET: u32 = 14;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// Whether frames of a link can go the short way: they begin with an Ethernet header and have no
/// tag in their metadata.
#[inline(always)]
pub const fn may(link: &Link) -> bool {
    link.ethernet && link.vlan.is_none()
}

/// A packet whose headers hold nothing odd.
#[derive(Clone, Copy, Debug)]
pub struct Plain {
    /// Addresses and ports.
    pub tuple: Tuple,
    key: FlowKey,
    from_low: bool,
}

/// What the flow table says of a plain packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// It is of an established flow, whose entry is up to date now.
    Established,
    /// It has an entry that must be looked at, or may have one.
    Entry,
    /// It has none.
    Nothing,
}

/// Where and when: the hook's direction, the interface, the live image's generation, jiffies.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// Whether the packet comes into the host.
    pub ingress: bool,
    /// The interface.
    pub ifindex: u32,
    /// Its slot in the image's bitmaps.
    pub slot: u32,
    /// Generation of the live image, 0 if there is none.
    pub generation: u32,
    /// Jiffies.
    pub clock: Clock,
}

/// Reads a packet, if it is plain.
#[inline(always)]
pub fn read<W: Window + ?Sized>(window: &W) -> Option<Plain> {
    match read4(window) {
        None => read6(window),
        packet => packet,
    }
}

/// Reads a packet, if it is plain and IPv4.
#[inline(always)]
pub fn read4<W: Window + ?Sized>(window: &W) -> Option<Plain> {
    if !window.holds(ETHERNET + 28) || window.half(12) != 0x0800 {
        return None;
    }
    ipv4(window)
}

/// Reads a packet, if it is plain and IPv6.
#[inline(always)]
pub fn read6<W: Window + ?Sized>(window: &W) -> Option<Plain> {
    if !window.holds(ETHERNET + 48) || window.half(12) != 0x86dd {
        return None;
    }
    ipv6(window)
}

/// Looks a plain packet's flow up, and brings its entry up to date if it is established.
#[inline(always)]
pub fn look<F: Glances>(table: &F, packet: &Plain, moment: &Moment, length: u32) -> Known {
    let slot = match table.glance(&packet.key) {
        Glance::Entry(slot) => slot,
        Glance::Busy => return Known::Entry,
        Glance::Nothing => return Known::Nothing,
    };
    let tuple = &packet.tuple;
    let entry = slot.load();
    let from_opener = (entry.flags & OPENER_IS_LOW != 0) == packet.from_low;
    let arrived = entry.arrived[usize::from(packet.from_low)];
    // The opener's packets need no answer; an answer has been noted before.
    let settled = from_opener || entry.flags & REPLIED != 0;
    // With SYN, FIN or RST it opens or closes. Whatever the flow, it is not absent within the
    // shortest of the bounds: which one is its own costs more than the long way once a minute.
    let flags = tuple.tcp_flags & (tcp::SYN | tcp::ACK | tcp::RST | tcp::FIN);
    let goes_on = tuple.protocol != TCP || flags == tcp::ACK;
    if entry.generation != moment.generation
        || moment.generation == 0
        || entry.flags & (TIMED | SESSION | CLOSING) != 0
        || (moment.ingress && arrived != moment.ifindex)
        || !settled
        || !goes_on
        || age(moment.clock.now, entry.last_seen as u32) > idle::SHORTEST * moment.clock.hz
    {
        return Known::Entry;
    }
    slot.touch(moment.clock.now, length);
    Known::Established
}

/// Reads the transport header at `at` of a packet that ends at `end`: TCP flags; 0 for UDP.
#[inline(always)]
fn transport<W: Window + ?Sized>(window: &W, protocol: u8, at: u32, end: u32) -> Option<u8> {
    if end > window.length() {
        return None;
    }
    if protocol == UDP {
        return (at + 8 <= end).then_some(0);
    }
    if protocol != TCP || !window.holds(at + 20) || at + 20 > end {
        return None;
    }
    let header = u32::from(window.byte(at + 12) >> 4) * 4;
    (header >= 20 && at + header <= end).then(|| window.byte(at + 13))
}

#[inline(always)]
fn plain(
    source: [u32; 4],
    destination: [u32; 4],
    ports: u32,
    protocol: u8,
    v6: bool,
    tcp_flags: u8,
    from_low: bool,
) -> Plain {
    let (from, to) = ((ports >> 16) as u16, ports as u16);
    let key = if from_low {
        FlowKey::new(source, destination, from, to, protocol, v6, 0)
    } else {
        FlowKey::new(destination, source, to, from, protocol, v6, 0)
    };
    let tuple = Tuple {
        source,
        destination,
        source_port: from,
        destination_port: to,
        protocol,
        v6,
        kind: if protocol == TCP {
            Kind::Tcp
        } else {
            Kind::Ports
        },
        tcp_flags,
        selector: to,
    };
    Plain {
        tuple,
        key,
        from_low,
    }
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
    let end = IP + u32::from(window.half(IP + 2));
    let flags = transport(window, protocol, AT, end)?;
    let (source, destination) = (window.word(IP + 12), window.word(IP + 16));
    // Multicast has no flows; link-local addresses have a scope.
    if destination >> 28 >= 0xe || source >> 16 == 0xa9fe || destination >> 16 == 0xa9fe {
        return None;
    }
    let ports = window.word(AT);
    let from_low = source < destination || (source == destination && ports >> 16 <= ports & 0xffff);
    let (source, destination) = ([0, 0, 0, source], [0, 0, 0, destination]);
    Some(plain(
        source,
        destination,
        ports,
        protocol,
        false,
        flags,
        from_low,
    ))
}

#[inline(always)]
fn ipv6<W: Window + ?Sized>(window: &W) -> Option<Plain> {
    const IP: u32 = ETHERNET;
    const AT: u32 = IP + 40;
    if window.byte(IP) >> 4 != 6 {
        return None;
    }
    let protocol = window.byte(IP + 6);
    let end = AT + u32::from(window.half(IP + 4));
    let flags = transport(window, protocol, AT, end)?;
    let source = (window.long(IP + 8), window.long(IP + 16));
    let destination = (window.long(IP + 24), window.long(IP + 32));
    // Link-local addresses have a scope; mapped ones are no flow's; multicast has none.
    let odd = |upper: u64| upper >> 54 == 0xfe80 >> 6 || upper == 0;
    if destination.0 >> 56 == 0xff || odd(source.0) || odd(destination.0) {
        return None;
    }
    let ports = window.word(AT);
    let from_low = if source.0 != destination.0 {
        source.0 < destination.0
    } else if source.1 != destination.1 {
        source.1 < destination.1
    } else {
        ports >> 16 <= ports & 0xffff
    };
    let words = |(upper, lower): (u64, u64)| {
        [
            (upper >> 32) as u32,
            upper as u32,
            (lower >> 32) as u32,
            lower as u32,
        ]
    };
    let (source, destination) = (words(source), words(destination));
    Some(plain(
        source,
        destination,
        ports,
        protocol,
        true,
        flags,
        from_low,
    ))
}
