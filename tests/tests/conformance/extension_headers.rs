//! IPv6: extension headers, fragments, addresses that stand for IPv4.

use std::net::IpAddr;

use enforcer_tests::frame;

use crate::{
    bench::{BAD, Bench, GOOD, POLICY, SETTINGS, bench, port, udp},
    wire::mark,
};

const FRIEND: &str = "fd01::3";
const HERE: &str = "fd01::1";

/// A header: its number, and all its bytes but the first.
type Header = (u8, Vec<u8>);

fn options(number: u8) -> Header {
    (number, vec![0, 1, 4, 0, 0, 0, 0])
}

/// A routing header of a kind, `left` segments left.
fn routing(kind: u8, left: u8) -> Header {
    match kind {
        // RFC 8754: one segment.
        4 => {
            let mut bytes = vec![2, 4, left, 0, 0, 0, 0];
            bytes.extend([0xfd, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
            (43, bytes)
        }
        _ => (43, vec![0, kind, left, 0, 0, 0, 0]),
    }
}

/// `at` in bytes.
fn fragment(at: usize, more: bool, id: u32) -> Header {
    let field = u16::try_from(at).unwrap() | u16::from(more);
    (
        44,
        [&[0][..], &field.to_be_bytes(), &id.to_be_bytes()].concat(),
    )
}

/// The headers in front of a payload.
fn chain(headers: &[Header], protocol: u8, payload: &[u8]) -> (u8, Vec<u8>) {
    let (mut next, mut bytes) = (protocol, payload.to_vec());
    for (number, rest) in headers.iter().rev() {
        bytes = [&[next][..], rest, &bytes].concat();
        next = *number;
    }
    (next, bytes)
}

fn packet(to: &str, headers: &[Header], protocol: u8, payload: &[u8]) -> Vec<u8> {
    let ip = |text: &str| -> IpAddr { text.parse().unwrap() };
    let (next, bytes) = chain(headers, protocol, payload);
    frame::frame(ip(FRIEND), ip(to), next, &bytes)
}

/// A datagram behind headers that no other is like.
fn datagram(bench: &mut Bench, headers: &[Header], to: u16) -> Vec<u8> {
    let number = bench.next();
    packet(HERE, headers, 17, &udp(port(number), to, &mark(number)))
}

#[test]
fn up_to_six_headers_are_read_and_left_as_they_are() {
    let mut bench = bench();
    for count in 1..=6 {
        for first in [0, 60] {
            let mut headers = vec![options(60); count];
            headers[0] = options(first);
            let bytes = datagram(&mut bench, &headers, BAD);
            let seen = bench.judge(&[bytes]);
            seen.counts(&[("default_deny", 1)])
                .nothing_arrived()
                .harmful(1);
            let bytes = datagram(&mut bench, &headers, GOOD);
            let seen = bench.judge(std::slice::from_ref(&bytes));
            seen.counts(&[("allowed", 1)]).arrived(1).harmful(1);
            assert_eq!(seen.passed, [bytes], "not a byte is another");
        }
    }
}

#[test]
fn more_than_six_headers_are_dropped() {
    let mut bench = bench();
    for count in [7, 16, 64, 120] {
        for to in [BAD, GOOD] {
            let bytes = datagram(&mut bench, &vec![options(60); count], to);
            let seen = bench.judge(&[bytes]);
            // The host takes 120 of them.
            seen.counts(&[("extension_header", 1)])
                .nothing_arrived()
                .harmful(1);
        }
    }
    // Of every kind, and in any mixture.
    for headers in [
        vec![routing(0, 0); 7],
        vec![
            options(60),
            routing(253, 0),
            options(60),
            options(60),
            fragment(0, false, 9),
            options(60),
            options(60),
        ],
    ] {
        let bytes = datagram(&mut bench, &headers, GOOD);
        bench
            .judge(&[bytes])
            .counts(&[("extension_header", 1)])
            .nothing_arrived();
    }
    // Hop-by-hop options are the first header or none.
    let bytes = datagram(&mut bench, &[options(60), options(0)], GOOD);
    bench
        .judge(&[bytes])
        .counts(&[("extension_header", 1)])
        .nothing_arrived();
}

#[test]
fn a_first_fragment_holds_all_headers_or_is_dropped() {
    let mut bench = bench();
    for to in [GOOD, BAD] {
        let number = bench.next();
        let data = udp(port(number), to, &[&mark(number)[..], &[7; 8]].concat());
        // The options are in the first, UDP in the second.
        let (_, all) = chain(&[options(60)], 17, &data);
        let frames = [
            packet(HERE, &[fragment(0, true, number)], 60, &all[..8]),
            packet(HERE, &[fragment(8, false, number)], 60, &all[8..]),
        ];
        bench
            .judge(&frames)
            .counts(&[("fragment", 2)])
            .nothing_arrived();
        // The options themselves go on in the second.
        let number = bench.next();
        let data = udp(port(number), to, &[&mark(number)[..], &[7; 8]].concat());
        let long = (60, [&[1, 1, 12][..], &[0; 12]].concat());
        let (_, all) = chain(&[long], 17, &data);
        let frames = [
            packet(HERE, &[fragment(0, true, number)], 60, &all[..8]),
            packet(HERE, &[fragment(8, false, number)], 60, &all[8..]),
        ];
        bench
            .judge(&frames)
            .counts(&[("fragment", 2)])
            .nothing_arrived();
        // Half a TCP header.
        let number = bench.next();
        let segment = [
            frame::tcp(port(number), 8080, frame::SYN),
            mark(number).to_vec(),
        ]
        .concat();
        let frames = [
            packet(HERE, &[fragment(0, true, number)], 6, &segment[..16]),
            packet(HERE, &[fragment(16, false, number)], 6, &segment[16..]),
        ];
        bench
            .judge(&frames)
            .counts(&[("fragment", 2)])
            .nothing_arrived();
    }
}

#[test]
fn v6_fragments_follow_their_first() {
    let mut bench = bench();
    for (to, counts) in [
        (GOOD, &[("allowed", 3)][..]),
        (BAD, &[("default_deny", 1), ("fragment", 2)]),
    ] {
        // With headers before the fragment header, and behind it.
        for (before, behind) in [(0, 0), (1, 0), (0, 1), (2, 2)] {
            let number = bench.next();
            let data = udp(
                port(number),
                to,
                &[&[7; 24][..], &mark(number), &[7; 8]].concat(),
            );
            let (next, all) = chain(&vec![options(60); behind], 17, &data);
            let middle = 16 + 8 * behind;
            let piece = |from: usize, end: usize| {
                let mut headers = vec![options(60); before];
                headers.push(fragment(from, end < all.len(), number));
                packet(HERE, &headers, next, &all[from..end])
            };
            let frames = [
                piece(0, middle),
                piece(middle, middle + 8),
                piece(middle + 8, all.len()),
            ];
            let seen = bench.judge(&frames);
            seen.counts(counts).harmful(1);
            seen.arrived(usize::from(to == GOOD));
            // The last before the first.
            let late = [piece(middle + 8, all.len())];
            let id = bench.next();
            let other: Vec<_> = late.iter().map(|f| renumbered(f, before, id)).collect();
            bench
                .judge(&other)
                .counts(&[("fragment", 1)])
                .nothing_arrived();
        }
    }
}

/// The frame with another fragment identification, behind `before` headers.
fn renumbered(frame: &[u8], before: usize, id: u32) -> Vec<u8> {
    let mut out = frame.to_vec();
    let at = 14 + 40 + 8 * before + 4;
    out[at..at + 4].copy_from_slice(&id.to_be_bytes());
    out
}

#[test]
fn atomic_fragments_are_whole_packets() {
    let mut bench = bench();
    let id = bench.next();
    for headers in [
        vec![fragment(0, false, id)],
        vec![options(60), fragment(0, false, id), options(60)],
    ] {
        let bytes = datagram(&mut bench, &headers, BAD);
        let seen = bench.judge(&[bytes]);
        seen.counts(&[("default_deny", 1)])
            .nothing_arrived()
            .harmful(1);
        let bytes = datagram(&mut bench, &headers, GOOD);
        bench
            .judge(&[bytes])
            .counts(&[("allowed", 1)])
            .arrived(1)
            .harmful(1);
    }
    // What follows an atomic one of the same number follows nothing.
    let bytes = datagram(&mut bench, &[fragment(0, false, id)], GOOD);
    let rest = packet(HERE, &[fragment(16, false, id)], 17, &mark(id));
    let seen = bench.judge(&[bytes, rest]);
    seen.counts(&[("allowed", 1), ("fragment", 1)]).arrived(1);
}

#[test]
fn overlapping_v6_fragments_never_arrive() {
    let mut bench = bench();
    let number = bench.next();
    let good = udp(
        port(number),
        GOOD,
        &[&[7; 24][..], &mark(number), &[7; 8]].concat(),
    );
    let bad = udp(
        port(number),
        BAD,
        &[&[7; 24][..], &mark(number), &[7; 8]].concat(),
    );
    let piece = |id: u32, of: &[u8], from: usize, end: usize| {
        packet(
            HERE,
            &[fragment(from, end < of.len(), id)],
            17,
            &of[from..end],
        )
    };
    // Over the header, over the data, and the other first fragment behind the allowed one.
    let seen = bench.judge(&[piece(number, &good, 0, 24), piece(number, &bad, 8, 48)]);
    seen.counts(&[("allowed", 1), ("fragment", 1)])
        .nothing_arrived();
    let id = bench.next();
    let seen = bench.judge(&[piece(id, &good, 0, 24), piece(id, &good, 16, 48)]);
    seen.counts(&[("allowed", 1), ("fragment", 1)])
        .nothing_arrived();
    let id = bench.next();
    let seen = bench.judge(&[
        piece(id, &good, 0, 24),
        piece(id, &bad, 0, 24),
        piece(id, &bad, 24, 48),
    ]);
    seen.counts(&[("allowed", 2), ("default_deny", 1)]);
    assert!(seen.delivered.iter().all(|d| d.port == GOOD), "{seen:?}");
    let id = bench.next();
    let seen = bench.judge(&[
        piece(id, &bad, 0, 24),
        piece(id, &bad, 24, 48),
        piece(id, &good, 0, 24),
    ]);
    seen.counts(&[("allowed", 1), ("default_deny", 1), ("fragment", 1)])
        .nothing_arrived();
}

#[test]
fn routing_headers_with_segments_left_are_dropped() {
    let mut bench = bench();
    for kind in [0, 2, 4, 253] {
        for (to, counts) in [(GOOD, [("allowed", 1)]), (BAD, [("default_deny", 1)])] {
            let bytes = datagram(&mut bench, &[routing(kind, 0)], to);
            let seen = bench.judge(&[bytes]);
            seen.counts(&counts);
            if to == BAD {
                seen.nothing_arrived();
            }
            // The kinds that some kernel handles itself, it may refuse; those it does not, it skips.
            if matches!(kind, 0 | 253) {
                seen.harmful(1);
                seen.arrived(usize::from(to == GOOD));
            }
            for left in [1, 2, 255] {
                let bytes = datagram(&mut bench, &[routing(kind, left)], to);
                let seen = bench.judge(&[bytes]);
                seen.counts(&[("extension_header", 1)]).nothing_arrived();
            }
        }
    }
}

#[test]
fn headers_that_are_protocols_are_judged_by_their_number() {
    let mut bench = bench();
    // Authentication of UDP: 12 bytes and a check value of 12.
    let mut authenticated = |to: u16| {
        let number = bench.next();
        let data = udp(port(number), to, &mark(number));
        let header = (
            51,
            [&[4, 0, 0][..], &[0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1], &[7; 9]].concat(),
        );
        packet(HERE, &[header], 17, &data)
    };
    let frames = [authenticated(GOOD), authenticated(BAD)];
    for (frame, protocol) in frames.iter().map(|f| (f, 51)) {
        assert_eq!(frame[14 + 6], protocol);
        let seen = bench.judge(std::slice::from_ref(frame));
        seen.counts(&[("default_deny", 1)]).nothing_arrived();
    }
    for protocol in [59, 50, 135, 139, 140] {
        for to in [GOOD, BAD] {
            let number = bench.next();
            let data = udp(port(number), to, &mark(number));
            // Mobility and its like begin as extension headers do: a datagram behind one.
            let inside = if matches!(protocol, 135 | 139 | 140) {
                chain(&[options(protocol)], 17, &data).1
            } else {
                data
            };
            let seen = bench.judge(&[packet(HERE, &[], protocol, &inside)]);
            seen.counts(&[("default_deny", 1)]).nothing_arrived();
            let seen = bench.judge(&[packet(HERE, &[options(60)], protocol, &inside)]);
            seen.counts(&[("default_deny", 1)]).nothing_arrived();
        }
    }
    // A rule may name them; it says nothing of what comes behind.
    let policy = POLICY.replace("udp/4444,", "proto/59, proto/50,");
    assert_ne!(policy, POLICY.replace("udp/4444,", ""));
    let policy = policy.replace("services: [proto/59", "services: [udp/4444, proto/59");
    bench.enforce(&policy, SETTINGS);
    for (protocol, passes) in [(59, true), (50, true), (51, false), (135, false)] {
        let number = bench.next();
        let data = udp(port(number), BAD, &mark(number));
        let seen = bench.judge(&[packet(HERE, &[], protocol, &data)]);
        let reason = if passes { "allowed" } else { "default_deny" };
        seen.counts(&[(reason, 1)]);
    }
}

#[test]
fn lengths_past_the_packet_are_dropped() {
    let mut bench = bench();
    let length = |frame: &mut Vec<u8>, bytes: u16| {
        frame[18..20].copy_from_slice(&bytes.to_be_bytes());
    };
    // A header longer than the packet, by much and by little.
    for words in [255, 3, 2] {
        for number in [0, 60, 43] {
            let header = (number, vec![words, 1, 0, 0, 0, 0, 0]);
            let bytes = datagram(&mut bench, &[header], GOOD);
            let seen = bench.judge(&[bytes]);
            seen.counts(&[("malformed", 1)])
                .nothing_arrived()
                .harmful(0);
        }
    }
    // A packet longer than the frame, and one that ends before its headers do.
    for by in [1, 100] {
        let mut bytes = datagram(&mut bench, &[options(60)], GOOD);
        let all = u16::try_from(bytes.len() - 54).unwrap();
        length(&mut bytes, all + by);
        bench
            .judge(&[bytes])
            .counts(&[("malformed", 1)])
            .nothing_arrived()
            .harmful(0);
    }
    for rest in [0, 4, 8, 12, 15] {
        let mut bytes = datagram(&mut bench, &[options(60)], GOOD);
        length(&mut bytes, rest);
        bench
            .judge(&[bytes])
            .counts(&[("malformed", 1)])
            .nothing_arrived();
    }
    // Jumbo: no length here, one in the option.
    let number = bench.next();
    let data = udp(port(number), GOOD, &mark(number));
    for said in [24u32, 70_000] {
        let header = (0, [&[0, 0xc2, 4][..], &said.to_be_bytes()].concat());
        let mut bytes = packet(HERE, &[header], 17, &data);
        length(&mut bytes, 0);
        bench
            .judge(&[bytes])
            .counts(&[("malformed", 1)])
            .nothing_arrived()
            .harmful(0);
    }
    // What comes behind the packet is padding, and no part of it.
    let mut bytes = datagram(&mut bench, &[options(60)], GOOD);
    bytes.extend([0; 10]);
    bench.judge(&[bytes]).counts(&[("allowed", 1)]).arrived(1);
}

/// RFC 6980. Where essentials pass unseen, these do not.
#[test]
fn neighbour_discovery_in_fragments_is_no_essential() {
    let mut bench = bench();
    for kind in [133u8, 134, 135, 136] {
        let number = bench.next();
        let message = [&[kind, 0, 0, 0, 0, 0, 0, 0][..], &[0xfd; 16], &mark(number)].concat();
        for headers in [
            vec![fragment(0, false, number)],
            vec![options(60)],
            vec![options(0)],
        ] {
            let mut bytes = packet(HERE, &headers, 58, &message);
            bytes[14 + 7] = 255;
            let seen = bench.judge(&[bytes]);
            seen.counts(&[("default_deny", 1)]);
            assert!(seen.passed.is_empty());
        }
        let mut frames = [
            packet(HERE, &[fragment(0, true, number)], 58, &message[..24]),
            packet(HERE, &[fragment(24, false, number)], 58, &message[24..]),
        ];
        for frame in &mut frames {
            frame[14 + 7] = 255;
        }
        let seen = bench.judge(&frames);
        seen.counts(&[("default_deny", 1), ("fragment", 1)]);
        assert!(seen.passed.is_empty());
        // Past a router.
        let mut bytes = packet(HERE, &[], 58, &message);
        bytes[14 + 7] = 254;
        let seen = bench.judge(&[bytes]);
        seen.counts(&[("default_deny", 1)]);
        assert!(seen.passed.is_empty());
    }
}

#[test]
fn mapped_addresses_are_dropped_and_other_translated_ones_are_plain() {
    let mut bench = bench();
    let policy = POLICY.replace(
        "rules:",
        "  odd: { members: [{cidr: \"::/96\"}, {cidr: \"2002::/16\"}, {cidr: \"64:ff9b::/96\"}] }\nrules:\n  \
         - { name: odd, from: [ehr], to: [odd], services: [udp/4444] }",
    );
    bench.enforce(&policy, SETTINGS);
    let to = |bench: &mut Bench, destination: &str, port_to: u16| {
        let number = bench.next();
        packet(
            destination,
            &[],
            17,
            &udp(port(number), port_to, &mark(number)),
        )
    };
    for port_to in [GOOD, BAD] {
        let bytes = to(&mut bench, "::ffff:10.1.0.1", port_to);
        let seen = bench.judge(&[bytes]);
        seen.counts(&[("malformed", 1)]).nothing_arrived();
        assert!(seen.passed.is_empty());
    }
    // As source as well.
    let number = bench.next();
    let (mapped, here): (IpAddr, IpAddr) = (
        std::net::Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0x0a01, 3).into(),
        HERE.parse().unwrap(),
    );
    let bytes = frame::frame(mapped, here, 17, &udp(port(number), GOOD, &mark(number)));
    bench
        .judge(&[bytes])
        .counts(&[("malformed", 1)])
        .nothing_arrived();
    // 10.1.0.1 in IPv6's clothes: the IPv4 rule means none of them.
    for destination in ["::10.1.0.1", "2002:a01:1::1", "64:ff9b::10.1.0.1"] {
        for (port_to, reason) in [(GOOD, "allowed"), (BAD, "default_deny")] {
            let bytes = to(&mut bench, destination, port_to);
            let seen = bench.judge(&[bytes]);
            seen.counts(&[(reason, 1)]);
            assert_eq!(seen.passed.len(), usize::from(port_to == GOOD));
        }
        bench.enforce(POLICY, SETTINGS);
        let bytes = to(&mut bench, destination, GOOD);
        bench
            .judge(&[bytes])
            .counts(&[("default_deny", 1)])
            .nothing_arrived();
        bench.enforce(&policy, SETTINGS);
    }
}
