//! Packets that a receiver takes for real (checksums, link addresses), and how to put them on a
//! wire past the sender's own stack.

use std::{
    net::IpAddr,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
};

use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6,
    SockaddrLike as _, bind, connect, send, socket,
};

use crate::{frame, netns::Netns};

/// One's complement sum (RFC 1071) of bytes, folded.
fn sum(parts: &[&[u8]]) -> u16 {
    let mut total = 0u32;
    for part in parts {
        for pair in part.chunks(2) {
            let low = pair.get(1).copied().unwrap_or(0);
            total += u32::from(u16::from_be_bytes([pair[0], low]));
        }
    }
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    u16::try_from(total).unwrap()
}

/// Fills in the checksums of an IP packet without options or extension headers: of the IPv4
/// header, and of TCP, UDP, ICMP or ICMPv6.
pub fn checksummed(mut packet: Vec<u8>) -> Vec<u8> {
    let v4 = packet[0] >> 4 == 4;
    let (header, protocol) = if v4 { (20, packet[9]) } else { (40, packet[6]) };
    if v4 {
        packet[10..12].fill(0);
        let check = !sum(&[&packet[..20]]);
        packet[10..12].copy_from_slice(&check.to_be_bytes());
    }
    let at = header
        + match protocol {
            6 => 16,
            17 => 6,
            1 | 58 => 2,
            _ => return packet,
        };
    packet[at..at + 2].fill(0);
    let addresses = if v4 { &packet[12..20] } else { &packet[8..40] };
    let length = u32::try_from(packet.len() - header).unwrap().to_be_bytes();
    // ICMP alone has no pseudo header.
    let check = if protocol == 1 {
        !sum(&[&packet[header..]])
    } else {
        !sum(&[addresses, &length, &[0, protocol], &packet[header..]])
    };
    packet[at..at + 2].copy_from_slice(&check.to_be_bytes());
    packet
}

/// A UDP datagram as an IP packet.
pub fn udp(from: (IpAddr, u16), to: (IpAddr, u16), data: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + data.len()).unwrap();
    let mut datagram = Vec::new();
    datagram.extend(from.1.to_be_bytes());
    datagram.extend(to.1.to_be_bytes());
    datagram.extend(length.to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(data);
    checksummed(frame::ip(from.0, to.0, 17, &datagram))
}

/// A TCP segment as an IP packet.
pub fn tcp(
    from: (IpAddr, u16),
    to: (IpAddr, u16),
    flags: u8,
    (sequence, acknowledged): (u32, u32),
) -> Vec<u8> {
    let mut segment = frame::tcp(from.1, to.1, flags);
    segment[4..8].copy_from_slice(&sequence.to_be_bytes());
    segment[8..12].copy_from_slice(&acknowledged.to_be_bytes());
    checksummed(frame::ip(from.0, to.0, 6, &segment))
}

/// An ICMP message: "packet too big" of the family, for a next hop of 1280 bytes.
pub fn too_big(from: IpAddr, to: IpAddr, quoted: &[u8]) -> Vec<u8> {
    let (protocol, kind, code) = if from.is_ipv4() {
        (1, 3, 4)
    } else {
        (58, 2, 0)
    };
    let mut message = frame::icmp_error(kind, code, quoted);
    message[6..8].copy_from_slice(&1280u16.to_be_bytes());
    checksummed(frame::ip(from, to, protocol, &message))
}

/// The link address of an interface inside.
pub fn link_address(namespace: &Netns, interface: &str) -> [u8; 6] {
    let shown = namespace
        .ask("ip", &["-br", "link", "show", interface])
        .unwrap();
    let text = shown.split_whitespace().nth(2).unwrap();
    let bytes: Vec<u8> = text
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect();
    bytes.try_into().unwrap()
}

/// The Ethernet frame of an IP packet.
pub fn ethernet(from: [u8; 6], to: [u8; 6], packet: &[u8]) -> Vec<u8> {
    let ethertype: u16 = if packet[0] >> 4 == 4 { 0x0800 } else { 0x86dd };
    let mut frame = Vec::new();
    frame.extend(to);
    frame.extend(from);
    frame.extend(ethertype.to_be_bytes());
    frame.extend(packet);
    frame
}

/// A packet socket on an interface: what it sends is a frame as it is.
pub struct Packets(OwnedFd);

