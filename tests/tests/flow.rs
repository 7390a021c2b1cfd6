//! What an entry of the flow table means: who opened, who may answer, when it ends. On the host,
//! over a hash map, with a clock that the tests turn.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "tests and their helpers"
)]

use std::net::IpAddr;

use enforcer_common::{
    flow::{CLOSING, OPENER_IS_LOW, REPLIED, idle},
    verdict::{Outcome, Reason},
};
use enforcer_tests::{
    frame::{self, ACK, FIN, RST, SYN},
    host::{HZ, Host, image},
};

const A: &str = "10.77.0.1";
const B: &str = "10.77.0.2";
const C: &str = "10.77.0.3";
const A6: &str = "fd77::1";
const B6: &str = "fd77::2";

/// `a` may open a few things to `b`; everything else of theirs is denied.
const POLICY: &str = r#"
version: 1
segments:
  a: { members: [{cidr: 10.77.0.1/32}, {cidr: "fd77::1/128"}, {cidr: "fe80::1/128"}, {cidr: 169.254.0.1/32}] }
  b: { members: [{cidr: 10.77.0.2/32}, {cidr: "fd77::2/128"}, {cidr: "fe80::2/128"}, {cidr: 169.254.0.2/32}] }
rules:
  - { name: web, from: [a], to: [b], services: [tcp/8080, udp/4444, sctp/7777, proto/gre] }
  - { name: echo, from: [a], to: [b], services: [icmp/8, icmpv6/128] }
"#;

const NOTHING: &str = r#"
version: 1
segments:
  a: { members: [{cidr: 10.77.0.1/32}, {cidr: "fd77::1/128"}] }
  b: { members: [{cidr: 10.77.0.2/32}, {cidr: "fd77::2/128"}] }
rules:
  - { name: other, from: [a], to: [b], services: [tcp/1] }
"#;

type Got = (Outcome, Reason);
const ALLOWED: Got = (Outcome::Allowed, Reason::RuleAllow);
const ESTABLISHED: Got = (Outcome::Allowed, Reason::Established);
const RELATED: Got = (Outcome::Allowed, Reason::Related);
const DENIED: Got = (Outcome::Denied, Reason::DefaultDeny);
const REVOKED: Got = (Outcome::Denied, Reason::Revoked);
const NO_FLOW: Got = (Outcome::Denied, Reason::NoFlow);
const UNRELATED: Got = (Outcome::Denied, Reason::IcmpUnrelated);

struct Net(Host);

impl Net {
    fn new(text: &str) -> Self {
        Self(Host::new(image(text)))
    }

    fn apply(&mut self, text: &str) {
        self.0.image = image(text);
    }

    fn send(&mut self, bytes: &[u8]) -> Got {
        let decision = self.0.judge(true, bytes);
        (decision.outcome, decision.reason)
    }

    fn ip(&mut self, from: &str, to: &str, protocol: u8, payload: &[u8]) -> Got {
        self.send(&packet(from, to, protocol, payload))
    }

    fn tcp(&mut self, from: (&str, u16), to: (&str, u16), flags: u8) -> Got {
        self.ip(from.0, to.0, 6, &frame::tcp(from.1, to.1, flags))
    }

    fn udp(&mut self, from: (&str, u16), to: (&str, u16)) -> Got {
        self.ip(from.0, to.0, 17, &frame::udp(from.1, to.1))
    }

    fn icmp(&mut self, from: &str, to: &str, kind: u8, id: u16) -> Got {
        let protocol = if from.contains(':') { 58 } else { 1 };
        self.ip(from, to, protocol, &frame::icmp(kind, 0, id))
    }

    /// An ICMP error from `from` that quotes a frame, to `to`.
    fn error(&mut self, from: &str, to: &str, quoted: &[u8]) -> Got {
        let (protocol, kind) = if from.contains(':') { (58, 2) } else { (1, 3) };
        let message = frame::icmp_error(kind, 0, &quoted[14..]);
        self.ip(from, to, protocol, &message)
    }

