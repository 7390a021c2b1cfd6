//! The checked policy: what a set of YAML files means once every name is resolved and every
//! value is in range. Pure data.
//!
//! Must not know: YAML, files on disk (beyond their names), the image format, the kernel.
//! A value of [`Policy`] is valid by construction: the parser is the only producer besides tests.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use super::pattern::Pattern;

/// How strongly a segment's denials bite. Ordered: `Off < Observe < Enforce`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mode {
    /// Judged denied, passes, not recorded.
    Off,
    /// Judged denied, passes, recorded as WOULD_DENY.
    Observe,
    /// Judged denied, dropped, recorded as DENIED.
    Enforce,
}

/// Which directions of traffic a segment guards by default-deny.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protect {
    /// Flows to and from the segment need a rule (the default).
    Both,
    /// Only flows opened towards the segment need a rule.
    Inbound,
    /// Only flows opened by the segment need a rule.
    Outbound,
}

impl Protect {
    /// Whether flows opened towards the segment are guarded.
    pub fn inbound(self) -> bool {
        matches!(self, Self::Both | Self::Inbound)
    }

    /// Whether flows opened by the segment are guarded.
    pub fn outbound(self) -> bool {
        matches!(self, Self::Both | Self::Outbound)
    }
}

/// What happens to flows that no segment guards and no rule names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Unsegmented {
    /// They pass.
    Allow,
    /// They are judged denied with strength [`Defaults::mode`].
    Deny,
}

/// `defaults:` of the policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Defaults {
    /// Mode of segments that name none; strength of denials no segment speaks for.
    pub mode: Mode,
    /// Fate of flows between addresses that no segment guards.
    pub unsegmented: Unsegmented,
}

/// Where a thing was written: for denials, explanations and diagnostics.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Origin {
    /// File name as the user would write it (relative to the segments directory's argument).
    pub file: Arc<str>,
    /// 1-based line.
    pub line: u32,
    /// 1-based column, in characters.
    pub column: u32,
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// An inclusive range of addresses of one family. A prefix is the range it covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AddrRange {
    /// IPv4, `first <= last`.
    V4 {
        /// Lowest address.
        first: Ipv4Addr,
        /// Highest address, included.
        last: Ipv4Addr,
    },
    /// IPv6, `first <= last`; never inside `::ffff:0:0/96`.
    V6 {
        /// Lowest address.
        first: Ipv6Addr,
        /// Highest address, included.
        last: Ipv6Addr,
    },
}

impl AddrRange {
    /// Whether `ip` lies in the range; `false` for the other family.
    pub fn contains(&self, ip: IpAddr) -> bool {
        match (self, ip) {
            (Self::V4 { first, last }, IpAddr::V4(ip)) => *first <= ip && ip <= *last,
            (Self::V6 { first, last }, IpAddr::V6(ip)) => *first <= ip && ip <= *last,
            _ => false,
        }
    }

    /// Whether every address of `other` lies in the range; `false` across families.
    pub fn contains_range(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::V4 { first, last }, Self::V4 { first: f, last: l }) => first <= f && l <= last,
            (Self::V6 { first, last }, Self::V6 { first: f, last: l }) => first <= f && l <= last,
            _ => false,
        }
    }
}

impl From<ipnet::IpNet> for AddrRange {
    fn from(net: ipnet::IpNet) -> Self {
        match net {
            ipnet::IpNet::V4(n) => Self::V4 {
                first: n.network(),
                last: n.broadcast(),
            },
            ipnet::IpNet::V6(n) => Self::V6 {
                first: n.network(),
                last: n.broadcast(),
            },
        }
    }
}

/// One member of a segment: a range minus its own exceptions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Addresses the member matches …
    pub range: AddrRange,
    /// … except these (each inside `range`).
    pub except: Vec<AddrRange>,
    /// Where the member is written.
    pub origin: Origin,
}

impl Member {
    /// Whether `ip` is matched: in the range and in no exception.
    pub fn contains(&self, ip: IpAddr) -> bool {
        self.range.contains(ip) && !self.except.iter().any(|e| e.contains(ip))
    }
}

/// Index into [`Policy::segments`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentId(pub u32);

/// Index into [`Policy::rules`]: file order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleId(pub u32);

