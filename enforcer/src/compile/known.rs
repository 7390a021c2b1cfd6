//! What one compilation leaves to the next: where an address comes or goes, services, rows and most
//! hash tables are as they were.

use std::{ops::Range, sync::Arc};

use crate::policy::model::{AddrRange, Member, Policy, Rule, Rules, Segment, SegmentId};

use super::{
    Bounds, Failsafe, Tries, rows::Rows, services::Services, sides::Classes, table::Placed,
};

/// What is known from the image that was compiled last.
#[derive(Clone, Debug, Default)]
pub struct Known(Option<Arc<Content>>);

/// All that a compilation found out, and from what.
pub(super) struct Content {
    pub(super) policy: Policy,
    pub(super) failsafes: Vec<Failsafe>,
    pub(super) bounds: Bounds,
    pub(super) services: Arc<Services>,
    pub(super) classes: Classes,
    /// Words of the image that rows and exceptions could not have.
    pub(super) taken: usize,
    pub(super) rows: Arc<Rows>,
    pub(super) tries: Tries,
    /// Under this seed the hash tables were placed.
    pub(super) seed: u64,
    pub(super) placed: Vec<Arc<Placed>>,
}

impl std::fmt::Debug for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Content").finish_non_exhaustive()
    }
}

impl Content {
    /// Whether this is of a policy whose rules say the same, whoever is a member of what.
    pub(super) fn serves(&self, policy: &Policy, failsafes: &[Failsafe], bounds: Bounds) -> bool {
        self.bounds == bounds
            && self.failsafes == failsafes
            && self.policy.defaults == policy.defaults
            && same_rules(&self.policy.rules, &policy.rules)
    }
}

/// Whether rules say the same, whatever they are called and wherever they are written.
fn same_rules(one: &Rules, other: &Rules) -> bool {
    let parts = one.parts().iter().zip(other.parts());
    let mut parts = parts.filter(|(one, other)| !Arc::ptr_eq(one, other));
    one.parts().len() == other.parts().len()
        && parts.all(|(one, other)| {
            one.len() == other.len() && one.iter().zip(&**other).all(|(a, b)| same_rule(a, b))
        })
}

fn same_rule(one: &Rule, other: &Rule) -> bool {
    let Rule {
        name: _,
        from,
        to,
        services,
        action,
        expires,
        session,
        origin: _,
    } = one;
    (from, to, services) == (&other.from, &other.to, &other.services)
        && (*action, *expires, *session) == (other.action, other.expires, other.session)
}

/// Addresses that have come to a segment, or left it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Changed {
    /// The segment.
    pub segment: SegmentId,
    /// What its member says, exceptions left aside.
    pub range: AddrRange,
}

impl Known {
    pub(super) fn content(&self) -> Option<&Content> {
        self.0.as_deref()
    }

    pub(super) fn keep(&mut self, content: Content) {
        self.0 = Some(Arc::new(content));
    }

    /// Which members are others than in the policy that was compiled last; empty where there was
    /// none. It may name some that are the same.
    pub fn changed(&self, policy: &Policy) -> Vec<Changed> {
        let Some(content) = &self.0 else {
            return Vec::new();
        };
        let before = &content.policy.segments;
        let mut changed = Vec::new();
        for (number, segment) in policy.segments.iter().enumerate() {
            // Mostly at the same place.
            let old = before.get(number).filter(|old| old.name == segment.name);
            let old = old.or_else(|| before.iter().find(|old| old.name == segment.name));
            let old = old.map_or_else(Arc::default, |old| Arc::clone(&old.members));
            if Arc::ptr_eq(&old, &segment.members) {
                continue;
            }
            let segment_id = SegmentId(super::word(number));
            let differing = differing(&old, &segment.members);
            changed.extend(differing.map(|range| Changed {
                segment: segment_id,
                range,
            }));
        }
        // Of segments that are gone.
        let names: std::collections::BTreeSet<&str> =
            policy.segments.iter().map(|s| s.name.as_str()).collect();
        let gone = |segment: &&Segment| !names.contains(segment.name.as_str());
        for segment in before.iter().filter(gone) {
            changed.extend(segment.members.iter().map(|member| Changed {
                segment: SegmentId(u32::MAX),
                range: member.range,
            }));
        }
        changed
    }
}

/// Ranges of members between those at the beginning and at the end that two lists share.
fn differing(old: &[Member], new: &[Member]) -> impl Iterator<Item = AddrRange> {
    let same = |(old, new): &(&Member, &Member)| old.range == new.range && old.except == new.except;
    let head = old.iter().zip(new).take_while(same).count();
    let rest = old.len().min(new.len()) - head;
    let ends = old.iter().rev().zip(new.iter().rev());
    let tail = ends.take(rest).take_while(same).count();
    let middle = |list: &[Member]| -> Range<usize> { head..list.len() - tail };
    let of = |list: &[Member]| -> Vec<AddrRange> {
        let middle = list.get(middle(list)).unwrap_or_default();
        middle.iter().map(|member| member.range).collect()
    };
    of(old).into_iter().chain(of(new))
}