    fn entries(&self) -> usize {
        self.0.flows.entries.borrow().len()
    }

    /// A flow from A to B:8080, answered.
    fn establish(&mut self) {
        assert_eq!(self.tcp((A, 4000), (B, 8080), SYN), ALLOWED);
        assert_eq!(self.tcp((B, 8080), (A, 4000), SYN | ACK), ESTABLISHED);
        assert_eq!(self.tcp((A, 4000), (B, 8080), ACK), ESTABLISHED);
    }
}

fn packet(from: &str, to: &str, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let parse = |text: &str| text.parse::<IpAddr>().unwrap();
    frame::frame(parse(from), parse(to), protocol, payload)
}

#[test]
fn replies_pass_and_opening_needs_a_rule() {
    for (a, b) in [(A, B), (A6, B6)] {
        let mut net = Net::new(POLICY);
        assert_eq!(net.tcp((b, 8080), (a, 4000), SYN), DENIED);
        assert_eq!(net.tcp((a, 4000), (b, 8081), SYN), DENIED);
        assert_eq!(net.entries(), 0, "a denial leaves no trace in the table");
        assert_eq!(net.tcp((a, 4000), (b, 8080), SYN), ALLOWED);
        assert_eq!(net.0.only().flags, OPENER_IS_LOW);
        assert_eq!(net.tcp((b, 8080), (a, 4000), SYN | ACK), ESTABLISHED);
        assert_eq!(net.0.only().flags, OPENER_IS_LOW | REPLIED);
        assert_eq!(net.tcp((a, 4000), (b, 8080), ACK), ESTABLISHED);
        // Another port, and the other end opening: flows of their own.
        assert_eq!(net.tcp((b, 8080), (a, 5555), SYN), DENIED);
        assert_eq!(net.tcp((b, 8080), (a, 4000), SYN), DENIED);
        assert_eq!(net.tcp((b, 8081), (a, 4000), ACK), DENIED);
        assert_eq!(net.tcp((a, 4000), (b, 8080), ACK), ESTABLISHED);
        assert_eq!(net.entries(), 1);
    }
}

#[test]
fn datagrams_and_other_protocols() {
    for (a, b) in [(A, B), (A6, B6)] {
        let mut net = Net::new(POLICY);
        assert_eq!(net.udp((b, 4444), (a, 4000)), DENIED, "never reversed");
        assert_eq!(net.udp((a, 4000), (b, 4444)), ALLOWED);
        assert_eq!(net.udp((a, 4000), (b, 4444)), ESTABLISHED);
        assert_eq!(net.udp((b, 4444), (a, 4000)), ESTABLISHED);
        assert_eq!(net.udp((b, 4444), (a, 4001)), DENIED);
        assert_eq!(net.ip(b, a, 47, &[0; 8]), DENIED);
        assert_eq!(net.ip(a, b, 47, &[0; 8]), ALLOWED);
        assert_eq!(net.ip(b, a, 47, &[0; 8]), ESTABLISHED);
        assert_eq!(net.ip(b, a, 50, &[0; 8]), DENIED);
        let sctp = |from: u16, to: u16| {
            let mut header = frame::udp(from, to);
            header.extend([0; 4]);
            header
        };
        assert_eq!(net.ip(a, b, 132, &sctp(4000, 7777)), ALLOWED);
        assert_eq!(net.ip(b, a, 132, &sctp(7777, 4000)), ESTABLISHED);
        // The same ports over another protocol are another flow.
        assert_eq!(net.ip(b, a, 17, &sctp(7777, 4000)), DENIED);
        assert_eq!(net.ip(b, a, 136, &sctp(7777, 4000)), DENIED);
    }
}

