//! Frame → [`Packet`]: the one parser, for the kernel and for tests.
//!
//! Whatever cannot be read to its end is an error with its own reason, never a pass: addresses of
//! the wire are judged only after every length has been checked against the packet's.
//! Must not know: policy, flow state, who reads the bytes.

use crate::{
    image::{Address, essential},
    verdict::Reason,
};

/// The bytes of a packet.
pub trait Bytes {
    /// `N` bytes at `offset`, or `None` when they are not all there.
    fn read<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;
    /// Length of the packet in bytes.
    fn length(&self) -> u32;
}

impl Bytes for [u8] {
    fn read<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let start = offset as usize;
        self.get(start..start.checked_add(N)?)?.try_into().ok()
    }

    fn length(&self) -> u32 {
        self.len() as u32
    }
}

/// What is known of a packet besides its bytes.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Whether the bytes start with an Ethernet header; else with the IP header.
    pub ethernet: bool,
    /// Ethertype by the metadata, for links without Ethernet header. Host byte order.
    pub protocol: u16,
    /// VLAN tag that the driver or the kernel has moved into metadata.
    pub vlan: Option<u16>,
    /// Whether the packet comes into the host.
    pub ingress: bool,
    /// The interface, which scopes link-local addresses.
    pub ifindex: u32,
    /// The interface's number in the image's interface bitmaps, 0 if it has none.
    pub slot: u32,
    /// Whether the kernel has merged segments into one packet (GRO) or has yet to split it (GSO):
    /// only then may a length field of 0 mean "longer than 65 535".
    pub gso: bool,
    /// Whether it is the host's own multicast or broadcast, looped back to it.
    pub looped: bool,
}

/// How the transport header takes part in flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// No ports known: one flow per address pair and protocol.
    Other,
    /// TCP: flags decide what opens a flow.
    Tcp,
    /// UDP, UDP-Lite, SCTP: the first packet opens the flow.
    Ports,
    /// ICMP(v6) echo or timestamp request: opens a flow.
    IcmpRequest,
    /// The answer to one.
    IcmpReply,
    /// An error about another packet.
    IcmpError,
    /// Any other ICMP message: judged, opens nothing.
    IcmpOther,
}

impl Kind {
    /// The kind with this number; others read as [`Kind::Other`].
    #[inline(always)]
    pub const fn from_bits(bits: u32) -> Self {
        match bits {
            1 => Self::Tcp,
            2 => Self::Ports,
            3 => Self::IcmpRequest,
            4 => Self::IcmpReply,
            5 => Self::IcmpError,
            6 => Self::IcmpOther,
            _ => Self::Other,
        }
    }
}

/// Addresses and ports of a packet, in its own direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuple {
    /// Source, big-endian words as numbers; IPv4 in the last.
    pub source: [u32; 4],
    /// Destination, likewise.
    pub destination: [u32; 4],
    /// Source port; identifier of ICMP requests and replies; else 0.
    pub source_port: u16,
    /// Destination port; identifier of ICMP requests and replies; else 0.
    pub destination_port: u16,
    /// IP protocol.
    pub protocol: u8,
    /// Whether the addresses are IPv6.
    pub v6: bool,
    /// How the transport takes part in flows.
    pub kind: Kind,
    /// TCP flags, else 0.
    pub tcp_flags: u8,
    /// What a rule's service is compared with: see [`crate::decide::Query::selector`].
    pub selector: u16,
}

impl Tuple {
    /// All zeros.
    pub const EMPTY: Self = Self {
        source: [0; 4],
        destination: [0; 4],
        source_port: 0,
        destination_port: 0,
        protocol: 0,
        v6: false,
        kind: Kind::Other,
        tcp_flags: 0,
        selector: 0,
    };

    /// The source as the image sees it.
    #[inline(always)]
    pub fn source_address(&self) -> Address {
        address(&self.source, self.v6)
    }

    /// The destination as the image sees it.
    #[inline(always)]
    pub fn destination_address(&self) -> Address {
        address(&self.destination, self.v6)
    }
}

#[inline(always)]
fn address(words: &[u32; 4], v6: bool) -> Address {
    if v6 {
        Address::v6(
            (u64::from(words[0]) << 32) | u64::from(words[1]),
            (u64::from(words[2]) << 32) | u64::from(words[3]),
        )
    } else {
        Address::v4(words[3])
    }
}

