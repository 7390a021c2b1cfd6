//! Random policies and queries for property tests, over a universe small enough to collide.
//!
//! IPv4 addresses come from 10.0.0.0/22 and IPv6 ones from fd00::/118 (ten free bits each), with a
//! few well-known outsiders. What [`policy`] draws is valid in the sense of [`super::model`].

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use proptest::{
    collection::{btree_map, btree_set, vec},
    option,
    prelude::*,
    sample::{Index, select},
};

use super::{
    model::{
        Action, AddrRange, Defaults, Endpoints, Environment, FlowQuery, Group, Member, Mode,
        Origin, Policy, Protect, Rule, Segment, SegmentId, Service, Session, TUNNEL_PROTOCOLS,
        Transport, Unsegmented,
    },
    pattern::Pattern,
};

/// Unix seconds at which rules of [`policy`] expire.
pub const INSTANTS: [u64; 4] = [1_000, 2_000, 2_001, 1 << 33];
/// Names of the interfaces of [`environment`].
pub const INTERFACES: [&str; 6] = ["eth0", "eth1", "eth0.20", "veth1", "veth22", "lo0"];
/// What segments of [`policy`] may call them.
const PATTERNS: [&str; 7] = ["eth0", "eth1", "eth*", "veth?", "*.20", "*", "wlan0"];

/// Free bits of an address of the universe.
const BITS: u32 = 10;
/// Highest offset in the universe.
const LAST: u32 = (1 << BITS) - 1;

/// The `offset`-th address of the universe, `offset <= LAST`.
fn v4(offset: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(10, 0, 0, 0).to_bits() + offset)
}

/// As [`v4`], in fd00::/118.
fn v6(offset: u32) -> Ipv6Addr {
    Ipv6Addr::from_bits(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0).to_bits() + u128::from(offset))
}

fn range(is_v6: bool, first: u32, last: u32) -> AddrRange {
    if is_v6 {
        AddrRange::V6 {
            first: v6(first),
            last: v6(last),
        }
    } else {
        AddrRange::V4 {
            first: v4(first),
            last: v4(last),
        }
    }
}

fn origin(file: &str, line: u32) -> Origin {
    Origin {
        file: Arc::from(file),
        line,
        column: 3,
    }
}

/// Inclusive offsets: a prefix of any length, a single address or a free range.
fn offsets() -> impl Strategy<Value = (u32, u32)> {
    let prefix = (0..=LAST, 0..=BITS).prop_map(|(at, host_bits)| {
        let mask = (1u32 << host_bits) - 1;
        (at & !mask, at | mask)
    });
    let free = (0..=LAST, 0..=LAST).prop_map(|(a, b)| (a.min(b), a.max(b)));
    let short = (0..=LAST, 0..6u32).prop_map(|(a, n)| (a, (a + n).min(LAST)));
    prop_oneof![4 => prefix, 1 => free, 2 => short]
}

/// A member and up to three exceptions inside it that leave something over.
fn member() -> impl Strategy<Value = Member> {
    let everything = any::<bool>().prop_map(|is_v6| Member {
        range: if is_v6 {
            AddrRange::V6 {
                first: Ipv6Addr::UNSPECIFIED,
                last: Ipv6Addr::from_bits(u128::MAX),
            }
        } else {
            AddrRange::V4 {
                first: Ipv4Addr::UNSPECIFIED,
                last: Ipv4Addr::BROADCAST,
            }
        },
        except: vec![],
        origin: origin("random.yaml", 1),
    });
    let within = (any::<bool>(), offsets(), vec(offsets(), 0..4)).prop_map(
        |(is_v6, (first, last), cuts)| {
            let mut left: BTreeSet<u32> = (first..=last).collect();
            let mut except = Vec::new();
            for (from, to) in cuts {
                let (from, to) = (from.max(first), to.min(last));
                let kept: BTreeSet<u32> = left
                    .iter()
                    .copied()
                    .filter(|o| *o < from || *o > to)
                    .collect();
                if from <= to && !kept.is_empty() {
                    except.push(range(is_v6, from, to));
                    left = kept;
                }
            }
            Member {
                range: range(is_v6, first, last),
                except,
                origin: origin("random.yaml", 1),
            }
        },
    );
    prop_oneof![1 => everything, 24 => within]
}