#[test]
fn tcp_packets_that_can_open_nothing() {
    const PSH: u8 = 0x08;
    const URG: u8 = 0x20;
    for (name, flags, want) in [
        ("NULL", 0, NO_FLOW),
        ("XMAS", FIN | PSH | URG, NO_FLOW),
        ("SYN-ACK", SYN | ACK, NO_FLOW),
        ("RST", RST, NO_FLOW),
        ("RST-ACK", RST | ACK, NO_FLOW),
        ("FIN", FIN, NO_FLOW),
        ("SYN-FIN", SYN | FIN, NO_FLOW),
        ("SYN-RST", SYN | RST, NO_FLOW),
        ("everything", 0xff, NO_FLOW),
        ("PSH", PSH, NO_FLOW),
        // With ECN bits a SYN is a SYN (RFC 3168).
        ("SYN-ECE-CWR", SYN | 0xc0, ALLOWED),
        ("SYN-PSH-URG", SYN | PSH | URG, ALLOWED),
        ("ACK", ACK, ALLOWED),
        ("PSH-ACK", PSH | ACK, ALLOWED),
        ("FIN-ACK", FIN | ACK, ALLOWED),
    ] {
        let mut net = Net::new(POLICY);
        assert_eq!(net.tcp((A, 4000), (B, 8080), flags), want, "{name}");
        assert_eq!(net.entries(), usize::from(want == ALLOWED), "{name}");
        let mut net = Net::new(POLICY);
        let reverse = net.tcp((B, 8080), (A, 4000), flags);
        let want = match flags & (SYN | ACK | RST) {
            ACK => ALLOWED, // the middle of a flow that A opened
            SYN if flags & FIN == 0 => DENIED,
            _ => NO_FLOW,
        };
        assert_eq!(reverse, want, "{name}, reverse");
    }
}

#[test]
fn mid_stream_packets_find_their_opener() {
    let mut net = Net::new(POLICY);
    assert_eq!(net.tcp((A, 4000), (B, 8080), ACK), ALLOWED);
    assert_eq!(net.0.only().flags, OPENER_IS_LOW);
    assert_eq!(net.0.only().selector, 8080);
    let mut net = Net::new(POLICY);
    assert_eq!(net.tcp((B, 8080), (A, 4000), ACK), ALLOWED);
    assert_eq!(net.0.only().flags, OPENER_IS_LOW | REPLIED, "A opened it");
    assert_eq!(net.0.only().selector, 8080);
    assert_eq!(net.tcp((A, 4000), (B, 8080), ACK), ESTABLISHED);
    // Neither direction is allowed.
    assert_eq!(net.tcp((A, 4000), (B, 22), ACK), DENIED);
    assert_eq!(net.tcp((B, 22), (A, 4000), ACK), DENIED);
    assert_eq!(net.tcp((C, 4000), (B, 8080), ACK), DENIED);
}

#[test]
fn mid_stream_preference() {
    // (forward, reverse) as modes of default deny; `allow` is a rule.
    let policy = |forward: &str, reverse: &str| {
        let mut text = "version: 1\nsegments:\n".to_owned();
        for (name, address, side) in [("a", A, forward), ("b", B, reverse)] {
            // Outbound protection: the sender's own segment decides.
            let mode = if side == "allow" { "enforce" } else { side };
            text += &format!(
                "  {name}: {{ members: [{{cidr: {address}/32}}], protect: outbound, mode: {mode} }}\n"
            );
        }
        text += "rules:\n  - { name: x, from: [any], to: [any], services: [tcp/1] }\n";
        if forward == "allow" {
            text += "  - { name: f, from: [a], to: [b], services: [tcp/8080] }\n";
        }
        if reverse == "allow" {
            text += "  - { name: r, from: [b], to: [a], services: [tcp/4000] }\n";
        }
        text
    };
    let deny = Outcome::Denied;
    let observe = Outcome::WouldDeny;
    let off = Outcome::Off;
    let allow = Outcome::Allowed;
    for (forward, reverse, outcome, opener_is_a) in [
        ("allow", "allow", allow, true),
        ("allow", "enforce", allow, true),
        ("enforce", "allow", allow, false),
        ("observe", "allow", allow, false),
        ("off", "allow", allow, false),
        ("enforce", "observe", observe, false),
        ("enforce", "off", off, false),
        ("observe", "observe", observe, true),
        ("observe", "off", observe, true),
        ("off", "observe", off, true),
        ("enforce", "enforce", deny, true),
    ] {
        let mut net = Net::new(&policy(forward, reverse));
        let got = net.tcp((A, 4000), (B, 8080), ACK);
        assert_eq!(got.0, outcome, "{forward} {reverse}");
        if outcome == deny {
            assert_eq!(net.entries(), 0);
        } else {
            let low = net.0.only().flags & OPENER_IS_LOW != 0;
            assert_eq!(low, opener_is_a, "{forward} {reverse}");
        }
    }
}

