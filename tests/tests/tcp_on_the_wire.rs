//! TCP with real stacks through a gateway: forged resets, ports used again, openings from both
//! ends, data in the SYN.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{
    io::Read as _,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsRawFd as _, OwnedFd},
    time::Duration,
};

use enforcer_tests::{
    daemon::{Daemon, LONG, Setup, wait_for},
    frame::{ACK, FIN, RST, SYN},
    netns::{Family, Netns, Routed},
    nft::{nft, try_nft},
    seen::{denied, skipped},
    traffic::{self, QUIET, Tap},
    wire,
};
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockType, SockaddrIn, SockaddrIn6, bind, connect,
        getsockopt, sendto, setsockopt, socket, sockopt,
    },
};
use serde_json::json;

const POLICY: &str = r#"version: 1
segments:
  a: { members: [{cidr: 10.1.0.2/32}, {cidr: "fd01::2/128"}] }
  b: { members: [{cidr: 10.2.0.2/32}, {cidr: "fd02::2/128"}] }
rules:
  - { name: some, from: [a], to: [b], services: [tcp/7000-7005, https] }
  - { name: both-ways, from: [a, b], to: [a, b], services: [tcp/7100] }
"#;

fn ends(family: Family) -> (IpAddr, IpAddr) {
    (family.address(1, 2), family.address(2, 2))
}

/// A TCP socket inside, bound to `from`; not blocking.
fn tcp_socket(namespace: &Netns, from: SocketAddr) -> OwnedFd {
    let (family, flags) = (
        if from.is_ipv4() {
            AddressFamily::Inet
        } else {
            AddressFamily::Inet6
        },
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
    );
    let socket = namespace.enter(|| socket(family, SockType::Stream, flags, None).unwrap());
    setsockopt(&socket, sockopt::ReuseAddr, &true).unwrap();
    let fd = socket.as_raw_fd();
    match from {
        SocketAddr::V4(from) => bind(fd, &SockaddrIn::from(from)).unwrap(),
        SocketAddr::V6(from) => bind(fd, &SockaddrIn6::from(from)).unwrap(),
    }
    socket
}

fn start_connect(socket: &OwnedFd, to: SocketAddr) {
    let fd = socket.as_raw_fd();
    let begun = match to {
        SocketAddr::V4(to) => connect(fd, &SockaddrIn::from(to)),
        SocketAddr::V6(to) => connect(fd, &SockaddrIn6::from(to)),
    };
    assert_eq!(begun, Err(Errno::EINPROGRESS));
}

/// Whether the socket's connection comes to be within `limit`.
fn connects(socket: &OwnedFd, limit: Duration) -> bool {
    let polled = nix::poll::PollFlags::POLLOUT;
    let mut polled = [nix::poll::PollFd::new(
        std::os::fd::AsFd::as_fd(socket),
        polled,
    )];
    let timeout = nix::poll::PollTimeout::try_from(limit).unwrap();
    nix::poll::poll(&mut polled, timeout).unwrap() == 1
        && getsockopt(socket, sockopt::SocketError).unwrap() == 0
}

/// One daemon for all that only looks at packets.
#[test]
fn tcp_through_a_gateway() {
    let net = Routed::new();
    let daemon = Setup::new(&net.gateway, "gw-*", POLICY).start();
    traffic::tcp_echo(&net.b, 7000);
    for family in Family::BOTH {
        a_reset_out_of_window_ends_nothing(&net, family);
        a_challenge_is_answered(&net, family);
        both_ends_open_at_once(&net, &daemon, family);
        data_in_the_syn(&net, &daemon, family);
        a_right_to_https_is_none_to_quic(&net, &daemon, family);
    }
    // Last: another policy.
    ports_used_again_after_a_change(&net, &daemon);
}

fn a_reset_out_of_window_ends_nothing(net: &Routed, family: Family) {
    let (a, b) = ends(family);
    let mut stream = traffic::tcp(&net.a, (b, 7000));
    traffic::converse(&mut stream, b"before").unwrap();
    let port = stream.local_addr().unwrap().port();
    let tap = Tap::new(&net.a);
    // Sequence numbers that are nobody's; both ends ignore them.
    let (to_a, to_b) = (
        wire::tcp((b, 7000), (a, port), RST, (77, 0)),
        wire::tcp((a, port), (b, 7000), RST, (77, 0)),
    );
    traffic::send_raw(&net.b, &to_a);
    traffic::send_raw(&net.a, &to_b);
    assert!(
        tap.sees(segment(&to_a), LONG),
        "{family:?}: it is the flow's"
    );
    traffic::converse(&mut stream, b"after").unwrap();
    // Alone, with no ACK, these belong to a flow that is known, or are dropped: it is known still.
    for flags in [FIN, RST] {
        let lone = wire::tcp((b, 7000), (a, port), flags, (78, 0));
        traffic::send_raw(&net.b, &lone);
        assert!(tap.sees(segment(&lone), LONG), "{family:?} {flags:#x}");
        let other = wire::tcp((b, 7000), (a, port ^ 1), flags, (78, 0));
        traffic::send_raw(&net.b, &other);
        assert!(!tap.sees(segment(&other), QUIET), "{family:?} {flags:#x}");
    }
    traffic::converse(&mut stream, b"and again").unwrap();
}

