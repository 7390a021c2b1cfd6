//! Flow semantics with real stacks and raw packets, through a gateway and on a host.
#![allow(missing_docs, reason = "a test")]

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener},
    thread,
};

use enforcer_tests::{
    daemon::{LONG, Setup, wait_for},
    frame,
    netns::{Family, Netns, Pair, Routed},
    traffic::{self, QUIET, Tap},
};

const POLICY: &str = r#"version: 1
segments:
  a: { members: [{cidr: 10.1.0.2/32}, {cidr: "fd01::2/128"}] }
  b: { members: [{cidr: 10.2.0.0/24}, {cidr: "fd02::/64"}] }
rules:
  - { name: some, from: [a], to: [b], services: [tcp/7000-7001, udp/7000-7001, ping] }
"#;

/// Addresses of `a` and `b` of [`Routed`].
fn ends(family: Family) -> (IpAddr, IpAddr) {
    (family.address(1, 2), family.address(2, 2))
}

/// A TCP session from `a` to `b`: both ends.
fn session(net: &Routed, family: Family, port: u16) -> (std::net::TcpStream, std::net::TcpStream) {
    let at = SocketAddr::new(family.address(2, 2), port);
    let listener = net.b.enter(|| TcpListener::bind(at).unwrap());
    let a = traffic::tcp(&net.a, at);
    let (b, _) = listener.accept().unwrap();
    b.set_read_timeout(Some(LONG)).unwrap();
    (a, b)
}

#[test]
fn replies_pass_and_the_reverse_opening_is_denied() {
    let net = Routed::new();
    let _daemon = Setup::new(&net.gateway, "gw-*", POLICY).start();
    for namespace in [&net.a, &net.b] {
        traffic::udp_echo(namespace, traffic::any(7000));
        traffic::tcp_echo(namespace, 7000);
    }
    for family in Family::BOTH {
        let (a, b) = ends(family);
        assert!(traffic::udp_answers_soon(&net.a, (b, 7000)));
        let mut stream = traffic::tcp(&net.a, (b, 7000));
        traffic::converse(&mut stream, b"to and fro").unwrap();
        assert!(!traffic::udp_answers(&net.b, None, (a, 7000)), "{family:?}");
        assert!(
            !traffic::tcp_connects(&net.b, (a, 7000), QUIET),
            "{family:?}"
        );
        // From the very port that answers `a`, to another one of `a`'s.
        let server = traffic::udp(&net.b, (b, 7001), QUIET);
        let client = traffic::udp(&net.a, (a, 0), QUIET);
        let other = traffic::udp(&net.a, (a, 0), QUIET);
        client.send_to(b"open", (b, 7001)).unwrap();
        let (_, from) = server.recv_from(&mut [0; 8]).unwrap();
        server
            .send_to(b"other", other.local_addr().unwrap())
            .unwrap();
        server.send_to(b"reply", from).unwrap();
        assert_eq!(client.recv(&mut [0; 8]).unwrap(), 5, "{family:?}");
        assert!(other.recv(&mut [0; 8]).is_err(), "{family:?}");
    }
}

#[test]
fn a_syn_on_a_live_tuple_is_judged_as_an_opening() {
    let net = Routed::new();
    let daemon = Setup::new(&net.gateway, "gw-*", POLICY).start();
    traffic::tcp_echo(&net.b, 7000);
    let tap = Tap::new(&net.a);
    for family in Family::BOTH {
        let (a, b) = ends(family);
        let mut stream = traffic::tcp(&net.a, (b, 7000));
        traffic::converse(&mut stream, b"before").unwrap();
        let port = stream.local_addr().unwrap().port();
        // A packet of the flow passes; it is nonsense to TCP, which answers with an ACK at most.
        let ack = frame::tcp(7000, port, frame::ACK);
        traffic::send_raw(&net.b, &frame::ip(b, a, 6, &ack));
        assert!(tap.sees(&ack, LONG), "{family:?}: the control");
        let syn = frame::tcp(7000, port, frame::SYN);
        traffic::send_raw(&net.b, &frame::ip(b, a, 6, &syn));
        assert!(!tap.sees(&syn, QUIET), "{family:?}: the other side opens");
        let denial = wait_for("the denial", LONG, || {
            let to = a.to_string();
            daemon
                .denials(&["--to", &to])
                .into_iter()
                .find(|d| d["tcp_flags"] == "SYN")
        });
        assert_eq!(denial["reason"], "default_deny");
        traffic::converse(&mut stream, b"after").unwrap();
        // SYN-ACK, RST and FIN of no flow at all open nothing.
        for flags in [frame::SYN | frame::ACK, frame::RST, frame::FIN, frame::ACK] {
            let lone = frame::tcp(7002, port + 1, flags);
            traffic::send_raw(&net.b, &frame::ip(b, a, 6, &lone));
            assert!(
                !tap.sees(&lone, QUIET),
                "{family:?}: flags {flags:#x} of no flow"
            );
        }
    }
}

