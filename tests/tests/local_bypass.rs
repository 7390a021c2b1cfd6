//! Ways for a local process to send: what is allowed arrives, what is denied does not, whatever
//! the socket and the system call, and the record says where it ended and who it was.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd as _,
    time::Instant,
};

use enforcer_tests::{
    calls::{self, DATA, Form, Way},
    daemon::{Daemon, LONG, Setup},
    netns::{Family, Netns, Pair},
    seen::{denied, moved, skipped},
    traffic::{self, QUIET, Tap},
    wire::{self, Packets},
};
use nix::{errno::Errno, sys::prctl};
use serde_json::{Value, json};

/// `peer` may be sent to at its ports, `other` in ways that have none, of which each has an
/// address of its own that it may not send to: a record of it is nobody else's.
const POLICY: &str = r#"version: 1
segments:
  peer:
    members:
      - { cidr: 10.1.0.2/32 }
      - { range: 10.1.0.100-10.1.0.199 }
      - { cidr: "fd01::2/128" }
      - { range: "fd01::64-fd01::c7" }
  other: { members: [{cidr: 10.1.0.3/32}, {cidr: "fd01::3/128"}] }
rules:
  - { name: ports, from: [any], to: [peer], services: [tcp/7000-7099, udp/7000-7099] }
  - { name: portless, from: [any], to: [other], services: [ping, udplite/any] }
"#;

/// Where a denial is recorded when the calls are allowed to refuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Connect,
    Sendmsg,
    /// No call is refused. The process is known if one of the calls was seen.
    Tc,
}

use By::{Connect, Sendmsg, Tc};
use Form::{Mapped, V4, V4OnV6, V6};

/// Each way: by whom it is refused, and whether the process is known when only TC drops.
const WAYS: &[(Way, &[Form], By, bool)] = &[
    (Way::TcpConnect, &[V4, V6, Mapped], Connect, true),
    (Way::TcpFastOpen, &[V4, V6, Mapped], Connect, true),
    (Way::RingConnect, &[V4, V6, Mapped], Connect, true),
    (Way::MptcpConnect, &[V4, V6, Mapped], Connect, true),
    (Way::UdpConnect, &[V4, V6, Mapped], Connect, true),
    (Way::UdpSendto, &[V4, V6, Mapped, V4OnV6], Sendmsg, true),
    (Way::UdpSendmsg, &[V4, V6, Mapped, V4OnV6], Sendmsg, true),
    (Way::UdpSendmmsg, &[V4, V6, Mapped, V4OnV6], Sendmsg, true),
    (Way::UdpSegment, &[V4, V6, Mapped], Sendmsg, true),
    (Way::RingSendmsg, &[V4, V6, Mapped], Sendmsg, true),
    (Way::RingSend, &[V4, V6, Mapped], Sendmsg, true),
    (Way::UdpLiteConnect, &[V4, V6], Tc, false),
    (Way::UdpLiteSendto, &[V4, V6], Tc, true),
    (Way::Ping, &[V4, V6], Tc, false),
    (Way::RawIcmp, &[V4, V6], Tc, false),
    (Way::RawUdp, &[V4, V6], Tc, false),
    (Way::RawHeader, &[V4, V6], Tc, false),
];

struct Bench<'a> {
    net: &'a Pair,
    tap: Tap,
    port: std::cell::Cell<u16>,
}

fn pair() -> Pair {
    let net = Pair::new();
    net.peer.addresses("eth0", &["10.1.0.3/24", "fd01::3/64"]);
    // Data in a SYN without a cookie.
    net.host.sysctl("ipv4/tcp_fastopen", "1543");
    net
}

impl<'a> Bench<'a> {
    fn new(net: &'a Pair) -> Self {
        let this = Self {
            net,
            tap: Tap::new(&net.peer),
            port: 0.into(),
        };
        for family in Family::BOTH {
            this.neighbour(family.address(1, 2));
            this.neighbour(family.address(1, 3));
        }
        this
    }

    /// Link addresses are known beforehand: what is sent leaves before the call returns.
    fn neighbour(&self, address: IpAddr) {
        let link = wire::link_address(&self.net.peer, "eth0").map(|byte| format!("{byte:02x}"));
        self.net.host.ip(&format!(
            "neigh replace {address} lladdr {} dev eth0 nud permanent\n",
            link.join(":")
        ));
    }

    /// Where this way may send, and where it may not.
    fn destinations(&self, way: Way, form: Form) -> (SocketAddr, SocketAddr) {
        let family = if form == V6 { Family::V6 } else { Family::V4 };
        let at = self.port.replace(self.port.get() + 1) % 100;
        match way.protocol(form == V6) {
            6 | 17 => (
                (family.address(1, 2), 7000 + at).into(),
                (family.address(1, 2), 7100 + at).into(),
            ),
            // The number identifies a ping.
            _ => {
                let bad = family.address(1, 100 + u8::try_from(at).unwrap());
                self.neighbour(bad);
                (
                    (family.address(1, 3), 1000 + at).into(),
                    (bad, 1000 + at).into(),
                )
            }
        }
    }

