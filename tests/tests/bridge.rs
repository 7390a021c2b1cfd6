//! A Linux bridge between two segments, enforced on its ports.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use enforcer_tests::{
    daemon::{Daemon, LONG, Setup, wait_for},
    netns::{Family, Netns},
    seen::{denied, moved},
    traffic::{self, QUIET, Tap},
    wire::{self, Packets},
};
use serde_json::json;

const POLICY: &str = r#"version: 1
segments:
  a: { members: [{cidr: 10.1.0.2/32}, {cidr: "fd01::2/128"}] }
  b: { members: [{cidr: 10.1.0.3/32}, {cidr: "fd01::3/128"}] }
rules:
  - { name: some, from: [a], to: [b], services: [tcp/7000, udp/7000] }
"#;

/// ```text
/// a (eth0 10.1.0.2, fd01::2) ── p-a bridge p-b ── b (eth0 10.1.0.3, fd01::3)
/// ```
struct Bridged {
    bridge: Netns,
    a: Netns,
    b: Netns,
}

impl Bridged {
    fn new() -> Self {
        let net = Self {
            bridge: Netns::new("br"),
            a: Netns::new("a"),
            b: Netns::new("b"),
        };
        // The bridge itself has no addresses, and says nothing of its own.
        net.bridge.sysctl("ipv6/conf/default/disable_ipv6", "1");
        net.bridge
            .ip("link add br0 type bridge mcast_snooping 0\nlink set br0 up\n");
        for (host, port, number) in [(&net.a, "p-a", 2), (&net.b, "p-b", 3)] {
            net.bridge.cable(port, host, "eth0");
            net.bridge.ip(&format!("link set {port} master br0\n"));
            let [v4, v6] = [format!("10.1.0.{number}/24"), format!("fd01::{number}/64")];
            host.addresses("eth0", &[&v4, &v6]);
        }
        net
    }
}

/// One daemon for all that only looks at packets.
#[test]
fn a_bridge_enforced_on_its_ports() {
    let net = Bridged::new();
    let daemon = Setup::new(&net.bridge, "p-*", POLICY).start();
    what_a_rule_allows_crosses_and_nothing_else(&net, &daemon);
    neighbours_find_each_other(&net, &daemon);
    link_control_frames(&net, &daemon);
    a_broadcast_frame_with_a_unicast_packet_is_judged_as_one(&net, &daemon);
}

fn what_a_rule_allows_crosses_and_nothing_else(net: &Bridged, daemon: &Daemon<'_>) {
    for end in [&net.a, &net.b] {
        traffic::tcp_echo(end, 7000);
        traffic::udp_echo(end, traffic::any(7000));
        traffic::udp_echo(end, traffic::any(7001));
    }
    for family in Family::BOTH {
        let (a, b) = (family.address(1, 2), family.address(1, 3));
        assert!(traffic::udp_answers_soon(&net.a, (b, 7000)));
        let hooks = moved(
            daemon,
            [
                ("tc_ingress", "allowed", "rule_allow"),
                ("tc_egress", "allowed", "established"),
                ("tc_ingress", "allowed", "established"),
                ("", "denied", ""),
            ],
            || assert!(wire::echoes_once(&net.a, (b, 7000).into())),
        );
        // Both hooks see one tuple: the flow that ingress admits is there at egress.
        assert_eq!(hooks, [1, 2, 1, 0], "{family:?}");
        let mut stream = traffic::tcp(&net.a, (b, 7000));
        traffic::converse(&mut stream, b"across").unwrap();
        assert!(!traffic::udp_answers(&net.a, None, (b, 7001)), "{family:?}");
        assert!(!traffic::udp_answers(&net.b, None, (a, 7000)), "{family:?}");
        assert!(!traffic::tcp_connects(&net.b, (a, 7000), QUIET));
        assert!(!traffic::pings(&net.a, b, QUIET));
        for (interface, src, dst, port) in [("p-a", a, b, 7001), ("p-b", b, a, 7000)] {
            denied(
                daemon,
                &json!({
                    "direction": "ingress", "interface": interface, "protocol": "udp",
                    "reason": "default_deny", "dst_port": port,
                    "src": src.to_string(), "dst": dst.to_string(),
                }),
            );
        }
    }
}

