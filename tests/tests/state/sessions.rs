//! Sessions and expiry at their exact boundaries: the shared code on the host, with clocks that
//! the tests turn.

use std::net::IpAddr;

use enforcer_common::{
    decide::Decision,
    flow::{SESSION, TIMED, idle},
    judge::{self, Scene},
    packet::{self, Link, Packet},
    verdict::{Outcome, Reason},
};
use enforcer_tests::{
    frame::{ACK, FIN, RST, SYN},
    host::{HZ, Host, image},
    netns::Family,
};

use crate::common::{
    ALLOWED, DENIED, ESTABLISHED, EXPIRED, NO_FLOW, ends, instant, policy, tcp, udp,
};

/// What the clock of [`Host`] says at first.
const NOW: u64 = 1_800_000_000;

struct Net {
    host: Host,
    a: IpAddr,
    b: IpAddr,
}

impl Net {
    fn new(family: Family, rules: &str) -> Self {
        let (a, b) = ends(family);
        let host = Host::new(image(&policy(rules)));
        assert_eq!(host.time.unix, NOW);
        Self { host, a, b }
    }

    fn tcp(&mut self, from_a: bool, flags: u8) -> (Outcome, Reason) {
        let (a, b) = ((self.a, 4000), (self.b, 8080));
        let (from, to) = if from_a { (a, b) } else { (b, a) };
        got(&self.host.judge(true, &tcp(from, to, flags)))
    }

    fn udp(&mut self, from_a: bool) -> (Outcome, Reason) {
        let (a, b) = ((self.a, 4000), (self.b, 4444));
        let (from, to) = if from_a { (a, b) } else { (b, a) };
        got(&self.host.judge(true, &udp(from, to)))
    }

    fn establish(&mut self) {
        assert_eq!(self.tcp(true, SYN), ALLOWED);
        assert_eq!(self.tcp(false, SYN | ACK), ESTABLISHED);
        assert_eq!(self.tcp(true, ACK), ESTABLISHED);
    }

    /// Lets time of suspend go by, in which jiffies stand still.
    fn suspend(&mut self, seconds: u32) {
        self.host.time.boot += seconds;
        self.host.time.unix += u64::from(seconds);
    }
}

fn got(decision: &Decision) -> (Outcome, Reason) {
    (decision.outcome, decision.reason)
}

fn expires(unix: u64) -> String {
    let at = instant(unix);
    format!(
        "  - {{ name: some, from: [a], to: [b], services: [tcp/8080, udp/4444], expires: {at} }}"
    )
}

fn session(bounds: &str) -> String {
    format!(
        "  - {{ name: some, from: [a], to: [b], services: [tcp/8080, udp/4444], session: {{{bounds}}} }}"
    )
}

#[test]
fn a_rule_ends_at_its_second() {
    for family in Family::BOTH {
        for (seconds, alive) in [(2, true), (3, false), (4, false), (3600, false)] {
            let mut net = Net::new(family, &expires(NOW + 3));
            net.establish();
            assert_eq!(net.udp(true), ALLOWED);
            let flags = net.host.flows.entries.borrow();
            assert!(flags.values().all(|e| e.0.get().flags & TIMED != 0));
            drop(flags);
            net.host.wait(seconds);
            let (first, then, opening) = if alive {
                (ALLOWED, ESTABLISHED, ALLOWED)
            } else {
                (EXPIRED, EXPIRED, DENIED)
            };
            // Both directions of each, whichever comes first.
            assert_eq!(net.tcp(false, ACK), first, "{seconds}");
            assert_eq!(net.tcp(true, ACK), then, "{seconds}");
            // A datagram flow forgets after a minute of silence that nothing came back to.
            if seconds < idle::PORTS_ONE_WAY {
                assert_eq!(net.udp(true), first, "{seconds}");
                assert_eq!(net.udp(false), then, "{seconds}");
            }
            assert_eq!(net.tcp(true, SYN), opening, "{seconds}");
            assert_eq!(net.tcp(false, SYN), DENIED, "{seconds}");
        }
    }
}

