//! The socket hooks refuse only what TC denies, and only to processes of the enforcer's own
//! network namespace: random policies, real sockets.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{
    cell::{Cell, RefCell},
    fmt::Write as _,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    os::fd::AsRawFd as _,
    time::{Duration, Instant},
};

use enforcer::{
    daemon::environment::Host,
    dataplane::{Dataplane as _, SocketHooks},
    policy::{SourceFile, model::Environment, parse},
};
use enforcer_common::{
    image::SIZE_CLASSES,
    verdict::{Hook, Outcome, Reason},
};
use enforcer_tests::{
    kernel::{self, Programs},
    netns::Netns,
    scale,
    traffic::Tap,
};
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockType, SockaddrIn, SockaddrIn6, bind, connect, send,
        sendto, socket,
    },
};
use proptest::{
    prelude::*,
    sample::{select, subsequence},
    test_runner::{Config, FileFailurePersistence, TestError, TestRunner},
};

const POLICIES: usize = 80;
/// Where every instruction is emulated.
const FEWER: usize = 40;
const ATTEMPTS: usize = 10;

/// Addresses of the host, then of the peer; both families alike.
const LOCAL: [&str; 3] = ["10.1.0.1", "10.1.0.3", "10.1.1.1"];
const REMOTE: [&str; 3] = ["10.1.0.2", "10.1.0.4", "10.1.1.2"];
const LOCAL6: [&str; 3] = ["fd01::1", "fd01::3", "fd01:0:0:1::1"];
const REMOTE6: [&str; 3] = ["fd01::2", "fd01::4", "fd01:0:0:1::2"];

/// How a socket speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    TcpConnect,
    UdpConnect,
    UdpSendto,
}

/// IPv4, IPv6, or IPv4 on an IPv6 socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    V4,
    V6,
    Mapped,
}

#[derive(Clone, Debug)]
struct Attempt {
    call: Call,
    kind: Kind,
    /// Which local address it is bound to.
    source: Option<usize>,
    destination: usize,
    port: u16,
}

impl Attempt {
    fn address(&self, v4: [&str; 3], v6: [&str; 3], at: usize) -> IpAddr {
        match self.kind {
            Kind::V4 | Kind::Mapped => v4[at].parse().unwrap(),
            Kind::V6 => v6[at].parse().unwrap(),
        }
    }

    fn to(&self) -> SocketAddr {
        let address = self.address(REMOTE, REMOTE6, self.destination);
        (address, self.port).into()
    }

    /// Makes a socket and the call; what the call said. TCP does not wait for an answer.
    fn make(&self) -> nix::Result<()> {
        let family = match self.kind {
            Kind::V4 => AddressFamily::Inet,
            Kind::V6 | Kind::Mapped => AddressFamily::Inet6,
        };
        let kind = match self.call {
            Call::TcpConnect => SockType::Stream,
            Call::UdpConnect | Call::UdpSendto => SockType::Datagram,
        };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(family, kind, flags, None).unwrap();
        if let Some(at) = self.source {
            let from = SocketAddr::new(self.address(LOCAL, LOCAL6, at), 0);
            with(
                self.kind,
                from,
                |a| bind(socket.as_raw_fd(), a),
                |a| bind(socket.as_raw_fd(), a),
            )
            .unwrap();
        }
        let fd = socket.as_raw_fd();
        let connected = || with(self.kind, self.to(), |a| connect(fd, a), |a| connect(fd, a));
        let (hello, none) = (b"hello", MsgFlags::empty());
        match self.call {
            Call::TcpConnect => connected(),
            Call::UdpConnect => {
                connected()?;
                send(fd, hello, none).map(drop)
            }
            Call::UdpSendto => with(
                self.kind,
                self.to(),
                |a| sendto(fd, hello, a, none),
                |a| sendto(fd, hello, a, none),
            )
            .map(drop),
        }
    }
}

/// Calls with the address in the socket's form.
fn with<T>(
    kind: Kind,
    address: SocketAddr,
    v4: impl FnOnce(&SockaddrIn) -> T,
    v6: impl FnOnce(&SockaddrIn6) -> T,
) -> T {
    let six =
        |ip: Ipv6Addr| SockaddrIn6::from(std::net::SocketAddrV6::new(ip, address.port(), 0, 0));
    match (kind, address) {
        (Kind::V4, SocketAddr::V4(a)) => v4(&SockaddrIn::from(a)),
        (Kind::Mapped, SocketAddr::V4(a)) => v6(&six(a.ip().to_ipv6_mapped())),
        (Kind::V6, SocketAddr::V6(a)) => v6(&six(*a.ip())),
        other => panic!("{other:?}"),
    }
}

