//! Gateways that translate addresses and route by policy: which tuple is judged at which hook.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{io::ErrorKind, net::IpAddr};

use enforcer_tests::{
    daemon::{LONG, Setup},
    netns::{Family, Netns, Routed},
    nft::{nft, translates},
    seen::{denied, moved},
    traffic::{self, QUIET},
    wire,
};
use serde_json::json;

/// Each hook of a flow: the opener's packet there, and the reply.
const OPENED_AND_ANSWERED: [(&str, &str, &str); 4] = [
    ("tc_ingress", "allowed", "rule_allow"),
    ("tc_egress", "allowed", "rule_allow"),
    ("tc_ingress", "allowed", "established"),
    ("tc_egress", "allowed", "established"),
];

const MASQUERADE: &str = r#"table inet nat {
  chain out { type nat hook postrouting priority 100; oifname "gw-b" masquerade; }
}
"#;

/// Guests behind the gateway's address; `b`, the outside, knows no way back to them.
fn guest_network() -> Option<Routed> {
    let net = Routed::new();
    if !translates(&net.gateway) {
        return None;
    }
    nft(&net.gateway, MASQUERADE);
    net.b
        .ip("route del default via 10.2.0.1\nroute del default via fd02::1\n");
    for host in [2, 3] {
        for family in Family::BOTH {
            traffic::udp_echo(&net.b, (family.address(2, host), 7000));
        }
    }
    traffic::tcp_echo(&net.b, 7000);
    Some(net)
}

/// The guests' right, and the gateway's own: what it translates carries its address.
fn guest_policy(translated: &str) -> String {
    format!(
        r#"version: 1
defaults: {{ unsegmented: deny }}
segments:
  guests: {{ members: [{{cidr: 10.1.0.0/24}}, {{cidr: "fd01::/64"}}] }}
  uplink: {{ members: [{{cidr: 10.2.0.1/32}}, {{cidr: "fd02::1/128"}}] }}
  clinic: {{ members: [{{cidr: 10.2.0.3/32}}, {{cidr: "fd02::3/128"}}] }}
rules:
  - {{ name: guests, from: [guests], to: [unsegmented], services: [tcp/7000, udp/7000-7005, ping] }}
  - {{ name: translated, from: [uplink], to: {translated}, services: [tcp/7000, udp/7000-7005, ping] }}
"#
    )
}

#[test]
fn a_masquerading_gateway_judges_guests_before_and_itself_after_translation() {
    let Some(net) = guest_network() else { return };
    let policy = guest_policy("[unsegmented, clinic]");
    let daemon = Setup::new(&net.gateway, "gw-*", &policy).start();
    for family in Family::BOTH {
        let (guest, server, clinic) = (
            family.address(1, 2),
            family.address(2, 2),
            family.address(2, 3),
        );
        assert!(traffic::udp_answers_soon(&net.a, (server, 7000)));
        let hooks = moved(&daemon, OPENED_AND_ANSWERED, || {
            assert!(wire::echoes_once(&net.a, (server, 7000).into()));
        });
        assert_eq!(hooks, [1; 4], "{family:?}");
        let mut stream = traffic::tcp(&net.a, (server, 7000));
        traffic::converse(&mut stream, b"through the gateway").unwrap();
        assert!(traffic::pings(&net.a, server, LONG));
        // It was translated, or nothing of this would have been answered.
        let outside = traffic::udp(&net.b, (server, 7001), LONG);
        let inside = traffic::udp(&net.a, (guest, 0), LONG);
        inside.send_to(b"who?", (server, 7001)).unwrap();
        let (_, from) = outside.recv_from(&mut [0; 8]).unwrap();
        assert_eq!(from.ip(), family.address(2, 1));

        // An error about the translated flow outside is one about the guest's flow inside.
        let related = moved(
            &daemon,
            [
                ("tc_ingress", "allowed", "related"),
                ("tc_egress", "allowed", "related"),
            ],
            || {
                inside.connect((server, 7005)).unwrap();
                inside.send(b"anybody?").unwrap();
                let error = inside.recv(&mut [0; 8]).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{family:?}");
            },
        );
        assert_eq!(related, [1, 1], "{family:?}");

        // The gateway may speak to the clinic, and would speak for the guest.
        assert!(traffic::udp_answers_soon(&net.gateway, (clinic, 7000)));
        let hooks = moved(
            &daemon,
            [
                ("tc_ingress", "denied", ""),
                ("tc_egress", "", "rule_allow"),
            ],
            || assert!(!traffic::udp_answers(&net.a, None, (clinic, 7000))),
        );
        assert_eq!(hooks, [1, 0], "{family:?}");
        denied(
            &daemon,
            &json!({
                "direction": "ingress", "interface": "gw-a", "reason": "default_deny",
                "src": guest.to_string(), "dst": clinic.to_string(), "dst_port": 7000,
                "from_segments": ["guests"], "to_segments": ["clinic"],
            }),
        );
    }

    // Without a right of its own the gateway lets nothing out that it translates.
    daemon.swap(&guest_policy("[clinic]"));
    for family in Family::BOTH {
        let server = family.address(2, 2);
        let hooks = moved(
            &daemon,
            [
                ("tc_ingress", "", "rule_allow"),
                ("tc_egress", "denied", ""),
            ],
            || assert!(!traffic::udp_answers(&net.a, None, (server, 7000))),
        );
        assert_eq!(hooks, [1, 1], "{family:?}");
        denied(
            &daemon,
            &json!({
                "direction": "egress", "interface": "gw-b", "reason": "default_deny",
                "src": family.address(2, 1).to_string(), "dst": server.to_string(),
                "from_segments": ["uplink"],
            }),
        );
    }
}

