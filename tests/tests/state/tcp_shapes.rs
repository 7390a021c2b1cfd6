//! TCP in the kernel: every combination of flags as a first packet, ports used again, and what the
//! answering end may not do.

use enforcer_common::{
    verdict::{Outcome, Reason},
    wire::FlowKey,
};
use enforcer_tests::{
    frame::{ACK, FIN, RST, SYN},
    host::{Host, image},
    kernel::pin,
    netns::Family,
};

use crate::common::*;

const RULE: &str = "  - { name: web, from: [a], to: [b], services: [tcp/8080] }";

/// What a first packet of a TCP flow gets, written down apart from the code under test: only SYN
/// begins, only ACK without SYN and RST goes on.
fn first_packet(flags: u8, may_open: bool, may_go_on: bool) -> (Outcome, Reason) {
    let has = |bit: u8| flags & bit == bit;
    let allowed_if = |allowed| if allowed { ALLOWED } else { DENIED };
    match (has(SYN), has(ACK), has(RST), has(FIN)) {
        (true, false, false, false) => allowed_if(may_open),
        (false, true, false, _) => allowed_if(may_go_on),
        _ => NO_FLOW,
    }
}

#[test]
fn every_combination_of_flags_as_a_first_packet() {
    let mut programs = programs(&policy(RULE));
    let mut host = Host::new(image(&policy(RULE)));
    let mut passed = 0;
    for family in Family::BOTH {
        let (a, b) = ends(family);
        for flags in 0..=u8::MAX {
            // A flow of its own for each.
            let port = 20_000 + u16::from(flags);
            for (what, frame, may_open, may_go_on) in [
                ("there", tcp((a, port), (b, 8080), flags), true, true),
                ("elsewhere", tcp((a, port), (b, 5555), flags), false, false),
                // The other end opens nothing, but may be in the middle of what `a` opened.
                ("back", tcp((b, 8080), (a, port + 1000), flags), false, true),
                (
                    "from elsewhere",
                    tcp((b, 5555), (a, port), flags),
                    false,
                    false,
                ),
            ] {
                let want = first_packet(flags, may_open, may_go_on);
                let verdict = programs.judge(INGRESS, &frame);
                assert_eq!(got(verdict), want, "{family:?} {what} {flags:#04x}");
                let decision = host.judge(true, &frame);
                assert_eq!((decision.outcome, decision.reason), want, "on the host");
                passed += usize::from(verdict.passed);
            }
        }
    }
    // 4 of SYN alone (with PSH, URG, ECE, CWR in all ways: 16), 32 of ACK, there and back.
    assert_eq!(passed, 2 * (16 + 32 + 32));
    assert_eq!(
        flows(&mut programs),
        passed,
        "what is denied leaves no trace"
    );
    let records = programs.records(INGRESS);
    assert_eq!(
        programs.count(INGRESS, Outcome::Denied),
        records.emitted + records.suppressed + records.lost
    );
}

#[test]
fn ports_used_again_are_judged_by_the_policy_of_now() {
    for closing in [FIN | ACK, RST, RST | ACK] {
        for family in Family::BOTH {
            let mut programs = programs(&policy(RULE));
            let (a, b) = ends(family);
            let (a, b) = ((a, 4000), (b, 8080));
            establish(&mut programs, a, b);
            assert_eq!(
                got(programs.judge(INGRESS, &tcp(a, b, closing))),
                ESTABLISHED
            );
            programs.apply(&image(&policy(
                "  - { name: other, from: [a], to: [b], services: [tcp/1] }",
            )));
            let again = programs.judge(INGRESS, &tcp(a, b, SYN));
            assert_eq!(got(again), DENIED, "{closing:#x}");
            for frame in [tcp(a, b, ACK), tcp(b, a, ACK), tcp(b, a, SYN | ACK)] {
                let rest = programs.judge(INGRESS, &frame);
                assert_eq!(got(rest), (Outcome::Denied, Reason::Revoked));
            }
            // Allowed again: the SYN opens a flow that is closing no more.
            programs.apply(&image(&policy(RULE)));
            establish(&mut programs, a, b);
            assert_eq!(flows(&mut programs), 1);
        }
    }
}

