//! What the network namespace looks like: interfaces and addresses.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
};

use nix::ifaddrs::getifaddrs;

use crate::{
    dataplane::{Interface, LinkType},
    policy::model::Environment,
};

use super::netlink;

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
}

impl Link {
    /// Whether packets that a policy judges can pass.
    pub fn carries_ip(&self) -> bool {
        !NO_IP.contains(&self.kind)
    }

    /// For the dataplane; `None` when packets of this kind of link cannot be read.
    pub fn interface(&self) -> Option<Interface> {
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
        })
    }
}

/// The namespace at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// Interfaces, by index.
    pub links: Vec<Link>,
    /// What policies depend on.
    pub environment: Environment,
}

impl Host {
    /// Asks the kernel, through rtnetlink: of this process's network namespace, wherever `/sys`
    /// was mounted.
    ///
    /// # Errors
    /// What rtnetlink or `getifaddrs` says.
    pub fn read() -> io::Result<Self> {
        // Links first: an address that comes in between belongs to a link of the next look.
        // Not from getifaddrs: it has no entry for links without a link-layer address (tun,
        // WireGuard, PPP).
        let links = netlink::links()?;
        let mut host_addresses = BTreeSet::new();
        for address in getifaddrs()?.filter_map(|entry| entry.address) {
            if let Some(address) = address.as_sockaddr_in() {
                host_addresses.insert(IpAddr::V4(address.ip()));
            } else if let Some(address) = address.as_sockaddr_in6() {
                host_addresses.insert(IpAddr::V6(address.ip()));
            }
        }
        Ok(Self {
            links,
            environment: Environment {
                host_addresses,
                interfaces: BTreeMap::new(),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_is_there() {
        let host = Host::read().unwrap();
        let lo = host.links.iter().find(|l| l.name == "lo").unwrap();
        assert!(lo.loopback && lo.ifindex > 0);
        assert_eq!(lo.interface().unwrap().link, LinkType::Ethernet);
    }

    #[test]
    fn links_that_cannot_be_read_are_none() {
        let link = |kind| Link {
            ifindex: 5,
            name: "x".to_owned(),
            kind,
            up: true,
            loopback: false,
        };
        let type_of = |kind| link(kind).interface().map(|i| i.link);
        assert_eq!(type_of(1), Some(LinkType::Ethernet));
        assert_eq!(type_of(65534), Some(LinkType::Ip));
        // InfiniBand.
        assert_eq!(type_of(32), None);
    }
}
