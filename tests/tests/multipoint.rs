//! Tunnel devices that find the outer address per neighbour: their packets carry the outer header
//! where others have none.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::net::{IpAddr, Ipv4Addr};

use enforcer_tests::{daemon::Setup, netns::Pair, seen::skipped, traffic};

const INNER_HOST: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 9, 0, 1));
const INNER_PEER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 9, 0, 2));

const POLICY: &str = r#"version: 1
segments:
  ends: { members: [{cidr: 10.1.0.0/24}] }
  inside: { members: [{cidr: 10.9.0.0/24}] }
rules:
  - { name: outer, from: [ends], to: [ends], services: [proto/gre] }
  - { name: inner, from: [inside], to: [inside], services: [udp/7000] }
"#;

#[test]
fn multipoint_gre_is_judged_inside() {
    let net = Pair::new();
    let ends = [
        (&net.host, "10.1.0.1", INNER_HOST, "10.1.0.2", INNER_PEER),
        (&net.peer, "10.1.0.2", INNER_PEER, "10.1.0.1", INNER_HOST),
    ];
    for (end, local, inner, remote, other) in ends {
        let words = [
            "link", "add", "inner", "type", "gre", "local", local, "ttl", "64",
        ];
        if let Err(complaint) = end.ask("ip", &words) {
            skipped(&format!("no gre in this kernel: {complaint}"));
            return;
        }
        end.addresses("inner", &[&format!("{inner}/24")]);
        end.ip(&format!(
            "link set inner up\nneigh replace {other} lladdr {remote} dev inner nud permanent\n"
        ));
    }
    for end in [&net.host, &net.peer] {
        for port in [7000, 7001] {
            traffic::udp_echo(end, traffic::any(port));
        }
    }
    assert!(traffic::udp_answers_soon(&net.host, (INNER_PEER, 7001)));
    let _daemon = Setup::new(&net.host, "eth0,inner", POLICY)
        .with(&["--socket-hooks", "off"])
        .start();
    let answers = |from, to, port| traffic::udp_answers(from, None, (to, port));
    assert!(!answers(&net.host, INNER_PEER, 7001), "out, denied");
    assert!(!answers(&net.peer, INNER_HOST, 7001), "in, denied");
    assert!(answers(&net.host, INNER_PEER, 7000), "out, allowed");
    assert!(answers(&net.peer, INNER_HOST, 7000), "in, allowed");
}
