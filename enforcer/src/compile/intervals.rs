//! Members → elementary intervals: stretches of addresses that are in the same segments.
//!
//! One sweep per family over the sorted boundaries. A *set* is a list of segment numbers, stored
//! once and named by its index; a table of (set, toggled segment) → set makes each step of the
//! sweep one look-up, however many segments overlap.

use std::{collections::HashMap, net::IpAddr};

use crate::policy::model::{AddrRange, Environment, Policy};

/// Inclusive; IPv4 addresses as their 32-bit value.
type Range = (u128, u128);

/// What a family's addresses map to: starts, ascending, the first one 0; each reaches up to the
/// next one's start. Neighbours differ.
pub(super) type Intervals = Vec<(u128, u32)>;

/// The outcome of the sweep. The intervals' numbers index `sets`.
pub(super) struct Sweep {
    /// Sorted segment numbers. [`Sweep::host`] and [`Sweep::multicast`] stand behind the real ones.
    pub(super) sets: Vec<Vec<u32>>,
    pub(super) v4: Intervals,
    pub(super) v6: Intervals,
}

/// Number that stands for the built-in `host` in a set.
pub(super) fn host(policy: &Policy) -> u32 {
    super::word(policy.segments.len())
}

/// Number that stands for the built-in `multicast` in a set.
pub(super) fn multicast(policy: &Policy) -> u32 {
    host(policy) + 1
}

/// The intervals of both families.
pub(super) fn sweep(policy: &Policy, env: &Environment) -> Sweep {
    let mut v4 = Vec::new();
    let mut v6 = Vec::new();
    for (number, segment) in (0u32..).zip(&policy.segments) {
        let mut ranges = (Vec::new(), Vec::new());
        for member in &segment.members {
            pieces(member.range, &member.except, &mut ranges);
        }
        add_segment(&mut v4, number, ranges.0, u128::from(u32::MAX));
        add_segment(&mut v6, number, ranges.1, u128::MAX);
    }
    let mut hosts = (Vec::new(), Vec::new());
    for address in &env.host_addresses {
        match address {
            IpAddr::V4(ip) => hosts
                .0
                .push((u128::from(ip.to_bits()), u128::from(ip.to_bits()))),
            IpAddr::V6(ip) => hosts.1.push((ip.to_bits(), ip.to_bits())),
        }
    }
    add_segment(&mut v4, host(policy), hosts.0, u128::from(u32::MAX));
    add_segment(&mut v6, host(policy), hosts.1, u128::MAX);
    let multicast4 = vec![(0xe000_0000, 0xefff_ffff), (0xffff_ffff, 0xffff_ffff)];
    let multicast6 = vec![(0xff << 120, u128::MAX)];
    add_segment(&mut v4, multicast(policy), multicast4, u128::from(u32::MAX));
    add_segment(&mut v6, multicast(policy), multicast6, u128::MAX);

    let mut sets = Sets::new();
    let v4 = sets.intervals(v4);
    let v6 = sets.intervals(v6);
    Sweep {
        sets: sets.sets,
        v4,
        v6,
    }
}

/// A member's range minus its exceptions.
fn pieces(range: AddrRange, except: &[AddrRange], out: &mut (Vec<Range>, Vec<Range>)) {
    let (v4, whole) = numbers(range);
    let mut cuts: Vec<Range> = except
        .iter()
        .map(|e| numbers(*e))
        .filter(|(family, _)| *family == v4)
        .map(|(_, cut)| cut)
        .collect();
    cuts.sort_unstable();
    let out = if v4 { &mut out.0 } else { &mut out.1 };
    let (mut next, last) = whole;
    for (from, to) in cuts {
        if from > last || next > last {
            break;
        }
        if from > next {
            out.push((next, from - 1));
        }
        if to >= last {
            return;
        }
        next = next.max(to + 1);
    }
    out.push((next, last));
}

/// Whether the range is IPv4, and its ends as numbers.
fn numbers(range: AddrRange) -> (bool, Range) {
    match range {
        AddrRange::V4 { first, last } => (
            true,
            (u128::from(first.to_bits()), u128::from(last.to_bits())),
        ),
        AddrRange::V6 { first, last } => (false, (first.to_bits(), last.to_bits())),
    }
}

/// Adds the points where the segment is entered and left. A segment's ranges are united first, so
/// at each point it is entered or left once at most, and no counting is needed.
fn add_segment(points: &mut Vec<(u128, u32)>, number: u32, mut ranges: Vec<Range>, top: u128) {
    ranges.sort_unstable();
    let mut open: Option<Range> = None;
    let mut close = |range: Range| {
        points.push((range.0, number));
        if range.1 < top {
            points.push((range.1 + 1, number));
        }
    };
    for (first, last) in ranges {
        open = Some(match open {
            Some((start, end)) if first <= end.saturating_add(1) => (start, end.max(last)),
            Some(done) => {
                close(done);
                (first, last)
            }
            None => (first, last),
        });
    }
    if let Some(done) = open {
        close(done);
    }
}

/// Every distinct set of segments that the sweep met.
struct Sets {
    sets: Vec<Vec<u32>>,
    numbers: HashMap<Vec<u32>, u32>,
    toggled: HashMap<(u32, u32), u32>,
}

impl Sets {
    fn new() -> Self {
        Self {
            sets: vec![Vec::new()],
            numbers: HashMap::from([(Vec::new(), 0)]),
            toggled: HashMap::new(),
        }
    }

    /// The set with `segment` added, or removed where it was in.
    fn toggle(&mut self, set: u32, segment: u32) -> u32 {
        if let Some(known) = self.toggled.get(&(set, segment)) {
            return *known;
        }
        let mut segments = self.sets[set as usize].clone();
        match segments.binary_search(&segment) {
            Ok(at) => drop(segments.remove(at)),
            Err(at) => segments.insert(at, segment),
        }
        let next = match self.numbers.get(&segments) {
            Some(known) => *known,
            None => {
                let number = super::word(self.sets.len());
                self.sets.push(segments.clone());
                self.numbers.insert(segments, number);
                number
            }
        };
        self.toggled.insert((set, segment), next);
        self.toggled.insert((next, segment), set);
        next
    }

    fn intervals(&mut self, mut points: Vec<(u128, u32)>) -> Intervals {
        points.sort_unstable();
        let mut intervals: Intervals = Vec::new();
        let mut set = 0;
        let mut at = 0;
        for (point, segment) in points {
            if point != at {
                push(&mut intervals, at, set);
                at = point;
            }
            set = self.toggle(set, segment);
        }
        push(&mut intervals, at, set);
        intervals
    }
}

/// Appends an interval unless it continues the one before.
pub(super) fn push(intervals: &mut Intervals, start: u128, value: u32) {
    if intervals.last().is_none_or(|(_, last)| *last != value) {
        intervals.push((start, value));
    }
}

/// The value at `address`: for tests and for builders that jump.
pub(super) fn value_at(intervals: &[(u128, u32)], address: u128) -> Option<u32> {
    let after = intervals.partition_point(|(start, _)| *start <= address);
    Some(intervals.get(after.checked_sub(1)?)?.1)
}
