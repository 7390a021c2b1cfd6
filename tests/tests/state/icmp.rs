//! ICMP in the kernel: what errors quote, in every form; directions; messages that change routes.

use std::net::IpAddr;

use enforcer_common::verdict::Outcome;
use enforcer_tests::{
    frame::{self, ACK, Extension},
    kernel::Programs,
    netns::Family,
    scale,
};

use crate::common::*;

const RULES: &str = "  - { name: some, from: [a], to: [b], services: [tcp/8080, udp/4444, ping] }";

/// An error about a packet, as a router between the two sends it.
fn error(family: Family, to: IpAddr, quoted: &[u8]) -> Vec<u8> {
    let (kind, code) = match family {
        Family::V4 => (3, 4),
        Family::V6 => (2, 0),
    };
    icmp(
        family.address(9, 1),
        to,
        &frame::icmp_error(kind, code, quoted),
    )
}

/// An open TCP and an open UDP flow from `a` to `b`.
fn open(programs: &mut Programs, family: Family) -> (IpAddr, IpAddr) {
    let (a, b) = ends(family);
    establish(programs, (a, 4000), (b, 8080));
    let opened = programs.judge(INGRESS, &udp((a, 4000), (b, 4444)));
    assert_eq!(got(opened), ALLOWED);
    (a, b)
}

/// A packet cut off at each of its bytes, as routers quote (RFC 792: eight bytes of transport at
/// least, which hold the ports).
#[test]
fn errors_that_quote_any_part_of_a_packet() {
    let mut programs = programs(&policy(RULES));
    for family in Family::BOTH {
        let (a, b) = open(&mut programs, family);
        let before = flows(&mut programs);
        for (protocol, transport) in [
            (6, frame::tcp(4000, 8080, ACK)),
            (17, frame::udp(4000, 4444)),
        ] {
            let whole = frame::ip(a, b, protocol, &transport);
            let header = whole.len() - transport.len();
            for length in 0..=whole.len() {
                let frame = error(family, a, &whole[..length]);
                let want = if length < header + 8 {
                    UNRELATED
                } else {
                    RELATED
                };
                let verdict = programs.judge(INGRESS, &frame);
                assert_eq!(got(verdict), want, "{family:?} {protocol}: {length} bytes");
            }
        }
        assert_eq!(flows(&mut programs), before);
    }
}

#[test]
fn errors_that_quote_options_fragments_and_extension_headers() {
    let mut programs = programs(&policy(RULES));
    let (a, b) = open(&mut programs, Family::V4);
    let plain = frame::frame(a, b, 17, &frame::udp(4000, 4444));
    let other = frame::frame(a, b, 17, &frame::udp(4001, 4444));
    for words in 1..=10 {
        let good = error(Family::V4, a, &frame::with_options(&plain, words)[14..]);
        assert_eq!(got(programs.judge(INGRESS, &good)), RELATED, "{words}");
        // What is read are ports, and not the options in front of them.
        let bad = error(Family::V4, a, &frame::with_options(&other, words)[14..]);
        assert_eq!(got(programs.judge(INGRESS, &bad)), UNRELATED, "{words}");
    }
    // A first fragment has the ports; later ones have data in their place.
    let first = error(Family::V4, a, &frame::as_fragment(&plain, 0, true)[14..]);
    assert_eq!(got(programs.judge(INGRESS, &first)), RELATED);
    for (offset, more) in [(1, true), (1, false), (185, true), (0x1fff, false)] {
        let later = frame::as_fragment(&plain, offset, more);
        let later = error(Family::V4, a, &later[14..]);
        assert_eq!(got(programs.judge(INGRESS, &later)), UNRELATED, "{offset}");
    }
    for (field, value) in [(0, 0x44), (0, 0x4f), (0, 0x65), (0, 0)] {
        let mut broken = plain[14..].to_vec();
        broken[field] = value;
        let verdict = programs.judge(INGRESS, &error(Family::V4, a, &broken));
        assert_eq!(got(verdict), UNRELATED, "version and length {value:#x}");
    }

    let (a, b) = open(&mut programs, Family::V6);
    let quote = |headers: &[Extension], port| {
        let (next, payload) = frame::extended(headers, 17, &frame::udp(port, 4444));
        error(Family::V6, a, &frame::ip(a, b, next, &payload))
    };
    // Atomic and first fragments have the ports.
    for headers in [
        &[Extension::Fragment(0, false)][..],
        &[Extension::Fragment(0, true)],
    ] {
        let verdict = programs.judge(INGRESS, &quote(headers, 4000));
        assert_eq!(got(verdict), RELATED, "{headers:?}");
    }
    for headers in [
        &[Extension::Fragment(1, true)][..],
        &[Extension::Fragment(185, false)],
        &[Extension::Options; 9],
    ] {
        let verdict = programs.judge(INGRESS, &quote(headers, 4000));
        assert_eq!(got(verdict), UNRELATED, "{headers:?}");
    }
    for headers in [&[Extension::HopByHop][..], &[Extension::Options; 2]] {
        let related = programs.judge(INGRESS, &quote(headers, 4000));
        assert_eq!(got(related), RELATED, "{headers:?}");
        let other = programs.judge(INGRESS, &quote(headers, 4001));
        assert_eq!(got(other), UNRELATED, "{headers:?}");
    }
}

