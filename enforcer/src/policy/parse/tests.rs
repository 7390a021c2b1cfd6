//! The parser on whole files: what a good policy becomes, bounds, and that nothing makes it panic.
//! Diagnostics themselves are compared in `tests/diagnostics.rs`.

use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::policy::{
    diag::Severity,
    model::{
        Action, AddrRange, Endpoints, Expect, FlowQuery, Mode, Protect, SegmentId, Service,
        Transport, Unsegmented,
    },
};

const HOSPITAL: &str = include_str!("../../../../segments/hospital.yaml");

fn file(name: &str, text: impl Into<String>) -> SourceFile {
    SourceFile {
        name: name.to_owned(),
        text: text.into(),
    }
}

fn ids(ids: &[u32]) -> std::collections::BTreeSet<SegmentId> {
    ids.iter().copied().map(SegmentId).collect()
}

/// The codes of the errors, in order.
fn codes(text: &str) -> Vec<&'static str> {
    parse(&[file("a.yaml", text)])
        .err()
        .unwrap_or_default()
        .iter()
        .map(|d| d.code)
        .collect()
}

#[test]
fn a_policy_of_two_files_becomes_a_model() {
    let first = file(
        "10.yaml",
        r#"version: 1
defaults: { mode: observe, unsegmented: deny }
segments:
  a: { description: "The A", members: [{cidr: 10.0.0.0/24, except: [10.0.0.7, 10.0.0.8/31]}], protect: inbound }
groups: { outer: [inner, c] }
"#,
    );
    let second = file(
        "20.yaml",
        r#"version: 1
services: { app: [tcp/80-90, dns, proto/gre] }
segments:
  b: { members: [{range: "fd00::1-fd00::9"}], mode: off }
  c: { members: [{cidr: "::/0"}, {cidr: 0.0.0.0/0}], protect: outbound, mode: enforce }
groups: { inner: [a] }
rules:
  - name: one
    from: [outer, b]
    to: [any, unsegmented, host, multicast]
    services: [app, ping, tcp/80-90, any]
  - { name: two, from: [unsegmented], to: [inner], services: [sctp/any], action: deny }
tests:
  - { from: 10.0.0.1, to: 10.0.0.2, service: ping, expect: allow }
  - { from: "fd00::1", to: "fd00::2", service: tcp/80, expect: deny }
"#,
    );
    let ParseOutcome { policy, warnings } = parse_with_warnings(&[first, second]).unwrap();
    let said: Vec<_> = warnings
        .iter()
        .map(|w| (w.code, w.severity, w.line))
        .collect();
    assert_eq!(said, [("W0002", Severity::Warning, 10)]);

    assert_eq!(policy.defaults.mode, Mode::Observe);
    assert_eq!(policy.defaults.unsegmented, Unsegmented::Deny);
    let [a, b, c] = policy.segments.as_slice() else {
        panic!("{:?}", policy.segments)
    };
    assert_eq!((a.name.as_str(), a.description.as_str()), ("a", "The A"));
    assert_eq!((a.mode, a.protect), (Mode::Observe, Protect::Inbound));
    assert_eq!((b.mode, b.protect), (Mode::Off, Protect::Both));
    assert_eq!((c.mode, c.protect), (Mode::Enforce, Protect::Outbound));
    assert_eq!(a.origin.to_string(), "10.yaml:4");
    assert_eq!(
        (b.origin.to_string().as_str(), b.origin.column),
        ("20.yaml:4", 3)
    );
    let v4 = |first: &str, last: &str| AddrRange::V4 {
        first: first.parse().unwrap(),
        last: last.parse().unwrap(),
    };
    assert_eq!(a.members[0].range, v4("10.0.0.0", "10.0.0.255"));
    let cuts = [v4("10.0.0.7", "10.0.0.7"), v4("10.0.0.8", "10.0.0.9")];
    assert_eq!(a.members[0].except, cuts);
    assert_eq!(c.members.len(), 2);

    let groups: Vec<_> = policy
        .groups
        .iter()
        .map(|g| (g.name.as_str(), &g.members))
        .collect();
    assert_eq!(groups, [("outer", &ids(&[0, 2])), ("inner", &ids(&[0]))]);

    let [one, two] = &*policy.rules.parts()[0] else {
        panic!("{:?}", policy.rules)
    };
    assert_eq!(
        one.from,
        Endpoints {
            segments: ids(&[0, 1, 2]),
            ..Endpoints::default()
        }
    );
    let everything = Endpoints {
        segments: ids(&[]),
        any: true,
        unsegmented: true,
        host: true,
        multicast: true,
    };
    assert_eq!(one.to, everything);
    let ports = |transport, first, last| Service::Ports {
        transport,
        first,
        last,
    };
    assert_eq!(
        one.services,
        [
            ports(Transport::Tcp, 80, 90),
            ports(Transport::Udp, 53, 53),
            ports(Transport::Tcp, 53, 53),
            Service::Protocol(47),
            Service::Icmp {
                kind: 8,
                code: None
            },
            Service::Icmpv6 {
                kind: 128,
                code: None
            },
            Service::Any,
        ]
    );
    assert_eq!(
        (one.action, one.origin.to_string().as_str()),
        (Action::Allow, "20.yaml:8")
    );
    assert_eq!(
        (two.action, two.origin.line, two.origin.column),
        (Action::Deny, 12, 5)
    );
    assert_eq!(two.services, [ports(Transport::Sctp, 0, 65535)]);
    assert_eq!(two.to.segments, ids(&[0]));

    let query = FlowQuery {
        src: "10.0.0.1".parse().unwrap(),
        dst: "10.0.0.2".parse().unwrap(),
        protocol: 1,
        selector: 8 << 8,
    };
    assert_eq!(
        (policy.tests[0].query, policy.tests[0].expect),
        (query, Expect::Allow)
    );
    assert_eq!(
        (
            policy.tests[1].query.protocol,
            policy.tests[1].query.selector
        ),
        (6, 80)
    );
    assert_eq!(policy.tests[1].origin.to_string(), "20.yaml:15");
}

