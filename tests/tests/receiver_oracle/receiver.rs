//! The receiving host: sockets that say what was delivered, and the wire in front of it.

use std::{
    collections::BTreeSet,
    io::IoSliceMut,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use enforcer_tests::{daemon::LONG, netns::Netns};
use nix::{
    errno::Errno,
    sys::socket::{
        ControlMessageOwned, MsgFlags, SockaddrIn, SockaddrIn6, SockaddrStorage, bind, recv,
        recvmsg, send, setsockopt, sockopt,
    },
};

use crate::generate::{MARK, RAW_PROTOCOLS, SENDER_MAC, UDP_PORTS, ends};

/// One case's data in one socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Delivery {
    pub case: u32,
    pub source: IpAddr,
    pub destination: IpAddr,
    pub protocol: u8,
    /// Destination port; type and code of ICMP; 0 where there are none.
    pub selector: u16,
}

struct Listener {
    socket: OwnedFd,
    protocol: u8,
    v6: bool,
    /// Of UDP sockets.
    port: Option<u16>,
}

/// Sockets for every protocol that the cases speak.
pub struct Receiver {
    listeners: Vec<Listener>,
    tap: OwnedFd,
}

/// A protocol number as a socket wants it; nix knows a few by name only.
fn open(family: libc::c_int, kind: libc::c_int, protocol: libc::c_int) -> OwnedFd {
    use std::os::fd::FromRawFd as _;
    let kind = kind | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: plain numbers; the result is checked.
    let fd = unsafe { libc::socket(family, kind, protocol) };
    assert!(fd >= 0, "socket of protocol {protocol}: {}", Errno::last());
    // SAFETY: just opened, and nobody else's.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

impl Receiver {
    pub fn new(namespace: &Netns) -> Self {
        let mut listeners = Vec::new();
        let tap = namespace.enter(|| {
            for v6 in [false, true] {
                for port in UDP_PORTS {
                    listeners.push(Listener::udp(v6, port));
                }
                for protocol in RAW_PROTOCOLS {
                    listeners.push(Listener::raw(v6, protocol));
                }
            }
            let all = libc::c_int::from((libc::ETH_P_ALL as u16).to_be());
            let tap = open(libc::AF_PACKET, libc::SOCK_RAW, all);
            setsockopt(&tap, sockopt::RcvBufForce, &(32 << 20)).unwrap();
            tap
        });
        Self { listeners, tap }
    }

    /// Waits until this many frames of the sender have gone through the stack: taps see each frame
    /// before anything else does, and the last one is a fence that nothing takes.
    pub fn wait_for_frames(&self, count: usize) {
        let (start, mut seen) = (Instant::now(), 0);
        let mut bytes = [0; 64];
        while seen < count {
            match recv(self.tap.as_raw_fd(), &mut bytes, MsgFlags::empty()) {
                Ok(length) if length >= 14 && bytes[6..12] == SENDER_MAC => seen += 1,
                Ok(_) => {}
                Err(Errno::EAGAIN) => {
                    assert!(start.elapsed() < LONG, "{seen} of {count} frames came");
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// Takes what was delivered since the last call.
    pub fn deliveries(&self, into: &mut BTreeSet<Delivery>) {
        for listener in &self.listeners {
            listener.drain(into);
        }
    }
}

impl Listener {
    fn udp(v6: bool, port: u16) -> Self {
        let family = if v6 { libc::AF_INET6 } else { libc::AF_INET };
        let socket = open(family, libc::SOCK_DGRAM, 0);
        if v6 {
            setsockopt(&socket, sockopt::Ipv6V6Only, &true).unwrap();
            let any = std::net::SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0);
            bind(socket.as_raw_fd(), &SockaddrIn6::from(any)).unwrap();
        } else {
            let any = std::net::SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port);
            bind(socket.as_raw_fd(), &SockaddrIn::from(any)).unwrap();
        }
        Self::ready(socket, 17, v6, Some(port))
    }

    fn raw(v6: bool, protocol: u8) -> Self {
        let family = if v6 { libc::AF_INET6 } else { libc::AF_INET };
        let socket = open(family, libc::SOCK_RAW, libc::c_int::from(protocol));
        Self::ready(socket, protocol, v6, None)
    }

    fn ready(socket: OwnedFd, protocol: u8, v6: bool, port: Option<u16>) -> Self {
        setsockopt(&socket, sockopt::RcvBufForce, &(32 << 20)).unwrap();
        if v6 {
            setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true).unwrap();
        } else {
            setsockopt(&socket, sockopt::Ipv4PacketInfo, &true).unwrap();
        }
        Self {
            socket,
            protocol,
            v6,
            port,
        }
    }

    fn drain(&self, into: &mut BTreeSet<Delivery>) {
        let mut bytes = [0; 4096];
        let mut control = nix::cmsg_space!(libc::in6_pktinfo, libc::in_pktinfo);
        loop {
            let mut parts = [IoSliceMut::new(&mut bytes)];
            let fd = self.socket.as_raw_fd();
            let message = match recvmsg::<SockaddrStorage>(
                fd,
                &mut parts,
                Some(&mut control),
                MsgFlags::empty(),
            ) {
                Ok(message) => message,
                Err(Errno::EAGAIN) => return,
                // Errors about answers that found nobody.
                Err(_) => continue,
            };
            let destination = message.cmsgs().unwrap().find_map(|cmsg| match cmsg {
                ControlMessageOwned::Ipv4PacketInfo(info) => {
                    Some(IpAddr::from(info.ipi_addr.s_addr.to_ne_bytes()))
                }
                ControlMessageOwned::Ipv6PacketInfo(info) => {
                    Some(IpAddr::from(info.ipi6_addr.s6_addr))
                }
                _ => None,
            });
            let from = message.address.unwrap();
            let source: IpAddr = if self.v6 {
                from.as_sockaddr_in6().unwrap().ip().into()
            } else {
                from.as_sockaddr_in().unwrap().ip().into()
            };
            let (length, destination) = (message.bytes, destination.unwrap());
            let whole = &bytes[..length];
            // Raw IPv4 sockets show the header, options and all.
            let transport = match (self.port, self.v6) {
                (None, false) => whole
                    .get(usize::from(whole[0] & 15) * 4..)
                    .unwrap_or_default(),
                _ => whole,
            };
            let Some(case) = marked(transport) else {
                continue;
            };
            let pair = |at: usize| {
                let pair = transport.get(at..at + 2);
                pair.map_or(0, |p| u16::from_be_bytes([p[0], p[1]]))
            };
            let selector = match (self.port, self.protocol) {
                (Some(port), _) => port,
                (None, 6 | 33 | 132 | 136) => pair(2),
                (None, 1 | 58) => pair(0),
                _ => 0,
            };
            // This host's own complaints about packets quote them, and broadcast ones come back.
            let complaint = match (self.protocol, transport[0]) {
                (1, 3 | 4 | 5 | 11 | 12) | (58, 1..=4) => source == ends(self.v6).1,
                _ => false,
            };
            if complaint {
                continue;
            }
            into.insert(Delivery {
                case,
                source,
                destination,
                protocol: self.protocol,
                selector,
            });
        }
    }
}

/// The number of the case that these bytes are of.
fn marked(bytes: &[u8]) -> Option<u32> {
    let at = bytes.windows(4).position(|w| w == MARK)?;
    let number = bytes.get(at + 4..at + 8)?;
    Some(u32::from_be_bytes(number.try_into().unwrap()))
}

/// Sends frames as they are.
pub struct Sender(OwnedFd);

impl Sender {
    pub fn new(namespace: &Netns, interface: &str) -> Self {
        Self(namespace.enter(|| {
            let socket = open(libc::AF_PACKET, libc::SOCK_RAW, 0);
            let index = nix::net::if_::if_nametoindex(interface).unwrap();
            // SAFETY: numbers only.
            let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_ifindex = index.cast_signed();
            let length = size_of::<libc::sockaddr_ll>() as u32;
            // SAFETY: a whole sockaddr_ll of its length.
            let bound = unsafe {
                libc::bind(
                    socket.as_raw_fd(),
                    (&raw const address).cast::<libc::sockaddr>(),
                    length,
                )
            };
            assert_eq!(bound, 0, "{}", Errno::last());
            socket
        }))
    }

    pub fn send(&self, frame: &[u8]) {
        let start = Instant::now();
        loop {
            match send(self.0.as_raw_fd(), frame, MsgFlags::empty()) {
                Ok(length) => return assert_eq!(length, frame.len()),
                Err(Errno::ENOBUFS | Errno::EAGAIN) if start.elapsed() < LONG => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => panic!("{error}: {frame:02x?}"),
            }
        }
    }
}