fn mode() -> impl Strategy<Value = Mode> {
    select(vec![Mode::Off, Mode::Observe, Mode::Enforce])
}

fn protect() -> impl Strategy<Value = Protect> {
    select(vec![Protect::Both, Protect::Inbound, Protect::Outbound])
}

fn segment(index: usize) -> impl Strategy<Value = Segment> {
    let parts = (vec(member(), 1..4), mode(), protect(), interfaces(0.3));
    parts.prop_map(move |(members, mode, protect, interfaces)| Segment {
        name: format!("s{index}"),
        description: String::new(),
        members: members.into(),
        mode,
        protect,
        interfaces,
        origin: origin("random.yaml", line(index, 10)),
    })
}

/// Patterns; none but in this share of cases.
pub fn interfaces(share: f64) -> impl Strategy<Value = Vec<Pattern>> {
    let pattern = select(PATTERNS.to_vec()).prop_map(|text| text.parse().ok());
    let some = vec(pattern, 1..4).prop_map(|list| list.into_iter().flatten().collect());
    option::weighted(share, some).prop_map(Option::unwrap_or_default)
}

/// Lines that differ from thing to thing, so that mixing up origins shows.
fn line(index: usize, base: u32) -> u32 {
    base + u32::try_from(index).unwrap_or(u32::MAX - base)
}

fn service() -> impl Strategy<Value = Service> {
    let transport = select(vec![
        Transport::Tcp,
        Transport::Udp,
        Transport::Sctp,
        Transport::UdpLite,
    ]);
    let edge = select(vec![
        0u16, 1, 79, 80, 81, 443, 1023, 1024, 8000, 65_534, 65_535,
    ]);
    let icmp = select(vec![0u8, 3, 8, 13, 255]);
    let icmpv6 = select(vec![1u8, 128, 129, 135, 255]);
    let code = option::weighted(0.5, select(vec![0u8, 1, 4, 255]));
    let mut protocols = vec![0u8, 2, 5, 7, 46, 59, 89, 112, 138, 255];
    protocols.extend(TUNNEL_PROTOCOLS);
    prop_oneof![
        3 => Just(Service::Any),
        8 => (transport, edge.clone(), edge).prop_map(|(transport, a, b)| Service::Ports {
            transport,
            first: a.min(b),
            last: a.max(b),
        }),
        2 => (icmp, code.clone()).prop_map(|(kind, code)| Service::Icmp { kind, code }),
        2 => (icmpv6, code).prop_map(|(kind, code)| Service::Icmpv6 { kind, code }),
        3 => select(protocols).prop_map(Service::Protocol),
    ]
}

/// What one side of a rule names, before groups are expanded.
#[derive(Clone, Debug)]
struct Side {
    segments: Vec<Index>,
    groups: Vec<Index>,
    builtins: [bool; 4],
}

fn side() -> impl Strategy<Value = Side> {
    let rarely = || prop::bool::weighted(0.08);
    (
        vec(any::<Index>(), 0..3),
        vec(any::<Index>(), 0..2),
        [rarely(), rarely(), rarely(), rarely()],
    )
        .prop_map(|(segments, groups, builtins)| Side {
            segments,
            groups,
            builtins,
        })
}

impl Side {
    fn resolve(&self, segment_count: u32, groups: &[Group]) -> Endpoints {
        let [any, unsegmented, host, multicast] = self.builtins;
        let mut side = Endpoints {
            any,
            unsegmented,
            host,
            multicast,
            ..Endpoints::default()
        };
        for index in &self.segments {
            side.segments.insert(pick(index, segment_count));
        }
        for index in &self.groups {
            if !groups.is_empty() {
                side.segments.extend(&index.get(groups).members);
            }
        }
        // The language has no empty lists.
        if side.segments.is_empty() && self.builtins == [false; 4] {
            side.any = true;
        }
        side
    }
}

fn pick(index: &Index, count: u32) -> SegmentId {
    let at = index.index(usize::try_from(count).unwrap_or(1).max(1));
    SegmentId(u32::try_from(at).unwrap_or(0))
}

/// Groups as drawn: segments, and whether each also takes in the group before it.
fn group_seeds() -> impl Strategy<Value = Vec<(Vec<Index>, bool)>> {
    vec((vec(any::<Index>(), 1..4), any::<bool>()), 0..4)
}

