//! What the network namespace looks like: interfaces and addresses.

use std::{collections::BTreeSet, io};

use crate::{
    dataplane::{Interface, LinkType},
    policy::model::Environment,
};

use super::{
    netlink::{self, Changes},
    routes,
};

/// ARPHRD numbers of links whose frames start with an Ethernet header (linux/if_arp.h).
const ETHERNET: [u16; 2] = [1, 772];
/// … with the IP header: PPP, TUN-like, tunnels, GRE, SIT, RAWIP, none.
const IP: [u16; 8] = [512, 519, 768, 769, 776, 778, 823, 65534];
/// Links that carry no IP: CAN, monitors of 802.11, netlink and vsock.
const NO_IP: [u16; 6] = [280, 801, 802, 803, 824, 826];

/// An interface of the namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Kernel index.
    pub ifindex: u32,
    /// Name.
    pub name: String,
    /// ARPHRD number.
    pub kind: u16,
    /// Administratively up.
    pub up: bool,
    /// Whether it is a loopback.
    pub loopback: bool,
    /// What rtnetlink calls its kind: `vlan`, `bridge`, `bond`, `veth`; empty for hardware.
    pub device: String,
    /// Index of the bridge or bond that it belongs to.
    pub master: Option<u32>,
    /// Of VLAN devices.
    pub vlan: Option<Vlan>,
}

/// What makes a VLAN device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vlan {
    /// Index of the link that carries the tagged frames; `None` in another namespace.
    pub parent: Option<u32>,
    /// VLAN id.
    pub vid: u16,
    /// 802.1ad rather than 802.1Q.
    pub service_tag: bool,
}

/// Kinds of devices that switch frames between their ports.
const BRIDGES: [&str; 2] = ["bridge", "openvswitch"];

impl Link {
    /// Whether packets that a policy judges can pass.
    pub fn carries_ip(&self) -> bool {
        !NO_IP.contains(&self.kind)
    }

    /// Whether only this host's packets to itself go through it: a loopback, or a VRF, whose other
    /// packets go through its members.
    pub fn is_local(&self) -> bool {
        self.loopback || self.device == "vrf"
    }

    /// Whether it switches frames between its ports.
    pub fn is_bridge(&self) -> bool {
        BRIDGES.contains(&self.device.as_str())
    }

    /// For the dataplane, in this slot; `None` when packets of this kind of link cannot be read.
    pub fn interface(&self, slot: u32) -> Option<Interface> {
        let link = if ETHERNET.contains(&self.kind) {
            LinkType::Ethernet
        } else if IP.contains(&self.kind) {
            LinkType::Ip
        } else {
            return None;
        };
        Some(Interface {
            ifindex: self.ifindex,
            name: self.name.clone(),
            link,
            slot,
        })
    }
}

/// The namespace at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// Interfaces, by index.
    pub links: Vec<Link>,
    /// Interfaces that default routes lead to; empty unless somebody asked for them.
    pub default_routes: BTreeSet<u32>,
    /// What policies depend on.
    pub environment: Environment,
}

impl Host {
    /// Asks the kernel, through rtnetlink: of this process's network namespace, wherever `/sys`
    /// was mounted. No interface has a slot yet.
    ///
    /// # Errors
    /// What rtnetlink says.
    pub fn read() -> io::Result<Self> {
        let mut host = Self::default();
        host.look()?;
        Ok(host)
    }

    /// Looks at links and addresses again.
    ///
    /// # Errors
    /// What rtnetlink says; some of it may be new then.
    pub fn look(&mut self) -> io::Result<()> {
        // Links first: an address that comes in between belongs to a link of the next look.
        let (links, whole) = netlink::all_links()?;
        let before = std::mem::replace(&mut self.links, links);
        if !whole {
            // Where links come and go all the time, one that is not in the list may be there.
            for link in before {
                let known = self.position(link.ifindex);
                if known.is_err() && name_of(link.ifindex).is_some() {
                    self.put(link);
                }
            }
        }
        self.look_at_addresses()
    }