const BOTH_WAYS: &str = r#"
version: 1
segments:
  a: { members: [{cidr: 10.77.0.1/32}] }
  b: { members: [{cidr: 10.77.0.2/32}] }
rules:
  - { name: there, from: [a], to: [b], services: [tcp/8080] }
  - { name: back, from: [b], to: [a], services: [tcp/4000] }
"#;

#[test]
fn simultaneous_open() {
    let mut net = Net::new(BOTH_WAYS);
    assert_eq!(net.tcp((A, 4000), (B, 8080), SYN), ALLOWED);
    assert_eq!(net.tcp((B, 8080), (A, 4000), SYN), ALLOWED);
    assert_eq!(net.entries(), 1);
    assert_eq!(net.tcp((A, 4000), (B, 8080), SYN | ACK), ESTABLISHED);
    assert_eq!(net.tcp((B, 8080), (A, 4000), SYN | ACK), ESTABLISHED);
    assert_eq!(net.tcp((A, 4000), (B, 8080), ACK), ESTABLISHED);
    assert_eq!(net.0.only().flags & REPLIED, REPLIED);
}

#[test]
fn a_syn_from_the_other_end_takes_no_live_flow_over() {
    let mut net = Net::new(BOTH_WAYS);
    net.establish();
    let before = net.0.only();
    net.0.wait(1);
    assert_eq!(net.tcp((B, 8080), (A, 4000), SYN), ALLOWED);
    assert_eq!(net.0.only(), before, "opener, age and rule stay");
    // Closing: the ports may be used again, from either end.
    assert_eq!(net.tcp((A, 4000), (B, 8080), FIN | ACK), ESTABLISHED);
    assert_eq!(net.tcp((B, 8080), (A, 4000), SYN), ALLOWED);
    assert_eq!(net.0.only().flags, 0, "B is the opener now");
    assert_eq!(net.0.only().rule, 1);
}

#[test]
fn a_new_syn_over_a_closing_flow_is_judged() {
    let mut net = Net::new(POLICY);
    net.establish();
    assert_eq!(net.tcp((A, 4000), (B, 8080), FIN | ACK), ESTABLISHED);
    net.apply(NOTHING);
    assert_eq!(net.tcp((A, 4000), (B, 8080), SYN), DENIED);
    net.apply(POLICY);
    assert_eq!(net.tcp((A, 4000), (B, 8080), SYN), ALLOWED);
    assert_eq!(net.0.only().flags, OPENER_IS_LOW, "not closing any more");
}