fn expand_groups(seeds: &[(Vec<Index>, bool)], segment_count: u32) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for (i, (direct, nested)) in seeds.iter().enumerate() {
        let mut members: BTreeSet<SegmentId> = direct
            .iter()
            .map(|index| pick(index, segment_count))
            .collect();
        if let (true, Some(inner)) = (*nested, groups.last()) {
            members.extend(&inner.members);
        }
        groups.push(Group {
            name: format!("g{i}"),
            members,
            origin: origin("random.yaml", line(i, 100)),
        });
    }
    groups
}

/// A rule before its sides are resolved.
type RuleSeed = (Side, Side, Vec<Service>, bool, Option<u64>, Option<Session>);

fn session() -> impl Strategy<Value = Session> {
    let bound = || select(vec![1u32, 60, 900]);
    prop_oneof![
        bound().prop_map(|max| (Some(max), None)),
        bound().prop_map(|idle| (None, Some(idle))),
        (bound(), bound()).prop_map(|(a, b)| (Some(a.max(b)), Some(a.min(b)))),
    ]
    .prop_map(|(max, idle)| Session { max, idle })
}

fn rule_seeds() -> impl Strategy<Value = Vec<RuleSeed>> {
    vec(
        (
            side(),
            side(),
            vec(service(), 1..4),
            prop::bool::weighted(0.3),
            option::weighted(0.35, select(INSTANTS.to_vec())),
            option::weighted(0.25, session()),
        ),
        0..10,
    )
}

/// Policies of one to six overlapping segments and up to nine rules; no `tests:`.
pub fn policy() -> impl Strategy<Value = Policy> {
    let segments = (1usize..=6).prop_flat_map(|n| (0..n).map(segment).collect::<Vec<_>>());
    let defaults = (mode(), any::<bool>()).prop_map(|(mode, allow)| Defaults {
        mode,
        unsegmented: if allow {
            Unsegmented::Allow
        } else {
            Unsegmented::Deny
        },
    });
    (defaults, segments, group_seeds(), rule_seeds()).prop_map(
        |(defaults, segments, groups, rules)| {
            let count = u32::try_from(segments.len()).unwrap_or(1);
            let groups = expand_groups(&groups, count);
            let rules = rules
                .iter()
                .enumerate()
                .map(|(i, (from, to, services, deny, expires, session))| Rule {
                    name: format!("r{i}"),
                    from: from.resolve(count, &groups),
                    to: to.resolve(count, &groups),
                    services: services.clone(),
                    action: if *deny { Action::Deny } else { Action::Allow },
                    expires: *expires,
                    session: session.filter(|_| !*deny),
                    origin: origin("random.yaml", line(i, 200)),
                })
                .collect();
            Policy {
                defaults,
                segments,
                groups,
                rules,
                tests: vec![],
            }
        },
    )
}

/// The policy without what asks for more than a flow's addresses and service: `interfaces`,
/// `expires`, `session`.
pub fn plain(mut policy: Policy) -> Policy {
    for segment in &mut policy.segments {
        segment.interfaces.clear();
    }
    policy.rules.edit(|rules| {
        for rule in rules {
            rule.expires = None;
            rule.session = None;
        }
    });
    policy
}

/// Times around the instants of the policies.
pub fn time() -> impl Strategy<Value = u64> {
    let mut times = BTreeSet::from([0, 1, u64::MAX - 1]);
    times.extend(INSTANTS.iter().flat_map(|at| [at - 1, *at, at + 1]));
    select(times.into_iter().collect::<Vec<_>>())
}

/// Environments whose host addresses lie in the universe.
pub fn environment() -> impl Strategy<Value = Environment> {
    let slot = select(vec![1u32, 2, 31, 32, 33, 1023]);
    let interfaces = btree_map(slot, select(INTERFACES.map(str::to_owned).to_vec()), 0..5);
    let addresses = btree_set((any::<bool>(), 0..=LAST), 0..4);
    (addresses, interfaces).prop_map(|(addresses, interfaces)| Environment {
        host_addresses: addresses
            .into_iter()
            .map(|(is_v6, o)| {
                if is_v6 {
                    IpAddr::V6(v6(o))
                } else {
                    IpAddr::V4(v4(o))
                }
            })
            .collect(),
        interfaces,
    })
}

