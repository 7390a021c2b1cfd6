//! Who reaches whom differently, in names.

use enforcer_common::decide::{Query, decide};

use crate::{
    compile::reach::{Bounds, Change, Group, Kind, Reach, compare},
    policy::model::{Environment, FlowQuery, Policy, SegmentId},
};

use super::{
    ENDS, SERVICES, Version, because, services,
    types::{End, Example, ReachChange, ReachChanges, ReachGroup},
};

/// Compares what the images say at `unix`.
pub(super) fn changes(
    before: Version<'_>,
    after: Version<'_>,
    env: &Environment,
    unix: u64,
    bounds: Bounds,
) -> ReachChanges {
    let found = compare(before.parts(), after.parts(), env, unix, bounds);
    let groups = found.groups.iter().map(|group| {
        let ends = |numbers: &[usize]| -> (Vec<End>, usize) {
            let shown = numbers.iter().take(ENDS);
            let shown = shown.filter_map(|number| found.kinds.get(*number));
            let shown = shown.map(|kind| end(before.policy, after.policy, kind));
            (shown.collect(), numbers.len().saturating_sub(ENDS))
        };
        let (from, more_from) = ends(&group.from);
        let (to, more_to) = ends(&group.to);
        let families = families(&found, group);
        let changes = group.changes.iter();
        ReachGroup {
            from,
            more_from,
            to,
            more_to,
            pairs: group.from.len() as u64 * group.to.len() as u64,
            changes: changes
                .map(|change| named(before, after, unix, change, families))
                .collect(),
        }
    });
    ReachChanges {
        lost: found.totals.lost,
        gained: found.totals.gained,
        regarded: found.totals.regarded,
        groups: groups.collect(),
        more: found.more,
        cut: found.cut.iter().map(|text| (*text).to_owned()).collect(),
    }
}

/// Families that the first pair of a group has in common, and so every other one.
fn families(found: &Reach, group: &Group) -> u8 {
    let of = |numbers: &[usize]| {
        let kind = numbers.first().and_then(|number| found.kinds.get(*number));
        kind.map_or(0, |kind| {
            u8::from(kind.v4.is_some()) | u8::from(kind.v6.is_some()) << 1
        })
    };
    of(&group.from) & of(&group.to)
}

fn named(
    before: Version<'_>,
    after: Version<'_>,
    unix: u64,
    change: &Change,
    families: u8,
) -> ReachChange {
    let mut names = services::names(&change.services, families);
    let more = names.len().saturating_sub(SERVICES);
    names.truncate(SERVICES);
    let FlowQuery {
        src,
        dst,
        protocol,
        selector,
    } = change.example;
    let query = Query {
        source: src.into(),
        destination: dst.into(),
        protocol,
        selector,
    };
    let says = |version: Version<'_>| {
        let decision = decide(version.image.words(), &query, unix);
        because(version.policy, &decision)
    };
    ReachChange {
        before: change.before.into(),
        after: change.after.into(),
        services: names,
        more,
        example: Example {
            from: src,
            to: dst,
            service: services::point(dst.is_ipv6(), protocol, selector),
            before: says(before),
            after: says(after),
        },
    }
}

fn end(before: &Policy, after: &Policy, kind: &Kind) -> End {
    let names = |policy: &Policy, ids: &[SegmentId]| -> Vec<String> {
        let segments = ids.iter().filter_map(|id| policy.segment(*id));
        let mut names: Vec<String> = segments.map(|segment| segment.name.clone()).collect();
        names.sort_unstable();
        if kind.host {
            names.push("host".to_owned());
        }
        if kind.multicast {
            names.push("multicast".to_owned());
        }
        if names.is_empty() {
            names.push("unsegmented".to_owned());
        }
        names
    };
    let (was, is) = (names(before, &kind.before), names(after, &kind.after));
    End {
        before: (was != is).then_some(was),
        after: is,
    }
}
