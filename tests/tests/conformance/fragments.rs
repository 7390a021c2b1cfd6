//! IPv4 fragments: the first is judged, the others follow it or are denied.

use std::net::IpAddr;

use enforcer_tests::{
    daemon::LONG,
    frame,
    netns::Family,
    traffic::{self, QUIET},
};
use nix::sys::socket::{MsgFlags, SockaddrIn, SockaddrIn6, recv, sendto};
use std::os::fd::AsRawFd as _;

use crate::{
    bench::{BAD, Bench, GOOD, POLICY, SETTINGS, Seen, bench, port, sealed, udp},
    wire::{Delivery, mark},
};

const FRIEND: &str = "10.1.0.3";
const STRANGER: &str = "10.1.0.4";
const HERE: &str = "10.1.0.1";

/// A piece of an IPv4 packet: `at` in bytes.
fn piece(from: &str, protocol: u8, id: u32, at: usize, more: bool, payload: &[u8]) -> Vec<u8> {
    let ip = |text: &str| -> IpAddr { text.parse().unwrap() };
    let mut bytes = frame::frame(ip(from), ip(HERE), protocol, payload);
    let id = u16::try_from(id % 0xffff).unwrap();
    bytes[18..20].copy_from_slice(&id.to_be_bytes());
    let units = u16::try_from(at / 8).unwrap();
    sealed(&frame::as_fragment(&bytes, units, more))
}

/// A packet cut at these places.
fn cut(from: &str, protocol: u8, id: u32, payload: &[u8], at: &[usize]) -> Vec<Vec<u8>> {
    let mut places = vec![0];
    places.extend(at);
    places.push(payload.len());
    let pieces = places.windows(2);
    pieces
        .map(|w| {
            piece(
                from,
                protocol,
                id,
                w[0],
                w[1] < payload.len(),
                &payload[w[0]..w[1]],
            )
        })
        .collect()
}

/// A datagram of 64 bytes; its mark is in the second half.
fn datagram(number: u32, to: u16) -> Vec<u8> {
    udp(
        port(number),
        to,
        &[&[7; 40][..], &mark(number), &[7; 8]].concat(),
    )
}

/// A SYN with a mark behind its header.
fn syn(number: u32, to: u16) -> Vec<u8> {
    [
        frame::tcp(port(number), to, frame::SYN),
        mark(number).to_vec(),
        vec![7; 20],
    ]
    .concat()
}

#[test]
fn fragments_in_order_pass_with_their_first_and_are_dropped_with_it() {
    let mut bench = bench();
    for places in [&[32][..], &[24, 48], &[8, 16, 24, 32, 40, 48, 56]] {
        let pieces = places.len() as u64 + 1;
        let id = bench.next();
        let seen = bench.judge(&cut(FRIEND, 17, id, &datagram(id, GOOD), places));
        seen.counts(&[("allowed", pieces)]).arrived(1).harmful(1);
        let id = bench.next();
        let seen = bench.judge(&cut(FRIEND, 17, id, &datagram(id, BAD), places));
        seen.counts(&[("default_deny", 1), ("fragment", pieces - 1)]);
        seen.nothing_arrived().harmful(1);
        let id = bench.next();
        let seen = bench.judge(&cut(STRANGER, 17, id, &datagram(id, GOOD), places));
        seen.counts(&[("default_deny", 1), ("fragment", pieces - 1)]);
        seen.nothing_arrived().harmful(1);
    }
}