/// A packet, as far as it could be read.
#[derive(Clone, Copy, Debug)]
pub struct Packet {
    /// Addresses and ports; meaningful if `addresses`.
    pub tuple: Tuple,
    /// The packet that an ICMP error speaks of; meaningful if `has_inner`.
    pub inner: Tuple,
    /// Whether `inner` was read.
    pub has_inner: bool,
    /// Whether the addresses in `tuple` were read.
    pub addresses: bool,
    /// Bit of [`essential`] that the packet falls under, else 0.
    pub essential: u32,
    /// The interface, which scopes link-local addresses.
    pub ifindex: u32,
    /// Fragment identification; meaningful if `fragment` is not [`Fragment::Whole`].
    pub fragment_id: u32,
    /// First fragment: bytes of payload behind it (a later one must not begin before). Later
    /// fragment: where it begins.
    pub fragment_at: u32,
    /// What part of a packet it is.
    pub fragment: Fragment,
    /// Ethertype after all VLAN tags, 0 if not read.
    pub ethertype: u16,
    /// Bytes of the frame.
    pub length: u32,
}

/// What part of an IP packet a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Fragment {
    /// All of it; an atomic fragment (RFC 6946) as well.
    Whole,
    /// The first fragment, with the whole transport header.
    First,
    /// One without a transport header.
    Later,
}

impl Packet {
    /// A packet of which nothing was read.
    pub const EMPTY: Self = Self {
        tuple: Tuple::EMPTY,
        inner: Tuple::EMPTY,
        has_inner: false,
        addresses: false,
        essential: 0,
        ifindex: 0,
        fragment_id: 0,
        fragment_at: 0,
        fragment: Fragment::Whole,
        ethertype: 0,
        length: 0,
    };
}

/// TCP flag bits.
pub mod tcp {
    /// FIN.
    pub const FIN: u8 = 0x01;
    /// SYN.
    pub const SYN: u8 = 0x02;
    /// RST.
    pub const RST: u8 = 0x04;
    /// ACK.
    pub const ACK: u8 = 0x10;
}

const ETHERNET: u32 = 14;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const VLAN: u16 = 0x8100;
const QINQ: u16 = 0x88a8;
const MAX_VLAN_TAGS: u32 = 2;
/// DESIGN: fail closed past six; Linux itself accepts 120 [measured on 6.18].
const MAX_EXTENSION_HEADERS: u32 = 6;

const ICMP: u8 = 1;
const IGMP: u8 = 2;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
const SCTP: u8 = 132;
const UDPLITE: u8 = 136;
/// Longest IP payload and header together, reassembled (RFC 791, RFC 8200).
const MAX_PACKET: u32 = 65_535;

#[inline(always)]
fn be16(bytes: [u8; 2]) -> u16 {
    u16::from_be_bytes(bytes)
}

#[inline(always)]
fn be32(a: u8, b: u8, c: u8, d: u8) -> u32 {
    u32::from_be_bytes([a, b, c, d])
}

/// An address in an IPv6 header, as big-endian words.
#[inline(always)]
fn v6_address(h: &[u8; 40], at: usize) -> [u32; 4] {
    let word = |i: usize| be32(h[at + i], h[at + i + 1], h[at + i + 2], h[at + i + 3]);
    [word(0), word(4), word(8), word(12)]
}

/// Reads a packet. On error `packet` holds what was read until then.
///
/// # Errors
/// The reason of form: malformed, fragment, extension header, VLAN nesting or ethertype.
#[inline(always)]
pub fn parse<B: Bytes + ?Sized>(bytes: &B, link: &Link, packet: &mut Packet) -> Result<(), Reason> {
    packet.ifindex = link.ifindex;
    packet.length = bytes.length();
    let mut offset = 0;
    let mut ethertype = link.protocol;
    if link.ethernet {
        let header: [u8; 14] = bytes.read(0).ok_or(Reason::Malformed)?;
        ethertype = be16([header[12], header[13]]);
        offset = ETHERNET;
        let mut tags = 0;
        let mut priority_tags = 0;
        if let Some(tci) = link.vlan {
            tags += 1;
            priority_tags += u32::from(tci & 0xfff == 0);
        }
        let mut walked = 0;
        // One turn more than tags are allowed, to see the one too many.
        while walked <= MAX_VLAN_TAGS {
            if ethertype != VLAN && ethertype != QINQ {
                break;
            }
            let tag: [u8; 4] = bytes.read(offset).ok_or(Reason::Malformed)?;
            tags += 1;
            priority_tags += u32::from(be16([tag[0], tag[1]]) & 0xfff == 0);
            if tags > MAX_VLAN_TAGS || priority_tags > 1 {
                return Err(Reason::VlanNested);
            }
            ethertype = be16([tag[2], tag[3]]);
            offset += 4;
            walked += 1;
        }
        packet.ethertype = ethertype;
        packet.essential = essential_frame(bytes, &header, ethertype, offset);
    } else {
        packet.ethertype = ethertype;
    }
    match ethertype {
        IPV4 => ipv4(bytes, link, offset, packet),
        IPV6 => ipv6(bytes, link, offset, packet),
        _ => Err(Reason::Ethertype),
    }
}

