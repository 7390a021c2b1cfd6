//! Policies as people write them: infrastructure by rules, an address that moves, a great many
//! ports and prefixes, names that look alike.

use std::{fmt::Write as _, net::IpAddr};

use enforcer_tests::{
    daemon::{Daemon, LONG, Setup},
    frame,
    netns::{Family, Pair},
    seen::moved,
    traffic::{self, QUIET},
};
use serde_json::Value;

use crate::lab::{Lab, NOTHING, packet};

fn explain(daemon: &Daemon<'_>, from: &str, to: &str, service: &str) -> Value {
    let arguments = [
        "--from",
        from,
        "--to",
        to,
        "--service",
        service,
        "-o",
        "json",
    ];
    let output = daemon.ask("explain", &arguments);
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn names_time_and_probes_need_rules_and_explain_shows_them() {
    let lab = Lab::new();
    let policy = r#"version: 1
segments:
  here: { members: [{cidr: 10.1.0.0/24}, {cidr: "fd01::/64"}] }
  infrastructure: { members: [{cidr: 10.1.0.2/32}, {cidr: "fd01::2/128"}] }
rules:
  - { name: resolvers, from: [host], to: [infrastructure], services: [dns] }
  - { name: clocks, from: [host], to: [infrastructure], services: [ntp] }
  - { name: probes, from: [infrastructure], to: [host], services: [tcp/10256] }
"#;
    for port in [53, 123, 5353] {
        traffic::udp_echo(&lab.net.peer, traffic::any(port));
    }
    traffic::tcp_echo(&lab.net.peer, 53);
    traffic::tcp_echo(&lab.net.peer, 123);
    traffic::tcp_echo(&lab.net.host, 10256);
    let daemon = Setup::new(&lab.net.host, "eth0", policy)
        .with(&["--socket-hooks", "off"])
        .start();
    for family in Family::BOTH {
        let (host, peer) = (family.address(1, 1), family.address(1, 2));
        let asks = |from: IpAddr, to: IpAddr, service: &str| {
            let said = explain(&daemon, &from.to_string(), &to.to_string(), service);
            (said["verdict"].clone(), said["rule"].clone())
        };
        for (port, rule) in [(53, "resolvers"), (123, "clocks")] {
            assert!(traffic::udp_answers_soon(&lab.net.host, (peer, port)));
            let expected = ("ALLOWED".into(), rule.into());
            assert_eq!(asks(host, peer, &format!("udp/{port}")), expected);
            let back = asks(peer, host, &format!("udp/{port}"));
            assert_eq!(back, ("DENIED".into(), Value::Null));
        }
        assert!(traffic::tcp_connects(&lab.net.host, (peer, 53), LONG));
        assert!(traffic::tcp_connects(&lab.net.peer, (host, 10256), LONG));
        let expected = ("ALLOWED".into(), "probes".into());
        assert_eq!(asks(peer, host, "tcp/10256"), expected);
        assert!(!traffic::tcp_connects(&lab.net.host, (peer, 123), QUIET));
        assert!(!traffic::udp_answers(&lab.net.host, None, (peer, 5353)));
        assert_eq!(asks(host, peer, "tcp/123").0, "DENIED");
        assert_eq!(asks(host, peer, "udp/5353").0, "DENIED");
    }
}

/// `old` and `new` are numbers of addresses; the segment `clients` has the former.
fn moving(clients: u8, guests: u8) -> String {
    format!(
        r#"version: 1
segments:
  clients: {{ members: [{{cidr: 10.1.0.{clients}/32}}, {{cidr: "fd01::{clients}/128"}}] }}
  guests: {{ members: [{{cidr: 10.1.0.{guests}/32}}, {{cidr: "fd01::{guests}/128"}}] }}
  server: {{ members: [{{cidr: 10.1.0.1/32}}, {{cidr: "fd01::1/128"}}] }}
rules:
  - {{ name: work, from: [clients], to: [server], services: [tcp/7000, udp/7000] }}
  - {{ name: surf, from: [guests], to: [server], services: [tcp/7001, udp/7001] }}
"#
    )
}

#[test]
fn an_address_that_moves_to_another_segment_loses_the_old_rights_at_once() {
    let lab = Lab::new();
    lab.net
        .peer
        .addresses("eth0", &["10.1.0.3/24", "fd01::3/64"]);
    for port in [7000, 7001] {
        traffic::tcp_echo(&lab.net.host, port);
    }
    let daemon = Setup::new(&lab.net.host, "eth0", &moving(2, 3))
        .with(&["--socket-hooks", "off"])
        .start();
    let udp = |from: u8, port: u16| {
        [false, true].map(|v6| packet(v6, from, 1, 17, &frame::udp(43_000, port)))
    };
    let mut sessions = ["10.1.0.1", "fd01::1"].map(|to| {
        let to: IpAddr = to.parse().unwrap();
        // From `.2`, which the route to an IPv6 neighbour may not choose by itself.
        let from = if to.is_ipv4() { "10.1.0.2" } else { "fd01::2" };
        connected(&lab, from.parse().unwrap(), (to, 7000).into())
    });
    for session in &mut sessions {
        traffic::converse(session, b"before").unwrap();
    }
    lab.all(&daemon, &udp(2, 7000), "allowed", "rule_allow");
    lab.all(&daemon, &udp(3, 7000), "denied", "default_deny");

    // The two change places.
    daemon.swap(&moving(3, 2));
    lab.all(&daemon, &udp(2, 7000), "denied", "revoked");
    lab.all(&daemon, &udp(3, 7000), "allowed", "rule_allow");
    lab.all(&daemon, &udp(2, 7001), "allowed", "rule_allow");
    let syn = [false, true].map(|v6| packet(v6, 2, 1, 6, &frame::tcp(43_001, 7000, frame::SYN)));
    lab.all(&daemon, &syn, "denied", "default_deny");
    for session in &mut sessions {
        session.set_read_timeout(Some(QUIET)).unwrap();
        let [revoked] = moved(&daemon, [("tc_ingress", "denied", "revoked")], || {
            assert!(traffic::converse(session, b"after").is_err());
        });
        assert!(revoked >= 1);
    }
    // Taken out altogether, it has none. (The sessions still try.)
    daemon.swap(&moving(3, 9));
    for packet in udp(2, 7001) {
        lab.send(&packet);
        assert!(!lab.gets(false, &packet, QUIET));
    }
    let left = daemon.denials(&["--last", "100"]);
    let left = left.iter().filter(|denial| denial["dst_port"] == 7001);
    assert!(left.clone().count() >= 2 && left.clone().all(|d| d["reason"] == "revoked"));
}

fn connected(lab: &Lab, from: IpAddr, to: std::net::SocketAddr) -> std::net::TcpStream {
    use nix::sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, socket,
    };
    use std::os::fd::AsRawFd as _;
    lab.net.peer.enter(|| {
        let family = if to.is_ipv4() {
            AddressFamily::Inet
        } else {
            AddressFamily::Inet6
        };
        let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        let own = SockaddrStorage::from(std::net::SocketAddr::new(from, 0));
        bind(socket.as_raw_fd(), &own).unwrap();
        connect(socket.as_raw_fd(), &SockaddrStorage::from(to)).unwrap();
        let stream = std::net::TcpStream::from(socket);
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream
    })
}

