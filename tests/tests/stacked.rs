//! Devices on top of an enforced one.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use enforcer_tests::{
    daemon::Setup,
    netns::{Family, Netns, Pair},
    seen::{denied, moved, skipped},
    traffic,
};
use serde_json::json;

const POLICY: &str = r#"version: 1
segments:
  peer: { members: [{cidr: 10.1.0.2/32}, {cidr: "fd01::2/128"}] }
  inside: { members: [{cidr: 10.1.0.11/32}, {cidr: 10.1.0.12/32}, {cidr: "fd01::b/128"}, {cidr: "fd01::c/128"}] }
rules:
  - { name: out, from: [inside], to: [peer], services: [udp/7000] }
  - { name: in, from: [peer], to: [inside], services: [udp/7000] }
"#;

/// Containers on macvlan devices: what they say to the wire, and what they say to each other, is
/// judged on the device below.
#[test]
fn macvlan_on_an_enforced_interface() {
    let net = Pair::new();
    let inside = [Netns::new("one"), Netns::new("two")];
    for (at, container) in (11..).zip(&inside) {
        let made = format!("link add link eth0 name up{at} type macvlan mode bridge");
        let made = made.split(' ').collect::<Vec<_>>();
        if let Err(complaint) = net.host.ask("ip", &made) {
            skipped(&format!("no macvlan in this kernel: {complaint}"));
            return;
        }
        net.host.hand_over(&format!("up{at}"), container);
        container.ip(&format!("link set up{at} up\n"));
        let [v4, v6] = [4, 6].map(|version| {
            let family = if version == 4 { Family::V4 } else { Family::V6 };
            let length = if version == 4 { 24 } else { 64 };
            format!("{}/{length}", family.address(1, at))
        });
        container.addresses(&format!("up{at}"), &[&v4, &v6]);
    }
    for end in [&net.peer, &inside[0], &inside[1]] {
        for port in [7000, 7001] {
            traffic::udp_echo(end, traffic::any(port));
        }
    }
    let counted = [("tc_egress", "denied", ""), ("tc_ingress", "denied", "")];
    let daemon = Setup::new(&net.host, "eth0", POLICY).start();
    for family in Family::BOTH {
        let [peer, one, two] = [2, 11, 12].map(|number| family.address(1, number));
        assert!(traffic::udp_answers_soon(&inside[0], (peer, 7000)));
        assert!(traffic::udp_answers_soon(&net.peer, (one, 7000)));
        let counts = moved(&daemon, counted, || {
            assert!(!traffic::udp_answers(&inside[0], None, (peer, 7001)));
            assert!(!traffic::udp_answers(&net.peer, None, (one, 7001)));
        });
        assert_eq!(counts, [1, 1], "{family:?}");
        for (direction, src, dst) in [("egress", one, peer), ("ingress", peer, one)] {
            denied(
                &daemon,
                &json!({
                    "direction": direction, "interface": "eth0", "reason": "default_deny",
                    "src": src.to_string(), "dst": dst.to_string(), "dst_port": 7001,
                }),
            );
        }
        // Linux hands it to the device below as if it came from the wire.
        let counts = moved(&daemon, counted, || {
            assert!(!traffic::udp_answers(&inside[0], None, (two, 7001)));
        });
        assert_eq!(counts, [0, 1], "{family:?}");
        denied(
            &daemon,
            &json!({
                "direction": "ingress", "interface": "eth0", "reason": "default_deny",
                "src": one.to_string(), "dst": two.to_string(), "dst_port": 7001,
            }),
        );
    }
}