/// The essential protocols below IP.
#[inline(always)]
fn essential_frame<B: Bytes + ?Sized>(
    bytes: &B,
    header: &[u8; 14],
    ethertype: u16,
    offset: u32,
) -> u32 {
    match ethertype {
        0x0806 => essential::ARP,
        0x88cc => essential::LLDP,
        0x888e => essential::EAPOL,
        0x8809 => essential::SLOW,
        0x88f7 => essential::PTP,
        // IEEE 802.3 length: LLC follows. Spanning tree is SAP 0x42 to its reserved group.
        0..=1535
            if [header[0], header[1], header[2]] == [0x01, 0x80, 0xc2]
                && [header[3], header[4], header[5]] == [0, 0, 0] =>
        {
            match bytes.read::<2>(offset) {
                Some([0x42, 0x42]) => essential::STP,
                _ => 0,
            }
        }
        _ => 0,
    }
}

#[inline(always)]
fn ipv4<B: Bytes + ?Sized>(
    bytes: &B,
    link: &Link,
    offset: u32,
    packet: &mut Packet,
) -> Result<(), Reason> {
    let h: [u8; 20] = bytes.read(offset).ok_or(Reason::Malformed)?;
    let header_length = u32::from(h[0] & 0x0f) * 4;
    if h[0] >> 4 != 4 {
        return Err(Reason::Malformed);
    }
    let tuple = &mut packet.tuple;
    tuple.source = [0, 0, 0, be32(h[12], h[13], h[14], h[15])];
    tuple.destination = [0, 0, 0, be32(h[16], h[17], h[18], h[19])];
    tuple.protocol = h[9];
    packet.addresses = true;
    let end = ip_end(bytes, link, offset, u32::from(be16([h[2], h[3]])));
    if header_length < 20 || end < offset + header_length || end > bytes.length() {
        return Err(Reason::Malformed);
    }
    let at = offset + header_length;
    if header_length > 20 && source_routed(bytes, offset + 20, at) {
        return Err(Reason::SourceRoute);
    }
    let field = be16([h[6], h[7]]);
    let begin = u32::from(field & 0x1fff) * 8;
    let more = field & 0x2000 != 0;
    if begin != 0 || more {
        packet.fragment_id = u32::from(be16([h[4], h[5]]));
        fragment(packet, begin, more, end - at)?;
        if begin != 0 {
            return Ok(());
        }
    }
    let read = transport(bytes, at, end, packet);
    if more {
        // No tiny first fragment hides what the rules look at (RFC 1858).
        return read.map_err(|_| Reason::Fragment);
    }
    read?;
    let tuple = &packet.tuple;
    if tuple.protocol == UDP && dhcp_v4(link, tuple) {
        packet.essential = essential::DHCP;
    } else if tuple.protocol == IGMP && tuple.destination[3] >> 28 == 0xe {
        packet.essential = essential::MULTICAST_MEMBERSHIP;
    }
    Ok(())
}

/// Where an IPv4 packet ends that says it is `total` bytes long. A length of 0 is what the kernel
/// writes for merged segments of more than 65 535 bytes (its own `iph_totlen`).
#[inline(always)]
fn ip_end<B: Bytes + ?Sized>(bytes: &B, link: &Link, offset: u32, total: u32) -> u32 {
    if total == 0 && link.gso {
        bytes.length()
    } else {
        offset + total
    }
}

/// Notes a fragment that begins at `begin` of a payload and has `length` bytes of it.
#[inline(always)]
fn fragment(packet: &mut Packet, begin: u32, more: bool, length: u32) -> Result<(), Reason> {
    // All but the last are whole units of 8 bytes; no reassembled packet is longer than 65 535.
    if length == 0 || (more && length & 7 != 0) || begin + length > MAX_PACKET {
        return Err(Reason::Malformed);
    }
    if begin == 0 {
        packet.fragment = Fragment::First;
        packet.fragment_at = length;
    } else {
        packet.fragment = Fragment::Later;
        packet.fragment_at = begin;
        packet.tuple.kind = Kind::Other;
    }
    Ok(())
}