#[test]
fn syns_sent_again_and_late_answers_belong_to_the_flow() {
    let mut programs = programs(&policy(RULE));
    for family in Family::BOTH {
        let (a, b) = ends(family);
        let (a, b) = ((a, 4000), (b, 8080));
        for (frame, want) in [
            (tcp(a, b, SYN), ALLOWED),
            (tcp(a, b, SYN), ALLOWED),
            (tcp(b, a, SYN | ACK), ESTABLISHED),
            (tcp(b, a, SYN | ACK), ESTABLISHED),
            (tcp(a, b, ACK), ESTABLISHED),
            // Late, and after it a challenge (RFC 5961).
            (tcp(a, b, SYN), ALLOWED),
            (tcp(b, a, ACK), ESTABLISHED),
            (tcp(b, a, SYN | ACK), ESTABLISHED),
        ] {
            assert_eq!(got(programs.judge(INGRESS, &frame)), want, "{family:?}");
        }
    }
    assert_eq!(flows(&mut programs), 2);
}

#[test]
fn the_answering_end_opens_nothing() {
    let mut programs = programs(&policy(RULE));
    for family in Family::BOTH {
        let (a, b) = ends(family);
        establish(&mut programs, (a, 4000), (b, 8080));
        let before = programs.flows();
        for to in [5555, 4001, 22, 8080] {
            let frame = tcp((b, 8080), (a, to), SYN);
            assert_eq!(got(programs.judge(INGRESS, &frame)), DENIED, "{to}");
            let frame = tcp((b, 8080), (a, to), SYN | ACK);
            assert_eq!(got(programs.judge(INGRESS, &frame)), NO_FLOW, "{to}");
        }
        // Over the live flow itself, and from other ports and hosts to it.
        for from in [(b, 8080), (b, 8081), (family.address(2, 3), 8080)] {
            let frame = tcp(from, (a, 4000), SYN);
            assert_eq!(got(programs.judge(INGRESS, &frame)), DENIED);
        }
        let after = programs.flows();
        assert_eq!(before, after, "denied packets change no flow");
        let frame = tcp((b, 8080), (a, 4000), ACK);
        assert_eq!(got(programs.judge(INGRESS, &frame)), ESTABLISHED);
    }
}

#[test]
fn one_entry_serves_both_directions() {
    pin();
    let mut programs = programs(&policy(RULE));
    for family in Family::BOTH {
        let (a, b) = ends(family);
        let (a, b) = ((a, 4000), (b, 8080));
        for first_is_reply in [false, true] {
            establish(&mut programs, a, b);
            assert_eq!(flows(&mut programs), 1);
            // Gone as by eviction: there is no half that could be left.
            programs.forget_flows();
            let answer = programs.judge(INGRESS, &tcp(b, a, SYN | ACK));
            assert_eq!(got(answer), NO_FLOW);
            let (first, second) = if first_is_reply {
                (tcp(b, a, ACK), tcp(a, b, ACK))
            } else {
                (tcp(a, b, ACK), tcp(b, a, ACK))
            };
            assert_eq!(got(programs.judge(INGRESS, &first)), ALLOWED);
            assert_eq!(got(programs.judge(EGRESS, &second)), ESTABLISHED);
            assert_eq!(flows(&mut programs), 1);
            programs.forget_flows();
        }
    }
    let key = |from: u32, to: u32, ports: (u16, u16)| -> FlowKey {
        let (from, to) = ([0, 0, 0, from], [0, 0, 0, to]);
        FlowKey::new(from, to, ports.0, ports.1, 6, false, 0)
    };
    let (a, b) = ends(Family::V4);
    establish(&mut programs, (a, 4000), (b, 8080));
    let (v4, _) = programs.flows();
    assert!(v4.contains_key(&key(0x0a01_0002, 0x0a02_0002, (4000, 8080))));
}

#[test]
fn mid_stream_packets_of_what_is_denied_never_become_a_flow() {
    let mut programs = programs(&policy(RULE));
    for family in Family::BOTH {
        let (a, b) = ends(family);
        for _ in 0..3 {
            for (from, to) in [((a, 4000), (b, 5555)), ((b, 5555), (a, 4000))] {
                for flags in [ACK, ACK | 0x08, ACK | FIN] {
                    let verdict = programs.judge(INGRESS, &tcp(from, to, flags));
                    assert_eq!(got(verdict), DENIED);
                }
            }
        }
    }
    assert_eq!(flows(&mut programs), 0);
}