#[test]
fn later_fragments_before_the_first_are_dropped_and_the_flow_goes_on() {
    let mut bench = bench();
    for to in [GOOD, BAD] {
        for order in [&[1, 0, 2][..], &[2, 1, 0], &[1, 2, 0], &[0, 2, 1]] {
            let id = bench.next();
            let pieces = cut(FRIEND, 17, id, &datagram(id, to), &[24, 48]);
            let frames: Vec<_> = order.iter().map(|n| pieces[*n].clone()).collect();
            let early = order.iter().position(|n| *n == 0).unwrap() as u64;
            let seen = bench.judge(&frames);
            if to == BAD {
                seen.counts(&[("default_deny", 1), ("fragment", 2)])
                    .nothing_arrived();
            } else if early == 0 {
                // Those that follow may come in any order.
                seen.counts(&[("allowed", 3)]).arrived(1);
            } else {
                seen.counts(&[("allowed", 3 - early), ("fragment", early)])
                    .nothing_arrived();
            }
            seen.harmful(1);
            if to == GOOD {
                // What the sender sends again, and what comes after it.
                let seen = bench.judge(&pieces);
                seen.counts(&[("allowed", 3)]);
                assert!(!seen.delivered.is_empty());
                let id = bench.next();
                let whole = cut(FRIEND, 17, id, &datagram(id, to), &[]);
                bench.judge(&whole).counts(&[("allowed", 1)]).arrived(1);
            }
        }
    }
}

#[test]
fn a_first_fragment_without_the_whole_header_is_dropped() {
    let mut bench = bench();
    for (to, places) in [(BAD, [8]), (8080, [8]), (8080, [16]), (BAD, [16])] {
        let id = bench.next();
        let seen = bench.judge(&cut(FRIEND, 6, id, &syn(id, to), &places));
        seen.counts(&[("fragment", 2)]).nothing_arrived().harmful(1);
    }
    // Options are part of the header: 24 bytes of it say they are 40.
    let id = bench.next();
    let mut segment = syn(id, 8080);
    segment[12] = 0xa0;
    segment.splice(20..20, [1; 20]);
    let seen = bench.judge(&cut(FRIEND, 6, id, &segment, &[24]));
    seen.counts(&[("fragment", 2)]).nothing_arrived().harmful(1);
    // A header to its end is enough, and so are the eight bytes of UDP.
    let id = bench.next();
    let seen = bench.judge(&cut(FRIEND, 6, id, &syn(id, 8080), &[24]));
    seen.counts(&[("allowed", 2)]).arrived(1);
    let id = bench.next();
    let seen = bench.judge(&cut(FRIEND, 17, id, &datagram(id, GOOD), &[8]));
    seen.counts(&[("allowed", 2)]).arrived(1);
    // Seven of them, and a tail that is no unit of eight bytes.
    let id = bench.next();
    let whole = datagram(id, GOOD);
    let seen = bench.judge(&[piece(FRIEND, 17, id, 0, true, &whole[..7])]);
    seen.counts(&[("malformed", 1)]).nothing_arrived();
    // Nothing at all in a piece.
    let id = bench.next();
    let seen = bench.judge(&[
        piece(FRIEND, 17, id, 0, true, &[]),
        piece(FRIEND, 17, id, 64, false, &[]),
    ]);
    seen.counts(&[("malformed", 2)]).nothing_arrived();
}

#[test]
fn a_second_first_fragment_cannot_rewrite_the_port() {
    let mut bench = bench();
    let never_to_bad = |seen: &Seen| assert!(seen.delivered.iter().all(|d| d.port != BAD));
    for more in [true, false] {
        let id = bench.next();
        let (good, bad) = (datagram(id, GOOD), datagram(id, BAD));
        let frames = [
            piece(FRIEND, 17, id, 0, true, &good[..24]),
            piece(FRIEND, 17, id, 0, more, &bad[..24]),
            piece(FRIEND, 17, id, 24, false, &good[24..]),
        ];
        let seen = bench.judge(&frames);
        // Without `more` it is a whole datagram, and shorter than it says.
        seen.counts(&[("allowed", 2), ("default_deny", 1)]);
        never_to_bad(&seen);
    }
    // The other way round: what was denied leaves nothing for others to follow.
    let id = bench.next();
    let (good, bad) = (datagram(id, GOOD), datagram(id, BAD));
    let frames = [
        piece(FRIEND, 17, id, 0, true, &bad[..24]),
        piece(FRIEND, 17, id, 24, false, &bad[24..]),
        piece(FRIEND, 17, id, 0, true, &good[..24]),
    ];
    let seen = bench.judge(&frames);
    seen.counts(&[("allowed", 1), ("default_deny", 1), ("fragment", 1)])
        .nothing_arrived();
}

