//! Traffic between namespaces: echo servers, probes with a definite answer, raw packets, taps.

use std::{
    io::{self, Read as _, Write as _},
    net::{
        IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, TcpListener, TcpStream,
        UdpSocket,
    },
    os::fd::{AsRawFd as _, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn,
        SockaddrIn6, SockaddrLike, connect, recvfrom, send, sendto, setsockopt, socket, sockopt,
    },
};
use std::os::fd::AsFd as _;

use crate::{daemon::LONG, netns::Netns};

/// How long to wait for what must not come.
pub const QUIET: Duration = Duration::from_millis(150);

/// A UDP socket inside, bound to `address`, that gives up reading after `limit`.
pub fn udp(namespace: &Netns, address: impl Into<SocketAddr>, limit: Duration) -> UdpSocket {
    let address = address.into();
    let socket = namespace.enter(|| UdpSocket::bind(address).unwrap());
    socket.set_read_timeout(Some(limit)).unwrap();
    socket
}

/// `[::]:port`, which takes IPv4 as well, or an unbound one for 0.
pub fn any(port: u16) -> SocketAddr {
    (Ipv6Addr::UNSPECIFIED, port).into()
}

/// The unspecified address of the family of `ip`.
pub fn unspecified(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// Answers each datagram to `at` with itself until the test process ends.
pub fn udp_echo(namespace: &Netns, at: impl Into<SocketAddr>) {
    let at = at.into();
    let socket = namespace.enter(|| UdpSocket::bind(at).unwrap());
    thread::spawn(move || {
        let mut bytes = [0; 2048];
        loop {
            // ICMP errors about an answer come back here, too: no reason to stop.
            if let Ok((length, from)) = socket.recv_from(&mut bytes) {
                let _ = socket.send_to(&bytes[..length], from);
            }
        }
    });
}

/// Echoes what each connection to `port` says until the test process ends.
pub fn tcp_echo(namespace: &Netns, port: u16) {
    let listener = namespace.enter(|| TcpListener::bind(any(port)).unwrap());
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut bytes = [0; 65536];
                while let Ok(length @ 1..) = stream.read(&mut bytes) {
                    if stream.write_all(&bytes[..length]).is_err() {
                        break;
                    }
                }
            });
        }
    });
}

/// Whether a UDP echo from a fresh socket, at `from` if given, comes back. "No" takes 150 ms.
pub fn udp_answers(namespace: &Netns, from: Option<IpAddr>, to: impl Into<SocketAddr>) -> bool {
    let to = to.into();
    let from = from.unwrap_or_else(|| unspecified(to.ip()));
    let socket = udp(namespace, (from, 0), QUIET);
    // EPERM where the socket hooks are at work: no answer either.
    if socket.send_to(b"hello", to).is_err() {
        return false;
    }
    let mut bytes = [0; 16];
    matches!(socket.recv_from(&mut bytes), Ok((5, who)) if who == to)
}

/// Whether a UDP echo comes back now or soon.
pub fn udp_answers_soon(namespace: &Netns, to: impl Into<SocketAddr>) -> bool {
    let (to, start) = (to.into(), Instant::now());
    while start.elapsed() < LONG {
        if udp_answers(namespace, None, to) {
            return true;
        }
    }
    false
}

/// A TCP connection that must come to be.
pub fn tcp(namespace: &Netns, to: impl Into<SocketAddr>) -> TcpStream {
    let to = to.into();
    let stream = namespace.enter(|| TcpStream::connect_timeout(&to, LONG).unwrap());
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// Whether a TCP connection comes to be within `limit`.
pub fn tcp_connects(namespace: &Netns, to: impl Into<SocketAddr>, limit: Duration) -> bool {
    let to = to.into();
    namespace.enter(|| TcpStream::connect_timeout(&to, limit).is_ok())
}

/// Says `words` and reads as many bytes back.
pub fn converse(stream: &mut TcpStream, words: &[u8]) -> io::Result<()> {
    stream.write_all(words)?;
    let mut answer = vec![0; words.len()];
    stream.read_exact(&mut answer)?;
    assert_eq!(answer, words);
    Ok(())
}

/// A ping socket inside.
pub fn ping_socket(namespace: &Netns, v6: bool) -> OwnedFd {
    let (family, protocol) = if v6 {
        (AddressFamily::Inet6, SockProtocol::IcmpV6)
    } else {
        (AddressFamily::Inet, SockProtocol::Icmp)
    };
    namespace
        .enter(|| socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, protocol).unwrap())
}

