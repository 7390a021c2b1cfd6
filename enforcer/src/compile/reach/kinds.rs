//! Kinds of address: those that are in the same segments, before and after.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use enforcer_common::image::{Address, address_class};

use crate::policy::model::{Environment, Policy, Rules, Segment, SegmentId};

use super::{
    super::{
        Stop,
        intern::Interner,
        intervals::{self, Follow, Number},
        word,
    },
    Version,
};

/// Addresses that are in the same segments before and after.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kind {
    /// Their segments before.
    pub before: Vec<SegmentId>,
    /// Their segments after.
    pub after: Vec<SegmentId>,
    /// They are this host's own, and some rule names `host`.
    pub host: bool,
    /// They are multicast or broadcast.
    pub multicast: bool,
    /// One of them.
    pub v4: Option<Ipv4Addr>,
    /// One of them.
    pub v6: Option<Ipv6Addr>,
}

impl Kind {
    /// Families in which there are such addresses: 1 for IPv4, 2 for IPv6.
    pub(super) fn families(&self) -> u8 {
        u8::from(self.v4.is_some()) | u8::from(self.v6.is_some()) << 1
    }
}

/// Kinds that both images judge alike.
pub(super) struct Joint {
    /// Class before and after.
    pub(super) classes: (u32, u32),
    pub(super) families: u8,
    pub(super) host: bool,
    pub(super) multicast: bool,
    /// Numbers of the kinds.
    pub(super) kinds: Vec<usize>,
}

/// Kinds, and what is the same of them.
pub(super) struct Kinds {
    pub(super) kinds: Vec<Kind>,
    pub(super) joints: Vec<Joint>,
    /// Whether these are all there are.
    pub(super) complete: bool,
}

/// A segment of either version; of both, where it has the same members in both.
type Merged = (Option<SegmentId>, Option<SegmentId>);

/// Words of sets that are told apart.
const REMEMBERED: usize = 1 << 22;

/// Numbers the sets of segments as the sweep meets them.
struct Sets {
    current: Vec<u32>,
    known: Interner,
    most: usize,
    complete: bool,
}

/// Stands for sets beyond the bound.
const BEYOND: u32 = u32::MAX;

impl Follow for Sets {
    fn toggle(&mut self, segment: u32, entered: bool) {
        match self.current.binary_search(&segment) {
            Ok(at) if !entered => {
                self.current.remove(at);
            }
            Err(at) if entered => self.current.insert(at, segment),
            Ok(_) | Err(_) => {}
        }
    }

    fn number(&mut self) -> Result<u32, Stop> {
        if let Some(known) = self.known.find(&self.current) {
            return Ok(known);
        }
        if self.known.len() >= self.most || self.known.size() > REMEMBERED {
            self.complete = false;
            return Ok(BEYOND);
        }
        Ok(self.known.intern(&self.current))
    }
}

/// One policy that has the segments of both and nothing else; what each stands for.
fn merge(before: &Policy, after: &Policy) -> (Policy, Vec<Merged>) {
    let numbered: HashMap<&str, usize> = before
        .segments
        .iter()
        .enumerate()
        .map(|(number, segment)| (segment.name.as_str(), number))
        .collect();
    let id = |number: usize| SegmentId(word(number));
    let mut segments: Vec<Segment> = before.segments.clone();
    let mut merged: Vec<Merged> = (0..segments.len()).map(|n| (Some(id(n)), None)).collect();
    for (number, segment) in after.segments.iter().enumerate() {
        let same = numbered.get(segment.name.as_str()).copied().filter(|old| {
            before
                .segments
                .get(*old)
                .is_some_and(|old| same_members(old, segment))
        });
        match same.and_then(|old| merged.get_mut(old)) {
            Some(both) => both.1 = Some(id(number)),
            None => {
                segments.push(segment.clone());
                merged.push((None, Some(id(number))));
            }
        }
    }
    let policy = Policy {
        defaults: after.defaults,
        segments,
        groups: Vec::new(),
        rules: Rules::default(),
        tests: Vec::new(),
    };
    (policy, merged)
}

fn same_members(one: &Segment, other: &Segment) -> bool {
    Arc::ptr_eq(&one.members, &other.members)
        || one.members.len() == other.members.len()
            && one
                .members
                .iter()
                .zip(other.members.iter())
                .all(|(a, b)| a.range == b.range && a.except == b.except)
}

