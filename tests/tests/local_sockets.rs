//! Sockets that change hands, what the kernel sends by itself, and a host that speaks to itself.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsRawFd as _, OwnedFd},
};

use enforcer_tests::{
    calls::{DATA, Form, Way},
    child::{self, Child},
    daemon::{Daemon, LONG, Setup},
    frame::{ACK, RST, SYN},
    netns::{Family, Pair},
    rival::Cgroup,
    seen::{denied, moved},
    traffic::{self, QUIET, Tap},
    wire::{self, Packets},
};
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, SockaddrStorage, connect, send, sendto},
};
use serde_json::{Value, json};

const POLICY: &str = r#"version: 1
segments:
  peer: { members: [{cidr: 10.1.0.2/32}, {cidr: "fd01::2/128"}] }
  this: { members: [{cidr: 10.1.0.1/32}, {cidr: "fd01::1/128"}] }
rules:
  - { name: out, from: [this], to: [peer], services: [udp/7000] }
  - { name: in, from: [peer], to: [this], services: [tcp/7000-7001] }
"#;

fn start<'a>(net: &'a Pair, hooks: &str) -> Daemon<'a> {
    Setup::new(&net.host, "eth0", POLICY)
        .with(&["--socket-hooks", hooks])
        .start()
}

/// The record of a denied datagram to `to`.
fn record(daemon: &Daemon<'_>, direction: &str, to: SocketAddr) -> Value {
    denied(
        daemon,
        &json!({
            "direction": direction, "protocol": "udp", "reason": "default_deny",
            "dst": to.ip().to_string(), "dst_port": to.port(),
        }),
    )
}

/// A UDP socket of the host, connected if there is somewhere to.
fn socket(net: &Pair, to: Option<SocketAddr>) -> OwnedFd {
    let any = SocketAddr::from(([0, 0, 0, 0], 0));
    let socket = net.host.enter(|| UdpSocket::bind(any).unwrap());
    if let Some(to) = to {
        socket.connect(to).unwrap();
    }
    socket.into()
}

fn datagram(socket: &OwnedFd) -> nix::Result<()> {
    match send(socket.as_raw_fd(), DATA, MsgFlags::empty()) {
        Ok(_) | Err(Errno::ENOBUFS) => Ok(()),
        Err(errno) => Err(errno),
    }
}

fn datagram_to(socket: &OwnedFd, to: &SockaddrStorage) -> nix::Result<()> {
    sendto(socket.as_raw_fd(), DATA, to, MsgFlags::empty()).map(drop)
}

const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 1, 0, 2));

/// What a process may send does not change with what it has become since it opened the socket.
#[test]
fn sockets_of_a_process_that_is_moved_to_another_cgroup() {
    let net = Pair::new();
    let daemon = start(&net, "observe");
    traffic::udp_echo(&net.peer, (PEER, 7000));
    assert!(traffic::udp_answers_soon(&net.host, (PEER, 7000)));
    let (good, bad) = ((PEER, 7000).into(), SocketAddr::new(PEER, 7101));
    let [first, second] = ["first", "second"].map(Cgroup::new);
    let tap = Tap::new(&net.peer);
    let child = net.host.enter(|| {
        Child::new(|line| {
            line.wait();
            let [to_good, to_bad] = [good, bad].map(|to: SocketAddr| {
                let socket = Form::V4.socket(libc::SOCK_DGRAM, 0)?;
                connect(socket.as_raw_fd(), &SockaddrStorage::from(to))?;
                Ok::<_, Errno>(socket)
            });
            let (to_good, to_bad) = (to_good?, to_bad?);
            line.say();
            line.wait();
            datagram(&to_bad)?;
            datagram(&to_good)
        })
    });
    first.take(child.pid);
    child.say(None);
    child.wait();
    second.take(child.pid);
    child.say(None);
    let pid = child.pid;
    assert_eq!(child.end(), Ok(()));
    let arrived: Vec<_> = std::iter::from_fn(|| tap.next(LONG))
        .find(|frame| wire::is_to(frame, good, 17) || wire::is_to(frame, bad, 17))
        .into_iter()
        .collect();
    assert!(
        wire::is_to(&arrived[0], good, 17),
        "the denied one was first"
    );
    let record = record(&daemon, "egress", bad);
    assert_eq!(record["process"]["pid"], pid.as_raw());
    assert_eq!(record["process"]["comm"], child::NAME);
    // A limit, pinned: the cgroup is that of the call that chose the destination.
    assert_eq!(record["process"]["cgroup"], first.name());
}

