//! Path MTU discovery through an enforcer, and the ICMP errors that it must tell from forged ones.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd as _,
    thread,
};

use enforcer_tests::{
    daemon::{Daemon, LONG, Setup, wait_for},
    frame,
    netns::{Family, Netns, Routed},
    seen::{denied, moved},
    traffic::{self, QUIET, Tap},
    wire,
};
use serde_json::json;

const POLICY: &str = r#"version: 1
segments:
  a: { members: [{cidr: 10.1.0.2/32}, {cidr: "fd01::2/128"}] }
  far: { members: [{cidr: 10.3.0.0/24}, {cidr: "fd03::/64"}] }
  b: { members: [{cidr: 10.2.0.2/32}, {cidr: "fd02::2/128"}] }
rules:
  - { name: web, from: [a], to: [far, b], services: [tcp/443] }
  - { name: some, from: [a], to: [b], services: [udp/7000] }
  - { name: from-far, from: [far], to: [a], services: [tcp/8443] }
"#;

/// A link of 1280 bytes behind the second of two routers.
///
/// ```text
/// a ── gw-a gateway gw-b ── eth0 router far ══ eth0 far (10.3.0.2, fd03::2)
/// ```
struct Narrow {
    gateway: Netns,
    a: Netns,
    far: Netns,
    _router: Netns,
}

impl Narrow {
    fn new() -> Self {
        let Routed { gateway, a, b } = Routed::new();
        let far = Netns::new("far");
        b.sysctl("ipv4/ip_forward", "1");
        b.sysctl("ipv6/conf/all/forwarding", "1");
        b.cable("far", &far, "eth0");
        b.addresses("far", &["10.3.0.1/24", "fd03::1/64"]);
        far.addresses("eth0", &["10.3.0.2/24", "fd03::2/64"]);
        far.ip("route add default via 10.3.0.1\nroute add default via fd03::1\n");
        gateway.ip("route add 10.3.0.0/24 via 10.2.0.2\nroute add fd03::/64 via fd02::2\n");
        // Of one end only, so that no end's segment size says it beforehand.
        b.ip("link set far mtu 1280\n");
        Self {
            gateway,
            a,
            far,
            _router: b,
        }
    }
}

/// What the kernel believes the path of a connection to carry.
fn path_mtu(stream: &TcpStream) -> i32 {
    let (level, option) = match stream.peer_addr().unwrap() {
        SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_MTU),
        SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_MTU),
    };
    let (mut mtu, mut length) = (0i32, 4);
    // SAFETY: room for an int, and its size.
    let got = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            level,
            option,
            (&raw mut mtu).cast(),
            &raw mut length,
        )
    };
    assert_eq!(got, 0);
    mtu
}

const LENGTH: usize = 2_000_000;

/// Two megabytes out of `from`, with DF set as always with TCP.
fn transfer(mut from: TcpStream, mut to: TcpStream) {
    from.set_write_timeout(Some(LONG)).unwrap();
    to.set_read_timeout(Some(LONG)).unwrap();
    assert_eq!(path_mtu(&from), 1500, "the discovery is yet to come");
    let reader = thread::spawn(move || {
        let mut bytes = Vec::new();
        to.read_to_end(&mut bytes).unwrap();
        bytes.len()
    });
    from.write_all(&vec![7; LENGTH]).unwrap();
    wait_for("the path MTU", LONG, || {
        (path_mtu(&from) == 1280).then_some(())
    });
    from.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(reader.join().unwrap(), LENGTH);
}

#[test]
fn a_transfer_through_the_enforcer_learns_the_path_mtu() {
    let net = Narrow::new();
    let daemon = Setup::new(&net.gateway, "gw-*", POLICY).start();
    for family in Family::BOTH {
        let at = SocketAddr::new(family.address(3, 2), 443);
        let listener = net.far.enter(|| TcpListener::bind(at).unwrap());
        let counted = [
            ("tc_ingress", "allowed", "related"),
            ("tc_egress", "allowed", "related"),
            ("", "denied", ""),
        ];
        let hooks = moved(&daemon, counted, || {
            let a = traffic::tcp(&net.a, at);
            transfer(a, listener.accept().unwrap().0);
        });
        assert!(hooks[0] > 0 && hooks[1] > 0, "{family:?}: {hooks:?}");
        assert_eq!(hooks[2], 0, "{family:?}");
    }
}

