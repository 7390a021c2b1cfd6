//! Guarantee 1: reference(model) = decide(image) = the loaded bytecode, on random policies and
//! random flows, IPv4 and IPv6.
#![allow(missing_docs, reason = "a test")]

use std::{
    collections::HashSet,
    net::IpAddr,
    sync::atomic::{AtomicUsize, Ordering},
};

use enforcer::{
    dataplane::Dataplane as _,
    policy::{
        arbitrary,
        model::{Environment, FlowQuery, Policy, is_multicast},
        reference,
    },
};
use enforcer_common::{
    decide::{Query, decide},
    image::SIZE_CLASSES,
    verdict::{Hook, Outcome, Reason},
};
use enforcer_tests::{
    frame,
    kernel::{self, Programs},
    scale,
};
use proptest::{
    prelude::*,
    test_runner::{Config, FileFailurePersistence, TestRunner},
};

const POLICIES: usize = 220;
/// Where every instruction is emulated.
const FEWER: usize = 44;
const QUERIES: usize = 60;
/// Pairs compared for each policy, at least.
const AT_LEAST: usize = 46;

fn outcome(of: reference::Outcome) -> Outcome {
    match of {
        reference::Outcome::Allowed => Outcome::Allowed,
        reference::Outcome::Denied => Outcome::Denied,
        reference::Outcome::WouldDeny => Outcome::WouldDeny,
        reference::Outcome::Off => Outcome::Off,
    }
}

fn reason(of: reference::Reason) -> Reason {
    match of {
        reference::Reason::RuleAllow => Reason::RuleAllow,
        reference::Reason::RuleDeny => Reason::RuleDeny,
        reference::Reason::DefaultDeny => Reason::DefaultDeny,
        reference::Reason::Unsegmented => Reason::Unsegmented,
    }
}

/// What the first packet of a flow is, as a frame, and what the hook says of it apart from rules.
enum Frame {
    /// Judged by rules.
    Judged(Vec<u8>),
    /// An ICMP error about nothing: a denial of form.
    Unrelated(Vec<u8>),
    /// Essential, or a header that the parser walks on from: other tests' business.
    Skip,
}

fn first_packet(q: &FlowQuery, number: u16) -> Frame {
    let v6 = q.src.is_ipv6();
    let [kind, code] = q.selector.to_be_bytes();
    let payload = match (q.protocol, v6) {
        (6, _) => frame::tcp(number, q.selector, frame::SYN),
        (17, _) => {
            let mut p = frame::udp(number, q.selector);
            p.extend([0; 8]);
            p
        }
        (132 | 136, _) => {
            let mut p = frame::udp(number, q.selector);
            p.extend([0; 8]);
            p
        }
        (1, false) | (58, true) => frame::icmp(kind, code, number),
        (2, false) if is_multicast(q.dst) => return Frame::Skip,
        (0 | 43 | 44 | 60, true) => return Frame::Skip,
        _ => vec![0; 24],
    };
    let bytes = frame::frame(q.src, q.dst, q.protocol, &payload);
    match (q.protocol, v6, kind) {
        (1, false, 3 | 4 | 11 | 12) | (58, true, 1..=4) => Frame::Unrelated(bytes),
        _ => Frame::Judged(bytes),
    }
}

/// Whether each query has a flow of its own; without ports there is one per address pair.
fn has_ports(query: &FlowQuery) -> bool {
    match query.protocol {
        6 | 17 | 132 | 136 => true,
        1 => query.src.is_ipv4(),
        58 => query.src.is_ipv6(),
        _ => false,
    }
}

/// A policy on a host, packets, and when they come.
type Case = (Policy, Environment, Vec<FlowQuery>, u64);

fn case() -> impl Strategy<Value = Case> {
    (
        arbitrary::policy(),
        arbitrary::environment(),
        arbitrary::time(),
    )
        .prop_flat_map(|(policy, env, unix)| {
            let queries = proptest::collection::vec(arbitrary::query(&policy), QUERIES);
            (Just(policy), Just(env), queries, Just(unix))
        })
}