/// Sends an echo request.
pub fn ping_send(socket: &OwnedFd, to: IpAddr) -> nix::Result<usize> {
    let kind = if to.is_ipv6() { 128 } else { 8 };
    let message = [kind, 0, 0, 0, 0, 0, 0, 1, b'h', b'i'];
    match SocketAddr::new(to, 0) {
        SocketAddr::V4(to) => send_to(socket, &message, &SockaddrIn::from(to)),
        SocketAddr::V6(to) => send_to(socket, &message, &SockaddrIn6::from(to)),
    }
}

/// Whether an echo request is answered within `limit`.
pub fn pings(namespace: &Netns, to: IpAddr, limit: Duration) -> bool {
    let socket = ping_socket(namespace, to.is_ipv6());
    // ENOBUFS: dropped on the way out.
    ping_send(&socket, to).is_ok() && readable(&socket, limit)
}

fn send_to<A: SockaddrLike>(socket: &OwnedFd, bytes: &[u8], to: &A) -> nix::Result<usize> {
    sendto(socket.as_raw_fd(), bytes, to, MsgFlags::empty())
}

fn readable(socket: &OwnedFd, limit: Duration) -> bool {
    let timeout = PollTimeout::try_from(limit).unwrap();
    let mut polled = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    poll(&mut polled, timeout).unwrap() == 1
}

/// Sends an IP packet as it is (the kernel fills in the IPv4 header checksum); it is routed.
pub fn send_raw(namespace: &Netns, packet: &[u8]) {
    let (family, v6) = match packet[0] >> 4 {
        4 => (AddressFamily::Inet, false),
        _ => (AddressFamily::Inet6, true),
    };
    let socket = namespace.enter(|| {
        socket(
            family,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::Raw,
        )
        .unwrap()
    });
    if v6 {
        let to: [u8; 16] = packet[24..40].try_into().unwrap();
        let to = SocketAddrV6::new(to.into(), 0, 0, 0);
        connect(socket.as_raw_fd(), &SockaddrIn6::from(to)).unwrap();
    } else {
        let to: [u8; 4] = packet[16..20].try_into().unwrap();
        connect(
            socket.as_raw_fd(),
            &SockaddrIn::from(SocketAddrV4::new(to.into(), 0)),
        )
        .unwrap();
    }
    send(socket.as_raw_fd(), packet, MsgFlags::empty()).unwrap();
}

/// Sees every frame that comes into a namespace.
pub struct Tap(OwnedFd);

impl Tap {
    pub fn new(namespace: &Netns) -> Self {
        Self(namespace.enter(|| {
            let all = SockProtocol::EthAll;
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let tap = socket(AddressFamily::Packet, SockType::Raw, flags, all).unwrap();
            setsockopt(&tap, sockopt::RcvBufForce, &(8 << 20)).unwrap();
            tap
        }))
    }

    /// The next frame that came in; without the namespace's own.
    pub fn next(&self, limit: Duration) -> Option<Vec<u8>> {
        let start = Instant::now();
        loop {
            let mut frame = vec![0; 65536];
            match recvfrom::<LinkAddr>(self.0.as_raw_fd(), &mut frame) {
                Ok((length, from)) => {
                    const PACKET_OUTGOING: u8 = 4;
                    if from.is_some_and(|from| from.pkttype() != PACKET_OUTGOING) {
                        frame.truncate(length);
                        return Some(frame);
                    }
                }
                Err(nix::errno::Errno::EAGAIN) => {
                    let left = limit.checked_sub(start.elapsed())?;
                    if !readable(&self.0, left) {
                        return None;
                    }
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// Whether a frame with this IP packet's end (transport header and data) comes within `limit`.
    pub fn sees(&self, payload: &[u8], limit: Duration) -> bool {
        let start = Instant::now();
        while let Some(left) = limit.checked_sub(start.elapsed()) {
            match self.next(left) {
                Some(frame) if frame.ends_with(payload) => return true,
                Some(_) => {}
                None => return false,
            }
        }
        false
    }
}
