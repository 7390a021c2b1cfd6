//! Rules that end and sessions with bounds, with real stacks through a gateway, by the machine's
//! own clock.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use enforcer_tests::{
    daemon::{Daemon, LONG, Setup, wait_for},
    netns::{Family, Netns, Routed},
    scale,
    traffic::{self, QUIET},
};
use serde_json::Value;

use crate::common::{ends, instant, policy};

const STAYS: u16 = 7001;
const GOES: u16 = 7002;

fn unix() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap()
}

/// Two ends of a flow through the gateway, of which each can say something to the other.
enum Flow {
    Tcp(TcpStream, TcpStream),
    Udp(UdpSocket, UdpSocket),
}

const PATIENCE: Duration = Duration::from_millis(20);

impl Flow {
    fn tcp(net: &Routed, family: Family, port: u16) -> Self {
        let at = SocketAddr::new(family.address(2, 2), port);
        let listener = net.b.enter(|| TcpListener::bind(at).unwrap());
        let a = traffic::tcp(&net.a, at);
        let (b, _) = listener.accept().unwrap();
        for end in [&a, &b] {
            end.set_read_timeout(Some(PATIENCE)).unwrap();
            end.set_nodelay(true).unwrap();
        }
        Self::Tcp(a, b)
    }

    fn udp(net: &Routed, family: Family, port: u16) -> Self {
        let (a, b) = ends(family);
        let a = traffic::udp(&net.a, (a, 0), LONG);
        let b = traffic::udp(&net.b, (b, port), LONG);
        a.connect(b.local_addr().unwrap()).unwrap();
        b.connect(a.local_addr().unwrap()).unwrap();
        a.send(b"open").unwrap();
        b.recv(&mut [0; 8]).unwrap();
        for end in [&a, &b] {
            end.set_read_timeout(Some(PATIENCE)).unwrap();
        }
        Self::Udp(a, b)
    }

    /// Says something in each direction; which of them something came out of.
    fn says(&mut self) -> [bool; 2] {
        fn heard(got: io::Result<usize>) -> bool {
            matches!(got, Ok(1..))
        }
        let mut bytes = [0; 4096];
        match self {
            Self::Tcp(a, b) => {
                // A sender whose packets are all lost ends with a full buffer, not here.
                a.write_all(b"there").unwrap();
                b.write_all(b"back").unwrap();
                [heard(b.read(&mut bytes)), heard(a.read(&mut bytes))]
            }
            Self::Udp(a, b) => {
                a.send(b"there").unwrap();
                b.send(b"back").unwrap();
                [heard(b.recv(&mut bytes)), heard(a.recv(&mut bytes))]
            }
        }
    }

    /// Until when each direction was heard, when it has been silent for long.
    fn last_heard(&mut self) -> Duration {
        let start = Instant::now();
        let (mut last, mut quiet) = (unix(), Instant::now());
        while quiet.elapsed() < scale::within(Duration::from_millis(1500)) {
            assert!(start.elapsed() < LONG, "it is not cut");
            if self.says().contains(&true) {
                (last, quiet) = (unix(), Instant::now());
            }
        }
        last
    }
}

/// Packets of each direction, protocol and family are recorded with this reason.
fn each_was_denied(daemon: &Daemon<'_>, reason: &str, protocols: &[&str], port: u16) {
    wait_for("a denial of each kind", LONG, || {
        let denials = daemon.denials(&["--last", "10000"]);
        let of = |protocol: &str, from: String, to: String| {
            let mut denials = denials.iter().filter(|d| d["reason"] == reason);
            denials.any(|d: &Value| {
                let ports = [&d["src_port"], &d["dst_port"]];
                d["protocol"] == protocol
                    && d["src"] == from
                    && d["dst"] == to
                    && ports.iter().any(|p| **p == port)
            })
        };
        let all = Family::BOTH.into_iter().all(|family| {
            let (a, b) = ends(family);
            let both = [(a, b), (b, a)].map(|(from, to)| (from.to_string(), to.to_string()));
            protocols.iter().all(|protocol| {
                let mut both = both.iter();
                both.all(|(from, to)| of(protocol, from.clone(), to.clone()))
            })
        });
        all.then_some(())
    });
    assert!(daemon.counted("tc_ingress", "denied", reason) > 0);
}

