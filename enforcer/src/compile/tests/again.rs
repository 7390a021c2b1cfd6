//! What is known from the image before changes nothing in the next one.

use proptest::{collection, prelude::*, sample::Index};

use super::*;
use crate::{
    compile::{Changed, Known, compile_again, validate_changes},
    policy::model::{AddrRange, Member, Mode, Rule, SegmentId},
};

/// One edit of a policy.
#[derive(Clone, Debug)]
enum Edit {
    /// A member of another policy joins a segment.
    Join(Index, Index),
    /// A member leaves.
    Leave(Index, Index),
    /// Rules have other names and lines, but say the same.
    Rename,
    /// A rule says something else.
    Turn(Index),
    /// The last rule is gone.
    Drop,
    /// A segment guards in another mode.
    Mode(Index),
    /// This host has other addresses.
    Host(Environment),
    Nothing,
}

fn edit() -> impl Strategy<Value = Edit> {
    let index = any::<Index>;
    prop_oneof![
        6 => (index(), index()).prop_map(|(segment, member)| Edit::Join(segment, member)),
        4 => (index(), index()).prop_map(|(segment, member)| Edit::Leave(segment, member)),
        1 => Just(Edit::Rename),
        1 => index().prop_map(Edit::Turn),
        1 => Just(Edit::Drop),
        1 => index().prop_map(Edit::Mode),
        1 => arbitrary::environment().prop_map(Edit::Host),
        1 => Just(Edit::Nothing),
    ]
}

fn apply(policy: &mut Policy, env: &mut Environment, strangers: &[Member], edit: &Edit) {
    let rename = |rule: &mut Rule| {
        rule.name.push('x');
        rule.origin.line += 1;
    };
    let turn = |rule: &mut Rule| {
        rule.action = match rule.action {
            Action::Allow => Action::Deny,
            Action::Deny => Action::Allow,
        };
        rule.session = None;
    };
    match edit {
        Edit::Join(segment, member) if !policy.segments.is_empty() && !strangers.is_empty() => {
            let segment = at(&mut policy.segments, segment);
            let mut members = segment.members.to_vec();
            members.push(strangers[member.index(strangers.len())].clone());
            segment.members = members.into();
        }
        Edit::Leave(segment, member) if !policy.segments.is_empty() => {
            let segment = at(&mut policy.segments, segment);
            let mut members = segment.members.to_vec();
            if !members.is_empty() {
                members.remove(member.index(members.len()));
            }
            segment.members = members.into();
        }
        Edit::Rename => policy.rules.edit(|rules| rules.iter_mut().for_each(rename)),
        Edit::Turn(rule) if !policy.rules.is_empty() => {
            policy.rules.edit(|rules| turn(at(rules, rule)));
        }
        Edit::Drop => drop(policy.rules.edit(Vec::pop)),
        Edit::Mode(segment) if !policy.segments.is_empty() => {
            let segment = at(&mut policy.segments, segment);
            segment.mode = match segment.mode {
                Mode::Enforce => Mode::Observe,
                Mode::Observe => Mode::Off,
                Mode::Off => Mode::Enforce,
            };
        }
        Edit::Host(other) => *env = other.clone(),
        Edit::Join(..) | Edit::Leave(..) | Edit::Turn(_) | Edit::Mode(_) | Edit::Nothing => {}
    }
}

fn at<'a, T>(list: &'a mut [T], index: &Index) -> &'a mut T {
    let at = index.index(list.len());
    &mut list[at]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn edit_by_edit_the_image_is_that_of_a_full_compilation(
        policy in arbitrary::policy(),
        others in arbitrary::policy(),
        env in arbitrary::environment(),
        edits in collection::vec(edit(), 1..12),
    ) {
        let members = others.segments.iter().flat_map(|segment| segment.members.iter());
        let strangers: Vec<Member> = members.cloned().collect();
        let (mut policy, mut env, mut known) = (policy, env, Known::default());
        let options = Options::default();
        for edit in [&Edit::Nothing].into_iter().chain(&edits) {
            apply(&mut policy, &mut env, &strangers, edit);
            let changed = known.changed(&policy);
            let again = compile_again(&policy, &env, &options, &mut known);
            let full = compile(&policy, &env, &options);
            prop_assert_eq!(&again, &full, "after {:?}", edit);
            prop_assert_eq!(validate_changes(&policy, &env, &full.unwrap(), &changed), Ok(()));
        }
    }
}