#[test]
fn a_socket_that_is_passed_on_is_judged_by_where_it_was_opened() {
    let net = Pair::new();
    let daemon = start(&net, "refuse");
    traffic::udp_echo(&net.peer, (PEER, 7000));
    assert!(traffic::udp_answers_soon(&net.host, (PEER, 7000)));
    let (good, bad) = (SocketAddr::new(PEER, 7000), SocketAddr::new(PEER, 7102));
    let tap = Tap::new(&net.peer);
    let socket = socket(&net, None);
    let cgroup = Cgroup::new("passed");
    // The receiver lives in another network namespace, too.
    let child = net.peer.enter(|| {
        Child::new(|line| {
            let socket = line.wait().ok_or(Errno::EBADF)?;
            datagram_to(&socket, &good.into())?;
            datagram_to(&socket, &bad.into())
        })
    });
    cgroup.take(child.pid);
    let pid = child.pid;
    child.say(Some(&socket));
    assert_eq!(child.end(), Err(Errno::EPERM));
    assert!(std::iter::from_fn(|| tap.next(LONG)).any(|frame| wire::is_to(&frame, good, 17)));
    let record = record(&daemon, "sendmsg", bad);
    assert_eq!(record["process"]["pid"], pid.as_raw());
    assert_eq!(record["process"]["comm"], child::NAME);
    assert_eq!(record["process"]["cgroup"], cgroup.name());
}

#[test]
fn a_socket_that_is_inherited_is_dropped_like_the_parents() {
    let net = Pair::new();
    let daemon = start(&net, "observe");
    let bad = SocketAddr::new(PEER, 7103);
    let socket = socket(&net, Some(bad));
    let tap = Tap::new(&net.peer);
    let counted = [("tc_egress", "denied", "default_deny")];
    let dropped = moved(&daemon, counted, || {
        let child = net.host.enter(|| Child::new(|_| datagram(&socket)));
        assert_eq!(child.end(), Ok(()));
    });
    assert_eq!(dropped, [1]);
    assert!(!tap.sees(DATA, QUIET));
    // A limit, pinned: named is who chose the destination, which is all that the calls tell.
    let record = record(&daemon, "egress", bad);
    assert_eq!(record["process"]["pid"], std::process::id());
}

#[test]
fn accepted_sockets_and_what_the_kernel_answers() {
    let net = Pair::new();
    let daemon = start(&net, "refuse");
    for family in Family::BOTH {
        let here = family.address(1, 1);
        let listener = net.host.enter(|| TcpListener::bind((here, 7000)).unwrap());
        let mut client = traffic::tcp(&net.peer, (here, 7000));
        let (mut accepted, _) = listener.accept().unwrap();
        accepted.write_all(b"welcome").unwrap();
        client.read_exact(&mut [0; 7]).unwrap();
        // A closed port that may be asked: the refusal is the kernel's, and comes at once.
        let to = SocketAddr::new(here, 7001);
        let refused = net.peer.enter(|| TcpStream::connect_timeout(&to, LONG));
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::ConnectionRefused);
        // One that may not: nothing comes in, so nothing is answered.
        let counted = [("tc_ingress", "denied", ""), ("tc_egress", "denied", "")];
        let counts = moved(&daemon, counted, || {
            assert!(!traffic::tcp_connects(&net.peer, (here, 7100), QUIET));
        });
        assert_eq!(counts, [1, 0], "{family:?}");
    }
}

