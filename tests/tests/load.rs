//! What the measurements of load rest on: the rules of nftables that are measured beside the
//! enforcer mean the same, and what is said to be forwarded or lost is.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::{Duration, Instant},
};

use enforcer::policy::{
    SourceFile,
    model::{Environment, FlowQuery, Policy},
    parse, reference,
};
use enforcer_tests::{
    daemon::LONG,
    frame::{self, SYN},
    kernel,
    link::Delivered,
    load::{
        connection, flood,
        measure::{CASES, Fresh, Stage, Traffic, packets},
        nftables,
        policy::Shape,
        router::Router,
        subject::{Enforcer, Nftables, Nothing, Subject},
    },
    netns::Family,
    nft::try_nft,
    scale,
    seen::skipped,
    traffic::QUIET,
    wire::{self, Packets},
};

/// What both sides must mean the same by: segments that overlap, exceptions, one-way guards, denies
/// that go before allows, tunnels, requests of ICMP, and addresses in no segment.
fn policy(unsegmented: &str) -> Policy {
    let text = format!(
        r#"version: 1
defaults: {{ unsegmented: {unsegmented} }}
services: {{ range: [tcp/7000-7003, udp/7002] }}
segments:
  wide: {{ members: [{{cidr: 10.64.0.0/16, except: [10.64.3.0/24]}}, {{cidr: "fd0a::/48"}}] }}
  narrow: {{ members: [{{cidr: 10.64.1.0/24}}, {{cidr: "fd0a:0:0:1::/64"}}] }}
  one: {{ members: [{{cidr: 10.64.1.7/32}}, {{cidr: "fd0a:0:0:1::7/128"}}] }}
  guarded: {{ members: [{{range: 10.128.0.5-10.128.0.99}}, {{cidr: "fd0b::/64"}}], protect: inbound }}
  silent: {{ members: [{{cidr: 10.128.4.0/24}}, {{cidr: "fd0b:0:0:4::/64"}}], protect: outbound }}
  all: {{ members: [{{cidr: 10.128.8.0/24}}, {{cidr: "fd0b:0:0:8::/64"}}] }}
groups: {{ left: [wide, one] }}
rules:
  - {{ name: a, from: [left], to: [guarded], services: [range, icmp/echo-request, icmpv6/echo-request] }}
  - {{ name: b, from: [narrow], to: [all], services: [any] }}
  - {{ name: c, from: [one], to: [all], services: [tcp/7001], action: deny }}
  - {{ name: d, from: [unsegmented], to: [guarded], services: [udp/7002, proto/gre] }}
  - {{ name: e, from: [any], to: [silent], services: [udp/7003], action: deny }}
"#
    );
    let name = "peer.yaml".to_owned();
    parse(&[SourceFile { name, text }]).unwrap()
}

/// Addresses of every kind, left and right.
fn ends(family: Family) -> (Vec<IpAddr>, Vec<IpAddr>) {
    let all = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    match family {
        Family::V4 => (
            all(&[
                "10.64.0.1",
                "10.64.1.1",
                "10.64.1.7",
                "10.64.3.1",
                "10.65.0.1",
            ]),
            all(&[
                "10.128.0.4",
                "10.128.0.5",
                "10.128.0.99",
                "10.128.4.1",
                "10.128.8.1",
            ]),
        ),
        Family::V6 => (
            all(&["fd0a::1", "fd0a:0:0:1::1", "fd0a:0:0:1::7", "fd0a:0:1::1"]),
            all(&["fd0b::1", "fd0b:0:0:4::1", "fd0b:0:0:8::1", "fd0b:0:0:9::1"]),
        ),
    }
}

/// Protocol and selector (as in [`FlowQuery`]) of what is tried between any two.
fn services(family: Family) -> Vec<(u8, u16)> {
    let mut services: Vec<(u8, u16)> = (7000..7005)
        .flat_map(|port| [(6, port), (17, port)])
        .collect();
    services.push(match family {
        Family::V4 => (1, 8 << 8),
        Family::V6 => (58, 128 << 8),
    });
    services.push((47, 0));
    services
}

