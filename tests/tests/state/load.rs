//! The books of all four hooks, after several threads have sent and called at once: as many judged
//! as were made, counted by those that made them.

use std::{
    fs,
    net::{SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
    thread,
    time::Duration,
};

use enforcer::{
    compile::Image,
    daemon::environment::Host,
    dataplane::{Counters, Dataplane as _, SocketHooks},
};
use enforcer_common::{
    image::SIZE_CLASSES,
    verdict::{Hook, Outcome, Reason},
};
use enforcer_tests::{
    daemon::wait_for,
    host,
    kernel::{self, Programs},
    netns::{Netns, Pair},
    scale, wire,
};
use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, connect, socket},
};

use crate::common::{EGRESS, INGRESS};

/// The peer may be spoken to at one port; what is observed passes and is recorded; nobody watches
/// the rest.
const POLICY: &str = r#"version: 1
segments:
  peer: { members: [{cidr: 10.1.0.2/32}] }
  watched: { members: [{cidr: 10.1.0.3/32}], mode: observe }
  off: { members: [{cidr: 10.1.0.4/32}], mode: off }
rules:
  - { name: out, from: [any], to: [peer], services: [udp/7000] }
  - { name: in, from: [peer], to: [any], services: [udp/7000] }
"#;

/// Of the host's link: its addresses here and there.
struct Wire {
    net: Pair,
    here: [u8; 6],
    there: [u8; 6],
}

fn silent() -> Wire {
    let net = Pair {
        host: Netns::new("host"),
        peer: Netns::new("peer"),
    };
    // Nothing on the wire but what is sent here: no IPv6, no questions for link addresses.
    for namespace in [&net.host, &net.peer] {
        namespace.sysctl("ipv6/conf/default/disable_ipv6", "1");
        namespace.sysctl("ipv6/conf/all/disable_ipv6", "1");
    }
    net.host.cable("eth0", &net.peer, "eth0");
    net.host.addresses("eth0", &["10.1.0.1/24"]);
    let here = wire::link_address(&net.host, "eth0");
    let there = wire::link_address(&net.peer, "eth0");
    let text = there.map(|byte| format!("{byte:02x}")).join(":");
    for last in 2..=5 {
        net.host.ip(&format!(
            "neigh add 10.1.0.{last} lladdr {text} dev eth0 nud permanent\n"
        ));
    }
    Wire { net, here, there }
}

/// A counter of `eth0` of a namespace.
fn counted_by_the_interface(namespace: &Netns, column: usize) -> u64 {
    let text = namespace.enter(|| fs::read_to_string("/proc/thread-self/net/dev").unwrap());
    let line = text
        .lines()
        .find(|l| l.trim().starts_with("eth0:"))
        .unwrap();
    let (_, numbers) = line.split_once(':').unwrap();
    numbers
        .split_whitespace()
        .nth(column)
        .unwrap()
        .parse()
        .unwrap()
}

/// In `/proc/net/dev`: packets received; packets that were sent and lost.
const RECEIVED: usize = 1;

fn judged(counters: &Counters, hook: Hook, of: impl Fn(Outcome, Reason) -> bool) -> u64 {
    let here = counters.packets.iter().filter(|c| c.hook == hook);
    here.filter(|c| of(c.outcome, c.reason))
        .map(|c| c.packets)
        .sum()
}

fn records_balance(counters: &Counters) {
    for fates in &counters.records {
        let recorded = judged(counters, fates.hook, |outcome, _| {
            matches!(outcome, Outcome::Denied | Outcome::WouldDeny)
        });
        let sum = fates.emitted + fates.suppressed + fates.lost;
        assert_eq!(recorded, sum, "{fates:?}");
    }
}