#[test]
fn time_sessions_and_interfaces_become_a_model() {
    let text = r#"version: 1
segments:
  a: { members: [{cidr: 10.0.0.0/8}], interfaces: [eth0.20, "veth*"] }
rules:
  - { name: one, from: [a], to: [any], services: [ssh], expires: 2027-01-31T13:00:00+01:00, session: {max: 8h} }
  - { name: two, from: [a], to: [any], services: [ssh], session: {max: 1d, idle: 15m} }
  - { name: three, from: [a], to: [any], services: [any], action: deny, expires: 2027-01-31T12:00:00Z }
tests:
  - { from: 10.0.0.1, to: 10.0.0.2, service: ssh, expect: allow, at: 2027-01-31T12:00:00Z }
"#;
    let policy = parse(&[file("a.yaml", text)]).unwrap();
    let names: Vec<&str> = policy.segments[0]
        .interfaces
        .iter()
        .map(|p| p.as_str())
        .collect();
    assert_eq!(names, ["eth0.20", "veth*"]);
    let noon = Some(1_801_396_800);
    let bounds: Vec<_> = policy
        .rules
        .iter()
        .map(|r| (r.expires, r.session.map(|s| (s.max, s.idle))))
        .collect();
    assert_eq!(
        bounds,
        [
            (noon, Some((Some(28_800), None))),
            (None, Some((Some(86_400), Some(900)))),
            (noon, None)
        ]
    );
    assert_eq!(policy.tests[0].at, noon);
}

#[test]
fn words_are_text_whatever_yaml_makes_of_them_elsewhere() {
    let text = "version: 1\nsegments:\n  1e3: { members: [{cidr: 10.0.0.0/8}], mode: off }\n  0x10: { members: [{cidr: 10.0.0.0/8}] }\nrules:\n- {name: 007, from: [1e3], to: [0x10], services: [ssh]}\n";
    let policy = parse(&[file("a.yaml", text)]).unwrap();
    let names: Vec<&str> = policy.segments.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["1e3", "0x10"]);
    assert_eq!(policy.segments[0].mode, Mode::Off);
    assert_eq!(policy.rules.get(0).unwrap().name, "007");
}

#[test]
fn line_ends_of_any_kind_give_the_same_policy() {
    let unix = parse(&[file("a.yaml", HOSPITAL)]).unwrap();
    let windows = parse(&[file("a.yaml", HOSPITAL.replace('\n', "\r\n"))]).unwrap();
    assert_eq!(unix, windows);
}

/// Runs `work` and fails if it is not bounded in time (generously: debug builds, busy machines).
fn quickly<T>(work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let out = work();
    assert!(
        start.elapsed() < Duration::from_secs(20),
        "{:?}",
        start.elapsed()
    );
    out
}