impl Packets {
    /// `bypass`: past the interface's queue and what hangs on it, TC among them.
    pub fn new(namespace: &Netns, interface: &str, bypass: bool) -> Self {
        namespace.enter(|| {
            let flags = SockFlag::SOCK_CLOEXEC;
            let socket = socket(AddressFamily::Packet, SockType::Raw, flags, None).unwrap();
            let ifindex = nix::net::if_::if_nametoindex(interface).unwrap();
            // SAFETY: all zeros is an address of the family "unspecified".
            let mut at = unsafe { std::mem::zeroed::<libc::sockaddr_ll>() };
            at.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
            at.sll_ifindex = ifindex.cast_signed();
            let length = u32::try_from(size_of_val(&at)).unwrap();
            // SAFETY: a whole address of the family it names, and its length.
            let at = unsafe { LinkAddr::from_raw((&raw const at).cast(), Some(length)) };
            bind(socket.as_raw_fd(), &at.unwrap()).unwrap();
            if bypass {
                let on = 1i32;
                // SAFETY: an option of type int, and its size.
                let set = unsafe {
                    libc::setsockopt(
                        socket.as_raw_fd(),
                        libc::SOL_PACKET,
                        libc::PACKET_QDISC_BYPASS,
                        (&raw const on).cast(),
                        4,
                    )
                };
                assert_eq!(set, 0);
            }
            Self(socket)
        })
    }

    /// For system calls that send many at once.
    pub fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// What the system call says: a drop on the way out is an error to some senders.
    pub fn try_send(&self, frame: &[u8]) -> nix::Result<usize> {
        send(self.0.as_raw_fd(), frame, MsgFlags::empty())
    }

    pub fn send(&self, frame: &[u8]) {
        assert_eq!(self.try_send(frame), Ok(frame.len()));
    }
}

/// A raw socket for many IP packets as they are, to one destination; they are routed.
pub struct Raw(OwnedFd);

impl Raw {
    pub fn new(namespace: &Netns, to: IpAddr) -> Self {
        namespace.enter(|| {
            let raw = |family| {
                let flags = SockFlag::SOCK_CLOEXEC;
                socket(family, SockType::Raw, flags, SockProtocol::Raw).unwrap()
            };
            let socket = match std::net::SocketAddr::new(to, 0) {
                std::net::SocketAddr::V4(to) => {
                    let socket = raw(AddressFamily::Inet);
                    connect(socket.as_raw_fd(), &SockaddrIn::from(to)).unwrap();
                    socket
                }
                std::net::SocketAddr::V6(to) => {
                    let socket = raw(AddressFamily::Inet6);
                    connect(socket.as_raw_fd(), &SockaddrIn6::from(to)).unwrap();
                    socket
                }
            };
            Self(socket)
        })
    }

    pub fn send(&self, packet: &[u8]) {
        send(self.0.as_raw_fd(), packet, MsgFlags::empty()).unwrap();
    }
}

/// Whether a frame is an IP packet (without options or extension headers) of this protocol to
/// this destination: a port of 0 is any.
pub fn is_to(frame: &[u8], to: std::net::SocketAddr, protocol: u8) -> bool {
    let (found, at, address) = match (frame.get(12..14), to.ip()) {
        (Some([0x08, 0x00]), IpAddr::V4(ip)) => (frame[23], 34, frame[30..34] == ip.octets()),
        (Some([0x86, 0xdd]), IpAddr::V6(ip)) => (frame[20], 54, frame[38..54] == ip.octets()),
        _ => return false,
    };
    let port = to.port() == 0 || frame.get(at + 2..at + 4) == Some(&to.port().to_be_bytes());
    address && found == protocol && port
}

/// Whether the one datagram that a fresh socket sends is echoed, however long it takes. "No" takes
/// a minute: see [`crate::traffic::udp_answers`] for what must not be answered.
pub fn echoes_once(namespace: &Netns, to: std::net::SocketAddr) -> bool {
    let unspecified = crate::traffic::unspecified(to.ip());
    let socket = crate::traffic::udp(namespace, (unspecified, 0), crate::daemon::LONG);
    socket.send_to(b"once", to).is_ok()
        && matches!(socket.recv_from(&mut [0; 8]), Ok((4, from)) if from == to)
}