#[test]
fn sessions_outlive_the_daemon() {
    let net = Routed::new();
    let daemon = Setup::new(&net.gateway, "gw-*", POLICY).start();
    let mut sessions: Vec<_> = Family::BOTH
        .into_iter()
        .flat_map(|family| [session(&net, family, 7000), session(&net, family, 7001)])
        .collect();
    for (a, b) in &mut sessions {
        a.write_all(b"hello").unwrap();
        b.read_exact(&mut [0; 5]).unwrap();
    }
    let (setup, status) = daemon.stop();
    assert_eq!(status.code(), Some(0));
    // Opened while nobody looked; no rule allows it.
    let intruders: Vec<_> = Family::BOTH.map(|f| session(&net, f, 7009)).into();
    let _daemon = setup.start();
    for (number, (a, b)) in sessions.iter_mut().enumerate() {
        // The first packet that the new process sees is the opener's, or the other end's.
        let (first, second) = if number % 2 == 0 { (a, b) } else { (b, a) };
        first.write_all(b"still").unwrap();
        second.read_exact(&mut [0; 5]).unwrap();
        second.write_all(b"there").unwrap();
        first.read_exact(&mut [0; 5]).unwrap();
    }
    for (a, b) in &intruders {
        // Reading and writing need no exclusive borrow of a stream.
        for (mut from, mut to) in [(a, b), (b, a)] {
            to.set_read_timeout(Some(QUIET)).unwrap();
            from.write_all(b"intruder").unwrap();
            assert!(to.read(&mut [0; 8]).is_err());
        }
    }
}

#[test]
fn echo_requests_have_a_direction() {
    let net = Routed::new();
    let daemon = Setup::new(&net.gateway, "gw-*", POLICY).start();
    let tap = Tap::new(&net.a);
    for family in Family::BOTH {
        let (a, b) = ends(family);
        assert!(traffic::pings(&net.a, b, LONG), "{family:?}");
        assert!(!traffic::pings(&net.b, a, QUIET), "{family:?}");
        // With the identifier of a live exchange, too.
        let (protocol, request, reply) = if family == Family::V4 {
            (1, 8, 0)
        } else {
            (58, 128, 129)
        };
        let identifier = 4711;
        let packet = frame::ip(a, b, protocol, &frame::icmp(request, 0, identifier));
        traffic::send_raw(&net.a, &packet);
        let backwards = frame::icmp(request, 0, identifier);
        traffic::send_raw(&net.b, &frame::ip(b, a, protocol, &backwards));
        assert!(!tap.sees(&backwards, QUIET), "{family:?}");
        let answer = frame::icmp(reply, 0, identifier);
        traffic::send_raw(&net.b, &frame::ip(b, a, protocol, &answer));
        assert!(tap.sees(&answer, LONG), "{family:?}: the answer");
        let unasked = frame::icmp(reply, 0, identifier + 1);
        traffic::send_raw(&net.b, &frame::ip(b, a, protocol, &unasked));
        assert!(
            !tap.sees(&unasked, QUIET),
            "{family:?}: an answer to nothing"
        );
    }
    assert!(daemon.counted("tc_ingress", "denied", "default_deny") > 0);
}

#[test]
fn icmp_errors_pass_if_they_speak_of_a_flow() {
    let net = Routed::new();
    let daemon = Setup::new(&net.gateway, "gw-*", POLICY).start();
    let tap = Tap::new(&net.a);
    for family in Family::BOTH {
        let (a, b) = ends(family);
        // Nobody listens: the stack of `b` says so, and `a`'s socket hears it.
        let socket = traffic::udp(&net.a, (a, 0), LONG);
        socket.connect((b, 7000)).unwrap();
        socket.send(b"anybody?").unwrap();
        let error = socket.recv(&mut [0; 8]).unwrap_err();
        assert_eq!(
            error.kind(),
            std::io::ErrorKind::ConnectionRefused,
            "{family:?}"
        );

        // The same by hand, about the flow and about one that never was.
        let port = socket.local_addr().unwrap().port();
        let error = |source_port: u16| {
            let quoted = frame::ip(a, b, 17, &frame::udp(source_port, 7000));
            let (protocol, kind, code) = if family == Family::V4 {
                (1, 3, 3)
            } else {
                (58, 1, 4)
            };
            let mut message = frame::icmp(kind, code, 0);
            message[6..8].fill(0);
            message.extend(quoted);
            traffic::send_raw(&net.b, &frame::ip(b, a, protocol, &message));
            message
        };
        assert!(tap.sees(&error(port), LONG), "{family:?}: about the flow");
        assert!(
            !tap.sees(&error(port ^ 1), QUIET),
            "{family:?}: about no flow"
        );
    }
    assert_eq!(daemon.counted("tc_ingress", "denied", "icmp_unrelated"), 2);
    let denials = daemon.denials(&[]);
    assert!(
        denials
            .iter()
            .any(|d| d["reason"] == "icmp_unrelated" && d["interface"] == "gw-b")
    );
}

