//! What the network namespace looks like: interfaces and addresses.

use std::{collections::BTreeSet, io, net::IpAddr, str::FromStr};

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
            environment: Environment { host_addresses },
        })
    }
}

/// A name of an interface, in which `*` stands for any characters and `?` for one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(String);

impl Pattern {
    /// Whether it can only match itself.
    pub fn is_literal(&self) -> bool {
        !self.0.contains(['*', '?'])
    }

    /// As written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether `name` is meant.
    pub fn matches(&self, name: &str) -> bool {
        matches(self.0.as_bytes(), name.as_bytes())
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // The kernel's own limits for names (dev_valid_name), but for the globs.
        let bad = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
        if text.is_empty() || text.contains(bad) {
            return Err(format!(
                "`{}` cannot be the name of an interface",
                text.escape_debug()
            ));
        }
        if !text.contains('*') && text.len() > 15 {
            return Err(format!(
                "`{text}` is too long: names of interfaces have up to 15 characters"
            ));
        }
        Ok(Self(text.to_owned()))
    }
}

/// Both go forward only; after a mismatch the last `*` takes one character more.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n) = (0, 0);
    let mut star = None;
    while let Some(byte) = name.get(n) {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p + 1, n));
                p += 1;
            }
            Some(wanted) if wanted == byte || *wanted == b'?' => {
                p += 1;
                n += 1;
            }
            _ => {
                let Some((after, from)) = star else {
                    return false;
                };
                star = Some((after, from + 1));
                (p, n) = (after, from + 1);
            }
        }
    }
    pattern.iter().skip(p).all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs() {
        let pattern = |text: &str| text.parse::<Pattern>().unwrap();
        for (glob, name, expected) in [
            ("eth0", "eth0", true),
            ("eth0", "eth01", false),
            ("eth0", "eth", false),
            ("veth*", "veth", true),
            ("veth*", "veth12ab", true),
            ("veth*", "xveth1", false),
            ("*.20", "eth0.20", true),
            ("*.20", "eth0.20.20", true),
            ("*.20", "eth0.200", false),
            ("e?h*-*", "eth0-x-y", true),
            ("e?h", "eh", false),
            ("*", "anything", true),
            ("**", "", true),
        ] {
            assert_eq!(pattern(glob).matches(name), expected, "{glob} {name}");
        }
        assert!(pattern("eth0").is_literal() && !pattern("e*").is_literal());
        for bad in ["", "a b", "a/b", "eth0:1", "0123456789abcdef", "a\u{1b}"] {
            assert!(bad.parse::<Pattern>().is_err(), "{bad:?}");
        }
    }

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