/// A flow is looked at again once in each second of the boot clock, and not more often.
#[test]
fn a_timed_flow_is_judged_once_a_second() {
    let mut net = Net::new(Family::V4, &expires(NOW + 1000));
    net.establish();
    for _ in 0..5 {
        net.host.wait(1);
        assert_eq!(net.tcp(true, ACK), ALLOWED);
        for _ in 0..3 {
            assert_eq!(net.tcp(false, ACK), ESTABLISHED);
            assert_eq!(net.tcp(true, ACK), ESTABLISHED);
        }
    }
    assert_eq!(net.host.only().checked, 10_005);
}

#[test]
fn a_deny_rule_that_ends_lets_what_is_allowed_pass() {
    let at = instant(NOW + 3);
    let rules = format!(
        "  - {{ name: not-yet, from: [a], to: [b], services: [tcp/8080], action: deny, expires: {at} }}\n\
         \x20 - {{ name: web, from: [a], to: [b], services: [tcp/8080] }}"
    );
    let mut net = Net::new(Family::V6, &rules);
    let by_rule = (Outcome::Denied, Reason::RuleDeny);
    assert_eq!(net.tcp(true, SYN), by_rule);
    net.host.wait(2);
    assert_eq!(net.tcp(true, SYN), by_rule);
    assert_eq!(net.tcp(true, ACK), by_rule);
    net.host.wait(1);
    net.establish();
    net.host.wait(1000);
    assert_eq!(net.tcp(false, ACK).0, Outcome::Allowed);
}

/// The longer-lived right takes over, without a packet lost.
#[test]
fn a_flow_goes_on_under_the_next_rule_that_allows_it() {
    let at = instant(NOW + 3);
    let later = instant(NOW + 6);
    let rules = format!(
        "  - {{ name: first, from: [a], to: [b], services: [tcp/8080], expires: {at} }}\n\
         \x20 - {{ name: second, from: [a], to: [b], services: [tcp/8080], expires: {later} }}"
    );
    let mut net = Net::new(Family::V4, &rules);
    net.establish();
    assert_eq!(net.host.only().rule, 0);
    net.host.wait(3);
    assert_eq!(net.tcp(false, ACK), ALLOWED);
    assert_eq!(net.host.only().rule, 1);
    net.host.wait(2);
    assert_eq!(net.tcp(true, ACK), ALLOWED);
    net.host.wait(1);
    assert_eq!(net.tcp(true, ACK), EXPIRED);
}

#[test]
fn a_session_lasts_as_long_as_it_may() {
    for family in Family::BOTH {
        let mut net = Net::new(family, &session("max: 3s"));
        net.establish();
        assert_eq!(net.host.only().flags & (TIMED | SESSION), TIMED | SESSION);
        for _ in 0..3 {
            net.host.wait(1);
            assert_eq!(net.tcp(true, ACK).0, Outcome::Allowed);
            assert_eq!(net.tcp(false, ACK), ESTABLISHED);
        }
        let before = net.host.only();
        net.host.wait(1);
        for flags in [ACK, FIN | ACK, RST, RST | ACK, SYN | ACK] {
            assert_eq!(net.tcp(true, flags), EXPIRED, "{flags:#x}");
            assert_eq!(net.tcp(false, flags), EXPIRED, "{flags:#x}");
        }
        assert_eq!(net.host.only(), before, "what is cut keeps nothing alive");
        // For ever: no silence makes an end that is forgotten.
        net.host.wait(10 * 86_400);
        assert_eq!(net.tcp(true, ACK), EXPIRED);
        assert_eq!(net.tcp(false, SYN), DENIED);
        // An opening is a session of its own, with all of its time.
        net.establish();
        assert_eq!(net.host.only().opened, net.host.time.boot);
        net.host.wait(3);
        assert_eq!(net.tcp(false, ACK).0, Outcome::Allowed);
        net.host.wait(1);
        assert_eq!(net.tcp(false, ACK), EXPIRED);
    }
}

