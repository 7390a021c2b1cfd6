//! Where packets of a flow come in: an entry remembers it for each end, and from elsewhere the
//! source is looked at again.

use std::{net::IpAddr, time::Duration};

use enforcer::policy::model::Environment;
use enforcer_common::{verdict::Reason, wire::FlowEntry};
use enforcer_tests::{
    daemon::{LONG, Setup, wait_for},
    frame::{self, ACK, FIN, RST, SYN},
    host, kernel,
    kernel::Programs,
    netns::{Family, Netns, Routed},
    traffic::{self, QUIET, Tap},
};
use nix::net::if_::if_nametoindex;

use crate::common::*;

/// `a` is behind `left` and `third` only; `b` and `c` are anywhere.
const BOUND: &str = r#"version: 1
segments:
  a: { members: [{cidr: 10.1.0.0/24}, {cidr: "fd01::/64"}], interfaces: [left, third] }
  b: { members: [{cidr: 10.2.0.0/24}, {cidr: "fd02::/64"}] }
rules:
  - { name: some, from: [a], to: [b], services: [tcp/8080, udp/4444] }
"#;

/// A namespace with three interfaces, which the kernel knows by these slots.
fn namespace(programs: &mut Programs) -> (Netns, [u32; 3]) {
    let namespace = Netns::new("arrive");
    namespace
        .ip("link add left type veth peer name right\nlink add third type veth peer name fourth\n");
    let names = ["left", "right", "third"];
    let indices = namespace.enter(|| names.map(|name| if_nametoindex(name).unwrap()));
    for (index, slot) in indices.into_iter().zip(1..) {
        programs.set_interface(index, 0, slot);
    }
    (namespace, indices)
}

fn environment() -> Environment {
    Environment {
        interfaces: [(1, "left"), (2, "right"), (3, "third")]
            .map(|(slot, name)| (slot, name.to_owned()))
            .into(),
        ..Environment::default()
    }
}

/// The only entry.
fn entry(programs: &mut Programs) -> FlowEntry {
    let (v4, v6) = programs.flows();
    let all: Vec<FlowEntry> = v4.into_values().chain(v6.into_values()).collect();
    assert_eq!(all.len(), 1);
    all[0]
}

/// A packet of either end.
fn packet(family: Family, protocol: u8, from_a: bool, first: bool) -> Vec<u8> {
    let (a, b) = ends(family);
    let (a, b) = ((a, 4000), (b, if protocol == 6 { 8080 } else { 4444 }));
    let (from, to) = if from_a { (a, b) } else { (b, a) };
    match (protocol, first) {
        (6, true) => tcp(from, to, SYN),
        (6, false) => tcp(from, to, ACK),
        _ => udp(from, to),
    }
}

#[test]
fn packets_of_a_flow_from_another_interface_are_looked_at_again() {
    let mut programs = Programs::shared();
    let (namespace, [left, right, third]) = namespace(&mut programs);
    programs.apply(&kernel::compile(&host::policy(BOUND), &environment()));
    let programs = &mut *programs;
    namespace.enter(|| {
        for family in Family::BOTH {
            for protocol in [6, 17] {
                programs.forget_flows();
                let there = packet(family, protocol, true, false);
                let back = packet(family, protocol, false, false);
                let first = packet(family, protocol, true, true);
                assert_eq!(got(programs.judge_at(INGRESS, right, &first)), SPOOFED);
                assert_eq!(got(programs.judge_at(INGRESS, left, &first)), ALLOWED);
                // `a` is the low end, and what it sends came in here.
                assert_eq!(entry(programs).arrived, [0, left]);
                // On the way out nothing arrives.
                assert_eq!(got(programs.judge_at(EGRESS, right, &there)), ESTABLISHED);
                assert_eq!(entry(programs).arrived, [0, left]);
                // The far end may come in anywhere, and is known there then.
                for index in [right, third, left] {
                    let verdict = programs.judge_at(INGRESS, index, &back);
                    assert_eq!(got(verdict), ESTABLISHED);
                    assert_eq!(entry(programs).arrived, [index, left]);
                }
                // `a` from where it cannot be: cut, and the entry stays as it was.
                let before = entry(programs);
                for _ in 0..3 {
                    assert_eq!(got(programs.judge_at(INGRESS, right, &there)), SPOOFED);
                }
                let records = programs.drain();
                let record = records.iter().find(|r| r.reason() == Reason::Spoofed);
                assert_eq!(record.unwrap().ifindex, right);
                assert_eq!(entry(programs), before);
                assert_eq!(got(programs.judge_at(INGRESS, left, &there)), ESTABLISHED);
                // From where it may be, it is accepted and remembered.
                assert_eq!(got(programs.judge_at(INGRESS, third, &there)), ESTABLISHED);
                assert_eq!(entry(programs).arrived, [left, third]);
                assert_eq!(got(programs.judge_at(INGRESS, left, &there)), ESTABLISHED);
                // Another policy, and the flow is judged again: where it comes from, too.
                programs.apply(&kernel::compile(&host::policy(BOUND), &environment()));
                assert_eq!(got(programs.judge_at(INGRESS, right, &there)), SPOOFED);
                assert_eq!(got(programs.judge_at(INGRESS, third, &there)), ALLOWED);
                assert_eq!(entry(programs).arrived, [left, third]);
            }
        }
        for hook in [INGRESS, EGRESS] {
            programs.records(hook);
        }
    });
}