/// 2 000 ports that are no range.
fn many_ports() -> String {
    let mut ports = String::from("tcp/3");
    for port in 1..2000 {
        write!(ports, ", tcp/{}", 3 + 2 * port).unwrap();
    }
    format!(
        "{NOTHING}  peer: {{ members: [{{cidr: 10.1.0.2/32}}] }}\n\
         rules:\n  - {{ name: many, from: [peer], to: [host], services: [{ports}] }}\n"
    )
}

/// 50 000 prefixes, of which none touches another, with the peer's.
fn many_prefixes() -> String {
    let mut members = String::from("{cidr: 10.1.0.2/32}");
    for number in 0..50_000u32 {
        let (a, b) = (number >> 7, (number & 127) * 2);
        write!(members, ", {{cidr: 20.{}.{}.{b}/32}}", a >> 8, a & 255).unwrap();
    }
    format!(
        "{NOTHING}  many: {{ members: [{members}] }}\n\
         rules:\n  - {{ name: some, from: [many], to: [host], services: [tcp/7000] }}\n"
    )
}

#[test]
fn two_thousand_ports_of_one_prefix_are_judged_each() {
    let lab = Lab::new();
    let daemon = Setup::new(&lab.net.host, "eth0", NOTHING)
        .with(&["--socket-hooks", "off"])
        .start();
    daemon.swap(&many_ports());
    let syn = |port: u16| packet(false, 2, 1, 6, &frame::tcp(44_000, port, frame::SYN));
    let each = |from: u16| -> Vec<_> { (0..2000).map(|n| syn(from + 2 * n)).collect() };
    let counters = [
        ("tc_ingress", "allowed", "rule_allow"),
        ("tc_ingress", "denied", "default_deny"),
    ];
    for (from, expected) in [(3, [2000, 0]), (2, [0, 2000])] {
        let counted = moved(&daemon, counters, || {
            for packet in each(from) {
                lab.send(&packet);
            }
        });
        assert_eq!(counted, expected);
    }
    lab.all(&daemon, &[syn(1), syn(4003)], "denied", "default_deny");
}

/// As many, each in a block of 65 536 addresses of its own, at a place of its own: no two blocks
/// share a table.
fn scattered_prefixes() -> String {
    let mut members = String::from("{cidr: 10.1.0.2/32}");
    for number in 0..50_000u32 {
        let (a, b) = (11 + (number >> 8), number & 255);
        // 32 768 places for two addresses, then 16 384 for four, then those for eight.
        let (length, place) = match number {
            0..32_768 => (31, number << 1),
            32_768..49_152 => (30, (number - 32_768) << 2),
            _ => (29, (number - 49_152) << 3),
        };
        write!(
            members,
            ", {{cidr: {a}.{b}.{}.{}/{length}}}",
            place >> 8,
            place & 255
        )
        .unwrap();
    }
    format!(
        "{NOTHING}  many: {{ members: [{members}] }}\n\
         rules:\n  - {{ name: some, from: [many], to: [host], services: [tcp/7000] }}\n"
    )
}

