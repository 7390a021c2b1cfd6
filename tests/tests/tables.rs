//! Policies and what the first packet of a flow gets under each: by the reference interpreter, by
//! parser and judgement on the host, and by the loaded bytecode.
//!
//! A line is `source > destination service = outcome reason [rule or guarding segment]`; the
//! service is `tcp PORT`, `udp PORT`, `sctp PORT`, `icmp TYPE` (of the addresses' family) or
//! `proto NUMBER`.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "tests and their helpers"
)]

mod cases;

use std::net::IpAddr;

use cases::CASES;
use enforcer::policy::{
    model::{Environment, FlowQuery, Policy},
    reference,
};
use enforcer_common::{
    image::{EMPTY, SIZE_CLASSES},
    verdict::{Hook, Outcome},
};
use enforcer_tests::{
    frame::{self, SYN},
    host::{self, Host},
    kernel::{self, Programs, pin},
};

struct Line {
    query: FlowQuery,
    outcome: String,
    reason: String,
    name: Option<String>,
}

fn parse(line: &str) -> Line {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [
        source,
        ">",
        destination,
        service,
        number,
        "=",
        outcome,
        reason,
        name @ ..,
    ] = &words[..]
    else {
        panic!("{line}");
    };
    let (src, dst): (IpAddr, IpAddr) = (source.parse().unwrap(), destination.parse().unwrap());
    let number: u16 = number.parse().unwrap();
    let (protocol, selector) = match *service {
        "tcp" => (6, number),
        "udp" => (17, number),
        "sctp" => (132, number),
        "icmp" => (if src.is_ipv6() { 58 } else { 1 }, number << 8),
        "proto" => (u8::try_from(number).unwrap(), 0),
        _ => panic!("{line}"),
    };
    Line {
        query: FlowQuery {
            src,
            dst,
            protocol,
            selector,
        },
        outcome: (*outcome).to_owned(),
        reason: (*reason).to_owned(),
        name: name.first().map(|n| (*n).to_owned()),
    }
}

/// The flow's first packet; `port` is the source port or the ICMP identifier.
fn packet(query: &FlowQuery, port: u16) -> Vec<u8> {
    let payload = match query.protocol {
        6 => frame::tcp(port, query.selector, SYN),
        17 | 132 => [frame::udp(port, query.selector), vec![0; 8]].concat(),
        1 | 58 => frame::icmp(query.selector.to_be_bytes()[0], 0, port),
        _ => vec![0; 20],
    };
    frame::frame(query.src, query.dst, query.protocol, &payload)
}

/// Rule and segment as numbers, of a name that the reason gives to one of them.
fn numbers(policy: &Policy, line: &Line) -> (u32, u32) {
    let Some(name) = &line.name else {
        return (EMPTY, EMPTY);
    };
    let find = |names: Vec<&str>| -> u32 {
        let at = names.iter().position(|n| n == name);
        at.unwrap_or_else(|| panic!("no {name}"))
            .try_into()
            .unwrap()
    };
    if line.reason.starts_with("rule") {
        let rules = policy.rules.iter().map(|r| r.name.as_str()).collect();
        (find(rules), EMPTY)
    } else {
        let segments = policy.segments.iter().map(|s| s.name.as_str()).collect();
        (EMPTY, find(segments))
    }
}

#[test]
fn policies_and_packets() {
    pin();
    let mut programs = Programs::load(SIZE_CLASSES[0] as usize);
    let env = Environment {
        host_addresses: [IpAddr::from([10, 0, 9, 9])].into(),
        ..Environment::default()
    };
    let mut lines = 0;
    assert!(CASES.len() >= 25);
    for (title, text, table) in CASES {
        let policy = host::policy(&format!("version: 1\n{text}"));
        let image = kernel::compile(&policy, &env);
        programs.forget_flows();
        programs.apply(&image);
        programs.drain();
        let mut host = Host::new(image);
        let table = table.lines().filter(|l| !l.trim().is_empty());
        for (line, port) in table.zip(20_000u16..) {
            let at = format!("{title}: {}", line.trim());
            let line = parse(line);
            let (rule, segment) = numbers(&policy, &line);

            let judged = reference::judge(&policy, &env, &line.query, 0);
            let outcome = format!("{:?}", judged.outcome).to_lowercase();
            assert_eq!(outcome, line.outcome.replace('_', ""), "reference, {at}");
            assert_eq!(judged.rule.map_or(EMPTY, |r| r.0), rule, "reference, {at}");
            assert_eq!(
                judged.guard.map_or(EMPTY, |g| g.0),
                segment,
                "reference, {at}"
            );

            let bytes = packet(&line.query, port);
            // The host's own address comes in nowhere.
            let own = env.host_addresses.contains(&line.query.src);
            let hook = [Hook::TcIngress, Hook::TcEgress][usize::from(own || port % 2 == 1)];
            let decision = host.judge(hook == Hook::TcIngress, &bytes);
            assert_eq!(decision.outcome.name(), line.outcome, "host, {at}");
            assert_eq!(decision.reason.name(), line.reason, "host, {at}");
            assert_eq!(
                (decision.rule, decision.segment),
                (rule, segment),
                "host, {at}"
            );

            let verdict = programs.judge(hook, &bytes);
            assert_eq!(verdict.outcome.name(), line.outcome, "bytecode, {at}");
            assert_eq!(verdict.reason.name(), line.reason, "bytecode, {at}");
            let events = programs.drain();
            if matches!(verdict.outcome, Outcome::Denied | Outcome::WouldDeny) {
                let event = events.last().unwrap();
                assert_eq!((event.rule, event.segment), (rule, segment), "record, {at}");
            } else {
                assert!(events.is_empty(), "{at}");
            }
            lines += 1;
        }
    }
    println!("{} policies, {lines} packets", CASES.len());
}