#[test]
fn rst_and_fin_shorten_and_never_delete() {
    for flags in [RST, RST | ACK, FIN, FIN | ACK] {
        for from_a in [true, false] {
            let mut net = Net::new(POLICY);
            net.establish();
            let (from, to) = if from_a {
                ((A, 4000), (B, 8080))
            } else {
                ((B, 8080), (A, 4000))
            };
            assert_eq!(net.tcp(from, to, flags), ESTABLISHED);
            assert_eq!(net.0.only().flags & CLOSING, CLOSING);
            net.0.wait(idle::TCP_CLOSING);
            // A reply that only an entry lets pass.
            assert_eq!(net.tcp((B, 8080), (A, 4000), RST), ESTABLISHED);
            net.0.wait(idle::TCP_CLOSING);
            net.0.now += 1;
            assert_eq!(net.tcp((B, 8080), (A, 4000), RST), NO_FLOW);
            assert_eq!(net.entries(), 1);
            // Data brings it back: by the policy, not by the entry.
            assert_eq!(net.tcp((A, 4000), (B, 8080), ACK), ALLOWED);
        }
    }
}

#[test]
fn idle_time_at_its_boundary() {
    type Send = fn(&mut Net, bool) -> Got;
    let tcp: Send = |net, reply| match reply {
        false => net.tcp((A, 4000), (B, 8080), SYN),
        true => net.tcp((B, 8080), (A, 4000), SYN | ACK),
    };
    let udp: Send = |net, reply| match reply {
        false => net.udp((A, 4000), (B, 4444)),
        true => net.udp((B, 4444), (A, 4000)),
    };
    let sctp: Send = |net, reply| {
        let (from, to) = if reply { (7777, 4000) } else { (4000, 7777) };
        let mut header = frame::udp(from, to);
        header.extend([0; 4]);
        let (s, d) = if reply { (B, A) } else { (A, B) };
        net.ip(s, d, 132, &header)
    };
    let icmp: Send = |net, reply| match reply {
        false => net.icmp(A, B, 8, 9),
        true => net.icmp(B, A, 0, 9),
    };
    let icmp6: Send = |net, reply| match reply {
        false => net.icmp(A6, B6, 128, 9),
        true => net.icmp(B6, A6, 129, 9),
    };
    let gre: Send = |net, reply| match reply {
        false => net.ip(A, B, 47, &[0; 8]),
        true => net.ip(B, A, 47, &[0; 8]),
    };
    for (name, send, one_way, both) in [
        ("tcp", tcp, idle::TCP_HALF_OPEN, idle::TCP_ESTABLISHED),
        ("udp", udp, idle::PORTS_ONE_WAY, idle::PORTS),
        ("sctp", sctp, idle::PORTS_ONE_WAY, idle::PORTS),
        ("icmp", icmp, idle::ICMP, idle::ICMP),
        ("icmpv6", icmp6, idle::ICMP, idle::ICMP),
        ("gre", gre, idle::OTHER, idle::OTHER),
    ] {
        for (answered, seconds) in [(false, one_way), (true, both)] {
            let open = || {
                let mut net = Net::new(POLICY);
                assert_eq!(send(&mut net, false), ALLOWED, "{name}");
                if answered {
                    assert_eq!(send(&mut net, true), ESTABLISHED, "{name}");
                }
                net
            };
            let mut net = open();
            net.0.wait(seconds);
            assert_eq!(send(&mut net, true), ESTABLISHED, "{name} {answered}");
            let mut net = open();
            net.0.wait(seconds);
            net.0.now += 1;
            let got = send(&mut net, true);
            assert_eq!(got.0, Outcome::Denied, "{name} {answered}");
        }
    }
    // Another CPU may be a tick ahead.
    let mut net = Net::new(POLICY);
    net.establish();
    net.0.now -= 1;
    assert_eq!(net.tcp((A, 4000), (B, 8080), ACK), ESTABLISHED);
}

