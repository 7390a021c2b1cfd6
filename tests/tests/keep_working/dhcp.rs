//! A host gets and renews its addresses by DHCP and DHCPv6 under a policy that allows nothing,
//! with sockets like those of real clients and servers; nothing else passes for DHCP.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};

use enforcer_tests::{
    daemon::{Daemon, LONG, Setup, wait_for},
    frame,
    link::{self, BROADCAST, Delivered, Dhcp},
    netns::{Family, Netns, Pair, Routed},
    seen::moved,
    traffic::{self, QUIET, Tap},
    wire::{self, Packets},
};

use crate::lab::{Lab, NOTHING, allowing};

const SERVER: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 2);
const LEASED: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 77);
const CLIENT_PORT: u16 = 68;
const SERVER_PORT: u16 = 67;

/// A client without an address, at packet sockets, and a server at both kinds.
struct Lease<'a> {
    server_link: [u8; 6],
    client_link: [u8; 6],
    client_out: Packets,
    client_in: Delivered,
    server_out: Packets,
    server: UdpSocket,
    client: &'a Netns,
}

impl<'a> Lease<'a> {
    fn new(client: &'a Netns, server: &Netns) -> Self {
        Self {
            server_link: wire::link_address(server, "eth0"),
            client_link: wire::link_address(client, "eth0"),
            client_out: Packets::new(client, "eth0", false),
            client_in: Delivered::new(client, "eth0", 0x0800),
            server_out: Packets::new(server, "eth0", false),
            server: traffic::udp(server, (Ipv4Addr::UNSPECIFIED, SERVER_PORT), LONG),
            client,
        }
    }

    fn message(&self, kind: u8, transaction: u32) -> Dhcp {
        let gets = if matches!(kind, 2 | 5) {
            LEASED
        } else {
            Ipv4Addr::UNSPECIFIED
        };
        Dhcp {
            kind,
            transaction,
            client: self.client_link,
            has: Ipv4Addr::UNSPECIFIED,
            gets,
        }
    }

    /// The client broadcasts a message from no address.
    fn asks(&self, message: Dhcp) {
        let packet = wire::udp(
            (Ipv4Addr::UNSPECIFIED.into(), CLIENT_PORT),
            (Ipv4Addr::BROADCAST.into(), SERVER_PORT),
            &message.bytes(),
        );
        // ENOBUFS: dropped on the way out.
        let _ = self
            .client_out
            .try_send(&wire::ethernet(self.client_link, BROADCAST, &packet));
    }

    /// What the server hears.
    fn heard(&self) -> Option<(u8, u32)> {
        let mut bytes = [0; 1500];
        let (length, _) = self.server.recv_from(&mut bytes).ok()?;
        Dhcp::read(&bytes[..length])
    }

    /// The server answers: to the address to be, or to everybody.
    fn answers(&self, message: Dhcp, broadcast: bool) -> bool {
        let (to, link) = if broadcast {
            (Ipv4Addr::BROADCAST, BROADCAST)
        } else {
            (LEASED, self.client_link)
        };
        let packet = wire::udp(
            (SERVER.into(), SERVER_PORT),
            (to.into(), CLIENT_PORT),
            &message.bytes(),
        );
        self.server_out
            .send(&wire::ethernet(self.server_link, link, &packet));
        self.client_in
            .find(LONG, |frame| frame.get(14..) == Some(&packet))
            .is_some()
    }

    /// Discover, offer, request, acknowledgement.
    fn take(&self, transaction: u32, broadcast: bool) {
        for (question, answer) in [(1, 2), (3, 5)] {
            self.asks(self.message(question, transaction));
            assert_eq!(self.heard(), Some((question, transaction)));
            assert!(self.answers(self.message(answer, transaction), broadcast));
        }
    }

