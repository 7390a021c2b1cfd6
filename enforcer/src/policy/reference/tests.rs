//! The decision procedure on hand-made policies, row by row.

use std::sync::Arc;

use super::*;
use crate::policy::model::{
    AddrRange, Defaults, Member, Origin, Protect, Rule, Rules, Segment, Transport,
};

const A: u32 = 0; // 10.1.0.0/24 and fd00:1::/64
const B: u32 = 1; // 10.2.0.0/24
const C: u32 = 2; // 10.2.0.128-10.2.0.255 except .200: inside b

fn origin(line: u32) -> Origin {
    Origin {
        file: Arc::from("p.yaml"),
        line,
        column: 1,
    }
}

fn member(first: &str, last: &str, except: &[&str]) -> Member {
    let range = |a: &str, b: &str| match (a.parse().unwrap(), b.parse().unwrap()) {
        (IpAddr::V4(first), IpAddr::V4(last)) => AddrRange::V4 { first, last },
        (IpAddr::V6(first), IpAddr::V6(last)) => AddrRange::V6 { first, last },
        _ => unreachable!(),
    };
    Member {
        range: range(first, last),
        except: except.iter().map(|e| range(e, e)).collect(),
        origin: origin(1),
    }
}

fn segment(name: &str, mode: Mode, protect: Protect, members: Vec<Member>) -> Segment {
    Segment {
        name: name.to_owned(),
        description: String::new(),
        members: members.into(),
        mode,
        protect,
        interfaces: vec![],
        origin: origin(2),
    }
}

/// Three segments, everything enforced and protected both ways, no rules.
fn base() -> Policy {
    let both = Protect::Both;
    Policy {
        defaults: Defaults {
            mode: Mode::Observe,
            unsegmented: Unsegmented::Allow,
        },
        segments: vec![
            segment(
                "a",
                Mode::Enforce,
                both,
                vec![
                    member("10.1.0.0", "10.1.0.255", &[]),
                    member("fd00:1::", "fd00:1::ffff:ffff:ffff:ffff", &[]),
                ],
            ),
            segment(
                "b",
                Mode::Enforce,
                both,
                vec![member("10.2.0.0", "10.2.0.255", &[])],
            ),
            segment(
                "c",
                Mode::Enforce,
                both,
                vec![member("10.2.0.128", "10.2.0.255", &["10.2.0.200"])],
            ),
        ],
        groups: vec![],
        rules: Rules::default(),
        tests: vec![],
    }
}

fn seg(ids: &[u32]) -> Endpoints {
    Endpoints {
        segments: ids.iter().map(|i| SegmentId(*i)).collect(),
        ..Endpoints::default()
    }
}

fn any() -> Endpoints {
    Endpoints {
        any: true,
        ..Endpoints::default()
    }
}

fn rule(action: Action, from: Endpoints, to: Endpoints, service: Service) -> Rule {
    Rule {
        name: "r".to_owned(),
        from,
        to,
        services: vec![service],
        action,
        expires: None,
        session: None,
        origin: origin(9),
    }
}

fn tcp(first: u16, last: u16) -> Service {
    Service::Ports {
        transport: Transport::Tcp,
        first,
        last,
    }
}

fn ask(src: &str, dst: &str, protocol: u8, selector: u16) -> FlowQuery {
    FlowQuery {
        src: src.parse().unwrap(),
        dst: dst.parse().unwrap(),
        protocol,
        selector,
    }
}

type Row = (Outcome, Reason, Option<u32>, Option<u32>);

fn check(policy: &Policy, query: FlowQuery, expected: Row) {
    let env = Environment {
        host_addresses: ["192.0.2.1".parse().unwrap()].into(),
        ..Environment::default()
    };
    let j = judge(policy, &env, &query, 0);
    let got = (
        j.outcome,
        j.reason,
        j.rule.map(|r| r.0),
        j.guard.map(|g| g.0),
    );
    assert_eq!(got, expected, "{query:?}");
}

