//! A second reading of packets, written on its own: slices, no limits, no reasons. What the parser
//! under test accepts, this must have read in the same way.

use std::net::{IpAddr, Ipv6Addr};

use enforcer_common::packet::{Kind, Link, Tuple};

/// An IP packet as its headers have it.
#[derive(Clone, Copy, Debug)]
pub struct Reading<'a> {
    pub source: IpAddr,
    pub destination: IpAddr,
    /// Of the last header that was walked to.
    pub protocol: u8,
    /// From there to the packet's end.
    pub transport: &'a [u8],
    /// Neither a fragment nor atomic, no extension header or option, at most one VLAN tag.
    pub plain: bool,
    pub hop_limit: u8,
    /// Where the packet ends in the bytes that were given.
    pub end: usize,
    /// Its length field says nothing: merged segments, up to the end of the bytes.
    pub merged: bool,
}

fn two(bytes: &[u8], at: usize) -> Option<usize> {
    let pair = bytes.get(at..at + 2)?;
    Some(usize::from(pair[0]) << 8 | usize::from(pair[1]))
}

/// Reads a packet whose lengths all fit.
pub fn read<'a>(bytes: &'a [u8], link: &Link) -> Option<Reading<'a>> {
    let (mut kind, mut at, mut tags) = (usize::from(link.protocol), 0, 0);
    if link.ethernet {
        (kind, at) = (two(bytes, 12)?, 14);
        tags = usize::from(link.vlan.is_some());
        while kind == 0x8100 || kind == 0x88a8 {
            kind = two(bytes, at + 2)?;
            at += 4;
            tags += 1;
        }
    }
    let ip = &bytes[at..];
    match kind {
        0x0800 => {
            let (words, said) = (usize::from(*ip.first()? & 15), two(ip, 2)?);
            let merged = said == 0 && link.gso;
            let total = if merged { ip.len() } else { said };
            let packet = ip.get(..total)?;
            let address = |at: usize| {
                Some(IpAddr::from(
                    <[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?,
                ))
            };
            Some(Reading {
                source: address(12)?,
                destination: address(16)?,
                protocol: packet[9],
                transport: packet.get(words * 4..)?,
                plain: packet[0] == 0x45 && two(packet, 6)? & 0x3fff == 0 && tags < 2,
                hop_limit: packet[8],
                end: at + total,
                merged,
            })
        }
        0x86dd => {
            let said = two(ip, 4)?;
            let merged = said == 0 && link.gso;
            let total = if merged { ip.len() } else { 40 + said };
            let packet = ip.get(..total)?;
            let address = |at: usize| {
                Some(IpAddr::from(
                    <[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?,
                ))
            };
            let (mut next, mut rest, mut plain) =
                (*packet.get(6)?, packet.get(40..)?, packet[0] >> 4 == 6);
            while matches!(next, 0 | 43 | 44 | 60) {
                let (length, later) = match next {
                    44 => (8, two(rest, 2)? >> 3 != 0),
                    _ => (8 + 8 * usize::from(*rest.get(1)?), false),
                };
                (next, rest, plain) = (*rest.first()?, rest.get(length..)?, false);
                if later {
                    break; // what follows is no header
                }
            }
            Some(Reading {
                source: address(8)?,
                destination: address(24)?,
                protocol: next,
                transport: rest,
                plain: plain && tags < 2,
                hop_limit: packet[7],
                end: at + total,
                merged,
            })
        }
        _ => None,
    }
}

fn ip(words: &[u32; 4], v6: bool) -> IpAddr {
    if v6 {
        let mut bytes = [0; 16];
        for (to, word) in bytes.chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_be_bytes());
        }
        bytes.into()
    } else {
        words[3].to_be_bytes().into()
    }
}

/// The addresses that a tuple holds.
pub fn addresses(tuple: &Tuple) -> (IpAddr, IpAddr) {
    (
        ip(&tuple.source, tuple.v6),
        ip(&tuple.destination, tuple.v6),
    )
}

/// Whether no packet on a link has these addresses (RFC 1122 §3.2.1.3, RFC 4291 §2.5).
pub fn martian(source: IpAddr, destination: IpAddr) -> bool {
    let everyone = IpAddr::from([255, 255, 255, 255]);
    let nobody =
        source.is_unspecified() && !(destination.is_multicast() || destination == everyone);
    source.is_loopback()
        || source.is_multicast()
        || source == everyone
        || nobody
        || destination.is_loopback()
        || destination.is_unspecified()
}

impl Reading<'_> {
    /// Whether a tuple says of the packet what this says.
    pub fn agrees(&self, tuple: &Tuple) -> bool {
        let t = self.transport;
        let ports = || (two(t, 0), two(t, 2));
        let with_ports = Some((
            usize::from(tuple.source_port),
            usize::from(tuple.destination_port),
        ));
        (self.source, self.destination) == addresses(tuple)
            && self.protocol == tuple.protocol
            && match tuple.kind {
                Kind::Tcp | Kind::Ports => {
                    ports().0.zip(ports().1) == with_ports
                        && tuple.selector == tuple.destination_port
                        && (tuple.kind == Kind::Ports || t.get(13) == Some(&tuple.tcp_flags))
                }
                Kind::IcmpRequest | Kind::IcmpReply | Kind::IcmpError | Kind::IcmpOther => {
                    two(t, 0) == Some(usize::from(tuple.selector))
                }
                Kind::Other => {
                    (tuple.source_port, tuple.destination_port, tuple.selector) == (0, 0, 0)
                }
            }
    }

    /// A packet that every parser must take: plain, with a whole transport header.
    pub fn must_parse(&self) -> bool {
        let t = self.transport;
        let mapped = |ip: IpAddr| matches!(ip, IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some());
        self.plain
            && !mapped(self.source)
            && !mapped(self.destination)
            && match (self.protocol, self.source.is_ipv6()) {
                (6, _) => t.len() >= 20 && (20..=t.len()).contains(&(usize::from(t[12] >> 4) * 4)),
                (17 | 136, _) | (1, false) | (58, true) => t.len() >= 8,
                (132, _) => t.len() >= 12,
                _ => true,
            }
    }

    /// One of the IP packets that no default deny may break.
    pub fn essential(&self, link: &Link) -> bool {
        let t = self.transport;
        let link_local = |ip: IpAddr| matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
        let ports = two(t, 0).zip(two(t, 2));
        let broadcast = self.destination == IpAddr::from([255, 255, 255, 255]);
        let agents: IpAddr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2).into();
        match (self.protocol, self.source.is_ipv6()) {
            (58, true) => match (t.first(), self.hop_limit) {
                (Some(133..=136), 255) => self.plain,
                (Some(130..=132 | 143), 1) => {
                    link_local(self.source) || self.source.is_unspecified()
                }
                _ => false,
            },
            (2, false) => self.destination.is_multicast(),
            (17, false) => match ports {
                Some((68, 67)) => broadcast || !link.ingress,
                Some((67, 68)) => broadcast || link.ingress,
                _ => false,
            },
            (17, true) => match ports {
                Some((546, 547)) => self.destination == agents || !link.ingress,
                Some((547, 546)) => link.ingress && link_local(self.source),
                _ => false,
            },
            _ => false,
        }
    }
}
