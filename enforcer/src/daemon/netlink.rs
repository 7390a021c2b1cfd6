//! rtnetlink: which links and addresses there are, and when they change. What a message says of a
//! link counts at once; for anything else it is the reason to look ([`super::environment::Host`]).

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendto,
        setsockopt, socket, sockopt::RcvBufForce,
    },
};

use super::{
    environment::{Link, Vlan},
    routes,
};
use crate::poll::Readable;

/// linux/rtnetlink.h: RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR.
const GROUPS: u32 = 0x1 | 0x10 | 0x100;
/// RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_ROUTE.
const ROUTE_GROUPS: u32 = 0x40 | 0x400;
const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
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
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_WIRELESS: u16 = 11;
const IFLA_LINKINFO: u16 = 18;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_TUN_TYPE: u16 = 3;
const IFLA_VLAN_ID: u16 = 1;
const IFLA_VLAN_PROTOCOL: u16 = 5;
/// 802.1ad, as IFLA_VLAN_PROTOCOL has it.
const SERVICE_TAG: [u8; 2] = [0x88, 0xa8];
/// NLA_TYPE_MASK: what is above are flags.
const TYPE: u16 = 0x3fff;
/// `struct ifaddrmsg`.
const ADDRESS: usize = 8;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;
const IFA_F_OPTIMISTIC: u32 = 0x04;
const IFA_F_DADFAILED: u32 = 0x08;
const IFA_F_TENTATIVE: u32 = 0x40;
const IFF_UP: u32 = 0x1;
const IFF_LOOPBACK: u32 = 0x8;
/// Dumps that links may disturb before the last one is taken as it is.
const ATTEMPTS: usize = 3;
/// Messages that may wait, in bytes: a thousand links that come at once say 4 MB.
const BACKLOG: usize = 16 << 20;
/// Messages that are read before anything is done about them.
const AT_ONCE: usize = 512;

/// A subscription to rtnetlink.
pub struct Netlink {
    readable: Readable,
    socket: OwnedFd,
    buffer: Vec<u8>,
}

/// What is known of changes.
#[derive(Debug, Default)]
pub struct Changes {
    /// Links as they are now, of those that are new or have changed.
    pub links: BTreeMap<u32, Link>,
    /// Interfaces that were removed, or moved to another namespace: they may be back already,
    /// without their programs.
    pub removed: Vec<u32>,
    /// Addresses have changed.
    pub addresses: bool,
    /// Default routes have changed.
    pub routes: bool,
    /// Links may have changed in ways that no message says.
    pub look: bool,
    /// Messages were lost: anything may have happened.
    pub lost: bool,
}

impl Changes {
    fn read(&mut self, bytes: &[u8]) {
        for message in messages(bytes) {
            // Bridges report their ports with a family of their own; a port that leaves lives on.
            let of_link = message.body.first() == Some(&0);
            match message.kind {
                RTM_NEWLINK if of_link => match link(message.body) {
                    Some(link) if whole(message.body) => {
                        self.links.insert(link.ifindex, link);
                    }
                    _ => self.look = true,
                },
                RTM_DELLINK if of_link => {
                    if let Some(ifindex) = word(message.body, 4) {
                        self.links.remove(&ifindex);
                        self.removed.push(ifindex);
                    }
                }
                RTM_NEWADDR | RTM_DELADDR => self.addresses = true,
                kind => self.routes |= routes::is_default(kind, message.body),
            }
        }
    }
}

/// Whether a message says all about a link: those of wireless extensions do not.
fn whole(body: &[u8]) -> bool {
    let mut attributes = attributes(body.get(INFO..).unwrap_or_default());
    !attributes.any(|(kind, _)| kind == IFLA_WIRELESS)
}