#[test]
fn default_deny_names_the_strongest_guard_and_the_destination_on_ties() {
    use Outcome::*;
    use Reason::DefaultDeny;
    let a_to_b = ask("10.1.0.1", "10.2.0.1", 6, 80);
    let a_to_c = ask("10.1.0.1", "10.2.0.130", 6, 80);
    let mut p = base();
    check(&p, a_to_b, (Denied, DefaultDeny, None, Some(B)));
    check(&p, a_to_c, (Denied, DefaultDeny, None, Some(B)));
    check(
        &p,
        ask("10.1.0.1", "8.8.8.8", 6, 80),
        (Denied, DefaultDeny, None, Some(A)),
    );
    check(
        &p,
        ask("8.8.8.8", "10.1.0.1", 6, 80),
        (Denied, DefaultDeny, None, Some(A)),
    );
    // Members of one segment need a rule as well.
    check(
        &p,
        ask("10.1.0.1", "10.1.0.2", 6, 80),
        (Denied, DefaultDeny, None, Some(A)),
    );

    p.segments[1].mode = Mode::Observe;
    check(&p, a_to_b, (Denied, DefaultDeny, None, Some(A)));
    check(&p, a_to_c, (Denied, DefaultDeny, None, Some(C)));
    p.segments[0].mode = Mode::Observe;
    check(&p, a_to_b, (WouldDeny, DefaultDeny, None, Some(B)));
    p.segments[0].mode = Mode::Off;
    p.segments[1].mode = Mode::Off;
    check(&p, a_to_b, (Off, DefaultDeny, None, Some(B)));
}

#[test]
fn protect_chooses_the_direction() {
    use Outcome::*;
    use Reason::*;
    let mut p = base();
    p.segments[0].protect = Protect::Inbound;
    check(
        &p,
        ask("10.1.0.1", "8.8.8.8", 6, 80),
        (Allowed, Unsegmented, None, None),
    );
    check(
        &p,
        ask("8.8.8.8", "10.1.0.1", 6, 80),
        (Denied, DefaultDeny, None, Some(A)),
    );
    p.segments[0].protect = Protect::Outbound;
    check(
        &p,
        ask("10.1.0.1", "8.8.8.8", 6, 80),
        (Denied, DefaultDeny, None, Some(A)),
    );
    check(
        &p,
        ask("8.8.8.8", "10.1.0.1", 6, 80),
        (Allowed, Unsegmented, None, None),
    );
}

#[test]
fn unsegmented_flows_follow_the_defaults() {
    use Outcome::*;
    use Reason::Unsegmented as Free;
    let mut p = base();
    let q = ask("8.8.8.8", "9.9.9.9", 6, 80);
    check(&p, q, (Allowed, Free, None, None));
    p.defaults.unsegmented = Unsegmented::Deny;
    check(&p, q, (WouldDeny, Free, None, None));
    p.defaults.mode = Mode::Enforce;
    check(&p, q, (Denied, Free, None, None));
    p.defaults.mode = Mode::Off;
    check(&p, q, (Off, Free, None, None));
    // The exception of c is still in b; one outside of every segment is unsegmented.
    check(
        &p,
        ask("8.8.8.8", "10.2.0.200", 6, 80),
        (Denied, Reason::DefaultDeny, None, Some(B)),
    );
}

#[test]
fn the_first_allow_speaks_and_a_deny_goes_before_it() {
    use Action::*;
    use Outcome::*;
    use Reason::*;
    let mut p = base();
    let q = ask("10.1.0.1", "10.2.0.1", 6, 80);
    p.rules = vec![
        rule(Allow, seg(&[B]), seg(&[A]), Service::Any), // the other direction
        rule(Allow, seg(&[A]), seg(&[B]), tcp(80, 80)),
        rule(Allow, any(), any(), Service::Any),
    ]
    .into();
    check(&p, q, (Allowed, RuleAllow, Some(1), None));
    check(
        &p,
        ask("10.1.0.1", "10.2.0.1", 6, 81),
        (Allowed, RuleAllow, Some(2), None),
    );
    p.rules
        .edit(|rules| rules.push(rule(Deny, any(), seg(&[B]), tcp(1, 80))));
    check(&p, q, (Denied, RuleDeny, Some(3), None));
    // A deny in observe is a judgement too: it does not fall back to the allow.
    p.segments[1].mode = Mode::Observe;
    check(&p, q, (WouldDeny, RuleDeny, Some(3), None));
}