fn segment(packet: &[u8]) -> &[u8] {
    &packet[if packet[0] >> 4 == 4 { 20 } else { 40 }..]
}

/// The TCP flags of a frame between these ports.
fn flags_between(frame: &[u8], from: u16, to: u16) -> Option<(u8, usize)> {
    let (protocol, at) = match frame.get(12..14)? {
        [0x08, 0x00] => (*frame.get(23)?, 34),
        [0x86, 0xdd] => (*frame.get(20)?, 54),
        _ => return None,
    };
    let ports = [from.to_be_bytes(), to.to_be_bytes()].concat();
    let mine = protocol == 6 && frame.get(at..at + 4)? == ports;
    let data = frame.len() - at - usize::from(*frame.get(at + 12)? >> 4) * 4;
    mine.then(|| (frame[at + 13], data))
}

/// The first frame on the tap between these ports of which `is` is true.
fn caught(tap: &Tap, limit: Duration, from: u16, to: u16, is: impl Fn(u8, usize) -> bool) -> bool {
    let start = std::time::Instant::now();
    while let Some(left) = limit.checked_sub(start.elapsed()) {
        let Some(frame) = tap.next(left) else {
            return false;
        };
        if flags_between(&frame, from, to).is_some_and(|(flags, data)| is(flags, data)) {
            return true;
        }
    }
    false
}

/// RFC 5961: a SYN, or a RST not quite right, within a connection is answered with an ACK.
fn a_challenge_is_answered(net: &Routed, family: Family) {
    let (a, b) = ends(family);
    net.b.sysctl("ipv4/tcp_invalid_ratelimit", "0");
    let mut stream = traffic::tcp(&net.a, (b, 7000));
    traffic::converse(&mut stream, b"before").unwrap();
    let port = stream.local_addr().unwrap().port();
    let tap = Tap::new(&net.a);
    let syn = wire::tcp((a, port), (b, 7000), SYN, (77, 0));
    traffic::send_raw(&net.a, &syn);
    let ack = |flags, data| flags == ACK && data == 0;
    assert!(caught(&tap, LONG, 7000, port, ack), "{family:?}");
    traffic::converse(&mut stream, b"after").unwrap();
}

/// Both SYNs are lost on the way, behind the enforcer's ingress; when they are sent again they
/// cross.
fn both_ends_open_at_once(net: &Routed, daemon: &Daemon<'_>, family: Family) {
    let (a, b) = ends(family);
    let hold = "table inet hold {\n\
                chain through { type filter hook forward priority 0; tcp dport 7100 drop\n }\n}\n";
    if let Err(complaint) = try_nft(&net.gateway, hold) {
        skipped(&format!("no packet filter in this kernel: {complaint}"));
        return;
    }
    let ends = [(&net.a, a, b), (&net.b, b, a)].map(|(host, from, to)| {
        let socket = tcp_socket(host, (from, 7100).into());
        (socket, SocketAddr::new(to, 7100))
    });
    let judged = || daemon.counted("tc_ingress", "allowed", "rule_allow");
    let before = judged();
    for (socket, to) in &ends {
        start_connect(socket, *to);
    }
    wait_for("both SYNs", LONG, || (judged() >= before + 2).then_some(()));
    nft(&net.gateway, "delete table inet hold\n");
    for (socket, _) in &ends {
        assert!(connects(socket, LONG), "{family:?}");
    }
    assert!(judged() >= before + 3, "{family:?}: one was sent again");
    let [mut one, mut other] = ends.map(|(socket, _)| TcpStream::from(socket));
    for stream in [&one, &other] {
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
    }
    std::io::Write::write_all(&mut one, b"hello").unwrap();
    std::io::Write::write_all(&mut other, b"world").unwrap();
    let mut bytes = [[0; 5]; 2];
    other.read_exact(&mut bytes[0]).unwrap();
    one.read_exact(&mut bytes[1]).unwrap();
    assert_eq!(bytes, [*b"hello", *b"world"], "{family:?}");
}