impl Netlink {
    /// Must be called on a tokio runtime. Listens for routes only if they matter: there may be a
    /// million.
    ///
    /// # Errors
    /// What the socket calls say.
    pub fn new(routes: bool) -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        // Room is a help, not a need: what is lost is found by looking.
        if let Err(error) = setsockopt(&socket, RcvBufForce, &BACKLOG) {
            tracing::debug!(%error, "no more room for messages of rtnetlink");
        }
        let groups = if routes {
            GROUPS | ROUTE_GROUPS
        } else {
            GROUPS
        };
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
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
        for _ in 0..AT_ONCE {
            let fd = self.socket.as_raw_fd();
            match recv(fd, &mut self.buffer, MsgFlags::empty()) {
                Ok(length) => changes.read(self.buffer.get(..length).unwrap_or_default()),
                Err(Errno::EAGAIN) => {
                    guard.clear_ready();
                    break;
                }
                Err(Errno::ENOBUFS) => changes.lost = true,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(changes)
    }
}

/// All links of this namespace, by index.
///
/// # Errors
/// What the socket calls or the kernel say.
pub fn links() -> io::Result<Vec<Link>> {
    all_links().map(|(links, _)| links)
}

/// The same, and whether those are all: while links come and go the kernel may leave some out.
///
/// # Errors
/// What the socket calls or the kernel say.
pub fn all_links() -> io::Result<(Vec<Link>, bool)> {
    let (links, whole) = undisturbed(|links: &mut BTreeMap<u32, Link>| {
        dump(RTM_GETLINK, INFO, |message| {
            if message.kind == RTM_NEWLINK
                && let Some(link) = link(message.body)
            {
                links.insert(link.ifindex, link);
            }
        })
    })?;
    Ok((links.into_values().collect(), whole))
}

/// The addresses of this namespace that are its own: not those that the network may yet refuse, or
/// has refused (duplicate address detection).
///
/// # Errors
/// What the socket calls or the kernel say.
pub fn addresses() -> io::Result<BTreeSet<IpAddr>> {
    let (addresses, _) = undisturbed(|addresses: &mut BTreeSet<IpAddr>| {
        dump(RTM_GETADDR, ADDRESS, |message| {
            if message.kind == RTM_NEWADDR {
                addresses.extend(address(message.body));
            }
        })
    })?;
    Ok(addresses)
}

/// Asks again until nothing changed meanwhile, as `read` says, or the attempts are used up; and
/// which.
pub(super) fn undisturbed<T: Default>(
    mut read: impl FnMut(&mut T) -> io::Result<bool>,
) -> io::Result<(T, bool)> {
    let mut attempt = 1;
    loop {
        let mut found = T::default();
        let whole = read(&mut found)?;
        if whole || attempt == ATTEMPTS {
            return Ok((found, whole));
        }
        attempt += 1;
    }
}

/// All of a kind, and whether they were left alone meanwhile. The request's body of `length` bytes
/// is zero: any family.
pub(super) fn dump(
    kind: u16,
    length: usize,
    mut take: impl FnMut(&Message<'_>),
) -> io::Result<bool> {
    dump_of(kind, &vec![0; length], &mut take)
}

/// All of a kind that `body` asks for, as above.
pub(super) fn dump_of(
    kind: u16,
    body: &[u8],
    take: &mut dyn FnMut(&Message<'_>),
) -> io::Result<bool> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    let mut request = Vec::with_capacity(HEADER + body.len());
    request.extend(((HEADER + body.len()) as u32).to_ne_bytes());
    request.extend(kind.to_ne_bytes());
    request.extend(DUMP.to_ne_bytes());
    request.resize(HEADER, 0);
    request.extend(body);
    let kernel = NetlinkAddr::new(0, 0);
    sendto(socket.as_raw_fd(), &request, &kernel, MsgFlags::empty())?;
    let mut buffer = vec![0; 65_536];
    let mut whole = true;
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
                NLMSG_DONE => return Ok(whole),
                NLMSG_ERROR => {
                    let code = word(message.body, 0).unwrap_or(0).cast_signed();
                    return Err(io::Error::from_raw_os_error(code.wrapping_neg()));
                }
                _ => take(&message),
            }
        }
    }
}