    fn own(to: SocketAddr) -> IpAddr {
        let family = if to.is_ipv4() { Family::V4 } else { Family::V6 };
        family.address(1, 1)
    }

    /// Sends from a thread with a name of its own.
    fn send(&self, way: Way, form: Form, to: SocketAddr) -> nix::Result<()> {
        self.net.host.enter(|| {
            prctl::set_name(c"enft-local").unwrap();
            way.send(form, to, Self::own(to))
        })
    }

    fn arrives(&self, way: Way, to: SocketAddr) -> bool {
        let start = Instant::now();
        while let Some(left) = LONG.checked_sub(start.elapsed()) {
            match self.tap.next(left) {
                Some(frame) if is(&frame, way, to) => return true,
                Some(_) => {}
                None => return false,
            }
        }
        false
    }

    /// Whether a frame of this way came before one that is sent now.
    fn has_arrived(&self, way: Way, to: SocketAddr) -> bool {
        let last = SocketAddr::new(Self::own(to), 0);
        let peer = SocketAddr::new(peer_of(last.ip()), 7099);
        let socket = traffic::udp(&self.net.host, last, LONG);
        socket.send_to(DATA, peer).unwrap();
        let from = socket.local_addr().unwrap().port().to_be_bytes();
        let start = Instant::now();
        let mut arrived = false;
        while start.elapsed() < LONG {
            let frame = self.tap.next(LONG).expect("the last frame");
            arrived |= is(&frame, way, to);
            let at = if peer.is_ipv4() { 34 } else { 54 };
            if wire::is_to(&frame, peer, 17) && frame[at..at + 2] == from {
                return arrived;
            }
        }
        panic!("the last frame does not arrive");
    }
}

fn peer_of(own: IpAddr) -> IpAddr {
    let family = if own.is_ipv4() {
        Family::V4
    } else {
        Family::V6
    };
    family.address(1, 2)
}

fn is(frame: &[u8], way: Way, to: SocketAddr) -> bool {
    let protocol = way.protocol(to.is_ipv6());
    let to = match protocol {
        6 | 17 => to,
        _ => SocketAddr::new(to.ip(), 0),
    };
    wire::is_to(frame, to, protocol)
}

/// What a record of a denied packet of this way says, but for the process.
fn record(way: Way, to: SocketAddr, direction: &str) -> Value {
    let protocol = way.protocol(to.is_ipv6());
    let mut record = json!({
        "verdict": "DENIED", "reason": "default_deny", "direction": direction,
        "dst": to.ip().to_string(), "to_segments": ["peer"],
        "interface": (direction == "egress").then_some("eth0"),
        "protocol": match protocol {
            1 => "icmp",
            6 => "tcp",
            17 => "udp",
            58 => "icmpv6",
            _ => "udplite",
        },
    });
    if matches!(protocol, 6 | 17) {
        record["dst_port"] = to.port().into();
    }
    record
}

const DENIED: [(&str, &str, &str); 3] = [
    ("connect", "denied", ""),
    ("sendmsg", "denied", ""),
    ("tc_egress", "denied", ""),
];

fn every_way(daemon: &Daemon<'_>, net: &Pair, refuse: bool) {
    let bench = Bench::new(net);
    for &(way, forms, by, known) in WAYS {
        for &form in forms {
            let what = format!("{way:?} {form:?}");
            let (good, bad) = bench.destinations(way, form);
            let missing = net.host.enter(|| way.missing(form, Bench::own(good)));
            if let Some(errno) = missing {
                skipped(&format!("{what} is not in this kernel: {errno}"));
                continue;
            }
            // Nobody listens, and the peer may already have said so.
            let said = bench.send(way, form, good);
            let heard = matches!(said, Ok(()) | Err(Errno::ECONNREFUSED));
            assert!(heard, "{what}: {said:?}");
            assert!(bench.arrives(way, good), "{what}: allowed");

            let by = if refuse { by } else { Tc };
            let mut said = Ok(());
            let counts = moved(daemon, DENIED, || said = bench.send(way, form, bad));
            let (direction, expected) = match by {
                Connect => ("connect", [1, 0, 0]),
                Sendmsg => ("sendmsg", [0, 1, 0]),
                Tc => ("egress", [0, 0, 1]),
            };
            // Told that the data was dropped, TCP Fast Open tries once without.
            let tries = if way == Way::TcpFastOpen { 2 } else { 1 };
            let once = [counts[0], counts[1], counts[2].div_ceil(tries)];
            assert_eq!(once, expected, "{what}: {counts:?} {said:?}");
            if by == Tc {
                // Some senders are told of a drop on the way out.
                assert!(
                    matches!(said, Ok(()) | Err(Errno::ENOBUFS)),
                    "{what}: {said:?}"
                );
            } else {
                assert_eq!(said, Err(Errno::EPERM), "{what}");
            }
            assert!(!bench.has_arrived(way, bad), "{what}");
            let record = denied(daemon, &record(way, bad, direction));
            let process = &record["process"];
            if by == Tc && !known {
                assert_eq!(process, &Value::Null, "{what}");
            } else {
                assert_eq!(process["pid"], std::process::id(), "{what}: {record:#}");
                assert_eq!(process["comm"], "enft-local", "{what}");
            }
        }
    }
}