#[test]
fn live_flows_end_with_their_rule() {
    let net = Routed::new();
    let stays = format!(
        "  - {{ name: stays, from: [a], to: [b], services: [tcp/{STAYS}, udp/{STAYS}] }}\n"
    );
    let daemon = Setup::new(&net.gateway, "gw-*", &policy(&stays)).start();
    // Time enough to open the flows, on a slow machine too.
    let end = unix().as_secs() + scale::within(Duration::from_secs(5)).as_secs();
    let at = instant(end);
    let goes = format!(
        "  - {{ name: goes, from: [a], to: [b], services: [tcp/{GOES}, udp/{GOES}], expires: {at} }}"
    );
    daemon.swap(&policy(&(stays + &goes)));
    let flows = |port| -> Vec<Flow> {
        let of = |f| [Flow::tcp(&net, f, port), Flow::udp(&net, f, port)];
        Family::BOTH.into_iter().flat_map(of).collect()
    };
    let mut staying = flows(STAYS);
    let mut going = flows(GOES);
    assert!(unix().as_secs() < end, "too slow to say anything");
    // All at once: each is to be heard until the end.
    let late = scale::within(Duration::from_millis(1500));
    thread::scope(|scope| {
        let threads: Vec<_> = going
            .iter_mut()
            .map(|flow| scope.spawn(|| flow.last_heard()))
            .collect();
        for thread in threads {
            let last = thread.join().unwrap();
            let end = Duration::from_secs(end);
            assert!(last + late > end, "cut {:?} early", end - last);
            assert!(last < end + late, "cut {:?} late", last - end);
        }
    });
    each_was_denied(&daemon, "expired", &["tcp", "udp"], GOES);
    for flow in &mut staying {
        wait_for("the other flows", LONG, || {
            (flow.says() == [true; 2]).then_some(())
        });
    }
    for family in Family::BOTH {
        let at = SocketAddr::new(family.address(2, 2), GOES);
        assert!(!traffic::tcp_connects(&net.a, at, QUIET));
    }
    assert_eq!(daemon.generation(), 2, "nothing was compiled");
}

#[test]
fn a_denial_that_ends_lets_pass_what_is_allowed() {
    let net = Routed::new();
    let other = "  - { name: other, from: [a], to: [b], services: [udp/7001] }";
    let daemon = Setup::new(&net.gateway, "gw-*", &policy(other)).start();
    for family in Family::BOTH {
        traffic::udp_echo(&net.b, SocketAddr::new(family.address(2, 2), 7000));
    }
    let end = unix().as_secs() + scale::within(Duration::from_secs(5)).as_secs();
    let at = instant(end);
    daemon.swap(&policy(&format!(
        "  - {{ name: not-yet, from: [a], to: [b], services: [udp/7000], action: deny, expires: {at} }}\n\
         \x20 - {{ name: some, from: [a], to: [b], services: [udp/7000] }}"
    )));
    assert!(unix().as_secs() + 1 < end, "too slow to say anything");
    while unix().as_secs() + 1 < end {
        for family in Family::BOTH {
            let at = SocketAddr::new(family.address(2, 2), 7000);
            let answered = traffic::udp_answers(&net.a, None, at);
            assert!(!answered || unix().as_secs() >= end, "{family:?}");
        }
    }
    wait_for("the end", LONG, || (unix().as_secs() >= end).then_some(()));
    for family in Family::BOTH {
        let at = SocketAddr::new(family.address(2, 2), 7000);
        assert!(traffic::udp_answers_soon(&net.a, at), "{family:?}");
    }
    assert!(daemon.counted("tc_ingress", "denied", "rule_deny") > 0);
    assert_eq!(daemon.generation(), 2, "nothing was compiled");
}