#[test]
fn what_has_expired_is_not_there_and_gives_way_to_what_has_no_limit() {
    use Action::*;
    use Outcome::*;
    use Reason::*;
    let bounded = Some(crate::policy::model::Session {
        max: Some(60),
        idle: None,
    });
    let until = |expires, mut rule: Rule| {
        rule.expires = Some(expires);
        rule
    };
    let mut p = base();
    let allow = || rule(Allow, seg(&[A]), seg(&[B]), tcp(80, 80));
    p.rules = vec![
        until(100, allow()),
        until(200, allow()),
        Rule {
            session: bounded,
            ..allow()
        },
        until(50, rule(Deny, any(), any(), tcp(80, 80))),
        Rule {
            session: bounded,
            ..until(300, allow())
        },
        allow(),
    ]
    .into();
    let env = Environment::default();
    let at = |p: &Policy, unix| {
        let j = judge(p, &env, &ask("10.1.0.1", "10.2.0.1", 6, 80), unix);
        (j.outcome, j.reason, j.rule.map(|r| r.0), j.session)
    };
    // A deny that matches through no segment has the mode of the defaults.
    assert_eq!(at(&p, 49), (WouldDeny, RuleDeny, Some(3), false));
    // Neither limit, then `session` alone, then `expires` in file order.
    assert_eq!(at(&p, 50), (Allowed, RuleAllow, Some(5), false));
    p.rules.edit(Vec::pop);
    assert_eq!(at(&p, 50), (Allowed, RuleAllow, Some(2), true));
    p.rules.edit(|rules| rules[2].services = vec![tcp(1, 1)]);
    assert_eq!(at(&p, 50), (Allowed, RuleAllow, Some(0), false));
    assert_eq!(at(&p, 99), (Allowed, RuleAllow, Some(0), false));
    assert_eq!(at(&p, 100), (Allowed, RuleAllow, Some(1), false));
    assert_eq!(at(&p, 200), (Allowed, RuleAllow, Some(4), true));
    assert_eq!(at(&p, 300), (Denied, DefaultDeny, None, false));
    assert_eq!(at(&p, u64::MAX), (Denied, DefaultDeny, None, false));
}

#[test]
fn a_source_comes_in_where_every_segment_of_it_says() {
    let mut p = base();
    let patterns = |list: &[&str]| list.iter().map(|t| t.parse().unwrap()).collect::<Vec<_>>();
    p.segments[1].interfaces = patterns(&["eth0", "veth*"]);
    p.segments[2].interfaces = patterns(&["veth1", "eth1"]);
    let names = ["eth0", "eth1", "veth1", "veth2"];
    let env = Environment {
        interfaces: (1..).zip(names.map(str::to_owned)).collect(),
        ..Environment::default()
    };
    let free = |ip: &str| {
        let ip = ip.parse().unwrap();
        let names = names.iter().chain(&["veth3"]);
        let free: Vec<&str> = names
            .copied()
            .filter(|n| !spoofed(&p, &env, ip, n))
            .collect();
        free
    };
    assert_eq!(free("10.2.0.1"), ["eth0", "veth1", "veth2"]);
    assert_eq!(free("10.2.0.130"), ["veth1"]);
    // Cut out of c, still in b.
    assert_eq!(free("10.2.0.200"), ["eth0", "veth1", "veth2"]);
    // No segment with `interfaces`: anywhere, also where the enforcer is not.
    assert_eq!(free("10.1.0.1").len(), 5);
    assert_eq!(free("8.8.8.8").len(), 5);
}

#[test]
fn a_deny_is_as_strong_as_the_segments_it_matched_through() {
    use Action::Deny;
    use Outcome::*;
    use Reason::RuleDeny;
    let mut p = base();
    p.segments[1].mode = Mode::Off;
    let q = ask("10.1.0.1", "10.2.0.1", 6, 80);
    // Through b only, although a (enforce) is the source.
    p.rules = vec![rule(Deny, any(), seg(&[B]), Service::Any)].into();
    check(&p, q, (Off, RuleDeny, Some(0), None));
    // Through nothing: defaults.mode.
    p.rules = vec![rule(Deny, any(), any(), Service::Any)].into();
    check(&p, q, (WouldDeny, RuleDeny, Some(0), None));
    // The rule also matches by `any`, yet b is named: it speaks for the flow.
    let both = Endpoints {
        any: true,
        ..seg(&[B])
    };
    p.rules = vec![rule(Deny, any(), both, Service::Any)].into();
    check(&p, q, (Off, RuleDeny, Some(0), None));
    // Of several denies the strongest, whatever the order; of equals the first.
    p.rules = vec![
        rule(Deny, any(), seg(&[B]), Service::Any),
        rule(Deny, seg(&[A]), any(), Service::Any),
        rule(Deny, seg(&[A]), seg(&[B]), Service::Any),
    ]
    .into();
    check(&p, q, (Denied, RuleDeny, Some(1), None));
    // Naming c does not lend its mode to a flow that is not in c.
    p.rules = vec![rule(Deny, any(), seg(&[B, C]), Service::Any)].into();
    check(&p, q, (Off, RuleDeny, Some(0), None));
    check(
        &p,
        ask("10.1.0.1", "10.2.0.130", 6, 80),
        (Denied, RuleDeny, Some(0), None),
    );
}