    /// Asks the server for more time, from the leased address, at an ordinary socket.
    fn renew(&self, transaction: u32) {
        let client = traffic::udp(self.client, (LEASED, CLIENT_PORT), LONG);
        let mut request = self.message(3, transaction);
        request.has = LEASED;
        client
            .send_to(&request.bytes(), (SERVER, SERVER_PORT))
            .unwrap();
        let mut bytes = [0; 1500];
        let (length, from) = self.server.recv_from(&mut bytes).unwrap();
        assert_eq!(Dhcp::read(&bytes[..length]), Some((3, transaction)));
        assert_eq!(from, SocketAddr::from((LEASED, CLIENT_PORT)));
        let answer = self.message(5, transaction).bytes();
        self.server.send_to(&answer, from).unwrap();
        let (length, _) = client.recv_from(&mut bytes).unwrap();
        assert_eq!(Dhcp::read(&bytes[..length]), Some((5, transaction)));
    }
}

/// Switches the essential off. The generation says nothing: this host's addresses change it, too.
fn without_dhcp(daemon: &Daemon<'_>) {
    daemon
        .setup
        .write_settings("version: 1\nessentials: {off: [dhcp]}\n");
    wait_for("the settings", LONG, || {
        let off = &daemon.status()["settings"]["essentials_off"];
        (off.as_array()?.len() == 1).then_some(())
    });
}

fn essentials_alone(daemon: &Daemon<'_>, work: impl FnOnce()) {
    let [denied, out, back] = moved(
        daemon,
        [
            ("", "denied", ""),
            ("tc_egress", "allowed", "essential"),
            ("tc_ingress", "allowed", "essential"),
        ],
        work,
    );
    assert_eq!(denied, 0, "{:#?}", daemon.denials(&[]));
    assert!(out >= 2 && back >= 2, "{out} {back}");
}

#[test]
fn a_host_takes_and_renews_a_lease_under_a_policy_that_allows_nothing() {
    let (client, server) = (Netns::new("client"), Netns::new("server"));
    client.cable("eth0", &server, "eth0");
    server.addresses("eth0", &["10.1.0.2/24"]);
    let daemon = Setup::new(&client, "eth0", NOTHING)
        .with_settings("version: 1\n")
        .start();
    let lease = Lease::new(&client, &server);
    essentials_alone(&daemon, || lease.take(1, false));
    essentials_alone(&daemon, || lease.take(2, true));
    client.addresses("eth0", &["10.1.0.77/24"]);
    wait_for("the address to be the host's own", LONG, || {
        let forged = wire::udp((LEASED.into(), 1), (SERVER.into(), 1), b"x");
        let frame = wire::ethernet(lease.server_link, lease.client_link, &forged);
        let [spoofed] = moved(&daemon, [("tc_ingress", "denied", "spoofed")], || {
            lease.server_out.send(&frame);
        });
        (spoofed == 1).then_some(())
    });
    essentials_alone(&daemon, || {
        lease.renew(3);
        lease.renew(4);
    });
    // Everything again from the beginning, as after a restart of the client.
    client.ip("addr flush dev eth0 scope global\n");
    essentials_alone(&daemon, || lease.take(5, false));

    // Switched off, it is judged like anything else.
    without_dhcp(&daemon);
    lease.server.set_read_timeout(Some(QUIET)).unwrap();
    let [denied] = moved(&daemon, [("tc_egress", "denied", "default_deny")], || {
        lease.asks(lease.message(1, 6));
        assert_eq!(lease.heard(), None);
    });
    assert_eq!(denied, 1);
    daemon.swap(&format!(
        "{NOTHING}rules:\n  - {{ name: dhcp, from: [all], to: [multicast], services: [dhcp] }}\n"
    ));
    let [allowed] = moved(&daemon, [("tc_egress", "allowed", "rule_allow")], || {
        lease.asks(lease.message(1, 7));
        assert_eq!(lease.heard(), Some((1, 7)));
    });
    assert_eq!(allowed, 1);
}