/// The first packet of a flow; `source_port` tells it from those of others.
fn first(query: &FlowQuery, source_port: u16) -> Vec<u8> {
    let transport = match query.protocol {
        6 => frame::tcp(source_port, query.selector, SYN),
        17 => frame::udp(source_port, query.selector),
        1 | 58 => frame::icmp((query.selector >> 8) as u8, 0, source_port),
        _ => vec![0; 8],
    };
    wire::checksummed(frame::ip(query.src, query.dst, query.protocol, &transport))
}

/// What tells the packets of [`first`] apart: protocol, addresses, and the number that it put in.
fn key(frame: &[u8]) -> Vec<u8> {
    let (protocol, addresses) = match frame[12..14] {
        [0x08, 0x00] => (frame[23], 26..34),
        _ => (frame[20], 22..54),
    };
    let transport = addresses.end;
    let number = match protocol {
        1 | 58 => transport + 4..transport + 6,
        _ => transport..transport + 2,
    };
    [&[protocol], &frame[addresses], &frame[number]].concat()
}

/// Which of the first packets of these flows come through.
fn through(router: &Router, family: Family, queries: &[FlowQuery]) -> BTreeSet<usize> {
    let ethertype = match family {
        Family::V4 => 0x0800,
        Family::V6 => 0x86dd,
    };
    let receiver = Delivered::new(&router.wire.b, "eth0", ethertype);
    let sender = Packets::new(&router.wire.a, "eth0", true);
    let links = (
        wire::link_address(&router.wire.a, "eth0"),
        wire::link_address(&router.wire.gateway, "gw-a"),
    );
    let frame =
        |(query, mark): (&FlowQuery, u16)| wire::ethernet(links.0, links.1, &first(query, mark));
    let frames: Vec<Vec<u8>> = queries.iter().zip(20_000..).map(frame).collect();
    let indices: BTreeMap<Vec<u8>, usize> =
        frames.iter().map(|frame| key(frame)).zip(0..).collect();
    let mut came = BTreeSet::new();
    let mut take = |limit: Duration| {
        let frame = receiver.next(limit)?;
        came.extend(indices.get(&key(&frame)));
        Some(came.contains(&(queries.len() - 1)))
    };
    let mut last = false;
    for frame in &frames {
        sender.send(frame);
        while let Some(is_last) = take(Duration::ZERO) {
            last = is_last;
        }
    }
    // One CPU sends, so packets stay in order: what is not here before the last one does not come.
    let start = Instant::now();
    while !last && start.elapsed() < LONG {
        last = take(QUIET) == Some(true);
    }
    assert!(last, "the last one is allowed");
    came
}

fn queries(family: Family) -> Vec<FlowQuery> {
    let (left, right) = ends(family);
    let mut queries = Vec::new();
    for src in left {
        for dst in &right {
            for (protocol, selector) in services(family) {
                queries.push(FlowQuery {
                    src,
                    dst: *dst,
                    protocol,
                    selector,
                });
            }
        }
    }
    // The last one, which all policies here allow.
    queries.sort_by_key(|q| {
        (q.protocol, q.selector) == (6, 7000) && (q.src, q.dst) == allowed(family)
    });
    queries
}

/// Ends between which `tcp/7000` is allowed.
fn allowed(family: Family) -> (IpAddr, IpAddr) {
    let (from, to) = match family {
        Family::V4 => ("10.64.0.1", "10.128.0.5"),
        Family::V6 => ("fd0a::1", "fd0b::1"),
    };
    (from.parse().unwrap(), to.parse().unwrap())
}