/// A connection from the same port each time.
fn connect_from(namespace: &Netns, from: SocketAddr, to: SocketAddr) -> Option<TcpStream> {
    use nix::sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrIn, SockaddrIn6, bind, setsockopt, socket,
        sockopt,
    };
    use std::os::fd::AsRawFd as _;
    let family = if from.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = namespace.enter(|| socket(family, SockType::Stream, flags, None).unwrap());
    setsockopt(&socket, sockopt::ReuseAddr, &true).unwrap();
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(&socket, sockopt::Linger, &linger).unwrap();
    let fd = socket.as_raw_fd();
    match from {
        SocketAddr::V4(from) => bind(fd, &SockaddrIn::from(from)).unwrap(),
        SocketAddr::V6(from) => bind(fd, &SockaddrIn6::from(from)).unwrap(),
    }
    let connected = match to {
        SocketAddr::V4(to) => nix::sys::socket::connect(fd, &SockaddrIn::from(to)),
        SocketAddr::V6(to) => nix::sys::socket::connect(fd, &SockaddrIn6::from(to)),
    };
    connected.ok().map(|()| TcpStream::from(socket))
}

/// Cut after its time, both ways; from the same port again a session of its own.
#[test]
fn sessions_are_cut_and_begin_again_with_a_syn() {
    let net = Routed::new();
    let rules = "  - { name: longest, from: [a], to: [b], services: [tcp/7001], session: {max: 3s} }\n\
                 \x20 - { name: idle, from: [a], to: [b], services: [tcp/7002], session: {idle: 2s} }";
    let daemon = Setup::new(&net.gateway, "gw-*", &policy(rules)).start();
    for family in Family::BOTH {
        let (a, b) = ends(family);
        for (port, talks) in [(7001, true), (7002, false)] {
            let listener = net.b.enter(|| TcpListener::bind((b, port)).unwrap());
            for _ in 0..2 {
                let began = Instant::now();
                let stream = connect_from(&net.a, (a, 6000).into(), (b, port).into());
                let a_end = stream.expect("a SYN opens a session");
                let (b_end, _) = listener.accept().unwrap();
                for end in [&a_end, &b_end] {
                    end.set_read_timeout(Some(PATIENCE)).unwrap();
                    end.set_nodelay(true).unwrap();
                }
                let mut flow = Flow::Tcp(a_end, b_end);
                assert_eq!(flow.says(), [true; 2], "at first");
                if talks {
                    flow.last_heard();
                    let cut = began.elapsed();
                    let quiet = scale::within(Duration::from_millis(1500));
                    assert!(cut > Duration::from_secs(3) + quiet, "{cut:?}");
                    assert!(
                        cut < scale::within(Duration::from_secs(6)) + quiet,
                        "{cut:?}"
                    );
                } else {
                    // Silent for longer than it may be; TCP's own keep-alive is off.
                    thread::sleep(Duration::from_millis(3200));
                    for _ in 0..5 {
                        assert_eq!(flow.says(), [false; 2], "after the silence");
                    }
                }
            }
        }
    }
    each_was_denied(&daemon, "expired", &["tcp"], 7001);
    each_was_denied(&daemon, "expired", &["tcp"], 7002);
}

/// A connection that was opened while nobody looked, or under a table that forgot it, is not in a
/// session that could be bounded.
#[test]
fn the_middle_of_a_connection_is_no_session() {
    let net = Routed::new();
    let mut flows: Vec<Flow> = Family::BOTH.map(|f| Flow::tcp(&net, f, 7001)).into();
    let rules = "  - { name: some, from: [a], to: [b], services: [tcp/7001], session: {max: 1h} }";
    let daemon = Setup::new(&net.gateway, "gw-*", &policy(rules)).start();
    for flow in &mut flows {
        for _ in 0..3 {
            assert_eq!(flow.says(), [false; 2]);
        }
    }
    wait_for("the denials", LONG, || {
        let denials = daemon.denials(&[]);
        let all = Family::BOTH.into_iter().all(|family| {
            let (a, _) = ends(family);
            let mut denials = denials.iter();
            denials.any(|d| d["reason"] == "no_flow" && d["src"] == a.to_string())
        });
        all.then_some(())
    });
    for family in Family::BOTH {
        assert_eq!(Flow::tcp(&net, family, 7001).says(), [true; 2]);
    }
}
