//! Members → elementary intervals: stretches of addresses that are in the same segments.
//!
//! One sweep per family over the sorted boundaries. It tells a follower which segment is entered
//! or left, and asks for a number at each stretch; it stores no sets itself.

use crate::policy::model::{AddrRange, Environment, Policy};

use super::{Failsafe, Stop, bits::Bits, marks};

/// An address of one family as a number.
pub(super) trait Number: Copy + Ord + Send {
    /// The highest one.
    const TOP: Self;
    /// The lowest one.
    const ZERO: Self;
    /// The next one; of the highest, itself.
    fn next(self) -> Self;
    /// The one before; of the lowest, itself.
    fn before(self) -> Self;
}

impl Number for u32 {
    const TOP: Self = Self::MAX;
    const ZERO: Self = 0;

    fn next(self) -> Self {
        self.saturating_add(1)
    }

    fn before(self) -> Self {
        self.saturating_sub(1)
    }
}

impl Number for u128 {
    const TOP: Self = Self::MAX;
    const ZERO: Self = 0;

    fn next(self) -> Self {
        self.saturating_add(1)
    }

    fn before(self) -> Self {
        self.saturating_sub(1)
    }
}

/// What a family's addresses map to: starts, ascending, the first one 0; each reaches up to the
/// next one's start. Neighbours differ.
pub(super) type Intervals<N> = Vec<(N, u32)>;

/// The outcome of the sweep, with the follower's numbers.
pub(super) struct Sweep {
    pub(super) v4: Intervals<u32>,
    pub(super) v6: Intervals<u128>,
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

/// Points at which a set is entered or left.
struct Points<N> {
    points: Vec<(N, u32)>,
    /// Scratch: the ranges of one set, inclusive.
    ranges: Vec<(N, N)>,
    cuts: Vec<(N, N)>,
}

impl<N: Number> Points<N> {
    fn new() -> Self {
        Self {
            points: Vec::new(),
            ranges: Vec::new(),
            cuts: Vec::new(),
        }
    }

    /// Takes in a member's range minus its exceptions.
    fn member(&mut self, (first, last): (N, N), except: impl Iterator<Item = (N, N)>) {
        self.cuts.clear();
        self.cuts.extend(except);
        self.cuts.sort_unstable();
        let mut next = first;
        for (from, to) in &self.cuts {
            if *from > last || next > last {
                break;
            }
            if *from > next {
                self.ranges.push((next, from.before()));
            }
            if *to >= last {
                return;
            }
            next = next.max(to.next());
        }
        self.ranges.push((next, last));
    }

    /// Ends a set. Its ranges are united first, so at each point it is entered or left once at most,
    /// and no counting is needed.
    fn close(&mut self, number: u32) {
        if !self.ranges.is_sorted() {
            self.ranges.sort_unstable();
        }
        let mut open: Option<(N, N)> = None;
        let points = &mut self.points;
        let mut close = |(first, last): (N, N)| {
            points.push((first, number));
            if last < N::TOP {
                points.push((last.next(), number));
            }
        };
        for (first, last) in self.ranges.drain(..) {
            open = Some(match open {
                Some((start, end)) if first <= end.next() => (start, end.max(last)),
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

    fn sorted(mut self) -> Vec<(N, u32)> {
        self.points.sort_unstable();
        self.points
    }
}

/// A range of the family, if it is one.
fn four(range: &AddrRange) -> Option<(u32, u32)> {
    match range {
        AddrRange::V4 { first, last } => Some((first.to_bits(), last.to_bits())),
        AddrRange::V6 { .. } => None,
    }
}

fn six(range: &AddrRange) -> Option<(u128, u128)> {
    match range {
        AddrRange::V6 { first, last } => Some((first.to_bits(), last.to_bits())),
        AddrRange::V4 { .. } => None,
    }
}

/// The points of one family, in order.
fn points<N: Number>(
    policy: &Policy,
    env: &Environment,
    failsafes: &[Failsafe],
    of: fn(&AddrRange) -> Option<(N, N)>,
    multicast_ranges: &[(N, N)],
) -> Vec<(N, u32)> {
    let mut points = Points::new();
    for (number, segment) in (0u32..).zip(&policy.segments) {
        for member in segment.members.iter() {
            if let Some(range) = of(&member.range) {
                points.member(range, member.except.iter().filter_map(of));
            }
        }
        points.close(number);
    }
    for (number, own) in [(host(policy), false), (own(policy), true)] {
        let addresses = env.host_addresses.iter();
        for address in addresses.filter(|ip| !own || marks::is_own(**ip)) {
            let range = of(&AddrRange::from(ipnet::IpNet::from(*address)));
            points.ranges.extend(range);
        }
        points.close(number);
    }
    for (number, sources) in (0u32..).zip(failsafes.iter().map(|f| &f.sources)) {
        let ranges = sources.iter().map(|net| AddrRange::from(*net));
        points.ranges.extend(ranges.filter_map(|range| of(&range)));
        points.close(failsafe(policy, number));
    }
    points.ranges.extend(multicast_ranges);
    points.close(multicast(policy));
    points.sorted()
}

/// The intervals of both families.
pub(super) fn sweep(
    policy: &Policy,
    env: &Environment,
    failsafes: &[Failsafe],
    follower: &mut impl Follow,
) -> Result<Sweep, Stop> {
    let multicast4 = [(0xe000_0000, 0xefff_ffff), (u32::MAX, u32::MAX)];
    let multicast6 = [(0xff << 120, u128::MAX)];
    let members: usize = policy.segments.iter().map(|s| s.members.len()).sum();
    let fours = || points(policy, env, failsafes, four, &multicast4);
    let sixes = || points(policy, env, failsafes, six, &multicast6);
    let (v4, v6) = super::both(members >= super::THREADS_PAY, fours, sixes);
    let sets = policy.segments.len() + 3 + failsafes.len();
    Ok(Sweep {
        v4: follow(v4, sets, follower)?,
        v6: follow(v6, sets, follower)?,
    })
}

/// Walks the points of one family; leaves the follower in no set.
fn follow<N: Number>(
    points: Vec<(N, u32)>,
    sets: usize,
    follower: &mut impl Follow,
) -> Result<Intervals<N>, Stop> {
    let mut intervals = Intervals::with_capacity(points.len() + 1);
    let mut inside = Bits::empty(sets);
    let mut at = N::ZERO;
    for (point, set) in points {
        if point != at {
            push(&mut intervals, at, follower.number()?);
            at = point;
        }
        let entered = !inside.contains(set as usize);
        if entered {
            inside.insert(set as usize);
        } else {
            inside.remove(set as usize);
        }
        follower.toggle(set, entered);
    }
    push(&mut intervals, at, follower.number()?);
    inside.take(&Bits::full(sets), |set| {
        follower.toggle(super::word(set), false);
    });
    Ok(intervals)
}

/// Appends an interval unless it continues the one before.
pub(super) fn push<N>(intervals: &mut Intervals<N>, start: N, value: u32) {
    if intervals.last().is_none_or(|(_, last)| *last != value) {
        intervals.push((start, value));
    }
}

/// The value at `address`: for tests and for builders that jump.
pub(super) fn value_at<N: Number>(intervals: &[(N, u32)], address: N) -> Option<u32> {
    let after = intervals.partition_point(|(start, _)| *start <= address);
    Some(intervals.get(after.checked_sub(1)?)?.1)
}
