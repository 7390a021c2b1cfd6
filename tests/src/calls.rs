//! Ways for a process to send: every kind of socket and system call that a filter of calls may
//! forget.

use std::{
    io::IoSlice,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
    time::{Duration, Instant},
};

use io_uring::{IoUring, opcode, squeue, types::Fd};
use nix::{
    errno::Errno,
    sys::socket::{
        ControlMessage, MsgFlags, SockaddrLike as _, SockaddrStorage, connect, send, sendmsg,
        sendto,
    },
};

use crate::{
    frame,
    wire::{self, Packets},
};

/// A system call on a socket of some kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    TcpConnect,
    /// Data in the SYN, and no connect(2).
    TcpFastOpen,
    /// connect(2) through io_uring.
    RingConnect,
    MptcpConnect,
    UdpConnect,
    UdpSendto,
    UdpSendmsg,
    UdpSendmmsg,
    /// Three datagrams in one call (`UDP_SEGMENT`).
    UdpSegment,
    /// sendmsg(2) through io_uring.
    RingSendmsg,
    /// Zero-copy send to an address through io_uring.
    RingSend,
    UdpLiteConnect,
    UdpLiteSendto,
    /// A datagram socket of ICMP.
    Ping,
    RawIcmp,
    RawUdp,
    /// A raw socket that is given the IP header, too.
    RawHeader,
}

/// How the destination is written, and on what socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    V4,
    V6,
    /// `::ffff:10.1.0.2` on an IPv6 socket.
    Mapped,
    /// An IPv4 address on an IPv6 socket.
    V4OnV6,
}

/// What is sent.
pub const DATA: &[u8; 8] = b"a letter";

impl Form {
    fn address(self, to: SocketAddr) -> SockaddrStorage {
        match (self, to.ip()) {
            (Self::Mapped, IpAddr::V4(ip)) => {
                SocketAddr::new(ip.to_ipv6_mapped().into(), to.port()).into()
            }
            _ => to.into(),
        }
    }