#[test]
fn a_session_that_is_silent_too_long_is_over() {
    for from_a in [true, false] {
        let mut net = Net::new(Family::V4, &session("idle: 2s"));
        net.establish();
        for _ in 0..20 {
            net.host.wait(2);
            assert_eq!(net.tcp(from_a, ACK).0, Outcome::Allowed);
        }
        net.host.wait(3);
        assert_eq!(net.tcp(from_a, ACK), EXPIRED);
        assert_eq!(net.tcp(!from_a, ACK), EXPIRED);
        net.establish();
    }
    // Both bounds: whichever comes first.
    let mut net = Net::new(Family::V4, &session("max: 5s, idle: 2s"));
    net.establish();
    for _ in 0..2 {
        net.host.wait(2);
        assert_eq!(net.tcp(true, ACK).0, Outcome::Allowed);
    }
    net.host.wait(2);
    assert_eq!(net.tcp(true, ACK), EXPIRED, "six seconds old");
}

/// No datagram says that it opens a session: one begins with the first after a silence.
#[test]
fn datagrams_begin_a_session_again_after_a_silence() {
    let mut net = Net::new(Family::V6, &session("max: 3s, idle: 2s"));
    assert_eq!(net.udp(true), ALLOWED);
    for _ in 0..3 {
        net.host.wait(1);
        assert_eq!(net.udp(false).0, Outcome::Allowed);
    }
    net.host.wait(1);
    assert_eq!(net.udp(true), EXPIRED);
    assert_eq!(net.udp(false), EXPIRED);
    net.host.wait(1);
    assert_eq!(net.udp(true), EXPIRED, "two seconds since one that passed");
    net.host.wait(1);
    assert_eq!(net.udp(true).0, Outcome::Allowed);
    assert_eq!(net.host.only().opened, net.host.time.boot);
    // Without `idle`: after as long as any datagram flow is remembered.
    let mut net = Net::new(Family::V6, &session("max: 3s"));
    assert_eq!(net.udp(true), ALLOWED);
    net.host.wait(4);
    assert_eq!(net.udp(true), EXPIRED);
    net.host.wait(idle::PORTS - 4);
    assert_eq!(net.udp(true), EXPIRED);
    net.host.wait(1);
    assert_eq!(net.udp(true), ALLOWED);
}

#[test]
fn a_session_begins_with_a_syn() {
    for family in Family::BOTH {
        let mut net = Net::new(family, &session("max: 1h"));
        for flags in [ACK, ACK | FIN, ACK | 0x08] {
            assert_eq!(net.tcp(true, flags), NO_FLOW, "{flags:#x}");
            assert_eq!(net.tcp(false, flags).0, Outcome::Denied, "{flags:#x}");
        }
        assert!(net.host.flows.entries.borrow().is_empty());
        net.establish();
    }
}

/// A rule that gains bounds holds flows to them from then on.
#[test]
fn bounds_that_come_later_bind_flows_that_are_there() {
    let mut net = Net::new(
        Family::V4,
        "  - { name: some, from: [a], to: [b], services: [tcp/8080] }",
    );
    net.establish();
    net.host.wait(1000);
    net.host.image = image(&policy(&session("max: 3s")));
    assert_eq!(net.tcp(false, ACK), ALLOWED);
    net.host.wait(3);
    assert_eq!(net.tcp(false, ACK), ALLOWED);
    net.host.wait(1);
    assert_eq!(net.tcp(true, ACK), EXPIRED);
    // Bounds that go set it free.
    net.host.image = image(&policy(
        "  - { name: some, from: [a], to: [b], services: [tcp/8080] }",
    ));
    assert_eq!(net.tcp(true, ACK), ALLOWED);
    net.host.wait(1000);
    assert_eq!(net.tcp(true, ACK), ESTABLISHED);
}