/// What a thread sends: a datagram to or from one of the addresses, with many ports. Every fifth
/// is broken.
fn made(wire: &Wire, outgoing: bool, thread: u16, number: u16) -> Vec<u8> {
    let last = 2 + (number % 4) as u8;
    let (peer, this) = ([10, 1, 0, last].into(), [10, 1, 0, 1].into());
    let port = if (number / 4).is_multiple_of(2) {
        7000
    } else {
        5000 + number % 300
    };
    let own = 20_000 + thread * 4_000 + number % 3_000;
    // To nobody here: an answer would be a packet that no sender counts.
    let nobody = [10, 9, 0, 1].into();
    let (from, to) = if outgoing {
        (this, peer)
    } else {
        (peer, nobody)
    };
    let mut packet = wire::udp((from, own), (to, port), b"load");
    if number.is_multiple_of(5) {
        // Another total length than the packet has.
        packet[3] = packet[3].wrapping_add(9);
    }
    let (source, destination) = if outgoing {
        (wire.here, wire.there)
    } else {
        (wire.there, wire.here)
    };
    wire::ethernet(source, destination, &packet)
}

fn udp4(bound: bool) -> UdpSocket {
    let address = if bound { [10, 1, 0, 1] } else { [0; 4] };
    UdpSocket::bind(SocketAddr::from((address, 0))).unwrap()
}

/// What the calls of a kind came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Calls {
    made: u64,
    refused: u64,
}

impl std::iter::Sum for Calls {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| Self {
            made: sum.made + one.made,
            refused: sum.refused + one.refused,
        })
    }
}

impl Calls {
    fn note(&mut self, said: Result<(), Errno>) {
        self.made += 1;
        match said {
            Ok(()) => {}
            Err(Errno::EPERM) => self.refused += 1,
            // Refused by TC behind the hook: the call was let through.
            Err(Errno::ENOBUFS) => {}
            Err(other) => panic!("{other}"),
        }
    }
}

fn peer(number: u16) -> SockaddrIn {
    let port = if (number / 4).is_multiple_of(2) {
        7000
    } else {
        5000 + number % 300
    };
    let last = 2 + (number % 4) as u8;
    SockaddrIn::from(std::net::SocketAddrV4::new([10, 1, 0, last].into(), port))
}

fn connects(count: u16) -> Calls {
    let mut calls = Calls::default();
    for number in 0..count {
        let socket = socket(
            AddressFamily::Inet,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            None,
        );
        let said = connect(socket.unwrap().as_raw_fd(), &peer(number));
        calls.note(said);
    }
    calls
}

fn sends(count: u16, bound: bool) -> Calls {
    let mut calls = Calls::default();
    let socket = udp4(bound);
    for number in 0..count {
        let to: SocketAddr = {
            let to = peer(number);
            (to.ip(), to.port()).into()
        };
        let said = socket.send_to(b"load", to);
        calls.note(
            said.map(drop)
                .map_err(|e| Errno::from_raw(e.raw_os_error().unwrap())),
        );
    }
    calls
}

fn image(namespace: &Netns) -> (Image, Host) {
    let host = namespace.enter(|| Host::read().unwrap());
    (
        kernel::compile(&host::policy(POLICY), &host.environment),
        host,
    )
}

