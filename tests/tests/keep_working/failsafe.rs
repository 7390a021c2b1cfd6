//! Failsafes: the way back into a host that nothing in the policy cuts, and nothing beyond it.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream},
};

use enforcer_tests::{
    daemon::{Daemon, LONG, Setup, wait_for},
    frame,
    link::Delivered,
    netns::{Family, Netns},
    seen::moved,
    traffic::{self, QUIET},
    wire::{self, Packets},
};
use serde_json::json;

use crate::lab::{Lab, NOTHING, packet};

const PORT: u16 = 2222;
const OTHER_PORT: u16 = 2223;

const SETTINGS: &str = "version: 1
failsafe:
  - { name: admin, sources: [10.1.0.2/32, \"fd01::2/128\"], ports: [tcp/2222, udp/2222] }
";
/// The same at one interface.
const AT_ETH0: &str = "version: 1
failsafe:
  - { name: admin, sources: [10.1.0.2/32, \"fd01::2/128\"], ports: [tcp/2222, udp/2222],
      interfaces: [eth0] }
";

/// A rule that denies all there is.
fn denied() -> String {
    format!(
        "{NOTHING}rules:\n  - {{ name: none, from: [any], to: [any], services: [any], action: deny }}\n"
    )
}

/// A policy that allows what the failsafe does, too, and more.
fn open() -> String {
    format!("{NOTHING}rules:\n  - {{ name: all, from: [any], to: [any], services: [any] }}\n")
}

/// The neighbour's segment is somewhere else.
fn elsewhere() -> String {
    format!(
        "{NOTHING}  admins: {{ members: [{{cidr: 10.1.0.2/32}}, {{cidr: \"fd01::2/128\"}}], interfaces: [eth7] }}\n"
    )
}

/// A connection between the peer and a server on the host, and both its ends.
struct Session {
    client: TcpStream,
    server: TcpStream,
}

impl Session {
    fn new(lab: &Lab, listener: &TcpListener, host: IpAddr) -> Self {
        let client = traffic::tcp(&lab.net.peer, (host, PORT));
        let (server, _) = listener.accept().unwrap();
        server.set_read_timeout(Some(LONG)).unwrap();
        server.set_nodelay(true).unwrap();
        Self { client, server }
    }

    /// Words each way, the server's first.
    fn talks(&mut self, when: &str) {
        for at in [0, 1] {
            let (from, to) = if at == 0 {
                (&mut self.server, &mut self.client)
            } else {
                (&mut self.client, &mut self.server)
            };
            from.write_all(b"word").unwrap();
            let mut bytes = [0; 4];
            to.read_exact(&mut bytes)
                .unwrap_or_else(|error| panic!("{when}, {at}: {error}"));
        }
    }
}

fn listen(namespace: &Netns, port: u16) -> TcpListener {
    namespace.enter(|| TcpListener::bind(traffic::any(port)).unwrap())
}

fn reload(daemon: &Daemon<'_>, settings: &str, failsafes: usize) {
    daemon.setup.write_settings(settings);
    wait_for("the settings", LONG, || {
        let status = daemon.status();
        assert_eq!(status["policy"]["last_error"], json!(null));
        (status["settings"]["failsafes"].as_array()?.len() == failsafes && daemon.reload().0 == 200)
            .then_some(())
    });
}

#[test]
fn a_session_of_a_failsafe_outlives_whatever_the_policy_says() {
    let lab = Lab::new();
    let listener = listen(&lab.net.host, PORT);
    let mut daemon = Setup::new(&lab.net.host, "eth0", NOTHING)
        .with_settings(SETTINGS)
        .start();
    assert_eq!(
        daemon.status()["settings"]["failsafes"],
        json!([{
            "name": "admin", "sources": ["10.1.0.2/32", "fd01::2/128"],
            "ports": ["tcp/2222", "udp/2222"], "interfaces": [],
        }])
    );
    let before = daemon.counted("tc_ingress", "allowed", "failsafe");
    let mut sessions = Family::BOTH.map(|family| {
        let host = family.address(1, 1);
        Session::new(&lab, &listener, host)
    });
    assert!(daemon.counted("tc_ingress", "allowed", "failsafe") >= before + 2);
    let mut all = |when: &str| {
        for session in &mut sessions {
            session.talks(when);
        }
    };
    all("at first");
    // Everything is allowed, then nothing: a revocation of all there is.
    for (when, policy) in [
        ("everything allowed", open()),
        ("everything revoked", NOTHING.to_owned()),
        ("everything denied by a rule", denied()),
        ("its segment elsewhere", elsewhere()),
        ("denied again", denied()),
    ] {
        daemon.swap(&policy);
        all(when);
    }
    for when in ["reloaded", "reloaded again"] {
        assert_eq!(daemon.reload().0, 200);
        all(when);
    }
    reload(&daemon, AT_ETH0, 1);
    all("bound to an interface");
    // The flow tables are gone with the daemon; the server speaks first. What it says makes it no
    // opener of a flow, which the next policy would end.
    for when in ["another daemon", "and another"] {
        let (setup, _) = daemon.stop();
        daemon = setup.start();
        let [replied] = moved(&daemon, [("tc_egress", "allowed", "failsafe")], || {
            all(when)
        });
        assert!(replied >= 2, "{when}: {replied}");
        daemon.swap(&open());
        all(when);
        daemon.swap(&denied());
        all(when);
    }
    assert_eq!(daemon.counted("", "denied", "revoked"), 0);
    // Without the failsafe it ends at once.
    reload(&daemon, AT_ETH0, 1);
    let before = daemon.generation();
    daemon.setup.write_settings("version: 1\n");
    daemon.wait_swapped(before);
    for session in &mut sessions {
        session.server.write_all(b"gone").unwrap();
        session.client.set_read_timeout(Some(QUIET)).unwrap();
        assert!(session.client.read(&mut [0; 4]).is_err());
    }
}

#[test]
fn a_failsafe_lets_in_nobody_else_and_nothing_else() {
    let lab = Lab::new();
    lab.net
        .peer
        .addresses("eth0", &["10.1.0.3/24", "fd01::3/64"]);
    let daemon = Setup::new(&lab.net.host, "eth0", &denied())
        .with_settings(SETTINGS)
        .with(&["--socket-hooks", "off"])
        .start();
    let syn = |from, to| frame::tcp(from, to, frame::SYN);
    let v4_and_v6 =
        |from, protocol, bytes: &[u8]| [false, true].map(|v6| packet(v6, from, 1, protocol, bytes));
    let both = |at: u16| [(6, syn(at, PORT)), (17, frame::udp(at, PORT))];
    for (protocol, bytes) in both(41_000) {
        lab.all(
            &daemon,
            &v4_and_v6(2, protocol, &bytes),
            "allowed",
            "failsafe",
        );
        // Another source.
        lab.all(
            &daemon,
            &v4_and_v6(3, protocol, &bytes),
            "denied",
            "rule_deny",
        );
    }
    // Another port, another protocol; its port as the source's.
    for (protocol, bytes) in [
        (6, syn(41_001, OTHER_PORT)),
        (17, frame::udp(41_001, OTHER_PORT)),
        (132, syn(41_001, PORT)),
        (136, frame::udp(41_001, PORT)),
        (6, syn(PORT, OTHER_PORT)),
        (17, frame::udp(PORT, OTHER_PORT)),
    ] {
        lab.all(
            &daemon,
            &v4_and_v6(2, protocol, &bytes),
            "denied",
            "rule_deny",
        );
    }
    // Out of the host the way is closed, but for replies.
    let out =
        |to, protocol, bytes: &[u8]| [false, true].map(|v6| packet(v6, 1, to, protocol, bytes));
    for (protocol, bytes) in both(41_002) {
        lab.all_out(&daemon, &out(2, protocol, &bytes), "denied", "rule_deny");
    }
    let opens = syn(PORT, 41_003);
    lab.all_out(&daemon, &out(2, 6, &opens), "denied", "rule_deny");
    let answer = frame::udp(PORT, 41_004);
    lab.all_out(&daemon, &out(3, 17, &answer), "denied", "rule_deny");
    lab.all_out(&daemon, &out(2, 17, &answer), "allowed", "failsafe");
    // It is for this host, not for those behind it.
    let behind = [
        wire::udp(
            (Ipv4Addr::new(10, 1, 0, 2).into(), 41_005),
            (Ipv4Addr::new(10, 9, 0, 1).into(), PORT),
            b"further",
        ),
        wire::udp(
            ("fd01::2".parse::<Ipv6Addr>().unwrap().into(), 41_005),
            ("fd09::1".parse::<Ipv6Addr>().unwrap().into(), PORT),
            b"further",
        ),
    ];
    lab.all(&daemon, &behind, "denied", "rule_deny");
    // Form comes before it.
    let mut short = frame::udp(41_006, PORT);
    short.truncate(7);
    lab.all(&daemon, &v4_and_v6(2, 17, &short), "denied", "malformed");
    let loopback: IpAddr = Ipv4Addr::LOCALHOST.into();
    let martian = wire::udp(
        (loopback, 1),
        (Ipv4Addr::new(10, 1, 0, 1).into(), PORT),
        b"x",
    );
    lab.all(&daemon, &[martian], "denied", "martian");
    let own = v4_and_v6(1, 17, &frame::udp(41_007, PORT));
    lab.all(&daemon, &own, "denied", "spoofed");
}

#[test]
fn a_failsafe_at_an_interface_opens_no_other() {
    let lab = Lab::new();
    let stranger = Netns::new("stranger");
    lab.net.host.cable("eth1", &stranger, "eth0");
    lab.net
        .host
        .addresses("eth1", &["10.5.0.1/24", "fd05::1/64"]);
    let policy = format!(
        "{NOTHING}  admins: {{ members: [{{cidr: 10.1.0.2/32}}, {{cidr: \"fd01::2/128\"}}], \
         interfaces: [eth0] }}\n"
    );
    let daemon = Setup::new(&lab.net.host, "eth*", &policy)
        .with_settings(AT_ETH0)
        .with(&["--socket-hooks", "off"])
        .start();
    let from_stranger = Packets::new(&stranger, "eth0", false);
    let (from, to) = (
        wire::link_address(&stranger, "eth0"),
        wire::link_address(&lab.net.host, "eth1"),
    );
    for (v6, ethertype) in [(false, 0x0800), (true, 0x86dd)] {
        let delivered = Delivered::new(&lab.net.host, "eth1", ethertype);
        let syn = frame::tcp(42_000, PORT, frame::SYN);
        let datagram = frame::udp(42_000, PORT);
        for (protocol, bytes) in [(6, &syn), (17, &datagram)] {
            let genuine = packet(v6, 2, 1, protocol, bytes);
            lab.all(&daemon, &[genuine.clone()], "allowed", "failsafe");
            // The same packet from elsewhere: also now that there is a flow.
            let frame = wire::ethernet(from, to, &genuine);
            let counters = [
                ("tc_ingress", "denied", "spoofed"),
                ("tc_ingress", "allowed", "failsafe"),
            ];
            let counted = moved(&daemon, counters, || from_stranger.send(&frame));
            assert_eq!(counted, [1, 0], "{protocol}: {:#?}", daemon.denials(&[]));
            assert!(delivered.find(QUIET, |found| found == frame).is_none());
        }
    }
    // A failsafe is not bound where it names no interface, and comes before the segment's.
    daemon.swap(&elsewhere());
    let genuine = [false, true].map(|v6| packet(v6, 2, 1, 17, &frame::udp(42_001, PORT)));
    lab.all(&daemon, &genuine, "allowed", "failsafe");
    let other = [false, true].map(|v6| packet(v6, 2, 1, 17, &frame::udp(42_001, OTHER_PORT)));
    lab.all(&daemon, &other, "denied", "spoofed");
}

#[test]
fn datagrams_of_a_failsafe_are_answered_whatever_the_policy_says() {
    let lab = Lab::new();
    let servers =
        Family::BOTH.map(|family| traffic::udp(&lab.net.host, (family.address(1, 1), PORT), LONG));
    let clients =
        Family::BOTH.map(|family| traffic::udp(&lab.net.peer, (family.address(1, 2), 0), LONG));
    let mut daemon = Setup::new(&lab.net.host, "eth0", &denied())
        .with_settings(SETTINGS)
        .start();
    let mut bytes = [0; 8];
    for (server, client) in servers.iter().zip(&clients) {
        client
            .send_to(b"ask", server.local_addr().unwrap())
            .unwrap();
        let (_, from) = server.recv_from(&mut bytes).unwrap();
        server.send_to(b"answer", from).unwrap();
        client.recv_from(&mut bytes).unwrap();
    }
    daemon.swap(NOTHING);
    let (setup, _) = daemon.stop();
    daemon = setup.start();
    for (server, client) in servers.iter().zip(&clients) {
        let to = client.local_addr().unwrap();
        server.send_to(b"late", to).unwrap();
        let (length, _) = client.recv_from(&mut bytes).unwrap();
        assert_eq!(bytes[..length], *b"late");
    }
    daemon.swap(&denied());
    for (server, client) in servers.iter().zip(&clients) {
        let to = client.local_addr().unwrap();
        server.send_to(b"later", to).unwrap();
        let (length, _) = client.recv_from(&mut bytes).unwrap();
        assert_eq!(bytes[..length], *b"later");
    }
    assert_eq!(
        daemon.counted("", "denied", ""),
        0,
        "{:#?}",
        daemon.denials(&[])
    );
}