/// A link from the body of RTM_NEWLINK.
fn link(body: &[u8]) -> Option<Link> {
    let flags = word(body, 8)?;
    let (mut name, mut device, mut data) = (None, String::new(), &[][..]);
    let (mut master, mut lower, mut elsewhere) = (None, None, false);
    for (kind, value) in attributes(body.get(INFO..)?) {
        match kind {
            IFLA_IFNAME => name = Some(text(value)),
            IFLA_MASTER => master = word(value, 0).filter(|index| *index != 0),
            IFLA_LINK => lower = word(value, 0),
            // Then IFLA_LINK is an index of that namespace.
            IFLA_LINK_NETNSID => elsewhere = true,
            IFLA_LINKINFO => {
                for (kind, value) in attributes(value) {
                    match kind {
                        IFLA_INFO_KIND => device = text(value),
                        IFLA_INFO_DATA => data = value,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    let tun = (device == "tun").then(|| tun(data)).flatten();
    let vlan = (device == "vlan").then(|| vlan(data, lower.filter(|_| !elsewhere)));
    Some(Link {
        ifindex: word(body, 4)?,
        name: name?,
        kind: tun.or(half(body, 2))?,
        up: flags & IFF_UP != 0,
        loopback: flags & IFF_LOOPBACK != 0,
        device,
        master,
        vlan: vlan.flatten(),
    })
}

/// ARPHRD number of a tun or tap device, by what its packets are: TUNSETLINK gives it any other.
fn tun(data: &[u8]) -> Option<u16> {
    let (_, value) = attributes(data).find(|(kind, _)| *kind == IFLA_TUN_TYPE)?;
    match value.first()? {
        1 => Some(65534),
        2 => Some(1),
        _ => None,
    }
}

/// From IFLA_INFO_DATA of a VLAN device.
fn vlan(data: &[u8], parent: Option<u32>) -> Option<Vlan> {
    let (mut vid, mut service_tag) = (None, false);
    for (kind, value) in attributes(data) {
        match kind {
            IFLA_VLAN_ID => vid = half(value, 0),
            IFLA_VLAN_PROTOCOL => service_tag = value.starts_with(&SERVICE_TAG),
            _ => {}
        }
    }
    Some(Vlan {
        parent,
        vid: vid?,
        service_tag,
    })
}

/// An address of this host from the body of RTM_NEWADDR.
fn address(body: &[u8]) -> Option<IpAddr> {
    let mut flags = u32::from(*body.get(2)?);
    let (mut address, mut local) = (None, None);
    for (kind, value) in attributes(body.get(ADDRESS..)?) {
        match kind {
            IFA_ADDRESS => address = ip(value),
            // Where there is a peer, IFA_ADDRESS is the peer's.
            IFA_LOCAL => local = ip(value),
            IFA_FLAGS => flags = word(value, 0)?,
            _ => {}
        }
    }
    let tentative = flags & IFA_F_TENTATIVE != 0 && flags & IFA_F_OPTIMISTIC == 0;
    if tentative || flags & IFA_F_DADFAILED != 0 {
        return None;
    }
    local.or(address)
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(v4.into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}

pub(super) fn text(value: &[u8]) -> String {
    let text = value.split(|b| *b == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}

/// Type and value of each attribute. Cut off where the bytes end.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(half(bytes, 0)?).max(4);
        let kind = half(bytes, 2)? & TYPE;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// A message of rtnetlink.
pub(super) struct Message<'a> {
    pub kind: u16,
    flags: u16,
    pub body: &'a [u8],
}

#[cfg(test)]
impl<'a> Message<'a> {
    pub fn new(kind: u16, body: &'a [u8]) -> Self {
        let flags = 0;
        Self { kind, flags, body }
    }
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

pub(super) fn word(bytes: &[u8], at: usize) -> Option<u32> {
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
    fn removed_links_are_read_and_what_came_after() {
        let named = |index: u32, more: &[Vec<u8>]| {
            let name = attribute(IFLA_IFNAME, b"eth0\0");
            let mut bytes = message(RTM_NEWLINK, 0, index);
            bytes.extend([name, more.concat()].concat());
            let length = (bytes.len() as u32).to_ne_bytes();
            bytes[..4].copy_from_slice(&length);
            bytes
        };
        let all = [
            named(5, &[]),
            message(RTM_DELLINK, 0, 6),
            message(RTM_DELLINK, 7, 8),
            message(RTM_DELLINK, 0, 9),
            // The number of one that went is given again; another one comes and goes.
            named(6, &[]),
            named(7, &[]),
            message(RTM_DELLINK, 0, 7),
        ]
        .concat();
        let read = |bytes: &[u8]| {
            let mut changes = Changes::default();
            changes.read(bytes);
            assert!(!changes.addresses && !changes.routes && !changes.lost);
            let links: Vec<u32> = changes.links.into_keys().collect();
            (changes.removed, links, changes.look)
        };
        assert_eq!(read(&all), (vec![6, 9, 7], vec![5, 6], false));
        assert_eq!(read(&all[..44 + 60]), (vec![6], vec![5], false));
        assert_eq!(read(&[]), (vec![], vec![], false));
        assert_eq!(read(&[0; 40]), (vec![], vec![], false));
        // It says that there is such a link, and not what it is.
        let partial = named(5, &[attribute(IFLA_WIRELESS, &[0; 8])]);
        assert_eq!(read(&partial), (vec![], vec![], true));
        assert_eq!(read(&message(RTM_NEWLINK, 0, 5)), (vec![], vec![], true));
        let mut changes = Changes::default();
        changes.read(&message(RTM_DELADDR, 2, 5));
        assert!(changes.addresses);
    }

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = ((4 + value.len()) as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn newlink(attributes: &[Vec<u8>]) -> Link {
        let mut body = vec![0; INFO];
        body[2] = 1;
        body[4] = 7;
        body[8] = 1;
        link(&[body, attributes.concat()].concat()).unwrap()
    }

    #[test]
    fn a_tun_device_is_what_its_packets_are() {
        let kind_of = |mode: u8| {
            let kind = attribute(IFLA_INFO_KIND, b"tun\0");
            let data = attribute(IFLA_INFO_DATA, &attribute(IFLA_TUN_TYPE, &[mode]));
            let info = attribute(IFLA_LINKINFO, &[kind, data].concat());
            newlink(&[attribute(IFLA_IFNAME, b"tun0\0"), info]).kind
        };
        assert_eq!((kind_of(1), kind_of(2), kind_of(9)), (65534, 1, 1));
    }

    #[test]
    fn vlan_devices_know_their_parent_and_ports_their_master() {
        let name = || attribute(IFLA_IFNAME, b"eth0.20\0");
        let vlan = |protocol: &[u8]| {
            let id = attribute(IFLA_VLAN_ID, &20u16.to_ne_bytes());
            let protocol = attribute(IFLA_VLAN_PROTOCOL, protocol);
            let kind = attribute(IFLA_INFO_KIND, b"vlan\0");
            // NLA_F_NESTED, as newer kernels say.
            let data = attribute(IFLA_INFO_DATA | 0x8000, &[protocol, id].concat());
            attribute(IFLA_LINKINFO, &[kind, data].concat())
        };
        let parent = || attribute(IFLA_LINK, &3u32.to_ne_bytes());
        let link = newlink(&[name(), parent(), vlan(&[0x81, 0])]);
        assert_eq!((link.name.as_str(), link.ifindex), ("eth0.20", 7));
        assert_eq!(
            (link.device.as_str(), link.master, link.up),
            ("vlan", None, true)
        );
        let expected = Vlan {
            parent: Some(3),
            vid: 20,
            service_tag: false,
        };
        assert_eq!(link.vlan, Some(expected));
        let service = newlink(&[vlan(&SERVICE_TAG), parent(), name()]);
        assert!(service.vlan.unwrap().service_tag);
        // The parent is in another namespace.
        let away = attribute(IFLA_LINK_NETNSID, &0u32.to_ne_bytes());
        let moved = newlink(&[name(), parent(), away, vlan(&[0x81, 0])]);
        assert_eq!(moved.vlan.unwrap().parent, None);

        let port = newlink(&[
            name(),
            attribute(IFLA_MASTER, &9u32.to_ne_bytes()),
            parent(),
        ]);
        assert_eq!(
            (port.master, port.vlan, port.device.as_str()),
            (Some(9), None, "")
        );
    }

    #[test]
    fn addresses_count_once_the_network_has_accepted_them() {
        let v6: std::net::Ipv6Addr = "fd00::7".parse().unwrap();
        let (octets, v6) = (v6.octets(), IpAddr::V6(v6));
        let newaddr = |flags: u32, attributes: &[Vec<u8>]| {
            let flags = attribute(IFA_FLAGS, &flags.to_ne_bytes());
            address(
                &[
                    vec![10, 64, 0x80, 0, 2, 0, 0, 0],
                    attributes.concat(),
                    flags,
                ]
                .concat(),
            )
        };
        let own = [attribute(IFA_ADDRESS, &octets)];
        assert_eq!(newaddr(0x80, &own), Some(v6));
        assert_eq!(newaddr(0x80 | IFA_F_TENTATIVE, &own), None);
        assert_eq!(newaddr(IFA_F_TENTATIVE | IFA_F_OPTIMISTIC, &own), Some(v6));
        assert_eq!(newaddr(0x80 | IFA_F_DADFAILED, &own), None);
        let peer = [
            attribute(IFA_ADDRESS, &[10, 0, 0, 2]),
            attribute(IFA_LOCAL, &[10, 0, 0, 1]),
        ];
        assert_eq!(newaddr(0x80, &peer), "10.0.0.1".parse().ok());
        assert_eq!(address(&[10, 64, 0]), None);
    }

    #[test]
    fn the_loopback_has_its_address() {
        assert!(addresses().unwrap().iter().all(|ip| !ip.is_unspecified()));
        assert!(links().unwrap().iter().any(|link| link.loopback));
    }
}