#[test]
fn a_fragment_that_overlaps_the_first_is_dropped() {
    let mut bench = bench();
    // TCP: from the ninth byte on, where the flags are.
    for at in [8, 16] {
        for with_first in [false, true] {
            let id = bench.next();
            let segment = syn(id, 8080);
            let mut frames = vec![piece(FRIEND, 6, id, at, false, &segment[at..])];
            if with_first {
                frames.insert(0, piece(FRIEND, 6, id, 0, true, &segment[..24]));
            }
            let seen = bench.judge(&frames);
            if with_first {
                seen.counts(&[("allowed", 1), ("fragment", 1)]);
            } else {
                seen.counts(&[("fragment", 1)]);
            }
            seen.nothing_arrived();
        }
    }
    // UDP: over the data of the first, one unit or all of it.
    for at in [8, 16] {
        let id = bench.next();
        let whole = datagram(id, GOOD);
        let frames = [
            piece(FRIEND, 17, id, 0, true, &whole[..24]),
            piece(FRIEND, 17, id, at, false, &whole[at..]),
        ];
        let seen = bench.judge(&frames);
        seen.counts(&[("allowed", 1), ("fragment", 1)])
            .nothing_arrived();
    }
    // Past 65 535 bytes.
    let id = bench.next();
    let whole = datagram(id, GOOD);
    let frames = [
        piece(FRIEND, 17, id, 0, true, &whole[..24]),
        piece(FRIEND, 17, id, 0xfff8, false, &[7; 64]),
    ];
    let seen = bench.judge(&frames);
    seen.counts(&[("allowed", 1), ("malformed", 1)])
        .nothing_arrived();
}

#[test]
fn fragments_follow_only_the_packet_that_they_are_of() {
    let mut bench = bench();
    let id = bench.next();
    let first = piece(FRIEND, 17, id, 0, true, &datagram(id, GOOD)[..24]);
    bench.judge(&[first]).counts(&[("allowed", 1)]);
    // The same number from somebody else, under another protocol, and another number.
    let rest = &datagram(id, BAD)[24..];
    let frames = [
        piece(STRANGER, 17, id, 24, false, rest),
        piece("10.1.0.2", 17, id, 24, false, rest),
        piece(FRIEND, 6, id, 24, false, rest),
        piece(FRIEND, 132, id, 24, false, rest),
        piece(FRIEND, 17, id + 7, 24, false, rest),
    ];
    bench
        .judge(&frames)
        .counts(&[("fragment", 5)])
        .nothing_arrived();
    // A denied datagram that takes the number again: its rest can only end up in the allowed one.
    let bad = datagram(id, BAD);
    let frames = [
        piece(FRIEND, 17, id, 0, true, &bad[..24]),
        piece(FRIEND, 17, id, 24, false, &bad[24..]),
    ];
    let seen = bench.judge(&frames);
    seen.counts(&[("allowed", 1), ("default_deny", 1)]);
    assert!(seen.delivered.iter().all(|d| d.port == GOOD), "{seen:?}");
}