#[test]
fn a_request_is_no_answer_to_a_request() {
    let mut programs = programs(&policy(RULES));
    for (family, request, reply) in [(Family::V4, 8, 0), (Family::V6, 128, 129)] {
        let (a, b) = ends(family);
        let there = icmp(a, b, &frame::icmp(request, 0, 7));
        let back = |kind, id| icmp(b, a, &frame::icmp(kind, 0, id));
        assert_eq!(got(programs.judge(INGRESS, &back(reply, 7))), DENIED);
        assert_eq!(got(programs.judge(INGRESS, &there)), ALLOWED);
        assert_eq!(got(programs.judge(INGRESS, &back(request, 7))), DENIED);
        assert_eq!(got(programs.judge(INGRESS, &back(reply, 7))), ESTABLISHED);
        assert_eq!(got(programs.judge(INGRESS, &back(reply, 8))), DENIED);
    }
    assert_eq!(flows(&mut programs), 2);
}

/// Messages that tell hosts other routes and addresses, or ask them about themselves, from a
/// member of a segment: nothing but a rule lets them pass, and none becomes a flow.
#[test]
fn messages_that_change_hosts_need_a_rule() {
    // (family, type, code): redirect, router advertisement and solicitation, timestamp, address
    // mask, information; redirect, node information, multicast router.
    let v4 = [
        (5, 0),
        (5, 1),
        (9, 0),
        (10, 0),
        (13, 0),
        (14, 0),
        (15, 0),
        (17, 0),
        (18, 0),
    ];
    let v6 = [
        (137, 0),
        (139, 0),
        (140, 1),
        (151, 0),
        (134, 0),
        (133, 0),
        (138, 0),
    ];
    let all = v4.map(|m| (Family::V4, m)).into_iter();
    let all: Vec<_> = all.chain(v6.map(|m| (Family::V6, m))).collect();
    for with_rule in [false, true] {
        let mut rules = RULES.to_owned();
        if with_rule {
            for (number, (family, (kind, _))) in all.iter().enumerate() {
                let service = match family {
                    Family::V4 => format!("icmp/{kind}"),
                    Family::V6 => format!("icmpv6/{kind}"),
                };
                rules += &format!(
                    "\n  - {{ name: m{number}, from: [a], to: [b], services: [{service}] }}"
                );
            }
        }
        let mut programs = programs(&policy(&rules));
        for (family, (kind, code)) in &all {
            let (a, b) = ends(*family);
            // Behind the type, a router advertisement or redirect is longer than a bare message.
            let mut message = frame::icmp(*kind, *code, (*kind).into());
            message.extend([0; 32]);
            let want = if with_rule { ALLOWED } else { DENIED };
            let verdict = programs.judge(INGRESS, &icmp(a, b, &message));
            assert_eq!(got(verdict), want, "{family:?} type {kind}");
            let back = programs.judge(INGRESS, &icmp(b, a, &message));
            assert_eq!(back.outcome, Outcome::Denied, "{family:?} type {kind}");
        }
        // Of these only timestamp requests open something.
        assert_eq!(flows(&mut programs), usize::from(with_rule));
    }
}

/// From a neighbour, as hosts would heed it: hop limit 255.
#[test]
fn router_advertisements_pass_only_as_what_they_are() {
    let mut programs = programs(&policy(RULES));
    let (a, b) = ends(Family::V6);
    let mut message = frame::icmp(134, 0, 0);
    message.extend([0; 8]);
    let mut from_afar = icmp(a, b, &message);
    from_afar[14 + 7] = 254;
    assert_eq!(got(programs.judge(INGRESS, &from_afar)), DENIED);
}

#[test]
fn a_storm_of_errors_enters_nothing() {
    let storm = scale::rounds(100_000, 4_000);
    let mut programs = programs(&policy(RULES));
    for family in Family::BOTH {
        let (a, b) = open(&mut programs, family);
        let before = programs.flows();
        // Before the ports: Ethernet, IP, ICMP, and the IP header that it quotes.
        let quoted = frame::ip(a, b, 17, &frame::udp(10_000, 4444));
        let mut frame = error(family, a, &quoted);
        let at = frame.len() - 12;
        let denied = programs.count(INGRESS, Outcome::Denied);
        let passed = programs.flood(INGRESS, &mut frame, storm, |frame, number| {
            let port = 10_000 + u16::try_from(number % 50_000).unwrap();
            frame[at..at + 2].copy_from_slice(&port.to_be_bytes());
        });
        assert_eq!(passed, 0);
        let counted = programs.count(INGRESS, Outcome::Denied) - denied;
        assert_eq!(counted, u64::try_from(storm).unwrap());
        // As many about a real flow: they pass, and change as little.
        let good = frame::ip(a, b, 17, &frame::udp(4000, 4444));
        let mut frame = error(family, a, &good);
        let passed = programs.flood(INGRESS, &mut frame, storm / 10, |_, _| {});
        assert_eq!(passed, storm / 10);
        assert_eq!(programs.flows(), before);
        programs.settle();
        programs.records(INGRESS);
        programs.drain();
    }
}