fn attempt() -> impl Strategy<Value = Attempt> {
    (
        select(vec![Call::TcpConnect, Call::UdpConnect, Call::UdpSendto]),
        select(vec![Kind::V4, Kind::V6, Kind::Mapped]),
        prop_oneof![Just(None), (0..3usize).prop_map(Some)],
        0..3usize,
        5001..=5003u16,
    )
        .prop_map(|(call, kind, source, destination, port)| Attempt {
            call,
            kind,
            source,
            destination,
            port,
        })
}

/// A policy as YAML, over the addresses of both sides.
fn policy() -> impl Strategy<Value = String> {
    let members = || subsequence((0..6usize).collect::<Vec<_>>(), 1..=4);
    let mode = || select(vec!["enforce", "enforce", "enforce", "observe", "off"]);
    let protect = || select(vec!["both", "both", "inbound", "outbound"]);
    let segments = proptest::collection::vec((members(), members(), mode(), protect()), 1..=3);
    let defaults = (mode(), select(vec!["allow", "allow", "deny"]));
    (defaults, segments).prop_flat_map(|((mode, unsegmented), segments)| {
        let mut text = format!(
            "version: 1\ndefaults: {{ mode: {mode}, unsegmented: {unsegmented} }}\nsegments:\n"
        );
        let mut ends = vec![
            "any".to_owned(),
            "unsegmented".to_owned(),
            "host".to_owned(),
        ];
        for (number, (v4, v6, mode, protect)) in segments.into_iter().enumerate() {
            let both = |local: [&str; 3], remote: [&str; 3], at: usize| {
                [local, remote].concat()[at].to_owned()
            };
            let v4 = v4.into_iter().map(|at| both(LOCAL, REMOTE, at) + "/32");
            let v6 = v6.into_iter().map(|at| both(LOCAL6, REMOTE6, at) + "/128");
            let members: Vec<String> = v4.chain(v6).map(|m| format!("{{cidr: \"{m}\"}}")).collect();
            let members = members.join(", ");
            writeln!(
                text,
                "  s{number}: {{ mode: {mode}, protect: {protect}, members: [{members}] }}"
            )
            .unwrap();
            // Named more often than the built-in ones.
            ends.extend([format!("s{number}"), format!("s{number}")]);
        }
        let service = select(vec![
            "any",
            "tcp/5001",
            "udp/5001-5002",
            "tcp/5002-5003",
            "udp/5003",
        ]);
        let action = select(vec!["allow", "allow", "deny"]);
        let rule = (select(ends.clone()), select(ends), service, action);
        proptest::collection::vec(rule, 0..=4).prop_map(move |rules| {
            let mut text = text.clone();
            if !rules.is_empty() {
                text += "rules:\n";
            }
            for (number, (from, to, service, action)) in rules.into_iter().enumerate() {
                writeln!(
                    text,
                    "  - {{ name: r{number}, from: [{from}], to: [{to}], \
                     services: [{service}], action: {action} }}"
                )
                .unwrap();
            }
            text
        })
    })
}

/// Packets that TC let out and dropped, so far, but for what the host says of itself: it solicits
/// routers and reports groups when it likes.
fn judged(programs: &Programs) -> (u64, u64) {
    let counters = programs.counters();
    let sum = |passed: bool| {
        counters
            .packets
            .iter()
            .filter(|c| c.hook == Hook::TcEgress && c.outcome.passes() == passed)
            .filter(|c| c.reason != Reason::Essential)
            .map(|c| c.packets)
            .sum()
    };
    (sum(true), sum(false))
}

/// The hosts of the test: the enforced one, its peer, and one with the same addresses as the
/// first that nobody enforces.
struct Net {
    host: Netns,
    peer: Netns,
    twin: Netns,
    _other: Netns,
}