    /// Looks at addresses again.
    ///
    /// # Errors
    /// What rtnetlink says.
    pub fn look_at_addresses(&mut self) -> io::Result<()> {
        self.environment.host_addresses = netlink::addresses()?;
        Ok(())
    }

    /// Looks at default routes again.
    ///
    /// # Errors
    /// What rtnetlink says.
    pub fn look_at_routes(&mut self) -> io::Result<()> {
        self.default_routes = routes::interfaces()?;
        Ok(())
    }

    /// Takes over what messages said of links.
    pub fn follow(&mut self, changes: &Changes) {
        if !changes.removed.is_empty() {
            let removed: BTreeSet<u32> = changes.removed.iter().copied().collect();
            self.links.retain(|link| !removed.contains(&link.ifindex));
            // No message says that their routes went with them.
            self.default_routes.retain(|i| !removed.contains(i));
        }
        for link in changes.links.values() {
            self.put(link.clone());
        }
    }

    fn position(&self, ifindex: u32) -> Result<usize, usize> {
        self.links
            .binary_search_by_key(&ifindex, |link| link.ifindex)
    }

    fn put(&mut self, link: Link) {
        match self.position(link.ifindex) {
            Ok(at) => {
                if let Some(known) = self.links.get_mut(at) {
                    *known = link;
                }
            }
            Err(at) => self.links.insert(at, link),
        }
    }

    /// The link with this index.
    pub fn link(&self, ifindex: u32) -> Option<&Link> {
        self.links.get(self.position(ifindex).ok()?)
    }

    /// The bridge or bond that `link` belongs to.
    pub fn master(&self, link: &Link) -> Option<&Link> {
        link.master.and_then(|master| self.link(master))
    }
}

/// The name of an interface that is there.
fn name_of(ifindex: u32) -> Option<std::ffi::CString> {
    nix::net::if_::if_indextoname(ifindex).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_is_there() {
        let host = Host::read().unwrap();
        let lo = host.links.iter().find(|l| l.name == "lo").unwrap();
        assert!(lo.loopback && lo.ifindex > 0);
        assert_eq!(lo.interface(0).unwrap().link, LinkType::Ethernet);
    }

    #[test]
    fn links_follow_what_is_said_of_them() {
        let link = |ifindex, name: &str| Link {
            name: name.to_owned(),
            ifindex,
            ..Host::read().unwrap().links.remove(0)
        };
        let mut host = Host {
            links: vec![link(2, "a"), link(5, "b"), link(9, "c")],
            default_routes: [5, 9].into(),
            ..Host::default()
        };
        let new = [link(3, "d"), link(5, "e"), link(9, "f")];
        host.follow(&Changes {
            links: new.into_iter().map(|link| (link.ifindex, link)).collect(),
            removed: vec![2, 5, 77],
            ..Changes::default()
        });
        assert_eq!(host.default_routes, [9].into());
        let names: Vec<_> = host
            .links
            .iter()
            .map(|l| (l.ifindex, &l.name[..]))
            .collect();
        assert_eq!(names, [(3, "d"), (5, "e"), (9, "f")]);
        assert_eq!(host.link(5).unwrap().name, "e");
        assert_eq!(host.link(2), None);
    }

    #[test]
    fn links_that_cannot_be_read_are_none() {
        let link = |kind| Link {
            ifindex: 5,
            name: "x".to_owned(),
            kind,
            up: true,
            loopback: false,
            device: String::new(),
            master: None,
            vlan: None,
        };
        let type_of = |kind| link(kind).interface(7).map(|i| i.link);
        assert_eq!(type_of(1), Some(LinkType::Ethernet));
        assert_eq!(type_of(65534), Some(LinkType::Ip));
        // InfiniBand.
        assert_eq!(type_of(32), None);
    }
}