/// What speaks against a packet whatever the rules say.
fn screened(
    policy: &Policy,
    env: &Environment,
    query: &FlowQuery,
    hook: Hook,
    interface: &str,
) -> Option<Reason> {
    let unspecified = query.src.is_unspecified() && !is_multicast(query.dst);
    let martian = query.src.is_loopback()
        || query.dst.is_loopback()
        || query.dst.is_unspecified()
        || unspecified
        || is_multicast(query.src);
    if martian {
        return Some(Reason::Martian);
    }
    let link_local = match query.src {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    let own = env.host_addresses.contains(&query.src) && !link_local;
    let elsewhere = reference::spoofed(policy, env, query.src, interface);
    (hook == Hook::TcIngress && (own || elsewhere)).then_some(Reason::Spoofed)
}

#[test]
fn reference_image_and_bytecode_agree() {
    let policies = scale::rounds(POLICIES, FEWER);
    let mut programs = Programs::load(SIZE_CLASSES[0] as usize);
    let programs = std::cell::RefCell::new(&mut programs);
    let compared = AtomicUsize::new(0);
    let mut runner = TestRunner::new(Config {
        cases: policies as u32,
        // Each step of shrinking is a policy swap.
        max_shrink_iters: 400,
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/proptest-regressions/three_way.txt"
        )))),
        ..Config::default()
    });
    let result = runner.run(&case(), |(policy, env, queries, unix)| {
        let mut programs = programs.borrow_mut();
        let image = kernel::compile(&policy, &env);
        // What an earlier policy admitted would be revoked, not judged as new.
        programs.forget_flows();
        programs.apply(&image);
        programs.drain();
        programs.set_unix(unix);
        let interface = env.interfaces.first_key_value();
        let (slot, interface) = interface.map_or((0, "none"), |(s, name)| (*s, name.as_str()));
        programs.set_interface(1, 0, slot);
        let mut asked = HashSet::new();
        let mut seen: HashSet<(IpAddr, IpAddr, u8)> = HashSet::new();
        for (number, query) in (20_000u16..).zip(&queries) {
            let want = reference::judge(&policy, &env, query, unix);
            let host = decide(
                image.words(),
                &Query {
                    source: query.src.into(),
                    destination: query.dst.into(),
                    protocol: query.protocol,
                    selector: query.selector,
                },
                unix,
            );
            prop_assert_eq!(host.outcome, outcome(want.outcome), "decide, {:?}", query);
            prop_assert_eq!(host.reason, reason(want.reason), "decide, {:?}", query);
            let rule = want.rule.map_or(u32::MAX, |r| r.0);
            let guard = want.guard.map_or(u32::MAX, |g| g.0);
            prop_assert_eq!(host.rule, rule, "decide, {:?}", query);
            prop_assert_eq!(host.segment, guard, "decide, {:?}", query);
            if !asked.insert(*query) {
                continue; // repeats of a denied flow are counted, not recorded
            }
            let (there, back) = (
                (query.src, query.dst, query.protocol),
                (query.dst, query.src, query.protocol),
            );
            if !has_ports(query) && (seen.contains(&back) || !seen.insert(there)) {
                continue;
            }
            // The host's own address comes in nowhere.
            let hook = if number % 2 == 0 && !env.host_addresses.contains(&query.src) {
                Hook::TcIngress
            } else {
                Hook::TcEgress
            };
            let (bytes, want_outcome, want_reason, rule, guard) = match first_packet(query, number)
            {
                Frame::Judged(b) => (b, host.outcome, host.reason, rule, guard),
                Frame::Unrelated(b) => {
                    let pair = Some((query.src, query.dst));
                    let (o, g) = reference::judge_form(&policy, &env, pair);
                    let guard = g.map_or(u32::MAX, |g| g.0);
                    (b, outcome(o), Reason::IcmpUnrelated, u32::MAX, guard)
                }
                Frame::Skip => continue,
            };
            let screened = screened(&policy, &env, query, hook, interface);
            let (want_outcome, want_reason, rule, guard) = match screened {
                None => (want_outcome, want_reason, rule, guard),
                Some(reason) => {
                    let pair = Some((query.src, query.dst));
                    let (o, g) = reference::judge_form(&policy, &env, pair);
                    let o = outcome(o);
                    // What is only observed takes nothing away from rules that deny.
                    let rules = want_reason != Reason::IcmpUnrelated;
                    if rules && o.passes() && !want_outcome.passes() {
                        (want_outcome, want_reason, rule, guard)
                    } else {
                        (o, reason, u32::MAX, g.map_or(u32::MAX, |g| g.0))
                    }
                }
            };
            // The long way judges what shorter ones settle, too.
            programs.short_ways(1, (number % 3 != 0).then_some(slot));
            let got = programs.judge(hook, &bytes);
            prop_assert_eq!(got.outcome, want_outcome, "bytecode, {:?}", query);
            prop_assert_eq!(got.reason, want_reason, "bytecode, {:?}", query);
            let events = programs.drain();
            if matches!(got.outcome, Outcome::Denied | Outcome::WouldDeny) {
                let event = events.last();
                prop_assert!(event.is_some(), "a denial without a record, {:?}", query);
                if let Some(event) = event {
                    prop_assert_eq!(event.rule, rule);
                    prop_assert_eq!(event.segment, guard);
                    prop_assert_eq!(event.outcome(), want_outcome);
                    prop_assert_eq!(event.reason(), want_reason);
                    prop_assert_eq!(event.generation, image.generation());
                }
            } else {
                prop_assert!(events.is_empty(), "a record of a pass, {:?}", query);
            }
            compared.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    let compared = compared.into_inner();
    assert!(
        compared >= policies * AT_LEAST,
        "only {compared} pairs were compared"
    );
    println!("{compared} pairs compared");
}

/// What two policies say of packets, and how often: hook, one policy's outcome and reason, the
/// other's.
type Said = std::collections::BTreeMap<(u32, [(u32, u32); 2]), u64>;

#[test]
fn a_shadow_says_what_its_policy_would_say_alone() {
    let policies = scale::rounds(60, 12);
    let load = || std::cell::RefCell::new(Programs::load(SIZE_CLASSES[0] as usize));
    let (one, other, both) = (load(), load(), load());
    let (asked, differing) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let mut runner = TestRunner::new(Config {
        cases: policies as u32,
        max_shrink_iters: 200,
        failure_persistence: None,
        ..Config::default()
    });
    let cases = (case(), arbitrary::policy()).prop_flat_map(|(case, second)| {
        let more = proptest::collection::vec(arbitrary::query(&second), QUERIES);
        (Just(case), Just(second), more)
    });
    let result = runner.run(&cases, |((first, env, queries, unix), second, more)| {
        let mut all = [one.borrow_mut(), other.borrow_mut(), both.borrow_mut()];
        let images = [&first, &second].map(|policy| kernel::compile(policy, &env));
        let (slot, _) = env
            .interfaces
            .first_key_value()
            .unwrap_or((&0, &String::new()));
        for (programs, image) in all.iter_mut().zip([&images[0], &images[1], &images[0]]) {
            programs.forget_flows();
            programs.dataplane.set_shadow(None, false).unwrap();
            programs.apply(image);
            programs.set_unix(unix);
            programs.set_interface(1, 0, *slot);
            programs.settle();
        }
        // Of a generation that never judges.
        let shadow = images[1]
            .clone()
            .with_generation(images[1].generation() | 1 << 31);
        all[2].dataplane.set_shadow(Some(&shadow), true).unwrap();
        let mut expected = Said::new();
        let mut seen: HashSet<(IpAddr, IpAddr, u8)> = HashSet::new();
        for (number, query) in (20_000u16..).zip(queries.iter().chain(&more)) {
            let (there, back) = (
                (query.src, query.dst, query.protocol),
                (query.dst, query.src, query.protocol),
            );
            if !has_ports(query) && (seen.contains(&back) || !seen.insert(there)) {
                continue;
            }
            let hook = if number % 2 == 0 {
                Hook::TcIngress
            } else {
                Hook::TcEgress
            };
            let bytes = match first_packet(query, number) {
                Frame::Judged(bytes) | Frame::Unrelated(bytes) => bytes,
                Frame::Skip => continue,
            };
            let got = [0, 1, 2].map(|which: usize| all[which].judge(hook, &bytes));
            prop_assert_eq!(got[2], got[0], "a shadow was obeyed, {:?}", query);
            asked.fetch_add(1, Ordering::Relaxed);
            let said = [got[0], got[1]].map(|v| (v.outcome as u32, v.reason as u32));
            if enforcer_common::shadow::differ(got[0].outcome, got[1].outcome) {
                *expected.entry((hook as u32, said)).or_default() += 1;
            }
        }
        differing.fetch_add(expected.values().sum::<u64>() as usize, Ordering::Relaxed);
        let mut counted = Said::new();
        for (key, count) in all[2].dataplane.differences().unwrap() {
            if key == enforcer_common::shadow::DifferenceKey::REST {
                prop_assert_eq!(count.packets, 0);
                continue;
            }
            let generations = (key.live.generation, key.shadow.generation);
            prop_assert_eq!(generations, (images[0].generation(), shadow.generation()));
            let said = [key.live, key.shadow].map(|s| (s.outcome() as u32, s.reason() as u32));
            *counted.entry((key.hook, said)).or_default() += count.packets;
            prop_assert!(
                count.first.case(key.hook).is_some() && count.last.case(key.hook).is_some()
            );
        }
        prop_assert_eq!(counted, expected);
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    let (asked, differing) = (asked.into_inner(), differing.into_inner());
    assert!(
        asked >= policies * AT_LEAST && differing * 20 >= asked,
        "{differing} of {asked} packets differ"
    );
    println!("{differing} of {asked} packets differ");
}