/// Requests come in where nobody looks, and the answers leave where somebody does: no process
/// sends these, and nothing passes for want of one.
#[test]
fn answers_of_the_kernel_without_a_flow_are_denied() {
    let net = Pair::new();
    net.host.sysctl("ipv4/conf/all/rp_filter", "0");
    net.host.sysctl("ipv4/conf/default/rp_filter", "0");
    net.host.sysctl("ipv4/conf/eth0/rp_filter", "0");
    // Each answer once.
    net.host.sysctl("ipv4/tcp_synack_retries", "0");
    net.host.cable("eth1", &net.peer, "eth1");
    let links = [&net.host, &net.peer].map(|end| wire::link_address(end, "eth1"));
    let way_in = Packets::new(&net.peer, "eth1", false);
    let daemon = start(&net, "off");
    for family in Family::BOTH {
        let (here, peer) = (family.address(1, 1), family.address(1, 2));
        let _listener = net.host.enter(|| TcpListener::bind((here, 7000)).unwrap());
        traffic::tcp_connects(&net.peer, (here, 7000), LONG);
        let tap = Tap::new(&net.peer);
        for (port, flags, answer) in [
            (7000, SYN, SYN | ACK),
            (7100, SYN, RST | ACK),
            (7101, ACK, RST),
        ] {
            let packet = wire::tcp((peer, 40_000), (here, port), flags, (1, 1));
            let counted = [("tc_egress", "denied", "no_flow")];
            let dropped = moved(&daemon, counted, || {
                way_in.send(&wire::ethernet(links[1], links[0], &packet));
                // Seen in what the peer receives, should it get out.
                let back = SocketAddr::new(peer, 40_000);
                let start = std::time::Instant::now();
                while let Some(left) = QUIET.checked_sub(start.elapsed()) {
                    let Some(frame) = tap.next(left) else { break };
                    assert!(!wire::is_to(&frame, back, 6), "{family:?} {flags:#x}");
                }
            });
            assert_eq!(dropped, [1], "{family:?} {port} {flags:#x}");
            let record = denied(
                &daemon,
                &json!({
                    "direction": "egress", "interface": "eth0", "reason": "no_flow",
                    "src": here.to_string(), "src_port": port, "dst_port": 40_000,
                    "tcp_flags": flag_names(answer),
                }),
            );
            assert_eq!(record["process"], Value::Null, "{record:#}");
        }
    }
}

fn flag_names(flags: u8) -> String {
    [(SYN, "SYN"), (RST, "RST"), (ACK, "ACK")]
        .into_iter()
        .filter(|(bit, _)| flags & bit != 0)
        .map(|(_, name)| name)
        .collect::<Vec<_>>()
        .join(",")
}

const NOTHING: &str = r#"version: 1
defaults: { unsegmented: deny }
segments:
  all: { members: [{cidr: 0.0.0.0/0}, {cidr: "::/0"}] }
"#;

#[test]
fn a_host_where_all_is_denied_speaks_to_itself() {
    let net = Pair::new();
    let daemon = Setup::new(&net.host, "eth0", NOTHING).start();
    assert_eq!(daemon.status()["socket_hooks"], "refuse");
    traffic::tcp_echo(&net.host, 7000);
    for (own, form) in [
        ("127.0.0.1", Form::V4),
        ("127.9.9.9", Form::V4),
        ("::1", Form::V6),
        ("10.1.0.1", Form::V4),
        ("fd01::1", Form::V6),
    ] {
        let own: IpAddr = own.parse().unwrap();
        traffic::udp_echo(&net.host, (own, 7001));
        assert!(traffic::udp_answers_soon(&net.host, (own, 7001)), "{own}");
        let mut stream = traffic::tcp(&net.host, (own, 7000));
        traffic::converse(&mut stream, b"to myself").unwrap();
        assert!(traffic::pings(&net.host, own, LONG), "{own}");
        if form == Form::V4 {
            let said = net
                .host
                .enter(|| Way::UdpSendto.send(Form::Mapped, (own, 7001).into(), own));
            assert_eq!(said, Ok(()), "mapped {own}");
        }
    }
    assert_eq!(daemon.counted("", "denied", "default_deny"), 0);
    // The control: everything else is refused.
    for family in Family::BOTH {
        let to = SocketAddr::new(family.address(1, 2), 7000);
        let refused = net.host.enter(|| TcpStream::connect(to)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::PermissionDenied, "{family:?}");
    }
}