/// Whether IPv4 options may hold a source route (types 131 and 137): the destination in the header
/// would not be the final one. Any byte of that value counts, so that no option before it needs
/// to be walked; the options that stacks send today (NOP, router alert) have none.
#[inline(never)]
fn source_routed<B: Bytes + ?Sized>(bytes: &B, from: u32, end: u32) -> bool {
    let mut at = from;
    let mut walked = 0;
    while walked < 10 {
        if at >= end {
            return false;
        }
        match bytes.read::<4>(at) {
            Some(option) => {
                if option.iter().any(|byte| matches!(byte, 131 | 137)) {
                    return true;
                }
            }
            None => return true,
        }
        at += 4;
        walked += 1;
    }
    false
}

/// The DHCP client's part (RFC 2131 §4.1): what it sends, what it receives, broadcasts of both.
/// A unicast message that is only forwarded is judged at one of its two hooks.
#[inline(always)]
fn dhcp_v4(link: &Link, tuple: &Tuple) -> bool {
    let broadcast = tuple.destination[3] == u32::MAX;
    match (tuple.source_port, tuple.destination_port) {
        (68, 67) => !link.ingress || broadcast,
        (67, 68) => link.ingress || broadcast,
        _ => false,
    }
}

#[inline(always)]
fn link_local_v6(address: &[u32; 4]) -> bool {
    address[0] >> 22 == 0xfe80 >> 6
}

#[inline(always)]
fn mapped(address: &[u32; 4]) -> bool {
    address[0] == 0 && address[1] == 0 && address[2] == 0xffff
}

#[inline(always)]
fn ipv6<B: Bytes + ?Sized>(
    bytes: &B,
    link: &Link,
    offset: u32,
    packet: &mut Packet,
) -> Result<(), Reason> {
    let h: [u8; 40] = bytes.read(offset).ok_or(Reason::Malformed)?;
    if h[0] >> 4 != 6 {
        return Err(Reason::Malformed);
    }
    let tuple = &mut packet.tuple;
    tuple.v6 = true;
    tuple.source = v6_address(&h, 8);
    tuple.destination = v6_address(&h, 24);
    packet.addresses = true;
    let payload = u32::from(be16([h[4], h[5]]));
    let end = if payload == 0 && link.gso {
        // More than 65 535 bytes of merged segments, with or without a jumbo option.
        bytes.length()
    } else {
        offset + 40 + payload
    };
    if end > bytes.length() || mapped(&tuple.source) || mapped(&tuple.destination) {
        return Err(Reason::Malformed);
    }
    let hop_limit = h[7];
    let mut walk = Walk {
        next: h[6],
        at: offset + 40,
        some: false,
        fragment: 0,
        id: 0,
        fragment_at: 0,
    };
    let walked = extension_headers(bytes, end, &mut walk);
    tuple.protocol = walk.next;
    walked?;
    if walk.fragment != 0 {
        packet.fragment_id = walk.id;
        let begin = u32::from(walk.fragment & 0xfff8);
        let more = walk.fragment & 1 != 0;
        if begin != 0 || more {
            fragment(packet, begin, more, end - walk.fragment_at)?;
        }
        if begin != 0 {
            return Ok(());
        }
        if more {
            // RFC 7112: the first fragment holds all headers.
            return transport(bytes, walk.at, end, packet).map_err(|_| Reason::Fragment);
        }
    }
    transport(bytes, walk.at, end, packet)?;
    let tuple = &packet.tuple;
    if walk.fragment_at != 0 {
        // RFC 6980: neighbour discovery never carries a fragment header, not even an atomic one,
        // so nothing here is essential.
        return Ok(());
    }
    packet.essential = match tuple.protocol {
        ICMPV6 => match (tuple.selector >> 8, hop_limit) {
            // Nobody puts extension headers before neighbour discovery but to hide it.
            (133..=136, 255) if !walk.some => essential::ND,
            (130 | 131 | 132 | 143, 1)
                if link_local_v6(&tuple.source) || tuple.source == [0; 4] =>
            {
                essential::MULTICAST_MEMBERSHIP
            }
            _ => 0,
        },
        UDP if dhcp_v6(link, tuple) => essential::DHCP,
        _ => 0,
    };
    Ok(())
}