/// Two segments, a rule between them and one that expires.
fn policy(members: &str) -> Policy {
    let text = format!(
        "version: 1\nsegments:\n  a: {{ members: [{members}] }}\n  \
         b: {{ members: [{{cidr: 10.2.0.0/16}}] }}\nrules:\n  \
         - {{name: r, from: [a], to: [b], services: [tcp/80]}}\n  \
         - {{name: e, from: [a], to: [b], services: [tcp/81], expires: 2030-01-01T00:00:00Z}}\n"
    );
    let name = "p.yaml".to_owned();
    crate::policy::parse(&[crate::policy::SourceFile { name, text }]).unwrap()
}

#[test]
fn what_a_member_cannot_alter_is_not_made_again() {
    let (env, options) = (Environment::default(), Options::default());
    let mut known = Known::default();
    let before = policy("{cidr: 10.1.0.1/32}");
    compile_again(&before, &env, &options, &mut known).unwrap();
    assert_eq!(known.changed(&before), []);
    let rows = Arc::clone(&known.content().unwrap().rows);
    let services = Arc::clone(&known.content().unwrap().services);

    let after = policy("{cidr: 10.1.0.1/32}, {cidr: 10.1.9.9/32}");
    let address = std::net::Ipv4Addr::new(10, 1, 9, 9);
    let range = AddrRange::V4 {
        first: address,
        last: address,
    };
    let segment = SegmentId(0);
    assert_eq!(known.changed(&after), [Changed { segment, range }]);
    let image = compile_again(&after, &env, &options, &mut known).unwrap();
    assert_eq!(image, compile(&after, &env, &options).unwrap());
    assert!(Arc::ptr_eq(&rows, &known.content().unwrap().rows));
    assert!(Arc::ptr_eq(&services, &known.content().unwrap().services));
    // It left, and so did the timelines' place in the image.
    assert_eq!(known.changed(&before), [Changed { segment, range }]);
    let image = compile_again(&before, &env, &options, &mut known).unwrap();
    assert_eq!(image, compile(&before, &env, &options).unwrap());
    assert!(Arc::ptr_eq(&rows, &known.content().unwrap().rows));

    // Another port is other rows.
    let mut other = before.clone();
    other
        .rules
        .edit(|rules| rules[0].services = vec![Service::Any]);
    let image = compile_again(&other, &env, &options, &mut known).unwrap();
    assert_eq!(image, compile(&other, &env, &options).unwrap());
    assert!(!Arc::ptr_eq(&rows, &known.content().unwrap().rows));
}

#[test]
fn a_change_that_is_not_in_the_image_is_found() {
    let (env, options) = (Environment::default(), Options::default());
    // So many members that a sample of all of them would hardly meet the one that is missing.
    let members = |count: u32| {
        let hosts = (0..count).map(|n| format!("{{cidr: 10.1.{}.{}/32}}", n / 250, n % 250));
        policy(&hosts.collect::<Vec<_>>().join(", "))
    };
    let (before, after) = (members(5_000), members(5_001));
    let mut known = Known::default();
    let stale = compile_again(&before, &env, &options, &mut known).unwrap();
    let changed = known.changed(&after);
    assert_eq!(changed.len(), 1);
    assert!(validate_changes(&after, &env, &stale, &changed).is_err());
    // A member that is still in the image, too.
    let image = compile_again(&after, &env, &options, &mut known).unwrap();
    let changed = known.changed(&before);
    assert_eq!(changed.len(), 1);
    assert!(validate_changes(&before, &env, &image, &changed).is_err());
}
