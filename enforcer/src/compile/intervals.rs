//! Members → elementary intervals: stretches of addresses that are in the same segments.
//!
//! One sweep per family over the sorted boundaries. It tells a follower which segment is entered
//! or left, and asks for a number at each stretch; it stores no sets itself.

use std::net::IpAddr;

use crate::policy::model::{AddrRange, Environment, Policy};

use super::{Failsafe, Stop, bits::Bits, marks};

/// Inclusive; IPv4 addresses as their 32-bit value.
type Range = (u128, u128);

/// What a family's addresses map to: starts, ascending, the first one 0; each reaches up to the
/// next one's start. Neighbours differ.
pub(super) type Intervals = Vec<(u128, u32)>;

/// The outcome of the sweep, with the follower's numbers.
pub(super) struct Sweep {
    pub(super) v4: Intervals,
    pub(super) v6: Intervals,
}

/// Keeps the set of segments at the current address. No segment is in it at first.
pub(super) trait Follow {
    /// The segment, or another set that has a number here, is entered or left.
    fn toggle(&mut self, segment: u32, entered: bool);
    /// The number for the current set.
    fn number(&mut self) -> Result<u32, Stop>;
}

/// Number that stands for the built-in `host` in a set.
pub(super) fn host(policy: &Policy) -> u32 {
    super::word(policy.segments.len())
}

/// Number that stands for the built-in `multicast` in a set.
pub(super) fn multicast(policy: &Policy) -> u32 {
    host(policy) + 1
}

/// Number that stands for the host's own addresses ([`marks::is_own`]) in a set.
pub(super) fn own(policy: &Policy) -> u32 {
    host(policy) + 2
}

/// Number that stands for the sources of a failsafe in a set.
pub(super) fn failsafe(policy: &Policy, number: u32) -> u32 {
    own(policy) + 1 + number
}

/// The intervals of both families.
pub(super) fn sweep(
    policy: &Policy,
    env: &Environment,
    failsafes: &[Failsafe],
    follower: &mut impl Follow,
) -> Result<Sweep, Stop> {
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
    for (number, own) in [(host(policy), false), (own(policy), true)] {
        let mut hosts = (Vec::new(), Vec::new());
        let addresses = env.host_addresses.iter();
        for address in addresses.filter(|ip| !own || marks::is_own(**ip)) {
            match address {
                IpAddr::V4(ip) => hosts
                    .0
                    .push((u128::from(ip.to_bits()), u128::from(ip.to_bits()))),
                IpAddr::V6(ip) => hosts.1.push((ip.to_bits(), ip.to_bits())),
            }
        }
        add_segment(&mut v4, number, hosts.0, u128::from(u32::MAX));
        add_segment(&mut v6, number, hosts.1, u128::MAX);
    }
    for (number, sources) in (0u32..).zip(failsafes.iter().map(|f| &f.sources)) {
        let mut ranges = (Vec::new(), Vec::new());
        for net in sources {
            pieces(AddrRange::from(*net), &[], &mut ranges);
        }
        let number = failsafe(policy, number);
        add_segment(&mut v4, number, ranges.0, u128::from(u32::MAX));
        add_segment(&mut v6, number, ranges.1, u128::MAX);
    }
    let multicast4 = vec![(0xe000_0000, 0xefff_ffff), (0xffff_ffff, 0xffff_ffff)];
    let multicast6 = vec![(0xff << 120, u128::MAX)];
    add_segment(&mut v4, multicast(policy), multicast4, u128::from(u32::MAX));
    add_segment(&mut v6, multicast(policy), multicast6, u128::MAX);

    let segments = policy.segments.len() + 3 + failsafes.len();
    Ok(Sweep {
        v4: follow(v4, segments, follower)?,
        v6: follow(v6, segments, follower)?,
    })
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

/// Walks the points of one family; leaves the follower in no segment.
fn follow(
    mut points: Vec<(u128, u32)>,
    segments: usize,
    follower: &mut impl Follow,
) -> Result<Intervals, Stop> {
    points.sort_unstable();
    let mut intervals: Intervals = Vec::new();
    let mut inside = Bits::empty(segments);
    let mut at = 0;
    for (point, segment) in points {
        if point != at {
            push(&mut intervals, at, follower.number()?);
            at = point;
        }
        let entered = !inside.contains(segment as usize);
        if entered {
            inside.insert(segment as usize);
        } else {
            inside.remove(segment as usize);
        }
        follower.toggle(segment, entered);
    }
    push(&mut intervals, at, follower.number()?);
    inside.take(&Bits::full(segments), |segment| {
        follower.toggle(super::word(segment), false);
    });
    Ok(intervals)
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