#[test]
fn bounds() {
    assert_eq!(
        codes(&format!("version: 1 #{}", "x".repeat(4 << 20))),
        ["E0002"]
    );
    // Far beyond the depth the parser's own limit may come first.
    let deep = quickly(|| codes(&format!("version: {}", "[".repeat(100_000))));
    assert!(deep == ["E0001"] || deep == ["E0002"], "{deep:?}");
    let brackets = |n| format!("version: {}{}", "[".repeat(n), "]".repeat(n));
    assert_eq!(codes(&brackets(16)), ["E0002"]);
    assert_eq!(codes(&brackets(15)), ["E0110"]);
    let many = "a,".repeat(250_000);
    assert_eq!(quickly(|| codes(&format!("version: [{many}]"))), ["E0002"]);
    let bomb = "a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]\n";
    assert_eq!(codes(bomb), ["E0003"]);
}

#[test]
fn thousands_of_mistakes_are_cut_and_counted() {
    let names: Vec<String> = (0..30_000).map(|i| format!("nope{i}")).collect();
    let text = format!(
        "version: 1\nsegments: {{a: {{members: [{{cidr: 10.0.0.0/8}}]}}}}\ngroups: {{g: [{}]}}\n",
        names.join(", ")
    );
    let errors = quickly(|| parse(&[file("a.yaml", text)])).unwrap_err();
    assert_eq!(errors.len(), 200);
    assert_eq!(errors[199].notes, ["29800 more errors are not shown"]);
}

#[test]
fn groups_nested_thousands_deep() {
    let mut text =
        "version: 1\nsegments: {a: {members: [{cidr: 10.0.0.0/8}]}}\ngroups:\n".to_owned();
    for i in 0..20_000 {
        text.push_str(&format!("  g{i}: [g{}]\n", i + 1));
    }
    let policy = quickly(|| parse(&[file("a.yaml", format!("{text}  g20000: [a]\n"))])).unwrap();
    assert!(policy.groups.iter().all(|g| g.members == ids(&[0])));
    // The same closed to a circle is one error.
    assert_eq!(
        quickly(|| codes(&format!("{text}  g20000: [g0]\n"))),
        ["E0114"]
    );
}

#[test]
fn expansion_is_bounded() {
    let mut text = "version: 1\nsegments:\n".to_owned();
    for i in 0..4_000 {
        text.push_str(&format!("  s{i}: {{members: [{{cidr: 10.0.0.0/8}}]}}\n"));
    }
    let all: Vec<String> = (0..4_000).map(|i| format!("s{i}")).collect();
    text.push_str(&format!("groups: {{all: [{}]}}\nrules:\n", all.join(", ")));
    for i in 0..600 {
        text.push_str(&format!(
            "- {{name: r{i}, from: [all], to: [all], services: [ssh]}}\n"
        ));
    }
    assert_eq!(quickly(|| codes(&text)), ["E0002"]);
}

#[test]
fn a_long_service_in_many_rules_is_bounded() {
    let ports: Vec<String> = (0..60_000).map(|port| format!("tcp/{port}")).collect();
    let mut text = format!(
        "version: 1\nservices: {{all: [{}]}}\nsegments: {{a: {{members: [{{cidr: 10.0.0.0/8}}]}}}}\nrules:\n",
        ports.join(", ")
    );
    for i in 0..60 {
        text.push_str(&format!(
            "- {{name: r{i}, from: [a], to: [a], services: [all]}}\n"
        ));
    }
    assert_eq!(
        quickly(|| parse(&[file("a.yaml", text.clone())]))
            .unwrap()
            .rules
            .len(),
        60
    );
    for i in 60..3_000 {
        text.push_str(&format!(
            "- {{name: r{i}, from: [a], to: [a], services: [all]}}\n"
        ));
    }
    assert_eq!(quickly(|| codes(&text)), ["E0002"]);
}

#[test]
fn a_service_counts_what_it_repeats_once() {
    let text = "version: 1\nservices: {all: [tcp/22, ssh, tcp/22]}\nsegments: {a: {members: [{cidr: 10.0.0.0/8}]}}\nrules:\n- {name: r, from: [a], to: [a], services: [all, ssh]}\n";
    let policy = parse(&[file("a.yaml", text)]).unwrap();
    assert_eq!(policy.rules.get(0).unwrap().services.len(), 1);
}

/// Fragments that get a parser into trouble.
const FRAGMENTS: [&str; 40] = [
    "{",
    "}",
    "[",
    "]",
    ":",
    ": ",
    ",",
    "\n",
    "\r\n",
    "\t",
    "- ",
    "? ",
    "#",
    "'",
    "\"",
    "\\x1b",
    "&a ",
    "*a",
    "<<: ",
    "!!str ",
    "|\n",
    ">-\n",
    "---\n",
    "...\n",
    "%",
    "~",
    "null",
    "::",
    "/",
    "-",
    "10.0.0.0/8",
    "fd00::/64",
    "tcp/",
    "any",
    "é",
    "\u{feff}",
    "\u{202e}",
    "\u{0}",
    "  ",
    "9999999999999999999999",
];

