//! Tunnel devices that find the outer address per neighbour: their packets carry the outer header
//! where others have none.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};

use enforcer_tests::{daemon::Setup, netns::Pair, seen::skipped, traffic};

const INNER_HOST: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 9, 0, 1));
const INNER_PEER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 9, 0, 2));

/// An IPv4 address for a socket of both families.
fn mapped(ip: IpAddr, port: u16) -> SocketAddr {
    match ip {
        IpAddr::V4(ip) => (ip.to_ipv6_mapped(), port).into(),
        IpAddr::V6(_) => (ip, port).into(),
    }
}

const POLICY: &str = r#"version: 1
segments:
  ends: { members: [{cidr: 10.1.0.0/24}] }
  inside: { members: [{cidr: 10.9.0.0/24}] }
rules:
  - { name: outer, from: [ends], to: [ends], services: [proto/gre] }
  - { name: inner, from: [inside], to: [inside], services: [udp/7000] }
"#;

#[test]
fn multipoint_gre_is_closed() {
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
    let server = traffic::udp(&net.host, traffic::any(7002), traffic::QUIET);
    let client = traffic::udp(&net.peer, traffic::any(0), traffic::QUIET);
    let delivers = || {
        client.send_to(b"in", mapped(INNER_HOST, 7002)).unwrap();
        server.recv_from(&mut [0; 16]).is_ok()
    };
    assert!(delivers(), "without the enforcer");
    let _daemon = Setup::new(&net.host, "eth0,inner", POLICY)
        .with(&["--socket-hooks", "off"])
        .start();
    assert!(!delivers(), "what comes in is judged");
    let answers = |from, to, port| traffic::udp_answers(from, None, (to, port));
    assert!(!answers(&net.host, INNER_PEER, 7001), "out, denied");
    assert!(!answers(&net.peer, INNER_HOST, 7001), "in, denied");
    // A limit: the packet does not begin where that of an interface without Ethernet does.
    assert!(!answers(&net.host, INNER_PEER, 7000), "out, allowed");
    assert!(!answers(&net.peer, INNER_HOST, 7000), "in, allowed");
}

/// Whether a datagram from a socket of the VRF `red` reaches another one by an address in it.
fn speaks_to_itself(net: &Pair) -> bool {
    net.host.enter(|| {
        let bind = |port: u16| {
            let socket = UdpSocket::bind(("0.0.0.0", port)).unwrap();
            let device = std::ffi::OsString::from("red");
            nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::BindToDevice, &device)
                .unwrap();
            socket.set_read_timeout(Some(traffic::QUIET)).unwrap();
            socket
        };
        let (server, client) = (bind(7000), bind(0));
        let sent = client.send_to(b"me", ("10.8.0.1", 7000)).is_ok();
        sent && server.recv_from(&mut [0; 16]).is_ok()
    })
}

#[test]
fn a_host_speaks_to_itself_in_a_vrf() {
    let net = Pair::new();
    let words = ["link", "add", "red", "type", "vrf", "table", "10"];
    if let Err(complaint) = net.host.ask("ip", &words) {
        skipped(&format!("no VRF in this kernel: {complaint}"));
        return;
    }
    net.host
        .ip("link set red up\nlink add d0 type dummy\nlink set d0 master red\nlink set d0 up\n");
    net.host.addresses("d0", &["10.8.0.1/24"]);
    assert!(speaks_to_itself(&net), "without the enforcer");
    let policy = "version: 1\nsegments: {all: {members: [{cidr: 0.0.0.0/0}]}}\n";
    let _daemon = Setup::new(&net.host, "*", policy)
        .with(&["--socket-hooks", "off"])
        .start();
    assert!(speaks_to_itself(&net), "with a glob for all interfaces");
}

#[test]
fn what_ipsec_carries_is_denied_on_its_interface() {
    let net = Pair::new();
    let ends = [
        (&net.host, "10.1.0.1", INNER_HOST, "10.1.0.2"),
        (&net.peer, "10.1.0.2", INNER_PEER, "10.1.0.1"),
    ];
    let key = format!("0x{}", "0b".repeat(32));
    for (end, local, inner, remote) in ends {
        let device = "link add inner type xfrm dev eth0 if_id 1";
        let words: Vec<&str> = device.split(' ').collect();
        if let Err(complaint) = end.ask("ip", &words) {
            skipped(&format!("no xfrm interface in this kernel: {complaint}"));
            return;
        }
        for (src, dst, dir) in [(local, remote, "out"), (remote, local, "in")] {
            let spi = if src == "10.1.0.1" { "0x101" } else { "0x102" };
            let state = format!(
                "xfrm state add src {src} dst {dst} proto esp spi {spi} reqid 1 mode tunnel \
                 if_id 1 auth hmac(sha256) {key} enc ecb(cipher_null) "
            );
            let words: Vec<&str> = state.split(' ').filter(|word| !word.is_empty()).collect();
            let words: Vec<&str> = words.into_iter().chain([""]).collect();
            if let Err(complaint) = end.ask("ip", &words) {
                skipped(&format!("no ESP in this kernel: {complaint}"));
                return;
            }
            end.ip(&format!(
                "xfrm policy add src 0.0.0.0/0 dst 0.0.0.0/0 dir {dir} if_id 1 \
                 tmpl src {src} dst {dst} proto esp reqid 1 mode tunnel\n"
            ));
        }
        end.addresses("inner", &[&format!("{inner}/24")]);
        end.ip("link set inner up\n");
        for port in [7000, 7001] {
            traffic::udp_echo(end, traffic::any(port));
        }
    }
    assert!(traffic::udp_answers_soon(&net.host, (INNER_PEER, 7001)));
    let policy = POLICY.replace("proto/gre", "proto/50");
    let _daemon = Setup::new(&net.host, "eth0,inner", &policy)
        .with(&["--socket-hooks", "off"])
        .start();
    let answers = |from, to, port| traffic::udp_answers(from, None, (to, port));
    assert!(!answers(&net.host, INNER_PEER, 7001), "out, denied");
    assert!(!answers(&net.peer, INNER_HOST, 7001), "in, denied");
    // A limit: an Ethernet header is in front of what was unpacked.
    assert!(!answers(&net.host, INNER_PEER, 7000), "out, allowed");
    assert!(!answers(&net.peer, INNER_HOST, 7000), "in, allowed");
}