fn neighbours_find_each_other(net: &Bridged, daemon: &Daemon<'_>) {
    let essentials = moved(
        daemon,
        [
            ("tc_ingress", "allowed", "essential"),
            ("tc_egress", "allowed", "essential"),
        ],
        || {
            for (from, to) in [(&net.a, 3), (&net.b, 2)] {
                from.ip("neigh flush dev eth0\n");
                for family in Family::BOTH {
                    let to = family.address(1, to);
                    // No rule lets this answer; finding the neighbour comes before.
                    assert!(!traffic::udp_answers(from, None, (to, 7001)));
                    wait_for("the neighbour", LONG, || {
                        let shown = from.ask("ip", &["neigh", "show", &to.to_string()]);
                        shown.unwrap().contains("lladdr").then_some(())
                    });
                }
            }
        },
    );
    // A question and an answer, twice for each family, at each hook.
    assert!(essentials.iter().all(|n| *n >= 8), "{essentials:?}");
}

fn link_control_frames(net: &Bridged, daemon: &Daemon<'_>) {
    let wire = Packets::new(&net.a, "eth0", false);
    let tap = Tap::new(&net.b);
    let mut bpdu = vec![1, 0x80, 0xc2, 0, 0, 0];
    bpdu.extend(wire::link_address(&net.a, "eth0"));
    bpdu.extend([0, 38, 0x42, 0x42, 3]);
    // A configuration message (IEEE 802.1D), which the bridge, not taking part, passes on.
    bpdu.extend([0; 35]);
    bpdu.extend([0; 8]);
    wire.send(&bpdu);
    assert!(tap.sees(&bpdu[14..], LONG), "spanning tree");
    // The same words to somebody else are no spanning tree.
    let mut llc = bpdu.clone();
    llc[..6].copy_from_slice(&wire::link_address(&net.b, "eth0"));
    llc[20..].fill(0x5a);
    let counted = [("tc_ingress", "denied", "ethertype")];
    let dropped = moved(daemon, counted, || {
        wire.send(&llc);
        assert!(!tap.sees(&llc[14..], QUIET));
    });
    assert_eq!(dropped, [1]);
}

fn a_broadcast_frame_with_a_unicast_packet_is_judged_as_one(net: &Bridged, daemon: &Daemon<'_>) {
    let wire = Packets::new(&net.a, "eth0", false);
    let source = wire::link_address(&net.a, "eth0");
    for family in Family::BOTH {
        let (a, b) = (family.address(1, 2), family.address(1, 3));
        let [allowed, other] = [7000, 7002].map(|port| {
            let packet = wire::udp((a, 5000), (b, port), b"to all of you");
            wire::ethernet(source, [0xff; 6], &packet)
        });
        let tap = Tap::new(&net.b);
        wire.send(&allowed);
        assert!(tap.sees(&allowed[14..], LONG), "{family:?}: the control");
        wire.send(&other);
        assert!(!tap.sees(&other[14..], QUIET), "{family:?}");
        denied(
            daemon,
            &json!({
                "direction": "ingress", "interface": "p-a", "reason": "default_deny",
                "src": a.to_string(), "src_port": 5000, "dst_port": 7002,
            }),
        );
        // A host that enforces nothing delivers such a packet: it is no empty threat.
        let receiver = traffic::udp(&net.b, (b, 7003), LONG);
        let bare = Packets::new(&net.bridge, "p-b", true);
        let packet = wire::udp((a, 5000), (b, 7003), b"delivered");
        bare.send(&wire::ethernet(source, [0xff; 6], &packet));
        assert_eq!(receiver.recv(&mut [0; 16]).unwrap(), 9, "{family:?}");
    }
}