#[derive(Clone, Debug)]
enum Edit {
    Insert(usize, usize),
    Delete(usize, usize),
    Copy(usize, usize, usize),
    Truncate(usize),
}

fn edits() -> impl Strategy<Value = Vec<Edit>> {
    let at = || 0..10_000usize;
    let edit = prop_oneof![
        5 => (at(), 0..FRAGMENTS.len()).prop_map(|(i, f)| Edit::Insert(i, f)),
        3 => (at(), 1..40usize).prop_map(|(i, n)| Edit::Delete(i, n)),
        2 => (at(), at(), 1..80usize).prop_map(|(i, j, n)| Edit::Copy(i, j, n)),
        1 => at().prop_map(Edit::Truncate),
    ];
    prop::collection::vec(edit, 1..8)
}

fn mutate(text: &str, edits: &[Edit]) -> String {
    let mut chars: Vec<char> = text.chars().collect();
    for edit in edits {
        let len = chars.len();
        let within = |i: usize| i % (len + 1);
        match *edit {
            Edit::Insert(i, f) => {
                let i = within(i);
                chars.splice(i..i, FRAGMENTS[f].chars());
            }
            Edit::Delete(i, n) => {
                let i = within(i);
                chars.drain(i..(i + n).min(len));
            }
            Edit::Copy(i, j, n) => {
                let (i, j) = (within(i), within(j));
                let piece: Vec<char> = chars[j..(j + n).min(len)].to_vec();
                chars.splice(i..i, piece);
            }
            Edit::Truncate(i) => chars.truncate(within(i)),
        }
    }
    chars.into_iter().collect()
}

/// A policy that uses every part of the language, short enough that mutations hit all of it.
const SMALL: &str = r#"version: 1
defaults: { mode: enforce, unsegmented: allow }
services: { lims: [tcp/9100-9110, ping] }
segments:
  a: { description: x, members: [{cidr: 10.0.0.0/8, except: [10.1.2.3, 10.2.0.0-10.2.0.9]}] }
  b:
    members:
      - range: "fd00::1-fd00::9"
    mode: observe
    protect: inbound
    interfaces: [eth0, "eth*"]
groups: { g: [a, b], h: [g] }
rules:
  - { name: r, from: [h], to: [any], services: [lims, proto/gre, icmp/8, icmp/3/4], expires: 2027-01-31T12:00:00Z, session: {max: 8h, idle: 15m} }
  - name: s
    from: [unsegmented]
    to: [a]
    services: [any]
    action: deny
tests:
  - { from: 10.0.0.1, to: 10.0.0.2, service: ssh, expect: allow, at: 2027-01-31T12:00:00Z }
"#;

fn positions_hold(text: &str, found: &[Diagnostic]) -> Result<(), TestCaseError> {
    let lines: Vec<&str> = text.lines().collect();
    for d in found {
        let line = usize::try_from(d.line).unwrap();
        prop_assert!(line >= 1 && line <= lines.len().max(1), "{d:?}");
        let width = lines.get(line - 1).map_or(0, |l| l.chars().count());
        let width = u32::try_from(width).unwrap();
        prop_assert!(d.column >= 1 && d.column <= width + 1, "{d:?}");
        prop_assert!(
            d.end_column > d.column && d.end_column <= width.max(d.column) + 1,
            "{d:?}"
        );
        prop_assert!(!d.message.is_empty() && !d.message.contains('\n'), "{d:?}");
        let rendered = d.render(&[file("a.yaml", text)], false);
        let hostile = ['\u{202e}', '\u{1b}'];
        prop_assert!(!rendered.contains(hostile));
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn mutated_text_is_parsed_or_refused_at_a_place(
        base in prop::sample::select(vec![SMALL, SMALL, HOSPITAL]),
        edits in edits(),
    ) {
        let text = mutate(base, &edits);
        match parse_with_warnings(&[file("a.yaml", text.clone())]) {
            Ok(outcome) => positions_hold(&text, &outcome.warnings)?,
            Err(errors) => {
                prop_assert!(!errors.is_empty());
                prop_assert!(errors.iter().all(|d| d.severity == Severity::Error));
                positions_hold(&text, &errors)?;
            }
        }
    }

    #[test]
    fn any_text_is_parsed_or_refused_at_a_place(text in "[ -~\n\té{}\\[\\]:,#&*!|>'\"%@`?-]{0,120}") {
        if let Err(errors) = parse(&[file("a.yaml", text.clone())]) {
            positions_hold(&text, &errors)?;
        }
    }
}