/// The gateway itself answers that a packet is too big; TCP gets nowhere unless that passes.
#[test]
fn path_mtu_discovery_works() {
    let net = Routed::new();
    let _daemon = Setup::new(&net.gateway, "gw-*", POLICY).start();
    net.gateway.ip("link set gw-b mtu 1300\n");
    for family in Family::BOTH {
        let (mut a, mut b) = session(&net, family, 7000);
        let reader = thread::spawn(move || {
            let mut bytes = Vec::new();
            b.read_to_end(&mut bytes).unwrap();
            bytes.len()
        });
        a.set_write_timeout(Some(LONG)).unwrap();
        a.write_all(&vec![7; 300_000]).unwrap();
        drop(a);
        assert_eq!(reader.join().unwrap(), 300_000, "{family:?}");
    }
}

const NOTHING: &str = r#"version: 1
segments:
  all: { members: [{cidr: 0.0.0.0/0}, {cidr: "::/0"}] }
"#;

/// Whether `namespace` knows the link address of `other`.
fn knows(namespace: &Netns, other: IpAddr) -> bool {
    let shown = namespace
        .ask("ip", &["neigh", "show", &other.to_string()])
        .unwrap();
    shown.contains("lladdr")
}

#[test]
fn neighbours_find_each_other_where_all_is_denied() {
    let net = Pair::new();
    let daemon = Setup::new(&net.host, "eth0", NOTHING)
        .with(&["--socket-hooks", "off"])
        .start();
    traffic::udp_echo(&net.peer, traffic::any(7000));
    traffic::udp_echo(&net.host, traffic::any(7000));
    for (from, me, to) in [(&net.peer, 2, 1), (&net.host, 1, 2)] {
        from.ip("neigh flush dev eth0\n");
        for family in Family::BOTH {
            let to = family.address(1, to);
            assert!(!knows(from, to), "{me} {family:?}");
            assert!(!traffic::udp_answers(from, None, (to, 7000)));
            wait_for("the neighbour", LONG, || knows(from, to).then_some(()));
        }
    }
    assert!(daemon.counted("tc_ingress", "allowed", "essential") >= 4);
    assert!(daemon.counted("tc_egress", "allowed", "essential") >= 4);
    assert_eq!(daemon.counted("", "allowed", "rule_allow"), 0);
}

#[test]
fn multicast_opens_no_flow() {
    const SENT: u64 = 5;
    let policy = r#"version: 1
segments:
  peer: { members: [{cidr: 10.1.0.2/32}] }
  this: { members: [{cidr: 10.1.0.1/32}] }
rules:
  - { name: mdns, from: [peer], to: [multicast], services: [udp/5353] }
"#;
    let net = Pair::new();
    let daemon = Setup::new(&net.host, "eth0", policy)
        .with(&["--socket-hooks", "off"])
        .start();
    let group = std::net::Ipv4Addr::new(224, 0, 0, 251);
    let here = std::net::Ipv4Addr::new(10, 1, 0, 1);
    let listener = traffic::udp(&net.host, ([0, 0, 0, 0], 5353), LONG);
    net.host
        .enter(|| listener.join_multicast_v4(&group, &here).unwrap());
    let peer = traffic::udp(&net.peer, ([10, 1, 0, 2], 0), QUIET);
    net.peer.ip("route add 224.0.0.0/4 dev eth0\n");
    for _ in 0..SENT {
        peer.send_to(b"who?", (group, 5353)).unwrap();
        let (_, from) = listener.recv_from(&mut [0; 8]).unwrap();
        // The answer is a flow that no rule allows.
        listener.send_to(b"I", from).unwrap();
    }
    assert!(peer.recv(&mut [0; 8]).is_err());
    assert_eq!(daemon.counted("tc_ingress", "allowed", "rule_allow"), SENT);
    assert_eq!(daemon.counted("tc_ingress", "allowed", "established"), 0);
    assert_eq!(daemon.counted("tc_egress", "denied", "default_deny"), SENT);
    // To a port that the rule does not name.
    let other = traffic::udp(&net.host, ([0, 0, 0, 0], 5354), QUIET);
    net.host
        .enter(|| other.join_multicast_v4(&group, &here).unwrap());
    peer.send_to(b"who?", (group, 5354)).unwrap();
    assert!(other.recv(&mut [0; 8]).is_err());
}
