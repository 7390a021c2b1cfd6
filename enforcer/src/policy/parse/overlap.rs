//! Segments whose addresses overlap although they are said to be at different interfaces.

use std::collections::BTreeSet;

use crate::policy::model::{AddrRange, Member, Segment};

/// Comparisons in all: it is for a warning only, and most policies need a few.
const EFFORT: usize = 1_000_000;

/// Per segment that shares addresses with an earlier one, but no pattern of interfaces: its index
/// and the other's, once.
pub(super) fn without_common_interface(segments: &[Segment]) -> Vec<(usize, usize)> {
    let mut stretches: Vec<(bool, u128, u128, usize)> = Vec::new();
    let bound = (0..)
        .zip(segments)
        .filter(|(_, s)| !s.interfaces.is_empty());
    for (index, segment) in bound {
        for member in segment.members.iter() {
            let v6 = matches!(member.range, AddrRange::V6 { .. });
            let left = pieces(member).into_iter();
            stretches.extend(left.map(|(first, last)| (v6, first, last, index)));
        }
    }
    stretches.sort_unstable();
    let mut effort = EFFORT;
    let mut open: Vec<(bool, u128, usize)> = Vec::new();
    let mut agreed: BTreeSet<(usize, usize)> = BTreeSet::new();
    let mut found: BTreeSet<(usize, usize)> = BTreeSet::new();
    let mut told: BTreeSet<usize> = BTreeSet::new();
    for (v6, first, last, index) in stretches {
        open.retain(|(family, end, _)| *family == v6 && *end >= first);
        for (.., other) in &open {
            let pair = (index.max(*other), index.min(*other));
            if pair.0 == pair.1 || told.contains(&pair.0) || agreed.contains(&pair) {
                continue;
            }
            if share(segments, pair) {
                agreed.insert(pair);
            } else {
                told.insert(pair.0);
                found.insert(pair);
            }
        }
        // Cleared, compared and tested: all of it counts.
        effort = effort.saturating_sub(open.len() + 1);
        if effort == 0 {
            break;
        }
        open.push((v6, last, index));
    }
    found.into_iter().collect()
}

fn share(segments: &[Segment], (one, other): (usize, usize)) -> bool {
    let (Some(one), Some(other)) = (segments.get(one), segments.get(other)) else {
        return true;
    };
    let texts: BTreeSet<&str> = one.interfaces.iter().map(|p| p.as_str()).collect();
    let mut others = other.interfaces.iter();
    others.any(|pattern| texts.contains(pattern.as_str()))
}

/// A member's range without its exceptions.
fn pieces(member: &Member) -> Vec<(u128, u128)> {
    let ends = |range: &AddrRange| match *range {
        AddrRange::V4 { first, last } => (u128::from(first.to_bits()), u128::from(last.to_bits())),
        AddrRange::V6 { first, last } => (first.to_bits(), last.to_bits()),
    };
    let (mut next, end) = ends(&member.range);
    let mut cuts: Vec<(u128, u128)> = member.except.iter().map(ends).collect();
    cuts.sort_unstable();
    let mut left = Vec::new();
    for (first, last) in cuts {
        if first > next {
            left.push((next, first - 1));
        }
        if last >= end {
            return left;
        }
        next = next.max(last + 1);
    }
    left.push((next, end));
    left
}
