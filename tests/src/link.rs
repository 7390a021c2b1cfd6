//! What a link lives on: frames of ARP, neighbour discovery and DHCP, and what a host takes in.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{LinkAddr, MsgFlags, SockaddrLike as _, bind, recv},
};

use crate::{frame, netns::Netns, wire};

/// Everybody on a link.
pub const BROADCAST: [u8; 6] = [0xff; 6];

/// Frames of one ethertype that came in at an interface, and past its programs: unlike a tap, which
/// sees them before.
pub struct Delivered(OwnedFd);

impl Delivered {
    pub fn new(namespace: &Netns, interface: &str, ethertype: u16) -> Self {
        namespace.enter(|| {
            let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
            // SAFETY: plain numbers.
            let raw = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
            assert!(raw >= 0, "{}", Errno::last());
            // SAFETY: the kernel has just made it for this process.
            let socket = unsafe { OwnedFd::from_raw_fd(raw) };
            let ifindex = nix::net::if_::if_nametoindex(interface).unwrap();
            // SAFETY: all zeros is an address of the family "unspecified".
            let mut at = unsafe { std::mem::zeroed::<libc::sockaddr_ll>() };
            at.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
            at.sll_protocol = ethertype.to_be();
            at.sll_ifindex = ifindex.cast_signed();
            let length = u32::try_from(size_of_val(&at)).unwrap();
            // SAFETY: a whole address of the family it names, and its length.
            let at = unsafe { LinkAddr::from_raw((&raw const at).cast(), Some(length)) };
            bind(socket.as_raw_fd(), &at.unwrap()).unwrap();
            Self(socket)
        })
    }

    /// The next frame, of those that are too long the beginning.
    pub fn next(&self, limit: Duration) -> Option<Vec<u8>> {
        let mut frame = vec![0; 65536];
        let length = self.receive(&mut frame, limit)?;
        frame.truncate(length);
        Some(frame)
    }

    /// Length of the next frame, however long it is.
    pub fn length(&self, limit: Duration) -> Option<usize> {
        self.receive(&mut [0; 64], limit)
    }

    fn receive(&self, frame: &mut [u8], limit: Duration) -> Option<usize> {
        let start = Instant::now();
        loop {
            match recv(self.0.as_raw_fd(), frame, MsgFlags::MSG_TRUNC) {
                Ok(length) => return Some(length),
                Err(Errno::EAGAIN) => {
                    let left = limit.checked_sub(start.elapsed())?;
                    let timeout = PollTimeout::try_from(left).unwrap();
                    let mut polled = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
                    if poll(&mut polled, timeout).unwrap() == 0 {
                        return None;
                    }
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// The next frame of which `is` is true.
    pub fn find(&self, limit: Duration, is: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        let start = Instant::now();
        while let Some(left) = limit.checked_sub(start.elapsed()) {
            match self.next(left) {
                Some(frame) if is(&frame) => return Some(frame),
                Some(_) => {}
                None => return None,
            }
        }
        None
    }
}

/// A frame of this ethertype (or length) around `payload`.
pub fn ethernet(from: [u8; 6], to: [u8; 6], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    frame.extend(to);
    frame.extend(from);
    frame.extend(ethertype.to_be_bytes());
    frame.extend(payload);
    // The shortest that goes over a wire.
    frame.resize(frame.len().max(60), 0);
    frame
}

/// An ARP message, 1 asks, 2 answers: `from` says of itself, `about` is asked for.
pub fn arp(
    operation: u16,
    from: ([u8; 6], Ipv4Addr),
    about: ([u8; 6], Ipv4Addr),
    to: [u8; 6],
) -> Vec<u8> {
    let mut message = vec![0, 1, 8, 0, 6, 4];
    message.extend(operation.to_be_bytes());
    for (link, ip) in [from, about] {
        message.extend(link);
        message.extend(ip.octets());
    }
    ethernet(from.0, to, 0x0806, &message)
}

/// An ICMPv6 message as an IPv6 packet.
pub fn icmpv6(from: Ipv6Addr, to: Ipv6Addr, hop_limit: u8, message: &[u8]) -> Vec<u8> {
    let packet = frame::ip(IpAddr::V6(from), IpAddr::V6(to), 58, message);
    let mut packet = wire::checksummed(packet);
    packet[7] = hop_limit;
    packet
}

/// A neighbour solicitation for `target` with the sender's link address.
pub fn neighbour_solicitation(target: Ipv6Addr, link: [u8; 6]) -> Vec<u8> {
    let mut message = vec![135, 0, 0, 0, 0, 0, 0, 0];
    message.extend(target.octets());
    message.extend([1, 1]);
    message.extend(link);
    message
}

/// A router advertisement: this router for half an hour, and a prefix of 64 bits to make addresses
/// of.
pub fn router_advertisement(prefix: Ipv6Addr, link: [u8; 6]) -> Vec<u8> {
    let mut message = vec![134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
    message.extend([1, 1]);
    message.extend(link);
    // On-link and autonomous, valid for a day, preferred for half of it.
    message.extend([
        3, 4, 64, 0xc0, 0, 1, 0x51, 0x80, 0, 0, 0xa8, 0xc0, 0, 0, 0, 0,
    ]);
    message.extend(prefix.octets());
    message
}

/// A DHCP message.
#[derive(Clone, Copy, Debug)]
pub struct Dhcp {
    /// 1 discover, 2 offer, 3 request, 5 acknowledgement.
    pub kind: u8,
    pub transaction: u32,
    /// The client's link address.
    pub client: [u8; 6],
    /// The address it has.
    pub has: Ipv4Addr,
    /// The address it is to have.
    pub gets: Ipv4Addr,
}

impl Dhcp {
    /// Its bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let answer = matches!(self.kind, 2 | 5 | 6);
        let mut bytes = vec![if answer { 2 } else { 1 }, 1, 6, 0];
        bytes.extend(self.transaction.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(self.has.octets());
        bytes.extend(self.gets.octets());
        bytes.extend([0; 8]);
        bytes.extend(self.client);
        bytes.resize(236, 0);
        bytes.extend([99, 130, 83, 99, 53, 1, self.kind, 255]);
        bytes.resize(300, 0);
        bytes
    }

    /// Kind and transaction of a message.
    pub fn read(bytes: &[u8]) -> Option<(u8, u32)> {
        let transaction = u32::from_be_bytes(bytes.get(4..8)?.try_into().ok()?);
        let options = bytes.get(240..243)?;
        (options[..2] == [53, 1]).then_some((options[2], transaction))
    }
}

/// The link-local address of an interface inside.
pub fn link_local(namespace: &Netns, interface: &str) -> Ipv6Addr {
    let shown = namespace
        .ask("ip", &["-6", "-br", "addr", "show", "dev", interface])
        .unwrap();
    let mut words = shown.split_whitespace().filter_map(|w| w.split('/').next());
    let found = words.find(|word| word.starts_with("fe80:"));
    found.unwrap().parse().unwrap()
}
