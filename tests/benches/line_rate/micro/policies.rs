//! Policies of any size, and the addresses in them.
//!
//! Clients and servers are two segments of one prefix each: what goes from one to the other is
//! measured where the policy is not the point. The rest are segments of single hosts and, one in
//! ten, prefixes, dealt out in turn, so that neighbours are never of one segment.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use enforcer::policy::model::{
    Action, AddrRange, Defaults, Endpoints, Member, Mode, Origin, Policy, Protect, Rule, Segment,
    SegmentId, Service, Transport, Unsegmented,
};
use enforcer_common::image::mix;

/// Of a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// All of them allow.
    pub rules: usize,
    /// Members of all segments but the clients' and the servers'.
    pub members: usize,
    /// Whether the members are IPv6.
    pub v6: bool,
}

impl Size {
    /// The one that growth is measured from.
    pub const BASE: Self = Self {
        rules: 10,
        members: 10,
        v6: false,
    };

    /// Segments besides the clients' and the servers'.
    fn segments(self) -> usize {
        (self.rules / 10).clamp(10, 1_000) - 1
    }
}

/// The service that all rules between hosts of different segments allow, and the one of clients.
pub const ALLOWED_PORT: u16 = 53;
/// No rule allows it.
pub const DENIED_PORT: u16 = 9;
/// A message that is allowed and opens nothing: router solicitation, for no router listens.
pub const MESSAGE: u8 = 10;
/// The same of ICMPv6: private experimentation.
pub const MESSAGE6: u8 = 200;

/// 100.64.0.0/10.
pub const CLIENTS4: u32 = 0x6440_0000;
/// fd01::/16, counted in the lower half.
pub const CLIENTS6: u64 = 0xfd01_0000_0000_0000;
/// How many addresses of them are used.
pub const CLIENTS: u32 = 1 << 22;
/// In 172.16.0.0/12.
pub const SERVER4: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 1);
/// In fd02::/16.
pub const SERVER6: Ipv6Addr = Ipv6Addr::new(0xfd02, 0, 0, 0, 0, 0, 0, 1);

/// The first member; the others follow. One in ten is its /24.
pub const MEMBERS4: u32 = 0x1000_0005;
/// Upper half of the first member: each has a /64 of its own. One in ten is the /64.
pub const MEMBERS6: u64 = 0xfd10_0000_0000_0000;
/// How far they are apart: more than a /24, and no power of two, which would make equal nodes.
pub const STEP: u32 = 263;

/// An IPv4 member's address.
pub fn member4(index: usize) -> Ipv4Addr {
    Ipv4Addr::from_bits(MEMBERS4 + index as u32 * STEP)
}

/// An IPv6 member's address.
pub fn member6(index: usize) -> Ipv6Addr {
    let upper = MEMBERS6 + index as u64 * u64::from(STEP);
    Ipv6Addr::from_bits(u128::from(upper) << 64 | 5)
}

/// The segment of so many that a member is in: each in turn, each round from another one on. Were
/// there a pattern, the compiler would find it, and a million members take as many words as ten.
fn segment_of(index: usize, count: usize) -> usize {
    let (round, place) = (index / count, index % count);
    (place + mix(round as u64, 1) as usize % count) % count
}

/// Whether the member is a prefix.
pub fn is_prefix(index: usize) -> bool {
    index.is_multiple_of(10)
}

fn origin() -> Origin {
    Origin {
        file: Arc::from("bench.yaml"),
        line: 1,
        column: 1,
    }
}

fn member(range: AddrRange) -> Member {
    Member {
        range,
        except: vec![],
        origin: origin(),
    }
}

fn prefix4(address: u32, length: u32) -> Member {
    let rest = u32::MAX.checked_shr(length).unwrap_or(0);
    member(AddrRange::V4 {
        first: Ipv4Addr::from_bits(address & !rest),
        last: Ipv4Addr::from_bits(address | rest),
    })
}

fn prefix6(address: u128, length: u32) -> Member {
    let rest = u128::MAX.checked_shr(length).unwrap_or(0);
    member(AddrRange::V6 {
        first: Ipv6Addr::from_bits(address & !rest),
        last: Ipv6Addr::from_bits(address | rest),
    })
}

fn segment(name: String, members: Vec<Member>) -> Segment {
    Segment {
        name,
        description: String::new(),
        members: members.into(),
        mode: Mode::Enforce,
        protect: Protect::Both,
        interfaces: vec![],
        origin: origin(),
    }
}

fn rule(number: usize, from: usize, to: &[usize], services: Vec<Service>) -> Rule {
    let side = |segments: &[usize]| Endpoints {
        segments: segments.iter().map(|s| SegmentId(*s as u32)).collect(),
        ..Endpoints::default()
    };
    Rule {
        name: format!("r{number}"),
        from: side(&[from]),
        to: side(to),
        services,
        action: Action::Allow,
        expires: None,
        session: None,
        origin: origin(),
    }
}

/// The policy of this size.
///
/// The first rules, one for each segment, allow what is measured between any two members. The
/// others allow single TCP ports between pairs of segments.
pub fn policy(size: Size) -> Policy {
    let count = size.segments();
    let mut members = vec![vec![]; count];
    for index in 0..size.members {
        let length = |host, prefix| if is_prefix(index) { prefix } else { host };
        members[segment_of(index, count)].push(if size.v6 {
            prefix6(member6(index).to_bits(), length(128, 64))
        } else {
            prefix4(member4(index).to_bits(), length(32, 24))
        });
    }
    let mut segments: Vec<Segment> = members
        .into_iter()
        .enumerate()
        .map(|(number, members)| segment(format!("s{number}"), members))
        .collect();
    let (clients, servers) = (count, count + 1);
    segments.push(segment(
        "clients".to_owned(),
        vec![
            prefix4(CLIENTS4, 10),
            prefix6(u128::from(CLIENTS6) << 64, 16),
        ],
    ));
    segments.push(segment(
        "servers".to_owned(),
        vec![
            prefix4(SERVER4.to_bits(), 12),
            prefix6(SERVER6.to_bits(), 16),
        ],
    ));
    let measured = || {
        let port = |transport, port| Service::Ports {
            transport,
            first: port,
            last: port,
        };
        vec![
            port(Transport::Udp, ALLOWED_PORT),
            Service::Icmp {
                kind: MESSAGE,
                code: None,
            },
            Service::Icmpv6 {
                kind: MESSAGE6,
                code: None,
            },
        ]
    };
    let all: Vec<usize> = (0..count).collect();
    let rules = (0..size.rules).map(|number| {
        if number < count {
            return rule(number, number, &all, measured());
        }
        if number == count {
            return rule(number, clients, &[servers], measured());
        }
        let (lap, from) = (number / count, number % count);
        let to = (from + lap * 7) % count;
        let port = 1024 + (number * 31 % 5_000) as u16;
        let service = Service::Ports {
            transport: Transport::Tcp,
            first: port,
            last: port,
        };
        rule(number, from, &[to], vec![service])
    });
    Policy {
        defaults: Defaults {
            mode: Mode::Enforce,
            unsegmented: Unsegmented::Allow,
        },
        rules: rules.collect(),
        segments,
        groups: vec![],
        tests: vec![],
    }
}