/// Where a walk over IPv6 extension headers stands.
struct Walk {
    next: u8,
    at: u32,
    /// Whether there was any header.
    some: bool,
    /// The fragment header's offset and flags, 0 if there is none or it is atomic.
    fragment: u16,
    id: u32,
    /// Where the fragmentable part begins, 0 without a fragment header.
    fragment_at: u32,
}

/// Walks extension headers up to the transport header, or to a later fragment's payload.
#[inline(never)]
fn extension_headers<B: Bytes + ?Sized>(
    bytes: &B,
    end: u32,
    walk: &mut Walk,
) -> Result<(), Reason> {
    // Written out: Linux 6.1 takes no loop whose last instruction falls into its first, which is
    // how the compiler lays this one out. One turn more than headers are allowed, to see the one
    // too many.
    macro_rules! turns {
        ($($walked:literal)*) => { $(
            if let Some(end) = step(bytes, end, walk, $walked) {
                return end;
            }
        )* };
    }
    turns!(0 1 2 3 4 5 6);
    Ok(())
}

/// Walks over one header, of which there were `walked` before. `None`: there may be another.
#[inline(always)]
fn step<B: Bytes + ?Sized>(
    bytes: &B,
    end: u32,
    walk: &mut Walk,
    walked: u32,
) -> Option<Result<(), Reason>> {
    let kind = walk.next;
    if !matches!(kind, 0 | 43 | 44 | 60) {
        return Some(Ok(()));
    }
    if walked == MAX_EXTENSION_HEADERS || (kind == 0 && walked > 0) {
        return Some(Err(Reason::ExtensionHeader));
    }
    // Padding behind the packet is not part of it.
    if walk.at + 8 > end {
        return Some(Err(truncated(walk)));
    }
    let Some(e) = bytes.read::<8>(walk.at) else {
        return Some(Err(Reason::Malformed));
    };
    let length = match kind {
        44 => {
            // One is enough; a second would let fragments hide in fragments.
            if walk.fragment_at != 0 {
                return Some(Err(Reason::ExtensionHeader));
            }
            // Offset and the "more" bit; the two reserved bits mean nothing (RFC 8200).
            walk.fragment = be16([e[2], e[3]]) & 0xfff9;
            walk.id = be32(e[4], e[5], e[6], e[7]);
            walk.fragment_at = walk.at + 8;
            if walk.fragment & 0xfff8 != 0 {
                walk.next = e[0];
                walk.at += 8;
                return Some(Ok(()));
            }
            8
        }
        // Segments left: the final destination is not the one that would be judged.
        43 if e[3] != 0 => return Some(Err(Reason::ExtensionHeader)),
        _ => (u32::from(e[1]) + 1) * 8,
    };
    walk.next = e[0];
    walk.at += length;
    if walk.at > end {
        return Some(Err(truncated(walk)));
    }
    walk.some = true;
    None
}

/// Headers that go on behind the end: of a first fragment, they are in a later one.
#[inline(always)]
const fn truncated(walk: &Walk) -> Reason {
    if walk.fragment & 1 != 0 {
        Reason::Fragment
    } else {
        Reason::Malformed
    }
}

/// The DHCPv6 client's part (RFC 8415 §7): to ff02::1:2 or out of this host; from link-local.
#[inline(always)]
fn dhcp_v6(link: &Link, tuple: &Tuple) -> bool {
    match (tuple.source_port, tuple.destination_port) {
        (546, 547) => !link.ingress || tuple.destination == [0xff02_0000, 0, 0, 0x0001_0002],
        (547, 546) => link.ingress && link_local_v6(&tuple.source),
        _ => false,
    }
}

