use std::{collections::BTreeSet, net::IpAddr};

use proptest::prelude::*;

use super::*;
use crate::{
    compile::{Options, compile},
    policy::{
        arbitrary,
        model::SegmentId,
        reference::{self, judge},
    },
};

fn outcome(policy: &Policy, env: &Environment, query: &FlowQuery, unix: u64) -> Outcome {
    match judge(policy, env, query, unix).outcome {
        reference::Outcome::Allowed => Outcome::Allowed,
        reference::Outcome::Denied => Outcome::Denied,
        reference::Outcome::WouldDeny => Outcome::WouldDeny,
        reference::Outcome::Off => Outcome::Off,
    }
}

fn images(one: &Policy, other: &Policy, env: &Environment) -> (Image, Image) {
    let compile = |policy| compile(policy, env, &Options::default()).unwrap();
    (compile(one), compile(other))
}

fn compared(
    (one, other): (&Policy, &Policy),
    images: &(Image, Image),
    env: &Environment,
    unix: u64,
) -> Reach {
    let version = |policy, image| Version { policy, image };
    let (before, after) = (version(one, &images.0), version(other, &images.1));
    let bounds = Bounds {
        groups: usize::MAX,
        ..Bounds::default()
    };
    let reach = compare(before, after, env, unix, bounds);
    let total = |effect| -> u64 {
        let of = |group: &&Group| {
            let mut changes = group.changes.iter();
            changes.any(|change| Effect::of(change.before, change.after) == effect)
        };
        let groups = reach.groups.iter().filter(of);
        groups
            .map(|group| (group.from.len() * group.to.len()) as u64)
            .sum()
    };
    let totals = [Effect::Lost, Effect::Gained, Effect::Regarded].map(total);
    let [lost, gained, regarded] = totals;
    let said = Totals {
        lost,
        gained,
        regarded,
    };
    assert_eq!((reach.totals, reach.more), (said, 0));
    reach
}

/// The kind of an address, asked of the model.
fn kind_of(reach: &Reach, one: &Policy, other: &Policy, env: &Environment, ip: IpAddr) -> usize {
    let list = |set: BTreeSet<SegmentId>| Vec::from_iter(set);
    let (before, after) = (list(one.segments_of(ip)), list(other.segments_of(ip)));
    let named = kinds::names_host(one) || kinds::names_host(other);
    let host = named && env.host_addresses.contains(&ip);
    let multicast = crate::policy::model::is_multicast(ip);
    let mut kinds = reach.kinds.iter();
    let found = kinds.position(|kind| {
        (&kind.before, &kind.after) == (&before, &after)
            && (kind.host, kind.multicast) == (host, multicast)
    });
    found.unwrap()
}

/// What the comparison says of a flow: the outcome before and after, where it changes.
fn said(reach: &Reach, from: usize, to: usize, query: &FlowQuery) -> Vec<(Outcome, Outcome)> {
    let index = match (query.dst.is_ipv6(), query.protocol) {
        (false, 58) | (true, 1) => enforcer_common::image::ICMP_OF_OTHER_FAMILY,
        (_, protocol) => u32::from(protocol),
    };
    let of_pair = reach
        .groups
        .iter()
        .filter(|group| group.from.contains(&from) && group.to.contains(&to));
    let changes = of_pair.flat_map(|group| &group.changes);
    let named = changes.filter(|change| {
        change
            .services
            .iter()
            .any(|run| run.index == index && (run.first..=run.last).contains(&query.selector))
    });
    named.map(|change| (change.before, change.after)).collect()
}