/// A named set of addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Unique name, `[a-z0-9][a-z0-9-]{0,62}`.
    pub name: String,
    /// Free text, possibly empty.
    pub description: String,
    /// An address is in the segment when any member matches it.
    pub members: Arc<[Member]>,
    /// Already defaulted.
    pub mode: Mode,
    /// Already defaulted.
    pub protect: Protect,
    /// Interfaces at which the segment's addresses may come in as sources; empty: any.
    pub interfaces: Vec<Pattern>,
    /// Where the segment's name is written.
    pub origin: Origin,
}

/// One side of a rule, with groups expanded. Matches an address when any part does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Endpoints {
    /// Segments named, directly or through groups.
    pub segments: BTreeSet<SegmentId>,
    /// `any`: every address.
    pub any: bool,
    /// `unsegmented`: addresses in no segment of the policy.
    pub unsegmented: bool,
    /// `host`: this host's own addresses ([`Environment::host_addresses`]).
    pub host: bool,
    /// `multicast`: multicast and limited broadcast.
    pub multicast: bool,
}

/// Transport protocols with ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Transport {
    /// Protocol 6.
    Tcp,
    /// Protocol 17.
    Udp,
    /// Protocol 132.
    Sctp,
    /// Protocol 136.
    UdpLite,
}

impl Transport {
    /// IANA protocol number.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
            Self::UdpLite => 136,
        }
    }
}

/// One service as a rule names it, catalogue names resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Service {
    /// Everything; in an allow rule all but [`TUNNEL_PROTOCOLS`].
    Any,
    /// Destination ports `first..=last`, IPv4 and IPv6.
    Ports {
        /// The protocol.
        transport: Transport,
        /// Lowest destination port.
        first: u16,
        /// Highest destination port, included.
        last: u16,
    },
    /// ICMP over IPv4 with this type.
    Icmp {
        /// ICMP type.
        kind: u8,
        /// ICMP code; `None`: any.
        code: Option<u8>,
    },
    /// ICMPv6 over IPv6 with this type.
    Icmpv6 {
        /// ICMPv6 type.
        kind: u8,
        /// ICMPv6 code; `None`: any.
        code: Option<u8>,
    },
    /// A protocol by number. Never 1, 6, 17, 58, 132 or 136: those have words of their own.
    Protocol(u8),
}

/// IP protocols that carry other packets; `any` in an allow rule leaves them out:
/// IPIP, 6in4, GRE, ESP, AH, EtherIP, L2TP, MPLS-in-IP.
pub const TUNNEL_PROTOCOLS: [u8; 8] = [4, 41, 47, 50, 51, 97, 115, 137];

/// What a matching rule says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// The flow is allowed unless a deny rule matches too.
    Allow,
    /// The flow is judged denied.
    Deny,
}

/// How long the flows that an allow rule admits may live; at least one bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Session {
    /// Longest life, in seconds.
    pub max: Option<u32>,
    /// Longest time without a packet, in seconds; at most `max`.
    pub idle: Option<u32>,
}

/// `from` × `to` × `services`: who may, or may not, open which flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Unique name.
    pub name: String,
    /// Who opens the flow.
    pub from: Endpoints,
    /// To whom.
    pub to: Endpoints,
    /// Never empty.
    pub services: Vec<Service>,
    /// Allow or deny.
    pub action: Action,
    /// Unix second, never 0, from which on the rule does not exist.
    pub expires: Option<u64>,
    /// Of allow rules only.
    pub session: Option<Session>,
    /// Where the rule starts.
    pub origin: Origin,
}

/// The rules of a policy, in parts: versions of a policy share those of files that did not change.
/// Several versions are kept, and a hundred thousand rules take some 50 MB.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    parts: Vec<Arc<[Rule]>>,
    /// Per part, the number of rules up to its end.
    ends: Vec<usize>,
}