#[test]
fn a_new_policy_judges_again_in_both_directions() {
    for first_is_reply in [false, true] {
        let mut net = Net::new(POLICY);
        net.establish();
        let generation = net.0.only().generation;
        let there = |net: &mut Net| net.tcp((A, 4000), (B, 8080), ACK);
        let back = |net: &mut Net| net.tcp((B, 8080), (A, 4000), ACK);
        let packet = |net: &mut Net| {
            if first_is_reply {
                back(net)
            } else {
                there(net)
            }
        };

        net.apply(POLICY);
        assert_eq!(packet(&mut net), ALLOWED, "judged again as the opener's");
        assert_ne!(net.0.only().generation, generation);
        assert_eq!(packet(&mut net), ESTABLISHED);

        net.apply(NOTHING);
        let before = net.0.only();
        net.0.wait(1);
        assert_eq!(packet(&mut net), REVOKED);
        assert_eq!(there(&mut net), REVOKED);
        assert_eq!(back(&mut net), REVOKED);
        assert_eq!(net.tcp((B, 8080), (A, 4000), RST), REVOKED);
        assert_eq!(net.0.only(), before, "revoked packets keep nothing alive");

        net.apply(POLICY);
        assert_eq!(packet(&mut net), ALLOWED);
        assert_eq!(there(&mut net), ESTABLISHED);
        assert_eq!(back(&mut net), ESTABLISHED);
        assert_eq!(net.0.only().rule, 0);
    }
    let mut net = Net::new(POLICY);
    assert_eq!(net.udp((A, 4000), (B, 4444)), ALLOWED);
    assert_eq!(net.icmp(A, B, 8, 9), ALLOWED);
    net.apply(NOTHING);
    assert_eq!(net.udp((B, 4444), (A, 4000)), REVOKED);
    assert_eq!(net.icmp(B, A, 0, 9), REVOKED);
    net.apply(POLICY);
    assert_eq!(
        net.icmp(B, A, 0, 9),
        ALLOWED,
        "the requester's flow, by its type"
    );
    assert_eq!(net.icmp(B, A, 0, 9), ESTABLISHED);
}

#[test]
fn an_observed_flow_is_tracked_and_recorded_once() {
    let observe = POLICY.replace("segments:", "defaults: { mode: observe }\nsegments:");
    let would = (Outcome::WouldDeny, Reason::DefaultDeny);
    let mut net = Net::new(&observe);
    assert_eq!(net.tcp((A, 4000), (B, 22), SYN), would);
    assert_eq!(net.tcp((B, 22), (A, 4000), SYN | ACK), ESTABLISHED);
    net.apply(&observe);
    assert_eq!(net.tcp((B, 22), (A, 4000), ACK), would);
    assert_eq!(net.tcp((B, 22), (A, 4000), ACK), ESTABLISHED);
    net.apply(POLICY);
    assert_eq!(net.tcp((B, 22), (A, 4000), ACK), REVOKED);
    assert_eq!(net.tcp((B, 9), (A, 9), RST), NO_FLOW);
    net.apply(&observe);
    assert_eq!(
        net.tcp((B, 9), (A, 9), RST),
        (Outcome::WouldDeny, Reason::NoFlow)
    );
}

#[test]
fn icmp_requests_are_directional() {
    for (a, b, request, reply) in [(A, B, 8, 0), (A6, B6, 128, 129)] {
        let mut net = Net::new(POLICY);
        assert_eq!(net.icmp(b, a, reply, 7), DENIED, "a reply to nothing");
        assert_eq!(net.icmp(a, b, request, 7), ALLOWED);
        assert_eq!(net.icmp(b, a, reply, 7), ESTABLISHED);
        assert_eq!(net.icmp(b, a, reply, 8), DENIED);
        // GHSA-c66w-hq56-4q97: a request from the other side is no reply.
        assert_eq!(net.icmp(b, a, request, 7), DENIED);
        assert_eq!(net.icmp(a, b, reply, 7), DENIED);
        assert_eq!(net.entries(), 1);
    }
}

#[test]
fn a_request_of_another_type_is_another_flow() {
    // Echo is allowed, timestamp is not: an identifier in common must not carry it over.
    let mut net = Net::new(POLICY);
    assert_eq!(net.icmp(A, B, 8, 7), ALLOWED);
    assert_eq!(net.icmp(A, B, 13, 7), DENIED);
    assert_eq!(net.icmp(B, A, 14, 7), DENIED);
    assert_eq!(net.icmp(B, A, 0, 7), ESTABLISHED);
}

