//! Protocols above IP are what they are: none is taken for another, tunnels need their names.

use enforcer_tests::{daemon::Setup, frame};

use crate::lab::{Lab, allowing, packet, to_host};

const BOTH: [bool; 2] = [false, true];

/// An SCTP packet with these chunks, each of 16 bytes: its type, and numbers of no meaning here.
fn sctp(ports: (u16, u16), tag: u32, chunks: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(ports.0.to_be_bytes());
    bytes.extend(ports.1.to_be_bytes());
    bytes.extend(tag.to_be_bytes());
    bytes.extend([0; 4]);
    for chunk in chunks {
        bytes.extend([*chunk, 3, 0, 16, 0, 0, 0, 1, 0, 2, 0, 3, 0, 0, 0, 4]);
    }
    bytes
}

const DATA: u8 = 0;
const INIT: u8 = 1;
const ABORT: u8 = 6;
const SHUTDOWN: u8 = 7;
const COOKIE_ECHO: u8 = 10;

#[test]
fn sctp_is_judged_by_its_ports_whatever_its_chunks() {
    let lab = Lab::new();
    let daemon = Setup::new(
        &lab.net.host,
        "eth0",
        &allowing("sctp/5000, udp/5001, tcp/5001"),
    )
    .with(&["--socket-hooks", "off"])
    .start();
    let shapes: [&[u8]; 6] = [
        &[INIT],
        &[COOKIE_ECHO, DATA, DATA],
        &[DATA; 8],
        &[ABORT],
        &[SHUTDOWN, ABORT],
        &[],
    ];
    let to = |port: u16, family: bool, tag: u32| -> Vec<Vec<u8>> {
        let each = shapes.iter().zip(40_000..);
        each.map(|(chunks, from)| to_host(family, 132, &sctp((from, port), tag, chunks)))
            .collect()
    };
    for family in BOTH {
        lab.all(&daemon, &to(5000, family, 7), "allowed", "rule_allow");
        // The same ports again are the same flows, whatever tag; an ABORT has ended none.
        lab.all(&daemon, &to(5000, family, 9), "allowed", "established");
        lab.all(&daemon, &to(5001, family, 7), "denied", "default_deny");
        // Answers pass, and nothing else from the port.
        let out = |to| packet(family, 1, 2, 132, &sctp((5000, to), 1, &[ABORT]));
        lab.all_out(&daemon, &[out(40_000)], "allowed", "established");
        lab.all_out(&daemon, &[out(39_999)], "denied", "default_deny");
        let cut = sctp((40_100, 5000), 1, &[])[..11].to_vec();
        lab.all(
            &daemon,
            &[to_host(family, 132, &cut)],
            "denied",
            "malformed",
        );
    }
}

#[test]
fn no_protocol_is_taken_for_another_with_the_same_ports() {
    let lab = Lab::new();
    let daemon = Setup::new(
        &lab.net.host,
        "eth0",
        &allowing("udp/6000, tcp/6000, sctp/6001"),
    )
    .with(&["--socket-hooks", "off"])
    .start();
    let bytes = frame::udp(41_000, 6000);
    let with = |protocols: &[u8]| -> Vec<Vec<u8>> {
        let pairs = protocols.iter().flat_map(|p| BOTH.map(|v6| (v6, *p)));
        // In IPv6, 0 is the header of hop-by-hop options.
        pairs
            .filter(|pair| *pair != (true, 0))
            .map(|(v6, protocol)| to_host(v6, protocol, &bytes))
            .collect()
    };
    let others = [136, 33, 0, 253, 254, 255, 3, 46];
    lab.all(&daemon, &with(&others), "denied", "default_deny");
    lab.all(&daemon, &with(&[17]), "allowed", "rule_allow");
    lab.all(&daemon, &with(&[132]), "denied", "default_deny");

    daemon.swap(&allowing("udplite/6000, proto/dccp, proto/253"));
    lab.all(&daemon, &with(&[136, 33, 253]), "allowed", "rule_allow");
    lab.all(&daemon, &with(&[17]), "denied", "revoked");
    lab.all(
        &daemon,
        &with(&[0, 254, 255, 132]),
        "denied",
        "default_deny",
    );
    let lite = |port| BOTH.map(|v6| to_host(v6, 136, &frame::udp(41_000, port)));
    lab.all(&daemon, &lite(6001), "denied", "default_deny");
}