/// In suspend the boot clock and the wall clock go on, and jiffies stand still.
#[test]
fn suspend_counts_for_rules_and_not_for_the_table() {
    for (rules, want) in [
        (expires(NOW + 100), EXPIRED),
        (session("max: 100s"), EXPIRED),
        (session("idle: 100s"), EXPIRED),
    ] {
        let mut net = Net::new(Family::V4, &rules);
        net.establish();
        net.suspend(99);
        assert_eq!(net.tcp(true, ACK), ALLOWED);
        net.suspend(3600);
        assert_eq!(net.tcp(true, ACK), want, "{rules}");
        assert_eq!(net.tcp(false, ACK), want, "{rules}");
    }
    let plain = "  - { name: some, from: [a], to: [b], services: [tcp/8080] }";
    let mut net = Net::new(Family::V4, plain);
    net.establish();
    net.suspend(30 * 86_400);
    assert_eq!(net.tcp(false, RST), ESTABLISHED);
}

#[test]
fn half_open_flows_are_forgotten_after_a_minute() {
    let rule = "  - { name: some, from: [a], to: [b], services: [tcp/8080] }";
    let mut net = Net::new(Family::V4, rule);
    net.establish();
    for port in 5000..5100 {
        let syn = tcp((net.a, port), (net.b, 8080), SYN);
        assert_eq!(got(&net.host.judge(true, &syn)), ALLOWED);
    }
    let answer = |net: &mut Net, port| {
        let frame = tcp((net.b, 8080), (net.a, port), SYN | ACK);
        got(&net.host.judge(true, &frame))
    };
    net.host.wait(idle::TCP_HALF_OPEN);
    assert_eq!(answer(&mut net, 5000), ESTABLISHED, "in time");
    net.host.now += 1;
    for port in 5001..5100 {
        assert_eq!(answer(&mut net, port), NO_FLOW, "{port}");
    }
    assert_eq!(net.tcp(false, RST), ESTABLISHED, "the established one");
    net.host.now += 60 * 60 * u64::from(HZ);
    assert_eq!(answer(&mut net, 5000), ESTABLISHED, "answered in time");
}

/// A table that takes no entry: the packet's verdict stays, and the failure is told.
#[test]
fn a_table_that_takes_nothing_changes_no_verdict() {
    let rule = "  - { name: some, from: [a], to: [b], services: [tcp/8080, udp/4444] }";
    let net = Net::new(Family::V4, rule);
    net.host.flows.full.set(true);
    let (a, b) = ((net.a, 4000), (net.b, 8080));
    for (frame, want, failed) in [
        (tcp(a, b, SYN), ALLOWED, true),
        (tcp(a, b, ACK), ALLOWED, true),
        (tcp(b, a, ACK), ALLOWED, true),
        (tcp(b, a, SYN), DENIED, false),
        (tcp(b, a, SYN | ACK), NO_FLOW, false),
        (tcp(a, (net.b, 22), SYN), DENIED, false),
        (udp(a, (net.b, 4444)), ALLOWED, true),
        (udp((net.b, 4444), a), DENIED, false),
    ] {
        let link = Link {
            ethernet: true,
            protocol: 0,
            vlan: None,
            ingress: true,
            ifindex: 1,
            slot: 0,
            gso: false,
            looped: false,
        };
        let scene = Scene {
            link,
            clock: enforcer_common::flow::Clock {
                now: net.host.now,
                hz: HZ,
            },
            time: net.host.time,
        };
        let mut packet = Packet::EMPTY;
        let form = packet::parse(&frame[..], &link, &mut packet);
        let words = net.host.image.words();
        let judgement = judge::judge(words, &net.host.flows, &mut packet, &scene, form);
        assert_eq!(got(&judgement.decision), want);
        assert_eq!(judgement.insert_failed, failed);
    }
    assert!(net.host.flows.entries.borrow().is_empty());
}