#[test]
fn the_books_of_all_four_hooks_balance_under_load() {
    let each = scale::rounds(20_000, 1_500) as u16;
    let wire = silent();
    let (image, host) = image(&wire.net.host);
    let mut programs = wire.net.host.enter(|| {
        let mut programs = Programs::load(SIZE_CLASSES[0] as usize);
        programs.apply(&image);
        programs
    });
    let start = programs.counters();
    let eth0 = host.links.iter().find(|l| l.name == "eth0").unwrap();
    let received = counted_by_the_interface(&wire.net.host, RECEIVED);
    let sent_before = counted_by_the_interface(&wire.net.peer, RECEIVED);
    wire.net.host.enter(|| {
        let interface = eth0.interface(0).unwrap();
        programs.dataplane.attach(&interface).unwrap();
        programs
            .dataplane
            .socket_hooks(SocketHooks::Refuse)
            .unwrap();
    });
    // No other process may call while the hooks are there: theirs would be counted as well. Those
    // of other namespaces are, as deferred; they are told by the difference to what is made here.
    let wire = &wire;
    let (incoming, outgoing, connected, sent) = thread::scope(|scope| {
        let frames = |outgoing: bool, thread: u16| {
            move || {
                let namespace = if outgoing {
                    &wire.net.host
                } else {
                    &wire.net.peer
                };
                let socket = wire::Packets::new(namespace, "eth0", false);
                let mut count = 0u64;
                for number in 0..each {
                    let frame = made(wire, outgoing, thread, number);
                    match socket.try_send(&frame) {
                        // Dropped by TC, or by the queue behind it: judged either way.
                        Ok(_) | Err(Errno::ENOBUFS) => count += 1,
                        Err(other) => panic!("{other}"),
                    }
                }
                count
            }
        };
        let incoming: Vec<_> = (0..2).map(|t| scope.spawn(frames(false, t))).collect();
        let outgoing: Vec<_> = (2..4).map(|t| scope.spawn(frames(true, t))).collect();
        let connected: Vec<_> = (0..2)
            .map(|_| scope.spawn(|| wire.net.host.enter(|| connects(each / 4))))
            .collect();
        let sent: Vec<_> = [true, false]
            .map(|bound| scope.spawn(move || wire.net.host.enter(|| sends(each / 4, bound))))
            .into();
        let mut drained = 0;
        // Now and then somebody reads, or the ring would lose all but the first.
        while incoming.iter().chain(&outgoing).any(|t| !t.is_finished()) {
            drained += programs.drain().len();
            thread::sleep(Duration::from_millis(20));
        }
        println!("{drained} records read under load");
        (
            incoming.into_iter().map(|t| t.join().unwrap()).sum::<u64>(),
            outgoing.into_iter().map(|t| t.join().unwrap()).sum::<u64>(),
            connected
                .into_iter()
                .map(|t| t.join().unwrap())
                .sum::<Calls>(),
            sent.into_iter().map(|t| t.join().unwrap()).sum::<Calls>(),
        )
    });
    // What the interface has received has been judged once its counter has come to rest.
    let total = |counters: &Counters, hook| judged(counters, hook, |_, _| true);
    let before = |hook| total(&start, hook);
    let mut last = 0;
    let received = wait_for("the wire to be quiet", Duration::from_secs(30), || {
        let now = counted_by_the_interface(&wire.net.host, RECEIVED) - received;
        let quiet = now == std::mem::replace(&mut last, now);
        thread::sleep(Duration::from_millis(50));
        quiet.then_some(now)
    });
    assert!(
        received <= incoming && received * 10 > incoming * 9,
        "{received} of {incoming}"
    );
    let counters = programs.counters();
    assert_eq!(
        total(&counters, INGRESS) - before(INGRESS),
        received,
        "tc_ingress"
    );

    let by_hand = outgoing + sent.made - sent.refused;
    assert_eq!(
        total(&counters, EGRESS) - before(EGRESS),
        by_hand,
        "tc_egress"
    );
    // What passed is what the peer got, unless its queue was full.
    let passed = judged(&counters, EGRESS, |outcome, _| outcome.passes());
    let arrived = counted_by_the_interface(&wire.net.peer, RECEIVED) - sent_before;
    assert!(
        arrived <= passed && arrived * 10 > passed * 9,
        "{arrived} of {passed}"
    );

    for (hook, calls) in [(Hook::Connect, connected), (Hook::Sendmsg, sent)] {
        let denied = judged(&counters, hook, |outcome, _| outcome == Outcome::Denied);
        assert_eq!(denied, calls.refused, "{hook:?}");
        assert!(calls.refused > 0, "{hook:?}");
        let deferred = judged(&counters, hook, |outcome, reason| {
            (outcome, reason) == (Outcome::Allowed, Reason::Deferred)
        });
        // Other tests' processes make calls of their own meanwhile, in other namespaces.
        assert!(
            deferred >= calls.made - calls.refused,
            "{hook:?}: {deferred}"
        );
        assert_eq!(total(&counters, hook), denied + deferred, "{hook:?}");
    }
    // The load was worth its name: each outcome was there.
    for hook in [INGRESS, EGRESS] {
        for outcome in Outcome::ALL {
            let some = judged(&counters, hook, |o, _| o == outcome);
            assert!(some > 0, "{hook:?} {outcome:?}");
        }
    }
    records_balance(&counters);
}