#[test]
fn icmp_replies_and_other_messages_open_nothing() {
    let text = r#"
version: 1
segments:
  a: { members: [{cidr: 10.77.0.1/32}] }
  b: { members: [{cidr: 10.77.0.2/32}] }
rules:
  - { name: icmp, from: [a], to: [b], services: [any] }
"#;
    let mut net = Net::new(text);
    for kind in [0, 14, 5, 9, 10, 17] {
        assert_eq!(net.icmp(A, B, kind, 7), ALLOWED, "type {kind}");
        assert_eq!(net.entries(), 0, "type {kind}");
    }
    assert_eq!(net.icmp(B, A, 8, 7), DENIED);
}

#[test]
fn icmp_errors() {
    const ROUTER: &str = "192.0.2.1";
    let there = packet(A, B, 6, &frame::tcp(4000, 8080, ACK));
    let back = packet(B, A, 6, &frame::tcp(8080, 4000, ACK));
    let mut net = Net::new(POLICY);
    assert_eq!(net.error(ROUTER, A, &there), UNRELATED, "no flow yet");
    net.establish();
    // From anywhere, about either direction, to whoever sent the quoted packet.
    for from in [ROUTER, B, C] {
        assert_eq!(net.error(from, A, &there), RELATED);
        assert_eq!(net.error(from, B, &back), RELATED);
        assert_eq!(net.error(from, B, &there).1, Reason::IcmpUnrelated);
        assert_eq!(net.error(from, A, &back).1, Reason::IcmpUnrelated);
    }
    let other = packet(A, B, 6, &frame::tcp(4001, 8080, ACK));
    assert_eq!(net.error(ROUTER, A, &other), UNRELATED);
    let udp = packet(A, B, 17, &frame::udp(4000, 8080));
    assert_eq!(net.error(ROUTER, A, &udp), UNRELATED);
    assert_eq!(net.entries(), 1, "errors open nothing");
    let before = net.0.only();
    net.0.wait(5);
    assert_eq!(net.error(ROUTER, A, &there), RELATED);
    assert_eq!(net.0.only(), before, "errors keep no flow alive");

    // After a change of policy an error is judged as the flow is.
    net.apply(POLICY);
    assert_eq!(net.error(ROUTER, A, &there), RELATED);
    assert_eq!(net.tcp((A, 4000), (B, 8080), ACK), ESTABLISHED);
    net.apply(NOTHING);
    assert_eq!(net.error(ROUTER, A, &there), REVOKED);
    assert_eq!(net.error(ROUTER, B, &back), REVOKED);
    net.apply(POLICY);
    net.0.wait(idle::TCP_ESTABLISHED);
    net.0.now += 1;
    assert_eq!(net.error(ROUTER, A, &there), UNRELATED, "the flow is gone");

    let mut net = Net::new(POLICY);
    assert_eq!(net.icmp(A, B, 8, 7), ALLOWED);
    let request = packet(A, B, 1, &frame::icmp(8, 0, 7));
    assert_eq!(net.error(ROUTER, A, &request), RELATED);
    let other = packet(A, B, 1, &frame::icmp(13, 0, 7));
    assert_eq!(net.error(ROUTER, A, &other), UNRELATED);

    let mut net = Net::new(POLICY);
    assert_eq!(net.tcp((A6, 4000), (B6, 8080), SYN), ALLOWED);
    let there = packet(A6, B6, 6, &frame::tcp(4000, 8080, SYN));
    assert_eq!(net.error("2001:db8::1", A6, &there), RELATED);
    assert_eq!(net.error(B6, B6, &there).1, Reason::IcmpUnrelated);
}

