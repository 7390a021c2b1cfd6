//! A cable with raw frames at one end and, at the other, sockets that say what got through.

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use enforcer_tests::{
    daemon::LONG,
    netns::{Netns, Pair},
};
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, recv, send, setsockopt, sockopt},
};

/// What every payload begins with, before its number.
const MARK: [u8; 4] = *b"enft";
/// Protocols that somebody listens for, IPv4 and IPv6.
const V4: [u8; 9] = [1, 6, 17, 47, 50, 51, 132, 136, 253];
const V6: [u8; 11] = [6, 17, 47, 50, 51, 59, 132, 135, 136, 139, 140];
/// Ethertypes that somebody listens for behind the enforcer; 4 is LLC.
const ETHERTYPES: [u16; 12] = [
    0x0800, 0x86dd, 0x0004, 0x88b5, 0x8847, 0x8864, 0x88cc, 0x8809, 0x888e, 0x88f7, 0x9100, 0x88a8,
];

/// The data of a packet that can be told from any other.
pub fn mark(number: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&MARK);
    bytes[4..].copy_from_slice(&number.to_be_bytes());
    bytes
}

/// A whole packet that the stack gave to a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Delivery {
    pub protocol: u8,
    /// Destination port, 0 without one.
    pub port: u16,
    pub mark: u32,
}

/// A socket; nix knows few protocols by number.
pub fn open(family: i32, kind: i32, protocol: i32) -> OwnedFd {
    let kind = kind | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: plain numbers; the result is checked.
    let fd = unsafe { libc::socket(family, kind, protocol) };
    assert!(fd >= 0, "socket {family} {protocol}: {}", Errno::last());
    // SAFETY: just opened, and nobody else's.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Sends frames as they are out of one interface.
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
            let fd = socket.as_raw_fd();
            // SAFETY: a whole sockaddr_ll of its length.
            let bound = unsafe { libc::bind(fd, (&raw const address).cast(), length) };
            assert_eq!(bound, 0, "{}", Errno::last());
            socket
        }))
    }

    /// Every frame has a `virtio_net_hdr` in front from now on.
    pub fn with_virtio_header(self) -> Self {
        const PACKET_VNET_HDR: i32 = 15;
        let on = 1i32;
        // SAFETY: an int and its length.
        let set = unsafe {
            libc::setsockopt(
                self.0.as_raw_fd(),
                libc::SOL_PACKET,
                PACKET_VNET_HDR,
                (&raw const on).cast(),
                size_of::<i32>() as u32,
            )
        };
        assert_eq!(set, 0, "{}", Errno::last());
        self
    }

    /// Sends what this host itself may refuse: `false` if it does.
    pub fn try_send(&self, frame: &[u8]) -> bool {
        match send(self.0.as_raw_fd(), frame, MsgFlags::empty()) {
            Ok(_) => true,
            // A drop on the way out.
            Err(Errno::ENOBUFS) => false,
            Err(error) => panic!("{error}: a frame of {} bytes", frame.len()),
        }
    }

    pub fn send(&self, frame: &[u8]) {
        let start = Instant::now();
        loop {
            match send(self.0.as_raw_fd(), frame, MsgFlags::empty()) {
                Ok(length) => return assert_eq!(length, frame.len()),
                Err(Errno::EAGAIN | Errno::ENOBUFS) if start.elapsed() < LONG => {
                    std::thread::yield_now();
                }
                Err(error) => panic!("{error}: a frame of {} bytes", frame.len()),
            }
        }
    }
}

/// Sees what comes past the enforcer.
pub struct Receiver {
    raw: Vec<(u8, bool, OwnedFd)>,
    packet: Vec<OwnedFd>,
}

impl Receiver {
    pub fn new(namespace: &Netns) -> Self {
        namespace.enter(|| {
            let mut raw = Vec::new();
            for (v6, protocols) in [(false, &V4[..]), (true, &V6[..])] {
                let family = if v6 { libc::AF_INET6 } else { libc::AF_INET };
                for protocol in protocols {
                    let socket = open(family, libc::SOCK_RAW, (*protocol).into());
                    raw.push((*protocol, v6, socket));
                }
            }
            // One protocol, not all: those see a frame only after the TC hook.
            let packet = ETHERTYPES
                .iter()
                .map(|t| open(libc::AF_PACKET, libc::SOCK_RAW, t.to_be().into()))
                .collect::<Vec<_>>();
            for socket in raw.iter().map(|r| &r.2).chain(&packet) {
                setsockopt(socket, sockopt::RcvBufForce, &(32 << 20)).unwrap();
            }
            Self { raw, packet }
        })
    }

    /// Frames past the TC hook since the last call, as they are there, marked ones.
    pub fn frames(&self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        for socket in &self.packet {
            while let Some(bytes) = take(socket) {
                if marked(&bytes).is_some() {
                    frames.push(bytes);
                }
            }
        }
        frames
    }

