//! Frames sent as fast as one CPU can, with everything that becomes of them in the sender's own
//! context: past the interface's queue, a veth's other end runs in the same system call.

use std::{
    os::fd::AsRawFd as _,
    time::{Duration, Instant},
};

use nix::errno::Errno;

use super::policy::Flow;
use crate::{frame, kernel, netns::Netns, wire, wire::Packets};

/// Frames in one system call.
const AT_ONCE: usize = 64;
/// Bytes of a frame: the shortest that hold IPv6, UDP and an Ethernet header.
const LENGTH: usize = 64;

/// Keeps this thread on the CPU that it is on, and others from taking it in the midst of a
/// measurement.
pub fn settle() {
    kernel::pin();
    // SAFETY: plain numbers; of this thread alone.
    let result = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -20) };
    assert_eq!(result, 0, "{}", Errno::last());
}

/// Sends this thread to any other CPU than those that it was kept on, if there is one.
pub fn leave_cpu() {
    let this = nix::unistd::Pid::from_raw(0);
    let kept = nix::sched::sched_getaffinity(this).unwrap();
    let mut others = nix::sched::CpuSet::new();
    for cpu in 0..nix::sched::CpuSet::count() {
        if !kept.is_set(cpu).unwrap() {
            others.set(cpu).unwrap();
        }
    }
    // The kernel refuses a set without a CPU that is there.
    let _ = nix::sched::sched_setaffinity(this, &others);
    // SAFETY: plain numbers; of this thread alone.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 0) };
}

/// Frames that lie ready.
pub struct Frames {
    bytes: Vec<[u8; LENGTH]>,
}

impl Frames {
    /// A datagram of each flow, from a link address to another.
    pub fn new(links: ([u8; 6], [u8; 6]), flows: impl Iterator<Item = Flow>) -> Self {
        let bytes = flows.map(|flow| datagram(links, &flow)).collect();
        Self { bytes }
    }

    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

fn datagram(links: ([u8; 6], [u8; 6]), flow: &Flow) -> [u8; LENGTH] {
    let headers = if flow.source.is_ipv4() { 34 } else { 54 };
    let mut transport = Vec::with_capacity(LENGTH);
    transport.extend(flow.source_port.to_be_bytes());
    transport.extend(flow.destination_port.to_be_bytes());
    let length = u16::try_from(LENGTH - headers).unwrap();
    transport.extend(length.to_be_bytes());
    transport.resize(LENGTH - headers, 0);
    let packet = frame::ip(flow.source, flow.destination, 17, &transport);
    let mut packet = wire::checksummed(packet);
    if flow.source.is_ipv4() {
        // None: a network card would have checked it, conntrack should not have to.
        packet[26..28].fill(0);
    }
    wire::ethernet(links.0, links.1, &packet)
        .try_into()
        .unwrap()
}

/// Sends frames into an interface.
pub struct Sender {
    socket: Packets,
}

impl Sender {
    pub fn new(namespace: &Netns, interface: &str) -> Self {
        let socket = Packets::new(namespace, interface, true);
        Self { socket }
    }

    /// Sends every frame once; how long that took.
    pub fn send(&self, frames: &mut Frames) -> Duration {
        let mut parts: Vec<libc::iovec> = frames
            .bytes
            .iter_mut()
            .map(|frame| libc::iovec {
                iov_base: frame.as_mut_ptr().cast(),
                iov_len: LENGTH,
            })
            .collect();
        let mut messages: Vec<libc::mmsghdr> = parts
            .iter_mut()
            .map(|part| {
                // SAFETY: all zeros is a message of nothing to nobody.
                let mut message = unsafe { std::mem::zeroed::<libc::mmsghdr>() };
                message.msg_hdr.msg_iov = part;
                message.msg_hdr.msg_iovlen = 1;
                message
            })
            .collect();
        let fd = self.socket.fd().as_raw_fd();
        let start = Instant::now();
        for chunk in messages.chunks_mut(AT_ONCE) {
            let mut sent = 0;
            while let rest @ [_, ..] = &mut chunk[sent..] {
                let count = u32::try_from(rest.len()).unwrap();
                // SAFETY: as many messages as told, each of one part of a frame that lives on.
                let said = unsafe { libc::sendmmsg(fd, rest.as_mut_ptr(), count, 0) };
                match Errno::result(said) {
                    Ok(count) => sent += usize::try_from(count).unwrap(),
                    // The receiving end had no room for this one: offered, and lost.
                    Err(Errno::ENOBUFS) => sent += 1,
                    Err(Errno::EINTR) => {}
                    Err(error) => panic!("sendmmsg: {error}"),
                }
            }
        }
        start.elapsed()
    }
}