/// Rules one by one, in file order.
pub type RulesIter<'a> = std::iter::FlatMap<
    std::slice::Iter<'a, Arc<[Rule]>>,
    std::slice::Iter<'a, Rule>,
    fn(&'a Arc<[Rule]>) -> std::slice::Iter<'a, Rule>,
>;

impl Rules {
    /// Adds rules behind the others.
    pub fn push_part(&mut self, part: Arc<[Rule]>) {
        if !part.is_empty() {
            self.ends.push(self.len() + part.len());
            self.parts.push(part);
        }
    }

    /// Rules that versions may share, in file order.
    pub fn parts(&self) -> &[Arc<[Rule]>] {
        &self.parts
    }

    /// Number of rules.
    pub fn len(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// The rule with this number.
    pub fn get(&self, number: usize) -> Option<&Rule> {
        let part = self.ends.partition_point(|end| *end <= number);
        let before = part.checked_sub(1).and_then(|before| self.ends.get(before));
        self.parts
            .get(part)?
            .get(number - before.copied().unwrap_or(0))
    }

    /// All of them, in file order.
    pub fn iter(&self) -> RulesIter<'_> {
        self.parts.iter().flat_map(|part| part.iter())
    }

    /// Changes them as one list; nothing is shared after that.
    pub fn edit<T>(&mut self, change: impl FnOnce(&mut Vec<Rule>) -> T) -> T {
        let mut rules: Vec<Rule> = self.iter().cloned().collect();
        let result = change(&mut rules);
        *self = Self::from(rules);
        result
    }
}

/// However they are parted.
impl PartialEq for Rules {
    fn eq(&self, other: &Self) -> bool {
        self.len() == other.len() && self.iter().eq(other)
    }
}

impl Eq for Rules {}

impl From<Vec<Rule>> for Rules {
    fn from(rules: Vec<Rule>) -> Self {
        let mut this = Self::default();
        this.push_part(rules.into());
        this
    }
}

impl FromIterator<Rule> for Rules {
    fn from_iter<I: IntoIterator<Item = Rule>>(rules: I) -> Self {
        Self::from(Vec::from_iter(rules))
    }
}

impl<'a> IntoIterator for &'a Rules {
    type Item = &'a Rule;
    type IntoIter = RulesIter<'a>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// A flow to be opened, as tests and explanations ask about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowQuery {
    /// Who opens it.
    pub src: IpAddr,
    /// To whom; same family as `src`.
    pub dst: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// Destination port for TCP, UDP, SCTP and UDP-Lite; `type << 8 | code` for ICMP and ICMPv6; else 0.
    pub selector: u16,
}

/// What a policy test expects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// The flow is allowed by a rule, or passes as unsegmented.
    Allow,
    /// The flow is judged denied (whatever the strength).
    Deny,
}

/// One entry of `tests:`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyTest {
    /// The flow.
    pub query: FlowQuery,
    /// `service` as written.
    pub service: String,
    /// The expectation.
    pub expect: Expect,
    /// Unix second at which it is judged; `None`: while no rule has expired.
    pub at: Option<u64>,
    /// Where the test starts.
    pub origin: Origin,
}

/// A named set of segments. Kept for listings; rules have it expanded already.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Unique name, distinct from every segment's.
    pub name: String,
    /// The segments it stands for.
    pub members: BTreeSet<SegmentId>,
    /// Where the group's name is written.
    pub origin: Origin,
}

/// The whole policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// `defaults:`.
    pub defaults: Defaults,
    /// In file order; [`SegmentId`] indexes it.
    pub segments: Vec<Segment>,
    /// In file order.
    pub groups: Vec<Group>,
    /// In file order; [`RuleId`] indexes it.
    pub rules: Rules,
    /// In file order.
    pub tests: Vec<PolicyTest>,
}

/// What the policy's meaning depends on besides its text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    /// Addresses of this host (all of the network namespace), for the built-in `host`.
    pub host_addresses: BTreeSet<IpAddr>,
    /// Enforced interfaces by slot, 1 to 1023 (see `enforcer_common::image::INTERFACE_SLOTS`).
    pub interfaces: BTreeMap<u32, String>,
}

impl Policy {
    /// Every segment that `ip` is in.
    pub fn segments_of(&self, ip: IpAddr) -> BTreeSet<SegmentId> {
        self.segments
            .iter()
            .zip(0u32..)
            .filter(|(segment, _)| segment.members.iter().any(|m| m.contains(ip)))
            .map(|(_, i)| SegmentId(i))
            .collect()
    }

    /// The segment behind an id of this policy.
    pub fn segment(&self, id: SegmentId) -> Option<&Segment> {
        self.segments.get(usize::try_from(id.0).ok()?)
    }

    /// The rule behind an id of this policy.
    pub fn rule(&self, id: RuleId) -> Option<&Rule> {
        self.rules.get(usize::try_from(id.0).ok()?)
    }
}

/// Whether `ip` is in the built-in `multicast`: 224.0.0.0/4, 255.255.255.255 or ff00::/8.
pub fn is_multicast(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_multicast() || ip.is_broadcast(),
        IpAddr::V6(ip) => ip.is_multicast(),
    }
}