#[test]
fn what_only_looks_like_dhcp_is_denied() {
    let lab = Lab::new();
    let daemon = Setup::new(&lab.net.host, "eth0", NOTHING)
        .with(&["--socket-hooks", "off"])
        .start();
    let ip = |text: &str| -> IpAddr { text.parse().unwrap() };
    let udp = |from: (&str, u16), to: (&str, u16)| {
        wire::udp((ip(from.0), from.1), (ip(to.0), to.1), b"rogue")
    };
    let tcp = wire::checksummed(frame::ip(
        ip("10.1.0.2"),
        ip("10.1.0.1"),
        6,
        &frame::tcp(67, 68, frame::SYN),
    ));
    let rogue = [
        // Not the two ports; not this direction; to one host instead of all.
        udp(("10.1.0.2", 1067), ("10.1.0.1", 68)),
        udp(("10.1.0.2", 67), ("10.1.0.1", 69)),
        udp(("10.1.0.2", 68), ("10.1.0.1", 68)),
        udp(("10.1.0.2", 68), ("10.1.0.1", 67)),
        udp(("10.1.0.2", 68), ("10.1.0.255", 67)),
        tcp,
        // DHCPv6 from an address that is not of the link, and to one host.
        udp(("fd01::2", 547), ("fd01::1", 546)),
        udp(("fe80::2", 546), ("fd01::1", 547)),
        udp(("fe80::2", 1547), ("fd01::1", 546)),
        udp(("fe80::2", 546), ("ff02::1", 547)),
    ];
    lab.all(&daemon, &rogue, "denied", "default_deny");
    // A client must not serve.
    let serves = [
        udp(("10.1.0.1", 67), ("10.1.0.2", 68)),
        udp(("fd01::1", 547), ("fd01::2", 546)),
    ];
    lab.all_out(&daemon, &serves, "denied", "default_deny");
}

#[test]
fn dhcp_to_another_network_is_judged_by_the_rules() {
    let net = Routed::new();
    let daemon = Setup::new(&net.gateway, "gw-*", NOTHING)
        .with(&["--socket-hooks", "off"])
        .start();
    let (a, b) = (Family::V4.address(1, 2), Family::V4.address(2, 2));
    let tap = Tap::new(&net.b);
    let answer = wire::udp((a, 67), (b, 68), b"an answer nobody asked for");
    let [passed, denied] = moved(
        &daemon,
        [
            ("tc_ingress", "allowed", "essential"),
            ("tc_egress", "denied", "default_deny"),
        ],
        || traffic::send_raw(&net.a, &answer),
    );
    assert!(passed >= 1 && denied == 1, "{passed} {denied}");
    assert!(!tap.sees(&answer[20..], QUIET));
    let question = wire::udp((a, 68), (b, 67), b"a question to another network");
    let [denied] = moved(&daemon, [("tc_ingress", "denied", "default_deny")], || {
        traffic::send_raw(&net.a, &question);
    });
    assert_eq!(denied, 1);
    assert!(!tap.sees(&question[20..], QUIET));

    // A relay agent's way needs its rule, and then has its answer.
    daemon.swap(&format!(
        "{NOTHING}  relay: {{ members: [{{cidr: 10.1.0.2/32}}] }}\n\
         rules:\n  - {{ name: relay, from: [relay], to: [all], services: [dhcp] }}\n"
    ));
    let relayed = wire::udp((a, 67), (b, 67), b"relayed");
    traffic::send_raw(&net.a, &relayed);
    assert!(tap.sees(&relayed[20..], LONG));
    let tap = Tap::new(&net.a);
    let answer = wire::udp((b, 67), (a, 67), b"answered");
    traffic::send_raw(&net.b, &answer);
    assert!(tap.sees(&answer[20..], LONG));
}

/// Kinds of DHCPv6 messages.
const EXCHANGE: [(u8, u8); 3] = [(1, 2), (3, 7), (5, 7)];

