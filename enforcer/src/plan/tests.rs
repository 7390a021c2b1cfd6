use super::*;
use crate::{
    compile::{Options, compile},
    policy::{self, SourceFile},
};

fn parsed(text: &str) -> Policy {
    let file = SourceFile {
        name: "p.yaml".to_owned(),
        text: text.to_owned(),
    };
    policy::parse(&[file]).unwrap()
}

fn planned(before: &str, after: &str) -> Plan {
    let (one, other) = (parsed(before), parsed(after));
    let env = Environment::default();
    let image = |policy| compile(policy, &env, &Options::default()).unwrap();
    let (live, new) = (image(&one), image(&other));
    let settings = Settings::default();
    let version = |policy, image| Version {
        policy,
        image,
        settings: &settings,
    };
    let (live, new) = (&live, &new);
    let mut plan = compare(version(&one, live), version(&other, new), &env, 0);
    plan.summary = summary(&plan);
    plan
}

const BEFORE: &str = "version: 1
segments:
  app: { members: [{cidr: 10.10.2.0/24}] }
  db: { members: [{cidr: 10.10.1.0/24}, {cidr: \"fd00:10:1::/64\"}] }
  lab: { members: [{cidr: 10.20.0.0/16}], mode: observe }
rules:
  - { name: app-to-db, from: [app], to: [db], services: [tcp/5432] }
  - { name: lab-in, from: [lab], to: [app], services: [tcp/80, tcp/443] }
";

fn lines(items: &types::Items) -> Vec<String> {
    let line = |item: &types::Item| {
        let place = item
            .line
            .map_or_else(String::new, |line| format!(" :{line}"));
        format!(
            "{:?} {}{place} {}",
            item.sign,
            item.name,
            item.details.join(" | ")
        )
    };
    items.items.iter().map(line).collect()
}

#[test]
fn what_says_the_same_is_no_change() {
    let moved = BEFORE.replace("segments:", "# a remark\n\nsegments:");
    let plan = planned(BEFORE, &moved);
    assert!(!plan.changed, "{plan:?}");
    assert_eq!(plan.summary, "no changes");
}

#[test]
fn each_thing_that_is_written_differently_is_named() {
    let after = "version: 1
defaults: { unsegmented: deny }
segments:
  app: { members: [{cidr: 10.10.2.0/24}, {range: 10.10.9.1-10.10.9.3}] }
  db: { members: [{cidr: 10.10.1.0/24, except: [10.10.1.7]}, {cidr: \"fd00:10:1::/64\"}], protect: inbound }
  lab: { members: [{cidr: 10.20.0.0/16}], mode: enforce, interfaces: [eth0.20] }
  new: { members: [{cidr: 10.30.0.0/16}] }
groups: { both: [app, db] }
rules:
  - { name: lab-in, from: [lab, new], to: [app], services: [tcp/443, udp/53] }
  - { name: no-lab, from: [lab], to: [db], services: [any], action: deny }
";
    let plan = planned(BEFORE, after);
    assert!(plan.changed);
    assert_eq!(
        lines(&plan.text.policy),
        ["Changed defaults unsegmented: allow -> deny"]
    );
    assert_eq!(
        lines(&plan.text.segments),
        [
            "Changed app :4 + 10.10.9.1-10.10.9.3  p.yaml:4",
            "Changed db :5 protect: both -> inbound | + 10.10.1.0/24 except 10.10.1.7  p.yaml:5 | - \
             10.10.1.0/24  p.yaml:4",
            "Changed lab :6 mode: observe -> enforce | interfaces: +eth0.20",
            "Added new :7 1 member, mode enforce, protects both",
        ]
    );
    assert_eq!(lines(&plan.text.groups), ["Added both :8 app, db"]);
    assert_eq!(
        lines(&plan.text.rules),
        [
            "Changed lab-in :10 from: +new | services: +udp/53 -tcp/80",
            "Added no-lab :11 deny lab -> db: any",
            "Removed app-to-db :7 allow app -> db: tcp/5432",
        ]
    );
    let rules = &plan.text.rules;
    assert_eq!((rules.added, rules.removed, rules.changed), (1, 1, 1));
}

#[test]
fn the_order_of_rules_is_a_change() {
    let mut lines: Vec<&str> = BEFORE.lines().collect();
    let last = lines.len() - 1;
    lines.swap(last, last - 1);
    let plan = planned(BEFORE, &(lines.join("\n") + "\n"));
    assert!(plan.changed);
    assert_eq!(
        self::lines(&plan.text.policy),
        ["Changed rules they are in another order"]
    );
    assert_eq!(
        plan.summary,
        "1 default changed; everybody reaches the same as before; no live flow would be cut"
    );
}

#[test]
fn who_loses_what_is_said_with_an_example() {
    let after = BEFORE.replace("services: [tcp/5432]", "services: [tcp/5433]");
    let plan = planned(BEFORE, &after);
    assert_eq!(
        (plan.reach.lost, plan.reach.gained, plan.reach.regarded),
        (1, 1, 0)
    );
    assert_eq!(
        plan.summary,
        "1 rule changed; 1 pair of segments loses tcp/5432; 1 pair of segments gains tcp/5433; \
         no live flow would be cut"
    );
    let [group] = &plan.reach.groups[..] else {
        panic!("{:?}", plan.reach.groups);
    };
    assert_eq!(
        (&group.from[0].after[..], &group.to[0].after[..]),
        (&["app".to_owned()][..], &["db".to_owned()][..])
    );
    let [lost, gained] = &group.changes[..] else {
        panic!("{group:?}");
    };
    assert_eq!(lost.services, ["tcp/5432"]);
    assert_eq!(
        (lost.before, lost.after),
        (types::Outcome::Allowed, types::Outcome::Denied)
    );
    let example = &lost.example;
    assert_eq!(
        (example.from.to_string(), example.to.to_string()),
        ("10.10.2.1".to_owned(), "10.10.1.1".to_owned())
    );
    assert_eq!(example.before.rule.as_deref(), Some("app-to-db"));
    assert_eq!(
        (example.before.line, &*example.after.reason),
        (Some(7), "default_deny")
    );
    assert_eq!(example.after.segment.as_deref(), Some("db"));
    assert_eq!(gained.services, ["tcp/5433"]);
}

#[test]
fn a_member_that_comes_is_another_kind_of_address() {
    let after = BEFORE.replace(
        "{cidr: 10.10.2.0/24}",
        "{cidr: 10.10.2.0/24}, {cidr: 10.10.3.0/24}",
    );
    let plan = planned(BEFORE, &after);
    let ends = plan.reach.groups.iter().flat_map(|group| &group.from);
    let mut moved = ends.filter(|end| end.before.is_some());
    let end = moved.next().unwrap();
    assert_eq!(
        (&end.after[..], end.before.as_deref().unwrap()),
        (&["app".to_owned()][..], &["unsegmented".to_owned()][..])
    );
    assert!(plan.reach.lost > 0 && plan.reach.gained > 0);
}

#[test]
fn a_mode_is_no_loss() {
    let after = BEFORE.replace(", mode: observe", ", mode: off");
    let plan = planned(BEFORE, &after);
    assert_eq!((plan.reach.lost, plan.reach.gained), (0, 0));
    assert!(plan.reach.regarded > 0);
    assert!(
        plan.summary.contains("recorded otherwise"),
        "{}",
        plan.summary
    );
}