/// Two policies that have much in common, and questions at the bounds of both.
fn versions() -> impl Strategy<Value = (Policy, Policy, Vec<FlowQuery>)> {
    let two = (arbitrary::policy(), arbitrary::policy(), any::<[bool; 4]>());
    two.prop_flat_map(|(one, mut other, [segments, rules, defaults, all])| {
        if !all && segments && one.segments.len() == other.segments.len() {
            other.segments.clone_from(&one.segments);
        }
        if !all && rules && one.segments.len() >= other.segments.len() {
            // Segments that rules of the other one name are there.
            other.segments.clone_from(&one.segments);
        } else if !all && one.segments.len() <= other.segments.len() {
            other.rules = one.rules.clone();
        }
        if defaults {
            other.defaults = one.defaults;
        }
        let queries = (
            prop::collection::vec(arbitrary::query(&one), 24),
            prop::collection::vec(arbitrary::query(&other), 24),
        );
        (
            Just(one),
            Just(other),
            queries.prop_map(|(a, b)| [a, b].concat()),
        )
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// Asked flow by flow, the reference interpreter says the same of both policies, but where the
    /// comparison says what changes: then just that.
    #[test]
    fn it_says_what_the_reference_says(
        (one, other, queries) in versions(),
        env in arbitrary::environment(),
        unix in arbitrary::time(),
    ) {
        let images = images(&one, &other, &env);
        let reach = compared((&one, &other), &images, &env, unix);
        prop_assert!(reach.cut.is_empty());
        for query in queries {
            let (src, dst) = (query.src, query.dst);
            let own = env.host_addresses.contains(&src) && env.host_addresses.contains(&dst);
            if crate::policy::model::is_multicast(src) || own {
                continue;
            }
            let before = outcome(&one, &env, &query, unix);
            let after = outcome(&other, &env, &query, unix);
            let from = kind_of(&reach, &one, &other, &env, src);
            let to = kind_of(&reach, &one, &other, &env, dst);
            let said = said(&reach, from, to, &query);
            let expected = (before != after).then_some((before, after));
            prop_assert_eq!(said, Vec::from_iter(expected), "{:?}", query);
        }
    }

    /// Each example is a flow between its kinds that changes as it says.
    #[test]
    fn examples_are_true(
        (one, other, _) in versions(),
        env in arbitrary::environment(),
        unix in arbitrary::time(),
    ) {
        let images = images(&one, &other, &env);
        let reach = compared((&one, &other), &images, &env, unix);
        for group in &reach.groups {
            for change in &group.changes {
                let query = &change.example;
                prop_assert_eq!(outcome(&one, &env, query, unix), change.before);
                prop_assert_eq!(outcome(&other, &env, query, unix), change.after);
                let from = kind_of(&reach, &one, &other, &env, query.src);
                let to = kind_of(&reach, &one, &other, &env, query.dst);
                prop_assert!(group.from.contains(&from) && group.to.contains(&to));
            }
        }
    }

    #[test]
    fn a_policy_is_like_itself(
        policy in arbitrary::policy(),
        env in arbitrary::environment(),
        unix in arbitrary::time(),
    ) {
        let images = images(&policy, &policy, &env);
        let reach = compared((&policy, &policy), &images, &env, unix);
        prop_assert_eq!(reach.groups, vec![]);
    }
}

/// Where a bound is met, what is said is still true, and that it is not all is said too.
#[test]
fn what_was_cut_short_says_so() {
    let file = |text: &str| crate::policy::SourceFile {
        name: "p.yaml".to_owned(),
        text: text.to_owned(),
    };
    let text = "version: 1\nsegments:\n  a: { members: [{cidr: 10.0.0.0/24}] }\n  \
                b: { members: [{cidr: 10.0.1.0/24}] }\nrules:\n  \
                - {name: r, from: [a], to: [b], services: [tcp/1-9]}\n";
    let one = crate::policy::parse(&[file(text)]).unwrap();
    let other = crate::policy::parse(&[file(&text.replace("1-9", "2-9"))]).unwrap();
    let env = Environment::default();
    let images = images(&one, &other, &env);
    let version = |policy, image| Version { policy, image };
    let run = |bounds| {
        let (before, after) = (version(&one, &images.0), version(&other, &images.1));
        compare(before, after, &env, 0, bounds)
    };
    let all = run(Bounds::default());
    assert!(all.cut.is_empty());
    assert_eq!(all.groups.len(), 1);
    let change = &all.groups[0].changes[0];
    assert_eq!(
        (change.before, change.after),
        (Outcome::Allowed, Outcome::Denied)
    );
    let port = Run {
        index: 6,
        first: 1,
        last: 1,
    };
    assert_eq!(change.services, [port]);
    let effort = Bounds {
        effort: 3,
        ..Bounds::default()
    };
    let kinds = Bounds {
        kinds: 1,
        ..Bounds::default()
    };
    let none = Bounds {
        groups: 0,
        ..Bounds::default()
    };
    let none = run(none);
    assert_eq!(
        (none.groups.len(), none.more, none.totals),
        (0, 1, all.totals)
    );
    for bounds in [effort, kinds] {
        let cut = run(bounds);
        assert_eq!(cut.cut.len(), 1, "{cut:?}");
        assert!(cut.groups.is_empty());
    }
}