/// Whether this kernel has what the rules need; says so where it does not.
fn has_nftables(router: &Router, rules: &str) -> bool {
    match try_nft(&router.wire.gateway, rules) {
        Ok(()) => {
            let delete = format!("delete table {}\n", nftables::TABLE);
            try_nft(&router.wire.gateway, &delete).unwrap();
            true
        }
        Err(complaint) => {
            skipped(&format!("nftables refuses maps to marks: {complaint}"));
            false
        }
    }
}

#[test]
fn nftables_means_what_the_enforcer_means() {
    kernel::pin();
    let router = Router::new();
    for unsegmented in ["allow", "deny"] {
        let policy = policy(unsegmented);
        if !has_nftables(&router, &nftables::ruleset(&policy).unwrap()) {
            return;
        }
        let subjects: [Box<dyn Subject>; 2] = [
            Box::new(Enforcer::load(&policy)),
            Box::new(Nftables::new(&policy)),
        ];
        for mut subject in subjects {
            subject.on(&router.wire.gateway);
            for family in Family::BOTH {
                let queries = queries(family);
                let expected: BTreeSet<usize> = (0..queries.len())
                    .filter(|index| {
                        let query = &queries[*index];
                        let judged = reference::judge(&policy, &Environment::default(), query, 0);
                        !judged.outcome.is_judged_denied()
                    })
                    .collect();
                assert!(!expected.is_empty() && expected.len() < queries.len());
                let came = through(&router, family, &queries);
                let differ: Vec<_> = came
                    .symmetric_difference(&expected)
                    .map(|index| (queries[*index], came.contains(index)))
                    .collect();
                assert!(
                    differ.is_empty(),
                    "{} {unsegmented}: {differ:#?}",
                    subject.name()
                );
            }
            subject.off(&router.wire.gateway);
        }
    }
}

/// What is measured is what it is called, for policies of two sizes and every kind of traffic.
#[test]
fn packets_are_forwarded_or_denied_as_their_case_says() {
    kernel::pin();
    let shape = Shape::new(40);
    let policy = shape.policy();
    let mut subjects: Vec<Box<dyn Subject>> =
        vec![Box::new(Nothing), Box::new(Enforcer::load(&policy))];
    if has_nftables(&Router::new(), &nftables::ruleset(&policy).unwrap()) {
        subjects.push(Box::new(Nftables::new(&policy)));
    }
    let stages: Vec<Stage> = subjects.into_iter().map(Stage::new).collect();
    let mut fresh = Fresh::new();
    for case in CASES {
        let samples = packets(&stages, shape, case, 1, &mut fresh);
        for (stage, samples) in stages.iter().zip(samples) {
            let denied = matches!(case.traffic, Traffic::DeniedAgain(_) | Traffic::DeniedNew);
            let [sample] = samples[..] else {
                panic!("one round")
            };
            let right = if denied && stage.name != "nothing" {
                sample.delivered < 0.01
            } else {
                // A machine that is short of time loses some.
                sample.delivered > 0.5
            };
            assert!(right, "{} {case:?}: {sample:?}", stage.name);
            assert!(sample.ns > 0.0);
        }
    }
    for stage in &stages {
        let time = Duration::from_millis(20);
        assert!(connection::throughput(stage.router(), Family::V4, time) > 0.0);
    }
}

/// Established flows are told from those that are only let in again, and a flood from no flood.
#[test]
fn a_flood_is_survived_by_what_speaks_in_time() {
    for family in Family::BOTH {
        let options = flood::Options {
            family,
            fill: 1 << 10,
            established: 50,
            idle: &[1],
            real_time: false,
            handshakes: scale::within(Duration::from_millis(200)),
        };
        let outcome = flood::run(&options);
        assert_eq!(outcome.alive, [(1, 1.0)]);
        // Where time is short, one in some hundred waits for its answer longer than an entry lasts.
        assert!(outcome.handshakes >= 0.99, "{}", outcome.handshakes);
        assert_eq!((outcome.others, outcome.others_alive), (1.0, 1.0));
        assert_eq!(outcome.refused, 0);
    }
}