/// A limit, pinned: enforcing the uplink alone, guests are the gateway.
#[test]
fn behind_a_masquerading_gateway_guests_are_seen_at_their_own_interface_only() {
    let Some(net) = guest_network() else { return };
    let policy = guest_policy("[unsegmented, clinic]");
    let _daemon = Setup::new(&net.gateway, "gw-b", &policy).start();
    for family in Family::BOTH {
        let clinic = family.address(2, 3);
        assert!(traffic::udp_answers_soon(&net.a, (clinic, 7000)));
    }
}

const DNAT: &str = r#"table inet nat {
  chain in {
    type nat hook prerouting priority -100;
    ip daddr 10.1.0.1 meta l4proto { tcp, udp } th dport 80 dnat ip to 10.2.0.2:8080
    ip6 daddr fd01::1 meta l4proto { tcp, udp } th dport 80 dnat ip6 to [fd02::2]:8080
  }
}
"#;

fn published(rules: &str) -> String {
    format!(
        r#"version: 1
defaults: {{ unsegmented: deny }}
segments:
  clients: {{ members: [{{cidr: 10.1.0.2/32}}, {{cidr: "fd01::2/128"}}] }}
  address: {{ members: [{{cidr: 10.1.0.1/32}}, {{cidr: "fd01::1/128"}}] }}
  server: {{ members: [{{cidr: 10.2.0.2/32}}, {{cidr: "fd02::2/128"}}] }}
rules:
{rules}"#
    )
}

const BEFORE: &str =
    "  - { name: before, from: [clients], to: [address], services: [tcp/80, udp/80] }\n";
const AFTER: &str =
    "  - { name: after, from: [clients], to: [server], services: [tcp/8080, udp/8080] }\n";

#[test]
fn a_published_server_is_judged_by_its_address_before_and_after_translation() {
    let net = Routed::new();
    if !translates(&net.gateway) {
        return;
    }
    nft(&net.gateway, DNAT);
    traffic::tcp_echo(&net.b, 8080);
    for family in Family::BOTH {
        traffic::udp_echo(&net.b, (family.address(2, 2), 8080));
    }
    let both = published(&(BEFORE.to_owned() + AFTER));
    let daemon = Setup::new(&net.gateway, "gw-*", &both).start();
    for family in Family::BOTH {
        let public = family.address(1, 1);
        assert!(traffic::udp_answers_soon(&net.a, (public, 80)));
        let hooks = moved(&daemon, OPENED_AND_ANSWERED, || {
            assert!(wire::echoes_once(&net.a, (public, 80).into()));
        });
        assert_eq!(hooks, [1; 4], "{family:?}");
        let mut stream = traffic::tcp(&net.a, (public, 80));
        traffic::converse(&mut stream, b"as published").unwrap();
    }
    let refused = |direction: &str, interface: &str, to: IpAddr, port: u16| {
        assert!(!traffic::tcp_connects(
            &net.a,
            (family_of(to).address(1, 1), 80),
            QUIET
        ));
        denied(
            &daemon,
            &json!({
                "direction": direction, "interface": interface, "reason": "default_deny",
                "src": family_of(to).address(1, 2).to_string(),
                "dst": to.to_string(), "dst_port": port, "tcp_flags": "SYN",
            }),
        );
    };
    daemon.swap(&published(BEFORE));
    for family in Family::BOTH {
        refused("egress", "gw-b", family.address(2, 2), 8080);
    }
    daemon.swap(&published(AFTER));
    for family in Family::BOTH {
        refused("ingress", "gw-a", family.address(1, 1), 80);
        // What the second hook needs is a right, and so it is one to go there without translation.
        let mut stream = traffic::tcp(&net.a, (family.address(2, 2), 8080));
        traffic::converse(&mut stream, b"directly").unwrap();
    }
}