/// Segments of one host each, no two of which are guarded alike: 36 million pairs.
fn strangers() -> String {
    let mut text = "version: 1\nsegments:\n".to_owned();
    for number in 0..6000u32 {
        let (a, b) = (number >> 8, number & 255);
        writeln!(
            text,
            "  s{number}: {{ members: [{{cidr: 10.9.{a}.{b}/32}}] }}"
        )
        .unwrap();
    }
    text
}

#[test]
fn fifty_thousand_prefixes_are_in_force_as_a_whole_or_refused_with_numbers() {
    let net = Pair::new();
    traffic::udp_echo(&net.host, traffic::any(7000));
    traffic::tcp_echo(&net.host, 7000);
    let small = format!(
        "{NOTHING}  peer: {{ members: [{{cidr: 10.1.0.2/32}}] }}\n\
         rules:\n  - {{ name: echo, from: [peer], to: [host], services: [udp/7000] }}\n"
    );
    let to = (Family::V4.address(1, 1), 7000);
    let daemon = Setup::new(&net.host, "eth0", &small).start();
    assert!(traffic::udp_answers_soon(&net.peer, to));

    // Too much for any image: nothing has happened, and the message says how much is how far too much.
    daemon.setup.write(&strangers());
    let (code, answer) = daemon.reload();
    assert_eq!(code, 422, "{answer}");
    let said = answer["error"].as_str().unwrap();
    let numbers = said.split(|c: char| !c.is_ascii_digit());
    assert!(numbers.filter(|n| !n.is_empty()).count() >= 2, "{said}");
    assert!(traffic::udp_answers(&net.peer, None, to), "the old policy");

    // More than the programs of a small policy take: larger ones take over.
    daemon.setup.write(&scattered_prefixes());
    let (code, answer) = daemon.reload();
    assert_eq!(code, 200, "{answer}");
    for (from, expected) in [("11.0.0.0", "ALLOWED"), ("11.0.0.2", "DENIED")] {
        let said = explain(&daemon, from, "10.1.0.1", "tcp/7000");
        assert_eq!(said["verdict"], expected, "{from}: {said}");
    }
    assert!(traffic::tcp_connects(&net.peer, to, LONG));
    assert!(!traffic::udp_answers(&net.peer, None, to), "the new policy");

    // As many hosts.
    daemon.swap(&many_prefixes());
    assert_eq!(daemon.status()["policy"]["last_error"], Value::Null);
    for (from, expected) in [
        ("20.0.0.0", "ALLOWED"),
        ("20.0.0.1", "DENIED"),
        ("20.1.134.158", "ALLOWED"),
        ("20.1.134.160", "DENIED"),
        ("10.1.0.2", "ALLOWED"),
        ("10.1.0.3", "DENIED"),
    ] {
        let said = explain(&daemon, from, "10.1.0.1", "tcp/7000");
        assert_eq!(said["verdict"], expected, "{from}: {said}");
    }
    assert!(traffic::tcp_connects(&net.peer, to, LONG));
    assert!(!traffic::udp_answers(&net.peer, None, to), "the new policy");
    assert!(daemon.counted("tc_ingress", "denied", "") > 0);
}

/// Names that would be one if somebody put them together with a dash.
#[test]
fn names_that_look_alike_are_not_one() {
    let lab = Lab::new();
    let policy = r"version: 1
services:
  a-b: [tcp/7001]
segments:
  a: { members: [{cidr: 10.1.0.2/32}] }
  a-b: { members: [{cidr: 10.1.0.3/32}] }
  b-c: { members: [{cidr: 10.1.0.4/32}] }
  c: { members: [{cidr: 10.1.0.5/32}] }
  server: { members: [{cidr: 10.1.0.1/32}] }
rules:
  - { name: a-b, from: [a], to: [server], services: [tcp/7000] }
  - { name: b-c, from: [a-b], to: [server], services: [a-b] }
  - { name: c, from: [b-c], to: [server], services: [tcp/7002] }
  - { name: a, from: [c], to: [server], services: [tcp/7003] }
";
    let daemon = Setup::new(&lab.net.host, "eth0", policy)
        .with(&["--socket-hooks", "off"])
        .start();
    for (from, rule) in (2u8..6).zip(["a-b", "b-c", "c", "a"]) {
        for port in 7000..7004 {
            let syn = packet(false, from, 1, 6, &frame::tcp(45_000, port, frame::SYN));
            if port == 7000 + u16::from(from) - 2 {
                lab.all(&daemon, &[syn], "allowed", "rule_allow");
                let source = format!("10.1.0.{from}");
                let said = explain(&daemon, &source, "10.1.0.1", &format!("tcp/{port}"));
                assert_eq!(said["rule"], rule);
            } else {
                lab.all(&daemon, &[syn], "denied", "default_deny");
            }
        }
    }
}