#[test]
fn an_error_about_a_flow_names_the_rule_that_admits_it_now() {
    let mut net = Net::new(POLICY);
    net.establish();
    let text = POLICY.replace(
        "rules:\n",
        "rules:\n  - { name: first, from: [a], to: [b], services: [tcp/1] }\n",
    );
    net.apply(&text);
    let there = packet(A, B, 6, &frame::tcp(4000, 8080, ACK));
    let error = packet("192.0.2.1", A, 1, &frame::icmp_error(3, 4, &there[14..]));
    let decision = net.0.judge(true, &error);
    assert_eq!((decision.reason, decision.rule), (Reason::Related, 1));
    assert_eq!(net.0.only().rule, 1);
}

#[test]
fn multicast_opens_nothing() {
    let text = r#"
version: 1
segments:
  a: { members: [{cidr: 10.77.0.1/32}, {cidr: "fd77::1/128"}] }
rules:
  - { name: mdns, from: [a], to: [multicast], services: [udp/5353] }
"#;
    let mut net = Net::new(text);
    for (from, to) in [
        (A, "224.0.0.251"),
        (A, "239.1.2.3"),
        (A, "255.255.255.255"),
        (A6, "ff02::fb"),
    ] {
        for _ in 0..2 {
            assert_eq!(net.udp((from, 5353), (to, 5353)), ALLOWED, "{to}");
            assert_eq!(net.udp((from, 5353), (to, 53)), DENIED, "{to}");
        }
        let martian = (Outcome::Denied, Reason::Martian);
        assert_eq!(net.udp((to, 5353), (from, 5353)), martian, "{to}");
        assert_eq!(net.tcp((from, 1), (to, 5353), SYN), DENIED, "{to}");
    }
    assert_eq!(net.entries(), 0);
}

#[test]
fn link_local_flows_are_of_one_interface() {
    for (a, b) in [("fe80::1", "fe80::2"), ("169.254.0.1", "169.254.0.2")] {
        let mut net = Net::new(POLICY);
        net.0.ifindex = 3;
        assert_eq!(net.udp((a, 4000), (b, 4444)), ALLOWED);
        assert_eq!(net.udp((b, 4444), (a, 4000)), ESTABLISHED);
        let quoted = packet(a, b, 17, &frame::udp(4000, 4444));
        assert_eq!(net.error(b, a, &quoted), RELATED);
        net.0.ifindex = 4;
        assert_eq!(net.udp((b, 4444), (a, 4000)), DENIED, "another link");
        assert_eq!(net.error(b, a, &quoted), UNRELATED);
        net.0.ifindex = 3;
        assert_eq!(net.udp((b, 4444), (a, 4000)), ESTABLISHED);
    }
    // Other addresses are the same on every interface.
    let mut net = Net::new(POLICY);
    net.0.ifindex = 3;
    assert_eq!(net.udp((A, 4000), (B, 4444)), ALLOWED);
    net.0.ifindex = 4;
    assert_eq!(net.udp((B, 4444), (A, 4000)), ESTABLISHED);
}

#[test]
fn a_full_table_changes_no_verdict() {
    let mut net = Net::new(POLICY);
    net.0.flows.full.set(true);
    assert_eq!(net.tcp((A, 4000), (B, 8080), SYN), ALLOWED);
    assert_eq!(net.tcp((B, 8080), (A, 4000), SYN | ACK), NO_FLOW);
    assert_eq!(net.tcp((B, 8080), (A, 4000), ACK), ALLOWED, "by the policy");
    assert_eq!(net.tcp((B, 22), (A, 4000), ACK), DENIED);
    assert_eq!(net.entries(), 0);
}

#[test]
fn ticks_a_second_scale_idle_times() {
    let mut net = Net::new(POLICY);
    net.establish();
    assert_eq!(net.0.only().last_seen, net.0.now);
    net.0.now += idle::TCP_ESTABLISHED * u64::from(HZ);
    assert_eq!(net.tcp((B, 8080), (A, 4000), RST), ESTABLISHED);
    assert_eq!(net.0.only().last_seen, net.0.now);
}