#[test]
fn a_flood_of_first_fragments_denies_at_most_its_own_sender() {
    const FLOOD: u32 = 20_000;
    let mut bench = bench();
    let flood = |bench: &mut Bench, from: &str, to: u16| -> Vec<Vec<u8>> {
        let number = bench.next();
        let whole = datagram(number, to);
        (0..FLOOD)
            .map(|id| piece(from, 17, id, 0, true, &whole[..24]))
            .collect()
    };
    // In the middle of an allowed datagram, by somebody without a right.
    let id = 60_000 + bench.next();
    let number = bench.next();
    let pieces = cut(FRIEND, 17, id, &datagram(number, GOOD), &[24]);
    let mut frames = vec![pieces[0].clone()];
    frames.extend(flood(&mut bench, STRANGER, GOOD));
    frames.push(pieces[1].clone());
    let seen = bench.judge(&frames);
    seen.counts(&[("allowed", 2), ("default_deny", FLOOD.into())])
        .arrived(1);
    // By one with a right to it: no fragment of a denied flow passes, and the next datagrams of an
    // allowed one do.
    let mut frames = flood(&mut bench, "10.1.0.2", GOOD);
    let number = bench.next();
    let denied = cut(FRIEND, 17, id + 1, &datagram(number, BAD), &[24]);
    let number = bench.next();
    let allowed = cut(FRIEND, 17, id + 2, &datagram(number, GOOD), &[24]);
    frames.extend([denied, allowed].concat());
    let seen = bench.judge(&frames);
    seen.counts(&[
        ("allowed", u64::from(FLOOD) + 2),
        ("default_deny", 1),
        ("fragment", 1),
    ]);
    let ours = Delivery {
        protocol: 17,
        port: GOOD,
        mark: number,
    };
    assert!(seen.delivered.contains(&ours), "{:?}", seen.delivered);
    assert!(seen.delivered.iter().all(|d| d.port == GOOD));
}

/// The pieces are the stack's own, in both directions; the last of them has four bytes.
#[test]
fn a_large_ping_is_answered() {
    let bench = bench();
    for family in Family::BOTH {
        let (to, each) = match family {
            Family::V4 => (family.address(1, 1), 1480),
            Family::V6 => (family.address(1, 1), 1448),
        };
        for length in [2 * each + 4, 4008] {
            let before = bench.counted("tc_ingress");
            let socket = traffic::ping_socket(&bench.pair.peer, to.is_ipv6());
            let mut message = vec![7; length];
            message[..8].copy_from_slice(&[
                if to.is_ipv6() { 128 } else { 8 },
                0,
                0,
                0,
                0,
                0,
                0,
                1,
            ]);
            let fd = socket.as_raw_fd();
            let sent = match to {
                IpAddr::V4(ip) => sendto(
                    fd,
                    &message,
                    &SockaddrIn::from(std::net::SocketAddrV4::new(ip, 0)),
                    MsgFlags::empty(),
                ),
                IpAddr::V6(ip) => sendto(
                    fd,
                    &message,
                    &SockaddrIn6::from(std::net::SocketAddrV6::new(ip, 0, 0, 0)),
                    MsgFlags::empty(),
                ),
            };
            assert_eq!(sent.unwrap(), length);
            let answer = enforcer_tests::daemon::wait_for("the answer", LONG, || {
                let mut bytes = vec![0; 8192];
                let length = recv(fd, &mut bytes, MsgFlags::MSG_DONTWAIT).ok()?;
                bytes.truncate(length);
                Some(bytes)
            });
            assert_eq!(answer[8..], message[8..]);
            let after = bench.counted("tc_ingress");
            let pieces = length.div_ceil(each) as u64;
            assert_eq!(
                after["allowed"] - before.get("allowed").unwrap_or(&0),
                pieces
            );
            assert_eq!(after.get("fragment"), before.get("fragment"));
        }
    }
}