    /// A socket; the kernel's refusal where it does not have the kind.
    pub fn socket(self, kind: i32, protocol: i32) -> nix::Result<OwnedFd> {
        let domain = match self {
            Self::V4 => libc::AF_INET,
            Self::V6 | Self::Mapped | Self::V4OnV6 => libc::AF_INET6,
        };
        let flags = kind | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: numbers only.
        let fd = Errno::result(unsafe { libc::socket(domain, flags, protocol) })?;
        // SAFETY: just opened, and nobody else's.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// The number of UDP-Lite.
pub const UDPLITE: i32 = 136;

impl Way {
    /// IP protocol on the wire.
    pub fn protocol(self, v6: bool) -> u8 {
        match self {
            Self::TcpConnect | Self::TcpFastOpen | Self::RingConnect | Self::MptcpConnect => 6,
            Self::UdpConnect
            | Self::UdpSendto
            | Self::UdpSendmsg
            | Self::UdpSendmmsg
            | Self::UdpSegment
            | Self::RingSendmsg
            | Self::RingSend
            | Self::RawUdp
            | Self::RawHeader => 17,
            Self::UdpLiteConnect | Self::UdpLiteSendto => 136,
            Self::Ping | Self::RawIcmp => 1 + 57 * u8::from(v6),
        }
    }

    fn open(self, form: Form) -> nix::Result<OwnedFd> {
        let icmp = if form == Form::V4 {
            libc::IPPROTO_ICMP
        } else {
            libc::IPPROTO_ICMPV6
        };
        let (kind, protocol) = match self {
            Self::TcpConnect | Self::TcpFastOpen | Self::RingConnect => (libc::SOCK_STREAM, 0),
            Self::MptcpConnect => (libc::SOCK_STREAM, libc::IPPROTO_MPTCP),
            Self::UdpConnect
            | Self::UdpSendto
            | Self::UdpSendmsg
            | Self::UdpSendmmsg
            | Self::UdpSegment
            | Self::RingSendmsg
            | Self::RingSend => (libc::SOCK_DGRAM, 0),
            Self::UdpLiteConnect | Self::UdpLiteSendto => (libc::SOCK_DGRAM, UDPLITE),
            Self::Ping => (libc::SOCK_DGRAM, icmp),
            Self::RawIcmp => (libc::SOCK_RAW, icmp),
            Self::RawUdp => (libc::SOCK_RAW, libc::IPPROTO_UDP),
            Self::RawHeader => (libc::SOCK_RAW, libc::IPPROTO_RAW),
        };
        form.socket(kind, protocol)
    }

    /// Whether this kernel has it. Asks by using it, towards the host itself.
    pub fn missing(self, form: Form, own: IpAddr) -> Option<Errno> {
        match self.open(form) {
            Err(errno) => Some(errno),
            Ok(_) if matches!(self, Self::RingConnect | Self::RingSendmsg | Self::RingSend) => {
                match self.send(form, (own, 9).into(), own) {
                    Err(errno @ (Errno::ENOSYS | Errno::EINVAL | Errno::EPERM)) => Some(errno),
                    _ => None,
                }
            }
            Ok(_) => None,
        }
    }

    /// Sends something from `own` to `to`. Nobody waits for a connection. `Ok` where the sender
    /// was told nothing; a drop on the way out is told to some.
    pub fn send(self, form: Form, to: SocketAddr, own: IpAddr) -> nix::Result<()> {
        let socket = self.open(form)?;
        let fd = socket.as_raw_fd();
        let address = form.address(to);
        let none = MsgFlags::empty();
        let port = to.port();
        let said = match self {
            Self::TcpConnect | Self::MptcpConnect => connect(fd, &address),
            Self::TcpFastOpen => {
                let flag = MsgFlags::from_bits_retain(libc::MSG_FASTOPEN);
                sendto(fd, DATA, &address, flag).map(drop)
            }
            Self::RingConnect => {
                let to = address.as_ptr().cast();
                ring(&opcode::Connect::new(Fd(fd), to, address.len()).build())
            }
            Self::UdpConnect | Self::UdpLiteConnect => {
                connect(fd, &address)?;
                send(fd, DATA, none).map(drop)
            }
            Self::UdpSendto | Self::UdpLiteSendto => sendto(fd, DATA, &address, none).map(drop),
            Self::UdpSendmsg => {
                sendmsg(fd, &[IoSlice::new(DATA)], &[], none, Some(&address)).map(drop)
            }
            Self::UdpSendmmsg => match sendmmsg(fd, &[address]) {
                Ok(_) => Ok(()),
                Err(errno) => Err(errno),
            },
            Self::UdpSegment => {
                let size = u16::try_from(DATA.len()).unwrap();
                let control = [ControlMessage::UdpGsoSegments(&size)];
                let data = DATA.repeat(3);
                sendmsg(fd, &[IoSlice::new(&data)], &control, none, Some(&address)).map(drop)
            }
            Self::RingSendmsg => {
                let mut part = libc::iovec {
                    iov_base: DATA.as_ptr().cast_mut().cast(),
                    iov_len: DATA.len(),
                };
                let message = header(&address, &mut part);
                ring(&opcode::SendMsg::new(Fd(fd), &raw const message).build())
            }
            Self::RingSend => {
                let length = u32::try_from(DATA.len()).unwrap();
                let send = opcode::SendZc::new(Fd(fd), DATA.as_ptr(), length)
                    .dest_addr(address.as_ptr().cast())
                    .dest_addr_len(address.len());
                ring(&send.build())
            }
            Self::Ping | Self::RawIcmp => {
                let kind = if form == Form::V4 { 8 } else { 128 };
                // A raw socket of ICMPv6 fills in the checksum, one of ICMP does not.
                let whole = wire::checksummed(frame::ip(
                    own,
                    to.ip(),
                    self.protocol(to.is_ipv6()),
                    &frame::icmp(kind, 0, port),
                ));
                let message = &whole[if to.is_ipv4() { 20 } else { 40 }..];
                sendto(fd, message, &without_port(to), none).map(drop)
            }
            Self::RawUdp => {
                let whole = wire::udp((own, 5000), (to.ip(), port), DATA);
                let datagram = &whole[if to.is_ipv4() { 20 } else { 40 }..];
                sendto(fd, datagram, &without_port(to), none).map(drop)
            }
            Self::RawHeader => {
                let whole = wire::udp((own, 5000), (to.ip(), port), DATA);
                sendto(fd, &whole, &without_port(to), none).map(drop)
            }
        };
        match said {
            Err(Errno::EINPROGRESS) => Ok(()),
            other => other,
        }
    }
}

/// What raw sockets take for a port is a protocol.
fn without_port(to: SocketAddr) -> SockaddrStorage {
    SocketAddr::new(to.ip(), 0).into()
}

fn header(to: &SockaddrStorage, part: &mut libc::iovec) -> libc::msghdr {
    // SAFETY: all zeros is a message of nothing to nobody.
    let mut message = unsafe { std::mem::zeroed::<libc::msghdr>() };
    message.msg_name = to.as_ptr().cast_mut().cast();
    message.msg_namelen = to.len();
    message.msg_iov = part;
    message.msg_iovlen = 1;
    message
}

/// One datagram to each in a single call; how many of them were sent.
pub fn sendmmsg(fd: RawFd, to: &[SockaddrStorage]) -> nix::Result<usize> {
    let mut part = libc::iovec {
        iov_base: DATA.as_ptr().cast_mut().cast(),
        iov_len: DATA.len(),
    };
    let mut messages: Vec<libc::mmsghdr> = to
        .iter()
        .map(|to| libc::mmsghdr {
            msg_hdr: header(to, &mut part),
            msg_len: 0,
        })
        .collect();
    let count = u32::try_from(messages.len()).unwrap();
    // SAFETY: headers of whole addresses and data, all of which outlive the call.
    let sent = unsafe { libc::sendmmsg(fd, messages.as_mut_ptr(), count, 0) };
    Errno::result(sent).map(|sent| usize::try_from(sent).unwrap())
}

/// Submits one operation. `Ok` if it is done, or still at it when anybody else would be done.
fn ring(entry: &squeue::Entry) -> nix::Result<()> {
    const PENDING: Duration = Duration::from_millis(50);
    let told = |error: std::io::Error| Errno::from_raw(error.raw_os_error().unwrap());
    let mut ring = IoUring::new(4).map_err(told)?;
    // SAFETY: what the entry points to outlives the ring, which ends with this function.
    unsafe { ring.submission().push(entry) }.unwrap();
    ring.submit().map_err(told)?;
    let start = Instant::now();
    while start.elapsed() < PENDING {
        if let Some(done) = ring.completion().next() {
            return match done.result() {
                0.. => Ok(()),
                error => Err(Errno::from_raw(-error)),
            };
        }
        std::thread::yield_now();
    }
    Ok(())
}

/// A frame with a UDP datagram, put on the wire as it is.
pub fn packet(packets: &Packets, links: ([u8; 6], [u8; 6]), own: IpAddr, to: SocketAddr) {
    let datagram = wire::udp((own, 5000), (to.ip(), to.port()), DATA);
    // ENOBUFS: dropped on the way out.
    let said = packets.try_send(&wire::ethernet(links.0, links.1, &datagram));
    assert!(matches!(said, Ok(_) | Err(Errno::ENOBUFS)), "{said:?}");
}