impl Net {
    fn new() -> Self {
        let this = Self {
            host: Netns::new("host"),
            peer: Netns::new("peer"),
            twin: Netns::new("twin"),
            _other: Netns::new("other"),
        };
        this.host.cable("eth0", &this.peer, "eth0");
        this.twin.cable("eth0", &this._other, "eth0");
        let length = |a: &&str| format!("{a}/{}", if a.contains(':') { 64 } else { 24 });
        let mine: Vec<String> = LOCAL.iter().chain(&LOCAL6).map(length).collect();
        let theirs: Vec<String> = REMOTE.iter().chain(&REMOTE6).map(length).collect();
        let refs = |v: &[String]| v.iter().map(String::as_str).collect::<Vec<_>>().join(" ");
        for (namespace, addresses) in [
            (&this.host, &mine),
            (&this.twin, &mine),
            (&this.peer, &theirs),
            (&this._other, &theirs),
        ] {
            let addresses = refs(addresses);
            namespace.addresses("eth0", &addresses.split(' ').collect::<Vec<_>>());
        }
        // Link addresses are known beforehand: a call's packet is judged before the call returns.
        for (namespace, ends) in [
            (&this.host, [REMOTE, REMOTE6]),
            (&this.peer, [LOCAL, LOCAL6]),
        ] {
            let other = if std::ptr::eq(namespace, &this.host) {
                &this.peer
            } else {
                &this.host
            };
            let link = other.ask("ip", &["-br", "link", "show", "eth0"]).unwrap();
            let link = link.split_whitespace().nth(2).unwrap().to_owned();
            for end in ends.concat() {
                namespace.ip(&format!(
                    "neigh replace {end} lladdr {link} dev eth0 nud permanent\n"
                ));
            }
        }
        this
    }
}

/// Whether a frame is an IP packet to this end.
fn is_to(frame: &[u8], to: SocketAddr, call: Call) -> bool {
    let protocol = if call == Call::TcpConnect { 6 } else { 17 };
    let (found, at, address) = match (frame.get(12..14), to.ip()) {
        (Some([0x08, 0x00]), IpAddr::V4(ip)) => (frame[23], 34, frame[30..34] == ip.octets()),
        (Some([0x86, 0xdd]), IpAddr::V6(ip)) => (frame[20], 54, frame[38..54] == ip.octets()),
        _ => return false,
    };
    address && found == protocol && frame[at + 2..at + 4] == to.port().to_be_bytes()
}

#[test]
fn connect_hooks_refuse_only_what_tc_denies() {
    let net = Net::new();
    let (mut programs, environment) = net.host.enter(|| {
        let mut programs = Programs::load(SIZE_CLASSES[0] as usize);
        let host = Host::read().unwrap();
        let open = "version: 1\nsegments: { x: { members: [{cidr: 192.0.2.1/32}] } }\n";
        programs.apply(&compile(open, &host.environment));
        let eth0 = host.links.iter().find(|l| l.name == "eth0").unwrap();
        programs
            .dataplane
            .attach(&eth0.interface(0).unwrap())
            .unwrap();
        (programs, host.environment)
    });
    let tap = Tap::new(&net.peer);
    let programs = RefCell::new(&mut programs);
    let (refused, dropped, passed) = (Cell::new(0u32), Cell::new(0u32), Cell::new(0u32));
    let case = (policy(), proptest::collection::vec(attempt(), ATTEMPTS));
    let mut runner = TestRunner::new(Config {
        cases: scale::rounds(POLICIES, FEWER) as u32,
        max_shrink_iters: 200,
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/proptest-regressions/connect_hooks.txt"
        )))),
        ..Config::default()
    });
    let result = runner.run(&case, |(policy, attempts)| {
        let mut programs = programs.borrow_mut();
        programs.forget_flows();
        programs.apply(&compile(&policy, &environment));
        programs
            .dataplane
            .socket_hooks(SocketHooks::Refuse)
            .unwrap();
        let elsewhere: Vec<_> = net
            .twin
            .enter(|| attempts.iter().map(Attempt::make).collect());
        for (attempt, said) in attempts.iter().zip(elsewhere) {
            prop_assert!(
                said != Err(Errno::EPERM),
                "in another namespace: {attempt:?}"
            );
        }
        let said: Vec<_> = net
            .host
            .enter(|| attempts.iter().map(Attempt::make).collect());
        programs.dataplane.socket_hooks(SocketHooks::Off).unwrap();
        while tap.next(Duration::ZERO).is_some() {}
        for (attempt, said) in attempts.iter().zip(said) {
            let before = judged(&programs);
            let again = net.host.enter(|| attempt.make());
            prop_assert!(again != Err(Errno::EPERM), "the hooks are off: {attempt:?}");
            let after = judged(&programs);
            let (out, denied) = (after.0 - before.0, after.1 - before.1);
            if said == Err(Errno::EPERM) {
                refused.set(refused.get() + 1);
                prop_assert!(
                    (out, denied) == (0, 1),
                    "TC let {out} out, dropped {denied}: {attempt:?}"
                );
                let start = Instant::now();
                while let Some(frame) = tap.next(Duration::ZERO) {
                    prop_assert!(
                        !is_to(&frame, attempt.to(), attempt.call),
                        "{attempt:?} arrived"
                    );
                    prop_assert!(start.elapsed() < scale::within(Duration::from_secs(5)));
                }
            } else if denied > 0 {
                dropped.set(dropped.get() + 1);
            } else {
                passed.set(passed.get() + 1);
                let arrived =
                    std::iter::from_fn(|| tap.next(scale::within(Duration::from_secs(5))))
                        .any(|frame| is_to(&frame, attempt.to(), attempt.call));
                prop_assert!(arrived, "{attempt:?} passed and did not arrive");
            }
        }
        Ok(())
    });
    if let Err(TestError::Fail(reason, (policy, attempts))) = &result {
        panic!("{reason}\n{policy}\n{attempts:#?}");
    }
    result.unwrap();
    let counts = [refused.get(), dropped.get(), passed.get()];
    println!("refused, dropped by TC alone, passed: {counts:?}");
    assert!(
        counts.iter().all(|n| *n >= 10),
        "{counts:?} says too little"
    );
}

