//! Sequences of packets that try to talk past the judgement, and to have it cut what it must not.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::net::IpAddr;

use enforcer::{
    compile::{self, Failsafe, Image, Options},
    policy::model::{Environment, Transport},
};
use enforcer_common::{
    image::essential,
    verdict::{Outcome, Reason},
};
use enforcer_tests::{
    frame::{self, ACK, SYN},
    host::{Host, image, policy},
    kernel::generation,
};

const A: &str = "10.77.0.1";
const B: &str = "10.77.0.2";

type Got = (Outcome, Reason);
const ALLOWED: Got = (Outcome::Allowed, Reason::RuleAllow);
const ESTABLISHED: Got = (Outcome::Allowed, Reason::Established);
const EXPIRED: Got = (Outcome::Denied, Reason::Expired);
const FAILSAFE: Got = (Outcome::Allowed, Reason::Failsafe);

fn packet(from: &str, to: &str, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let parse = |text: &str| text.parse::<IpAddr>().unwrap();
    frame::frame(parse(from), parse(to), protocol, payload)
}

fn tcp(from: (&str, u16), to: (&str, u16), flags: u8) -> Vec<u8> {
    packet(from.0, to.0, 6, &frame::tcp(from.1, to.1, flags))
}

fn udp(from: (&str, u16), to: (&str, u16)) -> Vec<u8> {
    packet(from.0, to.0, 17, &frame::udp(from.1, to.1))
}

fn ask(host: &mut Host, ingress: bool, bytes: &[u8]) -> Got {
    let decision = host.judge(ingress, bytes);
    (decision.outcome, decision.reason)
}

/// An image of a host that is 10.77.0.1, at these interfaces, with SSH and SNMP as failsafes.
fn of_host(text: &str, interfaces: &[(u32, &str)]) -> Image {
    let env = Environment {
        host_addresses: [A.parse().unwrap()].into(),
        interfaces: interfaces
            .iter()
            .map(|(slot, name)| (*slot, (*name).to_owned()))
            .collect(),
    };
    let options = Options {
        generation: generation(),
        essentials: essential::ALL,
        failsafes: vec![Failsafe {
            sources: vec!["10.77.0.0/24".parse().unwrap()],
            ports: vec![(Transport::Tcp, 22, 22), (Transport::Udp, 161, 161)],
            interfaces: Vec::new(),
        }],
        ethertypes: Vec::new(),
    };
    compile::compile(&policy(text), &env, &options).unwrap()
}

const CLOSED: &str = "
version: 1
segments:
  all: { members: [{cidr: 10.77.0.0/16}] }
";

#[test]
fn a_failsafe_flow_that_the_host_goes_on_with_outlives_a_new_policy() {
    for datagrams in [false, true] {
        let mut host = Host::new(of_host(CLOSED, &[]));
        let port = if datagrams { 161 } else { 22 };
        let (out, back) = if datagrams {
            (udp((A, port), (B, 4000)), udp((B, 4000), (A, port)))
        } else {
            (
                tcp((A, port), (B, 4000), ACK),
                tcp((B, 4000), (A, port), ACK),
            )
        };
        // The table was emptied, and the host is the first to speak.
        assert_eq!(ask(&mut host, false, &out), FAILSAFE);
        assert_eq!(ask(&mut host, true, &back).0, Outcome::Allowed);
        for _ in 0..2 {
            host.image = of_host(CLOSED, &[]);
            assert_eq!(ask(&mut host, false, &out).0, Outcome::Allowed, "{port}");
            host.image = of_host(CLOSED, &[]);
            assert_eq!(ask(&mut host, true, &back).0, Outcome::Allowed, "{port}");
        }
    }
}

/// `a` may come in at eth1 only and is observed; `b` may not be opened anything to.
const WATCHED: &str = "
version: 1
segments:
  a: { members: [{cidr: 10.77.0.8/32}], interfaces: [eth1], mode: observe }
  b: { members: [{cidr: 10.77.0.9/32}], protect: outbound }
rules:
  - { name: never, from: [a], to: [b], services: [tcp/445], action: deny }
";

#[test]
fn an_observed_spoof_opens_nothing_that_a_rule_denies() {
    let (a, b) = (("10.77.0.8", 4000), ("10.77.0.9", 445));
    let mut host = Host::new(of_host(WATCHED, &[(1, "eth1"), (2, "eth2")]));
    let denied = (Outcome::Denied, Reason::RuleDeny);
    (host.ifindex, host.slot) = (11, 1);
    assert_eq!(ask(&mut host, true, &tcp(a, b, SYN)), denied);
    // The same from where `a` is not: no better.
    (host.ifindex, host.slot) = (12, 2);
    assert_eq!(
        ask(&mut host, true, &tcp(a, b, SYN)).0,
        Outcome::Denied,
        "the packet itself"
    );
    (host.ifindex, host.slot) = (11, 1);
    assert_eq!(
        ask(&mut host, true, &tcp(a, b, ACK)).0,
        Outcome::Denied,
        "what follows"
    );
}

