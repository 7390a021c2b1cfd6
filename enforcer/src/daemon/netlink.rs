//! rtnetlink: which links there are, and when links or addresses change. A message about a change
//! is only the reason to look at once ([`super::environment::Host::read`]).

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendto,
        socket,
    },
};

use super::environment::Link;
use crate::poll::Readable;

/// linux/rtnetlink.h: RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR.
const GROUPS: u32 = 0x1 | 0x10 | 0x100;
const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// NLM_F_REQUEST, NLM_F_DUMP.
const DUMP: u16 = 0x1 | 0x300;
/// NLM_F_DUMP_INTR: links came or went during the dump.
const INTERRUPTED: u16 = 0x10;
/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// `struct ifinfomsg`.
const INFO: usize = 16;
const IFLA_IFNAME: u16 = 3;
const IFF_UP: u32 = 0x1;
const IFF_LOOPBACK: u32 = 0x8;
/// Dumps that links may disturb before the last one is taken as it is.
const ATTEMPTS: usize = 8;

/// A subscription to rtnetlink.
pub struct Netlink {
    readable: Readable,
    socket: OwnedFd,
    buffer: Vec<u8>,
}

/// What is known of changes.
#[derive(Debug, Default)]
pub struct Changes {
    /// Interfaces that were removed, or moved to another namespace: they may be back already,
    /// without their programs.
    pub removed: Vec<u32>,
    /// Messages were lost: anything may have happened.
    pub lost: bool,
}

impl Netlink {
    /// Must be called on a tokio runtime.
    ///
    /// # Errors
    /// What the socket calls say.
    pub fn new() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, GROUPS))?;
        Ok(Self {
            readable: Readable::new(&socket)?,
            socket,
            buffer: vec![0; 65_536],
        })
    }

    /// Waits for a change. Safe to drop and call again.
    ///
    /// # Errors
    /// When the socket is broken.
    pub async fn changed(&mut self) -> io::Result<Changes> {
        let mut guard = self.readable.ready().await?;
        let mut changes = Changes::default();
        loop {
            let fd = self.socket.as_raw_fd();
            match recv(fd, &mut self.buffer, MsgFlags::empty()) {
                Ok(length) => {
                    let messages = self.buffer.get(..length).unwrap_or_default();
                    changes.removed.extend(removed_links(messages));
                }
                Err(Errno::EAGAIN) => break,
                Err(Errno::ENOBUFS) => changes.lost = true,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        guard.clear_ready();
        Ok(changes)
    }
}

/// All links of this namespace, by index.
///
/// # Errors
/// What the socket calls or the kernel say.
pub fn links() -> io::Result<Vec<Link>> {
    let mut attempt = 1;
    loop {
        let (links, whole) = dump()?;
        if whole || attempt == ATTEMPTS {
            return Ok(links.into_values().collect());
        }
        attempt += 1;
    }
}

/// The links, and whether they were left alone meanwhile.
fn dump() -> io::Result<(BTreeMap<u32, Link>, bool)> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    let mut request = Vec::with_capacity(HEADER + INFO);
    request.extend(((HEADER + INFO) as u32).to_ne_bytes());
    request.extend(RTM_GETLINK.to_ne_bytes());
    request.extend(DUMP.to_ne_bytes());
    request.resize(HEADER + INFO, 0);
    let kernel = NetlinkAddr::new(0, 0);
    sendto(socket.as_raw_fd(), &request, &kernel, MsgFlags::empty())?;
    let mut buffer = vec![0; 65_536];
    let (mut links, mut whole) = (BTreeMap::new(), true);
    loop {
        let length = match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(length) => length,
            Err(Errno::EINTR) => continue,
            Err(error) => return Err(error.into()),
        };
        for message in messages(buffer.get(..length).unwrap_or_default()) {
            whole &= message.flags & INTERRUPTED == 0;
            match message.kind {
                NLMSG_DONE => return Ok((links, whole)),
                NLMSG_ERROR => {
                    let code = word(message.body, 0).unwrap_or(0).cast_signed();
                    return Err(io::Error::from_raw_os_error(code.wrapping_neg()));
                }
                RTM_NEWLINK => {
                    if let Some(link) = link(message.body) {
                        links.insert(link.ifindex, link);
                    }
                }
                _ => {}
            }
        }
    }
}

/// A link from the body of RTM_NEWLINK.
fn link(body: &[u8]) -> Option<Link> {
    let flags = word(body, 8)?;
    let mut attributes = body.get(INFO..)?;
    let name = loop {
        let length = usize::from(half(attributes, 0)?).max(4);
        if half(attributes, 2)? == IFLA_IFNAME {
            let name = attributes.get(4..length)?;
            let name = name.split(|b| *b == 0).next().unwrap_or_default();
            break String::from_utf8_lossy(name).into_owned();
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    };
    Some(Link {
        ifindex: word(body, 4)?,
        name,
        kind: half(body, 2)?,
        up: flags & IFF_UP != 0,
        loopback: flags & IFF_LOOPBACK != 0,
    })
}

fn removed_links(bytes: &[u8]) -> impl Iterator<Item = u32> {
    // Bridges report ports that leave them with a family of their own; those links live on.
    messages(bytes)
        .filter(|m| m.kind == RTM_DELLINK && m.body.first() == Some(&0))
        .filter_map(|m| word(m.body, 4))
}

struct Message<'a> {
    kind: u16,
    flags: u16,
    body: &'a [u8],
}

/// Cut off where the bytes end.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let length = (word(bytes, 0)? as usize).max(HEADER);
        let message = Message {
            kind: half(bytes, 4)?,
            flags: half(bytes, 6)?,
            body: bytes.get(HEADER..length.min(bytes.len()))?,
        };
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + 4)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at + 2)?;
    Some(u16::from_ne_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, family: u8, index: u32) -> Vec<u8> {
        let mut bytes = vec![0; 32];
        bytes[..4].copy_from_slice(&32u32.to_ne_bytes());
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[16] = family;
        bytes[20..24].copy_from_slice(&index.to_ne_bytes());
        bytes
    }

    #[test]
    fn removed_links_are_read_and_nothing_else() {
        let all = [
            message(16, 0, 5),
            message(RTM_DELLINK, 0, 6),
            message(RTM_DELLINK, 7, 8),
            message(RTM_DELLINK, 0, 9),
        ]
        .concat();
        let removed = |bytes: &[u8]| removed_links(bytes).collect::<Vec<_>>();
        assert_eq!(removed(&all), [6, 9]);
        assert_eq!(removed(&all[..60]), [6; 1]);
        assert!(removed(&[]).is_empty());
        assert!(removed(&[0; 40]).is_empty());
    }
}