fn family_of(ip: IpAddr) -> Family {
    if ip.is_ipv4() { Family::V4 } else { Family::V6 }
}

const HAIRPIN: &str = r#"table inet nat {
  chain in {
    type nat hook prerouting priority -100;
    ip daddr 203.0.113.1 meta l4proto { tcp, udp } th dport 80 dnat ip to 10.1.0.3:8080
    ip6 daddr 2001:db8::1 meta l4proto { tcp, udp } th dport 80 dnat ip6 to [fd01::3]:8080
  }
  chain out {
    type nat hook postrouting priority 100;
    ip saddr 10.1.0.0/24 ip daddr 10.1.0.3 masquerade
    ip6 saddr fd01::/64 ip6 daddr fd01::3 masquerade
  }
}
"#;

fn hairpin_policy(to: &str) -> String {
    format!(
        r#"version: 1
defaults: {{ unsegmented: deny }}
segments:
  clients: {{ members: [{{cidr: 10.1.0.2/32}}, {{cidr: "fd01::2/128"}}] }}
  server: {{ members: [{{cidr: 10.1.0.3/32}}, {{cidr: "fd01::3/128"}}] }}
  public: {{ members: [{{cidr: 203.0.113.1/32}}, {{cidr: "2001:db8::1/128"}}] }}
rules:
  - {{ name: to-public, from: [clients], to: [public], services: [tcp/80, udp/80] }}
  - {{ name: to-server, from: [host], to: [{to}], services: [tcp/8080, udp/8080] }}
"#
    )
}

/// Client and server share a segment, behind one interface of the gateway.
#[test]
fn a_server_reached_by_its_public_address_from_its_own_segment() {
    let (gateway, switch) = (Netns::new("gw"), Netns::new("sw"));
    let (client, server) = (Netns::new("client"), Netns::new("server"));
    if !translates(&gateway) {
        return;
    }
    gateway.sysctl("ipv4/ip_forward", "1");
    gateway.sysctl("ipv6/conf/all/forwarding", "1");
    gateway.sysctl("ipv4/conf/all/send_redirects", "0");
    gateway.sysctl("ipv4/conf/default/send_redirects", "0");
    switch.ip("link add br0 type bridge\nlink set br0 up\n");
    for (host, interface, port, number) in [
        (&gateway, "gw-a", "p-gw", 1),
        (&client, "eth0", "p-client", 2),
        (&server, "eth0", "p-server", 3),
    ] {
        host.cable(interface, &switch, port);
        switch.ip(&format!("link set {port} master br0\n"));
        let [v4, v6] = [format!("10.1.0.{number}/24"), format!("fd01::{number}/64")];
        host.addresses(interface, &[&v4, &v6]);
    }
    gateway.addresses("lo", &["203.0.113.1/32", "2001:db8::1/128"]);
    client.ip("route add default via 10.1.0.1\nroute add default via fd01::1\n");
    nft(&gateway, HAIRPIN);
    traffic::tcp_echo(&server, 8080);
    for family in Family::BOTH {
        traffic::udp_echo(&server, (family.address(1, 3), 8080));
    }
    let daemon = Setup::new(&gateway, "gw-a", &hairpin_policy("server")).start();
    let publics: [IpAddr; 2] = [
        "203.0.113.1".parse().unwrap(),
        "2001:db8::1".parse().unwrap(),
    ];
    for public in publics {
        assert!(traffic::udp_answers_soon(&client, (public, 80)));
        let hooks = moved(&daemon, OPENED_AND_ANSWERED, || {
            assert!(wire::echoes_once(&client, (public, 80).into()));
        });
        assert_eq!(hooks, [1; 4], "{public}");
        let mut stream = traffic::tcp(&client, (public, 80));
        traffic::converse(&mut stream, b"out and in again").unwrap();
    }
    daemon.swap(&hairpin_policy("clients"));
    for public in publics {
        let family = family_of(public);
        assert!(!traffic::tcp_connects(&client, (public, 80), QUIET));
        denied(
            &daemon,
            &json!({
                "direction": "egress", "interface": "gw-a", "reason": "default_deny",
                "src": family.address(1, 1).to_string(),
                "dst": family.address(1, 3).to_string(), "dst_port": 8080,
            }),
        );
    }
}