fn compile(text: &str, environment: &Environment) -> enforcer::compile::Image {
    let name = "random.yaml".to_owned();
    let text = text.to_owned();
    let policy = parse(&[SourceFile { name, text }]).unwrap_or_else(|e| panic!("{e:?}"));
    kernel::compile(&policy, environment)
}

/// Not in the property: these must be refused, or the hooks do nothing at all.
#[test]
fn what_every_source_is_denied_is_refused() {
    let net = Net::new();
    net.host.enter(|| {
        let mut programs = Programs::load(SIZE_CLASSES[0] as usize);
        let host = Host::read().unwrap();
        let all = r#"version: 1
segments:
  peer: { members: [{cidr: 10.1.0.2/32}, {cidr: "fd01::2/128"}] }
  second: { members: [{cidr: 10.1.0.3/32}, {cidr: "fd01::3/128"}] }
rules:
  - { name: second, from: [second], to: [peer], services: [tcp/5002, udp/5002] }
"#;
        programs.apply(&compile(all, &host.environment));
        let eth0 = host.links.iter().find(|l| l.name == "eth0").unwrap();
        programs
            .dataplane
            .attach(&eth0.interface(0).unwrap())
            .unwrap();
        programs
            .dataplane
            .socket_hooks(SocketHooks::Refuse)
            .unwrap();
        for call in [Call::TcpConnect, Call::UdpConnect, Call::UdpSendto] {
            for kind in [Kind::V4, Kind::V6, Kind::Mapped] {
                for (source, port, refused) in [
                    (None, 5001, true),
                    (Some(0), 5001, true),
                    (Some(1), 5001, true),
                    // The unbound socket might take the second address.
                    (None, 5002, false),
                    (Some(0), 5002, true),
                    (Some(1), 5002, false),
                ] {
                    let attempt = Attempt {
                        call,
                        kind,
                        source,
                        destination: 0,
                        port,
                    };
                    let said = attempt.make();
                    // Connecting has chosen the first address, and on an IPv6 socket each
                    // datagram to an IPv4 address is a sendmsg(2) with an address.
                    let chosen = call == Call::UdpConnect && kind == Kind::Mapped;
                    assert_eq!(
                        said == Err(Errno::EPERM),
                        refused || (chosen && source.is_none()),
                        "{said:?} to {attempt:?}"
                    );
                }
            }
        }
        let denied = programs.counters().packets;
        let at = |hook| {
            let of = denied
                .iter()
                .filter(|c| c.hook == hook && c.outcome == Outcome::Denied);
            of.map(|c| c.packets).sum::<u64>()
        };
        // Four refusals of each of three kinds: two calls are connect(2), one is sendmsg(2).
        assert_eq!((at(Hook::Connect), at(Hook::Sendmsg)), (24, 12 + 1));
    });
}
