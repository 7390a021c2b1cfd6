//! Flows that either end may open, packets that no stack sends, and neighbour discovery in
//! disguise: found by a review, kept from coming back.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

use std::net::IpAddr;

use enforcer_common::verdict::{Outcome, Reason};
use enforcer_tests::{
    frame::{self, ACK, FIN, RST, SYN},
    host::{Host, image},
};

const ESTABLISHED: (Outcome, Reason) = (Outcome::Allowed, Reason::Established);
const ALLOWED: (Outcome, Reason) = (Outcome::Allowed, Reason::RuleAllow);
const REVOKED: (Outcome, Reason) = (Outcome::Denied, Reason::Revoked);
const NO_FLOW: (Outcome, Reason) = (Outcome::Denied, Reason::NoFlow);

fn policy(rules: &str) -> String {
    format!(
        "version: 1\nsegments:\n  a: {{ members: [{{cidr: 10.77.0.1/32}}] }}\n  \
         b: {{ members: [{{cidr: 10.77.0.2/32}}] }}\nrules:\n{rules}"
    )
}

fn both_ways(service: &str) -> (String, String) {
    let ab = format!("  - {{ name: ab, from: [a], to: [b], services: [{service}] }}\n");
    let ba = format!("  - {{ name: ba, from: [b], to: [a], services: [{service}] }}\n");
    (policy(&format!("{ab}{ba}")), policy(&ba))
}

struct Net(Host);

impl Net {
    fn send(&mut self, from_a: bool, protocol: u8, payload: &[u8]) -> (Outcome, Reason) {
        let (a, b): (IpAddr, IpAddr) = ([10, 77, 0, 1].into(), [10, 77, 0, 2].into());
        let (source, destination) = if from_a { (a, b) } else { (b, a) };
        let decision = self
            .0
            .judge(true, &frame::frame(source, destination, protocol, payload));
        (decision.outcome, decision.reason)
    }
}

#[test]
fn a_far_end_with_a_rule_of_its_own_keeps_its_datagrams() {
    let udp = frame::udp(47808, 47808);
    for (service, protocol, payload) in [
        ("udp/47808", 17, udp.as_slice()),
        ("proto/gre", 47, &[0; 24]),
    ] {
        let (both, only_ba) = both_ways(service);
        let mut net = Net(Host::new(image(&both)));
        assert_eq!(net.send(true, protocol, payload), ALLOWED);
        assert_eq!(net.send(false, protocol, payload), ESTABLISHED);
        net.0.image = image(&only_ba);
        assert_eq!(
            net.send(true, protocol, payload),
            REVOKED,
            "{service}: a has no rule now"
        );
        assert_eq!(
            net.send(false, protocol, payload),
            ALLOWED,
            "{service}: b has one"
        );
        assert_eq!(
            net.send(true, protocol, payload),
            ESTABLISHED,
            "{service}: its answers pass"
        );
    }
}

#[test]
fn a_stale_entry_does_not_keep_the_other_end_from_opening() {
    let (both, only_ba) = both_ways("tcp/179");
    let tcp = |flags| frame::tcp(179, 179, flags);
    let mut net = Net(Host::new(image(&both)));
    assert_eq!(net.send(true, 6, &tcp(SYN)), ALLOWED);
    assert_eq!(net.send(false, 6, &tcp(SYN | ACK)), ESTABLISHED);
    net.0.image = image(&only_ba);
    // Data of the revoked session is cut both ways, whatever rule the far end has.
    assert_eq!(net.send(true, 6, &tcp(ACK)), REVOKED);
    assert_eq!(net.send(false, 6, &tcp(ACK)), REVOKED);
    // A session of b's own is another matter.
    assert_eq!(net.send(false, 6, &tcp(SYN)), ALLOWED);
    assert_eq!(net.send(true, 6, &tcp(SYN | ACK)), ESTABLISHED);
}

#[test]
fn a_syn_in_disguise_does_not_ride_on_an_entry() {
    let (_, only_ba) = both_ways("tcp/5432");
    let tcp = |flags| frame::tcp(5432, 22, flags);
    let mut net = Net(Host::new(image(&only_ba)));
    // The middle of a flow that b could have opened.
    assert_eq!(net.send(true, 6, &tcp(ACK)), ALLOWED);
    for flags in [SYN | FIN, SYN | RST, SYN | FIN | ACK, SYN | RST | ACK] {
        assert_eq!(net.send(true, 6, &tcp(flags)), NO_FLOW, "{flags:#x}");
    }
    assert_eq!(net.send(true, 6, &tcp(ACK)), ESTABLISHED);
}

#[test]
fn neighbour_discovery_behind_an_extension_header_is_not_essential() {
    let guarded = "version: 1\nsegments:\n  a: { members: [{cidr: \"fd77::/64\"}] }\nrules:\n  \
                   - { name: x, from: [a], to: [a], services: [tcp/1] }\n";
    let mut host = Host::new(image(guarded));
    let (source, destination): (IpAddr, IpAddr) =
        ("fd77::1".parse().unwrap(), "fd77::2".parse().unwrap());
    let solicitation = [frame::icmp(135, 0, 0), vec![0; 16]].concat();
    let mut plain = frame::frame(source, destination, 58, &solicitation);
    plain[14 + 7] = 255;
    assert_eq!(host.judge(true, &plain).reason, Reason::Essential);
    let options = [vec![58, 0, 1, 4, 0, 0, 0, 0], solicitation].concat();
    let mut hidden = frame::frame(source, destination, 60, &options);
    hidden[14 + 7] = 255;
    assert_eq!(host.judge(true, &hidden).reason, Reason::DefaultDeny);
}