const ASYMMETRIC: &str = r#"version: 1
defaults: { unsegmented: deny }
segments:
  a: { members: [{cidr: 10.1.0.2/32}, {cidr: "fd01::2/128"}] }
  b: { members: [{cidr: 10.2.0.0/24}, {cidr: "fd02::/64"}] }
rules:
  - { name: some, from: [a], to: [b], services: [tcp/7000, udp/7000, ping] }
"#;

/// Requests go in by `gw-a` and out by `gw-b`; what `b` sends comes in by `gw-c`.
#[test]
fn flows_whose_replies_take_another_way() {
    let net = Routed::new();
    for end in [&net.gateway, &net.b] {
        end.sysctl("ipv4/conf/all/rp_filter", "0");
        end.sysctl("ipv4/conf/default/rp_filter", "0");
    }
    net.gateway.sysctl("ipv4/conf/gw-b/rp_filter", "0");
    net.gateway.cable("gw-c", &net.b, "eth1");
    net.gateway
        .addresses("gw-c", &["10.3.0.1/24", "fd03::1/64"]);
    net.b.addresses("eth1", &["10.3.0.2/24", "fd03::2/64"]);
    net.b.ip("rule add from 10.2.0.0/24 lookup 100\n\
         route add default via 10.3.0.1 dev eth1 table 100\n\
         route add default via fd03::1 dev eth1 table 100\n");
    let rule = ["-6", "rule", "add", "from", "fd02::/64", "lookup", "100"];
    net.b.ask("ip", &rule).unwrap();
    traffic::tcp_echo(&net.b, 7000);
    traffic::tcp_echo(&net.a, 7000);
    for family in Family::BOTH {
        traffic::udp_echo(&net.b, (family.address(2, 2), 7000));
    }
    let daemon = Setup::new(&net.gateway, "gw-*", ASYMMETRIC).start();
    let received = |interface: &str| -> u64 {
        let shown = net.gateway.ask("ip", &["-s", "link", "show", interface]);
        let shown = shown.unwrap();
        let mut lines = shown.lines().skip_while(|line| !line.contains("RX:"));
        let numbers = lines.nth(1).unwrap();
        numbers.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    for family in Family::BOTH {
        let to = family.address(2, 2);
        assert!(traffic::udp_answers_soon(&net.a, (to, 7000)));
        let before = received("gw-c");
        let counted = [
            ("tc_ingress", "allowed", "rule_allow"),
            ("tc_ingress", "allowed", "established"),
            ("tc_egress", "allowed", "established"),
        ];
        let hooks = moved(&daemon, counted, || {
            assert!(wire::echoes_once(&net.a, (to, 7000).into()));
        });
        // Nothing is translated: the flow that ingress admits is there at egress.
        assert_eq!(hooks, [1, 1, 2], "{family:?}");
        assert!(received("gw-c") > before, "{family:?}: the other way");
        let mut stream = traffic::tcp(&net.a, (to, 7000));
        traffic::converse(&mut stream, b"there and back").unwrap();
        assert!(traffic::pings(&net.a, to, LONG));
        // Opening from the other end is denied at the interface where it comes in.
        let from = traffic::udp(&net.b, (to, 0), QUIET);
        from.send_to(b"open", (family.address(1, 2), 7000)).unwrap();
        denied(
            &daemon,
            &json!({
                "direction": "ingress", "interface": "gw-c", "reason": "default_deny",
                "src": to.to_string(), "protocol": "udp",
                "src_port": from.local_addr().unwrap().port(),
            }),
        );
    }
}
