//! Tells when interfaces or addresses change. What they are now is asked elsewhere
//! ([`super::environment::Host::read`]); a message is only the reason to ask at once.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
    },
};

use crate::poll::Readable;

/// linux/rtnetlink.h: RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR.
const GROUPS: u32 = 0x1 | 0x10 | 0x100;
const RTM_DELLINK: u16 = 17;
/// `struct nlmsghdr`.
const HEADER: usize = 16;

/// A subscription to rtnetlink.
pub struct Netlink {
    readable: Readable,
    socket: OwnedFd,
    buffer: Vec<u8>,
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

    /// Waits for a change. Returns the indices of interfaces that were removed, or moved to
    /// another namespace: they may be back already, without their programs. Safe to drop and
    /// call again.
    ///
    /// # Errors
    /// When the socket is broken.
    pub async fn changed(&mut self) -> io::Result<Vec<u32>> {
        let mut guard = self.readable.ready().await?;
        let mut removed = Vec::new();
        loop {
            let fd = self.socket.as_raw_fd();
            match recv(fd, &mut self.buffer, MsgFlags::empty()) {
                Ok(length) => {
                    let messages = self.buffer.get(..length).unwrap_or_default();
                    removed.extend(removed_links(messages));
                }
                Err(Errno::EAGAIN) => break,
                // Messages were lost; the caller looks at everything anyway.
                Err(Errno::EINTR | Errno::ENOBUFS) => {}
                Err(error) => return Err(error.into()),
            }
        }
        guard.clear_ready();
        Ok(removed)
    }
}

fn removed_links(mut messages: &[u8]) -> Vec<u32> {
    let word = |bytes: &[u8], at: usize| -> Option<u32> {
        let bytes = bytes.get(at..at + 4)?;
        Some(u32::from_ne_bytes(bytes.try_into().ok()?))
    };
    let mut removed = Vec::new();
    while let Some(length) = word(messages, 0) {
        let length = length as usize;
        let kind = messages
            .get(4..6)
            .and_then(|b| b.try_into().ok())
            .map(u16::from_ne_bytes);
        // `struct ifinfomsg`: family, padding and type before the index. Bridges report ports
        // that leave them with a family of their own; those links live on.
        let family = messages.get(HEADER).copied();
        if kind == Some(RTM_DELLINK)
            && family == Some(0)
            && let Some(index) = word(messages, HEADER + 4)
        {
            removed.push(index);
        }
        let next = length.max(HEADER).next_multiple_of(4);
        messages = messages.get(next..).unwrap_or_default();
    }
    removed
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
        assert_eq!(removed_links(&all), [6, 9]);
        assert_eq!(removed_links(&all[..60]), [6; 1]);
        assert!(removed_links(&[]).is_empty());
        assert!(removed_links(&[0; 40]).is_empty());
    }
}