fn start<'a>(namespace: &'a Netns, hooks: &str) -> Daemon<'a> {
    let daemon = Setup::new(namespace, "eth0", POLICY)
        .with(&["--socket-hooks", hooks])
        .start();
    assert_eq!(daemon.status()["socket_hooks"], hooks);
    daemon
}

#[test]
fn every_way_to_send_is_refused_or_dropped() {
    let net = pair();
    every_way(&start(&net.host, "refuse"), &net, true);
}

/// The calls are no boundary: TC alone drops as much.
#[test]
fn every_way_to_send_is_dropped_without_refusals() {
    let net = pair();
    every_way(&start(&net.host, "observe"), &net, false);
}

/// A call with several datagrams ends at the first that is refused.
#[test]
fn a_batch_of_datagrams_ends_where_one_is_denied() {
    let net = pair();
    let daemon = start(&net.host, "refuse");
    let bench = Bench::new(&net);
    for (family, form) in [(Family::V4, V4), (Family::V6, V6)] {
        let [first, second, third] =
            [7050, 7150, 7051].map(|port| SocketAddr::new(family.address(1, 2), port));
        let socket = net.host.enter(|| form.socket(libc::SOCK_DGRAM, 0)).unwrap();
        let to = [first, second, third].map(Into::into);
        let sent = calls::sendmmsg(socket.as_raw_fd(), &to);
        assert_eq!(sent, Ok(1), "{family:?}");
        assert!(bench.arrives(Way::UdpSendmmsg, first));
        for (to, why) in [(second, "denied"), (third, "not sent")] {
            assert!(
                !bench.has_arrived(Way::UdpSendmmsg, to),
                "{family:?}: {why}"
            );
        }
        denied(&daemon, &record(Way::UdpSendmmsg, second, "sendmsg"));
    }
}

/// Frames of a packet socket, with CAP_NET_RAW.
fn frames(net: &Pair, bypass: bool, to: SocketAddr) {
    let links = [&net.host, &net.peer].map(|end| wire::link_address(end, "eth0"));
    let packets = Packets::new(&net.host, "eth0", bypass);
    let own = Bench::own(to);
    calls::packet(&packets, (links[0], links[1]), own, to);
}

#[test]
fn packet_sockets_pass_tc_unless_they_bypass_the_queue() {
    let net = pair();
    let daemon = start(&net.host, "refuse");
    let bench = Bench::new(&net);
    let egress = [
        ("tc_egress", "denied", "default_deny"),
        ("tc_egress", "allowed", "rule_allow"),
    ];
    for family in Family::BOTH {
        let good = SocketAddr::new(family.address(1, 2), 7060);
        let bad = SocketAddr::new(family.address(1, 2), 7160);
        let counts = moved(&daemon, egress, || frames(&net, false, good));
        assert_eq!(counts, [0, 1], "{family:?}");
        assert!(bench.arrives(Way::UdpSendto, good));
        let counts = moved(&daemon, egress, || frames(&net, false, bad));
        assert_eq!(counts, [1, 0], "{family:?}");
        assert!(!bench.has_arrived(Way::UdpSendto, bad));
        let record = denied(&daemon, &record(Way::UdpSendto, bad, "egress"));
        assert_eq!(record["process"], Value::Null, "{family:?}");

        // A limit, pinned: the host that has such a process cannot see it…
        let counts = moved(&daemon, egress, || frames(&net, true, bad));
        assert_eq!(counts, [0, 0], "{family:?}");
        assert!(bench.arrives(Way::UdpSendto, bad), "{family:?}");
    }
    // … and the one that it sends to, or a gateway between them, can.
    let receiver = start(&net.peer, "off");
    for family in Family::BOTH {
        let good = SocketAddr::new(family.address(1, 2), 7061);
        let bad = SocketAddr::new(family.address(1, 2), 7161);
        let [heard, unheard] = [good, bad].map(|at| traffic::udp(&net.peer, at, LONG));
        unheard.set_read_timeout(Some(QUIET)).unwrap();
        frames(&net, true, good);
        assert_eq!(heard.recv(&mut [0; 16]).unwrap(), DATA.len(), "{family:?}");
        let ingress = [("tc_ingress", "denied", "default_deny")];
        let counts = moved(&receiver, ingress, || {
            frames(&net, true, bad);
            assert!(unheard.recv(&mut [0; 16]).is_err(), "{family:?}");
        });
        assert_eq!(counts, [1], "{family:?}");
        // Another: packet sockets of the receiver get their copy before TC.
        assert!(bench.arrives(Way::UdpSendto, bad), "{family:?}");
        denied(
            &receiver,
            &json!({
                "direction": "ingress", "interface": "eth0", "reason": "default_deny",
                "dst": bad.ip().to_string(), "dst_port": bad.port(),
            }),
        );
    }
}