/// Reads the transport header at `at` of a packet that ends at `end`.
#[inline(always)]
fn transport<B: Bytes + ?Sized>(
    bytes: &B,
    at: u32,
    end: u32,
    packet: &mut Packet,
) -> Result<(), Reason> {
    let tuple = &mut packet.tuple;
    let v6 = tuple.v6;
    match tuple.protocol {
        TCP => {
            // The whole header, so that no tiny fragment hides its flags (RFC 1858).
            if at + 20 > end {
                return Err(Reason::Malformed);
            }
            let h: [u8; 14] = bytes.read(at).ok_or(Reason::Malformed)?;
            ports(tuple, Kind::Tcp, [h[0], h[1], h[2], h[3]]);
            tuple.tcp_flags = h[13];
            let length = u32::from(h[12] >> 4) * 4;
            if length < 20 || at + length > end {
                return Err(Reason::Malformed);
            }
        }
        UDP | SCTP | UDPLITE => {
            let minimum = if tuple.protocol == SCTP { 12 } else { 8 };
            if at + minimum > end {
                return Err(Reason::Malformed);
            }
            let h: [u8; 4] = bytes.read(at).ok_or(Reason::Malformed)?;
            ports(tuple, Kind::Ports, h);
        }
        ICMP | ICMPV6 if (tuple.protocol == ICMPV6) == v6 => {
            if at + 8 > end {
                return Err(Reason::Malformed);
            }
            let h: [u8; 6] = bytes.read(at).ok_or(Reason::Malformed)?;
            icmp(tuple, h);
            if tuple.kind == Kind::IcmpError {
                packet.has_inner = inner(bytes, at + 8, end, v6, &mut packet.inner).is_some();
            }
        }
        _ => tuple.kind = Kind::Other,
    }
    Ok(())
}

#[inline(always)]
fn ports(tuple: &mut Tuple, kind: Kind, h: [u8; 4]) {
    tuple.kind = kind;
    tuple.source_port = be16([h[0], h[1]]);
    tuple.destination_port = be16([h[2], h[3]]);
    tuple.selector = tuple.destination_port;
}

/// Fills in an ICMP or ICMPv6 header's first six bytes: type, code, checksum, identifier.
#[inline(always)]
fn icmp(tuple: &mut Tuple, h: [u8; 6]) {
    tuple.selector = be16([h[0], h[1]]);
    tuple.kind = match (tuple.v6, h[0]) {
        (false, 8 | 13) | (true, 128) => Kind::IcmpRequest,
        (false, 0 | 14) | (true, 129) => Kind::IcmpReply,
        // RFC 792, RFC 4443. Redirects are advice, not errors: they are judged by rules.
        (false, 3 | 4 | 11 | 12) | (true, 1..=4) => Kind::IcmpError,
        _ => Kind::IcmpOther,
    };
    if matches!(tuple.kind, Kind::IcmpRequest | Kind::IcmpReply) {
        let identifier = be16([h[4], h[5]]);
        tuple.source_port = identifier;
        tuple.destination_port = identifier;
    }
}

/// Reads the packet that an ICMP error quotes: at least 8 bytes of its transport (RFC 792).
#[inline(always)]
fn inner<B: Bytes + ?Sized>(
    bytes: &B,
    at: u32,
    end: u32,
    v6: bool,
    tuple: &mut Tuple,
) -> Option<()> {
    let transport_at;
    if v6 {
        let h: [u8; 40] = bytes.read(at)?;
        if h[0] >> 4 != 6 {
            return None;
        }
        tuple.source = v6_address(&h, 8);
        tuple.destination = v6_address(&h, 24);
        let mut walk = Walk {
            next: h[6],
            at: at + 40,
            some: false,
            fragment: 0,
            id: 0,
            fragment_at: 0,
        };
        extension_headers(bytes, end, &mut walk).ok()?;
        if walk.fragment & 0xfff8 != 0 {
            return None;
        }
        tuple.protocol = walk.next;
        transport_at = walk.at;
    } else {
        let h: [u8; 20] = bytes.read(at)?;
        let header_length = u32::from(h[0] & 0x0f) * 4;
        if h[0] >> 4 != 4 || header_length < 20 || be16([h[6], h[7]]) & 0x1fff != 0 {
            return None;
        }
        tuple.source = [0, 0, 0, be32(h[12], h[13], h[14], h[15])];
        tuple.destination = [0, 0, 0, be32(h[16], h[17], h[18], h[19])];
        tuple.protocol = h[9];
        transport_at = at + header_length;
    }
    tuple.v6 = v6;
    if transport_at + 8 > end {
        return None;
    }
    let h: [u8; 6] = bytes.read(transport_at)?;
    match tuple.protocol {
        TCP => ports(tuple, Kind::Tcp, [h[0], h[1], h[2], h[3]]),
        UDP | SCTP | UDPLITE => ports(tuple, Kind::Ports, [h[0], h[1], h[2], h[3]]),
        ICMP | ICMPV6 if (tuple.protocol == ICMPV6) == v6 => {
            icmp(tuple, h);
            // No error answers an error (RFC 1122 §3.2.2), and nothing else has a flow.
            if !matches!(tuple.kind, Kind::IcmpRequest | Kind::IcmpReply) {
                return None;
            }
        }
        _ => tuple.kind = Kind::Other,
    }
    Some(())
}