#[test]
fn a_host_takes_and_renews_ipv6_addresses_under_a_policy_that_allows_nothing() {
    let net = Pair::new();
    let daemon = Setup::new(&net.host, "eth0", NOTHING)
        .with_settings("version: 1\n")
        .start();
    let servers: Ipv6Addr = "ff02::1:2".parse().unwrap();
    let at = |namespace: &Netns, ip: Ipv6Addr, port: u16, limit| {
        namespace.enter(|| {
            let scope = nix::net::if_::if_nametoindex("eth0").unwrap();
            let address = SocketAddrV6::new(ip, port, 0, scope);
            let socket = UdpSocket::bind(address).unwrap();
            socket.set_read_timeout(Some(limit)).unwrap();
            (socket, scope)
        })
    };
    let (host_ip, peer_ip) = (
        link::link_local(&net.host, "eth0"),
        link::link_local(&net.peer, "eth0"),
    );
    let (client, client_scope) = at(&net.host, host_ip, 546, LONG);
    let (server, server_scope) = at(&net.peer, Ipv6Addr::UNSPECIFIED, 547, LONG);
    server.join_multicast_v6(&servers, server_scope).unwrap();
    let ask = |bytes: &[u8]| {
        let to = SocketAddrV6::new(servers, 547, 0, client_scope);
        client.send_to(bytes, to)
    };
    let mut bytes = [0; 64];
    // Solicit and advertise, request and reply, renew and reply.
    essentials_alone(&daemon, || {
        for (question, answer) in EXCHANGE {
            ask(&[question, 1, 2, 3]).unwrap();
            let (length, from) = server.recv_from(&mut bytes).unwrap();
            assert_eq!(bytes[..length], [question, 1, 2, 3]);
            server.send_to(&[answer, 1, 2, 3], from).unwrap();
            let (length, from) = client.recv_from(&mut bytes).unwrap();
            assert_eq!(bytes[..length], [answer, 1, 2, 3]);
            assert_eq!(from.ip(), IpAddr::V6(peer_ip));
        }
    });

    without_dhcp(&daemon);
    server.set_read_timeout(Some(QUIET)).unwrap();
    let [denied] = moved(&daemon, [("tc_egress", "denied", "default_deny")], || {
        let _ = ask(&[1, 1, 2, 3]);
        assert!(server.recv_from(&mut bytes).is_err());
    });
    assert_eq!(denied, 1);
}

#[test]
fn a_server_that_an_enforcer_protects_hears_clients_without_addresses() {
    let net = Pair::new();
    let daemon = Setup::new(&net.host, "eth0", &allowing("dhcp")).start();
    let server = traffic::udp(&net.host, (Ipv4Addr::UNSPECIFIED, SERVER_PORT), LONG);
    let client = Packets::new(&net.peer, "eth0", false);
    let link = wire::link_address(&net.peer, "eth0");
    let message = Dhcp {
        kind: 1,
        transaction: 9,
        client: link,
        has: Ipv4Addr::UNSPECIFIED,
        gets: Ipv4Addr::UNSPECIFIED,
    };
    let packet = wire::udp(
        (Ipv4Addr::UNSPECIFIED.into(), CLIENT_PORT),
        (Ipv4Addr::BROADCAST.into(), SERVER_PORT),
        &message.bytes(),
    );
    client.send(&wire::ethernet(link, BROADCAST, &packet));
    let mut bytes = [0; 1500];
    let (length, _) = server.recv_from(&mut bytes).unwrap();
    assert_eq!(Dhcp::read(&bytes[..length]), Some((1, 9)));
    // One with an address asks this server alone: that is a rule's matter, as is the answer.
    let client = traffic::udp(&net.peer, (SERVER, CLIENT_PORT), LONG);
    client
        .send_to(&message.bytes(), (Ipv4Addr::new(10, 1, 0, 1), SERVER_PORT))
        .unwrap();
    let (_, from) = server.recv_from(&mut bytes).unwrap();
    server.send_to(&message.bytes(), from).unwrap();
    client.recv_from(&mut bytes).unwrap();
    assert_eq!(daemon.counted("", "denied", ""), 0);
}