impl Kinds {
    /// The kinds of some joints, ascending.
    pub(super) fn kinds_of(&self, joints: &[u32]) -> Vec<usize> {
        let joints = joints.iter().filter_map(|j| self.joints.get(*j as usize));
        let mut kinds: Vec<usize> = joints.flat_map(|joint| joint.kinds.clone()).collect();
        kinds.sort_unstable();
        kinds
    }

    /// At most so many `kinds`, and so many that are told apart by the images.
    pub(super) fn find(
        before: Version<'_>,
        after: Version<'_>,
        env: &Environment,
        most: usize,
    ) -> Self {
        let (policy, merged) = merge(before.policy, after.policy);
        let mut sets = Sets {
            current: Vec::new(),
            known: Interner::default(),
            most,
            complete: true,
        };
        // Where no rule speaks of the host, its addresses are like others.
        let anywhere = Environment::default();
        let env = if names_host(before.policy) || names_host(after.policy) {
            env
        } else {
            &anywhere
        };
        // The follower stops nothing.
        let Ok(sweep) = intervals::sweep(&policy, env, &[], &mut sets) else {
            return Self {
                kinds: Vec::new(),
                joints: Vec::new(),
                complete: false,
            };
        };
        let mut kinds: Vec<Kind> = (0..sets.known.len())
            .map(|number| kind(&policy, &merged, sets.known.get(number)))
            .collect();
        // What has a nice address is shown by it.
        for (kind, ip) in places(&sweep.v4, USUAL4.to_bits()) {
            if let Some(kind) = kinds.get_mut(kind as usize) {
                kind.v4.get_or_insert(Ipv4Addr::from_bits(ip));
            }
        }
        for (kind, ip) in places(&sweep.v6, USUAL6.to_bits()) {
            if let Some(kind) = kinds.get_mut(kind as usize) {
                kind.v6.get_or_insert(Ipv6Addr::from_bits(ip));
            }
        }
        let joints = join(&kinds, before, after);
        Self {
            kinds,
            joints,
            complete: sets.complete,
        }
    }
}

/// Addresses that are mostly in no segment, for examples (RFC 5737, RFC 3849).
const USUAL4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const USUAL6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);

/// Kinds and addresses of them: the usual one, then of each stretch the second, as the first one is
/// often a network's own.
fn places<N: Number>(
    intervals: &[(N, u32)],
    usual: N,
) -> impl Iterator<Item = (u32, N)> + use<'_, N> {
    let usual = intervals::value_at(intervals, usual).map(|kind| (kind, usual));
    let ends = intervals.iter().skip(1).map(|(start, _)| start.before());
    let stretches = intervals.iter().zip(ends.chain([N::TOP]));
    let second = stretches.map(|((start, kind), end)| (*kind, start.next().min(end)));
    usual.into_iter().chain(second)
}

/// Whether a rule names `host`.
pub(super) fn names_host(policy: &Policy) -> bool {
    policy
        .rules
        .iter()
        .any(|rule| rule.from.host || rule.to.host)
}

fn kind(policy: &Policy, merged: &[Merged], set: &[u32]) -> Kind {
    let mut kind = Kind::default();
    for number in set {
        if let Some((before, after)) = merged.get(*number as usize) {
            kind.before.extend(before);
            kind.after.extend(after);
        }
        kind.host |= *number == intervals::host(policy);
        kind.multicast |= *number == intervals::multicast(policy);
    }
    kind.before.sort_unstable();
    kind.after.sort_unstable();
    kind
}

/// In the order of their first kinds.
fn join(kinds: &[Kind], before: Version<'_>, after: Version<'_>) -> Vec<Joint> {
    let mut joints: Vec<Joint> = Vec::new();
    let mut known: BTreeMap<(u32, u32, u8, bool, bool), usize> = BTreeMap::new();
    for (number, kind) in kinds.iter().enumerate() {
        let Some(ip) = kind.v4.map(IpAddr::V4).or(kind.v6.map(IpAddr::V6)) else {
            continue;
        };
        let address = Address::from(ip);
        let classes = (
            address_class(before.image.words(), &address),
            address_class(after.image.words(), &address),
        );
        let families = kind.families();
        let key = (classes.0, classes.1, families, kind.host, kind.multicast);
        let at = *known.entry(key).or_insert_with(|| {
            joints.push(Joint {
                classes,
                families,
                host: kind.host,
                multicast: kind.multicast,
                kinds: Vec::new(),
            });
            joints.len() - 1
        });
        if let Some(joint) = joints.get_mut(at) {
            joint.kinds.push(number);
        }
    }
    joints
}