    /// What the stack has delivered since the last call.
    pub fn deliveries(&self, into: &mut BTreeSet<Delivery>) {
        for (protocol, v6, socket) in &self.raw {
            while let Some(bytes) = take(socket) {
                let Some(mark) = marked(&bytes) else { continue };
                // Raw IPv4 sockets show the header, options and all.
                let at = if *v6 {
                    0
                } else {
                    usize::from(bytes[0] & 15) * 4
                };
                // A host's complaint to itself quotes the packet.
                if (*protocol, bytes[at]) == (1, 3) {
                    continue;
                }
                let port = match protocol {
                    6 | 17 | 132 | 136 => u16::from_be_bytes([bytes[at + 2], bytes[at + 3]]),
                    _ => 0,
                };
                into.insert(Delivery {
                    protocol: *protocol,
                    port,
                    mark,
                });
            }
        }
    }
}

fn take(socket: &OwnedFd) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 65536];
    loop {
        match recv(socket.as_raw_fd(), &mut bytes, MsgFlags::empty()) {
            Ok(length) => {
                bytes.truncate(length);
                return Some(bytes);
            }
            Err(Errno::EAGAIN) => return None,
            // Errors about answers that found nobody.
            Err(_) => {}
        }
    }
}

/// The number of a marked packet.
pub fn marked(bytes: &[u8]) -> Option<u32> {
    let at = bytes.windows(4).position(|w| w == MARK)?;
    let number = bytes.get(at + 4..at + 8)?;
    Some(u32::from_be_bytes(number.try_into().unwrap()))
}

/// A cable of a [`Pair`] from `peer` to `host`.
pub struct Wire {
    pub sender: Sender,
    pub receiver: Receiver,
}

impl Wire {
    pub fn new(pair: &Pair) -> Self {
        // As `frame::ethernet` has them.
        pair.host.ip("link set eth0 address 02:00:00:00:00:02\n");
        pair.peer.ip("link set eth0 address 02:00:00:00:00:01\n");
        let mut neighbours = String::new();
        for number in 2..6 {
            for net in ["10.1.0.", "fd01::"] {
                neighbours += &format!(
                    "neigh replace {net}{number} lladdr 02:00:00:00:00:01 dev eth0 nud permanent\n"
                );
            }
        }
        pair.host.ip(&neighbours);
        for name in ["all", "eth0"] {
            pair.host
                .sysctl(&format!("ipv4/conf/{name}/rp_filter"), "0");
        }
        // Packets that never get whole wait for half a minute: the others need room beside them.
        for name in ["ipv4/ipfrag_high_thresh", "ipv6/ip6frag_high_thresh"] {
            pair.host.sysctl(name, "134217728");
        }
        Self {
            sender: Sender::new(&pair.peer, "eth0"),
            receiver: Receiver::new(&pair.host),
        }
    }

    /// Sends frames and one more that must arrive; what arrived with it.
    pub fn send(&self, frames: &[Vec<u8>], fence: (&[u8], u32)) -> BTreeSet<Delivery> {
        for frame in frames {
            self.sender.send(frame);
        }
        self.sender.send(fence.0);
        let (start, mut delivered) = (Instant::now(), BTreeSet::new());
        loop {
            self.receiver.deliveries(&mut delivered);
            let (fences, others): (BTreeSet<_>, _) =
                delivered.into_iter().partition(|d| d.mark == fence.1);
            delivered = others;
            if !fences.is_empty() {
                // In order on one processor: all before it are through.
                self.receiver.deliveries(&mut delivered);
                return delivered;
            }
            assert!(start.elapsed() < LONG, "the last frame did not come");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Turns receive offload of VLAN tags on or off, as `ethtool -K rxvlan` does.
pub fn receive_offload(namespace: &Netns, interface: &str, on: bool) -> io::Result<()> {
    const ETHTOOL_GFLAGS: u32 = 0x25;
    const ETHTOOL_SFLAGS: u32 = 0x26;
    const ETH_FLAG_RXVLAN: u32 = 1 << 8;
    namespace.enter(|| {
        let socket = open(libc::AF_INET, libc::SOCK_DGRAM, 0);
        let ask = |command: u32, data: u32| {
            let mut value = [command, data];
            // SAFETY: zeros are a request without a name.
            let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
            for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
                *to = from.cast_signed();
            }
            request.ifr_ifru.ifru_data = value.as_mut_ptr().cast();
            // SAFETY: SIOCETHTOOL reads and writes an `ethtool_value` behind the pointer.
            let done =
                unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) };
            if done == 0 {
                Ok(value[1])
            } else {
                Err(io::Error::last_os_error())
            }
        };
        let flags = ask(ETHTOOL_GFLAGS, 0)?;
        let wanted = if on {
            flags | ETH_FLAG_RXVLAN
        } else {
            flags & !ETH_FLAG_RXVLAN
        };
        ask(ETHTOOL_SFLAGS, wanted)?;
        assert_eq!(ask(ETHTOOL_GFLAGS, 0)?, wanted);
        Ok(())
    })
}