#[test]
fn an_observed_spoof_of_an_allowed_flow_is_answered() {
    let text = "
version: 1
segments:
  a: { members: [{cidr: 10.77.0.8/32}], interfaces: [eth1], mode: observe }
  b: { members: [{cidr: 10.77.0.9/32}], protect: outbound }
rules:
  - { name: web, from: [a], to: [b], services: [tcp/80] }
";
    let (a, b) = (("10.77.0.8", 4000), ("10.77.0.9", 80));
    let mut host = Host::new(of_host(text, &[(1, "eth1"), (2, "eth2")]));
    (host.ifindex, host.slot) = (12, 2);
    let spoofed = (Outcome::WouldDeny, Reason::Spoofed);
    assert_eq!(ask(&mut host, true, &tcp(a, b, SYN)), spoofed);
    assert_eq!(ask(&mut host, false, &tcp(b, a, SYN | ACK)), ESTABLISHED);
}

const SESSIONS: &str = "
version: 1
segments:
  a: { members: [{cidr: 10.77.0.1/32}] }
  b: { members: [{cidr: 10.77.0.2/32}] }
rules:
  - { name: bounded, from: [a], to: [b], services: [tcp/8080, udp/4444, icmp/8], session: {max: 8h, idle: 10m} }
";

#[test]
fn the_far_end_of_datagrams_starts_no_session_again() {
    let mut host = Host::new(image(SESSIONS));
    let (out, back) = (udp((A, 4000), (B, 4444)), udp((B, 4444), (A, 4000)));
    assert_eq!(ask(&mut host, true, &out), ALLOWED);
    assert_eq!(ask(&mut host, true, &back), ESTABLISHED);
    host.wait(601);
    assert_eq!(ask(&mut host, true, &back).0, Outcome::Denied);
    assert_eq!(ask(&mut host, true, &out), ALLOWED);
    assert_eq!(ask(&mut host, true, &back).0, Outcome::Allowed);

    let ping = |kind| frame::icmp(kind, 0, 7);
    let (out, back) = (packet(A, B, 1, &ping(8)), packet(B, A, 1, &ping(0)));
    assert_eq!(ask(&mut host, true, &out), ALLOWED);
    assert_eq!(ask(&mut host, true, &back), ESTABLISHED);
    host.wait(601);
    assert_eq!(ask(&mut host, true, &back).0, Outcome::Denied);
}

#[test]
fn errors_keep_no_session_alive() {
    let mut host = Host::new(image(SESSIONS));
    let ends = ((A, 4000), (B, 8080));
    let out = tcp(ends.0, ends.1, ACK);
    let error = packet("10.77.9.9", A, 1, &frame::icmp_error(3, 4, &out[14..]));
    assert_eq!(ask(&mut host, true, &tcp(ends.0, ends.1, SYN)), ALLOWED);
    assert_eq!(
        ask(&mut host, true, &tcp(ends.1, ends.0, SYN | ACK)),
        ESTABLISHED
    );
    assert_eq!(ask(&mut host, true, &out), ESTABLISHED);
    for _ in 0..2 {
        host.wait(400);
        ask(&mut host, true, &error);
    }
    assert_eq!(ask(&mut host, true, &out), EXPIRED);

    // Nor do they start one again.
    let mut host = Host::new(image(SESSIONS));
    let out = udp((A, 4000), (B, 4444));
    let error = packet("10.77.9.9", A, 1, &frame::icmp_error(3, 4, &out[14..]));
    assert_eq!(ask(&mut host, true, &out), ALLOWED);
    host.wait(601);
    assert_eq!(ask(&mut host, true, &error).0, Outcome::Denied);
    assert_eq!(
        ask(&mut host, true, &udp((B, 4444), (A, 4000))).0,
        Outcome::Denied
    );
}

#[test]
fn a_syn_into_a_live_session_prolongs_it() {
    let mut host = Host::new(image(SESSIONS));
    let (a, b) = ((A, 4000), (B, 8080));
    assert_eq!(ask(&mut host, true, &tcp(a, b, SYN)), ALLOWED);
    assert_eq!(ask(&mut host, true, &tcp(b, a, SYN | ACK)), ESTABLISHED);
    // Data every minute for nearly eight hours, then a SYN, which the far end takes for none
    // (RFC 5961), and data again.
    for _ in 0..479 {
        host.wait(60);
        assert_eq!(ask(&mut host, true, &tcp(a, b, ACK)), ALLOWED);
    }
    ask(&mut host, true, &tcp(a, b, SYN));
    host.wait(90);
    // A limit: only the far end's answer tells a new connection from the old one.
    assert_eq!(ask(&mut host, true, &tcp(a, b, ACK)), ALLOWED);
}

#[test]
fn odd_form_is_denied_by_guards_and_not_by_rules() {
    let text = "
version: 1
defaults: { unsegmented: allow }
rules:
  - { name: never, from: [any], to: [any], services: [tcp/445], action: deny }
";
    let mut host = Host::new(image(text));
    let (a, b) = ("fd77::1", "fd77::2");
    let syn = frame::tcp(4000, 445, SYN);
    assert_eq!(
        ask(&mut host, true, &packet(a, b, 6, &syn)).0,
        Outcome::Denied
    );
    // Linux goes through 120 of these.
    let mut payload = Vec::new();
    for turn in 0..7 {
        payload.extend([if turn == 6 { 6 } else { 60 }, 0, 1, 4, 0, 0, 0, 0]);
    }
    payload.extend(&syn);
    assert_eq!(
        ask(&mut host, true, &packet(a, b, 60, &payload)).0,
        Outcome::Off,
        "a limit: nobody guards these addresses"
    );
}