/// The server that answers at length enforces on itself.
#[test]
fn a_server_with_an_enforcer_learns_the_path_mtu() {
    let net = Narrow::new();
    let daemon = Setup::new(&net.a, "eth0", POLICY).start();
    for family in Family::BOTH {
        let at = SocketAddr::new(family.address(1, 2), 8443);
        let listener = net.a.enter(|| TcpListener::bind(at).unwrap());
        let counted = [("tc_ingress", "allowed", "related"), ("", "denied", "")];
        let hooks = moved(&daemon, counted, || {
            let far = traffic::tcp(&net.far, at);
            transfer(listener.accept().unwrap().0, far);
        });
        assert!(hooks[0] > 0, "{family:?}: the error came in");
        assert_eq!(hooks[1], 0, "{family:?}");
    }
}

/// An open flow of each kind, and a wire to forge errors about it on.
struct Flow {
    a: IpAddr,
    b: IpAddr,
    tcp: u16,
    udp: u16,
    _stream: TcpStream,
}

fn flow(net: &Routed, family: Family) -> Flow {
    let (a, b) = (family.address(1, 2), family.address(2, 2));
    let stream = traffic::tcp(&net.a, (b, 443));
    let socket = traffic::udp(&net.a, (a, 0), LONG);
    socket.send_to(b"open", (b, 7000)).unwrap();
    socket.recv_from(&mut [0; 8]).unwrap();
    Flow {
        a,
        b,
        tcp: stream.local_addr().unwrap().port(),
        udp: socket.local_addr().unwrap().port(),
        _stream: stream,
    }
}

/// One daemon for all that only looks at packets.
#[test]
fn errors_and_forged_errors() {
    let net = Routed::new();
    let daemon = Setup::new(&net.gateway, "gw-*", POLICY).start();
    traffic::tcp_echo(&net.b, 443);
    for family in Family::BOTH {
        traffic::udp_echo(&net.b, (family.address(2, 2), 7000));
        let flow = flow(&net, family);
        eight_bytes_of_transport_are_enough(&net, &flow);
        what_quotes_no_flow_is_denied(&net, &daemon, &flow);
        a_storm_of_errors_admits_nothing(&net, &daemon, &flow);
    }
}

/// The packet of the flow from `a`, as far as a router may quote it (RFC 792).
fn quoted(flow: &Flow, protocol: u8, port: u16, to: u16) -> Vec<u8> {
    let mut packet = frame::ip(flow.a, flow.b, protocol, &frame::tcp(port, to, frame::ACK));
    // The headers speak of the packet that was, whatever is quoted of it.
    let (field, long) = if flow.a.is_ipv4() {
        (2, 1500u16)
    } else {
        (4, 1460)
    };
    packet[field..field + 2].copy_from_slice(&long.to_be_bytes());
    packet.truncate(packet.len() - 20 + 8);
    packet
}

fn eight_bytes_of_transport_are_enough(net: &Routed, flow: &Flow) {
    let tap = Tap::new(&net.a);
    for (protocol, port, to) in [(6, flow.tcp, 443), (17, flow.udp, 7000)] {
        let error = wire::too_big(flow.b, flow.a, &quoted(flow, protocol, port, to));
        traffic::send_raw(&net.b, &error);
        assert!(tap.sees(end(&error), LONG), "protocol {protocol}");
        // A byte less is no port of anything.
        let mut short = quoted(flow, protocol, port, to);
        short.pop();
        let error = wire::too_big(flow.b, flow.a, &short);
        traffic::send_raw(&net.b, &error);
        assert!(!tap.sees(end(&error), QUIET), "protocol {protocol}");
    }
}