/// Queries at and next to every boundary of `policy`: addresses around the ends of members and
/// exceptions, ports and types around the ends of services. Source and destination share a family.
pub fn query(policy: &Policy) -> impl Strategy<Value = FlowQuery> + use<> {
    let mut fours = BTreeSet::from([
        Ipv4Addr::new(8, 8, 8, 8),
        Ipv4Addr::new(224, 0, 0, 1),
        Ipv4Addr::new(239, 255, 255, 255),
        Ipv4Addr::BROADCAST,
        v4(0),
        v4(LAST),
    ]);
    let mut sixes = BTreeSet::from([
        Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1),
        Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1),
        v6(0),
        v6(LAST),
    ]);
    let members = policy.segments.iter().flat_map(|s| s.members.iter());
    for range in members.flat_map(|m| std::iter::once(&m.range).chain(&m.except)) {
        match range {
            AddrRange::V4 { first, last } => {
                for end in [first.to_bits(), last.to_bits()] {
                    let near = [end.saturating_sub(1), end, end.saturating_add(1)];
                    fours.extend(near.map(Ipv4Addr::from_bits));
                }
            }
            AddrRange::V6 { first, last } => {
                for end in [first.to_bits(), last.to_bits()] {
                    let near = [end.saturating_sub(1), end, end.saturating_add(1)];
                    sixes.extend(near.map(Ipv6Addr::from_bits));
                }
            }
        }
    }
    let four = |set: &BTreeSet<Ipv4Addr>| {
        prop_oneof![4 => select(set.iter().copied().collect::<Vec<_>>()), 1 => (0..=LAST).prop_map(v4)]
            .prop_map(IpAddr::V4)
    };
    let six = |set: &BTreeSet<Ipv6Addr>| {
        prop_oneof![4 => select(set.iter().copied().collect::<Vec<_>>()), 1 => (0..=LAST).prop_map(v6)]
            .prop_map(IpAddr::V6)
    };
    let addresses = prop_oneof![(four(&fours), four(&fours)), (six(&sixes), six(&sixes))];
    (addresses, point(policy)).prop_map(|((src, dst), (protocol, selector))| FlowQuery {
        src,
        dst,
        protocol,
        selector,
    })
}

/// Protocol and selector at and next to the ends of the policy's services.
fn point(policy: &Policy) -> impl Strategy<Value = (u8, u16)> + use<> {
    let mut points: BTreeSet<(u8, u16)> = [
        (6, 80),
        (6, 443),
        (17, 53),
        (132, 9),
        (1, 8 << 8),
        (58, 128 << 8),
        (0, 0),
    ]
    .into();
    points.extend(TUNNEL_PROTOCOLS.map(|p| (p, 0)));
    for service in policy.rules.iter().flat_map(|r| &r.services) {
        match *service {
            Service::Any => {
                points.insert((89, 0));
            }
            Service::Ports {
                transport,
                first,
                last,
            } => {
                let protocol = transport.number();
                for end in [first, last] {
                    let near = [end.saturating_sub(1), end, end.saturating_add(1)];
                    points.extend(near.map(|port| (protocol, port)));
                }
            }
            Service::Icmp { kind, code } => around(&mut points, 1, kind, code),
            Service::Icmpv6 { kind, code } => around(&mut points, 58, kind, code),
            Service::Protocol(number) => {
                // Only protocols without ports or types: their selector is 0.
                let near = [number.saturating_sub(1), number, number.saturating_add(1)];
                points.extend(
                    near.into_iter()
                        .filter(|p| !matches!(p, 1 | 6 | 17 | 58 | 132 | 136))
                        .map(|p| (p, 0)),
                );
            }
        }
    }
    select(points.into_iter().collect::<Vec<_>>())
}

fn around(points: &mut BTreeSet<(u8, u16)>, protocol: u8, kind: u8, code: Option<u8>) {
    if let Some(code) = code {
        for near in [code.saturating_sub(1), code, code.saturating_add(1)] {
            points.insert((protocol, u16::from(kind) << 8 | u16::from(near)));
        }
    }
    for near in [kind.saturating_sub(1), kind, kind.saturating_add(1)] {
        points.insert((protocol, u16::from(near) << 8));
        points.insert((protocol, u16::from(near) << 8 | 0xff));
    }
}

#[cfg(test)]
mod tests;