#[test]
fn builtins() {
    use Action::Allow;
    use Outcome::*;
    use Reason::*;
    let mut p = base();
    let unsegmented = Endpoints {
        unsegmented: true,
        ..Endpoints::default()
    };
    let host = Endpoints {
        host: true,
        ..Endpoints::default()
    };
    let multicast = Endpoints {
        multicast: true,
        ..Endpoints::default()
    };
    let allowed = |i| (Allowed, RuleAllow, Some(i), None);
    let default_a = (Denied, DefaultDeny, None, Some(A));
    p.rules = vec![
        rule(Allow, seg(&[A]), multicast, tcp(1, 1)),
        rule(Allow, seg(&[A]), unsegmented, tcp(2, 2)),
        rule(Allow, seg(&[A]), host, tcp(3, 3)),
    ]
    .into();
    check(&p, ask("10.1.0.1", "224.0.0.5", 6, 1), allowed(0));
    check(&p, ask("10.1.0.1", "255.255.255.255", 6, 1), allowed(0));
    check(&p, ask("fd00:1::1", "ff02::1", 6, 1), allowed(0));
    check(&p, ask("10.1.0.1", "10.9.0.1", 6, 1), default_a);
    check(&p, ask("10.1.0.1", "10.9.0.1", 6, 2), allowed(1));
    check(&p, ask("10.1.0.1", "224.0.0.5", 6, 2), allowed(1));
    check(
        &p,
        ask("10.1.0.1", "10.2.0.1", 6, 2),
        (Denied, DefaultDeny, None, Some(B)),
    );
    check(&p, ask("10.1.0.1", "192.0.2.1", 6, 3), allowed(2));
    check(&p, ask("10.1.0.1", "192.0.2.2", 6, 3), default_a);
    // A segment that is off still makes its addresses segmented.
    p.segments[1].mode = Mode::Off;
    check(&p, ask("10.1.0.1", "10.2.0.1", 6, 2), default_a);
}

#[test]
fn services() {
    use Outcome::*;
    use Reason::*;
    let (v4, v6) = (("10.1.0.1", "8.8.8.8"), ("fd00:1::1", "fd00:9::1"));
    // Service, family, protocol, selector, whether an allow matches, whether a deny does.
    let rows = [
        (tcp(80, 90), v4, 6, 79, false, false),
        (tcp(80, 90), v4, 6, 80, true, true),
        (tcp(80, 90), v6, 6, 90, true, true),
        (tcp(80, 90), v4, 6, 91, false, false),
        (tcp(80, 90), v4, 17, 85, false, false),
        (tcp(80, 90), v4, 132, 85, false, false),
        (
            Service::Icmp {
                kind: 8,
                code: None,
            },
            v4,
            1,
            8 << 8 | 3,
            true,
            true,
        ),
        (
            Service::Icmp {
                kind: 8,
                code: None,
            },
            v4,
            1,
            8,
            false,
            false,
        ),
        (
            Service::Icmp {
                kind: 8,
                code: None,
            },
            v6,
            1,
            8 << 8,
            false,
            false,
        ),
        (
            Service::Icmp {
                kind: 128,
                code: None,
            },
            v6,
            58,
            128 << 8,
            false,
            false,
        ),
        (
            Service::Icmpv6 {
                kind: 128,
                code: None,
            },
            v6,
            58,
            128 << 8,
            true,
            true,
        ),
        (
            Service::Icmpv6 {
                kind: 128,
                code: None,
            },
            v4,
            58,
            128 << 8,
            false,
            false,
        ),
        (
            Service::Icmp {
                kind: 3,
                code: Some(4),
            },
            v4,
            1,
            3 << 8 | 4,
            true,
            true,
        ),
        (
            Service::Icmp {
                kind: 3,
                code: Some(4),
            },
            v4,
            1,
            3 << 8 | 3,
            false,
            false,
        ),
        (
            Service::Icmpv6 {
                kind: 1,
                code: Some(0),
            },
            v6,
            58,
            1 << 8,
            true,
            true,
        ),
        (
            Service::Icmpv6 {
                kind: 1,
                code: Some(0),
            },
            v6,
            58,
            1 << 8 | 1,
            false,
            false,
        ),
        (Service::Protocol(47), v4, 47, 0, true, true),
        (Service::Protocol(47), v6, 47, 0, true, true),
        (Service::Protocol(47), v4, 50, 0, false, false),
        (Service::Any, v4, 6, 1, true, true),
        (Service::Any, v6, 1, 8 << 8, true, true),
        (Service::Any, v4, 58, 128 << 8, true, true),
        (Service::Any, v4, 89, 0, true, true),
        (Service::Any, v4, 47, 0, false, true),
        (Service::Any, v6, 41, 0, false, true),
        (Service::Any, v4, 137, 0, false, true),
    ];
    for (service, (src, dst), protocol, selector, allow, deny) in rows {
        let q = ask(src, dst, protocol, selector);
        let silent = (Denied, DefaultDeny, None, Some(A));
        let mut p = base();
        p.rules = vec![rule(Action::Allow, any(), any(), service)].into();
        check(
            &p,
            q,
            if allow {
                (Allowed, RuleAllow, Some(0), None)
            } else {
                silent
            },
        );
        p.rules = vec![rule(Action::Deny, any(), any(), service)].into();
        check(
            &p,
            q,
            if deny {
                (WouldDeny, RuleDeny, Some(0), None)
            } else {
                silent
            },
        );
    }
}