/// TCP Fast Open (RFC 7413), without the cookie that a stranger would need.
fn data_in_the_syn(net: &Routed, daemon: &Daemon<'_>, family: Family) {
    let (a, b) = ends(family);
    for host in [&net.a, &net.b] {
        // Both roles, data without a cookie, every listener.
        host.sysctl("ipv4/tcp_fastopen", "1543");
    }
    let tap = Tap::new(&net.b);
    let with_data = |flags, data| flags & (SYN | ACK) == SYN && data == 9;
    let fast_open = MsgFlags::from_bits_retain(libc::MSG_FASTOPEN);
    let open = |from: u16, port: u16| {
        let socket = tcp_socket(&net.a, (a, from).into());
        let fd = socket.as_raw_fd();
        let said = match SocketAddr::new(b, port) {
            SocketAddr::V4(to) => {
                let to = SockaddrIn::from(to);
                sendto(fd, b"impatient", &to, fast_open)
            }
            SocketAddr::V6(to) => {
                let to = SockaddrIn6::from(to);
                sendto(fd, b"impatient", &to, fast_open)
            }
        };
        assert_eq!(said, Ok(9), "{family:?}");
        socket
    };
    let listener = net.b.enter(|| TcpListener::bind((b, 7001)).unwrap());
    let _client = open(30_001, 7001);
    assert!(caught(&tap, LONG, 30_001, 7001, with_data), "{family:?}");
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    let mut bytes = [0; 9];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"impatient", "{family:?}");

    let _client = open(30_002, 7009);
    denied(
        daemon,
        &json!({
            "direction": "ingress", "interface": "gw-a", "reason": "default_deny",
            "src": a.to_string(), "src_port": 30_002, "dst_port": 7009, "tcp_flags": "SYN",
        }),
    );
    assert!(
        !caught(&tap, QUIET, 30_002, 7009, |_, _| true),
        "{family:?}"
    );
}

fn a_right_to_https_is_none_to_quic(net: &Routed, daemon: &Daemon<'_>, family: Family) {
    let (a, b) = ends(family);
    let listener = net.b.enter(|| TcpListener::bind((b, 443)).unwrap());
    traffic::udp_echo(&net.b, (b, 443));
    assert!(traffic::tcp_connects(&net.a, (b, 443), LONG));
    drop(listener);
    assert!(!traffic::udp_answers(&net.a, None, (b, 443)), "{family:?}");
    denied(
        daemon,
        &json!({
            "reason": "default_deny", "protocol": "udp", "src": a.to_string(),
            "dst_port": 443,
        }),
    );
}

fn ports_used_again_after_a_change(net: &Routed, daemon: &Daemon<'_>) {
    for (family, port) in Family::BOTH.into_iter().zip([30_010, 30_011]) {
        let (a, b) = ends(family);
        for (round, flags) in [("FIN", FIN), ("RST", RST)] {
            // Closed by the server, so that the client's port is free at once.
            let listener = tcp_listener(&net.b, (b, 7002).into());
            let socket = tcp_socket(&net.a, (a, port).into());
            let tap = Tap::new(&net.a);
            start_connect(&socket, (b, 7002).into());
            assert!(connects(&socket, LONG), "{family:?} {round}");
            let (server, _) = listener.accept().unwrap();
            if flags == RST {
                let at_once = libc::linger {
                    l_onoff: 1,
                    l_linger: 0,
                };
                setsockopt(&server, sockopt::Linger, &at_once).unwrap();
            }
            drop(server);
            assert!(caught(&tap, LONG, 7002, port, |seen, _| seen & flags != 0));
            drop(socket);
            drop(listener);
            // The same tuple again, under the same policy: a flow like any other.
        }
        let _listener = tcp_listener(&net.b, (b, 7002).into());
        let socket = tcp_socket(&net.a, (a, port).into());
        start_connect(&socket, (b, 7002).into());
        assert!(connects(&socket, LONG), "{family:?}: the control");
        let at_once = libc::linger {
            l_onoff: 1,
            l_linger: 0,
        };
        setsockopt(&socket, sockopt::Linger, &at_once).unwrap();
    }
    daemon.swap(&POLICY.replace("tcp/7000-7005", "tcp/7000"));
    for (family, port) in Family::BOTH.into_iter().zip([30_010, 30_011]) {
        let (a, b) = ends(family);
        let _listener = tcp_listener(&net.b, (b, 7002).into());
        let tap = Tap::new(&net.b);
        let socket = tcp_socket(&net.a, (a, port).into());
        start_connect(&socket, (b, 7002).into());
        assert!(!connects(&socket, QUIET), "{family:?}");
        assert!(!caught(&tap, QUIET, port, 7002, |_, _| true), "{family:?}");
        denied(
            daemon,
            &json!({
                "direction": "ingress", "interface": "gw-a", "src": a.to_string(),
                "src_port": port, "dst_port": 7002, "tcp_flags": "SYN",
                "generation": daemon.generation(),
            }),
        );
    }
}

fn tcp_listener(namespace: &Netns, at: SocketAddr) -> TcpListener {
    namespace.enter(|| TcpListener::bind(at).unwrap())
}