#[test]
fn mid_stream_packets_and_syns_over_a_flow_must_come_from_where_they_may() {
    let mut programs = Programs::shared();
    let (namespace, [left, right, _]) = namespace(&mut programs);
    programs.apply(&kernel::compile(&host::policy(BOUND), &environment()));
    let programs = &mut *programs;
    namespace.enter(|| {
        for family in Family::BOTH {
            programs.forget_flows();
            let there = packet(family, 6, true, false);
            assert_eq!(got(programs.judge_at(INGRESS, right, &there)), SPOOFED);
            assert_eq!(flows(programs), 0);
            // A forged packet does not become a flow by its reverse direction either.
            let (a, b) = ends(family);
            let reverse = tcp((a, 8080), (b, 4000), ACK);
            assert_eq!(got(programs.judge_at(INGRESS, right, &reverse)), SPOOFED);
            assert_eq!(got(programs.judge_at(INGRESS, left, &there)), ALLOWED);
            let syn = packet(family, 6, true, true);
            assert_eq!(got(programs.judge_at(INGRESS, right, &syn)), SPOOFED);
            assert_eq!(entry(programs).arrived, [0, left]);
            // Nor do forged ends of the connection end anything.
            let before = entry(programs);
            for flags in [RST, RST | ACK, FIN, FIN | ACK] {
                let forged = tcp((a, 4000), (b, 8080), flags);
                assert_eq!(got(programs.judge_at(INGRESS, right, &forged)), SPOOFED);
            }
            assert_eq!(entry(programs), before, "not closing");
            // ICMP errors about the flow, as if from its other end.
            let quoted = packet(family, 6, false, false);
            let (kind, code) = if family == Family::V4 { (3, 1) } else { (1, 0) };
            let forged = icmp(a, b, &frame::icmp_error(kind, code, &quoted[14..]));
            assert_eq!(got(programs.judge_at(INGRESS, right, &forged)), SPOOFED);
            assert_eq!(got(programs.judge_at(INGRESS, left, &forged)), RELATED);
        }
    });
}

/// Three hosts around a gateway: what `c` forges in the name of `a` is denied at its interface,
/// although a flow of `a` with that very tuple is open.
#[test]
fn a_neighbour_cannot_ride_on_the_flow_of_another() {
    let net = Routed::new();
    let other = Netns::new("c");
    net.gateway.cable("gw-c", &other, "eth0");
    net.gateway
        .addresses("gw-c", &["10.3.0.1/24", "fd03::1/64"]);
    other.addresses("eth0", &["10.3.0.2/24", "fd03::2/64"]);
    other.ip("route add default via 10.3.0.1\nroute add default via fd03::1\n");
    // The enforcer's part, and not that of reverse path filters.
    for name in ["all", "gw-a", "gw-b", "gw-c"] {
        net.gateway
            .sysctl(&format!("ipv4/conf/{name}/rp_filter"), "0");
    }
    let policy = |bound: &str| {
        format!(
            r#"version: 1
segments:
  a: {{ members: [{{cidr: 10.1.0.0/24}}, {{cidr: "fd01::/64"}}]{bound} }}
  b: {{ members: [{{cidr: 10.2.0.0/24}}, {{cidr: "fd02::/64"}}] }}
  c: {{ members: [{{cidr: 10.3.0.0/24}}, {{cidr: "fd03::/64"}}] }}
rules:
  - {{ name: some, from: [a], to: [b], services: [udp/7000] }}
"#
        )
    };
    let daemon = Setup::new(&net.gateway, "gw-*", &policy(", interfaces: [gw-a]")).start();
    let tap = Tap::new(&net.b);
    let mut flows = Vec::new();
    for family in Family::BOTH {
        let (a, b) = ends(family);
        traffic::udp_echo(&net.b, (b, 7000));
        let socket = traffic::udp(&net.a, (a, 0), LONG);
        socket.connect((b, 7000)).unwrap();
        let talks = |socket: &std::net::UdpSocket| {
            socket.send(b"mine").unwrap();
            wait_for("the echo", LONG, || socket.recv(&mut [0; 8]).ok());
        };
        talks(&socket);
        let port = socket.local_addr().unwrap().port();
        let forged = forged(a, b, port, b"his!");
        let before = daemon.counted("tc_ingress", "denied", "spoofed");
        traffic::send_raw(&other, &forged);
        assert!(!tap.sees(b"his!", QUIET), "{family:?}");
        wait_for("the counter", LONG, || {
            (daemon.counted("tc_ingress", "denied", "spoofed") == before + 1).then_some(())
        });
        let denial = wait_for("the record", LONG, || {
            let denials = daemon.denials(&[]);
            let mut denials = denials.into_iter();
            denials.find(|d| d["reason"] == "spoofed" && d["src"] == a.to_string())
        });
        assert_eq!(denial["interface"], "gw-c");
        assert_eq!(denial["src_port"], port);
        // Neither forged answers from `b`'s port, which nothing binds, but which `a` alone gets.
        talks(&socket);
        flows.push((family, socket, port));
    }
    // Where nothing says where `a` is, the flow may move, and both ways in are known to it.
    daemon.swap(&policy(""));
    for (family, socket, port) in &flows {
        let (a, b) = ends(*family);
        traffic::send_raw(&other, &forged(a, b, *port, b"roam"));
        assert!(tap.sees(b"roam", LONG), "{family:?}");
        socket
            .set_read_timeout(Some(Duration::from_millis(20)))
            .unwrap();
        wait_for("the echo", LONG, || socket.recv(&mut [0; 8]).ok());
    }
}

/// A datagram that somebody else sends in the name of `a`.
fn forged(a: IpAddr, b: IpAddr, port: u16, data: &[u8; 4]) -> Vec<u8> {
    let mut datagram = frame::udp(port, 7000);
    datagram[8..].copy_from_slice(data);
    enforcer_tests::wire::checksummed(frame::ip(a, b, 17, &datagram))
}