/// As a sender cuts them for a link of 1500 bytes.
#[test]
fn a_datagram_of_4000_bytes_arrives_whole_or_not_at_all() {
    let mut bench = bench();
    for to in [GOOD, BAD] {
        for reversed in [false, true] {
            let id = bench.next();
            let data = [&mark(id)[..], &[7; 3992]].concat();
            let mut frames = cut(FRIEND, 17, id, &udp(port(id), to, &data), &[1480, 2960]);
            if reversed {
                frames.reverse();
            }
            let seen = bench.judge(&frames);
            let counts = match (to, reversed) {
                (GOOD, false) => &[("allowed", 3)][..],
                (GOOD, true) => &[("allowed", 1), ("fragment", 2)],
                _ => &[("default_deny", 1), ("fragment", 2)],
            };
            seen.counts(counts).harmful(1);
            seen.arrived(usize::from(to == GOOD && !reversed));
        }
    }
    // Out of the host, cut by its own stack.
    for family in Family::BOTH {
        let (here, there) = (family.address(1, 1), family.address(1, 2));
        for (to, counts) in [
            (4445, &[("allowed", 3)][..]),
            // The stack gives up after the first.
            (BAD, &[("default_deny", 1)]),
        ] {
            let socket = traffic::udp(&bench.pair.host, (here, 0), LONG);
            let limit = if to == BAD { QUIET } else { LONG };
            let server = traffic::udp(&bench.pair.peer, (there, to), limit);
            let before = bench.counted("tc_egress");
            // What is dropped on the way out may be an error.
            let _ = socket.send_to(&[7; 4000], (there, to));
            let got = server.recv(&mut [0; 8192]);
            assert_eq!(got.ok(), (to == 4445).then_some(4000), "{family:?}");
            let after = bench.counted("tc_egress");
            for (reason, packets) in counts {
                let by = after.get(*reason).unwrap_or(&0) - before.get(*reason).unwrap_or(&0);
                assert_eq!(by, *packets, "{family:?} {reason}");
            }
        }
    }
}

#[test]
fn protocols_without_ports_are_judged_in_fragments_as_well() {
    let mut bench = bench();
    for protocol in [50, 255, 47, 253] {
        let id = bench.next();
        let payload = [&mark(id)[..], &[7; 56]].concat();
        let frames = cut(FRIEND, protocol, id, &payload, &[32]);
        let seen = bench.judge(&frames);
        seen.counts(&[("default_deny", 1), ("fragment", 1)])
            .nothing_arrived();
    }
    let policy = POLICY.replace("udp/4444,", "udp/4444, proto/esp,");
    assert_ne!(policy, POLICY);
    bench.enforce(&policy, SETTINGS);
    let id = bench.next();
    let payload = [&mark(id)[..], &[7; 56]].concat();
    let seen = bench.judge(&cut(FRIEND, 50, id, &payload, &[32]));
    seen.counts(&[("allowed", 2)]).arrived(1);
}

#[test]
fn the_rest_of_a_packet_is_judged_by_the_policy_of_the_day() {
    let mut bench = bench();
    let without = POLICY.replace("udp/4444, ", "");
    let wider = POLICY.replace("udp/4444,", "udp/4440-4444,");
    assert!(without != POLICY && wider != POLICY);
    for (policy, passes) in [(&wider, true), (&without, false)] {
        bench.enforce(POLICY, SETTINGS);
        let id = bench.next();
        let pieces = cut(FRIEND, 17, id, &datagram(id, GOOD), &[24, 48]);
        bench
            .judge(&pieces[..2])
            .counts(&[("allowed", 2)])
            .nothing_arrived();
        bench.enforce(policy, SETTINGS);
        // The fence is of an allowed flow, and here is none: by hand.
        let before = bench.counted("tc_ingress");
        bench.wire.sender.send(&pieces[2]);
        enforcer_tests::daemon::wait_for("the last piece", LONG, || {
            (bench.counted("tc_ingress") != before).then_some(())
        });
        let after = bench.counted("tc_ingress");
        let count = if passes { "allowed" } else { "revoked" };
        assert_eq!(
            after[count] - before.get(count).unwrap_or(&0),
            1,
            "{after:?}"
        );
        // Back under the first policy: what was delivered meanwhile, and nothing else, comes now.
        bench.enforce(POLICY, SETTINGS);
        let seen = bench.judge(&[]);
        let got = seen.delivered.contains(&Delivery {
            protocol: 17,
            port: GOOD,
            mark: id,
        });
        assert_eq!(got, passes);
    }
}
