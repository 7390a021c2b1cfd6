//! Policies to measure with, and the flows that they allow.
//!
//! Half of the segments are behind the first interface of the gateway, half behind the second. A
//! segment has three members of each family; one on the left may open flows to ten on the right,
//! at two ports each.

use std::{
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use enforcer::policy::{SourceFile, model::Policy, parse};

use super::flood::mixed;
use crate::netns::Family;

/// Segments on the right that one on the left may speak to.
const PARTNERS: u32 = 10;
/// A port that no rule allows.
const DENIED_PORT: u16 = 9;

/// Everything behind the left interface, and behind the right.
pub const LEFT: [&str; 2] = ["10.64.0.0/10", "fd0a::/32"];
/// See [`LEFT`].
pub const RIGHT: [&str; 2] = ["10.128.0.0/10", "fd0b::/32"];

/// One side of the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Left,
    Right,
}

/// Where flows are between, and whether a rule allows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub source_port: u16,
    pub destination_port: u16,
}

/// A policy of a size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Segments of each side.
    pub half: u32,
}

impl Shape {
    /// `segments` in all, an even number up to 2 000.
    pub fn new(segments: u32) -> Self {
        assert!(segments.is_multiple_of(2) && (2..=2000).contains(&segments));
        Self { half: segments / 2 }
    }

    /// The YAML.
    pub fn text(self) -> String {
        let mut text = "version: 1\nsegments:\n".to_owned();
        for (side, letter) in [(Side::Left, 'l'), (Side::Right, 'r')] {
            for number in 0..self.half {
                let (v4, v6) = (net4(side, number), net6(side, number));
                let v4 = |block: u8, host: u8| {
                    let [a, b, c, _] = v4.octets();
                    Ipv4Addr::new(a, b, c | block, host)
                };
                let v6 = |block: u16| {
                    let mut words = v6.segments();
                    words[3] = block;
                    Ipv6Addr::from(words)
                };
                let _ = writeln!(
                    text,
                    "  {letter}{number}: {{ members: [{{cidr: {}/24}}, {{range: {}-{}}}, {{cidr: {}/32}}, \
                     {{cidr: \"{}/64\"}}, {{cidr: \"{}/64\"}}, {{cidr: \"{}9/128\"}}] }}",
                    v4(0, 0),
                    v4(1, 10),
                    v4(1, 200),
                    v4(2, 9),
                    v6(0),
                    v6(1),
                    v6(2),
                );
            }
        }
        text += "rules:\n";
        for number in 0..self.half {
            let mut partners: Vec<u32> = (0..PARTNERS).map(|k| self.partner(number, k)).collect();
            partners.sort_unstable();
            partners.dedup();
            let names: Vec<String> = partners.iter().map(|p| format!("r{p}")).collect();
            let _ = writeln!(
                text,
                "  - {{ name: from-{number}, from: [l{number}], to: [{}], services: [udp/{}, tcp/{}, icmp/echo-request] }}",
                names.join(", "),
                port(number),
                port(number),
            );
        }
        text
    }

    /// The checked policy.
    pub fn policy(self) -> Policy {
        let name = "load.yaml".to_owned();
        let text = self.text();
        parse(&[SourceFile { name, text }]).unwrap()
    }

    fn partner(self, number: u32, k: u32) -> u32 {
        // Spread, so that neighbours do not share partners.
        (number * 7 + k * 31) % self.half
    }

    /// The allowed flow of a number: segments take turns, in no order that a cache could follow,
    /// then hosts and source ports.
    pub fn allowed(self, family: Family, number: u64) -> Flow {
        let mixed = mixed(number);
        let left = (mixed >> 32) as u32 % self.half;
        let right = self.partner(left, (mixed >> 16) as u32 % PARTNERS);
        // Number itself is in hosts and port, 28 bits of it: flows are not met again.
        let source_host = 1 + ((number >> 14) & 0x7f) as u8;
        let destination_host = 1 + ((number >> 21) & 0x7f) as u8;
        Flow {
            source: host(family, Side::Left, left, source_host),
            destination: host(family, Side::Right, right, destination_host),
            source_port: 16_384 + (number & 0x3fff) as u16,
            destination_port: port(left),
        }
    }

    /// The same flow, to a port where no rule allows it.
    pub fn denied(self, family: Family, number: u64) -> Flow {
        Flow {
            destination_port: DENIED_PORT,
            ..self.allowed(family, number)
        }
    }
}

/// The port at which a segment's partners serve it.
fn port(number: u32) -> u16 {
    5000 + (number % 64) as u16
}

/// The first address of a segment: a block of four /24 in IPv4, of 65 536 /64 in IPv6.
fn net4(side: Side, number: u32) -> Ipv4Addr {
    let base: u32 = match side {
        Side::Left => Ipv4Addr::new(10, 64, 0, 0),
        Side::Right => Ipv4Addr::new(10, 128, 0, 0),
    }
    .to_bits();
    Ipv4Addr::from_bits(base + (number << 10))
}

fn net6(side: Side, number: u32) -> Ipv6Addr {
    let base = match side {
        Side::Left => 0xfd0a,
        Side::Right => 0xfd0b,
    };
    Ipv6Addr::new(base, 0, number as u16, 0, 0, 0, 0, 0)
}

/// A host in the first prefix of a segment.
pub fn host(family: Family, side: Side, number: u32, host: u8) -> IpAddr {
    match family {
        Family::V4 => {
            let [a, b, c, _] = net4(side, number).octets();
            Ipv4Addr::new(a, b, c, host).into()
        }
        Family::V6 => {
            let mut words = net6(side, number).segments();
            words[7] = u16::from(host);
            Ipv6Addr::from(words).into()
        }
    }
}
