//! Frame → verdict of form, as tables: every error reason, every limit, every essential.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "tests and their helpers"
)]

#[path = "../../tests/src/frame.rs"]
#[allow(dead_code, reason = "shared by suites that use different parts")]
mod frame;

use std::net::IpAddr;

use enforcer_common::{
    image::essential,
    packet::{Fragment as Part, Kind, Link, Packet, parse},
    verdict::Reason,
};
use frame::{Extension, SYN};

const LINK: Link = Link {
    ethernet: true,
    protocol: 0,
    vlan: None,
    ingress: true,
    ifindex: 7,
    slot: 0,
    gso: false,
    looped: false,
};
const EGRESS: Link = Link {
    ingress: false,
    ..LINK
};
const MALFORMED: Result<(), Reason> = Err(Reason::Malformed);
const FRAGMENT: Result<(), Reason> = Err(Reason::Fragment);
const EXTENSION: Result<(), Reason> = Err(Reason::ExtensionHeader);
const NESTED: Result<(), Reason> = Err(Reason::VlanNested);
const ETHERTYPE: Result<(), Reason> = Err(Reason::Ethertype);

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn read(bytes: &[u8], link: &Link) -> (Result<(), Reason>, Packet) {
    let mut packet = Packet::EMPTY;
    let result = parse(bytes, link, &mut packet);
    (result, packet)
}

fn form(bytes: &[u8]) -> Result<(), Reason> {
    read(bytes, &LINK).0
}

fn between(v6: bool, protocol: u8, payload: &[u8]) -> Vec<u8> {
    if v6 {
        frame::frame(ip("fd77::1"), ip("fd77::2"), protocol, payload)
    } else {
        frame::frame(ip("10.77.0.1"), ip("10.77.0.2"), protocol, payload)
    }
}

fn tcp4() -> Vec<u8> {
    between(false, 6, &frame::tcp(40_000, 8080, SYN))
}

fn tcp6() -> Vec<u8> {
    between(true, 6, &frame::tcp(40_000, 8080, SYN))
}

fn extended(headers: &[Extension], protocol: u8, payload: &[u8]) -> Vec<u8> {
    let (first, bytes) = frame::extended(headers, protocol, payload);
    between(true, first, &bytes)
}

fn set(frame: &[u8], at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut out = frame.to_vec();
    out[at..at + bytes.len()].copy_from_slice(bytes);
    out
}

#[test]
fn sound_packets_give_their_tuple() {
    for (bytes, kind, ports, selector) in [
        (tcp4(), Kind::Tcp, (40_000, 8080), 8080),
        (tcp6(), Kind::Tcp, (40_000, 8080), 8080),
        (
            between(false, 17, &frame::udp(5, 53)),
            Kind::Ports,
            (5, 53),
            53,
        ),
        (
            between(true, 132, &[0, 5, 0, 53, 0, 0, 0, 0, 0, 0, 0, 0]),
            Kind::Ports,
            (5, 53),
            53,
        ),
        (
            between(false, 1, &frame::icmp(8, 0, 9)),
            Kind::IcmpRequest,
            (9, 9),
            8 << 8,
        ),
        (
            between(false, 1, &frame::icmp(13, 0, 9)),
            Kind::IcmpRequest,
            (9, 9),
            13 << 8,
        ),
        (
            between(false, 1, &frame::icmp(0, 0, 9)),
            Kind::IcmpReply,
            (9, 9),
            0,
        ),
        (
            between(false, 1, &frame::icmp(5, 1, 9)),
            Kind::IcmpOther,
            (0, 0),
            5 << 8 | 1,
        ),
        (
            between(true, 58, &frame::icmp(128, 0, 9)),
            Kind::IcmpRequest,
            (9, 9),
            128 << 8,
        ),
        (
            between(true, 58, &frame::icmp(129, 0, 9)),
            Kind::IcmpReply,
            (9, 9),
            129 << 8,
        ),
        // ICMP of the other family, UDP-Lite and GRE have no ports and alias nothing.
        (
            between(true, 1, &frame::icmp(8, 0, 9)),
            Kind::Other,
            (0, 0),
            0,
        ),
        (
            between(false, 58, &frame::icmp(128, 0, 9)),
            Kind::Other,
            (0, 0),
            0,
        ),
        (
            between(false, 136, &frame::udp(5, 53)),
            Kind::Ports,
            (5, 53),
            53,
        ),
        (between(true, 47, &[]), Kind::Other, (0, 0), 0),
        (between(true, 59, &[]), Kind::Other, (0, 0), 0),
    ] {
        let (result, packet) = read(&bytes, &LINK);
        assert_eq!(result, Ok(()), "{bytes:02x?}");
        let t = packet.tuple;
        assert_eq!(t.kind, kind, "{bytes:02x?}");
        assert_eq!((t.source_port, t.destination_port), ports, "{bytes:02x?}");
        assert_eq!(t.selector, selector, "{bytes:02x?}");
        assert_eq!(packet.ifindex, 7);
        assert!(packet.addresses && packet.essential == 0 && !packet.has_inner);
    }
    let (_, packet) = read(&tcp4(), &LINK);
    assert_eq!(packet.tuple.source, [0, 0, 0, 0x0a4d_0001]);
    assert_eq!(packet.tuple.destination, [0, 0, 0, 0x0a4d_0002]);
    assert_eq!((packet.ethertype, packet.tuple.tcp_flags), (0x0800, SYN));
    let (_, packet) = read(&tcp6(), &LINK);
    assert_eq!(packet.tuple.source, [0xfd77_0000, 0, 0, 1]);
    assert_eq!(packet.tuple.destination, [0xfd77_0000, 0, 0, 2]);
}