/// Protocols that carry others, on the outside.
const TUNNELS: [u8; 8] = [4, 41, 47, 50, 51, 97, 115, 137];
/// Tunnels in UDP: VXLAN, Geneve, GUE, `WireGuard`.
const PORTS: [u16; 4] = [4789, 6081, 6080, 51820];

#[test]
fn tunnels_pass_only_by_rules_that_name_them() {
    let lab = Lab::new();
    let setup = |services: &str| allowing(services);
    let daemon = Setup::new(&lab.net.host, "eth0", &setup("any"))
        .with(&["--socket-hooks", "off"])
        .start();
    // What is inside would be allowed by itself.
    let inner = to_host(false, 17, &frame::udp(41_000, 7000));
    let outer = |protocol: u8| BOTH.map(|v6| to_host(v6, protocol, &inner));
    let all: Vec<Vec<u8>> = TUNNELS.into_iter().flat_map(outer).collect();
    lab.all(&daemon, &all, "denied", "default_deny");
    for protocol in TUNNELS {
        daemon.swap(&setup(&format!("any, proto/{protocol}")));
        lab.all(&daemon, &outer(protocol), "allowed", "rule_allow");
    }
    let ports = |ports: &[u16], from: u16| -> Vec<Vec<u8>> {
        let datagram = |to: u16| {
            let mut bytes = frame::udp(from, to);
            bytes.truncate(8);
            let length = u16::try_from(8 + inner.len()).unwrap();
            bytes[4..6].copy_from_slice(&length.to_be_bytes());
            bytes.extend(&inner);
            BOTH.map(|v6| to_host(v6, 17, &bytes))
        };
        ports.iter().copied().flat_map(datagram).collect()
    };
    daemon.swap(&setup("tcp/any, udp/1-4788, proto/gre"));
    lab.all(&daemon, &ports(&PORTS, 41_000), "denied", "default_deny");
    for (port, from) in PORTS.into_iter().zip(42_000..) {
        daemon.swap(&setup(&format!("udp/{port}")));
        for other in PORTS {
            let (outcome, reason) = if other == port {
                ("allowed", "rule_allow")
            } else {
                ("denied", "default_deny")
            };
            lab.all(&daemon, &ports(&[other], from), outcome, reason);
        }
    }
}

#[test]
fn quic_needs_a_rule_of_its_own_and_is_judged_anew_when_it_moves() {
    let lab = Lab::new();
    let daemon = Setup::new(&lab.net.host, "eth0", &allowing("tcp/443"))
        .with(&["--socket-hooks", "off"])
        .start();
    let quic = |from: u16| BOTH.map(|v6| to_host(v6, 17, &frame::udp(from, 443)));
    let https = BOTH.map(|v6| to_host(v6, 6, &frame::tcp(41_000, 443, frame::SYN)));
    lab.all(&daemon, &https, "allowed", "rule_allow");
    lab.all(&daemon, &quic(41_000), "denied", "default_deny");
    daemon.swap(&allowing("quic"));
    lab.all(&daemon, &quic(41_000), "allowed", "rule_allow");
    lab.all(&daemon, &quic(41_000), "allowed", "established");
    // The client's port changes, then its address.
    lab.all(&daemon, &quic(41_001), "allowed", "rule_allow");
    let moved = BOTH.map(|v6| packet(v6, 3, 1, 17, &frame::udp(41_001, 443)));
    lab.all(&daemon, &moved, "denied", "default_deny");
    lab.all(&daemon, &https, "denied", "default_deny");
}