#[test]
fn denials_of_form_are_as_strong_as_the_guards() {
    let mut p = base();
    let env = Environment::default();
    let ask = |p: &Policy, a: &str, b: &str| {
        judge_form(p, &env, Some((a.parse().unwrap(), b.parse().unwrap())))
    };
    p.segments[1].mode = Mode::Observe;
    assert_eq!(
        ask(&p, "10.1.0.1", "10.2.0.1"),
        (Outcome::Denied, Some(SegmentId(A)))
    );
    assert_eq!(
        ask(&p, "8.8.8.8", "10.2.0.1"),
        (Outcome::WouldDeny, Some(SegmentId(B)))
    );
    assert_eq!(ask(&p, "8.8.8.8", "9.9.9.9"), (Outcome::Off, None));
    p.defaults.unsegmented = Unsegmented::Deny;
    assert_eq!(ask(&p, "8.8.8.8", "9.9.9.9"), (Outcome::WouldDeny, None));
    p.segments[1].protect = Protect::Outbound;
    assert_eq!(ask(&p, "8.8.8.8", "10.2.0.1"), (Outcome::WouldDeny, None));
    assert_eq!(judge_form(&p, &env, None), (Outcome::WouldDeny, None));
    p.defaults.mode = Mode::Enforce;
    assert_eq!(judge_form(&p, &env, None), (Outcome::Denied, None));
}

#[test]
fn a_failing_test_says_what_happened_and_where() {
    let mut p = base();
    let test = |expect| PolicyTest {
        query: ask("10.1.0.1", "10.2.0.130", 6, 80),
        service: "tcp/80".to_owned(),
        expect,
        at: None,
        origin: origin(20),
    };
    p.tests = vec![test(Expect::Deny), test(Expect::Allow)];
    let env = Environment::default();
    let failed = run_tests(&p, &env);
    assert_eq!(failed.len(), 1);
    assert_eq!((failed[0].code, failed[0].line), ("E0401", 20));
    assert_eq!(
        failed[0].message,
        "the test expects allow, but 10.1.0.1 -> 10.2.0.130 tcp/80 is denied"
    );
    assert_eq!(
        failed[0].notes,
        [
            "no rule allows it, and segment `b` is protected (p.yaml:2)",
            "10.1.0.1 is in a; 10.2.0.130 is in b, c"
        ]
    );
    p.rules = vec![rule(Action::Allow, any(), any(), Service::Any)].into();
    let failed = run_tests(&p, &env);
    assert_eq!(failed[0].notes[0], "allowed by rule `r` (p.yaml:9)");
    assert_eq!(failed.len(), 1);
    // Observe is still a judgement of deny.
    p.rules = Rules::default();
    for s in &mut p.segments {
        s.mode = Mode::Observe;
    }
    assert_eq!(run_tests(&p, &env).len(), 1);
}