/// The ICMP message of a packet.
fn end(packet: &[u8]) -> &[u8] {
    &packet[if packet[0] >> 4 == 4 { 20 } else { 40 }..]
}

fn what_quotes_no_flow_is_denied(net: &Routed, daemon: &Daemon<'_>, flow: &Flow) {
    let tap = Tap::new(&net.a);
    let good = quoted(flow, 17, flow.udp, 7000);
    let v4 = flow.a.is_ipv4();
    let mut forged = vec![
        ("another port", quoted(flow, 17, flow.udp ^ 1, 7000)),
        ("another protocol", quoted(flow, 6, flow.udp, 7000)),
        ("nothing", Vec::new()),
        ("half a header", good[..18].to_vec()),
    ];
    // Sent by the other end of the flow: it cannot have caused an error at `b`.
    let mut reverse = frame::ip(flow.b, flow.a, 17, &frame::udp(7000, flow.udp));
    reverse.truncate(reverse.len() - 4);
    forged.push(("a packet of the error's own sender", reverse));
    if v4 {
        let mut fragment = good.clone();
        fragment[6..8].copy_from_slice(&0x2010u16.to_be_bytes());
        forged.push(("a later fragment, whose first bytes are data", fragment));
    } else {
        let header = frame::Extension::Fragment(16, true);
        let (next, payload) = frame::extended(&[header], 17, &good[40..]);
        let fragment = frame::ip(flow.a, flow.b, next, &payload);
        forged.push(("a later fragment, whose first bytes are data", fragment));
    }
    let count = u64::try_from(forged.len()).unwrap();
    let counted = [
        ("tc_ingress", "denied", "icmp_unrelated"),
        ("", "allowed", "related"),
    ];
    let hooks = moved(daemon, counted, || {
        for (what, quoted) in &forged {
            let error = wire::too_big(flow.b, flow.a, quoted);
            traffic::send_raw(&net.b, &error);
            assert!(!tap.sees(end(&error), QUIET), "{what}");
        }
    });
    assert_eq!(hooks, [count, 0]);
    denied(
        daemon,
        &json!({
            "direction": "ingress", "interface": "gw-b", "reason": "icmp_unrelated",
            "src": flow.b.to_string(), "dst": flow.a.to_string(),
            "icmp_type": if v4 { 3 } else { 2 },
        }),
    );
}

/// Neither the error nor what it quotes becomes a flow: packets of both are denied afterwards.
fn a_storm_of_errors_admits_nothing(net: &Routed, daemon: &Daemon<'_>, flow: &Flow) {
    const STORM: u16 = 2_000;
    let sender = wire::Raw::new(&net.b, flow.a);
    let judged = moved(daemon, [("tc_ingress", "denied", "icmp_unrelated")], || {
        for port in 0..STORM {
            let error = wire::too_big(flow.b, flow.a, &quoted(flow, 17, 10_000 + port, 7001));
            sender.send(&error);
        }
        // One about a real flow, with as little effect.
        let error = wire::too_big(flow.b, flow.a, &quoted(flow, 17, flow.udp, 7000));
        sender.send(&error);
    });
    assert_eq!(judged, [u64::from(STORM)]);
    let tap = Tap::new(&net.a);
    for port in (0..STORM).step_by(200) {
        let reply = wire::udp((flow.b, 7001), (flow.a, 10_000 + port), b"as if asked");
        sender.send(&reply);
        assert!(!tap.sees(b"as if asked", QUIET / 3), "port {port}");
    }
    let (protocol, kind) = if flow.a.is_ipv4() { (1, 5) } else { (58, 160) };
    let other = frame::icmp(kind, 0, 77);
    sender.send(&wire::checksummed(frame::ip(
        flow.b, flow.a, protocol, &other,
    )));
    denied(
        daemon,
        &json!({
            "direction": "ingress", "reason": "default_deny", "icmp_type": kind,
            "src": flow.b.to_string(),
        }),
    );
}