#[test]
fn vlan_tags() {
    const Q: u16 = 0x8100;
    const AD: u16 = 0x88a8;
    let metadata = |vlan| Link { vlan, ..LINK };
    type Case = (Option<u16>, &'static [(u16, u16)], Result<(), Reason>);
    let cases: &[Case] = &[
        (None, &[], Ok(())),
        (None, &[(Q, 5)], Ok(())),
        (None, &[(Q, 0)], Ok(())),
        (None, &[(AD, 7), (Q, 5)], Ok(())),
        (None, &[(Q, 0), (Q, 5)], Ok(())),
        (None, &[(Q, 5), (Q, 0)], Ok(())),
        // A priority is no VLAN: VID 0 with any priority bits counts as VID 0.
        (None, &[(Q, 0xe000), (Q, 0)], NESTED),
        (None, &[(Q, 0), (Q, 0)], NESTED),
        (None, &[(AD, 0), (Q, 0)], NESTED),
        (None, &[(Q, 5), (Q, 6), (Q, 7)], NESTED),
        (None, &[(AD, 5), (AD, 6), (Q, 0)], NESTED),
        (None, &[(Q, 5), (Q, 6), (Q, 7), (Q, 8)], NESTED),
        (Some(5), &[], Ok(())),
        (Some(5), &[(Q, 6)], Ok(())),
        (Some(0), &[(Q, 6)], Ok(())),
        (Some(0), &[(Q, 0)], NESTED),
        (Some(5), &[(Q, 6), (Q, 7)], NESTED),
        (Some(5), &[(Q, 6), (Q, 7), (Q, 8)], NESTED),
        // A tag protocol of its own is an unknown ethertype.
        (None, &[(0x9100, 5)], ETHERTYPE),
        (None, &[(Q, 5), (0x9100, 5)], ETHERTYPE),
    ];
    for (vlan, tags, want) in cases {
        for plain in [tcp4(), tcp6()] {
            let bytes = frame::tagged(&plain, tags);
            let (result, packet) = read(&bytes, &metadata(*vlan));
            assert_eq!(result, *want, "{vlan:?} {tags:?}");
            if want.is_ok() {
                assert_eq!(packet.tuple.destination_port, 8080, "{vlan:?} {tags:?}");
            } else {
                assert!(!packet.addresses && packet.tuple.destination_port == 0);
            }
        }
    }
    // A tag that ends the frame.
    let bytes = frame::tagged(&tcp4(), &[(Q, 5)]);
    for length in 14..18 {
        assert_eq!(form(&bytes[..length]), MALFORMED, "{length}");
    }
}

#[test]
fn ethertypes() {
    for ethertype in [0x88b5, 0x8847, 0x8864, 0x8035, 0x0801, 0, 100, 1500, 0xffff] {
        let bytes = set(&tcp4(), 12, &u16::to_be_bytes(ethertype));
        let (result, packet) = read(&bytes, &LINK);
        assert_eq!(result, ETHERTYPE, "{ethertype:#x}");
        assert!(!packet.addresses && packet.essential == 0);
        assert_eq!(packet.ethertype, ethertype);
    }
    for (ethertype, bit) in [
        (0x0806, essential::ARP),
        (0x88cc, essential::LLDP),
        (0x888e, essential::EAPOL),
        (0x8809, essential::SLOW),
        (0x88f7, essential::PTP),
    ] {
        let mut bytes = frame::ethernet(ethertype);
        bytes.extend([0; 46]);
        for bytes in [bytes.clone(), frame::tagged(&bytes, &[(0x8100, 5)])] {
            let (result, packet) = read(&bytes, &LINK);
            assert_eq!((result, packet.essential), (ETHERTYPE, bit));
        }
        let nested = frame::tagged(&bytes, &[(0x8100, 0), (0x8100, 0)]);
        let (result, packet) = read(&nested, &LINK);
        assert_eq!((result, packet.essential), (NESTED, 0));
    }
    // Ethertype and version nibble must agree.
    assert_eq!(form(&set(&tcp4(), 12, &[0x86, 0xdd])), MALFORMED);
    assert_eq!(form(&set(&tcp6(), 12, &[0x08, 0x00])), MALFORMED);
}

#[test]
fn spanning_tree() {
    let mut bpdu = vec![0x01, 0x80, 0xc2, 0, 0, 0, 2, 0, 0, 0, 0, 1, 0, 38];
    bpdu.extend([0x42, 0x42, 3]);
    bpdu.extend([0; 43]);
    assert_eq!(read(&bpdu, &LINK).1.essential, essential::STP);
    for (what, bytes) in [
        ("other group", set(&bpdu, 5, &[1])),
        ("other SAP", set(&bpdu, 14, &[0xaa, 0xaa])),
        ("an ethertype", set(&bpdu, 12, &[0x88, 0xb5])),
        ("no LLC", bpdu[..15].to_vec()),
    ] {
        let (result, packet) = read(&bytes, &LINK);
        assert_eq!((result, packet.essential), (ETHERTYPE, 0), "{what}");
    }
}

#[test]
fn links_without_ethernet_header() {
    let link = |protocol| Link {
        ethernet: false,
        protocol,
        ..LINK
    };
    let (result, packet) = read(&tcp4()[14..], &link(0x0800));
    assert_eq!((result, packet.tuple.destination_port), (Ok(()), 8080));
    let (result, packet) = read(&tcp6()[14..], &link(0x86dd));
    assert_eq!((result, packet.tuple.destination_port), (Ok(()), 8080));
    assert_eq!(packet.ethertype, 0x86dd);
    assert_eq!(read(&tcp4()[14..], &link(0x86dd)).0, MALFORMED);
    assert_eq!(read(&tcp4()[14..], &link(0)).0, ETHERTYPE);
    assert_eq!(read(&tcp4(), &link(0x0800)).0, MALFORMED);
    let (result, packet) = read(&[0; 64], &link(0x0806));
    assert_eq!((result, packet.essential), (ETHERTYPE, 0));
    assert_eq!(read(&[], &link(0x0800)).0, MALFORMED);
}

#[test]
fn ipv4_header() {
    let plain = tcp4();
    for length in 0..5u8 {
        let (result, packet) = read(&set(&plain, 14, &[0x40 | length]), &LINK);
        assert_eq!(result, MALFORMED, "IHL {length}");
        assert!(packet.addresses, "a denial of form knows whose it is");
        assert_eq!(packet.tuple.destination_port, 0);
    }
    for words in 0..=10 {
        let bytes = frame::with_options(&plain, words);
        let (result, packet) = read(&bytes, &LINK);
        assert_eq!(result, Ok(()), "{words} words of options");
        assert_eq!(packet.tuple.destination_port, 8080);
    }
    // The header claims options that the packet has no room for.
    for length in 6..=15u8 {
        assert_eq!(form(&set(&plain, 14, &[0x40 | length])), MALFORMED);
    }
    for version in (0..16u8).filter(|v| *v != 4) {
        let (result, packet) = read(&set(&plain, 14, &[version << 4 | 5]), &LINK);
        assert_eq!(result, MALFORMED);
        assert!(!packet.addresses);
    }
    let total = u16::try_from(plain.len() - 14).unwrap();
    for (claimed, want) in [
        (0, MALFORMED),
        (19, MALFORMED),
        (20, MALFORMED),
        (total - 1, MALFORMED),
        (total, Ok(())),
        (total + 1, MALFORMED),
        (0xffff, MALFORMED),
    ] {
        let bytes = set(&plain, 16, &claimed.to_be_bytes());
        assert_eq!(form(&bytes), want, "total length {claimed}");
    }
    // Ethernet padding is not the packet's.
    let mut padded = between(false, 17, &frame::udp(5, 53));
    padded.extend([0; 18]);
    assert_eq!(form(&padded), Ok(()));
    let short = set(&padded, 16, &27u16.to_be_bytes());
    assert_eq!(form(&short), MALFORMED, "a UDP header of seven bytes");
}

#[test]
fn transport_headers() {
    for v6 in [false, true] {
        for (protocol, minimum) in [(6, 20), (17, 8), (132, 12), (if v6 { 58 } else { 1 }, 8)] {
            let mut header = frame::tcp(5, 53, SYN);
            header[12] = 0x50;
            for length in 0..=20 {
                let result = form(&between(v6, protocol, &header[..length]));
                let want = if length < minimum { MALFORMED } else { Ok(()) };
                assert_eq!(result, want, "protocol {protocol}, {length} bytes");
            }
        }
        for words in 0..16u8 {
            let header = set(&frame::tcp(5, 53, SYN), 12, &[words << 4]);
            // 20 bytes of header are there.
            let want = if words == 5 { Ok(()) } else { MALFORMED };
            assert_eq!(form(&between(v6, 6, &header)), want, "data offset {words}");
        }
    }
}

/// Bytes behind the IPv4 header.
fn packet_length(frame: &[u8]) -> u32 {
    u32::try_from(frame.len() - 34).unwrap()
}

#[test]
fn ipv4_fragments() {
    for plain in [
        between(
            false,
            6,
            &[&frame::tcp(40_000, 8080, SYN)[..], &[0; 4]].concat(),
        ),
        between(false, 17, &frame::udp(5, 53)[..8]),
        between(false, 47, &[0; 24]),
        between(false, 255, &[0; 24]),
    ] {
        // The first carries the ports and is judged by them.
        let (result, packet) = read(&frame::as_fragment(&plain, 0, true), &LINK);
        assert_eq!((result, packet.fragment), (Ok(()), Part::First));
        assert_eq!(packet.fragment_at as usize, plain.len() - 34);
        for (offset, more) in [(1, true), (1, false), (185, true), (0x1fff, false)] {
            let bytes = frame::as_fragment(&plain, offset, more);
            let (result, packet) = read(&bytes, &LINK);
            if u32::from(offset) * 8 + packet_length(&plain) > 65_535 {
                assert_eq!(result, MALFORMED, "no packet is that long");
                continue;
            }
            assert_eq!(result, Ok(()), "{offset} {more}");
            assert_eq!(packet.fragment, Part::Later);
            assert_eq!(packet.fragment_at, u32::from(offset) * 8);
            assert!(packet.addresses);
            assert_eq!(
                packet.tuple.destination_port, 0,
                "no port of a later fragment"
            );
        }
    }
    // RFC 1858: a first fragment that hides the TCP flags.
    for length in 0..20 {
        let bytes = between(false, 6, &frame::tcp(5, 53, SYN)[..length]);
        let want = if length > 0 && length % 8 == 0 {
            FRAGMENT
        } else {
            MALFORMED
        };
        assert_eq!(form(&frame::as_fragment(&bytes, 0, true)), want, "{length}");
    }
    // All but the last are whole units of 8 bytes.
    let odd = between(false, 17, &frame::udp(5, 53));
    assert_eq!(form(&frame::as_fragment(&odd, 0, true)), MALFORMED);
    assert_eq!(form(&frame::as_fragment(&odd, 3, true)), MALFORMED);
    assert_eq!(form(&frame::as_fragment(&odd, 3, false)), Ok(()));
    // "Don't fragment" and the reserved bit are not offsets.
    assert_eq!(form(&set(&tcp4(), 20, &[0x40, 0])), Ok(()));
    assert_eq!(form(&set(&tcp4(), 20, &[0x80, 0])), Ok(()));
}

#[test]
fn ipv6_header() {
    let plain = tcp6();
    for version in (0..16u8).filter(|v| *v != 6) {
        let (result, packet) = read(&set(&plain, 14, &[version << 4]), &LINK);
        assert_eq!(result, MALFORMED);
        assert!(!packet.addresses);
    }
    let length = u16::try_from(plain.len() - 54).unwrap();
    for (claimed, want) in [
        (0, MALFORMED),
        (length - 1, MALFORMED),
        (length, Ok(())),
        (length + 1, MALFORMED),
        (0xffff, MALFORMED),
    ] {
        let bytes = set(&plain, 18, &claimed.to_be_bytes());
        assert_eq!(form(&bytes), want, "payload length {claimed}");
    }
    for (source, destination, want) in [
        ("::ffff:10.77.0.1", "fd77::2", MALFORMED),
        ("fd77::1", "::ffff:10.77.0.2", MALFORMED),
        ("::ffff:0.0.0.0", "::ffff:255.255.255.255", MALFORMED),
        // Compatible, translated and 6to4 addresses are IPv6 like any other.
        ("::10.77.0.1", "64:ff9b::10.77.0.2", Ok(())),
        ("2002:a4d:1::1", "::fffe:10.77.0.2", Ok(())),
        ("::1:ffff:a4d:1", "fd77::2", Ok(())),
    ] {
        let bytes = frame::frame(ip(source), ip(destination), 6, &frame::tcp(1, 2, SYN));
        let (result, packet) = read(&bytes, &LINK);
        assert_eq!(result, want, "{source} {destination}");
        assert!(packet.addresses);
    }
}

#[test]
fn ipv6_extension_headers() {
    use Extension::{Fragment, HopByHop, Options, Routing};
    let tcp = frame::tcp(40_000, 8080, SYN);
    let eight = |first: Extension, n: usize| {
        let mut headers = vec![first];
        headers.resize(n, Options);
        headers
    };
    for n in 1..=8 {
        for first in [HopByHop, Options, Routing(0), Fragment(0, false)] {
            let (result, packet) = read(&extended(&eight(first, n), 6, &tcp), &LINK);
            if n <= 6 {
                assert_eq!(result, Ok(()), "{n} headers, {first:?}");
                assert_eq!(packet.tuple.destination_port, 8080);
                assert_eq!(packet.tuple.protocol, 6);
            } else {
                assert_eq!(result, EXTENSION, "{n} headers, {first:?}");
                assert_eq!(packet.tuple.destination_port, 0);
            }
        }
    }
    assert_eq!(form(&extended(&[Options; 120], 6, &tcp)), EXTENSION);
    let cases: &[(&[Extension], Result<(), Reason>)] = &[
        (&[Options, HopByHop], EXTENSION),
        (&[HopByHop, HopByHop], EXTENSION),
        (&[Routing(1)], EXTENSION),
        (&[Options, Routing(255)], EXTENSION),
        // A first fragment holds whole units of 8 bytes, and these are 20.
        (&[Fragment(0, true)], MALFORMED),
        (&[Fragment(1, true)], MALFORMED),
        (&[Fragment(0x1fff, false)], MALFORMED),
        // One fragment header is enough.
        (&[Fragment(0, false), Fragment(2, false)], EXTENSION),
        (&[Fragment(0, false), Fragment(0, false)], EXTENSION),
    ];
    for (headers, want) in cases {
        let (result, packet) = read(&extended(headers, 6, &tcp), &LINK);
        assert_eq!(result, *want, "{headers:?}");
        assert!(packet.addresses);
    }
    let whole = [&tcp[..], &[0; 4]].concat();
    for (headers, at, part) in [
        (&[Fragment(0, true)][..], 24, Part::First),
        (&[Fragment(1, false)], 8, Part::Later),
        (&[HopByHop, Fragment(9, true), Options], 72, Part::Later),
        (&[HopByHop, Fragment(0, true), Options], 32, Part::First),
        (&[Fragment(0, false)], 0, Part::Whole),
    ] {
        let (result, packet) = read(&extended(headers, 6, &whole), &LINK);
        assert_eq!(result, Ok(()), "{headers:?}");
        assert_eq!(
            (packet.fragment, packet.fragment_at),
            (part, at),
            "{headers:?}"
        );
    }
    // RFC 7112: a first fragment without its transport header.
    for payload in [&[][..], &tcp[..19]] {
        assert_eq!(form(&extended(&[Fragment(0, true)], 6, payload)), MALFORMED);
    }
    assert_eq!(
        form(&extended(&[Fragment(0, true)], 6, &tcp[..16])),
        FRAGMENT
    );
    let bytes = extended(&[Fragment(0, true), Options], 6, &[]);
    assert_eq!(form(&bytes), FRAGMENT);
    // Lengths that run past the packet, with the frame's padding to lure the reader on.
    for header in [HopByHop, Options, Routing(0)] {
        for units in 1..=255u8 {
            let mut bytes = extended(&[header], 6, &tcp);
            bytes[55] = units;
            bytes.extend([0; 200]);
            let (result, packet) = read(&bytes, &LINK);
            if units == 2 {
                // Ends with the packet: no room for TCP behind it.
                assert_eq!(packet.tuple.destination_port, 0);
            }
            assert_eq!(result, MALFORMED, "{header:?} {units}");
        }
    }
    // Authentication, ESP, mobility, HIP, no next header: protocols, not headers to walk on from.
    for protocol in [50, 51, 59, 135, 139, 140] {
        let (result, packet) = read(&between(true, protocol, &tcp), &LINK);
        assert_eq!(result, Ok(()));
        assert_eq!(
            (packet.tuple.kind, packet.tuple.protocol),
            (Kind::Other, protocol)
        );
    }
}

#[test]
fn truncated_frames_are_malformed() {
    let (first, chain) = frame::extended(
        &[
            Extension::HopByHop,
            Extension::Routing(0),
            Extension::Fragment(0, false),
        ],
        17,
        &frame::udp(5, 53),
    );
    for whole in [
        tcp4(),
        tcp6(),
        frame::with_options(&tcp4(), 10),
        frame::tagged(&tcp6(), &[(0x88a8, 5), (0x8100, 6)]),
        between(true, first, &chain),
        between(false, 1, &frame::icmp_error(3, 1, &tcp4()[14..])),
    ] {
        assert_eq!(form(&whole), Ok(()));
        for length in 0..whole.len() {
            let (result, packet) = read(&whole[..length], &LINK);
            assert_eq!(result, MALFORMED, "{length} of {}", whole.len());
            assert_eq!(packet.essential, 0);
            assert!(packet.tuple.kind == Kind::Other || packet.addresses);
        }
    }
}

fn quote4(quoted: &[u8]) -> Packet {
    let bytes = between(false, 1, &frame::icmp_error(3, 4, quoted));
    let (result, packet) = read(&bytes, &LINK);
    assert_eq!((result, packet.tuple.kind), (Ok(()), Kind::IcmpError));
    packet
}

fn quote6(quoted: &[u8]) -> Packet {
    let bytes = between(true, 58, &frame::icmp_error(2, 0, quoted));
    let (result, packet) = read(&bytes, &LINK);
    assert_eq!((result, packet.tuple.kind), (Ok(()), Kind::IcmpError));
    packet
}

#[test]
fn quoted_packets() {
    let (four, six) = (&tcp4()[14..], &tcp6()[14..]);
    for length in 0..four.len() {
        let packet = quote4(&four[..length]);
        // RFC 792: the header and eight bytes.
        assert_eq!(packet.has_inner, length >= 28, "{length}");
    }
    for length in 0..six.len() {
        assert_eq!(quote6(&six[..length]).has_inner, length >= 48, "{length}");
    }
    let packet = quote4(four);
    assert_eq!(packet.inner.source, [0, 0, 0, 0x0a4d_0001]);
    assert_eq!(packet.inner.source_port, 40_000);
    assert_eq!(packet.inner.destination_port, 8080);
    let packet = quote6(six);
    assert_eq!(packet.inner.source, [0xfd77_0000, 0, 0, 1]);
    assert_eq!(packet.inner.destination_port, 8080);

    let options = &frame::with_options(&tcp4(), 10)[14..];
    assert_eq!(quote4(options).inner.destination_port, 8080);
    assert!(!quote4(&options[..67]).has_inner);
    assert!(!quote4(&frame::as_fragment(&tcp4(), 3, false)[14..]).has_inner);
    assert!(quote4(&frame::as_fragment(&tcp4(), 0, true)[14..]).has_inner);
    assert!(!quote4(&set(&tcp4(), 14, &[0x44])[14..]).has_inner, "IHL");
    assert!(!quote4(six).has_inner, "the other family");
    assert!(!quote6(four).has_inner, "the other family");
    // An error about an error, and about what opens no flow.
    for (kind, want) in [(8, true), (0, true), (3, false), (5, false), (9, false)] {
        let inner = between(false, 1, &frame::icmp(kind, 0, 9));
        assert_eq!(quote4(&inner[14..]).has_inner, want, "type {kind}");
    }
    // A quoted total length is not checked: routers cut the packet off. Its end is the outer's.
    assert!(quote4(&set(&tcp4(), 16, &[0xff, 0xff])[14..]).has_inner);
    // Bytes behind the outer packet are padding, not a quotation.
    let mut bytes = between(false, 1, &frame::icmp_error(3, 4, &four[..27]));
    bytes.extend(&four[27..]);
    assert!(!read(&bytes, &LINK).1.has_inner);
    for (kind, v6) in [(3, false), (4, false), (11, false), (12, false)]
        .into_iter()
        .chain([(1, true), (2, true), (3, true), (4, true)])
    {
        let quoted = if v6 { six } else { four };
        let protocol = if v6 { 58 } else { 1 };
        let bytes = between(v6, protocol, &frame::icmp_error(kind, 0, quoted));
        assert!(read(&bytes, &LINK).1.has_inner, "type {kind}");
    }
}

#[test]
fn dhcp() {
    let v4 = |source, destination, ports: (u16, u16)| {
        frame::frame(
            ip(source),
            ip(destination),
            17,
            &frame::udp(ports.0, ports.1),
        )
    };
    let (any, all) = ("0.0.0.0", "255.255.255.255");
    for (bytes, ingress, egress) in [
        (v4(any, all, (68, 67)), true, true),
        (v4("10.77.0.1", all, (67, 68)), true, true),
        // Unicast renewal: out of a client, and the answer in.
        (v4("10.77.0.2", "10.77.0.1", (68, 67)), false, true),
        (v4("10.77.0.1", "10.77.0.2", (67, 68)), true, false),
        (v4(any, all, (68, 68)), false, false),
        (v4(any, all, (67, 67)), false, false),
        (v4(any, all, (68, 53)), false, false),
    ] {
        for (link, want) in [(LINK, ingress), (EGRESS, egress)] {
            let (result, packet) = read(&bytes, &link);
            assert_eq!(result, Ok(()));
            let want = if want { essential::DHCP } else { 0 };
            assert_eq!(packet.essential, want, "{bytes:02x?} {}", link.ingress);
        }
    }
    let first = frame::as_fragment(&v4(any, all, (68, 67)), 0, true);
    assert_eq!(read(&first, &LINK).1.essential, 0, "a fragment");
    let tcp = frame::frame(ip(any), ip(all), 6, &frame::tcp(68, 67, SYN));
    assert_eq!(read(&tcp, &LINK).1.essential, 0, "TCP");
    for (source, destination, ports, ingress, egress) in [
        ("fe80::1", "ff02::1:2", (546, 547), true, true),
        ("fe80::1", "fe80::2", (546, 547), false, true),
        ("fd77::1", "ff05::1:3", (546, 547), false, true),
        ("fe80::2", "fe80::1", (547, 546), true, false),
        ("fd77::2", "fe80::1", (547, 546), false, false),
        ("fe80::1", "ff02::1:2", (546, 53), false, false),
    ] {
        let bytes = v4(source, destination, ports);
        for (link, want) in [(LINK, ingress), (EGRESS, egress)] {
            let want = if want { essential::DHCP } else { 0 };
            let got = read(&bytes, &link).1.essential;
            assert_eq!(
                got, want,
                "{source} {destination} {ports:?} {}",
                link.ingress
            );
        }
    }
}

#[test]
fn multicast_membership_and_neighbour_discovery() {
    let igmp = |destination| frame::frame(ip("10.77.0.1"), ip(destination), 2, &[0x16, 0, 0, 0]);
    assert_eq!(
        read(&igmp("224.0.0.22"), &LINK).1.essential,
        essential::MULTICAST_MEMBERSHIP
    );
    assert_eq!(
        read(&igmp("10.77.0.2"), &LINK).1.essential,
        0,
        "unicast IGMP"
    );
    assert_eq!(
        read(&frame::as_fragment(&igmp("224.0.0.22"), 0, true), &LINK)
            .1
            .essential,
        0
    );

    let message = |source: &str, hop_limit, headers: &[Extension], kind| {
        let (first, bytes) = frame::extended(headers, 58, &frame::icmp(kind, 0, 0));
        let bytes = frame::frame(ip(source), ip("ff02::16"), first, &bytes);
        let bytes = set(&bytes, 21, &[hop_limit]);
        let (result, packet) = read(&bytes, &LINK);
        assert_eq!(result, Ok(()));
        packet.essential
    };
    let (mld, nd) = (essential::MULTICAST_MEMBERSHIP, essential::ND);
    use Extension::{Fragment, HopByHop};
    for kind in [130, 131, 132, 143] {
        assert_eq!(message("fe80::1", 1, &[HopByHop], kind), mld);
        assert_eq!(message("::", 1, &[HopByHop], kind), mld);
        assert_eq!(message("fe80::1", 1, &[], kind), mld);
        assert_eq!(message("fd77::1", 1, &[HopByHop], kind), 0, "off link");
        assert_eq!(message("fe80::1", 64, &[HopByHop], kind), 0, "off link");
        assert_eq!(
            message("fe80::1", 1, &[HopByHop, Fragment(0, true)], kind),
            0
        );
    }
    for kind in [133, 134, 135, 136] {
        for source in ["fe80::1", "::", "fd77::1"] {
            assert_eq!(message(source, 255, &[], kind), nd);
            assert_eq!(message(source, 254, &[], kind), 0, "came over a router");
            assert_eq!(message(source, 64, &[], kind), 0, "came over a router");
        }
        // RFC 6980: never with a fragment header, not even an atomic one.
        assert_eq!(message("fe80::1", 255, &[Fragment(0, true)], kind), 0);
        assert_eq!(message("fe80::1", 255, &[Fragment(0, false)], kind), 0);
    }
    for kind in [1, 128, 129, 137, 139, 200] {
        assert_eq!(message("fe80::1", 255, &[], kind), 0);
        assert_eq!(message("fe80::1", 1, &[], kind), 0);
    }
}

/// A routing header with segments left, but in the padding behind an empty packet.
#[test]
fn padding_is_no_extension_header() {
    let mut bytes = between(true, 43, &[]);
    assert_eq!(form(&bytes), MALFORMED);
    bytes.extend([0, 0, 0, 1, 0, 0, 0, 0]);
    assert_eq!(form(&bytes), MALFORMED);
}
